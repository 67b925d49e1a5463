//! DPM-Solver backwards, from an image to its noise.
//!
//! The steps of `dpmsolver_multistep.rs` towards noise: "DPM-Solver"
//! (<https://arxiv.org/abs/2206.00927>), "DPM-Solver++" (<https://arxiv.org/abs/2211.01095>), with
//! negative `h`.

use super::dpmsolver_multistep::{DPMAlgorithmType, DPMSolverType, MultistepRule};
use super::prelude::*;
use crate::VarianceType;
use crate::schedule::flow::FlowOptions;
use crate::step::multistep::{FinalOrder, MAX_DPM_ORDER, check_order};

options! {
    /// Options of [`DPMSolverMultistepInverseScheduler`].
    pub struct DPMSolverMultistepInverseConfig {
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

/// DPM-Solver backwards: it computes the noise from which DPM-Solver makes an image.
pub type DPMSolverMultistepInverseScheduler<B> = Driver<B, DPMSolverMultistepInverseConfig>;

impl DPMSolverMultistepInverseConfig {
    fn rule(&self) -> MultistepRule {
        MultistepRule {
            algorithm_type: self.algorithm_type,
            solver_type: self.solver_type,
            solver_order: self.solver_order,
            final_order: FinalOrder {
                lower_order_final: self.lower_order_final,
                euler_at_final: self.euler_at_final,
            },
        }
    }
}

impl Sampler for DPMSolverMultistepInverseConfig {
    const CLASS: &'static str = "DPMSolverMultistepInverseScheduler";
    const NAMES: Names = Names {
        short: "dpm++-2m-inverse",
        about: "DPM-Solver++ backwards, from an image to its noise",
        popular: &[],
    };

    /// The latest model outputs, newest first: at most `solver_order`.
    type History<B: Backend> = Vec<Tensor<B, 4>>;

    fn process(&self) -> Process {
        Process::SigmaGrid
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.flow.refuse(Self::CLASS)?;
        self.sigmas.sigma_schedule(Self::CLASS)?;
        self.threshold.clipping(Self::CLASS)?;
        check_order(
            Self::CLASS,
            "solver_order",
            self.solver_order,
            MAX_DPM_ORDER,
        )?;
        self.algorithm_type.settle();
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
        if self.algorithm_type.adds_noise() {
            return Err(SchedulerError::clash(
                Self::CLASS,
                "an `algorithm_type` with noise and a run towards noise",
                "its noise has an imaginary deviation there, choose `dpmsolver++` or \
                 `dpmsolver`",
            ));
        }
        let (steps, table) = (request.steps(Self::CLASS)?, noise_schedule.sigmas());
        let spacing = self.spacing.over(Self::CLASS, &self.betas);
        let spacing = spacing.clipped(noise_schedule, self.lambda_min_clipped)?;
        let (grid, last) = match self.sigmas.sigma_schedule(Self::CLASS)? {
            None => {
                let grid = SigmaGrid::at(spacing.interval_bottoms(steps)?, &table);
                (grid, table[spacing.reach - 1])
            }
            Some(schedule) => {
                spacing.check(steps)?;
                let SigmaRange { min, max } = SigmaRange::of_table(&table);
                // The sigma schedule from its lower end.
                let range = SigmaRange { min: max, max: min };
                let grid = SigmaGrid::along(schedule, range, steps, &table);
                // Diffusers' quirk: the last sigma of the schedule occurs twice.
                let last = grid.sigmas[steps - 1] as f32;
                (grid, last)
            }
        };
        let sigmas = grid.sigmas_to(last);
        let mut timesteps = match self.sigmas.use_karras_sigmas {
            true => grid.map_timesteps(f64::round_ties_even).timesteps,
            false => grid.timesteps,
        };
        // Diffusers' quirk: a repeated timestep is removed, but not its sigma.
        timesteps.dedup();
        let timesteps = timesteps.into_iter().map(f64::trunc).collect();
        let run = Schedule::new(timesteps, sigmas);
        self.rule().check(Self::CLASS, &run, self.process())?;
        Ok(run)
    }

    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        outputs: &mut Self::History<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (kind, variance_type) = (self.prediction_type, self.variance_type);
        let prediction = Prediction::without_variance(kind, &step, variance_type);
        let clipping = self.threshold.clipping(Self::CLASS)?;
        let integrand = self.algorithm_type.integrand();
        let output = prediction.integrand(place.alpha_sigma(), clipping, integrand);
        let (rule, process) = (self.rule(), self.process());
        Ok(rule.step(place, process, step.sample, output, None, outputs))
    }
}
