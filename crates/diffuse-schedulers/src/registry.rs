//! The samplers of this crate, and what must be known of the reference's others.
//!
//! A new sampler is one line in [`registry!`]: its class, which names its file's types, and its short name.

use std::collections::BTreeSet;

use burn::prelude::*;

use crate::config::{ClassConfig, ListNames, Overrides, Resolved};
use crate::{Scheduler, SchedulerConfig, SchedulerError};

/// Gives each sampler its constructors and its place in [`scheduler_from_config`].
macro_rules! registry {
    ($($short:literal => $scheduler:ident($config:ident),)*) => {
        $(
            impl<B: Backend> crate::$scheduler<B> {
                /// A sampler with these options; an option equal to its default counts as not given.
                pub fn new(options: crate::$config) -> Result<Self, SchedulerError> {
                    Self::build(Resolved::from_options(options))
                }

                /// A sampler with the options of a configuration, which may be written for another sampler.
                pub fn from_config(config: &SchedulerConfig) -> Result<Self, SchedulerError> {
                    Self::build(Resolved::from_config(config, &Overrides::new())?)
                }
            }
        )*

        const IMPLEMENTED: &[(&str, &str, &[&str])] = &[$(
            ($short, <crate::$config as ClassConfig>::CLASS, <crate::$config as ClassConfig>::KEYS),
        )*];

        fn build<B: Backend>(
            class: &str,
            config: &SchedulerConfig,
            overrides: &Overrides,
        ) -> Option<Result<Box<dyn Scheduler<B>>, SchedulerError>> {
            $(
                if class == <crate::$config as ClassConfig>::CLASS {
                    let scheduler = Resolved::from_config(config, overrides).and_then(crate::$scheduler::<B>::build);
                    return Some(scheduler.map(|scheduler| Box::new(scheduler) as Box<dyn Scheduler<B>>));
                }
            )*
            None
        }
    };
}

registry! {
    "ddpm" => DDPMScheduler(DDPMConfig),
    "ddim" => DDIMScheduler(DDIMConfig),
    "pndm" => PNDMScheduler(PNDMConfig),
    "euler" => EulerDiscreteScheduler(EulerDiscreteConfig),
    "unipc" => UniPCMultistepScheduler(UniPCMultistepConfig),
}

/// Builds the sampler that a configuration, or `name`, asks for: the reference's `from_pretrained` and `from_config`.
///
/// `name` is a class (`DDIMScheduler`) or a short name (`ddim`); `None` takes the class that the configuration was
/// written for. `overrides` win over the configuration. Options pass from one sampler to another as
/// `docs/schedulers.md` says; keys without effect are listed by [`SchedulerConfig::ignored`] of
/// [`Scheduler::config`].
///
/// ```
/// use burn_flex::Flex;
/// use diffuse_schedulers::{Overrides, SchedulerConfig, scheduler_from_config};
///
/// let config = SchedulerConfig::from_json_str(r#"{"_class_name": "PNDMScheduler", "clip_sample": false}"#)?;
/// let scheduler = scheduler_from_config::<Flex>(&config, Some("ddpm"), &Overrides::new())?;
/// assert_eq!(scheduler.config().class_name(), Some("DDPMScheduler"));
/// assert_eq!(scheduler.config().get("clip_sample"), Some(&false.into()));
/// # Ok::<(), diffuse_schedulers::SchedulerError>(())
/// ```
pub fn scheduler_from_config<B: Backend>(
    config: &SchedulerConfig,
    name: Option<&str>,
    overrides: &Overrides,
) -> Result<Box<dyn Scheduler<B>>, SchedulerError> {
    let known = || {
        let names: Vec<&str> = scheduler_names()
            .flat_map(|(short, class)| [short, class])
            .collect();
        names.map_to_list()
    };
    let Some(name) = name.or(config.class_name()) else {
        return Err(SchedulerError::NoClass { known: known() });
    };
    let class = IMPLEMENTED
        .iter()
        .find(|(short, ..)| *short == name)
        .map_or(name, |(_, class, _)| class);
    build(class, config, overrides).unwrap_or_else(|| {
        Err(SchedulerError::UnknownClass {
            name: name.to_string(),
            known: known(),
        })
    })
}

/// The short name and the class of each sampler of this crate.
pub fn scheduler_names() -> impl Iterator<Item = (&'static str, &'static str)> {
    IMPLEMENTED.iter().map(|(short, class, _)| (*short, *class))
}

/// The option names of a class of the reference, whether it stands in this crate or not.
pub(crate) fn keys_of(class: &str) -> Vec<&'static str> {
    let implemented = IMPLEMENTED
        .iter()
        .find(|(_, name, _)| *name == class)
        .map(|(.., keys)| keys.to_vec());
    implemented.unwrap_or_else(|| {
        let other = OTHERS.iter().find(|(name, _)| *name == class);
        other.map_or_else(Vec::new, |(_, keys)| keys.split(' ').collect())
    })
}

/// The option names of the classes that `class` may be exchanged with.
pub(crate) fn compatible_keys(class: &str) -> BTreeSet<&'static str> {
    match NOT_EXCHANGEABLE.contains(&class) {
        true => BTreeSet::new(),
        false => EXCHANGEABLE
            .iter()
            .flat_map(|class| keys_of(class))
            .collect(),
    }
}

/// The classes whose options may appear in each other's files (the reference's `KarrasDiffusionSchedulers`).
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

/// The classes that look at nobody else's options.
const NOT_EXCHANGEABLE: &[&str] = &[
    "DDIMInverseScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "IPNDMScheduler",
];

