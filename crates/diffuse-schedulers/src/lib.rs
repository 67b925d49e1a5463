#![doc = include_str!("../README.md")]

pub mod random;

mod config;
mod error;
mod json;
mod ladder;
mod mixture;
mod noise_schedule;
mod prediction;
mod registry;
mod scheduler;
mod sigmas;
mod spacing;
mod tensor;

mod ddim;
mod ddpm;
mod euler;
mod pndm;
mod unipc;
mod unipc_weights;

pub use config::{Overrides, SCHEDULER_CONFIG_NAME, SchedulerConfig};
pub use ddim::{DDIMConfig, DDIMScheduler};
pub use ddpm::{DDPMConfig, DDPMScheduler, VarianceType};
pub use error::SchedulerError;
pub use euler::{EulerDiscreteConfig, EulerDiscreteScheduler, InterpolationType, TimestepType};
pub use noise_schedule::{BetaSchedule, NoiseSchedule};
pub use pndm::{PNDMConfig, PNDMScheduler};
pub use prediction::PredictionType;
pub use random::{Generator, NoiseSource, randn_tensor};
pub use registry::{scheduler_from_config, scheduler_names};
pub use scheduler::{
    Capabilities, Scheduler, Step, StepNoise, StepOptions, StepOutput, TimestepRequest,
};
pub use sigmas::FinalSigmasType;
pub use spacing::TimestepSpacing;
pub use unipc::{UniPCMultistepConfig, UniPCMultistepScheduler};
pub use unipc_weights::UniPCSolverType;
