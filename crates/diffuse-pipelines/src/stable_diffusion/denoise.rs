//! The denoising loop.

use std::ops::ControlFlow;
use std::time::Instant;

use burn::tensor::{DType, Tensor, backend::Backend};
use diffuse_nn::checkpoint::float_dtype;
use diffuse_schedulers::StepOptions;

use super::options::timestep_request;
use super::{
    PreparedPrompt, StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline,
};
use crate::generation::{StageTimes, check_finite, seeds_or_random};
use crate::{Generated, PipelineError, StepEvent, generators, guide, rescale_noise};

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Generates images.
    ///
    /// # Errors
    /// If an option makes no sense, or the result is not finite.
    pub fn generate(
        &self,
        options: &StableDiffusionOptions,
    ) -> Result<Generated<B>, PipelineError> {
        let inputs = StableDiffusionInputs::default();
        self.generate_with(options, inputs, |_| ControlFlow::Continue(()))
    }

    /// [`generate`](Self::generate) with tensors or a noise source in place of some options, and a
    /// callback after each step.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_with(
        &self,
        options: &StableDiffusionOptions,
        mut inputs: StableDiffusionInputs<'_, B>,
        mut on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>, PipelineError> {
        self.check_inputs(options, &inputs)?;
        let mut seeded;
        let noise = match inputs.noise.take() {
            Some(noise) => noise,
            None => {
                seeded = generators(&seeds_or_random(&options.seeds));
                &mut seeded
            }
        };
        let mut scheduler = self.scheduler.fresh()?;
        scheduler.set_timesteps(&timestep_request(options))?;
        let timesteps = scheduler.timesteps().to_vec();
        let start = Instant::now();
        let prompt = self.prepare_prompt(options, &inputs)?;
        let encoded = Instant::now();
        let sigma = scheduler.init_noise_sigma();
        let mut latents = self.prepare_latents(options, &inputs, sigma, noise)?;

        let step_options = StepOptions {
            eta: scheduler.capabilities().eta.then_some(options.eta),
            ..StepOptions::default()
        };
        let mut interrupted = false;
        for (step, &timestep) in timesteps.iter().enumerate() {
            let input = scheduler.scale_model_input(latents.clone(), timestep)?;
            let noise_pred = self.predict_noise(input, timestep, &prompt, options);
            let output = scheduler.step(noise_pred, timestep, latents, &step_options, noise)?;
            latents = output.prev_sample;
            let event = StepEvent {
                step,
                steps: timesteps.len(),
                timestep,
                latents: &mut latents,
                pred_original_sample: output.pred_original_sample.as_ref(),
            };
            if on_step(event).is_break() {
                interrupted = true;
                break;
            }
        }
        check_finite("latents", &latents)?;
        let denoised = Instant::now();
        let images = if interrupted {
            Vec::new()
        } else {
            self.decode(latents.clone())?
        };
        Ok(Generated {
            images,
            latents,
            timesteps,
            truncated: prompt.truncated,
            interrupted,
            times: StageTimes {
                encode: encoded - start,
                denoise: denoised - encoded,
                decode: denoised.elapsed(),
            },
        })
    }

    /// The UNet's prediction in `f32`, guided. Both halves of a guided run go through the UNet as
    /// one batch.
    ///
    /// # Shapes
    /// - `latents`, output: `[batch, channels, height, width]`
    pub fn predict_noise(
        &self,
        latents: Tensor<B, 4>,
        timestep: f64,
        prompt: &PreparedPrompt<B>,
        options: &StableDiffusionOptions,
    ) -> Tensor<B, 4> {
        let input = latents.cast(float_dtype(&self.unet));
        let input = if prompt.guided {
            Tensor::cat(vec![input.clone(), input], 0)
        } else {
            input
        };
        let scale = options.guidance_scale;
        let noise = self
            .unet
            .forward_guided(input, timestep, &prompt.context, Some(scale))
            .cast(DType::F32);
        if !prompt.guided {
            return noise;
        }
        let [rows, _, _, _] = noise.dims();
        let unconditional = noise.clone().narrow(0, 0, rows / 2);
        let conditional = noise.narrow(0, rows / 2, rows / 2);
        let guided = guide(unconditional, conditional.clone(), scale);
        if options.guidance_rescale > 0.0 {
            rescale_noise(guided, conditional, options.guidance_rescale)
        } else {
            guided
        }
    }
}
