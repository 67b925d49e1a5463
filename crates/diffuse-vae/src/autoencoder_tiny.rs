//! TAESD, a small autoencoder that was distilled from that of Stable Diffusion (Ollin Boer Bohan
//! 2023, <https://github.com/madebyollin/taesd>): it takes a fraction of the time and memory, and
//! loses some detail.
//!
//! Its latents are those of the UNet, so its `scaling_factor` is 1.

use burn::module::Module;
use burn::nn::Relu;
use burn::tensor::{Tensor, backend::Backend};
use diffuse_nn::config::{
    ConfigError, MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, ModelConfig, check_size,
};
use diffuse_nn::pretrained::Pretrained;
use diffuse_nn::{Conv2d, Conv2dConfig, ops};
use serde::{Deserialize, Serialize};

use crate::tiling::Tiles;

/// The `config.json` of an [`AutoencoderTiny`], with Diffusers' defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderTinyConfig {
    /// Channels of the encoder's input.
    pub in_channels: usize,
    /// Channels of the decoder's output.
    pub out_channels: usize,
    /// Channels of each of the encoder's resolution levels: all the same.
    pub encoder_block_out_channels: Vec<usize>,
    /// Channels of each of the decoder's resolution levels: all the same.
    pub decoder_block_out_channels: Vec<usize>,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Blocks of each of the encoder's levels, from the highest resolution.
    pub num_encoder_blocks: Vec<usize>,
    /// Blocks of each of the decoder's levels, from the lowest resolution.
    pub num_decoder_blocks: Vec<usize>,
    /// The latents are about in the range of twice this number; not used by the model.
    pub latent_magnitude: f64,
    /// Where 0 is in that range; not used by the model.
    pub latent_shift: f64,
    /// Factor between the latents of this model and those of the UNet.
    pub scaling_factor: f64,
}

impl Default for AutoencoderTinyConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            encoder_block_out_channels: vec![64; 4],
            decoder_block_out_channels: vec![64; 4],
            latent_channels: 4,
            num_encoder_blocks: vec![1, 3, 3, 3],
            num_decoder_blocks: vec![3, 3, 3, 1],
            latent_magnitude: 3.0,
            latent_shift: 0.5,
            scaling_factor: 1.0,
        }
    }
}

impl ModelConfig for AutoencoderTinyConfig {
    const CLASS: &'static str = "AutoencoderTiny";
    const ONLY: &'static [(&'static str, &'static [&'static str])] = &[
        ("act_fn", &["\"relu\""]),
        ("upsample_fn", &["\"nearest\""]),
        ("upsampling_scaling_factor", &["2"]),
        ("shift_factor", &["0"]),
    ];

    fn validate(&self) -> Result<(), ConfigError> {
        let class = Self::CLASS;
        let levels = self.decoder_block_out_channels.len();
        check_size(class, "decoder_block_out_channels", levels, MAX_LEVELS)?;
        for (key, count) in [
            (
                "encoder_block_out_channels",
                self.encoder_block_out_channels.len(),
            ),
            ("num_encoder_blocks", self.num_encoder_blocks.len()),
            ("num_decoder_blocks", self.num_decoder_blocks.len()),
        ] {
            if count != levels {
                let supported =
                    format!("as many entries as `decoder_block_out_channels` ({levels})");
                return Err(ConfigError::unsupported(class, key, count, supported));
            }
        }
        for (key, channels) in [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
        ] {
            check_size(class, key, channels, MAX_CHANNELS)?;
        }
        for (key, channels) in [
            (
                "encoder_block_out_channels",
                &self.encoder_block_out_channels,
            ),
            (
                "decoder_block_out_channels",
                &self.decoder_block_out_channels,
            ),
        ] {
            check_size(class, key, channels[0], MAX_CHANNELS)?;
            if channels.iter().any(|other| *other != channels[0]) {
                let supported = "only the same number of channels at each level";
                return Err(ConfigError::unsupported(class, key, channels, supported));
            }
        }
        for (key, blocks) in [
            ("num_encoder_blocks", &self.num_encoder_blocks),
            ("num_decoder_blocks", &self.num_decoder_blocks),
        ] {
            for blocks in blocks {
                check_size(class, key, *blocks, MAX_LAYERS)?;
            }
        }
        let scale = self.scaling_factor;
        if !(scale.is_finite() && scale > 0.0) {
            let supported = "positive numbers";
            return Err(ConfigError::unsupported(
                class,
                "scaling_factor",
                scale,
                supported,
            ));
        }
        Ok(())
    }
}

