use burn::config::Config;
use burn::module::{Initializer, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::{Activation, ops};

/// Configuration of a [`GroupNorm`].
#[derive(Config, Debug)]
pub struct GroupNormConfig {
    /// Number of groups that share statistics.
    pub num_groups: usize,
    /// Number of channels, a multiple of `num_groups`.
    pub num_channels: usize,
    /// Added to the variance.
    #[config(default = 1e-5)]
    pub eps: f64,
}

/// Group normalisation (Wu & He 2018, <https://arxiv.org/abs/1803.08494>) with a scale and a shift
/// a channel: `y = (x - mean) / sqrt(var + eps) · weight + bias`, statistics over each group.
#[derive(Module, Debug)]
pub struct GroupNorm<B: Backend> {
    /// `[num_channels]`
    pub weight: Param<Tensor<B, 1>>,
    /// `[num_channels]`
    pub bias: Param<Tensor<B, 1>>,
    num_groups: usize,
    eps: f64,
}

impl GroupNormConfig {
    /// A layer with scale one and shift zero.
    ///
    /// # Panics
    /// If `num_channels` is not a multiple of `num_groups`.
    pub fn init<B: Backend>(&self, device: &B::Device) -> GroupNorm<B> {
        assert!(
            self.num_groups > 0 && self.num_channels.is_multiple_of(self.num_groups),
            "{} channels cannot be split into {} groups",
            self.num_channels,
            self.num_groups,
        );
        GroupNorm {
            weight: Initializer::Ones.init([self.num_channels], device),
            bias: Initializer::Zeros.init([self.num_channels], device),
            num_groups: self.num_groups,
            eps: self.eps,
        }
    }
}

impl<B: Backend> GroupNorm<B> {
    /// Normalises.
    ///
    /// # Shapes
    /// - `x`, output: `[batch, num_channels, height, width]`
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::group_norm(
            x,
            self.weight.val(),
            self.bias.val(),
            self.num_groups,
            self.eps,
        )
    }

    /// [`forward`](Self::forward), then SiLU, as one operation.
    pub fn forward_silu(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::group_norm_silu(
            x,
            self.weight.val(),
            self.bias.val(),
            self.num_groups,
            self.eps,
        )
    }

    /// [`forward`](Self::forward), then an activation function.
    pub fn forward_activated(&self, x: Tensor<B, 4>, act_fn: Activation) -> Tensor<B, 4> {
        match act_fn {
            Activation::Silu => self.forward_silu(x),
            Activation::Gelu | Activation::QuickGelu => act_fn.forward(self.forward(x)),
        }
    }
}

/// Configuration of a [`LayerNorm`].
#[derive(Config, Debug)]
pub struct LayerNormConfig {
    /// Size of the last dimension.
    pub d_model: usize,
    /// Added to the variance.
    #[config(default = 1e-5)]
    pub eps: f64,
}

/// Layer normalisation (Ba et al. 2016, <https://arxiv.org/abs/1607.06450>) over the last
/// dimension: `y = (x - mean) / sqrt(var + eps) · weight + bias`.
#[derive(Module, Debug)]
pub struct LayerNorm<B: Backend> {
    /// `[d_model]`
    pub weight: Param<Tensor<B, 1>>,
    /// `[d_model]`
    pub bias: Param<Tensor<B, 1>>,
    eps: f64,
}

impl LayerNormConfig {
    /// A layer with scale one and shift zero.
    pub fn init<B: Backend>(&self, device: &B::Device) -> LayerNorm<B> {
        LayerNorm {
            weight: Initializer::Ones.init([self.d_model], device),
            bias: Initializer::Zeros.init([self.d_model], device),
            eps: self.eps,
        }
    }
}

impl<B: Backend> LayerNorm<B> {
    /// Normalises.
    ///
    /// # Shapes
    /// - `x`, output: `[.., d_model]`
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        ops::layer_norm(x, self.weight.val(), self.bias.val(), self.eps)
    }
}
