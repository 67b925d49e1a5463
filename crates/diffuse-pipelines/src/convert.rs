//! Any checkpoint that can be loaded, as a clean folder: safetensors under today's keys, one file a
//! model. And a Stable Diffusion as a single file in the original layout.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{FloatDType, backend::Backend};
use diffuse_clip::CLIPTextConfig;
use diffuse_nn::checkpoint::{Checkpoint, CheckpointError};
use diffuse_nn::config::{ConfigError, ModelConfig};
use diffuse_nn::files::read_text;
use diffuse_nn::pretrained::{LoadOptions, Pretrained, PretrainedError, find_weights};
use diffuse_schedulers::{SCHEDULER_CONFIG_NAME, SchedulerConfig};
use diffuse_unet::{ResampleType, UNet2DConditionConfig, UNet2DConditionModel};
use diffuse_vae::AutoencoderKLConfig;
use serde_json::{Value, json};

use crate::PipelineError;
use crate::clip_image_processor::{CLIPImageProcessor, PREPROCESSOR_CONFIG_NAME};
use crate::components::{ComponentClass, ModelClass, check_class_labels, component_folder};
use crate::folder::{MODEL_INDEX_NAME, ModelIndex, PipelineKind};
use crate::single_file::{ComponentFiles, SingleFile, SingleFileOptions, write_single_file};

/// How to convert.
#[derive(Debug, Clone, Default)]
pub struct ConvertOptions {
    /// Which variant of the weights to take. By default the plain files, or the only variant there
    /// is.
    pub variant: Option<String>,
    /// Floating point type of the result; each tensor's own by default.
    pub dtype: Option<FloatDType>,
    /// Whether tensors that a model does not have are an error; by default they are left out, with
    /// one warning in the log.
    pub strict: bool,
    /// Takes the averaged weights (EMA) of a single file's UNet.
    pub ema: bool,
    /// Of a single file: the folder of a pipeline whose configurations, tokenizer and scheduler are
    /// taken in place of the published ones.
    pub config: Option<PathBuf>,
}

/// Converts a checkpoint. `source` is a pipeline's folder, or a single file in the original layout;
/// `destination` is a folder or, if its name ends with `.safetensors`, a single file.
///
/// Configurations and the tokenizer are copied; weights are checked against their configuration and
/// rewritten, tensor by tensor, so that memory is bounded by the largest tensor; components that
/// are not used here (`image_encoder`) are switched off in the index, and a safety checker that is
/// missing. A single file has none. `progress` is called with each file's name before it is
/// written.
///
/// The result appears at `destination` once it is complete. `B` computes nothing, except to tell
/// which of the Stable Diffusion 2 models a single file is.
///
/// # Errors
/// If `destination` exists, or something in `source` is missing, damaged or not supported.
pub fn convert<B: Backend>(
    source: &Path,
    destination: &Path,
    options: &ConvertOptions,
    mut progress: impl FnMut(&str),
) -> Result<(), PipelineError> {
    let to_file = destination
        .extension()
        .is_some_and(|extension| extension == "safetensors");
    if source.is_file() && to_file {
        return Err(PipelineError::Options(
            "a single file is converted to a folder, or a folder to a single file".into(),
        ));
    }
    if destination.exists() {
        return Err(PipelineError::Options(format!(
            "`{}` exists already",
            destination.display()
        )));
    }
    if to_file {
        return to_single_file::<B>(source, destination, options, &mut progress);
    }
    let mut name = destination.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = destination.with_file_name(name);
    let written = |error: std::io::Error| write_error(destination, &error);
    fs::create_dir_all(&part).map_err(written)?;
    let mut conversion = Conversion {
        source,
        part: &part,
        options,
        progress: &mut progress,
    };
    let result = if source.is_file() {
        conversion.single_file::<B>()
    } else {
        conversion.folder::<B>()
    };
    let result = result.and_then(|()| fs::rename(&part, destination).map_err(written));
    if result.is_err() {
        let _ = fs::remove_dir_all(&part);
    }
    result
}

/// The weights that were asked for or, without being asked, the plain ones or the only variant.
fn weights(
    folder: &Path,
    stems: [&str; 2],
    options: &ConvertOptions,
) -> Result<PathBuf, PipelineError> {
    let variant = options.variant.as_deref();
    let find = |variant| {
        let found = find_weights(&folder.into(), stems, variant)?;
        Ok::<_, PretrainedError>(found.path().to_path_buf())
    };
    let found = find(variant);
    if found.is_ok() || variant.is_some() {
        return Ok(found?);
    }
    let half = find(Some("fp16"));
    Ok(half.or(found)?)
}

