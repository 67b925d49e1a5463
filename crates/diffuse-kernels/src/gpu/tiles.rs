//! The choice of the tile of a product, and of the number of parts of its sums (split-K).

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::product::{K_VECTORS, PLAIN_TILE, Tile};

/// Whether the device has tensor cores for this type, with 16x8x16 products and `f32` sums.
pub fn has_tensor_cores<R: CubeRuntime>(client: &ComputeClient<R>, dtype: DType) -> bool {
    use cubecl::ir::features::MmaConfig;
    matches!(dtype, DType::F16 | DType::BF16) && {
        let config = MmaConfig {
            a_type: dtype.into(),
            b_type: dtype.into(),
            cd_type: DType::F32.into(),
            m: 16,
            n: 8,
            k: 16,
        };
        client.properties().features.matmul.mma.contains(&config)
    }
}

/// A tile for tensor cores, with its measurements.
struct Measured {
    tile: Tile,
    /// Cubes that a multiprocessor runs at once.
    resident: usize,
    /// Microseconds of a step of a cube on an H200 while its multiprocessor runs others as well.
    busy: f64,
    /// Microseconds of a step of a cube that runs alone.
    alone: f64,
}

/// The tiles that were fastest for a size of Stable Diffusion v1 (`examples/gpu-tiles.rs`).
const TILES: [Measured; 5] = [
    measured(tile(128, 160, [2, 2], 3), 2, 1.11, 1.8),
    measured(tile(128, 128, [2, 2], 3), 2, 0.9, 1.5),
    measured(tile(64, 160, [2, 2], 4), 2, 0.76, 0.9),
    measured(tile(64, 128, [2, 2], 4), 2, 0.65, 0.9),
    measured(tile(64, 64, [2, 2], 4), 3, 0.45, 0.75),
];

const fn measured(tile: Tile, resident: usize, busy: f64, alone: f64) -> Measured {
    // Results are staged in the shared memory of `A`.
    assert!(tile.columns + 8 <= tile.stages * 8 * K_VECTORS);
    Measured {
        tile,
        resident,
        busy,
        alone,
    }
}

/// A tile for tensor cores.
pub const fn tile(rows: usize, columns: usize, planes: [usize; 2], stages: usize) -> Tile {
    Tile {
        rows,
        columns,
        planes: Some(planes),
        stages,
    }
}

/// Replaces the tiling of every product, for measuring.
#[cfg(feature = "tuning")]
pub static FORCED: std::sync::Mutex<Option<Tiling>> = std::sync::Mutex::new(None);

/// Replaces the planes, query tiles and keys of attention, for measuring.
#[cfg(feature = "tuning")]
pub static FORCED_ATTENTION: std::sync::Mutex<Option<[usize; 3]>> = std::sync::Mutex::new(None);

/// How a product of `[rows, depth]` and `[depth, columns]` is divided into cubes: by tiles of the
/// result, and by parts of `depth` (split-K).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// The tile of a cube.
    pub tile: Tile,
    /// Number of parts of the sums.
    pub splits: usize,
}

impl Tiling {
    /// The tiling with the shortest time in a simple model: multiprocessors run as many cubes at
    /// once as they hold, and partial sums are written and read again. `None` if no tile fits.
    pub fn choose(
        [rows, columns]: [usize; 2],
        steps: usize,
        multiprocessors: usize,
        can_split: bool,
        tensor_cores: bool,
        fits: impl Fn(&Tile) -> bool,
    ) -> Option<Self> {
        #[cfg(feature = "tuning")]
        if let Some(tiling) = *FORCED.lock().expect("a lock that is not poisoned") {
            return Some(tiling);
        }
        if !tensor_cores {
            let plain = Self {
                tile: PLAIN_TILE,
                splits: 1,
            };
            return fits(&PLAIN_TILE).then_some(plain);
        }
        let mut best = None;
        let mut shortest = f64::INFINITY;
        for measured in TILES.iter().filter(|measured| fits(&measured.tile)) {
            let tile = measured.tile;
            let tiles = rows.div_ceil(tile.rows) * columns.div_ceil(tile.columns);
            for splits in [1, 2, 3, 4, 6, 8] {
                if splits > 1 && (!can_split || steps / splits < 4) {
                    continue;
                }
                let cubes = tiles * splits;
                let at_once = multiprocessors * measured.resident;
                let (full, rest) = (cubes / at_once, cubes % at_once);
                let step = |cubes: usize| match cubes {
                    0 => 0.0,
                    cubes => measured.alone.max(cubes as f64 * measured.busy),
                };
                let step =
                    full as f64 * step(measured.resident) + step(rest.div_ceil(multiprocessors));
                let waves = cubes.div_ceil(at_once) as f64;
                let mut time = steps.div_ceil(splits) as f64 * step + 5.0 * waves;
                if splits > 1 {
                    // The launch of `finish`, and its memory traffic.
                    time += 8.0 + (rows * columns * (splits + 1)) as f64 * 4.0 / 8e6;
                }
                if time < shortest {
                    shortest = time;
                    best = Some(Self { tile, splits });
                }
            }
        }
        best
    }
}
