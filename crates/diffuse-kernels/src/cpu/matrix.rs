//! Matrix products, and linear layers.

use std::ops::{Range, RangeInclusive};

use burn::tensor::{Tensor, backend::Backend};
use rayon::prelude::*;

use super::kernel::{COLUMNS, Column, Line, ROWS, tile, transpose};
use super::memory::PooledBuffer;
use super::weights::{Weight, Weights};
use super::{Values, gelu_of, tensor, vectorized};
use crate::{Linear, LinearGeglu, LinearToImage};

/// Lines of packed columns that are held at once, 4 MB: they stay in the cache that all cores
/// share.
const LINES: usize = 1 << 15;
/// The same for each thread, 1 MB, if that is more.
const THREAD_LINES: usize = 1 << 13;
/// Terms of a sum at once: those of a few rows and of a tile's columns stay in the cache next to a
/// core.
pub const DEPTH: usize = 1 << 12;
/// Tasks a thread: enough for threads that end early to find more.
pub const TASKS: usize = 4;
/// Steps that are packed at once: so many of a row are read side by side.
const STEPS: usize = 64;
/// Packed values of rows, 8 MB, up to which all of them are packed once, where they are needed
/// again.
const ALL_ROWS: usize = 1 << 21;
/// Tiles whose columns are packed at once, at most, and those of a task, at least, if it has a part
/// of them.
const PANELS: usize = 4;
/// Tiles of rows of a task, if that makes enough tasks: fewer would read the columns from afar for
/// little.
const TILES: RangeInclusive<usize> = 4..=8;

/// Some rows of weights or values, each one's side by side: the rows of a product, or what becomes
/// its columns.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    values: Weights<'a>,
    /// From a row to the next.
    stride: usize,
    count: usize,
    /// Values of a row.
    depth: usize,
}

impl<'a> Rows<'a> {
    /// Rows one after the other.
    pub fn new(values: Weights<'a>, depth: usize) -> Self {
        let count = values.len() / depth;
        Self {
            values,
            stride: depth,
            count,
            depth,
        }
    }

    /// Of each row, `depth` values from `first` on.
    pub fn part(self, first: usize, depth: usize) -> Self {
        assert!(first + depth <= self.depth, "no such part of a row");
        let values = self.values.part(first..self.values.len());
        Self {
            values,
            depth,
            ..self
        }
    }

    /// Packs `N` rows from `first` on, with zeros for those that are not there: `to` has as many
    /// steps as a row values.
    #[inline(always)]
    pub fn pack<const N: usize>(self, first: usize, to: &mut [[f32; N]]) {
        let count = self.count.saturating_sub(first).min(N);
        for left in (0..N).step_by(ROWS) {
            let rows = count.saturating_sub(left).min(ROWS);
            let mut block = [[0.0; STEPS]; ROWS];
            for (index, to) in to.chunks_mut(STEPS).enumerate() {
                for (row, block) in block[..rows].iter_mut().enumerate() {
                    let start = (first + left + row) * self.stride + index * STEPS;
                    if to.len() == STEPS {
                        *block = self.values.block(start);
                    } else {
                        let values = self.values.part(start..start + to.len());
                        values.copy_to(&mut block[..to.len()]);
                    }
                }
                for (index, to) in to.chunks_mut(ROWS).enumerate() {
                    let mut square = [[0.0; ROWS]; ROWS];
                    for (to, row) in square.iter_mut().zip(&block) {
                        *to = row.as_chunks().0[index];
                    }
                    for (to, column) in to.iter_mut().zip(transpose(square)) {
                        to[left..left + ROWS].copy_from_slice(&column);
                    }
                }
            }
        }
    }

    /// Packs rows from `first` on, `N` at a time: as many as `to` has room for.
    #[inline(always)]
    pub fn pack_all<const N: usize>(self, first: usize, to: &mut [[f32; N]]) {
        for (index, to) in to.chunks_mut(self.depth).enumerate() {
            self.pack(first + index * N, to);
        }
    }
}

