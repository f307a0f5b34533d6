//! Big tables: memory of their own, zeros until it is used.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytemuck::Zeroable;
use kvring_ipc::mapping::Mapping;

/// A table of entries of which all zeros is the empty one. What nobody uses has no pages, so that it takes no time to
/// make, whatever its size; whoever would rather have them beforehand populates its [`Table::memory`], from any thread.
///
/// Big ones lie on transparent hugepages where the kernel grants them: at a million blocks each lookup is a TLB miss, and
/// in a virtual machine a miss is a walk of two page tables. It also costs a page fault for each 2 MiB and not for each
/// 4 KiB.
pub struct Table<T> {
    memory: Arc<Mapping>,
    count: usize,
    entries: PhantomData<Box<[T]>>,
}

impl<T: Zeroable + Copy> Table<T> {
    /// So many empty entries.
    ///
    /// # Panics
    /// If there are no addresses for it, as allocations do.
    pub fn new(count: usize) -> Self {
        const { assert!(align_of::<T>() <= 4096, "a mapping begins on a page") };
        let bytes = count.checked_mul(size_of::<T>()).filter(|bytes| isize::try_from(*bytes).is_ok());
        let memory = bytes.and_then(|bytes| Mapping::private(bytes.max(1)).ok());
        #[expect(clippy::expect_used, reason = "as an allocation that fails; counts are checked against memory before")]
        let memory = memory.expect("addresses for a table");
        // Less than a hugepage gains nothing.
        if memory.bytes() >= 2 << 20 {
            memory.advise_hugepages();
        }
        Self { memory: Arc::new(memory), count, entries: PhantomData }
    }

    /// Where it lies, for [`populate`].
    pub fn memory(&self) -> Arc<Mapping> {
        self.memory.clone()
    }
}

impl<T> Deref for Table<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let first = self.memory.address(0, self.count * size_of::<T>()).cast::<T>();
        // SAFETY: aligned, as a page is, and inside the mapping by `address`. Zeros are a value of T (Zeroable, asked
        // for by `new`), and nothing but this table writes there: whoever has the memory besides it populates it only,
        // which changes no byte. Shared as long as &self.
        unsafe { std::slice::from_raw_parts(first, self.count) }
    }
}

impl<T> DerefMut for Table<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let first = self.memory.address(0, self.count * size_of::<T>()).cast::<T>();
        // SAFETY: as for `deref`, and exclusive as long as &mut self.
        unsafe { std::slice::from_raw_parts_mut(first, self.count) }
    }
}

impl<T> std::fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table of {}", self.count)
    }
}

/// Gives tables their pages, one after the other, and from the first on those that belong together, unless `stop` says
/// that nobody needs them any more. False: some come when they are used.
pub fn populate(tables: &[Vec<Arc<Mapping>>], stop: impl Fn() -> bool) -> bool {
    // In steps: while a range is populated nobody can map anything (mmap_lock), a new session for one.
    const STEP: usize = 2 << 20;
    for together in tables {
        let steps = together.iter().map(|table| table.bytes().div_ceil(STEP)).max().unwrap_or(0);
        for step in 0..steps {
            for table in together {
                let at = |step: usize| (table.bytes() as u128 * step as u128 / steps as u128) as usize / STEP * STEP;
                let from = at(step);
                let to = if step + 1 == steps { table.bytes() } else { at(step + 1) };
                // Before Linux 5.14, or where there is no memory: pages come when they are used.
                if from < to && (stop() || table.populate(from, to - from).is_err()) {
                    return false;
                }
            }
        }
    }
    true
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

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_table_is_empty_at_first_and_keeps_what_is_written_when_it_is_populated() {
        let mut table = Table::<[u64; 3]>::new(300_000);
        assert!(table.iter().all(|entry| *entry == [0; 3]));
        table[299_999] = [1, 2, 3];
        let small = Table::<u64>::new(10);
        assert!(populate(&[vec![small.memory()], vec![table.memory(), small.memory()]], || false));
        assert!(!populate(&[vec![table.memory()]], || true));
        assert_eq!((table.len(), table[0], table[299_999]), (300_000, [0; 3], [1, 2, 3]));
        assert!(Table::<u64>::new(0).is_empty());
    }
}
