//! DEIS: the diffusion exponential integrator sampler.
//!
//! "Fast Sampling of Diffusion Models with Exponential Integrator"
//! (<https://arxiv.org/abs/2204.13902>), equations 14 and 15, in the variant `log ρ` with
//! `ρ = σ / α`: the polynomial through the latest epsilon predictions `m_i` at `ln ρ_i`, with
//! Lagrange polynomials `l_i`, is integrated over the step from `s` to `t`:
//!
//! ```text
//! x_t = (α_t / α_s) x_s + α_t Σ m_i ∫ l_i(ln ρ) dρ
//!     = (α_t / α_s) x_s + σ_t Σ m_i ∫ e^(u - ln ρ_t) l_i(u) du
//! ```
//!
//! The integrals are f64. Those of Diffusers are f32 and lose half their digits at three points or
//! hundreds of steps.

use serde::{Deserialize, Serialize};

use super::prelude::*;
use crate::schedule::flow::{FlowOptions, ShiftOptions};
use crate::step::adams::exponential_integrals;
use crate::step::multistep::{FinalOrder, MAX_DPM_ORDER, check_order, check_steps};

/// The family of DEIS (the key `algorithm_type`); the values of DPM-Solver are read as `deis`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DEISAlgorithmType {
    /// Multistep, by polynomials.
    #[serde(alias = "dpmsolver", alias = "dpmsolver++")]
    Deis,
}

/// The variable of the polynomial (the key `solver_type`); the other multistep solvers' types are
/// read as `logrho`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DEISSolverType {
    /// `ln ρ`
    #[serde(alias = "midpoint", alias = "heun", alias = "bh1", alias = "bh2")]
    Logrho,
}

options! {
    /// Options of [`DEISMultistepScheduler`].
    pub struct DEISMultistepConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The number of model outputs in a step, 1 to 3.
        pub solver_order: usize = 2,
        /// The family of the solver: there is one.
        pub algorithm_type: DEISAlgorithmType = DEISAlgorithmType::Deis,
        /// The variable of the polynomial: there is one.
        pub solver_type: DEISSolverType = DEISSolverType::Logrho,
        /// Whether the order is reduced at the end of runs with fewer than 15 steps.
        pub lower_order_final: bool = true,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub flow: FlowOptions = FlowOptions::default(),
        pub shift: ShiftOptions = ShiftOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// A multistep solver of the diffusion ODE, by epsilon prediction. A run ends at the smallest sigma
/// of the noise schedule.
pub type DEISMultistepScheduler<B> = Driver<B, DEISMultistepConfig>;

impl DEISMultistepConfig {
    /// The coefficients of a step of a run, after `taken` steps.
    fn coefficients(&self, schedule: &Schedule, index: usize, taken: usize) -> Coefficients {
        let final_order = FinalOrder {
            lower_order_final: self.lower_order_final,
            euler_at_final: false,
        };
        let limit = final_order.limit(index, schedule.timesteps.len());
        let order = self.solver_order.min(taken + 1).min(limit);
        let point = |index: usize| AlphaSigma::of_ratio(schedule.sigmas[index]);
        let log_rho = |index: usize| -f64::from(point(index).lambda());
        let points: Vec<f64> = (0..order).map(|i| log_rho(index - i)).collect();
        let integrals = exponential_integrals(&points, 1.0, points[0], log_rho(index + 1));
        let (s, t) = (point(index), point(index + 1));
        let outputs = integrals.iter().map(|&integral| t.sigma * integral as f32);
        Coefficients {
            sample: t.alpha / s.alpha,
            outputs: outputs.collect(),
            z: None,
        }
    }
}

impl Sampler for DEISMultistepConfig {
    const CLASS: &'static str = "DEISMultistepScheduler";
    const NAMES: Names = Names {
        short: "deis",
        about: "exponential integrator, multistep: 15 to 25 steps",
        popular: &[("DEIS", &[])],
    };

    /// The latest epsilon predictions, newest first: at most `solver_order`.
    type History<B: Backend> = Vec<Tensor<B, 4>>;

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
        )
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        self.betas.noise_schedule(Self::CLASS)
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let table = noise_schedule.sigmas();
        let schedule = self.sigmas.sigma_schedule(Self::CLASS)?;
        let spacing = self.spacing.over(Self::CLASS, &self.betas);
        let (steps, range) = (request.steps(Self::CLASS)?, SigmaRange::of_table(&table));
        let grid = SigmaGrid::between(spacing, steps, schedule, range, &table)?;
        let last = grid.final_sigma(schedule, &table);
        let run = grid.to(last);
        check_steps(Self::CLASS, steps, |index| {
            self.coefficients(&run, index, index)
        })?;
        Ok(run)
    }

    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        outputs: &mut Self::History<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let prediction = Prediction::of(self.prediction_type, &step);
        let clipping = self.threshold.clipping(Self::CLASS)?;
        let output = prediction.integrand(place.alpha_sigma(), clipping, Integrand::Epsilon);
        let coefficients = self.coefficients(place.schedule, place.index, outputs.len());
        remember(outputs, output, self.solver_order);
        Ok(StepOutput {
            prev_sample: coefficients.apply(step.sample, outputs, None),
            pred_original_sample: None,
        })
    }
}
