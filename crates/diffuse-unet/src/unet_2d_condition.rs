//! The text-conditioned UNet of Stable Diffusion (Rombach et al. 2022,
//! <https://arxiv.org/abs/2112.10752>).

use burn::module::Module;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use diffuse_nn::config::{
    ConfigError, MAX_CHANNELS, MAX_LAYERS, ModelConfig, PerLevel, SampleSize, check_size,
};
use diffuse_nn::pretrained::Pretrained;
use diffuse_nn::{
    Activation, Conv2d, Conv2dConfig, DownBlock2D, GroupNorm, GroupNormConfig, MidBlock2D,
    MidBlock2DConfig, SpatialAttentionConfig, TimeScaleShift, Timestep, TimestepEmbedding,
    TimestepEmbeddingConfig, Timesteps, Transformer2DModelConfig, UpBlock2D, guidance_embedding,
};
use serde::{Deserialize, Serialize};

use crate::levels::{Levels, Network, validate_levels};

/// The type of a down block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UNet2DConditionDownBlock {
    /// Residual blocks.
    DownBlock2D,
    /// Residual blocks, each followed by a transformer that is conditioned on the text.
    CrossAttnDownBlock2D,
}

impl UNet2DConditionDownBlock {
    /// Whether the level has transformers.
    pub fn has_attention(self) -> bool {
        match self {
            UNet2DConditionDownBlock::DownBlock2D => false,
            UNet2DConditionDownBlock::CrossAttnDownBlock2D => true,
        }
    }
}

/// The type of the middle block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UNet2DConditionMidBlock {
    /// Two residual blocks with a transformer between them.
    UNetMidBlock2DCrossAttn,
}

/// The type of an up block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UNet2DConditionUpBlock {
    /// Residual blocks.
    UpBlock2D,
    /// Residual blocks, each followed by a transformer that is conditioned on the text.
    CrossAttnUpBlock2D,
}

impl UNet2DConditionUpBlock {
    /// Whether the level has transformers.
    pub fn has_attention(self) -> bool {
        match self {
            UNet2DConditionUpBlock::UpBlock2D => false,
            UNet2DConditionUpBlock::CrossAttnUpBlock2D => true,
        }
    }
}

/// The `config.json` of a [`UNet2DConditionModel`], with Diffusers' defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UNet2DConditionConfig {
    /// Version of Diffusers that wrote the file.
    #[serde(rename = "_diffusers_version", skip_serializing_if = "Option::is_none")]
    pub diffusers_version: Option<String>,
    /// Height and width of the latents.
    pub sample_size: Option<SampleSize>,
    /// Channels of the input: 4, or 9 for inpainting.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Whether inputs in `[0, 1]` are scaled to `[-1, 1]`.
    pub center_input_sample: bool,
    /// Whether cosines precede sines in the time embedding.
    pub flip_sin_to_cos: bool,
    /// Shift of the sinusoidal embedding's frequencies.
    pub freq_shift: f64,
    /// Types of the down blocks.
    pub down_block_types: Vec<UNet2DConditionDownBlock>,
    /// Type of the middle block; null for none.
    pub mid_block_type: Option<UNet2DConditionMidBlock>,
    /// Types of the up blocks, from the lowest resolution.
    pub up_block_types: Vec<UNet2DConditionUpBlock>,
    /// Channels of each resolution level.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each down block.
    pub layers_per_block: PerLevel<usize>,
    /// Padding of downsampling convolutions: 1 on each side, or 0 for below and right only.
    pub downsample_padding: usize,
    /// Divisor of the outputs of the middle block's residual blocks.
    pub mid_block_scale_factor: f64,
    /// Activation function.
    pub act_fn: Activation,
    /// Groups of all norms.
    pub norm_num_groups: usize,
    /// Epsilon of the residual blocks' norms.
    pub norm_eps: f64,
    /// Size of the text embeddings.
    pub cross_attention_dim: PerLevel<usize>,
    /// Transformer blocks in each transformer.
    pub transformer_layers_per_block: PerLevel<usize>,
    /// *Number* of attention heads: Diffusers keeps the key's wrong name for old files.
    pub attention_head_dim: PerLevel<usize>,
    /// Whether transformers have linear layers, not 1x1 convolutions, at both ends.
    pub use_linear_projection: bool,
    /// How residual blocks use the time embedding.
    pub resnet_time_scale_shift: TimeScaleShift,
    /// Size of the time embedding; four times the first level's channels by default.
    pub time_embedding_dim: Option<usize>,
    /// Size of the guidance embedding of distilled networks.
    pub time_cond_proj_dim: Option<usize>,
}

