use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use diffuse_nn::pretrained::Pretrained;

use crate::{AutoencoderKL, AutoencoderTiny, DiagonalGaussian};

/// An autoencoder of a Stable Diffusion pipeline.
#[expect(clippy::large_enum_variant, reason = "there is one a pipeline")]
#[derive(Module, Debug)]
pub enum Autoencoder<B: Backend> {
    /// The variational autoencoder.
    KL(AutoencoderKL<B>),
    /// The small one.
    Tiny(AutoencoderTiny<B>),
}

/// What an autoencoder makes of an image.
#[derive(Debug, Clone)]
pub enum EncoderOutput<B: Backend> {
    /// The distribution of the latents, of an [`AutoencoderKL`].
    LatentDist(DiagonalGaussian<B>),
    /// The latents, of an [`AutoencoderTiny`]: `[batch, latent_channels, height / 8, width / 8]`.
    Latents(Tensor<B, 4>),
}

impl<B: Backend> EncoderOutput<B> {
    /// The most likely latents: `[batch, latent_channels, height / 8, width / 8]`.
    pub fn mode(&self) -> Tensor<B, 4> {
        match self {
            Self::LatentDist(posterior) => posterior.mode(),
            Self::Latents(latents) => latents.clone(),
        }
    }
}

impl<B: Backend> From<AutoencoderKL<B>> for Autoencoder<B> {
    fn from(vae: AutoencoderKL<B>) -> Self {
        Self::KL(vae)
    }
}

impl<B: Backend> From<AutoencoderTiny<B>> for Autoencoder<B> {
    fn from(vae: AutoencoderTiny<B>) -> Self {
        Self::Tiny(vae)
    }
}

/// The same expression for each variant.
macro_rules! each {
    ($autoencoder:expr, $vae:ident => $value:expr) => {
        match $autoencoder {
            Autoencoder::KL($vae) => $value,
            Autoencoder::Tiny($vae) => $value,
        }
    };
}

impl<B: Backend> Autoencoder<B> {
    /// Channels of images that are encoded.
    pub fn in_channels(&self) -> usize {
        each!(self, vae => vae.config().in_channels)
    }

    /// Channels of decoded images.
    pub fn out_channels(&self) -> usize {
        each!(self, vae => vae.config().out_channels)
    }

    /// Channels of the latents.
    pub fn latent_channels(&self) -> usize {
        each!(self, vae => vae.config().latent_channels)
    }

    /// Pixels per latent position in each direction: 8 for Stable Diffusion v1.
    pub fn downscale(&self) -> usize {
        each!(self, vae => vae.config().downscale())
    }

    /// The factor between latents of this autoencoder and those of the UNet, which are multiplied
    /// by it.
    pub fn scaling_factor(&self) -> f64 {
        each!(self, vae => vae.config().scaling_factor)
    }

    /// Encodes and decodes large images in tiles: see [`AutoencoderKL::enable_tiling`] and
    /// [`AutoencoderTiny::enable_tiling`].
    pub fn enable_tiling(&mut self) {
        each!(self, vae => vae.enable_tiling());
    }

    /// Encodes and decodes whole images, which is the default.
    pub fn disable_tiling(&mut self) {
        each!(self, vae => vae.disable_tiling());
    }

    /// The latents of an image or their distribution, not multiplied by `scaling_factor`.
    ///
    /// # Shapes
    /// - `image`: `[batch, in_channels, height, width]` in `[-1, 1]`, sides multiples of 8
    pub fn encode(&self, image: Tensor<B, 4>) -> EncoderOutput<B> {
        match self {
            Self::KL(vae) => EncoderOutput::LatentDist(vae.encode(image)),
            Self::Tiny(vae) => EncoderOutput::Latents(vae.encode(image)),
        }
    }

    /// The image of latents, which have been divided by `scaling_factor`.
    ///
    /// # Shapes
    /// - `latents`: `[batch, latent_channels, height, width]`
    /// - output: `[batch, out_channels, 8 · height, 8 · width]`, about in `[-1, 1]`
    pub fn decode(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        each!(self, vae => vae.decode(latents))
    }
}
