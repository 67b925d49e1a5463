//! Attention in one pass over the keys, without the matrix of all scores ("FlashAttention", Dao et
//! al. 2022, <https://arxiv.org/abs/2205.14135>, algorithm 1).
//!
//! Scores are computed as `k qᵀ`, a row for each key and a column for each query: softmax works on
//! vectors of queries, and its weights are already a packed panel for the product with the values.

use std::ops::Range;

use burn::tensor::Tensor;
use burn_flex::Flex;
use rayon::prelude::*;

use super::matrix::{Matrix, TASKS_PER_THREAD, pack_columns, split_columns};
use super::memory::PooledBuffer;
use super::micro_kernel::{MR, NR, PanelColumn, PanelRow, RegisterBlock, Start, micro_kernel};
use super::parts::{Part, part, vectorized_part};
use super::weights::WeightSlice;
use super::{Values, exp2, tensor, vectorized};
use crate::Attention;

/// Blocks of [`NR`] queries of a task, at most.
const QUERY_BLOCKS: usize = 4;
/// Keys of a block: their scores with a block of queries stay in a core's own cache.
const KEY_BLOCK: usize = 128;

/// How much larger a score may be than `max`, as a power of 2: rescaling earlier results takes
/// time, and weights of up to 256 are as exact as those of up to 1.
const MAX_RISE: f32 = 8.0;

/// Keys, or columns of values, that a task packs.
const PACKED_AT_ONCE: usize = 128;

/// See [`Attention`].
pub fn attention(operation: Attention<Flex>) -> Result<Tensor<Flex, 3>, Attention<Flex>> {
    attend(&operation).ok_or(operation)
}

fn attend(operation: &Attention<Flex>) -> Option<Tensor<Flex, 3>> {
    let Attention {
        query,
        key,
        value,
        heads,
        causal,
    } = operation;
    let (heads, causal) = (*heads, *causal);
    let shape = query.dims();
    let [batch, tokens, inner] = shape;
    let [_, context, _] = key.dims();
    let fits = [key.dims(), value.dims()] == [[batch, context, inner]; 2]
        && (context == tokens || !causal);
    if !fits || [batch, tokens, inner, context].contains(&0) {
        return None;
    }
    let (query, key, value) = (Values::of(query)?, Values::of(key)?, Values::of(value)?);
    let (mut keys, mut values) = (PooledBuffer::default(), PooledBuffer::default());
    let heads = PackedHeads::pack(
        [key.as_slice(), value.as_slice()],
        [batch, context, inner],
        heads,
        causal,
        [&mut keys, &mut values],
    );
    let mut out = PooledBuffer::new(query.as_slice().len());
    // A task has blocks of queries of all heads; if that makes too few tasks, of some heads; and
    // fewer blocks if there are few heads.
    let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
    let blocks = batch * heads.count * tokens.div_ceil(NR);
    let size = (blocks / tasks).clamp(1, QUERY_BLOCKS) * NR;
    let splits = tasks.div_ceil(batch * tokens.div_ceil(size));
    let at_once = heads.count.div_ceil(splits);
    let mut tasks = Vec::new();
    let batches = query.as_slice().chunks(tokens * inner);
    let batches = batches.zip(out.chunks_mut(tokens * inner)).enumerate();
    for (batch, (query, out)) in batches {
        let groups = query.chunks(size * inner).zip(out.chunks_mut(size * inner));
        for (group, (query, out)) in groups.enumerate() {
            let parts = split_columns(out.chunks_mut(inner), at_once * heads.d).into_iter();
            tasks.extend(parts.enumerate().map(|(part, out)| Task {
                batch,
                head: part * at_once,
                token: group * size,
                query: Matrix::new(WeightSlice::F32(query), inner),
                out,
            }));
        }
    }
    let tasks = tasks.into_par_iter();
    tasks.for_each_init(Vec::new, |blocks, mut task| {
        for nth in 0..task.out[0].len() / heads.d {
            vectorized(
                #[inline(always)]
                || heads.attend(&mut task, nth, blocks),
            );
        }
    });
    Some(tensor(out, shape))
}

/// Some queries of one batch element, and the outputs of some heads for them.
struct Task<'a> {
    batch: usize,
    /// The first head.
    head: usize,
    /// The first query.
    token: usize,
    query: Matrix<'a>,
    /// A row for each query, the columns of these heads.
    out: Vec<&'a mut [f32]>,
}

