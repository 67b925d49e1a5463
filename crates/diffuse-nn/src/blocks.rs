//! The levels of a UNet or an autoencoder: residual blocks, each followed by attention where the
//! level has it, and a change of size at the end.

use std::ops::Range;

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use crate::{
    Attention, AttentionConfig, Downsample2D, Downsample2DConfig, FreeUFactors, ResnetBlock2D,
    ResnetBlock2DConfig, TextContext, Transformer2DModel, Transformer2DModelConfig, Upsample2D,
    Upsample2DConfig, ops,
};

/// What follows each residual block of a level.
#[derive(Config, Debug)]
pub enum SpatialAttentionConfig {
    /// Self-attention over positions.
    Image(AttentionConfig),
    /// Transformer blocks that see the text.
    Text(Transformer2DModelConfig),
}

/// Attention over the positions of an image.
#[expect(clippy::large_enum_variant, reason = "there is one a residual block")]
#[derive(Module, Debug)]
pub enum SpatialAttention<B: Backend> {
    /// Self-attention over positions.
    Image(Attention<B>),
    /// Transformer blocks that see the text.
    Text(Transformer2DModel<B>),
}

impl SpatialAttentionConfig {
    /// A module with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> SpatialAttention<B> {
        match self {
            SpatialAttentionConfig::Image(config) => SpatialAttention::Image(config.init(device)),
            SpatialAttentionConfig::Text(config) => SpatialAttention::Text(config.init(device)),
        }
    }
}

impl<B: Backend> SpatialAttention<B> {
    /// Applies the module.
    ///
    /// # Shapes
    /// - `x`, output: `[batch, channels, height, width]`
    /// - `context`: `[batch, text tokens, cross_attention_dim]`, for the variant that sees the text
    ///
    /// # Panics
    /// If the variant that sees the text gets no `context`.
    pub fn forward(&self, x: Tensor<B, 4>, context: Option<&TextContext<B>>) -> Tensor<B, 4> {
        match self {
            SpatialAttention::Image(attention) => attention.forward_image(x),
            SpatialAttention::Text(transformer) => {
                transformer.forward(x, context.expect("this block needs text embeddings"))
            }
        }
    }
}

fn attentions<B: Backend>(
    config: &Option<SpatialAttentionConfig>,
    count: usize,
    device: &B::Device,
) -> Vec<SpatialAttention<B>> {
    config
        .iter()
        .flat_map(|config| (0..count).map(|_| config.init(device)))
        .collect()
}

/// How a level halves the size at its end.
#[derive(Config, Debug)]
pub enum DownsamplerConfig {
    /// A convolution of stride two.
    Conv {
        /// See [`Downsample2DConfig`].
        padding: usize,
    },
    /// A residual block that averages 2x2 positions.
    Resnet,
}

/// The halving at the end of a level.
#[expect(clippy::large_enum_variant, reason = "there is one a level")]
#[derive(Module, Debug)]
pub enum Downsampler<B: Backend> {
    /// A convolution of stride two.
    Conv(Downsample2D<B>),
    /// A residual block that averages 2x2 positions.
    Resnet(ResnetBlock2D<B>),
}

impl<B: Backend> Downsampler<B> {
    fn forward(&self, x: Tensor<B, 4>, temb: Option<&Tensor<B, 2>>) -> Tensor<B, 4> {
        match self {
            Downsampler::Conv(downsampler) => downsampler.forward(x),
            Downsampler::Resnet(resnet) => resnet.forward_resized(x, temb, ops::downsample_mean),
        }
    }
}

/// Configuration of a [`DownBlock2D`].
#[derive(Config, Debug)]
pub struct DownBlock2DConfig {
    /// The first residual block; the others have its output channels on both sides.
    pub resnet: ResnetBlock2DConfig,
    /// Number of residual blocks.
    pub num_layers: usize,
    /// What follows each of them.
    pub attention: Option<SpatialAttentionConfig>,
    /// The halving at the end; none at the last level.
    pub downsampler: Option<DownsamplerConfig>,
}

