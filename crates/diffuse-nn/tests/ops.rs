//! Operations against plain loops, and in half precision at the edge of its range.

use burn::tensor::{DType, Distribution, Tensor, TensorData, Tolerance, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use diffuse_nn::ops;

fn random<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
    // The same numbers on each backend.
    let device = Default::default();
    let values = Tensor::<Flex, D>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    Tensor::from_data(values.into_data(), &B::Device::default())
}

fn values<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Vec<f64> {
    x.to_data().iter().collect()
}

#[track_caller]
fn check<B: Backend, const D: usize>(got: Tensor<B, D>, expected: Vec<f64>) {
    let expected: Vec<f32> = expected.into_iter().map(|value| value as f32).collect();
    let expected = TensorData::new(expected, got.dims());
    got.into_data()
        .assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-5));
}

fn group_norm_is_the_formula<B: Backend>() {
    let [batch, channels, height, width, groups] = [2, 6, 3, 5, 3];
    let x = random::<B, 4>([batch, channels, height, width]) * 3.0 + 1.0;
    let (weight, bias) = (random::<B, 1>([channels]), random::<B, 1>([channels]));
    let (xs, weights, biases) = (values(&x), values(&weight), values(&bias));
    let size = channels / groups * height * width;
    let mut expected = vec![0.0; xs.len()];
    for group in 0..batch * groups {
        let members = group * size..(group + 1) * size;
        let mean = xs[members.clone()].iter().sum::<f64>() / size as f64;
        let squares = xs[members.clone()].iter().map(|x| (x - mean).powi(2));
        let std = (squares.sum::<f64>() / size as f64 + 1e-5).sqrt();
        for index in members {
            let channel = index / (height * width) % channels;
            expected[index] = (xs[index] - mean) / std * weights[channel] + biases[channel];
        }
    }
    check(ops::group_norm(x, weight, bias, groups, 1e-5), expected);
}

fn attention_is_the_formula<B: Backend>(causal: bool) {
    let [batch, tokens, context, heads, d] = [2, 5, if causal { 5 } else { 7 }, 3, 4];
    let query = random::<B, 3>([batch, tokens, heads * d]);
    let key = random::<B, 3>([batch, context, heads * d]);
    let value = random::<B, 3>([batch, context, heads * d]);
    let (qs, ks, vs) = (values(&query), values(&key), values(&value));
    let at = |row: usize, length: usize, token: usize, head: usize, i: usize| {
        ((row * length + token) * heads + head) * d + i
    };
    let mut expected = vec![0.0; qs.len()];
    for row in 0..batch {
        for head in 0..heads {
            for token in 0..tokens {
                let seen = if causal { token + 1 } else { context };
                let score = |other: usize| {
                    let product = |i| {
                        qs[at(row, tokens, token, head, i)] * ks[at(row, context, other, head, i)]
                    };
                    (0..d).map(product).sum::<f64>() / (d as f64).sqrt()
                };
                let weights: Vec<f64> = (0..seen).map(|other| score(other).exp()).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..d {
                    let parts = weights.iter().enumerate();
                    let sum = parts.map(|(other, w)| w * vs[at(row, context, other, head, i)]);
                    expected[at(row, tokens, token, head, i)] = sum.sum::<f64>() / total;
                }
            }
        }
    }
    let got = if causal {
        ops::causal_attention(query, key, value, heads)
    } else {
        ops::attention(query, key, value, heads)
    };
    check(got, expected);
}

#[test]
fn operations_are_their_formulas() {
    group_norm_is_the_formula::<Flex>();
    group_norm_is_the_formula::<NdArray>();
    for causal in [false, true] {
        attention_is_the_formula::<Flex>(causal);
        attention_is_the_formula::<NdArray>(causal);
    }
}

#[test]
fn attention_in_chunks_is_the_same() {
    // 2 · 3000 · 3000 scores do not fit at once. `Flex` has another way.
    let [tokens, heads, d] = [3000, 2, 4];
    let x = || random::<NdArray, 3>([1, tokens, heads * d]);
    let (query, key, value) = (x(), x(), x());
    let whole = ops::attention(query.clone(), key.clone(), value.clone(), heads);
    let last = query.narrow(1, tokens - 2, 2);
    let expected = ops::attention(last, key, value, heads);
    whole
        .narrow(1, tokens - 2, 2)
        .into_data()
        .assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-5));
}

#[test]
fn enlarging_repeats_the_nearest_position() {
    let row = Tensor::<Flex, 4>::from_data([[[[1.0f32, 2.0, 3.0]]]], &Default::default());
    let enlarged = |width| values(&ops::upsample_nearest(row.clone(), [1, width]));
    assert_eq!(enlarged(5), [1.0, 1.0, 2.0, 2.0, 3.0]);
    let doubled = ops::upsample_nearest(row.clone(), [2, 6]);
    assert_eq!(values(&doubled), [1.0, 1.0, 2.0, 2.0, 3.0, 3.0].repeat(2));
}

#[test]
fn halving_averages_and_leaves_out_a_last_odd_row_and_column() {
    let numbers = (0..15u8).map(f32::from).collect();
    let x = TensorData::new(numbers, [1, 1, 3, 5]);
    for dtype in [DType::F32, DType::F16] {
        let x = Tensor::<Flex, 4>::from_data(x.clone(), &Default::default()).cast(dtype);
        let halved = ops::downsample_mean(x);
        assert_eq!(halved.dtype(), dtype);
        assert_eq!(halved.dims(), [1, 1, 1, 2]);
        assert_eq!(values(&halved), [3.0, 5.0]);
    }
}

#[test]
fn half_precision_neither_overflows_nor_loses_small_differences() {
    let device = Default::default();
    // Squares of 300 exceed the range of f16, and so does a sum of many values.
    let x = random::<Flex, 4>([1, 4, 32, 32]) * 300.0;
    let ones = Tensor::<Flex, 1>::ones([4], &device);
    let zeros = Tensor::<Flex, 1>::zeros([4], &device);
    let expected = ops::group_norm(x.clone(), ones.clone(), zeros.clone(), 2, 1e-6);
    let half = |x: Tensor<Flex, 1>| x.cast(DType::F16);
    let got = ops::group_norm(x.cast(DType::F16), half(ones), half(zeros), 2, 1e-6);
    assert_eq!(got.dtype(), DType::F16);
    got.cast(DType::F32)
        .into_data()
        .assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(5e-3));

    // Scores of 40 · 40 · 64 / 8 exceed it, too, before they are scaled.
    let tokens = Tensor::<Flex, 3>::full([1, 3, 64], 40.0, &device).cast(DType::F16);
    let got = ops::attention(tokens.clone(), tokens.clone(), tokens, 1);
    assert!(values(&got).iter().all(|value| (value - 40.0).abs() < 0.1));
}
