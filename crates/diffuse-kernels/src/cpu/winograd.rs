//! 3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3): "Fast Algorithms for Convolutional
//! Neural Networks" (Lavin & Gray 2015, <https://arxiv.org/abs/1509.09308>, section 4.3).
//!
//! A tile of 4x4 outputs is computed from a tile of 6x6 inputs; input tiles overlap. With the
//! transformed filters `U = G g Gᵀ` and input tiles `V = Bᵀ d B`, 36 elements each, the outputs are
//! `Y = Aᵀ M A`, where `M` is the element-wise product of `U` and `V`, summed over input channels.
//! Over all tiles and channels these are 36 matrix products, with 4 times fewer multiplications
//! than a direct convolution.
//!
//! For large images filters are transformed once, and the columns of the products are tiles
//! ([`by_tiles`]). For small images inputs are transformed once, and the columns are output
//! channels ([`by_outputs`]), so that a few tiles fill the register blocks.

use std::ops::Range;

use rayon::prelude::*;

use super::conv::{Images, Outputs};
use super::matrix::{Matrix, TASKS_PER_THREAD, split_columns};
use super::memory::{PooledBuffer, prefetch};
use super::micro_kernel::{
    MR, NR, PanelColumn, PanelRow, RegisterBlock, Start, micro_kernel, transpose,
};
use super::parts::{Part, vectorized_part};
use super::transform::{FilterTransform, InputTransform, OutputTransform, transform};
use super::weights::WeightSlice;

/// Height and width of a tile of outputs.
const OUTPUT_TILE: usize = 4;
/// Height and width of a tile of inputs.
const INPUT_TILE: usize = 6;
/// Elements of a transformed tile, each of which is a matrix product.
const PRODUCTS: usize = INPUT_TILE * INPUT_TILE;
/// Tiles or output channels that are transformed at once: the columns of a register block.
const LANES: usize = NR;
/// Values of transformed inputs in memory at once: 32 MB.
const MAX_INPUTS: usize = 1 << 23;
/// Values of transformed filters up to which all are in memory at once: 64 MB.
const MAX_FILTERS: usize = 1 << 24;
/// Input channels that are multiplied at once: 16 KB of a panel of `B`, which stay in the
/// first-level cache, and 600 KB of transformed filters for [`LANES`] output channels.
const CHANNEL_BLOCK: usize = 128;
/// Tiles of a task, or half as many if that makes fewer than two tasks a thread.
const TILES_PER_TASK: usize = 64;
/// Number of tiles whose products with [`LANES`] output channels take as long as transforming the
/// filters.
const FILTER_COST: usize = 10;
/// Output channels whose products are in memory at once in [`by_tiles`].
const OUTPUT_BLOCK: usize = 2 * MR;
/// Input channels that a task transforms, at least.
const MIN_CHANNELS_PER_TASK: usize = 32;
/// Input channels whose filters are packed at once.
const FILTER_BLOCK: usize = 64;
/// How many channels ahead the rows are fetched that transformed inputs are written to.
const CHANNELS_AHEAD: usize = 4;
/// Padding, so that the 36 matrices do not map to the same cache sets.
const PADDING: usize = 2;

/// A tile of outputs in each lane.
type OutputTiles = [[PanelRow; OUTPUT_TILE]; OUTPUT_TILE];
/// The rows of pixels that a row of tiles covers, of each output channel.
type TileRow<'a> = Vec<&'a mut [f32]>;

/// The rows of tiles of all images.
fn tile_rows<'a>(x: &Images<'_>, outputs: usize, values: &'a mut [f32]) -> Vec<TileRow<'a>> {
    let images = values.chunks_mut(outputs * x.area());
    let rows = images.flat_map(|out| {
        let channels = out.chunks_mut(x.area());
        split_columns(channels, OUTPUT_TILE * x.width)
    });
    rows.collect()
}

/// The position of a tile of outputs.
#[derive(Clone, Copy)]
struct Tile {
    /// Index among the rows of tiles that are processed together.
    tile_row: usize,
    image: usize,
    top: usize,
    left: usize,
}

impl Tile {
    /// The tiles of some rows.
    fn in_rows(x: &Images<'_>, rows: Range<usize>) -> Vec<Self> {
        let rows_per_image = x.height.div_ceil(OUTPUT_TILE);
        let mut tiles = Vec::new();
        for (index, row) in rows.enumerate() {
            tiles.extend((0..x.width).step_by(OUTPUT_TILE).map(|left| Self {
                tile_row: index,
                image: row / rows_per_image,
                top: row % rows_per_image * OUTPUT_TILE,
                left,
            }));
        }
        tiles
    }

