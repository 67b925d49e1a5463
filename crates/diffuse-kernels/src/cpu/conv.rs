//! Convolutions. A 1x1 one is a matrix product; a 3x3 one runs by Winograd (`winograd.rs`) on large
//! images, and by im2col on small ones and with a stride.

use burn::tensor::Tensor;
use burn_flex::Flex;
use rayon::prelude::*;

use super::Values;
use super::elementwise::{add_to_channels, upsampled};
use super::matrix::{Bias, Epilogue, KC, Matrix, operands, pack_columns, product};
use super::memory::PooledBuffer;
use super::weights::WeightSlice;
use super::winograd::winograd;
use crate::{Conv2d, ConvGeometry};

/// Values of the im2col matrix in memory at once, at least those of a channel.
const COLUMN_VALUES: usize = 1 << 21;
/// Positions of the batch from which on transforming the filters pays.
const WINOGRAD_POSITIONS: usize = 1 << 6;
/// Channels from which on 36 small products are faster than one large one.
const WINOGRAD_CHANNELS: usize = 16;

/// A batch of images: `[batch, channels, height, width]`.
#[derive(Clone, Copy)]
pub struct Images<'a> {
    pub values: &'a [f32],
    pub batch: usize,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
}

impl<'a> Images<'a> {
    pub fn area(&self) -> usize {
        self.height * self.width
    }

    /// One channel of one image.
    pub fn channel(&self, image: usize, channel: usize) -> &'a [f32] {
        let start = (image * self.channels + channel) * self.area();
        &self.values[start..start + self.area()]
    }
}

/// See [`Conv2d`]: 3x3 kernels, and 1x1 kernels without stride and padding.
pub fn conv2d(mut operation: Conv2d<Flex>) -> Result<Tensor<Flex, 4>, Conv2d<Flex>> {
    let [batch, channels, height, width] = operation.x.dims();
    let [outputs, _, kernel, other] = operation.weight.dims();
    let geometry = operation.geometry;
    let keeps_size = geometry == ConvGeometry::same(kernel);
    let is_supported = kernel == 3 || kernel == 1 && keeps_size;
    let size = operation.output_size().unwrap_or([0, 0]);
    let [rows, columns] = size;
    let sizes = [batch, channels, outputs, height, width, rows, columns];
    if !is_supported || kernel != other || sizes.contains(&0) {
        return Err(operation);
    }
    let operands = operands(&operation.x, &operation.weight, operation.bias.as_ref());
    let channel_bias = operation.channel_bias.as_ref().map(Values::of);
    let (Some((x, weight, bias)), None | Some(Some(_))) = (operands, &channel_bias) else {
        return Err(operation);
    };
    let Some(weight) = weight.values() else {
        return Err(operation);
    };
    let (x, [height, width]) = if operation.upsample {
        (upsampled(x, width), [2 * height, 2 * width])
    } else {
        (x, [height, width])
    };
    let accumulate = operation.residual.is_some();
    let images = Images {
        values: x.as_slice(),
        batch,
        channels,
        height,
        width,
    };
    let residual = operation.residual.take();
    let mut results = match Values::output(residual, [batch, outputs, rows, columns]) {
        Ok(results) => results,
        Err(residual) => {
            return Err(Conv2d {
                residual,
                ..operation
            });
        }
    };
    let out = Outputs {
        values: results.make_mut(),
        accumulate,
    };
    let bias = bias.as_slice();
    let is_large =
        batch * height * width >= WINOGRAD_POSITIONS && channels.min(outputs) >= WINOGRAD_CHANNELS;
    if kernel == 1 {
        pointwise(images, weight, bias, out);
    } else if keeps_size && is_large {
        winograd(images, weight, bias, out);
    } else {
        im2col(images, weight, bias, geometry, size, out);
    }
    if let Some(Some(bias)) = channel_bias {
        add_to_channels(results.make_mut(), bias.as_slice(), rows * columns);
    }
    Ok(results.tensor())
}

/// The output images, `[batch, channels, height, width]`.
pub struct Outputs<'a> {
    pub values: &'a mut [f32],
    /// Results are added to the values.
    pub accumulate: bool,
}

