//! The transformer between residual blocks of the text-conditioned UNet (Rombach et al. 2022,
//! <https://arxiv.org/abs/2112.10752>, appendix E.2.1).

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Tensor, backend::Backend};

use crate::{
    Attention, AttentionConfig, Conv2d, Conv2dConfig, GroupNorm, GroupNormConfig, LayerNorm,
    LayerNormConfig, Linear, LinearConfig, TextContext, ops,
};

/// A linear layer to twice the size, one half gated by the GELU of the other (Shazeer 2020,
/// <https://arxiv.org/abs/2002.05202>): `a · gelu(b)` with `[a, b] = proj(x)`.
#[derive(Module, Debug)]
pub struct Geglu<B: Backend> {
    proj: Linear<B>,
}

impl<B: Backend> Geglu<B> {
    /// `[.., d_input]` to `[.., d_output]`.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let Linear { weight, bias } = &self.proj;
        ops::linear_geglu(x, weight.val(), bias.as_ref().map(|bias| bias.val()))
    }
}

/// Configuration of a [`FeedForward`].
#[derive(Config, Debug)]
pub struct FeedForwardConfig {
    /// Size of input and output.
    pub dim: usize,
    /// Size between the two layers, as a multiple of `dim`.
    #[config(default = 4)]
    pub multiple: usize,
}

/// `Linear(GEGLU(x))`; a tuple, since the reference keeps the layers in a list: `net.0.proj`,
/// `net.2`.
#[derive(Module, Debug)]
pub struct FeedForward<B: Backend> {
    net: (Geglu<B>, Dropout, Linear<B>),
}

impl FeedForwardConfig {
    /// A module with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> FeedForward<B> {
        let inner = self.dim * self.multiple;
        let proj = LinearConfig::new(self.dim, 2 * inner).init(device);
        FeedForward {
            net: (
                Geglu { proj },
                DropoutConfig::new(0.0).init(),
                LinearConfig::new(inner, self.dim).init(device),
            ),
        }
    }
}

impl<B: Backend> FeedForward<B> {
    /// `[batch, tokens, dim]` to the same shape.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let (geglu, _, linear) = &self.net;
        linear.forward(geglu.forward(x))
    }

    /// [`forward`](FeedForward::forward), and adds the result to `residual`, which has its shape.
    pub fn forward_add(&self, x: Tensor<B, 3>, residual: Tensor<B, 3>) -> Tensor<B, 3> {
        let (geglu, _, linear) = &self.net;
        linear.forward_add(geglu.forward(x), residual)
    }
}

/// Configuration of a [`BasicTransformerBlock`].
#[derive(Config, Debug)]
pub struct BasicTransformerBlockConfig {
    /// Size of the tokens.
    pub dim: usize,
    /// Number of heads.
    pub heads: usize,
    /// Size of each head.
    pub dim_head: usize,
    /// Size of the text embeddings.
    pub cross_attention_dim: usize,
    /// Whether the first attention, too, is to the text.
    #[config(default = false)]
    pub only_cross_attention: bool,
}

/// Self-attention, cross-attention to the text and feed-forward, each behind a layer norm and with
/// a residual. With `only_cross_attention`, both attentions are to the text.
#[derive(Module, Debug)]
pub struct BasicTransformerBlock<B: Backend> {
    norm1: LayerNorm<B>,
    attn1: Attention<B>,
    norm2: LayerNorm<B>,
    attn2: Attention<B>,
    norm3: LayerNorm<B>,
    ff: FeedForward<B>,
    only_cross_attention: bool,
}

impl BasicTransformerBlockConfig {
    /// A block with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> BasicTransformerBlock<B> {
        let norm = || LayerNormConfig::new(self.dim).init(device);
        let attention = |cross_attention_dim| {
            AttentionConfig::new(self.dim, self.heads, self.dim_head)
                .with_cross_attention_dim(cross_attention_dim)
                .init(device)
        };
        BasicTransformerBlock {
            norm1: norm(),
            attn1: attention(
                self.only_cross_attention
                    .then_some(self.cross_attention_dim),
            ),
            norm2: norm(),
            attn2: attention(Some(self.cross_attention_dim)),
            norm3: norm(),
            ff: FeedForwardConfig::new(self.dim).init(device),
            only_cross_attention: self.only_cross_attention,
        }
    }
}

impl<B: Backend> BasicTransformerBlock<B> {
    /// Applies the block.
    ///
    /// # Shapes
    /// - `x`, output: `[batch, tokens, dim]`
    /// - `context`: `[batch, text tokens, cross_attention_dim]`
    pub fn forward(&self, x: Tensor<B, 3>, context: &TextContext<B>) -> Tensor<B, 3> {
        let first = self.only_cross_attention.then_some(context);
        let x = self
            .attn1
            .forward_add(self.norm1.forward(x.clone()), first, x);
        let x = self
            .attn2
            .forward_add(self.norm2.forward(x.clone()), Some(context), x);
        self.ff.forward_add(self.norm3.forward(x.clone()), x)
    }
}

