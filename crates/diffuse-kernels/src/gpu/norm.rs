//! Group norm, layer norm and softmax, with sums in `f32`.

use burn::tensor::{DType, Shape};
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::elementwise::{Activation, activate};
use super::launch::{array, empty, empty_of, lanes};
use super::layout::{Image, Rows};

/// Units of a cube.
const UNITS: usize = 256;
/// Units that share a row of a layer norm or softmax.
const ROW_UNITS: usize = 32;

/// The sizes of a group norm.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Groups {
    /// Pixels of an image.
    positions: u32,
    /// Vectors of a pixel.
    vectors: u32,
    /// Vectors of a pixel that a cube computes: whole groups.
    slice: u32,
    /// Groups of a slice.
    groups: u32,
    /// Channels of a group.
    channels: u32,
    /// Pixels of a cube.
    chunk: u32,
}

/// Sums of `x - x₀` and its square over a part of the pixels, for each group of a slice of the channels, where `x₀` is
/// the first value of the group: `parts[image, slice, chunk, group, 2]`.
///
/// A cube for each chunk, slice and image.
#[cube(launch_unchecked)]
fn group_sums<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    parts: &mut Array<f32>,
    sizes: &Groups,
    #[define(E)] _dtype: StorageType,
) {
    let n = N::value().comptime();
    let lanes = comptime!(n as u32);
    let mut sums = SharedMemory::<f32>::new(comptime!(UNITS * n));
    let mut squares = SharedMemory::<f32>::new(comptime!(UNITS * n));

    let (chunk, slice, image) = (CUBE_POS_X, CUBE_POS_Y, CUBE_POS_Z);
    let rows = comptime!(UNITS as u32) / sizes.slice;
    let row = UNIT_POS / sizes.slice;
    let vector = UNIT_POS % sizes.slice;
    let first = image * sizes.positions * sizes.vectors + slice * sizes.slice;

    let mut pivot = Vector::<f32, N>::new(0.0f32);
    let mut sum = Vector::<f32, N>::new(0.0f32);
    let mut square = Vector::<f32, N>::new(0.0f32);
    if row < rows {
        #[unroll]
        for lane in 0..n {
            let channel = vector * lanes + comptime!(lane as u32);
            let start = (channel / sizes.channels) * sizes.channels;
            let values = x[(first + start / lanes) as usize];
            pivot[lane] = component::<E, N>(values, start % lanes);
        }
        let end = u32::min((chunk + 1) * sizes.chunk, sizes.positions);
        let mut position = chunk * sizes.chunk + row;
        while position < end {
            let value = Vector::<f32, N>::cast_from(x[(first + position * sizes.vectors + vector) as usize]) - pivot;
            sum += value;
            square += value * value;
            position += rows;
        }
    }
    #[unroll]
    for lane in 0..n {
        let at = (UNIT_POS * lanes) as usize + lane;
        sums[at] = sum[lane];
        squares[at] = square[lane];
    }
    sync_cube();
    // The rows of each channel, then the channels of each group.
    let width = sizes.slice * lanes;
    let mut channel = UNIT_POS;
    while channel < width {
        let mut sum = 0.0f32;
        let mut square = 0.0f32;
        for row in 0..rows {
            sum += sums[(row * width + channel) as usize];
            square += squares[(row * width + channel) as usize];
        }
        sums[channel as usize] = sum;
        squares[channel as usize] = square;
        channel += comptime!(UNITS as u32);
    }
    sync_cube();
    let mut group = UNIT_POS;
    while group < sizes.groups {
        let mut sum = 0.0f32;
        let mut square = 0.0f32;
        for i in 0..sizes.channels {
            sum += sums[(group * sizes.channels + i) as usize];
            square += squares[(group * sizes.channels + i) as usize];
        }
        let part = (image * CUBE_COUNT_Y + slice) * CUBE_COUNT_X + chunk;
        let at = 2 * (part * sizes.groups + group);
        parts[at as usize] = sum;
        parts[(at + 1) as usize] = square;
        group += comptime!(UNITS as u32);
    }
}

/// The component of a vector at an index that is known only while running.
#[cube]
fn component<E: Float, N: Size>(values: Vector<E, N>, index: u32) -> f32 {
    let mut value = 0.0f32;
    #[unroll]
    for lane in 0..N::value() {
        if index == comptime!(lane as u32) {
            value = f32::cast_from(values[lane]);
        }
    }
    value
}

