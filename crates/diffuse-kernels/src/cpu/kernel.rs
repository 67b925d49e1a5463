//! The inside of every product: a tile of sums over packed rows and columns.
//!
//! Packed, what a step of the sum needs lies side by side: a value of each of [`ROWS`] rows, and of
//! each of [`COLUMNS`] columns. On every machine the packing is the same; how much of a tile is in
//! registers at once depends on how many there are.

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

/// Sums of products: `tile[row][column] = kept[column] · tile[row][column] + Σₖ rows[k][row] ·
/// columns[k][column]`, without the first term if nothing is kept.
///
/// Fast inside of [`vectorized`] only.
///
/// # Panics
/// If there is not the same number of rows' and columns' values.
#[inline(always)]
pub fn tile(rows: &[Column], columns: &[Line], kept: Option<&Line>, tile: &mut [Line; ROWS]) {
    assert_eq!(rows.len(), columns.len(), "a sum of two lengths");
    inlined(Tile {
        rows,
        columns,
        kept,
        tile,
    });
}

/// Rows to columns: `transpose(rows)[j][i] = rows[i][j]`. Inside of [`vectorized`], where the
/// instructions for it are at hand.
#[inline(always)]
pub fn transpose(rows: [Column; ROWS]) -> [Column; ROWS] {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return turn_avx(simd.avx, rows);
    }
    transpose_scalar(rows)
}

#[inline(always)]
pub fn transpose_scalar(rows: [Column; ROWS]) -> [Column; ROWS] {
    std::array::from_fn(|column| rows.map(|row| row[column]))
}

/// Pairs, then fours, then halves of two rows change places: compilers do not find this by
/// themselves.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn turn_avx(avx: pulp::core_arch::x86::Avx, rows: [Column; ROWS]) -> [Column; ROWS] {
    let mut columns = [[0.0; ROWS]; ROWS];
    let mut fours = [[pulp::cast([0.0_f32; ROWS]); ROWS / 2]; 2];
    for (fours, rows) in fours.iter_mut().zip(rows.as_chunks::<{ ROWS / 2 }>().0) {
        let [a, b] = [pulp::cast(rows[0]), pulp::cast(rows[1])];
        let [c, d] = [pulp::cast(rows[2]), pulp::cast(rows[3])];
        let (ab, cd) = (avx._mm256_unpacklo_ps(a, b), avx._mm256_unpacklo_ps(c, d));
        fours[0] = avx._mm256_shuffle_ps::<0b01_00_01_00>(ab, cd);
        fours[1] = avx._mm256_shuffle_ps::<0b11_10_11_10>(ab, cd);
        let (ab, cd) = (avx._mm256_unpackhi_ps(a, b), avx._mm256_unpackhi_ps(c, d));
        fours[2] = avx._mm256_shuffle_ps::<0b01_00_01_00>(ab, cd);
        fours[3] = avx._mm256_shuffle_ps::<0b11_10_11_10>(ab, cd);
    }
    for index in 0..ROWS / 2 {
        let [upper, lower] = [fours[0][index], fours[1][index]];
        columns[index] = pulp::cast(avx._mm256_permute2f128_ps::<0x20>(upper, lower));
        columns[index + ROWS / 2] = pulp::cast(avx._mm256_permute2f128_ps::<0x31>(upper, lower));
    }
    columns
}

/// Runs `body`, and every `#[inline(always)]` function in it, compiled for the best vector
/// instructions of this machine.
#[inline(always)]
pub fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    arch().dispatch(body)
}

/// Runs what computes with vectors inside of [`vectorized`], where the instructions are at hand: it
/// becomes a part of the caller, where `dispatch` would make a call.
#[inline(always)]
pub fn inlined<Op: WithSimd>(op: Op) -> Op::Output {
    match arch() {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(simd) => op.with_simd(simd),
        #[cfg(target_arch = "x86_64")]
        Arch::V3(simd) => op.with_simd(simd),
        other => other.dispatch(op),
    }
}

#[inline(always)]
fn arch() -> Arch {
    static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);
    *ARCH
}

/// What [`tile`] does, with instructions of choice.
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