fn to_single_file<B: Backend>(
    source: &Path,
    destination: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<(), PipelineError> {
    let index = ModelIndex::read(source)?;
    PipelineKind::StableDiffusion.check(&index)?;
    let files = |component: &str, stems| {
        let folder = component_folder(source, component);
        let weights = weights(&folder, stems, options)?;
        Ok::<_, PipelineError>([folder.join("config.json"), weights])
    };
    let text_encoder = files("text_encoder", CLIPTextConfig::WEIGHTS)?;
    let unet = files("unet", UNet2DConditionConfig::WEIGHTS)?;
    let vae = files("vae", AutoencoderKLConfig::WEIGHTS)?;
    let config = UNet2DConditionConfig::from_file(&unet[0]).map_err(PretrainedError::from)?;
    check_original_layout(&config).map_err(PretrainedError::from)?;
    progress(&destination.display().to_string());
    write_single_file::<B>(
        &ComponentFiles {
            text_encoder: text_encoder.each_ref().map(PathBuf::as_path),
            unet: unet.each_ref().map(PathBuf::as_path),
            vae: vae.each_ref().map(PathBuf::as_path),
        },
        destination,
        options.strict,
        options.dtype,
    )
}

/// Checks that the original layout has names for a network's weights.
fn check_original_layout(config: &UNet2DConditionConfig) -> Result<(), ConfigError> {
    let class = UNet2DConditionConfig::CLASS;
    check_class_labels::<UNet2DConditionConfig>(config.class_embed_type, config.num_class_embeds)?;
    let mut down = config.down_block_types.iter().map(|block| block.resample());
    let mut up = config.up_block_types.iter().map(|block| block.resample());
    let supported = "only blocks that change the size by a convolution in a single file";
    if down.any(|resample| matches!(resample, ResampleType::Resnet)) {
        let (key, value) = ("down_block_types", &config.down_block_types);
        Err(ConfigError::unsupported(class, key, value, supported))
    } else if up.any(|resample| matches!(resample, ResampleType::Resnet)) {
        let (key, value) = ("up_block_types", &config.up_block_types);
        Err(ConfigError::unsupported(class, key, value, supported))
    } else {
        Ok(())
    }
}

struct Conversion<'a> {
    source: &'a Path,
    part: &'a Path,
    options: &'a ConvertOptions,
    progress: &'a mut dyn FnMut(&str),
}

