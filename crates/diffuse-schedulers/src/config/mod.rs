//! `scheduler_config.json`, and how options pass from one sampler to another.
//!
//! A [`SchedulerConfig`] has all keys of a file, including those of other samplers. A sampler is
//! built from it by the rules of Diffusers' `from_config`:
//!
//! 1. An option without a given value ([`SchedulerConfig::defaulted`]) has the default of the *new*
//!    sampler.
//! 2. An option of the new sampler keeps its value; overrides take precedence.
//! 3. A key of another compatible sampler, or of the file's own sampler, is kept without effect, so
//!    that switching back restores it.
//! 4. Any other key is kept too and reported ([`SchedulerConfig::ignored`]).

pub(crate) mod classes;
pub(crate) mod json;
mod options;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::SchedulerError;
use crate::driver::Sampler;
use classes::{compatible_keys, keys_of};

pub use options::Options;
pub(crate) use options::{list_names, options, read_option, require, require_range};

/// The name of the file inside a checkpoint's `scheduler` folder.
pub const SCHEDULER_CONFIG_NAME: &str = "scheduler_config.json";

/// Options by name that take precedence over those of a configuration.
pub type Overrides = Map<String, Value>;

/// The options of a sampler, and kept options of compatible samplers: a `scheduler_config.json`.
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
    /// Reads the text of a `scheduler_config.json`, with Python's bare `NaN`, `Infinity` and
    /// `-Infinity`.
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

    /// The options without a given value: they have their sampler's default and do not pass to
    /// another sampler.
    pub fn defaulted(&self) -> impl Iterator<Item = &str> {
        self.defaulted.iter().map(String::as_str)
    }

    /// The keys that no sampler involved knows, for a warning: they have no effect.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// Sets an option, as the key in a file does.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.defaulted.remove(key);
        self.values.insert(key.to_string(), value.into());
    }

    /// Corrects an option of an old checkpoint, as Diffusers' pipelines do: an option without a
    /// given value still does not count as given, and does not pass to another sampler.
    pub fn patch(&mut self, key: &str, value: impl Into<Value>) {
        self.values.insert(key.to_string(), value.into());
    }

    /// The text of a `scheduler_config.json`: sorted keys, with every default.
    pub fn to_json_string(&self) -> String {
        let mut values = self.values.clone();
        if let Some(class_name) = &self.class_name {
            values.insert("_class_name".into(), class_name.as_str().into());
        }
        json::write(&Value::Object(values))
    }

    /// Writes a `scheduler_config.json`, into a folder if the path is one, and replaces an existing
    /// file.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), SchedulerError> {
        let path = file_of(path.as_ref());
        let unfinished = path.with_extension("json.part");
        let written = std::fs::write(&unfinished, self.to_json_string())
            .and_then(|()| std::fs::rename(&unfinished, &path));
        written.map_err(|source| {
            // Removes an incomplete file; a failure of that is ignored.
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

/// The options of a sampler, both typed and as a configuration.
#[derive(Clone, Debug)]
pub(crate) struct Resolved<S> {
    pub options: S,
    pub config: SchedulerConfig,
}

impl<S: Sampler> Resolved<S> {
    /// Options given in code: those equal to the default count as not given.
    pub fn from_options(options: S) -> Self {
        let (values, defaults) = (options.to_values(), S::default().to_values());
        let defaulted = values
            .iter()
            .filter(|(key, value)| **value == defaults[*key])
            .map(|(key, _)| key.clone())
            .collect();
        let config = SchedulerConfig {
            class_name: Some(S::CLASS.to_string()),
            values,
            defaulted,
            ignored: Vec::new(),
        };
        Self { options, config }
    }

    /// The options of a configuration, by the rules at the top of this file.
    pub fn from_config(
        config: &SchedulerConfig,
        overrides: &Overrides,
    ) -> Result<Self, SchedulerError> {
        let keys = S::keys();
        let is_own = |key: &String| keys.contains(&key.as_str());
        if let Some(key) = overrides.keys().find(|key| !is_own(key)) {
            return Err(SchedulerError::UnknownKey {
                class: S::CLASS,
                key: key.clone(),
                known: list_names(&keys),
            });
        }
        let mut given = config.values.clone();
        let same_class = config.class_name() == Some(S::CLASS);
        if !same_class {
            given.retain(|key, _| !config.defaulted.contains(key));
        }
        let mut kept = given.clone();
        kept.retain(|key, _| !is_own(key));
        given.retain(|key, _| is_own(key));
        given.extend(overrides.clone());

        let compatible = compatible_keys(S::CLASS);
        let source = config.class_name().map(keys_of).unwrap_or_default();
        let known = |key: &str| {
            let private = key.starts_with('_') || key == "quantization_config";
            private || compatible.contains(key) || source.contains(&key)
        };
        let ignored = kept.keys().filter(|key| !known(key)).cloned().collect();
        let is_given = |key: &str| {
            overrides.contains_key(key)
                || given.contains_key(key) && !(same_class && config.defaulted.contains(key))
        };
        let defaulted = keys.iter().filter(|key| !is_given(key));
        let defaulted = defaulted.map(ToString::to_string).collect();

        let options = S::default().with_values(S::CLASS, &given)?;
        let mut values = options.to_values();
        values.extend(kept);
        let config = SchedulerConfig {
            class_name: Some(S::CLASS.to_string()),
            values,
            defaulted,
            ignored,
        };
        Ok(Self { options, config })
    }

    /// Copies options that the sampler has changed to the configuration.
    pub fn write_back(&mut self) {
        self.options.write_to(&mut self.config.values);
    }
}
