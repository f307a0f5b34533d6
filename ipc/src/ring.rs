//! A single-producer, single-consumer ring in memory shared with an untrusted peer.
//!
//! The producer owns `tail`, the consumer owns `head`; both count entries ever passed and wrap at
//! 2^32. Whatever the peer owns is a claim: its index is bounded before use, and an entry is
//! copied out once and parsed from the copy, so a peer that rewrites it afterwards changes nothing.
//! Clause numbers refer to `docs/WIRE.md`.

use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Words of one entry: 64 bytes, one cache line (WIRE.md §3).
pub const ENTRY_WORDS: usize = 8;

/// One entry, copied out of shared memory.
pub type Entry = [u64; ENTRY_WORDS];

/// Where a ring lies. Implemented by a view of a shared mapping, and by plain memory under loom.
pub trait RingMemory {
    /// The index written by the consumer.
    fn head(&self) -> &AtomicU32;
    /// The index written by the producer.
    fn tail(&self) -> &AtomicU32;
    /// The words of all entries, `depth * ENTRY_WORDS` of them; `depth` is a power of two.
    fn words(&self) -> &[AtomicU64];
}

/// The peer moved its index where no correct peer can. The session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer claims ring index {claimed} where ours is {ours}: the ring broke protocol")]
pub struct Poisoned {
    /// What the peer's index says.
    pub claimed: u32,
    /// Our own index at that moment.
    pub ours: u32,
}

/// The reading side of a ring.
#[derive(Debug)]
pub struct Consumer<M> {
    memory: M,
    depth: u32,
    head: u32,
    /// The peer's `tail` when last read. Refreshed only when we run dry: one cache miss a batch.
    tail_seen: u32,
}

fn depth_of(memory: &impl RingMemory) -> u32 {
    let depth = memory.words().len() / ENTRY_WORDS;
    assert!(depth.is_power_of_two() && depth <= 1 << 16);
    depth as u32
}

impl<M: RingMemory> Consumer<M> {
    /// A consumer of a ring that nothing has passed yet.
    ///
    /// # Panics
    /// If the depth is no power of two up to 65,536.
    pub fn new(memory: M) -> Self {
        Self { depth: depth_of(&memory), memory, head: 0, tail_seen: 0 }
    }

    /// Copies out the oldest entry without taking it; `None` when the ring is empty.
    ///
    /// The copy is the entry: a later `peek` of the same place may differ if the peer is hostile,
    /// so whoever acts must act on the copy it then `take`s.
    ///
    /// # Errors
    /// [`Poisoned`] if the peer's tail claims more entries than the ring holds.
    pub fn peek(&mut self) -> Result<Option<Entry>, Poisoned> {
        if self.head == self.tail_seen {
            // Acquire: pairs with the Release in `Producer::publish`; the entries are visible.
            let tail = self.memory.tail().load(Ordering::Acquire);
            if tail.wrapping_sub(self.head) > self.depth {
                return Err(Poisoned { claimed: tail, ours: self.head });
            }
            self.tail_seen = tail;
            if self.head == tail {
                return Ok(None);
            }
        }
        let first = (self.head & (self.depth - 1)) as usize * ENTRY_WORDS;
        let words = &self.memory.words()[first..first + ENTRY_WORDS];
        // Relaxed: ordered by the Acquire above. A racing peer can only give us other words.
        Ok(Some(std::array::from_fn(|i| words[i].load(Ordering::Relaxed))))
    }

    /// Moves past the entry last peeked.
    ///
    /// # Panics
    /// If there is none: our own bug.
    pub fn take(&mut self) {
        assert!(self.head != self.tail_seen);
        self.head = self.head.wrapping_add(1);
    }

    /// `peek` and `take` in one.
    ///
    /// # Errors
    /// As [`Consumer::peek`].
    pub fn pop(&mut self) -> Result<Option<Entry>, Poisoned> {
        let entry = self.peek()?;
        if entry.is_some() {
            self.take();
        }
        Ok(entry)
    }

    /// Hands the popped places back to the producer. Once a batch, not once an entry.
    pub fn release(&mut self) {
        // Release: our reads of the entries happen before the producer may overwrite them.
        self.memory.head().store(self.head, Ordering::Release);
    }
}

/// The writing side of a ring.
#[derive(Debug)]
pub struct Producer<M> {
    memory: M,
    depth: u32,
    tail: u32,
    published: u32,
    head_seen: u32,
}

impl<M: RingMemory> Producer<M> {
    /// A producer of a ring that nothing has passed yet.
    ///
    /// # Panics
    /// If the depth is no power of two up to 65,536.
    pub fn new(memory: M) -> Self {
        Self { depth: depth_of(&memory), memory, tail: 0, published: 0, head_seen: 0 }
    }

    /// How many entries the ring holds.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// How many entries fit now, refreshed from the peer when fewer than `wanted` are known to.
    ///
    /// # Errors
    /// [`Poisoned`] if the peer's head claims entries that were never published.
    pub fn room(&mut self, wanted: u32) -> Result<u32, Poisoned> {
        if self.depth - self.tail.wrapping_sub(self.head_seen) < wanted {
            // Acquire: pairs with the Release in `Consumer::release`.
            let head = self.memory.head().load(Ordering::Acquire);
            // Bounded from both sides: never behind what was seen, never beyond what was published.
            if self.published.wrapping_sub(head) > self.published.wrapping_sub(self.head_seen) {
                return Err(Poisoned { claimed: head, ours: self.published });
            }
            self.head_seen = head;
        }
        Ok(self.depth - self.tail.wrapping_sub(self.head_seen))
    }

    /// Writes one entry. Not visible until `publish`.
    ///
    /// # Panics
    /// If the ring is full: the caller has seen `room() > 0`.
    pub fn push(&mut self, entry: Entry) {
        assert!(self.tail.wrapping_sub(self.head_seen) < self.depth);
        let first = (self.tail & (self.depth - 1)) as usize * ENTRY_WORDS;
        for (word, value) in self.memory.words()[first..first + ENTRY_WORDS].iter().zip(entry) {
            word.store(value, Ordering::Relaxed);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    /// Makes the pushed entries visible. Once a batch. Says whether there were any.
    pub fn publish(&mut self) -> bool {
        if self.tail == self.published {
            return false;
        }
        self.published = self.tail;
        // Release: pairs with the Acquire in `Consumer::peek`.
        self.memory.tail().store(self.tail, Ordering::Release);
        true
    }
}

#[cfg(all(test, not(loom)))]
#[path = "ring_test.rs"]
mod test;
