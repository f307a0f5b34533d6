//! What being seen costs: a server with its stats segment and flight recorder beside one without, the same work for
//! both, alternating.

use std::time::{Duration, Instant};

use kvring_ipc::client::{Matched, Session};
use kvring_ipc::key::BlockKey;
use serde_json::json;

use super::{BenchServer, Measured, Run, chain, median, pin, rounded, store, two_cpus};

const BLOCK: usize = 64 << 10;
const CHAIN: usize = 64;
const ROUNDS: usize = 12;

/// One server and its client.
struct Side {
    _server: BenchServer,
    session: Session,
    keys: Vec<BlockKey>,
    target: Vec<u8>,
    stored: u64,
}

type Failure = Box<dyn std::error::Error>;

/// Measures.
pub fn measure(run: &mut Run) -> Measured {
    let Some(cpus) = two_cpus() else {
        return Err("bench instruments needs two CPUs: one for the server, one for the instance".into());
    };
    let side = |instruments: &str| -> Result<Side, Failure> {
        let settings = [
            ("cpu_cache_gb", "0.125".into()),
            ("ssd_cache_gb", "0".into()),
            ("stats_segment", instruments.into()),
            ("server_cpu", cpus.1.to_string()),
        ];
        let server = BenchServer::start(&std::env::temp_dir(), (BLOCK >> 10) as u64, &settings)?;
        let mut session = server.session(BLOCK as u64)?;
        let keys = chain("instruments", CHAIN as u32);
        store(&mut session, &keys)?;
        Ok(Side { _server: server, session, keys, target: vec![0; BLOCK], stored: 0 })
    };
    // Two without: what those differ by is no instrument's doing.
    let mut sides = [side("on")?, side("off")?, side("off")?];
    pin(cpus.0);
    let work: [(&str, Work); 4] = [
        ("load_and_copy_blocks_s", load_and_copy),
        ("copy_and_store_blocks_s", copy_and_store),
        ("store_uncopied_blocks_s", store_uncopied),
        ("match64_s", match_only),
    ];
    let mut report = json!({"block_kib": BLOCK >> 10, "rounds": ROUNDS});
    for (name, work) in work {
        let mut rates: [Vec<f64>; 3] = Default::default();
        for round in 0..ROUNDS {
            for turn in 0..3 {
                // Each of them first, in the middle and last as often as the others.
                let at = if round % 2 == 0 { (round / 2 + turn) % 3 } else { (round / 2 + 5 - turn) % 3 };
                let side = &mut sides[at];
                let started = Instant::now();
                let mut count = 0;
                while started.elapsed() < run.time / 8 {
                    count += work(side)?;
                }
                rates[at].push(count as f64 / started.elapsed().as_secs_f64());
            }
        }
        let ratio = |of: &[f64], to: &[f64]| rounded(median(of.iter().zip(to).map(|(of, to)| of / to).collect()), 4);
        let [on, off, again] = &rates;
        let between: Vec<f64> = off.iter().zip(again).map(|(off, again)| (off + again) / 2.0).collect();
        report[name] = json!({
            "on": median(on.clone()).round(),
            "off": median(between.clone()).round(),
            "ratio": ratio(on, &between),
            "ratio_of_off_to_off": ratio(again, off),
        });
    }
    Ok(report)
}

type Work = fn(&mut Side) -> Result<u64, Failure>;

fn far() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn match_chain(side: &mut Side) -> Result<kvring_ipc::client::Lease, Failure> {
    let tag = side.session.post_match(&side.keys)?;
    let mut matched = Matched::MISS;
    side.session.wait(tag, far(), |_, completion| matched = Matched::from_completion(&completion))?;
    matched.lease.ok_or_else(|| "a miss".into())
}

/// An instance that finds its prefix: match, load, copy, release.
fn load_and_copy(side: &mut Side) -> Result<u64, Failure> {
    let lease = match_chain(side)?;
    let tag = side.session.post_load(lease.id, 0, &side.keys)?;
    let (mut count, target) = (0, &mut side.target);
    side.session.wait(tag, far(), |pool, completion| {
        for (_, grant) in completion.grants() {
            pool.mapping().copy_out(pool.offset_of(grant.slot), target);
            count += 1;
        }
    })?;
    side.session.release_soon(lease.id)?;
    Ok(count)
}

/// One that stores what is new, at the price of what is old.
fn copy_and_store(side: &mut Side) -> Result<u64, Failure> {
    let keys = new_chain(side)?;
    let tag = side.session.post_reserve(BlockKey::default(), 0, &keys)?;
    let (mut grants, source) = (Vec::with_capacity(CHAIN), &side.target);
    side.session.wait(tag, far(), |pool, completion| {
        for (_, grant) in completion.grants() {
            pool.mapping().copy_in(pool.offset_of(grant.slot), source);
            grants.push(grant);
        }
    })?;
    let tag = side.session.post_commit(&grants)?;
    side.session.wait(tag, far(), |_, _| {})?;
    Ok(grants.len() as u64)
}

/// As that, without the copy: the server's part alone, which no instance can ask for.
fn store_uncopied(side: &mut Side) -> Result<u64, Failure> {
    let keys = new_chain(side)?;
    Ok(u64::from(store(&mut side.session, &keys)?))
}

fn new_chain(side: &mut Side) -> Result<Vec<BlockKey>, Failure> {
    side.stored += 1;
    // What the other kinds of work need stays young.
    if side.stored.is_multiple_of(8) {
        let lease = match_chain(side)?;
        side.session.release_soon(lease.id)?;
    }
    Ok(chain(&format!("store {}", side.stored), CHAIN as u32))
}

/// The smallest request there is to be counted.
fn match_only(side: &mut Side) -> Result<u64, Failure> {
    let lease = match_chain(side)?;
    side.session.release_soon(lease.id)?;
    Ok(1)
}
