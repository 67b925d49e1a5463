//! DDIM: implicit sampling.
//!
//! "Denoising Diffusion Implicit Models" (<https://arxiv.org/abs/2010.02502>), equations 12 and 16. From timestep `t` to
//! `s = t - ⌊T / n⌋`, with `σ² = η² (1 - ᾱ_s) / (1 - ᾱ_t) (1 - ᾱ_t / ᾱ_s)`:
//!
//! ```text
//! x0  = (x_t - √(1 - ᾱ_t) ε) / √ᾱ_t
//! x_s = √ᾱ_s x0 + √(1 - ᾱ_s - σ²) ε + σ z
//! ```
//!
//! `s` is counted from `t` and not read from the schedule; below 0, `ᾱ_s` is 1 or `ᾱ_0`, as `set_alpha_to_one` says.

use std::marker::PhantomData;

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::mixture::{self, Mixture};
use crate::prediction::{Bound, Prediction, noise_between};
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, PredictionType, Scheduler, SchedulerConfig,
    SchedulerError, Step, StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`DDIMScheduler`].
    pub struct DDIMConfig for "DDIMScheduler" [
        noise(0.0001, 0.02, Linear), clip(true), thresholding, spacing(Leading), zero_snr
    ] {
        /// Whether the last step ends at an image without noise, instead of the first training timestep.
        pub set_alpha_to_one: bool = true,
    }
}

/// Implicit sampling: few steps, and no noise in them unless [`StepOptions::eta`](crate::StepOptions::eta) asks for it.
#[derive(Debug)]
pub struct DDIMScheduler<B: Backend> {
    resolved: Resolved<DDIMConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    timesteps: Vec<f64>,
    /// `⌊T / n⌋`
    stride: usize,
    backend: PhantomData<B>,
}

impl<B: Backend> DDIMScheduler<B> {
    pub(crate) fn build(resolved: Resolved<DDIMConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let noise_schedule =
            options.noise_schedule(BetaSchedule::COMMON, options.rescale_betas_zero_snr)?;
        let bound = options.threshold_or(options.clipping()?)?;
        Ok(Self {
            noise_schedule,
            bound,
            timesteps: Vec::new(),
            stride: 0,
            resolved,
            backend: PhantomData,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }
}

impl<B: Backend> Scheduler<B> for DDIMScheduler<B> {
    fn config(&self) -> &SchedulerConfig {
        &self.resolved.config
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            eta: true,
            noise: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let steps = request.steps(DDIMConfig::CLASS)?;
        let timesteps = options.spacing().visited(steps)?;
        if options.prediction_type == PredictionType::Epsilon && !self.bound.cuts_infinity() {
            self.noise_schedule
                .require_signal(DDIMConfig::CLASS, &timesteps)?;
        }
        self.timesteps = timesteps;
        self.stride = options.num_train_timesteps / steps;
        Ok(())
    }

    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let Step {
            model_output,
            timestep,
            sample,
            options,
            mut noise,
        } = step;
        let alpha_bar = self.noise_schedule.alpha_bar(timestep)?;
        let alpha_bar_next = self.noise_schedule.alpha_bar_or_end(
            timestep - self.stride as f64,
            self.resolved.options.set_alpha_to_one,
        )?;
        let eta = options.eta.unwrap_or(0.0) as f32;
        let variance =
            (1.0 - alpha_bar_next) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_next);
        let deviation = eta * variance.sqrt();
        let towards_sample = 1.0 - alpha_bar_next - deviation * deviation;
        if towards_sample < 0.0 && eta.abs() > 1.0 {
            let value = f64::from(eta);
            return Err(SchedulerError::StepOption {
                name: "eta",
                value,
                expected: "a number between 0 and 1",
            });
        }

        let mixture = Mixture::of_alpha_bar(alpha_bar);
        let kind = self.resolved.options.prediction_type;
        let prediction = Prediction {
            kind,
            output: model_output,
            sample,
        };
        let original = self.bound.apply(prediction.original(mixture));
        let epsilon = match options.use_clipped_model_output {
            true => noise_between(prediction.sample, original.clone(), mixture),
            false => prediction.epsilon(mixture),
        };
        let mut next = combine([
            (alpha_bar_next.sqrt(), original.clone()),
            (towards_sample.max(0.0).sqrt(), epsilon),
        ]);
        if eta > 0.0 {
            next = next + noise.like(&original)?.mul_scalar(deviation);
        }
        Ok(StepOutput {
            prev_sample: next,
            pred_original_sample: Some(original),
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
