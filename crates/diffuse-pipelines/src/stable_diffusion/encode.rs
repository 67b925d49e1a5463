//! From images to latents.

use burn::tensor::{DType, Tensor, backend::Backend};
use diffuse_nn::checkpoint::{cast, float_dtype};
use diffuse_schedulers::{NoiseSource, randn_tensor};
use diffuse_unet::Pretrained;
use diffuse_vae::DiagonalGaussian;

use super::StableDiffusionPipeline;
use crate::PipelineError;
use crate::generation::check_finite;

impl<B: Backend> StableDiffusionPipeline<B> {
    /// The distribution of the latents of images in `f32`, not multiplied by the autoencoder's
    /// scaling factor. Images are encoded one after the other.
    ///
    /// # Shapes
    /// - `images`: `[images, 3, height, width]` in `[-1, 1]`, sides multiples of 8
    /// - mean and variance: `[images, channels, height / 8, width / 8]`
    ///
    /// # Errors
    /// If the result is not finite, or the autoencoder takes no images with three channels.
    pub fn encode_images(
        &self,
        images: Tensor<B, 4>,
    ) -> Result<DiagonalGaussian<B>, PipelineError> {
        let channels = self.vae.config().in_channels;
        if channels != 3 {
            return Err(PipelineError::Parts(format!(
                "an image has 3 channels, but the autoencoder's `in_channels` is {channels}"
            )));
        }
        let dtype = float_dtype(&self.vae);
        let mut exact = None;
        let (mut means, mut logvars) = (Vec::new(), Vec::new());
        for image in images.iter_dim(0) {
            let mut posterior = self.vae.encode(image.clone().cast(dtype));
            // As in `decode`: an activation may exceed the range of `f16`.
            if dtype != DType::F32 && check_finite("latents", &posterior.mean).is_err() {
                let vae = exact.get_or_insert_with(|| cast(self.vae.clone(), DType::F32));
                posterior = vae.encode(image);
            }
            check_finite("latents", &posterior.mean)?;
            means.push(posterior.mean.cast(DType::F32));
            logvars.push(posterior.logvar.cast(DType::F32));
        }
        Ok(DiagonalGaussian {
            mean: Tensor::cat(means, 0),
            logvar: Tensor::cat(logvars, 0),
        })
    }

    /// Latents drawn from their distribution, for the UNet.
    pub(super) fn draw_latents(
        &self,
        posterior: &DiagonalGaussian<B>,
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor<B, 4>, PipelineError> {
        let epsilon = self.draw(posterior.mean.dims(), noise)?;
        Ok(posterior.sample(epsilon) * self.vae.config().scaling_factor)
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
