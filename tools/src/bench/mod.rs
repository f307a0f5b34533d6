//! `kvring bench`: each number beside a floor or a ceiling from the same run, alternating, medians and
//! ratios; and what may be wrong with it.

mod checksum;
pub mod copy;
pub mod crash;
mod device;
mod dram;
mod evict;
mod instruments;
mod recover;
pub mod ring;
mod ssd;

use std::time::Duration;

use clap::{Args, Subcommand};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::Outcome;
use crate::settings::Settings;

/// Arguments of `kvring bench`.
#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: Option<What>,
    /// Print one JSON object.
    #[arg(long, global = true)]
    json: bool,
    /// Seconds of each single measurement [default: 2]
    #[arg(long, global = true)]
    seconds: Option<f64>,
    /// Save the report with all that is needed to believe it, for `kvring report`; of `device`, fio's report (with --output-format=json it reads that as well).
    #[arg(long, global = true, value_name = "FILE")]
    output: Option<std::path::PathBuf>,
}

#[derive(Subcommand)]
enum What {
    /// Rings: post to pickup, and a match of 256 blocks with lease, beside the cache-line round trip.
    Ring,
    /// Loads of 1 MiB blocks from the pool, copied out, beside a plain memcpy.
    Dram,
    /// Copies between the pool and an instance's memory, by a GPU or the processor, beside plain copies.
    Copy(copy::CopyArgs),
    /// Reads and writes of 1 MiB blocks through the whole cache path, beside fio.
    Ssd(ssd::SsdArgs),
    /// The whole cache under a named workload, open loop, with the hit ratios that no cache beats.
    Cache(crate::replay::CacheArgs),
    /// A device by itself, in fio's language: job files or flags, fio's report or its JSON.
    Device(device::DeviceArgs),
    /// Eviction, from ten thousand to a million blocks.
    Evict,
    /// What checksums cost the SSD: one shard that makes them and does not, in turns.
    Checksum(checksum::ChecksumArgs),
    /// What the stats segment and the flight recorder cost, a scrape each second and `top` beside: one shard with and without, in turns.
    Instruments,
    /// How long the death of the engine process, its upgrade, and the death of an instance last.
    Crash(crash::CrashArgs),
    /// A start over a full SSD tier, beside dd and fio reading the same bytes.
    Recover(recover::RecoverArgs),
}

/// What every benchmark is told.
pub struct Run {
    /// How long a single measurement takes.
    pub time: Duration,
    /// What may be wrong with the numbers.
    pub doubts: Vec<String>,
}

type Failure = Box<dyn std::error::Error>;
type Measured = Result<Value, Failure>;