    /// Whether the next tile is in the same row.
    fn is_left_of(&self, next: &Self) -> bool {
        self.left < next.left && self.tile_row == next.tile_row
    }
}

/// Reads the inputs of neighbouring tiles in one channel into the lanes from `lane` on, with zero
/// padding.
#[inline(always)]
fn gather(
    x: &Images<'_>,
    channel: usize,
    tiles: &[Tile],
    lane: usize,
    inputs: &mut [[PanelRow; INPUT_TILE]; INPUT_TILE],
) {
    /// Tiles that are read at once.
    const AT_ONCE: usize = MR;
    /// Pixels of a row that are read for them: as many as a tile of [`MR`] columns would have.
    const WINDOW: usize = OUTPUT_TILE * (AT_ONCE - 1) + MR;
    let (tile, count) = (tiles[0], tiles.len());
    let from = x.channel(tile.image, channel);
    for (dy, inputs) in inputs.iter_mut().enumerate() {
        let row = (tile.top + dy).checked_sub(1);
        let Some(row) = row.filter(|row| *row < x.height) else {
            for lanes in inputs {
                lanes[lane..lane + count].fill(0.0);
            }
            continue;
        };
        let row = &from[row * x.width..][..x.width];
        for index in (0..count).step_by(AT_ONCE) {
            // The first pixel is the one before.
            let start = tile.left + OUTPUT_TILE * index;
            let inside = start.checked_sub(1).and_then(|start| row.get(start..));
            let mut padded = [0.0; WINDOW];
            let window = match inside.and_then(<[f32]>::first_chunk) {
                Some(window) => window,
                None => {
                    let padding = usize::from(start == 0);
                    let row = &row[start.saturating_sub(1)..];
                    let length = row.len().min(WINDOW - padding);
                    padded[padding..padding + length].copy_from_slice(&row[..length]);
                    &padded
                }
            };
            let rows = std::array::from_fn(|tile| {
                let row = window[OUTPUT_TILE * tile..].first_chunk();
                *row.expect("a window has the rows of all tiles")
            });
            let count = AT_ONCE.min(count - index);
            for (lanes, column) in inputs.iter_mut().zip(transpose(rows)) {
                let lanes = &mut lanes[lane + index..][..count];
                match lanes.first_chunk_mut() {
                    Some(lanes) => *lanes = column,
                    None => lanes.copy_from_slice(&column[..count]),
                }
            }
        }
    }
}

/// Has the CPU fetch what [`gather`] reads.
#[inline(always)]
fn prefetch_inputs(x: &Images<'_>, channel: usize, tiles: &[Tile]) {
    let tile = tiles[0];
    let columns = tile.left..x.width.min(tile.left + OUTPUT_TILE * tiles.len());
    let rows = tile.top.saturating_sub(1)..x.height.min(tile.top + OUTPUT_TILE + 1);
    let from = x.channel(tile.image, channel);
    for row in rows {
        prefetch(&from[row * x.width..][columns.clone()]);
    }
}

/// Writes the outputs of neighbouring tiles, in the lanes from `lane` on, to their rows of one
/// output channel; with `ACCUMULATE`, adds them.
#[inline(always)]
fn scatter<const ACCUMULATE: bool>(
    outputs: &OutputTiles,
    tiles: &[Tile],
    lane: usize,
    bias: f32,
    width: usize,
    values: &mut [f32],
) {
    let (left, count) = (tiles[0].left, tiles.len());
    let length = (OUTPUT_TILE * count).min(width - left);
    for (outputs, row) in outputs.iter().zip(values.chunks_mut(width)) {
        let (quads, rest) = row[left..left + length].as_chunks_mut::<OUTPUT_TILE>();
        let [a, b, c, d] = outputs.each_ref().map(|row| &row[lane..lane + count]);
        for (((quad, a), b), (c, d)) in quads.iter_mut().zip(a).zip(b).zip(c.iter().zip(d)) {
            let [x, y, z, w] = *quad;
            *quad = [
                result::<ACCUMULATE>(x, a + bias),
                result::<ACCUMULATE>(y, b + bias),
                result::<ACCUMULATE>(z, c + bias),
                result::<ACCUMULATE>(w, d + bias),
            ];
        }
        for (value, row) in rest.iter_mut().zip(outputs) {
            *value = result::<ACCUMULATE>(*value, row[lane + count - 1] + bias);
        }
    }
}

