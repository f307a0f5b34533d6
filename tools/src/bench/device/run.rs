//! The threads of device jobs: each keeps `iodepth` transfers in flight on a device of its own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use kvring_engine::checksum;
use kvring_engine::device::aio::Aio;
use kvring_engine::device::medium::{Medium, Patience};
use kvring_engine::device::nvme::Nvme;
use kvring_engine::device::sim::{Chance, Faults, Sim};
use kvring_engine::device::spdk::{self, Spdk};
use kvring_engine::device::uring::{self, Finds, RingOptions, Uring};
use kvring_engine::device::{Device, DeviceMemory, Direction, Io, Region};
use kvring_ipc::client::monotonic_ns;
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};

use super::disk_util::DiskUtil;
use super::job::{Engine, Job};
use super::report::Done;
use crate::settings::Settings;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Most memory of one job: a registered buffer is at most so long (io_uring_register(2)).
const BUFFERS_MAX: u64 = 1 << 30;
/// Latency of the simulated device.
const SIM_LATENCY_NS: u64 = 20_000;
/// Most memory of a simulated file.
const SIM_BYTES_MAX: u64 = 4 << 30;

/// Runs jobs at once: those of one group. Reports in their order.
pub fn run(jobs: &[Job], disks: &mut DiskUtil) -> Result<Vec<Done>, Box<dyn std::error::Error>> {
    if jobs.is_empty() {
        return Ok(Vec::new());
    }
    let mut threads = Vec::new();
    for job in jobs {
        for number in 0..job.numjobs {
            let mut job = job.clone();
            if job.own_files {
                job.filename = format!("{}.{number}.0", job.name).into();
            }
            let reads =
                jobs.iter().any(|other| other.pattern.reads && (other.own_files || other.filename == job.filename));
            let size = lay_out(&job, reads)?;
            threads.push((job, size, number));
        }
    }
    let barrier = Barrier::new(threads.len());
    let longest = jobs.iter().filter_map(|job| job.runtime.map(|runtime| runtime + job.ramp_time)).max();
    let bar = longest.map_or_else(ProgressBar::hidden, |time| {
        let style = ProgressStyle::with_template("{msg} {bar:40} {pos}/{len} s")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(time.as_secs().max(1)).with_style(style).with_message(jobs[0].name.clone())
    });
    let ended = disks.during(|| {
        std::thread::scope(|scope| {
            let barrier = &barrier;
            let run =
                |(job, size, number): (Job, u64, u32)| scope.spawn(move || Worker::run(job, size, number, barrier));
            let running: Vec<_> = threads.into_iter().map(run).collect();
            let started = Instant::now();
            while running.iter().any(|thread| !thread.is_finished()) {
                bar.set_position(started.elapsed().as_secs());
                std::thread::sleep(Duration::from_millis(20));
            }
            running
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into())))
                .collect::<Vec<_>>()
        })
    });
    bar.finish_and_clear();
    ended.into_iter().collect::<Result<_, Failure>>().map_err(|error| -> Box<dyn std::error::Error> { error })
}

