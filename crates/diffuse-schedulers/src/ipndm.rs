//! iPNDM: PNDM without its warm-up, on a schedule of its own.
//!
//! "Fast Sampling of Diffusion Models with Exponential Integrator" (<https://arxiv.org/abs/2204.13902>), algorithm 2, as
//! v-diffusion (<https://github.com/crowsonkb/v-diffusion-pytorch>) has it. Time `u` runs from 1 to 0, with
//! `β = sin²(π u / 2)` and `α = √(1 - β²)`; the model is told `2/π atan2(β, α)`, between 0 and 1, and predicts a velocity
//! `v`. With `e` the linear multistep estimate of Adams and Bashforth, of order 1 to 4 as the run goes on, from `e_t`:
//!
//! ```text
//! e_t = β_t x_t + α_t v
//! x_s = α_s (x_t - β_t e) / α_t + β_s e
//! ```

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, scheduler_config};
use crate::ladder::{Ladder, ladder_methods};
use crate::noise_schedule::linspace;
use crate::tensor::combine;
use crate::weights::remember;
use crate::{Capabilities, Scheduler, SchedulerError, Step, StepOutput, TimestepRequest};

scheduler_config! {
    /// Options of [`IPNDMScheduler`].
    pub struct IPNDMConfig for "IPNDMScheduler" [] {
        /// The number of steps that a run has at most.
        pub num_train_timesteps: usize = 1000,
        /// `β` of every step and of the result, instead of the schedule above: their number is that of the steps.
        pub trained_betas: Option<Vec<f64>> = None,
    }
}

const CLASS: &str = IPNDMConfig::CLASS;

/// A linear multistep method for models whose time runs from 1 to 0.
#[derive(Debug)]
pub struct IPNDMScheduler<B: Backend> {
    resolved: Resolved<IPNDMConfig>,
    ladder: Ladder,
    /// `β` at each timestep and at the result.
    betas: Vec<f32>,
    /// The latest `e`, newest first: at most four.
    estimates: Vec<Tensor<B, 4>>,
}

/// `α` that belongs to a `β`.
fn alpha(beta: f32) -> f32 {
    (1.0 - beta * beta).sqrt()
}

impl<B: Backend> IPNDMScheduler<B> {
    pub(crate) fn build(resolved: Resolved<IPNDMConfig>) -> Result<Self, SchedulerError> {
        let usable = |betas: &Vec<f64>| {
            betas.len() >= 2 && betas.iter().all(|beta| (0.0..=1.0).contains(beta))
        };
        if let Some(betas) = resolved
            .options
            .trained_betas
            .as_ref()
            .filter(|betas| !usable(betas))
        {
            return Err(SchedulerError::Value {
                class: CLASS,
                key: "trained_betas",
                value: format!("a list of {}", betas.len()),
                expected: "expected at least two numbers between 0 and 1".into(),
            });
        }
        let (betas, estimates) = (Vec::new(), Vec::new());
        Ok(Self {
            ladder: Ladder::default(),
            betas,
            estimates,
            resolved,
        })
    }
}

impl<B: Backend> Scheduler<B> for IPNDMScheduler<B> {
    ladder_methods!();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let steps = request.steps(CLASS)?;
        if !(1..=options.num_train_timesteps).contains(&steps) {
            let supported = format!(
                "1 to {} (`num_train_timesteps`)",
                options.num_train_timesteps
            );
            return Err(SchedulerError::Steps {
                class: CLASS,
                steps,
                supported,
            });
        }
        let half_turn = std::f32::consts::PI;
        self.betas = match &options.trained_betas {
            Some(betas) => betas.iter().map(|&beta| beta as f32).collect(),
            None => linspace(1.0, 0.0, steps + 1)
                .into_iter()
                .map(|u| (u * half_turn / 2.0).sin().powi(2))
                .collect(),
        };
        let timesteps = self.betas[..self.betas.len() - 1]
            .iter()
            .map(|&beta| f64::from(beta.atan2(alpha(beta)) / half_turn * 2.0));
        self.ladder = Ladder::new(timesteps.collect(), Vec::new());
        self.estimates.clear();
        Ok(())
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let [beta, beta_next] = [rung, rung + 1].map(|rung| self.betas[rung]);
        let (alpha, alpha_next) = (alpha(beta), alpha(beta_next));
        let estimate = combine([(beta, step.sample.clone()), (alpha, step.model_output)]);
        remember(&mut self.estimates, estimate, 4);
        let weights: &[f32] = match self.estimates.len() {
            1 => &[1.0],
            2 => &[3.0 / 2.0, -1.0 / 2.0],
            3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
            _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
        };
        let weights = weights.iter().copied();
        let estimate = combine(weights.zip(self.estimates.iter().cloned()));
        // At the start `α` is 0 and so is what it divides, which must be computed before.
        let image = combine([(1.0, step.sample), (-beta, estimate.clone())]);
        let image = image.div_scalar(alpha.max(1e-8));
        let prev_sample = combine([(alpha_next, image), (beta_next, estimate)]);
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}
