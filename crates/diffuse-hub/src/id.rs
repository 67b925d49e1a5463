//! Names of repositories: `owner/name`.

use std::path::Path;

/// The hub's limit; the name is also that of a folder of the cache.
const MAX_LENGTH: usize = 193;

/// The `owner/name` in a path that does not exist; `None` if the path exists, or cannot be a
/// repository's name.
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
        Some((owner, name)) => is_name(owner) && is_name(name) && text.len() <= MAX_LENGTH,
        None => false,
    }
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
}
