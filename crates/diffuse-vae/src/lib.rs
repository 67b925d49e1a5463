#![doc = include_str!("../README.md")]

mod autoencoder_kl;
mod posterior;

pub use autoencoder_kl::{
    AutoencoderKL, AutoencoderKLConfig, AutoencoderKLDownBlock, AutoencoderKLUpBlock, Decoder,
    Encoder,
};
pub use posterior::DiagonalGaussian;

pub use diffuse_nn::config::{ConfigError, ModelConfig, SampleSize};
pub use diffuse_nn::pretrained::{LoadOptions, Pretrained, PretrainedError};
