//! Weights in the type that they are stored in: `f32`, or half precision, which is converted to
//! `f32` in small blocks.

use std::ops::Range;

use burn::tensor::{DType, Tensor, TensorPrimitive};
use burn_flex::{Flex, FlexTensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::memory::{PooledBuffer, prefetch};

/// The contiguous values of a weight.
pub struct Weight(FlexTensor);

/// A slice of a weight's values.
#[derive(Clone, Copy)]
pub enum WeightSlice<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl Weight {
    /// `None` if the tensor is quantised.
    pub fn of<const D: usize>(tensor: &Tensor<Flex, D>) -> Option<Self> {
        match tensor.clone().into_primitive() {
            TensorPrimitive::Float(values) => Some(Self(values.to_contiguous())),
            TensorPrimitive::QFloat(_) => None,
        }
    }

    /// `None` if their type is not supported.
    pub fn values(&self) -> Option<WeightSlice<'_>> {
        match self.0.dtype() {
            DType::F32 => self.0.as_slice().map(WeightSlice::F32),
            DType::F16 => self.0.as_slice().map(WeightSlice::F16),
            DType::BF16 => self.0.as_slice().map(WeightSlice::BF16),
            _ => None,
        }
    }
}

impl<'a> WeightSlice<'a> {
    pub fn slice(self, range: Range<usize>) -> Self {
        match self {
            WeightSlice::F32(values) => WeightSlice::F32(&values[range]),
            WeightSlice::F16(values) => WeightSlice::F16(&values[range]),
            WeightSlice::BF16(values) => WeightSlice::BF16(&values[range]),
        }
    }

    /// The values in `f32`; half precision is converted into `buffer`.
    pub fn to_f32<'b>(self, buffer: &'b mut PooledBuffer) -> &'b [f32]
    where
        'a: 'b,
    {
        if let WeightSlice::F32(values) = self {
            return values;
        }
        let buffer = buffer.resize(self.len());
        self.copy_to(buffer);
        buffer
    }

    pub fn len(self) -> usize {
        match self {
            WeightSlice::F32(values) => values.len(),
            WeightSlice::F16(values) => values.len(),
            WeightSlice::BF16(values) => values.len(),
        }
    }

    /// `N` values from `first` on, converted to `f32`.
    #[inline(always)]
    pub fn block<const N: usize>(self, first: usize) -> [f32; N] {
        if let WeightSlice::F32(values) = self {
            return *values[first..]
                .first_chunk()
                .expect("N values from `first` on");
        }
        let mut block = [0.0; N];
        self.slice(first..first + N).copy_to(&mut block);
        block
    }

    /// Has the CPU fetch values from `first` on, if there are as many.
    #[inline(always)]
    pub fn prefetch(self, first: usize, len: usize) {
        let range = first..first + len;
        match self {
            WeightSlice::F32(values) => prefetch(values.get(range).unwrap_or_default()),
            WeightSlice::F16(values) => prefetch(values.get(range).unwrap_or_default()),
            WeightSlice::BF16(values) => prefetch(values.get(range).unwrap_or_default()),
        }
    }

    /// Copies all values, converted to `f32`.
    #[inline(always)]
    pub fn copy_to(self, to: &mut [f32]) {
        match self {
            WeightSlice::F32(values) => to.copy_from_slice(values),
            WeightSlice::F16(values) => values.convert_to_f32_slice(to),
            WeightSlice::BF16(values) => values.convert_to_f32_slice(to),
        }
    }
}
