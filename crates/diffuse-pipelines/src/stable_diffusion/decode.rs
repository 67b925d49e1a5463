//! From latents to images.

use burn::tensor::{DType, Tensor, backend::Backend};
use diffuse_nn::checkpoint::{cast, float_dtype};
use image::RgbImage;

use super::StableDiffusionPipeline;
use crate::{PipelineError, to_images};

impl<B: Backend> StableDiffusionPipeline<B> {
    /// The images of latents, which are not yet divided by the autoencoder's scaling factor. They
    /// are decoded one after the other: a batch would need the memory of all at once.
    ///
    /// # Shapes
    /// - `latents`: `[batch, channels, height, width]`
    ///
    /// # Errors
    /// If the result is not finite.
    pub fn decode(&self, latents: Tensor<B, 4>) -> Result<Vec<RgbImage>, PipelineError> {
        let latents = latents.cast(DType::F32) / self.vae.scaling_factor();
        let dtype = float_dtype(&self.vae);
        let mut exact = None;
        let mut images = Vec::new();
        for latents in latents.iter_dim(0) {
            let decoded = to_images(self.vae.decode(latents.clone().cast(dtype)));
            let decoded = match decoded {
                // An activation that exceeds the range of `f16` is infinite, and what follows no
                // number.
                Err(PipelineError::NotFinite { .. }) if dtype != DType::F32 => {
                    let vae = exact.get_or_insert_with(|| cast(self.vae.clone(), DType::F32));
                    to_images(vae.decode(latents))
                }
                decoded => decoded,
            };
            images.extend(decoded?);
        }
        Ok(images)
    }
}
