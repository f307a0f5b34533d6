//! Who goes next, for one tier: seven policies over the same intrusive lists. Pure; knows blocks only
//! by number and does not know why one may not go.
//!
//! Only a block without children in the tier may go, so a match needs to touch one block, the deepest:
//! what its ancestors earned by it they inherit when it goes ([`Evict::child_left`]).
//! A block whose turn comes while it may not go is *parked*, out of every list; whoever lifts the
//! obstacle puts it back ([`Evict::unpark`]). So every step over a block is paid for by its last
//! insertion, and evicting n blocks costs O(n) whatever the tier holds.

use std::sync::Arc;

use bytemuck::Zeroable;
use kvring_ipc::config::EvictionPolicy;
use kvring_ipc::mapping::Mapping;

use super::BlockId;
use crate::dma;

const NONE: u32 = u32::MAX;
/// No list: of a link that nobody has written yet as well.
const PARKED: u16 = 0;
/// LFU's buckets, by hits; hits beyond share the last one.
const BUCKETS: u16 = 255;
/// S3-FIFO's two queues, SLRU's two segments.
const SMALL: u16 = 1;
const MAIN: u16 = 2;

#[derive(Debug, Clone, Copy, Zeroable)]
struct Link {
    prev: u32,
    next: u32,
    /// Matches that ended at this block or at a descendant that is gone from the tier.
    hits: u32,
    /// The list it is in, or PARKED.
    list: u16,
    /// The list it was in when it was parked.
    home: u16,
}

#[derive(Debug, Clone, Copy)]
struct List {
    front: u32,
    back: u32,
    count: u32,
}

/// One tier's order of eviction.
#[derive(Debug)]
pub struct Evict {
    policy: EvictionPolicy,
    protected_hits: u32,
    links: dma::Table<Link>,
    /// By number; there is none with PARKED's.
    lists: Box<[List]>,
    /// S3-FIFO: fingerprints of blocks that left the small queue, one a place, the newest wins.
    ghosts: Box<[u64]>,
    slots_count: u32,
}

impl Evict {
    /// For `blocks` blocks that may be known and `slots_count` that the tier holds.
    pub fn new(policy: EvictionPolicy, protected_hits: u32, blocks: usize, slots_count: u32) -> Self {
        let lists = match policy {
            EvictionPolicy::Lfu => BUCKETS,
            EvictionPolicy::Slru | EvictionPolicy::S3Fifo => MAIN,
            _ => SMALL,
        };
        let ghosts = if policy == EvictionPolicy::S3Fifo { (slots_count as usize).next_power_of_two() } else { 0 };
        Self {
            policy,
            protected_hits,
            links: dma::Table::new(blocks),
            lists: vec![List { front: NONE, back: NONE, count: 0 }; usize::from(lists) + 1].into_boxed_slice(),
            ghosts: vec![0; ghosts].into_boxed_slice(),
            slots_count,
        }
    }

    /// Where it lies.
    pub fn memory(&self) -> Arc<Mapping> {
        self.links.memory()
    }

    /// A block has come into the tier. `fingerprint` names its key to the ghosts.
    pub fn insert(&mut self, block: BlockId, fingerprint: u64) {
        assert!(self.links[block.0 as usize].list == PARKED, "a block comes once");
        let (hits, list) = match self.policy {
            EvictionPolicy::Lfu => (1, 1),
            EvictionPolicy::S3Fifo if self.is_ghost(fingerprint) => (0, MAIN),
            _ => (0, SMALL),
        };
        self.links[block.0 as usize].hits = hits;
        self.push_front(block.0, list);
    }

    /// A match ended at this block of the tier.
    pub fn touch(&mut self, block: BlockId) {
        let link = &mut self.links[block.0 as usize];
        link.hits = link.hits.saturating_add(1);
        let hits = link.hits;
        match self.policy {
            EvictionPolicy::Lru | EvictionPolicy::Mru => self.move_front(block.0, SMALL),
            EvictionPolicy::Lfu => self.move_front(block.0, bucket(hits)),
            EvictionPolicy::Slru => self.move_front(block.0, self.segment(hits)),
            EvictionPolicy::Fifo | EvictionPolicy::Filo | EvictionPolicy::S3Fifo => {}
        }
    }

