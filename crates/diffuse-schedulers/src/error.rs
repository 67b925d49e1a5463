//! Everything that can go wrong in this crate, one cause a variant.

use std::path::PathBuf;

/// Why a scheduler could not be built, scheduled or stepped.
///
/// Tensors of the wrong shape are mistakes in code and panic instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SchedulerError {
    /// A file could not be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A text is not JSON, not even in Python's dialect of it.
    #[error("the scheduler configuration is not valid JSON")]
    Json {
        /// Where and why the parser stopped.
        source: serde_json::Error,
    },
    /// A file was read but holds no configuration.
    #[error("`{}` is no scheduler configuration", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<SchedulerError>,
    },
    /// The JSON is well formed but not an object of options.
    #[error("a scheduler configuration is a JSON object, not {found}")]
    NotAnObject {
        /// What was found instead.
        found: &'static str,
    },
    /// The configuration does not say which sampler it is for and nobody else did.
    #[error(
        "`_class_name` is missing from the scheduler configuration: name a sampler, one of {known}"
    )]
    NoClass {
        /// The samplers of this crate.
        known: String,
    },
    /// No sampler of this crate has that name.
    #[error("unknown scheduler `{name}`, expected one of {known}")]
    UnknownClass {
        /// The name that was asked for.
        name: String,
        /// The samplers of this crate.
        known: String,
    },
    /// An override names an option that the sampler does not have.
    #[error("`{class}` has no option `{key}`, it has {known}")]
    UnknownKey {
        /// The sampler.
        class: &'static str,
        /// The option that was asked for.
        key: String,
        /// The options of the sampler.
        known: String,
    },
    /// An option has a value that the sampler does not compute.
    #[error("`{key}` is `{value}`, which `{class}` does not support: {expected}")]
    Value {
        /// The sampler.
        class: &'static str,
        /// The option.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is supported.
        expected: String,
    },
    /// The betas make no noise schedule that a sampler can follow.
    #[error("`{class}` cannot use these betas ({betas}): {reason}")]
    NoiseSchedule {
        /// The sampler.
        class: &'static str,
        /// The options that the betas come from.
        betas: String,
        /// What is wrong with them.
        reason: String,
    },
    /// Options that are fine alone have no finite result together.
    #[error("{keys} do not go together in `{class}`: {advice}")]
    Clash {
        /// The sampler.
        class: &'static str,
        /// The options and their values.
        keys: String,
        /// Why, and what to choose instead.
        advice: String,
    },
    /// The number of steps is not one that the sampler can take.
    #[error("`num_inference_steps` is `{steps}`, `{class}` supports {supported}")]
    Steps {
        /// The sampler.
        class: &'static str,
        /// The number of steps.
        steps: usize,
        /// What is supported.
        supported: String,
    },
    /// A list of timesteps or sigmas cannot be used as a schedule.
    #[error("`{what}` cannot be used by `{class}`: {reason}")]
    Schedule {
        /// The sampler.
        class: &'static str,
        /// `timesteps` or `sigmas`.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no schedule yet.
    #[error("the scheduler has no timesteps yet: call `set_timesteps` first")]
    NoTimesteps,
    /// The timestep is not one of `timesteps()`.
    #[error("timestep `{timestep}` is not in the schedule: pass the entries of `timesteps()`")]
    NotInSchedule {
        /// The timestep.
        timestep: f64,
    },
    /// The timestep is not the next one of the run.
    #[error("timestep `{timestep}` is out of order: the next step of the run is at `{expected}`")]
    OutOfOrder {
        /// The timestep.
        timestep: f64,
        /// The timestep of the next step.
        expected: f64,
    },
    /// The timestep is not one the model was trained on.
    #[error("timestep `{timestep}` is not a whole number in `0..{num_train_timesteps}`")]
    TimestepRange {
        /// The timestep.
        timestep: f64,
        /// The length of the noise schedule.
        num_train_timesteps: usize,
    },
    /// All steps of the schedule have been taken.
    #[error("all {steps} steps have been taken: call `set_timesteps` to start again")]
    Finished {
        /// The number of steps in the schedule.
        steps: usize,
    },
    /// A multistep sampler is asked for a step that needs earlier ones.
    #[error("`{class}` cannot start here: {reason}")]
    WarmUp {
        /// The sampler.
        class: &'static str,
        /// What is missing.
        reason: String,
    },
    /// An option of a step has a value without a finite result.
    #[error("step option `{name}` is `{value}`, expected {expected}")]
    StepOption {
        /// The option.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What is supported.
        expected: &'static str,
    },
    /// There is not one timestep for each row of the batch.
    #[error("{given} timesteps were given for a batch of {batch}: give one, or one for each row")]
    TimestepCount {
        /// The number of timesteps.
        given: usize,
        /// The number of rows.
        batch: usize,
    },
    /// There is not one generator for each image of the batch.
    #[error(
        "You have passed a list of generators of length {generators}, but requested an effective \
         batch size of {batch}. Make sure the batch size matches the length of the generators."
    )]
    Generators {
        /// The number of generators.
        generators: usize,
        /// The number of images.
        batch: usize,
    },
    /// A noise source gave more or fewer numbers than were asked for.
    #[error("the noise source gave {given} numbers for a tensor of {expected}")]
    NoiseLength {
        /// The numbers given.
        given: usize,
        /// The numbers asked for.
        expected: usize,
    },
    /// The sampler does not have this operation.
    #[error("`{class}` has no {operation}")]
    Unsupported {
        /// The sampler.
        class: &'static str,
        /// The operation.
        operation: &'static str,
    },
}

impl SchedulerError {
    /// Options that have no finite result together, and what to choose instead.
    pub(crate) fn clash(
        class: &'static str,
        keys: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        let (keys, advice) = (keys.into(), advice.into());
        Self::Clash {
            class,
            keys,
            advice,
        }
    }
}