/// `(x - mean) / sqrt(var + eps) · weight + bias`, and the activation.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn group_apply<E: Float, N: Size, W: Float>(
    x: &Array<Vector<E, N>>,
    parts: &Array<f32>,
    weight: &Array<Vector<W, N>>,
    bias: &Array<Vector<W, N>>,
    y: &mut Array<Vector<E, N>>,
    sizes: &Groups,
    chunks: u32,
    eps: f32,
    #[comptime] silu: bool,
    #[define(E, W)] _dtypes: [StorageType; 2],
) {
    let n = N::value().comptime();
    let lanes = comptime!(n as u32);
    let mut means = SharedMemory::<f32>::new(comptime!(UNITS * n));
    let mut scales = SharedMemory::<f32>::new(comptime!(UNITS * n));
    let (chunk, slice, image) = (CUBE_POS_X, CUBE_POS_Y, CUBE_POS_Z);
    let rows = comptime!(UNITS as u32) / sizes.slice;
    let row = UNIT_POS / sizes.slice;
    let vector = UNIT_POS % sizes.slice;
    let first = image * sizes.positions * sizes.vectors + slice * sizes.slice;

    // Eight units a group.
    let mut group = UNIT_POS / 8;
    while group < sizes.groups {
        let mut sum = 0.0f32;
        let mut square = 0.0f32;
        let mut part = UNIT_POS % 8;
        while part < chunks {
            let at = 2 * (((image * CUBE_COUNT_Y + slice) * chunks + part) * sizes.groups + group);
            sum += parts[at as usize];
            square += parts[(at + 1) as usize];
            part += 8;
        }
        means[(group * 8 + UNIT_POS % 8) as usize] = sum;
        scales[(group * 8 + UNIT_POS % 8) as usize] = square;
        group += comptime!(UNITS as u32 / 8);
    }
    sync_cube();
    let mut scale = Vector::<f32, N>::new(0.0f32);
    let mut shift = Vector::<f32, N>::new(0.0f32);
    if row < rows {
        let count = f32::cast_from(sizes.positions) * f32::cast_from(sizes.channels);
        let weights = Vector::<f32, N>::cast_from(weight[(slice * sizes.slice + vector) as usize]);
        let biases = Vector::<f32, N>::cast_from(bias[(slice * sizes.slice + vector) as usize]);
        #[unroll]
        for lane in 0..n {
            let group = (vector * lanes + comptime!(lane as u32)) / sizes.channels;
            let start = group * sizes.channels;
            let pivot = component::<E, N>(x[(first + start / lanes) as usize], start % lanes);
            let mut sum = 0.0f32;
            let mut square = 0.0f32;
            #[unroll]
            for part in 0..8u32 {
                sum += means[(group * 8 + part) as usize];
                square += scales[(group * 8 + part) as usize];
            }
            let offset = sum / count;
            let var = f32::max(square / count - offset * offset, 0.0f32);
            let factor = weights[lane] / f32::sqrt(var + eps);
            scale[lane] = factor;
            shift[lane] = biases[lane] - (offset + pivot) * factor;
        }
        let end = u32::min((chunk + 1) * sizes.chunk, sizes.positions);
        let mut position = chunk * sizes.chunk + row;
        while position < end {
            let at = (first + position * sizes.vectors + vector) as usize;
            let mut value = Vector::<f32, N>::cast_from(x[at]) * scale + shift;
            if silu {
                value = activate(value, Activation::Silu);
            }
            y[at] = Vector::cast_from(value);
            position += rows;
        }
    }
}

