//! A run down a ladder of noise levels, for samplers that count their steps.
//!
//! Rung `i` has a timestep for the model and a noise level; the last level, without a timestep, is that of the result.
//! A run begins where [`Ladder::begin_at`] says, or at the first timestep that is asked for, and goes one rung a step.

use crate::SchedulerError;

/// Timesteps, noise levels, and the place among them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ladder {
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    begin: Option<usize>,
    rung: Option<usize>,
}

impl Ladder {
    /// A ladder to be run from the top.
    pub fn new(timesteps: Vec<f64>, sigmas: Vec<f32>) -> Self {
        Self {
            timesteps,
            sigmas,
            begin: None,
            rung: None,
        }
    }

    pub fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The largest noise level.
    pub fn max_sigma(&self) -> f32 {
        self.sigmas.iter().copied().fold(0.0, f32::max)
    }

    /// Lets the next run begin at a rung.
    pub fn begin_at(&mut self, rung: usize) {
        self.begin = Some(rung);
    }

    /// The rung of the current step, which begins the run if it has not begun.
    pub fn rung(&mut self, timestep: f64) -> Result<usize, SchedulerError> {
        let rung = match self.rung.or(self.begin) {
            Some(rung) => rung,
            None => self.find(timestep)?,
        };
        self.rung = Some(rung);
        match (self.timesteps.len(), rung) {
            (0, _) => Err(SchedulerError::NoTimesteps),
            (steps, rung) if rung >= steps => Err(SchedulerError::Finished { steps }),
            _ => Ok(rung),
        }
    }

    /// Ends the current step.
    pub fn descend(&mut self) {
        self.rung = self.rung.map(|rung| rung + 1);
    }

    /// The noise levels at which images are noised: those of the timesteps, or of the run's current rung if the run
    /// was told where to begin.
    pub fn noising_levels(&self, timesteps: &[f64]) -> Result<Vec<f32>, SchedulerError> {
        let here = self.begin.map(|begin| self.rung.unwrap_or(begin));
        let rungs = timesteps
            .iter()
            .map(|&timestep| here.map_or_else(|| self.find(timestep), Ok));
        rungs
            .map(|rung| {
                let steps = self.timesteps.len();
                self.sigmas
                    .get(rung?)
                    .copied()
                    .ok_or(SchedulerError::Finished { steps })
            })
            .collect()
    }

    /// The rung of a timestep; of the second one if it occurs twice, so that a run that begins inside the schedule
    /// skips no level.
    pub fn find(&self, timestep: f64) -> Result<usize, SchedulerError> {
        if self.timesteps.is_empty() {
            return Err(SchedulerError::NoTimesteps);
        }
        let mut found = (0..self.timesteps.len()).filter(|&rung| self.timesteps[rung] == timestep);
        let first = found
            .next()
            .ok_or(SchedulerError::NotInSchedule { timestep })?;
        Ok(found.next().unwrap_or(first))
    }
}
