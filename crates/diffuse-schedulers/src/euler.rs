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
use crate::ladder::{Ladder, ladder_methods, noise_level_methods};
use crate::levels::Levels;
use crate::mixture;
use crate::noise_schedule::linspace;
use crate::prediction::Prediction;
use crate::sigmas::LogSigmas;
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, FinalSigmasType, NoiseSchedule, PredictionType, Scheduler,
    SchedulerError, Step, StepOutput, TimestepRequest,
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

const CLASS: &str = EulerDiscreteConfig::CLASS;

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
        let mut levels = Levels::at(timesteps, &table);
        let steps = levels.sigmas.len();
        if options.interpolation_type == InterpolationType::LogLinear {
            // The reference's quirk: one level more than there are timesteps.
            let ends = [table[table.len() - 1], table[0]].map(|sigma| f64::from(sigma.ln()));
            let logs = linspace(ends[0], ends[1], steps + 1);
            levels.sigmas = logs.into_iter().map(|log| f64::from(log.exp())).collect();
        }
        if let Some(curve) = options.sigma_curve()? {
            let range = levels
                .range()
                .with(CLASS, options.sigma_min, options.sigma_max)?;
            levels = Levels::along(curve, range, steps, &table);
        }
        let last = match options.final_sigmas_type {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => table[0],
        };
        let sigmas = levels.sigmas_down_to(last);
        Ok((levels.timesteps, sigmas))
    }

    /// Refuses sigmas that do not lead from noise to image.
    fn check_sigmas(&self, sigmas: &[f64]) -> Result<(), SchedulerError> {
        let steps = &sigmas[..sigmas.len().saturating_sub(1)];
        let usable = |sigma: &f64| *sigma > 0.0 && (*sigma as f32).is_finite();
        let last = sigmas.last().copied().unwrap_or(0.0);
        let reason = if steps.is_empty() {
            "there must be one for each step and one for the result"
        } else if !steps.iter().all(usable) || !(last >= 0.0 && last.is_finite()) {
            "each must be a number greater than 0, the last may be 0"
        } else if sigmas
            .windows(2)
            .any(|pair| pair[0] as f32 <= pair[1] as f32)
        {
            "they must be in descending order"
        } else {
            return Ok(());
        };
        Err(SchedulerError::Schedule {
            class: CLASS,
            what: "sigmas",
            reason: reason.into(),
        })
    }
}

/// Goes back up from a level with new noise, where `s_churn` and its bounds say so: changes the sample of the step and
/// gives the level `σ̂`.
pub(crate) fn churn<B: Backend>(
    step: &mut Step<'_, B>,
    sigma: f32,
    steps: usize,
) -> Result<f32, SchedulerError> {
    let options = step.options;
    let within = (options.s_tmin..=options.s_tmax).contains(&f64::from(sigma));
    let gamma = match within {
        true => (options.s_churn / steps as f64).min(2f64.sqrt() - 1.0) as f32,
        false => 0.0,
    };
    let sigma_hat = sigma * (gamma + 1.0);
    if gamma > 0.0 {
        let back = (sigma_hat * sigma_hat - sigma * sigma).sqrt();
        let noise = step.noise.like(&step.sample)?;
        step.sample = combine([
            (1.0, step.sample.clone()),
            (options.s_noise as f32 * back, noise),
        ]);
    }
    Ok(sigma_hat)
}

impl<B: Backend> Scheduler<B> for EulerDiscreteScheduler<B> {
    ladder_methods!(of_level);
    noise_level_methods!();

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
                let options = &self.resolved.options;
                let chosen = options.sigma_curve()?.is_some() || self.is_continuous();
                spacing.check_list(timesteps, chosen)?;
                self.levels_of_timesteps(timesteps.clone())?
            }
            TimestepRequest::Sigmas(sigmas) => {
                self.check_sigmas(sigmas)?;
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

    fn advance(&mut self, mut step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let [sigma, next] = [rung, rung + 1].map(|rung| self.ladder.sigmas()[rung]);
        let sigma_hat = churn(&mut step, sigma, self.ladder.sigmas().len() - 1)?;
        let sample = step.sample;
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
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
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
