//! PNDM and PLMS: pseudo numerical methods.
//!
//! "Pseudo Numerical Methods for Diffusion Models on Manifolds"
//! (<https://arxiv.org/abs/2202.09778>), equations 9, 12, 13 and algorithm 2. Noise estimates `e`
//! are combined as in classical methods, and carried from `t` to `s` by
//!
//! ```text
//! φ(x, e, t, s) = √(ᾱ_s / ᾱ_t) x - (ᾱ_s - ᾱ_t) / (ᾱ_t √(1 - ᾱ_s) + √(ᾱ_t (1 - ᾱ_t) ᾱ_s)) e
//! ```
//!
//! Runge-Kutta warm-up (PRK), four model evaluations for each of the first three steps:
//! `e = (e1 + 2 e2 + 2 e3 + e4) / 6`. Then linear multistep (PLMS), one evaluation a step:
//! `e = (55 e_t - 59 e_{t+δ} + 37 e_{t+2δ} - 9 e_{t+3δ}) / 24`.
//!
//! With `skip_prk_steps` (Stable Diffusion) the warm-up is PLMS of lower orders, and the first step
//! is computed twice: the second time with the mean of the noise estimates at both its ends. The
//! schedule then has one more entry.

use super::prelude::*;
use crate::step::adams::adams_bashforth;

options! {
    /// Options of [`PNDMScheduler`].
    pub struct PNDMConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// Whether to leave out the Runge-Kutta warm-up, as Stable Diffusion does.
        pub skip_prk_steps: bool = false,
        /// Whether the last step ends at an image without noise, not at the first training
        /// timestep.
        pub set_alpha_to_one: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::LEADING,
    }
}

/// The sampler that Stable Diffusion v1 was published with.
pub type PNDMScheduler<B> = Driver<B, PNDMConfig>;

/// The state of a run.
#[derive(Debug, Default)]
pub struct PNDMHistory<B: Backend> {
    /// The number of model evaluations so far.
    taken: usize,
    /// The latest noise estimates at whole steps, newest first: at most four.
    estimates: Vec<Tensor<B, 4>>,
    /// The sum of the Runge-Kutta estimates of a step so far.
    sum: Option<Tensor<B, 4>>,
    /// The sample that a step of several evaluations starts from.
    start: Option<Tensor<B, 4>>,
}

/// The number of steps that the Runge-Kutta warm-up spans, one end included.
const PRK_SPAN: usize = 4;
/// Its number of model evaluations.
const PRK_EVALUATIONS: usize = 4 * (PRK_SPAN - 1);

impl PNDMConfig {
    /// One evaluation of the Runge-Kutta warm-up; every fourth completes a step.
    fn prk<B: Backend>(
        &self,
        mut prediction: Prediction<B>,
        timestep: f64,
        place: Place<'_>,
        history: &mut PNDMHistory<B>,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let evaluation = history.taken % 4;
        let from = place.schedule.timesteps[history.taken - evaluation];
        let stride = place.stride(self.betas.num_train_timesteps);
        let ahead = match evaluation {
            0 | 2 => (stride / 2.0).floor(),
            _ => 0.0,
        };
        let share = match evaluation {
            0 | 3 => 1.0 / 6.0,
            _ => 1.0 / 3.0,
        };
        let weighted = prediction.output.clone().mul_scalar(share);
        let sum = match history.sum.take() {
            Some(sum) if evaluation > 0 => sum + weighted,
            _ => weighted,
        };
        if evaluation == 0 {
            remember(&mut history.estimates, prediction.output.clone(), 4);
            history.start = Some(prediction.sample.clone());
        }
        if evaluation == 3 {
            prediction.output = sum.clone();
        }
        history.sum = Some(sum);
        if let Some(start) = &history.start {
            prediction.sample = start.clone();
        }
        self.transfer(prediction, from, timestep - ahead, place)
    }

