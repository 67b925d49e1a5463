//! What all commands with a prompt do: load, generate, write.

use std::fs;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::tensor::backend::Backend;
use diffuse_pipelines::{
    Generated, PipelineKind, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, StepEvent, latents, load_image, random_seed,
};
use image::RgbImage;
use serde_json::{Map, Value, json};

use crate::args::{BackendName, StableDiffusion, StableDiffusionWeights, Switch};
use crate::backend::{self, Job, load_options, with_backend};
use crate::builtin::builtin;
use crate::model::find_model;
use crate::output;
use crate::preview::{self, Preview};
use crate::progress::Progress;
use crate::stable_diffusion;

/// A command with a prompt.
pub trait Task {
    /// Its name.
    const COMMAND: &'static str;
    /// How it can be called.
    const EXAMPLE: &'static str;

    fn common(&self) -> &StableDiffusion;

    fn common_mut(&mut self) -> &mut StableDiffusion;

    /// Generates images with the options that all commands have.
    fn generate<B: Backend>(
        &self,
        pipeline: &StableDiffusionPipeline<B>,
        options: StableDiffusionOptions,
        device: &B::Device,
        on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>>;

    /// The command's own options, for the text chunk of an image.
    fn record(&self) -> Value;
}

/// Runs a command.
pub fn run<T: Task>(mut task: T) -> Result<()> {
    let common = task.common_mut();
    if common.prompts.is_empty() {
        bail!(
            "no prompt is given; one is, for example, in `{}`",
            T::EXAMPLE
        );
    }
    let images = common.prompts.len().saturating_mul(common.run.num_images);
    output::check(&common.run, images)?;
    preview::check(common, images)?;
    if common.run.seed.is_empty() {
        common.run.seed.push(random_seed());
    }
    let backend = backend::choose(common.model.backend, common.run.quiet);
    let device = common.model.device;
    with_backend(backend, device, TaskJob(task))
}

struct TaskJob<T>(T);

impl<T: Task> Job for TaskJob<T> {
    fn run<B: Backend>(self, backend: BackendName, device: B::Device) -> Result<()> {
        let Self(task) = self;
        let args = task.common();
        let kind = PipelineKind::StableDiffusion;
        let source = find_model(&args.model, kind, args.run.quiet)?;
        let start = Instant::now();
        let load = load_options::<B>(&args.model, backend, &device)?;
        let mut prompts = args.prompts.clone();
        let weights = &args.weights;
        let mut pipeline = stable_diffusion::load::<B>(
            &source,
            &args.model,
            weights,
            &mut prompts,
            &load,
            &device,
        )?;
        if args.vae_tiling == Switch::On {
            pipeline.vae.enable_tiling();
        }
        let preview = Preview::new(args, &pipeline.vae, &load, &device)?;
        let loading = start.elapsed();
        // The folder of a model that the program carries is not needed any more.
        drop(source.temporary);
        let mut defaults = StableDiffusionOptions::default();
        if args.model.model.is_none() {
            let model = builtin(kind);
            defaults.num_inference_steps = model.num_inference_steps;
            defaults.guidance_scale = model.guidance_scale;
        }
        let options = StableDiffusionOptions {
            prompt: prompts,
            negative_prompt: args.negative_prompt.clone(),
            prompt_syntax: args.prompt_syntax.into(),
            num_inference_steps: args.steps.unwrap_or(defaults.num_inference_steps),
            timesteps: args.timesteps.clone(),
            sigmas: args.sigmas.clone(),
            guidance_scale: args.guidance_scale.unwrap_or(defaults.guidance_scale),
            guidance_rescale: args.guidance_rescale,
            num_images_per_prompt: args.run.num_images,
            eta: args.eta,
            clip_skip: args.clip_skip,
            seeds: args.run.seed.clone(),
            ..defaults
        };
        let mut record = record::<T>(args, &options);
        if let Value::Object(own) = task.record() {
            record.extend(own);
        }

        output::announce(&args.run);
        let progress = Progress::new(args.run.quiet);
        let on_step = |event: StepEvent<'_, B>| {
            if let Some(preview) = &preview {
                preview.update(&event);
            }
            progress.update(&event)
        };
        let generated = task.generate(&pipeline, options, &device, on_step);
        progress.finish();
        record.insert("backend".into(), backend.to_string().into());
        record.insert("revision".into(), source.commit.into());
        record.insert("dtype".into(), load.dtype.map(backend::name).into());
        record.insert("weights".into(), load.weights.map(backend::name).into());
        output::record_scheduler(&mut record, pipeline.scheduler.config());
        let generated = generated?;
        output::write_timings(&generated, loading, &args.run)?;
        output::write(&generated, &args.run, record)
    }
}

