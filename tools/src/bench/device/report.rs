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
    /// Bytes and transfers of each [`SAMPLE_NS`].
    pub samples: Vec<(u64, u64)>,
}

/// How long a sample of bandwidth is: fio's `bwavgtime` and `iopsavgtime`.
const SAMPLE_NS: u64 = 500_000_000;
/// Samples of a week. What comes later is counted, and in no sample.
const SAMPLES_MAX: usize = 7 * 24 * 3600 * 2;

impl Default for Side {
    fn default() -> Self {
        let clat = crate::replay::worker::new_histogram();
        Self { bytes: 0, ios: 0, short: 0, clat, sum: 0.0, squares: 0.0, min_max: (u64::MAX, 0), samples: Vec::new() }
    }
}

impl Side {
    /// One transfer of `bytes` took `ns`, and ended `since_ns` after counting began.
    pub fn record(&mut self, bytes: u64, ns: u64, since_ns: u64) {
        let window = (since_ns / SAMPLE_NS) as usize;
        if window >= self.samples.len() && window < SAMPLES_MAX {
            self.samples.resize(window + 1, (0, 0));
        }
        if let Some(sample) = self.samples.get_mut(window) {
            *sample = (sample.0 + bytes, sample.1 + 1);
        }
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
        // Jobs of a group begin at once: their samples are of the same half seconds.
        self.samples.resize(self.samples.len().max(other.samples.len()), (0, 0));
        for (ours, theirs) in self.samples.iter_mut().zip(&other.samples) {
            *ours = (ours.0 + theirs.0, ours.1 + theirs.1);
        }
    }