/// Packs columns of rows that are `stride` apart in `values`, `N` at a time, with zeros for those
/// that are not there: as many as `to` has room for, with `depth` steps for each `N`.
#[inline(always)]
pub fn pack_columns<const N: usize>(
    values: &[f32],
    stride: usize,
    columns: Range<usize>,
    depth: usize,
    to: &mut [[f32; N]],
) {
    let end = columns.end.min(columns.start + to.len() / depth * N);
    for step in 0..depth {
        let row = &values[step * stride..][columns.start..end];
        let (whole, rest) = row.as_chunks();
        let mut to = to[step..].iter_mut().step_by(depth);
        whole
            .iter()
            .zip(to.by_ref())
            .for_each(|(row, to)| *to = *row);
        if let Some(to) = to.next() {
            to[..rest.len()].copy_from_slice(rest);
            to[rest.len()..].fill(0.0);
        }
    }
}

/// A product with as many rows as `rows`, each of `width` results: `pack` packs the columns of some
/// tiles from a column on, and `finish` makes results of sums, some of a row at a time. It gets the
/// row and the column of the first.
///
/// With more than one of `PARTS`, a tile has as many sets of columns, and each result as many sums.
pub fn product<const PARTS: usize>(
    out: &mut [f32],
    width: usize,
    rows: Rows<'_>,
    pack: impl Fn(usize, &mut [Line]) + Sync,
    finish: impl Fn([usize; 2], [&Line; PARTS], &mut [f32]) + Sync,
) {
    assert_eq!(out.len(), rows.count * width, "no room for a product");
    let Rows { count, depth, .. } = rows;
    let threads = rayon::current_num_threads();
    let panels = width.div_ceil(COLUMNS);
    let lines = LINES.max(THREAD_LINES * threads);
    let at_once = (lines / (depth * PARTS)).clamp(1, panels);
    // A few tiles of rows a task, and, where these are few, a part of their columns.
    let (tasks, row_tiles) = (TASKS * threads, count.div_ceil(ROWS));
    let (least, most) = TILES.into_inner();
    let parts = at_once.div_ceil(PANELS);
    let is_enough = row_tiles.div_ceil(least) * parts >= tasks;
    let tiles = (row_tiles / tasks).clamp(if is_enough { least } else { 1 }, most);
    let splits = tasks.div_ceil(row_tiles.div_ceil(tiles)).min(parts);
    // What several tasks need is packed before, and what is needed again, if it stays in a cache
    // until then.
    let size = row_tiles * depth * ROWS;
    let is_again = at_once < panels && size <= ALL_ROWS;
    let [mut row_buffer, mut column_buffer] = [(); 2].map(|()| PooledBuffer::default());
    let mut all_rows: Option<&mut [Column]> =
        (splits > 1 || is_again).then(|| row_buffer.resize(size).as_chunks_mut().0);
    for start in (0..panels).step_by(at_once) {
        let some = at_once.min(panels - start);
        let packed = column_buffer.resize(some * PARTS * depth * COLUMNS);
        let (packed, _) = packed.as_chunks_mut::<COLUMNS>();
        let pack_columns = |packed: &mut [Line]| {
            let a_task = some.div_ceil(tasks).min(PANELS);
            let columns = packed.par_chunks_mut(a_task * PARTS * depth);
            columns.enumerate().for_each(|(index, lines)| {
                vectorized(
                    #[inline(always)]
                    || pack((start + index * a_task) * COLUMNS, lines),
                );
            });
        };
        let pack_rows = |all: &mut [Column]| {
            let each = all.par_chunks_mut(depth).enumerate();
            each.for_each(|(tile, to)| {
                vectorized(
                    #[inline(always)]
                    || rows.pack(tile * ROWS, to),
                );
            });
        };
        match &mut all_rows {
            Some(all) if start == 0 => {
                rayon::join(|| pack_columns(packed), || pack_rows(all));
            }
            _ => pack_columns(packed),
        }
        let all_rows = all_rows.as_deref();
        let per_split = some.div_ceil(splits);
        let range = start * COLUMNS..width.min((start + some) * COLUMNS);
        let groups = out.par_chunks_mut(tiles * ROWS * width).enumerate();
        let parts = groups.flat_map(|(group, rows)| {
            let rows = rows.chunks_mut(width).map(|row| &mut row[range.clone()]);
            let parts = in_parts(rows, per_split * COLUMNS).into_par_iter();
            parts
                .enumerate()
                .map(move |(split, out)| (group * tiles, split * per_split, out))
        });
        parts.for_each_init(
            PooledBuffer::default,
            |buffer, (first_tile, first_panel, mut out)| {
                let len = out.len().div_ceil(ROWS) * depth;
                let panels = out[0].len().div_ceil(COLUMNS);
                let lines = &packed[first_panel * PARTS * depth..][..panels * PARTS * depth];
                vectorized(
                    #[inline(always)]
                    || {
                        let own = match all_rows {
                            Some(all) => &all[first_tile * depth..][..len],
                            None => {
                                let (own, _) = buffer.resize(len * ROWS).as_chunks_mut();
                                rows.pack_all(first_tile * ROWS, own);
                                &*own
                            }
                        };
                        let position = [first_tile * ROWS, (start + first_panel) * COLUMNS];
                        packed_product(own, lines, depth, position, &mut out, &finish);
                    },
                );
            },
        );
    }
}

