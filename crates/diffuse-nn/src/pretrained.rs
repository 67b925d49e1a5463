//! A model and its folder: `config.json` beside one weights file.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{DType, FloatDType, backend::Backend};
use thiserror::Error;

use crate::ModelPath;
use crate::checkpoint::{Checkpoint, CheckpointError, parameters, save_safetensors};
use crate::config::{ConfigError, ModelConfig};
use crate::files::replace_file;

/// Why a model could not be loaded or saved.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PretrainedError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The folder does not exist.
    #[error("{}", no_folder(.0))]
    NoFolder(PathBuf),
    /// The folder has no weights file of this model.
    #[error("`{}` has none of {expected}{hint}", folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// The names that were looked for.
        expected: String,
        /// What is there instead.
        hint: String,
    },
}

/// What is wrong with a path that is not a model's folder, nor a file.
pub fn no_folder(path: &Path) -> String {
    if path.exists() {
        format!(
            "`{}` is a file, but a model is a folder in Diffusers' format",
            path.display()
        )
    } else {
        let extension = path.extension().and_then(|extension| extension.to_str());
        let is_file = matches!(
            extension,
            Some("safetensors" | "ckpt" | "pt" | "pth" | "bin")
        );
        let what = if is_file { "file" } else { "folder" };
        format!("there is no {what} `{}`", path.display())
    }
}

/// How to load a model.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Which variant of the weights to take: `fp16` looks for `*.fp16.safetensors` and
    /// `*.fp16.bin`.
    pub variant: Option<String>,
    /// Floating point type that is computed in; the backend's own by default.
    pub dtype: Option<FloatDType>,
    /// Floating point type that weights of two and more dimensions (linear layers, convolutions,
    /// embeddings) are kept in, to be widened while they compute; `dtype` by default. `F16` or
    /// `BF16` halves the memory of a model in `F32`.
    pub weights: Option<FloatDType>,
    /// Whether tensors that the model does not have are an error; by default they are one warning
    /// in the log.
    pub strict: bool,
}

/// A model that is published as a folder with `config.json` and a weights file.
pub trait Pretrained<B: Backend>: Module<B> {
    /// What `config.json` holds.
    type Config: ModelConfig;

    /// The configuration that this model was made from.
    fn config(&self) -> &Self::Config;

    /// A model with fresh weights, which are drawn when they are first used.
    fn from_config(config: &Self::Config, device: &B::Device) -> Self;

    /// Today's key of a tensor in a published file; `None` for one that is not a weight.
    fn current_key(key: &str) -> Option<String> {
        Some(key.to_string())
    }

    /// Loads a model from its folder, in the backend's float type. A subfolder is
    /// `folder.join("unet")`.
    ///
    /// # Errors
    /// If a file is missing or damaged, or asks for something that is not computed here.
    fn from_pretrained(
        folder: impl Into<ModelPath>,
        device: &B::Device,
    ) -> Result<Self, PretrainedError> {
        Self::from_pretrained_with(folder, &LoadOptions::default(), device)
    }

    /// [`from_pretrained`](Self::from_pretrained) with a variant or a float type.
    ///
    /// # Errors
    /// As [`from_pretrained`](Self::from_pretrained), and if the folder does not have the variant.
    fn from_pretrained_with(
        folder: impl Into<ModelPath>,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<Self, PretrainedError> {
        let (config, weights) = Self::open(folder, options)?;
        Self::from_checkpoint(&config, &weights, options, device)
    }

    /// The configuration of a model's folder, and its tensors under today's keys, none of which is
    /// read yet.
    ///
    /// # Errors
    /// If a file is missing or damaged, or asks for something that is not computed here.
    fn open(
        folder: impl Into<ModelPath>,
        options: &LoadOptions,
    ) -> Result<(Self::Config, Checkpoint), PretrainedError> {
        let folder = folder.into();
        if !folder.is_dir() {
            return Err(PretrainedError::NoFolder(folder.path().to_path_buf()));
        }
        let config = Self::Config::from_file(folder.join("config.json"))?;
        let stems = Self::Config::WEIGHTS;
        let weights = find_weights(&folder, stems, options.variant.as_deref())?;
        let weights = Checkpoint::open(weights)?.rename(Self::current_key)?;
        Ok((config, weights))
    }

    /// A model of a configuration with the tensors of a checkpoint, under today's keys.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape or no floating point type, or cannot be read.
    fn from_checkpoint(
        config: &Self::Config,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<Self, PretrainedError> {
        let module = Self::from_config(config, device);
        checkpoint.check_surplus(&parameters(&module), options.strict)?;
        let [dtype, weights] = [options.dtype, options.weights].map(|dtype| dtype.map(DType::from));
        Ok(checkpoint.load_into(module, dtype, weights)?)
    }

    /// Writes `config.json` and the weights, in the format of
    /// [`from_pretrained`](Self::from_pretrained) and of the reference. The folder is made if it
    /// does not exist.
    ///
    /// # Errors
    /// If a file cannot be written.
    fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<(), PretrainedError> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let text = serde_json::to_string_pretty(&self.config().to_map())
            .expect("a JSON object can be written");
        fs::create_dir_all(folder)
            .and_then(|()| replace_file(&path, |temporary| fs::write(temporary, text + "\n")))
            .map_err(|source| ConfigError::Write { path, source })?;
        save_safetensors(
            self,
            folder.join(format!("{}.safetensors", Self::Config::WEIGHTS[0])),
        )?;
        Ok(())
    }
}

/// The weights file of a model's folder, or the index of several: safetensors before pickles.
///
/// # Errors
/// If there is none with this stem and variant.
pub fn find_weights(
    folder: &ModelPath,
    [safetensors, bin]: [&str; 2],
    variant: Option<&str>,
) -> Result<ModelPath, PretrainedError> {
    let variant = variant.map(|name| format!(".{name}")).unwrap_or_default();
    let names = [
        format!("{safetensors}{variant}.safetensors"),
        format!("{safetensors}.safetensors.index{variant}.json"),
        format!("{bin}{variant}.bin"),
        format!("{bin}.bin.index{variant}.json"),
    ];
    let found = names
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file());
    found.ok_or_else(|| PretrainedError::NoWeights {
        folder: folder.path().to_path_buf(),
        expected: format!("`{}`, `{}`", names[0], names[2]),
        hint: other_weights(folder, safetensors, bin),
    })
}

/// A sentence about weights of other variants in the folder.
fn other_weights(folder: &ModelPath, safetensors: &str, bin: &str) -> String {
    let names = folder.names().into_iter();
    let others: Vec<String> = names
        .filter(|name| name.starts_with(safetensors) || name.starts_with(bin))
        .map(|name| format!("`{name}`"))
        .collect();
    if others.is_empty() {
        String::new()
    } else {
        format!(
            "; it has {} (a variant is chosen by its name)",
            others.join(", ")
        )
    }
}
