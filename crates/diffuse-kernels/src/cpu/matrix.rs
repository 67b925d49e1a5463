//! Matrix products, and linear layers.

use std::ops::{Range, RangeInclusive};

use burn::tensor::Tensor;
use burn_flex::Flex;
use rayon::prelude::*;

use super::memory::{PooledBuffer, prefetch};
use super::micro_kernel::{MR, NR, PanelColumn, PanelRow, Start, micro_kernel, transpose};
use super::parts::{Part, part, vectorized_part};
use super::weights::{Weight, WeightSlice};
use super::{Values, gelu_of, mul_add, tensor, vectorized};
use crate::{Linear, LinearGeglu, LinearToImage};

/// Rows of packed panels of `B` in memory at once, 4 MB: they stay in the cache that all cores
/// share.
const B_ROWS: usize = 1 << 15;
/// The same for each thread, 1 MB, if that is more.
const B_ROWS_PER_THREAD: usize = 1 << 13;
/// Depth of a block of a product, the terms summed in one pass (`kc` of BLIS): a panel of `A` and
/// one of `B` stay in a core's own cache.
pub const KC: usize = 1 << 12;
/// More than one, so that threads that finish early find other tasks.
pub const TASKS_PER_THREAD: usize = 4;
/// Columns of a matrix that are packed at once: neighbouring values of a row.
const PACKED_COLUMNS: usize = 64;
/// Values of `A`, 8 MB, up to which all of it is packed once if it is read more than once.
const MAX_PACKED_A: usize = 1 << 21;
/// Panels of `B` that a task packs at most, and that it multiplies at least if it has a part of
/// them.
const PANELS_PER_TASK: usize = 4;
/// Panels of `A` of a task, if that makes enough tasks: with fewer, `B` is read from the shared
/// cache too often.
const A_PANELS_PER_TASK: RangeInclusive<usize> = 4..=8;

/// A row-major matrix: `A` of a product, or the transpose of `B`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: WeightSlice<'a>,
    /// Distance of two rows in memory.
    row_stride: usize,
    rows: usize,
    columns: usize,
}

impl<'a> Matrix<'a> {
    /// A contiguous matrix.
    pub fn new(values: WeightSlice<'a>, columns: usize) -> Self {
        Self {
            values,
            row_stride: columns,
            rows: values.len() / columns,
            columns,
        }
    }

    /// The columns from `first` on.
    pub fn slice_columns(self, first: usize, columns: usize) -> Self {
        assert!(first + columns <= self.columns, "columns of the matrix");
        Self {
            values: self.values.slice(first..self.values.len()),
            columns,
            ..self
        }
    }

    /// Packs `N` rows from `first` on into a panel, `[columns, N]`, with zeros for rows beyond the
    /// last. `next` is the index of the first value that will be packed after this panel.
    #[inline(always)]
    pub fn pack_panel<const N: usize>(self, first: usize, panel: &mut [[f32; N]], next: usize) {
        let count = self.rows.saturating_sub(first).min(N);
        for left in (0..N).step_by(MR) {
            let rows = count.saturating_sub(left).min(MR);
            let mut block = [[0.0; PACKED_COLUMNS]; MR];
            let next = match left + MR < N {
                true => self.index(first + left + MR, 0),
                false => next,
            };
            for (index, to) in panel.chunks_mut(PACKED_COLUMNS).enumerate() {
                for (row, block) in block[..rows].iter_mut().enumerate() {
                    let offset = self.index(row, index * PACKED_COLUMNS);
                    self.values.prefetch(next + offset, to.len());
                    let start = self.index(first + left, 0) + offset;
                    if to.len() == PACKED_COLUMNS {
                        *block = self.values.block(start);
                    } else {
                        let values = self.values.slice(start..start + to.len());
                        values.copy_to(&mut block[..to.len()]);
                    }
                }
                for (index, to) in to.chunks_mut(MR).enumerate() {
                    let mut square = [[0.0; MR]; MR];
                    for (to, row) in square.iter_mut().zip(&block) {
                        *to = row.as_chunks().0[index];
                    }
                    for (to, column) in to.iter_mut().zip(transpose(square)) {
                        to[left..left + MR].copy_from_slice(&column);
                    }
                }
            }
        }
    }

