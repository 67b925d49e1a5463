//! Text to image with Stable Diffusion v1 (Rombach et al. 2022, <https://arxiv.org/abs/2112.10752>).
//!
//! Text becomes token ids, ids become embeddings; noise becomes latents, step by step, under the embeddings' guidance;
//! latents become pictures. Each stage is a method of its own, and [`StableDiffusionPipeline::generate_with`] is those
//! stages in order.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use diffuse_clip::{CLIPTextModel, CLIPTokenizer};
use diffuse_nn::checkpoint::{cast, float_dtype};
use diffuse_nn::ops::has_gpu_kernels;
use diffuse_schedulers::{
    NoiseSource, Overrides, Scheduler, StepOptions, TimestepRequest, randn_tensor,
    scheduler_from_config,
};
use diffuse_unet::{LoadOptions, Pretrained, SampleSize, UNet2DConditionModel};
use diffuse_vae::AutoencoderKL;
use image::RgbImage;

use crate::folder::{ModelIndex, PipelineKind, component_folder, load_scheduler, pipeline_folder};
use crate::generation::{
    StageTimes, check_finite, check_generators, check_pixels, seeds_or_random,
};
use crate::{Generated, PipelineError, StepEvent, generators, guide, rescale_noise, to_pictures};

/// Options of [`StableDiffusionPipeline`], by the reference's names and with its defaults.
#[derive(Debug, Clone)]
pub struct StableDiffusionOptions<B: Backend> {
    /// What to show; several are a batch.
    pub prompt: Vec<String>,
    /// What not to show: none, one for all prompts, or one for each.
    pub negative_prompt: Vec<String>,
    /// In place of `prompt`: `[batch, tokens, hidden_size]`.
    pub prompt_embeds: Option<Tensor<B, 3>>,
    /// In place of `negative_prompt`: shaped as `prompt_embeds`.
    pub negative_prompt_embeds: Option<Tensor<B, 3>>,
    /// Height in pixels, a multiple of 8; by default that of `latents`, or else what the UNet was made for.
    pub height: Option<usize>,
    /// Width in pixels, a multiple of 8; by default that of `latents`, or else what the UNet was made for.
    pub width: Option<usize>,
    /// Number of steps.
    pub num_inference_steps: usize,
    /// In place of `num_inference_steps`: the timesteps themselves, falling.
    pub timesteps: Option<Vec<f64>>,
    /// In place of `num_inference_steps`: the noise levels themselves, falling.
    pub sigmas: Option<Vec<f64>>,
    /// How far to go beyond the prompt's own prediction; there is no second forward pass at 1 and below.
    pub guidance_scale: f64,
    /// How much of the guided noise's spread is taken back, in `[0, 1]`.
    pub guidance_rescale: f64,
    /// Pictures of each prompt.
    pub num_images_per_prompt: usize,
    /// How much noise each step adds, for schedulers that take it (DDIM), from 0 (none) to 1 (as DDPM).
    pub eta: f64,
    /// How many of the text encoder's last layers the prompt leaves out; the negative prompt goes through all.
    pub clip_skip: Option<usize>,
    /// None: one at random. One: a generator for the whole batch. As many as pictures: a generator each.
    pub seeds: Vec<u64>,
    /// The initial noise of unit variance, in place of drawing it: `[batch, channels, height / 8, width / 8]`.
    pub latents: Option<Tensor<B, 4>>,
}

impl<B: Backend> Default for StableDiffusionOptions<B> {
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            negative_prompt: Vec::new(),
            prompt_embeds: None,
            negative_prompt_embeds: None,
            height: None,
            width: None,
            num_inference_steps: 50,
            timesteps: None,
            sigmas: None,
            guidance_scale: 7.5,
            guidance_rescale: 0.0,
            num_images_per_prompt: 1,
            eta: 0.0,
            clip_skip: None,
            seeds: Vec::new(),
            latents: None,
        }
    }
}