/// A 1x1 convolution: a matrix product for each image.
fn pointwise(x: Images<'_>, weight: WeightSlice<'_>, bias: &[f32], out: Outputs<'_>) {
    let (area, channels) = (x.area(), x.channels);
    let weight = Matrix::new(weight, channels);
    let epilogue = Epilogue {
        bias: Bias::PerRow(bias),
        accumulate: out.accumulate,
    };
    let convolve = |out: &mut [f32], image: &[f32]| {
        product(
            out,
            area,
            weight,
            #[inline(always)]
            |first, panels| pack_columns(image, area, first..area, channels, panels),
            #[inline(always)]
            |position, [sums], out| epilogue.store(position, sums, out),
        );
    };
    // Two at a time: threads that have finished one product find work in the other.
    let size = bias.len() * area;
    let pairs = out.values.chunks_mut(2 * size);
    for (out, images) in pairs.zip(x.values.chunks(2 * channels * area)) {
        let images = images.par_chunks(channels * area);
        let pair = out.par_chunks_mut(size).zip(images);
        pair.for_each(|(out, image)| convolve(out, image));
    }
}

/// A 3x3 convolution as a matrix product: each output position is a column, with its receptive
/// field (im2col). `size` is the height and width of the output.
pub fn im2col(
    x: Images<'_>,
    weight: WeightSlice<'_>,
    bias: &[f32],
    geometry: ConvGeometry,
    size: [usize; 2],
    out: Outputs<'_>,
) {
    let (area, outputs) = (size[0] * size[1], bias.len());
    let positions = x.batch * area;
    let at_once = (COLUMN_VALUES / positions).min(KC) / 9;
    let at_once = at_once.clamp(1, x.channels);
    let weight = Matrix::new(weight, 9 * x.channels);
    let mut columns = PooledBuffer::default();
    let columns = columns.resize(at_once * 9 * positions);
    let mut convolve = |sums: &mut [f32], accumulate| {
        let bias = Bias::PerRow(bias);
        for first in (0..x.channels).step_by(at_once) {
            let count = at_once.min(x.channels - first);
            // Rows `[channels, 9 taps, images]`.
            let rows = columns.par_chunks_mut(area).take(count * 9 * x.batch);
            rows.enumerate().for_each(|(index, row)| {
                let (tap, image) = (index / x.batch, index % x.batch);
                let from = x.channel(image, first + tap / 9);
                let tap = [tap % 9 / 3, tap % 3];
                im2col_row(tap, from, [x.height, x.width], geometry, size, row);
            });
            let epilogue = Epilogue { bias, accumulate }.after(first);
            product(
                sums,
                positions,
                weight.slice_columns(first * 9, count * 9),
                #[inline(always)]
                |first, panels| {
                    pack_columns(columns, positions, first..positions, count * 9, panels);
                },
                #[inline(always)]
                |position, [sums], out| epilogue.store(position, sums, out),
            );
        }
    };
    if x.batch == 1 {
        return convolve(out.values, out.accumulate);
    }
    let mut sums = PooledBuffer::default();
    let sums = sums.resize(outputs * positions);
    convolve(sums, false);
    let channels = out.values.par_chunks_mut(area).enumerate();
    channels.for_each(|(index, values)| {
        let (image, output) = (index / outputs, index % outputs);
        let sums = &sums[output * positions + image * area..][..area];
        if out.accumulate {
            values
                .iter_mut()
                .zip(sums)
                .for_each(|(value, sum)| *value += sum);
        } else {
            values.copy_from_slice(sums);
        }
    });
}

/// The input of one of the nine taps of a 3x3 kernel at each output position, with zero padding.
fn im2col_row(
    tap: [usize; 2],
    from: &[f32],
    [height, width]: [usize; 2],
    geometry: ConvGeometry,
    size: [usize; 2],
    to: &mut [f32],
) {
    let (stride, padding) = (geometry.stride, geometry.padding_start);
    // Output positions at which the tap is inside of the image.
    let inside = |tap: usize, inputs: usize, outputs: usize| {
        let first = padding.saturating_sub(tap).div_ceil(stride);
        first
            ..(inputs + padding)
                .saturating_sub(tap)
                .div_ceil(stride)
                .min(outputs)
    };
    let rows = inside(tap[0], height, size[0]);
    let columns = inside(tap[1], width, size[1]);
    for (y, to) in to.chunks_mut(size[1]).enumerate() {
        if !rows.contains(&y) || columns.is_empty() {
            to.fill(0.0);
            continue;
        }
        let row = &from[(y * stride + tap[0] - padding) * width..][..width];
        let row = &row[columns.start * stride + tap[1] - padding..];
        to[..columns.start].fill(0.0);
        to[columns.end..].fill(0.0);
        let to = &mut to[columns.clone()];
        if stride == 1 {
            to.copy_from_slice(&row[..to.len()]);
        } else {
            let row = row.iter().step_by(stride);
            to.iter_mut().zip(row).for_each(|(to, from)| *to = *from);
        }
    }
}
