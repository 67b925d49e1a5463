//! PNDM and PLMS: pseudo numerical methods.
//!
//! "Pseudo Numerical Methods for Diffusion Models on Manifolds" (<https://arxiv.org/abs/2202.09778>), equations 9, 12,
//! 13 and algorithm 2. Noise estimates `e` are combined as in classical methods, and carried from `t` to `s` by
//!
//! ```text
//! φ(x, e, t, s) = √(ᾱ_s / ᾱ_t) x - (ᾱ_s - ᾱ_t) / (ᾱ_t √(1 - ᾱ_s) + √(ᾱ_t (1 - ᾱ_t) ᾱ_s)) e
//! ```
//!
//! Runge-Kutta warm-up (PRK), four model calls for each of the first three steps:
//! `e = (e1 + 2 e2 + 2 e3 + e4) / 6`. Then linear multistep (PLMS), one call a step:
//! `e = (55 e_t - 59 e_{t+δ} + 37 e_{t+2δ} - 9 e_{t+3δ}) / 24`.
//!
//! With `skip_prk_steps` (Stable Diffusion) the warm-up is PLMS of lower orders, and the first step is taken twice: the
//! second time with the mean of the noise estimates at both its ends. The schedule then has one entry more.

use burn::prelude::*;

use crate::config::{ClassConfig, Resolved, require, scheduler_config};
use crate::mixture::{self, Mixture};
use crate::prediction::Prediction;
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, PredictionType, Scheduler, SchedulerConfig,
    SchedulerError, Step, StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`PNDMScheduler`].
    pub struct PNDMConfig for "PNDMScheduler" [noise(0.0001, 0.02, Linear), spacing(Leading)] {
        /// Whether to leave out the Runge-Kutta warm-up, as Stable Diffusion does.
        pub skip_prk_steps: bool = false,
        /// Whether the last step ends at an image without noise, instead of the first training timestep.
        pub set_alpha_to_one: bool = false,
    }
}

/// The sampler that Stable Diffusion v1 was published with.
#[derive(Debug)]
pub struct PNDMScheduler<B: Backend> {
    resolved: Resolved<PNDMConfig>,
    noise_schedule: NoiseSchedule,
    timesteps: Vec<f64>,
    /// `⌊T / n⌋`
    stride: usize,
    /// The number of entries of the Runge-Kutta warm-up.
    warm_up: usize,
    calls: usize,
    /// The latest noise estimates at whole steps, newest last: at most four.
    estimates: Vec<Tensor<B, 4>>,
    /// The sum of Runge-Kutta estimates so far.
    sum: Option<Tensor<B, 4>>,
    /// The sample that a step of several calls starts from.
    start: Option<Tensor<B, 4>>,
}

/// The number of steps that the Runge-Kutta warm-up spans, one end included.
const PRK_SPAN: usize = 4;

