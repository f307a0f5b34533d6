//! The flight recorder: the last operations of a shard, in its stats segment (WIRE.md §10).
//!
//! A ring of entries of one cache line. The shard writes and waits for nobody; a reader takes what is there and throws away
//! what was overwritten while it read. What a reader gets is what was written, or less.

use std::sync::Arc;

use crate::key::BlockKey;
use crate::mapping::Mapping;
use crate::sync::{AtomicU64, Ordering, fence};

const ENTRY_WORDS: usize = 8;
/// Bytes of an entry.
pub const ENTRY_BYTES: usize = ENTRY_WORDS * 8;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum What {
    /// A match, load, reserve or commit was answered in full; `took_ns` since it was picked up. `count` blocks were asked for and `part` of
    /// them served (hit, loaded, granted, committed). `key`: of a match the first that was missing, if one was; else
    /// the first block's.
    Answered = 1,
    /// A block became resident: it was committed.
    Stored = 2,
    /// A block left a tier for another: `detail` says which, `part` whether another tier still has it. The session
    /// and the tag are those of the request that needed the room.
    Evicted = 3,
    /// A block was forgotten; `detail` is a [`Cause`].
    Forgotten = 4,
    /// A block of a store was not taken; `detail` is a [`Refusal`].
    Dropped = 5,
    /// A block was read from the SSD: `detail` is the device, `took_ns` since it was queued, `count` µs of that before
    /// it was given to the device, `part` 1 if every byte came and was right.
    Read = 6,
    /// A block was written to the SSD, as [`What::Read`].
    Written = 7,
    /// A block of a load was answered without its bytes; `detail` is the status.
    Missed = 8,
    /// A session began; `count` is its process.
    Attached = 9,
    /// A session ended.
    Ended = 10,
    /// `count` leases ended because nobody had released them.
    Expired = 11,
    /// Everything was forgotten: a reset.
    Reset = 12,
}

/// Why a block was forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Cause {
    /// No reason is known.
    #[default]
    Unknown = 0,
    /// Somebody has asked for a reset.
    Reset = 1,
    /// Its bytes in the pool, or those of a block that it continues, were not what was stored.
    DramChecksum = 2,
    /// Its bytes on the SSD, or those of a block that it continues, were not what was written.
    SsdChecksum = 3,
    /// It, or a block that it continues, could not be read from the SSD.
    SsdRead = 4,
    /// Its writer gave it up.
    Aborted = 5,
    /// Its writer died or was cut off.
    WriterGone = 6,
    /// Some ranks committed it and the others never did.
    Stalled = 7,
    /// An operator has evicted it.
    Asked = 8,
    /// The device that it, or a block that it continues, lay on is lost.
    DeviceLost = 9,
}

/// Why a block of a store was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// The block before it is not resident.
    NoParent = 1,
    /// No slot was free and nothing could be evicted, or the instance's share of the pool is in use.
    NoRoom = 2,
    /// The server is being drained: it takes no stores.
    Draining = 3,
}

macro_rules! from_byte {
    ($name:ident: $($value:ident),*) => {
        impl $name {
            /// From its number.
            pub fn from_byte(byte: u8) -> Option<Self> {
                [$(Self::$value),*].into_iter().find(|value| *value as u8 == byte)
            }
        }
    };
}
from_byte!(What: Answered, Stored, Evicted, Forgotten, Dropped, Read, Written, Missed, Attached, Ended, Expired, Reset);
from_byte!(Cause: Unknown, Reset, DramChecksum, SsdChecksum, SsdRead, Aborted, WriterGone, Stalled, Asked, DeviceLost);
from_byte!(Refusal: NoParent, NoRoom, Draining);

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// When, in monotonic nanoseconds of the shard: of its round, or of the moment where that was looked at.
    pub at_ns: u64,
    /// What.
    pub what: What,
    /// Of a request: its operation, as on the wire.
    pub op: u8,
    /// Of a request: how it ended, as on the wire.
    pub status: u8,
    /// See [`What`].
    pub detail: u8,
    /// Whose it was; `u32::MAX` if nobody's, one less if an operator has asked for it.
    pub session: u32,
    /// The request's tag.
    pub tag: u64,
    /// The block.
    pub key: BlockKey,
    /// See [`What`].
    pub count: u32,
    /// See [`What`].
    pub part: u32,
    /// See [`What`].
    pub took_ns: u64,
}

