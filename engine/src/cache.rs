//! The cache without its I/O: index, slots of both tiers and leases, kept consistent with each other.
//! Pure: everything that takes time is begun here and ended here, and done by the shard between.

use kvring_ipc::key::BlockKey;
use kvring_ipc::recorder::{Cause, What};
use kvring_ipc::wire::{Grant, LeaseId, Status};

use crate::index::{BlockId, Index, IndexOptions, Place, Tier};
use crate::lease::{Cover, Leases};
use crate::limits::SESSIONS_MAX;
use crate::planted::{self, Bug};
use crate::recovery::Recovery;
use crate::tier::disk::DiskSlots;
use crate::tier::host::{HostSlots, RankDone, SessionId, Writer};

/// Evictions that one slot may cost, while some slots are not given out.
const EVICTIONS_PER_SLOT: u32 = 64;
/// Stranded blocks that are looked at in one poll, where nothing can be written.
const STRIPPED_MAX: usize = 32;

/// What a reserve says of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserve {
    /// Fill this slot.
    Slot(Grant),
    /// It is resident or on its way.
    Present,
    /// No room, or no parent.
    Dropped,
}

/// What comes before a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// Nothing: it begins a chain of the namespace with this id, zeros for none.
    Namespace(BlockKey),
    /// This block.
    Block(BlockId),
}

/// The block before the first is not resident: what follows it has no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoParent;

/// A grant that is not the writer's own and current.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StaleGrant;

/// What a load finds of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// In this slot.
    Ready(u32),
    /// A read is filling this slot.
    Reading(u32),
    /// On the disk only.
    OnDisk,
    /// Nowhere any more.
    Gone,
}

/// A write-back that has begun: from which host slot to which disk slot.
#[derive(Debug, Clone, Copy)]
pub struct WriteBack {
    /// Source.
    pub host_slot: u32,
    /// Target.
    pub disk_slot: u32,
}

/// Counts of what was evicted since they were last taken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Evicted {
    /// From the pool.
    pub host: u64,
    /// From the SSD.
    pub disk: u64,
}

/// The cache.
#[derive(Debug)]
pub struct Cache {
    /// Blocks by key.
    pub index: Index,
    /// Slots of the pool.
    pub host: HostSlots,
    /// Slots of the SSD, if there is one.
    pub disk: Option<DiskSlots>,
    /// Leases.
    pub leases: Leases,
    /// What had to go.
    pub evicted: Evicted,
    /// What an earlier process has left, and how far it was taken back.
    pub recovery: Recovery,
}

impl Cache {
    /// An empty cache over these slots. All memory it will ever need is allocated here.
    pub fn new(options: &IndexOptions, mut host: HostSlots, disk: Option<DiskSlots>) -> Self {
        let mut leases = Leases::default();
        host.begin_generations_at(options.secret[0] as u32);
        leases.begin_generations_at(options.secret[1] as u32);
        Self {
            index: Index::new(options),
            host,
            disk,
            leases,
            evicted: Evicted::default(),
            recovery: Recovery::default(),
        }
    }

    /// Slots of blocks that were let go come home.
    fn collect(&mut self) {
        while let Some((tier, slot)) = self.index.dropped_slots.pop() {
            match tier {
                Tier::Host => self.host.release(slot),
                Tier::Disk => self.release_disk(slot),
            }
        }
    }

    fn release_disk(&mut self, slot: u32) {
        if let Some(disk) = &mut self.disk {
            disk.release(slot);
        }
    }

    /// The longest resident prefix, under a lease.
    ///
    /// # Errors
    /// [`Status::Quota`].
    pub fn match_chain(
        &mut self,
        count: u32,
        key_at: impl Fn(u32) -> BlockKey,
        session: SessionId,
        instance: u32,
        expires_at_ns: u64,
    ) -> Result<Option<(LeaseId, u32)>, Status> {
        let Some((leaf, count)) = self.index.match_chain(count, key_at) else { return Ok(None) };
        self.index.hit(leaf, count);
        let lease = self.leases.grant(&mut self.index, session, instance, Cover { leaf, count }, expires_at_ns)?;
        Ok(Some((lease, count)))
    }

