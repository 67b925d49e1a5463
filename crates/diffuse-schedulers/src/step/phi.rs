//! The exponential integrator: the linear term of the diffusion ODE or SDE is solved exactly.
//!
//! In the time `λ = ln(α / σ)`, from `s` to `t` with `h = λ_t - λ_s`, its step is
//!
//! ```text
//! x_t = ratio x_s - scale (φ_1(z) m + φ_2(z) m' + φ_3(z) m'' + ..) + noise ε
//! ```
//!
//! where `m` is the model output at `s`, the derivatives are over the whole step, `φ_1 = e^z - 1`
//! and `φ_(k+1) = φ_k / z - 1 / k!`. "DPM-Solver++" (<https://arxiv.org/abs/2211.01095>), equations
//! 8 to 13 and appendix A:
//!
//! ```text
//!                           z      ratio             scale   noise
//! data prediction, ODE      -h     σ_t / σ_s         α_t     0
//! epsilon prediction, ODE   h      α_t / α_s         σ_t     0
//! data prediction, SDE      -2h    σ_t / σ_s e^-h    α_t     σ_t √(1 - e^(-2h))
//! epsilon prediction, SDE   h      α_t / α_s         2 σ_t   σ_t √(e^(2h) - 1)
//! ```
//!
//! In f32, as Diffusers.

use super::alpha_sigma::AlphaSigma;

/// The terms of a step that depend on its ends only.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExponentialStep {
    pub ratio: f32,
    pub z: f32,
    pub scale: f32,
    pub noise: Option<f32>,
}

impl ExponentialStep {
    /// The ODE from `s` to `t`, by data prediction.
    pub fn data_ode(s: AlphaSigma, t: AlphaSigma) -> Self {
        Self {
            ratio: t.sigma / s.sigma,
            z: s.lambda() - t.lambda(),
            scale: t.alpha,
            noise: None,
        }
    }

    /// The ODE from `s` to `t`, by epsilon prediction.
    pub fn epsilon_ode(s: AlphaSigma, t: AlphaSigma) -> Self {
        Self {
            ratio: t.alpha / s.alpha,
            z: t.lambda() - s.lambda(),
            scale: t.sigma,
            noise: None,
        }
    }

    /// The SDE from `s` to `t`, by data prediction.
    pub fn data_sde(s: AlphaSigma, t: AlphaSigma) -> Self {
        let h = t.lambda() - s.lambda();
        Self {
            ratio: t.sigma / s.sigma * (-h).exp(),
            z: -2.0 * h,
            scale: t.alpha,
            noise: Some(t.sigma * (1.0 - (-2.0 * h).exp()).sqrt()),
        }
    }

    /// The SDE from `s` to `t`, by epsilon prediction.
    pub fn epsilon_sde(s: AlphaSigma, t: AlphaSigma) -> Self {
        let h = t.lambda() - s.lambda();
        Self {
            scale: 2.0 * t.sigma,
            noise: Some(t.sigma * ((2.0 * h).exp() - 1.0).sqrt()),
            ..Self::epsilon_ode(s, t)
        }
    }

    /// `φ_1`
    pub fn phi_1(self) -> f32 {
        self.z.exp() - 1.0
    }

    /// `φ_2`
    pub fn phi_2(self) -> f32 {
        self.phi_1() / self.z - 1.0
    }

    /// `φ_3`
    pub fn phi_3(self) -> f32 {
        (self.phi_1() - self.z) / (self.z * self.z) - 0.5
    }
}
