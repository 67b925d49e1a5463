//! CLIP's byte-level pair encoding (Radford et al. 2021, <https://arxiv.org/abs/2103.00020>,
//! section 2.4).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use diffuse_nn::files::read_text;
use serde_json::{Map, Value};
use thiserror::Error;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

/// What a text is split into before the pair encoding.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
const END_OF_WORD: &str = "</w>";
/// Tokens that CLIP's text encoder takes.
const DEFAULT_MAX_LENGTH: usize = 77;

/// Why a tokenizer could not be loaded, or a text not be encoded.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// The folder has neither form of vocabulary.
    #[error("`{}` has neither `tokenizer.json` nor `vocab.json` and `merges.txt`", .0.display())]
    NoVocabulary(PathBuf),
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A file is damaged.
    #[error("`{}` is not valid: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The vocabulary lacks a special token.
    #[error("`{}` has no token `{token}`", path.display())]
    NoToken {
        /// The vocabulary file.
        path: PathBuf,
        /// The token.
        token: String,
    },
    /// The tokenizers crate refuses the text.
    #[error("cannot encode the text: {0}")]
    Encode(String),
}

/// A text as the text encoder takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    /// Start, text, end and padding: as many ids as the text encoder takes.
    pub ids: Vec<u32>,
    /// The end of the text that did not fit, if any.
    pub truncated: Option<String>,
}

/// CLIP's tokenizer: text to token ids.
#[derive(Debug, Clone)]
pub struct CLIPTokenizer {
    tokenizer: Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
    max_length: usize,
}

impl CLIPTokenizer {
    /// Loads a tokenizer from its folder: `vocab.json` and `merges.txt`, or `tokenizer.json`; and,
    /// if they are there, `special_tokens_map.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// If a file is missing or damaged.
    pub fn from_pretrained(folder: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let folder = folder.as_ref();
        let config = read_object(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        let special = read_object(&folder.join("special_tokens_map.json"))?;
        let special = SpecialTokens::new(special.as_ref().unwrap_or(&config));
        let (path, mut tokenizer) = read_vocabulary(folder, &special)?;
        for token in special.added() {
            tokenizer.add_special_tokens(&[token]);
        }
        let id = |token: &str| {
            tokenizer
                .token_to_id(token)
                .ok_or_else(|| TokenizerError::NoToken {
                    path: path.clone(),
                    token: token.to_string(),
                })
        };
        // Files without a limit say 10^30.
        let max_length = config.get("model_max_length").and_then(Value::as_u64);
        Ok(Self {
            start: id(&special.start.content)?,
            end: id(&special.end.content)?,
            pad: id(&special.pad.content)?,
            max_length: max_length
                .map_or(DEFAULT_MAX_LENGTH, |length| length as usize)
                .clamp(2, 1 << 16),
            tokenizer,
        })
    }

    /// Number of ids that [`encode`](Self::encode) gives: 77 for CLIP.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Id of the token before the text.
    pub fn start_id(&self) -> u32 {
        self.start
    }

    /// Id of the token after the text.
    pub fn end_id(&self) -> u32 {
        self.end
    }

    /// Id of the tokens that fill up the rest.
    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// The largest id, plus one: the least vocabulary that a text encoder needs.
    pub fn vocab_size(&self) -> usize {
        let largest = self.tokenizer.get_vocab(true).into_values().max();
        largest.map_or(0, |id| id as usize + 1)
    }

    /// Ids of the whole text with start and end, neither cut nor padded.
    ///
    /// # Errors
    /// If the tokenizers crate refuses the text.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        let mut ids = vec![self.start];
        ids.extend(encoding.get_ids());
        ids.push(self.end);
        Ok(ids)
    }

    /// Ids of the text, cut or padded to [`max_length`](Self::max_length).
    ///
    /// # Errors
    /// If the tokenizers crate refuses the text.
    pub fn encode(&self, text: &str) -> Result<Encoding, TokenizerError> {
        let mut ids = self.tokenize(text)?;
        let mut truncated = None;
        if ids.len() > self.max_length {
            let cut = &ids[self.max_length - 1..ids.len() - 1];
            truncated = Some(self.decode(cut)?);
            ids.truncate(self.max_length - 1);
            ids.push(self.end);
        }
        ids.resize(self.max_length, self.pad);
        Ok(Encoding { ids, truncated })
    }

    /// The text of some ids, special tokens included.
    ///
    /// # Errors
    /// If the tokenizers crate refuses the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let text = self
            .tokenizer
            .decode(ids, false)
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(text.replace(END_OF_WORD, " ").trim().to_string())
    }
}

/// The tokens that are matched before anything else. The reference adds them in this order, and a
/// later one with the same content replaces an earlier one: so one that is given as a plain string
/// is matched with regard to case.
struct SpecialTokens {
    start: AddedToken,
    end: AddedToken,
    unknown: AddedToken,
    pad: AddedToken,
}