impl Entry {
    /// Nothing but what and when.
    pub fn plain(what: What, at_ns: u64) -> Self {
        Self {
            at_ns,
            what,
            op: 0,
            status: 0,
            detail: 0,
            session: u32::MAX,
            tag: 0,
            key: BlockKey::default(),
            count: 0,
            part: 0,
            took_ns: 0,
        }
    }

    fn to_words(self) -> [u64; ENTRY_WORDS] {
        let [low, high] = self.key.to_words();
        let bytes = [self.what as u8, self.op, self.status, self.detail];
        let head = u64::from(u32::from_le_bytes(bytes)) | u64::from(self.session) << 32;
        let counts = u64::from(self.count) | u64::from(self.part) << 32;
        [self.at_ns, head, self.tag, low, high, counts, self.took_ns, 0]
    }

    fn from_words([at_ns, head, tag, low, high, counts, took_ns, _]: [u64; ENTRY_WORDS]) -> Option<Self> {
        let [what, op, status, detail] = (head as u32).to_le_bytes();
        Some(Self {
            at_ns,
            what: What::from_byte(what)?,
            op,
            status,
            detail,
            session: (head >> 32) as u32,
            tag,
            key: BlockKey::from_words([low, high]),
            count: counts as u32,
            part: (counts >> 32) as u32,
            took_ns,
        })
    }
}

/// The writer's side. With no entries, or without a segment, it records nothing.
#[derive(Debug, Default)]
pub struct Recorder {
    ring: Option<Ring>,
    written: u64,
    /// The moment that entries get which say none.
    pub now_ns: u64,
    /// Whose request is being served: its session and its tag.
    pub serves: (u32, u64),
    /// Why blocks are being forgotten.
    pub cause: Cause,
}

#[derive(Debug)]
struct Ring {
    mapping: Arc<Mapping>,
    offset: usize,
    mask: u64,
}

/// The count of entries ever written stands in the segment's first page, on a cache line of its own.
const WRITTEN: usize = 512;

impl Recorder {
    pub(crate) fn new(mapping: Arc<Mapping>, offset: usize, entries: u64) -> Self {
        let ring = (entries > 0).then(|| Ring { mapping, offset, mask: entries - 1 });
        Self { ring, ..Self::default() }
    }

    /// Whether anything is recorded.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.ring.is_some()
    }

    /// Writes an entry.
    #[inline]
    pub fn record(&mut self, entry: Entry) {
        let Some(ring) = &self.ring else { return };
        // Release: pairs with the Acquire fence in `read`: who sees a new word sees the count before it.
        fence(Ordering::Release);
        let words = ring.mapping.words64(ring.offset + (self.written & ring.mask) as usize * ENTRY_BYTES, ENTRY_WORDS);
        for (word, value) in words.iter().zip(entry.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        self.written += 1;
        // Release: pairs with the Acquire in `read`: who sees the count sees the entry.
        ring.mapping.words64(WRITTEN, 1)[0].store(self.written, Ordering::Release);
    }

    /// Writes what happened to a block, now and for the request that is being served.
    #[inline]
    pub fn block(&mut self, what: What, key: BlockKey, detail: u8, part: u32) {
        if self.is_on() {
            let (session, tag) = self.serves;
            self.record(Entry { session, tag, key, detail, part, ..Entry::plain(what, self.now_ns) });
        }
    }

    /// A block was forgotten, for the reason that was given last.
    pub fn forgotten(&mut self, key: BlockKey) {
        self.block(What::Forgotten, key, self.cause as u8, 0);
    }
}

