//! 3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3): "Fast Algorithms for Convolutional Neural Networks" (Lavin
//! & Gray 2015, <https://arxiv.org/abs/1509.09308>, section 4.3).
//!
//! Squares of 4x4 outputs come from squares of 6x6 inputs, which overlap. Transformed, `V = Bᵀ d B`, a square is 36 values,
//! each multiplied by one of 36 matrices of transformed filters, `U = G g Gᵀ`; back, `Y = Aᵀ M A`. That is 4 times fewer
//! multiplications, as 36 matrix products over all squares and channels.
//!
//! The squares of a picture are the columns of these matrices, so that transforms work on rows of many squares.

use rayon::prelude::*;

use super::conv::Pictures;
use super::matrix::{Matrix, Threads, multiply};
use super::memory::Room;
use super::vectorized;
use super::weights::Weights;

/// Side of the output of a square, and of its input.
const OUT: usize = 4;
const IN: usize = 6;
/// Products a square.
const PRODUCTS: usize = IN * IN;
/// Transformed values of inputs that are held at once.
const VALUES: usize = 1 << 23;
/// Outputs of a task at most: their products with [`SQUARES`] squares, 2.4 MB, stay near a core.
const OUTPUTS: usize = 66;
/// Outputs that the kernel of a matrix product takes at once.
const KERNEL: usize = 6;
/// Squares whose products are held at once.
const SQUARES: usize = 256;
/// Squares that are transformed at once: their values stay in the cache next to a core.
const LANES: usize = 32;

/// A row of values for several squares.
type Row = [f32; LANES];

/// Where a square of outputs is.
#[derive(Clone, Copy)]
struct Place {
    picture: usize,
    top: usize,
    left: usize,
}