/// Group norm of an image, then SiLU if it is asked for; `None` where a group of channels does not fit a cube.
pub fn group_norm<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: CubeTensor<R>,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Option<CubeTensor<R>> {
    let x = Image::new(x);
    let y = Image::empty(&x.tensor, [x.batch, x.channels, x.height, x.width]);
    let positions = x.height * x.width;
    if x.batch * positions * x.channels == 0 {
        return Some(y.tensor);
    }
    let (weight, bias) = (Rows::new(weight).tensor, Rows::new(bias).tensor);
    let client = &x.tensor.client;
    // As many channels as a unit has lanes, in slices of whole groups, each of which fits a cube.
    let (n, slices) = (0..4)
        .map(|power| lanes(&x.tensor, x.channels) >> power)
        .filter(|n| *n > 0)
        .find_map(|n| {
            let fits = |slices: &usize| {
                let width = x.channels / slices;
                groups.is_multiple_of(*slices)
                    && width.is_multiple_of(n)
                    && width / n <= UNITS
                    && groups / slices <= UNITS / 8 * n
            };
            (1..=groups).find(fits).map(|slices| (n, slices))
        })?;
    let slice = x.channels / n / slices;
    let rows = UNITS / slice;
    let chunks = positions.div_ceil(rows * 4).clamp(1, 64);
    let chunk = positions.div_ceil(chunks);
    let chunks = positions.div_ceil(chunk);
    let apply_chunk = chunk.div_ceil(2);
    let parts = empty_of(
        &x.tensor,
        Shape::from(vec![x.batch * groups * chunks * 2]),
        DType::F32,
    );
    let sizes = |chunk: usize| {
        GroupsLaunch::new(
            positions as u32,
            (x.channels / n) as u32,
            slice as u32,
            (groups / slices) as u32,
            (x.channels / groups) as u32,
            chunk as u32,
        )
    };
    let count = |chunks: usize| CubeCount::Static(chunks as u32, slices as u32, x.batch as u32);
    // SAFETY: indices stay below the sizes, which are those of the tensors.
    unsafe {
        group_sums::launch_unchecked::<R>(
            client,
            count(chunks),
            CubeDim::new_1d(UNITS as u32),
            n,
            array(&x.tensor),
            array(&parts),
            sizes(chunk),
            x.tensor.dtype.into(),
        );
        group_apply::launch_unchecked::<R>(
            client,
            count(positions.div_ceil(apply_chunk)),
            CubeDim::new_1d(UNITS as u32),
            n,
            array(&x.tensor),
            array(&parts),
            array(&weight),
            array(&bias),
            array(&y.tensor),
            sizes(apply_chunk),
            chunks as u32,
            eps as f32,
            silu,
            [x.tensor.dtype.into(), weight.dtype.into()],
        );
    }
    Some(y.tensor)
}

/// The sum, or with `max` the largest, of the values of the units that share a row.
#[cube]
fn over_row(value: f32, shared: &mut SharedMemory<f32>, #[comptime] max: bool) -> f32 {
    sync_cube();
    shared[UNIT_POS as usize] = value;
    sync_cube();
    let lane = UNIT_POS % comptime!(ROW_UNITS as u32);
    let start = UNIT_POS - lane;
    #[unroll]
    for power in 0..5u32 {
        let distance = comptime!((ROW_UNITS as u32 / 2) >> power);
        if lane < distance {
            let other = shared[(UNIT_POS + distance) as usize];
            let own = shared[UNIT_POS as usize];
            if max {
                shared[UNIT_POS as usize] = f32::max(own, other);
            } else {
                shared[UNIT_POS as usize] = own + other;
            }
        }
        sync_cube();
    }
    shared[start as usize]
}

/// Layer norm of `rows` rows of `vectors` vectors.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn layer_norm_kernel<E: Float, N: Size, W: Float>(
    x: &Array<Vector<E, N>>,
    weight: &Array<Vector<W, N>>,
    bias: &Array<Vector<W, N>>,
    y: &mut Array<Vector<E, N>>,
    rows: u32,
    vectors: u32,
    pitch: u32,
    eps: f32,
    #[define(E, W)] _dtypes: [StorageType; 2],
) {
    let mut shared = SharedMemory::<f32>::new(UNITS);
    let lane = UNIT_POS % comptime!(ROW_UNITS as u32);
    let row = CUBE_POS * comptime!(UNITS / ROW_UNITS) + (UNIT_POS / comptime!(ROW_UNITS as u32)) as usize;
    let row = row as u32;
    let inside = row < rows;
    let row = select(inside, row, 0u32);
    let pivot = f32::cast_from(x[(row * pitch) as usize][0]);
    let mut sum = 0.0f32;
    let mut square = 0.0f32;
    let mut i = lane;
    while i < vectors {
        let value = Vector::<f32, N>::cast_from(x[(row * pitch + i) as usize]) - Vector::new(pivot);
        let squared = value * value;
        #[unroll]
        for lane in 0..N::value() {
            sum += value[lane];
            square += squared[lane];
        }
        i += comptime!(ROW_UNITS as u32);
    }
    let n = N::value().comptime();
    let count = f32::cast_from(vectors * comptime!(n as u32));
    let offset = over_row(sum, &mut shared, false) / count;
    let var = f32::max(over_row(square, &mut shared, false) / count - offset * offset, 0.0f32);
    let scale = Vector::<f32, N>::new(1.0f32 / f32::sqrt(var + eps));
    let mean = Vector::<f32, N>::new(offset + pivot);
    if inside {
        let mut i = lane;
        while i < vectors {
            let value = (Vector::<f32, N>::cast_from(x[(row * pitch + i) as usize]) - mean) * scale;
            let value = value * Vector::cast_from(weight[i as usize]) + Vector::cast_from(bias[i as usize]);
            y[(row * vectors + i) as usize] = Vector::cast_from(value);
            i += comptime!(ROW_UNITS as u32);
        }
    }
}

