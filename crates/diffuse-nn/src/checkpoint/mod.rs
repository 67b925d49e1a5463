//! Weights files: what is in them, and how it gets into a module.
//!
//! A [`Checkpoint`] lists the tensors of a file, of several shards, or of bytes in memory. None is
//! read until [`Checkpoint::load_into`] reads each one, once, into its final type. Loading is
//! strict: every parameter of the module must be in the checkpoint with its shape, and every tensor
//! of the checkpoint must be a parameter.

mod load;
mod pickle;
mod safetensors;
mod save;
mod shards;
mod source;
mod write;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::DType;
use thiserror::Error;

use crate::files::{check_contents, check_regular};
use source::FileSource;

pub use load::{Parameter, arrange_weights, cast, float_dtype, parameters};
pub use save::save_safetensors;
pub use source::TensorSource;

/// Why a weights file could not be read, or does not fit a module.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The file cannot be opened or read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write `{}`: {message}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
    /// The file is not what its name says: truncated, with a lying header, or of another format.
    #[error("`{}` is not a valid {format} file: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// `safetensors`, `PyTorch` or `index`.
        format: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The module has parameters that the file does not have.
    #[error("`{}` lacks {}", path.display(), name_some(keys))]
    Missing {
        /// The file.
        path: PathBuf,
        /// The parameters' keys.
        keys: Vec<String>,
    },
    /// The file has tensors that the module does not have.
    #[error("`{}` has {} that this model does not have", path.display(), name_some(keys))]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// The tensors' keys.
        keys: Vec<String>,
    },
    /// A tensor has another shape than its parameter.
    #[error("`{key}` in `{}` has shape {found:?}, but this model needs {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's key.
        key: String,
        /// The parameter's shape.
        expected: Vec<usize>,
        /// The tensor's shape.
        found: Vec<usize>,
    },
    /// A tensor is not of a floating point type.
    #[error("`{key}` in `{}` has type {found}, but weights are F64, F32, F16 or BF16", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The tensor's key.
        key: String,
        /// The tensor's type.
        found: String,
    },
    /// Two tensors have the same key, perhaps after old names were translated.
    #[error("`{}` has `{key}` twice", path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
}

/// The first few of `keys`, and how many there are.
fn name_some(keys: &[String]) -> String {
    const SHOWN: usize = 3;
    let shown = keys
        .iter()
        .take(SHOWN)
        .map(|key| format!("`{key}`"))
        .collect::<Vec<_>>()
        .join(", ");
    match keys.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more tensors"),
    }
}

/// Where a tensor lies, and what it is.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Element type by its safetensors name: `F32`, `F16`, `BF16`, `I64`, ...
    pub dtype: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Index of its source in the checkpoint.
    source: usize,
    /// Bytes of the source: little-endian elements, row-major.
    bytes: Range<u64>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes in the file.
    pub fn num_bytes(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    /// burn's name of the type, if it is a floating point type.
    fn float(&self) -> Option<DType> {
        match self.dtype.as_str() {
            "F64" => Some(DType::F64),
            "F32" => Some(DType::F32),
            "F16" => Some(DType::F16),
            "BF16" => Some(DType::BF16),
            _ => None,
        }
    }
}

