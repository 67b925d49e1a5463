//! What all commands with a prompt do: load, generate, write.

use std::fs;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use burn::tensor::{Tensor, backend::Backend};
use diffuse_pipelines::unet::ControlNetModel;
use diffuse_pipelines::{
    Generated, LoadOptions, PipelineKind, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, StepEvent, latents, load_image, random_seed,
};
use image::RgbImage;
use serde_json::{Map, Value, json};

use crate::args::{BackendName, StableDiffusion, StableDiffusionWeights, Switch};
use crate::backend::{self, Job, load_options, with_backend};
use crate::builtin::builtin;
use crate::control::Controls;
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

    /// Generates images with the options and inputs that all commands have.
    fn generate<B: Backend>(
        &self,
        pipeline: &StableDiffusionPipeline<B>,
        options: StableDiffusionOptions,
        inputs: StableDiffusionInputs<'_, B>,
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
        let mut loaded = load::<B>(args, backend, &device)?;
        let (model, pipeline) = (&args.model, &mut loaded.pipeline);
        let name = model.scheduler.as_deref();
        pipeline.scheduler = stable_diffusion::scheduler(pipeline.scheduler.config(), name, model)?;
        let mut record = record(T::COMMAND, args, &loaded.options);
        if let Value::Object(own) = task.record() {
            record.extend(own);
        }

        output::announce(&args.run);
        let progress = Progress::new(args.run.quiet);
        let preview = &loaded.preview;
        let on_step = |event: StepEvent<'_, B>| {
            if let Some(preview) = preview {
                preview.update(&event, &progress);
            }
            progress.update(&event)
        };
        let options = loaded.options.clone();
        let inputs = loaded.inputs(&args.control);
        let generated = task.generate(&loaded.pipeline, options, inputs, &device, on_step);
        progress.finish();
        loaded.describe(&mut record, backend);
        output::record_scheduler(&mut record, loaded.pipeline.scheduler.config());
        let generated = generated?;
        output::write_timings(&generated, loaded.time, &args.run)?;
        output::write(&generated, &args.run, record)
    }
}

/// A pipeline, and what it was loaded with.
pub struct Loaded<B: Backend> {
    /// With the checkpoint's scheduler.
    pub pipeline: StableDiffusionPipeline<B>,
    /// The options of a run.
    pub options: StableDiffusionOptions,
    controlnets: Vec<ControlNetModel<B>>,
    control_images: Vec<RgbImage>,
    /// What the options ask for.
    pub preview: Option<Preview<B>>,
    load: LoadOptions,
    /// The commit of a model from the hub.
    commit: Option<String>,
    /// How long it took.
    time: Duration,
}

impl<B: Backend> Loaded<B> {
    /// The inputs of a run.
    pub fn inputs(&self, control: &Controls) -> StableDiffusionInputs<'_, B> {
        StableDiffusionInputs {
            control: control.of_run(&self.controlnets, self.control_images.clone()),
            ..StableDiffusionInputs::default()
        }
    }

    /// Adds the model to an image's record.
    pub fn describe(&self, record: &mut Map<String, Value>, backend: BackendName) {
        record.insert("backend".into(), backend.to_string().into());
        record.insert("revision".into(), self.commit.clone().into());
        record.insert("dtype".into(), self.load.dtype.map(backend::name).into());
        record.insert(
            "weights".into(),
            self.load.weights.map(backend::name).into(),
        );
    }
}

/// Loads the pipeline of a command.
pub fn load<B: Backend>(
    args: &StableDiffusion,
    backend: BackendName,
    device: &B::Device,
) -> Result<Loaded<B>> {
    let kind = PipelineKind::StableDiffusion;
    let control_images = args.control.read_images()?;
    let no_safety_checker = args.weights.no_safety_checker;
    let source = find_model(&args.model, kind, no_safety_checker, args.run.quiet)?;
    let start = Instant::now();
    let load = load_options::<B>(&args.model, backend, device)?;
    let mut prompts = args.prompts.clone();
    let mut pipeline =
        stable_diffusion::load::<B>(&source, &args.weights, &mut prompts, &load, device)?;
    if args.vae_tiling == Switch::On {
        pipeline.vae.enable_tiling();
    }
    let preview = Preview::new(args, &pipeline.vae, &load, device)?;
    let controlnets = args.control.load(&load, args.run.quiet, device)?;
    let time = start.elapsed();
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
        guess_mode: args.control.guess_mode,
        freeu: args.freeu,
        cache_interval: args.deep_cache.map_or(1, |cache| cache.interval),
        cache_branch_id: args.deep_cache.map_or(0, |cache| cache.branch),
        predict_original: args.preview.is_some(),
        seeds: args.run.seed.clone(),
        ..defaults
    };
    Ok(Loaded {
        pipeline,
        options,
        controlnets,
        control_images,
        preview,
        load,
        commit: source.commit,
        time,
    })
}

/// The latents of a file that a run may start from.
pub fn read_latents<B: Backend>(
    path: Option<&Path>,
    device: &B::Device,
) -> Result<Option<Tensor<B, 4>>> {
    let latents = path.map(|path| latents::read(path, device));
    Ok(latents.transpose()?)
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
pub fn record(
    command: &str,
    args: &StableDiffusion,
    options: &StableDiffusionOptions,
) -> Map<String, Value> {
    let record = json!({
        "command": command,
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
        "control": args.control.record(),
        "guess_mode": args.control.guess_mode,
        "freeu": options.freeu.map(|freeu| [freeu.s1, freeu.s2, freeu.b1, freeu.b2]),
        "cache_interval": options.cache_interval,
        "cache_branch_id": options.cache_branch_id,
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
