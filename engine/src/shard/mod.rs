//! The data plane: one pinned core and all it owns, one loop.
//!
//! Each [`Shard::poll`] does at most its budget and says how much it did. It never blocks, locks,
//! allocates or logs; time is passed in. Room in a session's completion ring is taken before its
//! submission is, so every request is answered exactly once and the answer always fits.

pub mod budget;
pub mod hasher;
pub mod load;
pub mod lost;
pub mod session;
pub mod transfer;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvring_ipc::config::Verify;
use kvring_ipc::doorbell;
use kvring_ipc::key::BlockKey;
use kvring_ipc::mapping::Mapping;
use kvring_ipc::recorder::{Cause, Entry, Refusal, What};
use kvring_ipc::ring::Poisoned;
use kvring_ipc::segment::SessionState;
use kvring_ipc::stats::{self, SESSION_HISTOGRAM, Stats};
use kvring_ipc::wire::{
    BATCH_BLOCKS_MAX, Completion, GRANTS_PER_ENTRY, Grant, LeaseId, Op, Span, Status, Submission, Tag,
};

use crate::cache::{Cache, Found, NoParent, Parent, Reserve, WriteBack};
use crate::checksum;
use crate::control::verify::{Survey, Surveyed};
use crate::device::{Device, Direction, Done, Io, Region};
use crate::index::{BlockId, Place, Tier};
use crate::limits::{
    DEVICE_BUDGET, HOUSEKEEPING_NS, LEASES_MAX, LOADS_PER_SESSION_MAX, PREFETCH_AHEAD_MAX, SESSION_BUDGET,
    SESSIONS_MAX, SHARE_SLOTS_MIN,
};
use crate::metrics::{
    DeviceColumn, DeviceHistogram, Metrics, SERVICE_SAMPLE, SessionColumn, ShardHistogram, device_histogram,
};
use crate::planted::{self, Bug};
use crate::tier::disk::DiskSlots;
use crate::tier::host::{SessionId, Writer};
use crate::tier::piece::HeaderPiece;
use budget::Budget;
use hasher::{Hasher, Hashing};
use load::{Asked, Dirty, Loads, Waiter};
use lost::Turn;
use session::Session;
use transfer::{Landed, Purpose, Transfers};

/// What a shard is told.
#[derive(Debug, Clone, Copy)]
pub struct ShardOptions {
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// How long a lease holds.
    pub lease_ttl_ns: u64,
    /// How long a load waits for a slot.
    pub load_wait_ns: u64,
    /// How long a dead writer's slots wait.
    pub writer_grace_ns: u64,
    /// Reads in flight on a device.
    pub read_depth: u32,
    /// Write-backs in flight on a device.
    pub write_depth: u32,
    /// Bytes written back in a day; `None` for as many as there are.
    pub write_bytes_per_day: Option<u64>,
    /// Whether blocks on the disk have checksums.
    pub checksum: bool,
    /// Which blocks in the pool are verified.
    pub verify: Verify,
    /// What a ping is answered with: the moment it was picked up.
    pub clock: fn() -> u64,
}

/// Why a session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It said goodbye: nothing of its own writes into the pool any more.
    Goodbye,
    /// Its process hung up or died, but not both yet: it may still be writing.
    Suspect,
    /// It hung up and died.
    Dead,
}

/// A shard.
pub struct Shard<D> {
    cache: Cache,
    pool: Arc<Mapping>,
    devices: Vec<Transfers<D>>,
    sessions: Vec<Option<Box<Session>>>,
    /// Indices of sessions there are, so that a poll looks at no empty place.
    live: Vec<usize>,
    loads: Loads,
    /// Loads with blocks that wait for a slot.
    hungry_count: u32,
    dirty: VecDeque<Dirty>,
    budget: Option<Budget>,
    /// Write-back waits for the budget.
    held_back: bool,
    /// Makes the checksums of write-backs; without it they are made here.
    hasher: Option<Hasher>,
    metrics: Arc<Metrics>,
    /// Where all that can be read by others is shown.
    stats: Option<Stats>,
    options: ShardOptions,
    /// The moment of this round.
    now_ns: u64,
    requests_count: u64,
    /// Since when the request that is being served is, if it is one whose time is taken.
    timed_since_ns: Option<u64>,
    /// No store is taken.
    draining: bool,
    /// No session comes any more.
    closing: bool,
    /// The next of the live sessions whose levels are shown.
    shown: usize,
    done: Vec<Done>,
    landed: Vec<Landed>,
    /// Devices that were lost or are back, for whoever tells people.
    turns: Vec<(usize, Turn)>,
    /// When the devices were looked at the last time, and since when they are given their time.
    looked_ns: u64,
    patience_from_ns: u64,
    /// Scratch: what a device is reading.
    reads: Vec<(BlockId, u32)>,
    scratch: Box<[u8]>,
    keys: Box<[BlockKey]>,
    blocks: Box<[BlockId]>,
    next_housekeeping_ns: u64,
    next_sweep_ns: u64,
    /// Checksums of blocks in the pool that this round may still make for loads.
    verifications_left: u32,
    /// What the last engine process left in the pool and not on the SSD is queued for it, from this slot on.
    requeue_from: u32,
    /// Slots of the pool from here on are to be empty, and which is looked at next.
    vacating: Option<(u32, u32)>,
    /// When what could not be moved or taken out of use is tried again.
    next_move_ns: u64,
    /// Slots of the SSD that are not used any more, for whoever gives back their place.
    retired: Vec<u32>,
}

/// Bytes of blocks that are moved in one round: some tens of microseconds of the shard's time.
const MOVED_BYTES: u64 = 256 << 10;

/// Checksums made for loads in one round; what waits for one is looked at again in the next.
const VERIFICATIONS_MAX: u32 = 2;
/// A shard that has not looked at its devices for so long did not run.
const PAUSED_NS: u64 = 3_000_000_000;
/// What has become of devices that is kept for people.
const TURNS_MAX: usize = 64;
/// Recovered headers taken in one round.
const RECOVERY_BUDGET: u32 = 128;
/// Blocks that continue stranded ones and are forgotten in one poll, where nothing can be written.
const STRIP_BUDGET: u32 = 256;
/// verify = sampled: one block in this many, by its key.
const SAMPLE: u64 = 16;

/// Whose request it is when an operator asks.
const OPERATOR: u32 = u32::MAX - 1;
/// Sessions whose levels are shown in one round.
const SHOWN_MAX: usize = 64;

/// How a request was answered.
#[derive(Debug, Clone, Copy)]
struct Answer {
    op: Op,
    tag: Tag,
    status: Status,
    key: BlockKey,
    count: u32,
    part: u32,
    /// When it was picked up, if that was not just now.
    began_ns: Option<u64>,
}

/// Consecutive blocks of one request with one fate, on their way into one completion.
struct Run {
    completion: Completion,
}

impl Run {
    fn new(tag: Tag, op: Op) -> Self {
        Self { completion: Completion { last: false, ..Completion::plain(tag, Some(op), Status::Ok) } }
    }

    /// Adds the block at `index`. Gives back the completion that had to be closed for it.
    fn add(&mut self, index: u32, status: Status, grant: Option<Grant>) -> Option<Completion> {
        let open = &mut self.completion;
        let full = open.count as usize == GRANTS_PER_ENTRY && status == Status::Ok;
        // A load skips the blocks that wait for the disk: what comes after them is another run.
        let adjacent = index == open.first + open.count;
        let closed = (open.count > 0 && (open.status != status || full || !adjacent)).then_some(*open);
        if closed.is_some() || open.count == 0 {
            (open.count, open.first, open.status, open.payload) = (0, index, status, [0; GRANTS_PER_ENTRY]);
        }
        if let Some(grant) = grant {
            open.payload[open.count as usize] = grant.to_word();
        }
        open.count += 1;
        closed
    }
}

impl<D: Device> Shard<D> {
    /// A shard over a cache, a pool and devices. Everything it will ever need is allocated here.
    pub fn new(
        cache: Cache,
        pool: Arc<Mapping>,
        devices: Vec<D>,
        options: ShardOptions,
        metrics: Arc<Metrics>,
    ) -> Self {
        let host_slots = cache.host.count();
        let transfers = |device| Transfers::new(device, options.read_depth, options.write_depth, host_slots);
        Self {
            pool,
            devices: devices.into_iter().map(transfers).collect(),
            sessions: (0..SESSIONS_MAX).map(|_| None).collect(),
            live: Vec::with_capacity(SESSIONS_MAX),
            loads: Loads::new(host_slots),
            hungry_count: 0,
            // A block is queued once for each time it becomes resident; the oldest are dropped.
            dirty: VecDeque::with_capacity(host_slots as usize),
            hasher: None,
            metrics,
            stats: None,
            options,
            now_ns: 0,
            requests_count: 0,
            timed_since_ns: None,
            draining: false,
            closing: false,
            shown: 0,
            done: Vec::with_capacity(DEVICE_BUDGET),
            landed: Vec::with_capacity(DEVICE_BUDGET),
            turns: Vec::with_capacity(TURNS_MAX),
            looked_ns: 0,
            patience_from_ns: 0,
            reads: Vec::with_capacity(options.read_depth as usize),
            budget: Budget::new(options.write_bytes_per_day),
            held_back: false,
            scratch: vec![0; checksum::SCRATCH_BYTES].into_boxed_slice(),
            keys: vec![BlockKey::default(); BATCH_BLOCKS_MAX as usize].into_boxed_slice(),
            blocks: vec![BlockId(0); BATCH_BLOCKS_MAX as usize].into_boxed_slice(),
            next_housekeeping_ns: 0,
            next_sweep_ns: 0,
            verifications_left: VERIFICATIONS_MAX,
            requeue_from: 0,
            vacating: None,
            next_move_ns: 0,
            retired: Vec::with_capacity(RECOVERY_BUDGET as usize),
            cache,
        }
    }

