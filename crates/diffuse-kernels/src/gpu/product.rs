//! Matrix products and convolutions as one kernel: `out = epilogue(A Wᵀ)`.
//!
//! `A` has a row for each output position. For a linear layer it is a row of the input. For a
//! convolution it is the receptive field, read from an image with channels last without a copy
//! (implicit GEMM: Chetlur et al. 2014, <https://arxiv.org/abs/1410.0759>). `W` has a row for each
//! output channel, and columns in the order kernel row, kernel column, input channel.
//!
//! A cube computes a tile of `rows x columns` outputs. It loops over the `K` columns of `A` and `W`
//! in steps of [`K_VECTORS`] vectors; the next step is copied to shared memory while the current
//! one is multiplied. Sums are `f32`. In half precision tensor cores multiply (`mma.sync`, 16x8x16)
//! where the device has them; otherwise each unit does.

use cubecl::cmma::MmaDefinition;
use cubecl::ir::MatrixIdent;
use cubecl::prelude::barrier::{Barrier, copy_async_checked};
use cubecl::prelude::*;

use crate::Function;

use super::elementwise::activate;
use super::norm::{ROW_UNITS, reduce_row};

/// Vectors of a row of a tile in shared memory: the depth of a step.
pub const K_VECTORS: usize = 8;
/// Units of a cube without tensor cores.
pub const PLAIN_UNITS: usize = 256;
/// Rows and columns that a unit computes without tensor cores.
const UNIT_TILE: usize = 4;
/// Units of a plane: tensor cores need 32.
pub const PLANE: usize = 32;

/// The tile of outputs that a cube computes, and how its units share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Output positions of the tile.
    pub rows: usize,
    /// Output channels of the tile.
    pub columns: usize,
    /// Planes along the rows and along the columns; `None` without tensor cores.
    pub planes: Option<[usize; 2]>,
    /// Steps in shared memory: one is multiplied while the others are loaded. With more than two,
    /// the hardware copies them (`cp.async`).
    pub stages: usize,
}

impl Tile {
    /// Units of a cube.
    pub const fn units(&self) -> usize {
        match self.planes {
            Some([rows, columns]) => PLANE * rows * columns,
            None => PLAIN_UNITS,
        }
    }
}

/// The tile without tensor cores.
pub const PLAIN_TILE: Tile = Tile {
    rows: 64,
    columns: 64,
    planes: None,
    stages: 1,
};

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Plan {
    /// The tile of a cube.
    pub tile: Tile,
    /// Where the rows of `A` come from.
    pub source: Source,
    /// What is done with the sums.
    pub output: Output,
    /// Number of matrices that `W` consists of: one to three of the same size, each a whole number
    /// of tiles.
    pub weights: usize,
    /// Results are staged in shared memory, so that rows are written, and residuals read, in
    /// vectors of 16 bytes.
    pub staged: bool,
}

/// Where the rows of `A` come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Rows of a matrix.
    Rows,
    /// Receptive fields in an image.
    Image,
}

/// What is done with the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Output {
    /// Bias, channel bias and residual are added.
    Finished,
    /// The first half of the columns times the GELU of the second.
    Geglu,
    /// The sums of a part of `K` (split-K), for [`finish`].
    Partial,
}

/// Sizes, in elements unless stated otherwise.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Sizes {
    /// Rows of `A`: output positions of the whole batch.
    pub rows: u32,
    /// Rows of `W`: output channels.
    pub columns: u32,
    /// Rows of each of the matrices that `W` consists of.
    pub weight_rows: u32,
    /// Channels of the input.
    pub channels: u32,
    /// Distance of two rows (for images: pixels) of the input.
    pub pitch: u32,
    /// Distance of two rows of `W`.
    pub weight_pitch: u32,
    /// Steps over all columns of `A`.
    pub steps: u32,
    /// Steps of a cube.
    pub steps_per_cube: u32,
    /// Positions of one image of the batch.
    pub positions: u32,
    /// Height of the input image.
    pub height: u32,
    /// Width of the input image.
    pub width: u32,
    /// Width of the output image.
    pub out_width: u32,
    /// Height and width of the kernel.
    pub kernel: u32,
    /// Distance of two receptive fields.
    pub stride: u32,
    /// Zeros above and to the left.
    pub padding: u32,
    /// log2 of the factor by which the input image is upsampled, each pixel repeated.
    pub upsample: u32,
    /// Which tensors are added: [`BIAS`], [`CHANNEL_BIAS`], [`RESIDUAL`].
    pub added: u32,
}

/// Bit of [`Sizes::added`].
pub const BIAS: u32 = 1;
/// Bit of [`Sizes::added`].
pub const CHANNEL_BIAS: u32 = 2;
/// Bit of [`Sizes::added`].
pub const RESIDUAL: u32 = 4;

/// Where a row of `A` is read.
#[derive(CubeType, Clone, Copy)]
struct ReceptiveField {
    /// The row, or the first pixel of the image.
    base: u32,
    /// Top and left of the receptive field.
    y: i32,
    x: i32,
}

