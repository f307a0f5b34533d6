//! Building the data plane from a configuration and a layout, and the thread it runs on.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use kvring_ipc::bell as doorbells;
use kvring_ipc::client::monotonic_ns;
use kvring_ipc::config::{Config, IoEngine, OnMismatch, Polling};
use kvring_ipc::events::EventLog;
use kvring_ipc::key::BlockKey;
use kvring_ipc::layout::Layout;
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};
use kvring_ipc::segment::SessionState;
use kvring_ipc::stats::{ServerState, Stats, Text};
use kvring_spdk::SpdkError;
use rustix::event::{EventfdFlags, Timespec, epoll};

use super::health;
use super::verify::{Survey, Surveyed};
use crate::cache::Cache;
use crate::checksum;
use crate::device::aio::Aio;
use crate::device::files::{self, FilesError};
use crate::device::gone::Gone;
use crate::device::medium::{Medium, Patience};
use crate::device::nvme::Nvme;
use crate::device::spdk::{self, Spdk};
use crate::device::uring::{self, Finds, RingOptions, Uring, UringError};
use crate::device::{Device, DeviceMemory};
use crate::dma::{self, PoolError, PoolMemory};
use crate::index::namespaces::Namespace;
use crate::index::{Block, IndexOptions, Place, Tier};
use crate::limits::{SECTOR_BYTES, SESSIONS_MAX};
use crate::metrics::Metrics;
use crate::recovery::Recovered;
use crate::shard::hasher::Hasher;
use crate::shard::lost::Turn;
use crate::shard::session::Session;
use crate::shard::{End, Shard, ShardOptions};
use crate::tier::disk::{DiskGeometry, DiskSlots};
use crate::tier::host::{HostSlots, SessionId};
use crate::tier::piece::HeaderPiece;
use crate::tier::table::{SlotTable, TEXT_BYTES_MAX, TableShape};

/// Why there is no data plane, and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages are the documentation")]
pub enum BuildError {
    #[error("{0}")]
    Layout(String),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(
        "io_engine = uring or nvme: {0}: allow io_uring (sysctl kernel.io_uring_disabled, the container's seccomp profile) or set io_engine = aio"
    )]
    Uring(#[from] UringError),
    #[error(transparent)]
    Spdk(#[from] SpdkError),
    #[error(
        "checksum = off with an address of SPDK in ssd_cache_dir: what a dead server has sent there may arrive late, and only a checksum tells: set checksum = on"
    )]
    SpdkWithoutChecksum,
    #[error("io_engine = aio: {0}: raise sysctl fs.aio-max-nr or lower iouring_entries")]
    Aio(rustix::io::Errno),
    #[error(
        "fixed_buffers = on: the memlock limit is {limit} bytes and the pool has {pool}: raise it (ulimit -l, LimitMEMLOCK=), grant CAP_IPC_LOCK, or set fixed_buffers = off"
    )]
    Memlock { limit: u64, pool: u64 },
    #[error(
        "block_bytes = {block_bytes} makes {blocks} blocks of cpu_cache_gb and ssd_cache_gb, whose index needs {needed_gb:.1} GB of the {available_gb:.1} GB available: choose more tokens_per_block or smaller caches"
    )]
    TooManyBlocks { block_bytes: u64, blocks: u64, needed_gb: f64, available_gb: f64 },
    #[error("the pool's first piece cannot be registered with the devices: {0}")]
    Register(rustix::io::Errno),
    #[error("{what}: {errno}")]
    System { what: &'static str, errno: std::io::Error },
}

/// What the control plane tells the shard.
pub enum ToShard {
    /// A new session.
    Attach(Box<Session>),
    /// A session ends.
    End(SessionId, End),
    /// A piece of the pool has its pages.
    Bear(u32, std::ops::Range<u32>),
    /// Forget every block; the number names whoever asked.
    Reset(u64),
    /// Forget every block of the namespace with this id; the number names whoever asked.
    ResetNamespace(u64, BlockKey),
    /// Forget the block with this key, and all that continues it; the number names whoever asked.
    Forget(u64, BlockKey),
    /// Slots of the SSD that have sound headers.
    FoundOnDisk(HeaderPiece),
    /// Not all headers of a device could be read: what they say is not known.
    DiskUnread(u32),
    /// All headers of the SSD were read.
    DiskRead,
    /// A session of an engine process before this one writes no more: it said so, or its process died.
    EndFormer(SessionId, End),
    /// Say what lies in some slots.
    Survey(Survey, Sender<Survey>),
    /// Look again at a block that does not match its checksum, and say whether it was bad.
    Distrust(Surveyed, Sender<bool>),
    /// Do what an operator asks; the number names who.
    Admin(u64, AdminOp),
    /// Use only so many slots of the pool, from the first on, and move what lies behind them; or use all again.
    Vacate(Option<u32>),
    /// Say that it is heard.
    Pulse(Arc<AtomicBool>),
    /// Finish writing and return.
    Stop,
    /// Finish what is under way and return: the pool stays, for another engine process.
    HandOver {
        /// The pool will not be taken over: what is dirty is written.
        write_back: bool,
    },
}

/// What an operator asks of the shard.
#[derive(Debug, Clone, Copy)]
pub enum AdminOp {
    /// Some blocks, from this place of the index on.
    Blocks {
        /// Where.
        from: u32,
    },
    /// One block.
    Block {
        /// Its key.
        key: BlockKey,
    },
    /// Some namespaces, from this number on.
    Namespaces {
        /// Where.
        from: u32,
    },
    /// Have blocks leave a tier.
    Evict {
        /// Which.
        tier: Tier,
        /// How many.
        count: u32,
    },
    /// Take no stores, or take them again.
    Drain {
        /// Which of both.
        on: bool,
    },
}

/// Places of the index looked at for one answer: what lies there fits one message, and takes the shard less than a
/// millisecond.
const PLACES_PER_ANSWER: u32 = 150;
/// Evictions in one answer: some microseconds of the shard's time, unless much is leased.
const EVICTIONS_PER_ANSWER: u32 = 64;

/// A pool and its slot table, from an engine process that is gone.
pub struct Kept {
    pool: OwnedFd,
    table: SlotTable,
    table_fd: OwnedFd,
    /// What its blocks look like.
    pub layout: Layout,
    /// Where its SSD tier lay: reads from there into the pool may be under way yet.
    dirs: Vec<PathBuf>,
}

/// What a slot table says in words.
#[derive(serde::Serialize, serde::Deserialize)]
struct TableText {
    layout: Layout,
    ssd_cache_dirs: Vec<PathBuf>,
}

impl Kept {
    /// What the keeper has kept.
    ///
    /// # Errors
    /// Why it cannot be taken over, in words.
    pub fn open(pool: OwnedFd, table_fd: &OwnedFd) -> Result<Self, String> {
        let bytes = rustix::fs::fstat(table_fd).map_err(|errno| errno.to_string())?.st_size as usize;
        let memory = Mapping::new(table_fd, bytes).map_err(|errno| errno.to_string())?;
        let (table, text) = SlotTable::open(Arc::new(memory))?;
        let TableText { layout, ssd_cache_dirs: dirs } =
            serde_json::from_str(&text).map_err(|error| error.to_string())?;
        if layout.fingerprint() != table.shape().layout {
            return Err("its layout is not the one it was made for".into());
        }
        let table_fd = table_fd.try_clone().map_err(|error| error.to_string())?;
        Ok(Self { pool, table, table_fd, layout, dirs })
    }

    /// Whether it is what is asked for now. Waits for directories that are not used any more.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn suits(&self, config: &Config, layout: &Layout) -> Result<(), String> {
        if self.layout != *layout {
            return Err("the layout is another now".into());
        }
        if u64::from(self.table.shape().slots_max) < dma::slots_of(config, layout.block_bytes) {
            return Err("cpu_cache_gb is more now than the pool can grow to".into());
        }
        for dir in self.left_dirs(config) {
            // Who has its lock knows that nothing is read from there into the pool any more.
            let free = dir.exists().then(|| Medium::of(dir)?.lock(Patience::Wait));
            if !matches!(free, Some(Ok(_))) {
                return Err(format!("ssd_cache_dir was {} and reads from there may be under way", dir.display()));
            }
        }
        Ok(())
    }
}

