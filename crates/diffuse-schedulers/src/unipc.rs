//! UniPC: a unified predictor and corrector.
//!
//! "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"
//! (<https://arxiv.org/abs/2302.04867>), algorithms 5 to 8. A step is a weighted sum of the sample it starts from and of
//! what the model saw (`m`, images or noises) at this and earlier points:
//!
//! ```text
//! predictor  x_t = a x_s + b_0 m_s + b_1 m_(s-1) + ..
//! corrector  the same with m_t, once the model has seen x_t, and before the next step
//! ```
//!
//! `unipc_weights.rs` has the weights.

use burn::prelude::*;
use serde_json::{Map, Value};

use crate::config::{ClassConfig, Overrides, Resolved, require, scheduler_config};
use crate::ladder::{Ladder, ladder_methods};
use crate::levels::Levels;
use crate::mixture::Mixture;
use crate::prediction::{Bound, Prediction};
use crate::sigmas::SigmaRange;
use crate::unipc_weights::{Method, UniPCSolverType, weights};
use crate::weights::{Weights, remember};
use crate::{
    BetaSchedule, Capabilities, FinalSigmasType, NoiseSchedule, Scheduler, SchedulerConfig,
    SchedulerError, Step, StepOutput, TimestepRequest, scheduler_from_config,
};

/// The options that the sampler in `solver_p` takes over.
const NOISE_SCHEDULE: [&str; 5] = [
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
];

scheduler_config! {
    /// Options of [`UniPCMultistepScheduler`].
    pub struct UniPCMultistepConfig for "UniPCMultistepScheduler" [
        noise(0.0001, 0.02, Linear), thresholding, sigmas, flow, shifting, spacing(Linspace), zero_snr
    ] {
        /// The order of the predictor; the corrector's is one higher.
        pub solver_order: usize = 2,
        /// Whether the solver works on predicted images, instead of predicted noise.
        pub predict_x0: bool = true,
        /// The function `B(h)`.
        pub solver_type: UniPCSolverType = UniPCSolverType::Bh2,
        /// Whether the order goes down towards the end.
        pub lower_order_final: bool = true,
        /// The steps whose result is not corrected.
        pub disable_corrector: Vec<usize> = Vec::new(),
        /// The configuration of another sampler that predicts instead of UniP; UniC still corrects. Its noise schedule
        /// is this one's where it gives none.
        pub solver_p: Option<Map<String, Value>> = None,
        /// The noise level that a run ends at.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
        /// The smallest level of a sigma curve, instead of the schedule's.
        pub sigma_min: Option<f64> = None,
        /// The largest level of a sigma curve, instead of the schedule's.
        pub sigma_max: Option<f64> = None,
        /// Must be null: flow-matching models are not supported.
        pub shift_terminal: Option<f64> = None,
    }
}

const CLASS: &str = UniPCMultistepConfig::CLASS;

/// Beyond it, the equations of the order conditions cannot be solved in f32 by far.
const MAX_ORDER: usize = 12;

/// A multistep solver that corrects each step once the next model call shows where it led.
#[derive(Debug)]
pub struct UniPCMultistepScheduler<B: Backend> {
    resolved: Resolved<UniPCMultistepConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    solver_p: Option<Box<dyn Scheduler<B>>>,
    ladder: Ladder,
    /// The latest images or noises from the model, newest first: at most `solver_order`.
    outputs: Vec<Tensor<B, 4>>,
    /// The sample that the latest step started from, and the order of that step.
    latest: Option<(Tensor<B, 4>, usize)>,
}

