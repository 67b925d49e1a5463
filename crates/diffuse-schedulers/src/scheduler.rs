//! The interface of every sampler. A denoising loop is:
//!
//! ```text
//! scheduler.set_timesteps(&50.into())?;
//! let mut sample = noise * scheduler.init_noise_sigma();
//! for timestep in scheduler.timesteps().to_vec() {
//!     let input = scheduler.scale_model_input(sample.clone(), timestep)?;
//!     let output = model(input, timestep);
//!     sample = scheduler.step(output, timestep, sample, &options, &mut generator)?.prev_sample;
//! }
//! ```

use std::fmt::Debug;

use burn::prelude::*;
use burn::tensor::DType;

use crate::step::tensor::cast;
use crate::{NoiseSource, SchedulerConfig, SchedulerError, randn_tensor};

/// The timesteps of a run.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum TimestepRequest {
    /// This number of steps; the sampler chooses the timesteps.
    Steps(usize),
    /// These timesteps, largest first ([`Capabilities::custom_timesteps`]).
    Timesteps(Vec<f64>),
    /// The timesteps of these sigmas, largest first, with the sigma of the result at the end
    /// ([`Capabilities::custom_sigmas`]).
    Sigmas(Vec<f64>),
}

impl From<usize> for TimestepRequest {
    fn from(steps: usize) -> Self {
        Self::Steps(steps)
    }
}

/// The optional features of a sampler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// `set_timesteps` supports [`TimestepRequest::Timesteps`].
    pub custom_timesteps: bool,
    /// `set_timesteps` supports [`TimestepRequest::Sigmas`].
    pub custom_sigmas: bool,
    /// `step` uses [`StepOptions::eta`].
    pub eta: bool,
    /// `step` may draw noise.
    pub noise: bool,
    /// The step index is counted, and [`Scheduler::set_begin_index`] sets the first one. Other
    /// samplers use the timestep.
    pub begin_index: bool,
    /// [`Scheduler::get_velocity`] is supported.
    pub velocity: bool,
}

impl Capabilities {
    /// The features of a sampler that counts its steps.
    pub(crate) const COUNTED: Self = Self {
        custom_timesteps: false,
        custom_sigmas: false,
        eta: false,
        noise: false,
        begin_index: true,
        velocity: false,
    };
}

/// Options of a single step; each sampler uses its own and ignores the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOptions {
    /// How much noise a step adds, from 0 (none) to 1 (as in DDPM); `None` is the sampler's default
    /// (DDIM: 0).
    pub eta: Option<f64>,
    /// DDIM: whether the noise is recomputed from the clipped image.
    pub use_clipped_model_output: bool,
    /// Euler: how much noise is added before a step.
    pub s_churn: f64,
    /// Euler: the smallest sigma at which noise is added.
    pub s_tmin: f64,
    /// Euler: the largest sigma at which noise is added.
    pub s_tmax: f64,
    /// Euler: the scale of the added noise.
    pub s_noise: f64,
    /// LMS: the number of derivatives that are combined, at least 1.
    pub order: usize,
    /// Whether [`pred_original_sample`](StepOutput::pred_original_sample) is computed for samplers
    /// that do without it, too; for previews.
    pub predict_original: bool,
}

impl Default for StepOptions {
    fn default() -> Self {
        Self {
            eta: None,
            use_clipped_model_output: false,
            s_churn: 0.0,
            s_tmin: 0.0,
            s_tmax: f64::INFINITY,
            s_noise: 1.0,
            order: 4,
            predict_original: false,
        }
    }
}

