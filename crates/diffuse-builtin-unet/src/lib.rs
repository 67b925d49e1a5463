#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

/// `unet/diffusion_pytorch_model.safetensors` of the model `scenes`: a `UNet2DConditionModel` of
/// 3.85 million parameters in `f16`.
pub static SCENES_UNET: &[u8] = include_bytes!("../diffusion_pytorch_model.safetensors");
