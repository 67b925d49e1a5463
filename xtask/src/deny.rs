//! The dependencies' licenses and, with `cargo deny`, their sources, bans and advisories, as
//! `xtask/deny.toml` says.

use std::fs;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use spdx::{Expression, ParseMode};

use crate::{cargo, output, root};

const CONFIG: &str = "xtask/deny.toml";

pub fn check() -> Result<()> {
    say!("licenses");
    check_licenses()?;
    if output(cargo().args(["deny", "--version"])).is_err() {
        say!("`cargo deny` is not installed: sources, bans and advisories are not checked");
        return Ok(());
    }
    let deny = || {
        let mut command = cargo();
        command.args(["deny", "--locked", "--config", CONFIG]);
        command
    };
    say!("licenses, sources and bans with `cargo deny`");
    crate::run(deny().args(["check", "licenses", "sources", "bans"]))?;
    if output(deny().args(["fetch", "db"])).is_err() {
        say!("the advisory database is out of reach: advisories are not checked");
        return Ok(());
    }
    say!("advisories with `cargo deny`");
    crate::run(deny().args(["check", "advisories"]))
}

/// Fails where a dependency's license is not in the configuration's list.
fn check_licenses() -> Result<()> {
    let config = fs::read_to_string(root().join(CONFIG))?;
    let config: toml::Table = config.parse()?;
    let allowed = config["licenses"]["allow"].as_array();
    let allowed = allowed.context("the list of licenses is missing")?;
    let allowed: Vec<&str> = allowed.iter().filter_map(toml::Value::as_str).collect();
    let metadata = output(cargo().args(["metadata", "--format-version=1", "--all-features"]))?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let packages = metadata["packages"].as_array();
    for package in packages.context("`cargo metadata` lists no packages")? {
        let name = package["name"].as_str().context("a package has no name")?;
        let Some(license) = package["license"].as_str() else {
            bail!("`{name}` names no license");
        };
        let expression = Expression::parse_mode(license, ParseMode::LAX)
            .with_context(|| format!("the license of `{name}`"))?;
        if !expression.evaluate(|it| allowed.contains(&it.to_string().as_str())) {
            bail!("the license of `{name}`, {license}, is not allowed in `{CONFIG}`");
        }
    }
    Ok(())
}
