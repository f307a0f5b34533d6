//! What checksums cost the SSD: one shard over one directory that makes them and does not, in turns of a tenth of a
//! second. Two servers differ by more than that.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use kvring_engine::cache::Cache;
use kvring_engine::checksum;
use kvring_engine::device::aio::Aio;
use kvring_engine::device::medium::Medium;
use kvring_engine::device::uring::{self, Finds, RingOptions, Uring};
use kvring_engine::device::{Device, DeviceMemory, files};
use kvring_engine::index::IndexOptions;
use kvring_engine::metrics::Metrics;
use kvring_engine::shard::hasher::Hasher;
use kvring_engine::shard::session::Session as Served;
use kvring_engine::shard::{Shard, ShardOptions};
use kvring_engine::tier::disk::DiskSlots;
use kvring_engine::tier::host::{HostSlots, SessionId, Writer};
use kvring_ipc::client::{Lease, Matched, Pool, Session, monotonic_ns};
use kvring_ipc::config::{Config, EvictionPolicy, OnMismatch, Verify};
use kvring_ipc::key::BlockKey;
use kvring_ipc::layout::Layout;
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};
use kvring_ipc::segment::Segment;
use kvring_ipc::wire::Tag;
use serde_json::json;

use super::{Failure, Measured, Run, chain, median, pin, ratio_with_interval, rounded, store, two_cpus};

/// Arguments of `kvring bench checksum`.
#[derive(Args)]
pub struct ChecksumArgs {
    /// Where to measure: a directory on the file system in question.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Bytes of a block, in KiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(4..=65536))]
    block_kib: u64,
    /// GiB on the SSD; a quarter as much of the machine's memory is the pool.
    #[arg(long, default_value_t = 2.0)]
    size_gb: f64,
}

/// Blocks of one chain: one load.
const CHAIN: u32 = 32;
/// A quarter of them is in the pool.
const CHAINS_MIN: u64 = 64;
/// Some hundreds of blocks.
const TURN: Duration = Duration::from_millis(100);
/// What was begun before the turn ends.
const BETWEEN: Duration = Duration::from_millis(10);

/// What is done with a block before it is written, and after it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum How {
    /// Nothing.
    Off = 0,
    /// Its checksum is made.
    On = 1,
    /// Every cache line of it is read, on the thread that makes checksums: no checksum is had for less.
    Read = 2,
    /// It is handed to that thread and back.
    Hand = 3,
}

/// What was told is done.
const DONE: u32 = 1 << 16;

struct Side {
    session: Session,
    metrics: Arc<Metrics>,
    told: Arc<AtomicU32>,
    chains: Vec<Vec<BlockKey>>,
    slot_bytes: u64,
    pool_bytes: u64,
    number: u64,
    flying: std::collections::VecDeque<(Tag, Lease)>,
}

type AnyShard = Shard<Box<dyn Device + Send>>;

