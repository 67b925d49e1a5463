//! The samplers: options, and the formula of the paper.

mod ddim;
mod ddim_inverse;
mod ddpm;
mod pndm;

mod euler;
mod euler_ancestral;
mod heun;
mod kdpm2;
mod kdpm2_ancestral;
mod lms;
mod two_evaluations;

mod deis;
mod dpmsolver_multistep;
mod dpmsolver_multistep_inverse;
mod dpmsolver_sde;
mod dpmsolver_singlestep;
mod sasolver;
mod unipc;

mod consistency;
mod lcm;
mod tcd;

mod edm;
mod edm_dpmsolver_multistep;
mod edm_euler;
mod ipndm;

pub use ddim::{DDIMConfig, DDIMScheduler};
pub use ddim_inverse::{DDIMInverseConfig, DDIMInverseScheduler};
pub use ddpm::{DDPMConfig, DDPMScheduler, VarianceType};
pub use deis::{DEISAlgorithmType, DEISMultistepConfig, DEISMultistepScheduler, DEISSolverType};
pub use dpmsolver_multistep::{
    DPMAlgorithmType, DPMSolverMultistepConfig, DPMSolverMultistepScheduler, DPMSolverType,
};
pub use dpmsolver_multistep_inverse::{
    DPMSolverMultistepInverseConfig, DPMSolverMultistepInverseScheduler,
};
pub use dpmsolver_sde::{DPMSolverSDEConfig, DPMSolverSDEScheduler, NoiseSamplerSeed};
pub use dpmsolver_singlestep::{DPMSolverSinglestepConfig, DPMSolverSinglestepScheduler};
pub use edm::{EDMOptions, EDMSigmaSchedule};
pub use edm_dpmsolver_multistep::{EDMDPMSolverMultistepConfig, EDMDPMSolverMultistepScheduler};
pub use edm_euler::{EDMEulerConfig, EDMEulerScheduler};
pub use euler::{EulerDiscreteConfig, EulerDiscreteScheduler, InterpolationType, TimestepType};
pub use euler_ancestral::{EulerAncestralDiscreteConfig, EulerAncestralDiscreteScheduler};
pub use heun::{HeunDiscreteConfig, HeunDiscreteScheduler};
pub use ipndm::{IPNDMConfig, IPNDMScheduler};
pub use kdpm2::{KDPM2DiscreteConfig, KDPM2DiscreteScheduler};
pub use kdpm2_ancestral::{KDPM2AncestralDiscreteConfig, KDPM2AncestralDiscreteScheduler};
pub use lcm::{LCMConfig, LCMScheduler};
pub use lms::{LMSDiscreteConfig, LMSDiscreteScheduler};
pub use pndm::{PNDMConfig, PNDMScheduler};
pub use sasolver::{SAAlgorithmType, SASolverConfig, SASolverScheduler};
pub use tcd::{TCDConfig, TCDScheduler};
pub use unipc::{UniPCMultistepConfig, UniPCMultistepScheduler, UniPCSolverType};

/// The imports of every sampler's file.
mod prelude {
    pub(super) use burn::prelude::*;

    pub(super) use crate::config::{options, require};
    pub(super) use crate::driver::{Driver, KARRAS, Names, Sampler};
    pub(super) use crate::schedule::noise_schedule::BetaOptions;
    pub(super) use crate::schedule::sigma_grid::SigmaGrid;
    pub(super) use crate::schedule::sigmas::{SigmaOptions, SigmaRange, SigmaSchedule};
    pub(super) use crate::schedule::spacing::SpacingOptions;
    pub(super) use crate::schedule::{Place, Schedule};
    pub(super) use crate::step::alpha_sigma::AlphaSigma;
    pub(super) use crate::step::clipping::{ClipOptions, Clipping, ThresholdOptions};
    pub(super) use crate::step::coefficients::{Coefficients, remember};
    pub(super) use crate::step::prediction::{Integrand, Prediction, noise_between};
    pub(super) use crate::step::process::Process;
    pub(super) use crate::step::tensor::combine;
    pub(super) use crate::{
        BetaSchedule, Capabilities, FinalSigmasType, NoiseSchedule, PredictionType, SchedulerError,
        Step, StepOutput, TimestepRequest, TimestepSpacing,
    };
}