impl<B: Backend> From<&str> for StableDiffusionOptions<B> {
    fn from(prompt: &str) -> Self {
        Self {
            prompt: vec![prompt.to_string()],
            ..Self::default()
        }
    }
}

/// Embeddings of some texts.
#[derive(Debug, Clone)]
pub struct EncodedPrompt<B: Backend> {
    /// `[texts, tokens, hidden_size]`
    pub embeds: Tensor<B, 3>,
    /// For each text that was too long, the part that was cut.
    pub truncated: Vec<String>,
}

/// The embeddings of a run, a row for each picture.
#[derive(Debug, Clone)]
pub struct PreparedPrompt<B: Backend> {
    /// What the UNet is called with: negative rows before positive ones where there is guidance, else the positive
    /// rows: `[batch or 2 · batch, tokens, hidden_size]`.
    pub context: Tensor<B, 3>,
    /// Whether there are negative rows.
    pub guided: bool,
    /// For each text that was too long, the part that was cut.
    pub truncated: Vec<String>,
}

/// The parts of a [`StableDiffusionPipeline`].
pub struct StableDiffusionParts<B: Backend> {
    /// Text to token ids.
    pub tokenizer: CLIPTokenizer,
    /// Token ids to embeddings.
    pub text_encoder: CLIPTextModel<B>,
    /// Predicts the noise in latents.
    pub unet: UNet2DConditionModel<B>,
    /// Latents to pictures.
    pub vae: AutoencoderKL<B>,
    /// Takes the noise out, step by step.
    pub scheduler: Box<dyn Scheduler<B>>,
}

