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
    MidBlock2DConfig, SpatialAttentionConfig, TextContext, TimeScaleShift, Timestep,
    TimestepEmbedding, TimestepEmbeddingConfig, Timesteps, Transformer2DModelConfig, UpBlock2D,
    guidance_embedding,
};
use serde::{Deserialize, Serialize};

use crate::UNet2DConditionOptions;
use crate::class_embedding::{ClassEmbedType, ClassEmbedding, ClassEmbeddingConfig, ClassLabels};
use crate::levels::{
    BlockParts, Levels, Network, NetworkOptions, ResampleType, validate_activation, validate_levels,
};

/// The type of a down block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UNet2DConditionDownBlock {
    /// Residual blocks.
    DownBlock2D,
    /// Residual blocks, each followed by a transformer that is conditioned on the text.
    CrossAttnDownBlock2D,
    /// Residual blocks, of which the last halves the size.
    ResnetDownsampleBlock2D,
}

impl UNet2DConditionDownBlock {
    /// Whether the level has transformers.
    pub fn has_attention(self) -> bool {
        match self {
            UNet2DConditionDownBlock::DownBlock2D
            | UNet2DConditionDownBlock::ResnetDownsampleBlock2D => false,
            UNet2DConditionDownBlock::CrossAttnDownBlock2D => true,
        }
    }

    /// How the level halves the size.
    pub fn resample(self) -> ResampleType {
        match self {
            UNet2DConditionDownBlock::DownBlock2D
            | UNet2DConditionDownBlock::CrossAttnDownBlock2D => ResampleType::Conv,
            UNet2DConditionDownBlock::ResnetDownsampleBlock2D => ResampleType::Resnet,
        }
    }
}

/// The type of the middle block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UNet2DConditionMidBlock {
    /// Two residual blocks with a transformer between them.
    UNetMidBlock2DCrossAttn,
    /// One residual block.
    UNetMidBlock2D,
}

impl UNet2DConditionMidBlock {
    /// Whether the block has a transformer.
    pub fn has_attention(self) -> bool {
        match self {
            UNet2DConditionMidBlock::UNetMidBlock2DCrossAttn => true,
            UNet2DConditionMidBlock::UNetMidBlock2D => false,
        }
    }
}

/// The type of an up block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UNet2DConditionUpBlock {
    /// Residual blocks.
    UpBlock2D,
    /// Residual blocks, each followed by a transformer that is conditioned on the text.
    CrossAttnUpBlock2D,
    /// Residual blocks, of which the last doubles the size.
    ResnetUpsampleBlock2D,
}

impl UNet2DConditionUpBlock {
    /// Whether the level has transformers.
    pub fn has_attention(self) -> bool {
        match self {
            UNet2DConditionUpBlock::UpBlock2D | UNet2DConditionUpBlock::ResnetUpsampleBlock2D => {
                false
            }
            UNet2DConditionUpBlock::CrossAttnUpBlock2D => true,
        }
    }

    /// How the level doubles the size.
    pub fn resample(self) -> ResampleType {
        match self {
            UNet2DConditionUpBlock::UpBlock2D | UNet2DConditionUpBlock::CrossAttnUpBlock2D => {
                ResampleType::Conv
            }
            UNet2DConditionUpBlock::ResnetUpsampleBlock2D => ResampleType::Resnet,
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
    /// Whether transformers attend to the text only, not to positions; not the middle block's.
    pub only_cross_attention: PerLevel<bool>,
    /// Channels of each resolution level.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each down block.
    pub layers_per_block: PerLevel<usize>,
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
    /// Height and width of the input convolution's kernel.
    pub conv_in_kernel: usize,
    /// Height and width of the output convolution's kernel.
    pub conv_out_kernel: usize,
    /// How class labels are embedded.
    pub class_embed_type: Option<ClassEmbedType>,
    /// Number of classes of a network without `class_embed_type`.
    pub num_class_embeds: Option<usize>,
    /// Size of the class labels of projections.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// Whether the embedding of class labels is appended to that of the time, not added.
    pub class_embeddings_concat: bool,
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
            only_cross_attention: PerLevel::Same(false),
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
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            class_embed_type: None,
            num_class_embeds: None,
            projection_class_embeddings_input_dim: None,
            class_embeddings_concat: false,
        }
    }
}

/// A limit on the sizes of kernels in configurations.
const MAX_KERNEL: usize = 31;

/// The per-level lists of a configuration, with one entry for each level.
struct PerLevelValues {
    layers: Vec<usize>,
    heads: Vec<usize>,
    cross_attention_dim: Vec<usize>,
    transformer_layers: Vec<usize>,
    only_cross_attention: Vec<bool>,
}

