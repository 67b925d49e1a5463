//! DPM-Solver++ for EDM models, multistep.
//!
//! The step of `dpmsolver_multistep.rs` (<https://arxiv.org/abs/2211.01095>) with `α = 1`, and the
//! model of `edm.rs` (<https://arxiv.org/abs/2206.00364>).

use super::dpmsolver_multistep::{DPMAlgorithmType, DPMSolverType, MultistepRule};
use super::edm::EDMOptions;
use super::prelude::*;
use crate::step::multistep::{FinalOrder, MAX_DPM_ORDER, check_order};

options! {
    /// Options of [`EDMDPMSolverMultistepScheduler`].
    pub struct EDMDPMSolverMultistepConfig {
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
    } with {
        pub edm: EDMOptions = EDMOptions::default(),
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
    }
}

/// DPM-Solver++ for EDM models; not for Stable Diffusion.
pub type EDMDPMSolverMultistepScheduler<B> = Driver<B, EDMDPMSolverMultistepConfig>;

impl EDMDPMSolverMultistepConfig {
    fn rule(&self) -> MultistepRule {
        MultistepRule {
            algorithm_type: self.algorithm_type,
            solver_type: self.solver_type,
            solver_order: self.solver_order,
            final_order: FinalOrder {
                lower_order_final: self.lower_order_final,
                euler_at_final: self.euler_at_final
                    || self.edm.final_sigmas_type == FinalSigmasType::Zero,
            },
        }
    }
}

impl Sampler for EDMDPMSolverMultistepConfig {
    const CLASS: &'static str = "EDMDPMSolverMultistepScheduler";
    const NAMES: Names = Names {
        short: "edm-dpm++-2m",
        about: "DPM-Solver++ for EDM models, multistep",
        popular: &[],
    };

    /// The latest predicted images, newest first: at most `solver_order`.
    type History<B: Backend> = Vec<Tensor<B, 4>>;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: self.algorithm_type.adds_noise(),
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        self.edm.process()
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        use DPMAlgorithmType::*;
        self.edm.check(Self::CLASS)?;
        self.threshold.clipping(Self::CLASS)?;
        check_order(
            Self::CLASS,
            "solver_order",
            self.solver_order,
            MAX_DPM_ORDER,
        )?;
        let supported = &[DPMSolverPlusPlus, SDEDPMSolverPlusPlus, DEIS];
        require(
            Self::CLASS,
            "algorithm_type",
            &self.algorithm_type,
            supported,
        )?;
        self.algorithm_type
            .check_end(Self::CLASS, self.edm.final_sigmas_type)?;
        self.algorithm_type.settle();
        Ok(())
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        Ok(NoiseSchedule::default())
    }

    fn place(
        &self,
        request: &TimestepRequest,
        _noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let (end, min) = (self.edm.final_sigmas_type, self.edm.sigma_min as f32);
        let run = self.edm.place(Self::CLASS, request, |_| end.sigma(min))?;
        let highest = self.rule().check(Self::CLASS, &run, self.process())?;
        if self.algorithm_type.adds_noise() && highest == 3 {
            return Err(SchedulerError::clash(
                Self::CLASS,
                "`algorithm_type` `sde-dpmsolver++` and `solver_order` `3`",
                "choose `solver_order` `2`",
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
        let (sample, output) = (step.sample.clone(), step.model_output);
        let image = self.edm.denoised(sample, output, place.sigma());
        let image = self.threshold.clipping(Self::CLASS)?.apply(image);
        let noise = match self.algorithm_type.adds_noise() {
            true => Some(step.noise.like(&image)?),
            false => None,
        };
        let (rule, process) = (self.rule(), self.process());
        Ok(rule.step(place, process, step.sample, image, noise, outputs))
    }
}
