use burn::tensor::{Tensor, backend::Backend};

use super::flex;

/// `x Wᵀ + b` over the last dimension.
///
/// # Shapes
/// - `x`: `[.., d_input]`
/// - `weight`: `[d_output, d_input]`
/// - `bias`: `[d_output]`
/// - output: `[.., d_output]`
///
/// # Panics
/// If the last dimension of `x` is not `d_input`, or `bias` has another size.
pub fn linear<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
) -> Tensor<B, D> {
    let mut shape = x.dims();
    let [d_output, d_input] = weight.dims();
    assert_eq!(
        shape[D - 1],
        d_input,
        "a linear layer for {d_input} features got {}",
        shape[D - 1],
    );
    if let Some(bias) = &bias {
        assert_eq!(bias.dims(), [d_output], "a bias of another size");
    }
    if let Some(y) = flex::linear(&x, &weight, bias.as_ref()) {
        return y;
    }
    // One matrix product over all rows, not one a batch row.
    let rows = shape[..D - 1].iter().product::<usize>();
    let y = x.reshape([rows, d_input]).matmul(weight.transpose());
    let y = match bias {
        Some(bias) => y + bias.reshape([1, d_output]),
        None => y,
    };
    shape[D - 1] = d_output;
    y.reshape(shape)
}
