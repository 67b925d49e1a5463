use std::error::Error;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a repository's files could not be fetched.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HubError {
    /// Neither a folder nor `owner/name`.
    #[error("`{0}` is neither a folder nor the name of a repository (`owner/name`)")]
    NotAnId(String),
    /// The revision's name is not valid.
    #[error("`{0}` is not a valid revision: give a branch, a tag or a commit")]
    BadRevision(String),
    /// The folder of the cache is unknown.
    #[error("the home folder is unknown: set `HF_HOME` to the folder of the cache")]
    NoCache,
    /// Offline, and the cache does not have the revision.
    #[error(
        "`{id}` (revision `{revision}`) is not in the cache `{}`, and the program works offline: \
         unset `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` to fetch it", cache.display()
    )]
    Offline {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
        /// The repository's folder in the cache.
        cache: PathBuf,
    },
    /// Offline, and the cache does not have all files of the revision.
    #[error(
        "`{file}` of `{id}` (revision `{revision}`) is not in the cache `{}`{hint}, and the \
         program works offline: unset `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` to fetch \
         it", cache.display()
    )]
    NotCached {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
        /// The file.
        file: String,
        /// The available files; may be empty.
        hint: String,
        /// The repository's folder in the cache.
        cache: PathBuf,
    },
    /// No connection.
    #[error(
        "cannot reach the hub at `{endpoint}`: check the connection, `HTTPS_PROXY` and \
         `HF_ENDPOINT`; to work without it, fetch the model elsewhere and copy its folder here"
    )]
    Unreachable {
        /// The URL of the hub.
        endpoint: String,
        /// The error of the network.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The hub denies access: the repository is private, or does not exist.
    #[error(
        "the hub denies access to `{id}`: check the name and, if the repository is private, set \
         `HF_TOKEN` to a token that can read it"
    )]
    Unauthorized {
        /// The repository.
        id: String,
    },
    /// The repository is gated: its licence has to be accepted.
    #[error(
        "`{id}` requires that you accept its licence: do so at {page}, then set `HF_TOKEN` to your \
         token"
    )]
    Gated {
        /// The repository.
        id: String,
        /// The URL of its page.
        page: String,
    },
    /// The repository does not exist.
    #[error(
        "there is no repository `{id}` on the hub: check the name; a private one needs a token in \
         `HF_TOKEN`"
    )]
    NoRepository {
        /// The repository.
        id: String,
    },
    /// The revision does not exist.
    #[error("`{id}` has no revision `{revision}`: give a branch, a tag or a commit")]
    NoRevision {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
    },
    /// The file does not exist.
    #[error("`{id}` has no file `{file}` in revision `{revision}`{hint}")]
    NoFile {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
        /// The file.
        file: String,
        /// The available files; may be empty.
        hint: String,
    },
    /// The repository is of another kind, or its first file is damaged.
    #[error("`{id}` cannot be used, and nothing more of it was fetched")]
    Unfit {
        /// The repository.
        id: String,
        /// The cause.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The hub is overloaded or down.
    #[error("the hub returned {status} for `{url}`: try again later")]
    Busy {
        /// The HTTP status.
        status: u16,
        /// The requested URL.
        url: String,
    },
    /// The response is not the hub's, but that of a proxy, for example.
    #[error("the response for `{url}` is not the hub's: {message}")]
    Protocol {
        /// The requested URL.
        url: String,
        /// The cause.
        message: String,
    },
    /// A transfer was interrupted.
    #[error(
        "the transfer of `{file}` was interrupted at {done} of {size} bytes: run again to continue"
    )]
    Interrupted {
        /// The file.
        file: String,
        /// Received bytes.
        done: u64,
        /// Size in bytes.
        size: u64,
        /// The error of the network.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The callback stopped the fetch.
    #[error("stopped at `{0}`: the received bytes are kept")]
    Stopped(String),
    /// The checksum of the file differs from the hub's.
    #[error(
        "`{file}` was damaged in transfer and removed: its checksum is {found}, the hub's \
         {expected}; run again to fetch it"
    )]
    Checksum {
        /// The file.
        file: String,
        /// The hub's checksum.
        expected: String,
        /// The checksum of the received file.
        found: String,
    },
    /// The disk is full.
    #[error(
        "the disk is full, no room for `{}`: free some space, or move the cache with `HF_HOME`, and \
         run again; the received bytes are kept",
        path.display()
    )]
    DiskFull {
        /// The file in the cache.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The cache cannot be written.
    #[error("cannot write `{}` in the cache", path.display())]
    Write {
        /// The file in the cache.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

impl HubError {
    /// The error for a file of the cache that could not be written.
    pub(crate) fn writing(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path, source }
            }
            _ => Self::Write { path, source },
        }
    }
}
