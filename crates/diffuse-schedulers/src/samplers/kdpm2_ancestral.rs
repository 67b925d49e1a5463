//! DPM2 with noise in each step.
//!
//! k-diffusion's `sample_dpm_2_ancestral` (<https://github.com/crowsonkb/k-diffusion>): the
//! midpoint method in ancestral steps. From `σ` to the next `σ'`, with `σ_down² + σ_up² = σ'²`, by
//! way of `σ_mid = √(σ σ_down)`:
//!
//! ```text
//! σ_up² = σ'² (σ² - σ'²) / σ²
//! d     = (x - x0) / σ,              x_mid = x + (σ_mid - σ) d
//! d_mid = (x_mid - x0_mid) / σ_mid,  x'    = x + (σ_down - σ) d_mid + σ_up z
//! ```
//!
//! The last step takes one evaluation and adds no noise.

use super::prelude::*;
use super::two_evaluations::{along, dpm2_grid, halfway, interleaved};
use crate::step::ancestral::Ancestral;

options! {
    /// Options of [`KDPM2AncestralDiscreteScheduler`].
    pub struct KDPM2AncestralDiscreteConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
    } with {
        pub betas: BetaOptions = BetaOptions::latent(BetaSchedule::Linear),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// The midpoint method in `ln σ` with noise in each step: two model evaluations per step.
pub type KDPM2AncestralDiscreteScheduler<B> = Driver<B, KDPM2AncestralDiscreteConfig>;

impl Sampler for KDPM2AncestralDiscreteConfig {
    const CLASS: &'static str = "KDPM2AncestralDiscreteScheduler";
    const NAMES: Names = Names {
        short: "dpm2-a",
        about: "the same with noise in each step",
        popular: &[("DPM2 a", &[]), ("DPM2 a Karras", &[KARRAS])],
    };
    const ORDER: usize = 2;

    /// Between the two evaluations: the sample that the step starts from.
    type History<B: Backend> = Option<Tensor<B, 4>>;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: true,
            ..Capabilities::COUNTED
        }
    }

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
        Ancestral::check(Self::CLASS, &sigmas, f32::EPSILON)?;
        let mid = |pair: &[f32]| match Ancestral::between(pair[0], pair[1]).down {
            0.0 => 0.0,
            down => halfway(pair[0], down),
        };
        let mids: Vec<f32> = sigmas.windows(2).map(mid).collect();
        Ok(interleaved(&grid, &mids, &logs))
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        history: &mut Self::History<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (schedule, index) = (place.schedule, place.index);
        let sigma = schedule.model_sigma(index);
        let original = Prediction::of(self.prediction_type, &step).denoised(sigma);
        let prev_sample = match history.take() {
            None => {
                let dt = schedule.model_sigma(index + 1) - sigma;
                let start = step.sample.clone();
                *history = Some(start.clone());
                along(start, dt, step.sample, original.clone(), sigma)
            }
            Some(start) => {
                let from = schedule.sigmas[index - 1];
                let Ancestral { down, up } = Ancestral::between(from, schedule.sigmas[index]);
                let noise = step.noise.like(&original)?;
                along(start, down - from, step.sample, original.clone(), sigma)
                    + noise.mul_scalar(up)
            }
        };
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
