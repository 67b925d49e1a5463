//! DDIM run backwards, from an image to the noise that DDIM makes it of.
//!
//! "Diffusion Models Beat GANs on Image Synthesis" (<https://arxiv.org/abs/2105.05233>, appendix F): the ODE of
//! "Denoising Diffusion Implicit Models" (<https://arxiv.org/abs/2010.02502>, equation 14) is solved upwards. At timestep
//! `t`, from `s = t - ⌊T / n⌋` to `t`, where the model's answer at `t` stands for that at `s`:
//!
//! ```text
//! x0  = (x_s - √(1 - ᾱ_s) ε) / √ᾱ_s
//! x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε
//! ```

use std::marker::PhantomData;

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, require, scheduler_config};
use crate::mixture::Mixture;
use crate::prediction::{Bound, Prediction};
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, PredictionType, Scheduler, SchedulerConfig,
    SchedulerError, Step, StepOutput, TimestepRequest, TimestepSpacing,
};

scheduler_config! {
    /// Options of [`DDIMInverseScheduler`].
    pub struct DDIMInverseConfig for "DDIMInverseScheduler" [
        noise(0.0001, 0.02, Linear), clip(true), spacing(Leading), zero_snr
    ] {
        /// Whether the first step starts from an image without noise, instead of the first training timestep.
        pub set_alpha_to_one: bool = true,
    }
}

const CLASS: &str = DDIMInverseConfig::CLASS;

/// DDIM run backwards: it finds the noise that an image would come from.
#[derive(Debug)]
pub struct DDIMInverseScheduler<B: Backend> {
    resolved: Resolved<DDIMInverseConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    timesteps: Vec<f64>,
    /// `⌊T / n⌋`
    stride: usize,
    backend: PhantomData<B>,
}

impl<B: Backend> DDIMInverseScheduler<B> {
    pub(crate) fn build(resolved: Resolved<DDIMInverseConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let supported = &[TimestepSpacing::Leading, TimestepSpacing::Trailing];
        require(
            CLASS,
            "timestep_spacing",
            &options.timestep_spacing,
            supported,
        )?;
        let noise_schedule =
            options.noise_schedule(BetaSchedule::COMMON, options.rescale_betas_zero_snr)?;
        let bound = options.clipping()?;
        let (timesteps, stride) = (Vec::new(), 0);
        Ok(Self {
            noise_schedule,
            bound,
            timesteps,
            stride,
            resolved,
            backend: PhantomData,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// `ᾱ` below a timestep.
    fn alpha_bar_below(&self, timestep: f64) -> Result<f32, SchedulerError> {
        let set_alpha_to_one = self.resolved.options.set_alpha_to_one;
        self.noise_schedule
            .alpha_bar_or_end(timestep - self.stride as f64, set_alpha_to_one)
    }
}

impl<B: Backend> Scheduler<B> for DDIMInverseScheduler<B> {
    fn config(&self) -> &SchedulerConfig {
        &self.resolved.config
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let steps = request.steps(CLASS)?;
        let mut timesteps = options.spacing().visited(steps)?;
        timesteps.reverse();
        let stride = options.num_train_timesteps / steps;
        let from_image = timesteps[0] < stride as f64 && options.set_alpha_to_one;
        if from_image && options.prediction_type == PredictionType::Sample {
            return Err(SchedulerError::Clash {
                class: CLASS,
                keys: "`prediction_type` `sample` and `set_alpha_to_one` `true`".into(),
                advice: "no noise can be read out of an image without noise, choose `set_alpha_to_one` `false`"
                    .into(),
            });
        }
        (self.timesteps, self.stride) = (timesteps, stride);
        Ok(())
    }

    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let here = Mixture::of_alpha_bar(self.alpha_bar_below(step.timestep)?);
        let above = Mixture::of_alpha_bar(self.noise_schedule.alpha_bar(step.timestep)?);
        let prediction = Prediction {
            kind: self.resolved.options.prediction_type,
            output: step.model_output,
            sample: step.sample,
        };
        let original = self.bound.apply(prediction.original(here));
        let prev_sample = combine([
            (above.alpha, original.clone()),
            (above.sigma, prediction.epsilon(here)),
        ]);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
