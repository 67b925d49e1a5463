//! TCD: sampling of trajectory consistency models.
//!
//! "Trajectory Consistency Distillation" (<https://arxiv.org/abs/2402.19159>), algorithm 4, with the share of noise `η`
//! (the paper's `γ`). From timestep `t` to the next lower one `r` of the schedule, by way of `s = ⌊(1 - η) r⌋`:
//!
//! ```text
//! x_s = √ᾱ_s x0 + √(1 - ᾱ_s) ε
//! x_r = √(ᾱ_r / ᾱ_s) x_s + √(1 - ᾱ_r / ᾱ_s) z,   and x_s itself, with r = 0, at the end
//! ```

use std::marker::PhantomData;

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::distilled;
use crate::ladder::{Ladder, ladder_methods};
use crate::mixture::{self, Mixture};
use crate::prediction::Prediction;
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, PredictionType, Scheduler, SchedulerError, Step,
    StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`TCDScheduler`]. As in the reference, images are not bounded, whatever `clip_sample` and
    /// `thresholding` say.
    pub struct TCDConfig for "TCDScheduler" [
        noise(0.00085, 0.012, ScaledLinear), clip(false), thresholding, spacing(Leading), zero_snr
    ] {
        /// The number of timesteps that the model was distilled at.
        pub original_inference_steps: usize = 50,
        /// Without effect: no step goes below the schedule.
        pub set_alpha_to_one: bool = true,
        /// Without effect: an option of LCM.
        pub timestep_scaling: f64 = 10.0,
    }
}

const CLASS: &str = TCDConfig::CLASS;

/// The share of noise in a step unless [`StepOptions::eta`](crate::StepOptions::eta) says otherwise.
const DEFAULT_ETA: f64 = 0.3;

/// Sampling of trajectory consistency models, in 2 to 8 steps; more do not blur.
#[derive(Debug)]
pub struct TCDScheduler<B: Backend> {
    resolved: Resolved<TCDConfig>,
    noise_schedule: NoiseSchedule,
    ladder: Ladder,
    backend: PhantomData<B>,
}

impl<B: Backend> TCDScheduler<B> {
    pub(crate) fn build(resolved: Resolved<TCDConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let noise_schedule =
            options.noise_schedule(BetaSchedule::COMMON, options.rescale_betas_zero_snr)?;
        // Without effect, but not without sense.
        options.threshold_or(options.clipping()?)?;
        distilled::check(options.spacing(), options.original_inference_steps)?;
        Ok(Self {
            noise_schedule,
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

impl<B: Backend> Scheduler<B> for TCDScheduler<B> {
    ladder_methods!();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            eta: true,
            noise: true,
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let original_steps = options.original_inference_steps;
        let timesteps = distilled::timesteps(request, options.spacing(), original_steps)?;
        if options.prediction_type == PredictionType::Epsilon {
            self.noise_schedule.require_signal(CLASS, &timesteps)?;
        }
        self.ladder = Ladder::new(timesteps, Vec::new());
        Ok(())
    }

    fn advance(&mut self, mut step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let eta = step.options.eta.unwrap_or(DEFAULT_ETA);
        if !(0.0..=1.0).contains(&eta) {
            let expected = "a number between 0 and 1";
            return Err(SchedulerError::StepOption {
                name: "eta",
                value: eta,
                expected,
            });
        }
        let rung = self.ladder.rung(step.timestep)?;
        let next = self.ladder.timesteps().get(rung + 1).copied();
        let r = next.unwrap_or(0.0);
        let s = ((1.0 - eta) as f32 * r as f32).floor();
        let prediction = Prediction {
            kind: self.resolved.options.prediction_type,
            output: step.model_output,
            sample: step.sample,
        };
        let alpha_bar = |timestep| self.noise_schedule.alpha_bar(timestep);
        let mixture = Mixture::of_alpha_bar(alpha_bar(step.timestep)?);
        let original = prediction.original(mixture);
        let at_s = Mixture::of_alpha_bar(alpha_bar(s.into())?);
        let prev_sample = match next {
            Some(r) if eta > 0.0 => {
                let onward = Mixture::of_alpha_bar(alpha_bar(r)? / alpha_bar(s.into())?);
                let noise = step.noise.like(&original)?;
                combine([
                    (onward.alpha * at_s.alpha, original.clone()),
                    (onward.alpha * at_s.sigma, prediction.epsilon(mixture)),
                    (onward.sigma, noise),
                ])
            }
            _ => combine([
                (at_s.alpha, original.clone()),
                (at_s.sigma, prediction.epsilon(mixture)),
            ]),
        };
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
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
