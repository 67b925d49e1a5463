//! Which training timesteps are visited, from noise to image.
//!
//! Table 2 of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (<https://arxiv.org/abs/2305.08891>), for
//! `n` steps out of `T`. Samplers that take one step *at* each timestep use [`visited`], those that take one step
//! *between* neighbours use [`interval_tops`], where the lower end of the last interval is the image itself:
//!
//! ```text
//!            visited                      interval_tops
//! linspace   round(linspace(0, T-1, n))   round(linspace(0, T-1, n+1)) without the 0
//! leading    i ⌊T/n⌋ + offset             i ⌊T/(n+1)⌋ + offset without the smallest
//! trailing   round(T - i T/n) - 1         the same
//! ```
//!
//! Rounding is to the nearest whole number, halves to the even one. The reference's trailing spacing, made by adding
//! floats until zero is reached, yields one entry too many (-1) for 62 step counts; here `n` steps are `n` timesteps.

use serde::{Deserialize, Serialize};

use crate::SchedulerError;

/// How timesteps are spread over the training schedule (the key `timestep_spacing`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    /// Evenly, with both ends.
    Linspace,
    /// Multiples of a whole step from 0, moved up by `steps_offset`: the noisiest timestep is not visited.
    Leading,
    /// Whole steps down from the noisiest timestep.
    Trailing,
}

/// The options that place timesteps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spacing {
    pub class: &'static str,
    pub timestep_spacing: TimestepSpacing,
    pub num_train_timesteps: usize,
    pub steps_offset: usize,
}

impl Spacing {
    /// The timesteps at which `steps` steps are taken, largest first.
    pub fn visited(&self, steps: usize) -> Result<Vec<f64>, SchedulerError> {
        self.place(steps, steps)
    }

    /// The same, with linspace timesteps left between whole numbers, in f32.
    pub fn visited_unrounded(&self, steps: usize) -> Result<Vec<f64>, SchedulerError> {
        let visited = self.visited(steps)?;
        let last = self.num_train_timesteps as f64 - 1.0;
        Ok(match self.timestep_spacing {
            TimestepSpacing::Linspace => linspace(0.0, last, steps)
                .into_iter()
                .map(|t| f64::from(t as f32))
                .rev()
                .collect(),
            TimestepSpacing::Leading | TimestepSpacing::Trailing => visited,
        })
    }

    /// The upper ends of `steps` intervals, largest first.
    pub fn interval_tops(&self, steps: usize) -> Result<Vec<f64>, SchedulerError> {
        let mut tops = self.place(steps, steps + 1)?;
        tops.truncate(steps);
        Ok(tops)
    }

    /// `points` timesteps, largest first; trailing spacing always places `steps`.
    fn place(&self, steps: usize, points: usize) -> Result<Vec<f64>, SchedulerError> {
        self.check(steps)?;
        let train = self.num_train_timesteps;
        Ok(match self.timestep_spacing {
            TimestepSpacing::Linspace => linspace(0.0, train as f64 - 1.0, points)
                .into_iter()
                .map(f64::round_ties_even)
                .rev()
                .collect(),
            TimestepSpacing::Leading => (0..points)
                .map(|i| (i * (train / points)) as f64 + self.steps_offset as f64)
                .rev()
                .collect(),
            TimestepSpacing::Trailing => {
                // numpy counts down by the rounded difference of the first two entries, which decides some halves.
                let train = train as f64;
                let difference = (train - train / steps as f64) - train;
                (0..steps)
                    .map(|i| (train + i as f64 * difference).round_ties_even() - 1.0)
                    .collect()
            }
        })
    }

    /// Refuses step counts that no spacing can place.
    pub fn check(&self, steps: usize) -> Result<(), SchedulerError> {
        match (1..=self.num_train_timesteps).contains(&steps) {
            true => Ok(()),
            false => Err(SchedulerError::Steps {
                class: self.class,
                steps,
                supported: format!("1 to {} (`num_train_timesteps`)", self.num_train_timesteps),
            }),
        }
    }
}

/// `count` f64 points from `start` to `end`, both exact; a single point is `start`.
pub(crate) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    let step = (end - start) / count.saturating_sub(1).max(1) as f64;
    let point = |i| {
        if i > 0 && i + 1 == count {
            end
        } else {
            i as f64 * step + start
        }
    };
    (0..count).map(point).collect()
}
