//! Trains a text encoder and a UNet together on the latents of captioned scenes, and writes a
//! Stable Diffusion folder.
//!
//! `docs/training.md` has the commands that made the weights of this repository.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::log_sigmoid;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor, TensorData};
use clap::Parser;
use diffuse_pipelines::clip::{CLIPTextConfig, CLIPTextModel, CLIPTokenizer};
use diffuse_pipelines::schedulers::{Generator, PNDMScheduler, SchedulerConfig};
use diffuse_pipelines::unet::{
    PerLevel, Pretrained, SampleSize, UNet2DConditionConfig, UNet2DConditionModel,
};
use diffuse_pipelines::vae::AutoencoderKL;
use diffuse_pipelines::{StableDiffusionParts, StableDiffusionPipeline};
use diffuse_training::scenes::{
    Scene,
    caption::{Detail, caption},
    render::render,
};
use diffuse_training::text_to_image::{
    Latents, MAX_LENGTH, NoiseError, SIZE, noise_error, sample, token_ids,
};
use diffuse_training::{
    Backend as Inner, Differentiable, Loss, Settings, Task, default_device, scaled, tokenizer,
    train, write_configs,
};
use image::RgbImage;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Folder of the trained autoencoder
    #[arg(long)]
    autoencoder: PathBuf,
    /// Start from the weights and the tokenizer of this pipeline
    #[arg(long)]
    from: Option<PathBuf>,
    /// Channels of the UNet's resolution levels
    #[arg(long, value_delimiter = ',', default_values_t = [48, 64, 64, 64])]
    channels: Vec<usize>,
    /// Attention heads of the UNet's resolution levels: many tokens with many heads are slow
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 4])]
    heads: Vec<usize>,
    /// Residual blocks of each resolution level of the UNet
    #[arg(long, default_value_t = 2)]
    layers: usize,
    /// Scenes to draw and encode before training
    #[arg(long, default_value_t = 16384)]
    scenes: usize,
    /// Folder for the finished pipeline
    #[arg(long)]
    output: PathBuf,
}

/// Size of the text embeddings.
const HIDDEN_SIZE: usize = 128;
/// Merges of the tokenizer.
const MERGES: usize = 180;
/// Number of last states of a text from which the scene is predicted: they are at or after the end
/// of the text, and attend to all of it.
const TELLING_STATES: usize = 8;

/// The modules that are trained together.
#[derive(Module, Debug)]
struct TextToLatents<B: Backend> {
    text_encoder: CLIPTextModel<B>,
    unet: UNet2DConditionModel<B>,
    /// Predicts the [features](Scene::features) of a scene from the states of its caption, in
    /// training only: at first the gradient of the UNet is too weak to train the text encoder.
    reader: Linear<B>,
}

struct TextToImageTask<I: Backend> {
    data: Latents,
    batch: usize,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL<I>,
    scheduler: SchedulerConfig,
}

impl<I: Backend> TextToImageTask<I> {
    fn pipeline(&self, model: TextToLatents<I>) -> Result<StableDiffusionPipeline<I>> {
        Ok(StableDiffusionPipeline::new(StableDiffusionParts {
            tokenizer: self.tokenizer.clone(),
            text_encoder: model.text_encoder,
            unet: model.unet,
            vae: self.vae.clone().into(),
            scheduler: Box::new(PNDMScheduler::from_config(&self.scheduler)?),
            safety_checker: None,
        })?)
    }
}

impl<B: AutodiffBackend> Task<B> for TextToImageTask<B::InnerBackend> {
    type Model = TextToLatents<B>;

    /// The [`noise_error`], and the error of the features that are read from the text.
    fn loss(&self, model: &TextToLatents<B>, seed: u64) -> Result<Loss<B>> {
        let device: B::Device = Default::default();
        let mut rng = StdRng::seed_from_u64(seed);
        let mut generator = Generator::new(seed);
        let indices: Vec<usize> = (0..self.batch)
            .map(|_| rng.random_range(0..self.data.scenes.len()))
            .collect();
        let ids = token_ids(&self.tokenizer, &self.data.scenes, &indices, &mut rng)?;
        let ids = Tensor::<B, 2, Int>::from_data(ids, &device);
        let context = model.text_encoder.forward(ids).last_hidden_state;
        let features: Vec<f32> = indices
            .iter()
            .flat_map(|index| self.data.scenes[*index].features())
            .collect();
        let features = TensorData::new(features, [self.batch, 1, Scene::FEATURES]);
        let told = context
            .clone()
            .narrow(1, MAX_LENGTH - TELLING_STATES, TELLING_STATES);
        let text_error = cross_entropy(
            model.reader.forward(told),
            Tensor::from_data(features, &device),
        );

        let latents = self.data.batch::<B>(&indices, &mut generator, &device);
        let schedule = PNDMScheduler::<B>::from_config(&self.scheduler)?;
        let NoiseError { mean, weighted } = noise_error(
            &model.unet,
            latents,
            &context,
            &schedule,
            &mut generator,
            &mut rng,
        )?;
        let parts = vec![("noise", mean), ("text", text_error.clone())];
        Ok((weighted + text_error, parts))
    }

    /// Sample images, always of the same prompts and noise.
    fn sample(&self, model: TextToLatents<B::InnerBackend>) -> Result<RgbImage> {
        sample(self.pipeline(model)?)
    }
}

