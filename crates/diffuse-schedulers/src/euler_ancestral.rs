//! Euler's method with noise in each step.
//!
//! k-diffusion's `sample_euler_ancestral` (<https://github.com/crowsonkb/k-diffusion>): Euler's method of
//! <https://arxiv.org/abs/2206.00364>, algorithm 2, in ancestral steps. From the level `σ` to the next one `σ'`, with
//! `σ_down` and `σ_up` of `ancestral.rs`:
//!
//! ```text
//! x' = (σ_down / σ) x + (1 - σ_down / σ) x0 + σ_up z
//! ```

use std::marker::PhantomData;

use burn::prelude::*;

use crate::ancestral::Ancestral;
use crate::config::{ClassConfig, Resolved, require, scheduler_config};
use crate::ladder::{Ladder, ladder_methods, noise_level_methods};
use crate::levels::Levels;
use crate::prediction::Prediction;
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, PredictionType, Scheduler, SchedulerError, Step,
    StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`EulerAncestralDiscreteScheduler`].
    pub struct EulerAncestralDiscreteConfig for "EulerAncestralDiscreteScheduler" [
        noise(0.0001, 0.02, Linear), spacing(Linspace), zero_snr
    ] {}
}

const CLASS: &str = EulerAncestralDiscreteConfig::CLASS;

/// Euler's method with noise in each step: the picture never settles, however many steps are taken.
#[derive(Debug)]
pub struct EulerAncestralDiscreteScheduler<B: Backend> {
    resolved: Resolved<EulerAncestralDiscreteConfig>,
    noise_schedule: NoiseSchedule,
    ladder: Ladder,
    backend: PhantomData<B>,
}

impl<B: Backend> EulerAncestralDiscreteScheduler<B> {
    pub(crate) fn build(
        resolved: Resolved<EulerAncestralDiscreteConfig>,
    ) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let supported = &[PredictionType::Epsilon, PredictionType::VPrediction];
        require(
            CLASS,
            "prediction_type",
            &options.prediction_type,
            supported,
        )?;
        let zero_snr = options.rescale_betas_zero_snr;
        let mut noise_schedule = options.noise_schedule(BetaSchedule::COMMON, zero_snr)?;
        if zero_snr {
            noise_schedule = noise_schedule.with_finite_last_sigma();
        }
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

impl<B: Backend> Scheduler<B> for EulerAncestralDiscreteScheduler<B> {
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
        let spacing = self.resolved.options.spacing();
        let timesteps = spacing.visited_unrounded(request.steps(CLASS)?)?;
        let levels = Levels::at(timesteps, &self.noise_schedule.sigmas());
        Ancestral::check(CLASS, &levels.sigmas_down_to(0.0), 0.0)?;
        self.ladder = levels.down_to(0.0);
        Ok(())
    }

    fn advance(&mut self, mut step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let [sigma, next] = [rung, rung + 1].map(|rung| self.ladder.sigmas()[rung]);
        let Ancestral { down, up } = Ancestral::between(sigma, next);
        let prediction = Prediction {
            kind: self.resolved.options.prediction_type,
            output: step.model_output,
            sample: step.sample,
        };
        let original = prediction.denoised(sigma);
        let noise = step.noise.like(&original)?;
        let prev_sample = combine([
            (down / sigma, prediction.sample),
            (1.0 - down / sigma, original.clone()),
            (up, noise),
        ]);
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
