//! The world: a shard over simulated devices, clients over real segments, and an oracle.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use kvring_engine::cache::Cache;
use kvring_engine::device::DeviceMemory;
use kvring_engine::device::sim::{Chance, Faults, Platter, Sim};
use kvring_engine::index::{Block, BlockId, Index, IndexOptions, Place, Tier};
use kvring_engine::limits::SECTOR_BYTES;
use kvring_engine::metrics::Metrics;
#[cfg(feature = "planted")]
use kvring_engine::planted;
use kvring_engine::shard::session::Session as ServerSession;
use kvring_engine::shard::{End, Shard, ShardOptions};
use kvring_engine::tier::disk::{DiskGeometry, DiskSlots};
use kvring_engine::tier::header::HEADER_BYTES;
use kvring_engine::tier::host::{HostSlots, SessionId, Writer};
use kvring_engine::tier::piece::HeaderPiece;
use kvring_engine::tier::table::{SlotTable, TableShape};
use kvring_ipc::client::{Lease, Matched, Pool, PostError, Session};
use kvring_ipc::config::{EVICTION_POLICIES, EvictionPolicy, Verify};
use kvring_ipc::key::{BlockKey, Namespace};
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};
use kvring_ipc::segment::Segment;
use kvring_ipc::stats::Stats;
use kvring_ipc::sync::Ordering;
use kvring_ipc::wire::{Completion, Grant, Op, Status, Tag};

use crate::bytes;

/// What a world is made of. Swarm: each seed draws its own.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "plain numbers, named")]
pub struct Shape {
    pub host_slots: u32,
    pub disk_slots: u32,
    pub devices: u32,
    pub slot_bytes: u64,
    pub tp_size: u32,
    pub policy: EvictionPolicy,
    pub faults: Faults,
    pub chains: usize,
    pub chain_blocks: usize,
    pub shared_prefixes: bool,
    pub lease_ttl_ns: u64,
    pub may_die: bool,
    pub may_lie: bool,
    pub may_crash: bool,
    /// Engine processes follow each other, and tiers change their size, ten times as often.
    pub is_restless: bool,
    /// What may be written to the SSD, if that is bounded: as much may be written at once, and little more while a world lasts.
    pub write_blocks_per_hour: Option<u64>,
    pub verify: Verify,
}

impl Shape {
    /// A shape from a seed.
    pub fn draw(chance: &mut Chance) -> Self {
        let mut permille = |limit: u64| if chance.happens(500) { chance.below(limit) as u32 } else { 0 };
        let faults = Faults {
            error_permille: permille(50),
            short_permille: permille(200),
            bit_rot_permille: permille(50),
            misdirected_permille: permille(50),
            lost_write_permille: permille(50),
            slow_permille: permille(50),
        };
        let with_disk = chance.happens(800);
        Self {
            host_slots: 8 + chance.below(40) as u32,
            disk_slots: if with_disk { 4 + chance.below(80) as u32 } else { 0 },
            devices: 1 + chance.below(3) as u32,
            slot_bytes: SECTOR_BYTES * (1 + chance.below(3)),
            tp_size: if chance.happens(300) { 2 } else { 1 },
            policy: EVICTION_POLICIES[chance.below(EVICTION_POLICIES.len() as u64) as usize].1,
            faults,
            chains: 2 + chance.below(10) as usize,
            chain_blocks: 2 + chance.below(30) as usize,
            shared_prefixes: true,
            lease_ttl_ns: 1_000_000 * (1 + chance.below(100)),
            may_die: chance.happens(700),
            may_lie: chance.happens(300),
            may_crash: chance.happens(400),
            // Where bugs are planted most are of this kind.
            is_restless: chance.happens(if cfg!(feature = "planted") { 500 } else { 150 }),
            write_blocks_per_hour: if chance.happens(200) { Some(8 << chance.below(8)) } else { None },
            verify: [Verify::Off, Verify::Crash, Verify::Sampled, Verify::Always][chance.below(4) as usize],
        }
    }
}

/// The layout's fingerprint, here.
const LAYOUT: u64 = 7;

/// How long a dead writer's slots wait, here.
const GRACE_NS: u64 = 2_000_000;

/// A request of a client that is not answered in full.
#[derive(Debug)]
struct Asked {
    op: Op,
    /// For matches, loads and reserves: the chain, and depth of the first block.
    chain: usize,
    first: usize,
    /// Which blocks were answered.
    answered: Vec<bool>,
    lease: Option<Lease>,
}

/// A slot that a client fills.
#[derive(Debug, Clone, Copy)]
struct Filling {
    chain: usize,
    depth: usize,
    grant: Grant,
}

/// A loaded slot that the lease still protects.
#[derive(Debug, Clone, Copy)]
struct Held {
    lease: Lease,
    key: BlockKey,
    grant: Grant,
}

/// One client: a session of an instance.
struct Client {
    id: SessionId,
    instance: u32,
    rank: u32,
    session: Session,
    asked: HashMap<Tag, Asked>,
    leases: Vec<(usize, u32, Lease)>,
    filling: Vec<Filling>,
    /// Grants that it has committed or given back already.
    old_grants: Vec<Grant>,
    held: Vec<Held>,
    hostile: bool,
}

/// Slots of a client that is gone, or that lost its session with the engine process: something still
/// writes into them.
struct Zombie {
    id: SessionId,
    slots: Vec<u32>,
    until_ns: Option<u64>,
    /// Its session was another engine process's: this one knows it from the slot table.
    former: bool,
    /// It lives, and will say when it writes no more.
    alive: bool,
}

/// What a run has done.
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "plain counts, named")]
pub struct Tally {
    pub operations: u64,
    pub blocks_loaded: u64,
    pub blocks_stored: u64,
    pub blocks_missed: u64,
    pub deaths: u64,
    pub lies: u64,
    pub crashes: u64,
    pub resets: u64,
    /// Crashes of the engine process alone: the pool stays.
    pub takeovers: u64,
    /// Blocks found in the pool after those.
    pub blocks_recovered: u64,
    /// Of these crashes, those after which a process took over that had followed the one before.
    pub followed: u64,
    /// Takeovers with tiers of other sizes.
    pub resizes: u64,
}

impl Tally {
    /// Counts what another world has done.
    pub fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.blocks_loaded += other.blocks_loaded;
        self.blocks_stored += other.blocks_stored;
        self.blocks_missed += other.blocks_missed;
        self.deaths += other.deaths;
        self.lies += other.lies;
        self.crashes += other.crashes;
        self.resets += other.resets;
        self.takeovers += other.takeovers;
        self.blocks_recovered += other.blocks_recovered;
        self.followed += other.followed;
        self.resizes += other.resizes;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { operations, blocks_stored, blocks_loaded, blocks_missed, deaths, lies, .. } = self;
        let Self { crashes, takeovers, blocks_recovered, followed, resets, resizes, .. } = self;
        write!(
            f,
            "{operations} operations, {blocks_stored} blocks stored, {blocks_loaded} loaded and compared, {blocks_missed} missed, {deaths} deaths, {lies} lies, {crashes} power cuts, {takeovers} crashes with {blocks_recovered} blocks taken over in the pool ({followed} by a process that had followed), {resets} resets, {resizes} resizes"
        )
    }
}

