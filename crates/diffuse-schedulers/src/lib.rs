#![doc = include_str!("../README.md")]

pub mod random;

mod config;
mod error;
mod json;
mod mixture;
mod noise_schedule;
mod prediction;
mod registry;
mod scheduler;
mod sigmas;
mod spacing;
mod tensor;

mod ddpm;

pub use config::{Overrides, SCHEDULER_CONFIG_NAME, SchedulerConfig};
pub use ddpm::{DDPMConfig, DDPMScheduler, VarianceType};
pub use error::SchedulerError;
pub use noise_schedule::{BetaSchedule, NoiseSchedule};
pub use prediction::PredictionType;
pub use random::{Generator, NoiseSource, randn_tensor};
pub use registry::{scheduler_from_config, scheduler_names};
pub use scheduler::{
    Capabilities, Scheduler, Step, StepNoise, StepOptions, StepOutput, TimestepRequest,
};
pub use spacing::TimestepSpacing;
