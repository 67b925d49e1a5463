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
