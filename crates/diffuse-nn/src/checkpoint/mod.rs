//! Weights files: what is in them, and how it gets into a module.
//!
//! A [`Checkpoint`] maps a file into memory and lists its tensors; nothing is read until [`Checkpoint::load_into`]
//! copies each tensor, once, from the map into its final type. Loading is strict: every parameter of the module must
//! be in the file with its shape, and every tensor of the file must be a parameter.

mod load;
mod pickle;
mod safetensors;
mod save;
mod stream;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::DType;
use memmap2::Mmap;
use thiserror::Error;

use crate::files::{check_contents, check_regular};

pub use load::{Parameter, arrange_weights, cast, float_dtype, parameters};
pub use save::save_safetensors;

/// Why a weights file could not be read, or does not fit a module.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The file cannot be opened or mapped.
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
        /// `safetensors` or `PyTorch`.
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
    /// Two tensors have the same key after old names were translated.
    #[error("`{}` has `{key}` twice, once under an old name", path.display())]
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

/// Where a tensor lies in its file, and what it is.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Element type by its safetensors name: `F32`, `F16`, `BF16`, `I64`, ...
    pub dtype: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Bytes of the file: little-endian elements, row-major.
    bytes: Range<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes in the file.
    pub fn num_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The tensor's bytes in its file.
    fn of<'a>(&self, map: &'a Mmap) -> &'a [u8] {
        &map[self.bytes.clone()]
    }

    /// Gives the memory of a tensor that has been read back to the system, so that loading a model does not hold its
    /// weights twice. It is read from the file again if need be.
    fn release(&self, map: &Mmap) {
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is read-only and of a file, so dropped pages come back from the file with the same
            // content; `Checkpoint`'s contract excludes that the file changes.
            let _ =
                unsafe { map.unchecked_advise_range(advice, self.bytes.start, self.bytes.len()) };
        }
        #[cfg(not(unix))]
        let _ = map;
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

/// A weights file, mapped into memory. The file must not be changed while it is open.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    map: Arc<Mmap>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, or a PyTorch `.bin`, `.ckpt`, `.pt` or `.pth` file in its zip format.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged, or is a pickle that names anything but tensors.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref().to_path_buf();
        let read = |source| CheckpointError::Read {
            path: path.clone(),
            source,
        };
        check_regular(&path).map_err(read)?;
        let file = File::open(&path).map_err(read)?;
        // SAFETY: the map is only read. Changing the file while it is mapped is excluded by this type's contract.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        check_contents(&map).map_err(read)?;
        let extension = path.extension().and_then(|extension| extension.to_str());
        let (format, tensors) = match extension {
            Some("bin" | "ckpt" | "pt" | "pth") => ("PyTorch", pickle::list(&map)),
            _ => ("safetensors", safetensors::list(&map)),
        };
        let tensors = tensors.map_err(|message| CheckpointError::Format {
            path: path.clone(),
            format,
            message,
        })?;
        Ok(Self {
            path,
            map: Arc::new(map),
            tensors,
        })
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

/// Attention layers of early checkpoints (`query`, `key`, `value`, `proj_attn`) by today's names; other keys as they
/// are. Only layers inside a list named `attentions` ever had the old names.
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
