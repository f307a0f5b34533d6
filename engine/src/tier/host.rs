//! Slots of the pool: who fills each, and when it may be used again. Knows no I/O. What the next engine
//! process has to know of it is written through to a [`SlotTable`].

use std::sync::Arc;

use bytemuck::Zeroable;
use kvring_ipc::key::BlockKey;
use kvring_ipc::mapping::Mapping;
use kvring_ipc::wire::Grant;

use super::header::{CRC_UNKNOWN, Header};
use super::table::{Seen, SlotTable};
use crate::dma;
use crate::index::BlockId;
use crate::limits::SESSIONS_MAX;
use crate::planted::{self, Bug};

/// A session, as slots and leases know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u32);

/// Who writes: a session, the instance it belongs to, and its rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writer {
    /// The session.
    pub session: SessionId,
    /// The instance: ranks of one instance share a slot.
    pub instance: u32,
    /// Its tensor-parallel rank, below the layout's `tp_size`.
    pub rank: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable)]
#[repr(u8)]
enum State {
    /// Not registered with the devices yet.
    Unborn = 0,
    Free,
    /// Ranks of one instance are writing into it.
    Filling,
    /// It holds a block's bytes, or a read is filling it.
    Held,
    /// A dead writer's: it may still be written to.
    Quarantined,
}

/// One cache line. All zeros is one that nobody has used: memory that was not touched yet.
#[derive(Debug, Clone, Copy, Zeroable)]
#[repr(align(64))]
struct Slot {
    state: State,
    /// 0 before its first use.
    generation: u32,
    /// The block that it is filled with, or was found to hold by a recovery, plus one; 0 for none.
    block: u32,
    instance: u32,
    /// Ranks that have reserved it, and of those, the ranks that are done.
    joined: u32,
    done: u32,
    /// A rank aborted or died: the block is lost, the others only have to finish.
    aborted: bool,
    /// No rank was writing at the last sweep, and not all had committed.
    stalled: bool,
    /// Ranks whose writer is gone but not known to be dead: it may write for ever.
    suspects: u32,
    /// A writer died: not before this moment.
    free_at_ns: u64,
    /// Checksum of the bytes it holds, where it was made.
    data_crc: u64,
    crc_known: bool,
    /// It was held by an engine process that died: to be verified before it is used.
    doubted: bool,
    /// Where it stands among those that are being filled, if it is.
    nth_filled: u32,
}

const _: () = assert!(size_of::<Slot>() == 64);

impl Slot {
    /// It holds what a header says that another engine process left.
    fn holds_what(&mut self, header: &Header) {
        let crc_known = header.flags & CRC_UNKNOWN == 0;
        (self.state, self.generation) = (State::Held, header.generation);
        (self.data_crc, self.crc_known, self.doubted) = (header.data_crc, crc_known, crc_known);
    }
}

/// What became of a slot when a rank was done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RankDone {
    /// Other ranks are still at it.
    Waiting,
    /// All ranks have committed: the block is complete.
    Complete(BlockId),
    /// A rank gave up: the block is lost now, if it was not before.
    Lost(BlockId),
}

/// What a recovery finds changed.
#[derive(Debug, Default)]
pub struct Changes {
    /// Slots that do not hold any more what was taken from them.
    pub gone: Vec<(u32, BlockId)>,
    /// What slots hold that was not taken yet.
    pub found: Vec<Header>,
    /// Slots are not free any more, or not in quarantine.
    leaves_lists: bool,
}

/// Nothing is known of the header, whatever its checksum is.
const UNSURE: u64 = u64::MAX;

