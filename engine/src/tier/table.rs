//! The slot table: what each slot of the pool holds and who may be writing into it, in shared memory
//! that outlives the process that wrote it. From it the next engine process rebuilds the DRAM tier.
//!
//! Written by the engine process alone, each step in an order that leaves the truth behind wherever the
//! process dies: a slot's header goes before anything may write into the slot and comes after the last
//! byte is there; a writer's name is there before it is told of the slot and goes when it is done.

use std::sync::Arc;

use kvring_ipc::mapping::Mapping;
use kvring_ipc::sync::{AtomicU32, AtomicU64, Ordering, fence};

use super::header::Header;
use super::host::SessionId;
use crate::checksum;
use crate::limits::SESSIONS_MAX;
use crate::planted::{self, Bug};

/// "KVSLOTS" and the table's version: another version's table is never reinterpreted.
const MAGIC: u64 = u64::from_le_bytes(*b"KVSLOTS\x01");

const HEAD_WORDS: usize = 8;
const NEXT_SESSION: usize = 64;
const BORN: usize = 72;
/// Slots that the pool has now; 0 for as many as there is room for.
const SLOTS: usize = 80;
/// How often that has changed.
const RESIZES: usize = 88;
const TEXT: usize = 4096;
const TEXT_BYTES: usize = 64 << 10;
/// Longest text that a table takes.
pub const TEXT_BYTES_MAX: usize = TEXT_BYTES - 8;
const SESSIONS: usize = TEXT + TEXT_BYTES;
const SESSION_WORDS: usize = 4;
const WRITERS: usize = (SESSIONS + SESSIONS_MAX * SESSION_WORDS * 8).next_multiple_of(4096);
/// The journal behind the headers: the epoch of the process that keeps it, how many changes it has noted ever, and the slot
/// of each of the last ones.
const JOURNAL_COUNT: usize = 8;
const JOURNAL_SLOTS: usize = 64;
/// 1 MiB: at 200,000 blocks stored a second, what half a second changes.
const JOURNAL_SLOTS_MAX: usize = 1 << 18;

/// What a table is for: another shape's table is not taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableShape {
    /// Names the pool that the table describes.
    pub pool_id: u64,
    /// The layout's fingerprint.
    pub layout: u64,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Slots that there is room for: the pool may have fewer now ([`SlotTable::slots_count`]).
    pub slots_max: u32,
    /// Ranks that share a slot.
    pub tp_size: u32,
}

impl TableShape {
    fn writers_bytes(&self) -> usize {
        (self.slots_max as usize * self.tp_size as usize * 4).next_multiple_of(4096)
    }

    /// Bytes of a table without a journal: one of an earlier version.
    pub fn bytes_without_journal(&self) -> usize {
        WRITERS + self.writers_bytes() + self.slots_max as usize * 64
    }

    /// Changes that the journal has room for.
    fn journal_slots(&self) -> usize {
        (self.slots_max as usize / 2).next_power_of_two().clamp(64, JOURNAL_SLOTS_MAX)
    }

    /// Bytes of the whole table.
    pub fn bytes(&self) -> usize {
        self.bytes_without_journal() + JOURNAL_SLOTS + self.journal_slots() * 4
    }

    fn words(&self) -> [u64; HEAD_WORDS - 1] {
        let counts = u64::from(self.slots_max) << 32 | u64::from(self.tp_size);
        [MAGIC, self.pool_id, self.layout, self.slot_bytes, counts, SESSIONS_MAX as u64, 0]
    }
}

/// A session that the table names: a process that may be writing into slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FormerSession {
    /// Its id.
    pub session: SessionId,
    /// Its process.
    pub pid: i32,
    /// When that was started: a process id is given again, a start is not (proc(5), stat field 22).
    pub started_ticks: u64,
}

/// How far somebody had read the journal before he looked at the slots, and whose it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    epoch: u64,
    count: u64,
}

/// The table.
#[derive(Debug, Clone)]
pub struct SlotTable {
    memory: Arc<Mapping>,
    shape: TableShape,
    writers: usize,
    headers: usize,
    /// Where the journal lies, if there is one.
    journal: Option<usize>,
}