/// The world.
pub struct World {
    /// What it is made of.
    pub shape: Shape,
    chance: Chance,
    now_ns: u64,
    pool: Arc<Mapping>,
    /// The pool's slot table: both outlive an engine process.
    table: Arc<Mapping>,
    /// What the disks hold is being read: until when.
    disk_read_at_ns: Option<u64>,
    shard: Option<Shard<Sim>>,
    /// Slots that the pool has now, of as many as there is memory for; and slots of a device that are used.
    host_slots: u32,
    /// Which engine process serves.
    epoch: u64,
    /// An engine process that waits for its turn.
    prepared: Option<Prepared>,
    disk_limit: u32,
    /// What lies behind the pool has pages yet.
    tail_has_pages: bool,
    /// Slots of the SSD whose place was given back.
    retired: Vec<u32>,
    /// Pieces of the pool that have no pages yet, and how often a poll finds that the next one has.
    unborn: Vec<std::ops::Range<u32>>,
    born_late_permille: u32,
    /// Counters of the current shard.
    pub metrics: Arc<Metrics>,
    platters: Vec<Platter>,
    /// The header zones as they are at the start, until they are read.
    header_zones: Vec<Vec<u8>>,
    clients: Vec<Client>,
    zombies: Vec<Zombie>,
    chains: Vec<Vec<BlockKey>>,
    /// Of each chain, the namespace.
    namespaces: Vec<BlockKey>,
    committed: HashSet<BlockKey>,
    next_id: u32,
    /// Called before every poll of the shard that does not begin with a recovery under way.
    pub before_poll: Option<fn()>,
    /// Called after.
    pub after_poll: Option<fn()>,
    /// Polls so far.
    pub polls_count: u64,
    /// What was done.
    pub tally: Tally,
    /// What the shard shows, once somebody wants to see it.
    pub stats: Option<Stats>,
}

fn table_shape(shape: &Shape) -> TableShape {
    TableShape {
        pool_id: 1,
        layout: LAYOUT,
        slot_bytes: shape.slot_bytes,
        slots_max: shape.host_slots,
        tp_size: shape.tp_size,
    }
}

/// Memory for a slot table: one in eight worlds has the one of an earlier version.
fn table_memory(shape: &Shape, chance: &mut Chance) -> Arc<Mapping> {
    let shape = table_shape(shape);
    mapping(if chance.happens(125) { shape.bytes_without_journal() } else { shape.bytes() } as u64)
}

fn mapping(bytes: u64) -> Arc<Mapping> {
    let fd = sealed_memfd("kvring-world", bytes, Pages::Small).expect("a memfd");
    Arc::new(Mapping::new(&fd, bytes as usize).expect("a mapping"))
}

/// The cache of an engine process whose turn has not come, and what it was made for.
struct Prepared {
    host_slots: u32,
    disk_limit: u32,
    images: Vec<Arc<Mapping>>,
    cache: Cache,
}

/// `None` if these are a key's bytes; else where they differ, and whose they are.
fn difference(chains: &[Vec<BlockKey>], key: BlockKey, block: &[u8]) -> Option<String> {
    let at = bytes::first_difference(key, block)?;
    let owner = chains.iter().flatten().find(|other| bytes::first_difference(**other, block).is_none());
    Some(format!("{key} differs at byte {at}; these are the bytes of {owner:?}"))
}

/// Steps of a world that a seed names: the same wherever it is run, so that what failed fails again.
pub const STEPS: u64 = 5000;

