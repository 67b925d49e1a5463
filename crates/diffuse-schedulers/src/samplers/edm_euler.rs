//! Euler's method for EDM models.
//!
//! "Elucidating the Design Space of Diffusion-Based Generative Models"
//! (<https://arxiv.org/abs/2206.00364>), algorithm 2 without its second-order correction: the step
//! of `euler.rs`, with the model of `edm.rs`.
//!
//! ```text
//! x' = (σ' / σ̂) x̂ + (1 - σ' / σ̂) x0
//! ```

use super::edm::EDMOptions;
use super::euler::churn;
use super::prelude::*;

options! {
    /// Options of [`EDMEulerScheduler`].
    pub struct EDMEulerConfig {} with {
        pub edm: EDMOptions = EDMOptions::default(),
    }
}

/// Euler's method for EDM models; not for Stable Diffusion.
pub type EDMEulerScheduler<B> = Driver<B, EDMEulerConfig>;

impl Sampler for EDMEulerConfig {
    const CLASS: &'static str = "EDMEulerScheduler";
    const NAMES: Names = Names {
        short: "edm-euler",
        about: "Euler's method for EDM models",
        popular: &[],
    };

    type History<B: Backend> = ();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: true,
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        self.edm.process()
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.edm.check(Self::CLASS)
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        Ok(NoiseSchedule::default())
    }

    fn place(
        &self,
        request: &TimestepRequest,
        _noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let end = self.edm.final_sigmas_type;
        self.edm.place(Self::CLASS, request, |last| end.sigma(last))
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        (): &mut (),
    ) -> Result<StepOutput<B>, SchedulerError> {
        let sigma_hat = churn(&mut step, place)?;
        let original = self
            .edm
            .denoised(step.sample.clone(), step.model_output, sigma_hat);
        let share = place.next_sigma() / sigma_hat;
        let prev_sample = combine([(share, step.sample), (1.0 - share, original.clone())]);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
