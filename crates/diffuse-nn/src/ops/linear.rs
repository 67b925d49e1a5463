use burn::tensor::{Tensor, backend::Backend};

use diffuse_kernels::{Linear, LinearGeglu, LinearToImage, Linears};

use super::{gelu, tokens_to_image};

/// `x Wᵀ + b` over the last dimension.
///
/// # Shapes
/// - `x`: `[.., d_input]`
/// - `weight`: `[d_output, d_input]`, of any floating point type
/// - `bias`: `[d_output]`, of the type of `x`
/// - output: `[.., d_output]`
///
/// # Panics
/// If the last dimension of `x` is not `d_input`, or `bias` has another size.
pub fn linear<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
) -> Tensor<B, D> {
    any_linear(Linear {
        x,
        weight,
        bias,
        residual: None,
    })
}

/// `x Wᵀ` for several weights of one size: as [`linear`] without a bias for each, and faster where
/// the backend computes them in one product.
///
/// # Panics
/// As [`linear`].
pub fn linears<B: Backend, const D: usize, const N: usize>(
    x: Tensor<B, D>,
    weights: [Tensor<B, 2>; N],
) -> [Tensor<B, D>; N] {
    for weight in &weights {
        check_linear(&x, weight, None);
    }
    Linears { x, weights }
        .run()
        .unwrap_or_else(|Linears { x, weights }| {
            weights.map(|weight| linear(x.clone(), weight, None))
        })
}

/// [`linear`], and a residual that its result is added to.
///
/// # Shapes
/// - `residual`: that of the output, of the type of `x`
///
/// # Panics
/// As [`linear`], or if the residual has another shape or type.
pub fn linear_add<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    residual: Tensor<B, D>,
) -> Tensor<B, D> {
    any_linear(Linear {
        x,
        weight,
        bias,
        residual: Some(residual),
    })
}

fn any_linear<B: Backend, const D: usize>(operation: Linear<B, D>) -> Tensor<B, D> {
    let Linear {
        x,
        weight,
        bias,
        residual,
    } = &operation;
    let d_output = check_linear(x, weight, bias.as_ref());
    if let Some(residual) = residual {
        let mut shape = x.dims();
        shape[D - 1] = d_output;
        assert_eq!(residual.dims(), shape, "a residual of another shape");
        assert_eq!(residual.dtype(), x.dtype(), "a residual of another type");
    }
    let Linear {
        x,
        weight,
        bias,
        residual,
    } = match operation.run() {
        Ok(y) => return y,
        Err(operation) => operation,
    };
    let weight = weight.cast(x.dtype());
    // One matrix product over all rows, not one a batch row.
    let (mut shape, d_input) = (x.dims(), weight.dims()[1]);
    let rows = shape[..D - 1].iter().product::<usize>();
    let y = x.reshape([rows, d_input]).matmul(weight.transpose());
    let y = match bias {
        Some(bias) => y + bias.reshape([1, d_output]),
        None => y,
    };
    shape[D - 1] = d_output;
    let y = y.reshape(shape);
    match residual {
        Some(residual) => y + residual,
        None => y,
    }
}

/// A linear layer from tokens to an image's positions, and a residual that the image is added
/// to.
///
/// # Shapes
/// - `x`: `[batch, height · width, d_input]`
/// - `weight`: `[d_output, d_input]`, of any floating point type
/// - `bias`: `[d_output]`, of the type of `x`
/// - `residual`, output: `[batch, d_output, height, width]`, of the type of `x`
///
/// # Panics
/// As [`linear`], or if the residual has another shape or type.
pub fn linear_to_image<B: Backend>(
    x: Tensor<B, 3>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    residual: Tensor<B, 4>,
) -> Tensor<B, 4> {
    let d_output = check_linear(&x, &weight, bias.as_ref());
    let ([batch, tokens, _], shape) = (x.dims(), residual.dims());
    let [_, _, height, width] = shape;
    let fits = shape == [batch, d_output, height, width] && height * width == tokens;
    assert!(fits, "a residual of another shape");
    assert_eq!(residual.dtype(), x.dtype(), "a residual of another type");
    let operation = LinearToImage {
        x,
        weight,
        bias,
        residual,
    };
    let LinearToImage {
        x,
        weight,
        bias,
        residual,
    } = match operation.run() {
        Ok(y) => return y,
        Err(operation) => operation,
    };
    tokens_to_image(linear(x, weight, bias), [height, width]) + residual
}

/// The size of the output.
fn check_linear<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    weight: &Tensor<B, 2>,
    bias: Option<&Tensor<B, 1>>,
) -> usize {
    let [d_output, d_input] = weight.dims();
    let found = x.dims()[D - 1];
    assert_eq!(
        found, d_input,
        "a linear layer for {d_input} features got {found}"
    );
    if let Some(bias) = bias {
        assert_eq!(bias.dims(), [d_output], "a bias of another size");
    }
    d_output
}

/// A linear layer, and the first half of its result times the GELU of the second (Shazeer 2020,
/// <https://arxiv.org/abs/2002.05202>): `a · gelu(b)` with `[a, b] = x Wᵀ + bias`.
///
/// # Shapes
/// - `x`: `[batch, tokens, d_input]`
/// - `weight`: `[2 d_output, d_input]`, of any floating point type
/// - `bias`: `[2 d_output]`, of the type of `x`
/// - output: `[batch, tokens, d_output]`
///
/// # Panics
/// If the weight has an odd number of rows, or is for another input, or `bias` has another size.
pub fn linear_geglu<B: Backend>(
    x: Tensor<B, 3>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
) -> Tensor<B, 3> {
    let width = check_linear(&x, &weight, bias.as_ref());
    assert!(width.is_multiple_of(2), "{width} columns have no halves");
    let LinearGeglu { x, weight, bias } = match (LinearGeglu { x, weight, bias }).run() {
        Ok(y) => return y,
        Err(operation) => operation,
    };
    let y = linear(x, weight, bias);
    let values = y.clone().narrow(2, 0, width / 2);
    values * gelu(y.narrow(2, width / 2, width / 2))
}
