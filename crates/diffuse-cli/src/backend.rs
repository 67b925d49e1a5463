//! From the name of a backend to its type.

use anyhow::{Result, bail};
use burn::tensor::{DType, backend::Backend};
use diffuse_pipelines::LoadOptions;

use crate::args::{BackendName, FloatType, Model};

/// Something to do on a backend that is chosen while the program runs.
pub trait Job {
    /// Does it.
    fn run<B: Backend>(self, device: B::Device) -> Result<()>;
}

/// Does a job on the backend that was asked for.
pub fn with_backend(name: BackendName, job: impl Job) -> Result<()> {
    match name {
        #[cfg(feature = "flex")]
        BackendName::Flex => job.run::<burn_flex::Flex>(Default::default()),
        #[cfg(feature = "wgpu")]
        BackendName::Wgpu => job.run::<burn::backend::Wgpu>(Default::default()),
        #[cfg(feature = "cuda")]
        BackendName::Cuda => job.run::<burn::backend::Cuda>(Default::default()),
        #[allow(unreachable_patterns)]
        name => not_built_in(name),
    }
}

#[allow(dead_code)]
fn not_built_in<T>(name: BackendName) -> Result<T> {
    let feature = match name {
        BackendName::Flex => "flex",
        BackendName::Wgpu => "wgpu",
        BackendName::Cuda => "cuda",
    };
    let built_in: Vec<&str> = [
        ("flex", cfg!(feature = "flex")),
        ("wgpu", cfg!(feature = "wgpu")),
        ("cuda", cfg!(feature = "cuda")),
    ]
    .into_iter()
    .filter_map(|(name, built_in)| built_in.then_some(name))
    .collect();
    bail!(
        "the backend `{feature}` is not built in: build the program with `--features {feature}` (built in: {})",
        built_in.join(", ")
    )
}

/// How to load a model's weights.
pub fn load_options(model: &Model) -> LoadOptions {
    let by_backend = match model.backend {
        BackendName::Flex => FloatType::F32,
        BackendName::Wgpu | BackendName::Cuda => FloatType::F16,
    };
    LoadOptions {
        variant: model.variant.clone(),
        dtype: Some(match model.dtype.unwrap_or(by_backend) {
            FloatType::F32 => DType::F32,
            FloatType::F16 => DType::F16,
            FloatType::Bf16 => DType::BF16,
        }),
    }
}
