#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod driver;
mod registry;
mod samplers;
mod scheduler;

mod config;
mod error;
pub mod random;
mod schedule;
mod step;

pub use config::{Overrides, SCHEDULER_CONFIG_NAME, SchedulerConfig};
pub use driver::Driver;
pub use error::SchedulerError;
pub use random::{Generator, NoiseSource, randn_tensor};
pub use registry::{SchedulerInfo, scheduler_catalog, scheduler_from_config, scheduler_names};
pub use samplers::*;
pub use schedule::flow::{FlowOptions, ShiftOptions};
pub use schedule::noise_schedule::{BetaOptions, BetaSchedule, NoiseSchedule};
pub use schedule::sigmas::{FinalSigmasType, SigmaOptions};
pub use schedule::spacing::{AYS_SIGMAS, AYS_TIMESTEPS, SpacingOptions, TimestepSpacing};
pub use scheduler::{
    Capabilities, Scheduler, Step, StepNoise, StepOptions, StepOutput, TimestepRequest,
};
pub use step::clipping::{ClipOptions, ThresholdOptions};
pub use step::prediction::PredictionType;
