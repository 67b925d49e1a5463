//! `cargo xtask fetch`: checkpoints from the hub.
//!
//! It is the program's own `diffuse fetch`, built first: so that xtask itself needs neither TLS nor burn.

use anyhow::{Context, Result};

use crate::{cargo, root};

pub fn run(arguments: &[String]) -> Result<()> {
    // From where the person is: `--into` may be relative.
    let here = std::env::current_dir().context("cannot tell the current folder")?;
    crate::run(
        cargo()
            .current_dir(here)
            .args(["run", "--quiet", "--release", "--package", "diffuse-cli"])
            .arg("--manifest-path")
            .arg(root().join("Cargo.toml"))
            .args(["--", "fetch"])
            .args(arguments),
    )
}
