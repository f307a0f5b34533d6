//! What a run was, in fio's human form and in fio's JSON schema (fio 3.33), so that scripts written for fio read it.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::job::Job;

/// One direction of one job.
#[derive(Debug, Clone)]
pub struct Side {
    /// Bytes moved.
    pub bytes: u64,
    /// Transfers.
    pub ios: u64,
    /// Those that ended short.
    pub short: u64,
    /// How long each took, in nanoseconds.
    pub clat: Histogram<u64>,
    /// Sum of squares and of values, for the deviation that a histogram rounds.
    pub sum: f64,
    /// See `sum`.
    pub squares: f64,
    /// Least and most.
    pub min_max: (u64, u64),
}

impl Default for Side {
    fn default() -> Self {
        let clat = crate::replay::worker::new_histogram();
        Self { bytes: 0, ios: 0, short: 0, clat, sum: 0.0, squares: 0.0, min_max: (u64::MAX, 0) }
    }
}

impl Side {
    /// One transfer of `bytes` took `ns`.
    pub fn record(&mut self, bytes: u64, ns: u64) {
        self.bytes += bytes;
        self.ios += 1;
        self.clat.saturating_record(ns.max(1));
        self.sum += ns as f64;
        self.squares += ns as f64 * ns as f64;
        self.min_max = (self.min_max.0.min(ns), self.min_max.1.max(ns));
    }

    /// Takes another's in.
    pub fn add(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.ios += other.ios;
        self.short += other.short;
        // Both have the bounds of one function.
        let _ = self.clat.add(&other.clat);
        self.sum += other.sum;
        self.squares += other.squares;
        self.min_max = (self.min_max.0.min(other.min_max.0), self.min_max.1.max(other.min_max.1));
    }

    fn mean(&self) -> f64 {
        if self.ios == 0 { 0.0 } else { self.sum / self.ios as f64 }
    }
    fn deviation(&self) -> f64 {
        if self.ios < 2 {
            return 0.0;
        }
        let mean = self.mean();
        (self.squares / self.ios as f64 - mean * mean).max(0.0).sqrt()
    }
    fn least(&self) -> u64 {
        if self.ios == 0 { 0 } else { self.min_max.0 }
    }
}

/// What one job, or all jobs of one group and name, did.
#[derive(Debug, Clone)]
pub struct Done {
    /// The job.
    pub job: Job,
    /// How many of it.
    pub jobs: u32,
    /// Milliseconds that were counted.
    pub runtime_ms: u64,
    /// Read and written.
    pub sides: [Side; 2],
    /// Errno of the first transfer that failed, or 0.
    pub error: i32,
    /// CPU seconds in user space and in the kernel, of what drives it.
    pub cpu: [f64; 2],
    /// Context switches, major and minor faults.
    pub counts: [i64; 3],
    /// How often so many were in flight: 1, 2, 4, ... 32, 64 and more.
    pub depths: [u64; 7],
    /// Blocks that were compared by verify.
    pub verified: u64,
}

impl Done {
    /// Nothing yet, of this job.
    pub fn new(job: Job) -> Self {
        Self {
            job,
            jobs: 1,
            runtime_ms: 0,
            sides: Default::default(),
            error: 0,
            cpu: [0.0; 2],
            counts: [0; 3],
            depths: [0; 7],
            verified: 0,
        }
    }

    /// Takes another job of the group in.
    pub fn add(&mut self, other: &Self) {
        self.jobs += other.jobs;
        self.runtime_ms = self.runtime_ms.max(other.runtime_ms);
        for (ours, theirs) in self.sides.iter_mut().zip(&other.sides) {
            ours.add(theirs);
        }
        self.error = if self.error == 0 { other.error } else { self.error };
        for at in 0..2 {
            self.cpu[at] += other.cpu[at];
        }
        for at in 0..3 {
            self.counts[at] += other.counts[at];
        }
        for (ours, theirs) in self.depths.iter_mut().zip(other.depths) {
            *ours += theirs;
        }
        self.verified += other.verified;
    }

