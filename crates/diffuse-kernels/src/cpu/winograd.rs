//! 3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3): "Fast Algorithms for Convolutional
//! Neural Networks" (Lavin & Gray 2015, <https://arxiv.org/abs/1509.09308>, section 4.3).
//!
//! Squares of 4x4 outputs come from squares of 6x6 inputs, which overlap. Transformed, `V = Bᵀ d
//! B`, a square is 36 values, each multiplied by one of 36 matrices of transformed filters, `U = G
//! g Gᵀ`; back, `Y = Aᵀ M A`. That is 4 times fewer multiplications, as 36 matrix products over all
//! squares and channels.
//!
//! Of large images, filters are transformed once, and the columns of products are squares
//! ([`by_squares`]); of small ones, inputs are transformed once, and the columns are outputs
//! ([`by_outputs`]), so that even few squares fill the tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::conv::{Images, Outputs};
use super::kernel::{COLUMNS, Column, Line, ROWS, tile};
use super::matrix::{Rows, TASKS, in_parts};
use super::memory::PooledBuffer;
use super::transform::{OfFilter, OfInputs, OfProducts, transform};
use super::vectorized;
use super::weights::Weights;

/// Side of the output of a square, and of its input.
const OUT: usize = 4;
const IN: usize = 6;
/// Products a square.
const PRODUCTS: usize = IN * IN;
/// Squares or outputs that are transformed at once: the columns of a tile.
const LANES: usize = COLUMNS;
/// Transformed values of inputs that are held at once, where that is not all: 32 MB.
const INPUTS: usize = 1 << 23;
/// Transformed values of filters that are held at once, if it is all of them: 64 MB.
const FILTERS: usize = 1 << 24;
/// Channels whose filters a thread holds, where they are not held at once, for the outputs of a
/// tile: 600 KB.
const CHANNELS: usize = 128;
/// Squares of a task, if there are twice as many for each thread, and else half of them.
const SQUARES: usize = 64;
/// Squares whose products take about as long as transforming the filters of as many outputs.
const FILTERS_TAKE: usize = 10;
/// Outputs whose products are held at once, where the filters of all are.
const SOME: usize = 2 * ROWS;
/// Channels that a task transforms, at least.
const FEWEST: usize = 32;
/// Channels whose filters are packed at once.
const BLOCK: usize = 64;
/// Padding, so that the 36 matrices do not map to the same cache sets.
const PAD: usize = 2;

/// Tiles of products.
type Sums = [Line; ROWS];
/// What comes of 36 products, lane by lane.
type Square = [[Line; OUT]; OUT];
/// A row of squares of an image: the values of each output.
type Strip<'a> = Vec<&'a mut [f32]>;

/// The strips of all images.
fn strips<'a>(x: &Images<'_>, outputs: usize, values: &'a mut [f32]) -> Vec<Strip<'a>> {
    let images = values.chunks_mut(outputs * x.area());
    let strips = images.flat_map(|out| in_parts(out.chunks_mut(x.area()), OUT * x.width));
    strips.collect()
}

/// Where a square of outputs is.
#[derive(Clone, Copy)]
struct Place {
    /// Of some.
    strip: usize,
    image: usize,
    top: usize,
    left: usize,
}

impl Place {
    /// The squares of some strips.
    fn all(x: &Images<'_>, strips: Range<usize>) -> Vec<Self> {
        let of_image = x.height.div_ceil(OUT);
        let mut places = Vec::new();
        for (index, strip) in strips.enumerate() {
            places.extend((0..x.width).step_by(OUT).map(|left| Self {
                strip: index,
                image: strip / of_image,
                top: strip % of_image * OUT,
                left,
            }));
        }
        places
    }

    /// Whether another square is the next to the right.
    fn is_before(&self, other: &Self) -> bool {
        self.left < other.left && self.strip == other.strip
    }
}

