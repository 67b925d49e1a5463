//! Attention without a matrix of scores in memory ("FlashAttention", Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>, algorithm 1), with the online softmax of Milakov &
//! Gimelshein 2018 (<https://arxiv.org/abs/1805.02867>).

use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::cmma::MmaDefinition;
use cubecl::ir::MatrixIdent;
use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::launch::{array, empty, max_vector_size};
use super::layout::{Rows, with_layout};
use super::matrix::{Addends, linear, products};
use super::norm::softmax;
use super::product::{PLANE, VectorIndex, copy};
use super::tiles::has_tensor_cores;

/// Size of a head up to which its scores are not in memory.
pub const MAX_HEAD: usize = 160;
/// Keys of a tile without tensor cores.
const PLAIN_KEYS: usize = 16;
/// Queries of a cube without tensor cores: one a unit.
const PLAIN_QUERIES: usize = 64;
/// A masked score. Finite, since shaders may assume that no value is infinite.
const LOWEST: f32 = -1e30;

/// The sizes of an attention operation.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Sizes {
    heads: u32,
    queries: u32,
    keys: u32,
    /// Distance of neighbouring tokens of each tensor, in elements.
    query_pitch: u32,
    key_pitch: u32,
    value_pitch: u32,
}

/// Parameters that the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Plan {
    /// Elements of a head.
    head: usize,
    /// Planes of a cube.
    planes: usize,
    /// Tiles of 16 queries of a plane, which share the keys that it reads.
    query_tiles: usize,
    /// Keys of a tile.
    keys: usize,
    /// A query attends to its own and earlier keys only.
    causal: bool,
}

/// The index of a vector in shared memory. Rows are an odd number of vectors apart, so that eight
/// rows of one column lie in different banks.
#[cube]
fn shared_index(row: u32, vector: u32, #[comptime] pitch: usize) -> usize {
    (row * comptime!(pitch as u32) + vector) as usize
}

/// Vectors of 8 elements of a head, padded to a multiple of 16 elements, and the distance of two
/// rows in shared memory.
const fn padded(head: usize) -> (usize, usize) {
    let vectors = head.div_ceil(16) * 2;
    (vectors, vectors + 1)
}

/// The rows of a head in memory.
#[derive(CubeType, Clone, Copy)]
struct HeadRows {
    /// The first element of the first token.
    start: u32,
    /// Number of tokens.
    tokens: u32,
    /// Distance of neighbouring tokens, in elements.
    pitch: u32,
}

/// Starts to copy rows of a head to shared memory, with zeros beyond the last token and the last
/// element.
#[cube]
fn copy_rows<E: Float, N: Size>(
    source: &Array<Vector<E, N>>,
    target: &mut SharedMemory<Vector<E, N>>,
    target_row: u32,
    first: u32,
    head_rows: &HeadRows,
    #[comptime] rows: usize,
    #[comptime] units: usize,
    #[comptime] head: usize,
) {
    let (vectors, shared_pitch) = comptime!(padded(head));
    let count = comptime!(rows * vectors);
    #[unroll]
    for i in 0..comptime!(count.div_ceil(units)) {
        let index = UNIT_POS + comptime!((i * units) as u32);
        if comptime!((i + 1) * units <= count) || index < comptime!(count as u32) {
            let row = index / comptime!(vectors as u32);
            let vector = index % comptime!(vectors as u32);
            let found = VectorIndex {
                index: (head_rows.start + (first + row) * head_rows.pitch) / 8 + vector,
                inside: first + row < head_rows.tokens && vector < comptime!((head / 8) as u32),
            };
            copy(
                source,
                &found,
                target,
                shared_index(target_row + row, vector, shared_pitch),
            );
        }
    }
}

/// One of the two 8-column operands that were loaded together.
#[cube]
fn halves<E: Float, NB: Size>(
    both: &Array<Vector<E, NB>>,
    #[comptime] second: bool,
) -> Array<Vector<E, NB>> {
    let start = comptime!(if second { 2usize } else { 0usize });
    let mut half = Array::<Vector<E, NB>>::new(2usize);
    half[0] = both[start];
    half[1] = both[comptime!(start + 1)];
    half
}

