//! Euler's method with noise in each step.
//!
//! k-diffusion's `sample_euler_ancestral` (<https://github.com/crowsonkb/k-diffusion>): Euler's
//! method of <https://arxiv.org/abs/2206.00364>, algorithm 2, in ancestral steps. From `σ` to the
//! next `σ'`, with `σ_down² + σ_up² = σ'²`:
//!
//! ```text
//! σ_up² = σ'² (σ² - σ'²) / σ²
//! x'    = (σ_down / σ) x + (1 - σ_down / σ) x0 + σ_up z
//! ```

use super::prelude::*;
use crate::step::ancestral::Ancestral;

options! {
    /// Options of [`EulerAncestralDiscreteScheduler`].
    pub struct EulerAncestralDiscreteConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// Whether the betas are rescaled to zero terminal SNR.
        pub rescale_betas_zero_snr: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// Euler's method with noise in each step: the image does not converge with more steps.
pub type EulerAncestralDiscreteScheduler<B> = Driver<B, EulerAncestralDiscreteConfig>;

impl Sampler for EulerAncestralDiscreteConfig {
    const CLASS: &'static str = "EulerAncestralDiscreteScheduler";
    const NAMES: Names = Names {
        short: "euler-a",
        about: "Euler's method with noise in each step: 20 to 40 steps",
        popular: &[("Euler a", &[]), ("Euler ancestral", &[])],
    };

    type History<B: Backend> = ();

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
        self.prediction_type.require_noise(Self::CLASS)
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        let rescale = self.rescale_betas_zero_snr;
        let noise_schedule = self.betas.rescaled_noise_schedule(Self::CLASS, rescale)?;
        Ok(noise_schedule.with_finite_last_sigma(rescale))
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let spacing = self.spacing.over(Self::CLASS, &self.betas);
        let timesteps = spacing.visited_unrounded(request.steps(Self::CLASS)?)?;
        let schedule = SigmaGrid::at(timesteps, &noise_schedule.sigmas()).to(0.0);
        Ancestral::check(Self::CLASS, &schedule.sigmas, 0.0)?;
        Ok(schedule)
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        (): &mut (),
    ) -> Result<StepOutput<B>, SchedulerError> {
        let sigma = place.sigma();
        let Ancestral { down, up } = Ancestral::between(sigma, place.next_sigma());
        let prediction = Prediction::of(self.prediction_type, &step);
        let original = prediction.denoised(sigma);
        let noise = step.noise.like(&original)?;
        let prev_sample = combine([
            (down / sigma, prediction.sample),
            (1.0 - down / sigma, original.clone()),
            (up, noise),
        ]);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
