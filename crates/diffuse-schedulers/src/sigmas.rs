//! Noise levels for a number of steps.
//!
//! Between a largest level `σ_max` and a smallest `σ_min`, with `u` from 0 to 1 in even steps:
//!
//! ```text
//! Karras       (σ_max^(1/ρ) + u (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ, ρ = 7    https://arxiv.org/abs/2206.00364, equation 5
//! exponential  exp(ln σ_max + u (ln σ_min - ln σ_max))
//! beta         σ_min + q(1 - u) (σ_max - σ_min)                           https://arxiv.org/abs/2407.12173
//! ```
//!
//! `q` is the quantile function of the beta distribution with `α = β = 0.6`. All in f64.

use crate::SchedulerError;
use crate::spacing::linspace;

/// The curve that noise levels follow, instead of those of evenly placed timesteps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SigmaCurve {
    Karras,
    Exponential,
    Beta,
}

impl SigmaCurve {
    /// The curve that the three options of a configuration ask for: at most one may.
    pub fn from_flags(
        class: &'static str,
        karras: bool,
        exponential: bool,
        beta: bool,
    ) -> Result<Option<Self>, SchedulerError> {
        match (karras, exponential, beta) {
            (false, false, false) => Ok(None),
            (true, false, false) => Ok(Some(Self::Karras)),
            (false, true, false) => Ok(Some(Self::Exponential)),
            (false, false, true) => Ok(Some(Self::Beta)),
            _ => Err(SchedulerError::Clash {
                class,
                keys: "`use_karras_sigmas`, `use_exponential_sigmas` and `use_beta_sigmas`".into(),
                advice: "only one of them can be true".into(),
            }),
        }
    }
}