impl StepOptions {
    pub(crate) fn check(&self) -> Result<(), SchedulerError> {
        let rows = [
            ("eta", self.eta.unwrap_or(0.0), "a finite number", true),
            ("s_churn", self.s_churn, "a finite number", true),
            ("s_noise", self.s_noise, "a finite number", true),
            ("s_tmin", self.s_tmin, "a number", false),
            ("s_tmax", self.s_tmax, "a number", false),
        ];
        for (name, value, expected, finite) in rows {
            if value.is_nan() || finite && value.is_infinite() {
                return Err(SchedulerError::StepOption {
                    name,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// The result of a step.
#[derive(Clone, Debug)]
pub struct StepOutput<B: Backend> {
    /// The sample at the next timestep, `[batch, channels, height, width]`.
    pub prev_sample: Tensor<B, 4>,
    /// The predicted image, if the sampler computes it or
    /// [`predict_original`](StepOptions::predict_original) asks for it: `[batch, channels, height, width]`, in
    /// `[-1, 1]` for models of pixels.
    pub pred_original_sample: Option<Tensor<B, 4>>,
}

/// The arguments of a step; the tensors have at least single precision.
pub struct Step<'a, B: Backend> {
    /// The model output: `[batch, channels, height, width]`, with twice the channels if it includes
    /// a variance.
    pub model_output: Tensor<B, 4>,
    /// The timestep of the sample.
    pub timestep: f64,
    /// `[batch, channels, height, width]`
    pub sample: Tensor<B, 4>,
    /// The caller's options.
    pub options: &'a StepOptions,
    /// The source of noise.
    pub noise: StepNoise<'a>,
}

/// Noise for a step, drawn in the precision of the caller's sample.
pub struct StepNoise<'a> {
    source: &'a mut dyn NoiseSource,
    dtype: DType,
}

impl<'a> StepNoise<'a> {
    pub(crate) fn new(source: &'a mut dyn NoiseSource, dtype: DType) -> Self {
        Self { source, dtype }
    }
}

impl StepNoise<'_> {
    /// Draws noise with the shape, precision and device of a tensor
    /// `[batch, channels, height, width]`.
    pub fn like<B: Backend>(&mut self, x: &Tensor<B, 4>) -> Result<Tensor<B, 4>, SchedulerError> {
        self.draw(x, self.dtype)
    }

    /// The same in single precision, whatever the precision of the sample.
    pub fn in_f32<B: Backend>(&mut self, x: &Tensor<B, 4>) -> Result<Tensor<B, 4>, SchedulerError> {
        self.draw(x, DType::F32)
    }

    /// Seeds for other sources of noise, one for each image of a batch.
    pub fn seeds(&mut self, batch: usize) -> Result<Vec<u64>, SchedulerError> {
        let numbers = self.source.randn([batch, 1, 1, 2], DType::F32)?;
        if numbers.len() != 2 * batch {
            let (given, expected) = (numbers.len(), 2 * batch);
            return Err(SchedulerError::NoiseLength { given, expected });
        }
        let bits = |number: f32| u64::from(number.to_bits());
        let seed = |[high, low]: &[f32; 2]| bits(*high) << 32 | bits(*low);
        Ok(numbers.as_chunks::<2>().0.iter().map(seed).collect())
    }

    /// The float type of the caller's sample.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn draw<B: Backend>(
        &mut self,
        x: &Tensor<B, 4>,
        dtype: DType,
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let noise = randn_tensor(self.source, x.dims(), dtype, &x.device())?;
        Ok(cast(noise, x.dtype()))
    }
}

/// A sampler: it chooses the timesteps at which a model is evaluated, and computes the next sample
/// from each output.
pub trait Scheduler<B: Backend>: Debug + Send + Sync {
    /// The options in effect, and the keys kept for other samplers.
    fn config(&self) -> &SchedulerConfig;

    /// A scheduler with the same options and no run, so that several runs can share this one.
    fn fresh(&self) -> Result<Box<dyn Scheduler<B>>, SchedulerError>;

    /// The optional features of this sampler.
    fn capabilities(&self) -> Capabilities;

    /// Chooses the timesteps of a run, and resets the state. An error changes nothing.
    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError>;

    /// The timesteps of the run in the order of the model evaluations, in `0..num_train_timesteps`;
    /// empty before [`set_timesteps`](Self::set_timesteps).
    fn timesteps(&self) -> &[f64];

    /// The sigma of each timestep and of the result, for samplers with a sigma grid.
    fn sigmas(&self) -> Option<&[f32]>;

    /// The standard deviation of the noise that a run starts from. It depends on the timesteps of
    /// the run.
    fn init_noise_sigma(&self) -> f64;

    /// The number of entries in [`timesteps`](Self::timesteps) for one step of the sampler.
    fn order(&self) -> usize;

    /// Starts a run inside the schedule, at this index of [`timesteps`](Self::timesteps). Samplers
    /// that use the timestep ignore it.
    fn set_begin_index(&mut self, begin_index: usize);

    /// The model input for a sample, `[batch, channels, height, width]`.
    fn scale_model_input(
        &self,
        sample: Tensor<B, 4>,
        timestep: f64,
    ) -> Result<Tensor<B, 4>, SchedulerError>;

    /// Computes the sample at the next timestep from the sample at `timestep`.
    ///
    /// `model_output` and `sample` are `[batch, channels, height, width]`; the output has twice the
    /// channels for models that predict a variance. Half precision is computed in f32; the results
    /// have the type of the sample.
    ///
    /// # Panics
    /// If the shapes of the two do not match.
    fn step(
        &mut self,
        model_output: Tensor<B, 4>,
        timestep: f64,
        sample: Tensor<B, 4>,
        options: &StepOptions,
        noise: &mut dyn NoiseSource,
    ) -> Result<StepOutput<B>, SchedulerError>;

    /// The formula of [`step`](Self::step), without checks of the arguments and their order, for a
    /// sampler inside another.
    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError>;

    /// Adds noise to images for given timesteps, one for each row of the batch or one for all.
    ///
    /// `original` and `noise` are `[batch, channels, height, width]`.
    ///
    /// # Panics
    /// If the shapes of the two differ.
    fn add_noise(
        &self,
        original: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError>;

    /// The velocity of a sample and its noise, the target of a model; both are
    /// `[batch, channels, height, width]`, with one timestep for each row of the batch or one for
    /// all.
    ///
    /// # Panics
    /// If the shapes of the two differ.
    fn get_velocity(
        &self,
        sample: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError>;
}
