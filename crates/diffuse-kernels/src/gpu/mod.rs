//! Kernels for GPUs, in CubeCL: generic over the runtime, `f32` arithmetic over tensors of any floating point type.
//!
//! Images keep their logical shape `[batch, channels, height, width]` and lie in memory with channels last, so that
//! the tokens of a transformer, `[batch, height · width, channels]`, are the same memory. A tensor in another order is
//! copied once, where it enters.

#[cfg(feature = "gpu")]
mod attention;
#[cfg(feature = "gpu")]
mod elementwise;
#[cfg(feature = "gpu")]
mod launch;
#[cfg(feature = "gpu")]
mod layout;
#[cfg(feature = "gpu")]
mod matrix;
#[cfg(feature = "gpu")]
mod norm;
#[cfg(feature = "gpu")]
mod product;
#[cfg(feature = "gpu")]
mod tiles;

/// Products with a given cut, for measuring.
#[cfg(feature = "tuning")]
pub mod tuning {
    pub use super::tiles::{Cut, FORCED, FORCED_ATTENTION, tile};
}

mod dispatch;

pub use dispatch::*;
