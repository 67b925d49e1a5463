//! Textual inversion (Gal et al. 2022, <https://arxiv.org/abs/2208.01618>): vectors of the token
//! embedding that were trained for a word of their own.

use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData, backend::Backend};
use diffuse_nn::checkpoint::{Checkpoint, CheckpointError};
use thiserror::Error;

use crate::{CLIPTextModel, CLIPTokenizer, TokenizerError};

/// Why a textual inversion could not be loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TextualInversionError {
    /// The file cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The file holds something else.
    #[error("`{}` is not a textual inversion for this model: {message}", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What it is, or what is wrong.
        message: String,
    },
    /// The vectors are of another size than the text encoder's.
    #[error(
        "the vectors of `{}` have {found} numbers, but the text encoder's have {expected}{}",
        path.display(),
        hint(*found)
    )]
    Width {
        /// The file.
        path: PathBuf,
        /// Size of its vectors.
        found: usize,
        /// The text encoder's hidden size.
        expected: usize,
    },
    /// Its name cannot be added to the tokenizer.
    #[error("cannot add `{}`", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: TokenizerError,
    },
}

/// What the size of vectors says about their model.
fn hint(width: usize) -> &'static str {
    match width {
        768 => ": 768 is for Stable Diffusion 1",
        1024 => ": 1024 is for Stable Diffusion 2",
        1280 => ": 1280 is for the second text encoder of Stable Diffusion XL",
        _ => "",
    }
}

/// Vectors for a word of prompts.
#[derive(Debug, Clone)]
pub struct TextualInversion {
    path: PathBuf,
    name: String,
    token: Option<String>,
    /// `[vectors, width]`
    vectors: TensorData,
}

impl TextualInversion {
    /// Reads a file: a `.bin` of Diffusers, `{token: tensor}`, or a tensor alone; a `.safetensors`
    /// with one tensor; or a `.pt` of A1111, with its vectors in `string_to_param`.
    ///
    /// # Errors
    /// If the file cannot be read or holds something else, such as vectors for Stable Diffusion XL.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, TextualInversionError> {
        let path = path.as_ref();
        let extension = path.extension().and_then(|extension| extension.to_str());
        let extension = extension.unwrap_or_default().to_ascii_lowercase();
        if matches!(
            extension.as_str(),
            "png" | "webp" | "jpg" | "jpeg" | "jxl" | "avif"
        ) {
            return Err(TextualInversionError::Form {
                path: path.to_path_buf(),
                message: "vectors inside images are not supported".into(),
            });
        }
        Self::from_checkpoint(&Checkpoint::open(path)?)
    }

    /// Reads an open file, as [`open`](Self::open) does.
    ///
    /// # Errors
    /// As for `open`.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, TextualInversionError> {
        let path = checkpoint.path().to_path_buf();
        let form = |message: String| TextualInversionError::Form {
            path: path.clone(),
            message,
        };
        let tensors = checkpoint.tensors();
        for key in ["clip_l", "clip_g"] {
            if tensors.contains_key(key) {
                let message = format!("`{key}` is for Stable Diffusion XL");
                return Err(form(message));
            }
        }
        let mut entries = tensors.iter();
        let (Some((key, info)), None) = (entries.next(), entries.next()) else {
            let message = format!("it has {} tensors, not one", tensors.len());
            return Err(form(message));
        };
        let shape = match info.shape[..] {
            [width] if width > 0 => [1, width],
            [vectors, width] if vectors > 0 && width > 0 => [vectors, width],
            _ => {
                let message = format!(
                    "its tensor `{key}` has shape {:?}, not [vectors, width]",
                    info.shape
                );
                return Err(form(message));
            }
        };
        let mut vectors = checkpoint.read_f32(key)?;
        vectors.shape = shape.into();
        let name = path.file_stem().map(|stem| stem.to_string_lossy());
        // The keys of a tensor alone, of A1111's files, and of those without a token.
        let is_token = !matches!(key.as_str(), "" | "*" | "emb_params");
        Ok(Self {
            name: name.unwrap_or_default().into_owned(),
            token: is_token.then(|| key.clone()),
            path,
            vectors,
        })
    }

    /// The same vectors under another name.
    pub fn with_name(self, name: impl Into<String>) -> Self {
        let name = name.into();
        Self { name, ..self }
    }

    /// What prompts call it; the file's name without its extension, unless it was given another.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The token that the file itself names.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Number of vectors, each of which takes the place of a token.
    pub fn num_vectors(&self) -> usize {
        self.vectors.shape[0]
    }

    /// Size of a vector: 768 for Stable Diffusion 1.
    pub fn width(&self) -> usize {
        self.vectors.shape[1]
    }

    /// Adds the name to the tokenizer and the vectors to the text encoder.
    ///
    /// # Errors
    /// If the vectors are of another size than the text encoder's, or the tokenizer has the name
    /// already; neither is changed then.
    pub fn load_into<B: Backend>(
        &self,
        tokenizer: &mut CLIPTokenizer,
        text_encoder: &mut CLIPTextModel<B>,
    ) -> Result<(), TextualInversionError> {
        let weight = text_encoder.token_embedding();
        let [known, expected] = weight.dims();
        if self.width() != expected {
            return Err(TextualInversionError::Width {
                path: self.path.clone(),
                found: self.width(),
                expected,
            });
        }
        let tokens = tokenizer.vocab_size();
        if tokens > known {
            return Err(TextualInversionError::Form {
                path: self.path.clone(),
                message: format!("the tokenizer has {tokens} tokens, the text encoder {known}"),
            });
        }
        let options = (&weight.device(), weight.dtype());
        let vectors = Tensor::from_data(self.vectors.clone(), options);
        let added = tokenizer.add_token(&self.name, self.num_vectors());
        let first_id = added.map_err(|source| TextualInversionError::Token {
            path: self.path.clone(),
            source,
        })?;
        text_encoder.set_token_embeddings(first_id as usize, vectors);
        Ok(())
    }
}