/// Text to image with Stable Diffusion v1. Its parts may be replaced at any time.
pub struct StableDiffusionPipeline<B: Backend> {
    /// Text to token ids.
    pub tokenizer: CLIPTokenizer,
    /// Token ids to embeddings.
    pub text_encoder: CLIPTextModel<B>,
    /// Predicts the noise in latents.
    pub unet: UNet2DConditionModel<B>,
    /// Latents to pictures.
    pub vae: AutoencoderKL<B>,
    /// Takes the noise out, step by step.
    pub scheduler: Box<dyn Scheduler<B>>,
    /// Height and width of the latents by default.
    sample_size: Option<SampleSize>,
}

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Puts a pipeline together. As the reference does, it corrects a scheduler of an early checkpoint
    /// (`steps_offset` 1, `clip_sample` false) and a UNet's `sample_size`; a scheduler that is put in its place later
    /// stays as it is.
    ///
    /// # Errors
    /// If the parts do not fit together.
    pub fn new(parts: StableDiffusionParts<B>) -> Result<Self, PipelineError> {
        let StableDiffusionParts {
            tokenizer,
            text_encoder,
            unet,
            vae,
            scheduler,
        } = parts;
        check_parts(&tokenizer, &text_encoder, &unet, &vae)?;
        let scheduler = correct_scheduler(scheduler)?;
        let sample_size = default_sample_size(&unet);
        Ok(Self {
            tokenizer,
            text_encoder,
            unet,
            vae,
            scheduler,
            sample_size,
        })
    }

    /// Loads a published folder, such as that of `CompVis/stable-diffusion-v1-4`. With the crate's feature `hub` that
    /// name will do: what is not in the cache is fetched.
    ///
    /// # Errors
    /// If a file is missing or damaged, or asks for something that is not computed here.
    pub fn from_pretrained(
        folder: impl AsRef<Path>,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        Self::from_pretrained_with(folder, &LoadOptions::default(), device)
    }

    /// [`from_pretrained`](Self::from_pretrained) with a variant or a float type. Where `f16` is asked for, the
    /// autoencoder computes in it on GPUs, and in `f32` again where an activation exceeds its range; otherwise it
    /// computes in `f32`. Its weights are kept in [`weights`](LoadOptions::weights), if that is given.
    ///
    /// # Errors
    /// As [`from_pretrained`](Self::from_pretrained).
    pub fn from_pretrained_with(
        folder: impl AsRef<Path>,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        let kind = PipelineKind::StableDiffusion;
        let folder = pipeline_folder(folder.as_ref(), kind, options.variant.as_deref())?;
        let index = ModelIndex::read(&folder)?;
        kind.check(&index)?;
        let component = |name| component_folder(&folder, name);

        // Small files first: what is wrong with them is told before gigabytes are read.
        let tokenizer = CLIPTokenizer::from_pretrained(component("tokenizer"))?;
        let scheduler = load_scheduler(&folder, &index)?;
        let vae_options = LoadOptions {
            dtype: match options.dtype {
                Some(DType::F16) if has_gpu_kernels::<B>() => options.dtype,
                _ => Some(DType::F32),
            },
            ..options.clone()
        };
        Self::new(StableDiffusionParts {
            tokenizer,
            text_encoder: CLIPTextModel::from_pretrained_with(
                component("text_encoder"),
                options,
                device,
            )?,
            vae: AutoencoderKL::from_pretrained_with(component("vae"), &vae_options, device)?,
            unet: UNet2DConditionModel::from_pretrained_with(component("unet"), options, device)?,
            scheduler,
        })
    }

    /// Generates pictures.
    ///
    /// # Errors
    /// If an option makes no sense, or the result is not finite.
    pub fn generate(
        &mut self,
        options: &StableDiffusionOptions<B>,
    ) -> Result<Generated<B>, PipelineError> {
        let mut noise = generators(&seeds_or_random(&options.seeds));
        self.generate_with(options, &mut noise, |_| ControlFlow::Continue(()))
    }

    /// [`generate`](Self::generate) with noise of any source, in place of seeds, and a callback after each step.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_with(
        &mut self,
        options: &StableDiffusionOptions<B>,
        noise: &mut dyn NoiseSource,
        mut on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>, PipelineError> {
        self.check_inputs(options)?;
        self.scheduler.set_timesteps(&timestep_request(options))?;
        let timesteps = self.scheduler.timesteps().to_vec();
        let start = Instant::now();
        let prompt = self.prepare_prompt(options)?;
        let encoded = Instant::now();
        let mut latents = self.prepare_latents(options, noise)?;

        let step_options = StepOptions {
            eta: self.scheduler.capabilities().eta.then_some(options.eta),
            ..StepOptions::default()
        };
        let mut interrupted = false;
        for (step, &timestep) in timesteps.iter().enumerate() {
            let input = self
                .scheduler
                .scale_model_input(latents.clone(), timestep)?;
            let noise_pred = self.predict_noise(input, timestep, &prompt, options);
            let output =
                self.scheduler
                    .step(noise_pred, timestep, latents, &step_options, noise)?;
            latents = output.prev_sample;
            let event = StepEvent {
                step,
                steps: timesteps.len(),
                timestep,
                latents: &mut latents,
                pred_original_sample: output.pred_original_sample.as_ref(),
            };
            if on_step(event).is_break() {
                interrupted = true;
                break;
            }
        }
        check_finite("latents", &latents)?;
        let denoised = Instant::now();
        Ok(Generated {
            images: self.decode(latents.clone())?,
            latents,
            timesteps,
            truncated: prompt.truncated,
            interrupted,
            times: StageTimes {
                encode: encoded - start,
                denoise: denoised - encoded,
                decode: denoised.elapsed(),
            },
        })
    }

    /// Checks options against each other and against the parts, before anything is computed.
    ///
    /// # Errors
    /// If one makes no sense.
    pub fn check_inputs(&self, options: &StableDiffusionOptions<B>) -> Result<(), PipelineError> {
        check_options(options).map_err(PipelineError::Options)?;
        let [batch, channels, height, width] = self.latent_shape(options)?;
        check_generators(options.seeds.len(), batch)?;
        if let Some(latents) = &options.latents {
            let given = latents.dims();
            let expected = [batch, channels, height, width];
            if given != expected {
                return Err(PipelineError::Options(format!(
                    "`latents` has shape {given:?}, but these options need {expected:?}"
                )));
            }
        }
        let layers = self.text_encoder.text_model.encoder.layers.len();
        if let Some(skip) = options.clip_skip.filter(|skip| *skip > layers) {
            return Err(PipelineError::Options(format!(
                "`clip_skip` is {skip}, but the text encoder has {layers} layers"
            )));
        }
        let dim = self.text_encoder.config().hidden_size;
        for (name, embeds) in [
            ("prompt_embeds", &options.prompt_embeds),
            ("negative_prompt_embeds", &options.negative_prompt_embeds),
        ] {
            let Some([rows, tokens, size]) = embeds.as_ref().map(Tensor::dims) else {
                continue;
            };
            if size != dim || rows == 0 || tokens == 0 {
                return Err(PipelineError::Options(format!(
                    "`{name}` has shape {:?}, but the UNet takes embeddings of {dim}",
                    [rows, tokens, size]
                )));
            }
            let texts = self.tokenizer.max_length();
            let both = options.prompt_embeds.is_some() && options.negative_prompt_embeds.is_some();
            let guided = options.guidance_scale > 1.0;
            if !both && guided && tokens != texts {
                return Err(PipelineError::Options(format!(
                    "`{name}` has {tokens} tokens, but the texts beside it have {texts}: give embeddings for both"
                )));
            }
        }
        Ok(())
    }

    /// Shape of the latents of a run: `[batch, channels, height / 8, width / 8]`.
    fn latent_shape(
        &self,
        options: &StableDiffusionOptions<B>,
    ) -> Result<[usize; 4], PipelineError> {
        let texts = match &options.prompt_embeds {
            Some(embeds) => embeds.dims()[0],
            None => options.prompt.len(),
        };
        let batch = texts.saturating_mul(options.num_images_per_prompt);
        let downscale = self.vae.config().downscale();
        let default = match (&options.latents, self.sample_size) {
            (Some(latents), _) => {
                let [_, _, height, width] = latents.dims();
                Some([height, width])
            }
            (None, size) => size.map(SampleSize::dims),
        };
        let side = |name: &str, given: Option<usize>, default: Option<usize>| {
            let side = given
                .or(default.map(|side| side * downscale))
                .ok_or_else(|| {
                    format!("give `{name}`: the UNet's configuration has no `sample_size`")
                })?;
            if side == 0 || !side.is_multiple_of(downscale) {
                return Err(format!(
                    "`height` and `width` have to be divisible by {downscale} and not zero, but `{name}` is {side}"
                ));
            }
            Ok(side)
        };
        let height = side("height", options.height, default.map(|[height, _]| height));
        let width = side("width", options.width, default.map(|[_, width]| width));
        let (height, width) = (
            height.map_err(PipelineError::Options)?,
            width.map_err(PipelineError::Options)?,
        );
        check_pixels(batch, [height, width])?;
        let least = self.least_latent_side();
        if height / downscale < least || width / downscale < least {
            return Err(PipelineError::Options(format!(
                "a picture of {width} x {height} is too small for this UNet: {} on each side at least",
                least * downscale
            )));
        }
        let channels = self.unet.config().in_channels;
        Ok([batch, channels, height / downscale, width / downscale])
    }

    /// A UNet that pads on one side only cannot halve a side of one.
    fn least_latent_side(&self) -> usize {
        let config = self.unet.config();
        match config.downsample_padding {
            0 => 1 << (config.block_out_channels.len() - 1),
            _ => 1,
        }
    }

    /// Embeddings of texts, after the text encoder's final norm; `clip_skip` leaves out its last layers.
    ///
    /// # Errors
    /// If the tokenizer refuses a text.
    pub fn encode_prompt(
        &self,
        texts: &[String],
        clip_skip: Option<usize>,
    ) -> Result<EncodedPrompt<B>, PipelineError> {
        let mut ids = Vec::new();
        let mut truncated = Vec::new();
        for text in texts {
            let encoding = self.tokenizer.encode(text)?;
            ids.extend(encoding.ids.into_iter().map(i64::from));
            truncated.extend(encoding.truncated);
        }
        let shape = [texts.len(), self.tokenizer.max_length()];
        let device = self.unet.conv_in.weight.device();
        let ids = Tensor::<B, 2, Int>::from_data(TensorData::new(ids, shape), &device);
        let embeds = self.text_encoder.forward_skip(ids, clip_skip.unwrap_or(0));
        Ok(EncodedPrompt { embeds, truncated })
    }

    /// Embeddings for the UNet: those of the prompts, a row for each picture, after those of the negative prompts
    /// where the run is guided.
    ///
    /// # Errors
    /// If the tokenizer refuses a text.
    pub fn prepare_prompt(
        &self,
        options: &StableDiffusionOptions<B>,
    ) -> Result<PreparedPrompt<B>, PipelineError> {
        let mut truncated = Vec::new();
        let mut encode = |texts: &[String], clip_skip| {
            let encoded = self.encode_prompt(texts, clip_skip)?;
            truncated.extend(encoded.truncated);
            Ok::<_, PipelineError>(encoded.embeds)
        };
        let positive = match &options.prompt_embeds {
            Some(embeds) => embeds.clone(),
            None => encode(&options.prompt, options.clip_skip)?,
        };
        let [texts, tokens, dim] = positive.dims();
        // A network that takes the guidance scale as an input needs no second pass.
        let distilled = self.unet.config().time_cond_proj_dim.is_some();
        let guided = options.guidance_scale > 1.0 && !distilled;
        let mut rows = Vec::new();
        if guided {
            let negative = match (
                &options.negative_prompt_embeds,
                &options.negative_prompt[..],
            ) {
                (Some(embeds), _) => embeds.clone(),
                (None, []) => encode(&[String::new()], None)?,
                (None, negative) => encode(negative, None)?,
            };
            let [given, _, _] = negative.dims();
            rows.push(if given == texts {
                negative
            } else {
                negative.expand([texts, tokens, dim])
            });
        }
        rows.push(positive);
        let images = options.num_images_per_prompt;
        let rows = rows
            .into_iter()
            .map(|rows| {
                let repeated = rows.unsqueeze_dim::<4>(1).repeat_dim(1, images);
                repeated.reshape([texts * images, tokens, dim])
            })
            .collect();
        Ok(PreparedPrompt {
            context: Tensor::cat(rows, 0).cast(float_dtype(&self.unet)),
            guided,
            truncated,
        })
    }

    /// The noise that a run starts from, in `f32`, with the spread that the scheduler wants. Call it after
    /// `set_timesteps`, which decides the spread.
    ///
    /// # Errors
    /// If the options' sizes make no sense, or the noise source fails.
    pub fn prepare_latents(
        &self,
        options: &StableDiffusionOptions<B>,
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor<B, 4>, PipelineError> {
        let latents = match &options.latents {
            Some(latents) => latents.clone(),
            None => {
                let shape = self.latent_shape(options)?;
                let device = self.unet.conv_in.weight.device();
                randn_tensor::<B>(noise, shape, float_dtype(&self.unet), &device)?
            }
        };
        Ok(latents.cast(DType::F32) * self.scheduler.init_noise_sigma())
    }

    /// The UNet's prediction in `f32`, guided. Both halves of a guided run go through the UNet as one batch.
    ///
    /// # Shapes
    /// - `latents`, output: `[batch, channels, height, width]`
    pub fn predict_noise(
        &self,
        latents: Tensor<B, 4>,
        timestep: f64,
        prompt: &PreparedPrompt<B>,
        options: &StableDiffusionOptions<B>,
    ) -> Tensor<B, 4> {
        let input = latents.cast(float_dtype(&self.unet));
        let input = if prompt.guided {
            Tensor::cat(vec![input.clone(), input], 0)
        } else {
            input
        };
        let scale = options.guidance_scale;
        let noise = self
            .unet
            .forward_guided(input, timestep, &prompt.context, Some(scale))
            .cast(DType::F32);
        if !prompt.guided {
            return noise;
        }
        let [rows, _, _, _] = noise.dims();
        let unconditional = noise.clone().narrow(0, 0, rows / 2);
        let conditional = noise.narrow(0, rows / 2, rows / 2);
        let guided = guide(unconditional, conditional.clone(), scale);
        if options.guidance_rescale > 0.0 {
            rescale_noise(guided, conditional, options.guidance_rescale)
        } else {
            guided
        }
    }

    /// The pictures of latents, which are not yet divided by the autoencoder's scaling factor. They are decoded one
    /// after the other: a batch would need the memory of all at once.
    ///
    /// # Shapes
    /// - `latents`: `[batch, channels, height, width]`
    ///
    /// # Errors
    /// If the result is not finite.
    pub fn decode(&self, latents: Tensor<B, 4>) -> Result<Vec<RgbImage>, PipelineError> {
        let latents = latents.cast(DType::F32) / self.vae.config().scaling_factor;
        let dtype = float_dtype(&self.vae);
        let mut exact = None;
        let mut pictures = Vec::new();
        for latents in latents.iter_dim(0) {
            let decoded = to_pictures(self.vae.decode(latents.clone().cast(dtype)));
            let decoded = match decoded {
                // An activation that exceeds the range of `f16` is infinite, and what follows no number.
                Err(PipelineError::NotFinite { .. }) if dtype != DType::F32 => {
                    let vae = exact.get_or_insert_with(|| cast(self.vae.clone(), DType::F32));
                    to_pictures(vae.decode(latents))
                }
                decoded => decoded,
            };
            pictures.extend(decoded?);
        }
        Ok(pictures)
    }
}

