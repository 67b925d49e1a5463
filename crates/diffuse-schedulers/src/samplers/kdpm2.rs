//! DPM2: the midpoint method in `ln σ`.
//!
//! k-diffusion's `sample_dpm_2` (<https://github.com/crowsonkb/k-diffusion>), after DPM-Solver-2
//! (<https://arxiv.org/abs/2206.00927>) and algorithm 2 of <https://arxiv.org/abs/2206.00364>. From
//! `σ` to the next `σ'`, by way of `σ_mid = √(σ σ')`; the last step, to sigma 0, takes one
//! evaluation.
//!
//! ```text
//! d     = (x - x0) / σ,              x_mid = x + (σ_mid - σ) d
//! d_mid = (x_mid - x0_mid) / σ_mid,  x'    = x + (σ' - σ) d_mid
//! ```

use super::prelude::*;
use super::two_evaluations::{along, dpm2_grid, halfway, interleaved};

options! {
    /// Options of [`KDPM2DiscreteScheduler`].
    pub struct KDPM2DiscreteConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
    } with {
        pub betas: BetaOptions = BetaOptions::latent(BetaSchedule::Linear),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// The midpoint method in `ln σ`: order 2, two model evaluations per step.
pub type KDPM2DiscreteScheduler<B> = Driver<B, KDPM2DiscreteConfig>;

impl Sampler for KDPM2DiscreteConfig {
    const CLASS: &'static str = "KDPM2DiscreteScheduler";
    const NAMES: Names = Names {
        short: "dpm2",
        about: "midpoint method, two model evaluations a step: 10 to 20 steps",
        popular: &[("DPM2", &[]), ("DPM2 Karras", &[KARRAS])],
    };
    const ORDER: usize = 2;

    /// Between the two evaluations: the sample that the step starts from.
    type History<B: Backend> = Option<Tensor<B, 4>>;

    fn process(&self) -> Process {
        Process::Exploding(self.spacing.timestep_spacing)
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.prediction_type.require_noise(Self::CLASS)?;
        self.sigmas.sigma_schedule(Self::CLASS).map(|_| ())
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        self.betas.noise_schedule(Self::CLASS)
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let spacing = self.spacing.over(Self::CLASS, &self.betas);
        let timesteps = spacing.visited_unrounded(request.steps(Self::CLASS)?)?;
        let (grid, logs) = dpm2_grid(Self::CLASS, timesteps, &self.sigmas, noise_schedule)?;
        let sigmas = grid.sigmas_to(0.0);
        let mids = sigmas.windows(2).map(|pair| halfway(pair[1], pair[0]));
        let mids: Vec<f32> = mids.collect();
        Ok(interleaved(&grid, &mids, &logs))
    }

    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        history: &mut Self::History<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (schedule, index) = (place.schedule, place.index);
        let sigma = schedule.model_sigma(index);
        let original = Prediction::of(self.prediction_type, &step).denoised(sigma);
        let (start, dt) = match history.take() {
            None => {
                *history = Some(step.sample.clone());
                (step.sample.clone(), schedule.model_sigma(index + 1) - sigma)
            }
            Some(start) => (start, schedule.sigmas[index] - schedule.sigmas[index - 1]),
        };
        Ok(StepOutput {
            prev_sample: along(start, dt, step.sample, original.clone(), sigma),
            pred_original_sample: Some(original),
        })
    }
}
