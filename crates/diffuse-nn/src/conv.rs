use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::linear::uniform_by_fan_in;
use crate::ops::{self, ConvGeometry};

/// Configuration of a square [`Conv2d`].
#[derive(Config, Debug)]
pub struct Conv2dConfig {
    /// Channels `[in, out]`.
    pub channels: [usize; 2],
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Step between output positions.
    #[config(default = 1)]
    pub stride: usize,
    /// Zeros added above and to the left.
    #[config(default = 0)]
    pub padding_start: usize,
    /// Zeros added below and to the right, at least as many.
    #[config(default = 0)]
    pub padding_end: usize,
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
}

/// A 2-D convolution.
#[derive(Module, Debug)]
pub struct Conv2d<B: Backend> {
    /// `[out, in, kernel, kernel]`
    pub weight: Param<Tensor<B, 4>>,
    /// `[out]`
    pub bias: Option<Param<Tensor<B, 1>>>,
    #[module(skip)]
    geometry: ConvGeometry,
}

impl Conv2dConfig {
    /// The same padding on all four sides.
    pub fn with_padding(self, padding: usize) -> Self {
        self.with_padding_start(padding).with_padding_end(padding)
    }

    /// A layer with fresh weights, `U(-k, k)` with `k = 1 / sqrt(in · kernel²)`.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Conv2d<B> {
        let [channels_in, channels_out] = self.channels;
        let area = self.kernel * self.kernel;
        let fan_in = Some(channels_in * area);
        let fan_out = Some(channels_out * area);
        let initializer = uniform_by_fan_in();
        Conv2d {
            weight: initializer.init_with(
                [channels_out, channels_in, self.kernel, self.kernel],
                fan_in,
                fan_out,
                device,
            ),
            bias: self
                .bias
                .then(|| initializer.init_with([channels_out], fan_in, fan_out, device)),
            geometry: ConvGeometry {
                stride: self.stride,
                padding_start: self.padding_start,
                padding_end: self.padding_end,
            },
        }
    }
}

impl<B: Backend> Conv2d<B> {
    /// Applies the convolution.
    ///
    /// # Shapes
    /// - `x`: `[batch, in, height, width]`
    /// - output: `[batch, out, height', width']` with
    ///   `height' = (height + padding_start + padding_end - kernel) / stride + 1`
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::conv2d(
            x,
            self.weight.val(),
            self.bias.as_ref().map(|bias| bias.val()),
            self.geometry,
        )
    }

    /// Applies the convolution, and adds a value for each channel of each image, `[batch, out]`.
    pub fn forward_channel_bias(
        &self,
        x: Tensor<B, 4>,
        channel_bias: Tensor<B, 2>,
    ) -> Tensor<B, 4> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        ops::conv2d_channel_bias(x, self.weight.val(), bias, self.geometry, channel_bias)
    }

    /// Applies the convolution to the image at twice its size, each pixel repeated.
    ///
    /// # Panics
    /// If this convolution does not keep the size of an image.
    pub fn forward_upsampled(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [_, _, kernel, _] = self.weight.dims();
        assert_eq!(
            self.geometry,
            ConvGeometry::same(kernel),
            "a convolution that changes the size"
        );
        let bias = self.bias.as_ref().map(|bias| bias.val());
        ops::upsample_conv2d(x, self.weight.val(), bias)
    }

    /// Applies the convolution, and adds the result to `residual`, which has its shape.
    pub fn forward_add(&self, x: Tensor<B, 4>, residual: Tensor<B, 4>) -> Tensor<B, 4> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        ops::conv2d_add(x, self.weight.val(), bias, self.geometry, residual)
    }
}