/// All slots of the pool.
#[derive(Debug)]
pub struct HostSlots {
    slots: dma::Table<Slot>,
    /// `writers[slot * tp_size + rank]`: the session that fills that rank's part, plus one; 0 for none.
    writers: dma::Table<u32>,
    /// What a slot's generations begin at.
    first_generation: u32,
    /// The checksum of each header that a recovery has found and its block was taken from; [`UNSURE`] for one to look
    /// at again.
    taken: Vec<u64>,
    /// How far the table's journal was when a recovery began to look at it last.
    seen: Option<Seen>,
    tp_size: u32,
    free: Vec<u32>,
    born_count: u32,
    /// All slots before this one are born; ranges after it that are too.
    born_before: u32,
    born_ahead: Vec<std::ops::Range<u32>>,
    /// Slots that wait for a dead writer's grace.
    quarantined: Vec<u32>,
    /// Only slots before this one are given out.
    open_before: u32,
    /// Of the others, those that are free, and those that are held or being filled.
    closed_free: u32,
    closed_busy: u32,
    /// Where the next engine process finds what this one knew.
    table: Option<SlotTable>,
    /// Slots that are being filled, in no order: a session's end looks at these and not at all there are.
    filled: Vec<u32>,
    /// How many each instance is filling, by its number modulo the limit; its ranks share them.
    filling: Box<[u32]>,
}

impl HostSlots {
    /// `count` slots, none of them usable before [`HostSlots::bear`].
    pub fn new(count: u32, tp_size: u32) -> Self {
        Self {
            slots: dma::Table::new(count as usize),
            writers: dma::Table::new(count as usize * tp_size as usize),
            first_generation: 0,
            taken: Vec::new(),
            seen: None,
            tp_size,
            free: Vec::with_capacity(count as usize),
            born_count: 0,
            born_before: 0,
            born_ahead: Vec::new(),
            quarantined: Vec::with_capacity(count as usize),
            open_before: count,
            closed_free: 0,
            closed_busy: 0,
            table: None,
            filled: Vec::with_capacity(count as usize),
            filling: vec![0; SESSIONS_MAX].into_boxed_slice(),
        }
    }

    /// Where its tables lie.
    pub fn tables(&self) -> [Arc<Mapping>; 2] {
        [self.slots.memory(), self.writers.memory()]
    }

    /// Only the first so many slots are given out from now on.
    pub fn close_from(&mut self, slots: u32) {
        self.open_all();
        self.open_before = slots.min(self.count());
        let open = self.open_before;
        let before = self.free.len();
        self.free.retain(|slot| *slot < open);
        self.closed_free = (before - self.free.len()) as u32;
        let is_busy = |slot: &&Slot| matches!(slot.state, State::Held | State::Filling);
        self.closed_busy = self.slots[open as usize..].iter().filter(is_busy).count() as u32;
    }
    /// All slots are given out again.
    pub fn open_all(&mut self) {
        let count = self.count();
        let closed = std::mem::replace(&mut self.open_before, count)..count;
        (self.closed_free, self.closed_busy) = (0, 0);
        for slot in closed.rev() {
            if self.slots[slot as usize].state == State::Free {
                self.free.push(slot);
            }
        }
    }
    /// Slots that are closed and yet hold a block, or are being filled with one.
    pub fn closed_busy_count(&self) -> u32 {
        self.closed_busy
    }
    /// What the first slot holds is in the second, an acquired one, from now on.
    pub fn inherit(&mut self, from: u32, to: u32) {
        let Slot { data_crc, crc_known, doubted, .. } = self.slots[from as usize];
        let heir = &mut self.slots[to as usize];
        (heir.data_crc, heir.crc_known, heir.doubted) = (data_crc, crc_known, doubted);
    }

    fn is_closed(&self, slot: u32) -> bool {
        slot >= self.open_before
    }

    /// Slots that an instance is filling.
    pub fn filling_count(&self, instance: u32) -> u32 {
        self.filling[instance as usize % SESSIONS_MAX]
    }

    /// Slots that are being filled.
    pub fn filled_count(&self) -> u32 {
        self.filled.len() as u32
    }

    fn begin_filling(&mut self, slot: u32, instance: u32) {
        let s = &mut self.slots[slot as usize];
        (s.state, s.instance, s.nth_filled) = (State::Filling, instance, self.filled.len() as u32);
        self.filled.push(slot);
        self.filling[instance as usize % SESSIONS_MAX] += 1;
    }