/// The reader's side.
#[derive(Debug)]
pub struct Recording {
    ring: Ring,
    entries: u64,
}

impl Recording {
    pub(crate) fn new(mapping: Arc<Mapping>, offset: usize, entries: u64) -> Self {
        Self { ring: Ring { mapping, offset, mask: entries.wrapping_sub(1) }, entries }
    }

    /// How many entries it can hold.
    pub fn capacity(&self) -> u64 {
        self.entries
    }

    fn written(&self) -> u64 {
        self.ring.mapping.words64(WRITTEN, 1)[0].load(Ordering::Acquire)
    }

    /// What it holds, oldest first, and how many entries were written before those.
    pub fn read(&self) -> (Vec<Entry>, u64) {
        let written = self.written();
        let first = written.saturating_sub(self.entries);
        let mut read = Vec::with_capacity((written - first) as usize);
        for number in first..written {
            let at = self.ring.offset + (number & self.ring.mask) as usize * ENTRY_BYTES;
            let words: &[AtomicU64] = self.ring.mapping.words64(at, ENTRY_WORDS);
            read.push(std::array::from_fn(|i| words[i].load(Ordering::Relaxed)));
        }
        // Acquire: the words were read before the count is read again.
        fence(Ordering::Acquire);
        // The one after the last counted is being written, perhaps.
        let now = self.ring.mapping.words64(WRITTEN, 1)[0].load(Ordering::Relaxed);
        let sound = now.saturating_add(1).saturating_sub(self.entries);
        let lost = sound.saturating_sub(first).min(read.len() as u64);
        let entries = read.into_iter().skip(lost as usize).filter_map(Entry::from_words).collect();
        (entries, first + lost)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::stats::Stats;

    fn entry(n: u64) -> Entry {
        Entry {
            op: 3,
            status: 4,
            detail: 5,
            session: 6,
            tag: n,
            key: BlockKey::from_words([n, !n]),
            count: n as u32,
            part: 9,
            took_ns: n * 2,
            ..Entry::plain(What::Answered, n)
        }
    }

    #[test]
    fn a_reader_gets_the_last_entries_as_they_were_written() {
        let stats = Stats::private(64).unwrap();
        let (mut recorder, recording) = (stats.recorder(), stats.recording());
        assert_eq!(recording.read(), (vec![], 0));
        (0..3).for_each(|n| recorder.record(entry(n)));
        assert_eq!(recording.read(), ((0..3).map(entry).collect(), 0));
        (3..1000).for_each(|n| recorder.record(entry(n)));
        let (entries, lost) = recording.read();
        // One less than it holds: the oldest may be in the course of being overwritten.
        assert_eq!((entries, lost), ((937..1000).map(entry).collect(), 937));
    }

    #[test]
    fn without_entries_nothing_is_recorded() {
        let stats = Stats::private(0).unwrap();
        let mut recorder = stats.recorder();
        recorder.record(entry(1));
        assert!(!recorder.is_on() && stats.recording().read().0.is_empty());
    }

    #[test]
    fn beside_a_writer_no_entry_is_a_mixture() {
        let (stats, fd) = Stats::create("test-recorder", 256).unwrap();
        stats.begin(&crate::stats::Text::default(), 1, 1, 1).unwrap();
        let recording = Stats::open(&fd).unwrap().recording();
        let mut recorder = stats.recorder();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for n in 0..300_000 {
                    recorder.record(entry(n));
                    if n % 1024 == 0 {
                        std::thread::sleep(std::time::Duration::from_micros(100));
                    }
                }
            });
            let mut seen = 0;
            while seen < 299_999 {
                let (entries, lost) = recording.read();
                for (found, n) in entries.iter().zip(lost..) {
                    assert_eq!(*found, entry(n));
                    seen = n;
                }
            }
        });
    }
}
