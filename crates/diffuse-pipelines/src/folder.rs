//! The layout of a published pipeline: `model_index.json`, and a folder a component.

use std::io;
use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use diffuse_nn::ModelPath;
use diffuse_schedulers::{
    Overrides, SCHEDULER_CONFIG_NAME, Scheduler, SchedulerConfig, SchedulerError,
    scheduler_from_config,
};
use serde_json::{Map, Value};

use crate::PipelineError;
use crate::components::{FEATURE_EXTRACTORS, component_path};

/// The file that says which components a pipeline has.
pub const MODEL_INDEX_NAME: &str = "model_index.json";

/// A component that a pipeline needs for no image, and the scheduler, which is chosen apart.
const IGNORED: [&str; 2] = ["scheduler", "image_encoder"];

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
    pub fn read(folder: impl Into<ModelPath>) -> Result<Self, PipelineError> {
        let folder = folder.into();
        if !folder.is_dir() {
            return Err(PipelineError::NoFolder(folder.path().to_path_buf()));
        }
        let file = folder.join(MODEL_INDEX_NAME);
        let path = file.path().to_path_buf();
        let text = file.read_text().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => PipelineError::NoIndex {
                folder: folder.path().to_path_buf(),
                hint: what_is(&folder),
            },
            _ => PipelineError::Read {
                path: path.clone(),
                source,
            },
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

    /// Whether it has a safety checker.
    ///
    /// # Errors
    /// If that is of another class, or has no feature extractor, without which it cannot be run.
    pub(crate) fn has_safety_checker(&self) -> Result<bool, PipelineError> {
        for (component, classes) in PipelineKind::StableDiffusion.optional_components() {
            match self.class_of(component) {
                None if *component == "safety_checker" => return Ok(false),
                None => {
                    let message = format!("it has a `safety_checker`, but no `{component}`");
                    return Err(self.error(message));
                }
                Some(class) => {
                    check_class(component, class, classes).map_err(|message| self.error(message))?
                }
            }
        }
        Ok(true)
    }

    fn error(&self, message: String) -> PipelineError {
        PipelineError::Index {
            path: self.path.clone(),
            message,
        }
    }
}

/// What a folder without an index is, as far as its files tell: the end of an error's message.
fn what_is(folder: &ModelPath) -> String {
    let config = folder.join("config.json").read_text().ok();
    let config: Option<Value> = config.and_then(|text| serde_json::from_str(&text).ok());
    let class = config.as_ref().and_then(|config| {
        let class = config.get("_class_name").and_then(Value::as_str);
        class.or_else(|| config.get("architectures")?.get(0)?.as_str())
    });
    if let Some(class) = class {
        let is_part = folder
            .parent()
            .is_some_and(|parent| parent.join(MODEL_INDEX_NAME).is_file());
        let advice = if is_part {
            "; name the folder above it"
        } else {
            ""
        };
        return format!("it holds a {class}, which is one component of a pipeline{advice}");
    }
    let is_single_file = |name: &String| {
        let extension = Path::new(name).extension();
        let extension = extension.and_then(|extension| extension.to_str());
        matches!(extension, Some("ckpt" | "safetensors"))
    };
    match folder.names().into_iter().find(is_single_file) {
        Some(file) => format!(
            "`{}` may be a single-file checkpoint, which cannot be read; look for one in \
             Diffusers' format",
            file
        ),
        None => "it is not a pipeline in Diffusers' format".to_string(),
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
            "StableDiffusionPipeline"
            | "StableDiffusionImg2ImgPipeline"
            | "StableDiffusionInpaintPipeline"
            | "LatentConsistencyModelPipeline" => Some(Self::StableDiffusion),
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
                ("vae", &["AutoencoderKL", "AutoencoderTiny"]),
            ],
            Self::Unconditional => &[("unet", &["UNet2DModel"])],
        }
    }

    /// Components that a folder need not have, with the classes they may have.
    pub(crate) fn optional_components(self) -> &'static [(&'static str, &'static [&'static str])] {
        match self {
            Self::StableDiffusion => &[
                ("safety_checker", &["StableDiffusionSafetyChecker"]),
                ("feature_extractor", &FEATURE_EXTRACTORS),
            ],
            Self::Unconditional => &[],
        }
    }

    /// The pipeline's class in the reference.
    fn class(self) -> &'static str {
        match self {
            Self::StableDiffusion => "StableDiffusionPipeline",
            Self::Unconditional => "DDPMPipeline",
        }
    }

    /// [`of`](Self::of), where there has to be one.
    ///
    /// # Errors
    /// If the pipeline cannot be run here.
    #[cfg(feature = "hub")]
    pub(crate) fn require_of(index: &ModelIndex) -> Result<Self, PipelineError> {
        Self::of(index).ok_or_else(|| {
            index.error(match index.class() {
                Some(class) => format!("its class is {class}, which cannot be run here"),
                None => "it has no `_class_name`".to_string(),
            })
        })
    }

    /// Checks that an index has these components and no others that would change the image.
    ///
    /// # Errors
    /// If it has not.
    pub fn check(self, index: &ModelIndex) -> Result<(), PipelineError> {
        let Err(problem) = self.check_components(index) else {
            return Ok(());
        };
        Err(index.error(match index.class() {
            Some(class) if Self::of(index) != Some(self) => {
                format!("its class is {class}, not {}: {problem}", self.class())
            }
            _ => problem,
        }))
    }

    fn check_components(self, index: &ModelIndex) -> Result<(), String> {
        for (component, classes) in self.components() {
            match index.class_of(component) {
                Some(class) => check_class(component, class, classes)?,
                None => return Err(format!("it has no `{component}`")),
            }
        }
        let is_known = |name: &str| {
            let mut known = self.components().iter().chain(self.optional_components());
            IGNORED.contains(&name) || known.any(|(known, _)| *known == name)
        };
        let mut present = index.components().filter(|(_, class)| class.is_some());
        match present.find(|(name, _)| !is_known(name)) {
            Some((name, _)) => Err(format!("it has a `{name}`, which would be left out")),
            None => Ok(()),
        }
    }
}

