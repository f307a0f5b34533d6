//! Where is it: blocks by key, their chains, and which tier holds them. Pure: no I/O, no time.
//!
//! Blocks form trees, a child one block deeper than its parent. Two invariants carry everything:
//!
//! * A block that is *visible* has a visible parent. So residency along a chain is monotone, and the
//!   longest resident prefix is found by bisection: a match of 256 keys looks at 9.
//! * A block with children stays. So a lease on the deepest block of a prefix protects all of it.
//!
//! A block on which doubt falls is *detached* with all its descendants: no key finds them any more;
//! each goes as soon as nothing holds it.

pub mod evict;
pub mod namespaces;
pub mod table;

use std::collections::VecDeque;
use std::sync::Arc;

use bytemuck::Zeroable;
use kvring_ipc::events::{Event, EventLog};
use kvring_ipc::key::BlockKey;
use kvring_ipc::mapping::Mapping;
use kvring_ipc::recorder::{Recorder, What};

use crate::dma;
use crate::free::Free;
use crate::limits::VICTIM_BUDGET;
use crate::planted::{self, Bug};
use evict::Evict;
use namespaces::Namespaces;
use table::Table;

/// A place in the block table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockId(pub u32);

const NONE: u32 = u32::MAX;

/// A tier that holds slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// The pool.
    Host = 0,
    /// The SSD.
    Disk = 1,
}

/// A block's place in one tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Not there.
    Absent,
    /// A slot is being filled: by writers or a read (host), by a write (disk).
    Filling(u32),
    /// The slot holds its bytes.
    Ready(u32),
}

impl Place {
    /// The slot, if it holds the block's bytes.
    pub fn ready(self) -> Option<u32> {
        match self {
            Self::Ready(slot) => Some(slot),
            _ => None,
        }
    }
}

/// Whether a slot is there, is being filled, or neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable)]
#[repr(u8)]
enum Presence {
    Absent = 0,
    Filling,
    Ready,
}

/// One block: one cache line. All zeros is none: memory that nobody has touched yet.
#[derive(Debug, Clone, Copy, Zeroable)]
#[repr(align(64))]
pub struct Block {
    /// Its key.
    pub key: BlockKey,
    /// Its parent, unless it begins a chain.
    parent: u32,
    first_child: u32,
    next_sibling: u32,
    prev_sibling: u32,
    /// Blocks before it in its chain.
    pub depth: u32,
    slots: [u32; 2],
    presence: [Presence; 2],
    /// Its number: see [`Namespaces`].
    pub namespace: u16,
    /// Children that are ready in each tier.
    children: [u32; 2],
    /// Leases that end at this block.
    pub leases: u16,
    /// Loans of its host slot, and I/O under way.
    pub pins: u16,
    visible: bool,
    detached: bool,
    in_use: bool,
}

impl Block {
    /// Where it is in a tier.
    pub fn place(&self, tier: Tier) -> Place {
        let slot = self.slots[tier as usize];
        match self.presence[tier as usize] {
            Presence::Absent => Place::Absent,
            Presence::Filling => Place::Filling(slot),
            Presence::Ready => Place::Ready(slot),
        }
    }
    fn is_ready(&self, tier: usize) -> bool {
        self.presence[tier] == Presence::Ready
    }
    fn is_filling(&self) -> bool {
        self.presence.contains(&Presence::Filling)
    }
    /// Whether matches may end here.
    pub fn is_visible(&self) -> bool {
        self.visible
    }
    /// Whether it has been forgotten and only waits to be let go.
    pub fn is_detached(&self) -> bool {
        self.detached
    }
    /// Its parent.
    pub fn parent(&self) -> Option<BlockId> {
        (self.parent != NONE).then_some(BlockId(self.parent))
    }
    fn has_children(&self) -> bool {
        self.first_child != NONE
    }
}

const VACANT: Block = Block {
    key: BlockKey::from_words([0, 0]),
    parent: NONE,
    first_child: NONE,
    next_sibling: NONE,
    prev_sibling: NONE,
    depth: 0,
    slots: [0; 2],
    presence: [Presence::Absent; 2],
    namespace: 0,
    children: [0; 2],
    leases: 0,
    pins: 0,
    visible: false,
    detached: false,
    in_use: false,
};