/// A cube for every so many rows.
fn row_grid(rows: usize) -> CubeCount {
    super::launch::grid(rows as u32, (UNITS / ROW_UNITS) as u32)
}

/// Layer norm over the last dimension.
pub fn layer_norm<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: CubeTensor<R>,
    eps: f64,
) -> Option<CubeTensor<R>> {
    let shape = x.meta.shape().clone();
    let x = Rows::new(x);
    let y = empty(&x.tensor, shape);
    if x.rows * x.columns == 0 {
        return Some(y);
    }
    let (weight, bias) = (Rows::new(weight).tensor, Rows::new(bias).tensor);
    let mut n = lanes(&x.tensor, x.columns);
    while !x.pitch.is_multiple_of(n) {
        n /= 2;
    }
    // SAFETY: indices stay below the sizes, which are those of the tensors.
    unsafe {
        layer_norm_kernel::launch_unchecked::<R>(
            &x.tensor.client,
            row_grid(x.rows),
            CubeDim::new_1d(UNITS as u32),
            n,
            array(&x.tensor),
            array(&weight),
            array(&bias),
            array(&y),
            x.rows as u32,
            (x.columns / n) as u32,
            (x.pitch / n) as u32,
            eps as f32,
            [x.tensor.dtype.into(), weight.dtype.into()],
        );
    }
    Some(y)
}

/// `softmax(x · scale)` of each row of `x`, in the type of `y`.
#[cube(launch_unchecked)]
fn softmax_kernel<E: Float, O: Float>(
    x: &Array<E>,
    y: &mut Array<O>,
    rows: u32,
    columns: u32,
    scale: f32,
    #[define(E, O)] _dtypes: [StorageType; 2],
) {
    let mut shared = SharedMemory::<f32>::new(UNITS);
    let lane = UNIT_POS % comptime!(ROW_UNITS as u32);
    let row = (CUBE_POS * comptime!(UNITS / ROW_UNITS)) as u32 + UNIT_POS / comptime!(ROW_UNITS as u32);
    let inside = row < rows;
    let row = select(inside, row, 0u32);
    let mut most = f32::cast_from(x[(row * columns) as usize]) * scale;
    let mut i = lane;
    while i < columns {
        most = f32::max(most, f32::cast_from(x[(row * columns + i) as usize]) * scale);
        i += comptime!(ROW_UNITS as u32);
    }
    let most = over_row(most, &mut shared, true);
    let mut sum = 0.0f32;
    let mut i = lane;
    while i < columns {
        sum += f32::exp(f32::cast_from(x[(row * columns + i) as usize]) * scale - most);
        i += comptime!(ROW_UNITS as u32);
    }
    let factor = 1.0f32 / over_row(sum, &mut shared, false);
    if inside {
        let mut i = lane;
        while i < columns {
            let value = f32::exp(f32::cast_from(x[(row * columns + i) as usize]) * scale - most) * factor;
            y[(row * columns + i) as usize] = O::cast_from(value);
            i += comptime!(ROW_UNITS as u32);
        }
    }
}

/// `softmax(x · scale)` over the last dimension of a contiguous tensor.
pub fn softmax<R: CubeRuntime>(x: &CubeTensor<R>, scale: f32, dtype: DType) -> CubeTensor<R> {
    let shape = x.meta.shape().clone();
    let columns = shape[shape.num_dims() - 1];
    let rows = x.meta.num_elements() / columns.max(1);
    let y = empty_of(x, shape, dtype);
    if rows * columns == 0 {
        return y;
    }
    // SAFETY: indices stay below the sizes, which are those of the tensors.
    unsafe {
        softmax_kernel::launch_unchecked::<R>(
            &x.client,
            row_grid(rows),
            CubeDim::new_1d(UNITS as u32),
            array(x),
            array(&y),
            rows as u32,
            columns as u32,
            scale,
            [x.dtype.into(), dtype.into()],
        );
    }
    y
}
