#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod text_model;
mod tokenizer;

pub use text_model::{
    CLIPAttention, CLIPEncoder, CLIPEncoderLayer, CLIPMlp, CLIPTextConfig, CLIPTextEmbeddings,
    CLIPTextModel, CLIPTextTransformer, TextOutput,
};
pub use tokenizer::{CLIPTokenizer, Encoding, TokenizerError};

pub use diffuse_nn::config::{ConfigError, ModelConfig};
pub use diffuse_nn::pretrained::{LoadOptions, Pretrained, PretrainedError};
