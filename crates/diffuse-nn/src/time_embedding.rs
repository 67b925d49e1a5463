//! Timesteps as vectors (Vaswani et al. 2017, <https://arxiv.org/abs/1706.03762>, section 3.5).

use std::f64::consts::PI;

use burn::config::Config;
use burn::module::{Initializer, Module, Param};
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};

use crate::{Activation, Linear, LinearConfig};

/// The timestep of a forward pass, in units of the training schedule (`0..num_train_timesteps`,
/// fractions allowed).
#[derive(Debug, Clone, PartialEq)]
pub enum Timestep {
    /// One for the whole batch.
    Same(f64),
    /// One for each batch row.
    Each(Vec<f64>),
}

impl From<f64> for Timestep {
    fn from(timestep: f64) -> Self {
        Timestep::Same(timestep)
    }
}

impl From<Vec<f64>> for Timestep {
    fn from(timesteps: Vec<f64>) -> Self {
        Timestep::Each(timesteps)
    }
}

impl Timestep {
    /// One timestep for each of `batch` rows.
    ///
    /// # Panics
    /// If there is one for each row, and their number is not `batch`.
    pub fn rows(&self, batch: usize) -> Vec<f64> {
        match self {
            Timestep::Same(timestep) => vec![*timestep; batch],
            Timestep::Each(timesteps) => {
                assert_eq!(timesteps.len(), batch, "timesteps and batch rows differ");
                timesteps.clone()
            }
        }
    }
}

/// The fixed sinusoidal embedding: what `time_proj` is in the reference.
#[derive(Debug, Clone, Copy)]
pub struct Timesteps {
    /// Length of the embedding; the last of an odd number is zero.
    pub num_channels: usize,
    /// Cosines before sines.
    pub flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies in the exponent's denominator (`freq_shift`).
    pub downscale_freq_shift: f64,
}

impl Timesteps {
    /// The embedding on a device, in `dtype`: `[batch, num_channels]`.
    pub fn forward<B: Backend>(
        &self,
        timesteps: &[f64],
        dtype: DType,
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let values = self.values(timesteps);
        let data = TensorData::new(values, [timesteps.len(), self.num_channels]);
        Tensor::from_data(data, (device, dtype))
    }

    /// The same numbers on the host, row after row.
    pub fn values(&self, timesteps: &[f64]) -> Vec<f32> {
        timesteps
            .iter()
            .flat_map(|&timestep| self.row(timestep as f32))
            .collect()
    }

    /// Products are rounded to `f32` where the reference rounds them; the functions are evaluated
    /// in `f64`, since one unit in the last place of a frequency is a visible angle at timestep
    /// 999.
    fn row(&self, timestep: f32) -> Vec<f32> {
        let half = self.num_channels / 2;
        let denominator = (half as f64 - self.downscale_freq_shift) as f32;
        let angles = (0..half).map(|i| {
            let exponent = (-(10_000f64.ln()) as f32 * i as f32) / denominator;
            let frequency = (exponent as f64).exp() as f32;
            (timestep * frequency) as f64
        });
        let sines = angles.clone().map(|angle| angle.sin() as f32);
        let cosines = angles.map(|angle| angle.cos() as f32);
        let mut row: Vec<f32> = if self.flip_sin_to_cos {
            cosines.chain(sines).collect()
        } else {
            sines.chain(cosines).collect()
        };
        row.resize(self.num_channels, 0.0);
        row
    }
}

/// The embedding of a guidance scale `w`, `[sin, cos]` of `1000 (w - 1)`, as guidance-distilled
/// networks take it (Meng et al. 2023, <https://arxiv.org/abs/2210.03142>).
pub fn guidance_embedding(guidance_scale: f64, num_channels: usize) -> Vec<f32> {
    let half = num_channels / 2;
    let spacing = 10_000f64.ln() as f32 / (half as f32 - 1.0);
    let position = 1000.0 * (guidance_scale - 1.0) as f32;
    let angles = (0..half).map(|i| {
        let frequency = f64::from(-spacing * i as f32).exp() as f32;
        f64::from(position * frequency)
    });
    let sines = angles.clone().map(|angle| angle.sin() as f32);
    let cosines = angles.map(|angle| angle.cos() as f32);
    let mut values: Vec<f32> = sines.chain(cosines).collect();
    values.resize(num_channels, 0.0);
    values
}

/// Configuration of a [`GaussianFourierProjection`].
#[derive(Config, Debug)]
pub struct GaussianFourierProjectionConfig {
    /// Number of frequencies.
    pub embedding_size: usize,
    /// Standard deviation of fresh frequencies.
    pub scale: f64,
}

/// Random Fourier features of a noise level (Song et al. 2021,
/// <https://arxiv.org/abs/2011.13456>, appendix C.1): `[sin, cos]` of `2π · ln(σ) · weight`.
#[derive(Module, Debug)]
pub struct GaussianFourierProjection<B: Backend> {
    /// The frequencies, `[embedding_size]`; they are not trained.
    pub weight: Param<Tensor<B, 1>>,
}

