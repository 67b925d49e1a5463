//! Adapters: small files that change some weights of a model (LoRA, Hu et al. 2021,
//! <https://arxiv.org/abs/2106.09685>, and its relatives in `forms.rs`).
//!
//! The names that files give to modules are made from the modules (`names.rs`) and looked up, never
//! the other way round. A change is computed when its weight is read, in `f32` before rounding, so
//! that no second copy of the weights is held, and removing an adapter reads the weight again.

mod forms;
mod names;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diffuse_nn::checkpoint::{Checkpoint, CheckpointError, TensorInfo, name_some};
use diffuse_nn::files::read_text;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::single_file::FileKind;
use forms::{Change, Form, Magnitude};
use names::{Attribute, split_key};

pub use names::AdaptedComponent;

/// Why an adapter cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The file cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A folder has no adapter in it.
    #[error("`{}` has none of {}", .0.display(), FILES.map(|name| format!("`{name}`")).join(", "))]
    NoFile(PathBuf),
    /// The configuration beside the file, or inside it, is damaged.
    #[error("the adapter's configuration in `{}` is not valid: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The file holds something else.
    #[error("`{}` is {kind}, not a LoRA", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it holds.
        kind: FileKind,
    },
    /// No key of the file belongs to a module of the model.
    #[error(
        "`{}` is for another model: none of its {count} tensors matches; they are {keys}",
        path.display()
    )]
    NoMatch {
        /// The file.
        path: PathBuf,
        /// How many tensors it has.
        count: usize,
        /// The first few.
        keys: String,
    },
    /// A change has another shape than its weight.
    #[error(
        "`{}` is for another model: `{key}` changes a weight of shape {found:?}, but that of \
         `{module}` is {expected:?}",
        path.display()
    )]
    Shape {
        /// The file.
        path: PathBuf,
        /// The first key of the change.
        key: String,
        /// The model's module.
        module: String,
        /// The weight's shape: outputs, and inputs times kernel size.
        expected: [usize; 2],
        /// The change's.
        found: [usize; 2],
    },
    /// The tensors of a module are not those of any form.
    #[error("`{}`: the tensors {keys} are incomplete, do not fit together or are of an unknown form", path.display())]
    Incomplete {
        /// The file.
        path: PathBuf,
        /// Their keys.
        keys: String,
    },
    /// The pipeline was put together from parts, and the weights' files are not known.
    #[error("adapters need a pipeline that was loaded from files")]
    NoWeights,
}

/// The names of an adapter's file in a folder.
const FILES: [&str; 4] = [
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
];

/// An adapter, and how strongly it acts.
#[derive(Debug, Clone)]
pub struct Adapter {
    file: Arc<AdapterFile>,
    strength: f64,
    text_encoder_strength: Option<f64>,
}

#[derive(Debug)]
struct AdapterFile {
    checkpoint: Checkpoint,
    /// PEFT's configurations, by component; the empty name is any.
    configs: BTreeMap<&'static str, PeftConfig>,
}

/// What PEFT keeps outside of the tensors.
#[derive(Debug, Clone, Default)]
struct PeftConfig {
    values: Map<String, Value>,
}

