//! Weights as they are kept in memory: in `f32`, or in half precision, which is widened a part at a time.

use std::any::Any;
use std::ops::Range;

use burn::tensor::{DType, Tensor, TensorPrimitive, backend::Backend};
use burn_flex::{Flex, FlexTensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::matrix::Matrix;
use super::memory::Room;

/// Values that are widened for a product at once: they stay in the processor's cache.
const AT_ONCE: usize = 1 << 21;
/// Values of one task.
const CHUNK: usize = 1 << 15;

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

    /// How many rows of `size` values to take for a product at once: all of them, if there is nothing to widen.
    pub fn rows_at_once(self, size: usize) -> usize {
        match self {
            Weights::F32(_) => usize::MAX,
            Weights::F16(_) | Weights::BF16(_) => (AT_ONCE / size.max(1)).max(1),
        }
    }

    /// The values in `f32`; those of another type are widened into `room`.
    pub fn widened<'b>(self, room: &'b mut Room) -> &'b [f32]
    where
        'a: 'b,
    {
        if let Weights::F32(values) = self {
            return values;
        }
        let room = room.resize(self.len());
        self.widen_into(room);
        room
    }

    /// Some columns of the matrix with rows of `width` values, in `f32`; as [`widened`](Self::widened).
    pub fn columns<'b>(self, width: usize, columns: Range<usize>, room: &'b mut Room) -> Matrix<'b>
    where
        'a: 'b,
    {
        let (rows, count) = (self.len() / width, columns.len());
        if let Weights::F32(values) = self {
            return Matrix {
                row_stride: width,
                ..Matrix::new(&values[columns.start..], rows, count)
            };
        }
        let room = room.resize(rows * count);
        let to = room.par_chunks_mut(count).enumerate();
        to.for_each(|(row, to)| {
            let start = row * width + columns.start;
            self.part(start..start + count).widen_into(to);
        });
        Matrix::new(room, rows, count)
    }

    fn len(self) -> usize {
        match self {
            Weights::F32(values) => values.len(),
            Weights::F16(values) => values.len(),
            Weights::BF16(values) => values.len(),
        }
    }

    fn widen_into(self, to: &mut [f32]) {
        let chunks = to.par_chunks_mut(CHUNK).enumerate();
        chunks.for_each(|(index, to)| {
            let start = index * CHUNK;
            match self.part(start..start + to.len()) {
                Weights::F32(values) => to.copy_from_slice(values),
                Weights::F16(values) => values.convert_to_f32_slice(to),
                Weights::BF16(values) => values.convert_to_f32_slice(to),
            }
        });
    }
}
