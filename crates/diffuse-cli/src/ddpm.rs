//! `diffuse ddpm`.

use std::time::Instant;

use anyhow::{Result, bail};
use burn::tensor::backend::Backend;
use diffuse_pipelines::schedulers::{StepOptions, scheduler_from_config};
use diffuse_pipelines::{DDPMOptions, DDPMPipeline, PipelineKind, random_seed};
use serde_json::{Map, Value, json};

use crate::args::{BackendName, DDPM_STEPS, Ddpm, OTHER_STEPS};
use crate::backend::{self, Job, load_options, with_backend};
use crate::builtin::builtin;
use crate::model::find_model;
use crate::output;
use crate::progress::Progress;

pub fn run(mut args: Box<Ddpm>) -> Result<()> {
    if !(0.0..=1.0).contains(&args.eta) {
        bail!("`eta` is {}, but has to be in [0, 1]", args.eta);
    }
    output::check(&args.run, args.run.num_images)?;
    if args.run.seed.is_empty() {
        args.run.seed.push(random_seed());
    }
    let backend = backend::choose(args.model.backend, args.run.quiet);
    with_backend(backend, args.model.device, Unconditional(args))
}

struct Unconditional(Box<Ddpm>);

impl Job for Unconditional {
    fn run<B: Backend>(self, backend: BackendName, device: B::Device) -> Result<()> {
        let args = *self.0;
        let kind = PipelineKind::Unconditional;
        let source = find_model(&args.model, kind, true, args.run.quiet)?;
        let start = Instant::now();
        let load = load_options::<B>(&args.model, backend, &device)?;
        let mut pipeline = DDPMPipeline::<B>::from_pretrained_with(&source.folder, &load, &device)?;
        pipeline.scheduler = scheduler_from_config(
            pipeline.scheduler.config(),
            args.model.scheduler.as_deref(),
            &args.model.scheduler_options(),
        )?;
        let loading = start.elapsed();
        // The folder of a model that the program carries is not needed any more.
        drop(source.temporary);
        let is_ddpm = pipeline.scheduler.config().class_name() == Some("DDPMScheduler");
        let options = DDPMOptions {
            batch_size: args.run.num_images,
            num_inference_steps: args.steps.unwrap_or(match &args.model.model {
                _ if !is_ddpm => OTHER_STEPS,
                Some(_) => DDPM_STEPS,
                None => builtin(kind).num_inference_steps,
            }),
            seeds: args.run.seed.clone(),
            step: StepOptions {
                eta: pipeline.scheduler.capabilities().eta.then_some(args.eta),
                use_clipped_model_output: args.use_clipped_model_output,
                ..StepOptions::default()
            },
        };

        output::announce(&args.run);
        let progress = Progress::new(args.run.quiet);
        let generated = pipeline.generate_with(&options, None, |event| progress.update(&event));
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
fn record(args: &Ddpm, options: &DDPMOptions) -> Map<String, Value> {
    let record = json!({
        "command": "ddpm",
        "version": env!("CARGO_PKG_VERSION"),
        "model": args.model.name(PipelineKind::Unconditional),
        "variant": args.model.variant,
        "steps": options.num_inference_steps,
        "eta": args.eta,
        "use_clipped_model_output": args.use_clipped_model_output,
        "seed": args.run.seed,
        "num_images": args.run.num_images,
    });
    match record {
        Value::Object(record) => record,
        _ => unreachable!("the record is an object"),
    }
}
