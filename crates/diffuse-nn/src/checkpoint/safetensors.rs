//! The safetensors header: a length, JSON, then the tensors' bytes.

use std::collections::BTreeMap;

use safetensors::SafeTensors;

use super::TensorInfo;

/// The tensors of a safetensors file. The crate checks that the header fits the file, that the tensors fill it
/// without gaps, and that each tensor's bytes are what its shape and type need.
pub(super) fn list(file: &[u8]) -> Result<BTreeMap<String, TensorInfo>, String> {
    let (header, metadata) = SafeTensors::read_metadata(file).map_err(|error| match error {
        safetensors::SafeTensorError::HeaderTooSmall => "it is too short for a header".to_string(),
        safetensors::SafeTensorError::MetadataIncompleteBuffer => {
            "it is truncated: its header describes more bytes than it has".to_string()
        }
        safetensors::SafeTensorError::HeaderTooLarge
        | safetensors::SafeTensorError::InvalidHeaderLength => {
            "its header's length is larger than the file or the format allows".to_string()
        }
        other => other.to_string(),
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
        let lie = |shape: &str, offsets: &str| {
            let header =
                format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
            list(&file(&header, &[0; 8])).unwrap_err()
        };
        lie("[3]", "[0,8]");
        lie("[2]", "[8,0]");
        lie("[2]", "[0,800]");
        lie("[18446744073709551615, 2]", "[0,8]");
        list(&file("{not json", &[])).unwrap_err();
        list(&file(
            r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#,
            &[0; 8],
        ))
        .unwrap_err();
    }
}