    /// One evaluation of the linear multistep method.
    fn plms<B: Backend>(
        &self,
        mut prediction: Prediction<B>,
        timestep: f64,
        place: Place<'_>,
        history: &mut PNDMHistory<B>,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        if !self.skip_prk_steps && history.estimates.len() < 3 {
            return Err(SchedulerError::WarmUp {
                class: Self::CLASS,
                reason: "a run with `skip_prk_steps` `false` starts at the first timestep".into(),
            });
        }
        let stride = place.stride(self.betas.num_train_timesteps);
        let (mut from, mut to) = (timestep, timestep - stride);
        if history.taken == 1 {
            // Repeats the first step with the noise at its end.
            (from, to) = (timestep + stride, timestep);
            if let Some(start) = history.start.take() {
                prediction.sample = start;
            }
            let first = history.estimates[0].clone();
            prediction.output = combine([(0.5, prediction.output), (0.5, first)]);
        } else {
            if history.taken == 0 {
                history.start = Some(prediction.sample.clone());
            }
            remember(&mut history.estimates, prediction.output, 4);
            let coefficients = adams_bashforth(history.estimates.len()).iter().copied();
            prediction.output = combine(coefficients.zip(history.estimates.iter().cloned()));
        }
        self.transfer(prediction, from, to, place)
    }

    /// `φ`, equation 9.
    fn transfer<B: Backend>(
        &self,
        prediction: Prediction<B>,
        from: f64,
        to: f64,
        place: Place<'_>,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let alpha_bar = place.noise_schedule.alpha_bar(from)?;
        let alpha_bar_next = place
            .noise_schedule
            .alpha_bar_or_end(to, self.set_alpha_to_one)?;
        let denominator = alpha_bar * (1.0 - alpha_bar_next).sqrt()
            + (alpha_bar * (1.0 - alpha_bar) * alpha_bar_next).sqrt();
        let epsilon = prediction.epsilon(AlphaSigma::of_alpha_bar(alpha_bar));
        Ok(combine([
            ((alpha_bar_next / alpha_bar).sqrt(), prediction.sample),
            (-(alpha_bar_next - alpha_bar) / denominator, epsilon),
        ]))
    }
}

impl Sampler for PNDMConfig {
    const CLASS: &'static str = "PNDMScheduler";
    const NAMES: Names = Names {
        short: "pndm",
        about: "linear multistep; what Stable Diffusion v1 was published with: 50 steps",
        popular: &[("PNDM", &[]), ("PLMS", &[("skip_prk_steps", "true")])],
    };

    type History<B: Backend> = PNDMHistory<B>;

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn process(&self) -> Process {
        Process::Timesteps
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.prediction_type.require_noise(Self::CLASS)
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        self.betas.noise_schedule(Self::CLASS)
    }

    fn place(
        &self,
        request: &TimestepRequest,
        _noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let (train, steps) = (self.betas.num_train_timesteps, request.steps(Self::CLASS)?);
        let visited = self.spacing.over(Self::CLASS, &self.betas).visited(steps)?;
        let timesteps = if self.skip_prk_steps {
            let second = visited.get(1).copied();
            [&visited[..1], second.as_slice(), &visited[1..]].concat()
        } else if steps < PRK_SPAN {
            return Err(SchedulerError::Steps {
                class: Self::CLASS,
                steps,
                supported: format!("at least {PRK_SPAN} with `skip_prk_steps` `false`"),
            });
        } else {
            // Each step is evaluated at its start, twice at its middle, and at its end, where the
            // next one is evaluated again.
            let half = (train / steps / 2) as f64;
            let warm_up = visited[..PRK_SPAN]
                .windows(2)
                .flat_map(|step| [step[0], step[1] + half, step[1] + half, step[1]]);
            let rest = visited[PRK_SPAN - 1..].iter().copied();
            warm_up.chain(rest).collect()
        };
        Ok(Schedule {
            steps,
            ..Schedule::new(timesteps, Vec::new())
        })
    }

    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        history: &mut PNDMHistory<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let prediction = Prediction::of(self.prediction_type, &step);
        let warming_up = !self.skip_prk_steps && history.taken < PRK_EVALUATIONS;
        let prev_sample = match warming_up {
            true => self.prk(prediction, step.timestep, place, history)?,
            false => self.plms(prediction, step.timestep, place, history)?,
        };
        history.taken += 1;
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}
