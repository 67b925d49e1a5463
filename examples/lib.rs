//! What the examples share: the backend they compute on, checkpoints that need no download, the scenes that the training
//! examples learn from, and the training itself.

// Names such as `Sky::Night` say what they are.
#![allow(missing_docs)]

pub mod scenes;
pub mod training;

/// The CPU or, with a feature, something faster. Nothing else in an example changes with it.
#[cfg(not(any(feature = "wgpu", feature = "cuda", feature = "libtorch")))]
pub type Backend = burn_flex::Flex;
/// A GPU through Vulkan, Metal, DirectX 12 or WebGPU.
#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
pub type Backend = burn::backend::Wgpu;
/// An NVIDIA GPU.
#[cfg(feature = "cuda")]
pub type Backend = burn::backend::Cuda;
/// PyTorch's kernels, on the CPU.
#[cfg(all(feature = "libtorch", not(any(feature = "wgpu", feature = "cuda"))))]
pub type Backend = burn::backend::LibTorch;

/// The folder of a tiny checkpoint of the tests: `sd/base` or `ddpm/cat`.
pub fn tiny_model(name: &str) -> String {
    let reference = "../crates/diffuse-pipelines/tests/reference";
    format!("{}/{reference}/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The folder of the model that the program carries.
pub fn shipped_model() -> String {
    format!(
        "{}/../crates/diffuse-cli/assets/scenes",
        env!("CARGO_MANIFEST_DIR")
    )
}
