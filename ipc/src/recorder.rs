//! The flight recorder: the last operations of a shard, in its stats segment (WIRE.md §10).
//!
//! A ring of entries of one cache line. The shard writes and waits for nobody; a reader takes what is there and throws away
//! what was overwritten while it read. What a reader gets is what was written, or less.
//!
//! Blocks are stored and evicted in rows: two of them in succession, of one request and one round, share an entry. A cache
//! line is what an entry costs.

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

impl What {
    /// Whether two of it may share an entry.
    const fn is_shared(self) -> bool {
        matches!(self, Self::Stored | Self::Evicted)
    }
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

    fn head(&self) -> u64 {
        let bytes = [self.what as u8, self.op, self.status, self.detail];
        u64::from(u32::from_le_bytes(bytes)) | u64::from(self.session) << 32
    }

    fn to_words(self) -> [u64; ENTRY_WORDS] {
        let [low, high] = self.key.to_words();
        let counts = u64::from(self.count) | u64::from(self.part) << 32;
        [self.at_ns, self.head(), self.tag, low, high, counts, self.took_ns, 0]
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

    /// What an entry's words say: one entry, or two where it has a second key.
    fn read(words: [u64; ENTRY_WORDS]) -> impl Iterator<Item = Self> {
        let entry = Self::from_words(words);
        let (first, second) = match entry {
            Some(shared) if shared.what.is_shared() => {
                let first = Self { count: 0, took_ns: 0, ..shared };
                let second = Self { key: BlockKey::from_words([words[SECOND_KEY], words[SECOND_KEY + 1]]), ..first };
                (Some(first), (shared.count == 2).then_some(second))
            }
            _ => (entry, None),
        };
        first.into_iter().chain(second)
    }
}

/// Where the key of an entry's second block stands: what stores and evicts has no duration. The low half of the word of
/// counts is then 2.
const SECOND_KEY: usize = 6;
const COUNTS: usize = 5;

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
    /// What the last entry says beside its key, where a second block has room in it.
    open: Option<Shared>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shared {
    at_ns: u64,
    head: u64,
    tag: u64,
    part: u32,
}

#[derive(Debug)]
struct Ring {
    mapping: Arc<Mapping>,
    offset: usize,
    mask: u64,
}

impl Ring {
    fn entry(&self, number: u64) -> &[AtomicU64] {
        self.mapping.words64(self.offset + (number & self.mask) as usize * ENTRY_BYTES, ENTRY_WORDS)
    }
}

/// The count of entries ever written stands in the segment's first page, on a cache line of its own.
const WRITTEN: usize = 512;

impl Recorder {
    pub(crate) fn new(mapping: Arc<Mapping>, offset: usize, entries: u64) -> Self {
        // It goes on where another left off: a reader knows entries by their number.
        let written = mapping.words64(WRITTEN, 1)[0].load(Ordering::Relaxed);
        let ring = (entries > 0).then(|| Ring { mapping, offset, mask: entries - 1 });
        Self { ring, written, ..Self::default() }
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
        self.open = None;
        // Release: pairs with the Acquire fence in `read`: who sees a new word sees the count before it.
        fence(Ordering::Release);
        let words = ring.entry(self.written);
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
        let Some(ring) = &self.ring else { return };
        let (session, tag) = self.serves;
        let count = u32::from(what.is_shared());
        let entry = Entry { session, tag, key, detail, count, part, ..Entry::plain(what, self.now_ns) };
        if count == 0 {
            return self.record(entry);
        }
        let said = Shared { at_ns: entry.at_ns, head: entry.head(), tag, part };
        if self.open == Some(said) {
            self.open = None;
            let words = ring.entry(self.written - 1);
            for (word, value) in words[SECOND_KEY..].iter().zip(key.to_words()) {
                word.store(value, Ordering::Relaxed);
            }
            // Release: pairs with the Acquire in `read`: who sees that there is a second key sees it.
            words[COUNTS].store(2 | u64::from(part) << 32, Ordering::Release);
        } else {
            self.record(entry);
            self.open = Some(said);
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

    /// What happened as far as it reaches back, oldest first: two events where two blocks share an entry. And how many
    /// entries were written before those.
    pub fn read(&self) -> (Vec<Entry>, u64) {
        let written = self.written();
        let first = written.saturating_sub(self.entries);
        let mut read = Vec::with_capacity((written - first) as usize);
        for number in first..written {
            let words = self.ring.entry(number);
            // Acquire: the second key is read after what says that there is one.
            let counts = words[COUNTS].load(Ordering::Acquire);
            let word = |i: usize| if i == COUNTS { counts } else { words[i].load(Ordering::Relaxed) };
            read.push(std::array::from_fn(word));
        }
        // Acquire: the words were read before the count is read again.
        fence(Ordering::Acquire);
        // The one after the last counted is being written, perhaps.
        let now = self.ring.mapping.words64(WRITTEN, 1)[0].load(Ordering::Relaxed);
        let sound = now.saturating_add(1).saturating_sub(self.entries);
        let lost = sound.saturating_sub(first).min(read.len() as u64);
        let entries = read.into_iter().skip(lost as usize).flat_map(Entry::read).collect();
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
    fn two_of_a_row_share_an_entry_and_are_read_as_two() {
        let stats = Stats::private(64).unwrap();
        let (mut recorder, recording) = (stats.recorder(), stats.recording());
        let key = |n| BlockKey::from_words([n, !n]);
        let stored = |n, at_ns| Entry { session: 7, tag: 8, key: key(n), ..Entry::plain(What::Stored, at_ns) };
        recorder.serves = (7, 8);
        let mut all: Vec<Entry> = (0..5).map(|n| stored(n, 0)).collect();
        (0..5).for_each(|n| recorder.block(What::Stored, key(n), 0, 0));
        // Another round, another request, another tier, another end: each begins an entry.
        recorder.now_ns = 1;
        recorder.block(What::Stored, key(5), 0, 0);
        recorder.serves = (7, 9);
        recorder.block(What::Stored, key(6), 0, 0);
        all.extend([stored(5, 1), Entry { tag: 9, ..stored(6, 1) }]);
        let evicted = |n, detail, part| Entry { tag: 9, detail, part, what: What::Evicted, ..stored(n, 1) };
        for (n, detail, part) in [(7, 0, 1), (8, 0, 1), (9, 0, 0), (10, 1, 0)] {
            recorder.block(What::Evicted, key(n), detail, part);
            all.push(evicted(n, detail, part));
        }
        // What comes between parts them; and of this kind each has an entry.
        for n in [11, 12] {
            recorder.block(What::Dropped, key(n), 2, 0);
            all.push(Entry { what: What::Dropped, ..evicted(n, 2, 0) });
        }
        recorder.block(What::Evicted, key(13), 1, 0);
        all.push(evicted(13, 1, 0));
        assert_eq!(recording.read(), (all.clone(), 0));
        assert_eq!(recording.written(), 3 + 2 + 3 + 2 + 1);
        // Another writer goes on, with an entry of its own.
        let mut next = stats.recorder();
        (next.now_ns, next.serves) = (1, (7, 9));
        next.block(What::Evicted, key(14), 1, 0);
        all.push(evicted(14, 1, 0));
        assert_eq!(recording.read(), (all, 0));
    }

    #[test]
    fn without_entries_nothing_is_recorded() {
        let stats = Stats::private(0).unwrap();
        let mut recorder = stats.recorder();
        recorder.record(entry(1));
        assert!(!recorder.is_on() && stats.recording().read().0.is_empty());
    }

    #[test]
    fn beside_a_writer_no_second_key_is_read_before_it_is_there() {
        let (stats, fd) = Stats::create("test-recorder", 256).unwrap();
        stats.begin(&crate::stats::Text::default(), 1, 1, 1).unwrap();
        let recording = Stats::open(&fd).unwrap().recording();
        let mut recorder = stats.recorder();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for n in 0..300_000 {
                    recorder.now_ns = n / 16;
                    recorder.block(What::Stored, BlockKey::from_words([n, !n]), 0, 0);
                    if n % 1024 == 0 {
                        std::thread::sleep(std::time::Duration::from_micros(100));
                    }
                }
            });
            let mut seen = 0;
            while seen < 299_999 {
                let (entries, lost) = recording.read();
                for (found, n) in entries.iter().zip(lost * 2..) {
                    let key = BlockKey::from_words([n, !n]);
                    assert_eq!(*found, Entry { session: 0, key, ..Entry::plain(What::Stored, n / 16) });
                    seen = n;
                }
            }
        });
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
