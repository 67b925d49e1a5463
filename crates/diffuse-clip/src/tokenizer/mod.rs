//! CLIP's byte-level pair encoding (Radford et al. 2021, <https://arxiv.org/abs/2103.00020>,
//! section 2.4).

mod folder;
mod save;
mod vocabulary;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, Replace, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{Model, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

use folder::Folder;

/// What a text is split into before the pair encoding.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
const END_OF_WORD: &str = "</w>";

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

/// A name in prompts that stands for one or more vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Concept {
    /// What prompts say.
    pub name: String,
    /// The ids of the name in the tokenizer without concepts that were added at run time.
    pub spelling: Vec<u32>,
    /// The ids of its vectors.
    pub ids: Vec<u32>,
}

/// CLIP's tokenizer: text to token ids.
#[derive(Debug, Clone)]
pub struct CLIPTokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Without the tokens of [`add_token`](Self::add_token).
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
    pub fn from_pretrained(folder: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        Self::new(Folder::read(folder.as_ref())?)
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
        let (vocab, merges) = vocabulary::vocabulary();
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
            let id = tokenizer.token_to_id(&token).expect("it was added");
            if found != id {
                let is_word = tokenizer.get_model().token_to_id(&token).is_some();
                let reason = if is_word {
                    format!("it has id {id} in the vocabulary")
                } else if seen.contains(&token) {
                    format!("it has id {id} already")
                } else {
                    format!(
                        "the next free id is {id}: versions 4 and 5 of transformers disagree about it"
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
        let id = |token: &str| {
            tokenizer
                .token_to_id(token)
                .ok_or_else(|| TokenizerError::NoToken {
                    path: folder.vocabulary.clone(),
                    token: token.to_string(),
                })
        };
        let (start, end, pad) = (id(&folder.start)?, id(&folder.end)?, id(&folder.pad)?);
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

    /// Added tokens `name`, `name_1`, ... are one concept.
    fn find_concepts(&mut self) {
        let added: BTreeMap<String, u32> = self
            .added_tokens()
            .into_iter()
            .map(|token| (token.content, token.id))
            .collect();
        for (name, id) in &added {
            let more = (1..).map_while(|index| added.get(&format!("{name}_{index}")));
            let ids: Vec<u32> = [id].into_iter().chain(more).copied().collect();
            if ids.len() > 1 {
                self.add_concept(Concept {
                    name: name.clone(),
                    spelling: vec![*id],
                    ids,
                });
            }
        }
    }

    fn add_concept(&mut self, concept: Concept) {
        self.concepts.push(concept);
        self.concepts
            .sort_by_key(|concept| std::cmp::Reverse(concept.name.len()));
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

    /// Adds a word for `vectors` vectors of a textual inversion: the tokens `name`, `name_1`, ...
    /// The id of the first is returned; the others follow. In prompts the name stands for all of
    /// them. [`CLIPTextModel::set_token_embeddings`](crate::CLIPTextModel::set_token_embeddings)
    /// gives the text encoder their vectors.
    ///
    /// # Errors
    /// If the tokenizer has one of these tokens already, or the name is blank.
    ///
    /// # Panics
    /// If `vectors` is zero.
    pub fn add_token(&mut self, name: &str, vectors: usize) -> Result<u32, TokenizerError> {
        assert!(vectors > 0, "a token needs a vector");
        let spelling = self.spell(name)?;
        if spelling.is_empty() {
            return Err(TokenizerError::NoName);
        }
        let more = (1..vectors).map(|index| format!("{name}_{index}"));
        let names: Vec<String> = [name.to_string()].into_iter().chain(more).collect();
        // One more, which would become the last vector.
        let next = format!("{name}_{vectors}");
        let taken = names.iter().chain([&next]);
        if let Some(taken) = taken
            .into_iter()
            .find(|name| self.token_to_id(name).is_some())
        {
            return Err(TokenizerError::Exists(taken.clone()));
        }
        let tokens = names
            .into_iter()
            .map(|name| tokenizers::AddedToken::from(name, false));
        let tokens: Vec<_> = tokens.collect();
        let tokenizer = Arc::make_mut(&mut self.tokenizer);
        tokenizer.add_tokens(&tokens);
        let id = |token: &tokenizers::AddedToken| tokenizer.token_to_id(&token.content);
        let ids: Vec<u32> = tokens.iter().filter_map(id).collect();
        let first = ids[0];
        self.add_concept(Concept {
            name: name.to_string(),
            spelling,
            ids,
        });
        Ok(first)
    }

    /// The concepts, longest name first.
    pub(crate) fn concepts(&self) -> &[Concept] {
        &self.concepts
    }

    /// Ids of a text without start and end, and without what was added at run time.
    pub(crate) fn spell(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        ids(&self.plain, text)
    }

    /// The text with each name of several vectors replaced by the names of all of them: `<x>` by
    /// `<x> <x>_1`. Names are replaced where they are written exactly so, and only if they are among
    /// the text's tokens.
    ///
    /// # Errors
    /// If the tokenizers crate refuses the text.
    pub fn expand<'a>(&self, text: &'a str) -> Result<Cow<'a, str>, TokenizerError> {
        let mut found: Vec<&Concept> = self
            .concepts
            .iter()
            .filter(|concept| concept.ids.len() > 1)
            .collect();
        if !found.is_empty() {
            let tokens: HashSet<u32> = ids(&self.tokenizer, text)?.into_iter().collect();
            found.retain(|concept| tokens.contains(&concept.ids[0]));
        }
        if found.is_empty() {
            return Ok(Cow::Borrowed(text));
        }
        let mut expanded = String::new();
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            let concept = found.iter().find(|concept| rest.starts_with(&concept.name));
            let length = concept.map_or(next.len_utf8(), |concept| concept.name.len());
            let (head, tail) = rest.split_at(length);
            expanded.push_str(head);
            for index in 1..concept.map_or(0, |concept| concept.ids.len()) {
                expanded.push_str(&format!(" {head}_{index}"));
            }
            rest = tail;
        }
        Ok(Cow::Owned(expanded))
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