/// The packed keys and values of all heads.
struct PackedHeads<'a> {
    /// `[batch, heads, context / MR, d]`
    keys: &'a [PanelColumn],
    /// `[batch, heads, d / MR, context]`
    values: &'a [PanelColumn],
    count: usize,
    context: usize,
    /// Size of a head.
    d: usize,
    /// A query attends to its own and earlier keys only.
    causal: bool,
}

impl<'a> PackedHeads<'a> {
    fn pack(
        [keys, values]: [&[f32]; 2],
        [batch, context, inner]: [usize; 3],
        count: usize,
        causal: bool,
        [key_buffer, value_buffer]: [&'a mut PooledBuffer; 2],
    ) -> Self {
        let d = inner / count;
        let sizes = [context.div_ceil(MR) * d, d.div_ceil(MR) * context];
        let [key_size, value_size] = sizes.map(|size| batch * count * size * MR);
        let (packed_keys, _) = key_buffer.resize(key_size).as_chunks_mut();
        let (packed_values, _) = value_buffer.resize(value_size).as_chunks_mut();
        let heads = packed_keys
            .par_chunks_mut(sizes[0])
            .zip(packed_values.par_chunks_mut(sizes[1]));
        heads.enumerate().for_each(|(index, (to_keys, to_values))| {
            let (row, first) = (index / count * context * inner, index % count * d);
            let [keys, values] = [keys, values].map(|from| &from[row..row + context * inner]);
            let keys = Matrix::new(WeightSlice::F32(keys), inner).slice_columns(first, d);
            rayon::join(
                || {
                    let panels = to_keys.par_chunks_mut(PACKED_AT_ONCE / MR * d).enumerate();
                    panels.for_each(|(index, to)| {
                        vectorized_part(
                            Part::Packing,
                            #[inline(always)]
                            || keys.pack_panels(index * PACKED_AT_ONCE, to),
                        );
                    });
                },
                || {
                    let panels = to_values.par_chunks_mut(PACKED_AT_ONCE / MR * context);
                    panels.enumerate().for_each(|(index, to)| {
                        let columns = first + index * PACKED_AT_ONCE..first + d;
                        vectorized_part(
                            Part::Packing,
                            #[inline(always)]
                            || pack_columns(values, inner, columns, context, to),
                        );
                    });
                },
            );
        });
        Self {
            keys: packed_keys,
            values: packed_values,
            count,
            context,
            d,
            causal,
        }
    }

    /// Computes the `nth` head of a task.
    #[inline(always)]
    fn attend(&self, task: &mut Task<'_>, nth: usize, blocks: &mut Vec<QueryBlock>) {
        let Self { context, d, .. } = *self;
        let head = task.head + nth;
        let index = task.batch * self.count + head;
        let (size, panels) = (context.div_ceil(MR) * d, d.div_ceil(MR));
        let keys = &self.keys[index * size..(index + 1) * size];
        let values = &self.values[index * panels * context..(index + 1) * panels * context];
        let query = task.query.slice_columns(head * d, d);
        let scale = (d as f32).powf(-0.5) * std::f32::consts::LOG2_E;
        blocks.resize_with(task.out.len().div_ceil(NR), QueryBlock::default);
        for (index, block) in blocks.iter_mut().enumerate() {
            part(
                Part::Packing,
                #[inline(always)]
                || block.reset(query, index * NR, scale, d),
            );
        }
        let mut scores = [[[0.0; NR]; MR]; KEY_BLOCK / MR];
        for start in (0..context).step_by(KEY_BLOCK) {
            let count = KEY_BLOCK.min(context - start);
            let keys = keys[start / MR * d..].chunks(d);
            for (index, block) in blocks.iter_mut().enumerate() {
                // The token of the first query. Later keys are masked for some or all queries.
                let own = task.token + index * NR;
                let count = match self.causal {
                    true => count.min((own + NR).saturating_sub(start)),
                    false => count,
                };
                if count == 0 {
                    continue;
                }
                let register_blocks = scores.iter_mut().take(count.div_ceil(MR));
                part(
                    Part::Products,
                    #[inline(always)]
                    || {
                        for (scores, keys) in register_blocks.zip(keys.clone()) {
                            micro_kernel(keys, &block.query, Start::Zero, scores);
                        }
                    },
                );
                let scores = &mut scores.as_flattened_mut()[..count];
                if self.causal {
                    for (key, scores) in (start..).zip(&mut *scores).filter(|(key, _)| *key > own) {
                        scores[..key - own].fill(f32::NEG_INFINITY);
                    }
                }
                let is_rescaled = part(
                    Part::Softmax,
                    #[inline(always)]
                    || block.update(scores),
                );
                part(
                    Part::Products,
                    #[inline(always)]
                    || block.add_values(values, start..start + count, scores, is_rescaled),
                );
            }
        }
        for (block, out) in blocks.iter().zip(task.out.chunks_mut(NR)) {
            part(
                Part::Epilogue,
                #[inline(always)]
                || block.write(nth * d, d, out),
            );
        }
    }
}

/// A block of [`NR`] queries with the running softmax of the keys so far.
#[derive(Default)]
struct QueryBlock {
    /// `[d]`, scaled by `log2(e) / sqrt(d)`: softmax uses powers of 2.
    query: Vec<PanelRow>,
    /// `[d / MR]`: weighted sums of the values.
    output: Vec<RegisterBlock>,
    /// Largest scores, or [`MAX_RISE`] less.
    max: PanelRow,
    /// Sums of the weights.
    sum: PanelRow,
    /// Factors of the earlier `output`, whose weights are relative to the earlier `max`.
    rescale: PanelRow,
}

impl QueryBlock {
    #[inline(always)]
    fn reset(&mut self, rows: Matrix<'_>, first: usize, scale: f32, d: usize) {
        self.query.resize(d, [0.0; NR]);
        rows.pack_panels(first, &mut self.query);
        let values = self.query.as_flattened_mut().iter_mut();
        values.for_each(|value| *value *= scale);
        self.output.clear();
        self.output.resize(d.div_ceil(MR), [[0.0; NR]; MR]);
        self.max = [f32::NEG_INFINITY; NR];
        self.sum = [0.0; NR];
    }