    /// Ends a lease.
    pub fn release(&mut self, lease: LeaseId, instance: u32) -> bool {
        let released = self.leases.release(&mut self.index, lease, instance);
        self.collect();
        released
    }

    /// Ends leases whose time has come. Says how many.
    pub fn expire(&mut self, now_ns: u64) -> u32 {
        let count = self.leases.expire(&mut self.index, now_ns);
        self.collect();
        count
    }

    /// The blocks at depths `first..` of a leased chain, each compared with the key that is asked for.
    ///
    /// # Errors
    /// [`Status::Stale`] for a lease that is not current or not the instance's;
    /// [`Status::KeyMismatch`] for a depth it does not cover or a key that is not the chain's.
    pub fn leased_blocks(
        &self,
        lease: LeaseId,
        instance: u32,
        first: u32,
        keys: Option<&[BlockKey]>,
        blocks: &mut [BlockId],
    ) -> Result<(), Status> {
        let cover = self.leases.cover(lease, instance).ok_or(Status::Stale)?;
        let end = first + blocks.len() as u32;
        if end > cover.count {
            return Err(Status::KeyMismatch);
        }
        // Up from the leaf: the chain itself says which block is at which depth.
        let mut at = cover.leaf;
        for depth in (first..cover.count).rev() {
            let block = self.index.block(at);
            if depth < end {
                let i = (depth - first) as usize;
                if keys.is_some_and(|keys| keys[i] != block.key) {
                    return Err(Status::KeyMismatch);
                }
                blocks[i] = at;
            }
            match block.parent() {
                Some(parent) => at = parent,
                None => assert!(depth == 0, "a chain ends at depth 0"),
            }
        }
        Ok(())
    }

    /// Forgets every block, in the pool and, as soon as the headers are written, on the SSD. What is
    /// leased keeps its slot, for copies under way, but is not loaded any more. Says how many.
    pub fn reset(&mut self) -> u32 {
        // One entry says it: one a block would push everything else out.
        let recorder = std::mem::take(&mut self.index.recorder);
        let count = self.index.detach_all();
        self.index.recorder = recorder;
        self.index.recorder.block(What::Reset, BlockKey::default(), 0, count);
        self.collect();
        if !planted::has(Bug::ResetKeepsTable) {
            self.host.forget_all();
        }
        self.forget_orphans();
        if let Some(disk) = &mut self.disk
            && !planted::has(Bug::ResetKeepsHeaders)
        {
            disk.clear_headers();
        }
        count
    }

    /// Forgets a namespace, as [`Cache::reset`] forgets everything. Says how many blocks.
    pub fn reset_namespace(&mut self, id: BlockKey) -> u32 {
        let count = match self.index.namespaces.find(id) {
            None => 0,
            Some(number) => {
                let recorder = std::mem::take(&mut self.index.recorder);
                let count = self.index.detach_namespace(number);
                self.index.recorder = recorder;
                count
            }
        };
        self.index.recorder.block(What::Reset, id, 0, count);
        self.forget_detached();
        count
    }

    /// Nobody finds what is detached after a crash either: what is held yet, and what lies in slots that are free.
    fn forget_detached(&mut self) {
        self.collect();
        // Of what is not known yet nobody knows whose it is.
        self.forget_orphans();
        if !planted::has(Bug::NamespaceKeepsTable) {
            for block in self.index.detached() {
                if let Some(slot) = block.place(Tier::Host).ready() {
                    self.host.forget(slot);
                }
            }
        }
        if !planted::has(Bug::NamespaceKeepsFree) {
            self.host.forget_free();
        }
        if let Some(disk) = &mut self.disk
            && !planted::has(Bug::NamespaceKeepsHeaders)
        {
            for slot in self.index.detached().filter_map(|block| block.place(Tier::Disk).ready()) {
                disk.is_stale(slot);
            }
            disk.clear_stale_headers();
        }
    }

