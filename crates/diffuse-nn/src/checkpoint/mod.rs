//! Weights files: what is in them, and how it gets into a module.
//!
//! A [`Checkpoint`] lists the tensors of a file, of several shards, or of bytes in memory. None is
//! read until [`Checkpoint::load_into`] reads each one, once, into its final type. Every parameter
//! of the module must be in the checkpoint with its shape; surplus tensors are not read.

mod error;
mod load;
mod pickle;
mod safetensors;
mod save;
mod shards;
mod source;
mod tensor;
mod write;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::ModelPath;
use crate::files::check_contents;
use source::Concatenated;

pub use error::{CheckpointError, name_some};
pub use load::{Parameter, arrange_weights, cast, float_dtype, parameters};
pub use save::save_safetensors;
pub(crate) use source::FileSource;
pub use source::TensorSource;
pub use tensor::{Patch, TensorInfo};

/// The tensors of a weights file, of several, or of memory.
#[derive(Clone)]
pub struct Checkpoint {
    path: PathBuf,
    sources: Vec<Arc<dyn TensorSource>>,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

/// What a format's reader finds in a source.
#[derive(Debug, Default)]
struct Listed {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
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
    /// Opens a `.safetensors` file; a PyTorch `.bin`, `.ckpt`, `.pt` or `.pth` file; or the
    /// `.index.json` of shards, which lie beside it.
    ///
    /// # Errors
    /// If a file cannot be read, is damaged, or is a pickle that names anything but tensors.
    pub fn open(path: impl Into<ModelPath>) -> Result<Self, CheckpointError> {
        let file = path.into();
        if shards::is_index(file.path()) {
            return shards::open(&file);
        }
        let source = file.open().map_err(|source| CheckpointError::Read {
            path: file.path().to_path_buf(),
            source,
        })?;
        Self::from_source(file.path(), source)
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
        let (format, listed) = match extension {
            Some("bin" | "ckpt" | "pt" | "pth") => ("PyTorch", pickle::list(&*source)),
            _ => ("safetensors", safetensors::list(&*source)),
        };
        match listed {
            Ok(Listed { tensors, metadata }) => Ok(Self {
                path,
                sources: vec![source],
                tensors,
                metadata,
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

    /// What a safetensors file says about itself.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Other tensors of the same sources.
    pub fn with_tensors(&self, tensors: BTreeMap<String, TensorInfo>) -> Self {
        Self {
            tensors,
            ..self.clone()
        }
    }

    /// Tensors one after the other, as one tensor of this checkpoint's: joined along their first
    /// dimension.
    ///
    /// # Errors
    /// If they have different types or other dimensions, or their elements are not contiguous.
    pub fn concatenate(&mut self, keys: &[String]) -> Result<TensorInfo, CheckpointError> {
        let parts: Vec<&TensorInfo> = keys.iter().map(|key| &self.tensors[key]).collect();
        let first = parts[0];
        let fits = |part: &&TensorInfo| {
            part.dtype == first.dtype && part.shape[1..] == first.shape[1..] && part.is_contiguous()
        };
        if let Some(wrong) = parts.iter().find(|part| !fits(part)) {
            return Err(CheckpointError::Shape {
                path: self.path.clone(),
                key: wrong.stored_key.clone(),
                expected: first.shape.clone(),
                found: wrong.shape.clone(),
            });
        }
        let ranges = parts.iter().map(|part| {
            let source = Arc::clone(&self.sources[part.source]);
            (source, part.offset..part.offset + part.num_bytes())
        });
        let mut tensor = first.clone();
        tensor.shape[0] = parts.iter().map(|part| part.shape[0]).sum();
        tensor.offset = 0;
        tensor.source = self.sources.len();
        let source = Concatenated::new(ranges.collect());
        self.sources.push(Arc::new(source));
        Ok(tensor)
    }

    /// Has a tensor changed whenever it is read, after earlier changes.
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn patch(&mut self, key: &str, patch: Arc<dyn Patch>) {
        let tensor = self.tensors.get_mut(key).expect("the tensor exists");
        tensor.patches.push(patch);
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
        assert_eq!(name_some(&keys), "`a`, `b`, `c` and 2 more");
    }
}
