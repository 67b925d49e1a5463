//! DPM-Solver and DPM-Solver++, singlestep.
//!
//! "DPM-Solver" (<https://arxiv.org/abs/2206.00927>), algorithms 4 and 5, and "DPM-Solver++"
//! (<https://arxiv.org/abs/2211.01095>), algorithm 1: a step of order `k` takes `k` model calls. The schedule goes through
//! the points within a step, and the first calls of a step are steps of lower order from the same start:
//!
//! ```text
//! order 3:  1 2 3  1 2 3  1 2 3 ..
//! ```
//!
//! `dpm_weights.rs` has the formulas.

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, require, scheduler_config};
use crate::dpm_weights::{DPMAlgorithmType, DPMRule, DPMSolverType};
use crate::ladder::{Ladder, ladder_methods};
use crate::levels::Levels;
use crate::mixture::Mixture;
use crate::multistep::{self, MAX_DPM_ORDER, check_order, image_channels};
use crate::prediction::{Bound, Prediction};
use crate::sigmas::SigmaRange;
use crate::spacing::Spacing;
use crate::weights::{Weights, remember};
use crate::{
    BetaSchedule, Capabilities, FinalSigmasType, NoiseSchedule, Scheduler, SchedulerError, Step,
    StepOutput, TimestepRequest, TimestepSpacing,
};

scheduler_config! {
    /// Options of [`DPMSolverSinglestepScheduler`].
    pub struct DPMSolverSinglestepConfig for "DPMSolverSinglestepScheduler" [
        noise(0.0001, 0.02, Linear), thresholding, sigmas, flow, shifting, clipped_lambdas
    ] {
        /// The number of model calls in a step, 1 to 3.
        pub solver_order: usize = 2,
        /// The equation that is solved.
        pub algorithm_type: DPMAlgorithmType = DPMAlgorithmType::DPMSolverPlusPlus,
        /// How the slopes within a step are weighed.
        pub solver_type: DPMSolverType = DPMSolverType::Midpoint,
        /// Whether the last step has order 1; turned on where the other options need it.
        pub lower_order_final: bool = false,
        /// The noise level that a run ends at.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
    }
}

const CLASS: &str = DPMSolverSinglestepConfig::CLASS;

/// A singlestep solver of the diffusion ODE or SDE, which remembers nothing of earlier steps.
#[derive(Debug)]
pub struct DPMSolverSinglestepScheduler<B: Backend> {
    resolved: Resolved<DPMSolverSinglestepConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    ladder: Ladder,
    /// The latest images or noises from the model, newest first: at most `solver_order`.
    outputs: Vec<Tensor<B, 4>>,
    /// The sample that the step starts from.
    start: Option<Tensor<B, 4>>,
}

