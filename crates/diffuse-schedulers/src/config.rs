//! `scheduler_config.json`, and how one sampler's options become another's.
//!
//! A [`SchedulerConfig`] is everything a file says, the keys of other samplers included. A sampler is built from it by
//! the rules of the reference's `from_config`:
//!
//! 1. An option that nobody gave ([`SchedulerConfig::defaulted`]) takes the default of the *new* sampler.
//! 2. An option that the new sampler has keeps its value; overrides win.
//! 3. A key of another compatible sampler, or of the sampler the file was written for, is kept without effect, so that
//!    switching back restores it.
//! 4. Any other key is kept too and reported ([`SchedulerConfig::ignored`]).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::registry::{compatible_keys, keys_of};
use crate::{SchedulerError, json};

/// The name of the file inside a checkpoint's `scheduler` folder.
pub const SCHEDULER_CONFIG_NAME: &str = "scheduler_config.json";

/// Options by name, given to a sampler over those of its configuration.
pub type Overrides = Map<String, Value>;

/// The options of a sampler and of those it may be exchanged with, as `scheduler_config.json` holds them.
///
/// ```
/// use diffuse_schedulers::SchedulerConfig;
///
/// let text = r#"{"_class_name": "PNDMScheduler", "skip_prk_steps": true, "steps_offset": 1}"#;
/// let config = SchedulerConfig::from_json_str(text)?;
/// assert_eq!(config.class_name(), Some("PNDMScheduler"));
/// assert_eq!(config.get("steps_offset"), Some(&1.into()));
/// # Ok::<(), diffuse_schedulers::SchedulerError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SchedulerConfig {
    class_name: Option<String>,
    values: Map<String, Value>,
    defaulted: BTreeSet<String>,
    ignored: Vec<String>,
}

impl SchedulerConfig {
    /// Reads the text of a `scheduler_config.json`, Python's bare `NaN`, `Infinity` and `-Infinity` included.
    pub fn from_json_str(text: &str) -> Result<Self, SchedulerError> {
        let value = json::parse(text).map_err(|source| SchedulerError::Json { source })?;
        let Value::Object(values) = value else {
            let found = match value {
                Value::Array(_) => "a list",
                Value::String(_) => "a string",
                Value::Number(_) => "a number",
                _ => "a single word",
            };
            return Err(SchedulerError::NotAnObject { found });
        };
        Ok(Self::from_values(values))
    }

    /// A configuration with these keys; `_class_name` among them names the sampler.
    pub fn from_values(mut values: Map<String, Value>) -> Self {
        let class_name = match values.shift_remove("_class_name") {
            Some(Value::String(name)) => Some(name),
            _ => None,
        };
        Self {
            class_name,
            values,
            ..Self::default()
        }
    }

    /// Reads a `scheduler_config.json`, or the one in a folder.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, SchedulerError> {
        let path = file_of(path.as_ref());
        match std::fs::read_to_string(&path) {
            Err(source) => Err(SchedulerError::Read { path, source }),
            Ok(text) => Self::from_json_str(&text).map_err(|error| SchedulerError::File {
                path,
                source: Box::new(error),
            }),
        }
    }

    /// The sampler the file was written for (`_class_name`).
    pub fn class_name(&self) -> Option<&str> {
        self.class_name.as_deref()
    }

    /// The value of an option, or of a key kept for another sampler.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All options and kept keys, without `_class_name`.
    pub fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// The options that nobody gave: they have their sampler's default and do not pass on to another sampler.
    pub fn defaulted(&self) -> impl Iterator<Item = &str> {
        self.defaulted.iter().map(String::as_str)
    }

    /// The keys that no sampler involved knows: they have no effect, and a program may want to say so.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// Gives an option a value, as a file that holds the key does.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.defaulted.remove(key);
        self.values.insert(key.to_string(), value.into());
    }

    /// Changes the value of an option as the reference's pipelines do when they correct an old checkpoint: an option
    /// that nobody gave does not count as given afterwards and still does not pass on to another sampler.
    pub fn patch(&mut self, key: &str, value: impl Into<Value>) {
        self.values.insert(key.to_string(), value.into());
    }

    /// The text of a `scheduler_config.json`: sorted keys, with every default spelled out.
    pub fn to_json_string(&self) -> String {
        let mut values = self.values.clone();
        if let Some(class_name) = &self.class_name {
            values.insert("_class_name".into(), class_name.as_str().into());
        }
        json::write(&Value::Object(values))
    }

    /// Writes a `scheduler_config.json`, into a folder if the path is one; an existing file is replaced whole.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), SchedulerError> {
        let path = file_of(path.as_ref());
        let unfinished = path.with_extension("json.part");
        let written = std::fs::write(&unfinished, self.to_json_string())
            .and_then(|()| std::fs::rename(&unfinished, &path));
        written.map_err(|source| {
            // What is left of an unfinished file is of no use; that it cannot be removed is no second error.
            let _ = std::fs::remove_file(&unfinished);
            SchedulerError::Write { path, source }
        })
    }
}

