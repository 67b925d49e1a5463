//! Images of latents during a run.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use diffuse_nn::checkpoint::float_dtype;
use diffuse_vae::{Autoencoder, AutoencoderTiny};
use image::RgbImage;

use crate::{PipelineError, StepEvent, to_images};

/// A linear map from the latents of a UNet, which are not divided by the autoencoder's scaling
/// factor, to colors in `[-1, 1]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentRgb {
    /// Red, green and blue of each latent channel.
    pub factors: [[f32; 3]; 4],
    /// Red, green and blue of latents that are 0.
    pub bias: [f32; 3],
}

impl LatentRgb {
    /// The map for Stable Diffusion v1 and v2: the factors of ComfyUI
    /// (`latent_rgb_factors` of `SD15` in its `latent_formats.py`).
    pub const STABLE_DIFFUSION: Self = Self {
        factors: [
            [0.3512, 0.2297, 0.3227],
            [0.3250, 0.4974, 0.2350],
            [-0.2829, 0.1762, 0.2721],
            [-0.2120, -0.2616, -0.7177],
        ],
        bias: [0.0; 3],
    };
}

/// How latents become preview images. A preview changes nothing in a run.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use burn_flex::Flex;
/// use diffuse_pipelines::{
///     LatentPreview, LatentRgb, StableDiffusionInputs, StableDiffusionOptions,
///     StableDiffusionPipeline,
/// };
///
/// # let folder = "tests/reference/sd/base";
/// let pipeline = StableDiffusionPipeline::<Flex>::from_pretrained(folder, &Default::default())?;
/// let options = StableDiffusionOptions {
///     num_inference_steps: 3,
///     predict_original: true,
///     ..StableDiffusionOptions::from("a red fox")
/// };
/// let preview = LatentPreview::from(LatentRgb::STABLE_DIFFUSION);
/// let mut previews = Vec::new();
/// pipeline.generate_with(&options, StableDiffusionInputs::default(), |event| {
///     previews.extend(preview.images(event.preview_latents()).unwrap());
///     ControlFlow::Continue(())
/// })?;
/// assert_eq!(previews[0].dimensions(), (8, 8)); // an eighth of the image's size
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[expect(clippy::large_enum_variant, reason = "there is one a run")]
#[derive(Debug, Clone)]
pub enum LatentPreview<B: Backend> {
    /// A pixel for each latent position, in next to no time.
    Linear(LatentRgb),
    /// The images of an autoencoder: an [`AutoencoderTiny`] takes a fraction of a step.
    Decoder(Autoencoder<B>),
}

impl<B: Backend> From<LatentRgb> for LatentPreview<B> {
    fn from(map: LatentRgb) -> Self {
        Self::Linear(map)
    }
}

impl<B: Backend> From<AutoencoderTiny<B>> for LatentPreview<B> {
    fn from(vae: AutoencoderTiny<B>) -> Self {
        Self::Decoder(vae.into())
    }
}

impl<B: Backend> LatentPreview<B> {
    /// Images of latents: those of a linear map have the size of the latents, others that of the
    /// run's images.
    ///
    /// # Shapes
    /// - `latents`: `[batch, channels, height, width]`
    ///
    /// # Errors
    /// If a value is not finite, or the map is for another number of channels.
    pub fn images(&self, latents: &Tensor<B, 4>) -> Result<Vec<RgbImage>, PipelineError> {
        let [_, channels, _, _] = latents.dims();
        let expected = match self {
            Self::Linear(map) => map.factors.len(),
            Self::Decoder(vae) => vae.latent_channels(),
        };
        if channels != expected {
            return Err(PipelineError::Options(format!(
                "the preview is for latents with {expected} channels, but these have {channels}"
            )));
        }
        let latents = latents.clone().cast(DType::F32);
        match self {
            Self::Linear(map) => to_images(linear(map, latents)),
            Self::Decoder(vae) => {
                let latents = (latents / vae.scaling_factor()).cast(float_dtype(vae));
                let images = latents.iter_dim(0).map(|latents| {
                    let mut images = to_images(vae.decode(latents))?;
                    Ok(images.remove(0))
                });
                images.collect()
            }
        }
    }
}

fn linear<B: Backend>(map: &LatentRgb, latents: Tensor<B, 4>) -> Tensor<B, 4> {
    let device = (&latents.device(), DType::F32);
    let [batch, channels, height, width] = latents.dims();
    let factors = TensorData::from(map.factors);
    let factors = Tensor::<B, 2>::from_data(factors, device).transpose();
    let bias = Tensor::<B, 1>::from_data(map.bias, device).reshape([1, 3, 1]);
    let latents = latents.reshape([batch, channels, height * width]);
    let colors = factors
        .unsqueeze::<3>()
        .expand([batch, 3, channels])
        .matmul(latents)
        + bias;
    colors.reshape([batch, 3, height, width])
}

impl<B: Backend> StepEvent<'_, B> {
    /// The latents to show of a step: the predicted result, if the scheduler computes it or
    /// [`predict_original`](crate::StableDiffusionOptions::predict_original) is set, else the
    /// latents after the step, in which noise hides the image until late in the run.
    pub fn preview_latents(&self) -> &Tensor<B, 4> {
        self.pred_original_sample.unwrap_or(self.latents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_flex::Flex;

    #[track_caller]
    fn check(map: LatentRgb, expected: [[u8; 3]; 2]) {
        // Two positions of one row.
        let values = [0.5f32, -0.4, -1.0, 0.6, 0.25, 1.5, 0.75, -0.3];
        let latents = Tensor::<Flex, 1>::from_data(values, &Default::default());
        let preview = LatentPreview::from(map);
        let images = preview.images(&latents.reshape([1, 4, 1, 2])).unwrap();
        let pixels: Vec<[u8; 3]> = images[0].pixels().map(|pixel| pixel.0).collect();
        assert_eq!((images.len(), &pixels[..]), (1, &expected[..]));
    }

    // By numpy: ((latents @ factors + bias + 1) / 2).clip(0, 1) * 255.
    #[test]
    fn latents_are_mapped_to_colors() {
        let map = LatentRgb::STABLE_DIFFUSION;
        check(map, [[79, 59, 58], [88, 198, 209]]);
        let bias = [0.5, -0.25, 0.125];
        check(LatentRgb { bias, ..map }, [[143, 27, 74], [152, 166, 224]]);
    }

    #[test]
    fn other_numbers_of_channels_are_refused() {
        let latents = Tensor::<Flex, 4>::zeros([1, 16, 2, 2], &Default::default());
        let preview = LatentPreview::from(LatentRgb::STABLE_DIFFUSION);
        assert_eq!(
            preview.images(&latents).unwrap_err().to_string(),
            "the preview is for latents with 4 channels, but these have 16"
        );
    }
}