/// Sees to it that the file is there and as long as it is used, and that what will be read was written. Says how long.
fn lay_out(job: &Job, reads: bool) -> Result<u64, Box<dyn std::error::Error>> {
    let name = job.filename.display();
    let failed = |error: std::io::Error| format!("filename={name}: {error}");
    // Whole transfers only.
    let least = job.bs[0].0.min(job.bs[1].0);
    let whole = |size: u64| size - size % least;
    if job.size.is_some_and(|size| size < least) {
        return Err(format!("job {}: bs={least} is more than size={}", job.name, job.size.unwrap_or(0)).into());
    }
    if job.engine == Engine::Sim {
        let size = job.size.ok_or("ioengine=sim: say size=BYTES")?;
        let all = size.saturating_mul(u64::from(job.numjobs));
        let fits = all <= SIM_BYTES_MAX;
        return if fits {
            Ok(whole(size))
        } else {
            Err(format!("size={size}: ioengine=sim is in memory: at most 4g in all").into())
        };
    }
    if job.engine == Engine::Spdk {
        spdk::configure(&Settings::default().load()?.config);
        if job.pattern.writes {
            claim(&job.filename)?;
        }
        let length = spdk::controller(&address_of(job))?.namespace().bytes;
        return Ok(whole(job.size.unwrap_or(length).min(length)));
    }
    // What takes commands has no length of its own, and nobody can be kept from it: its block device has both.
    let path = match job.engine {
        Engine::IoUringCmd => Medium::of(&job.filename)?.path().to_path_buf(),
        _ => job.filename.clone(),
    };
    let found = std::fs::metadata(&path).ok();
    if found.as_ref().is_some_and(|found| found.file_type().is_block_device()) {
        // Exclusive: the kernel refuses a device that is mounted or otherwise in use (open(2), O_EXCL).
        let flags = if job.pattern.writes { rustix::fs::OFlags::EXCL.bits() as i32 } else { 0 };
        let device = File::options().read(true).write(job.pattern.writes).custom_flags(flags).open(&path);
        let mut device = device.map_err(|error| format!("{} (mounted, or in use by another?)", failed(error)))?;
        let length = std::io::Seek::seek(&mut device, std::io::SeekFrom::End(0))?;
        return Ok(whole(job.size.unwrap_or(length).min(length)));
    }
    if job.engine == Engine::IoUringCmd {
        return Err(format!("filename={name}: ioengine=io_uring_cmd needs an NVMe namespace: /dev/ngXnY").into());
    }
    let length = found.map_or(0, |found| found.len());
    let size = job
        .size
        .or(Some(length).filter(|length| *length > 0))
        .ok_or_else(|| format!("job {}: say size=BYTES", job.name))?;
    if length >= size {
        return Ok(whole(size));
    }
    let file = File::options().create(true).truncate(false).write(true).open(&job.filename).map_err(failed)?;
    if reads {
        // What was never written is not read from the device. From where the file ends now: a layout that was
        // interrupted goes on there.
        let bar = ProgressBar::new((size - length) >> 20).with_message(format!("laying out {name}"));
        let mut piece = vec![0u8; 1 << 20];
        let mut chance = Chance::new(job.randseed);
        let mut offset = length;
        while offset < size {
            piece.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&chance.next_u64().to_le_bytes()));
            let count = (size - offset).min(1 << 20) as usize;
            let wrote = rustix::io::pwrite(&file, &piece[..count], offset).map_err(|errno| failed(errno.into()))?;
            offset += wrote as u64;
            bar.inc(1);
        }
        bar.finish_and_clear();
        file.sync_all().map_err(failed)?;
    } else {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size)
            .map_err(|errno| failed(errno.into()))?;
    }
    Ok(whole(size))
}

type AnyDevice = Box<dyn Device>;

fn address_of(job: &Job) -> String {
    job.filename.display().to_string()
}

/// Nobody else's on this machine from now on: no server's, and no other benchmark's.
fn claim(address: &Path) -> Result<(), Box<dyn std::error::Error>> {
    static CLAIMED: Mutex<Vec<(PathBuf, File)>> = Mutex::new(Vec::new());
    let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
    if claimed.iter().all(|(has, _)| has != address) {
        let lock = Medium::of(address)?.lock(Patience::No)?;
        claimed.push((address.to_path_buf(), lock));
    }
    Ok(())
}

/// Buffers; a device that moves bytes by itself wants them on hugepages, and their file.
fn buffers(job: &Job, bytes: u64) -> Result<(Mapping, Option<OwnedFd>), Failure> {
    let length = bytes.next_multiple_of(2 << 20);
    if job.engine == Engine::Spdk
        && let Ok(file) = sealed_memfd("kvring-bench", length, Pages::Huge2M)
        && let Ok(mapping) = Mapping::new(&file, length as usize)
        && mapping.populate(0, length as usize).is_ok()
    {
        return Ok((mapping, Some(file)));
    }
    let mapping = Mapping::private(length as usize)?;
    mapping.advise_hugepages();
    mapping.populate(0, bytes as usize)?;
    Ok((mapping, None))
}

