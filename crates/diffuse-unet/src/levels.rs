//! The parts that both UNets share: down blocks, a middle block, and up blocks with skip
//! connections (Ronneberger et al. 2015, <https://arxiv.org/abs/1505.04597>).

use burn::tensor::{Tensor, backend::Backend};
use diffuse_nn::config::{ConfigError, MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, check_size};
use diffuse_nn::{
    Activation, Conv2d, DownBlock2D, DownBlock2DConfig, DownsamplerConfig, GroupNorm, MidBlock2D,
    ResnetBlock2DConfig, SpatialAttentionConfig, TextContext, TimeScaleShift, UpBlock2D,
    UpBlock2DConfig, UpsamplerConfig, ops,
};
use serde::{Deserialize, Serialize};

use crate::{ControlNetOutput, DeepCache, FreeU};

/// How a block changes the size of the image (`downsample_type`, `upsample_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ResampleType {
    /// A convolution.
    Conv,
    /// A residual block.
    Resnet,
}

/// What the type of a block says.
pub(crate) struct BlockParts {
    /// What follows each residual block.
    pub attention: Option<SpatialAttentionConfig>,
    pub resample: ResampleType,
}

/// The sizes of the resolution levels of a UNet.
pub(crate) struct Levels<'a> {
    /// Channels of each level, from the highest resolution.
    pub channels: &'a [usize],
    /// Residual blocks of each down block; an up block has one more.
    pub layers: Vec<usize>,
    pub time_embed_dim: usize,
    pub norm_num_groups: usize,
    pub norm_eps: f64,
    pub time_scale_shift: TimeScaleShift,
    pub downsample_padding: usize,
    pub act_fn: Activation,
}

impl Levels<'_> {
    /// The configuration of a residual block.
    pub fn resnet(&self, in_channels: usize, out_channels: usize) -> ResnetBlock2DConfig {
        ResnetBlock2DConfig::new(
            in_channels,
            out_channels,
            self.norm_num_groups,
            self.norm_eps,
        )
        .with_temb_channels(Some(self.time_embed_dim))
        .with_time_scale_shift(self.time_scale_shift)
        .with_act_fn(self.act_fn)
    }

    /// The down blocks; `parts(level)` are those of a level.
    pub fn down_blocks<B: Backend>(
        &self,
        parts: impl Fn(usize) -> BlockParts,
        device: &B::Device,
    ) -> Vec<DownBlock2D<B>> {
        let last = self.channels.len() - 1;
        (0..self.channels.len())
            .map(|level| {
                let above = self.channels[level.saturating_sub(1)];
                let parts = parts(level);
                let downsampler = match parts.resample {
                    ResampleType::Conv => DownsamplerConfig::Conv {
                        padding: self.downsample_padding,
                    },
                    ResampleType::Resnet => DownsamplerConfig::Resnet,
                };
                DownBlock2DConfig {
                    resnet: self.resnet(above, self.channels[level]),
                    num_layers: self.layers[level],
                    attention: parts.attention,
                    downsampler: (level < last).then_some(downsampler),
                }
                .init(device)
            })
            .collect()
    }

    /// The up blocks, from the lowest resolution; `parts(index, level)` also gets the index of the
    /// block.
    pub fn up_blocks<B: Backend>(
        &self,
        parts: impl Fn(usize, usize) -> BlockParts,
        device: &B::Device,
    ) -> Vec<UpBlock2D<B>> {
        let last = self.channels.len() - 1;
        (0..=last)
            .rev()
            .enumerate()
            .map(|(index, level)| {
                let channels = self.channels[level];
                let below = self.channels[(level + 1).min(last)];
                // The last skip connection of a level comes from the next higher resolution.
                let mut skip_channels = vec![channels; self.layers[level]];
                skip_channels.push(self.channels[level.saturating_sub(1)]);
                let parts = parts(index, level);
                let upsampler = match parts.resample {
                    ResampleType::Conv => UpsamplerConfig::Conv,
                    ResampleType::Resnet => UpsamplerConfig::Resnet,
                };
                UpBlock2DConfig {
                    resnet: self.resnet(below, channels),
                    skip_channels,
                    attention: parts.attention,
                    upsampler: (level > 0).then_some(upsampler),
                }
                .init(device)
            })
            .collect()
    }
}

/// Checks of the sizes that both configurations have.
pub(crate) fn validate_levels(
    class: &'static str,
    channels: &[usize],
    layers: &[usize],
    groups: usize,
    block_types: [(&str, usize); 2],
) -> Result<(), ConfigError> {
    check_size(class, "block_out_channels", channels.len(), MAX_LEVELS)?;
    for (key, count) in block_types {
        if count != channels.len() {
            let supported = format!(
                "as many entries as `block_out_channels` ({})",
                channels.len()
            );
            return Err(ConfigError::unsupported(class, key, count, supported));
        }
    }
    for layers in layers {
        check_size(class, "layers_per_block", *layers, MAX_LAYERS)?;
    }
    check_size(class, "norm_num_groups", groups, MAX_CHANNELS)?;
    for channels in channels {
        check_size(class, "block_out_channels", *channels, MAX_CHANNELS)?;
        if !channels.is_multiple_of(groups) {
            let supported = format!("multiples of `norm_num_groups` ({groups})");
            return Err(ConfigError::unsupported(
                class,
                "block_out_channels",
                channels,
                supported,
            ));
        }
    }
    Ok(())
}