/// Writes one tile, with an output channel in each lane, to its rows of these channels; with
/// `ACCUMULATE`, adds it.
#[inline(always)]
fn scatter_channels<const ACCUMULATE: bool>(
    outputs: &OutputTiles,
    left: usize,
    bias: &[f32],
    width: usize,
    tile_row: &mut [&mut [f32]],
) {
    let mut transposed = [[[0.0; OUTPUT_TILE]; OUTPUT_TILE]; LANES];
    for (index, lanes) in outputs.as_flattened().iter().enumerate() {
        for (tile, value) in transposed.iter_mut().zip(lanes) {
            tile.as_flattened_mut()[index] = *value;
        }
    }
    for ((values, tile), bias) in tile_row.iter_mut().zip(&transposed).zip(bias) {
        for (row, outputs) in values.chunks_mut(width).zip(tile) {
            let row = &mut row[left..];
            if let Some(row) = row.first_chunk_mut::<OUTPUT_TILE>() {
                *row = std::array::from_fn(|x| result::<ACCUMULATE>(row[x], outputs[x] + bias));
                continue;
            }
            for (value, output) in row.iter_mut().zip(outputs) {
                *value = result::<ACCUMULATE>(*value, output + bias);
            }
        }
    }
}

#[inline(always)]
fn result<const ACCUMULATE: bool>(value: f32, output: f32) -> f32 {
    if ACCUMULATE { value + output } else { output }
}

/// `out = conv(x, weight) + bias`, or `out += ..`, with a padding of 1: `weight` is `[outputs,
/// channels, 3, 3]`.
pub fn winograd(x: Images<'_>, weight: WeightSlice<'_>, bias: &[f32], out: Outputs<'_>) {
    let weight = Matrix::new(weight, x.channels * 9);
    let (tiles, threads) = (tile_count(&x), rayon::current_num_threads());
    // What a thread reads for each channel: the filters of all outputs for each of its tasks in
    // `by_tiles`, the inputs of all tiles in `by_outputs`.
    let filter_reads = tiles.div_ceil(tiles_per_task(tiles) * threads) * bias.len();
    let input_reads = bias.len().div_ceil(LANES * threads) * tiles;
    let fits = PRODUCTS * x.channels * bias.len() <= MAX_FILTERS;
    if fits && tiles >= threads * TILES_PER_TASK / 2 && filter_reads < input_reads {
        by_tiles(x, weight, bias, out);
    } else {
        by_outputs(x, weight, bias, out);
    }
}

/// Tiles of all images.
fn tile_count(x: &Images<'_>) -> usize {
    x.batch * x.height.div_ceil(OUTPUT_TILE) * x.width.div_ceil(OUTPUT_TILE)
}

/// Tiles of a task of [`by_tiles`].
fn tiles_per_task(tiles: usize) -> usize {
    if tiles >= 2 * TILES_PER_TASK * rayon::current_num_threads() {
        TILES_PER_TASK
    } else {
        TILES_PER_TASK / 2
    }
}

