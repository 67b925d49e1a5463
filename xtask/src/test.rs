//! `cargo xtask test`: all tests, in the release profile, so that no dependency is built twice.

use std::fs;

use anyhow::{Context, Result};

use crate::{cargo, features, root};

/// The crate whose loops take the time of a run.
const OPTIMISED: &str = "diffuse-kernels";

pub fn run(arguments: &[String]) -> Result<()> {
    crate::run(
        cargo()
            .args(["test", "--workspace", "--release"])
            .args(unoptimised()?)
            .args(features())
            .args(arguments),
    )
}

/// The workspace's crates are not optimised: they are generic, so each test program compiles them
/// again, which would take longer than all tests run.
fn unoptimised() -> Result<Vec<String>> {
    let crates = root().join("crates");
    let mut names = vec!["diffuse-examples".to_string()];
    for entry in
        fs::read_dir(&crates).with_context(|| format!("cannot read `{}`", crates.display()))?
    {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| name != OPTIMISED);
    names.sort();
    let options = names
        .iter()
        .map(|name| format!("--config=profile.release.package.{name}.opt-level=0"));
    Ok(options.collect())
}
