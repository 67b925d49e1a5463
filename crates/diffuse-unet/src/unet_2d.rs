//! The unconditional UNet of DDPM (Ho et al. 2020, <https://arxiv.org/abs/2006.11239>, appendix B).

use burn::module::Module;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use diffuse_nn::checkpoint::modern_attention_name;
use diffuse_nn::config::{ConfigError, MAX_CHANNELS, ModelConfig, SampleSize, check_size};
use diffuse_nn::pretrained::Pretrained;
use diffuse_nn::{
    Activation, AttentionConfig, Conv2d, Conv2dConfig, DownBlock2D, GaussianFourierProjection,
    GaussianFourierProjectionConfig, GroupNorm, GroupNormConfig, MidBlock2D, MidBlock2DConfig,
    SpatialAttentionConfig, TimeScaleShift, Timestep, TimestepEmbedding, TimestepEmbeddingConfig,
    Timesteps, UpBlock2D,
};
use serde::{Deserialize, Serialize};

use crate::class_embedding::{ClassEmbedType, ClassEmbedding, ClassEmbeddingConfig, ClassLabels};
use crate::levels::{
    BlockParts, Levels, Network, NetworkOptions, ResampleType, validate_activation, validate_levels,
};

/// How timesteps are embedded (`time_embedding_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TimeEmbeddingType {
    /// Sinusoids.
    Positional,
    /// Random Fourier features of the noise's standard deviation, by which the output is divided.
    Fourier,
}

/// The type of a down block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UNet2DDownBlock {
    /// Residual blocks.
    DownBlock2D,
    /// Residual blocks, each followed by self-attention.
    AttnDownBlock2D,
    /// Residual blocks, of which the last halves the size.
    ResnetDownsampleBlock2D,
}

impl UNet2DDownBlock {
    fn has_attention(self) -> bool {
        match self {
            UNet2DDownBlock::DownBlock2D | UNet2DDownBlock::ResnetDownsampleBlock2D => false,
            UNet2DDownBlock::AttnDownBlock2D => true,
        }
    }

    /// How the block halves the size; `downsample_type` is for blocks with attention.
    fn resample(self, downsample_type: ResampleType) -> ResampleType {
        match self {
            UNet2DDownBlock::DownBlock2D => ResampleType::Conv,
            UNet2DDownBlock::AttnDownBlock2D => downsample_type,
            UNet2DDownBlock::ResnetDownsampleBlock2D => ResampleType::Resnet,
        }
    }
}

/// The type of the middle block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UNet2DMidBlock {
    /// Two residual blocks with self-attention between them.
    UNetMidBlock2D,
}

/// The type of an up block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UNet2DUpBlock {
    /// Residual blocks.
    UpBlock2D,
    /// Residual blocks, each followed by self-attention.
    AttnUpBlock2D,
    /// Residual blocks, of which the last doubles the size.
    ResnetUpsampleBlock2D,
}

impl UNet2DUpBlock {
    fn has_attention(self) -> bool {
        match self {
            UNet2DUpBlock::UpBlock2D | UNet2DUpBlock::ResnetUpsampleBlock2D => false,
            UNet2DUpBlock::AttnUpBlock2D => true,
        }
    }

    /// How the block doubles the size; `upsample_type` is for blocks with attention.
    fn resample(self, upsample_type: ResampleType) -> ResampleType {
        match self {
            UNet2DUpBlock::UpBlock2D => ResampleType::Conv,
            UNet2DUpBlock::AttnUpBlock2D => upsample_type,
            UNet2DUpBlock::ResnetUpsampleBlock2D => ResampleType::Resnet,
        }
    }
}

/// The `config.json` of a [`UNet2DModel`], with Diffusers' defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UNet2DConfig {
    /// Height and width of the images.
    pub sample_size: Option<SampleSize>,
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Whether inputs in `[0, 1]` are scaled to `[-1, 1]`.
    pub center_input_sample: bool,
    /// How timesteps are embedded.
    pub time_embedding_type: TimeEmbeddingType,
    /// Size of the time embedding; four times the first level's channels by default.
    pub time_embedding_dim: Option<usize>,
    /// Shift of the sinusoidal embedding's frequencies.
    pub freq_shift: f64,
    /// Whether cosines precede sines in the time embedding.
    pub flip_sin_to_cos: bool,
    /// Types of the down blocks.
    pub down_block_types: Vec<UNet2DDownBlock>,
    /// Type of the middle block; null for none.
    pub mid_block_type: Option<UNet2DMidBlock>,
    /// Types of the up blocks, from the lowest resolution.
    pub up_block_types: Vec<UNet2DUpBlock>,
    /// Channels of each resolution level.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each down block.
    pub layers_per_block: usize,
    /// Divisor of the outputs of the middle block's parts.
    pub mid_block_scale_factor: f64,
    /// Padding of downsampling convolutions: 1 on each side, or 0 for below and right only.
    pub downsample_padding: usize,
    /// How blocks with attention halve the size.
    pub downsample_type: ResampleType,
    /// How blocks with attention double the size.
    pub upsample_type: ResampleType,
    /// Activation function: `silu` or `gelu`.
    pub act_fn: Activation,
    /// Channels of each attention head; null for a single head.
    pub attention_head_dim: Option<usize>,
    /// Groups of all norms.
    pub norm_num_groups: usize,
    /// Groups of the norm before the middle block's attention, if not `norm_num_groups`.
    pub attn_norm_num_groups: Option<usize>,
    /// Epsilon of all norms.
    pub norm_eps: f64,
    /// How residual blocks use the time embedding.
    pub resnet_time_scale_shift: TimeScaleShift,
    /// Whether the middle block has attention.
    pub add_attention: bool,
    /// How class labels are embedded: `timestep` or `identity`.
    pub class_embed_type: Option<ClassEmbedType>,
    /// Number of classes of a network without `class_embed_type`.
    pub num_class_embeds: Option<usize>,
}

