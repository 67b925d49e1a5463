//! Text embeddings, as the layers of a UNet attend to them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::ParamId;
use burn::tensor::{Tensor, backend::Backend};

/// Text embeddings, `[batch, text tokens, cross_attention_dim]`, with the keys and values that the
/// layers of cross-attention make of them. These are the same in all steps of a run, so each layer
/// makes them once.
///
/// It belongs to the weights of the layers that it was given to: where they change, make another.
#[derive(Debug)]
pub struct TextContext<B: Backend> {
    embeddings: Tensor<B, 3>,
    /// By the weight that makes the keys.
    keys_and_values: Mutex<HashMap<ParamId, [Tensor<B, 3>; 2]>>,
}

impl<B: Backend> Clone for TextContext<B> {
    fn clone(&self) -> Self {
        Self {
            embeddings: self.embeddings.clone(),
            keys_and_values: Mutex::new(self.made().clone()),
        }
    }
}

impl<B: Backend> From<Tensor<B, 3>> for TextContext<B> {
    fn from(embeddings: Tensor<B, 3>) -> Self {
        Self {
            embeddings,
            keys_and_values: Mutex::default(),
        }
    }
}

impl<B: Backend> TextContext<B> {
    /// The embeddings.
    pub fn embeddings(&self) -> &Tensor<B, 3> {
        &self.embeddings
    }

    fn made(&self) -> MutexGuard<'_, HashMap<ParamId, [Tensor<B, 3>; 2]>> {
        let made = self.keys_and_values.lock();
        made.unwrap_or_else(PoisonError::into_inner)
    }

    /// The keys and values of the layer whose keys this weight makes; `project` makes them of the
    /// embeddings.
    pub(crate) fn keys_and_values(
        &self,
        weight: ParamId,
        project: impl FnOnce(Tensor<B, 3>) -> [Tensor<B, 3>; 2],
    ) -> [Tensor<B, 3>; 2] {
        let made = self.made().get(&weight).cloned();
        // Not while the lock is held: a thread that waits for others may run another network.
        made.unwrap_or_else(|| {
            let made = project(self.embeddings.clone());
            self.made().insert(weight, made.clone());
            made
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_flex::Flex;

    #[test]
    fn each_layer_makes_keys_and_values_once() {
        let embeddings = Tensor::<Flex, 3>::ones([1, 2, 3], &Default::default());
        let context = TextContext::from(embeddings);
        let first = |context: &TextContext<Flex>, layer: u64, factor: f32| {
            let layer = ParamId::from(layer);
            let [keys, values] = context.keys_and_values(layer, |x| [x.clone() * factor, x]);
            assert_eq!(values.into_data(), context.embeddings().to_data());
            keys.slice([0..1, 0..1, 0..1]).into_scalar()
        };
        assert_eq!(first(&context, 1, 2.0), 2.0);
        assert_eq!(first(&context, 2, 3.0), 3.0);
        // Not made again.
        assert_eq!(first(&context, 1, 4.0), 2.0);
        assert_eq!(first(&context.clone(), 2, 4.0), 3.0);
    }
}
