//! Single files in the original layout (CompVis's `ldm`): all weights of Stable Diffusion under one
//! set of keys, without configurations.

mod configs;
mod keys;
mod kind;
mod tiny_vae;
mod write;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, backend::Backend};
use diffuse_clip::{CLIPTextConfig, CLIPTextModel, CLIPTokenizer};
use diffuse_nn::checkpoint::{Checkpoint, CheckpointError, parameters};
use diffuse_nn::config::ModelConfig;
use diffuse_nn::pretrained::{LoadOptions, Pretrained, PretrainedError};
use diffuse_schedulers::{Overrides, SchedulerConfig, scheduler_from_config};
use diffuse_unet::{
    ControlNetConfig, ControlNetModel, UNet2DConditionConfig, UNet2DConditionModel,
};
use diffuse_vae::{Autoencoder, AutoencoderKL, AutoencoderKLConfig, AutoencoderTiny};

use crate::components::{component_folder, component_options, load_autoencoder};
use crate::inspect::class_of;
use crate::stable_diffusion::{StableDiffusionParts, StableDiffusionPipeline, vae_options};
use crate::{PipelineError, PipelineKind};
use keys::Stored;

pub(crate) use keys::UNetKeys;
pub use kind::{FileKind, StableDiffusionFile};
pub(crate) use write::{ComponentFiles, write_single_file};

/// How to load a single file.
#[derive(Debug, Clone, Default)]
pub struct SingleFileOptions {
    /// Types, and whether surplus tensors are refused.
    pub load: LoadOptions,
    /// A pipeline's folder in Diffusers' layout, whose configurations, tokenizer and scheduler are
    /// taken in place of those of the published model that the file is recognised as.
    pub config: Option<PathBuf>,
    /// Takes the UNet's exponentially averaged weights (`model_ema.`).
    pub ema: bool,
}

/// Keys of a training's state and of buffers that are computed, not loaded.
const NOT_WEIGHTS: [&str; 16] = [
    "model_ema.",
    "alphas_cumprod",
    "betas",
    "sqrt_",
    "log_one_minus_",
    "posterior_",
    "logvar",
    "loss.",
    "first_stage_model.loss.",
    "lvlb_weights",
    "scale_factor",
    "global_step",
    "optimizer",
    "lr_schedulers",
    "callbacks",
    "cond_stage_model.transformer.vision_model.",
];

/// Ends of the keys of text encoders' tensors that Stable Diffusion does not use.
const NOT_USED: [&str; 4] = [
    "position_ids",
    "logit_scale",
    "text_projection",
    "attn_mask",
];

/// A configuration, and its weights under today's keys.
pub(crate) struct Component<C> {
    pub config: C,
    pub weights: Checkpoint,
}

/// A Stable Diffusion in a single file, recognised, its tensors found, none of them read.
pub(crate) struct SingleFile {
    pub kind: StableDiffusionFile,
    pub text_encoder: Component<CLIPTextConfig>,
    pub unet: Component<UNet2DConditionConfig>,
    pub vae: Component<AutoencoderKLConfig>,
    config: Option<PathBuf>,
}

