//! `cargo xtask check`: formatting, lints, documentation, dependencies, packages.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, bail};

use crate::{cargo, features, no_arguments, output};

/// What each library crate must not depend on, by any path. `docs/architecture.md` says why.
const FORBIDDEN: [(&str, &[&str]); 11] = [
    ("diffuse-builtin-unet", &["burn", "diffuse-builtin"]),
    ("diffuse-builtin", &["burn", "diffuse-pipelines"]),
    (
        "diffuse-schedulers",
        &[
            "diffuse-nn",
            "diffuse-unet",
            "diffuse-vae",
            "diffuse-clip",
            "diffuse-pipelines",
            "burn-store",
            "safetensors",
            "tokenizers",
            "diffuse-hub",
            "image",
        ],
    ),
    (
        "diffuse-kernels",
        &[
            "diffuse-schedulers",
            "diffuse-nn",
            "diffuse-pipelines",
            "burn-store",
            "safetensors",
            "tokenizers",
            "diffuse-hub",
            "image",
        ],
    ),
    (
        "diffuse-nn",
        &[
            "diffuse-schedulers",
            "diffuse-unet",
            "diffuse-vae",
            "diffuse-clip",
            "diffuse-pipelines",
            "tokenizers",
            "diffuse-hub",
            "image",
        ],
    ),
    (
        "diffuse-unet",
        &[
            "diffuse-schedulers",
            "diffuse-vae",
            "diffuse-clip",
            "diffuse-pipelines",
            "tokenizers",
            "diffuse-hub",
            "image",
        ],
    ),
    (
        "diffuse-vae",
        &[
            "diffuse-schedulers",
            "diffuse-unet",
            "diffuse-clip",
            "diffuse-pipelines",
            "tokenizers",
            "diffuse-hub",
            "image",
        ],
    ),
    (
        "diffuse-clip",
        &[
            "diffuse-schedulers",
            "diffuse-unet",
            "diffuse-vae",
            "diffuse-pipelines",
            "diffuse-hub",
            "image",
        ],
    ),
    (
        "diffuse-hub",
        &[
            "burn",
            "diffuse-schedulers",
            "diffuse-nn",
            "diffuse-pipelines",
            "image",
            "safetensors",
            "tokenizers",
            // `hf-hub` 1.0 and its asynchronous runtime.
            "tokio",
        ],
    ),
    (
        "diffuse-pipelines",
        &[
            "clap",
            "anyhow",
            "indicatif",
            "burn-flex",
            "burn-wgpu",
            "burn-cuda",
            // Only with the feature `hub`, which is off by default.
            "diffuse-hub",
        ],
    ),
    (
        "diffuse-serve",
        &[
            "clap",
            "anyhow",
            "burn-flex",
            "burn-wgpu",
            "burn-cuda",
            "diffuse-builtin",
            "diffuse-hub",
        ],
    ),
];

/// What is checked: everything and, since the program switches the feature `hub` on for all, and
/// it, training and the examples `flex`, the libraries without them.
const SELECTIONS: [&[&str]; 2] = [
    &["--workspace"],
    &[
        "--workspace",
        "--exclude",
        "diffuse-cli",
        "--exclude",
        "diffuse-training",
        "--exclude",
        "diffuse-examples",
    ],
];

pub fn run(arguments: &[String]) -> Result<()> {
    no_arguments(arguments)?;
    say!("formatting");
    crate::run(cargo().args(["fmt", "--all", "--check"]))?;
    for selection in SELECTIONS {
        say!("lints: {}", selection.join(" "));
        crate::run(
            cargo()
                .arg("clippy")
                .args(selection)
                .args(["--all-targets", "--release", "--quiet"])
                .args(features())
                .args(["--", "-D", "warnings"]),
        )?;
        say!("documentation: {}", selection.join(" "));
        crate::run(
            cargo()
                .arg("doc")
                .args(selection)
                .args(["--no-deps", "--release", "--quiet"])
                .env("RUSTDOCFLAGS", "-D warnings"),
        )?;
    }
    say!("the page for browsers");
    crate::web::check()?;
    say!("dependency arrows");
    for (package, forbidden) in FORBIDDEN {
        check_arrows(package, forbidden)?;
    }
    crate::deny::check()?;
    say!("packages");
    check_packages()
}

/// Packs the libraries and the program as for publishing, in the order of their dependencies, which
/// cargo finds. That fails where metadata or a file is missing, or a dependency has no version.
fn check_packages() -> Result<()> {
    // The registry's limit.
    const MAX_BYTES: u64 = 10 << 20;
    let packages = || {
        let libraries = FORBIDDEN.iter().map(|(package, _)| *package);
        libraries.chain(["diffuse-cli"])
    };
    for package in packages() {
        check_files(package)?;
    }
    crate::run(
        cargo()
            .args(["package", "--quiet", "--no-verify", "--allow-dirty"])
            .args(packages().flat_map(|package| ["--package", package])),
    )?;
    for package in packages() {
        let version = env!("CARGO_PKG_VERSION");
        let path = crate::target().join(format!("package/{package}-{version}.crate"));
        let size = fs::metadata(&path)
            .with_context(|| format!("`cargo package` made no `{}`", path.display()))?
            .len();
        if size > MAX_BYTES {
            bail!("the package of `{package}` has {size} bytes, more than {MAX_BYTES}");
        }
    }
    Ok(())
}

/// Fails where a package lacks its licenses or the text of its page, or has recorded values in it.
fn check_files(package: &str) -> Result<()> {
    let list = output(cargo().args(["package", "--list", "--allow-dirty", "--package", package]))?;
    let files: BTreeSet<&str> = list.lines().collect();
    for name in ["LICENSE-APACHE", "LICENSE-MIT", "README.md"] {
        if !files.contains(name) {
            bail!("the package of `{package}` has no `{name}`");
        }
    }
    if let Some(test) = files.iter().find(|name| name.starts_with("tests/")) {
        bail!("the package of `{package}` has `{test}`: exclude `/tests`");
    }
    Ok(())
}

fn check_arrows(package: &str, forbidden: &[&str]) -> Result<()> {
    let dependencies = dependencies(package)?;
    let found: Vec<&&str> = forbidden
        .iter()
        .filter(|name| dependencies.contains(**name))
        .collect();
    if !found.is_empty() {
        bail!(
            "`{package}` must not depend on {found:?}: see \
             `cargo tree -p {package} -e normal --no-default-features`"
        );
    }
    Ok(())
}

/// Names of all packages that a package needs at run time without its default features, which
/// choose kernels for a backend.
fn dependencies(package: &str) -> Result<BTreeSet<String>> {
    let lines = output(
        cargo()
            .args(["tree", "--package", package, "--edges", "normal"])
            .args([
                "--no-default-features",
                "--prefix",
                "none",
                "--format",
                "{p}",
            ]),
    )?;
    let names: BTreeSet<String> = lines
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(String::from)
        .collect();
    if !names.contains(package) {
        bail!("`cargo tree` does not list `{package}` itself");
    }
    Ok(names)
}
