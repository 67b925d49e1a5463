//! ControlNet: a copy of the UNet's encoder that sees one more image, and adds to the UNet's skip
//! connections (Zhang et al. 2023, <https://arxiv.org/abs/2302.05543>).

use std::ops::Add;

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use diffuse_nn::config::{
    ConfigError, MAX_CHANNELS, MAX_LEVELS, ModelConfig, PerLevel, check_size,
};
use diffuse_nn::pretrained::Pretrained;
use diffuse_nn::{
    Activation, Conv2d, Conv2dConfig, DownBlock2D, MidBlock2D, TimeScaleShift, Timestep,
    TimestepEmbedding, Timesteps, ops,
};
use serde::{Deserialize, Serialize};

use crate::levels::encode;
use crate::{
    UNet2DConditionConfig, UNet2DConditionDownBlock, UNet2DConditionMidBlock,
    UNet2DConditionUpBlock,
};

/// The order of the colors that a ControlNet was trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ChannelOrder {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red.
    Bgr,
}

/// The `config.json` of a [`ControlNetModel`], with Diffusers' defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ControlNetConfig {
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the image that it sees.
    pub conditioning_channels: usize,
    /// Whether cosines precede sines in the time embedding.
    pub flip_sin_to_cos: bool,
    /// Shift of the sinusoidal embedding's frequencies.
    pub freq_shift: f64,
    /// Types of the down blocks.
    pub down_block_types: Vec<UNet2DConditionDownBlock>,
    /// Type of the middle block.
    pub mid_block_type: UNet2DConditionMidBlock,
    /// Whether transformers attend to the text only; not the middle block's.
    pub only_cross_attention: PerLevel<bool>,
    /// Channels of each resolution level.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each down block.
    pub layers_per_block: usize,
    /// Padding of downsampling convolutions: 1 on each side, or 0 for below and right only.
    pub downsample_padding: usize,
    /// Divisor of the outputs of the middle block's residual blocks.
    pub mid_block_scale_factor: f64,
    /// Activation function: `silu` or `gelu`.
    pub act_fn: Activation,
    /// Groups of all norms.
    pub norm_num_groups: usize,
    /// Epsilon of the residual blocks' norms.
    pub norm_eps: f64,
    /// Size of the text embeddings.
    pub cross_attention_dim: usize,
    /// Transformer blocks in each transformer.
    pub transformer_layers_per_block: PerLevel<usize>,
    /// *Number* of attention heads, as in [`UNet2DConditionConfig`].
    pub attention_head_dim: PerLevel<usize>,
    /// Whether transformers have linear layers, not 1x1 convolutions, at both ends.
    pub use_linear_projection: bool,
    /// How residual blocks use the time embedding.
    pub resnet_time_scale_shift: TimeScaleShift,
    /// The order of the colors.
    pub controlnet_conditioning_channel_order: ChannelOrder,
    /// Channels of the image's embedding, from the highest resolution.
    pub conditioning_embedding_out_channels: Vec<usize>,
    /// Whether residuals are averaged over positions.
    pub global_pool_conditions: bool,
}

impl Default for ControlNetConfig {
    fn default() -> Self {
        let unet = UNet2DConditionConfig::default();
        Self {
            in_channels: unet.in_channels,
            conditioning_channels: 3,
            flip_sin_to_cos: unet.flip_sin_to_cos,
            freq_shift: unet.freq_shift,
            down_block_types: unet.down_block_types,
            mid_block_type: UNet2DConditionMidBlock::UNetMidBlock2DCrossAttn,
            only_cross_attention: unet.only_cross_attention,
            block_out_channels: unet.block_out_channels,
            layers_per_block: 2,
            downsample_padding: unet.downsample_padding,
            mid_block_scale_factor: unet.mid_block_scale_factor,
            act_fn: unet.act_fn,
            norm_num_groups: unet.norm_num_groups,
            norm_eps: unet.norm_eps,
            cross_attention_dim: 1280,
            transformer_layers_per_block: unet.transformer_layers_per_block,
            attention_head_dim: unet.attention_head_dim,
            use_linear_projection: unet.use_linear_projection,
            resnet_time_scale_shift: unet.resnet_time_scale_shift,
            controlnet_conditioning_channel_order: ChannelOrder::Rgb,
            conditioning_embedding_out_channels: vec![16, 32, 96, 256],
            global_pool_conditions: false,
        }
    }
}

