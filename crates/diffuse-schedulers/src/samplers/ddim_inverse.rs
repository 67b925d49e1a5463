//! DDIM backwards, from an image to its noise.
//!
//! "Diffusion Models Beat GANs on Image Synthesis" (<https://arxiv.org/abs/2105.05233>, appendix
//! F): the ODE of "Denoising Diffusion Implicit Models" (<https://arxiv.org/abs/2010.02502>,
//! equation 14), solved towards noise. At timestep `t`, from `s = t - ⌊T / n⌋` to `t`, with the
//! model output at `t` in place of that at `s`:
//!
//! ```text
//! x0  = (x_s - √(1 - ᾱ_s) ε) / √ᾱ_s
//! x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε
//! ```

use super::prelude::*;

options! {
    /// Options of [`DDIMInverseScheduler`].
    pub struct DDIMInverseConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// Whether the first step starts from an image without noise, not from the first training
        /// timestep.
        pub set_alpha_to_one: bool = true,
        /// Whether the betas are rescaled to zero terminal SNR.
        pub rescale_betas_zero_snr: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub clip: ClipOptions = ClipOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::LEADING,
    }
}

/// DDIM backwards: it computes the noise from which DDIM makes an image.
pub type DDIMInverseScheduler<B> = Driver<B, DDIMInverseConfig>;

impl Sampler for DDIMInverseConfig {
    const CLASS: &'static str = "DDIMInverseScheduler";
    const NAMES: Names = Names {
        short: "ddim-inverse",
        about: "DDIM backwards, from an image to its noise",
        popular: &[("DDIM Inverse", &[])],
    };

    type History<B: Backend> = ();

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn process(&self) -> Process {
        Process::Own
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        let supported = &[TimestepSpacing::Leading, TimestepSpacing::Trailing];
        let spacing = &self.spacing.timestep_spacing;
        require(Self::CLASS, "timestep_spacing", spacing, supported)?;
        self.clip.clipping(Self::CLASS).map(|_| ())
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        let rescale = self.rescale_betas_zero_snr;
        self.betas.rescaled_noise_schedule(Self::CLASS, rescale)
    }

    fn place(
        &self,
        request: &TimestepRequest,
        _noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let (train, steps) = (self.betas.num_train_timesteps, request.steps(Self::CLASS)?);
        let mut timesteps = self.spacing.over(Self::CLASS, &self.betas).visited(steps)?;
        timesteps.reverse();
        let from_image = timesteps[0] < (train / steps) as f64 && self.set_alpha_to_one;
        if from_image && self.prediction_type == PredictionType::Sample {
            return Err(SchedulerError::clash(
                Self::CLASS,
                "`prediction_type` `sample` and `set_alpha_to_one` `true`",
                "an image without noise does not determine the noise, choose \
                 `set_alpha_to_one` `false`",
            ));
        }
        Ok(Schedule::new(timesteps, Vec::new()))
    }

    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        (): &mut (),
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (noise_schedule, to_one) = (place.noise_schedule, self.set_alpha_to_one);
        let s = step.timestep - place.stride(self.betas.num_train_timesteps);
        let at_s = AlphaSigma::of_alpha_bar(noise_schedule.alpha_bar_or_end(s, to_one)?);
        let at_t = AlphaSigma::of_alpha_bar(noise_schedule.alpha_bar(step.timestep)?);
        let prediction = Prediction::of(self.prediction_type, &step);
        let clipping = self.clip.clipping(Self::CLASS)?;
        let original = clipping.apply(prediction.original(at_s));
        let prev_sample = combine([
            (at_t.alpha, original.clone()),
            (at_t.sigma, prediction.epsilon(at_s)),
        ]);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
