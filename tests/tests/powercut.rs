//! The power is cut on a real file system: every write of a run is remembered, and for each moment of the
//! run what a cut may leave (writes lost, torn, reordered) is put on real files, opened and verified.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kvring_engine::cache::Cache;
use kvring_engine::device::aio::Aio;
use kvring_engine::device::files::{self, DeviceFiles};
use kvring_engine::device::medium::Medium;
use kvring_engine::device::sim::Chance;
use kvring_engine::device::uring::{self, Finds, RingOptions, Uring};
use kvring_engine::device::{Device, DeviceMemory};
use kvring_engine::index::IndexOptions;
use kvring_engine::limits::SECTOR_BYTES;
use kvring_engine::metrics::Metrics;
use kvring_engine::shard::session::Session as ServerSession;
use kvring_engine::shard::{Shard, ShardOptions};
use kvring_engine::tier::disk::{DiskGeometry, DiskSlots};
use kvring_engine::tier::host::{HostSlots, SessionId, Writer};
use kvring_ipc::client::{Matched, Pool, Session, monotonic_ns};
use kvring_ipc::config::{EvictionPolicy, OnMismatch, Verify};
use kvring_ipc::key::{BlockKey, Namespace};
use kvring_ipc::layout::Layout;
use kvring_ipc::mapping::Mapping;
use kvring_ipc::segment::Segment;
use kvring_ipc::wire::{Completion, Status, Tag};
use kvring_tests::bytes;
use kvring_tests::record::{Log, Recorder, Written};

const SLOT: u64 = 2 * SECTOR_BYTES;
const HOST_SLOTS: u32 = 12;
const CHAIN: usize = 6;
/// Writes that a drive may hold in its cache when the power goes.
const UNFLUSHED: usize = 16;

type AnyDevice = Box<dyn Device>;

struct Machine {
    shard: Shard<Recorder<AnyDevice>>,
    session: Session,
    metrics: Arc<Metrics>,
    _locks: Vec<std::fs::File>,
}

fn geometry() -> DiskGeometry {
    files::geometry(2, 2 * 20 * SLOT, SLOT, None).unwrap()
}

impl Machine {
    fn start(dirs: &[PathBuf], log: &Log) -> Self {
        let geometry = geometry();
        let layout = Layout::opaque(SLOT);
        let opened = files::open(&Medium::all(dirs).unwrap(), &geometry, &layout, OnMismatch::Refuse).unwrap();
        let pool = Arc::new(Mapping::private(HOST_SLOTS as usize * SLOT as usize).unwrap());
        let images = geometry.header_images().unwrap();
        let found = Mutex::new(Vec::new());
        for (number, device) in (0..).zip(&opened) {
            if device.reused {
                let fingerprint = layout.fingerprint();
                let found = |piece| found.lock().unwrap().push(piece);
                files::read_headers(&device.medium, &geometry, fingerprint, number, found).unwrap();
            }
        }
        let options = IndexOptions {
            host_slots: HOST_SLOTS,
            disk_slots: geometry.slots_count(),
            policy: EvictionPolicy::Lru,
            protected_hits: 2,
            secret: [1, 2],
        };
        let disk = DiskSlots::new(geometry, layout.fingerprint(), images.clone());
        let mut cache = Cache::new(&options, HostSlots::new(HOST_SLOTS, 1), Some(disk));
        cache.recover(found.into_inner().unwrap());
        let mut locks = Vec::new();
        let devices = opened.into_iter().zip(images).enumerate().map(|(number, (device, headers))| {
            let DeviceFiles { files, lock, .. } = device;
            let memory = DeviceMemory { pool: pool.clone(), headers, piece_bytes: pool.bytes() };
            let device: AnyDevice = match uring::probe() {
                Ok(()) => Box::new(
                    Uring::new(files, None, memory.clone(), RingOptions::plain(16, false), Finds::AnyWay).unwrap(),
                ),
                Err(_) => Box::new(Aio::new(files, memory.clone(), 16).unwrap()),
            };
            locks.extend(lock);
            Recorder::new(device, number, memory, log.clone())
        });
        let shard_options = ShardOptions {
            slot_bytes: SLOT,
            lease_ttl_ns: 60_000_000_000,
            load_wait_ns: 5_000_000_000,
            writer_grace_ns: 0,
            read_depth: 4,
            write_depth: 4,
            write_bytes_per_day: None,
            checksum: true,
            verify: Verify::Off,
            clock: monotonic_ns,
        };
        let metrics = Arc::new(Metrics::default());
        let mut shard = Shard::new(cache, pool.clone(), devices.collect(), shard_options, metrics.clone());
        shard.bear(0, 0..HOST_SLOTS).unwrap();
        let (segment, _fd) = Segment::create().unwrap();
        let session = Session::within(segment.clone(), Pool::new(pool, SLOT as usize, HOST_SLOTS));
        let writer = Writer { session: SessionId(1), instance: 1, rank: 0 };
        shard.attach(Box::new(ServerSession::new(writer, segment, None)));
        Self { shard, session, metrics, _locks: locks }
    }

