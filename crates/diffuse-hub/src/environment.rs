//! The environment variables that Python's `huggingface_hub` reads, by its rules (its
//! `constants.py`).
//!
//! One difference: an empty variable counts as unset, also where Python uses the current folder.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use crate::FetchOptions;

impl FetchOptions {
    /// The default, changed by the environment:
    ///
    /// | Variable | |
    /// |---|---|
    /// | `HF_HOME` | folder of the cache (`hub`) and of the token (`token`) |
    /// | `XDG_CACHE_HOME` | its folder `huggingface` is the default of `HF_HOME`; else `~/.cache` |
    /// | `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE` | folder of the cache |
    /// | `HF_TOKEN`, else `HUGGING_FACE_HUB_TOKEN` | access token |
    /// | `HF_TOKEN_PATH` | file of the token, if no variable has it |
    /// | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | send no token |
    /// | `HF_ENDPOINT` | URL of the hub |
    /// | `HF_HUB_OFFLINE`, else `TRANSFORMERS_OFFLINE` | make no request |
    /// | `HF_HUB_DISABLE_SYMLINKS` | copies, not symbolic links |
    ///
    /// A switch is on at `1`, `on`, `yes` and `true`. In paths a leading `~` is the home folder,
    /// and `$NAME` and `${NAME}` are variables; unset ones are not replaced.
    pub fn from_env() -> Self {
        Environment {
            variable: |name: &str| env::var_os(name),
            home: env::home_dir(),
        }
        .options()
    }
}

struct Environment<F> {
    variable: F,
    home: Option<PathBuf>,
}

impl<F: Fn(&str) -> Option<OsString>> Environment<F> {
    fn options(&self) -> FetchOptions {
        let home = self.path(&["HF_HOME"]).or_else(|| {
            let caches = self.path(&["XDG_CACHE_HOME"]);
            let caches = caches.or_else(|| Some(self.home.as_ref()?.join(".cache")))?;
            Some(caches.join("huggingface"))
        });
        let in_home = |name: &str| Some(home.as_ref()?.join(name));
        let cache = self.path(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]);
        let token_path = self.path(&["HF_TOKEN_PATH"]).or_else(|| in_home("token"));
        FetchOptions {
            cache: cache.or_else(|| in_home("hub")),
            token: self.token(token_path),
            endpoint: self
                .text(&["HF_ENDPOINT"])
                .map(|url| url.trim_end_matches('/').to_string()),
            offline: self.is_on(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]),
            no_links: self.is_on(&["HF_HUB_DISABLE_SYMLINKS"]),
            ..FetchOptions::default()
        }
    }

    fn token(&self, path: Option<PathBuf>) -> Option<String> {
        if self.is_on(&["HF_HUB_DISABLE_IMPLICIT_TOKEN"]) {
            return None;
        }
        let token = self.text(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]);
        let token = token.or_else(|| fs::read_to_string(path?).ok())?;
        let token = token.replace(['\r', '\n'], "").trim().to_string();
        (!token.is_empty()).then_some(token)
    }

    /// The first of several variables that is set.
    fn value(&self, names: &[&str]) -> Option<OsString> {
        let set = |name: &&str| (self.variable)(name).filter(|value| !value.is_empty());
        names.iter().find_map(set)
    }

    fn text(&self, names: &[&str]) -> Option<String> {
        self.value(names)?.into_string().ok()
    }

    fn is_on(&self, names: &[&str]) -> bool {
        let value = self.text(names).unwrap_or_default().to_uppercase();
        ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
    }

    fn path(&self, names: &[&str]) -> Option<PathBuf> {
        let value = self.value(names)?;
        Some(match value.to_str() {
            Some(text) => self.expand(text).into(),
            // Only UTF-8 text has variables.
            None => value.into(),
        })
    }

    /// Python's `expandvars(expanduser(text))`.
    fn expand(&self, text: &str) -> OsString {
        let mut expanded = OsString::new();
        let mut rest = text;
        if let Some(behind) = rest.strip_prefix('~')
            && (behind.is_empty()
                || behind.starts_with('/')
                || cfg!(windows) && behind.starts_with('\\'))
            && let Some(home) = &self.home
        {
            expanded.push(home);
            rest = behind;
        }
        while let Some(start) = rest.find('$') {
            expanded.push(&rest[..start]);
            rest = &rest[start..];
            let (whole, name) = variable_at_start(rest);
            match (self.variable)(name) {
                Some(value) if !name.is_empty() => expanded.push(value),
                _ => expanded.push(whole),
            }
            rest = &rest[whole.len()..];
        }
        expanded.push(rest);
        expanded
    }
}