/// Which timesteps the options ask for.
fn timestep_request<B: Backend>(options: &StableDiffusionOptions<B>) -> TimestepRequest {
    match (&options.timesteps, &options.sigmas) {
        (Some(timesteps), _) => TimestepRequest::Timesteps(timesteps.clone()),
        (None, Some(sigmas)) => TimestepRequest::Sigmas(sigmas.clone()),
        (None, None) => TimestepRequest::Steps(options.num_inference_steps),
    }
}

/// What can be checked without the parts.
fn check_options<B: Backend>(options: &StableDiffusionOptions<B>) -> Result<(), String> {
    match (&options.prompt[..], &options.prompt_embeds) {
        ([], None) => return Err("provide either `prompt` or `prompt_embeds`".into()),
        ([_, ..], Some(_)) => {
            return Err("provide only one of `prompt` and `prompt_embeds`".into());
        }
        _ => {}
    }
    if !options.negative_prompt.is_empty() && options.negative_prompt_embeds.is_some() {
        return Err("provide only one of `negative_prompt` and `negative_prompt_embeds`".into());
    }
    let texts = match &options.prompt_embeds {
        Some(embeds) => embeds.dims()[0],
        None => options.prompt.len(),
    };
    let negative = options.negative_prompt.len();
    if negative > 1 && negative != texts {
        return Err(format!(
            "{negative} negative prompts for {texts} prompts: give one for all, or one for each"
        ));
    }
    if let Some(negative) = options.negative_prompt_embeds.as_ref().map(Tensor::dims) {
        if let Some(positive) = options.prompt_embeds.as_ref().map(Tensor::dims)
            && positive != negative
        {
            return Err(format!(
                "`prompt_embeds` {positive:?} and `negative_prompt_embeds` {negative:?} must have the same shape"
            ));
        }
        if negative[0] != texts {
            return Err(format!(
                "`negative_prompt_embeds` has {} rows for {texts} prompts",
                negative[0]
            ));
        }
    }
    if options.timesteps.is_some() && options.sigmas.is_some() {
        return Err("only one of `timesteps` or `sigmas` can be given".into());
    }
    if !options.guidance_scale.is_finite() {
        return Err(format!("`guidance_scale` is {}", options.guidance_scale));
    }
    for (name, value) in [
        ("guidance_rescale", options.guidance_rescale),
        ("eta", options.eta),
    ] {
        if !(0.0..=1.0).contains(&value) {
            return Err(format!("`{name}` is {value}, but has to be in [0, 1]"));
        }
    }
    if options.num_images_per_prompt == 0 {
        return Err("`num_images_per_prompt` is 0".into());
    }
    Ok(())
}

