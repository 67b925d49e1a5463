//! The operations, structs with named inputs, and the list of the kernels of each.

use burn::tensor::{Tensor, backend::Backend};

#[cfg(feature = "flex")]
use crate::cpu;
#[cfg(feature = "gpu")]
use crate::gpu;

/// Runs the first kernel that supports the operation, or returns the operation.
///
/// A CPU kernel takes the operation by value, since it may compute in place, and returns it if it
/// does not support it. A GPU kernel borrows it.
macro_rules! run {
    ($operation:expr $(, flex: $cpu:path)? $(, gpu: $gpu:path)?) => {{
        let operation = $operation;
        $(
            #[cfg(feature = "flex")]
            let operation = match cpu::run(operation, $cpu) {
                Ok(result) => return Ok(result),
                Err(operation) => operation,
            };
        )?
        $(
            #[cfg(feature = "gpu")]
            if let Some(result) = $gpu(&operation) {
                return Ok(result);
            }
        )?
        Err(operation)
    }};
}

/// Stride and zero padding of a convolution, the same for height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvGeometry {
    /// Distance of neighbouring receptive fields, at least 1.
    pub stride: usize,
    /// Zeros added above and to the left.
    pub padding_start: usize,
    /// Zeros added below and to the right; not fewer than `padding_start`.
    pub padding_end: usize,
}

impl ConvGeometry {
    /// Stride 1, and the padding with which an odd kernel keeps the size of an image.
    pub fn same(kernel: usize) -> Self {
        Self {
            stride: 1,
            padding_start: kernel / 2,
            padding_end: kernel / 2,
        }
    }

    /// Height or width of the output; `None` if the kernel is larger than the padded input.
    ///
    /// # Panics
    /// If the stride is 0.
    pub fn output(self, input: usize, kernel: usize) -> Option<usize> {
        let steps = (input + self.padding_start + self.padding_end).checked_sub(kernel)?;
        Some(steps / self.stride + 1)
    }
}

/// A 2-D convolution (cross-correlation), `conv(x) + bias + channel_bias + residual`.
#[derive(Debug, Clone)]
pub struct Conv2d<B: Backend> {
    /// `[batch, in, height, width]`
    pub x: Tensor<B, 4>,
    /// `[out, in, kernel, kernel]`, of any floating point type.
    pub weight: Tensor<B, 4>,
    /// `[out]`
    pub bias: Option<Tensor<B, 1>>,
    /// Stride and padding.
    pub geometry: ConvGeometry,
    /// `x` is first upsampled to twice its height and width, each pixel repeated.
    pub upsample: bool,
    /// `[batch, out]`
    pub channel_bias: Option<Tensor<B, 2>>,
    /// The shape of the output.
    pub residual: Option<Tensor<B, 4>>,
}

impl<B: Backend> Conv2d<B> {
    /// Height and width of the output; `None` if the kernel is larger than the padded input.
    ///
    /// # Panics
    /// If the stride is 0.
    pub fn output_size(&self) -> Option<[usize; 2]> {
        let ([_, _, height, width], [_, _, kernel, _]) = (self.x.dims(), self.weight.dims());
        let factor = if self.upsample { 2 } else { 1 };
        let size = |input| self.geometry.output(factor * input, kernel);
        Some([size(height)?, size(width)?])
    }

    /// `[batch, out, height', width']`
    ///
    /// # Panics
    /// On `Flex`, mismatched shapes may panic; otherwise the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, 4>, Self> {
        run!(self, flex: cpu::conv2d, gpu: gpu::conv2d)
    }
}

/// `x Wᵀ + bias + residual` over the last dimension.
#[derive(Debug, Clone)]
pub struct Linear<B: Backend, const D: usize> {
    /// `[.., in]`
    pub x: Tensor<B, D>,
    /// `[out, in]`, of any floating point type.
    pub weight: Tensor<B, 2>,
    /// `[out]`
    pub bias: Option<Tensor<B, 1>>,
    /// The shape of the output.
    pub residual: Option<Tensor<B, D>>,
}

impl<B: Backend, const D: usize> Linear<B, D> {
    /// `[.., out]`
    ///
    /// # Panics
    /// On `Flex`, mismatched shapes may panic; otherwise the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, D>, Self> {
        run!(self, flex: cpu::linear::<D>, gpu: gpu::linear)
    }
}

