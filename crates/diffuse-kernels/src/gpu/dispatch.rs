//! From operations on tensors of any backend to the kernels, and back.

use std::any::{Any, TypeId};

use burn::tensor::{DType, Tensor, TensorPrimitive, backend::Backend};
use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};

use super::{attention as flash, elementwise, layout, matrix, norm};
use crate::{
    Activation, ArrangeConvWeight, Attention, ConcatChannels, Conv2d, GroupNorm, ImageToTokens,
    LayerNorm, Linear, LinearGeglu, LinearToImage, Linears, TokensToImage,
};

/// Computes with the runtime whose tensors the backend has; `None` where that is none of those built in.
macro_rules! on_runtime {
    ($B:ident, |$R:ident| $body:expr) => {{
        #[cfg(feature = "cuda")]
        {
            type $R = cubecl::cuda::CudaRuntime;
            if is_of::<$R, $B>() {
                return $body;
            }
        }
        #[cfg(feature = "wgpu")]
        {
            type $R = cubecl::wgpu::WgpuRuntime;
            if is_of::<$R, $B>() {
                return $body;
            }
        }
        None
    }};
}

fn is_of<R: CubeRuntime, B: Backend>() -> bool {
    TypeId::of::<B::FloatTensorPrimitive>() == TypeId::of::<CubeTensor<R>>()
}

/// The runtime's tensor of a tensor; `None` if it is of another backend, or quantised.
fn take<R: CubeRuntime, B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<CubeTensor<R>> {
    let TensorPrimitive::Float(primitive) = x.clone().into_primitive() else {
        return None;
    };
    let mut slot = Some(primitive);
    let tensor = (&mut slot as &mut dyn Any)
        .downcast_mut::<Option<CubeTensor<R>>>()?
        .take()?;
    // Kernels read 16 bytes at once, so views must begin at multiples of that.
    tensor
        .handle
        .offset_start
        .unwrap_or(0)
        .is_multiple_of(16)
        .then_some(tensor)
}

fn take_all<R: CubeRuntime, B: Backend, const D: usize>(
    x: Option<&Tensor<B, D>>,
) -> Option<Option<CubeTensor<R>>> {
    match x {
        Some(x) => Some(Some(take(x)?)),
        None => Some(None),
    }
}

fn give<R: CubeRuntime, B: Backend, const D: usize>(x: CubeTensor<R>) -> Option<Tensor<B, D>> {
    let mut slot = Some(x);
    let primitive = (&mut slot as &mut dyn Any)
        .downcast_mut::<Option<B::FloatTensorPrimitive>>()?
        .take()?;
    Some(Tensor::from_primitive(TensorPrimitive::Float(primitive)))
}

/// Whether a backend is one that kernels here compute on.
pub fn computes_on<B: Backend>() -> bool {
    let runtimes: &[TypeId] = &[
        #[cfg(feature = "cuda")]
        TypeId::of::<CubeTensor<cubecl::cuda::CudaRuntime>>(),
        #[cfg(feature = "wgpu")]
        TypeId::of::<CubeTensor<cubecl::wgpu::WgpuRuntime>>(),
    ];
    runtimes.contains(&TypeId::of::<B::FloatTensorPrimitive>())
}

/// A weight in the type of the tensor that it is multiplied with.
fn take_weight<R: CubeRuntime, B: Backend, const D: usize>(
    weight: &Tensor<B, D>,
    dtype: DType,
) -> Option<CubeTensor<R>> {
    take(&weight.clone().cast(dtype))
}

/// See [`Activation`].
pub fn activation<B: Backend, const D: usize>(
    operation: &Activation<B, D>,
) -> Option<Tensor<B, D>> {
    on_runtime!(B, |R| give(elementwise::activation::<R>(
        take(&operation.x)?,
        operation.function
    )))
}

/// See [`ConcatChannels`].
pub fn concat_channels<B: Backend>(operation: &ConcatChannels<B>) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| give(elementwise::concat_channels::<R>(
        take(&operation.a)?,
        take(&operation.b)?
    )))
}

/// See [`GroupNorm`].
pub fn group_norm<B: Backend>(operation: &GroupNorm<B>) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| give(norm::group_norm::<R>(
        take(&operation.x)?,
        take(&operation.weight)?,
        take(&operation.bias)?,
        operation.groups,
        operation.eps,
        operation.silu
    )?))
}

/// See [`LayerNorm`].
pub fn layer_norm<B: Backend, const D: usize>(operation: &LayerNorm<B, D>) -> Option<Tensor<B, D>> {
    on_runtime!(B, |R| give(norm::layer_norm::<R>(
        take(&operation.x)?,
        take(&operation.weight)?,
        take(&operation.bias)?,
        operation.eps
    )?))
}

