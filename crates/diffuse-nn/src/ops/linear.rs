use burn::tensor::{Tensor, backend::Backend};

use super::{flex, gelu};

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
    let d_output = check_linear(&x, &weight, bias.as_ref());
    if let Some(y) = flex::linear(&x, &weight, bias.as_ref()) {
        return y;
    }
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
    y.reshape(shape)
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
    if let Some(y) = flex::linear_geglu(&x, &weight, bias.as_ref()) {
        return y;
    }
    let y = linear(x, weight, bias);
    let values = y.clone().narrow(2, 0, width / 2);
    values * gelu(y.narrow(2, width / 2, width / 2))
}
