//! The keys of the original layout (CompVis's `ldm`), made from those of the parameters.
//!
//! A parameter may have gone by several names; the first is the one that is written.

use std::collections::{BTreeMap, BTreeSet};

use diffuse_nn::checkpoint::{Checkpoint, CheckpointError, Parameter};
use diffuse_unet::{ControlNetConfig, PerLevel, UNet2DConditionConfig};

/// Where a parameter's values are in a file.
pub struct Stored {
    /// The tensor's key.
    pub key: String,
    /// The part of the tensor that it is, cut along the first dimension: index and count.
    pub part: Option<(usize, usize)>,
}

impl From<String> for Stored {
    fn from(key: String) -> Self {
        Self { key, part: None }
    }
}

/// The prefixes that a component's keys may have; the first is the one that is written.
const UNET: [&str; 3] = ["model.diffusion_model.", "diffusion_model.", ""];
const CONTROLNET: [&str; 2] = ["control_model.", ""];
const VAE: [&str; 3] = ["first_stage_model.", "vae.", ""];
const TEXT: [&str; 2] = ["cond_stage_model.transformer.", "cond_stage_model."];
/// The prefix of OpenCLIP's text encoder.
const OPEN_CLIP: &str = "cond_stage_model.model.";

/// The prefix of the UNet's keys, if there is one.
pub fn unet_prefix(checkpoint: &Checkpoint) -> Option<&'static str> {
    prefix(checkpoint, &UNET, "input_blocks.0.0.weight")
}

/// The prefix of a ControlNet's keys, if there is one.
pub fn controlnet_prefix(checkpoint: &Checkpoint) -> Option<&'static str> {
    prefix(checkpoint, &CONTROLNET, "input_hint_block.0.weight")
}

/// The prefix of the autoencoder's keys, if there is one.
pub fn vae_prefix(checkpoint: &Checkpoint) -> Option<&'static str> {
    prefix(checkpoint, &VAE, "encoder.down.0.block.0.conv1.weight")
}