fn check_parts<B: Backend>(
    tokenizer: &CLIPTokenizer,
    text_encoder: &CLIPTextModel<B>,
    unet: &UNet2DConditionModel<B>,
    vae: &AutoencoderKL<B>,
) -> Result<(), PipelineError> {
    let (text, unet, vae) = (text_encoder.config(), unet.config(), vae.config());
    let cross = unet
        .cross_attention_dim
        .levels(unet.block_out_channels.len());
    let cross = cross.unwrap_or_default();
    let message = if tokenizer.vocab_size() > text.vocab_size {
        format!(
            "the tokenizer has {} ids, the text encoder {}",
            tokenizer.vocab_size(),
            text.vocab_size
        )
    } else if tokenizer.max_length() > text.max_position_embeddings {
        format!(
            "the tokenizer gives {} ids, the text encoder takes {}",
            tokenizer.max_length(),
            text.max_position_embeddings
        )
    } else if let Some(cross) = cross.iter().find(|cross| **cross != text.hidden_size) {
        format!(
            "the text encoder gives embeddings of {}, the UNet takes {cross}",
            text.hidden_size
        )
    } else if unet.in_channels == 2 * vae.latent_channels + 1 {
        format!(
            "the UNet takes {} channels: it is for inpainting, not for text to image",
            unet.in_channels
        )
    } else if unet.in_channels != vae.latent_channels || unet.out_channels != vae.latent_channels {
        format!(
            "the autoencoder's latents have {} channels, the UNet takes {} and gives {}",
            vae.latent_channels, unet.in_channels, unet.out_channels
        )
    } else if vae.out_channels != 3 && vae.out_channels != 1 {
        format!(
            "a picture has 3 channels or 1, but the autoencoder's `out_channels` is {}",
            vae.out_channels
        )
    } else {
        return Ok(());
    };
    Err(PipelineError::Parts(message))
}

