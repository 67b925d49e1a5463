#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod adapters;
mod canny;
mod clip_image_processor;
mod components;
mod ddpm;
mod error;
mod folder;
mod generation;
mod guidance;
mod image_processor;
mod mask;
mod preview;
mod resize;
mod safety_checker;
mod single_file;
mod stable_diffusion;

pub mod convert;
#[cfg(feature = "hub")]
pub mod hub;
pub mod inspect;
pub mod latents;

pub use adapters::{AdaptedComponent, Adapter, AdapterError, adapter_names, find_adapter};
pub use canny::canny;
pub use clip_image_processor::{CLIPImageProcessor, CropSize, ResizedSize};
pub use components::component_folder;
pub use ddpm::{DDIMOptions, DDIMPipeline, DDPMOptions, DDPMPipeline};
pub use error::PipelineError;
pub use folder::{MODEL_INDEX_NAME, ModelIndex, PipelineKind};
pub use generation::{Generated, StageTimes, StepEvent, generators, random_seed};
pub use guidance::{guide, rescale_noise};
pub use image_processor::{load_image, to_images, to_unit_range};
pub use preview::{LatentPreview, LatentRgb};
pub use safety_checker::{
    SafetyChecker, SafetyCheckerConfig, SafetyScores, StableDiffusionSafetyChecker,
};
pub use single_file::{
    FileKind, SingleFileOptions, StableDiffusionFile, load_controlnet, load_vae,
};
pub use stable_diffusion::{
    EncodedPrompt, PreparedPrompt, PromptSyntax, StableDiffusionControl,
    StableDiffusionImg2ImgOptions, StableDiffusionInpaintOptions, StableDiffusionInputs,
    StableDiffusionOptions, StableDiffusionParts, StableDiffusionPipeline,
};

pub use diffuse_clip as clip;
pub use diffuse_schedulers as schedulers;
pub use diffuse_unet as unet;
pub use diffuse_vae as vae;

pub use diffuse_nn::ModelPath;
pub use diffuse_nn::checkpoint::TensorSource;
pub use diffuse_nn::files::{check_regular, replace_file};
pub use diffuse_nn::pretrained::{LoadOptions, Pretrained};

/// The documents outside this crate whose snippets are tests.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../../../README.md")]
    struct Readme;
    #[doc = include_str!("../../../docs/tutorial.md")]
    struct Tutorial;
    #[doc = include_str!("../../../docs/image-to-image.md")]
    struct ImageToImage;
    #[doc = include_str!("../../../docs/browser.md")]
    struct Browser;
}
