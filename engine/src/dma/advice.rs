//! Advice about memory: never changes a byte, and costs nothing when it is refused.

/// A big table of equal entries, on transparent hugepages where the kernel grants them: at a million blocks
/// each lookup is a TLB miss, and in a virtual machine a miss is a walk of two page tables. Asked before the
/// first touch, it also costs a page fault for each 2 MiB and not for each 4 KiB.
pub fn table<T: Copy>(entry: T, count: usize) -> Box<[T]> {
    let mut table = Vec::with_capacity(count);
    advise_hugepages(table.spare_capacity_mut());
    table.resize(count, entry);
    table.into_boxed_slice()
}

fn advise_hugepages<T>(table: &[T]) {
    const PAGE: usize = 4096;
    let (start, end) = (table.as_ptr() as usize, table.as_ptr() as usize + size_of_val(table));
    let (start, end) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
    // Less than a hugepage gains nothing.
    if end.saturating_sub(start) < 2 << 20 {
        return;
    }
    let address = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: whole pages inside a table that is ours; the advice changes no byte.
    let _ = unsafe { rustix::mm::madvise(address, end - start, rustix::mm::Advice::LinuxHugepage) };
}

/// Brings a value's cache line closer.
#[inline]
pub fn prefetch<T>(value: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64; a prefetch of any address changes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}
