//! Kernels for GPUs, in CubeCL: generic over the runtime, `f32` arithmetic over tensors of any
//! floating point type.
//!
//! Images keep their logical shape `[batch, channels, height, width]` and lie in memory with
//! channels last, so that the tokens of a transformer, `[batch, height · width, channels]`, are the
//! same memory. A tensor in another order is copied once, where it enters.

mod attention;
mod dispatch;
mod elementwise;
mod launch;
mod layout;
mod matrix;
mod norm;
mod product;
mod tiles;

/// Products with a given cut, for measuring.
#[cfg(feature = "tuning")]
pub mod tuning {
    pub use super::tiles::{Cut, FORCED, FORCED_ATTENTION, tile};
}

pub use dispatch::*;
