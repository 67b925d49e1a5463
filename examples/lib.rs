//! Shared by the examples: the backend, and checkpoints without a download.

/// The CPU by default. Nothing else in an example depends on the backend.
#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
pub type Backend = burn_flex::Flex;
/// A GPU through Vulkan, Metal, DirectX 12 or WebGPU.
#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
pub type Backend = burn::backend::Wgpu;
/// An NVIDIA GPU.
#[cfg(feature = "cuda")]
pub type Backend = burn::backend::Cuda;
/// The default device of a [`Backend`]. From here on, a panic of any thread, such as burn's for a
/// missing driver, ends the program with a message and exit code 1: burn would catch it and
/// continue with buffers that were never written.
pub fn default_device<D: Default>() -> D {
    std::panic::set_hook(Box::new(|info| {
        match info.payload_as_str() {
            Some(message) => eprintln!("error: {message}"),
            None => eprintln!("error: {info}"),
        }
        if cfg!(any(feature = "wgpu", feature = "cuda")) {
            eprintln!(
                "this example computes on a GPU: without its feature it computes on the CPU, and \
                 `diffuse devices`, built with the feature, tells which GPUs there are and which \
                 driver is missing"
            );
        }
        std::process::exit(1);
    }));
    D::default()
}

/// The folder of a tiny checkpoint of the tests: `sd/base` or `ddpm/cat`.
pub fn tiny_model(name: &str) -> String {
    let reference = "../crates/diffuse-pipelines/tests/reference";
    format!("{}/{reference}/{name}", env!("CARGO_MANIFEST_DIR"))
}