/// Attention with tensor cores.
#[cube(launch_unchecked, fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
fn attention_mma<E: Float, N: Size>(
    query: &Array<Vector<E, N>>,
    key: &Array<Vector<E, N>>,
    value: &Array<Vector<E, N>>,
    out: &mut Array<Vector<E, Const<2>>>,
    sizes: &Sizes,
    scale: f32,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: StorageType,
) {
    let head = comptime!(plan.head);
    let query_tiles = comptime!(plan.query_tiles);
    let tile_keys = comptime!(plan.keys);
    let units = comptime!(plan.planes * PLANE);
    let rows = comptime!(plan.planes * plan.query_tiles * 16);
    let (vectors, pitch) = comptime!(padded(plan.head));
    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let size!(NA) = def.vector_size(MatrixIdent::A);
    let size!(NB) = def.vector_size(MatrixIdent::B);
    let size!(NC) = def.vector_size(MatrixIdent::Accumulator);

    let mut tile_q = SharedMemory::<Vector<E, N>>::new_aligned(comptime!(rows * pitch), 16usize);
    let mut tile_k =
        SharedMemory::<Vector<E, N>>::new_aligned(comptime!(2 * tile_keys * pitch), 16usize);
    let mut tile_v =
        SharedMemory::<Vector<E, N>>::new_aligned(comptime!(2 * tile_keys * pitch), 16usize);
    let mut barriers = Sequence::<Shared<Barrier>>::new();
    #[unroll]
    for _ in 0..2usize {
        barriers.push(Barrier::shared(comptime!(units as u32), UNIT_POS == 0));
    }

    let batch = CUBE_POS_Y / sizes.heads;
    let offset = (CUBE_POS_Y % sizes.heads) * comptime!(head as u32);
    let first_query = CUBE_POS_X * comptime!(rows as u32);
    let lane = UNIT_POS % comptime!(PLANE as u32);
    let plane_row = (UNIT_POS / comptime!(PLANE as u32)) * comptime!((query_tiles * 16) as u32);
    let queries = HeadRows {
        start: batch * sizes.queries * sizes.query_pitch + offset,
        tokens: sizes.queries,
        pitch: sizes.query_pitch,
    };
    let keys = HeadRows {
        start: batch * sizes.keys * sizes.key_pitch + offset,
        tokens: sizes.keys,
        pitch: sizes.key_pitch,
    };
    let values = HeadRows {
        start: batch * sizes.keys * sizes.value_pitch + offset,
        tokens: sizes.keys,
        pitch: sizes.value_pitch,
    };
    let mut end = sizes.keys;
    if comptime!(plan.causal) {
        end = u32::min(end, first_query + comptime!(rows as u32));
    }
    let tiles = (end + comptime!(tile_keys as u32 - 1)) / comptime!(tile_keys as u32);

    copy_rows(
        query,
        &mut tile_q,
        0u32,
        first_query,
        &queries,
        rows,
        units,
        head,
    );
    copy_rows(key, &mut tile_k, 0u32, 0u32, &keys, tile_keys, units, head);
    copy_rows(
        value,
        &mut tile_v,
        0u32,
        0u32,
        &values,
        tile_keys,
        units,
        head,
    );
    barriers[0].commit_copy_async();
    barriers[0].arrive();

    // For each query tile and 8 columns: rows `lane / 4` and `lane / 4 + 8`.
    let mut operands = Sequence::<Array<Vector<E, NA>>>::new();
    let mut sums = Sequence::<Array<Vector<f32, NC>>>::new();
    #[unroll]
    for _ in 0..comptime!(query_tiles * vectors) {
        let mut pair = Array::<Vector<f32, NC>>::new(2usize);
        pair[0] = Vector::new(0.0f32);
        pair[1] = Vector::new(0.0f32);
        sums.push(pair);
    }
    let mut max = Array::<f32>::new(comptime!(2 * query_tiles));
    let mut total = Array::<f32>::new(comptime!(2 * query_tiles));
    #[unroll]
    for part in 0..comptime!(2 * query_tiles) {
        max[part] = LOWEST.runtime();
        total[part] = 0.0f32;
    }
    let own_query = first_query + plane_row + lane / 4;

    // The queries stay in registers.
    barriers[0].wait_parity(0u32);
    #[unroll]
    for query_tile in 0..query_tiles {
        #[unroll]
        for i in 0..comptime!(vectors / 2) {
            let row = plane_row + comptime!(16 * query_tile as u32) + lane % 16;
            let start = shared_index(row, lane / 16 + comptime!(2 * i as u32), pitch);
            let slice = tile_q.slice(start, start + 1);
            operands.push(def.load_matrix::<Vector<E, N>, NA>(
                &slice,
                MatrixIdent::A,
                4usize,
                false,
            ));
        }
    }

    for tile in 0..tiles {
        let stage = tile % 2;
        if tile + 1 < tiles {
            let next = (tile + 1) % 2;
            let first = (tile + 1) * comptime!(tile_keys as u32);
            let row = next * comptime!(tile_keys as u32);
            copy_rows(key, &mut tile_k, row, first, &keys, tile_keys, units, head);
            copy_rows(
                value,
                &mut tile_v,
                row,
                first,
                &values,
                tile_keys,
                units,
                head,
            );
            #[unroll]
            for i in 0..2usize {
                if next == comptime!(i as u32) {
                    barriers[i].commit_copy_async();
                    barriers[i].arrive();
                }
            }
        }
        #[unroll]
        for i in 0..2usize {
            if stage == comptime!(i as u32) {
                barriers[i].wait_parity((tile / 2) % 2);
            }
        }
        let tile_row = stage * comptime!(tile_keys as u32);
        let first_key = tile * comptime!(tile_keys as u32);

        // Scores of the queries of the plane and the keys of the tile, `[query_tile][8 keys]`.
        let mut scores = Sequence::<Array<Vector<f32, NC>>>::new();
        #[unroll]
        for _ in 0..comptime!(query_tiles * tile_keys / 8) {
            let mut pair = Array::<Vector<f32, NC>>::new(2usize);
            pair[0] = Vector::new(0.0f32);
            pair[1] = Vector::new(0.0f32);
            scores.push(pair);
        }
        #[unroll]
        for j in 0..comptime!(tile_keys / 16) {
            #[unroll]
            for i in 0..comptime!(vectors / 2) {
                let row = tile_row + comptime!(16 * j as u32) + (lane / 16) * 8 + lane % 8;
                let start = shared_index(row, (lane / 8) % 2 + comptime!(2 * i as u32), pitch);
                let slice = tile_k.slice(start, start + 1);
                let both =
                    def.load_matrix::<Vector<E, N>, NB>(&slice, MatrixIdent::B, 4usize, false);
                let first = halves(&both, false);
                let second = halves(&both, true);
                #[unroll]
                for query_tile in 0..query_tiles {
                    let operand = &operands[comptime!(query_tile * (vectors / 2) + i)];
                    let pair = comptime!(query_tile * (tile_keys / 8) + 2 * j);
                    def.execute_inplace(operand, &first, scores.index_mut(pair));
                    def.execute_inplace(operand, &second, scores.index_mut(comptime!(pair + 1)));
                }
            }
        }

        // Masks keys beyond the last one, or later than the query.
        let last = first_key + comptime!(tile_keys as u32);
        let mut masks = last > sizes.keys;
        if comptime!(plan.causal) {
            masks = masks || last > first_query;
        }
        if masks {
            #[unroll]
            for query_tile in 0..query_tiles {
                #[unroll]
                for j in 0..comptime!(tile_keys / 8) {
                    let pair = scores.index_mut(comptime!(query_tile * (tile_keys / 8) + j));
                    #[unroll]
                    for part in 0..2usize {
                        let mut values = pair[part];
                        #[unroll]
                        for i in 0..2usize {
                            let column = first_key + comptime!((8 * j + i) as u32) + (lane % 4) * 2;
                            let mut masked = column >= sizes.keys;
                            if comptime!(plan.causal) {
                                let row =
                                    own_query + comptime!((16 * query_tile + 8 * part) as u32);
                                masked = masked || column > row;
                            }
                            if masked {
                                values[i] = LOWEST.runtime();
                            }
                        }
                        pair[part] = values;
                    }
                }
            }
        }

        #[unroll]
        for query_tile in 0..query_tiles {
            #[unroll]
            for part in 0..2usize {
                let own = comptime!(2 * query_tile + part);
                let mut new_max = max[own];
                #[unroll]
                for j in 0..comptime!(tile_keys / 8) {
                    let values = scores[comptime!(query_tile * (tile_keys / 8) + j)][part];
                    new_max = f32::max(new_max, f32::max(values[0], values[1]));
                }
                new_max = f32::max(new_max, plane_shuffle_xor(new_max, 1u32));
                new_max = f32::max(new_max, plane_shuffle_xor(new_max, 2u32));
                let factor = f32::exp((max[own] - new_max) * scale);
                max[own] = new_max;
                let shift = new_max * scale;
                let mut sum = 0.0f32;
                #[unroll]
                for j in 0..comptime!(tile_keys / 8) {
                    let pair = scores.index_mut(comptime!(query_tile * (tile_keys / 8) + j));
                    let mut values = pair[part];
                    values[0] = f32::exp(values[0] * scale - shift);
                    values[1] = f32::exp(values[1] * scale - shift);
                    sum += values[0] + values[1];
                    pair[part] = values;
                }
                total[own] = total[own] * factor + sum;
                #[unroll]
                for i in 0..vectors {
                    let pair = sums.index_mut(comptime!(query_tile * vectors + i));
                    pair[part] = pair[part] * Vector::new(factor);
                }
            }
        }

        #[unroll]
        for j in 0..comptime!(tile_keys / 16) {
            // Two 16x8 tiles of scores become one 16x16 operand.
            let mut weights = Sequence::<Array<Vector<E, NA>>>::new();
            #[unroll]
            for query_tile in 0..query_tiles {
                let mut operand = Array::<Vector<E, NA>>::new(4usize);
                let left = comptime!(query_tile * (tile_keys / 8) + 2 * j);
                let right = comptime!(query_tile * (tile_keys / 8) + 2 * j + 1);
                operand[0] = Vector::cast_from(scores[left][0]);
                operand[1] = Vector::cast_from(scores[left][1]);
                operand[2] = Vector::cast_from(scores[right][0]);
                operand[3] = Vector::cast_from(scores[right][1]);
                weights.push(operand);
            }
            #[unroll]
            for i in 0..comptime!(vectors / 2) {
                let row = tile_row + comptime!(16 * j as u32) + lane % 16;
                let start = shared_index(row, lane / 16 + comptime!(2 * i as u32), pitch);
                let slice = tile_v.slice(start, start + 1);
                let both =
                    def.load_matrix::<Vector<E, N>, NB>(&slice, MatrixIdent::B, 4usize, true);
                let first = halves(&both, false);
                let second = halves(&both, true);
                #[unroll]
                for query_tile in 0..query_tiles {
                    let pair = comptime!(query_tile * vectors + 2 * i);
                    def.execute_inplace(&weights[query_tile], &first, sums.index_mut(pair));
                    def.execute_inplace(
                        &weights[query_tile],
                        &second,
                        sums.index_mut(comptime!(pair + 1)),
                    );
                }
            }
        }
        // All units have read the tile that is overwritten next.
        sync_cube();
    }

    #[unroll]
    for query_tile in 0..query_tiles {
        #[unroll]
        for part in 0..2usize {
            let mut sum = total[comptime!(2 * query_tile + part)];
            sum += plane_shuffle_xor(sum, 1u32);
            sum += plane_shuffle_xor(sum, 2u32);
            let row = own_query + comptime!((16 * query_tile + 8 * part) as u32);
            if row < sizes.queries {
                let width = sizes.heads * comptime!(head as u32);
                let start = (batch * sizes.queries + row) * width + offset + (lane % 4) * 2;
                #[unroll]
                for i in 0..comptime!(head / 8) {
                    let values = sums[comptime!(query_tile * vectors + i)][part] / Vector::new(sum);
                    let mut pair = Vector::<E, Const<2>>::new(E::cast_from(values[0]));
                    pair[1] = E::cast_from(values[1]);
                    out[((start + comptime!(8 * i as u32)) / 2) as usize] = pair;
                }
            }
        }
    }
}

