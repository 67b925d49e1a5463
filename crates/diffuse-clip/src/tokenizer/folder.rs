//! A tokenizer's folder as transformers 5 reads it.
//!
//! - `tokenizer.json` gives vocabulary, merges and added tokens; without it, `vocab.json` and
//!   `merges.txt` do. Normaliser and the other parts are CLIP's own, whatever it says.
//! - `tokenizer_config.json` may list all added tokens (`added_tokens_decoder`); then no other file
//!   counts for them. Otherwise `special_tokens_map.json` overrides its special tokens, and
//!   `added_tokens.json` and `tokenizer.json` list the added ones.
//! - Added tokens get the next free ids in the order of those in the file, so an id in a file that
//!   leaves a gap is an error here: transformers 4 and 5 disagree on it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use diffuse_nn::files::read_text;
use serde_json::{Map, Value};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{Merges, Vocab};

use super::{END, START, TokenizerError};

/// Tokens that CLIP's text encoder takes.
pub(super) const DEFAULT_MAX_LENGTH: usize = 77;
/// Files without a limit say 10^30.
const NO_LIMIT: f64 = 1e18;
const MAX_LENGTH: u64 = 1 << 16;
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
    /// Added tokens with the ids that files give them, and the file.
    pub listed: BTreeMap<u32, (PathBuf, AddedToken)>,
}

/// A JSON file, which need not exist.
struct Object {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Object {
    fn read(path: PathBuf) -> Result<Self, TokenizerError> {
        if !path.exists() {
            let map = Map::new();
            return Ok(Self { path, map });
        }
        match serde_json::from_str(&read(&path)?) {
            Ok(Value::Object(map)) => Ok(Self { path, map }),
            Ok(_) => Err(parse_error(&path, "it is not a JSON object")),
            Err(error) => Err(parse_error(&path, error)),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn is_special_map(&self) -> bool {
        self.path.ends_with("special_tokens_map.json")
    }

    fn unsupported(&self, key: &str, value: &Value, supported: &str) -> TokenizerError {
        TokenizerError::Unsupported {
            path: self.path.clone(),
            key: key.to_string(),
            value: value.to_string(),
            supported: supported.to_string(),
        }
    }
}

/// A token that is special by the key under which it stands.
struct Special {
    token: AddedToken,
    /// A string in the file. transformers takes it for another token than one with flags.
    is_text: bool,
    /// Under a key of its own, not in a list.
    is_named: bool,
    /// Whether it makes a token of `added_tokens.json` with its content special. For transformers
    /// objects of `tokenizer_config.json`, and the map's `additional_special_tokens`, do not.
    marks_added: bool,
}

/// `tokenizer_config.json`, overridden by `special_tokens_map.json` where that counts.
struct Settings<'a> {
    config: &'a Object,
    special: Option<&'a Object>,
}

impl<'a> Settings<'a> {
    /// The file that counts for a key, if it has it.
    fn file(&self, key: &str) -> Option<&'a Object> {
        let mut files = self.special.into_iter().chain([self.config]);
        files.find(|file| file.map.contains_key(key))
    }

    /// The content of a named token; `None` for null.
    fn named(&self, key: &str, default: &str) -> Result<Option<String>, TokenizerError> {
        let Some(file) = self.file(key) else {
            return Ok(Some(default.to_string()));
        };
        let token = file.get(key).map(|value| token(file, key, value));
        Ok(token.transpose()?.map(|token| token.content))
    }

    /// The content of a named token that CLIP cannot do without.
    fn required(&self, key: &str, default: &str) -> Result<String, TokenizerError> {
        let supported = "a token is needed";
        self.named(key, default)?.ok_or_else(|| {
            let file = self.file(key).expect("null is in a file");
            file.unsupported(key, &Value::Null, supported)
        })
    }

