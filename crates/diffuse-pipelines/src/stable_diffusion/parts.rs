//! The parts of the pipeline: loading them, and whether they fit together.

use std::collections::BTreeSet;

use burn::tensor::{FloatDType, backend::Backend};
use diffuse_clip::{CLIPTextModel, CLIPTokenizer};
use diffuse_nn::ModelPath;
use diffuse_nn::checkpoint::Checkpoint;
use diffuse_nn::ops::has_gpu_kernels;
use diffuse_schedulers::{Overrides, Scheduler, scheduler_from_config};
use diffuse_unet::{
    LoadOptions, Pretrained, PretrainedError, SampleSize, UNet2DConditionConfig,
    UNet2DConditionModel,
};
use diffuse_vae::Autoencoder;

use crate::components::{check_class_labels, component_options, component_path, load_autoencoder};
use crate::folder::{ModelIndex, PipelineKind, load_scheduler, pipeline_folder};
use crate::{PipelineError, SafetyChecker};

/// The parts of a [`StableDiffusionPipeline`].
pub struct StableDiffusionParts<B: Backend> {
    /// Text to token ids.
    pub tokenizer: CLIPTokenizer,
    /// Token ids to embeddings.
    pub text_encoder: CLIPTextModel<B>,
    /// Predicts the noise in latents.
    pub unet: UNet2DConditionModel<B>,
    /// Latents to images.
    pub vae: Autoencoder<B>,
    /// Takes the noise out, step by step.
    pub scheduler: Box<dyn Scheduler<B>>,
    /// Makes images black that it takes for unsafe; none does not check them.
    pub safety_checker: Option<SafetyChecker<B>>,
}

/// Text to image with Stable Diffusion v1. Its parts may be replaced at any time.
pub struct StableDiffusionPipeline<B: Backend> {
    /// Text to token ids.
    pub tokenizer: CLIPTokenizer,
    /// Token ids to embeddings.
    pub text_encoder: CLIPTextModel<B>,
    /// Predicts the noise in latents.
    pub unet: UNet2DConditionModel<B>,
    /// Latents to images.
    pub vae: Autoencoder<B>,
    /// Takes the noise out, step by step.
    pub scheduler: Box<dyn Scheduler<B>>,
    /// Makes images black that it takes for unsafe; none does not check them.
    pub safety_checker: Option<SafetyChecker<B>>,
    /// Height and width of the latents by default.
    pub(super) sample_size: Option<SampleSize>,
    /// Where text encoder and UNet were loaded from.
    pub(super) weights: Option<LoadedWeights>,
}

/// The tensors that text encoder and UNet were loaded from.
pub(crate) struct LoadedWeights {
    /// The text encoder's.
    pub text_encoder: Checkpoint,
    /// The UNet's.
    pub unet: Checkpoint,
    /// The weights that adapters have changed since.
    pub changed: ChangedWeights,
}

