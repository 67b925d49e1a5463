//! The parts that samplers of EDM models share.
//!
//! "Elucidating the Design Space of Diffusion-Based Generative Models"
//! (<https://arxiv.org/abs/2206.00364>), table 1 and equation 5: samples are `x = x0 + σ ε`, the
//! model is conditioned on `ln σ / 4`, its input is `x / √(σ² + σ_data²)` and its output `F`:
//!
//! ```text
//! x0 = c_skip x + c_out F,   c_skip = σ_data² / (σ² + σ_data²)
//!                            c_out  = ± σ σ_data / √(σ² + σ_data²)
//! ```
//!
//! `c_out` is negative with `v_prediction`.

use serde::{Deserialize, Serialize};

use super::prelude::*;
use crate::config::require_range;
use crate::schedule::sigmas::{SIGMAS, karras};
use crate::schedule::spacing::check_steps;

/// The formula of the sigmas of an EDM model (the key `sigma_schedule`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EDMSigmaSchedule {
    /// `σ^(1/ρ)` is spaced evenly.
    Karras,
    /// `ln σ` is spaced evenly.
    Exponential,
}

options! {
    /// The options that EDM samplers share.
    pub struct EDMOptions {
        /// The smallest sigma.
        pub sigma_min: f64 = 0.002,
        /// The largest sigma.
        pub sigma_max: f64 = 80.0,
        /// The standard deviation of the images that the model was trained on.
        pub sigma_data: f64 = 0.5,
        /// The formula of the sigmas.
        pub sigma_schedule: EDMSigmaSchedule = EDMSigmaSchedule::Karras,
        /// The largest number of steps of a run.
        pub num_train_timesteps: usize = 1000,
        /// The sign of the model output: `epsilon` or `v_prediction`.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The exponent of Karras's schedule.
        pub rho: f64 = 7.0,
        /// The final sigma of a run.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
    }
}

impl EDMOptions {
    /// An error for options without finite sigmas.
    pub(super) fn check(&self, class: &'static str) -> Result<(), SchedulerError> {
        for (key, value) in [
            ("sigma_min", self.sigma_min),
            ("sigma_max", self.sigma_max),
            ("sigma_data", self.sigma_data),
            ("rho", self.rho),
        ] {
            require_range(class, key, value, SIGMAS, "a number from 1e-18 to 1e18")?;
        }
        self.prediction_type.require_noise(class)
    }

    /// The process of the samples.
    pub(super) fn process(&self) -> Process {
        Process::EDM {
            sigma_data: self.sigma_data as f32,
            sigma_max: self.sigma_max,
        }
    }

    /// The schedule of a run; the final sigma is computed from the last one.
    pub(super) fn place(
        &self,
        class: &'static str,
        request: &TimestepRequest,
        final_sigma: impl Fn(f32) -> f32,
    ) -> Result<Schedule, SchedulerError> {
        let steps = request.steps(class)?;
        check_steps(class, steps, self.num_train_timesteps)?;
        let range = SigmaRange {
            min: self.sigma_min,
            max: self.sigma_max,
        };
        let sigmas = match self.sigma_schedule {
            EDMSigmaSchedule::Karras => karras(range, self.rho, steps),
            // Diffusers' quirk: a run of one step is at the smallest sigma.
            EDMSigmaSchedule::Exponential if steps == 1 => vec![range.min],
            EDMSigmaSchedule::Exponential => SigmaSchedule::Exponential.sigmas(range, steps),
        };
        let mut sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        if !sigmas.iter().all(|sigma| *sigma > 0.0 && sigma.is_finite()) {
            return Err(SchedulerError::clash(
                class,
                format!(
                    "`sigma_min` `{}`, `sigma_max` `{}` and `rho` `{}`",
                    self.sigma_min, self.sigma_max, self.rho
                ),
                "sigmas between them are rounded to 0",
            ));
        }
        let timesteps = sigmas.iter().map(|sigma| f64::from(0.25 * sigma.ln()));
        let timesteps = timesteps.collect();
        sigmas.push(final_sigma(sigmas[steps - 1]));
        Ok(Schedule::new(timesteps, sigmas))
    }

    /// `x0` of a sample and the model output, both `[batch, channels, height, width]`.
    pub(super) fn denoised<B: Backend>(
        &self,
        sample: Tensor<B, 4>,
        output: Tensor<B, 4>,
        sigma: f32,
    ) -> Tensor<B, 4> {
        let data = self.sigma_data as f32;
        let deviation = self.process().input_deviation(sigma);
        let c_skip = data * data / (deviation * deviation);
        let c_out = match self.prediction_type {
            PredictionType::VPrediction => -sigma * data / deviation,
            PredictionType::Epsilon | PredictionType::Sample => sigma * data / deviation,
        };
        combine([(c_skip, sample), (c_out, output)])
    }
}
