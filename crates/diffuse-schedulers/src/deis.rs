//! DEIS: the diffusion exponential integrator sampler.
//!
//! "Fast Sampling of Diffusion Models with Exponential Integrator" (<https://arxiv.org/abs/2204.13902>), equations 14 and
//! 15, in the variant `log ρ` with `ρ = σ / α`: the polynomial through the latest noises `m_i` at `ln ρ_i`, with Lagrange
//! polynomials `l_i`, is integrated over the step from `s` to `t`:
//!
//! ```text
//! x_t = (α_t / α_s) x_s + α_t Σ m_i ∫ l_i(ln ρ) dρ
//!     = (α_t / α_s) x_s + σ_t Σ m_i ∫ e^(u - ln ρ_t) l_i(u) du
//! ```
//!
//! The integrals are f64. The reference's are f32 and lose half their digits at three points or hundreds of steps.

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::ladder::{Ladder, ladder_methods};
use crate::lagrange::exponential_integrals;
use crate::levels::Levels;
use crate::mixture::Mixture;
use crate::multistep::{self, LastSteps, MAX_DPM_ORDER, check_order};
use crate::prediction::{Bound, Prediction};
use crate::sigmas::SigmaRange;
use crate::weights::{Weights, remember};
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, Scheduler, SchedulerError, Step, StepOutput,
    TimestepRequest,
};

/// The family of DEIS (the key `algorithm_type`); DPM-Solver's names are read as `deis`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DEISAlgorithmType {
    /// Multistep, by polynomials.
    #[serde(alias = "dpmsolver", alias = "dpmsolver++")]
    Deis,
}

/// The variable of the polynomial (the key `solver_type`); the other multistep solvers' types are read as `logrho`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DEISSolverType {
    /// `ln ρ`
    #[serde(alias = "midpoint", alias = "heun", alias = "bh1", alias = "bh2")]
    Logrho,
}

scheduler_config! {
    /// Options of [`DEISMultistepScheduler`].
    pub struct DEISMultistepConfig for "DEISMultistepScheduler" [
        noise(0.0001, 0.02, Linear), thresholding, sigmas, flow, shifting, spacing(Linspace)
    ] {
        /// The number of points that the polynomial goes through, 1 to 3.
        pub solver_order: usize = 2,
        /// The family of the solver: there is one.
        pub algorithm_type: DEISAlgorithmType = DEISAlgorithmType::Deis,
        /// The variable of the polynomial: there is one.
        pub solver_type: DEISSolverType = DEISSolverType::Logrho,
        /// Whether the order goes down towards the end of a run of less than 15 steps.
        pub lower_order_final: bool = true,
    }
}

const CLASS: &str = DEISMultistepConfig::CLASS;

/// A multistep solver of the diffusion ODE, on predicted noises. A run ends at the smallest level of the schedule.
#[derive(Debug)]
pub struct DEISMultistepScheduler<B: Backend> {
    resolved: Resolved<DEISMultistepConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    ladder: Ladder,
    /// The latest noises from the model, newest first: at most `solver_order`.
    outputs: Vec<Tensor<B, 4>>,
}

impl<B: Backend> DEISMultistepScheduler<B> {
    pub(crate) fn build(resolved: Resolved<DEISMultistepConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        options.refuse_flow()?;
        options.refuse_shifting()?;
        options.sigma_curve()?;
        check_order(CLASS, "solver_order", options.solver_order, MAX_DPM_ORDER)?;
        let noise_schedule = options.noise_schedule(BetaSchedule::COMMON, false)?;
        let bound = options.threshold_or(Bound::None)?;
        let (ladder, outputs) = (Ladder::default(), Vec::new());
        Ok(Self {
            noise_schedule,
            bound,
            ladder,
            outputs,
            resolved,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// The weights of a step from a rung, after so many steps.
    fn weights(&self, rung: usize, taken: usize) -> Weights {
        let options = &self.resolved.options;
        let lower_order_final = options.lower_order_final;
        let last_steps = LastSteps {
            lower_order_final,
            always_euler: false,
        };
        let steps = self.ladder.timesteps().len();
        let order = options
            .solver_order
            .min(taken + 1)
            .min(last_steps.most(rung, steps));
        let level = |rung: usize| Mixture::of_ratio(self.ladder.sigmas()[rung]);
        let log_rho = |rung: usize| -f64::from(level(rung).lambda());
        let points: Vec<f64> = (0..order).map(|i| log_rho(rung - i)).collect();
        let integrals = exponential_integrals(&points, 1.0, points[0], log_rho(rung + 1));
        let (s, t) = (level(rung), level(rung + 1));
        let outputs = integrals
            .into_iter()
            .map(|integral| t.sigma * integral as f32);
        Weights {
            sample: t.alpha / s.alpha,
            outputs: outputs.collect(),
            extra: None,
        }
    }
}

impl<B: Backend> Scheduler<B> for DEISMultistepScheduler<B> {
    ladder_methods!(of_ratio);

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let table = self.noise_schedule.sigmas();
        let (curve, range) = (options.sigma_curve()?, SigmaRange::of_table(&table));
        let steps = request.steps(CLASS)?;
        let levels = Levels::between(options.spacing(), steps, curve, range, &table)?;
        let last = levels.last_of(curve, &table);
        let before = std::mem::replace(&mut self.ladder, levels.down_to(last));
        if let Err(error) = multistep::check_steps(CLASS, steps, |rung| self.weights(rung, rung)) {
            self.ladder = before;
            return Err(error);
        }
        self.outputs.clear();
        Ok(())
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let options = &self.resolved.options;
        let prediction = Prediction {
            kind: options.prediction_type,
            output: step.model_output,
            sample: step.sample.clone(),
        };
        let mixture = Mixture::of_ratio(self.ladder.sigmas()[rung]);
        let weights = self.weights(rung, self.outputs.len());
        let output = prediction.image_or_noise(mixture, self.bound, false);
        remember(&mut self.outputs, output, options.solver_order);
        let prev_sample = weights.apply(step.sample, &self.outputs, None);
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}