fn prefix(checkpoint: &Checkpoint, prefixes: &[&'static str], probe: &str) -> Option<&'static str> {
    let has = |prefix: &&&str| {
        checkpoint
            .tensors()
            .contains_key(&format!("{prefix}{probe}"))
    };
    prefixes.iter().find(has).copied()
}

/// The size of the text embeddings that a network takes.
pub fn text_width(checkpoint: &Checkpoint) -> Option<usize> {
    let mut tensors = checkpoint.tensors().iter();
    tensors.find_map(|(key, tensor)| {
        let is_key = key.ends_with("transformer_blocks.0.attn2.to_k.weight");
        is_key.then(|| tensor.shape.last().copied()).flatten()
    })
}

/// Names of the UNet's parameters.
pub struct UNetKeys {
    /// For each level, the index of its first residual block, counted over all levels.
    down: Vec<usize>,
    up: Vec<usize>,
    /// Whether the levels on the way up have transformers.
    up_attention: Vec<bool>,
}

impl UNetKeys {
    pub fn new(config: &UNet2DConditionConfig) -> Self {
        let levels = config.block_out_channels.len();
        let layers = match &config.layers_per_block {
            PerLevel::Same(layers) => vec![*layers; levels],
            PerLevel::Each(layers) => layers.clone(),
        };
        let starts = |first: usize, layers: &mut dyn Iterator<Item = usize>| {
            let mut next = first;
            let starts = layers.map(|layers| {
                let start = next;
                next += layers + 1;
                start
            });
            starts.collect()
        };
        Self {
            // The first input block is the convolution.
            down: starts(1, &mut layers.iter().copied()),
            up: starts(0, &mut layers.iter().rev().copied()),
            up_attention: config
                .up_block_types
                .iter()
                .map(|block| block.has_attention())
                .collect(),
        }
    }

    /// Today's `down_blocks.0.resnets.1.conv1.weight` is `input_blocks.2.0.in_layers.2.weight`.
    pub fn original(&self, key: &str) -> String {
        let segments: Vec<&str> = key.split('.').collect();
        let index = |position: usize| segments[position].parse::<usize>().unwrap_or(0);
        let rest = |position: usize| segments[position..].join(".");
        match &segments[..] {
            ["time_embedding", "linear_1", ..] => format!("time_embed.0.{}", rest(2)),
            ["time_embedding", "linear_2", ..] => format!("time_embed.2.{}", rest(2)),
            ["conv_in", ..] => format!("input_blocks.0.0.{}", rest(1)),
            ["conv_norm_out", ..] => format!("out.0.{}", rest(1)),
            ["conv_out", ..] => format!("out.2.{}", rest(1)),
            ["down_blocks", _, "resnets", ..] => {
                let block = self.down[index(1)] + index(3);
                format!("input_blocks.{block}.0.{}", resnet(&rest(4)))
            }
            ["down_blocks", _, "attentions", ..] => {
                let block = self.down[index(1)] + index(3);
                format!("input_blocks.{block}.1.{}", rest(4))
            }
            ["down_blocks", _, "downsamplers", _, _, ..] => {
                let block = self.down[index(1) + 1] - 1;
                format!("input_blocks.{block}.0.op.{}", rest(5))
            }
            ["mid_block", "resnets", ..] => {
                let block = 2 * index(2);
                format!("middle_block.{block}.{}", resnet(&rest(3)))
            }
            ["mid_block", "attentions", ..] => format!("middle_block.1.{}", rest(3)),
            ["up_blocks", _, "resnets", ..] => {
                let block = self.up[index(1)] + index(3);
                format!("output_blocks.{block}.0.{}", resnet(&rest(4)))
            }
            ["up_blocks", _, "attentions", ..] => {
                let block = self.up[index(1)] + index(3);
                format!("output_blocks.{block}.1.{}", rest(4))
            }
            ["up_blocks", _, "upsamplers", _, _, ..] => {
                let block = self.up[index(1) + 1] - 1;
                let place = if self.up_attention[index(1)] { 2 } else { 1 };
                format!("output_blocks.{block}.{place}.conv.{}", rest(5))
            }
            _ => key.to_string(),
        }
    }
}

/// The name of a ControlNet's parameter; `unet` names those of its encoder.
pub fn controlnet_name(key: &str, unet: &UNetKeys, config: &ControlNetConfig) -> String {
    let segments: Vec<&str> = key.split('.').collect();
    let index = |position: usize| segments[position].parse::<usize>().unwrap_or(0);
    let rest = |position: usize| segments[position..].join(".");
    // An activation function follows each convolution.
    let blocks = 2 * (config.conditioning_embedding_out_channels.len() - 1);
    match &segments[..] {
        ["controlnet_cond_embedding", "conv_in", ..] => format!("input_hint_block.0.{}", rest(2)),
        ["controlnet_cond_embedding", "blocks", _, ..] => {
            format!("input_hint_block.{}.{}", 2 * (index(2) + 1), rest(3))
        }
        ["controlnet_cond_embedding", "conv_out", ..] => {
            format!("input_hint_block.{}.{}", 2 * (blocks + 1), rest(2))
        }
        ["controlnet_down_blocks", _, ..] => format!("zero_convs.{}.0.{}", index(1), rest(2)),
        ["controlnet_mid_block", ..] => format!("middle_block_out.0.{}", rest(1)),
        _ => unet.original(key),
    }
}

/// The layers of a UNet's residual block.
fn resnet(key: &str) -> String {
    replace_first_segment(
        key,
        &[
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ],
    )
}

fn replace_first_segment(key: &str, names: &[(&str, &str)]) -> String {
    for (ours, theirs) in names {
        let rest = key.strip_prefix(ours);
        if let Some(rest) = rest.filter(|rest| rest.starts_with('.')) {
            return format!("{theirs}{rest}");
        }
    }
    key.to_string()
}

/// An autoencoder's parameter in the original layout; then, for attention, under the names that
/// Diffusers gave it later.
pub fn vae_names(key: &str, levels: usize) -> Vec<String> {
    let segments: Vec<&str> = key.split('.').collect();
    let rest = |position: usize| segments[position..].join(".");
    let index = |position: usize| segments[position].parse::<usize>().unwrap_or(0);
    let block = |key: &str| replace_first_segment(key, &[("conv_shortcut", "nin_shortcut")]);
    let name = match &segments[..] {
        [part, "conv_norm_out", ..] => format!("{part}.norm_out.{}", rest(2)),
        [part, "mid_block", "resnets", ..] => {
            format!("{part}.mid.block_{}.{}", index(3) + 1, block(&rest(4)))
        }
        [part, "mid_block", "attentions", ..] => {
            let names = [
                ("group_norm", "norm"),
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "proj_out"),
            ];
            return vec![
                format!(
                    "{part}.mid.attn_1.{}",
                    replace_first_segment(&rest(4), &names)
                ),
                format!("{part}.mid.attn_1.{}", rest(4)),
            ];
        }
        ["encoder", "down_blocks", level, "resnets", layer, ..] => {
            format!("encoder.down.{level}.block.{layer}.{}", block(&rest(5)))
        }
        ["encoder", "down_blocks", level, "downsamplers", _, _, ..] => {
            format!("encoder.down.{level}.downsample.conv.{}", rest(6))
        }
        ["decoder", "up_blocks", _, "resnets", layer, ..] => {
            let level = levels - 1 - index(2);
            format!("decoder.up.{level}.block.{layer}.{}", block(&rest(5)))
        }
        ["decoder", "up_blocks", _, "upsamplers", _, _, ..] => {
            let level = levels - 1 - index(2);
            format!("decoder.up.{level}.upsample.conv.{}", rest(6))
        }
        _ => key.to_string(),
    };
    vec![name]
}

/// A parameter of CLIP's text encoder as OpenCLIP calls it; projections of queries, keys and values
/// are one tensor there.
pub fn open_clip_name(key: &str) -> Stored {
    let key = key.strip_prefix("text_model.").unwrap_or(key);
    let Some(layer) = key.strip_prefix("encoder.layers.") else {
        return replace_first_segment(
            key,
            &[
                ("embeddings.token_embedding", "token_embedding"),
                ("embeddings.position_embedding", "positional_embedding"),
                ("final_layer_norm", "ln_final"),
            ],
        )
        .replace("positional_embedding.weight", "positional_embedding")
        .into();
    };
    let (layer, rest) = layer.split_once('.').unwrap_or((layer, ""));
    for (part, projection) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
        let rest = rest.strip_prefix(&format!("self_attn.{projection}."));
        if let Some(kind) = rest {
            return Stored {
                key: format!("transformer.resblocks.{layer}.attn.in_proj_{kind}"),
                part: Some((part, 3)),
            };
        }
    }
    let names = [
        ("self_attn.out_proj", "attn.out_proj"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ];
    let rest = replace_first_segment(rest, &names);
    format!("transformer.resblocks.{layer}.{rest}").into()
}

/// Names of a text encoder's parameter.
pub fn text_names(key: &str, version: u8) -> Vec<Stored> {
    if version == 2 {
        let Stored { key, part } = open_clip_name(key);
        let key = format!("{OPEN_CLIP}{key}");
        return vec![Stored { key, part }];
    }
    let short = key.strip_prefix("text_model.").unwrap_or(key);
    let names = TEXT
        .iter()
        .flat_map(|prefix| [format!("{prefix}{key}"), format!("{prefix}{short}")]);
    names.map(Stored::from).collect()
}

/// The key of a UNet's averaged weights: without dots, below `model.`.
pub fn ema_key(key: &str) -> String {
    let key = key.strip_prefix("model.").unwrap_or(key);
    format!("model_ema.{}", key.replace('.', ""))
}

/// The tensors of a component under today's keys, found by the first name that the file has.
///
/// # Errors
/// If a parameter has none of its names in the file.
pub fn view(
    checkpoint: &Checkpoint,
    parameters: &[Parameter],
    names: impl Fn(&str) -> Vec<Stored>,
    used: &mut BTreeSet<String>,
) -> Result<Checkpoint, CheckpointError> {
    let mut found = BTreeMap::new();
    let mut missing = Vec::new();
    for Parameter { key, shape } in parameters {
        let names = names(key);
        let stored = names
            .iter()
            .find(|name| checkpoint.tensors().contains_key(&name.key));
        let Some(stored) = stored else {
            missing.push(
                names
                    .into_iter()
                    .next()
                    .map_or_else(|| key.clone(), |name| name.key),
            );
            continue;
        };
        used.insert(stored.key.clone());
        let mut tensor = checkpoint.tensors()[&stored.key].clone();
        if let Some((index, count)) = stored.part
            && tensor
                .shape
                .first()
                .is_some_and(|rows| rows.is_multiple_of(count))
        {
            tensor = tensor.part(index, count);
        }
        // 1x1 convolutions and linear layers, where the other is written.
        let trimmed = |shape: &[usize]| {
            let end = shape
                .iter()
                .rposition(|size| *size != 1)
                .map_or(0, |last| last + 1);
            shape[..end].to_vec()
        };
        if tensor.shape != *shape && trimmed(&tensor.shape) == trimmed(shape) {
            tensor = tensor.reshaped(shape);
        }
        found.insert(key.clone(), tensor);
    }
    if missing.is_empty() {
        Ok(checkpoint.with_tensors(found))
    } else {
        let path = checkpoint.path().to_path_buf();
        Err(CheckpointError::Missing {
            path,
            keys: missing,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stable_diffusion() -> UNetKeys {
        UNetKeys::new(&super::super::configs::unet(
            &super::super::StableDiffusionFile {
                version: 1,
                inpainting: false,
            },
        ))
    }

    #[test]
    fn unet_keys() {
        let keys = stable_diffusion();
        let check = |ours: &str, theirs: &str| assert_eq!(keys.original(ours), theirs);
        check("conv_in.bias", "input_blocks.0.0.bias");
        check("time_embedding.linear_2.weight", "time_embed.2.weight");
        check(
            "down_blocks.0.resnets.1.norm2.bias",
            "input_blocks.2.0.out_layers.0.bias",
        );
        check(
            "down_blocks.0.downsamplers.0.conv.weight",
            "input_blocks.3.0.op.weight",
        );
        check(
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight",
            "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        );
        check(
            "down_blocks.3.resnets.1.conv1.weight",
            "input_blocks.11.0.in_layers.2.weight",
        );
        check(
            "mid_block.resnets.1.time_emb_proj.bias",
            "middle_block.2.emb_layers.1.bias",
        );
        check(
            "mid_block.attentions.0.proj_in.weight",
            "middle_block.1.proj_in.weight",
        );
        check(
            "up_blocks.0.upsamplers.0.conv.weight",
            "output_blocks.2.1.conv.weight",
        );
        check(
            "up_blocks.1.resnets.2.conv_shortcut.bias",
            "output_blocks.5.0.skip_connection.bias",
        );
        check(
            "up_blocks.1.upsamplers.0.conv.bias",
            "output_blocks.5.2.conv.bias",
        );
        check(
            "up_blocks.3.attentions.2.norm.weight",
            "output_blocks.11.1.norm.weight",
        );
        check("conv_norm_out.weight", "out.0.weight");
    }

    #[test]
    fn vae_keys() {
        let check = |ours: &str, theirs: &[&str]| assert_eq!(vae_names(ours, 4), theirs);
        check(
            "decoder.up_blocks.0.resnets.2.conv1.weight",
            &["decoder.up.3.block.2.conv1.weight"],
        );
        check(
            "decoder.up_blocks.2.resnets.0.conv_shortcut.bias",
            &["decoder.up.1.block.0.nin_shortcut.bias"],
        );
        check(
            "encoder.down_blocks.1.downsamplers.0.conv.bias",
            &["encoder.down.1.downsample.conv.bias"],
        );
        check(
            "encoder.mid_block.resnets.1.norm1.bias",
            &["encoder.mid.block_2.norm1.bias"],
        );
        check("quant_conv.weight", &["quant_conv.weight"]);
        check(
            "decoder.mid_block.attentions.0.to_out.0.weight",
            &[
                "decoder.mid.attn_1.proj_out.weight",
                "decoder.mid.attn_1.to_out.0.weight",
            ],
        );
    }

    #[test]
    fn open_clip_keys() {
        let check = |ours: &str, theirs: &str, part| {
            let stored = open_clip_name(ours);
            assert_eq!((stored.key.as_str(), stored.part), (theirs, part));
        };
        check(
            "text_model.embeddings.position_embedding.weight",
            "positional_embedding",
            None,
        );
        check("text_model.final_layer_norm.bias", "ln_final.bias", None);
        check(
            "text_model.encoder.layers.3.self_attn.v_proj.bias",
            "transformer.resblocks.3.attn.in_proj_bias",
            Some((2, 3)),
        );
        check(
            "text_model.encoder.layers.3.mlp.fc1.weight",
            "transformer.resblocks.3.mlp.c_fc.weight",
            None,
        );
    }

    #[test]
    fn averaged_weights() {
        assert_eq!(
            ema_key("model.diffusion_model.input_blocks.0.0.weight"),
            "model_ema.diffusion_modelinput_blocks00weight",
        );
    }
}
