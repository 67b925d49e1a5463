//! A tensor of a checkpoint: where its elements lie, and how they are read.

use std::fmt;
use std::io;
use std::sync::Arc;

use burn::tensor::{DType, TensorData};
use half::{bf16, f16};
use rayon::prelude::*;

use super::TensorSource;

/// A change of a tensor's values that is made when the tensor is read: a low-rank adapter, for
/// example.
pub trait Patch: Send + Sync {
    /// Changes `values`, all elements of the tensor in row-major order, in `f32`.
    ///
    /// # Errors
    /// If something that the change needs cannot be read.
    fn apply(&self, values: &mut [f32]) -> io::Result<()>;
}

/// What a tensor is, and where it lies.
#[derive(Clone)]
pub struct TensorInfo {
    /// Element type by its safetensors name: `F32`, `F16`, `BF16`, `I64`, ...
    pub dtype: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// The tensor's key in its file.
    pub stored_key: String,
    /// Index of its source in the checkpoint.
    pub(super) source: usize,
    /// Offset of its first byte in the source. Elements are little-endian.
    pub(super) offset: u64,
    /// For each dimension, the distance in elements from one index to the next; row-major if there
    /// is none.
    pub(super) strides: Option<Vec<usize>>,
    /// Changes that are made to the values, in order.
    pub(super) patches: Vec<Arc<dyn Patch>>,
}

impl fmt::Debug for TensorInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorInfo")
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .field("stored_key", &self.stored_key)
            .finish_non_exhaustive()
    }
}

/// Floating point types that weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Float {
    F64,
    F32,
    F16,
    BF16,
    /// Sign, four bits of exponent, three of mantissa, no infinity.
    F8E4M3,
    /// Sign, five bits of exponent, two of mantissa: the upper half of an `F16`.
    F8E5M2,
}

impl Float {
    /// The type that a tensor is written in if none is asked for: its own or, for those that
    /// tensors cannot have, the smallest that holds all their values.
    pub fn written_as(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F32 => DType::F32,
            Self::BF16 => DType::BF16,
            Self::F16 | Self::F8E4M3 | Self::F8E5M2 => DType::F16,
        }
    }
}

impl TensorInfo {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The type, if it is a floating point type.
    pub(super) fn float(&self) -> Option<Float> {
        Some(match self.dtype.as_str() {
            "F64" => Float::F64,
            "F32" => Float::F32,
            "F16" => Float::F16,
            "BF16" => Float::BF16,
            "F8_E4M3" => Float::F8E4M3,
            "F8_E5M2" => Float::F8E5M2,
            _ => return None,
        })
    }

    /// Number of elements from the first to the last, with gaps.
    fn span(&self) -> usize {
        let Some(strides) = &self.strides else {
            return self.num_elements();
        };
        if self.shape.contains(&0) {
            return 0;
        }
        let dims = self.shape.iter().zip(strides);
        dims.map(|(size, stride)| (size - 1) * stride)
            .sum::<usize>()
            + 1
    }

    /// The same elements in another shape.
    ///
    /// # Panics
    /// If the shapes have different numbers of elements.
    pub fn reshaped(mut self, shape: &[usize]) -> Self {
        assert_eq!(
            self.num_elements(),
            shape.iter().product::<usize>(),
            "a tensor of shape {:?} is viewed as {shape:?}",
            self.shape
        );
        if let Some(strides) = &self.strides {
            // Only dimensions of one element come or go.
            let dims = self.shape.iter().zip(strides);
            let mut kept = dims.filter(|(size, _)| **size != 1);
            let strides = shape.iter().map(|size| match size {
                1 => 1,
                _ => kept.next().map_or(1, |(_, stride)| *stride),
            });
            self.strides = Some(strides.collect());
        }
        self.shape = shape.to_vec();
        self
    }

    /// Part `index` of `count` equal ones, cut along the first dimension.
    pub fn part(mut self, index: usize, count: usize) -> Self {
        let rows = self.shape[0] / count;
        let row = match &self.strides {
            Some(strides) => strides[0],
            None => self.shape[1..].iter().product(),
        };
        self.shape[0] = rows;
        self.offset += (index * rows * row * self.element_bytes()) as u64;
        self
    }