impl<B: Backend> PNDMScheduler<B> {
    pub(crate) fn build(resolved: Resolved<PNDMConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let supported = &[PredictionType::Epsilon, PredictionType::VPrediction];
        require(
            PNDMConfig::CLASS,
            "prediction_type",
            &options.prediction_type,
            supported,
        )?;
        let noise_schedule = options.noise_schedule(BetaSchedule::COMMON, false)?;
        Ok(Self {
            noise_schedule,
            resolved,
            timesteps: Vec::new(),
            stride: 0,
            warm_up: 0,
            calls: 0,
            estimates: Vec::new(),
            sum: None,
            start: None,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// Each Runge-Kutta step asks at its start, twice at its middle, and at its end, where the next one asks again.
    fn prk_timesteps(&self, visited: &[f64]) -> Vec<f64> {
        let half = (self.stride / 2) as f64;
        visited[..PRK_SPAN]
            .windows(2)
            .flat_map(|step| [step[0], step[1] + half, step[1] + half, step[1]])
            .collect()
    }

    /// One call of the Runge-Kutta warm-up; every fourth completes a step.
    fn prk(
        &mut self,
        prediction: Prediction<B>,
        timestep: f64,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let Prediction {
            kind,
            output,
            sample,
        } = prediction;
        let call = self.calls % 4;
        let ahead = if call == 0 || call == 2 {
            self.stride / 2
        } else {
            0
        };
        let from = self.timesteps[self.calls - call];
        let weighted = output.clone().mul_scalar(if call == 0 || call == 3 {
            1.0 / 6.0
        } else {
            1.0 / 3.0
        });
        let sum = match self.sum.take() {
            Some(sum) if call > 0 => sum + weighted,
            _ => weighted,
        };
        if call == 0 {
            self.estimates.push(output.clone());
            self.start = Some(sample.clone());
        }
        let output = if call == 3 { sum.clone() } else { output };
        self.sum = Some(sum);
        let sample = self.start.clone().unwrap_or(sample);
        self.transfer(
            Prediction {
                kind,
                output,
                sample,
            },
            from,
            timestep - ahead as f64,
        )
    }

    /// One call of the linear multistep method.
    fn plms(
        &mut self,
        prediction: Prediction<B>,
        timestep: f64,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let Prediction {
            kind,
            output,
            sample,
        } = prediction;
        let options = &self.resolved.options;
        if !options.skip_prk_steps && self.estimates.len() < 3 {
            let reason =
                "a run with `skip_prk_steps` `false` starts at the first timestep".to_string();
            return Err(SchedulerError::WarmUp {
                class: PNDMConfig::CLASS,
                reason,
            });
        }
        let (mut from, mut to) = (timestep, timestep - self.stride as f64);
        let mut start = sample.clone();
        let estimate = if self.calls == 1 {
            // The first step once more, with the noise at its end known.
            (from, to) = (timestep + self.stride as f64, timestep);
            start = self.start.take().unwrap_or(sample);
            combine([(0.5, output), (0.5, self.estimates[0].clone())])
        } else {
            if self.calls == 0 {
                self.start = Some(sample);
            }
            if self.estimates.len() == 4 {
                self.estimates.remove(0);
            }
            self.estimates.push(output);
            let weights: &[f32] = match self.estimates.len() {
                1 => &[1.0],
                2 => &[3.0 / 2.0, -1.0 / 2.0],
                3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
                _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
            };
            combine(
                weights
                    .iter()
                    .copied()
                    .zip(self.estimates.iter().rev().cloned()),
            )
        };
        self.transfer(
            Prediction {
                kind,
                output: estimate,
                sample: start,
            },
            from,
            to,
        )
    }

    /// `φ`, equation 9.
    fn transfer(
        &self,
        prediction: Prediction<B>,
        from: f64,
        to: f64,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let alpha_bar = self.noise_schedule.alpha_bar(from)?;
        let alpha_bar_next = self
            .noise_schedule
            .alpha_bar_or_end(to, self.resolved.options.set_alpha_to_one)?;
        let denominator = alpha_bar * (1.0 - alpha_bar_next).sqrt()
            + (alpha_bar * (1.0 - alpha_bar) * alpha_bar_next).sqrt();
        let epsilon = prediction.epsilon(Mixture::of_alpha_bar(alpha_bar));
        Ok(combine([
            ((alpha_bar_next / alpha_bar).sqrt(), prediction.sample),
            (-(alpha_bar_next - alpha_bar) / denominator, epsilon),
        ]))
    }
}

impl<B: Backend> Scheduler<B> for PNDMScheduler<B> {
    fn config(&self) -> &SchedulerConfig {
        &self.resolved.config
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let steps = request.steps(PNDMConfig::CLASS)?;
        let visited = options.spacing().visited(steps)?;
        self.stride = options.num_train_timesteps / steps;
        (self.timesteps, self.warm_up) = if options.skip_prk_steps {
            let twice = visited.get(1).copied();
            let (first, rest) = visited.split_at(visited.len().min(1));
            ([first, twice.as_slice(), rest].concat(), 0)
        } else if steps < PRK_SPAN {
            let supported = format!("at least {PRK_SPAN} with `skip_prk_steps` `false`");
            return Err(SchedulerError::Steps {
                class: PNDMConfig::CLASS,
                steps,
                supported,
            });
        } else {
            let prk = self.prk_timesteps(&visited);
            let warm_up = prk.len();
            ([prk, visited[PRK_SPAN - 1..].to_vec()].concat(), warm_up)
        };
        self.calls = 0;
        self.estimates.clear();
        (self.sum, self.start) = (None, None);
        Ok(())
    }

    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let Step {
            model_output,
            timestep,
            sample,
            ..
        } = step;
        let prediction = Prediction {
            kind: self.resolved.options.prediction_type,
            output: model_output,
            sample,
        };
        let prev_sample = match self.calls < self.warm_up {
            true => self.prk(prediction, timestep)?,
            false => self.plms(prediction, timestep)?,
        };
        self.calls += 1;
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }

    fn add_noise(
        &self,
        original: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        mixture::add_noise(&self.noise_schedule.mixtures(timesteps)?, original, noise)
    }
}
