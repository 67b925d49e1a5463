//! The samplers of this crate by name.

use burn::prelude::*;

use crate::config::{Options, Overrides, Resolved, list_names};
use crate::driver::{Driver, Names, Sampler};
use crate::{Scheduler, SchedulerConfig, SchedulerError};

/// An entry of the registry.
struct Entry {
    class: &'static str,
    names: Names,
    keys: fn() -> Vec<&'static str>,
}

impl Entry {
    fn of<S: Sampler>() -> Self {
        Self {
            class: S::CLASS,
            names: S::NAMES,
            keys: <S as Options>::keys,
        }
    }
}

/// The list of samplers: one line each.
macro_rules! registry {
    ($($options:ident,)*) => {
        fn entries() -> Vec<Entry> {
            vec![$(Entry::of::<crate::$options>()),*]
        }

        fn build<B: Backend>(
            class: &str,
            config: &SchedulerConfig,
            overrides: &Overrides,
        ) -> Option<Result<Box<dyn Scheduler<B>>, SchedulerError>> {
            $(
                if class == <crate::$options as Sampler>::CLASS {
                    let built = Resolved::<crate::$options>::from_config(config, overrides)
                        .and_then(Driver::build);
                    let boxed = |scheduler| Box::new(scheduler) as Box<dyn Scheduler<B>>;
                    return Some(built.map(boxed));
                }
            )*
            None
        }
    };
}

registry! {
    DDPMConfig,
    DDIMConfig,
    PNDMConfig,
    EulerDiscreteConfig,
    EulerAncestralDiscreteConfig,
    HeunDiscreteConfig,
    LMSDiscreteConfig,
    KDPM2DiscreteConfig,
    KDPM2AncestralDiscreteConfig,
    DPMSolverMultistepConfig,
    DPMSolverMultistepInverseConfig,
    DPMSolverSinglestepConfig,
    DPMSolverSDEConfig,
    DEISMultistepConfig,
    UniPCMultistepConfig,
    SASolverConfig,
    LCMConfig,
    TCDConfig,
    IPNDMConfig,
    DDIMInverseConfig,
    EDMEulerConfig,
    EDMDPMSolverMultistepConfig,
}

/// Builds the sampler of a configuration, or the one called `name`: Diffusers' `from_pretrained`
/// and `from_config`.
///
/// `name` is a class (`DDIMScheduler`), a short name (`ddim`), or the name in other programs
/// (`DPM++ 2M Karras`), in upper or lower case, with the options that it implies
/// ([`scheduler_catalog`]). `None` is the class of the configuration. `overrides` take precedence
/// over the configuration. Options pass from one sampler to another as
/// `docs/schedulers.md` says; keys without effect are listed by [`SchedulerConfig::ignored`] of
/// [`Scheduler::config`].
///
/// ```
/// use burn_flex::Flex;
/// use diffuse_schedulers::{Overrides, SchedulerConfig, scheduler_from_config};
///
/// let text = r#"{"_class_name": "PNDMScheduler", "clip_sample": false}"#;
/// let config = SchedulerConfig::from_json_str(text)?;
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
    let entries = entries();
    let known = || {
        let names = entries
            .iter()
            .flat_map(|entry| [entry.names.short, entry.class]);
        list_names(&names.collect::<Vec<_>>())
    };
    let Some(name) = name.or(config.class_name()) else {
        return Err(SchedulerError::NoClass { known: known() });
    };
    let mut popular = entries.iter().flat_map(|entry| {
        let names = entry.names.popular.iter();
        names.map(move |(popular, implied)| (entry.class, *popular, *implied))
    });
    let popular = popular.find(|(_, popular, _)| popular.eq_ignore_ascii_case(name));
    let is_named =
        |entry: &&Entry| entry.names.short.eq_ignore_ascii_case(name) || entry.class == name;
    let class = match popular {
        Some((class, ..)) => class,
        None => entries
            .iter()
            .find(is_named)
            .map_or(name, |entry| entry.class),
    };
    let mut together = Overrides::new();
    for (key, text) in popular.map_or(&[][..], |(.., implied)| implied) {
        let value = serde_json::from_str(text).expect("an implied option is JSON");
        together.insert(key.to_string(), value);
    }
    together.extend(overrides.clone());
    build(class, config, &together).unwrap_or_else(|| {
        Err(SchedulerError::UnknownClass {
            name: name.to_string(),
            known: known(),
        })
    })
}

/// The short name and the class of each sampler of this crate.
pub fn scheduler_names() -> impl Iterator<Item = (&'static str, &'static str)> {
    let entries = entries().into_iter();
    entries.map(|entry| (entry.names.short, entry.class))
}

/// A sampler of this crate, with its names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SchedulerInfo {
    /// The short name (`euler-a`).
    pub name: &'static str,
    /// The class (`EulerAncestralDiscreteScheduler`).
    pub class: &'static str,
    /// Its names in other programs, some of which imply options (`DPM++ 2M Karras`).
    pub popular: Vec<&'static str>,
    /// A description of one line.
    pub about: &'static str,
}

/// Every sampler of this crate, with all its names, in the order of the registry.
///
/// ```
/// let heun = diffuse_schedulers::scheduler_catalog().find(|info| info.name == "heun").unwrap();
/// assert_eq!((heun.class, heun.popular), ("HeunDiscreteScheduler", vec!["Heun"]));
/// ```
pub fn scheduler_catalog() -> impl Iterator<Item = SchedulerInfo> {
    entries().into_iter().map(|entry| SchedulerInfo {
        name: entry.names.short,
        class: entry.class,
        popular: entry.names.popular.iter().map(|(name, _)| *name).collect(),
        about: entry.names.about,
    })
}

/// The option names of a class of this crate.
pub(crate) fn own_keys(class: &str) -> Option<Vec<&'static str>> {
    let entry = entries().into_iter().find(|entry| entry.class == class);
    entry.map(|entry| (entry.keys)())
}
