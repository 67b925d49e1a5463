//! Euler's method.
//!
//! "Elucidating the Design Space of Diffusion-Based Generative Models"
//! (<https://arxiv.org/abs/2206.00364>), algorithm 2 without its second-order correction. Samples
//! are `x = x0 + σ ε`; the model input is `x / √(σ² + 1)`. From `σ` to the next `σ'`:
//!
//! ```text
//! σ̂  = σ (1 + γ),   x̂ = x + √(σ̂² - σ²) s_noise z          only with s_churn
//! x' = x̂ + (σ' - σ̂) (x̂ - x0) / σ̂  =  (σ' / σ̂) x̂ + (1 - σ' / σ̂) x0
//! ```

use serde::{Deserialize, Serialize};

use super::prelude::*;
use crate::schedule::noise_schedule::linspace;
use crate::schedule::sigmas::LogSigmas;
use crate::schedule::spacing::{check_sigmas, check_timesteps};

/// The interpolation of sigmas between tabulated ones (the key `interpolation_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum InterpolationType {
    /// Linearly in the timestep.
    Linear,
    /// Independent of timesteps: sigmas are evenly spaced in `ln σ` over the whole schedule.
    LogLinear,
}

/// The timestep that the model is conditioned on (the key `timestep_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TimestepType {
    /// The training timestep.
    Discrete,
    /// `ln σ / 4`, if the model predicts a velocity.
    Continuous,
}

