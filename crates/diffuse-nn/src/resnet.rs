//! The residual block of all the networks here (Ho et al. 2020, <https://arxiv.org/abs/2006.11239>,
//! appendix B; scale and shift as in Dhariwal & Nichol 2021, <https://arxiv.org/abs/2105.05233>).

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::{
    Activation, Conv2d, Conv2dConfig, GroupNorm, GroupNormConfig, Linear, LinearConfig, ops,
};

/// How the time embedding enters a block (`resnet_time_scale_shift`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TimeScaleShift {
    /// Added to the features before the second norm.
    #[default]
    Default,
    /// The second norm's result times `1 + scale`, plus `shift`.
    ScaleShift,
}

/// Configuration of a [`ResnetBlock2D`].
#[derive(Config, Debug)]
pub struct ResnetBlock2DConfig {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Size of the time embedding; none in an autoencoder.
    pub temb_channels: Option<usize>,
    /// Groups of both norms.
    pub groups: usize,
    /// Epsilon of both norms.
    pub eps: f64,
    /// How the time embedding enters.
    #[config(default = "TimeScaleShift::Default")]
    pub time_scale_shift: TimeScaleShift,
    /// The result is divided by it.
    #[config(default = 1.0)]
    pub output_scale_factor: f64,
    /// Activation function.
    #[config(default = "Activation::Silu")]
    pub act_fn: Activation,
}

/// `x + conv2(act(norm2(conv1(act(norm1(x))) + time)))`, with a 1x1 convolution on `x` where the
/// number of channels changes.
#[derive(Module, Debug)]
pub struct ResnetBlock2D<B: Backend> {
    norm1: GroupNorm<B>,
    conv1: Conv2d<B>,
    time_emb_proj: Option<Linear<B>>,
    norm2: GroupNorm<B>,
    conv2: Conv2d<B>,
    conv_shortcut: Option<Conv2d<B>>,
    #[module(skip)]
    time_scale_shift: TimeScaleShift,
    output_scale_factor: f64,
    #[module(skip)]
    act_fn: Activation,
}

impl ResnetBlock2DConfig {
    /// A block with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> ResnetBlock2D<B> {
        let (cin, cout) = (self.in_channels, self.out_channels);
        let norm = |channels| {
            GroupNormConfig::new(self.groups, channels)
                .with_eps(self.eps)
                .init(device)
        };
        let conv = |channels| Conv2dConfig::new(channels, 3).with_padding(1).init(device);
        let time_channels = match self.time_scale_shift {
            TimeScaleShift::Default => cout,
            TimeScaleShift::ScaleShift => 2 * cout,
        };
        ResnetBlock2D {
            norm1: norm(cin),
            conv1: conv([cin, cout]),
            time_emb_proj: self
                .temb_channels
                .map(|channels| LinearConfig::new(channels, time_channels).init(device)),
            norm2: norm(cout),
            conv2: conv([cout, cout]),
            conv_shortcut: (cin != cout).then(|| Conv2dConfig::new([cin, cout], 1).init(device)),
            time_scale_shift: self.time_scale_shift,
            output_scale_factor: self.output_scale_factor,
            act_fn: self.act_fn,
        }
    }
}

impl<B: Backend> ResnetBlock2D<B> {
    /// Applies the block.
    ///
    /// # Shapes
    /// - `x`: `[batch, in_channels, height, width]`
    /// - `temb`: `[batch, temb_channels]`, after its activation; required by blocks that have
    ///   `temb_channels`
    /// - output: `[batch, out_channels, height, width]`
    ///
    /// # Panics
    /// If a block with `temb_channels` gets no `temb`.
    pub fn forward(&self, x: Tensor<B, 4>, temb: Option<&Tensor<B, 2>>) -> Tensor<B, 4> {
        self.forward_resized(x, temb, |x| x)
    }

    /// [`forward`](Self::forward) with a change of size: `resize` is applied to `x` and, before the
    /// first convolution, to the features.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_resized(
        &self,
        x: Tensor<B, 4>,
        temb: Option<&Tensor<B, 2>>,
        resize: impl Fn(Tensor<B, 4>) -> Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let hidden = resize(self.norm1.forward_activated(x.clone(), self.act_fn));
        let x = resize(x);
        let time = self.time_emb_proj.as_ref().map(|projection| {
            projection.forward(temb.expect("this block needs a time embedding").clone())
        });

        let hidden = match (time, self.time_scale_shift) {
            (None, _) => {
                let hidden = self.conv1.forward(hidden);
                self.norm2.forward_activated(hidden, self.act_fn)
            }
            (Some(time), TimeScaleShift::Default) => {
                let hidden = self.conv1.forward_channel_bias(hidden, time);
                self.norm2.forward_activated(hidden, self.act_fn)
            }
            (Some(time), TimeScaleShift::ScaleShift) => {
                let hidden = self.conv1.forward(hidden);
                let mut halves = time.chunk(2, 1).into_iter();
                let (Some(scale), Some(shift)) = (halves.next(), halves.next()) else {
                    unreachable!("chunk(2, 1) of an even number of columns gives two halves")
                };
                let hidden = self.norm2.forward(hidden);
                let hidden = ops::scale_shift_channels(hidden, scale + 1.0, shift);
                self.act_fn.forward(hidden)
            }
        };
        let shortcut = match &self.conv_shortcut {
            Some(conv) => conv.forward(x),
            None => x,
        };
        let output = self.conv2.forward_add(hidden, shortcut);
        if self.output_scale_factor == 1.0 {
            output
        } else {
            output / self.output_scale_factor
        }
    }
}
