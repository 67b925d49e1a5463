//! Special and added tokens of a tokenizer's folder.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;
use tokenizers::AddedToken;

use super::folder::Object;
use super::{END, START, TokenizerError};

/// Special tokens and their defaults, in transformers' order, in which those that no file lists get
/// their ids.
const NAMED: [(&str, Option<&str>); 7] = [
    ("bos_token", Some(START)),
    ("eos_token", Some(END)),
    ("unk_token", Some(END)),
    ("sep_token", None),
    ("pad_token", Some(END)),
    ("cls_token", None),
    ("mask_token", None),
];

/// Added tokens with the ids that files give them, and the file.
pub(super) type Listed = BTreeMap<u32, (PathBuf, AddedToken)>;

/// A token that is special by the key under which it stands.
pub(super) struct Special {
    pub token: AddedToken,
    /// A string in the file. transformers takes it for another token than one with flags.
    pub is_text: bool,
    /// Under a key of its own, not in a list.
    pub is_named: bool,
    /// Whether it makes a token of `added_tokens.json` with its content special. For transformers
    /// objects of `tokenizer_config.json`, and the map's `additional_special_tokens`, do not.
    pub marks_added: bool,
}

/// `tokenizer_config.json`, overridden by `special_tokens_map.json` where that counts.
pub(super) struct Settings<'a> {
    pub config: &'a Object,
    pub special: Option<&'a Object>,
}

impl<'a> Settings<'a> {
    /// The file that counts for a key, if it has it.
    fn file(&self, key: &str) -> Option<&'a Object> {
        let mut files = self.special.into_iter().chain([self.config]);
        files.find(|file| file.map.contains_key(key))
    }

    /// The content of a named token; `None` for null.
    pub fn named(&self, key: &str, default: &str) -> Result<Option<String>, TokenizerError> {
        let Some(file) = self.file(key) else {
            return Ok(Some(default.to_string()));
        };
        let token = file.get(key).map(|value| token(file, key, value));
        Ok(token.transpose()?.map(|token| token.content))
    }

    /// The content of a named token that CLIP cannot do without.
    pub fn required(&self, key: &str, default: &str) -> Result<String, TokenizerError> {
        let supported = "a token is needed";
        self.named(key, default)?.ok_or_else(|| {
            let file = self.file(key).expect("null is in a file");
            file.unsupported(key, &Value::Null, supported)
        })
    }

    /// Tokens under keys of their own: the usual ones, then others.
    pub fn named_tokens(&self) -> Result<Vec<Special>, TokenizerError> {
        let mut tokens = Vec::new();
        for (key, default) in NAMED {
            let default = default.map(Value::from);
            let (file, value) = match self.file(key) {
                Some(file) => (file, file.get(key)),
                None => (self.config, default.as_ref()),
            };
            if let Some(value) = value {
                let marks_added = value.is_string() || file.is_special_map();
                tokens.push(Special {
                    marks_added,
                    ..special(file, key, value, true)?
                });
            }
        }
        for file in self.special.into_iter().chain([self.config]) {
            for (key, value) in &file.map {
                let usual = NAMED.iter().any(|(named, _)| named == key);
                let counts = self
                    .file(key)
                    .is_some_and(|counts| counts.path == file.path);
                let is_token = value.is_string() || value.is_object();
                if key.ends_with("_token") && is_token && counts && !usual {
                    tokens.push(special(file, key, value, true)?);
                }
            }
        }
        Ok(tokens)
    }

    /// Tokens in lists, or in dictionaries of names.
    pub fn more_tokens(&self) -> Result<Vec<Special>, TokenizerError> {
        const KEYS: [&str; 2] = ["extra_special_tokens", "additional_special_tokens"];
        let some = |file: &'a Object, key| {
            let value = file.get(key)?;
            (value != &Value::Array(Vec::new())).then_some((file, key, value))
        };
        let of_config = KEYS.into_iter().find_map(|key| some(self.config, key));
        let of_map = |key| self.special.and_then(|file| some(file, key));
        let mut lists = Vec::new();
        lists.extend(of_config);
        lists.extend(of_map(KEYS[0]));
        if lists.is_empty() {
            lists.extend(of_map(KEYS[1]));
        }
        let mut tokens = Vec::new();
        for (file, key, value) in lists {
            match value {
                Value::Array(values) => {
                    for value in values {
                        let is_map = file.is_special_map();
                        let counts = !is_map || key == KEYS[0];
                        tokens.push(Special {
                            marks_added: counts && (value.is_string() || is_map),
                            ..special(file, key, value, false)?
                        });
                    }
                }
                Value::Object(values) => {
                    for value in values.values() {
                        tokens.push(special(file, key, value, true)?);
                    }
                }
                _ => return Err(file.unsupported(key, value, "a list of tokens is needed")),
            }
        }
        Ok(tokens)
    }
}

