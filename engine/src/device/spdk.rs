//! A namespace that SPDK drives: no kernel in the way, completions only by polling (decision 16).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use crossbeam_channel::{Receiver, Sender};
use kvring_ipc::client::monotonic_ns;
use kvring_ipc::config::Config;
use kvring_ipc::mapping::Mapping;
use kvring_spdk::{Controller, Dma, EnvOptions, Memory, Namespace, Qpair, SpdkError};
use rustix::io::Errno;

use super::nvme::Health;
use super::{Device, DeviceMemory, Direction, Done, Io, Region};
use crate::limits::SECTOR_BYTES;

/// What an address of SPDK begins with, in `ssd_cache_dir`.
pub const PREFIX: &str = "trtype:";

/// Says where SPDK is to be found, for whoever opens a device of it.
pub fn configure(config: &Config) {
    kvring_spdk::set_library(EnvOptions {
        library: config.spdk_library.clone(),
        no_huge: config.spdk_no_huge,
        memory_mib: config.spdk_memory_mib,
    });
}

/// The pool, where a device moves bytes.
struct Pool {
    mapping: Arc<Mapping>,
    file: Option<OwnedFd>,
}

// SAFETY: mapped as long as the Arc, and never referenced: clients write it at any time.
unsafe impl Memory for Pool {
    fn base(&self) -> *mut u8 {
        self.mapping.address(0, self.mapping.bytes())
    }
    fn bytes(&self) -> usize {
        self.mapping.bytes()
    }
    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }
}

const POOL: usize = 0;
const HEADERS: usize = 1;

/// The controller at an address, if a cache can lie on its namespace.
///
/// # Errors
/// [`SpdkError`].
pub fn controller(address: &str) -> Result<Arc<Controller>, SpdkError> {
    let controller = Controller::open(address)?;
    let Namespace { sector_bytes, metadata_bytes, .. } = controller.namespace();
    let refused = |why| Err(SpdkError::Address { address: address.into(), why });
    if *metadata_bytes != 0 {
        return refused("its blocks are formatted with metadata: format it without (nvme format --lbaf)");
    }
    if *sector_bytes == 0 || !SECTOR_BYTES.is_multiple_of(u64::from(*sector_bytes)) {
        return refused("its logical blocks are no part of 4096 bytes");
    }
    Ok(controller)
}

/// What a controller's drive says of its health.
///
/// # Errors
/// It does not say.
pub fn health(address: &str) -> Result<Health, SpdkError> {
    Ok(Health::parse(&controller(address)?.health()?))
}

/// What a connection is for: always the same namespace, as far as can be told.
#[derive(Clone)]
struct Target {
    address: String,
    namespace: Namespace,
    /// What it begins with: a cache's superblock, which does not change while the cache is used.
    first_sector: Box<[u8]>,
    depth: u32,
    memory: Vec<Arc<dyn Memory>>,
}

impl Target {
    fn connect(&self) -> Result<Qpair, SpdkError> {
        let controller = controller(&self.address)?;
        let other = |why| Err(SpdkError::Address { address: self.address.clone(), why });
        if *controller.namespace() != self.namespace {
            return other("another namespace is there now");
        }
        if first_sector(&self.address)? != self.first_sector {
            return other("something else is on the namespace now");
        }
        Qpair::new(controller, self.depth, self.memory.clone())
    }
}

fn first_sector(address: &str) -> Result<Box<[u8]>, SpdkError> {
    let mut sector = vec![0; SECTOR_BYTES as usize].into_boxed_slice();
    Blocking::open(address)?.read(&mut sector, 0).map_err(|error| SpdkError::Io {
        address: address.into(),
        what: "read the first sector",
        errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    })?;
    Ok(sector)
}

/// A thread that connects anew: it waits, the shard does not.
struct Again {
    ask: Sender<Option<Qpair>>,
    made: Receiver<Option<Qpair>>,
    /// It is at it.
    asked: bool,
}

