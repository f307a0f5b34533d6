//! Where things lie in one session's shared memory (WIRE.md §2).
//!
//! A segment is one memfd: control words each on a cache line of its own, the submission ring, the
//! completion ring, and the arena for arguments that do not fit an entry.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::key::BlockKey;
use crate::mapping::{Mapping, Pages, sealed_memfd};
use crate::ring::{ENTRY_WORDS, RingMemory};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::wire::{BATCH_BLOCKS_MAX, Grant, Span};

/// Entries of each ring.
pub const RING_DEPTH: u32 = 1024;
/// Bytes of the arena: eight of the longest matches, or 256 full batches.
pub const ARENA_BYTES: u32 = 1 << 20;

const SQ_TAIL: usize = 0; // written by the client
const SQ_HEAD: usize = 64; // written by the server
const CQ_TAIL: usize = 128; // written by the server
const CQ_HEAD: usize = 192; // written by the client
const SERVER_SLEEPS: usize = 256; // set by the server, cleared by whoever rings
const CLIENT_SLEEPS: usize = 320; // set by the client, cleared by whoever rings
const STATE: usize = 384; // written by the server
const SQ_ENTRIES: usize = 4096;
const RING_BYTES: usize = RING_DEPTH as usize * ENTRY_WORDS * 8;
const CQ_ENTRIES: usize = SQ_ENTRIES + RING_BYTES;
const ARENA: usize = CQ_ENTRIES + RING_BYTES;
/// Bytes of a whole segment.
pub const SEGMENT_BYTES: usize = ARENA + ARENA_BYTES as usize;

const _: () = assert!(RING_BYTES == 64 << 10 && SEGMENT_BYTES.is_multiple_of(4096));
// A request's completions must fit the ring, or it could never be popped.
const _: () = assert!(BATCH_BLOCKS_MAX <= RING_DEPTH);

/// Whether the server still serves this session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum SessionState {
    /// Served.
    Open = 0,
    /// The client broke protocol; nothing more will be answered.
    Poisoned = 1,
    /// The server is going away.
    Closing = 2,
    /// Another engine process takes over: attach again, it is about to serve.
    HandedOver = 3,
}

/// Both sides' view of a segment.
#[derive(Debug, Clone)]
pub struct Segment {
    mapping: Arc<Mapping>,
}

/// A view of one ring.
#[derive(Debug, Clone)]
pub struct RingView {
    mapping: Arc<Mapping>,
    head: usize,
    tail: usize,
    entries: usize,
}

impl RingMemory for RingView {
    fn head(&self) -> &AtomicU32 {
        self.mapping.word32(self.head)
    }
    fn tail(&self) -> &AtomicU32 {
        self.mapping.word32(self.tail)
    }
    fn words(&self) -> &[AtomicU64] {
        self.mapping.words64(self.entries, RING_DEPTH as usize * ENTRY_WORDS)
    }
}

impl Segment {
    /// A new segment and the descriptor to pass to the other side.
    ///
    /// # Errors
    /// What the kernel says of memfd_create or mmap.
    pub fn create() -> rustix::io::Result<(Self, OwnedFd)> {
        let fd = sealed_memfd("kvring-session", SEGMENT_BYTES as u64, Pages::Small)?;
        let mapping = Mapping::new(&fd, SEGMENT_BYTES)?;
        Ok((Self { mapping: Arc::new(mapping) }, fd))
    }

    /// The segment behind a received descriptor.
    ///
    /// # Errors
    /// `EINVAL` if it is not a sealed memfd of the right size; else what mmap says.
    pub fn open(fd: &OwnedFd) -> rustix::io::Result<Self> {
        if !crate::mapping::is_sealed(fd, SEGMENT_BYTES as u64)? {
            return Err(rustix::io::Errno::INVAL);
        }
        Ok(Self { mapping: Arc::new(Mapping::new(fd, SEGMENT_BYTES)?) })
    }

    /// The submission ring.
    pub fn submissions(&self) -> RingView {
        RingView { mapping: self.mapping.clone(), head: SQ_HEAD, tail: SQ_TAIL, entries: SQ_ENTRIES }
    }
    /// The completion ring.
    pub fn completions(&self) -> RingView {
        RingView { mapping: self.mapping.clone(), head: CQ_HEAD, tail: CQ_TAIL, entries: CQ_ENTRIES }
    }
    /// Nonzero: the server sleeps and wants to be rung.
    pub fn server_sleeps(&self) -> &AtomicU32 {
        self.mapping.word32(SERVER_SLEEPS)
    }
    /// Nonzero: the client sleeps and wants to be rung.
    pub fn client_sleeps(&self) -> &AtomicU32 {
        self.mapping.word32(CLIENT_SLEEPS)
    }

    /// What the server says of this session.
    pub fn state(&self) -> SessionState {
        match self.mapping.word32(STATE).load(Ordering::Acquire) {
            0 => SessionState::Open,
            1 => SessionState::Poisoned,
            3 => SessionState::HandedOver,
            _ => SessionState::Closing,
        }
    }
    /// Says it, on the server's side.
    pub fn set_state(&self, state: SessionState) {
        self.mapping.word32(STATE).store(state as u32, Ordering::Release);
    }

    /// Writes a key into the arena, on the client's side.
    pub fn write_key(&self, offset_in_arena: u32, index: u32, key: BlockKey) {
        let at = ARENA + offset_in_arena as usize + index as usize * 16;
        let words = self.mapping.words64(at, 2);
        for (word, value) in words.iter().zip(key.to_words()) {
            // Relaxed: made visible by the Release that publishes the entry.
            word.store(value, Ordering::Relaxed);
        }
    }
    /// Copies one key out of a span that `parse` has bounded.
    pub fn read_key(&self, span: Span, index: u32) -> BlockKey {
        assert!(index < span.count);
        let at = ARENA + span.offset_in_arena as usize + index as usize * 16;
        let words = self.mapping.words64(at, 2);
        // Relaxed: ordered by the Acquire of the ring; a racing peer gives us another key.
        BlockKey::from_words(std::array::from_fn(|i| words[i].load(Ordering::Relaxed)))
    }
    /// Writes a grant into the arena, on the client's side.
    pub fn write_grant(&self, offset_in_arena: u32, index: u32, grant: Grant) {
        let at = ARENA + offset_in_arena as usize + index as usize * 8;
        self.mapping.words64(at, 1)[0].store(grant.to_word(), Ordering::Relaxed);
    }
    /// Copies one grant out of a span that `parse` has bounded.
    pub fn read_grant(&self, span: Span, index: u32) -> Grant {
        assert!(index < span.count);
        let at = ARENA + span.offset_in_arena as usize + index as usize * 8;
        Grant::from_word(self.mapping.words64(at, 1)[0].load(Ordering::Relaxed))
    }

    /// Every word that a client can write, for tests that write garbage there.
    #[doc(hidden)]
    pub fn all_words(&self) -> &[AtomicU64] {
        self.mapping.words64(0, SEGMENT_BYTES / 8)
    }
}
