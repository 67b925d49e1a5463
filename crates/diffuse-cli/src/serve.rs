//! `diffuse serve` and `diffuse worker`.

use anyhow::{Result, bail};
use burn::tensor::backend::Backend;
use diffuse_pipelines::{
    LatentPreview, PipelineKind, StableDiffusionOptions, StableDiffusionPipeline,
};
use diffuse_serve::{Limits, ServeOptions, serve};
use tokio_util::sync::CancellationToken;

use crate::args::{BackendName, Serve, Served};
use crate::backend::{self, Job, load_options, with_backend};
use crate::builtin::builtin;
use crate::model::find_model;
use crate::output;
use crate::preview;
use crate::stable_diffusion;

/// Where the key may be instead of among the arguments, which other users of the machine can read.
const KEY: &str = "DIFFUSE_API_KEY";

pub fn run(args: Serve) -> Result<()> {
    let options = options(&args)?;
    if !options.address.ip().is_loopback() && options.key.is_none() {
        output::complain(format_args!(
            "warning: everyone who can reach {} can use this server; `--key` asks for a key",
            options.address
        ));
    }
    #[cfg(feature = "fleet")]
    if let Some(url) = &args.queue {
        let mut fleet = diffuse_serve::FleetOptions::new(url);
        fleet.length = args.queue_length.unwrap_or(fleet.length);
        let (stop, quiet) = (CancellationToken::new(), args.served.quiet);
        let on_ready = |address| say_address(quiet, address);
        return Ok(diffuse_serve::serve_queue(options, fleet, &stop, on_ready)?);
    }
    let model = &args.served.model;
    let backend = backend::choose(model.backend, args.served.quiet);
    let device = model.device;
    with_backend(backend, device, ServeJob { args, options })
}

struct ServeJob {
    args: Serve,
    options: ServeOptions,
}

impl Job for ServeJob {
    fn run<B: Backend>(self, backend: BackendName, device: B::Device) -> Result<()> {
        let Self { args, options } = self;
        let (pipeline, preview) = load::<B>(&args.served, backend, &device)?;
        let (stop, quiet) = (CancellationToken::new(), args.served.quiet);
        let on_ready = |address| say_address(quiet, address);
        Ok(serve(pipeline, Some(preview), options, &stop, on_ready)?)
    }
}

fn say_address(quiet: bool, address: std::net::SocketAddr) {
    if !quiet {
        output::say(format_args!("http://{address}"));
    }
}

/// `diffuse worker`.
#[cfg(feature = "fleet")]
pub fn work(args: crate::args::Worker) -> Result<()> {
    let model = &args.served.model;
    let backend = backend::choose(model.backend, args.served.quiet);
    let device = model.device;
    with_backend(backend, device, WorkerJob(args))
}

#[cfg(feature = "fleet")]
struct WorkerJob(crate::args::Worker);

#[cfg(feature = "fleet")]
impl Job for WorkerJob {
    fn run<B: Backend>(self, backend: BackendName, device: B::Device) -> Result<()> {
        let Self(args) = self;
        let (pipeline, preview) = load::<B>(&args.served, backend, &device)?;
        let mut fleet = diffuse_serve::FleetOptions::new(&args.queue);
        fleet.attempts = args.attempts;
        fleet.lease = std::time::Duration::from_secs(args.lease);
        let (options, stop) = (served_options(&args.served), CancellationToken::new());
        let on_ready = || {
            if !args.served.quiet {
                output::say(format_args!("ready for jobs of `{}`", options.model));
            }
        };
        diffuse_serve::work(
            pipeline,
            Some(preview),
            options.clone(),
            fleet,
            &stop,
            on_ready,
        )?;
        Ok(())
    }
}

/// The pipeline, and what makes previews.
fn load<B: Backend>(
    args: &Served,
    backend: BackendName,
    device: &B::Device,
) -> Result<(StableDiffusionPipeline<B>, LatentPreview<B>)> {
    let kind = PipelineKind::StableDiffusion;
    let (model, weights) = (&args.model, &args.weights);
    let source = find_model(model, kind, weights.no_safety_checker, args.quiet)?;
    let load = load_options::<B>(model, backend, device)?;
    let mut pipeline = stable_diffusion::load::<B>(&source, weights, &mut [], &load, device)?;
    let name = model.scheduler.as_deref();
    pipeline.scheduler = stable_diffusion::scheduler(pipeline.scheduler.config(), name, model)?;
    let vae = args.preview_vae.as_deref();
    let preview = preview::load(model, vae, &pipeline.vae, &load, device)?;
    Ok((pipeline, preview))
}

fn options(args: &Serve) -> Result<ServeOptions> {
    let key = args.key.clone().or_else(|| std::env::var(KEY).ok());
    if key.as_deref() == Some("") {
        bail!("the key is empty");
    }
    let served = served_options(&args.served);
    Ok(ServeOptions {
        address: args.listen,
        hosts: args.allow_host.clone(),
        key,
        queue: args.queue_length.unwrap_or(served.queue),
        ..served
    })
}

fn served_options(args: &Served) -> ServeOptions {
    let kind = PipelineKind::StableDiffusion;
    let mut defaults = StableDiffusionOptions::default();
    if args.model.model.is_none() {
        let model = builtin(kind);
        defaults.num_inference_steps = model.num_inference_steps;
        defaults.guidance_scale = model.guidance_scale;
    }
    let limits = Limits::default();
    let name = args.name.clone();
    ServeOptions {
        model: name.unwrap_or_else(|| match &args.model.model {
            Some(path) => path.display().to_string(),
            None => builtin(kind).name.to_string(),
        }),
        defaults,
        lora_dir: args.weights.lora_dir.clone(),
        limits: Limits {
            pixels: args.max_pixels.unwrap_or(limits.pixels),
            steps: args.max_steps.unwrap_or(limits.steps),
            images: args.max_images.unwrap_or(limits.images),
            ..limits
        },
        ..ServeOptions::default()
    }
}
