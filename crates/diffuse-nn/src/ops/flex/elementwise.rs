use burn::tensor::{Tensor, backend::Backend};
use rayon::prelude::*;

use super::{Values, memory::Room, tensor, vectorized};

/// Values of one task: small enough for the cache next to a core, large enough to be worth a task.
const CHUNK: usize = 1 << 14;

/// See [`silu`](crate::ops::silu).
pub fn silu<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    map(x, super::silu_of)
}

/// See [`gelu`](crate::ops::gelu).
pub fn gelu<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    map(x, super::gelu_of)
}

/// See [`quick_gelu`](crate::ops::quick_gelu).
pub fn quick_gelu<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    map(
        x,
        #[inline(always)]
        |x| super::silu_of(1.702 * x) * (1.0 / 1.702),
    )
}

#[inline(always)]
fn map<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    function: impl Fn(f32) -> f32 + Sync,
) -> Option<Tensor<B, D>> {
    let shape = x.dims();
    let x = Values::of(x)?;
    let mut out = Room::new(x.as_slice().len());
    let chunks = out
        .par_chunks_mut(CHUNK)
        .zip(x.as_slice().par_chunks(CHUNK));
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
    Some(tensor(out, shape))
}

/// See [`add_channel_bias`](crate::ops::add_channel_bias); in place where nobody else has the values.
pub fn add_channel_bias<B: Backend>(
    x: Tensor<B, 4>,
    bias: &Tensor<B, 2>,
) -> Result<Tensor<B, 4>, Tensor<B, 4>> {
    let [batch, channels, height, width] = x.dims();
    if [batch, channels, height, width].contains(&0) {
        return Ok(x);
    }
    let Some(bias) = Values::of(bias) else {
        return Err(x);
    };
    let mut x = Values::take(x)?;
    add_to_channels(x.make_mut(), bias.as_slice(), height * width);
    Ok(x.tensor())
}

/// Adds a value to each channel, `area` values long, and begins again where the channels are more than the values.
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

/// See [`concat_channels`](crate::ops::concat_channels).
pub fn concat_channels<B: Backend>(a: &Tensor<B, 4>, b: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    let ([batch, channels, height, width], [_, others, ..]) = (a.dims(), b.dims());
    let (a, b) = (Values::of(a)?, Values::of(b)?);
    let (a, b) = (a.as_slice(), b.as_slice());
    if a.is_empty() || b.is_empty() {
        return None;
    }
    let size = (channels + others) * height * width;
    let mut out = Room::new(batch * size);
    let pictures = out
        .par_chunks_mut(size)
        .zip(a.par_chunks(a.len() / batch))
        .zip(b.par_chunks(b.len() / batch));
    pictures.for_each(|((out, a), b)| {
        let (first, second) = out.split_at_mut(a.len());
        copy(first, a);
        copy(second, b);
    });
    Some(tensor(out, [batch, channels + others, height, width]))
}

/// Copies with all threads.
pub fn copy(to: &mut [f32], from: &[f32]) {
    let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
    chunks.for_each(|(to, from)| to.copy_from_slice(from));
}

/// See [`upsample_nearest`](crate::ops::upsample_nearest): to twice the size.
pub fn upsample_twice<B: Backend>(x: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    let [batch, channels, height, width] = x.dims();
    let x = Values::of(x)?;
    let mut out = Room::new(4 * x.as_slice().len());
    if out.is_empty() {
        return None;
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
    Some(tensor(out, [batch, channels, 2 * height, 2 * width]))
}

/// `[batch, a, b]` to `[batch, b, a]`.
pub fn swap_tokens<B: Backend>(x: &Tensor<B, 3>) -> Option<Tensor<B, 3>> {
    /// Side of the squares that are read along one way and written along the other.
    const SIDE: usize = 16;
    let [batch, a, b] = x.dims();
    let x = Values::of(x)?;
    let x = x.as_slice();
    let mut out = Room::new(x.len());
    if out.is_empty() {
        return Some(tensor(out, [batch, b, a]));
    }
    let stripes = out.par_chunks_mut(a * b).zip(x.par_chunks(a * b));
    stripes.for_each(|(out, x)| {
        out.par_chunks_mut(SIDE * a)
            .enumerate()
            .for_each(|(stripe, out)| {
                let first = stripe * SIDE;
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
    Some(tensor(out, [batch, b, a]))
}
