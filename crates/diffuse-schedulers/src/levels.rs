//! The timesteps of a run with the noise level of each.
//!
//! Samplers choose timesteps and look their levels up, or choose levels along a curve and find the timesteps that
//! belong to them. Either way, below the last one comes the level of the result.

use crate::SchedulerError;
use crate::ladder::Ladder;
use crate::sigmas::{LogSigmas, SigmaCurve, SigmaRange, sigma_at};
use crate::spacing::Spacing;

/// Timesteps and noise levels, noisiest first.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    pub timesteps: Vec<f64>,
    pub sigmas: Vec<f64>,
}

impl Levels {
    /// The levels of given timesteps, from a table of the level of each training timestep.
    pub fn at(timesteps: Vec<f64>, table: &[f32]) -> Self {
        let sigmas = timesteps.iter().map(|&timestep| sigma_at(table, timestep));
        let sigmas = sigmas.collect();
        Self { timesteps, sigmas }
    }

    /// Levels along a curve, with timesteps that need not be whole.
    pub fn along(curve: SigmaCurve, range: SigmaRange, steps: usize, table: &[f32]) -> Self {
        let sigmas = curve.levels(range, steps);
        let logs = LogSigmas::new(table);
        let timesteps = sigmas.iter().map(|&sigma| logs.timestep(sigma)).collect();
        Self { timesteps, sigmas }
    }

    /// The same number of levels along a curve between the same ends, if there is a curve.
    pub fn bent(self, curve: Option<SigmaCurve>, table: &[f32]) -> Self {
        match curve {
            None => self,
            Some(curve) => Self::along(curve, self.range(), self.sigmas.len(), table),
        }
    }

    /// Levels for a solver that steps between timesteps: those of the intervals' upper ends, or along a curve in a
    /// range, with whole timesteps.
    pub fn between(
        spacing: Spacing,
        steps: usize,
        curve: Option<SigmaCurve>,
        range: SigmaRange,
        table: &[f32],
    ) -> Result<Self, SchedulerError> {
        Ok(match curve {
            None => Self::at(spacing.interval_tops(steps)?, table),
            Some(curve) => {
                spacing.check(steps)?;
                Self::along(curve, range, steps, table).map_timesteps(curve.whole())
            }
        })
    }

    /// The lowest and the highest level.
    pub fn range(&self) -> SigmaRange {
        SigmaRange {
            min: self.sigmas[self.sigmas.len() - 1],
            max: self.sigmas[0],
        }
    }

    /// Changes each timestep.
    pub fn map_timesteps(mut self, change: impl Fn(f64) -> f64) -> Self {
        self.timesteps
            .iter_mut()
            .for_each(|timestep| *timestep = change(*timestep));
        self
    }

    /// The level of the result for solvers without `final_sigmas_type`. The reference's quirk: the last level of a curve
    /// is there twice.
    pub fn last_of(&self, curve: Option<SigmaCurve>, table: &[f32]) -> f32 {
        match curve {
            None => table[0],
            Some(_) => self.range().min as f32,
        }
    }

    /// Rounds the timesteps of Karras's curve. The reference's quirk: the midpoint methods leave the others' as they are.
    pub fn rounded_if_karras(self, curve: Option<SigmaCurve>) -> Self {
        match curve {
            Some(SigmaCurve::Karras) => self.map_timesteps(f64::round_ties_even),
            _ => self,
        }
    }

    /// The levels in f32, with the level of the result at the end.
    pub fn sigmas_down_to(&self, last: f32) -> Vec<f32> {
        self.sigmas
            .iter()
            .map(|&sigma| sigma as f32)
            .chain([last])
            .collect()
    }

    /// A run down these levels to that of the result.
    pub fn down_to(self, last: f32) -> Ladder {
        let sigmas = self.sigmas_down_to(last);
        Ladder::new(self.timesteps, sigmas)
    }
}
