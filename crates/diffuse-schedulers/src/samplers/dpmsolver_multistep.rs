//! DPM-Solver and DPM-Solver++, multistep.
//!
//! "DPM-Solver++" (<https://arxiv.org/abs/2211.01095>), algorithm 2, DPM-Solver++(2M). In the time
//! `λ = ln(α / σ)`, from `s` (the paper's `t_{i-1}`) to `t` (`t_i`) with `h = λ_t - λ_s`, let `m_0`
//! be the model output at `s`, `m_1` that at the point before, and `r = (λ_s - λ_1) / h`:
//!
//! ```text
//! D   = (1 + 1 / 2r) m_0 - 1 / 2r m_1
//! x_t = (σ_t / σ_s) x_s - α_t (e^-h - 1) D
//! ```
//!
//! This is the ODE by data prediction. "DPM-Solver" (<https://arxiv.org/abs/2206.00927>) solves it
//! by epsilon prediction, and both have an SDE (appendix A of the first): they change the
//! factors of `x_s` and `D` ([`ExponentialStep`]), not `D`.

use serde::{Deserialize, Serialize};

use super::prelude::*;
use crate::VarianceType;
use crate::schedule::flow::{FlowOptions, ShiftOptions};
use crate::schedule::spacing::check_whole_timesteps;
use crate::step::multistep::{FinalOrder, MAX_DPM_ORDER, check_order, check_steps};
use crate::step::phi::ExponentialStep;

options! {
    /// Options of [`DPMSolverMultistepScheduler`].
    pub struct DPMSolverMultistepConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The number of model outputs in a step, 1 to 3.
        pub solver_order: usize = 2,
        /// The equation that is solved.
        pub algorithm_type: DPMAlgorithmType = DPMAlgorithmType::DPMSolverPlusPlus,
        /// The coefficient of the slope in a second-order step.
        pub solver_type: DPMSolverType = DPMSolverType::Midpoint,
        /// Whether the order is reduced at the end of runs with fewer than 15 steps.
        pub lower_order_final: bool = true,
        /// Whether the last step has order 1.
        pub euler_at_final: bool = false,
        /// Whether `λ` is evenly spaced.
        pub use_lu_lambdas: bool = false,
        /// The final sigma of a run.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
        /// The smallest `λ = ln(α / σ)` to visit, for schedules that end in pure noise.
        pub lambda_min_clipped: f64 = f64::NEG_INFINITY,
        /// The variance that the model also predicts; `learned` and `learned_range` drop it from
        /// the output.
        pub variance_type: Option<VarianceType> = None,
        /// Whether the betas are rescaled to zero terminal SNR.
        pub rescale_betas_zero_snr: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub flow: FlowOptions = FlowOptions::default(),
        pub shift: ShiftOptions = ShiftOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// A multistep solver of the diffusion ODE or SDE: about 20 steps.
pub type DPMSolverMultistepScheduler<B> = Driver<B, DPMSolverMultistepConfig>;

/// The equation that DPM-Solver solves (the key `algorithm_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DPMAlgorithmType {
    /// The ODE, by epsilon prediction.
    #[serde(rename = "dpmsolver")]
    DPMSolver,
    /// The ODE, by data prediction.
    #[serde(rename = "dpmsolver++")]
    DPMSolverPlusPlus,
    /// The SDE, by epsilon prediction.
    #[serde(rename = "sde-dpmsolver")]
    SDEDPMSolver,
    /// The SDE, by data prediction.
    #[serde(rename = "sde-dpmsolver++")]
    SDEDPMSolverPlusPlus,
    /// The value of [`DEISMultistepScheduler`](crate::DEISMultistepScheduler), read as
    /// `dpmsolver++`.
    #[serde(rename = "deis")]
    DEIS,
}

/// The coefficient of the slope in a second-order step (the key `solver_type`); the other multistep
/// solvers' types are read as `midpoint`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DPMSolverType {
    /// `φ_1 / 2`, as in the algorithm.
    #[serde(alias = "logrho", alias = "bh1", alias = "bh2")]
    Midpoint,
    /// `φ_2`, whose limit for small steps is `φ_1 / 2`.
    Heun,
}

/// A multistep rule of DPM-Solver.
#[derive(Clone, Copy, Debug)]
pub(super) struct MultistepRule {
    pub algorithm_type: DPMAlgorithmType,
    pub solver_type: DPMSolverType,
    pub solver_order: usize,
    pub final_order: FinalOrder,
}

