//! One function an operation, in burn's tensor operations.
//!
//! Blocks call these and name no backend. Where `diffuse-kernels` has a kernel for the backend, it
//! computes; otherwise burn's operations do. Statistics, softmax and squares are computed in `f32`
//! whatever the type of the tensors, so that half precision neither overflows nor underflows.

mod activation;
mod attention;
mod conv;
mod linear;
mod norm;
mod reshape;

pub use activation::{gelu, quick_gelu, silu};
pub use attention::{attention, causal_attention};
pub use conv::{
    ConvGeometry, conv2d, conv2d_add, conv2d_channel_bias, convolution_weight, downsample_mean,
    upsample_conv2d, upsample_nearest,
};
pub use linear::{linear, linear_add, linear_geglu, linear_to_image, linears};
pub use norm::{group_norm, group_norm_silu, layer_norm};
pub use reshape::{
    add_channel_bias, concat_channels, image_to_tokens, scale_shift_channels, tokens_to_image,
};

use burn::tensor::{DType, Tensor, backend::Backend};

pub use diffuse_kernels::{free_pooled_memory, has_gpu_kernels, on_worker};

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