    /// Replaces the scores of a block of keys by their weights, `2^(score - max)`. Returns whether
    /// there is a new `max`, so that earlier results must be rescaled.
    #[inline(always)]
    fn update(&mut self, scores: &mut [PanelRow]) -> bool {
        let mut max = self.max;
        for scores in &*scores {
            for (max, score) in max.iter_mut().zip(scores) {
                // Not `f32::max`, which is vectorised with a second comparison for NaN.
                *max = if *max > *score { *max } else { *score };
            }
        }
        let rises = max.iter().zip(&self.max);
        let is_new = rises.fold(false, |is_new, (max, before)| {
            is_new | (*max > before + MAX_RISE)
        });
        if is_new {
            for (lane, max) in max.into_iter().enumerate() {
                self.rescale[lane] = exp2(self.max[lane] - max);
                self.sum[lane] *= self.rescale[lane];
            }
            self.max = max;
        }
        let max = self.max;
        let mut sums = [0.0; NR];
        for scores in scores {
            for ((score, max), sum) in scores.iter_mut().zip(&max).zip(&mut sums) {
                *score = exp2(*score - *max);
                *sum += *score;
            }
        }
        for (sum, more) in self.sum.iter_mut().zip(sums) {
            *sum += more;
        }
        is_new
    }

    /// Adds the values of some keys, times their weights.
    #[inline(always)]
    fn add_values(
        &mut self,
        values: &[PanelColumn],
        keys: Range<usize>,
        weights: &[PanelRow],
        is_rescaled: bool,
    ) {
        let start = match is_rescaled {
            true => Start::Scaled(&self.rescale),
            false => Start::Values,
        };
        let context = values.len() / self.output.len();
        for (output, values) in self.output.iter_mut().zip(values.chunks(context)) {
            micro_kernel(&values[keys.clone()], weights, start, output);
        }
    }

    /// Writes the weighted means of the values to one head's columns.
    #[inline(always)]
    fn write(&self, first: usize, d: usize, out: &mut [&mut [f32]]) {
        let factors = self.sum.map(|weight| 1.0 / weight);
        for (index, sums) in self.output.iter().enumerate() {
            let columns = first + index * MR..first + d.min((index + 1) * MR);
            let mut means = [[0.0; MR]; NR];
            for (row, sums) in sums.iter().enumerate() {
                for (lane, mean) in means.iter_mut().enumerate() {
                    mean[row] = sums[lane] * factors[lane];
                }
            }
            for (mean, out) in means.iter().zip(&mut *out) {
                let out = &mut out[columns.clone()];
                match out.first_chunk_mut() {
                    Some(out) => *out = *mean,
                    None => out.copy_from_slice(&mean[..out.len()]),
                }
            }
        }
    }
}
