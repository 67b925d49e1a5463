//! The part that all samplers share: the schedule of a run, the step index, the history of model
//! outputs, and Diffusers' methods.
//!
//! A sampler is a struct of options that implements [`Sampler`]: it makes the schedule of a run
//! ([`Sampler::place`]) and computes one step of it ([`Sampler::step`]). Both are pure. The
//! [`Driver`] has all state, so a `set_timesteps` that fails changes nothing.

use std::fmt::Debug;

use burn::prelude::*;

use crate::config::{Options, Overrides, Resolved};
use crate::schedule::{Place, Schedule};
use crate::step::alpha_sigma::{self, AlphaSigma};
use crate::step::prediction::{Prediction, PredictionType};
use crate::step::process::Process;
use crate::step::tensor::{cast, widen};
use crate::{
    Capabilities, NoiseSchedule, NoiseSource, Scheduler, SchedulerConfig, SchedulerError, Step,
    StepNoise, StepOptions, StepOutput, TimestepRequest,
};

/// The names of a sampler.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// The short name (`euler-a`).
    pub short: &'static str,
    /// A description of one line.
    pub about: &'static str,
    /// Its names in other programs, with the options that they imply, as JSON.
    pub popular: &'static [Popular],
}

/// A name, and the options that it implies.
pub type Popular = (&'static str, &'static [(&'static str, &'static str)]);

/// Names with "Karras" imply Karras's sigma schedule.
pub(crate) const KARRAS: (&str, &str) = ("use_karras_sigmas", "true");

/// A sampler: its options and its formula.
pub trait Sampler: Options {
    /// Diffusers' name of the class.
    const CLASS: &'static str;
    /// Its names.
    const NAMES: Names;
    /// The number of model evaluations in a step.
    const ORDER: usize = 1;

    /// The state of a run between steps.
    type History<B: Backend>: Default + Debug + Send + Sync;

    /// Its optional features.
    fn capabilities(&self) -> Capabilities {
        Capabilities::COUNTED
    }

    /// The forward process: how a sample is composed of image and noise.
    fn process(&self) -> Process;

    /// Checks the options, and replaces other spellings.
    fn check(&mut self) -> Result<(), SchedulerError> {
        Ok(())
    }

    /// The noise schedule that the model was trained on.
    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError>;

    /// The schedule of a run. A run without finite results is an error here, before the first step.
    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError>;

    /// The history at the start of a run; without a request, before the first one.
    fn history<B: Backend>(
        &self,
        request: Option<&TimestepRequest>,
    ) -> Result<Self::History<B>, SchedulerError> {
        let _ = request;
        Ok(Self::History::default())
    }

    /// Changes options permanently for a run.
    fn settle(&mut self, schedule: &Schedule) {
        let _ = schedule;
    }

    /// The sampler's formula, for one model evaluation of a run.
    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        history: &mut Self::History<B>,
    ) -> Result<StepOutput<B>, SchedulerError>;
}

/// A sampler with its state: the options `S`, the schedule of the run, the step index, and the
/// history.
///
/// The schedulers of this crate are aliases of this type, named as Diffusers' classes
/// ([`DDIMScheduler`](crate::DDIMScheduler) is `Driver<B, DDIMConfig>`); their methods are those of
/// [`Scheduler`].
#[derive(Debug)]
pub struct Driver<B: Backend, S: Sampler> {
    resolved: Resolved<S>,
    noise_schedule: NoiseSchedule,
    schedule: Schedule,
    /// The first index of the run, if the caller has set it.
    begin_index: Option<usize>,
    /// The index of the next step, after the first one.
    step_index: Option<usize>,
    history: S::History<B>,
}

impl<B: Backend, S: Sampler> Driver<B, S> {
    /// A sampler with these options; an option equal to its default counts as not given.
    pub fn new(options: S) -> Result<Self, SchedulerError> {
        Self::build(Resolved::from_options(options))
    }

    /// A sampler with the options of a configuration, which may be written for another sampler.
    pub fn from_config(config: &SchedulerConfig) -> Result<Self, SchedulerError> {
        Self::build(Resolved::from_config(config, &Overrides::new())?)
    }

