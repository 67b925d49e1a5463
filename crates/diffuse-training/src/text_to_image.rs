//! What the training of a text-to-image model and of its adapters have in common: latents of
//! captioned scenes, the error of the predicted noise, and sample images.

use anyhow::Result;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use diffuse_pipelines::clip::CLIPTokenizer;
use diffuse_pipelines::schedulers::{
    DPMSolverMultistepScheduler, Generator, PNDMScheduler, Scheduler, randn_tensor,
};
use diffuse_pipelines::unet::{Pretrained, UNet2DConditionModel};
use diffuse_pipelines::vae::AutoencoderKL;
use diffuse_pipelines::{StableDiffusionOptions, StableDiffusionPipeline};
use image::RgbImage;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::grid::{grid, to_tensor};
use crate::scenes::{
    Scene,
    caption::{Detail, caption},
};

/// Height and width of the scenes.
pub const SIZE: u32 = 128;
/// Maximum number of token ids of a text: captions have about twenty.
pub const MAX_LENGTH: usize = 32;
/// Share of empty captions, which guidance needs.
const EMPTY_CAPTIONS: f64 = 0.1;
/// Signal-to-noise ratio above which a timestep counts less (Hang et al. 2023,
/// <https://arxiv.org/abs/2303.09556>).
///
/// Below it, errors of the noise have the weight `1 / ᾱ`, like those of a velocity prediction
/// (Salimans & Ho 2022, <https://arxiv.org/abs/2202.00512>). The text matters most at the noisiest
/// timesteps, where an error of the image is only a small error of the noise.
const MAX_SNR: f32 = 5.0;

/// Scenes and the distributions of their latents, on the host.
pub struct Latents {
    /// What the latents show.
    pub scenes: Vec<Scene>,
    /// The values of all scenes in order.
    mean: Vec<f32>,
    std: Vec<f32>,
    shape: [usize; 3],
}

impl Latents {
    /// Renders scenes of [`SIZE`] with `render`, and encodes them to latents of unit variance.
    pub fn new<B: Backend>(
        vae: &AutoencoderKL<B>,
        count: usize,
        seed: u64,
        render: impl Fn(&Scene, u32, &mut StdRng) -> RgbImage,
    ) -> Self {
        const BATCH: usize = 32;
        let device = Default::default();
        let mut rng = StdRng::seed_from_u64(seed);
        let scale = vae.config().scaling_factor;
        let (mut scenes, mut mean, mut std) = (Vec::new(), Vec::new(), Vec::new());
        let mut shape = [0; 3];
        while scenes.len() < count {
            let batch: Vec<Scene> = (0..BATCH).map(|_| Scene::for_training(&mut rng)).collect();
            let images: Vec<RgbImage> = batch
                .iter()
                .map(|scene| render(scene, SIZE, &mut rng))
                .collect();
            let posterior = vae.encode(to_tensor(&images, &device));
            let [_, channels, height, width] = posterior.mean.dims();
            shape = [channels, height, width];
            let values = |tensor: Tensor<B, 4>| (tensor * scale).into_data();
            mean.extend(values(posterior.mean).iter::<f32>());
            std.extend(values((posterior.logvar * 0.5).exp()).iter::<f32>());
            scenes.extend(batch);
        }
        Self {
            scenes,
            mean,
            std,
            shape,
        }
    }

    /// The scenes of some indices, and samples of their latents: `[batch, channels, height,
    /// width]`.
    pub fn batch<B: Backend>(
        &self,
        indices: &[usize],
        noise: &mut Generator,
        device: &B::Device,
    ) -> Tensor<B, 4> {
        let length: usize = self.shape.iter().product();
        let [channels, height, width] = self.shape;
        let shape = [indices.len(), channels, height, width];
        let drawn = noise.normal(indices.len() * length, DType::F32);
        let values: Vec<f32> = indices
            .iter()
            .flat_map(|index| index * length..(index + 1) * length)
            .zip(drawn)
            .map(|(place, noise)| self.mean[place] + self.std[place] * noise)
            .collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }
}

