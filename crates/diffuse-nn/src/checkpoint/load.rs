//! Filling a module from a checkpoint, through burn-store.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use crate::ops;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Element, Shape, Tensor, TensorData, backend::Backend};
use burn_store::{Applier, TensorSnapshot, TensorSnapshotError};

use super::{Checkpoint, CheckpointError, TensorInfo};

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
        param.map(arrange)
    }
}

/// The weight of a convolution as the backend's kernels read it; other weights as they are.
fn arrange<B: Backend, const D: usize>(weight: Tensor<B, D>) -> Tensor<B, D> {
    if D != 4 {
        return weight;
    }
    let weight = Tensor::<B, 4>::from_primitive(weight.into_primitive());
    Tensor::from_primitive(ops::convolution_weight(weight).into_primitive())
}

/// Variants of an enum are not part of a parameter's key.
fn is_enum(container: &str) -> bool {
    container.starts_with("Enum:")
}

impl Checkpoint {
    /// Fills `module` with this checkpoint's tensors in type `dtype`, by default the backend's own
    /// float type; those of two and more dimensions in type `weights`, by default the same. Tensors
    /// that the module does not have are not read.
    ///
    /// A module that has just been made by `init` has not drawn its weights yet, and never does:
    /// each parameter is allocated once, with the value from the file.
    ///
    /// # Errors
    /// As [`check`](Self::check), and if reading fails.
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

    /// Compares names, shapes and types with a module's parameters; no tensor is read. The result
    /// are the tensors that the module does not have, by their keys in the file.
    ///
    /// # Errors
    /// If a parameter is missing, or its tensor has another shape or no floating point type.
    pub fn check(&self, parameters: &[Parameter]) -> Result<Vec<String>, CheckpointError> {
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
        for Parameter { key, shape } in parameters {
            let info = &self.tensors[key];
            if info.shape != *shape {
                return Err(CheckpointError::Shape {
                    path: path(),
                    key: info.stored_key.clone(),
                    expected: shape.clone(),
                    found: info.shape.clone(),
                });
            }
            if info.float().is_none() {
                return Err(CheckpointError::Type {
                    path: path(),
                    key: info.stored_key.clone(),
                    found: info.dtype.clone(),
                });
            }
        }
        let known: HashSet<&str> = parameters
            .iter()
            .map(|parameter| parameter.key.as_str())
            .collect();
        let surplus = self
            .tensors
            .iter()
            .filter(|(key, _)| !known.contains(key.as_str()));
        Ok(surplus.map(|(_, info)| info.stored_key.clone()).collect())
    }

    /// [`check`](Self::check), with surplus tensors an error if `strict`, else one warning in the
    /// log.
    ///
    /// # Errors
    /// As [`check`](Self::check), and if there are surplus tensors and `strict` is set.
    pub fn check_surplus(
        &self,
        parameters: &[Parameter],
        strict: bool,
    ) -> Result<(), CheckpointError> {
        let keys = self.check(parameters)?;
        self.report_surplus(keys, strict)
    }

    /// Surplus tensors, by their keys in the file: an error if `strict`, else one warning in the
    /// log.
    ///
    /// # Errors
    /// If there are any and `strict` is set.
    pub fn report_surplus(&self, keys: Vec<String>, strict: bool) -> Result<(), CheckpointError> {
        if keys.is_empty() {
            return Ok(());
        }
        let path = self.path.clone();
        let surplus = CheckpointError::Unexpected { path, keys };
        if strict {
            return Err(surplus);
        }
        log::warn!("{surplus}; not used");
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
        let info = self.tensors[&parameter.key].clone();
        let source = Arc::clone(&self.sources[info.source]);
        let shape = Shape::from(parameter.shape);
        let path = parameter.key.split('.').map(String::from).collect();
        let read = move || {
            info.read(&*source, dtype).map_err(|error| {
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
                key: info.stored_key.clone(),
                found: info.dtype.clone(),
            });
        }
        info.read(&*self.sources[info.source], DType::F32)
            .map_err(|source| CheckpointError::Read {
                path: self.path.clone(),
                source,
            })
    }

    /// The elements of one of this checkpoint's tensors in `f32`, in row-major order.
    ///
    /// # Errors
    /// If it is not of a floating point type, or reading fails.
    pub fn read_values(&self, tensor: &TensorInfo) -> io::Result<Vec<f32>> {
        if tensor.float().is_none() {
            let message = format!("`{}` has type {}", tensor.stored_key, tensor.dtype);
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        tensor.read_f32(&*self.sources[tensor.source])
    }

    /// Reads some of a module's parameters again, each in the type that it has, and leaves the
    /// others. The second result is why reading failed; what was not read stays as it was.
    ///
    /// # Panics
    /// If this checkpoint has other shapes than the module.
    pub fn update<B: Backend, M: Module<B>>(
        &self,
        module: M,
        keys: &BTreeSet<String>,
    ) -> (M, Result<(), CheckpointError>) {
        struct Update<'a> {
            checkpoint: &'a Checkpoint,
            keys: &'a BTreeSet<String>,
            path: Vec<String>,
            failed: Option<io::Error>,
        }
        impl<B: Backend> ModuleMapper<B> for Update<'_> {
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

            fn map_float<const D: usize>(
                &mut self,
                param: Param<Tensor<B, D>>,
            ) -> Param<Tensor<B, D>> {
                let key = self.path.join(".");
                if self.failed.is_some() || !self.keys.contains(&key) {
                    return param;
                }
                let info = &self.checkpoint.tensors[&key];
                let source = &*self.checkpoint.sources[info.source];
                param.map(|old| match info.read(source, old.dtype()) {
                    Ok(data) => {
                        let (device, dtype) = (old.device(), old.dtype());
                        assert_eq!(old.shape(), data.shape.clone(), "`{key}`");
                        // The old values go before the new ones come.
                        drop(old);
                        let new = Tensor::<B, D>::from_data(data, (&device, dtype));
                        arrange(new)
                    }
                    Err(error) => {
                        self.failed = Some(error);
                        old
                    }
                })
            }
        }
        let mut update = Update {
            checkpoint: self,
            keys,
            path: Vec::new(),
            failed: None,
        };
        let module = module.map(&mut update);
        let result = match update.failed {
            None => Ok(()),
            Some(source) => Err(CheckpointError::Read {
                path: self.path.clone(),
                source,
            }),
        };
        (module, result)
    }
}
