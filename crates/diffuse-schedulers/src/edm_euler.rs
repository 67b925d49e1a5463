//! Euler's method for EDM models.
//!
//! "Elucidating the Design Space of Diffusion-Based Generative Models" (<https://arxiv.org/abs/2206.00364>), algorithm 2
//! without its second-order correction: the step of `euler.rs`, with the model of `edm.rs`.

use std::marker::PhantomData;

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::edm::EDM;
use crate::euler::churn;
use crate::ladder::{Ladder, ladder_methods};
use crate::tensor::combine;
use crate::{
    Capabilities, FinalSigmasType, Scheduler, SchedulerError, Step, StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`EDMEulerScheduler`].
    pub struct EDMEulerConfig for "EDMEulerScheduler" [edm] {}
}

const CLASS: &str = EDMEulerConfig::CLASS;

/// Euler's method for EDM models; not for Stable Diffusion.
#[derive(Debug)]
pub struct EDMEulerScheduler<B: Backend> {
    resolved: Resolved<EDMEulerConfig>,
    ladder: Ladder,
    backend: PhantomData<B>,
}

impl<B: Backend> EDMEulerScheduler<B> {
    pub(crate) fn build(resolved: Resolved<EDMEulerConfig>) -> Result<Self, SchedulerError> {
        resolved.options.edm().check()?;
        Ok(Self {
            ladder: Ladder::default(),
            resolved,
            backend: PhantomData,
        })
    }
}

impl<B: Backend> Scheduler<B> for EDMEulerScheduler<B> {
    ladder_methods!(of_level);

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: true,
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
            FinalSigmasType::SigmaMin => sigmas[sigmas.len() - 1],
        });
        self.ladder = Ladder::new(timesteps, sigmas);
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
        let [sigma, next] = [rung, rung + 1].map(|rung| self.ladder.sigmas()[rung]);
        let sigma_hat = churn(&mut step, sigma, self.ladder.sigmas().len() - 1)?;
        let edm = self.resolved.options.edm();
        let original = edm.denoised(step.sample.clone(), step.model_output, sigma_hat);
        let share = next / sigma_hat;
        let prev_sample = combine([(share, step.sample), (1.0 - share, original.clone())]);
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