/// The tensors of a weights file, of several, or of memory.
#[derive(Clone)]
pub struct Checkpoint {
    path: PathBuf,
    sources: Vec<Arc<dyn TensorSource>>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("tensors", &self.tensors)
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens a `.safetensors` file; a PyTorch `.bin`, `.ckpt`, `.pt` or `.pth` file in its zip
    /// format; or the `.index.json` of shards, which lie beside it.
    ///
    /// # Errors
    /// If a file cannot be read, is damaged, or is a pickle that names anything but tensors.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        if shards::is_index(path) {
            return shards::open(path);
        }
        let read = |source| CheckpointError::Read {
            path: path.to_path_buf(),
            source,
        };
        check_regular(path).map_err(read)?;
        let file = File::open(path).and_then(FileSource::new).map_err(read)?;
        Self::from_source(path, Arc::new(file))
    }

    /// The tensors of a source in a format by the extension of `path`, which also stands for it in
    /// messages. Bytes in memory are one: `Checkpoint::from_source("model.safetensors",
    /// Arc::new(bytes))`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_source(
        path: impl AsRef<Path>,
        source: Arc<dyn TensorSource>,
    ) -> Result<Self, CheckpointError> {
        let path = path.as_ref().to_path_buf();
        let mut start = vec![
            0;
            usize::try_from(source.len())
                .unwrap_or(usize::MAX)
                .min(1 << 10)
        ];
        let checked = source.read_at(&mut start, 0);
        if let Err(source) = checked.and_then(|()| check_contents(&start)) {
            return Err(CheckpointError::Read { path, source });
        }
        let extension = path.extension().and_then(|extension| extension.to_str());
        let (format, tensors) = match extension {
            Some("bin" | "ckpt" | "pt" | "pth") => ("PyTorch", pickle::list(&*source)),
            _ => ("safetensors", safetensors::list(&*source)),
        };
        match tensors {
            Ok(tensors) => Ok(Self {
                path,
                sources: vec![source],
                tensors,
            }),
            Err(message) => Err(CheckpointError::Format {
                path,
                format,
                message,
            }),
        }
    }

    /// The tensors of both.
    ///
    /// # Errors
    /// If both have a tensor of the same key.
    pub fn join(mut self, other: Self) -> Result<Self, CheckpointError> {
        let first = self.sources.len();
        self.sources.extend(other.sources);
        for (key, mut info) in other.tensors {
            info.source += first;
            if self.tensors.insert(key.clone(), info).is_some() {
                let path = other.path;
                return Err(CheckpointError::Twice { path, key });
            }
        }
        Ok(self)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors by key.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Translates each key; tensors whose key becomes `None` are left out.
    ///
    /// # Errors
    /// If two keys become the same.
    pub fn rename(
        self,
        translate: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, CheckpointError> {
        let mut tensors = BTreeMap::new();
        for (key, info) in self.tensors {
            let Some(key) = translate(&key) else { continue };
            if tensors.insert(key.clone(), info).is_some() {
                return Err(CheckpointError::Twice {
                    path: self.path,
                    key,
                });
            }
        }
        Ok(Self { tensors, ..self })
    }
}

/// Attention layers of early checkpoints (`query`, `key`, `value`, `proj_attn`) by today's names;
/// other keys as they are. Only layers inside a list named `attentions` ever had the old names.
pub fn modern_attention_name(key: &str) -> String {
    let mut segments: Vec<&str> = key.split('.').collect();
    let attentions = segments
        .iter()
        .rposition(|segment| *segment == "attentions");
    if let Some(layer) = attentions.map(|at| at + 2)
        && layer + 2 == segments.len()
    {
        segments[layer] = match segments[layer] {
            "query" => "to_q",
            "key" => "to_k",
            "value" => "to_v",
            "proj_attn" => "to_out.0",
            other => other,
        };
    }
    segments.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_attention_names_become_todays() {
        let check = |old: &str, new: &str| assert_eq!(modern_attention_name(old), new);
        check(
            "mid_block.attentions.0.query.weight",
            "mid_block.attentions.0.to_q.weight",
        );
        check(
            "encoder.mid_block.attentions.0.proj_attn.bias",
            "encoder.mid_block.attentions.0.to_out.0.bias",
        );
        check(
            "up_blocks.1.attentions.2.key.bias",
            "up_blocks.1.attentions.2.to_k.bias",
        );
        check(
            "mid_block.attentions.0.group_norm.weight",
            "mid_block.attentions.0.group_norm.weight",
        );
        check("key.weight", "key.weight");
    }

    #[test]
    fn long_lists_of_keys_are_cut() {
        let keys: Vec<String> = ["a", "b", "c", "d", "e"].map(String::from).to_vec();
        assert_eq!(name_some(&keys[..1]), "`a`");
        assert_eq!(name_some(&keys), "`a`, `b`, `c` and 2 more tensors");
    }
}
