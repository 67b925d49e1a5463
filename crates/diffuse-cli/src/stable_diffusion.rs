//! Loading a Stable Diffusion with everything that is put on top of it.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use burn::tensor::backend::Backend;
use diffuse_builtin::ADAPTERS;
use diffuse_pipelines::clip::TextualInversion;
use diffuse_pipelines::clip::prompt_syntax::{LoraTag, take_lora_tags};
use diffuse_pipelines::schedulers::{Scheduler, SchedulerConfig, scheduler_from_config};
use diffuse_pipelines::vae::Autoencoder;
use diffuse_pipelines::{
    Adapter, FileKind, LoadOptions, Pretrained, SingleFileOptions, StableDiffusionPipeline,
    find_adapter, load_vae,
};

use crate::args::{Model, StableDiffusionWeights};
use crate::model::Source;

/// Loads a pipeline with the checkpoint's scheduler. Names of LoRAs are taken out of the prompts,
/// if there is a folder for them.
pub fn load<B: Backend>(
    source: &Source,
    weights: &StableDiffusionWeights,
    prompts: &mut [String],
    load: &LoadOptions,
    device: &B::Device,
) -> Result<StableDiffusionPipeline<B>> {
    let adapters = adapters(weights, prompts)?;
    let embeddings = embeddings(weights)?;
    let path = &source.folder;
    let single_file = &weights.single_file;
    let mut pipeline = if path.is_file() {
        let options = SingleFileOptions {
            load: load.clone(),
            config: single_file.config.clone(),
            ema: single_file.ema,
        };
        StableDiffusionPipeline::<B>::from_single_file_with(path, &options, device)?
    } else {
        let file_options = [
            ("--config", single_file.config.is_some()),
            ("--ema", single_file.ema),
        ];
        if let Some((option, _)) = file_options.into_iter().find(|(_, given)| *given) {
            bail!(
                "`{option}` is for a single file, but `{}` is a folder",
                path.display()
            );
        }
        match weights.no_safety_checker {
            true => StableDiffusionPipeline::<B>::from_pretrained_without_safety_checker(
                path, load, device,
            )?,
            false => StableDiffusionPipeline::<B>::from_pretrained_with(path, load, device)?,
        }
    };
    if let Some(path) = &weights.vae {
        let config = match &pipeline.vae {
            Autoencoder::KL(vae) => Some(vae.config().clone()),
            _ => None,
        };
        let vae = load_vae(path, config.as_ref(), load, device)?;
        check_vae(&pipeline.vae, &vae, path)?;
        pipeline.vae = vae;
    }
    for embedding in &embeddings {
        pipeline.load_textual_inversion(embedding)?;
    }
    if !adapters.is_empty() {
        pipeline.set_adapters(&adapters)?;
    }
    Ok(pipeline)
}

/// The scheduler of this name, by default the checkpoint's, with the options that are given.
pub fn scheduler<B: Backend>(
    checkpoint: &SchedulerConfig,
    name: Option<&str>,
    model: &Model,
) -> Result<Box<dyn Scheduler<B>>> {
    let options = model.scheduler_options();
    Ok(scheduler_from_config(checkpoint, name, &options)?)
}

/// A VAE in place of another must have latents of the same kind.
pub fn check_vae<B: Backend>(
    own: &Autoencoder<B>,
    other: &Autoencoder<B>,
    path: &Path,
) -> Result<()> {
    let (expected, found) = (own.latent_channels(), other.latent_channels());
    if found != expected {
        bail!(
            "the latents of `{}` have {found} channels, the model's have {expected}",
            path.display()
        );
    }
    Ok(())
}

/// The LoRAs of the options, then those that prompts name.
fn adapters(weights: &StableDiffusionWeights, prompts: &mut [String]) -> Result<Vec<Adapter>> {
    let mut adapters = Vec::new();
    for lora in &weights.lora {
        let mut adapter = open_lora(&lora.path)?.with_strength(lora.strength);
        if let Some(strength) = lora.text_encoder {
            adapter = adapter.with_text_encoder_strength(strength);
        }
        adapters.push(adapter);
    }
    let Some(folder) = &weights.lora_dir else {
        return Ok(adapters);
    };
    let mut named: Option<Vec<LoraTag>> = None;
    for prompt in prompts {
        let (text, tags) = take_lora_tags(prompt)?;
        *prompt = text;
        match &named {
            Some(others) if *others != tags => {
                bail!("all prompts of a batch have the same LoRAs: they change the model");
            }
            _ => named = Some(tags),
        }
    }
    for tag in named.unwrap_or_default() {
        let adapter = Adapter::open(find_lora(folder, &tag.name)?)?;
        let adapter = adapter.with_strength(tag.unet);
        adapters.push(adapter.with_text_encoder_strength(tag.text_encoder));
    }
    Ok(adapters)
}

/// A LoRA in a file or folder, or the built-in one of this name.
fn open_lora(path: &Path) -> Result<Adapter> {
    let mut builtin = ADAPTERS.iter().filter(|_| !path.exists());
    Ok(match builtin.find(|(name, _)| path == Path::new(name)) {
        Some((name, bytes)) => Adapter::from_bytes(name, bytes.to_vec())?,
        None => Adapter::open(path)?,
    })
}

/// The file of a LoRA that a prompt names.
fn find_lora(folder: &Path, name: &str) -> Result<PathBuf> {
    match find_adapter(folder, name) {
        Some(file) => Ok(file),
        None => bail!(
            "`{}` has no `{name}.safetensors`, which a prompt names",
            folder.display()
        ),
    }
}

fn embeddings(weights: &StableDiffusionWeights) -> Result<Vec<TextualInversion>> {
    let open = |path: &PathBuf| {
        TextualInversion::open(path).or_else(|error| match FileKind::read(path) {
            Err(_) | Ok(FileKind::TextualInversion | FileKind::Unknown) => Err(error.into()),
            Ok(kind) => bail!("`{}` is {kind}, not a textual inversion", path.display()),
        })
    };
    let embeddings = weights
        .embedding
        .iter()
        .map(|embedding| match &embedding.name {
            Some(name) => Ok(open(&embedding.path)?.with_name(name)),
            None => open(&embedding.path),
        });
    embeddings.collect()
}