impl Kept {
    fn bytes(&self) -> u64 {
        u64::from(self.table.slots_count()) * self.table.shape().slot_bytes
    }

    /// Directories that are not to be used any more.
    fn left_dirs<'a>(&'a self, config: &'a Config) -> impl Iterator<Item = &'a PathBuf> {
        let now: &[PathBuf] = if config.ssd_cache_bytes > 0 { &config.ssd_cache_dirs } else { &[] };
        self.dirs.iter().filter(|dir| !now.contains(dir))
    }
}

/// How `ssd_cache_gb` becomes slots, if there is any, and whether the index has room for them.
fn geometry_of(config: &Config, layout: &Layout, held: u64) -> Result<Option<DiskGeometry>, BuildError> {
    spdk::configure(config);
    let by_spdk = |dir: &PathBuf| dir.to_str().is_some_and(|text| text.starts_with(spdk::PREFIX));
    if !config.checksum && config.ssd_cache_bytes > 0 && config.ssd_cache_dirs.iter().any(by_spdk) {
        return Err(BuildError::SpdkWithoutChecksum);
    }
    layout.check(SECTOR_BYTES).map_err(BuildError::Layout)?;
    let of_disk = || {
        let media = Medium::all(&config.ssd_cache_dirs)?;
        files::geometry_on(&media, config.ssd_cache_bytes, config.max_file_bytes, layout)
    };
    let geometry = (config.ssd_cache_bytes > 0).then(of_disk).transpose()?;
    let disk_slots = geometry.map_or(0, |geometry| u64::from(geometry.slots_count()));
    check_index(config, layout, disk_slots, held)?;
    Ok(geometry)
}

fn open_files(
    config: &Config,
    geometry: Option<&DiskGeometry>,
    layout: &Layout,
    on_mismatch: OnMismatch,
) -> Result<Vec<files::DeviceFiles>, BuildError> {
    Ok(match geometry {
        Some(geometry) => files::open(&Medium::all(&config.ssd_cache_dirs)?, geometry, layout, on_mismatch)?,
        None => Vec::new(),
    })
}

/// What the shard's thread is called.
pub const SHARD_THREAD: &str = "kvring-shard";

/// How long a pool is touched before the engine process that serves is told to hand over.
const TOUCH_NS_MAX: u64 = 10_000_000_000;

/// How long the pauses of a process that lets go of its memory take together, for each device.
const LET_GO_MAX: Duration = Duration::from_secs(2);

/// All of a data plane that needs nobody's leave: an engine process makes it while another one serves.
pub struct Prepared {
    layout: Layout,
    geometry: Option<DiskGeometry>,
    images: Vec<Arc<Mapping>>,
    pool: Arc<PoolMemory>,
    table: SlotTable,
    table_fd: OwnedFd,
    is_kept: bool,
    /// Pieces of the pool that are in this process' page table.
    touched: u32,
    /// Whether its tables have their pages.
    populated: bool,
    cache: Cache,
    events: OwnedFd,
    stats: Option<(Stats, OwnedFd)>,
}

impl Prepared {
    /// For the pool and the table of the engine process that serves, if there are any. `None` if they will not be
    /// taken over, or if that is to be seen later: why is said then.
    ///
    /// # Errors
    /// [`BuildError`]: this configuration could not be served.
    pub fn over(
        config: &Config,
        layout: Option<&Layout>,
        kept: Option<[OwnedFd; 2]>,
    ) -> Result<Option<Self>, BuildError> {
        let kept = kept.and_then(|[pool, table]| Kept::open(pool, &table).ok());
        let Some(layout) = layout.or(kept.as_ref().map(|kept| &kept.layout)).cloned() else { return Ok(None) };
        let geometry = geometry_of(config, &layout, kept.as_ref().map_or(0, Kept::bytes))?;
        if let Some(geometry) = &geometry {
            // What the engine process that serves uses is not emptied behind its back, whatever `ssd_on_mismatch` says.
            let on_mismatch = if kept.is_some() { OnMismatch::Refuse } else { config.ssd_on_mismatch };
            files::check(&Medium::all(&config.ssd_cache_dirs)?, geometry, &layout, on_mismatch)?;
            check_io(config)?;
        }
        if let Some(kept) = kept.as_ref().filter(|kept| kept.layout == layout)
            && dma::slots_of(config, layout.block_bytes) > u64::from(kept.table.shape().slots_max)
        {
            return Err(dma::cannot_grow(config, rustix::io::Errno::NOMEM).into());
        }
        let suits = |kept: &Kept| kept.left_dirs(config).next().is_none() && kept.suits(config, &layout).is_ok();
        // Two indexes at once, for a while: where they do not fit, this one is made after the other's end.
        let disk_slots = geometry.map_or(0, |geometry| u64::from(geometry.slots_count()));
        let fits = index_bytes(config, &layout, disk_slots) <= dma::available_bytes() / 2;
        let Some(kept) = kept.filter(suits).filter(|_| fits) else { return Ok(None) };
        let mut prepared = Self::new(config, layout, geometry, Some(kept), false)?;
        if let Some(geometry) = &geometry {
            files::grow_ahead(&Medium::all(&config.ssd_cache_dirs)?, geometry)?;
        }
        // Its pages are there; with their places in this process' page table nothing waits for them. In a big pool on small
        // pages that takes long: the rest follows later.
        let until_ns = monotonic_ns() + TOUCH_NS_MAX;
        let is_late = || {
            // Somebody serves meanwhile, and is served.
            #[expect(clippy::disallowed_methods, reason = "before there is a shard")]
            std::thread::sleep(dma::PAUSE);
            monotonic_ns() > until_ns
        };
        prepared.populated = dma::populate(&prepared.tables(), is_late);
        let pieces = 0..prepared.pool.pieces_count();
        prepared.touched = pieces.take_while(|piece| prepared.pool.touch(*piece, is_late).is_ok()).count() as u32;
        let grows = prepared.table.slots_count()..prepared.pool.slots_count;
        prepared.table.populate(grows);
        // Last, so that little has changed when it is asked again.
        prepared.cache.follow_pool();
        Ok(Some(prepared))
    }

    fn new(
        config: &Config,
        layout: Layout,
        geometry: Option<DiskGeometry>,
        kept: Option<Kept>,
        frees: bool,
    ) -> Result<Self, BuildError> {
        let failed = |what| move |errno: rustix::io::Errno| BuildError::System { what, errno: errno.into() };
        let is_kept = kept.is_some();
        let (pool, table, table_fd) = make_pool(config, &layout, kept, frees)?;
        if let Some(warning) = &pool.warning {
            tracing::warn!("{warning}");
        }
        let images = geometry.map(|geometry| geometry.header_images()).transpose();
        let images = images.map_err(failed("map the headers"))?.unwrap_or_default();
        let mut host = HostSlots::new(pool.slots_count, layout.tp_size);
        host.keep_in(table.clone());
        let disk = geometry.map(|geometry| DiskSlots::new(geometry, layout.fingerprint(), images.clone()));
        let options = IndexOptions {
            host_slots: pool.slots_count,
            disk_slots: geometry.map_or(0, |geometry| geometry.slots_count()),
            policy: config.eviction_policy,
            protected_hits: config.slru_protected_threshold,
            secret: secret(),
        };
        let mut cache = Cache::new(&options, host, disk);
        let (log, events) = EventLog::create().map_err(failed("make the event log"))?;
        cache.index.log = Some(log);
        let stats = config.stats_segment.then(|| Stats::create("kvring-stats", config.recorder_entries));
        let stats = stats.and_then(|stats| {
            let told = stats.inspect_err(|errno| {
                tracing::warn!("no memory for the stats segment ({errno}): `kvring stat` and `explain` show nothing");
            });
            told.ok()
        });
        Ok(Self {
            layout,
            geometry,
            images,
            pool,
            table,
            table_fd,
            is_kept,
            touched: 0,
            populated: false,
            cache,
            events,
            stats,
        })
    }

