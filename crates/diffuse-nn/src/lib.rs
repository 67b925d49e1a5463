#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod activation;
mod attention;
mod blocks;
mod conv;
mod freeu;
mod linear;
mod model_path;
mod norm;
mod resnet;
mod sampling;
mod text_context;
mod time_embedding;
mod transformer;

pub mod checkpoint;
pub mod config;
pub mod files;
pub mod ops;
pub mod pretrained;

pub use activation::Activation;
pub use attention::{Attention, AttentionConfig};
pub use blocks::{
    DownBlock2D, DownBlock2DConfig, Downsampler, DownsamplerConfig, MidBlock2D, MidBlock2DConfig,
    SpatialAttention, SpatialAttentionConfig, UpBlock2D, UpBlock2DConfig, Upsampler,
    UpsamplerConfig,
};
pub use conv::{Conv2d, Conv2dConfig};
pub use freeu::FreeUFactors;
pub use linear::{Linear, LinearConfig};
pub use model_path::ModelPath;
pub use norm::{GroupNorm, GroupNormConfig, LayerNorm, LayerNormConfig};
pub use resnet::{ResnetBlock2D, ResnetBlock2DConfig, TimeScaleShift};
pub use sampling::{Downsample2D, Downsample2DConfig, Upsample2D, Upsample2DConfig};
pub use text_context::TextContext;
pub use time_embedding::{
    GaussianFourierProjection, GaussianFourierProjectionConfig, Timestep, TimestepEmbedding,
    TimestepEmbeddingConfig, Timesteps, guidance_embedding,
};
pub use transformer::{
    BasicTransformerBlock, BasicTransformerBlockConfig, FeedForward, FeedForwardConfig, Geglu,
    Projection, Transformer2DModel, Transformer2DModelConfig,
};