impl ModelConfig for ControlNetConfig {
    const CLASS: &'static str = "ControlNetModel";
    const ONLY: &'static [(&'static str, &'static [&'static str])] = &[
        ("num_attention_heads", &["null"]),
        ("encoder_hid_dim", &["null"]),
        ("encoder_hid_dim_type", &["null"]),
        ("addition_embed_type", &["null"]),
        ("class_embed_type", &["null"]),
        ("num_class_embeds", &["null"]),
    ];

    fn validate(&self) -> Result<(), ConfigError> {
        let class = Self::CLASS;
        let channels = &self.conditioning_embedding_out_channels;
        let key = "conditioning_embedding_out_channels";
        check_size(class, key, channels.len(), MAX_LEVELS)?;
        for channels in channels {
            check_size(class, key, *channels, MAX_CHANNELS)?;
        }
        let channels = self.conditioning_channels;
        check_size(class, "conditioning_channels", channels, MAX_CHANNELS)?;
        self.encoder().validate().map_err(|error| match error {
            ConfigError::Unsupported {
                key,
                value,
                supported,
                ..
            } => ConfigError::Unsupported {
                class,
                key,
                value,
                supported,
            },
            error => error,
        })
    }
}

impl ControlNetConfig {
    /// A UNet with the same encoder.
    pub fn encoder(&self) -> UNet2DConditionConfig {
        let up_block = |block: &UNet2DConditionDownBlock| match block.has_attention() {
            true => UNet2DConditionUpBlock::CrossAttnUpBlock2D,
            false => UNet2DConditionUpBlock::UpBlock2D,
        };
        UNet2DConditionConfig {
            in_channels: self.in_channels,
            flip_sin_to_cos: self.flip_sin_to_cos,
            freq_shift: self.freq_shift,
            down_block_types: self.down_block_types.clone(),
            mid_block_type: Some(self.mid_block_type),
            up_block_types: self.down_block_types.iter().rev().map(up_block).collect(),
            only_cross_attention: self.only_cross_attention.clone(),
            block_out_channels: self.block_out_channels.clone(),
            layers_per_block: PerLevel::Same(self.layers_per_block),
            downsample_padding: self.downsample_padding,
            mid_block_scale_factor: self.mid_block_scale_factor,
            act_fn: self.act_fn,
            norm_num_groups: self.norm_num_groups,
            norm_eps: self.norm_eps,
            cross_attention_dim: PerLevel::Same(self.cross_attention_dim),
            transformer_layers_per_block: self.transformer_layers_per_block.clone(),
            attention_head_dim: self.attention_head_dim.clone(),
            use_linear_projection: self.use_linear_projection,
            resnet_time_scale_shift: self.resnet_time_scale_shift,
            ..UNet2DConditionConfig::default()
        }
    }

    /// Pixels of the image per latent position in each direction: 8 for Stable Diffusion v1.
    pub fn downscale(&self) -> usize {
        1 << (self.conditioning_embedding_out_channels.len() - 1)
    }

    /// Channels of the residuals: for each skip connection, then for the middle block.
    pub fn residual_channels(&self) -> Vec<usize> {
        residual_channels(&self.encoder())
    }

    /// Whether the residuals are those that a UNet takes.
    pub fn fits(&self, unet: &UNet2DConditionConfig) -> bool {
        self.residual_channels() == residual_channels(unet)
    }

    /// A model with random weights, which are drawn at their first use.
    ///
    /// # Panics
    /// If the configuration is not [valid](ModelConfig::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> ControlNetModel<B> {
        // Of the whole UNet only the encoder is kept; no weight has been drawn.
        let unet = self.encoder().init(device);
        let conv1x1 = |channels: usize| Conv2dConfig::new([channels, channels], 1).init(device);
        let mut residuals: Vec<_> = self.residual_channels().into_iter().map(conv1x1).collect();
        ControlNetModel {
            conv_in: unet.conv_in,
            time_embedding: unet.time_embedding,
            controlnet_cond_embedding: self.cond_embedding(device),
            down_blocks: unet.down_blocks,
            mid_block: unet.mid_block.expect("the encoder has a middle block"),
            controlnet_mid_block: residuals.pop().expect("the last is the middle block's"),
            controlnet_down_blocks: residuals,
            config: self.clone(),
        }
    }

    fn cond_embedding<B: Backend>(&self, device: &B::Device) -> ControlNetConditioningEmbedding<B> {
        let conv = |channels: [usize; 2], stride: usize| {
            let config = Conv2dConfig::new(channels, 3).with_padding(1);
            config.with_stride(stride).init(device)
        };
        let channels = &self.conditioning_embedding_out_channels;
        let last = channels[channels.len() - 1];
        let level = |pair: &[usize]| [conv([pair[0]; 2], 1), conv([pair[0], pair[1]], 2)];
        ControlNetConditioningEmbedding {
            conv_in: conv([self.conditioning_channels, channels[0]], 1),
            blocks: channels.windows(2).flat_map(level).collect(),
            conv_out: conv([last, self.block_out_channels[0]], 1),
        }
    }
}

