//! Measures all tilings of products with the sizes of Stable Diffusion v1 on a CUDA device, and the
//! times of attention and norms. `gpu/tiles.rs` has its results.
//!
//! `cargo run --release -p diffuse-kernels --example gpu-tiles --features cuda,tuning [FILTER]`

use std::time::{Duration, Instant};

use burn::backend::Cuda;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Distribution, Tensor};
use diffuse_kernels::tuning::{FORCED, FORCED_ATTENTION, Tiling, tile};
use diffuse_kernels::{
    ArrangeConvWeight, Attention, ConcatChannels, Conv2d, ConvGeometry, GroupNorm, LayerNorm,
    Linear, LinearGeglu,
};

type B = Cuda;

fn random<const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
    Tensor::random(
        shape,
        Distribution::Uniform(-1.0, 1.0),
        (&Default::default(), DType::F16),
    )
}

fn sync() {
    B::sync(&Default::default()).expect("a device that works");
}

/// Whether a profiler measures: then each tiling is only printed and launched twice.
fn profiled() -> bool {
    std::env::var_os("PROFILED").is_some()
}

/// Seconds per launch: the minimum of three rounds of a few milliseconds.
fn time(mut launch: impl FnMut()) -> f64 {
    launch();
    sync();
    let begin = Instant::now();
    launch();
    sync();
    let count = (2e-3 / begin.elapsed().as_secs_f64()).clamp(4.0, 100.0) as u32;
    (0..3)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..count {
                launch();
            }
            sync();
            begin.elapsed().as_secs_f64() / f64::from(count)
        })
        .fold(f64::INFINITY, f64::min)
}

fn tilings() -> Vec<Tiling> {
    let tiles = [
        tile(256, 160, [4, 2], 3),
        tile(128, 160, [2, 2], 3),
        tile(128, 160, [2, 2], 4),
        tile(128, 160, [4, 2], 3),
        tile(128, 128, [2, 2], 3),
        tile(128, 64, [2, 2], 4),
        tile(64, 320, [2, 4], 3),
        tile(64, 160, [2, 2], 3),
        tile(64, 160, [2, 2], 4),
        tile(64, 128, [2, 2], 4),
        tile(64, 64, [2, 2], 4),
        tile(64, 64, [2, 2], 6),
        tile(64, 64, [2, 1], 4),
        tile(64, 32, [2, 1], 6),
        tile(32, 160, [1, 2], 4),
    ];
    let splits = [1, 2, 3, 4, 6, 8];
    tiles
        .into_iter()
        .flat_map(|tile| splits.map(|splits| Tiling { tile, splits }))
        .collect()
}

