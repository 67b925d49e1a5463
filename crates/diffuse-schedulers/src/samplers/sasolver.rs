//! SA-Solver: a stochastic Adams method.
//!
//! "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models"
//! (<https://arxiv.org/abs/2309.05019>), equations 14 and 17, algorithm 1. In `λ = ln(α / σ)`, from
//! `s` to `t` with `h = λ_t - λ_s`, noise of strength `τ`, and the Lagrange polynomials `l_i`
//! through the latest model outputs `m_i`, by data prediction or by epsilon prediction:
//!
//! ```text
//! data     x_t = (σ_t / σ_s) e^(-τ² h) x_s + σ_t √(1 - e^(-2 τ² h)) z
//!                + (1 + τ²) α_t Σ m_i ∫ e^((1 + τ²) (λ - λ_t)) l_i(λ) dλ
//! epsilon  x_t = (α_t / α_s) x_s + τ σ_t √(e^(2h) - 1) z
//!                - (1 + τ²) σ_t Σ m_i ∫ e^(λ_t - λ) l_i(λ) dλ
//! ```
//!
//! The predictor uses `m_i` at `s` and before. After the model evaluation at `x_t`, the corrector
//! repeats the step with that output as well, and the same `z`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::prelude::*;
use crate::VarianceType;
use crate::schedule::flow::FlowOptions;
use crate::step::adams::exponential_integrals;
use crate::step::multistep::{check_order, not_finite};

options! {
    /// Options of [`SASolverScheduler`].
    pub struct SASolverConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The number of model outputs in the predictor, 1 to 4.
        pub predictor_order: usize = 2,
        /// The number of model outputs in the corrector, 1 to 4.
        pub corrector_order: usize = 2,
        /// Must be null: the strength of noise is 1 for timesteps from 200 to 800, and 0 for the
        /// others.
        pub tau_func: Option<Value> = None,
        /// The integrand.
        pub algorithm_type: SAAlgorithmType = SAAlgorithmType::DataPrediction,
        /// Whether the order is reduced at the end.
        pub lower_order_final: bool = true,
        /// The smallest `λ = ln(α / σ)` to visit, for schedules that end in pure noise.
        pub lambda_min_clipped: f64 = f64::NEG_INFINITY,
        /// The variance that the model also predicts; `learned` and `learned_range` drop it from
        /// the output.
        pub variance_type: Option<VarianceType> = None,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub flow: FlowOptions = FlowOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// A multistep predictor and corrector of the diffusion SDE.
pub type SASolverScheduler<B> = Driver<B, SASolverConfig>;

/// The integrand of SA-Solver (the key `algorithm_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SAAlgorithmType {
    /// The predicted image.
    DataPrediction,
    /// The predicted noise.
    NoisePrediction,
}

const MAX_ORDER: usize = 4;

/// The state of a run.
#[derive(Debug, Default)]
pub struct SAHistory<B: Backend> {
    /// The latest model outputs, newest first.
    outputs: Vec<Tensor<B, 4>>,
    latest: Option<Latest<B>>,
}

/// The step that the corrector repeats.
#[derive(Debug)]
struct Latest<B: Backend> {
    start: Tensor<B, 4>,
    noise: Tensor<B, 4>,
    tau: f64,
    order: usize,
}

/// The strength of noise at a timestep.
fn tau(timestep: f64) -> f64 {
    match (200.0..=800.0).contains(&timestep) {
        true => 1.0,
        false => 0.0,
    }
}

impl SASolverConfig {
    fn integrand(&self) -> Integrand {
        match self.algorithm_type {
            SAAlgorithmType::DataPrediction => Integrand::Data,
            SAAlgorithmType::NoisePrediction => Integrand::Epsilon,
        }
    }

    /// The coefficients of the step from index `source` to the next one, with model outputs from
    /// index `newest` backwards.
    fn coefficients(
        &self,
        run: &Schedule,
        source: usize,
        newest: usize,
        order: usize,
        tau: f64,
    ) -> Coefficients {
        let point = |index: usize| AlphaSigma::of_ratio(run.sigmas[index]);
        let lambda = |index: usize| f64::from(point(index).lambda());
        let (s, t) = (point(source), point(source + 1));
        let (start, end) = (lambda(source), lambda(source + 1));
        let points: Vec<f64> = (0..order).map(|i| lambda(newest - i)).collect();
        let (h, strength) = (end - start, 1.0 + tau * tau);
        let (ratio, scale, noise, mut integrals) = match self.integrand() {
            Integrand::Data => (
                f64::from(t.sigma / s.sigma) * (-tau * tau * h).exp(),
                strength * f64::from(t.alpha),
                f64::from(t.sigma) * (1.0 - (-2.0 * tau * tau * h).exp()).sqrt(),
                exponential_integrals(&points, strength, start, end),
            ),
            Integrand::Epsilon => (
                f64::from(t.alpha / s.alpha),
                -strength * f64::from(t.sigma),
                tau * f64::from(t.sigma) * ((2.0 * h).exp() - 1.0).sqrt(),
                exponential_integrals(&points, -1.0, start, end),
            ),
        };
        if self.integrand() == Integrand::Data && order == 2 {
            // The authors' code uses the limit for small `h` at this order:
            // ∫ (λ - λ_s) dλ = h² / 2.
            let exact = (strength * h - 1.0 + (-strength * h).exp()) / (strength * strength);
            let change = (h * h / 2.0 - exact) / (points[0] - points[1]);
            integrals[0] += change;
            integrals[1] -= change;
        }
        let outputs = integrals.iter().map(|integral| (scale * integral) as f32);
        Coefficients {
            sample: ratio as f32,
            outputs: outputs.collect(),
            z: Some(noise as f32),
        }
    }