/// Runs one benchmark, or all.
pub fn run(args: BenchArgs) -> Outcome {
    let seconds = args.seconds.unwrap_or(2.0);
    if !(0.05..=600.0).contains(&seconds) {
        return Err(format!("--seconds {seconds}: expected 0.05 to 600").into());
    }
    // What has words of its own for it.
    let instead = match &args.what {
        Some(What::Device(_)) => Some("--runtime"),
        Some(What::Cache(_)) => Some("--requests"),
        _ => None,
    };
    if let (Some(instead), Some(_)) = (instead, args.seconds) {
        return Err(format!("--seconds is not for this: say {instead}").into());
    }
    let args = match args {
        BenchArgs { what: Some(What::Device(device)), json, output, .. } => {
            return device::bench(&device, json, output.as_deref());
        }
        BenchArgs { what: Some(What::Cache(cache)), json, output, .. } => {
            return crate::replay::bench_cache(cache, json, output);
        }
        args => args,
    };
    let mut run = Run { time: Duration::from_secs_f64(seconds), doubts: general_doubts(seconds) };
    let stolen = stolen_ticks();
    let what = args.what.as_ref().map(|_| ());
    if let Some(path) = &args.output {
        crate::report::check(path)?;
    }
    // Each begins where it may run anywhere: the rings' part pins itself.
    let anywhere = rustix::thread::sched_getaffinity(None).ok();
    let free = || anywhere.as_ref().is_some_and(|set| rustix::thread::sched_setaffinity(None, set).is_ok());
    let mut report = match args.what {
        Some(What::Ring) => ring::measure(&mut run)?,
        Some(What::Dram) => dram::measure(&mut run)?,
        Some(What::Copy(copy)) => copy::measure(&mut run, &copy)?,
        Some(What::Device(_) | What::Cache(_)) => unreachable!("they have reports of their own"),
        Some(What::Ssd(ssd)) => ssd::measure(&mut run, &ssd)?,
        Some(What::Evict) => evict::measure(&mut run)?,
        Some(What::Checksum(checksum)) => checksum::measure(&mut run, &checksum)?,
        Some(What::Instruments) => instruments::measure(&mut run)?,
        Some(What::Crash(crash)) => crash::measure(&mut run, &crash)?,
        Some(What::Recover(recover)) => recover::measure(&mut run, &recover)?,
        None => {
            let ring = ring::measure(&mut run)?;
            if !free() {
                run.doubts.push("all but the rings was measured on one CPU: it cannot be given back".into());
            }
            json!({
                "ring": ring,
                "dram": dram::measure(&mut run)?,
                "ssd": ssd::measure(&mut run, &ssd::SsdArgs::default())?,
                "evict": evict::measure(&mut run)?,
            })
        }
    };
    let stolen = stolen_ticks().saturating_sub(stolen);
    if stolen > 10 {
        run.doubts.push(format!("the hypervisor took {} ms of CPU time away meanwhile: noisy neighbours", stolen * 10));
    }
    raise(&mut report);
    let ceilings = ceilings(&report);
    report["doubts"] = run.doubts.into();
    report["ceilings"] = ceilings.iter().map(Ceiling::json).collect();
    if let Some(path) = &args.output {
        let settings = Settings::default().load()?.config.as_text();
        crate::report::save(path, "bench", &report, Some(json!(settings)))?;
    }
    if let (None, false) = (&what, args.json) {
        // A handful of numbers; the rest is in --json.
        println!("{:<34} {:>12} {:>14}   of the limit, which is", "", "kvring", "limit");
        for ceiling in &ceilings {
            println!("{ceiling}");
        }
        for doubt in report["doubts"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            println!("doubt: {doubt}");
        }
        return Ok(());
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print_tree(&report, 0);
    }
    Ok(())
}

/// One number beside what bounds it, both from this run.
struct Ceiling {
    name: String,
    value: f64,
    limit: f64,
    unit: &'static str,
    limit_is: &'static str,
    /// Time, of which the limit is a floor; else a rate, of which it is a ceiling.
    is_time: bool,
    /// Of each round.
    samples: Vec<f64>,
}

impl Ceiling {
    fn share(&self) -> f64 {
        if self.is_time { self.limit / self.value } else { self.value / self.limit }
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name, "value": self.value, "limit": self.limit, "unit": self.unit, "limit_is": self.limit_is,
            "share": rounded(self.share(), 4), "is_time": self.is_time, "samples": self.samples,
        })
    }
}

impl std::fmt::Display for Ceiling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, value, limit, unit, limit_is, .. } = self;
        let share = 100.0 * self.share();
        write!(f, "{name:<34} {value:>7} {unit:<4} {limit:>9} {unit:<4}   {share:.0} %, {limit_is}")
    }
}

