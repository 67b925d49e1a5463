#![doc = include_str!("../README.md")]
// Names such as `Sky::Night` say what they are.
#![allow(missing_docs)]

pub mod lora;
pub mod scenes;
pub mod text_to_image;
pub mod tokenizer;

mod checkpoint;
mod ema;
#[cfg(test)]
mod latent_rgb;
mod train;

pub mod grid;

mod backend;

pub use backend::{Backend, Differentiable, default_device};
pub use train::{Loss, Settings, Task, scaled, train, write_configs};
