//! What no cache can beat: one without end, and Belady's for a capacity (L. A. Belady, "A study of replacement
//! algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966: what is used again last goes first).

use std::collections::{BTreeSet, HashMap, HashSet};

use super::trace::{TraceRequest, keys};

/// Share of blocks that a cache without end finds: leading blocks that an earlier request had.
pub fn infinite(requests: &[TraceRequest]) -> f64 {
    let mut seen = HashSet::new();
    let (mut hit, mut asked) = (0, 0);
    for request in requests {
        let keys = keys(request);
        hit += keys.iter().take_while(|key| seen.contains(*key)).count();
        asked += keys.len();
        seen.extend(keys);
    }
    hit as f64 / asked.max(1) as f64
}

/// Share of blocks that the best cache of `capacity` blocks finds, one that knows what comes.
///
/// Requests come one after another. A block is used whenever one that continues it is, so what is used again last is
/// never in the middle of a chain that stays: the optimum for blocks is one for prefixes.
pub fn belady(requests: &[TraceRequest], capacity: u64) -> f64 {
    const NEVER: u64 = u64::MAX;
    let chains: Vec<Vec<_>> = requests.iter().map(keys).collect();
    // When each use of a block is followed by the next.
    let mut next_use: Vec<Vec<u64>> = chains.iter().map(|chain| vec![NEVER; chain.len()]).collect();
    let mut later = HashMap::new();
    for (at, chain) in chains.iter().enumerate().rev() {
        for (key, next) in chain.iter().zip(&mut next_use[at]) {
            *next = later.insert(*key, at as u64).unwrap_or(NEVER);
        }
    }
    // By next use, and of one request the deepest last: it goes first.
    let mut resident: BTreeSet<(u64, u32, kvring_ipc::key::BlockKey)> = BTreeSet::new();
    let mut places: HashMap<kvring_ipc::key::BlockKey, (u64, u32)> = HashMap::new();
    let (mut hit, mut asked) = (0, 0);
    for (chain, nexts) in chains.iter().zip(&next_use) {
        asked += chain.len();
        hit += chain.iter().take_while(|key| places.contains_key(*key)).count();
        for ((depth, key), next) in (0..).zip(chain).zip(nexts) {
            if let Some((next, depth)) = places.remove(key) {
                resident.remove(&(next, depth, *key));
            }
            if *next != NEVER {
                resident.insert((*next, depth, *key));
                places.insert(*key, (*next, depth));
            }
        }
        while resident.len() as u64 > capacity {
            if let Some((_, _, key)) = resident.pop_last() {
                places.remove(&key);
            }
        }
    }
    hit as f64 / asked.max(1) as f64
}

#[cfg(test)]
mod test {
    use super::*;
    use kvring_engine::device::sim::Chance;

    fn requests(chains: &[&[u64]]) -> Vec<TraceRequest> {
        chains.iter().map(|ids| TraceRequest { timestamp_us: 0, hash_ids: ids.to_vec() }).collect()
    }

    #[test]
    fn small_cases_by_hand() {
        let all = requests(&[&[1, 2], &[3], &[1, 2], &[3], &[1, 9]]);
        assert_eq!(infinite(&all), 4.0 / 8.0);
        assert_eq!(belady(&all, 100), infinite(&all));
        assert_eq!(belady(&all, 0), 0.0);
        // One block: 1 stays, or 3 does between its two; the first of a chain before the second.
        assert_eq!(belady(&all, 1), 2.0 / 8.0);
        assert_eq!(belady(&all, 2), 3.0 / 8.0);
    }

    /// Every way to keep blocks, tried out.
    fn best(chains: &[Vec<u64>], capacity: usize) -> usize {
        fn go(chains: &[Vec<u64>], held: &BTreeSet<u64>, capacity: usize) -> usize {
            let Some((chain, rest)) = chains.split_first() else { return 0 };
            let hit = chain.iter().take_while(|id| held.contains(id)).count();
            let all: Vec<u64> =
                held.iter().copied().chain(chain.iter().copied()).collect::<BTreeSet<_>>().into_iter().collect();
            let ways = (0u32..1 << all.len()).filter(|way| way.count_ones() as usize <= capacity);
            let kept =
                |way: u32| all.iter().enumerate().filter(|(at, _)| way >> at & 1 == 1).map(|(_, id)| *id).collect();
            hit + ways.map(|way| go(rest, &kept(way), capacity)).max().unwrap_or(0)
        }
        go(chains, &BTreeSet::new(), capacity)
    }

    #[test]
    fn nothing_that_keeps_so_many_blocks_hits_more() {
        // Blocks of a tree: id n continues n / 2.
        for seed in 0..60 {
            let mut chance = Chance::new(seed);
            let chain = |_| {
                let leaf = 1 + chance.below(7);
                std::iter::successors(Some(leaf), |id| (*id > 1).then_some(id / 2))
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev()
                    .collect()
            };
            let chains: Vec<Vec<u64>> = (0..5).map(chain).collect();
            let asked: usize = chains.iter().map(Vec::len).sum();
            let all: Vec<TraceRequest> =
                chains.iter().map(|ids| TraceRequest { timestamp_us: 0, hash_ids: ids.clone() }).collect();
            for capacity in 1..=2 {
                let ours = (belady(&all, capacity as u64) * asked as f64).round() as usize;
                assert_eq!(ours, best(&chains, capacity), "seed {seed}, {capacity} blocks: {chains:?}");
            }
        }
    }
}
