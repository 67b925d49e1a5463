//! `cargo xtask convert`: hands over to `diffuse convert`.

use anyhow::Result;

use crate::{cargo, run};

pub fn convert(arguments: &[String]) -> Result<()> {
    run(cargo()
        .args([
            "run",
            "--quiet",
            "--release",
            "--package",
            "diffuse-cli",
            "--",
            "convert",
        ])
        .args(arguments))
}