const _: () = assert!(size_of::<Block>() == 64);

/// The index.
#[derive(Debug)]
pub struct Index {
    blocks: dma::Table<Block>,
    free: Free,
    table: Table,
    evict: [Evict; 2],
    /// The slot that the next eviction will probably free: worth fetching what belongs to it.
    pub next_slot: u32,
    /// Slots of blocks that were let go, for their owners to take back.
    pub dropped_slots: Vec<(Tier, u32)>,
    /// Blocks of the pool whose turn came and that cannot go before they are on the SSD, where what continues them is.
    pub stranded: VecDeque<BlockId>,
    /// Which blocks belong together.
    pub namespaces: Namespaces,
    /// Tells whoever listens what can be matched.
    pub log: Option<EventLog>,
    /// Remembers what became of blocks, for whoever asks why one is not there.
    pub recorder: Recorder,
}

/// What an index is made for.
#[derive(Debug, Clone, Copy)]
pub struct IndexOptions {
    /// Slots of the pool.
    pub host_slots: u32,
    /// Slots of the SSD tier.
    pub disk_slots: u32,
    /// Policy of both tiers.
    pub policy: kvring_ipc::config::EvictionPolicy,
    /// SLRU's threshold.
    pub protected_hits: u32,
    /// Folded into every hash.
    pub secret: [u64; 2],
}

impl Index {
    /// An empty index. Everything it will ever need is allocated here.
    pub fn new(options: &IndexOptions) -> Self {
        // A block has a slot in some tier, or it is detached and held by a lease.
        let capacity = options.host_slots as usize + options.disk_slots as usize + crate::limits::LEASES_MAX;
        let evict = |slots| Evict::new(options.policy, options.protected_hits, capacity, slots);
        Self {
            blocks: dma::Table::new(capacity),
            free: Free::all(capacity as u32),
            table: Table::new(capacity, options.secret),
            evict: [evict(options.host_slots), evict(options.disk_slots)],
            next_slot: 0,
            dropped_slots: Vec::with_capacity(options.host_slots as usize + options.disk_slots as usize),
            // Each once, and as many as one look finds of those whose number another block has had before.
            stranded: VecDeque::with_capacity(options.host_slots as usize + 2 * VICTIM_BUDGET as usize),
            namespaces: Namespaces::new(),
            log: None,
            recorder: Recorder::default(),
        }
    }

    /// Where it lies: keys, which are used in no order; blocks; and their links in each tier.
    pub fn tables(&self) -> [Arc<Mapping>; 4] {
        let [host, disk] = &self.evict;
        [self.table.memory(), self.blocks.memory(), host.memory(), disk.memory()]
    }

    /// Blocks known.
    pub fn count(&self) -> usize {
        self.blocks.len() - self.free.len()
    }

    /// A block.
    pub fn block(&self, id: BlockId) -> &Block {
        let block = &self.blocks[id.0 as usize];
        debug_assert!(block.in_use);
        block
    }

    /// The key of a block, or of the one that has its place by now.
    pub fn key_of(&self, id: BlockId) -> BlockKey {
        self.blocks[id.0 as usize].key
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }

    /// The block with this key.
    pub fn find(&self, key: BlockKey) -> Option<BlockId> {
        self.table.find(key, |id| self.blocks[id.0 as usize].key == key)
    }

    /// The deepest visible block of a chain, and its depth plus one: how many blocks are resident.
    pub fn match_chain(&self, count: u32, key_at: impl Fn(u32) -> BlockKey) -> Option<(BlockId, u32)> {
        let visible_at = |depth: u32| {
            let id = self.find(key_at(depth))?;
            let block = self.block(id);
            (block.visible && block.depth == depth).then_some(id)
        };
        // A chain that is wholly there, or not at all, is the common case.
        if let Some(id) = visible_at(count - 1) {
            return Some((id, count));
        }
        let (mut found, mut low, mut high) = (None, 0, count - 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match visible_at(middle) {
                Some(id) => (found, low) = (Some(id), middle + 1),
                None => high = middle,
            }
        }
        found.map(|id| (id, low))
    }

