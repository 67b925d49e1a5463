//! SA-Solver: a stochastic Adams method.
//!
//! "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models" (<https://arxiv.org/abs/2309.05019>),
//! equations 14 and 17, algorithm 1. In `λ = ln(α / σ)`, from `s` to `t` with `h = λ_t - λ_s`, noise of strength `τ`, and
//! the Lagrange polynomials `l_i` through the latest images or noises `m_i`:
//!
//! ```text
//! images  x_t = (σ_t / σ_s) e^(-τ² h) x_s + (1 + τ²) α_t Σ m_i ∫ e^((1 + τ²) (λ - λ_t)) l_i(λ) dλ + σ_t √(1 - e^(-2 τ² h)) z
//! noises  x_t = (α_t / α_s) x_s           - (1 + τ²) σ_t Σ m_i ∫ e^(λ_t - λ) l_i(λ) dλ           + τ σ_t √(e^(2h) - 1) z
//! ```
//!
//! The predictor has `m_i` at `s` and before. Once the model has seen `x_t`, the corrector takes the same step again with
//! the answer at `t` among them and the same `z`.

use burn::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{ClassConfig, Resolved, require, scheduler_config};
use crate::ladder::{Ladder, ladder_methods};
use crate::lagrange::exponential_integrals;
use crate::levels::Levels;
use crate::mixture::{self, Mixture};
use crate::multistep::{check_order, explain, image_channels};
use crate::prediction::{Bound, Prediction};
use crate::sigmas::SigmaRange;
use crate::weights::{Weights, remember};
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, Scheduler, SchedulerError, Step, StepOutput,
    TimestepRequest,
};

/// What SA-Solver integrates (the key `algorithm_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SAAlgorithmType {
    /// Predicted images.
    DataPrediction,
    /// Predicted noises.
    NoisePrediction,
}

scheduler_config! {
    /// Options of [`SASolverScheduler`].
    pub struct SASolverConfig for "SASolverScheduler" [
        noise(0.0001, 0.02, Linear), thresholding, sigmas, flow, clipped_lambdas, spacing(Linspace)
    ] {
        /// The number of points that the predictor's polynomial goes through, 1 to 4.
        pub predictor_order: usize = 2,
        /// The number of points that the corrector's polynomial goes through, 1 to 4.
        pub corrector_order: usize = 2,
        /// Must be null: the strength of noise is 1 for timesteps from 200 to 800, and 0 for the others.
        pub tau_func: Option<Value> = None,
        /// What is integrated.
        pub algorithm_type: SAAlgorithmType = SAAlgorithmType::DataPrediction,
        /// Whether the order goes down towards the end.
        pub lower_order_final: bool = true,
    }
}

const CLASS: &str = SASolverConfig::CLASS;

const MAX_ORDER: usize = 4;

/// A multistep predictor and corrector of the diffusion SDE.
#[derive(Debug)]
pub struct SASolverScheduler<B: Backend> {
    resolved: Resolved<SASolverConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    ladder: Ladder,
    /// The latest images or noises from the model, newest first.
    outputs: Vec<Tensor<B, 4>>,
    latest: Option<Latest<B>>,
}

/// What the corrector must know of the step that it takes again.
#[derive(Debug)]
struct Latest<B: Backend> {
    start: Tensor<B, 4>,
    noise: Tensor<B, 4>,
    tau: f64,
    order: usize,
}

/// The strength of noise at a timestep.
fn tau(timestep: f64) -> f64 {
    if (200.0..=800.0).contains(&timestep) {
        1.0
    } else {
        0.0
    }
}