#[cube]
fn receptive_field(row: u32, sizes: &Sizes, #[comptime] source: Source) -> ReceptiveField {
    match source {
        Source::Rows => {
            let mut y = 0i32;
            if row >= sizes.rows {
                y = -1i32;
            }
            ReceptiveField {
                base: row,
                y,
                x: 0i32,
            }
        }
        _ => {
            let image = row / sizes.positions;
            let position = row % sizes.positions;
            let mut y = ((position / sizes.out_width) * sizes.stride) as i32 - sizes.padding as i32;
            let x = ((position % sizes.out_width) * sizes.stride) as i32 - sizes.padding as i32;
            if row >= sizes.rows {
                // Outside of the image at every row of the kernel.
                y = -65536i32;
            }
            ReceptiveField {
                base: image * sizes.height * sizes.width,
                y,
                x,
            }
        }
    }
}

/// The columns of `A` and `W` that a unit reads in a step.
#[derive(CubeType, Clone, Copy)]
struct KPosition {
    /// Row and column in the kernel.
    y: i32,
    x: i32,
    /// The channel of the input.
    channel: u32,
    /// The column of `W`.
    column: u32,
}

#[cube]
fn k_position<N: Size>(
    step: u32,
    vector: u32,
    sizes: &Sizes,
    #[comptime] source: Source,
) -> KPosition {
    let n = N::value().comptime();
    let lanes = comptime!(n as u32);
    let depth = comptime!((K_VECTORS * n) as u32);
    match source {
        Source::Rows => {
            let channel = step * depth + vector * lanes;
            KPosition {
                y: 0i32,
                x: 0i32,
                channel,
                column: channel,
            }
        }
        _ => {
            let tap_steps = (sizes.channels + comptime!(depth - 1)) / depth;
            let tap = step / tap_steps;
            let channel = (step % tap_steps) * depth + vector * lanes;
            KPosition {
                y: (tap / sizes.kernel) as i32,
                x: (tap % sizes.kernel) as i32,
                channel,
                column: tap * sizes.channels + channel,
            }
        }
    }
}

/// The index of a vector in memory.
#[derive(CubeType, Clone, Copy)]
pub struct VectorIndex {
    /// Index of the vector.
    pub index: u32,
    /// Whether it is inside of the tensor; otherwise it reads as zeros.
    pub inside: bool,
}

/// The vector of a row of `A` at a position in `K`.
#[cube]
fn locate_a<N: Size>(
    field: &ReceptiveField,
    position: &KPosition,
    sizes: &Sizes,
    #[comptime] source: Source,
) -> VectorIndex {
    let n = N::value().comptime();
    let lanes = comptime!(n as u32);
    match source {
        Source::Rows => VectorIndex {
            index: (field.base * sizes.pitch + position.channel) / lanes,
            inside: field.y >= 0i32 && position.channel < sizes.channels,
        },
        _ => {
            let y = field.y + position.y;
            let x = field.x + position.x;
            let height = (sizes.height << sizes.upsample) as i32;
            let width = (sizes.width << sizes.upsample) as i32;
            let inside = y >= 0i32 && y < height && x >= 0i32 && x < width;
            let y = (y as u32) >> sizes.upsample;
            let x = (x as u32) >> sizes.upsample;
            let pixel = field.base + y * sizes.width + x;
            VectorIndex {
                index: (pixel * sizes.pitch + position.channel) / lanes,
                inside: inside && position.channel < sizes.channels,
            }
        }
    }
}

/// The vector of a row of `W` at a position in `K`.
#[cube]
fn locate_w<N: Size>(row: u32, position: &KPosition, sizes: &Sizes) -> VectorIndex {
    let n = N::value().comptime();
    let lanes = comptime!(n as u32);
    VectorIndex {
        index: (row * sizes.weight_pitch + position.column) / lanes,
        inside: row < sizes.weight_rows && position.channel < sizes.channels,
    }
}

/// Reads a vector, or zeros outside of the tensor.
#[cube]
fn read<E: Float, N: Size>(source: &Array<Vector<E, N>>, found: &VectorIndex) -> Vector<E, N> {
    let mut value = Vector::<E, N>::new(E::from_int(0));
    if found.inside {
        value = source[found.index as usize];
    }
    value
}

/// Starts an asynchronous copy of a vector to shared memory; the barrier that the copy is committed
/// to reports its end.
#[cube]
pub fn copy<E: Float, N: Size>(
    source: &Array<Vector<E, N>>,
    found: &VectorIndex,
    target: &mut SharedMemory<Vector<E, N>>,
    at: usize,
) {
    let n = N::value().comptime();
    let start = select(found.inside, found.index, 0u32) as usize;
    let end = select(found.inside, found.index + 1, 0u32) as usize;
    copy_async_checked(
        &source.slice(start, end),
        &mut target.slice_mut(at, at + 1),
        comptime!(n as u32),
    );
}

/// The row of `W` of a column of the tile. For GEGLU, a plane has columns of the first half and
/// then their gates, columns of the second half.
#[cube]
fn weight_row(column: u32, sizes: &Sizes, #[comptime] plan: Plan) -> u32 {
    let columns = comptime!(plan.tile.columns as u32);
    match plan.output {
        Output::Geglu => {
            let width = comptime!(plane_columns(plan.tile) as u32);
            let half = comptime!(width / 2);
            let plane = column / width;
            let within = column % width;
            let mut row = (CUBE_POS_X * columns) / 2 + plane * half + within % half;
            // A column beyond the first half has no row of `W`.
            let inside = row < sizes.columns / 2;
            if within >= half {
                row += sizes.columns / 2;
            }
            select(inside, row, sizes.columns)
        }
        _ => (CUBE_POS_X * columns) % sizes.weight_rows + column,
    }
}

