//! Converts operations on tensors of any backend to kernel calls.

use std::any::{Any, TypeId};

use burn::tensor::{DType, Tensor, TensorPrimitive, backend::Backend};
use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};

use super::tiles::has_tensor_cores;
use super::{attention as flash, elementwise, layout, matrix, norm};
use crate::{
    Activation, ArrangeConvWeight, Attention, ConcatChannels, Conv2d, GroupNorm, ImageToTokens,
    LayerNorm, Linear, LinearGeglu, LinearToImage, Linears, TokensToImage,
};

/// Computes with the CubeCL runtime of the backend; `None` if the backend has none, or it is not
/// built in.
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

/// The CubeCL tensor of a tensor; `None` if it is of another backend, quantised, or not aligned.
fn to_cube_tensor<R: CubeRuntime, B: Backend, const D: usize>(
    x: &Tensor<B, D>,
) -> Option<CubeTensor<R>> {
    let TensorPrimitive::Float(primitive) = x.clone().into_primitive() else {
        return None;
    };
    let mut slot = Some(primitive);
    let tensor = (&mut slot as &mut dyn Any)
        .downcast_mut::<Option<CubeTensor<R>>>()?
        .take()?;
    // Kernels read vectors of 16 bytes, so views must begin at multiples of that.
    tensor
        .handle
        .offset_start
        .unwrap_or(0)
        .is_multiple_of(16)
        .then_some(tensor)
}

/// An optional tensor that is added to a result; `None` if its shape or type differs, since kernels
/// do not check indices against the sizes of all arguments.
fn to_addend<R: CubeRuntime, B: Backend, const D: usize>(
    x: Option<&Tensor<B, D>>,
    shape: [usize; D],
    dtype: DType,
) -> Option<Option<CubeTensor<R>>> {
    match x {
        Some(x) if x.dims() == shape && x.dtype() == dtype => Some(Some(to_cube_tensor(x)?)),
        Some(_) => None,
        None => Some(None),
    }
}

fn to_tensor<R: CubeRuntime, B: Backend, const D: usize>(x: CubeTensor<R>) -> Option<Tensor<B, D>> {
    let mut slot = Some(x);
    let primitive = (&mut slot as &mut dyn Any)
        .downcast_mut::<Option<B::FloatTensorPrimitive>>()?
        .take()?;
    Some(Tensor::from_primitive(TensorPrimitive::Float(primitive)))
}

/// Whether there are kernels for a backend.
pub fn computes_on<B: Backend>() -> bool {
    let runtimes: &[TypeId] = &[
        #[cfg(feature = "cuda")]
        TypeId::of::<CubeTensor<cubecl::cuda::CudaRuntime>>(),
        #[cfg(feature = "wgpu")]
        TypeId::of::<CubeTensor<cubecl::wgpu::WgpuRuntime>>(),
    ];
    runtimes.contains(&TypeId::of::<B::FloatTensorPrimitive>())
}

/// A weight, converted to the type of the tensor that it is multiplied with.
fn to_weight<R: CubeRuntime, B: Backend, const D: usize>(
    weight: &Tensor<B, D>,
    dtype: DType,
) -> Option<CubeTensor<R>> {
    to_cube_tensor(&weight.clone().cast(dtype))
}

/// Whether weight and bias of a norm have this size, and one type.
fn are_parameters_of<B: Backend>([weight, bias]: [&Tensor<B, 1>; 2], size: usize) -> bool {
    [weight.dims(), bias.dims()] == [[size]; 2] && weight.dtype() == bias.dtype()
}

/// See [`Activation`].
pub fn activation<B: Backend, const D: usize>(
    operation: &Activation<B, D>,
) -> Option<Tensor<B, D>> {
    on_runtime!(B, |R| to_tensor(elementwise::activation::<R>(
        to_cube_tensor(&operation.x)?,
        operation.function
    )))
}

