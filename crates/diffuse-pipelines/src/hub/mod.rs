//! Checkpoints by their names on the Hugging Face hub.
//!
//! `owner/name` is looked up in the cache that all programs for the hub share; what is not there is fetched into it. Only
//! the files that a pipeline needs are: `model_index.json` first, then each component's configuration, then one weights
//! file a component.
//!
//! ```no_run
//! use diffuse_pipelines::hub::{FetchOptions, resolve};
//!
//! let options = FetchOptions {
//!     variant: Some("fp16".into()),
//!     ..FetchOptions::from_env()
//! };
//! let folder = resolve("CompVis/stable-diffusion-v1-4", &options)?;
//! assert!(folder.join("model_index.json").is_file());
//! # Ok::<(), diffuse_pipelines::hub::HubError>(())
//! ```
//!
//! `hf-hub` gives the client, the addresses and the cache's layout. Transfers are our own: they continue where an earlier
//! one broke off, are compared with the hub's checksum, and get their name in the cache only after that.

mod cache;
mod client;
mod error;
mod files;
mod options;
mod transfer;

pub use error::HubError;
pub use options::FetchOptions;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::{MODEL_INDEX_NAME, ModelIndex, PipelineKind};
use cache::RepoCache;
use client::{Client, Remote};
use files::{Listing, Needed, needed};

/// A repository's files in the cache.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The folder to load from.
    pub folder: PathBuf,
    /// The commit that the files are of: a revision that will never be another one.
    pub commit: String,
    /// The files that the pipeline needs, by their paths in the folder; others may be there as well.
    pub files: Vec<String>,
}

/// How far a fetch has come.
#[derive(Debug, Clone, Copy)]
pub struct FetchEvent<'a> {
    /// The file on its way.
    pub file: &'a str,
    /// How many of its bytes are here.
    pub file_done: u64,
    /// How many it has.
    pub file_size: u64,
    /// How many bytes of all files are here.
    pub done: u64,
    /// How many all files have.
    pub size: u64,
}

/// The `owner/name` in a path that is not there; `None` if it is there, or cannot be the name of a repository.
pub fn as_hub_id(path: &Path) -> Option<&str> {
    let id = path.to_str().filter(|id| is_hub_id(id))?;
    (!path.exists()).then_some(id)
}

/// Whether a text has the form `owner/name`.
pub fn is_hub_id(text: &str) -> bool {
    let is_name = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    match text.split_once('/') {
        // The longest that the hub gives; a folder of the cache has to have such a name.
        Some((owner, name)) => is_name(owner) && is_name(name) && text.len() <= 193,
        None => false,
    }
}

/// The folder of a checkpoint: what exists is itself, `owner/name` is the repository's snapshot in the cache, fetched if
/// need be.
///
/// # Errors
/// If it is neither, or cannot be fetched.
pub fn resolve(id_or_path: impl AsRef<Path>, options: &FetchOptions) -> Result<PathBuf, HubError> {
    let path = id_or_path.as_ref();
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    match as_hub_id(path) {
        Some(id) => Ok(fetch(id, options, |_| ControlFlow::Continue(()))?.folder),
        None => Err(HubError::NotAnId(path.display().to_string())),
    }
}

