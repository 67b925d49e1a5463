//! DDPM: ancestral sampling.
//!
//! "Denoising Diffusion Probabilistic Models" (<https://arxiv.org/abs/2006.11239>), algorithm 2 and
//! equations 6, 7, 15. From timestep `t` to the next lower one `s` of the schedule, with
//! `α = ᾱ_t / ᾱ_s` and `β = 1 - α`:
//!
//! ```text
//! x0  = (x_t - √(1 - ᾱ_t) ε) / √ᾱ_t
//! x_s = √ᾱ_s β / (1 - ᾱ_t) x0  +  √α (1 - ᾱ_s) / (1 - ᾱ_t) x_t  +  deviation z
//! ```
//!
//! The deviation is the square root of `β̃ = (1 - ᾱ_s) / (1 - ᾱ_t) β` (fixed small), of `β` (fixed
//! large), or is predicted by the model (learned). Coefficients are f32, as in Diffusers,
//! since that changes the result.

use serde::{Deserialize, Serialize};

use super::prelude::*;
use crate::schedule::spacing::check_whole_timesteps;

/// The variance of the noise in a step (the key `variance_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VarianceType {
    /// `β̃`, the variance when the image is known.
    FixedSmall,
    /// The same, computed by way of its logarithm.
    FixedSmallLog,
    /// `β`, the variance when nothing is known of the image.
    FixedLarge,
    /// Diffusers' mistake: the square root of the logarithm of `β`. Only a single step at timestep
    /// 0 is finite.
    FixedLargeLog,
    /// The model predicts the variance.
    Learned,
    /// The model predicts an interpolation of `β̃` and `β` (<https://arxiv.org/abs/2102.09672>,
    /// equation 15).
    LearnedRange,
}

impl VarianceType {
    pub(crate) fn is_learned(self) -> bool {
        matches!(self, Self::Learned | Self::LearnedRange)
    }
}

options! {
    /// Options of [`DDPMScheduler`].
    pub struct DDPMConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The variance of the noise in a step.
        pub variance_type: VarianceType = VarianceType::FixedSmall,
        /// Whether the betas are rescaled to zero terminal SNR.
        pub rescale_betas_zero_snr: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub clip: ClipOptions = ClipOptions::default(),
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::LEADING,
    }
}

/// Ancestral sampling: noise in each step.
pub type DDPMScheduler<B> = Driver<B, DDPMConfig>;

impl DDPMConfig {
    fn clipping(&self) -> Result<Clipping, SchedulerError> {
        let clipping = self.clip.clipping(Self::CLASS)?;
        self.threshold.clipping_or(Self::CLASS, clipping)
    }

    /// The factor of the noise in a step that the model predicts between `small = β̃` and
    /// `large = β`: `[batch, channels, height, width]`.
    fn learned_deviation<B: Backend>(
        &self,
        predicted: Tensor<B, 4>,
        small: f32,
        large: f32,
    ) -> Tensor<B, 4> {
        if self.variance_type == VarianceType::Learned {
            return predicted.sqrt();
        }
        // ln deviation = ½ (f ln β + (1 - f) ln β̃) with f = (predicted + 1) / 2
        let (small, large) = (0.5 * small.ln(), 0.5 * large.ln());
        predicted
            .mul_scalar(0.5 * (large - small))
            .add_scalar(0.5 * (large + small))
            .exp()
    }
}

impl Sampler for DDPMConfig {
    const CLASS: &'static str = "DDPMScheduler";
    const NAMES: Names = Names {
        short: "ddpm",
        about: "ancestral sampling, noise in each step: up to 1000 steps",
        popular: &[("DDPM", &[])],
    };

    type History<B: Backend> = ();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            noise: true,
            velocity: true,
            ..Capabilities::default()
        }
    }

    fn process(&self) -> Process {
        Process::Timesteps
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.clipping().map(|_| ())
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        use BetaSchedule::*;
        let supported = &[Linear, ScaledLinear, SquaredcosCapV2, Sigmoid, Laplace];
        let rescale = self.rescale_betas_zero_snr;
        self.betas
            .noise_schedule_of(Self::CLASS, supported, rescale)
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let train = self.betas.num_train_timesteps;
        let timesteps = match request {
            TimestepRequest::Timesteps(timesteps) => {
                check_whole_timesteps(Self::CLASS, timesteps, train, false)?;
                timesteps.clone()
            }
            other => {
                let spacing = self.spacing.over(Self::CLASS, &self.betas);
                spacing.visited(other.steps(Self::CLASS)?)?
            }
        };
        let (kind, clipping) = (self.prediction_type, self.clipping()?);
        noise_schedule.check_visited(Self::CLASS, &timesteps, kind, clipping)?;
        if self.variance_type == VarianceType::FixedLargeLog && timesteps[0] > 0.0 {
            return Err(SchedulerError::clash(
                Self::CLASS,
                "`variance_type` `fixed_large_log` and more than the last step",
                "it is the square root of a negative number, choose `fixed_large`",
            ));
        }
        Ok(Schedule::new(timesteps, Vec::new()))
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        (): &mut (),
    ) -> Result<StepOutput<B>, SchedulerError> {
        let alpha_bar = place.noise_schedule.alpha_bar(step.timestep)?;
        if place.schedule.timesteps[place.index] != step.timestep {
            let timestep = step.timestep;
            return Err(SchedulerError::NotInSchedule { timestep });
        }
        let alpha_bar_next = match place.next_timestep() {
            Some(next) => place.noise_schedule.alpha_bar(next)?,
            None => 1.0,
        };
        let alpha = alpha_bar / alpha_bar_next;
        let (beta, variance, variance_next) = (1.0 - alpha, 1.0 - alpha_bar, 1.0 - alpha_bar_next);

        let [_, channels, _, _] = step.sample.dims();
        let (kind, variance_type) = (self.prediction_type, Some(self.variance_type));
        let prediction = Prediction::without_variance(kind, &step, variance_type);
        let original = prediction.original(AlphaSigma::of_alpha_bar(alpha_bar));
        let original = self.clipping()?.apply(original);
        let mut next = combine([
            (alpha_bar_next.sqrt() * beta / variance, original.clone()),
            (alpha.sqrt() * variance_next / variance, step.sample),
        ]);
        if step.timestep > 0.0 {
            let noise = step.noise.like(&original)?;
            let small = (variance_next / variance * beta).max(1e-20);
            next = next
                + match self.variance_type {
                    VarianceType::FixedSmall => noise.mul_scalar(small.sqrt()),
                    VarianceType::FixedSmallLog => noise.mul_scalar((0.5 * small.ln()).exp()),
                    VarianceType::FixedLarge => noise.mul_scalar(beta.sqrt()),
                    VarianceType::FixedLargeLog => noise.mul_scalar(beta.ln().sqrt()),
                    VarianceType::Learned | VarianceType::LearnedRange => {
                        let predicted = step.model_output.narrow(1, channels, channels);
                        self.learned_deviation(predicted, small, beta) * noise
                    }
                };
        }
        Ok(StepOutput {
            prev_sample: next,
            pred_original_sample: Some(original),
        })
    }
}