/// Attention without tensor cores: a unit computes a query.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn attention_plain<E: Float, N: Size>(
    query: &Array<Vector<E, N>>,
    key: &Array<Vector<E, N>>,
    value: &Array<Vector<E, N>>,
    out: &mut Array<Vector<E, N>>,
    sizes: &Sizes,
    scale: f32,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: StorageType,
) {
    let n = N::value().comptime();
    let lanes = comptime!(n as u32);
    let vectors = comptime!(plan.head / n);
    let mut keys = SharedMemory::<Vector<f32, N>>::new(comptime!(PLAIN_KEYS * plan.head / n));
    let mut values = SharedMemory::<Vector<f32, N>>::new(comptime!(PLAIN_KEYS * plan.head / n));

    let batch = CUBE_POS_Y / sizes.heads;
    let offset = (CUBE_POS_Y % sizes.heads) * comptime!(plan.head as u32);
    let first_query = CUBE_POS_X * comptime!(PLAIN_QUERIES as u32);
    let row = first_query + UNIT_POS;
    let inside = row < sizes.queries;

    let mut own = Array::<Vector<f32, N>>::new(vectors);
    let mut sums = Array::<Vector<f32, N>>::new(vectors);
    let start = (batch * sizes.queries + select(inside, row, 0u32)) * sizes.query_pitch + offset;
    for i in 0..vectors {
        own[i] = Vector::cast_from(query[(start / lanes) as usize + i]) * Vector::new(scale);
        sums[i] = Vector::new(0.0f32);
    }
    let mut max = LOWEST.runtime();
    let mut total = 0.0f32;

    let mut end = sizes.keys;
    if comptime!(plan.causal) {
        end = u32::min(end, first_query + comptime!(PLAIN_QUERIES as u32));
    }
    let mut first_key = 0u32;
    while first_key < end {
        sync_cube();
        let mut index = UNIT_POS;
        while index < comptime!((PLAIN_KEYS * plan.head / n) as u32) {
            let row = first_key + index / comptime!(vectors as u32);
            let vector = index % comptime!(vectors as u32);
            let row = u32::min(row, sizes.keys - 1);
            let at = batch * sizes.keys + row;
            let k = key[((at * sizes.key_pitch + offset) / lanes + vector) as usize];
            let v = value[((at * sizes.value_pitch + offset) / lanes + vector) as usize];
            keys[index as usize] = Vector::cast_from(k);
            values[index as usize] = Vector::cast_from(v);
            index += comptime!(PLAIN_QUERIES as u32);
        }
        sync_cube();
        let mut count = u32::min(end - first_key, comptime!(PLAIN_KEYS as u32));
        if comptime!(plan.causal) {
            if row < first_key {
                count = 0u32;
            } else {
                count = u32::min(count, row - first_key + 1);
            }
        }
        for j in 0..count {
            let mut products = Vector::<f32, N>::new(0.0f32);
            for i in 0..vectors {
                products += own[i] * keys[(j as usize) * vectors + i];
            }
            let mut score = 0.0f32;
            #[unroll]
            for lane in 0..n {
                score += products[lane];
            }
            let new_max = f32::max(max, score);
            let factor = f32::exp(max - new_max);
            let weight = f32::exp(score - new_max);
            max = new_max;
            total = total * factor + weight;
            for i in 0..vectors {
                sums[i] = sums[i] * Vector::new(factor)
                    + values[(j as usize) * vectors + i] * Vector::new(weight);
            }
        }
        first_key += comptime!(PLAIN_KEYS as u32);
    }
    if inside {
        let width = sizes.heads * comptime!(plan.head as u32);
        let start = (batch * sizes.queries + row) * width + offset;
        for i in 0..vectors {
            out[(start / lanes) as usize + i] = Vector::cast_from(sums[i] / Vector::new(total));
        }
    }
}

