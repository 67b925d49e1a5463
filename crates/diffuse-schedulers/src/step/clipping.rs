//! Clipping and dynamic thresholding of a predicted image.

use burn::prelude::*;

use crate::SchedulerError;
use crate::config::{options, require_range};

options! {
    /// Clipping of the predicted image.
    pub struct ClipOptions {
        /// Whether the predicted image is clipped at `clip_sample_range`.
        pub clip_sample: bool = true,
        /// The largest absolute value of a clipped image.
        pub clip_sample_range: f64 = 1.0,
    }
}

impl ClipOptions {
    /// No clipping.
    pub const OFF: Self = Self {
        clip_sample: false,
        clip_sample_range: 1.0,
    };

    /// The clipping of these options.
    pub(crate) fn clipping(&self, class: &'static str) -> Result<Clipping, SchedulerError> {
        if !self.clip_sample {
            return Ok(Clipping::None);
        }
        let (range, all) = (self.clip_sample_range, 0.0..=f64::INFINITY);
        require_range(
            class,
            "clip_sample_range",
            range,
            all,
            "a number of at least 0",
        )?;
        Ok(Clipping::Clip(range))
    }
}

options! {
    /// Dynamic thresholding of the predicted image, for models of pixels, not of latents.
    pub struct ThresholdOptions {
        /// Whether there is thresholding.
        pub thresholding: bool = false,
        /// The quantile of the absolute values at which an image is clipped.
        pub dynamic_thresholding_ratio: f64 = 0.995,
        /// The largest value at which an image is clipped.
        pub sample_max_value: f64 = 1.0,
    }
}

impl ThresholdOptions {
    /// Thresholding if it is on, else the other clipping.
    pub(crate) fn clipping_or(
        &self,
        class: &'static str,
        other: Clipping,
    ) -> Result<Clipping, SchedulerError> {
        if !self.thresholding {
            return Ok(other);
        }
        let (ratio, max) = (self.dynamic_thresholding_ratio, self.sample_max_value);
        let expected = "a number between 0 and 1";
        require_range(
            class,
            "dynamic_thresholding_ratio",
            ratio,
            0.0..=1.0,
            expected,
        )?;
        let positive = f64::MIN_POSITIVE..=f64::INFINITY;
        require_range(
            class,
            "sample_max_value",
            max,
            positive,
            "a number greater than 0",
        )?;
        Ok(Clipping::Threshold { ratio, max })
    }

    /// The thresholding of these options.
    pub(crate) fn clipping(&self, class: &'static str) -> Result<Clipping, SchedulerError> {
        self.clipping_or(class, Clipping::None)
    }
}

/// The range of a predicted image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Clipping {
    None,
    /// At plus and minus this value.
    Clip(f64),
    /// Dynamic thresholding of Imagen (<https://arxiv.org/abs/2205.11487>, section 2.3): clip each
    /// image at a quantile `s` of its absolute values, at least 1 and at most `max` (which wins),
    /// and divide by `s`.
    Threshold {
        ratio: f64,
        max: f64,
    },
}

impl Clipping {
    /// Clips an image `[batch, channels, height, width]`.
    pub fn apply<B: Backend>(self, original: Tensor<B, 4>) -> Tensor<B, 4> {
        match self {
            Self::None => original,
            Self::Clip(range) => original.clamp(-range, range),
            Self::Threshold { ratio, max } => {
                let scale = quantile_of_magnitude(original.clone(), ratio)
                    .clamp_min(1.0)
                    .clamp_max(max);
                (original / scale).clamp(-1.0, 1.0)
            }
        }
    }
}

/// The quantile of the absolute values of each image, with linear interpolation between neighbours:
/// `[batch, 1, 1, 1]`.
fn quantile_of_magnitude<B: Backend>(image: Tensor<B, 4>, ratio: f64) -> Tensor<B, 4> {
    let [batch, channels, height, width] = image.dims();
    let count = channels * height * width;
    // torch computes the rank in f32, which matters for large images.
    let rank = ratio as f32 * (count - 1) as f32;
    let below = (rank.floor() as usize).min(count - 1);
    let above = (below + 1).min(count - 1);
    let sorted = image.abs().reshape([batch, count]).sort(1);
    let [low, high] = [below, above].map(|rank| sorted.clone().narrow(1, rank, 1));
    let between = low.clone() + (high - low).mul_scalar(rank - rank.floor());
    between.reshape([batch, 1, 1, 1])
}
