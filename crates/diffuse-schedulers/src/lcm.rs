//! LCM: sampling of latent consistency models.
//!
//! "Latent Consistency Models" (<https://arxiv.org/abs/2310.04378>), algorithm 3, with the boundary conditions of
//! "Consistency Models" (<https://arxiv.org/abs/2303.01469>, appendix C). From timestep `t` to the next lower one `s` of the
//! schedule, with `r = timestep_scaling t` and `σ_data = 1/2`:
//!
//! ```text
//! f   = c_skip x_t + c_out x0,   c_skip = σ_data² / (r² + σ_data²),   c_out = r / √(r² + σ_data²)
//! x_s = √ᾱ_s f + √(1 - ᾱ_s) z,   and f itself at the end
//! ```

use std::marker::PhantomData;

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::distilled;
use crate::ladder::{Ladder, ladder_methods};
use crate::mixture::{self, Mixture};
use crate::prediction::{Bound, Prediction};
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, PredictionType, Scheduler, SchedulerError, Step,
    StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`LCMScheduler`].
    pub struct LCMConfig for "LCMScheduler" [
        noise(0.00085, 0.012, ScaledLinear), clip(false), thresholding, spacing(Leading), zero_snr
    ] {
        /// The number of timesteps that the model was distilled at.
        pub original_inference_steps: usize = 50,
        /// Without effect: no step goes below the schedule.
        pub set_alpha_to_one: bool = true,
        /// The factor of timesteps in the boundary conditions.
        pub timestep_scaling: f64 = 10.0,
    }
}

const CLASS: &str = LCMConfig::CLASS;

/// Sampling of latent consistency models, in 1 to 8 steps.
#[derive(Debug)]
pub struct LCMScheduler<B: Backend> {
    resolved: Resolved<LCMConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    ladder: Ladder,
    backend: PhantomData<B>,
}

impl<B: Backend> LCMScheduler<B> {
    pub(crate) fn build(resolved: Resolved<LCMConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let noise_schedule =
            options.noise_schedule(BetaSchedule::COMMON, options.rescale_betas_zero_snr)?;
        let bound = options.threshold_or(options.clipping()?)?;
        if !options.timestep_scaling.is_finite() {
            return Err(SchedulerError::Value {
                class: CLASS,
                key: "timestep_scaling",
                value: options.timestep_scaling.to_string(),
                expected: "expected a finite number".into(),
            });
        }
        distilled::check(options.spacing(), options.original_inference_steps)?;
        Ok(Self {
            noise_schedule,
            bound,
            ladder: Ladder::default(),
            resolved,
            backend: PhantomData,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }
}

impl<B: Backend> Scheduler<B> for LCMScheduler<B> {
    ladder_methods!();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            noise: true,
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let original_steps = options.original_inference_steps;
        let timesteps = distilled::timesteps(request, options.spacing(), original_steps)?;
        if options.prediction_type == PredictionType::Epsilon && !self.bound.cuts_infinity() {
            self.noise_schedule.require_signal(CLASS, &timesteps)?;
        }
        self.ladder = Ladder::new(timesteps, Vec::new());
        Ok(())
    }

    fn advance(&mut self, mut step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let options = &self.resolved.options;
        let rung = self.ladder.rung(step.timestep)?;
        let prediction = Prediction {
            kind: options.prediction_type,
            output: step.model_output,
            sample: step.sample.clone(),
        };
        let mixture = Mixture::of_alpha_bar(self.noise_schedule.alpha_bar(step.timestep)?);
        let original = self.bound.apply(prediction.original(mixture));
        let r = step.timestep as f32 * options.timestep_scaling as f32;
        let c_skip = 0.25 / (r * r + 0.25);
        let c_out = r / (r * r + 0.25).sqrt();
        let denoised = combine([(c_out, original), (c_skip, step.sample)]);
        let prev_sample = match self.ladder.timesteps().get(rung + 1) {
            None => denoised.clone(),
            Some(&next) => {
                let next = Mixture::of_alpha_bar(self.noise_schedule.alpha_bar(next)?);
                let noise = step.noise.like(&denoised)?;
                combine([(next.alpha, denoised.clone()), (next.sigma, noise)])
            }
        };
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(denoised),
        })
    }

    fn add_noise(
        &self,
        original: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        mixture::add_noise(&self.noise_schedule.mixtures(timesteps)?, original, noise)
    }

    fn get_velocity(
        &self,
        sample: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        mixture::velocity(&self.noise_schedule.mixtures(timesteps)?, sample, noise)
    }
}
