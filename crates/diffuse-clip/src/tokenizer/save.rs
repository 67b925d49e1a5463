//! A tokenizer as a folder that transformers loads.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::Model;

use super::CLIPTokenizer;

impl CLIPTokenizer {
    /// Writes `vocab.json`, `merges.txt`, `tokenizer_config.json`, which lists the added tokens,
    /// and `special_tokens_map.json`. The folder is made if it does not exist.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> io::Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder)?;
        let model = self.tokenizer.get_model();
        model.save(folder, None).map_err(io::Error::other)?;

        let token = |id: u32| self.tokenizer.id_to_token(id).unwrap_or_default();
        let special = json!({
            "bos_token": token(self.start),
            "eos_token": token(self.end),
            "pad_token": token(self.pad),
            "unk_token": token(self.end),
        });
        let added: Map<String, Value> = self
            .added_tokens()
            .into_iter()
            .map(|token| {
                let flags = json!({
                    "content": token.content,
                    "lstrip": token.lstrip,
                    "normalized": token.normalized,
                    "rstrip": token.rstrip,
                    "single_word": token.single_word,
                    "special": token.special,
                });
                (token.id.to_string(), flags)
            })
            .collect();
        let mut config = json!({
            "added_tokens_decoder": added,
            "do_lower_case": true,
            "errors": "replace",
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
        });
        for (key, value) in special.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let write = |name: &str, value: &Value| {
            let text = serde_json::to_string_pretty(value)?;
            fs::write(folder.join(name), text + "\n")
        };
        write("special_tokens_map.json", &special)?;
        write("tokenizer_config.json", &config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_tokenizers_are_loaded_again() {
        let folder = tempfile::tempdir().unwrap();
        let texts = ["a Red fox, été 42!", "", "<fox>'s den"];
        let mut with_word = CLIPTokenizer::stable_diffusion_v1();
        with_word.add_token("<fox>", 3).unwrap();
        let tokenizers = [
            CLIPTokenizer::stable_diffusion_v1(),
            CLIPTokenizer::stable_diffusion_v2(),
            with_word,
        ];
        for (index, tokenizer) in tokenizers.into_iter().enumerate() {
            let folder = folder.path().join(index.to_string());
            tokenizer.save_pretrained(&folder).unwrap();
            let again = CLIPTokenizer::from_pretrained(&folder).unwrap();
            for text in texts {
                let expected = tokenizer.encode(text).unwrap();
                assert_eq!(again.encode(text).unwrap(), expected, "{index}: {text}");
            }
            assert_eq!(again.added_tokens(), tokenizer.added_tokens());
        }
    }
}
