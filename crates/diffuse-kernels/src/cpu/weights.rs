//! Weights as they are kept in memory: in `f32`, or in half precision, which is widened a part at a
//! time.

use std::any::Any;
use std::ops::Range;

use burn::tensor::{DType, Tensor, TensorPrimitive, backend::Backend};
use burn_flex::{Flex, FlexTensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::memory::PooledBuffer;

/// The values of a weight in their order, if they are `Flex`'s.
pub struct Weight(FlexTensor);

/// Some of a weight's values.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl Weight {
    pub fn of<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Option<Self> {
        let tensor = (tensor as &dyn Any).downcast_ref::<Tensor<Flex, D>>()?;
        match tensor.clone().into_primitive() {
            TensorPrimitive::Float(values) => Some(Self(values.to_contiguous())),
            TensorPrimitive::QFloat(_) => None,
        }
    }

    /// None if they are of a type that is not computed with here.
    pub fn values(&self) -> Option<Weights<'_>> {
        match self.0.dtype() {
            DType::F32 => self.0.as_slice().map(Weights::F32),
            DType::F16 => self.0.as_slice().map(Weights::F16),
            DType::BF16 => self.0.as_slice().map(Weights::BF16),
            _ => None,
        }
    }
}

impl<'a> Weights<'a> {
    pub fn part(self, range: Range<usize>) -> Self {
        match self {
            Weights::F32(values) => Weights::F32(&values[range]),
            Weights::F16(values) => Weights::F16(&values[range]),
            Weights::BF16(values) => Weights::BF16(&values[range]),
        }
    }

    /// The values in `f32`; those of another type are widened into `buffer`.
    pub fn widened<'b>(self, buffer: &'b mut PooledBuffer) -> &'b [f32]
    where
        'a: 'b,
    {
        if let Weights::F32(values) = self {
            return values;
        }
        let buffer = buffer.resize(self.len());
        self.copy_to(buffer);
        buffer
    }

    pub fn len(self) -> usize {
        match self {
            Weights::F32(values) => values.len(),
            Weights::F16(values) => values.len(),
            Weights::BF16(values) => values.len(),
        }
    }

    /// `N` values from `first` on, in `f32`.
    #[inline(always)]
    pub fn block<const N: usize>(self, first: usize) -> [f32; N] {
        if let Weights::F32(values) = self {
            return *values[first..].first_chunk().expect("as many values");
        }
        let mut block = [0.0; N];
        self.part(first..first + N).copy_to(&mut block);
        block
    }

    /// The values in `f32`.
    #[inline(always)]
    pub fn copy_to(self, to: &mut [f32]) {
        match self {
            Weights::F32(values) => to.copy_from_slice(values),
            Weights::F16(values) => values.convert_to_f32_slice(to),
            Weights::BF16(values) => values.convert_to_f32_slice(to),
        }
    }
}