/// A level on the way down: `DownBlock2D`, `AttnDownBlock2D`, `CrossAttnDownBlock2D`,
/// `ResnetDownsampleBlock2D` and `DownEncoderBlock2D`.
#[derive(Module, Debug)]
pub struct DownBlock2D<B: Backend> {
    resnets: Vec<ResnetBlock2D<B>>,
    attentions: Vec<SpatialAttention<B>>,
    downsamplers: Vec<Downsampler<B>>,
}

impl DownBlock2DConfig {
    /// A level with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> DownBlock2D<B> {
        let channels = self.resnet.out_channels;
        let next = || ResnetBlock2DConfig {
            in_channels: channels,
            ..self.resnet.clone()
        };
        let resnet = |layer| match layer {
            0 => self.resnet.init(device),
            _ => next().init(device),
        };
        let downsampler = |config: &DownsamplerConfig| match config {
            DownsamplerConfig::Conv { padding } => {
                let config = Downsample2DConfig::new(channels).with_padding(*padding);
                Downsampler::Conv(config.init(device))
            }
            DownsamplerConfig::Resnet => Downsampler::Resnet(next().init(device)),
        };
        DownBlock2D {
            resnets: (0..self.num_layers).map(resnet).collect(),
            attentions: attentions(&self.attention, self.num_layers, device),
            downsamplers: self.downsampler.iter().map(downsampler).collect(),
        }
    }
}

impl<B: Backend> DownBlock2D<B> {
    /// Applies the level. Each intermediate result goes to `skips`, for the way up.
    ///
    /// # Shapes
    /// - `x`: `[batch, in_channels, height, width]`
    /// - `temb`: `[batch, temb_channels]`
    /// - `context`: `[batch, text tokens, cross_attention_dim]`
    /// - output: `[batch, out_channels, height, width]`, halved unless it is the last level
    pub fn forward(
        &self,
        x: Tensor<B, 4>,
        temb: Option<&Tensor<B, 2>>,
        context: Option<&TextContext<B>>,
        skips: &mut Vec<Tensor<B, 4>>,
    ) -> Tensor<B, 4> {
        let mut x = self.forward_layers(x, temb, context, skips, self.resnets.len());
        for downsampler in &self.downsamplers {
            x = downsampler.forward(x, temb);
            skips.push(x.clone());
        }
        x
    }

    /// The first `layers` residual blocks and what follows each, without the halving.
    pub fn forward_layers(
        &self,
        x: Tensor<B, 4>,
        temb: Option<&Tensor<B, 2>>,
        context: Option<&TextContext<B>>,
        skips: &mut Vec<Tensor<B, 4>>,
        layers: usize,
    ) -> Tensor<B, 4> {
        let mut x = x;
        for (layer, resnet) in self.resnets[..layers].iter().enumerate() {
            x = resnet.forward(x, temb);
            if let Some(attention) = self.attentions.get(layer) {
                x = attention.forward(x, context);
            }
            skips.push(x.clone());
        }
        x
    }

    /// Number of residual blocks.
    pub fn num_layers(&self) -> usize {
        self.resnets.len()
    }

    /// The residual blocks and the halving alone, for a network without skip connections.
    pub fn forward_plain(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let x = self
            .resnets
            .iter()
            .fold(x, |x, resnet| resnet.forward(x, None));
        self.downsamplers
            .iter()
            .fold(x, |x, downsampler| downsampler.forward(x, None))
    }
}

/// Configuration of a [`MidBlock2D`].
#[derive(Config, Debug)]
pub struct MidBlock2DConfig {
    /// All residual blocks.
    pub resnet: ResnetBlock2DConfig,
    /// Number of residual blocks after the first.
    pub num_layers: usize,
    /// What stands before each of them.
    pub attention: Option<SpatialAttentionConfig>,
}