impl SingleFile {
    /// Opens a file.
    ///
    /// # Errors
    /// If it is damaged, something else than Stable Diffusion, or lacks tensors.
    pub fn open<B: Backend>(
        path: &Path,
        options: &SingleFileOptions,
    ) -> Result<Self, PipelineError> {
        let checkpoint = Checkpoint::open(path)?;
        let kind = match FileKind::of(&checkpoint) {
            FileKind::StableDiffusion(kind) => kind,
            other => {
                return Err(PipelineError::WrongFile {
                    path: path.to_path_buf(),
                    kind: other,
                });
            }
        };
        let configs = options.config.as_deref();
        let text_config = config(configs, "text_encoder", configs::text_encoder(&kind))?;
        let unet_config = config(configs, "unet", configs::unet(&kind))?;
        let vae_config = config(configs, "vae", configs::vae())?;
        let device = B::Device::default();
        let mut used = BTreeSet::new();

        let prefix = keys::unet_prefix(&checkpoint).unwrap_or("model.diffusion_model.");
        let unet_keys = UNetKeys::new(&unet_config);
        let unet = keys::view(
            &checkpoint,
            &parameters(&UNet2DConditionModel::<B>::from_config(
                &unet_config,
                &device,
            )),
            |key| {
                let original = unet_keys.original(key);
                let names = match options.ema {
                    true => vec![keys::ema_key(&format!("model.diffusion_model.{original}"))],
                    false => vec![format!("{prefix}{original}")],
                };
                names.into_iter().map(Stored::from).collect()
            },
            &mut used,
        )?;
        let text_encoder = keys::view(
            &checkpoint,
            &parameters(&CLIPTextModel::<B>::from_config(&text_config, &device)),
            |key| keys::text_names(key, kind.version),
            &mut used,
        )?;
        let vae = vae_view::<B>(&checkpoint, &vae_config, &mut used)?;
        check_surplus(&checkpoint, &used, prefix, options)?;
        Ok(Self {
            kind,
            text_encoder: Component {
                config: text_config,
                weights: text_encoder,
            },
            unet: Component {
                config: unet_config,
                weights: unet,
            },
            vae: Component {
                config: vae_config,
                weights: vae,
            },
            config: options.config.clone(),
        })
    }

    /// The tokenizer of the published model, or of the configurations' folder.
    pub fn tokenizer(&self) -> Result<CLIPTokenizer, PipelineError> {
        Ok(match &self.config {
            Some(folder) => CLIPTokenizer::from_pretrained(component_folder(folder, "tokenizer"))?,
            None if self.kind.version == 2 => CLIPTokenizer::stable_diffusion_v2(),
            None => CLIPTokenizer::stable_diffusion_v1(),
        })
    }

    /// The scheduler of the published model, or of the configurations' folder. Whether a v2
    /// predicts noise or velocity stands nowhere in the file: `unet` is tried out.
    pub fn scheduler<B: Backend>(
        &self,
        unet: impl FnOnce() -> Result<UNet2DConditionModel<B>, PipelineError>,
    ) -> Result<SchedulerConfig, PipelineError> {
        Ok(match &self.config {
            Some(folder) => SchedulerConfig::from_file(component_folder(folder, "scheduler"))?,
            None => configs::scheduler(self.kind.version == 2 && predicts_velocity(&unet()?)),
        })
    }
}

/// A component's configuration: from the folder of configurations, if there is one.
fn config<C: ModelConfig>(
    folder: Option<&Path>,
    component: &str,
    published: C,
) -> Result<C, PipelineError> {
    match folder {
        Some(folder) => {
            let path = component_folder(folder, component).join("config.json");
            Ok(C::from_file(path).map_err(PretrainedError::from)?)
        }
        None => Ok(published),
    }
}

fn vae_view<B: Backend>(
    checkpoint: &Checkpoint,
    config: &AutoencoderKLConfig,
    used: &mut BTreeSet<String>,
) -> Result<Checkpoint, CheckpointError> {
    let prefix = keys::vae_prefix(checkpoint).unwrap_or("first_stage_model.");
    let levels = config.block_out_channels.len();
    keys::view(
        checkpoint,
        &parameters(&AutoencoderKL::<B>::from_config(
            config,
            &B::Device::default(),
        )),
        |key| {
            let names = keys::vae_names(key, levels).into_iter();
            names.map(|name| format!("{prefix}{name}").into()).collect()
        },
        used,
    )
}

