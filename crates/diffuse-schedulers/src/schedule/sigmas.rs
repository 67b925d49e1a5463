//! Sigma schedules, and the timesteps that belong to a sigma.
//!
//! A model knows timesteps, a sampler wants `σ_t = √((1 - ᾱ_t) / ᾱ_t)`. The sigmas of a run either
//! are those of evenly placed timesteps, or follow a sigma schedule from `σ_max` to `σ_min`, with
//! `u` from 0 to 1:
//!
//! ```text
//! Karras       (σ_max^(1/ρ) + u (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ, ρ = 7
//! exponential  exp(ln σ_max + u (ln σ_min - ln σ_max))
//! Lu           the same in λ = -ln σ
//! beta         σ_min + q(1 - u) (σ_max - σ_min)
//! ```
//!
//! Karras's is <https://arxiv.org/abs/2206.00364>, equation 5; Lu's is
//! <https://arxiv.org/abs/2206.00927>, section 3.4; the beta schedule is
//! <https://arxiv.org/abs/2407.12173>, with the quantile function `q` of the beta distribution of
//! `α = β = 0.6`. The timestep of a sigma between two tabulated ones is found by linear
//! interpolation in `ln σ`. All in f64, from tables in f32.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::spacing::linspace;
use crate::SchedulerError;
use crate::config::{options, require_range};

/// The sigma that a run ends at (the key `final_sigmas_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinalSigmasType {
    /// No noise.
    Zero,
    /// The smallest sigma of the noise schedule.
    SigmaMin,
}

impl FinalSigmasType {
    /// The sigma of the result, by the smallest one.
    pub(crate) fn sigma(self, sigma_min: f32) -> f32 {
        match self {
            Self::Zero => 0.0,
            Self::SigmaMin => sigma_min,
        }
    }
}

options! {
    /// The sigma schedule of a run, in place of the sigmas of evenly placed timesteps.
    pub struct SigmaOptions {
        /// Whether sigmas follow Karras et al. with ρ = 7.
        pub use_karras_sigmas: bool = false,
        /// Whether the logarithms of the sigmas are evenly spaced.
        pub use_exponential_sigmas: bool = false,
        /// Whether sigmas follow the quantiles of a beta distribution.
        pub use_beta_sigmas: bool = false,
    }
}

impl SigmaOptions {
    /// The sigma schedule that the three options ask for: at most one may.
    pub(crate) fn sigma_schedule(
        &self,
        class: &'static str,
    ) -> Result<Option<SigmaSchedule>, SchedulerError> {
        let (karras, exponential) = (self.use_karras_sigmas, self.use_exponential_sigmas);
        match (karras, exponential, self.use_beta_sigmas) {
            (false, false, false) => Ok(None),
            (true, false, false) => Ok(Some(SigmaSchedule::Karras)),
            (false, true, false) => Ok(Some(SigmaSchedule::Exponential)),
            (false, false, true) => Ok(Some(SigmaSchedule::Beta)),
            _ => Err(SchedulerError::clash(
                class,
                "`use_karras_sigmas`, `use_exponential_sigmas` and `use_beta_sigmas`",
                "only one of them can be true",
            )),
        }
    }
}

/// The formula that sigmas follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SigmaSchedule {
    Karras,
    Exponential,
    Beta,
    /// Exponential between logarithms in f32.
    Lu,
}

impl SigmaSchedule {
    /// The rounding of the timesteps of a sigma schedule in multistep solvers. Diffusers' quirk:
    /// some are rounded, the others truncated.
    pub fn whole(self) -> fn(f64) -> f64 {
        match self {
            Self::Karras | Self::Lu => f64::round_ties_even,
            Self::Exponential | Self::Beta => f64::trunc,
        }
    }

