//! The autoencoder between images and latents (Kingma & Welling 2013,
//! <https://arxiv.org/abs/1312.6114>; this one: Rombach et al. 2022,
//! <https://arxiv.org/abs/2112.10752>, appendix G).

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use diffuse_nn::checkpoint::modern_attention_name;
use diffuse_nn::config::{
    ConfigError, MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, ModelConfig, SampleSize, check_size,
};
use diffuse_nn::pretrained::Pretrained;
use diffuse_nn::{
    Activation, AttentionConfig, Conv2d, Conv2dConfig, DownBlock2D, DownBlock2DConfig,
    DownsamplerConfig, GroupNorm, GroupNormConfig, MidBlock2D, MidBlock2DConfig,
    ResnetBlock2DConfig, SpatialAttentionConfig, UpBlock2D, UpBlock2DConfig, UpsamplerConfig, ops,
};
use serde::{Deserialize, Serialize};

use crate::DiagonalGaussian;
use crate::tiling::Tiles;

/// The type of an encoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum AutoencoderKLDownBlock {
    /// Residual blocks.
    DownEncoderBlock2D,
}

/// The type of a decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum AutoencoderKLUpBlock {
    /// Residual blocks.
    UpDecoderBlock2D,
}

/// The `config.json` of an [`AutoencoderKL`], with Diffusers' defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderKLConfig {
    /// Channels of the encoder's input.
    pub in_channels: usize,
    /// Channels of the decoder's output.
    pub out_channels: usize,
    /// Types of the encoder blocks.
    pub down_block_types: Vec<AutoencoderKLDownBlock>,
    /// Types of the decoder blocks.
    pub up_block_types: Vec<AutoencoderKLUpBlock>,
    /// Channels of each resolution level, from the highest.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each encoder block; a decoder block has one more.
    pub layers_per_block: usize,
    /// Activation function.
    pub act_fn: Activation,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of all norms.
    pub norm_num_groups: usize,
    /// Height and width of the training images, which are those of a tile.
    pub sample_size: SampleSize,
    /// Factor that gives the latents about unit variance, for the UNet.
    pub scaling_factor: f64,
    /// Whether a 1x1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle blocks have attention.
    pub mid_block_add_attention: bool,
}

impl Default for AutoencoderKLConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![AutoencoderKLDownBlock::DownEncoderBlock2D],
            up_block_types: vec![AutoencoderKLUpBlock::UpDecoderBlock2D],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: SampleSize::Square(32),
            scaling_factor: 0.18215,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl ModelConfig for AutoencoderKLConfig {
    const CLASS: &'static str = "AutoencoderKL";
    const ONLY: &'static [(&'static str, &'static [&'static str])] = &[
        ("shift_factor", &["null"]),
        ("latents_mean", &["null"]),
        ("latents_std", &["null"]),
    ];

    fn validate(&self) -> Result<(), ConfigError> {
        let class = Self::CLASS;
        let levels = self.block_out_channels.len();
        check_size(class, "block_out_channels", levels, MAX_LEVELS)?;
        for (key, count) in [
            ("down_block_types", self.down_block_types.len()),
            ("up_block_types", self.up_block_types.len()),
        ] {
            if count != levels {
                let supported = format!("as many entries as `block_out_channels` ({levels})");
                return Err(ConfigError::unsupported(class, key, count, supported));
            }
        }
        for (key, value, max) in [
            ("in_channels", self.in_channels, MAX_CHANNELS),
            ("out_channels", self.out_channels, MAX_CHANNELS),
            ("latent_channels", self.latent_channels, MAX_CHANNELS),
            ("layers_per_block", self.layers_per_block, MAX_LAYERS),
            ("norm_num_groups", self.norm_num_groups, MAX_CHANNELS),
        ] {
            check_size(class, key, value, max)?;
        }
        for channels in &self.block_out_channels {
            check_size(class, "block_out_channels", *channels, MAX_CHANNELS)?;
            if !channels.is_multiple_of(self.norm_num_groups) {
                let supported =
                    format!("multiples of `norm_num_groups` ({})", self.norm_num_groups);
                return Err(ConfigError::unsupported(
                    class,
                    "block_out_channels",
                    channels,
                    supported,
                ));
            }
        }
        if self.act_fn != Activation::Silu {
            return Err(ConfigError::unsupported(
                class,
                "act_fn",
                self.act_fn,
                "`silu`",
            ));
        }
        let scale = self.scaling_factor;
        if !(scale.is_finite() && scale > 0.0) {
            return Err(ConfigError::unsupported(
                class,
                "scaling_factor",
                scale,
                "positive numbers",
            ));
        }
        Ok(())
    }
}

impl AutoencoderKLConfig {
    /// The configuration of a norm.
    const NORM_EPS: f64 = 1e-6;

