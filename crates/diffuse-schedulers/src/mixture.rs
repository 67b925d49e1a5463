//! A sample as a mixture of image and noise, and the forward process that makes one.
//!
//! Every sampler sees `x = α x0 + σ ε`. The forward process of DDPM (<https://arxiv.org/abs/2006.11239>, equation 4)
//! has `α = √ᾱ_t`, `σ = √(1 - ᾱ_t)`; samplers that count in noise levels (<https://arxiv.org/abs/2206.00364>) have
//! `α = 1`. The velocity of a mixture is `v = α ε - σ x0` (<https://arxiv.org/abs/2202.00512>, appendix D).

use burn::prelude::*;

use crate::tensor::{cast, combine_rows, widen};
use crate::{NoiseSchedule, SchedulerError};

/// The mixture `x = alpha x0 + sigma ε`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mixture {
    pub alpha: f32,
    pub sigma: f32,
}

impl Mixture {
    /// The mixture of the forward process: `α = √ᾱ`, `σ = √(1 - ᾱ)`.
    pub fn of_alpha_bar(alpha_bar: f32) -> Self {
        Self {
            alpha: alpha_bar.sqrt(),
            sigma: (1.0 - alpha_bar).sqrt(),
        }
    }

    /// The mixture `x = x0 + σ ε`.
    pub fn of_level(sigma: f32) -> Self {
        Self { alpha: 1.0, sigma }
    }

    /// The mixture of the forward process with this noise to signal ratio: `α = 1 / √(σ² + 1)`.
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
    /// The mixtures of the forward process at some timesteps.
    pub(crate) fn mixtures(&self, timesteps: &[f64]) -> Result<Vec<Mixture>, SchedulerError> {
        timesteps
            .iter()
            .map(|&timestep| self.alpha_bar(timestep).map(Mixture::of_alpha_bar))
            .collect()
    }
}

/// `α x0 + σ ε`, with one mixture for each row of the batch or one for all.
pub(crate) fn add_noise<B: Backend>(
    mixtures: &[Mixture],
    original: Tensor<B, 4>,
    noise: Tensor<B, 4>,
) -> Result<Tensor<B, 4>, SchedulerError> {
    let alphas = mixtures.iter().map(|mixture| mixture.alpha).collect();
    let sigmas = mixtures.iter().map(|mixture| mixture.sigma).collect();
    let dtype = original.dtype();
    Ok(cast(
        combine_rows((alphas, widen(original)), (sigmas, widen(noise)))?,
        dtype,
    ))
}

/// `α ε - σ x`, with one mixture for each row of the batch or one for all.
pub(crate) fn velocity<B: Backend>(
    mixtures: &[Mixture],
    sample: Tensor<B, 4>,
    noise: Tensor<B, 4>,
) -> Result<Tensor<B, 4>, SchedulerError> {
    let turned: Vec<Mixture> = mixtures
        .iter()
        .map(|m| Mixture {
            alpha: -m.sigma,
            sigma: m.alpha,
        })
        .collect();
    add_noise(&turned, sample, noise)
}