impl SlotTable {
    fn over(memory: Arc<Mapping>, shape: TableShape) -> Self {
        let before_journal = shape.bytes_without_journal();
        assert!(memory.bytes() >= before_journal);
        let journal = (memory.bytes() >= shape.bytes()).then_some(before_journal);
        Self { memory, shape, writers: WRITERS, headers: WRITERS + shape.writers_bytes(), journal }
    }

    /// A new table over zeroed memory, of a pool that has so many slots. `text` says the layout in words, for whoever has to read it again.
    ///
    /// # Panics
    /// If the memory is too small, or the text longer than 64 KiB.
    pub fn create(memory: Arc<Mapping>, shape: TableShape, slots: u32, text: &str) -> Self {
        let table = Self::over(memory, shape);
        table.memory.words64(SLOTS, 1)[0].store(u64::from(slots.min(shape.slots_max)), Ordering::Relaxed);
        assert!(text.len() <= TEXT_BYTES_MAX);
        table.memory.copy_in(TEXT, &(text.len() as u64).to_le_bytes());
        table.memory.copy_in(TEXT + 8, text.as_bytes());
        let head = table.memory.words64(0, HEAD_WORDS);
        for (word, value) in head.iter().zip(shape.words()) {
            word.store(value, Ordering::Relaxed);
        }
        // Release: last, so that a head is whole or none.
        head[HEAD_WORDS - 1].store(checksum::of_bytes(bytemuck::cast_slice(&shape.words())), Ordering::Release);
        table
    }

    /// The table of an engine process that is gone.
    ///
    /// # Errors
    /// Why it is not taken over, in words.
    pub fn open(memory: Arc<Mapping>) -> Result<(Self, String), String> {
        if memory.bytes() < WRITERS {
            return Err(format!("{} bytes are too few", memory.bytes()));
        }
        let head = memory.words64(0, HEAD_WORDS);
        let words: [u64; HEAD_WORDS] = std::array::from_fn(|i| head[i].load(Ordering::Acquire));
        let [magic, pool_id, layout, slot_bytes, counts, ..] = words;
        if magic != MAGIC {
            return Err("it is another version's".into());
        }
        let shape =
            TableShape { pool_id, layout, slot_bytes, slots_max: (counts >> 32) as u32, tp_size: counts as u32 };
        let sound = words[..HEAD_WORDS - 1] == shape.words()
            && words[HEAD_WORDS - 1] == checksum::of_bytes(bytemuck::cast_slice(&shape.words()));
        if !sound || shape.bytes_without_journal() > memory.bytes() {
            return Err("its head is damaged".into());
        }
        let mut length = [0; 8];
        memory.copy_out(TEXT, &mut length);
        let length = u64::from_le_bytes(length).min(TEXT_BYTES as u64 - 8) as usize;
        let mut text = vec![0; length];
        memory.copy_out(TEXT + 8, &mut text);
        let text = String::from_utf8(text).map_err(|error| error.to_string())?;
        Ok((Self::over(memory, shape), text))
    }

    /// What it is for.
    pub fn shape(&self) -> &TableShape {
        &self.shape
    }

    fn header_words(&self, slot: u32) -> &[AtomicU64] {
        self.memory.words64(self.headers + slot as usize * 64, 8)
    }

    fn journal_slot(&self, journal: usize, nth: u64) -> &AtomicU32 {
        let place = nth as usize % self.shape.journal_slots();
        self.memory.word32(journal + JOURNAL_SLOTS + place * 4)
    }

    /// The slot changes: noted first. Whoever has seen less of the journal than this looks at the slot again.
    fn note(&self, slot: u32) {
        let Some(journal) = self.journal.filter(|_| !planted::has(Bug::ChangeNotNoted)) else { return };
        let count = &self.memory.words64(journal + JOURNAL_COUNT, 1)[0];
        let noted = count.load(Ordering::Relaxed);
        // Several changes of a slot come one after another.
        if noted > 0 && self.journal_slot(journal, noted - 1).load(Ordering::Relaxed) == slot {
            return;
        }
        planted::step();
        self.journal_slot(journal, noted).store(slot, Ordering::Relaxed);
        planted::step();
        // Release: whoever sees this one sees all that changed before it. The change that it announces may come later.
        // Wraps only where the count is damaged: then it is less than anybody has seen.
        count.store(noted.wrapping_add(1), Ordering::Release);
    }

    /// The engine process of this epoch notes all changes from now on, before any of them.
    pub fn begin_journal(&self, epoch: u64) {
        if let Some(journal) = self.journal {
            self.memory.words64(journal, 1)[0].store(epoch, Ordering::Release);
        }
    }

