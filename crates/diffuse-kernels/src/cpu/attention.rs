//! Attention in one pass over the keys, without the matrix of all scores ("FlashAttention", Dao et
//! al. 2022, <https://arxiv.org/abs/2205.14135>, algorithm 1).
//!
//! Scores are `k qᵀ`, a row for each key: so everything that is done to scores is done to a line of
//! queries at once, and the weights made of them are packed for their product with the values.

use burn::tensor::{Tensor, backend::Backend};
use rayon::prelude::*;

use super::kernel::{COLUMNS, Column, Line, ROWS, tile};
use super::matrix::{Rows, TASKS, in_parts, pack_columns};
use super::memory::PooledBuffer;
use super::weights::Weights;
use super::{Values, exp2, tensor, vectorized};
use crate::Attention;

/// Tiles of queries of a task at most.
const TILES: usize = 4;
/// Keys whose scores are held at once: those with a tile's queries stay in the cache next to a
/// core.
const KEYS: usize = 128;

/// Keys, and values of a head, that are packed at once.
const PACKED: usize = 128;

/// See [`Attention`].
pub fn attention<B: Backend>(operation: Attention<B>) -> Result<Tensor<B, 3>, Attention<B>> {
    attend(&operation).ok_or(operation)
}

fn attend<B: Backend>(operation: &Attention<B>) -> Option<Tensor<B, 3>> {
    let Attention {
        query,
        key,
        value,
        heads,
        causal,
    } = operation;
    let (heads, is_causal) = (*heads, *causal);
    let shape = query.dims();
    let [batch, tokens, inner] = shape;
    let [_, context, _] = key.dims();
    let fits = [key.dims(), value.dims()] == [[batch, context, inner]; 2]
        && (context == tokens || !is_causal);
    if !fits || [batch, tokens, inner, context].contains(&0) {
        return None;
    }
    let (query, key, value) = (Values::of(query)?, Values::of(key)?, Values::of(value)?);
    let (mut keys, mut values) = (PooledBuffer::default(), PooledBuffer::default());
    let heads = Heads::pack(
        [key.as_slice(), value.as_slice()],
        [batch, context, inner],
        heads,
        is_causal,
        [&mut keys, &mut values],
    );
    let mut out = PooledBuffer::new(query.as_slice().len());
    // Some queries, and, where these are few, some of the heads, and fewer queries where heads are
    // few, too.
    let tasks = TASKS * rayon::current_num_threads();
    let of_heads = batch * heads.count * tokens.div_ceil(COLUMNS);
    let size = (of_heads / tasks).clamp(1, TILES) * COLUMNS;
    let splits = tasks.div_ceil(batch * tokens.div_ceil(size));
    let at_once = heads.count.div_ceil(splits);
    let mut tasks = Vec::new();
    let batches = query.as_slice().chunks(tokens * inner);
    let batches = batches.zip(out.chunks_mut(tokens * inner)).enumerate();
    for (batch, (query, out)) in batches {
        let groups = query.chunks(size * inner).zip(out.chunks_mut(size * inner));
        for (group, (query, out)) in groups.enumerate() {
            let parts = in_parts(out.chunks_mut(inner), at_once * heads.d).into_iter();
            tasks.extend(parts.enumerate().map(|(part, out)| Task {
                batch,
                head: part * at_once,
                token: group * size,
                query: Rows::new(Weights::F32(query), inner),
                out,
            }));
        }
    }
    let tasks = tasks.into_par_iter();
    tasks.for_each_init(Vec::new, |tiles, mut task| {
        for part in 0..task.out[0].len() / heads.d {
            vectorized(
                #[inline(always)]
                || heads.attend(&mut task, part, tiles),
            );
        }
    });
    Some(tensor(out, shape))
}

/// Some queries of one of the batch, and what some heads see for them.
struct Task<'a> {
    batch: usize,
    /// The first of the heads, and of the queries.
    head: usize,
    token: usize,
    query: Rows<'a>,
    /// Columns of the heads, a row for each query.
    out: Vec<&'a mut [f32]>,
}

/// Keys and values of all heads, packed.
struct Heads<'a> {
    /// `[batch, heads, context / ROWS, d]`
    keys: &'a [Column],
    /// `[batch, heads, d / ROWS, context]`
    values: &'a [Column],
    count: usize,
    context: usize,
    /// Values of a head.
    d: usize,
    /// Whether a query sees the keys up to its own only.
    is_causal: bool,
}

