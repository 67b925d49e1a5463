//! FreeU: more of the backbone and less of the skip connections' low frequencies on the way up
//! (Si et al. 2023, <https://arxiv.org/abs/2309.11497>).

use std::f64::consts::TAU;

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};

use crate::ops;

/// The factors of one level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FreeUFactors {
    /// What the first half of the backbone's channels is multiplied by (`b1`, `b2`).
    pub backbone: f64,
    /// What the low frequencies of skip connections are multiplied by (`s1`, `s2`).
    pub skip: f64,
}

impl FreeUFactors {
    /// The backbone and its skip connection before they are joined.
    ///
    /// # Shapes
    /// - `x`, `skip`, outputs: `[batch, channels, height, width]`
    pub(crate) fn apply<B: Backend>(
        self,
        x: Tensor<B, 4>,
        skip: Tensor<B, 4>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let [_, channels, _, _] = x.dims();
        let half = channels / 2;
        let first = x.clone().narrow(1, 0, half) * self.backbone;
        let second = x.narrow(1, half, channels - half);
        let skip = scale_low_frequencies(skip, self.skip);
        (ops::concat_channels(first, second), skip)
    }
}

/// Multiplies the frequencies -1 and 0 of both directions by `scale`, and takes the real part, as
/// Diffusers does with a threshold of 1. These are four terms of the Fourier transform, so that
/// none is computed.
fn scale_low_frequencies<B: Backend>(x: Tensor<B, 4>, scale: f64) -> Tensor<B, 4> {
    let [batch, channels, height, width] = x.dims();
    let (device, dtype) = (x.device(), x.dtype());
    let waves = low_frequencies(height, width);
    let count = waves.len() / (height * width);
    let waves = TensorData::new(waves, [1, count, height * width]);
    let waves = Tensor::<B, 3>::from_data(waves, (&device, DType::F32));
    let positions = x
        .cast(DType::F32)
        .reshape([batch, channels, height * width]);
    let terms = positions.clone().matmul(waves.clone().transpose());
    let low = terms.matmul(waves) / (height * width) as f64;
    let result = positions + low * (scale - 1.0);
    result.reshape([batch, channels, height, width]).cast(dtype)
}

/// Cosine and sine of each of the low frequencies: `[waves, height, width]`.
fn low_frequencies(height: usize, width: usize) -> Vec<f32> {
    // A side of one has the frequency 0 only.
    let frequencies = |side: usize| if side > 1 { vec![-1.0, 0.0] } else { vec![0.0] };
    let mut waves = Vec::new();
    for vertical in frequencies(height) {
        for horizontal in frequencies(width) {
            for wave in [f64::cos, f64::sin] {
                waves.extend((0..height * width).map(|position| {
                    let y = (position / width) as f64 / height as f64;
                    let x = (position % width) as f64 / width as f64;
                    wave(TAU * (vertical * y + horizontal * x)) as f32
                }));
            }
        }
    }
    waves
}