/// `x Wᵀ` for several weights of the same shape.
#[derive(Debug, Clone)]
pub struct Linears<B: Backend, const D: usize, const N: usize> {
    /// `[.., in]`
    pub x: Tensor<B, D>,
    /// `[out, in]` each.
    pub weights: [Tensor<B, 2>; N],
}

impl<B: Backend, const D: usize, const N: usize> Linears<B, D, N> {
    /// `[.., out]` each.
    pub fn run(self) -> Result<[Tensor<B, D>; N], Self> {
        run!(self, gpu: gpu::linears)
    }
}

/// `a · gelu(b)` with `[a, b] = x Wᵀ + bias`.
#[derive(Debug, Clone)]
pub struct LinearGeglu<B: Backend> {
    /// `[batch, tokens, in]`
    pub x: Tensor<B, 3>,
    /// `[2 out, in]`, of any floating point type.
    pub weight: Tensor<B, 2>,
    /// `[2 out]`
    pub bias: Option<Tensor<B, 1>>,
}

impl<B: Backend> LinearGeglu<B> {
    /// `[batch, tokens, out]`
    ///
    /// # Panics
    /// On `Flex`, mismatched shapes may panic; otherwise the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, 3>, Self> {
        run!(self, flex: cpu::linear_geglu, gpu: gpu::linear_geglu)
    }
}

/// `x Wᵀ + bias` of tokens, as an image, plus the residual.
#[derive(Debug, Clone)]
pub struct LinearToImage<B: Backend> {
    /// `[batch, height · width, in]`
    pub x: Tensor<B, 3>,
    /// `[out, in]`, of any floating point type.
    pub weight: Tensor<B, 2>,
    /// `[out]`
    pub bias: Option<Tensor<B, 1>>,
    /// `[batch, out, height, width]`
    pub residual: Tensor<B, 4>,
}

impl<B: Backend> LinearToImage<B> {
    /// `[batch, out, height, width]`
    ///
    /// # Panics
    /// On `Flex`, mismatched shapes may panic; otherwise the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, 4>, Self> {
        run!(self, flex: cpu::linear_to_image, gpu: gpu::linear_to_image)
    }
}

/// Multi-head attention, `softmax(q kᵀ / sqrt(d)) v` for each head.
#[derive(Debug, Clone)]
pub struct Attention<B: Backend> {
    /// `[batch, tokens, heads · d]`
    pub query: Tensor<B, 3>,
    /// `[batch, context tokens, heads · d]`
    pub key: Tensor<B, 3>,
    /// `[batch, context tokens, heads · d]`
    pub value: Tensor<B, 3>,
    /// Number of heads, a divisor of the size of a token.
    pub heads: usize,
    /// A token attends to itself and earlier tokens only.
    pub causal: bool,
}

impl<B: Backend> Attention<B> {
    /// `[batch, tokens, heads · d]`
    ///
    /// # Panics
    /// On `Flex`, a number of heads that does not divide the size of a token may panic; otherwise
    /// the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, 3>, Self> {
        run!(self, flex: cpu::attention, gpu: gpu::attention)
    }
}

/// Group normalisation, optionally followed by SiLU.
#[derive(Debug, Clone)]
pub struct GroupNorm<B: Backend> {
    /// `[batch, channels, height, width]`
    pub x: Tensor<B, 4>,
    /// `[channels]`
    pub weight: Tensor<B, 1>,
    /// `[channels]`
    pub bias: Tensor<B, 1>,
    /// Number of groups, a divisor of the number of channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
    /// Whether SiLU is applied to the result.
    pub silu: bool,
}

impl<B: Backend> GroupNorm<B> {
    /// `[batch, channels, height, width]`
    ///
    /// # Panics
    /// On `Flex`, mismatched shapes may panic; otherwise the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, 4>, Self> {
        run!(self, flex: cpu::group_norm, gpu: gpu::group_norm)
    }
}

/// Layer normalisation over the last dimension.
#[derive(Debug, Clone)]
pub struct LayerNorm<B: Backend, const D: usize> {
    /// `[.., features]`
    pub x: Tensor<B, D>,
    /// `[features]`
    pub weight: Tensor<B, 1>,
    /// `[features]`
    pub bias: Tensor<B, 1>,
    /// Added to the variance.
    pub eps: f64,
}