/// Columns of a plane, or of a unit without tensor cores.
const fn plane_columns(tile: Tile) -> usize {
    match tile.planes {
        Some([_, columns]) => tile.columns / columns,
        None => UNIT_TILE,
    }
}

/// The index of a vector in shared memory, swizzled: eight rows of one column lie in different
/// banks.
#[cube]
fn swizzled(row: u32, vector: u32) -> usize {
    (row * comptime!(K_VECTORS as u32) + (vector ^ (row & 7u32))) as usize
}

/// The sums of a unit, in vectors of two neighbouring columns.
#[derive(CubeType)]
struct Sums<NC: Size> {
    /// Without tensor cores `[UNIT_TILE rows, UNIT_TILE / 2]`; with them two rows of each 16x8
    /// product.
    pairs: Sequence<Array<Vector<f32, NC>>>,
}

#[cube]
fn zeros<NC: Size>(#[comptime] count: usize) -> Sums<NC> {
    let mut pairs = Sequence::<Array<Vector<f32, NC>>>::new();
    #[unroll]
    for _ in 0..count {
        let mut pair = Array::<Vector<f32, NC>>::new(2usize);
        pair[0] = Vector::new(0.0f32);
        pair[1] = Vector::new(0.0f32);
        pairs.push(pair);
    }
    Sums::<NC> { pairs }
}

/// Adds bias and channel bias to complete sums.
#[cube]
fn add_biases<E: Float, NC: Size>(
    sums: &mut Sums<NC>,
    bias: &Array<E>,
    channel_bias: &Array<E>,
    sizes: &Sizes,
    #[comptime] plan: Plan,
) {
    let tile = comptime!(plan.tile);
    let planes = comptime!(tile.planes.unwrap_or([1, 1]));
    let cores = comptime!(tile.planes.is_some());
    let rows = comptime!(if cores {
        tile.rows / planes[0] / 16
    } else {
        UNIT_TILE
    });
    let parts = comptime!(if cores { 2usize } else { 1usize });
    let pairs = comptime!(if cores {
        tile.columns / planes[1] / 8
    } else {
        UNIT_TILE / 2
    });
    let apart = comptime!(if cores { 8usize } else { 2usize });

    let mut row = CUBE_POS_Y * comptime!(tile.rows as u32);
    let mut column = (UNIT_POS % 16) * comptime!(UNIT_TILE as u32);
    if comptime!(cores) {
        let lane = UNIT_POS % comptime!(PLANE as u32);
        let plane = UNIT_POS / comptime!(PLANE as u32);
        row += (plane / comptime!(planes[1] as u32)) * comptime!((16 * rows) as u32) + lane / 4;
        column =
            (plane % comptime!(planes[1] as u32)) * comptime!((8 * pairs) as u32) + (lane % 4) * 2;
    } else {
        row += (UNIT_POS / 16) * comptime!(UNIT_TILE as u32);
    }
    // Sums beyond the last row and column are computed as well, but not written.
    let last = sizes.columns - 1;
    let mut columns = Sequence::<u32>::new();
    #[unroll]
    for j in 0..pairs {
        let column = weight_row(column + comptime!((apart * j) as u32), sizes, plan);
        columns.push(u32::min(column, last));
    }
    if sizes.added & BIAS != 0 {
        #[unroll]
        for j in 0..pairs {
            let first = f32::cast_from(bias[columns[j] as usize]);
            let second = f32::cast_from(bias[u32::min(columns[j] + 1, last) as usize]);
            #[unroll]
            for i in 0..rows {
                #[unroll]
                for part in 0..parts {
                    let (index, half) =
                        comptime!(if cores { (i * pairs + j, part) } else { (i, j) });
                    add_pair::<NC>(sums, first, second, index, half);
                }
            }
        }
    }
    // Only convolutions have a channel bias.
    if comptime!(plan.source == Source::Image) && sizes.added & CHANNEL_BIAS != 0 {
        #[unroll]
        for i in 0..rows {
            #[unroll]
            for part in 0..parts {
                let step = comptime!(if cores { 16 * i + 8 * part } else { i });
                let image =
                    u32::min(row + comptime!(step as u32), sizes.rows - 1) / sizes.positions;
                let start = image * sizes.columns;
                #[unroll]
                for j in 0..pairs {
                    let second = start + u32::min(columns[j] + 1, last);
                    let first = f32::cast_from(channel_bias[(start + columns[j]) as usize]);
                    let second = f32::cast_from(channel_bias[second as usize]);
                    let (index, half) =
                        comptime!(if cores { (i * pairs + j, part) } else { (i, j) });
                    add_pair::<NC>(sums, first, second, index, half);
                }
            }
        }
    }
}

#[cube]
fn add_pair<NC: Size>(
    sums: &mut Sums<NC>,
    first: f32,
    second: f32,
    #[comptime] index: usize,
    #[comptime] half: usize,
) {
    let pair = sums.pairs.index_mut(index);
    let mut sum = pair[half];
    sum[0] += first;
    sum[1] += second;
    pair[half] = sum;
}

