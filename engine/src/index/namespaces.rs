//! Namespaces: chains whose keys begin at one root, counted together. The first block of a chain names its namespace, and
//! what continues it belongs there.

use std::collections::HashMap;

use kvring_ipc::key::BlockKey;

use crate::limits::NAMESPACES_MAX;

/// What is known of a namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Zeros: of those who name none, or that came when there was no more room.
    pub id: BlockKey,
    /// Blocks there are of it.
    pub blocks: u32,
    /// Blocks that matches have found.
    pub hits: u64,
    /// Blocks that had to go from everywhere.
    pub evicted: u64,
}

/// The namespaces by their numbers. Number 0 is everybody's who names none.
#[derive(Debug)]
pub struct Namespaces {
    all: Vec<Namespace>,
    numbers: HashMap<BlockKey, u16>,
    /// Of those with a name, how many have no block.
    empty: usize,
    /// Where the next one that is empty is looked for.
    hand: usize,
}

impl Namespaces {
    /// None but the one without a name. Everything it will ever need is allocated here.
    pub fn new() -> Self {
        let mut all = Vec::with_capacity(NAMESPACES_MAX);
        all.push(Namespace::default());
        // Four times the room: a table that is less than half full makes room without allocating.
        Self { all, numbers: HashMap::with_capacity(4 * NAMESPACES_MAX), empty: 0, hand: 1 }
    }

    /// All of them.
    pub fn all(&self) -> &[Namespace] {
        &self.all
    }

    /// The namespace with a number.
    pub fn of(&self, number: u16) -> &Namespace {
        &self.all[usize::from(number)]
    }

    pub(super) fn of_mut(&mut self, number: u16) -> &mut Namespace {
        &mut self.all[usize::from(number)]
    }

    pub(super) fn add_block(&mut self, number: u16) {
        let namespace = self.of_mut(number);
        namespace.blocks += 1;
        self.empty -= usize::from(number > 0 && self.of(number).blocks == 1);
    }

    pub(super) fn take_block(&mut self, number: u16) {
        let namespace = self.of_mut(number);
        namespace.blocks -= 1;
        self.empty += usize::from(number > 0 && self.of(number).blocks == 0);
    }

    /// The number of a namespace that has one.
    pub fn find(&self, id: BlockKey) -> Option<u16> {
        if id == BlockKey::default() { Some(0) } else { self.numbers.get(&id).copied() }
    }

    /// The number of a namespace: a new one takes the place of one without blocks, once there are many.
    pub(super) fn number_of(&mut self, id: BlockKey) -> u16 {
        if let Some(number) = self.find(id) {
            return number;
        }
        let fresh = Namespace { id, ..Namespace::default() };
        let number = if self.all.len() < NAMESPACES_MAX {
            self.all.push(fresh);
            self.empty += 1;
            self.all.len() - 1
        } else {
            if self.empty == 0 {
                return 0;
            }
            let mut places = (0..NAMESPACES_MAX - 1).map(|step| 1 + (self.hand + step) % (NAMESPACES_MAX - 1));
            let Some(number) = places.find(|number| self.all[*number].blocks == 0) else { return 0 };
            self.hand = number;
            self.numbers.remove(&self.all[number].id);
            self.all[number] = fresh;
            number
        };
        self.numbers.insert(id, number as u16);
        number as u16
    }
}

impl Default for Namespaces {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_empty_one_makes_room_and_without_any_the_newcomer_has_no_name() {
        let id = |n: u64| BlockKey::from_words([n, 1]);
        let mut namespaces = Namespaces::new();
        let last = NAMESPACES_MAX as u64 - 1;
        for n in 1..=last {
            let number = namespaces.number_of(id(n));
            assert_eq!(u64::from(number), n);
            namespaces.add_block(number);
        }
        assert_eq!(namespaces.number_of(BlockKey::default()), 0);
        assert_eq!(namespaces.number_of(id(1000 + last)), 0, "all are in use");
        namespaces.take_block(700);
        assert_eq!(namespaces.number_of(id(2000 + last)), 700);
        assert_eq!((namespaces.find(id(700)), namespaces.find(id(2000 + last))), (None, Some(700)));
        assert_eq!(namespaces.of(700), &Namespace { id: id(2000 + last), ..Namespace::default() });
    }
}
