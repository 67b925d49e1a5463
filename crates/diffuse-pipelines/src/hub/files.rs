//! Which files of a repository a pipeline needs.

use std::collections::BTreeSet;

use crate::{MODEL_INDEX_NAME, PipelineKind};

/// The paths of a repository's files.
#[derive(Debug, Clone, Default)]
pub struct Listing(BTreeSet<String>);

impl Listing {
    pub fn new(files: impl IntoIterator<Item = String>) -> Self {
        Self(files.into_iter().collect())
    }

    pub fn has(&self, file: &str) -> bool {
        self.0.contains(file)
    }

    /// Where a component's files are: in its own folder or, as in the DDPM repositories, at the root.
    fn prefix(&self, component: &str) -> String {
        let own = format!("{component}/");
        if self.0.iter().any(|file| file.starts_with(&own)) {
            own
        } else {
            String::new()
        }
    }
}

/// The files that a pipeline needs.
#[derive(Debug, PartialEq, Eq)]
pub struct Needed {
    /// Small ones first.
    pub files: Vec<String>,
    /// Files that would be needed too, if the repository had them.
    pub absent: Vec<String>,
}

/// A file that a pipeline needs and a repository does not have.
#[derive(Debug, PartialEq, Eq)]
pub struct Missing {
    pub file: String,
    /// What is there instead.
    pub hint: String,
}

/// The files that a pipeline needs: configurations, the tokenizer's files, and one weights file of the variant a
/// component, safetensors before pickles.
pub fn needed(
    kind: PipelineKind,
    variant: Option<&str>,
    listing: &Listing,
) -> Result<Needed, Missing> {
    let mut files = vec![MODEL_INDEX_NAME.to_string()];
    let mut weights = Vec::new();
    let mut absent = Vec::new();

    let scheduler = listing.prefix("scheduler");
    files.push(format!("{scheduler}scheduler_config.json"));
    for &(component, _) in kind.components() {
        let prefix = listing.prefix(component);
        if component == "tokenizer" {
            let pair = ["vocab.json", "merges.txt"].map(|name| format!("{prefix}{name}"));
            let single = format!("{prefix}tokenizer.json");
            if listing.has(&single) && !pair.iter().all(|file| listing.has(file)) {
                files.push(single);
            } else {
                files.extend(pair);
            }
            for name in ["tokenizer_config.json", "special_tokens_map.json"] {
                let file = format!("{prefix}{name}");
                if listing.has(&file) {
                    files.push(file);
                } else {
                    absent.push(file);
                }
            }
        } else {
            files.push(format!("{prefix}config.json"));
            weights.push(weights_file(&prefix, component, variant, listing)?);
        }
    }
    files.extend(weights);
    match files.iter().find(|file| !listing.has(file)) {
        None => Ok(Needed { files, absent }),
        Some(file) => Err(Missing {
            file: file.clone(),
            hint: String::new(),
        }),
    }
}

fn weights_file(
    prefix: &str,
    component: &str,
    variant: Option<&str>,
    listing: &Listing,
) -> Result<String, Missing> {
    // The stems of `Pretrained::WEIGHTS`, which cannot be asked for without a backend.
    let [safetensors, bin] = match component {
        "text_encoder" => ["model", "pytorch_model"],
        _ => ["diffusion_pytorch_model"; 2],
    };
    let variant = variant.map(|name| format!(".{name}")).unwrap_or_default();
    let names = [
        format!("{prefix}{safetensors}{variant}.safetensors"),
        format!("{prefix}{bin}{variant}.bin"),
    ];
    if let Some(name) = names.iter().find(|name| listing.has(name)) {
        return Ok(name.clone());
    }
    let [wanted, other] = names;
    let stems = [safetensors, bin].map(|stem| format!("{prefix}{stem}"));
    let there: Vec<String> = listing
        .0
        .iter()
        .filter(|file| stems.iter().any(|stem| file.starts_with(stem)))
        .map(|file| format!("`{file}`"))
        .collect();
    let mut hint = format!(", nor `{other}`");
    if !there.is_empty() {
        hint.push_str(&format!("; it has {}", there.join(", ")));
    }
    Err(Missing { file: wanted, hint })
}

