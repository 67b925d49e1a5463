//! LMS: a linear multistep method.
//!
//! The Adams-Bashforth method on sigmas that need not be evenly spaced, as in k-diffusion's
//! `sample_lms` (<https://github.com/crowsonkb/k-diffusion>). With the latest derivatives
//! `d_i` at `σ_i` and the Lagrange polynomials `l_i` through these sigmas, from `σ` to the next
//! `σ'`:
//!
//! ```text
//! d  = (x - x0) / σ
//! x' = x + Σ c_i d_i,   c_i = ∫ l_i(σ) dσ from σ to σ'
//! ```

use super::prelude::*;
use crate::StepOptions;
use crate::step::adams::integrals;
use crate::step::multistep::check_steps;

options! {
    /// Options of [`LMSDiscreteScheduler`].
    pub struct LMSDiscreteConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// A linear multistep method: order 4, one model evaluation per step.
pub type LMSDiscreteScheduler<B> = Driver<B, LMSDiscreteConfig>;

/// The coefficients of a step. Diffusers' quirk: a run that begins inside the schedule has full
/// order at once.
fn coefficients(schedule: &Schedule, index: usize, order: usize) -> Coefficients {
    let oldest = (index + 1).saturating_sub(order);
    let sigmas = schedule.sigmas[oldest..=index + 1].iter().rev();
    let sigmas: Vec<f64> = sigmas.map(|&sigma| sigma.into()).collect();
    let outputs = integrals(&sigmas[1..], sigmas[1], sigmas[0]);
    Coefficients {
        sample: 1.0,
        outputs: outputs.into_iter().map(|c| c as f32).collect(),
        z: None,
    }
}

impl Sampler for LMSDiscreteConfig {
    const CLASS: &'static str = "LMSDiscreteScheduler";
    const NAMES: Names = Names {
        short: "lms",
        about: "linear multistep on sigmas: 20 to 50 steps",
        popular: &[("LMS", &[]), ("LMS Karras", &[KARRAS])],
    };

    /// The latest derivatives, newest first.
    type History<B: Backend> = Vec<Tensor<B, 4>>;

    fn process(&self) -> Process {
        Process::Exploding(self.spacing.timestep_spacing)
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.sigmas.sigma_schedule(Self::CLASS).map(|_| ())
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        self.betas.noise_schedule(Self::CLASS)
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let spacing = self.spacing.over(Self::CLASS, &self.betas);
        let timesteps = spacing.visited_unrounded(request.steps(Self::CLASS)?)?;
        let table = noise_schedule.sigmas();
        let grid = SigmaGrid::at(timesteps, &table)
            .respaced(self.sigmas.sigma_schedule(Self::CLASS)?, &table)
            .map_timesteps(|timestep| f64::from(timestep as f32));
        let schedule = grid.to(0.0);
        let order = StepOptions::default().order;
        check_steps(Self::CLASS, schedule.steps, |index| {
            coefficients(&schedule, index, order)
        })?;
        Ok(schedule)
    }

    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        derivatives: &mut Self::History<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (order, sigma) = (step.options.order, place.sigma());
        if order == 0 {
            return Err(SchedulerError::StepOption {
                name: "order",
                value: 0.0,
                expected: "a number of at least 1",
            });
        }
        let prediction = Prediction::of(self.prediction_type, &step);
        let original = prediction.denoised(sigma);
        let at = AlphaSigma::of_sigma(sigma);
        let derivative = noise_between(prediction.sample, original.clone(), at);
        remember(derivatives, derivative, order);
        let coefficients = coefficients(place.schedule, place.index, order);
        Ok(StepOutput {
            prev_sample: coefficients.apply(step.sample, derivatives, None),
            pred_original_sample: Some(original),
        })
    }
}