    /// The key that the block's header has as its parent: at depth 0 the namespace's id.
    pub fn parent_key(&self, id: BlockId) -> BlockKey {
        let block = self.block(id);
        block.parent().map_or_else(|| self.namespaces.of(block.namespace).id, |parent| self.block(parent).key)
    }

    /// A match of so many blocks ended at this block.
    pub fn hit(&mut self, id: BlockId, count: u32) {
        let namespace = self.block(id).namespace;
        self.namespaces.of_mut(namespace).hits += u64::from(count);
        self.touch(id);
    }

    fn touch(&mut self, id: BlockId) {
        for tier in [Tier::Host, Tier::Disk] {
            if self.block(id).place(tier).ready().is_some() {
                self.evict[tier as usize].touch(id);
            }
        }
    }

    /// Every block that a key finds. O(capacity).
    pub fn blocks(&self) -> impl Iterator<Item = (BlockId, &Block)> {
        let known = (0..).zip(self.blocks.iter()).filter(|(_, block)| block.in_use && !block.detached);
        known.map(|(id, block)| (BlockId(id), block))
    }

    /// Blocks that a key finds among `places` of the index from `from` on.
    pub fn blocks_at(&self, from: u32, places: u32) -> impl Iterator<Item = &Block> {
        let known = self.blocks.iter().skip(from as usize).take(places as usize);
        known.filter(|block| block.in_use && !block.detached)
    }

    /// Places that there are for blocks.
    pub fn capacity(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Adds the first block of a chain, of a namespace. `None` if the table is full.
    pub fn begin_chain(&mut self, key: BlockKey, namespace: BlockKey) -> Option<BlockId> {
        let id = self.insert(key, None, 0)?;
        let number = self.namespaces.number_of(namespace);
        self.namespaces.take_block(0);
        self.namespaces.add_block(number);
        self.block_mut(id).namespace = number;
        Some(id)
    }

    /// Adds a block that no key finds yet, after `parent`. `None` if the table is full.
    pub fn insert(&mut self, key: BlockKey, parent: Option<BlockId>, depth: u32) -> Option<BlockId> {
        let id = BlockId(self.free.pop()?);
        let namespace = parent.map_or(0, |parent| self.block(parent).namespace);
        self.namespaces.add_block(namespace);
        let mut block = Block { key, depth, namespace, in_use: true, ..VACANT };
        if let Some(parent) = parent {
            let sibling = self.block(parent).first_child;
            (block.parent, block.next_sibling) = (parent.0, sibling);
            if sibling != NONE {
                self.blocks[sibling as usize].prev_sibling = id.0;
            }
            self.block_mut(parent).first_child = id.0;
        }
        self.blocks[id.0 as usize] = block;
        self.table.insert(key, id);
        Some(id)
    }

    /// A slot of a tier is being filled for this block.
    pub fn begin(&mut self, tier: Tier, id: BlockId, slot: u32) {
        let block = self.block_mut(id);
        assert!(block.presence[tier as usize] == Presence::Absent);
        (block.presence[tier as usize], block.slots[tier as usize]) = (Presence::Filling, slot);
    }

    /// The slot being filled is full: the tier holds the block now.
    pub fn finish(&mut self, tier: Tier, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.presence[tier as usize] == Presence::Filling, "only what fills can be full");
        block.presence[tier as usize] = Presence::Ready;
        let (parent, key) = (block.parent(), block.key);
        self.evict[tier as usize].insert(id, self.table.fingerprint(key));
        if let Some(parent) = parent {
            self.block_mut(parent).children[tier as usize] += 1;
            self.evict[tier as usize].park(parent);
        }
        // With a second copy, the first may go now.
        self.unpark(id, false);
    }

    /// Whether a block lies in a slot of a tier, if there is such a block at all.
    pub fn is_at(&self, id: BlockId, tier: Tier, slot: u32) -> bool {
        let block = &self.blocks[id.0 as usize];
        block.in_use && block.place(tier) == Place::Ready(slot)
    }