/// What of a report has a limit.
fn ceilings(report: &Value) -> Vec<Ceiling> {
    let mut found = Vec::new();
    let mut add = |name: &str, value: &Value, limit: &Value, unit, limit_is, is_time, samples: &Value| {
        if let (Some(value), Some(limit)) = (value.as_f64(), limit.as_f64()) {
            let samples = samples.as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
            found.push(Ceiling { name: name.to_owned(), value, limit, unit, limit_is, is_time, samples });
        }
    };
    // Alone, or as a part of the canonical run.
    let part = |name: &str| if report.get(name).is_some_and(Value::is_object) { &report[name] } else { report };
    let ring = part("ring");
    let (floor, none) = (&ring["floor_ns"]["p50"], &Value::Null);
    let line = "a cache line's round trip";
    add("ping round trip, p50", &ring["ping_round_trip_ns"]["p50"], floor, "ns", line, true, none);
    add("match of 256 blocks, p50", &ring["match256_ns"]["p50"], floor, "ns", line, true, none);
    let dram = part("dram");
    let memcpy = "memcpy between memories of the same pages";
    add(
        "load from DRAM and copy",
        &dram["load_and_copy_gb_s"],
        &dram["memcpy_gb_s"],
        "GB/s",
        memcpy,
        false,
        &dram["samples"],
    );
    let ssd = part("ssd");
    for (name, side) in [("load from SSD", "read"), ("write-back to SSD", "write")] {
        let side = &ssd[side];
        for (limit, limit_is) in
            [("raw_gb_s", "transfers alone on the same disk"), ("fio_gb_s", "fio on the same disk")]
        {
            add(name, &side["kvring_gb_s"], &side[limit], "GB/s", limit_is, false, &side["samples"]);
        }
    }
    found
}

/// What is for pages, and for programs.
const DRAWN: [&str; 4] = ["samples", "ceilings", "cdf_us", "gb_s_over_time"];

fn print_tree(value: &Value, depth: usize) {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(map) => {
            for (name, value) in map.iter().filter(|(name, _)| !DRAWN.contains(&name.as_str())) {
                match value {
                    Value::Object(_) => {
                        println!("{pad}{name}");
                        print_tree(value, depth + 1);
                    }
                    Value::Array(items) => {
                        for item in items {
                            match item {
                                Value::Object(row) => {
                                    let cells: Vec<String> =
                                        row.iter().map(|(name, v)| format!("{name} {v}")).collect();
                                    println!("{pad}{name}: {}", cells.join(", "));
                                }
                                Value::String(text) => println!("{pad}{}: {text}", name.trim_end_matches('s')),
                                item => println!("{pad}{name}: {item}"),
                            }
                        }
                    }
                    value => println!("{pad}{name:<28} {value}"),
                }
            }
        }
        value => println!("{pad}{value}"),
    }
}

fn general_doubts(seconds: f64) -> Vec<String> {
    let mut doubts = Vec::new();
    if seconds < 1.0 {
        doubts.push(format!("each measurement takes {seconds} s: too short to be trusted; --seconds 2 is the least"));
    }
    let busy = busy_share(Duration::from_millis(200));
    if busy > 0.1 {
        doubts.push(format!("before anything began the CPUs were {:.0} % busy: other processes", busy * 100.0));
    }
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if cpus < 4 {
        doubts.push(format!("{cpus} CPUs: server, instance and everything else share them"));
    }
    if let Ok(governor) = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        && governor.trim() != "performance"
    {
        doubts.push(format!("the CPU frequency governor is {}: performance is steadier", governor.trim()));
    }
    doubts
}

/// Part of the CPUs' time that is not idle, over some time (proc_stat(5): the fourth and fifth fields are idle).
fn busy_share(time: Duration) -> f64 {
    let look = || {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let line = stat.lines().next().unwrap_or_default().to_owned();
        let ticks: Vec<f64> = line.split_whitespace().skip(1).take(8).filter_map(|word| word.parse().ok()).collect();
        (ticks.iter().sum::<f64>(), ticks.iter().skip(3).take(2).sum::<f64>())
    };
    let before = look();
    std::thread::sleep(time);
    let after = look();
    let (all, idle) = (after.0 - before.0, after.1 - before.1);
    if all > 0.0 { 1.0 - idle / all } else { 0.0 }
}

