//! The errors of this crate, one variant for each cause.

use std::path::PathBuf;

/// Why a scheduler could not be built, scheduled or stepped.
///
/// Tensors of the wrong shape panic instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SchedulerError {
    /// A file could not be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A text is not JSON, not even in Python's dialect of it.
    #[error("the scheduler configuration is not valid JSON")]
    Json {
        /// Where and why the parser stopped.
        source: serde_json::Error,
    },
    /// A file has no valid configuration.
    #[error("cannot use `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<SchedulerError>,
    },
    /// The JSON is well formed but not an object of options.
    #[error("a scheduler configuration is a JSON object, not {found}")]
    NotAnObject {
        /// The kind of value.
        found: &'static str,
    },
    /// Neither the configuration nor the caller names a sampler.
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
        /// The given name.
        name: String,
        /// The samplers of this crate.
        known: String,
    },
    /// An override names an option that the sampler does not have.
    #[error("`{class}` has no option `{key}`, it has {known}")]
    UnknownKey {
        /// The sampler.
        class: &'static str,
        /// The given option.
        key: String,
        /// The options of the sampler.
        known: String,
    },
    /// The sampler does not support the value of an option.
    #[error("`{key}` is `{value}`, which `{class}` does not support: {expected}")]
    Value {
        /// The sampler.
        class: &'static str,
        /// The option.
        key: &'static str,
        /// Its value.
        value: String,
        /// The supported values.
        expected: String,
    },
    /// No sampler can use the noise schedule of the betas.
    #[error("`{class}` cannot use these betas ({betas}): {reason}")]
    NoiseSchedule {
        /// The sampler.
        class: &'static str,
        /// The options that the betas come from.
        betas: String,
        /// The cause.
        reason: String,
    },
    /// A combination of options has no finite result.
    #[error("{keys} do not go together in `{class}`: {advice}")]
    Clash {
        /// The sampler.
        class: &'static str,
        /// The options and their values.
        keys: String,
        /// The cause, and the options to choose instead.
        advice: String,
    },
    /// The sampler does not support the number of steps.
    #[error("`num_inference_steps` is `{steps}`, `{class}` supports {supported}")]
    Steps {
        /// The sampler.
        class: &'static str,
        /// The number of steps.
        steps: usize,
        /// The supported values.
        supported: String,
    },
    /// A list of timesteps or sigmas cannot be used as a schedule.
    #[error("`{what}` cannot be used by `{class}`: {reason}")]
    Schedule {
        /// The sampler.
        class: &'static str,
        /// `timesteps` or `sigmas`.
        what: &'static str,
        /// The cause.
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
    /// The run is complete.
    #[error("all {steps} steps have been taken: call `set_timesteps` to start again")]
    Finished {
        /// The number of steps in the schedule.
        steps: usize,
    },
    /// A step of a multistep sampler needs the steps before it.
    #[error("`{class}` cannot start here: {reason}")]
    WarmUp {
        /// The sampler.
        class: &'static str,
        /// The missing step.
        reason: String,
    },
    /// An option of a step has no finite result.
    #[error("step option `{name}` is `{value}`, expected {expected}")]
    StepOption {
        /// The option.
        name: &'static str,
        /// Its value.
        value: f64,
        /// The supported values.
        expected: &'static str,
    },
    /// The number of timesteps is neither 1 nor the batch size.
    #[error("{given} timesteps were given for a batch of {batch}: give one, or one for each row")]
    TimestepCount {
        /// The number of timesteps.
        given: usize,
        /// The number of rows.
        batch: usize,
    },
    /// The number of generators is not the number of images.
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
    /// A noise source returned a wrong number of values.
    #[error("the noise source gave {given} numbers for a tensor of {expected}")]
    NoiseLength {
        /// The returned number.
        given: usize,
        /// The requested number.
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
    /// Options that have no finite result together, and the ones to choose instead.
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
