//! DDIM: implicit sampling.
//!
//! "Denoising Diffusion Implicit Models" (<https://arxiv.org/abs/2010.02502>), equations 12 and 16.
//! From timestep `t` to `s = t - ⌊T / n⌋`, with `σ² = η² (1 - ᾱ_s) / (1 - ᾱ_t) (1 - ᾱ_t / ᾱ_s)`:
//!
//! ```text
//! x0  = (x_t - √(1 - ᾱ_t) ε) / √ᾱ_t
//! x_s = √ᾱ_s x0 + √(1 - ᾱ_s - σ²) ε + σ z
//! ```
//!
//! `s` is computed from `t`, not read from the schedule; below 0, `ᾱ_s` is 1 or `ᾱ_0`, by
//! `set_alpha_to_one`.

use super::prelude::*;

options! {
    /// Options of [`DDIMScheduler`].
    pub struct DDIMConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// Whether the last step ends at an image without noise, not at the first training
        /// timestep.
        pub set_alpha_to_one: bool = true,
        /// Whether the betas are rescaled to zero terminal SNR.
        pub rescale_betas_zero_snr: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub clip: ClipOptions = ClipOptions::default(),
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::LEADING,
    }
}

/// Implicit sampling: few steps, and no noise in them unless
/// [`StepOptions::eta`](crate::StepOptions::eta) is set.
pub type DDIMScheduler<B> = Driver<B, DDIMConfig>;

impl DDIMConfig {
    fn clipping(&self) -> Result<Clipping, SchedulerError> {
        let clipping = self.clip.clipping(Self::CLASS)?;
        self.threshold.clipping_or(Self::CLASS, clipping)
    }
}

impl Sampler for DDIMConfig {
    const CLASS: &'static str = "DDIMScheduler";
    const NAMES: Names = Names {
        short: "ddim",
        about: "the same without noise: 50 steps",
        popular: &[("DDIM", &[])],
    };

    type History<B: Backend> = ();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            eta: true,
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
        let rescale = self.rescale_betas_zero_snr;
        self.betas.rescaled_noise_schedule(Self::CLASS, rescale)
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let spacing = self.spacing.over(Self::CLASS, &self.betas);
        let timesteps = spacing.visited(request.steps(Self::CLASS)?)?;
        let (kind, clipping) = (self.prediction_type, self.clipping()?);
        noise_schedule.check_visited(Self::CLASS, &timesteps, kind, clipping)?;
        Ok(Schedule::new(timesteps, Vec::new()))
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        (): &mut (),
    ) -> Result<StepOutput<B>, SchedulerError> {
        let s = step.timestep - place.stride(self.betas.num_train_timesteps);
        let alpha_bar = place.noise_schedule.alpha_bar(step.timestep)?;
        let alpha_bar_next = place
            .noise_schedule
            .alpha_bar_or_end(s, self.set_alpha_to_one)?;
        let eta = step.options.eta.unwrap_or(0.0) as f32;
        let variance =
            (1.0 - alpha_bar_next) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_next);
        let deviation = eta * variance.sqrt();
        let towards_sample = 1.0 - alpha_bar_next - deviation * deviation;
        if towards_sample < 0.0 && eta.abs() > 1.0 {
            return Err(SchedulerError::StepOption {
                name: "eta",
                value: eta.into(),
                expected: "a number between 0 and 1",
            });
        }

        let at = AlphaSigma::of_alpha_bar(alpha_bar);
        let prediction = Prediction::of(self.prediction_type, &step);
        let original = self.clipping()?.apply(prediction.original(at));
        let epsilon = match step.options.use_clipped_model_output {
            true => noise_between(prediction.sample, original.clone(), at),
            false => prediction.epsilon(at),
        };
        let mut next = combine([
            (alpha_bar_next.sqrt(), original.clone()),
            (towards_sample.max(0.0).sqrt(), epsilon),
        ]);
        if eta > 0.0 {
            next = next + step.noise.like(&original)?.mul_scalar(deviation);
        }
        Ok(StepOutput {
            prev_sample: next,
            pred_original_sample: Some(original),
        })
    }
}