impl Again {
    fn new(target: Target) -> Result<Self, SpdkError> {
        let address = target.address.clone();
        let (ask, asked) = crossbeam_channel::bounded::<Option<Qpair>>(1);
        let (to_shard, made) = crossbeam_channel::bounded(1);
        let again = move || {
            for old in asked {
                // As long as anybody has the old connection SPDK hands out no other.
                drop(old);
                match target.connect() {
                    Ok(pair) => drop(to_shard.send(Some(pair))),
                    Err(error) => {
                        tracing::warn!("not connected anew: {error}");
                        drop(to_shard.send(None));
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("kvring-spdk-again".into()).spawn(again);
        thread.map_err(|error| SpdkError::Io {
            address,
            what: "start a thread",
            errno: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
        })?;
        Ok(Self { ask, made, asked: false })
    }
}

/// A namespace by SPDK.
pub struct Spdk {
    /// None: its connection is broken, and made anew.
    qpair: Option<Qpair>,
    described: String,
    sector_bytes: u32,
    /// Where a broken connection can be made anew: where the host moves the bytes, and nothing is under way any more.
    again: Option<Again>,
    /// Something was asked of a broken one.
    wants_again: bool,
    memory: DeviceMemory,
    /// A sector for each transfer of headers: those lie in memory that no device is told of.
    bounce: Arc<Dma>,
    flights: Box<[Option<Io>]>,
    free: Vec<u32>,
    /// Flights that the driver had no room for.
    waiting: VecDeque<u32>,
    /// What could not be begun.
    refused: Vec<Done>,
    registers: bool,
}

impl Spdk {
    /// Over the namespace at an address, with room for `depth` transfers of a pool: with its file, if that lies on hugepages.
    ///
    /// # Errors
    /// [`SpdkError`].
    pub fn new(address: &str, memory: DeviceMemory, hugepages: Option<OwnedFd>, depth: u32) -> Result<Self, SpdkError> {
        let controller = controller(address)?;
        let bounce = Dma::new(depth as usize * SECTOR_BYTES as usize)?;
        // Over TCP the driver copies: any memory will do.
        let registers = !address.to_ascii_lowercase().contains("trtype:tcp");
        if registers && hugepages.is_none() {
            let why = "a device that moves bytes by itself wants the pool on hugepages: set hugepages = require";
            return Err(SpdkError::Address { address: address.into(), why });
        }
        let pool: Arc<dyn Memory> = Arc::new(Pool { mapping: memory.pool.clone(), file: hugepages });
        let Namespace { nsid, sector_bytes, transfer_bytes_max, serial, model, .. } = controller.namespace();
        let described = format!(
            "{}, namespace {nsid} of {model} {serial}, sectors of {sector_bytes} bytes, {} KiB a command, {depth} entries",
            controller.version(),
            transfer_bytes_max >> 10,
        );
        let (sector_bytes, namespace) = (*sector_bytes, controller.namespace().clone());
        let lent = vec![pool, bounce.clone()];
        let qpair = Qpair::new(controller, depth, lent.clone())?;
        let again = if registers {
            None
        } else {
            let (address, first_sector) = (address.to_owned(), first_sector(address)?);
            Some(Again::new(Target { address, namespace, first_sector, depth, memory: lent })?)
        };
        Ok(Self {
            qpair: Some(qpair),
            described,
            sector_bytes,
            again,
            wants_again: false,
            memory,
            bounce,
            flights: vec![None; depth as usize].into_boxed_slice(),
            free: (0..depth).rev().collect(),
            waiting: VecDeque::with_capacity(depth as usize),
            refused: Vec::with_capacity(depth as usize),
            registers,
        })
    }

    fn begin(&mut self, at: u32) -> Result<(), Errno> {
        let Some(io) = self.flights[at as usize] else { return Ok(()) };
        let sector = io.offset_in_file / u64::from(self.sector_bytes);
        let (memory, place) = match io.region {
            Region::Pool => (POOL, io.offset_in_region),
            Region::Headers => (HEADERS, at as usize * SECTOR_BYTES as usize),
        };
        if (io.region, io.direction) == (Region::Headers, Direction::Write) {
            let mut sector = [0; SECTOR_BYTES as usize];
            self.memory.headers.copy_out(io.offset_in_region, &mut sector[..io.bytes as usize]);
            self.bounce.copy_in(place, &sector[..io.bytes as usize]);
        }
        let write = io.direction == Direction::Write;
        let Some(qpair) = &mut self.qpair else {
            self.wants_again = true;
            return Err(Errno::NODEV);
        };
        let begun = qpair.submit(write, memory, place, sector, io.bytes as usize, u64::from(at));
        self.wants_again |= begun.is_err_and(|errno| errno != Errno::AGAIN);
        begun
    }

    /// Has a broken connection made anew, and takes the new one when it is there.
    fn renew(&mut self) {
        let Some(again) = &mut self.again else { return };
        if again.asked {
            if let Ok(made) = again.made.try_recv() {
                (self.qpair, again.asked, self.wants_again) = (made, false, false);
            }
        } else if self.wants_again && self.qpair.as_ref().is_none_or(|qpair| qpair.inflight() == 0) {
            again.asked = again.ask.try_send(self.qpair.take()).is_ok();
        }
    }

    fn end(&mut self, at: u32, result: Result<(), Errno>) -> Option<Done> {
        let io = self.flights[at as usize].take()?;
        self.free.push(at);
        if (io.region, io.direction, result) == (Region::Headers, Direction::Read, Ok(())) {
            let mut sector = [0; SECTOR_BYTES as usize];
            self.bounce.copy_out(at as usize * SECTOR_BYTES as usize, &mut sector[..io.bytes as usize]);
            self.memory.headers.copy_in(io.offset_in_region, &sector[..io.bytes as usize]);
        }
        Some(Done { tag: io.tag, result: result.map(|()| io.bytes) })
    }

    fn begin_waiting(&mut self) {
        self.renew();
        while let Some(at) = self.waiting.front().copied() {
            match self.begin(at) {
                Err(Errno::AGAIN) if self.qpair.as_ref().is_some_and(|qpair| qpair.inflight() > 0) => return,
                Ok(()) => {
                    self.waiting.pop_front();
                }
                Err(errno) => {
                    self.waiting.pop_front();
                    // Nothing is in flight that could make room: not to be tried again at once.
                    let errno = if errno == Errno::AGAIN { Errno::NOMEM } else { errno };
                    let done = self.end(at, Err(errno));
                    self.refused.extend(done);
                }
            }
        }
    }
}

impl Device for Spdk {
    fn describe(&self) -> String {
        self.described.clone()
    }

    fn depth(&self) -> u32 {
        self.flights.len() as u32
    }

    fn inflight(&self) -> u32 {
        (self.flights.len() - self.free.len() + self.refused.len()) as u32
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.inflight() == self.depth() {
            return Err(io);
        }
        let sector = self.sector_bytes;
        let whole = io.offset_in_file.is_multiple_of(u64::from(sector)) && io.bytes.is_multiple_of(sector);
        let fits = io.region == Region::Pool || u64::from(io.bytes) <= SECTOR_BYTES;
        // Checks that it lies in its region.
        self.memory.address(&io);
        if !whole || !fits || io.bytes == 0 || io.file != 0 {
            self.refused.push(Done { tag: io.tag, result: Err(Errno::INVAL) });
            return Ok(());
        }
        let Some(at) = self.free.pop() else { return Err(io) };
        self.flights[at as usize] = Some(io);
        self.waiting.push_back(at);
        Ok(())
    }

    fn flush(&mut self) {
        self.begin_waiting();
    }

    fn poll(&mut self, _now_ns: u64, budget: usize, done: &mut Vec<Done>) {
        self.begin_waiting();
        done.extend(self.refused.drain(..self.refused.len().min(budget)));
        let mut over = [(0, Ok(())); 64];
        let mut count = 0;
        // A pair that fails says so once, and then what has become of each transfer.
        for _ in 0..2 {
            let Some(qpair) = &mut self.qpair else { break };
            let polled = qpair.poll(budget.min(over.len()), |done| {
                over[count] = (done.tag as u32, done.result);
                count += 1;
            });
            if polled.is_ok() {
                break;
            }
        }
        for (at, result) in over.into_iter().take(count) {
            done.extend(self.end(at, result));
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn register_piece(&mut self, piece: u32) -> rustix::io::Result<()> {
        if !self.registers {
            return Ok(());
        }
        let at = piece as usize * self.memory.piece_bytes;
        let bytes = self.memory.piece_bytes.min(self.memory.pool.bytes() - at);
        self.qpair.as_mut().map_or(Err(Errno::NODEV), |qpair| qpair.register(POOL, at, bytes))
    }
}

#[expect(clippy::disallowed_types, reason = "readers of the control plane share a pair of queues; no shard has one")]
type Shared = std::sync::Mutex<Option<Qpair>>;

/// A namespace for the control plane: one transfer after the other, through memory of SPDK's own.
pub(super) struct Blocking {
    pair: Shared,
    bounce: Arc<Dma>,
}

/// As the kernel waits for an NVMe command.
const WAIT_NS: u64 = 30_000_000_000;
/// At once at most so much.
const BOUNCE_BYTES: usize = 1 << 20;

impl std::fmt::Debug for Blocking {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Blocking")
    }
}

impl Blocking {
    pub fn open(address: &str) -> Result<Self, SpdkError> {
        let bounce = Dma::new(BOUNCE_BYTES)?;
        let pair = Qpair::new(controller(address)?, 2, vec![bounce.clone()])?;
        Ok(Self { pair: Shared::new(Some(pair)), bounce })
    }

    /// Begins something, and waits for its end, but not for ever: SPDK gives up no command by itself.
    fn wait(pair: &mut Qpair, begin: impl FnOnce(&mut Qpair) -> Result<(), Errno>) -> Result<(), Errno> {
        begin(pair)?;
        let (mut result, mut failures) = (None, 0);
        let until_ns = monotonic_ns() + WAIT_NS;
        while result.is_none() {
            if monotonic_ns() > until_ns {
                return Err(Errno::TIMEDOUT);
            }
            let polled = pair.poll(1, |done| result = Some(done.result));
            failures += u32::from(polled.is_err());
            if failures > 2 {
                return Err(Errno::NODEV);
            }
            if result.is_none() {
                std::thread::yield_now();
            }
        }
        result.unwrap_or(Err(Errno::IO))
    }

    fn each_part(
        &self,
        length: usize,
        at: u64,
        mut each: impl FnMut(&mut Qpair, u64, std::ops::Range<usize>) -> Result<(), Errno>,
    ) -> std::io::Result<()> {
        for from in (0..length).step_by(BOUNCE_BYTES) {
            let part = from..length.min(from + BOUNCE_BYTES);
            self.with(|pair| {
                let sector = u64::from(pair.controller().namespace().sector_bytes);
                each(pair, (at + from as u64) / sector, part)
            })?;
        }
        Ok(())
    }

    /// A pair on which something did not end is cut off: its memory is used no more.
    fn with(&self, each: impl FnOnce(&mut Qpair) -> Result<(), Errno>) -> std::io::Result<()> {
        let mut place = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        let pair = place.as_mut().ok_or(Errno::NODEV)?;
        let done = each(pair);
        if done.is_err() && pair.inflight() > 0 {
            *place = None;
        }
        Ok(done?)
    }

    /// Whole sectors.
    pub fn read(&self, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
        self.each_part(bytes.len(), at, |pair, sector, part| {
            Self::wait(pair, |pair| pair.submit(false, 0, 0, sector, part.len(), 0))?;
            self.bounce.copy_out(0, &mut bytes[part]);
            Ok(())
        })
    }

    /// Whole sectors.
    pub fn write(&self, bytes: &[u8], at: u64) -> std::io::Result<()> {
        self.each_part(bytes.len(), at, |pair, sector, part| {
            self.bounce.copy_in(0, &bytes[part.clone()]);
            Self::wait(pair, |pair| pair.submit(true, 0, 0, sector, part.len(), 0))
        })
    }

    pub fn sync(&self) -> std::io::Result<()> {
        self.with(|pair| Self::wait(pair, |pair| pair.flush(0)))
    }
}