    /// All that others may see is shown in this segment from now on.
    pub fn show_in(&mut self, stats: Stats) {
        self.cache.index.recorder = stats.recorder();
        self.stats = Some(stats);
        self.tell_levels();
    }
    /// Nothing is shown from now on: for whoever measures what showing costs.
    pub fn hide(&mut self) {
        self.cache.index.recorder = kvring_ipc::recorder::Recorder::default();
        self.stats = None;
    }
    /// What the disk holds gets and has checksums from now on, or not: for whoever measures what they cost.
    pub fn make_checksums(&mut self, whether: bool) {
        self.options.checksum = whether;
    }

    /// The checksums of write-backs are made beside the shard from now on.
    pub fn hash_beside(&mut self, hasher: Hasher) {
        self.hasher = Some(hasher);
    }
    /// What it was told.
    pub fn options(&self) -> &ShardOptions {
        &self.options
    }
    /// Every session is told that nothing more will come, and is not polled any more. What it holds stays
    /// as it is: this process is about to end.
    pub fn close_sessions(&mut self, state: SessionState) {
        self.closing = true;
        for at in 0..self.live.len() {
            let place = self.live[at];
            let mut from = 0;
            while let Some(load) = self.loads.next_where(from, |load| load.session == Some(place)) {
                self.orphan(load);
                from = load + 1;
            }
            if let Some(session) = self.sessions[place].as_deref_mut() {
                session.ended = true;
                session.close(state);
            }
        }
    }
    /// Says what lies in the slots from `survey.from` on, as many as it has room for.
    pub fn survey(&self, survey: &mut Survey) {
        let Survey { tier, from, found, without_checksum, is_last } = survey;
        let count = match (*tier, &self.cache.disk) {
            (Tier::Host, _) => self.cache.host.count(),
            (Tier::Disk, Some(disk)) => disk.geometry().slots_count(),
            (Tier::Disk, None) => 0,
        };
        let end = count.min(from.saturating_add(found.capacity() as u32));
        for slot in *from..end {
            let Some((_, generation, data_crc)) = self.cache.block_in(*tier, slot) else { continue };
            match data_crc {
                Some(data_crc) => found.push(Surveyed { tier: *tier, slot, generation, data_crc }),
                None => *without_checksum += 1,
            }
        }
        (*from, *is_last) = (end, end == count);
    }

    /// Somebody has found that a block does not match its checksum. If that block still is there, its copy
    /// goes: the pool's after another look, the disk's on his word. Says whether it did.
    pub fn distrust(&mut self, at: Surveyed) -> bool {
        let Some((block, generation, _)) = self.cache.block_in(at.tier, at.slot) else { return false };
        if generation != at.generation {
            return false;
        }
        match at.tier {
            Tier::Host => !self.verify(at.slot, block, at.data_crc),
            Tier::Disk => {
                self.metrics.ssd_checksum_errors_count.add(1);
                let (forgotten, host_slot) = self.cache.distrust_disk(block);
                self.metrics.blocks_forgotten_count.add(u64::from(forgotten));
                if let Some(slot) = host_slot.filter(|_| self.dirty.len() < self.dirty.capacity()) {
                    self.dirty.push_back(Dirty { grant: self.cache.host.grant(slot), block });
                }
                true
            }
        }
    }

