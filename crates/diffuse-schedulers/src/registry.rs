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
    "euler-a" => EulerAncestralDiscreteScheduler(EulerAncestralDiscreteConfig),
    "heun" => HeunDiscreteScheduler(HeunDiscreteConfig),
    "lms" => LMSDiscreteScheduler(LMSDiscreteConfig),
    "dpm2" => KDPM2DiscreteScheduler(KDPM2DiscreteConfig),
    "dpm2-a" => KDPM2AncestralDiscreteScheduler(KDPM2AncestralDiscreteConfig),
    "dpm++-2m" => DPMSolverMultistepScheduler(DPMSolverMultistepConfig),
    "dpm++-2m-inverse" => DPMSolverMultistepInverseScheduler(DPMSolverMultistepInverseConfig),
    "dpm++-2s" => DPMSolverSinglestepScheduler(DPMSolverSinglestepConfig),
    "dpm++-sde" => DPMSolverSDEScheduler(DPMSolverSDEConfig),
    "deis" => DEISMultistepScheduler(DEISMultistepConfig),
    "unipc" => UniPCMultistepScheduler(UniPCMultistepConfig),
    "sa" => SASolverScheduler(SASolverConfig),
    "lcm" => LCMScheduler(LCMConfig),
    "tcd" => TCDScheduler(TCDConfig),
    "ipndm" => IPNDMScheduler(IPNDMConfig),
    "ddim-inverse" => DDIMInverseScheduler(DDIMInverseConfig),
    "edm-euler" => EDMEulerScheduler(EDMEulerConfig),
    "edm-dpm++-2m" => EDMDPMSolverMultistepScheduler(EDMDPMSolverMultistepConfig),
}

/// Builds the sampler that a configuration, or `name`, asks for: the reference's `from_pretrained` and `from_config`.
///
/// `name` is a class (`DDIMScheduler`), a short name (`ddim`), or what other programs call a sampler (`DPM++ 2M Karras`),
/// in upper or lower case, with the options that go with it ([`scheduler_catalog`]); `None` takes the class that the
/// configuration was written for. `overrides` win over the configuration. Options pass from one sampler to another as
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
    let popular = POPULAR
        .iter()
        .find(|(popular, ..)| popular.eq_ignore_ascii_case(name));
    let short = popular.map_or(name, |(_, short, _)| short);
    let class = IMPLEMENTED
        .iter()
        .find(|(known, class, _)| known.eq_ignore_ascii_case(short) || *class == short)
        .map_or(name, |(_, class, _)| class);
    let implied = popular.map_or(&[][..], |(.., implied)| implied);
    let mut together: Overrides = implied
        .iter()
        .map(|(key, text)| {
            let value = serde_json::from_str(text).expect("an option of the table is JSON");
            (key.to_string(), value)
        })
        .collect();
    together.extend(overrides.clone());
    let overrides = &together;
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

/// A sampler of this crate and the names it goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerInfo {
    /// The short name (`euler-a`).
    pub name: &'static str,
    /// The class (`EulerAncestralDiscreteScheduler`).
    pub class: &'static str,
    /// What other programs call it, some with options of their own (`DPM++ 2M Karras`).
    pub popular: Vec<&'static str>,
    /// What it is, in a line.
    pub about: &'static str,
}

/// Every sampler of this crate, with all its names, in the order of the registry.
///
/// ```
/// let heun = diffuse_schedulers::scheduler_catalog().find(|info| info.name == "heun").unwrap();
/// assert_eq!((heun.class, heun.popular), ("HeunDiscreteScheduler", vec!["Heun"]));
/// ```
pub fn scheduler_catalog() -> impl Iterator<Item = SchedulerInfo> {
    scheduler_names().map(|(name, class)| SchedulerInfo {
        name,
        class,
        popular: POPULAR
            .iter()
            .filter(|(_, short, _)| *short == name)
            .map(|(popular, ..)| *popular)
            .collect(),
        about: ABOUT
            .iter()
            .find(|(short, _)| *short == name)
            .map_or("", |(_, about)| about),
    })
}

/// What other programs call a sampler: that name, the short name, and options that go with it, as JSON.
type Popular = (
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str)],
);