/// Keys of changed weights.
#[derive(Debug, Default)]
pub(crate) struct ChangedWeights {
    pub text_encoder: BTreeSet<String>,
    pub unet: BTreeSet<String>,
}

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Puts a pipeline together. As the reference does, it corrects a scheduler of an early
    /// checkpoint (`steps_offset` 1, `clip_sample` false) and a UNet's `sample_size`; a scheduler
    /// that is put in its place later stays as it is.
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
            safety_checker,
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
            safety_checker,
            sample_size,
            weights: None,
        })
    }

    /// [`new`](Self::new) with parts that were loaded from files.
    pub(crate) fn from_loaded(
        parts: StableDiffusionParts<B>,
        text_encoder: Checkpoint,
        unet: Checkpoint,
    ) -> Result<Self, PipelineError> {
        let mut pipeline = Self::new(parts)?;
        pipeline.weights = Some(LoadedWeights {
            text_encoder,
            unet,
            changed: ChangedWeights::default(),
        });
        Ok(pipeline)
    }

    /// Loads a published folder, such as that of `CompVis/stable-diffusion-v1-4`. With the crate's
    /// feature `hub` that name will do: what is not in the cache is fetched.
    ///
    /// # Errors
    /// If a file is missing or damaged, or asks for something that is not computed here.
    pub fn from_pretrained(
        folder: impl Into<ModelPath>,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        Self::from_pretrained_with(folder, &LoadOptions::default(), device)
    }

    /// [`from_pretrained`](Self::from_pretrained) with a variant or a float type. Where `f16` is
    /// asked for, the autoencoder computes in it on GPUs, and in `f32` again where an activation
    /// exceeds its range; otherwise it computes in `f32`. Its weights are kept in
    /// [`weights`](LoadOptions::weights), if that is given.
    ///
    /// # Errors
    /// As [`from_pretrained`](Self::from_pretrained).
    pub fn from_pretrained_with(
        folder: impl Into<ModelPath>,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        Self::load(folder.into(), options, false, device)
    }

    /// [`from_pretrained_with`](Self::from_pretrained_with) without the safety checker, which is
    /// neither fetched nor loaded.
    ///
    /// # Errors
    /// As [`from_pretrained`](Self::from_pretrained).
    pub fn from_pretrained_without_safety_checker(
        folder: impl Into<ModelPath>,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        Self::load(folder.into(), options, true, device)
    }

    fn load(
        folder: ModelPath,
        options: &LoadOptions,
        no_safety_checker: bool,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        let kind = PipelineKind::StableDiffusion;
        let variant = options.variant.as_deref();
        let folder = pipeline_folder(folder, kind, variant, no_safety_checker)?;
        let index = ModelIndex::read(&folder)?;
        kind.check(&index)?;
        let component = |name| component_path(&folder, name);

        // Small files first: their errors come before gigabytes are read.
        let tokenizer = CLIPTokenizer::from_pretrained(component("tokenizer"))?;
        let scheduler = load_scheduler(&folder, &index)?;
        let load = |name| component_options(&folder, kind, name, options);
        let vae_options = vae_options::<B>(&load("vae"));
        let (text_options, unet_options) = (load("text_encoder"), load("unet"));
        let (text_config, text_weights) =
            CLIPTextModel::<B>::open(component("text_encoder"), &text_options)?;
        let (unet_config, unet_weights) =
            UNet2DConditionModel::<B>::open(component("unet"), &unet_options)?;
        check_unet(&unet_config)?;
        let safety_checker = if no_safety_checker || !index.has_safety_checker()? {
            None
        } else if folder.join("safety_checker").is_dir() {
            let options = load("safety_checker");
            Some(SafetyChecker::from_pretrained(&folder, &options, device)?)
        } else {
            log::warn!("the model's `safety_checker` is missing: images are not checked");
            None
        };
        let parts = StableDiffusionParts {
            tokenizer,
            text_encoder: CLIPTextModel::from_checkpoint(
                &text_config,
                &text_weights,
                &text_options,
                device,
            )?,
            vae: load_autoencoder(
                index.class_of("vae"),
                &component("vae"),
                &vae_options,
                device,
            )?,
            unet: UNet2DConditionModel::from_checkpoint(
                &unet_config,
                &unet_weights,
                &unet_options,
                device,
            )?,
            scheduler,
            safety_checker,
        };
        Self::from_loaded(parts, text_weights, unet_weights)
    }
}

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Whether the UNet was made for inpainting: it takes the mask and the latents of the masked
    /// image beside the latents.
    pub fn is_for_inpainting(&self) -> bool {
        inpaints(self.unet.config(), &self.vae)
    }

    /// Width and height in pixels of images for which the options name none; none if the UNet's
    /// configuration has no `sample_size`.
    pub fn default_size(&self) -> Option<[usize; 2]> {
        let [height, width] = self.sample_size?.dims();
        let downscale = self.vae.downscale();
        Some([width * downscale, height * downscale])
    }

    /// Checks that the UNet takes latents alone.
    pub(super) fn check_unet_for(&self, task: &str) -> Result<(), PipelineError> {
        if !self.is_for_inpainting() {
            return Ok(());
        }
        Err(PipelineError::Parts(format!(
            "the UNet takes {} channels: it is for inpainting, not for {task}",
            self.unet.config().in_channels
        )))
    }
}

/// The autoencoder computes in half precision only where GPU kernels do, whose sums do not
/// overflow.
pub(crate) fn vae_options<B: Backend>(options: &LoadOptions) -> LoadOptions {
    LoadOptions {
        dtype: match options.dtype {
            Some(FloatDType::F16) if has_gpu_kernels::<B>() => options.dtype,
            _ => Some(FloatDType::F32),
        },
        ..options.clone()
    }
}

fn check_unet(config: &UNet2DConditionConfig) -> Result<(), PretrainedError> {
    check_class_labels::<UNet2DConditionConfig>(config.class_embed_type, config.num_class_embeds)?;
    Ok(())
}

fn check_parts<B: Backend>(
    tokenizer: &CLIPTokenizer,
    text_encoder: &CLIPTextModel<B>,
    unet: &UNet2DConditionModel<B>,
    vae: &Autoencoder<B>,
) -> Result<(), PipelineError> {
    let (text, unet) = (text_encoder.config(), unet.config());
    check_unet(unet)?;
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
    } else if !(unet.in_channels == vae.latent_channels() || inpaints(unet, vae))
        || unet.out_channels != vae.latent_channels()
    {
        format!(
            "the autoencoder's latents have {} channels, the UNet takes {} and gives {}",
            vae.latent_channels(),
            unet.in_channels,
            unet.out_channels
        )
    } else if vae.out_channels() != 3 && vae.out_channels() != 1 {
        format!(
            "an image has 3 channels or 1, but the autoencoder's `out_channels` is {}",
            vae.out_channels()
        )
    } else {
        return Ok(());
    };
    Err(PipelineError::Parts(message))
}

/// Whether a UNet takes the mask and the latents of the masked image beside the latents.
fn inpaints<B: Backend>(unet: &UNet2DConditionConfig, vae: &Autoencoder<B>) -> bool {
    unet.in_channels == 2 * vae.latent_channels() + 1
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
