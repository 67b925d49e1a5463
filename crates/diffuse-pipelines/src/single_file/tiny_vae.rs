//! TAESD in files without a configuration: Diffusers' weights file, or one of the two original
//! files, `taesd_encoder` and `taesd_decoder`, with the other beside it.

use std::path::Path;

use diffuse_nn::checkpoint::Checkpoint;
use diffuse_vae::AutoencoderTinyConfig;

use crate::PipelineError;

/// The tensors of a TAESD under Diffusers' keys.
///
/// # Errors
/// If the file is one half and the other is not beside it, or is damaged.
pub fn with_both_halves(path: &Path, checkpoint: Checkpoint) -> Result<Checkpoint, PipelineError> {
    let tensors = checkpoint.tensors();
    let parts = ["encoder.layers.", "decoder.layers."];
    let is_whole = |key: &String| parts.iter().any(|part| key.starts_with(part));
    if tensors.keys().any(is_whole) {
        return Ok(checkpoint);
    }
    // The decoder's first layer limits the latents, and has no weights.
    let is_encoder = tensors.contains_key("0.weight");
    let (own, other) = match is_encoder {
        true => ("encoder", "decoder"),
        false => ("decoder", "encoder"),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(name.replace(own, other));
    if !name.contains(own) || !beside.is_file() {
        return Err(PipelineError::Options(format!(
            "`{}` is the {own} of a TAESD: it has to be called `taesd_{own}`, with \
             `taesd_{other}` beside it",
            path.display()
        )));
    }
    let beside = Checkpoint::open(beside)?;
    let (encoder, decoder) = match is_encoder {
        true => (checkpoint, beside),
        false => (beside, checkpoint),
    };
    let encoder = encoder.rename(|key| Some(format!("encoder.layers.{key}")))?;
    let decoder = decoder.rename(|key| {
        let (index, rest) = key.split_once('.')?;
        let index = index.parse::<usize>().ok()?.checked_sub(1)?;
        Some(format!("decoder.layers.{index}.{rest}"))
    })?;
    Ok(encoder.join(decoder)?)
}

/// The configuration that tensors under Diffusers' keys were made from.
pub fn config(checkpoint: &Checkpoint) -> AutoencoderTinyConfig {
    let tensors = checkpoint.tensors();
    let size = |key: &str, dim: usize| tensors.get(key)?.shape.get(dim).copied();
    // A convolution without a bias changes the resolution.
    let blocks = |part: &str| {
        let mut blocks = vec![0];
        let has = |index: usize, name: &str| {
            tensors.contains_key(&format!("{part}.layers.{index}.{name}"))
        };
        for index in 0..tensors.len() {
            if has(index, "conv.0.weight") {
                *blocks.last_mut().expect("there are levels") += 1;
            } else if has(index, "weight") && !has(index, "bias") {
                blocks.push(0);
            }
        }
        blocks
    };
    let (encoder, decoder) = (blocks("encoder"), blocks("decoder"));
    // A layer for the input, its activation, and two for each change of the resolution.
    let last = 2 + decoder.iter().sum::<usize>() + 2 * (decoder.len() - 1);
    let default = AutoencoderTinyConfig::default();
    let channels = |part: &str, levels: usize| {
        let channels = size(&format!("{part}.layers.0.weight"), 0);
        vec![channels.unwrap_or(64); levels]
    };
    AutoencoderTinyConfig {
        in_channels: size("encoder.layers.0.weight", 1).unwrap_or(default.in_channels),
        out_channels: size(&format!("decoder.layers.{last}.weight"), 0)
            .unwrap_or(default.out_channels),
        latent_channels: size("decoder.layers.0.weight", 1).unwrap_or(default.latent_channels),
        encoder_block_out_channels: channels("encoder", encoder.len()),
        decoder_block_out_channels: channels("decoder", decoder.len()),
        num_encoder_blocks: encoder,
        num_decoder_blocks: decoder,
        ..default
    }
}