fn check_class(component: &str, class: &str, classes: &[&str]) -> Result<(), String> {
    if classes.contains(&class) {
        return Ok(());
    }
    Err(format!(
        "`{component}` is a {class}, but this pipeline needs a {}",
        classes.join(" or ")
    ))
}

/// A pipeline's scheduler: of the class that the index names, which need not be the one that its
/// file was written for.
///
/// # Errors
/// If the index names none, or it is not supported.
pub(crate) fn load_scheduler<B: Backend>(
    folder: &ModelPath,
    index: &ModelIndex,
) -> Result<Box<dyn Scheduler<B>>, PipelineError> {
    let Some(class) = index.class_of("scheduler") else {
        return Err(index.error("it has no `scheduler`".into()));
    };
    let file = component_path(folder, "scheduler").join(SCHEDULER_CONFIG_NAME);
    let path = || file.path().to_path_buf();
    let text = file.read_text().map_err(|source| PipelineError::Read {
        path: path(),
        source,
    })?;
    let config = SchedulerConfig::from_json_str(&text).map_err(|error| SchedulerError::File {
        path: path(),
        source: Box::new(error),
    })?;
    Ok(scheduler_from_config(
        &config,
        Some(class),
        &Overrides::new(),
    )?)
}

/// The folder that a pipeline is loaded from: the one that is named or, with the feature `hub`, the
/// snapshot in the cache of a repository that is named.
pub(crate) fn pipeline_folder(
    folder: ModelPath,
    _kind: PipelineKind,
    _variant: Option<&str>,
    _no_safety_checker: bool,
) -> Result<ModelPath, PipelineError> {
    #[cfg(feature = "hub")]
    if let Some(id) = crate::hub::as_hub_id(folder.path()).filter(|_| folder.is_on_disk()) {
        let wanted = crate::hub::PipelineFiles {
            pipeline: Some(_kind),
            variant: _variant.map(String::from),
            no_safety_checker: _no_safety_checker,
        };
        let options = crate::hub::FetchOptions::from_env();
        let resolved = crate::hub::resolve(id, &wanted, &options);
        return resolved
            .map(ModelPath::from)
            .map_err(|source| PipelineError::Hub {
                id: id.to_string(),
                source: Box::new(source),
            });
    }
    Ok(folder)
}
