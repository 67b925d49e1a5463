#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod autoencoder_kl;
mod posterior;

pub use autoencoder_kl::{
    AutoencoderKL, AutoencoderKLConfig, AutoencoderKLDownBlock, AutoencoderKLUpBlock, Decoder,
    Encoder,
};
pub use posterior::DiagonalGaussian;

pub use diffuse_nn::config::{ConfigError, ModelConfig, SampleSize};
pub use diffuse_nn::pretrained::{LoadOptions, Pretrained, PretrainedError};
