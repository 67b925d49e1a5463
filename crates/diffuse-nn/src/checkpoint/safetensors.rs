//! The safetensors header: a length, JSON, then the tensors' bytes.

use safetensors::tensor::Metadata;
use serde_json::{Map, Value};

use super::{Listed, TensorInfo, TensorSource};

/// A longer header is not one: the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The tensors of a safetensors file. The crate `safetensors` checks that the tensors leave no
/// gaps, and that each tensor's bytes are what its shape and type need.
pub(super) fn list(file: &dyn TensorSource) -> Result<Listed, String> {
    let read = |offset, length: usize| {
        let mut bytes = vec![0; length];
        let result = file.read_at(&mut bytes, offset);
        result.map(|()| bytes).map_err(|error| error.to_string())
    };
    let length_bytes = size_of::<u64>() as u64;
    let Some(rest) = file.len().checked_sub(length_bytes) else {
        return Err("it is too short for a header".into());
    };
    let length = read(0, size_of::<u64>())?;
    let length = u64::from_le_bytes(length.try_into().expect("as many bytes as were read"));
    if length > MAX_HEADER_BYTES || length > rest {
        return Err("its header's length is larger than the file or the format allows".into());
    }
    let header = read(length_bytes, length as usize)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| {
        wrong_entry(&header).unwrap_or_else(|| match error.classify() {
            serde_json::error::Category::Data => error.to_string(),
            _ => format!("its header is not JSON: {error}"),
        })
    })?;
    let tensors = metadata.tensors();
    let data = length_bytes + length;
    let ends = tensors.values().map(|info| info.data_offsets.1 as u64);
    let end = data.checked_add(ends.max().unwrap_or(0));
    let Some(end) = end.filter(|end| *end <= file.len()) else {
        return Err("it is truncated: its header describes more bytes than it has".into());
    };
    if end < file.len() {
        return Err("it has more bytes than its header describes".into());
    }
    let tensors = tensors.iter().map(|(key, info)| {
        let tensor = TensorInfo {
            dtype: info.dtype.to_string(),
            shape: info.shape.clone(),
            stored_key: key.clone(),
            source: 0,
            offset: data + info.data_offsets.0 as u64,
            strides: None,
            patches: Vec::new(),
        };
        (key.clone(), tensor)
    });
    let facts = metadata.metadata().iter().flatten();
    Ok(Listed {
        tensors: tensors.collect(),
        metadata: facts.map(|(k, v)| (k.clone(), v.clone())).collect(),
    })
}

/// The first tensor whose entry in the header is wrong in itself, which the crate's errors do not
/// name.
fn wrong_entry(header: &[u8]) -> Option<String> {
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
        let message = list(&bytes.to_vec()).unwrap_err();
        assert_eq!(message, expected);
    }

    const ONE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn a_valid_file_is_listed() {
        let tensors = list(&file(ONE, &[0; 8])).unwrap().tensors;
        assert_eq!(tensors["a"].shape, [2]);
        assert_eq!(tensors["a"].dtype, "F32");
        assert_eq!(tensors["a"].offset, 8 + ONE.len() as u64);
    }

    #[test]
    fn damaged_files_are_errors() {
        check_error(&[], "it is too short for a header");
        check_error(&[1, 2, 3], "it is too short for a header");
        check_error(
            &file(ONE, &[0; 7]),
            "it is truncated: its header describes more bytes than it has",
        );
        check_error(
            &file(ONE, &[0; 9]),
            "it has more bytes than its header describes",
        );
        let length = "its header's length is larger than the file or the format allows";
        check_error(&file(ONE, &[0; 8])[..20], length);
        check_error(&[0xff; 64], length);
    }

    #[test]
    fn lying_headers_are_errors() {
        let check_lie = |dtype: &str, shape: &str, offsets: &str, expected: &str| {
            let header = format!(
                r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#
            );
            check_error(&file(&header, &[0; 8]), expected);
        };
        for (shape, start, end) in [
            ("[3]", 0, 8),
            ("[2]", 8, 0),
            ("[2]", 0, 800),
            ("[18446744073709551615, 2]", 0, 8),
        ] {
            let expected = format!(
                "`a` has type F32 and shape {shape}, which do not make bytes {start} to {end}"
            );
            check_lie("F32", shape, &format!("[{start},{end}]"), &expected);
        }
        check_lie("F32", "[2]", "[8,16]", "invalid offset for tensor `a`");
        check_lie(
            "F99",
            "[2]",
            "[0,8]",
            "`a`: unknown variant `F99`, expected one of `BOOL`, `F4`, `F6_E2M3`, `F6_E3M2`, `U8`, \
             `I8`, `F8_E5M2`, `F8_E4M3`, `F8_E8M0`, `I16`, `U16`, `F16`, `BF16`, `I32`, `U32`, \
             `F32`, `C64`, `F64`, `I64`, `U64`",
        );
        check_lie(
            "F32",
            "[-2]",
            "[0,8]",
            "`a`: invalid value: integer `-2`, expected usize",
        );
        check_error(
            &file("{not json", &[]),
            "its header is not JSON: key must be a string at line 1 column 2",
        );
    }
}