    /// `steps` sigmas from `max` down to `min`.
    pub fn sigmas(self, SigmaRange { min, max }: SigmaRange, steps: usize) -> Vec<f64> {
        let from_to = |start: f64, end: f64| {
            linspace(0.0, 1.0, steps)
                .into_iter()
                .map(move |u| start + u * (end - start))
        };
        match self {
            Self::Karras => karras(SigmaRange { min, max }, 7.0, steps),
            Self::Exponential => linspace(max.ln(), min.ln(), steps)
                .into_iter()
                .map(f64::exp)
                .collect(),
            Self::Lu => {
                let [start, end] = [max, min].map(|sigma| f64::from(sigma.ln() as f32));
                linspace(0.0, 1.0, steps)
                    .into_iter()
                    .map(|u| (start + u * (end - start)).exp())
                    .collect()
            }
            Self::Beta => from_to(1.0, 0.0)
                .map(|p| min + beta_quantile(p) * (max - min))
                .collect(),
        }
    }
}

/// `steps` sigmas of Karras's schedule with any `ρ`.
pub(crate) fn karras(SigmaRange { min, max }: SigmaRange, rho: f64, steps: usize) -> Vec<f64> {
    let (start, end) = (max.powf(1.0 / rho), min.powf(1.0 / rho));
    linspace(0.0, 1.0, steps)
        .into_iter()
        .map(|u| (start + u * (end - start)).powf(rho))
        .collect()
}

/// Sigmas whose squares are f32.
pub(crate) const SIGMAS: RangeInclusive<f64> = 1e-18..=1e18;

/// The ends of a sigma schedule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SigmaRange {
    pub min: f64,
    pub max: f64,
}

impl SigmaRange {
    /// The ends of a table of sigmas, smallest first.
    pub fn of_table(table: &[f32]) -> Self {
        Self {
            min: table[0].into(),
            max: table[table.len() - 1].into(),
        }
    }

    /// The ends, replaced by `sigma_min` and `sigma_max` of a configuration.
    pub fn with(
        self,
        class: &'static str,
        min: Option<f64>,
        max: Option<f64>,
    ) -> Result<Self, SchedulerError> {
        for (key, value) in [("sigma_min", min), ("sigma_max", max)] {
            let expected = "a number greater than 0 (from 1e-18 to 1e18)";
            require_range(class, key, value.unwrap_or(1.0), SIGMAS, expected)?;
        }
        Ok(Self {
            min: min.unwrap_or(self.min),
            max: max.unwrap_or(self.max),
        })
    }
}

/// The sigma of a fractional timestep, by linear interpolation between neighbours, clamped to the
/// table.
pub(crate) fn sigma_at(table: &[f32], timestep: f64) -> f64 {
    let below = (timestep.max(0.0) as usize).min(table.len() - 1);
    let above = (below + 1).min(table.len() - 1);
    let (low, high) = (f64::from(table[below]), f64::from(table[above]));
    (high - low) * (timestep - below as f64).clamp(0.0, 1.0) + low
}

/// Finds the timesteps of sigmas.
pub(crate) struct LogSigmas(Vec<f32>);

impl LogSigmas {
    /// From the sigma of each training timestep, smallest first.
    pub fn new(sigmas: &[f32]) -> Self {
        Self(
            sigmas
                .iter()
                .map(|&sigma| f64::from(sigma).ln() as f32)
                .collect(),
        )
    }

    /// The fractional timestep of a sigma.
    pub fn timestep(&self, sigma: f64) -> f64 {
        let (low, weight) = self.place(sigma.max(1e-10).ln());
        (1.0 - weight) * low + weight * (low + 1.0)
    }

    /// The same in f32, with Diffusers' roundings to f32 on the way.
    pub fn timestep_f32(&self, sigma: f32) -> f64 {
        let (low, weight) = self.place(f64::from(f64::from(sigma).max(1e-10).ln() as f32));
        let weight = weight as f32;
        f64::from(1.0 - weight) * low + f64::from(weight) * (low + 1.0)
    }