    /// Where index and slots lie, in the order in which a recovery needs them.
    fn tables(&self) -> Vec<Vec<Arc<Mapping>>> {
        let Cache { index, host, disk, .. } = &self.cache;
        let [keys, blocks, host_links, disk_links] = index.tables();
        let of_disk = [blocks, disk_links].into_iter().chain(disk.as_ref().map(DiskSlots::memory)).collect();
        vec![vec![keys], of_disk, host.tables().to_vec(), vec![host_links]]
    }

    /// Whether it is made over this table.
    pub fn is_over(&self, table: &OwnedFd) -> bool {
        let id = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|file| (file.st_dev, file.st_ino)).ok();
        id(&self.table_fd).is_some_and(|ours| Some(ours) == id(table))
    }

    /// Opens what the SSD tier lies in, which is this process' alone from now on.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn open_files(&self, config: &Config, on_mismatch: OnMismatch) -> Result<Vec<files::DeviceFiles>, BuildError> {
        open_files(config, self.geometry.as_ref(), &self.layout, on_mismatch)
    }
}

/// What the shard hands back.
pub enum FromShard {
    /// A session that is over: its memory is let go where that may block.
    Gone(Box<Session>),
    /// Every block is forgotten.
    Reset {
        /// Who asked.
        asked_by: u64,
        /// Blocks forgotten.
        blocks: u32,
        /// Whether a restart forgets them too.
        durable: bool,
    },
    /// What an operator has asked for is done.
    Admin(u64, serde_json::Value),
    /// It cannot be done now, and why.
    Refused(u64, &'static str),
    /// Nothing lies any more where [`ToShard::Vacate`] said, but what somebody who is gone may be writing.
    Vacated,
    /// What the SSD held is known.
    Recovered(Recovered),
    /// A piece of the pool could not be registered: its slots are not used.
    Unregistered(u32, rustix::io::Errno),
    /// A device is lost, or back.
    Device(usize, Turn),
}

/// A running data plane.
pub struct Engine {
    /// What its blocks look like.
    pub layout: Layout,
    /// The pool, for new sessions.
    pub pool: Arc<PoolMemory>,
    /// What the next engine process would have to know.
    pub table: SlotTable,
    /// Its memory, for the keeper.
    pub table_fd: OwnedFd,
    /// Sessions of engine processes before this one that may be writing into slots.
    pub suspects: Vec<SessionId>,
    /// The event log, for new sessions.
    pub events: OwnedFd,
    /// The stats segment, for whoever asks.
    pub stats: Option<(Stats, OwnedFd)>,
    /// Its counters.
    pub metrics: Arc<Metrics>,
    /// What each device is, for the operator.
    pub devices: Vec<String>,
    /// Whether what they do in a dead process ends with its files, or holds their lock. Else it ends with its memory.
    pub ends_with_files: bool,
    /// Where blocks lie on them.
    pub geometry: Option<DiskGeometry>,
    /// What the shard hands back.
    pub from_shard: Receiver<FromShard>,
    teller: Teller,
    stop_threads: Arc<AtomicBool>,
    thread: Option<JoinHandle<Option<Box<AnyShard>>>>,
    /// What is left of the shard when it has handed over: memory.
    left: Option<Box<AnyShard>>,
    /// Gives back the place of slots that are not used any more.
    giver: Option<JoinHandle<()>>,
}

impl Engine {
    /// Builds everything and starts the shard, as the engine process of this epoch. What one before it has `kept` is served
    /// when this returns; what the SSD holds is taken back meanwhile, unless it is to be `forget`. If a pool was let go
    /// right before, it `frees` its memory yet.
    ///
    /// # Errors
    /// [`BuildError`]: nothing was started.
    pub fn start(
        config: &Config,
        layout: Layout,
        on_mismatch: OnMismatch,
        forget: bool,
        kept: Option<Kept>,
        frees: bool,
        epoch: u64,
    ) -> Result<Self, BuildError> {
        // What a pool takes was available when this was asked for the first time.
        let held = if frees { config.cpu_cache_bytes } else { kept.as_ref().map_or(0, Kept::bytes) };
        let geometry = geometry_of(config, &layout, held)?;
        // The disk first: what can be refused is refused before the pool takes memory.
        let opened = open_files(config, geometry.as_ref(), &layout, on_mismatch)?;
        let prepared = Prepared::new(config, layout, geometry, kept, frees)?;
        Self::begin(config, prepared, opened, forget, epoch)
    }

