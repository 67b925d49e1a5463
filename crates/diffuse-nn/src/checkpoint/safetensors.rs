//! The safetensors header: a length, JSON, then the tensors' bytes.

use std::collections::BTreeMap;

use safetensors::{SafeTensorError, SafeTensors};
use serde_json::{Map, Value};

use super::TensorInfo;

/// The tensors of a safetensors file. The crate checks that the header fits the file, that the tensors fill it
/// without gaps, and that each tensor's bytes are what its shape and type need.
pub(super) fn list(file: &[u8]) -> Result<BTreeMap<String, TensorInfo>, String> {
    let (header, metadata) = SafeTensors::read_metadata(file).map_err(|error| match error {
        SafeTensorError::HeaderTooSmall => "it is too short for a header".to_string(),
        SafeTensorError::MetadataIncompleteBuffer => {
            "it is truncated: its header describes more bytes than it has".to_string()
        }
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            "its header's length is larger than the file or the format allows".to_string()
        }
        other => lying_tensor(file).unwrap_or_else(|| other.to_string()),
    })?;
    // The header starts after its own length, which takes eight bytes.
    let data = header + size_of::<u64>();
    let tensors = metadata.tensors();
    Ok(tensors
        .iter()
        .map(|(key, info)| {
            let (start, end) = info.data_offsets;
            let tensor = TensorInfo {
                dtype: info.dtype.to_string(),
                shape: info.shape.clone(),
                bytes: data + start..data + end,
            };
            (key.clone(), tensor)
        })
        .collect())
}

/// The first tensor whose entry in the header is wrong in itself, which the crate's errors do not name.
fn lying_tensor(file: &[u8]) -> Option<String> {
    let (length, rest) = file.split_first_chunk()?;
    let header = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let header: Map<String, Value> = serde_json::from_slice(header).ok()?;
    let tensors = header.iter().filter(|(key, _)| *key != "__metadata__");
    tensors.into_iter().find_map(|(key, entry)| {
        let info = match serde_json::from_value::<safetensors::tensor::TensorInfo>(entry.clone()) {
            Ok(info) => info,
            Err(error) => return Some(format!("`{key}`: {error}")),
        };
        let (start, end) = info.data_offsets;
        let elements = info
            .shape
            .iter()
            .try_fold(1usize, |n, size| n.checked_mul(*size));
        let bits = elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
        let found = end
            .checked_sub(start)
            .and_then(|bytes| bytes.checked_mul(8));
        (bits.is_none() || bits != found).then(|| {
            format!(
                "`{key}` has type {} and shape {:?}, which do not make bytes {start} to {end}",
                info.dtype, info.shape
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[track_caller]
    fn check_error(bytes: &[u8], expected: &str) {
        let message = list(bytes).unwrap_err();
        assert!(message.contains(expected), "{message}");
    }

    const ONE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn a_valid_file_is_listed() {
        let tensors = list(&file(ONE, &[0; 8])).unwrap();
        assert_eq!(tensors["a"].shape, [2]);
        assert_eq!(tensors["a"].dtype, "F32");
        assert_eq!(tensors["a"].bytes, 8 + ONE.len()..16 + ONE.len());
    }

    #[test]
    fn damaged_files_are_errors() {
        check_error(&[], "too short");
        check_error(&[1, 2, 3], "too short");
        check_error(&file(ONE, &[0; 7]), "truncated");
        check_error(&file(ONE, &[0; 8])[..20], "length");
        check_error(&[0xff; 64], "length");
    }

    #[test]
    fn lying_headers_are_errors() {
        let check_lie = |dtype: &str, shape: &str, offsets: &str, expected: &str| {
            let header = format!(
                r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#
            );
            check_error(&file(&header, &[0; 8]), expected);
        };
        check_lie("F32", "[3]", "[0,8]", "`a` has type F32 and shape [3]");
        check_lie("F32", "[2]", "[8,0]", "`a`");
        check_lie("F32", "[2]", "[8,16]", "`a`");
        check_lie("F32", "[2]", "[0,800]", "`a` has type F32 and shape [2]");
        check_lie("F32", "[18446744073709551615, 2]", "[0,8]", "`a` has");
        check_lie("F99", "[2]", "[0,8]", "`a`: unknown variant `F99`");
        check_lie("F32", "[-2]", "[0,8]", "`a`: invalid value");
        check_error(&file("{not json", &[]), "JSON");
    }
}