    /// Where a block is.
    pub fn find(&self, block: BlockId) -> Found {
        let block = self.index.block(block);
        if block.is_detached() && !planted::has(Bug::DetachedServed) {
            // Forgotten with an ancestor, or by a reset: a lease keeps its slot and nothing more.
            return Found::Gone;
        }
        match (block.place(Tier::Host), block.place(Tier::Disk)) {
            (Place::Ready(slot), _) => Found::Ready(slot),
            (Place::Filling(slot), Place::Ready(_)) if planted::has(Bug::ReadNotAwaited) => Found::Ready(slot),
            (Place::Filling(slot), Place::Ready(_)) => Found::Reading(slot),
            (Place::Absent, Place::Ready(_)) => Found::OnDisk,
            _ => Found::Gone,
        }
    }

    /// Puts a block that is in a slot on loan to a lease. `None` if the lease is not current.
    pub fn loan(&mut self, lease: LeaseId, instance: u32, depth: u32, block: BlockId) -> Option<Grant> {
        let slot = match self.index.block(block).place(Tier::Host) {
            Place::Filling(slot) if planted::has(Bug::ReadNotAwaited) => slot,
            place => place.ready()?,
        };
        self.leases.loan(&mut self.index, lease, instance, depth, block).then(|| self.host.grant(slot))
    }

    /// A free slot of the pool, at the price of whatever is next to go.
    fn acquire_host(&mut self) -> Option<u32> {
        if let Some(slot) = self.host.acquire() {
            return Some(slot);
        }
        // What goes may have lain in a slot that is not given out any more.
        for _ in 0..EVICTIONS_PER_SLOT {
            let slot = self.index.evict(Tier::Host)?;
            self.host.prefetch(self.index.next_slot);
            self.evicted.host += 1;
            self.host.release(slot);
            self.collect();
            if let Some(slot) = self.host.acquire() {
                return Some(slot);
            }
        }
        None
    }

    fn acquire_disk(&mut self) -> Option<u32> {
        if let Some(slot) = self.disk.as_mut()?.acquire() {
            return Some(slot);
        }
        // Nothing goes for a device that is lost.
        if !self.disk.as_ref()?.is_usable() {
            return None;
        }
        let slot = self.index.evict(Tier::Disk)?;
        self.evicted.disk += 1;
        self.release_disk(slot);
        self.collect();
        self.disk.as_mut()?.acquire()
    }

    /// Moves a block that nobody uses from a slot that is not given out any more to one that is, at the price of whatever
    /// is next to go. `copy` copies its bytes. None: it is in use, or there is no room for it now.
    pub fn move_host(&mut self, slot: u32, block: BlockId, copy: impl FnOnce(u32, u32)) -> Option<Grant> {
        let b = self.index.block(block);
        let is_free = b.pins == 0 || planted::has(Bug::MovedOnLoan);
        if !is_free || b.is_detached() || b.place(Tier::Host) != Place::Ready(slot) || !self.index.pin(block) {
            return None;
        }
        let moved = self.acquire_host().map(|to| {
            self.host.inherit(slot, to);
            if planted::has(Bug::MovedHeaderFirst) {
                self.describe(to, block);
            }
            // To copy a block is many stores.
            (0..16).for_each(|_| planted::step());
            if !planted::has(Bug::MovedUncopied) {
                copy(slot, to);
            }
            self.index.relocate(Tier::Host, block, to);
            // For the next process: in both slots, then in the new one alone.
            self.describe(to, block);
            self.host.forget(slot);
            self.host.release(slot);
            self.host.grant(to)
        });
        self.index.unpin(block);
        self.collect();
        moved
    }

