//! Trains an unconditional `UNet2DModel` on the pixels of scenes, and writes a DDPM folder.
//!
//! `docs/training.md` has the commands that made the weights of this repository.

use std::path::{Path, PathBuf};

use anyhow::Result;
use burn::module::Module;
use burn::tensor::DType;
use burn::tensor::backend::{AutodiffBackend, Backend};
use clap::Parser;
use diffuse_pipelines::schedulers::{
    DDIMScheduler, DDPMScheduler, Generator, Scheduler, SchedulerConfig, randn_tensor,
};
use diffuse_pipelines::unet::{
    Pretrained, SampleSize, UNet2DConfig, UNet2DDownBlock, UNet2DModel, UNet2DUpBlock,
};
use diffuse_pipelines::{DDPMOptions, DDPMPipeline};
use diffuse_training::scenes::{Scene, render::render};
use diffuse_training::{
    Backend as Inner, Differentiable, Loss, Settings, Task, default_device,
    grid::{grid, to_tensor},
    scaled, train, write_configs,
};
use image::RgbImage;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Folder for the finished pipeline
    #[arg(long)]
    output: PathBuf,
}

/// Height and width of the scenes.
const SIZE: u32 = 64;

struct PixelTask {
    batch: usize,
    scheduler: SchedulerConfig,
}

impl<B: AutodiffBackend> Task<B> for PixelTask {
    type Model = UNet2DModel<B>;

    /// The error of the predicted noise (Ho et al. 2020, <https://arxiv.org/abs/2006.11239>,
    /// equation 14).
    fn loss(&self, model: &UNet2DModel<B>, seed: u64) -> Result<Loss<B>> {
        let device = Default::default();
        let mut rng = StdRng::seed_from_u64(seed);
        let images: Vec<RgbImage> = (0..self.batch)
            .map(|_| {
                let scene = Scene::for_training(&mut rng);
                render(&scene, SIZE, &mut rng)
            })
            .collect();
        let images = to_tensor::<B>(&images, &device);
        let mut generator = Generator::new(seed);
        let noise = randn_tensor(&mut generator, images.dims(), DType::F32, &device)?;
        let timesteps: Vec<f64> = (0..self.batch)
            .map(|_| f64::from(rng.random_range(0..1000_u32)))
            .collect();
        let scheduler = DDPMScheduler::<B>::from_config(&self.scheduler)?;
        let noisy = scheduler.add_noise(images, noise.clone(), &timesteps)?;
        let error = model.forward(noisy, timesteps) - noise;
        Ok((error.powi_scalar(2).mean(), vec![]))
    }

    /// Sample images, always from the same noise.
    fn sample(&self, model: UNet2DModel<B::InnerBackend>) -> Result<RgbImage> {
        let pipeline = DDPMPipeline {
            unet: model,
            scheduler: Box::new(DDIMScheduler::from_config(&self.scheduler)?),
        };
        let options = DDPMOptions {
            batch_size: 12,
            num_inference_steps: 50,
            seeds: vec![0],
            ..DDPMOptions::default()
        };
        Ok(grid(&pipeline.generate(&options)?.images, 6))
    }
}

/// About two million parameters.
fn config() -> UNet2DConfig {
    use {UNet2DDownBlock::*, UNet2DUpBlock::*};
    UNet2DConfig {
        sample_size: Some(SampleSize::Square(SIZE as usize)),
        block_out_channels: vec![16, 32, 64, 96],
        down_block_types: vec![DownBlock2D, DownBlock2D, AttnDownBlock2D, AttnDownBlock2D],
        up_block_types: vec![AttnUpBlock2D, AttnUpBlock2D, UpBlock2D, UpBlock2D],
        layers_per_block: 1,
        attention_head_dim: Some(32),
        norm_num_groups: 8,
        ..UNet2DConfig::default()
    }
}

fn scheduler_config() -> Value {
    json!({
        "_class_name": "DDPMScheduler",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": true,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
    })
}

/// Writes a folder like `google/ddpm-cat-256`, but with a folder for each part.
fn save<B: Backend>(model: &UNet2DModel<B>, folder: &Path) -> Result<()> {
    let index = json!({
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    });
    model.save_pretrained(folder.join("unet"))?;
    let configs = [
        ("scheduler/scheduler_config.json", scheduler_config()),
        ("model_index.json", index),
    ];
    write_configs(folder, configs)
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let device = default_device();
    Inner::seed(&device, arguments.settings.seed);
    let mut model = UNet2DModel::<Differentiable>::from_config(&config(), &device);
    // A UNet that starts with zero output learns faster.
    model.conv_out.weight = scaled(model.conv_out.weight, 0.0);
    println!("{} parameters", model.num_params());
    let task = PixelTask {
        batch: arguments.settings.batch,
        scheduler: SchedulerConfig::from_json_str(&scheduler_config().to_string())?,
    };
    let model = train(&task, model, &arguments.settings, &device)?;
    save(&model, &arguments.output)
}
