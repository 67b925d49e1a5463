//! Which revision to fetch, from where, and where to.

use std::env;
use std::path::PathBuf;

use crate::HubError;

/// The revision by default.
const DEFAULT_REVISION: &str = "main";

/// How to fetch a repository. A program uses [`from_env`](Self::from_env); the default reads no
/// environment variable.
#[derive(Clone)]
pub struct FetchOptions {
    /// A branch, a tag or a commit; `main` by default.
    pub revision: Option<String>,
    /// Ask the hub for the revision's commit even if the cache has all files.
    pub update: bool,
    /// Never ask the hub.
    pub offline: bool,
    /// The hub's address; its own by default.
    pub endpoint: Option<String>,
    /// Access token.
    pub token: Option<String>,
    /// The folder of the cache; `.cache/huggingface/hub` in the home folder by default.
    pub cache: Option<PathBuf>,
    /// Copy files into snapshots in place of linking them to the cache's blobs.
    pub no_links: bool,
    /// How many attempts in a row may fail, without a new byte, before the transfer is an error.
    pub retries: u32,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            revision: None,
            update: false,
            offline: false,
            endpoint: None,
            token: None,
            cache: None,
            no_links: false,
            retries: 4,
        }
    }
}

impl FetchOptions {
    pub(crate) fn cache_folder(&self) -> Result<PathBuf, HubError> {
        let own = || Some(env::home_dir()?.join(".cache/huggingface/hub"));
        self.cache.clone().or_else(own).ok_or(HubError::NoCache)
    }

    /// The revision, which becomes a part of addresses and of paths.
    pub(crate) fn checked_revision(&self) -> Result<&str, HubError> {
        let revision = self.revision.as_deref().unwrap_or(DEFAULT_REVISION);
        let is_name = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "._-+@=".contains(c))
        };
        if revision.len() <= 200 && revision.split('/').all(is_name) {
            Ok(revision)
        } else {
            Err(HubError::BadRevision(revision.to_string()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_that_leave_the_cache_are_refused() {
        let check = |revision: &str| {
            let options = FetchOptions {
                revision: Some(revision.into()),
                ..FetchOptions::default()
            };
            options.checked_revision().is_ok()
        };
        for revision in ["main", "fp16", "refs/pr/3", "v1.4", "0b1c2d"] {
            assert!(check(revision), "{revision}");
        }
        for revision in [
            "", "..", "a/../b", "/etc", "a b", "a?b", "a#b", "a%2fb", "a\\b",
        ] {
            assert!(!check(revision), "{revision}");
        }
    }
}