    /// Has the next block leave a tier. False: none may.
    pub fn evict(&mut self, tier: Tier) -> bool {
        let Some(slot) = self.index.evict(tier) else { return false };
        match tier {
            Tier::Host => {
                self.evicted.host += 1;
                self.host.release(slot);
            }
            Tier::Disk => {
                self.evicted.disk += 1;
                self.release_disk(slot);
            }
        }
        self.collect();
        true
    }

    /// The next of the blocks that cannot leave the pool before they are on the SSD, to be written there. `None` when
    /// there are no more.
    pub fn next_stranded(&mut self) -> Option<(Grant, BlockId)> {
        while let Some(block) = self.index.stranded.pop_front() {
            if let Some(slot) = self.index.stranded_in(block) {
                return Some((self.host.grant(slot), block));
            }
        }
        None
    }

    /// Nothing can be written: what continues stranded blocks is forgotten instead, from its end on, up to `budget` blocks
    /// of it, of which the first is at most the longest chain away. Else a pool full of them would take nothing any more. Says how many blocks went.
    pub fn strip_stranded(&mut self, budget: u32) -> u32 {
        let (mut count, mut steps) = (0, kvring_ipc::wire::MATCH_BLOCKS_MAX);
        // Each once: what somebody has a lease on stays, and its turn comes again.
        for _ in 0..self.index.stranded.len().min(STRIPPED_MAX) {
            let Some((_, block)) = self.next_stranded() else { break };
            let mut at = block;
            while count < budget
                && let Some((slot, parent)) = self.index.strip(block, at, &mut steps)
            {
                (at, count) = (parent, count + 1);
                self.evicted.disk += 1;
                self.release_disk(slot);
            }
            if self.index.stranded_in(block).is_some() {
                self.index.stranded.push_back(block);
            }
            if count >= budget || steps == 0 {
                break;
            }
        }
        self.collect();
        count
    }

    /// Forgets a block and all that continues it, as [`Cache::reset`] forgets everything. Says how many. One that is not
    /// resident may lie in a free slot yet.
    pub fn forget(&mut self, key: BlockKey) -> u32 {
        self.index.recorder.cause = Cause::Asked;
        let count = self.index.find(key).map_or(0, |id| self.index.detach(id));
        if planted::has(Bug::ForgetKeepsHeaders) {
            self.collect();
        } else {
            self.forget_detached();
        }
        count
    }

    /// Reserves a slot for the block with this key after `parent`, if the writer `may_take` another. Says what
    /// became of it, and the block, which is the next one's parent.
    pub fn reserve(
        &mut self,
        key: BlockKey,
        parent: Parent,
        depth: u32,
        writer: Writer,
        may_take: bool,
    ) -> (Reserve, Option<BlockId>) {
        if let Some(id) = self.index.find(key) {
            let block = self.index.block(id);
            if block.depth != depth {
                return (Reserve::Dropped, None);
            }
            let joined = match block.place(Tier::Host) {
                Place::Filling(slot) => self.host.join(slot, writer),
                _ => None,
            };
            return (joined.map_or(Reserve::Present, Reserve::Slot), Some(id));
        }
        if !may_take {
            return (Reserve::Dropped, None);
        }
        // Eviction must not take the parent from under us.
        if let Parent::Block(parent) = parent
            && !self.index.pin(parent)
        {
            return (Reserve::Dropped, None);
        }
        let slot = self.acquire_host();
        let id = slot.and_then(|_| match parent {
            Parent::Namespace(namespace) => self.index.begin_chain(key, namespace),
            Parent::Block(parent) => self.index.insert(key, Some(parent), depth),
        });
        if let Parent::Block(parent) = parent {
            self.index.unpin(parent);
        }
        match (slot, id) {
            (Some(slot), Some(id)) => {
                self.index.begin(Tier::Host, id, slot);
                let grant = self.host.reserve(slot, id, writer);
                if planted::has(Bug::TableBeforeBytes) {
                    self.describe(slot, id);
                }
                (Reserve::Slot(grant), Some(id))
            }
            (Some(slot), None) => {
                self.host.release(slot);
                (Reserve::Dropped, None)
            }
            _ => (Reserve::Dropped, None),
        }
    }