/// The variable at the start of a text, with and without its syntax: `("${A}", "A")` of `${A}/b`.
/// The name is empty after a plain dollar sign.
fn variable_at_start(text: &str) -> (&str, &str) {
    if let Some(braced) = text.strip_prefix("${")
        && let Some(end) = braced.find('}')
    {
        return (&text[..end + 3], &braced[..end]);
    }
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let end = text[1..]
        .find(|c| !is_name(c))
        .map_or(text.len(), |end| end + 1);
    (&text[..end], &text[1..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> FetchOptions {
        let variable = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let home = Some("/home/me".into());
        Environment { variable, home }.options()
    }

    #[test]
    fn cache_folder() {
        let check = |variables: &[(&str, &str)], expected: &str| {
            let cache = from(variables).cache.unwrap();
            assert_eq!(cache.to_str(), Some(expected), "{variables:?}");
        };
        check(&[], "/home/me/.cache/huggingface/hub");
        check(&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub");
        check(&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/h/hub");
        check(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")], "/c");
        check(&[("HUGGINGFACE_HUB_CACHE", "/o"), ("HF_HOME", "/h")], "/o");
        check(
            &[("HUGGINGFACE_HUB_CACHE", "/o"), ("HF_HUB_CACHE", "/c")],
            "/c",
        );
        check(&[("HF_HOME", "")], "/home/me/.cache/huggingface/hub");
    }

    /// The expected paths are Python's (`expandvars(expanduser(value))`).
    #[test]
    fn home_and_variables_in_paths() {
        let check = |value: &str, expected: &str| {
            for (name, behind) in [
                ("HF_HOME", "/hub"),
                ("HF_HUB_CACHE", ""),
                ("HUGGINGFACE_HUB_CACHE", ""),
                ("XDG_CACHE_HOME", "/huggingface/hub"),
            ] {
                let cache = from(&[(name, value), ("A", "va"), ("HOME", "/home/me")]).cache;
                assert_eq!(
                    cache.unwrap().to_str(),
                    Some(format!("{expected}{behind}").as_str()),
                    "{name}={value}"
                );
            }
        };
        check("~", "/home/me");
        check("~/x", "/home/me/x");
        check("a~/x", "a~/x");
        check(" ~/x", " ~/x");
        check("$HOME/x", "/home/me/x");
        check("${HOME}/x", "/home/me/x");
        check("/x/$A", "/x/va");
        check("/x/${A}b", "/x/vab");
        check("$$A", "$va");
        check("$A$A", "vava");
        // Not set, and not variables.
        for value in ["$B/x", "${B}", "${A", "$A_b", "a$", "$\u{e9}", "${}"] {
            check(value, value);
        }
    }

    #[test]
    fn token_is_the_variable_or_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let check = |variables: &[(&str, &str)], expected: Option<&str>| {
            let variables = [&[("HF_HOME", home)], variables].concat();
            let token = from(&variables).token;
            assert_eq!(token.as_deref(), expected, "{variables:?}");
        };
        check(&[], None);
        fs::write(folder.path().join("token"), "from-\r\nfile\n").unwrap();
        check(&[], Some("from-file"));
        check(&[("HF_TOKEN", " given ")], Some("given"));
        check(&[("HF_TOKEN", "")], Some("from-file"));
        check(&[("HUGGING_FACE_HUB_TOKEN", "old")], Some("old"));
        check(
            &[("HUGGING_FACE_HUB_TOKEN", "old"), ("HF_TOKEN", "new")],
            Some("new"),
        );
        let other = folder.path().join("other");
        fs::write(&other, "other").unwrap();
        check(&[("HF_TOKEN_PATH", other.to_str().unwrap())], Some("other"));
        check(&[("HF_TOKEN_PATH", "${HF_HOME}/other")], Some("other"));
        check(&[("HF_TOKEN_PATH", "/no/such/file")], None);
        let none = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
        check(&[none, ("HF_TOKEN", "given")], None);
    }

    #[test]
    fn switches_and_endpoint() {
        let check = |variables: &[(&str, &str)], offline: bool| {
            assert_eq!(from(variables).offline, offline, "{variables:?}");
        };
        check(&[], false);
        for (value, offline) in [
            ("1", true),
            ("true", true),
            ("On", true),
            ("yes", true),
            ("0", false),
            ("2", false),
            ("", false),
        ] {
            check(&[("HF_HUB_OFFLINE", value)], offline);
            check(&[("TRANSFORMERS_OFFLINE", value)], offline);
            let options = from(&[("HF_HUB_DISABLE_SYMLINKS", value)]);
            assert_eq!(options.no_links, offline, "{value}");
        }
        // The second counts only if the first is unset.
        let both = |own| [("HF_HUB_OFFLINE", own), ("TRANSFORMERS_OFFLINE", "1")];
        check(&both("0"), false);
        check(&both(""), true);

        let options = from(&[("HF_ENDPOINT", "http://mirror.example/")]);
        assert_eq!(options.endpoint.as_deref(), Some("http://mirror.example"));
        assert_eq!(from(&[]).endpoint, None);
    }
}
