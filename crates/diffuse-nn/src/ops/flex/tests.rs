//! The fast bodies against the ones in burn's operations, which `NdArray` runs.

use std::any::TypeId;

use burn::tensor::{ElementConversion, TensorData, Tolerance};
use burn_ndarray::NdArray;

use super::weights::Weights;
use super::*;
use crate::ops::{self, ConvGeometry};

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

/// That a fast body computes on `Flex`, and on nothing else.
#[track_caller]
fn check_taken<B: Backend, T>(fast: Option<T>) {
    assert_eq!(fast.is_some(), TypeId::of::<B>() == TypeId::of::<Flex>());
}

/// Runs a test on one thread, and on more: how work is split depends on how many there are.
fn on_threads(test: impl Fn() + Sync) {
    for threads in [1, 2, 16] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(&test);
    }
}

/// What a layer's result is added to.
#[derive(Clone, Copy, Debug)]
enum Residual {
    None,
    /// Nobody else has it.
    Own,
    Shared,
}

impl Residual {
    const ALL: [Self; 3] = [Self::None, Self::Own, Self::Shared];

    /// The result of a layer that is given a residual; one that somebody else has is not changed.
    #[track_caller]
    fn apply<B: Backend, const D: usize>(
        self,
        shape: [usize; D],
        layer: impl FnOnce(Option<Tensor<B, D>>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let residual = numbers::<B, D>(9, shape);
        match self {
            Residual::None => layer(None),
            Residual::Own => layer(Some(residual)),
            Residual::Shared => {
                let result = layer(Some(residual.clone()));
                check_close(
                    residual.into_data(),
                    numbers::<B, D>(9, shape).into_data(),
                    0.0,
                );
                result
            }
        }
    }
}

/// `[batch, channels, outputs, height, width]`: sizes that are no multiples of anything, and such as networks have.
const PICTURES: [[usize; 5]; 7] = [
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
fn convolutions() {
    on_threads(|| {
        fn convolve<B: Backend>(
            [batch, channels, outputs, height, width]: [usize; 5],
            kernel: usize,
            geometry: ConvGeometry,
            bias: bool,
            residual: Residual,
        ) -> Tensor<B, 4> {
            let x = numbers(1, [batch, channels, height, width]);
            let weight = numbers(2, [outputs, channels, kernel, kernel]) * fan_in(channels, kernel);
            let bias = bias.then(|| numbers(3, [outputs]));
            check_taken::<B, _>(super::conv2d(&x, &weight, bias.as_ref(), geometry, None).ok());
            let size = [height, width].map(|size| geometry.output(size, kernel).unwrap());
            let shape = [batch, outputs, size[0], size[1]];
            residual.apply(shape, |residual| match residual {
                None => ops::conv2d(x, weight, bias, geometry),
                Some(residual) => ops::conv2d_add(x, weight, bias, geometry, residual),
            })
        }
        for shape in PICTURES {
            let halving = |stride, padding_start| ConvGeometry {
                stride,
                padding_start,
                padding_end: 1,
            };
            let same = [1, 3].map(|kernel| (kernel, ConvGeometry::same(kernel)));
            // The last by more than the kernel sees.
            let halvings =
                [halving(2, 0), halving(2, 1), halving(5, 1)].map(|halving| (3, halving));
            for (kernel, geometry) in same.into_iter().chain(halvings) {
                if shape[3..]
                    .iter()
                    .any(|size| geometry.output(*size, kernel).is_none())
                {
                    continue;
                }
                for (bias, residual) in [false, true, true].into_iter().zip(Residual::ALL) {
                    let fast = convolve::<Flex>(shape, kernel, geometry, bias, residual);
                    let portable = convolve::<NdArray>(shape, kernel, geometry, bias, residual);
                    check_close(fast.into_data(), portable.into_data(), 2e-5);
                }
            }
        }
    });
}

#[test]
fn each_way_of_a_3x3_convolution() {
    on_threads(|| {
        // The last has more squares than are transformed at once, and more outputs than a task.
        let more = [[1, 512, 70, 88, 90]];
        for [batch, channels, outputs, height, width] in PICTURES.into_iter().chain(more) {
            let x: Tensor<Flex, 4> = numbers(1, [batch, channels, height, width]);
            let weight: Tensor<Flex, 4> =
                numbers(2, [outputs, channels, 3, 3]) * fan_in(channels, 3);
            let bias: Tensor<Flex, 1> = numbers(3, [outputs]);
            let [x, weight, bias] = [
                Values::of(&x).unwrap(),
                Values::of(&weight).unwrap(),
                Values::of(&bias).unwrap(),
            ];
            let pictures = conv::Pictures {
                values: x.as_slice(),
                batch,
                channels,
                height,
                width,
            };
            let size = batch * outputs * height * width;
            let (weight, bias) = (Weights::F32(weight.as_slice()), bias.as_slice());
            let filters = matrix::Rows::new(weight, 9 * channels);
            let (geometry, picture) = (ConvGeometry::same(3), [height, width]);
            for onto in [false, true] {
                let made = |way: &dyn Fn(conv::Outputs<'_>)| {
                    let mut values = match onto {
                        true => numbers::<Flex, 1>(9, [size])
                            .into_data()
                            .into_vec()
                            .unwrap(),
                        false => vec![f32::NAN; size],
                    };
                    way(conv::Outputs {
                        values: &mut values,
                        onto,
                    });
                    TensorData::new(values, [size])
                };
                let columns =
                    made(&|out| conv::as_columns(pictures, weight, bias, geometry, picture, out));
                let squares = made(&|out| winograd::by_squares(pictures, filters, bias, out));
                let outputs = made(&|out| winograd::by_outputs(pictures, filters, bias, out));
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
fn rows_are_turned_to_columns() {
    use kernel::{Column, ROWS, turn, turn_lanes};
    let rows: [Column; ROWS] =
        std::array::from_fn(|row| std::array::from_fn(|column| (10 * row + column) as f32));
    let columns = turn(rows);
    assert_eq!((columns[5][2], columns), (25.0, turn_lanes(rows)));
}

#[test]
fn memory_is_used_again() {
    // So large that no other test, beside this one, would take it.
    let len = 20_000_001;
    let mut room = Room::new(len);
    room.fill(1.0);
    let before = room.as_ptr();
    let x: Tensor<Flex, 1> = tensor(room, [len]);
    let other = Room::new(len);
    assert_ne!(other.as_ptr(), before);
    let some = x.clone().narrow(0, len - 3, 3);
    assert_eq!(some.sum().into_scalar(), 3.0);
    drop(x);
    let again = Room::new(len);
    assert_eq!(again.as_ptr(), before);
    assert_eq!(again.as_ptr().addr() % 64, 0);
}

#[test]
fn norms() {
    for [batch, channels, height, width] in [[2, 6, 5, 7], [1, 8, 1, 1], [3, 64, 33, 64]] {
        fn group<B: Backend>(shape: [usize; 4], activate: bool) -> Tensor<B, 4> {
            // Off 0, where a mean of squares would lose digits.
            let x = numbers::<B, 4>(1, shape) + 3.0;
            let (weight, bias) = (numbers(2, [shape[1]]), numbers(3, [shape[1]]));
            let norm = if activate {
                ops::group_norm_silu
            } else {
                ops::group_norm
            };
            // Both what others have, too, and what they have not.
            let y = norm(x.clone(), weight.clone(), bias.clone(), 2, 1e-5);
            let difference = y.clone() - norm(x, weight, bias, 2, 1e-5);
            assert_eq!(difference.abs().max().into_scalar().elem::<f32>(), 0.0);
            y
        }
        let shape = [batch, channels, height, width];
        for activate in [false, true] {
            let fast = group::<Flex>(shape, activate).into_data();
            check_close(fast, group::<NdArray>(shape, activate).into_data(), 1e-5);
        }
        fn layer<B: Backend>(shape: [usize; 4]) -> Tensor<B, 4> {
            let (weight, bias) = (numbers(2, [shape[3]]), numbers(3, [shape[3]]));
            ops::layer_norm(numbers(1, shape), weight, bias, 1e-5)
        }
        let fast = layer::<Flex>(shape).into_data();
        check_close(fast, layer::<NdArray>(shape).into_data(), 1e-5);
    }
}

#[test]
fn what_nobody_else_has_is_normalized_in_place() {
    let x = Values::of(&numbers::<Flex, 4>(1, [2, 6, 5, 7])).unwrap();
    let before = x.as_slice().as_ptr();
    let y = ops::group_norm(
        x.tensor::<Flex, 4>(),
        numbers(2, [6]),
        numbers(3, [6]),
        2,
        1e-5,
    );
    assert_eq!(Values::of(&y).unwrap().as_slice().as_ptr(), before);
}

#[test]
fn attention_in_blocks() {
    on_threads(|| {
        fn attend<B: Backend>(
            [batch, tokens, context, heads, d]: [usize; 5],
            scale: f32,
            is_causal: bool,
        ) -> Tensor<B, 3> {
            let inner = heads * d;
            let query = numbers::<B, 3>(1, [batch, tokens, inner]) * scale;
            let [key, value] = [2, 3].map(|seed| numbers(seed, [batch, context, inner]));
            check_taken::<B, _>(super::attention(&query, &key, &value, heads, is_causal));
            if is_causal {
                ops::causal_attention(query, key, value, heads)
            } else {
                ops::attention(query, key, value, heads)
            }
        }
        for shape in [
            [1, 1, 1, 1, 1],
            [2, 7, 5, 3, 4],
            [1, 130, 77, 2, 40],
            [2, 300, 700, 1, 20],
            [1, 40, 300, 1, 150],
        ] {
            // With a large scale, the first block's largest score is not the last's.
            for scale in [1.0, 50.0] {
                let fast = attend::<Flex>(shape, scale, false).into_data();
                let portable = attend::<NdArray>(shape, scale, false).into_data();
                check_close(fast, portable, 2e-5);
            }
        }
        for shape in [[1, 1, 1, 1, 1], [2, 77, 77, 3, 20], [1, 300, 300, 2, 7]] {
            for scale in [1.0, 50.0] {
                let fast = attend::<Flex>(shape, scale, true).into_data();
                let portable = attend::<NdArray>(shape, scale, true).into_data();
                check_close(fast, portable, 2e-5);
            }
        }
    });
}

#[test]
fn linear_layers() {
    on_threads(|| {
        fn apply<B: Backend>(
            [rows, d_input, d_output]: [usize; 3],
            bias: bool,
            residual: Residual,
        ) -> Tensor<B, 3> {
            let bias = bias.then(|| numbers(3, [d_output]));
            let x = numbers::<B, 3>(1, [2, rows, d_input]);
            let weight = numbers(2, [d_output, d_input]) * fan_in(d_input, 1);
            check_taken::<B, _>(super::linear(&x, &weight, bias.as_ref(), None).ok());
            residual.apply([2, rows, d_output], |residual| match residual {
                None => ops::linear(x, weight, bias),
                Some(residual) => ops::linear_add(x, weight, bias, residual),
            })
        }
        // The last has more terms than are added at once.
        let long = matrix::DEPTH + 52;
        for shape in [[1, 33, 19], [3, 33, 19], [100, 33, 19], [5, long, 40]] {
            for (bias, residual) in [false, true, true].into_iter().zip(Residual::ALL) {
                let fast = apply::<Flex>(shape, bias, residual).into_data();
                let portable = apply::<NdArray>(shape, bias, residual).into_data();
                check_close(fast, portable, 1e-5);
            }
        }
    });
}

#[test]
fn linear_layers_to_a_picture() {
    on_threads(|| {
        fn apply<B: Backend>(
            [height, width, d_input]: [usize; 3],
            bias: bool,
            residual: Residual,
        ) -> Tensor<B, 4> {
            let bias = bias.then(|| numbers(3, [19]));
            let x = numbers::<B, 3>(1, [2, height * width, d_input]);
            let weight = numbers(2, [19, d_input]) * fan_in(d_input, 1);
            let picture = numbers(4, [2, 19, height, width]);
            check_taken::<B, _>(super::linear_to_image(&x, &weight, bias.as_ref(), picture).ok());
            residual.apply([2, 19, height, width], |residual| {
                ops::linear_to_image(x, weight, bias, residual.unwrap())
            })
        }
        for shape in [[1, 1, 7], [5, 9, 33], [8, 4, matrix::DEPTH + 52]] {
            for (bias, residual) in [(false, Residual::Own), (true, Residual::Shared)] {
                let fast = apply::<Flex>(shape, bias, residual).into_data();
                let portable = apply::<NdArray>(shape, bias, residual).into_data();
                check_close(fast, portable, 1e-5);
            }
        }
    });
}

#[test]
fn gated_layers() {
    on_threads(|| {
        fn apply<B: Backend>(rows: usize, bias: bool) -> Tensor<B, 3> {
            let bias = bias.then(|| numbers(3, [38]));
            let (x, weight) = (numbers::<B, 3>(1, [2, rows, 33]), numbers(2, [38, 33]));
            check_taken::<B, _>(super::linear_geglu(&x, &weight, bias.as_ref()));
            ops::linear_geglu(x, weight, bias)
        }
        // The last are more rows than are computed at once.
        for rows in [1, 3, 700] {
            for bias in [false, true] {
                let fast = apply::<Flex>(rows, bias).into_data();
                check_close(fast, apply::<NdArray>(rows, bias).into_data(), 2e-5);
            }
        }
    });
}

#[test]
fn weights_in_half_precision_are_widened() {
    /// As with the same weights in `f32`: what is computed is the same, but for the order of sums.
    fn check<const W: usize, const D: usize>(
        weight: [usize; W],
        dtype: DType,
        apply: impl Fn(Tensor<Flex, W>) -> Tensor<Flex, D>,
    ) {
        let fan_in = weight[1..].iter().product::<usize>() as f32;
        let weight = (numbers::<Flex, W>(2, weight) * fan_in.powf(-0.5)).cast(dtype);
        let expected = apply(weight.clone().cast(DType::F32));
        check_close(apply(weight).into_data(), expected.into_data(), 1e-5);
    }
    for dtype in [DType::F16, DType::BF16] {
        // The last of each are more than are widened at once.
        for [outputs, inputs] in [[19, 33], [1, 1], [1500, 3000]] {
            check([outputs, inputs], dtype, |weight| {
                let (x, bias) = (numbers::<Flex, 2>(1, [3, inputs]), numbers(3, [outputs]));
                super::linear(&x, &weight, Some(&bias), None).unwrap()
            });
        }
        for [outputs, inputs, tokens] in [[19, 33, 3], [1400, 1500, 1030]] {
            check([2 * outputs, inputs], dtype, |weight| {
                let x = numbers::<Flex, 3>(1, [1, tokens, inputs]);
                let bias = numbers(3, [2 * outputs]);
                super::linear_geglu(&x, &weight, Some(&bias)).unwrap()
            });
        }
        let pictures = PICTURES.into_iter().chain([[1, 500, 600, 5, 4]]);
        for [batch, channels, outputs, height, width] in pictures {
            for (kernel, stride) in [(1, 1), (3, 1), (3, 2)] {
                let geometry = ConvGeometry {
                    stride,
                    ..ConvGeometry::same(kernel)
                };
                check([outputs, channels, kernel, kernel], dtype, |weight| {
                    let x = numbers::<Flex, 4>(1, [batch, channels, height, width]);
                    let bias = numbers(3, [outputs]);
                    super::conv2d(&x, &weight, Some(&bias), geometry, None).unwrap()
                });
            }
        }
    }
}

#[test]
fn elementwise() {
    fn wide<B: Backend>() -> Tensor<B, 3> {
        numbers::<B, 3>(1, [3, 101, 66]) * 6.0
    }
    check_close(
        ops::silu(wide::<Flex>()).into_data(),
        ops::silu(wide::<NdArray>()).into_data(),
        1e-6,
    );
    check_close(
        ops::gelu(wide::<Flex>()).into_data(),
        ops::gelu(wide::<NdArray>()).into_data(),
        1e-6,
    );
    check_close(
        ops::quick_gelu(wide::<Flex>()).into_data(),
        ops::quick_gelu(wide::<NdArray>()).into_data(),
        1e-6,
    );
    let shape = [2, 5, 9, 33];
    check_close(
        ops::add_channel_bias(numbers::<Flex, 4>(1, shape), numbers(2, [2, 5])).into_data(),
        ops::add_channel_bias(numbers::<NdArray, 4>(1, shape), numbers(2, [2, 5])).into_data(),
        0.0,
    );
    check_close(
        ops::image_to_tokens(numbers::<Flex, 4>(1, shape)).into_data(),
        ops::image_to_tokens(numbers::<NdArray, 4>(1, shape)).into_data(),
        0.0,
    );
    check_close(
        ops::concat_channels(numbers::<Flex, 4>(1, shape), numbers(2, [2, 3, 9, 33])).into_data(),
        ops::concat_channels(numbers::<NdArray, 4>(1, shape), numbers(2, [2, 3, 9, 33]))
            .into_data(),
        0.0,
    );
    check_close(
        ops::upsample_nearest(numbers::<Flex, 4>(1, shape), [18, 66]).into_data(),
        ops::upsample_nearest(numbers::<NdArray, 4>(1, shape), [18, 66]).into_data(),
        0.0,
    );
}

#[test]
fn views_are_read_as_they_are_seen() {
    fn norm<B: Backend>() -> Tensor<B, 3> {
        let x = numbers::<B, 3>(1, [4, 9, 6])
            .swap_dims(1, 2)
            .narrow(0, 1, 2);
        let [weight, bias] = [2, 3].map(|seed| numbers::<B, 1>(seed, [20]).narrow(0, 5, 9));
        ops::silu(ops::layer_norm(x, weight, bias, 1e-5).narrow(1, 1, 4))
    }
    let fast = norm::<Flex>().into_data();
    check_close(fast, norm::<NdArray>().into_data(), 1e-5);
}

#[test]
fn what_is_empty_stays_empty() {
    let device = Default::default();
    let x = Tensor::<Flex, 4>::zeros([0, 4, 8, 8], &device);
    let [weight, bias] = [2, 3].map(|seed| numbers::<Flex, 1>(seed, [4]));
    let x = ops::group_norm_silu(x, weight, bias, 2, 1e-5);
    let x = ops::add_channel_bias(x, Tensor::zeros([0, 4], &device));
    assert_eq!(ops::image_to_tokens(x).dims(), [0, 64, 4]);
}

#[test]
fn a_tensor_that_someone_else_has_is_not_changed() {
    let x: Tensor<Flex, 4> = numbers(1, [1, 2, 3, 3]);
    let before = x.clone().into_data();
    let changed = ops::silu(x.clone());
    let moved = ops::add_channel_bias(x.clone(), numbers(2, [1, 2]));
    let normal = ops::group_norm(x.clone(), numbers(2, [2]), numbers(3, [2]), 1, 1e-5);
    x.into_data().assert_eq(&before, true);
    assert_ne!(changed.into_data(), before);
    assert_ne!(moved.into_data(), before);
    assert_ne!(normal.into_data(), before);
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
fn networks_run_on_a_worker_on_the_cpu_only() {
    let is_worker = || rayon::current_thread_index().is_some();
    assert!(ops::on_worker::<Flex, _>(is_worker));
    assert!(!ops::on_worker::<NdArray, _>(is_worker));
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