impl ModelConfig for UNet2DConditionConfig {
    const CLASS: &'static str = "UNet2DConditionModel";
    const NULL_IS_A_VALUE: &'static [&'static str] = &["mid_block_type"];
    const ONLY: &'static [(&'static str, &'static [&'static str])] = &[
        ("dual_cross_attention", &["false"]),
        ("num_attention_heads", &["null"]),
        ("reverse_transformer_layers_per_block", &["null"]),
        ("encoder_hid_dim", &["null"]),
        ("encoder_hid_dim_type", &["null"]),
        ("addition_embed_type", &["null"]),
        ("addition_time_embed_dim", &["null"]),
        ("time_embedding_type", &["\"positional\""]),
        ("time_embedding_act_fn", &["null"]),
        ("timestep_post_act", &["null"]),
        ("resnet_skip_time_act", &["false"]),
        ("resnet_out_scale_factor", &["1.0"]),
        ("attention_type", &["\"default\""]),
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
        for (key, kernel) in [
            ("conv_in_kernel", self.conv_in_kernel),
            ("conv_out_kernel", self.conv_out_kernel),
        ] {
            check_size(class, key, kernel, MAX_KERNEL)?;
            if kernel.is_multiple_of(2) {
                return Err(ConfigError::unsupported(class, key, kernel, "odd numbers"));
            }
        }
        validate_activation(class, self.act_fn)?;
        self.class_embedding().validate(class)?;
        let labels = self.class_embed_type.is_some() || self.num_class_embeds.is_some();
        if self.class_embeddings_concat && !labels {
            return Err(ConfigError::unsupported(
                class,
                "class_embeddings_concat",
                true,
                "only false without class labels",
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
                || level == last && self.mid_block_type.is_some_and(|mid| mid.has_attention())
        };
        let levels = self.block_out_channels.iter().zip(heads).enumerate();
        levels.filter_map(move |(level, pair)| attends(level).then_some(pair))
    }

    fn class_embedding(&self) -> ClassEmbeddingConfig {
        ClassEmbeddingConfig {
            class_embed_type: self.class_embed_type,
            num_class_embeds: self.num_class_embeds,
            projection_dim: self.projection_class_embeddings_input_dim,
            timestep_dim: self.block_out_channels[0],
            time_embed_dim: self.time_embed_dim(),
            act_fn: self.act_fn,
        }
    }

    fn per_level_values(&self) -> Result<PerLevelValues, ConfigError> {
        fn expand_to<T: Copy + Serialize>(
            levels: usize,
            key: &str,
            value: &PerLevel<T>,
        ) -> Result<Vec<T>, ConfigError> {
            value.levels(levels).ok_or_else(|| {
                let supported = format!("one value, or as many as `block_out_channels` ({levels})");
                ConfigError::unsupported(UNet2DConditionConfig::CLASS, key, value, supported)
            })
        }
        let levels = self.block_out_channels.len();
        let expand = |key, value| expand_to(levels, key, value);
        Ok(PerLevelValues {
            layers: expand("layers_per_block", &self.layers_per_block)?,
            heads: expand("attention_head_dim", &self.attention_head_dim)?,
            cross_attention_dim: expand("cross_attention_dim", &self.cross_attention_dim)?,
            transformer_layers: expand(
                "transformer_layers_per_block",
                &self.transformer_layers_per_block,
            )?,
            only_cross_attention: expand_to(
                levels,
                "only_cross_attention",
                &self.only_cross_attention,
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
            time_embed_dim: if self.class_embeddings_concat {
                2 * self.time_embed_dim()
            } else {
                self.time_embed_dim()
            },
            norm_num_groups: self.norm_num_groups,
            norm_eps: self.norm_eps,
            time_scale_shift: self.resnet_time_scale_shift,
            downsample_padding: self.downsample_padding,
            act_fn: self.act_fn,
        };
        let transformer = |level: usize, only_cross_attention: bool| {
            SpatialAttentionConfig::Text(Transformer2DModelConfig {
                channels: channels[level],
                heads: values.heads[level],
                cross_attention_dim: values.cross_attention_dim[level],
                norm_num_groups: self.norm_num_groups,
                num_layers: values.transformer_layers[level],
                use_linear_projection: self.use_linear_projection,
                only_cross_attention,
            })
        };
        let level_transformer = |attends: bool, level: usize| {
            attends.then(|| transformer(level, values.only_cross_attention[level]))
        };
        let end_conv = |channels, kernel: usize| {
            Conv2dConfig::new(channels, kernel)
                .with_padding((kernel - 1) / 2)
                .init(device)
        };
        let last = channels.len() - 1;
        UNet2DConditionModel {
            conv_in: end_conv([self.in_channels, channels[0]], self.conv_in_kernel),
            time_embedding: TimestepEmbeddingConfig::new(channels[0], self.time_embed_dim())
                .with_cond_proj_dim(self.time_cond_proj_dim)
                .with_act_fn(self.act_fn)
                .init(device),
            class_embedding: self.class_embedding().init(device),
            down_blocks: levels.down_blocks(
                |level| {
                    let block = self.down_block_types[level];
                    BlockParts {
                        attention: level_transformer(block.has_attention(), level),
                        resample: block.resample(),
                    }
                },
                device,
            ),
            mid_block: self.mid_block_type.map(|block| {
                MidBlock2DConfig {
                    resnet: levels
                        .resnet(channels[last], channels[last])
                        .with_output_scale_factor(self.mid_block_scale_factor),
                    num_layers: usize::from(block.has_attention()),
                    attention: block.has_attention().then(|| transformer(last, false)),
                }
                .init(device)
            }),
            up_blocks: levels.up_blocks(
                |index, level| {
                    let block = self.up_block_types[index];
                    BlockParts {
                        attention: level_transformer(block.has_attention(), level),
                        resample: block.resample(),
                    }
                },
                device,
            ),
            conv_norm_out: GroupNormConfig::new(self.norm_num_groups, channels[0])
                .with_eps(self.norm_eps)
                .init(device),
            conv_out: end_conv([channels[0], self.out_channels], self.conv_out_kernel),
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
    /// Embedding of class labels.
    pub class_embedding: Option<ClassEmbedding<B>>,
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
    ///
    /// # Panics
    /// If the network needs class labels.
    pub fn forward(
        &self,
        sample: Tensor<B, 4>,
        timestep: impl Into<Timestep>,
        encoder_hidden_states: &Tensor<B, 3>,
    ) -> Tensor<B, 4> {
        let context = encoder_hidden_states.clone().into();
        self.forward_with(
            sample,
            timestep,
            &context,
            UNet2DConditionOptions::default(),
        )
    }

    /// [`forward`](Self::forward) with what some networks are conditioned on, with ControlNets, and
    /// with changes of the computation. With the same `context` in all steps of a run, its keys and
    /// values are computed once.
    ///
    /// # Shapes
    /// - `context`: `[batch, text tokens, cross_attention_dim]`
    ///
    /// # Panics
    /// If the network needs class labels and gets none, takes none, others, or not as many; or if
    /// `control` is of another kind of network, or `deep_cache` of another batch.
    pub fn forward_with(
        &self,
        sample: Tensor<B, 4>,
        timestep: impl Into<Timestep>,
        context: &TextContext<B>,
        options: UNet2DConditionOptions<'_, B>,
    ) -> Tensor<B, 4> {
        let temb = self.embed_time(&sample, &timestep.into(), options.guidance_scale);
        let temb = match options.class_labels {
            Some(labels) => {
                let classes = self.embed_classes(&sample, labels);
                if self.config.class_embeddings_concat {
                    Tensor::cat(vec![temb, classes], 1)
                } else {
                    temb + classes
                }
            }
            None => {
                let unconditioned = self.class_embedding.is_none();
                assert!(unconditioned, "this network needs class labels");
                temb
            }
        };
        let sample = if self.config.center_input_sample {
            sample * 2.0 - 1.0
        } else {
            sample
        };
        let network = Network {
            conv_in: &self.conv_in,
            down_blocks: &self.down_blocks,
            mid_block: self.mid_block.as_ref(),
            up_blocks: &self.up_blocks,
            conv_norm_out: &self.conv_norm_out,
            conv_act: self.config.act_fn,
            conv_out: &self.conv_out,
            act_fn: self.config.act_fn,
        };
        let options = NetworkOptions {
            control: options.control,
            freeu: options.freeu,
            deep_cache: options.deep_cache,
        };
        network.forward(sample, &temb, Some(context), options)
    }

    /// The time embedding for a batch like `sample`: `[batch, time_embed_dim]`.
    pub fn embed_time(
        &self,
        sample: &Tensor<B, 4>,
        timestep: &Timestep,
        guidance_scale: Option<f64>,
    ) -> Tensor<B, 2> {
        let [batch, _, _, _] = sample.dims();
        let embedding = self.project_time(sample, &timestep.rows(batch));
        let guidance = self.config.time_cond_proj_dim.zip(guidance_scale);
        let guidance = guidance.map(|(dim, scale)| {
            let row = TensorData::new(guidance_embedding(scale, dim), [1, dim]);
            Tensor::from_data(row, (&sample.device(), sample.dtype())).repeat_dim(0, batch)
        });
        self.time_embedding.forward(embedding, guidance)
    }

    /// The embedding of class labels, which is added or appended to that of the time:
    /// `[batch, time_embed_dim]`.
    ///
    /// # Panics
    /// If the network takes no class labels, others, or not as many.
    pub fn embed_classes(
        &self,
        sample: &Tensor<B, 4>,
        class_labels: &ClassLabels<B>,
    ) -> Tensor<B, 2> {
        let embedding = self.class_embedding.as_ref();
        let embedding = embedding.expect("this network takes no class labels");
        let [batch, _, _, _] = sample.dims();
        embedding.forward(class_labels, batch, sample.dtype(), |numbers| {
            self.project_time(sample, numbers)
        })
    }

    /// The sinusoidal embedding of timesteps.
    fn project_time(&self, sample: &Tensor<B, 4>, timesteps: &[f64]) -> Tensor<B, 2> {
        let time_proj = Timesteps {
            num_channels: self.config.block_out_channels[0],
            flip_sin_to_cos: self.config.flip_sin_to_cos,
            downscale_freq_shift: self.config.freq_shift,
        };
        time_proj.forward(timesteps, sample.dtype(), &sample.device())
    }
}
