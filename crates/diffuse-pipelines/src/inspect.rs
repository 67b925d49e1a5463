//! What a checkpoint is, without loading it: components, classes, parameters, types, and what is
//! not supported.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use diffuse_clip::CLIPTokenizer;
use diffuse_nn::checkpoint::{Checkpoint, CheckpointError, name_some};
use diffuse_nn::files::read_text;
use diffuse_schedulers::{
    Overrides, SCHEDULER_CONFIG_NAME, SchedulerConfig, scheduler_from_config,
};
use serde_json::Value;

use crate::components::{ComponentClass, ModelClass, component_folder};
use crate::folder::{MODEL_INDEX_NAME, ModelIndex, PipelineKind};
use crate::{CLIPImageProcessor, FileKind, PipelineError};

/// Pipelines that can be run here.
const PIPELINES: [&str; 6] = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "DDPMPipeline",
    "DDIMPipeline",
];

/// What a checkpoint is.
#[derive(Debug, Clone, Default)]
pub struct Inspection {
    /// The pipeline's class in the reference; none for a single component or file.
    pub class: Option<String>,
    /// Its components, in the order of its index.
    pub components: Vec<Component>,
    /// What is not supported about it as a whole.
    pub problems: Vec<String>,
}

/// What a component of a checkpoint is.
#[derive(Debug, Clone, Default)]
pub struct Component {
    /// Its name in the index, or its file's name.
    pub name: String,
    /// Its class in the reference; none for one that is switched off.
    pub class: Option<String>,
    /// Number of parameters that the configuration describes.
    pub parameters: Option<usize>,
    /// Its weights files, all variants.
    pub weights: Vec<Weights>,
    /// Other facts: the scheduler's options, for example.
    pub facts: Vec<String>,
    /// What is not supported about it, or is wrong with it.
    pub problems: Vec<String>,
}

/// What a weights file holds.
#[derive(Debug, Clone)]
pub struct Weights {
    /// The file.
    pub path: PathBuf,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of elements by type.
    pub elements: BTreeMap<String, usize>,
}

impl Inspection {
    /// Looks at a pipeline's folder, a component's folder, or a weights file.
    ///
    /// # Errors
    /// If it does not exist, is none of the three, or its index is damaged. What is wrong inside is
    /// a problem in the result.
    pub fn read<B: Backend>(path: impl AsRef<Path>) -> Result<Self, PipelineError> {
        let path = path.as_ref();
        if path.is_file() {
            let (weights, checkpoint) = read_weights(path)?;
            let kind = FileKind::of(&checkpoint);
            let mut component = Component {
                name: file_name(path),
                weights: vec![weights],
                facts: vec![format!("it is {kind}")],
                ..Component::default()
            };
            if !kind.is_supported() {
                component
                    .problems
                    .push(format!("{kind} cannot be used here"));
            }
            return Ok(Self {
                components: vec![component],
                ..Self::default()
            });
        }
        if !path.is_dir() {
            return Err(PipelineError::NoFolder(path.to_path_buf()));
        }
        if path.join(MODEL_INDEX_NAME).is_file() {
            return Self::read_pipeline::<B>(path);
        }
        let files = ["config.json", SCHEDULER_CONFIG_NAME];
        let class = files.iter().find_map(|file| class_of(&path.join(file)));
        let Some(class) = class else {
            return Err(PipelineError::Index {
                path: path.to_path_buf(),
                message: format!(
                    "it has neither `{MODEL_INDEX_NAME}` nor a `config.json` that names its class"
                ),
            });
        };
        Ok(Self {
            components: vec![inspect_component::<B>(&file_name(path), Some(&class), path)],
            ..Self::default()
        })
    }

    fn read_pipeline<B: Backend>(folder: &Path) -> Result<Self, PipelineError> {
        let index = ModelIndex::read(folder)?;
        let class = index.class().map(String::from);
        let mut problems = Vec::new();
        match &class {
            Some(class) if PIPELINES.contains(&class.as_str()) => {}
            class => problems.push(format!(
                "the pipeline is a {}; supported are {}",
                class.as_deref().unwrap_or("nameless one"),
                PIPELINES.join(", ")
            )),
        }
        let kind = PipelineKind::of(&index);
        if let Some(Err(error)) = kind.map(|kind| kind.check(&index)) {
            problems.push(error.to_string());
        }
        let components = index
            .components()
            .map(|(name, class)| {
                inspect_component::<B>(name, class, &component_folder(folder, name))
            })
            .collect();
        Ok(Self {
            class,
            components,
            problems,
        })
    }

    /// All problems, each with the name of its component.
    pub fn all_problems(&self) -> Vec<String> {
        let inner = self.components.iter().flat_map(|component| {
            let name = &component.name;
            component
                .problems
                .iter()
                .map(move |problem| format!("{name}: {problem}"))
        });
        self.problems.iter().cloned().chain(inner).collect()
    }
}

fn file_name(path: &Path) -> String {
    let name = path.canonicalize().ok().and_then(|path| {
        let name = path.file_name()?;
        Some(name.to_string_lossy().into_owned())
    });
    name.unwrap_or_else(|| path.display().to_string())
}

