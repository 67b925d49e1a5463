//! Memory for results and scratch buffers.
//!
//! Freed buffers go to a pool and are used again: memory fresh from the system takes longer to get
//! than to fill.

use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn_std::{AllocationController, AllocationProperty, Bytes};

/// Values in the pool at most: 512 MiB.
const MAX_POOLED: usize = 1 << 27;
/// Smaller buffers are not pooled: the allocator itself keeps their memory.
const MIN_POOLED: usize = 1 << 12;
/// Values of a cache line. Reading a vector across two lines takes longer.
const CACHE_LINE: usize = 16;

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

    /// Sets the length; the contents are unspecified.
    pub fn resize(&mut self, len: usize) -> &mut [f32] {
        let needed = len + CACHE_LINE;
        if self.memory.len() < needed {
            give_back(std::mem::take(&mut self.memory));
            self.memory = take(needed).unwrap_or_else(|| zeros(needed));
            // NaN makes tests fail if a value is read before it is written.
            if cfg!(any(test, debug_assertions)) {
                self.memory.fill(f32::NAN);
            }
        }
        self.len = len;
        self
    }

    /// Index of the first aligned value; under Miri there may be none.
    fn start(&self) -> usize {
        let start = self
            .memory
            .as_ptr()
            .align_offset(CACHE_LINE * size_of::<f32>());
        start.min(self.memory.len() - self.len)
    }

    /// The buffer as the memory of a tensor.
    pub fn into_bytes(self) -> Bytes {
        let len = size_of_val::<[f32]>(&self);
        // SAFETY: the controller's memory is `len` bytes of initialised values.
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
        // SAFETY: the same memory and lifetime. The caller leaves it initialised, and every bit
        // pattern is a valid `f32`.
        unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
    }

    fn memory(&self) -> &[MaybeUninit<u8>] {
        let values: &[f32] = self;
        // SAFETY: the same memory and lifetime.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
    }
}

/// The freed buffers, sorted by length.
fn pool() -> MutexGuard<'static, Vec<Vec<f32>>> {
    static POOL: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The smallest pooled buffer of at least `len` values, unless it is more than twice as large.
fn take(len: usize) -> Option<Vec<f32>> {
    let mut pool = pool();
    let index = pool.partition_point(|values| values.len() < len);
    let fits = pool
        .get(index)
        .is_some_and(|values| values.len() / 2 <= len);
    fits.then(|| pool.remove(index))
}

/// Frees the memory of the pool.
pub fn free_pooled_memory() {
    let freed = std::mem::take(&mut *pool());
    // Freed after the lock is released.
    drop(freed);
}

/// Returns a buffer to the pool, which drops smaller ones if it is full.
fn give_back(values: Vec<f32>) {
    if !(MIN_POOLED..=MAX_POOLED).contains(&values.len()) {
        return;
    }
    let mut pool = pool();
    let mut sum = values.len() + pool.iter().map(Vec::len).sum::<usize>();
    let excess = pool.iter().take_while(|smallest| {
        let is_full = sum > MAX_POOLED;
        sum -= smallest.len();
        is_full
    });
    let excess = excess.count();
    let freed: Vec<_> = pool.drain(..excess).collect();
    let index = pool.partition_point(|other| other.len() < values.len());
    pool.insert(index, values);
    // Freed after the lock is released.
    drop(pool);
    drop(freed);
}

/// Fresh zeros, in huge pages where the system has them: pages of 4 KiB take longer to get than to
/// fill.
fn zeros(len: usize) -> Vec<f32> {
    let values = vec![0.0; len];
    #[cfg(target_os = "linux")]
    advise_huge_pages(&values);
    values
}

/// Asks Linux for transparent huge pages, which it may refuse. The advice stays with the address
/// range after the memory is freed.
#[cfg(target_os = "linux")]
fn advise_huge_pages(values: &[f32]) {
    const HUGE_PAGE: usize = 1 << 21;
    let range = values.as_ptr_range();
    // The huge pages that lie within the values, and so hold nothing else.
    let end = range.end as usize / HUGE_PAGE * HUGE_PAGE;
    let start = (range.start as usize).checked_next_multiple_of(HUGE_PAGE);
    if let Some(start) = start.filter(|start| *start < end) {
        // SAFETY: the range is within `values`, and the advice changes neither its contents nor its
        // access rights.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

/// Has an x86 CPU fetch values that will be read or written soon.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
pub fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(CACHE_LINE * size_of::<f32>() / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which changes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}