fn open(job: &Job, size: u64, pool: &Arc<Mapping>, hugepages: Option<OwnedFd>) -> Result<AnyDevice, Failure> {
    let header = sealed_memfd("kvring-bench", 4096, Pages::Small)?;
    let memory =
        DeviceMemory { pool: pool.clone(), headers: Arc::new(Mapping::new(header, 4096)?), piece_bytes: pool.bytes() };
    let file = || -> Result<OwnedFd, Failure> {
        let flags = if job.direct { rustix::fs::OFlags::DIRECT.bits() as i32 } else { 0 };
        let mut options = File::options();
        options.read(true).write(job.pattern.writes).custom_flags(flags);
        let opened = options.open(&job.filename);
        let told = |error| format!("filename={}: {error} (direct={})", job.filename.display(), u8::from(job.direct));
        Ok(opened.map_err(told)?.into())
    };
    let ring = RingOptions {
        entries: job.iodepth.next_power_of_two().max(2),
        fixed_buffers: job.fixedbufs,
        io_poll: job.hipri,
        sq_poll: job.sqthread_poll,
    };
    let mut device: AnyDevice = match job.engine {
        Engine::Spdk => Box::new(Spdk::new(&address_of(job), memory, hugepages, job.iodepth)?),
        Engine::Libaio => Box::new(Aio::new(vec![file()?], memory, job.iodepth)?),
        Engine::Sim => {
            let platter = vec![vec![0; size as usize]];
            Box::new(Sim::new(platter, memory, job.iodepth, SIM_LATENCY_NS, Faults::default(), job.randseed))
        }
        Engine::IoUringCmd => {
            let medium = Medium::of(&job.filename)?;
            let told = |error| format!("ioengine=io_uring_cmd: {}: {error}", job.filename.display());
            let mut left_out = Vec::new();
            let device = Nvme::new(&medium, None, memory, ring, &mut left_out).map_err(told)?;
            refuse(job, &left_out)?;
            Box::new(device)
        }
        // The cache has a path of its own.
        Engine::IoUring | Engine::Kvring => {
            let file = file()?;
            if job.hipri
                && let Err(why) = uring::can_poll(&Medium::of(&job.filename)?, &[file.try_clone()?])
            {
                refuse(job, &[format!("hipri=1: {why}")])?;
            }
            Box::new(Uring::new(vec![file], None, memory, ring, Finds::ByWaiting)?)
        }
    };
    device.register_piece(0).map_err(|errno| {
        format!(
            "fixedbufs=1: {} bytes of buffers cannot be registered: {errno}: raise ulimit -l, or say fixedbufs=0",
            pool.bytes()
        )
    })?;
    Ok(device)
}

/// A benchmark measures what it was asked to, or nothing.
fn refuse(job: &Job, left_out: &[String]) -> Result<(), Failure> {
    match left_out.first() {
        Some(why) => Err(format!("filename={}: {why}", job.filename.display()).into()),
        None => Ok(()),
    }
}

/// Each of so many numbers once, in an order that the seed decides: a Feistel network over the next power of four, walked
/// until it lands inside.
struct Shuffle {
    count: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Shuffle {
    fn new(count: u64, seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let bits = u64::BITS - count.max(2).next_power_of_two().leading_zeros() - 1;
        Self { count, half_bits: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| chance.next_u64()) }
    }

    fn at(&self, index: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> self.half_bits, value & mask);
            for key in self.keys {
                let mixed = (right ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                (left, right) = (right, (left ^ (mixed >> 32)) & mask);
            }
            value = left << self.half_bits | right;
            if value < self.count {
                return value;
            }
        }
    }
}

/// A transfer in flight.
#[derive(Debug, Clone, Copy)]
struct Flight {
    io: Io,
    rest: Io,
    issued_ns: u64,
}

