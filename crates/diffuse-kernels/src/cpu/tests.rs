//! Tests of the kernels' parts. The tests of `diffuse-nn` compare whole operations with burn's.

use burn::tensor::TensorData;
use burn::tensor::Tolerance;
use burn_ndarray::NdArray;

use super::weights::WeightSlice;
use super::*;
use crate::{ConvGeometry, GroupNorm, LayerNorm};

/// Distinct pseudo-random numbers in `[-1, 1)`.
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

/// Runs a test with 1, 2 and 16 threads, which split the work differently.
fn on_threads(test: impl Fn() + Sync) {
    for threads in [1, 2, 16] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(&test);
    }
}

/// `[batch, channels, outputs, height, width]`: odd sizes, and those of networks.
const IMAGES: [[usize; 5]; 7] = [
    [1, 3, 5, 1, 1],
    [2, 5, 3, 7, 2],
    [1, 16, 17, 32, 32],
    [2, 17, 33, 23, 31],
    [1, 40, 16, 45, 29],
    [3, 20, 24, 64, 64],
    [1, 64, 8, 33, 128],
];

/// The factor of weights that keeps the scale of the numbers.
fn fan_in(channels: usize, kernel: usize) -> f32 {
    ((channels * kernel * kernel) as f32).powf(-0.5)
}

#[test]
fn all_3x3_convolutions_agree() {
    on_threads(|| {
        // The last has more tiles than are transformed at once, and more outputs than a task has.
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
            let (weight, bias) = (WeightSlice::F32(weight.as_slice()), bias.as_slice());
            let filters = matrix::Matrix::new(weight, 9 * channels);
            let (geometry, image) = (ConvGeometry::same(3), [height, width]);
            for accumulate in [false, true] {
                let run = |convolve: &dyn Fn(conv::Outputs<'_>)| {
                    let mut values = match accumulate {
                        true => numbers::<Flex, 1>(9, [size])
                            .into_data()
                            .into_vec()
                            .unwrap(),
                        false => vec![f32::NAN; size],
                    };
                    convolve(conv::Outputs {
                        values: &mut values,
                        accumulate,
                    });
                    TensorData::new(values, [size])
                };
                let columns = run(&|out| conv::im2col(images, weight, bias, geometry, image, out));
                let tiles = run(&|out| winograd::by_tiles(images, filters, bias, out));
                let outputs = run(&|out| winograd::by_outputs(images, filters, bias, out));
                check_close(columns, tiles.clone(), 5e-5);
                check_close(tiles, outputs, 1e-6);
            }
        }
    });
}

#[test]
fn micro_kernel_is_a_sum_of_products() {
    use micro_kernel::{MR, MicroKernel, NR, Start, micro_kernel};
    for depth in [0, 1, 7, 300] {
        let a: Tensor<Flex, 2> = numbers(1, [depth + 1, MR]);
        let b: Tensor<Flex, 2> = numbers(2, [depth + 1, NR]);
        let before: Tensor<Flex, 2> = numbers(3, [MR, NR]);
        let [a, b, before] = [a, b, before].map(|x| Values::of(&x).unwrap());
        let (a, _) = a.as_slice()[MR..].as_chunks();
        let (b, _) = b.as_slice()[NR..].as_chunks();
        let before: [[f32; NR]; MR] =
            std::array::from_fn(|row| before.as_slice().as_chunks().0[row]);
        let factors: [f32; NR] = std::array::from_fn(|column| column as f32 / 16.0 - 1.0);
        let check = |start: Start<'_>, compute: &dyn Fn(&mut [[f32; NR]; MR])| {
            let mut c = match start {
                Start::Zero => [[f32::NAN; NR]; MR],
                _ => before,
            };
            compute(&mut c);
            for (row, sums) in c.iter().enumerate() {
                for (column, sum) in sums.iter().enumerate() {
                    let factor = match start {
                        Start::Zero => 0.0,
                        Start::Values => 1.0,
                        Start::Scaled(factors) => factors[column],
                    };
                    let terms = a.iter().zip(b);
                    let terms = terms.map(|(a, b)| f64::from(a[row]) * f64::from(b[column]));
                    let start = f64::from(before[row][column] * factor);
                    let error = f64::from(*sum) - start - terms.sum::<f64>();
                    assert!(
                        error.abs() < 2e-5,
                        "depth {depth}, row {row}, column {column}: {error}"
                    );
                }
            }
        };
        // The best instructions of this machine.
        for start in [Start::Zero, Start::Values, Start::Scaled(&factors)] {
            check(start, &|c| micro_kernel(a, b, start, c));
        }
        for (start, accumulate) in [(Start::Zero, false), (Start::Values, true)] {
            let scalar = |c: &mut _| {
                let operation = MicroKernel {
                    a,
                    b,
                    accumulate,
                    c,
                };
                pulp::Simd::vectorize(pulp::Scalar, operation);
            };
            check(start, &scalar);
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = pulp::x86::V3::try_new() {
                check(start, &|c| {
                    avx2::micro_kernel(simd, a, b, accumulate, c);
                });
            }
        }
    }
}

#[test]
fn rows_are_transposed() {
    use micro_kernel::{MR, PanelColumn, transpose, transpose_scalar};
    let rows: [PanelColumn; MR] =
        std::array::from_fn(|row| std::array::from_fn(|column| (10 * row + column) as f32));
    let columns = transpose(rows);
    assert_eq!((columns[5][2], columns), (25.0, transpose_scalar(rows)));
}

#[test]
fn freed_memory_is_reused() {
    // So large that no other test takes the buffer.
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
fn a_unique_tensor_is_normalized_in_place() {
    let x = Values::of(&numbers::<Flex, 4>(1, [2, 6, 5, 7])).unwrap();
    let before = x.as_slice().as_ptr();
    let norm = GroupNorm {
        x: x.tensor::<4>(),
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
fn exp_and_silu_are_accurate() {
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
fn unsupported_tensors_are_returned() {
    let half = Tensor::<Flex, 1>::from_data([1.0, 2.0], (&Default::default(), DType::F16));
    assert!(Values::of(&half).is_none());
    assert!(Values::take(half).is_err());
    // Another backend's.
    let [x, weight, bias] = [2, 3, 4].map(|seed| numbers::<NdArray, 1>(seed, [5]));
    let norm = LayerNorm {
        x: x.clone(),
        weight,
        bias,
        eps: 1e-5,
    };
    let norm = norm.run().unwrap_err();
    assert_eq!(norm.x.into_data(), x.into_data());
}
