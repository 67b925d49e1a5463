//! Weights in several files, with an index that says which tensor is in which.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use super::{Checkpoint, CheckpointError};
use crate::ModelPath;

#[derive(Deserialize)]
struct Index {
    /// File names by the tensors' keys.
    weight_map: BTreeMap<String, String>,
}

/// Whether a path names an index: `model.safetensors.index.json`, or
/// `model.safetensors.index.fp16.json`.
pub(super) fn is_index(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.ends_with(".json") && name.contains(".index."))
}

/// The tensors of all shards of an index. Index and shards must agree on every tensor.
pub(super) fn open(file: &ModelPath) -> Result<Checkpoint, CheckpointError> {
    let path = file.path();
    let format = |message: String| CheckpointError::Format {
        path: path.to_path_buf(),
        format: "index",
        message,
    };
    let text = file.read_text().map_err(|source| CheckpointError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    let index: Index = serde_json::from_str(&text).map_err(|error| format(error.to_string()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let mut all = Checkpoint {
        path: path.to_path_buf(),
        sources: Vec::new(),
        tensors: BTreeMap::new(),
        metadata: BTreeMap::new(),
    };
    for name in names {
        // Nothing outside of the folder, and no index in an index.
        let shard = Path::new(name);
        if shard.file_name() != Some(name.as_ref()) || is_index(shard) {
            return Err(format(format!("`{name}` is not the name of a shard")));
        }
        let shard = Checkpoint::open(file.with_file_name(name))?;
        for key in shard.tensors.keys() {
            if index.weight_map.get(key) != Some(name) {
                let message = format!("`{name}` has `{key}`, which the index does not list there");
                return Err(format(message));
            }
        }
        all = all.join(shard)?;
    }
    let missing = index.weight_map.keys();
    let mut missing = missing.filter(|key| !all.tensors.contains_key(*key));
    match missing.next() {
        Some(key) => Err(format(format!("no file has `{key}`"))),
        None => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn shard(key: &str, value: f32) -> Vec<u8> {
        let header = format!(r#"{{"{key}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        let length = (header.len() as u64).to_le_bytes();
        [&length, header.as_bytes(), &value.to_le_bytes()].concat()
    }

    #[test]
    fn shards_are_one_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors.index.json");
        let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
        let index = |map: &str| write("model.safetensors.index.json", map.as_bytes());
        write("1.safetensors", &shard("a", 1.5));
        write("2.safetensors", &shard("b", 2.5));
        index(r#"{"metadata":{},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#);
        let checkpoint = Checkpoint::open(&path).unwrap();
        for (key, value) in [("a", 1.5_f32), ("b", 2.5)] {
            let data = checkpoint.read_f32(key).unwrap();
            assert_eq!(data.to_vec::<f32>().unwrap(), [value]);
        }

        let check_error = |map: &str, expected: &str| {
            index(map);
            let error = Checkpoint::open(&path).unwrap_err().to_string();
            let path = path.display();
            assert_eq!(
                error,
                format!("`{path}` is not a valid index file: {expected}")
            );
        };
        check_error(
            r#"{"weight_map":{"a":"1.safetensors","c":"1.safetensors"}}"#,
            "no file has `c`",
        );
        check_error(
            r#"{"weight_map":{"c":"1.safetensors"}}"#,
            "`1.safetensors` has `a`, which the index does not list there",
        );
        check_error(
            r#"{"weight_map":{"a":"../1.safetensors"}}"#,
            "`../1.safetensors` is not the name of a shard",
        );
        check_error(
            r#"{"weight_map":{"a":"model.safetensors.index.json"}}"#,
            "`model.safetensors.index.json` is not the name of a shard",
        );
        check_error(
            r#"{"weight_map":[]}"#,
            "invalid type: sequence, expected a map at line 1 column 14",
        );
    }
}
