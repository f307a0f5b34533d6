//! Whole worlds under seeds. A failure prints the seed; `cargo xtask sim SEED` replays it alone.

use std::collections::BTreeMap;

use kvring_tests::world::{STEPS, World};

#[test]
fn a_seed_does_the_same_twice() {
    for seed in 1..21 {
        let [once, again] = [(); 2].map(|()| {
            let mut world = World::new(seed);
            world.run(STEPS);
            (format!("{:?}", world.tally), world.metrics.all())
        });
        assert_eq!(once, again, "seed {seed}");
    }
}

#[test]
fn two_hundred_worlds() {
    let base = std::env::var("KVRING_SIM_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1u64);
    let mut counters: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in base..base + 200 {
        let result = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            world.run(STEPS);
            (world.tally, world.metrics.all())
        });
        match result {
            Ok((tally, metrics)) => {
                assert!(tally.operations > 100);
                for (name, _, value) in metrics {
                    *counters.entry(name).or_default() += value;
                }
            }
            Err(panic) => {
                eprintln!(
                    "seed {seed} failed: replay it with `cargo xtask sim {seed}`, or, with debug assertions as here, with `KVRING_SIM_SEED={seed} cargo test -p kvring-tests --test simulation`"
                );
                std::panic::resume_unwind(panic);
            }
        }
    }
    // A counter that nobody increments is a lie. Some are counted outside the shard, scribbling has a story of its
    // own (death.rs); five are gauges that must be zero at the end.
    let elsewhere = [
        "sleeps_count",
        "ssd_recovered_blocks_count",
        "ssd_recovery_us",
        "dram_recovered_blocks_count",
        "dram_checksum_errors_count",
        "ssd_held_back_count",
    ];
    let at_rest =
        ["sessions_count", "leases_count", "host_slots_quarantined_count", "host_slots_filling_count", "blocks_count"];
    for (name, value) in counters {
        if at_rest.contains(&name) {
            assert_eq!(value, 0, "{name} at rest");
        } else {
            assert!(value > 0 || elsewhere.contains(&name), "nothing in 200 worlds incremented {name}");
        }
    }
}
