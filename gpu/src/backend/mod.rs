//! Who moves bytes between slots of the pool and the instance's memory.
//!
//! A [`CopyBackend`] is handed batches and told to look after them: it never waits. What it has begun is
//! in flight until it says how that has ended; until then the slots and the pages are its own, whatever
//! became of the session or of the ticket. [`host`] copies with the processor, [`cuda`] with the device's
//! copy engines on streams of its own.

#[expect(unsafe_code, reason = "calls of the CUDA driver on memory that the inference engine owns")]
pub mod cuda;
pub mod host;
#[expect(unsafe_code, reason = "it copies to and from memory that the inference engine owns")]
pub mod tensors;

use std::ops::Range;
use std::time::Duration;

use kvring_ipc::client::Pool;

use crate::layout::NO_PAGE;
use tensors::Tensors;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Slot → pages.
    Load = 0,
    /// Pages → slot.
    Store = 1,
}

/// One block of a batch.
#[derive(Debug, Clone, Copy)]
pub struct BlockCopy<'a> {
    /// Where it lies in the pool.
    pub slot: u32,
    /// Where it lies in the instance's memory; a page that is [`NO_PAGE`] is left alone.
    pub pages: &'a [u32],
}

/// Blocks to copy.
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    /// Which way.
    pub direction: Direction,
    /// Where the slots are.
    pub pool: &'a Pool,
    /// Blocks; no two share a slot or a page.
    pub blocks: &'a [BlockCopy<'a>],
    /// Of which tensors ([`crate::layout::Placement::tensors_count`]).
    pub tensors: Range<u32>,
    /// Not before this moment of the engine's own work on the device.
    pub after: Option<&'a Moment>,
}

/// Names what is in flight; the submitter's choice.
pub type BatchId = u64;

/// How a batch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every byte is where it was to go.
    Copied,
    /// Not every byte, and nothing of it is under way any more.
    Failed,
    /// Nobody can tell, nor whether bytes still move: the slots may never be used again while this process
    /// lives.
    Unknown,
}

/// Why nothing was taken, now or ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Later: room comes when what is in flight ends.
    Full,
    /// Never: this ticket, or this device, cannot be served.
    Broken(String),
}

/// A moment in the work of one of the engine's streams, which a copy can wait for.
pub struct Moment {
    /// The event, as the back end knows it.
    pub(crate) event: usize,
    pub(crate) home: std::sync::Arc<dyn Marks>,
}

impl std::fmt::Debug for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Moment({:#x})", self.event)
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        self.home.give_back(self.event);
    }
}

/// Marks moments, in the thread of the engine that submits the work.
pub trait Marks: Send + Sync {
    /// This moment of a stream: all that was submitted to it so far.
    ///
    /// # Errors
    /// In words: a stream that is being captured, a context that is lost, a fork.
    fn mark(self: std::sync::Arc<Self>, stream: u64) -> Result<Moment, String>;
    /// Nobody will wait for this event any more.
    fn give_back(&self, event: usize);
}

/// What pages a block may lie in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// For each page of a block: how many there are to choose from.
    pub pages_counts: Vec<u32>,
    /// Tensors over which a block is spread.
    pub tensors_count: u32,
    /// Where a block lies in its slot: bytes (from, to).
    pub in_slot: (usize, usize),
}

impl Shape {
    /// Pages that make one block.
    pub fn pages_per_block(&self) -> usize {
        self.pages_counts.len()
    }

    /// The first page of whole blocks that is not there.
    pub fn first_wrong(&self, pages: &[u32]) -> Option<u32> {
        let wrong = |(page, count): &(&u32, &u32)| **page != NO_PAGE && page >= count;
        pages.iter().zip(self.pages_counts.iter().cycle()).find(wrong).map(|(page, _)| *page)
    }
}

/// A copy back end.
pub trait CopyBackend {
    /// What it copies to and from.
    fn shape(&self) -> Shape;
    /// Marks moments of the engine's streams, where there are streams.
    fn marks(&self) -> Option<std::sync::Arc<dyn Marks>> {
        None
    }
    /// How many blocks of these tensors are worth offering now: no more would be taken. 0: none would.
    fn room(&self, direction: Direction, tensors: &Range<u32>) -> usize;
    /// Whether a block in this slot can be taken as far as the slot goes. If not, it is being made so, and blocks behind
    /// it need not wait for that.
    fn is_ready(&mut self, _direction: Direction, _pool: &Pool, _slot: u32) -> bool {
        true
    }
    /// Begins to copy the first blocks of a batch: says how many, at least one.
    ///
    /// # Errors
    /// None was taken.
    fn submit(&mut self, id: BatchId, batch: &Batch<'_>) -> Result<usize, Refusal>;
    /// What has ended since the last call.
    fn poll(&mut self, ended: &mut Vec<(BatchId, Outcome)>);
    /// How long whoever waits may sleep between two polls while something is in flight; zero: polling is
    /// the work.
    fn nap(&self) -> Duration;
    /// Whether what is in flight moves on though nobody polls.
    fn moves_by_itself(&self) -> bool {
        true
    }
    /// What an operator should know.
    fn trouble(&self) -> Vec<String> {
        Vec::new()
    }
    /// Nothing is in flight, and the memory is about to go: it is not touched until [`CopyBackend::resume`].
    fn suspend(&mut self) {}
    /// The memory is back, perhaps elsewhere.
    ///
    /// # Errors
    /// In words; then nothing is copied, as before.
    fn resume(&mut self, _tensors: Tensors) -> Result<Shape, String> {
        Err("this memory does not come and go".into())
    }
    /// The end. Nothing is in flight, or `drained` is false and what is must be left alone.
    fn close(&mut self, _drained: bool) {}
}

/// Memory that the processor copies to and from.
pub trait BlockMemory {
    /// What it is made of.
    fn shape(&self) -> Shape;
    /// Slot → pages; [`NO_PAGE`] is skipped. When it returns, the slot may be reused.
    fn load(&mut self, pool: &Pool, slot: u32, pages: &[u32], tensors: Range<u32>);
    /// Pages → slot. When it returns, the slot may be committed.
    fn store(&mut self, pool: &Pool, slot: u32, pages: &[u32], tensors: Range<u32>);
    /// Other memory in its place.
    ///
    /// # Errors
    /// It does not come and go.
    fn replace(&mut self, _tensors: Tensors) -> Result<(), String> {
        Err("this memory does not come and go".into())
    }
}
