#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[cfg(feature = "flex")]
mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
mod operations;

pub use operations::*;

use burn::tensor::backend::Backend;

/// Measuring how products on GPUs are best cut.
#[cfg(feature = "tuning")]
pub use gpu::tuning;

/// Whether a backend is a GPU's for which there are kernels.
#[cfg_attr(not(feature = "gpu"), allow(clippy::extra_unused_type_parameters))]
pub fn has_gpu_kernels<B: Backend>() -> bool {
    #[cfg(feature = "gpu")]
    return gpu::computes_on::<B>();
    #[cfg(not(feature = "gpu"))]
    false
}

/// Runs a network on one of the threads that share the work of its operations.
///
/// On the CPU each operation would otherwise be handed to them, and its result back, by a thread
/// that sleeps meanwhile: waking up takes longer than small operations. Other backends run where
/// they are called.
///
/// A thread that waits for others takes on other tasks, among them other networks: of networks that
/// run at the same time, one may return only after another.
#[cfg_attr(not(feature = "flex"), allow(clippy::extra_unused_type_parameters))]
pub fn on_worker<B: Backend, R: Send>(network: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "flex")]
    return cpu::on_worker::<B, R>(network);
    #[cfg(not(feature = "flex"))]
    network()
}

/// Frees the memory that CPU kernels keep for their next results, at most 512 MiB.
pub fn free_pooled_memory() {
    #[cfg(feature = "flex")]
    cpu::free_pooled_memory();
}