impl Default for UNet2DConfig {
    fn default() -> Self {
        use {UNet2DDownBlock::*, UNet2DUpBlock::*};
        Self {
            sample_size: None,
            in_channels: 3,
            out_channels: 3,
            center_input_sample: false,
            time_embedding_type: TimeEmbeddingType::Positional,
            time_embedding_dim: None,
            freq_shift: 0.0,
            flip_sin_to_cos: true,
            down_block_types: vec![
                DownBlock2D,
                AttnDownBlock2D,
                AttnDownBlock2D,
                AttnDownBlock2D,
            ],
            mid_block_type: Some(UNet2DMidBlock::UNetMidBlock2D),
            up_block_types: vec![AttnUpBlock2D, AttnUpBlock2D, AttnUpBlock2D, UpBlock2D],
            block_out_channels: vec![224, 448, 672, 896],
            layers_per_block: 2,
            mid_block_scale_factor: 1.0,
            downsample_padding: 1,
            downsample_type: ResampleType::Conv,
            upsample_type: ResampleType::Conv,
            act_fn: Activation::Silu,
            attention_head_dim: Some(8),
            norm_num_groups: 32,
            attn_norm_num_groups: None,
            norm_eps: 1e-5,
            resnet_time_scale_shift: TimeScaleShift::Default,
            add_attention: true,
            class_embed_type: None,
            num_class_embeds: None,
        }
    }
}

impl ModelConfig for UNet2DConfig {
    const CLASS: &'static str = "UNet2DModel";
    const NULL_IS_A_VALUE: &'static [&'static str] = &["attention_head_dim", "mid_block_type"];

    fn validate(&self) -> Result<(), ConfigError> {
        let class = Self::CLASS;
        validate_levels(
            class,
            &self.block_out_channels,
            &[self.layers_per_block],
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
        ] {
            check_size(class, key, value, 4 * MAX_CHANNELS)?;
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
        validate_activation(class, self.act_fn)?;
        match self.class_embed_type {
            None | Some(ClassEmbedType::Timestep | ClassEmbedType::Identity) => {}
            Some(ClassEmbedType::Projection | ClassEmbedType::SimpleProjection) => {
                let value = self.class_embed_type;
                let supported = "null, `timestep` and `identity`";
                return Err(ConfigError::unsupported(
                    class,
                    "class_embed_type",
                    value,
                    supported,
                ));
            }
        }
        self.class_embedding().validate(class)?;
        for (channels, attends) in self.attending_levels() {
            let head_dim = self.attention_head_dim.unwrap_or(channels);
            if attends && (head_dim == 0 || !channels.is_multiple_of(head_dim)) {
                let supported = format!("divisors of the levels' channels, here {channels}");
                return Err(ConfigError::unsupported(
                    class,
                    "attention_head_dim",
                    head_dim,
                    supported,
                ));
            }
        }
        if let (Some(groups), Some(channels)) =
            (self.attn_norm_num_groups, self.block_out_channels.last())
            && (groups == 0 || !channels.is_multiple_of(groups))
        {
            let supported = format!("divisors of the last level's {channels} channels");
            return Err(ConfigError::unsupported(
                class,
                "attn_norm_num_groups",
                groups,
                supported,
            ));
        }
        if let Some(size) = self.sample_size {
            let multiple = 1 << (self.block_out_channels.len() - 1);
            for side in size.dims() {
                check_size(class, "sample_size", side, MAX_CHANNELS)?;
                if !side.is_multiple_of(multiple) {
                    let supported = format!("multiples of {multiple}, for its number of levels");
                    return Err(ConfigError::unsupported(
                        class,
                        "sample_size",
                        side,
                        supported,
                    ));
                }
            }
        }
        Ok(())
    }
}