/// A shard over one directory, and a session with it.
fn shard_and_side(run: &mut Run, args: &ChecksumArgs) -> Result<(AnyShard, Side, Lying), Failure> {
    let slot_bytes = args.block_kib << 10;
    let ssd_bytes = (args.size_gb * f64::from(1 << 30)) as u64;
    let chain_bytes = slot_bytes * u64::from(CHAIN);
    let host_slots = (ssd_bytes / 4 / slot_bytes) as u32;
    if ssd_bytes / chain_bytes < CHAINS_MIN {
        let needed = (CHAINS_MIN * chain_bytes) as f64 / f64::from(1 << 30);
        let (given, kib) = (args.size_gb, args.block_kib);
        return Err(format!("--size-gb {given} is too small for blocks of {kib} KiB: make it {needed} at least").into());
    }
    let pool_bytes = host_slots as usize * slot_bytes as usize;
    // io_uring registers at most 1 GiB at once.
    let slots_of_piece = (1 << 30) / slot_bytes as u32;
    let piece_bytes = u64::from(slots_of_piece) * slot_bytes;
    let map = |pages| Mapping::new(sealed_memfd("kvring-bench", pool_bytes as u64, pages)?, pool_bytes);
    let (pool, is_huge) = match map(Pages::Huge2M) {
        Ok(pool) => (pool, true),
        Err(_) => (map(Pages::Small)?, false),
    };
    pool.populate(0, pool_bytes)?;
    if !is_huge {
        run.doubts.push("the pool is on small pages: there are not enough free hugepages".into());
    }
    // No two slots alike, and nothing that could be packed.
    let mut random = 1u64;
    let mut block = vec![0; slot_bytes as usize];
    for slot in 0..host_slots as usize {
        for word in block.chunks_mut(8) {
            // Marsaglia, Xorshift RNGs, 2003.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes()[..word.len()]);
        }
        pool.copy_in(slot * slot_bytes as usize, &block);
    }
    let pool = Arc::new(pool);

    let scratch = tempfile::Builder::new().prefix("kvring-bench-").tempdir_in(&args.dir)?;
    let layout = Layout::opaque(slot_bytes);
    let geometry = files::geometry(1, ssd_bytes + ssd_bytes / 8, slot_bytes, None)?;
    let media = Medium::all(&[scratch.path().to_owned()])?;
    let opened = files::open(&media, &geometry, &layout, OnMismatch::Refuse)?;
    let images = geometry.header_images()?;
    let options = IndexOptions {
        host_slots,
        disk_slots: geometry.slots_count(),
        policy: EvictionPolicy::Lru,
        protected_hits: 2,
        secret: [1, 2],
    };
    let disk = DiskSlots::new(geometry, layout.fingerprint(), images.clone());
    let cache = Cache::new(&options, HostSlots::new(host_slots, 1), Some(disk));
    let config = Config::default();
    let mut devices: Vec<Box<dyn Device + Send>> = Vec::new();
    let mut locks = Vec::new();
    for (device, headers) in opened.into_iter().zip(images) {
        let memory = DeviceMemory { pool: pool.clone(), headers, piece_bytes: piece_bytes as usize };
        let entries = config.iouring_entries;
        devices.push(match uring::probe() {
            Ok(()) => {
                let options = RingOptions::plain(entries, config.fixed_buffers);
                Box::new(Uring::new(device.files, None, memory, options, Finds::AnyWay)?)
            }
            Err(error) => {
                run.doubts.push(format!("{error}: libaio drives the SSD"));
                Box::new(Aio::new(device.files, memory, entries)?)
            }
        });
        locks.extend(device.lock);
    }
    let options = ShardOptions {
        slot_bytes,
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
    let metrics = Arc::new(Metrics::default());
    let mut shard = Shard::new(cache, pool.clone(), devices, options, metrics.clone());
    let told = Arc::new(AtomicU32::new(How::On as u32));
    let (memory, bytes, how) = (pool.clone(), slot_bytes as usize, told.clone());
    let mut piece = vec![0; checksum::SCRATCH_BYTES];
    let make = move |slot| {
        let how = how.load(Ordering::Relaxed) & !DONE;
        let offset = slot as usize * bytes;
        if how == How::Hand as u32 {
            0
        } else if how == How::Read as u32 {
            let lines = memory.words64(offset, bytes / 8).iter().step_by(8);
            lines.fold(0, |all, word| all ^ word.load(Ordering::Relaxed))
        } else {
            checksum::of_mapping(&memory, offset, bytes, &mut piece)
        }
    };
    // The shard never sleeps: nobody has to wake it.
    shard.hash_beside(Hasher::start(make, || ())?);
    for (piece, first) in (0..).zip((0..host_slots).step_by(slots_of_piece as usize)) {
        shard.bear(piece, first..host_slots.min(first + slots_of_piece))?;
    }
    let (segment, _) = Segment::create()?;
    let writer = Writer { session: SessionId(1), instance: 1, rank: 0 };
    let mut served = Box::new(Served::new(writer, segment.clone(), None));
    served.moves_blocks = true;
    shard.attach(served);
    let session = Session::within(segment, Pool::new(pool, slot_bytes as usize, host_slots));
    let side = Side {
        session,
        metrics,
        told,
        chains: (0..ssd_bytes / chain_bytes).map(|n| chain(&format!("ssd {n}"), CHAIN)).collect(),
        slot_bytes,
        pool_bytes: pool_bytes as u64,
        number: 0,
        flying: std::collections::VecDeque::new(),
    };
    Ok((shard, side, Lying { _locks: locks, _scratch: scratch }))
}

/// What has to be there as long as the shard is.
struct Lying {
    _locks: Vec<std::fs::File>,
    _scratch: tempfile::TempDir,
}

/// Polls as a server with `polling = busy` does, and makes checksums or not as it is told.
fn serve(mut shard: AnyShard, told: &AtomicU32, over: &AtomicBool, cpu: usize) {
    pin(cpu);
    while !over.load(Ordering::Acquire) {
        let asked = told.load(Ordering::Acquire);
        if asked & DONE == 0 {
            shard.make_checksums(asked != How::Off as u32);
            told.store(asked | DONE, Ordering::Release);
        }
        for _ in 0..64 {
            shard.poll(monotonic_ns());
        }
    }
}

/// Says so when it is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Measures.
pub fn measure(run: &mut Run, args: &ChecksumArgs) -> Measured {
    let Some(cpus) = two_cpus() else {
        return Err("bench checksum needs two CPUs: one for the server, one for the instance and checksums".into());
    };
    let (shard, mut side, _lying) = shard_and_side(run, args)?;
    let (told, over) = (side.told.clone(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| serve(shard, &told, &over, cpus.1));
        // However it ends.
        let _over = Over(&over);
        measure_with(run, &mut side)
    })
}