/// Tensors that no component has are an error if `strict`, else one warning.
fn check_surplus(
    checkpoint: &Checkpoint,
    used: &BTreeSet<String>,
    unet: &str,
    options: &SingleFileOptions,
) -> Result<(), CheckpointError> {
    let is_known = |key: &str| {
        used.contains(key)
            || NOT_WEIGHTS.iter().any(|prefix| key.starts_with(prefix))
            || NOT_USED.iter().any(|end| key.ends_with(end))
            // The trained weights, where the averaged ones are taken.
            || options.ema && key.starts_with(unet)
            // Stable Diffusion 2 leaves out OpenCLIP's last layer.
            || key.starts_with("cond_stage_model.model.transformer.resblocks.23.")
    };
    let surplus = checkpoint.tensors().keys().filter(|key| !is_known(key));
    checkpoint.report_surplus(surplus.cloned().collect(), options.load.strict)
}

/// Whether a UNet of Stable Diffusion 2 predicts velocity, as AUTOMATIC1111's program tells: of a
/// constant input at the last timestep, one that predicts noise gives about the input.
fn predicts_velocity<B: Backend>(unet: &UNet2DConditionModel<B>) -> bool {
    let device = unet.conv_in.weight.device();
    let context = unet.config().cross_attention_dim.levels(1);
    let context = context
        .and_then(|dims| dims.first().copied())
        .unwrap_or(1024);
    let dtype = diffuse_nn::checkpoint::float_dtype(unet);
    let channels = unet.config().in_channels;
    let sample = Tensor::<B, 4>::full([1, channels, 8, 8], 0.5, &device).cast(dtype);
    let text = Tensor::<B, 3>::full([1, 2, context], 0.5, &device).cast(dtype);
    let output = unet.forward(sample, 999.0, &text);
    let mean = output
        .mean()
        .into_data()
        .iter::<f64>()
        .next()
        .unwrap_or(0.0);
    mean - 0.5 < -1.0
}

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Loads a single file in the original layout: `.safetensors` or `.ckpt`, Stable Diffusion v1
    /// or v2.
    ///
    /// # Errors
    /// If the file is damaged, holds something else, or lacks tensors.
    pub fn from_single_file(
        path: impl AsRef<Path>,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        Self::from_single_file_with(path, &SingleFileOptions::default(), device)
    }

    /// [`from_single_file`](Self::from_single_file) with other types, configurations or averaged
    /// weights.
    ///
    /// # Errors
    /// As [`from_single_file`](Self::from_single_file), and if the file has no averaged weights.
    pub fn from_single_file_with(
        path: impl AsRef<Path>,
        options: &SingleFileOptions,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        let file = SingleFile::open::<B>(path.as_ref(), options)?;
        let tokenizer = file.tokenizer()?;
        let load = &options.load;
        let unet = UNet2DConditionModel::<B>::from_checkpoint(
            &file.unet.config,
            &file.unet.weights,
            load,
            device,
        )?;
        let scheduler = file.scheduler(|| Ok(unet.clone()))?;
        let parts = StableDiffusionParts {
            tokenizer,
            text_encoder: CLIPTextModel::from_checkpoint(
                &file.text_encoder.config,
                &file.text_encoder.weights,
                load,
                device,
            )?,
            vae: AutoencoderKL::from_checkpoint(
                &file.vae.config,
                &file.vae.weights,
                &vae_options::<B>(load),
                device,
            )?
            .into(),
            unet,
            scheduler: scheduler_from_config(&scheduler, None, &Overrides::new())?,
            safety_checker: None,
        };
        Self::from_loaded(parts, file.text_encoder.weights, file.unet.weights)
    }
}

