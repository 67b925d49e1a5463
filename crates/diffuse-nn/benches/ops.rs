//! Single operations on `Flex`, at sizes of Stable Diffusion v1: `cargo bench -p diffuse-nn
//! --features flex`.
//!
//! `cargo xtask bench cpu` times the same beside PyTorch.

use burn::tensor::{Distribution, Tensor};
use burn_flex::Flex;
use diffuse_nn::ops::{self, ConvGeometry};
use divan::Bencher;

fn main() {
    divan::main();
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Default::default())
}

/// `[batch, channels, outputs, side, kernel]`
#[divan::bench(args = [
    [2, 320, 320, 64, 3], [2, 640, 640, 32, 3], [2, 1280, 1280, 16, 3], [2, 1280, 1280, 8, 3], [1, 128, 128, 512, 3],
    [2, 640, 320, 64, 1],
])]
fn conv2d(bencher: Bencher<'_, '_>, [batch, channels, outputs, side, kernel]: [usize; 5]) {
    let x = random([batch, channels, side, side]);
    let weight = random([outputs, channels, kernel, kernel]);
    let bias = random([outputs]);
    let geometry = ConvGeometry::same(kernel);
    bencher.bench_local(|| ops::conv2d(x.clone(), weight.clone(), Some(bias.clone()), geometry));
}

/// `[rows, inputs, outputs]`
#[divan::bench(args = [[8192, 320, 320], [8192, 320, 2560], [512, 1280, 10240]])]
fn linear(bencher: Bencher<'_, '_>, [rows, inputs, outputs]: [usize; 3]) {
    let (x, weight) = (random([rows, inputs]), random([outputs, inputs]));
    let bias = random([outputs]);
    bencher.bench_local(|| ops::linear(x.clone(), weight.clone(), Some(bias.clone())));
}

/// `[batch, tokens, context, heads, d]`
#[divan::bench(args = [[2, 4096, 4096, 8, 40], [2, 1024, 1024, 8, 80], [2, 4096, 77, 8, 40]])]
fn attention(bencher: Bencher<'_, '_>, [batch, tokens, context, heads, d]: [usize; 5]) {
    let query = random([batch, tokens, heads * d]);
    let [key, value] = [0; 2].map(|_| random([batch, context, heads * d]));
    bencher.bench_local(|| ops::attention(query.clone(), key.clone(), value.clone(), heads));
}

/// `[batch, channels, side]`
#[divan::bench(args = [[2, 320, 64], [1, 128, 512]])]
fn group_norm_silu(bencher: Bencher<'_, '_>, [batch, channels, side]: [usize; 3]) {
    let x = random([batch, channels, side, side]);
    let [weight, bias] = [0; 2].map(|_| random([channels]));
    bencher.bench_local(|| ops::group_norm_silu(x.clone(), weight.clone(), bias.clone(), 32, 1e-5));
}

#[divan::bench]
fn layer_norm(bencher: Bencher<'_, '_>) {
    let x = random([8192, 320]);
    let [weight, bias] = [0; 2].map(|_| random([320]));
    bencher.bench_local(|| ops::layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-5));
}

#[divan::bench]
fn linear_geglu(bencher: Bencher<'_, '_>) {
    let x = random([1, 8192, 320]);
    let (weight, bias) = (random([2560, 320]), random([2560]));
    bencher.bench_local(|| ops::linear_geglu(x.clone(), weight.clone(), Some(bias.clone())));
}

#[divan::bench]
fn silu(bencher: Bencher<'_, '_>) {
    let x = random([2, 320, 64, 64]);
    bencher.bench_local(|| ops::silu(x.clone()));
}