/// The reference's corrections of early checkpoints' schedulers.
fn correct_scheduler<B: Backend>(
    scheduler: Box<dyn Scheduler<B>>,
) -> Result<Box<dyn Scheduler<B>>, PipelineError> {
    let mut config = scheduler.config().clone();
    let offset = config.get("steps_offset").and_then(|value| value.as_f64());
    let wrong_offset = offset.is_some_and(|offset| offset != 1.0);
    let clips = config.get("clip_sample").and_then(|value| value.as_bool()) == Some(true);
    if wrong_offset {
        config.patch("steps_offset", 1);
    }
    if clips {
        config.patch("clip_sample", false);
    }
    if wrong_offset || clips {
        Ok(scheduler_from_config(&config, None, &Overrides::new())?)
    } else {
        Ok(scheduler)
    }
}

/// The UNet's `sample_size`; early files have a wrong one, which the reference takes for 64.
fn default_sample_size<B: Backend>(unet: &UNet2DConditionModel<B>) -> Option<SampleSize> {
    let config = unet.config();
    let early = config.diffusers_version.as_deref().is_some_and(|version| {
        let mut numbers = version
            .split('.')
            .map(|part| part.parse::<u32>().unwrap_or(0));
        let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        (major, minor) < (0, 9)
    });
    match config.sample_size {
        Some(SampleSize::Square(size)) if early && size < 64 => Some(SampleSize::Square(64)),
        size => size,
    }
}