impl AutoencoderTinyConfig {
    /// Pixels per latent position in each direction: 8.
    pub fn downscale(&self) -> usize {
        1 << (self.decoder_block_out_channels.len() - 1)
    }

    fn encoder<B: Backend>(&self, device: &B::Device) -> EncoderTiny<B> {
        let channels = self.encoder_block_out_channels[0];
        let mut layers = vec![];
        for (level, blocks) in self.num_encoder_blocks.iter().enumerate() {
            layers.push(TinyLayer::Conv(match level {
                0 => conv([self.in_channels, channels]).init(device),
                _ => conv([channels; 2])
                    .with_stride(2)
                    .with_bias(false)
                    .init(device),
            }));
            layers.extend(
                (0..*blocks).map(|_| TinyLayer::Block(AutoencoderTinyBlock::new(channels, device))),
            );
        }
        let output = conv([channels, self.latent_channels]).init(device);
        layers.push(TinyLayer::Conv(output));
        EncoderTiny { layers }
    }

    fn decoder<B: Backend>(&self, device: &B::Device) -> DecoderTiny<B> {
        let channels = self.decoder_block_out_channels[0];
        let input = conv([self.latent_channels, channels]).init(device);
        let mut layers = vec![TinyLayer::Conv(input), TinyLayer::Relu(Relu)];
        let last = self.num_decoder_blocks.len() - 1;
        for (level, blocks) in self.num_decoder_blocks.iter().enumerate() {
            layers.extend(
                (0..*blocks).map(|_| TinyLayer::Block(AutoencoderTinyBlock::new(channels, device))),
            );
            if level < last {
                layers.push(TinyLayer::Upsample(Upsample2x));
                let conv = conv([channels; 2]).with_bias(false).init(device);
                layers.push(TinyLayer::Conv(conv));
            }
        }
        let output = conv([channels, self.out_channels]).init(device);
        layers.push(TinyLayer::Conv(output));
        DecoderTiny { layers }
    }

    /// A model with random weights, which are drawn at their first use.
    ///
    /// # Panics
    /// If the configuration is not [valid](ModelConfig::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> AutoencoderTiny<B> {
        AutoencoderTiny {
            encoder: self.encoder(device),
            decoder: self.decoder(device),
            config: self.clone(),
            use_tiling: false,
        }
    }
}

fn conv(channels: [usize; 2]) -> Conv2dConfig {
    Conv2dConfig::new(channels, 3).with_padding(1)
}

/// A layer of the encoder or of the decoder.
#[expect(clippy::large_enum_variant, reason = "most layers are blocks")]
#[derive(Module, Debug)]
pub enum TinyLayer<B: Backend> {
    /// A convolution.
    Conv(Conv2d<B>),
    /// A residual block.
    Block(AutoencoderTinyBlock<B>),
    /// The rectifier.
    Relu(Relu),
    /// Twice the size: a part of the convolution that follows.
    Upsample(Upsample2x),
}

/// A layer without weights that doubles the size of an image, each position repeated.
#[derive(Module, Clone, Debug)]
pub struct Upsample2x;

/// `relu(x + conv(relu(conv(relu(conv(x))))))`
#[derive(Module, Debug)]
pub struct AutoencoderTinyBlock<B: Backend> {
    /// Convolutions that keep the number of channels, with rectifiers between them.
    pub conv: (Conv2d<B>, Relu, Conv2d<B>, Relu, Conv2d<B>),
}

impl<B: Backend> AutoencoderTinyBlock<B> {
    fn new(channels: usize, device: &B::Device) -> Self {
        let conv = || conv([channels; 2]).init(device);
        Self {
            conv: (conv(), Relu, conv(), Relu, conv()),
        }
    }

    /// `[batch, channels, height, width]` to the same shape.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let (first, relu, second, _, third) = &self.conv;
        let y = relu.forward(first.forward(x.clone()));
        let y = relu.forward(second.forward(y));
        relu.forward(third.forward_add(y, x))
    }
}

