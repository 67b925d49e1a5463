//! Group norm, layer norm and softmax. Sums are `f32`.

use burn::tensor::{DType, Shape};
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use crate::Function;

use super::elementwise::activate;
use super::launch::{array, empty, empty_of, vector_size};
use super::layout::{Image, Rows};

/// Units of a cube.
const UNITS: usize = 256;
/// Loads of a unit in flight at once.
const UNROLLED: usize = 4;
/// Units that share a row of a layer norm or softmax.
pub const ROW_UNITS: usize = 32;
/// Vectors of a row that a unit keeps in registers, at most.
const MAX_HELD: usize = 32;

/// The sizes of a group norm.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Groups {
    /// Pixels of an image.
    positions: u32,
    /// Vectors of a pixel.
    vectors: u32,
    /// Vectors of a pixel that a cube computes: a slice of whole groups.
    slice: u32,
    /// Groups of a slice.
    groups: u32,
    /// Channels of a group.
    channels: u32,
    /// Pixels of a cube.
    chunk: u32,
}

/// Sums of `x - x₀` and its square over a chunk of the pixels, for each group of a slice of the
/// channels, where `x₀` is the first value of the group: `parts[image, slice, chunk, group, 2]`.
///
/// One cube per chunk, slice and image.
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

    let mut sum = Vector::<f32, N>::new(0.0f32);
    let mut square = Vector::<f32, N>::new(0.0f32);
    if row < rows {
        let pivot = pivots(x, first, vector, sizes.channels);
        let end = u32::min((chunk + 1) * sizes.chunk, sizes.positions);
        let mut position = chunk * sizes.chunk + row;
        while position < end {
            // Several loads in flight at once.
            let mut values = Array::<Vector<f32, N>>::new(UNROLLED);
            #[unroll]
            for i in 0..UNROLLED {
                let position = position + comptime!(i as u32) * rows;
                values[i] = pivot;
                if position < end {
                    let at = first + position * sizes.vectors + vector;
                    values[i] = Vector::cast_from(x[at as usize]);
                }
            }
            #[unroll]
            for i in 0..UNROLLED {
                let value = values[i] - pivot;
                sum += value;
                square += value * value;
            }
            position += rows * comptime!(UNROLLED as u32);
        }
    }
    #[unroll]
    for lane in 0..n {
        let at = (UNIT_POS * lanes) as usize + lane;
        sums[at] = sum[lane];
        squares[at] = square[lane];
    }
    sync_cube();
    // Sums over the rows of each channel, then over the channels of each group.
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

/// For each lane of a vector of channels, the first value of its group.
#[cube]
fn pivots<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    first: u32,
    vector: u32,
    channels: u32,
) -> Vector<f32, N> {
    let n = N::value().comptime();
    let lanes = comptime!(n as u32);
    let mut pivot = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for lane in 0..n {
        let start = ((vector * lanes + comptime!(lane as u32)) / channels) * channels;
        pivot[lane] = component::<E, N>(x[(first + start / lanes) as usize], start % lanes);
    }
    pivot
}