    /// KiB a second, and transfers a second, of each whole half second of so many milliseconds; of shorter runs none, as
    /// with fio.
    fn rates(&self, runtime_ms: u64) -> [Vec<f64>; 2] {
        let whole = (runtime_ms * 1_000_000 / SAMPLE_NS) as usize;
        let count = if self.ios == 0 { 0 } else { whole.min(SAMPLES_MAX) };
        let per_s = 1e9 / SAMPLE_NS as f64;
        let rate =
            |of: fn(&(u64, u64)) -> f64| (0..count).map(|at| self.samples.get(at).map_or(0.0, of) * per_s).collect();
        [rate(|sample| sample.0 as f64 / 1024.0), rate(|sample| sample.1 as f64)]
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
    /// How often so many were handed over at once, and came back at once: [`BATCHES`].
    pub batches: [[u64; 7]; 2],
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
            batches: [[0; 7]; 2],
            verified: 0,
        }
    }

    /// So many were handed over at once.
    pub fn submitted(&mut self, count: usize) {
        self.batches[0][batch(count)] += 1;
    }

    /// So many came back at once.
    pub fn completed(&mut self, count: usize) {
        self.batches[1][batch(count)] += 1;
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
        for (ours, theirs) in self.batches.iter_mut().flatten().zip(other.batches.iter().flatten()) {
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
/// The most that counts as each: 1 to 4 are "4".
const BATCHES: [&str; 7] = ["0", "4", "8", "16", "32", "64", ">=64"];

fn batch(count: usize) -> usize {
    match count {
        0 => 0,
        1..=4 => 1,
        5..=64 => count.next_power_of_two().ilog2() as usize - 1,
        _ => 6,
    }
}

/// Parts of all in percent, by fio's names.
fn percents(names: &[&str; 7], counts: &[u64; 7]) -> Value {
    let all: u64 = counts.iter().sum();
    let percent = |count: u64| json!(100.0 * count as f64 / all.max(1) as f64);
    names
        .iter()
        .zip(counts)
        .map(|(name, count)| ((*name).to_owned(), percent(*count)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// Where fio's classes of latency end; beyond the last of the milliseconds is ">=2000".
const LATENCIES: [(&str, u64, &[u64]); 3] = [
    ("latency_ns", 1, &[2, 4, 10, 20, 50, 100, 250, 500, 750, 1000]),
    ("latency_us", 1000, &[2, 4, 10, 20, 50, 100, 250, 500, 750, 1000]),
    ("latency_ms", 1_000_000, &[2, 4, 10, 20, 50, 100, 250, 500, 750, 1000, 2000]),
];

/// How many percent of all transfers took less than each, and not less than the one before.
fn classes(sides: &[Side; 2]) -> impl Iterator<Item = (&'static str, Value)> {
    let all: u64 = sides.iter().map(|side| side.ios).sum();
    let percent = move |count: u64| json!(100.0 * count as f64 / all.max(1) as f64);
    // Differences of how many took less: a bucket of the histogram (a thousandth wide) that has an end within it counts once.
    let mut before = 0;
    let mut until = |to_ns: u64| {
        let counts = sides.iter().filter(|side| side.ios > 0).map(|side| side.clat.count_between(0, to_ns - 1));
        let less: u64 = counts.sum();
        percent(less - std::mem::replace(&mut before, less))
    };
    let mut made = Vec::new();
    for (name, unit_ns, ends) in LATENCIES {
        let mut class: serde_json::Map<String, Value> =
            ends.iter().map(|end| (end.to_string(), until(end * unit_ns))).collect();
        if name == "latency_ms" {
            class.insert(">=2000".into(), until(u64::MAX));
        }
        made.push((name, class.into()));
    }
    made.into_iter()
}

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

/// Least, most, mean, deviation and how many.
fn summary(samples: &[f64]) -> [f64; 5] {
    if samples.is_empty() {
        return [0.0; 5];
    }
    let count = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / count;
    let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
    let deviation = if samples.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 };
    let (least, most) = samples.iter().fold((f64::MAX, 0.0f64), |(a, b), sample| (a.min(*sample), b.max(*sample)));
    [least, most, mean, deviation, count]
}

/// `group_bytes_s`: what all jobs of its group moved in this direction, a second.
fn side_json(done: &Done, side: &Side, group_bytes_s: f64) -> Value {
    let none = json!({"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0});
    let clat = latency(side, &done.job.percentiles);
    let mut lat = clat.clone();
    lat.as_object_mut().map(|lat| lat.remove("percentile"));
    let bw_bytes = done.per_s(side.bytes);
    let [bw, iops] = side.rates(done.runtime_ms);
    let ([bw_min, bw_max, bw_mean, bw_dev, samples], [iops_min, iops_max, iops_mean, iops_dev, _]) =
        (summary(&bw), summary(&iops));
    let of_group = if group_bytes_s > 0.0 { (100.0 * bw_mean * 1024.0 / group_bytes_s).min(100.0) } else { 0.0 };
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
        "bw_min": bw_min as u64,
        "bw_max": bw_max as u64,
        "bw_agg": of_group,
        "bw_mean": bw_mean,
        "bw_dev": bw_dev,
        "bw_samples": samples as u64,
        "iops_min": iops_min as u64,
        "iops_max": iops_max as u64,
        "iops_mean": iops_mean,
        "iops_stddev": iops_dev,
        "iops_samples": samples as u64,
    })
}

/// In fio's schema.
pub fn as_json(all: &[Done]) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let job = |done: &Done| {
        let [usr, sys] = done.cpu_percent();
        let of_group = |at: usize| {
            let its = all.iter().filter(|other| other.job.group == done.job.group);
            its.map(|other| other.per_s(other.sides[at].bytes)).sum()
        };
        let mut made = json!({
            "jobname": done.job.name,
            "groupid": done.job.group,
            "error": done.error,
            "eta": 0,
            "elapsed": done.runtime_ms.div_ceil(1000),
            "job options": done.job.options,
            "read": side_json(done, &done.sides[0], of_group(0)),
            "write": side_json(done, &done.sides[1], of_group(1)),
            "trim": side_json(done, &Side::default(), 0.0),
            // No job flushes.
            "sync": {"total_ios": 0, "lat_ns": {"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0}},
            "job_runtime": done.runtime_ms * u64::from(done.jobs),
            "usr_cpu": usr,
            "sys_cpu": sys,
            "ctx": done.counts[0],
            "majf": done.counts[1],
            "minf": done.counts[2],
            "iodepth_level": percents(&DEPTHS, &done.depths),
            "iodepth_submit": percents(&BATCHES, &done.batches[0]),
            "iodepth_complete": percents(&BATCHES, &done.batches[1]),
            "latency_depth": done.job.iodepth,
            // No job looks for the depth that meets a latency.
            "latency_target": 0,
            "latency_percentile": 100.0,
            "latency_window": 0,
            "verified_blocks": done.verified,
        });
        for (name, class) in classes(&done.sides) {
            made[name] = class;
        }
        made
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

#[cfg(test)]
mod test {
    use super::*;

    /// A job that has done what these say: bytes, nanoseconds, and when, of each transfer.
    fn done(runtime_ms: u64, transfers: &[(u64, u64, u64)]) -> Done {
        let keys = [("ioengine", "sim"), ("size", "1m")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        let mut done = Done::new(super::super::job::jobs(&[], &keys).unwrap().remove(0));
        done.runtime_ms = runtime_ms;
        transfers.iter().for_each(|(bytes, ns, since_ns)| done.sides[0].record(*bytes, *ns, *since_ns));
        done
    }

    #[test]
    fn samples_are_of_half_seconds_and_the_last_is_whole() {
        const HALF: u64 = SAMPLE_NS;
        let transfers = [(1 << 20, 5, 0), (1 << 20, 5, HALF - 1), (1 << 20, 5, 2 * HALF), (1 << 20, 5, 3 * HALF + 7)];
        let mut one = done(1700, &transfers);
        let read = |done: &Done| as_json(std::slice::from_ref(done))["jobs"][0]["read"].clone();
        let seen = read(&one);
        // 2, 0 and 1 MiB in half a second each; the fourth was not whole.
        assert_eq!((&seen["bw_min"], &seen["bw_max"], &seen["bw_samples"]), (&0.into(), &4096.into(), &3.into()));
        assert_eq!((&seen["bw_mean"], &seen["bw_dev"]), (&2048.0.into(), &2048.0.into()));
        assert_eq!((&seen["iops_min"], &seen["iops_max"], &seen["iops_mean"]), (&0.into(), &4.into(), &2.0.into()));
        one.add(&done(1700, &transfers));
        let both = read(&one);
        assert_eq!((&both["bw_max"], &both["bw_samples"]), (&8192.into(), &3.into()), "jobs run at once");
        assert_eq!(read(&done(400, &transfers[..1]))["bw_samples"], 0);
    }

    #[test]
    fn every_transfer_is_in_one_class_of_latency() {
        let transfers = [1, 999, 1000, 3_999, 260_000, 1_100_000, 7_000_000, 3_000_000_000].map(|ns| (4096, ns, 0));
        let job = &as_json(&[done(1000, &transfers)])["jobs"][0];
        let at = |class: &str, end: &str| job[class][end].as_f64().unwrap();
        assert_eq!([at("latency_ns", "2"), at("latency_ns", "1000"), at("latency_us", "2")], [12.5; 3]);
        assert_eq!([at("latency_us", "4"), at("latency_us", "500"), at("latency_ms", "2")], [12.5; 3]);
        assert_eq!([at("latency_ms", "10"), at("latency_ms", ">=2000")], [12.5; 2]);
        let all = ["latency_ns", "latency_us", "latency_ms"].map(|class| job[class].as_object().unwrap().values());
        let sum: f64 = all.into_iter().flatten().map(|part| part.as_f64().unwrap()).sum();
        assert!((sum - 100.0).abs() < 1e-9, "{sum}");
    }

    #[test]
    fn batches_have_the_names_of_their_ends() {
        let names = [0, 1, 4, 5, 8, 9, 32, 33, 64, 65].map(|count| BATCHES[batch(count)]);
        assert_eq!(names, ["0", "4", "4", "8", "8", "16", "32", "64", "64", ">=64"]);
    }
}
