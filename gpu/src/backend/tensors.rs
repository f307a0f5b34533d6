//! KV memory that an inference engine owns: torch tensors, on a CPU or on a device.

use std::ops::Range;
use std::sync::Arc;

use kvring_ipc::client::Pool;

use super::{BlockMemory, Shape};
use crate::layout::{MemoryMap, Placement};

/// Tensors of an inference engine, as promised by whoever made this value.
#[derive(Debug, Clone)]
pub struct Tensors {
    placement: Arc<Placement>,
}

impl Tensors {
    /// Over tensors that somebody else owns.
    ///
    /// # Errors
    /// What is wrong with the map.
    ///
    /// # Safety
    /// Until the agent that is given this value has been stopped or suspended, every byte that the map names
    /// stays mapped and writable (device memory: allocated, in the context of its device), and nobody else
    /// accesses a page while a load of it, or writes to it while a store of it, is under way.
    pub unsafe fn new(map: &MemoryMap) -> Result<Self, String> {
        Ok(Self { placement: Arc::new(Placement::new(map)?) })
    }

    /// Where the bytes of a block lie.
    pub fn placement(&self) -> &Arc<Placement> {
        &self.placement
    }

    /// What pages a block may lie in.
    pub fn shape(&self) -> Shape {
        Shape {
            pages_counts: self.placement.pages_counts(),
            tensors_count: self.placement.tensors_count(),
            in_slot: (self.placement.slot_start(), self.placement.slot_end()),
        }
    }
}

/// Tensors in ordinary memory.
#[derive(Debug, Clone)]
pub struct HostTensors {
    tensors: Tensors,
    non_temporal_from_bytes: usize,
}

impl HostTensors {
    /// Over tensors that the processor can reach, which is part of the promise behind them.
    pub fn new(tensors: Tensors) -> Self {
        Self { tensors, non_temporal_from_bytes: NON_TEMPORAL_FROM_BYTES }
    }

    /// As [`HostTensors::new`], with copies past the caches from so many bytes on: benchmarks compare.
    pub fn with_non_temporal_from(tensors: Tensors, bytes: usize) -> Self {
        Self { tensors, non_temporal_from_bytes: bytes }
    }
}

/// From this many bytes on in one run, a load goes past the caches: see `kvring bench copy`.
pub const NON_TEMPORAL_FROM_BYTES: usize = 4 << 10;
/// A store's runs have to be this many times as long: it reads short ones from all over, and waits for them.
const STORE_FACTOR: usize = 16;

/// Copies bytes that nobody on this core is about to read.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`].
unsafe fn copy_past_caches(source: *const u8, target: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
        const LINE: usize = 64;
        let head = target.align_offset(LINE).min(bytes);
        // SAFETY: head <= bytes, and the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(source, target, head) };
        let lines = (bytes - head) / LINE;
        for line in 0..lines {
            let at = head + line * LINE;
            let read = |part: usize| {
                // SAFETY: at + LINE <= bytes; an unaligned load has no other demand.
                unsafe { _mm_loadu_si128(source.wrapping_add(at + part * 16).cast::<__m128i>()) }
            };
            for (part, value) in [read(0), read(1), read(2), read(3)].into_iter().enumerate() {
                // SAFETY: as the load; the target is aligned to a line since `head`.
                unsafe { _mm_stream_si128(target.wrapping_add(at + part * 16).cast::<__m128i>(), value) };
            }
        }
        let tail = head + lines * LINE;
        // SAFETY: tail <= bytes, and the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(source.wrapping_add(tail), target.wrapping_add(tail), bytes - tail);
        }
        // Streaming stores are ordered by nothing else: whoever is told of the copy must see it.
        // SAFETY: every x86-64 has SSE.
        unsafe { _mm_sfence() };
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, bytes);
    }
}

impl BlockMemory for HostTensors {
    fn shape(&self) -> Shape {
        self.tensors.shape()
    }

    fn load(&mut self, pool: &Pool, slot: u32, pages: &[u32], tensors: Range<u32>) {
        let slot_at = pool.offset_of(slot);
        self.tensors.placement.copies(pages, tensors, |copy| {
            assert!(copy.offset_in_slot + copy.bytes <= pool.slot_bytes());
            let source = pool.mapping().address(slot_at + copy.offset_in_slot, copy.bytes).cast_const();
            let target = std::ptr::with_exposed_provenance_mut(copy.address);
            // SAFETY: `address` and the assert bound the source; `Tensors::new`'s caller keeps the target
            // mapped, and ours alone while this load is under way; `Placement` has checked that it is inside
            // the tensor. The server may write to the slot meanwhile: a mixture, which the lease tells.
            unsafe { self.copy(source, target, copy.bytes, self.non_temporal_from_bytes) };
        });
    }

    fn store(&mut self, pool: &Pool, slot: u32, pages: &[u32], tensors: Range<u32>) {
        let slot_at = pool.offset_of(slot);
        self.tensors.placement.copies(pages, tensors, |copy| {
            assert!(copy.offset_in_slot + copy.bytes <= pool.slot_bytes());
            let target = pool.mapping().address(slot_at + copy.offset_in_slot, copy.bytes);
            let source = std::ptr::with_exposed_provenance(copy.address);
            let from = self.non_temporal_from_bytes.saturating_mul(STORE_FACTOR);
            // SAFETY: as in `load`; nobody writes to the source while this store is under way.
            unsafe { self.copy(source, target, copy.bytes, from) };
        });
    }

    fn replace(&mut self, tensors: Tensors) -> Result<(), String> {
        self.tensors = tensors;
        Ok(())
    }
}

impl HostTensors {
    /// # Safety
    /// As [`std::ptr::copy_nonoverlapping`].
    unsafe fn copy(&self, source: *const u8, target: *mut u8, bytes: usize, past_caches_from: usize) {
        if bytes >= past_caches_from {
            // SAFETY: the caller's promise.
            unsafe { copy_past_caches(source, target, bytes) };
        } else {
            // SAFETY: the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(source, target, bytes) };
        }
    }
}