fn file_of(path: &Path) -> PathBuf {
    if path.is_dir() {
        path.join(SCHEDULER_CONFIG_NAME)
    } else {
        path.to_path_buf()
    }
}

/// The options of one sampler: implemented by [`scheduler_config!`].
pub(crate) trait ClassConfig: Clone + Default {
    /// The name of the sampler's class.
    const CLASS: &'static str;
    /// The names of the options.
    const KEYS: &'static [&'static str];
    /// Reads the options; absent ones have their default.
    fn from_values(values: &Map<String, Value>) -> Result<Self, SchedulerError>;
    /// Writes all options.
    fn to_values(&self) -> Map<String, Value>;
}

/// The options of a sampler, typed and as the configuration they came from.
#[derive(Clone, Debug)]
pub(crate) struct Resolved<C> {
    pub options: C,
    pub config: SchedulerConfig,
}

impl<C: ClassConfig> Resolved<C> {
    /// Options given in code: those equal to the default count as not given.
    pub fn from_options(options: C) -> Self {
        let (values, defaults) = (options.to_values(), C::default().to_values());
        let defaulted = C::KEYS
            .iter()
            .filter(|&&key| values[key] == defaults[key])
            .map(ToString::to_string)
            .collect();
        let config = SchedulerConfig {
            class_name: Some(C::CLASS.to_string()),
            values,
            defaulted,
            ignored: Vec::new(),
        };
        Self { options, config }
    }

    /// Options of a configuration, by the rules at the top of this file.
    pub fn from_config(
        config: &SchedulerConfig,
        overrides: &Overrides,
    ) -> Result<Self, SchedulerError> {
        if let Some(key) = overrides
            .keys()
            .find(|key| !C::KEYS.contains(&key.as_str()))
        {
            return Err(SchedulerError::UnknownKey {
                class: C::CLASS,
                key: key.clone(),
                known: C::KEYS.map_to_list(),
            });
        }
        let mut given = config.values.clone();
        let same_class = config.class_name() == Some(C::CLASS);
        if !same_class {
            given.retain(|key, _| !config.defaulted.contains(key));
        }
        let mut kept = given.clone();
        kept.retain(|key, _| !C::KEYS.contains(&key.as_str()));
        given.retain(|key, _| C::KEYS.contains(&key.as_str()));
        given.extend(overrides.clone());

        let known = |key: &str| {
            key.starts_with('_')
                || key == "quantization_config"
                || compatible_keys(C::CLASS).contains(key)
                || config
                    .class_name()
                    .is_some_and(|class| keys_of(class).contains(&key))
        };
        let ignored = kept.keys().filter(|key| !known(key)).cloned().collect();
        let is_given = |key: &str| {
            overrides.contains_key(key)
                || given.contains_key(key) && !(same_class && config.defaulted.contains(key))
        };
        let defaulted = C::KEYS
            .iter()
            .filter(|key| !is_given(key))
            .map(ToString::to_string)
            .collect();

        let options = C::from_values(&given)?;
        let mut values = options.to_values();
        values.extend(kept);
        let config = SchedulerConfig {
            class_name: Some(C::CLASS.to_string()),
            values,
            defaulted,
            ignored,
        };
        Ok(Self { options, config })
    }
}