/// The option names of classes of the reference that this crate does not have.
const OTHERS: &[(&str, &str)] = &[
    (
        "LMSDiscreteScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas use_karras_sigmas \
         use_exponential_sigmas use_beta_sigmas prediction_type timestep_spacing steps_offset",
    ),
    (
        "HeunDiscreteScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type \
         use_karras_sigmas use_exponential_sigmas use_beta_sigmas clip_sample clip_sample_range \
         timestep_spacing steps_offset",
    ),
    (
        "EulerAncestralDiscreteScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type \
         timestep_spacing steps_offset rescale_betas_zero_snr",
    ),
    (
        "DPMSolverMultistepScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas solver_order prediction_type \
         thresholding dynamic_thresholding_ratio sample_max_value algorithm_type solver_type \
         lower_order_final euler_at_final use_karras_sigmas use_exponential_sigmas use_beta_sigmas \
         use_lu_lambdas use_flow_sigmas flow_shift final_sigmas_type lambda_min_clipped variance_type \
         timestep_spacing steps_offset rescale_betas_zero_snr use_dynamic_shifting time_shift_type",
    ),
    (
        "DPMSolverMultistepInverseScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas solver_order prediction_type \
         thresholding dynamic_thresholding_ratio sample_max_value algorithm_type solver_type \
         lower_order_final euler_at_final use_karras_sigmas use_exponential_sigmas use_beta_sigmas \
         use_flow_sigmas flow_shift lambda_min_clipped variance_type timestep_spacing steps_offset",
    ),
    (
        "DPMSolverSinglestepScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas solver_order prediction_type \
         thresholding dynamic_thresholding_ratio sample_max_value algorithm_type solver_type \
         lower_order_final use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_flow_sigmas \
         flow_shift final_sigmas_type lambda_min_clipped variance_type use_dynamic_shifting time_shift_type",
    ),
    (
        "KDPM2DiscreteScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas use_karras_sigmas \
         use_exponential_sigmas use_beta_sigmas prediction_type timestep_spacing steps_offset",
    ),
    (
        "KDPM2AncestralDiscreteScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas use_karras_sigmas \
         use_exponential_sigmas use_beta_sigmas prediction_type timestep_spacing steps_offset",
    ),
    (
        "DEISMultistepScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas solver_order prediction_type \
         thresholding dynamic_thresholding_ratio sample_max_value algorithm_type solver_type \
         lower_order_final use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_flow_sigmas \
         flow_shift timestep_spacing steps_offset use_dynamic_shifting time_shift_type",
    ),
    (
        "DPMSolverSDEScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type \
         use_karras_sigmas use_exponential_sigmas use_beta_sigmas noise_sampler_seed timestep_spacing \
         steps_offset",
    ),
    (
        "SASolverScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas predictor_order corrector_order \
         prediction_type tau_func thresholding dynamic_thresholding_ratio sample_max_value algorithm_type \
         lower_order_final use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_flow_sigmas \
         flow_shift lambda_min_clipped variance_type timestep_spacing steps_offset",
    ),
    (
        "DDIMInverseScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas clip_sample set_alpha_to_one \
         steps_offset prediction_type clip_sample_range timestep_spacing rescale_betas_zero_snr",
    ),
    (
        "DDIMParallelScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas clip_sample set_alpha_to_one \
         steps_offset prediction_type thresholding dynamic_thresholding_ratio clip_sample_range \
         sample_max_value timestep_spacing rescale_betas_zero_snr",
    ),
    (
        "DDPMParallelScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas variance_type clip_sample \
         prediction_type thresholding dynamic_thresholding_ratio clip_sample_range sample_max_value \
         timestep_spacing steps_offset rescale_betas_zero_snr",
    ),
    (
        "LCMScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas original_inference_steps \
         clip_sample clip_sample_range set_alpha_to_one steps_offset prediction_type thresholding \
         dynamic_thresholding_ratio sample_max_value timestep_spacing timestep_scaling \
         rescale_betas_zero_snr",
    ),
    (
        "TCDScheduler",
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas original_inference_steps \
         clip_sample clip_sample_range set_alpha_to_one steps_offset prediction_type thresholding \
         dynamic_thresholding_ratio sample_max_value timestep_spacing timestep_scaling \
         rescale_betas_zero_snr",
    ),
    ("IPNDMScheduler", "num_train_timesteps trained_betas"),
    (
        "EDMEulerScheduler",
        "sigma_min sigma_max sigma_data sigma_schedule num_train_timesteps prediction_type rho \
         final_sigmas_type",
    ),
    (
        "EDMDPMSolverMultistepScheduler",
        "sigma_min sigma_max sigma_data sigma_schedule num_train_timesteps prediction_type rho solver_order \
         thresholding dynamic_thresholding_ratio sample_max_value algorithm_type solver_type \
         lower_order_final euler_at_final final_sigmas_type",
    ),
    (
        "CMStochasticIterativeScheduler",
        "num_train_timesteps sigma_min sigma_max sigma_data s_noise rho clip_denoised",
    ),
    (
        "UnCLIPScheduler",
        "num_train_timesteps variance_type clip_sample clip_sample_range prediction_type beta_schedule",
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
         max_image_seq_len invert_sigmas shift_terminal use_karras_sigmas use_exponential_sigmas \
         use_beta_sigmas time_shift_type stochastic_sampling",
    ),
    (
        "FlowMatchHeunDiscreteScheduler",
        "num_train_timesteps shift",
    ),
];
