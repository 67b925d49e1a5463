#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod class_embedding;
mod controlnet;
mod levels;
mod options;
mod unet_2d;
mod unet_2d_condition;

pub use class_embedding::{ClassEmbedType, ClassEmbedding, ClassLabels};
pub use controlnet::{
    ChannelOrder, ControlNetConditioningEmbedding, ControlNetConfig, ControlNetModel,
    ControlNetOutput,
};
pub use levels::ResampleType;
pub use options::{DeepCache, FreeU, UNet2DConditionOptions};
pub use unet_2d::{
    TimeEmbeddingType, UNet2DConfig, UNet2DDownBlock, UNet2DMidBlock, UNet2DModel, UNet2DUpBlock,
};
pub use unet_2d_condition::{
    UNet2DConditionConfig, UNet2DConditionDownBlock, UNet2DConditionMidBlock, UNet2DConditionModel,
    UNet2DConditionUpBlock,
};

pub use diffuse_nn::config::{ConfigError, ModelConfig, PerLevel, SampleSize};
pub use diffuse_nn::pretrained::{LoadOptions, Pretrained, PretrainedError};
pub use diffuse_nn::{TextContext, Timestep};
