//! The transformer of CLIP's text and vision models (Radford et al. 2021,
//! <https://arxiv.org/abs/2103.00020>, section 2.4), with layer norms before its parts.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use diffuse_nn::config::{ConfigError, MAX_CHANNELS, MAX_LAYERS, check_size};
use diffuse_nn::{Activation, LayerNorm, LayerNormConfig, Linear, LinearConfig, ops};

/// Configuration of a [`CLIPEncoder`]; keys of `config.json`.
#[derive(Debug, Clone)]
pub(crate) struct CLIPEncoderConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
    /// Whether a token attends only to itself and the tokens before it.
    pub causal: bool,
}

impl CLIPEncoderConfig {
    /// Checks sizes; `class` is the model's, for the error.
    pub fn validate(&self, class: &'static str) -> Result<(), ConfigError> {
        let size = self.hidden_size;
        for (key, value, max) in [
            ("hidden_size", size, MAX_CHANNELS),
            ("intermediate_size", self.intermediate_size, MAX_CHANNELS),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, size),
        ] {
            check_size(class, key, value, max)?;
        }
        if !size.is_multiple_of(self.num_attention_heads) {
            let supported = format!("divisors of `hidden_size` ({size})");
            let (key, heads) = ("num_attention_heads", self.num_attention_heads);
            return Err(ConfigError::unsupported(class, key, heads, supported));
        }
        Ok(())
    }

    /// An encoder with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> CLIPEncoder<B> {
        let size = self.hidden_size;
        let norm = || {
            LayerNormConfig::new(size)
                .with_eps(self.layer_norm_eps)
                .init(device)
        };
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let layer = |_| CLIPEncoderLayer {
            self_attn: CLIPAttention {
                q_proj: linear(size, size),
                k_proj: linear(size, size),
                v_proj: linear(size, size),
                out_proj: linear(size, size),
                heads: self.num_attention_heads,
                causal: self.causal,
            },
            layer_norm1: norm(),
            mlp: CLIPMlp {
                fc1: linear(size, self.intermediate_size),
                fc2: linear(self.intermediate_size, size),
                activation: self.hidden_act,
            },
            layer_norm2: norm(),
        };
        CLIPEncoder {
            layers: (0..self.num_hidden_layers).map(layer).collect(),
        }
    }
}

/// Self-attention, causal in the text model.
#[derive(Module, Debug)]
pub struct CLIPAttention<B: Backend> {
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    out_proj: Linear<B>,
    heads: usize,
    causal: bool,
}

impl<B: Backend> CLIPAttention<B> {
    /// `[batch, tokens, hidden_size]` to the same shape.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let query = self.q_proj.forward(x.clone());
        let key = self.k_proj.forward(x.clone());
        let value = self.v_proj.forward(x);
        self.out_proj.forward(if self.causal {
            ops::causal_attention(query, key, value, self.heads)
        } else {
            ops::attention(query, key, value, self.heads)
        })
    }
}

/// Two linear layers with an activation between them.
#[derive(Module, Debug)]
pub struct CLIPMlp<B: Backend> {
    fc1: Linear<B>,
    fc2: Linear<B>,
    #[module(skip)]
    activation: Activation,
}

impl<B: Backend> CLIPMlp<B> {
    /// `[batch, tokens, hidden_size]` to the same shape.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.fc2
            .forward(self.activation.forward(self.fc1.forward(x)))
    }
}

/// Attention and feed-forward, each behind a norm and with a residual.
#[derive(Module, Debug)]
pub struct CLIPEncoderLayer<B: Backend> {
    self_attn: CLIPAttention<B>,
    layer_norm1: LayerNorm<B>,
    mlp: CLIPMlp<B>,
    layer_norm2: LayerNorm<B>,
}

impl<B: Backend> CLIPEncoderLayer<B> {
    /// `[batch, tokens, hidden_size]` to the same shape.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let x = self.self_attn.forward(self.layer_norm1.forward(x.clone())) + x;
        self.mlp.forward(self.layer_norm2.forward(x.clone())) + x
    }
}

/// The layers in order.
#[derive(Module, Debug)]
pub struct CLIPEncoder<B: Backend> {
    /// First to last.
    pub layers: Vec<CLIPEncoderLayer<B>>,
}
