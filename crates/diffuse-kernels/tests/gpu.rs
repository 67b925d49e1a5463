//! Compares every kernel with its formula in `f64` at sampled positions, in `f32` and, if the
//! device supports it, `f16`.
//!
//! The feature `wgpu` runs on any adapter, such as Mesa's software driver; `cuda` alone runs on the
//! first CUDA device. `DIFFUSE_GPU_SIZES=full` adds the sizes of Stable Diffusion v1.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use diffuse_kernels::{
    Activation, Attention, ConcatChannels, Conv2d, ConvGeometry, Function, GroupNorm, LayerNorm,
    Linear, LinearGeglu, LinearToImage, Linears,
};
use half::f16;

#[cfg(feature = "wgpu")]
type B = burn::backend::Wgpu;
#[cfg(not(feature = "wgpu"))]
type B = burn::backend::Cuda;

/// Pseudo-random numbers in `[-1, 1)`, rounded to `dtype`; each seed gives others.
fn numbers(len: usize, seed: u64, dtype: DType) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let value = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            match dtype {
                DType::F16 => f16::from_f32(value).to_f32(),
                _ => value,
            }
        })
        .collect()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], dtype: DType) -> Tensor<B, D> {
    let data = TensorData::new(values.to_vec(), shape);
    Tensor::from_data(data, (&Default::default(), dtype))
}

fn read<const D: usize>(x: Tensor<B, D>) -> Vec<f32> {
    x.cast(DType::F32).into_data().to_vec().expect("f32 values")
}

/// `f32`, and `f16` if the device supports it.
fn dtypes() -> Vec<DType> {
    [DType::F32, DType::F16]
        .into_iter()
        .filter(|dtype| B::supports_dtype(&Default::default(), *dtype))
        .collect()
}

/// Whose values both types hold.
fn narrower(a: DType, b: DType) -> DType {
    if a == DType::F16 { a } else { b }
}

fn full() -> bool {
    std::env::var("DIFFUSE_GPU_SIZES").is_ok_and(|sizes| sizes == "full")
}

/// Compares a few thousand values at max; `expected` computes one.
#[track_caller]
fn compare(name: &str, dtype: DType, got: &[f32], expected: impl Fn(usize) -> f64) {
    let step = (got.len() / 3000).max(1);
    let step = if step > 1 { step | 1 } else { step };
    let (mut worst, mut scale) = ((0.0, 0), 0.0f64);
    for at in (0..got.len()).step_by(step) {
        let expected = expected(at);
        let difference = (f64::from(got[at]) - expected).abs();
        assert!(
            difference.is_finite(),
            "{name} {dtype:?}: {} at {at}, not {expected}",
            got[at]
        );
        scale = scale.max(expected.abs());
        if difference > worst.0 {
            worst = (difference, at);
        }
    }
    let tolerance = match dtype {
        DType::F16 => 2e-3,
        _ => 2e-5,
    };
    println!("{name} {dtype:?}: {:.1e} of {scale:.3}", worst.0);
    assert!(
        worst.0 <= tolerance * scale.max(0.1),
        "{name} {dtype:?}: {} at {}, not {}; the largest value is {scale}",
        got[worst.1],
        worst.1,
        expected(worst.1),
    );
}

#[test]
fn linear_layers() {
    let mut cases = vec![
        [1, 8, 8],
        [2, 16, 24],
        [77, 64, 40],
        [130, 320, 200],
        [64, 512, 64],
        [300, 72, 136],
        [70, 7, 3],
        [65, 36, 9],
    ];
    if full() {
        cases.extend([
            [8192, 320, 320],
            [8192, 1280, 320],
            [2048, 640, 640],
            [2048, 2560, 640],
            [512, 1280, 1280],
            [512, 5120, 1280],
            [154, 768, 640],
            [128, 1280, 1280],
            [2, 1280, 320],
        ]);
    }
    for sizes in cases {
        for dtype in dtypes() {
            check_linear(sizes, dtype, dtype);
        }
    }
}