    fn element_bytes(&self) -> usize {
        match self.dtype.as_str() {
            "F64" | "I64" | "U64" => 8,
            "F32" | "I32" | "U32" => 4,
            "F16" | "BF16" | "I16" | "U16" => 2,
            _ => 1,
        }
    }

    /// Number of bytes of the elements.
    pub(super) fn num_bytes(&self) -> u64 {
        (self.num_elements() * self.element_bytes()) as u64
    }

    /// Whether the stored bytes are the tensor: neither changed nor in another order.
    pub(super) fn is_contiguous(&self) -> bool {
        self.strides.is_none() && self.patches.is_empty()
    }

    /// The bytes as they are stored, if they are the tensor.
    pub(super) fn read_bytes(&self, source: &dyn TensorSource) -> Option<io::Result<Vec<u8>>> {
        if !self.is_contiguous() {
            return None;
        }
        let mut bytes = vec![0; self.num_bytes() as usize];
        Some(source.read_at(&mut bytes, self.offset).map(|()| bytes))
    }

    /// The elements of a floating point tensor in another floating point type: each through `f32`,
    /// which is exact for all types but `F64`, and rounded once.
    pub(super) fn read(&self, source: &dyn TensorSource, to: DType) -> io::Result<TensorData> {
        let shape = self.shape.clone();
        Ok(match to {
            DType::F16 => TensorData::new(self.read_as(source, f16::from_f32)?, shape),
            DType::BF16 => TensorData::new(self.read_as(source, bf16::from_f32)?, shape),
            DType::F64 => TensorData::new(self.read_as(source, f64::from)?, shape),
            _ => TensorData::new(self.read_as(source, |element| element)?, shape),
        })
    }

    /// The elements of a floating point tensor in `f32`.
    pub(super) fn read_f32(&self, source: &dyn TensorSource) -> io::Result<Vec<f32>> {
        self.read_as(source, |element| element)
    }

    fn read_as<T: Copy + Default + Send + Sync>(
        &self,
        source: &dyn TensorSource,
        to: impl Fn(f32) -> T + Sync,
    ) -> io::Result<Vec<T>> {
        if self.patches.is_empty() {
            return Ok(self.row_major(self.convert(source, to)?));
        }
        let mut values = self.row_major(self.convert(source, |element| element)?);
        for patch in &self.patches {
            patch.apply(&mut values)?;
        }
        Ok(values.into_par_iter().map(&to).collect())
    }

    /// The elements in the order in which they are stored.
    fn convert<T: Copy + Default + Send>(
        &self,
        source: &dyn TensorSource,
        to: impl Fn(f32) -> T + Sync,
    ) -> io::Result<Vec<T>> {
        let (offset, count) = (self.offset, self.span());
        match self.float().expect("the type was checked") {
            Float::F64 => elements(source, offset, count, |element| {
                to(f64::from_le_bytes(element) as f32)
            }),
            Float::F32 => elements(source, offset, count, |element| {
                to(f32::from_le_bytes(element))
            }),
            Float::F16 => elements(source, offset, count, |element| {
                to(f16::from_le_bytes(element).to_f32())
            }),
            Float::BF16 => elements(source, offset, count, |element| {
                to(bf16::from_le_bytes(element).to_f32())
            }),
            Float::F8E4M3 => elements(source, offset, count, |[element]| to(f8_e4m3(element))),
            Float::F8E5M2 => elements(source, offset, count, |[element]| {
                to(f16::from_le_bytes([0, element]).to_f32())
            }),
        }
    }

    /// Elements in the order of the shape, from those in the order in which they are stored.
    fn row_major<T: Copy + Default>(&self, stored: Vec<T>) -> Vec<T> {
        let Some(strides) = &self.strides else {
            return stored;
        };
        let mut elements = Vec::with_capacity(self.num_elements());
        let mut index = vec![0; self.shape.len()];
        let mut position = 0;
        for _ in 0..self.num_elements() {
            elements.push(stored[position]);
            for dim in (0..index.len()).rev() {
                index[dim] += 1;
                position += strides[dim];
                if index[dim] < self.shape[dim] {
                    break;
                }
                position -= index[dim] * strides[dim];
                index[dim] = 0;
            }
        }
        elements
    }
}