/// The class that a configuration file names, in diffusers' way or in transformers'.
pub(crate) fn class_of(config: &Path) -> Option<String> {
    let text = read_text(config).ok()?;
    let value: Value = serde_json::from_str(&text).ok()?;
    let class = value
        .get("_class_name")
        .or_else(|| value.get("architectures")?.get(0));
    class?.as_str().map(String::from)
}

fn inspect_component<B: Backend>(name: &str, class: Option<&str>, folder: &Path) -> Component {
    let mut component = Component {
        name: name.to_string(),
        class: class.map(String::from),
        ..Component::default()
    };
    let Some(class) = class else {
        component.facts.push("switched off".into());
        return component;
    };
    let optional = PipelineKind::StableDiffusion.optional_components();
    if optional.iter().any(|(optional, _)| *optional == name) && !folder.ends_with(name) {
        component
            .facts
            .push("missing: images are not checked".into());
        return component;
    }
    match ComponentClass::of::<B>(class) {
        Some(ComponentClass::Model(class)) => inspect_model(&mut component, &class, folder),
        Some(ComponentClass::Tokenizer) => match CLIPTokenizer::from_pretrained(folder) {
            Ok(tokenizer) => {
                component.facts.push(format!(
                    "{} token ids, {} a text",
                    tokenizer.vocab_size(),
                    tokenizer.max_length()
                ));
                let added = tokenizer.added_tokens().into_iter();
                let words = added.filter(|token| !token.special);
                let words: Vec<String> = words.map(|token| token.content).collect();
                if !words.is_empty() {
                    let words = name_some(&words);
                    component.facts.push(format!("added words: {words}"));
                }
            }
            Err(error) => component.problems.push(error_chain(&error)),
        },
        Some(ComponentClass::Scheduler) => inspect_scheduler::<B>(&mut component, class, folder),
        Some(ComponentClass::FeatureExtractor) => match CLIPImageProcessor::from_pretrained(folder)
        {
            Ok(processor) => {
                let [height, width] = processor.crop_size.dims();
                component.facts.push(format!("{width} x {height} pixels"));
            }
            Err(error) => component.problems.push(error_chain(&error)),
        },
        None => component.problems.push(format!("{class} is not supported")),
    }
    component
}

fn inspect_model(component: &mut Component, class: &ModelClass, folder: &Path) {
    let parameters = match class.parameters(&folder.join("config.json")) {
        Ok(parameters) => parameters,
        Err(error) => return component.problems.push(error_chain(&error)),
    };
    let elements = parameters.iter().map(|parameter| parameter.num_elements());
    component.parameters = Some(elements.sum());

    for path in weights_files(folder, class.weights) {
        let surplus = read_weights(&path).and_then(|(weights, checkpoint)| {
            component.weights.push(weights);
            checkpoint.rename(class.current_key)?.check(&parameters)
        });
        match surplus {
            Ok(keys) if keys.is_empty() => {}
            Ok(keys) => component.facts.push(format!(
                "`{}` has {} that this model does not have",
                file_name(&path),
                name_some(&keys)
            )),
            Err(error) => component.problems.push(error_chain(&error)),
        }
    }
    if component.weights.is_empty() && component.problems.is_empty() {
        let problem = format!("`{}` has no weights file", folder.display());
        component.problems.push(problem);
    }
}

fn inspect_scheduler<B: Backend>(component: &mut Component, class: &str, folder: &Path) {
    let scheduler = SchedulerConfig::from_file(folder)
        .and_then(|config| scheduler_from_config::<B>(&config, Some(class), &Overrides::new()));
    match scheduler {
        Ok(scheduler) => {
            let config = scheduler.config();
            let shown = [
                "beta_schedule",
                "prediction_type",
                "timestep_spacing",
                "num_train_timesteps",
            ];
            for key in shown {
                if let Some(value) = config.get(key) {
                    component.facts.push(format!("{key} {value}"));
                }
            }
            for key in config.ignored() {
                component
                    .facts
                    .push(format!("`{key}` is not an option of any scheduler"));
            }
        }
        Err(error) => component.problems.push(error_chain(&error)),
    }
}

/// All weights files of a folder that belong to a model, sorted; for shards their index.
fn weights_files(folder: &Path, [safetensors, bin]: [&str; 2]) -> Vec<PathBuf> {
    let belongs = |name: &str| {
        [(safetensors, ".safetensors"), (bin, ".bin")]
            .iter()
            .any(|(stem, extension)| {
                let rest = name.strip_prefix(stem);
                rest.is_some_and(|rest| {
                    let is_index = rest.starts_with(&format!("{extension}.index"));
                    let is_shard = rest.contains("-of-");
                    is_index && rest.ends_with(".json") || rest.ends_with(extension) && !is_shard
                })
            })
    };
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| belongs(&name.to_string_lossy()))
        })
        .collect();
    files.sort();
    files
}

fn read_weights(path: &Path) -> Result<(Weights, Checkpoint), CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    let mut elements = BTreeMap::new();
    for info in checkpoint.tensors().values() {
        *elements.entry(info.dtype.clone()).or_insert(0) += info.num_elements();
    }
    let weights = Weights {
        path: path.to_path_buf(),
        tensors: checkpoint.tensors().len(),
        elements,
    };
    Ok((weights, checkpoint))
}

/// An error and its causes in one line.
fn error_chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line.push_str(&format!(": {error}"));
        source = error.source();
    }
    line
}