impl<B: Backend, const D: usize> LayerNorm<B, D> {
    /// `[.., features]`
    ///
    /// # Panics
    /// On `Flex`, mismatched shapes may panic; otherwise the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, D>, Self> {
        run!(self, flex: cpu::layer_norm::<D>, gpu: gpu::layer_norm)
    }
}

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Function {
    /// `x · σ(x)`
    Silu,
    /// `x · Φ(x)`
    Gelu,
    /// `x · σ(1.702 x)`
    QuickGelu,
}

/// An activation function, element-wise.
#[derive(Debug, Clone)]
pub struct Activation<B: Backend, const D: usize> {
    /// Any shape.
    pub x: Tensor<B, D>,
    /// The function.
    pub function: Function,
}

impl<B: Backend, const D: usize> Activation<B, D> {
    /// The shape of `x`.
    pub fn run(self) -> Result<Tensor<B, D>, Self> {
        run!(self, flex: cpu::activation::<D>, gpu: gpu::activation)
    }
}

/// Adds a bias to each channel of each image.
#[derive(Debug, Clone)]
pub struct AddChannelBias<B: Backend> {
    /// `[batch, channels, height, width]`
    pub x: Tensor<B, 4>,
    /// `[batch, channels]`
    pub bias: Tensor<B, 2>,
}

impl<B: Backend> AddChannelBias<B> {
    /// `[batch, channels, height, width]`
    ///
    /// # Panics
    /// On `Flex`, mismatched shapes may panic; otherwise the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, 4>, Self> {
        run!(self, flex: cpu::add_channel_bias)
    }
}

/// Concatenates the channels of two images.
#[derive(Debug, Clone)]
pub struct ConcatChannels<B: Backend> {
    /// `[batch, channels, height, width]`
    pub a: Tensor<B, 4>,
    /// `[batch, other channels, height, width]`
    pub b: Tensor<B, 4>,
}

impl<B: Backend> ConcatChannels<B> {
    /// `[batch, channels + other channels, height, width]`
    ///
    /// # Panics
    /// On `Flex`, mismatched shapes may panic; otherwise the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, 4>, Self> {
        run!(self, flex: cpu::concat_channels, gpu: gpu::concat_channels)
    }
}

/// Upsampling to twice the height and width, each pixel repeated.
#[derive(Debug, Clone)]
pub struct Upsample2x<B: Backend> {
    /// `[batch, channels, height, width]`
    pub x: Tensor<B, 4>,
}

impl<B: Backend> Upsample2x<B> {
    /// `[batch, channels, 2 height, 2 width]`
    pub fn run(self) -> Result<Tensor<B, 4>, Self> {
        run!(self, flex: cpu::upsample_2x)
    }
}

/// The pixels of an image as tokens.
#[derive(Debug, Clone)]
pub struct ImageToTokens<B: Backend> {
    /// `[batch, channels, height, width]`
    pub x: Tensor<B, 4>,
}

impl<B: Backend> ImageToTokens<B> {
    /// `[batch, height · width, channels]`
    pub fn run(self) -> Result<Tensor<B, 3>, Self> {
        run!(self, flex: cpu::image_to_tokens, gpu: gpu::image_to_tokens)
    }
}

/// Tokens as the pixels of an image.
#[derive(Debug, Clone)]
pub struct TokensToImage<B: Backend> {
    /// `[batch, height · width, channels]`
    pub x: Tensor<B, 3>,
    /// Height and width.
    pub size: [usize; 2],
}

impl<B: Backend> TokensToImage<B> {
    /// `[batch, channels, height, width]`
    ///
    /// # Panics
    /// On `Flex`, mismatched shapes may panic; otherwise the result is unspecified.
    pub fn run(self) -> Result<Tensor<B, 4>, Self> {
        run!(self, flex: cpu::tokens_to_image, gpu: gpu::tokens_to_image)
    }
}

/// Changes the memory order of a weight to the one that the backend's convolutions read.
#[derive(Debug, Clone)]
pub struct ArrangeConvWeight<B: Backend> {
    /// `[out, in, kernel, kernel]`
    pub weight: Tensor<B, 4>,
}

impl<B: Backend> ArrangeConvWeight<B> {
    /// `[out, in, kernel, kernel]`, the same values.
    pub fn run(self) -> Result<Tensor<B, 4>, Self> {
        run!(self, gpu: gpu::arrange_conv_weight)
    }
}
