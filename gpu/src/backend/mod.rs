//! Who moves the bytes of one block between a slot of the pool and the instance's memory.

pub mod host;

use kvring_ipc::client::Pool;

/// A copy back end. Blocks of the instance's memory are numbered; what a number means is its own.
pub trait CopyBackend {
    /// Slot → block. When it returns, the slot may be reused.
    fn load(&mut self, pool: &Pool, slot: u32, block: usize);
    /// Block → slot. When it returns, the slot may be committed.
    fn store(&mut self, pool: &Pool, slot: u32, block: usize);
}
