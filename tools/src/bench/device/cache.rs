//! `ioengine=kvring`: a job's transfers as loads and stores of blocks through a server, its rings, index, checksums and
//! SSD tier, over a file system where the job's file would lie.
//!
//! A read is a match, a load, the copy out of the pool and the release of one block that is on the SSD only. A write is a
//! reserve, the copy into the pool and a commit; stores run no further ahead of the SSD than a quarter of the pool, and
//! the run ends when what was stored is written; bytes of a write job are those that reached the SSD.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use kvring_engine::device::sim::Chance;
use kvring_ipc::client::{Matched, Session, monotonic_ns};
use kvring_ipc::handshake::{Reply, Request, ask};
use kvring_ipc::key::{BlockKey, Namespace};
use kvring_ipc::wire::{Completion, Grant, LeaseId, Status, Tag};

use super::job::Job;
use super::report::Done;
use crate::bench::BenchServer;

type Failure = Box<dyn std::error::Error>;

enum Step {
    Match,
    Load(LeaseId),
    Reserve,
    Commit,
}

struct Flight {
    step: Step,
    key: BlockKey,
    issued_ns: u64,
}

struct Cached {
    job: Job,
    session: Session,
    flights: HashMap<Tag, Flight>,
    report: Done,
    buffer: Vec<u8>,
    counting: bool,
    counted_from_ns: u64,
}

/// Runs one job.
pub fn run(job: &Job) -> Result<Done, Failure> {
    if job.numjobs > 1 || job.pattern.reads && job.pattern.writes {
        return Err(format!("job {}: ioengine=kvring takes numjobs=1, and reads or writes, not both", job.name).into());
    }
    let size = job.size.ok_or_else(|| format!("job {}: say size=BYTES", job.name))?;
    let bytes = job.bs[0].0;
    let blocks = size / bytes;
    let pool_bytes = (size / 8).max(bytes * u64::from(job.iodepth) * 4).max(8 << 20);
    if blocks < 16 || pool_bytes * 2 > size {
        return Err(format!(
            "job {}: size={size} is too small: the pool of {pool_bytes} bytes would hold most of it",
            job.name
        )
        .into());
    }
    let dir = job.filename.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let gb = |bytes: u64| (bytes as f64 / f64::from(1 << 30)).to_string();
    let settings = [
        ("cpu_cache_gb", gb(pool_bytes)),
        ("ssd_cache_gb", gb(size.saturating_add(size / 8))),
        ("ssd_read_depth", job.iodepth.min(256).to_string()),
        ("ssd_write_depth", job.iodepth.min(256).to_string()),
    ];
    let server = BenchServer::start(dir, bytes >> 10, &settings)?;
    let session = server.session(bytes)?;
    let report = Done::new(job.clone());
    let mut cached = Cached {
        session,
        flights: HashMap::new(),
        report,
        buffer: vec![0x5a; bytes as usize],
        counting: false,
        counted_from_ns: 0,
        job: job.clone(),
    };
    if job.pattern.reads {
        for number in 0..blocks {
            cached.issue(number, false, 0)?;
            cached.settle(u64::from(job.iodepth), false)?;
            keep_pace(&server, (number + 1) * bytes, pool_bytes / 4)?;
        }
        cached.settle(1, false)?;
        if keep_pace(&server, blocks * bytes, 0)? < blocks * bytes {
            return Err("not all blocks have reached the SSD: the disk is slow, or busy".into());
        }
        // What is still in the pool would be read from there.
        cached.empty_the_pool(&server)?;
    }
    cached.report.sides = Default::default();
    cached.work(&server, blocks, pool_bytes)?;
    Ok(cached.report)
}

