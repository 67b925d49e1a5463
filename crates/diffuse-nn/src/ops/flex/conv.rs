//! Convolutions as matrix products: 1x1 ones are, small pictures become columns, large ones go through `winograd.rs`.

use burn::tensor::{Tensor, backend::Backend};
use rayon::prelude::*;

use super::elementwise::add_to_channels;
use super::matrix::{Matrix, Threads, multiply};
use super::winograd::winograd;
use super::{Values, memory::zeros, tensor};
use crate::ops::ConvGeometry;

/// Values of the columns that are held at once, if that is a channel or more.
const COLUMNS: usize = 1 << 21;
/// Positions of all pictures from which on transforming the filters pays.
const POSITIONS: usize = 1 << 10;
/// Channels from which on 36 small products are faster than one.
const CHANNELS: usize = 16;

/// A batch of pictures: `[batch, channels, height, width]`.
#[derive(Clone, Copy)]
pub struct Pictures<'a> {
    pub values: &'a [f32],
    pub batch: usize,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
}

impl<'a> Pictures<'a> {
    pub fn area(&self) -> usize {
        self.height * self.width
    }

    /// One channel of one picture.
    pub fn channel(&self, picture: usize, channel: usize) -> &'a [f32] {
        let start = (picture * self.channels + channel) * self.area();
        &self.values[start..start + self.area()]
    }
}

/// See [`conv2d`](crate::ops::conv2d): those with a kernel of 1 or 3 that keep the size of a picture.
pub fn conv2d<B: Backend>(
    x: &Tensor<B, 4>,
    weight: &Tensor<B, 4>,
    bias: Option<&Tensor<B, 1>>,
    geometry: ConvGeometry,
) -> Option<Tensor<B, 4>> {
    let [batch, channels, height, width] = x.dims();
    let [outputs, _, kernel, other] = weight.dims();
    let padding = kernel / 2;
    let keeps_size = geometry
        == ConvGeometry {
            stride: 1,
            padding_start: padding,
            padding_end: padding,
        };
    let sizes = [batch, channels, outputs, height, width];
    if !keeps_size || kernel != other || ![1, 3].contains(&kernel) || sizes.contains(&0) {
        return None;
    }
    let (x, weight) = (Values::of(x)?, Values::of(weight)?);
    let bias = match bias {
        Some(bias) => Some(Values::of(bias)?),
        None => None,
    };
    let no_bias = vec![0.0; if bias.is_none() { outputs } else { 0 }];
    let bias = bias.as_ref().map_or(&no_bias[..], Values::as_slice);
    let pictures = Pictures {
        values: x.as_slice(),
        batch,
        channels,
        height,
        width,
    };
    let weight = weight.as_slice();
    let mut out = zeros(batch * outputs * height * width);
    if kernel == 1 {
        pointwise(pictures, weight, bias, &mut out);
    } else if batch * height * width >= POSITIONS && channels.min(outputs) >= CHANNELS {
        winograd(pictures, weight, bias, &mut out);
    } else {
        columns(pictures, weight, bias, &mut out);
    }
    Some(tensor(out, [batch, outputs, height, width]))
}

/// A 1x1 convolution: a matrix product for each picture.
fn pointwise(x: Pictures<'_>, weight: &[f32], bias: &[f32], out: &mut [f32]) {
    let (area, channels, outputs) = (x.area(), x.channels, bias.len());
    let weight = Matrix::new(weight, outputs, channels);
    let pictures = out
        .chunks_mut(outputs * area)
        .zip(x.values.chunks(channels * area));
    for (out, picture) in pictures {
        let picture = Matrix::new(picture, channels, area);
        multiply(out, area, weight, picture, false, Threads::All);
    }
    add_to_channels(out, bias, area);
}

/// `im2col`: each position's neighbourhood becomes a column, and the convolution a matrix product.
pub fn columns(x: Pictures<'_>, weight: &[f32], bias: &[f32], out: &mut [f32]) {
    let (area, outputs) = (x.area(), bias.len());
    let positions = x.batch * area;
    let at_once = (COLUMNS / (9 * positions)).clamp(1, x.channels);
    let mut columns = zeros(at_once * 9 * positions);
    let mut convolve = |sums: &mut [f32]| {
        for first in (0..x.channels).step_by(at_once) {
            let count = at_once.min(x.channels - first);
            // Rows of channels, of taps in them, of pictures in those.
            let rows = columns.par_chunks_mut(area).take(count * 9 * x.batch);
            rows.enumerate().for_each(|(index, row)| {
                let (tap, picture) = (index / x.batch, index % x.batch);
                let from = x.channel(picture, first + tap / 9);
                let tap = [tap % 9 / 3, tap % 3];
                shifted(from, [x.height, x.width], tap, row);
            });
            let weight = Matrix {
                values: &weight[first * 9..],
                rows: outputs,
                columns: count * 9,
                row_stride: x.channels * 9,
                column_stride: 1,
            };
            let columns = Matrix::new(&columns, count * 9, positions);
            multiply(sums, positions, weight, columns, first > 0, Threads::All);
        }
    };
    if x.batch == 1 {
        convolve(out);
        return add_to_channels(out, bias, area);
    }
    let mut sums = zeros(outputs * positions);
    convolve(&mut sums);
    let channels = out.par_chunks_mut(area).enumerate();
    channels.for_each(|(index, out)| {
        let (picture, output) = (index / outputs, index % outputs);
        out.copy_from_slice(&sums[output * positions + picture * area..][..area]);
    });
    add_to_channels(out, bias, area);
}

/// A picture as one of the nine taps of a 3x3 kernel sees it: moved by `tap - 1`, with zeros outside.
fn shifted(from: &[f32], [height, width]: [usize; 2], tap: [usize; 2], to: &mut [f32]) {
    for (y, to) in to.chunks_mut(width).enumerate() {
        let row = (y + tap[0]).checked_sub(1).filter(|row| *row < height);
        let Some(row) = row.map(|row| &from[row * width..][..width]) else {
            to.fill(0.0);
            continue;
        };
        match tap[1] {
            0 => {
                to[0] = 0.0;
                to[1..].copy_from_slice(&row[..width - 1]);
            }
            1 => to.copy_from_slice(row),
            _ => {
                to[..width - 1].copy_from_slice(&row[1..]);
                to[width - 1] = 0.0;
            }
        }
    }
}
