//! CLIP's byte-level pair encoding (Radford et al. 2021, <https://arxiv.org/abs/2103.00020>,
//! section 2.4).

mod added;
mod concepts;
mod folder;
mod published;
mod save;
mod vocabulary;

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use diffuse_nn::ModelPath;
use thiserror::Error;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, Replace, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{Model, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

pub(crate) use concepts::Concept;
use folder::Folder;

/// What a text is split into before the pair encoding.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
const END_OF_WORD: &str = "</w>";
const ADDED: &str = "the token was added";

/// Why a tokenizer could not be loaded, or a text not be encoded.
#[derive(Debug, Error)]
#[non_exhaustive]
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
    /// A file asks for something that is not done here.
    #[error("`{key}` in `{}` is {value}; {supported}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value, as JSON.
        value: String,
        /// What is supported.
        supported: String,
    },
    /// An added token cannot have the id that a file gives it.
    #[error("`{}` gives token `{token}` id {found}, but {reason}", path.display())]
    Id {
        /// The file.
        path: PathBuf,
        /// The token.
        token: String,
        /// The id in the file.
        found: u32,
        /// Why not.
        reason: String,
    },
    /// A token to be added is in the vocabulary.
    #[error("the tokenizer already has a token `{0}`: choose another name")]
    Exists(String),
    /// A token without a visible character.
    #[error("a token needs a name")]
    NoName,
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

/// A token that was added to the vocabulary, and is matched as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub content: String,
    /// Whether it marks something, such as the end of the text, and is no word of a prompt.
    pub special: bool,
    /// Whether it is matched in the normalised text, and thus in upper and lower case.
    pub normalized: bool,
    /// Whether it takes the white space before it.
    pub lstrip: bool,
    /// Whether it takes the white space after it.
    pub rstrip: bool,
    /// Whether it is not matched inside a word.
    pub single_word: bool,
}

/// CLIP's tokenizer: text to token ids.
#[derive(Debug, Clone)]
pub struct CLIPTokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Without the tokens of [`add_token`](Self::add_token), but for those with punctuation at an
    /// end.
    plain: Arc<Tokenizer>,
    /// Longest name first.
    concepts: Vec<Concept>,
    start: u32,
    end: u32,
    pad: u32,
    max_length: usize,
}

impl CLIPTokenizer {
    /// Loads a tokenizer from its folder: `tokenizer.json`, or `vocab.json` and `merges.txt`; and,
    /// if they are there, `tokenizer_config.json`, `special_tokens_map.json` and
    /// `added_tokens.json`. They are read as transformers 5 reads them.
    ///
    /// # Errors
    /// If a file is missing or damaged, or asks for something that is not supported.
    pub fn from_pretrained(folder: impl Into<ModelPath>) -> Result<Self, TokenizerError> {
        Self::new(Folder::read(&folder.into())?)
    }

    /// The tokenizer of Stable Diffusion 1, which fills up with its end token.
    pub fn stable_diffusion_v1() -> Self {
        let end = tokenizers::AddedToken::from(END, true);
        Self::published(END, &[end])
    }

    /// The tokenizer of Stable Diffusion 2, which fills up with `!`.
    pub fn stable_diffusion_v2() -> Self {
        let end = tokenizers::AddedToken::from(END, true).normalized(true);
        Self::published("!", &[end, tokenizers::AddedToken::from("!", true)])
    }

    /// The published vocabulary.
    fn published(pad: &str, added: &[tokenizers::AddedToken]) -> Self {
        let (vocab, merges) = published::vocabulary();
        let start = tokenizers::AddedToken::from(START, true).normalized(true);
        let folder = Folder {
            vocabulary: PathBuf::new(),
            vocab,
            merges,
            start: START.to_string(),
            end: END.to_string(),
            pad: pad.to_string(),
            unknown: Some(END.to_string()),
            max_length: folder::DEFAULT_MAX_LENGTH,
            added: [&[start], added].concat(),
            listed: BTreeMap::new(),
        };
        Self::new(folder).expect("the published vocabulary is complete")
    }