/// Adds the products of a step in shared memory, with tensor cores.
#[cube]
fn multiply_mma<E: Float, N: Size, NC: Size>(
    sums: &mut Sums<NC>,
    tile_a: &SharedMemory<Vector<E, N>>,
    tile_w: &SharedMemory<Vector<E, N>>,
    start_a: u32,
    start_w: u32,
    #[comptime] tile: Tile,
) {
    let planes = comptime!(tile.planes.unwrap_or([1, 1]));
    let rows = comptime!(tile.rows / planes[0]);
    let columns = comptime!(tile.columns / planes[1]);
    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let size!(NA) = def.vector_size(MatrixIdent::A);
    let size!(NB) = def.vector_size(MatrixIdent::B);

    let lane = UNIT_POS % comptime!(PLANE as u32);
    let plane = UNIT_POS / comptime!(PLANE as u32);
    let row = start_a + (plane / comptime!(planes[1] as u32)) * comptime!(rows as u32);
    let column = start_w + (plane % comptime!(planes[1] as u32)) * comptime!(columns as u32);
    let row_a = row + lane % 16;
    let vector_a = lane / 16;
    let row_w = column + (lane / 16) * 8 + lane % 8;
    let vector_w = (lane / 8) % 2;

    #[unroll]
    for k in 0..comptime!(K_VECTORS / 2) {
        let mut lhs = Sequence::<Array<Vector<E, NA>>>::new();
        #[unroll]
        for i in 0..comptime!(rows / 16) {
            let at = swizzled(
                row_a + comptime!(16 * i as u32),
                vector_a + comptime!(2 * k as u32),
            );
            let slice = tile_a.slice(at, at + 1);
            lhs.push(def.load_matrix::<Vector<E, N>, NA>(&slice, MatrixIdent::A, 4usize, false));
        }
        #[unroll]
        for j in 0..comptime!(columns / 16) {
            let at = swizzled(
                row_w + comptime!(16 * j as u32),
                vector_w + comptime!(2 * k as u32),
            );
            let slice = tile_w.slice(at, at + 1);
            let both = def.load_matrix::<Vector<E, N>, NB>(&slice, MatrixIdent::B, 4usize, false);
            let mut first = Array::<Vector<E, NB>>::new(2usize);
            first[0] = both[0];
            first[1] = both[1];
            let mut second = Array::<Vector<E, NB>>::new(2usize);
            second[0] = both[2];
            second[1] = both[3];
            #[unroll]
            for i in 0..comptime!(rows / 16) {
                let at = comptime!(i * (columns / 8) + 2 * j);
                def.execute_inplace(&lhs[i], &first, sums.pairs.index_mut(at));
                def.execute_inplace(&lhs[i], &second, sums.pairs.index_mut(comptime!(at + 1)));
            }
        }
    }
}

/// Adds the products of a step in shared memory; a unit computes `UNIT_TILE x UNIT_TILE` of them.
#[cube]
fn multiply_plain<E: Float, N: Size, NC: Size>(
    sums: &mut Sums<NC>,
    tile_a: &SharedMemory<Vector<E, N>>,
    tile_w: &SharedMemory<Vector<E, N>>,
) {
    let n = N::value().comptime();
    let row = (UNIT_POS / 16) * comptime!(UNIT_TILE as u32);
    let column = (UNIT_POS % 16) * comptime!(UNIT_TILE as u32);
    for k in 0..comptime!(K_VECTORS as u32) {
        let mut lhs = Array::<Vector<f32, N>>::new(UNIT_TILE);
        let mut rhs = Array::<Vector<f32, N>>::new(UNIT_TILE);
        #[unroll]
        for i in 0..UNIT_TILE {
            lhs[i] = Vector::cast_from(tile_a[swizzled(row + comptime!(i as u32), k)]);
            rhs[i] = Vector::cast_from(tile_w[swizzled(column + comptime!(i as u32), k)]);
        }
        #[unroll]
        for i in 0..UNIT_TILE {
            #[unroll]
            for j in 0..comptime!(UNIT_TILE / 2) {
                let pair = sums.pairs.index_mut(comptime!(i * (UNIT_TILE / 4) + j / 2));
                let mut sum = pair[comptime!(j % 2)];
                let first = lhs[i] * rhs[comptime!(2 * j)];
                let second = lhs[i] * rhs[comptime!(2 * j + 1)];
                #[unroll]
                for lane in 0..n {
                    sum[0] += first[lane];
                    sum[1] += second[lane];
                }
                pair[comptime!(j % 2)] = sum;
            }
        }
    }
}

