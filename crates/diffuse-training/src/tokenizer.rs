//! Trains a tokenizer in CLIP's format: byte pairs with an end-of-word mark, `vocab.json` and
//! `merges.txt`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde_json::{Map, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{Model, Trainer};

const END_OF_WORD: &str = "</w>";

/// Trains `merges` merges on texts, and writes the folder of a tokenizer. Texts have at most
/// `max_length` ids.
///
/// # Errors
/// If a file cannot be written.
pub fn train(texts: &[String], merges: usize, max_length: usize, folder: &Path) -> Result<()> {
    // CLIP's vocabulary begins with all bytes, in the order of their characters, and the same with
    // the end-of-word mark, so that any text can be encoded.
    let bytes = byte_characters();
    let mut vocabulary: Vec<String> = bytes.iter().map(char::to_string).collect();
    vocabulary.extend(bytes.iter().map(|byte| format!("{byte}{END_OF_WORD}")));

    let mut trainer = BpeTrainer::builder()
        .vocab_size(2 * bytes.len() + merges)
        .initial_alphabet(bytes.iter().copied().collect())
        .end_of_word_suffix(END_OF_WORD.into())
        .show_progress(false)
        .build();
    trainer
        .feed(texts.iter(), |text| {
            Ok(text
                .split(|character: char| !character.is_alphanumeric())
                .filter(|word| !word.is_empty())
                .map(str::to_lowercase)
                .collect())
        })
        .map_err(|error| anyhow!("{error}"))?;
    let mut model = BPE::default();
    trainer
        .train(&mut model)
        .map_err(|error| anyhow!("{error}"))?;

    // In the order of training, which is that of their ids.
    let mut learned: Vec<(String, u32)> = model
        .get_vocab()
        .into_iter()
        .filter(|(token, _)| !vocabulary.contains(token))
        .collect();
    learned.sort_by_key(|(_, id)| *id);
    fs::create_dir_all(folder)?;
    let saved = model
        .save(folder, Some("trained"))
        .map_err(|error| anyhow!("{error}"))?;
    let pairs = saved
        .iter()
        .find(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .context("no merges were written")?;
    fs::write(folder.join("merges.txt"), fs::read(pairs)?)?;
    for path in saved {
        fs::remove_file(path)?;
    }

    vocabulary.extend(learned.into_iter().map(|(token, _)| token));
    vocabulary.extend(["<|startoftext|>".into(), "<|endoftext|>".into()]);
    let ids: Map<_, _> = vocabulary
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    fs::write(folder.join("vocab.json"), serde_json::to_string(&ids)?)?;
    let special = |content: &str| {
        json!({
            "content": content,
            "lstrip": false,
            "normalized": true,
            "rstrip": false,
            "single_word": false,
        })
    };
    let map = json!({
        "bos_token": special("<|startoftext|>"),
        "eos_token": special("<|endoftext|>"),
        "pad_token": "<|endoftext|>",
        "unk_token": special("<|endoftext|>"),
    });
    fs::write(
        folder.join("special_tokens_map.json"),
        serde_json::to_string_pretty(&map)? + "\n",
    )?;
    let config = json!({
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "do_lower_case": true,
        "add_prefix_space": false,
        "errors": "replace",
        "bos_token": special("<|startoftext|>"),
        "eos_token": special("<|endoftext|>"),
        "pad_token": "<|endoftext|>",
        "unk_token": special("<|endoftext|>"),
    });
    fs::write(
        folder.join("tokenizer_config.json"),
        serde_json::to_string_pretty(&config)? + "\n",
    )?;
    Ok(())
}

/// The characters of the 256 bytes in vocabularies (Radford et al. 2019): printable bytes are
/// themselves, the others are shifted beyond them.
fn byte_characters() -> Vec<char> {
    let is_printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let printable = (0..256).filter(|byte| is_printable(*byte));
    let shifted = (0..256).filter(|byte| !is_printable(*byte)).count() as u32;
    printable
        .chain(256..256 + shifted)
        .map(|code| char::from_u32(code).expect("characters below 512"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use diffuse_pipelines::clip::CLIPTokenizer;

    #[test]
    fn any_text_is_encoded_and_frequent_words_are_one_token() {
        let folder = tempfile::tempdir().unwrap();
        let texts: Vec<String> = ["a red house at night", "a red house in the snow"]
            .iter()
            .cycle()
            .take(20)
            .map(ToString::to_string)
            .collect();
        train(&texts, 60, 24, folder.path()).unwrap();
        let tokenizer = CLIPTokenizer::from_pretrained(folder.path()).unwrap();
        assert_eq!(tokenizer.max_length(), 24);
        assert_eq!(tokenizer.tokenize("a RED house").unwrap().len(), 3 + 2);
        for text in ["Ärger, naïve: 猫 & 🐈!", "lighthouse"] {
            let ids = tokenizer.tokenize(text).unwrap();
            let middle = &ids[1..ids.len() - 1];
            assert!(!middle.contains(&tokenizer.end_id()), "{text}: {ids:?}");
            assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
        }
    }
}
