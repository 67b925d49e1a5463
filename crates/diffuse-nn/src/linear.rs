use burn::config::Config;
use burn::module::{Initializer, Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::ops;

/// Configuration of a [`Linear`] layer.
#[derive(Config, Debug)]
pub struct LinearConfig {
    /// Size of the input features.
    pub d_input: usize,
    /// Size of the output features.
    pub d_output: usize,
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
}

/// `y = x Wᵀ + b`, with the weight kept as checkpoints have it, so that loading transposes nothing.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[d_output, d_input]`
    pub weight: Param<Tensor<B, 2>>,
    /// `[d_output]`
    pub bias: Option<Param<Tensor<B, 1>>>,
}

impl LinearConfig {
    /// A layer with fresh weights, `U(-k, k)` with `k = 1 / sqrt(d_input)`.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Linear<B> {
        let initializer = uniform_by_fan_in();
        let fan_in = Some(self.d_input);
        let fan_out = Some(self.d_output);
        Linear {
            weight: initializer.init_with([self.d_output, self.d_input], fan_in, fan_out, device),
            bias: self
                .bias
                .then(|| initializer.init_with([self.d_output], fan_in, fan_out, device)),
        }
    }
}

/// The initialisation of torch's linear and convolution layers: `U(-k, k)`, `k = 1 / sqrt(fan_in)`.
pub(crate) fn uniform_by_fan_in() -> Initializer {
    Initializer::KaimingUniform {
        gain: 1.0 / 3f64.sqrt(),
        fan_out_only: false,
    }
}

impl<B: Backend> Linear<B> {
    /// Applies the layer to the last dimension.
    ///
    /// # Shapes
    /// - `x`: `[.., d_input]`
    /// - output: `[.., d_output]`
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        ops::linear(
            x,
            self.weight.val(),
            self.bias.as_ref().map(|bias| bias.val()),
        )
    }

    /// Applies the layer to the last dimension, and adds the result to `residual`, which has its
    /// shape.
    pub fn forward_add<const D: usize>(
        &self,
        x: Tensor<B, D>,
        residual: Tensor<B, D>,
    ) -> Tensor<B, D> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        ops::linear_add(x, self.weight.val(), bias, residual)
    }

    /// Applies the layer to tokens, and adds the result as an image to `residual`.
    ///
    /// # Shapes
    /// - `x`: `[batch, height · width, d_input]`
    /// - `residual`, output: `[batch, d_output, height, width]`
    pub fn forward_to_image(&self, x: Tensor<B, 3>, residual: Tensor<B, 4>) -> Tensor<B, 4> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        ops::linear_to_image(x, self.weight.val(), bias, residual)
    }
}