    fn end_filling(&mut self, slot: u32, state: State) {
        let s = &mut self.slots[slot as usize];
        assert!(s.state == State::Filling);
        s.state = state;
        self.filling[s.instance as usize % SESSIONS_MAX] -= 1;
        let nth = s.nth_filled;
        self.filled.swap_remove(nth as usize);
        if let Some(moved) = self.filled.get(nth as usize) {
            self.slots[*moved as usize].nth_filled = nth;
        }
    }

    /// From now on everything is written through to this table.
    ///
    /// # Panics
    /// If the table is another pool's.
    pub fn keep_in(&mut self, table: SlotTable) {
        assert!(table.shape().slots_max >= self.count() && table.shape().tp_size == self.tp_size);
        self.table = Some(table);
    }

    /// What the table says of another engine process: a slot that somebody may be writing into is
    /// quarantined; the sound headers of the others are given back, for whoever rebuilds the index: each
    /// slot counts as held until it is released. The rest of what was in use is free at once: else the first
    /// store would evict what was just recovered.
    ///
    /// May be asked while that process still serves, and then again when it is gone: it says what has changed since. Asked
    /// for what has come `after` it looked last and the process of that epoch has ended, it looks only at what the table's
    /// journal names, and at slots that are `unsettled`; else at every slot, which takes some nanoseconds for each. Not once
    /// a slot was given out.
    pub fn recover(&mut self, after: Option<u64>, unsettled: impl IntoIterator<Item = u32>) -> Changes {
        let mut changes = Changes::default();
        let Some(table) = self.table.clone() else { return changes };
        // Before anything is looked at.
        let seen = table.seen();
        let changed = self.seen.zip(after).and_then(|(seen, epoch)| table.changed_since(seen, epoch));
        self.seen = seen;
        self.taken.resize(self.slots.len(), 0);
        match changed {
            Some(mut slots) => {
                slots.extend(unsettled);
                slots.retain(|slot| *slot < self.count());
                slots.sort_unstable();
                slots.dedup();
                slots.into_iter().for_each(|slot| self.look(&table, slot, &mut changes));
            }
            None => (0..self.count()).for_each(|slot| self.look(&table, slot, &mut changes)),
        }
        if changes.leaves_lists {
            self.free.retain(|slot| self.slots[*slot as usize].state == State::Free);
            self.quarantined.retain(|slot| self.slots[*slot as usize].state == State::Quarantined);
        }
        let born = if planted::has(Bug::BirthForgotten) { 0 } else { table.born_count() };
        // The pool of the one that still serves may be larger; and the table is its own to write.
        self.are_born(0..born.min(self.count()));
        changes
    }

    /// What the table says of one slot.
    fn look(&mut self, table: &SlotTable, slot: u32, changes: &mut Changes) {
        let mut suspects = 0;
        for rank in 0..self.tp_size {
            if let Some(session) = table.writer(slot, rank) {
                suspects |= 1 << rank;
                self.writers[(slot * self.tp_size + rank) as usize] = session.0.wrapping_add(1);
            }
        }
        let taken = &mut self.taken[slot as usize];
        let same = *taken != UNSURE && table.seal(slot) == *taken || planted::has(Bug::ChangesMissed) && *taken != 0;
        if suspects == 0 && same {
            return;
        }
        let s = &mut self.slots[slot as usize];
        let before = s.state;
        if let (State::Held, Some(block)) = (before, s.block.checked_sub(1)) {
            changes.gone.push((slot, BlockId(block)));
        }
        *s = Slot::zeroed();
        *taken = UNSURE;
        if suspects != 0 {
            (s.state, s.joined, s.done, s.suspects, s.aborted) =
                (State::Quarantined, suspects, suspects, suspects, true);
            if before != State::Quarantined {
                self.quarantined.push(slot);
            }
        } else if let Some(header) = table.header(slot) {
            s.holds_what(&header);
            changes.found.push(header);
        } else if slot < self.born_before {
            s.state = State::Free;
            if before != State::Free {
                self.free.push(slot);
            }
        }
        let left = |list: State| before == list && s.state != list;
        changes.leaves_lists |= left(State::Free) || left(State::Quarantined);
    }

