//! Checkpoints by their names on the Hugging Face hub.
//!
//! [`PipelineFiles`] says which files a pipeline needs; [`diffuse_hub`], re-exported here, has the
//! rest: the cache and the transfers.
//!
//! ```no_run
//! use diffuse_pipelines::hub::{FetchOptions, PipelineFiles, resolve};
//!
//! let wanted = PipelineFiles {
//!     variant: Some("fp16".into()),
//!     ..PipelineFiles::default()
//! };
//! let options = FetchOptions::from_env();
//! let folder = resolve("CompVis/stable-diffusion-v1-4", &wanted, &options)?;
//! assert!(folder.join("model_index.json").is_file());
//! # Ok::<(), diffuse_pipelines::hub::HubError>(())
//! ```

pub use diffuse_hub::*;

use std::path::Path;

use diffuse_nn::config::ModelConfig;
use diffuse_unet::ControlNetConfig;

use crate::clip_image_processor::PREPROCESSOR_CONFIG_NAME;
use crate::components::weights_stems;
use crate::safety_checker::SafetyCheckerConfig;
use crate::{MODEL_INDEX_NAME, ModelIndex, PipelineError, PipelineKind};

/// The files that a pipeline needs: `model_index.json`, which names the components; of each
/// component the configuration and one weights file; and the tokenizer's files.
#[derive(Debug, Clone, Default)]
pub struct PipelineFiles {
    /// The pipeline; the one that the repository's index names by default.
    pub pipeline: Option<PipelineKind>,
    /// Variant of the weights: `fp16` is `*.fp16.safetensors`.
    pub variant: Option<String>,
    /// Leaves out the safety checker of a Stable Diffusion: 1.2 GB of version 1.
    pub no_safety_checker: bool,
}

impl Wanted for PipelineFiles {
    fn first(&self) -> Option<&str> {
        Some(MODEL_INDEX_NAME)
    }

    fn select(&self, folder: &Path, listing: &Listing) -> Result<Selection, Refusal> {
        let unfit = |error: PipelineError| Refusal::Unfit(error.into());
        let index = ModelIndex::read(folder).map_err(unfit)?;
        let kind = match self.pipeline {
            Some(kind) => kind,
            None => PipelineKind::require_of(&index).map_err(unfit)?,
        };
        kind.check(&index).map_err(unfit)?;
        let safety_checker = kind == PipelineKind::StableDiffusion
            && !self.no_safety_checker
            && index.has_safety_checker().map_err(unfit)?;
        needed(kind, self.variant.as_deref(), safety_checker, listing)
    }
}

/// The files of a single model, such as a ControlNet: `config.json` and one weights file.
#[derive(Debug, Clone, Default)]
pub struct ModelFiles {
    /// Variant of the weights: `fp16` is `*.fp16.safetensors`.
    pub variant: Option<String>,
}

impl Wanted for ModelFiles {
    fn first(&self) -> Option<&str> {
        None
    }

    fn select(&self, _: &Path, listing: &Listing) -> Result<Selection, Refusal> {
        let config = "config.json".to_string();
        if !listing.has(&config) {
            return Err(Refusal::missing(&config));
        }
        let stems = ControlNetConfig::WEIGHTS;
        let weights = weights_files("", stems, self.variant.as_deref(), listing)?;
        Ok(Selection {
            files: [config].into_iter().chain(weights).collect(),
            absent: Vec::new(),
        })
    }
}

