//! Values recorded from Diffusers, and comparisons with them.
//!
//! The values are in `crates/diffuse-pipelines/tests/reference`; `cargo xtask golden` records them.
//! The environment variable `DIFFUSE_REFERENCE` names another folder of the same layout.

pub mod hub;
#[cfg(feature = "values")]
mod values;

#[cfg(feature = "values")]
pub use values::{Values, assert_close, assert_stage, read_json};

use std::path::{Path, PathBuf};

/// Whether `DIFFUSE_REFERENCE` names another set, which may have other cases.
pub fn is_another_set() -> bool {
    std::env::var_os("DIFFUSE_REFERENCE").is_some()
}

/// The folder of recorded values.
pub fn reference() -> PathBuf {
    match std::env::var_os("DIFFUSE_REFERENCE") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../diffuse-pipelines/tests/reference"),
    }
}