/// Another for each job and each copy of it.
fn seed_of(job: &Job, number: u32) -> u64 {
    job.randseed ^ checksum::of_bytes(job.name.as_bytes()) ^ u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Where the next transfer goes.
struct Offsets {
    size: u64,
    random: bool,
    map: Option<Shuffle>,
    /// Least and most bytes, of reads and of writes.
    bs: [(u64, u64); 2],
    next: [u64; 2],
    passed: u64,
    seed: u64,
    chance: Chance,
}

impl Offsets {
    fn new(job: &Job, size: u64, number: u32) -> Self {
        let seed = seed_of(job, number);
        let least = job.bs[0].0.min(job.bs[1].0);
        let random = job.pattern.random;
        let map = (random && !job.norandommap).then(|| Shuffle::new((size / least).max(1), seed));
        Self { size, random, map, bs: job.bs, next: [0; 2], passed: 0, seed, chance: Chance::new(seed) }
    }

    fn next(&mut self, side: usize) -> (u64, u64) {
        let (least, most) = self.bs[side];
        let bytes = if least == most { least } else { least * (1 + self.chance.below(most / least)) };
        let places = self.size / least;
        let offset = match &self.map {
            Some(map) => {
                // Blocks of the smaller size: the larger ones lie on their own multiples.
                let place = map.at(self.passed % map.count) * (self.size / map.count) / least;
                self.passed += 1;
                if self.passed.is_multiple_of(map.count) {
                    self.map = Some(Shuffle::new(map.count, self.seed.wrapping_add(self.passed)));
                }
                place.min(places - 1) * least
            }
            None if self.random => self.chance.below(places) * least,
            None => {
                let offset = self.next[side];
                self.next[side] = if offset + 2 * bytes > self.size { 0 } else { offset + bytes };
                offset
            }
        };
        // The last one ends with the file, which is whole blocks of the least size of both.
        (offset, bytes.min(self.size - offset))
    }
}

struct Worker {
    job: Job,
    device: AnyDevice,
    pool: Arc<Mapping>,
    slot_bytes: usize,
    flights: Vec<Option<Flight>>,
    free: Vec<u32>,
    offsets: Offsets,
    report: Done,
    counting: bool,
    counted_from_ns: u64,
    scratch: Vec<u8>,
    /// Says of what this run has written that it was this run.
    generation: u64,
    /// Blocks that it has written whole, by their place; for verify only.
    written: Vec<bool>,
}

impl Worker {
    fn run(job: Job, size: u64, number: u32, barrier: &Barrier) -> Result<Done, Failure> {
        let made = Self::new(job, size, number);
        // Those that could not begin do not keep the others waiting.
        barrier.wait();
        let mut worker = made?;
        worker.work(size)?;
        if worker.job.verify && worker.job.pattern.writes && worker.report.error == 0 {
            worker.read_back()?;
        }
        Ok(worker.report)
    }

    fn new(job: Job, size: u64, number: u32) -> Result<Self, Failure> {
        let most = job.bs.iter().map(|(_, most)| *most).max().unwrap_or(4096);
        if most > size {
            return Err(format!("job {}: bs={most} is more than size={size}", job.name).into());
        }
        let slot_bytes = most.next_multiple_of(4096) as usize;
        let bytes = slot_bytes as u64 * u64::from(job.iodepth);
        if bytes > BUFFERS_MAX {
            return Err(format!(
                "job {}: bs={most} and iodepth={} take {bytes} bytes of buffers: at most 1 GiB",
                job.name, job.iodepth
            )
            .into());
        }
        let (pool, hugepages) = buffers(&job, bytes)?;
        let pool = Arc::new(pool);
        let device = open(&job, size, &pool, hugepages)?;
        let mut chance = Chance::new(job.randseed ^ u64::from(number));
        let noise: Vec<u8> = (0..slot_bytes / 8).flat_map(|_| chance.next_u64().to_le_bytes()).collect();
        for slot in 0..job.iodepth as usize {
            pool.copy_in(slot * slot_bytes, &noise);
        }
        let report = Done::new(job.clone());
        Ok(Self {
            offsets: Offsets::new(&job, size, number),
            flights: vec![None; job.iodepth as usize],
            free: (0..job.iodepth).rev().collect(),
            device,
            pool,
            slot_bytes,
            report,
            counting: false,
            counted_from_ns: 0,
            scratch: vec![0; slot_bytes],
            generation: Chance::new(monotonic_ns() ^ u64::from(std::process::id()) << 32 ^ u64::from(number))
                .next_u64(),
            written: vec![false; if job.verify { (size / job.bs[1].0) as usize } else { 0 }],
            job,
        })
    }

    fn work(&mut self, size: u64) -> Result<(), Failure> {
        let began_ns = monotonic_ns();
        let ns = |duration: Duration| duration.as_nanos() as u64;
        let count_from_ns = began_ns + ns(self.job.ramp_time);
        let end_ns = self.job.runtime.map_or(u64::MAX, |runtime| count_from_ns + ns(runtime));
        let mut bytes_left = if self.job.time_based { u64::MAX } else { size };
        let mut chance = Chance::new(self.offsets.seed ^ 0x7277);
        let mut usage = usage();
        self.counting = self.job.ramp_time.is_zero();
        self.counted_from_ns = began_ns;
        let (mut next_ns, mut done) = (began_ns, Vec::with_capacity(self.job.iodepth as usize));
        let mut ended_ns = began_ns;
        loop {
            let now_ns = monotonic_ns();
            if !self.counting && now_ns >= count_from_ns {
                (self.counting, self.counted_from_ns) = (true, now_ns);
                usage = self::usage();
            }
            let over = now_ns >= end_ns || bytes_left == 0 || self.report.error != 0;
            if over && self.device.inflight() == 0 {
                break;
            }
            let mut unflushed = 0;
            while !over && !self.free.is_empty() && bytes_left > 0 && now_ns >= next_ns {
                let side = match (self.job.pattern.reads, self.job.pattern.writes) {
                    (true, true) => usize::from(chance.below(100) >= self.job.rwmixread),
                    (reads, _) => usize::from(!reads),
                };
                let (offset, bytes) = self.offsets.next(side);
                self.issue(side, offset, bytes);
                bytes_left = bytes_left.saturating_sub(bytes);
                next_ns = self.not_before(now_ns, next_ns, bytes);
                unflushed += 1;
                // The last of them go with the wait, in one system call.
                if unflushed == self.job.iodepth_batch && !self.free.is_empty() {
                    self.device.flush();
                    self.submitted(unflushed);
                    unflushed = 0;
                }
            }
            self.submitted(unflushed);
            if self.device.inflight() == 0 {
                // Nothing may be asked for yet.
                std::thread::sleep(Duration::from_nanos(next_ns.saturating_sub(monotonic_ns()).min(10_000_000)));
                // A simulated device has no clock but this.
                self.device.poll(monotonic_ns(), 0, &mut done);
                continue;
            }
            let waits_for_rate = !over && !self.free.is_empty() && bytes_left > 0;
            self.device.wait(waits_for_rate.then(|| Duration::from_nanos(next_ns.saturating_sub(now_ns))));
            let now_ns = monotonic_ns();
            self.device.poll(now_ns, self.job.iodepth as usize, &mut done);
            let landed = !done.is_empty();
            if self.counting && landed {
                self.report.completed(done.len());
            }
            for done in done.drain(..) {
                self.land(done.tag, done.result, now_ns)?;
            }
            if landed {
                ended_ns = now_ns;
                if !self.job.thinktime.is_zero() {
                    next_ns = next_ns.max(now_ns + self.job.thinktime.as_nanos() as u64);
                }
            }
        }
        // A pause at the end is part of the run.
        ended_ns = ended_ns.max(monotonic_ns().min(end_ns)).max(self.counted_from_ns);
        let now = self::usage();
        self.report.cpu = [now.cpu[0] - usage.cpu[0], now.cpu[1] - usage.cpu[1]];
        self.report.counts = std::array::from_fn(|at| now.counts[at] - usage.counts[at]);
        self.report.runtime_ms = (ended_ns - self.counted_from_ns).div_ceil(1_000_000);
        Ok(())
    }

    fn submitted(&mut self, count: u32) {
        if self.counting && count > 0 {
            self.report.submitted(count as usize);
        }
    }

    /// When the next transfer may be issued, after one of `bytes`.
    fn not_before(&self, now_ns: u64, last_ns: u64, bytes: u64) -> u64 {
        let rate = self.job.rate.map(|rate| bytes as f64 * 1e9 / rate as f64);
        let iops = self.job.rate_iops.map(|rate| 1e9 / rate as f64);
        let pause = [rate, iops].into_iter().flatten().fold(0.0, f64::max);
        // Behind schedule, the schedule is kept: at most a tenth of a second is made up for.
        if pause > 0.0 { last_ns.max(now_ns.saturating_sub(100_000_000)) + pause as u64 } else { last_ns }
    }

    fn issue(&mut self, side: usize, offset: u64, bytes: u64) {
        let Some(tag) = self.free.pop() else { return };
        let at = tag as usize * self.slot_bytes;
        let direction = if side == 0 { Direction::Read } else { Direction::Write };
        if self.job.verify && side == 1 {
            fill(&mut self.scratch[..bytes as usize], self.generation, offset);
            self.pool.copy_in(at, &self.scratch[..bytes as usize]);
        }
        let now_ns = monotonic_ns();
        let io = Io {
            tag,
            direction,
            file: 0,
            offset_in_file: offset,
            region: Region::Pool,
            offset_in_region: at,
            bytes: bytes as u32,
        };
        self.flights[tag as usize] = Some(Flight { io, rest: io, issued_ns: now_ns });
        let taken = self.device.submit(io);
        debug_assert!(taken.is_ok(), "there are no more flights than the device takes");
        let inflight = self.device.inflight();
        self.report.depths[(inflight.ilog2() as usize).min(6)] += u64::from(self.counting);
    }

    fn land(&mut self, tag: u32, result: Result<u32, rustix::io::Errno>, now_ns: u64) -> Result<(), Failure> {
        let Some(flight) = self.flights[tag as usize] else {
            return Err("the device reports what was not asked of it".into());
        };
        let Flight { io, rest, issued_ns } = flight;
        let moved = match result {
            Ok(moved) => moved,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => 0,
            Err(errno) => {
                self.report.error = errno.raw_os_error();
                (self.flights[tag as usize], _) = (None, self.free.push(tag));
                return Ok(());
            }
        };
        let side = usize::from(io.direction == Direction::Write);
        if moved < rest.bytes {
            self.report.sides[side].short += u64::from(moved > 0 && self.counting);
            if moved == 0 && result.is_ok() {
                return Err(format!("{}: the file ends at {}", self.job.filename.display(), rest.offset_in_file).into());
            }
            let rest = Io {
                offset_in_file: rest.offset_in_file + u64::from(moved),
                offset_in_region: rest.offset_in_region + moved as usize,
                bytes: rest.bytes - moved,
                ..rest
            };
            self.flights[tag as usize] = Some(Flight { rest, ..flight });
            let taken = self.device.submit(rest);
            debug_assert!(taken.is_ok(), "the flight's own place is free");
            return Ok(());
        }
        if self.counting {
            let since_ns = now_ns.saturating_sub(self.counted_from_ns);
            self.report.sides[side].record(u64::from(io.bytes), now_ns.saturating_sub(issued_ns), since_ns);
        }
        if self.job.verify && side == 1 {
            self.written[(io.offset_in_file / self.job.bs[1].0) as usize] = true;
        }
        // Of a job that writes too, what it reads may never have been written.
        if self.job.verify && side == 0 && !self.job.pattern.writes {
            self.compare(io, None)?;
        }
        (self.flights[tag as usize], _) = (None, self.free.push(tag));
        Ok(())
    }

    fn compare(&mut self, io: Io, generation: Option<u64>) -> Result<(), Failure> {
        let bytes = &mut self.scratch[..io.bytes as usize];
        self.pool.copy_out(io.offset_in_region, bytes);
        check(bytes, generation, io.offset_in_file)
            .map_err(|why| format!("verify: {} at offset {}: {why}", self.job.filename.display(), io.offset_in_file))?;
        self.report.verified += 1;
        Ok(())
    }

    /// Reads every block that was written, and compares.
    fn read_back(&mut self) -> Result<(), Failure> {
        let bytes = self.job.bs[1].0;
        let places: Vec<u64> =
            (0..).zip(&self.written).filter(|(_, written)| **written).map(|(place, _)| place).collect();
        let (mut left, mut done) = (places.iter(), Vec::new());
        self.counting = false;
        while self.device.inflight() > 0 || left.len() > 0 {
            while let Some(place) = (!self.free.is_empty()).then(|| left.next()).flatten() {
                self.issue(0, place * bytes, bytes);
            }
            self.device.wait(None);
            self.device.poll(monotonic_ns(), self.job.iodepth as usize, &mut done);
            for done in done.drain(..) {
                let Some(flight) = self.flights[done.tag as usize] else { continue };
                self.land(done.tag, done.result, 0)?;
                let is_over = self.flights[done.tag as usize].is_none();
                if is_over && done.result.is_ok() {
                    self.compare(flight.io, Some(self.generation))?;
                }
            }
            if self.report.error != 0 && self.device.inflight() == 0 {
                return Ok(());
            }
        }
        if self.report.verified != places.len() as u64 {
            return Err(format!("verify: {} of {} blocks were read again", self.report.verified, places.len()).into());
        }
        Ok(())
    }
}

/// Bytes that say which block they are, which run has written them, and whether they are whole: a mark, the offset, the
/// run, noise of both, and the checksum of all of it.
fn fill(bytes: &mut [u8], generation: u64, offset: u64) {
    let mut chance = Chance::new(generation ^ offset.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&chance.next_u64().to_le_bytes()));
    bytes[..8].copy_from_slice(MARK);
    bytes[8..16].copy_from_slice(&offset.to_le_bytes());
    bytes[16..24].copy_from_slice(&generation.to_le_bytes());
    let end = bytes.len() - 8;
    let crc = checksum::of_bytes(&bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
}

const MARK: &[u8; 8] = b"kvrverif";

fn check(bytes: &[u8], generation: Option<u64>, offset: u64) -> Result<(), &'static str> {
    if bytes[..8] != *MARK || bytes[8..16] != offset.to_le_bytes() {
        return Err("these are another block's bytes");
    }
    let end = bytes.len() - 8;
    if bytes[end..] != checksum::of_bytes(&bytes[..end]).to_le_bytes() {
        return Err("the checksum does not match");
    }
    if generation.is_some_and(|generation| bytes[16..24] != generation.to_le_bytes()) {
        return Err("they are from before this run: what it wrote is lost");
    }
    Ok(())
}

