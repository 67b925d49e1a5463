#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod autoencoder;
mod autoencoder_kl;
mod autoencoder_tiny;
mod posterior;
mod tiling;

pub use autoencoder::{Autoencoder, EncoderOutput};
pub use autoencoder_kl::{
    AutoencoderKL, AutoencoderKLConfig, AutoencoderKLDownBlock, AutoencoderKLUpBlock, Decoder,
    Encoder,
};
pub use autoencoder_tiny::{
    AutoencoderTiny, AutoencoderTinyBlock, AutoencoderTinyConfig, DecoderTiny, EncoderTiny,
    TinyLayer, Upsample2x,
};
pub use posterior::DiagonalGaussian;

pub use diffuse_nn::config::{ConfigError, ModelConfig, SampleSize};
pub use diffuse_nn::pretrained::{LoadOptions, Pretrained, PretrainedError};