/// Multi-head attention of `[batch, tokens, heads · head]`; `None` for unsupported head sizes.
pub fn attention<R: CubeRuntime>(
    query: CubeTensor<R>,
    key: CubeTensor<R>,
    value: CubeTensor<R>,
    heads: usize,
    causal: bool,
) -> Option<CubeTensor<R>> {
    let shape = query.meta.shape().clone();
    let [batch, queries, width] = [shape[0], shape[1], shape[2]];
    let keys = key.meta.shape()[1];
    let head = width / heads;
    if batch * queries * keys * width == 0 {
        return None;
    }
    if head > MAX_HEAD {
        return (heads == 1 && batch == 1 && !causal).then(|| with_scores(query, key, value))?;
    }
    let (query, key, value) = (Rows::new(query), Rows::new(key), Rows::new(value));
    let out = empty(&query.tensor, shape);
    let client = &query.tensor.client;
    let dtype = query.tensor.dtype;
    let n = max_vector_size(client, dtype.size());
    let whole = |n: usize| {
        [head, query.pitch, key.pitch, value.pitch]
            .iter()
            .all(|size| size.is_multiple_of(n))
    };
    let tensor_cores = n == 8 && whole(8) && has_tensor_cores(client, dtype);
    let n = match tensor_cores {
        true => 8,
        false => [4, 2, 1]
            .into_iter()
            .find(|lanes| *lanes <= n && whole(*lanes))?,
    };
    let sizes = SizesLaunch::new(
        heads as u32,
        queries as u32,
        keys as u32,
        query.pitch as u32,
        key.pitch as u32,
        value.pitch as u32,
    );
    let scale = (head as f64).sqrt().recip() as f32;
    // Two query tiles read the keys once, if there are enough cubes and registers.
    let query_tiles = if queries >= 1024 && head <= 80 { 2 } else { 1 };
    let planes = 4;
    let plan = Plan {
        head,
        planes,
        query_tiles,
        keys: 64,
        causal,
    };
    #[cfg(feature = "tuning")]
    let plan = match *super::tiles::FORCED_ATTENTION
        .lock()
        .expect("a lock that is not poisoned")
    {
        Some([planes, query_tiles, keys]) => Plan {
            planes,
            query_tiles,
            keys,
            ..plan
        },
        None => plan,
    };
    let cubes = |queries_per_cube: usize| {
        CubeCount::Static(
            queries.div_ceil(queries_per_cube) as u32,
            (batch * heads) as u32,
            1,
        )
    };
    // SAFETY: the kernels check every index against the sizes, which are those of the tensors.
    unsafe {
        if tensor_cores {
            attention_mma::launch_unchecked::<R>(
                client,
                cubes(plan.planes * plan.query_tiles * 16),
                CubeDim::new_1d((plan.planes * PLANE) as u32),
                n,
                array(&query.tensor),
                array(&key.tensor),
                array(&value.tensor),
                array(&out),
                sizes,
                scale,
                plan,
                dtype.into(),
            );
        } else {
            attention_plain::launch_unchecked::<R>(
                client,
                cubes(PLAIN_QUERIES),
                CubeDim::new_1d(PLAIN_QUERIES as u32),
                n,
                array(&query.tensor),
                array(&key.tensor),
                array(&value.tensor),
                array(&out),
                sizes,
                scale,
                plan,
                dtype.into(),
            );
        }
    }
    Some(out)
}

/// Attention of one large head of one image, with its scores in memory.
fn with_scores<R: CubeRuntime>(
    query: CubeTensor<R>,
    key: CubeTensor<R>,
    value: CubeTensor<R>,
) -> Option<CubeTensor<R>> {
    let [queries, head] = [1, 2].map(|dim| query.meta.shape()[dim]);
    let keys = key.meta.shape()[1];
    let (query, key) = (into_contiguous(query), into_contiguous(key));
    let strides: Vec<usize> = value.meta.strides().iter().copied().collect();
    let columns = with_layout(
        value,
        &[1, head, keys],
        &[strides[0], strides[2], strides[1]],
    );
    let columns = into_contiguous(columns);
    let scale = (head as f64).sqrt().recip() as f32;
    let matrix = |x, rows, columns| with_layout(x, &[rows, columns], &[columns, 1]);
    let weights = softmax(
        &products(&matrix(query, queries, head), &matrix(key, keys, head))?,
        scale,
        columns.dtype,
    );
    let out = linear(
        weights,
        matrix(columns, head, keys),
        Addends::default(),
        false,
    )?;
    Some(with_layout(
        out,
        &[1, queries, head],
        &[queries * head, head, 1],
    ))
}
