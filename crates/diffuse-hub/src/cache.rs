//! The cache of Python's `huggingface_hub`, shared with other programs.
//!
//! ```text
//! models--owner--name/refs/main                      the commit of a revision
//! models--owner--name/snapshots/COMMIT/unet/...      links to blobs
//! models--owner--name/blobs/ETAG                     contents, complete and checked
//! models--owner--name/blobs/ETAG.incomplete          incomplete contents
//! models--owner--name/.no_exist/COMMIT/FILE          files that a commit is known not to have
//! .locks/models--owner--name/ETAG.lock               held while a blob is being fetched
//! ```

use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo};

use crate::client::Remote;
use crate::{HubError, Listing};

/// The interval between attempts to take a lock that another program holds.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// The folder of a repository in the cache.
pub struct RepoCache {
    root: PathBuf,
    folder_name: String,
    paths: CacheRepo,
}

impl RepoCache {
    pub fn new(root: PathBuf, id: &str) -> Self {
        let repo = Repo::model(id.to_string());
        Self {
            folder_name: repo.folder_name(),
            paths: Cache::new(root.clone()).repo(repo),
            root,
        }
    }

    pub fn folder(&self) -> PathBuf {
        self.root.join(&self.folder_name)
    }

    /// The commit of a revision, if it is in the cache.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if self.snapshot(revision).is_dir() {
            return Some(revision.to_string());
        }
        let text = fs::read_to_string(self.folder().join("refs").join(revision)).ok()?;
        let commit = text.trim();
        is_file_name(commit).then(|| commit.to_string())
    }

    /// Records the commit of a revision.
    pub fn set_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder().join("refs").join(revision);
        make_folder_of(&path)
            .and_then(|()| replace(&path, |path| fs::write(path, commit)))
            .map_err(HubError::writing(&path))
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.paths.pointer_path(commit)
    }

    /// The cached files of a commit.
    pub fn listing(&self, commit: &str) -> Listing {
        let mut files = Vec::new();
        list(&self.snapshot(commit), "", &mut files);
        files.into_iter().collect()
    }

    /// Whether the cache has recorded that a commit lacks a file.
    pub fn is_absent(&self, commit: &str, file: &str) -> bool {
        self.absent(commit, file).is_file()
    }

    /// Records that a commit lacks a file.
    pub fn set_absent(&self, commit: &str, file: &str) -> Result<(), HubError> {
        let path = self.absent(commit, file);
        make_folder_of(&path)
            .and_then(|()| fs::write(&path, ""))
            .map_err(HubError::writing(&path))
    }

    fn absent(&self, commit: &str, file: &str) -> PathBuf {
        self.folder().join(".no_exist").join(commit).join(file)
    }

    pub fn has_blob(&self, etag: &str) -> bool {
        self.paths.blob_path(etag).is_file()
    }

    /// The path of an incomplete blob.
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.paths.blob_path(&format!("{etag}.incomplete"))
    }

    /// Renames a complete and checked file to its final name.
    pub fn complete(&self, etag: &str) -> Result<(), HubError> {
        let blob = self.paths.blob_path(etag);
        fs::rename(self.incomplete(etag), &blob).map_err(HubError::writing(&blob))
    }

    /// Adds a blob to the snapshot of its commit, as a link or a copy.
    pub fn link(&self, remote: &Remote, no_links: bool) -> Result<(), HubError> {
        let path = self.snapshot(&remote.commit).join(&remote.file);
        if path.is_file() {
            return Ok(());
        }
        let blob = self.paths.blob_path(&remote.etag);
        make_folder_of(&path)
            .and_then(|()| match no_links {
                true => copy(&blob, &path),
                false => link(&blob, &path),
            })
            .map_err(HubError::writing(&path))
    }

    /// Waits until no other program fetches this blob, and locks it until the lock is dropped.
    pub fn lock(
        &self,
        remote: &Remote,
        on_wait: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<File, HubError> {
        let name = format!("{}.lock", remote.etag);
        let path = self.root.join(".locks").join(&self.folder_name).join(name);
        let file = make_folder_of(&path)
            .and_then(|()| File::create(&path))
            .map_err(HubError::writing(&path))?;
        loop {
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => thread::sleep(LOCK_INTERVAL),
                // A file system without locks: only one program at a time may use the cache.
                Ok(()) | Err(TryLockError::Error(_)) => return Ok(file),
            }
            let arrived = fs::metadata(self.incomplete(&remote.etag)).map_or(0, |meta| meta.len());
            if on_wait(arrived.min(remote.size)).is_break() {
                return Err(HubError::Stopped(remote.file.clone()));
            }
        }
    }
}

/// Adds the files below a folder. Broken links do not count.
fn list(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let name = format!("{prefix}{name}");
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(&entry.path(), &format!("{name}/"), files);
        } else if entry.path().is_file() {
            files.push(name);
        }
    }
}

/// Whether a commit or an etag is a valid file name.
pub fn is_file_name(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

fn make_folder_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// Writes a file under a temporary name and renames it. The process id alone does not make the name
/// unique, since several threads may write at once.
fn replace(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".{}-{count}.part", std::process::id()));
    let temporary = path.with_file_name(name);
    write(&temporary)
        .and_then(|()| fs::rename(&temporary, path))
        .inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })
}

/// Links a blob, or copies it if links are not supported. Another program may do the same at once.
fn link(blob: &Path, path: &Path) -> io::Result<()> {
    // `path` is `snapshots/COMMIT/...`, and blobs are beside `snapshots`.
    let folders = path
        .ancestors()
        .skip(1)
        .take_while(|folder| folder.file_name().is_some_and(|name| name != "snapshots"))
        .count();
    let mut target = PathBuf::new();
    target.extend(std::iter::repeat_n("..", folders + 1));
    target.push("blobs");
    target.push(blob.file_name().unwrap_or_default());
    symlink(&target, path)
        .or_else(|_| fs::hard_link(blob, path))
        .or_else(|_| match path.is_file() {
            true => Ok(()),
            false => copy(blob, path),
        })
}

fn copy(blob: &Path, path: &Path) -> io::Result<()> {
    replace(path, |temporary| fs::copy(blob, temporary).map(drop))
}

#[cfg(unix)]
use std::os::unix::fs::symlink;

#[cfg(windows)]
use std::os::windows::fs::symlink_file as symlink;

#[cfg(not(any(unix, windows)))]
fn symlink(_target: &Path, _path: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