#[cfg(test)]
mod tests {
    use super::*;
    use PipelineKind::{StableDiffusion, Unconditional};

    /// A published repository of Stable Diffusion v1, with all that is not needed.
    const STABLE_DIFFUSION: &[&str] = &[
        ".gitattributes",
        "README.md",
        "feature_extractor/preprocessor_config.json",
        "model_index.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "safety_checker/pytorch_model.bin",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.onnx",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/pytorch_model.fp16.bin",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "v1-5-pruned-emaonly.safetensors",
        "v1-5-pruned.ckpt",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ];

    fn listing(files: &[&str]) -> Listing {
        Listing::new(files.iter().map(|file| file.to_string()))
    }

    #[track_caller]
    fn check(kind: PipelineKind, variant: Option<&str>, files: &[&str], weights: &[&str]) {
        let needed = needed(kind, variant, &listing(files)).unwrap();
        let is_weights = |file: &&String| file.ends_with(".safetensors") || file.ends_with(".bin");
        let found: Vec<&String> = needed.files.iter().filter(is_weights).collect();
        assert_eq!(found, weights);
    }

    #[test]
    fn nothing_but_what_is_needed() {
        let needed = needed(StableDiffusion, None, &listing(STABLE_DIFFUSION)).unwrap();
        let expected = [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json",
            "tokenizer/special_tokens_map.json",
            "text_encoder/config.json",
            "unet/config.json",
            "vae/config.json",
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
        ];
        assert_eq!(needed.files, expected);
        assert!(needed.absent.is_empty());
    }

    #[test]
    fn variants_and_pickles() {
        check(
            StableDiffusion,
            Some("fp16"),
            STABLE_DIFFUSION,
            &[
                "text_encoder/model.fp16.safetensors",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "vae/diffusion_pytorch_model.fp16.safetensors",
            ],
        );
        let bin: Vec<&str> = STABLE_DIFFUSION
            .iter()
            .filter(|file| !file.ends_with(".safetensors"))
            .copied()
            .collect();
        check(
            StableDiffusion,
            None,
            &bin,
            &[
                "text_encoder/pytorch_model.bin",
                "unet/diffusion_pytorch_model.bin",
                "vae/diffusion_pytorch_model.bin",
            ],
        );
    }

    #[test]
    fn everything_at_the_root() {
        let files = [
            "config.json",
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.safetensors",
            "model_index.json",
            "scheduler_config.json",
        ];
        check(
            Unconditional,
            None,
            &files,
            &["diffusion_pytorch_model.safetensors"],
        );
        check(
            Unconditional,
            None,
            &files[..2]
                .iter()
                .chain(&files[3..])
                .copied()
                .collect::<Vec<_>>(),
            &["diffusion_pytorch_model.bin"],
        );
    }

    #[test]
    fn what_is_missing_is_named_with_what_is_there() {
        let missing = needed(StableDiffusion, Some("ema"), &listing(STABLE_DIFFUSION)).unwrap_err();
        assert_eq!(missing.file, "text_encoder/model.ema.safetensors");
        assert!(
            missing
                .hint
                .contains("`text_encoder/pytorch_model.ema.bin`"),
            "{}",
            missing.hint
        );
        assert!(
            missing
                .hint
                .contains("`text_encoder/model.fp16.safetensors`"),
            "{}",
            missing.hint
        );
        let missing = needed(
            Unconditional,
            None,
            &listing(&["model_index.json", "diffusion_pytorch_model.bin"]),
        );
        assert_eq!(missing.unwrap_err().file, "scheduler_config.json");
    }

    #[test]
    fn tokenizer_in_one_file() {
        let files: Vec<&str> = STABLE_DIFFUSION
            .iter()
            .filter(|file| !file.starts_with("tokenizer/"))
            .copied()
            .chain(["tokenizer/tokenizer.json"])
            .collect();
        let needed = needed(StableDiffusion, None, &listing(&files)).unwrap();
        assert!(
            needed
                .files
                .contains(&"tokenizer/tokenizer.json".to_string())
        );
        assert_eq!(
            needed.absent,
            [
                "tokenizer/tokenizer_config.json",
                "tokenizer/special_tokens_map.json"
            ]
        );
    }
}
