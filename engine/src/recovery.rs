//! Taking back what an earlier process has left: the pool's blocks at once, the SSD's bit by bit while the
//! cache serves.
//!
//! Headers come as they are read, in the order of slots. A block whose parent is not there yet waits until
//! all were read; those are then taken in the order of depth, so a parent comes before its children.

use std::collections::{BTreeMap, VecDeque};

use kvring_ipc::wire::MATCH_BLOCKS_MAX;

use crate::cache::Cache;
use crate::index::{BlockId, Place, Tier};
use crate::planted::{self, Bug};
use crate::tier::disk::DiskSlots;
use crate::tier::header::Header;
use crate::tier::host::Changes;
use crate::tier::piece::HeaderPiece;

/// Blocks that an earlier process's cache has left, as far as they were taken back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// In the pool.
    pub host: u32,
    /// On the SSD.
    pub disk: u32,
}

/// A recovery under way.
#[derive(Debug, Default)]
pub struct Recovery {
    /// What came back.
    pub recovered: Recovered,
    /// Headers of the disk, as they were found.
    pieces: VecDeque<HeaderPiece>,
    /// The next of the first piece.
    next: usize,
    all_read: bool,
    /// Headers whose block waits for its parent, by depth.
    late: Vec<Vec<Header>>,
    /// How deep the late ones were taken, and how many of that depth.
    late_depth: usize,
    late_next: usize,
    /// Blocks in the pool whose parent may be on the disk, by depth.
    orphans: VecDeque<Header>,
    /// Slots of the pool whose block was there already, or had no room: as long as the pool is followed, that may change.
    untaken: Vec<u32>,
}

const DEPTHS: usize = MATCH_BLOCKS_MAX as usize + 1;
/// Slots of the disk that are looked at, whether they are free, for the price of one header.
const SWEEP: u32 = 32;

/// What became of a recovered header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Adopted {
    Yes(BlockId),
    /// The block is there already, or there is no room.
    No,
    /// The block before it is not there, or not yet.
    NoParent,
}

impl Recovery {
    fn wait_for_parent(&mut self, header: &Header) {
        if let Some(late) = self.late.get_mut(header.depth as usize) {
            late.push(*header);
        }
    }

    fn next_late(&mut self) -> Option<Header> {
        let header = *self.late.get(self.late_depth)?.get(self.late_next)?;
        self.late_next += 1;
        Some(header)
    }

    fn next_depth(&mut self) {
        self.late[self.late_depth] = Vec::new();
        (self.late_depth, self.late_next) = (self.late_depth + 1, 0);
    }

    fn next_found(&mut self) -> Option<Header> {
        while let Some(piece) = self.pieces.front() {
            if let Some(header) = piece.headers().get(self.next) {
                self.next += 1;
                return Some(*header);
            }
            self.pieces.pop_front();
            self.next = 0;
        }
        None
    }
}

impl Cache {
    /// Takes back what the pool's table and these headers of the disk say, at once, as the first engine process.
    pub fn recover(&mut self, found: impl IntoIterator<Item = HeaderPiece>) -> Recovered {
        self.begin_recovery(self.disk.is_some(), 1);
        found.into_iter().for_each(|piece| self.found_on_disk(piece));
        self.disk_was_read();
        while self.recover_some(u32::MAX) > 0 {}
        self.recovery.recovered
    }

    /// Takes back what the pool's table says: blocks that were in the pool, with all that come before
    /// them, are resident again when this returns. With `with_disk` the others follow, as they are found.
    /// Nobody else writes the table any more: this is the engine process of that `epoch`, the one after the last. What
    /// [`Cache::follow_pool`] has taken is taken already.
    pub fn begin_recovery(&mut self, with_disk: bool, epoch: u64) {
        self.take_pool(epoch.checked_sub(1));
        self.recovery.untaken = Vec::new();
        self.host.end_recovery(epoch);
        match self.disk.as_mut().filter(|_| with_disk) {
            Some(disk) => {
                disk.begin_recovery();
                self.recovery.late = vec![Vec::new(); DEPTHS];
            }
            None => self.forget_orphans(),
        }
    }

