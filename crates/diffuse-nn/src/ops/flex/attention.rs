//! Attention in one pass over the keys, without the matrix of all scores ("FlashAttention", Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>, algorithm 1).
//!
//! Scores are `k qᵀ`, a row for each key: so everything that is done to scores is done to a line of queries at once, and the
//! weights made of them are packed for their product with the values.

use burn::tensor::{Tensor, backend::Backend};
use rayon::prelude::*;

use super::kernel::{COLUMNS, Column, Line, ROWS, tile};
use super::matrix::{Rows, pack_columns};
use super::memory::Room;
use super::weights::Weights;
use super::{Values, exp2, tensor, vectorized};

/// Tiles of queries of a task.
const TILES: usize = 4;
/// Keys whose scores are held at once: those with a tile's queries stay in the cache next to a core.
const KEYS: usize = 128;

/// See [`attention`](crate::ops::attention).
pub fn attention<B: Backend>(
    query: &Tensor<B, 3>,
    key: &Tensor<B, 3>,
    value: &Tensor<B, 3>,
    heads: usize,
) -> Option<Tensor<B, 3>> {
    let shape = query.dims();
    let [batch, tokens, inner] = shape;
    let [_, context, _] = key.dims();
    let fits = [key.dims(), value.dims()] == [[batch, context, inner]; 2];
    if !fits || [batch, tokens, inner, context].contains(&0) {
        return None;
    }
    let (query, key, value) = (Values::of(query)?, Values::of(key)?, Values::of(value)?);
    let (mut keys, mut values) = (Room::default(), Room::default());
    let heads = Heads::pack(
        [key.as_slice(), value.as_slice()],
        [batch, context, inner],
        heads,
        [&mut keys, &mut values],
    );
    let mut out = Room::new(query.as_slice().len());
    let batch = out
        .par_chunks_mut(tokens * inner)
        .zip(query.as_slice().par_chunks(tokens * inner))
        .enumerate();
    batch.for_each(|(index, (out, query))| {
        let size = TILES * COLUMNS * inner;
        let tasks = out.par_chunks_mut(size).zip(query.par_chunks(size));
        tasks.for_each_init(Vec::new, |tiles, (out, query)| {
            let query = Rows::new(Weights::F32(query), inner);
            for head in 0..heads.count {
                vectorized(
                    #[inline(always)]
                    || heads.attend(index, head, query, out, tiles),
                );
            }
        });
    });
    Some(tensor(out, shape))
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
}

impl<'a> Heads<'a> {
    fn pack(
        [keys, values]: [&[f32]; 2],
        [batch, context, inner]: [usize; 3],
        count: usize,
        [key_room, value_room]: [&'a mut Room; 2],
    ) -> Self {
        let d = inner / count;
        let sizes = [context.div_ceil(ROWS) * d, d.div_ceil(ROWS) * context];
        let [key_size, value_size] = sizes.map(|size| batch * count * size * ROWS);
        let (packed_keys, _) = key_room.resize(key_size).as_chunks_mut();
        let (packed_values, _) = value_room.resize(value_size).as_chunks_mut();
        let heads = packed_keys
            .par_chunks_mut(sizes[0])
            .zip(packed_values.par_chunks_mut(sizes[1]));
        heads.enumerate().for_each(|(index, (to_keys, to_values))| {
            let (row, first) = (index / count * context * inner, index % count * d);
            let [keys, values] = [keys, values].map(|from| &from[row..row + context * inner]);
            let keys = Rows::new(Weights::F32(keys), inner).part(first, d);
            for (index, to) in to_keys.chunks_mut(d).enumerate() {
                keys.pack(index * ROWS, to);
            }
            pack_columns(values, inner, first..first + d, context, to_values);
        });
        Self {
            keys: packed_keys,
            values: packed_values,
            count,
            context,
            d,
        }
    }

    /// What some queries see of one head, into its columns of `out`.
    #[inline(always)]
    fn attend(
        &self,
        batch: usize,
        head: usize,
        query: Rows<'_>,
        out: &mut [f32],
        tiles: &mut Vec<Queries>,
    ) {
        let Self { context, d, .. } = *self;
        let index = batch * self.count + head;
        let (size, depth) = (context.div_ceil(ROWS) * d, d.div_ceil(ROWS));
        let keys = &self.keys[index * size..(index + 1) * size];
        let values = &self.values[index * depth * context..(index + 1) * depth * context];
        let inner = self.count * d;
        let query = query.part(head * d, d);
        let scale = (d as f32).powf(-0.5) * std::f32::consts::LOG2_E;
        let count = (out.len() / inner).div_ceil(COLUMNS);
        tiles.resize_with(count, Queries::default);
        for (index, tile) in tiles.iter_mut().enumerate() {
            tile.begin(query, index * COLUMNS, scale, d);
        }
        let mut scores = [[[0.0; COLUMNS]; ROWS]; KEYS / ROWS];
        for start in (0..context).step_by(KEYS) {
            let width = KEYS.min(context - start);
            let keys = keys[start / ROWS * d..].chunks(d);
            for queries in tiles.iter_mut() {
                let some = scores.iter_mut().take(width.div_ceil(ROWS));
                for (scores, keys) in some.zip(keys.clone()) {
                    tile(keys, &queries.query, scores);
                }
                let scores = &mut scores.as_flattened_mut()[..width];
                queries.weigh(scores);
                for (sums, values) in queries.sums.iter_mut().zip(values.chunks(context)) {
                    let mut more = [[0.0; COLUMNS]; ROWS];
                    tile(&values[start..start + width], scores, &mut more);
                    for (sums, more) in sums.iter_mut().zip(&more) {
                        for ((sum, more), kept) in sums.iter_mut().zip(more).zip(&queries.kept) {
                            *sum = sum.mul_add(*kept, *more);
                        }
                    }
                }
            }
        }
        for (tile, out) in tiles.iter().zip(out.chunks_mut(COLUMNS * inner)) {
            tile.finish(inner, head * d, d, out);
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
                // Not `f32::max`, which the vectoriser gives a second comparison to skip what is not a number.
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
    fn finish(&self, inner: usize, first: usize, d: usize, out: &mut [f32]) {
        let factors = self.weights.map(|weight| 1.0 / weight);
        for (lane, out) in out.chunks_mut(inner).enumerate() {
            let sums = self.sums.as_flattened().iter();
            for (out, sums) in out[first..first + d].iter_mut().zip(sums) {
                *out = sums[lane] * factors[lane];
            }
        }
    }
}