/// With weights that are kept in another type, or in that of the input.
fn check_linear([rows, from, to]: [usize; 3], dtype: DType, kept: DType) {
    let x = numbers(rows * from, 1, dtype);
    let w = numbers(to * from, 2, narrower(dtype, kept));
    let b = numbers(to, 3, dtype);
    let r = numbers(rows * to, 4, dtype);
    let xt = tensor(&x, [rows, from], dtype);
    let wt = tensor(&w, [to, from], kept);
    let bt = tensor(&b, [to], dtype);
    let rt = tensor(&r, [rows, to], dtype);
    let product = |at: usize| {
        let (row, column) = (at / to, at % to);
        let terms = x[row * from..][..from]
            .iter()
            .zip(&w[column * from..][..from]);
        terms
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum::<f64>()
    };
    let name = format!("linear {rows} {from} {to} {kept:?}");
    let linear = Linear {
        x: xt.clone(),
        weight: wt.clone(),
        bias: None,
        residual: None,
    };
    let y = linear.run().expect("a kernel");
    compare(&name, dtype, &read(y), product);
    let linear = Linear {
        x: xt,
        weight: wt,
        bias: Some(bt),
        residual: Some(rt),
    };
    let y = linear.run().expect("a kernel");
    compare(&name, dtype, &read(y), |at| {
        product(at) + f64::from(b[at % to]) + f64::from(r[at])
    });
}

#[test]
fn several_linear_layers() {
    let mut cases = vec![(70, 64, 320, 3), (154, 96, 128, 2), (9, 32, 64, 3)];
    if full() {
        cases.extend([
            (8192, 320, 320, 3),
            (512, 1280, 1280, 3),
            (154, 768, 640, 2),
        ]);
    }
    for (rows, from, to, count) in cases {
        for dtype in dtypes() {
            match count {
                2 => check_linears::<2>([rows, from, to], dtype, dtype),
                _ => check_linears::<3>([rows, from, to], dtype, dtype),
            }
        }
    }
}

fn check_linears<const N: usize>([rows, from, to]: [usize; 3], dtype: DType, kept: DType) {
    let x = numbers(rows * from, 1, dtype);
    let w: [Vec<f32>; N] =
        std::array::from_fn(|i| numbers(to * from, 2 + i as u64, narrower(dtype, kept)));
    let linears = Linears {
        x: tensor(&x, [rows, from], dtype),
        weights: w.each_ref().map(|w| tensor(w, [to, from], kept)),
    };
    // Without tensor cores there is no kernel.
    let Ok(results) = linears.run() else {
        return;
    };
    for (y, w) in results.into_iter().zip(&w) {
        let name = format!("linears {rows} {from} {to}");
        compare(&name, dtype, &read(y), |at| {
            let terms = x[at / to * from..][..from].iter();
            let terms = terms.zip(&w[at % to * from..][..from]);
            terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        });
    }
}

#[test]
fn gated_linear_layers() {
    let mut cases = vec![[2, 5, 32, 8], [1, 70, 64, 72], [2, 100, 40, 160]];
    if full() {
        cases.extend([
            [2, 4096, 320, 1280],
            [2, 1024, 640, 2560],
            [2, 256, 1280, 5120],
            [2, 64, 1280, 5120],
        ]);
    }
    for sizes in cases {
        for dtype in dtypes() {
            check_geglu(sizes, dtype, dtype);
        }
    }
}

fn check_geglu([batch, tokens, from, to]: [usize; 4], dtype: DType, kept: DType) {
    let x = numbers(batch * tokens * from, 1, dtype);
    let w = numbers(2 * to * from, 2, narrower(dtype, kept));
    let b = numbers(2 * to, 3, dtype);
    let linear = LinearGeglu {
        x: tensor(&x, [batch, tokens, from], dtype),
        weight: tensor(&w, [2 * to, from], kept),
        bias: Some(tensor(&b, [2 * to], dtype)),
    };
    let y = linear.run().expect("a kernel");
    compare(
        &format!("geglu {batch} {tokens} {from} {to} {kept:?}"),
        dtype,
        &read(y),
        |at| {
            let (row, column) = (at / to, at % to);
            let half = |column: usize| {
                let terms = x[row * from..][..from]
                    .iter()
                    .zip(&w[column * from..][..from]);
                let sum: f64 = terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                sum + f64::from(b[column])
            };
            half(column) * gelu(half(to + column))
        },
    );
}

