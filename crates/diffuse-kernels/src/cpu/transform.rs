//! Winograd's transforms for F(4x4, 3x3), of [`NR`] tiles or filters at once: "Fast Algorithms for
//! Convolutional Neural Networks" (Lavin & Gray 2015, <https://arxiv.org/abs/1509.09308>, section
//! 4.3).

use std::marker::PhantomData;
use std::ops::{Add, Mul, Sub};

use pulp::{Simd, WithSimd};

use super::micro_kernel::{NR, PanelRow, inlined};

/// A transform of `N` values to `M`.
pub trait Transform<const N: usize, const M: usize> {
    fn apply<V: Element>(values: [V; N]) -> [V; M];
}

/// An element of a tile, of several tiles at once.
pub trait Element:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<f32, Output = Self>
{
}

/// `G`, for filters.
pub struct FilterTransform;
/// `Bᵀ`, for inputs.
pub struct InputTransform;
/// `Aᵀ`, for outputs.
pub struct OutputTransform;

impl Transform<3, 6> for FilterTransform {
    #[inline(always)]
    fn apply<V: Element>([g0, g1, g2]: [V; 3]) -> [V; 6] {
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

impl Transform<6, 6> for InputTransform {
    #[inline(always)]
    fn apply<V: Element>([d0, d1, d2, d3, d4, d5]: [V; 6]) -> [V; 6] {
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

impl Transform<6, 4> for OutputTransform {
    #[inline(always)]
    fn apply<V: Element>([m0, m1, m2, m3, m4, m5]: [V; 6]) -> [V; 4] {
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

/// Transforms the columns and then the rows of [`NR`] tiles. `from` returns an element, by its
/// row-major index among `N`², of every tile. `store` gets the index of a result among `M`², the
/// first of some lanes, and their values.
#[inline(always)]
pub fn transform<'a, T: Transform<N, M>, const N: usize, const M: usize>(
    from: impl Fn(usize) -> &'a PanelRow,
    store: impl FnMut(usize, usize, &[f32]),
) {
    inlined(TileTransform {
        from,
        store,
        transform: PhantomData::<T>,
    });
}

struct TileTransform<T, L, F, const N: usize, const M: usize> {
    from: L,
    store: F,
    transform: PhantomData<T>,
}

impl<'a, T, L, F, const N: usize, const M: usize> WithSimd for TileTransform<T, L, F, N, M>
where
    T: Transform<N, M>,
    L: Fn(usize) -> &'a PanelRow,
    F: FnMut(usize, usize, &[f32]),
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let zero = SimdVector(simd, simd.splat_f32s(0.0));
        for left in (0..NR).step_by(S::F32_LANES) {
            // The tile with its columns transformed.
            let mut columns = [[zero; N]; M];
            for column in 0..N {
                let mut values = [zero; N];
                for (row, value) in values.iter_mut().enumerate() {
                    let lanes = &(self.from)(row * N + column)[left..left + S::F32_LANES];
                    value.1 = S::as_simd_f32s(lanes).0[0];
                }
                for (row, value) in columns.iter_mut().zip(T::apply(values)) {
                    row[column] = value;
                }
            }
            for (row, values) in columns.iter().enumerate() {
                for (column, value) in T::apply(*values).iter().enumerate() {
                    let values = pulp::bytemuck::cast_slice(std::slice::from_ref(&value.1));
                    (self.store)(row * M + column, left, values);
                }
            }
        }
    }
}

/// A SIMD vector with its instruction set.
struct SimdVector<S: Simd>(S, S::f32s);

impl<S: Simd> Clone for SimdVector<S> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: Simd> Copy for SimdVector<S> {}

impl<S: Simd> Add for SimdVector<S> {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0, self.0.add_f32s(self.1, other.1))
    }
}

impl<S: Simd> Sub for SimdVector<S> {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(self.0, self.0.sub_f32s(self.1, other.1))
    }
}

impl<S: Simd> Mul<f32> for SimdVector<S> {
    type Output = Self;

    #[inline(always)]
    fn mul(self, factor: f32) -> Self {
        Self(self.0, self.0.mul_f32s(self.1, self.0.splat_f32s(factor)))
    }
}

impl<S: Simd> Element for SimdVector<S> {}
