//! Euler's method.
//!
//! "Elucidating the Design Space of Diffusion-Based Generative Models" (<https://arxiv.org/abs/2206.00364>),
//! algorithm 2 without its second-order correction. Samples are `x = x0 + σ ε`; the model sees `x / √(σ² + 1)`. From
//! the level `σ` to the next one `σ'`:
//!
//! ```text
//! σ̂  = σ (1 + γ),   x̂ = x + √(σ̂² - σ²) s_noise z          only with s_churn
//! x' = x̂ + (σ' - σ̂) (x̂ - x0) / σ̂  =  (σ' / σ̂) x̂ + (1 - σ' / σ̂) x0
//! ```

use std::marker::PhantomData;

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::ladder::Ladder;
use crate::mixture::{self, Mixture};
use crate::noise_schedule::linspace;
use crate::prediction::Prediction;
use crate::sigmas::{LogSigmas, SigmaRange, sigma_at};
use crate::tensor::{cast, combine, widen};
use crate::{
    BetaSchedule, Capabilities, FinalSigmasType, NoiseSchedule, PredictionType, Scheduler,
    SchedulerConfig, SchedulerError, Step, StepOutput, TimestepRequest, TimestepSpacing,
};

/// How noise levels between tabulated ones are found (the key `interpolation_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InterpolationType {
    /// Linearly in the timestep.
    Linear,
    /// Not by timestep at all: levels are spaced evenly in `ln σ` over the whole schedule.
    LogLinear,
}

/// What the model is told (the key `timestep_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepType {
    /// The training timestep.
    Discrete,
    /// `ln σ / 4`, if the model predicts a velocity.
    Continuous,
}

scheduler_config! {
    /// Options of [`EulerDiscreteScheduler`].
    pub struct EulerDiscreteConfig for "EulerDiscreteScheduler" [
        noise(0.0001, 0.02, Linear), sigmas, spacing(Linspace), zero_snr
    ] {
        /// How noise levels between tabulated ones are found.
        pub interpolation_type: InterpolationType = InterpolationType::Linear,
        /// The smallest level of a sigma curve, instead of the schedule's.
        pub sigma_min: Option<f64> = None,
        /// The largest level of a sigma curve, instead of the schedule's.
        pub sigma_max: Option<f64> = None,
        /// What the model is told.
        pub timestep_type: TimestepType = TimestepType::Discrete,
        /// The noise level that a run ends at.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
    }
}

/// Euler's method: the plainest solver, and a good one.
#[derive(Debug)]
pub struct EulerDiscreteScheduler<B: Backend> {
    resolved: Resolved<EulerDiscreteConfig>,
    noise_schedule: NoiseSchedule,
    ladder: Ladder,
    backend: PhantomData<B>,
}

impl<B: Backend> EulerDiscreteScheduler<B> {
    pub(crate) fn build(resolved: Resolved<EulerDiscreteConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let zero_snr = options.rescale_betas_zero_snr;
        let mut noise_schedule = options.noise_schedule(BetaSchedule::COMMON, zero_snr)?;
        if zero_snr {
            noise_schedule = noise_schedule.with_finite_last_sigma();
        }
        options.sigma_curve()?;
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

    fn is_continuous(&self) -> bool {
        let options = &self.resolved.options;
        options.timestep_type == TimestepType::Continuous
            && options.prediction_type == PredictionType::VPrediction
    }

    /// Timesteps and noise levels of given or evenly placed timesteps, or of a curve.
    fn levels_of_timesteps(
        &self,
        timesteps: Vec<f64>,
    ) -> Result<(Vec<f64>, Vec<f32>), SchedulerError> {
        let options = &self.resolved.options;
        let table = self.noise_schedule.sigmas();
        let steps = timesteps.len();
        let levels: Vec<f64> = match options.interpolation_type {
            InterpolationType::Linear => timesteps
                .iter()
                .map(|&timestep| sigma_at(&table, timestep))
                .collect(),
            // The reference's quirk: one level more than there are timesteps.
            InterpolationType::LogLinear => {
                let ends = [table[table.len() - 1], table[0]].map(|sigma| f64::from(sigma.ln()));
                linspace(ends[0], ends[1], steps + 1)
                    .into_iter()
                    .map(|log| f64::from(log.exp()))
                    .collect()
            }
        };
        let (timesteps, levels) = match options.sigma_curve()? {
            None => (timesteps, levels),
            Some(curve) => {
                let range = SigmaRange {
                    min: levels[levels.len() - 1],
                    max: levels[0],
                };
                let range = range.with(
                    EulerDiscreteConfig::CLASS,
                    options.sigma_min,
                    options.sigma_max,
                )?;
                let levels = curve.levels(range, steps);
                let logs = LogSigmas::new(&table);
                (
                    levels.iter().map(|&sigma| logs.timestep(sigma)).collect(),
                    levels,
                )
            }
        };
        let last = match options.final_sigmas_type {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => table[0],
        };
        Ok((
            timesteps,
            levels
                .into_iter()
                .map(|sigma| sigma as f32)
                .chain([last])
                .collect(),
        ))
    }

    /// Refuses lists that are no way from noise to image.
    fn check_list(&self, what: &'static str, list: &[f64]) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let train = options.num_train_timesteps as f64;
        let curve = options.sigma_curve()?.is_some() || self.is_continuous();
        let reason = match (what, list) {
            ("timesteps", []) => "there is none",
            ("timesteps", _) if curve => {
                "they are chosen by `use_*_sigmas` or a continuous `timestep_type` already"
            }
            ("timesteps", list) if !list.iter().all(|t| (0.0..train).contains(t)) => {
                "each must be in `0..num_train_timesteps`"
            }
            ("sigmas", [] | [_]) => "there must be one for each step and one for the result",
            ("sigmas", [steps @ .., last])
                if *last < 0.0 || !steps.iter().all(|s| *s > 0.0 && s.is_finite()) =>
            {
                "each must be a number greater than 0, the last may be 0"
            }
            _ => return Ok(()),
        };
        Err(SchedulerError::Schedule {
            class: EulerDiscreteConfig::CLASS,
            what,
            reason: reason.into(),
        })
    }

    /// `γ`: how far to go back up before a step.
    fn churn(&self, step: &Step<'_, B>, sigma: f32) -> f32 {
        let options = step.options;
        let within = (options.s_tmin..=options.s_tmax).contains(&f64::from(sigma));
        let levels = self.ladder.sigmas().len() - 1;
        if within {
            (options.s_churn / levels as f64).min(2f64.sqrt() - 1.0) as f32
        } else {
            0.0
        }
    }
}

impl<B: Backend> Scheduler<B> for EulerDiscreteScheduler<B> {
    fn config(&self) -> &SchedulerConfig {
        &self.resolved.config
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            custom_sigmas: true,
            noise: true,
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let spacing = self.resolved.options.spacing();
        let (timesteps, sigmas) = match request {
            TimestepRequest::Steps(steps) => {
                self.levels_of_timesteps(spacing.visited_unrounded(*steps)?)?
            }
            TimestepRequest::Timesteps(timesteps) => {
                self.check_list("timesteps", timesteps)?;
                self.levels_of_timesteps(timesteps.clone())?
            }
            TimestepRequest::Sigmas(sigmas) => {
                self.check_list("sigmas", sigmas)?;
                let logs = LogSigmas::new(&self.noise_schedule.sigmas());
                let sigmas: Vec<f32> = sigmas.iter().map(|&sigma| sigma as f32).collect();
                let timesteps = sigmas[..sigmas.len() - 1]
                    .iter()
                    .map(|&sigma| logs.timestep_f32(sigma))
                    .collect();
                (timesteps, sigmas)
            }
        };
        let timesteps = match self.is_continuous() {
            true => sigmas[..sigmas.len() - 1]
                .iter()
                .map(|sigma| 0.25 * sigma.ln())
                .collect(),
            false => timesteps
                .iter()
                .map(|&timestep| timestep as f32)
                .collect::<Vec<_>>(),
        };
        self.ladder = Ladder::new(timesteps.into_iter().map(f64::from).collect(), sigmas);
        Ok(())
    }