impl Adapter {
    /// Opens an adapter of strength 1: a `.safetensors` or pickled file of kohya's scripts,
    /// LyCORIS, PEFT or Diffusers, or a folder with one. No tensor is read.
    ///
    /// # Errors
    /// If the file is damaged or something else.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, AdapterError> {
        let path = path.as_ref();
        let file = if path.is_dir() {
            let mut files = FILES.iter().map(|name| path.join(name));
            let found = files.find(|file| file.is_file());
            found.ok_or_else(|| AdapterError::NoFile(path.to_path_buf()))?
        } else {
            path.to_path_buf()
        };
        let checkpoint = Checkpoint::open(&file)?;
        Self::from_checkpoint(file, checkpoint)
    }

    /// An adapter of strength 1 from the bytes of a file. The extension of `path` is that of its
    /// format, and messages name it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(path: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Self, AdapterError> {
        let path = path.as_ref();
        let checkpoint = Checkpoint::from_source(path, Arc::new(bytes))?;
        Self::from_checkpoint(path.to_path_buf(), checkpoint)
    }

    fn from_checkpoint(file: PathBuf, checkpoint: Checkpoint) -> Result<Self, AdapterError> {
        match FileKind::of(&checkpoint) {
            FileKind::Adapter | FileKind::Unknown => {}
            kind => return Err(AdapterError::Kind { path: file, kind }),
        }
        let configs = read_configs(&file, &checkpoint)?;
        Ok(Self {
            file: Arc::new(AdapterFile {
                checkpoint,
                configs,
            }),
            strength: 1.0,
            text_encoder_strength: None,
        })
    }

    /// The same adapter with another strength: 0 is none, 1 as it was trained.
    #[must_use]
    pub fn with_strength(self, strength: f64) -> Self {
        Self { strength, ..self }
    }

    /// The same adapter with a strength of its own in the text encoder.
    #[must_use]
    pub fn with_text_encoder_strength(self, strength: f64) -> Self {
        Self {
            text_encoder_strength: Some(strength),
            ..self
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.checkpoint.path()
    }

    fn strength_in(&self, component: AdaptedComponent) -> f64 {
        match component {
            AdaptedComponent::Unet => self.strength,
            AdaptedComponent::TextEncoder => self.text_encoder_strength.unwrap_or(self.strength),
        }
    }
}

/// Extensions of adapters' files; the first is taken first.
const EXTENSIONS: [&str; 4] = ["safetensors", "pt", "bin", "ckpt"];

/// The file of the adapter that a prompt calls `name`, in a folder of adapters.
pub fn find_adapter(folder: &Path, name: &str) -> Option<PathBuf> {
    let is_name = !name.is_empty() && Path::new(name).file_name() == Some(name.as_ref());
    let mut files = EXTENSIONS
        .iter()
        .map(|extension| folder.join(format!("{name}.{extension}")));
    files.find(|file| is_name && file.is_file())
}

/// The names of all adapters of a folder, sorted.
pub fn adapter_names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let names = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        let extension = path.extension()?.to_str()?;
        let is_adapter = EXTENSIONS.contains(&extension) && path.is_file();
        is_adapter.then(|| Some(path.file_stem()?.to_str()?.to_string()))?
    });
    let names: BTreeSet<String> = names.collect();
    names.into_iter().collect()
}

/// A component's weights before and after adapters.
pub(crate) struct Adapted<'a> {
    /// Which one it is.
    pub component: AdaptedComponent,
    /// Its weights, which change when they are read next.
    pub weights: &'a mut Checkpoint,
    /// Keys in the original layout, if it has them.
    pub original: Option<&'a dyn Fn(&str) -> String>,
}