    /// The parent that a reserve names: `Err` if it is not there at the depth before.
    ///
    /// # Errors
    /// Nothing of the kind is resident.
    pub fn parent(&self, parent: BlockKey, depth: u32) -> Result<Parent, NoParent> {
        if depth == 0 {
            return Ok(Parent::Namespace(parent));
        }
        let id = self.index.find(parent).ok_or(NoParent)?;
        if self.index.block(id).depth + 1 == depth { Ok(Parent::Block(id)) } else { Err(NoParent) }
    }

    /// A rank has filled its part of a slot. `Err` if the grant is not its own and current;
    /// `Ok(Some)` if that made the block resident.
    ///
    /// # Errors
    /// The grant is stale.
    pub fn commit(&mut self, grant: Grant, writer: Writer) -> Result<Option<BlockId>, StaleGrant> {
        match self.host.rank_done(grant, writer, true).ok_or(StaleGrant)? {
            RankDone::Waiting => Ok(None),
            RankDone::Lost(block) => {
                self.index.recorder.cause = Cause::Aborted;
                self.lose(grant.slot, block);
                Ok(None)
            }
            RankDone::Complete(block) => {
                if self.index.block(block).is_detached() {
                    // Forgotten while it was written, with an ancestor.
                    self.index.fail(Tier::Host, block);
                    self.host.release(grant.slot);
                    self.index.settle(block);
                    self.collect();
                    return Ok(None);
                }
                self.index.finish(Tier::Host, block);
                self.index.show(block);
                self.describe(grant.slot, block);
                Ok(Some(block))
            }
        }
    }

    /// The next engine process finds the block in this slot.
    fn describe(&mut self, slot: u32, block: BlockId) {
        let b = self.index.block(block);
        self.host.describe(slot, b.key, self.index.parent_key(block), b.depth);
    }

    /// The checksum of what a host slot holds was made.
    pub fn set_host_crc(&mut self, slot: u32, block: BlockId, data_crc: u64) {
        if self.host.crc(slot).is_none() {
            self.host.set_crc(slot, data_crc);
            if !self.index.block(block).is_detached() {
                self.describe(slot, block);
            }
        }
    }

    /// A block's copy in the pool is not what was stored. It goes; if it was the only one, or somebody is
    /// using it, the block and all that continues it are forgotten. Says how many.
    pub fn distrust(&mut self, slot: u32, block: BlockId) -> u32 {
        self.index.recorder.cause = Cause::DramChecksum;
        self.host.forget(slot);
        let b = self.index.block(block);
        if b.place(Tier::Disk).ready().is_some() && b.pins == 0 && !b.is_detached() {
            self.index.leave(Tier::Host, block);
            self.host.release(slot);
            self.collect();
            return 0;
        }
        let forgotten = if self.index.block(block).is_detached() { 0 } else { self.index.detach(block) };
        self.collect();
        forgotten
    }

    /// A block's copy on the disk is not what was written. It goes; if it was the only one, or is in use, the
    /// block and all that continues it are forgotten. Says how many, and the slot of its copy in the pool.
    pub fn distrust_disk(&mut self, block: BlockId) -> (u32, Option<u32>) {
        self.leave_disk(block, Cause::SsdChecksum)
    }

    /// The device that a block lies on is lost: as [`Cache::distrust_disk`], and its header stays what it is. Should the
    /// device come back, the bytes are the block's, or fail their checksum.
    pub fn lose_disk(&mut self, block: BlockId) -> u32 {
        self.leave_disk(block, Cause::DeviceLost).0
    }

