//! What the tests share: the fixtures that `golden.py` makes from `cases.json`.
#![allow(dead_code)]

use std::path::PathBuf;

use burn::prelude::*;
use burn::tensor::DType;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};

/// A file that `golden.py` made, or the file of that name in the folder `schedulers` of another
/// set.
pub fn read(name: &str) -> Vec<u8> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let other = another_set().map(|folder| folder.join(name));
    let path = other.filter(|path| path.exists()).unwrap_or(own.join(name));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Where `DIFFUSE_REFERENCE` says that another set of recorded values is.
pub fn another_set() -> Option<PathBuf> {
    std::env::var_os("DIFFUSE_REFERENCE").map(|folder| PathBuf::from(folder).join("schedulers"))
}

pub fn rows(name: &str) -> Vec<Value> {
    serde_json::from_slice(&read(name)).unwrap()
}

/// Tensors of a `.safetensors` file as f64, which holds every type that is stored.
pub struct Tensors(Vec<u8>);

impl Tensors {
    pub fn read(name: &str) -> Self {
        Self(read(name))
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        SafeTensors::deserialize(&self.0)
            .unwrap()
            .tensor(name)
            .unwrap()
            .shape()
            .to_vec()
    }

    pub fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.0)
            .unwrap()
            .tensor(name)
            .is_ok()
    }

    pub fn get(&self, name: &str) -> Vec<f64> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file
            .tensor(name)
            .unwrap_or_else(|_| panic!("`{name}` is not in the file"));
        let bytes = view.data();
        fn each<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes
                .as_chunks::<N>()
                .0
                .iter()
                .map(|bytes| number(*bytes))
                .collect()
        }
        match view.dtype() {
            Dtype::F64 => each(bytes, f64::from_le_bytes),
            Dtype::F32 => each(bytes, |bytes| f32::from_le_bytes(bytes).into()),
            Dtype::F16 => each(bytes, |bytes| {
                burn::tensor::f16::from_le_bytes(bytes).into()
            }),
            Dtype::BF16 => each(bytes, |bytes| {
                burn::tensor::bf16::from_le_bytes(bytes).into()
            }),
            Dtype::I64 => each(bytes, |bytes| i64::from_le_bytes(bytes) as f64),
            other => panic!("{other:?} in a fixture"),
        }
    }
}

/// The values of a tensor.
pub fn values<B: Backend>(x: &Tensor<B, 4>) -> Vec<f64> {
    x.to_data().convert::<f64>().to_vec().unwrap()
}

/// Compares whole tensors; a NaN never agrees.
#[track_caller]
pub fn check_close(what: &str, actual: &[f64], expected: &[f64], tolerance: impl Fn(f64) -> f64) {
    assert_eq!(actual.len(), expected.len(), "{what}: number of values");
    let off = |place: usize| (actual[place] - expected[place]).abs();
    let worst = (0..actual.len())
        .filter(|&place| off(place).is_nan() || off(place) > tolerance(expected[place]))
        .max_by(|&a, &b| off(a).total_cmp(&off(b)));
    if let Some(place) = worst {
        let (a, e) = (actual[place], expected[place]);
        let allowed = tolerance(e);
        panic!(
            "{what}: value {place} is {a}, expected {e} (off by {:e}, allowed {allowed:e})",
            off(place)
        );
    }
}

pub fn object(value: &Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

pub fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|number| number.as_f64().unwrap())
        .collect()
}

pub const SHAPE: [usize; 4] = [2, 3, 4, 4];

/// The image that is noised in the fixtures.
pub fn wave<B: Backend>(dtype: DType) -> Tensor<B, 4> {
    let wave: Vec<f32> = (0..96).map(|i| (i as f32).sin()).collect();
    Tensor::from_data(TensorData::new(wave, SHAPE), (&Default::default(), dtype))
}