/// Transforms all filters, then computes a few tiles at a time from input to output, which keeps
/// memory traffic low for large images. The columns of the products are tiles.
pub fn by_tiles(x: Images<'_>, weight: Matrix<'_>, bias: &[f32], out: Outputs<'_>) {
    let (channels, outputs) = (x.channels, bias.len());
    let stride = channels + PADDING;
    let mut filters = PooledBuffer::new(outputs.div_ceil(MR) * PRODUCTS * stride * MR);
    let (filters, _) = filters.as_chunks_mut::<MR>();
    transform_all_filters(weight, channels, filters);
    let rows_per_task = (tiles_per_task(tile_count(&x)) / x.width.div_ceil(OUTPUT_TILE)).max(1);
    let mut tile_rows = tile_rows(&x, outputs, out.values);
    let tasks = tile_rows.par_chunks_mut(rows_per_task).enumerate();
    tasks.for_each_init(
        || [PooledBuffer::default(), PooledBuffer::default()],
        |[inputs, products], (task, tile_rows)| {
            let first_row = task * rows_per_task;
            let tiles = Tile::in_rows(&x, first_row..first_row + tile_rows.len());
            let b_panels = tiles.len().div_ceil(LANES);
            let inputs = inputs.resize(b_panels * PRODUCTS * stride * LANES);
            let (inputs, _) = inputs.as_chunks_mut();
            let panels = inputs.chunks_mut(PRODUCTS * stride);
            for (panels, tiles) in panels.zip(tiles.chunks(LANES)) {
                transform_inputs(
                    &x,
                    tiles,
                    0..channels,
                    #[inline(always)]
                    |channel, product, lane, values| {
                        let rows = &mut panels[product * stride + channel..];
                        if let Some(ahead) = rows.get(CHANNELS_AHEAD) {
                            prefetch(&ahead[lane..lane + values.len()]);
                        }
                        copy_lanes(&mut rows[0], lane, values);
                    },
                );
            }
            let b = Panels {
                values: &*inputs,
                depth: channels,
                count: b_panels,
                stride: PRODUCTS * stride,
                product_stride: stride,
            };
            let filters = filters.chunks(OUTPUT_BLOCK / MR * PRODUCTS * stride);
            for (index, (bias, filters)) in bias.chunks(OUTPUT_BLOCK).zip(filters).enumerate() {
                let a_panels = bias.len().div_ceil(MR);
                let a = Panels {
                    values: filters,
                    depth: channels,
                    count: a_panels,
                    stride: PRODUCTS * stride,
                    product_stride: stride,
                };
                let products = products.resize(PRODUCTS * b_panels * a_panels * MR * LANES);
                let (products, _) = products.as_chunks_mut();
                let (products, _) = products.as_chunks_mut();
                multiply(a, b, false, products);
                let first = index * OUTPUT_BLOCK;
                let finish = if out.accumulate {
                    finish_by_tiles::<true>
                } else {
                    finish_by_tiles::<false>
                };
                finish(products, &tiles, bias, x.width, first, tile_rows);
            }
        },
    );
}

/// Transforms all filters into panels of `A`: `[outputs / MR, 36, channels + PADDING]`.
fn transform_all_filters(weight: Matrix<'_>, channels: usize, filters: &mut [PanelColumn]) {
    let stride = channels + PADDING;
    let size = LANES / MR * PRODUCTS * stride;
    let at_once = channels_per_task(filters.len().div_ceil(size), channels);
    let tasks = filters.par_chunks_mut(size).enumerate();
    let tasks = tasks.flat_map(|(index, filters)| {
        let parts = split_columns(filters.chunks_mut(stride), at_once).into_par_iter();
        parts
            .enumerate()
            .map(move |(part, panels)| (index * LANES, part * at_once, panels))
    });
    tasks.for_each(|(output, first, mut panels)| {
        // Zero where only padding is left.
        let count = at_once.min(channels.saturating_sub(first));
        transform_filters(
            weight.slice_columns(first.min(channels) * 9, count * 9),
            output,
            count,
            #[inline(always)]
            |channel, product, lane, values| {
                copy_to_panels(&mut panels[product..], PRODUCTS, channel, lane, values);
            },
        );
    });
}

/// Channels that a task transforms: fewer than all if there are few tasks otherwise.
fn channels_per_task(tasks: usize, channels: usize) -> usize {
    let parts = (TASKS_PER_THREAD * rayon::current_num_threads()).div_ceil(tasks);
    channels
        .div_ceil(parts)
        .next_multiple_of(MIN_CHANNELS_PER_TASK)
        .min(channels)
}