    /// The index of a value.
    #[inline(always)]
    pub fn index(self, row: usize, column: usize) -> usize {
        row * self.row_stride + column
    }

    /// Packs rows from `first` on into panels of `N` rows, as many as `panels` holds.
    #[inline(always)]
    pub fn pack_panels<const N: usize>(self, first: usize, panels: &mut [[f32; N]]) {
        for (index, panel) in panels.chunks_mut(self.columns).enumerate() {
            let first = first + index * N;
            self.pack_panel(first, panel, self.index(first + N, 0));
        }
    }
}

/// Packs columns of a row-major matrix with `depth` rows into panels of `N` columns, `[depth, N]`
/// each, as many as `panels` holds, with zeros for columns beyond the last.
#[inline(always)]
pub fn pack_columns<const N: usize>(
    values: &[f32],
    row_stride: usize,
    columns: Range<usize>,
    depth: usize,
    panels: &mut [[f32; N]],
) {
    let end = columns.end.min(columns.start + panels.len() / depth * N);
    for step in 0..depth {
        let row = &values[step * row_stride..][columns.start..end];
        let (whole, rest) = row.as_chunks();
        let mut to = panels[step..].iter_mut().step_by(depth);
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

/// The product of `a` and one or more matrices `B` with `width` columns, `MATRICES` of the same
/// size.
///
/// `pack_b` packs panels of `B` from a column on; of several matrices, it packs one panel of each
/// in turn. `finish` computes values of `out`, some of a row at once, from their sums, one for each
/// `B`. It gets the row and column of the first.
pub fn product<const MATRICES: usize>(
    out: &mut [f32],
    width: usize,
    a: Matrix<'_>,
    pack_b: impl Fn(usize, &mut [PanelRow]) + Sync,
    finish: impl Fn([usize; 2], [&PanelRow; MATRICES], &mut [f32]) + Sync,
) {
    assert_eq!(out.len(), a.rows * width, "the size of a product");
    let depth = a.columns;
    let threads = rayon::current_num_threads();
    let b_panels = width.div_ceil(NR);
    let b_rows = B_ROWS.max(B_ROWS_PER_THREAD * threads);
    let at_once = (b_rows / (depth * MATRICES)).clamp(1, b_panels);
    // A task has a few panels of `A`, and, where these are few, a part of the panels of `B`.
    let (tasks, a_panels) = (TASKS_PER_THREAD * threads, a.rows.div_ceil(MR));
    let (least, most) = A_PANELS_PER_TASK.into_inner();
    let parts = at_once.div_ceil(PANELS_PER_TASK);
    let is_enough = a_panels.div_ceil(least) * parts >= tasks;
    let a_panels_per_task = (a_panels / tasks).clamp(if is_enough { least } else { 1 }, most);
    let splits = tasks
        .div_ceil(a_panels.div_ceil(a_panels_per_task))
        .min(parts);
    // `A` is packed in advance if several tasks read a panel, or if it is read again and stays in a
    // cache until then.
    let size = a_panels * depth * MR;
    let is_read_again = at_once < b_panels && size <= MAX_PACKED_A;
    let [mut a_buffer, mut b_buffer] = [(); 2].map(|()| PooledBuffer::default());
    let mut packed_a: Option<&mut [PanelColumn]> =
        (splits > 1 || is_read_again).then(|| a_buffer.resize(size).as_chunks_mut().0);
    for start in (0..b_panels).step_by(at_once) {
        let count = at_once.min(b_panels - start);
        let packed_b = b_buffer.resize(count * MATRICES * depth * NR);
        let (packed_b, _) = packed_b.as_chunks_mut::<NR>();
        let pack_all_b = |packed: &mut [PanelRow]| {
            let panels_per_task = count.div_ceil(tasks).min(PANELS_PER_TASK);
            let panels = packed.par_chunks_mut(panels_per_task * MATRICES * depth);
            panels.enumerate().for_each(|(index, panels)| {
                vectorized_part(
                    Part::Packing,
                    #[inline(always)]
                    || pack_b((start + index * panels_per_task) * NR, panels),
                );
            });
        };
        let pack_all_a = |packed: &mut [PanelColumn]| {
            let panels = packed.par_chunks_mut(depth).enumerate();
            panels.for_each(|(index, panel)| {
                vectorized_part(
                    Part::Packing,
                    #[inline(always)]
                    || a.pack_panels(index * MR, panel),
                );
            });
        };
        match &mut packed_a {
            Some(packed_a) if start == 0 => {
                rayon::join(|| pack_all_b(packed_b), || pack_all_a(packed_a));
            }
            _ => pack_all_b(packed_b),
        }
        let packed_a = packed_a.as_deref();
        let per_split = count.div_ceil(splits);
        let range = start * NR..width.min((start + count) * NR);
        let groups = out
            .par_chunks_mut(a_panels_per_task * MR * width)
            .enumerate();
        let tasks = groups.flat_map(|(group, rows)| {
            let rows = rows.chunks_mut(width).map(|row| &mut row[range.clone()]);
            let parts = split_columns(rows, per_split * NR).into_par_iter();
            parts
                .enumerate()
                .map(move |(split, out)| (group * a_panels_per_task, split * per_split, out))
        });
        tasks.for_each_init(
            PooledBuffer::default,
            |buffer, (first_a_panel, first_b_panel, mut out)| {
                let len = out.len().div_ceil(MR) * depth;
                let b_panels = out[0].len().div_ceil(NR);
                let b = &packed_b[first_b_panel * MATRICES * depth..];
                let b = &b[..b_panels * MATRICES * depth];
                vectorized(
                    #[inline(always)]
                    || {
                        let a = match packed_a {
                            Some(packed_a) => &packed_a[first_a_panel * depth..][..len],
                            None => {
                                let (panels, _) = buffer.resize(len * MR).as_chunks_mut();
                                part(
                                    Part::Packing,
                                    #[inline(always)]
                                    || a.pack_panels(first_a_panel * MR, panels),
                                );
                                &*panels
                            }
                        };
                        let position = [first_a_panel * MR, (start + first_b_panel) * NR];
                        macro_kernel(a, b, depth, position, &mut out, &finish);
                    },
                );
            },
        );
    }
}

/// The product of packed panels: the block of `out` at a row and column.
#[inline(always)]
fn macro_kernel<const MATRICES: usize>(
    a: &[PanelColumn],
    b: &[PanelRow],
    depth: usize,
    [row, column]: [usize; 2],
    out: &mut [&mut [f32]],
    finish: &impl Fn([usize; 2], [&PanelRow; MATRICES], &mut [f32]),
) {
    let mut sums = [[[0.0; NR]; MR]; MATRICES];
    for (panel, b) in b.chunks(MATRICES * depth).enumerate() {
        let left = panel * NR;
        let blocks = a.chunks(depth).zip(out.chunks_mut(MR));
        for (index, (a, out)) in blocks.enumerate() {
            for out in out.iter() {
                prefetch(&out[left..out.len().min(left + NR)]);
            }
            part(
                Part::Products,
                #[inline(always)]
                || {
                    for (sums, b) in sums.iter_mut().zip(b.chunks(depth)) {
                        micro_kernel(a, b, Start::Zero, sums);
                    }
                },
            );
            part(
                Part::Epilogue,
                #[inline(always)]
                || {
                    for (block_row, out) in out.iter_mut().enumerate() {
                        let end = out.len().min(left + NR);
                        finish(
                            [row + index * MR + block_row, column + left],
                            sums.each_ref().map(|sums| &sums[block_row]),
                            &mut out[left..end],
                        );
                    }
                },
            );
        }
    }
}

/// Splits rows of the same length into blocks of `size` columns, each a list of parts of rows.
pub fn split_columns<'a, T>(
    rows: impl Iterator<Item = &'a mut [T]>,
    size: usize,
) -> Vec<Vec<&'a mut [T]>> {
    let mut blocks = Vec::new();
    for row in rows {
        blocks.resize_with(row.len().div_ceil(size), Vec::new);
        let parts = row.chunks_mut(size);
        blocks
            .iter_mut()
            .zip(parts)
            .for_each(|(block, part)| block.push(part));
    }
    blocks
}

