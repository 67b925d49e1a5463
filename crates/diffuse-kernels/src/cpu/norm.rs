//! Group and layer normalisation.

use burn::tensor::Tensor;
use burn_flex::Flex;
use rayon::prelude::*;

use super::{Values, memory::PooledBuffer, mul_add, silu_of, tensor, vectorized};
use crate::{GroupNorm, LayerNorm};

/// Independent partial sums, for the vectoriser.
const SUMS: usize = 64;
/// Values that are summed in `f32`; sums of such blocks are `f64`.
const BLOCK: usize = 1 << 12;

/// The sum of `f` of each value.
#[inline(always)]
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut total = 0.0;
    for block in values.chunks(BLOCK) {
        let mut sums = [0.0_f32; SUMS];
        let (rows, rest) = block.as_chunks::<SUMS>();
        for row in rows {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += f(*value);
            }
        }
        // Adds halves: the compiler can vectorise that.
        let mut sums = sums.map(f64::from);
        let mut half = SUMS / 2;
        while half > 0 {
            let (sums, others) = sums.split_at_mut(half);
            for (sum, other) in sums.iter_mut().zip(others) {
                *sum += *other;
            }
            half /= 2;
        }
        total += sums[0];
        total += rest.iter().map(|value| f64::from(f(*value))).sum::<f64>();
    }
    total
}

/// Mean and `1 / √(variance + eps)`.
#[inline(always)]
fn statistics(values: &[f32], eps: f64) -> (f32, f32) {
    let count = values.len() as f64;
    let mean = (sum(values, |value| value) / count) as f32;
    let variance = sum(values, |value| (value - mean) * (value - mean)) / count;
    (mean, (1.0 / (variance + eps).sqrt()) as f32)
}

/// See [`GroupNorm`]; in place if no other tensor shares the values.
pub fn group_norm(operation: GroupNorm<Flex>) -> Result<Tensor<Flex, 4>, GroupNorm<Flex>> {
    let shape = operation.x.dims();
    let [_, channels, height, width] = shape;
    let parameters = [&operation.weight, &operation.bias].map(Values::of);
    let [Some(weight), Some(bias)] = parameters else {
        return Err(operation);
    };
    let GroupNorm {
        groups, eps, silu, ..
    } = operation;
    let mut x = match Values::take(operation.x) {
        Ok(x) => x,
        Err(x) => return Err(GroupNorm { x, ..operation }),
    };
    let (area, per_group) = (height * width, channels / groups);
    let size = per_group * area;
    if x.as_slice().is_empty() {
        return Ok(x.tensor());
    }
    // Normalises `from` into `group`, or `group` in place.
    let normalize = |index: usize, group: &mut [f32], from: Option<&[f32]>| {
        let first = index % groups * per_group;
        vectorized(
            #[inline(always)]
            || {
                let (mean, factor) = statistics(from.unwrap_or(group), eps);
                for (channel, values) in group.chunks_mut(area).enumerate() {
                    if let Some(from) = from {
                        values.copy_from_slice(&from[channel * area..][..area]);
                    }
                    let scale = factor * weight.as_slice()[first + channel];
                    let shift = bias.as_slice()[first + channel] - mean * scale;
                    for value in values {
                        let y = mul_add(*value, scale, shift);
                        *value = if silu { silu_of(y) } else { y };
                    }
                }
            },
        );
    };
    if let Some(values) = x.unique_mut() {
        let groups = values.par_chunks_mut(size).enumerate();
        groups.for_each(|(index, group)| normalize(index, group, None));
        return Ok(x.tensor());
    }
    let mut out = PooledBuffer::new(x.as_slice().len());
    let groups = out.par_chunks_mut(size).zip(x.as_slice().par_chunks(size));
    let groups = groups.enumerate();
    groups.for_each(|(index, (group, from))| normalize(index, group, Some(from)));
    Ok(tensor(out, shape))
}

/// See [`LayerNorm`].
pub fn layer_norm<const D: usize>(
    operation: LayerNorm<Flex, D>,
) -> Result<Tensor<Flex, D>, LayerNorm<Flex, D>> {
    normalized(&operation).ok_or(operation)
}

fn normalized<const D: usize>(operation: &LayerNorm<Flex, D>) -> Option<Tensor<Flex, D>> {
    let (shape, eps) = (operation.x.dims(), operation.eps);
    let x = Values::of(&operation.x)?;
    let (weight, bias) = (Values::of(&operation.weight)?, Values::of(&operation.bias)?);
    let mut out = PooledBuffer::new(x.as_slice().len());
    if !out.is_empty() {
        normalize_rows(
            x.as_slice(),
            weight.as_slice(),
            bias.as_slice(),
            eps,
            &mut out,
        );
    }
    Some(tensor(out, shape))
}

fn normalize_rows(x: &[f32], weight: &[f32], bias: &[f32], eps: f64, out: &mut [f32]) {
    let width = weight.len();
    let rows = out.par_chunks_mut(width).zip(x.par_chunks(width));
    rows.for_each(|(out, x)| {
        vectorized(
            #[inline(always)]
            || {
                let (mean, factor) = statistics(x, eps);
                let affine = weight.iter().zip(bias);
                for ((out, x), (weight, bias)) in out.iter_mut().zip(x).zip(affine) {
                    *out = mul_add((x - mean) * factor, *weight, *bias);
                }
            },
        );
    });
}