/// Time that a hypervisor gave to others, in ticks of 10 ms (proc_stat(5), eighth field).
fn stolen_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    stat.lines().next().and_then(|line| line.split_whitespace().nth(8)?.parse().ok()).unwrap_or(0)
}

/// The middle of some measurements.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = |place: usize| values.get(place).copied().unwrap_or(f64::NAN);
    if values.len() % 2 == 1 {
        at(values.len() / 2)
    } else {
        (at(values.len() / 2) + at((values.len() / 2).wrapping_sub(1))) / 2.0
    }
}

/// The median ratio of pairs, and between which two of them it lies with 95 % (the order statistics at half the count less
/// and more its root).
fn ratio_with_interval(of: &[f64], to: &[f64]) -> [f64; 3] {
    let mut ratios: Vec<f64> = of.iter().zip(to).map(|(of, to)| of / to).collect();
    ratios.sort_by(f64::total_cmp);
    let (count, middle) = (ratios.len() as f64, median(ratios.clone()));
    let at = |place: f64| ratios[(place.max(0.0) as usize).min(ratios.len() - 1)];
    [middle, at((count - 1.96 * count.sqrt()) / 2.0), at((count + 1.96 * count.sqrt()) / 2.0)].map(|x| rounded(x, 4))
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

/// What a page draws of a histogram of nanoseconds: microseconds, and the part that took no longer.
pub fn cdf_us(histogram: &Histogram<u64>) -> Value {
    let steps = [0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99995, 0.99999, 1.0];
    steps.iter().map(|q| json!([histogram.value_at_quantile(*q) as f64 / 1e3, q])).collect()
}

/// GB a second over time, for a page: of several measurements of one thing, one after another, and what lay between them
/// left out.
#[derive(Default)]
struct Series {
    points: Vec<[f64; 2]>,
    /// Where the measurement that runs began on the axis.
    began_s: f64,
    last: (f64, u64),
}

impl Series {
    /// Points of one measurement.
    const POINTS: f64 = 8.0;

    /// Another measurement begins.
    fn begin(&mut self) {
        (self.began_s, self.last) = (self.points.last().map_or(0.0, |point| point[0]), (0.0, 0));
    }

    /// Whether it is time for another point of a measurement that takes `time` in all.
    fn is_due(&self, elapsed: Duration, time: Duration) -> bool {
        elapsed.as_secs_f64() - self.last.0 >= time.as_secs_f64() / Self::POINTS
    }

    /// So many bytes since it began.
    fn add(&mut self, elapsed: Duration, bytes: u64) {
        let (last_s, last_bytes) = std::mem::replace(&mut self.last, (elapsed.as_secs_f64(), bytes));
        let rate = bytes.saturating_sub(last_bytes) as f64 / 1e9 / (elapsed.as_secs_f64() - last_s).max(1e-9);
        self.points.push([rounded(self.began_s + elapsed.as_secs_f64(), 4), rounded(rate, 4)]);
    }
}

/// What a page draws of parts lies where it looks for it.
fn raise(report: &mut Value) {
    for what in ["cdf_us", "gb_s_over_time"] {
        let mut all = serde_json::Map::new();
        for part in ["ring", "dram", "ssd"] {
            let Some(part) = report.get_mut(part).and_then(Value::as_object_mut) else { continue };
            if let Some(Value::Object(map)) = part.remove(what) {
                all.extend(map);
            }
        }
        if !all.is_empty() {
            report[what] = all.into();
        }
    }
}

pub fn percentiles(histogram: &Histogram<u64>, per: f64) -> Value {
    let at = |q: f64| rounded(histogram.value_at_quantile(q) as f64 / per, 1);
    json!({"p50": at(0.5), "p99": at(0.99)})
}

/// Pins the calling thread. False if that is not allowed.
fn pin(cpu: usize) -> bool {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).is_ok()
}