impl<'a> Heads<'a> {
    fn pack(
        [keys, values]: [&[f32]; 2],
        [batch, context, inner]: [usize; 3],
        count: usize,
        is_causal: bool,
        [key_buffer, value_buffer]: [&'a mut PooledBuffer; 2],
    ) -> Self {
        let d = inner / count;
        let sizes = [context.div_ceil(ROWS) * d, d.div_ceil(ROWS) * context];
        let [key_size, value_size] = sizes.map(|size| batch * count * size * ROWS);
        let (packed_keys, _) = key_buffer.resize(key_size).as_chunks_mut();
        let (packed_values, _) = value_buffer.resize(value_size).as_chunks_mut();
        let heads = packed_keys
            .par_chunks_mut(sizes[0])
            .zip(packed_values.par_chunks_mut(sizes[1]));
        heads.enumerate().for_each(|(index, (to_keys, to_values))| {
            let (row, first) = (index / count * context * inner, index % count * d);
            let [keys, values] = [keys, values].map(|from| &from[row..row + context * inner]);
            let keys = Rows::new(Weights::F32(keys), inner).part(first, d);
            rayon::join(
                || {
                    let tiles = to_keys.par_chunks_mut(PACKED / ROWS * d).enumerate();
                    tiles.for_each(|(index, to)| {
                        vectorized(
                            #[inline(always)]
                            || keys.pack_all(index * PACKED, to),
                        );
                    });
                },
                || {
                    let tiles = to_values.par_chunks_mut(PACKED / ROWS * context);
                    tiles.enumerate().for_each(|(index, to)| {
                        let columns = first + index * PACKED..first + d;
                        vectorized(
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
            is_causal,
        }
    }

    /// What the queries of a task see of one of its heads.
    #[inline(always)]
    fn attend(&self, task: &mut Task<'_>, part: usize, tiles: &mut Vec<Queries>) {
        let Self { context, d, .. } = *self;
        let head = task.head + part;
        let index = task.batch * self.count + head;
        let (size, depth) = (context.div_ceil(ROWS) * d, d.div_ceil(ROWS));
        let keys = &self.keys[index * size..(index + 1) * size];
        let values = &self.values[index * depth * context..(index + 1) * depth * context];
        let query = task.query.part(head * d, d);
        let scale = (d as f32).powf(-0.5) * std::f32::consts::LOG2_E;
        tiles.resize_with(task.out.len().div_ceil(COLUMNS), Queries::default);
        for (index, tile) in tiles.iter_mut().enumerate() {
            tile.begin(query, index * COLUMNS, scale, d);
        }
        let mut scores = [[[0.0; COLUMNS]; ROWS]; KEYS / ROWS];
        for start in (0..context).step_by(KEYS) {
            let width = KEYS.min(context - start);
            let keys = keys[start / ROWS * d..].chunks(d);
            for (index, queries) in tiles.iter_mut().enumerate() {
                // The token of the first query: later ones are hidden from some of them, or from
                // all.
                let own = task.token + index * COLUMNS;
                let width = match self.is_causal {
                    true => width.min((own + COLUMNS).saturating_sub(start)),
                    false => width,
                };
                if width == 0 {
                    continue;
                }
                let some = scores.iter_mut().take(width.div_ceil(ROWS));
                for (scores, keys) in some.zip(keys.clone()) {
                    tile(keys, &queries.query, None, scores);
                }
                let scores = &mut scores.as_flattened_mut()[..width];
                if self.is_causal {
                    for (key, scores) in (start..).zip(&mut *scores).filter(|(key, _)| *key > own) {
                        scores[..key - own].fill(f32::NEG_INFINITY);
                    }
                }
                queries.weigh(scores);
                for (sums, values) in queries.sums.iter_mut().zip(values.chunks(context)) {
                    let values = &values[start..start + width];
                    tile(values, scores, Some(&queries.kept), sums);
                }
            }
        }
        for (tile, out) in tiles.iter().zip(task.out.chunks_mut(COLUMNS)) {
            tile.finish(part * d, d, out);
        }
    }
}

/// A tile's queries, and what they have seen so far.
#[derive(Default)]
struct Queries {
    /// `[d]`, times what makes powers of 2 of scores.
    query: Vec<Line>,
    /// `[d / ROWS]`: weighted sums of the values.
    sums: Vec<[Line; ROWS]>,
    /// The largest scores.
    largest: Line,
    /// Sums of the weights.
    weights: Line,
    /// What is left of earlier sums, as their weights are relative to the largest scores.
    kept: Line,
}

impl Queries {
    #[inline(always)]
    fn begin(&mut self, rows: Rows<'_>, first: usize, scale: f32, d: usize) {
        self.query.resize(d, [0.0; COLUMNS]);
        rows.pack(first, &mut self.query);
        let values = self.query.as_flattened_mut().iter_mut();
        values.for_each(|value| *value *= scale);
        self.sums.clear();
        self.sums.resize(d.div_ceil(ROWS), [[0.0; COLUMNS]; ROWS]);
        self.largest = [f32::NEG_INFINITY; COLUMNS];
        self.weights = [0.0; COLUMNS];
    }

    /// Makes weights of scores: `2^(score - largest)`.
    #[inline(always)]
    fn weigh(&mut self, scores: &mut [Line]) {
        let before = self.largest;
        let mut largest = before;
        for scores in &*scores {
            for (largest, score) in largest.iter_mut().zip(scores) {
                // Not `f32::max`, which the vectoriser gives a second comparison to skip what is
                // not a number.
                *largest = if *largest > *score { *largest } else { *score };
            }
        }
        let mut sums = [0.0; COLUMNS];
        for scores in scores {
            for ((score, largest), sum) in scores.iter_mut().zip(&largest).zip(&mut sums) {
                *score = exp2(*score - *largest);
                *sum += *score;
            }
        }
        for lane in 0..COLUMNS {
            self.kept[lane] = exp2(before[lane] - largest[lane]);
            self.weights[lane] = self.weights[lane].mul_add(self.kept[lane], sums[lane]);
        }
        self.largest = largest;
    }

    /// Means of the values, into one head's columns.
    #[inline(always)]
    fn finish(&self, first: usize, d: usize, out: &mut [&mut [f32]]) {
        let factors = self.weights.map(|weight| 1.0 / weight);
        for (index, sums) in self.sums.iter().enumerate() {
            let columns = first + index * ROWS..first + d.min((index + 1) * ROWS);
            let mut means = [[0.0; ROWS]; COLUMNS];
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
