//! `α` and `σ` of a sample, and the forward process that makes one.
//!
//! Every sample is `x = α x0 + σ ε`. The forward process of DDPM
//! (<https://arxiv.org/abs/2006.11239>, equation 4) has `α = √ᾱ_t`, `σ = √(1 - ᾱ_t)`; a
//! variance-exploding process (<https://arxiv.org/abs/2206.00364>) has `α = 1`. The velocity of a
//! sample is `v = α ε - σ x0` (<https://arxiv.org/abs/2202.00512>, appendix D).

use burn::prelude::*;

use super::tensor::{cast, combine_rows, widen};
use crate::{NoiseSchedule, SchedulerError};

/// `α` and `σ` of a sample `x = α x0 + σ ε`.
#[derive(Clone, Copy, Debug)]
pub struct AlphaSigma {
    /// The factor of the image.
    pub alpha: f32,
    /// The factor of the noise.
    pub sigma: f32,
}

impl AlphaSigma {
    /// Those of the forward process: `α = √ᾱ`, `σ = √(1 - ᾱ)`.
    pub fn of_alpha_bar(alpha_bar: f32) -> Self {
        Self {
            alpha: alpha_bar.sqrt(),
            sigma: (1.0 - alpha_bar).sqrt(),
        }
    }

    /// Those of `x = x0 + σ ε`.
    pub fn of_sigma(sigma: f32) -> Self {
        Self { alpha: 1.0, sigma }
    }

    /// Those of the forward process with this noise-to-signal ratio: `α = 1 / √(σ² + 1)`.
    pub fn of_ratio(sigma: f32) -> Self {
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        Self {
            alpha,
            sigma: sigma * alpha,
        }
    }

    /// `λ = ln α - ln σ`, half the logarithm of the signal-to-noise ratio.
    pub fn lambda(self) -> f32 {
        self.alpha.ln() - self.sigma.ln()
    }
}

impl NoiseSchedule {
    /// `α` and `σ` of the forward process at some timesteps.
    pub(crate) fn alpha_sigmas(
        &self,
        timesteps: &[f64],
    ) -> Result<Vec<AlphaSigma>, SchedulerError> {
        timesteps
            .iter()
            .map(|&timestep| self.alpha_bar(timestep).map(AlphaSigma::of_alpha_bar))
            .collect()
    }
}

/// `α x0 + σ ε`, with one `α` and `σ` for each row of the batch or one for all.
pub(crate) fn add_noise<B: Backend>(
    rows: &[AlphaSigma],
    original: Tensor<B, 4>,
    noise: Tensor<B, 4>,
) -> Result<Tensor<B, 4>, SchedulerError> {
    let alphas = rows.iter().map(|row| row.alpha).collect();
    let sigmas = rows.iter().map(|row| row.sigma).collect();
    let dtype = original.dtype();
    let noisy = combine_rows((alphas, widen(original)), (sigmas, widen(noise)))?;
    Ok(cast(noisy, dtype))
}

/// `α ε - σ x0`, with one `α` and `σ` for each row of the batch or one for all.
pub(crate) fn velocity<B: Backend>(
    rows: &[AlphaSigma],
    original: Tensor<B, 4>,
    noise: Tensor<B, 4>,
) -> Result<Tensor<B, 4>, SchedulerError> {
    let rotated = rows.iter().map(|row| AlphaSigma {
        alpha: -row.sigma,
        sigma: row.alpha,
    });
    add_noise(&rotated.collect::<Vec<_>>(), original, noise)
}