impl Default for UNet2DConditionConfig {
    fn default() -> Self {
        use {UNet2DConditionDownBlock::*, UNet2DConditionUpBlock::*};
        Self {
            diffusers_version: None,
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: vec![
                CrossAttnDownBlock2D,
                CrossAttnDownBlock2D,
                CrossAttnDownBlock2D,
                DownBlock2D,
            ],
            mid_block_type: Some(UNet2DConditionMidBlock::UNetMidBlock2DCrossAttn),
            up_block_types: vec![
                UpBlock2D,
                CrossAttnUpBlock2D,
                CrossAttnUpBlock2D,
                CrossAttnUpBlock2D,
            ],
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerLevel::Same(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            act_fn: Activation::Silu,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: PerLevel::Same(1280),
            transformer_layers_per_block: PerLevel::Same(1),
            attention_head_dim: PerLevel::Same(8),
            use_linear_projection: false,
            resnet_time_scale_shift: TimeScaleShift::Default,
            time_embedding_dim: None,
            time_cond_proj_dim: None,
        }
    }
}

/// The per-level lists of a configuration, with one entry for each level.
struct PerLevelValues {
    layers: Vec<usize>,
    heads: Vec<usize>,
    cross_attention_dim: Vec<usize>,
    transformer_layers: Vec<usize>,
}

impl ModelConfig for UNet2DConditionConfig {
    const CLASS: &'static str = "UNet2DConditionModel";
    const NULL_IS_A_VALUE: &'static [&'static str] = &["mid_block_type"];
    const ONLY: &'static [(&'static str, &'static [&'static str])] = &[
        ("only_cross_attention", &["false"]),
        ("dual_cross_attention", &["false"]),
        ("num_attention_heads", &["null"]),
        ("reverse_transformer_layers_per_block", &["null"]),
        ("encoder_hid_dim", &["null"]),
        ("encoder_hid_dim_type", &["null"]),
        ("class_embed_type", &["null"]),
        ("num_class_embeds", &["null"]),
        ("addition_embed_type", &["null"]),
        ("addition_time_embed_dim", &["null"]),
        ("projection_class_embeddings_input_dim", &["null"]),
        ("class_embeddings_concat", &["false"]),
        ("time_embedding_type", &["\"positional\""]),
        ("time_embedding_act_fn", &["null"]),
        ("timestep_post_act", &["null"]),
        ("conv_in_kernel", &["3"]),
        ("conv_out_kernel", &["3"]),
        ("attention_type", &["\"default\""]),
        ("mid_block_only_cross_attention", &["false"]),
        ("cross_attention_norm", &["null"]),
    ];

    fn validate(&self) -> Result<(), ConfigError> {
        let class = Self::CLASS;
        let values = self.per_level_values()?;
        validate_levels(
            class,
            &self.block_out_channels,
            &values.layers,
            self.norm_num_groups,
            [
                ("down_block_types", self.down_block_types.len()),
                ("up_block_types", self.up_block_types.len()),
            ],
        )?;
        for (key, value) in [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("time_embedding_dim", self.time_embed_dim()),
            ("time_cond_proj_dim", self.time_cond_proj_dim.unwrap_or(1)),
        ] {
            check_size(class, key, value, 4 * MAX_CHANNELS)?;
        }
        for dim in &values.cross_attention_dim {
            check_size(class, "cross_attention_dim", *dim, MAX_CHANNELS)?;
        }
        for layers in &values.transformer_layers {
            check_size(class, "transformer_layers_per_block", *layers, MAX_LAYERS)?;
        }
        for (channels, heads) in self.attending_levels(&values.heads) {
            check_size(class, "attention_head_dim", *heads, *channels)?;
            if !channels.is_multiple_of(*heads) {
                let supported = format!("divisors of the level's {channels} channels");
                return Err(ConfigError::unsupported(
                    class,
                    "attention_head_dim",
                    heads,
                    supported,
                ));
            }
        }
        if self.downsample_padding > 1 {
            let value = self.downsample_padding;
            return Err(ConfigError::unsupported(
                class,
                "downsample_padding",
                value,
                "0 and 1",
            ));
        }
        if self.act_fn != Activation::Silu {
            return Err(ConfigError::unsupported(
                class,
                "act_fn",
                self.act_fn,
                "`silu`",
            ));
        }
        if let Some(size) = self.sample_size {
            for side in size.dims() {
                check_size(class, "sample_size", side, MAX_CHANNELS)?;
            }
        }
        Ok(())
    }
}

