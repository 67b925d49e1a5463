//! The small models that the program carries, so that it makes images without a download.

use anyhow::{Context, Result};
use diffuse_builtin::{BuiltinModel, SCENES, SCENES_DDPM};
use diffuse_pipelines::PipelineKind;
use tempfile::TempDir;

/// The model for a pipeline.
pub fn builtin(pipeline: PipelineKind) -> &'static BuiltinModel {
    match pipeline {
        PipelineKind::StableDiffusion => &SCENES,
        PipelineKind::Unconditional => &SCENES_DDPM,
    }
}

/// Writes a model into a temporary folder, which is deleted when the result is dropped.
pub fn unpack(model: &BuiltinModel) -> Result<TempDir> {
    let folder = tempfile::Builder::new()
        .prefix("diffuse-")
        .tempdir()
        .context("cannot make a temporary folder for the built-in model")?;
    model.unpack(&folder)?;
    Ok(folder)
}
