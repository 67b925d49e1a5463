//! A tokenizer's folder as transformers 5 reads it.
//!
//! - `tokenizer.json` gives vocabulary, merges and added tokens; without it, `vocab.json` and
//!   `merges.txt` do. Normaliser and the other parts are CLIP's own, whatever it says.
//! - `tokenizer_config.json` may list all added tokens (`added_tokens_decoder`); then no other file
//!   counts for them. Otherwise `special_tokens_map.json` overrides its special tokens, and
//!   `added_tokens.json` and `tokenizer.json` list the added ones.
//! - Added tokens get the next free ids in the order of those in the file, so an id in a file that
//!   leaves a gap is an error here: transformers 4 and 5 disagree on it.

use std::path::{Path, PathBuf};

use diffuse_nn::ModelPath;
use serde_json::{Map, Value};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{Merges, Vocab};

use super::added::{
    Listed, Settings, in_order, listed_in_added_tokens, listed_in_config, listed_in_tokenizer,
};
use super::vocabulary::read_vocabulary;
use super::{END, START, TokenizerError};

/// Tokens that CLIP's text encoder takes.
pub(super) const DEFAULT_MAX_LENGTH: usize = 77;
/// Files without a limit say 10^30.
const NO_LIMIT: f64 = 1e18;
const MAX_LENGTH: u64 = 1 << 16;
/// What a folder says.
pub(super) struct Folder {
    /// The file of the vocabulary.
    pub vocabulary: PathBuf,
    pub vocab: Vocab,
    pub merges: Merges,
    pub start: String,
    pub end: String,
    pub pad: String,
    pub unknown: Option<String>,
    pub max_length: usize,
    /// In the order in which they get their ids; no two with the same content.
    pub added: Vec<AddedToken>,
    pub listed: Listed,
}

/// The most characters of a value that a message shows.
const SHOWN: usize = 60;

fn shorten(text: String) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// A JSON file, which need not exist.
pub(super) struct Object {
    pub path: PathBuf,
    pub exists: bool,
    pub map: Map<String, Value>,
}

impl Object {
    fn read(file: ModelPath) -> Result<Self, TokenizerError> {
        let (path, exists) = (file.path().to_path_buf(), file.exists());
        if !exists {
            let map = Map::new();
            return Ok(Self { path, exists, map });
        }
        match serde_json::from_str(&read(&file)?) {
            Ok(Value::Object(map)) => Ok(Self { path, exists, map }),
            Ok(_) => Err(parse_error(&path, "it is not a JSON object")),
            Err(error) => Err(parse_error(&path, error)),
        }
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn is_special_map(&self) -> bool {
        self.path.ends_with("special_tokens_map.json")
    }

    pub fn unsupported(&self, key: &str, value: &Value, supported: &str) -> TokenizerError {
        TokenizerError::Unsupported {
            path: self.path.clone(),
            key: key.to_string(),
            value: shorten(value.to_string()),
            supported: supported.to_string(),
        }
    }
}

impl Folder {
    pub(super) fn read(folder: &ModelPath) -> Result<Self, TokenizerError> {
        let config = Object::read(folder.join("tokenizer_config.json"))?;
        let special = Object::read(folder.join("special_tokens_map.json"))?;
        let added = Object::read(folder.join("added_tokens.json"))?;
        let whole = Object::read(folder.join("tokenizer.json"))?;

        let (vocabulary, vocab, merges) = read_vocabulary(folder, &whole)?;
        check_supported(&config, &whole)?;
        let lists_added = config.map.contains_key("added_tokens_decoder");
        let settings = Settings {
            config: &config,
            special: (!lists_added).then_some(&special),
        };
        let mut named = settings.named_tokens()?;
        let more = settings.more_tokens()?;
        let listed = if lists_added {
            listed_in_config(&config)?
        } else {
            let known = |content: &str| {
                let mut specials = named.iter().chain(&more);
                specials.any(|one| one.marks_added && one.token.content == content)
            };
            let mut listed = listed_in_added_tokens(&added, known)?;
            listed.extend(listed_in_tokenizer(&whole)?);
            listed
        };
        named.extend(more);
        Ok(Self {
            vocabulary,
            vocab,
            merges,
            start: settings.required("bos_token", START)?,
            end: settings.required("eos_token", END)?,
            pad: settings.required("pad_token", END)?,
            unknown: settings.named("unk_token", END)?,
            max_length: max_length(&config)?,
            added: in_order(&listed, &named),
            listed,
        })
    }
}

/// Refuses what would give other ids here.
fn check_supported(config: &Object, whole: &Object) -> Result<(), TokenizerError> {
    for (key, part, part_key) in [
        ("padding_side", "padding", "padding.direction"),
        ("truncation_side", "truncation", "truncation.direction"),
    ] {
        let of_config = config.get(key).map(|value| (config, key, value));
        let of_whole = whole.get(part).and_then(|part| part.get("direction"));
        let of_whole = of_whole.map(|value| (whole, part_key, value));
        if let Some((file, key, value)) = of_config.or(of_whole) {
            let is_right = value
                .as_str()
                .is_some_and(|side| side.eq_ignore_ascii_case("right"));
            if !is_right {
                return Err(file.unsupported(key, value, "`right` is supported"));
            }
        }
    }
    // transformers 5 takes CLIP's own normaliser in any case, transformers 4 the file's.
    if let Some(normalizer) = whole.map.get("normalizer")
        && !normalizer.to_string().contains("\"Lowercase\"")
    {
        let supported = "one with `Lowercase` is supported";
        return Err(whole.unsupported("normalizer", normalizer, supported));
    }
    for (key, allowed, supported) in [
        (
            "split_special_tokens",
            Value::Bool(false),
            "`false` is supported",
        ),
        (
            "fast_tokenizer_files",
            Value::Null,
            "`tokenizer.json` alone is supported",
        ),
    ] {
        if let Some(value) = config.get(key).filter(|value| **value != allowed) {
            return Err(config.unsupported(key, value, supported));
        }
    }
    Ok(())
}

fn max_length(config: &Object) -> Result<usize, TokenizerError> {
    let keys = ["model_max_length", "max_len"];
    let value = keys.iter().find_map(|key| Some((key, config.get(key)?)));
    let Some((key, value)) = value else {
        return Ok(DEFAULT_MAX_LENGTH);
    };
    match value.as_u64() {
        Some(length @ 2..=MAX_LENGTH) => Ok(length as usize),
        _ if value.as_f64().is_some_and(|length| length >= NO_LIMIT) => Ok(DEFAULT_MAX_LENGTH),
        _ => {
            let supported = format!("2 to {MAX_LENGTH} are supported");
            Err(config.unsupported(key, value, &supported))
        }
    }
}

pub(super) fn read(file: &ModelPath) -> Result<String, TokenizerError> {
    file.read_text().map_err(|source| TokenizerError::Read {
        path: file.path().to_path_buf(),
        source,
    })
}

pub(super) fn parse_error(path: &Path, message: impl ToString) -> TokenizerError {
    TokenizerError::Parse {
        path: path.to_path_buf(),
        message: message.to_string(),
    }
}