/// The component of a vector at a run-time index.
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
    let mut factors = SharedMemory::<f32>::new(comptime!(UNITS * n));
    let (chunk, slice, image) = (CUBE_POS_X, CUBE_POS_Y, CUBE_POS_Z);
    let rows = comptime!(UNITS as u32) / sizes.slice;
    let row = UNIT_POS / sizes.slice;
    let vector = UNIT_POS % sizes.slice;
    let first = image * sizes.positions * sizes.vectors + slice * sizes.slice;

    // Loads that do not depend on the sums come first.
    let mut pivot = Vector::<f32, N>::new(0.0f32);
    let mut scale = Vector::<f32, N>::new(0.0f32);
    let mut shift = Vector::<f32, N>::new(0.0f32);
    if row < rows {
        pivot = pivots(x, first, vector, sizes.channels);
        scale = Vector::cast_from(weight[(slice * sizes.slice + vector) as usize]);
        shift = Vector::cast_from(bias[(slice * sizes.slice + vector) as usize]);
    }
    // Eight units per group.
    let mut group = UNIT_POS / 8;
    while group < sizes.groups {
        let mut sum = 0.0f32;
        let mut square = 0.0f32;
        let first = (image * CUBE_COUNT_Y + slice) * chunks;
        let mut part = UNIT_POS % 8;
        while part < chunks {
            #[unroll]
            for i in 0..UNROLLED {
                let part = part + comptime!((8 * i) as u32);
                if part < chunks {
                    let at = 2 * ((first + part) * sizes.groups + group);
                    sum += parts[at as usize];
                    square += parts[(at + 1) as usize];
                }
            }
            part += comptime!((8 * UNROLLED) as u32);
        }
        means[(group * 8 + UNIT_POS % 8) as usize] = sum;
        factors[(group * 8 + UNIT_POS % 8) as usize] = square;
        group += comptime!(UNITS as u32 / 8);
    }
    sync_cube();
    let count = f32::cast_from(sizes.positions) * f32::cast_from(sizes.channels);
    let mut mean = 0.0f32;
    let mut factor = 0.0f32;
    if UNIT_POS < sizes.groups {
        let mut sum = 0.0f32;
        let mut square = 0.0f32;
        #[unroll]
        for part in 0..8u32 {
            sum += means[(UNIT_POS * 8 + part) as usize];
            square += factors[(UNIT_POS * 8 + part) as usize];
        }
        mean = sum / count;
        let var = f32::max(square / count - mean * mean, 0.0f32);
        factor = 1.0f32 / f32::sqrt(var + eps);
    }
    sync_cube();
    if UNIT_POS < sizes.groups {
        means[UNIT_POS as usize] = mean;
        factors[UNIT_POS as usize] = factor;
    }
    sync_cube();
    if row < rows {
        #[unroll]
        for lane in 0..n {
            let group = ((vector * lanes + comptime!(lane as u32)) / sizes.channels) as usize;
            let factor = scale[lane] * factors[group];
            scale[lane] = factor;
            shift[lane] = shift[lane] - (means[group] + pivot[lane]) * factor;
        }
        let end = u32::min((chunk + 1) * sizes.chunk, sizes.positions);
        let mut position = chunk * sizes.chunk + row;
        while position < end {
            let mut values = Array::<Vector<f32, N>>::new(UNROLLED);
            #[unroll]
            for i in 0..UNROLLED {
                let position = position + comptime!(i as u32) * rows;
                values[i] = Vector::new(0.0f32);
                if position < end {
                    let at = first + position * sizes.vectors + vector;
                    values[i] = Vector::cast_from(x[at as usize]);
                }
            }
            #[unroll]
            for i in 0..UNROLLED {
                let position = position + comptime!(i as u32) * rows;
                let mut value = values[i] * scale + shift;
                if silu {
                    value = activate(value, Function::Silu);
                }
                if position < end {
                    let at = first + position * sizes.vectors + vector;
                    y[at as usize] = Vector::cast_from(value);
                }
            }
            position += rows * comptime!(UNROLLED as u32);
        }
    }
}

