//! Ancestral steps: down to a smaller sigma than the target, then new noise.
//!
//! The posterior of "Denoising Diffusion Probabilistic Models" (<https://arxiv.org/abs/2006.11239>)
//! in terms of sigma: a step from `σ` to `σ'` goes to `σ_down` without noise, and then adds noise
//! of `σ_up`.
//!
//! ```text
//! σ_up² = σ'² (σ² - σ'²) / σ²,   σ_down² = σ'² - σ_up²
//! ```

use crate::SchedulerError;

/// `σ_down` and `σ_up` of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ancestral {
    pub down: f32,
    pub up: f32,
}

impl Ancestral {
    /// `σ_down` and `σ_up` of a step from one sigma to a lower one.
    pub fn between(from: f32, to: f32) -> Self {
        let (from_squared, to_squared) = (from * from, to * to);
        let up = (to_squared * (from_squared - to_squared) / from_squared).sqrt();
        let down = (to_squared - up * up).sqrt();
        Self { down, up }
    }

    /// An error for sigmas so far apart that `σ_down` has no correct digit in f32, as Diffusers
    /// computes it: `(σ' / σ)²` must not be below `least`.
    pub fn check(class: &'static str, sigmas: &[f32], least: f32) -> Result<(), SchedulerError> {
        for pair in sigmas.windows(2).filter(|pair| pair[1] > 0.0) {
            let Self { down, up } = Self::between(pair[0], pair[1]);
            let ratio = pair[1] / pair[0];
            if !(down.is_finite() && up.is_finite() && ratio * ratio >= least) {
                return Err(SchedulerError::clash(
                    class,
                    format!("the sigmas {} and {}", pair[0], pair[1]),
                    "f32 cannot tell their squares from a sum of both: choose more steps, \
                     `use_exponential_sigmas`, or another `beta_schedule`",
                ));
            }
        }
        Ok(())
    }
}