impl World {
    /// A world of a seed's own shape.
    pub fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let shape = Shape::draw(&mut chance);
        Self::with_shape(shape, chance)
    }

    /// A world of this shape.
    pub fn with_shape(shape: Shape, mut chance: Chance) -> Self {
        let pool = mapping(u64::from(shape.host_slots) * shape.slot_bytes);
        let table = table_memory(&shape, &mut chance);
        SlotTable::create(table.clone(), table_shape(&shape), shape.host_slots, "");
        let mut world = Self {
            chance,
            now_ns: 1,
            pool,
            table,
            disk_read_at_ns: None,
            shard: None,
            host_slots: shape.host_slots,
            disk_limit: u32::MAX,
            tail_has_pages: false,
            retired: Vec::new(),
            epoch: 0,
            prepared: None,
            unborn: Vec::new(),
            born_late_permille: 1000,
            metrics: Arc::default(),
            platters: Vec::new(),
            header_zones: Vec::new(),
            clients: Vec::new(),
            zombies: Vec::new(),
            chains: Vec::new(),
            namespaces: Vec::new(),
            committed: HashSet::new(),
            next_id: 1,
            before_poll: None,
            after_poll: None,
            polls_count: 0,
            tally: Tally::default(),
            stats: None,
            shape,
        };
        let geometry = world.geometry();
        let files =
            |_| (0..geometry.files_per_device()).map(|file| vec![0; geometry.file_bytes(file) as usize]).collect();
        world.platters = (0..if world.shape.disk_slots > 0 { geometry.devices_count } else { 0 }).map(files).collect();
        world.draw_chains();
        world.start();
        world
    }

    fn geometry(&self) -> DiskGeometry {
        self.geometry_of(self.disk_limit)
    }

    fn geometry_of(&self, disk_limit: u32) -> DiskGeometry {
        let devices_count = self.shape.devices;
        let slots_per_device = self.shape.disk_slots.div_ceil(devices_count).max(1);
        DiskGeometry {
            devices_count,
            slots_per_device,
            slots_limit: slots_per_device.min(disk_limit),
            header_slots: slots_per_device,
            slots_per_file: slots_per_device.div_ceil(2),
            slot_bytes: self.shape.slot_bytes,
        }
    }

    /// Chains that share prefixes, as conversations do.
    fn draw_chains(&mut self) {
        let mut tokens: Vec<Vec<u32>> = Vec::new();
        for chain in 0..self.shape.chains {
            let mut these = match tokens.len() {
                0 => Vec::new(),
                _ if !self.shape.shared_prefixes => Vec::new(),
                n => {
                    let other = &tokens[self.chance.below(n as u64) as usize];
                    other[..self.chance.below(other.len() as u64 + 1) as usize].to_vec()
                }
            };
            while these.len() < self.shape.chain_blocks {
                these.push(chain as u32 * 1000 + these.len() as u32);
            }
            tokens.push(these);
        }
        // Chains that begin alike are of one namespace.
        let namespace = |tokens: &[u32]| {
            Namespace::default().tenant(if (tokens[0] / 1000).is_multiple_of(2) { "even" } else { "odd" })
        };
        self.chains = tokens.iter().map(|tokens| namespace(tokens).keys(tokens, 1)).collect();
        self.namespaces = tokens.iter().map(|tokens| namespace(tokens).id()).collect();
    }

    /// What the next engine process makes, of these sizes, before it is its turn.
    fn prepare(&mut self, host_slots: u32, disk_limit: u32) {
        let shape = &self.shape;
        let geometry = self.geometry_of(disk_limit);
        let with_disk = shape.disk_slots > 0;
        let images = if with_disk { geometry.devices_count } else { 0 };
        let images: Vec<_> = (0..images).map(|_| mapping(geometry.header_sectors() * SECTOR_BYTES)).collect();
        let options = IndexOptions {
            host_slots,
            disk_slots: if with_disk { geometry.slots_count() } else { 0 },
            policy: shape.policy,
            protected_hits: 2,
            secret: [self.chance.next_u64(), self.chance.next_u64()],
        };
        let disk = with_disk.then(|| DiskSlots::new(geometry, LAYOUT, images.clone()));
        let mut host = HostSlots::new(host_slots, shape.tp_size);
        host.keep_in(self.slot_table());
        let cache = Cache::new(&options, host, disk);
        self.prepared = Some(Prepared { host_slots, disk_limit, images, cache });
    }

    fn slot_table(&self) -> SlotTable {
        SlotTable::open(self.table.clone()).expect("the table is sound at every moment").0
    }

    /// Another engine process makes itself ready while this one serves, and takes what is in the pool already.
    fn prepare_ahead(&mut self) {
        let (host_slots, disk_limit) =
            if self.chance.happens(500) { (self.host_slots, self.disk_limit) } else { self.other_sizes() };
        self.prepare(host_slots, disk_limit);
        self.follow();
    }
    fn follow(&mut self) {
        if let Some(prepared) = &mut self.prepared {
            prepared.cache.follow_pool();
            prepared.cache.check();
        }
    }

    /// Starts a shard over what the disks hold.
    fn start(&mut self) {
        let is_ready =
            |prepared: &Prepared| prepared.host_slots == self.host_slots && prepared.disk_limit == self.disk_limit;
        match self.prepared.as_ref().is_some_and(is_ready) {
            true => self.tally.followed += 1,
            false => self.prepare(self.host_slots, self.disk_limit),
        }
        let Prepared { images, mut cache, .. } = self.prepared.take().expect("it was made");
        let platters = std::mem::take(&mut self.platters);
        let with_disk = !platters.is_empty();
        let header_bytes = self.geometry().header_sectors() * SECTOR_BYTES;
        let zone = |platter: &Platter| platter[0][SECTOR_BYTES as usize..][..header_bytes as usize].to_vec();
        self.header_zones = platters.iter().map(zone).collect();
        self.slot_table().resize(self.host_slots);
        // Now and then one has not come up before it.
        self.epoch += 1 + u64::from(self.chance.happens(100));
        cache.begin_recovery(with_disk, self.epoch);
        let shape = &self.shape;
        self.tally.blocks_recovered += u64::from(cache.recovery.recovered.host);
        // Reading what the disks hold takes its time, and serving does not wait for it.
        self.disk_read_at_ns = with_disk.then(|| self.now_ns + self.chance.below(3_000_000));
        cache.check();
        let devices = platters.into_iter().zip(images).map(|(platter, headers)| {
            let memory = DeviceMemory { pool: self.pool.clone(), headers, piece_bytes: self.pool.bytes() };
            Sim::new(platter, memory, 16, 20_000, shape.faults, self.chance.next_u64())
        });
        let shard_options = ShardOptions {
            slot_bytes: shape.slot_bytes,
            lease_ttl_ns: shape.lease_ttl_ns,
            load_wait_ns: 500_000,
            writer_grace_ns: GRACE_NS,
            read_depth: 8,
            write_depth: 4,
            write_bytes_per_day: shape.write_blocks_per_hour.map(|blocks| blocks * shape.slot_bytes * 24),
            checksum: true,
            verify: shape.verify,
            clock: || 0,
        };
        self.metrics = Arc::default();
        let mut shard = Shard::new(cache, self.pool.clone(), devices.collect(), shard_options, self.metrics.clone());
        // Piece by piece, and some of it late, in any order.
        let first = 1 + self.chance.below(u64::from(self.host_slots)) as u32;
        let second = first + self.chance.below(u64::from(self.host_slots - first) + 1) as u32;
        self.unborn = vec![first..second, second..self.host_slots];
        if self.chance.happens(500) {
            self.unborn.reverse();
        }
        self.born_late_permille = if shape.may_crash { [1000, 20, 2][self.chance.below(3) as usize] } else { 1000 };
        shard.bear(0, 0..first).expect("a simulated device registers anything");
        self.shard = Some(shard);
        if self.stats.is_some() {
            self.show();
        }
        self.bear_some();
    }

    /// From now on the shard shows what it does, in a stats segment that is new with each shard.
    pub fn show(&mut self) {
        let stats = Stats::private(1 << 16).expect("memory");
        self.shard().show_in(stats.clone());
        self.stats = Some(stats);
    }

    /// More of the pool has its pages.
    fn bear_some(&mut self) {
        while !self.unborn.is_empty() && self.chance.happens(self.born_late_permille) {
            let slots = self.unborn.remove(0);
            self.shard().bear(1, slots).expect("a simulated device registers anything");
        }
    }

    fn shard(&mut self) -> &mut Shard<Sim> {
        self.shard.as_mut().expect("a shard runs")
    }

    /// Attaches the sessions of one instance: one a rank.
    pub fn join(&mut self) {
        self.join_as(self.shape.tp_size, 1);
    }

    /// Attaches so many sessions of one instance for each rank.
    pub fn join_as(&mut self, ranks: u32, times: u32) {
        self.join_by(0, ranks, times);
    }

    /// The same for an instance of this user.
    pub fn join_by(&mut self, user: u32, ranks: u32, times: u32) {
        let instance = self.next_id;
        for rank in (0..times).flat_map(|_| 0..ranks) {
            let id = SessionId(self.next_id);
            self.next_id += 1;
            let (segment, _fd) = Segment::create().expect("a segment");
            let pool = Pool::new(self.pool.clone(), self.shape.slot_bytes as usize, self.host_slots);
            let session = Session::within(segment.clone(), pool);
            let writer = Writer { session: id, instance, rank };
            let mut session_there = Box::new(ServerSession::new(writer, segment, None));
            session_there.user = user;
            self.shard().attach(session_there);
            let client = Client {
                id,
                instance,
                rank,
                session,
                asked: HashMap::new(),
                leases: Vec::new(),
                filling: Vec::new(),
                old_grants: Vec::new(),
                held: Vec::new(),
                hostile: false,
            };
            self.clients.push(client);
        }
    }

    /// Runs `steps` random steps, then ends every session and looks for what is left behind.
    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step();
        }
        self.finish();
    }

    /// As [`World::run`]; adds the operations to a count as they are made, should a step panic.
    pub fn run_counting(&mut self, steps: u64, operations: &std::sync::atomic::AtomicU64) {
        for _ in 0..steps {
            let before = self.tally.operations;
            self.step();
            operations.fetch_add(self.tally.operations - before, std::sync::atomic::Ordering::Relaxed);
        }
        self.finish();
    }

    fn step(&mut self) {
        if self.clients.is_empty() || (self.clients.len() < 6 && self.chance.happens(5)) {
            self.join();
        }
        let at = self.chance.below(self.clients.len() as u64) as usize;
        match self.chance.below(1000) {
            0..3 if self.shape.may_die => self.die(at),
            3..5 if self.shape.may_lie => self.lie(at),
            5..6 if self.shape.may_crash && self.chance.happens(500) => self.crash(),
            5..6 if self.shape.may_crash && self.chance.happens(700) => self.die_and_take_over(),
            5..6 if self.shape.may_crash => self.resize(),
            6..7 if self.chance.happens(500) => self.reset(),
            6..7 if self.chance.happens(500) => self.forget(),
            6..7 => self.reset_namespace(),
            7..8 if self.shape.may_crash && self.prepared.is_some() => self.follow(),
            7..8 if self.shape.may_crash => self.prepare_ahead(),
            8..12 if self.shape.may_crash && self.shape.is_restless => match self.chance.below(4) {
                0..2 => self.die_and_take_over(),
                _ => self.resize(),
            },
            8..100 => self.now_ns += self.chance.below(400_000),
            100..300 => self.post_match(at),
            300..480 => self.post_load(at),
            480..500 => self.post_prefetch(at),
            500..520 => self.post_cancel(at),
            520..700 => self.post_reserve(at),
            700..705 => self.commit_again(at),
            705..850 => self.commit_or_abort(at),
            850..930 => self.release(at),
            _ => self.look_again(at),
        }
        self.haunt();
        if self.chance.happens(2) {
            self.break_a_device();
        }
        if self.chance.happens(700) {
            self.now_ns += self.chance.below(20_000);
            self.poll_once();
        }
        if self.chance.happens(500) && !self.clients.is_empty() {
            self.collect(at.min(self.clients.len() - 1));
        }
        if self.chance.happens(2) {
            self.shard().cache().check();
        }
    }

    /// A device dies, hangs or is well again. One that hangs is lost after ten seconds, whatever waits for it.
    fn break_a_device(&mut self) {
        let (kind, which) = (self.chance.below(5), self.chance.below(4) as usize);
        if kind == 2 {
            // In steps: a shard that has not run for seconds judges nobody.
            for _ in 0..12 {
                self.now_ns += 1_000_000_000;
                self.poll_once();
            }
            return;
        }
        let Some(device) = self.shard().devices().nth(which) else { return };
        (device.dead, device.hung) = (kind == 0, kind == 1);
    }

    /// Lets the shard do one round.
    pub fn poll_once(&mut self) {
        if self.disk_read_at_ns.is_some_and(|at| at <= self.now_ns) {
            self.disk_read_at_ns = None;
            let geometry = self.geometry();
            for (device, mut zone) in (0..).zip(std::mem::take(&mut self.header_zones)) {
                // In pieces, as several readers find them: each with some of the headers, the last with the rest.
                for permille in [300, 500, 1000] {
                    let mut some = vec![0; zone.len()];
                    let headers = zone.chunks_mut(HEADER_BYTES as usize).zip(some.chunks_mut(HEADER_BYTES as usize));
                    for (header, taken) in headers {
                        if self.chance.happens(permille) {
                            taken.swap_with_slice(header);
                        }
                    }
                    self.shard().found_on_disk(HeaderPiece::of(&geometry, LAYOUT, device, 0, &some));
                }
            }
            self.shard().disk_was_read();
        }
        let (now_ns, mut before, mut after) = (self.now_ns, self.before_poll, self.after_poll);
        if self.shard().cache().is_recovering() {
            // Its end lets go of what only a start needs.
            (before, after) = (None, None);
        }
        self.bear_some();
        self.polls_count += 1;
        before.inspect(|before| before());
        self.shard().poll(now_ns);
        let shard = self.shard.as_mut().expect("a shard runs");
        self.retired.extend(shard.take_retired());
        after.inspect(|after| after());
    }

    /// Lets time pass, in small steps.
    pub fn pass(&mut self, ns: u64) {
        let end = self.now_ns + ns;
        let step = (ns / 1000).max(10_000);
        while self.now_ns < end {
            self.now_ns += step;
            self.poll_once();
        }
    }

    /// Somebody who may not writes into a slot of the pool.
    pub fn scribble(&mut self, slot: u32) {
        let offset = slot as usize * self.shape.slot_bytes as usize;
        self.pool.copy_in(offset + 40, b"not what was stored");
    }

    /// Slots of the pool that are free.
    pub fn free_slots(&mut self) -> u32 {
        self.shard().cache().host.free_count()
    }

    /// Waits for all answers of a client and gives them.
    fn answers(&mut self, at: usize) -> Vec<Completion> {
        let mut all = Vec::new();
        for _ in 0..1000 {
            self.now_ns += 10_000;
            self.poll_once();
            self.clients[at].session.poll(|completion| all.push(completion)).expect("an honest session");
        }
        for completion in &all {
            self.answer(at, *completion);
        }
        all
    }

    /// The first `blocks` blocks of a chain are reserved for a client; says which slots it was granted.
    pub fn reserve(&mut self, at: usize, chain: usize, blocks: usize) -> Vec<Grant> {
        let posted = self.clients[at].session.post_reserve(self.namespaces[chain], 0, &self.chains[chain][..blocks]);
        self.post(at, posted, Self::asked(Op::Reserve, chain, 0, blocks));
        self.answers(at)
            .iter()
            .flat_map(|completion| completion.grants().map(|(_, grant)| grant).collect::<Vec<_>>())
            .collect()
    }

    /// Fills slots with a chain's blocks from `first` on and commits them; says how many were taken.
    pub fn fill_and_commit(&mut self, at: usize, chain: usize, first: usize, grants: &[Grant]) -> u64 {
        let mut bytes = vec![0; self.shape.slot_bytes as usize];
        for (grant, key) in grants.iter().zip(&self.chains[chain][first..]) {
            bytes::fill(*key, 0, &mut bytes);
            self.clients[at].session.pool().copy_in(grant.slot, 0, &bytes);
            self.committed.insert(*key);
        }
        self.clients[at].filling.retain(|filling| !grants.contains(&filling.grant));
        let posted = self.clients[at].session.post_commit(grants);
        self.post(at, posted, Self::asked(Op::Commit, 0, 0, 0));
        self.answers(at)[0].payload[0]
    }

    /// Matches the first `blocks` blocks of a chain; says how many are resident. The lease is kept.
    pub fn match_blocks(&mut self, at: usize, chain: usize, blocks: usize) -> u32 {
        let posted = self.clients[at].session.post_match(&self.chains[chain][..blocks]);
        self.post(at, posted, Self::asked(Op::Match, chain, 0, blocks));
        self.answers(at)[0].count
    }

    /// As [`World::match_blocks`], without letting time pass.
    pub fn match_blocks_at_once(&mut self, at: usize, chain: usize, blocks: usize) -> u32 {
        let posted = self.clients[at].session.post_match(&self.chains[chain][..blocks]);
        self.post(at, posted, Self::asked(Op::Match, chain, 0, blocks));
        self.poll_once();
        let mut count = 0;
        let mut completions = Vec::new();
        self.clients[at].session.poll(|completion| completions.push(completion)).expect("an honest session");
        for completion in completions {
            count = completion.count;
            self.answer(at, completion);
        }
        count
    }

    /// A client's last lease on a chain.
    pub fn lease_on(&self, at: usize, chain: usize) -> Lease {
        self.clients[at].leases.iter().rfind(|lease| lease.0 == chain).expect("a lease").2
    }

    /// What a client shares with the server.
    pub fn segment_of(&self, at: usize) -> Segment {
        self.clients[at].session.segment().clone()
    }

    /// Posts the load of a chain's first blocks under the client's last lease on it.
    pub fn post_load_of(&mut self, at: usize, chain: usize, blocks: usize) {
        self.post_load_under(at, self.lease_on(at, chain), chain, 0..blocks);
    }

    fn post_load_under(&mut self, at: usize, lease: Lease, chain: usize, blocks: std::ops::Range<usize>) {
        let (first, count) = (blocks.start, blocks.len());
        let posted = self.clients[at].session.post_load(lease.id, first as u32, &self.chains[chain][blocks]);
        self.post(at, posted, Asked { lease: Some(lease), ..Self::asked(Op::Load, chain, first, count) });
    }

    /// Loads a chain's first blocks under the client's last lease on it: runs of equal statuses.
    pub fn load(&mut self, at: usize, chain: usize, blocks: usize) -> Vec<(Status, u32)> {
        self.load_under(at, self.lease_on(at, chain), chain, 0..blocks)
    }

    /// Loads blocks of a chain under any lease: runs of equal statuses.
    pub fn load_under(
        &mut self,
        at: usize,
        lease: Lease,
        chain: usize,
        blocks: std::ops::Range<usize>,
    ) -> Vec<(Status, u32)> {
        self.post_load_under(at, lease, chain, blocks);
        let mut runs: Vec<(Status, u32)> = Vec::new();
        for completion in self.answers(at) {
            match runs.last_mut() {
                Some(run) if run.0 == completion.status => run.1 += completion.count,
                _ => runs.push((completion.status, completion.count)),
            }
        }
        runs
    }

    /// A client's process hangs up, or dies. Clients behind it move up.
    pub fn kill(&mut self, at: usize, end: End) {
        let client = self.clients.remove(at);
        let now_ns = self.now_ns;
        self.shard().end(client.id, end, now_ns);
        self.zombies.push(Zombie { id: client.id, slots: Vec::new(), until_ns: None, former: false, alive: false });
    }

    /// All that were killed are known to be dead.
    pub fn confirm_dead(&mut self) {
        let now_ns = self.now_ns;
        for zombie in std::mem::take(&mut self.zombies) {
            self.shard().end(zombie.id, End::Dead, now_ns);
        }
    }

    /// A client writes exactly this into its segment.
    pub fn lie_exactly(&mut self, at: usize, write: impl FnOnce(&[kvring_ipc::sync::AtomicU64])) {
        self.clients[at].hostile = true;
        write(self.clients[at].session.segment().all_words());
        self.poll_once();
    }

    /// A client posts, and never takes an answer.
    pub fn post_pings_without_taking(&mut self, at: usize, count: u32) {
        self.clients[at].hostile = true;
        for _ in 0..count {
            if self.clients[at].session.post_ping().is_ok() {
                self.clients[at].session.publish();
            }
            self.poll_once();
        }
    }

    fn chain_below(&mut self, limit: usize) -> (usize, usize) {
        let chain = self.chance.below(self.chains.len() as u64) as usize;
        (chain, 1 + self.chance.below(limit as u64) as usize)
    }

    fn post(&mut self, at: usize, posted: Result<Tag, PostError>, asked: Asked) {
        self.tally.operations += 1;
        let client = &mut self.clients[at];
        match posted {
            Ok(tag) => {
                client.asked.insert(tag, asked);
                client.session.publish();
            }
            Err(PostError::Full) => {}
            Err(PostError::Broken(broken)) => assert!(client.hostile, "an honest session broke: {broken}"),
        }
    }

    fn asked(op: Op, chain: usize, first: usize, count: usize) -> Asked {
        Asked { op, chain, first, answered: vec![false; count], lease: None }
    }

    fn post_match(&mut self, at: usize) {
        let (chain, blocks) = self.chain_below(self.shape.chain_blocks);
        let posted = self.clients[at].session.post_match(&self.chains[chain][..blocks]);
        self.post(at, posted, Self::asked(Op::Match, chain, 0, blocks));
    }

    fn post_load(&mut self, at: usize) {
        let leases = &self.clients[at].leases;
        if leases.is_empty() {
            return;
        }
        let (chain, blocks, lease) = leases[self.chance.below(leases.len() as u64) as usize];
        let first = self.chance.below(u64::from(blocks)) as usize;
        let count = 1 + self.chance.below(u64::from(blocks) - first as u64) as usize;
        let posted =
            self.clients[at].session.post_load(lease.id, first as u32, &self.chains[chain][first..first + count]);
        self.post(at, posted, Asked { lease: Some(lease), ..Self::asked(Op::Load, chain, first, count) });
    }

    fn post_prefetch(&mut self, at: usize) {
        if let Some((chain, blocks, lease)) = self.clients[at].leases.last().copied() {
            let posted = self.clients[at].session.post_prefetch(lease.id, 0, blocks.min(256));
            self.post(at, posted, Self::asked(Op::Prefetch, chain, 0, 0));
        }
    }

    fn post_cancel(&mut self, at: usize) {
        let target = self.clients[at].asked.iter().filter(|(_, asked)| asked.op == Op::Load).map(|(tag, _)| *tag).min();
        if let Some(target) = target {
            let posted = self.clients[at].session.post_cancel(target);
            self.post(at, posted, Self::asked(Op::Cancel, 0, 0, 0));
        }
    }

    fn post_reserve(&mut self, at: usize) {
        let (chain, end) = self.chain_below(self.shape.chain_blocks);
        // Mostly from the root, as a store after a miss is; sometimes from anywhere.
        let first = if self.chance.happens(600) { 0 } else { self.chance.below(end as u64) as usize };
        let parent = if first == 0 { self.namespaces[chain] } else { self.chains[chain][first - 1] };
        let (instance, rank) = (self.clients[at].instance, self.clients[at].rank);
        // With tensor parallelism every rank of the instance stores the same blocks.
        let ranks: Vec<usize> = (0..self.clients.len()).filter(|i| self.clients[*i].instance == instance).collect();
        for peer in ranks {
            if self.clients[peer].rank != rank && self.chance.happens(100) {
                continue;
            }
            let posted = self.clients[peer].session.post_reserve(parent, first as u32, &self.chains[chain][first..end]);
            self.post(peer, posted, Self::asked(Op::Reserve, chain, first, end - first));
        }
    }

    fn commit_or_abort(&mut self, at: usize) {
        let commit = self.chance.happens(900);
        let part = self.shape.slot_bytes as usize / self.shape.tp_size as usize;
        let client = &mut self.clients[at];
        // What a liar holds may have been given away by its own garbage: it writes no more.
        if client.filling.is_empty() || client.hostile {
            return;
        }
        let some = 1 + self.chance.below(client.filling.len() as u64) as usize;
        let filling: Vec<Filling> = client.filling.drain(..some).collect();
        let grants: Vec<Grant> = filling.iter().map(|filling| filling.grant).collect();
        let mut bytes = vec![0; part];
        for filling in &filling {
            let key = self.chains[filling.chain][filling.depth];
            let offset = client.rank as usize * part;
            bytes::fill(key, offset, &mut bytes);
            client.session.pool().copy_in(filling.grant.slot, offset, &bytes);
            if commit {
                self.committed.insert(key);
            }
        }
        self.tally.blocks_stored += grants.len() as u64;
        let (posted, op) = if commit {
            (client.session.post_commit(&grants), Op::Commit)
        } else {
            (client.session.post_abort(&grants), Op::Abort)
        };
        if posted == Err(PostError::Full) {
            self.clients[at].filling.extend(filling);
            return;
        }
        let client = &mut self.clients[at];
        client.old_grants.extend(&grants);
        client.old_grants.drain(..client.old_grants.len().saturating_sub(64));
        self.post(at, posted, Self::asked(op, 0, 0, 0));
    }

    /// A client that has lost count commits what it had long ago: nobody is to take it for what its slots
    /// hold now.
    fn commit_again(&mut self, at: usize) {
        let client = &mut self.clients[at];
        if client.old_grants.is_empty() || client.hostile {
            return;
        }
        let old = self.chance.below(client.old_grants.len() as u64) as usize;
        let posted = client.session.post_commit(&[client.old_grants[old]]);
        self.post(at, posted, Self::asked(Op::Commit, 0, 0, 0));
    }

    fn release(&mut self, at: usize) {
        let client = &mut self.clients[at];
        if client.leases.is_empty() {
            return;
        }
        let (_, _, lease) = client.leases.swap_remove(self.chance.below(client.leases.len() as u64) as usize);
        let posted = client.session.post_release(lease.id);
        if posted.is_ok() {
            client.held.retain(|held| held.lease != lease);
        }
        self.post(at, posted, Self::asked(Op::Release, 0, 0, 0));
    }

    /// What a lease protects is still there, long after it was loaded.
    fn look_again(&mut self, at: usize) {
        let (now_ns, slot_bytes) = (self.now_ns, self.shape.slot_bytes as usize);
        let client = &mut self.clients[at];
        if client.hostile {
            return;
        }
        client.held.retain(|held| held.lease.expires_at_ns > now_ns);
        let mut block = vec![0; slot_bytes];
        for held in &client.held {
            client.session.pool().copy_out(held.grant.slot, 0, &mut block);
            let wrong = difference(&self.chains, held.key, &block);
            assert_eq!(wrong, None, "a leased block changed: {held:?} at {now_ns}");
        }
    }

    /// Takes what a client was answered, and holds it against the oracle.
    fn collect(&mut self, at: usize) {
        let mut completions = Vec::new();
        let client = &mut self.clients[at];
        let polled = client.session.poll(|completion| completions.push(completion));
        if client.hostile {
            return;
        }
        assert!(polled.is_ok(), "an honest session broke: {polled:?}");
        for completion in completions {
            self.answer(at, completion);
        }
    }

    fn answer(&mut self, at: usize, completion: Completion) {
        let client = &mut self.clients[at];
        let asked = client.asked.get_mut(&completion.tag).expect("an answer to what was asked, once");
        assert_eq!(completion.op, Some(asked.op), "an honest request is understood");
        assert_ne!(completion.status, Status::BadRequest);
        let answers_blocks = matches!(asked.op, Op::Load | Op::Reserve);
        if answers_blocks {
            for index in completion.first..completion.first + completion.count {
                let answered = &mut asked.answered[index as usize];
                assert!(!std::mem::replace(answered, true), "a block is answered once");
            }
        }
        let chain = &self.chains[asked.chain];
        match (asked.op, completion.status) {
            (Op::Match, Status::Ok) => {
                let matched = Matched::from_completion(&completion);
                assert!(matched.blocks as usize <= asked.answered.len());
                for key in &chain[..matched.blocks as usize] {
                    assert!(self.committed.contains(key), "a block that nobody stored is resident");
                }
                if let Some(lease) = matched.lease {
                    client.leases.push((asked.chain, matched.blocks, lease));
                }
            }
            (Op::Load, Status::Ok) => {
                let lease = asked.lease.expect("a load has a lease");
                let mut block = vec![0; self.shape.slot_bytes as usize];
                for (index, grant) in completion.grants() {
                    if lease.expires_at_ns <= self.now_ns || !client.leases.iter().any(|(_, _, held)| *held == lease) {
                        continue;
                    }
                    let key = chain[asked.first + index as usize];
                    client.session.pool().copy_out(grant.slot, 0, &mut block);
                    assert_eq!(difference(&self.chains, key, &block), None, "wrong bytes in {grant:?} under {lease:?}");
                    assert!(self.committed.contains(&key), "{key} was stored before a reset and is loaded after it");
                    self.tally.blocks_loaded += 1;
                    client.held.push(Held { lease, key, grant });
                }
            }
            (Op::Load, _) => self.tally.blocks_missed += u64::from(completion.count),
            (Op::Reserve, Status::Ok) => {
                for (index, grant) in completion.grants() {
                    let depth = asked.first + index as usize;
                    client.filling.push(Filling { chain: asked.chain, depth, grant });
                }
            }
            _ => {}
        }
        if completion.last {
            let asked = client.asked.remove(&completion.tag).expect("it was there");
            let whole = !matches!(asked.op, Op::Load | Op::Reserve) || asked.answered.iter().all(|answered| *answered);
            assert!(whole, "the last answer leaves no block out");
        }
    }

    /// A client ends: politely, by hanging up, or killed with a DMA engine behind it.
    fn die(&mut self, at: usize) {
        self.tally.deaths += 1;
        let client = self.clients.swap_remove(at);
        let now_ns = self.now_ns;
        if self.chance.happens(300) {
            self.shard().end(client.id, End::Goodbye, now_ns);
            return;
        }
        self.shard().end(client.id, End::Suspect, now_ns);
        self.zombies.push(Self::zombie(client));
    }

    /// What a client was granted, and what was granted to it and never read: all may be written to.
    fn zombie(client: Client) -> Zombie {
        let mut slots: Vec<u32> = client.filling.iter().map(|filling| filling.grant.slot).collect();
        let mut session = client.session;
        let _ = session.poll(|completion| {
            if completion.op == Some(Op::Reserve) {
                slots.extend(completion.grants().map(|(_, grant)| grant.slot));
            }
        });
        let slots = if client.hostile { Vec::new() } else { slots };
        Zombie { id: client.id, slots, until_ns: None, former: false, alive: false }
    }

    /// The dead write on, until their grace is over.
    fn haunt(&mut self) {
        if self.zombies.is_empty() {
            return;
        }
        let now_ns = self.now_ns;
        // Time goes on in steps of a second sometimes: whose grace is over since has written its last.
        for zombie in self.zombies.iter().filter(|zombie| zombie.until_ns.is_none_or(|until| until > now_ns)) {
            for slot in &zombie.slots {
                let offset = *slot as usize * self.shape.slot_bytes as usize;
                self.pool.copy_in(offset, &self.chance.next_u64().to_le_bytes());
            }
        }
        let mut over = Vec::new();
        for zombie in &mut self.zombies {
            if zombie.until_ns.is_none() && self.chance.happens(20) {
                // Who says that it writes no more does not; what died may, until its grace is over.
                zombie.until_ns = Some(if zombie.alive { 0 } else { now_ns + GRACE_NS });
                over.push((zombie.id, zombie.former, zombie.alive));
            }
        }
        for (id, former, alive) in over {
            match former {
                true => self.shard().end_former(id, if alive { End::Goodbye } else { End::Dead }, now_ns),
                false => drop(self.shard().end(id, End::Dead, now_ns)),
            }
        }
        // The grace was counted from a moment before this one: by then the last write is past.
        self.zombies.retain(|zombie| zombie.until_ns.is_none_or(|until| until > now_ns + 500_000));
        self.give_tail_back();
    }

    /// A client writes garbage into every kind of word it can reach. Its own session is forfeit.
    fn lie(&mut self, at: usize) {
        self.tally.lies += 1;
        let part = self.shape.slot_bytes as usize / self.shape.tp_size as usize;
        // Ranks of one instance share its leases: one that lies may release another's.
        let instance = self.clients[at].instance;
        self.clients.iter_mut().filter(|client| client.instance == instance).for_each(|client| client.hostile = true);
        let client = &mut self.clients[at];
        // Garbage may commit what was reserved. Storing wrong bytes under a key one may name is not a
        // lie that a server can see (THREATS.md), so they are right here.
        let mut bytes = vec![0; part];
        for filling in &std::mem::take(&mut client.filling) {
            let key = self.chains[filling.chain][filling.depth];
            bytes::fill(key, client.rank as usize * part, &mut bytes);
            client.session.pool().copy_in(filling.grant.slot, client.rank as usize * part, &bytes);
            self.committed.insert(key);
        }
        let words = client.session.segment().all_words();
        for _ in 0..1 + self.chance.below(64) {
            let place = match self.chance.below(3) {
                0 => self.chance.below(64),
                1 => 512 + self.chance.below(1024),
                _ => self.chance.below(words.len() as u64),
            };
            let value = match self.chance.below(4) {
                0 => self.chance.next_u64(),
                1 => u64::MAX,
                2 => self.chance.below(16) << 16 | self.chance.below(12),
                _ => self.chance.below(2048),
            };
            words[place as usize].store(value, Ordering::Relaxed);
        }
    }

    /// The engine dies at this very moment, sometimes with the power.
    fn crash(&mut self) {
        self.tally.crashes += 1;
        let devices = self.shard.take().expect("a shard runs").into_devices();
        self.platters = devices.into_iter().map(Sim::power_cut).collect();
        self.punch();
        self.clients.clear();
        self.zombies.clear();
        // Memory does not outlive the machine, nor do sizes that it was asked for while it ran.
        self.prepared = None;
        self.host_slots = self.shape.host_slots;
        self.table = table_memory(&self.shape, &mut self.chance);
        SlotTable::create(self.table.clone(), table_shape(&self.shape), self.shape.host_slots, "");
        self.start();
    }

    /// The engine process alone dies at this very moment, and another takes the pool over. Its sessions
    /// end; what they were filling they may write on into, until they say that they do not, or die.
    pub fn take_over(&mut self) {
        self.take_over_with(self.host_slots, self.disk_limit);
    }

    /// The engine process dies between two polls; or, where bugs can be planted, between two stores that others see.
    fn die_and_take_over(&mut self) {
        let kept = !self.dies_within_a_poll();
        self.take_over_from(self.host_slots, self.disk_limit, kept);
    }

    #[cfg(not(feature = "planted"))]
    fn dies_within_a_poll(&mut self) -> bool {
        false
    }

    /// Whether it did: it is asked for something, and somewhere on the way it is dead. What it was about to do is half done.
    #[cfg(feature = "planted")]
    fn dies_within_a_poll(&mut self) -> bool {
        if self.chance.happens(300) || self.clients.is_empty() {
            return false;
        }
        if self.chance.happens(500) {
            let open = 1 + self.chance.below(u64::from(self.host_slots)) as u32;
            self.shard().vacate(Some(open));
        }
        planted::die_after(Some(self.chance.below(200) as u32));
        let mut died = false;
        for _ in 0..20 {
            let at = self.chance.below(self.clients.len() as u64) as usize;
            match self.chance.below(3) {
                0 => self.post_load(at),
                1 => self.post_reserve(at),
                _ => self.commit_or_abort(at),
            }
            self.now_ns += 20_000;
            let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.poll_once()));
            match polled {
                Ok(()) => self.collect(at),
                Err(panic) if panic.is::<planted::Died>() => {
                    died = true;
                    break;
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        planted::die_after(None);
        died
    }

    /// Another engine process takes over with tiers of other sizes. The end of a smaller pool is emptied first, as far as
    /// time goes.
    fn resize(&mut self) {
        let (host_slots, disk_limit) = match &self.prepared {
            Some(Prepared { host_slots, disk_limit, .. }) => (*host_slots, *disk_limit),
            None => self.other_sizes(),
        };
        if host_slots < self.host_slots {
            // What was answered before is heard before: else nobody knows what he may write to.
            self.shard().vacate(Some(host_slots));
            let rounds = self.chance.below(100);
            for _ in 0..rounds {
                self.now_ns += 20_000;
                self.poll_once();
                self.haunt();
                if self.chance.happens(5) {
                    self.reset_namespace();
                }
                let at = self.chance.below(self.clients.len().max(1) as u64) as usize;
                if at < self.clients.len() {
                    match self.chance.below(5) {
                        0 => self.post_match(at),
                        1 => self.post_load(at),
                        2 => self.post_reserve(at),
                        3 => self.commit_or_abort(at),
                        _ => self.collect(at),
                    }
                }
            }
            self.shard().cache().check();
            if self.chance.happens(300) {
                // The next engine process has not started.
                return self.shard().vacate(None);
            }
        }
        self.tally.resizes += 1;
        self.take_over_with(host_slots, disk_limit);
        self.tail_has_pages = true;
        self.give_tail_back();
        if self.chance.happens(300) {
            // It was a mistake: while who was filling a slot behind the smaller pool may be at it yet.
            self.take_over_with(self.shape.host_slots, disk_limit);
        }
    }

    /// Once nobody who had a session before a resize can be writing, what lies behind the pool is the system's: zeros, should
    /// it come back.
    fn give_tail_back(&mut self) {
        if self.tail_has_pages && !self.zombies.iter().any(|zombie| zombie.former) {
            self.tail_has_pages = false;
            let from = self.host_slots as usize * self.shape.slot_bytes as usize;
            self.pool.copy_in(from, &vec![0; self.pool.bytes() - from]);
        }
    }

    fn other_sizes(&mut self) -> (u32, u32) {
        let host_slots = 1 + self.chance.below(u64::from(self.shape.host_slots)) as u32;
        let slots_per_device = self.geometry().slots_per_device;
        (host_slots, 1 + self.chance.below(u64::from(slots_per_device)) as u32)
    }

    /// What was given back holds nothing.
    fn punch(&mut self) {
        let geometry = self.geometry();
        for slot in std::mem::take(&mut self.retired) {
            let ((file, offset), bytes) = (geometry.offset_of(slot), self.shape.slot_bytes as usize);
            self.platters[geometry.device_of(slot)][usize::from(file)][offset as usize..][..bytes].fill(0);
        }
    }

    fn take_over_with(&mut self, host_slots: u32, disk_limit: u32) {
        self.take_over_from(host_slots, disk_limit, true);
    }

    /// With `whole` the last process died between two polls: then what it had is known, and nothing of it is lost.
    fn take_over_from(&mut self, host_slots: u32, disk_limit: u32, whole: bool) {
        self.tally.takeovers += 1;
        // What was answered before is heard before, or never.
        for at in 0..self.clients.len() {
            if self.chance.happens(500) {
                self.collect(at);
            }
        }
        let kept = if whole { self.whole_chains_in_the_pool(host_slots) } else { Vec::new() };
        let born = self.unborn.iter().map(|slots| slots.start).min().unwrap_or(self.host_slots).min(host_slots);
        let devices = self.shard.take().expect("a shard runs").into_devices();
        // Its transfers end before its lock is free: none is under way any more, each may have happened.
        self.platters = devices.into_iter().map(Sim::power_cut).collect();
        self.punch();
        (self.host_slots, self.disk_limit) = (host_slots, disk_limit);
        // Whose grace was over has written its last: the last process may have given its slots to others.
        let now_ns = self.now_ns;
        self.zombies.retain(|zombie| zombie.until_ns.is_none_or(|until| until > now_ns));
        for zombie in &mut self.zombies {
            // Whose death the last process knew of is dead to this one from its start on: another grace.
            let dead = zombie.until_ns.is_some_and(|until| until > 0);
            zombie.until_ns = dead.then_some(self.now_ns + GRACE_NS);
            zombie.former = true;
        }
        for client in std::mem::take(&mut self.clients) {
            let alive = !client.hostile && self.chance.happens(700);
            let zombie = Self::zombie(client);
            self.zombies.push(Zombie { former: true, alive, ..zombie });
        }
        self.start();
        let index = &self.shard().cache().index;
        for key in kept {
            let found = index.find(key).map(|id| index.block(id));
            let there = found.is_some_and(|block| block.is_visible() && block.place(Tier::Host).ready().is_some());
            assert!(there, "{key} was in the pool and its chain was too: it is lost with the process");
        }
        // Else the first store evicts what was just taken over.
        assert!(self.shard().cache().host.born_count() >= born, "what had pages is free or in use at once");
        // Whoever is not known to live is dead from now on.
        let now_ns = self.now_ns;
        for id in self.shard().cache().host.suspects() {
            if !self.zombies.iter().any(|zombie| zombie.id == id && zombie.until_ns.is_none()) {
                self.shard().end_former(id, End::Dead, now_ns);
            }
        }
    }

    /// Blocks that the first so many slots of the pool hold, with all that come before them.
    fn whole_chains_in_the_pool(&mut self, slots: u32) -> Vec<BlockKey> {
        let index = &self.shard().cache().index;
        let in_pool =
            |block: &Block| block.is_visible() && block.place(Tier::Host).ready().is_some_and(|slot| slot < slots);
        let mut kept = Vec::new();
        for (_, block) in index.blocks() {
            let (mut at, mut whole) = (block, in_pool(block));
            while let (true, Some(parent)) = (whole, at.parent()) {
                at = index.block(parent);
                whole = in_pool(at);
            }
            kept.extend(whole.then_some(block.key));
        }
        kept
    }

    /// Forgets everything: what was stored before is never resident again, not after a crash either, unless
    /// the disk lies about what it wrote.
    fn reset(&mut self) {
        let faults = self.shape.faults;
        if faults.lost_write_permille + faults.misdirected_permille > 0 {
            return;
        }
        // What was answered before is heard before.
        for at in 0..self.clients.len() {
            self.collect(at);
        }
        self.tally.resets += 1;
        let before = std::mem::take(&mut self.committed);
        self.shard().reset();
        self.shard().cache().check();
        for _ in 0..2_000 {
            if self.shard().is_reset() {
                return;
            }
            self.now_ns += 10_000;
            self.poll_once();
        }
        // A disk that refuses to write cannot forget: nobody is told that it did.
        self.committed.extend(before);
    }

    /// Whether somebody can be told now that something is forgotten for good; and what was answered before is heard before.
    fn may_forget(&mut self) -> bool {
        let faults = self.shape.faults;
        if faults.lost_write_permille + faults.misdirected_permille > 0 || self.shard().cache().is_recovering() {
            return false;
        }
        for at in 0..self.clients.len() {
            self.collect(at);
        }
        if self.chance.happens(300) {
            // By an operator: slots are free then whose headers stay until they are used again.
            let some = self.chance.below(8) as u32;
            self.shard().evict(Tier::Host, some);
        }
        self.tally.resets += 1;
        true
    }

    /// Forgets a namespace, as [`World::reset`] forgets everything. The others notice nothing.
    fn reset_namespace(&mut self) {
        if !self.may_forget() {
            return;
        }
        let id = self.namespaces[self.chance.below(self.namespaces.len() as u64) as usize];
        let index = &self.shard.as_ref().expect("it runs").cache().index;
        let of = |key: BlockKey| index.find(key).map(|at| index.namespaces.of(index.block(at).namespace).id);
        // Of whoever lies about its namespace nothing is promised.
        let is_its = |chain: &usize| self.namespaces[*chain] == id;
        let its: HashSet<BlockKey> = (0..self.chains.len())
            .filter(is_its)
            .flat_map(|chain| &self.chains[chain])
            .filter(|key| of(**key).is_none_or(|of| of == id))
            .copied()
            .collect();
        let others = |index: &Index| index.blocks().filter(|(_, b)| index.namespaces.of(b.namespace).id != id).count();
        let before = others(index);
        let committed = self.committed.clone();
        self.committed.retain(|key| !its.contains(key));
        self.shard().reset_namespace(id);
        assert_eq!(others(&self.shard().cache().index), before, "others are forgotten with namespace {id}");
        self.is_forgotten(committed);
    }

    /// Forgets a block and all that continues it, as [`World::reset`] forgets everything. The others notice nothing.
    fn forget(&mut self) {
        if !self.may_forget() {
            return;
        }
        let chain = &self.chains[self.chance.below(self.chains.len() as u64) as usize];
        let key = chain[self.chance.below(chain.len() as u64) as usize];
        let index = &self.shard.as_ref().expect("it runs").cache().index;
        let continues = |id: BlockId| {
            std::iter::successors(Some(id), |id| index.block(*id).parent()).any(|id| index.key_of(id) == key)
        };
        // Of whoever lies about what a block continues nothing is promised.
        let its: HashSet<BlockKey> = self
            .chains
            .iter()
            .filter_map(|chain| Some(&chain[chain.iter().position(|at| *at == key)?..]))
            .flatten()
            .filter(|key| index.find(**key).is_none_or(continues))
            .copied()
            .collect();
        let all = |index: &Index| index.blocks().filter(|(_, block)| !block.is_detached()).count() as u32;
        let before = all(index);
        let committed = self.committed.clone();
        self.committed.retain(|key| !its.contains(key));
        let forgotten = self.shard().forget(key);
        assert_eq!(all(&self.shard().cache().index), before - forgotten, "others are forgotten with block {key}");
        self.is_forgotten(committed);
    }

    /// What is not `committed` any more is never resident again, once the devices have been told.
    fn is_forgotten(&mut self, committed: HashSet<BlockKey>) {
        self.shard().cache().check();
        // What the pool held is forgotten at once, by the next process too.
        if self.shape.may_crash && self.chance.happens(200) {
            self.take_over();
            if self.shard().cache().is_recovering() || self.shape.disk_slots > 0 {
                // What the disk holds was not told to go yet.
                self.committed.extend(committed);
            }
            return;
        }
        for _ in 0..2_000 {
            if self.shard().is_reset() {
                if self.shape.may_crash && self.chance.happens(200) {
                    self.take_over();
                }
                return;
            }
            self.now_ns += 10_000;
            self.poll_once();
        }
        self.committed.extend(committed);
    }

    /// Ends every session; then nothing may be left: no lease, no slot that neither is free nor holds a
    /// block.
    fn finish(&mut self) {
        // Every request of an honest client is answered, sooner or later, without further ado, whatever its device does: one
        // that answers nothing is lost after ten seconds, and of another one transfer after thirty-five.
        let hung = self.shard().devices().any(|device| device.hung);
        for round in 0..100_000 {
            if self.clients.iter().all(|client| client.hostile || client.asked.is_empty()) {
                break;
            }
            let step_ns = if hung && round > 1000 && round % 1000 < 60 { 1_000_000_000 } else { 10_000 };
            self.now_ns += step_ns;
            self.poll_once();
            for at in 0..self.clients.len() {
                self.look_again(at);
                self.collect(at);
            }
        }
        for client in &self.clients {
            assert!(client.hostile || client.asked.is_empty(), "unanswered: {:?}", client.asked);
        }
        self.shard().devices().for_each(|device| (device.dead, device.hung) = (false, false));
        let ids: Vec<SessionId> =
            self.clients.drain(..).map(|client| client.id).chain(self.zombies.drain(..).map(|z| z.id)).collect();
        for id in ids {
            let now_ns = self.now_ns;
            self.shard().end(id, End::Dead, now_ns);
            self.shard().end_former(id, End::Goodbye, now_ns);
        }
        // Whether anything may still be written or not, everything can go.
        let is_drained = self.shape.write_blocks_per_hour.is_none() || self.chance.happens(500);
        self.shard().drain(is_drained);
        for _ in 0..10_000 {
            self.now_ns += 10_000;
            self.poll_once();
        }
        assert!(!is_drained || self.shard().is_drained(), "what was to be written is written");
        let cache = self.shard().cache();
        cache.check();
        cache.check_at_rest();
        // Nobody uses anything: then everything can go, or a pool full of what cannot takes nothing any more.
        let slots = self.host_slots;
        // What goes may have to be written first, one after the other, to a device that is slow.
        for _ in 0..20_000 {
            self.shard().evict(Tier::Host, slots);
            self.now_ns += 10_000;
            self.poll_once();
            let host = &self.shard().cache().host;
            if host.free_count() + host.closed_free_count() == host.count() {
                break;
            }
        }
        let stuck = |(_, block): &(_, &Block)| block.place(Tier::Host) != Place::Absent;
        let stuck: Vec<Block> = self.shard().cache().index.blocks().filter(stuck).map(|(_, block)| *block).collect();
        assert!(stuck.is_empty(), "nobody uses them, and they cannot leave the pool: {stuck:?}");
        self.shard().evict(Tier::Disk, u32::MAX);
        assert_eq!(self.shard().cache().index.count(), 0, "nobody uses them, and they cannot leave the SSD");
        self.shard().cache().check();
    }
}
