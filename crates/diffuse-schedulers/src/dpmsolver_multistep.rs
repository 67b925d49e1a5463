//! DPM-Solver and DPM-Solver++, multistep.
//!
//! "DPM-Solver" (<https://arxiv.org/abs/2206.00927>) and "DPM-Solver++" (<https://arxiv.org/abs/2211.01095>), algorithm 2:
//! a polynomial through what the model saw at the latest points, integrated exactly in `λ = ln(α / σ)`. One model call a
//! step. `dpm_weights.rs` has the formulas.

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::dpm_weights::{DPMAlgorithmType, DPMRule, DPMSolverType};
use crate::ladder::{Ladder, ladder_methods};
use crate::levels::Levels;
use crate::mixture::Mixture;
use crate::multistep::{self, LastSteps, MAX_DPM_ORDER, check_order, image_channels};
use crate::prediction::{Bound, Prediction};
use crate::sigmas::{SigmaCurve, SigmaRange};
use crate::weights::{Weights, remember};
use crate::{
    BetaSchedule, Capabilities, FinalSigmasType, NoiseSchedule, Scheduler, SchedulerError, Step,
    StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`DPMSolverMultistepScheduler`].
    pub struct DPMSolverMultistepConfig for "DPMSolverMultistepScheduler" [
        noise(0.0001, 0.02, Linear), thresholding, sigmas, flow, shifting, clipped_lambdas, spacing(Linspace), zero_snr
    ] {
        /// The number of points that the polynomial goes through, 1 to 3.
        pub solver_order: usize = 2,
        /// The equation that is solved.
        pub algorithm_type: DPMAlgorithmType = DPMAlgorithmType::DPMSolverPlusPlus,
        /// How a second-order step weighs the slope.
        pub solver_type: DPMSolverType = DPMSolverType::Midpoint,
        /// Whether the order goes down towards the end of a run of less than 15 steps.
        pub lower_order_final: bool = true,
        /// Whether the last step has order 1.
        pub euler_at_final: bool = false,
        /// Whether `λ` is spaced evenly.
        pub use_lu_lambdas: bool = false,
        /// The noise level that a run ends at.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
    }
}

const CLASS: &str = DPMSolverMultistepConfig::CLASS;

/// A multistep solver of the diffusion ODE or SDE: good pictures from 20 steps.
#[derive(Debug)]
pub struct DPMSolverMultistepScheduler<B: Backend> {
    resolved: Resolved<DPMSolverMultistepConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    ladder: Ladder,
    /// The latest images or noises from the model, newest first: at most `solver_order`.
    outputs: Vec<Tensor<B, 4>>,
}

impl<B: Backend> DPMSolverMultistepScheduler<B> {
    pub(crate) fn build(
        mut resolved: Resolved<DPMSolverMultistepConfig>,
    ) -> Result<Self, SchedulerError> {
        let options = &mut resolved.options;
        options.refuse_flow()?;
        options.refuse_shifting()?;
        options.sigma_curve()?;
        check_order(CLASS, "solver_order", options.solver_order, MAX_DPM_ORDER)?;
        options
            .algorithm_type
            .check_end(CLASS, options.final_sigmas_type)?;
        options.algorithm_type.settle(&mut resolved.config);
        let zero_snr = options.rescale_betas_zero_snr;
        let mut noise_schedule = options.noise_schedule(BetaSchedule::COMMON, zero_snr)?;
        if zero_snr {
            noise_schedule = noise_schedule.with_finite_last_sigma();
        }
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

    fn curve(&self) -> Result<Option<SigmaCurve>, SchedulerError> {
        let options = &self.resolved.options;
        Ok(match options.sigma_curve()? {
            Some(SigmaCurve::Karras) => Some(SigmaCurve::Karras),
            _ if options.use_lu_lambdas => Some(SigmaCurve::Lu),
            other => other,
        })
    }

    /// Timesteps and noise levels of a run.
    fn place(&self, request: &TimestepRequest) -> Result<Ladder, SchedulerError> {
        let options = &self.resolved.options;
        let table = self.noise_schedule.sigmas();
        let (spacing, curve) = (options.spacing(), self.curve()?);
        let range = SigmaRange::of_table(&table);
        let levels = match request {
            TimestepRequest::Timesteps(timesteps) => {
                spacing.check_whole_list(timesteps, curve.is_some())?;
                Levels::at(timesteps.clone(), &table)
            }
            other => {
                let steps = other.steps(CLASS)?;
                let spacing = spacing.clipped(&self.noise_schedule, options.lambda_min_clipped)?;
                match curve {
                    // The reference's quirk: with cosine betas these timesteps are cut off, not rounded.
                    Some(curve) if options.beta_schedule == BetaSchedule::SquaredcosCapV2 => {
                        spacing.check(steps)?;
                        Levels::along(curve, range, steps, &table).map_timesteps(f64::trunc)
                    }
                    curve => Levels::between(spacing, steps, curve, range, &table)?,
                }
            }
        };
        Ok(levels.down_to(match options.final_sigmas_type {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => table[0],
        }))
    }

    /// The weights of a step from a rung, after so many steps.
    fn weights(&self, rung: usize, taken: usize) -> Weights {
        let options = &self.resolved.options;
        let last_steps = LastSteps {
            lower_order_final: options.lower_order_final,
            always_euler: options.euler_at_final
                || options.final_sigmas_type == FinalSigmasType::Zero,
        };
        let steps = self.ladder.timesteps().len();
        let order = options
            .solver_order
            .min(taken + 1)
            .min(last_steps.most(rung, steps));
        let levels: Vec<Mixture> = self.ladder.sigmas()[rung + 1 - order..=rung + 1]
            .iter()
            .map(|&sigma| Mixture::of_ratio(sigma))
            .collect();
        let rule = DPMRule {
            algorithm_type: options.algorithm_type,
            solver_type: options.solver_type,
        };
        rule.multistep(&levels[..order], levels[order])
    }
}

impl<B: Backend> Scheduler<B> for DPMSolverMultistepScheduler<B> {
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
        let options = &self.resolved.options;
        if let Err(error) = multistep::check_steps(CLASS, steps, |rung| self.weights(rung, rung))
            .and_then(|highest| options.algorithm_type.check_order(CLASS, highest))
        {
            self.ladder = before;
            return Err(error);
        }
        self.outputs.clear();
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
            true => Some(step.noise.in_f32(&output)?),
            false => None,
        };
        let weights = self.weights(rung, self.outputs.len());
        remember(&mut self.outputs, output, options.solver_order);
        let prev_sample = weights.apply(step.sample, &self.outputs, noise);
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}