/// From tokens to the positions of an image.
#[test]
fn linear_layers_to_images() {
    let mut cases = vec![
        [1, 1, 1, 8, 8],
        [2, 5, 3, 24, 16],
        [3, 9, 4, 64, 40],
        [1, 7, 6, 20, 7],
    ];
    if full() {
        cases.extend([[2, 64, 64, 320, 320], [2, 16, 16, 1280, 1280]]);
    }
    for sizes in cases {
        for dtype in dtypes() {
            check_linear_to_image(sizes, dtype, dtype);
        }
    }
}

fn check_linear_to_image([batch, height, width, from, to]: [usize; 5], dtype: DType, kept: DType) {
    let tokens = height * width;
    let x = numbers(batch * tokens * from, 1, dtype);
    let w = numbers(to * from, 2, narrower(dtype, kept));
    let b = numbers(to, 3, dtype);
    let r = numbers(batch * to * tokens, 4, dtype);
    for bias in [None, Some(tensor(&b, [to], dtype))] {
        let name = format!(
            "linear to image {batch} {height}x{width} {from} {to} {kept:?}, bias: {}",
            bias.is_some()
        );
        let biased = bias.is_some();
        let linear = LinearToImage {
            x: tensor(&x, [batch, tokens, from], dtype),
            weight: tensor(&w, [to, from], kept),
            bias,
            residual: tensor(&r, [batch, to, height, width], dtype),
        };
        let y = linear.run().expect("a kernel");
        assert_eq!(y.dims(), [batch, to, height, width], "{name}");
        compare(&name, dtype, &read(y), |at| {
            let (image, channel, token) = (at / (to * tokens), at / tokens % to, at % tokens);
            let terms = x[(image * tokens + token) * from..][..from].iter();
            let terms = terms.zip(&w[channel * from..][..from]);
            let sum: f64 = terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let bias = if biased { f64::from(b[channel]) } else { 0.0 };
            sum + bias + f64::from(r[at])
        });
    }
}

/// Weights may be kept in another type than the one that is computed in.
#[test]
fn weights_of_another_type() {
    let types = dtypes();
    let pairs = types
        .iter()
        .flat_map(|x| types.iter().map(move |kept| (*x, *kept)));
    for (dtype, kept) in pairs.filter(|(dtype, kept)| dtype != kept) {
        check_linear([130, 72, 40], dtype, kept);
        check_linears::<3>([70, 64, 320], dtype, kept);
        check_geglu([2, 9, 40, 24], dtype, kept);
        check_linear_to_image([2, 5, 3, 24, 16], dtype, kept);
        check_convolution(&ConvCase::same(2, 64, 40, 9, 3), dtype, kept);
        check_convolution(&ConvCase::same(2, 40, 136, 11, 1), dtype, kept);
    }
}