impl UNet2DConfig {
    fn time_embed_dim(&self) -> usize {
        self.time_embedding_dim
            .unwrap_or(4 * self.block_out_channels[0])
    }

    /// Size of the embedding before the first linear layer.
    fn timestep_dim(&self) -> usize {
        match self.time_embedding_type {
            TimeEmbeddingType::Positional => self.block_out_channels[0],
            TimeEmbeddingType::Fourier => 2 * self.block_out_channels[0],
        }
    }

    fn class_embedding(&self) -> ClassEmbeddingConfig {
        ClassEmbeddingConfig {
            class_embed_type: self.class_embed_type,
            num_class_embeds: self.num_class_embeds,
            projection_dim: None,
            timestep_dim: self.timestep_dim(),
            time_embed_dim: self.time_embed_dim(),
            act_fn: Activation::Silu,
        }
    }

    /// Channels of each block that may have attention, and whether it has.
    fn attending_levels(&self) -> impl Iterator<Item = (usize, bool)> {
        let channels = &self.block_out_channels;
        let down = channels.iter().zip(&self.down_block_types);
        let up = channels.iter().rev().zip(&self.up_block_types);
        let mid = self.mid_block_type.is_some() && self.add_attention;
        down.map(|(channels, block)| (*channels, block.has_attention()))
            .chain(up.map(|(channels, block)| (*channels, block.has_attention())))
            .chain(channels.last().map(|channels| (*channels, mid)))
    }

    /// Self-attention over a level: heads of `attention_head_dim` channels.
    fn attention(&self, channels: usize, norm_num_groups: Option<usize>) -> AttentionConfig {
        let head_dim = self.attention_head_dim.unwrap_or(channels);
        AttentionConfig::new(channels, channels / head_dim, head_dim)
            .with_qkv_bias(true)
            .with_norm_num_groups(norm_num_groups)
            .with_norm_eps(self.norm_eps)
    }

