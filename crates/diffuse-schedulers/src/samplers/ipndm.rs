//! iPNDM: PNDM without its warm-up, with another noise schedule.
//!
//! "Fast Sampling of Diffusion Models with Exponential Integrator"
//! (<https://arxiv.org/abs/2204.13902>), algorithm 2, as v-diffusion
//! (<https://github.com/crowsonkb/v-diffusion-pytorch>) has it. Time `u` runs from 1 to 0, with
//! `β = sin²(π u / 2)` and `α = √(1 - β²)`; the model is conditioned on `2/π atan2(β, α)`, between
//! 0 and 1, and predicts a velocity `v`. With `e` the linear multistep estimate of Adams and
//! Bashforth, of order 1 to 4 as the run goes on, from `e_t`:
//!
//! ```text
//! e_t = β_t x_t + α_t v
//! x_s = α_s (x_t - β_t e) / α_t + β_s e
//! ```

use std::f32::consts::PI;

use super::prelude::*;
use crate::schedule::noise_schedule::linspace;
use crate::schedule::spacing::check_steps;
use crate::step::adams::adams_bashforth;

options! {
    /// Options of [`IPNDMScheduler`].
    pub struct IPNDMConfig {
        /// The largest number of steps of a run.
        pub num_train_timesteps: usize = 1000,
        /// `β` of every step and of the result, in place of the formula: one more than steps.
        pub trained_betas: Option<Vec<f64>> = None,
    }
}

/// A linear multistep method for models with time from 1 to 0.
pub type IPNDMScheduler<B> = Driver<B, IPNDMConfig>;

/// The `α` of a `β`.
fn alpha(beta: f32) -> f32 {
    (1.0 - beta * beta).sqrt()
}

impl Sampler for IPNDMConfig {
    const CLASS: &'static str = "IPNDMScheduler";
    const NAMES: Names = Names {
        short: "ipndm",
        about: "linear multistep for models whose time runs from 1 to 0",
        popular: &[("iPNDM", &[])],
    };

    /// The latest `e`, newest first: at most four.
    type History<B: Backend> = Vec<Tensor<B, 4>>;

    fn process(&self) -> Process {
        Process::Own
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        let usable = |betas: &Vec<f64>| {
            betas.len() >= 2 && betas.iter().all(|beta| (0.0..=1.0).contains(beta))
        };
        match &self.trained_betas {
            Some(betas) if !usable(betas) => Err(SchedulerError::Value {
                class: Self::CLASS,
                key: "trained_betas",
                value: format!("a list of {}", betas.len()),
                expected: "expected at least two numbers between 0 and 1".into(),
            }),
            _ => Ok(()),
        }
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        Ok(NoiseSchedule::default())
    }

    fn place(
        &self,
        request: &TimestepRequest,
        _noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let steps = request.steps(Self::CLASS)?;
        check_steps(Self::CLASS, steps, self.num_train_timesteps)?;
        let betas: Vec<f32> = match &self.trained_betas {
            Some(betas) => betas.iter().map(|&beta| beta as f32).collect(),
            None => linspace(1.0, 0.0, steps + 1)
                .into_iter()
                .map(|u| (u * PI / 2.0).sin().powi(2))
                .collect(),
        };
        let timesteps = betas[..betas.len() - 1]
            .iter()
            .map(|&beta| f64::from(beta.atan2(alpha(beta)) / PI * 2.0));
        // The factor of the noise is `β` here.
        Ok(Schedule::new(timesteps.collect(), betas))
    }

    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        estimates: &mut Self::History<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (beta, beta_next) = (place.sigma(), place.next_sigma());
        let (alpha, alpha_next) = (alpha(beta), alpha(beta_next));
        let estimate = combine([(beta, step.sample.clone()), (alpha, step.model_output)]);
        remember(estimates, estimate, 4);
        let coefficients = adams_bashforth(estimates.len()).iter().copied();
        let estimate = combine(coefficients.zip(estimates.iter().cloned()));
        // At the start both `α` and its dividend are 0.
        let image = combine([(1.0, step.sample), (-beta, estimate.clone())]);
        let image = image.div_scalar(alpha.max(1e-8));
        Ok(StepOutput {
            prev_sample: combine([(alpha_next, image), (beta_next, estimate)]),
            pred_original_sample: None,
        })
    }
}
