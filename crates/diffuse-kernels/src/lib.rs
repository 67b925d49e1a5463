#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[cfg(feature = "flex")]
mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
mod operations;

pub use operations::*;

use burn::tensor::backend::Backend;

#[cfg(all(feature = "tuning", feature = "flex"))]
pub use cpu::{disable_avx512, measure_parts};
/// Measures the tiling of products on GPUs.
#[cfg(all(feature = "tuning", feature = "gpu"))]
pub use gpu::tuning;

/// Whether a backend is one of the GPU backends that have kernels.
#[cfg_attr(not(feature = "gpu"), allow(clippy::extra_unused_type_parameters))]
pub fn has_gpu_kernels<B: Backend>() -> bool {
    #[cfg(feature = "gpu")]
    return gpu::computes_on::<B>();
    #[cfg(not(feature = "gpu"))]
    false
}

/// Runs a network on a thread of the pool that computes its operations.
///
/// On the CPU, an operation that is called from outside of the pool is handed over, and the caller
/// sleeps; waking it takes longer than a small operation. Other backends run on the calling thread.
///
/// While a pool thread waits, it runs other tasks, which may be other networks: a network may
/// return only after another one that runs at the same time.
#[cfg_attr(not(feature = "flex"), allow(clippy::extra_unused_type_parameters))]
pub fn on_worker<B: Backend, R: Send>(network: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "flex")]
    return cpu::on_worker::<B, R>(network);
    #[cfg(not(feature = "flex"))]
    network()
}

/// Frees the memory that CPU kernels keep for later results, at most 512 MiB.
pub fn free_pooled_memory() {
    #[cfg(feature = "flex")]
    cpu::free_pooled_memory();
}
