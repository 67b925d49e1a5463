//! Weighted prompts of any length, in chunks of 75 tokens, with the arithmetic of AUTOMATIC1111's
//! web UI: each token's hidden state is multiplied by its weight, then all of a chunk are scaled so
//! that their mean stays, `z ← w z · mean(z) / mean(w z)`.

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use thiserror::Error;

use crate::prompt_syntax::{LoraTag, ParsedPrompt, PromptSyntaxError, Span};
use crate::tokenizer::Concept;
use crate::{CLIPTextModel, CLIPTokenizer, TokenizerError};

/// A chunk that fills up is cut after its last comma, if that is among this many of its tokens.
const BACKTRACK: usize = 20;

/// Why a weighted prompt could not be cut into chunks.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PromptError {
    /// The prompt is malformed, or uses a part of the syntax that is not supported.
    #[error(transparent)]
    Syntax(#[from] PromptSyntaxError),
    /// The tokenizer refuses the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A textual inversion does not fit into a chunk.
    #[error("`{name}` has {vectors} vectors, but a chunk has {places} places")]
    Vectors {
        /// Its name.
        name: String,
        /// Its vectors.
        vectors: usize,
        /// Tokens of a chunk, without start and end.
        places: usize,
    },
}

/// What the text encoder takes at once.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptChunk {
    /// Start, tokens, end and padding: 77 ids for CLIP.
    pub ids: Vec<u32>,
    /// A weight an id.
    pub weights: Vec<f32>,
}

/// A prompt in chunks.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptChunks {
    chunks: Vec<PromptChunk>,
    empty: PromptChunk,
    loras: Vec<LoraTag>,
}

impl PromptChunks {
    /// Parses a prompt ([`prompt_syntax`](crate::prompt_syntax)) and cuts it into chunks, at least
    /// one. Names of textual inversions are matched as whole words, in upper and lower case; those
    /// that begin or end with punctuation, anywhere. Their vectors stay in one chunk.
    ///
    /// # Errors
    /// If the prompt cannot be parsed, or a textual inversion has too many vectors for a chunk.
    pub fn new(tokenizer: &CLIPTokenizer, prompt: &str) -> Result<Self, PromptError> {
        let prompt = ParsedPrompt::new(prompt)?;
        let mut builder = Builder::new(tokenizer);
        for span in &prompt.spans {
            match span {
                Span::Break => builder.next_chunk(),
                Span::Text { text, weight } => builder.push(text, *weight as f32)?,
            }
        }
        if !builder.open.is_empty() || builder.chunks.is_empty() {
            builder.next_chunk();
        }
        Ok(Self {
            chunks: builder.chunks,
            empty: close(tokenizer, Vec::new()),
            loras: prompt.loras,
        })
    }

    /// The chunks, at least one.
    pub fn chunks(&self) -> &[PromptChunk] {
        &self.chunks
    }

    /// The LoRAs that the prompt names.
    pub fn loras(&self) -> &[LoraTag] {
        &self.loras
    }

    /// Fills up with empty chunks, so that the prompts of a batch, and the negative ones, have
    /// equal numbers of them.
    pub fn pad(&mut self, chunks: usize) {
        let chunks = chunks.max(self.chunks.len());
        self.chunks.resize(chunks, self.empty.clone());
    }
}

/// A token with its weight.
type Token = (u32, f32);

struct Builder<'a> {
    tokenizer: &'a CLIPTokenizer,
    /// Places of a chunk.
    size: usize,
    comma: Option<u32>,
    /// Names of textual inversions, those of the most tokens first.
    concepts: Vec<&'a Concept>,
    chunks: Vec<PromptChunk>,
    open: Vec<Token>,
    /// Where in the open chunk its last comma is.
    last_comma: Option<usize>,
}

impl<'a> Builder<'a> {
    fn new(tokenizer: &'a CLIPTokenizer) -> Self {
        let mut concepts: Vec<&Concept> = tokenizer.concepts().iter().collect();
        concepts.sort_by_key(|concept| std::cmp::Reverse(concept.spelling.len()));
        Self {
            tokenizer,
            size: tokenizer.max_length() - 2,
            comma: tokenizer.token_to_id(",</w>"),
            concepts,
            chunks: Vec::new(),
            open: Vec::new(),
            last_comma: None,
        }
    }

    fn next_chunk(&mut self) {
        let tokens = std::mem::take(&mut self.open);
        self.chunks.push(close(self.tokenizer, tokens));
        self.last_comma = None;
    }

