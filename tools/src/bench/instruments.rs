//! What being seen costs: a shard with its stats segment and flight recorder, and without, the same work for both, in turns
//! of some milliseconds; and one that is looked at, by whoever scrapes its metrics and by `top`, and is not. One shard, in
//! this process: two servers differ by where their memory happens to lie.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use kvring_engine::cache::Cache;
use kvring_engine::device::Device;
use kvring_engine::index::IndexOptions;
use kvring_engine::shard::session::Session as Served;
use kvring_engine::shard::{Shard, ShardOptions};
use kvring_engine::tier::host::{HostSlots, SessionId, Writer};
use kvring_ipc::client::{Matched, Pool, Session, monotonic_ns};
use kvring_ipc::config::{Config, EvictionPolicy, Verify};
use kvring_ipc::events::EventLog;
use kvring_ipc::key::BlockKey;
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};
use kvring_ipc::segment::Segment;
use kvring_ipc::stats::{Stats, Text};
use serde_json::{Value, json};

use crate::observe::Server;
use crate::observe::top::Beside;

use super::{Failure, Measured, Run, chain, median, pin, ratio_with_interval, rounded, store, two_cpus};

const BLOCK: usize = 64 << 10;
const SLOTS: u32 = 2048;
const CHAIN: usize = 64;
/// Long beside a request, short beside what else the machine does.
const TURN: Duration = Duration::from_millis(10);

/// The client of a shard.
struct Side {
    session: Session,
    keys: Vec<BlockKey>,
    target: Vec<u8>,
    stored: u64,
}

const HIDDEN: u32 = 0;
const SHOWN: u32 = 1;
const OVER: u32 = 2;
/// What is said is done.
const DONE: u32 = 1 << 16;

/// A shard and a session with it.
fn shard_and_session() -> Result<(Shard<Box<dyn Device + Send>>, Session), Failure> {
    let bytes = SLOTS as usize * BLOCK;
    let pages = [Pages::Huge2M, Pages::Small];
    let map = |pages| Mapping::new(sealed_memfd("kvring-bench", bytes as u64, pages)?, bytes);
    let pool = pages.into_iter().map(map).find_map(Result::ok).ok_or("no memory for a pool")?;
    pool.populate(0, bytes)?;
    let pool = Arc::new(pool);
    let options = IndexOptions {
        host_slots: SLOTS,
        disk_slots: 0,
        policy: EvictionPolicy::Lru,
        protected_hits: 2,
        secret: [1, 2],
    };
    let mut cache = Cache::new(&options, HostSlots::new(SLOTS, 1), None);
    cache.index.log = Some(EventLog::create()?.0);
    let config = Config::default();
    let options = ShardOptions {
        slot_bytes: BLOCK as u64,
        lease_ttl_ns: config.lease_ttl.as_nanos() as u64,
        load_wait_ns: config.load_wait.as_nanos() as u64,
        writer_grace_ns: config.writer_grace.as_nanos() as u64,
        read_depth: config.ssd_read_depth,
        write_depth: config.ssd_write_depth,
        write_bytes_per_day: None,
        checksum: true,
        verify: Verify::Crash,
        clock: monotonic_ns,
    };
    let mut shard = Shard::new(cache, pool.clone(), Vec::new(), options, Arc::default());
    shard.bear(0, 0..SLOTS)?;
    let (segment, _) = Segment::create()?;
    let writer = Writer { session: SessionId(1), instance: 1, rank: 0 };
    let mut served = Box::new(Served::new(writer, segment.clone(), None));
    served.moves_blocks = true;
    shard.attach(served);
    Ok((shard, Session::within(segment, Pool::new(pool, BLOCK, SLOTS))))
}

/// Who looks at the shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// A scrape of the metrics: of all but namespaces, which a server is asked for twice a minute.
    Scrape,
    /// `top`: reads and draws.
    Top,
}

/// A thread that looks when it is told to, and says how long it took. It may run where it likes, as the thread that serves
/// metrics and `top` do.
struct Watcher {
    ask: SyncSender<Look>,
    took: Receiver<Duration>,
}

