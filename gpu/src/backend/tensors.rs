//! KV memory that an inference engine owns, in ordinary memory: torch tensors on a CPU.

use std::sync::Arc;

use kvring_ipc::client::Pool;

use super::CopyBackend;
use crate::layout::{MemoryMap, Plan};

/// Tensors of an inference engine.
#[derive(Debug)]
pub struct TensorMemory {
    plan: Arc<Plan>,
}

impl TensorMemory {
    /// Over tensors that somebody else owns.
    ///
    /// # Errors
    /// What is wrong with the map.
    ///
    /// # Safety
    /// For as long as this value lives, every byte that the map names stays mapped and writable, and
    /// nobody else accesses a page while a load of it or writes to it while a store of it is under way.
    pub unsafe fn new(map: &MemoryMap) -> Result<Self, String> {
        Ok(Self { plan: Arc::new(Plan::new(map)?) })
    }

    /// What copying a block means.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }
}

impl CopyBackend for TensorMemory {
    fn pages_per_block(&self) -> usize {
        self.plan.pages_per_block()
    }

    fn load(&mut self, pool: &Pool, slot: u32, pages: &[u32]) {
        self.plan.copies(pages, |copy| {
            let target = std::ptr::with_exposed_provenance_mut(copy.address);
            // SAFETY: `new`'s caller keeps these bytes mapped, and ours alone while this load is under
            // way; `Plan` has checked that they are inside the tensor.
            let target = unsafe { std::slice::from_raw_parts_mut(target, copy.bytes) };
            pool.copy_out(slot, copy.offset_in_slot, target);
        });
    }

    fn store(&mut self, pool: &Pool, slot: u32, pages: &[u32]) {
        self.plan.copies(pages, |copy| {
            let source = std::ptr::with_exposed_provenance(copy.address);
            // SAFETY: as in `load`; nobody writes to them while this store is under way.
            let source = unsafe { std::slice::from_raw_parts(source, copy.bytes) };
            pool.copy_in(slot, copy.offset_in_slot, source);
        });
    }
}
