//! What the samplers of EDM models share.
//!
//! "Elucidating the Design Space of Diffusion-Based Generative Models" (<https://arxiv.org/abs/2206.00364>), table 1 and
//! equation 5: samples are `x = x0 + σ ε`, the model is told `ln σ / 4`, sees `x / √(σ² + σ_data²)` and answers `F`:
//!
//! ```text
//! x0 = c_skip x + c_out F,   c_skip = σ_data² / (σ² + σ_data²),   c_out = ± σ σ_data / √(σ² + σ_data²)
//! ```
//!
//! `c_out` is negative if `F` is called a velocity.

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use crate::sigmas::{SigmaCurve, SigmaRange, karras};
use crate::tensor::{cast, combine, widen};
use crate::{PredictionType, SchedulerError};

/// The curve that the noise levels of an EDM model follow (the key `sigma_schedule`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EDMSigmaSchedule {
    /// `σ^(1/ρ)` is spaced evenly.
    Karras,
    /// `ln σ` is spaced evenly.
    Exponential,
}

/// The options that EDM samplers share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EDM {
    pub class: &'static str,
    pub sigma_min: f64,
    pub sigma_max: f64,
    pub sigma_data: f64,
    pub sigma_schedule: EDMSigmaSchedule,
    pub num_train_timesteps: usize,
    pub prediction_type: PredictionType,
    pub rho: f64,
}

impl EDM {
    /// Refuses options without finite levels.
    pub fn check(&self) -> Result<(), SchedulerError> {
        for (key, value) in [
            ("sigma_min", self.sigma_min),
            ("sigma_max", self.sigma_max),
            ("sigma_data", self.sigma_data),
            ("rho", self.rho),
        ] {
            // Their squares are f32.
            if !(1e-18..=1e18).contains(&value) {
                return Err(SchedulerError::Value {
                    class: self.class,
                    key,
                    value: value.to_string(),
                    expected: "expected a number from 1e-18 to 1e18".into(),
                });
            }
        }
        let supported = &[PredictionType::Epsilon, PredictionType::VPrediction];
        crate::config::require(
            self.class,
            "prediction_type",
            &self.prediction_type,
            supported,
        )
    }

    /// The levels of a run, highest first.
    pub fn levels(&self, steps: usize) -> Result<Vec<f32>, SchedulerError> {
        if !(1..=self.num_train_timesteps).contains(&steps) {
            let supported = format!("1 to {} (`num_train_timesteps`)", self.num_train_timesteps);
            return Err(SchedulerError::Steps {
                class: self.class,
                steps,
                supported,
            });
        }
        let range = SigmaRange {
            min: self.sigma_min,
            max: self.sigma_max,
        };
        let levels = match self.sigma_schedule {
            EDMSigmaSchedule::Karras => karras(range, self.rho, steps),
            // The reference's quirk: a run of one step is at the lowest level.
            EDMSigmaSchedule::Exponential if steps == 1 => vec![range.min],
            EDMSigmaSchedule::Exponential => SigmaCurve::Exponential.levels(range, steps),
        };
        let levels: Vec<f32> = levels.into_iter().map(|sigma| sigma as f32).collect();
        match levels.iter().all(|sigma| *sigma > 0.0 && sigma.is_finite()) {
            true => Ok(levels),
            false => Err(SchedulerError::Clash {
                class: self.class,
                keys: format!(
                    "`sigma_min` `{}`, `sigma_max` `{}` and `rho` `{}`",
                    self.sigma_min, self.sigma_max, self.rho
                ),
                advice: "the sigmas between them cannot be told from 0".into(),
            }),
        }
    }

    /// What the model is told at a level.
    pub fn timestep(sigma: f32) -> f64 {
        f64::from(0.25 * sigma.ln())
    }

    /// The standard deviation of the noise that a run starts from.
    pub fn init_noise_sigma(&self) -> f64 {
        (self.sigma_max * self.sigma_max + 1.0).sqrt()
    }

    /// `√(σ² + σ_data²)`
    fn deviation(&self, sigma: f32) -> f32 {
        let data = self.sigma_data as f32;
        (sigma * sigma + data * data).sqrt()
    }

    /// The sample as the model sees it, `[batch, channels, height, width]`.
    pub fn seen<B: Backend>(&self, sample: Tensor<B, 4>, sigma: f32) -> Tensor<B, 4> {
        let dtype = sample.dtype();
        cast(widen(sample).div_scalar(self.deviation(sigma)), dtype)
    }

    /// `x0` of a sample and the model's answer, both `[batch, channels, height, width]`.
    pub fn denoised<B: Backend>(
        &self,
        sample: Tensor<B, 4>,
        output: Tensor<B, 4>,
        sigma: f32,
    ) -> Tensor<B, 4> {
        let (data, deviation) = (self.sigma_data as f32, self.deviation(sigma));
        let c_out = match self.prediction_type {
            PredictionType::VPrediction => -sigma * data / deviation,
            PredictionType::Epsilon | PredictionType::Sample => sigma * data / deviation,
        };
        combine([
            (data * data / (deviation * deviation), sample),
            (c_out, output),
        ])
    }
}
