//! What changes the forward pass of a UNet.

use burn::tensor::{Tensor, backend::Backend};
use diffuse_nn::FreeUFactors;

use crate::{ClassLabels, ControlNetOutput};

/// Options of [`UNet2DConditionModel::forward_with`](crate::UNet2DConditionModel::forward_with).
#[derive(Debug)]
pub struct UNet2DConditionOptions<'a, B: Backend> {
    /// The guidance scale, for a network that is conditioned on it (`time_cond_proj_dim`).
    pub guidance_scale: Option<f64>,
    /// Class labels, for a network that is conditioned on them.
    pub class_labels: Option<&'a ClassLabels<B>>,
    /// What ControlNets add.
    pub control: Option<&'a ControlNetOutput<B>>,
    /// Changes the balance of backbone and skip connections.
    pub freeu: Option<FreeU>,
    /// Computes the inner blocks, and keeps their result here, or takes what is kept here.
    pub deep_cache: Option<&'a mut DeepCache<B>>,
}

impl<B: Backend> Default for UNet2DConditionOptions<'_, B> {
    fn default() -> Self {
        Self {
            guidance_scale: None,
            class_labels: None,
            control: None,
            freeu: None,
            deep_cache: None,
        }
    }
}

/// FreeU (Si et al. 2023, <https://arxiv.org/abs/2309.11497>): the factors of the first two up
/// blocks. It costs no training; the paper's authors give 0.9, 0.2, 1.5, 1.6 for Stable Diffusion
/// v1-5.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FreeU {
    /// Factor of the low frequencies of the first up block's skip connections.
    pub s1: f64,
    /// Factor of the low frequencies of the second up block's skip connections.
    pub s2: f64,
    /// Factor of half of the first up block's channels.
    pub b1: f64,
    /// Factor of half of the second up block's channels.
    pub b2: f64,
}

impl FreeU {
    /// The factors of an up block, counted from the lowest resolution.
    pub(crate) fn of_block(self, index: usize) -> Option<FreeUFactors> {
        let (backbone, skip) = match index {
            0 => (self.b1, self.s1),
            1 => (self.b2, self.s2),
            _ => return None,
        };
        Some(FreeUFactors { backbone, skip })
    }
}

/// DeepCache (Ma et al. 2023, <https://arxiv.org/abs/2312.00858>): what the inner blocks give, which
/// changes slowly from step to step. A forward pass with an empty cache fills it; with a full one it
/// computes the outer layers only.
#[derive(Debug, Clone)]
pub struct DeepCache<B: Backend> {
    /// The skip connection that is the last to be computed (`cache_branch_id`).
    pub(crate) branch: usize,
    /// `[batch, channels, height, width]`
    pub(crate) features: Option<Tensor<B, 4>>,
}

impl<B: Backend> DeepCache<B> {
    /// An empty cache. `branch` is the skip connection that is the last to be computed, from 0, the
    /// input convolution's, to the number of residual blocks of the first down block
    /// (`cache_branch_id`): the larger, the slower and the more exact.
    pub fn new(branch: usize) -> Self {
        Self {
            branch,
            features: None,
        }
    }

    /// Makes the next forward pass compute everything.
    pub fn clear(&mut self) {
        self.features = None;
    }
}
