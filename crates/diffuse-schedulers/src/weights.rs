//! A step as a weighted sum of what is known.
//!
//! Solvers that integrate a polynomial through the model's latest answers, by whatever rule they choose it, take steps
//!
//! ```text
//! x_t = a x_s + b_0 m_0 + b_1 m_1 + .. + c z
//! ```
//!
//! with the newest answer `m_0` first. `z` is what comes on top: noise, or the answer at the end of the step.

use burn::prelude::*;

use crate::tensor::combine;

/// The factors of the sample, of the model's answers (newest first), and of what comes on top.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    pub sample: f32,
    pub outputs: Vec<f32>,
    pub extra: Option<f32>,
}

impl Weights {
    /// Whether the step has a result.
    pub fn all_finite(&self) -> bool {
        let factors = self.outputs.iter().chain([&self.sample]).chain(&self.extra);
        factors.copied().all(f32::is_finite)
    }

    /// Takes the step; all tensors are `[batch, channels, height, width]`.
    pub fn apply<B: Backend>(
        &self,
        sample: Tensor<B, 4>,
        outputs: &[Tensor<B, 4>],
        extra: Option<Tensor<B, 4>>,
    ) -> Tensor<B, 4> {
        let outputs = self.outputs.iter().copied().zip(outputs.iter().cloned());
        combine(
            [(self.sample, sample)]
                .into_iter()
                .chain(outputs)
                .chain(self.extra.zip(extra)),
        )
    }
}

/// Puts the newest answer first and forgets those beyond `most`.
pub(crate) fn remember<B: Backend>(
    outputs: &mut Vec<Tensor<B, 4>>,
    newest: Tensor<B, 4>,
    most: usize,
) {
    outputs.insert(0, newest);
    outputs.truncate(most);
}