/// Channels of a UNet's skip connections, in the order in which they are made, then those of its
/// middle block.
fn residual_channels(unet: &UNet2DConditionConfig) -> Vec<usize> {
    let channels = &unet.block_out_channels;
    let last = channels.len() - 1;
    let layers = unet.layers_per_block.levels(channels.len());
    let layers = layers.unwrap_or_default();
    let level = |(level, layers): (usize, &usize)| {
        let count = layers + usize::from(level < last);
        std::iter::repeat_n(channels[level], count)
    };
    let mut residuals = vec![channels[0]];
    residuals.extend(layers.iter().enumerate().flat_map(level));
    residuals.push(channels[last]);
    residuals
}

/// The convolutions that bring an image to the size of the latents.
#[derive(Module, Debug)]
pub struct ControlNetConditioningEmbedding<B: Backend> {
    /// From the image's channels.
    pub conv_in: Conv2d<B>,
    /// Two for each halving: at the same size, then with a stride of two.
    pub blocks: Vec<Conv2d<B>>,
    /// To the first level's channels.
    pub conv_out: Conv2d<B>,
}

impl<B: Backend> ControlNetConditioningEmbedding<B> {
    fn forward(&self, image: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::on_worker::<B, _>(|| {
            let x = ops::silu(self.conv_in.forward(image));
            let blocks = self.blocks.iter();
            let x = blocks.fold(x, |x, block| ops::silu(block.forward(x)));
            self.conv_out.forward(x)
        })
    }
}

/// A ControlNet of Stable Diffusion. It computes what is added to a UNet from the latents, their
/// timestep, a text and an image (edges, a pose, ...).
#[derive(Module, Debug)]
pub struct ControlNetModel<B: Backend> {
    /// Input convolution, to the first level's channels.
    pub conv_in: Conv2d<B>,
    /// MLP of the sinusoidal time embedding.
    pub time_embedding: TimestepEmbedding<B>,
    /// Embedding of the image, which is added to the latents'.
    pub controlnet_cond_embedding: ControlNetConditioningEmbedding<B>,
    /// Down blocks.
    pub down_blocks: Vec<DownBlock2D<B>>,
    /// Middle block.
    pub mid_block: MidBlock2D<B>,
    /// 1x1 convolutions, one for each skip connection.
    pub controlnet_down_blocks: Vec<Conv2d<B>>,
    /// 1x1 convolution after the middle block.
    pub controlnet_mid_block: Conv2d<B>,
    #[module(skip)]
    config: ControlNetConfig,
}

impl<B: Backend> Pretrained<B> for ControlNetModel<B> {
    type Config = ControlNetConfig;

    fn config(&self) -> &ControlNetConfig {
        &self.config
    }

    fn from_config(config: &ControlNetConfig, device: &B::Device) -> Self {
        config.init(device)
    }
}

impl<B: Backend> ControlNetModel<B> {
    /// The embedding of an image, which is the same for all timesteps.
    ///
    /// # Shapes
    /// - `image`: `[batch, conditioning_channels, height, width]` in `[0, 1]`
    /// - output: `[batch, block_out_channels[0], height / 8, width / 8]`
    pub fn embed_condition(&self, image: Tensor<B, 4>) -> Tensor<B, 4> {
        self.controlnet_cond_embedding.forward(
            match self.config.controlnet_conditioning_channel_order {
                ChannelOrder::Rgb => image,
                ChannelOrder::Bgr => image.flip([1]),
            },
        )
    }