/// Configurations, the tokenizer's files and the weights of each component, safetensors before
/// pickles. Small ones first.
fn needed(
    kind: PipelineKind,
    variant: Option<&str>,
    safety_checker: bool,
    listing: &Listing,
) -> Result<Selection, Refusal> {
    let mut files = vec![MODEL_INDEX_NAME.to_string()];
    let mut weights = Vec::new();
    let mut absent = Vec::new();

    let scheduler = prefix(listing, "scheduler");
    files.push(format!("{scheduler}scheduler_config.json"));
    for &(component, classes) in kind.components() {
        let prefix = prefix(listing, component);
        if component == "tokenizer" {
            let pair = ["vocab.json", "merges.txt"].map(|name| format!("{prefix}{name}"));
            let single = format!("{prefix}tokenizer.json");
            if pair.iter().all(|file| listing.has(file)) || !listing.has(&single) {
                files.extend(pair);
            }
            for name in [
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "added_tokens.json",
            ] {
                let file = format!("{prefix}{name}");
                if listing.has(&file) {
                    files.push(file);
                } else {
                    absent.push(file);
                }
            }
        } else {
            files.push(format!("{prefix}config.json"));
            let stems = weights_stems(classes[0]).expect("a class of models");
            weights.push((prefix, stems));
        }
    }
    if safety_checker {
        // A repository may lack what its index names: then images are not checked.
        let config = "safety_checker/config.json".to_string();
        if listing.has(&config) {
            let preprocessor = format!("feature_extractor/{PREPROCESSOR_CONFIG_NAME}");
            files.extend([config, preprocessor]);
            weights.push(("safety_checker/".to_string(), SafetyCheckerConfig::WEIGHTS));
        } else {
            absent.push(config);
        }
    }
    // As Diffusers does: plain weights of a component without the variant, if another has it.
    let find = |(prefix, stems): &(String, _), variant| {
        weights_files(prefix, *stems, variant, listing).map_err(|missing| (variant, missing))
    };
    let is_known = weights
        .iter()
        .any(|component| find(component, variant).is_ok());
    for component in &weights {
        let found = find(component, variant).or_else(|error| match variant {
            Some(_) if is_known => find(component, None),
            _ => Err(error),
        });
        files.extend(found.map_err(|(_, missing)| missing)?);
    }
    match files.iter().find(|file| !listing.has(file)) {
        None => Ok(Selection { files, absent }),
        Some(file) => Err(Refusal::missing(file)),
    }
}

/// Where a component's files are: in its own folder or, as in the DDPM repositories, at the root.
fn prefix(listing: &Listing, component: &str) -> String {
    let own = format!("{component}/");
    if listing.iter().any(|file| file.starts_with(&own)) {
        own
    } else {
        String::new()
    }
}