    fn new(folder: Folder) -> Result<Self, TokenizerError> {
        let mut model = BPE::builder()
            .vocab_and_merges(folder.vocab, folder.merges)
            .end_of_word_suffix(END_OF_WORD.to_string());
        if let Some(unknown) = folder.unknown {
            model = model.unk_token(unknown);
        }
        let model = model.build().map_err(|error| TokenizerError::Parse {
            path: folder.vocabulary.clone(),
            message: format!("its merges do not fit its tokens: {error}"),
        })?;
        let mut tokenizer = clip(model);
        tokenizer.add_tokens(&folder.added);
        let mut seen = HashSet::new();
        for (found, (path, token)) in folder.listed {
            let token = token.content;
            let id = tokenizer.token_to_id(&token).expect(ADDED);
            if found != id {
                let is_word = tokenizer.get_model().token_to_id(&token).is_some();
                let reason = if is_word {
                    format!("it has id {id} in the vocabulary")
                } else if seen.contains(&token) {
                    format!("it has id {id} already")
                } else {
                    format!(
                        "the next free id is {id}: versions 4 and 5 of transformers disagree \
                         about it"
                    )
                };
                return Err(TokenizerError::Id {
                    path,
                    token,
                    found,
                    reason,
                });
            }
            seen.insert(token);
        }
        let id = |token: &str| tokenizer.token_to_id(token).expect(ADDED);
        let (start, end, pad) = (id(&folder.start), id(&folder.end), id(&folder.pad));
        let tokenizer = Arc::new(tokenizer);
        let mut tokenizer = Self {
            plain: tokenizer.clone(),
            tokenizer,
            concepts: Vec::new(),
            start,
            end,
            pad,
            max_length: folder.max_length,
        };
        tokenizer.find_concepts();
        Ok(tokenizer)
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

    /// Id of a token of the vocabulary, such as `,</w>`, or of an added one.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The largest id, plus one: the least vocabulary that a text encoder needs.
    pub fn vocab_size(&self) -> usize {
        let largest = self.tokenizer.get_vocab(true).into_values().max();
        largest.map_or(0, |id| id as usize + 1)
    }

    /// The tokens that were added to the vocabulary, by id: the special ones, and words such as
    /// those of a textual inversion.
    pub fn added_tokens(&self) -> Vec<AddedToken> {
        let added = self.tokenizer.get_added_tokens_decoder();
        let mut tokens: Vec<AddedToken> = added
            .into_iter()
            .map(|(id, token)| AddedToken {
                id,
                content: token.content,
                special: token.special,
                normalized: token.normalized,
                lstrip: token.lstrip,
                rstrip: token.rstrip,
                single_word: token.single_word,
            })
            .collect();
        tokens.sort_by_key(|token| token.id);
        tokens
    }

    /// Ids of the whole text with start and end, neither cut nor padded, and not
    /// [expanded](Self::expand).
    ///
    /// # Errors
    /// If the tokenizers crate refuses the text.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = ids(&self.tokenizer, text)?;
        ids.insert(0, self.start);
        ids.push(self.end);
        Ok(ids)
    }

    /// Ids of the text, [expanded](Self::expand), then cut or padded to
    /// [`max_length`](Self::max_length).
    ///
    /// # Errors
    /// If the tokenizers crate refuses the text.
    pub fn encode(&self, text: &str) -> Result<Encoding, TokenizerError> {
        let mut ids = self.tokenize(&self.expand(text)?)?;
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
        let text = self.tokenizer.decode(ids, false).map_err(refused)?;
        Ok(text.replace(END_OF_WORD, " ").trim().to_string())
    }
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
    let encoding = tokenizer.encode(text, false).map_err(refused)?;
    Ok(encoding.get_ids().to_vec())
}

fn refused(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Encode(error.to_string())
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
