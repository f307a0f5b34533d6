//! One instance and its KV memory, in the caller's own thread: match, load what hits, store what missed.
//! Every call is bounded and none fails: what cannot be had is missed, what cannot be stored is
//! dropped. Replays and tests use it; an inference engine uses [`crate::agent`].

use std::time::Duration;

use kvring_ipc::client::{Lease, Matched};
use kvring_ipc::instance::{Instance, LoadStep, Loaded, Reserved};
use kvring_ipc::key::BlockKey;

use crate::backend::BlockMemory;

/// What became of a store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Blocks that are resident now because of it.
    pub blocks_stored: u32,
    /// Blocks that were there already or that somebody else is storing.
    pub blocks_present: u32,
    /// Blocks for which there was no room, no parent or no server.
    pub blocks_dropped: u32,
}

/// An instance and its memory.
pub struct DirectAgent<B> {
    instance: Instance,
    backend: B,
}

impl<B: BlockMemory> DirectAgent<B> {
    /// Over an open instance and its memory.
    pub fn new(instance: Instance, backend: B) -> Self {
        Self { instance, backend }
    }

    /// The instance.
    pub fn instance(&mut self) -> &mut Instance {
        &mut self.instance
    }

    /// Its memory.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// The longest resident prefix of a chain, under a lease.
    pub fn match_prefix(&mut self, keys: &[BlockKey]) -> Matched {
        self.instance.match_prefix(keys)
    }

    /// Loads leased blocks, the first at depth `first`, into the memory's blocks `blocks`. `arrived`
    /// is told the index of each block that is there; only those count.
    pub fn load(
        &mut self,
        lease: Lease,
        first: u32,
        keys: &[BlockKey],
        blocks: &[usize],
        wait: Duration,
        mut arrived: impl FnMut(&mut B, usize),
    ) -> Loaded {
        assert_eq!(keys.len(), blocks.len());
        let backend = &mut self.backend;
        self.instance.load(lease, first, keys, wait, |step| match step {
            LoadStep::Copy { index, pool, slot } => backend.load(pool, slot, &[blocks[index as usize] as u32], 0..1),
            LoadStep::Arrived { index } => arrived(backend, index as usize),
        })
    }

    /// Stores consecutive blocks after `parent`, the first at depth `first`, from the memory's blocks
    /// `blocks`. `compute` is asked to have each block ready that really has to be stored.
    pub fn store(
        &mut self,
        parent: BlockKey,
        first: u32,
        keys: &[BlockKey],
        blocks: &[usize],
        mut compute: impl FnMut(&mut B, usize),
    ) -> Stored {
        assert_eq!(keys.len(), blocks.len());
        let mut stored = Stored::default();
        let reserved = self.instance.reserve(parent, first, keys);
        let mut grants = Vec::with_capacity(keys.len());
        for (index, reserved) in reserved.into_iter().enumerate() {
            match reserved {
                Reserved::Slot(slot) => {
                    compute(&mut self.backend, index);
                    // None: the session was lost meanwhile, and the slot with it.
                    let Some(pool) = self.instance.pool_of(slot) else {
                        stored.blocks_dropped += 1;
                        self.instance.abort(&[slot]);
                        continue;
                    };
                    self.backend.store(pool, slot.grant.slot, &[blocks[index] as u32], 0..1);
                    grants.push(slot);
                }
                Reserved::Present => stored.blocks_present += 1,
                Reserved::Dropped => stored.blocks_dropped += 1,
            }
        }
        stored.blocks_stored = self.instance.commit(&grants);
        stored.blocks_dropped += grants.len() as u32 - stored.blocks_stored;
        stored
    }
}