/// Loads an autoencoder: a folder in Diffusers' layout, or a file in either layout. The
/// configuration of an [`AutoencoderKL`] in a file is Stable Diffusion's unless `config` is
/// another; that of an [`AutoencoderTiny`] follows from its tensors. An `AutoencoderTiny` in the
/// original layout is two files, `taesd_encoder` and `taesd_decoder`, of which one is named.
///
/// # Errors
/// If it is damaged, something else, or lacks tensors.
pub fn load_vae<B: Backend>(
    path: impl AsRef<Path>,
    config: Option<&AutoencoderKLConfig>,
    options: &LoadOptions,
    device: &B::Device,
) -> Result<Autoencoder<B>, PipelineError> {
    let path = path.as_ref();
    let options = vae_options::<B>(options);
    if !path.is_file() {
        let kind = PipelineKind::StableDiffusion;
        let options = component_options(&path.into(), kind, "vae", &options);
        let folder = component_folder(path, "vae");
        let class = class_of(&folder.join("config.json"));
        return Ok(load_autoencoder(
            class.as_deref(),
            &folder.into(),
            &options,
            device,
        )?);
    }
    let checkpoint = Checkpoint::open(path)?;
    let config = config.cloned().unwrap_or_else(configs::vae);
    let checkpoint = match FileKind::of(&checkpoint) {
        FileKind::Vae if keys::vae_prefix(&checkpoint).is_none() => {
            checkpoint.rename(<AutoencoderKL<B> as Pretrained<B>>::current_key)?
        }
        FileKind::Vae | FileKind::StableDiffusion(_) => {
            vae_view::<B>(&checkpoint, &config, &mut BTreeSet::new())?
        }
        FileKind::TinyVae => {
            let checkpoint = tiny_vae::with_both_halves(path, checkpoint)?;
            let config = tiny_vae::config(&checkpoint);
            config.validate().map_err(PretrainedError::from)?;
            let vae = AutoencoderTiny::from_checkpoint(&config, &checkpoint, &options, device)?;
            return Ok(vae.into());
        }
        kind => {
            let path = path.to_path_buf();
            return Err(PipelineError::WrongFile { path, kind });
        }
    };
    Ok(AutoencoderKL::from_checkpoint(&config, &checkpoint, &options, device)?.into())
}

/// Loads a ControlNet: a folder in Diffusers' layout, or a file in either layout, whose
/// configuration is Stable Diffusion's unless `config` is another.
///
/// # Errors
/// If it is damaged, something else, or lacks tensors.
pub fn load_controlnet<B: Backend>(
    path: impl AsRef<Path>,
    config: Option<&ControlNetConfig>,
    options: &LoadOptions,
    device: &B::Device,
) -> Result<ControlNetModel<B>, PipelineError> {
    let path = path.as_ref();
    if !path.is_file() {
        return Ok(ControlNetModel::from_pretrained_with(
            path, options, device,
        )?);
    }
    let checkpoint = Checkpoint::open(path)?;
    match FileKind::of(&checkpoint) {
        FileKind::ControlNet => {}
        kind => {
            let path = path.to_path_buf();
            return Err(PipelineError::WrongFile { path, kind });
        }
    }
    if checkpoint.tensors().contains_key("difference") {
        return Err(PipelineError::Index {
            path: path.to_path_buf(),
            message: "it holds the difference of a ControlNet and its base model; take the \
                      ControlNet itself"
                .into(),
        });
    }
    let config = match config {
        Some(config) => config.clone(),
        None => configs::controlnet(keys::text_width(&checkpoint)),
    };
    let checkpoint = match keys::controlnet_prefix(&checkpoint) {
        None => checkpoint,
        Some(prefix) => {
            let unet_keys = UNetKeys::new(&config.encoder());
            let mut used = BTreeSet::new();
            let view = keys::view(
                &checkpoint,
                &parameters(&ControlNetModel::<B>::from_config(
                    &config,
                    &B::Device::default(),
                )),
                |key| {
                    let name = keys::controlnet_name(key, &unet_keys, &config);
                    vec![format!("{prefix}{name}").into()]
                },
                &mut used,
            )?;
            // A file of a training has the whole of Stable Diffusion beside it.
            let keys = checkpoint.tensors().keys();
            let surplus = keys.filter(|key| key.starts_with(prefix) && !used.contains(*key));
            checkpoint.report_surplus(surplus.cloned().collect(), options.strict)?;
            view
        }
    };
    Ok(ControlNetModel::from_checkpoint(
        &config,
        &checkpoint,
        options,
        device,
    )?)
}