impl MultistepRule {
    /// The coefficients of a step of a run, after `taken` steps.
    pub fn coefficients(
        &self,
        schedule: &Schedule,
        process: Process,
        index: usize,
        taken: usize,
    ) -> Coefficients {
        let limit = self.final_order.limit(index, schedule.timesteps.len());
        let order = self.solver_order.min(taken + 1).min(limit);
        let points: Vec<AlphaSigma> = schedule.sigmas[index + 1 - order..=index + 1]
            .iter()
            .map(|&sigma| process.alpha_sigma(sigma))
            .collect();
        self.between(&points[..order], points[order])
    }

    /// The highest order of the steps of a run; an error if a step has no finite result.
    pub fn check(
        &self,
        class: &'static str,
        run: &Schedule,
        process: Process,
    ) -> Result<usize, SchedulerError> {
        check_steps(class, run.steps, |index| {
            self.coefficients(run, process, index, index)
        })
    }

    /// Computes a step from the latest model outputs.
    pub fn step<B: Backend>(
        &self,
        place: Place<'_>,
        process: Process,
        sample: Tensor<B, 4>,
        output: Tensor<B, 4>,
        noise: Option<Tensor<B, 4>>,
        outputs: &mut Vec<Tensor<B, 4>>,
    ) -> StepOutput<B> {
        let taken = outputs.len();
        let coefficients = self.coefficients(place.schedule, process, place.index, taken);
        remember(outputs, output, self.solver_order);
        StepOutput {
            prev_sample: coefficients.apply(sample, outputs, noise),
            pred_original_sample: None,
        }
    }

    /// The coefficients of a step from the last of some points to `t`.
    fn between(&self, points: &[AlphaSigma], t: AlphaSigma) -> Coefficients {
        let [earlier @ .., s] = points else {
            panic!("a step starts at a point")
        };
        let step = self.algorithm_type.exponential_step(*s, t);
        let h = t.lambda() - s.lambda();
        let mut r = earlier.iter().rev().map(|p| (s.lambda() - p.lambda()) / h);
        // For `dpmsolver++`, `-α_t (e^-h - 1)`.
        let whole = -step.scale * step.phi_1();
        let outputs = match (r.next(), r.next()) {
            // Order 1: D = m_0, which is DDIM.
            (None, _) => vec![whole],
            // Order 2, algorithm 2: D = m_0 + ½ (m_0 - m_1) / r.
            (Some(r), None) => {
                let slope = match self.solver_type {
                    DPMSolverType::Midpoint => -step.scale * (0.5 * step.phi_1()) / r,
                    DPMSolverType::Heun => -step.scale * step.phi_2() / r,
                };
                vec![whole + slope, -slope]
            }
            // Order 3: with d_i = (m_0 - m_i) / r_i, the derivatives of the parabola are
            // m' = (r_2 d_1 - r_1 d_2) / (r_2 - r_1) and m'' = 2 (d_1 - d_2) / (r_2 - r_1).
            // Diffusers, like the authors' code, takes half of m''.
            (Some(r_1), Some(r_2)) => {
                let first = -step.scale * step.phi_2();
                let second = -step.scale * self.algorithm_type.phi_3(step);
                let m_1 = -((first * r_2 + second) / (r_2 - r_1) / r_1);
                let m_2 = (second + first * r_1) / (r_2 - r_1) / r_2;
                vec![whole - m_1 - m_2, m_1, m_2]
            }
        };
        Coefficients {
            sample: step.ratio,
            outputs,
            z: step.noise,
        }
    }
}

impl DPMAlgorithmType {
    /// The integrand.
    pub(super) fn integrand(self) -> Integrand {
        match self {
            Self::DPMSolver | Self::SDEDPMSolver => Integrand::Epsilon,
            Self::DPMSolverPlusPlus | Self::SDEDPMSolverPlusPlus | Self::DEIS => Integrand::Data,
        }
    }

    /// Whether noise is added in each step.
    pub(super) fn adds_noise(self) -> bool {
        matches!(self, Self::SDEDPMSolver | Self::SDEDPMSolverPlusPlus)
    }

    /// The terms of a step that depend on its ends alone.
    pub(super) fn exponential_step(self, s: AlphaSigma, t: AlphaSigma) -> ExponentialStep {
        match self {
            Self::DPMSolver => ExponentialStep::epsilon_ode(s, t),
            Self::DPMSolverPlusPlus | Self::DEIS => ExponentialStep::data_ode(s, t),
            Self::SDEDPMSolver => ExponentialStep::epsilon_sde(s, t),
            Self::SDEDPMSolverPlusPlus => ExponentialStep::data_sde(s, t),
        }
    }

