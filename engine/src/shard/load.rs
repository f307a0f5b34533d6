//! Loads under way: a fixed table, and for each slot being read the loads that wait for it.

use kvring_ipc::key::BlockKey;
use kvring_ipc::wire::{BATCH_BLOCKS_MAX, Grant, LeaseId, Status, Tag};

use crate::index::BlockId;
use crate::limits::LOADS_MAX;

const BATCH: usize = BATCH_BLOCKS_MAX as usize;
const NONE: u32 = u32::MAX;

/// One load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Index of its session; `None` once that is gone.
    pub session: Option<usize>,
    /// Its name.
    pub tag: Tag,
    /// The lease that covers it, and whose that is.
    pub lease: LeaseId,
    /// See `lease`.
    pub instance: u32,
    /// Depth of its first block.
    pub first: u32,
    /// Its blocks; valid as long as the lease is.
    pub blocks: [BlockId; BATCH],
    /// How many.
    pub count: u32,
    /// The first that was not started yet.
    pub next: u32,
    /// Blocks that were answered.
    pub answered: u32,
    /// Of those, blocks that it got.
    pub served: u32,
    /// How the last one ended that it did not get.
    pub failed: Status,
    /// Whether some were read from the disk.
    pub from_disk: bool,
    /// When it was picked up.
    pub began_ns: u64,
    /// Key of its first block.
    pub key: BlockKey,
    /// Completions it may still need.
    pub rooms: u32,
    /// When its unstarted blocks are answered busy.
    pub deadline_ns: u64,
    /// No further block is started.
    pub cancelled: bool,
    in_use: bool,
}

/// What a load begins with, beside its blocks.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Its name.
    pub tag: Tag,
    /// Index of its session.
    pub session: usize,
    /// The lease that covers it.
    pub lease: LeaseId,
    /// Whose lease that is.
    pub instance: u32,
    /// Depth of its first block.
    pub first: u32,
    /// When it was picked up.
    pub began_ns: u64,
    /// Key of its first block.
    pub key: BlockKey,
    /// When its unstarted blocks are answered busy.
    pub deadline_ns: u64,
}

/// A block of a load that waits for a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiter {
    /// Which load.
    pub load: u32,
    /// Which of its blocks.
    pub index: u32,
}

/// All loads.
#[derive(Debug)]
pub struct Loads {
    loads: Box<[Load]>,
    free: Vec<u32>,
    /// First waiter for each host slot; the others follow in `next_waiter`.
    first_waiter: Box<[u32]>,
    next_waiter: Box<[u32]>,
}

impl Loads {
    /// None yet, over this many host slots.
    pub fn new(host_slots: u32) -> Self {
        let vacant = Load {
            session: None,
            tag: Tag(0),
            lease: LeaseId(0),
            instance: 0,
            first: 0,
            blocks: [BlockId(0); BATCH],
            count: 0,
            next: 0,
            answered: 0,
            served: 0,
            failed: Status::Ok,
            from_disk: false,
            began_ns: 0,
            key: BlockKey::default(),
            rooms: 0,
            deadline_ns: 0,
            cancelled: false,
            in_use: false,
        };
        Self {
            loads: vec![vacant; LOADS_MAX].into_boxed_slice(),
            free: (0..LOADS_MAX as u32).rev().collect(),
            first_waiter: vec![NONE; host_slots as usize].into_boxed_slice(),
            next_waiter: vec![NONE; LOADS_MAX * BATCH].into_boxed_slice(),
        }
    }

    /// Whether another load fits.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether any load is under way.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.loads.len()
    }

    /// Begins a load. The caller has seen `has_room`.
    pub fn begin(&mut self, asked: Asked, blocks: &[BlockId]) -> u32 {
        let Some(at) = self.free.pop() else { unreachable!("room was seen") };
        let load = &mut self.loads[at as usize];
        load.blocks[..blocks.len()].copy_from_slice(blocks);
        let count = blocks.len() as u32;
        *load = Load {
            session: Some(asked.session),
            tag: asked.tag,
            lease: asked.lease,
            instance: asked.instance,
            first: asked.first,
            count,
            next: 0,
            answered: 0,
            served: 0,
            failed: Status::Ok,
            from_disk: false,
            began_ns: asked.began_ns,
            key: asked.key,
            rooms: count,
            deadline_ns: asked.deadline_ns,
            cancelled: false,
            in_use: true,
            blocks: load.blocks,
        };
        at
    }

    /// A load under way.
    pub fn get(&mut self, at: u32) -> &mut Load {
        let load = &mut self.loads[at as usize];
        assert!(load.in_use);
        load
    }

    /// The load is answered in full.
    pub fn end(&mut self, at: u32) {
        self.loads[at as usize].in_use = false;
        self.free.push(at);
    }

    /// Loads under way for which `is` holds, from `from` on.
    pub fn next_where(&self, from: u32, is: impl Fn(&Load) -> bool) -> Option<u32> {
        (from..self.loads.len() as u32).find(|at| self.loads[*at as usize].in_use && is(&self.loads[*at as usize]))
    }

    /// A block of a load waits for the read into a host slot.
    pub fn wait(&mut self, host_slot: u32, waiter: Waiter) {
        let place = waiter.load * BATCH_BLOCKS_MAX + waiter.index;
        self.next_waiter[place as usize] = self.first_waiter[host_slot as usize];
        self.first_waiter[host_slot as usize] = place;
    }

    /// One of those that wait for a host slot: who came last.
    pub fn first_waiter(&self, host_slot: u32) -> Option<Waiter> {
        let place = self.first_waiter[host_slot as usize];
        (place != NONE).then_some(Waiter { load: place / BATCH_BLOCKS_MAX, index: place % BATCH_BLOCKS_MAX })
    }

    /// Takes one of those that wait for a host slot.
    pub fn next_waiter(&mut self, host_slot: u32) -> Option<Waiter> {
        let place = self.first_waiter[host_slot as usize];
        if place == NONE {
            return None;
        }
        self.first_waiter[host_slot as usize] = self.next_waiter[place as usize];
        Some(Waiter { load: place / BATCH_BLOCKS_MAX, index: place % BATCH_BLOCKS_MAX })
    }
}

/// A block's place in the write-back queue: worthless if the slot has moved on since.
#[derive(Debug, Clone, Copy)]
pub struct Dirty {
    /// Where it was.
    pub grant: Grant,
    /// What it was.
    pub block: BlockId,
}