/// The inputs of a run that may start from the latents of a file.
pub fn inputs<B: Backend>(
    latents: Option<&Path>,
    device: &B::Device,
) -> Result<StableDiffusionInputs<'static, B>> {
    Ok(StableDiffusionInputs {
        latents: latents
            .map(|path| latents::read(path, device))
            .transpose()?,
        ..StableDiffusionInputs::default()
    })
}

/// Reads an image from a file, or from standard input if it is named `-`.
pub fn read_image(path: &Path) -> Result<RgbImage> {
    let (bytes, name) = if path == Path::new("-") {
        let mut bytes = Vec::new();
        let read = io::stdin().read_to_end(&mut bytes);
        (read.map(|_| bytes), "standard input".to_string())
    } else {
        (fs::read(path), format!("`{}`", path.display()))
    };
    let image = bytes.map_err(anyhow::Error::new);
    let image = image.and_then(|bytes| Ok(load_image(&bytes)?));
    image.with_context(|| format!("cannot read {name}"))
}

/// Everything that made the images, for their text chunk.
fn record<T: Task>(args: &StableDiffusion, options: &StableDiffusionOptions) -> Map<String, Value> {
    let record = json!({
        "command": T::COMMAND,
        "version": env!("CARGO_PKG_VERSION"),
        "model": args.model.name(PipelineKind::StableDiffusion),
        "variant": args.model.variant,
        "prompt": args.prompts,
        "negative_prompt": args.negative_prompt,
        "prompt_syntax": format!("{:?}", options.prompt_syntax).to_lowercase(),
        "vae": args.weights.vae.as_ref().map(|path| path.display().to_string()),
        "vae_tiling": args.vae_tiling == Switch::On,
        "lora": loras(&args.weights),
        "embedding": embeddings(&args.weights),
        "steps": (args.timesteps.is_none() && args.sigmas.is_none())
            .then_some(options.num_inference_steps),
        "timesteps": args.timesteps,
        "sigmas": args.sigmas,
        "guidance_scale": options.guidance_scale,
        "guidance_rescale": args.guidance_rescale,
        "clip_skip": args.clip_skip,
        "eta": args.eta,
        "seed": args.run.seed,
        "num_images": args.run.num_images,
    });
    match record {
        Value::Object(record) => record,
        _ => unreachable!("the record is an object"),
    }
}

/// The LoRAs of the options as a record says them; prompts say their own.
fn loras(weights: &StableDiffusionWeights) -> Vec<Value> {
    let loras = weights.lora.iter().map(|lora| {
        json!({
            "file": lora.path.display().to_string(),
            "strength": lora.strength,
            "text_encoder_strength": lora.text_encoder.unwrap_or(lora.strength),
        })
    });
    loras.collect()
}

fn embeddings(weights: &StableDiffusionWeights) -> Vec<Value> {
    let embeddings = weights.embedding.iter().map(|embedding| {
        json!({
            "file": embedding.path.display().to_string(),
            "name": embedding.name,
        })
    });
    embeddings.collect()
}

/// A path in a record.
pub fn display(path: &Path) -> String {
    path.display().to_string()
}