/// The inputs of neighbouring squares in one channel, with zeros outside of the image, into the
/// lanes from `lane` on.
#[inline(always)]
fn gather(
    x: &Images<'_>,
    channel: usize,
    places: &[Place],
    lane: usize,
    squares: &mut [[Line; IN]; IN],
) {
    /// Squares at once: what is the same for all of them is then known to the compiler.
    const SOME: usize = 4;
    let (place, count) = (places[0], places.len());
    let from = x.channel(place.image, channel);
    for (dy, inputs) in squares.iter_mut().enumerate() {
        let row = (place.top + dy).checked_sub(1);
        let Some(row) = row.filter(|row| *row < x.height) else {
            for lanes in inputs {
                lanes[lane..lane + count].fill(0.0);
            }
            continue;
        };
        let row = &from[row * x.width..][..x.width];
        let mut square = 0;
        while square < count {
            let start = place.left + OUT * square;
            let first = lane + square;
            let values = start.checked_sub(1).and_then(|start| row.get(start..));
            let values = values.and_then(|values| values.first_chunk::<{ OUT * SOME + 2 }>());
            if let Some(values) = values.filter(|_| square + SOME <= count) {
                for (dx, lanes) in inputs.iter_mut().enumerate() {
                    let lanes = lanes[first..].first_chunk_mut::<SOME>();
                    let some = std::array::from_fn(|square| values[OUT * square + dx]);
                    *lanes.expect("a lane for each square") = some;
                }
                square += SOME;
                continue;
            }
            for (dx, lanes) in inputs.iter_mut().enumerate() {
                let value = (start + dx).checked_sub(1).and_then(|x| row.get(x));
                lanes[first] = value.copied().unwrap_or(0.0);
            }
            square += 1;
        }
    }
}