impl<B: Backend> SASolverScheduler<B> {
    pub(crate) fn build(resolved: Resolved<SASolverConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        options.refuse_flow()?;
        options.sigma_curve()?;
        check_order(CLASS, "predictor_order", options.predictor_order, MAX_ORDER)?;
        check_order(CLASS, "corrector_order", options.corrector_order, MAX_ORDER)?;
        require(CLASS, "tau_func", &options.tau_func, &[None])?;
        if options.algorithm_type == SAAlgorithmType::NoisePrediction && options.thresholding {
            return Err(SchedulerError::Clash {
                class: CLASS,
                keys: "`algorithm_type` `noise_prediction` and `thresholding` `true`".into(),
                advice:
                    "only predicted images are bounded, choose `algorithm_type` `data_prediction`"
                        .into(),
            });
        }
        let noise_schedule = options.noise_schedule(BetaSchedule::COMMON, false)?;
        let bound = options.threshold_or(Bound::None)?;
        let (ladder, outputs) = (Ladder::default(), Vec::new());
        Ok(Self {
            noise_schedule,
            bound,
            ladder,
            outputs,
            latest: None,
            resolved,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    fn integrates_images(&self) -> bool {
        self.resolved.options.algorithm_type == SAAlgorithmType::DataPrediction
    }

    /// The weights of a step from rung `source` to the next one, with answers from rung `newest` up.
    fn weights(&self, source: usize, newest: usize, order: usize, tau: f64) -> Weights {
        let level = |rung: usize| Mixture::of_ratio(self.ladder.sigmas()[rung]);
        let lambda = |rung: usize| f64::from(level(rung).lambda());
        let (s, t) = (level(source), level(source + 1));
        let (start, end) = (lambda(source), lambda(source + 1));
        let points: Vec<f64> = (0..order).map(|i| lambda(newest - i)).collect();
        let (h, strength) = (end - start, 1.0 + tau * tau);
        let (ratio, scale, noise, mut integrals) = match self.integrates_images() {
            true => (
                f64::from(t.sigma / s.sigma) * (-tau * tau * h).exp(),
                strength * f64::from(t.alpha),
                f64::from(t.sigma) * (1.0 - (-2.0 * tau * tau * h).exp()).sqrt(),
                exponential_integrals(&points, strength, start, end),
            ),
            false => (
                f64::from(t.alpha / s.alpha),
                -strength * f64::from(t.sigma),
                tau * f64::from(t.sigma) * ((2.0 * h).exp() - 1.0).sqrt(),
                exponential_integrals(&points, -1.0, start, end),
            ),
        };
        if self.integrates_images() && order == 2 {
            // The paper's code takes the slope at this order as for small `h` (∫ (λ - λ_s) dλ = h² / 2).
            let exact = (strength * h - 1.0 + (-strength * h).exp()) / (strength * strength);
            let change = (h * h / 2.0 - exact) / (points[0] - points[1]);
            integrals[0] += change;
            integrals[1] -= change;
        }
        let outputs = integrals.iter().map(|integral| (scale * integral) as f32);
        Weights {
            sample: ratio as f32,
            outputs: outputs.collect(),
            extra: Some(noise as f32),
        }
    }

    /// The predictor's order at a rung, and that of the corrector that follows, after so many steps.
    fn orders(&self, rung: usize, taken: usize) -> (usize, usize) {
        let options = &self.resolved.options;
        let left = match options.lower_order_final {
            true => self.ladder.timesteps().len() - rung,
            false => MAX_ORDER,
        };
        (
            options.predictor_order.min(left).min(taken + 1),
            options.corrector_order.min(left + 1).min(taken + 2),
        )
    }
}

impl<B: Backend> Scheduler<B> for SASolverScheduler<B> {
    ladder_methods!();

    fn sigmas(&self) -> Option<&[f32]> {
        Some(self.ladder.sigmas())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: true,
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let table = self.noise_schedule.sigmas();
        let (curve, range) = (options.sigma_curve()?, SigmaRange::of_table(&table));
        let spacing = options
            .spacing()
            .clipped(&self.noise_schedule, options.lambda_min_clipped)?;
        let levels = Levels::between(spacing, request.steps(CLASS)?, curve, range, &table)?;
        let last = levels.last_of(curve, &table);
        let before = std::mem::replace(&mut self.ladder, levels.down_to(last));
        let steps = self.ladder.timesteps().len();
        let finite = |rung: &usize| {
            let (predictor, corrector) = self.orders(*rung, *rung);
            let corrected =
                rung + 1 == steps || self.weights(*rung, rung + 1, corrector, 1.0).all_finite();
            corrected && self.weights(*rung, *rung, predictor, 1.0).all_finite()
        };
        if let Some(rung) = (0..steps).find(|rung| !finite(rung)) {
            self.ladder = before;
            return Err(explain(CLASS, rung, steps));
        }
        self.outputs.clear();
        self.latest = None;
        Ok(())
    }

    fn advance(&mut self, mut step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let options = &self.resolved.options;
        let prediction = Prediction {
            kind: options.prediction_type,
            output: image_channels(step.model_output, &step.sample, options.variance_type),
            sample: step.sample.clone(),
        };
        let mixture = Mixture::of_ratio(self.ladder.sigmas()[rung]);
        let output = prediction.image_or_noise(mixture, self.bound, self.integrates_images());
        let taken = self.outputs.len();
        let kept = options.predictor_order.max(options.corrector_order - 1);
        remember(&mut self.outputs, output, kept + 1);
        let sample = match self.latest.take() {
            None => step.sample,
            Some(Latest {
                start,
                noise,
                tau,
                order,
            }) => self
                .weights(rung - 1, rung, order, tau)
                .apply(start, &self.outputs, Some(noise)),
        };
        self.outputs.truncate(kept);
        let noise = step.noise.like(&sample)?;
        let (predictor, order) = self.orders(rung, taken);
        let tau = tau(step.timestep);
        let prev_sample = self.weights(rung, rung, predictor, tau).apply(
            sample.clone(),
            &self.outputs,
            Some(noise.clone()),
        );
        self.latest = Some(Latest {
            start: sample,
            noise,
            tau,
            order,
        });
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }

    fn add_noise(
        &self,
        original: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        mixture::add_noise(&self.noise_schedule.mixtures(timesteps)?, original, noise)
    }
}