    /// Takes what the pool's table says now, while the engine process that writes it still serves: at its end only what
    /// has changed since is left to be taken. May be called again; nobody is served from this cache yet.
    pub fn follow_pool(&mut self) {
        self.take_pool(None);
    }

    /// `after` the engine process of this epoch has ended, if it has.
    fn take_pool(&mut self, after: Option<u64>) {
        // What was not taken is found again.
        let orphans = std::mem::take(&mut self.recovery.orphans).into_iter().map(|orphan| orphan.slot);
        let untaken = std::mem::take(&mut self.recovery.untaken);
        let Changes { gone, mut found, .. } = self.host.recover(after, orphans.chain(untaken));
        for (slot, block) in gone {
            if self.index.is_at(block, Tier::Host, slot) {
                self.index.detach(block);
            }
        }
        // With a block that is gone went all that continue it, those that are there yet as well: they are taken anew.
        while let Some((_, slot)) = self.index.dropped_slots.pop() {
            self.recovery.recovered.host -= 1;
            found.extend(self.host.untake(slot));
        }
        let mut late: BTreeMap<u32, Vec<Header>> = BTreeMap::new();
        for (at, header) in found.iter().enumerate() {
            self.fetch_ahead(Tier::Host, &found, at);
            match self.adopt(Tier::Host, header) {
                Adopted::Yes(id) => self.host.took(header, id),
                Adopted::No => self.leave(header.slot),
                Adopted::NoParent => late.entry(header.depth).or_default().push(*header),
            }
        }
        for header in late.into_values().flatten() {
            match self.adopt(Tier::Host, &header) {
                Adopted::Yes(id) => self.host.took(&header, id),
                // It may be on the disk.
                Adopted::NoParent => self.recovery.orphans.push_back(header),
                Adopted::No => self.leave(header.slot),
            }
        }
    }

    /// The block of a slot that was found is not taken from there.
    fn leave(&mut self, slot: u32) {
        self.host.release(slot);
        self.recovery.untaken.push(slot);
    }

    /// This lies on the disk.
    pub fn found_on_disk(&mut self, piece: HeaderPiece) {
        if let Some(disk) = &mut self.disk {
            disk.holds(piece.device(), piece.held_sectors());
        }
        self.recovery.pieces.push_back(piece);
    }

    /// No more will be found on the disk.
    pub fn disk_was_read(&mut self) {
        self.recovery.all_read = true;
    }

    /// Whether what the disk held is still being taken back.
    pub fn is_recovering(&self) -> bool {
        self.disk.as_ref().is_some_and(DiskSlots::is_recovering)
    }

    /// Takes back up to `budget` more blocks of what was found. Says how many headers were looked at: none
    /// when it is over, or there is none yet.
    pub fn recover_some(&mut self, budget: u32) -> u32 {
        if !self.is_recovering() {
            return 0;
        }
        let forgotten = self.disk.as_ref().is_some_and(DiskSlots::is_forgotten);
        let mut count = 0;
        while count < budget {
            if forgotten {
                // A reset: nothing of it is wanted, and its headers go as soon as all are here.
                self.recovery.pieces.clear();
                self.recovery.next = 0;
            }
            if let Some(header) = self.recovery.next_found() {
                if let Some(piece) = self.recovery.pieces.front() {
                    self.fetch_ahead(Tier::Disk, piece.headers(), self.recovery.next);
                }
                self.take(&header, true);
            } else if !self.recovery.all_read {
                break;
            } else if !forgotten && self.recovery.late_depth < DEPTHS {
                self.adopt_orphans(self.recovery.late_depth as u32);
                match self.recovery.next_late() {
                    Some(header) => {
                        let late = &self.recovery.late[self.recovery.late_depth];
                        self.fetch_ahead(Tier::Disk, late, self.recovery.late_next);
                        self.take(&header, false);
                    }
                    None => self.recovery.next_depth(),
                }
            } else if !self.disk.as_mut().is_some_and(|disk| disk.sweep(SWEEP)) {
                self.forget_orphans();
                self.recovery = Recovery { recovered: self.recovery.recovered, ..Recovery::default() };
                if let Some(disk) = &mut self.disk {
                    disk.end_recovery();
                }
                return count + 1;
            }
            count += 1;
        }
        count
    }

