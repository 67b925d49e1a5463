//! `cargo xtask golden`: records the expected values of the tests with the Python scripts.

use std::process::Command;

use anyhow::{Result, bail};

use crate::root;

/// The scripts in their order, and their output folders, relative to the workspace.
const SCRIPTS: [(&str, &str); 12] = [
    (
        "crates/diffuse-schedulers/tests/golden.py",
        "crates/diffuse-schedulers/tests/fixtures",
    ),
    (
        "xtask/golden/golden.py",
        "crates/diffuse-pipelines/tests/reference",
    ),
    (
        "xtask/golden/image_to_image.py",
        "crates/diffuse-pipelines/tests/reference",
    ),
    (
        "xtask/golden/denoising.py",
        "crates/diffuse-pipelines/tests/reference",
    ),
    (
        "xtask/golden/safety_checker.py",
        "crates/diffuse-pipelines/tests/reference",
    ),
    (
        "xtask/golden/autoencoders.py",
        "crates/diffuse-pipelines/tests/reference",
    ),
    (
        "xtask/golden/lora.py",
        "crates/diffuse-pipelines/tests/reference",
    ),
    (
        "xtask/golden/family.py",
        "crates/diffuse-pipelines/tests/reference",
    ),
    (
        "xtask/golden/single_file.py",
        "crates/diffuse-pipelines/tests/reference",
    ),
    (
        "xtask/golden/files.py",
        "crates/diffuse-pipelines/tests/reference",
    ),
    (
        "xtask/golden/prompts.py",
        "crates/diffuse-clip/tests/fixtures",
    ),
    (
        "xtask/golden/builtin.py",
        "crates/diffuse-cli/tests/builtin",
    ),
];

pub fn run(arguments: &[String]) -> Result<()> {
    let python = match arguments {
        [] => "python3",
        [flag, python] if flag == "--python" => python,
        _ => bail!("usage: cargo xtask golden [--python PYTHON]"),
    };
    for (script, output) in SCRIPTS {
        say!("{script}");
        crate::run(
            Command::new(python)
                .current_dir(root())
                .args([script, output]),
        )?;
    }
    Ok(())
}
