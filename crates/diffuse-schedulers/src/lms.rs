//! LMS: a linear multistep method.
//!
//! The method of Adams and Bashforth on noise levels that need not be evenly spaced, as k-diffusion's `sample_lms`
//! (<https://github.com/crowsonkb/k-diffusion>) has it. With the latest derivatives `d_i` at levels `σ_i` and the Lagrange
//! polynomials `l_i` through these levels, from `σ` to the next level `σ'`:
//!
//! ```text
//! d  = (x - x0) / σ
//! x' = x + Σ c_i d_i,   c_i = ∫ l_i(σ) dσ from σ to σ'
//! ```

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::ladder::{Ladder, ladder_methods, noise_level_methods};
use crate::lagrange::integrals;
use crate::levels::Levels;
use crate::mixture::Mixture;
use crate::prediction::{Prediction, noise_between};
use crate::weights::{Weights, remember};
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, Scheduler, SchedulerError, Step, StepOutput,
    TimestepRequest,
};

scheduler_config! {
    /// Options of [`LMSDiscreteScheduler`].
    pub struct LMSDiscreteConfig for "LMSDiscreteScheduler" [
        noise(0.0001, 0.02, Linear), sigmas, spacing(Linspace)
    ] {}
}

const CLASS: &str = LMSDiscreteConfig::CLASS;

/// A linear multistep method: the speed of Euler's, of order 4.
#[derive(Debug)]
pub struct LMSDiscreteScheduler<B: Backend> {
    resolved: Resolved<LMSDiscreteConfig>,
    noise_schedule: NoiseSchedule,
    ladder: Ladder,
    /// The latest derivatives, newest first.
    derivatives: Vec<Tensor<B, 4>>,
}

impl<B: Backend> LMSDiscreteScheduler<B> {
    pub(crate) fn build(resolved: Resolved<LMSDiscreteConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let noise_schedule = options.noise_schedule(BetaSchedule::COMMON, false)?;
        options.sigma_curve()?;
        let (ladder, derivatives) = (Ladder::default(), Vec::new());
        Ok(Self {
            noise_schedule,
            ladder,
            derivatives,
            resolved,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// The weights of a step from a rung.
    fn weights(&self, rung: usize, order: usize) -> Weights {
        // The reference's quirk: a run that begins inside the schedule has the weights of its full order at once.
        let oldest = (rung + 1).saturating_sub(order);
        let sigmas: Vec<f64> = self.ladder.sigmas()[oldest..=rung + 1]
            .iter()
            .rev()
            .map(|&sigma| sigma.into())
            .collect();
        let outputs = integrals(&sigmas[1..], sigmas[1], sigmas[0]);
        let outputs = outputs.into_iter().map(|weight| weight as f32).collect();
        Weights {
            sample: 1.0,
            outputs,
            extra: None,
        }
    }
}

impl<B: Backend> Scheduler<B> for LMSDiscreteScheduler<B> {
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
        let levels = Levels::at(timesteps, &table).bent(options.sigma_curve()?, &table);
        self.ladder = levels
            .map_timesteps(|timestep| f64::from(timestep as f32))
            .down_to(0.0);
        self.derivatives.clear();
        Ok(())
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let order = step.options.order;
        if order == 0 {
            let expected = "a number of at least 1";
            return Err(SchedulerError::StepOption {
                name: "order",
                value: 0.0,
                expected,
            });
        }
        let rung = self.ladder.rung(step.timestep)?;
        let sigma = self.ladder.sigmas()[rung];
        let prediction = Prediction {
            kind: self.resolved.options.prediction_type,
            output: step.model_output,
            sample: step.sample.clone(),
        };
        let original = prediction.denoised(sigma);
        let derivative = noise_between(
            prediction.sample,
            original.clone(),
            Mixture::of_level(sigma),
        );
        remember(&mut self.derivatives, derivative, order);
        let prev_sample = self
            .weights(rung, order)
            .apply(step.sample, &self.derivatives, None);
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
