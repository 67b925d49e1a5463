//! From tensors of any backend to the kernels, and back.

#![cfg_attr(
    not(feature = "gpu"),
    allow(
        unused_variables,
        reason = "without a GPU backend there are no kernels to give them to"
    )
)]

use std::any::TypeId;

use burn::tensor::{Tensor, backend::Backend};

#[cfg(feature = "gpu")]
use {
    super::{attention as flash, elementwise, layout, matrix, norm},
    burn::tensor::TensorPrimitive,
    burn_cubecl::{CubeRuntime, tensor::CubeTensor},
    std::any::Any,
};

/// What a convolution reads, and what is added to its result.
#[derive(Debug, Clone)]
pub struct Conv2d<B: Backend> {
    /// Distance of two receptive fields.
    pub stride: usize,
    /// Zeros above and to the left; those below and to the right follow from the size of the output.
    pub padding: usize,
    /// Height and width of the output.
    pub output: [usize; 2],
    /// The input is enlarged to twice its height and width first, each pixel repeated.
    pub enlarged: bool,
    /// `[channels]`
    pub bias: Option<Tensor<B, 1>>,
    /// `[batch, channels]`
    pub channel_bias: Option<Tensor<B, 2>>,
    /// As the output.
    pub residual: Option<Tensor<B, 4>>,
}

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

#[cfg(feature = "gpu")]
fn is_of<R: CubeRuntime, B: Backend>() -> bool {
    TypeId::of::<B::FloatTensorPrimitive>() == TypeId::of::<CubeTensor<R>>()
}

/// The runtime's tensor of a tensor; `None` if it is of another backend, or quantised.
#[cfg(feature = "gpu")]
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

#[cfg(feature = "gpu")]
fn take_all<R: CubeRuntime, B: Backend, const D: usize>(
    x: Option<&Tensor<B, D>>,
) -> Option<Option<CubeTensor<R>>> {
    match x {
        Some(x) => Some(Some(take(x)?)),
        None => Some(None),
    }
}

#[cfg(feature = "gpu")]
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

/// `x · σ(x)`
pub fn silu<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    on_runtime!(B, |R| give(elementwise::activation::<R>(
        take(x)?,
        elementwise::Activation::Silu
    )))
}

/// `x · Φ(x)`
pub fn gelu<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    on_runtime!(B, |R| give(elementwise::activation::<R>(
        take(x)?,
        elementwise::Activation::Gelu
    )))
}

/// `x · σ(1.702 x)`
pub fn quick_gelu<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    on_runtime!(B, |R| give(elementwise::activation::<R>(
        take(x)?,
        elementwise::Activation::QuickGelu
    )))
}

/// The channels of `a`, then those of `b`; `[batch, channels, height, width]`.
pub fn concat_channels<B: Backend>(a: &Tensor<B, 4>, b: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| give(elementwise::concat_channels::<R>(
        take(a)?,
        take(b)?
    )))
}

/// Group norm of `[batch, channels, height, width]`, then SiLU if it is asked for.
pub fn group_norm<B: Backend>(
    x: &Tensor<B, 4>,
    weight: &Tensor<B, 1>,
    bias: &Tensor<B, 1>,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| give(norm::group_norm::<R>(
        take(x)?,
        take(weight)?,
        take(bias)?,
        groups,
        eps,
        silu
    )?))
}

/// Layer norm over the last dimension.
pub fn layer_norm<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    weight: &Tensor<B, 1>,
    bias: &Tensor<B, 1>,
    eps: f64,
) -> Option<Tensor<B, D>> {
    on_runtime!(B, |R| give(norm::layer_norm::<R>(
        take(x)?,
        take(weight)?,
        take(bias)?,
        eps
    )?))
}

/// `x Wᵀ + bias + residual` over the last dimension; the weight is `[out, in]` and of the type of `x`.
pub fn linear<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    weight: &Tensor<B, 2>,
    bias: Option<&Tensor<B, 1>>,
    residual: Option<&Tensor<B, D>>,
) -> Option<Tensor<B, D>> {
    if weight.dtype() != x.dtype() {
        return None;
    }
    on_runtime!(B, |R| {
        let residual: Option<CubeTensor<R>> = take_all(residual)?;
        let added = matrix::Added {
            bias: take_all(bias)?,
            channel_bias: None,
            residual: residual.map(burn_cubecl::kernel::into_contiguous),
        };
        give(matrix::linear::<R>(take(x)?, take(weight)?, added, false)?)
    })
}

/// `x Wᵀ` for two or three weights `[out, in]` of one size.
pub fn linears<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    weights: &[&Tensor<B, 2>],
) -> Option<Vec<Tensor<B, D>>> {
    if weights.iter().any(|weight| weight.dtype() != x.dtype()) {
        return None;
    }
    on_runtime!(B, |R| {
        let weights: Option<Vec<CubeTensor<R>>> =
            weights.iter().map(|weight| take(weight)).collect();
        matrix::linears::<R>(take(x)?, weights?)?
            .into_iter()
            .map(give)
            .collect()
    })
}