/// Transforms products, whose columns are tiles, to some output channels from `first` on.
fn finish_by_tiles<const ACCUMULATE: bool>(
    products: &[RegisterBlock],
    tiles: &[Tile],
    bias: &[f32],
    width: usize,
    first: usize,
    tile_rows: &mut [TileRow<'_>],
) {
    let a_panels = bias.len().div_ceil(MR);
    let blocks = tiles.len().div_ceil(LANES) * a_panels;
    vectorized_part(
        Part::Epilogue,
        #[inline(always)]
        || {
            for (panel, tiles) in tiles.chunks(LANES).enumerate() {
                for (output, bias) in bias.iter().enumerate() {
                    let block = panel * a_panels + output / MR;
                    let outputs = transform_products(
                        #[inline(always)]
                        |product| &products[block + product * blocks][output % MR],
                    );
                    let mut lane = 0;
                    for tiles in tiles.chunk_by(Tile::is_left_of) {
                        let values = &mut *tile_rows[tiles[0].tile_row][first + output];
                        scatter::<ACCUMULATE>(&outputs, tiles, lane, *bias, width, values);
                        lane += tiles.len();
                    }
                }
            }
        },
    );
}

/// Transforms the inputs of many tiles, then computes some output channels of some tiles at a time,
/// whose filters stay in a core's own cache. The columns of the products are output channels.
pub fn by_outputs(x: Images<'_>, weight: Matrix<'_>, bias: &[f32], out: Outputs<'_>) {
    let (channels, outputs) = (x.channels, bias.len());
    let threads = rayon::current_num_threads();
    let mut tile_rows = tile_rows(&x, outputs, out.values);
    let tiles_per_row = x.width.div_ceil(OUTPUT_TILE);
    let at_once = (MAX_INPUTS / (PRODUCTS * channels * tiles_per_row)).clamp(1, tile_rows.len());
    // Rows of tiles of a part. Each part transforms the filters again, but fewer parts may leave
    // threads without work.
    let rows_per_part = (1..=at_once).rev().min_by_key(|rows| {
        let tasks = outputs.div_ceil(LANES) * at_once.div_ceil(*rows);
        let tiles = (rows * tiles_per_row).next_multiple_of(MR);
        tasks.div_ceil(threads) * (tiles + FILTER_COST)
    });
    let rows_per_part = rows_per_part.unwrap_or(at_once);
    let mut inputs = PooledBuffer::default();
    for (index, tile_rows) in tile_rows.chunks_mut(at_once).enumerate() {
        let parts = tile_rows.chunks_mut(rows_per_part).enumerate();
        let (tiles, parts): (Vec<_>, Vec<_>) = parts
            .map(|(part, tile_rows)| {
                let first = index * at_once + part * rows_per_part;
                (Tile::in_rows(&x, first..first + tile_rows.len()), tile_rows)
            })
            .unzip();
        // The same number of panels for each part.
        let a_panels = tiles[0].len().div_ceil(MR);
        let size = a_panels * PRODUCTS * channels;
        let (inputs, _) = inputs.resize(tiles.len() * size * MR).as_chunks_mut();
        transform_parts(&x, &tiles, a_panels, inputs);
        let mut tasks = Vec::new();
        for (part, tile_rows) in parts.into_iter().enumerate() {
            let panels = split_columns(tile_rows.iter_mut().map(Vec::as_mut_slice), LANES);
            tasks.extend(
                panels
                    .into_iter()
                    .enumerate()
                    .map(|(panel, out)| (part, panel, out)),
            );
        }
        tasks.into_par_iter().for_each_init(
            || [PooledBuffer::default(), PooledBuffer::default()],
            |[filters, products], (part, panel, mut tile_rows)| {
                let inputs = &inputs[part * size..][..size];
                let products = products.resize(PRODUCTS * a_panels * MR * LANES);
                let (products, _) = products.as_chunks_mut();
                let (products, _) = products.as_chunks_mut();
                let stride = CHANNEL_BLOCK + PADDING;
                let (filters, _) = filters.resize(PRODUCTS * stride * LANES).as_chunks_mut();
                for start in (0..channels).step_by(CHANNEL_BLOCK) {
                    let depth = CHANNEL_BLOCK.min(channels - start);
                    transform_filters(
                        weight.slice_columns(start * 9, depth * 9),
                        panel * LANES,
                        depth,
                        #[inline(always)]
                        |channel, product, lane, values| {
                            copy_lanes(&mut filters[product * stride + channel], lane, values);
                        },
                    );
                    let a = Panels {
                        values: &inputs[PRODUCTS * a_panels * start..],
                        depth,
                        count: a_panels,
                        stride: depth,
                        product_stride: a_panels * depth,
                    };
                    let b = Panels {
                        values: &*filters,
                        depth,
                        count: 1,
                        stride: 0,
                        product_stride: stride,
                    };
                    multiply(a, b, start > 0, products);
                }
                let bias = &bias[panel * LANES..];
                let finish = if out.accumulate {
                    finish_by_outputs::<true>
                } else {
                    finish_by_outputs::<false>
                };
                finish(products, &tiles[part], bias, x.width, &mut tile_rows);
            },
        );
    }
}

/// Transforms the inputs of the tiles of some parts into panels of `A`, `a_panels` for each part:
/// `[parts, channels / CHANNEL_BLOCK, 36, a_panels, CHANNEL_BLOCK]`.
fn transform_parts(
    x: &Images<'_>,
    parts: &[Vec<Tile>],
    a_panels: usize,
    inputs: &mut [PanelColumn],
) {
    // A task has some channels of some tiles.
    let groups = parts.iter().map(|tiles| tiles.len().div_ceil(LANES));
    let blocks = groups.sum::<usize>() * x.channels.div_ceil(CHANNEL_BLOCK);
    let at_once = channels_per_task(blocks, CHANNEL_BLOCK);
    let parts = inputs
        .par_chunks_mut(a_panels * PRODUCTS * x.channels)
        .zip(parts);
    let blocks = parts.flat_map(|(inputs, tiles)| {
        let blocks = inputs.par_chunks_mut(a_panels * PRODUCTS * CHANNEL_BLOCK);
        blocks
            .enumerate()
            .map(move |(block, inputs)| (tiles, block * CHANNEL_BLOCK, inputs))
    });
    let tasks = blocks.flat_map(|(tiles, first, inputs)| {
        let panels = inputs.chunks_mut(inputs.len() / (PRODUCTS * a_panels));
        let mut groups: Vec<Vec<_>> = Vec::new();
        groups.resize_with(a_panels.div_ceil(LANES / MR), Vec::new);
        for (index, panel) in panels.enumerate() {
            groups[index % a_panels / (LANES / MR)].push(panel);
        }
        let groups = groups.into_par_iter().zip(tiles.par_chunks(LANES));
        groups.flat_map(move |(panels, tiles)| {
            let parts = split_columns(panels.into_iter(), at_once).into_par_iter();
            parts
                .enumerate()
                .map(move |(part, panels)| (tiles, first + part * at_once, panels))
        })
    });
    tasks.for_each(|(tiles, first, mut panels)| {
        let count = panels.len() / PRODUCTS;
        transform_inputs(
            x,
            tiles,
            first..first + panels[0].len(),
            #[inline(always)]
            |channel, product, lane, values| {
                let panels = &mut panels[product * count..][..count];
                copy_to_panels(panels, 1, channel - first, lane, values);
            },
        );
    });
}

/// Transforms products, whose rows are tiles, to some output channels.
fn finish_by_outputs<const ACCUMULATE: bool>(
    products: &[RegisterBlock],
    tiles: &[Tile],
    bias: &[f32],
    width: usize,
    tile_rows: &mut [&mut [&mut [f32]]],
) {
    let a_panels = products.len() / PRODUCTS;
    vectorized_part(
        Part::Epilogue,
        #[inline(always)]
        || {
            for (index, tile) in tiles.iter().enumerate() {
                let outputs = transform_products(
                    #[inline(always)]
                    |product| &products[index / MR + product * a_panels][index % MR],
                );
                let tile_row = &mut *tile_rows[tile.tile_row];
                scatter_channels::<ACCUMULATE>(&outputs, tile.left, bias, width, tile_row);
            }
        },
    );
}

/// `V = Bᵀ d B` of at most [`LANES`] tiles in some channels. `store` gets a channel, the index of
/// one of the 36 elements, the first of some lanes, and their values.
#[inline(always)]
fn transform_inputs(
    x: &Images<'_>,
    tiles: &[Tile],
    channels: Range<usize>,
    mut store: impl FnMut(usize, usize, usize, &[f32]),
) {
    vectorized_part(
        Part::InputTransform,
        #[inline(always)]
        || {
            let mut inputs = [[[0.0; LANES]; INPUT_TILE]; INPUT_TILE];
            for channel in channels.clone() {
                let mut lane = 0;
                for tiles in tiles.chunk_by(Tile::is_left_of) {
                    if channel + 1 < channels.end {
                        prefetch_inputs(x, channel + 1, tiles);
                    }
                    gather(x, channel, tiles, lane, &mut inputs);
                    lane += tiles.len();
                }
                transform::<InputTransform, INPUT_TILE, INPUT_TILE>(
                    #[inline(always)]
                    |index| &inputs.as_flattened()[index],
                    #[inline(always)]
                    |product, lane, values| store(channel, product, lane, values),
                );
            }
        },
    );
}

/// Panels of `A` or `B` of the 36 products.
#[derive(Clone, Copy)]
struct Panels<'a, T> {
    values: &'a [T],
    depth: usize,
    /// Panels of each product.
    count: usize,
    /// Distance of two panels.
    stride: usize,
    /// Distance of the first panels of two products.
    product_stride: usize,
}

