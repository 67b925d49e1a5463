//! Activations, and operations that copy or add.

use burn::tensor::Tensor;
use burn_flex::Flex;
use rayon::prelude::*;

use super::{Values, gelu_of, memory::PooledBuffer, silu_of, tensor, vectorized};
use crate::{
    Activation, AddChannelBias, ConcatChannels, Function, ImageToTokens, TokensToImage, Upsample2x,
};

/// Values of a task: they fit a core's own cache, and are worth a task.
const CHUNK: usize = 1 << 14;

/// See [`Activation`].
pub fn activation<const D: usize>(
    operation: Activation<Flex, D>,
) -> Result<Tensor<Flex, D>, Activation<Flex, D>> {
    let Some(x) = Values::of(&operation.x) else {
        return Err(operation);
    };
    let y = apply(operation.function, x.as_slice());
    Ok(tensor(y, operation.x.dims()))
}

fn apply(function: Function, x: &[f32]) -> PooledBuffer {
    match function {
        Function::Silu => map(x, silu_of),
        Function::Gelu => map(x, gelu_of),
        Function::QuickGelu => map(
            x,
            #[inline(always)]
            |x| silu_of(1.702 * x) * (1.0 / 1.702),
        ),
    }
}

#[inline(always)]
fn map(x: &[f32], function: impl Fn(f32) -> f32 + Sync) -> PooledBuffer {
    let mut out = PooledBuffer::new(x.len());
    let chunks = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
    chunks.for_each(|(out, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (out, x) in out.iter_mut().zip(x) {
                    *out = function(*x);
                }
            },
        );
    });
    out
}

/// See [`AddChannelBias`]; in place if no other tensor shares the values.
pub fn add_channel_bias(
    operation: AddChannelBias<Flex>,
) -> Result<Tensor<Flex, 4>, AddChannelBias<Flex>> {
    let AddChannelBias { x, bias } = operation;
    let [batch, channels, height, width] = x.dims();
    if [batch, channels, height, width].contains(&0) {
        return Ok(x);
    }
    let Some(values) = Values::of(&bias) else {
        return Err(AddChannelBias { x, bias });
    };
    match Values::take(x) {
        Ok(mut x) => {
            add_to_channels(x.make_mut(), values.as_slice(), height * width);
            Ok(x.tensor())
        }
        Err(x) => Err(AddChannelBias { x, bias }),
    }
}

/// Adds `bias[i % bias.len()]` to channel `i` of `area` values: `bias` is repeated for each image.
pub fn add_to_channels(values: &mut [f32], bias: &[f32], area: usize) {
    let channels = values.par_chunks_mut(area).enumerate();
    channels.for_each(|(index, channel)| {
        let bias = bias[index % bias.len()];
        vectorized(
            #[inline(always)]
            || channel.iter_mut().for_each(|value| *value += bias),
        );
    });
}

/// See [`ConcatChannels`].
pub fn concat_channels(
    operation: ConcatChannels<Flex>,
) -> Result<Tensor<Flex, 4>, ConcatChannels<Flex>> {
    concat(&operation.a, &operation.b).ok_or(operation)
}

fn concat(a: &Tensor<Flex, 4>, b: &Tensor<Flex, 4>) -> Option<Tensor<Flex, 4>> {
    let ([batch, channels, height, width], [_, others, ..]) = (a.dims(), b.dims());
    let (a, b) = (Values::of(a)?, Values::of(b)?);
    let (a, b) = (a.as_slice(), b.as_slice());
    if a.is_empty() || b.is_empty() {
        return None;
    }
    let size = (channels + others) * height * width;
    let mut out = PooledBuffer::new(batch * size);
    let images = out
        .par_chunks_mut(size)
        .zip(a.par_chunks(a.len() / batch))
        .zip(b.par_chunks(b.len() / batch));
    images.for_each(|((out, a), b)| {
        let (first, second) = out.split_at_mut(a.len());
        copy(first, a);
        copy(second, b);
    });
    Some(tensor(out, [batch, channels + others, height, width]))
}

/// Copies in parallel.
pub fn copy(to: &mut [f32], from: &[f32]) {
    let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
    chunks.for_each(|(to, from)| to.copy_from_slice(from));
}

/// See [`Upsample2x`].
pub fn upsample_2x(operation: Upsample2x<Flex>) -> Result<Tensor<Flex, 4>, Upsample2x<Flex>> {
    let [_, _, _, width] = operation.x.dims();
    match Values::of(&operation.x) {
        Some(x) => Ok(upsampled(x, width).tensor()),
        None => Err(operation),
    }
}

/// Images of this width at twice their size, each pixel repeated.
pub fn upsampled(x: Values, width: usize) -> Values {
    let [batch, channels, height] = x.leading_dims();
    let shape = [batch, channels, 2 * height, 2 * width];
    let mut out = PooledBuffer::new(4 * x.as_slice().len());
    if out.is_empty() {
        return Values::new(out, shape);
    }
    let rows = out
        .par_chunks_mut(4 * width)
        .zip(x.as_slice().par_chunks(width));
    rows.for_each(|(out, row)| {
        let (first, second) = out.split_at_mut(2 * width);
        let (pairs, _) = first.as_chunks_mut::<2>();
        for (pair, value) in pairs.iter_mut().zip(row) {
            *pair = [*value; 2];
        }
        second.copy_from_slice(first);
    });
    Values::new(out, shape)
}

/// See [`ImageToTokens`].
pub fn image_to_tokens(
    operation: ImageToTokens<Flex>,
) -> Result<Tensor<Flex, 3>, ImageToTokens<Flex>> {
    let [batch, channels, height, width] = operation.x.dims();
    let positions = height * width;
    match Values::of(&operation.x) {
        Some(x) => Ok(tensor(
            transposed(x.as_slice(), [channels, positions]),
            [batch, positions, channels],
        )),
        None => Err(operation),
    }
}

/// See [`TokensToImage`].
pub fn tokens_to_image(
    operation: TokensToImage<Flex>,
) -> Result<Tensor<Flex, 4>, TokensToImage<Flex>> {
    let [batch, positions, channels] = operation.x.dims();
    let [height, width] = operation.size;
    match Values::of(&operation.x) {
        Some(x) => Ok(tensor(
            transposed(x.as_slice(), [positions, channels]),
            [batch, channels, height, width],
        )),
        None => Err(operation),
    }
}

/// `[batch, a, b]` to `[batch, b, a]`.
fn transposed(x: &[f32], [a, b]: [usize; 2]) -> PooledBuffer {
    /// Side of the blocks that are transposed one by one.
    const SIDE: usize = 16;
    let mut out = PooledBuffer::new(x.len());
    if out.is_empty() {
        return out;
    }
    let matrices = out.par_chunks_mut(a * b).zip(x.par_chunks(a * b));
    matrices.for_each(|(out, x)| {
        out.par_chunks_mut(SIDE * a)
            .enumerate()
            .for_each(|(block, out)| {
                let first = block * SIDE;
                for start in (0..a).step_by(SIDE) {
                    for (column, out) in out.chunks_mut(a).enumerate() {
                        let end = a.min(start + SIDE);
                        for (row, out) in out[start..end].iter_mut().enumerate() {
                            *out = x[(start + row) * b + first + column];
                        }
                    }
                }
            });
    });
    out
}
