//! DPM-Solver++ for the SDE, singlestep.
//!
//! k-diffusion's `sample_dpmpp_sde` (<https://github.com/crowsonkb/k-diffusion>), after "DPM-Solver++"
//! (<https://arxiv.org/abs/2211.01095>), in ancestral steps. In the time `t = -ln σ`, both halves of a step start from the
//! same sample; the first goes to the middle, the second, with the image seen there, to the end. With `σ_down` and `σ_up`
//! of `ancestral.rs` for a step from `σ` to `σ'`:
//!
//! ```text
//! x' = (σ_down / σ) x + (1 - σ_down / σ) x0 + σ_up s_noise (W(σ') - W(σ)) / √|σ' - σ|
//! ```
//!
//! `W` is one path of Brownian motion for the whole run (`brownian.rs`), so that both halves of a step see the same noise.

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use crate::ancestral::Ancestral;
use crate::brownian::BrownianTree;
use crate::config::{ClassConfig, Resolved, require, scheduler_config};
use crate::heun::twice_within;
use crate::ladder::{Ladder, ladder_methods, noise_level_methods};
use crate::levels::Levels;
use crate::prediction::Prediction;
use crate::sigmas::LogSigmas;
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, NoiseSchedule, PredictionType, Scheduler, SchedulerError, Step,
    StepOutput, TimestepRequest,
};

scheduler_config! {
    /// Options of [`DPMSolverSDEScheduler`].
    pub struct DPMSolverSDEConfig for "DPMSolverSDEScheduler" [
        noise(0.00085, 0.012, Linear), sigmas, spacing(Linspace)
    ] {
        /// The seed of the noise, or one for each picture of the batch; without one it is drawn, for each picture, from
        /// the run's source of noise.
        pub noise_sampler_seed: Option<NoiseSamplerSeed> = None,
    }
}

/// Seeds of Brownian paths (the key `noise_sampler_seed`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a seed or a list of seeds")]
#[non_exhaustive]
pub enum NoiseSamplerSeed {
    /// One path for the whole batch.
    Batch(u64),
    /// One path for each picture.
    Each(Vec<u64>),
}

const CLASS: &str = DPMSolverSDEConfig::CLASS;

/// A singlestep solver of the diffusion SDE: two model calls a step, noise in both.
#[derive(Debug)]
pub struct DPMSolverSDEScheduler<B: Backend> {
    resolved: Resolved<DPMSolverSDEConfig>,
    noise_schedule: NoiseSchedule,
    ladder: Ladder,
    /// The Brownian paths of the run: one for the batch, or one for each picture.
    paths: Vec<BrownianTree>,
    /// Between the two calls: the sample that the step starts from.
    start: Option<Tensor<B, 4>>,
}

