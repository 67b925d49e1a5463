//! 3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3): "Fast Algorithms for Convolutional Neural Networks" (Lavin
//! & Gray 2015, <https://arxiv.org/abs/1509.09308>, section 4.3).
//!
//! Squares of 4x4 outputs come from squares of 6x6 inputs, which overlap. Transformed, `V = Bᵀ d B`, a square is 36 values,
//! each multiplied by one of 36 matrices of transformed filters, `U = G g Gᵀ`; back, `Y = Aᵀ M A`. That is 4 times fewer
//! multiplications, as 36 matrix products over all squares and channels.
//!
//! The squares of a picture are the columns of these matrices, so that transforms work on rows of many squares.

use std::ops::Range;

use rayon::prelude::*;

use super::conv::{Outputs, Pictures};
use super::kernel::{COLUMNS, Column, Line, ROWS, tile, tile_onto};
use super::matrix::{Rows, TASKS, in_parts};
use super::memory::Room;
use super::vectorized;
use super::weights::Weights;

/// Side of the output of a square, and of its input.
const OUT: usize = 4;
const IN: usize = 6;
/// Products a square.
const PRODUCTS: usize = IN * IN;
/// Transformed values of inputs that are held at once, where that is not all: 32 MB.
const INPUTS: usize = 1 << 23;
/// Transformed values of filters that are held at once, if it is all of them: 64 MB.
const FILTERS: usize = 1 << 24;
/// Transformed values of filters that a thread holds, where they are not held at once: 3 MB.
const SOME_FILTERS: usize = 3 << 18;
/// Outputs of such filters at most.
const OUTPUTS: usize = 40;
/// Squares of a task, if there are twice as many for each thread, and else half of them.
const SQUARES: usize = 64;
/// Outputs whose products are held at once, where the filters of all are.
const SOME: usize = 2 * ROWS;
/// Squares that are transformed at once, and the columns of a tile.
const LANES: usize = COLUMNS;
/// Channels whose filters are transformed at once, for the outputs of a tile.
const CHANNELS: usize = LANES / ROWS;
/// As many channels, times this, are packed at once.
const BLOCK: usize = 16;

/// A row of values for several squares.
type Row = Line;

/// Where a square of outputs is.
#[derive(Clone, Copy)]
struct Place {
    picture: usize,
    top: usize,
    left: usize,
}

impl Place {
    /// Squares of some rows of all pictures, from the first picture's top.
    fn all(x: &Pictures<'_>, rows: Range<usize>) -> Vec<Self> {
        let mut places = Vec::new();
        for picture in 0..x.batch {
            for top in rows.clone().step_by(OUT) {
                let columns = (0..x.width).step_by(OUT);
                places.extend(columns.map(|left| Self { picture, top, left }));
            }
        }
        places
    }

    /// Whether another square is the next to the right.
    fn is_before(&self, other: &Self) -> bool {
        self.left < other.left && (self.picture, self.top) == (other.picture, other.top)
    }
}

