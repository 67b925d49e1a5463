//! The weights of a DPM-Solver step, multistep or singlestep.
//!
//! "DPM-Solver" (<https://arxiv.org/abs/2206.00927>), "DPM-Solver++" (<https://arxiv.org/abs/2211.01095>). The
//! derivatives of the step in `exponential.rs` come from a polynomial through the model's answer at its base and at one
//! or two other points `r` (in units of the step; a multistep solver's are negative):
//!
//! ```text
//! slope_r = (m_r - m) / r
//! order 2   m' = slope_r
//! order 3   m' = (q slope_p - p slope_q) / (q - p),   m'' = c (slope_q - slope_p) / (q - p)
//! ```
//!
//! The curvature `c` is 2 for a parabola; the reference's multistep solvers take 1, as the paper's own code does.
//! `midpoint` replaces `φ_2` by `φ_1 / 2`, its value for small steps.

use serde::{Deserialize, Serialize};

use crate::exponential::Exponential;
use crate::mixture::Mixture;
use crate::weights::Weights;
use crate::{FinalSigmasType, SchedulerConfig, SchedulerError};

/// The equation that DPM-Solver solves (the key `algorithm_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DPMAlgorithmType {
    /// The ODE, by predicted noises.
    #[serde(rename = "dpmsolver")]
    DPMSolver,
    /// The ODE, by predicted images.
    #[serde(rename = "dpmsolver++")]
    DPMSolverPlusPlus,
    /// The SDE, by predicted noises.
    #[serde(rename = "sde-dpmsolver")]
    SDEDPMSolver,
    /// The SDE, by predicted images.
    #[serde(rename = "sde-dpmsolver++")]
    SDEDPMSolverPlusPlus,
    /// What [`DEISMultistepScheduler`](crate::DEISMultistepScheduler) writes; read as `dpmsolver++`.
    #[serde(rename = "deis")]
    DEIS,
}

impl DPMAlgorithmType {
    /// Whether predicted images are integrated, and not noises.
    pub(crate) fn integrates_images(self) -> bool {
        !matches!(self, Self::DPMSolver | Self::SDEDPMSolver)
    }

    /// Whether noise is added in each step.
    pub(crate) fn adds_noise(self) -> bool {
        matches!(self, Self::SDEDPMSolver | Self::SDEDPMSolverPlusPlus)
    }

    /// Refuses a run to level 0 where the last step would be infinitely long.
    pub(crate) fn check_end(
        self,
        class: &'static str,
        end: FinalSigmasType,
    ) -> Result<(), SchedulerError> {
        let images = matches!(self, Self::DPMSolverPlusPlus | Self::SDEDPMSolverPlusPlus);
        match end == FinalSigmasType::Zero && !images {
            false => Ok(()),
            true => Err(SchedulerError::Clash {
                class,
                keys: format!(
                    "`algorithm_type` `{}` and `final_sigmas_type` `zero`",
                    self.name()
                ),
                advice:
                    "the last step is infinitely long, choose `final_sigmas_type` `sigma_min`, or \
                         `algorithm_type` `dpmsolver++`"
                        .into(),
            }),
        }
    }

    /// Refuses the order that the SDE of noises has no formula for.
    pub(crate) fn check_order(
        self,
        class: &'static str,
        order: usize,
    ) -> Result<(), SchedulerError> {
        match (self, order) {
            (Self::SDEDPMSolver, 3) => Err(SchedulerError::Clash {
                class,
                keys: "`algorithm_type` `sde-dpmsolver` and `solver_order` `3`".into(),
                advice: "choose `solver_order` `2`, or `algorithm_type` `sde-dpmsolver++`".into(),
            }),
            _ => Ok(()),
        }
    }

    /// Reads DEIS's value as `dpmsolver++`, in the configuration too.
    pub(crate) fn settle(&mut self, config: &mut SchedulerConfig) {
        if *self == Self::DEIS {
            *self = Self::DPMSolverPlusPlus;
            config.patch("algorithm_type", self.name());
        }
    }

    fn name(self) -> String {
        let name = serde_json::to_value(self).expect("a name is a string");
        name.as_str().unwrap_or_default().to_string()
    }

    /// The terms of a step that depend on its ends alone.
    fn exponential(self, s: Mixture, t: Mixture) -> Exponential {
        match self {
            Self::DPMSolver => Exponential::of_noises(s, t),
            Self::DPMSolverPlusPlus | Self::DEIS => Exponential::of_images(s, t),
            Self::SDEDPMSolver => Exponential::of_noises_with_noise(s, t),
            Self::SDEDPMSolverPlusPlus => Exponential::of_images_with_noise(s, t),
        }
    }
}

/// How a second-order step weighs the slope (the key `solver_type`); the other multistep solvers' types are read as
/// `midpoint`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DPMSolverType {
    /// `φ_1 / 2`
    #[serde(alias = "logrho", alias = "bh1", alias = "bh2")]
    Midpoint,
    /// `φ_2`
    Heun,
}