    /// The block of a header that was found is in the index: should the table be asked again, nothing is new there.
    pub fn took(&mut self, header: &Header, block: BlockId) {
        self.slots[header.slot as usize].block = block.0 + 1;
        self.taken[header.slot as usize] = header.crc;
    }
    /// The block that lay in a slot has been let go with one that is gone, though its own header has not changed: the
    /// header, to be taken anew. None if it has.
    pub fn untake(&mut self, slot: u32) -> Option<Header> {
        let s = &mut self.slots[slot as usize];
        let unchanged = s.state == State::Held && std::mem::take(&mut s.block) != 0;
        self.taken[slot as usize] = UNSURE;
        let header = self.table.as_ref().filter(|_| unchanged)?.header(slot);
        match &header {
            // It may be another one by now.
            Some(header) => s.holds_what(header),
            None => self.release(slot),
        }
        header
    }
    /// No other process writes the table any more, and what it said is known: from now on the process of this epoch does.
    pub fn end_recovery(&mut self, epoch: u64) {
        (self.taken, self.seen) = (Vec::new(), None);
        if let Some(table) = &self.table {
            table.begin_journal(epoch);
        }
    }

    /// Sessions that may be writing into quarantined slots, each once.
    pub fn suspects(&self) -> Vec<SessionId> {
        let mut sessions = Vec::new();
        for slot in &self.quarantined {
            let s = &self.slots[*slot as usize];
            let of_rank = |rank: &u32| s.suspects & 1 << rank != 0;
            sessions.extend(
                (0..self.tp_size)
                    .filter(of_rank)
                    .map(|rank| SessionId(self.writers[(slot * self.tp_size + rank) as usize].wrapping_sub(1))),
            );
        }
        sessions.sort_unstable();
        sessions.dedup();
        sessions
    }

    /// The slot holds this block, whole.
    pub fn describe(&mut self, slot: u32, key: BlockKey, parent: BlockKey, depth: u32) {
        let Some(table) = &self.table else { return };
        let s = &self.slots[slot as usize];
        let flags = if s.crc_known { 0 } else { CRC_UNKNOWN };
        let (generation, data_crc) = (s.generation, s.data_crc);
        table.describe(slot, Header { key, parent, data_crc, generation, depth, slot, flags, crc: 0 });
    }

    /// What the table says that a slot holds.
    pub fn header(&self, slot: u32) -> Option<Header> {
        self.table.as_ref()?.header(slot)
    }

    /// Nothing that the slots hold is found again by the next engine process.
    pub fn forget_all(&mut self) {
        if let Some(table) = &self.table {
            table.clear_all();
        }
    }
    /// What free slots held is not: their headers stay until they are used again.
    pub fn forget_free(&mut self) {
        if let Some(table) = &self.table {
            self.free.iter().for_each(|slot| table.clear(*slot));
            let closed = self.open_before..self.slots.len() as u32;
            let free = closed.filter(|slot| self.slots[*slot as usize].state == State::Free);
            free.for_each(|slot| table.clear(slot));
        }
    }
    /// What the slot holds is not.
    pub fn forget(&mut self, slot: u32) {
        if let Some(table) = &self.table {
            table.clear(slot);
        }
    }

    /// The checksum of what the slot holds, if it was made.
    pub fn crc(&self, slot: u32) -> Option<u64> {
        let s = &self.slots[slot as usize];
        s.crc_known.then_some(s.data_crc)
    }
    /// The checksum of what the slot holds was made.
    pub fn set_crc(&mut self, slot: u32, data_crc: u64) {
        let s = &mut self.slots[slot as usize];
        (s.data_crc, s.crc_known) = (data_crc, true);
    }
    /// Whether the slot's bytes are to be verified before they are used.
    pub fn is_doubted(&self, slot: u32) -> bool {
        self.slots[slot as usize].doubted
    }
    /// They were.
    pub fn trust(&mut self, slot: u32) {
        self.slots[slot as usize].doubted = false;
    }

