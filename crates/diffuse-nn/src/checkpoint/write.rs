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
    /// Writes all tensors, under their present keys, as a safetensors file; in type `dtype`, or
    /// each in its own. Memory is bounded by the largest tensor. An existing file is replaced once
    /// the new one is complete.
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
                    key: info.stored_key.clone(),
                    found: info.dtype.clone(),
                });
            };
            let dtype = dtype.map_or(own.written_as(), DType::from);
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
            if failed.borrow().is_some() {
                return Err(io::ErrorKind::Other.into());
            }
            File::options().write(true).open(temporary)?.sync_all()
        });
        match (written, failed.into_inner()) {
            (Ok(()), _) => Ok(()),
            (Err(_), Some(source)) => Err(CheckpointError::Read {
                path: self.path.clone(),
                source,
            }),
            (Err(error), None) => Err(CheckpointError::Write {
                path: path.to_path_buf(),
                message: error.to_string(),
            }),
        }
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

impl Lazy<'_> {
    fn read(&self) -> io::Result<Vec<u8>> {
        let source = &*self.checkpoint.sources[self.info.source];
        if self.info.dtype == self.dtype().to_string()
            && let Some(bytes) = self.info.read_bytes(source)
        {
            return bytes;
        }
        Ok(self.info.read(source, self.dtype)?.bytes.to_vec())
    }
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
        if self.failed.borrow().is_none() {
            match self.read() {
                Ok(bytes) => return Cow::Owned(bytes),
                Err(error) => drop(self.failed.replace(Some(error))),
            }
        }
        Cow::Owned(vec![0; self.data_len()])
    }

    fn data_len(&self) -> usize {
        self.info.num_elements() * self.dtype.size()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use super::*;
    use crate::checkpoint::TensorSource;

    /// A file with one tensor of type F64.
    fn file(value: f64) -> Vec<u8> {
        let header = r#"{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#;
        let length = (header.len() as u64).to_le_bytes();
        [&length, header.as_bytes(), &value.to_le_bytes()].concat()
    }

    #[test]
    fn tensors_in_their_own_type_are_copied() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy.safetensors");
        let source = Checkpoint::from_source("a.safetensors", Arc::new(file(0.1))).unwrap();
        source.write_safetensors(&path, None).unwrap();
        assert!(fs::read(&path).unwrap().ends_with(&0.1_f64.to_le_bytes()));
        source
            .write_safetensors(&path, Some(FloatDType::F16))
            .unwrap();
        let half = Checkpoint::open(&path).unwrap();
        assert_eq!(half.tensors()["a"].dtype, "F16");
    }

    /// A file that somebody cuts off after its header was read.
    #[derive(Debug)]
    struct Shrinking(Vec<u8>);

    impl TensorSource for Shrinking {
        fn len(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            if offset + buffer.len() as u64 == self.len() && offset > 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.0.read_at(buffer, offset)
        }
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy.safetensors");
        let source = Arc::new(Shrinking(file(0.1)));
        let source = Checkpoint::from_source("a.safetensors", source).unwrap();
        let error = source.write_safetensors(&path, None).unwrap_err();
        assert_eq!(error.to_string(), "cannot read `a.safetensors`");
        assert!(fs::read_dir(folder.path()).unwrap().next().is_none());
    }
}