/// Group norm of an image, then SiLU with `silu`; `None` if a group of channels does not fit a
/// cube.
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
    // The widest vectors, and the fewest slices of whole groups that each fit a cube.
    let (n, slices) = (0..4)
        .map(|power| vector_size(&x.tensor, x.channels) >> power)
        .filter(|n| *n > 0)
        .find_map(|n| {
            let fits = |slices: &usize| {
                let width = x.channels / slices;
                groups.is_multiple_of(*slices)
                    && width.is_multiple_of(n)
                    && width / n <= UNITS
                    && groups / slices <= UNITS.min(UNITS / 8 * n)
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
    // SAFETY: indices are below the sizes, which are those of the tensors.
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

/// The sum, or with `max` the maximum, of the values of the units that share a row. With `planes`
/// these units are a plane.
#[cube]
pub fn reduce_row(
    value: f32,
    shared: &mut SharedMemory<f32>,
    #[comptime] max: bool,
    #[comptime] planes: bool,
) -> f32 {
    if planes {
        if max {
            plane_max(value)
        } else {
            plane_sum(value)
        }
    } else {
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
}

/// Whether the units that share a row are a plane of the device.
pub fn rows_are_planes<R: CubeRuntime>(client: &ComputeClient<R>) -> bool {
    let hardware = &client.properties().hardware;
    let size = ROW_UNITS as u32;
    hardware.plane_size_min == size
        && hardware.plane_size_max == size
        && client
            .properties()
            .features
            .plane
            .contains(cubecl::ir::features::Plane::Ops)
}

/// Layer norm of `rows` rows of `vectors` vectors; a unit keeps `held` of them in registers.
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
    #[comptime] held: usize,
    #[comptime] planes: bool,
    #[define(E, W)] _dtypes: [StorageType; 2],
) {
    let n = N::value().comptime();
    let mut shared = SharedMemory::<f32>::new(UNITS);
    let lane = UNIT_POS % comptime!(ROW_UNITS as u32);
    let row = CUBE_POS as u32 * comptime!((UNITS / ROW_UNITS) as u32)
        + UNIT_POS / comptime!(ROW_UNITS as u32);
    let inside = row < rows;
    let row = select(inside, row, 0u32);
    let mut values = Array::<Vector<f32, N>>::new(held);
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..held {
        let at = lane + comptime!((i * ROW_UNITS) as u32);
        values[i] = Vector::new(0.0f32);
        if at < vectors {
            values[i] = Vector::cast_from(x[(row * pitch + at) as usize]);
        }
        #[unroll]
        for lane in 0..n {
            sum += values[i][lane];
        }
    }
    let count = f32::cast_from(vectors * comptime!(n as u32));
    let mean = Vector::<f32, N>::new(reduce_row(sum, &mut shared, false, planes) / count);
    let mut square = 0.0f32;
    #[unroll]
    for i in 0..held {
        let at = lane + comptime!((i * ROW_UNITS) as u32);
        values[i] = values[i] - mean;
        if at < vectors {
            let squared = values[i] * values[i];
            #[unroll]
            for lane in 0..n {
                square += squared[lane];
            }
        }
    }
    let var = reduce_row(square, &mut shared, false, planes) / count;
    let scale = Vector::<f32, N>::new(1.0f32 / f32::sqrt(var + eps));
    if inside {
        #[unroll]
        for i in 0..held {
            let at = lane + comptime!((i * ROW_UNITS) as u32);
            if at < vectors {
                let value = values[i] * scale * Vector::cast_from(weight[at as usize])
                    + Vector::cast_from(bias[at as usize]);
                y[(row * vectors + at) as usize] = Vector::cast_from(value);
            }
        }
    }
}

/// Enough cubes for `rows` rows.
fn row_grid(rows: usize) -> CubeCount {
    super::launch::grid(rows as u32, (UNITS / ROW_UNITS) as u32)
}

/// Layer norm over the last dimension; `None` if a row does not fit into the registers.
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
    let mut n = vector_size(&x.tensor, x.columns);
    while !x.pitch.is_multiple_of(n) {
        n /= 2;
    }
    let held = (x.columns / n).div_ceil(ROW_UNITS);
    if held > MAX_HELD {
        return None;
    }
    // SAFETY: indices are below the sizes, which are those of the tensors.
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
            held,
            rows_are_planes(&x.tensor.client),
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
    #[comptime] planes: bool,
    #[define(E, O)] _dtypes: [StorageType; 2],
) {
    let mut shared = SharedMemory::<f32>::new(UNITS);
    let lane = UNIT_POS % comptime!(ROW_UNITS as u32);
    let row =
        (CUBE_POS * comptime!(UNITS / ROW_UNITS)) as u32 + UNIT_POS / comptime!(ROW_UNITS as u32);
    let inside = row < rows;
    let row = select(inside, row, 0u32);
    let mut max_value = f32::cast_from(x[(row * columns) as usize]) * scale;
    let mut i = lane;
    while i < columns {
        max_value = f32::max(
            max_value,
            f32::cast_from(x[(row * columns + i) as usize]) * scale,
        );
        i += comptime!(ROW_UNITS as u32);
    }
    let max_value = reduce_row(max_value, &mut shared, true, planes);
    let mut sum = 0.0f32;
    let mut i = lane;
    while i < columns {
        sum += f32::exp(f32::cast_from(x[(row * columns + i) as usize]) * scale - max_value);
        i += comptime!(ROW_UNITS as u32);
    }
    let factor = 1.0f32 / reduce_row(sum, &mut shared, false, planes);
    if inside {
        let mut i = lane;
        while i < columns {
            let value =
                f32::exp(f32::cast_from(x[(row * columns + i) as usize]) * scale - max_value)
                    * factor;
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
    // SAFETY: indices are below the sizes, which are those of the tensors.
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
            rows_are_planes(&x.client),
            [x.dtype.into(), dtype.into()],
        );
    }
    y
}