    /// Generations begin at this number: grants of another server's life are worthless here.
    pub fn begin_generations_at(&mut self, generation: u32) {
        self.first_generation = generation;
    }

    /// These slots have pages: they may be used.
    pub fn bear(&mut self, slots: std::ops::Range<u32>) {
        self.are_born(slots);
        if let Some(table) = &self.table {
            table.set_born(self.born_before);
        }
    }

    fn are_born(&mut self, slots: std::ops::Range<u32>) {
        // Not twice: those before may be born since the recovery.
        let slots = slots.start.max(self.born_before)..slots.end;
        if slots.is_empty() {
            return;
        }
        self.born_count += slots.len() as u32;
        for slot in slots.clone().rev() {
            let s = &mut self.slots[slot as usize];
            // A recovered slot was in use before.
            if s.state == State::Unborn {
                s.state = State::Free;
                if slot < self.open_before {
                    self.free.push(slot);
                } else {
                    self.closed_free += 1;
                }
            }
        }
        self.born_ahead.push(slots);
        while let Some(at) = self.born_ahead.iter().position(|ahead| ahead.start == self.born_before) {
            self.born_before = self.born_ahead.swap_remove(at).end;
        }
    }

    /// All slots there will ever be.
    pub fn count(&self) -> u32 {
        self.slots.len() as u32
    }
    /// Slots that may be used.
    pub fn born_count(&self) -> u32 {
        self.born_count
    }
    /// Slots that are free, and are given out.
    pub fn free_count(&self) -> u32 {
        self.free.len() as u32
    }
    /// Slots that are free, and are not.
    pub fn closed_free_count(&self) -> u32 {
        self.closed_free
    }
    /// Slots that wait out a grace.
    pub fn quarantined_count(&self) -> u32 {
        self.quarantined.len() as u32
    }

    /// Brings what is known of a slot closer.
    pub fn prefetch(&self, slot: u32) {
        if let Some(s) = self.slots.get(slot as usize) {
            dma::prefetch(s);
            dma::prefetch(&self.writers[(slot * self.tp_size) as usize]);
            if let Some(table) = &self.table {
                table.prefetch(slot);
            }
        }
    }

    /// A free slot. Its generation moves on, so earlier grants of it are worthless.
    pub fn acquire(&mut self) -> Option<u32> {
        let slot = self.free.pop()?;
        let s = &mut self.slots[slot as usize];
        s.state = State::Held;
        // Never 0: a word of zeros is no grant.
        let before = if s.generation == 0 { self.first_generation } else { s.generation };
        s.generation = before.checked_add(1).unwrap_or(1);
        (s.crc_known, s.doubted) = (false, false);
        // Before anything writes into it.
        if !planted::has(Bug::TableKeepsHeader) {
            self.forget(slot);
        }
        Some(slot)
    }

    /// A name for what the slot holds now.
    pub fn grant(&self, slot: u32) -> Grant {
        Grant { slot, generation: self.slots[slot as usize].generation }
    }

    /// Hands an acquired slot to a writer.
    pub fn reserve(&mut self, slot: u32, block: BlockId, writer: Writer) -> Grant {
        let s = &mut self.slots[slot as usize];
        assert!(s.state == State::Held);
        (s.block, s.joined, s.done, s.aborted) = (block.0 + 1, 1 << writer.rank, 0, false);
        (s.stalled, s.suspects, s.free_at_ns) = (false, 0, 0);
        self.begin_filling(slot, writer.instance);
        self.set_writer(slot, writer.rank, Some(writer.session));
        self.grant(slot)
    }

    /// The array keeps the last writer's name; the table only who may still be writing.
    fn set_writer(&mut self, slot: u32, rank: u32, session: Option<SessionId>) {
        if let Some(session) = session {
            self.writers[(slot * self.tp_size + rank) as usize] = session.0.wrapping_add(1);
        }
        let silent = if session.is_some() { Bug::WriterNotTabled } else { Bug::WriterNotCleared };
        if let Some(table) = self.table.as_ref().filter(|_| !planted::has(silent)) {
            table.set_writer(slot, rank, session);
        }
    }