    /// What waits to be written stays unwritten: the next engine process finds it in the pool.
    pub fn drop_dirty(&mut self) {
        self.dirty.clear();
        self.cache.index.stranded.clear();
        self.requeue_from = u32::MAX;
    }
    /// The cache, for checks and statistics.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }
    /// Takes no stores from now on, or takes them again.
    pub fn drain(&mut self, on: bool) {
        self.draining = on;
    }
    /// Whether nothing would be lost with the pool: every block that the SSD has room for is there, headers too.
    pub fn is_clean(&self) -> bool {
        let host = &self.cache.host;
        let is_filling = self.is_filling();
        // What an earlier process left in the pool is queued bit by bit, once it is known what the SSD has.
        let is_known = !self.cache.is_recovering() && self.requeue_from >= host.count();
        self.cache.disk.is_some() && is_known && !is_filling && self.dirty.is_empty() && self.is_drained()
    }
    /// Whether any instance has been granted a slot that it has not committed.
    fn is_filling(&self) -> bool {
        self.sessions().any(|session| self.cache.host.filling_count(session.writer.instance) > 0)
    }
    /// Blocks that wait to be written.
    pub fn dirty_count(&self) -> u32 {
        let unseen = if self.requeue_from == u32::MAX { 0 } else { self.cache.host.count() - self.requeue_from };
        let hashing = self.hasher.as_ref().map_or(0, Hasher::pending_count);
        let writing: u32 = self.devices.iter().map(Transfers::writes_count).sum();
        (self.dirty.len() + self.cache.index.stranded.len()) as u32 + unseen + hashing + writing
    }
    /// Has up to `count` blocks leave a tier. Says how many.
    pub fn evict(&mut self, tier: Tier, count: u32) -> u32 {
        self.cache.index.recorder.serves = (OPERATOR, 0);
        let evicted = (0..count).take_while(|_| self.cache.evict(tier)).count() as u32;
        self.tell_levels();
        evicted
    }
    /// Forgets a block and all that continues it. Says how many.
    pub fn forget(&mut self, key: BlockKey) -> u32 {
        self.cache.index.recorder.serves = (OPERATOR, 0);
        let count = self.cache.forget(key);
        self.metrics.blocks_forgotten_count.add(u64::from(count));
        count
    }
    /// Forgets every block. Says how many; `is_reset` says when a restart forgets them too.
    pub fn reset(&mut self) -> u32 {
        self.cache.index.recorder.serves = (OPERATOR, 0);
        let count = self.cache.reset();
        self.metrics.blocks_forgotten_count.add(u64::from(count));
        count
    }
    /// Forgets the blocks of a namespace. Says how many.
    pub fn reset_namespace(&mut self, id: BlockKey) -> u32 {
        self.cache.index.recorder.serves = (OPERATOR, 0);
        let count = self.cache.reset_namespace(id);
        self.metrics.blocks_forgotten_count.add(u64::from(count));
        count
    }
    /// Whether no header from before the last reset is on a device any more.
    pub fn is_reset(&self) -> bool {
        self.cache.disk.as_ref().is_none_or(crate::tier::disk::DiskSlots::is_cleared)
    }
    /// This lies on the disk: its blocks are taken back bit by bit.
    pub fn found_on_disk(&mut self, piece: HeaderPiece) {
        self.cache.found_on_disk(piece);
    }
    /// No more will be found on the disk.
    pub fn disk_was_read(&mut self) {
        self.cache.disk_was_read();
    }
    /// Not all headers of a device could be read.
    pub fn disk_was_not_read(&mut self, device: u32) {
        if let Some(disk) = &mut self.cache.disk {
            disk.is_unread(device);
        }
    }
    /// A session of an engine process that is gone has said that it writes no more (`Goodbye`), or is dead:
    /// the slots that it was granted may be used again, at once or after the grace.
    pub fn end_former(&mut self, session: SessionId, end: End, now_ns: u64) {
        if end == End::Goodbye {
            self.cache.host.end_quarantine_drained(session, now_ns);
        } else {
            self.cache.host.end_quarantine(session, now_ns.saturating_add(self.options.writer_grace_ns));
        }
    }
    /// The devices.
    pub fn devices(&mut self) -> impl Iterator<Item = &mut D> {
        self.devices.iter_mut().map(|transfers| &mut transfers.device)
    }
    /// Lets go of what others wait for: nothing is asked of this shard any more, and what is left of it is memory.
    pub fn close_devices(&mut self) {
        self.devices.retain_mut(|transfers| transfers.device.close_files());
    }
    /// Whether something is in flight that nobody would be woken for.
    pub fn must_poll(&self) -> bool {
        let unheard = |transfers: &Transfers<D>| {
            let waited_for = transfers.device.inflight() > 0 && !transfers.health.is_lost();
            waited_for && transfers.device.wake_fd().is_none()
        };
        self.devices.iter().any(unheard)
    }
    /// The sessions there are.
    pub fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.live.iter().filter_map(|at| self.sessions[*at].as_deref())
    }
    /// Takes the shard apart: a simulated crash keeps the devices.
    pub fn into_devices(self) -> Vec<D> {
        self.devices.into_iter().map(|transfers| transfers.device).collect()
    }

    /// These slots of the pool have pages, and the devices are told of their piece.
    ///
    /// # Errors
    /// A device cannot register the piece.
    pub fn bear(&mut self, piece: u32, slots: std::ops::Range<u32>) -> rustix::io::Result<()> {
        for transfers in &mut self.devices {
            transfers.device.register_piece(piece)?;
        }
        self.cache.host.bear(slots);
        Ok(())
    }

    /// Adds a session. Its id, modulo the limit, is a free place: whoever numbers sessions sees to it.
    pub fn attach(&mut self, session: Box<Session>) {
        let at = session.writer.session.0 as usize % SESSIONS_MAX;
        assert!(self.sessions[at].is_none(), "a session's place is its own");
        self.begin_row(at, &session);
        self.sessions[at] = Some(session);
        self.live.push(at);
        self.divide();
    }

    fn begin_row(&mut self, at: usize, session: &Session) {
        let now_ns = self.now_ns;
        let id = session.writer.session.0;
        self.tally(at, |row| {
            row.iter().for_each(|word| word.store(0, Ordering::Relaxed));
            let set = |column: SessionColumn, value: u64| row[column as usize].store(value, Ordering::Relaxed);
            set(SessionColumn::Session, u64::from(id));
            set(SessionColumn::InstanceId, u64::from(session.instance_id));
            set(SessionColumn::Pid, u64::from(session.pid));
            set(SessionColumn::Rank, u64::from(session.writer.rank));
            set(SessionColumn::AttachedNs, now_ns);
            set(SessionColumn::Live, 1);
        });
        let recorder = &mut self.cache.index.recorder;
        recorder.record(Entry { session: id, count: session.pid, ..Entry::plain(What::Attached, now_ns) });
    }

    /// Does something with a session's row, if anybody can see it.
    fn tally(&self, at: usize, tell: impl FnOnce(&[AtomicU64])) {
        if let Some(stats) = &self.stats {
            tell(stats.session(at));
        }
    }

    /// A request was answered in full: `part` of its `count` blocks were served.
    fn answered(&mut self, at: usize, answer: Answer) {
        let Some(stats) = &self.stats else { return };
        let Answer { op, tag, status, key, count, part, began_ns } = answer;
        let took_ns = match (began_ns, self.timed_since_ns) {
            (Some(began_ns), _) => self.now_ns.saturating_sub(began_ns),
            (None, Some(since_ns)) => (self.options.clock)().saturating_sub(since_ns),
            (None, None) => 0,
        };
        let session = self.sessions[at].as_ref().map_or(u32::MAX, |session| session.writer.session.0);
        let at_ns = self.now_ns;
        let row = stats.session(at);
        let add = |column: SessionColumn, count: u32| stats::add(&row[column as usize], u64::from(count));
        match op {
            Op::Match => {
                add(SessionColumn::Matches, 1);
                add(SessionColumn::BlocksRequested, count);
                add(SessionColumn::BlocksHit, part);
            }
            Op::Load => {
                add(SessionColumn::Loads, 1);
                stats::add(&row[SessionColumn::LoadNsSum as usize], took_ns);
                let max = &row[SessionColumn::LoadNsMax as usize];
                max.store(max.load(Ordering::Relaxed).max(took_ns), Ordering::Relaxed);
                stats::add(&row[SESSION_HISTOGRAM + stats::session_bucket(took_ns)], 1);
            }
            _ => {}
        }
        let entry = Entry {
            op: op as u8,
            status: status as u8,
            session,
            tag: tag.0,
            key,
            count,
            part,
            took_ns,
            ..Entry::plain(What::Answered, at_ns)
        };
        self.cache.index.recorder.record(entry);
    }

    /// Each user may use an equal part of the pool at once, and each of his instances an equal part of that: what one
    /// holds, the others do not need. Who invents instances divides what is his.
    fn divide(&mut self) {
        let users = (0..self.live.len()).filter(|nth| self.is_first(*nth, |session| session.user)).count();
        for nth in 0..self.live.len() {
            if !self.is_first(nth, |session| session.user) {
                continue;
            }
            let Some(user) = self.nth(nth).map(|session| session.user) else { continue };
            let his = |nth: &usize| self.nth(*nth).is_some_and(|session| session.user == user);
            let is_first = |nth: &usize| self.is_first(*nth, |session| session.writer.instance);
            let instances = (0..self.live.len()).filter(his).filter(is_first).count();
            for session in self.sessions.iter_mut().flatten().filter(|session| session.user == user) {
                session.sharers = (users * instances) as u32;
            }
        }
    }

    fn nth(&self, nth: usize) -> Option<&Session> {
        self.sessions[self.live[nth]].as_deref()
    }

    /// Whether no session before it has the same.
    fn is_first(&self, nth: usize, what: impl Fn(&Session) -> u32) -> bool {
        let its = self.nth(nth).map(&what);
        !(0..nth).any(|other| self.nth(other).map(&what) == its)
    }

    /// Whether a session may have another lease: while there are plenty, anybody may.
    fn may_lease(&self, at: usize) -> bool {
        let count = self.cache.leases.count();
        let Some(session) = self.sessions[at].as_deref().filter(|_| count > LEASES_MAX / 2) else { return true };
        let its = self.sessions().filter(|other| other.writer.instance == session.writer.instance);
        let held: u32 = its.map(|other| self.cache.leases.held(other.writer.session)).sum();
        held < LEASES_MAX as u32 / session.sharers.max(2)
    }

    /// Slots that an instance may still take into use.
    fn share_left(&self, instance: u32) -> u32 {
        let its = || self.sessions().filter(|session| session.writer.instance == instance);
        let sharers = its().map(|session| session.sharers).max().unwrap_or(1);
        let share = (self.cache.host.count() / sharers).max(SHARE_SLOTS_MIN);
        let loaned: u32 = its().map(|session| self.cache.leases.loaned(session.writer.session)).sum();
        share.saturating_sub(loaned + self.cache.host.filling_count(instance))
    }

    /// Ends a session. With `Goodbye` and `Dead` it is given back, for its memory to be let go.
    pub fn end(&mut self, id: SessionId, end: End, now_ns: u64) -> Option<Box<Session>> {
        let at = id.0 as usize % SESSIONS_MAX;
        if self.sessions[at].as_ref().is_none_or(|session| session.writer.session != id) {
            return None;
        }
        self.take_back(at, end == End::Goodbye);
        if end == End::Suspect {
            return None;
        }
        // A goodbye of a session that ended before (it was poisoned) is worth a death, not more.
        let free_at_ns = now_ns.saturating_add(self.options.writer_grace_ns);
        self.cache.host.end_quarantine(id, free_at_ns);
        if end == End::Dead {
            self.metrics.sessions_gone_count.add(1);
        }
        self.live.retain(|live| *live != at);
        let ended = self.sessions[at].take();
        self.tally(at, |row| row[SessionColumn::Live as usize].store(0, Ordering::Relaxed));
        let recorder = &mut self.cache.index.recorder;
        recorder.record(Entry { session: id.0, detail: end as u8, ..Entry::plain(What::Ended, now_ns) });
        self.divide();
        ended
    }

    /// Takes back what a session holds, once.
    fn take_back(&mut self, at: usize, drained: bool) {
        let Some(session) = self.sessions[at].as_deref_mut() else { return };
        self.cache.index.recorder.serves = (session.writer.session.0, 0);
        if std::mem::replace(&mut session.ended, true) {
            return;
        }
        let Writer { session: id, instance, .. } = session.writer;
        let mut others = self.sessions.iter().flatten();
        let heir = others.find(|other| !other.ended && other.writer.instance == instance);
        let heir = heir.map(|other| other.writer.session);
        let mut from = 0;
        while let Some(load) = self.loads.next_where(from, |load| load.session == Some(at)) {
            self.orphan(load);
            from = load + 1;
        }
        let lost = self.cache.end_session(id, drained, heir);
        self.metrics.abort_blocks_count.add(u64::from(lost));
    }

    /// Nobody is left to answer: the load ends when its last read does.
    fn orphan(&mut self, at: u32) {
        let load = self.loads.get(at);
        load.session = None;
        let unstarted = load.count - load.next;
        self.hungry_count -= u32::from(unstarted > 0);
        load.next = load.count;
        load.answered += unstarted;
        if load.answered == load.count {
            self.loads.end(at);
        }
    }

    /// Does at most one budget of everything. Says how much was done: 0 is idle.
    pub fn poll(&mut self, now_ns: u64) -> u32 {
        let mut work = 0;
        self.is_now(now_ns);
        self.verifications_left = VERIFICATIONS_MAX;
        // Those that wait are older than those that come.
        if self.hungry_count > 0 {
            self.feed_hungry(now_ns);
        }
        for i in 0..self.live.len() {
            work += self.poll_session(self.live[i], now_ns);
        }
        work += self.recover();
        work += self.move_out();
        for device in 0..self.devices.len() {
            work += self.poll_device(device, now_ns);
        }
        if self.hungry_count > 0 {
            self.feed_hungry(now_ns);
        }
        work += VERIFICATIONS_MAX - self.verifications_left;
        work += self.start_writes();
        for device in 0..self.devices.len() {
            work += self.start_transfers(device);
        }
        if now_ns >= self.next_housekeeping_ns {
            self.next_housekeeping_ns = now_ns + HOUSEKEEPING_NS;
            self.keep_house(now_ns);
        }
        for i in 0..self.live.len() {
            if let Some(session) = self.sessions[self.live[i]].as_deref_mut()
                && !session.ended
            {
                session.publish();
            }
        }
        work
    }

    /// The control plane tells something: the round before it may be long past.
    pub fn is_told(&mut self, now_ns: u64) {
        self.is_now(now_ns.max(self.now_ns));
    }

    fn serves_nobody(&mut self) {
        self.cache.index.recorder.serves = (u32::MAX, 0);
    }

    /// A load is worth the look: what it took is known to more than a round.
    fn look_at_the_clock(&mut self) {
        if self.stats.is_some() {
            let serves = self.cache.index.recorder.serves;
            self.is_now((self.options.clock)().max(self.now_ns));
            self.cache.index.recorder.serves = serves;
        }
    }

    fn is_now(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        self.cache.index.recorder.now_ns = now_ns;
        // What is not done for a request is done for nobody.
        self.cache.index.recorder.serves = (u32::MAX, 0);
        for transfers in &mut self.devices {
            transfers.now_ns = now_ns;
        }
    }

    fn recover(&mut self) -> u32 {
        self.serves_nobody();
        if self.cache.is_recovering() {
            let count = self.cache.recover_some(RECOVERY_BUDGET);
            self.metrics.ssd_recovered_blocks_count.set(u64::from(self.cache.recovery.recovered.disk));
            return count;
        }
        let host_slots = if self.cache.disk.is_some() { self.cache.host.count() } else { 0 };
        let from = self.requeue_from;
        let end = host_slots.min(from.saturating_add(RECOVERY_BUDGET));
        self.requeue_from = from.max(end);
        for slot in from..end {
            let Some((block, ..)) = self.cache.block_in(Tier::Host, slot) else { continue };
            let on_disk = self.cache.index.block(block).place(Tier::Disk) != Place::Absent;
            if !on_disk && self.dirty.len() < self.dirty.capacity() {
                self.dirty.push_back(Dirty { grant: self.cache.host.grant(slot), block });
            }
        }
        end.saturating_sub(from)
    }

    /// Only the first so many slots of the pool are used from now on: what lies behind them is moved bit by bit, at the price
    /// of what the policy would take next. `None`: all are used again.
    pub fn vacate(&mut self, slots: Option<u32>) {
        self.vacating = slots.map(|slots| (slots, slots));
        self.next_move_ns = 0;
        match slots {
            Some(slots) => self.cache.host.close_from(slots),
            None => self.cache.host.open_all(),
        }
    }
    /// Whether nothing lies there any more, but what is in quarantine.
    pub fn is_vacated(&self) -> bool {
        self.cache.host.closed_busy_count() == 0
    }
    /// Slots of the SSD that are not used any more since it was asked last.
    pub fn take_retired(&mut self) -> impl Iterator<Item = u32> {
        self.retired.drain(..)
    }

    /// Empties slots that are not to be used any more, in both tiers.
    fn move_out(&mut self) -> u32 {
        self.serves_nobody();
        let is_vacating = self.vacating.is_some() && !self.is_vacated();
        let retires = self.cache.disk.as_ref().is_some_and(DiskSlots::has_too_many);
        if !is_vacating && !retires || self.now_ns < self.next_move_ns {
            return 0;
        }
        let mut count = 0;
        if retires {
            count += self.retire_disk();
        }
        if is_vacating {
            count += self.vacate_some();
        }
        if count == 0 {
            self.next_move_ns = self.now_ns + HOUSEKEEPING_NS;
        }
        count
    }

    fn retire_disk(&mut self) -> u32 {
        let (mut count, mut in_vain) = (0, 0);
        while self.retired.len() < self.retired.capacity() && count < RECOVERY_BUDGET {
            match self.cache.disk.as_mut().and_then(DiskSlots::retire) {
                Some(slot) => {
                    self.retired.push(slot);
                    (count, in_vain) = (count + 1, 0);
                }
                // What goes may have lain on a device that has not too many: not all of those for one that cannot now.
                None if in_vain < 8 * self.devices.len()
                    && self.cache.disk.as_ref().is_some_and(DiskSlots::has_too_many)
                    && self.cache.evict(Tier::Disk) =>
                {
                    in_vain += 1;
                }
                None => break,
            }
        }
        count
    }

    /// Says how many blocks were moved; none after a walk over all of them in which nothing could be.
    fn vacate_some(&mut self) -> u32 {
        let Some((first, from)) = self.vacating else { return 0 };
        let end = self.cache.host.count().min(from.saturating_add(RECOVERY_BUDGET));
        let (mut moved, mut at) = (0, from);
        while at < end && u64::from(moved) * self.options.slot_bytes < MOVED_BYTES {
            let slot = at;
            at += 1;
            let Some((block, ..)) = self.cache.block_in(Tier::Host, slot) else { continue };
            let (pool, bytes) = (&self.pool, self.options.slot_bytes as usize);
            let copy = |from: u32, to: u32| pool.copy_within(from as usize * bytes, to as usize * bytes, bytes);
            let Some(grant) = self.cache.move_host(slot, block, copy) else { continue };
            moved += 1;
            // Where it lay it was queued under another name.
            let on_disk = self.cache.index.block(block).place(Tier::Disk) != Place::Absent;
            if self.cache.disk.is_some() && !on_disk && self.dirty.len() < self.dirty.capacity() {
                self.dirty.push_back(Dirty { grant, block });
            }
        }
        let is_round = at >= self.cache.host.count();
        self.vacating = Some((first, if is_round { first } else { at }));
        // The rest of a walk goes on at once; the next one when somebody may have let something go.
        if is_round { moved } else { moved.max(1) }
    }

    fn poll_session(&mut self, at: usize, now_ns: u64) -> u32 {
        let mut count = 0;
        while count < SESSION_BUDGET {
            match self.poll_submission(at, now_ns) {
                Ok(true) => count += 1,
                Ok(false) => break,
                Err(Poisoned { .. }) => {
                    self.poison(at);
                    break;
                }
            }
        }
        count
    }

    fn poison(&mut self, at: usize) {
        if let Some(session) = self.sessions[at].as_deref_mut() {
            session.close(SessionState::Poisoned);
        }
        self.metrics.sessions_poisoned_count.add(1);
        // Its process lives and may be writing: its slots wait until it is dead.
        self.take_back(at, false);
    }

    /// Answers or starts one request. False: none is there, or there is no room for its answer.
    fn poll_submission(&mut self, at: usize, now_ns: u64) -> Result<bool, Poisoned> {
        let Some(session) = self.sessions[at].as_deref_mut() else { return Ok(false) };
        if session.ended {
            return Ok(false);
        }
        let Some(entry) = session.submissions.peek()? else { return Ok(false) };
        let (tag, parsed) = Submission::parse(&entry, kvring_ipc::segment::ARENA_BYTES);
        let parsed = parsed.and_then(|submission| {
            let moves = matches!(submission.op(), Op::Load | Op::Reserve | Op::Commit | Op::Abort);
            if moves && !session.moves_blocks { Err(Status::BadRequest) } else { Ok(submission) }
        });
        let submission = match parsed {
            Ok(submission) => submission,
            Err(status) => {
                if !session.promise(1)? {
                    return Ok(false);
                }
                session.submissions.take();
                session.complete(&Completion::plain(tag, None, status));
                return Ok(true);
            }
        };
        if let Submission::Load { .. } = submission
            && (!self.loads.has_room() || session.loads_count == LOADS_PER_SESSION_MAX)
        {
            return Ok(false);
        }
        let rooms = submission.completions_max();
        if !session.promise(rooms)? {
            return Ok(false);
        }
        session.submissions.take();
        let op = submission.op();
        if let Some(stats) = &self.stats {
            stats.session(at)[SessionColumn::LastRequestNs as usize].store(now_ns, Ordering::Relaxed);
        }
        self.cache.index.recorder.serves = (session.writer.session.0, tag.0);
        self.requests_count += 1;
        let is_timed = self.stats.is_some() && self.requests_count.is_multiple_of(SERVICE_SAMPLE);
        self.timed_since_ns = is_timed.then(|| (self.options.clock)());
        match submission {
            Submission::Ping => {
                let payload = [(self.options.clock)(), 0, 0, 0, 0, 0];
                session.complete(&Completion { payload, ..Completion::plain(tag, Some(Op::Ping), Status::Ok) });
            }
            Submission::Match { keys } => self.answer_match(at, tag, keys, now_ns),
            Submission::Release { lease } => {
                let released = self.cache.release(lease, session.writer.instance);
                let status = if released { Status::Ok } else { Status::Stale };
                session.complete(&Completion::plain(tag, Some(Op::Release), status));
            }
            Submission::Load { lease, first, keys } => self.begin_load(at, tag, lease, first, keys, now_ns),
            Submission::Prefetch { lease, first, count } => self.answer_prefetch(at, tag, lease, first, count),
            Submission::Reserve { parent, first, keys } => self.answer_reserve(at, tag, parent, first, keys),
            Submission::Commit { grants } => self.answer_commit(at, tag, grants),
            Submission::Abort { grants } => self.answer_abort(at, tag, grants),
            Submission::Cancel { target } => self.answer_cancel(at, tag, target, now_ns),
        }
        if let (Some(since_ns), Some(stats)) = (self.timed_since_ns.take(), &self.stats) {
            let histogram = match op {
                Op::Match => ShardHistogram::ServiceMatch,
                Op::Load => ShardHistogram::ServiceLoad,
                Op::Reserve => ShardHistogram::ServiceReserve,
                Op::Commit => ShardHistogram::ServiceCommit,
                _ => ShardHistogram::ServiceOther,
            };
            let took_ns = (self.options.clock)().saturating_sub(since_ns);
            stats.histogram(histogram as usize).record(took_ns);
        }
        Ok(true)
    }

    fn answer_match(&mut self, at: usize, tag: Tag, keys: Span, now_ns: u64) {
        let may = self.may_lease(at);
        let Some(session) = self.sessions[at].as_deref_mut() else { return };
        let expires_at_ns = now_ns + self.options.lease_ttl_ns;
        // Bisection reads few of the keys: they are copied out one by one, each once.
        let segment = &session.segment;
        let writer = session.writer;
        let key_at = |i| segment.read_key(keys, i);
        let matched = match may {
            true => self.cache.match_chain(keys.count, key_at, writer.session, writer.instance, expires_at_ns),
            false => Err(Status::Quota),
        };
        self.metrics.matches_count.add(1);
        self.metrics.match_blocks_requested_count.add(u64::from(keys.count));
        let mut completion = Completion::plain(tag, Some(Op::Match), Status::Ok);
        match matched {
            Ok(Some((lease, count))) => {
                completion.count = count;
                completion.payload[0] = lease.0;
                completion.payload[1] = expires_at_ns;
                self.metrics.match_blocks_hit_count.add(u64::from(count));
            }
            Ok(None) => {}
            Err(status) => completion.status = status,
        }
        // What was missing, or what was there.
        let named = if completion.count < keys.count { completion.count } else { 0 };
        let key = if self.stats.is_some() { session.segment.read_key(keys, named) } else { BlockKey::default() };
        session.complete(&completion);
        let (status, part) = (completion.status, completion.count);
        self.answered(at, Answer { op: Op::Match, tag, status, key, count: keys.count, part, began_ns: None });
    }

    fn begin_load(&mut self, at: usize, tag: Tag, lease: LeaseId, first: u32, keys: Span, now_ns: u64) {
        let Some(session) = self.sessions[at].as_deref_mut() else { return };
        let count = keys.count as usize;
        for (i, key) in (0..).zip(&mut self.keys[..count]) {
            *key = session.segment.read_key(keys, i);
        }
        let instance = session.writer.instance;
        let covered =
            self.cache.leased_blocks(lease, instance, first, Some(&self.keys[..count]), &mut self.blocks[..count]);
        self.metrics.loads_count.add(1);
        if let Err(status) = covered {
            session.complete(&Completion { count: keys.count, ..Completion::plain(tag, Some(Op::Load), status) });
            session.give_back(keys.count - 1);
            let (key, count) = (self.keys[0], keys.count);
            self.answered(at, Answer { op: Op::Load, tag, status, key, count, part: 0, began_ns: None });
            return;
        }
        session.loads_count += 1;
        self.look_at_the_clock();
        let deadline_ns = now_ns + self.options.load_wait_ns;
        let (began_ns, key) = (self.now_ns, self.keys[0]);
        let asked = Asked { tag, session: at, lease, instance, first, began_ns, key, deadline_ns };
        let load = self.loads.begin(asked, &self.blocks[..count]);
        self.hungry_count += 1;
        self.advance_load(load, now_ns);
    }

    /// Starts or answers as many blocks of a load as can be now. On entry it counts as hungry.
    fn advance_load(&mut self, at: u32, now_ns: u64) {
        let load = *self.loads.get(at);
        if let Some(session) = load.session.and_then(|at| self.sessions[at].as_deref()) {
            self.cache.index.recorder.serves = (session.writer.session.0, load.tag.0);
        }
        let mut run = Run::new(load.tag, Op::Load);
        let current = self.cache.leases.cover(load.lease, load.instance).is_some();
        let mut share_left = self.share_left(load.instance);
        let mut next = load.next;
        while next < load.count {
            let (index, block) = (next, load.blocks[next as usize]);
            let waiter = Waiter { load: at, index };
            // Without its lease the block may be another by now: not even looked at.
            let found = if current && !load.cancelled { Some(self.cache.find(block)) } else { None };
            let uses_a_slot = !matches!(found, None | Some(Found::Gone));
            let (status, grant) = match found {
                // Its share of the pool is in use: others need the rest.
                Some(_) if uses_a_slot && share_left == 0 => (Status::Busy, None),
                None if load.cancelled => (Status::Cancelled, None),
                None => (Status::Stale, None),
                Some(Found::Gone) => (Status::Miss, None),
                Some(Found::Ready(slot)) => match self.verified(slot, block) {
                    None if now_ns >= load.deadline_ns => (Status::Busy, None),
                    None => break,
                    // Its other copy may be good.
                    Some(false) => continue,
                    Some(true) => match self.cache.loan(load.lease, load.instance, load.first + index, block) {
                        Some(grant) => {
                            share_left -= 1;
                            (Status::Ok, Some(grant))
                        }
                        None => (Status::Busy, None),
                    },
                },
                Some(Found::Reading(slot)) => {
                    self.metrics.load_blocks_coalesced_count.add(1);
                    self.loads.wait(slot, waiter);
                    share_left -= 1;
                    next += 1;
                    continue;
                }
                Some(Found::OnDisk) => match self.begin_read(block) {
                    Some(slot) => {
                        self.loads.wait(slot, waiter);
                        share_left -= 1;
                        next += 1;
                        continue;
                    }
                    None if now_ns >= load.deadline_ns => (Status::Busy, None),
                    None => break,
                },
            };
            next += 1;
            match status {
                Status::Ok => self.metrics.load_blocks_dram_count.add(1),
                _ => self.metrics.load_blocks_miss_count.add(1),
            }
            self.tell_loaded(load.session, load.tag, block, status, SessionColumn::LoadedDram);
            if let Some(closed) = run.add(index, status, grant) {
                self.answer_load(at, closed);
            }
        }
        self.loads.get(at).next = next;
        self.hungry_count -= u32::from(next == load.count);
        if run.completion.count > 0 {
            self.answer_load(at, run.completion);
        }
    }

    /// A block of a load was answered.
    fn tell_loaded(&mut self, at: Option<usize>, tag: Tag, block: BlockId, status: Status, from: SessionColumn) {
        let (Some(stats), Some(at)) = (&self.stats, at) else { return };
        let column = if status == Status::Ok { from } else { SessionColumn::Missed };
        stats::add(&stats.session(at)[column as usize], 1);
        let session = self.sessions[at].as_ref().filter(|_| status != Status::Ok);
        if let Some(session) = session.map(|session| session.writer.session.0) {
            // Without its lease the block may be another by now.
            let unseen = matches!(status, Status::Stale | Status::Cancelled);
            let key = if unseen { BlockKey::default() } else { self.cache.index.key_of(block) };
            let (tag, detail) = (tag.0, status as u8);
            let at_ns = self.now_ns;
            let entry = Entry { session, tag, key, detail, ..Entry::plain(What::Missed, at_ns) };
            self.cache.index.recorder.record(entry);
        }
    }

    /// Whether a block in the pool is what was stored, as far as it is to be asked. `None`: not in this round.
    fn verified(&mut self, slot: u32, block: BlockId) -> Option<bool> {
        let host = &self.cache.host;
        let Some(expected) = host.crc(slot) else { return Some(true) };
        let asked = host.is_doubted(slot) && self.options.verify != Verify::Off || self.is_verified_always(block);
        if !asked {
            return Some(true);
        }
        self.verifications_left = self.verifications_left.checked_sub(1)?;
        Some(self.verify(slot, block, expected))
    }

    /// Makes the checksum of what a host slot holds; should it not be this one, lets that copy go.
    fn verify(&mut self, slot: u32, block: BlockId, expected: u64) -> bool {
        let sound = self.checksum_of(slot) == expected;
        self.metrics.dram_verified_blocks_count.add(1);
        if sound {
            self.cache.host.trust(slot);
        } else {
            self.metrics.dram_checksum_errors_count.add(1);
            let forgotten = self.cache.distrust(slot, block);
            self.metrics.blocks_forgotten_count.add(u64::from(forgotten));
        }
        sound
    }

    /// Whether every use of this block in the pool is verified, so that its checksum is made with its commit.
    fn is_verified_always(&self, block: BlockId) -> bool {
        match self.options.verify {
            Verify::Off | Verify::Crash => false,
            Verify::Sampled => self.cache.index.block(block).key.to_words()[0].is_multiple_of(SAMPLE),
            Verify::Always => true,
        }
    }

    fn checksum_of(&mut self, host_slot: u32) -> u64 {
        let (offset, bytes) = (self.offset_of(host_slot), self.options.slot_bytes as usize);
        checksum::of_mapping(&self.pool, offset, bytes, &mut self.scratch)
    }

    /// Sends one completion of a load, and ends the load with its last.
    fn answer_load(&mut self, at: u32, mut completion: Completion) {
        let load = self.loads.get(at);
        load.answered += completion.count;
        load.from_disk |= completion.from_disk;
        if completion.status == Status::Ok {
            load.served += completion.count;
        } else {
            load.failed = completion.status;
        }
        completion.last = load.answered == load.count;
        let ended = *load;
        let session = load.session.and_then(|index| self.sessions[index].as_deref_mut());
        if let Some(session) = session {
            session.complete(&completion);
            load.rooms -= 1;
            if completion.last {
                session.give_back(load.rooms);
                session.loads_count -= 1;
            }
        }
        if completion.last {
            self.loads.end(at);
            self.tell_load(&ended);
        }
    }

    fn tell_load(&mut self, load: &load::Load) {
        self.look_at_the_clock();
        let Some(stats) = &self.stats else { return };
        let tier = if load.from_disk { ShardHistogram::LoadSsd } else { ShardHistogram::LoadDram };
        stats.histogram(tier as usize).record(self.now_ns.saturating_sub(load.began_ns));
        let Some(at) = load.session else { return };
        let status = if load.served == load.count { Status::Ok } else { load.failed };
        let (op, tag, key, began_ns) = (Op::Load, load.tag, load.key, Some(load.began_ns));
        self.answered(at, Answer { op, tag, status, key, count: load.count, part: load.served, began_ns });
    }

    /// Queues the read of a block that is on the disk only. The host slot it goes to, if there is one.
    fn begin_read(&mut self, block: BlockId) -> Option<u32> {
        let (host_slot, disk_slot) = self.cache.begin_read(block)?;
        let io = self.io(Direction::Read, host_slot, disk_slot);
        let device = self.device_of(disk_slot);
        self.devices[device].queue_read(Purpose::Read { block, host_slot, disk_slot }, io);
        Some(host_slot)
    }

    fn device_of(&self, disk_slot: u32) -> usize {
        self.cache.disk.as_ref().map_or(0, |disk| disk.geometry().device_of(disk_slot))
    }

    fn io(&self, direction: Direction, host_slot: u32, disk_slot: u32) -> Io {
        let place = self.cache.disk.as_ref().map(|disk| disk.geometry().offset_of(disk_slot));
        let (file, offset_in_file) = place.unwrap_or_default();
        Io {
            tag: 0,
            direction,
            file,
            offset_in_file,
            region: Region::Pool,
            offset_in_region: self.offset_of(host_slot),
            bytes: self.options.slot_bytes as u32,
        }
    }

    fn offset_of(&self, host_slot: u32) -> usize {
        host_slot as usize * self.options.slot_bytes as usize
    }

    /// Loads whose blocks wait for a slot: oldest place first, until slots run out.
    fn feed_hungry(&mut self, now_ns: u64) {
        let mut from = 0;
        while let Some(at) = self.loads.next_where(from, |load| load.next < load.count) {
            self.advance_load(at, now_ns);
            from = at + 1;
        }
    }

    fn answer_prefetch(&mut self, at: usize, tag: Tag, lease: LeaseId, first: u32, count: u32) {
        let Some(session) = self.sessions[at].as_deref() else { return };
        let instance = session.writer.instance;
        let mut started = 0;
        let blocks = &mut self.blocks[..count as usize];
        let status = self.cache.leased_blocks(lease, instance, first, None, blocks).err().unwrap_or(Status::Ok);
        if status == Status::Ok {
            for i in 0..count as usize {
                // Best effort: without a slot, or with much ahead of it, the load will read it.
                let ahead = self.devices.iter().any(|device| device.reads_waiting() > PREFETCH_AHEAD_MAX);
                let block = self.blocks[i];
                if !ahead && self.cache.find(block) == Found::OnDisk && self.begin_read(block).is_some() {
                    started += 1;
                }
            }
        }
        let payload = [started, 0, 0, 0, 0, 0];
        if let Some(session) = self.sessions[at].as_deref_mut() {
            session.complete(&Completion { payload, ..Completion::plain(tag, Some(Op::Prefetch), status) });
        }
    }

    fn answer_reserve(&mut self, at: usize, tag: Tag, parent: BlockKey, first: u32, keys: Span) {
        let Some(session) = self.sessions[at].as_deref() else { return };
        let instance = session.writer.instance;
        // Those it fills already are counted as it goes: a rank that joins another takes no slot.
        let may_fill = self.share_left(instance) + self.cache.host.filling_count(instance);
        let Some(session) = self.sessions[at].as_deref_mut() else { return };
        let mut rooms = keys.count;
        let mut run = Run::new(tag, Op::Reserve);
        let mut parent = self.cache.parent(parent, first);
        let mut next_key = session.segment.read_key(keys, 0);
        let (first_key, mut granted, mut present) = (next_key, 0, 0);
        for index in 0..keys.count {
            let key = next_key;
            if index + 1 < keys.count {
                next_key = session.segment.read_key(keys, index + 1);
                self.cache.index.prefetch(next_key);
            }
            // A drain takes no slot; what is there is there, and ranks finish what others have begun.
            let may_take = self.cache.host.filling_count(instance) < may_fill && !self.draining;
            let (reserve, block) = match parent {
                Ok(parent) => self.cache.reserve(key, parent, first + index, session.writer, may_take),
                Err(NoParent) => (Reserve::Dropped, None),
            };
            if reserve == Reserve::Dropped {
                let why = match parent {
                    Ok(_) if self.draining => Refusal::Draining,
                    Ok(_) => Refusal::NoRoom,
                    Err(NoParent) => Refusal::NoParent,
                };
                self.cache.index.recorder.block(What::Dropped, key, why as u8, 0);
            }
            // What follows a block that is not there has no parent.
            parent = block.map(Parent::Block).ok_or(NoParent);
            let (status, grant) = match reserve {
                Reserve::Slot(grant) => (Status::Ok, Some(grant)),
                Reserve::Present => (Status::Present, None),
                Reserve::Dropped => (Status::Dropped, None),
            };
            granted += u32::from(status == Status::Ok);
            present += u32::from(status == Status::Present);
            if let Some(closed) = run.add(index, status, grant) {
                session.complete(&closed);
                rooms -= 1;
            }
        }
        let dropped = keys.count - granted - present;
        self.metrics.reserve_blocks_count.add(granted.into());
        self.metrics.reserve_blocks_present_count.add(present.into());
        self.metrics.reserve_blocks_dropped_count.add(dropped.into());
        if let Some(stats) = &self.stats {
            let row = stats.session(at);
            stats::add(&row[SessionColumn::Reserved as usize], granted.into());
            stats::add(&row[SessionColumn::Present as usize], present.into());
            stats::add(&row[SessionColumn::Dropped as usize], dropped.into());
        }
        let completion = Completion { last: true, ..run.completion };
        session.complete(&completion);
        session.give_back(rooms - 1);
        let (key, status, count) = (first_key, completion.status, keys.count);
        self.answered(at, Answer { op: Op::Reserve, tag, status, key, count, part: granted, began_ns: None });
    }

    fn answer_commit(&mut self, at: usize, tag: Tag, grants: Span) {
        let (mut taken, mut complete) = (0, 0);
        for index in 0..grants.count {
            let Some(session) = self.sessions[at].as_deref_mut() else { return };
            let grant = session.segment.read_grant(grants, index);
            let Ok(block) = self.cache.commit(grant, session.writer) else { continue };
            taken += 1;
            let Some(block) = block else { continue };
            complete += 1;
            let key = self.cache.index.key_of(block);
            self.cache.index.recorder.block(What::Stored, key, 0, 0);
            if self.is_verified_always(block) {
                let data_crc = self.checksum_of(grant.slot);
                self.cache.set_host_crc(grant.slot, block, data_crc);
            }
            if self.cache.disk.is_some() {
                if self.dirty.len() == self.dirty.capacity() {
                    self.dirty.pop_front();
                }
                self.dirty.push_back(Dirty { grant, block });
            }
        }
        self.metrics.commit_blocks_count.add(complete);
        self.tally(at, |row| stats::add(&row[SessionColumn::Committed as usize], complete));
        let payload = [taken, 0, 0, 0, 0, 0];
        let status = if taken == u64::from(grants.count) { Status::Ok } else { Status::Stale };
        if let Some(session) = self.sessions[at].as_deref_mut() {
            session.complete(&Completion { payload, ..Completion::plain(tag, Some(Op::Commit), status) });
        }
        let (key, count) = (BlockKey::default(), grants.count);
        self.answered(at, Answer { op: Op::Commit, tag, status, key, count, part: taken as u32, began_ns: None });
    }

    fn answer_abort(&mut self, at: usize, tag: Tag, grants: Span) {
        let Some(session) = self.sessions[at].as_deref_mut() else { return };
        let mut taken = 0;
        for index in 0..grants.count {
            let grant = session.segment.read_grant(grants, index);
            let aborted = self.cache.abort(grant, session.writer);
            taken += u64::from(aborted);
        }
        self.metrics.abort_blocks_count.add(taken);
        let status = if taken == u64::from(grants.count) { Status::Ok } else { Status::Stale };
        session.complete(&Completion::plain(tag, Some(Op::Abort), status));
    }

    fn answer_cancel(&mut self, at: usize, tag: Tag, target: Tag, now_ns: u64) {
        let found = self.loads.next_where(0, |load| load.session == Some(at) && load.tag == target);
        if let Some(load) = found {
            let load_ref = self.loads.get(load);
            load_ref.cancelled = true;
            if load_ref.next < load_ref.count {
                self.advance_load(load, now_ns);
            }
        }
        let status = if found.is_some() { Status::Ok } else { Status::Stale };
        if let Some(session) = self.sessions[at].as_deref_mut() {
            session.complete(&Completion::plain(tag, Some(Op::Cancel), status));
        }
    }

    fn poll_device(&mut self, at: usize, now_ns: u64) -> u32 {
        let mut done = std::mem::take(&mut self.done);
        self.devices[at].device.poll(now_ns, DEVICE_BUDGET, &mut done);
        let count = done.len() as u32;
        if count > 0 && self.stats.is_some() {
            // What a device took is known to more than a round.
            self.is_now((self.options.clock)().max(now_ns));
        }
        let mut landed = std::mem::take(&mut self.landed);
        landed.extend(done.drain(..).filter_map(|done| self.devices[at].land(done)));
        self.done = done;
        // The device gets its next work before what it brought is checked: a checksum takes longer
        // than a submission, and meanwhile it would idle.
        if !self.devices[at].health.is_lost() {
            self.devices[at].start_waiting();
            self.devices[at].device.flush();
        }
        for landed in landed.drain(..) {
            self.end_transfer(at, &landed);
            match self.devices[at].health.ended(landed.good, self.now_ns) {
                Turn::None => self.hold_back_if_lost(at),
                Turn::Lost => self.device_is_lost(at),
                Turn::Back => self.device_is_back(at),
            }
        }
        self.landed = landed;
        self.metrics.ssd_short_count.add(std::mem::take(&mut self.devices[at].short_count));
        count
    }

    fn end_transfer(&mut self, at: usize, landed: &Landed) {
        match landed.purpose {
            Purpose::Read { block, host_slot, disk_slot } => {
                self.end_read(at, landed, block, host_slot, disk_slot);
            }
            Purpose::Write { block } => {
                self.serves_nobody();
                self.tell_moved(at, landed, What::Written, block, landed.good);
                self.end_write(block, landed.good);
            }
            Purpose::Header { sector } => {
                self.metrics.ssd_header_writes_count.add(1);
                if let Some(stats) = &self.stats {
                    stats::add(&stats.device(at)[DeviceColumn::HeaderWrites as usize], 1);
                }
                if !landed.good {
                    self.metrics.ssd_write_errors_count.add(1);
                }
                if let Some(disk) = &mut self.cache.disk {
                    disk.header_written(at, sector, landed.good);
                }
            }
        }
    }

    /// Loses a device that answers nothing any more.
    fn look_at_the_devices(&mut self, now_ns: u64) {
        // Who did not run for seconds has not looked at what has ended meanwhile, and judges nobody by it.
        if now_ns.saturating_sub(self.looked_ns) > PAUSED_NS {
            self.patience_from_ns = now_ns;
        }
        self.looked_ns = now_ns;
        for at in 0..self.devices.len() {
            let transfers = &mut self.devices[at];
            let oldest_ns = transfers.oldest_ns().map(|oldest_ns| oldest_ns.max(self.patience_from_ns));
            if oldest_ns.is_some_and(|oldest_ns| transfers.health.is_stalled(oldest_ns, now_ns)) {
                transfers.health.lose(now_ns);
                self.device_is_lost(at);
            }
            if self.devices[at].health.may_try(now_ns)
                && let Some(disk) = &mut self.cache.disk
            {
                disk.set_usable(at, true);
            }
        }
    }

    /// A device is lost, as is known already.
    pub fn lose_device(&mut self, at: usize, now_ns: u64) {
        self.devices[at].health.lose(now_ns);
        self.device_is_lost(at);
    }

    /// Nothing more is asked of it, and nobody waits for what was.
    fn device_is_lost(&mut self, at: usize) {
        self.metrics.ssd_devices_lost_count.add(1);
        if let Some(disk) = &mut self.cache.disk {
            disk.set_usable(at, false);
        }
        self.turned(at, Turn::Lost);
        self.give_up_waiting(at);
    }

    fn device_is_back(&mut self, at: usize) {
        self.requeue_from = 0;
        if let Some(disk) = &mut self.cache.disk {
            disk.set_usable(at, true);
        }
        self.turned(at, Turn::Back);
    }

    /// Ends what waits for a lost device, and forgets some of the blocks that lie on it. Says how many of both.
    fn give_up_waiting(&mut self, at: usize) -> u32 {
        let mut count = 0;
        // Slots that it may write into yet stay taken until it says that it does not; nobody waits for that.
        let mut reads = std::mem::take(&mut self.reads);
        reads.extend(self.devices[at].reads_inflight());
        for (block, host_slot) in reads.drain(..) {
            self.answer_waiters(host_slot, block, false);
        }
        self.reads = reads;
        let may_write = self.devices[at].health.tries();
        while let Some(landed) = self.devices[at].give_up(may_write) {
            self.end_transfer(at, &landed);
            count += 1;
        }
        // What is being read of its headers is not known yet.
        let Some(geometry) = self.cache.disk.as_ref().filter(|disk| !disk.is_recovering()).map(|disk| *disk.geometry())
        else {
            return count;
        };
        let locals = self.devices[at].health.to_forget(geometry.slots_per_device);
        if !locals.is_empty() {
            count += 1;
            // What is in the pool yet is written to the devices that are left.
            if locals.end == geometry.slots_per_device {
                self.requeue_from = 0;
            }
        }
        for local in locals {
            let slot = local * geometry.devices_count + at as u32;
            let Some((block, ..)) = self.cache.block_in(Tier::Disk, slot) else { continue };
            let forgotten = self.cache.lose_disk(block);
            self.metrics.blocks_forgotten_count.add(u64::from(forgotten));
        }
        count
    }

    /// A lost device that is not being tried gets no blocks.
    fn hold_back_if_lost(&mut self, at: usize) {
        let health = self.devices[at].health;
        if health.is_lost()
            && !health.tries()
            && let Some(disk) = &mut self.cache.disk
        {
            disk.set_usable(at, false);
        }
    }

    /// Nobody may be asking: then the oldest are told to nobody.
    fn turned(&mut self, at: usize, turn: Turn) {
        if self.turns.len() == TURNS_MAX {
            self.turns.remove(0);
        }
        self.turns.push((at, turn));
    }

    /// What has become of devices since it was asked last: they are lost, or back.
    pub fn take_turns(&mut self) -> impl Iterator<Item = (usize, Turn)> {
        self.turns.drain(..)
    }

    fn tell_moved(&mut self, device: usize, landed: &Landed, what: What, block: BlockId, good: bool) {
        let Some(stats) = &self.stats.as_ref().filter(|_| device < stats::DEVICE_ROWS) else { return };
        let Landed { queued_ns, begun_ns, .. } = *landed;
        let row = stats.device(device);
        let add = |column: DeviceColumn, count: u64| stats::add(&row[column as usize], count);
        let took = |since_ns: u64| self.now_ns.saturating_sub(since_ns);
        let record = |histogram, ns| stats.histogram(device_histogram(device, histogram)).record(ns);
        add(DeviceColumn::Errors, u64::from(!good));
        let bytes = if landed.good { self.options.slot_bytes } else { 0 };
        if what == What::Read {
            record(DeviceHistogram::ReadQueue, begun_ns.saturating_sub(queued_ns));
            record(DeviceHistogram::Read, took(begun_ns));
            add(DeviceColumn::Reads, 1);
            add(DeviceColumn::ReadBytes, bytes);
        } else {
            record(DeviceHistogram::Write, took(begun_ns));
            add(DeviceColumn::Writes, 1);
            add(DeviceColumn::WriteBytes, bytes);
        }
        let waited_us = u32::try_from(begun_ns.saturating_sub(queued_ns) / 1000).unwrap_or(u32::MAX);
        let (session, tag) = self.cache.index.recorder.serves;
        let entry = Entry {
            detail: device as u8,
            session,
            tag,
            key: self.cache.index.key_of(block),
            count: waited_us,
            part: u32::from(good),
            took_ns: took(queued_ns),
            ..Entry::plain(what, self.now_ns)
        };
        self.cache.index.recorder.record(entry);
    }

    /// A block has come from the disk, or has not: its bytes are compared with what was written, and
    /// all that wait for it are answered.
    fn end_read(&mut self, device: usize, landed: &Landed, block: BlockId, host_slot: u32, disk_slot: u32) {
        let moved = landed.good;
        // The first that waits for it is said to have read it; others waited for that.
        let first = self.loads.first_waiter(host_slot).map(|waiter| *self.loads.get(waiter.load));
        let session = first.and_then(|load| load.session).and_then(|at| self.sessions[at].as_deref());
        self.cache.index.recorder.serves = match (session, first) {
            (Some(session), Some(load)) => (session.writer.session.0, load.tag.0),
            _ => (u32::MAX, 0),
        };
        self.cache.index.recorder.cause = if moved { Cause::SsdChecksum } else { Cause::SsdRead };
        let bytes = self.options.slot_bytes;
        if moved {
            self.metrics.ssd_read_bytes.add(bytes);
        } else {
            self.metrics.ssd_read_errors_count.add(1);
        }
        let expected = self.cache.disk.as_ref().map_or(0, |disk| disk.data_crc(disk_slot));
        let sound = !self.options.checksum
            || !moved
            || planted::has(Bug::DiskChecksumSkipped)
            || self.checksum_of(host_slot) == expected;
        if !sound {
            self.metrics.ssd_checksum_errors_count.add(1);
        }
        let good = moved && sound;
        self.tell_moved(device, landed, What::Read, block, good);
        // Forgotten while it was read, with an ancestor or by a reset: nobody gets it any more.
        let wanted = good && !self.cache.index.block(block).is_detached();
        if good && self.options.checksum {
            self.cache.host.set_crc(host_slot, expected);
        }
        // Held until every waiter has its loan, so that no eviction comes between.
        let held = self.cache.index.pin(block);
        let forgotten = self.cache.end_read(block, good);
        self.metrics.blocks_forgotten_count.add(u64::from(forgotten));
        self.answer_waiters(host_slot, block, wanted);
        if held {
            self.cache.unpin(block);
        }
    }

    /// Answers all that wait for what is read into a slot.
    fn answer_waiters(&mut self, host_slot: u32, block: BlockId, wanted: bool) {
        while let Some(Waiter { load: at, index }) = self.loads.next_waiter(host_slot) {
            if planted::has(Bug::WaiterForgotten) && index % 2 == 1 {
                continue;
            }
            let load = *self.loads.get(at);
            if let Some(session) = load.session.and_then(|at| self.sessions[at].as_deref()) {
                self.cache.index.recorder.serves = (session.writer.session.0, load.tag.0);
            }
            let grant =
                if wanted { self.cache.loan(load.lease, load.instance, load.first + index, block) } else { None };
            let status = if grant.is_some() { Status::Ok } else { Status::Miss };
            match status {
                Status::Ok => self.metrics.load_blocks_ssd_count.add(1),
                _ => self.metrics.load_blocks_miss_count.add(1),
            }
            // Its lease may have ended while it was read: then nothing is said of the block.
            let lacks_lease = wanted && grant.is_none();
            let told = if lacks_lease { Status::Stale } else { status };
            self.tell_loaded(load.session, load.tag, block, told, SessionColumn::LoadedSsd);
            let mut payload = [0; GRANTS_PER_ENTRY];
            payload[0] = grant.map_or(0, Grant::to_word);
            let completion = Completion {
                last: false,
                from_disk: true,
                count: 1,
                first: index,
                payload,
                ..Completion::plain(load.tag, Some(Op::Load), status)
            };
            self.answer_load(at, completion);
        }
    }

    fn end_write(&mut self, block: BlockId, good: bool) {
        if good {
            self.metrics.ssd_write_bytes.add(self.options.slot_bytes);
        } else {
            self.metrics.ssd_write_errors_count.add(1);
        }
        self.cache.end_write(block, good);
    }

    /// Begins write-backs, oldest first, as far as the devices want them. At most two a poll: each
    /// costs a checksum.
    fn start_writes(&mut self) -> u32 {
        self.serves_nobody();
        let mut count = 0;
        let mut looked_at = 0;
        while let Some(Hashing { block, write, data_crc }) = self.hasher.as_mut().and_then(Hasher::take) {
            self.cache.set_host_crc(write.host_slot, block, data_crc);
            self.queue_write(block, write, data_crc);
            count += 1;
        }
        // Without a device that takes it, what is dirty waits for one.
        let is_usable = self.cache.disk.as_ref().is_some_and(DiskSlots::is_usable);
        if !is_usable || !self.may_write_back() {
            return count + self.cache.strip_stranded(STRIP_BUDGET);
        }
        self.tell_the_loads();
        while count < 2 && looked_at < SESSION_BUDGET && !self.cache.is_recovering() {
            let hashing = self.hasher.as_ref().map_or(0, Hasher::pending_count);
            let takes = |d: &Transfers<D>| !d.health.is_lost() || d.health.tries();
            if !self.devices.iter().any(|d| takes(d) && d.writes_count() + hashing < d.writes_wanted()) {
                break;
            }
            // What cannot go before it is written is first: somebody wants its slot.
            let next = self.cache.next_stranded().map(|(grant, block)| Dirty { grant, block });
            let Some(Dirty { grant, block }) = next.or_else(|| self.dirty.pop_front()) else { break };
            looked_at += 1;
            let Some(write) = self.cache.begin_write(grant, block) else { continue };
            self.try_once(write.disk_slot);
            let data_crc = match self.cache.host.crc(write.host_slot) {
                _ if !self.options.checksum => 0,
                // Made with the commit, or by an earlier process: should the bytes have changed since, the
                // disk's copy does not match either, and is a miss.
                Some(known) => known,
                None => {
                    let hashing = Hashing { block, write, data_crc: 0 };
                    if self.hasher.as_mut().is_some_and(|hasher| hasher.ask(hashing)) {
                        continue;
                    }
                    let made = self.checksum_of(write.host_slot);
                    self.cache.set_host_crc(write.host_slot, block, made);
                    made
                }
            };
            self.queue_write(block, write, data_crc);
            count += 1;
        }
        count
    }

    /// One write is enough to see whether a lost device is back.
    fn try_once(&mut self, disk_slot: u32) {
        let device = self.device_of(disk_slot);
        if self.devices[device].health.is_lost()
            && let Some(disk) = &mut self.cache.disk
        {
            disk.set_usable(device, false);
        }
    }

    /// Whether the endurance budget has room. A drain, and the end, write what is left.
    fn may_write_back(&mut self) -> bool {
        if self.dirty.is_empty() && self.cache.index.stranded.is_empty() {
            return true;
        }
        let now_ns = self.now_ns;
        let may = self.draining || self.closing || self.budget.as_mut().is_none_or(|budget| budget.allows(now_ns));
        let holds_back = !may && !self.dirty.is_empty();
        if holds_back && !self.held_back {
            self.metrics.ssd_held_back_count.add(1);
        }
        self.held_back = holds_back;
        may
    }

    /// Says how long a new block would wait for each device: as many transfers as it has, each as long as its last ones.
    fn tell_the_loads(&mut self) {
        let Some(disk) = &mut self.cache.disk else { return };
        if self.dirty.is_empty() && self.cache.index.stranded.is_empty() || self.devices.len() < 2 {
            return;
        }
        for (at, transfers) in self.devices.iter().enumerate() {
            let waiting: u32 = transfers.levels().iter().sum();
            disk.set_load(at, u64::from(waiting) * transfers.write_ns, transfers.write_ns);
        }
    }

    fn queue_write(&mut self, block: BlockId, write: WriteBack, data_crc: u64) {
        if let Some(disk) = &mut self.cache.disk {
            disk.set_data_crc(write.disk_slot, data_crc);
        }
        let io = self.io(Direction::Write, write.host_slot, write.disk_slot);
        let device = self.device_of(write.disk_slot);
        self.devices[device].queue_write(Purpose::Write { block }, io);
        if let Some(budget) = &mut self.budget {
            budget.spend(self.options.slot_bytes);
        }
    }

    fn start_transfers(&mut self, at: usize) -> u32 {
        if self.devices[at].health.is_lost() {
            let count = self.give_up_waiting(at);
            // At most what tries it.
            self.devices[at].start_waiting();
            self.devices[at].device.flush();
            return count;
        }
        let transfers = &mut self.devices[at];
        let mut count = transfers.start_waiting();
        if let Some(disk) = &mut self.cache.disk
            && transfers.wants_header()
            && let Some(sector) = disk.next_header_sector(at, &self.cache.index)
        {
            transfers.start_header(sector);
            count += 1;
        }
        transfers.device.flush();
        count
    }

    fn keep_house(&mut self, now_ns: u64) {
        self.serves_nobody();
        self.look_at_the_devices(now_ns);
        let expired = self.cache.expire(now_ns);
        if expired > 0 {
            self.cache.index.recorder.record(Entry { count: expired, ..Entry::plain(What::Expired, now_ns) });
        }
        self.cache.host.release_quarantined(now_ns);
        if now_ns >= self.next_sweep_ns {
            // Ranks store the same blocks within one step of their engine; a lease's life is ages.
            self.next_sweep_ns = now_ns + self.options.lease_ttl_ns;
            let lost = self.cache.sweep_stalled();
            self.metrics.abort_blocks_count.add(u64::from(lost));
        }
        self.metrics.leases_expired_count.add(u64::from(expired));
        self.tell_levels();
    }

    /// Brings the gauges up to date.
    fn tell_levels(&mut self) {
        self.show_sessions();
        self.show_devices();
        let m = &*self.metrics;
        let evicted = std::mem::take(&mut self.cache.evicted);
        m.evict_host_count.add(evicted.host);
        m.evict_ssd_count.add(evicted.disk);
        m.sessions_count.set(self.live.len() as u64);
        m.leases_count.set(self.cache.leases.count() as u64);
        m.host_slots_count.set(u64::from(self.cache.host.born_count()));
        m.host_slots_free_count.set(u64::from(self.cache.host.free_count()));
        m.host_slots_quarantined_count.set(u64::from(self.cache.host.quarantined_count()));
        m.host_slots_filling_count.set(u64::from(self.cache.host.filled_count()));
        m.blocks_count.set(self.cache.index.count() as u64);
        if let Some(disk) = &self.cache.disk {
            m.ssd_slots_count.set(u64::from(disk.geometry().limit_count()));
            m.ssd_slots_free_count.set(disk.free_count() as u64);
        }
        if let Some(stats) = &self.stats {
            m.copy_to(stats.counters());
            stats.beat(self.now_ns, 0);
        }
    }

    /// Shows how full the rings of some sessions are; of the others, the next time.
    fn show_sessions(&mut self) {
        let Some(stats) = &self.stats else { return };
        for _ in 0..self.live.len().min(SHOWN_MAX) {
            self.shown = (self.shown + 1) % self.live.len();
            let at = self.live[self.shown];
            let Some(session) = self.sessions[at].as_deref() else { continue };
            let row = stats.session(at);
            let set =
                |column: SessionColumn, value: u32| row[column as usize].store(u64::from(value), Ordering::Relaxed);
            let [submissions, completions] = session.waiting();
            set(SessionColumn::SubmissionsWaiting, submissions);
            set(SessionColumn::CompletionsWaiting, completions);
            set(SessionColumn::LoadsInflight, session.loads_count);
            set(SessionColumn::Leases, self.cache.leases.held(session.writer.session));
            set(SessionColumn::Loans, self.cache.leases.loaned(session.writer.session));
            set(SessionColumn::Ended, u32::from(session.ended));
        }
    }

    fn show_devices(&self) {
        let Some(stats) = &self.stats else { return };
        for (at, transfers) in self.devices.iter().enumerate().take(stats::DEVICE_ROWS) {
            for (word, level) in stats.device(at).iter().zip(transfers.levels()) {
                word.store(u64::from(level), Ordering::Relaxed);
            }
            let lost = u64::from(transfers.health.is_lost());
            stats.device(at)[DeviceColumn::Lost as usize].store(lost, Ordering::Relaxed);
        }
    }

    /// The shard sleeps, until then at the latest.
    pub fn tell_sleep(&self, until_ns: u64) {
        if let Some(stats) = &self.stats {
            stats.beat(self.now_ns, until_ns);
        }
    }

    /// Whether no transfer waits or is in flight and nothing is to be written.
    pub fn is_drained(&self) -> bool {
        let is_usable = self.cache.disk.as_ref().is_none_or(DiskSlots::is_usable);
        let headers = |at| self.cache.disk.as_ref().is_some_and(|disk| disk.has_header_to_write(at));
        self.loads.is_empty()
            && (self.dirty.is_empty() || self.cache.is_recovering() || !is_usable)
            && self.hasher.as_ref().is_none_or(|hasher| hasher.pending_count() == 0)
            && self.devices.iter().enumerate().all(|(at, d)| d.health.is_lost() || d.is_idle() && !headers(at))
    }

    /// Announces sleep to every session. Poll once more before sleeping: if that does any work, stay
    /// awake. A request that waits for room is no work; the client that makes room rings.
    pub fn announce_sleep(&mut self) {
        // Nobody will for a while.
        self.tell_levels();
        for session in self.sessions() {
            doorbell::announce(session.segment.server_sleeps());
        }
    }

    /// Awake again.
    pub fn retract_sleep(&mut self) {
        for session in self.sessions() {
            doorbell::retract(session.segment.server_sleeps());
        }
    }

    /// Longest sleep that delays nothing.
    pub fn sleep_ns_max(&self) -> u64 {
        let moves = self.vacating.is_some() && !self.is_vacated();
        if self.hungry_count > 0 || moves || self.cache.disk.as_ref().is_some_and(DiskSlots::has_too_many) {
            HOUSEKEEPING_NS
        } else if self.cache.leases.count() > 0 || self.cache.host.quarantined_count() > 0 {
            50_000_000
        } else {
            1_000_000_000
        }
    }
}
