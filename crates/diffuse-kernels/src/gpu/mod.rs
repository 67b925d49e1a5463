//! Kernels for GPUs in CubeCL, generic over its runtime. Tensors have any floating point type, and
//! sums are `f32`.
//!
//! Images keep their logical shape `[batch, channels, height, width]`, with channels last in
//! memory: the tokens of a transformer, `[batch, height · width, channels]`, are the same memory. A
//! tensor in another order is copied once.

mod attention;
mod dispatch;
mod elementwise;
mod launch;
mod layout;
mod matrix;
mod norm;
mod product;
mod tiles;

/// Products and attention with a given tiling, for measuring.
#[cfg(feature = "tuning")]
pub mod tuning {
    pub use super::tiles::{FORCED, FORCED_ATTENTION, Tiling, tile};
}

pub use dispatch::*;
