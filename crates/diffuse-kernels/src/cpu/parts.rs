//! How long the parts of kernels take, for measuring. Without the feature `tuning` nothing is
//! measured.

use super::vectorized;

#[cfg(feature = "tuning")]
pub use measuring::measure_parts;

/// A part of a kernel.
#[derive(Clone, Copy)]
pub enum Part {
    /// Copying operands to panels.
    Packing,
    /// Winograd's transform of the inputs.
    InputTransform,
    /// Winograd's transform of the filters.
    FilterTransform,
    /// The micro-kernel.
    Products,
    /// Writing results: Winograd's transform of them, bias, activation and residual.
    Epilogue,
    /// The weights of attention.
    Softmax,
}

/// Runs a part of a kernel, which is inlined into its caller.
#[inline(always)]
pub fn part<R>(which: Part, run: impl FnOnce() -> R) -> R {
    #[cfg(feature = "tuning")]
    let start = measuring::start();
    let result = run();
    #[cfg(feature = "tuning")]
    measuring::end(which, start);
    #[cfg(not(feature = "tuning"))]
    let _ = which;
    result
}

/// Runs a part of a kernel inside of [`vectorized`].
#[inline(always)]
pub fn vectorized_part<R>(which: Part, run: impl FnOnce() -> R) -> R {
    part(which, || vectorized(run))
}

#[cfg(feature = "tuning")]
mod measuring {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Instant;

    use super::Part;

    const NAMES: [&str; 6] = [
        "packing",
        "input transform",
        "filter transform",
        "products",
        "epilogue",
        "softmax",
    ];

    static IS_ON: AtomicBool = AtomicBool::new(false);
    static NANOSECONDS: [AtomicU64; NAMES.len()] = [const { AtomicU64::new(0) }; NAMES.len()];

    #[inline(always)]
    pub fn start() -> Option<Instant> {
        IS_ON.load(Ordering::Relaxed).then(Instant::now)
    }

    #[inline(always)]
    pub fn end(part: Part, start: Option<Instant>) {
        if let Some(start) = start {
            let time = start.elapsed().as_nanos() as u64;
            NANOSECONDS[part as usize].fetch_add(time, Ordering::Relaxed);
        }
    }

    /// Runs operations on the CPU, and returns the seconds that each part of their kernels took, on
    /// all threads together, by name. Measuring itself takes a few percent.
    pub fn measure_parts(operations: impl FnOnce()) -> Vec<(&'static str, f64)> {
        for time in &NANOSECONDS {
            time.store(0, Ordering::Relaxed);
        }
        IS_ON.store(true, Ordering::Relaxed);
        operations();
        IS_ON.store(false, Ordering::Relaxed);
        let times = NANOSECONDS
            .iter()
            .map(|time| time.load(Ordering::Relaxed) as f64 * 1e-9);
        NAMES.into_iter().zip(times).collect()
    }
}
