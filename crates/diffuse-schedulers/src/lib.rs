#![doc = include_str!("../README.md")]

pub mod random;

mod ancestral;
mod brownian;
mod config;
mod distilled;
mod dpm_weights;
mod edm;
mod error;
mod exponential;
mod json;
mod ladder;
mod lagrange;
mod levels;
mod midpoint;
mod mixture;
mod multistep;
mod noise_schedule;
mod prediction;
mod registry;
mod scheduler;
mod sigmas;
mod spacing;
mod tensor;
mod weights;

mod ddim;
mod ddim_inverse;
mod ddpm;
mod deis;
mod dpmsolver_multistep;
mod dpmsolver_multistep_inverse;
mod dpmsolver_sde;
mod dpmsolver_singlestep;
mod edm_dpmsolver_multistep;
mod edm_euler;
mod euler;
mod euler_ancestral;
mod heun;
mod ipndm;
mod kdpm2;
mod kdpm2_ancestral;
mod lcm;
mod lms;
mod pndm;
mod sasolver;
mod tcd;
mod unipc;
mod unipc_weights;

pub use config::{Overrides, SCHEDULER_CONFIG_NAME, SchedulerConfig};
pub use ddim::{DDIMConfig, DDIMScheduler};
pub use ddim_inverse::{DDIMInverseConfig, DDIMInverseScheduler};
pub use ddpm::{DDPMConfig, DDPMScheduler, VarianceType};
pub use deis::{DEISAlgorithmType, DEISMultistepConfig, DEISMultistepScheduler, DEISSolverType};
pub use dpm_weights::{DPMAlgorithmType, DPMSolverType};
pub use dpmsolver_multistep::{DPMSolverMultistepConfig, DPMSolverMultistepScheduler};
pub use dpmsolver_multistep_inverse::{
    DPMSolverMultistepInverseConfig, DPMSolverMultistepInverseScheduler,
};
pub use dpmsolver_sde::{DPMSolverSDEConfig, DPMSolverSDEScheduler, NoiseSamplerSeed};
pub use dpmsolver_singlestep::{DPMSolverSinglestepConfig, DPMSolverSinglestepScheduler};
pub use edm::EDMSigmaSchedule;
pub use edm_dpmsolver_multistep::{EDMDPMSolverMultistepConfig, EDMDPMSolverMultistepScheduler};
pub use edm_euler::{EDMEulerConfig, EDMEulerScheduler};
pub use error::SchedulerError;
pub use euler::{EulerDiscreteConfig, EulerDiscreteScheduler, InterpolationType, TimestepType};
pub use euler_ancestral::{EulerAncestralDiscreteConfig, EulerAncestralDiscreteScheduler};
pub use heun::{HeunDiscreteConfig, HeunDiscreteScheduler};
pub use ipndm::{IPNDMConfig, IPNDMScheduler};
pub use kdpm2::{KDPM2DiscreteConfig, KDPM2DiscreteScheduler};
pub use kdpm2_ancestral::{KDPM2AncestralDiscreteConfig, KDPM2AncestralDiscreteScheduler};
pub use lcm::{LCMConfig, LCMScheduler};
pub use lms::{LMSDiscreteConfig, LMSDiscreteScheduler};
pub use noise_schedule::{BetaSchedule, NoiseSchedule};
pub use pndm::{PNDMConfig, PNDMScheduler};
pub use prediction::PredictionType;
pub use random::{Generator, NoiseSource, randn_tensor};
pub use registry::{SchedulerInfo, scheduler_catalog, scheduler_from_config, scheduler_names};
pub use sasolver::{SAAlgorithmType, SASolverConfig, SASolverScheduler};
pub use scheduler::{
    Capabilities, Scheduler, Step, StepNoise, StepOptions, StepOutput, TimestepRequest,
};
pub use sigmas::FinalSigmasType;
pub use spacing::{AYS_SIGMAS, AYS_TIMESTEPS, TimestepSpacing};
pub use tcd::{TCDConfig, TCDScheduler};
pub use unipc::{UniPCMultistepConfig, UniPCMultistepScheduler};
pub use unipc_weights::UniPCSolverType;