    /// The slot of a block that is stranded, if it still is, and if there is such a block at all.
    pub fn stranded_in(&self, id: BlockId) -> Option<u32> {
        let block = &self.blocks[id.0 as usize];
        (block.in_use && is_stranded(block)).then_some(block.slots[Tier::Host as usize])
    }

    /// Lets go of a detached block if nothing holds it any more.
    pub fn settle(&mut self, id: BlockId) {
        self.let_go_upwards(id);
    }

    /// The filling failed; the slot is the caller's again.
    pub fn fail(&mut self, tier: Tier, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.presence[tier as usize] == Presence::Filling);
        block.presence[tier as usize] = Presence::Absent;
    }

    /// A block's bytes are in another slot of the tier; the one before is the caller's again.
    pub fn relocate(&mut self, tier: Tier, id: BlockId, slot: u32) {
        let block = self.block_mut(id);
        assert!(block.is_ready(tier as usize), "only what is there can move");
        block.slots[tier as usize] = slot;
    }

    /// Takes a block's bytes out of a tier; the slot is the caller's again.
    pub fn leave(&mut self, tier: Tier, id: BlockId) -> u32 {
        let t = tier as usize;
        let block = self.block_mut(id);
        assert!(block.is_ready(t), "only what is there can leave");
        block.presence[t] = Presence::Absent;
        let slot = block.slots[t];
        let parent = block.parent();
        self.evict[t].remove(id);
        if let Some(parent) = parent {
            self.evict[t].child_left(parent, id);
            self.block_mut(parent).children[t] -= 1;
            self.unpark(parent, false);
        }
        slot
    }

    /// A block has become complete: it is visible if its parent is, and then so are its complete
    /// descendants.
    pub fn show(&mut self, id: BlockId) {
        let parent_visible = self.block(id).parent().is_none_or(|parent| self.block(parent).visible);
        if !parent_visible || !self.is_complete(id) {
            return;
        }
        self.set_visible(id);
        // Down into every complete child, in the tree's own links: no stack, no allocation.
        let mut at = id;
        loop {
            let mut next = self.block(at).first_child;
            while next == NONE || self.block(BlockId(next)).visible || !self.is_complete(BlockId(next)) {
                if next != NONE {
                    next = self.block(BlockId(next)).next_sibling;
                    continue;
                }
                if at == id {
                    return;
                }
                next = self.block(at).next_sibling;
                at = BlockId(self.block(at).parent);
            }
            at = BlockId(next);
            self.set_visible(at);
        }
    }

    fn set_visible(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        let (key, was) = (block.key, std::mem::replace(&mut block.visible, true));
        if let Some(log) = self.log.as_mut().filter(|_| !was) {
            log.write(Event::Stored(key));
        }
    }

    fn told_gone(&mut self, key: BlockKey) {
        if let Some(log) = &mut self.log {
            log.write(Event::Removed(key));
        }
    }

    /// Forgets everything. Says how many blocks no key finds any more.
    pub fn detach_all(&mut self) -> u32 {
        let is_root = |block: &Block| block.in_use && !block.detached && block.parent == NONE;
        (0..self.blocks.len() as u32)
            .fold(0, |count, id| count + if is_root(&self.blocks[id as usize]) { self.detach(BlockId(id)) } else { 0 })
    }

    /// Forgets a namespace. Says how many blocks no key finds any more.
    pub fn detach_namespace(&mut self, number: u16) -> u32 {
        let is_root =
            |block: &Block| block.in_use && !block.detached && block.parent == NONE && block.namespace == number;
        (0..self.blocks.len() as u32)
            .fold(0, |count, id| count + if is_root(&self.blocks[id as usize]) { self.detach(BlockId(id)) } else { 0 })
    }

    /// Blocks that are forgotten, and that somebody holds yet.
    pub fn detached(&self) -> impl Iterator<Item = &Block> {
        self.blocks.iter().filter(|block| block.in_use && block.detached)
    }

    fn is_complete(&self, id: BlockId) -> bool {
        let block = self.block(id);
        !block.detached && (block.is_ready(0) || block.is_ready(1))
    }

    /// Forgets a block and all that continues it. What nothing holds goes at once; its slots are in
    /// `dropped_slots`. Says how many blocks no key finds any more because of it.
    pub fn detach(&mut self, id: BlockId) -> u32 {
        let mut count = 0;
        // Down to a leaf, then leaf by leaf back up: a parent is let go after its children.
        let mut at = id;
        loop {
            if !self.block(at).detached {
                let key = self.block(at).key;
                self.table.remove(key, at);
                let block = self.block_mut(at);
                let was_visible = block.visible;
                (block.detached, block.visible) = (true, false);
                let (has_children, first_child) = (block.has_children(), block.first_child);
                count += 1;
                self.recorder.forgotten(key);
                if was_visible {
                    self.told_gone(key);
                }
                if has_children {
                    at = BlockId(first_child);
                    continue;
                }
            }
            // `at` and everything below it are detached.
            let Block { next_sibling, parent, .. } = *self.block(at);
            let done = at == id;
            self.let_go(at);
            if done {
                return count;
            }
            at = BlockId(if next_sibling != NONE { next_sibling } else { parent });
        }
    }

    /// Frees a detached block, and detached ancestors that only it held, if nothing holds them.
    /// Says whether the block itself went.
    fn let_go(&mut self, id: BlockId) -> bool {
        let block = self.block(id);
        let filling = block.is_filling();
        if !block.detached || block.has_children() || block.leases > 0 || block.pins > 0 || filling {
            return false;
        }
        for tier in [Tier::Host, Tier::Disk] {
            if self.block(id).place(tier).ready().is_some() {
                let slot = self.leave(tier, id);
                self.dropped_slots.push((tier, slot));
            }
        }
        self.free_block(id);
        true
    }

    /// Lets go of a detached block and then of each ancestor that waited for it.
    fn let_go_upwards(&mut self, id: BlockId) {
        let mut at = Some(id);
        while let Some(id) = at {
            at = self.block(id).parent();
            if !self.let_go(id) {
                return;
            }
        }
    }

    fn free_block(&mut self, id: BlockId) {
        let Block { parent, prev_sibling, next_sibling, namespace, .. } = *self.block(id);
        self.namespaces.take_block(namespace);
        match prev_sibling {
            NONE if parent != NONE => self.blocks[parent as usize].first_child = next_sibling,
            NONE => {}
            prev => self.blocks[prev as usize].next_sibling = next_sibling,
        }
        if next_sibling != NONE {
            self.blocks[next_sibling as usize].prev_sibling = prev_sibling;
        }
        self.blocks[id.0 as usize].in_use = false;
        self.free.push(id.0);
        if parent != NONE {
            self.unpark(BlockId(parent), false);
        }
    }

    /// A lease ends at this block from now on.
    pub fn lease(&mut self, id: BlockId) -> bool {
        let block = self.block_mut(id);
        let Some(leases) = block.leases.checked_add(1) else { return false };
        block.leases = leases;
        true
    }

    /// One lease less.
    pub fn unlease(&mut self, id: BlockId) {
        self.block_mut(id).leases -= 1;
        self.unpark(id, true);
        self.let_go_upwards(id);
    }

    /// Its host slot is on loan, or an I/O uses it. False if it is as often as can be counted.
    pub fn pin(&mut self, id: BlockId) -> bool {
        let block = self.block_mut(id);
        let Some(pins) = block.pins.checked_add(1) else { return false };
        block.pins = pins;
        true
    }

    /// One use less.
    pub fn unpin(&mut self, id: BlockId) {
        self.block_mut(id).pins -= 1;
        self.unpark(id, true);
        self.let_go_upwards(id);
    }

    /// Puts a block back in line, in each tier where it waited outside and may go now.
    pub fn unpark(&mut self, id: BlockId, used: bool) {
        for tier in [Tier::Host, Tier::Disk] {
            let block = self.block(id);
            let may_go = may_leave(block, tier) || tier == Tier::Host && is_stranded(block);
            if may_go && self.evict[tier as usize].is_parked(id) {
                self.evict[tier as usize].unpark(id, used);
            }
        }
    }

    /// Makes room in a tier: the next block to go leaves it, and is gone if it was nowhere else. Its
    /// slot is the caller's. What is [`Index::stranded`] is put aside.
    pub fn evict(&mut self, tier: Tier) -> Option<u32> {
        // Nothing is allocated here. So many are there only if most are stranded no more: a few polls drop those.
        if self.stranded.len() + VICTIM_BUDGET as usize > self.stranded.capacity() {
            return None;
        }
        let (blocks, table, stranded) = (&self.blocks, &self.table, &mut self.stranded);
        let id = self.evict[tier as usize].victim(
            VICTIM_BUDGET,
            |id| {
                let block = &blocks[id.0 as usize];
                let may = may_leave(block, tier);
                if !may && tier == Tier::Host && is_stranded(block) {
                    stranded.push_back(id);
                }
                may
            },
            |id| table.fingerprint(blocks[id.0 as usize].key),
            |first, second| {
                // Fetched when it was second: what it leads to can be fetched now.
                let block = &blocks[first.0 as usize];
                table.prefetch(block.key);
                if block.parent != NONE {
                    dma::prefetch(&blocks[block.parent as usize]);
                }
                if let Some(second) = second {
                    dma::prefetch(&blocks[second.0 as usize]);
                }
            },
        )?;
        self.fetch_after(tier, id);
        Some(self.let_out(tier, id))
    }

    /// A block that may leave a tier does, and is gone if it was nowhere else. Its slot is the caller's.
    fn let_out(&mut self, tier: Tier, id: BlockId) -> u32 {
        let slot = self.leave(tier, id);
        let block = self.block(id);
        let (key, is_gone) = (block.key, block.presence == [Presence::Absent; 2]);
        self.recorder.block(What::Evicted, key, tier as u8, u32::from(!is_gone));
        let block = self.block(id);
        if is_gone {
            // A leaf without lease or pin, by `may_leave`: it goes at once.
            let Block { key, detached, visible, namespace, .. } = *block;
            self.namespaces.of_mut(namespace).evicted += 1;
            if !detached {
                self.table.remove(key, id);
            }
            if visible {
                self.told_gone(key);
            }
            self.free_block(id);
        }
        slot
    }

    /// The end of a chain that continues a stranded block goes from the SSD, and is gone: its slot is the caller's, and with
    /// it comes the block before it. It is looked for from `at` on. None: there is none, it may not go, or it is
    /// further than so many steps.
    pub fn strip(&mut self, stranded: BlockId, at: BlockId, steps: &mut u32) -> Option<(u32, BlockId)> {
        let mut at = at;
        while self.block(at).has_children() {
            *steps = steps.checked_sub(1)?;
            at = BlockId(self.block(at).first_child);
        }
        let block = self.block(at);
        let is_there_alone = block.presence == [Presence::Absent, Presence::Ready];
        if at == stranded || !is_there_alone || !may_leave(block, Tier::Disk) {
            return None;
        }
        let parent = block.parent()?;
        Some((self.let_out(Tier::Disk, at), parent))
    }

    /// Evictions come in rows, mostly up a chain: a parent is next in line once its last child is gone.
    /// The parent's block is here by now, fetched when it was a grandparent: its place in the table
    /// and its slot can be fetched, and the block of the one after it.
    fn fetch_after(&mut self, tier: Tier, id: BlockId) {
        let [next, second] = match self.block(id).parent() {
            Some(parent) => [Some(parent), self.block(parent).parent()],
            None => self.evict[tier as usize].after(id),
        };
        if let Some(next) = next {
            let block = &self.blocks[next.0 as usize];
            self.table.prefetch(block.key);
            self.next_slot = block.slots[tier as usize];
            self.evict[tier as usize].prefetch_ghost(self.table.fingerprint(block.key));
        }
        if let Some(second) = second {
            dma::prefetch(&self.blocks[second.0 as usize]);
            self.evict[tier as usize].prefetch(second);
        }
    }

    /// Brings a key's place closer, for a lookup that comes soon.
    pub fn prefetch(&self, key: BlockKey) {
        self.table.prefetch(key);
        self.evict[Tier::Host as usize].prefetch_ghost(self.table.fingerprint(key));
    }

    /// Brings a block closer that soon gets a child; the place of its key has come.
    pub fn prefetch_parent(&self, tier: Tier, key: BlockKey) {
        if let Some(id) = self.table.find_by_hash(key) {
            dma::prefetch(&self.blocks[id.0 as usize]);
            self.evict[tier as usize].prefetch(id);
        }
    }

    /// And what stands beside it in the tier's lists; its own place there has come.
    pub fn prefetch_neighbours(&self, tier: Tier, key: BlockKey) {
        if let Some(id) = self.table.find_by_hash(key) {
            self.evict[tier as usize].prefetch_neighbours(id);
        }
    }

    /// Checks that nobody uses a block. Says how many slots of each tier hold one.
    ///
    /// # Panics
    /// If somebody does.
    pub fn check_at_rest(&self) -> [u32; 2] {
        let mut held = [0, 0];
        for block in self.blocks.iter().filter(|block| block.in_use) {
            assert!(
                block.leases == 0 && block.pins == 0 && !block.detached && !block.is_filling(),
                "in use at rest: {block:?}"
            );
            for tier in [0, 1] {
                held[tier] += u32::from(block.is_ready(tier));
            }
        }
        held
    }

    /// Checks every invariant: O(blocks), for tests and simulations.
    ///
    /// # Panics
    /// If one is broken.
    pub fn check(&self) {
        let (mut in_use, mut namespaces) = (0, vec![0; self.namespaces.all().len()]);
        for (at, block) in self.blocks.iter().enumerate().filter(|(_, block)| block.in_use) {
            let id = BlockId(at as u32);
            in_use += 1;
            namespaces[usize::from(block.namespace)] += 1;
            let mut children = [0, 0];
            let mut child = block.first_child;
            while child != NONE {
                let c = self.block(BlockId(child));
                assert!(c.parent == id.0 && c.depth == block.depth + 1);
                for tier in [0, 1] {
                    children[tier] += u32::from(c.is_ready(tier));
                }
                child = c.next_sibling;
            }
            assert_eq!(children, block.children, "counted children are the children");
            if let Some(parent) = block.parent() {
                assert_eq!(block.namespace, self.block(parent).namespace, "a chain is of one namespace");
                assert!(!block.visible || self.block(parent).visible, "a visible block has a visible parent");
                assert!(block.detached || !self.block(parent).detached, "what continues a detached block is detached");
            }
            assert_eq!(self.find(block.key) == Some(id), !block.detached, "a key finds what is not detached");
            if block.visible {
                assert!(self.is_complete(id), "what is visible has its bytes somewhere");
            }
            for tier in [Tier::Host, Tier::Disk] {
                let parked = self.evict[tier as usize].is_parked(id);
                let ready = block.place(tier).ready().is_some();
                assert!(ready || parked, "only what is in a tier is in its lists");
                assert!(!(ready && parked && may_leave(block, tier)), "what may go is in line");
            }
            assert!(
                !block.detached || block.has_children() || block.leases + block.pins > 0 || block.is_filling(),
                "something holds a detached block"
            );
        }
        assert_eq!(in_use, self.count());
        let counted: Vec<u32> = self.namespaces.all().iter().map(|namespace| namespace.blocks).collect();
        assert_eq!(namespaces, counted, "blocks of each namespace");
    }
}

/// Whether a block is in the pool alone, and what continues it on the SSD alone: without its bytes there it cannot go.
fn is_stranded(block: &Block) -> bool {
    let [host, disk] = block.presence;
    let is_here_alone = host == Presence::Ready && disk == Presence::Absent && block.children[0] == 0;
    is_here_alone && block.children[1] > 0 && block.pins == 0 && !block.detached && !planted::has(Bug::StrandedStays)
}

/// Whether a block's bytes may leave a tier now.
fn may_leave(block: &Block, tier: Tier) -> bool {
    let elsewhere = block.is_ready(1 - tier as usize);
    block.is_ready(tier as usize)
        && block.pins == 0
        && (block.children[tier as usize] == 0 || planted::has(Bug::ParentBeforeChild))
        && (elsewhere || (!block.has_children() && (block.leases == 0 || planted::has(Bug::LeaseIgnored))))
}

#[cfg(test)]
#[path = "index_test.rs"]
mod test;