/// Waits until all but `ahead` of what was stored is on the SSD, or until no more comes: what was evicted before it was
/// written never does.
fn keep_pace(server: &BenchServer, stored: u64, ahead: u64) -> Result<u64, Failure> {
    let (mut last, mut since) = (0, Instant::now());
    loop {
        let written = server.metric("ssd_write_bytes")?;
        if written != last {
            (last, since) = (written, Instant::now());
        }
        if written + ahead >= stored || since.elapsed() > Duration::from_secs(1) {
            return Ok(written);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn key(number: u64, is_new: bool) -> BlockKey {
    // A chain of one block each: no transfer waits for another.
    let name = if is_new { "device written" } else { "device" };
    let keys = Namespace::default().model(name).keys(&[number as u32, (number >> 32) as u32], 2);
    keys[0]
}

impl Cached {
    fn work(&mut self, server: &BenchServer, blocks: u64, pool_bytes: u64) -> Result<(), Failure> {
        let ns = |duration: Duration| duration.as_nanos() as u64;
        let bytes = self.job.bs[0].0;
        let began_ns = monotonic_ns();
        let count_from_ns = began_ns + ns(self.job.ramp_time);
        let end_ns = self.job.runtime.map_or(u64::MAX, |runtime| count_from_ns + ns(runtime));
        let pid = self.session.welcome().map_or(0, |welcome| welcome.server_pid);
        let cpu = || crate::replay::cpu_seconds(pid) + crate::replay::cpu_seconds(std::process::id());
        let mut cpu_from = cpu();
        self.counted_from_ns = began_ns;
        self.counting = self.job.ramp_time.is_zero();
        let written_before = server.metric("ssd_write_bytes")?;
        let mut counted_from_bytes = written_before;
        let mut chance = Chance::new(self.job.randseed);
        let mut number = 0;
        loop {
            let now_ns = monotonic_ns();
            if !self.counting && now_ns >= count_from_ns {
                (self.counting, self.counted_from_ns, cpu_from) = (true, now_ns, cpu());
                counted_from_bytes = server.metric("ssd_write_bytes")?;
            }
            if now_ns >= end_ns || !self.job.time_based && number == blocks || self.report.error != 0 {
                break;
            }
            let at = if self.job.pattern.random { chance.below(blocks) } else { number % blocks };
            self.issue(if self.job.pattern.writes { number } else { at }, true, now_ns)?;
            number += 1;
            self.settle(u64::from(self.job.iodepth), true)?;
            if self.job.pattern.writes && number.is_multiple_of(64) {
                // Nothing is under way while the disk is waited for: no answer is taken late.
                self.settle(1, true)?;
                keep_pace(server, written_before + number * bytes, pool_bytes / 4)?;
            }
        }
        self.settle(1, true)?;
        if self.job.pattern.writes {
            // What has reached the SSD, and not what was stored and evicted before.
            let written = keep_pace(server, written_before + number * bytes, 0)?;
            self.report.sides[1].bytes = written - counted_from_bytes;
        }
        let ended_ns = monotonic_ns();
        self.report.cpu = [cpu() - cpu_from, 0.0];
        self.report.runtime_ms = (ended_ns - self.counted_from_ns).div_ceil(1_000_000);
        Ok(())
    }

    fn empty_the_pool(&self, server: &BenchServer) -> Result<(), Failure> {
        let socket = server.settings.load()?.config.socket;
        let request = Request::Evict { tier: "dram".into(), blocks: u32::MAX };
        loop {
            match ask(&socket, &request, Duration::from_secs(5))? {
                Reply::Admin(done) if done["more"] == true => {}
                Reply::Admin(_) => return Ok(()),
                reply => return Err(format!("an unexpected answer: {reply:?}").into()),
            }
        }
    }

    fn issue(&mut self, number: u64, is_job: bool, now_ns: u64) -> Result<(), Failure> {
        let reads = is_job && self.job.pattern.reads;
        let key = key(number, is_job && !reads);
        let tag = if reads {
            self.session.post_match(&[key])?
        } else {
            self.session.post_reserve(BlockKey::default(), 0, &[key])?
        };
        let step = if reads { Step::Match } else { Step::Reserve };
        self.flights.insert(tag, Flight { step, key, issued_ns: now_ns });
        self.session.publish();
        let level = self.flights.len().ilog2() as usize;
        self.report.depths[level.min(6)] += u64::from(is_job);
        Ok(())
    }

    /// Goes on until fewer than `below` are under way.
    fn settle(&mut self, below: u64, is_job: bool) -> Result<(), Failure> {
        let until = Instant::now() + Duration::from_secs(60);
        let mut came = Vec::new();
        let mut idle = Instant::now();
        while self.flights.len() as u64 >= below {
            self.session.poll(|completion| came.push(completion))?;
            if !came.is_empty() {
                idle = Instant::now();
            } else if idle.elapsed() > Duration::from_micros(20) {
                self.session.sleep_beside(None, Duration::from_millis(100))?;
            }
            for completion in came.drain(..) {
                self.advance(&completion, is_job)?;
            }
            self.session.publish();
            if Instant::now() > until {
                return Err("a request was not answered in 60 s".into());
            }
        }
        Ok(())
    }

    fn advance(&mut self, completion: &Completion, is_job: bool) -> Result<(), Failure> {
        let Some(Flight { step, key, issued_ns }) = self.flights.remove(&completion.tag) else { return Ok(()) };
        let at = |step| Flight { step, key, issued_ns };
        match step {
            Step::Match => {
                let Some(lease) = Matched::from_completion(completion).lease else {
                    self.report.error = libc::ENODATA;
                    return Ok(());
                };
                let tag = self.session.post_load(lease.id, 0, &[key])?;
                self.flights.insert(tag, at(Step::Load(lease.id)));
            }
            Step::Load(lease) => {
                for (_, grant) in completion.grants() {
                    self.session.pool().copy_out(grant.slot, 0, &mut self.buffer);
                }
                if completion.status != Status::Ok {
                    self.report.error = libc::EIO;
                }
                self.session.release_soon(lease)?;
                self.end(0, issued_ns, is_job);
            }
            Step::Reserve => {
                let grants: Vec<Grant> = completion.grants().map(|(_, grant)| grant).collect();
                let [grant] = grants[..] else {
                    self.report.error = libc::ENOSPC;
                    return Ok(());
                };
                self.session.pool().copy_in(grant.slot, 0, &self.buffer);
                let tag = self.session.post_commit(&grants)?;
                self.flights.insert(tag, at(Step::Commit));
            }
            Step::Commit => {
                if completion.payload[0] != 1 {
                    self.report.error = libc::EIO;
                }
                self.end(1, issued_ns, is_job);
            }
        }
        Ok(())
    }

    fn end(&mut self, side: usize, issued_ns: u64, is_job: bool) {
        if is_job && self.counting {
            let bytes = self.job.bs[0].0;
            let now_ns = monotonic_ns();
            let since_ns = now_ns.saturating_sub(self.counted_from_ns);
            self.report.sides[side].record(bytes, now_ns.saturating_sub(issued_ns), since_ns);
        }
    }
}