    fn answers(&mut self, tag: Tag) -> Vec<Completion> {
        self.session.publish();
        let mut all = Vec::new();
        while all.last().is_none_or(|last: &Completion| !last.last) {
            self.shard.poll(monotonic_ns());
            self.session.poll(|completion| all.push(completion)).unwrap();
        }
        assert!(all.iter().all(|completion| completion.tag == tag));
        all
    }

    fn store(&mut self, keys: &[BlockKey]) {
        let tag = self.session.post_reserve(BlockKey::default(), 0, keys).unwrap();
        let mut grants = Vec::new();
        for completion in self.answers(tag) {
            for (index, grant) in completion.grants() {
                let mut block = vec![0; SLOT as usize];
                bytes::fill(keys[index as usize], 0, &mut block);
                self.session.pool().copy_in(grant.slot, 0, &block);
                grants.push(grant);
            }
        }
        if !grants.is_empty() {
            let tag = self.session.post_commit(&grants).unwrap();
            self.answers(tag);
        }
    }

    /// Loads what is resident of a chain, and compares every byte. Says how many blocks came.
    fn load(&mut self, keys: &[BlockKey]) -> usize {
        let tag = self.session.post_match(keys).unwrap();
        let matched = Matched::from_completion(&self.answers(tag)[0]);
        let Some(lease) = matched.lease else { return 0 };
        let tag = self.session.post_load(lease.id, 0, &keys[..matched.blocks as usize]).unwrap();
        let mut came = 0;
        for completion in self.answers(tag) {
            for (index, grant) in completion.grants() {
                let mut block = vec![0; SLOT as usize];
                self.session.pool().copy_out(grant.slot, 0, &mut block);
                assert_eq!(bytes::first_difference(keys[index as usize], &block), None, "wrong bytes");
                came += 1;
            }
            assert_ne!(completion.status, Status::BadRequest);
        }
        let tag = self.session.post_release(lease.id).unwrap();
        self.answers(tag);
        came
    }

    /// Forgets everything, for good, as the control plane does; says after how many writes that was promised.
    fn reset(&mut self, dirs: &[PathBuf], log: &Log) -> usize {
        self.shard.reset();
        while !self.shard.is_reset() {
            self.shard.poll(monotonic_ns());
        }
        files::flush_headers(&Medium::all(dirs).unwrap()).unwrap();
        log.lock().unwrap().len()
    }

    fn drain(&mut self) {
        while !self.shard.is_drained() {
            self.shard.poll(monotonic_ns());
        }
    }
}

fn chain(number: u32) -> Vec<BlockKey> {
    let tokens: Vec<u32> = (0..CHAIN as u32).map(|depth| number * 1000 + depth).collect();
    Namespace::default().keys(&tokens, 1)
}

fn dirs_in(root: &Path) -> Vec<PathBuf> {
    ["a", "b"].map(|name| root.join(name)).to_vec()
}