/// Has adapters change weights, in order. Returns the keys of the changed weights, by component.
///
/// # Errors
/// If an adapter does not fit, or none of its tensors matches.
pub(crate) fn adapt<const N: usize>(
    adapters: &[Adapter],
    mut components: [Adapted<'_>; N],
) -> Result<[BTreeSet<String>; N], AdapterError> {
    let mut changed = [const { BTreeSet::new() }; N];
    for adapter in adapters {
        let mut groups = group(&adapter.file.checkpoint);
        let mut nothing_matched = true;
        for (adapted, changed) in components.iter_mut().zip(&mut changed) {
            for (key, change) in matches(adapter, &mut groups, adapted)? {
                adapted.weights.patch(&key, Arc::new(change));
                changed.insert(key);
                nothing_matched = false;
            }
        }
        report(adapter, &groups, nothing_matched)?;
    }
    Ok(changed)
}

/// The tensors of one module.
type Group = BTreeMap<Attribute, String>;

/// The tensors of a file by the names that it gives to modules.
fn group(checkpoint: &Checkpoint) -> HashMap<String, Group> {
    let mut groups: HashMap<String, Group> = HashMap::new();
    for key in checkpoint.tensors().keys() {
        let (module, attribute) = match split_key(key) {
            Some((module, attribute)) => (module, attribute),
            None => (key.as_str(), Attribute::Unknown),
        };
        groups
            .entry(module.to_string())
            .or_default()
            .insert(attribute, key.clone());
    }
    groups
}

/// Takes the groups of a component's modules out of `groups`, as changes by weights' keys.
fn matches(
    adapter: &Adapter,
    groups: &mut HashMap<String, Group>,
    adapted: &Adapted<'_>,
) -> Result<Vec<(String, Change)>, AdapterError> {
    let file = &adapter.file;
    let strength = adapter.strength_in(adapted.component) as f32;
    let modules: BTreeSet<&str> = adapted
        .weights
        .tensors()
        .keys()
        .filter_map(|key| key.rsplit_once('.').map(|(module, _)| module))
        .collect();
    let mut changes = Vec::new();
    for module in modules {
        let original = adapted
            .original
            .map(|original| original(&format!("{module}.weight")));
        let original = original
            .as_deref()
            .and_then(|key| key.strip_suffix(".weight"));
        for name in names::names(adapted.component, module, original) {
            let Some(mut group) = groups.remove(&name) else {
                continue;
            };
            let found = module_changes(file, adapted, module, &mut group, strength)?;
            if found.is_empty() {
                groups.insert(name, group);
                continue;
            }
            changes.extend(found);
        }
    }
    Ok(changes)
}

/// The changes of one module's weight and bias.
fn module_changes(
    file: &AdapterFile,
    adapted: &Adapted<'_>,
    module: &str,
    group: &mut Group,
    strength: f32,
) -> Result<Vec<(String, Change)>, AdapterError> {
    let keys: Vec<String> = group.values().cloned().collect();
    let incomplete = || AdapterError::Incomplete {
        path: file.checkpoint.path().to_path_buf(),
        keys: name_some(&keys),
    };
    let mut take = |attribute| {
        let key = group.remove(&attribute)?;
        Some(file.checkpoint.tensors()[&key].clone())
    };
    let mut found = Vec::new();
    let bias = format!("{module}.bias");
    if adapted.weights.tensors().contains_key(&bias)
        && let Some(difference) =
            take(Attribute::BiasDifference).or_else(|| take(Attribute::NormBias))
    {
        found.push((bias, Form::Full(difference), None));
    }
    let weight = format!("{module}.weight");
    if let Some(info) = adapted.weights.tensors().get(&weight) {
        let outputs = info.shape.first().copied().unwrap_or(1);
        let alpha = take(Attribute::Alpha);
        let magnitude = match (take(Attribute::Magnitude), take(Attribute::DoraScale)) {
            (Some(values), _) => Some(Magnitude::each_output(values)),
            (None, Some(values)) => Some(Magnitude::by_shape(values, outputs)),
            (None, None) => None,
        };
        match Form::take(&mut take, outputs).map_err(|_| incomplete())? {
            Some(mut form) => {
                form.set_scale(file.scale(adapted.component, module, form.rank(), alpha)?);
                found.push((weight, form, magnitude));
            }
            None if magnitude.is_none() && alpha.is_none() => {}
            None => return Err(incomplete()),
        }
    }
    if !found.is_empty() && !group.is_empty() {
        return Err(incomplete());
    }
    let changes = found.into_iter().map(|(key, form, magnitude)| {
        let shape = &adapted.weights.tensors()[&key].shape;
        let expected = [shape[0], shape[1..].iter().product()];
        let found = form.shape(expected);
        if found != expected {
            return Err(AdapterError::Shape {
                path: file.checkpoint.path().to_path_buf(),
                key: keys[0].clone(),
                module: module.to_string(),
                expected,
                found,
            });
        }
        if !form.fits(expected) || !magnitude.iter().all(|magnitude| magnitude.fits(expected)) {
            return Err(incomplete());
        }
        let change = Change {
            checkpoint: file.checkpoint.clone(),
            form,
            magnitude,
            strength,
            shape: expected,
        };
        Ok((key, change))
    });
    changes.collect()
}

/// Says which of an adapter's tensors are left over.
fn report(
    adapter: &Adapter,
    groups: &HashMap<String, Group>,
    nothing_matched: bool,
) -> Result<(), AdapterError> {
    let mut left: Vec<String> = groups
        .values()
        .flat_map(|group| group.values().cloned())
        .collect();
    left.sort();
    let path = adapter.path();
    let count = adapter.file.checkpoint.tensors().len();
    if nothing_matched {
        return Err(AdapterError::NoMatch {
            path: path.to_path_buf(),
            count,
            keys: name_some(&left),
        });
    }
    if !left.is_empty() {
        log::warn!(
            "`{}`: {} of its {count} tensors match nothing in this model and are not used: {}",
            path.display(),
            left.len(),
            name_some(&left)
        );
    }
    Ok(())
}

impl AdapterFile {
    /// What a change is multiplied by: `alpha / rank`, with the tensor `alpha` or PEFT's.
    fn scale(
        &self,
        component: AdaptedComponent,
        module: &str,
        rank: usize,
        alpha: Option<TensorInfo>,
    ) -> Result<f32, AdapterError> {
        let alpha = match alpha {
            Some(tensor) => self
                .checkpoint
                .read_f32(&tensor.stored_key)?
                .iter::<f32>()
                .next(),
            None => None,
        };
        Ok(match alpha.filter(|alpha| *alpha != 0.0) {
            Some(alpha) => alpha / rank as f32,
            None => self
                .config(component)
                .map_or(1.0, |config| config.scale(module, rank)),
        })
    }

    fn config(&self, component: AdaptedComponent) -> Option<&PeftConfig> {
        self.configs
            .get(component.name())
            .or_else(|| self.configs.get(""))
    }
}

/// PEFT's configurations: of the folder that a file lies in, or in the file as Diffusers saves it.
fn read_configs(
    file: &Path,
    checkpoint: &Checkpoint,
) -> Result<BTreeMap<&'static str, PeftConfig>, AdapterError> {
    let parse = |path: &Path, text: &str| {
        match serde_json::from_str(text) {
            Ok(Value::Object(values)) => Ok(values),
            Ok(_) => Err("it is not a JSON object".to_string()),
            Err(error) => Err(error.to_string()),
        }
        .map_err(|message| AdapterError::Config {
            path: path.to_path_buf(),
            message,
        })
    };
    if let Some(text) = checkpoint.metadata().get("lora_adapter_metadata") {
        let all = parse(file, text)?;
        let configs = [AdaptedComponent::Unet, AdaptedComponent::TextEncoder].map(|component| {
            let prefix = format!("{}.", component.name());
            let own = all.iter().filter_map(|(key, value)| {
                Some((key.strip_prefix(&prefix)?.to_string(), value.clone()))
            });
            (
                component.name(),
                PeftConfig {
                    values: own.collect(),
                },
            )
        });
        return Ok(configs.into());
    }
    let is_peft = file
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("adapter_model."));
    let path = file.with_file_name("adapter_config.json");
    if !is_peft || !path.is_file() {
        return Ok(BTreeMap::new());
    }
    let text = read_text(&path).map_err(|error| AdapterError::Config {
        path: path.clone(),
        message: error.to_string(),
    })?;
    let values = parse(&path, &text)?;
    Ok(BTreeMap::from([("", PeftConfig { values })]))
}

impl PeftConfig {
    /// `alpha / rank`, or `alpha / √rank` of rank-stabilised adapters.
    fn scale(&self, module: &str, rank: usize) -> f32 {
        let Some(alpha) = self
            .pattern("alpha_pattern", module)
            .or_else(|| self.number("lora_alpha"))
        else {
            return 1.0;
        };
        let stabilised = self.values.get("use_rslora").and_then(Value::as_bool) == Some(true);
        let rank = rank as f64;
        (alpha / if stabilised { rank.sqrt() } else { rank }) as f32
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.values.get(key)?.as_f64()
    }

    /// The value of the first pattern that is the module's name or its end.
    fn pattern(&self, key: &str, module: &str) -> Option<f64> {
        let patterns = self.values.get(key)?.as_object()?;
        let fits = |pattern: &str| {
            let rest = module.strip_suffix(pattern);
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        let mut patterns = patterns.iter();
        patterns.find_map(|(pattern, value)| fits(pattern).then(|| value.as_f64())?)
    }
}
