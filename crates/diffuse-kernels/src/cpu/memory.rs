//! Memory for results and for what lies between.
//!
//! Memory that nobody needs any more is kept for who needs some next: fresh memory takes longer to
//! get than to fill.

use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn_std::{AllocationController, AllocationProperty, Bytes};

/// Values that are kept at most: 512 MiB.
const KEPT: usize = 1 << 27;
/// Values from which on they are kept: of fewer, the allocator itself keeps the memory.
const LARGE: usize = 1 << 12;
/// Values of a cache line. A vector across two of them takes longer to read.
const LINE: usize = 16;

/// A 64-byte-aligned buffer from the pool; its contents are unspecified.
#[derive(Default)]
pub struct PooledBuffer {
    memory: Vec<f32>,
    len: usize,
}

impl PooledBuffer {
    pub fn new(len: usize) -> Self {
        let mut buffer = Self::default();
        buffer.resize(len);
        buffer
    }

    /// Makes room for so many values; their contents are unspecified.
    pub fn resize(&mut self, len: usize) -> &mut [f32] {
        let needed = len + LINE;
        if self.memory.len() < needed {
            give_back(std::mem::take(&mut self.memory));
            self.memory = take(needed).unwrap_or_else(|| zeros(needed));
            // What is read before it is written shows in tests.
            if cfg!(any(test, debug_assertions)) {
                self.memory.fill(f32::NAN);
            }
        }
        self.len = len;
        self
    }

    /// Where the first cache line starts; under Miri there may be none.
    fn start(&self) -> usize {
        let start = self.memory.as_ptr().align_offset(LINE * size_of::<f32>());
        start.min(self.memory.len() - self.len)
    }

    /// As the memory of a tensor.
    pub fn into_bytes(self) -> Bytes {
        let len = size_of_val::<[f32]>(&self);
        // SAFETY: the controller's memory is that of initialised values, as many as `len` is for.
        unsafe { Bytes::from_controller(Box::new(self), len) }
    }
}

impl Deref for PooledBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.memory[self.start()..][..self.len]
    }
}

impl DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        let start = self.start();
        &mut self.memory[start..][..self.len]
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        give_back(std::mem::take(&mut self.memory));
    }
}

impl AllocationController for PooledBuffer {
    fn alloc_align(&self) -> usize {
        align_of::<f32>()
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        let values: &mut [f32] = self;
        // SAFETY: the same memory, borrowed as it is. The caller leaves it initialised, and any
        // bytes are an `f32`.
        unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
    }

    fn memory(&self) -> &[MaybeUninit<u8>] {
        let values: &[f32] = self;
        // SAFETY: the same memory, borrowed as it is.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
    }
}

/// What was given back, sorted by length.
fn kept() -> MutexGuard<'static, Vec<Vec<f32>>> {
    static POOL: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());
    // Nobody panics while it is locked.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The smallest that is kept and large enough, if it is not far too large.
fn take(len: usize) -> Option<Vec<f32>> {
    let mut kept = kept();
    let index = kept.partition_point(|values| values.len() < len);
    let fits = kept
        .get(index)
        .is_some_and(|values| values.len() / 2 <= len);
    fits.then(|| kept.remove(index))
}

/// Frees all that is kept.
pub fn free_pooled_memory() {
    let freed = std::mem::take(&mut *kept());
    // After the lock.
    drop(freed);
}

/// Keeps it in place of smaller ones.
fn give_back(values: Vec<f32>) {
    if !(LARGE..=KEPT).contains(&values.len()) {
        return;
    }
    let mut kept = kept();
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

/// Zeros, in pages as large as the system has them: fresh memory in pages of 4 KiB takes longer to
/// get than to fill.
fn zeros(len: usize) -> Vec<f32> {
    let values = vec![0.0; len];
    #[cfg(target_os = "linux")]
    advise(&values);
    values
}

/// Asks for large pages, which Linux gives to those who ask. It may refuse. The advice stays with
/// the memory when it is freed; then it may count as used in large pages, too.
#[cfg(target_os = "linux")]
fn advise(values: &[f32]) {
    const PAGE: usize = 1 << 21;
    let range = values.as_ptr_range();
    // Whole large pages within the values, which are therefore whole small ones as well.
    let end = range.end as usize / PAGE * PAGE;
    let start = (range.start as usize).checked_next_multiple_of(PAGE);
    if let Some(start) = start.filter(|start| *start < end) {
        // SAFETY: the range is within memory of `values`, and this advice changes neither its
        // contents nor its access.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}
