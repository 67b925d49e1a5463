//! Heun's method.
//!
//! "Elucidating the Design Space of Diffusion-Based Generative Models" (<https://arxiv.org/abs/2206.00364>), algorithm 1.
//! From the level `σ` to the next one `σ'` the model is called at both ends; the second call gives its name to the
//! second entry of each timestep in the schedule. The last step, to level 0, takes one call.
//!
//! ```text
//! d  = (x - x0) / σ,    x' = x + (σ' - σ) d
//! d' = (x' - x0') / σ', x' = x + (σ' - σ) (d + d') / 2
//! ```

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::ladder::{Ladder, ladder_methods, noise_level_methods};
use crate::levels::Levels;
use crate::mixture::Mixture;
use crate::prediction::{Bound, Prediction, noise_between};
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, Scheduler, SchedulerError, Step, StepOutput,
    TimestepRequest,
};

scheduler_config! {
    /// Options of [`HeunDiscreteScheduler`].
    pub struct HeunDiscreteConfig for "HeunDiscreteScheduler" [
        noise(0.00085, 0.012, Linear), sigmas, clip(false), spacing(Linspace)
    ] {}
}

const CLASS: &str = HeunDiscreteConfig::CLASS;

/// Heun's method: two model calls a step, of order 2.
#[derive(Debug)]
pub struct HeunDiscreteScheduler<B: Backend> {
    resolved: Resolved<HeunDiscreteConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    ladder: Ladder,
    /// Between the two calls: the sample that the step starts from, and the derivative there.
    start: Option<(Tensor<B, 4>, Tensor<B, 4>)>,
}

impl<B: Backend> HeunDiscreteScheduler<B> {
    pub(crate) fn build(resolved: Resolved<HeunDiscreteConfig>) -> Result<Self, SchedulerError> {
        use BetaSchedule::*;
        let options = &resolved.options;
        let supported = &[Linear, ScaledLinear, SquaredcosCapV2, Exp];
        let noise_schedule = options.noise_schedule(supported, false)?;
        options.sigma_curve()?;
        let bound = options.clipping()?;
        Ok(Self {
            noise_schedule,
            bound,
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

impl<B: Backend> Scheduler<B> for HeunDiscreteScheduler<B> {
    ladder_methods!(of_level);
    noise_level_methods!();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let spacing = options.spacing();
        let timesteps = match request {
            TimestepRequest::Timesteps(timesteps) => {
                spacing.check_list(timesteps, options.sigma_curve()?.is_some())?;
                timesteps.clone()
            }
            other => spacing.visited_unrounded(other.steps(CLASS)?)?,
        };
        let table = self.noise_schedule.sigmas();
        let levels = Levels::at(timesteps, &table).bent(options.sigma_curve()?, &table);
        let levels = levels.map_timesteps(|timestep| f64::from(timestep as f32));
        let sigmas = levels.sigmas_down_to(0.0);
        self.ladder = Ladder::new(
            twice_within(&levels.timesteps, levels.timesteps.len()),
            twice_within(&sigmas, levels.timesteps.len()),
        );
        self.start = None;
        Ok(())
    }

    fn order(&self) -> usize {
        2
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let sigma = self.ladder.sigmas()[rung];
        let prediction = Prediction {
            kind: self.resolved.options.prediction_type,
            output: step.model_output,
            sample: step.sample.clone(),
        };
        let original = self.bound.apply(prediction.denoised(sigma));
        let derivative = noise_between(
            prediction.sample,
            original.clone(),
            Mixture::of_level(sigma),
        );
        let prev_sample = match self.start.take() {
            None => {
                let dt = self.ladder.sigmas()[rung + 1] - sigma;
                self.start = Some((step.sample.clone(), derivative.clone()));
                combine([(1.0, step.sample), (dt, derivative)])
            }
            Some((start, derivative_there)) => {
                let dt = sigma - self.ladder.sigmas()[rung - 1];
                combine([
                    (1.0, start),
                    (0.5 * dt, derivative_there),
                    (0.5 * dt, derivative),
                ])
            }
        };
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}

/// The entries with all but the first of the first `steps` twice.
pub(crate) fn twice_within<T: Copy>(entries: &[T], steps: usize) -> Vec<T> {
    let count = |place| if (1..steps).contains(&place) { 2 } else { 1 };
    entries
        .iter()
        .enumerate()
        .flat_map(|(place, &entry)| std::iter::repeat_n(entry, count(place)))
        .collect()
}
