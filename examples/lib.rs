//! What the examples share: the backend they compute on, and checkpoints that need no download.

/// The CPU or, with the feature `wgpu` or `cuda`, a GPU. Nothing else in an example changes with it.
#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
pub type Backend = burn_flex::Flex;
/// A GPU through Vulkan, Metal, DirectX 12 or WebGPU.
#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
pub type Backend = burn::backend::Wgpu;
/// An NVIDIA GPU.
#[cfg(feature = "cuda")]
pub type Backend = burn::backend::Cuda;

/// The folder of a tiny checkpoint of the tests: `sd/base` or `ddpm/cat`.
pub fn tiny_model(name: &str) -> String {
    let reference = "../crates/diffuse-pipelines/tests/reference";
    format!("{}/{reference}/{name}", env!("CARGO_MANIFEST_DIR"))
}
