//! From the name of a backend to its type.

use std::fmt::Debug;

use anyhow::{Result, bail};
use burn::tensor::{DType, backend::Backend};
use diffuse_pipelines::LoadOptions;

use crate::args::{BackendName, FloatType, Model};
use crate::devices;
use crate::output::complain;

/// A backend that is built in, for what needs its types only: no device is looked for.
#[cfg(feature = "flex")]
pub type AnyBackend = burn_flex::Flex;
#[cfg(all(feature = "wgpu", not(feature = "flex")))]
pub type AnyBackend = burn::backend::Wgpu;
#[cfg(all(feature = "cuda", not(any(feature = "flex", feature = "wgpu"))))]
pub type AnyBackend = burn::backend::Cuda;

/// Something to do on a backend that is chosen while the program runs.
pub trait Job {
    /// Does it on a device of the backend of that name.
    fn run<B: Backend>(self, backend: BackendName, device: B::Device) -> Result<()>;
}

/// The backend that was asked for, or else a GPU's that is built in and finds one, or else the
/// CPU's.
pub fn choose(asked: Option<BackendName>, quiet: bool) -> BackendName {
    if let Some(name) = asked {
        return name;
    }
    match devices::gpu_backend() {
        Some(name) => {
            if !quiet {
                complain(format_args!(
                    "computing on the GPU (`--backend {name}`); `--backend flex` takes the CPU"
                ));
            }
            name
        }
        None if cfg!(feature = "flex") => BackendName::Flex,
        // Without the CPU's, one that can say what it lacks.
        None if cfg!(feature = "wgpu") => BackendName::Wgpu,
        None => BackendName::Cuda,
    }
}

/// Does a job on a backend, on one of its devices by index.
pub fn with_backend(name: BackendName, device: Option<usize>, job: impl Job) -> Result<()> {
    match name {
        #[cfg(feature = "flex")]
        BackendName::Flex => match device {
            None | Some(0) => job.run::<burn_flex::Flex>(name, Default::default()),
            Some(index) => bail!("there is no device {index}: `flex` has one, the CPU"),
        },
        #[cfg(feature = "wgpu")]
        BackendName::Wgpu => job.run::<burn::backend::Wgpu>(name, devices::wgpu::choose(device)?),
        #[cfg(feature = "cuda")]
        BackendName::Cuda => {
            let (device, kernels) = devices::cuda::choose(device)?;
            let result = job.run::<burn::backend::Cuda>(name, device);
            if let Some(kernels) = kernels {
                kernels.seal();
            }
            result
        }
        #[allow(unreachable_patterns)]
        name => not_built_in(name),
    }
}

/// The error for a backend that this build does not have.
#[allow(dead_code)]
pub fn not_built_in<T>(name: BackendName) -> Result<T> {
    let built_in: Vec<&str> = [
        ("flex", cfg!(feature = "flex")),
        ("wgpu", cfg!(feature = "wgpu")),
        ("cuda", cfg!(feature = "cuda")),
    ]
    .into_iter()
    .filter_map(|(name, built_in)| built_in.then_some(name))
    .collect();
    bail!(
        "the backend `{name}` is not built in: build the program with `--features {name}` (built in: {})",
        built_in.join(", ")
    )
}

/// How to load a model's weights: in the type that was asked for, or else in `f32` on the CPU, and
/// on a GPU in `f16` if it computes in that.
pub fn load_options<B: Backend>(
    model: &Model,
    backend: BackendName,
    device: &B::Device,
) -> Result<LoadOptions> {
    let supported = |dtype| B::supports_dtype(device, dtype);
    let dtype = match (model.dtype, backend) {
        (Some(dtype), _) => float_type(dtype),
        (None, BackendName::Flex) => DType::F32,
        (None, BackendName::Wgpu | BackendName::Cuda) if supported(DType::F16) => DType::F16,
        (None, BackendName::Wgpu | BackendName::Cuda) => {
            complain("warning: the device does not compute in f16; f32 takes its place");
            DType::F32
        }
    };
    if !supported(dtype) {
        bail!(
            "the device does not compute in {}: `--dtype f32` works everywhere",
            name(dtype)
        );
    }
    let weights = model.weights.map(float_type);
    if let Some(weights) = weights.filter(|weights| !supported(*weights)) {
        bail!("the device has no {} to keep weights in", name(weights));
    }
    Ok(LoadOptions {
        variant: model.variant.clone(),
        dtype: Some(dtype.into()),
        weights: weights.map(Into::into),
        strict: model.strict,
    })
}

/// burn's name of a type.
pub fn float_type(name: FloatType) -> DType {
    match name {
        FloatType::F32 => DType::F32,
        FloatType::F16 => DType::F16,
        FloatType::Bf16 => DType::BF16,
    }
}

/// `f16`
pub fn name(dtype: impl Debug) -> String {
    format!("{dtype:?}").to_lowercase()
}