/// Adds the residual to the sums of two neighbouring columns of a row, and writes them.
#[cube]
fn write<E: Float, O: Float, P: Size>(
    row: u32,
    column: u32,
    first: f32,
    second: f32,
    residual: &Array<Vector<E, P>>,
    out: &mut Array<Vector<O, P>>,
    sizes: &Sizes,
    #[comptime] output: Output,
) {
    let p = P::value().comptime();
    #[unroll]
    for i in 0..comptime!(2 / p) {
        let column = column + comptime!((i * p) as u32);
        if row < sizes.rows && column < sizes.columns {
            let mut sums = Vector::<f32, P>::new(first);
            if comptime!(i == 1) {
                sums = Vector::<f32, P>::new(second);
            }
            if comptime!(p == 2) {
                sums[1] = second;
            }
            let at = (row * sizes.columns + column) / comptime!(p as u32);
            match output {
                Output::Partial => {
                    let part = CUBE_POS_Z * ((sizes.rows * sizes.columns) / comptime!(p as u32));
                    out[(part + at) as usize] = Vector::cast_from(sums);
                }
                _ => {
                    if sizes.added & RESIDUAL != 0 {
                        sums += Vector::cast_from(residual[at as usize]);
                    }
                    out[at as usize] = Vector::cast_from(sums);
                }
            }
        }
    }
}

/// Adds bias, channel bias and residual to the sums of neighbouring columns of a row.
#[cube]
fn add_all<E: Float, P: Size>(
    sums: Vector<f32, P>,
    row: u32,
    column: u32,
    bias: &Array<E>,
    channel_bias: &Array<E>,
    residual: &Array<Vector<E, P>>,
    columns: u32,
    positions: u32,
    added: u32,
) -> Vector<f32, P> {
    let p = P::value().comptime();
    let mut sums = sums;
    if added & BIAS != 0 {
        #[unroll]
        for i in 0..p {
            sums[i] += f32::cast_from(bias[(column as usize) + i]);
        }
    }
    if added & CHANNEL_BIAS != 0 {
        let at = ((row / positions) * columns + column) as usize;
        #[unroll]
        for i in 0..p {
            sums[i] += f32::cast_from(channel_bias[at + i]);
        }
    }
    if added & RESIDUAL != 0 {
        let at = (row * columns + column) / comptime!(p as u32);
        sums += Vector::cast_from(residual[at as usize]);
    }
    sums
}

/// Starts to copy a vector of `W` from the matrix that the tile belongs to.
#[cube]
fn copy_w<E: Float, N: Size>(
    weight: &Array<Vector<E, N>>,
    weight_2: &Array<Vector<E, N>>,
    weight_3: &Array<Vector<E, N>>,
    which: u32,
    found: &VectorIndex,
    target: &mut SharedMemory<Vector<E, N>>,
    at: usize,
    #[comptime] weights: usize,
) {
    if comptime!(weights == 1) || which == 0 {
        copy(weight, found, target, at);
    } else if which == 1 {
        copy(weight_2, found, target, at);
    } else if comptime!(weights == 3) {
        copy(weight_3, found, target, at);
    }
}

