//! Halving and doubling of the image size between the levels of a network.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use crate::{Conv2d, Conv2dConfig, ops};

/// Configuration of a [`Downsample2D`].
#[derive(Config, Debug)]
pub struct Downsample2DConfig {
    /// Channels of input and output.
    pub channels: usize,
    /// One: a zero on each side. Zero: a zero below and to the right only, as the DDPM networks and
    /// the autoencoder have it (`downsample_padding`).
    #[config(default = 1)]
    pub padding: usize,
}

/// A 3x3 convolution of stride two.
#[derive(Module, Debug)]
pub struct Downsample2D<B: Backend> {
    conv: Conv2d<B>,
}

impl Downsample2DConfig {
    /// A layer with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Downsample2D<B> {
        let conv = Conv2dConfig::new([self.channels, self.channels], 3)
            .with_stride(2)
            .with_padding_start(self.padding)
            .with_padding_end(self.padding.max(1));
        Downsample2D {
            conv: conv.init(device),
        }
    }
}

impl<B: Backend> Downsample2D<B> {
    /// Halves height and width.
    ///
    /// # Shapes
    /// - `x`: `[batch, channels, height, width]`
    /// - output: `[batch, channels, ⌈height / 2⌉, ⌈width / 2⌉]` with padding one, rounded down with
    ///   zero
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.conv.forward(x)
    }
}

/// Configuration of an [`Upsample2D`].
#[derive(Config, Debug)]
pub struct Upsample2DConfig {
    /// Channels of input and output.
    pub channels: usize,
}

/// Nearest-neighbour enlargement, then a 3x3 convolution.
#[derive(Module, Debug)]
pub struct Upsample2D<B: Backend> {
    conv: Conv2d<B>,
}

impl Upsample2DConfig {
    /// A layer with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Upsample2D<B> {
        let conv = Conv2dConfig::new([self.channels, self.channels], 3).with_padding(1);
        Upsample2D {
            conv: conv.init(device),
        }
    }
}

impl<B: Backend> Upsample2D<B> {
    /// Enlarges to `size` (`[height, width]`), or to twice the input.
    ///
    /// # Shapes
    /// - `x`: `[batch, channels, height, width]`
    /// - output: `[batch, channels, size[0], size[1]]`
    pub fn forward(&self, x: Tensor<B, 4>, size: Option<[usize; 2]>) -> Tensor<B, 4> {
        let [_, _, height, width] = x.dims();
        let twice = [2 * height, 2 * width];
        let size = size.unwrap_or(twice);
        if size == twice {
            return self.conv.forward_upsampled(x);
        }
        self.conv.forward(ops::upsample_nearest(x, size))
    }
}