impl Place {
    /// Squares of all pictures, in rows from the first picture's top.
    fn all(x: &Pictures<'_>) -> Vec<Self> {
        let mut places = Vec::new();
        for picture in 0..x.batch {
            for top in (0..x.height).step_by(OUT) {
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
    let (Place { picture, top, left }, count) = (places[0], places.len());
    let from = x.channel(picture, channel);
    // From one column to the left of the first square to one to the right of the last.
    let mut values = [0.0; OUT * (LANES + 1)];
    let start = left.saturating_sub(1);
    let length = (left + OUT * count + 1).min(x.width) - start;
    for (dy, inputs) in squares.iter_mut().enumerate() {
        let row = (top + dy).checked_sub(1).filter(|row| *row < x.height);
        let to = &mut values[start + 1 - left..][..length];
        match row {
            Some(row) => to.copy_from_slice(&from[row * x.width + start..][..length]),
            None => to.fill(0.0),
        }
        let (quads, _) = values.as_chunks::<OUT>();
        let [a, b, c, d, e, f] = inputs;
        let lanes = lane..lane + count;
        let first = a[lanes.clone()].iter_mut().zip(&mut b[lanes.clone()]);
        let second = c[lanes.clone()].iter_mut().zip(&mut d[lanes.clone()]);
        for (((a, b), (c, d)), quad) in first.zip(second).zip(quads) {
            (*a, *b, *c, *d) = (quad[0], quad[1], quad[2], quad[3]);
        }
        let last = e[lanes.clone()].iter_mut().zip(&mut f[lanes]);
        for ((e, f), quad) in last.zip(&quads[1..]) {
            (*e, *f) = (quad[0], quad[1]);
        }
    }
}

/// The outputs of neighbouring squares, from the lanes from `lane` on, into a channel of a picture.
#[inline(always)]
fn scatter(
    squares: &[[Row; OUT]; OUT],
    places: &[Place],
    lane: usize,
    bias: f32,
    [height, width]: [usize; 2],
    channel: &mut [f32],
) {
    let (Place { top, left, .. }, count) = (places[0], places.len());
    let length = (OUT * count).min(width - left);
    for (dy, outputs) in squares.iter().enumerate().take(height - top) {
        let to = &mut channel[(top + dy) * width + left..][..length];
        let (quads, rest) = to.as_chunks_mut::<OUT>();
        let [a, b, c, d] = outputs.each_ref().map(|row| &row[lane..lane + count]);
        for (((quad, a), b), (c, d)) in quads.iter_mut().zip(a).zip(b).zip(c.iter().zip(d)) {
            *quad = [a + bias, b + bias, c + bias, d + bias];
        }
        for (value, row) in rest.iter_mut().zip(outputs) {
            *value = row[lane + count - 1] + bias;
        }
    }
}

/// `out = x * weight + bias`, with a padding of 1: `weight` is `[outputs, channels, 3, 3]`.
pub fn winograd(x: Pictures<'_>, weight: Weights<'_>, bias: &[f32], out: &mut [f32]) {
    let (channels, outputs) = (x.channels, bias.len());
    let places = Place::all(&x);
    // As many squares as fit, in whole rows of lanes.
    let stride = VALUES / (PRODUCTS * channels) / LANES * LANES;
    let stride = stride.clamp(LANES, places.len().next_multiple_of(LANES));
    let mut inputs = Room::default();
    let inputs = inputs.resize(PRODUCTS * channels * stride);
    let mut out = channels_of(out, outputs, x.area());
    // As many tasks for each thread, of whole kernels.
    let threads = rayon::current_num_threads();
    let tasks = threads * outputs.div_ceil(threads * OUTPUTS);
    let a_task = outputs.div_ceil(tasks).next_multiple_of(KERNEL);
    for places in places.chunks(stride) {
        let squares = Squares { x, places, stride };
        squares.transform_inputs(inputs);
        out.par_chunks_mut(a_task)
            .zip(bias.par_chunks(a_task))
            .enumerate()
            .for_each_init(Scratch::default, |scratch, (task, (out, bias))| {
                let size = channels * 9;
                let first = task * a_task * size;
                let weight = weight.part(first..first + bias.len() * size);
                scratch.convolve(squares, inputs, weight, bias, out);
            });
    }
}

/// The channels of all pictures, `[batch, channels, area]`, by channel.
fn channels_of(out: &mut [f32], channels: usize, area: usize) -> Vec<Vec<&mut [f32]>> {
    let mut by_channel: Vec<_> = (0..channels).map(|_| Vec::new()).collect();
    for (index, channel) in out.chunks_mut(area).enumerate() {
        by_channel[index % channels].push(channel);
    }
    by_channel
}

/// Some squares of the pictures, whose values are the first of rows of `stride`.
#[derive(Clone, Copy)]
struct Squares<'a> {
    x: Pictures<'a>,
    places: &'a [Place],
    stride: usize,
}

impl Squares<'_> {
    /// `V = Bᵀ d B` of each square and channel: `[36, channels, stride]`.
    fn transform_inputs(&self, inputs: &mut [f32]) {
        let rows = rows_of(inputs, self.x.channels, self.stride);
        let tasks = rows.into_par_iter().enumerate();
        tasks.for_each(|(channel, mut rows)| {
            vectorized(
                #[inline(always)]
                || {
                    let mut square = [[[0.0; LANES]; IN]; IN];
                    let mut half = square;
                    for (index, places) in self.places.chunks(LANES).enumerate() {
                        let mut lane = 0;
                        for places in places.chunk_by(Place::is_before) {
                            gather(&self.x, channel, places, lane, &mut square);
                            lane += places.len();
                        }
                        along_rows(&square, &mut half, input_1d);
                        along_rows(&half, &mut square, input_1d);
                        store(&square, &mut rows, index * LANES);
                    }
                },
            );
        });
    }

    /// `Y = Aᵀ M A` of each square, with a bias, into one channel of the pictures; `products` is `[36, ..]`, a row each
    /// `plane` values.
    #[inline(always)]
    fn transform_products(
        &self,
        products: &[f32],
        plane: usize,
        bias: f32,
        pictures: &mut [&mut [f32]],
    ) {
        let size = [self.x.height, self.x.width];
        let mut product = [[[0.0; LANES]; IN]; IN];
        let mut half = [[[0.0; LANES]; IN]; OUT];
        let mut square = [[[0.0; LANES]; OUT]; OUT];
        for (index, places) in self.places.chunks(LANES).enumerate() {
            for (number, row) in product.as_flattened_mut().iter_mut().enumerate() {
                row.copy_from_slice(&products[number * plane + index * LANES..][..LANES]);
            }
            along_rows(&product, &mut half, output_1d);
            along_rows(&half, &mut square, output_1d);
            let mut lane = 0;
            for places in places.chunk_by(Place::is_before) {
                let channel = &mut *pictures[places[0].picture];
                scatter(&square, places, lane, bias, size, channel);
                lane += places.len();
            }
        }
    }
}

/// What a task needs for some of the outputs.
#[derive(Default)]
struct Scratch {
    /// `[36, outputs, channels]`
    filters: Room,
    /// `[36, outputs, squares]`
    products: Room,
    /// The filters of one output, if they are kept in half precision.
    room: Room,
}

impl Scratch {
    /// From transformed inputs to some channels of the pictures.
    fn convolve(
        &mut self,
        squares: Squares<'_>,
        inputs: &[f32],
        weight: Weights<'_>,
        bias: &[f32],
        out: &mut [Vec<&mut [f32]>],
    ) {
        let (channels, outputs, stride) = (squares.x.channels, bias.len(), squares.stride);
        let plane = SQUARES.min(stride);
        let filters = self.filters.resize(PRODUCTS * outputs * channels);
        let products = self.products.resize(PRODUCTS * outputs * plane);
        let rows = rows_of(filters, outputs, channels);
        for (output, mut rows) in rows.into_iter().enumerate() {
            let size = channels * 9;
            let weight = weight.part(output * size..(output + 1) * size);
            transform_filters(weight.widened(&mut self.room), &mut rows);
        }
        for (index, places) in squares.places.chunks(plane).enumerate() {
            let start = index * plane;
            let some = Squares { places, ..squares };
            let all = products
                .chunks_mut(outputs * plane)
                .zip(inputs.chunks(channels * stride))
                .zip(filters.chunks(outputs * channels));
            for ((product, input), filter) in all {
                let input = Matrix {
                    row_stride: stride,
                    ..Matrix::new(&input[start..], channels, places.len())
                };
                let filter = Matrix::new(filter, outputs, channels);
                multiply(product, plane, filter, input, false, Threads::One);
            }
            for (output, (pictures, bias)) in out.iter_mut().zip(bias).enumerate() {
                let products = &products[output * plane..];
                vectorized(
                    #[inline(always)]
                    || some.transform_products(products, outputs * plane, *bias, pictures),
                );
            }
        }
    }
}

/// `U = G g Gᵀ` of each filter of an output, `[channels, 3, 3]`, into its row of the 36 matrices.
fn transform_filters(weight: &[f32], rows: &mut [&mut [f32]]) {
    vectorized(
        #[inline(always)]
        || {
            let mut filter = [[[0.0; LANES]; 3]; 3];
            let mut half = [[[0.0; LANES]; 3]; IN];
            let mut transformed = [[[0.0; LANES]; IN]; IN];
            for (index, weight) in weight.chunks(LANES * 9).enumerate() {
                for (lane, values) in weight.chunks_exact(9).enumerate() {
                    for (to, value) in filter.as_flattened_mut().iter_mut().zip(values) {
                        to[lane] = *value;
                    }
                }
                along_rows(&filter, &mut half, filter_1d);
                along_rows(&half, &mut transformed, filter_1d);
                store(&transformed, rows, index * LANES);
            }
        },
    );
}

/// The rows of 36 matrices, by their number.
fn rows_of(matrices: &mut [f32], rows: usize, columns: usize) -> Vec<Vec<&mut [f32]>> {
    let mut by_row: Vec<Vec<&mut [f32]>> =
        (0..rows).map(|_| Vec::with_capacity(PRODUCTS)).collect();
    for (index, row) in matrices.chunks_mut(columns).enumerate() {
        by_row[index % rows].push(row);
    }
    by_row
}

/// Into one row of each of the 36 matrices, as far as there is room.
#[inline(always)]
fn store(from: &[[Row; IN]; IN], rows: &mut [&mut [f32]], start: usize) {
    for (row, values) in rows.iter_mut().zip(from.as_flattened()) {
        let row = &mut row[start..];
        match row.first_chunk_mut::<LANES>() {
            Some(row) => *row = *values,
            None => row.copy_from_slice(&values[..row.len()]),
        }
    }
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
    let (even, odd) = (g0 + g2, g1);
    let (even_2, odd_2) = (g0 + 4.0 * g2, 2.0 * g1);
    [
        g0 / 4.0,
        (even + odd) / -6.0,
        (even - odd) / -6.0,
        (even_2 + odd_2) / 24.0,
        (even_2 - odd_2) / 24.0,
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
