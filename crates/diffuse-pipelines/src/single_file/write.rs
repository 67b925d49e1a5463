//! From a pipeline's folder to a single file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{FloatDType, backend::Backend};
use diffuse_clip::{CLIPTextConfig, CLIPTextModel};
use diffuse_nn::checkpoint::{Checkpoint, CheckpointError, parameters};
use diffuse_nn::config::ModelConfig;
use diffuse_nn::pretrained::{Pretrained, PretrainedError};
use diffuse_unet::{UNet2DConditionConfig, UNet2DConditionModel};
use diffuse_vae::{AutoencoderKL, AutoencoderKLConfig};

use super::keys::{self, UNetKeys};
use crate::PipelineError;

/// The weights files of a pipeline's components.
pub(crate) struct ComponentFiles<'a> {
    /// Each the configuration and the weights.
    pub text_encoder: [&'a Path; 2],
    pub unet: [&'a Path; 2],
    pub vae: [&'a Path; 2],
}

/// Writes a single file in the original layout, in type `dtype` or each tensor in its own.
///
/// # Errors
/// If a file cannot be read or written, or weights do not fit their configuration.
pub(crate) fn write_single_file<B: Backend>(
    files: &ComponentFiles<'_>,
    destination: &Path,
    strict: bool,
    dtype: Option<FloatDType>,
) -> Result<(), PipelineError> {
    let unet: UNet2DConditionConfig = read(files.unet[0])?;
    let unet_keys = UNetKeys::new(&unet);
    let mut all = component::<B, UNet2DConditionModel<B>>(&unet, files.unet[1], strict)?
        .rename(|key| Some(format!("model.diffusion_model.{}", unet_keys.original(key))))?;

    let vae: AutoencoderKLConfig = read(files.vae[0])?;
    let levels = vae.block_out_channels.len();
    let weights = component::<B, AutoencoderKL<B>>(&vae, files.vae[1], strict)?;
    let weights = weights.rename(|key| {
        let name = keys::vae_names(key, levels).swap_remove(0);
        Some(format!("first_stage_model.{name}"))
    })?;
    // Attention has 1x1 convolutions there.
    let tensors = weights.tensors().iter().map(|(key, tensor)| {
        let mut tensor = tensor.clone();
        if key.contains(".attn_1.")
            && let [outputs, inputs] = tensor.shape[..]
        {
            tensor = tensor.reshaped(&[outputs, inputs, 1, 1]);
        }
        (key.clone(), tensor)
    });
    all = all.join(weights.with_tensors(tensors.collect()))?;

    let text: CLIPTextConfig = read(files.text_encoder[0])?;
    let weights = component::<B, CLIPTextModel<B>>(&text, files.text_encoder[1], strict)?;
    let is_open_clip = unet.use_linear_projection && text.hidden_size == 1024;
    let weights = if is_open_clip {
        open_clip(weights)?
    } else {
        weights.rename(|key| Some(format!("cond_stage_model.transformer.{key}")))?
    };
    all = all.join(weights)?;
    Ok(all.write_safetensors(destination, dtype)?)
}

fn read<C: ModelConfig>(path: &Path) -> Result<C, PretrainedError> {
    Ok(C::from_file(path)?)
}

/// A component's parameters, and nothing else that its file has.
fn component<B: Backend, M: Pretrained<B>>(
    config: &M::Config,
    path: &Path,
    strict: bool,
) -> Result<Checkpoint, CheckpointError> {
    let checkpoint = Checkpoint::open(path)?.rename(M::current_key)?;
    let parameters = parameters(&M::from_config(config, &B::Device::default()));
    checkpoint.check_surplus(&parameters, strict)?;
    let known: BTreeSet<String> = parameters
        .into_iter()
        .map(|parameter| parameter.key)
        .collect();
    checkpoint.rename(|key| known.contains(key).then(|| key.to_string()))
}

/// The text encoder as OpenCLIP has it: queries, keys and values in one tensor.
fn open_clip(mut weights: Checkpoint) -> Result<Checkpoint, CheckpointError> {
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for key in weights.tensors().keys() {
        // `k_proj` comes before `q_proj` in the order of keys, but not in the tensor.
        groups
            .entry(keys::text_names(key, 2).swap_remove(0).key)
            .or_default()
            .push(key.clone());
    }
    let mut tensors = BTreeMap::new();
    for (name, mut parts) in groups {
        let tensor = match &mut parts[..] {
            [key] => weights.tensors()[key].clone(),
            parts => {
                parts.sort_by_key(|key| keys::open_clip_name(key).part);
                weights.concatenate(parts)?
            }
        };
        tensors.insert(name, tensor);
    }
    Ok(weights.with_tensors(tensors))
}