/// A part of a product whose rows and columns are packed: that from a position on.
#[inline(always)]
fn packed_product<const PARTS: usize>(
    rows: &[Column],
    lines: &[Line],
    depth: usize,
    [row, column]: [usize; 2],
    out: &mut [&mut [f32]],
    finish: &impl Fn([usize; 2], [&Line; PARTS], &mut [f32]),
) {
    let mut sums = [[[0.0; COLUMNS]; ROWS]; PARTS];
    for (panel, lines) in lines.chunks(PARTS * depth).enumerate() {
        let left = panel * COLUMNS;
        let tiles = rows.chunks(depth).zip(out.chunks_mut(ROWS));
        for (index, (rows, out)) in tiles.enumerate() {
            for (sums, lines) in sums.iter_mut().zip(lines.chunks(depth)) {
                tile(rows, lines, None, sums);
            }
            for (of_tile, out) in out.iter_mut().enumerate() {
                let end = out.len().min(left + COLUMNS);
                finish(
                    [row + index * ROWS + of_tile, column + left],
                    sums.each_ref().map(|sums| &sums[of_tile]),
                    &mut out[left..end],
                );
            }
        }
    }
}

/// Parts of `size` of each of some slices as long as each other: the first of all of them, then the
/// second.
pub fn in_parts<'a, T>(
    slices: impl Iterator<Item = &'a mut [T]>,
    size: usize,
) -> Vec<Vec<&'a mut [T]>> {
    let mut parts = Vec::new();
    for slice in slices {
        parts.resize_with(slice.len().div_ceil(size), Vec::new);
        let slice = slice.chunks_mut(size);
        parts
            .iter_mut()
            .zip(slice)
            .for_each(|(to, part)| to.push(part));
    }
    parts
}

/// What the sums of a product are added to.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    pub bias: Bias<'a>,
    /// Whether they are added to what `out` has as well.
    pub accumulate: bool,
}

/// A value for each row, or for each column.
#[derive(Clone, Copy)]
pub enum Bias<'a> {
    OfRows(&'a [f32]),
    OfColumns(&'a [f32]),
    None,
}

impl Start<'_> {
    /// For sums from a term on: what precedes them has been added to it.
    pub fn at_term(self, first: usize) -> Self {
        match first {
            0 => self,
            _ => Self {
                bias: Bias::None,
                accumulate: true,
            },
        }
    }

    /// Adds sums to it.
    #[inline(always)]
    pub fn plus(self, [row, column]: [usize; 2], sums: &Line, out: &mut [f32]) {
        let mut bias = [0.0; COLUMNS];
        match self.bias {
            Bias::OfRows(values) => bias = [values[row]; COLUMNS],
            Bias::OfColumns(values) => match values[column..].first_chunk() {
                Some(values) => bias = *values,
                None => bias[..out.len()].copy_from_slice(&values[column..]),
            },
            Bias::None => {}
        }
        if self.accumulate {
            each_lane(
                out,
                #[inline(always)]
                |lane, value| value + (bias[lane] + sums[lane]),
            );
        } else {
            each_lane(
                out,
                #[inline(always)]
                |lane, _| bias[lane] + sums[lane],
            );
        }
    }
}