/// The outputs of neighbouring squares, from the lanes from `lane` on, into the rows of one output
/// of their strip: with `ACCUMULATE`, they are added to the values there.
#[inline(always)]
fn scatter<const ACCUMULATE: bool>(
    squares: &Square,
    places: &[Place],
    lane: usize,
    bias: f32,
    width: usize,
    values: &mut [f32],
) {
    let (left, count) = (places[0].left, places.len());
    let length = (OUT * count).min(width - left);
    for (outputs, row) in squares.iter().zip(values.chunks_mut(width)) {
        let (quads, rest) = row[left..left + length].as_chunks_mut::<OUT>();
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

/// What a lane for each output has of one square, into their strip: with `ACCUMULATE`, it is added
/// to the values there.
#[inline(always)]
fn scatter_outputs<const ACCUMULATE: bool>(
    square: &Square,
    left: usize,
    bias: &[f32],
    width: usize,
    strip: &mut [&mut [f32]],
) {
    let mut turned = [[[0.0; OUT]; OUT]; LANES];
    for (index, lanes) in square.as_flattened().iter().enumerate() {
        for (turned, value) in turned.iter_mut().zip(lanes) {
            turned.as_flattened_mut()[index] = *value;
        }
    }
    for ((values, square), bias) in strip.iter_mut().zip(&turned).zip(bias) {
        for (row, outputs) in values.chunks_mut(width).zip(square) {
            let row = &mut row[left..];
            if let Some(row) = row.first_chunk_mut::<OUT>() {
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

/// `out = x * weight + bias`, or `out += ..`, with a padding of 1: `weight` is `[outputs, channels,
/// 3, 3]`.
pub fn winograd(x: Images<'_>, weight: Weights<'_>, bias: &[f32], out: Outputs<'_>) {
    let weight = Rows::new(weight, x.channels * 9);
    let (squares, threads) = (squares(&x), rayon::current_num_threads());
    // What a thread reads of the filters of all outputs, and else of the inputs of all squares, in
    // channels.
    let of_filters = squares.div_ceil(squares_a_task(squares) * threads) * bias.len();
    let of_inputs = bias.len().div_ceil(LANES * threads) * squares;
    let fits = PRODUCTS * x.channels * bias.len() <= FILTERS;
    if fits && squares >= threads * SQUARES / 2 && of_filters <= of_inputs {
        by_squares(x, weight, bias, out);
    } else {
        by_outputs(x, weight, bias, out);
    }
}

/// Squares of all images.
fn squares(x: &Images<'_>) -> usize {
    x.batch * x.height.div_ceil(OUT) * x.width.div_ceil(OUT)
}

/// Squares of a task of [`by_squares`].
fn squares_a_task(squares: usize) -> usize {
    if squares >= 2 * SQUARES * rayon::current_num_threads() {
        SQUARES
    } else {
        SQUARES / 2
    }
}

/// Transforms all filters, and then does everything else for a few squares at a time: of large
/// images, little goes through memory so. Squares are the columns of products.
pub fn by_squares(x: Images<'_>, weight: Rows<'_>, bias: &[f32], out: Outputs<'_>) {
    let (channels, outputs) = (x.channels, bias.len());
    let stride = channels + PAD;
    let mut filters = PooledBuffer::new(outputs.div_ceil(ROWS) * PRODUCTS * stride * ROWS);
    let (filters, _) = filters.as_chunks_mut::<ROWS>();
    transform_all_filters(weight, channels, filters);
    // Some strips a task.
    let a_task = (squares_a_task(squares(&x)) / x.width.div_ceil(OUT)).max(1);
    let mut strips = strips(&x, outputs, out.values);
    let tasks = strips.par_chunks_mut(a_task).enumerate();
    tasks.for_each_init(
        || [PooledBuffer::default(), PooledBuffer::default()],
        |[inputs, products], (task, strips)| {
            let places = Place::all(&x, task * a_task..task * a_task + strips.len());
            let panels = places.len().div_ceil(LANES);
            let inputs = inputs.resize(panels * PRODUCTS * stride * LANES);
            let (inputs, _) = inputs.as_chunks_mut();
            let of_panels = inputs.chunks_mut(PRODUCTS * stride);
            for (inputs, places) in of_panels.zip(places.chunks(LANES)) {
                transform_inputs(
                    &x,
                    places,
                    0..channels,
                    #[inline(always)]
                    |channel, product, lane, values| {
                        copy_lanes(&mut inputs[product * stride + channel], lane, values);
                    },
                );
            }
            let columns = Terms {
                values: &*inputs,
                count: channels,
                tiles: panels,
                stride: PRODUCTS * stride,
                product_stride: stride,
            };
            let filters = filters.chunks(SOME / ROWS * PRODUCTS * stride);
            for (index, (bias, filters)) in bias.chunks(SOME).zip(filters).enumerate() {
                let tiles = bias.len().div_ceil(ROWS);
                let rows = Terms {
                    values: filters,
                    count: channels,
                    tiles,
                    stride: PRODUCTS * stride,
                    product_stride: stride,
                };
                let products = products.resize(PRODUCTS * panels * tiles * ROWS * LANES);
                let (products, _) = products.as_chunks_mut();
                let (products, _) = products.as_chunks_mut();
                multiply(rows, columns, false, products);
                let first = index * SOME;
                let finish = if out.accumulate {
                    finish_squares::<true>
                } else {
                    finish_squares::<false>
                };
                finish(products, &places, bias, x.width, first, strips);
            }
        },
    );
}

/// Transforms the filters of all outputs: `[tiles of outputs, 36, channels + PAD]`.
fn transform_all_filters(weight: Rows<'_>, channels: usize, filters: &mut [Column]) {
    let stride = channels + PAD;
    let size = LANES / ROWS * PRODUCTS * stride;
    let at_once = channels_a_task(filters.len().div_ceil(size), channels);
    let tasks = filters.par_chunks_mut(size).enumerate();
    let tasks = tasks.flat_map(|(panel, filters)| {
        let parts = in_parts(filters.chunks_mut(stride), at_once).into_par_iter();
        parts
            .enumerate()
            .map(move |(part, to)| (panel * LANES, part * at_once, to))
    });
    tasks.for_each(|(output, first, mut to)| {
        // None where only what pads them is left.
        let some = at_once.min(channels.saturating_sub(first));
        transform_filters(
            weight.part(first.min(channels) * 9, some * 9),
            output,
            some,
            #[inline(always)]
            |channel, product, lane, values| {
                copy_columns(&mut to[product..], PRODUCTS, channel, lane, values);
            },
        );
    });
}

/// Channels that a task transforms: a few, where there are few tasks otherwise.
fn channels_a_task(tasks: usize, channels: usize) -> usize {
    let parts = (TASKS * rayon::current_num_threads()).div_ceil(tasks);
    channels
        .div_ceil(parts)
        .next_multiple_of(FEWEST)
        .min(channels)
}

/// From products, whose columns are squares, to some outputs of their strips from `first` on.
fn finish_squares<const ACCUMULATE: bool>(
    products: &[Sums],
    places: &[Place],
    bias: &[f32],
    width: usize,
    first: usize,
    strips: &mut [Strip<'_>],
) {
    let tiles = bias.len().div_ceil(ROWS);
    let of_product = places.len().div_ceil(LANES) * tiles;
    vectorized(
        #[inline(always)]
        || {
            for (panel, places) in places.chunks(LANES).enumerate() {
                for (output, bias) in bias.iter().enumerate() {
                    let first_tile = panel * tiles + output / ROWS;
                    let squares = transform_products(
                        #[inline(always)]
                        |index| &products[first_tile + index * of_product][output % ROWS],
                    );
                    let mut lane = 0;
                    for places in places.chunk_by(Place::is_before) {
                        let values = &mut *strips[places[0].strip][first + output];
                        scatter::<ACCUMULATE>(&squares, places, lane, *bias, width, values);
                        lane += places.len();
                    }
                }
            }
        },
    );
}

/// Transforms the inputs of many squares, and then does everything else for some outputs at a time,
/// and some of the squares: their filters stay in the cache. Outputs are the columns of products.
pub fn by_outputs(x: Images<'_>, weight: Rows<'_>, bias: &[f32], out: Outputs<'_>) {
    let (channels, outputs) = (x.channels, bias.len());
    let threads = rayon::current_num_threads();
    let mut strips = strips(&x, outputs, out.values);
    let of_strip = x.width.div_ceil(OUT);
    let at_once = (INPUTS / (PRODUCTS * channels * of_strip)).clamp(1, strips.len());
    // Strips of a part: each part transforms the filters anew, but fewer parts may leave threads
    // without work.
    let a_part = (1..=at_once).rev().min_by_key(|a_part| {
        let tasks = outputs.div_ceil(LANES) * at_once.div_ceil(*a_part);
        let squares = (a_part * of_strip).next_multiple_of(ROWS);
        tasks.div_ceil(threads) * (squares + FILTERS_TAKE)
    });
    let a_part = a_part.unwrap_or(at_once);
    let mut inputs = PooledBuffer::default();
    for (index, strips) in strips.chunks_mut(at_once).enumerate() {
        let parts = strips.chunks_mut(a_part).enumerate();
        let (places, of_parts): (Vec<_>, Vec<_>) = parts
            .map(|(part, strips)| {
                let first = index * at_once + part * a_part;
                (Place::all(&x, first..first + strips.len()), strips)
            })
            .unzip();
        // As many tiles for each part.
        let tiles = places[0].len().div_ceil(ROWS);
        let size = tiles * PRODUCTS * channels;
        let (inputs, _) = inputs.resize(places.len() * size * ROWS).as_chunks_mut();
        transform_parts(&x, &places, tiles, inputs);
        let mut of_tasks = Vec::new();
        for (part, strips) in of_parts.into_iter().enumerate() {
            let panels = in_parts(strips.iter_mut().map(Vec::as_mut_slice), LANES);
            of_tasks.extend(
                panels
                    .into_iter()
                    .enumerate()
                    .map(|(panel, out)| (part, panel, out)),
            );
        }
        of_tasks.into_par_iter().for_each_init(
            || [PooledBuffer::default(), PooledBuffer::default()],
            |[filters, products], (part, panel, mut strips)| {
                let inputs = &inputs[part * size..][..size];
                let products = products.resize(PRODUCTS * tiles * ROWS * LANES);
                let (products, _) = products.as_chunks_mut();
                let (products, _) = products.as_chunks_mut();
                let stride = CHANNELS + PAD;
                let (filters, _) = filters.resize(PRODUCTS * stride * LANES).as_chunks_mut();
                for start in (0..channels).step_by(CHANNELS) {
                    let some = CHANNELS.min(channels - start);
                    transform_filters(
                        weight.part(start * 9, some * 9),
                        panel * LANES,
                        some,
                        #[inline(always)]
                        |channel, product, lane, values| {
                            copy_lanes(&mut filters[product * stride + channel], lane, values);
                        },
                    );
                    let rows = Terms {
                        values: &inputs[PRODUCTS * tiles * start..],
                        count: some,
                        tiles,
                        stride: some,
                        product_stride: tiles * some,
                    };
                    let columns = Terms {
                        values: &*filters,
                        count: some,
                        tiles: 1,
                        stride: 0,
                        product_stride: stride,
                    };
                    multiply(rows, columns, start > 0, products);
                }
                let bias = &bias[panel * LANES..];
                let finish = if out.accumulate {
                    finish_outputs::<true>
                } else {
                    finish_outputs::<false>
                };
                finish(products, &places[part], bias, x.width, &mut strips);
            },
        );
    }
}

/// Transforms the inputs of the squares of some parts, each with as many tiles: of each part,
/// [`CHANNELS`] at a time, `[36, tiles, channels]`, as products read them.
fn transform_parts(x: &Images<'_>, parts: &[Vec<Place>], tiles: usize, inputs: &mut [Column]) {
    // Some channels of some squares a task.
    let panels = parts.iter().map(|places| places.len().div_ceil(LANES));
    let blocks = panels.sum::<usize>() * x.channels.div_ceil(CHANNELS);
    let at_once = channels_a_task(blocks, CHANNELS);
    let of_parts = inputs.par_chunks_mut(tiles * PRODUCTS * x.channels);
    let blocks = of_parts.zip(parts).flat_map(|(inputs, places)| {
        let blocks = inputs.par_chunks_mut(tiles * PRODUCTS * CHANNELS);
        blocks
            .enumerate()
            .map(move |(block, inputs)| (places, block * CHANNELS, inputs))
    });
    let tasks = blocks.flat_map(|(places, first, inputs)| {
        let of_tiles = inputs.chunks_mut(inputs.len() / (PRODUCTS * tiles));
        let mut panels: Vec<Vec<_>> = Vec::new();
        panels.resize_with(tiles.div_ceil(LANES / ROWS), Vec::new);
        for (index, inputs) in of_tiles.enumerate() {
            panels[index % tiles / (LANES / ROWS)].push(inputs);
        }
        let panels = panels.into_par_iter().zip(places.par_chunks(LANES));
        panels.flat_map(move |(to, places)| {
            let parts = in_parts(to.into_iter(), at_once).into_par_iter();
            parts
                .enumerate()
                .map(move |(part, to)| (places, first + part * at_once, to))
        })
    });
    tasks.for_each(|(places, first, mut to)| {
        let tiles = to.len() / PRODUCTS;
        transform_inputs(
            x,
            places,
            first..first + to[0].len(),
            #[inline(always)]
            |channel, product, lane, values| {
                let to = &mut to[product * tiles..][..tiles];
                copy_columns(to, 1, channel - first, lane, values);
            },
        );
    });
}

/// From products, whose rows are squares, to some outputs of their strips.
fn finish_outputs<const ACCUMULATE: bool>(
    products: &[Sums],
    places: &[Place],
    bias: &[f32],
    width: usize,
    strips: &mut [&mut [&mut [f32]]],
) {
    let tiles = products.len() / PRODUCTS;
    vectorized(
        #[inline(always)]
        || {
            for (index, place) in places.iter().enumerate() {
                let square = transform_products(
                    #[inline(always)]
                    |product| &products[index / ROWS + product * tiles][index % ROWS],
                );
                scatter_outputs::<ACCUMULATE>(
                    &square,
                    place.left,
                    bias,
                    width,
                    strips[place.strip],
                );
            }
        },
    );
}

/// `V = Bᵀ d B` of at most [`LANES`] squares in some channels: `store` gets a channel, and of one
/// of the 36 products some lanes, after the first of them.
#[inline(always)]
fn transform_inputs(
    x: &Images<'_>,
    places: &[Place],
    channels: Range<usize>,
    mut store: impl FnMut(usize, usize, usize, &[f32]),
) {
    vectorized(
        #[inline(always)]
        || {
            let mut square = [[[0.0; LANES]; IN]; IN];
            for channel in channels {
                let mut lane = 0;
                for places in places.chunk_by(Place::is_before) {
                    gather(x, channel, places, lane, &mut square);
                    lane += places.len();
                }
                transform::<OfInputs, IN, IN>(
                    #[inline(always)]
                    |index| &square.as_flattened()[index],
                    #[inline(always)]
                    |product, lane, values| store(channel, product, lane, values),
                );
            }
        },
    );
}

/// Rows or columns of products: what the sums have as terms.
#[derive(Clone, Copy)]
struct Terms<'a, T> {
    values: &'a [T],
    count: usize,
    tiles: usize,
    /// From a tile to the next.
    stride: usize,
    /// From one of the 36 products to the next.
    product_stride: usize,
}

impl<'a, T> Terms<'a, T> {
    /// Those of one product, for a tile.
    fn of(&self, tile: usize, product: usize) -> &'a [T] {
        let first = tile * self.stride + product * self.product_stride;
        &self.values[first..][..self.count]
    }
}

/// The 36 products: `[36, tiles of columns, tiles of rows]`, added to the sums that are there with
/// `accumulate`.
fn multiply(
    rows: Terms<'_, Column>,
    columns: Terms<'_, Line>,
    accumulate: bool,
    products: &mut [Sums],
) {
    vectorized(
        #[inline(always)]
        || {
            let kept = accumulate.then_some(&[1.0; LANES]);
            let products = products.chunks_mut(rows.tiles * columns.tiles);
            for (product, sums) in products.enumerate() {
                for (index, sums) in sums.chunks_mut(rows.tiles).enumerate() {
                    let columns = columns.of(index, product);
                    for (index, sums) in sums.iter_mut().enumerate() {
                        let rows = rows.of(index, product);
                        tile(rows, columns, kept, sums);
                    }
                }
            }
        },
    );
}

/// `Y = Aᵀ M A`, lane by lane, of the lines of 36 products.
#[inline(always)]
fn transform_products<'a>(lines: impl Fn(usize) -> &'a Line) -> Square {
    let mut square = [[[0.0; LANES]; OUT]; OUT];
    transform::<OfProducts, IN, OUT>(
        lines,
        #[inline(always)]
        |index, lane, values| copy_lanes(&mut square.as_flattened_mut()[index], lane, values),
    );
    square
}

/// `U = G g Gᵀ` of the filters of [`LANES`] outputs from `first` on, `[outputs, channels, 3, 3]`:
/// `store` gets a channel, and of one of the 36 products some lanes, after the first of them.
#[inline(always)]
fn transform_filters(
    weight: Rows<'_>,
    first: usize,
    channels: usize,
    mut store: impl FnMut(usize, usize, usize, &[f32]),
) {
    vectorized(
        #[inline(always)]
        || {
            let mut packed = [[[0.0; LANES]; 9]; BLOCK];
            for start in (0..channels).step_by(BLOCK) {
                let some = (channels - start).min(BLOCK);
                let part = weight.part(start * 9, some * 9);
                part.pack(first, &mut packed.as_flattened_mut()[..some * 9]);
                for (channel, filter) in (start..start + some).zip(&packed) {
                    transform::<OfFilter, 3, IN>(
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

/// Copies some lanes into a line, from a lane on.
#[inline(always)]
fn copy_lanes(line: &mut Line, lane: usize, values: &[f32]) {
    line[lane..lane + values.len()].copy_from_slice(values);
}

/// Copies some lanes, from a lane on, into the columns of tiles, as far as there are any: `to` has
/// them in steps of `stride`, each with its column of a channel.
#[inline(always)]
fn copy_columns(
    to: &mut [&mut [Column]],
    stride: usize,
    channel: usize,
    lane: usize,
    values: &[f32],
) {
    for (index, values) in values.chunks(ROWS).enumerate() {
        if let Some(to) = to.get_mut((lane / ROWS + index) * stride) {
            let row = lane % ROWS;
            to[channel][row..row + values.len()].copy_from_slice(values);
        }
    }
}