    pub(crate) fn build(mut resolved: Resolved<S>) -> Result<Self, SchedulerError> {
        resolved.options.check()?;
        resolved.write_back();
        Ok(Self {
            noise_schedule: resolved.options.noise_schedule()?,
            history: resolved.options.history(None)?,
            schedule: Schedule::default(),
            begin_index: None,
            step_index: None,
            resolved,
        })
    }

    /// The options in effect.
    pub fn options(&self) -> &S {
        &self.resolved.options
    }

    /// The noise schedule of the forward process; empty for models with another process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// The index of the next step. A run counts its steps from `begin_index`, or else from the
    /// index of its first timestep. Samplers without a history use the timestep alone.
    fn index(&self, timestep: f64) -> Result<usize, SchedulerError> {
        let timesteps = &self.schedule.timesteps;
        if timesteps.is_empty() {
            return Err(SchedulerError::NoTimesteps);
        }
        let counts = self.capabilities().begin_index;
        let fits = |index: &usize| counts || timesteps.get(*index) == Some(&timestep);
        let index = match self.step_index.or(self.begin_index).filter(fits) {
            Some(index) => index,
            None => self.schedule.index_of(timestep)?,
        };
        if index >= timesteps.len() {
            let steps = timesteps.len();
            return Err(SchedulerError::Finished { steps });
        }
        if self.step_index.is_none() && index % S::ORDER != 0 {
            return Err(SchedulerError::WarmUp {
                class: S::CLASS,
                reason: format!("a step has {} evaluations, this is not the first", S::ORDER),
            });
        }
        Ok(index)
    }

    /// The same, and an error if the timestep is out of order.
    fn index_in_order(&self, timestep: f64) -> Result<usize, SchedulerError> {
        let index = self.index(timestep)?;
        match self.schedule.timesteps[index] {
            expected if expected == timestep => Ok(index),
            expected => {
                self.schedule.index_of(timestep)?;
                Err(SchedulerError::OutOfOrder { timestep, expected })
            }
        }
    }

    /// `α` and `σ` of `add_noise`: those of the timesteps, or, on a sigma grid with a
    /// `begin_index`, those of the step index, as in Diffusers.
    fn alpha_sigmas(&self, timesteps: &[f64]) -> Result<Vec<AlphaSigma>, SchedulerError> {
        let process = self.resolved.options.process();
        if process == Process::Own {
            return Err(self.unsupported("`add_noise`"));
        }
        if process == Process::Timesteps {
            return self.noise_schedule.alpha_sigmas(timesteps);
        }
        let here = self
            .begin_index
            .map(|begin| self.step_index.unwrap_or(begin));
        let indices = timesteps
            .iter()
            .map(|&timestep| here.map_or_else(|| self.schedule.index_of(timestep), Ok));
        let steps = self.schedule.timesteps.len();
        let sigma = |index: usize| self.schedule.sigmas.get(index).copied();
        indices
            .map(|index| sigma(index?).ok_or(SchedulerError::Finished { steps }))
            .map(|sigma| sigma.map(|sigma| process.alpha_sigma(sigma)))
            .collect()
    }

    /// The image that a model output predicts; nothing for samplers without `α` and `σ`, and where
    /// the sample is noise alone.
    fn original(
        &self,
        output: Tensor<B, 4>,
        timestep: f64,
        index: usize,
        sample: Tensor<B, 4>,
    ) -> Option<Tensor<B, 4>> {
        let process = self.resolved.options.process();
        let at = match process {
            Process::Own => return None,
            Process::Timesteps => *self
                .noise_schedule
                .alpha_sigmas(&[timestep])
                .ok()?
                .first()?,
            _ => process.alpha_sigma(*self.schedule.sigmas.get(index)?),
        };
        let kind = self.resolved.config.get("prediction_type").cloned();
        let kind = kind.map_or(Ok(PredictionType::Epsilon), serde_json::from_value);
        let kind = kind.ok()?;
        let prediction = Prediction {
            kind,
            output,
            sample,
        };
        (at.alpha > 0.0).then(|| prediction.original(at))
    }

    fn unsupported(&self, operation: &'static str) -> SchedulerError {
        SchedulerError::Unsupported {
            class: S::CLASS,
            operation,
        }
    }
}

impl<B: Backend, S: Sampler> Scheduler<B> for Driver<B, S> {
    fn config(&self) -> &SchedulerConfig {
        &self.resolved.config
    }