/// Two CPUs for two sides that talk.
fn two_cpus() -> Option<(usize, usize)> {
    let set = rustix::thread::sched_getaffinity(None).ok()?;
    let mut allowed = (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
    Some((allowed.next()?, allowed.next()?))
}

/// A server for one benchmark, with what the benchmark needs unless the environment says otherwise.
struct BenchServer {
    // Dropped first: a server that still runs would lay files where its directory was.
    _server: crate::replay::OwnServer,
    _scratch: tempfile::TempDir,
    settings: Settings,
}

impl BenchServer {
    fn start(
        scratch_in: &std::path::Path,
        block_kib: u64,
        settings: &[(&str, String)],
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let scratch = tempfile::Builder::new().prefix("kvring-bench-").tempdir_in(scratch_in)?;
        let path = |name: &str| scratch.path().join(name).display().to_string();
        let mut all = Settings::default();
        all.flags.push(("server_recv_port".into(), path("server")));
        all.flags.push(("ssd_cache_dir".into(), path("ssd")));
        all.flags.push(("log_level".into(), "error".into()));
        all.flags.push(("client_wait_ms".into(), "10000".into()));
        all.flags.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        let server = crate::replay::start_server(&all, block_kib)?;
        Ok(Self { _scratch: scratch, _server: server, settings: all })
    }

    fn session(&self, block_bytes: u64) -> Result<kvring_ipc::client::Session, Box<dyn std::error::Error>> {
        let attach = kvring_ipc::handshake::Attach {
            protocol: kvring_ipc::wire::PROTOCOL_VERSION,
            instance_id: 0,
            instance_token: kvring_ipc::instance::random_token(),
            rank: 0,
            layout: Some(kvring_ipc::layout::Layout::opaque(block_bytes)),
        };
        let socket = self.settings.load()?.config.socket;
        Ok(kvring_ipc::client::Session::connect(&socket, &attach, Duration::from_secs(5), None)?)
    }

    fn stats(&self) -> Result<Value, Box<dyn std::error::Error>> {
        use kvring_ipc::handshake::{Reply, Request, ask};
        let socket = self.settings.load()?.config.socket;
        match ask(&socket, &Request::Stats, Duration::from_secs(5))? {
            Reply::Stats(stats) => Ok(stats),
            _ => Err("an unexpected answer".into()),
        }
    }

    fn metric(&self, name: &str) -> Result<u64, Box<dyn std::error::Error>> {
        Ok(self.stats()?["metrics"][name].as_u64().ok_or("no such counter")?)
    }
}

/// A chain of keys that belongs to nobody else.
fn chain(name: &str, blocks: u32) -> Vec<kvring_ipc::key::BlockKey> {
    let tokens: Vec<u32> = (0..blocks).collect();
    kvring_ipc::key::Namespace::default().model(name).keys(&tokens, 1)
}

/// Stores a chain whole, the bytes left as they are. Says how many blocks were taken.
fn store(
    session: &mut kvring_ipc::client::Session,
    keys: &[kvring_ipc::key::BlockKey],
) -> Result<u32, Box<dyn std::error::Error>> {
    let far = std::time::Instant::now() + Duration::from_secs(10);
    let mut taken = 0;
    let mut parent = kvring_ipc::key::BlockKey::default();
    for (batch, first) in keys.chunks(256).zip((0..).step_by(256)) {
        let tag = session.post_reserve(parent, first, batch)?;
        let mut grants = Vec::new();
        session.wait(tag, far, |_, completion| grants.extend(completion.grants().map(|(_, grant)| grant)))?;
        if !grants.is_empty() {
            let tag = session.post_commit(&grants)?;
            session.wait(tag, far, |_, completion| taken += completion.payload[0] as u32)?;
        }
        parent = batch[batch.len() - 1];
    }
    Ok(taken)
}
