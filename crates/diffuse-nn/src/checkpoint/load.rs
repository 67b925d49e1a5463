//! Filling a module from a checkpoint, through burn-store.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Element, Shape, Tensor, TensorData, backend::Backend};
use burn_store::{Applier, TensorSnapshot, TensorSnapshotError};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::ops;

use super::{Checkpoint, CheckpointError, TensorInfo, TensorSource};

/// Name and shape of a module's parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// The path of fields to it, which is its key in checkpoints.
    pub key: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Parameter {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All parameters of a module, without initialising them.
pub fn parameters<B: Backend, M: Module<B>>(module: &M) -> Vec<Parameter> {
    let mut visitor = ListParameters::default();
    module.visit(&mut visitor);
    visitor.parameters
}

#[derive(Default)]
struct ListParameters {
    path: Vec<String>,
    parameters: Vec<Parameter>,
}

impl<B: Backend> ModuleVisitor<B> for ListParameters {
    fn enter_module(&mut self, name: &str, container: &str) {
        if !is_enum(container) {
            self.path.push(name.to_string());
        }
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        if !is_enum(container) {
            self.path.pop();
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.parameters.push(Parameter {
            key: self.path.join("."),
            shape: param.lazy_shape().to_vec(),
        });
    }
}

/// The floating point type that a module computes in: that of its first bias or norm, or of its
/// first weight if it has neither. Nothing else is looked at, since weights may be kept in another
/// type.
pub fn float_dtype<B: Backend, M: Module<B>>(module: &M) -> DType {
    #[derive(Default)]
    struct First {
        vector: Option<DType>,
        weight: Option<DType>,
    }
    impl<B: Backend> ModuleVisitor<B> for First {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let first = if D == 1 {
                &mut self.vector
            } else {
                &mut self.weight
            };
            first.get_or_insert_with(|| param.val().dtype());
        }
    }
    let mut first = First::default();
    module.visit(&mut first);
    let dtype = first.vector.or(first.weight);
    dtype.unwrap_or_else(B::FloatElem::dtype)
}

/// A module with all its parameters in another floating point type.
pub fn cast<B: Backend, M: Module<B>>(module: M, dtype: DType) -> M {
    struct Cast(DType);
    impl<B: Backend> ModuleMapper<B> for Cast {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            param.map(|tensor| tensor.cast(self.0))
        }
    }
    arrange_weights(module.map(&mut Cast(dtype)))
}

/// Lays out the weights of convolutions as the backend's kernels read them, which loading does: for
/// a module that was made otherwise. Shapes and values stay.
pub fn arrange_weights<B: Backend, M: Module<B>>(module: M) -> M {
    module.map(&mut ArrangeWeights)
}

struct ArrangeWeights;

impl<B: Backend> ModuleMapper<B> for ArrangeWeights {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if D != 4 {
            return param;
        }
        param.map(|weight| {
            let weight = Tensor::<B, 4>::from_primitive(weight.into_primitive());
            Tensor::from_primitive(ops::convolution_weight(weight).into_primitive())
        })
    }
}

/// Variants of an enum are not part of a parameter's key.
fn is_enum(container: &str) -> bool {
    container.starts_with("Enum:")
}

impl Checkpoint {
    /// Fills `module` with this file's tensors in type `dtype`, by default the backend's own float
    /// type; those of two and more dimensions in type `weights`, by default the same.
    ///
    /// A module that has just been made by `init` has not drawn its weights yet, and never does:
    /// each parameter is allocated once, with the value from the file.
    ///
    /// # Errors
    /// If a parameter is missing in the file or a tensor of the file is left over, if a shape or
    /// type is wrong, or if reading fails.
    pub fn load_into<B: Backend, M: Module<B>>(
        &self,
        module: M,
        dtype: Option<DType>,
        weights: Option<DType>,
    ) -> Result<M, CheckpointError> {
        let dtype = dtype.unwrap_or_else(B::FloatElem::dtype);
        let weights = weights.unwrap_or(dtype);
        let parameters = parameters(&module);
        self.check(&parameters)?;

        let failed = Rc::new(RefCell::new(None));
        let snapshots = parameters
            .into_iter()
            .map(|parameter| {
                let is_weight = parameter.shape.len() > 1;
                self.snapshot(parameter, if is_weight { weights } else { dtype }, &failed)
            })
            .collect();
        let mut applier = Applier::<B>::new(snapshots, None, None, true);
        let module = module.map(&mut applier);
        let result = applier.into_result();
        if let Some(source) = failed.take() {
            let path = self.path.clone();
            return Err(CheckpointError::Read { path, source });
        }
        assert!(
            result.is_success() && result.missing.is_empty(),
            "keys and shapes were checked: {result}"
        );
        Ok(arrange_weights(module))
    }

