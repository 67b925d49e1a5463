//! Any folder that can be loaded, as a clean one: safetensors under today's keys, one file a model.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{FloatDType, backend::Backend};
use diffuse_clip::CLIPTextModel;
use diffuse_nn::checkpoint::{Checkpoint, CheckpointError, parameters};
use diffuse_nn::config::ModelConfig;
use diffuse_nn::files::read_text;
use diffuse_nn::pretrained::{PretrainedError, find_weights};
use diffuse_schedulers::{SCHEDULER_CONFIG_NAME, SchedulerConfig};
use diffuse_unet::{Pretrained, UNet2DConditionModel, UNet2DModel};
use diffuse_vae::AutoencoderKL;
use serde_json::{Value, json};

use crate::PipelineError;
use crate::folder::{MODEL_INDEX_NAME, ModelIndex, component_folder};

/// How to convert.
#[derive(Debug, Clone, Default)]
pub struct ConvertOptions {
    /// Which variant of the weights to take. By default the plain files, or the only variant there
    /// is.
    pub variant: Option<String>,
    /// Floating point type of the result; each tensor's own by default.
    pub dtype: Option<FloatDType>,
}

/// Converts a pipeline's folder. Configurations and the tokenizer are copied; weights are checked
/// against their configuration and rewritten, tensor by tensor, so that memory is bounded by the
/// largest tensor; components that are not used here (safety checker, feature extractor) are
/// switched off in the index. `progress` is told each file before it is written.
///
/// The result appears at `destination` once it is complete. `B` computes nothing; any backend will
/// do.
///
/// # Errors
/// If `destination` exists, or something in `source` is missing, damaged or not supported.
pub fn convert<B: Backend>(
    source: &Path,
    destination: &Path,
    options: &ConvertOptions,
    mut progress: impl FnMut(&str),
) -> Result<(), PipelineError> {
    let index = ModelIndex::read(source)?;
    if destination.exists() {
        return Err(PipelineError::Options(format!(
            "`{}` exists already",
            destination.display()
        )));
    }
    let mut name = destination.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = destination.with_file_name(name);
    let written = |error: std::io::Error| write_error(destination, &error);
    fs::create_dir_all(&part).map_err(written)?;
    let result = Conversion {
        source,
        part: &part,
        options,
        progress: &mut progress,
    }
    .run::<B>(&index)
    .and_then(|()| fs::rename(&part, destination).map_err(written));
    if result.is_err() {
        let _ = fs::remove_dir_all(&part);
    }
    result
}

struct Conversion<'a> {
    source: &'a Path,
    part: &'a Path,
    options: &'a ConvertOptions,
    progress: &'a mut dyn FnMut(&str),
}

impl Conversion<'_> {
    fn run<B: Backend>(&mut self, index: &ModelIndex) -> Result<(), PipelineError> {
        let mut switched_off = Vec::new();
        for (component, class) in index.components() {
            if Path::new(component).components().count() != 1 || component.contains("..") {
                return Err(PipelineError::Index {
                    path: self.source.join(MODEL_INDEX_NAME),
                    message: format!("`{component}` is not a name of a component"),
                });
            }
            let used = match class {
                Some("UNet2DModel") => self.model::<B, UNet2DModel<B>>(component)?,
                Some("UNet2DConditionModel") => {
                    self.model::<B, UNet2DConditionModel<B>>(component)?
                }
                Some("AutoencoderKL") => self.model::<B, AutoencoderKL<B>>(component)?,
                Some("CLIPTextModel") => self.model::<B, CLIPTextModel<B>>(component)?,
                Some("CLIPTokenizer" | "CLIPTokenizerFast") => self.tokenizer(component)?,
                Some(class) if class.ends_with("Scheduler") => self.scheduler(component)?,
                _ => false,
            };
            if !used {
                switched_off.push(component);
            }
        }
        self.index(&switched_off)
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
        let text = serde_json::to_string_pretty(&index).expect("JSON can be written");
        write(&self.part.join(MODEL_INDEX_NAME), (text + "\n").as_bytes())
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

    fn model<B: Backend, M: Pretrained<B>>(
        &mut self,
        component: &str,
    ) -> Result<bool, PipelineError> {
        let folder = component_folder(self.source, component);
        let config_file = folder.join("config.json");
        let config = M::Config::from_file(&config_file).map_err(PretrainedError::from)?;
        let weights = self.weights(&folder, M::WEIGHTS)?;
        let checkpoint = Checkpoint::open(weights)?.rename(M::current_key)?;
        let module = M::from_config(&config, &B::Device::default());
        checkpoint.check(&parameters(&module))?;

        let target = self.target(component)?;
        self.copy(&config_file, &target.join("config.json"))?;
        let name = format!("{}.safetensors", M::WEIGHTS[0]);
        (self.progress)(&format!("{component}/{name}"));
        checkpoint.write_safetensors(target.join(name), self.options.dtype)?;
        Ok(true)
    }

    /// The weights that were asked for or, without being asked, the plain ones or the only variant.
    fn weights(&self, folder: &Path, stems: [&str; 2]) -> Result<PathBuf, PipelineError> {
        let variant = self.options.variant.as_deref();
        let found = find_weights(folder, stems, variant);
        if found.is_ok() || variant.is_some() {
            return Ok(found?);
        }
        let half = find_weights(folder, stems, Some("fp16"));
        Ok(half.or(found)?)
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