    /// Starts the shard over what was prepared.
    ///
    /// # Errors
    /// [`BuildError`]: nothing was started.
    pub fn begin(
        config: &Config,
        prepared: Prepared,
        opened: Vec<files::DeviceFiles>,
        forget: bool,
        epoch: u64,
    ) -> Result<Self, BuildError> {
        let stop_threads = Arc::new(AtomicBool::new(false));
        if !prepared.populated {
            populate_behind(prepared.tables(), stop_threads.clone());
        }
        let Prepared {
            layout,
            geometry,
            images,
            pool,
            table,
            table_fd,
            is_kept,
            touched,
            mut cache,
            events,
            stats,
            ..
        } = prepared;
        let slot_bytes = layout.block_bytes;
        let media: Vec<Medium> = opened.iter().map(|device| device.medium.clone()).collect();
        let with_disk = geometry.is_some();
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = Arc::new(bell.map_err(|errno| BuildError::System { what: "eventfd", errno: errno.into() })?);
        let (to_shard, for_shard) = crossbeam_channel::unbounded();
        let teller = Teller { to_shard, bell };
        let to_read: Vec<_> = opened.iter().map(|device| device.reused.then(|| device.medium.clone())).collect();
        let fingerprint = layout.fingerprint();
        let metrics = Arc::new(Metrics::default());
        let slots_before = table.slots_count();
        // Where it grows, the last process may have given back what was touched: it is touched again.
        let pieces_before = (u64::from(slots_before) * slot_bytes / pool.piece_bytes) as u32;
        let touched = if slots_before < pool.slots_count { touched.min(pieces_before) } else { touched };
        if slots_before != pool.slots_count {
            table.resize(pool.slots_count);
            tracing::info!("the pool has {} blocks now, and had {slots_before}", pool.slots_count);
        }
        cache.begin_recovery(with_disk, epoch);
        let suspects = cache.host.suspects();
        metrics.dram_recovered_blocks_count.add(u64::from(cache.recovery.recovered.host));
        if cache.recovery.recovered.host > 0 || !suspects.is_empty() {
            let waiting = cache.host.quarantined_count();
            tracing::info!(
                "{} blocks found in the pool; {waiting} slots wait for their writers",
                cache.recovery.recovered.host
            );
        }
        if forget {
            cache.reset();
        }
        let Opened { devices, locks, lost, ends_with_files } = open_devices(config, &pool, opened, images)?;
        let (described, devices): (Vec<String>, Vec<AnyDevice>) = devices.into_iter().unzip();
        for line in &described {
            tracing::info!("device {line}");
        }
        let shard_options = ShardOptions {
            slot_bytes,
            lease_ttl_ns: config.lease_ttl.as_nanos() as u64,
            load_wait_ns: config.load_wait.as_nanos() as u64,
            writer_grace_ns: config.writer_grace.as_nanos() as u64,
            read_depth: config.ssd_read_depth,
            write_depth: config.ssd_write_depth,
            write_bytes_per_day: config.ssd_write_bytes_per_day,
            checksum: config.checksum,
            verify: config.verify,
            clock: monotonic_ns,
        };
        let mut shard = Shard::new(cache, pool.mapping.clone(), devices, shard_options, metrics.clone());
        for device in lost {
            // What lies there is not known: a reset cannot promise that it is forgotten.
            shard.disk_was_not_read(device as u32);
            shard.lose_device(device, monotonic_ns());
        }
        if let Some((stats, _)) = &stats {
            let text = Text {
                names: crate::metrics::names(described.len()),
                version: env!("CARGO_PKG_VERSION").into(),
                socket: config.socket.display().to_string(),
                keeper_pid: rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs()),
                settings: config.as_text(),
                layout: serde_json::to_value(&layout).unwrap_or_default(),
                slot_bytes,
                page_bytes: pool.pages.bytes(),
                devices: described.clone(),
            };
            shard.show_in(stats.clone());
            begin_stats(stats, text, epoch);
        }
        if with_disk && config.checksum {
            let (bell, memory, bytes) = (teller.bell.clone(), pool.mapping.clone(), slot_bytes as usize);
            let mut scratch = vec![0; checksum::SCRATCH_BYTES];
            let checksum = move |slot| checksum::of_mapping(&memory, slot as usize * bytes, bytes, &mut scratch);
            match Hasher::start(checksum, move || doorbells::ring_own(&*bell)) {
                Ok(hasher) => shard.hash_beside(hasher),
                Err(error) => tracing::warn!("no thread for checksums: {error}: the shard makes them"),
            }
        }
        let (retired, to_give_back) = crossbeam_channel::unbounded();
        let giver = geometry.filter(|geometry| geometry.surplus() > 0).and_then(|geometry| {
            let stop = stop_threads.clone();
            let media = media.clone();
            let give = move || give_back_slots(&media, &geometry, &to_give_back, &stop);
            let thread = std::thread::Builder::new().name("kvring-shrink".into()).spawn(give);
            thread.inspect_err(|error| tracing::warn!("the place of unused blocks is not given back: {error}")).ok()
        });
        // A kept pool has its pages, and blocks to serve: its slots are registered while it does.
        let first_piece = if is_kept {
            0
        } else {
            pool.touch(0, || false)
                .map_err(|errno| BuildError::System { what: "touch the pool", errno: errno.into() })?;
            shard.bear(0, pool.slots_of(0)).map_err(BuildError::Register)?;
            1
        };
        let (to_control, from_shard) = crossbeam_channel::unbounded();
        let runner = Runner {
            shard,
            for_shard,
            to_control,
            bell: teller.bell.clone(),
            metrics: metrics.clone(),
            stats: stats.as_ref().map(|(stats, _)| stats.clone()),
            polling: config.polling,
            spin_ns: config.spin.as_nanos() as u64,
            resets: Vec::new(),
            retired,
            is_vacating: false,
            recovery_began_ns: with_disk.then(monotonic_ns),
            memory_is_awaited: true,
            _locks: locks,
            waits_for_memory: VecDeque::new(),
            bears_next_ns: 0,
        };
        // Here, where its lack can be told: a shard that cannot sleep would take a core for nothing.
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC);
        let epoll = epoll.map_err(|errno| BuildError::System { what: "epoll", errno: errno.into() })?;
        let cpu = config.server_cpu;
        let spawn = std::thread::Builder::new().name(SHARD_THREAD.into()).spawn(move || {
            if let Some(cpu) = cpu {
                pin_to(cpu);
            }
            runner.run(epoll)
        });
        let thread = Some(spawn.map_err(|errno| BuildError::System { what: "start the shard's thread", errno })?);
        let engine = Self {
            layout,
            pool,
            table,
            table_fd,
            suspects,
            events,
            stats,
            metrics,
            devices: described,
            ends_with_files,
            geometry,
            from_shard,
            teller,
            stop_threads,
            thread,
            left: None,
            giver,
        };
        if let Some((stats, _)) = &engine.stats {
            health::watch(stats.clone(), media, engine.stop_threads.clone());
        }
        if let Some(geometry) = geometry {
            read_the_disk(engine.teller.clone(), geometry, fingerprint, to_read, config.checksum);
        }
        engine.touch_the_rest(is_kept, first_piece, touched);
        Ok(engine)
    }

    /// Tells the shard, and wakes it.
    pub fn tell(&self, message: ToShard) {
        self.teller.tell(message);
    }

    /// As [`Engine::tell`], for a thread of its own.
    pub fn teller(&self) -> Box<dyn Fn(ToShard) + Send> {
        let teller = self.teller.clone();
        Box::new(move |message| teller.tell(message))
    }

    /// Slots of all tiers.
    pub fn slots_count(&self) -> u64 {
        let disk = self.geometry.map_or(0, |geometry| geometry.slots_count());
        u64::from(self.pool.slots_count) + u64::from(disk)
    }

    /// Gives the rest of the pool its pages, in parallel and behind; of pieces that were touched the shard is only
    /// told.
    fn touch_the_rest(&self, is_kept: bool, first_piece: u32, touched: u32) {
        let next = Arc::new(AtomicU32::new(first_piece));
        // Of a pool that is served already nobody waits for the rest.
        let threads = if is_kept { 1 } else { std::thread::available_parallelism().map_or(1, |n| n.get().min(4)) };
        for _ in 0..threads.min(self.pool.pieces_count().saturating_sub(first_piece) as usize) {
            let (next, pool, stop) = (next.clone(), self.pool.clone(), self.stop_threads.clone());
            let teller = self.teller.clone();
            let pauses = !self.devices.is_empty();
            let touch = move || {
                let stop = || {
                    if is_kept {
                        #[expect(clippy::disallowed_methods, reason = "a thread of its own")]
                        std::thread::sleep(dma::PAUSE);
                    }
                    stop.load(Ordering::Relaxed)
                };
                loop {
                    let piece = next.fetch_add(1, Ordering::Relaxed);
                    if piece >= pool.pieces_count() || stop() {
                        return;
                    }
                    let has = piece < touched;
                    if has && pauses {
                        // To register one takes the shard a while: it serves in between.
                        #[expect(clippy::disallowed_methods, reason = "a thread of its own")]
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    let touched = if has { Ok(()) } else { pool.touch(piece, stop) };
                    if touched == Err(rustix::io::Errno::INTR) {
                        return;
                    }
                    if let Err(errno) = touched {
                        tracing::error!("piece {piece} of the pool has no memory ({errno}): its slots are not used");
                        continue;
                    }
                    teller.tell(ToShard::Bear(piece, pool.slots_of(piece)));
                }
            };
            if let Err(error) = std::thread::Builder::new().name("kvring-touch".into()).spawn(touch) {
                tracing::error!("cannot start a thread to touch the pool: {error}");
            }
        }
    }

    /// Stops the shard by [`ToShard::Stop`] or [`ToShard::HandOver`]: what is being written is finished, for at
    /// most five seconds.
    pub fn stop(&mut self, how: ToShard) {
        self.stop_threads.store(true, Ordering::Relaxed);
        self.tell(how);
        self.left = self.thread.take().and_then(|thread| thread.join().ok().flatten());
        // Before anybody else uses those slots.
        if let Some(giver) = self.giver.take() {
            let _ = giver.join();
        }
    }

    /// Lets go of memory that nobody waits for, bit by bit: what is pinned here, with `maps` the pool's pages too, and the
    /// rest with the process.
    pub fn let_go(mut self, maps: bool) {
        let pieces = self.pool.pieces_count();
        let pause = dma::PAUSE.min(LET_GO_MAX / pieces.max(1));
        let pauses = || {
            #[expect(clippy::disallowed_methods, reason = "nothing else is to be done any more")]
            std::thread::sleep(pause);
        };
        for piece in 0..pieces {
            for device in self.left.iter_mut().flat_map(|shard| shard.devices()) {
                device.unregister_piece(piece);
                pauses();
            }
            if maps {
                self.pool.let_go(piece, pauses);
            }
        }
        std::mem::forget(self);
    }

    /// Whether the shard's thread is gone without having been told to stop.
    pub fn has_failed(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }
}

/// How the shard is told something: a message, and a ring.
#[derive(Clone)]
struct Teller {
    to_shard: Sender<ToShard>,
    bell: Arc<OwnedFd>,
}