/// What is added to the sums of a product.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    pub bias: Bias<'a>,
    /// The sums are added to the values of `out`.
    pub accumulate: bool,
}

/// A bias for each row or each column of a product.
#[derive(Clone, Copy)]
pub enum Bias<'a> {
    PerRow(&'a [f32]),
    PerColumn(&'a [f32]),
    None,
}

impl Epilogue<'_> {
    /// The epilogue of the terms from `first` on: `out` has the sums of those before, and the bias.
    pub fn after(self, first: usize) -> Self {
        match first {
            0 => self,
            _ => Self {
                bias: Bias::None,
                accumulate: true,
            },
        }
    }

    /// Stores some sums of a row, from a row and column on.
    #[inline(always)]
    pub fn store(self, [row, column]: [usize; 2], sums: &PanelRow, out: &mut [f32]) {
        let mut bias = [0.0; NR];
        match self.bias {
            Bias::PerRow(values) => bias = [values[row]; NR],
            Bias::PerColumn(values) => match values[column..].first_chunk() {
                Some(values) => bias = *values,
                None => bias[..out.len()].copy_from_slice(&values[column..]),
            },
            Bias::None => {}
        }
        if self.accumulate {
            map_elements(
                out,
                #[inline(always)]
                |i, value| value + (bias[i] + sums[i]),
            );
        } else {
            map_elements(
                out,
                #[inline(always)]
                |i, _| bias[i] + sums[i],
            );
        }
    }
}