    /// Lets another rank of the same instance fill its part. `None` if it may not.
    pub fn join(&mut self, slot: u32, writer: Writer) -> Option<Grant> {
        let s = &mut self.slots[slot as usize];
        let bit = 1 << writer.rank;
        if s.state != State::Filling || s.instance != writer.instance || s.aborted || s.joined & bit != 0 {
            return None;
        }
        s.joined |= bit;
        s.stalled = false;
        self.set_writer(slot, writer.rank, Some(writer.session));
        Some(self.grant(slot))
    }

    /// A rank has committed or aborted. `None` if the grant is not its own or not current.
    pub fn rank_done(&mut self, grant: Grant, writer: Writer, commit: bool) -> Option<RankDone> {
        let s = self.slots.get_mut(grant.slot as usize)?;
        let bit = 1 << writer.rank;
        let theirs = self.writers.get((grant.slot * self.tp_size + writer.rank) as usize)
            == Some(&writer.session.0.wrapping_add(1));
        let current = s.generation == grant.generation || planted::has(Bug::GenerationIgnored);
        if s.state != State::Filling || !current || !theirs || s.joined & !s.done & bit == 0 {
            return None;
        }
        s.done |= bit;
        s.aborted |= !commit;
        let (block, aborted, done) = (BlockId(s.block - 1), s.aborted, s.done);
        self.set_writer(grant.slot, writer.rank, None);
        if aborted {
            return Some(RankDone::Lost(block));
        }
        let all = u32::MAX >> (32 - self.tp_size);
        if done != all && !planted::has(Bug::FirstRankIsAll) {
            return Some(RankDone::Waiting);
        }
        self.end_filling(grant.slot, State::Held);
        let s = &mut self.slots[grant.slot as usize];
        (s.joined, s.done) = (0, 0);
        Some(RankDone::Complete(block))
    }

    /// Whether a lost slot has no writer left, so that the caller may free it.
    pub fn is_abandoned(&self, slot: u32) -> bool {
        let s = &self.slots[slot as usize];
        s.state == State::Filling && s.aborted && s.joined == s.done
    }

    /// A slot that a session was filling when it went away, and where it stands: the last one before `before`, of all
    /// that are being filled. Each is marked done and lost, and quarantined until [`HostSlots::end_quarantine`] says when.
    /// Asked again from one behind it on, as the session may be several of its ranks; slots that leave meanwhile are
    /// replaced by such as were looked at.
    pub fn next_of_dead(&mut self, session: SessionId, before: u32) -> Option<(u32, BlockId, u32)> {
        for nth in (0..before.min(self.filled_count())).rev() {
            let slot = self.filled[nth as usize];
            let s = &mut self.slots[slot as usize];
            let first = slot * self.tp_size;
            for rank in 0..self.tp_size {
                let bit = 1 << rank;
                let theirs = s.joined & bit != 0 && self.writers[(first + rank) as usize] == session.0.wrapping_add(1);
                // A part that was committed is written no more; but its block may lack the others' for
                // ever, if they never come.
                if theirs && (s.done & bit == 0 || !s.aborted) {
                    s.suspects |= bit & !s.done;
                    s.done |= bit;
                    s.aborted = true;
                    return Some((slot, BlockId(s.block - 1), nth));
                }
            }
        }
        None
    }

    /// The last slot before `before`, and where that is, that no rank was writing at this sweep and the one before,
    /// though not all ranks have committed: some will never come. It is marked lost.
    pub fn next_stalled(&mut self, before: u32) -> Option<(u32, BlockId, u32)> {
        for nth in (0..before.min(self.filled_count())).rev() {
            let slot = self.filled[nth as usize];
            let s = &mut self.slots[slot as usize];
            if s.aborted || s.joined != s.done {
                continue;
            }
            if std::mem::replace(&mut s.stalled, true) {
                s.aborted = true;
                return Some((slot, BlockId(s.block - 1), nth));
            }
        }
        None
    }

