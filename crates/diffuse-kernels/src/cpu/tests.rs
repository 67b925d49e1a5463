//! What the kernels are made of. `diffuse-nn`'s tests compare whole operations with burn's.

use burn::tensor::TensorData;
use burn::tensor::Tolerance;
use burn_ndarray::NdArray;

use super::weights::Weights;
use super::*;
use crate::{ConvGeometry, GroupNorm};

/// A tensor of numbers between -1 and 1 that differ.
fn numbers<B: Backend, const D: usize>(seed: u64, shape: [usize; D]) -> Tensor<B, D> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Default::default())
}

#[track_caller]
fn check_close(fast: TensorData, portable: TensorData, tolerance: f32) {
    fast.assert_approx_eq::<f32>(&portable, Tolerance::absolute(tolerance));
}

/// Runs a test on one thread, and on more: how work is split depends on how many there are.
fn on_threads(test: impl Fn() + Sync) {
    for threads in [1, 2, 16] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(&test);
    }
}

/// `[batch, channels, outputs, height, width]`: sizes that are no multiples of anything, and such
/// as networks have.
const IMAGES: [[usize; 5]; 7] = [
    [1, 3, 5, 1, 1],
    [2, 5, 3, 7, 2],
    [1, 16, 17, 32, 32],
    [2, 17, 33, 23, 31],
    [1, 40, 16, 45, 29],
    [3, 20, 24, 64, 64],
    [1, 64, 8, 33, 128],
];

/// A factor of weights that keeps the size of numbers.
fn fan_in(channels: usize, kernel: usize) -> f32 {
    ((channels * kernel * kernel) as f32).powf(-0.5)
}

#[test]
fn each_way_of_a_3x3_convolution() {
    on_threads(|| {
        // The last has more squares than are transformed at once, and more outputs than a task.
        let more = [[1, 512, 70, 88, 90]];
        for [batch, channels, outputs, height, width] in IMAGES.into_iter().chain(more) {
            let x: Tensor<Flex, 4> = numbers(1, [batch, channels, height, width]);
            let weight: Tensor<Flex, 4> =
                numbers(2, [outputs, channels, 3, 3]) * fan_in(channels, 3);
            let bias: Tensor<Flex, 1> = numbers(3, [outputs]);
            let [x, weight, bias] = [
                Values::of(&x).unwrap(),
                Values::of(&weight).unwrap(),
                Values::of(&bias).unwrap(),
            ];
            let images = conv::Images {
                values: x.as_slice(),
                batch,
                channels,
                height,
                width,
            };
            let size = batch * outputs * height * width;
            let (weight, bias) = (Weights::F32(weight.as_slice()), bias.as_slice());
            let filters = matrix::Rows::new(weight, 9 * channels);
            let (geometry, image) = (ConvGeometry::same(3), [height, width]);
            for accumulate in [false, true] {
                let made = |way: &dyn Fn(conv::Outputs<'_>)| {
                    let mut values = match accumulate {
                        true => numbers::<Flex, 1>(9, [size])
                            .into_data()
                            .into_vec()
                            .unwrap(),
                        false => vec![f32::NAN; size],
                    };
                    way(conv::Outputs {
                        values: &mut values,
                        accumulate,
                    });
                    TensorData::new(values, [size])
                };
                let columns =
                    made(&|out| conv::as_columns(images, weight, bias, geometry, image, out));
                let squares = made(&|out| winograd::by_squares(images, filters, bias, out));
                let outputs = made(&|out| winograd::by_outputs(images, filters, bias, out));
                check_close(columns, squares.clone(), 5e-5);
                check_close(squares, outputs, 1e-6);
            }
        }
    });
}

