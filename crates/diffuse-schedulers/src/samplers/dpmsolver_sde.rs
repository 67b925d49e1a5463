//! DPM-Solver++ for the SDE, singlestep.
//!
//! k-diffusion's `sample_dpmpp_sde` (<https://github.com/crowsonkb/k-diffusion>), after
//! "DPM-Solver++" (<https://arxiv.org/abs/2211.01095>), in ancestral steps. In the time
//! `t = -ln σ`, both substeps of a step start from the same sample; the first goes to the middle,
//! the second, with the image predicted there, to the end. For a substep from `σ` to `σ'`, with
//! `σ_down² + σ_up² = σ'²`:
//!
//! ```text
//! σ_up² = σ'² (σ² - σ'²) / σ²
//! x'    = (σ_down / σ) x + (1 - σ_down / σ) x0 + σ_up s_noise (W(σ') - W(σ)) / √|σ' - σ|
//! ```
//!
//! `W` is one path of Brownian motion for the whole run (`brownian.rs`), so both substeps have the
//! same noise.

use serde::{Deserialize, Serialize};

use super::prelude::*;
use super::two_evaluations::doubled;
use crate::random::brownian::BrownianTree;
use crate::schedule::sigmas::LogSigmas;
use crate::step::ancestral::Ancestral;
use crate::step::multistep::not_finite;