    /// Tokens under keys of their own: the usual ones, then others.
    fn named_tokens(&self) -> Result<Vec<Special>, TokenizerError> {
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
    fn more_tokens(&self) -> Result<Vec<Special>, TokenizerError> {
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

impl Folder {
    pub(super) fn read(folder: &Path) -> Result<Self, TokenizerError> {
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

/// The order in which transformers adds tokens: those of the files by id, then special ones that no
/// file lists. Of several with the same content, the flags of the last count.
fn in_order(
    listed: &BTreeMap<u32, (PathBuf, AddedToken)>,
    specials: &[Special],
) -> Vec<AddedToken> {
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

fn listed_in_config(
    config: &Object,
) -> Result<BTreeMap<u32, (PathBuf, AddedToken)>, TokenizerError> {
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
fn listed_in_added_tokens(
    added: &Object,
    is_special: impl Fn(&str) -> bool,
) -> Result<BTreeMap<u32, (PathBuf, AddedToken)>, TokenizerError> {
    let entries = added.map.iter().map(|(content, value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| added.unsupported(content, value, "an id is needed"))?;
        let token = AddedToken::from(content.as_str(), is_special(content));
        Ok((id, (added.path.clone(), token)))
    });
    entries.collect()
}

fn listed_in_tokenizer(
    whole: &Object,
) -> Result<BTreeMap<u32, (PathBuf, AddedToken)>, TokenizerError> {
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
    // `special_tokens_map.json` need not say that its tokens are special.
    let default = value.is_string() || file.is_special_map();
    let special = flag("special", default)?;
    Ok(AddedToken::from(content, special)
        .normalized(flag("normalized", !special)?)
        .lstrip(flag("lstrip", false)?)
        .rstrip(flag("rstrip", false)?)
        .single_word(flag("single_word", false)?))
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

fn read(path: &Path) -> Result<String, TokenizerError> {
    read_text(path).map_err(|source| TokenizerError::Read {
        path: path.to_path_buf(),
        source,
    })
}

fn parse_error(path: &Path, message: impl ToString) -> TokenizerError {
    TokenizerError::Parse {
        path: path.to_path_buf(),
        message: message.to_string(),
    }
}

/// The vocabulary's file, its tokens with their ids, and its merges.
fn read_vocabulary(
    folder: &Path,
    whole: &Object,
) -> Result<(PathBuf, Vocab, Merges), TokenizerError> {
    let vocab = folder.join("vocab.json");
    let merges = folder.join("merges.txt");
    if whole.path.exists() {
        let (vocab, merges) = vocabulary_of(whole)?;
        Ok((whole.path.clone(), vocab, merges))
    } else if vocab.is_file() && merges.is_file() {
        let ids: HashMap<String, u32> =
            serde_json::from_str(&read(&vocab)?).map_err(|error| parse_error(&vocab, error))?;
        let pairs = read_merges(&merges)?;
        Ok((vocab, ids.into_iter().collect(), pairs))
    } else {
        Err(TokenizerError::NoVocabulary(folder.to_path_buf()))
    }
}

/// The model of a `tokenizer.json`.
fn vocabulary_of(whole: &Object) -> Result<(Vocab, Merges), TokenizerError> {
    let no_model = Value::Null;
    let model = whole.get("model").unwrap_or(&no_model);
    if let Some(kind) = model.get("type").filter(|kind| **kind != "BPE") {
        return Err(whole.unsupported("model.type", kind, "`BPE` is supported"));
    }
    let Some(Value::Object(ids)) = model.get("vocab") else {
        return Err(parse_error(
            &whole.path,
            "`model.vocab` is not a dictionary",
        ));
    };
    let vocab = ids.iter().map(|(token, id)| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = number.ok_or_else(|| {
            let key = format!("model.vocab.{token}");
            whole.unsupported(&key, id, "an id is needed")
        })?;
        Ok((token.clone(), id))
    });
    let Some(Value::Array(pairs)) = model.get("merges") else {
        return Err(parse_error(&whole.path, "`model.merges` is not a list"));
    };
    let merges = pairs.iter().enumerate().map(|(index, pair)| {
        let text = pair.as_str().and_then(|pair| pair.split_once(' '));
        let list = || match pair.as_array().map(Vec::as_slice) {
            Some([left, right]) => Some((left.as_str()?, right.as_str()?)),
            _ => None,
        };
        let pair = text.or_else(list).ok_or_else(|| {
            parse_error(
                &whole.path,
                format!("`model.merges[{index}]` is not two tokens"),
            )
        });
        pair.map(|(left, right)| (left.to_string(), right.to_string()))
    });
    Ok((
        vocab.collect::<Result<_, _>>()?,
        merges.collect::<Result<_, _>>()?,
    ))
}

/// Pairs of tokens, the first to be merged first.
fn read_merges(path: &Path) -> Result<Merges, TokenizerError> {
    let text = read(path)?;
    let lines = text.lines().enumerate();
    let pairs = lines.filter(|(_, line)| !line.starts_with("#version"));
    pairs
        .map(|(index, line)| {
            pair(line)
                .ok_or_else(|| parse_error(path, format!("line {} is not two tokens", index + 1)))
        })
        .collect()
}

/// The two tokens of a line.
pub(super) fn pair(line: &str) -> Option<(String, String)> {
    let (left, right) = line.split_once(' ')?;
    (!right.contains(' ')).then(|| (left.to_string(), right.to_string()))
}
