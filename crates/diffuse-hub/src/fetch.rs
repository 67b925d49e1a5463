//! Fetches files of a repository into the cache.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::cache::RepoCache;
use crate::client::{Client, Remote};
use crate::{FetchOptions, HubError, Refusal, Selection, Wanted, as_hub_id, is_hub_id, transfer};

/// A repository's files in the cache.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The folder to load from.
    pub folder: PathBuf,
    /// The commit of the files. As a revision, it always means the same files.
    pub commit: String,
    /// The wanted files, as paths in the folder; the folder may have others as well.
    pub files: Vec<String>,
}

/// The progress of a fetch.
#[derive(Debug, Clone, Copy)]
pub struct FetchEvent<'a> {
    /// The current file.
    pub file: &'a str,
    /// Received bytes of the file.
    pub file_done: u64,
    /// Size of the file in bytes.
    pub file_size: u64,
    /// Received bytes of all files.
    pub done: u64,
    /// Size of all files in bytes.
    pub size: u64,
}

/// The folder of a checkpoint. A path that exists is returned unchanged; for `owner/name` it is the
/// snapshot in the cache, after missing files are fetched.
///
/// # Errors
/// If it is neither, or cannot be fetched.
pub fn resolve(
    id_or_path: impl AsRef<Path>,
    wanted: &(impl Wanted + ?Sized),
    options: &FetchOptions,
) -> Result<PathBuf, HubError> {
    let path = id_or_path.as_ref();
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    match as_hub_id(path) {
        Some(id) => Ok(fetch(id, wanted, options, |_| ControlFlow::Continue(()))?.folder),
        None => Err(HubError::NotAnId(path.display().to_string())),
    }
}

/// The snapshot of a repository. The callback is called for each received chunk, and may stop the
/// fetch.
///
/// If the cache has all wanted files, no request is made, unless [`FetchOptions::update`] is set.
///
/// # Errors
/// If a file is not in the cache and cannot be fetched. Received bytes are kept for the next time.
pub fn fetch(
    id: &str,
    wanted: &(impl Wanted + ?Sized),
    options: &FetchOptions,
    mut on_event: impl FnMut(FetchEvent<'_>) -> ControlFlow<()>,
) -> Result<Snapshot, HubError> {
    if !is_hub_id(id) {
        return Err(HubError::NotAnId(id.to_string()));
    }
    let revision = options.checked_revision()?;
    let cache = RepoCache::new(options.cache_folder()?, id);
    let cached = cached(&cache, wanted, revision);
    if let Some(Ok(cached)) = &cached
        && cached.whole
        && !options.update
    {
        return Ok(cached.snapshot.clone());
    }
    if options.offline {
        let (id, revision) = (id.to_string(), revision.to_string());
        return match cached {
            Some(Ok(cached)) => Ok(cached.snapshot),
            Some(Err(Refusal::Missing { file, hint })) => Err(HubError::NotCached {
                id,
                revision,
                file,
                hint,
                cache: cache.folder(),
            }),
            Some(Err(Refusal::Unfit(source))) => Err(HubError::Unfit { id, source }),
            None => Err(HubError::Offline {
                id,
                revision,
                cache: cache.folder(),
            }),
        };
    }
    let client = Client::new(id, revision, options)?;
    match (
        fetch_from(&client, &cache, wanted, options, &mut on_event),
        cached,
    ) {
        // The cache's files are better than none.
        (Err(HubError::Unreachable { .. }), Some(Ok(cached))) => Ok(cached.snapshot),
        (fetched, _) => fetched,
    }
}

/// A snapshot that has all wanted files.
struct Cached {
    snapshot: Snapshot,
    /// Whether the cache has recorded that the repository lacks the absent files.
    whole: bool,
}

/// The cached files of a revision; `None` if there are none.
fn cached(
    cache: &RepoCache,
    wanted: &(impl Wanted + ?Sized),
    revision: &str,
) -> Option<Result<Cached, Refusal>> {
    let commit = cache.commit(revision)?;
    let folder = cache.snapshot(&commit);
    let listing = cache.listing(&commit);
    let selected = match wanted.first().filter(|first| !listing.has(first)) {
        Some(first) => Err(Refusal::missing(first)),
        None => wanted.select(&folder, &listing),
    };
    Some(selected.map(|Selection { files, absent }| Cached {
        whole: absent.iter().all(|file| cache.is_absent(&commit, file)),
        snapshot: Snapshot {
            folder,
            commit,
            files,
        },
    }))
}

fn fetch_from(
    client: &Client,
    cache: &RepoCache,
    wanted: &(impl Wanted + ?Sized),
    options: &FetchOptions,
    on_event: &mut dyn FnMut(FetchEvent<'_>) -> ControlFlow<()>,
) -> Result<Snapshot, HubError> {
    let (commit, files) = client.listing()?;
    let listing = files.into_iter().collect();
    let folder = cache.snapshot(&commit);
    let refused = |refusal| match refusal {
        Refusal::Missing { file, hint } => HubError::NoFile {
            id: client.id().to_string(),
            revision: client.revision().to_string(),
            file,
            hint,
        },
        Refusal::Unfit(source) => HubError::Unfit {
            id: client.id().to_string(),
            source,
        },
    };

    let first = wanted.first();
    if let Some(first) = first {
        [first].select(&folder, &listing).map_err(refused)?;
        let remote = client.remote(&commit, first)?;
        fetch_files(client, cache, options, &[remote], on_event)?;
    }
    let Selection { files, absent } = wanted.select(&folder, &listing).map_err(refused)?;
    let remotes: Result<Vec<Remote>, HubError> = files
        .iter()
        .filter(|file| Some(file.as_str()) != first)
        .map(|file| client.remote(&commit, file))
        .collect();
    fetch_files(client, cache, options, &remotes?, on_event)?;
    for file in &absent {
        cache.set_absent(&commit, file)?;
    }
    // Last, so that the revision always refers to a complete snapshot.
    cache.set_commit(client.revision(), &commit)?;
    Ok(Snapshot {
        folder,
        commit,
        files,
    })
}

/// Fetches the files that the cache lacks.
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
            // Another program may have fetched it meanwhile.
            if !cache.has_blob(&remote.etag) {
                let incomplete = cache.incomplete(&remote.etag);
                transfer::transfer(client, remote, &incomplete, options.retries, &mut on_bytes)?;
                cache.complete(&remote.etag)?;
            }
        }
        cache.link(remote, options.no_links)?;
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
    fn what_exists_is_no_repository() {
        let folder = tempfile::tempdir().unwrap();
        let resolve = |path: &Path| resolve(path, ["a"].as_slice(), &FetchOptions::default());
        assert_eq!(resolve(folder.path()).unwrap(), folder.path());
        let error = resolve(Path::new("no/such/folder")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`no/such/folder` is neither a folder nor the name of a repository (`owner/name`)"
        );
    }
}