impl Teller {
    fn tell(&self, message: ToShard) {
        // Without a shard, nobody has to be told.
        let _ = self.to_shard.send(message);
        doorbells::ring_own(&*self.bell);
    }
}

/// Tells the shard that the disk was read, and what of it was not, whatever ends it.
struct Reading {
    teller: Teller,
    /// The devices that are read, and whether all of each was.
    devices: Vec<(u32, Medium, AtomicBool)>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        for (device, ..) in self.devices.iter().filter(|(.., was_read)| !was_read.load(Ordering::SeqCst)) {
            self.teller.tell(ToShard::DiskUnread(*device));
        }
        self.teller.tell(ToShard::DiskRead);
    }
}

/// Reads what the SSD holds, behind: serving does not wait for it. However that ends, the recovery does, and
/// nobody believes that what was not read is not there.
fn read_the_disk(teller: Teller, geometry: DiskGeometry, layout: u64, to_read: Vec<Option<Medium>>, take: bool) {
    let devices = (0..).zip(to_read).filter_map(|(device, medium)| Some((device, medium?, AtomicBool::new(false))));
    let reading = Reading { teller, devices: devices.collect() };
    let read_one = move |reading: &Reading, (device, medium, was_read): &(u32, Medium, AtomicBool)| {
        let read = files::read_headers(medium, &geometry, layout, *device, |mut piece| {
            // Without checksums a header may name a block whose slot was written anew since.
            if !take {
                piece.distrust();
            }
            reading.teller.tell(ToShard::FoundOnDisk(piece));
        });
        match read {
            Ok(()) => was_read.store(true, Ordering::SeqCst),
            Err(error) => {
                let name = medium.name();
                tracing::error!("{name}: headers cannot be read ({error}): what they name is forgotten");
            }
        }
    };
    let read = move || {
        let (reading, read_one) = (&reading, &read_one);
        std::thread::scope(|scope| {
            for device in &reading.devices {
                let thread = std::thread::Builder::new().spawn_scoped(scope, || read_one(reading, device));
                if thread.is_err() {
                    // One after the other, then.
                    read_one(reading, device);
                }
            }
        });
    };
    if let Err(error) = std::thread::Builder::new().name("kvring-recover".into()).spawn(read) {
        tracing::error!("cannot start a thread to read what the SSD holds: {error}: it is forgotten");
    }
}

/// Gives tables their pages while the cache serves: whoever needs one before gets it, and waits for that one.
fn populate_behind(tables: Vec<Vec<Arc<Mapping>>>, stop: Arc<AtomicBool>) {
    let populate = move || {
        dma::populate(&tables, || stop.load(Ordering::Relaxed));
    };
    if let Err(error) = std::thread::Builder::new().name("kvring-tables".into()).spawn(populate) {
        tracing::warn!("cannot start a thread for the index's memory: {error}: it comes as it is used");
    }
}

/// Gives the place of unused slots back to the file systems, as they come. Ends with whoever sends them, or when it is told
/// to: a slot that is given back must not be used.
fn give_back_slots(media: &[Medium], geometry: &DiskGeometry, slots: &Receiver<u32>, stop: &AtomicBool) {
    let mut files = std::collections::HashMap::new();
    let (mut given, mut failed) = (0u64, None);
    for slot in slots {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let (device, (file, offset)) = (geometry.device_of(slot), geometry.offset_of(slot));
        let medium = &media[device];
        if medium.is_whole_device() {
            continue;
        }
        let path = medium.path_of(u32::from(file));
        let opened = files
            .entry((device, file))
            .or_insert_with(|| std::fs::OpenOptions::new().write(true).open(&path).map_err(|error| error.to_string()));
        let done = match opened {
            Ok(opened) => files::give_back(opened, offset, geometry.slot_bytes).map_err(|error| error.to_string()),
            Err(error) => Err(error.clone()),
        };
        match done {
            Ok(()) => given += 1,
            Err(error) => {
                if failed.replace(error.clone()).is_none() {
                    tracing::warn!("{}: the place of unused blocks is not given back: {error}", path.display());
                }
            }
        }
        if slots.is_empty() && given > 0 {
            tracing::info!("the place of {given} blocks is the file system's again");
            given = 0;
        }
    }
}

/// Says in the segment whose it is.
fn begin_stats(stats: &Stats, mut text: Text, epoch: u64) {
    let realtime = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let realtime_ns = realtime.tv_sec as u64 * 1_000_000_000 + realtime.tv_nsec as u64;
    if stats.begin(&text, epoch, monotonic_ns(), realtime_ns).is_err() {
        // Absurdly long paths: the counters are worth more.
        (text.settings, text.devices) = Default::default();
        let _ = stats.begin(&text, epoch, monotonic_ns(), realtime_ns);
    }
}

/// How long a new pool waits for the memory of one that was let go: longer than clients may hold on to it.
const FREEING_NS_MAX: u64 = 10_000_000_000;

