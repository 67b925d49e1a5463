//! DPM-Solver run backwards, from an image to the noise that it would be made of.
//!
//! The steps of `dpmsolver_multistep.rs` on a schedule that climbs: "DPM-Solver" (<https://arxiv.org/abs/2206.00927>),
//! "DPM-Solver++" (<https://arxiv.org/abs/2211.01095>), with negative `h`.

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::dpm_weights::{DPMAlgorithmType, DPMRule, DPMSolverType};
use crate::ladder::{Ladder, ladder_methods};
use crate::levels::Levels;
use crate::mixture::Mixture;
use crate::multistep::{self, LastSteps, MAX_DPM_ORDER, check_order, image_channels};
use crate::prediction::{Bound, Prediction};
use crate::sigmas::SigmaRange;
use crate::weights::{Weights, remember};
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, Scheduler, SchedulerError, Step, StepOutput,
    TimestepRequest,
};

scheduler_config! {
    /// Options of [`DPMSolverMultistepInverseScheduler`].
    pub struct DPMSolverMultistepInverseConfig for "DPMSolverMultistepInverseScheduler" [
        noise(0.0001, 0.02, Linear), thresholding, sigmas, flow, clipped_lambdas, spacing(Linspace)
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
    }
}

const CLASS: &str = DPMSolverMultistepInverseConfig::CLASS;

/// DPM-Solver run backwards: it finds the noise that an image would come from.
#[derive(Debug)]
pub struct DPMSolverMultistepInverseScheduler<B: Backend> {
    resolved: Resolved<DPMSolverMultistepInverseConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    ladder: Ladder,
    /// The latest images or noises from the model, newest first: at most `solver_order`.
    outputs: Vec<Tensor<B, 4>>,
}

impl<B: Backend> DPMSolverMultistepInverseScheduler<B> {
    pub(crate) fn build(
        mut resolved: Resolved<DPMSolverMultistepInverseConfig>,
    ) -> Result<Self, SchedulerError> {
        let options = &mut resolved.options;
        options.refuse_flow()?;
        options.sigma_curve()?;
        check_order(CLASS, "solver_order", options.solver_order, MAX_DPM_ORDER)?;
        options.algorithm_type.settle(&mut resolved.config);
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

    /// Timesteps and noise levels of a run.
    fn place(&self, steps: usize) -> Result<Ladder, SchedulerError> {
        let options = &self.resolved.options;
        let table = self.noise_schedule.sigmas();
        let spacing = options
            .spacing()
            .clipped(&self.noise_schedule, options.lambda_min_clipped)?;
        let (levels, last) = match options.sigma_curve()? {
            None => {
                let levels = Levels::at(spacing.interval_bottoms(steps)?, &table);
                (levels, table[spacing.reach - 1])
            }
            Some(curve) => {
                spacing.check(steps)?;
                let SigmaRange { min, max } = SigmaRange::of_table(&table);
                // The curve from its lower end.
                let range = SigmaRange { min: max, max: min };
                let levels = Levels::along(curve, range, steps, &table);
                // The reference's quirk: the last level of a curve is there twice.
                let last = levels.sigmas[steps - 1] as f32;
                (levels, last)
            }
        };
        let sigmas = levels.sigmas_down_to(last);
        let whole = |timestep: f64| match options.use_karras_sigmas {
            true => timestep.round_ties_even(),
            false => timestep,
        };
        // The reference's quirk: a timestep that occurs twice goes, but not its level.
        let mut timesteps = levels.map_timesteps(whole).timesteps;
        timesteps.dedup();
        timesteps
            .iter_mut()
            .for_each(|timestep| *timestep = timestep.trunc());
        Ok(Ladder::new(timesteps, sigmas))
    }

    /// The weights of a step from a rung, after so many steps.
    fn weights(&self, rung: usize, taken: usize) -> Weights {
        let options = &self.resolved.options;
        let last_steps = LastSteps {
            lower_order_final: options.lower_order_final,
            always_euler: options.euler_at_final,
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

impl<B: Backend> Scheduler<B> for DPMSolverMultistepInverseScheduler<B> {
    ladder_methods!(of_ratio);

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        if self.resolved.options.algorithm_type.adds_noise() {
            return Err(SchedulerError::Clash {
                class: CLASS,
                keys: "an `algorithm_type` with noise and a run to higher levels".into(),
                advice: "its noise has an imaginary deviation there, choose `dpmsolver++` or `dpmsolver`".into(),
            });
        }
        let ladder = self.place(request.steps(CLASS)?)?;
        let before = std::mem::replace(&mut self.ladder, ladder);
        let steps = self.ladder.timesteps().len();
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
            output: image_channels(step.model_output, &step.sample, options.variance_type),
            sample: step.sample.clone(),
        };
        let mixture = Mixture::of_ratio(self.ladder.sigmas()[rung]);
        let images = options.algorithm_type.integrates_images();
        let output = prediction.image_or_noise(mixture, self.bound, images);
        let weights = self.weights(rung, self.outputs.len());
        remember(&mut self.outputs, output, options.solver_order);
        let prev_sample = weights.apply(step.sample, &self.outputs, None);
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}
