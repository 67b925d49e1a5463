//! Matrix products on slices, and linear layers.

use burn::tensor::{Tensor, backend::Backend};
use rayon::prelude::*;

use super::memory::{Room, zeros};
use super::weights::{Weight, Weights};
use super::{Values, gelu_of, tensor, vectorized};

/// A matrix in a slice: the value at `[row, column]` is at `row · row_stride + column · column_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub values: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after the other.
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self {
            values,
            rows,
            columns,
            row_stride: columns,
            column_stride: 1,
        }
    }

    pub fn transposed(self) -> Self {
        Self {
            values: self.values,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    /// Whether a slice of `len` values has all of the matrix.
    fn fits(&self, len: usize) -> bool {
        if self.rows == 0 || self.columns == 0 {
            return true;
        }
        let down = (self.rows - 1).checked_mul(self.row_stride);
        let along = (self.columns - 1).checked_mul(self.column_stride);
        let last = down
            .zip(along)
            .and_then(|(down, along)| down.checked_add(along));
        last.is_some_and(|last| last < len)
    }
}

/// Who computes a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    One,
    All,
}

/// `out = a b`, or `out += a b`; `out` has rows of `out_stride` values, of which the first `b.columns` are written.
pub fn multiply(
    out: &mut [f32],
    out_stride: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    add: bool,
    threads: Threads,
) {
    assert_eq!(a.columns, b.rows, "matrices that do not fit");
    assert!(out_stride >= b.columns, "rows of the product overlap");
    let product = Matrix {
        values: &[],
        rows: a.rows,
        columns: b.columns,
        row_stride: out_stride,
        column_stride: 1,
    };
    assert!(product.fits(out.len()), "no room for a product");
    assert!(
        a.fits(a.values.len()) && b.fits(b.values.len()),
        "a matrix beyond its values"
    );
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: the assertions hold every element of the three matrices within its slice; rows of `out` do
    // not overlap, nothing else refers to it, and it is initialised, also where it is not read.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            add,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// See [`linear`](crate::ops::linear).
pub fn linear<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    weight: &Tensor<B, 2>,
    bias: Option<&Tensor<B, 1>>,
) -> Option<Tensor<B, D>> {
    let mut shape = x.dims();
    let [d_output, d_input] = weight.dims();
    let (x, weight) = (Values::of(x)?, Weight::of(weight)?);
    let weight = weight.values()?;
    let bias = match bias {
        Some(bias) => Some(Values::of(bias)?),
        None => None,
    };
    shape[D - 1] = d_output;
    let rows = shape[..D - 1].iter().product();
    let mut out = zeros(rows * d_output);
    if out.is_empty() {
        return Some(tensor(out, shape));
    }
    let x = Matrix::new(x.as_slice(), rows, d_input);
    product(x, weight, d_output, &mut out);
    if let Some(bias) = bias {
        let bias = bias.as_slice();
        out.par_chunks_mut(d_output).for_each(|row| {
            vectorized(
                #[inline(always)]
                || {
                    for (value, bias) in row.iter_mut().zip(bias) {
                        *value += bias;
                    }
                },
            );
        });
    }
    Some(tensor(out, shape))
}

/// `out = x Wᵀ`, with the weight of a linear layer.
fn product(x: Matrix<'_>, weight: Weights<'_>, d_output: usize, out: &mut [f32]) {
    let at_once = weight.rows_at_once(x.columns).min(d_output);
    let mut room = Room::default();
    for first in (0..d_output).step_by(at_once) {
        let count = at_once.min(d_output - first);
        let weight = weight.part(first * x.columns..(first + count) * x.columns);
        let weight = Matrix::new(weight.widened(&mut room), count, x.columns).transposed();
        let out = &mut out[first..];
        multiply(out, d_output, x, weight, false, Threads::All);
    }
}

/// See [`linear_geglu`](crate::ops::linear_geglu): some rows at a time, so that what is gated stays in the processor's cache.
pub fn linear_geglu<B: Backend>(
    x: &Tensor<B, 3>,
    weight: &Tensor<B, 2>,
    bias: Option<&Tensor<B, 1>>,
) -> Option<Tensor<B, 3>> {
    /// Enough for packing the weights anew to cost little.
    const ROWS: usize = 1024;
    let [batch, tokens, _] = x.dims();
    let [width, d_input] = weight.dims();
    let (x, weight) = (Values::of(x)?, Weight::of(weight)?);
    let (weight, half) = (weight.values()?, width / 2);
    let bias = Values::of_bias(bias, width)?;
    if d_input == 0 {
        return None;
    }
    let mut out = zeros(batch * tokens * half);
    if out.is_empty() {
        return Some(tensor(out, [batch, tokens, half]));
    }
    let bias = bias.as_slice().split_at(half);
    let mut room = Room::default();
    let blocks = out.chunks_mut(ROWS * half);
    for (out, x) in blocks.zip(x.as_slice().chunks(ROWS * d_input)) {
        let rows = x.len() / d_input;
        let gated = room.resize(rows * width);
        product(Matrix::new(x, rows, d_input), weight, width, gated);
        let rows = out.par_chunks_mut(half).zip(gated.par_chunks(width));
        rows.for_each(|(out, row)| {
            let (values, gates) = row.split_at(half);
            vectorized(
                #[inline(always)]
                || {
                    let values = values.iter().zip(bias.0);
                    let gates = gates.iter().zip(bias.1);
                    for (out, ((value, a), (gate, b))) in out.iter_mut().zip(values.zip(gates)) {
                        *out = (value + a) * gelu_of(gate + b);
                    }
                },
            );
        });
    }
    Some(tensor(out, [batch, tokens, half]))
}