/// The level at the bottom: `UNetMidBlock2D` and `UNetMidBlock2DCrossAttn`.
#[derive(Module, Debug)]
pub struct MidBlock2D<B: Backend> {
    resnets: Vec<ResnetBlock2D<B>>,
    attentions: Vec<SpatialAttention<B>>,
}

impl MidBlock2DConfig {
    /// A level with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> MidBlock2D<B> {
        MidBlock2D {
            resnets: (0..=self.num_layers)
                .map(|_| self.resnet.init(device))
                .collect(),
            attentions: attentions(&self.attention, self.num_layers, device),
        }
    }
}

impl<B: Backend> MidBlock2D<B> {
    /// Applies the level.
    ///
    /// # Shapes
    /// - `x`, output: `[batch, channels, height, width]`
    /// - `temb`: `[batch, temb_channels]`
    /// - `context`: `[batch, text tokens, cross_attention_dim]`
    pub fn forward(
        &self,
        x: Tensor<B, 4>,
        temb: Option<&Tensor<B, 2>>,
        context: Option<&TextContext<B>>,
    ) -> Tensor<B, 4> {
        let mut x = self.resnets[0].forward(x, temb);
        for (layer, resnet) in self.resnets[1..].iter().enumerate() {
            if let Some(attention) = self.attentions.get(layer) {
                x = attention.forward(x, context);
            }
            x = resnet.forward(x, temb);
        }
        x
    }
}

/// How a level doubles the size at its end.
#[derive(Config, Debug)]
pub enum UpsamplerConfig {
    /// Nearest-neighbour enlargement, then a convolution.
    Conv,
    /// A residual block with nearest-neighbour enlargement.
    Resnet,
}

/// The doubling at the end of a level.
#[expect(clippy::large_enum_variant, reason = "there is one a level")]
#[derive(Module, Debug)]
pub enum Upsampler<B: Backend> {
    /// Nearest-neighbour enlargement, then a convolution.
    Conv(Upsample2D<B>),
    /// A residual block with nearest-neighbour enlargement.
    Resnet(ResnetBlock2D<B>),
}

impl<B: Backend> Upsampler<B> {
    fn forward(
        &self,
        x: Tensor<B, 4>,
        temb: Option<&Tensor<B, 2>>,
        size: Option<[usize; 2]>,
    ) -> Tensor<B, 4> {
        match self {
            Upsampler::Conv(upsampler) => upsampler.forward(x, size),
            Upsampler::Resnet(resnet) => {
                let [_, _, height, width] = x.dims();
                let size = size.unwrap_or([2 * height, 2 * width]);
                resnet.forward_resized(x, temb, |x| ops::upsample_nearest(x, size))
            }
        }
    }
}

/// Configuration of an [`UpBlock2D`].
#[derive(Config, Debug)]
pub struct UpBlock2DConfig {
    /// Epsilon, groups and channels of the residual blocks; each gets the channels of its skip
    /// connection in addition.
    pub resnet: ResnetBlock2DConfig,
    /// Channels of the skip connection that each residual block takes, in order; zeros in a network
    /// without them.
    pub skip_channels: Vec<usize>,
    /// What follows each residual block.
    pub attention: Option<SpatialAttentionConfig>,
    /// The doubling at the end; none at the last level.
    pub upsampler: Option<UpsamplerConfig>,
}

/// A level on the way up: `UpBlock2D`, `AttnUpBlock2D`, `CrossAttnUpBlock2D`,
/// `ResnetUpsampleBlock2D` and `UpDecoderBlock2D`.
#[derive(Module, Debug)]
pub struct UpBlock2D<B: Backend> {
    resnets: Vec<ResnetBlock2D<B>>,
    attentions: Vec<SpatialAttention<B>>,
    upsamplers: Vec<Upsampler<B>>,
}

