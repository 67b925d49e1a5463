//! Reading a model's `config.json`.
//!
//! Keys keep the reference's meaning: one that is absent or, in re-saved files, null has its
//! default; unknown keys are ignored, as the reference does; a known key with a value that is not
//! computed here is an error.

use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::ModelPath;

/// Why a configuration could not be read or is not supported.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The file is not JSON, or a value has the wrong type.
    #[error("`{}` is not a valid configuration: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A file asks for something that is not computed here.
    #[error("`{}`: {cause}", path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// What it asks for; part of this error's message, and so no `source` of it.
        cause: Box<ConfigError>,
    },
    /// A value that this model does not compute.
    #[error("`{key}` is {value}, but {class} supports {supported}")]
    Unsupported {
        /// The model's class.
        class: &'static str,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What it may be.
        supported: String,
    },
}

impl ConfigError {
    /// A value of `key` that `class` does not compute.
    pub fn unsupported(
        class: &'static str,
        key: &str,
        value: impl Serialize,
        supported: impl Into<String>,
    ) -> Self {
        ConfigError::Unsupported {
            class,
            key: key.to_string(),
            value: serde_json::to_string(&value).unwrap_or_else(|error| error.to_string()),
            supported: supported.into(),
        }
    }
}

/// What a model's `config.json` holds.
pub trait ModelConfig: Serialize + DeserializeOwned {
    /// The reference's class, written as `_class_name`.
    const CLASS: &'static str;
    /// Stems of the weights file, as `.safetensors` and as `.bin`.
    const WEIGHTS: [&'static str; 2] = ["diffusion_pytorch_model"; 2];
    /// Keys in which null says something else than the default.
    const NULL_IS_A_VALUE: &'static [&'static str] = &[];
    /// Keys that are not computed here, with the values (as JSON) that change nothing.
    const ONLY: &'static [(&'static str, &'static [&'static str])] = &[];

    /// Checks values against each other and against what is computed here.
    ///
    /// # Errors
    /// If one is not supported.
    fn validate(&self) -> Result<(), ConfigError>;

    /// The part of the file that describes this model: all of it, but for models that are part of
    /// a larger one.
    fn section(map: Map<String, Value>) -> Map<String, Value> {
        map
    }

    /// Reads `config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, is not valid, or asks for something that is not computed here.
    fn from_file(path: impl Into<ModelPath>) -> Result<Self, ConfigError> {
        let file = path.into();
        let path = file.path();
        let text = file.read_text().map_err(|source| ConfigError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        let invalid = |message: String| ConfigError::Parse {
            path: path.to_path_buf(),
            message,
        };
        let json = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        let Value::Object(map) = json else {
            return Err(invalid("it is not a JSON object".into()));
        };
        Self::from_map(map, &invalid).map_err(|error| match error {
            ConfigError::Unsupported { .. } => ConfigError::In {
                path: path.to_path_buf(),
                cause: Box::new(error),
            },
            error => error,
        })
    }

    /// The configuration of a parsed file; `invalid` makes the error for values of the wrong type.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    fn from_map(
        map: Map<String, Value>,
        invalid: &dyn Fn(String) -> ConfigError,
    ) -> Result<Self, ConfigError> {
        let mut map = Self::section(map);
        match map.get("_class_name") {
            Some(Value::String(class)) if class != Self::CLASS => {
                let message = format!("its class is {class}, not {}", Self::CLASS);
                return Err(invalid(message));
            }
            _ => {}
        }
        map.retain(|key, value| !value.is_null() || Self::NULL_IS_A_VALUE.contains(&key.as_str()));
        for (key, allowed) in Self::ONLY {
            let Some(value) = map.get(*key) else { continue };
            // A list says the same of each level.
            let values = match value {
                Value::Array(values) if !values.is_empty() => values.as_slice(),
                value => std::slice::from_ref(value),
            };
            let is_allowed = |value| allowed.iter().any(|allowed| same_json(value, allowed));
            if !values.iter().all(is_allowed) {
                return Err(ConfigError::Unsupported {
                    class: Self::CLASS,
                    key: key.to_string(),
                    value: value.to_string(),
                    supported: format!("only {}", allowed.join(" or ")),
                });
            }
        }
        let config: Self = serde_path_to_error::deserialize(Value::Object(map))
            .map_err(|error| invalid(format!("`{}`: {}", error.path(), error.inner())))?;
        config.validate()?;
        Ok(config)
    }

    /// The file's content: this class and all keys.
    fn to_map(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("_class_name".into(), Self::CLASS.into());
        match serde_json::to_value(self) {
            Ok(Value::Object(values)) => map.extend(values),
            other => unreachable!("a configuration is a JSON object: {other:?}"),
        }
        map
    }
}

/// Whether `value` is the JSON text `expected`; `1` and `1.0` are the same number.
fn same_json(value: &Value, expected: &str) -> bool {
    let expected: Value = serde_json::from_str(expected).expect("tables hold JSON");
    match (value.as_f64(), expected.as_f64()) {
        (Some(value), Some(expected)) => value == expected,
        _ => *value == expected,
    }
}

/// A value for the whole network, or one a level, from the first level down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number, or a list with one a level")]
pub enum PerLevel<T> {
    /// The same at each level.
    Same(T),
    /// One a level.
    Each(Vec<T>),
}

impl<T: Copy> PerLevel<T> {
    /// One value for each of `levels`, if there are as many.
    pub fn levels(&self, levels: usize) -> Option<Vec<T>> {
        match self {
            PerLevel::Same(value) => Some(vec![*value; levels]),
            PerLevel::Each(values) => (values.len() == levels).then(|| values.clone()),
        }
    }
}

/// Height and width that a network was made for (`sample_size`): one number, or `[height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a size, or [height, width]")]
pub enum SampleSize {
    /// The same for both.
    Square(usize),
    /// `[height, width]`
    Rectangle([usize; 2]),
}

impl SampleSize {
    /// `[height, width]`
    pub fn dims(self) -> [usize; 2] {
        match self {
            SampleSize::Square(size) => [size; 2],
            SampleSize::Rectangle(size) => size,
        }
    }
}

/// A limit on sizes in configurations, far above any published one, so that an absurd file is an
/// error at once.
pub const MAX_CHANNELS: usize = 1 << 16;
/// A limit on numbers of layers and blocks in configurations.
pub const MAX_LAYERS: usize = 32;
/// A limit on numbers of levels in configurations.
pub const MAX_LEVELS: usize = 8;

/// Checks that `value` is in `1..=max`.
///
/// # Errors
/// If it is not.
pub fn check_size(
    class: &'static str,
    key: &str,
    value: usize,
    max: usize,
) -> Result<(), ConfigError> {
    if (1..=max).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::unsupported(
            class,
            key,
            value,
            format!("1 to {max}"),
        ))
    }
}
