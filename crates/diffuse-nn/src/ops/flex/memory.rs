//! Memory for results and for what lies between.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Values that are kept for whoever needs room next, at most: 64 MiB.
const KEPT: usize = 1 << 24;
/// Values of a cache line. A vector across two of them takes longer to read.
const LINE: usize = 16;

/// Room for values in between, in which others have left theirs. It is given back for the next: fresh memory takes longer
/// to get than to fill.
#[derive(Default)]
pub struct Room(Vec<f32>);

impl Room {
    /// Room for so many values, with anything in it, from the start of a cache line.
    pub fn resize(&mut self, len: usize) -> &mut [f32] {
        if self.0.len() < len + LINE {
            self.give_back();
            self.0 = Self::take(len + LINE).unwrap_or_else(|| zeros(len + LINE));
            // What is read before it is written shows in the tests.
            if cfg!(test) {
                self.0.fill(f32::NAN);
            }
        }
        let start = self.0.as_ptr().align_offset(LINE * size_of::<f32>());
        // Under Miri there may be no such start.
        &mut self.0[start.min(LINE)..][..len]
    }

    /// What was given back, sorted by length.
    fn kept() -> MutexGuard<'static, Vec<Vec<f32>>> {
        static POOL: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());
        // Nobody panics while it is locked.
        POOL.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The smallest that is kept and large enough.
    fn take(len: usize) -> Option<Vec<f32>> {
        let mut kept = Self::kept();
        let index = kept.partition_point(|values| values.len() < len);
        (index < kept.len()).then(|| kept.remove(index))
    }

    /// Keeps it in place of smaller ones.
    fn give_back(&mut self) {
        let values = std::mem::take(&mut self.0);
        if values.is_empty() || values.len() > KEPT {
            return;
        }
        let mut kept = Self::kept();
        let mut sum = values.len() + kept.iter().map(Vec::len).sum::<usize>();
        let too_many = kept.iter().take_while(|smallest| {
            let is_too_much = sum > KEPT;
            sum -= smallest.len();
            is_too_much
        });
        let too_many = too_many.count();
        let freed: Vec<_> = kept.drain(..too_many).collect();
        let index = kept.partition_point(|other| other.len() < values.len());
        kept.insert(index, values);
        // After the lock.
        drop(kept);
        drop(freed);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Zeros, in pages as large as the system has them: fresh memory in pages of 4 KiB takes longer to get than to fill.
pub fn zeros(len: usize) -> Vec<f32> {
    let values = vec![0.0; len];
    #[cfg(target_os = "linux")]
    advise(&values);
    values
}

/// Asks for large pages, which Linux gives to those who ask. It may refuse. The advice stays with the
/// memory when it is freed; then it may count as used in large pages, too.
#[cfg(target_os = "linux")]
fn advise(values: &[f32]) {
    const PAGE: usize = 1 << 21;
    let range = values.as_ptr_range();
    // Whole large pages within the values, which are therefore whole small ones as well.
    let end = range.end as usize / PAGE * PAGE;
    let start = (range.start as usize).checked_next_multiple_of(PAGE);
    if let Some(start) = start.filter(|start| *start < end) {
        // SAFETY: the range is within memory of `values`, and this advice changes neither its contents nor its access.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}