impl GaussianFourierProjectionConfig {
    /// A module with fresh frequencies, normally distributed.
    pub fn init<B: Backend>(&self, device: &B::Device) -> GaussianFourierProjection<B> {
        let initializer = Initializer::Normal {
            mean: 0.0,
            std: self.scale,
        };
        GaussianFourierProjection {
            weight: initializer.init([self.embedding_size], device),
        }
    }
}

impl<B: Backend> GaussianFourierProjection<B> {
    /// The features in `dtype`: `[batch, 2 · embedding_size]`. Angles are computed in `f32`.
    pub fn forward(&self, noise_levels: &[f64], dtype: DType) -> Tensor<B, 2> {
        let weight = self.weight.val().detach().cast(DType::F32);
        let logarithms = noise_levels.iter().map(|level| (*level as f32).ln());
        let data = TensorData::new(logarithms.collect(), [noise_levels.len(), 1]);
        let logarithms = Tensor::<B, 2>::from_data(data, (&weight.device(), DType::F32));
        let angles = logarithms * weight.unsqueeze() * 2.0 * PI;
        Tensor::cat(vec![angles.clone().sin(), angles.cos()], 1).cast(dtype)
    }
}

/// Configuration of a [`TimestepEmbedding`].
#[derive(Config, Debug)]
pub struct TimestepEmbeddingConfig {
    /// Length of the sinusoidal embedding.
    pub in_channels: usize,
    /// Length of the result.
    pub time_embed_dim: usize,
    /// Length of an additional condition (`time_cond_proj_dim`).
    pub cond_proj_dim: Option<usize>,
    /// Activation function.
    #[config(default = "Activation::Silu")]
    pub act_fn: Activation,
}

/// Two linear layers with an activation function between them, from the sinusoidal embedding to the
/// one that blocks take.
#[derive(Module, Debug)]
pub struct TimestepEmbedding<B: Backend> {
    linear_1: Linear<B>,
    linear_2: Linear<B>,
    cond_proj: Option<Linear<B>>,
    #[module(skip)]
    act_fn: Activation,
}

impl TimestepEmbeddingConfig {
    /// A module with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> TimestepEmbedding<B> {
        let dim = self.time_embed_dim;
        TimestepEmbedding {
            linear_1: LinearConfig::new(self.in_channels, dim).init(device),
            linear_2: LinearConfig::new(dim, dim).init(device),
            cond_proj: self.cond_proj_dim.map(|cond| {
                LinearConfig::new(cond, self.in_channels)
                    .with_bias(false)
                    .init(device)
            }),
            act_fn: self.act_fn,
        }
    }
}

impl<B: Backend> TimestepEmbedding<B> {
    /// Applies the layers.
    ///
    /// # Shapes
    /// - `sample`: `[batch, in_channels]`
    /// - `condition`: `[batch, cond_proj_dim]`, added to `sample` after its projection
    /// - output: `[batch, time_embed_dim]`
    pub fn forward(&self, sample: Tensor<B, 2>, condition: Option<Tensor<B, 2>>) -> Tensor<B, 2> {
        let sample = match (&self.cond_proj, condition) {
            (Some(projection), Some(condition)) => sample + projection.forward(condition),
            _ => sample,
        };
        let hidden = self.act_fn.forward(self.linear_1.forward(sample));
        self.linear_2.forward(hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // get_timestep_embedding(torch.tensor([t]), 6, ...) of the reference.
    #[test]
    fn embeddings_have_the_values_of_the_reference() {
        let ddpm = Timesteps {
            num_channels: 6,
            flip_sin_to_cos: false,
            downscale_freq_shift: 1.0,
        };
        let sd = Timesteps {
            flip_sin_to_cos: true,
            downscale_freq_shift: 0.0,
            ..ddpm
        };
        check(
            &ddpm.values(&[980.0]),
            &[
                -0.175_986_6,
                -0.366_479_3,
                0.097_843_2,
                0.984_392_6,
                -0.930_426_2,
                0.995_201_8,
            ],
        );
        check(
            &sd.values(&[978.61]),
            &[
                0.003_873_749,
                0.129_673_54,
                -0.512_037_46,
                -0.999_992_5,
                0.991_556_76,
                0.858_963_13,
            ],
        );
    }

    // get_guidance_scale_embedding(torch.tensor([6.5]), 8) of the reference.
    #[test]
    fn guidance_embedding_has_the_values_of_the_reference() {
        check(
            &guidance_embedding(7.5, 8),
            &[
                -0.044_784_74,
                0.110_189_155,
                0.991_123_26,
                0.605_186_34,
                -0.998_996_7,
                0.993_910_6,
                0.132_946_03,
                0.796_083_87,
            ],
        );
        assert_eq!(guidance_embedding(7.5, 7)[6], 0.0);
    }

    #[track_caller]
    fn check(got: &[f32], expected: &[f32]) {
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{got} and {expected}");
        }
    }
}
