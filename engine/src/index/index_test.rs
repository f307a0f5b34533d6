use super::*;
use kvring_ipc::config::{EVICTION_POLICIES, EvictionPolicy};

fn index(host_slots: u32, policy: EvictionPolicy) -> Index {
    Index::new(&IndexOptions { host_slots, disk_slots: 0, policy, protected_hits: 2, secret: [7, 9] })
}

fn key(n: u64) -> BlockKey {
    BlockKey::from_words([n, 1])
}

/// Stores a chain of `keys` below `parent`, the first at `depth`, in the pool.
fn store(index: &mut Index, parent: Option<BlockId>, depth: u32, keys: &[u64]) -> Vec<BlockId> {
    let mut parent = parent;
    let mut ids = Vec::new();
    for (n, depth) in keys.iter().zip(depth..) {
        let id = index.insert(key(*n), parent, depth).unwrap();
        index.begin(Tier::Host, id, id.0);
        index.finish(Tier::Host, id);
        index.show(id);
        ids.push(id);
        parent = Some(id);
    }
    index.check();
    ids
}

fn resident(index: &Index, keys: &[u64]) -> u32 {
    index.match_chain(keys.len() as u32, |i| key(keys[i as usize])).map_or(0, |(_, count)| count)
}

fn evict_one(index: &mut Index) -> Option<u32> {
    let slot = index.evict(Tier::Host);
    index.check();
    slot
}

#[test]
fn the_longest_prefix_is_found_wherever_it_ends() {
    let mut index = index(100, EvictionPolicy::Lru);
    let chain: Vec<u64> = (0..70).collect();
    for stored in 1..=70 {
        let parent = (stored > 1).then(|| index.find(key(stored - 2)).unwrap());
        store(&mut index, parent, stored as u32 - 1, &[stored - 1]);
        for asked in 1..=chain.len() {
            assert_eq!(resident(&index, &chain[..asked]), (stored as usize).min(asked) as u32);
        }
    }
    assert_eq!(resident(&index, &[500, 0, 1]), 0, "a chain of another root is another chain");
}

#[test]
fn a_parent_goes_after_its_children_under_every_policy() {
    for (name, policy) in EVICTION_POLICIES {
        let mut index = index(100, *policy);
        let trunk = store(&mut index, None, 0, &[0, 1, 2]);
        store(&mut index, Some(trunk[2]), 3, &[10, 11]);
        store(&mut index, Some(trunk[2]), 3, &[20, 21]);
        store(&mut index, None, 0, &[30, 31]);
        index.touch(trunk[1]);
        let mut left = 9;
        while evict_one(&mut index).is_some() {
            left -= 1;
            for chain in [[0, 1, 2, 10, 11], [0, 1, 2, 20, 21]] {
                let depth = resident(&index, &chain) as usize;
                let alone = chain.iter().filter(|n| index.find(key(**n)).is_some()).count();
                assert_eq!(depth, alone, "{name}: a block without its parent");
            }
        }
        assert_eq!((left, index.count()), (0, 0), "{name}: everything can go");
    }
}

#[test]
fn a_leased_prefix_stays_and_goes_when_the_lease_ends() {
    for (name, policy) in EVICTION_POLICIES {
        let mut index = index(100, *policy);
        let ids = store(&mut index, None, 0, &[0, 1, 2, 3]);
        assert!(index.lease(ids[2]));
        assert!(evict_one(&mut index).is_some(), "{name}: the tail is not leased");
        assert_eq!(evict_one(&mut index), None, "{name}: the rest is");
        assert_eq!(resident(&index, &[0, 1, 2, 3]), 3);
        index.unlease(ids[2]);
        while evict_one(&mut index).is_some() {}
        assert_eq!(index.count(), 0, "{name}");
    }
}

/// The order of eviction of single blocks, written down for each policy.
#[test]
fn each_policy_has_its_order() {
    let order = |policy| {
        let mut index = index(4, policy);
        let ids: Vec<_> = (0..4).map(|n| store(&mut index, None, 0, &[n])[0]).collect();
        for (block, times) in [(1, 3), (0, 1), (3, 2), (1, 1)] {
            (0..times).for_each(|_| index.touch(ids[block]));
        }
        std::iter::from_fn(|| evict_one(&mut index))
            .map(|slot| ids.iter().position(|id| id.0 == slot).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(order(EvictionPolicy::Lru), [2, 0, 3, 1]);
    assert_eq!(order(EvictionPolicy::Mru), [1, 3, 0, 2]);
    assert_eq!(order(EvictionPolicy::Fifo), [0, 1, 2, 3]);
    assert_eq!(order(EvictionPolicy::Filo), [3, 2, 1, 0]);
    assert_eq!(order(EvictionPolicy::Lfu), [2, 0, 3, 1]);
    assert_eq!(order(EvictionPolicy::Slru), [2, 0, 3, 1]);
    assert_eq!(order(EvictionPolicy::S3Fifo), [0, 2, 1, 3], "1 and 3 were used twice and get another round");
}

#[test]
fn an_ancestor_inherits_the_recency_of_what_was_used_through_it() {
    let mut index = index(100, EvictionPolicy::Lru);
    let hot = store(&mut index, None, 0, &[0, 1]);
    store(&mut index, None, 0, &[10, 11]);
    index.touch(hot[1]);
    let order: Vec<_> = std::iter::from_fn(|| {
        let before: Vec<u64> = [0, 1, 10, 11].into_iter().filter(|n| index.find(key(*n)).is_some()).collect();
        evict_one(&mut index)?;
        before.into_iter().find(|n| index.find(key(*n)).is_none())
    })
    .collect();
    assert_eq!(order, [11, 10, 1, 0]);
}

#[test]
fn forgetting_takes_the_descendants_and_waits_for_leases() {
    let mut index = index(100, EvictionPolicy::Lru);
    let trunk = store(&mut index, None, 0, &[0, 1, 2]);
    let branch = store(&mut index, Some(trunk[1]), 2, &[10, 11]);
    assert!(index.lease(branch[1]));
    assert_eq!(index.detach(trunk[1]), 4);
    index.check();
    assert_eq!(resident(&index, &[0, 1, 2]), 1);
    assert_eq!(resident(&index, &[0, 1, 10, 11]), 1);
    assert_eq!(index.dropped_slots, [(Tier::Host, trunk[2].0)], "only what nobody holds is gone");
    // The same keys can be stored anew beside the old ones.
    let again = store(&mut index, Some(trunk[0]), 1, &[1, 10]);
    assert_eq!(resident(&index, &[0, 1, 10, 11]), 3);
    index.unlease(branch[1]);
    index.check();
    assert_eq!(index.dropped_slots.len(), 4);
    assert_eq!(index.count(), 3);
    assert!(!index.block(again[1]).is_detached());
}

#[test]
fn a_child_completed_before_its_parent_waits_to_be_seen() {
    let mut index = index(100, EvictionPolicy::Lru);
    let parent = index.insert(key(0), None, 0).unwrap();
    index.begin(Tier::Host, parent, 0);
    store(&mut index, Some(parent), 1, &[1, 2]);
    assert_eq!(resident(&index, &[0, 1, 2]), 0);
    index.finish(Tier::Host, parent);
    index.show(parent);
    index.check();
    assert_eq!(resident(&index, &[0, 1, 2]), 3);
}
