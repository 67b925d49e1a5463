//! Adapters of a pipeline's weights: LoRA and its relatives.

use std::collections::BTreeSet;
use std::mem;

use burn::tensor::backend::Backend;
use diffuse_nn::checkpoint::{Checkpoint, CheckpointError, parameters};
use diffuse_unet::Pretrained;

use super::StableDiffusionPipeline;
use super::parts::ChangedWeights;
use crate::PipelineError;
use crate::adapters::{Adapted, AdaptedComponent, Adapter, AdapterError, adapt};
use crate::single_file::UNetKeys;

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Has these adapters, and no others, change the weights of text encoder and UNet. Weights that
    /// change, or changed before, are read from their files again, one at a time; without adapters
    /// all are as they were loaded, to the bit. Several adapters act in their order, and their sum
    /// is rounded once.
    ///
    /// # Errors
    /// If an adapter is for another model, a file cannot be read, or the pipeline was put together
    /// from parts.
    pub fn set_adapters(&mut self, adapters: &[Adapter]) -> Result<(), PipelineError> {
        let files = self.weights.as_mut().ok_or(AdapterError::NoWeights)?;
        let mut text_weights = files.text_encoder.clone();
        let mut unet_weights = files.unet.clone();
        let unet_keys = UNetKeys::new(self.unet.config());
        let original = |key: &str| unet_keys.original(key);
        let text = Adapted {
            component: AdaptedComponent::TextEncoder,
            weights: &mut text_weights,
            original: None,
        };
        let unet = Adapted {
            component: AdaptedComponent::Unet,
            weights: &mut unet_weights,
            original: Some(&original),
        };
        let [text_changes, unet_changes] = adapt(adapters, [text, unet])?;

        let device = self.unet.conv_in.weight.device();
        let text_keys = &text_changes | &files.changed.text_encoder;
        let unet_keys = &unet_changes | &files.changed.unet;
        if !fits(&text_weights, &self.text_encoder, &text_keys)
            || !fits(&unet_weights, &self.unet, &unet_keys)
        {
            return Err(AdapterError::NoWeights.into());
        }
        let config = self.text_encoder.config().clone();
        let text = mem::replace(
            &mut self.text_encoder,
            Pretrained::from_config(&config, &device),
        );
        let text_result;
        (self.text_encoder, text_result) = text_weights.update(text, &text_keys);
        let config = self.unet.config().clone();
        let unet = mem::replace(&mut self.unet, Pretrained::from_config(&config, &device));
        let unet_result;
        (self.unet, unet_result) = unet_weights.update(unet, &unet_keys);
        let result: Result<(), CheckpointError> = text_result.and(unet_result);
        files.changed = match &result {
            Ok(()) => ChangedWeights {
                text_encoder: text_changes,
                unet: unet_changes,
            },
            // Some are changed now, and some still are.
            Err(_) => ChangedWeights {
                text_encoder: text_keys,
                unet: unet_keys,
            },
        };
        Ok(result?)
    }
}

/// Whether a module's parameters of these keys have the shapes of the checkpoint's tensors. Its
/// parts may have been replaced.
fn fits<B: Backend, M: Pretrained<B>>(
    weights: &Checkpoint,
    module: &M,
    keys: &BTreeSet<String>,
) -> bool {
    let parameters = parameters(module);
    let found = parameters.iter().filter(|parameter| {
        let tensor = weights.tensors().get(&parameter.key);
        keys.contains(&parameter.key)
            && tensor.is_some_and(|tensor| tensor.shape == parameter.shape)
    });
    found.count() == keys.len()
}