/// See [`ConcatChannels`].
pub fn concat_channels<B: Backend>(operation: &ConcatChannels<B>) -> Option<Tensor<B, 4>> {
    let (a, b) = (operation.a.dims(), operation.b.dims());
    if [a[0], a[2], a[3]] != [b[0], b[2], b[3]] || operation.a.dtype() != operation.b.dtype() {
        return None;
    }
    on_runtime!(B, |R| to_tensor(elementwise::concat_channels::<R>(
        to_cube_tensor(&operation.a)?,
        to_cube_tensor(&operation.b)?
    )))
}

/// See [`GroupNorm`].
pub fn group_norm<B: Backend>(operation: &GroupNorm<B>) -> Option<Tensor<B, 4>> {
    let [_, channels, _, _] = operation.x.dims();
    if !are_parameters_of([&operation.weight, &operation.bias], channels)
        || !channels.is_multiple_of(operation.groups)
    {
        return None;
    }
    on_runtime!(B, |R| to_tensor(norm::group_norm::<R>(
        to_cube_tensor(&operation.x)?,
        to_cube_tensor(&operation.weight)?,
        to_cube_tensor(&operation.bias)?,
        operation.groups,
        operation.eps,
        operation.silu
    )?))
}

/// See [`LayerNorm`].
pub fn layer_norm<B: Backend, const D: usize>(operation: &LayerNorm<B, D>) -> Option<Tensor<B, D>> {
    let features = operation.x.dims()[D - 1];
    if !are_parameters_of([&operation.weight, &operation.bias], features) {
        return None;
    }
    on_runtime!(B, |R| to_tensor(norm::layer_norm::<R>(
        to_cube_tensor(&operation.x)?,
        to_cube_tensor(&operation.weight)?,
        to_cube_tensor(&operation.bias)?,
        operation.eps
    )?))
}

/// See [`Linear`].
pub fn linear<B: Backend, const D: usize>(operation: &Linear<B, D>) -> Option<Tensor<B, D>> {
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = to_cube_tensor(&operation.x)?;
        let (mut shape, dtype) = (operation.x.dims(), x.dtype);
        let [columns, depth] = operation.weight.dims();
        if shape[D - 1] != depth {
            return None;
        }
        shape[D - 1] = columns;
        let weight = to_weight(&operation.weight, dtype)?;
        let residual: Option<CubeTensor<R>> = to_addend(operation.residual.as_ref(), shape, dtype)?;
        let addends = matrix::Addends {
            bias: to_addend(operation.bias.as_ref(), [columns], dtype)?,
            channel_bias: None,
            residual: residual.map(into_contiguous),
        };
        to_tensor(matrix::linear::<R>(x, weight, addends, false)?)
    })
}

/// See [`Linears`]: two or three weights.
pub fn linears<B: Backend, const D: usize, const N: usize>(
    operation: &Linears<B, D, N>,
) -> Option<[Tensor<B, D>; N]> {
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = to_cube_tensor(&operation.x)?;
        // Without tensor cores the weights are applied one by one.
        if !has_tensor_cores(&x.client, x.dtype) {
            return None;
        }
        let depth = operation.x.dims()[D - 1];
        if operation
            .weights
            .iter()
            .any(|weight| weight.dims()[1] != depth)
        {
            return None;
        }
        let weights = operation.weights.iter();
        let weights: Option<Vec<CubeTensor<R>>> =
            weights.map(|weight| to_weight(weight, x.dtype)).collect();
        let results = matrix::linears::<R>(x, weights?)?;
        let results: Option<Vec<_>> = results.into_iter().map(to_tensor).collect();
        results?.try_into().ok()
    })
}

/// See [`LinearGeglu`].
pub fn linear_geglu<B: Backend>(operation: &LinearGeglu<B>) -> Option<Tensor<B, 3>> {
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = to_cube_tensor(&operation.x)?;
        let ([_, _, from], [columns, depth]) = (operation.x.dims(), operation.weight.dims());
        if from != depth {
            return None;
        }
        let weight = to_weight(&operation.weight, x.dtype)?;
        let addends = matrix::Addends {
            bias: to_addend(operation.bias.as_ref(), [columns], x.dtype)?,
            ..Default::default()
        };
        to_tensor(matrix::linear::<R>(x, weight, addends, true)?)
    })
}