    /// How far the journal is. To be asked before slots are looked at.
    pub fn seen(&self) -> Option<Seen> {
        let words = self.memory.words64(self.journal?, 2);
        Some(Seen { epoch: words[0].load(Ordering::Acquire), count: words[1].load(Ordering::Acquire) })
    }

    /// The slots that may have changed since, each once, now that the engine process of this epoch, the last that wrote, does
    /// not any more. `None` if that is not known: it kept no journal, as an earlier version, or there were too many.
    pub fn changed_since(&self, seen: Seen, last_epoch: u64) -> Option<Vec<u32>> {
        let now = self.seen()?;
        if seen.epoch != last_epoch || now.epoch != last_epoch || last_epoch == 0 {
            return None;
        }
        // The last change that was noted may have been under way.
        let from = seen.count.saturating_sub(1);
        // Not all of the ring: whoever died while he noted one more may have written over the first.
        if now.count.checked_sub(from)? >= self.shape.journal_slots() as u64 {
            return None;
        }
        let journal = self.journal?;
        let slots = (from..now.count).map(|nth| self.journal_slot(journal, nth).load(Ordering::Relaxed));
        let mut slots: Vec<u32> = slots.collect();
        slots.sort_unstable();
        slots.dedup();
        Some(slots)
    }

    /// Brings a slot's header closer.
    pub fn prefetch(&self, slot: u32) {
        crate::dma::prefetch(&self.header_words(slot)[0]);
    }

    /// The slot holds nothing that may be believed: before anything writes into it.
    pub fn clear(&self, slot: u32) {
        let words = self.header_words(slot);
        self.note(slot);
        planted::step();
        // The checksum first: whoever has taken the block sees by it that the header is another.
        words[7].store(0, Ordering::Relaxed);
        planted::step();
        // The generation too: no checksum makes a header of generation 0 sound.
        words[5].store(0, Ordering::Relaxed);
        // Release: what is stored after this, a grant above all, is not seen before it.
        fence(Ordering::Release);
    }

    /// The slot holds this block, all of it.
    pub fn describe(&self, slot: u32, header: Header) {
        self.clear(slot);
        let header: [u64; 8] = bytemuck::cast(Header { slot, ..header }.sealed(self.shape.layout));
        let words = self.header_words(slot);
        for (word, value) in words[..7].iter().zip(header) {
            planted::step();
            word.store(value, Ordering::Relaxed);
        }
        planted::step();
        // Release: the checksum last.
        words[7].store(header[7], Ordering::Release);
    }

    /// The header of a slot, if there is a sound one.
    pub fn header(&self, slot: u32) -> Option<Header> {
        let words = self.header_words(slot);
        let words: [u64; 8] = std::array::from_fn(|i| words[i].load(Ordering::Acquire));
        let header: Header = bytemuck::cast(words);
        header.is_sound(slot, self.shape.layout).then_some(header)
    }

    /// The checksum that a slot's header has, sound or not; 0 where there is none. Another header has another one.
    pub fn seal(&self, slot: u32) -> u64 {
        self.header_words(slot)[7].load(Ordering::Acquire)
    }

    /// No slot holds anything that may be believed.
    pub fn clear_all(&self) {
        (0..self.slots_count()).for_each(|slot| self.clear(slot));
    }

    /// Slots that the pool has.
    pub fn slots_count(&self) -> u32 {
        match self.memory.words64(SLOTS, 1)[0].load(Ordering::Acquire) {
            0 => self.shape.slots_max,
            count => count.min(u64::from(self.shape.slots_max)) as u32,
        }
    }