    /// Every lookup of a big index misses the caches: several are under way at a time.
    fn fetch_ahead(&self, tier: Tier, headers: &[Header], next: usize) {
        const AHEAD: usize = 12;
        // A parent that comes right before is at hand.
        let parent_of = |at: usize| {
            let header = headers.get(at)?;
            (headers[at - 1].key != header.parent).then_some(header.parent)
        };
        if let Some(header) = headers.get(next + 3 * AHEAD) {
            self.index.prefetch(header.key);
        }
        if let Some(parent) = parent_of(next + 3 * AHEAD) {
            self.index.prefetch(parent);
        }
        if let Some(parent) = parent_of(next + 2 * AHEAD) {
            self.index.prefetch_parent(tier, parent);
        }
        if let Some(parent) = parent_of(next + AHEAD) {
            self.index.prefetch_neighbours(tier, parent);
        }
    }

    fn take(&mut self, header: &Header, parent_may_follow: bool) {
        let block = match self.adopt(Tier::Disk, header) {
            Adopted::Yes(id) => Some(id),
            Adopted::No => None,
            Adopted::NoParent => {
                if parent_may_follow {
                    self.recovery.wait_for_parent(header);
                }
                None
            }
        };
        if let Some(disk) = &mut self.disk {
            disk.recovered(header, block);
        }
    }

    /// Blocks of the pool up to this depth whose parent was not there when it was asked.
    fn adopt_orphans(&mut self, depth: u32) {
        while let Some(orphan) = self.recovery.orphans.front().filter(|orphan| orphan.depth <= depth).copied() {
            self.recovery.orphans.pop_front();
            let taken = matches!(self.adopt(Tier::Host, &orphan), Adopted::Yes(_));
            if !taken && !planted::has(Bug::OrphanLeaks) {
                self.host.release(orphan.slot);
            }
        }
    }

    /// The slots that are kept for blocks whose parent may yet come are free: those blocks are forgotten.
    pub(crate) fn forget_orphans(&mut self) {
        for orphan in std::mem::take(&mut self.recovery.orphans) {
            self.host.release(orphan.slot);
        }
    }

    fn adopt(&mut self, tier: Tier, header: &Header) -> Adopted {
        let id = match self.index.find(header.key) {
            Some(id) => {
                let block = self.index.block(id);
                // Somebody stores it anew meanwhile: that is the better copy.
                let filling = matches!(block.place(Tier::Host), Place::Filling(_));
                if block.depth != header.depth || block.place(tier) != Place::Absent || filling {
                    return Adopted::No;
                }
                id
            }
            None => {
                let id = match header.depth {
                    0 => self.index.begin_chain(header.key, header.parent),
                    depth => match self.index.find(header.parent) {
                        Some(id) if self.index.block(id).depth + 1 == depth => {
                            self.index.insert(header.key, Some(id), depth)
                        }
                        _ => return Adopted::NoParent,
                    },
                };
                let Some(id) = id else { return Adopted::No };
                id
            }
        };
        match tier {
            Tier::Host => self.recovery.recovered.host += 1,
            Tier::Disk => self.recovery.recovered.disk += 1,
        }
        self.index.begin(tier, id, header.slot);
        self.index.finish(tier, id);
        self.index.show(id);
        Adopted::Yes(id)
    }
}