/// See the [module](self). Unused `bias`, `channel_bias` and `residual` may be any array.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn product<E: Float, N: Size, P: Size, O: Float>(
    a: &Array<Vector<E, N>>,
    weight: &Array<Vector<E, N>>,
    weight_2: &Array<Vector<E, N>>,
    weight_3: &Array<Vector<E, N>>,
    bias: &Array<E>,
    channel_bias: &Array<E>,
    residual: &Array<Vector<E, P>>,
    out: &mut Array<Vector<O, P>>,
    sizes: &Sizes,
    #[comptime] plan: Plan,
    #[define(E, O)] _dtypes: [StorageType; 2],
) {
    let tile = comptime!(plan.tile);
    let source = comptime!(plan.source);
    let units = comptime!(tile.units());
    let passes_a = comptime!(tile.rows * K_VECTORS / units);
    let passes_w = comptime!(tile.columns * K_VECTORS / units);
    let pass = comptime!((units / K_VECTORS) as u32);

    let mut tile_a = SharedMemory::<Vector<E, N>>::new_aligned(
        comptime!(tile.stages * tile.rows * K_VECTORS),
        16usize,
    );
    let mut tile_w = SharedMemory::<Vector<E, N>>::new_aligned(
        comptime!(tile.stages * tile.columns * K_VECTORS),
        16usize,
    );

    let vector = UNIT_POS % comptime!(K_VECTORS as u32);
    let unit_row = UNIT_POS / comptime!(K_VECTORS as u32);
    let first_row = CUBE_POS_Y * comptime!(tile.rows as u32);
    let mut fields = Sequence::<ReceptiveField>::new();
    #[unroll]
    for i in 0..passes_a {
        fields.push(receptive_field(
            first_row + unit_row + comptime!(i as u32) * pass,
            sizes,
            source,
        ));
    }
    let mut weight_rows = Sequence::<u32>::new();
    #[unroll]
    for i in 0..passes_w {
        weight_rows.push(weight_row(
            unit_row + comptime!(i as u32) * pass,
            sizes,
            plan,
        ));
    }

    let which = (CUBE_POS_X * comptime!(tile.columns as u32)) / sizes.weight_rows;

    // Two columns a vector, as tensor cores return them.
    let size!(NC) = 2usize;
    let count = match comptime!(tile.planes) {
        Some(planes) => comptime!((tile.rows / planes[0] / 16) * (tile.columns / planes[1] / 8)),
        None => comptime!(UNIT_TILE * UNIT_TILE / 4),
    };
    let mut sums = zeros::<NC>(count);
    let begin = CUBE_POS_Z * sizes.steps_per_cube;
    let end = u32::min(begin + sizes.steps_per_cube, sizes.steps);

    if comptime!(tile.stages > 2) {
        let mut barriers = Sequence::<Shared<Barrier>>::new();
        #[unroll]
        for _ in 0..tile.stages {
            barriers.push(Barrier::shared(comptime!(units as u32), UNIT_POS == 0));
        }
        let stages = comptime!(tile.stages as u32);
        let ahead = comptime!(stages - 1);
        for step in begin..end + ahead {
            if step >= begin + ahead {
                // All units have read the step that is overwritten next.
                let ready = step - ahead - begin;
                #[unroll]
                for i in 0..tile.stages {
                    if ready % stages == comptime!(i as u32) {
                        barriers[i].wait_parity((ready / stages) % 2);
                    }
                }
                sync_cube();
            }
            if step < end {
                let stage = (step - begin) % stages;
                let start_a = stage * comptime!(tile.rows as u32) + unit_row;
                let start_w = stage * comptime!(tile.columns as u32) + unit_row;
                let position = k_position::<N>(step, vector, sizes, source);
                #[unroll]
                for i in 0..passes_a {
                    let found = locate_a::<N>(&fields[i], &position, sizes, source);
                    let row = start_a + comptime!(i as u32) * pass;
                    copy(a, &found, &mut tile_a, swizzled(row, vector));
                }
                #[unroll]
                for i in 0..passes_w {
                    let found = locate_w::<N>(weight_rows[i], &position, sizes);
                    let row = start_w + comptime!(i as u32) * pass;
                    let target = swizzled(row, vector);
                    copy_w(
                        weight,
                        weight_2,
                        weight_3,
                        which,
                        &found,
                        &mut tile_w,
                        target,
                        plan.weights,
                    );
                }
                #[unroll]
                for i in 0..tile.stages {
                    if stage == comptime!(i as u32) {
                        barriers[i].commit_copy_async();
                        barriers[i].arrive();
                    }
                }
            }
            if step >= begin + ahead {
                let stage = (step - ahead - begin) % stages;
                let start_a = stage * comptime!(tile.rows as u32);
                let start_w = stage * comptime!(tile.columns as u32);
                multiply_mma::<E, N, NC>(&mut sums, &tile_a, &tile_w, start_a, start_w, tile);
            }
        }
    } else {
        let mut next_a = Array::<Vector<E, N>>::new(passes_a);
        let mut next_w = Array::<Vector<E, N>>::new(passes_w);
        let stages = comptime!(tile.stages as u32);
        // The next step is loaded into registers while the current one is multiplied.
        for step in begin..end + 1 {
            if step > begin {
                let stage = (step - 1 - begin) % stages;
                let start_a = stage * comptime!(tile.rows as u32) + unit_row;
                let start_w = stage * comptime!(tile.columns as u32) + unit_row;
                if comptime!(tile.stages == 1) {
                    sync_cube();
                }
                #[unroll]
                for i in 0..passes_a {
                    tile_a[swizzled(start_a + comptime!(i as u32) * pass, vector)] = next_a[i];
                }
                #[unroll]
                for i in 0..passes_w {
                    tile_w[swizzled(start_w + comptime!(i as u32) * pass, vector)] = next_w[i];
                }
                sync_cube();
            }
            if step < end {
                let position = k_position::<N>(step, vector, sizes, source);
                #[unroll]
                for i in 0..passes_a {
                    next_a[i] = read(a, &locate_a::<N>(&fields[i], &position, sizes, source));
                }
                #[unroll]
                for i in 0..passes_w {
                    next_w[i] = read(weight, &locate_w::<N>(weight_rows[i], &position, sizes));
                }
            }
            if step > begin {
                let stage = (step - 1 - begin) % stages;
                let start_a = stage * comptime!(tile.rows as u32);
                let start_w = stage * comptime!(tile.columns as u32);
                if comptime!(tile.planes.is_some()) {
                    multiply_mma::<E, N, NC>(&mut sums, &tile_a, &tile_w, start_a, start_w, tile);
                } else {
                    multiply_plain::<E, N, NC>(&mut sums, &tile_a, &tile_w);
                }
            }
        }
    }

    if comptime!(plan.output != Output::Partial) {
        add_biases::<E, NC>(&mut sums, bias, channel_bias, sizes, plan);
    }
    if comptime!(plan.staged) {
        write_staged::<E, O, N, NC, P>(&sums, &mut tile_a, residual, out, sizes, plan);
    } else {
        write_direct::<E, O, NC, P>(&sums, residual, out, sizes, plan);
    }
}

