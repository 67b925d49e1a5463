//! `diffuse serve`.

use anyhow::{Result, bail};
use burn::tensor::backend::Backend;
use diffuse_pipelines::{LatentPreview, PipelineKind, StableDiffusionOptions};
use diffuse_serve::{Limits, Preview, ServeOptions, serve};
use tokio_util::sync::CancellationToken;

use crate::args::{BackendName, Serve};
use crate::backend::{self, Job, load_options, with_backend};
use crate::builtin::builtin;
use crate::model::find_model;
use crate::output;
use crate::preview;
use crate::stable_diffusion;

/// Where the key may be instead of among the arguments, which other users of the machine can read.
const KEY: &str = "DIFFUSE_API_KEY";

pub fn run(args: Serve) -> Result<()> {
    let backend = backend::choose(args.model.backend, args.quiet);
    let device = args.model.device;
    with_backend(backend, device, ServeJob(args))
}

struct ServeJob(Serve);

impl Job for ServeJob {
    fn run<B: Backend>(self, backend: BackendName, device: B::Device) -> Result<()> {
        let Self(args) = self;
        let kind = PipelineKind::StableDiffusion;
        let (model, weights) = (&args.model, &args.weights);
        let source = find_model(&args.model, kind, weights.no_safety_checker, args.quiet)?;
        let load = load_options::<B>(&args.model, backend, &device)?;
        let mut pipeline = stable_diffusion::load::<B>(&source, weights, &mut [], &load, &device)?;
        let name = model.scheduler.as_deref();
        pipeline.scheduler = stable_diffusion::scheduler(pipeline.scheduler.config(), name, model)?;
        drop(source.temporary);
        let mut defaults = StableDiffusionOptions::default();
        if model.model.is_none() {
            let model = builtin(kind);
            defaults.num_inference_steps = model.num_inference_steps;
            defaults.guidance_scale = model.guidance_scale;
        }
        let limits = Limits::default();
        let options = ServeOptions {
            address: args.listen,
            hosts: args.allow_host,
            key: key(args.key)?,
            model: match &model.model {
                Some(path) => path.display().to_string(),
                None => builtin(kind).name.to_string(),
            },
            defaults,
            lora_dir: weights.lora_dir.clone(),
            queue: args.queue,
            limits: Limits {
                pixels: args.max_pixels.unwrap_or(limits.pixels),
                steps: args.max_steps.unwrap_or(limits.steps),
                images: args.max_images.unwrap_or(limits.images),
                ..limits
            },
            ..ServeOptions::default()
        };
        if !options.address.ip().is_loopback() && options.key.is_none() {
            output::complain(format_args!(
                "warning: everyone who can reach {} can use this server; `--key` asks for a key",
                options.address
            ));
        }
        let quiet = args.quiet;
        let stop = CancellationToken::new();
        let map = LatentPreview::<B>::from(preview::linear(model));
        let preview: Preview<B> = Box::new(move |latents| {
            let images = map.images(latents).ok()?;
            images.into_iter().next()
        });
        serve(pipeline, Some(preview), options, &stop, |address| {
            if !quiet {
                output::say(format_args!("http://{address}"));
            }
        })?;
        Ok(())
    }
}

fn key(given: Option<String>) -> Result<Option<String>> {
    let key = given.or_else(|| std::env::var(KEY).ok());
    if key.as_deref() == Some("") {
        bail!("the key is empty");
    }
    Ok(key)
}