/// A new pool. If one was let go right before, its memory `frees` itself in a moment: keeper and clients have it yet.
fn create_pool(config: &Config, slot_bytes: u64, frees: bool) -> Result<PoolMemory, PoolError> {
    let until_ns = monotonic_ns() + FREEING_NS_MAX;
    loop {
        let pool = dma::create(config, slot_bytes);
        let lacks = match &pool {
            Ok(pool) => pool.pages == Pages::Small && pool.warning.is_some() && dma::has_hugepages_for(config),
            Err(PoolError::NoHugepages { .. }) => dma::has_hugepages_for(config),
            Err(PoolError::NoMemory { .. }) => true,
            Err(PoolError::TooSmall { .. } | PoolError::CannotGrow { .. }) => false,
        };
        if !lacks || !frees || monotonic_ns() > until_ns {
            return pool;
        }
        drop(pool);
        #[expect(clippy::disallowed_methods, reason = "before there is a shard")]
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The pool and its table: those that were kept, if they are what is asked for now, or new ones.
fn make_pool(
    config: &Config,
    layout: &Layout,
    kept: Option<Kept>,
    frees: bool,
) -> Result<(Arc<PoolMemory>, SlotTable, OwnedFd), BuildError> {
    let slot_bytes = layout.block_bytes;
    if let Some(Kept { pool, table, table_fd, .. }) = kept {
        let (slots, before) = (dma::slots_of(config, slot_bytes) as u32, table.slots_count());
        if slots == 0 {
            return Err(PoolError::TooSmall { pool_bytes: config.cpu_cache_bytes, slot_bytes }.into());
        }
        match dma::reopen(pool, slot_bytes, slots, before) {
            Ok(memory) => return Ok((Arc::new(memory), table, table_fd)),
            // Whoever has asked for it is told; the pool stays what it is.
            Err(errno) if slots > before => {
                return Err(dma::cannot_grow(config, errno).into());
            }
            Err(errno) => tracing::warn!("the pool starts empty: the last one cannot be mapped: {errno}"),
        }
    }
    let pool = Arc::new(create_pool(config, slot_bytes, frees)?);
    let [pool_id, _] = secret();
    let shape = TableShape {
        pool_id,
        layout: layout.fingerprint(),
        slot_bytes,
        slots_max: dma::slots_max(u64::from(pool.slots_count), slot_bytes).min(u32::MAX / layout.tp_size),
        tp_size: layout.tp_size,
    };
    let failed = |errno: rustix::io::Errno| BuildError::System { what: "make the slot table", errno: errno.into() };
    let table_fd = sealed_memfd("kvring-slots", shape.bytes() as u64, Pages::Small).map_err(failed)?;
    let memory = Arc::new(Mapping::new(&table_fd, shape.bytes()).map_err(failed)?);
    let ssd_cache_dirs = if config.ssd_cache_bytes > 0 { config.ssd_cache_dirs.clone() } else { Vec::new() };
    let text = serde_json::to_string(&TableText { layout: layout.clone(), ssd_cache_dirs }).unwrap_or_default();
    if text.len() > TEXT_BYTES_MAX {
        return Err(BuildError::Layout(format!(
            "layout and ssd_cache_dir take {} bytes in words, and {TEXT_BYTES_MAX} are taken: use shorter paths",
            text.len()
        )));
    }
    let slots = pool.slots_count;
    Ok((pool, SlotTable::create(memory, shape, slots, &text), table_fd))
}

type AnyDevice = Box<dyn Device + Send>;
type AnyShard = Shard<AnyDevice>;

/// What was opened.
struct Opened {
    /// In words, and as they are.
    devices: Vec<(String, AnyDevice)>,
    /// What makes them ours.
    locks: Vec<std::fs::File>,
    /// Those of them that are gone.
    lost: Vec<usize>,
    /// What is under way ends with the files of this process, or holds their lock: not with its memory.
    ends_with_files: bool,
}

fn open_devices(
    config: &Config,
    pool: &PoolMemory,
    opened: Vec<files::DeviceFiles>,
    images: Vec<Arc<Mapping>>,
) -> Result<Opened, BuildError> {
    let use_uring = match config.io_engine {
        IoEngine::Aio => false,
        _ if opened.is_empty() => false,
        IoEngine::Uring | IoEngine::Nvme => uring::probe().map(|()| true)?,
        IoEngine::Auto => match uring::probe() {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("{error}: libaio drives the SSDs instead");
                false
            }
        },
    };
    if use_uring && config.fixed_buffers {
        check_memlock(pool.mapping.bytes() as u64)?;
    }
    let mut devices = Vec::new();
    let (mut locks, mut lost, mut ends_with_files) = (Vec::new(), Vec::new(), true);
    let several = opened.len() > 1;
    for (device, headers) in opened.into_iter().zip(images) {
        let memory = DeviceMemory { pool: pool.mapping.clone(), headers, piece_bytes: pool.piece_bytes as usize };
        let name = device.medium.path().display().to_string();
        let mut left_out = Vec::new();
        let opened: AnyDevice = if let Some(why) = &device.gone {
            tracing::error!(
                "{name} is gone ({why}): its blocks are forgotten; the server is to be started again once it is back"
            );
            lost.push(devices.len());
            Box::new(Gone::new(config.iouring_entries))
        } else if let Some(address) = device.medium.address() {
            let hugepages = (pool.pages != Pages::Small).then(|| pool.fd.try_clone());
            let hugepages = hugepages
                .transpose()
                .map_err(|error| BuildError::System { what: "duplicate the pool's file", errno: error })?;
            ends_with_files = false;
            match Spdk::new(address, memory, hugepages, config.iouring_entries) {
                Err(error @ (SpdkError::Connect { .. } | SpdkError::Io { .. })) if several => {
                    tracing::error!("{name} is gone ({error}): its blocks are forgotten");
                    lost.push(devices.len());
                    Box::new(Gone::new(config.iouring_entries))
                }
                opened => Box::new(opened?),
            }
        } else if use_uring {
            let lock = device.lock.as_ref();
            drive_by_uring(config, &device.medium, device.files, lock, memory, &mut left_out)?
        } else {
            ends_with_files = false;
            Box::new(Aio::new(device.files, memory, config.iouring_entries).map_err(BuildError::Aio)?)
        };
        let mut described = format!("{name}: {}", opened.describe());
        for left_out in left_out {
            tracing::warn!("{name}: {left_out}");
            described += &format!("; not {left_out}");
        }
        devices.push((described, opened));
        locks.extend(device.lock);
    }
    Ok(Opened { devices, locks, lost, ends_with_files })
}

/// By commands or by the block layer, polled or not, as it was asked for; what the device does not take is `left_out`.
fn drive_by_uring(
    config: &Config,
    medium: &Medium,
    files: Vec<OwnedFd>,
    lock: Option<&std::fs::File>,
    memory: DeviceMemory,
    left_out: &mut Vec<String>,
) -> Result<AnyDevice, BuildError> {
    let Config { iouring_entries: entries, fixed_buffers, io_poll, sq_poll, .. } = *config;
    let mut options = RingOptions { entries, fixed_buffers, io_poll, sq_poll };
    if config.io_engine == IoEngine::Nvme {
        let lock = lock.map(AsFd::as_fd);
        match Nvme::new(medium, lock, memory.clone(), options, left_out) {
            Ok(device) => return Ok(Box::new(device)),
            Err(error) => {
                left_out.clear();
                left_out.push(format!("io_engine = nvme: {error}"));
            }
        }
    }
    if let Err(why) = if io_poll { uring::can_poll(medium, &files) } else { Ok(()) } {
        left_out.push(format!("io_poll = on: {why}"));
        options.io_poll = false;
    }
    let lock = lock.map(AsFd::as_fd);
    if options.sq_poll {
        let again = || files.iter().map(OwnedFd::try_clone).collect::<Result<Vec<_>, _>>();
        let opened = again().map_err(|errno| UringError { what: "dup", errno });
        match opened.and_then(|files| Uring::new(files, lock, memory.clone(), options, Finds::AnyWay)) {
            Ok(device) => return Ok(Box::new(device)),
            Err(error) => left_out.push(format!("sq_poll = on: {error}")),
        }
        options.sq_poll = false;
    }
    Ok(Box::new(Uring::new(files, lock, memory, options, Finds::AnyWay)?))
}

/// The index is in memory and grows with the number of blocks: small blocks in a big cache are refused
/// before anything is made for them.
fn check_index(config: &Config, layout: &Layout, disk_slots: u64, held_bytes: u64) -> Result<(), BuildError> {
    let host_slots = config.cpu_cache_bytes / layout.block_bytes;
    let blocks = host_slots + disk_slots + crate::limits::LEASES_MAX as u64;
    let needed = index_bytes(config, layout, disk_slots);
    let available = dma::available_bytes().saturating_add(held_bytes);
    let indices_fit = blocks < 1 << 31 && host_slots * u64::from(layout.tp_size) < 1 << 32;
    if indices_fit && needed <= available / 4 {
        return Ok(());
    }
    let gb = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(BuildError::TooManyBlocks {
        block_bytes: layout.block_bytes,
        blocks,
        needed_gb: gb(needed),
        available_gb: gb(available),
    })
}

fn index_bytes(config: &Config, layout: &Layout, disk_slots: u64) -> u64 {
    /// A block's line, its links in two tiers, two places of the table, a host slot, a disk slot with
    /// its header's image.
    const BYTES_PER_BLOCK: u64 = 64 + 2 * 20 + 2 * 2 * 8 + 64 + 16 + 64;
    let host_slots = config.cpu_cache_bytes / layout.block_bytes;
    (host_slots + disk_slots + crate::limits::LEASES_MAX as u64) * BYTES_PER_BLOCK
}

/// Whether the disk can be driven as it is asked for.
fn check_io(config: &Config) -> Result<(), BuildError> {
    let works = config.io_engine != IoEngine::Aio && uring::probe().is_ok();
    if matches!(config.io_engine, IoEngine::Uring | IoEngine::Nvme) {
        uring::probe()?;
    }
    if works && config.fixed_buffers { check_memlock(config.cpu_cache_bytes) } else { Ok(()) }
}

/// Registered buffers count against RLIMIT_MEMLOCK unless the process may lock at will.
///
/// # Errors
/// [`BuildError::Memlock`].
pub fn check_memlock(pool: u64) -> Result<(), BuildError> {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current.unwrap_or(u64::MAX);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    if effective & CAP_IPC_LOCK == 0 && limit < pool {
        return Err(BuildError::Memlock { limit, pool });
    }
    Ok(())
}

fn secret() -> [u64; 2] {
    let mut bytes = [0u8; 16];
    // A secret that is not random costs speed against a hostile client, nothing else.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytemuck::cast(bytes)
}

fn pin_to(cpu: u32) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu as usize);
    match rustix::thread::sched_setaffinity(None, &set) {
        Ok(()) => tracing::info!("the shard is pinned to CPU {cpu}"),
        Err(errno) => tracing::warn!("server_cpu = {cpu}: {errno}: the shard runs anywhere"),
    }
}

