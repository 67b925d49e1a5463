//! Activations and concatenation.

use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::prelude::*;

use super::launch::{array, empty, grid, vector_size};
use super::layout::Image;
use crate::Function;

/// Units of a cube; each computes a vector of `N` elements.
const UNITS: u32 = 256;

/// The function in `f32`.
#[cube]
pub fn activate<N: Size>(x: Vector<f32, N>, #[comptime] function: Function) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0f32);
    // CubeCL's CUDA has no negative of a vector.
    let zero = Vector::<f32, N>::new(0.0f32);
    match function {
        Function::Silu => x / (one + Vector::<f32, N>::exp(zero - x)),
        Function::QuickGelu => {
            x / (one + Vector::<f32, N>::exp((zero - x) * Vector::<f32, N>::new(1.702f32)))
        }
        Function::Gelu => {
            let root_half = Vector::<f32, N>::new(comptime!(std::f32::consts::FRAC_1_SQRT_2));
            let half = Vector::<f32, N>::new(0.5f32);
            x * half * (one + Vector::<f32, N>::erf(x * root_half))
        }
    }
}

#[cube(launch_unchecked)]
fn activation_kernel<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    y: &mut Array<Vector<E, N>>,
    vectors: u32,
    #[comptime] function: Function,
    #[define(E)] _dtype: StorageType,
) {
    let i = ABSOLUTE_POS as u32;
    if i < vectors {
        let value = Vector::<f32, N>::cast_from(x[i as usize]);
        y[i as usize] = Vector::cast_from(activate(value, function));
    }
}

/// `function(x)`, without a copy if `x` is contiguous in any order of dimensions.
pub fn activation<R: CubeRuntime>(x: CubeTensor<R>, function: Function) -> CubeTensor<R> {
    let x = if x.meta.num_elements() as u64 * x.dtype.size() as u64 <= x.handle.size_in_used()
        && super::launch::is_dense(&x)
    {
        x
    } else {
        into_contiguous(x)
    };
    let len = x.meta.num_elements();
    let mut y = empty(&x, x.meta.shape().clone());
    // The result keeps the memory order of the input.
    y.meta = x.meta.clone();
    if len == 0 {
        return y;
    }
    let n = vector_size(&x, len);
    // SAFETY: both arrays have `len` elements, and the kernel checks indices against it.
    unsafe {
        activation_kernel::launch_unchecked::<R>(
            &x.client,
            grid((len / n) as u32, UNITS),
            CubeDim::new_1d(UNITS),
            n,
            array(&x),
            array(&y),
            (len / n) as u32,
            function,
            x.dtype.into(),
        );
    }
    y
}

/// Concatenates the channels of two images.
#[cube(launch_unchecked)]
fn concat_kernel<E: Float, N: Size>(
    a: &Array<Vector<E, N>>,
    b: &Array<Vector<E, N>>,
    y: &mut Array<Vector<E, N>>,
    vectors: u32,
    a_width: u32,
    width: u32,
    #[define(E)] _dtype: StorageType,
) {
    let i = ABSOLUTE_POS as u32;
    if i < vectors {
        let pixel = i / width;
        let vector = i % width;
        if vector < a_width {
            y[i as usize] = a[(pixel * a_width + vector) as usize];
        } else {
            y[i as usize] = b[(pixel * (width - a_width) + vector - a_width) as usize];
        }
    }
}

/// The channels of `a`, then those of `b`.
pub fn concat_channels<R: CubeRuntime>(a: CubeTensor<R>, b: CubeTensor<R>) -> CubeTensor<R> {
    let (a, b) = (Image::new(a), Image::new(b));
    let channels = a.channels + b.channels;
    let y = Image::empty(&a.tensor, [a.batch, channels, a.height, a.width]);
    let pixels = a.batch * a.height * a.width;
    if pixels * channels == 0 {
        return y.tensor;
    }
    let n = vector_size(&a.tensor, a.channels).min(vector_size(&a.tensor, b.channels));
    let vectors = (pixels * channels / n) as u32;
    // SAFETY: every index below the number of vectors lies in one of the inputs.
    unsafe {
        concat_kernel::launch_unchecked::<R>(
            &a.tensor.client,
            grid(vectors, UNITS),
            CubeDim::new_1d(UNITS),
            n,
            array(&a.tensor),
            array(&b.tensor),
            array(&y.tensor),
            vectors,
            (a.channels / n) as u32,
            (channels / n) as u32,
            a.tensor.dtype.into(),
        );
    }
    y.tensor
}