/// Writes the sums of a cube through shared memory, with tensor cores. The residual is added to
/// rounded values, as by a separate operation.
#[cube]
#[allow(clippy::too_many_arguments)]
fn write_staged<E: Float, O: Float, N: Size, NC: Size, P: Size>(
    sums: &Sums<NC>,
    memory: &mut SharedMemory<Vector<E, N>>,
    residual: &Array<Vector<E, P>>,
    out: &mut Array<Vector<O, P>>,
    sizes: &Sizes,
    #[comptime] plan: Plan,
) {
    let tile = comptime!(plan.tile);
    let planes = comptime!(tile.planes.unwrap_or([1, 1]));
    let rows = comptime!(tile.rows / planes[0]);
    let columns = comptime!(tile.columns / planes[1]);
    // The distance of two rows in shared memory, padded against bank conflicts.
    let pitch = comptime!((tile.columns + 8) as u32);

    let lane = UNIT_POS % comptime!(PLANE as u32);
    let plane = UNIT_POS / comptime!(PLANE as u32);
    let first_row = CUBE_POS_Y * comptime!(tile.rows as u32);
    let first_column = CUBE_POS_X * comptime!(tile.columns as u32);
    let row = (plane / comptime!(planes[1] as u32)) * comptime!(rows as u32) + lane / 4;
    let column = (plane % comptime!(planes[1] as u32)) * comptime!(columns as u32) + (lane % 4) * 2;

    // All units have read the last step.
    sync_cube();
    let mut pairs = memory.to_slice_mut().with_vector_size::<Const<2>>();
    #[unroll]
    for i in 0..comptime!(rows / 16) {
        #[unroll]
        for j in 0..comptime!(columns / 8) {
            #[unroll]
            for part in 0..2usize {
                let row = row + comptime!((16 * i + 8 * part) as u32);
                let column = column + comptime!(8 * j as u32);
                let pair = sums.pairs[comptime!(i * (columns / 8) + j)][part];
                let mut rounded = Vector::<E, Const<2>>::new(E::cast_from(pair[0]));
                rounded[1] = E::cast_from(pair[1]);
                pairs[((row * pitch + column) / 2) as usize] = rounded;
            }
        }
    }
    sync_cube();
    let vectors = memory.to_slice().with_vector_size::<P>();
    let row_vectors = comptime!((tile.columns / 8) as u32);
    let count = comptime!((tile.rows * tile.columns / 8) as u32);
    let units = comptime!(tile.units() as u32);
    // Several at a time, so that their residuals are loaded together.
    let together = comptime!(4u32);
    for group in 0..comptime!(count.div_ceil(units * together)) {
        #[unroll]
        for i in 0..together {
            let index = UNIT_POS + (group * together + i) * units;
            let row = index / row_vectors;
            let column = (index % row_vectors) * 8;
            let inside = first_row + row < sizes.rows && first_column + column < sizes.columns;
            if index < count && inside {
                let value = vectors[((row * pitch + column) / 8) as usize];
                let at = (((first_row + row) * sizes.columns + first_column + column) / 8) as usize;
                if sizes.added & RESIDUAL != 0 {
                    let value = Vector::<f32, P>::cast_from(value);
                    out[at] = Vector::cast_from(value + Vector::cast_from(residual[at]));
                } else {
                    out[at] = Vector::cast_from(value);
                }
            }
        }
    }
}

/// Writes the sums of a unit.
#[cube]
fn write_direct<E: Float, O: Float, NC: Size, P: Size>(
    sums: &Sums<NC>,
    residual: &Array<Vector<E, P>>,
    out: &mut Array<Vector<O, P>>,
    sizes: &Sizes,
    #[comptime] plan: Plan,
) {
    let tile = comptime!(plan.tile);
    let first_row = CUBE_POS_Y * comptime!(tile.rows as u32);
    let first_column = CUBE_POS_X * comptime!(tile.columns as u32);
    match comptime!(tile.planes) {
        Some(planes) => {
            let rows = comptime!(tile.rows / planes[0]);
            let columns = comptime!(tile.columns / planes[1]);
            let lane = UNIT_POS % comptime!(PLANE as u32);
            let plane = UNIT_POS / comptime!(PLANE as u32);
            let row = first_row
                + (plane / comptime!(planes[1] as u32)) * comptime!(rows as u32)
                + lane / 4;
            let plane_column = plane % comptime!(planes[1] as u32);
            #[unroll]
            for i in 0..comptime!(rows / 16) {
                if comptime!(plan.output == Output::Geglu) {
                    let half = comptime!(columns / 2);
                    let column =
                        first_column / 2 + plane_column * comptime!(half as u32) + (lane % 4) * 2;
                    #[unroll]
                    for j in 0..comptime!(half / 8) {
                        let value = &sums.pairs[comptime!(i * (columns / 8) + j)];
                        let gate = &sums.pairs[comptime!(i * (columns / 8) + half / 8 + j)];
                        #[unroll]
                        for part in 0..2usize {
                            write_geglu::<O, P>(
                                row + comptime!((16 * i + 8 * part) as u32),
                                column + comptime!(8 * j as u32),
                                value[part][0],
                                value[part][1],
                                gate[part][0],
                                gate[part][1],
                                out,
                                sizes,
                            );
                        }
                    }
                } else {
                    let column =
                        first_column + plane_column * comptime!(columns as u32) + (lane % 4) * 2;
                    #[unroll]
                    for j in 0..comptime!(columns / 8) {
                        let pair = &sums.pairs[comptime!(i * (columns / 8) + j)];
                        #[unroll]
                        for part in 0..2usize {
                            write::<E, O, P>(
                                row + comptime!((16 * i + 8 * part) as u32),
                                column + comptime!(8 * j as u32),
                                pair[part][0],
                                pair[part][1],
                                residual,
                                out,
                                sizes,
                                plan.output,
                            );
                        }
                    }
                }
            }
        }
        None => {
            let row = first_row + (UNIT_POS / 16) * comptime!(UNIT_TILE as u32);
            let unit_column = (UNIT_POS % 16) * comptime!(UNIT_TILE as u32);
            #[unroll]
            for i in 0..UNIT_TILE {
                let pair = &sums.pairs[i];
                if comptime!(plan.output == Output::Geglu) {
                    write_geglu::<O, P>(
                        row + comptime!(i as u32),
                        (first_column + unit_column) / 2,
                        pair[0][0],
                        pair[0][1],
                        pair[1][0],
                        pair[1][1],
                        out,
                        sizes,
                    );
                } else {
                    #[unroll]
                    for j in 0..2usize {
                        write::<E, O, P>(
                            row + comptime!(i as u32),
                            first_column + unit_column + comptime!(2 * j as u32),
                            pair[j][0],
                            pair[j][1],
                            residual,
                            out,
                            sizes,
                            plan.output,
                        );
                    }
                }
            }
        }
    }
}

