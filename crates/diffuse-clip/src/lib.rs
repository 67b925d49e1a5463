#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod encoder;
mod prompt_chunks;
pub mod prompt_syntax;
mod text_model;
mod textual_inversion;
mod tokenizer;
mod vision_model;

pub use encoder::{CLIPAttention, CLIPEncoder, CLIPEncoderLayer, CLIPMlp};
pub use prompt_chunks::{PromptChunk, PromptChunks, PromptError};
pub use text_model::{
    CLIPTextConfig, CLIPTextEmbeddings, CLIPTextModel, CLIPTextTransformer, TextOutput,
};
pub use textual_inversion::{TextualInversion, TextualInversionError};
pub use tokenizer::{AddedToken, CLIPTokenizer, Encoding, TokenizerError};
pub use vision_model::{
    CLIPVisionConfig, CLIPVisionEmbeddings, CLIPVisionModel, CLIPVisionTransformer, VisionOutput,
};

pub use diffuse_nn::config::{ConfigError, ModelConfig};
pub use diffuse_nn::pretrained::{LoadOptions, Pretrained, PretrainedError};
