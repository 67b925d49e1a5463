use burn::tensor::{Tensor, activation, backend::Backend};

use diffuse_kernels::gpu;

use super::{flex, in_f32};

/// `x · σ(x)` (Elfwing et al. 2018, <https://arxiv.org/abs/1702.03118>).
pub fn silu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    flex::silu(&x)
        .or_else(|| gpu::silu(&x))
        .unwrap_or_else(|| activation::silu(x))
}

/// `x · Φ(x)` with the error function, within 1.5e-7 of it (Hendrycks & Gimpel 2016, <https://arxiv.org/abs/1606.08415>).
pub fn gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    flex::gelu(&x)
        .or_else(|| gpu::gelu(&x))
        .unwrap_or_else(|| in_f32(x, activation::gelu))
}

/// `x · σ(1.702 x)`.
pub fn quick_gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    flex::quick_gelu(&x)
        .or_else(|| gpu::quick_gelu(&x))
        .unwrap_or_else(|| x.clone() * activation::sigmoid(x * 1.702))
}