    /// The same with every operation in f32.
    pub fn timestep_all_f32(&self, sigma: f32) -> f64 {
        let (low, weight) = self.place(f64::from(f64::from(sigma).max(1e-10).ln() as f32));
        let (low, weight) = (low as f32, weight as f32);
        f64::from((1.0 - weight) * low + weight * (low + 1.0))
    }

    /// The tabulated timestep below a sigma, and the fraction of the distance to the next one.
    fn place(&self, log_sigma: f64) -> (f64, f64) {
        let Self(logs) = self;
        let below = logs
            .iter()
            .rposition(|&log| f64::from(log) <= log_sigma)
            .unwrap_or(0);
        let below = below.min(logs.len().saturating_sub(2));
        let (low, high) = (
            f64::from(logs[below]),
            f64::from(logs[(below + 1).min(logs.len() - 1)]),
        );
        let weight = (low - log_sigma) / (low - high);
        (
            below as f64,
            if weight.is_nan() {
                0.0
            } else {
                weight.clamp(0.0, 1.0)
            },
        )
    }
}

/// Both shape parameters of the beta distribution.
const SHAPE: f64 = 0.6;

/// The quantile of the distribution.
///
/// The distribution is symmetric, so half of it is enough. There its density falls, and Newton's
/// method converges from the leading term of the series.
fn beta_quantile(p: f64) -> f64 {
    if p > 0.5 {
        return 1.0 - beta_quantile(1.0 - p);
    }
    let target = p * 2.0 * incomplete_beta(0.5);
    let mut x = (target * SHAPE).powf(1.0 / SHAPE);
    for _ in 0..20 {
        let slope = (x * (1.0 - x)).powf(SHAPE - 1.0);
        let better = x - (incomplete_beta(x) - target) / slope;
        if x == 0.0 || better == x {
            break;
        }
        x = better;
    }
    x
}

/// `∫₀ˣ (t (1 - t))^(a - 1) dt = xᵃ (1 - x)ᵃ / a Σₙ Πₖ₌₀ⁿ⁻¹ (2a + k) / (a + 1 + k) xⁿ`, for `x` up
/// to one half.
fn incomplete_beta(x: f64) -> f64 {
    let (mut sum, mut term, mut k) = (0.0, 1.0, 0.0);
    while term > f64::EPSILON * sum / 4.0 {
        sum += term;
        term *= (2.0 * SHAPE + k) / (SHAPE + 1.0 + k) * x;
        k += 1.0;
    }
    (x * (1.0 - x)).powf(SHAPE) / SHAPE * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(p: f64, expected: f64) {
        let x = beta_quantile(p);
        assert!(
            (x - expected).abs() <= 4e-15 * expected,
            "quantile of {p} is {x}, expected {expected}"
        );
    }

    #[test]
    fn beta_quantiles() {
        check(0.0, 0.0);
        check(1e-09, 1.85588246249141e-15);
        check(0.001, 1.855873851745199e-05);
        check(0.1, 0.03958440558878085);
        check(0.25, 0.17568037865269498);
        check(0.4999, 0.49986127490549975);
        check(0.5, 0.5000000000000001);
        check(0.6, 0.6372990092467856);
        check(0.9, 0.9604155944112192);
        check(0.999, 0.9999814412614826);
        check(0.999999999, 0.9999999999999981);
        check(1.0, 1.0);
    }

    #[test]
    fn sigmas_between_tabulated_ones() {
        let table = [1.0, 2.0, 4.0];
        assert_eq!(sigma_at(&table, 1.5), 3.0);
        assert_eq!([sigma_at(&table, -1.0), sigma_at(&table, 9.0)], [1.0, 4.0]);
        let logs = LogSigmas::new(&table);
        assert!((logs.timestep(8f64.sqrt()) - 1.5).abs() < 1e-6);
        assert_eq!([logs.timestep(0.0), logs.timestep(1e9)], [0.0, 2.0]);
    }
}