fn measure_with(run: &Run, side: &mut Side) -> Measured {
    // Every block on the SSD once, no faster than it writes.
    for at in 0..side.chains.len() {
        store_whole(&mut side.session, &side.chains[at])?;
        side.wait_for_writes(side.pool_bytes / 4)?;
    }
    // With their checksums: none is left for a turn without.
    side.wait_for_writes(0)?;
    let read = turns(run, side, &[How::On, How::Off, How::Off], read, |metrics| metrics.ssd_read_bytes.get())?;
    while !side.flying.is_empty() {
        side.end_load()?;
    }
    let errors = side.metrics.ssd_checksum_errors_count.get() + side.metrics.ssd_read_errors_count.get();
    if errors > 0 {
        return Err(format!("{errors} blocks were not read as they were written").into());
    }
    let write = turns(run, side, &[How::On, How::Off, How::Off, How::Read, How::Hand], write, |metrics| {
        metrics.ssd_write_bytes.get()
    })?;
    side.wait_for_writes(0)?;
    Ok(json!({"block_kib": side.slot_bytes >> 10, "read": read, "write": write}))
}

type Work = fn(&mut Side) -> Result<(), Failure>;

/// Does some work in turns of each kind, and compares what the SSD moved in them. The first two ways of doing nothing are
/// what to compare with, and what that is worth.
fn turns(run: &Run, side: &mut Side, ways: &[How], work: Work, moved: fn(&Metrics) -> u64) -> Measured {
    let count = ways.len();
    let rounds = (run.time.as_secs_f64() / (count as f64 * (TURN + BETWEEN).as_secs_f64())).ceil() as usize;
    let rounds = rounds.next_multiple_of(2 * count);
    let mut rates = vec![Vec::with_capacity(rounds); count];
    for round in 0..rounds {
        for turn in 0..count {
            // Each of them in every place as often as the others, forwards and back.
            let at = if round % 2 == 0 { round / 2 + turn } else { round / 2 + 2 * count - 1 - turn } % count;
            side.told.store(ways[at] as u32, Ordering::Release);
            let wait = Instant::now();
            while wait.elapsed() < BETWEEN || side.told.load(Ordering::Acquire) & DONE == 0 {
                work(side)?;
                answered(wait.elapsed() < LONG)?;
            }
            let (started, before) = (Instant::now(), moved(&side.metrics));
            while started.elapsed() < TURN {
                work(side)?;
            }
            rates[at].push((moved(&side.metrics) - before) as f64 / 1e9 / started.elapsed().as_secs_f64());
        }
    }
    let [on, off, again] = [0, 1, 2].map(|at| &rates[at]);
    let between: Vec<f64> = off.iter().zip(again).map(|(off, again)| (off + again) / 2.0).collect();
    let against = |of: &[f64], to: &[f64]| {
        let [ratio, from, to] = ratio_with_interval(of, to);
        json!({"ratio": ratio, "from": from, "to": to})
    };
    let mut report = json!({
        "rounds": rounds,
        "on_gb_s": rounded(median(on.clone()), 3),
        "off_gb_s": rounded(median(between.clone()), 3),
        "on_to_off": against(on, &between),
        "off_to_off": against(again, off),
    });
    if let [.., read, hand] = &rates[3..] {
        report["read_only_to_off"] = against(read, &between);
        report["handed_over_only_to_off"] = against(hand, &between);
        report["on_to_read_only"] = against(on, read);
    }
    Ok(report)
}