/// What this thread has used.
struct Usage {
    cpu: [f64; 2],
    counts: [i64; 3],
}

#[expect(unsafe_code, reason = "getrusage has no safe binding")]
fn usage() -> Usage {
    // SAFETY: a struct of integers, for which zeros are a value; getrusage writes it whole.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: RUSAGE_THREAD and a place to write to; it fails for neither.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Usage {
        cpu: [seconds(usage.ru_utime), seconds(usage.ru_stime)],
        counts: [usage.ru_nvcsw + usage.ru_nivcsw, usage.ru_majflt, usage.ru_minflt],
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_shuffle_has_each_once() {
        for count in [1, 2, 3, 64, 1000, 4097] {
            let shuffle = Shuffle::new(count, 7);
            let mut seen: Vec<u64> = (0..count).map(|at| shuffle.at(at)).collect();
            assert!(count < 64 || !seen.is_sorted());
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..count), "{count}");
        }
    }

    #[test]
    fn other_bytes_than_were_written_are_told_from_them() {
        let mut bytes = vec![0; 4096];
        fill(&mut bytes, 1, 8192);
        assert_eq!((check(&bytes, Some(1), 8192), check(&bytes, None, 8192)), (Ok(()), Ok(())));
        assert!(check(&bytes, None, 4096).is_err() && check(&bytes, Some(2), 8192).is_err());
        for at in [0, 9, 20, 100, 4095] {
            bytes[at] ^= 1;
            assert!(check(&bytes, None, 8192).is_err(), "{at}");
            bytes[at] ^= 1;
        }
    }
}
