//! A step as a linear combination of known tensors.
//!
//! Solvers that integrate a polynomial through the latest model outputs have the step
//!
//! ```text
//! x_t = a x_s + b_0 m_0 + b_1 m_1 + .. + c z
//! ```
//!
//! with the newest output `m_0` first. `z` is the noise term, or, in a corrector, the model output
//! at the end of the step.

use burn::prelude::*;

use super::tensor::combine;

/// The coefficients of the sample, of the model outputs (newest first), and of `z`.
#[derive(Clone, Debug)]
pub(crate) struct Coefficients {
    pub sample: f32,
    pub outputs: Vec<f32>,
    pub z: Option<f32>,
}

impl Coefficients {
    /// Whether the step has a finite result.
    pub fn all_finite(&self) -> bool {
        let all = self.outputs.iter().chain([&self.sample]).chain(&self.z);
        all.copied().all(f32::is_finite)
    }

    /// Takes the step; all tensors are `[batch, channels, height, width]`.
    pub fn apply<B: Backend>(
        &self,
        sample: Tensor<B, 4>,
        outputs: &[Tensor<B, 4>],
        z: Option<Tensor<B, 4>>,
    ) -> Tensor<B, 4> {
        let outputs = self.outputs.iter().copied().zip(outputs.iter().cloned());
        combine(
            [(self.sample, sample)]
                .into_iter()
                .chain(outputs)
                .chain(self.z.zip(z)),
        )
    }
}

/// Puts the newest output first, and drops those beyond `most`.
pub(crate) fn remember<B: Backend>(
    outputs: &mut Vec<Tensor<B, 4>>,
    newest: Tensor<B, 4>,
    most: usize,
) {
    outputs.insert(0, newest);
    outputs.truncate(most);
}