    fn leave_disk(&mut self, block: BlockId, cause: Cause) -> (u32, Option<u32>) {
        let b = self.index.block(block);
        // With a copy in each tier no transfer uses the disk's: whoever holds the block has the other.
        let may_leave = b.pins == 0 || cause == Cause::DeviceLost;
        if let Some(host_slot) = b.place(Tier::Host).ready().filter(|_| may_leave) {
            let disk_slot = self.index.leave(Tier::Disk, block);
            if let (Some(disk), Cause::SsdChecksum) = (&mut self.disk, cause) {
                disk.clear_header(disk_slot);
            }
            self.release_disk(disk_slot);
            self.collect();
            return (0, Some(host_slot));
        }
        self.index.recorder.cause = cause;
        let forgotten = self.index.detach(block);
        self.collect();
        (forgotten, None)
    }

    /// The block that a slot holds, ready and not forgotten, with the use of the slot and, where it was made,
    /// its checksum.
    pub fn block_in(&self, tier: Tier, slot: u32) -> Option<(BlockId, u32, Option<u64>)> {
        let (id, generation, data_crc) = match tier {
            Tier::Host => {
                let id = self.index.find(self.host.header(slot)?.key)?;
                (id, self.host.grant(slot).generation, self.host.crc(slot))
            }
            Tier::Disk => {
                let disk = self.disk.as_ref()?;
                (disk.block(slot)?, disk.generation(slot), Some(disk.data_crc(slot)))
            }
        };
        let block = self.index.block(id);
        let is_there = block.place(tier) == Place::Ready(slot) && !block.is_detached();
        is_there.then_some((id, generation, data_crc))
    }

    /// A rank will not fill its part: the block is lost. False if the grant is stale.
    pub fn abort(&mut self, grant: Grant, writer: Writer) -> bool {
        let Some(RankDone::Lost(block)) = self.host.rank_done(grant, writer, false) else { return false };
        self.index.recorder.cause = Cause::Aborted;
        self.lose(grant.slot, block);
        true
    }

    /// A block being written is lost; its slot is free when no rank writes into it any more.
    fn lose(&mut self, slot: u32, block: BlockId) {
        if !self.index.block(block).is_detached() {
            self.index.detach(block);
        }
        if self.host.is_abandoned(slot) {
            if planted::has(Bug::QuarantineSkipped) || !self.host.quarantine(slot) {
                self.host.release(slot);
            }
            self.index.fail(Tier::Host, block);
            self.index.settle(block);
        }
        self.collect();
    }

    /// A session is gone: its leases end. What it was writing is lost; with `drained`, it has promised
    /// that nothing writes any more, else those slots are quarantined. Says how many blocks were lost.
    /// The heir is another session of its instance, if there is one.
    pub fn end_session(&mut self, session: SessionId, drained: bool, heir: Option<SessionId>) -> u32 {
        self.leases.end_session(&mut self.index, session, heir);
        self.collect();
        self.index.recorder.cause = if drained { Cause::Aborted } else { Cause::WriterGone };
        let (mut lost, mut before) = (0, u32::MAX);
        while let Some((slot, block, nth)) = self.host.next_of_dead(session, before) {
            if drained {
                self.host.end_quarantine_of_slot(session, slot);
            }
            self.lose(slot, block);
            (lost, before) = (lost + 1, nth + 1);
        }
        lost
    }

    /// Loses the blocks that some ranks committed and the others never will. Says how many.
    pub fn sweep_stalled(&mut self) -> u32 {
        let (mut lost, mut before) = (0, u32::MAX);
        self.index.recorder.cause = Cause::Stalled;
        while let Some((slot, block, nth)) = self.host.next_stalled(before) {
            self.lose(slot, block);
            (lost, before) = (lost + 1, nth);
        }
        lost
    }

    /// Begins the read of a block that is on the disk only: into which host slot, from which disk slot.
    pub fn begin_read(&mut self, block: BlockId) -> Option<(u32, u32)> {
        let disk_slot = self.index.block(block).place(Tier::Disk).ready()?;
        if !self.index.pin(block) {
            return None;
        }
        let Some(host_slot) = self.acquire_host() else {
            self.index.unpin(block);
            self.collect();
            return None;
        };
        self.index.begin(Tier::Host, block, host_slot);
        Some((host_slot, disk_slot))
    }

