//! Which tile a product is cut into.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::product::{PLAIN_TILE, Tile, VECTORS};

/// Whether tensor cores multiply 16x8x16 tiles of this type with `f32` sums here.
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

/// A tile for tensor cores, and what was measured of it.
struct Measured {
    tile: Tile,
    /// Cubes that a processor holds at once.
    resident: usize,
    /// Microseconds a step of a cube takes while the processor is busy with others as well, on an
    /// H200.
    busy: f64,
    /// Microseconds a step takes alone.
    alone: f64,
}

/// The tiles that were best for some size of Stable Diffusion v1 (`examples/gpu-tiles.rs`).
const TILES: [Measured; 5] = [
    measured(tile(128, 160, [2, 2], 3), 2, 1.11, 1.8),
    measured(tile(128, 128, [2, 2], 3), 2, 0.9, 1.5),
    measured(tile(64, 160, [2, 2], 4), 2, 0.76, 0.9),
    measured(tile(64, 128, [2, 2], 4), 2, 0.65, 0.9),
    measured(tile(64, 64, [2, 2], 4), 3, 0.45, 0.75),
];

const fn measured(tile: Tile, resident: usize, busy: f64, alone: f64) -> Measured {
    // Results are gathered where the rows of `A` were, in shared memory.
    assert!(tile.columns + 8 <= tile.stages * 8 * VECTORS);
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

/// A cut for all products, for measuring.
#[cfg(feature = "tuning")]
pub static FORCED: std::sync::Mutex<Option<Cut>> = std::sync::Mutex::new(None);

/// Planes, strips and keys of a tile of attention, for measuring.
#[cfg(feature = "tuning")]
pub static FORCED_ATTENTION: std::sync::Mutex<Option<[usize; 3]>> = std::sync::Mutex::new(None);

/// How a product of `[rows, depth]` and `[depth, columns]` is cut: the tile, and into how many
/// parts of `depth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The tile of a cube.
    pub tile: Tile,
    /// Parts of the sums, each computed by cubes of its own.
    pub parts: usize,
}

impl Cut {
    /// The cut with the shortest time by a simple model: processors compute as many cubes at once
    /// as they hold, and parts of the sums are written and read again. `None` if no tile fits.
    pub fn choose(
        [rows, columns]: [usize; 2],
        steps: usize,
        processors: usize,
        splits: bool,
        tensor_cores: bool,
        fits: impl Fn(&Tile) -> bool,
    ) -> Option<Self> {
        #[cfg(feature = "tuning")]
        if let Some(cut) = *FORCED.lock().expect("nobody panics with it") {
            return Some(cut);
        }
        if !tensor_cores {
            let plain = Self {
                tile: PLAIN_TILE,
                parts: 1,
            };
            return fits(&PLAIN_TILE).then_some(plain);
        }
        let mut best = None;
        let mut shortest = f64::INFINITY;
        for measured in TILES.iter().filter(|measured| fits(&measured.tile)) {
            let tile = measured.tile;
            let tiles = rows.div_ceil(tile.rows) * columns.div_ceil(tile.columns);
            for parts in [1, 2, 3, 4, 6, 8] {
                if parts > 1 && (!splits || steps / parts < 4) {
                    continue;
                }
                let cubes = tiles * parts;
                let at_once = processors * measured.resident;
                let (full, rest) = (cubes / at_once, cubes % at_once);
                let step = |cubes: usize| match cubes {
                    0 => 0.0,
                    cubes => measured.alone.max(cubes as f64 * measured.busy),
                };
                let step = full as f64 * step(measured.resident) + step(rest.div_ceil(processors));
                let waves = cubes.div_ceil(at_once) as f64;
                let mut time = steps.div_ceil(parts) as f64 * step + 5.0 * waves;
                if parts > 1 {
                    // Another launch, which reads and writes.
                    time += 8.0 + (rows * columns * (parts + 1)) as f64 * 4.0 / 8e6;
                }
                if time < shortest {
                    shortest = time;
                    best = Some(Self { tile, parts });
                }
            }
        }
        best
    }
}
