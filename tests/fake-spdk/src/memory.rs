//! Memory that a device may reach, and what of it is in flight. Knows nothing of controllers.

use std::alloc::Layout;
use std::collections::{BTreeMap, HashMap};
use std::sync::{LazyLock, Mutex};

use crate::{die, lock};

/// What SPDK's memory map is made of.
const REGION_ALIGNMENT: usize = 2 << 20;
/// Of `dma_alloc`.
const DMA_ALIGNMENT: usize = 4096;

/// A command in flight: its pair, and its number there.
pub type Flight = (usize, u64);

/// One lock for regions and flights: a command never begins between the check and the end of its region.
#[derive(Default)]
pub struct Memory {
    /// Address → bytes.
    registered: BTreeMap<usize, usize>,
    allocated: BTreeMap<usize, Layout>,
    moving: HashMap<Flight, (usize, usize)>,
}

static MEMORY: LazyLock<Mutex<Memory>> = LazyLock::new(Mutex::default);

/// The one memory of the process.
pub fn with<T>(what: impl FnOnce(&mut Memory) -> T) -> T {
    what(&mut lock(&MEMORY))
}

impl Memory {
    pub fn register(&mut self, start: usize, bytes: usize) -> i32 {
        let is_aligned = start.is_multiple_of(REGION_ALIGNMENT) && bytes.is_multiple_of(REGION_ALIGNMENT);
        let Some(end) = start.checked_add(bytes) else { return -libc::EINVAL };
        if start == 0 || bytes == 0 || !is_aligned {
            return -libc::EINVAL;
        }
        // The last region that begins before this one's end is the only one that can reach into it.
        if self.registered.range(..end).next_back().is_some_and(|(at, size)| at + size > start) {
            return -libc::EBUSY;
        }
        self.registered.insert(start, bytes);
        0
    }

    /// Memory of `dma_alloc`: 0 if there is none.
    pub fn allocate(&mut self, bytes: usize) -> usize {
        let Ok(layout) = Layout::from_size_align(bytes, DMA_ALIGNMENT) else { return 0 };
        if bytes == 0 {
            return 0;
        }
        // SAFETY: the layout has more than zero bytes: checked above.
        let memory = unsafe { std::alloc::alloc(layout) };
        if memory.is_null() {
            return 0;
        }
        // Whoever relies on zeroes learns it.
        // SAFETY: the allocator has just given these bytes, and nobody else knows of them.
        unsafe { memory.write_bytes(0xA5, bytes) };
        let start = memory.expose_provenance();
        self.allocated.insert(start, layout);
        start
    }

    pub fn free(&mut self, start: usize) {
        let Some(layout) = self.allocated.remove(&start) else { die("memory is freed that dma_alloc did not give") };
        if self.is_moving(start, layout.size()) {
            die("memory is freed while a command in flight lies in it");
        }
        // SAFETY: `allocate` has it from the same allocator with this layout, and the entry that said so is gone.
        unsafe { std::alloc::dealloc(std::ptr::with_exposed_provenance_mut(start), layout) };
    }

    /// If all of it lies in one region, or in one allocation.
    pub fn is_reachable(&self, start: usize, bytes: usize) -> bool {
        let Some(end) = start.checked_add(bytes) else { return false };
        let is_registered = self.registered.range(..=start).next_back().is_some_and(|(at, size)| end <= at + size);
        let is_allocated = self.allocated.range(..=start).next_back().is_some_and(|(at, of)| end <= at + of.size());
        is_registered || is_allocated
    }

    pub fn begin(&mut self, flight: Flight, start: usize, bytes: usize) {
        self.moving.insert(flight, (start, bytes));
    }

    pub fn end(&mut self, flight: Flight) {
        self.moving.remove(&flight);
    }

    /// Forgets what a pair had in flight.
    pub fn end_all(&mut self, pair: usize) {
        self.moving.retain(|flight, _| flight.0 != pair);
    }

    fn is_moving(&self, start: usize, bytes: usize) -> bool {
        let end = start.saturating_add(bytes);
        self.moving.values().any(|(at, size)| *at < end && start < at.saturating_add(*size))
    }
}
