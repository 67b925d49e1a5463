//! Times operations and networks on the CPU, one for each line of input. `cargo xtask bench cpu`
//! runs it and PyTorch in turns.
//!
//! A line is a name and sizes, as in `conv 2 320 320 64 64 3`; the output is its seconds. After
//! `parts`, it is the seconds of each part of its kernel. With the argument `avx2`, nothing uses
//! AVX-512.

use std::hint::black_box;
use std::io::{self, BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::module::Module;
use burn::tensor::{Distribution, Tensor};
use burn_flex::Flex;
use diffuse_nn::ops::{self, ConvGeometry};
use diffuse_pipelines::unet::{PerLevel, Pretrained, UNet2DConditionModel, UNet2DModel};
use diffuse_pipelines::vae::AutoencoderKL;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// An operation is repeated for this time.
const AT_LEAST: f64 = 0.2;

fn main() -> Result<()> {
    let is_avx2 = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("avx2") => true,
        Some(other) => bail!("unknown argument `{other}`"),
    };
    if is_avx2 {
        diffuse_kernels::disable_avx512();
    }
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let (name, rest) = words.split_first().context("an empty line")?;
        match (*name, rest) {
            ("peak", []) => println!("{}", peak(is_avx2)),
            ("parts", [name, rest @ ..]) => println!("{}", parts(&mut *operation(name, rest)?)),
            (name, rest) => {
                let mut operation = operation(name, rest)?;
                // As in a network.
                let seconds = ops::on_worker::<Flex, _>(|| time(&mut *operation));
                println!("{seconds}");
            }
        }
        io::stdout().flush()?;
    }
    Ok(())
}

/// Seconds per call, after a warm-up call.
fn time(operation: &mut (dyn FnMut() + Send)) -> f64 {
    operation();
    let start = Instant::now();
    let mut calls = 0;
    while calls == 0 || start.elapsed().as_secs_f64() < AT_LEAST {
        operation();
        calls += 1;
    }
    start.elapsed().as_secs_f64() / f64::from(calls)
}

/// Name and seconds of each part of a call, as a mean of the threads, and of all of it.
fn parts(operation: &mut (dyn FnMut() + Send)) -> String {
    let (mut calls, mut total) = (0, 0.0);
    operation();
    let parts = diffuse_kernels::measure_parts(|| {
        let start = Instant::now();
        while total < AT_LEAST {
            ops::on_worker::<Flex, _>(&mut *operation);
            calls += 1;
            total = start.elapsed().as_secs_f64();
        }
    });
    let threads = rayon::current_num_threads() as f64;
    let divisor = f64::from(calls) * threads;
    let parts = parts
        .into_iter()
        .chain([("total", total * threads)])
        .map(|(name, seconds)| format!("{name}={}", seconds / divisor));
    parts.collect::<Vec<_>>().join(",")
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Default::default())
}

fn operation(name: &str, rest: &[&str]) -> Result<Box<dyn FnMut() + Send>> {
    if let "unet" | "ddpm" | "vae" = name {
        let [folder, sizes @ ..] = rest else {
            bail!("`{name}` needs a folder");
        };
        return network(name, folder, &numbers(sizes)?);
    }
    let sizes = numbers(rest)?;
    Ok(match (name, &sizes[..]) {
        ("conv" | "conv_stride_2", &[batch, channels, outputs, height, width, kernel]) => {
            let x = random([batch, channels, height, width]);
            let weight = random([outputs, channels, kernel, kernel]);
            let bias = random([outputs]);
            let geometry = ConvGeometry {
                stride: if name == "conv" { 1 } else { 2 },
                ..ConvGeometry::same(kernel)
            };
            Box::new(move || {
                let bias = Some(bias.clone());
                drop(black_box(ops::conv2d(
                    x.clone(),
                    weight.clone(),
                    bias,
                    geometry,
                )));
            })
        }
        ("linear", &[rows, inputs, outputs]) => {
            let (x, weight) = (random([rows, inputs]), random([outputs, inputs]));
            let bias = random([outputs]);
            Box::new(move || {
                let bias = Some(bias.clone());
                drop(black_box(ops::linear(x.clone(), weight.clone(), bias)));
            })
        }
        ("attention", &[batch, tokens, context, heads, d]) => {
            let query = random([batch, tokens, heads * d]);
            let [key, value] = [0; 2].map(|_| random([batch, context, heads * d]));
            Box::new(move || {
                let (query, key, value) = (query.clone(), key.clone(), value.clone());
                drop(black_box(ops::attention(query, key, value, heads)));
            })
        }
        ("group_norm_silu", &[batch, channels, height, width]) => {
            let x = random([batch, channels, height, width]);
            let [weight, bias] = [0; 2].map(|_| random([channels]));
            Box::new(move || {
                let (x, weight, bias) = (x.clone(), weight.clone(), bias.clone());
                drop(black_box(ops::group_norm_silu(x, weight, bias, 32, 1e-5)));
            })
        }
        ("layer_norm", &[rows, width]) => {
            let x = random([rows, width]);
            let [weight, bias] = [0; 2].map(|_| random([width]));
            Box::new(move || {
                let (x, weight, bias) = (x.clone(), weight.clone(), bias.clone());
                drop(black_box(ops::layer_norm(x, weight, bias, 1e-5)));
            })
        }
        ("silu", &[size]) => {
            let x = random([size]);
            Box::new(move || drop(black_box(ops::silu(x.clone()))))
        }
        ("linear_geglu", &[rows, inputs, outputs]) => {
            let (x, weight) = (random([1, rows, inputs]), random([2 * outputs, inputs]));
            let bias = random([2 * outputs]);
            Box::new(move || {
                let bias = Some(bias.clone());
                drop(black_box(ops::linear_geglu(
                    x.clone(),
                    weight.clone(),
                    bias,
                )));
            })
        }
        ("channel_bias", &[batch, channels, height, width]) => {
            let (x, bias) = (
                random([batch, channels, height, width]),
                random([batch, channels]),
            );
            Box::new(move || drop(black_box(ops::add_channel_bias(x.clone(), bias.clone()))))
        }
        _ => bail!("unknown operation `{name}` with {} sizes", sizes.len()),
    })
}