/// `x Φ(x)`, with the series of the distribution function (Abramowitz & Stegun 1964, formula
/// 26.2.11).
fn gelu(x: f64) -> f64 {
    let z = x.abs().min(9.0);
    let (mut term, mut sum) = (z, z);
    for n in 1..300 {
        term *= z * z / f64::from(2 * n + 1);
        sum += term;
    }
    let above = 0.5 + sum * (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt();
    x * if x > 0.0 { above } else { 1.0 - above }
}

struct ConvCase {
    batch: usize,
    from: usize,
    to: usize,
    input: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
    output: [usize; 2],
    upsample: bool,
}

impl ConvCase {
    fn same(batch: usize, from: usize, to: usize, side: usize, kernel: usize) -> Self {
        Self {
            batch,
            from,
            to,
            input: [side; 2],
            kernel,
            stride: 1,
            padding: kernel / 2,
            output: [side; 2],
            upsample: false,
        }
    }
}

#[test]
fn convolutions() {
    let mut cases = vec![
        ConvCase::same(1, 8, 8, 5, 3),
        ConvCase::same(2, 64, 40, 9, 3),
        ConvCase::same(3, 24, 4, 7, 3),
        ConvCase::same(2, 4, 40, 9, 3),
        ConvCase::same(1, 128, 3, 9, 3),
        ConvCase::same(2, 16, 7, 9, 3),
        ConvCase::same(2, 3, 32, 6, 3),
        ConvCase::same(2, 320, 72, 8, 3),
        ConvCase::same(2, 40, 136, 11, 1),
        ConvCase {
            input: [9, 12],
            stride: 2,
            output: [5, 6],
            ..ConvCase::same(2, 32, 64, 0, 3)
        },
        ConvCase {
            input: [8, 6],
            stride: 2,
            padding: 0,
            output: [4, 3],
            ..ConvCase::same(1, 32, 16, 0, 3)
        },
        ConvCase {
            input: [5, 7],
            output: [10, 14],
            upsample: true,
            ..ConvCase::same(2, 16, 48, 0, 3)
        },
    ];
    if full() {
        for (from, to, side) in [
            (320, 320, 64),
            (960, 320, 64),
            (320, 4, 64),
            (640, 640, 32),
            (1920, 640, 32),
            (1280, 1280, 16),
            (2560, 1280, 16),
            (1280, 1280, 8),
            (2560, 1280, 8),
        ] {
            cases.push(ConvCase::same(2, from, to, side, 3));
        }
        cases.push(ConvCase::same(2, 960, 320, 64, 1));
        cases.push(ConvCase::same(1, 512, 512, 128, 3));
    }
    for case in cases {
        for dtype in dtypes() {
            check_convolution(&case, dtype, dtype);
        }
    }
}

fn check_convolution(case: &ConvCase, dtype: DType, kept: DType) {
    let &ConvCase {
        batch,
        from,
        to,
        input: [height, width],
        kernel,
        stride,
        padding,
        output: [rows, columns],
        upsample,
    } = case;
    let x = numbers(batch * from * height * width, 1, dtype);
    let w = numbers(to * from * kernel * kernel, 2, narrower(dtype, kept));
    let b = numbers(to, 3, dtype);
    let cb = numbers(batch * to, 4, dtype);
    let r = numbers(batch * to * rows * columns, 5, dtype);
    let conv = Conv2d {
        x: tensor(&x, [batch, from, height, width], dtype),
        weight: tensor(&w, [to, from, kernel, kernel], kept),
        bias: Some(tensor(&b, [to], dtype)),
        geometry: ConvGeometry {
            stride,
            padding_start: padding,
            padding_end: kernel / 2,
        },
        upsample,
        channel_bias: Some(tensor(&cb, [batch, to], dtype)),
        residual: Some(tensor(&r, [batch, to, rows, columns], dtype)),
    };
    assert_eq!(conv.output_size(), Some(case.output));
    let y = conv.run().expect("a kernel");
    let name = format!("conv {batch} {from} {to} {height}x{width} {kernel} {stride} {kept:?}");
    let factor = if upsample { 2 } else { 1 };
    compare(&name, dtype, &read(y), |at| {
        let (image, channel) = (at / (to * rows * columns), at / (rows * columns) % to);
        let (row, column) = (at / columns % rows, at % columns);
        let mut sum =
            f64::from(b[channel]) + f64::from(cb[image * to + channel]) + f64::from(r[at]);
        for dy in 0..kernel {
            for dx in 0..kernel {
                let (y, x_) = (
                    (row * stride + dy).wrapping_sub(padding),
                    (column * stride + dx).wrapping_sub(padding),
                );
                if y >= height * factor || x_ >= width * factor {
                    continue;
                }
                for c in 0..from {
                    let a = x[((image * from + c) * height + y / factor) * width + x_ / factor];
                    let w = w[((channel * from + c) * kernel + dy) * kernel + dx];
                    sum += f64::from(a) * f64::from(w);
                }
            }
        }
        sum
    });
}

#[test]
fn group_norms() {
    let mut cases = vec![
        (1, 8, 3, 3, 4),
        (2, 32, 5, 7, 8),
        (3, 40, 9, 2, 4),
        (2, 320, 16, 16, 32),
        (1, 96, 64, 33, 32),
        (2, 12, 1, 1, 3),
        (2, 2560, 4, 4, 32),
    ];
    if full() {
        cases.extend([
            (2, 320, 64, 64, 32),
            (2, 960, 64, 64, 32),
            (2, 1280, 16, 16, 32),
            (2, 2560, 8, 8, 32),
            (1, 128, 512, 512, 32),
        ]);
    }
    for (batch, channels, height, width, groups) in cases {
        for dtype in dtypes() {
            // Far from zero, where sums of squares lose precision.
            let x: Vec<f32> = numbers(batch * channels * height * width, 1, dtype)
                .into_iter()
                .map(|x| f16::from_f32(x + 8.0).to_f32())
                .collect();
            let w = numbers(channels, 2, DType::F32);
            let b = numbers(channels, 3, DType::F32);
            let len = channels / groups * height * width;
            let stats: Vec<(f64, f64)> = x
                .chunks(len)
                .map(|group| {
                    let mean = group.iter().map(|x| f64::from(*x)).sum::<f64>() / len as f64;
                    let var = group
                        .iter()
                        .map(|x| (f64::from(*x) - mean).powi(2))
                        .sum::<f64>()
                        / len as f64;
                    (mean, (var + 1e-5).sqrt())
                })
                .collect();
            for silu in [false, true] {
                let norm = GroupNorm {
                    x: tensor(&x, [batch, channels, height, width], dtype),
                    weight: tensor(&w, [channels], DType::F32),
                    bias: tensor(&b, [channels], DType::F32),
                    groups,
                    eps: 1e-5,
                    silu,
                };
                let y = norm.run().expect("a kernel");
                let name = format!("group norm {batch} {channels} {height}x{width} {groups}");
                compare(&name, dtype, &read(y), |at| {
                    let channel = at / (height * width) % channels;
                    let (mean, std) = stats[at / len];
                    let y = (f64::from(x[at]) - mean) / std * f64::from(w[channel])
                        + f64::from(b[channel]);
                    if silu { y / (1.0 + (-y).exp()) } else { y }
                });
            }
        }
    }
}

#[test]
fn layer_norms() {
    for (rows, columns) in [(1, 8), (3, 40), (9, 320), (77, 768), (20, 1280), (5, 7)] {
        for dtype in dtypes() {
            let x: Vec<f32> = numbers(rows * columns, 1, dtype)
                .into_iter()
                .map(|x| f16::from_f32(x - 3.0).to_f32())
                .collect();
            let w = numbers(columns, 2, dtype);
            let b = numbers(columns, 3, dtype);
            let norm = LayerNorm {
                x: tensor(&x, [rows, columns], dtype),
                weight: tensor(&w, [columns], dtype),
                bias: tensor(&b, [columns], dtype),
                eps: 1e-5,
            };
            let y = norm.run().expect("a kernel");
            compare(
                &format!("layer norm {rows} {columns}"),
                dtype,
                &read(y),
                |at| {
                    let row = &x[at / columns * columns..][..columns];
                    let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / columns as f64;
                    let var = row
                        .iter()
                        .map(|x| (f64::from(*x) - mean).powi(2))
                        .sum::<f64>()
                        / columns as f64;
                    (f64::from(x[at]) - mean) / (var + 1e-5).sqrt() * f64::from(w[at % columns])
                        + f64::from(b[at % columns])
                },
            );
        }
    }
}

#[test]
fn activations() {
    for len in [1, 7, 64, 1000] {
        for dtype in dtypes() {
            let x: Vec<f32> = numbers(len, 1, dtype)
                .into_iter()
                .map(|x| x * 8.0)
                .collect();
            let apply = |function| {
                let x = tensor(&x, [len], dtype);
                read(Activation { x, function }.run().expect("a kernel"))
            };
            compare("silu", dtype, &apply(Function::Silu), |at| {
                let x = f64::from(x[at]);
                x / (1.0 + (-x).exp())
            });
            compare("gelu", dtype, &apply(Function::Gelu), |at| {
                gelu(f64::from(x[at]))
            });
            compare("quick gelu", dtype, &apply(Function::QuickGelu), |at| {
                let x = f64::from(x[at]);
                x / (1.0 + (-1.702 * x).exp())
            });
        }
    }
}

#[test]
fn concatenations() {
    for (batch, a_channels, b_channels, side) in [(1, 8, 8, 3), (2, 40, 24, 5), (3, 5, 3, 4)] {
        for dtype in dtypes() {
            let a = numbers(batch * a_channels * side * side, 1, dtype);
            let b = numbers(batch * b_channels * side * side, 2, dtype);
            let concat = ConcatChannels {
                a: tensor(&a, [batch, a_channels, side, side], dtype),
                b: tensor(&b, [batch, b_channels, side, side], dtype),
            };
            let y = concat.run().expect("a kernel");
            let (area, channels) = (side * side, a_channels + b_channels);
            compare("concat", dtype, &read(y), |at| {
                let (image, channel, pixel) =
                    (at / (channels * area), at / area % channels, at % area);
                f64::from(if channel < a_channels {
                    a[(image * a_channels + channel) * area + pixel]
                } else {
                    b[(image * b_channels + channel - a_channels) * area + pixel]
                })
            });
        }
    }
}

#[test]
fn attentions() {
    // Batch, queries, keys, heads, size of a head, causal.
    let mut cases = vec![
        (1, 5, 5, 1, 8, false),
        (2, 70, 77, 2, 40, false),
        (3, 64, 130, 2, 16, false),
        (1, 77, 77, 3, 64, true),
        (2, 20, 33, 1, 160, false),
        (2, 9, 7, 3, 6, false),
        (1, 9, 9, 2, 5, true),
        (2, 9, 16, 1, 192, false),
        (1, 40, 40, 1, 512, false),
        (2, 100, 100, 2, 24, true),
    ];
    if full() {
        cases.extend([
            (2, 4096, 4096, 8, 40, false),
            (2, 4096, 77, 8, 40, false),
            (2, 1024, 1024, 8, 80, false),
            (2, 256, 256, 8, 160, false),
            (1, 4096, 4096, 1, 512, false),
        ]);
    }
    for (batch, queries, keys, heads, size, causal) in cases {
        for dtype in dtypes() {
            let width = heads * size;
            let q: Vec<f32> = numbers(batch * queries * width, 1, dtype)
                .into_iter()
                .map(|q| q * 2.0)
                .collect();
            let k = numbers(batch * keys * width, 2, dtype);
            let v = numbers(batch * keys * width, 3, dtype);
            let attention = Attention {
                query: tensor(&q, [batch, queries, width], dtype),
                key: tensor(&k, [batch, keys, width], dtype),
                value: tensor(&v, [batch, keys, width], dtype),
                heads,
                causal,
            };
            let y = attention.run().expect("a kernel");
            compare(
                &format!("attention {batch} {queries} {keys} {heads} {size} {causal}"),
                dtype,
                &read(y),
                |at| {
                    let (image, query, column) =
                        (at / (queries * width), at / width % queries, at % width);
                    let head = column / size;
                    let q = &q[(image * queries + query) * width + head * size..][..size];
                    let last = if causal { (query + 1).min(keys) } else { keys };
                    let scores: Vec<f64> = (0..last)
                        .map(|key| {
                            let k = &k[(image * keys + key) * width + head * size..][..size];
                            let sum: f64 = q
                                .iter()
                                .zip(k)
                                .map(|(q, k)| f64::from(*q) * f64::from(*k))
                                .sum();
                            sum / (size as f64).sqrt()
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let weights: Vec<f64> =
                        scores.iter().map(|score| (score - max).exp()).collect();
                    let values =
                        (0..last).map(|key| f64::from(v[(image * keys + key) * width + column]));
                    values.zip(&weights).map(|(v, w)| v * w).sum::<f64>()
                        / weights.iter().sum::<f64>()
                },
            );
        }
    }
}