/// The order in which transformers adds tokens: those of the files by id, then special ones that no
/// file lists. Of several with the same content, the flags of the last count.
pub(super) fn in_order(listed: &Listed, specials: &[Special]) -> Vec<AddedToken> {
    let listed: Vec<&AddedToken> = listed.values().map(|(_, token)| token).collect();
    let mut unlisted: Vec<&Special> = Vec::new();
    for special in specials {
        let content = &special.token.content;
        let is_listed = listed.iter().any(|token| token.content == *content);
        let is_same =
            |other: &&Special| other.is_text == special.is_text && other.token == special.token;
        if !is_listed && !unlisted.iter().any(is_same) {
            unlisted.push(special);
        }
    }
    let unlisted = unlisted.into_iter().map(|special| &special.token);
    let mut added: Vec<AddedToken> = Vec::new();
    for token in listed.into_iter().chain(unlisted) {
        let mut token = token.clone();
        token.special |= specials
            .iter()
            .any(|special| special.is_named && special.token.content == token.content);
        match added
            .iter_mut()
            .find(|earlier| earlier.content == token.content)
        {
            Some(earlier) => *earlier = token,
            None => added.push(token),
        }
    }
    added
}

pub(super) fn listed_in_config(config: &Object) -> Result<Listed, TokenizerError> {
    let key = "added_tokens_decoder";
    let Value::Object(tokens) = &config.map[key] else {
        let supported = "a dictionary of ids and tokens is needed";
        return Err(config.unsupported(key, &config.map[key], supported));
    };
    let entries = tokens.iter().map(|(id, value)| {
        let name = format!("{key}.{id}");
        let number = id.parse().ok();
        let id = number.filter(|_| value.is_object());
        let id =
            id.ok_or_else(|| config.unsupported(&name, value, "a token under its id is needed"))?;
        Ok((id, (config.path.clone(), token(config, &name, value)?)))
    });
    entries.collect()
}

/// `{token: id}`
pub(super) fn listed_in_added_tokens(
    added: &Object,
    is_special: impl Fn(&str) -> bool,
) -> Result<Listed, TokenizerError> {
    let entries = added.map.iter().map(|(content, value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| added.unsupported(content, value, "an id is needed"))?;
        let token = AddedToken::from(content.as_str(), is_special(content));
        Ok((id, (added.path.clone(), token)))
    });
    entries.collect()
}

pub(super) fn listed_in_tokenizer(whole: &Object) -> Result<Listed, TokenizerError> {
    let key = "added_tokens";
    let values = match whole.get(key) {
        None => return Ok(BTreeMap::new()),
        Some(Value::Array(values)) => values,
        Some(value) => return Err(whole.unsupported(key, value, "a list of tokens is needed")),
    };
    let entries = values.iter().enumerate().map(|(index, value)| {
        let name = format!("{key}[{index}]");
        let id = value.get("id").and_then(Value::as_u64);
        let id = id.and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| whole.unsupported(&name, value, "a token's `id` is needed"))?;
        Ok((id, (whole.path.clone(), token(whole, &name, value)?)))
    });
    entries.collect()
}

fn special(
    file: &Object,
    key: &str,
    value: &Value,
    is_named: bool,
) -> Result<Special, TokenizerError> {
    Ok(Special {
        token: token(file, key, value)?,
        is_text: value.is_string(),
        is_named,
        marks_added: false,
    })
}

/// The content of a token, alone or with flags.
fn content_of(value: &Value) -> Option<&str> {
    let content = value.get("content").unwrap_or(value);
    content.as_str()
}

/// A token: its content, or an object of content and flags. One that is a string is special.
fn token(file: &Object, key: &str, value: &Value) -> Result<AddedToken, TokenizerError> {
    let content = content_of(value).filter(|content| !content.is_empty());
    let content = content.ok_or_else(|| file.unsupported(key, value, "a token is needed"))?;
    let flag = |name: &str, default: bool| match value.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(flag) => {
            let key = format!("{key}.{name}");
            Err(file.unsupported(&key, flag, "true or false is needed"))
        }
    };
    // Tokens of `special_tokens_map.json` are special whatever they say.
    let special = flag("special", value.is_string())? || file.is_special_map();
    Ok(AddedToken::from(content, special)
        .normalized(flag("normalized", !special)?)
        .lstrip(flag("lstrip", false)?)
        .rstrip(flag("rstrip", false)?)
        .single_word(flag("single_word", false)?))
}