impl UpBlock2DConfig {
    /// A level with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> UpBlock2D<B> {
        let channels = self.resnet.out_channels;
        let resnet = |in_channels| {
            let config = ResnetBlock2DConfig {
                in_channels,
                ..self.resnet.clone()
            };
            config.init(device)
        };
        let layer = |(layer, skip): (usize, &usize)| match layer {
            0 => resnet(self.resnet.in_channels + skip),
            _ => resnet(channels + skip),
        };
        let upsampler = |config: &UpsamplerConfig| match config {
            UpsamplerConfig::Conv => Upsampler::Conv(Upsample2DConfig::new(channels).init(device)),
            UpsamplerConfig::Resnet => Upsampler::Resnet(resnet(channels)),
        };
        UpBlock2D {
            resnets: self.skip_channels.iter().enumerate().map(layer).collect(),
            attentions: attentions(&self.attention, self.skip_channels.len(), device),
            upsamplers: self.upsampler.iter().map(upsampler).collect(),
        }
    }
}

impl<B: Backend> UpBlock2D<B> {
    /// Applies the level. Each residual block takes the last of `skips` beside its input; the
    /// result is enlarged to the size of the skip connection that comes next.
    ///
    /// # Shapes
    /// - `x`: `[batch, in_channels, height, width]`
    /// - `temb`: `[batch, temb_channels]`
    /// - `context`: `[batch, text tokens, cross_attention_dim]`
    /// - output: `[batch, out_channels, height, width]`, doubled unless it is the last level
    ///
    /// # Panics
    /// If there are fewer `skips` than residual blocks.
    pub fn forward(
        &self,
        x: Tensor<B, 4>,
        temb: Option<&Tensor<B, 2>>,
        context: Option<&TextContext<B>>,
        skips: &mut Vec<Tensor<B, 4>>,
    ) -> Tensor<B, 4> {
        self.forward_freeu(x, temb, context, skips, None)
    }

    /// [`forward`](Self::forward) with FreeU.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_freeu(
        &self,
        x: Tensor<B, 4>,
        temb: Option<&Tensor<B, 2>>,
        context: Option<&TextContext<B>>,
        skips: &mut Vec<Tensor<B, 4>>,
        freeu: Option<FreeUFactors>,
    ) -> Tensor<B, 4> {
        let layers = 0..self.resnets.len();
        let mut x = self.forward_layers(x, temb, context, skips, freeu, layers);
        let size = skips.last().map(|skip| {
            let [_, _, height, width] = skip.dims();
            [height, width]
        });
        for upsampler in &self.upsamplers {
            x = upsampler.forward(x, temb, size);
        }
        x
    }

    /// Some of the residual blocks and what follows each, without the doubling.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_layers(
        &self,
        x: Tensor<B, 4>,
        temb: Option<&Tensor<B, 2>>,
        context: Option<&TextContext<B>>,
        skips: &mut Vec<Tensor<B, 4>>,
        freeu: Option<FreeUFactors>,
        layers: Range<usize>,
    ) -> Tensor<B, 4> {
        let mut x = x;
        for layer in layers {
            let mut skip = skips.pop().expect("one skip connection a residual block");
            if let Some(freeu) = freeu {
                (x, skip) = freeu.apply(x, skip);
            }
            x = self.resnets[layer].forward(ops::concat_channels(x, skip), temb);
            if let Some(attention) = self.attentions.get(layer) {
                x = attention.forward(x, context);
            }
        }
        x
    }

    /// Number of residual blocks.
    pub fn num_layers(&self) -> usize {
        self.resnets.len()
    }

    /// The residual blocks and the doubling alone, for a network without skip connections.
    pub fn forward_plain(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let x = self
            .resnets
            .iter()
            .fold(x, |x, resnet| resnet.forward(x, None));
        self.upsamplers
            .iter()
            .fold(x, |x, upsampler| upsampler.forward(x, None, None))
    }
}