/// What a cut after `cut` writes may leave: all of the older ones, and those before a flush, and of the last few each
/// whole, torn at a sector, or not at all, in any order.
fn leave(images: &mut [Vec<u8>], log: &[Written], cut: usize, flushed: Option<usize>, chance: Option<&mut Chance>) {
    let apply = |images: &mut [Vec<u8>], written: &Written, bytes: usize| {
        let at = written.offset as usize;
        images[written.device][at..at + bytes].copy_from_slice(&written.bytes[..bytes]);
    };
    let Some(chance) = chance else {
        return log[..cut].iter().for_each(|written| apply(images, written, written.bytes.len()));
    };
    let safe = cut.saturating_sub(UNFLUSHED).max(flushed.unwrap_or(0));
    log[..safe].iter().for_each(|written| apply(images, written, written.bytes.len()));
    let mut rest: Vec<&Written> = log[safe..cut].iter().collect();
    while !rest.is_empty() {
        let written = rest.swap_remove(chance.below(rest.len() as u64) as usize);
        let sectors = written.bytes.len() as u64 / SECTOR_BYTES;
        let kept = match chance.below(3) {
            0 => 0,
            1 => chance.below(sectors + 1),
            _ => sectors,
        };
        apply(images, written, (kept * SECTOR_BYTES) as usize);
    }
}

#[test]
fn at_every_moment_of_a_run() {
    let seed = std::env::var("KVTEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(monotonic_ns);
    println!("KVTEST_SEED={seed}");
    let mut chance = Chance::new(seed);
    let root = tempfile::Builder::new().prefix("powercut").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (log, dirs) = (Log::default(), dirs_in(root.path()));
    let mut machine = Machine::start(&dirs, &log);
    let file = |dirs: &[PathBuf], device: usize| Medium::Directory(dirs[device].clone()).path_of(0);
    // What was there before the first write.
    let empty: Vec<Vec<u8>> = (0..2).map(|device| std::fs::read(file(&dirs, device)).unwrap()).collect();
    let chains: Vec<Vec<BlockKey>> = (0..32).map(chain).collect();
    let live = |machine: &mut Machine, chance: &mut Chance, chains: &[Vec<BlockKey>]| {
        for round in 0..32 {
            let keys = &chains[if round < 16 { round } else { chance.below(16) as usize }];
            machine.load(keys);
            machine.store(keys);
            if chance.happens(300) {
                machine.drain();
            }
        }
    };
    live(&mut machine, &mut chance, &chains[..16]);
    // Sometimes while much is being written.
    if chance.happens(500) {
        machine.drain();
    }
    let forgotten_at = machine.reset(&dirs, &log);
    live(&mut machine, &mut chance, &chains[16..]);
    machine.drain();
    assert!(machine.metrics.evict_ssd_count.get() > 0, "slots of the disk were written more than once");
    drop(machine);
    let log = std::mem::take(&mut *log.lock().unwrap());
    let nothing = Log::default();
    let (mut came, mut lost, mut cuts) = (0, 0, 0);
    for cut in 0..=log.len() {
        for variant in 0..4 {
            let mut images = empty.clone();
            let flushed = (cut >= forgotten_at).then_some(forgotten_at);
            leave(&mut images, &log, cut, flushed, (variant > 0).then_some(&mut chance));
            for (device, image) in images.iter().enumerate() {
                std::fs::write(file(&dirs, device), image).unwrap();
            }
            let mut again = Machine::start(&dirs, &nothing);
            cuts += 1;
            for (number, keys) in chains.iter().enumerate() {
                let here = again.load(keys);
                came += here;
                let is_forgotten = number < 16 && flushed.is_some();
                assert!(here == 0 || !is_forgotten, "chain {number} was forgotten: it is back after {cut} writes");
            }
            again.drain();
            lost += again.metrics.ssd_checksum_errors_count.get();
            again.shard.cache().check();
        }
    }
    let writes = log.len();
    println!(
        "{writes} writes, {cuts} cuts: {came} blocks came back exact, {lost} were not what was written and were missed"
    );
    assert!(came > 0 && lost > 0, "both happen: {came} {lost}");
}