impl<B: Backend> DPMSolverSDEScheduler<B> {
    pub(crate) fn build(resolved: Resolved<DPMSolverSDEConfig>) -> Result<Self, SchedulerError> {
        let options = &resolved.options;
        let supported = &[PredictionType::Epsilon, PredictionType::VPrediction];
        require(
            CLASS,
            "prediction_type",
            &options.prediction_type,
            supported,
        )?;
        let noise_schedule = options.noise_schedule(BetaSchedule::COMMON, false)?;
        options.sigma_curve()?;
        Ok(Self {
            noise_schedule,
            ladder: Ladder::default(),
            paths: Vec::new(),
            start: None,
            resolved,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// The Brownian paths of a run, each over its whole range of noise levels.
    fn new_paths(&self, step: &mut Step<'_, B>) -> Result<Vec<BrownianTree>, SchedulerError> {
        let [batch, channels, height, width] = step.sample.dims();
        let picture = channels * height * width;
        let (seeds, count) = match &self.resolved.options.noise_sampler_seed {
            Some(NoiseSamplerSeed::Batch(seed)) => (vec![*seed], batch * picture),
            Some(NoiseSamplerSeed::Each(seeds)) if seeds.len() == batch => (seeds.clone(), picture),
            Some(NoiseSamplerSeed::Each(seeds)) => {
                return Err(SchedulerError::Value {
                    class: CLASS,
                    key: "noise_sampler_seed",
                    value: format!("a list of {}", seeds.len()),
                    expected: format!("expected one for each of the {batch} pictures"),
                });
            }
            None => (step.noise.seeds(batch)?, picture),
        };
        let levels = self.ladder.sigmas().iter().filter(|sigma| **sigma > 0.0);
        let min = levels.copied().fold(f32::INFINITY, f32::min);
        let (min, max) = (min.into(), self.ladder.max_sigma().into());
        let dtype = step.noise.dtype();
        let path = |&seed: &u64| BrownianTree::new(min, max, seed, count, dtype);
        Ok(seeds.iter().map(path).collect())
    }

    /// Normal numbers for a step between two levels, `[batch, channels, height, width]`.
    fn noise_between(
        &mut self,
        step: &mut Step<'_, B>,
        from: f32,
        to: f32,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let dims = step.sample.dims();
        if self.paths.is_empty() {
            self.paths = self.new_paths(step)?;
        }
        let deviation = (to - from).abs().sqrt();
        let increments = self
            .paths
            .iter()
            .flat_map(|path| path.increment(to.into(), from.into()));
        let noise: Vec<f32> = increments.map(|w| -w / deviation).collect();
        let device = step.sample.device();
        Ok(Tensor::from_data(
            TensorData::new(noise, dims),
            (&device, step.sample.dtype()),
        ))
    }
}

/// The level in the middle of a step, in `ln σ`, in f32; 0 if the step goes to 0.
fn middle(from: f32, to: f32) -> f32 {
    let (t, t_next) = (-from.ln(), -to.ln());
    (-(t + (t_next - t) * 0.5)).exp()
}

impl<B: Backend> Scheduler<B> for DPMSolverSDEScheduler<B> {
    ladder_methods!(of_level);
    noise_level_methods!();

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            noise: true,
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let timesteps = options
            .spacing()
            .visited_unrounded_f64(request.steps(CLASS)?)?;
        let table = self.noise_schedule.sigmas();
        let levels = Levels::at(timesteps, &table).bent(options.sigma_curve()?, &table);
        let logs = LogSigmas::new(&table);
        let within = |pair: &[f64]| {
            let (t, t_next) = (-pair[0].ln(), -pair[1].ln());
            logs.timestep((-(t + (t_next - t) * 0.5)).exp())
        };
        let mut timesteps = vec![levels.timesteps[0]];
        for (pair, &timestep) in levels.sigmas.windows(2).zip(&levels.timesteps[1..]) {
            timesteps.extend([within(pair), timestep]);
        }
        let sigmas = levels.sigmas_down_to(0.0);
        let steps = levels.timesteps.len();
        let seen = sigmas
            .windows(2)
            .flat_map(|pair| [pair[0], middle(pair[0], pair[1])]);
        let seen = seen.collect();
        self.ladder = Ladder::new(timesteps, twice_within(&sigmas, steps)).with_seen(seen);
        self.paths.clear();
        self.start = None;
        Ok(())
    }

    fn order(&self) -> usize {
        2
    }

    fn advance(&mut self, mut step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let prediction = Prediction {
            kind: self.resolved.options.prediction_type,
            output: step.model_output.clone(),
            sample: step.sample.clone(),
        };
        let original = prediction.denoised(self.ladder.seen(rung));
        // The reference's way from a level to its logarithm and back, rounding included: the noise shows it.
        let through_log = |rung: usize| self.ladder.sigmas()[rung].ln().exp();
        let (first, start, from, to) = match self.start.take() {
            None => (
                true,
                step.sample.clone(),
                through_log(rung),
                self.ladder.seen(rung + 1),
            ),
            Some(start) => (false, start, through_log(rung - 1), through_log(rung)),
        };
        let prev_sample = if to == 0.0 {
            original.clone()
        } else {
            if first {
                self.start = Some(start.clone());
            }
            let Ancestral { up, .. } = Ancestral::between(from, to);
            let up = up.min(to);
            let down = (to * to - up * up).sqrt();
            let noise = self.noise_between(&mut step, from, to)?;
            combine([
                (down / from, start),
                (1.0 - down / from, original.clone()),
                (step.options.s_noise as f32 * up, noise),
            ])
        };
        self.ladder.descend(rung);
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: Some(original),
        })
    }
}