/// Makes each result of a row of a tile, with `f` of its lane and its value: mostly of all
/// lanes, which is faster where it is known.
#[inline(always)]
fn each_lane(out: &mut [f32], f: impl Fn(usize, f32) -> f32) {
    match out.first_chunk_mut::<COLUMNS>() {
        Some(out) => {
            let mut line = *out;
            for (lane, value) in line.iter_mut().enumerate() {
                *value = f(lane, *value);
            }
            *out = line;
        }
        None => {
            for (lane, value) in out.iter_mut().enumerate() {
                *value = f(lane, *value);
            }
        }
    }
}

/// See [`Linear`].
pub fn linear<B: Backend, const D: usize>(
    mut operation: Linear<B, D>,
) -> Result<Tensor<B, D>, Linear<B, D>> {
    let mut shape = operation.x.dims();
    let [d_output, d_input] = operation.weight.dims();
    shape[D - 1] = d_output;
    let operands = operands(&operation.x, &operation.weight, operation.bias.as_ref());
    let Some((x, weight, bias)) = operands else {
        return Err(operation);
    };
    let Some(weight) = weight.values() else {
        return Err(operation);
    };
    let residual = operation.residual.take();
    let accumulate = residual.is_some();
    let mut results = match Values::for_results(residual, shape) {
        Ok(results) => results,
        Err(residual) => {
            return Err(Linear {
                residual,
                ..operation
            });
        }
    };
    let (out, bias) = (results.make_mut(), bias.as_slice());
    if out.is_empty() {
        return Ok(results.tensor());
    }
    if out.len() / d_output <= FEW {
        few_rows(x.as_slice(), weight, bias, accumulate, out);
        return Ok(results.tensor());
    }
    let x = Rows::new(Weights::F32(x.as_slice()), d_input);
    let weight = Rows::new(weight, d_input);
    let bias = Bias::OfColumns(bias);
    for first in (0..d_input).step_by(DEPTH) {
        let depth = DEPTH.min(d_input - first);
        let (weight, start) = (
            weight.part(first, depth),
            Start { bias, accumulate }.at_term(first),
        );
        product(
            out,
            d_output,
            x.part(first, depth),
            #[inline(always)]
            |column, lines| weight.pack_all(column, lines),
            #[inline(always)]
            |position, [sums], out| start.plus(position, sums, out),
        );
    }
    Ok(results.tensor())
}

/// Input, weight and bias of a layer, if they are here and there is an input. The bias may be
/// zeros.
pub fn operands<B: Backend, const D: usize, const W: usize>(
    x: &Tensor<B, D>,
    weight: &Tensor<B, W>,
    bias: Option<&Tensor<B, 1>>,
) -> Option<(Values, Weight, Values)> {
    let shape = weight.dims();
    if shape[1..].contains(&0) {
        return None;
    }
    Some((
        Values::of(x)?,
        Weight::of(weight)?,
        Values::of_bias(bias, shape[0])?,
    ))
}