#[cube]
fn write_geglu<O: Float, P: Size>(
    row: u32,
    column: u32,
    value_0: f32,
    value_1: f32,
    gate_0: f32,
    gate_1: f32,
    out: &mut Array<Vector<O, P>>,
    sizes: &Sizes,
) {
    let half = sizes.columns / 2;
    if row < sizes.rows && column < half {
        // Two columns a vector, which the launch ensures.
        let mut value = Vector::<f32, P>::new(value_0);
        value[1] = value_1;
        let mut gate = Vector::<f32, P>::new(gate_0);
        gate[1] = gate_1;
        let gate = activate(gate, Function::Gelu);
        out[((row * half + column) / 2) as usize] = Vector::cast_from(value * gate);
    }
}

/// Adds the sums of all parts of `K`, then bias, channel bias and residual.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn finish<E: Float, P: Size>(
    parts: &Array<Vector<f32, P>>,
    bias: &Array<E>,
    channel_bias: &Array<E>,
    residual: &Array<Vector<E, P>>,
    out: &mut Array<Vector<E, P>>,
    rows: u32,
    columns: u32,
    positions: u32,
    count: u32,
    added_bits: u32,
    #[define(E)] _dtype: StorageType,
) {
    let p = P::value().comptime();
    let width = comptime!(p as u32);
    let at = ABSOLUTE_POS as u32;
    let vectors = (rows * columns) / width;
    if at < vectors {
        let mut sums = Vector::<f32, P>::new(0.0f32);
        for part in 0..count {
            sums += parts[(part * vectors + at) as usize];
        }
        let row = (width * at) / columns;
        let column = (width * at) % columns;
        out[at as usize] = Vector::cast_from(add_all::<E, P>(
            sums,
            row,
            column,
            bias,
            channel_bias,
            residual,
            columns,
            positions,
            added_bits,
        ));
    }
}

/// Rows of a product for [`few_rows`], at most.
pub const FEW_ROWS: usize = 4;
/// Units of a cube of [`few_rows`].
pub const FEW_UNITS: usize = 256;

/// A product with few rows, such as that of a time embedding. The units of a column of the result
/// read its row of `W` together, once for all rows of `A`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn few_rows<E: Float, N: Size>(
    a: &Array<Vector<E, N>>,
    weight: &Array<Vector<E, N>>,
    bias: &Array<E>,
    residual: &Array<E>,
    out: &mut Array<E>,
    columns: u32,
    vectors: u32,
    pitch: u32,
    weight_pitch: u32,
    added: u32,
    #[comptime] rows: usize,
    #[comptime] planes: bool,
    #[define(E)] _dtype: StorageType,
) {
    let n = N::value().comptime();
    let mut shared = SharedMemory::<f32>::new(FEW_UNITS);
    let lane = UNIT_POS % comptime!(ROW_UNITS as u32);
    let column = CUBE_POS as u32 * comptime!((FEW_UNITS / ROW_UNITS) as u32)
        + UNIT_POS / comptime!(ROW_UNITS as u32);
    let inside = column < columns;
    let start = select(inside, column, 0u32) * weight_pitch;
    let mut sums = Array::<Vector<f32, N>>::new(rows);
    #[unroll]
    for row in 0..rows {
        sums[row] = Vector::new(0.0f32);
    }
    let mut at = lane;
    while at < vectors {
        let weights = Vector::<f32, N>::cast_from(weight[(start + at) as usize]);
        #[unroll]
        for row in 0..rows {
            let value = a[(comptime!(row as u32) * pitch + at) as usize];
            sums[row] += Vector::cast_from(value) * weights;
        }
        at += comptime!(ROW_UNITS as u32);
    }
    #[unroll]
    for row in 0..rows {
        let mut sum = 0.0f32;
        #[unroll]
        for lane in 0..n {
            sum += sums[row][lane];
        }
        sum = reduce_row(sum, &mut shared, false, planes);
        if inside && lane == 0 {
            let at = comptime!(row as u32) * columns + column;
            if added & BIAS != 0 {
                sum += f32::cast_from(bias[column as usize]);
            }
            if added & RESIDUAL != 0 {
                sum += f32::cast_from(residual[at as usize]);
            }
            out[at as usize] = E::cast_from(sum);
        }
    }
}