/// A layer between image channels and tokens: a 1x1 convolution or, with `use_linear_projection`,
/// a linear layer. The two compute the same; their weights differ in shape.
#[derive(Module, Debug)]
pub enum Projection<B: Backend> {
    /// Weight `[out, in, 1, 1]`.
    Conv(Conv2d<B>),
    /// Weight `[out, in]`.
    Linear(Linear<B>),
}

impl<B: Backend> Projection<B> {
    fn init(channels: [usize; 2], linear: bool, device: &B::Device) -> Self {
        let [from, to] = channels;
        if linear {
            Projection::Linear(LinearConfig::new(from, to).init(device))
        } else {
            Projection::Conv(Conv2dConfig::new(channels, 1).init(device))
        }
    }

    /// `[batch, tokens, in]` to `[batch, tokens, out]`.
    pub fn forward(&self, tokens: Tensor<B, 3>) -> Tensor<B, 3> {
        let (weight, bias) = self.weights();
        ops::linear(tokens, weight, bias)
    }

    /// Projects tokens, and adds the result as an image to `residual`.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, height · width, in]`
    /// - `residual`, output: `[batch, out, height, width]`
    pub fn forward_to_image(&self, tokens: Tensor<B, 3>, residual: Tensor<B, 4>) -> Tensor<B, 4> {
        let (weight, bias) = self.weights();
        ops::linear_to_image(tokens, weight, bias, residual)
    }

    /// The weight as that of a linear layer, and the bias.
    fn weights(&self) -> (Tensor<B, 2>, Option<Tensor<B, 1>>) {
        let (weight, bias) = match self {
            Projection::Linear(linear) => (linear.weight.val(), &linear.bias),
            Projection::Conv(conv) => {
                let [to, from, _, _] = conv.weight.dims();
                (conv.weight.val().reshape([to, from]), &conv.bias)
            }
        };
        (weight, bias.as_ref().map(|bias| bias.val()))
    }
}

/// Configuration of a [`Transformer2DModel`].
#[derive(Config, Debug)]
pub struct Transformer2DModelConfig {
    /// Channels of input and output, and size of the tokens.
    pub channels: usize,
    /// Number of heads; each has `channels / heads` dimensions.
    pub heads: usize,
    /// Size of the text embeddings.
    pub cross_attention_dim: usize,
    /// Groups of the norm before the first projection.
    pub norm_num_groups: usize,
    /// Number of transformer blocks.
    #[config(default = 1)]
    pub num_layers: usize,
    /// Linear layers instead of 1x1 convolutions at both ends.
    #[config(default = false)]
    pub use_linear_projection: bool,
    /// Cross-attention to the text in place of self-attention.
    #[config(default = false)]
    pub only_cross_attention: bool,
}

/// Transformer blocks over the positions of an image, with norm, projections and a residual around
/// them.
#[derive(Module, Debug)]
pub struct Transformer2DModel<B: Backend> {
    norm: GroupNorm<B>,
    proj_in: Projection<B>,
    transformer_blocks: Vec<BasicTransformerBlock<B>>,
    proj_out: Projection<B>,
}

impl Transformer2DModelConfig {
    /// The reference fixes the epsilon of this norm, whatever the network's `norm_eps` says.
    const NORM_EPS: f64 = 1e-6;

    /// A module with fresh weights.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Transformer2DModel<B> {
        let block = BasicTransformerBlockConfig {
            dim: self.channels,
            heads: self.heads,
            dim_head: self.channels / self.heads,
            cross_attention_dim: self.cross_attention_dim,
            only_cross_attention: self.only_cross_attention,
        };
        let ends = [self.channels, self.channels];
        Transformer2DModel {
            norm: GroupNormConfig::new(self.norm_num_groups, self.channels)
                .with_eps(Self::NORM_EPS)
                .init(device),
            proj_in: Projection::init(ends, self.use_linear_projection, device),
            transformer_blocks: (0..self.num_layers).map(|_| block.init(device)).collect(),
            proj_out: Projection::init(ends, self.use_linear_projection, device),
        }
    }
}

impl<B: Backend> Transformer2DModel<B> {
    /// Applies the module.
    ///
    /// # Shapes
    /// - `x`, output: `[batch, channels, height, width]`
    /// - `context`: `[batch, text tokens, cross_attention_dim]`
    pub fn forward(&self, x: Tensor<B, 4>, context: &TextContext<B>) -> Tensor<B, 4> {
        let tokens = ops::image_to_tokens(self.norm.forward(x.clone()));
        let tokens = self
            .transformer_blocks
            .iter()
            .fold(self.proj_in.forward(tokens), |tokens, block| {
                block.forward(tokens, context)
            });
        self.proj_out.forward_to_image(tokens, x)
    }
}