    fn per_s(&self, count: u64) -> f64 {
        if self.runtime_ms == 0 { 0.0 } else { count as f64 * 1000.0 / self.runtime_ms as f64 }
    }
    /// Percent of the runtime of all its jobs, in user space and in the kernel.
    fn cpu_percent(&self) -> [f64; 2] {
        let all_ms = (self.runtime_ms * u64::from(self.jobs)).max(1) as f64;
        self.cpu.map(|seconds| seconds * 1e5 / all_ms)
    }
}

const DEPTHS: [&str; 7] = ["1", "2", "4", "8", "16", "32", ">=64"];

fn latency(side: &Side, percentiles: &[f64]) -> Value {
    let percentile: serde_json::Map<String, Value> = percentiles
        .iter()
        .map(|p| (format!("{p:.6}"), if side.ios == 0 { 0.into() } else { side.clat.value_at_percentile(*p).into() }))
        .collect();
    json!({
        "min": side.least(), "max": side.min_max.1, "mean": side.mean(), "stddev": side.deviation(), "N": side.ios,
        "percentile": percentile,
    })
}

fn side_json(done: &Done, side: &Side) -> Value {
    let none = json!({"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0});
    let clat = latency(side, &done.job.percentiles);
    let mut lat = clat.clone();
    lat.as_object_mut().map(|lat| lat.remove("percentile"));
    let bw_bytes = done.per_s(side.bytes);
    json!({
        "io_bytes": side.bytes,
        "io_kbytes": side.bytes >> 10,
        "bw_bytes": bw_bytes as u64,
        "bw": (bw_bytes / 1024.0) as u64,
        "iops": done.per_s(side.ios),
        "runtime": if side.ios > 0 { done.runtime_ms } else { 0 },
        "total_ios": side.ios,
        "short_ios": side.short,
        "drop_ios": 0,
        // A transfer is timed from when it is put into the queue: what fio calls slat is part of clat here.
        "slat_ns": none,
        "clat_ns": clat,
        "lat_ns": lat,
    })
}

/// In fio's schema.
pub fn as_json(all: &[Done]) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let job = |done: &Done| {
        let [usr, sys] = done.cpu_percent();
        let total: u64 = done.depths.iter().sum();
        let depth = |at: usize| (DEPTHS[at].to_owned(), json!(100.0 * done.depths[at] as f64 / total.max(1) as f64));
        json!({
            "jobname": done.job.name,
            "groupid": done.job.group,
            "error": done.error,
            "eta": 0,
            "elapsed": done.runtime_ms.div_ceil(1000),
            "job options": done.job.options,
            "read": side_json(done, &done.sides[0]),
            "write": side_json(done, &done.sides[1]),
            "trim": side_json(done, &Side::default()),
            "job_runtime": done.runtime_ms * u64::from(done.jobs),
            "usr_cpu": usr,
            "sys_cpu": sys,
            "ctx": done.counts[0],
            "majf": done.counts[1],
            "minf": done.counts[2],
            "iodepth_level": (0..DEPTHS.len()).map(depth).collect::<serde_json::Map<_, _>>(),
            "latency_depth": done.job.iodepth,
            "verified_blocks": done.verified,
        })
    };
    json!({
        "fio version": format!("kvring-{}", env!("CARGO_PKG_VERSION")),
        "timestamp": now.as_secs(),
        "timestamp_ms": now.as_millis() as u64,
        "jobs": all.iter().map(job).collect::<Vec<_>>(),
        "disk_util": [],
        // What fio does not say: for `kvring report`, and for whoever is to believe it.
        "kvring": crate::report::facts(),
    })
}

/// fio's short numbers: 82.1k, 321.
fn short(value: f64) -> String {
    match value {
        _ if value >= 1e6 => format!("{:.1}M", value / 1e6),
        _ if value >= 1e4 => format!("{:.1}k", value / 1e3),
        _ => format!("{value:.0}"),
    }
}

fn binary(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    scaled(bytes, 1024.0, &units)
}
fn decimal(bytes: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    scaled(bytes, 1000.0, &units)
}
fn scaled(mut value: f64, base: f64, units: &[&str; 5]) -> String {
    let mut at = 0;
    while value >= base && at < 4 {
        (value, at) = (value / base, at + 1);
    }
    if value < 10.0 && at > 0 { format!("{value:.2}{}", units[at]) } else { format!("{value:.0}{}", units[at]) }
}

/// In fio's human form.
pub fn in_words(all: &[Done]) -> String {
    let mut out = String::new();
    for done in all {
        let Done { job, .. } = done;
        let _ = writeln!(
            out,
            "{}: (groupid={}, jobs={}): err={:2}{}",
            job.name,
            job.group,
            done.jobs,
            done.error,
            if done.error == 0 {
                String::new()
            } else {
                format!(" ({})", std::io::Error::from_raw_os_error(done.error))
            }
        );
        for (name, side) in ["read", "write"].iter().zip(&done.sides).filter(|(_, side)| side.ios > 0) {
            let bw = done.per_s(side.bytes);
            let _ = writeln!(
                out,
                "  {name}: IOPS={}, BW={}/s ({}/s)({}/{}msec)",
                short(done.per_s(side.ios)),
                binary(bw),
                decimal(bw),
                binary(side.bytes as f64),
                done.runtime_ms
            );
            let (unit, per) = if side.mean() < 10_000.0 {
                ("nsec", 1.0)
            } else if side.mean() < 10_000_000.0 {
                ("usec", 1e3)
            } else {
                ("msec", 1e6)
            };
            let _ = writeln!(
                out,
                "    clat ({unit}): min={:.0}, max={:.0}, avg={:.2}, stdev={:.2}",
                side.least() as f64 / per,
                side.min_max.1 as f64 / per,
                side.mean() / per,
                side.deviation() / per
            );
            let _ = writeln!(out, "    clat percentiles ({unit}):");
            for line in job.percentiles.chunks(4) {
                let cells: Vec<String> = line
                    .iter()
                    .map(|p| format!("{p:5.2}th=[{:5.0}]", side.clat.value_at_percentile(*p) as f64 / per))
                    .collect();
                let _ = writeln!(out, "     | {}", cells.join(", "));
            }
        }
        let [usr, sys] = done.cpu_percent();
        let [ctx, majf, minf] = done.counts;
        let _ = writeln!(out, "  cpu          : usr={usr:.2}%, sys={sys:.2}%, ctx={ctx}, majf={majf}, minf={minf}");
        let ios: u64 = done.sides.iter().map(|side| side.ios).sum();
        let per_io = 1e6 * (done.cpu[0] + done.cpu[1]) / ios.max(1) as f64;
        let _ = writeln!(out, "  cpu per I/O  : {per_io:.2} usec");
        let total: u64 = done.depths.iter().sum();
        let depth = |at: usize| format!("{}={:.1}%", DEPTHS[at], 100.0 * done.depths[at] as f64 / total.max(1) as f64);
        let _ = writeln!(out, "  IO depths    : {}", (0..7).map(depth).collect::<Vec<_>>().join(", "));
        let [read, written] = &done.sides;
        let _ = writeln!(
            out,
            "     issued rwts: total={},{},0,0 short={},{},0,0",
            read.ios, written.ios, read.short, written.short
        );
        if job.verify {
            let _ = writeln!(out, "  verify       : {} blocks compared", done.verified);
        }
        out.push('\n');
    }
    let last = all.iter().map(|done| done.job.group).max().unwrap_or(0);
    for group in 0..=last {
        let its: Vec<&Done> = all.iter().filter(|done| done.job.group == group).collect();
        let _ = writeln!(out, "Run status group {group} (all jobs):");
        for (at, name) in ["READ", "WRITE"].iter().enumerate() {
            let bytes: u64 = its.iter().map(|done| done.sides[at].bytes).sum();
            let ms = its.iter().filter(|done| done.sides[at].ios > 0).map(|done| done.runtime_ms).max();
            let Some(ms) = ms else { continue };
            let bw = bytes as f64 * 1000.0 / ms.max(1) as f64;
            let _ = writeln!(
                out,
                "{name:>7}: bw={}/s ({}/s), io={} ({}), run={ms}msec",
                binary(bw),
                decimal(bw),
                binary(bytes as f64),
                decimal(bytes as f64)
            );
        }
    }
    out
}
