//! TCD: sampling of trajectory consistency models.
//!
//! "Trajectory Consistency Distillation" (<https://arxiv.org/abs/2402.19159>), algorithm 4, with
//! `η` for the paper's `γ`. From timestep `t` to the next lower one `r` of the schedule, by way of
//! `s = ⌊(1 - η) r⌋`:
//!
//! ```text
//! x_s = √ᾱ_s x0 + √(1 - ᾱ_s) ε
//! x_r = √(ᾱ_r / ᾱ_s) x_s + √(1 - ᾱ_r / ᾱ_s) z,   and x_s itself, with r = 0, at the end
//! ```

use super::consistency;
use super::prelude::*;

options! {
    /// Options of [`TCDScheduler`]. As in Diffusers, `clip_sample` and `thresholding` have no
    /// effect.
    pub struct TCDConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The number of timesteps that the model was distilled at.
        pub original_inference_steps: usize = 50,
        /// Without effect: no step goes below the schedule.
        pub set_alpha_to_one: bool = true,
        /// Without effect: an option of LCM.
        pub timestep_scaling: f64 = 10.0,
        /// Whether the betas are rescaled to zero terminal SNR.
        pub rescale_betas_zero_snr: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::latent(BetaSchedule::ScaledLinear),
        /// Without effect.
        pub clip: ClipOptions = ClipOptions::OFF,
        /// Without effect.
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
        /// Without effect: the timesteps are those of the distillation.
        pub spacing: SpacingOptions = SpacingOptions::LEADING,
    }
}

/// Sampling of trajectory consistency models, in 2 to 8 steps.
pub type TCDScheduler<B> = Driver<B, TCDConfig>;

/// The default of [`StepOptions::eta`](crate::StepOptions::eta).
const DEFAULT_ETA: f64 = 0.3;

impl Sampler for TCDConfig {
    const CLASS: &'static str = "TCDScheduler";
    const NAMES: Names = Names {
        short: "tcd",
        about: "trajectory consistency models: 2 to 8 steps",
        popular: &[("TCD", &[])],
    };

    type History<B: Backend> = ();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            eta: true,
            noise: true,
            velocity: true,
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        Process::Timesteps
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        // Without effect, but kept in the configuration.
        self.clip.clipping(Self::CLASS)?;
        self.threshold.clipping(Self::CLASS)?;
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
        let kind = self.prediction_type;
        noise_schedule.check_visited(Self::CLASS, &timesteps, kind, Clipping::None)?;
        Ok(Schedule::new(timesteps, Vec::new()))
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        (): &mut (),
    ) -> Result<StepOutput<B>, SchedulerError> {
        let eta = step.options.eta.unwrap_or(DEFAULT_ETA);
        if !(0.0..=1.0).contains(&eta) {
            return Err(SchedulerError::StepOption {
                name: "eta",
                value: eta,
                expected: "a number between 0 and 1",
            });
        }
        let next = place.next_timestep();
        let s = f64::from(((1.0 - eta) as f32 * next.unwrap_or(0.0) as f32).floor());
        let prediction = Prediction::of(self.prediction_type, &step);
        let alpha_bar = |timestep| place.noise_schedule.alpha_bar(timestep);
        let at_t = AlphaSigma::of_alpha_bar(alpha_bar(step.timestep)?);
        let at_s = AlphaSigma::of_alpha_bar(alpha_bar(s)?);
        let original = prediction.original(at_t);
        let prev_sample = match next {
            Some(r) if eta > 0.0 => {
                let onward = AlphaSigma::of_alpha_bar(alpha_bar(r)? / alpha_bar(s)?);
                let noise = step.noise.like(&original)?;
                combine([
                    (onward.alpha * at_s.alpha, original.clone()),
                    (onward.alpha * at_s.sigma, prediction.epsilon(at_t)),
                    (onward.sigma, noise),
                ])
            }
            _ => combine([
                (at_s.alpha, original.clone()),
                (at_s.sigma, prediction.epsilon(at_t)),
            ]),
        };
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