    /// The orders of the predictor at an index, and of the corrector that follows, after `taken`
    /// steps.
    fn orders(&self, index: usize, steps: usize, taken: usize) -> (usize, usize) {
        let left = match self.lower_order_final {
            true => steps - index,
            false => MAX_ORDER,
        };
        (
            self.predictor_order.min(left).min(taken + 1),
            self.corrector_order.min(left + 1).min(taken + 2),
        )
    }

    /// Whether the step at an index, and its correction, have a finite result.
    fn is_finite(&self, run: &Schedule, index: usize) -> bool {
        let (predictor, corrector) = self.orders(index, run.steps, index);
        let finite = |newest: usize, order: usize| {
            self.coefficients(run, index, newest, order, 1.0)
                .all_finite()
        };
        let last = index + 1 == run.steps;
        finite(index, predictor) && (last || finite(index + 1, corrector))
    }
}

impl Sampler for SASolverConfig {
    const CLASS: &'static str = "SASolverScheduler";
    const NAMES: Names = Names {
        short: "sa",
        about: "stochastic multistep predictor and corrector: 20 to 50 steps",
        popular: &[("SA-Solver", &[])],
    };

    type History<B: Backend> = SAHistory<B>;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: true,
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        Process::Timesteps
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.flow.refuse(Self::CLASS)?;
        self.sigmas.sigma_schedule(Self::CLASS)?;
        self.threshold.clipping(Self::CLASS)?;
        check_order(
            Self::CLASS,
            "predictor_order",
            self.predictor_order,
            MAX_ORDER,
        )?;
        check_order(
            Self::CLASS,
            "corrector_order",
            self.corrector_order,
            MAX_ORDER,
        )?;
        require(Self::CLASS, "tau_func", &self.tau_func, &[None])?;
        if self.integrand() == Integrand::Epsilon && self.threshold.thresholding {
            return Err(SchedulerError::clash(
                Self::CLASS,
                "`algorithm_type` `noise_prediction` and `thresholding` `true`",
                "only predicted images are clipped, choose `algorithm_type` \
                 `data_prediction`",
            ));
        }
        Ok(())
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
        let spacing = spacing.clipped(noise_schedule, self.lambda_min_clipped)?;
        let (steps, range) = (request.steps(Self::CLASS)?, SigmaRange::of_table(&table));
        let grid = SigmaGrid::between(spacing, steps, schedule, range, &table)?;
        let last = grid.final_sigma(schedule, &table);
        let run = grid.to(last);
        match (0..run.steps).find(|&index| !self.is_finite(&run, index)) {
            None => Ok(run),
            Some(index) => Err(not_finite(Self::CLASS, index, run.steps)),
        }
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        history: &mut SAHistory<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (run, index) = (place.schedule, place.index);
        let (kind, variance_type) = (self.prediction_type, self.variance_type);
        let prediction = Prediction::without_variance(kind, &step, variance_type);
        let clipping = self.threshold.clipping(Self::CLASS)?;
        let output = prediction.integrand(place.alpha_sigma(), clipping, self.integrand());
        let taken = history.outputs.len();
        let kept = self.predictor_order.max(self.corrector_order - 1);
        remember(&mut history.outputs, output, kept + 1);
        let sample = match history.latest.take() {
            None => step.sample,
            Some(latest) => self
                .coefficients(run, index - 1, index, latest.order, latest.tau)
                .apply(latest.start, &history.outputs, Some(latest.noise)),
        };
        history.outputs.truncate(kept);
        let noise = step.noise.like(&sample)?;
        let (predictor, order) = self.orders(index, run.steps, taken);
        let tau = tau(step.timestep);
        let coefficients = self.coefficients(run, index, index, predictor, tau);
        let z = Some(noise.clone());
        let prev_sample = coefficients.apply(sample.clone(), &history.outputs, z);
        history.latest = Some(Latest {
            start: sample,
            noise,
            tau,
            order,
        });
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}
