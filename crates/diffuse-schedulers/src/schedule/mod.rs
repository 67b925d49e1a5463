//! The schedule of a run: its timesteps, their sigmas, and the step index.

pub(crate) mod flow;
pub(crate) mod noise_schedule;
pub(crate) mod sigma_grid;
pub(crate) mod sigmas;
pub(crate) mod spacing;

use crate::SchedulerError;
use crate::step::alpha_sigma::AlphaSigma;
use noise_schedule::NoiseSchedule;

/// The timesteps of a run, and the sigmas of each and of the result.
#[derive(Clone, Debug, Default)]
pub struct Schedule {
    /// The requested number of steps.
    pub steps: usize,
    /// The timestep of each model evaluation.
    pub timesteps: Vec<f64>,
    /// The sigma of each timestep, then that of the result; empty for samplers without sigmas.
    pub sigmas: Vec<f32>,
    /// The sigma of the model input at each evaluation, if it differs from `sigmas`.
    pub model_sigmas: Option<Vec<f32>>,
}

impl Schedule {
    /// A schedule with one model evaluation per step.
    pub fn new(timesteps: Vec<f64>, sigmas: Vec<f32>) -> Self {
        Self {
            steps: timesteps.len(),
            timesteps,
            sigmas,
            model_sigmas: None,
        }
    }

    /// The sigma of the model input at an evaluation.
    pub fn model_sigma(&self, index: usize) -> f32 {
        self.model_sigmas.as_ref().unwrap_or(&self.sigmas)[index]
    }

    /// The largest sigma.
    pub fn max_sigma(&self) -> f32 {
        self.sigmas.iter().copied().fold(0.0, f32::max)
    }

    /// The index of a timestep: of the first timestep, its first index; of another one that occurs
    /// twice, the second index, as in Diffusers, so that a run that begins inside the schedule
    /// skips no sigma.
    pub fn index_of(&self, timestep: f64) -> Result<usize, SchedulerError> {
        if self.timesteps.is_empty() {
            return Err(SchedulerError::NoTimesteps);
        }
        if self.timesteps[0] == timestep {
            return Ok(0);
        }
        let mut found = (0..self.timesteps.len()).filter(|&i| self.timesteps[i] == timestep);
        let first = found
            .next()
            .ok_or(SchedulerError::NotInSchedule { timestep })?;
        Ok(found.next().unwrap_or(first))
    }

    /// An error if a number of the schedule is not finite.
    pub fn check(&self, class: &'static str) -> Result<(), SchedulerError> {
        let sigmas = self.sigmas.iter().chain(self.model_sigmas.iter().flatten());
        match sigmas.copied().all(f32::is_finite) && self.timesteps.iter().all(|t| t.is_finite()) {
            true => Ok(()),
            false => Err(SchedulerError::clash(
                class,
                format!("these options and {} steps", self.steps),
                "a timestep or a sigma of the run is not finite",
            )),
        }
    }
}

/// The position of a step in the run.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The index of the model evaluation among the timesteps.
    pub index: usize,
    /// The schedule of the run.
    pub schedule: &'a Schedule,
    /// The noise schedule of the model.
    pub noise_schedule: &'a NoiseSchedule,
}

impl Place<'_> {
    /// The sigma of the sample.
    pub fn sigma(&self) -> f32 {
        self.schedule.sigmas[self.index]
    }

    /// The sigma of the sample after the step.
    pub fn next_sigma(&self) -> f32 {
        self.schedule.sigmas[self.index + 1]
    }

    /// The next timestep, unless this is the last.
    pub fn next_timestep(&self) -> Option<f64> {
        self.schedule.timesteps.get(self.index + 1).copied()
    }

    /// `⌊T / n⌋`: the stride of DDIM and PNDM, for `T` training timesteps.
    pub fn stride(&self, num_train_timesteps: usize) -> f64 {
        (num_train_timesteps / self.schedule.steps) as f64
    }

    /// `α` and `σ` of the sample, for variance-preserving samplers on a sigma grid.
    pub fn alpha_sigma(&self) -> AlphaSigma {
        AlphaSigma::of_ratio(self.sigma())
    }
}
