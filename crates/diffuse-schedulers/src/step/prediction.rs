//! Prediction types, and how image and noise are computed from them.
//!
//! With a sample `x = α x0 + σ ε`, a model was trained to predict `ε`, `x0`, or the velocity
//! `v = α ε - σ x0` of "Progressive Distillation" (<https://arxiv.org/abs/2202.00512>, appendix D).
//! Any of the three gives the others:
//!
//! ```text
//!            x0                ε
//! epsilon    (x - σ ε) / α     ε
//! sample     x0                (x - α x0) / σ
//! v          α x - σ v         α v + σ x
//! ```

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use super::alpha_sigma::AlphaSigma;
use super::clipping::Clipping;
use super::tensor::combine;
use crate::{SchedulerError, Step, VarianceType};

/// The meaning of the model output (the key `prediction_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PredictionType {
    /// The noise in the sample.
    Epsilon,
    /// The image without noise.
    #[serde(alias = "original_sample")]
    Sample,
    /// The velocity, a combination of both.
    VPrediction,
}

impl PredictionType {
    /// An error for models that predict the image, in samplers that need the noise.
    pub(crate) fn require_noise(self, class: &'static str) -> Result<(), SchedulerError> {
        let supported = &[Self::Epsilon, Self::VPrediction];
        crate::config::require(class, "prediction_type", &self, supported)
    }
}

/// The kinds of prediction that a solver integrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Integrand {
    /// `x0`
    Data,
    /// `ε`
    Epsilon,
}

/// A sample and the model output for it.
#[derive(Clone, Debug)]
pub(crate) struct Prediction<B: Backend> {
    pub kind: PredictionType,
    /// `[batch, channels, height, width]`
    pub output: Tensor<B, 4>,
    /// `[batch, channels, height, width]`
    pub sample: Tensor<B, 4>,
}

impl<B: Backend> Prediction<B> {
    /// The prediction of a step.
    pub fn of(kind: PredictionType, step: &Step<'_, B>) -> Self {
        Self {
            kind,
            output: step.model_output.clone(),
            sample: step.sample.clone(),
        }
    }

    /// The prediction of a step without the variance that some models predict as well.
    ///
    /// # Panics
    /// If the output has neither the sample's channels nor, with a learned variance, twice as many.
    pub fn without_variance(
        kind: PredictionType,
        step: &Step<'_, B>,
        variance_type: Option<VarianceType>,
    ) -> Self {
        let mut prediction = Self::of(kind, step);
        let [_, channels, _, _] = step.sample.dims();
        let learned = variance_type.is_some_and(VarianceType::is_learned);
        assert_eq!(
            prediction.output.dims()[1],
            if learned { 2 * channels } else { channels },
            "channels of the model output for `{variance_type:?}`"
        );
        if learned {
            prediction.output = prediction.output.narrow(1, 0, channels);
        }
        prediction
    }

    /// `x0` of a sample `x = α x0 + σ ε`.
    pub fn original(&self, AlphaSigma { alpha, sigma }: AlphaSigma) -> Tensor<B, 4> {
        let (output, sample) = (self.output.clone(), self.sample.clone());
        match self.kind {
            PredictionType::Epsilon => combine([(1.0, sample), (-sigma, output)]).div_scalar(alpha),
            PredictionType::Sample => output,
            PredictionType::VPrediction => combine([(alpha, sample), (-sigma, output)]),
        }
    }

    /// `x0` of a sample `x = x0 + σ ε` whose model input was `x / √(σ² + 1)`.
    pub fn denoised(&self, sigma: f32) -> Tensor<B, 4> {
        let (output, sample) = (self.output.clone(), self.sample.clone());
        let input = AlphaSigma::of_ratio(sigma);
        match self.kind {
            PredictionType::Epsilon => combine([(1.0, sample), (-sigma, output)]),
            PredictionType::Sample => output,
            PredictionType::VPrediction => {
                combine([(input.alpha * input.alpha, sample), (-input.sigma, output)])
            }
        }
    }

    /// `ε` of a sample `x = α x0 + σ ε`.
    pub fn epsilon(&self, at: AlphaSigma) -> Tensor<B, 4> {
        let AlphaSigma { alpha, sigma } = at;
        let (output, sample) = (self.output.clone(), self.sample.clone());
        match self.kind {
            PredictionType::Epsilon => output,
            PredictionType::Sample => noise_between(sample, output, at),
            PredictionType::VPrediction => combine([(alpha, output), (sigma, sample)]),
        }
    }

    /// The integrand of a solver: the clipped `x0`, or its `ε`.
    pub fn integrand(&self, at: AlphaSigma, clipping: Clipping, kind: Integrand) -> Tensor<B, 4> {
        match (kind, clipping) {
            (Integrand::Data, clipping) => clipping.apply(self.original(at)),
            (Integrand::Epsilon, Clipping::None) => self.epsilon(at),
            (Integrand::Epsilon, clipping) => {
                let original = clipping.apply(self.original(at));
                noise_between(self.sample.clone(), original, at)
            }
        }
    }
}

/// `ε = (x - α x0) / σ`.
pub(crate) fn noise_between<B: Backend>(
    sample: Tensor<B, 4>,
    original: Tensor<B, 4>,
    AlphaSigma { alpha, sigma }: AlphaSigma,
) -> Tensor<B, 4> {
    combine([(1.0, sample), (-alpha, original)]).div_scalar(sigma)
}
