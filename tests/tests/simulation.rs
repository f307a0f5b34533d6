//! Whole worlds under seeds. A failure prints the seed; `cargo xtask sim SEED` replays it alone.

use kvring_tests::world::World;

#[test]
fn two_hundred_worlds() {
    let base = std::env::var("KVRING_SIM_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1u64);
    for seed in base..base + 200 {
        let result = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            world.run(3000);
            world.tally
        });
        match result {
            Ok(tally) => assert!(tally.operations > 100),
            Err(panic) => {
                eprintln!("seed {seed} failed: replay it with `cargo xtask sim {seed}`");
                std::panic::resume_unwind(panic);
            }
        }
    }
}