options! {
    /// Options of [`DPMSolverSDEScheduler`].
    pub struct DPMSolverSDEConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The seed of the noise, or one for each image of the batch; without it, a seed for each
        /// image is drawn from the run's source of noise.
        pub noise_sampler_seed: Option<NoiseSamplerSeed> = None,
    } with {
        pub betas: BetaOptions = BetaOptions::latent(BetaSchedule::Linear),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// A singlestep solver of the diffusion SDE: two model evaluations per step, both with noise.
pub type DPMSolverSDEScheduler<B> = Driver<B, DPMSolverSDEConfig>;

/// Seeds of Brownian paths (the key `noise_sampler_seed`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a seed or a list of seeds")]
#[non_exhaustive]
pub enum NoiseSamplerSeed {
    /// One path for the whole batch.
    Batch(u64),
    /// One path for each image.
    Each(Vec<u64>),
}

/// The state of a run.
#[derive(Debug, Default)]
pub struct SDEHistory<B: Backend> {
    /// The Brownian paths of the run: one for the batch, or one for each image.
    paths: Vec<BrownianTree>,
    /// Between the two evaluations: the sample that the step starts from.
    start: Option<Tensor<B, 4>>,
}

impl DPMSolverSDEConfig {
    /// The Brownian paths of a run, each over its whole range of sigmas.
    fn paths<B: Backend>(
        &self,
        step: &mut Step<'_, B>,
        schedule: &Schedule,
    ) -> Result<Vec<BrownianTree>, SchedulerError> {
        let [batch, channels, height, width] = step.sample.dims();
        let image = channels * height * width;
        let (seeds, count) = match &self.noise_sampler_seed {
            Some(NoiseSamplerSeed::Batch(seed)) => (vec![*seed], batch * image),
            Some(NoiseSamplerSeed::Each(seeds)) if seeds.len() == batch => (seeds.clone(), image),
            Some(NoiseSamplerSeed::Each(seeds)) => {
                return Err(SchedulerError::Value {
                    class: Self::CLASS,
                    key: "noise_sampler_seed",
                    value: format!("a list of {}", seeds.len()),
                    expected: format!("expected one for each of the {batch} images"),
                });
            }
            None => (step.noise.seeds(batch)?, image),
        };
        let positive = schedule.sigmas.iter().filter(|sigma| **sigma > 0.0);
        let min = positive.copied().fold(f32::INFINITY, f32::min);
        let (min, max) = (min.into(), schedule.max_sigma().into());
        let dtype = step.noise.dtype();
        let path = |&seed: &u64| BrownianTree::new(min, max, seed, count, dtype);
        Ok(seeds.iter().map(path).collect())
    }

    /// Normal numbers for a substep between two sigmas, `[batch, channels, height, width]`.
    fn noise_between<B: Backend>(
        &self,
        step: &mut Step<'_, B>,
        schedule: &Schedule,
        [from, to]: [f32; 2],
        paths: &mut Vec<BrownianTree>,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        if paths.is_empty() {
            *paths = self.paths(step, schedule)?;
        }
        let deviation = (to - from).abs().sqrt();
        let increments = paths
            .iter()
            .flat_map(|path| path.increment(to.into(), from.into()));
        let noise: Vec<f32> = increments.map(|w| -w / deviation).collect();
        Ok(Tensor::from_data(
            TensorData::new(noise, step.sample.dims()),
            (&step.sample.device(), step.sample.dtype()),
        ))
    }
}

/// The sigma in the middle of a step, in `ln σ`, in f32; 0 if the step goes to 0.
fn middle(from: f32, to: f32) -> f32 {
    let (t, t_next) = (-from.ln(), -to.ln());
    (-(t + (t_next - t) * 0.5)).exp()
}

impl Sampler for DPMSolverSDEConfig {
    const CLASS: &'static str = "DPMSolverSDEScheduler";
    const NAMES: Names = Names {
        short: "dpm++-sde",
        about: "DPM-Solver++ for the SDE, two model evaluations a step: 10 to 20 steps",
        popular: &[("DPM++ SDE", &[]), ("DPM++ SDE Karras", &[KARRAS])],
    };
    const ORDER: usize = 2;

    type History<B: Backend> = SDEHistory<B>;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: true,
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        Process::Exploding(self.spacing.timestep_spacing)
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.prediction_type.require_noise(Self::CLASS)?;
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
        let timesteps = spacing.visited_unrounded_f64(request.steps(Self::CLASS)?)?;
        let table = noise_schedule.sigmas();
        let schedule = self.sigmas.sigma_schedule(Self::CLASS)?;
        let grid = SigmaGrid::at(timesteps, &table).respaced(schedule, &table);
        let logs = LogSigmas::new(&table);
        let within = |pair: &[f64]| {
            let (t, t_next) = (-pair[0].ln(), -pair[1].ln());
            logs.timestep((-(t + (t_next - t) * 0.5)).exp())
        };
        let mut timesteps = vec![grid.timesteps[0]];
        for (pair, &timestep) in grid.sigmas.windows(2).zip(&grid.timesteps[1..]) {
            timesteps.extend([within(pair), timestep]);
        }
        let (sigmas, steps) = (grid.sigmas_to(0.0), grid.timesteps.len());
        // Between equal sigmas the Brownian path has no increment.
        if let Some(equal) = sigmas.windows(2).position(|pair| pair[0] == pair[1]) {
            return Err(not_finite(Self::CLASS, equal, steps));
        }
        let evaluated = sigmas
            .windows(2)
            .flat_map(|pair| [pair[0], middle(pair[0], pair[1])]);
        let evaluated = evaluated.collect();
        Ok(Schedule {
            steps,
            model_sigmas: Some(evaluated),
            ..Schedule::new(timesteps, doubled(&sigmas, steps))
        })
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        history: &mut SDEHistory<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (schedule, index) = (place.schedule, place.index);
        let prediction = Prediction::of(self.prediction_type, &step);
        let original = prediction.denoised(schedule.model_sigma(index));
        // Diffusers computes each sigma from its logarithm; the rounding changes the noise.
        let through_log = |index: usize| schedule.sigmas[index].ln().exp();
        let (first, start, from, to) = match history.start.take() {
            None => {
                let (from, to) = (through_log(index), schedule.model_sigma(index + 1));
                (true, step.sample.clone(), from, to)
            }
            Some(start) => (false, start, through_log(index - 1), through_log(index)),
        };
        let prev_sample = if to == 0.0 {
            original.clone()
        } else {
            if first {
                history.start = Some(start.clone());
            }
            let up = Ancestral::between(from, to).up.min(to);
            let down = (to * to - up * up).sqrt();
            let ends = [from, to];
            let noise = self.noise_between(&mut step, schedule, ends, &mut history.paths)?;
            combine([
                (down / from, start),
                (1.0 - down / from, original.clone()),
                (step.options.s_noise as f32 * up, noise),
            ])
        };
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
