//! The layout of a published pipeline: `model_index.json`, and a folder a component.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use diffuse_nn::files::read_text;
use diffuse_schedulers::{Overrides, Scheduler, SchedulerConfig, scheduler_from_config};
use serde_json::{Map, Value};

use crate::PipelineError;

/// The file that says which components a pipeline has.
pub const MODEL_INDEX_NAME: &str = "model_index.json";

/// What `model_index.json` says.
#[derive(Debug, Clone)]
pub struct ModelIndex {
    path: PathBuf,
    values: Map<String, Value>,
}

impl ModelIndex {
    /// Reads the index of a folder.
    ///
    /// # Errors
    /// If the folder or the file does not exist, or the file is not a JSON object.
    pub fn read(folder: &Path) -> Result<Self, PipelineError> {
        if !folder.is_dir() {
            return Err(PipelineError::NoFolder(folder.to_path_buf()));
        }
        let path = folder.join(MODEL_INDEX_NAME);
        let text = read_text(&path).map_err(|source| PipelineError::Read {
            path: path.clone(),
            source,
        })?;
        let message = match serde_json::from_str(&text) {
            Ok(Value::Object(values)) => return Ok(Self { path, values }),
            Ok(_) => "it is not a JSON object".to_string(),
            Err(error) => error.to_string(),
        };
        Err(PipelineError::Index { path, message })
    }

    /// The pipeline's class in the reference (`_class_name`).
    pub fn class(&self) -> Option<&str> {
        self.values.get("_class_name").and_then(Value::as_str)
    }

    /// Name and class of each component; a component that is switched off has none.
    pub fn components(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.values.iter().filter_map(|(name, value)| match value {
            Value::Array(pair) if !name.starts_with('_') && pair.len() == 2 => {
                Some((name.as_str(), pair[1].as_str()))
            }
            _ => None,
        })
    }

    /// The class of a component; none for one that is absent or switched off.
    pub fn class_of(&self, component: &str) -> Option<&str> {
        let mut components = self.components();
        components.find_map(|(name, class)| class.filter(|_| name == component))
    }

    /// Checks that a component is there and is one of `classes`.
    ///
    /// # Errors
    /// If it is not.
    pub fn require(&self, component: &str, classes: &[&str]) -> Result<(), PipelineError> {
        let message = match self.class_of(component) {
            Some(class) if classes.contains(&class) => return Ok(()),
            Some(class) => format!(
                "`{component}` is a {class}, but this pipeline needs a {}",
                classes.join(" or ")
            ),
            None => format!("it has no `{component}`"),
        };
        Err(PipelineError::Index {
            path: self.path.clone(),
            message,
        })
    }
}

/// The pipelines that can be run here, by the components they need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipelineKind {
    /// [`StableDiffusionPipeline`](crate::StableDiffusionPipeline)
    StableDiffusion,
    /// [`DDPMPipeline`](crate::DDPMPipeline) and [`DDIMPipeline`](crate::DDIMPipeline)
    Unconditional,
}

impl PipelineKind {
    /// The pipeline that an index is for, if it can be run here.
    pub fn of(index: &ModelIndex) -> Option<Self> {
        match index.class()? {
            "StableDiffusionPipeline" => Some(Self::StableDiffusion),
            "DDPMPipeline" | "DDIMPipeline" => Some(Self::Unconditional),
            _ => None,
        }
    }

    /// Its components beside the scheduler, each with the classes it may have.
    pub fn components(self) -> &'static [(&'static str, &'static [&'static str])] {
        match self {
            Self::StableDiffusion => &[
                ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"]),
                ("text_encoder", &["CLIPTextModel"]),
                ("unet", &["UNet2DConditionModel"]),
                ("vae", &["AutoencoderKL"]),
            ],
            Self::Unconditional => &[("unet", &["UNet2DModel"])],
        }
    }

    /// Checks that an index has these components.
    ///
    /// # Errors
    /// If it has not.
    pub fn check(self, index: &ModelIndex) -> Result<(), PipelineError> {
        self.components()
            .iter()
            .try_for_each(|(component, classes)| index.require(component, classes))
    }
}

/// A pipeline's scheduler: of the class that the index names, which need not be the one that its file was written for.
///
/// # Errors
/// If the index names none, or it is not supported.
pub(crate) fn load_scheduler<B: Backend>(
    folder: &Path,
    index: &ModelIndex,
) -> Result<Box<dyn Scheduler<B>>, PipelineError> {
    let Some(class) = index.class_of("scheduler") else {
        return Err(PipelineError::Index {
            path: index.path.clone(),
            message: "it has no `scheduler`".into(),
        });
    };
    let config = SchedulerConfig::from_file(component_folder(folder, "scheduler"))?;
    Ok(scheduler_from_config(
        &config,
        Some(class),
        &Overrides::new(),
    )?)
}

/// The folder that a pipeline is loaded from: the one that is named or, with the feature `hub`, the snapshot in the
/// cache of a repository that is named.
pub(crate) fn pipeline_folder(
    folder: &Path,
    _kind: PipelineKind,
    _variant: Option<&str>,
) -> Result<PathBuf, PipelineError> {
    #[cfg(feature = "hub")]
    if let Some(id) = crate::hub::as_hub_id(folder) {
        let options = crate::hub::FetchOptions {
            variant: _variant.map(String::from),
            pipeline: Some(_kind),
            ..crate::hub::FetchOptions::from_env()
        };
        return crate::hub::resolve(id, &options).map_err(|source| PipelineError::Hub {
            id: id.to_string(),
            source,
        });
    }
    Ok(folder.to_path_buf())
}

/// Where a component's files are: in its own folder or, as in the DDPM repositories, in the pipeline's.
pub fn component_folder(folder: &Path, component: &str) -> PathBuf {
    let own = folder.join(component);
    if own.is_dir() {
        own
    } else {
        folder.to_path_buf()
    }
}
