//! Key → block: open addressing, fixed at start, no tombstones, nothing allocated after.
//!
//! Keys are uniform already unless a client lies, so they are folded with a secret of this process:
//! nobody outside can choose keys that collide.

use std::sync::Arc;

use kvring_ipc::key::BlockKey;
use kvring_ipc::mapping::Mapping;

use super::BlockId;
use crate::dma;

/// The table. Knows hashes and ids; keys live in the blocks.
#[derive(Debug)]
pub struct Table {
    /// (lower half of the hash, block plus one or 0 for none). The half is the place's home and more, so that nobody
    /// has to look at a block to know where it belongs.
    places: dma::Table<[u32; 2]>,
    mask: usize,
    secret: [u64; 2],
}

const EMPTY: [u32; 2] = [0; 2];

impl Table {
    /// A table for up to `capacity` blocks, at most two thirds full.
    pub fn new(capacity: usize, secret: [u64; 2]) -> Self {
        // The home of a place is in 32 bits of its hash.
        assert!(capacity < 1 << 31);
        let places = (capacity * 2).next_power_of_two().max(16);
        let places = dma::Table::new(places);
        Self { mask: places.len() - 1, places, secret: [secret[0] | 1, secret[1] | 1] }
    }

    fn hash(&self, key: BlockKey) -> u64 {
        let [low, high] = key.to_words();
        let product = u128::from(low ^ self.secret[0]) * u128::from(high ^ self.secret[1]);
        product as u64 ^ (product >> 64) as u64
    }

    /// Where it lies.
    pub fn memory(&self) -> Arc<Mapping> {
        self.places.memory()
    }

    /// Short name of a key, for the ghosts of S3-FIFO.
    pub fn fingerprint(&self, key: BlockKey) -> u64 {
        self.hash(key)
    }

    /// Brings the place of a key closer, for a `find`, `insert` or `remove` that comes soon.
    pub fn prefetch(&self, key: BlockKey) {
        dma::prefetch(&self.places[self.hash(key) as usize & self.mask]);
    }

    /// The block with this key, if `is` says that one of the candidates has it.
    pub fn find(&self, key: BlockKey, is: impl Fn(BlockId) -> bool) -> Option<BlockId> {
        let hash = self.hash(key);
        let (tag, mut at) = (hash as u32, hash as usize & self.mask);
        loop {
            let [place_tag, block] = self.places[at];
            let block = BlockId(block.checked_sub(1)?);
            if place_tag == tag && is(block) {
                return Some(block);
            }
            at = (at + 1) & self.mask;
        }
    }

    /// A block that probably has this key, by its hash alone.
    pub fn find_by_hash(&self, key: BlockKey) -> Option<BlockId> {
        self.find(key, |_| true)
    }

    /// Adds a block. Its key is not in the table, and the table is not full: the caller's facts.
    pub fn insert(&mut self, key: BlockKey, block: BlockId) {
        let hash = self.hash(key);
        let mut at = hash as usize & self.mask;
        while self.places[at][1] != 0 {
            at = (at + 1) & self.mask;
        }
        self.places[at] = [hash as u32, block.0 + 1];
    }

    /// Removes a block that is in the table. Those behind it move up, so that no gap breaks a search.
    ///
    /// # Panics
    /// If the block is not in the table: our own bug.
    pub fn remove(&mut self, key: BlockKey, block: BlockId) {
        let mut gap = self.hash(key) as usize & self.mask;
        while self.places[gap][1] != block.0 + 1 {
            assert!(self.places[gap][1] != 0, "the block is in the table");
            gap = (gap + 1) & self.mask;
        }
        let mut at = gap;
        loop {
            at = (at + 1) & self.mask;
            let place = self.places[at];
            if place[1] == 0 {
                break;
            }
            let home = place[0] as usize & self.mask;
            // It may move to the gap unless its home lies cyclically in (gap, at].
            if (at.wrapping_sub(home) & self.mask) >= (at.wrapping_sub(gap) & self.mask) {
                self.places[gap] = place;
                gap = at;
            }
        }
        self.places[gap] = EMPTY;
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// The longest way from where a key belongs to where it is.
    fn longest_search(table: &Table) -> usize {
        let used = table.places.iter().enumerate().filter(|(_, place)| place[1] != 0);
        used.map(|(at, place)| at.wrapping_sub(place[0] as usize) & table.mask).max().unwrap_or(0)
    }

    /// Who knows the secret can choose keys that all belong to one place; chosen for another secret they are keys
    /// like any others.
    #[test]
    fn keys_that_collide_under_one_secret_do_not_under_another() {
        const COUNT: u32 = 10_000;
        let known = [0x1234_5678_9abc_def1, 0x0fed_cba9_8765_4321];
        // One factor of the product is zero.
        let chosen = |n: u32| BlockKey::from_words([known[0], u64::from(n)]);
        let search = |secret| {
            let mut table = Table::new(COUNT as usize, secret);
            (0..COUNT).for_each(|n| table.insert(chosen(n), BlockId(n)));
            longest_search(&table)
        };
        assert_eq!(search(known), COUNT as usize - 1, "the worst there is");
        for secret in 0..8u64 {
            let other = [secret.wrapping_mul(0x9e37_79b9_7f4a_7c15), !secret.wrapping_mul(0xd1b5_4a32_d192_ed03)];
            let longest = search(other);
            assert!(longest < 64, "{longest} places under {other:x?}");
        }
    }

    proptest! {
        /// The same calls on the table and on a HashMap, with so few keys that chains form.
        #[test]
        fn it_does_what_a_hash_map_does(steps in prop::collection::vec((any::<bool>(), 0u64..24), 0..400)) {
            let key = |n: u64| BlockKey::from_words([n, n]);
            let key_of = |block: BlockId| key(u64::from(block.0));
            let mut table = Table::new(24, [3, 5]);
            let mut model = HashMap::new();
            for (add, n) in steps {
                let block = BlockId(n as u32);
                if add && model.insert(n, block).is_none() {
                    table.insert(key(n), block);
                } else if !add && model.remove(&n).is_some() {
                    table.remove(key(n), block);
                }
                for n in 0..24 {
                    let found = table.find(key(n), |block| key_of(block) == key(n));
                    prop_assert_eq!(found, model.get(&n).copied());
                }
            }
        }
    }
}