/// See [`LinearToImage`].
pub fn linear_to_image<B: Backend>(operation: &LinearToImage<B>) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = to_cube_tensor(&operation.x)?;
        let [batch, tokens, from] = operation.x.dims();
        let [columns, depth] = operation.weight.dims();
        let [_, _, height, width] = operation.residual.dims();
        let shape = [batch, columns, height, width];
        if from != depth || height * width != tokens {
            return None;
        }
        let weight = to_weight(&operation.weight, x.dtype)?;
        let residual = to_addend(Some(&operation.residual), shape, x.dtype)??;
        let residual = layout::Image::<R>::new(residual);
        let size = [residual.height, residual.width];
        let addends = matrix::Addends {
            bias: to_addend(operation.bias.as_ref(), [columns], x.dtype)?,
            channel_bias: None,
            residual: Some(residual.into_tokens()),
        };
        let tokens = matrix::linear::<R>(x, weight, addends, false)?;
        to_tensor(layout::image_of_tokens(tokens, size))
    })
}

/// See [`ImageToTokens`]: a view of the same memory.
pub fn image_to_tokens<B: Backend>(operation: &ImageToTokens<B>) -> Option<Tensor<B, 3>> {
    on_runtime!(B, |R| {
        to_tensor(layout::Image::<R>::new(to_cube_tensor(&operation.x)?).into_tokens())
    })
}

/// See [`TokensToImage`]: a view of the same memory.
pub fn tokens_to_image<B: Backend>(operation: &TokensToImage<B>) -> Option<Tensor<B, 4>> {
    let ([_, tokens, _], [height, width]) = (operation.x.dims(), operation.size);
    if height * width != tokens {
        return None;
    }
    on_runtime!(B, |R| to_tensor(layout::image_of_tokens::<R>(
        to_cube_tensor(&operation.x)?,
        operation.size
    )))
}

/// See [`Conv2d`].
pub fn conv2d<B: Backend>(operation: &Conv2d<B>) -> Option<Tensor<B, 4>> {
    let output = operation.output_size()?;
    let [batch, channels, _, _] = operation.x.dims();
    let [to, from, rows, columns] = operation.weight.dims();
    if from != channels || rows != columns {
        return None;
    }
    on_runtime!(B, |R| {
        let x: CubeTensor<R> = to_cube_tensor(&operation.x)?;
        let weight = to_weight(&operation.weight, x.dtype)?;
        let geometry = matrix::Geometry {
            stride: operation.geometry.stride,
            padding: operation.geometry.padding_start,
            output,
            upsample: operation.upsample,
        };
        let channel_bias: Option<CubeTensor<R>> =
            to_addend(operation.channel_bias.as_ref(), [batch, to], x.dtype)?;
        let shape = [batch, to, output[0], output[1]];
        let addends = matrix::Addends {
            bias: to_addend(operation.bias.as_ref(), [to], x.dtype)?,
            channel_bias: channel_bias.map(into_contiguous),
            residual: to_addend(operation.residual.as_ref(), shape, x.dtype)?,
        };
        to_tensor(matrix::conv2d::<R>(x, weight, addends, geometry)?)
    })
}

/// See [`ArrangeConvWeight`]: the input channels last in memory.
pub fn arrange_conv_weight<B: Backend>(operation: &ArrangeConvWeight<B>) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| to_tensor(layout::kernel_channels_last::<R>(
        to_cube_tensor(&operation.weight)?
    )))
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
    let [batch, tokens, width] = query.dims();
    let [_, context, _] = key.dims();
    let fits = [key.dims(), value.dims()] == [[batch, context, width]; 2]
        && [key.dtype(), value.dtype()] == [query.dtype(); 2]
        && width.is_multiple_of(*heads)
        && (context == tokens || !causal);
    if !fits {
        return None;
    }
    if batch > 1 && width / heads > flash::MAX_HEAD && computes_on::<B>() {
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
    on_runtime!(B, |R| to_tensor(flash::attention::<R>(
        to_cube_tensor(query)?,
        to_cube_tensor(key)?,
        to_cube_tensor(value)?,
        *heads,
        *causal
    )?))
}
