//! The micro-kernel of every matrix product, `C += A B`, on packed panels of `A` and `B` ("BLIS: A
//! Framework for Rapidly Instantiating BLAS Functionality", Van Zee & van de Geijn 2015).
//!
//! A panel of `A` has [`MR`] rows, stored column by column; a panel of `B` has [`NR`] columns,
//! stored row by row. The panels have the same size on every machine; the number of registers
//! decides how much of the register block is computed at once.

use std::sync::LazyLock;
#[cfg(feature = "tuning")]
use std::sync::atomic::{AtomicBool, Ordering};

use pulp::{Arch, Simd, WithSimd};

#[cfg(target_arch = "x86_64")]
use super::avx2;

/// Rows of a register block: a divisor of the channel counts of all published networks.
pub const MR: usize = 8;
/// Columns of a register block.
pub const NR: usize = 32;
/// Rows whose sums and operands fit into 16 registers.
const HALF_MR: usize = MR / 2;
/// SIMD vectors of sums in a row.
const VECTORS: usize = 2;

/// A column of a panel of `A`.
pub type PanelColumn = [f32; MR];
/// A row of a panel of `B`.
pub type PanelRow = [f32; NR];
/// A block of `C`.
pub type RegisterBlock = [PanelRow; MR];

/// What a block has before a product is added.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    /// Zeros.
    Zero,
    /// Its values.
    Values,
    /// Its values, times a factor for each column.
    Scaled(&'a PanelRow),
}

/// `c[i][j] = start + Σₖ a[k][i] · b[k][j]`.
///
/// Call it inside of [`vectorized`]: elsewhere it is slow.
///
/// # Panics
/// If the panels have different depths.
#[inline(always)]
pub fn micro_kernel(a: &[PanelColumn], b: &[PanelRow], start: Start<'_>, c: &mut RegisterBlock) {
    assert_eq!(a.len(), b.len(), "panels of the same depth");
    if let Start::Scaled(factors) = start {
        for row in &mut *c {
            for (value, factor) in row.iter_mut().zip(factors) {
                *value *= factor;
            }
        }
    }
    let accumulate = !matches!(start, Start::Zero);
    match arch() {
        #[cfg(target_arch = "x86_64")]
        Arch::V3(simd) => avx2::micro_kernel(simd, a, b, accumulate, c),
        _ => inlined(MicroKernel {
            a,
            b,
            accumulate,
            c,
        }),
    }
}

/// `transpose(rows)[j][i] = rows[i][j]`, inlined inside of [`vectorized`].
#[inline(always)]
pub fn transpose(rows: [PanelColumn; MR]) -> [PanelColumn; MR] {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return transpose_avx(simd.avx, rows);
    }
    transpose_scalar(rows)
}

#[inline(always)]
pub fn transpose_scalar(rows: [PanelColumn; MR]) -> [PanelColumn; MR] {
    std::array::from_fn(|column| rows.map(|row| row[column]))
}

/// Interleaves pairs of rows, then groups of four, then the halves of two rows; compilers do not
/// find this sequence.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose_avx(avx: pulp::core_arch::x86::Avx, rows: [PanelColumn; MR]) -> [PanelColumn; MR] {
    let mut columns = [[0.0; MR]; MR];
    let mut quads = [[pulp::cast([0.0_f32; MR]); MR / 2]; 2];
    for (quads, rows) in quads.iter_mut().zip(rows.as_chunks::<{ MR / 2 }>().0) {
        let [a, b] = [pulp::cast(rows[0]), pulp::cast(rows[1])];
        let [c, d] = [pulp::cast(rows[2]), pulp::cast(rows[3])];
        let (ab, cd) = (avx._mm256_unpacklo_ps(a, b), avx._mm256_unpacklo_ps(c, d));
        quads[0] = avx._mm256_shuffle_ps::<0b01_00_01_00>(ab, cd);
        quads[1] = avx._mm256_shuffle_ps::<0b11_10_11_10>(ab, cd);
        let (ab, cd) = (avx._mm256_unpackhi_ps(a, b), avx._mm256_unpackhi_ps(c, d));
        quads[2] = avx._mm256_shuffle_ps::<0b01_00_01_00>(ab, cd);
        quads[3] = avx._mm256_shuffle_ps::<0b11_10_11_10>(ab, cd);
    }
    for index in 0..MR / 2 {
        let [upper, lower] = [quads[0][index], quads[1][index]];
        columns[index] = pulp::cast(avx._mm256_permute2f128_ps::<0x20>(upper, lower));
        columns[index + MR / 2] = pulp::cast(avx._mm256_permute2f128_ps::<0x31>(upper, lower));
    }
    columns
}