    /// A model with random weights, which are drawn at their first use.
    ///
    /// # Panics
    /// If the configuration is not [valid](ModelConfig::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> UNet2DModel<B> {
        let channels = &self.block_out_channels;
        let levels = Levels {
            channels,
            layers: vec![self.layers_per_block; channels.len()],
            time_embed_dim: self.time_embed_dim(),
            norm_num_groups: self.norm_num_groups,
            norm_eps: self.norm_eps,
            time_scale_shift: self.resnet_time_scale_shift,
            downsample_padding: self.downsample_padding,
            act_fn: self.act_fn,
        };
        let level_attention = |attends: bool, level: usize| {
            let config = self.attention(channels[level], Some(self.norm_num_groups));
            attends.then_some(SpatialAttentionConfig::Image(config))
        };
        let bottom = *channels.last().expect("a UNet has levels");
        // Diffusers has no such norm in blocks that scale and shift.
        let mid_groups = self.attn_norm_num_groups.or_else(|| {
            let plain = self.resnet_time_scale_shift == TimeScaleShift::Default;
            plain.then_some(self.norm_num_groups)
        });
        let mid_attention = self
            .attention(bottom, mid_groups)
            .with_rescale_output_factor(self.mid_block_scale_factor);
        UNet2DModel {
            conv_in: Conv2dConfig::new([self.in_channels, channels[0]], 3)
                .with_padding(1)
                .init(device),
            time_proj: match self.time_embedding_type {
                TimeEmbeddingType::Positional => None,
                TimeEmbeddingType::Fourier => {
                    let config = GaussianFourierProjectionConfig::new(channels[0], FOURIER_SCALE);
                    Some(config.init(device))
                }
            },
            time_embedding: TimestepEmbeddingConfig::new(
                self.timestep_dim(),
                levels.time_embed_dim,
            )
            .init(device),
            class_embedding: self.class_embedding().init(device),
            down_blocks: levels.down_blocks(
                |level| {
                    let block = self.down_block_types[level];
                    BlockParts {
                        attention: level_attention(block.has_attention(), level),
                        resample: block.resample(self.downsample_type),
                    }
                },
                device,
            ),
            mid_block: self.mid_block_type.map(|_| {
                MidBlock2DConfig {
                    resnet: levels
                        .resnet(bottom, bottom)
                        .with_output_scale_factor(self.mid_block_scale_factor),
                    num_layers: 1,
                    attention: self
                        .add_attention
                        .then_some(SpatialAttentionConfig::Image(mid_attention)),
                }
                .init(device)
            }),
            up_blocks: levels.up_blocks(
                |index, level| {
                    let block = self.up_block_types[index];
                    BlockParts {
                        attention: level_attention(block.has_attention(), level),
                        resample: block.resample(self.upsample_type),
                    }
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

/// Standard deviation of fresh Fourier frequencies.
const FOURIER_SCALE: f64 = 16.0;

/// The UNet of DDPM. It predicts the noise in an image, or another target (the scheduler's
/// `prediction_type`), from the image and its timestep.
#[derive(Module, Debug)]
pub struct UNet2DModel<B: Backend> {
    /// Input convolution, to the first level's channels.
    pub conv_in: Conv2d<B>,
    /// Fourier features of the noise's standard deviation, in place of sinusoids.
    pub time_proj: Option<GaussianFourierProjection<B>>,
    /// MLP of the time embedding.
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
    /// Output convolution, to the channels of the image.
    pub conv_out: Conv2d<B>,
    #[module(skip)]
    config: UNet2DConfig,
}

impl<B: Backend> Pretrained<B> for UNet2DModel<B> {
    type Config = UNet2DConfig;

    fn config(&self) -> &UNet2DConfig {
        &self.config
    }

    fn from_config(config: &UNet2DConfig, device: &B::Device) -> Self {
        config.init(device)
    }

    fn current_key(key: &str) -> Option<String> {
        Some(modern_attention_name(key))
    }
}

impl<B: Backend> UNet2DModel<B> {
    /// The prediction for a batch.
    ///
    /// # Shapes
    /// - `sample`: `[batch, in_channels, height, width]`, sides multiples of `2^(levels - 1)`
    /// - `timestep`: in `0..num_train_timesteps`, or the noise's standard deviation for a network
    ///   with Fourier features; one for all or one for each batch row
    /// - output: `[batch, out_channels, height, width]`
    ///
    /// # Panics
    /// If the network needs class labels.
    pub fn forward(&self, sample: Tensor<B, 4>, timestep: impl Into<Timestep>) -> Tensor<B, 4> {
        assert!(
            self.class_embedding.is_none(),
            "this network needs class labels"
        );
        let timestep = timestep.into();
        let temb = self.embed_time(&sample, &timestep);
        self.forward_embedded(sample, &timestep, &temb)
    }

    /// [`forward`](Self::forward) of a network that is conditioned on class labels.
    ///
    /// # Panics
    /// If the network takes no class labels, others, or not as many.
    pub fn forward_with_classes(
        &self,
        sample: Tensor<B, 4>,
        timestep: impl Into<Timestep>,
        class_labels: &ClassLabels<B>,
    ) -> Tensor<B, 4> {
        let timestep = timestep.into();
        let temb = self.embed_time(&sample, &timestep) + self.embed_classes(&sample, class_labels);
        self.forward_embedded(sample, &timestep, &temb)
    }

    fn forward_embedded(
        &self,
        sample: Tensor<B, 4>,
        timestep: &Timestep,
        temb: &Tensor<B, 2>,
    ) -> Tensor<B, 4> {
        let sample = if self.config.center_input_sample {
            sample * 2.0 - 1.0
        } else {
            sample
        };
        let output = Network {
            conv_in: &self.conv_in,
            down_blocks: &self.down_blocks,
            mid_block: self.mid_block.as_ref(),
            up_blocks: &self.up_blocks,
            conv_norm_out: &self.conv_norm_out,
            conv_act: Activation::Silu,
            conv_out: &self.conv_out,
            act_fn: self.config.act_fn,
        }
        .forward(sample, temb, None, NetworkOptions::default());
        match self.config.time_embedding_type {
            TimeEmbeddingType::Positional => output,
            TimeEmbeddingType::Fourier => {
                let [batch, _, _, _] = output.dims();
                let sigmas = TensorData::new(timestep.rows(batch), [batch, 1, 1, 1]);
                let target = (&output.device(), output.dtype());
                output / Tensor::from_data(sigmas, target)
            }
        }
    }

    /// The time embedding for a batch like `sample`: `[batch, time_embed_dim]`.
    pub fn embed_time(&self, sample: &Tensor<B, 4>, timestep: &Timestep) -> Tensor<B, 2> {
        let [batch, _, _, _] = sample.dims();
        let embedding = self.project_time(sample, &timestep.rows(batch));
        self.time_embedding.forward(embedding, None)
    }

    /// The embedding of class labels, which is added to that of the time:
    /// `[batch, time_embed_dim]`.
    ///
    /// # Panics
    /// As [`forward_with_classes`](Self::forward_with_classes).
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

    /// The fixed embedding of timesteps.
    fn project_time(&self, sample: &Tensor<B, 4>, timesteps: &[f64]) -> Tensor<B, 2> {
        if let Some(fourier) = &self.time_proj {
            return fourier.forward(timesteps, sample.dtype());
        }
        let time_proj = Timesteps {
            num_channels: self.config.block_out_channels[0],
            flip_sin_to_cos: self.config.flip_sin_to_cos,
            downscale_freq_shift: self.config.freq_shift,
        };
        time_proj.forward(timesteps, sample.dtype(), &sample.device())
    }
}