/// Checks that blocks compute an activation function.
pub(crate) fn validate_activation(
    class: &'static str,
    act_fn: Activation,
) -> Result<(), ConfigError> {
    match act_fn {
        Activation::Silu | Activation::Gelu => Ok(()),
        _ => Err(ConfigError::unsupported(
            class,
            "act_fn",
            act_fn,
            "`silu` and `gelu`",
        )),
    }
}

/// The way down and the middle, which UNets and ControlNets share. Each intermediate result goes to
/// `skips`.
pub(crate) fn encode<B: Backend>(
    x: Tensor<B, 4>,
    down_blocks: &[DownBlock2D<B>],
    mid_block: Option<&MidBlock2D<B>>,
    temb: &Tensor<B, 2>,
    context: Option<&TextContext<B>>,
    skips: &mut Vec<Tensor<B, 4>>,
) -> Tensor<B, 4> {
    skips.push(x.clone());
    let mut x = x;
    for block in down_blocks {
        x = block.forward(x, Some(temb), context, skips);
    }
    match mid_block {
        Some(block) => block.forward(x, Some(temb), context),
        None => x,
    }
}

/// What changes a UNet's forward pass.
pub(crate) struct NetworkOptions<'a, B: Backend> {
    pub control: Option<&'a ControlNetOutput<B>>,
    pub freeu: Option<FreeU>,
    pub deep_cache: Option<&'a mut DeepCache<B>>,
}

impl<B: Backend> Default for NetworkOptions<'_, B> {
    fn default() -> Self {
        Self {
            control: None,
            freeu: None,
            deep_cache: None,
        }
    }
}

/// The modules of a UNet, in the order of its forward pass.
pub(crate) struct Network<'a, B: Backend> {
    pub conv_in: &'a Conv2d<B>,
    pub down_blocks: &'a [DownBlock2D<B>],
    pub mid_block: Option<&'a MidBlock2D<B>>,
    pub up_blocks: &'a [UpBlock2D<B>],
    pub conv_norm_out: &'a GroupNorm<B>,
    /// The activation function before the output convolution.
    pub conv_act: Activation,
    pub conv_out: &'a Conv2d<B>,
    /// The activation function of the blocks.
    pub act_fn: Activation,
}

impl<B: Backend> Network<'_, B> {
    /// # Shapes
    /// - `sample`: `[batch, in_channels, height, width]`
    /// - `temb`: `[batch, time_embed_dim]`
    /// - `context`: `[batch, text tokens, cross_attention_dim]`
    /// - output: `[batch, out_channels, height, width]`
    pub fn forward(
        &self,
        sample: Tensor<B, 4>,
        temb: &Tensor<B, 2>,
        context: Option<&TextContext<B>>,
        options: NetworkOptions<'_, B>,
    ) -> Tensor<B, 4> {
        ops::on_worker::<B, _>(move || {
            // Once for all residual blocks.
            let temb = &self.act_fn.forward(temb.clone());
            let x = self.conv_in.forward(sample);
            let cache = options.deep_cache;
            let cached = cache.as_ref().and_then(|cache| cache.features.clone());
            let mut skips = Vec::new();
            let mut x = if let (Some(cache), Some(_)) = (&cache, &cached) {
                skips.push(x.clone());
                let first = &self.down_blocks[0];
                first.forward_layers(x, Some(temb), context, &mut skips, cache.branch)
            } else {
                let (down_blocks, mid_block) = (self.down_blocks, self.mid_block);
                encode(x, down_blocks, mid_block, temb, context, &mut skips)
            };
            if let Some(control) = options.control {
                x = control.add_to(x, &mut skips);
            }
            let freeu = |index| options.freeu.and_then(|freeu| freeu.of_block(index));
            let (last, inner) = self.up_blocks.split_last().expect("there are levels");
            // The layers of the last up block from which on nothing is kept.
            let outer = cache.as_ref().map_or(0, |cache| {
                (last.num_layers() - 1).saturating_sub(cache.branch)
            });
            let last_layers = |x, layers, skips: &mut _| {
                last.forward_layers(x, Some(temb), context, skips, freeu(inner.len()), layers)
            };
            x = match cached {
                Some(features) => features,
                None => {
                    for (index, block) in inner.iter().enumerate() {
                        let freeu = freeu(index);
                        x = block.forward_freeu(x, Some(temb), context, &mut skips, freeu);
                    }
                    last_layers(x, 0..outer, &mut skips)
                }
            };
            if let Some(cache) = cache {
                cache.features = Some(x.clone());
            }
            let x = last_layers(x, outer..last.num_layers(), &mut skips);
            let x = self.conv_norm_out.forward_activated(x, self.conv_act);
            self.conv_out.forward(x)
        })
    }
}
