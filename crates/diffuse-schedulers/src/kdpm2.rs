//! DPM2: the midpoint method in `ln σ`.
//!
//! k-diffusion's `sample_dpm_2` (<https://github.com/crowsonkb/k-diffusion>), after DPM-Solver-2
//! (<https://arxiv.org/abs/2206.00927>) and algorithm 2 of <https://arxiv.org/abs/2206.00364>. From the level `σ` to the
//! next one `σ'`, by way of `σ_mid = √(σ σ')`; the last step, to level 0, takes one call.
//!
//! ```text
//! d     = (x - x0) / σ,              x_mid = x + (σ_mid - σ) d
//! d_mid = (x_mid - x0_mid) / σ_mid,  x'    = x + (σ' - σ) d_mid
//! ```

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, require, scheduler_config};
use crate::ladder::{Ladder, ladder_methods, noise_level_methods};
use crate::levels::Levels;
use crate::midpoint::{along, between_logs, interleave};
use crate::prediction::Prediction;
use crate::sigmas::LogSigmas;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, PredictionType, Scheduler, SchedulerError, Step,
    StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`KDPM2DiscreteScheduler`].
    pub struct KDPM2DiscreteConfig for "KDPM2DiscreteScheduler" [
        noise(0.00085, 0.012, Linear), sigmas, spacing(Linspace)
    ] {}
}

const CLASS: &str = KDPM2DiscreteConfig::CLASS;

/// The midpoint method in `ln σ`: two model calls a step, of order 2.
#[derive(Debug)]
pub struct KDPM2DiscreteScheduler<B: Backend> {
    resolved: Resolved<KDPM2DiscreteConfig>,
    noise_schedule: NoiseSchedule,
    ladder: Ladder,
    /// Between the two calls: the sample that the step starts from.
    start: Option<Tensor<B, 4>>,
}

impl<B: Backend> KDPM2DiscreteScheduler<B> {
    pub(crate) fn build(resolved: Resolved<KDPM2DiscreteConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let supported = &[PredictionType::Epsilon, PredictionType::VPrediction];
        require(
            CLASS,
            "prediction_type",
            &options.prediction_type,
            supported,
        )?;
        let noise_schedule = options.noise_schedule(BetaSchedule::COMMON, false)?;
        options.sigma_curve()?;
        Ok(Self {
            noise_schedule,
            ladder: Ladder::default(),
            start: None,
            resolved,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }
}

impl<B: Backend> Scheduler<B> for KDPM2DiscreteScheduler<B> {
    ladder_methods!(of_level);
    noise_level_methods!();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let timesteps = options.spacing().visited_unrounded(request.steps(CLASS)?)?;
        let table = self.noise_schedule.sigmas();
        let curve = options.sigma_curve()?;
        let levels = Levels::at(timesteps, &table)
            .bent(curve, &table)
            .rounded_if_karras(curve);
        let sigmas = levels.sigmas_down_to(0.0);
        let mids: Vec<f32> = sigmas
            .windows(2)
            .map(|pair| between_logs(pair[1], pair[0]))
            .collect();
        self.ladder = interleave(&levels, &mids, &LogSigmas::new(&table));
        self.start = None;
        Ok(())
    }

    fn order(&self) -> usize {
        2
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let sigma = self.ladder.seen(rung);
        let prediction = Prediction {
            kind: self.resolved.options.prediction_type,
            output: step.model_output,
            sample: step.sample.clone(),
        };
        let original = prediction.denoised(sigma);
        let prev_sample = match self.start.take() {
            None => {
                let dt = self.ladder.seen(rung + 1) - sigma;
                self.start = Some(step.sample.clone());
                along(
                    step.sample.clone(),
                    dt,
                    step.sample,
                    original.clone(),
                    sigma,
                )
            }
            Some(start) => {
                let [from, to] = [rung - 1, rung].map(|rung| self.ladder.sigmas()[rung]);
                along(start, to - from, step.sample, original.clone(), sigma)
            }
        };
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