impl<'a, T> Panels<'a, T> {
    fn get(&self, panel: usize, product: usize) -> &'a [T] {
        let first = panel * self.stride + product * self.product_stride;
        &self.values[first..][..self.depth]
    }
}

/// Computes the 36 products, `[36, panels of B, panels of A]`; with `accumulate`, adds to them.
fn multiply(
    a: Panels<'_, PanelColumn>,
    b: Panels<'_, PanelRow>,
    accumulate: bool,
    products: &mut [RegisterBlock],
) {
    vectorized_part(
        Part::Products,
        #[inline(always)]
        || {
            let start = if accumulate {
                Start::Values
            } else {
                Start::Zero
            };
            let products = products.chunks_mut(a.count * b.count);
            for (product, blocks) in products.enumerate() {
                for (b_panel, blocks) in blocks.chunks_mut(a.count).enumerate() {
                    let b = b.get(b_panel, product);
                    for (index, b) in b.chunks(CHANNEL_BLOCK).enumerate() {
                        let first = index * CHANNEL_BLOCK;
                        let start = if first > 0 { Start::Values } else { start };
                        for (a_panel, block) in blocks.iter_mut().enumerate() {
                            let a = &a.get(a_panel, product)[first..][..b.len()];
                            micro_kernel(a, b, start, block);
                        }
                    }
                }
            }
        },
    );
}