/// The thread of a shard.
struct Runner {
    shard: AnyShard,
    for_shard: Receiver<ToShard>,
    to_control: Sender<FromShard>,
    bell: Arc<OwnedFd>,
    metrics: Arc<Metrics>,
    stats: Option<Stats>,
    polling: Polling,
    spin_ns: u64,
    /// Resets whose headers are being written: who asked, how many blocks, until when they wait.
    resets: Vec<(u64, u32, u64)>,
    /// Slots of the SSD that are not used any more.
    retired: Sender<u32>,
    /// Somebody waits for the end of the pool to be empty.
    is_vacating: bool,
    recovery_began_ns: Option<u64>,
    /// Whoever comes next waits for the end of this process.
    memory_is_awaited: bool,
    _locks: Vec<std::fs::File>,
    /// Pieces that the memlock limit leaves no room for as long as the engine process before has its own pinned, and until when
    /// they are tried again.
    waits_for_memory: VecDeque<(u32, std::ops::Range<u32>, u64)>,
    bears_next_ns: u64,
}

fn describe_namespace(namespace: &Namespace) -> serde_json::Value {
    let Namespace { id, blocks, hits, evicted } = namespace;
    serde_json::json!({"namespace": id.to_string(), "blocks": blocks, "hit_blocks": hits, "evicted_blocks": evicted})
}

/// How long a piece is tried that the memlock limit has no room for: the engine process before lets go of its own.
const MEMLOCK_NS_MAX: u64 = 30_000_000_000;
/// Between two tries: each may pin a piece before the kernel finds that it may not.
const MEMLOCK_PAUSE_NS: u64 = 100_000_000;
/// How long a reset waits for the devices.
const RESET_NS_MAX: u64 = 5_000_000_000;
/// How long one of a namespace or of a block does: every header of the others is written as well.
const NAMESPACE_RESET_NS_MAX: u64 = 60_000_000_000;

impl Runner {
    fn run(mut self, epoll: OwnedFd) -> Option<Box<AnyShard>> {
        let mut sleeper = Sleeper::new(&mut self.shard, &self.bell, epoll);
        let mut last_work_ns = monotonic_ns();
        loop {
            while let Ok(message) = self.for_shard.try_recv() {
                last_work_ns = monotonic_ns();
                let bears = matches!(message, ToShard::Bear(..));
                if !self.obey(message, &mut sleeper) {
                    return self.end();
                }
                if bears {
                    // To register a piece takes a millisecond or two: whoever has asked for something is served in between.
                    break;
                }
            }
            let now_ns = monotonic_ns();
            self.answer_resets(now_ns);
            for slot in self.shard.take_retired() {
                let _ = self.retired.send(slot);
            }
            // One a round.
            if now_ns >= self.bears_next_ns
                && let Some((piece, slots, until_ns)) = self.waits_for_memory.pop_front()
            {
                self.bear(piece, slots, until_ns);
            }
            if self.is_vacating && self.shard.is_vacated() {
                self.is_vacating = false;
                let _ = self.to_control.send(FromShard::Vacated);
            }
            for (device, turn) in self.shard.take_turns() {
                let _ = self.to_control.send(FromShard::Device(device, turn));
            }
            if let Some(began_ns) = self.recovery_began_ns.filter(|_| !self.shard.cache().is_recovering()) {
                self.recovery_began_ns = None;
                self.metrics.ssd_recovery_us.set(now_ns.saturating_sub(began_ns) / 1000);
                let _ = self.to_control.send(FromShard::Recovered(self.shard.cache().recovery.recovered));
            }
            if self.shard.poll(now_ns) > 0 {
                last_work_ns = now_ns;
                continue;
            }
            let spinning = self.polling == Polling::Busy || now_ns - last_work_ns < self.spin_ns;
            let Some(sleeper) = sleeper.as_mut().filter(|_| !spinning && !self.shard.must_poll()) else {
                std::hint::spin_loop();
                continue;
            };
            self.shard.announce_sleep();
            // Once more: what was posted before the announcement was seen rings no bell.
            if self.shard.poll(monotonic_ns()) == 0 && self.for_shard.is_empty() {
                self.metrics.sleeps_count.add(1);
                let ns_max = self.shard.sleep_ns_max();
                let ns_max = if self.waits_for_memory.is_empty() { ns_max } else { ns_max.min(MEMLOCK_PAUSE_NS) };
                self.shard.tell_sleep(monotonic_ns() + ns_max);
                sleeper.sleep(Duration::from_nanos(ns_max));
            }
            self.shard.retract_sleep();
            last_work_ns = monotonic_ns();
        }
    }

    /// What others wait for is let go of. `None`: the memory too.
    fn end(self) -> Option<Box<AnyShard>> {
        let Self { mut shard, memory_is_awaited, .. } = self;
        if memory_is_awaited {
            return None;
        }
        shard.close_devices();
        Some(Box::new(shard))
    }

    fn bear(&mut self, piece: u32, slots: std::ops::Range<u32>, until_ns: u64) {
        match self.shard.bear(piece, slots.clone()) {
            Ok(()) => {}
            Err(rustix::io::Errno::NOMEM) if monotonic_ns() < until_ns => {
                self.waits_for_memory.push_back((piece, slots, until_ns));
                self.bears_next_ns = monotonic_ns() + MEMLOCK_PAUSE_NS;
            }
            Err(errno) => drop(self.to_control.send(FromShard::Unregistered(piece, errno))),
        }
    }

    /// False: return.
    fn obey(&mut self, message: ToShard, sleeper: &mut Option<Sleeper>) -> bool {
        self.shard.is_told(monotonic_ns());
        match message {
            ToShard::Attach(session) => {
                if let (Some(sleeper), Some(bell)) = (sleeper, &session.bell) {
                    sleeper.watch(session.writer.session.0 as usize % SESSIONS_MAX, bell);
                }
                self.shard.attach(session);
            }
            ToShard::End(id, end) => {
                if let Some(session) = self.shard.end(id, end, monotonic_ns()) {
                    if let Some(sleeper) = sleeper {
                        sleeper.unwatch(id.0 as usize % SESSIONS_MAX);
                    }
                    let _ = self.to_control.send(FromShard::Gone(session));
                }
            }
            ToShard::Bear(piece, slots) => self.bear(piece, slots, monotonic_ns() + MEMLOCK_NS_MAX),
            ToShard::Reset(asked_by) => {
                let blocks = self.shard.reset();
                self.resets.push((asked_by, blocks, monotonic_ns() + RESET_NS_MAX));
            }
            ToShard::ResetNamespace(asked_by, _) | ToShard::Forget(asked_by, _)
                if self.shard.cache().is_recovering() =>
            {
                let why =
                    "what the last server left on the SSD is being read: ask again when `kvring stat` says that it was";
                let _ = self.to_control.send(FromShard::Refused(asked_by, why));
            }
            ToShard::ResetNamespace(asked_by, id) => {
                let blocks = self.shard.reset_namespace(id);
                self.resets.push((asked_by, blocks, monotonic_ns() + NAMESPACE_RESET_NS_MAX));
            }
            ToShard::Forget(asked_by, key) => {
                let blocks = self.shard.forget(key);
                self.resets.push((asked_by, blocks, monotonic_ns() + NAMESPACE_RESET_NS_MAX));
            }
            ToShard::FoundOnDisk(piece) => self.shard.found_on_disk(piece),
            ToShard::DiskUnread(device) => self.shard.disk_was_not_read(device),
            ToShard::DiskRead => self.shard.disk_was_read(),
            ToShard::EndFormer(session, end) => {
                self.shard.end_former(session, end, monotonic_ns());
            }
            ToShard::Survey(mut survey, back) => {
                self.shard.survey(&mut survey);
                let _ = back.send(survey);
            }
            ToShard::Distrust(at, back) => {
                let _ = back.send(self.shard.distrust(at));
            }
            ToShard::Admin(asked_by, op) => {
                let done = self.administer(op);
                let _ = self.to_control.send(FromShard::Admin(asked_by, done));
            }
            ToShard::Vacate(slots) => {
                self.shard.vacate(slots);
                self.is_vacating = slots.is_some();
            }
            ToShard::Pulse(is_heard) => is_heard.store(true, Ordering::Release),
            ToShard::Stop => {
                self.finish(SessionState::Closing, true);
                return false;
            }
            ToShard::HandOver { write_back } => {
                self.finish(SessionState::HandedOver, write_back);
                self.memory_is_awaited = write_back;
                return false;
            }
        }
        true
    }