impl UNet2DConditionConfig {
    fn time_embed_dim(&self) -> usize {
        self.time_embedding_dim
            .unwrap_or(4 * self.block_out_channels.first().copied().unwrap_or(0))
    }

    /// Channels and number of heads of each block with a transformer.
    fn attending_levels<'a>(
        &'a self,
        heads: &'a [usize],
    ) -> impl Iterator<Item = (&'a usize, &'a usize)> {
        let last = self.block_out_channels.len() - 1;
        let attends = move |level: usize| {
            self.down_block_types[level].has_attention()
                || self.up_block_types[last - level].has_attention()
                || level == last && self.mid_block_type.is_some()
        };
        let levels = self.block_out_channels.iter().zip(heads).enumerate();
        levels.filter_map(move |(level, pair)| attends(level).then_some(pair))
    }

    fn per_level_values(&self) -> Result<PerLevelValues, ConfigError> {
        let levels = self.block_out_channels.len();
        let expand = |key: &str, value: &PerLevel<usize>| {
            value.levels(levels).ok_or_else(|| {
                let supported = format!("one value, or as many as `block_out_channels` ({levels})");
                ConfigError::unsupported(Self::CLASS, key, value, supported)
            })
        };
        Ok(PerLevelValues {
            layers: expand("layers_per_block", &self.layers_per_block)?,
            heads: expand("attention_head_dim", &self.attention_head_dim)?,
            cross_attention_dim: expand("cross_attention_dim", &self.cross_attention_dim)?,
            transformer_layers: expand(
                "transformer_layers_per_block",
                &self.transformer_layers_per_block,
            )?,
        })
    }

    /// A model with random weights, which are drawn at their first use.
    ///
    /// # Panics
    /// If the configuration is not [valid](ModelConfig::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> UNet2DConditionModel<B> {
        let values = self
            .per_level_values()
            .unwrap_or_else(|error| panic!("{error}"));
        let channels = &self.block_out_channels;
        let levels = Levels {
            channels,
            layers: values.layers.clone(),
            time_embed_dim: self.time_embed_dim(),
            norm_num_groups: self.norm_num_groups,
            norm_eps: self.norm_eps,
            time_scale_shift: self.resnet_time_scale_shift,
            downsample_padding: self.downsample_padding,
        };
        let transformer = |level: usize| {
            SpatialAttentionConfig::Text(Transformer2DModelConfig {
                channels: channels[level],
                heads: values.heads[level],
                cross_attention_dim: values.cross_attention_dim[level],
                norm_num_groups: self.norm_num_groups,
                num_layers: values.transformer_layers[level],
                use_linear_projection: self.use_linear_projection,
            })
        };
        let last = channels.len() - 1;
        UNet2DConditionModel {
            conv_in: Conv2dConfig::new([self.in_channels, channels[0]], 3)
                .with_padding(1)
                .init(device),
            time_embedding: TimestepEmbeddingConfig::new(channels[0], levels.time_embed_dim)
                .with_cond_proj_dim(self.time_cond_proj_dim)
                .init(device),
            down_blocks: levels.down_blocks(
                |level| {
                    let block = self.down_block_types[level];
                    block.has_attention().then(|| transformer(level))
                },
                device,
            ),
            mid_block: self.mid_block_type.map(|_| {
                MidBlock2DConfig {
                    resnet: levels
                        .resnet(channels[last], channels[last])
                        .with_output_scale_factor(self.mid_block_scale_factor),
                    attention: Some(transformer(last)),
                }
                .init(device)
            }),
            up_blocks: levels.up_blocks(
                |index, level| {
                    let block = self.up_block_types[index];
                    block.has_attention().then(|| transformer(level))
                },
                device,
            ),
            conv_norm_out: GroupNormConfig::new(self.norm_num_groups, channels[0])
                .with_eps(self.norm_eps)
                .init(device),
            conv_out: Conv2dConfig::new([channels[0], self.out_channels], 3)
                .with_padding(1)
                .init(device),
            config: self.clone(),
        }
    }
}