impl Conversion<'_> {
    fn folder<B: Backend>(&mut self) -> Result<(), PipelineError> {
        let index = ModelIndex::read(self.source)?;
        let mut switched_off = Vec::new();
        for (component, class) in index.components() {
            if Path::new(component).components().count() != 1 || component.contains("..") {
                return Err(PipelineError::Index {
                    path: self.source.join(MODEL_INDEX_NAME),
                    message: format!("`{component}` is not a name of a component"),
                });
            }
            let optional = PipelineKind::StableDiffusion.optional_components();
            let is_optional = optional.iter().any(|(name, _)| *name == component);
            let class = class.filter(|_| !is_optional || self.source.join(component).is_dir());
            let used = match class.and_then(ComponentClass::of::<B>) {
                Some(ComponentClass::Model(class)) => self.model(component, &class)?,
                Some(ComponentClass::Tokenizer) => self.tokenizer(component)?,
                Some(ComponentClass::Scheduler) => self.scheduler(component)?,
                Some(ComponentClass::FeatureExtractor) => self.feature_extractor(component)?,
                None => false,
            };
            if !used {
                switched_off.push(component);
            }
        }
        self.index(&switched_off)
    }

    fn single_file<B: Backend>(&mut self) -> Result<(), PipelineError> {
        let file = SingleFile::open::<B>(
            self.source,
            &SingleFileOptions {
                load: LoadOptions {
                    strict: self.options.strict,
                    ..LoadOptions::default()
                },
                ema: self.options.ema,
                config: self.options.config.clone(),
            },
        )?;
        let device = B::Device::default();
        let SingleFile {
            text_encoder,
            unet,
            vae,
            ..
        } = &file;
        self.component("text_encoder", &text_encoder.config, &text_encoder.weights)?;
        self.component("unet", &unet.config, &unet.weights)?;
        self.component("vae", &vae.config, &vae.weights)?;
        let scheduler = file.scheduler(|| {
            let load = LoadOptions::default();
            let unet = UNet2DConditionModel::<B>::from_checkpoint(
                &unet.config,
                &unet.weights,
                &load,
                &device,
            );
            Ok(unet?)
        })?;
        let target = self.target_of_new("scheduler")?;
        write(
            &target.join(SCHEDULER_CONFIG_NAME),
            (scheduler.to_json_string() + "\n").as_bytes(),
        )?;
        let target = self.target_of_new("tokenizer")?;
        file.tokenizer()?
            .save_pretrained(&target)
            .map_err(|error| write_error(&target, &error))?;
        let class = scheduler.class_name().unwrap_or_default();
        let pipeline = match file.kind.inpainting {
            true => "StableDiffusionInpaintPipeline",
            false => "StableDiffusionPipeline",
        };
        let index = json!({
            "_class_name": pipeline,
            "feature_extractor": [null, null],
            "requires_safety_checker": false,
            "safety_checker": [null, null],
            "scheduler": ["diffusers", class],
            "text_encoder": ["transformers", CLIPTextConfig::CLASS],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", UNet2DConditionConfig::CLASS],
            "vae": ["diffusers", AutoencoderKLConfig::CLASS],
        });
        self.write_index(&index)
    }

    /// A component's configuration and weights.
    fn component<C: ModelConfig>(
        &mut self,
        component: &str,
        config: &C,
        weights: &Checkpoint,
    ) -> Result<(), PipelineError> {
        let target = self.target_of_new(component)?;
        let text = serde_json::to_string_pretty(&config.to_map()).expect("JSON can be written");
        write(&target.join("config.json"), (text + "\n").as_bytes())?;
        let name = format!("{}.safetensors", C::WEIGHTS[0]);
        (self.progress)(&format!("{component}/{name}"));
        Ok(weights.write_safetensors(target.join(name), self.options.dtype)?)
    }

    fn target_of_new(&self, component: &str) -> Result<PathBuf, PipelineError> {
        let target = self.part.join(component);
        fs::create_dir_all(&target).map_err(|error| write_error(&target, &error))?;
        Ok(target)
    }

    fn write_index(&self, index: &Value) -> Result<(), PipelineError> {
        let text = serde_json::to_string_pretty(index).expect("JSON can be written");
        write(&self.part.join(MODEL_INDEX_NAME), (text + "\n").as_bytes())
    }

    /// The index as it is, without the components that are not in the result.
    fn index(&self, switched_off: &[&str]) -> Result<(), PipelineError> {
        let path = self.source.join(MODEL_INDEX_NAME);
        let text = read_text(&path).map_err(|source| PipelineError::Read {
            path: path.clone(),
            source,
        })?;
        let mut index: Value =
            serde_json::from_str(&text).map_err(|error| PipelineError::Index {
                path,
                message: error.to_string(),
            })?;
        for component in switched_off {
            index[component] = json!([null, null]);
        }
        if switched_off.contains(&"safety_checker") {
            index["requires_safety_checker"] = false.into();
        }
        self.write_index(&index)
    }

    /// The component's folder in the result, at the same place as in the source.
    fn target(&self, component: &str) -> Result<PathBuf, PipelineError> {
        let source = component_folder(self.source, component);
        let target = if source == self.source {
            self.part.to_path_buf()
        } else {
            self.part.join(component)
        };
        fs::create_dir_all(&target).map_err(|error| write_error(&target, &error))?;
        Ok(target)
    }

    fn model(&mut self, component: &str, class: &ModelClass) -> Result<bool, PipelineError> {
        let folder = component_folder(self.source, component);
        let config_file = folder.join("config.json");
        let parameters = class
            .parameters(&config_file)
            .map_err(PretrainedError::from)?;
        let weights = weights(&folder, class.weights, self.options)?;
        let checkpoint = Checkpoint::open(weights)?.rename(class.current_key)?;
        checkpoint.check_surplus(&parameters, self.options.strict)?;
        let known = parameters.iter().map(|parameter| {
            let key = parameter.key.clone();
            let tensor = checkpoint.tensors()[&key].clone();
            (key, tensor)
        });
        let checkpoint = checkpoint.with_tensors(known.collect());

        let target = self.target(component)?;
        self.copy(&config_file, &target.join("config.json"))?;
        let name = format!("{}.safetensors", class.weights[0]);
        (self.progress)(&format!("{component}/{name}"));
        checkpoint.write_safetensors(target.join(name), self.options.dtype)?;
        Ok(true)
    }

    fn scheduler(&mut self, component: &str) -> Result<bool, PipelineError> {
        let folder = component_folder(self.source, component);
        // Only read to see that it is sound: unknown schedulers are kept as they are.
        SchedulerConfig::from_file(&folder)?;
        let target = self.target(component)?;
        self.copy(
            &folder.join(SCHEDULER_CONFIG_NAME),
            &target.join(SCHEDULER_CONFIG_NAME),
        )?;
        Ok(true)
    }

    fn feature_extractor(&mut self, component: &str) -> Result<bool, PipelineError> {
        let folder = component_folder(self.source, component);
        CLIPImageProcessor::from_pretrained(&folder).map_err(PretrainedError::from)?;
        let target = self.target(component)?;
        self.copy(
            &folder.join(PREPROCESSOR_CONFIG_NAME),
            &target.join(PREPROCESSOR_CONFIG_NAME),
        )?;
        Ok(true)
    }

    fn tokenizer(&mut self, component: &str) -> Result<bool, PipelineError> {
        let folder = component_folder(self.source, component);
        diffuse_clip::CLIPTokenizer::from_pretrained(&folder)?;
        let target = self.target(component)?;
        for name in [
            "vocab.json",
            "merges.txt",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ] {
            if folder.join(name).is_file() {
                self.copy(&folder.join(name), &target.join(name))?;
            }
        }
        Ok(true)
    }

    fn copy(&self, from: &Path, to: &Path) -> Result<(), PipelineError> {
        let bytes = fs::read(from).map_err(|source| PipelineError::Read {
            path: from.to_path_buf(),
            source,
        })?;
        write(to, &bytes)
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), PipelineError> {
    fs::write(path, bytes).map_err(|error| write_error(path, &error))
}

fn write_error(path: &Path, error: &std::io::Error) -> PipelineError {
    let path = path.to_path_buf();
    let message = error.to_string();
    CheckpointError::Write { path, message }.into()
}