fn unet_config(arguments: &Arguments, context: usize) -> UNet2DConditionConfig {
    UNet2DConditionConfig {
        diffusers_version: Some("0.42.1".into()),
        sample_size: Some(SampleSize::Square(SIZE as usize / 8)),
        block_out_channels: arguments.channels.clone(),
        layers_per_block: PerLevel::Same(arguments.layers),
        attention_head_dim: PerLevel::Each(arguments.heads.clone()),
        norm_num_groups: 16,
        cross_attention_dim: PerLevel::Same(context),
        ..UNet2DConditionConfig::default()
    }
}

fn text_config(vocab_size: usize) -> CLIPTextConfig {
    CLIPTextConfig {
        vocab_size,
        hidden_size: HIDDEN_SIZE,
        intermediate_size: 384,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        max_position_embeddings: MAX_LENGTH,
        ..CLIPTextConfig::default()
    }
}

/// Initial weights for fast training: small embeddings, and a UNet with zero output.
fn fresh<B: Backend>(
    arguments: &Arguments,
    tokenizer: &CLIPTokenizer,
    device: &B::Device,
) -> TextToLatents<B> {
    let text_config = text_config(tokenizer.vocab_size());
    let unet_config = unet_config(arguments, text_config.hidden_size);
    let mut text_encoder = CLIPTextModel::<B>::from_config(&text_config, device);
    let embeddings = &mut text_encoder.text_model.embeddings;
    for embedding in [
        &mut embeddings.token_embedding,
        &mut embeddings.position_embedding,
    ] {
        embedding.weight = scaled(embedding.weight.clone(), 0.1);
    }
    let mut unet = UNet2DConditionModel::from_config(&unet_config, device);
    unet.conv_out.weight = scaled(unet.conv_out.weight, 0.0);
    TextToLatents {
        text_encoder,
        unet,
        reader: reader(device),
    }
}

fn reader<B: Backend>(device: &B::Device) -> Linear<B> {
    LinearConfig::new(HIDDEN_SIZE, Scene::FEATURES).init(device)
}

/// Binary cross-entropy of features, 0 or 1, given their logits.
fn cross_entropy<B: Backend>(logits: Tensor<B, 3>, features: Tensor<B, 3>) -> Tensor<B, 1> {
    let absent = features.clone().neg() + 1.0;
    let likelihood = log_sigmoid(logits.clone()) * features + log_sigmoid(logits.neg()) * absent;
    likelihood.mean().neg()
}

/// The scheduler that Stable Diffusion v1 was published with.
fn scheduler_config() -> Value {
    json!({
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": false,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": false,
        "skip_prk_steps": true,
        "steps_offset": 1,
        "trained_betas": null,
    })
}

/// Writes a folder like Stable Diffusion v1, without the safety checker.
fn save<B: Backend>(
    model: &TextToLatents<B>,
    autoencoder: &Path,
    tokenizer: &Path,
    folder: &Path,
) -> Result<()> {
    let index = json!({
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [null, null],
        "requires_safety_checker": false,
        "safety_checker": [null, null],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    model
        .text_encoder
        .save_pretrained(folder.join("text_encoder"))?;
    model.unet.save_pretrained(folder.join("unet"))?;
    copy(autoencoder, &folder.join("vae"))?;
    copy(tokenizer, &folder.join("tokenizer"))?;
    let configs = [
        ("scheduler/scheduler_config.json", scheduler_config()),
        ("model_index.json", index),
    ];
    write_configs(folder, configs)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let settings = &arguments.settings;
    let device = default_device();
    Inner::seed(&device, settings.seed);

    let mut rng = StdRng::seed_from_u64(settings.seed);
    let captions: Vec<String> = (0..20_000)
        .map(|_| caption(&Scene::for_training(&mut rng), Detail::Casual, &mut rng))
        .collect();
    let tokenizer_folder = match &arguments.from {
        Some(folder) => folder.join("tokenizer"),
        None => {
            let folder = settings.folder.join("tokenizer");
            tokenizer::train(&captions, MERGES, MAX_LENGTH, &folder)?;
            folder
        }
    };
    let tokenizer = CLIPTokenizer::from_pretrained(&tokenizer_folder)?;
    let mut lengths = Vec::new();
    for caption in &captions {
        lengths.push(tokenizer.tokenize(caption)?.len());
    }
    println!(
        "{} tokens, {} at most in a caption",
        tokenizer.vocab_size(),
        lengths.iter().max().expect("there are captions")
    );

    let vae = AutoencoderKL::<Inner>::from_pretrained(&arguments.autoencoder, &device)?;
    let data = Latents::new(&vae, arguments.scenes, settings.seed, render);
    println!("{} scenes encoded", data.scenes.len());
    let model = match &arguments.from {
        Some(folder) => TextToLatents::<Differentiable> {
            text_encoder: CLIPTextModel::from_pretrained(folder.join("text_encoder"), &device)?,
            unet: UNet2DConditionModel::from_pretrained(folder.join("unet"), &device)?,
            reader: reader(&device),
        },
        None => fresh(&arguments, &tokenizer, &device),
    };
    println!(
        "{} parameters in the text encoder, {} in the UNet, {} in the autoencoder",
        model.text_encoder.num_params(),
        model.unet.num_params(),
        vae.num_params()
    );
    let task = TextToImageTask {
        data,
        batch: settings.batch,
        tokenizer,
        vae,
        scheduler: SchedulerConfig::from_json_str(&scheduler_config().to_string())?,
    };
    let model = train(&task, model, settings, &device)?;
    save(
        &model,
        &arguments.autoencoder,
        &tokenizer_folder,
        &arguments.output,
    )
}