    /// Compares names, shapes and types with a module's parameters; no tensor is read.
    ///
    /// # Errors
    /// As [`load_into`](Self::load_into).
    pub fn check(&self, parameters: &[Parameter]) -> Result<(), CheckpointError> {
        let path = || self.path.clone();
        let missing: Vec<String> = parameters
            .iter()
            .filter(|parameter| !self.tensors.contains_key(&parameter.key))
            .map(|parameter| parameter.key.clone())
            .collect();
        if !missing.is_empty() {
            return Err(CheckpointError::Missing {
                path: path(),
                keys: missing,
            });
        }
        let known: std::collections::HashSet<&str> = parameters
            .iter()
            .map(|parameter| parameter.key.as_str())
            .collect();
        let unexpected: Vec<String> = self
            .tensors
            .keys()
            .filter(|key| !known.contains(key.as_str()))
            .cloned()
            .collect();
        if !unexpected.is_empty() {
            return Err(CheckpointError::Unexpected {
                path: path(),
                keys: unexpected,
            });
        }
        for Parameter { key, shape } in parameters {
            let info = &self.tensors[key];
            if info.shape != *shape {
                return Err(CheckpointError::Shape {
                    path: path(),
                    key: key.clone(),
                    expected: shape.clone(),
                    found: info.shape.clone(),
                });
            }
            if info.float().is_none() {
                return Err(CheckpointError::Type {
                    path: path(),
                    key: key.clone(),
                    found: info.dtype.clone(),
                });
            }
        }
        Ok(())
    }

    /// A tensor that is read when burn-store asks for it. Why that failed goes to `failed`.
    fn snapshot(
        &self,
        parameter: Parameter,
        dtype: DType,
        failed: &Rc<RefCell<Option<io::Error>>>,
    ) -> TensorSnapshot {
        let failed = Rc::clone(failed);
        let source = Arc::clone(&self.sources[self.tensors[&parameter.key].source]);
        let info = self.tensors[&parameter.key].clone();
        let shape = Shape::from(parameter.shape);
        let path = parameter.key.split('.').map(String::from).collect();
        let read = move || {
            read_tensor(&*source, &info, dtype).map_err(|error| {
                let message = error.to_string();
                failed.replace(Some(error));
                TensorSnapshotError::IoError(message)
            })
        };
        TensorSnapshot::from_closure(
            Rc::new(read),
            dtype,
            shape,
            path,
            Vec::new(),
            ParamId::new(),
        )
    }

    /// One tensor as `f32`, for small files such as latents or test values.
    ///
    /// # Errors
    /// If there is no such tensor, it is not of a floating point type, or reading fails.
    pub fn read_f32(&self, key: &str) -> Result<TensorData, CheckpointError> {
        let info = self
            .tensors
            .get(key)
            .ok_or_else(|| CheckpointError::Missing {
                path: self.path.clone(),
                keys: vec![key.to_string()],
            })?;
        if info.float().is_none() {
            return Err(CheckpointError::Type {
                path: self.path.clone(),
                key: key.to_string(),
                found: info.dtype.clone(),
            });
        }
        self.read(info, DType::F32)
            .map_err(|source| CheckpointError::Read {
                path: self.path.clone(),
                source,
            })
    }

    /// A tensor as it is stored.
    pub(super) fn read_bytes(&self, info: &TensorInfo) -> io::Result<Vec<u8>> {
        let length = usize::try_from(info.num_bytes()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut bytes = vec![0; length];
        self.sources[info.source].read_at(&mut bytes, info.bytes.start)?;
        Ok(bytes)
    }

    /// A tensor of a floating point type, in another.
    pub(super) fn read(&self, info: &TensorInfo, dtype: DType) -> io::Result<TensorData> {
        read_tensor(&*self.sources[info.source], info, dtype)
    }
}

/// Reads elements into a vector of the wanted type, each through `f32`, which is exact for all
/// types but `F64`.
fn read_tensor(source: &dyn TensorSource, info: &TensorInfo, to: DType) -> io::Result<TensorData> {
    let shape = info.shape.clone();
    Ok(match to {
        DType::F16 => TensorData::new(read_as(source, info, f16::from_f32)?, shape),
        DType::BF16 => TensorData::new(read_as(source, info, bf16::from_f32)?, shape),
        DType::F64 => TensorData::new(read_as(source, info, f64::from)?, shape),
        _ => TensorData::new(read_as(source, info, |element| element)?, shape),
    })
}

fn read_as<T: Clone + Default + Send>(
    source: &dyn TensorSource,
    info: &TensorInfo,
    to: impl Fn(f32) -> T + Sync,
) -> io::Result<Vec<T>> {
    match info.float().expect("the type was checked") {
        DType::F16 => elements(source, info, |element| {
            to(f16::from_le_bytes(element).to_f32())
        }),
        DType::BF16 => elements(source, info, |element| {
            to(bf16::from_le_bytes(element).to_f32())
        }),
        DType::F64 => elements(source, info, |element| {
            to(f64::from_le_bytes(element) as f32)
        }),
        _ => elements(source, info, |element| to(f32::from_le_bytes(element))),
    }
}

/// Reads elements in parallel, a piece at a time that stays in a core's cache until it is
/// converted.
fn elements<const N: usize, T: Clone + Default + Send>(
    source: &dyn TensorSource,
    info: &TensorInfo,
    convert: impl Fn([u8; N]) -> T + Sync,
) -> io::Result<Vec<T>> {
    const PIECE: usize = 1 << 16;
    let mut elements = vec![T::default(); info.num_elements()];
    let pieces = elements.par_chunks_mut(PIECE).enumerate();
    pieces.try_for_each_init(Vec::new, |bytes, (index, piece)| {
        bytes.resize(piece.len() * N, 0);
        source.read_at(bytes, info.bytes.start + (index * PIECE * N) as u64)?;
        let (bytes, _) = bytes.as_chunks::<N>();
        for (element, bytes) in piece.iter_mut().zip(bytes) {
            *element = convert(*bytes);
        }
        io::Result::Ok(())
    })?;
    Ok(elements)
}