/// Token ids of captions of some scenes: `[batch, MAX_LENGTH]`. One in ten is empty.
///
/// # Errors
/// If a caption cannot be tokenized.
pub fn token_ids(
    tokenizer: &CLIPTokenizer,
    scenes: &[Scene],
    indices: &[usize],
    rng: &mut StdRng,
) -> Result<TensorData> {
    let mut ids = Vec::new();
    for index in indices {
        let text = if rng.random_bool(EMPTY_CAPTIONS) {
            String::new()
        } else {
            caption(&scenes[*index], Detail::Casual, rng)
        };
        ids.extend(tokenizer.encode(&text)?.ids);
    }
    Ok(TensorData::new(ids, [indices.len(), MAX_LENGTH]))
}

/// The squared error of the predicted noise, averaged over a batch.
pub struct NoiseError<B: Backend> {
    /// As it is.
    pub mean: Tensor<B, 1>,
    /// Weighted by the timestep's signal-to-noise ratio: the loss.
    pub weighted: Tensor<B, 1>,
}

/// Adds noise to latents at uniform timesteps, and compares it with the prediction (Ho et al. 2020,
/// <https://arxiv.org/abs/2006.11239>, equation 14).
///
/// # Shapes
/// - `latents`: `[batch, channels, height, width]`
/// - `context`: `[batch, tokens, cross_attention_dim]`
///
/// # Errors
/// If the scheduler cannot add noise.
pub fn noise_error<B: Backend>(
    unet: &UNet2DConditionModel<B>,
    latents: Tensor<B, 4>,
    context: &Tensor<B, 3>,
    scheduler: &PNDMScheduler<B>,
    generator: &mut Generator,
    rng: &mut StdRng,
) -> Result<NoiseError<B>> {
    let device = latents.device();
    let [batch, ..] = latents.dims();
    let noise = randn_tensor(generator, latents.dims(), DType::F32, &device)?;
    let timesteps: Vec<f64> = (0..batch)
        .map(|_| f64::from(rng.random_range(0..1000_u32)))
        .collect();
    let alphas = scheduler.noise_schedule().alphas_cumprod();
    let weights: Vec<f32> = timesteps
        .iter()
        .map(|timestep| alphas[*timestep as usize])
        .map(|alpha| (MAX_SNR * (1.0 - alpha) / alpha).min(1.0) / alpha)
        .collect();
    let weights = TensorData::new(weights, [batch, 1]);
    let noisy = scheduler.add_noise(latents, noise.clone(), &timesteps)?;
    let predicted = unet.forward(noisy, timesteps, context);
    let error = (predicted - noise)
        .powi_scalar(2)
        .flatten::<2>(1, 3)
        .mean_dim(1);
    let weighted = error.clone() * Tensor::from_data(weights, &device);
    Ok(NoiseError {
        mean: error.mean(),
        weighted: weighted.mean(),
    })
}

/// Sample images, always of the same prompts and noise.
///
/// # Errors
/// If an image cannot be made.
pub fn sample<B: Backend>(mut pipeline: StableDiffusionPipeline<B>) -> Result<RgbImage> {
    let config = pipeline.scheduler.config();
    pipeline.scheduler = Box::new(DPMSolverMultistepScheduler::from_config(config)?);
    let options = StableDiffusionOptions {
        prompt: SAMPLE_PROMPTS.map(String::from).into(),
        num_inference_steps: 15,
        guidance_scale: 3.0,
        seeds: vec![0],
        ..StableDiffusionOptions::default()
    };
    Ok(grid(&pipeline.generate(&options)?.images, 6))
}

const SAMPLE_PROMPTS: [&str; 12] = [
    "a small red house on snow at night",
    "two trees and a moon over the sea",
    "a blue boat on the sea at sunset",
    "a large mountain and a sun in a meadow by day",
    "a yellow house on the left and a tree on the right on the sand by day",
    "a purple boat and a small moon at sea at night",
    "a big tree in a meadow at sunset",
    "two red houses in the snow by day",
    "a mountain over the sea under the stars",
    "the sun over the sand at sunset",
    "a large blue house in a meadow at night",
    "a tiny yellow boat on the right at sea by day",
];