impl SpecialTokens {
    fn new(map: &Map<String, Value>) -> Self {
        let token = |key: &str, default: &str| match map.get(key) {
            Some(Value::String(content)) => AddedToken::from(content.as_str(), true),
            Some(Value::Object(token)) => {
                let flag = |key: &str| token.get(key).and_then(Value::as_bool).unwrap_or(false);
                let content = token.get("content").and_then(Value::as_str);
                AddedToken::from(content.unwrap_or(default), true)
                    .normalized(flag("normalized"))
                    .lstrip(flag("lstrip"))
                    .rstrip(flag("rstrip"))
                    .single_word(flag("single_word"))
            }
            _ => AddedToken::from(default, true),
        };
        Self {
            start: token("bos_token", START),
            end: token("eos_token", END),
            unknown: token("unk_token", END),
            pad: token("pad_token", END),
        }
    }

    fn added(&self) -> Vec<AddedToken> {
        let mut added: Vec<AddedToken> = Vec::new();
        for token in [&self.start, &self.end, &self.unknown, &self.pad] {
            added.retain(|earlier| earlier.content != token.content);
            added.push(token.clone());
        }
        added
    }
}

/// A JSON object, if the file exists.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, TokenizerError> {
    if !path.exists() {
        return Ok(None);
    }
    match serde_json::from_str(&read(path)?) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(parse_error(path, "it is not a JSON object")),
        Err(error) => Err(parse_error(path, error)),
    }
}

fn read(path: &Path) -> Result<String, TokenizerError> {
    read_text(path).map_err(|source| TokenizerError::Read {
        path: path.to_path_buf(),
        source,
    })
}

/// Tokens and their ids.
fn read_vocab(path: &Path) -> Result<Vocab, TokenizerError> {
    let ids: HashMap<String, u32> =
        serde_json::from_str(&read(path)?).map_err(|error| parse_error(path, error))?;
    Ok(ids.into_iter().collect())
}

/// Pairs of tokens, the first to be merged first.
fn read_merges(path: &Path) -> Result<Merges, TokenizerError> {
    let text = read(path)?;
    let lines = text.lines().enumerate();
    let pairs = lines.filter(|(_, line)| !line.starts_with("#version"));
    pairs
        .map(|(index, line)| match line.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => Ok((left.into(), right.into())),
            _ => Err(parse_error(
                path,
                format!("line {} is not two tokens", index + 1),
            )),
        })
        .collect()
}

fn parse_error(path: &Path, message: impl ToString) -> TokenizerError {
    TokenizerError::Parse {
        path: path.to_path_buf(),
        message: message.to_string(),
    }
}

/// The vocabulary file and a tokenizer without special tokens.
fn read_vocabulary(
    folder: &Path,
    special: &SpecialTokens,
) -> Result<(PathBuf, Tokenizer), TokenizerError> {
    let vocab = folder.join("vocab.json");
    let merges = folder.join("merges.txt");
    let whole = folder.join("tokenizer.json");
    if vocab.is_file() && merges.is_file() {
        let model = BPE::builder()
            .vocab_and_merges(read_vocab(&vocab)?, read_merges(&merges)?)
            .unk_token(special.unknown.content.clone())
            .end_of_word_suffix(END_OF_WORD.to_string())
            .build()
            .map_err(|error| parse_error(&merges, format!("with `vocab.json`: {error}")))?;
        Ok((vocab, clip(model)))
    } else if whole.is_file() {
        let mut tokenizer: Tokenizer = read(&whole)?
            .parse()
            .map_err(|error| parse_error(&whole, error))?;
        // Start, end, cutting and padding are this type's own.
        let _ = tokenizer.with_truncation(None);
        tokenizer.with_padding(None);
        Ok((whole, tokenizer))
    } else {
        Err(TokenizerError::NoVocabulary(folder.to_path_buf()))
    }
}

/// Composed characters, single spaces, lower case; words and punctuation; bytes.
fn clip(model: BPE) -> Tokenizer {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")
        .expect("the pattern for spaces is valid");
    let words = Split::new(
        SplitPattern::Regex(WORDS.into()),
        SplitDelimiterBehavior::Removed,
        true,
    )
    .expect("the pattern for words is valid");

    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(NormalizerWrapper::Sequence(
            tokenizers::normalizers::Sequence::new(vec![
                NFC.into(),
                spaces.into(),
                Lowercase.into(),
            ]),
        )))
        .with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(
            tokenizers::pre_tokenizers::sequence::Sequence::new(vec![
                words.into(),
                ByteLevel::new(false, true, true).into(),
            ]),
        )))
        .with_decoder(Some(ByteLevel::default()));
    tokenizer
}