/// A rule for DPM-Solver steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DPMRule {
    pub algorithm_type: DPMAlgorithmType,
    pub solver_type: DPMSolverType,
}

impl DPMRule {
    /// A step from the newest of some levels before `t` (oldest first) to `t`, with the model's answer at each of them.
    pub fn multistep(self, levels: &[Mixture], t: Mixture) -> Weights {
        let [earlier @ .., s] = levels else {
            panic!("a step starts at a level")
        };
        let terms = self.algorithm_type.exponential(*s, t);
        let h = t.lambda() - s.lambda();
        let mut r = earlier
            .iter()
            .rev()
            .map(|level| (level.lambda() - s.lambda()) / h);
        let outputs = match (r.next(), r.next()) {
            (None, _) => vec![-terms.scale * terms.phi_1()],
            (Some(r), None) => self.line(terms, r).to_vec(),
            (Some(p), Some(q)) => self.parabola(terms, 1.0, p, q).to_vec(),
        };
        self.weights(terms, outputs)
    }

    /// A step from the oldest of some levels before `t` (oldest first) to `t`, with the model's answer at each of them.
    pub fn singlestep(self, levels: &[Mixture], t: Mixture) -> Weights {
        let [s, within @ ..] = levels else {
            panic!("a step starts at a level")
        };
        let terms = self.algorithm_type.exponential(*s, t);
        let h = t.lambda() - s.lambda();
        let mut r = within.iter().map(|level| (level.lambda() - s.lambda()) / h);
        let mut outputs = match (r.next(), r.next(), self.solver_type) {
            (None, ..) => vec![-terms.scale * terms.phi_1()],
            (Some(r), None, _) => self.line(terms, r).to_vec(),
            (Some(_), Some(q), DPMSolverType::Midpoint) => {
                let heun = Self {
                    solver_type: DPMSolverType::Heun,
                    ..self
                };
                let [base, at_q] = heun.line(terms, q);
                vec![base, 0.0, at_q]
            }
            (Some(p), Some(q), DPMSolverType::Heun) => self.parabola(terms, 2.0, p, q).to_vec(),
        };
        outputs.reverse();
        self.weights(terms, outputs)
    }

    fn weights(self, terms: Exponential, outputs: Vec<f32>) -> Weights {
        Weights {
            sample: terms.ratio,
            outputs,
            extra: terms.noise,
        }
    }

    /// The weights of the answers at the base and at `r`.
    fn line(self, terms: Exponential, r: f32) -> [f32; 2] {
        let phi = match self.solver_type {
            DPMSolverType::Midpoint => 0.5 * terms.phi_1(),
            DPMSolverType::Heun => terms.phi_2(),
        };
        let at_r = -terms.scale * phi / r;
        [-terms.scale * terms.phi_1() - at_r, at_r]
    }

    /// The weights of the answers at the base, at `p` and at `q`.
    fn parabola(self, terms: Exponential, curvature: f32, p: f32, q: f32) -> [f32; 3] {
        let phi_3 = match self.algorithm_type {
            // The reference's quirk: a sign in the SDE's third term, which makes it one too large.
            DPMAlgorithmType::SDEDPMSolverPlusPlus => terms.phi_3() + 1.0,
            _ => terms.phi_3(),
        };
        let (first, second) = (
            -terms.scale * terms.phi_2(),
            -terms.scale * phi_3 * curvature,
        );
        let at_p = (first * q - second) / (q - p) / p;
        let at_q = (second - first * p) / (q - p) / q;
        [-terms.scale * terms.phi_1() - at_p - at_q, at_p, at_q]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a model says that sees the same image, or the same noise, everywhere is taken whole by every rule.
    #[test]
    fn constant_answers_are_kept() {
        use DPMAlgorithmType::*;
        let levels: Vec<Mixture> = [14.0, 9.0, 5.0, 3.0].map(Mixture::of_ratio).to_vec();
        for algorithm_type in [
            DPMSolver,
            DPMSolverPlusPlus,
            SDEDPMSolver,
            SDEDPMSolverPlusPlus,
        ] {
            for solver_type in [DPMSolverType::Midpoint, DPMSolverType::Heun] {
                for first in 0..3 {
                    let rule = DPMRule {
                        algorithm_type,
                        solver_type,
                    };
                    let (t, before) = levels[first..].split_last().unwrap();
                    for (weights, s) in [
                        (rule.multistep(before, *t), before[before.len() - 1]),
                        (rule.singlestep(before, *t), before[0]),
                    ] {
                        assert_eq!(weights.outputs.len(), before.len());
                        let answer = weights.outputs.iter().sum::<f32>();
                        let (kept, wanted) = match algorithm_type.integrates_images() {
                            true => (weights.sample * s.alpha + answer, t.alpha),
                            false => (weights.sample * s.alpha, t.alpha),
                        };
                        assert!(
                            (kept - wanted).abs() < 1e-5,
                            "{rule:?}: {kept} is not {wanted}"
                        );
                    }
                }
            }
        }
    }
}