/// Sets each value to `f` of its index and the value. Rows of a whole block have a fixed length,
/// which is faster.
#[inline(always)]
fn map_elements(out: &mut [f32], f: impl Fn(usize, f32) -> f32) {
    match out.first_chunk_mut::<NR>() {
        Some(out) => {
            let mut row = *out;
            for (i, value) in row.iter_mut().enumerate() {
                *value = f(i, *value);
            }
            *out = row;
        }
        None => {
            for (i, value) in out.iter_mut().enumerate() {
                *value = f(i, *value);
            }
        }
    }
}

/// See [`Linear`].
pub fn linear<const D: usize>(
    mut operation: Linear<Flex, D>,
) -> Result<Tensor<Flex, D>, Linear<Flex, D>> {
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
    let mut results = match Values::output(residual, shape) {
        Ok(results) => results,
        Err(residual) => {
            return Err(Linear {
                residual,
                ..operation
            });
        }
    };
    let out = results.make_mut();
    if !out.is_empty() {
        rows_by_weight(
            x.as_slice(),
            weight,
            bias.as_slice(),
            d_input,
            accumulate,
            out,
        );
    }
    Ok(results.tensor())
}

/// `out = x Wᵀ + bias`, or what is added to `out`.
fn rows_by_weight(
    x: &[f32],
    weight: WeightSlice<'_>,
    bias: &[f32],
    d_input: usize,
    accumulate: bool,
    out: &mut [f32],
) {
    let d_output = bias.len();
    if out.len() / d_output <= FEW_ROWS {
        return few_rows(x, weight, bias, accumulate, out);
    }
    let x = Matrix::new(WeightSlice::F32(x), d_input);
    let weight = Matrix::new(weight, d_input);
    let bias = Bias::PerColumn(bias);
    for first in (0..d_input).step_by(KC) {
        let depth = KC.min(d_input - first);
        let weight = weight.slice_columns(first, depth);
        let epilogue = Epilogue { bias, accumulate }.after(first);
        product(
            out,
            d_output,
            x.slice_columns(first, depth),
            #[inline(always)]
            |column, panels| weight.pack_panels(column, panels),
            #[inline(always)]
            |position, [sums], out| epilogue.store(position, sums, out),
        );
    }
}

