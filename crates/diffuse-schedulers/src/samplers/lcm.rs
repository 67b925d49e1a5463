//! LCM: sampling of latent consistency models.
//!
//! "Latent Consistency Models" (<https://arxiv.org/abs/2310.04378>), algorithm 3, with the boundary
//! conditions of "Consistency Models" (<https://arxiv.org/abs/2303.01469>, appendix C). From
//! timestep `t` to the next lower one `s` of the schedule, with `r = timestep_scaling t` and
//! `σ_data = 1/2`:
//!
//! ```text
//! f   = c_skip x_t + c_out x0,   c_skip = σ_data² / (r² + σ_data²),   c_out = r / √(r² + σ_data²)
//! x_s = √ᾱ_s f + √(1 - ᾱ_s) z,   and f itself at the end
//! ```

use super::consistency;
use super::prelude::*;

options! {
    /// Options of [`LCMScheduler`].
    pub struct LCMConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The number of timesteps that the model was distilled at.
        pub original_inference_steps: usize = 50,
        /// Without effect: no step goes below the schedule.
        pub set_alpha_to_one: bool = true,
        /// The factor of timesteps in the boundary conditions.
        pub timestep_scaling: f64 = 10.0,
        /// Whether the betas are rescaled to zero terminal SNR.
        pub rescale_betas_zero_snr: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::latent(BetaSchedule::ScaledLinear),
        pub clip: ClipOptions = ClipOptions::OFF,
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
        /// Without effect: the timesteps are those of the distillation.
        pub spacing: SpacingOptions = SpacingOptions::LEADING,
    }
}

/// Sampling of latent consistency models, in 1 to 8 steps.
pub type LCMScheduler<B> = Driver<B, LCMConfig>;

impl LCMConfig {
    fn clipping(&self) -> Result<Clipping, SchedulerError> {
        let clipping = self.clip.clipping(Self::CLASS)?;
        self.threshold.clipping_or(Self::CLASS, clipping)
    }
}

impl Sampler for LCMConfig {
    const CLASS: &'static str = "LCMScheduler";
    const NAMES: Names = Names {
        short: "lcm",
        about: "latent consistency models: 1 to 8 steps",
        popular: &[("LCM", &[])],
    };

    type History<B: Backend> = ();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            noise: true,
            velocity: true,
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        Process::Timesteps
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.clipping()?;
        if !self.timestep_scaling.is_finite() {
            return Err(SchedulerError::Value {
                class: Self::CLASS,
                key: "timestep_scaling",
                value: self.timestep_scaling.to_string(),
                expected: "expected a finite number".into(),
            });
        }
        let train = self.betas.num_train_timesteps;
        consistency::check(Self::CLASS, train, self.original_inference_steps)
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
        let (train, original) = (
            self.betas.num_train_timesteps,
            self.original_inference_steps,
        );
        let timesteps = consistency::timesteps(Self::CLASS, request, train, original)?;
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
        let prediction = Prediction::of(self.prediction_type, &step);
        let at = AlphaSigma::of_alpha_bar(place.noise_schedule.alpha_bar(step.timestep)?);
        let original = self.clipping()?.apply(prediction.original(at));
        let r = step.timestep as f32 * self.timestep_scaling as f32;
        let c_skip = 0.25 / (r * r + 0.25);
        let c_out = r / (r * r + 0.25).sqrt();
        let denoised = combine([(c_out, original), (c_skip, step.sample)]);
        let prev_sample = match place.next_timestep() {
            None => denoised.clone(),
            Some(next) => {
                let next = AlphaSigma::of_alpha_bar(place.noise_schedule.alpha_bar(next)?);
                let noise = step.noise.like(&denoised)?;
                combine([(next.alpha, denoised.clone()), (next.sigma, noise)])
            }
        };
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(denoised),
        })
    }
}
