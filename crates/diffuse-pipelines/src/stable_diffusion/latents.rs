//! The latents that a run starts from.

use burn::tensor::{DType, Tensor, backend::Backend};
use diffuse_nn::checkpoint::float_dtype;
use diffuse_schedulers::{NoiseSource, randn_tensor};
use diffuse_unet::{Pretrained, ResampleType, SampleSize};

use super::{StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline};
use crate::PipelineError;
use crate::generation::check_pixels;

impl<B: Backend> StableDiffusionPipeline<B> {
    /// The noise that a run starts from, in `f32`, with the standard deviation of the scheduler
    /// ([`init_noise_sigma`](diffuse_schedulers::Scheduler::init_noise_sigma)).
    ///
    /// # Errors
    /// If the options' sizes make no sense, or the noise source fails.
    pub fn prepare_latents(
        &self,
        options: &StableDiffusionOptions,
        inputs: &StableDiffusionInputs<'_, B>,
        init_noise_sigma: f64,
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor<B, 4>, PipelineError> {
        let latents = match &inputs.latents {
            Some(latents) => latents.clone(),
            None => {
                let shape = self.latent_shape(options, inputs)?;
                let device = self.unet.conv_in.weight.device();
                randn_tensor::<B>(noise, shape, float_dtype(&self.unet), &device)?
            }
        };
        Ok(latents.cast(DType::F32) * init_noise_sigma)
    }

    /// Shape of the latents of a run: `[batch, channels, height / 8, width / 8]`.
    pub(super) fn latent_shape(
        &self,
        options: &StableDiffusionOptions,
        inputs: &StableDiffusionInputs<'_, B>,
    ) -> Result<[usize; 4], PipelineError> {
        let texts = match &inputs.prompt_embeds {
            Some(embeds) => embeds.dims()[0],
            None => options.prompt.len(),
        };
        let batch = texts.saturating_mul(options.num_images_per_prompt);
        let downscale = self.vae.downscale();
        let default = match (&inputs.latents, self.sample_size) {
            (Some(latents), _) => {
                let [_, _, height, width] = latents.dims();
                Some([height, width])
            }
            (None, size) => match inputs.control.first().and_then(|it| it.image.first()) {
                Some(image) => {
                    Some([image.height(), image.width()].map(|s| s as usize / downscale))
                }
                None => size.map(SampleSize::dims),
            },
        };
        let side = |name: &str, given: Option<usize>, default: Option<usize>| {
            let side = given
                .or(default.map(|side| side * downscale))
                .ok_or_else(|| {
                    format!("give `{name}`: the UNet's configuration has no `sample_size`")
                })?;
            if side == 0 || !side.is_multiple_of(downscale) {
                return Err(format!(
                    "`height` and `width` have to be divisible by {downscale} and not zero, but `{name}` is {side}"
                ));
            }
            Ok(side)
        };
        let height = side("height", options.height, default.map(|[height, _]| height));
        let width = side("width", options.width, default.map(|[_, width]| width));
        let (height, width) = (
            height.map_err(PipelineError::Options)?,
            width.map_err(PipelineError::Options)?,
        );
        check_pixels(batch, [height, width])?;
        let least = self.least_latent_side();
        if height / downscale < least || width / downscale < least {
            return Err(PipelineError::Options(format!(
                "an image of {width} x {height} is too small for this UNet: {} on each side at least",
                least * downscale
            )));
        }
        let channels = self.vae.latent_channels();
        Ok([batch, channels, height / downscale, width / downscale])
    }

    /// A UNet that pads on one side only, or averages 2x2 positions, cannot halve a side of one.
    fn least_latent_side(&self) -> usize {
        let config = self.unet.config();
        let mut blocks = config.down_block_types.iter();
        let rounds_down = config.downsample_padding == 0
            || blocks.any(|block| matches!(block.resample(), ResampleType::Resnet));
        if rounds_down {
            1 << (config.block_out_channels.len() - 1)
        } else {
            1
        }
    }
}