    /// The pool has so many slots from now on. What those that come to it held before is forgotten; who may be writing there
    /// is not: they wait for it. A process that dies in between leaves the old number or the new one.
    pub fn resize(&self, slots: u32) {
        let (slots, before) = (slots.min(self.shape.slots_max), self.slots_count());
        if slots == before {
            return;
        }
        if !planted::has(Bug::GrowthKeepsHeaders) {
            // Most of them say nothing: that is left as it is.
            let says_something =
                |slot: &u32| [5, 7].iter().any(|at| self.header_words(*slot)[*at].load(Ordering::Relaxed) != 0);
            (before..slots).filter(says_something).for_each(|slot| self.clear(slot));
        }
        if planted::has(Bug::ShrinkForgetsWriters) {
            let ranks = 0..self.shape.tp_size;
            (slots..before).for_each(|slot| ranks.clone().for_each(|rank| self.set_writer(slot, rank, None)));
        }
        self.set_born(self.born_count().min(slots));
        let resizes = &self.memory.words64(RESIZES, 1)[0];
        // Before the number: whoever maps the pool anew for nothing loses nothing.
        resizes.store(resizes.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        // Release: last.
        self.memory.words64(SLOTS, 1)[0].store(u64::from(slots), Ordering::Release);
    }

    /// Names the pool as it is now: what was mapped or registered of it under another name is not to be used.
    pub fn pool_id(&self) -> u64 {
        let resizes = self.memory.words64(RESIZES, 1)[0].load(Ordering::Relaxed);
        // An odd number: no two of 2^64 are the same.
        self.shape.pool_id.wrapping_add(resizes.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Gives pages to what is said of these slots, which may be more than the pool has yet: nothing that it says changes.
    pub fn populate(&self, slots: std::ops::Range<u32>) {
        const PAGE: usize = 4096;
        let rank_bytes = self.shape.tp_size as usize * 4;
        if slots.is_empty() {
            return;
        }
        for (zone, bytes) in [(self.headers, 64), (self.writers, rank_bytes)] {
            let from = (zone + slots.start as usize * bytes) / PAGE * PAGE;
            let to = (zone + slots.end.min(self.shape.slots_max) as usize * bytes).min(self.memory.bytes());
            if from < to {
                // Before Linux 5.14 pages come when they are used.
                let _ = self.memory.populate(from, to - from);
            }
        }
    }

    fn writer_word(&self, slot: u32, rank: u32) -> &AtomicU32 {
        self.memory.word32(self.writers + (slot as usize * self.shape.tp_size as usize + rank as usize) * 4)
    }

    /// The slots before this one have pages: the next engine process uses them from its first moment.
    pub fn set_born(&self, slots: u32) {
        planted::step();
        self.memory.words64(BORN, 1)[0].store(u64::from(slots), Ordering::Relaxed);
    }

    /// So many slots, from the first on, have pages.
    pub fn born_count(&self) -> u32 {
        let born = self.memory.words64(BORN, 1)[0].load(Ordering::Relaxed);
        born.min(u64::from(self.slots_count())) as u32
    }

    /// Who may write a rank's part of a slot from now on.
    pub fn set_writer(&self, slot: u32, rank: u32, session: Option<SessionId>) {
        let value = session.map_or(0, |session| session.0.wrapping_add(1));
        self.note(slot);
        planted::step();
        // Release: after the slot's header is gone, before the grant is seen.
        self.writer_word(slot, rank).store(value, Ordering::Release);
    }

    /// Who may be writing a rank's part of a slot.
    pub fn writer(&self, slot: u32, rank: u32) -> Option<SessionId> {
        let value = self.writer_word(slot, rank).load(Ordering::Acquire);
        (value != 0).then(|| SessionId(value.wrapping_sub(1)))
    }

    fn session_words(&self, session: SessionId) -> &[AtomicU64] {
        let place = session.0 as usize % SESSIONS_MAX;
        self.memory.words64(SESSIONS + place * SESSION_WORDS * 8, SESSION_WORDS)
    }

    /// A session begins: named before it can ask for a slot. Written by the control plane.
    pub fn begin_session(&self, former: FormerSession) {
        let words = self.session_words(former.session);
        // Which session it is comes last; until then the place is nobody's.
        words[0].store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        words[1].store(former.pid as u64, Ordering::Relaxed);
        words[2].store(former.started_ticks, Ordering::Relaxed);
        words[0].store(u64::from(former.session.0) + 1, Ordering::Release);
        self.memory.words64(NEXT_SESSION, 1)[0].store(u64::from(former.session.0), Ordering::Relaxed);
    }

    /// A session is over, and nothing of its process comes any more.
    pub fn end_session(&self, session: SessionId) {
        if self.session(session).is_some() {
            self.session_words(session)[0].store(0, Ordering::Release);
        }
    }

    /// All sessions whose process is still known.
    pub fn sessions(&self) -> Vec<SessionId> {
        let named = |place: usize| {
            let words = self.memory.words64(SESSIONS + place * SESSION_WORDS * 8, SESSION_WORDS);
            let id = words[0].load(Ordering::Acquire).checked_sub(1)?;
            u32::try_from(id).ok().filter(|id| *id as usize % SESSIONS_MAX == place).map(SessionId)
        };
        (0..SESSIONS_MAX).filter_map(named).collect()
    }

    /// The session of this id, if its process is still known.
    pub fn session(&self, session: SessionId) -> Option<FormerSession> {
        let words = self.session_words(session);
        let value = |i: usize| words[i].load(Ordering::Acquire);
        let is_it = value(0) == u64::from(session.0) + 1;
        is_it.then(|| FormerSession { session, pid: value(1) as i32, started_ticks: value(2) })
    }

    /// The last session that was numbered: numbers go on from here.
    pub fn last_session(&self) -> u32 {
        self.memory.words64(NEXT_SESSION, 1)[0].load(Ordering::Relaxed) as u32
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use bytemuck::Zeroable;
    use kvring_ipc::key::BlockKey;
    use kvring_ipc::mapping::{Pages, sealed_memfd};

    fn table() -> (Arc<Mapping>, SlotTable) {
        let shape = TableShape { pool_id: 9, layout: 7, slot_bytes: 4096, slots_max: 10, tp_size: 2 };
        let fd = sealed_memfd("test", shape.bytes() as u64, Pages::Small).unwrap();
        let memory = Arc::new(Mapping::new(&fd, shape.bytes()).unwrap());
        (memory.clone(), SlotTable::create(memory, shape, 10, "a layout"))
    }

    #[test]
    fn what_was_written_is_read_by_the_next_process() {
        let (memory, table) = table();
        let header = Header { key: BlockKey::from_words([1, 2]), generation: 3, ..Header::zeroed() };
        table.describe(4, header);
        table.set_writer(5, 1, Some(SessionId(0)));
        let session = FormerSession { session: SessionId(77), pid: 12, started_ticks: 34 };
        table.begin_session(session);
        table.set_born(8);
        let (next, text) = SlotTable::open(memory).unwrap();
        assert_eq!(text, "a layout");
        assert_eq!(next.header(4).map(|header| header.key), Some(header.key));
        assert_eq!((next.header(3), next.header(5)), (None, None));
        assert_eq!((next.writer(5, 0), next.writer(5, 1)), (None, Some(SessionId(0))));
        assert_eq!((next.session(SessionId(77)), next.last_session()), (Some(session), 77));
        assert_eq!(next.born_count(), 8);
        table.set_born(u32::MAX);
        assert_eq!(next.born_count(), 10, "no more than there are");
        assert_eq!(next.session(SessionId(77 + SESSIONS_MAX as u32)), None);
        next.clear(4);
        assert_eq!(table.header(4), None);
    }

    #[test]
    fn the_journal_names_what_has_changed_or_says_that_it_does_not_know() {
        let (memory, table) = table();
        let (next, _) = SlotTable::open(memory.clone()).unwrap();
        let header = Header { key: BlockKey::from_words([1, 2]), generation: 3, ..Header::zeroed() };
        table.describe(9, header);
        let before = next.seen().unwrap();
        assert_eq!(next.changed_since(before, 5), None, "nobody keeps it");
        table.begin_journal(5);
        let seen = next.seen().unwrap();
        assert_eq!(next.changed_since(before, 5), None, "whoever served then may have noted nothing");
        assert_eq!(next.changed_since(seen, 5), Some(vec![9]), "that change may have been under way");
        table.describe(4, header);
        table.clear(4);
        table.set_writer(4, 1, Some(SessionId(3)));
        table.set_writer(2, 0, None);
        assert_eq!(next.seen().unwrap().count, seen.count + 2, "a slot once where its changes come one after another");
        assert_eq!(next.changed_since(seen, 5), Some(vec![2, 4, 9]));
        assert_eq!(next.changed_since(next.seen().unwrap(), 5), Some(vec![2]));
        assert_eq!(next.changed_since(seen, 6), None, "another process served last");
        let room = u64::from(64 - (next.seen().unwrap().count - (seen.count - 1)) as u32);
        (0..room - 1).for_each(|at| table.clear((5 + at % 2) as u32));
        assert_eq!(next.changed_since(seen, 5), Some(vec![2, 4, 5, 6, 9]));
        table.clear(1);
        assert_eq!(next.changed_since(seen, 5), None, "a whole round: the first may be another's");
        assert!(next.changed_since(next.seen().unwrap(), 5).is_some());
        // A process of an earlier version serves in between, and one of this version after it.
        let seen = next.seen().unwrap();
        table.begin_journal(7);
        assert_eq!(next.changed_since(seen, 7), None);
    }

    #[test]
    fn a_table_of_an_earlier_version_has_no_journal() {
        let (_, made) = table();
        let shape = *made.shape();
        let bytes = shape.bytes_without_journal();
        let fd = sealed_memfd("test", bytes as u64, Pages::Small).unwrap();
        let memory = Arc::new(Mapping::new(&fd, bytes).unwrap());
        let table = SlotTable::create(memory.clone(), shape, 10, "a layout");
        table.begin_journal(1);
        table.describe(9, Header { key: BlockKey::from_words([1, 2]), generation: 3, ..Header::zeroed() });
        let (next, _) = SlotTable::open(memory).unwrap();
        assert!(next.header(9).is_some());
        assert_eq!(next.seen(), None);
    }

    #[test]
    fn a_smaller_pool_forgets_what_lay_behind_and_not_who_writes_there() {
        let (memory, table) = table();
        let header = Header { key: BlockKey::from_words([1, 2]), generation: 3, ..Header::zeroed() };
        assert_eq!(table.slots_count(), 10);
        table.set_born(10);
        (0..10).for_each(|slot| table.describe(slot, header));
        table.set_writer(8, 1, Some(SessionId(4)));
        let names: Vec<_> = [6, 6, 9, 10]
            .into_iter()
            .map(|slots| {
                table.resize(slots);
                table.pool_id()
            })
            .collect();
        assert_eq!(names[0], names[1], "nothing has changed");
        assert!(names[0] != names[2] && names[0] != names[3] && names[3] != table.shape().pool_id);
        let (next, _) = SlotTable::open(memory).unwrap();
        assert_eq!((next.slots_count(), next.born_count()), (10, 6), "what came back has no pages yet");
        let found: Vec<_> = (0..10).filter(|slot| next.header(*slot).is_some()).collect();
        assert_eq!(found, [0, 1, 2, 3, 4, 5]);
        assert_eq!(next.writer(8, 1), Some(SessionId(4)));
        next.resize(11);
        assert_eq!(next.slots_count(), 10, "no more than there is room for");
    }

    #[test]
    fn a_session_that_is_over_is_not_known_any_more() {
        let (_, table) = table();
        for id in [0, 5, 77] {
            table.begin_session(FormerSession { session: SessionId(id), pid: 12, started_ticks: 34 });
        }
        table.end_session(SessionId(5));
        table.end_session(SessionId(77 + SESSIONS_MAX as u32));
        assert_eq!(table.sessions(), [SessionId(0), SessionId(77)]);
        assert_eq!((table.session(SessionId(5)), table.last_session()), (None, 77));
    }

    /// A process may die between any two stores: what is left is the old header, the new one or none.
    #[test]
    fn a_header_cut_short_is_no_header() {
        let (memory, table) = table();
        let old = Header { key: BlockKey::from_words([1, 2]), generation: 3, ..Header::zeroed() };
        let new = Header { key: BlockKey::from_words([4, 5]), generation: 6, depth: 9, ..Header::zeroed() };
        let words = |header: Header| -> [u64; 8] { bytemuck::cast(Header { slot: 2, ..header }.sealed(7)) };
        for done in 0..8 {
            table.describe(2, old);
            table.clear(2);
            for (word, value) in table.header_words(2).iter().zip(words(new)).take(done) {
                word.store(value, Ordering::Relaxed);
            }
            assert_eq!(SlotTable::open(memory.clone()).unwrap().0.header(2), None, "{done} words");
        }
    }

    #[test]
    fn another_version_s_or_a_damaged_table_is_refused() {
        let (memory, _) = table();
        for word in 0..HEAD_WORDS {
            let place = &memory.words64(0, HEAD_WORDS)[word];
            let right = place.load(Ordering::Relaxed);
            place.store(right ^ 1 << 40, Ordering::Relaxed);
            assert!(SlotTable::open(memory.clone()).is_err(), "word {word}");
            place.store(right, Ordering::Relaxed);
        }
        assert!(SlotTable::open(memory).is_ok());
    }
}