options! {
    /// Options of [`EulerDiscreteScheduler`].
    pub struct EulerDiscreteConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The interpolation of sigmas between tabulated ones.
        pub interpolation_type: InterpolationType = InterpolationType::Linear,
        /// The smallest sigma of a sigma schedule, in place of that of the noise schedule.
        pub sigma_min: Option<f64> = None,
        /// The largest sigma of a sigma schedule, in place of that of the noise schedule.
        pub sigma_max: Option<f64> = None,
        /// The timestep that the model is conditioned on.
        pub timestep_type: TimestepType = TimestepType::Discrete,
        /// The final sigma of a run.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
        /// Whether the betas are rescaled to zero terminal SNR.
        pub rescale_betas_zero_snr: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// Euler's method, the simplest solver.
pub type EulerDiscreteScheduler<B> = Driver<B, EulerDiscreteConfig>;

impl EulerDiscreteConfig {
    fn is_continuous(&self) -> bool {
        self.timestep_type == TimestepType::Continuous
            && self.prediction_type == PredictionType::VPrediction
    }

    /// The sigmas of given or evenly spaced timesteps, or of a sigma schedule.
    fn grid(&self, timesteps: Vec<f64>, table: &[f32]) -> Result<SigmaGrid, SchedulerError> {
        let mut grid = SigmaGrid::at(timesteps, table);
        let steps = grid.sigmas.len();
        if self.interpolation_type == InterpolationType::LogLinear {
            // Diffusers' quirk: one sigma more than there are timesteps.
            let [max, min] = [table[table.len() - 1], table[0]].map(|sigma| f64::from(sigma.ln()));
            let logs = linspace(max, min, steps + 1);
            grid.sigmas = logs.into_iter().map(|log| f64::from(log.exp())).collect();
        }
        if let Some(schedule) = self.sigmas.sigma_schedule(Self::CLASS)? {
            let range = grid.range();
            let range = range.with(Self::CLASS, self.sigma_min, self.sigma_max)?;
            grid = SigmaGrid::along(schedule, range, steps, table);
        }
        Ok(grid)
    }
}

/// Adds noise to the sample if `s_churn` and its limits say so, and returns the larger sigma `σ̂`.
pub(super) fn churn<B: Backend>(
    step: &mut Step<'_, B>,
    place: Place<'_>,
) -> Result<f32, SchedulerError> {
    let (options, sigma) = (step.options, place.sigma());
    let steps = place.schedule.sigmas.len() - 1;
    let within = (options.s_tmin..=options.s_tmax).contains(&f64::from(sigma));
    let gamma = match within {
        true => (options.s_churn / steps as f64).min(2f64.sqrt() - 1.0) as f32,
        false => 0.0,
    };
    let sigma_hat = sigma * (gamma + 1.0);
    if gamma > 0.0 {
        let back = (sigma_hat * sigma_hat - sigma * sigma).sqrt();
        let noise = step.noise.like(&step.sample)?;
        step.sample = combine([
            (1.0, step.sample.clone()),
            (options.s_noise as f32 * back, noise),
        ]);
    }
    Ok(sigma_hat)
}

impl Sampler for EulerDiscreteConfig {
    const CLASS: &'static str = "EulerDiscreteScheduler";
    const NAMES: Names = Names {
        short: "euler",
        about: "Euler's method on sigmas: 20 to 30 steps",
        popular: &[("Euler", &[]), ("Euler Karras", &[KARRAS])],
    };

    type History<B: Backend> = ();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            custom_sigmas: true,
            noise: true,
            velocity: true,
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        Process::Exploding(self.spacing.timestep_spacing)
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.sigmas.sigma_schedule(Self::CLASS).map(|_| ())
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        let rescale = self.rescale_betas_zero_snr;
        let noise_schedule = self.betas.rescaled_noise_schedule(Self::CLASS, rescale)?;
        Ok(noise_schedule.with_finite_last_sigma(rescale))
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let (table, train) = (noise_schedule.sigmas(), self.betas.num_train_timesteps);
        let last = self.final_sigmas_type.sigma(table[0]);
        let (timesteps, sigmas) = match request {
            TimestepRequest::Sigmas(sigmas) => {
                check_sigmas(Self::CLASS, sigmas)?;
                let logs = LogSigmas::new(&table);
                let sigmas: Vec<f32> = sigmas.iter().map(|&sigma| sigma as f32).collect();
                let steps = sigmas[..sigmas.len() - 1].iter();
                (
                    steps.map(|&sigma| logs.timestep_f32(sigma)).collect(),
                    sigmas,
                )
            }
            other => {
                let timesteps = match other {
                    TimestepRequest::Timesteps(timesteps) => {
                        let schedule = self.sigmas.sigma_schedule(Self::CLASS)?;
                        let placed = schedule.is_some() || self.is_continuous();
                        check_timesteps(Self::CLASS, timesteps, train, placed)?;
                        timesteps.clone()
                    }
                    other => {
                        let spacing = self.spacing.over(Self::CLASS, &self.betas);
                        spacing.visited_unrounded(other.steps(Self::CLASS)?)?
                    }
                };
                let grid = self.grid(timesteps, &table)?;
                let sigmas = grid.sigmas_to(last);
                (grid.timesteps, sigmas)
            }
        };
        let timesteps: Vec<f32> = match self.is_continuous() {
            true => {
                let steps = sigmas[..sigmas.len() - 1].iter();
                steps.map(|sigma| 0.25 * sigma.ln()).collect()
            }
            false => timesteps.iter().map(|&timestep| timestep as f32).collect(),
        };
        let timesteps = timesteps.into_iter().map(f64::from).collect();
        Ok(Schedule::new(timesteps, sigmas))
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        (): &mut (),
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (sigma, next) = (place.sigma(), place.next_sigma());
        let sigma_hat = churn(&mut step, place)?;
        let prediction = Prediction::of(self.prediction_type, &step);
        // Diffusers' quirk: a velocity uses the sigma before the noise was added.
        let original = prediction.denoised(match self.prediction_type {
            PredictionType::VPrediction => sigma,
            PredictionType::Epsilon | PredictionType::Sample => sigma_hat,
        });
        let prev_sample = combine([
            (next / sigma_hat, step.sample),
            (1.0 - next / sigma_hat, original.clone()),
        ]);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
