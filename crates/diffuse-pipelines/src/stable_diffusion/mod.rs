//! Text to image, image to image and inpainting with Stable Diffusion v1 (Rombach et al. 2022,
//! <https://arxiv.org/abs/2112.10752>).
//!
//! Text becomes token ids, ids become embeddings (`prompt.rs`); noise becomes latents
//! (`latents.rs`), step by step, guided by the embeddings (`denoise.rs`); latents become images
//! (`decode.rs`). Each stage is a method, and [`StableDiffusionPipeline::generate_with`] calls them
//! in order. `image_to_image.rs` and `inpaint.rs` start the same loop from images (`encode.rs`).

mod adapters;
mod control;
mod decode;
mod denoise;
mod encode;
mod image_to_image;
mod inpaint;
mod latents;
mod options;
mod parts;
mod prompt;

pub use control::StableDiffusionControl;
pub use image_to_image::StableDiffusionImg2ImgOptions;
pub use inpaint::StableDiffusionInpaintOptions;
pub use options::{PromptSyntax, StableDiffusionInputs, StableDiffusionOptions};
pub(crate) use parts::vae_options;
pub use parts::{StableDiffusionParts, StableDiffusionPipeline};
pub use prompt::{EncodedPrompt, PreparedPrompt};