/// Input, weight and bias of a layer, zeros without a bias; `None` if there is no kernel for them.
pub fn operands<const D: usize, const W: usize>(
    x: &Tensor<Flex, D>,
    weight: &Tensor<Flex, W>,
    bias: Option<&Tensor<Flex, 1>>,
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

/// See [`LinearToImage`]: the columns of a product for each image are its tokens.
pub fn linear_to_image(
    operation: LinearToImage<Flex>,
) -> Result<Tensor<Flex, 4>, LinearToImage<Flex>> {
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
    let bias = Bias::PerRow(bias.as_slice());
    let images = out
        .chunks_mut(out.len() / batch)
        .zip(x.chunks(x.len() / batch));
    for (out, x) in images {
        let (x, weight) = (
            Matrix::new(WeightSlice::F32(x), d_input),
            Matrix::new(weight, d_input),
        );
        for first in (0..d_input).step_by(KC) {
            let depth = KC.min(d_input - first);
            let x = x.slice_columns(first, depth);
            let epilogue = Epilogue {
                bias,
                accumulate: true,
            };
            let epilogue = epilogue.after(first);
            product(
                out,
                tokens,
                weight.slice_columns(first, depth),
                #[inline(always)]
                |column, panels| x.pack_panels(column, panels),
                #[inline(always)]
                |position, [sums], out| epilogue.store(position, sums, out),
            );
        }
    }
    Ok(results.tensor())
}

/// Up to as many rows, reading the weight takes longer than multiplying.
const FEW_ROWS: usize = 4;

/// A linear layer without packing: a dot product for each row and output.
fn few_rows(x: &[f32], weight: WeightSlice<'_>, bias: &[f32], accumulate: bool, out: &mut [f32]) {
    let (rows, d_input) = (out.len() / bias.len(), weight.len() / bias.len());
    let mut by_output = vec![0.0; out.len()];
    let outputs = by_output.par_chunks_mut(rows).zip(bias).enumerate();
    outputs.for_each_init(PooledBuffer::default, |buffer, (index, (out, bias))| {
        let weight = weight.slice(index * d_input..(index + 1) * d_input);
        let weight = weight.to_f32(buffer);
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
    let mut sums = [0.0_f32; NR];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<NR>(), b.as_chunks::<NR>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = mul_add(*a, *b, *sum);
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
    sums.iter().sum::<f32>() + rest.sum::<f32>()
}

/// See [`LinearGeglu`]: a value and its gate are computed together, so that the values before the
/// gate are never all in memory.
pub fn linear_geglu(operation: LinearGeglu<Flex>) -> Result<Tensor<Flex, 3>, LinearGeglu<Flex>> {
    geglu(&operation).ok_or(operation)
}

fn geglu(operation: &LinearGeglu<Flex>) -> Option<Tensor<Flex, 3>> {
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
    let halves = [0, size].map(|first| Matrix::new(weight.slice(first..first + size), d_input));
    let (bias, gate_bias) = bias.as_slice().split_at(half);
    product(
        &mut out,
        half,
        Matrix::new(WeightSlice::F32(x.as_slice()), d_input),
        #[inline(always)]
        |column, panels| {
            for (index, panels) in panels.chunks_mut(2 * d_input).enumerate() {
                for (half, panel) in halves.iter().zip(panels.chunks_mut(d_input)) {
                    half.pack_panels(column + index * NR, panel);
                }
            }
        },
        #[inline(always)]
        |[_, column], [values, gates], out| {
            let [bias, gate_bias] = [bias, gate_bias].map(|bias| &bias[column..][..out.len()]);
            map_elements(
                out,
                #[inline(always)]
                |i, _| (values[i] + bias[i]) * gelu_of(gates[i] + gate_bias[i]),
            );
        },
    );
    Some(tensor(out, [batch, tokens, half]))
}