const POPULAR: &[Popular] = &[
    ("DDPM", "ddpm", &[]),
    ("DDIM", "ddim", &[]),
    ("DDIM Inverse", "ddim-inverse", &[]),
    ("PNDM", "pndm", &[]),
    ("PLMS", "pndm", &[("skip_prk_steps", "true")]),
    ("Euler", "euler", &[]),
    ("Euler Karras", "euler", &[KARRAS]),
    ("Euler a", "euler-a", &[]),
    ("Euler ancestral", "euler-a", &[]),
    ("Heun", "heun", &[]),
    ("LMS", "lms", &[]),
    ("LMS Karras", "lms", &[KARRAS]),
    ("DPM2", "dpm2", &[]),
    ("DPM2 Karras", "dpm2", &[KARRAS]),
    ("DPM2 a", "dpm2-a", &[]),
    ("DPM2 a Karras", "dpm2-a", &[KARRAS]),
    ("DPM++ 2M", "dpm++-2m", &[]),
    ("DPM++ 2M Karras", "dpm++-2m", &[KARRAS]),
    ("DPM++ 2M SDE", "dpm++-2m", &[SDE]),
    ("DPM++ 2M SDE Karras", "dpm++-2m", &[SDE, KARRAS]),
    ("DPM++ 3M SDE", "dpm++-2m", &[SDE, ("solver_order", "3")]),
    ("DPM++ 2S", "dpm++-2s", &[]),
    ("DPM++ 2S Karras", "dpm++-2s", &[KARRAS]),
    ("DPM++ SDE", "dpm++-sde", &[]),
    ("DPM++ SDE Karras", "dpm++-sde", &[KARRAS]),
    ("DEIS", "deis", &[]),
    ("UniPC", "unipc", &[]),
    ("SA-Solver", "sa", &[]),
    ("LCM", "lcm", &[]),
    ("TCD", "tcd", &[]),
    ("iPNDM", "ipndm", &[]),
];

const KARRAS: (&str, &str) = ("use_karras_sigmas", "true");
const SDE: (&str, &str) = ("algorithm_type", "\"sde-dpmsolver++\"");

/// What each sampler is, by short name.
const ABOUT: &[(&str, &str)] = &[
    (
        "ddpm",
        "ancestral sampling, noise in each step: up to 1000 steps",
    ),
    ("ddim", "the same without noise: 50 steps"),
    ("ddim-inverse", "DDIM backwards, from an image to its noise"),
    (
        "pndm",
        "linear multistep; what Stable Diffusion v1 was published with: 50 steps",
    ),
    ("euler", "Euler's method on noise levels: 20 to 30 steps"),
    (
        "euler-a",
        "Euler's method with noise in each step: 20 to 40 steps",
    ),
    (
        "heun",
        "Heun's method, two model calls a step: 10 to 20 steps",
    ),
    ("lms", "linear multistep on noise levels: 20 to 50 steps"),
    (
        "dpm2",
        "midpoint method, two model calls a step: 10 to 20 steps",
    ),
    ("dpm2-a", "the same with noise in each step"),
    ("dpm++-2m", "DPM-Solver++, multistep: 15 to 25 steps"),
    (
        "dpm++-2m-inverse",
        "DPM-Solver++ backwards, from an image to its noise",
    ),
    ("dpm++-2s", "DPM-Solver++, singlestep: 15 to 25 model calls"),
    (
        "dpm++-sde",
        "DPM-Solver++ for the SDE, two model calls a step: 10 to 20 steps",
    ),
    ("deis", "exponential integrator, multistep: 15 to 25 steps"),
    ("unipc", "multistep predictor and corrector: 10 to 25 steps"),
    (
        "sa",
        "stochastic multistep predictor and corrector: 20 to 50 steps",
    ),
    ("lcm", "latent consistency models: 1 to 8 steps"),
    ("tcd", "trajectory consistency models: 2 to 8 steps"),
    (
        "ipndm",
        "linear multistep for models whose time runs from 1 to 0",
    ),
    ("edm-euler", "Euler's method for EDM models"),
    ("edm-dpm++-2m", "DPM-Solver++ for EDM models, multistep"),
];

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
