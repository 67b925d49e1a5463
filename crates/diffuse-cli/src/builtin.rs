//! The small models that the program carries, so that it makes images without a download.
//!
//! They are trained on drawn scenes (`docs/training.md`), and lie in `assets` as the folders that
//! any checkpoint is.

use std::fs;

use anyhow::{Context, Result};
use diffuse_pipelines::PipelineKind;
use tempfile::TempDir;

/// What a small model is, and how it is best used.
pub struct Builtin {
    /// What an image's record calls it.
    pub name: &'static str,
    /// Number of steps by default.
    pub steps: usize,
    /// Guidance by default, of a model that has prompts.
    pub guidance_scale: f64,
    files: &'static [(&'static str, &'static [u8])],
}

/// Names of files in a folder of `assets`, with what is in them.
macro_rules! files {
    ($folder:literal: $($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!("../assets/", $folder, "/", $name)))),+]
    };
}

static SCENES: Builtin = Builtin {
    name: "scenes",
    steps: 25,
    guidance_scale: 2.0,
    files: files!("scenes":
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ),
};

static SCENES_DDPM: Builtin = Builtin {
    name: "scenes-ddpm",
    steps: 100,
    guidance_scale: 1.0,
    files: files!("scenes-ddpm":
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ),
};

impl Builtin {
    /// The model for a pipeline.
    pub fn of(pipeline: PipelineKind) -> &'static Self {
        match pipeline {
            PipelineKind::StableDiffusion => &SCENES,
            PipelineKind::Unconditional => &SCENES_DDPM,
        }
    }

    /// Writes the model's folder, which is gone when the result is dropped.
    pub fn unpack(&self) -> Result<TempDir> {
        let folder = tempfile::Builder::new()
            .prefix("diffuse-")
            .tempdir()
            .context("cannot make a temporary folder for the built-in model")?;
        for (name, bytes) in self.files {
            let path = folder.path().join(name);
            let parent = path.parent().unwrap_or(folder.path());
            fs::create_dir_all(parent)
                .and_then(|()| fs::write(&path, bytes))
                .with_context(|| format!("cannot write `{}`", path.display()))?;
        }
        Ok(folder)
    }
}