    /// Puts an abandoned slot aside instead of freeing it, if a writer of it died.
    pub fn quarantine(&mut self, slot: u32) -> bool {
        let s = &mut self.slots[slot as usize];
        if s.suspects == 0 && s.free_at_ns == 0 {
            return false;
        }
        self.end_filling(slot, State::Quarantined);
        self.closed_busy -= u32::from(slot >= self.open_before);
        self.quarantined.push(slot);
        true
    }

    /// The session's process is known to be dead: its slots wait until `free_at_ns`, and for every
    /// other writer of theirs that is gone.
    pub fn end_quarantine(&mut self, session: SessionId, free_at_ns: u64) {
        for slot in self.filled.iter().chain(&self.quarantined).copied() {
            let s = &mut self.slots[slot as usize];
            if s.suspects == 0 {
                continue;
            }
            for rank in 0..self.tp_size {
                let bit = 1 << rank;
                let theirs = self.writers[(slot * self.tp_size + rank) as usize] == session.0.wrapping_add(1);
                if s.suspects & bit != 0 && theirs {
                    s.suspects &= !bit;
                    s.free_at_ns = s.free_at_ns.max(free_at_ns);
                }
            }
        }
    }

    /// The session has said that it writes no more: its slots wait for nobody but other writers, and the
    /// next engine process does not ask for it again.
    pub fn end_quarantine_drained(&mut self, session: SessionId, now_ns: u64) {
        for at in 0..self.quarantined.len() {
            self.end_quarantine_of_slot(session, self.quarantined[at]);
        }
        self.release_quarantined(now_ns);
    }

    /// The writer has promised that nothing of its own writes into this slot any more.
    pub fn end_quarantine_of_slot(&mut self, session: SessionId, slot: u32) {
        for rank in 0..self.tp_size {
            if self.writers[(slot * self.tp_size + rank) as usize] == session.0.wrapping_add(1) {
                self.slots[slot as usize].suspects &= !(1 << rank);
                self.set_writer(slot, rank, None);
            }
        }
    }

    /// Whether the slot holds a block's bytes, or a read is filling it.
    pub fn holds(&self, slot: u32) -> bool {
        self.slots[slot as usize].state == State::Held
    }

    /// Frees every quarantined slot whose time has come.
    pub fn release_quarantined(&mut self, now_ns: u64) {
        let mut at = 0;
        while let Some(slot) = self.quarantined.get(at).copied() {
            let s = &self.slots[slot as usize];
            let graced = s.free_at_ns <= now_ns || planted::has(Bug::GraceSkipped);
            if s.suspects == 0 && graced && !planted::has(Bug::QuarantineLeaks) {
                self.quarantined.swap_remove(at);
                self.release(slot);
            } else {
                at += 1;
            }
        }
    }

