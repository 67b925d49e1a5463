//! Recorded tensors, and tests that compare with them.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData, backend::Backend};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A JSON file of the folder.
///
/// # Panics
/// If it is missing or damaged.
pub fn read_json(path: impl AsRef<Path>) -> Value {
    let path = path.as_ref();
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The tensors of a safetensors file of the folder.
#[derive(Debug)]
pub struct Values {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Values {
    /// Reads a file.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref().to_path_buf();
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path, bytes }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes)
            .unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }

    /// The names of all tensors.
    pub fn names(&self) -> Vec<String> {
        self.tensors()
            .names()
            .into_iter()
            .map(String::from)
            .collect()
    }

    /// One tensor as `f32` values; integers are converted.
    ///
    /// # Panics
    /// If it does not exist.
    pub fn data(&self, name: &str) -> TensorData {
        let tensors = self.tensors();
        let view = tensors
            .tensor(name)
            .unwrap_or_else(|error| panic!("{}: `{name}`: {error}", self.path.display()));
        let bytes = view.data();
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => numbers(bytes, f32::from_le_bytes),
            Dtype::F64 => numbers(bytes, |bytes| f64::from_le_bytes(bytes) as f32),
            Dtype::I64 => numbers(bytes, |bytes| i64::from_le_bytes(bytes) as f32),
            Dtype::I32 => numbers(bytes, |bytes| i32::from_le_bytes(bytes) as f32),
            other => panic!("`{name}` has type {other:?}"),
        };
        TensorData::new(values, view.shape().to_vec())
    }

    /// One tensor on a device.
    pub fn tensor<B: Backend, const D: usize>(
        &self,
        name: &str,
        device: &B::Device,
    ) -> Tensor<B, D> {
        Tensor::from_data(self.data(name), device)
    }

    /// One tensor as a list of numbers.
    pub fn list(&self, name: &str) -> Vec<f64> {
        self.data(name).iter::<f64>().collect()
    }
}

fn numbers<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (numbers, _) = bytes.as_chunks::<N>();
    numbers.iter().map(|number| convert(*number)).collect()
}

/// Panics unless shapes are equal and each value is within `absolute + relative · |expected|`; the
/// message has the worst value.
#[track_caller]
pub fn assert_close<B: Backend, const D: usize>(
    what: &str,
    got: Tensor<B, D>,
    expected: &TensorData,
    absolute: f64,
    relative: f64,
) {
    let got = got.into_data();
    assert_eq!(got.shape, expected.shape, "{what}: shapes differ");
    let mut worst = (0.0, 0, 0.0, 0.0);
    for (index, (got, expected)) in got.iter::<f64>().zip(expected.iter::<f64>()).enumerate() {
        let allowed = absolute + relative * expected.abs();
        let excess = (got - expected).abs() / allowed;
        assert!(!excess.is_nan(), "{what}: {got} at {index}, not {expected}");
        if excess > worst.0 {
            worst = (excess, index, got, expected);
        }
    }
    let (excess, index, got, expected) = worst;
    assert!(
        excess <= 1.0,
        "{what}: {got} at {index}, not {expected}: {excess:.1} times the tolerance"
    );
}

/// [`assert_close`] at the tolerance of a model stage in `f32`: 1e-4 absolute and relative.
#[track_caller]
pub fn assert_stage<B: Backend, const D: usize>(
    what: &str,
    got: Tensor<B, D>,
    expected: &TensorData,
) {
    assert_close(what, got, expected, 1e-4, 1e-4);
}
