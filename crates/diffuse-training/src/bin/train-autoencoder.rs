//! Trains an `AutoencoderKL` on rendered scenes, first on crops, then on whole images.
//!
//! `docs/training.md` has the commands that made the weights of this repository.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use burn::module::Module;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Tensor};
use clap::Parser;
use diffuse_pipelines::schedulers::{Generator, randn_tensor};
use diffuse_pipelines::to_images;
use diffuse_pipelines::vae::{
    AutoencoderKL, AutoencoderKLConfig, AutoencoderKLDownBlock, AutoencoderKLUpBlock, Pretrained,
    SampleSize,
};
use diffuse_training::scenes::{Scene, render::render};
use diffuse_training::{
    Backend as Inner, Differentiable, Loss, Settings, Task, default_device,
    grid::{grid, to_tensor},
    train,
};
use image::{RgbImage, imageops};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Height and width of the training crops
    #[arg(long, default_value_t = 64)]
    crop: u32,
    /// Start from the weights of this folder
    #[arg(long)]
    from: Option<PathBuf>,
    /// Folder for the finished model
    #[arg(long)]
    output: PathBuf,
}

/// Height and width of the scenes.
const SIZE: u32 = 128;
/// Weight of the KL divergence per latent value, relative to an error of 1 per image value.
const KL_WEIGHT: f64 = 2e-4;

struct Reconstruction {
    crop: u32,
}

impl Reconstruction {
    fn batch<B: Backend>(&self, count: usize, seed: u64, device: &B::Device) -> Tensor<B, 4> {
        let mut rng = StdRng::seed_from_u64(seed);
        let images: Vec<RgbImage> = (0..count)
            .map(|_| {
                let scene = Scene::for_training(&mut rng);
                let image = render(&scene, SIZE, &mut rng);
                // Most of a scene is sky and ground: takes the crop with the most contrast of a
                // few.
                let crops = (0..4).map(|_| {
                    let [x, y] = [0, 1].map(|_| rng.random_range(0..=SIZE - self.crop));
                    imageops::crop_imm(&image, x, y, self.crop, self.crop).to_image()
                });
                crops
                    .max_by(|a, b| contrast(a).total_cmp(&contrast(b)))
                    .expect("there are crops")
            })
            .collect();
        to_tensor(&images, device)
    }
}

struct AutoencoderTask {
    data: Reconstruction,
    batch: usize,
}

impl<B: AutodiffBackend> Task<B> for AutoencoderTask {
    type Model = AutoencoderKL<B>;

    fn loss(&self, model: &AutoencoderKL<B>, seed: u64) -> Result<Loss<B>> {
        let device = Default::default();
        let images = self.data.batch::<B>(self.batch, seed, &device);
        let posterior = model.encode(images.clone());
        let mut noise = Generator::new(seed);
        let noise = randn_tensor(&mut noise, posterior.mean.dims(), DType::F32, &device)?;
        let decoded = model.decode(posterior.sample(noise));

        // Absolute errors keep edges sharp; squared errors penalise missing parts.
        let difference = decoded.clone() - images.clone();
        let pixels = difference.clone().abs().mean() + difference.powi_scalar(2).mean() * 2.0;
        // Edges: differences between neighbours in both directions.
        let edges = edge_error(decoded, images);
        let variance = posterior.logvar.clone().exp();
        let divergence =
            (posterior.mean.powi_scalar(2) + variance - posterior.logvar - 1.0).mean() * 0.5;
        let loss = pixels.clone() + edges.clone() + divergence.clone() * KL_WEIGHT;
        Ok((
            loss,
            vec![("pixels", pixels), ("edges", edges), ("kl", divergence)],
        ))
    }

    /// Scenes above, their reconstructions below.
    fn sample(&self, model: AutoencoderKL<B::InnerBackend>) -> Result<RgbImage> {
        let whole = Reconstruction { crop: SIZE };
        let images = whole.batch::<B::InnerBackend>(8, u64::MAX, &Default::default());
        let decoded = model.decode(model.encode(images.clone()).mode());
        let mut images = to_images(images)?;
        images.extend(to_images(decoded)?);
        Ok(grid(&images, 8))
    }
}

/// The contrast of an image: the deviation of its colors from their mean.
fn contrast(image: &RgbImage) -> f64 {
    let levels = |channel| {
        let all = image.pixels().map(move |pixel| f64::from(pixel.0[channel]));
        all.clone().map(|level| level * level).sum::<f64>() / all.clone().count() as f64
            - (all.clone().sum::<f64>() / all.count() as f64).powi(2)
    };
    (0..3).map(levels).sum()
}

/// Mean absolute error of the differences between neighbours.
fn edge_error<B: Backend>(a: Tensor<B, 4>, b: Tensor<B, 4>) -> Tensor<B, 1> {
    let difference = a - b;
    let neighbours = |dim: usize| {
        let length = difference.dims()[dim] - 1;
        let after = difference.clone().narrow(dim, 1, length);
        (after - difference.clone().narrow(dim, 0, length))
            .abs()
            .mean()
    };
    neighbours(2) + neighbours(3)
}

fn config() -> AutoencoderKLConfig {
    AutoencoderKLConfig {
        block_out_channels: vec![16, 32, 64, 64],
        down_block_types: vec![AutoencoderKLDownBlock::DownEncoderBlock2D; 4],
        up_block_types: vec![AutoencoderKLUpBlock::UpDecoderBlock2D; 4],
        layers_per_block: 2,
        norm_num_groups: 8,
        sample_size: SampleSize::Square(SIZE as usize),
        ..AutoencoderKLConfig::default()
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let device = default_device();
    Inner::seed(&device, arguments.settings.seed);
    let model = match &arguments.from {
        Some(folder) => AutoencoderKL::<Differentiable>::from_pretrained(folder, &device)?,
        None => AutoencoderKL::from_config(&config(), &device),
    };
    println!("{} parameters", model.num_params());
    let task = AutoencoderTask {
        data: Reconstruction {
            crop: arguments.crop,
        },
        batch: arguments.settings.batch,
    };
    let model = train(&task, model, &arguments.settings, &device)?;

    // Scales latents to unit variance.
    let whole = Reconstruction { crop: SIZE };
    let images = whole.batch::<Inner>(64, u64::MAX - 1, &device);
    let std: f32 = model
        .encode(images)
        .mode()
        .flatten::<1>(0, 3)
        .var(0)
        .sqrt()
        .into_scalar();
    let config = AutoencoderKLConfig {
        scaling_factor: 1.0 / f64::from(std),
        ..config()
    };
    println!("scaling factor {}", config.scaling_factor);
    let scaled =
        AutoencoderKL::<Inner>::from_config(&config, &device).load_record(model.into_record());
    fs::create_dir_all(&arguments.output)?;
    scaled.save_pretrained(&arguments.output)?;
    Ok(())
}
