//! Tokenizer folders in many forms, against what transformers makes of prompts with each.

use std::fs;
use std::path::{Path, PathBuf};

use diffuse_clip::{AddedToken, CLIPTokenizer};
use diffuse_testing::{read_json, reference};
use serde_json::{Value, json};
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The tiny tokenizer with other files laid over it; null removes one.
fn folder(files: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let base = reference().join("sd/base/tokenizer");
    for entry in fs::read_dir(base).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    for (name, content) in files.as_object().unwrap() {
        let path = folder.path().join(name);
        match content {
            Value::Null => fs::remove_file(path).unwrap(),
            content => fs::write(path, content.to_string()).unwrap(),
        }
    }
    folder
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

fn added(value: &Value) -> AddedToken {
    let flag = |index: usize| value[index].as_bool().unwrap();
    AddedToken {
        id: value[0].as_u64().unwrap() as u32,
        content: value[1].as_str().unwrap().to_string(),
        special: flag(2),
        normalized: flag(3),
        lstrip: flag(4),
        rstrip: flag(5),
        single_word: flag(6),
    }
}

#[test]
fn folders_are_read_as_transformers_reads_them() {
    let folders = read_json(fixtures().join("folders.json"));
    let (mut prompts, mut expanded) = (0, 0);
    for case in folders.as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let folder = folder(&case["files"]);
        let tokenizer = CLIPTokenizer::from_pretrained(folder.path())
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let marks = [tokenizer.start_id(), tokenizer.end_id(), tokenizer.pad_id()];
        assert_eq!(marks.to_vec(), ids(&case["marks"]), "{name}");
        assert_eq!(json!(tokenizer.vocab_size()), case["size"], "{name}");
        assert_eq!(json!(tokenizer.max_length()), case["limit"], "{name}");
        let expected = case["added"].as_array().unwrap().iter().map(added);
        assert_eq!(
            tokenizer.added_tokens(),
            expected.collect::<Vec<_>>(),
            "{name}"
        );
        for case in case["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let tokens = tokenizer.tokenize(text).unwrap();
            assert_eq!(tokens, ids(&case["ids"]), "{name}: {text:?}");
            prompts += 1;
            if let Some(converted) = case["converted"].as_str() {
                assert_eq!(
                    tokenizer.expand(text).unwrap(),
                    converted,
                    "{name}: {text:?}"
                );
                let padded = tokenizer.encode(text).unwrap().ids;
                assert_eq!(padded, ids(&case["padded"]), "{name}: {text:?}");
                expanded += usize::from(converted != text);
            } else {
                assert_eq!(tokenizer.expand(text).unwrap(), text, "{name}");
            }
        }
    }
    assert_eq!((folders.as_array().unwrap().len(), prompts), (27, 729));
    assert!(expanded >= 10, "{expanded}");
}
