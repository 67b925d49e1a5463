use burn::tensor::{Tensor, backend::Backend};

use diffuse_kernels::{GroupNorm, LayerNorm};

use super::{in_f32, reshape::channel_rows, silu};

/// Group normalisation: `(x - mean) / sqrt(var + eps) · weight + bias`, with the statistics of each
/// of `groups` groups of channels.
///
/// # Shapes
/// - `x`, output: `[batch, channels, height, width]`
/// - `weight`, `bias`: `[channels]`
///
/// # Panics
/// If `weight` and `bias` do not have as many entries as `x` has channels, or they cannot be split
/// into `groups`.
pub fn group_norm<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 1>,
    bias: Tensor<B, 1>,
    groups: usize,
    eps: f64,
) -> Tensor<B, 4> {
    any_group_norm(GroupNorm {
        x,
        weight,
        bias,
        groups,
        eps,
        silu: false,
    })
}

/// [`group_norm`], then [`silu`].
pub fn group_norm_silu<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 1>,
    bias: Tensor<B, 1>,
    groups: usize,
    eps: f64,
) -> Tensor<B, 4> {
    any_group_norm(GroupNorm {
        x,
        weight,
        bias,
        groups,
        eps,
        silu: true,
    })
}

fn any_group_norm<B: Backend>(operation: GroupNorm<B>) -> Tensor<B, 4> {
    let GroupNorm {
        x, weight, bias, ..
    } = &operation;
    check_channels(x, [weight, bias], operation.groups);
    let GroupNorm {
        x,
        weight,
        bias,
        groups,
        eps,
        silu: activate,
    } = match operation.run() {
        Ok(y) => return y,
        Err(operation) => operation,
    };
    in_f32(x, |x| {
        let [batch, channels, height, width] = x.dims();
        let dtype = x.dtype();
        let grouped = x
            .clone()
            .reshape([batch * groups, channels / groups * height * width]);
        let (var, mean) = grouped.var_mean_bias(1);
        let std = (var + eps).sqrt();

        // y = x · scale + shift, a scale and a shift for each channel of each batch row.
        let per_group = [1, groups, channels / groups];
        let weight = weight.cast(dtype).reshape(per_group);
        let bias = bias.cast(dtype).reshape(per_group);
        let scale = weight / std.reshape([batch, groups, 1]);
        let shift = bias - mean.reshape([batch, groups, 1]) * scale.clone();

        let (rows, shape) = channel_rows(x);
        let rows =
            rows * scale.reshape([batch * channels, 1]) + shift.reshape([batch * channels, 1]);
        let y = rows.reshape(shape);
        if activate { silu(y) } else { y }
    })
}

fn check_channels<B: Backend>(x: &Tensor<B, 4>, [weight, bias]: [&Tensor<B, 1>; 2], groups: usize) {
    let ([_, channels, _, _], [expected]) = (x.dims(), weight.dims());
    assert_eq!(weight.dims(), bias.dims(), "weight and bias differ");
    assert_eq!(
        channels, expected,
        "a norm for {expected} channels got {channels}"
    );
    assert!(
        channels.is_multiple_of(groups),
        "{channels} channels cannot be split into {groups} groups"
    );
}

/// Layer normalisation over the last dimension: `(x - mean) / sqrt(var + eps) · weight + bias`.
///
/// # Shapes
/// - `x`, output: `[.., d_model]`
/// - `weight`, `bias`: `[d_model]`
///
/// # Panics
/// If `weight` or `bias` has another size.
pub fn layer_norm<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    weight: Tensor<B, 1>,
    bias: Tensor<B, 1>,
    eps: f64,
) -> Tensor<B, D> {
    let width = x.dims()[D - 1];
    assert_eq!(
        [weight.dims(), bias.dims()],
        [[width]; 2],
        "a norm of another size"
    );
    let operation = LayerNorm {
        x,
        weight,
        bias,
        eps,
    };
    let LayerNorm {
        x, weight, bias, ..
    } = match operation.run() {
        Ok(y) => return y,
        Err(operation) => operation,
    };
    in_f32(x, |x| {
        let shape = x.dims();
        let d_model = shape[D - 1];
        let dtype = x.dtype();
        let rows = x.reshape([shape[..D - 1].iter().product::<usize>(), d_model]);
        let (var, mean) = rows.clone().var_mean_bias(1);
        let normal = (rows - mean) / (var + eps).sqrt();
        let weight = weight.cast(dtype).reshape([1, d_model]);
        let bias = bias.cast(dtype).reshape([1, d_model]);
        (normal * weight + bias).reshape(shape)
    })
}
