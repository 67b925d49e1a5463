//! One function an operation, in burn's tensor operations.
//!
//! Blocks call these and name no backend. Where a backend's own operation is slow or loses precision, this is the one
//! place to route around it: with the feature `flex`, the module `flex` has fast bodies for the CPU, and
//! `diffuse-kernels` has them for GPUs. Statistics, softmax
//! and squares are computed in `f32` whatever the type of the tensors, so that half precision neither overflows nor
//! underflows.

mod activation;
mod attention;
mod conv;
#[cfg(feature = "flex")]
mod flex;
#[cfg(not(feature = "flex"))]
#[path = "no_flex.rs"]
mod flex;
mod linear;
mod norm;
mod reshape;

pub use activation::{gelu, quick_gelu, silu};
pub use attention::{attention, causal_attention};
pub use conv::{
    ConvGeometry, conv2d, conv2d_add, conv2d_channel_bias, convolution_weight, upsample_conv2d,
    upsample_nearest,
};
pub use linear::{linear, linear_add, linear_geglu, linear_to_image, linears};
pub use norm::{group_norm, group_norm_silu, layer_norm};
pub use reshape::{
    add_channel_bias, concat_channels, image_to_tokens, scale_shift_channels, tokens_to_image,
};

use burn::tensor::{DType, Tensor, backend::Backend};

/// Runs a network on one of the threads that share the work of its operations.
///
/// On the CPU each operation would else be handed to them, and back, by a thread that sleeps meanwhile: with many small
/// operations, waking up takes longer than some of them. Elsewhere it runs where it is.
///
/// A thread that waits for others takes on what is there to do, which may be another network: of networks that run at the same
/// time, one may then be done only after the other.
pub fn on_worker<B: Backend, R: Send>(network: impl FnOnce() -> R + Send) -> R {
    flex::on_worker::<B, R>(network)
}

/// Whether the backend is a GPU's for which there are kernels: half precision is fast there, and its sums are `f32`.
pub fn has_gpu_kernels<B: Backend>() -> bool {
    diffuse_kernels::gpu::computes_on::<B>()
}

/// Runs `f` in `f32` and gives its result the type of `x` again.
fn in_f32<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    f: impl FnOnce(Tensor<B, D>) -> Tensor<B, D>,
) -> Tensor<B, D> {
    match x.dtype() {
        DType::F16 | DType::BF16 => {
            let dtype = x.dtype();
            f(x.cast(DType::F32)).cast(dtype)
        }
        _ => f(x),
    }
}