/// The inputs of neighbouring squares in one channel, with zeros outside of the picture, into the lanes from `lane` on.
#[inline(always)]
fn gather(
    x: &Pictures<'_>,
    channel: usize,
    places: &[Place],
    lane: usize,
    squares: &mut [[Row; IN]; IN],
) {
    /// Squares at once: what is the same for all of them is then known to the compiler.
    const SOME: usize = 4;
    let (Place { picture, top, left }, count) = (places[0], places.len());
    let from = x.channel(picture, channel);
    for (dy, inputs) in squares.iter_mut().enumerate() {
        let Some(row) = (top + dy).checked_sub(1).filter(|row| *row < x.height) else {
            for lanes in inputs {
                lanes[lane..lane + count].fill(0.0);
            }
            continue;
        };
        let row = &from[row * x.width..][..x.width];
        let mut square = 0;
        while square < count {
            let start = left + OUT * square;
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

/// The outputs of neighbouring squares, from the lanes from `lane` on, into a channel of a picture, of which `channel` has the
/// rows from `start` on: with `ONTO`, they are added to what is there.
#[inline(always)]
fn scatter<const ONTO: bool>(
    squares: &[[Row; OUT]; OUT],
    places: &[Place],
    lane: usize,
    bias: f32,
    [start, width]: [usize; 2],
    channel: &mut [f32],
) {
    #[inline(always)]
    fn result<const ONTO: bool>(value: f32, output: f32) -> f32 {
        if ONTO { value + output } else { output }
    }
    let (Place { top, left, .. }, count) = (places[0], places.len());
    let length = (OUT * count).min(width - left);
    let rows = channel.chunks_mut(width).skip(top - start);
    for (outputs, row) in squares.iter().zip(rows) {
        let (quads, rest) = row[left..left + length].as_chunks_mut::<OUT>();
        let [a, b, c, d] = outputs.each_ref().map(|row| &row[lane..lane + count]);
        for (((quad, a), b), (c, d)) in quads.iter_mut().zip(a).zip(b).zip(c.iter().zip(d)) {
            let [x, y, z, w] = *quad;
            *quad = [
                result::<ONTO>(x, a + bias),
                result::<ONTO>(y, b + bias),
                result::<ONTO>(z, c + bias),
                result::<ONTO>(w, d + bias),
            ];
        }
        for (value, row) in rest.iter_mut().zip(outputs) {
            *value = result::<ONTO>(*value, row[lane + count - 1] + bias);
        }
    }
}

/// `out = x * weight + bias`, or `out += ..`, with a padding of 1: `weight` is `[outputs, channels, 3, 3]`.
pub fn winograd(x: Pictures<'_>, weight: Weights<'_>, bias: &[f32], out: Outputs<'_>) {
    let weight = Rows::new(weight, x.channels * 9);
    let (squares, threads) = (squares(&x), rayon::current_num_threads());
    // What a thread reads of the filters of all outputs, and else of the inputs of all squares, in channels.
    let of_filters = squares.div_ceil(squares_a_task(squares) * threads) * bias.len();
    let of_inputs = bias.len().div_ceil(OUTPUTS * threads) * squares;
    let fits = PRODUCTS * x.channels * bias.len() <= FILTERS;
    if fits && squares >= threads * SQUARES / 2 && of_filters <= of_inputs {
        by_squares(x, weight, bias, out);
    } else {
        by_outputs(x, weight, bias, out);
    }
}

/// Squares of all pictures.
fn squares(x: &Pictures<'_>) -> usize {
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

/// Transforms all filters, and then does everything else for a few squares at a time: of large pictures, little goes through
/// memory so.
pub fn by_squares(x: Pictures<'_>, weight: Rows<'_>, bias: &[f32], out: Outputs<'_>) {
    let (channels, outputs) = (x.channels, bias.len());
    let tiles = outputs.div_ceil(ROWS);
    let mut filters = Room::new(tiles * PRODUCTS * channels * ROWS);
    let (filters, _) = filters.as_chunks_mut();
    let of_tiles = filters.par_chunks_mut(PRODUCTS * channels).enumerate();
    of_tiles.for_each(|(tile, filters)| {
        transform_filters(weight, tile * ROWS, channels, filters);
    });
    // Whole rows of squares of one picture.
    let rows = OUT * (squares_a_task(squares(&x)) / x.width.div_ceil(OUT)).max(1);
    let size = channels * x.area();
    let mut tasks = Vec::new();
    let onto = out.onto;
    let pictures = out.values.chunks_mut(outputs * x.area());
    for (values, out) in x.values.chunks(size).zip(pictures) {
        let picture = Pictures {
            values,
            batch: 1,
            ..x
        };
        let parts = in_parts(out.chunks_mut(x.area()), rows * x.width);
        let parts = parts.into_iter().enumerate();
        tasks.extend(parts.map(|(index, out)| (picture, index * rows, out)));
    }
    let tasks = tasks.into_par_iter();
    tasks.for_each_init(
        || [Room::default(), Room::default()],
        |[inputs, products], (x, top, mut out)| {
            let places = Place::all(&x, top..x.height.min(top + rows));
            let panels = places.len().div_ceil(LANES);
            let inputs = inputs.resize(panels * PRODUCTS * channels * LANES);
            let (inputs, _) = inputs.as_chunks_mut();
            let of_panels = inputs.chunks_mut(PRODUCTS * channels);
            for (inputs, places) in of_panels.zip(places.chunks(LANES)) {
                let mut inputs: Vec<_> = inputs.chunks_mut(channels).collect();
                transform_inputs(&x, places, 0, &mut inputs);
            }
            let squares = Squares {
                x: &x,
                places: &places,
                top,
                onto,
            };
            let outputs = bias.chunks(SOME).zip(out.chunks_mut(SOME));
            let filters = filters.chunks(SOME * PRODUCTS * channels / ROWS);
            for ((bias, out), filters) in outputs.zip(filters) {
                let rows = bias.len().next_multiple_of(ROWS);
                let products = products.resize(PRODUCTS * panels * rows * LANES);
                squares.multiply(inputs, 0..channels, filters, products);
                squares.transform_products(products, bias, out);
            }
        },
    );
}

/// Transforms the inputs of many squares, and then does everything else for some outputs at a time: their filters stay in
/// the cache.
pub fn by_outputs(x: Pictures<'_>, weight: Rows<'_>, bias: &[f32], out: Outputs<'_>) {
    let (channels, outputs) = (x.channels, bias.len());
    let places = Place::all(&x, 0..x.height);
    // As many squares as fit, in whole rows of lanes.
    let at_once = (INPUTS / (PRODUCTS * channels * LANES)).max(1) * LANES;
    let panels = at_once.min(places.len()).div_ceil(LANES);
    let mut inputs = Room::new(panels * PRODUCTS * channels * LANES);
    let (inputs, _) = inputs.as_chunks_mut();
    // As many tasks for each thread, of whole tiles, and some channels of their filters at a time.
    let threads = rayon::current_num_threads();
    let tasks = threads * outputs.div_ceil(threads * OUTPUTS);
    let a_task = outputs.div_ceil(tasks).next_multiple_of(ROWS);
    let blocks = (PRODUCTS * a_task * channels).div_ceil(SOME_FILTERS);
    let depth = channels.div_ceil(blocks).next_multiple_of(CHANNELS);
    let mut tasks: Vec<_> = bias.chunks(a_task).map(|bias| (bias, Vec::new())).collect();
    for (index, channel) in out.values.chunks_mut(x.area()).enumerate() {
        tasks[index % outputs / a_task].1.push(channel);
    }
    for places in places.chunks(at_once) {
        let inputs = &mut inputs[..PRODUCTS * channels * places.len().div_ceil(LANES)];
        // Some channels of some squares a task.
        let parts = (TASKS * threads).div_ceil(places.len().div_ceil(LANES));
        let some = channels.div_ceil(parts);
        let mut of_panels = Vec::new();
        let panels = inputs.chunks_mut(PRODUCTS * channels);
        for (inputs, places) in panels.zip(places.chunks(LANES)) {
            let parts = in_parts(inputs.chunks_mut(channels), some).into_iter();
            of_panels.extend(
                parts
                    .enumerate()
                    .map(|(part, to)| (places, part * some, to)),
            );
        }
        let of_panels = of_panels.into_par_iter();
        of_panels.for_each(|(places, first, mut to)| transform_inputs(&x, places, first, &mut to));
        let squares = Squares {
            x: &x,
            places,
            top: 0,
            onto: out.onto,
        };
        tasks.par_iter_mut().enumerate().for_each_init(
            || [Room::default(), Room::default()],
            |[filters, products], (task, (bias, out))| {
                let (rows, panels) = (
                    bias.len().next_multiple_of(ROWS),
                    places.len().div_ceil(LANES),
                );
                let products = products.resize(PRODUCTS * panels * rows * LANES);
                for start in (0..channels).step_by(depth) {
                    let some = depth.min(channels - start);
                    let weight = weight.part(start * 9, some * 9);
                    let filters = filters.resize(rows * PRODUCTS * some);
                    let (filters, _) = filters.as_chunks_mut();
                    for (tile, filters) in filters.chunks_mut(PRODUCTS * some).enumerate() {
                        transform_filters(weight, task * a_task + tile * ROWS, some, filters);
                    }
                    squares.multiply(inputs, start..start + some, filters, products);
                }
                squares.transform_products(products, bias, out);
            },
        );
    }
}

/// `V = Bᵀ d B` of at most [`LANES`] squares in some channels from `first` on: `[36, channels]`.
fn transform_inputs(x: &Pictures<'_>, places: &[Place], first: usize, inputs: &mut [&mut [Line]]) {
    vectorized(
        #[inline(always)]
        || {
            let mut square = [[[0.0; LANES]; IN]; IN];
            let mut half = square;
            for channel in 0..inputs[0].len() {
                let mut lane = 0;
                for places in places.chunk_by(Place::is_before) {
                    gather(x, first + channel, places, lane, &mut square);
                    lane += places.len();
                }
                along_rows(&square, &mut half, input_1d);
                along_rows(&half, &mut square, input_1d);
                for (to, row) in inputs.iter_mut().zip(square.as_flattened()) {
                    to[channel] = *row;
                }
            }
        },
    );
}

/// Some squares of the pictures.
#[derive(Clone, Copy)]
struct Squares<'a> {
    x: &'a Pictures<'a>,
    places: &'a [Place],
    /// The row where the results begin.
    top: usize,
    /// Whether they are added to what is there.
    onto: bool,
}

impl Squares<'_> {
    /// The 36 products of transformed inputs, `[squares / LANES, 36, channels]`, with the filters of some channels,
    /// `[outputs / ROWS, 36, some]`: `[36, squares / LANES, outputs / ROWS]` tiles, which those of later channels are added to.
    fn multiply(
        &self,
        inputs: &[Line],
        some: Range<usize>,
        filters: &[Column],
        products: &mut [f32],
    ) {
        let channels = self.x.channels;
        let size = PRODUCTS * some.len();
        let tiles = filters.len() / size;
        let (products, _) = products.as_chunks_mut::<LANES>();
        let (products, _) = products.as_chunks_mut::<ROWS>();
        let panels = inputs.len() / (PRODUCTS * channels);
        vectorized(
            #[inline(always)]
            || {
                for (number, products) in products.chunks_mut(panels * tiles).enumerate() {
                    let inputs = inputs.chunks(PRODUCTS * channels);
                    for (products, inputs) in products.chunks_mut(tiles).zip(inputs) {
                        let inputs = &inputs[number * channels..][some.clone()];
                        for (product, filters) in products.iter_mut().zip(filters.chunks(size)) {
                            let filters = &filters[number * some.len()..][..some.len()];
                            if some.start == 0 {
                                tile(filters, inputs, product);
                                continue;
                            }
                            tile_onto(filters, inputs, &[1.0; LANES], product);
                        }
                    }
                }
            },
        );
    }

    /// From products as of [`multiply`](Squares::multiply) to channels: those of the first picture, then those of the next.
    fn transform_products(&self, products: &[f32], bias: &[f32], out: &mut [&mut [f32]]) {
        let (products, _) = products.as_chunks::<LANES>();
        let (products, _) = products.as_chunks::<ROWS>();
        let tiles = bias.len().div_ceil(ROWS);
        let panels = self.places.len().div_ceil(LANES);
        vectorized(
            #[inline(always)]
            || {
                for (panel, places) in self.places.chunks(LANES).enumerate() {
                    let some = Squares { places, ..*self };
                    for (output, bias) in bias.iter().enumerate() {
                        let of_tile = products[panel * tiles + output / ROWS..].iter();
                        let rows = of_tile.step_by(panels * tiles);
                        let rows = rows.map(|tile| &tile[output % ROWS]);
                        some.transform_rows(rows, *bias, out, output);
                    }
                }
            },
        );
    }

    /// `Y = Aᵀ M A` of at most [`LANES`] squares, with a bias, into one channel of the pictures.
    #[inline(always)]
    fn transform_rows<'a>(
        &self,
        rows: impl Iterator<Item = &'a Row>,
        bias: f32,
        out: &mut [&mut [f32]],
        output: usize,
    ) {
        let outputs = out.len() / self.x.batch;
        let mut products = [[[0.0; LANES]; IN]; IN];
        let mut half = [[[0.0; LANES]; IN]; OUT];
        let mut square = [[[0.0; LANES]; OUT]; OUT];
        for (to, row) in products.as_flattened_mut().iter_mut().zip(rows) {
            *to = *row;
        }
        along_rows(&products, &mut half, output_1d);
        along_rows(&half, &mut square, output_1d);
        let mut lane = 0;
        for places in self.places.chunk_by(Place::is_before) {
            let channel = &mut *out[places[0].picture * outputs + output];
            let width = self.x.width;
            let rows = [self.top, width];
            if self.onto {
                scatter::<true>(&square, places, lane, bias, rows, channel);
            } else {
                scatter::<false>(&square, places, lane, bias, rows, channel);
            }
            lane += places.len();
        }
    }
}

/// `U = G g Gᵀ` of the filters of a tile's outputs, from `first` on, `[outputs, channels, 3, 3]`: `[36, channels]`.
fn transform_filters(weight: Rows<'_>, first: usize, channels: usize, to: &mut [Column]) {
    vectorized(
        #[inline(always)]
        || {
            let mut packed = [[[[0.0; ROWS]; 9]; CHANNELS]; BLOCK];
            let mut filter = [[[0.0; LANES]; 3]; 3];
            let mut half = [[[0.0; LANES]; 3]; IN];
            let mut transformed = [[[0.0; LANES]; IN]; IN];
            for start in (0..channels).step_by(BLOCK * CHANNELS) {
                let some = (channels - start).min(BLOCK * CHANNELS);
                let values = packed.as_flattened_mut().as_flattened_mut();
                let part = weight.part(start * 9, some * 9);
                part.pack(first, &mut values[..some * 9]);
                let blocks = packed.iter().zip((0..some).step_by(CHANNELS));
                for (block, channel) in blocks {
                    for (tap, lanes) in filter.as_flattened_mut().iter_mut().enumerate() {
                        let (columns, _) = lanes.as_chunks_mut();
                        for (column, values) in columns.iter_mut().zip(block) {
                            *column = values[tap];
                        }
                    }
                    along_rows(&filter, &mut half, filter_1d);
                    along_rows(&half, &mut transformed, filter_1d);
                    let first = start + channel;
                    let count = CHANNELS.min(channels - first);
                    let rows = to.chunks_mut(channels).zip(transformed.as_flattened());
                    for (to, row) in rows {
                        let (row, _) = row.as_chunks();
                        match to[first..].first_chunk_mut::<CHANNELS>() {
                            Some(to) => to.copy_from_slice(row),
                            None => to[first..].copy_from_slice(&row[..count]),
                        }
                    }
                }
            }
        },
    );
}

/// Transforms each row, lane by lane, into a column: done twice, rows and columns are in their places again.
#[inline(always)]
fn along_rows<const ROWS: usize, const N: usize, const M: usize>(
    from: &[[Row; N]; ROWS],
    to: &mut [[Row; ROWS]; M],
    f: impl Fn([f32; N]) -> [f32; M],
) {
    for (index, row) in from.iter().enumerate() {
        for lane in 0..LANES {
            let values = f(std::array::from_fn(|column| row[column][lane]));
            for (column, value) in to.iter_mut().zip(values) {
                column[index][lane] = value;
            }
        }
    }
}

/// `G g`
#[inline(always)]
fn filter_1d([g0, g1, g2]: [f32; 3]) -> [f32; IN] {
    let (even, odd) = ((g0 + g2) * (-1.0 / 6.0), g1 * (-1.0 / 6.0));
    let (even_2, odd_2) = ((g0 + 4.0 * g2) * (1.0 / 24.0), g1 * (1.0 / 12.0));
    [
        0.25 * g0,
        even + odd,
        even - odd,
        even_2 + odd_2,
        even_2 - odd_2,
        g2,
    ]
}

/// `Bᵀ d`
#[inline(always)]
fn input_1d([d0, d1, d2, d3, d4, d5]: [f32; IN]) -> [f32; IN] {
    let (even, odd) = (d4 - 4.0 * d2, d3 - 4.0 * d1);
    let (even_2, odd_2) = (d4 - d2, 2.0 * (d3 - d1));
    [
        4.0 * d0 - 5.0 * d2 + d4,
        even + odd,
        even - odd,
        even_2 + odd_2,
        even_2 - odd_2,
        4.0 * d1 - 5.0 * d3 + d5,
    ]
}

/// `Aᵀ m`
#[inline(always)]
fn output_1d([m0, m1, m2, m3, m4, m5]: [f32; IN]) -> [f32; OUT] {
    let (sum, difference) = (m1 + m2, m1 - m2);
    let (sum_2, difference_2) = (m3 + m4, m3 - m4);
    [
        m0 + sum + sum_2,
        difference + 2.0 * difference_2,
        sum + 4.0 * sum_2,
        difference + 8.0 * difference_2 + m5,
    ]
}