/// Lists keys or names for an error.
pub(crate) trait ListNames {
    /// `` `a`, `b` ``
    fn map_to_list(&self) -> String;
}

impl ListNames for [&str] {
    fn map_to_list(&self) -> String {
        self.iter()
            .map(|name| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(", ")
    }
}

/// Reads one option of a class; used by [`scheduler_config!`].
pub(crate) fn read_option<T: serde::de::DeserializeOwned>(
    values: &Map<String, Value>,
    class: &'static str,
    key: &'static str,
    default: T,
) -> Result<T, SchedulerError> {
    let Some(value) = values.get(key) else {
        return Ok(default);
    };
    json::from_value(value).map_err(|error| SchedulerError::Value {
        class,
        key,
        value: value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_string),
        expected: error.to_string(),
    })
}

/// Refuses an option whose value a class does not compute.
pub(crate) fn require<T: PartialEq + serde::Serialize>(
    class: &'static str,
    key: &'static str,
    value: &T,
    supported: &[T],
) -> Result<(), SchedulerError> {
    if supported.contains(value) {
        return Ok(());
    }
    let spell = |value: &T| {
        serde_json::to_value(value).map_or_else(
            |_| "?".into(),
            |value| match value {
                Value::String(text) => text,
                other => other.to_string(),
            },
        )
    };
    let names: Vec<String> = supported.iter().map(spell).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let expected = format!("expected {}", names.map_to_list());
    Err(SchedulerError::Value {
        class,
        key,
        value: spell(value),
        expected,
    })
}

