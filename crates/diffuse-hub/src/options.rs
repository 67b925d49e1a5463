//! Options of a fetch.

use std::env;
use std::path::PathBuf;

use crate::HubError;

/// The default revision.
const DEFAULT_REVISION: &str = "main";

/// Options of a fetch. Programs use [`from_env`](Self::from_env); the default reads no environment
/// variable.
#[derive(Clone)]
pub struct FetchOptions {
    /// A branch, a tag or a commit; `main` by default.
    pub revision: Option<String>,
    /// Request the revision's commit even if the cache has all files.
    pub update: bool,
    /// Make no request.
    pub offline: bool,
    /// The URL of the hub; the official one by default.
    pub endpoint: Option<String>,
    /// Access token.
    pub token: Option<String>,
    /// The folder of the cache; `.cache/huggingface/hub` in the home folder by default.
    pub cache: Option<PathBuf>,
    /// Copy files into snapshots in place of symbolic links.
    pub no_links: bool,
    /// Number of failed attempts in a row, without a new byte, after which the transfer is an
    /// error.
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

    /// The revision, checked, since it becomes a part of URLs and paths.
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
