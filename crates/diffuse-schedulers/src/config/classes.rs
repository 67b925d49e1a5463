//! Diffusers' classes for `from_config`: which are compatible, and the keys of each.

use std::collections::BTreeSet;

use crate::registry::own_keys;

/// The option names of a class of Diffusers, whether this crate has it or not.
pub(crate) fn keys_of(class: &str) -> Vec<&'static str> {
    own_keys(class).unwrap_or_else(|| {
        let other = OTHERS.iter().find(|(name, _)| *name == class);
        other.map_or_else(Vec::new, |(_, keys)| keys.split(' ').collect())
    })
}

/// The option names of the classes that are compatible with `class`.
pub(crate) fn compatible_keys(class: &str) -> BTreeSet<&'static str> {
    match NOT_EXCHANGEABLE.contains(&class) {
        true => BTreeSet::new(),
        false => EXCHANGEABLE
            .iter()
            .flat_map(|class| keys_of(class))
            .collect(),
    }
}

/// The classes with options in each other's files (Diffusers' `KarrasDiffusionSchedulers`).
const EXCHANGEABLE: &[&str] = &[
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
];

/// The classes that are compatible with no other.
const NOT_EXCHANGEABLE: &[&str] = &[
    "DDIMInverseScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "IPNDMScheduler",
];

/// The option names of classes of Diffusers that this crate does not have.
const OTHERS: &[(&str, &str)] = &[
    (
        "DDIMParallelScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas clip_sample \
         set_alpha_to_one steps_offset prediction_type thresholding dynamic_thresholding_ratio \
         clip_sample_range sample_max_value timestep_spacing rescale_betas_zero_snr",
    ),
    (
        "DDPMParallelScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas variance_type \
         clip_sample prediction_type thresholding dynamic_thresholding_ratio clip_sample_range \
         sample_max_value timestep_spacing steps_offset rescale_betas_zero_snr",
    ),
    (
        "CMStochasticIterativeScheduler",
        "num_train_timesteps sigma_min sigma_max sigma_data s_noise rho clip_denoised",
    ),
    (
        "UnCLIPScheduler",
        "num_train_timesteps variance_type clip_sample clip_sample_range prediction_type \
         beta_schedule",
    ),
    (
        "RePaintScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule eta trained_betas clip_sample",
    ),
    (
        "ScoreSdeVeScheduler",
        "num_train_timesteps snr sigma_min sigma_max sampling_eps correct_steps",
    ),
    (
        "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps shift use_dynamic_shifting base_shift max_shift base_image_seq_len \
         max_image_seq_len invert_sigmas shift_terminal use_karras_sigmas \
         use_exponential_sigmas use_beta_sigmas time_shift_type stochastic_sampling",
    ),
    (
        "FlowMatchHeunDiscreteScheduler",
        "num_train_timesteps shift",
    ),
];