    fn timesteps(&self) -> &[f64] {
        self.ladder.timesteps()
    }

    fn sigmas(&self) -> Option<&[f32]> {
        Some(self.ladder.sigmas())
    }

    fn init_noise_sigma(&self) -> f64 {
        let max = self.ladder.max_sigma();
        match self.resolved.options.timestep_spacing {
            TimestepSpacing::Leading => (max * max + 1.0).sqrt().into(),
            TimestepSpacing::Linspace | TimestepSpacing::Trailing => max.into(),
        }
    }

    fn set_begin_index(&mut self, begin_index: usize) {
        self.ladder.begin_at(begin_index);
    }

    fn scale_model_input(
        &mut self,
        sample: Tensor<B, 4>,
        timestep: f64,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let rung = self.ladder.rung(timestep)?;
        let sigma = self.ladder.sigmas()[rung];
        let dtype = sample.dtype();
        Ok(cast(
            widen(sample).div_scalar((sigma * sigma + 1.0).sqrt()),
            dtype,
        ))
    }

    fn advance(&mut self, mut step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let [sigma, next] = [rung, rung + 1].map(|rung| self.ladder.sigmas()[rung]);
        let gamma = self.churn(&step, sigma);
        let sigma_hat = sigma * (gamma + 1.0);
        let mut sample = step.sample;
        if gamma > 0.0 {
            let back = (sigma_hat * sigma_hat - sigma * sigma).sqrt();
            let noise = step.noise.like(&sample)?;
            sample = combine([(1.0, sample), (step.options.s_noise as f32 * back, noise)]);
        }
        let kind = self.resolved.options.prediction_type;
        let prediction = Prediction {
            kind,
            output: step.model_output,
            sample: sample.clone(),
        };
        // The reference's quirk: a velocity is read at the level before the noise was added.
        let level = if kind == PredictionType::VPrediction {
            sigma
        } else {
            sigma_hat
        };
        let original = prediction.denoised(level);
        let prev_sample = combine([
            (next / sigma_hat, sample),
            (1.0 - next / sigma_hat, original.clone()),
        ]);
        self.ladder.descend();
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
        let levels = self.ladder.noising_levels(timesteps)?;
        let mixtures: Vec<Mixture> = levels.into_iter().map(Mixture::of_level).collect();
        mixture::add_noise(&mixtures, original, noise)
    }

    /// The reference's quirk: `ᾱ` is read at the *place* of a timestep in the run, not at the timestep.
    fn get_velocity(
        &self,
        sample: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let places: Result<Vec<f64>, _> = timesteps
            .iter()
            .map(|&timestep| self.ladder.find(timestep).map(|place| place as f64))
            .collect();
        mixture::velocity(&self.noise_schedule.mixtures(&places?)?, sample, noise)
    }
}
