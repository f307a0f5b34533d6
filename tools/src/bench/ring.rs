//! The control path: from a posted entry to its pickup, and a match of 256 blocks with lease and
//! completion, both sides awake and pinned, beside the cache-line round trip between the same CPUs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::json;

use super::{BenchServer, Measured, Run, cdf_us, chain, percentiles, pin, rounded, store, two_cpus};
use crate::replay::worker::new_histogram;
use hdrhistogram::Histogram;
use kvring_ipc::client::{Matched, monotonic_ns};

const BLOCKS: u32 = 256;
/// Round trips timed at once: the clock costs as much as one of them.
const BATCH: u64 = 16;

#[repr(align(128))]
struct Line(AtomicU64);

/// One line that two CPUs hand each other: nothing that two processes say can be faster.
fn floor(run: &Run, (ours, theirs): (usize, usize)) -> Histogram<u64> {
    static PING: Line = Line(AtomicU64::new(0));
    static PONG: Line = Line(AtomicU64::new(0));
    const STOP: u64 = u64::MAX;
    PING.0.store(0, Ordering::SeqCst);
    PONG.0.store(0, Ordering::SeqCst);
    let mut histogram = new_histogram();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(theirs);
            let mut last = 0;
            while last != STOP {
                let seen = PING.0.load(Ordering::Acquire);
                if seen != last {
                    last = seen;
                    PONG.0.store(seen, Ordering::Release);
                }
                std::hint::spin_loop();
            }
        });
        pin(ours);
        let started = Instant::now();
        let mut number = 0;
        while started.elapsed() < run.time / 4 {
            let from = Instant::now();
            for _ in 0..BATCH {
                number += 1;
                PING.0.store(number, Ordering::Release);
                while PONG.0.load(Ordering::Acquire) != number {
                    std::hint::spin_loop();
                }
            }
            histogram.saturating_record(from.elapsed().as_nanos() as u64);
        }
        PING.0.store(STOP, Ordering::Release);
    });
    histogram
}

/// Measures.
pub fn measure(run: &mut Run) -> Measured {
    let Some(cpus) = two_cpus() else {
        return Err("bench ring needs two CPUs: one for the server, one for the instance".into());
    };
    let mut floors = floor(run, cpus);
    let server = BenchServer::start(
        &std::env::temp_dir(),
        4,
        &[
            ("cpu_cache_gb", "0.0625".into()),
            ("ssd_cache_gb", "0".into()),
            ("polling", "busy".into()),
            ("server_cpu", cpus.1.to_string()),
        ],
    )?;
    pin(cpus.0);
    let mut session = server.session(4096)?;
    let keys = chain("ring", BLOCKS);
    let stored = store(&mut session, &keys)?;
    if stored != BLOCKS {
        return Err(format!("only {stored} of {BLOCKS} blocks were stored").into());
    }
    let (mut pickup, mut round_trip, mut match256) = (new_histogram(), new_histogram(), new_histogram());
    let started = Instant::now();
    let warm = run.time / 10;
    while started.elapsed() < run.time {
        let far = Instant::now() + std::time::Duration::from_secs(1);
        let from = monotonic_ns();
        let tag = session.post_ping()?;
        let mut picked_up = 0;
        session.wait(tag, far, |_, completion| picked_up = completion.payload[0])?;
        let back = monotonic_ns();

        let match_from = Instant::now();
        let tag = session.post_match(&keys)?;
        let mut matched = Matched::MISS;
        session.wait(tag, far, |_, completion| matched = Matched::from_completion(&completion))?;
        let match_took = match_from.elapsed();
        let Some(lease) = matched.lease.filter(|_| matched.blocks == BLOCKS) else {
            return Err("the chain is not wholly resident".into());
        };
        let tag = session.post_release(lease.id)?;
        session.wait(tag, far, |_, _| {})?;
        if started.elapsed() > warm {
            pickup.saturating_record(picked_up.saturating_sub(from).max(1));
            round_trip.saturating_record(back - from);
            match256.saturating_record(match_took.as_nanos() as u64);
        }
    }
    drop(session);
    drop(server);
    floors.add(floor(run, cpus))?;
    let floor_p50 = floors.value_at_quantile(0.5) as f64 / BATCH as f64;
    let ratio = match256.value_at_quantile(0.5) as f64 / floor_p50;
    if floor_p50 > 400.0 {
        run.doubts.push(format!("the cache-line round trip takes {floor_p50:.0} ns: the CPUs are shared or far apart"));
    }
    Ok(json!({
        "floor_ns": percentiles(&floors, BATCH as f64),
        "post_to_pickup_ns": percentiles(&pickup, 1.0),
        "ping_round_trip_ns": percentiles(&round_trip, 1.0),
        "match256_ns": percentiles(&match256, 1.0),
        "match256_to_floor": rounded(ratio, 2),
        "cdf_us": {
            "ping round trip": cdf_us(&round_trip),
            "match of 256 blocks": cdf_us(&match256),
        },
        "cpus": [cpus.0, cpus.1],
    }))
}
