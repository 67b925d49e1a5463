//! From one checkpoint to a file, tensor by tensor.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;

use burn::tensor::{DType, FloatDType};
use safetensors::{Dtype, View};

use super::{Checkpoint, CheckpointError, TensorInfo};
use crate::files::replace_file;

impl Checkpoint {
    /// Writes all tensors, under their present keys, as a safetensors file; in type `dtype`, or each in its own. Memory
    /// is bounded by the largest tensor. An existing file is replaced once the new one is complete.
    ///
    /// # Errors
    /// If a tensor is not of a floating point type, or a file cannot be read or written.
    pub fn write_safetensors(
        &self,
        path: impl AsRef<Path>,
        dtype: Option<FloatDType>,
    ) -> Result<(), CheckpointError> {
        let path = path.as_ref();
        let failed = RefCell::new(None);
        let mut tensors = Vec::new();
        for (key, info) in &self.tensors {
            let Some(own) = info.float() else {
                return Err(CheckpointError::Type {
                    path: self.path.clone(),
                    key: key.clone(),
                    found: info.dtype.clone(),
                });
            };
            let dtype = dtype.map_or(own, DType::from);
            let tensor = Lazy {
                checkpoint: self,
                info,
                dtype,
                failed: &failed,
            };
            tensors.push((key, tensor));
        }
        // transformers refuses files that do not say so.
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let written = replace_file(path, |temporary| {
            safetensors::serialize_to_file(tensors, Some(metadata), temporary)
                .map_err(io::Error::other)?;
            match failed.take() {
                Some(error) => Err(error),
                None => File::options().write(true).open(temporary)?.sync_all(),
            }
        });
        written.map_err(|error| CheckpointError::Write {
            path: path.to_path_buf(),
            message: error.to_string(),
        })
    }
}

/// A tensor that is read when it is written.
struct Lazy<'a> {
    checkpoint: &'a Checkpoint,
    info: &'a TensorInfo,
    dtype: DType,
    /// Why a tensor could not be read: `View` has no way to say so.
    failed: &'a RefCell<Option<io::Error>>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F64 => Dtype::F64,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.info.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.checkpoint.read(self.info, self.dtype) {
            Ok(data) => Cow::Owned(data.bytes.to_vec()),
            Err(error) => {
                self.failed.replace(Some(error));
                Cow::Owned(vec![0; self.data_len()])
            }
        }
    }

    fn data_len(&self) -> usize {
        self.info.num_elements() * self.dtype.size()
    }
}