    /// Pixels per latent position in each direction: 8 for Stable Diffusion v1.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Height and width of a tile of latents: those of the training images, rounded down to a
    /// multiple of 4, so that tiles overlap by whole positions.
    fn latent_tile(&self) -> usize {
        let [side, _] = self.sample_size.dims();
        let side = side / self.downscale();
        (side - side % OVERLAP).max(OVERLAP)
    }

    fn resnet(&self, in_channels: usize, out_channels: usize) -> ResnetBlock2DConfig {
        let groups = self.norm_num_groups;
        ResnetBlock2DConfig::new(in_channels, out_channels, groups, Self::NORM_EPS)
    }

    /// Channels of the lowest resolution level.
    fn bottom(&self) -> usize {
        *self.block_out_channels.last().expect("there are levels")
    }

    fn mid_block<B: Backend>(&self, device: &B::Device) -> MidBlock2D<B> {
        let channels = self.bottom();
        let attention = AttentionConfig::new(channels, 1, channels)
            .with_qkv_bias(true)
            .with_norm_num_groups(Some(self.norm_num_groups))
            .with_norm_eps(Self::NORM_EPS);
        MidBlock2DConfig {
            resnet: self.resnet(channels, channels),
            num_layers: 1,
            attention: self
                .mid_block_add_attention
                .then_some(SpatialAttentionConfig::Image(attention)),
        }
        .init(device)
    }

    fn encoder<B: Backend>(&self, device: &B::Device) -> Encoder<B> {
        let channels = &self.block_out_channels;
        let last = channels.len() - 1;
        let level = |level: usize| {
            DownBlock2DConfig {
                resnet: self.resnet(channels[level.saturating_sub(1)], channels[level]),
                num_layers: self.layers_per_block,
                attention: None,
                downsampler: (level < last).then_some(DownsamplerConfig::Conv { padding: 0 }),
            }
            .init(device)
        };
        Encoder {
            conv_in: conv3x3([self.in_channels, channels[0]], device),
            down_blocks: (0..=last).map(level).collect(),
            mid_block: self.mid_block(device),
            conv_norm_out: self.norm(self.bottom(), device),
            conv_out: conv3x3([self.bottom(), 2 * self.latent_channels], device),
        }
    }

    fn decoder<B: Backend>(&self, device: &B::Device) -> Decoder<B> {
        let channels = &self.block_out_channels;
        let last = channels.len() - 1;
        let level = |level: usize| {
            UpBlock2DConfig {
                resnet: self.resnet(channels[(level + 1).min(last)], channels[level]),
                skip_channels: vec![0; self.layers_per_block + 1],
                attention: None,
                upsampler: (level > 0).then_some(UpsamplerConfig::Conv),
            }
            .init(device)
        };
        Decoder {
            conv_in: conv3x3([self.latent_channels, self.bottom()], device),
            mid_block: self.mid_block(device),
            up_blocks: (0..=last).rev().map(level).collect(),
            conv_norm_out: self.norm(channels[0], device),
            conv_out: conv3x3([channels[0], self.out_channels], device),
        }
    }

    fn norm<B: Backend>(&self, channels: usize, device: &B::Device) -> GroupNorm<B> {
        GroupNormConfig::new(self.norm_num_groups, channels)
            .with_eps(Self::NORM_EPS)
            .init(device)
    }

    /// A model with random weights, which are drawn at their first use.
    ///
    /// # Panics
    /// If the configuration is not [valid](ModelConfig::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> AutoencoderKL<B> {
        let conv1x1 = |channels| Conv2dConfig::new([channels, channels], 1).init(device);
        AutoencoderKL {
            encoder: self.encoder(device),
            decoder: self.decoder(device),
            quant_conv: self
                .use_quant_conv
                .then(|| conv1x1(2 * self.latent_channels)),
            post_quant_conv: self
                .use_post_quant_conv
                .then(|| conv1x1(self.latent_channels)),
            config: self.clone(),
            use_tiling: false,
        }
    }
}

/// A quarter of a tile overlaps the next.
const OVERLAP: usize = 4;

fn conv3x3<B: Backend>(channels: [usize; 2], device: &B::Device) -> Conv2d<B> {
    Conv2dConfig::new(channels, 3).with_padding(1).init(device)
}

/// The encoder: from an image to the moments of its latents.
#[derive(Module, Debug)]
pub struct Encoder<B: Backend> {
    /// Input convolution, to the first level's channels.
    pub conv_in: Conv2d<B>,
    /// Down blocks.
    pub down_blocks: Vec<DownBlock2D<B>>,
    /// Middle block.
    pub mid_block: MidBlock2D<B>,
    /// Norm before the output convolution.
    pub conv_norm_out: GroupNorm<B>,
    /// Output convolution, to means and logarithms of variances.
    pub conv_out: Conv2d<B>,
}

