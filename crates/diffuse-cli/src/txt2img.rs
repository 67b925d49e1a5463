//! `diffuse txt2img`.

use std::time::Instant;

use anyhow::{Result, bail};
use burn::tensor::backend::Backend;
use diffuse_pipelines::{
    PipelineKind, StableDiffusionInputs, StableDiffusionOptions, latents, random_seed,
};
use serde_json::{Map, Value, json};

use crate::args::{BackendName, StableDiffusionWeights, Txt2img};
use crate::backend::{self, Job, load_options, with_backend};
use crate::builtin::builtin;
use crate::model::find_model;
use crate::output;
use crate::progress::Progress;
use crate::stable_diffusion;

pub fn run(mut args: Box<Txt2img>) -> Result<()> {
    if args.prompts.is_empty() {
        bail!(
            "no prompt is given; one is, for example, in `diffuse \"a boat at sunset\" --seed 0`"
        );
    }
    let images = args.prompts.len().saturating_mul(args.run.num_images);
    output::check(&args.run, images)?;
    if args.run.seed.is_empty() {
        args.run.seed.push(random_seed());
    }
    let backend = backend::choose(args.model.backend, args.run.quiet);
    with_backend(backend, args.model.device, TextToImage(args))
}

struct TextToImage(Box<Txt2img>);

impl Job for TextToImage {
    fn run<B: Backend>(self, backend: BackendName, device: B::Device) -> Result<()> {
        let args = *self.0;
        let kind = PipelineKind::StableDiffusion;
        let source = find_model(&args.model, kind, args.run.quiet)?;
        let start = Instant::now();
        let load = load_options::<B>(&args.model, backend, &device)?;
        let mut prompts = args.prompts.clone();
        let weights = &args.weights;
        let pipeline = stable_diffusion::load::<B>(
            &source,
            &args.model,
            weights,
            &mut prompts,
            &load,
            &device,
        )?;
        let loading = start.elapsed();
        let init = match &args.init_latents {
            Some(path) => Some(latents::read(path, &device)?),
            None => None,
        };
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
            height: args.height,
            width: args.width,
            num_inference_steps: args.steps.unwrap_or(defaults.num_inference_steps),
            timesteps: args.timesteps.clone(),
            sigmas: args.sigmas.clone(),
            guidance_scale: args.guidance_scale.unwrap_or(defaults.guidance_scale),
            guidance_rescale: args.guidance_rescale,
            num_images_per_prompt: args.run.num_images,
            eta: args.eta,
            clip_skip: args.clip_skip,
            seeds: args.run.seed.clone(),
        };
        let inputs = StableDiffusionInputs {
            latents: init,
            ..StableDiffusionInputs::default()
        };

        output::announce(&args.run);
        let progress = Progress::new(args.run.quiet);
        let generated = pipeline.generate_with(&options, inputs, |event| progress.update(&event));
        progress.finish();
        let mut record = record(&args, &options);
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

/// Everything that made the images, for their text chunk.
fn record(args: &Txt2img, options: &StableDiffusionOptions) -> Map<String, Value> {
    let record = json!({
        "command": "txt2img",
        "version": env!("CARGO_PKG_VERSION"),
        "model": args.model.name(PipelineKind::StableDiffusion),
        "variant": args.model.variant,
        "prompt": args.prompts,
        "negative_prompt": args.negative_prompt,
        "prompt_syntax": format!("{:?}", options.prompt_syntax).to_lowercase(),
        "vae": args.weights.vae.as_ref().map(|path| path.display().to_string()),
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
        "width": args.width,
        "height": args.height,
        "seed": args.run.seed,
        "num_images": args.run.num_images,
        "init_latents": args.init_latents.as_ref().map(|path| path.display().to_string()),
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
