//! The options of a sampler: plain structs whose fields are keys of `scheduler_config.json`.
//!
//! Options that several samplers share are structs of their own
//! ([`BetaOptions`](crate::BetaOptions), [`SpacingOptions`](crate::SpacingOptions), ...), fields of
//! each sampler's struct. In the file all keys are on one level.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::json;
use crate::SchedulerError;

/// A struct of options: implemented by [`options!`].
pub trait Options: Clone + Default + Debug + PartialEq + Send + Sync + 'static {
    /// The keys of the options.
    fn keys() -> Vec<&'static str>;
    /// These options with the values of a configuration; absent keys change nothing.
    fn with_values(
        self,
        class: &'static str,
        values: &Map<String, Value>,
    ) -> Result<Self, SchedulerError>;
    /// Writes all options.
    fn write_to(&self, values: &mut Map<String, Value>);

    /// All options by key.
    fn to_values(&self) -> Map<String, Value> {
        let mut values = Map::new();
        self.write_to(&mut values);
        values
    }
}

/// Declares a struct of options with its defaults; shared groups of options follow `with`.
macro_rules! options {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[$doc:meta])* pub $field:ident: $type:ty = $default:expr,)*
        }
        $(with {
            $($(#[$group_doc:meta])* pub $group:ident: $group_type:ty = $group_default:expr,)*
        })?
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $($(
                #[doc = concat!("The options of [`", stringify!($group_type), "`].")]
                $(#[$group_doc])*
                pub $group: $group_type,
            )*)?
            $($(#[$doc])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $($($group: $group_default,)*)?
                    $($field: $default,)*
                }
            }
        }

        impl $crate::config::Options for $name {
            fn keys() -> Vec<&'static str> {
                let groups: &[Vec<&'static str>] = &[
                    $($(<$group_type as $crate::config::Options>::keys(),)*)?
                ];
                [groups.concat(), vec![$(stringify!($field)),*]].concat()
            }

            fn with_values(
                self,
                class: &'static str,
                values: &serde_json::Map<String, serde_json::Value>,
            ) -> Result<Self, $crate::SchedulerError> {
                let _ = (class, values);
                Ok(Self {
                    $($($group: self.$group.with_values(class, values)?,)*)?
                    $($field: $crate::config::read_option(
                        values, class, stringify!($field), self.$field,
                    )?,)*
                })
            }

            fn write_to(&self, values: &mut serde_json::Map<String, serde_json::Value>) {
                $($(self.$group.write_to(values);)*)?
                $(values.insert(
                    stringify!($field).to_string(),
                    $crate::config::json::to_value(&self.$field),
                );)*
            }
        }
    };
}
pub(crate) use options;

/// Reads one option; used by [`options!`].
pub(crate) fn read_option<T: DeserializeOwned>(
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
        value: json::bare(value),
        expected: error.to_string(),
    })
}

/// An error for an option whose value a class does not support.
pub(crate) fn require<T: PartialEq + Serialize>(
    class: &'static str,
    key: &'static str,
    value: &T,
    supported: &[T],
) -> Result<(), SchedulerError> {
    if supported.contains(value) {
        return Ok(());
    }
    let spell = |value: &T| json::bare(&serde_json::to_value(value).unwrap_or_default());
    let names: Vec<String> = supported.iter().map(spell).collect();
    Err(SchedulerError::Value {
        class,
        key,
        value: spell(value),
        expected: format!("expected {}", list_names(&names)),
    })
}

/// An error for an option whose number is out of range.
pub(crate) fn require_range<T: PartialOrd + ToString>(
    class: &'static str,
    key: &'static str,
    value: T,
    range: std::ops::RangeInclusive<T>,
    expected: &str,
) -> Result<(), SchedulerError> {
    match range.contains(&value) {
        true => Ok(()),
        false => Err(SchedulerError::Value {
            class,
            key,
            value: value.to_string(),
            expected: format!("expected {expected}"),
        }),
    }
}

/// Lists keys or names for an error: `` `a`, `b` ``.
pub(crate) fn list_names<T: AsRef<str>>(names: &[T]) -> String {
    let quoted = names.iter().map(|name| format!("`{}`", name.as_ref()));
    quoted.collect::<Vec<_>>().join(", ")
}