/// `Y = Aᵀ M A` in each lane; `product` returns a row of one of the 36 products.
#[inline(always)]
fn transform_products<'a>(product: impl Fn(usize) -> &'a PanelRow) -> OutputTiles {
    let mut outputs = [[[0.0; LANES]; OUTPUT_TILE]; OUTPUT_TILE];
    transform::<OutputTransform, INPUT_TILE, OUTPUT_TILE>(
        product,
        #[inline(always)]
        |index, lane, values| copy_lanes(&mut outputs.as_flattened_mut()[index], lane, values),
    );
    outputs
}

/// `U = G g Gᵀ` of the filters, `[outputs, channels, 3, 3]`, of [`LANES`] output channels from
/// `first` on. `store` gets a channel, the index of one of the 36 elements, the first of some
/// lanes, and their values.
#[inline(always)]
fn transform_filters(
    weight: Matrix<'_>,
    first: usize,
    channels: usize,
    mut store: impl FnMut(usize, usize, usize, &[f32]),
) {
    vectorized_part(
        Part::FilterTransform,
        #[inline(always)]
        || {
            let mut packed = [[[0.0; LANES]; 9]; FILTER_BLOCK];
            for start in (0..channels).step_by(FILTER_BLOCK) {
                let count = (channels - start).min(FILTER_BLOCK);
                let filters = weight.slice_columns(start * 9, count * 9);
                let packed_filters = &mut packed.as_flattened_mut()[..count * 9];
                filters.pack_panel(first, packed_filters, filters.index(first, count * 9));
                for (channel, filter) in (start..start + count).zip(&packed) {
                    transform::<FilterTransform, 3, INPUT_TILE>(
                        #[inline(always)]
                        |index| &filter[index],
                        #[inline(always)]
                        |product, lane, values| store(channel, product, lane, values),
                    );
                }
            }
        },
    );
}

/// Copies some lanes, from `lane` on, to a row of a panel of `B`.
#[inline(always)]
fn copy_lanes(row: &mut PanelRow, lane: usize, values: &[f32]) {
    row[lane..lane + values.len()].copy_from_slice(values);
}

/// Copies some lanes, from `lane` on, to the columns of a channel in panels of `A`, which are
/// `stride` apart. Lanes beyond the last panel are dropped.
#[inline(always)]
fn copy_to_panels(
    panels: &mut [&mut [PanelColumn]],
    stride: usize,
    channel: usize,
    lane: usize,
    values: &[f32],
) {
    for (index, values) in values.chunks(MR).enumerate() {
        if let Some(panel) = panels.get_mut((lane / MR + index) * stride) {
            let row = lane % MR;
            panel[channel][row..row + values.len()].copy_from_slice(values);
        }
    }
}
