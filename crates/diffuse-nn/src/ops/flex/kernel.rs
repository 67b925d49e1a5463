//! The inside of every product: a tile of sums over packed rows and columns.
//!
//! Packed, what a step of the sum needs lies side by side: a value of each of [`ROWS`] rows, and of each of [`COLUMNS`] columns.
//! On every machine the packing is the same; how much of a tile is in registers at once depends on how many there are.

use std::sync::LazyLock;

use pulp::{Arch, Simd, WithSimd};

/// Rows of a tile: they divide the channels of all published networks.
pub const ROWS: usize = 8;
/// Columns of a tile.
pub const COLUMNS: usize = 32;
/// Rows whose sums fit into 16 registers, with what they are made of.
const HALF: usize = ROWS / 2;
/// Vectors of sums in a row.
const VECTORS: usize = 2;

/// One value of each row of a tile.
pub type Column = [f32; ROWS];
/// One value of each column of a tile.
pub type Line = [f32; COLUMNS];

/// Sums of products: `tile[row][column] = Σₖ rows[k][row] · columns[k][column]`.
///
/// # Panics
/// If there is not the same number of rows' and columns' values.
#[inline(always)]
pub fn tile(rows: &[Column], columns: &[Line], tile: &mut [Line; ROWS]) {
    assert_eq!(rows.len(), columns.len(), "a sum of two lengths");
    arch().dispatch(Tile {
        rows,
        columns,
        kept: None,
        tile,
    });
}

/// Adds sums of products to what is kept of others: `tile[row][column] = kept[column] · tile[row][column] + Σₖ ..`.
///
/// # Panics
/// If there is not the same number of rows' and columns' values.
#[inline(always)]
pub fn tile_onto(rows: &[Column], columns: &[Line], kept: &Line, tile: &mut [Line; ROWS]) {
    assert_eq!(rows.len(), columns.len(), "a sum of two lengths");
    arch().dispatch(Tile {
        rows,
        columns,
        kept: Some(kept),
        tile,
    });
}

/// Runs `body`, and every `#[inline(always)]` function in it, compiled for the best vector instructions of this machine.
#[inline(always)]
pub fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    arch().dispatch(body)
}

#[inline(always)]
fn arch() -> Arch {
    static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);
    *ARCH
}

/// What [`tile`] and [`tile_onto`] do, with instructions of choice.
pub struct Tile<'a> {
    pub rows: &'a [Column],
    pub columns: &'a [Line],
    /// What is kept of each column of the tile, if not nothing.
    pub kept: Option<&'a Line>,
    pub tile: &'a mut [Line; ROWS],
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT > VECTORS * ROWS + VECTORS {
            self.sum::<S, ROWS>(simd);
        } else {
            self.sum::<S, HALF>(simd);
        }
    }
}

impl Tile<'_> {
    /// The tile, `COUNT` rows and [`VECTORS`] vectors at a time.
    #[inline(always)]
    fn sum<S: Simd, const COUNT: usize>(self, simd: S) {
        let width = VECTORS * S::F32_LANES;
        for first in (0..ROWS).step_by(COUNT) {
            for left in (0..COLUMNS).step_by(width) {
                let mut sums = [[simd.splat_f32s(0.0); VECTORS]; COUNT];
                if let Some(kept) = self.kept {
                    let (kept, _) = S::as_simd_f32s(&kept[left..left + width]);
                    for (sums, row) in sums.iter_mut().zip(&self.tile[first..]) {
                        let (row, _) = S::as_simd_f32s(&row[left..left + width]);
                        for ((sum, value), kept) in sums.iter_mut().zip(row).zip(kept) {
                            *sum = simd.mul_f32s(*value, *kept);
                        }
                    }
                }
                for (column, line) in self.rows.iter().zip(self.columns) {
                    let (line, _) = S::as_simd_f32s(&line[left..left + width]);
                    for (sums, value) in sums.iter_mut().zip(&column[first..first + COUNT]) {
                        let value = simd.splat_f32s(*value);
                        for (sum, line) in sums.iter_mut().zip(line) {
                            *sum = simd.mul_add_e_f32s(value, *line, *sum);
                        }
                    }
                }
                for (row, sums) in self.tile[first..].iter_mut().zip(sums) {
                    let (row, _) = S::as_mut_simd_f32s(&mut row[left..left + width]);
                    row.copy_from_slice(&sums);
                }
            }
        }
    }
}
