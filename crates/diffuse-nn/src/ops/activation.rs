use burn::tensor::{Tensor, activation, backend::Backend};
use diffuse_kernels::{Activation, Function};

use super::in_f32;

/// `x · σ(x)` (Elfwing et al. 2018, <https://arxiv.org/abs/1702.03118>).
pub fn silu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    apply(x, Function::Silu, activation::silu)
}

/// `x · Φ(x)` with the error function, within 1.5e-7 of it (Hendrycks & Gimpel 2016,
/// <https://arxiv.org/abs/1606.08415>).
pub fn gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    apply(x, Function::Gelu, |x| in_f32(x, activation::gelu))
}

/// `x · σ(1.702 x)`.
pub fn quick_gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    apply(x, Function::QuickGelu, |x| {
        x.clone() * activation::sigmoid(x * 1.702)
    })
}

fn apply<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    function: Function,
    portable: impl FnOnce(Tensor<B, D>) -> Tensor<B, D>,
) -> Tensor<B, D> {
    Activation { x, function }
        .run()
        .unwrap_or_else(|operation| portable(operation.x))
}
