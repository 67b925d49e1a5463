//! How often images of the built-in model follow their prompts: the checker reads images of
//! held-out combinations.
//!
//! `cargo xtask bench quality`, or `cargo run --release -p diffuse-training --bin scene-quality`

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use diffuse_builtin::SCENES;
use diffuse_pipelines::schedulers::{Overrides, scheduler_from_config};
use diffuse_pipelines::{StableDiffusionOptions, StableDiffusionPipeline};
use diffuse_training::grid::grid;
use diffuse_training::scenes::{
    Scene,
    caption::{Detail, caption},
    checker::{self, Verdict},
    render::render,
};
use diffuse_training::{Backend, default_device};
use image::RgbImage;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Measures how well a text-to-image model of scenes follows prompts that it was not trained on.
#[derive(Parser)]
struct Arguments {
    /// Folder of the pipeline, in place of the built-in model
    #[arg(long)]
    model: Option<PathBuf>,
    /// Number of prompts
    #[arg(long, default_value_t = 200)]
    prompts: usize,
    #[arg(long, default_value_t = SCENES.num_inference_steps)]
    steps: usize,
    #[arg(long, default_value_t = SCENES.guidance_scale)]
    guidance_scale: f64,
    /// Scheduler in place of the model's own
    #[arg(long)]
    scheduler: Option<String>,
    /// Seed of the prompts: choose settings with other prompts than the reported ones
    #[arg(long, default_value_t = 4)]
    prompt_seed: u64,
    /// Seed of the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write all images into this file
    #[arg(long)]
    sheet: Option<PathBuf>,
    /// Print the prompts of images with mistakes
    #[arg(long)]
    failures: bool,
}

/// Batch size.
const BATCH: usize = 10;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.prompts > 0, "`--prompts` is 0");
    let mut rng = StdRng::seed_from_u64(arguments.prompt_seed);
    let rendered = rendered_accuracy(&mut rng);
    println!(
        "the checker reads {:.1} % of rendered attributes right",
        100.0 * rendered
    );

    let prompts: Vec<(Scene, String)> = (0..arguments.prompts)
        .map(|_| {
            let scene = Scene::held_out(&mut rng);
            let text = caption(&scene, Detail::Full, &mut rng);
            (scene, text)
        })
        .collect();
    let device = default_device();
    let unpacked = tempfile::tempdir()?;
    let model = match &arguments.model {
        Some(folder) => folder,
        None => {
            SCENES.unpack(&unpacked)?;
            unpacked.path()
        }
    };
    let mut pipeline = StableDiffusionPipeline::<Backend>::from_pretrained(model, &device)?;
    pipeline.scheduler = scheduler_from_config(
        pipeline.scheduler.config(),
        arguments.scheduler.as_deref(),
        &Overrides::new(),
    )?;
    let mut images: Vec<RgbImage> = Vec::new();
    let mut verdicts = Vec::new();
    for (index, batch) in prompts.chunks(BATCH).enumerate() {
        let first = arguments.seed + (index * BATCH) as u64;
        let options = StableDiffusionOptions {
            prompt: batch.iter().map(|(_, text)| text.clone()).collect(),
            num_inference_steps: arguments.steps,
            guidance_scale: arguments.guidance_scale,
            seeds: (first..first + batch.len() as u64).collect(),
            ..StableDiffusionOptions::default()
        };
        for (image, (scene, text)) in pipeline.generate(&options)?.images.into_iter().zip(batch) {
            let wanted = scene.combination();
            let verdict = checker::check(&image, &wanted);
            if arguments.failures && !verdict.is_right() {
                println!("{text}\n  shows {:?}", checker::read(&image));
            }
            verdicts.push(verdict);
            images.push(image);
        }
    }
    if let Some(path) = &arguments.sheet {
        grid(&images, 10).save(path)?;
    }
    report(&verdicts);
    Ok(())
}

fn report(verdicts: &[Verdict]) {
    let row = |name: &str, right: &mut dyn Iterator<Item = bool>| {
        let all: Vec<bool> = right.collect();
        let right = all.iter().filter(|right| **right).count();
        let share = 100.0 * right as f64 / all.len().max(1) as f64;
        println!("{name:<28}{right:>5} of {:<5}{share:>6.1} %", all.len());
    };
    row("sky", &mut verdicts.iter().map(|verdict| verdict.sky));
    row("ground", &mut verdicts.iter().map(|verdict| verdict.ground));
    let subjects = verdicts.iter().flat_map(|verdict| verdict.subjects.clone());
    row("subjects", &mut subjects.into_iter());
    row(
        "color",
        &mut verdicts.iter().filter_map(|verdict| verdict.color),
    );
    row(
        "nothing that was not asked",
        &mut verdicts.iter().map(|verdict| verdict.extra.is_empty()),
    );
    row(
        "all named attributes",
        &mut verdicts.iter().flat_map(Verdict::attributes),
    );
    row(
        "images with all right",
        &mut verdicts.iter().map(Verdict::is_right),
    );
}

/// Share of the attributes of rendered scenes that the checker recognises, from 0 to 1.
fn rendered_accuracy(rng: &mut StdRng) -> f64 {
    let mut attributes = Vec::new();
    for _ in 0..1_000 {
        let scene = Scene::random(rng);
        let image = render(&scene, 128, rng);
        attributes.extend(checker::check(&image, &scene.combination()).attributes());
    }
    let right = attributes.iter().filter(|right| **right).count();
    right as f64 / attributes.len() as f64
}
