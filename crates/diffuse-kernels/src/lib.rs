//! Fast kernels for the operations of diffusion networks, each for concrete burn backends.
//!
//! A function here takes tensors of any backend and returns `None` where it has no kernel for that backend, type or
//! shape; the caller then computes with burn's own operations. Models stay generic over `B: Backend`.
//!
//! Kernels for GPUs are written in CubeCL and run on CUDA (feature `cuda`) and, through wgpu, on Vulkan, Metal and
//! WebGPU (feature `wgpu`).
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod gpu;
