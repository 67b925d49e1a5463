//! The CPU's kernels beside burn's operations, which `NdArray` computes with.

use std::any::TypeId;

use burn::tensor::{DType, ElementConversion, Tensor, TensorData, Tolerance, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use diffuse_kernels::{Attention, Conv2d, Linear, LinearGeglu, LinearToImage};
use diffuse_nn::ops::{self, ConvGeometry};

/// Terms that a kernel adds at once.
const DEPTH: usize = 4096;

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

/// That a kernel takes an operation on `Flex`, and on nothing else.
#[track_caller]
fn check_taken<B: Backend, T, E>(result: Result<T, E>) {
    assert_eq!(result.is_ok(), TypeId::of::<B>() == TypeId::of::<Flex>());
}

/// Fills the memory that the next results are written to, so that what is read before it is written
/// shows.
fn leave_nan_in_the_pool() {
    let sizes = (12..22).map(|power| 1_usize << power);
    let tensors = sizes.map(|size| {
        let nan = Tensor::<Flex, 1>::full([size], f32::NAN, &Default::default());
        ops::silu(nan)
    });
    drop(tensors.collect::<Vec<_>>());
}

/// Runs a test on one thread, and on more: how work is split depends on how many there are.
fn on_threads(test: impl Fn() + Sync) {
    for threads in [1, 2, 16] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        leave_nan_in_the_pool();
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

fn convolution<B: Backend>(
    x: &Tensor<B, 4>,
    weight: &Tensor<B, 4>,
    bias: &Option<Tensor<B, 1>>,
    geometry: ConvGeometry,
) -> Conv2d<B> {
    Conv2d {
        x: x.clone(),
        weight: weight.clone(),
        bias: bias.clone(),
        geometry,
        upsample: false,
        channel_bias: None,
        residual: None,
    }
}

fn layer<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    weight: &Tensor<B, 2>,
    bias: &Option<Tensor<B, 1>>,
) -> Linear<B, D> {
    Linear {
        x: x.clone(),
        weight: weight.clone(),
        bias: bias.clone(),
        residual: None,
    }
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
            check_taken::<B, _, _>(convolution(&x, &weight, &bias, geometry).run());
            let size = [height, width].map(|size| geometry.output(size, kernel).unwrap());
            let shape = [batch, outputs, size[0], size[1]];
            residual.apply(shape, |residual| match residual {
                None => ops::conv2d(x, weight, bias, geometry),
                Some(residual) => ops::conv2d_add(x, weight, bias, geometry, residual),
            })
        }
        for shape in IMAGES {
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
            let attention = Attention {
                query: query.clone(),
                key: key.clone(),
                value: value.clone(),
                heads,
                causal: is_causal,
            };
            check_taken::<B, _, _>(attention.run());
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
            for scale in [1.0, 5.0, 50.0] {
                let fast = attend::<Flex>(shape, scale, false).into_data();
                let portable = attend::<NdArray>(shape, scale, false).into_data();
                check_close(fast, portable, 2e-5);
            }
        }
        for shape in [[1, 1, 1, 1, 1], [2, 77, 77, 3, 20], [1, 300, 300, 2, 7]] {
            for scale in [1.0, 5.0, 50.0] {
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
            check_taken::<B, _, _>(layer(&x, &weight, &bias).run());
            residual.apply([2, rows, d_output], |residual| match residual {
                None => ops::linear(x, weight, bias),
                Some(residual) => ops::linear_add(x, weight, bias, residual),
            })
        }
        // The last has more terms than are added at once.
        let long = DEPTH + 52;
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
fn linear_layers_to_an_image() {
    on_threads(|| {
        fn apply<B: Backend>(
            [height, width, d_input]: [usize; 3],
            bias: bool,
            residual: Residual,
        ) -> Tensor<B, 4> {
            let bias = bias.then(|| numbers(3, [19]));
            let x = numbers::<B, 3>(1, [2, height * width, d_input]);
            let weight = numbers(2, [19, d_input]) * fan_in(d_input, 1);
            let image = numbers(4, [2, 19, height, width]);
            let layer = LinearToImage {
                x: x.clone(),
                weight: weight.clone(),
                bias: bias.clone(),
                residual: image,
            };
            check_taken::<B, _, _>(layer.run());
            residual.apply([2, 19, height, width], |residual| {
                ops::linear_to_image(x, weight, bias, residual.unwrap())
            })
        }
        for shape in [[1, 1, 7], [5, 9, 33], [8, 4, DEPTH + 52]] {
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
            let layer = LinearGeglu {
                x: x.clone(),
                weight: weight.clone(),
                bias: bias.clone(),
            };
            check_taken::<B, _, _>(layer.run());
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
                layer(&x, &weight, &Some(bias)).run().unwrap()
            });
        }
        for [outputs, inputs, tokens] in [[19, 33, 3], [1400, 1500, 1030]] {
            check([2 * outputs, inputs], dtype, |weight| {
                let x = numbers::<Flex, 3>(1, [1, tokens, inputs]);
                let bias = numbers(3, [2 * outputs]);
                let bias = Some(bias);
                LinearGeglu { x, weight, bias }.run().unwrap()
            });
        }
        let images = IMAGES.into_iter().chain([[1, 500, 600, 5, 4]]);
        for [batch, channels, outputs, height, width] in images {
            for (kernel, stride) in [(1, 1), (3, 1), (3, 2)] {
                let geometry = ConvGeometry {
                    stride,
                    ..ConvGeometry::same(kernel)
                };
                check([outputs, channels, kernel, kernel], dtype, |weight| {
                    let x = numbers::<Flex, 4>(1, [batch, channels, height, width]);
                    let bias = numbers(3, [outputs]);
                    let convolution = convolution(&x, &weight, &Some(bias), geometry);
                    convolution.run().unwrap()
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
    let x = numbers::<Flex, 2>(1, [3, 8]);
    let none = Tensor::zeros([0, 8], &device);
    assert_eq!(ops::linear(x, none, None).dims(), [3, 0]);
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
fn networks_run_on_a_worker_on_the_cpu_only() {
    let is_worker = || rayon::current_thread_index().is_some();
    assert!(ops::on_worker::<Flex, _>(is_worker));
    assert!(!ops::on_worker::<NdArray, _>(is_worker));
}

#[test]
fn convolutions_with_a_channel_bias_and_of_enlarged_images() {
    fn convolve<B: Backend>(upsample: bool) -> Tensor<B, 4> {
        let (x, weight) = (
            numbers::<B, 4>(1, [2, 17, 23, 31]),
            numbers(2, [33, 17, 3, 3]),
        );
        let (weight, bias) = (weight * fan_in(17, 3), Some(numbers(3, [33])));
        if upsample {
            ops::upsample_conv2d(x, weight, bias)
        } else {
            let geometry = ConvGeometry::same(3);
            ops::conv2d_channel_bias(x, weight, bias, geometry, numbers(4, [2, 33]))
        }
    }
    for upsample in [false, true] {
        let fast = convolve::<Flex>(upsample).into_data();
        check_close(fast, convolve::<NdArray>(upsample).into_data(), 2e-5);
    }
}

#[test]
fn pooled_memory_is_freed_on_request() {
    let silu = || ops::silu(numbers::<Flex, 1>(1, [100_000]));
    let before = silu().into_data();
    ops::free_pooled_memory();
    silu().into_data().assert_eq(&before, true);
}
