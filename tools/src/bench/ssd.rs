//! The SSD tier through the whole cache path: match, load, checksum; reserve, commit, write-back. Beside
//! fio on the same file system with the same block size and depth, alternating; medians.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use kvring_ipc::client::{Matched, Session};
use kvring_ipc::key::BlockKey;
use serde_json::{Value, json};

use super::{BenchServer, Measured, Run, Series, chain, median, rounded, store};

/// Arguments of `kvring bench ssd`.
#[derive(Args)]
pub struct SsdArgs {
    /// Where to measure: a directory on the file system in question.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Bytes of a block, in KiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(4..=65536))]
    block_kib: u64,
    /// GiB on the SSD.
    #[arg(long, default_value_t = 2.0)]
    size_gb: f64,
    /// Rounds of both.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Kernel interface: auto, uring or aio.
    #[arg(long, default_value = "auto")]
    engine: String,
    /// Whether blocks have checksums: on or off.
    #[arg(long, default_value = "on")]
    checksums: String,
}

impl Default for SsdArgs {
    fn default() -> Self {
        Self {
            dir: ".".into(),
            block_kib: 1024,
            size_gb: 2.0,
            rounds: 3,
            engine: "auto".into(),
            checksums: "on".into(),
        }
    }
}

const READ_DEPTH: u32 = 32;
const WRITE_DEPTH: u32 = 8;
/// Blocks of one chain: one load.
const CHAIN: u32 = 32;

/// A server whose SSD holds chains that its pool does not.
struct Side {
    server: BenchServer,
    session: Session,
    chains: Vec<Vec<BlockKey>>,
}

fn ssd_bytes(args: &SsdArgs) -> u64 {
    (args.size_gb * f64::from(1 << 30)) as u64
}