/// See [`LinearToImage`]: the tokens are the columns of a product for each image.
pub fn linear_to_image<B: Backend>(
    operation: LinearToImage<B>,
) -> Result<Tensor<B, 4>, LinearToImage<B>> {
    let [batch, tokens, d_input] = operation.x.dims();
    let operands = operands(&operation.x, &operation.weight, operation.bias.as_ref());
    let Some((x, weight, bias)) = operands else {
        return Err(operation);
    };
    let Some(weight) = weight.values() else {
        return Err(operation);
    };
    let mut results = match Values::take(operation.residual) {
        Ok(results) => results,
        Err(residual) => {
            return Err(LinearToImage {
                residual,
                ..operation
            });
        }
    };
    let (out, x) = (results.make_mut(), x.as_slice());
    if out.is_empty() {
        return Ok(results.tensor());
    }
    let bias = Bias::OfRows(bias.as_slice());
    let images = out
        .chunks_mut(out.len() / batch)
        .zip(x.chunks(x.len() / batch));
    for (out, x) in images {
        let (x, weight) = (
            Rows::new(Weights::F32(x), d_input),
            Rows::new(weight, d_input),
        );
        for first in (0..d_input).step_by(DEPTH) {
            let depth = DEPTH.min(d_input - first);
            let (x, start) = (
                x.part(first, depth),
                Start {
                    bias,
                    accumulate: true,
                }
                .at_term(first),
            );
            product(
                out,
                tokens,
                weight.part(first, depth),
                #[inline(always)]
                |column, lines| x.pack_all(column, lines),
                #[inline(always)]
                |position, [sums], out| start.plus(position, sums, out),
            );
        }
    }
    Ok(results.tensor())
}

/// Rows up to which reading a weight takes longer than its products.
const FEW: usize = 4;

/// A linear layer without packing: a sum for each row and output.
fn few_rows(x: &[f32], weight: Weights<'_>, bias: &[f32], accumulate: bool, out: &mut [f32]) {
    let (rows, d_input) = (out.len() / bias.len(), weight.len() / bias.len());
    let mut by_output = vec![0.0; out.len()];
    let outputs = by_output.par_chunks_mut(rows).zip(bias).enumerate();
    outputs.for_each_init(PooledBuffer::default, |buffer, (index, (out, bias))| {
        let weight = weight.part(index * d_input..(index + 1) * d_input);
        let weight = weight.widened(buffer);
        for (out, x) in out.iter_mut().zip(x.chunks(d_input)) {
            *out = vectorized(
                #[inline(always)]
                || dot(x, weight) + bias,
            );
        }
    });
    for (row, out) in out.chunks_mut(bias.len()).enumerate() {
        let sums = by_output.chunks(rows).map(|sums| sums[row]);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if accumulate { *out + sum } else { sum };
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; COLUMNS];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<COLUMNS>(), b.as_chunks::<COLUMNS>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = a.mul_add(*b, *sum);
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
    sums.iter().sum::<f32>() + rest.sum::<f32>()
}

/// See [`LinearGeglu`]: a value and its gate are sums of the same tile, so that the values before
/// the gate are never in memory as a whole.
pub fn linear_geglu<B: Backend>(operation: LinearGeglu<B>) -> Result<Tensor<B, 3>, LinearGeglu<B>> {
    gated(&operation).ok_or(operation)
}

fn gated<B: Backend>(operation: &LinearGeglu<B>) -> Option<Tensor<B, 3>> {
    let LinearGeglu { x, weight, bias } = operation;
    let [batch, tokens, _] = x.dims();
    let [width, d_input] = weight.dims();
    let (x, weight, bias) = operands(x, weight, bias.as_ref())?;
    let (weight, half) = (weight.values()?, width / 2);
    let mut out = PooledBuffer::new(batch * tokens * half);
    if out.is_empty() {
        return Some(tensor(out, [batch, tokens, half]));
    }
    let size = half * d_input;
    let parts = [0, size].map(|first| Rows::new(weight.part(first..first + size), d_input));
    let (bias, gate_bias) = bias.as_slice().split_at(half);
    product(
        &mut out,
        half,
        Rows::new(Weights::F32(x.as_slice()), d_input),
        #[inline(always)]
        |column, lines| {
            for (index, lines) in lines.chunks_mut(2 * d_input).enumerate() {
                for (part, lines) in parts.iter().zip(lines.chunks_mut(d_input)) {
                    part.pack(column + index * COLUMNS, lines);
                }
            }
        },
        #[inline(always)]
        |[_, column], [values, gates], out| {
            let [bias, gate_bias] = [bias, gate_bias].map(|bias| &bias[column..][..out.len()]);
            each_lane(
                out,
                #[inline(always)]
                |lane, _| (values[lane] + bias[lane]) * gelu_of(gates[lane] + gate_bias[lane]),
            );
        },
    );
    Some(tensor(out, [batch, tokens, half]))
}
