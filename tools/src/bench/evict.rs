//! Eviction at growing sizes: a full pool takes chain after chain, each block at the price of another.
//! In this process, without I/O: what is measured is the index.

use std::time::Instant;

use kvring_engine::cache::{Cache, Parent, Reserve};
use kvring_engine::device::sim::Chance;
use kvring_engine::index::IndexOptions;
use kvring_engine::tier::host::{HostSlots, SessionId, Writer};
use kvring_ipc::config::EVICTION_POLICIES;
use kvring_ipc::key::BlockKey;
use serde_json::{Value, json};

use super::{Measured, Run, median, rounded};

const CHAIN: u32 = 64;
const SIZES: [u32; 5] = [10_000, 30_000, 100_000, 300_000, 1_000_000];

/// Measures.
pub fn measure(run: &mut Run) -> Measured {
    let mut rows = Vec::new();
    for (name, policy) in EVICTION_POLICIES {
        let mut row = json!({"policy": name});
        let mut curve = Vec::new();
        for size in SIZES {
            let ns = one(run, size, *policy);
            curve.push(ns);
        }
        row["blocks"] = json!(SIZES);
        row["ns"] = curve.iter().map(|ns| rounded(*ns, 0)).collect::<Vec<_>>().into();
        row["ratio"] = rounded(curve[SIZES.len() - 1] / curve[0], 2).into();
        rows.push(row);
    }
    Ok(json!({"evict_and_store_per_block": Value::Array(rows)}))
}

/// Nanoseconds to evict one block and store another, at this size.
fn one(run: &Run, size: u32, policy: kvring_ipc::config::EvictionPolicy) -> f64 {
    let options = IndexOptions { host_slots: size, disk_slots: 0, policy, protected_hits: 2, secret: [1, 2] };
    let mut host = HostSlots::new(size, 1);
    host.bear(0..size);
    let mut cache = Cache::new(&options, host, None);
    let writer = Writer { session: SessionId(1), instance: 1, rank: 0 };
    let mut chance = Chance::new(7);
    let mut number = 0u64;
    let mut store = |cache: &mut Cache| {
        number += 1;
        let key = |depth: u32| {
            BlockKey::from_words([number << 20 | u64::from(depth), number.wrapping_mul(0x9e37_79b9_7f4a_7c15)])
        };
        let mut parent = Parent::Namespace(BlockKey::default());
        for depth in 0..CHAIN {
            cache.index.prefetch(key(depth + 1));
            let (reserve, block) = cache.reserve(key(depth), parent, depth, writer, true);
            if let Reserve::Slot(grant) = reserve {
                let _ = cache.commit(grant, writer);
            }
            let Some(block) = block else { break };
            parent = Parent::Block(block);
        }
    };
    let mut touch = |cache: &mut Cache, below: u64| {
        let number = 1 + chance.below(below);
        let key = |depth: u32| {
            BlockKey::from_words([number << 20 | u64::from(depth), number.wrapping_mul(0x9e37_79b9_7f4a_7c15)])
        };
        if let Ok(Some((lease, _))) = cache.match_chain(CHAIN, key, writer.session, writer.instance, u64::MAX) {
            cache.release(lease, writer.instance);
        }
    };
    for _ in 0..size / CHAIN + 1 {
        store(&mut cache);
    }
    let mut samples = Vec::new();
    let (started, mut stored) = (Instant::now(), u64::from(size / CHAIN + 1));
    while started.elapsed() < run.time / 8 {
        for _ in 0..4 {
            touch(&mut cache, stored);
        }
        let from = Instant::now();
        for _ in 0..4 {
            store(&mut cache);
        }
        stored += 4;
        samples.push(from.elapsed().as_nanos() as f64 / f64::from(4 * CHAIN));
    }
    median(samples)
}