/// Reads elements in parallel, a piece at a time that stays in a core's cache until it is
/// converted.
fn elements<const N: usize, T: Copy + Default + Send>(
    source: &dyn TensorSource,
    offset: u64,
    count: usize,
    convert: impl Fn([u8; N]) -> T + Sync,
) -> io::Result<Vec<T>> {
    const PIECE: usize = 1 << 16;
    let mut elements = vec![T::default(); count];
    let pieces = elements.par_chunks_mut(PIECE).enumerate();
    pieces.try_for_each_init(Vec::new, |bytes, (index, piece)| {
        bytes.resize(piece.len() * N, 0);
        source.read_at(bytes, offset + (index * PIECE * N) as u64)?;
        let (bytes, _) = bytes.as_chunks::<N>();
        for (element, bytes) in piece.iter_mut().zip(bytes) {
            *element = convert(*bytes);
        }
        io::Result::Ok(())
    })?;
    Ok(elements)
}

/// Value of an `F8_E4M3` number (Micikevicius et al. 2022, <https://arxiv.org/abs/2209.05433>).
fn f8_e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 0xf), f32::from(bits & 0x7));
    let magnitude = match (exponent, bits & 0x7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2_f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2_f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(dtype: &str, shape: &[usize], strides: Option<&[usize]>) -> TensorInfo {
        TensorInfo {
            dtype: dtype.into(),
            shape: shape.to_vec(),
            stored_key: "a".into(),
            source: 0,
            offset: 0,
            strides: strides.map(<[usize]>::to_vec),
            patches: Vec::new(),
        }
    }

    fn values(info: &TensorInfo, bytes: &[u8]) -> Vec<f32> {
        let data = info.read(&bytes.to_vec(), DType::F32).unwrap();
        data.to_vec().unwrap()
    }

    /// E5M2 numbers: 0, 1, 2, ...
    fn counted(count: u8) -> Vec<u8> {
        (0..count).map(|n| f16::from(n).to_le_bytes()[1]).collect()
    }

    #[test]
    fn elements_in_any_order() {
        let bytes = counted(6);
        let rows = info("F8_E5M2", &[2, 3], None);
        assert_eq!(values(&rows, &bytes), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let columns = info("F8_E5M2", &[2, 3], Some(&[1, 2]));
        assert_eq!(values(&columns, &bytes), [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
        let squeezed = info("F8_E5M2", &[2, 3, 1, 1], Some(&[1, 2, 2, 2])).reshaped(&[2, 3]);
        assert_eq!(values(&squeezed, &bytes), [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
        let expanded = info("F8_E5M2", &[3, 2], Some(&[0, 1]));
        assert_eq!(values(&expanded, &bytes), [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
        assert!(values(&info("F32", &[0, 3], Some(&[3, 1])), &[]).is_empty());
    }

    #[test]
    fn parts_are_rows() {
        let bytes = counted(6);
        let rows = info("F8_E5M2", &[3, 2], None);
        assert_eq!(values(&rows.clone().part(2, 3), &bytes), [4.0, 5.0]);
        assert_eq!(values(&rows.part(0, 3), &bytes), [0.0, 1.0]);
    }

    #[test]
    fn changes_are_made_in_order_and_rounded_once() {
        struct Add(f32);
        impl Patch for Add {
            fn apply(&self, values: &mut [f32]) -> io::Result<()> {
                values.iter_mut().for_each(|value| *value += self.0);
                Ok(())
            }
        }
        let mut info = info("F16", &[1], None);
        info.patches = vec![
            Arc::new(Add(2048.0)),
            Arc::new(Add(1.0)),
            Arc::new(Add(1.0)),
        ];
        let data = info.read(&vec![0, 0], DType::F16).unwrap();
        // After each sum `f16` would round 2049 to 2048.
        assert_eq!(data.to_vec::<f16>().unwrap(), [f16::from_f32(2050.0)]);
    }

    #[test]
    fn eight_bit_numbers() {
        let check = |bits: u8, expected: f32| assert_eq!(f8_e4m3(bits), expected, "{bits:#x}");
        check(0x00, 0.0);
        check(0x01, 2_f32.powi(-9));
        check(0x08, 2_f32.powi(-6));
        check(0x38, 1.0);
        check(0xb9, -1.125);
        check(0x7e, 448.0);
        assert!(f8_e4m3(0x7f).is_nan() && f8_e4m3(0xff).is_nan());
    }
}
