//! DPM2 with noise in each step.
//!
//! k-diffusion's `sample_dpm_2_ancestral` (<https://github.com/crowsonkb/k-diffusion>): the midpoint method of `kdpm2.rs`
//! in ancestral steps. From the level `σ` to the next one `σ'`, with `σ_down` and `σ_up` of `ancestral.rs`, by way of
//! `σ_mid = √(σ σ_down)`:
//!
//! ```text
//! d     = (x - x0) / σ,              x_mid = x + (σ_mid - σ) d
//! d_mid = (x_mid - x0_mid) / σ_mid,  x'    = x + (σ_down - σ) d_mid + σ_up z
//! ```
//!
//! The last step takes one call and adds no noise.

use burn::prelude::*;

use crate::ancestral::Ancestral;
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
    /// Options of [`KDPM2AncestralDiscreteScheduler`].
    pub struct KDPM2AncestralDiscreteConfig for "KDPM2AncestralDiscreteScheduler" [
        noise(0.00085, 0.012, Linear), sigmas, spacing(Linspace)
    ] {}
}

const CLASS: &str = KDPM2AncestralDiscreteConfig::CLASS;

/// The midpoint method in `ln σ` with noise in each step: two model calls a step.
#[derive(Debug)]
pub struct KDPM2AncestralDiscreteScheduler<B: Backend> {
    resolved: Resolved<KDPM2AncestralDiscreteConfig>,
    noise_schedule: NoiseSchedule,
    ladder: Ladder,
    /// Between the two calls: the sample that the step starts from.
    start: Option<Tensor<B, 4>>,
}

impl<B: Backend> KDPM2AncestralDiscreteScheduler<B> {
    pub(crate) fn build(
        resolved: Resolved<KDPM2AncestralDiscreteConfig>,
    ) -> Result<Self, SchedulerError> {
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

impl<B: Backend> Scheduler<B> for KDPM2AncestralDiscreteScheduler<B> {
    ladder_methods!(of_level);
    noise_level_methods!();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: true,
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
        Ancestral::check(CLASS, &sigmas, f32::EPSILON)?;
        let mid = |pair: &[f32]| match Ancestral::between(pair[0], pair[1]).down {
            0.0 => 0.0,
            down => between_logs(pair[0], down),
        };
        let mids: Vec<f32> = sigmas.windows(2).map(mid).collect();
        self.ladder = interleave(&levels, &mids, &LogSigmas::new(&table));
        self.start = None;
        Ok(())
    }

    fn order(&self) -> usize {
        2
    }

    fn advance(&mut self, mut step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
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
                let Ancestral { down, up } = Ancestral::between(from, to);
                let noise = step.noise.like(&original)?;
                along(start, down - from, step.sample, original.clone(), sigma)
                    + noise.mul_scalar(up)
            }
        };
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