/// Nothing takes so long but what has failed.
const LONG: Duration = Duration::from_secs(10);

fn answered(waited: bool) -> Result<(), Failure> {
    if waited { Ok(()) } else { Err("the shard does not answer".into()) }
}

/// Stores a chain, or says that not all of it was taken.
fn store_whole(session: &mut Session, keys: &[BlockKey]) -> Result<(), Failure> {
    match store(session, keys)? {
        CHAIN => Ok(()),
        taken => Err(format!("{taken} of {CHAIN} blocks were stored").into()),
    }
}

impl Side {
    /// Bytes that were stored and are not on the SSD.
    fn unwritten(&self) -> u64 {
        // In this order: what is written was stored.
        let written = self.metrics.ssd_write_bytes.get();
        self.metrics.commit_blocks_count.get() * self.slot_bytes - written
    }

    fn wait_for_writes(&self, left: u64) -> Result<(), Failure> {
        let started = Instant::now();
        while self.unwritten() > left {
            if started.elapsed() > LONG || self.metrics.ssd_write_errors_count.get() > 0 {
                return Err("the SSD does not take what was stored".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn end_load(&mut self) -> Result<(), Failure> {
        let Some((tag, lease)) = self.flying.pop_front() else { return Ok(()) };
        answered(self.session.wait(tag, Instant::now() + LONG, |_, _| {})?)?;
        Ok(self.session.release_soon(lease.id)?)
    }
}

/// Loads chain after chain, some at a time, so that the device never waits.
fn read(side: &mut Side) -> Result<(), Failure> {
    let mut missed = 0;
    while side.flying.len() < 3 {
        let keys = &side.chains[side.number as usize % side.chains.len()];
        side.number += 1;
        let tag = side.session.post_match(keys)?;
        let mut matched = Matched::MISS;
        let until = Instant::now() + LONG;
        answered(side.session.wait(tag, until, |_, completion| matched = Matched::from_completion(&completion))?)?;
        let Some(lease) = matched.lease else {
            missed += 1;
            if missed > side.chains.len() {
                return Err("nothing is on the SSD".into());
            }
            continue;
        };
        let tag = side.session.post_load(lease.id, 0, &keys[..matched.blocks as usize])?;
        side.session.publish();
        side.flying.push_back((tag, lease));
    }
    side.end_load()
}

/// Stores a new chain, or waits: ahead of the device by a few chains, not by the whole pool. What is evicted unwritten is
/// work in vain.
fn write(side: &mut Side) -> Result<(), Failure> {
    if side.unwritten() > side.pool_bytes / 4 {
        std::thread::sleep(Duration::from_millis(1));
        return Ok(());
    }
    side.number += 1;
    store_whole(&mut side.session, &chain(&format!("write {}", side.number), CHAIN))
}
