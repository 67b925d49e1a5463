//! Winograd's transforms for F(4x4, 3x3), of many squares or filters at once: "Fast Algorithms for
//! Convolutional Neural Networks" (Lavin & Gray 2015, <https://arxiv.org/abs/1509.09308>, section
//! 4.3).

use std::marker::PhantomData;
use std::ops::{Add, Mul, Sub};

use pulp::{Simd, WithSimd};

use super::kernel::{COLUMNS, Line, inlined};

/// A transform of `N` values to `M`.
pub trait Transform<const N: usize, const M: usize> {
    fn of<V: Value>(values: [V; N]) -> [V; M];
}

/// What is computed with: a vector of lanes.
pub trait Value: Copy + Add<Output = Self> + Sub<Output = Self> + Mul<f32, Output = Self> {}

/// `G`, of a filter.
pub struct OfFilter;
/// `Bᵀ`, of inputs.
pub struct OfInputs;
/// `Aᵀ`, of products.
pub struct OfProducts;

impl Transform<3, 6> for OfFilter {
    #[inline(always)]
    fn of<V: Value>([g0, g1, g2]: [V; 3]) -> [V; 6] {
        let (even, odd) = ((g0 + g2) * (-1.0 / 6.0), g1 * (-1.0 / 6.0));
        let (even_2, odd_2) = ((g0 + g2 * 4.0) * (1.0 / 24.0), g1 * (1.0 / 12.0));
        [
            g0 * 0.25,
            even + odd,
            even - odd,
            even_2 + odd_2,
            even_2 - odd_2,
            g2,
        ]
    }
}

impl Transform<6, 6> for OfInputs {
    #[inline(always)]
    fn of<V: Value>([d0, d1, d2, d3, d4, d5]: [V; 6]) -> [V; 6] {
        let (even, odd) = (d4 - d2 * 4.0, d3 - d1 * 4.0);
        let (even_2, odd_2) = (d4 - d2, (d3 - d1) * 2.0);
        [
            d0 * 4.0 - d2 * 5.0 + d4,
            even + odd,
            even - odd,
            even_2 + odd_2,
            even_2 - odd_2,
            d1 * 4.0 - d3 * 5.0 + d5,
        ]
    }
}

impl Transform<6, 4> for OfProducts {
    #[inline(always)]
    fn of<V: Value>([m0, m1, m2, m3, m4, m5]: [V; 6]) -> [V; 4] {
        let (sum, difference) = (m1 + m2, m1 - m2);
        let (sum_2, difference_2) = (m3 + m4, m3 - m4);
        [
            m0 + sum + sum_2,
            difference + difference_2 * 2.0,
            sum + sum_2 * 4.0,
            difference + difference_2 * 8.0 + m5,
        ]
    }
}

/// Transforms the columns of a square, and then its rows: `from` has its `N`² lines, row by row,
/// and `store` gets the `M`² that come of it, some lanes at a time: the number of the line, the
/// first lane, and its values from there on.
#[inline(always)]
pub fn transform<'a, T: Transform<N, M>, const N: usize, const M: usize>(
    from: impl Fn(usize) -> &'a Line,
    store: impl FnMut(usize, usize, &[f32]),
) {
    inlined(Square {
        from,
        store,
        transform: PhantomData::<T>,
    });
}

struct Square<T, L, F, const N: usize, const M: usize> {
    from: L,
    store: F,
    transform: PhantomData<T>,
}

impl<'a, T, L, F, const N: usize, const M: usize> WithSimd for Square<T, L, F, N, M>
where
    T: Transform<N, M>,
    L: Fn(usize) -> &'a Line,
    F: FnMut(usize, usize, &[f32]),
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let none = Lanes(simd, simd.splat_f32s(0.0));
        for left in (0..COLUMNS).step_by(S::F32_LANES) {
            // Of each column, transformed: its values in a row.
            let mut half = [[none; N]; M];
            for column in 0..N {
                let mut values = [none; N];
                for (row, value) in values.iter_mut().enumerate() {
                    let line = &(self.from)(row * N + column)[left..left + S::F32_LANES];
                    value.1 = S::as_simd_f32s(line).0[0];
                }
                for (row, value) in half.iter_mut().zip(T::of(values)) {
                    row[column] = value;
                }
            }
            for (row, values) in half.iter().enumerate() {
                for (column, value) in T::of(*values).iter().enumerate() {
                    let values = pulp::bytemuck::cast_slice(std::slice::from_ref(&value.1));
                    (self.store)(row * M + column, left, values);
                }
            }
        }
    }
}

/// As many lanes as a vector has.
struct Lanes<S: Simd>(S, S::f32s);

impl<S: Simd> Clone for Lanes<S> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: Simd> Copy for Lanes<S> {}

impl<S: Simd> Add for Lanes<S> {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0, self.0.add_f32s(self.1, other.1))
    }
}

impl<S: Simd> Sub for Lanes<S> {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(self.0, self.0.sub_f32s(self.1, other.1))
    }
}

impl<S: Simd> Mul<f32> for Lanes<S> {
    type Output = Self;

    #[inline(always)]
    fn mul(self, factor: f32) -> Self {
        Self(self.0, self.0.mul_f32s(self.1, self.0.splat_f32s(factor)))
    }
}

impl<S: Simd> Value for Lanes<S> {}
