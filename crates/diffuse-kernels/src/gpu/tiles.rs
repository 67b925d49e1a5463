//! Which tile a product is cut into.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::product::{PLAIN_TILE, Tile};

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

/// Tiles for tensor cores.
const TILES: [Tile; 4] = [
    tile(128, 160, [4, 2]),
    tile(128, 128, [2, 4]),
    tile(64, 160, [2, 2]),
    tile(64, 64, [2, 2]),
];

const fn tile(rows: usize, columns: usize, planes: [usize; 2]) -> Tile {
    Tile {
        rows,
        columns,
        planes: Some(planes),
        stages: 2,
    }
}

/// How a product of `[rows, depth]` and `[depth, columns]` is cut: the tile, and into how many parts of `depth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The tile of a cube.
    pub tile: Tile,
    /// Parts of the sums, each computed by cubes of its own.
    pub parts: usize,
}

impl Cut {
    /// The cut with the shortest time by a simple model: cubes are computed in waves of as many as the device has
    /// processors, each for as long as it has products, small tiles less efficiently.
    pub fn choose(
        [rows, columns]: [usize; 2],
        steps: usize,
        processors: usize,
        splits: bool,
        tensor_cores: bool,
    ) -> Self {
        if !tensor_cores {
            return Self {
                tile: PLAIN_TILE,
                parts: 1,
            };
        }
        let mut best = (f64::INFINITY, TILES[0], 1);
        for tile in TILES {
            let cubes = rows.div_ceil(tile.rows) * columns.div_ceil(tile.columns);
            for parts in [1, 2, 3, 4, 6, 8] {
                if parts > 1 && (!splits || steps / parts < 4) {
                    continue;
                }
                let (a, b) = (tile.rows as f64, tile.columns as f64);
                // Products a step, and the reading of both sides, which small tiles do more of.
                let step = a * b / 8192.0 + (a + b) / 128.0 * 0.35;
                let per_processor = (cubes * parts).div_ceil(processors) as f64;
                let mut time = per_processor * (steps.div_ceil(parts) as f64 * step + 4.0);
                if parts > 1 {
                    // Writing and reading the parts.
                    time += 6.0 + (rows * columns * parts) as f64 / 400_000.0;
                }
                if time < best.0 {
                    best = (time, tile, parts);
                }
            }
        }
        Self {
            tile: best.1,
            parts: best.2,
        }
    }
}