fn prepare(args: &SsdArgs, checksums: &str, ssd_dir: Option<&Path>) -> Result<Side, Box<dyn std::error::Error>> {
    let block_bytes = args.block_kib << 10;
    let ssd_bytes = ssd_bytes(args);
    let chains_count = ssd_bytes / block_bytes / u64::from(CHAIN);
    // Small enough that nothing read is still in the pool when it is read again.
    let pool_bytes = (ssd_bytes / 8).max(block_bytes * 256);
    if chains_count < 4 || pool_bytes * 2 > ssd_bytes {
        return Err(format!("--size-gb {} is too small for blocks of {} KiB", args.size_gb, args.block_kib).into());
    }
    let gb = |bytes: u64| (bytes as f64 / f64::from(1 << 30)).to_string();
    let mut settings = vec![
        ("cpu_cache_gb", gb(pool_bytes)),
        ("ssd_cache_gb", gb(ssd_bytes + ssd_bytes / 8)),
        ("ssd_read_depth", READ_DEPTH.to_string()),
        ("ssd_write_depth", WRITE_DEPTH.to_string()),
        ("io_engine", args.engine.clone()),
        ("checksum", checksums.into()),
    ];
    settings.extend(ssd_dir.map(|dir| ("ssd_cache_dir", dir.display().to_string())));
    let server = BenchServer::start(&args.dir, args.block_kib, &settings)?;
    // What another server has left there is not measured.
    let socket = server.settings.load()?.config.socket;
    kvring_ipc::instance::reset(&socket)?;
    let mut session = server.session(block_bytes)?;
    let chains: Vec<Vec<BlockKey>> = (0..chains_count).map(|n| chain(&format!("ssd {n}"), CHAIN)).collect();
    // Every block on the SSD once, no faster than it writes.
    for (done, keys) in (1u64..).zip(&chains) {
        store(&mut session, keys)?;
        let written = done * u64::from(CHAIN) * block_bytes;
        while server.metric("ssd_write_bytes")? + pool_bytes / 4 < written {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(Side { server, session, chains })
}

/// Measures.
pub fn measure(run: &mut Run, args: &SsdArgs) -> Measured {
    let ssd_bytes = ssd_bytes(args);
    let Side { server, mut session, chains } = prepare(args, &args.checksums, None)?;
    let huge = session.welcome().is_some_and(|welcome| welcome.page_bytes > 4096);
    let fio = Fio::new(&args.dir, ssd_bytes, args.block_kib, huge)?;
    if fio.is_none() {
        run.doubts.push("ssd: fio is not installed, so there is no ceiling beside the numbers".into());
    }
    let raw = Raw::new(&args.dir, ssd_bytes, args.block_kib)?;
    if !huge {
        run.doubts.push("ssd: the pool is on 4 KiB pages, where the kernel splits transfers; those alone are on larger ones: reserve hugepages for 512 MiB".into());
    }
    // What lies on no device, or on one without a name, has no queue to look at.
    let polled =
        crate::doctor::queue_of(&args.dir).and_then(|queue| std::fs::read_to_string(queue.join("io_poll")).ok());
    if polled.is_none_or(|polled| polled.trim() != "1") {
        run.doubts.push("ssd: the device has no polled queues (IOPOLL): completions come by interrupt".into());
    }
    let cpu_of = |pid: Option<u32>| pid.map_or(0.0, crate::replay::cpu_seconds);
    let pid = session.welcome().map(|welcome| welcome.server_pid);
    let (mut reads, mut fio_reads, mut writes, mut fio_writes, mut cpu) = (vec![], vec![], vec![], vec![], vec![]);
    let (mut raw_reads, mut raw_writes) = (vec![], vec![]);
    let (mut read_series, mut write_series) = (Series::default(), Series::default());
    for round in 0..args.rounds.max(1) {
        // A B, then B A: a disk that tires, or wakes up, favours neither side.
        for ours in [round % 2 == 1, round % 2 == 0] {
            if ours {
                let (before, from) = (cpu_of(pid), Instant::now());
                let read = read_chains(run.time, &server, &mut session, &chains, round, &mut read_series)?;
                cpu.push((cpu_of(pid) - before) / (read * from.elapsed().as_secs_f64()).max(1e-9));
                reads.push(read);
                continue;
            }
            raw_reads.push(raw.run("read", READ_DEPTH, run.time)?);
            if let Some(fio) = &fio {
                fio_reads.push(fio.run("read", READ_DEPTH, run.time)?);
            }
        }
    }
    for round in 0..args.rounds.max(1) {
        for ours in [round % 2 == 1, round % 2 == 0] {
            if ours {
                writes.push(write_chains(run.time, &server, &mut session, round, &mut write_series)?);
                continue;
            }
            raw_writes.push(raw.run("write", WRITE_DEPTH, run.time)?);
            if let Some(fio) = &fio {
                fio_writes.push(fio.run("write", WRITE_DEPTH, run.time)?);
            }
        }
    }
    if server.metric("ssd_checksum_errors_count")? + server.metric("ssd_read_errors_count")? > 0 {
        run.doubts.push("ssd: there were read errors".into());
    }
    for (what, rounds) in [("reads", &reads), ("writes", &writes)] {
        // Of an only round nobody knows.
        let later = median(rounds.iter().skip(1).copied().collect());
        let first = rounds.first().copied().unwrap_or(later);
        if (first / later - 1.0).abs() > 0.25 {
            run.doubts.push(format!(
                "ssd: {what}: the first round made {first:.2} GB/s, the others {later:.2}: cold, or the disk changes"
            ));
        }
    }
    let side = |ours: Vec<f64>, raw: Vec<f64>, fio: Vec<f64>| {
        // Round by round: the disk of one round is not the disk of the next.
        let ratios: Vec<f64> = ours.iter().zip(&fio).map(|(ours, fio)| ours / fio).collect();
        let or_null = |value: f64| if value.is_nan() { Value::Null } else { rounded(value, 3).into() };
        json!({
            "kvring_gb_s": or_null(median(ours.clone())),
            "raw_gb_s": or_null(median(raw.clone())),
            "fio_gb_s": or_null(median(fio.clone())),
            "ratio": or_null(median(ratios)),
            "rounds": format!("kvring {ours:.2?}, transfers alone {raw:.2?}, fio {fio:.2?}"),
            "samples": ours,
        })
    };
    Ok(json!({
        "block_kib": args.block_kib,
        "checksum": args.checksums,
        "read": side(reads, raw_reads, fio_reads),
        "write": side(writes, raw_writes, fio_writes),
        "server_cpu_s_per_gb_read": rounded(median(cpu), 3),
        "gb_s_over_time": {"load from SSD": read_series.points, "write-back to SSD": write_series.points},
    }))
}

fn wait_for_writes(server: &BenchServer) -> Result<(), Box<dyn std::error::Error>> {
    let mut last = u64::MAX;
    loop {
        let written = server.metric("ssd_write_bytes")?;
        if written == last {
            return Ok(());
        }
        last = written;
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Loads chain after chain, two at a time so that the device never waits; GB a second that the SSD read.
fn read_chains(
    time: Duration,
    server: &BenchServer,
    session: &mut Session,
    chains: &[Vec<BlockKey>],
    round: usize,
    series: &mut Series,
) -> Result<f64, Box<dyn std::error::Error>> {
    let before = server.metric("ssd_read_bytes")?;
    let started = Instant::now();
    let mut flying = std::collections::VecDeque::new();
    let mut next = round * 7;
    series.begin();
    while started.elapsed() < time {
        let far = Instant::now() + Duration::from_secs(30);
        while flying.len() < 3 {
            let keys = &chains[next % chains.len()];
            next += 1;
            let tag = session.post_match(keys)?;
            let mut matched = Matched::MISS;
            session.wait(tag, far, |_, completion| matched = Matched::from_completion(&completion))?;
            let Some(lease) = matched.lease else {
                if next > round * 7 + 4 * chains.len() && flying.is_empty() {
                    return Err("nothing is on the SSD".into());
                }
                continue;
            };
            let tag = session.post_load(lease.id, 0, &keys[..matched.blocks as usize])?;
            session.publish();
            flying.push_back((tag, lease));
        }
        if let Some((tag, lease)) = flying.pop_front() {
            session.wait(tag, far, |_, _| {})?;
            session.release_soon(lease.id)?;
        }
        // Asking costs the server's CPU time: a few times a round.
        if series.is_due(started.elapsed(), time) {
            series.add(started.elapsed(), server.metric("ssd_read_bytes")? - before);
        }
    }
    let elapsed = started.elapsed().as_secs_f64();
    let read = server.metric("ssd_read_bytes")? - before;
    for (tag, lease) in flying {
        session.wait(tag, Instant::now() + Duration::from_secs(30), |_, _| {})?;
        session.release_soon(lease.id)?;
    }
    Ok(read as f64 / 1e9 / elapsed)
}

/// Stores new chains as fast as they are taken; GB a second that reached the SSD.
fn write_chains(
    time: Duration,
    server: &BenchServer,
    session: &mut Session,
    round: usize,
    series: &mut Series,
) -> Result<f64, Box<dyn std::error::Error>> {
    let before = server.metric("ssd_write_bytes")?;
    let started = Instant::now();
    let mut number = 0;
    let mut offered: u64 = 0;
    let slot_bytes = session.pool().slot_bytes() as u64;
    series.begin();
    while started.elapsed() < time {
        offered += u64::from(store(session, &chain(&format!("write {round} {number}"), CHAIN))?) * slot_bytes;
        number += 1;
        // Ahead of the device by a few chains, not by the whole pool: what is evicted unwritten is work in vain.
        while started.elapsed() < time {
            let written = server.metric("ssd_write_bytes")? - before;
            if series.is_due(started.elapsed(), time) {
                series.add(started.elapsed(), written);
            }
            if written + 5 * u64::from(CHAIN) * slot_bytes >= offered {
                break;
            }
            // Asking costs the server's CPU time: seldom.
            std::thread::sleep(Duration::from_millis(8));
        }
    }
    let elapsed = started.elapsed().as_secs_f64();
    let written = server.metric("ssd_write_bytes")? - before;
    wait_for_writes(server)?;
    Ok(written as f64 / 1e9 / elapsed)
}

/// The engine's transfers over a file of their own beside the cache's, and no cache over them.
struct Raw {
    file: PathBuf,
    bytes: u64,
    block_kib: u64,
}

impl Raw {
    fn new(dir: &Path, bytes: u64, block_kib: u64) -> Result<Self, Box<dyn std::error::Error>> {
        let raw = Self { file: dir.join(format!("kvring-bench-raw-{}", std::process::id())), bytes, block_kib };
        // Written once, so that reads find extents and writes overwrite.
        super::device::rate(&raw.keys("write", WRITE_DEPTH))?;
        Ok(raw)
    }

    fn keys(&self, rw: &str, depth: u32) -> Vec<(&'static str, String)> {
        let file = self.file.display().to_string().replace(':', "\\:");
        let bs = format!("{}k", self.block_kib);
        let (depth, size) = (depth.to_string(), self.bytes.to_string());
        vec![("filename", file), ("rw", rw.into()), ("bs", bs), ("iodepth", depth), ("size", size)]
    }

    fn run(&self, rw: &str, depth: u32, time: Duration) -> Result<f64, Box<dyn std::error::Error>> {
        let mut keys = self.keys(rw, depth);
        keys.extend([("time_based", "1".into()), ("runtime", format!("{}ms", time.as_millis()))]);
        super::device::rate(&keys)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

/// fio over a file of its own beside the cache's.
struct Fio {
    file: PathBuf,
    bytes: u64,
    block_kib: u64,
    /// Buffers on hugepages, if the pool is.
    huge: bool,
}

impl Fio {
    /// `None` if fio is not installed.
    fn new(dir: &Path, bytes: u64, block_kib: u64, huge: bool) -> Result<Option<Self>, Box<dyn std::error::Error>> {
        if Command::new("fio").arg("--version").output().is_err() {
            return Ok(None);
        }
        let fio = Self { file: dir.join(format!("kvring-bench-fio-{}", std::process::id())), bytes, block_kib, huge };
        // Written once, so that reads find extents and writes overwrite.
        fio.command("write", WRITE_DEPTH, &[])?;
        Ok(Some(fio))
    }

    fn run(&self, rw: &str, depth: u32, time: Duration) -> Result<f64, Box<dyn std::error::Error>> {
        let runtime = format!("--runtime={}ms", time.as_millis());
        let report = self.command(rw, depth, &["--time_based", &runtime])?;
        let rate = report["jobs"][0][rw]["bw_bytes"].as_f64().ok_or("fio says no bandwidth")?;
        Ok(rate / 1e9)
    }

    fn command(&self, rw: &str, depth: u32, more: &[&str]) -> Result<Value, Box<dyn std::error::Error>> {
        let mut command = Command::new("fio");
        command.args([
            "--name=ceiling",
            "--direct=1",
            "--ioengine=io_uring",
            "--output-format=json",
            "--allow_mounted_write=0",
        ]);
        command.arg(format!("--filename={}", self.file.display())).arg(format!("--rw={rw}"));
        command
            .arg(format!("--bs={}k", self.block_kib))
            .arg(format!("--iodepth={depth}"))
            .arg(format!("--size={}", self.bytes));
        if self.huge {
            command.args(["--iomem=shmhuge", "--hugepage-size=2m"]);
        }
        command.args(more);
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        // Notes may come before the JSON.
        let json = text
            .find('{')
            .map(|at| &text[at..])
            .ok_or_else(|| format!("fio failed: {}", String::from_utf8_lossy(&output.stderr)))?;
        Ok(serde_json::from_str(json)?)
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}