/// See [`Linear`].
pub fn linear<B: Backend, const D: usize>(operation: &Linear<B, D>) -> Option<Tensor<B, D>> {
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = take(&operation.x)?;
        let weight = take_weight(&operation.weight, x.dtype)?;
        let residual: Option<CubeTensor<R>> = take_all(operation.residual.as_ref())?;
        let added = matrix::Added {
            bias: take_all(operation.bias.as_ref())?,
            channel_bias: None,
            residual: residual.map(into_contiguous),
        };
        give(matrix::linear::<R>(x, weight, added, false)?)
    })
}

/// See [`Linears`]: two or three weights.
pub fn linears<B: Backend, const D: usize, const N: usize>(
    operation: &Linears<B, D, N>,
) -> Option<[Tensor<B, D>; N]> {
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = take(&operation.x)?;
        let weights = operation.weights.iter();
        let weights: Option<Vec<CubeTensor<R>>> =
            weights.map(|weight| take_weight(weight, x.dtype)).collect();
        let results = matrix::linears::<R>(x, weights?)?;
        let results: Option<Vec<_>> = results.into_iter().map(give).collect();
        results?.try_into().ok()
    })
}

/// See [`LinearGeglu`].
pub fn linear_geglu<B: Backend>(operation: &LinearGeglu<B>) -> Option<Tensor<B, 3>> {
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = take(&operation.x)?;
        let weight = take_weight(&operation.weight, x.dtype)?;
        let added = matrix::Added {
            bias: take_all(operation.bias.as_ref())?,
            ..Default::default()
        };
        give(matrix::linear::<R>(x, weight, added, true)?)
    })
}

/// See [`LinearToImage`].
pub fn linear_to_image<B: Backend>(operation: &LinearToImage<B>) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = take(&operation.x)?;
        let weight = take_weight(&operation.weight, x.dtype)?;
        let residual = layout::Image::<R>::new(take(&operation.residual)?);
        let size = [residual.height, residual.width];
        let added = matrix::Added {
            bias: take_all(operation.bias.as_ref())?,
            channel_bias: None,
            residual: Some(residual.into_tokens()),
        };
        let tokens = matrix::linear::<R>(x, weight, added, false)?;
        give(layout::image_of_tokens(tokens, size))
    })
}

/// See [`ImageToTokens`]: the same memory.
pub fn image_to_tokens<B: Backend>(operation: &ImageToTokens<B>) -> Option<Tensor<B, 3>> {
    on_runtime!(B, |R| {
        give(layout::Image::<R>::new(take(&operation.x)?).into_tokens())
    })
}

/// See [`TokensToImage`]: the same memory.
pub fn tokens_to_image<B: Backend>(operation: &TokensToImage<B>) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| give(layout::image_of_tokens::<R>(
        take(&operation.x)?,
        operation.size
    )))
}

/// See [`Conv2d`].
pub fn conv2d<B: Backend>(operation: &Conv2d<B>) -> Option<Tensor<B, 4>> {
    let output = operation.output_size()?;
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = take(&operation.x)?;
        let weight = take_weight(&operation.weight, x.dtype)?;
        let geometry = matrix::Geometry {
            stride: operation.geometry.stride,
            padding: operation.geometry.padding_start,
            output,
            enlarged: operation.upsample,
        };
        let channel_bias: Option<CubeTensor<R>> = take_all(operation.channel_bias.as_ref())?;
        let added = matrix::Added {
            bias: take_all(operation.bias.as_ref())?,
            channel_bias: channel_bias.map(into_contiguous),
            residual: take_all(operation.residual.as_ref())?,
        };
        give(matrix::conv2d::<R>(x, weight, added, geometry)?)
    })
}

/// See [`ArrangeConvWeight`]: the input channels last in memory.
pub fn arrange_conv_weight<B: Backend>(operation: &ArrangeConvWeight<B>) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| give(layout::kernel_channels_last::<R>(take(
        &operation.weight
    )?)))
}

/// See [`Attention`].
pub fn attention<B: Backend>(operation: &Attention<B>) -> Option<Tensor<B, 3>> {
    let Attention {
        query,
        key,
        value,
        heads,
        causal,
    } = operation;
    let [batch, _, width] = query.dims();
    if batch > 1 && width / heads > flash::LARGEST_HEAD && computes_on::<B>() {
        let image = |x: &Tensor<B, 3>, index| x.clone().narrow(0, index, 1);
        let rows = (0..batch).map(|index| {
            attention(&Attention {
                query: image(query, index),
                key: image(key, index),
                value: image(value, index),
                ..*operation
            })
        });
        let rows: Option<Vec<_>> = rows.collect();
        return rows.map(|rows| Tensor::cat(rows, 0));
    }
    on_runtime!(B, |R| give(flash::attention::<R>(
        take(query)?,
        take(key)?,
        take(value)?,
        *heads,
        *causal
    )?))
}
