//! A step down that leaves room for new noise.
//!
//! "Denoising Diffusion Probabilistic Models" (<https://arxiv.org/abs/2006.11239>) in terms of noise levels: to come from
//! `σ` to `σ'`, go down to `σ_down` without noise, then add noise of `σ_up`.
//!
//! ```text
//! σ_up² = σ'² (σ² - σ'²) / σ²,   σ_down² = σ'² - σ_up²
//! ```

use crate::SchedulerError;

/// The two parts of a step to a noise level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ancestral {
    pub down: f32,
    pub up: f32,
}

impl Ancestral {
    /// The parts of a step from one level to a lower one.
    pub fn between(from: f32, to: f32) -> Self {
        let (from_squared, to_squared) = (from * from, to * to);
        let up = (to_squared * (from_squared - to_squared) / from_squared).sqrt();
        let down = (to_squared - up * up).sqrt();
        Self { down, up }
    }

    /// Refuses levels so far apart that `σ_down` has no digit left in f32, as the reference computes it. `(σ' / σ)²` must
    /// not be below `least`.
    pub fn check(class: &'static str, sigmas: &[f32], least: f32) -> Result<(), SchedulerError> {
        for pair in sigmas.windows(2).filter(|pair| pair[1] > 0.0) {
            let Self { down, up } = Self::between(pair[0], pair[1]);
            let ratio = pair[1] / pair[0];
            if !(down.is_finite() && up.is_finite() && ratio * ratio >= least) {
                return Err(SchedulerError::Clash {
                    class,
                    keys: format!("the noise levels {} and {}", pair[0], pair[1]),
                    advice:
                        "their squares cannot be told apart from a sum in f32: choose more steps, \
                             `use_exponential_sigmas`, or another `beta_schedule`"
                            .into(),
                });
            }
        }
        Ok(())
    }
}