    /// Takes a slot back.
    pub fn release(&mut self, slot: u32) {
        let s = &mut self.slots[slot as usize];
        assert!(!matches!(s.state, State::Free | State::Unborn), "a slot is freed once");
        let written = std::mem::take(&mut s.joined);
        let was_busy = s.state != State::Quarantined;
        if s.state == State::Filling {
            self.end_filling(slot, State::Free);
        }
        let s = &mut self.slots[slot as usize];
        s.state = State::Free;
        s.block = 0;
        (s.suspects, s.free_at_ns) = (0, 0);
        for rank in (0..self.tp_size).filter(|rank| written & 1 << rank != 0) {
            self.set_writer(slot, rank, None);
        }
        if self.is_closed(slot) {
            self.closed_free += 1;
            self.closed_busy -= u32::from(was_busy);
            // Now, or all at once when the pool grows again.
            self.forget(slot);
        } else {
            self.free.push(slot);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const fn writer(session: u32, instance: u32, rank: u32) -> Writer {
        Writer { session: SessionId(session), instance, rank }
    }

    fn reserved(tp_size: u32, first: Writer) -> (HostSlots, Grant) {
        let mut slots = HostSlots::new(4, tp_size);
        slots.bear(0..4);
        let slot = slots.acquire().unwrap();
        let grant = slots.reserve(slot, BlockId(9), first);
        (slots, grant)
    }

    #[test]
    fn a_block_is_complete_when_all_ranks_have_committed() {
        let (mut slots, grant) = reserved(2, writer(1, 5, 0));
        assert_eq!(slots.join(grant.slot, writer(2, 6, 1)), None, "another instance");
        assert_eq!(slots.join(grant.slot, writer(3, 5, 0)), None, "a rank joins once");
        assert_eq!(slots.rank_done(grant, writer(1, 5, 0), true), Some(RankDone::Waiting));
        assert_eq!(slots.rank_done(grant, writer(1, 5, 0), true), None, "a rank commits once");
        assert_eq!(slots.join(grant.slot, writer(2, 5, 1)), Some(grant));
        assert_eq!(slots.rank_done(grant, writer(4, 5, 1), true), None, "another session");
        assert_eq!(slots.rank_done(grant, writer(2, 5, 1), true), Some(RankDone::Complete(BlockId(9))));
    }

    #[test]
    fn a_stale_or_absurd_grant_is_nobody_s() {
        let (mut slots, grant) = reserved(1, writer(1, 5, 0));
        for bad in [
            Grant { generation: grant.generation + 1, ..grant },
            Grant { slot: 77, ..grant },
            Grant { slot: u32::MAX, generation: 0 },
        ] {
            assert_eq!(slots.rank_done(bad, writer(1, 5, 0), true), None);
        }
    }

    #[test]
    fn a_session_s_end_finds_all_that_it_was_filling_whatever_goes_meanwhile() {
        let mut slots = HostSlots::new(12, 1);
        slots.bear(0..12);
        for n in 0..12 {
            let slot = slots.acquire().unwrap();
            slots.reserve(slot, BlockId(n), writer(1 + n % 3, 5, 0));
        }
        let (mut before, mut found) = (u32::MAX, Vec::new());
        while let Some((slot, block, nth)) = slots.next_of_dead(SessionId(2), before) {
            found.push(block.0);
            assert!(slots.is_abandoned(slot) && slots.quarantine(slot));
            before = nth + 1;
        }
        found.sort_unstable();
        assert_eq!(found, [1, 4, 7, 10]);
        assert_eq!((slots.filled_count(), slots.filling_count(5), slots.quarantined_count()), (8, 8, 4));
        slots.end_quarantine(SessionId(2), 0);
        slots.release_quarantined(0);
        assert_eq!(slots.free_count(), 4);
    }

    #[test]
    fn a_slot_of_two_dead_ranks_waits_for_the_later_death() {
        let (mut slots, grant) = reserved(2, writer(1, 5, 0));
        slots.join(grant.slot, writer(2, 5, 1)).unwrap();
        assert!(slots.next_of_dead(SessionId(1), 1).is_some() && slots.next_of_dead(SessionId(2), 1).is_some());
        assert!(slots.is_abandoned(grant.slot) && slots.quarantine(grant.slot));
        slots.end_quarantine(SessionId(1), 100);
        slots.release_quarantined(1000);
        assert_eq!(slots.quarantined_count(), 1, "the other rank may still be writing");
        slots.end_quarantine(SessionId(2), 2000);
        slots.release_quarantined(2000);
        assert_eq!(slots.quarantined_count(), 0);
    }

    #[test]
    fn a_dead_writer_s_slot_waits_for_death_and_grace() {
        let (mut slots, grant) = reserved(1, writer(1, 5, 0));
        assert_eq!(slots.next_of_dead(SessionId(1), u32::MAX), Some((grant.slot, BlockId(9), 0)));
        assert!(slots.is_abandoned(grant.slot) && slots.quarantine(grant.slot));
        slots.release_quarantined(u64::MAX - 1);
        assert_eq!((slots.free_count(), slots.quarantined_count()), (3, 1), "suspect for ever, not freed by time");
        slots.end_quarantine(SessionId(1), 100);
        slots.release_quarantined(99);
        assert_eq!(slots.free_count(), 3);
        slots.release_quarantined(100);
        assert_eq!((slots.free_count(), slots.quarantined_count()), (4, 0));
    }
}
