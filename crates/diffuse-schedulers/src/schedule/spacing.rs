//! The training timesteps of a run, from noise to image.
//!
//! Table 2 of "Common Diffusion Noise Schedules and Sample Steps are Flawed"
//! (<https://arxiv.org/abs/2305.08891>), for `n` steps out of `T`. Samplers with a step *at* each
//! timestep use [`Spacing::visited`]. Those with a step *between* neighbours use
//! [`Spacing::interval_tops`]; the last interval ends at the image:
//!
//! ```text
//!            visited                      interval_tops
//! linspace   round(linspace(0, T-1, n))   round(linspace(0, T-1, n+1)) without the 0
//! leading    i ⌊T/n⌋ + offset             i ⌊T/(n+1)⌋ + offset without the smallest
//! trailing   round(T - i T/n) - 1         the same
//! ```
//!
//! Rounding is to the nearest integer, halves to even. Diffusers' trailing spacing adds floats
//! until zero is reached, and has one entry too many (-1) for 62 step counts; here `n` steps are
//! `n` timesteps. If the noisiest timesteps are left out, `T` is the number of the others, except
//! in the stride of trailing spacing.

use serde::{Deserialize, Serialize};

use super::noise_schedule::BetaOptions;
use super::sigmas::SIGMAS;
use crate::config::options;
use crate::step::alpha_sigma::AlphaSigma;
use crate::{NoiseSchedule, SchedulerError, TimestepRequest};

/// The spacing of timesteps over the training schedule (the key `timestep_spacing`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TimestepSpacing {
    /// Evenly, with both ends.
    Linspace,
    /// Multiples of an integer stride from 0, plus `steps_offset`: the noisiest timestep is left
    /// out.
    Leading,
    /// Equal steps down from the noisiest timestep.
    Trailing,
}

/// Ten timesteps for Stable Diffusion v1, of "Align Your Steps"
/// (<https://arxiv.org/abs/2404.14507>).
pub const AYS_TIMESTEPS: [f64; 10] = [
    999.0, 850.0, 736.0, 645.0, 545.0, 455.0, 343.0, 233.0, 124.0, 24.0,
];

/// The sigmas of the same ten steps, and that of the result.
pub const AYS_SIGMAS: [f64; 11] = [
    14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0,
];

options! {
    /// The spacing of timesteps over the training schedule.
    pub struct SpacingOptions {
        /// The kind of spacing.
        pub timestep_spacing: TimestepSpacing = TimestepSpacing::Linspace,
        /// The offset of every timestep in leading spacing.
        pub steps_offset: usize = 0,
    }
}

impl SpacingOptions {
    /// Leading spacing.
    pub const LEADING: Self = Self {
        timestep_spacing: TimestepSpacing::Leading,
        steps_offset: 0,
    };

    /// The spacing of these options over a training schedule.
    pub(crate) fn over(&self, class: &'static str, betas: &BetaOptions) -> Spacing {
        let num_train_timesteps = betas.num_train_timesteps;
        Spacing {
            class,
            timestep_spacing: self.timestep_spacing,
            steps_offset: self.steps_offset,
            num_train_timesteps,
            reach: num_train_timesteps,
        }
    }
}

/// A spacing over a training schedule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spacing {
    pub class: &'static str,
    pub timestep_spacing: TimestepSpacing,
    pub steps_offset: usize,
    pub num_train_timesteps: usize,
    /// The number of training timesteps that may be visited, from 0.
    pub reach: usize,
}

impl Spacing {
    /// Leaves out the noisiest timesteps, those with `λ = ln(α / σ)` below `lambda_min_clipped`.
    pub fn clipped(
        self,
        noise_schedule: &NoiseSchedule,
        lambda_min: f64,
    ) -> Result<Self, SchedulerError> {
        let lambdas = noise_schedule
            .alphas_cumprod()
            .iter()
            .map(|&alpha_bar| AlphaSigma::of_alpha_bar(alpha_bar).lambda());
        let reach = lambdas
            .filter(|&lambda| lambda >= lambda_min as f32)
            .count();
        match reach {
            0 => Err(SchedulerError::Value {
                class: self.class,
                key: "lambda_min_clipped",
                value: lambda_min.to_string(),
                expected: "it leaves no timestep to visit".into(),
            }),
            reach => Ok(Self { reach, ..self }),
        }
    }

    /// The timesteps of `steps` steps, largest first, integers of the noise schedule.
    pub fn visited(&self, steps: usize) -> Result<Vec<f64>, SchedulerError> {
        let visited = self.place(steps, steps)?;
        let (first, train) = (visited[0], self.num_train_timesteps);
        if first < train as f64 {
            return Ok(visited);
        }
        Err(SchedulerError::clash(
            self.class,
            format!(
                "`num_inference_steps` `{steps}` and `steps_offset` `{}`",
                self.steps_offset
            ),
            format!(
                "the first timestep is `{first}`, which is not in `0..{train}`, choose fewer steps"
            ),
        ))
    }

    /// The same in f32, with fractional linspace timesteps.
    pub fn visited_unrounded(&self, steps: usize) -> Result<Vec<f64>, SchedulerError> {
        let visited = self.visited_unrounded_f64(steps)?;
        Ok(visited
            .into_iter()
            .map(|timestep| f64::from(timestep as f32))
            .collect())
    }

    /// The same in f64.
    pub fn visited_unrounded_f64(&self, steps: usize) -> Result<Vec<f64>, SchedulerError> {
        let visited = self.place(steps, steps)?;
        Ok(match self.timestep_spacing {
            TimestepSpacing::Linspace => {
                let last = self.num_train_timesteps as f64 - 1.0;
                linspace(0.0, last, steps).into_iter().rev().collect()
            }
            TimestepSpacing::Leading | TimestepSpacing::Trailing => visited,
        })
    }

