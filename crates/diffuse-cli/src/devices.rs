//! `diffuse devices`: what this build computes on. A run takes its device from the same lists, so
//! that a missing driver is one message here and not a panic inside burn.

#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
mod cuda_headers;
#[cfg(feature = "cuda")]
pub mod kernel_cache;
#[cfg(feature = "wgpu")]
pub mod wgpu;

use anyhow::Result;
use clap::ValueEnum;

use crate::args::BackendName;
use crate::backend::not_built_in;
use crate::output::say;

pub fn run() {
    for backend in BackendName::value_variants() {
        say(format_args!("{backend}"));
        match list(*backend) {
            Ok(devices) => {
                for (index, device) in devices.iter().enumerate() {
                    say(format_args!("  {index}  {device}"));
                }
            }
            Err(reason) => say(format_args!("  {reason:#}")),
        }
    }
    #[cfg(feature = "cuda")]
    say(kernel_cache::describe());
}

/// The best GPU backend that is built in and has a GPU here.
pub fn gpu_backend() -> Option<BackendName> {
    #[cfg(feature = "cuda")]
    if cuda::devices().is_ok() {
        return Some(BackendName::Cuda);
    }
    #[cfg(feature = "wgpu")]
    if wgpu::adapters().is_ok_and(|adapters| adapters.iter().any(wgpu::Adapter::is_gpu)) {
        return Some(BackendName::Wgpu);
    }
    None
}

/// A line for each device, in the order of their indices.
fn list(backend: BackendName) -> Result<Vec<String>> {
    match backend {
        #[cfg(feature = "flex")]
        BackendName::Flex => {
            let threads = std::thread::available_parallelism()?;
            Ok(vec![format!("the CPU, {threads} threads; f32, f16, bf16")])
        }
        #[cfg(feature = "wgpu")]
        BackendName::Wgpu => Ok(wgpu::adapters()?.iter().map(ToString::to_string).collect()),
        #[cfg(feature = "cuda")]
        BackendName::Cuda => Ok(cuda::devices()?.iter().map(ToString::to_string).collect()),
        #[allow(unreachable_patterns)]
        name => not_built_in(name),
    }
}

/// `11.9 GiB`
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// The error for an index that is not in a list.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn no_such_device(index: usize, count: usize) -> anyhow::Error {
    anyhow::anyhow!("there is no device {index}: `diffuse devices` lists {count}, counted from 0")
}