fn run<B: Backend>(layers: &[TinyLayer<B>], mut x: Tensor<B, 4>) -> Tensor<B, 4> {
    let mut upsample = false;
    for layer in layers {
        x = match layer {
            TinyLayer::Conv(conv) if upsample => conv.forward_upsampled(x),
            TinyLayer::Conv(conv) => conv.forward(x),
            TinyLayer::Block(block) => block.forward(x),
            TinyLayer::Relu(relu) => relu.forward(x),
            TinyLayer::Upsample(_) => x,
        };
        upsample = matches!(layer, TinyLayer::Upsample(_));
    }
    x
}

/// The encoder of an [`AutoencoderTiny`].
#[derive(Module, Debug)]
pub struct EncoderTiny<B: Backend> {
    /// Layers in order.
    pub layers: Vec<TinyLayer<B>>,
}

impl<B: Backend> EncoderTiny<B> {
    /// `[batch, in_channels, height, width]` in `[-1, 1]` to `[batch, latent_channels, height / 8,
    /// width / 8]`.
    pub fn forward(&self, image: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::on_worker::<B, _>(|| run(&self.layers, (image + 1.0) / 2.0))
    }
}

/// The decoder of an [`AutoencoderTiny`].
#[derive(Module, Debug)]
pub struct DecoderTiny<B: Backend> {
    /// Layers in order.
    pub layers: Vec<TinyLayer<B>>,
}

impl<B: Backend> DecoderTiny<B> {
    /// `[batch, latent_channels, height, width]` to `[batch, out_channels, 8 · height, 8 · width]`,
    /// about in `[-1, 1]`.
    pub fn forward(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::on_worker::<B, _>(|| {
            let limited = (latents / 3.0).tanh() * 3.0;
            run(&self.layers, limited) * 2.0 - 1.0
        })
    }
}

/// A small autoencoder without a distribution of latents.
#[derive(Module, Debug)]
pub struct AutoencoderTiny<B: Backend> {
    /// From an image to its latents.
    pub encoder: EncoderTiny<B>,
    /// From latents to an image.
    pub decoder: DecoderTiny<B>,
    #[module(skip)]
    config: AutoencoderTinyConfig,
    #[module(skip)]
    use_tiling: bool,
}

impl<B: Backend> Pretrained<B> for AutoencoderTiny<B> {
    type Config = AutoencoderTinyConfig;

    fn config(&self) -> &AutoencoderTinyConfig {
        &self.config
    }

    fn from_config(config: &AutoencoderTinyConfig, device: &B::Device) -> Self {
        config.init(device)
    }
}

/// Height and width of a tile in pixels.
const TILE: usize = 512;
/// An eighth of a tile overlaps the next.
const OVERLAP: usize = 8;

impl<B: Backend> AutoencoderTiny<B> {
    /// Encodes and decodes images in overlapping tiles of 512 x 512 pixels, as Diffusers does.
    /// Memory then depends on the size of a tile, not of the image.
    pub fn enable_tiling(&mut self) {
        self.use_tiling = true;
    }

    /// Encodes and decodes whole images, which is the default.
    pub fn disable_tiling(&mut self) {
        self.use_tiling = false;
    }

    /// The latents of an image, not multiplied by `scaling_factor`.
    ///
    /// # Shapes
    /// - `image`: `[batch, in_channels, height, width]` in `[-1, 1]`, sides multiples of 8
    /// - output: `[batch, latent_channels, height / 8, width / 8]`
    pub fn encode(&self, image: Tensor<B, 4>) -> Tensor<B, 4> {
        if self.use_tiling {
            let tiles = Tiles::new(TILE, TILE / self.config.downscale(), OVERLAP);
            tiles.run_masked(image, |image| self.encoder.forward(image))
        } else {
            self.encoder.forward(image)
        }
    }

    /// The image of latents, which have been divided by `scaling_factor`.
    ///
    /// # Shapes
    /// - `latents`: `[batch, latent_channels, height, width]`
    /// - output: `[batch, out_channels, 8 · height, 8 · width]`, about in `[-1, 1]`
    pub fn decode(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        if self.use_tiling {
            let tiles = Tiles::new(TILE / self.config.downscale(), TILE, OVERLAP);
            tiles.run_masked(latents, |latents| self.decoder.forward(latents))
        } else {
            self.decoder.forward(latents)
        }
    }
}