/// The first half of the columns of `x Wᵀ + bias` times the GELU of the second.
pub fn linear_geglu<B: Backend>(
    x: &Tensor<B, 3>,
    weight: &Tensor<B, 2>,
    bias: Option<&Tensor<B, 1>>,
) -> Option<Tensor<B, 3>> {
    if weight.dtype() != x.dtype() {
        return None;
    }
    on_runtime!(B, |R| {
        let added = matrix::Added {
            bias: take_all(bias)?,
            ..Default::default()
        };
        give(matrix::linear::<R>(take(x)?, take(weight)?, added, true)?)
    })
}

/// A linear layer from tokens `[batch, height · width, channels]` to an image that `residual` is added to.
pub fn linear_to_image<B: Backend>(
    x: &Tensor<B, 3>,
    weight: &Tensor<B, 2>,
    bias: Option<&Tensor<B, 1>>,
    residual: &Tensor<B, 4>,
) -> Option<Tensor<B, 4>> {
    if weight.dtype() != x.dtype() {
        return None;
    }
    on_runtime!(B, |R| {
        let residual = layout::Image::<R>::new(take(residual)?);
        let size = [residual.height, residual.width];
        let added = matrix::Added {
            bias: take_all(bias)?,
            channel_bias: None,
            residual: Some(residual.into_tokens()),
        };
        let tokens = matrix::linear::<R>(take(x)?, take(weight)?, added, false)?;
        give(layout::image_of_tokens(tokens, size))
    })
}

/// `[batch, channels, height, width]` to `[batch, height · width, channels]`, which is the same memory.
pub fn image_to_tokens<B: Backend>(x: &Tensor<B, 4>) -> Option<Tensor<B, 3>> {
    on_runtime!(B, |R| give(layout::Image::<R>::new(take(x)?).into_tokens()))
}

/// `[batch, height · width, channels]` to `[batch, channels, height, width]`, which is the same memory.
pub fn tokens_to_image<B: Backend>(x: &Tensor<B, 3>, size: [usize; 2]) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| give(layout::image_of_tokens::<R>(take(x)?, size)))
}

/// A convolution of `[batch, channels, height, width]` with a weight `[out, in, kernel, kernel]` of the type of `x`.
pub fn conv2d<B: Backend>(
    x: &Tensor<B, 4>,
    weight: &Tensor<B, 4>,
    conv: Conv2d<B>,
) -> Option<Tensor<B, 4>> {
    if weight.dtype() != x.dtype() {
        return None;
    }
    on_runtime!(B, |R| {
        let geometry = matrix::Geometry {
            stride: conv.stride,
            padding: conv.padding,
            output: conv.output,
            enlarged: conv.enlarged,
        };
        let channel_bias: Option<CubeTensor<R>> = take_all(conv.channel_bias.as_ref())?;
        let added = matrix::Added {
            bias: take_all(conv.bias.as_ref())?,
            channel_bias: channel_bias.map(burn_cubecl::kernel::into_contiguous),
            residual: take_all(conv.residual.as_ref())?,
        };
        give(matrix::conv2d::<R>(
            take(x)?,
            take(weight)?,
            added,
            geometry,
        )?)
    })
}

/// A convolution's weight `[out, in, kernel, kernel]` as the kernels read it, the input channels last in memory.
pub fn convolution_weight<B: Backend>(weight: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    on_runtime!(B, |R| give(layout::kernel_channels_last::<R>(take(
        weight
    )?)))
}

/// Multi-head attention of `[batch, tokens, heads · size]`.
pub fn attention<B: Backend>(
    query: &Tensor<B, 3>,
    key: &Tensor<B, 3>,
    value: &Tensor<B, 3>,
    heads: usize,
    causal: bool,
) -> Option<Tensor<B, 3>> {
    #[cfg(feature = "gpu")]
    {
        let [batch, _, width] = query.dims();
        if batch > 1 && width / heads > flash::LARGEST_HEAD && computes_on::<B>() {
            let image = |x: &Tensor<B, 3>, i| x.clone().narrow(0, i, 1);
            let rows: Option<Vec<_>> = (0..batch)
                .map(|i| {
                    attention(
                        &image(query, i),
                        &image(key, i),
                        &image(value, i),
                        heads,
                        causal,
                    )
                })
                .collect();
            return rows.map(|rows| Tensor::cat(rows, 0));
        }
    }
    on_runtime!(B, |R| give(flash::attention::<R>(
        take(query)?,
        take(key)?,
        take(value)?,
        heads,
        causal
    )?))
}
