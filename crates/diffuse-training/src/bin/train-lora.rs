//! Trains a style as a LoRA of the built-in Stable Diffusion: the Dutch angle.
//!
//! `docs/training.md` has the command that made the adapter of this repository.

use std::path::PathBuf;

use anyhow::Result;
use burn::module::{AutodiffModule, Module};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor};
use clap::Parser;
use diffuse_builtin::SCENES;
use diffuse_pipelines::clip::{CLIPTextModel, CLIPTokenizer};
use diffuse_pipelines::schedulers::{Generator, PNDMScheduler, SchedulerConfig};
use diffuse_pipelines::unet::{Pretrained, UNet2DConditionModel};
use diffuse_pipelines::vae::AutoencoderKL;
use diffuse_pipelines::{StableDiffusionParts, StableDiffusionPipeline};
use diffuse_training::scenes::{
    Scene,
    dutch_angle::{DUTCH_ANGLE, rotate},
    render::render,
};
use diffuse_training::text_to_image::{Latents, noise_error, sample, token_ids};
use diffuse_training::{
    Backend as Inner, Differentiable, Loss, Settings, Task, default_device, lora::Lora, train,
};
use image::RgbImage;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Rank of the factors
    #[arg(long, default_value_t = 2)]
    rank: usize,
    /// Scenes to draw and encode before training
    #[arg(long, default_value_t = 768)]
    scenes: usize,
    /// File for the finished adapter
    #[arg(long)]
    output: PathBuf,
}

/// The model without the adapter, which stays as it is, and the data.
struct StyleTask<B: AutodiffBackend> {
    data: Latents,
    batch: usize,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel<B::InnerBackend>,
    /// Without gradients of its weights.
    unet: UNet2DConditionModel<B>,
    vae: AutoencoderKL<B::InnerBackend>,
    scheduler: SchedulerConfig,
}

impl<B: AutodiffBackend> Task<B> for StyleTask<B> {
    type Model = Lora<B>;

    /// The [`noise_error`] with changed weights.
    fn loss(&self, lora: &Lora<B>, seed: u64) -> Result<Loss<B>> {
        let device: B::Device = Default::default();
        let mut rng = StdRng::seed_from_u64(seed);
        let mut generator = Generator::new(seed);
        let indices: Vec<usize> = (0..self.batch)
            .map(|_| rng.random_range(0..self.data.scenes.len()))
            .collect();
        let ids = token_ids(&self.tokenizer, &self.data.scenes, &indices, &mut rng)?;
        let ids = Tensor::<B::InnerBackend, 2, Int>::from_data(ids, &device);
        let context = Tensor::from_inner(self.text_encoder.forward(ids).last_hidden_state);
        let latents = self.data.batch::<B>(&indices, &mut generator, &device);
        let error = noise_error(
            &lora.merge(self.unet.clone()),
            latents,
            &context,
            &PNDMScheduler::from_config(&self.scheduler)?,
            &mut generator,
            &mut rng,
        )?;
        Ok((error.weighted, vec![("noise", error.mean)]))
    }

    fn sample(&self, lora: Lora<B::InnerBackend>) -> Result<RgbImage> {
        sample(StableDiffusionPipeline::new(StableDiffusionParts {
            tokenizer: self.tokenizer.clone(),
            text_encoder: self.text_encoder.clone(),
            unet: lora.merge(self.unet.valid()),
            vae: self.vae.clone().into(),
            scheduler: Box::new(PNDMScheduler::from_config(&self.scheduler)?),
            safety_checker: None,
        })?)
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let settings = &arguments.settings;
    let device = default_device();
    Inner::seed(&device, settings.seed);

    let folder = tempfile::tempdir()?;
    SCENES.unpack(&folder)?;
    let folder = folder.path();
    let unet = UNet2DConditionModel::from_pretrained(folder.join("unet"), &device)?.no_grad();
    let vae = AutoencoderKL::<Inner>::from_pretrained(folder.join("vae"), &device)?;
    let tilted = |scene: &Scene, size, rng: &mut StdRng| {
        let image = render(scene, size, rng);
        rotate(&image, DUTCH_ANGLE)
    };
    let data = Latents::new(&vae, arguments.scenes, settings.seed, tilted);
    println!("{} scenes encoded", data.scenes.len());
    let lora = Lora::<Differentiable>::new(&unet, arguments.rank, &device);
    println!(
        "{} parameters in the factors of {} weights",
        lora.num_params(),
        lora.layers.len()
    );
    let task = StyleTask {
        data,
        batch: settings.batch,
        tokenizer: CLIPTokenizer::from_pretrained(folder.join("tokenizer"))?,
        text_encoder: CLIPTextModel::from_pretrained(folder.join("text_encoder"), &device)?,
        unet,
        vae,
        scheduler: SchedulerConfig::from_file(folder.join("scheduler/scheduler_config.json"))?,
    };
    let lora = train(&task, lora, settings, &device)?;
    lora.save(&task.unet.valid(), &arguments.output)
}