/// Runs `f`, and every `#[inline(always)]` function in it, compiled for the best vector
/// instructions of this machine.
#[inline(always)]
pub fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    arch().dispatch(f)
}

/// Inlines an operation on SIMD vectors into its caller, which runs inside of [`vectorized`];
/// `dispatch` would make a function call.
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
    *ARCH
}

static ARCH: LazyLock<Arch> = LazyLock::new(|| {
    #[cfg(all(feature = "tuning", target_arch = "x86_64"))]
    if IS_AVX512_DISABLED.load(Ordering::Relaxed)
        && let Some(simd) = pulp::x86::V3::try_new()
    {
        return Arch::V3(simd);
    }
    Arch::new()
});

#[cfg(feature = "tuning")]
static IS_AVX512_DISABLED: AtomicBool = AtomicBool::new(false);

/// Has the CPU kernels compute with AVX2 at most, to measure how they do on other machines. Does
/// nothing where there is no AVX-512.
///
/// # Panics
/// If an operation has run before.
#[cfg(feature = "tuning")]
pub fn disable_avx512() {
    IS_AVX512_DISABLED.store(true, Ordering::Relaxed);
    #[cfg(target_arch = "x86_64")]
    assert!(
        !matches!(arch(), Arch::V4(_)),
        "called before any operation"
    );
}

/// [`micro_kernel`] for a given instruction set.
pub struct MicroKernel<'a> {
    pub a: &'a [PanelColumn],
    pub b: &'a [PanelRow],
    /// Whether the product is added to the values of `c`.
    pub accumulate: bool,
    pub c: &'a mut RegisterBlock,
}

impl WithSimd for MicroKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT > VECTORS * MR + VECTORS {
            self.sum::<S, MR>(simd);
        } else {
            self.sum::<S, HALF_MR>(simd);
        }
    }
}

impl MicroKernel<'_> {
    /// Computes the block, `COUNT` rows and [`VECTORS`] vectors at a time.
    #[inline(always)]
    fn sum<S: Simd, const COUNT: usize>(self, simd: S) {
        let width = VECTORS * S::F32_LANES;
        for first in (0..MR).step_by(COUNT) {
            for left in (0..NR).step_by(width) {
                let mut sums = [[simd.splat_f32s(0.0); VECTORS]; COUNT];
                if self.accumulate {
                    for (sums, row) in sums.iter_mut().zip(&self.c[first..]) {
                        let (row, _) = S::as_simd_f32s(&row[left..left + width]);
                        sums.copy_from_slice(row);
                    }
                }
                for (a, b) in self.a.iter().zip(self.b) {
                    let (b, _) = S::as_simd_f32s(&b[left..left + width]);
                    for (sums, value) in sums.iter_mut().zip(&a[first..first + COUNT]) {
                        let value = simd.splat_f32s(*value);
                        for (sum, b) in sums.iter_mut().zip(b) {
                            *sum = simd.mul_add_e_f32s(value, *b, *sum);
                        }
                    }
                }
                for (row, sums) in self.c[first..].iter_mut().zip(sums) {
                    let (row, _) = S::as_mut_simd_f32s(&mut row[left..left + width]);
                    row.copy_from_slice(&sums);
                }
            }
        }
    }
}