    /// `φ_3`. Diffusers' quirk: a wrong sign in the third term of the SDE makes it too large by 1.
    pub(super) fn phi_3(self, step: ExponentialStep) -> f32 {
        match self {
            Self::SDEDPMSolverPlusPlus => step.phi_3() + 1.0,
            _ => step.phi_3(),
        }
    }

    /// An error for a run to sigma 0 whose last step would be infinitely long.
    pub(super) fn check_end(
        self,
        class: &'static str,
        end: FinalSigmasType,
    ) -> Result<(), SchedulerError> {
        let data = matches!(self, Self::DPMSolverPlusPlus | Self::SDEDPMSolverPlusPlus);
        if end != FinalSigmasType::Zero || data {
            return Ok(());
        }
        let name = serde_json::to_value(self).unwrap_or_default();
        let name = name.as_str().unwrap_or_default();
        Err(SchedulerError::clash(
            class,
            format!("`algorithm_type` `{name}` and `final_sigmas_type` `zero`"),
            "the last step is infinitely long, choose `final_sigmas_type` `sigma_min`, or \
             `algorithm_type` `dpmsolver++`",
        ))
    }

    /// Reads DEIS's value as `dpmsolver++`.
    pub(super) fn settle(&mut self) {
        if *self == Self::DEIS {
            *self = Self::DPMSolverPlusPlus;
        }
    }
}

impl DPMSolverMultistepConfig {
    fn rule(&self) -> MultistepRule {
        MultistepRule {
            algorithm_type: self.algorithm_type,
            solver_type: self.solver_type,
            solver_order: self.solver_order,
            final_order: FinalOrder {
                lower_order_final: self.lower_order_final,
                euler_at_final: self.euler_at_final
                    || self.final_sigmas_type == FinalSigmasType::Zero,
            },
        }
    }

    fn sigma_schedule(&self) -> Result<Option<SigmaSchedule>, SchedulerError> {
        Ok(match self.sigmas.sigma_schedule(Self::CLASS)? {
            Some(SigmaSchedule::Karras) => Some(SigmaSchedule::Karras),
            _ if self.use_lu_lambdas => Some(SigmaSchedule::Lu),
            other => other,
        })
    }
}

/// Names with "SDE" imply the SDE.
const SDE: (&str, &str) = ("algorithm_type", "\"sde-dpmsolver++\"");

impl Sampler for DPMSolverMultistepConfig {
    const CLASS: &'static str = "DPMSolverMultistepScheduler";
    const NAMES: Names = Names {
        short: "dpm++-2m",
        about: "DPM-Solver++, multistep: 15 to 25 steps",
        popular: &[
            ("DPM++ 2M", &[]),
            ("DPM++ 2M Karras", &[KARRAS]),
            ("DPM++ 2M SDE", &[SDE]),
            ("DPM++ 2M SDE Karras", &[SDE, KARRAS]),
            ("DPM++ 3M SDE", &[SDE, ("solver_order", "3")]),
        ],
    };

    /// The latest model outputs, newest first: at most `solver_order`.
    type History<B: Backend> = Vec<Tensor<B, 4>>;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            noise: self.algorithm_type.adds_noise(),
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        Process::SigmaGrid
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.flow.refuse(Self::CLASS)?;
        self.shift.refuse(Self::CLASS)?;
        self.sigmas.sigma_schedule(Self::CLASS)?;
        self.threshold.clipping(Self::CLASS)?;
        check_order(
            Self::CLASS,
            "solver_order",
            self.solver_order,
            MAX_DPM_ORDER,
        )?;
        self.algorithm_type
            .check_end(Self::CLASS, self.final_sigmas_type)?;
        self.algorithm_type.settle();
        Ok(())
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        let rescale = self.rescale_betas_zero_snr;
        let noise_schedule = self.betas.rescaled_noise_schedule(Self::CLASS, rescale)?;
        Ok(noise_schedule.with_finite_last_sigma(rescale))
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let (table, train) = (noise_schedule.sigmas(), self.betas.num_train_timesteps);
        let (schedule, range) = (self.sigma_schedule()?, SigmaRange::of_table(&table));
        let grid = match request {
            TimestepRequest::Timesteps(timesteps) => {
                check_whole_timesteps(Self::CLASS, timesteps, train, schedule.is_some())?;
                SigmaGrid::at(timesteps.clone(), &table)
            }
            other => {
                let steps = other.steps(Self::CLASS)?;
                let spacing = self.spacing.over(Self::CLASS, &self.betas);
                let spacing = spacing.clipped(noise_schedule, self.lambda_min_clipped)?;
                match schedule {
                    // Diffusers' quirk: with cosine betas these timesteps are truncated.
                    Some(schedule) if self.betas.beta_schedule == BetaSchedule::SquaredcosCapV2 => {
                        spacing.check(steps)?;
                        let grid = SigmaGrid::along(schedule, range, steps, &table);
                        grid.map_timesteps(f64::trunc)
                    }
                    schedule => SigmaGrid::between(spacing, steps, schedule, range, &table)?,
                }
            }
        };
        let run = grid.to(self.final_sigmas_type.sigma(table[0]));
        let highest = self.rule().check(Self::CLASS, &run, self.process())?;
        if self.algorithm_type == DPMAlgorithmType::SDEDPMSolver && highest == 3 {
            return Err(SchedulerError::clash(
                Self::CLASS,
                "`algorithm_type` `sde-dpmsolver` and `solver_order` `3`",
                "choose `solver_order` `2`, or `algorithm_type` `sde-dpmsolver++`",
            ));
        }
        Ok(run)
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        outputs: &mut Self::History<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (kind, variance_type) = (self.prediction_type, self.variance_type);
        let prediction = Prediction::without_variance(kind, &step, variance_type);
        let clipping = self.threshold.clipping(Self::CLASS)?;
        let integrand = self.algorithm_type.integrand();
        let output = prediction.integrand(place.alpha_sigma(), clipping, integrand);
        let noise = match self.algorithm_type.adds_noise() {
            true => Some(step.noise.in_f32(&output)?),
            false => None,
        };
        let (rule, process) = (self.rule(), self.process());
        Ok(rule.step(place, process, step.sample, output, noise, outputs))
    }
}