/// A repository's snapshot, with a callback that hears of each piece that arrives and may stop the fetch.
///
/// Where the cache has all the files, the hub is not asked, unless [`FetchOptions::update`] says so.
///
/// # Errors
/// If a file is neither in the cache nor can be fetched. What has arrived until then is kept for the next time.
pub fn fetch(
    id: &str,
    options: &FetchOptions,
    mut on_event: impl FnMut(FetchEvent<'_>) -> ControlFlow<()>,
) -> Result<Snapshot, HubError> {
    if !is_hub_id(id) {
        return Err(HubError::NotAnId(id.to_string()));
    }
    let revision = options.checked_revision()?;
    let cache = RepoCache::new(options.cache_folder()?, id);
    let cached = cached(&cache, revision, options);
    match &cached {
        Some(cached) if cached.whole && !options.update => return Ok(cached.snapshot.clone()),
        _ => {}
    }
    let fetched = if options.offline {
        Err(HubError::Offline {
            id: id.to_string(),
            revision: revision.to_string(),
            cache: cache.folder(),
        })
    } else {
        let client = Client::new(id, revision, options)?;
        fetch_from(&client, &cache, options, &mut on_event)
    };
    match (fetched, cached) {
        // Without the hub, what the cache has will do.
        (Err(HubError::Offline { .. } | HubError::Unreachable { .. }), Some(cached)) => {
            Ok(cached.snapshot)
        }
        (fetched, _) => fetched,
    }
}

struct Cached {
    snapshot: Snapshot,
    /// Whether the repository has no further files that would be needed.
    whole: bool,
}

/// What the cache has, if that is enough to load the pipeline.
fn cached(cache: &RepoCache, revision: &str, options: &FetchOptions) -> Option<Cached> {
    let commit = cache.commit(revision)?;
    let folder = cache.snapshot(&commit);
    let index = ModelIndex::read(&folder).ok()?;
    let kind = options.pipeline.or_else(|| PipelineKind::of(&index))?;
    let needed = needed(kind, options.variant.as_deref(), &cache.listing(&commit)).ok()?;
    let whole = |file: &String| cache.is_absent(&commit, file);
    Some(Cached {
        whole: needed.absent.iter().all(whole),
        snapshot: Snapshot {
            folder,
            commit,
            files: needed.files,
        },
    })
}

fn fetch_from(
    client: &Client,
    cache: &RepoCache,
    options: &FetchOptions,
    on_event: &mut dyn FnMut(FetchEvent<'_>) -> ControlFlow<()>,
) -> Result<Snapshot, HubError> {
    let (commit, files) = client.listing()?;
    let listing = Listing::new(files);

    // The index decides about the rest, and is small.
    if !listing.has(MODEL_INDEX_NAME) {
        return Err(HubError::NoFile {
            id: client.id().to_string(),
            revision: client.revision().to_string(),
            file: MODEL_INDEX_NAME.to_string(),
            hint: String::new(),
        });
    }
    let index = client.remote(&commit, MODEL_INDEX_NAME)?;
    fetch_files(client, cache, options, &[index], on_event)?;
    let folder = cache.snapshot(&commit);
    let index = ModelIndex::read(&folder)?;
    let kind = options.pipeline.or_else(|| PipelineKind::of(&index));
    let kind = kind.ok_or_else(|| HubError::Unsupported {
        id: client.id().to_string(),
        class: index.class().unwrap_or("nameless pipeline").to_string(),
    })?;
    kind.check(&index)?;

    let needed = needed(kind, options.variant.as_deref(), &listing);
    let Needed { files, absent } = needed.map_err(|missing| HubError::NoFile {
        id: client.id().to_string(),
        revision: client.revision().to_string(),
        file: missing.file,
        hint: missing.hint,
    })?;
    let remotes: Result<Vec<Remote>, HubError> = files
        .iter()
        .filter(|file| *file != MODEL_INDEX_NAME)
        .map(|file| client.remote(&commit, file))
        .collect();
    fetch_files(client, cache, options, &remotes?, on_event)?;
    for file in &absent {
        cache.set_absent(&commit, file)?;
    }
    // Last, so that the revision's name means a snapshot that is whole.
    cache.set_commit(client.revision(), &commit)?;
    Ok(Snapshot {
        folder,
        commit,
        files,
    })
}

/// Fetches files that the cache does not have.
fn fetch_files(
    client: &Client,
    cache: &RepoCache,
    options: &FetchOptions,
    remotes: &[Remote],
    on_event: &mut dyn FnMut(FetchEvent<'_>) -> ControlFlow<()>,
) -> Result<(), HubError> {
    let size = remotes.iter().map(|remote| remote.size).sum();
    let mut before = 0;
    for remote in remotes {
        let mut on_bytes = |file_done| {
            on_event(FetchEvent {
                file: &remote.file,
                file_done,
                file_size: remote.size,
                done: before + file_done,
                size,
            })
        };
        if !cache.has_blob(&remote.etag) {
            let _lock = cache.lock(remote, &mut on_bytes)?;
            // Another program may have fetched it while we waited.
            if !cache.has_blob(&remote.etag) {
                let incomplete = cache.incomplete(&remote.etag);
                transfer::transfer(client, remote, &incomplete, options.retries, &mut on_bytes)?;
                cache.complete(&remote.etag)?;
            }
        }
        cache.link(remote)?;
        if on_bytes(remote.size).is_break() {
            return Err(HubError::Stopped(remote.file.clone()));
        }
        before += remote.size;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_repositories() {
        for id in [
            "CompVis/stable-diffusion-v1-4",
            "google/ddpm-cat-256",
            "a/b.c_d",
        ] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in [
            "", "a", "/a", "a/", "a/b/c", "./a", "../a", "a/..", "a/.b", "a b/c", "a\\b/c",
            "a/b:c", "~/a", "-a/b",
        ] {
            assert!(!is_hub_id(path), "{path}");
        }
        assert!(!is_hub_id(&format!("a/{}", "b".repeat(200))));
    }

    #[test]
    fn what_exists_is_no_repository() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(
            resolve(folder.path(), &FetchOptions::default()).unwrap(),
            folder.path()
        );
        let error = resolve("no/such/folder", &FetchOptions::default()).unwrap_err();
        assert!(matches!(error, HubError::NotAnId(_)), "{error}");
    }
}