    /// The upper ends of `steps` intervals, largest first.
    pub fn interval_tops(&self, steps: usize) -> Result<Vec<f64>, SchedulerError> {
        let mut tops = self.place(steps, steps + 1)?;
        tops.truncate(steps);
        Ok(tops)
    }

    /// The lower ends of `steps` intervals, smallest first, for a run from image to noise.
    pub fn interval_bottoms(&self, steps: usize) -> Result<Vec<f64>, SchedulerError> {
        let mut bottoms = self.place(steps, steps + 1)?;
        bottoms.reverse();
        bottoms.truncate(steps);
        Ok(bottoms)
    }

    /// `points` timesteps, largest first; trailing spacing always places `steps`.
    fn place(&self, steps: usize, points: usize) -> Result<Vec<f64>, SchedulerError> {
        self.check(steps)?;
        let (train, reach) = (self.num_train_timesteps, self.reach);
        Ok(match self.timestep_spacing {
            TimestepSpacing::Linspace => linspace(0.0, reach as f64 - 1.0, points)
                .into_iter()
                .map(f64::round_ties_even)
                .rev()
                .collect(),
            TimestepSpacing::Leading => (0..points)
                .map(|i| (i * (reach / points)) as f64 + self.steps_offset as f64)
                .rev()
                .collect(),
            TimestepSpacing::Trailing => {
                // numpy uses the rounded difference of the first two entries as the stride, which
                // matters for some halves.
                let (reach, stride) = (reach as f64, train as f64 / steps as f64);
                let difference = (reach - stride) - reach;
                let count = if self.reach == train {
                    steps
                } else {
                    (reach / stride).ceil() as usize
                };
                (0..count)
                    .map(|i| (reach + i as f64 * difference).round_ties_even() - 1.0)
                    .collect()
            }
        })
    }

    /// An error for step counts that no spacing supports.
    pub fn check(&self, steps: usize) -> Result<(), SchedulerError> {
        check_steps(self.class, steps, self.num_train_timesteps)
    }
}

/// An error for 0 steps, and for more steps than training timesteps.
pub(crate) fn check_steps(
    class: &'static str,
    steps: usize,
    num_train_timesteps: usize,
) -> Result<(), SchedulerError> {
    match (1..=num_train_timesteps).contains(&steps) {
        true => Ok(()),
        false => Err(SchedulerError::Steps {
            class,
            steps,
            supported: format!("1 to {num_train_timesteps} (`num_train_timesteps`)"),
        }),
    }
}

impl TimestepRequest {
    /// The number of steps, for a sampler without custom timesteps.
    pub(crate) fn steps(&self, class: &'static str) -> Result<usize, SchedulerError> {
        let what = match self {
            Self::Steps(steps) => return Ok(*steps),
            Self::Timesteps(_) => "timesteps",
            Self::Sigmas(_) => "sigmas",
        };
        let reason = "its `set_timesteps` takes a number of steps";
        Err(refused(class, what, reason))
    }
}

/// An error for a list of timesteps that is not descending, and for any list if the options choose
/// the timesteps.
pub(crate) fn check_timesteps(
    class: &'static str,
    timesteps: &[f64],
    num_train_timesteps: usize,
    placed: bool,
) -> Result<(), SchedulerError> {
    let known = |t: &f64| (0.0..num_train_timesteps as f64).contains(t);
    let reason = if timesteps.is_empty() {
        "there is none"
    } else if placed {
        "they are chosen already, by `use_*_sigmas`, `use_lu_lambdas` or `timestep_type`"
    } else if !timesteps.iter().all(known) {
        "each must be in `0..num_train_timesteps`"
    } else if timesteps.windows(2).any(|pair| pair[0] <= pair[1]) {
        "they must be in descending order"
    } else {
        return Ok(());
    };
    Err(refused(class, "timesteps", reason))
}

/// The same, for samplers with integer timesteps.
pub(crate) fn check_whole_timesteps(
    class: &'static str,
    timesteps: &[f64],
    num_train_timesteps: usize,
    placed: bool,
) -> Result<(), SchedulerError> {
    check_timesteps(class, timesteps, num_train_timesteps, placed)?;
    match timesteps.iter().find(|t| t.fract() != 0.0) {
        None => Ok(()),
        Some(&timestep) => Err(SchedulerError::TimestepRange {
            timestep,
            num_train_timesteps,
        }),
    }
}

/// An error for a list of sigmas that is not descending.
pub(crate) fn check_sigmas(class: &'static str, sigmas: &[f64]) -> Result<(), SchedulerError> {
    let steps = &sigmas[..sigmas.len().saturating_sub(1)];
    let usable = |sigma: &f64| SIGMAS.contains(sigma);
    let last = sigmas.last().copied().unwrap_or(0.0);
    let reason = if steps.is_empty() {
        "there must be one for each step and one for the result"
    } else if !steps.iter().all(usable) || !(last == 0.0 || usable(&last)) {
        "each must be a number greater than 0, the last may be 0"
    } else if sigmas
        .windows(2)
        .any(|pair| pair[0] as f32 <= pair[1] as f32)
    {
        "they must be in descending order"
    } else {
        return Ok(());
    };
    Err(refused(class, "sigmas", reason))
}

fn refused(class: &'static str, what: &'static str, reason: &str) -> SchedulerError {
    SchedulerError::Schedule {
        class,
        what,
        reason: reason.into(),
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
