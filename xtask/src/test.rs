//! `cargo xtask test`: all tests, in the release profile, so that nothing is built twice.

use anyhow::Result;

use crate::{cargo, features};

pub fn run(arguments: &[String]) -> Result<()> {
    crate::run(
        cargo()
            .args(["test", "--workspace", "--release"])
            .args(features())
            .args(arguments),
    )
}