    /// What is more than fits one answer is asked for again. Here the shard's thread allocates: it does so for an operator,
    /// and for metrics twice a minute. A forgotten block takes all that continues it along, as many as that are.
    fn administer(&mut self, op: AdminOp) -> serde_json::Value {
        match op {
            AdminOp::Blocks { from } => {
                let index = &self.shard.cache().index;
                let blocks: Vec<_> =
                    index.blocks_at(from, PLACES_PER_ANSWER).map(|block| self.describe(block)).collect();
                let next = from.saturating_add(PLACES_PER_ANSWER);
                let next = (next < index.capacity()).then_some(next);
                serde_json::json!({"blocks": blocks, "next": next, "places": index.capacity()})
            }
            AdminOp::Block { key } => {
                let index = &self.shard.cache().index;
                let found = index.find(key).map(|id| self.describe(index.block(id)));
                serde_json::json!({"blocks": found.into_iter().collect::<Vec<_>>(), "next": null})
            }
            AdminOp::Namespaces { from } => {
                let all = self.shard.cache().index.namespaces.all();
                let some = all.iter().skip(from as usize).take(PLACES_PER_ANSWER as usize);
                let some: Vec<_> = some.map(describe_namespace).collect();
                let next = from.saturating_add(PLACES_PER_ANSWER);
                let next = ((next as usize) < all.len()).then_some(next);
                serde_json::json!({"namespaces": some, "next": next})
            }
            AdminOp::Evict { tier, count } => {
                let asked = count.min(EVICTIONS_PER_ANSWER);
                let evicted = self.shard.evict(tier, asked);
                // Fewer than asked: no more may go now.
                let more = evicted == asked && count > asked;
                serde_json::json!({"evicted": evicted, "more": more})
            }
            AdminOp::Drain { on } => {
                self.shard.drain(on);
                let (dirty, clean) = (self.shard.dirty_count(), self.shard.is_clean());
                serde_json::json!({"draining": on, "dirty": dirty, "clean": clean})
            }
        }
    }

    fn describe(&self, block: &Block) -> serde_json::Value {
        let place = |tier| match block.place(tier) {
            Place::Absent => serde_json::Value::Null,
            Place::Filling(slot) => serde_json::json!({"slot": slot, "filling": true}),
            Place::Ready(slot) => serde_json::json!({"slot": slot, "filling": false}),
        };
        let parent = block.parent().map(|parent| self.shard.cache().index.key_of(parent).to_string());
        serde_json::json!({
            "key": block.key.to_string(),
            "parent": parent,
            "namespace": self.shard.cache().index.namespaces.of(block.namespace).id.to_string(),
            "depth": block.depth,
            "dram": place(Tier::Host),
            "ssd": place(Tier::Disk),
            "leases": block.leases,
            "uses": block.pins,
            "matchable": block.is_visible(),
        })
    }

    fn answer_resets(&mut self, now_ns: u64) {
        if self.resets.is_empty() {
            return;
        }
        let durable = self.shard.is_reset();
        let to_control = &self.to_control;
        self.resets.retain(|(asked_by, blocks, until_ns)| {
            let waits = !durable && now_ns < *until_ns;
            if !waits {
                let _ = to_control.send(FromShard::Reset { asked_by: *asked_by, blocks: *blocks, durable });
            }
            waits
        });
    }

    /// Sessions end; what is under way is finished, and with `write_back` what is dirty is written, as far as
    /// five seconds go. What sessions were filling stays theirs in the slot table: they have not been asked.
    fn finish(&mut self, state: SessionState, write_back: bool) {
        self.shard.close_sessions(state);
        if !write_back {
            self.shard.drop_dirty();
        }
        let deadline_ns = monotonic_ns() + 5_000_000_000;
        // What the SSD held comes first: until it is known, nothing is written there.
        // So does a reset: what was forgotten is not there again with the next process.
        let recovering = |shard: &Shard<AnyDevice>| (write_back || !shard.is_reset()) && shard.cache().is_recovering();
        while (recovering(&self.shard) || !self.shard.is_drained()) && monotonic_ns() < deadline_ns {
            match self.for_shard.try_recv() {
                Ok(ToShard::FoundOnDisk(piece)) => self.shard.found_on_disk(piece),
                Ok(ToShard::DiskRead) => self.shard.disk_was_read(),
                Ok(ToShard::DiskUnread(device)) => self.shard.disk_was_not_read(device),
                _ => {}
            }
            if self.shard.poll(monotonic_ns()) == 0 {
                std::thread::yield_now();
            }
        }
        if let Some(stats) = &self.stats {
            let handed_over = state == SessionState::HandedOver;
            stats.set_state(if handed_over { ServerState::HandedOver } else { ServerState::Stopped });
        }
    }
}

/// Where a shard sleeps: one epoll over every bell there is.
struct Sleeper {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
    /// A copy of the bell of the session in each place, to drain it; last, the shard's own.
    bells: Vec<Option<OwnedFd>>,
    /// Bells that could not be watched, for want of descriptors: then nobody sleeps long.
    unwatched: bool,
}

const DEVICE: u64 = u64::MAX;
const OWN_BELL: usize = SESSIONS_MAX;

impl Sleeper {
    /// `None` if what there is cannot be waited for: then the shard never sleeps.
    fn new(shard: &mut Shard<AnyDevice>, bell: &OwnedFd, epoll: OwnedFd) -> Option<Self> {
        let bells = (0..=SESSIONS_MAX).map(|_| None).collect();
        let mut sleeper = Self { epoll, events: Vec::with_capacity(64), bells, unwatched: false };
        sleeper.watch(OWN_BELL, bell);
        for device in shard.devices() {
            // One that can only be polled is, as long as something is in flight.
            let Some(fd) = device.wake_fd() else { continue };
            epoll::add(&sleeper.epoll, fd, epoll::EventData::new_u64(DEVICE), epoll::EventFlags::IN).ok()?;
        }
        Some(sleeper)
    }

    fn watch(&mut self, place: usize, bell: &OwnedFd) {
        self.unwatch(place);
        let token = epoll::EventData::new_u64(place as u64);
        let watched =
            bell.try_clone().ok().filter(|copy| epoll::add(&self.epoll, copy, token, epoll::EventFlags::IN).is_ok());
        self.unwatched |= watched.is_none();
        self.bells[place] = watched;
    }

    /// By name: closing our copy alone would leave the client's copy registered.
    fn unwatch(&mut self, place: usize) {
        if let Some(bell) = self.bells[place].take() {
            let _ = epoll::delete(&self.epoll, &bell);
        }
    }

    fn sleep(&mut self, at_most: Duration) {
        let at_most = if self.unwatched { at_most.min(Duration::from_millis(1)) } else { at_most };
        let timeout = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: i64::from(at_most.subsec_nanos()) };
        let woken = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&timeout));
        if woken.is_ok() {
            let mut events = std::mem::take(&mut self.events);
            for event in events.drain(..) {
                let place = event.data.u64() as usize;
                // A device's descriptor falls silent when it is polled.
                let Some(Some(bell)) = self.bells.get(place) else { continue };
                if place == OWN_BELL {
                    doorbells::drain_own(bell);
                } else if !doorbells::drain(bell) {
                    // The client has closed its end: it would keep us awake for ever.
                    self.unwatch(place);
                }
            }
            self.events = events;
        }
    }
}
