//! From one weights file to another, tensor by tensor.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use burn::tensor::DType;
use serde_json::{Map, Value, json};

use super::load::convert;
use super::{Checkpoint, CheckpointError, TensorInfo};
use crate::files::replace_file;

impl Checkpoint {
    /// Writes all tensors, under their present keys, as a safetensors file; in type `dtype`, or each in its own. Memory
    /// is bounded by the largest tensor. An existing file is replaced once the new one is complete.
    ///
    /// # Errors
    /// If a tensor is not of a floating point type, or the file cannot be written.
    pub fn write_safetensors(
        &self,
        path: impl AsRef<Path>,
        dtype: Option<DType>,
    ) -> Result<(), CheckpointError> {
        let path = path.as_ref();
        for (key, info) in &self.tensors {
            if info.float().is_none() {
                return Err(CheckpointError::Type {
                    path: self.path.clone(),
                    key: key.clone(),
                    found: info.dtype.clone(),
                });
            }
        }
        replace_file(path, |temporary| {
            let mut file = BufWriter::new(File::create(temporary)?);
            self.write_to(&mut file, dtype)?;
            file.into_inner()?.sync_all()
        })
        .map_err(|error| CheckpointError::Write {
            path: path.to_path_buf(),
            message: error.to_string(),
        })
    }

    fn write_to(&self, file: &mut impl Write, dtype: Option<DType>) -> io::Result<()> {
        let target = |info: &TensorInfo| dtype.or(info.float()).expect("types were checked");
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut offset = 0;
        for (key, info) in &self.tensors {
            let dtype = target(info);
            let end = offset + info.num_elements() * dtype.size();
            header.insert(
                key.clone(),
                json!({
                    "dtype": format!("{dtype:?}"),
                    "shape": info.shape,
                    "data_offsets": [offset, end],
                }),
            );
            offset = end;
        }
        // Spaces after the JSON align the tensors.
        let mut header = Value::from(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for info in self.tensors.values() {
            let bytes = info.of(&self.map);
            if Some(target(info)) == info.float() {
                file.write_all(bytes)?;
            } else {
                file.write_all(&convert(bytes, info, target(info)).bytes)?;
            }
            info.release(&self.map);
        }
        Ok(())
    }
}
