//! Diffusion models in a page, on the visitor's own machine: a library for `wasm32` with bindings
//! for JavaScript, and the page in `page/`. For other targets it is empty. `cargo xtask web` builds
//! the folder to serve; see `docs/browser.md`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[cfg(target_family = "wasm")]
mod file;
#[cfg(target_family = "wasm")]
mod model;
#[cfg(all(target_family = "wasm", feature = "webgpu"))]
mod webgpu;

#[cfg(target_family = "wasm")]
pub use model::{Image, Model, scheduler_names};
