//! What the model predicts, and how the image is read from it.
//!
//! With a sample `x = α x0 + σ ε`, a model was trained to predict `ε`, `x0`, or the velocity `v = α ε - σ x0` of
//! "Progressive Distillation" (<https://arxiv.org/abs/2202.00512>, appendix D). Any of the three gives the others:
//!
//! ```text
//!            x0                ε
//! epsilon    (x - σ ε) / α     ε
//! sample     x0                (x - α x0) / σ
//! v          α x - σ v         α v + σ x
//! ```

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use crate::SchedulerError;
use crate::mixture::Mixture;
use crate::tensor::combine;

/// What the model's output means (the key `prediction_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise in the sample.
    Epsilon,
    /// The image without noise.
    #[serde(alias = "original_sample")]
    Sample,
    /// The velocity, a mixture of both.
    VPrediction,
}

/// What the model was given and what it made of it.
#[derive(Clone, Debug)]
pub(crate) struct Prediction<B: Backend> {
    pub kind: PredictionType,
    /// `[batch, channels, height, width]`
    pub output: Tensor<B, 4>,
    /// `[batch, channels, height, width]`
    pub sample: Tensor<B, 4>,
}

impl<B: Backend> Prediction<B> {
    /// `x0` of a sample `x = α x0 + σ ε`.
    pub fn original(&self, Mixture { alpha, sigma }: Mixture) -> Tensor<B, 4> {
        let (output, sample) = (self.output.clone(), self.sample.clone());
        match self.kind {
            PredictionType::Epsilon => combine([(1.0, sample), (-sigma, output)]).div_scalar(alpha),
            PredictionType::Sample => output,
            PredictionType::VPrediction => combine([(alpha, sample), (-sigma, output)]),
        }
    }

    /// `x0` of a sample `x = x0 + σ ε`, of which the model has seen `x / √(σ² + 1)`.
    pub fn denoised(&self, sigma: f32) -> Tensor<B, 4> {
        let (output, sample) = (self.output.clone(), self.sample.clone());
        let seen = Mixture::of_ratio(sigma);
        match self.kind {
            PredictionType::Epsilon => combine([(1.0, sample), (-sigma, output)]),
            PredictionType::Sample => output,
            PredictionType::VPrediction => {
                combine([(seen.alpha * seen.alpha, sample), (-seen.sigma, output)])
            }
        }
    }

    /// `ε` of a sample `x = α x0 + σ ε`.
    pub fn epsilon(&self, mixture: Mixture) -> Tensor<B, 4> {
        let Mixture { alpha, sigma } = mixture;
        let (output, sample) = (self.output.clone(), self.sample.clone());
        match self.kind {
            PredictionType::Epsilon => output,
            PredictionType::Sample => noise_between(sample, output, mixture),
            PredictionType::VPrediction => combine([(alpha, output), (sigma, sample)]),
        }
    }

    /// What a solver integrates: `x0` within a bound, or the `ε` that belongs to it.
    pub fn image_or_noise(&self, mixture: Mixture, bound: Bound, image: bool) -> Tensor<B, 4> {
        match (image, bound) {
            (true, bound) => bound.apply(self.original(mixture)),
            (false, Bound::None) => self.epsilon(mixture),
            (false, bound) => {
                let original = bound.apply(self.original(mixture));
                noise_between(self.sample.clone(), original, mixture)
            }
        }
    }
}

/// `ε = (x - α x0) / σ`.
pub(crate) fn noise_between<B: Backend>(
    sample: Tensor<B, 4>,
    original: Tensor<B, 4>,
    Mixture { alpha, sigma }: Mixture,
) -> Tensor<B, 4> {
    combine([(1.0, sample), (-alpha, original)]).div_scalar(sigma)
}

/// How a predicted image is kept in range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bound {
    /// Not at all.
    None,
    /// Cut off at plus and minus this value.
    Clip(f64),
    /// Dynamic thresholding of Imagen (<https://arxiv.org/abs/2205.11487>, section 2.3): cut each image off at a
    /// quantile `s` of its absolute values, at least 1 and at most `max` (which wins), and divide by `s`.
    Quantile { ratio: f64, max: f64 },
}

impl Bound {
    /// Dynamic thresholding if it is on, else another bound.
    pub fn threshold(
        class: &'static str,
        on: bool,
        ratio: f64,
        max: f64,
        other: Self,
    ) -> Result<Self, SchedulerError> {
        let invalid = |key, value: f64, expected: &str| {
            Err(SchedulerError::Value {
                class,
                key,
                value: value.to_string(),
                expected: expected.into(),
            })
        };
        match (on, ratio, max) {
            (false, ..) => Ok(other),
            (_, ratio, _) if !(0.0..=1.0).contains(&ratio) => invalid(
                "dynamic_thresholding_ratio",
                ratio,
                "expected a number between 0 and 1",
            ),
            (_, _, max) if max.is_nan() || max <= 0.0 => {
                invalid("sample_max_value", max, "expected a number greater than 0")
            }
            _ => Ok(Self::Quantile { ratio, max }),
        }
    }

    /// Clipping if it is on.
    pub fn clip(class: &'static str, on: bool, range: f64) -> Result<Self, SchedulerError> {
        match on {
            false => Ok(Self::None),
            true if range >= 0.0 => Ok(Self::Clip(range)),
            true => Err(SchedulerError::Value {
                class,
                key: "clip_sample_range",
                value: range.to_string(),
                expected: "expected a number of at least 0".into(),
            }),
        }
    }

    /// Whether an image that is infinite everywhere comes back finite.
    pub fn cuts_infinity(self) -> bool {
        matches!(self, Bound::Clip(_))
    }

    /// Applies the bound to an image `[batch, channels, height, width]`.
    pub fn apply<B: Backend>(self, original: Tensor<B, 4>) -> Tensor<B, 4> {
        match self {
            Bound::None => original,
            Bound::Clip(range) => original.clamp(-range, range),
            Bound::Quantile { ratio, max } => {
                let scale = quantile_of_magnitude(original.clone(), ratio)
                    .clamp_min(1.0)
                    .clamp_max(max);
                (original / scale).clamp(-1.0, 1.0)
            }
        }
    }
}

/// The quantile of the absolute values of each image, between neighbours by linear interpolation: `[batch, 1, 1, 1]`.
fn quantile_of_magnitude<B: Backend>(image: Tensor<B, 4>, ratio: f64) -> Tensor<B, 4> {
    let [batch, channels, height, width] = image.dims();
    let count = channels * height * width;
    // torch ranks in f32, which shows in large images.
    let rank = ratio as f32 * (count - 1) as f32;
    let below = (rank.floor() as usize).min(count - 1);
    let above = (below + 1).min(count - 1);
    let sorted = image.abs().reshape([batch, count]).sort(1);
    let [low, high] = [below, above].map(|rank| sorted.clone().narrow(1, rank, 1));
    let between = low.clone() + (high - low).mul_scalar(rank - rank.floor());
    between.reshape([batch, 1, 1, 1])
}