impl<B: Backend> Encoder<B> {
    /// `[batch, in_channels, height, width]` to `[batch, 2 · latent_channels, height / 8, width /
    /// 8]`.
    pub fn forward(&self, image: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::on_worker::<B, _>(|| {
            let x = self.conv_in.forward(image);
            let blocks = self.down_blocks.iter();
            let x = blocks.fold(x, |x, block| block.forward_plain(x));
            let x = self.mid_block.forward(x, None, None);
            self.conv_out.forward(self.conv_norm_out.forward_silu(x))
        })
    }
}

/// The decoder: from latents to an image.
#[derive(Module, Debug)]
pub struct Decoder<B: Backend> {
    /// Input convolution, to the lowest level's channels.
    pub conv_in: Conv2d<B>,
    /// Middle block.
    pub mid_block: MidBlock2D<B>,
    /// Up blocks.
    pub up_blocks: Vec<UpBlock2D<B>>,
    /// Norm before the output convolution.
    pub conv_norm_out: GroupNorm<B>,
    /// Output convolution, to the channels of the image.
    pub conv_out: Conv2d<B>,
}

impl<B: Backend> Decoder<B> {
    /// `[batch, latent_channels, height, width]` to `[batch, out_channels, 8 · height, 8 · width]`.
    pub fn forward(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::on_worker::<B, _>(|| {
            let x = self.conv_in.forward(latents);
            let x = self.mid_block.forward(x, None, None);
            let blocks = self.up_blocks.iter();
            let x = blocks.fold(x, |x, block| block.forward_plain(x));
            self.conv_out.forward(self.conv_norm_out.forward_silu(x))
        })
    }
}

/// The variational autoencoder of Stable Diffusion.
#[derive(Module, Debug)]
pub struct AutoencoderKL<B: Backend> {
    /// The encoder: from an image to the moments of its latents.
    pub encoder: Encoder<B>,
    /// The decoder: from latents to an image.
    pub decoder: Decoder<B>,
    /// 1x1 convolution after the encoder.
    pub quant_conv: Option<Conv2d<B>>,
    /// 1x1 convolution before the decoder.
    pub post_quant_conv: Option<Conv2d<B>>,
    #[module(skip)]
    config: AutoencoderKLConfig,
    #[module(skip)]
    use_tiling: bool,
}

impl<B: Backend> Pretrained<B> for AutoencoderKL<B> {
    type Config = AutoencoderKLConfig;

    fn config(&self) -> &AutoencoderKLConfig {
        &self.config
    }

    fn from_config(config: &AutoencoderKLConfig, device: &B::Device) -> Self {
        config.init(device)
    }

    fn current_key(key: &str) -> Option<String> {
        Some(modern_attention_name(key))
    }
}

impl<B: Backend> AutoencoderKL<B> {
    /// Encodes and decodes images that are larger than
    /// [`sample_size`](AutoencoderKLConfig::sample_size) in overlapping tiles of that size, as
    /// Diffusers does. Memory then depends on the size of a tile, not of the image. Norms and
    /// attention are computed for each tile alone, so colors and contrast change a little.
    pub fn enable_tiling(&mut self) {
        self.use_tiling = true;
    }

    /// Encodes and decodes whole images, which is the default.
    pub fn disable_tiling(&mut self) {
        self.use_tiling = false;
    }

    /// The distribution of an image's latents, not multiplied by `scaling_factor`.
    ///
    /// # Shapes
    /// - `image`: `[batch, in_channels, height, width]` in `[-1, 1]`, sides multiples of 8
    /// - mean and variance: `[batch, latent_channels, height / 8, width / 8]`
    pub fn encode(&self, image: Tensor<B, 4>) -> DiagonalGaussian<B> {
        let side = self.config.latent_tile();
        let tiles = Tiles::new(side * self.config.downscale(), side, OVERLAP);
        DiagonalGaussian::from_moments(if self.use_tiling && tiles.divide(&image) {
            tiles.run_blended(image, |image| self.moments(image))
        } else {
            self.moments(image)
        })
    }

    fn moments(&self, image: Tensor<B, 4>) -> Tensor<B, 4> {
        let moments = self.encoder.forward(image);
        match &self.quant_conv {
            Some(conv) => conv.forward(moments),
            None => moments,
        }
    }

    /// The image of latents, which have been divided by `scaling_factor`.
    ///
    /// # Shapes
    /// - `latents`: `[batch, latent_channels, height, width]`
    /// - output: `[batch, out_channels, 8 · height, 8 · width]`, about in `[-1, 1]`
    pub fn decode(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        let side = self.config.latent_tile();
        let tiles = Tiles::new(side, side * self.config.downscale(), OVERLAP);
        if self.use_tiling && tiles.divide(&latents) {
            tiles.run_blended(latents, |latents| self.image(latents))
        } else {
            self.image(latents)
        }
    }

    fn image(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        self.decoder.forward(match &self.post_quant_conv {
            Some(conv) => conv.forward(latents),
            None => latents,
        })
    }
}