    /// A block leaves the tier, for whatever reason.
    pub fn remove(&mut self, block: BlockId) {
        if self.links[block.0 as usize].list != PARKED {
            self.unlink(block.0);
        }
    }

    /// A block has got a child in the tier, so it may not go: parked now, while its line is at hand, and
    /// not met again when its turn comes.
    pub fn park(&mut self, block: BlockId) {
        self.remove(block);
    }

    /// A child leaves the tier: what it earned is its parent's.
    pub fn child_left(&mut self, parent: BlockId, child: BlockId) {
        let earned = self.links[child.0 as usize].hits;
        let link = &mut self.links[parent.0 as usize];
        link.hits = match self.policy {
            EvictionPolicy::S3Fifo => link.hits.max(earned),
            _ => link.hits.saturating_add(earned),
        };
    }

    /// Whether the block waits outside the lists for an obstacle to be lifted.
    pub fn is_parked(&self, block: BlockId) -> bool {
        self.links[block.0 as usize].list == PARKED
    }

    /// A parked block may go now. `used` says that it was in use until now, by a lease or an I/O;
    /// otherwise its last child has left, and it is next in line: whatever was due before it is gone.
    pub fn unpark(&mut self, block: BlockId, used: bool) {
        let link = self.links[block.0 as usize];
        match self.policy {
            EvictionPolicy::Lru if used => self.push_front(block.0, SMALL),
            EvictionPolicy::Lru | EvictionPolicy::Fifo => self.push_back(block.0, SMALL),
            EvictionPolicy::Mru | EvictionPolicy::Filo => self.push_front(block.0, SMALL),
            EvictionPolicy::Lfu if used => self.push_front(block.0, bucket(link.hits)),
            EvictionPolicy::Lfu => self.push_back(block.0, bucket(link.hits)),
            EvictionPolicy::Slru if used => self.push_front(block.0, self.segment(link.hits)),
            EvictionPolicy::Slru => self.push_back(block.0, self.segment(link.hits)),
            EvictionPolicy::S3Fifo => self.push_back(block.0, link.home),
        }
    }

    /// The next block to go, taken out of the lists: whoever asks evicts it or unparks it. `None` if
    /// nothing may go, or `budget` places were looked at. `fetch` is told which come
    /// next and next but one.
    pub fn victim(
        &mut self,
        mut budget: u32,
        mut may_go: impl FnMut(BlockId) -> bool,
        fingerprint: impl Fn(BlockId) -> u64,
        fetch: impl Fn(BlockId, Option<BlockId>),
    ) -> Option<BlockId> {
        while budget > 0 {
            budget -= 1;
            let (block, list) = self.next_in_line()?;
            if let [Some(first), second] = self.after(BlockId(block)) {
                second.inspect(|second| self.prefetch(*second));
                fetch(first, second);
            }
            self.unlink(block);
            if !may_go(BlockId(block)) {
                continue;
            }
            if self.policy == EvictionPolicy::S3Fifo && self.stays(block, list, fingerprint(BlockId(block))) {
                continue;
            }
            return Some(BlockId(block));
        }
        None
    }

    /// Brings what is remembered of a key closer.
    pub fn prefetch_ghost(&self, fingerprint: u64) {
        if let Some(ghost) = self.ghosts.get(fingerprint as usize & self.ghosts.len().wrapping_sub(1)) {
            dma::prefetch(ghost);
        }
    }

    /// Brings a block's place in the lists closer.
    pub fn prefetch(&self, block: BlockId) {
        dma::prefetch(&self.links[block.0 as usize]);
    }

    /// Brings those closer between which the block stands.
    pub fn prefetch_neighbours(&self, block: BlockId) {
        let Link { prev, next, .. } = self.links[block.0 as usize];
        for neighbour in [prev, next] {
            if let Some(link) = self.links.get(neighbour as usize) {
                dma::prefetch(link);
            }
        }
    }

