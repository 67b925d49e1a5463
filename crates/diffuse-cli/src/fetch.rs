//! `diffuse fetch`.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, bail};
use diffuse_pipelines::hub::{Snapshot, is_hub_id};

use crate::args::Fetch;
use crate::model::Wanted;
use crate::output::say;

/// Short names, with the repositories they mean. The first home of Stable Diffusion 1.5
/// (`runwayml`) is gone; the third is a copy of it by others.
const ALIASES: [(&str, &str); 3] = [
    ("ddpm-cat-256", "google/ddpm-cat-256"),
    ("sd-v1-4", "CompVis/stable-diffusion-v1-4"),
    ("sd-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
];

pub fn run(args: &Fetch) -> Result<()> {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == args.model);
    let id = alias.map_or(args.model.as_str(), |(_, id)| id);
    if !is_hub_id(id) && Path::new(id).exists() {
        bail!("`{id}` is on this machine: there is nothing to fetch");
    }
    if let Some(into) = &args.into {
        check_free(into)?;
    }
    let wanted = Wanted {
        model: Path::new(id),
        revision: args.revision.as_deref(),
        variant: args.variant.as_deref(),
        pipeline: None,
        no_safety_checker: args.no_safety_checker,
        quiet: args.quiet,
    };
    let snapshot = wanted.fetch(id, true)?;
    let folder = match &args.into {
        Some(into) => {
            copy(&snapshot, into).with_context(|| format!("cannot make `{}`", into.display()))?;
            into
        }
        None => &snapshot.folder,
    };
    if !args.quiet {
        say(format_args!("commit {}", snapshot.commit));
        say(folder.display());
    }
    Ok(())
}

/// Checks that a folder is not there, or empty, before anything is fetched for it.
fn check_free(folder: &Path) -> Result<()> {
    match fs::read_dir(folder) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => bail!("`{}` is not empty", folder.display()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot make `{}`", folder.display())),
    }
}

/// Copies a snapshot into a plain folder: under a temporary name first, so that the folder is never
/// half there.
fn copy(snapshot: &Snapshot, into: &Path) -> io::Result<()> {
    let mut name = into
        .file_name()
        .ok_or(io::ErrorKind::InvalidInput)?
        .to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let temporary = into.with_file_name(name);
    let copied = snapshot
        .files
        .iter()
        .try_for_each(|file| copy_file(&snapshot.folder.join(file), &temporary.join(file)))
        .and_then(|()| fs::rename(&temporary, into));
    if copied.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    copied
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    // Never a link, by which editing the folder would edit the cache of all programs.
    fs::copy(from, to).map(drop)
}