fn network(name: &str, folder: &str, sizes: &[usize]) -> Result<Box<dyn FnMut() + Send>> {
    let device = Default::default();
    Ok(match (name, sizes) {
        ("unet", &[batch, height, width, tokens]) => {
            let model = UNet2DConditionModel::<Flex>::from_pretrained(folder, &device)?.no_grad();
            let x = random([batch, model.config().in_channels, height, width]);
            let PerLevel::Same(width) = model.config().cross_attention_dim else {
                bail!("a network with texts of several sizes");
            };
            let context = random([batch, tokens, width]);
            Box::new(move || drop(black_box(model.forward(x.clone(), 500.0, &context))))
        }
        ("ddpm", &[batch, height, width]) => {
            let model = UNet2DModel::<Flex>::from_pretrained(folder, &device)?.no_grad();
            let x = random([batch, model.config().in_channels, height, width]);
            Box::new(move || drop(black_box(model.forward(x.clone(), 500.0))))
        }
        ("vae", &[height, width]) => {
            let model = AutoencoderKL::<Flex>::from_pretrained(folder, &device)?.no_grad();
            let x = random([1, model.config().latent_channels, height, width]);
            Box::new(move || drop(black_box(model.decode(x.clone()))))
        }
        _ => bail!("`{name}` with {} sizes", sizes.len()),
    })
}

fn numbers(words: &[&str]) -> Result<Vec<usize>> {
    words
        .iter()
        .map(|word| {
            word.parse()
                .with_context(|| format!("`{word}` is not a size"))
        })
        .collect()
}

/// The least seconds of a GFLOP, on all threads.
fn peak(is_avx2: bool) -> f64 {
    let arch = pulp::Arch::new();
    #[cfg(target_arch = "x86_64")]
    let arch = match pulp::x86::V3::try_new() {
        Some(simd) if is_avx2 => pulp::Arch::V3(simd),
        _ => arch,
    };
    let threads = rayon::current_num_threads();
    let seconds = |_| {
        let start = Instant::now();
        let lanes = (0..threads).into_par_iter().map(|_| arch.dispatch(Chains));
        let flops = 2 * CHAINS * ROUNDS * lanes.sum::<usize>();
        start.elapsed().as_secs_f64() * 1e9 / flops as f64
    };
    (0..5).map(seconds).fold(f64::INFINITY, f64::min)
}

/// Enough to hide how long a multiply-add takes.
const CHAINS: usize = 12;
const ROUNDS: usize = 1_000_000;

/// Chains of multiply-adds of vectors in registers. Returns the lanes of a vector.
struct Chains;

impl WithSimd for Chains {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        let factor = simd.splat_f32s(black_box(0.999));
        let mut values = [factor; CHAINS];
        for _ in 0..ROUNDS {
            for value in &mut values {
                *value = simd.mul_add_e_f32s(*value, factor, factor);
            }
        }
        black_box(values);
        S::F32_LANES
    }
}
