//! Tokens, their ids and their merges, in a tokenizer's folder.

use std::collections::HashMap;
use std::path::PathBuf;

use diffuse_nn::ModelPath;
use serde_json::Value;
use tokenizers::models::bpe::{Merges, Vocab};

use super::TokenizerError;
use super::folder::{Object, parse_error, read};

/// The vocabulary's file, its tokens with their ids, and its merges.
pub(super) fn read_vocabulary(
    folder: &ModelPath,
    whole: &Object,
) -> Result<(PathBuf, Vocab, Merges), TokenizerError> {
    let vocab = folder.join("vocab.json");
    let merges = folder.join("merges.txt");
    if whole.exists {
        let (vocab, merges) = vocabulary_of(whole)?;
        Ok((whole.path.clone(), vocab, merges))
    } else if vocab.is_file() && merges.is_file() {
        let ids: HashMap<String, u32> = serde_json::from_str(&read(&vocab)?)
            .map_err(|error| parse_error(vocab.path(), error))?;
        let pairs = read_merges(&merges)?;
        Ok((vocab.path().to_path_buf(), ids.into_iter().collect(), pairs))
    } else {
        Err(TokenizerError::NoVocabulary(folder.path().to_path_buf()))
    }
}

/// The model of a `tokenizer.json`.
fn vocabulary_of(whole: &Object) -> Result<(Vocab, Merges), TokenizerError> {
    let no_model = Value::Null;
    let model = whole.get("model").unwrap_or(&no_model);
    if let Some(kind) = model.get("type").filter(|kind| **kind != "BPE") {
        return Err(whole.unsupported("model.type", kind, "`BPE` is supported"));
    }
    let Some(Value::Object(ids)) = model.get("vocab") else {
        return Err(parse_error(
            &whole.path,
            "`model.vocab` is not a dictionary",
        ));
    };
    let vocab = ids.iter().map(|(token, id)| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = number.ok_or_else(|| {
            let key = format!("model.vocab.{token}");
            whole.unsupported(&key, id, "an id is needed")
        })?;
        Ok((token.clone(), id))
    });
    let Some(Value::Array(pairs)) = model.get("merges") else {
        return Err(parse_error(&whole.path, "`model.merges` is not a list"));
    };
    let merges = pairs.iter().enumerate().map(|(index, pair)| {
        let text = pair.as_str().and_then(|pair| pair.split_once(' '));
        let list = || match pair.as_array().map(Vec::as_slice) {
            Some([left, right]) => Some((left.as_str()?, right.as_str()?)),
            _ => None,
        };
        let pair = text.or_else(list).ok_or_else(|| {
            parse_error(
                &whole.path,
                format!("`model.merges[{index}]` is not two tokens"),
            )
        });
        pair.map(|(left, right)| (left.to_string(), right.to_string()))
    });
    Ok((
        vocab.collect::<Result<_, _>>()?,
        merges.collect::<Result<_, _>>()?,
    ))
}

/// Pairs of tokens, the first to be merged first.
fn read_merges(file: &ModelPath) -> Result<Merges, TokenizerError> {
    let text = read(file)?;
    let lines = text.lines().enumerate();
    let pairs = lines.filter(|(_, line)| !line.starts_with("#version"));
    pairs
        .map(|(index, line)| {
            pair(line).ok_or_else(|| {
                parse_error(file.path(), format!("line {} is not two tokens", index + 1))
            })
        })
        .collect()
}

/// The two tokens of a line.
pub(super) fn pair(line: &str) -> Option<(String, String)> {
    let (left, right) = line.split_once(' ')?;
    (!right.contains(' ')).then(|| (left.to_string(), right.to_string()))
}