#[test]
fn tiles_are_sums_of_products() {
    use kernel::{COLUMNS, ROWS, Tile};
    for depth in [0, 1, 7, 300] {
        let rows: Tensor<Flex, 2> = numbers(1, [depth + 1, ROWS]);
        let columns: Tensor<Flex, 2> = numbers(2, [depth + 1, COLUMNS]);
        let (rows, columns) = (Values::of(&rows).unwrap(), Values::of(&columns).unwrap());
        let (rows, _) = rows.as_slice()[ROWS..].as_chunks();
        let (columns, _) = columns.as_slice()[COLUMNS..].as_chunks();
        let kept: [f32; COLUMNS] = std::array::from_fn(|column| column as f32 / 16.0 - 1.0);
        let check = |sum: &dyn Fn(Tile<'_>)| {
            for (kept, before) in [(None, f32::NAN), (Some(&kept), 1.5)] {
                let mut tile = [[before; COLUMNS]; ROWS];
                sum(Tile {
                    rows,
                    columns,
                    kept,
                    tile: &mut tile,
                });
                for (row, sums) in tile.iter().enumerate() {
                    for (column, sum) in sums.iter().enumerate() {
                        let terms = rows.iter().zip(columns);
                        let terms = terms.map(|(a, b)| f64::from(a[row]) * f64::from(b[column]));
                        let kept = kept.map_or(0.0, |kept| f64::from(before * kept[column]));
                        assert!((f64::from(*sum) - kept - terms.sum::<f64>()).abs() < 1e-5);
                    }
                }
            }
        };
        // With the best instructions of this machine, with none, and with those of most others.
        check(&|tile| kernel::tile(tile.rows, tile.columns, tile.kept, tile.tile));
        check(&|tile| pulp::Simd::vectorize(pulp::Scalar, tile));
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = pulp::x86::V3::try_new() {
            check(&|tile| pulp::Simd::vectorize(avx2, tile));
        }
    }
}

#[test]
fn rows_are_transposed() {
    use kernel::{Column, ROWS, transpose, transpose_scalar};
    let rows: [Column; ROWS] =
        std::array::from_fn(|row| std::array::from_fn(|column| (10 * row + column) as f32));
    let columns = transpose(rows);
    assert_eq!((columns[5][2], columns), (25.0, transpose_scalar(rows)));
}

#[test]
fn memory_is_used_again() {
    // So large that no other test, beside this one, would take it.
    let len = 20_000_001;
    let mut buffer = PooledBuffer::new(len);
    buffer.fill(1.0);
    let before = buffer.as_ptr();
    let x: Tensor<Flex, 1> = tensor(buffer, [len]);
    let other = PooledBuffer::new(len);
    assert_ne!(other.as_ptr(), before);
    let some = x.clone().narrow(0, len - 3, 3);
    assert_eq!(some.sum().into_scalar(), 3.0);
    drop(x);
    let again = PooledBuffer::new(len);
    assert_eq!(again.as_ptr(), before);
    assert_eq!(again.as_ptr().addr() % 64, 0);
}

#[test]
fn what_nobody_else_has_is_normalized_in_place() {
    let x = Values::of(&numbers::<Flex, 4>(1, [2, 6, 5, 7])).unwrap();
    let before = x.as_slice().as_ptr();
    let norm = GroupNorm {
        x: x.tensor::<Flex, 4>(),
        weight: numbers(2, [6]),
        bias: numbers(3, [6]),
        groups: 2,
        eps: 1e-5,
        silu: false,
    };
    let y = norm.run().unwrap();
    assert_eq!(Values::of(&y).unwrap().as_slice().as_ptr(), before);
}

#[test]
fn functions_are_exact_to_their_last_digits() {
    for step in -8_000..8_000 {
        let x = step as f32 / 100.0;
        let wide = f64::from(x);
        let error = (f64::from(exp(x)) / wide.exp() - 1.0).abs();
        assert!(error < 3e-7, "e^{x} is off by {error}");
        let error = (f64::from(exp2(x)) / wide.exp2() - 1.0).abs();
        assert!(error < 3e-7, "2^{x} is off by {error}");
        let expected = wide / (1.0 + (-wide).exp());
        assert!((f64::from(silu_of(x)) - expected).abs() < 3e-7 * wide.abs().max(1.0));
    }
    assert!(
        exp(f32::NAN).is_nan()
            && exp2(f32::NAN).is_nan()
            && silu_of(f32::NAN).is_nan()
            && gelu_of(f32::NAN).is_nan()
    );
    assert_eq!(silu_of(f32::MIN), 0.0);
    assert!(exp(f32::NEG_INFINITY) < 1.3e-38 && exp2(f32::NEG_INFINITY) < 1.3e-38);
}

#[test]
fn other_tensors_are_given_back() {
    let half = Tensor::<Flex, 1>::from_data([1.0, 2.0], (&Default::default(), DType::F16));
    assert!(Values::of(&half).is_none());
    assert!(Values::take(half).is_err());
    let other = Tensor::<NdArray, 1>::from_floats([1.0], &Default::default());
    assert!(Values::of(&other).is_none());
    assert!(Values::take(other).is_err());
}