    /// The read has ended. If its bytes are good they are in the pool now; else the block and all that
    /// continues it are forgotten: says how many.
    pub fn end_read(&mut self, block: BlockId, good: bool) -> u32 {
        let mut forgotten = 0;
        if good {
            self.index.finish(Tier::Host, block);
            let b = self.index.block(block);
            if let (Some(slot), false) = (b.place(Tier::Host).ready(), b.is_detached()) {
                self.describe(slot, block);
            }
        } else {
            let Place::Filling(slot) = self.index.block(block).place(Tier::Host) else { unreachable!("a read fills") };
            self.index.fail(Tier::Host, block);
            self.host.release(slot);
            let disk_slot = self.index.leave(Tier::Disk, block);
            self.release_disk(disk_slot);
            if !self.index.block(block).is_detached() {
                forgotten = self.index.detach(block);
            }
        }
        self.index.unpin(block);
        self.collect();
        forgotten
    }

    /// Begins the write-back of a block that is in the pool only, if there still is such a one in this
    /// slot and the disk has or can make room.
    pub fn begin_write(&mut self, grant: Grant, block: BlockId) -> Option<WriteBack> {
        let current = self.host.grant(grant.slot) == grant && self.host.holds(grant.slot);
        if !current || self.index.block(block).place(Tier::Host) != Place::Ready(grant.slot) {
            return None;
        }
        let b = self.index.block(block);
        if b.is_detached() || b.place(Tier::Disk) != Place::Absent || !self.index.pin(block) {
            return None;
        }
        let Some(disk_slot) = self.acquire_disk() else {
            self.index.unpin(block);
            self.collect();
            return None;
        };
        self.index.begin(Tier::Disk, block, disk_slot);
        Some(WriteBack { host_slot: grant.slot, disk_slot })
    }

    /// The write-back has ended.
    pub fn end_write(&mut self, block: BlockId, good: bool) {
        let Place::Filling(disk_slot) = self.index.block(block).place(Tier::Disk) else {
            unreachable!("a write fills")
        };
        if good {
            let b = self.index.block(block);
            let parent = self.index.parent_key(block);
            if let Some(disk) = &mut self.disk
                && !b.is_detached()
            {
                disk.describe(disk_slot, block, b.key, parent, b.depth);
            }
            self.index.finish(Tier::Disk, block);
        } else {
            self.index.fail(Tier::Disk, block);
            self.release_disk(disk_slot);
        }
        self.index.unpin(block);
        self.collect();
    }

    /// One use of a block less.
    pub fn unpin(&mut self, block: BlockId) {
        self.index.unpin(block);
        self.collect();
    }

    /// Checks that nobody holds anything: no lease, no pin, and every slot is free or holds a block.
    ///
    /// # Panics
    /// If something leaked.
    pub fn check_at_rest(&self) {
        assert_eq!(self.leases.count(), 0, "no lease remains");
        let held = self.index.check_at_rest();
        assert_eq!(self.host.quarantined_count(), 0, "no slot stays in quarantine");
        assert!((0..SESSIONS_MAX as u32).all(|at| self.host.filling_count(at) == 0), "nobody is filling a slot");
        assert_eq!(self.host.filled_count(), 0, "nor is any being filled");
        let free = self.host.free_count() + self.host.closed_free_count();
        assert_eq!(free + held[0], self.host.born_count(), "a pool slot leaked");
        if let Some(disk) = &self.disk {
            let homes = (disk.free_count() + disk.unused_count()) as u32;
            assert_eq!(homes + held[1], disk.geometry().slots_count(), "a disk slot leaked");
        }
    }

    /// Checks every invariant: O(everything), for tests and simulations.
    ///
    /// # Panics
    /// If one is broken.
    pub fn check(&self) {
        self.index.check();
        assert!(self.index.dropped_slots.is_empty(), "dropped slots come home");
    }
}
