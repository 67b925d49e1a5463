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
    #[error("`{0}` cannot be a revision: that is a branch, a tag or a commit")]
    BadRevision(String),
    /// There is no folder for the cache.
    #[error("there is no home folder to keep the cache in: say where with `HF_HOME`")]
    NoCache,
    /// The hub may not be asked, and the cache has nothing of the revision.
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
    /// The hub may not be asked, and the cache has a part of the revision only.
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
        /// What exists instead; may be empty.
        hint: String,
        /// The repository's folder in the cache.
        cache: PathBuf,
    },
    /// No connection.
    #[error(
        "cannot reach the hub at `{endpoint}`: check the connection, `HTTPS_PROXY` and \
         `HF_ENDPOINT`; to work without one, fetch the model elsewhere and copy its folder here"
    )]
    Unreachable {
        /// The hub's address.
        endpoint: String,
        /// The network's error.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The hub shows the repository only to those who may see it.
    #[error(
        "the hub does not let us see `{id}`: check the name and, if the repository is private, \
         give a token that may read it in `HF_TOKEN`"
    )]
    Unauthorized {
        /// The repository.
        id: String,
    },
    /// A licence has to be accepted.
    #[error(
        "`{id}` is only for those who accepted its licence: do so at {page}, then give your token \
         in `HF_TOKEN`"
    )]
    Gated {
        /// The repository.
        id: String,
        /// Its page.
        page: String,
    },
    /// There is no such repository.
    #[error(
        "there is no repository `{id}` on the hub: check the name; a private one needs a token in \
         `HF_TOKEN`"
    )]
    NoRepository {
        /// The repository.
        id: String,
    },
    /// There is no such revision.
    #[error("`{id}` has no revision `{revision}`: that is a branch, a tag or a commit of it")]
    NoRevision {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
    },
    /// There is no such file.
    #[error("`{id}` has no file `{file}` in revision `{revision}`{hint}")]
    NoFile {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
        /// The file.
        file: String,
        /// What exists instead; may be empty.
        hint: String,
    },
    /// The repository is not what is wanted, or its first file is damaged.
    #[error("`{id}` cannot be used, and nothing more of it was fetched")]
    Unfit {
        /// The repository.
        id: String,
        /// What is wrong with it.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The hub is overloaded or down.
    #[error("the hub answers {status} for `{url}`: try again later")]
    Busy {
        /// The HTTP status.
        status: u16,
        /// The requested address.
        url: String,
    },
    /// The response is not a hub's: a proxy's, for example.
    #[error("the answer for `{url}` is not the hub's: {message}")]
    Protocol {
        /// The requested address.
        url: String,
        /// What is wrong.
        message: String,
    },
    /// A transfer broke off.
    #[error(
        "the transfer of `{file}` broke off at {done} of {size} bytes: run again to continue from \
         there"
    )]
    Interrupted {
        /// The file.
        file: String,
        /// How many bytes have arrived.
        done: u64,
        /// How many it has.
        size: u64,
        /// The network's error.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The callback stopped the fetch.
    #[error("stopped at `{0}`: what has arrived is kept")]
    Stopped(String),
    /// The file's checksum is not the hub's.
    #[error(
        "`{file}` arrived damaged and was removed: its checksum is {found}, the hub's {expected}; \
         run again to fetch it anew"
    )]
    Checksum {
        /// The file.
        file: String,
        /// The hub's checksum.
        expected: String,
        /// The checksum of what arrived.
        found: String,
    },
    /// The disk is full.
    #[error(
        "no room for `{}`: make some, or move the cache with `HF_HOME`, and run again; what has \
         arrived is kept",
        path.display()
    )]
    DiskFull {
        /// The file in the cache.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The cache cannot be written.
    #[error("cannot write `{}` in the cache", path.display())]
    Write {
        /// The file in the cache.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

impl HubError {
    /// The error of a file of the cache that could not be written.
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