impl<B: Backend> UniPCMultistepScheduler<B> {
    pub(crate) fn build(resolved: Resolved<UniPCMultistepConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        options.refuse_flow()?;
        options.refuse_shifting()?;
        options.sigma_curve()?;
        require(CLASS, "shift_terminal", &options.shift_terminal, &[None])?;
        if !(1..=MAX_ORDER).contains(&options.solver_order) {
            return Err(SchedulerError::Value {
                class: CLASS,
                key: "solver_order",
                value: options.solver_order.to_string(),
                expected: format!("expected 1 to {MAX_ORDER}"),
            });
        }
        let zero_snr = options.rescale_betas_zero_snr;
        let mut noise_schedule = options.noise_schedule(BetaSchedule::COMMON, zero_snr)?;
        if zero_snr {
            noise_schedule = noise_schedule.with_finite_last_sigma();
        }
        let bound = match options.predict_x0 {
            true => options.threshold_or(Bound::None)?,
            false => Bound::None,
        };
        let solver_p = options.solver_p.clone().map(|mut values| {
            // The two walk the same noise schedule unless it says otherwise.
            for key in NOISE_SCHEDULE {
                if let Some(value) = resolved.config.get(key) {
                    values.entry(key).or_insert_with(|| value.clone());
                }
            }
            let config = SchedulerConfig::from_values(values);
            scheduler_from_config(&config, None, &Overrides::new())
        });
        let solver_p = solver_p.transpose()?;
        let (ladder, outputs) = (Ladder::default(), Vec::new());
        Ok(Self {
            bound,
            noise_schedule,
            solver_p,
            resolved,
            ladder,
            outputs,
            latest: None,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// Timesteps and noise levels for a number of steps.
    fn place(&self, steps: usize) -> Result<Ladder, SchedulerError> {
        let options = &self.resolved.options;
        let table = self.noise_schedule.sigmas();
        let curve = options.sigma_curve()?;
        let range =
            SigmaRange::of_table(&table).with(CLASS, options.sigma_min, options.sigma_max)?;
        let levels = Levels::between(options.spacing(), steps, curve, range, &table)?;
        let last = match options.final_sigmas_type {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => levels.last_of(curve, &table),
        };
        Ok(levels.down_to(last))
    }

    /// The order of the step at a rung, after so many steps.
    fn order(&self, rung: usize, taken: usize) -> usize {
        let options = &self.resolved.options;
        let left = if options.lower_order_final {
            self.ladder.timesteps().len() - rung
        } else {
            usize::MAX
        };
        options.solver_order.min(left).min(taken + 1)
    }

    /// Refuses runs in which a step has no finite result, before the first one is taken.
    fn check_run(&self) -> Result<(), SchedulerError> {
        for rung in 0..self.ladder.timesteps().len() {
            if self.solver_p.is_none() {
                self.weights(rung, self.order(rung, rung), Method::Predict)?;
            }
            if rung > 0 && self.corrects(rung) {
                self.weights(rung - 1, self.order(rung - 1, rung - 1), Method::Correct)?;
            }
        }
        Ok(())
    }

    fn corrects(&self, rung: usize) -> bool {
        rung > 0
            && !self
                .resolved
                .options
                .disable_corrector
                .contains(&(rung - 1))
    }

    /// The factors of a step from rung `source` to the next one.
    fn weights(
        &self,
        source: usize,
        order: usize,
        method: Method,
    ) -> Result<Weights, SchedulerError> {
        let options = &self.resolved.options;
        let oldest = source + 1 - order;
        let levels: Vec<Mixture> = self.ladder.sigmas()[oldest..=source + 1]
            .iter()
            .map(|&sigma| Mixture::of_ratio(sigma))
            .collect();
        let weights = weights(&levels, options.solver_type, options.predict_x0, method);
        match weights.all_finite() {
            true => Ok(weights),
            false => Err(self.explain(self.ladder.sigmas()[source + 1])),
        }
    }

    /// Why a step to this level has no finite result.
    fn explain(&self, sigma: f32) -> SchedulerError {
        let options = &self.resolved.options;
        let clash = |keys: &str, advice: &str| SchedulerError::Clash {
            class: CLASS,
            keys: keys.into(),
            advice: advice.into(),
        };
        let infinite = "the last step is infinitely long, choose `final_sigmas_type` `sigma_min`";
        match sigma == 0.0 {
            true if !options.predict_x0 => clash(
                "`predict_x0` `false` and `final_sigmas_type` `zero`",
                infinite,
            ),
            true if options.solver_type == UniPCSolverType::Bh1 => clash(
                "`solver_type` `bh1` and `final_sigmas_type` `zero`",
                infinite,
            ),
            true => clash(
                "`lower_order_final` `false` and `final_sigmas_type` `zero`",
                infinite,
            ),
            false => clash(
                "these options and the number of steps",
                "two neighbouring noise levels are equal, choose fewer steps or `lower_order_final` `true`",
            ),
        }
    }
}

impl<B: Backend> Scheduler<B> for UniPCMultistepScheduler<B> {
    ladder_methods!(of_ratio);

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let steps = request.steps(CLASS)?;
        let ladder = self.place(steps)?;
        let before = std::mem::replace(&mut self.ladder, ladder);
        let mut checked = self.check_run();
        if let (Ok(()), Some(solver_p)) = (&checked, &mut self.solver_p) {
            checked = solver_p.set_timesteps(request);
        }
        if let Err(error) = checked {
            self.ladder = before;
            return Err(error);
        }
        self.outputs.clear();
        self.latest = None;
        Ok(())
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let options = &self.resolved.options;
        let mixture = Mixture::of_ratio(self.ladder.sigmas()[rung]);
        let prediction = Prediction {
            kind: options.prediction_type,
            output: step.model_output.clone(),
            sample: step.sample.clone(),
        };
        let output = match options.predict_x0 {
            true => self.bound.apply(prediction.original(mixture)),
            false => prediction.epsilon(mixture),
        };
        let sample = match self.latest.take() {
            Some((start, order)) if self.corrects(rung) => self
                .weights(rung - 1, order, Method::Correct)?
                .apply(start, &self.outputs, Some(output.clone())),
            _ => step.sample,
        };
        let order = self.order(rung, self.outputs.len());
        remember(&mut self.outputs, output, options.solver_order);
        self.latest = Some((sample.clone(), order));
        let prev_sample = match &mut self.solver_p {
            Some(solver_p) => solver_p.advance(Step { sample, ..step })?.prev_sample,
            None => self
                .weights(rung, order, Method::Predict)?
                .apply(sample, &self.outputs, None),
        };
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}
