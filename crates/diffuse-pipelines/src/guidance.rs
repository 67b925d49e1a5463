//! Classifier-free guidance (Ho & Salimans 2022, <https://arxiv.org/abs/2207.12598>).

use burn::tensor::{Tensor, backend::Backend};

/// `unconditional + scale · (conditional - unconditional)`; all `[batch, channels, height, width]`.
pub fn guide<B: Backend>(
    unconditional: Tensor<B, 4>,
    conditional: Tensor<B, 4>,
    scale: f64,
) -> Tensor<B, 4> {
    unconditional.clone() + (conditional - unconditional) * scale
}

/// Gives guided noise the spread of the conditional noise, mixed in by `rescale` (Lin et al. 2023,
/// <https://arxiv.org/abs/2305.08891>, section 3.4): `rescale · guided · std(conditional) /
/// std(guided) + (1 - rescale) · guided`, a standard deviation for each batch row.
pub fn rescale_noise<B: Backend>(
    guided: Tensor<B, 4>,
    conditional: Tensor<B, 4>,
    rescale: f64,
) -> Tensor<B, 4> {
    let shape = guided.dims();
    let [batch, channels, height, width] = shape;
    let rows = [batch, channels * height * width];
    let guided = guided.reshape(rows);
    let ratio = conditional.reshape(rows).var(1).sqrt() / guided.clone().var(1).sqrt();
    let factor = ratio * rescale + (1.0 - rescale);
    (guided * factor).reshape(shape)
}
