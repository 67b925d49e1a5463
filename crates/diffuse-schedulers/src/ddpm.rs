//! DDPM: ancestral sampling.
//!
//! "Denoising Diffusion Probabilistic Models" (<https://arxiv.org/abs/2006.11239>), algorithm 2 and equations 6, 7, 15.
//! From timestep `t` to the next lower one `s` of the schedule, with `α = ᾱ_t / ᾱ_s` and `β = 1 - α`:
//!
//! ```text
//! x0  = (x_t - √(1 - ᾱ_t) ε) / √ᾱ_t
//! x_s = √ᾱ_s β / (1 - ᾱ_t) x0  +  √α (1 - ᾱ_s) / (1 - ᾱ_t) x_t  +  deviation z
//! ```
//!
//! The deviation is the square root of `β̃ = (1 - ᾱ_s) / (1 - ᾱ_t) β` (fixed small), of `β` (fixed large), or of
//! something the model predicts (learned). Coefficients are f32: the reference's are, and it shows in the result.

use std::marker::PhantomData;

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::mixture::{self, Mixture};
use crate::prediction::{Bound, Prediction};
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, PredictionType, Scheduler, SchedulerConfig,
    SchedulerError, Step, StepOutput, TimestepRequest,
};

/// The variance of the noise in a step (the key `variance_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VarianceType {
    /// `β̃`, the variance when the image is known.
    FixedSmall,
    /// The same, computed by way of its logarithm.
    FixedSmallLog,
    /// `β`, the variance when nothing is known of the image.
    FixedLarge,
    /// A mistake of the reference: it takes the logarithm of `β` for its square. Only the last step can be taken.
    FixedLargeLog,
    /// The model predicts the variance.
    Learned,
    /// The model predicts a place between `β̃` and `β` (<https://arxiv.org/abs/2102.09672>, equation 15).
    LearnedRange,
}

scheduler_config! {
    /// Options of [`DDPMScheduler`].
    pub struct DDPMConfig for "DDPMScheduler" [
        noise(0.0001, 0.02, Linear), clip(true), thresholding, spacing(Leading), zero_snr
    ] {
        /// The variance of the noise in a step.
        pub variance_type: VarianceType = VarianceType::FixedSmall,
    }
}

/// Ancestral sampling of "Denoising Diffusion Probabilistic Models": a step for each noise, noise in each step.
#[derive(Debug)]
pub struct DDPMScheduler<B: Backend> {
    resolved: Resolved<DDPMConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    timesteps: Vec<f64>,
    backend: PhantomData<B>,
}

impl<B: Backend> DDPMScheduler<B> {
    pub(crate) fn build(resolved: Resolved<DDPMConfig>) -> Result<Self, SchedulerError> {
        use BetaSchedule::*;
        let options = &resolved.options;
        let supported = &[Linear, ScaledLinear, SquaredcosCapV2, Sigmoid, Laplace];
        let noise_schedule = options.noise_schedule(supported, options.rescale_betas_zero_snr)?;
        let bound = options.threshold_or(options.clipping()?)?;
        Ok(Self {
            noise_schedule,
            bound,
            timesteps: Vec::new(),
            resolved,
            backend: PhantomData,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// What multiplies the noise of a step, where the model predicts it: `[batch, channels, height, width]`.
    fn learned_deviation(&self, predicted: Tensor<B, 4>, small: f32, large: f32) -> Tensor<B, 4> {
        if self.resolved.options.variance_type == VarianceType::Learned {
            return predicted.sqrt();
        }
        // ln deviation = ½ (f ln β + (1 - f) ln β̃) with f = (predicted + 1) / 2
        let (small, large) = (0.5 * small.ln(), 0.5 * large.ln());
        predicted
            .mul_scalar(0.5 * (large - small))
            .add_scalar(0.5 * (large + small))
            .exp()
    }
}

impl<B: Backend> Scheduler<B> for DDPMScheduler<B> {
    fn config(&self) -> &SchedulerConfig {
        &self.resolved.config
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            noise: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let timesteps = match request {
            TimestepRequest::Timesteps(timesteps) => {
                options.spacing().check_whole_list(timesteps, false)?;
                timesteps.clone()
            }
            other => options.spacing().visited(other.steps(DDPMConfig::CLASS)?)?,
        };
        if options.prediction_type == PredictionType::Epsilon && !self.bound.cuts_infinity() {
            self.noise_schedule
                .require_signal(DDPMConfig::CLASS, &timesteps)?;
        }
        if options.variance_type == VarianceType::FixedLargeLog && timesteps[0] > 0.0 {
            return Err(SchedulerError::Clash {
                class: DDPMConfig::CLASS,
                keys: "`variance_type` `fixed_large_log` and more than the last step".into(),
                advice:
                    "the reference takes the square root of a negative number, choose `fixed_large`"
                        .into(),
            });
        }
        self.timesteps = timesteps;
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
            mut noise,
            ..
        } = step;
        let options = &self.resolved.options;
        let index = self.timesteps.iter().position(|&t| t == timestep);
        let index = index.ok_or(SchedulerError::NotInSchedule { timestep })?;
        let alpha_bar = self.noise_schedule.alpha_bar(timestep)?;
        let alpha_bar_next = match self.timesteps.get(index + 1) {
            Some(&next) => self.noise_schedule.alpha_bar(next)?,
            None => 1.0,
        };
        let alpha = alpha_bar / alpha_bar_next;
        let (beta, variance, variance_next) = (1.0 - alpha, 1.0 - alpha_bar, 1.0 - alpha_bar_next);

        let channels = sample.dims()[1];
        let predicts_variance = matches!(
            options.variance_type,
            VarianceType::Learned | VarianceType::LearnedRange
        );
        let expected = if predicts_variance {
            2 * channels
        } else {
            channels
        };
        assert_eq!(
            model_output.dims()[1],
            expected,
            "channels of the model output for `{:?}`",
            options.variance_type
        );
        let output = model_output.clone().narrow(1, 0, channels);

        let prediction = Prediction {
            kind: options.prediction_type,
            output,
            sample: sample.clone(),
        };
        let original = self
            .bound
            .apply(prediction.original(Mixture::of_alpha_bar(alpha_bar)));
        let mut next = combine([
            (alpha_bar_next.sqrt() * beta / variance, original.clone()),
            (alpha.sqrt() * variance_next / variance, sample),
        ]);
        if timestep > 0.0 {
            let noise = noise.like(&original)?;
            let small = (variance_next / variance * beta).max(1e-20);
            next = next
                + match options.variance_type {
                    VarianceType::FixedSmall => noise.mul_scalar(small.sqrt()),
                    VarianceType::FixedSmallLog => noise.mul_scalar((0.5 * small.ln()).exp()),
                    VarianceType::FixedLarge => noise.mul_scalar(beta.sqrt()),
                    VarianceType::FixedLargeLog => noise.mul_scalar(beta.ln().sqrt()),
                    VarianceType::Learned | VarianceType::LearnedRange => {
                        let predicted = model_output.narrow(1, channels, channels);
                        self.learned_deviation(predicted, small, beta) * noise
                    }
                };
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