/// Checks that a constant model output is integrated exactly from `s` to `t`.
#[cfg(test)]
pub(super) fn check_constant(
    coefficients: &Coefficients,
    algorithm_type: DPMAlgorithmType,
    s: AlphaSigma,
    t: AlphaSigma,
) {
    let kept = coefficients.sample * s.alpha;
    let image = match algorithm_type.integrand() {
        Integrand::Data => kept + coefficients.outputs.iter().sum::<f32>(),
        Integrand::Epsilon => kept,
    };
    assert!(
        (image - t.alpha).abs() < 1e-5,
        "{algorithm_type:?}: {image} is not {}",
        t.alpha
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(algorithm_type: DPMAlgorithmType, solver_type: DPMSolverType) -> MultistepRule {
        MultistepRule {
            algorithm_type,
            solver_type,
            solver_order: MAX_DPM_ORDER,
            final_order: FinalOrder {
                lower_order_final: false,
                euler_at_final: false,
            },
        }
    }

    /// The two lines of algorithm 2, in f64.
    #[test]
    fn second_order_is_algorithm_2() {
        let points = [14.0, 9.0, 5.0].map(AlphaSigma::of_ratio);
        let [earlier, s, t] = points.map(|p| (f64::from(p.alpha), f64::from(p.sigma)));
        let lambda = |(alpha, sigma): (f64, f64)| (alpha / sigma).ln();
        let h = lambda(t) - lambda(s);
        let r = (lambda(s) - lambda(earlier)) / h;
        let of_d = -t.0 * ((-h).exp() - 1.0);
        let expected = [t.1 / s.1, of_d * (1.0 + 1.0 / (2.0 * r)), -of_d / (2.0 * r)];
        let rule = rule(DPMAlgorithmType::DPMSolverPlusPlus, DPMSolverType::Midpoint);
        let actual = rule.between(&points[..2], points[2]);
        let actual = [actual.sample, actual.outputs[0], actual.outputs[1]];
        for (actual, expected) in actual.into_iter().zip(expected) {
            assert!((f64::from(actual) - expected).abs() < 1e-5 * expected.abs());
        }
    }

    /// A model that predicts the same image, or the same noise, everywhere is integrated exactly.
    #[test]
    fn constant_outputs_are_exact() {
        use DPMAlgorithmType::*;
        let points: Vec<AlphaSigma> = [14.0, 9.0, 5.0, 3.0].map(AlphaSigma::of_ratio).to_vec();
        for algorithm_type in [
            DPMSolver,
            DPMSolverPlusPlus,
            SDEDPMSolver,
            SDEDPMSolverPlusPlus,
        ] {
            for solver_type in [DPMSolverType::Midpoint, DPMSolverType::Heun] {
                for first in 0..3 {
                    let (t, before) = points[first..].split_last().unwrap();
                    let coefficients = rule(algorithm_type, solver_type).between(before, *t);
                    check_constant(&coefficients, algorithm_type, before[before.len() - 1], *t);
                    assert_eq!(coefficients.outputs.len(), before.len());
                }
            }
        }
    }
}
