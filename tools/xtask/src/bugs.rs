//! `cargo xtask bugs`: does the simulation find what it is there to find?

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvring_engine::planted::{Bug, plant};
use kvring_tests::world::World;

use super::{Outcome, seed_of_commit};

/// A bug that is not found in this time is not found.
const PATIENCE: Duration = Duration::from_secs(60);

/// Plants each bug and simulates until something fails.
pub fn find_all() -> Outcome {
    // Every one of these panics is a success.
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    println!("{:<22} {:>10} {:>8} {:>8}  what it does", "bug", "operations", "worlds", "seconds");
    for (bug, what) in Bug::ALL {
        plant(*bug);
        let started = Instant::now();
        let (found, operations, worlds) = find(started);
        let seconds = started.elapsed().as_secs_f64();
        let name = format!("{bug:?}");
        if found {
            println!("{name:<22} {operations:>10} {worlds:>8} {seconds:>8.1}  {what}");
        } else {
            println!("{name:<22} {:>10} {worlds:>8} {seconds:>8.1}  {what}", "NOT FOUND");
            missed.push(name);
        }
    }
    let count = Bug::ALL.len();
    if missed.is_empty() {
        println!("{count} of {count} planted bugs were found");
        Ok(())
    } else {
        Err(format!("the simulation does not find {}", missed.join(", ")))
    }
}

/// Worlds, one after the other on each core, until one fails: whether, after how many operations of all
/// that were begun and done, and in how many worlds.
fn find(started: Instant) -> (bool, u64, u64) {
    let base = seed_of_commit();
    let (found, operations, worlds) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !found.load(Ordering::Relaxed) && started.elapsed() < PATIENCE {
                    let seed = base.wrapping_add(worlds.fetch_add(1, Ordering::Relaxed));
                    let failed = std::panic::catch_unwind(|| {
                        let mut world = World::new(seed);
                        world.run_counting(5000, &operations);
                    });
                    if failed.is_err() {
                        found.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    (found.into_inner(), operations.into_inner(), worlds.into_inner())
}
