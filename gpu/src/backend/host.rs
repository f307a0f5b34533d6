//! Copies by the processor: for inference on CPUs, and for every test.
//!
//! Without threads of its own a poll copies one block, so that whoever polls looks at its rings between
//! two; with threads, as many blocks as there are threads are copied at once.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};
use kvring_ipc::client::Pool;

use super::tensors::Tensors;
use super::{Batch, BatchId, BlockCopy, BlockMemory, CopyBackend, Direction, Outcome, Refusal, Shape};

/// One block under way.
struct Job {
    id: BatchId,
    direction: Direction,
    pool: Pool,
    slot: u32,
    pages: Vec<u32>,
    tensors: Range<u32>,
}

impl Job {
    fn copy(&self, memory: &mut impl BlockMemory) {
        match self.direction {
            Direction::Load => memory.load(&self.pool, self.slot, &self.pages, self.tensors.clone()),
            Direction::Store => memory.store(&self.pool, self.slot, &self.pages, self.tensors.clone()),
        }
    }
}

enum Order {
    Copy(Job),
    Replace(Tensors),
}

struct Helpers {
    orders: Vec<Sender<Order>>,
    next: usize,
    ended: Receiver<(BatchId, Outcome)>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

/// Copies by the processor.
pub struct HostBackend<M> {
    memory: M,
    /// Without helpers: what the next poll copies.
    waiting: Option<Job>,
    helpers: Option<Helpers>,
}

impl<M: BlockMemory> HostBackend<M> {
    /// Copies in the thread that polls.
    pub fn new(memory: M) -> Self {
        Self { memory, waiting: None, helpers: None }
    }

    /// The memory.
    pub fn memory(&mut self) -> &mut M {
        &mut self.memory
    }
}

impl<M: BlockMemory + Clone + Send + 'static> HostBackend<M> {
    /// Copies with so many threads; 0 for none.
    ///
    /// # Errors
    /// What the system says of a thread.
    pub fn with_threads(memory: M, threads_count: usize) -> std::io::Result<Self> {
        let mut backend = Self::new(memory);
        if threads_count == 0 {
            return Ok(backend);
        }
        let (tell, ended) = unbounded();
        let (mut orders, mut threads) = (Vec::new(), Vec::new());
        for number in 0..threads_count {
            // One that is copied, one that waits: a thread never waits for the next.
            let (sender, receiver) = bounded(2);
            let (mut memory, tell) = (backend.memory.clone(), tell.clone());
            let copies = move || {
                for order in receiver {
                    match order {
                        Order::Copy(job) => {
                            // A bug of ours costs a block, not the wait of whoever asked.
                            let copied = std::panic::catch_unwind(AssertUnwindSafe(|| job.copy(&mut memory)));
                            let outcome = if copied.is_ok() { Outcome::Copied } else { Outcome::Failed };
                            let _ = tell.send((job.id, outcome));
                        }
                        Order::Replace(tensors) => drop(memory.replace(tensors)),
                    }
                }
            };
            threads.push(std::thread::Builder::new().name(format!("kvring-copy-{number}")).spawn(copies)?);
            orders.push(sender);
        }
        backend.helpers = Some(Helpers { orders, next: 0, ended, threads });
        Ok(backend)
    }
}

impl<M: BlockMemory> CopyBackend for HostBackend<M> {
    fn shape(&self) -> Shape {
        self.memory.shape()
    }

    /// One at a time: whoever offers looks at its rings between two.
    fn room(&self, _direction: Direction, _tensors: &Range<u32>) -> usize {
        match &self.helpers {
            None => usize::from(self.waiting.is_none()),
            Some(helpers) => usize::from(helpers.orders.iter().any(|orders| !orders.is_full())),
        }
    }

    fn submit(&mut self, id: BatchId, batch: &Batch<'_>) -> Result<usize, Refusal> {
        let Some(BlockCopy { slot, pages }) = batch.blocks.first() else { return Err(Refusal::Full) };
        let job = || Job {
            id,
            direction: batch.direction,
            pool: batch.pool.clone(),
            slot: *slot,
            pages: pages.to_vec(),
            tensors: batch.tensors.clone(),
        };
        match &mut self.helpers {
            None if self.waiting.is_some() => return Err(Refusal::Full),
            None => self.waiting = Some(job()),
            Some(helpers) => {
                let count = helpers.orders.len();
                // Round and round: blocks are alike.
                let free = (helpers.next..helpers.next + count).find(|at| !helpers.orders[at % count].is_full());
                let Some(at) = free else { return Err(Refusal::Full) };
                match helpers.orders[at % count].try_send(Order::Copy(job())) {
                    Ok(()) => helpers.next = (at + 1) % count,
                    Err(TrySendError::Full(_)) => return Err(Refusal::Full),
                    Err(TrySendError::Disconnected(_)) => {
                        return Err(Refusal::Broken("a copying thread is gone".into()));
                    }
                }
            }
        }
        Ok(1)
    }

    fn poll(&mut self, ended: &mut Vec<(BatchId, Outcome)>) {
        if let Some(job) = self.waiting.take() {
            job.copy(&mut self.memory);
            ended.push((job.id, Outcome::Copied));
        }
        if let Some(helpers) = &self.helpers {
            for told in helpers.ended.try_iter() {
                ended.push(told);
            }
        }
    }

    fn moves_by_itself(&self) -> bool {
        self.helpers.is_some()
    }

    fn nap(&self) -> Duration {
        // A thread's copy takes tens of microseconds; without threads the poll is the copy.
        if self.helpers.is_some() { Duration::from_micros(20) } else { Duration::ZERO }
    }

    fn resume(&mut self, tensors: Tensors) -> Result<Shape, String> {
        self.memory.replace(tensors.clone())?;
        for orders in self.helpers.iter().flat_map(|helpers| &helpers.orders) {
            // Nothing is in flight: there is room.
            orders.send(Order::Replace(tensors.clone())).map_err(|_| "a copying thread is gone")?;
        }
        Ok(self.memory.shape())
    }

    fn close(&mut self, _drained: bool) {
        if let Some(helpers) = self.helpers.take() {
            drop(helpers.orders);
            for thread in helpers.threads {
                let _ = thread.join();
            }
        }
    }
}

impl<M> Drop for HostBackend<M> {
    fn drop(&mut self) {
        // Threads that copy do not outlive whoever waits for them.
        if let Some(helpers) = self.helpers.take() {
            drop(helpers.orders);
            helpers.threads.into_iter().for_each(|thread| drop(thread.join()));
        }
    }
}

/// KV memory of our own, for replays and tests.
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

impl BlockMemory for HostMemory {
    fn shape(&self) -> Shape {
        Shape { pages_counts: vec![self.blocks_count() as u32], tensors_count: 1, in_slot: (0, self.block_bytes) }
    }

    fn load(&mut self, pool: &Pool, slot: u32, pages: &[u32], _tensors: Range<u32>) {
        pool.copy_out(slot, 0, self.block_mut(pages[0] as usize));
    }

    fn store(&mut self, pool: &Pool, slot: u32, pages: &[u32], _tensors: Range<u32>) {
        pool.copy_in(slot, 0, self.block(pages[0] as usize));
    }
}
