//! Heun's method.
//!
//! "Elucidating the Design Space of Diffusion-Based Generative Models"
//! (<https://arxiv.org/abs/2206.00364>), algorithm 1. From `σ` to the next `σ'` the model is
//! evaluated at both ends, so each timestep but the first occurs twice in the schedule. The last
//! step, to sigma 0, has one evaluation.
//!
//! ```text
//! d  = (x - x0) / σ,    x' = x + (σ' - σ) d
//! d' = (x' - x0') / σ', x' = x + (σ' - σ) (d + d') / 2
//! ```

use super::prelude::*;
use super::two_evaluations::doubled;
use crate::schedule::spacing::check_timesteps;

options! {
    /// Options of [`HeunDiscreteScheduler`].
    pub struct HeunDiscreteConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
    } with {
        pub betas: BetaOptions = BetaOptions::latent(BetaSchedule::Linear),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub clip: ClipOptions = ClipOptions::OFF,
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// Heun's method: order 2, two model evaluations per step.
pub type HeunDiscreteScheduler<B> = Driver<B, HeunDiscreteConfig>;

impl Sampler for HeunDiscreteConfig {
    const CLASS: &'static str = "HeunDiscreteScheduler";
    const NAMES: Names = Names {
        short: "heun",
        about: "Heun's method, two model evaluations a step: 10 to 20 steps",
        popular: &[("Heun", &[])],
    };
    const ORDER: usize = 2;

    /// Between the two evaluations: the sample that the step starts from, and the derivative there.
    type History<B: Backend> = Option<(Tensor<B, 4>, Tensor<B, 4>)>;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        Process::Exploding(self.spacing.timestep_spacing)
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.sigmas.sigma_schedule(Self::CLASS)?;
        self.clip.clipping(Self::CLASS).map(|_| ())
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        use BetaSchedule::*;
        let supported = &[Linear, ScaledLinear, SquaredcosCapV2, Exp];
        self.betas.noise_schedule_of(Self::CLASS, supported, false)
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let train = self.betas.num_train_timesteps;
        let schedule = self.sigmas.sigma_schedule(Self::CLASS)?;
        let timesteps = match request {
            TimestepRequest::Timesteps(timesteps) => {
                check_timesteps(Self::CLASS, timesteps, train, schedule.is_some())?;
                timesteps.clone()
            }
            other => {
                let spacing = self.spacing.over(Self::CLASS, &self.betas);
                spacing.visited_unrounded(other.steps(Self::CLASS)?)?
            }
        };
        let table = noise_schedule.sigmas();
        let grid = SigmaGrid::at(timesteps, &table).respaced(schedule, &table);
        let grid = grid.map_timesteps(|timestep| f64::from(timestep as f32));
        let steps = grid.timesteps.len();
        let sigmas = doubled(&grid.sigmas_to(0.0), steps);
        Ok(Schedule {
            steps,
            ..Schedule::new(doubled(&grid.timesteps, steps), sigmas)
        })
    }

    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        history: &mut Self::History<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let sigma = place.sigma();
        let prediction = Prediction::of(self.prediction_type, &step);
        let clipping = self.clip.clipping(Self::CLASS)?;
        let original = clipping.apply(prediction.denoised(sigma));
        let at = AlphaSigma::of_sigma(sigma);
        let derivative = noise_between(prediction.sample, original.clone(), at);
        let prev_sample = match history.take() {
            None => {
                let dt = place.next_sigma() - sigma;
                *history = Some((step.sample.clone(), derivative.clone()));
                combine([(1.0, step.sample), (dt, derivative)])
            }
            Some((start, derivative_there)) => {
                let dt = sigma - place.schedule.sigmas[place.index - 1];
                combine([
                    (1.0, start),
                    (0.5 * dt, derivative_there),
                    (0.5 * dt, derivative),
                ])
            }
        };
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
