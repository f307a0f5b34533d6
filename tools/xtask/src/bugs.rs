//! `cargo xtask bugs`: does the simulation find what it is there to find?

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvring_engine::planted::{Bug, plant, plant_none};
use kvring_tests::world::{STEPS, World};

use super::{Outcome, seed_of_commit};

/// A bug that is not found in this time is not found.
const PATIENCE: Duration = Duration::from_secs(240);
/// So long nothing is found without one.
const SOUND: Duration = Duration::from_secs(10);

/// Plants each bug and simulates until something fails.
pub fn find_all() -> Outcome {
    // Every one of these panics is a success.
    std::panic::set_hook(Box::new(|_| {}));
    plant_none();
    let mut missed = Vec::new();
    // Without any, deaths between two stores break nothing.
    let started = Instant::now();
    let Found { found, operations, worlds } = find(started, SOUND);
    if let Some(seed) = found {
        return Err(format!(
            "seed {seed} fails with no bug planted, where processes die between two stores: replay it with `cargo run --release -p xtask --features planted -- sim {seed}`"
        ));
    }
    println!("no bug: {operations} operations in {worlds} worlds, with deaths between two stores: nothing wrong");
    println!("{:<22} {:>10} {:>8} {:>8}  what it does", "bug", "operations", "worlds", "seconds");
    for (bug, what) in Bug::ALL {
        plant(*bug);
        let started = Instant::now();
        let Found { found, operations, worlds } = find(started, PATIENCE);
        let seconds = started.elapsed().as_secs_f64();
        let name = format!("{bug:?}");
        if found.is_some() {
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

/// What a search has come to.
struct Found {
    /// The seed of a world that failed.
    found: Option<u64>,
    /// Of all operations, those that were begun and done.
    operations: u64,
    worlds: u64,
}

/// Worlds, one after the other on each core, until one fails or time is up.
fn find(started: Instant, patience: Duration) -> Found {
    let base = seed_of_commit();
    let (operations, worlds) = (AtomicU64::new(0), AtomicU64::new(0));
    let found = Mutex::new(None);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let is_over = || started.elapsed() > patience || found.lock().is_ok_and(|found| found.is_some());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !is_over() {
                    let seed = base.wrapping_add(worlds.fetch_add(1, Ordering::Relaxed));
                    let failed = std::panic::catch_unwind(|| {
                        let mut world = World::new(seed);
                        world.run_counting(STEPS, &operations);
                    });
                    if failed.is_err()
                        && let Ok(mut found) = found.lock()
                    {
                        found.get_or_insert(seed);
                    }
                }
            });
        }
    });
    let found = found.into_inner().unwrap_or_default();
    Found { found, operations: operations.into_inner(), worlds: worlds.into_inner() }
}
