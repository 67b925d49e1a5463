use burn::tensor::{Tensor, activation, backend::Backend};

use super::{flex, in_f32};

/// `x · σ(x)` (Elfwing et al. 2018, <https://arxiv.org/abs/1702.03118>).
pub fn silu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    flex::silu(&x).unwrap_or_else(|| activation::silu(x))
}

/// `x · Φ(x)` with the error function, within 1.5e-7 of it (Hendrycks & Gimpel 2016, <https://arxiv.org/abs/1606.08415>).
pub fn gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    flex::gelu(&x).unwrap_or_else(|| in_f32(x, activation::gelu))
}

/// `x · σ(1.702 x)`.
pub fn quick_gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    x.clone() * activation::sigmoid(x * 1.702)
}

/// The first half of the last dimension times the GELU of the second half: `[batch, tokens, 2 n]` to
/// `[batch, tokens, n]`.
///
/// # Panics
/// If the last dimension is odd.
pub fn geglu<B: Backend>(x: Tensor<B, 3>) -> Tensor<B, 3> {
    let [_, _, width] = x.dims();
    assert!(width.is_multiple_of(2), "{width} columns have no halves");
    if let Some(y) = flex::geglu(&x) {
        return y;
    }
    let value = x.clone().narrow(2, 0, width / 2);
    let gate = x.narrow(2, width / 2, width / 2);
    value * gelu(gate)
}