impl<B: Backend> DPMSolverSinglestepScheduler<B> {
    pub(crate) fn build(
        mut resolved: Resolved<DPMSolverSinglestepConfig>,
    ) -> Result<Self, SchedulerError> {
        use DPMAlgorithmType::*;
        let options = &mut resolved.options;
        options.refuse_flow()?;
        options.refuse_shifting()?;
        options.sigma_curve()?;
        check_order(CLASS, "solver_order", options.solver_order, MAX_DPM_ORDER)?;
        let supported = &[DPMSolver, DPMSolverPlusPlus, SDEDPMSolverPlusPlus, DEIS];
        require(CLASS, "algorithm_type", &options.algorithm_type, supported)?;
        options
            .algorithm_type
            .check_end(CLASS, options.final_sigmas_type)?;
        options.algorithm_type.settle(&mut resolved.config);
        if options.algorithm_type == DPMSolver && options.thresholding {
            return Err(SchedulerError::Clash {
                class: CLASS,
                keys: "`algorithm_type` `dpmsolver` and `thresholding` `true`".into(),
                advice: "only predicted images are bounded, choose `algorithm_type` `dpmsolver++`"
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
            start: None,
            resolved,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// Timesteps and noise levels of a run.
    fn place(&self, request: &TimestepRequest) -> Result<Ladder, SchedulerError> {
        let options = &self.resolved.options;
        let table = self.noise_schedule.sigmas();
        let spacing = Spacing {
            class: CLASS,
            timestep_spacing: TimestepSpacing::Linspace,
            num_train_timesteps: options.num_train_timesteps,
            steps_offset: 0,
            reach: options.num_train_timesteps,
        };
        let curve = options.sigma_curve()?;
        let levels = match request {
            TimestepRequest::Timesteps(timesteps) => {
                spacing.check_whole_list(timesteps, curve.is_some())?;
                Levels::at(timesteps.clone(), &table)
            }
            other => {
                let spacing = spacing.clipped(&self.noise_schedule, options.lambda_min_clipped)?;
                let range = SigmaRange::of_table(&table);
                Levels::between(spacing, other.steps(CLASS)?, curve, range, &table)?
            }
        };
        Ok(levels.down_to(match options.final_sigmas_type {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => table[0],
        }))
    }

    /// The order of the step at a rung, of so many.
    fn order_at(&self, rung: usize, steps: usize) -> usize {
        let options = &self.resolved.options;
        let (order, whole) = (
            options.solver_order,
            steps.is_multiple_of(options.solver_order),
        );
        let euler_last = options.final_sigmas_type == FinalSigmasType::Zero
            || options.lower_order_final && whole;
        match rung + 1 == steps && euler_last {
            true => 1,
            false => rung % order + 1,
        }
    }

    /// The weights of a step from a rung, after so many steps.
    fn weights(&self, rung: usize, taken: usize) -> Weights {
        let order = self
            .order_at(rung, self.ladder.timesteps().len())
            .min(taken + 1);
        let levels: Vec<Mixture> = self.ladder.sigmas()[rung + 1 - order..=rung + 1]
            .iter()
            .map(|&sigma| Mixture::of_ratio(sigma))
            .collect();
        let options = &self.resolved.options;
        let rule = DPMRule {
            algorithm_type: options.algorithm_type,
            solver_type: options.solver_type,
        };
        rule.singlestep(&levels[..order], levels[order])
    }
}

impl<B: Backend> Scheduler<B> for DPMSolverSinglestepScheduler<B> {
    ladder_methods!(of_ratio);

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            noise: self.resolved.options.algorithm_type.adds_noise(),
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let ladder = self.place(request)?;
        let before = std::mem::replace(&mut self.ladder, ladder);
        let steps = self.ladder.timesteps().len();
        // As in the reference, the option changes for good where a run needs it.
        let options = &mut self.resolved.options;
        let was_lower = options.lower_order_final;
        options.lower_order_final |= !steps.is_multiple_of(options.solver_order)
            || options.final_sigmas_type == FinalSigmasType::Zero;
        if let Err(error) = multistep::check_steps(CLASS, steps, |rung| self.weights(rung, rung)) {
            self.ladder = before;
            self.resolved.options.lower_order_final = was_lower;
            return Err(error);
        }
        let lower = self.resolved.options.lower_order_final;
        self.resolved.config.patch("lower_order_final", lower);
        self.outputs.clear();
        self.start = None;
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
        let images = options.algorithm_type.integrates_images();
        let output = prediction.image_or_noise(mixture, self.bound, images);
        let noise = match options.algorithm_type.adds_noise() {
            true => Some(step.noise.like(&output)?),
            false => None,
        };
        let weights = self.weights(rung, self.outputs.len());
        remember(&mut self.outputs, output, options.solver_order);
        let start = match (weights.outputs.len(), self.start.take()) {
            (2.., Some(start)) => start,
            _ => step.sample,
        };
        let prev_sample = weights.apply(start.clone(), &self.outputs, noise);
        self.start = Some(start);
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}
