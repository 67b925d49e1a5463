//! The forward process `x = α x0 + σ ε` of each family of models, and the model input.
//!
//! "Elucidating the Design Space of Diffusion-Based Generative Models"
//! (<https://arxiv.org/abs/2206.00364>), table 1:
//!
//! ```text
//!                      x                           model input
//! variance preserving  √ᾱ x0 + √(1 - ᾱ) ε          x
//! variance exploding   x0 + σ ε                    x / √(σ² + 1)
//! EDM                  x0 + σ ε                    x / √(σ² + σ_data²)
//! ```

use crate::TimestepSpacing;
use crate::step::alpha_sigma::AlphaSigma;

/// The process of a sampler.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Process {
    /// Variance preserving, with `ᾱ` of the timestep.
    Timesteps,
    /// Variance preserving, with `σ = √((1 - ᾱ) / ᾱ)` of a sigma grid.
    SigmaGrid,
    /// Variance exploding, with `σ` of a sigma grid that was placed by a spacing.
    Exploding(TimestepSpacing),
    /// Variance exploding, for EDM models.
    EDM {
        /// The standard deviation of the training data.
        sigma_data: f32,
        /// The largest sigma.
        sigma_max: f64,
    },
    /// Another process, defined by the sampler.
    Own,
}

impl Process {
    /// `α` and `σ` of a sample, by its sigma.
    pub fn alpha_sigma(self, sigma: f32) -> AlphaSigma {
        match self {
            Self::Exploding(_) | Self::EDM { .. } => AlphaSigma::of_sigma(sigma),
            Self::Timesteps | Self::SigmaGrid | Self::Own => AlphaSigma::of_ratio(sigma),
        }
    }

    /// The standard deviation of the noise that a run starts from.
    pub fn init_noise_sigma(self, max_sigma: f32) -> f64 {
        match self {
            Self::Exploding(TimestepSpacing::Leading) => {
                (max_sigma * max_sigma + 1.0).sqrt().into()
            }
            Self::Exploding(_) => max_sigma.into(),
            Self::EDM { sigma_max, .. } => (sigma_max * sigma_max + 1.0).sqrt(),
            Self::Timesteps | Self::SigmaGrid | Self::Own => 1.0,
        }
    }

    /// Whether the model input differs from the sample.
    pub fn scales_input(self) -> bool {
        matches!(self, Self::Exploding(_) | Self::EDM { .. })
    }

    /// The standard deviation of a sample, by which the model input is divided.
    pub fn input_deviation(self, sigma: f32) -> f32 {
        let data = match self {
            Self::EDM { sigma_data, .. } => sigma_data,
            _ => 1.0,
        };
        (sigma * sigma + data * data).sqrt()
    }
}
