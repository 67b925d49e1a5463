//! The timesteps of a run with the sigma of each.
//!
//! Samplers choose timesteps and look their sigmas up, or take the sigmas of a sigma schedule and
//! find the timesteps that belong to them. Either way, the sigma of the result comes last.

use super::Schedule;
use super::sigmas::{LogSigmas, SigmaRange, SigmaSchedule, sigma_at};
use super::spacing::Spacing;
use crate::SchedulerError;

/// Timesteps and sigmas, noisiest first.
#[derive(Clone, Debug)]
pub(crate) struct SigmaGrid {
    pub timesteps: Vec<f64>,
    pub sigmas: Vec<f64>,
}

impl SigmaGrid {
    /// The sigmas of given timesteps, from a table of the sigma of each training timestep.
    pub fn at(timesteps: Vec<f64>, table: &[f32]) -> Self {
        let sigmas = timesteps.iter().map(|&timestep| sigma_at(table, timestep));
        let sigmas = sigmas.collect();
        Self { timesteps, sigmas }
    }

    /// The sigmas of a sigma schedule, with timesteps that need not be whole.
    pub fn along(schedule: SigmaSchedule, range: SigmaRange, steps: usize, table: &[f32]) -> Self {
        let sigmas = schedule.sigmas(range, steps);
        let logs = LogSigmas::new(table);
        let timesteps = sigmas.iter().map(|&sigma| logs.timestep(sigma)).collect();
        Self { timesteps, sigmas }
    }

    /// The same number of sigmas between the same ends by a sigma schedule, if there is one.
    pub fn respaced(self, schedule: Option<SigmaSchedule>, table: &[f32]) -> Self {
        match schedule {
            None => self,
            Some(schedule) => Self::along(schedule, self.range(), self.sigmas.len(), table),
        }
    }

    /// The grid of a solver that steps between timesteps: the upper ends of the intervals, or a
    /// sigma schedule in a range, with whole timesteps.
    pub fn between(
        spacing: Spacing,
        steps: usize,
        schedule: Option<SigmaSchedule>,
        range: SigmaRange,
        table: &[f32],
    ) -> Result<Self, SchedulerError> {
        Ok(match schedule {
            None => Self::at(spacing.interval_tops(steps)?, table),
            Some(schedule) => {
                spacing.check(steps)?;
                let grid = Self::along(schedule, range, steps, table);
                grid.map_timesteps(schedule.whole())
            }
        })
    }

    /// The smallest and the largest sigma.
    pub fn range(&self) -> SigmaRange {
        SigmaRange {
            min: self.sigmas[self.sigmas.len() - 1],
            max: self.sigmas[0],
        }
    }

    /// Changes each timestep.
    pub fn map_timesteps(mut self, change: impl Fn(f64) -> f64) -> Self {
        for timestep in &mut self.timesteps {
            *timestep = change(*timestep);
        }
        self
    }

    /// The sigma of the result for solvers without `final_sigmas_type`. Diffusers' quirk: the last
    /// one of a sigma schedule occurs twice.
    pub fn final_sigma(&self, schedule: Option<SigmaSchedule>, table: &[f32]) -> f32 {
        match schedule {
            None => table[0],
            Some(_) => self.range().min as f32,
        }
    }

    /// The sigmas in f32, with that of the result at the end.
    pub fn sigmas_to(&self, last: f32) -> Vec<f32> {
        let sigmas = self.sigmas.iter().map(|&sigma| sigma as f32);
        sigmas.chain([last]).collect()
    }

    /// The schedule of a run along this grid to the sigma of the result.
    pub fn to(self, last: f32) -> Schedule {
        let sigmas = self.sigmas_to(last);
        Schedule::new(self.timesteps, sigmas)
    }
}
