//! Who moves the bytes of one block between a slot of the pool and the instance's memory.

pub mod host;
#[expect(unsafe_code, reason = "it copies to and from memory that the inference engine owns")]
pub mod tensors;

use kvring_ipc::client::Pool;

/// A copy back end. A block is a few pages of the instance's memory; what a page's number means is the
/// back end's own affair.
pub trait CopyBackend {
    /// Pages that make one block.
    fn pages_per_block(&self) -> usize;
    /// Slot → pages; [`crate::layout::NO_PAGE`] is skipped. When it returns, the slot may be reused.
    fn load(&mut self, pool: &Pool, slot: u32, pages: &[u32]);
    /// Pages → slot. When it returns, the slot may be committed.
    fn store(&mut self, pool: &Pool, slot: u32, pages: &[u32]);
}
