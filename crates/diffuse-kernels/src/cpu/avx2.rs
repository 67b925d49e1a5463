//! The micro-kernel for AVX2 in assembly: compilers move its sums from register to register, which
//! takes half of the time.
//!
//! A multiply-add takes 4 cycles, and two start in each: 8 sums are just enough to hide that, 12
//! are better. So the block of 8 x 32 sums is computed as two of 4 x 24 and one of 8 x 8.

use std::arch::asm;

use super::micro_kernel::{MR, NR, PanelColumn, PanelRow, RegisterBlock};

/// Columns of the two larger parts of the block.
const LEFT: usize = 24;

/// `c = a b`, or with `accumulate`, `c += a b`. The token says that the CPU has the instructions.
///
/// # Panics
/// If the panels have different depths.
#[inline(always)]
pub fn micro_kernel(
    _: pulp::x86::V3,
    a: &[PanelColumn],
    b: &[PanelRow],
    accumulate: bool,
    c: &mut RegisterBlock,
) {
    assert_eq!(a.len(), b.len(), "panels of the same depth");
    if a.is_empty() {
        if !accumulate {
            *c = [[0.0; NR]; MR];
        }
        return;
    }
    let (depth, accumulate) = (a.len(), u32::from(accumulate));
    let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    let (a, b, c) = (a.cast::<f32>(), b.cast::<f32>(), c.cast::<f32>());
    // SAFETY: the panels have `depth` columns of 8 and rows of 32 values, the block 8 rows of 32,
    // all of which the offsets stay within; the token is proof of the instructions.
    unsafe {
        block_4x24(a, b, depth, accumulate, c);
        block_4x24(a.add(4), b, depth, accumulate, c.add(4 * NR));
        block_8x8(a, b.add(LEFT), depth, accumulate, c.add(LEFT));
    }
}

/// A line of text for each of several registers and offsets, in which `R` is the register and `O`
/// the offset.
macro_rules! block {
    (
        $a:ident, $b:ident, $depth:ident, $accumulate:ident, $c:ident,
        sums: $($sum:tt at $offset:tt),+;
        step: $($step:tt),+;
        others: $($other:tt),+
    ) => {
        asm!(
            "test {accumulate:e}, {accumulate:e}",
            "jz 2f",
            $(concat!("vmovups ", $sum, ", [{c} + ", $offset, "]"),)+
            "jmp 3f",
            "2:",
            $(concat!("vxorps ", $sum, ", ", $sum, ", ", $sum),)+
            ".p2align 4",
            "3:",
            $($step,)+
            "add {a}, 32",
            "add {b}, 128",
            "dec {depth}",
            "jnz 3b",
            $(concat!("vmovups [{c} + ", $offset, "], ", $sum),)+
            a = inout(reg) $a => _,
            b = inout(reg) $b => _,
            depth = inout(reg) $depth => _,
            accumulate = in(reg) $accumulate,
            c = in(reg) $c,
            $(out($sum) _,)+
            $(out($other) _,)+
            options(nostack),
        )
    };
}

/// # Safety
/// `a` has `depth` columns of 4 values, each 8 after the last, `b` as many rows of 24, `c` 4 rows
/// of 24, each 32 after the last. `depth` is at least 1. The CPU has AVX2 and FMA.
#[inline(always)]
unsafe fn block_4x24(a: *const f32, b: *const f32, depth: usize, accumulate: u32, c: *mut f32) {
    // SAFETY: reads and writes what the caller promises, and no stack.
    unsafe {
        block!(a, b, depth, accumulate, c,
            sums: "ymm0" at 0, "ymm1" at 32, "ymm2" at 64,
                "ymm3" at 128, "ymm4" at 160, "ymm5" at 192,
                "ymm6" at 256, "ymm7" at 288, "ymm8" at 320,
                "ymm9" at 384, "ymm10" at 416, "ymm11" at 448;
            step: "vmovups ymm12, [{b}]",
                "vmovups ymm13, [{b} + 32]",
                "vmovups ymm14, [{b} + 64]",
                "vbroadcastss ymm15, [{a}]",
                "vfmadd231ps ymm0, ymm15, ymm12",
                "vfmadd231ps ymm1, ymm15, ymm13",
                "vfmadd231ps ymm2, ymm15, ymm14",
                "vbroadcastss ymm15, [{a} + 4]",
                "vfmadd231ps ymm3, ymm15, ymm12",
                "vfmadd231ps ymm4, ymm15, ymm13",
                "vfmadd231ps ymm5, ymm15, ymm14",
                "vbroadcastss ymm15, [{a} + 8]",
                "vfmadd231ps ymm6, ymm15, ymm12",
                "vfmadd231ps ymm7, ymm15, ymm13",
                "vfmadd231ps ymm8, ymm15, ymm14",
                "vbroadcastss ymm15, [{a} + 12]",
                "vfmadd231ps ymm9, ymm15, ymm12",
                "vfmadd231ps ymm10, ymm15, ymm13",
                "vfmadd231ps ymm11, ymm15, ymm14";
            others: "ymm12", "ymm13", "ymm14", "ymm15");
    }
}

/// # Safety
/// As [`block_4x24`], with 8 rows and 8 columns.
#[inline(always)]
unsafe fn block_8x8(a: *const f32, b: *const f32, depth: usize, accumulate: u32, c: *mut f32) {
    // SAFETY: reads and writes what the caller promises, and no stack.
    unsafe {
        block!(a, b, depth, accumulate, c,
            sums: "ymm0" at 0, "ymm1" at 128, "ymm2" at 256, "ymm3" at 384,
                "ymm4" at 512, "ymm5" at 640, "ymm6" at 768, "ymm7" at 896;
            step: "vmovups ymm8, [{b}]",
                "vbroadcastss ymm9, [{a}]",
                "vbroadcastss ymm10, [{a} + 4]",
                "vbroadcastss ymm11, [{a} + 8]",
                "vbroadcastss ymm12, [{a} + 12]",
                "vfmadd231ps ymm0, ymm8, ymm9",
                "vfmadd231ps ymm1, ymm8, ymm10",
                "vfmadd231ps ymm2, ymm8, ymm11",
                "vfmadd231ps ymm3, ymm8, ymm12",
                "vbroadcastss ymm13, [{a} + 16]",
                "vbroadcastss ymm14, [{a} + 20]",
                "vbroadcastss ymm15, [{a} + 24]",
                "vbroadcastss ymm9, [{a} + 28]",
                "vfmadd231ps ymm4, ymm8, ymm13",
                "vfmadd231ps ymm5, ymm8, ymm14",
                "vfmadd231ps ymm6, ymm8, ymm15",
                "vfmadd231ps ymm7, ymm8, ymm9";
            others: "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15");
    }
}
