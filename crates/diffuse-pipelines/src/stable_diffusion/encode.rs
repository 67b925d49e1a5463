//! From images to latents.

use burn::tensor::{DType, Tensor, backend::Backend};
use diffuse_nn::checkpoint::{cast, float_dtype};
use diffuse_schedulers::{NoiseSource, randn_tensor};
use diffuse_vae::{DiagonalGaussian, EncoderOutput};

use super::StableDiffusionPipeline;
use crate::PipelineError;
use crate::generation::check_finite;

impl<B: Backend> StableDiffusionPipeline<B> {
    /// The latents of images or, of an autoencoder that has it, their distribution, in `f32`, not
    /// multiplied by the autoencoder's scaling factor. Images are encoded one after the other.
    ///
    /// # Shapes
    /// - `images`: `[images, 3, height, width]` in `[-1, 1]`, sides multiples of 8
    /// - latents, mean and variance: `[images, channels, height / 8, width / 8]`
    ///
    /// # Errors
    /// If the result is not finite, or the autoencoder takes no images with three channels.
    pub fn encode_images(&self, images: Tensor<B, 4>) -> Result<EncoderOutput<B>, PipelineError> {
        let channels = self.vae.in_channels();
        if channels != 3 {
            return Err(PipelineError::Parts(format!(
                "an image has 3 channels, but the autoencoder's `in_channels` is {channels}"
            )));
        }
        let dtype = float_dtype(&self.vae);
        let mut exact = None;
        let (mut means, mut logvars) = (Vec::new(), Vec::new());
        for image in images.iter_dim(0) {
            let mut output = self.vae.encode(image.clone().cast(dtype));
            // As in `decode`: an activation may exceed the range of `f16`.
            if dtype != DType::F32 && check_finite("latents", &output.mode()).is_err() {
                let vae = exact.get_or_insert_with(|| cast(self.vae.clone(), DType::F32));
                output = vae.encode(image);
            }
            check_finite("latents", &output.mode())?;
            means.push(output.mode().cast(DType::F32));
            if let EncoderOutput::LatentDist(posterior) = output {
                logvars.push(posterior.logvar.cast(DType::F32));
            }
        }
        let mean = Tensor::cat(means, 0);
        Ok(if logvars.is_empty() {
            EncoderOutput::Latents(mean)
        } else {
            let logvar = Tensor::cat(logvars, 0);
            EncoderOutput::LatentDist(DiagonalGaussian { mean, logvar })
        })
    }

    /// Latents for the UNet: `draw` gives the noise of this shape with which they are drawn from
    /// their distribution. Without a distribution nothing is drawn, as in Diffusers.
    pub(super) fn draw_latents(
        &self,
        output: EncoderOutput<B>,
        draw: impl FnOnce([usize; 4]) -> Result<Tensor<B, 4>, PipelineError>,
    ) -> Result<Tensor<B, 4>, PipelineError> {
        let latents = match output {
            EncoderOutput::LatentDist(posterior) => posterior.sample(draw(posterior.mean.dims())?),
            EncoderOutput::Latents(latents) => latents,
        };
        Ok(latents * self.vae.scaling_factor())
    }

    /// Noise of the pipeline's float type, as `f32`.
    pub(super) fn draw(
        &self,
        shape: [usize; 4],
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor<B, 4>, PipelineError> {
        let device = self.unet.conv_in.weight.device();
        let noise = randn_tensor::<B>(noise, shape, float_dtype(&self.unet), &device)?;
        Ok(noise.cast(DType::F32))
    }
}

/// Repeats all rows of a tensor until it has `batch` of them: `a, b, a, b`.
pub(super) fn tile<B: Backend>(x: Tensor<B, 4>, batch: usize) -> Tensor<B, 4> {
    let [rows, _, _, _] = x.dims();
    match batch / rows {
        1 => x,
        times => Tensor::cat(vec![x; times], 0),
    }
}
