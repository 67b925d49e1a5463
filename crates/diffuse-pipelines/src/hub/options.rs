//! What to fetch, from where, to where; and what the environment says about that.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use super::HubError;
use crate::PipelineKind;

/// The revision that a repository's name alone means.
const DEFAULT_REVISION: &str = "main";

/// How to fetch a repository. [`from_env`](Self::from_env) is what a program wants; the default asks no environment.
#[derive(Clone)]
pub struct FetchOptions {
    /// A branch, a tag or a commit; `main` by default.
    pub revision: Option<String>,
    /// Which variant of the weights to take: `fp16` is `*.fp16.safetensors`.
    pub variant: Option<String>,
    /// The pipeline to fetch for; the one that the repository's index names by default.
    pub pipeline: Option<PipelineKind>,
    /// Ask the hub whether the revision has moved, also where the cache has all files.
    pub update: bool,
    /// Never ask the hub.
    pub offline: bool,
    /// The hub's address; its own by default.
    pub endpoint: Option<String>,
    /// What says to the hub who we are.
    pub token: Option<String>,
    /// The folder of the cache; `.cache/huggingface/hub` in the home folder by default.
    pub cache: Option<PathBuf>,
    /// How many times in a row a transfer may fail without a new byte before that is an error.
    pub retries: u32,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            revision: None,
            variant: None,
            pipeline: None,
            update: false,
            offline: false,
            endpoint: None,
            token: None,
            cache: None,
            retries: 4,
        }
    }
}

impl FetchOptions {
    /// The default, with what the environment says, as all programs for the hub read it: `HF_HUB_OFFLINE`,
    /// `HF_ENDPOINT`, `HF_TOKEN` (else the file at `HF_TOKEN_PATH` or in `HF_HOME`), `HF_HUB_CACHE`, `HF_HOME`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| env::var_os(name), env::home_dir())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Self {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
        let path = |name: &str| variable(name).map(PathBuf::from);

        let own = path("HF_HOME").or_else(|| {
            let caches = path("XDG_CACHE_HOME").or_else(|| Some(home?.join(".cache")))?;
            Some(caches.join("huggingface"))
        });
        let token_path = path("HF_TOKEN_PATH").or_else(|| Some(own.as_ref()?.join("token")));
        let token = text("HF_TOKEN").or_else(|| fs::read_to_string(token_path?).ok());
        let token = token.map(|token| token.trim().to_string());
        let offline = text("HF_HUB_OFFLINE").map(|value| value.to_uppercase());
        Self {
            offline: offline.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&&*value)),
            endpoint: text("HF_ENDPOINT").map(|url| url.trim_end_matches('/').to_string()),
            token: token.filter(|token| !token.is_empty()),
            cache: path("HF_HUB_CACHE").or_else(|| Some(own?.join("hub"))),
            ..Self::default()
        }
    }

    pub(super) fn cache_folder(&self) -> Result<PathBuf, HubError> {
        let own = || Some(env::home_dir()?.join(".cache/huggingface/hub"));
        self.cache.clone().or_else(own).ok_or(HubError::NoCache)
    }

    /// The revision, which becomes a part of addresses and of paths.
    pub(super) fn checked_revision(&self) -> Result<&str, HubError> {
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

    fn from(variables: &[(&str, &str)]) -> FetchOptions {
        let get = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        FetchOptions::from_variables(get, Some("/home/me".into()))
    }

    #[test]
    fn cache_folder() {
        let check = |variables: &[(&str, &str)], expected: &str| {
            assert_eq!(
                from(variables).cache,
                Some(expected.into()),
                "{variables:?}"
            );
        };
        check(&[], "/home/me/.cache/huggingface/hub");
        check(&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub");
        check(&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/h/hub");
        check(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")], "/c");
        check(&[("HF_HOME", "")], "/home/me/.cache/huggingface/hub");
    }

    #[test]
    fn token_is_the_variable_or_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        assert_eq!(from(&[("HF_HOME", home)]).token, None);
        fs::write(folder.path().join("token"), "from-file\n").unwrap();
        assert_eq!(
            from(&[("HF_HOME", home)]).token.as_deref(),
            Some("from-file")
        );
        let both = from(&[("HF_HOME", home), ("HF_TOKEN", " given ")]);
        assert_eq!(both.token.as_deref(), Some("given"));
        let other = folder.path().join("other");
        fs::write(&other, "other").unwrap();
        let elsewhere = from(&[
            ("HF_HOME", home),
            ("HF_TOKEN_PATH", other.to_str().unwrap()),
        ]);
        assert_eq!(elsewhere.token.as_deref(), Some("other"));
    }

    #[test]
    fn offline_and_endpoint() {
        for (value, offline) in [
            ("1", true),
            ("true", true),
            ("On", true),
            ("0", false),
            ("", false),
        ] {
            assert_eq!(
                from(&[("HF_HUB_OFFLINE", value)]).offline,
                offline,
                "{value}"
            );
        }
        let options = from(&[("HF_ENDPOINT", "http://mirror.example/")]);
        assert_eq!(options.endpoint.as_deref(), Some("http://mirror.example"));
    }

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