fn sweep(name: &str, [rows, columns, depth]: [usize; 3], can_split: bool, launch: impl Fn()) {
    let steps = depth.div_ceil(64);
    let mut results: Vec<(f64, Tiling)> = Vec::new();
    let begin = Instant::now();
    for tiling in tilings() {
        let cubes = rows.div_ceil(tiling.tile.rows) * columns.div_ceil(tiling.tile.columns);
        let useful = tiling.splits == 1
            || (can_split && steps / tiling.splits >= 4 && cubes * tiling.splits <= 800);
        // Skips tiles that are far too small or too large.
        if !useful || (cubes < 16 && tiling.tile.rows > 64 && rows > 64) || cubes > 9000 {
            continue;
        }
        *FORCED.lock().unwrap() = Some(tiling);
        if profiled() {
            launch();
            launch();
            let Tiling { tile, splits } = tiling;
            let [p, q] = tile.planes.unwrap_or_default();
            println!(
                "tiling {name} {rows} {columns} {depth} {} {} {p} {q} {} {splits}",
                tile.rows, tile.columns, tile.stages
            );
            continue;
        }
        results.push((time(&launch), tiling));
    }
    *FORCED.lock().unwrap() = None;
    if profiled() {
        sync();
        return;
    }
    let chosen = time(&launch);
    results.sort_by(|a, b| a.0.total_cmp(&b.0));
    let work = 2.0 * rows as f64 * columns as f64 * depth as f64;
    println!(
        "{name} [{rows}, {columns}, {depth}]: chosen {:.4} ms, best {:.4} ms = {:.0} TFLOP/s \
         ({:.1} s)",
        chosen * 1e3,
        results[0].0 * 1e3,
        work / results[0].0 / 1e12,
        begin.elapsed().as_secs_f64()
    );
    for (seconds, Tiling { tile, splits }) in results.iter().take(6) {
        println!(
            "    {:.4} ms  {}x{} {:?} stages {} splits {splits}",
            seconds * 1e3,
            tile.rows,
            tile.columns,
            tile.planes.unwrap_or_default(),
            tile.stages
        );
    }
}

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let limit: u64 = std::env::args()
        .nth(2)
        .and_then(|s| s.parse().ok())
        .unwrap_or(600);
    let start = Instant::now();
    let wanted =
        |name: &str| name.contains(&filter) && start.elapsed() < Duration::from_secs(limit);

    for (batch, queries, keys, heads, size) in [
        (2, 4096, 4096, 8, 40),
        (2, 4096, 77, 8, 40),
        (2, 1024, 1024, 8, 80),
        (2, 256, 256, 8, 160),
        (2, 64, 64, 8, 160),
        (1, 4096, 4096, 1, 512),
    ] {
        if !wanted("attention") {
            break;
        }
        let attention = Attention {
            query: random([batch, queries, heads * size]),
            key: random([batch, keys, heads * size]),
            value: random([batch, keys, heads * size]),
            heads,
            causal: false,
        };
        let seconds = time(|| {
            attention.clone().run().expect("a kernel");
        });
        let work = 4.0 * (batch * heads * queries * keys * size) as f64;
        if size <= 160 {
            for tiling in [
                [4, 2, 64],
                [4, 2, 32],
                [4, 1, 64],
                [4, 1, 128],
                [8, 1, 64],
                [8, 2, 64],
                [4, 2, 128],
                [2, 2, 64],
            ] {
                *FORCED_ATTENTION.lock().unwrap() = Some(tiling);
                let seconds = time(|| {
                    attention.clone().run().expect("a kernel");
                });
                println!("    {tiling:?} {:.4} ms", seconds * 1e3);
            }
            *FORCED_ATTENTION.lock().unwrap() = None;
        }
        println!(
            "attention {batch} {queries} {keys} {heads} {size}: {:.4} ms = {:.0} TFLOP/s",
            seconds * 1e3,
            work / seconds / 1e12
        );
    }
    for (batch, channels, side) in [
        (2, 320, 64),
        (2, 960, 64),
        (2, 640, 32),
        (2, 1280, 16),
        (2, 2560, 16),
        (2, 1280, 8),
        (1, 512, 64),
        (1, 256, 256),
        (1, 128, 512),
    ] {
        if !wanted("norm") {
            break;
        }
        let x = random([batch, channels, side, side]);
        // Concatenation returns channels last, as in the networks.
        let halves = ConcatChannels {
            a: x.clone().narrow(1, 0, channels / 2),
            b: x.narrow(1, channels / 2, channels / 2),
        };
        let norm = GroupNorm {
            x: halves.run().expect("a kernel"),
            weight: random([channels]),
            bias: random([channels]),
            groups: 32,
            eps: 1e-5,
            silu: true,
        };
        let seconds = time(|| {
            norm.clone().run().expect("a kernel");
        });
        let bytes = (batch * channels * side * side * 6) as f64;
        println!(
            "group norm {batch} {channels} {side}: {:.4} ms = {:.0} GB/s",
            seconds * 1e3,
            bytes / seconds / 1e9
        );
    }
    for (rows, columns) in [(8192, 320), (2048, 640), (512, 1280)] {
        if !wanted("norm") {
            break;
        }
        let norm = LayerNorm {
            x: random([rows, columns]),
            weight: random([columns]),
            bias: random([columns]),
            eps: 1e-5,
        };
        let seconds = time(|| {
            norm.clone().run().expect("a kernel");
        });
        println!(
            "layer norm {rows} {columns}: {:.4} ms = {:.0} GB/s",
            seconds * 1e3,
            (rows * columns * 4) as f64 / seconds / 1e9
        );
    }
    for (batch, from, to, side, kernel) in [
        (2, 320, 320, 64, 3),
        (2, 960, 320, 64, 3),
        (2, 640, 640, 32, 3),
        (2, 1280, 1280, 16, 3),
        (2, 2560, 1280, 16, 3),
        (2, 1280, 1280, 8, 3),
        (2, 960, 320, 64, 1),
        (1, 512, 512, 64, 3),
        (1, 512, 512, 128, 3),
        (1, 256, 256, 256, 3),
        (1, 128, 128, 512, 3),
    ] {
        if !wanted("conv") {
            break;
        }
        let x = random([batch, from, side, side]);
        let halves = ConcatChannels {
            a: x.clone().narrow(1, 0, from / 2),
            b: x.narrow(1, from / 2, from / 2),
        };
        let weight = ArrangeConvWeight {
            weight: random([to, from, kernel, kernel]),
        };
        let conv = Conv2d {
            x: halves.run().expect("a kernel"),
            weight: weight.run().expect("a kernel"),
            bias: Some(random([to])),
            geometry: ConvGeometry::same(kernel),
            upsample: false,
            channel_bias: None,
            residual: None,
        };
        sweep(
            &format!("conv{kernel}"),
            [batch * side * side, to, from * kernel * kernel],
            true,
            || {
                conv.clone().run().expect("a kernel");
            },
        );
    }
    for (rows, from, to) in [
        (8192, 320, 320),
        (8192, 1280, 320),
        (2048, 640, 640),
        (2048, 2560, 640),
        (512, 1280, 1280),
        (512, 5120, 1280),
        (128, 1280, 1280),
        (154, 768, 640),
    ] {
        if !wanted("linear") {
            break;
        }
        let linear = Linear {
            x: random([rows, from]),
            weight: random([to, from]),
            bias: Some(random([to])),
            residual: None,
        };
        sweep("linear", [rows, to, from], true, || {
            linear.clone().run().expect("a kernel");
        });
    }
    for (rows, from, to) in [
        (8192, 320, 2560),
        (2048, 640, 5120),
        (512, 1280, 10240),
        (128, 1280, 10240),
    ] {
        if !wanted("geglu") {
            break;
        }
        let linear = LinearGeglu {
            x: random([1, rows, from]),
            weight: random([to, from]),
            bias: Some(random([to])),
        };
        sweep("geglu", [rows, to, from], false, || {
            linear.clone().run().expect("a kernel");
        });
    }
}
