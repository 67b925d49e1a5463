//! The denoising loop.

use std::ops::ControlFlow;

use burn::tensor::{DType, Tensor, backend::Backend};
use diffuse_nn::checkpoint::float_dtype;
use diffuse_schedulers::{NoiseSource, Scheduler, StepOptions};
use diffuse_unet::{DeepCache, UNet2DConditionOptions};
use web_time::Instant;

use super::inpaint::Inpainting;
use super::options::timestep_request;
use super::{
    PreparedPrompt, StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline,
};
use crate::generation::{StageTimes, check_finite, seeds_or_random};
use crate::{Generated, PipelineError, StepEvent, generators, guide, rescale_noise};

/// What the loop starts from.
pub(super) struct Start<B: Backend> {
    /// `[batch, channels, height, width]`
    pub latents: Tensor<B, 4>,
    pub inpainting: Option<Inpainting<B>>,
}

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
        inputs: StableDiffusionInputs<'_, B>,
        on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>, PipelineError> {
        self.check_inputs(options, &inputs)?;
        let start =
            |scheduler: &dyn Scheduler<B>, _: f64, inputs: &_, noise: &mut dyn NoiseSource| {
                let sigma = scheduler.init_noise_sigma();
                Ok(Start {
                    latents: self.prepare_latents(options, inputs, sigma, noise)?,
                    inpainting: None,
                })
            };
        self.denoise(options, inputs, None, start, on_step)
    }

    /// The loop of every run. With a `strength` it leaves out the first steps. `start` prepares the
    /// latents with the scheduler, the first timestep, the inputs and the noise source.
    pub(super) fn denoise<'a>(
        &self,
        options: &StableDiffusionOptions,
        mut inputs: StableDiffusionInputs<'a, B>,
        strength: Option<f64>,
        start: impl FnOnce(
            &dyn Scheduler<B>,
            f64,
            &StableDiffusionInputs<'a, B>,
            &mut dyn NoiseSource,
        ) -> Result<Start<B>, PipelineError>,
        mut on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>, PipelineError> {
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
        let mut first = 0;
        if let Some(strength) = strength {
            first = first_index(&*scheduler, options, strength)?;
            if scheduler.capabilities().begin_index {
                scheduler.set_begin_index(first);
            }
        }
        let timesteps = scheduler.timesteps()[first..].to_vec();
        let begin = Instant::now();
        let prompt = self.prepare_prompt(options, &inputs)?;
        let Start {
            mut latents,
            inpainting,
        } = start(&*scheduler, timesteps[0], &inputs, noise)?;
        let controls =
            self.prepare_controls(std::mem::take(&mut inputs.control), options, latents.dims());
        let mut cache = DeepCache::new(options.cache_branch_id);
        let encoded = Instant::now();

        let step_options = StepOptions {
            eta: scheduler.capabilities().eta.then_some(options.eta),
            predict_original: options.predict_original,
            ..StepOptions::default()
        };
        let mut interrupted = false;
        for (step, &timestep) in timesteps.iter().enumerate() {
            let mut input = scheduler.scale_model_input(latents.clone(), timestep)?;
            let place = [step, timesteps.len()];
            let dtype = float_dtype(&self.unet);
            let control = controls.residuals(&input, place, timestep, &prompt, dtype);
            if step.is_multiple_of(options.cache_interval) {
                cache.clear();
            }
            if let Some(inpainting) = &inpainting {
                input = inpainting.model_input(input);
            }
            let unet_options = UNet2DConditionOptions {
                control: control.as_ref(),
                deep_cache: (options.cache_interval > 1).then_some(&mut cache),
                ..Self::unet_options(options)
            };
            let noise_pred =
                self.predict_noise_with(input, timestep, &prompt, options, unet_options);
            let output = scheduler.step(noise_pred, timestep, latents, &step_options, noise)?;
            latents = output.prev_sample;
            if let Some(inpainting) = &inpainting {
                let next = timesteps.get(step + 1).copied();
                latents = inpainting.blend(latents, &*scheduler, next)?;
            }
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
        let mut images = if interrupted {
            Vec::new()
        } else {
            self.decode(latents.clone())?
        };
        let nsfw_content_detected = match &self.safety_checker {
            Some(checker) => Some(checker.apply(&mut images)?),
            None => None,
        };
        Ok(Generated {
            images,
            latents,
            timesteps,
            truncated: prompt.truncated,
            nsfw_content_detected,
            interrupted,
            times: StageTimes {
                encode: encoded - begin,
                denoise: denoised - encoded,
                decode: denoised.elapsed(),
            },
        })
    }

    /// The UNet's prediction in `f32`, guided. Both halves of a guided run go through the UNet as
    /// one batch.
    ///
    /// # Shapes
    /// - `latents`: `[batch, channels, height, width]`, with the UNet's `in_channels`
    /// - output: `[batch, channels, height, width]`, with its `out_channels`
    pub fn predict_noise(
        &self,
        latents: Tensor<B, 4>,
        timestep: f64,
        prompt: &PreparedPrompt<B>,
        options: &StableDiffusionOptions,
    ) -> Tensor<B, 4> {
        let unet_options = Self::unet_options(options);
        self.predict_noise_with(latents, timestep, prompt, options, unet_options)
    }

    /// What the options of a run say about the UNet.
    fn unet_options(options: &StableDiffusionOptions) -> UNet2DConditionOptions<'static, B> {
        UNet2DConditionOptions {
            guidance_scale: Some(options.guidance_scale),
            freeu: options.freeu,
            ..UNet2DConditionOptions::default()
        }
    }

    fn predict_noise_with(
        &self,
        latents: Tensor<B, 4>,
        timestep: f64,
        prompt: &PreparedPrompt<B>,
        options: &StableDiffusionOptions,
        unet_options: UNet2DConditionOptions<'_, B>,
    ) -> Tensor<B, 4> {
        let input = latents.cast(float_dtype(&self.unet));
        let input = if prompt.guided {
            Tensor::cat(vec![input.clone(), input], 0)
        } else {
            input
        };
        let noise = self
            .unet
            .forward_with(input, timestep, &prompt.context, unet_options)
            .cast(DType::F32);
        if !prompt.guided {
            return noise;
        }
        let [rows, _, _, _] = noise.dims();
        let unconditional = noise.clone().narrow(0, 0, rows / 2);
        let conditional = noise.narrow(0, rows / 2, rows / 2);
        let guided = guide(unconditional, conditional.clone(), options.guidance_scale);
        if options.guidance_rescale > 0.0 {
            rescale_noise(guided, conditional, options.guidance_rescale)
        } else {
            guided
        }
    }
}

/// The index of the first timestep of a run that changes an image by `strength`. The number of
/// steps is truncated in `f64`, as in Diffusers: 0.58 of 50 steps are 28.
fn first_index<B: Backend>(
    scheduler: &dyn Scheduler<B>,
    options: &StableDiffusionOptions,
    strength: f64,
) -> Result<usize, PipelineError> {
    let timesteps = scheduler.timesteps().len();
    let custom = options.timesteps.is_some() || options.sigmas.is_some();
    let steps = if custom {
        timesteps
    } else {
        options.num_inference_steps
    };
    let taken = (steps as f64 * strength) as usize;
    let first = steps.saturating_sub(taken) * scheduler.order();
    if first >= timesteps || taken == 0 {
        return Err(PipelineError::Options(format!(
            "`strength` {strength} of {steps} steps leaves no step: give a larger one, or more \
             steps"
        )));
    }
    Ok(first)
}