    /// The two that come after `block` in its line, for whoever wants to fetch them ahead.
    pub fn after(&self, block: BlockId) -> [Option<BlockId>; 2] {
        let from_front = matches!(self.policy, EvictionPolicy::Mru | EvictionPolicy::Filo);
        let next = |block: u32| {
            let link = &self.links[block as usize];
            let next = if from_front { link.next } else { link.prev };
            (next != NONE).then_some(next)
        };
        // Unlinking has left its own pointers as they were, and has touched its neighbour's.
        let first = next(block.0);
        let second = first.and_then(next);
        [first.map(BlockId), second.map(BlockId)]
    }

    fn next_in_line(&self) -> Option<(u32, u16)> {
        let back = |list: u16| (self.lists[list as usize].back, list);
        let (block, list) = match self.policy {
            EvictionPolicy::Lru | EvictionPolicy::Fifo => back(SMALL),
            EvictionPolicy::Mru | EvictionPolicy::Filo => (self.lists[SMALL as usize].front, SMALL),
            EvictionPolicy::Lfu => back((1..=BUCKETS).find(|list| self.lists[*list as usize].count > 0)?),
            EvictionPolicy::Slru if self.lists[SMALL as usize].count > 0 => back(SMALL),
            EvictionPolicy::Slru => back(MAIN),
            // The small queue is a tenth of the tier; below that it is left to fill.
            EvictionPolicy::S3Fifo => {
                let [small, main] = [SMALL, MAIN].map(|list| self.lists[list as usize].count);
                let small_full = small > self.slots_count / 10 || main == 0;
                back(if small_full && small > 0 { SMALL } else { MAIN })
            }
        };
        (block != NONE).then_some((block, list))
    }

    /// S3-FIFO (Yang et al., SOSP 2023, algorithm 1): a block that was used gets another round.
    fn stays(&mut self, block: u32, list: u16, fingerprint: u64) -> bool {
        let link = &mut self.links[block as usize];
        if list == SMALL {
            if link.hits > 1 {
                link.hits = 0;
                self.push_front(block, MAIN);
                return true;
            }
            let place = fingerprint as usize & (self.ghosts.len() - 1);
            self.ghosts[place] = fingerprint;
            return false;
        }
        if link.hits == 0 {
            return false;
        }
        link.hits = link.hits.min(3) - 1;
        self.push_front(block, MAIN);
        true
    }

    fn is_ghost(&self, fingerprint: u64) -> bool {
        self.ghosts[fingerprint as usize & (self.ghosts.len() - 1)] == fingerprint
    }

    fn segment(&self, hits: u32) -> u16 {
        if hits >= self.protected_hits { MAIN } else { SMALL }
    }

    fn move_front(&mut self, block: u32, list: u16) {
        // A parked block takes its new place too: should its turn come while its obstacle is still there
        // it is parked again, and if not, it stands where this use put it.
        if self.links[block as usize].list != PARKED {
            self.unlink(block);
        }
        self.push_front(block, list);
    }

    fn push_front(&mut self, block: u32, list: u16) {
        let front = self.lists[list as usize].front;
        let link = &mut self.links[block as usize];
        (link.prev, link.next, link.list, link.home) = (NONE, front, list, list);
        match front {
            NONE => self.lists[list as usize].back = block,
            front => self.links[front as usize].prev = block,
        }
        self.lists[list as usize].front = block;
        self.lists[list as usize].count += 1;
    }

    fn push_back(&mut self, block: u32, list: u16) {
        let back = self.lists[list as usize].back;
        let link = &mut self.links[block as usize];
        (link.prev, link.next, link.list, link.home) = (back, NONE, list, list);
        match back {
            NONE => self.lists[list as usize].front = block,
            back => self.links[back as usize].next = block,
        }
        self.lists[list as usize].back = block;
        self.lists[list as usize].count += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Link { prev, next, list, .. } = self.links[block as usize];
        match prev {
            NONE => self.lists[list as usize].front = next,
            prev => self.links[prev as usize].next = next,
        }
        match next {
            NONE => self.lists[list as usize].back = prev,
            next => self.links[next as usize].prev = prev,
        }
        self.lists[list as usize].count -= 1;
        self.links[block as usize].list = PARKED;
    }
}

fn bucket(hits: u32) -> u16 {
    hits.clamp(1, u32::from(BUCKETS)) as u16
}