    fn push(&mut self, text: &str, weight: f32) -> Result<(), PromptError> {
        let ids = self.tokenizer.spell(text)?;
        let mut rest = &ids[..];
        while let Some(id) = rest.first() {
            let is_full = self.open.len() == self.size;
            if Some(*id) == self.comma {
                self.last_comma = Some(self.open.len());
            } else if is_full
                && let Some(comma) = self.last_comma
                && self.size - comma <= BACKTRACK
            {
                let moved = self.open.split_off(comma + 1);
                self.next_chunk();
                self.open = moved;
            }
            if self.open.len() == self.size {
                self.next_chunk();
            }

            let mut concepts = self.concepts.iter().copied();
            match concepts.find(|concept| rest.starts_with(&concept.spelling)) {
                None => {
                    self.open.push((*id, weight));
                    rest = &rest[1..];
                }
                Some(concept) => {
                    let vectors = concept.ids.len();
                    if vectors > self.size {
                        return Err(PromptError::Vectors {
                            name: concept.name.clone(),
                            vectors,
                            places: self.size,
                        });
                    }
                    if self.open.len() + vectors > self.size {
                        self.next_chunk();
                    }
                    self.open.extend(concept.ids.iter().map(|id| (*id, weight)));
                    rest = &rest[concept.spelling.len()..];
                }
            }
        }
        Ok(())
    }
}

/// A chunk with start, end and padding, which have weight 1.
fn close(tokenizer: &CLIPTokenizer, tokens: Vec<Token>) -> PromptChunk {
    let mut all = vec![(tokenizer.start_id(), 1.0)];
    all.extend(tokens);
    all.push((tokenizer.end_id(), 1.0));
    all.resize(tokenizer.max_length(), (tokenizer.pad_id(), 1.0));
    let (ids, weights) = all.into_iter().unzip();
    PromptChunk { ids, weights }
}

impl<B: Backend> CLIPTextModel<B> {
    /// Embeddings of weighted prompts, after the final norm of the layer `clip_skip` before the
    /// last; the chunks of a prompt follow each other: `[batch, chunks · 77, hidden_size]`.
    ///
    /// The mean that stays is that of a chunk in the whole batch, as in AUTOMATIC1111's web UI. So
    /// prompts and negative prompts are encoded by calls of their own.
    ///
    /// # Panics
    /// If there is no prompt, the prompts have different numbers of chunks
    /// ([`PromptChunks::pad`]), or there are fewer than `clip_skip` layers.
    pub fn forward_weighted(&self, prompts: &[PromptChunks], clip_skip: usize) -> Tensor<B, 3> {
        let numbers: Vec<usize> = prompts.iter().map(|prompt| prompt.chunks.len()).collect();
        let chunks = numbers[0];
        assert!(
            numbers.iter().all(|number| *number == chunks),
            "prompts of a batch have {numbers:?} chunks"
        );
        let encoded = (0..chunks).map(|index| {
            let batch: Vec<&PromptChunk> =
                prompts.iter().map(|prompt| &prompt.chunks[index]).collect();
            self.forward_chunk(&batch, clip_skip)
        });
        Tensor::cat(encoded.collect(), 1)
    }

    /// A chunk of each prompt.
    fn forward_chunk(&self, batch: &[&PromptChunk], clip_skip: usize) -> Tensor<B, 3> {
        let device = self.token_embedding().device();
        let shape = [batch.len(), batch[0].ids.len()];
        let ids = batch.iter().flat_map(|chunk| &chunk.ids);
        let ids: Vec<i64> = ids.copied().map(i64::from).collect();
        let ids = Tensor::<B, 2, Int>::from_data(TensorData::new(ids, shape), &device);
        let hidden = self.forward_skip(ids, clip_skip);

        let weights: Vec<f32> = batch
            .iter()
            .flat_map(|chunk| chunk.weights.clone())
            .collect();
        if weights.iter().all(|weight| *weight == 1.0) {
            return hidden;
        }
        let weights = TensorData::new(weights, [shape[0], shape[1], 1]);
        let weights = Tensor::<B, 3>::from_data(weights, (&device, DType::F32));
        let dtype = hidden.dtype();
        let hidden = hidden.cast(DType::F32);
        let weighted = hidden.clone() * weights;
        let scale = hidden.mean() / weighted.clone().mean();
        (weighted * scale.unsqueeze()).cast(dtype)
    }
}
