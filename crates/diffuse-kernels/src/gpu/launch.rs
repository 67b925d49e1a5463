//! Shared by all launches: memory for results, array arguments, grids.

use burn::tensor::Shape;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;
use cubecl::server::{MemoryLayout, MemoryLayoutDescriptor};

/// A contiguous tensor with unspecified values, on the device and of the type of `like`.
pub fn empty<R: CubeRuntime>(like: &CubeTensor<R>, shape: Shape) -> CubeTensor<R> {
    empty_of(like, shape, like.dtype)
}

/// A contiguous tensor of another type.
pub fn empty_of<R: CubeRuntime>(
    like: &CubeTensor<R>,
    shape: Shape,
    dtype: burn::tensor::DType,
) -> CubeTensor<R> {
    let descriptor = MemoryLayoutDescriptor::contiguous(shape.clone(), dtype.size());
    let MemoryLayout { memory, .. } = like.client.empty_tensors(vec![descriptor]).remove(0);
    CubeTensor::new_contiguous(
        like.client.clone(),
        like.device.clone(),
        shape,
        memory,
        dtype,
    )
}

/// The tensor's memory as an argument of a kernel. An array has no shape, which saves a copy to the
/// device at each launch.
pub fn array<R: CubeRuntime>(x: &CubeTensor<R>) -> ArrayArg<R> {
    let len = x.handle.size_in_used() as usize / x.dtype.size();
    // SAFETY: the length is that of the memory.
    unsafe { ArrayArg::from_raw_parts(x.handle.clone(), len) }
}

/// Elements of the widest vector, at most 16 bytes, that divides rows of `len` elements.
pub fn vector_size<R: CubeRuntime>(x: &CubeTensor<R>, len: usize) -> usize {
    let most = max_vector_size(&x.client, x.dtype.size());
    (0..=most.ilog2())
        .map(|power| most >> power)
        .find(|n| len.is_multiple_of(*n))
        .unwrap_or(1)
}

/// Elements of `size` bytes of the widest vector that the device reads at once.
pub fn max_vector_size<R: CubeRuntime>(client: &ComputeClient<R>, size: usize) -> usize {
    client
        .io_optimized_vector_sizes(size)
        .filter(|n| n * size <= 16)
        .max()
        .unwrap_or(1)
}

/// Enough cubes for `units` units, in two dimensions if one is too small.
pub fn grid(units: u32, units_per_cube: u32) -> CubeCount {
    let cubes = units.div_ceil(units_per_cube);
    let y = cubes.div_ceil(65_535);
    CubeCount::Static(cubes.div_ceil(y), y, 1)
}

/// Whether the values are contiguous in some order of dimensions.
pub fn is_dense<R: CubeRuntime>(x: &CubeTensor<R>) -> bool {
    let mut dims: Vec<(usize, usize)> = x
        .meta
        .strides()
        .iter()
        .copied()
        .zip(x.meta.shape().iter().copied())
        .filter(|(_, size)| *size != 1)
        .collect();
    dims.sort_unstable();
    let mut expected = 1;
    dims.into_iter().all(|(stride, size)| {
        let fits = stride == expected;
        expected *= size;
        fits
    })
}