    fn fresh(&self) -> Result<Box<dyn Scheduler<B>>, SchedulerError> {
        Ok(Box::new(Self::build(self.resolved.clone())?))
    }

    fn capabilities(&self) -> Capabilities {
        self.resolved.options.capabilities()
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let options = &self.resolved.options;
        let schedule = options.place(request, &self.noise_schedule)?;
        schedule.check(S::CLASS)?;
        let history = options.history(Some(request))?;
        // Nothing fails from here on.
        self.resolved.options.settle(&schedule);
        self.resolved.write_back();
        (self.schedule, self.history) = (schedule, history);
        (self.begin_index, self.step_index) = (None, None);
        Ok(())
    }

    fn timesteps(&self) -> &[f64] {
        &self.schedule.timesteps
    }

    fn sigmas(&self) -> Option<&[f32]> {
        let sigmas = &self.schedule.sigmas[..];
        let own = self.resolved.options.process() == Process::Own;
        (!own && !sigmas.is_empty()).then_some(sigmas)
    }

    fn init_noise_sigma(&self) -> f64 {
        let process = self.resolved.options.process();
        process.init_noise_sigma(self.schedule.max_sigma())
    }

    fn order(&self) -> usize {
        S::ORDER
    }

    fn set_begin_index(&mut self, begin_index: usize) {
        self.begin_index = Some(begin_index);
    }

    fn scale_model_input(
        &self,
        sample: Tensor<B, 4>,
        timestep: f64,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let process = self.resolved.options.process();
        if !process.scales_input() {
            return Ok(sample);
        }
        let index = self.index_in_order(timestep)?;
        let deviation = process.input_deviation(self.schedule.model_sigma(index));
        let dtype = sample.dtype();
        Ok(cast(widen(sample).div_scalar(deviation), dtype))
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let index = match self.index(step.timestep) {
            // Inside another sampler, the timesteps are those of the outer one.
            Err(SchedulerError::NotInSchedule { .. }) if !self.capabilities().begin_index => {
                let last = self.schedule.timesteps.len() - 1;
                self.step_index.unwrap_or(0).min(last)
            }
            index => index?,
        };
        let place = Place {
            index,
            schedule: &self.schedule,
            noise_schedule: &self.noise_schedule,
        };
        let wanted = step.options.predict_original;
        let prediction = wanted.then(|| (step.model_output.clone(), step.sample.clone()));
        let timestep = step.timestep;
        let options = &self.resolved.options;
        let mut output = options.step(step, place, &mut self.history)?;
        if let (Some((model_output, sample)), None) = (prediction, &output.pred_original_sample) {
            output.pred_original_sample = self.original(model_output, timestep, index, sample);
        }
        self.step_index = Some(index + 1);
        Ok(output)
    }

    fn step(
        &mut self,
        model_output: Tensor<B, 4>,
        timestep: f64,
        sample: Tensor<B, 4>,
        options: &StepOptions,
        noise: &mut dyn NoiseSource,
    ) -> Result<StepOutput<B>, SchedulerError> {
        options.check()?;
        self.index_in_order(timestep)?;
        let dtype = sample.dtype();
        let output = self.advance(Step {
            model_output: widen(model_output),
            timestep,
            sample: widen(sample),
            options,
            noise: StepNoise::new(noise, dtype),
        })?;
        Ok(StepOutput {
            prev_sample: cast(output.prev_sample, dtype),
            pred_original_sample: output.pred_original_sample.map(|image| cast(image, dtype)),
        })
    }

    fn add_noise(
        &self,
        original: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        alpha_sigma::add_noise(&self.alpha_sigmas(timesteps)?, original, noise)
    }

    fn get_velocity(
        &self,
        sample: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        if !self.capabilities().velocity {
            return Err(self.unsupported("velocity"));
        }
        let index_of = |timestep: &f64| self.schedule.index_of(*timestep).map(|i| i as f64);
        let rows = match self.resolved.options.process() {
            // Diffusers' quirk: `ᾱ` is read at the *index* of a timestep in the run.
            Process::Exploding(_) => {
                let indices: Result<Vec<f64>, _> = timesteps.iter().map(index_of).collect();
                self.noise_schedule.alpha_sigmas(&indices?)?
            }
            _ => self.noise_schedule.alpha_sigmas(timesteps)?,
        };
        alpha_sigma::velocity(&rows, sample, noise)
    }
}
