use burn::tensor::ops::{ConvOptions, InterpolateMode, InterpolateOptions};
use burn::tensor::{Int, Tensor, TensorData, backend::Backend, module};

pub use diffuse_kernels::ConvGeometry;
use diffuse_kernels::{ArrangeConvWeight, Conv2d, Upsample2x};

use super::{add_channel_bias, in_f32};

/// A 2-D convolution (cross-correlation, as everywhere in the field).
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`
/// - `weight`: `[out, in, kernel, kernel]`, of any floating point type
/// - `bias`: `[out]`, of the type of `x`
/// - output: `[batch, out, height', width']`
///
/// # Panics
/// If `x` does not have the channels that `weight` is for, `bias` has another size, or the padding
/// is larger at the start.
pub fn conv2d<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
    geometry: ConvGeometry,
) -> Tensor<B, 4> {
    any_conv2d(Conv2d {
        x,
        weight,
        bias,
        geometry,
        upsample: false,
        channel_bias: None,
        residual: None,
    })
}

/// [`conv2d`], and a residual that its result is added to.
///
/// # Shapes
/// - `residual`: that of the output, of the type of `x`
///
/// # Panics
/// As [`conv2d`], or if the residual has another shape or type.
pub fn conv2d_add<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
    geometry: ConvGeometry,
    residual: Tensor<B, 4>,
) -> Tensor<B, 4> {
    any_conv2d(Conv2d {
        x,
        weight,
        bias,
        geometry,
        upsample: false,
        channel_bias: None,
        residual: Some(residual),
    })
}

/// [`conv2d`], and a value for each channel of each image that its result is added to.
///
/// # Shapes
/// - `channel_bias`: `[batch, out]`, of the type of `x`
///
/// # Panics
/// As [`conv2d`], or if the channel bias has another shape.
pub fn conv2d_channel_bias<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
    geometry: ConvGeometry,
    channel_bias: Tensor<B, 2>,
) -> Tensor<B, 4> {
    any_conv2d(Conv2d {
        x,
        weight,
        bias,
        geometry,
        upsample: false,
        channel_bias: Some(channel_bias),
        residual: None,
    })
}

/// [`upsample_nearest`] to twice the size, then a [`conv2d`] that keeps the size.
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`
/// - output: `[batch, out, 2 height, 2 width]`
///
/// # Panics
/// As [`conv2d`].
pub fn upsample_conv2d<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
) -> Tensor<B, 4> {
    let [_, _, kernel, _] = weight.dims();
    any_conv2d(Conv2d {
        x,
        weight,
        bias,
        geometry: ConvGeometry::same(kernel),
        upsample: true,
        channel_bias: None,
        residual: None,
    })
}

fn any_conv2d<B: Backend>(operation: Conv2d<B>) -> Tensor<B, 4> {
    check_conv2d(&operation);
    let Conv2d {
        x,
        weight,
        bias,
        geometry,
        upsample,
        channel_bias,
        residual,
    } = match operation.run() {
        Ok(y) => return y,
        Err(operation) => operation,
    };
    // There may be kernels for the parts.
    if upsample || channel_bias.is_some() {
        let [_, _, height, width] = x.dims();
        let x = if upsample {
            upsample_nearest(x, [2 * height, 2 * width])
        } else {
            x
        };
        let y = any_conv2d(Conv2d {
            x,
            weight,
            bias,
            geometry,
            upsample: false,
            channel_bias: None,
            residual,
        });
        return match channel_bias {
            Some(bias) => add_channel_bias(y, bias),
            None => y,
        };
    }
    let weight = weight.cast(x.dtype());
    let extra = geometry.padding_end - geometry.padding_start;
    let x = zeros_after(zeros_after(x, 2, extra), 3, extra);
    let options = ConvOptions::new([geometry.stride; 2], [geometry.padding_start; 2], [1; 2], 1);
    let y = module::conv2d(x, weight, bias, options);
    match residual {
        Some(residual) => y + residual,
        None => y,
    }
}

fn check_conv2d<B: Backend>(operation: &Conv2d<B>) {
    let [batch, channels, _, _] = operation.x.dims();
    let [outputs, expected, _, _] = operation.weight.dims();
    assert_eq!(
        channels, expected,
        "a convolution for {expected} channels got {channels}"
    );
    if let Some(bias) = &operation.bias {
        assert_eq!(bias.dims(), [outputs], "a bias of another size");
    }
    if let Some(bias) = &operation.channel_bias {
        assert_eq!(bias.dims(), [batch, outputs], "a bias of another size");
    }
    let geometry = operation.geometry;
    assert!(
        geometry.padding_end >= geometry.padding_start,
        "more padding at the start than at the end"
    );
    if let Some(residual) = &operation.residual {
        let output = operation.output_size();
        let shape = output.map(|[height, width]| [batch, outputs, height, width]);
        assert_eq!(Some(residual.dims()), shape, "a residual of another shape");
        let dtype = operation.x.dtype();
        assert_eq!(residual.dtype(), dtype, "a residual of another type");
    }
}

/// Appends `count` zeros along a dimension. burn's own padding makes them in the backend's default
/// type, which `Flex` refuses for tensors of another.
fn zeros_after<B: Backend>(x: Tensor<B, 4>, dim: usize, count: usize) -> Tensor<B, 4> {
    if count == 0 {
        return x;
    }
    let mut shape = x.dims();
    shape[dim] = count;
    let zeros = Tensor::zeros(shape, (&x.device(), x.dtype()));
    Tensor::cat(vec![x, zeros], dim)
}

/// Nearest-neighbour resizing: output position `i` shows input position `⌊i · input / output⌋`.
///
/// # Shapes
/// - `x`: `[batch, channels, height, width]`
/// - output: `[batch, channels, size[0], size[1]]`
pub fn upsample_nearest<B: Backend>(x: Tensor<B, 4>, size: [usize; 2]) -> Tensor<B, 4> {
    let [_, _, height, width] = x.dims();
    if size == [2 * height, 2 * width] {
        let Upsample2x { x } = match (Upsample2x { x }).run() {
            Ok(y) => return y,
            Err(operation) => operation,
        };
        let options = InterpolateOptions::new(InterpolateMode::Nearest);
        return module::interpolate(x, size, options);
    }
    // Backends round positions differently where the ratio is not whole, so those are looked up.
    let device = x.device();
    let lookup = |from: usize, to: usize| -> Tensor<B, 1, Int> {
        let indices: Vec<i64> = (0..to).map(|i| (i * from / to) as i64).collect();
        Tensor::from_data(TensorData::new(indices, [to]), &device)
    };
    let rows = lookup(height, size[0]);
    let columns = lookup(width, size[1]);
    x.select(2, rows).select(3, columns)
}

/// The mean of each 2x2 block of positions; a last odd row or column is left out.
///
/// # Shapes
/// - `x`: `[batch, channels, height, width]`
/// - output: `[batch, channels, ⌊height / 2⌋, ⌊width / 2⌋]`
pub fn downsample_mean<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    in_f32(x, |x| {
        module::avg_pool2d(x, [2, 2], [2, 2], [0, 0], true, false)
    })
}

/// A convolution's weight `[out, in, kernel, kernel]` in the order in memory in which the backend's
/// kernels read it; loading calls it, so that they need not do it at each use.
pub fn convolution_weight<B: Backend>(weight: Tensor<B, 4>) -> Tensor<B, 4> {
    ArrangeConvWeight { weight }
        .run()
        .unwrap_or_else(|operation| operation.weight)
}
