//! Attention in one pass over the keys, without the matrix of all scores ("FlashAttention", Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>, algorithm 1).

use burn::tensor::{Tensor, backend::Backend};
use rayon::prelude::*;

use super::matrix::{Matrix, Threads, multiply};
use super::{Values, exp, memory::zeros, tensor, vectorized};

/// Queries of a task.
const QUERIES: usize = 128;
/// Keys whose scores are held at once: with [`QUERIES`], they stay in the cache next to a core.
const KEYS: usize = 256;

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
    let d = inner / heads;
    let mut out = zeros(query.as_slice().len());
    let batch = out.par_chunks_mut(tokens * inner).enumerate();
    batch.for_each(|(index, out)| {
        let query = &query.as_slice()[index * tokens * inner..][..tokens * inner];
        let keys = &key.as_slice()[index * context * inner..][..context * inner];
        let values = &value.as_slice()[index * context * inner..][..context * inner];
        let tasks = out
            .par_chunks_mut(QUERIES * inner)
            .zip(query.par_chunks(QUERIES * inner));
        tasks.for_each_init(Scratch::default, |scratch, (out, query)| {
            for head in 0..heads {
                let part = |values| Head {
                    values,
                    first: head * d,
                    inner,
                    d,
                };
                scratch.attend(&part(query), &part(keys), &part(values));
                for (out, sums) in out.chunks_mut(inner).zip(scratch.sums.chunks(d)) {
                    out[head * d..][..d].copy_from_slice(sums);
                }
            }
        });
    });
    Some(tensor(out, shape))
}

/// One head's columns of `[tokens, heads · d]`.
struct Head<'a> {
    values: &'a [f32],
    first: usize,
    inner: usize,
    d: usize,
}

impl Head<'_> {
    fn tokens(&self) -> usize {
        self.values.len() / self.inner
    }

    /// Some of its tokens, as rows.
    fn matrix(&self, start: usize, count: usize) -> Matrix<'_> {
        Matrix {
            values: &self.values[start * self.inner + self.first..],
            rows: count,
            columns: self.d,
            row_stride: self.inner,
            column_stride: 1,
        }
    }
}

#[derive(Default)]
struct Scratch {
    /// `[queries, KEYS]`
    scores: Vec<f32>,
    /// The largest score of each query so far.
    largest: Vec<f32>,
    /// The sum of each query's weights so far.
    weights: Vec<f32>,
    /// `[queries, d]`: the weighted sums of the values.
    sums: Vec<f32>,
}

impl Scratch {
    fn attend(&mut self, query: &Head<'_>, keys: &Head<'_>, values: &Head<'_>) {
        let (count, context, d) = (query.tokens(), keys.tokens(), query.d);
        let scale = (d as f32).powf(-0.5);
        self.scores.resize(QUERIES * KEYS, 0.0);
        self.largest.clear();
        self.largest.resize(count, f32::NEG_INFINITY);
        self.weights.clear();
        self.weights.resize(count, 0.0);
        self.sums.clear();
        self.sums.resize(count * d, 0.0);
        for start in (0..context).step_by(KEYS) {
            let width = KEYS.min(context - start);
            let keys = keys.matrix(start, width).transposed();
            let query = query.matrix(0, count);
            multiply(&mut self.scores, KEYS, query, keys, false, Threads::One);
            vectorized(
                #[inline(always)]
                || self.weigh(width, scale, d),
            );
            let weights = Matrix {
                row_stride: KEYS,
                ..Matrix::new(&self.scores, count, width)
            };
            let values = values.matrix(start, width);
            multiply(&mut self.sums, d, weights, values, true, Threads::One);
        }
        for (sums, weight) in self.sums.chunks_mut(d).zip(&self.weights) {
            let factor = 1.0 / weight;
            sums.iter_mut().for_each(|sum| *sum *= factor);
        }
    }

    /// Makes weights of scores, `e^(scale (score - largest))`, and what came before relative to the new largest.
    #[inline(always)]
    fn weigh(&mut self, width: usize, scale: f32, d: usize) {
        let rows = self.scores.chunks_mut(KEYS).zip(self.sums.chunks_mut(d));
        let state = self.largest.iter_mut().zip(&mut self.weights);
        for ((scores, sums), (largest, weight)) in rows.zip(state) {
            let scores = &mut scores[..width];
            let before = *largest;
            *largest = before.max(maximum(scores) * scale);
            let largest = *largest;
            let mut lanes = [0.0_f32; LANES];
            let (whole, rest) = scores.as_chunks_mut::<LANES>();
            for chunk in whole {
                for (score, lane) in chunk.iter_mut().zip(&mut lanes) {
                    *score = exp(score.mul_add(scale, -largest));
                    *lane += *score;
                }
            }
            let mut total: f32 = lanes.iter().sum();
            for score in rest {
                *score = exp(score.mul_add(scale, -largest));
                total += *score;
            }
            let kept = exp(before - largest);
            *weight = weight.mul_add(kept, total);
            if kept != 1.0 {
                sums.iter_mut().for_each(|sum| *sum *= kept);
            }
        }
    }
}

const LANES: usize = 32;

#[inline(always)]
fn maximum(values: &[f32]) -> f32 {
    // Not `f32::max`, which the vectoriser gives a second comparison to skip what is not a number.
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *value);
        }
    }
    let first = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
    rest.iter().copied().fold(first, larger)
}
