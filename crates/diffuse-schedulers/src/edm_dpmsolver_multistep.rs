//! DPM-Solver++ for EDM models, multistep.
//!
//! The step of `dpmsolver_multistep.rs` (<https://arxiv.org/abs/2211.01095>) with `α = 1`, and the model of `edm.rs`
//! (<https://arxiv.org/abs/2206.00364>).

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, require, scheduler_config};
use crate::dpm_weights::{DPMAlgorithmType, DPMRule, DPMSolverType};
use crate::edm::EDM;
use crate::ladder::{Ladder, ladder_methods};
use crate::mixture::Mixture;
use crate::multistep::{LastSteps, MAX_DPM_ORDER, check_order, check_steps};
use crate::prediction::Bound;
use crate::weights::{Weights, remember};
use crate::{
    Capabilities, FinalSigmasType, Scheduler, SchedulerError, Step, StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`EDMDPMSolverMultistepScheduler`].
    pub struct EDMDPMSolverMultistepConfig for "EDMDPMSolverMultistepScheduler" [edm, thresholding] {
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
    }
}

const CLASS: &str = EDMDPMSolverMultistepConfig::CLASS;

/// DPM-Solver++ for EDM models; not for Stable Diffusion.
#[derive(Debug)]
pub struct EDMDPMSolverMultistepScheduler<B: Backend> {
    resolved: Resolved<EDMDPMSolverMultistepConfig>,
    bound: Bound,
    ladder: Ladder,
    /// The latest images from the model, newest first: at most `solver_order`.
    outputs: Vec<Tensor<B, 4>>,
}

impl<B: Backend> EDMDPMSolverMultistepScheduler<B> {
    pub(crate) fn build(
        mut resolved: Resolved<EDMDPMSolverMultistepConfig>,
    ) -> Result<Self, SchedulerError> {
        use DPMAlgorithmType::*;
        let options = &mut resolved.options;
        options.edm().check()?;
        check_order(CLASS, "solver_order", options.solver_order, MAX_DPM_ORDER)?;
        let supported = &[DPMSolverPlusPlus, SDEDPMSolverPlusPlus, DEIS];
        require(CLASS, "algorithm_type", &options.algorithm_type, supported)?;
        options
            .algorithm_type
            .check_end(CLASS, options.final_sigmas_type)?;
        options.algorithm_type.settle(&mut resolved.config);
        let bound = options.threshold_or(Bound::None)?;
        Ok(Self {
            bound,
            ladder: Ladder::default(),
            outputs: Vec::new(),
            resolved,
        })
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
            .map(|&sigma| Mixture::of_level(sigma))
            .collect();
        let rule = DPMRule {
            algorithm_type: options.algorithm_type,
            solver_type: options.solver_type,
        };
        rule.multistep(&levels[..order], levels[order])
    }
}

impl<B: Backend> Scheduler<B> for EDMDPMSolverMultistepScheduler<B> {
    ladder_methods!(of_level);

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: self.resolved.options.algorithm_type.adds_noise(),
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let mut sigmas = options.edm().levels(request.steps(CLASS)?)?;
        let timesteps = sigmas.iter().map(|&sigma| EDM::timestep(sigma)).collect();
        sigmas.push(match options.final_sigmas_type {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => options.sigma_min as f32,
        });
        let before = std::mem::replace(&mut self.ladder, Ladder::new(timesteps, sigmas));
        let steps = self.ladder.timesteps().len();
        let with_noise = self.resolved.options.algorithm_type.adds_noise();
        if let Err(error) =
            check_steps(CLASS, steps, |rung| self.weights(rung, rung)).and_then(|highest| {
                match highest {
                    3 if with_noise => Err(SchedulerError::Clash {
                        class: CLASS,
                        keys: "`algorithm_type` `sde-dpmsolver++` and `solver_order` `3`".into(),
                        advice: "choose `solver_order` `2`".into(),
                    }),
                    _ => Ok(()),
                }
            })
        {
            self.ladder = before;
            return Err(error);
        }
        self.outputs.clear();
        Ok(())
    }

    fn init_noise_sigma(&self) -> f64 {
        self.resolved.options.edm().init_noise_sigma()
    }

    fn scale_model_input(
        &self,
        sample: Tensor<B, 4>,
        timestep: f64,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let rung = self.ladder.rung(timestep)?;
        Ok(self
            .resolved
            .options
            .edm()
            .seen(sample, self.ladder.sigmas()[rung]))
    }

    fn advance(&mut self, mut step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let options = &self.resolved.options;
        let sigma = self.ladder.sigmas()[rung];
        let image = options
            .edm()
            .denoised(step.sample.clone(), step.model_output, sigma);
        let image = self.bound.apply(image);
        let noise = match options.algorithm_type.adds_noise() {
            true => Some(step.noise.like(&image)?),
            false => None,
        };
        let weights = self.weights(rung, self.outputs.len());
        remember(&mut self.outputs, image, options.solver_order);
        let prev_sample = weights.apply(step.sample, &self.outputs, noise);
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}