/// A component's weights: one file, or an index and its shards.
fn weights_files(
    prefix: &str,
    [safetensors, bin]: [&str; 2],
    variant: Option<&str>,
    listing: &Listing,
) -> Result<Vec<String>, Refusal> {
    let dotted = variant.map(|name| format!(".{name}")).unwrap_or_default();
    let formats = [(safetensors, "safetensors"), (bin, "bin")];
    for (stem, extension) in formats {
        let whole = format!("{prefix}{stem}{dotted}.{extension}");
        if listing.has(&whole) {
            return Ok(vec![whole]);
        }
        let index = format!("{prefix}{stem}.{extension}.index{dotted}.json");
        if listing.has(&index) {
            // `model.fp16-00001-of-00002.safetensors` or `model-00001-of-00002.fp16.safetensors`
            let is_shard = |file: &&str| {
                let rest = file.strip_prefix(&format!("{prefix}{stem}"));
                let rest = rest.and_then(|rest| rest.strip_suffix(&format!(".{extension}")));
                rest.is_some_and(|rest| {
                    let number = match variant {
                        Some(_) => rest
                            .strip_prefix(&dotted)
                            .or_else(|| rest.strip_suffix(&dotted)),
                        None => Some(rest),
                    };
                    let parts = number.and_then(|number| number.strip_prefix('-'));
                    let parts = parts.and_then(|parts| parts.split_once("-of-"));
                    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
                    parts.is_some_and(|(part, count)| is_number(part) && is_number(count))
                })
            };
            let shards = listing.iter().filter(is_shard).map(String::from);
            return Ok([index].into_iter().chain(shards).collect());
        }
    }
    let [wanted, other] =
        formats.map(|(stem, extension)| format!("{prefix}{stem}{dotted}.{extension}"));
    let stems = [safetensors, bin].map(|stem| format!("{prefix}{stem}"));
    let there: Vec<String> = listing
        .iter()
        .filter(|file| stems.iter().any(|stem| file.starts_with(stem)))
        .map(|file| format!("`{file}`"))
        .collect();
    let mut hint = format!(", nor `{other}`");
    if !there.is_empty() {
        hint.push_str(&format!("; it has {}", there.join(", ")));
    }
    Err(Refusal::Missing { file: wanted, hint })
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
        files.iter().map(|file| file.to_string()).collect()
    }

    #[track_caller]
    fn check(kind: PipelineKind, variant: Option<&str>, files: &[&str], weights: &[&str]) {
        let needed = needed(kind, variant, false, &listing(files)).unwrap();
        let is_weights = |file: &&String| file.ends_with(".safetensors") || file.ends_with(".bin");
        let found: Vec<&String> = needed.files.iter().filter(is_weights).collect();
        assert_eq!(found, weights);
    }

    #[test]
    fn nothing_but_what_is_needed() {
        let needed = needed(StableDiffusion, None, true, &listing(STABLE_DIFFUSION)).unwrap();
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
            "safety_checker/config.json",
            "feature_extractor/preprocessor_config.json",
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "safety_checker/model.safetensors",
        ];
        assert_eq!(needed.files, expected);
        let absent = ["tokenizer/tokenizer.json", "tokenizer/added_tokens.json"];
        assert_eq!(needed.absent, absent);
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
    fn shards_and_variants_of_some_components() {
        let files = [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/merges.txt",
            "tokenizer/vocab.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
            "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.bin",
        ];
        check(
            StableDiffusion,
            Some("fp16"),
            &files,
            &[
                "text_encoder/model.safetensors",
                "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
                "vae/diffusion_pytorch_model.bin",
            ],
        );
        check(
            StableDiffusion,
            None,
            &files,
            &[
                "text_encoder/model.safetensors",
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
                "vae/diffusion_pytorch_model.bin",
            ],
        );
        let needed = needed(StableDiffusion, None, true, &listing(&files)).unwrap();
        let index = "unet/diffusion_pytorch_model.safetensors.index.json".to_string();
        assert!(needed.files.contains(&index));
    }

    #[test]
    fn a_safety_checker_that_is_not_wanted_or_missing() {
        let files = |safety_checker, files: &[&str]| {
            needed(StableDiffusion, None, safety_checker, &listing(files)).unwrap()
        };
        let is_its = |file: &&str| file.starts_with("safety_checker");
        let has_it = |selection: &Selection| {
            let mut files = selection.files.iter().map(String::as_str);
            files.any(|file| is_its(&file))
        };
        assert!(has_it(&files(true, STABLE_DIFFUSION)));
        assert!(!has_it(&files(false, STABLE_DIFFUSION)));
        let others = STABLE_DIFFUSION.iter().copied();
        let others: Vec<&str> = others.filter(|file| !is_its(file)).collect();
        let without = files(true, &others);
        assert!(!has_it(&without));
        assert!(
            without
                .absent
                .contains(&"safety_checker/config.json".into())
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

    #[track_caller]
    fn check_missing(
        kind: PipelineKind,
        variant: Option<&str>,
        files: &[&str],
        expected: &str,
        expected_hint: &str,
    ) {
        match needed(kind, variant, true, &listing(files)) {
            Err(Refusal::Missing { file, hint }) => {
                assert_eq!((file.as_str(), hint.as_str()), (expected, expected_hint));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_missing_is_named_with_what_is_there() {
        check_missing(
            StableDiffusion,
            Some("ema"),
            STABLE_DIFFUSION,
            "text_encoder/model.ema.safetensors",
            ", nor `text_encoder/pytorch_model.ema.bin`; it has \
             `text_encoder/model.fp16.safetensors`, `text_encoder/model.onnx`, \
             `text_encoder/model.safetensors`, `text_encoder/pytorch_model.bin`, \
             `text_encoder/pytorch_model.fp16.bin`",
        );
        check_missing(
            Unconditional,
            None,
            &["model_index.json", "diffusion_pytorch_model.bin"],
            "scheduler_config.json",
            "",
        );
    }

    #[test]
    fn tokenizer_in_one_file() {
        let files: Vec<&str> = STABLE_DIFFUSION
            .iter()
            .filter(|file| !file.starts_with("tokenizer/"))
            .copied()
            .chain(["tokenizer/tokenizer.json"])
            .collect();
        let needed = needed(StableDiffusion, None, true, &listing(&files)).unwrap();
        assert!(
            needed
                .files
                .contains(&"tokenizer/tokenizer.json".to_string())
        );
        assert_eq!(
            needed.absent,
            [
                "tokenizer/tokenizer_config.json",
                "tokenizer/special_tokens_map.json",
                "tokenizer/added_tokens.json",
            ]
        );
    }
}