/// The UNet of Stable Diffusion. It predicts the noise in latents, or another target (the
/// scheduler's `prediction_type`), from the latents, their timestep and a text.
#[derive(Module, Debug)]
pub struct UNet2DConditionModel<B: Backend> {
    /// Input convolution, to the first level's channels.
    pub conv_in: Conv2d<B>,
    /// MLP of the sinusoidal time embedding.
    pub time_embedding: TimestepEmbedding<B>,
    /// Down blocks.
    pub down_blocks: Vec<DownBlock2D<B>>,
    /// Middle block.
    pub mid_block: Option<MidBlock2D<B>>,
    /// Up blocks.
    pub up_blocks: Vec<UpBlock2D<B>>,
    /// Norm before the output convolution.
    pub conv_norm_out: GroupNorm<B>,
    /// Output convolution, to the channels of the latents.
    pub conv_out: Conv2d<B>,
    #[module(skip)]
    config: UNet2DConditionConfig,
}

impl<B: Backend> Pretrained<B> for UNet2DConditionModel<B> {
    type Config = UNet2DConditionConfig;

    fn config(&self) -> &UNet2DConditionConfig {
        &self.config
    }

    fn from_config(config: &UNet2DConditionConfig, device: &B::Device) -> Self {
        config.init(device)
    }
}

impl<B: Backend> UNet2DConditionModel<B> {
    /// The prediction for a batch.
    ///
    /// # Shapes
    /// - `sample`: `[batch, in_channels, height, width]`
    /// - `timestep`: in `0..num_train_timesteps`, one for all or one for each batch row
    /// - `encoder_hidden_states`: `[batch, text tokens, cross_attention_dim]`
    /// - output: `[batch, out_channels, height, width]`
    pub fn forward(
        &self,
        sample: Tensor<B, 4>,
        timestep: impl Into<Timestep>,
        encoder_hidden_states: &Tensor<B, 3>,
    ) -> Tensor<B, 4> {
        self.forward_guided(sample, timestep, encoder_hidden_states, None)
    }

    /// [`forward`](Self::forward) of a network with `time_cond_proj_dim`, which is conditioned on
    /// the guidance scale.
    pub fn forward_guided(
        &self,
        sample: Tensor<B, 4>,
        timestep: impl Into<Timestep>,
        encoder_hidden_states: &Tensor<B, 3>,
        guidance_scale: Option<f64>,
    ) -> Tensor<B, 4> {
        let sample = if self.config.center_input_sample {
            sample * 2.0 - 1.0
        } else {
            sample
        };
        let temb = self.embed_time(&sample, &timestep.into(), guidance_scale);
        Network {
            conv_in: &self.conv_in,
            down_blocks: &self.down_blocks,
            mid_block: self.mid_block.as_ref(),
            up_blocks: &self.up_blocks,
            conv_norm_out: &self.conv_norm_out,
            conv_out: &self.conv_out,
        }
        .forward(sample, &temb, Some(encoder_hidden_states))
    }

    /// The time embedding for a batch like `sample`: `[batch, time_embed_dim]`.
    pub fn embed_time(
        &self,
        sample: &Tensor<B, 4>,
        timestep: &Timestep,
        guidance_scale: Option<f64>,
    ) -> Tensor<B, 2> {
        let [batch, _, _, _] = sample.dims();
        let (dtype, device) = (sample.dtype(), sample.device());
        let time_proj = Timesteps {
            num_channels: self.config.block_out_channels[0],
            flip_sin_to_cos: self.config.flip_sin_to_cos,
            downscale_freq_shift: self.config.freq_shift,
        };
        let embedding = time_proj.forward(&timestep.rows(batch), dtype, &device);
        let guidance = self.config.time_cond_proj_dim.zip(guidance_scale);
        let guidance = guidance.map(|(dim, scale)| {
            let row = TensorData::new(guidance_embedding(scale, dim), [1, dim]);
            Tensor::from_data(row, (&device, dtype)).repeat_dim(0, batch)
        });
        self.time_embedding.forward(embedding, guidance)
    }
}