/// Declares the options of a sampler as a struct whose fields are the keys of `scheduler_config.json`.
///
/// Groups of options that samplers share are named in brackets, own options follow with their defaults:
///
/// ```text
/// scheduler_config! {
///     /// Options of [`DDIMScheduler`].
///     pub struct DDIMConfig for "DDIMScheduler" [noise(0.0001, 0.02, Linear), spacing(Leading), clip(true)] {
///         /// ..
///         pub set_alpha_to_one: bool = true,
///     }
/// }
/// ```
macro_rules! scheduler_config {
    ($(#[$meta:meta])* pub struct $name:ident for $class:literal [$($groups:tt)*] { $($own:tt)* }) => {
        $crate::config::scheduler_config! { @ {$(#[$meta])* $name $class} [$($groups)*] {} { $($own)* } }
    };

    (@ $head:tt [noise($start:expr, $end:expr, $kind:ident) $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] {
            $($methods)*
            /// The noise schedule of these options.
            fn noise_schedule(
                &self,
                supported: &[$crate::BetaSchedule],
                rescale_betas_zero_snr: bool,
            ) -> Result<$crate::NoiseSchedule, $crate::SchedulerError> {
                use $crate::config::ClassConfig;
                $crate::config::require(Self::CLASS, "beta_schedule", &self.beta_schedule, supported)?;
                $crate::NoiseSchedule::new($crate::noise_schedule::NoiseOptions {
                    class: Self::CLASS,
                    num_train_timesteps: self.num_train_timesteps,
                    beta_start: self.beta_start,
                    beta_end: self.beta_end,
                    beta_schedule: self.beta_schedule,
                    trained_betas: self.trained_betas.as_deref(),
                    rescale_betas_zero_snr,
                })
            }
        } {
            /// The number of steps the model was trained to remove noise in.
            pub num_train_timesteps: usize = 1000,
            /// `β` of the first training timestep.
            pub beta_start: f64 = $start,
            /// `β` of the last training timestep.
            pub beta_end: f64 = $end,
            /// How `β` grows between the two.
            pub beta_schedule: $crate::BetaSchedule = $crate::BetaSchedule::$kind,
            /// `β` of every training timestep, instead of the three options above.
            pub trained_betas: Option<Vec<f64>> = None,
            /// What the model predicts.
            pub prediction_type: $crate::PredictionType = $crate::PredictionType::Epsilon,
            $($fields)*
        } }
    };

    (@ $head:tt [spacing($kind:ident) $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] {
            $($methods)*
            /// The timestep spacing of these options.
            fn spacing(&self) -> $crate::spacing::Spacing {
                use $crate::config::ClassConfig;
                $crate::spacing::Spacing {
                    class: Self::CLASS,
                    timestep_spacing: self.timestep_spacing,
                    num_train_timesteps: self.num_train_timesteps,
                    steps_offset: self.steps_offset,
                    reach: self.num_train_timesteps,
                }
            }
        } {
            $($fields)*
            /// How timesteps are spread over the training schedule.
            pub timestep_spacing: $crate::TimestepSpacing = $crate::TimestepSpacing::$kind,
            /// What leading spacing adds to every timestep.
            pub steps_offset: usize = 0,
        } }
    };

    (@ $head:tt [zero_snr $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] { $($methods)* } {
            $($fields)*
            /// Whether the betas are rescaled so that the noisiest sample holds no image at all.
            pub rescale_betas_zero_snr: bool = false,
        } }
    };

    (@ $head:tt [clip($default:literal) $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] {
            $($methods)*
            /// The bound of the predicted image that clipping asks for.
            fn clipping(&self) -> Result<$crate::prediction::Bound, $crate::SchedulerError> {
                use $crate::config::ClassConfig;
                $crate::prediction::Bound::clip(Self::CLASS, self.clip_sample, self.clip_sample_range)
            }
        } {
            $($fields)*
            /// Whether the predicted image is cut off at `clip_sample_range`.
            pub clip_sample: bool = $default,
            /// The largest absolute value of a clipped image.
            pub clip_sample_range: f64 = 1.0,
        } }
    };

    (@ $head:tt [thresholding $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] {
            $($methods)*
            /// The bound of the predicted image when `thresholding` is on, else the other one.
            fn threshold_or(&self, other: $crate::prediction::Bound) -> Result<$crate::prediction::Bound, $crate::SchedulerError> {
                use $crate::config::ClassConfig;
                $crate::prediction::Bound::threshold(
                    Self::CLASS, self.thresholding, self.dynamic_thresholding_ratio, self.sample_max_value, other,
                )
            }
        } {
            $($fields)*
            /// Whether the predicted image is bounded by dynamic thresholding (for models of pixels, not of latents).
            pub thresholding: bool = false,
            /// The quantile of the absolute values that becomes the bound.
            pub dynamic_thresholding_ratio: f64 = 0.995,
            /// The largest bound.
            pub sample_max_value: f64 = 1.0,
        } }
    };

    (@ $head:tt [sigmas $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] {
            $($methods)*
            /// The sigma schedule that the three options ask for.
            fn sigma_curve(&self) -> Result<Option<$crate::sigmas::SigmaCurve>, $crate::SchedulerError> {
                use $crate::config::ClassConfig;
                $crate::sigmas::SigmaCurve::from_flags(
                    Self::CLASS, self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas,
                )
            }
        } {
            $($fields)*
            /// Whether sigmas follow Karras et al. with ρ = 7.
            pub use_karras_sigmas: bool = false,
            /// Whether the logarithms of the sigmas are evenly spaced.
            pub use_exponential_sigmas: bool = false,
            /// Whether sigmas follow the quantiles of a beta distribution.
            pub use_beta_sigmas: bool = false,
        } }
    };

    (@ $head:tt [flow $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] {
            $($methods)*
            /// Refuses the sigmas of flow-matching models.
            fn refuse_flow(&self) -> Result<(), $crate::SchedulerError> {
                use $crate::config::{ClassConfig, require};
                require(Self::CLASS, "use_flow_sigmas", &self.use_flow_sigmas, &[false])
            }
        } {
            $($fields)*
            /// Must be `false`: flow-matching models are not supported.
            pub use_flow_sigmas: bool = false,
            /// An option of flow-matching models, without effect.
            pub flow_shift: f64 = 1.0,
        } }
    };

    (@ $head:tt [shifting $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] {
            $($methods)*
            /// Refuses the timesteps of flow-matching models.
            fn refuse_shifting(&self) -> Result<(), $crate::SchedulerError> {
                use $crate::config::{ClassConfig, require};
                require(Self::CLASS, "use_dynamic_shifting", &self.use_dynamic_shifting, &[false])
            }
        } {
            $($fields)*
            /// Must be `false`: flow-matching models are not supported.
            pub use_dynamic_shifting: bool = false,
            /// An option of flow-matching models, without effect.
            pub time_shift_type: String = "exponential".to_string(),
        } }
    };

    (@ $head:tt [clipped_lambdas $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] { $($methods)* } {
            $($fields)*
            /// The smallest `λ = ln(α / σ)` to visit: a bound for schedules that end in pure noise.
            pub lambda_min_clipped: f64 = f64::NEG_INFINITY,
            /// The kind of variance that the model predicts along; only `learned` and `learned_range` have an effect,
            /// which is that the predicted variance is left out.
            pub variance_type: Option<$crate::VarianceType> = None,
        } }
    };

    (@ $head:tt [edm $(, $($rest:tt)*)?] { $($methods:tt)* } { $($fields:tt)* }) => {
        $crate::config::scheduler_config! { @ $head [$($($rest)*)?] {
            $($methods)*
            /// The model and the noise levels that these options describe.
            fn edm(&self) -> $crate::edm::EDM {
                use $crate::config::ClassConfig;
                $crate::edm::EDM {
                    class: Self::CLASS,
                    sigma_min: self.sigma_min,
                    sigma_max: self.sigma_max,
                    sigma_data: self.sigma_data,
                    sigma_schedule: self.sigma_schedule,
                    num_train_timesteps: self.num_train_timesteps,
                    prediction_type: self.prediction_type,
                    rho: self.rho,
                }
            }
        } {
            $($fields)*
            /// The lowest noise level.
            pub sigma_min: f64 = 0.002,
            /// The highest noise level.
            pub sigma_max: f64 = 80.0,
            /// The standard deviation of the images that the model was trained on.
            pub sigma_data: f64 = 0.5,
            /// The curve that noise levels follow.
            pub sigma_schedule: $crate::EDMSigmaSchedule = $crate::EDMSigmaSchedule::Karras,
            /// The number of steps that a run has at most.
            pub num_train_timesteps: usize = 1000,
            /// The sign of the model's answer: `epsilon` or `v_prediction`.
            pub prediction_type: $crate::PredictionType = $crate::PredictionType::Epsilon,
            /// The exponent of Karras's curve.
            pub rho: f64 = 7.0,
            /// The noise level that a run ends at.
            pub final_sigmas_type: $crate::FinalSigmasType = $crate::FinalSigmasType::Zero,
        } }
    };

    (@ {$(#[$meta:meta])* $name:ident $class:literal} [] { $($methods:tt)* } {
        $($(#[$doc:meta])* pub $field:ident: $type:ty = $default:expr,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $crate::config::ClassConfig for $name {
            const CLASS: &'static str = $class;
            const KEYS: &'static [&'static str] = &[$(stringify!($field)),*];

            fn from_values(
                values: &serde_json::Map<String, serde_json::Value>,
            ) -> Result<Self, $crate::SchedulerError> {
                Ok(Self {
                    $($field: $crate::config::read_option(values, $class, stringify!($field), $default)?,)*
                })
            }

            fn to_values(&self) -> serde_json::Map<String, serde_json::Value> {
                let mut values = serde_json::Map::new();
                $(values.insert(stringify!($field).to_string(), $crate::json::to_value(&self.$field));)*
                values
            }
        }

        impl $name {
            $($methods)*
        }
    };
}
pub(crate) use scheduler_config;