    /// What is added to a UNet.
    ///
    /// # Shapes
    /// - `sample`: `[batch, in_channels, height, width]`
    /// - `timestep`: in `0..num_train_timesteps`, one for all or one for each batch row
    /// - `encoder_hidden_states`: `[batch, text tokens, cross_attention_dim]`
    /// - `condition`: the image as [`embed_condition`](Self::embed_condition) gives it,
    ///   `[batch, block_out_channels[0], height, width]`
    pub fn forward(
        &self,
        sample: Tensor<B, 4>,
        timestep: impl Into<Timestep>,
        encoder_hidden_states: &Tensor<B, 3>,
        condition: Tensor<B, 4>,
    ) -> ControlNetOutput<B> {
        let [batch, _, _, _] = sample.dims();
        let time_proj = Timesteps {
            num_channels: self.config.block_out_channels[0],
            flip_sin_to_cos: self.config.flip_sin_to_cos,
            downscale_freq_shift: self.config.freq_shift,
        };
        let timesteps = timestep.into().rows(batch);
        let temb = time_proj.forward(&timesteps, sample.dtype(), &sample.device());
        let temb = self.time_embedding.forward(temb, None);
        let context = encoder_hidden_states.clone().into();
        ops::on_worker::<B, _>(move || {
            let temb = &self.config.act_fn.forward(temb);
            let x = self.conv_in.forward(sample) + condition;
            let mut skips = Vec::new();
            let (down_blocks, mid_block) = (&self.down_blocks, Some(&self.mid_block));
            let context = Some(&context);
            let x = encode(x, down_blocks, mid_block, temb, context, &mut skips);
            let residuals = skips.into_iter().zip(&self.controlnet_down_blocks);
            let output = ControlNetOutput {
                down_block_res_samples: residuals.map(|(x, conv)| conv.forward(x)).collect(),
                mid_block_res_sample: self.controlnet_mid_block.forward(x),
            };
            if self.config.global_pool_conditions {
                output.map(|_, x| x.mean_dims(&[2, 3]))
            } else {
                output
            }
        })
    }
}

/// The residuals of several ControlNets are added up.
///
/// # Panics
/// If they have other numbers of residuals.
impl<B: Backend> Add for ControlNetOutput<B> {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let count = other.down_block_res_samples.len();
        assert_eq!(self.down_block_res_samples.len(), count, "residuals");
        self.map(|index, x| {
            let others = &other.down_block_res_samples;
            let other = others.get(index).unwrap_or(&other.mid_block_res_sample);
            x + other.clone()
        })
    }
}

/// What a ControlNet adds to a UNet. Averages over positions have height and width one.
#[derive(Debug, Clone)]
pub struct ControlNetOutput<B: Backend> {
    /// For each skip connection: `[batch, channels, height, width]`.
    pub down_block_res_samples: Vec<Tensor<B, 4>>,
    /// For the middle block: `[batch, channels, height, width]`.
    pub mid_block_res_sample: Tensor<B, 4>,
}

impl<B: Backend> ControlNetOutput<B> {
    /// Changes all residuals; the function also gets their index, the middle block's last.
    pub fn map(mut self, change: impl Fn(usize, Tensor<B, 4>) -> Tensor<B, 4>) -> Self {
        let down = std::mem::take(&mut self.down_block_res_samples);
        Self {
            mid_block_res_sample: change(down.len(), self.mid_block_res_sample),
            down_block_res_samples: (0..).zip(down).map(|(i, x)| change(i, x)).collect(),
        }
    }

    /// Multiplies all residuals (`controlnet_conditioning_scale`).
    pub fn scale(self, scale: f64) -> Self {
        self.map(|_, x| x * scale)
    }

    /// Multiplies the residuals by factors that rise from 0.1 to 1, as without a prompt
    /// (`guess_mode`; Zhang et al. 2023).
    pub fn scale_for_guess_mode(self) -> Self {
        let last = self.down_block_res_samples.len() as f64;
        self.map(|index, x| x * 10.0_f64.powf(index as f64 / last - 1.0))
    }

    /// Puts zeros for as many rows before the batch: nothing is added to the unconditional half of
    /// a guided batch.
    pub fn with_unconditional_zeros(self) -> Self {
        self.map(|_, x| Tensor::cat(vec![x.zeros_like(), x], 0))
    }

    /// The middle block's output with its residual; those of the skip connections are added in
    /// place. A network that leaves out its inner blocks has the first skip connections only.
    pub(crate) fn add_to(&self, x: Tensor<B, 4>, skips: &mut [Tensor<B, 4>]) -> Tensor<B, 4> {
        let residuals = &self.down_block_res_samples;
        assert!(residuals.len() >= skips.len(), "residuals");
        for (skip, residual) in skips.iter_mut().zip(residuals) {
            *skip = skip.clone() + residual.clone();
        }
        if residuals.len() > skips.len() {
            return x;
        }
        x + self.mid_block_res_sample.clone()
    }
}
