//! Multi-head attention (Vaswani et al. 2017, <https://arxiv.org/abs/1706.03762>, section 3.2).

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use crate::{GroupNorm, GroupNormConfig, Linear, LinearConfig, TextContext, ops};

/// Configuration of an [`Attention`].
#[derive(Config, Debug)]
pub struct AttentionConfig {
    /// Size of the tokens that ask, and of the output.
    pub query_dim: usize,
    /// Number of heads.
    pub heads: usize,
    /// Size of each head.
    pub dim_head: usize,
    /// Size of the tokens that are attended to; the input itself if absent.
    pub cross_attention_dim: Option<usize>,
    /// Whether the projections of query, key and value have a bias.
    #[config(default = false)]
    pub qkv_bias: bool,
    /// Groups of a group norm on the input.
    pub norm_num_groups: Option<usize>,
    /// Epsilon of that norm.
    #[config(default = 1e-5)]
    pub norm_eps: f64,
    /// The result of [`Attention::forward_image`] is divided by it.
    #[config(default = 1.0)]
    pub rescale_output_factor: f64,
}

/// Attention with its four projections; fields are named as today's checkpoints name them.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    group_norm: Option<GroupNorm<B>>,
    to_q: Linear<B>,
    to_k: Linear<B>,
    to_v: Linear<B>,
    /// One layer: the reference keeps it in a list with its dropout.
    to_out: [Linear<B>; 1],
    heads: usize,
    rescale_output_factor: f64,
}

impl AttentionConfig {
    /// A module with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Attention<B> {
        let inner = self.heads * self.dim_head;
        let context = self.cross_attention_dim.unwrap_or(self.query_dim);
        let project = |from| {
            LinearConfig::new(from, inner)
                .with_bias(self.qkv_bias)
                .init(device)
        };
        Attention {
            group_norm: self.norm_num_groups.map(|groups| {
                GroupNormConfig::new(groups, self.query_dim)
                    .with_eps(self.norm_eps)
                    .init(device)
            }),
            to_q: project(self.query_dim),
            to_k: project(context),
            to_v: project(context),
            to_out: [LinearConfig::new(inner, self.query_dim).init(device)],
            heads: self.heads,
            rescale_output_factor: self.rescale_output_factor,
        }
    }
}

/// The results of several layers for one input.
fn project<B: Backend, const N: usize>(
    layers: [&Linear<B>; N],
    x: Tensor<B, 3>,
) -> [Tensor<B, 3>; N] {
    if layers.iter().any(|layer| layer.bias.is_some()) {
        return layers.map(|layer| layer.forward(x.clone()));
    }
    ops::linears(x, layers.map(|layer| layer.weight.val()))
}

impl<B: Backend> Attention<B> {
    /// Attention over tokens: self-attention without `context`, cross-attention with it.
    ///
    /// # Shapes
    /// - `x`: `[batch, tokens, query_dim]`
    /// - `context`: `[batch, context tokens, cross_attention_dim]`
    /// - output: `[batch, tokens, query_dim]`
    pub fn forward(&self, x: Tensor<B, 3>, context: Option<&TextContext<B>>) -> Tensor<B, 3> {
        self.to_out[0].forward(self.attend(x, context))
    }

    /// [`forward`](Attention::forward), and adds the result to `residual`, which has its shape.
    pub fn forward_add(
        &self,
        x: Tensor<B, 3>,
        context: Option<&TextContext<B>>,
        residual: Tensor<B, 3>,
    ) -> Tensor<B, 3> {
        self.to_out[0].forward_add(self.attend(x, context), residual)
    }

    /// All but the last projection.
    fn attend(&self, x: Tensor<B, 3>, context: Option<&TextContext<B>>) -> Tensor<B, 3> {
        let (query, key, value) = match context {
            None => {
                let [query, key, value] = project([&self.to_q, &self.to_k, &self.to_v], x);
                (query, key, value)
            }
            Some(context) => {
                let layers = [&self.to_k, &self.to_v];
                let [key, value] = context
                    .keys_and_values(self.to_k.weight.id, |context| project(layers, context));
                (self.to_q.forward(x), key, value)
            }
        };
        ops::attention(query, key, value, self.heads)
    }

    /// Self-attention over the positions of an image, with norm and residual, as between the
    /// residual blocks of DDPM networks and of the autoencoder.
    ///
    /// # Shapes
    /// - `x`, output: `[batch, query_dim, height, width]`
    pub fn forward_image(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let hidden = match &self.group_norm {
            Some(norm) => norm.forward(x.clone()),
            None => x.clone(),
        };
        let hidden = self.attend(ops::image_to_tokens(hidden), None);
        let output = self.to_out[0].forward_to_image(hidden, x);
        if self.rescale_output_factor == 1.0 {
            output
        } else {
            output / self.rescale_output_factor
        }
    }
}