impl Watcher {
    fn start(stats: &Stats) -> Result<Self, Failure> {
        let (ask, asked) = sync_channel::<Look>(1);
        let (tell, took) = sync_channel(1);
        let text = Text { names: kvring_engine::metrics::names(0), slot_bytes: BLOCK as u64, ..Text::default() };
        let server = Server { stats: stats.clone(), text };
        let mut top = Beside::new(server.clone())?;
        std::thread::Builder::new().name("kvring-watch".into()).spawn(move || {
            for look in asked {
                let from = Instant::now();
                match look {
                    Look::Scrape => drop(std::hint::black_box(crate::metrics::text_of(server.clone(), Vec::new))),
                    Look::Top => drop(top.look()),
                }
                if tell.send(from.elapsed()).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { ask, took })
    }
}

/// Polls as a server with `polling = busy` does, and shows itself or not as it is told.
fn serve(mut shard: Shard<Box<dyn Device + Send>>, stats: &Stats, told: &AtomicU32, cpu: usize) {
    pin(cpu);
    loop {
        let asked = told.load(Ordering::Acquire);
        if asked & DONE == 0 {
            match asked {
                SHOWN => shard.show_in(stats.clone()),
                HIDDEN => shard.hide(),
                _ => return,
            }
            told.store(asked | DONE, Ordering::Release);
        }
        // Some rounds for one look: it is no part of what is measured.
        for _ in 0..64 {
            shard.poll(monotonic_ns());
        }
    }
}

/// Measures.
pub fn measure(run: &mut Run) -> Measured {
    let Some(cpus) = two_cpus() else {
        return Err("bench instruments needs two CPUs: one for the server, one for the instance".into());
    };
    let (shard, session) = shard_and_session()?;
    let (stats, _stats_fd) = Stats::create("kvring-bench-stats", Config::default().recorder_entries)?;
    let told = Arc::new(AtomicU32::new(HIDDEN));
    let (stats_of_shard, told_shard) = (stats.clone(), told.clone());
    let shard = std::thread::Builder::new().spawn(move || serve(shard, &stats_of_shard, &told_shard, cpus.1))?;
    // Before this thread has a core of its own: it is nobody's heir.
    let watcher = Watcher::start(&stats)?;
    pin(cpus.0);
    let keys = chain("instruments", CHAIN as u32);
    let mut side = Side { session, keys, target: vec![0; BLOCK], stored: 0 };
    let measured = measure_with(run, &mut side, &told, &watcher);
    told.store(OVER, Ordering::Release);
    shard.join().map_err(|_| "the shard panicked")?;
    measured
}

fn tell(told: &AtomicU32, how: u32) {
    told.store(how, Ordering::Release);
    while told.load(Ordering::Acquire) & DONE == 0 {
        std::hint::spin_loop();
    }
}

fn measure_with(run: &Run, side: &mut Side, told: &AtomicU32, watcher: &Watcher) -> Measured {
    store(&mut side.session, &side.keys)?;
    let work: [(&str, Work); 4] = [
        ("load_and_copy_blocks_s", load_and_copy),
        ("copy_and_store_blocks_s", copy_and_store),
        ("store_uncopied_blocks_s", store_uncopied),
        ("match64_s", match_only),
    ];
    let rounds = (run.time.as_secs_f64() / (3.0 * TURN.as_secs_f64())).ceil() as usize;
    let mut report = json!({"block_kib": BLOCK >> 10, "rounds": rounds});
    for (name, work) in work {
        // Hidden twice: what those differ by is no instrument's doing.
        let mut rates: [Vec<f64>; 3] = Default::default();
        for round in 0..rounds {
            for turn in 0..3 {
                // Each of them first, in the middle and last as often as the others.
                let at = if round % 2 == 0 { (round / 2 + turn) % 3 } else { (round / 2 + 5 - turn) % 3 };
                let how = if at == 0 { SHOWN } else { HIDDEN };
                tell(told, how);
                // What it was told has emptied some caches.
                work(side)?;
                let started = Instant::now();
                let mut count = 0;
                while started.elapsed() < TURN {
                    count += work(side)?;
                }
                rates[at].push(count as f64 / started.elapsed().as_secs_f64());
            }
        }
        let [on, off, again] = &rates;
        let between: Vec<f64> = off.iter().zip(again).map(|(off, again)| (off + again) / 2.0).collect();
        let [ratio, low, high] = ratio_with_interval(on, &between);
        let [control, control_low, control_high] = ratio_with_interval(again, off);
        report[name] = json!({
            "on": median(on.clone()).round(),
            "off": median(between.clone()).round(),
            "ratio": ratio,
            "ratio_from": low,
            "ratio_to": high,
            "ratio_of_off_to_off": control,
            "ratio_of_off_to_off_from": control_low,
            "ratio_of_off_to_off_to": control_high,
        });
        tell(told, SHOWN);
        report[name]["watched"] = measure_watched(side, work, watcher, run.time)?;
    }
    Ok(report)
}

/// Turns with one look in each, of either kind, and turns without, twice. A look a turn is a hundred a second: what one
/// costs is seen so, and what one or two a second cost follows from it.
fn measure_watched(side: &mut Side, work: Work, watcher: &Watcher, time: Duration) -> Measured {
    const TURNS: [Option<Look>; 4] = [Some(Look::Scrape), Some(Look::Top), None, None];
    let rounds = (time.as_secs_f64() / (TURNS.len() as f64 * TURN.as_secs_f64())).ceil() as usize;
    let (mut rates, mut looks): ([Vec<f64>; 4], [Vec<f64>; 2]) = Default::default();
    let (mut seconds, mut turns) = (0.0, 0.0);
    for round in 0..rounds {
        for turn in 0..TURNS.len() {
            // As above: each in each place as often.
            let at = if round % 2 == 0 { (round / 2 + turn) % 4 } else { (round / 2 + 7 - turn) % 4 };
            work(side)?;
            let started = Instant::now();
            let mut took = None;
            if let Some(look) = TURNS[at] {
                watcher.ask.send(look)?;
            }
            let mut count = 0;
            // A look that takes longer than a turn is part of it to its end.
            while started.elapsed() < TURN || TURNS[at].is_some() && took.is_none() {
                count += work(side)?;
                took = match (took, watcher.took.try_recv()) {
                    (None, Ok(took)) => Some(took),
                    (_, Err(TryRecvError::Disconnected)) => return Err("who looks has panicked".into()),
                    (took, _) => took,
                };
            }
            let elapsed = started.elapsed().as_secs_f64();
            rates[at].push(count as f64 / elapsed);
            if let (Some(took), Some(looks)) = (took, looks.get_mut(at)) {
                looks.push(took.as_secs_f64() * 1e6);
                (seconds, turns) = (seconds + elapsed, turns + 1.0);
            }
        }
    }
    let [scraped, topped, alone, again] = &rates;
    let between: Vec<f64> = alone.iter().zip(again).map(|(alone, again)| (alone + again) / 2.0).collect();
    let turn_s: f64 = seconds / f64::max(turns, 1.0);
    let row = |rates: &[f64], looks: &[f64], looks_per_s: f64| -> Value {
        // Part of a turn's work that one look costs, and of a second's.
        let [ratio, low, high] = ratio_with_interval(rates, &between);
        let [at_rate, from, to] =
            [ratio, low, high].map(|ratio| rounded(1.0 - (1.0 - ratio) * turn_s * looks_per_s, 5));
        json!({
            "looks_per_s": looks_per_s,
            "ratio": at_rate,
            "ratio_from": from,
            "ratio_to": to,
            "ratio_with_a_look_each_turn": ratio,
            "look_us": median(looks.to_vec()).round(),
        })
    };
    let [control, control_low, control_high] = ratio_with_interval(again, alone);
    Ok(json!({
        "with_a_scrape_each_second": row(scraped, &looks[0], 1.0),
        "with_top_beside": row(topped, &looks[1], Beside::LOOKS_PER_S),
        "turn_ms": rounded(turn_s * 1e3, 2),
        "ratio_of_unwatched_to_unwatched": control,
        "ratio_of_unwatched_to_unwatched_from": control_low,
        "ratio_of_unwatched_to_unwatched_to": control_high,
    }))
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
