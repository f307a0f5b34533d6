//! KV memory of our own, for replays and tests: a copy is a memcpy.

use kvring_ipc::client::Pool;

use super::CopyBackend;

/// KV memory of an instance without a GPU.
#[derive(Debug)]
pub struct HostMemory {
    bytes: Vec<u8>,
    block_bytes: usize,
}

impl HostMemory {
    /// Room for `blocks_count` blocks, touched.
    pub fn new(blocks_count: usize, block_bytes: usize) -> Self {
        // Ones, not zeros: calloc's pages would only come with the first copy.
        Self { bytes: vec![1; blocks_count * block_bytes], block_bytes }
    }

    /// How many blocks fit.
    pub fn blocks_count(&self) -> usize {
        self.bytes.len() / self.block_bytes
    }

    /// One block.
    pub fn block(&self, block: usize) -> &[u8] {
        &self.bytes[block * self.block_bytes..][..self.block_bytes]
    }

    /// One block, to be computed.
    pub fn block_mut(&mut self, block: usize) -> &mut [u8] {
        &mut self.bytes[block * self.block_bytes..][..self.block_bytes]
    }
}

impl CopyBackend for HostMemory {
    fn pages_per_block(&self) -> usize {
        1
    }

    fn load(&mut self, pool: &Pool, slot: u32, pages: &[u32]) {
        pool.copy_out(slot, 0, self.block_mut(pages[0] as usize));
    }

    fn store(&mut self, pool: &Pool, slot: u32, pages: &[u32]) {
        pool.copy_in(slot, 0, self.block(pages[0] as usize));
    }
}
