//! `kvring replay`: the main job on real input. A server if none runs, N instance processes, a table.

pub mod generate;
pub mod oracle;
mod report;
pub mod trace;
pub mod worker;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kvring_ipc::handshake::{Reply, Request, ask};

use crate::Outcome;
use crate::observe::{Server, Which};
use crate::settings::Settings;
use report::Report;
use worker::{Said, Spec};

/// Arguments of `kvring replay`.
#[derive(Args)]
pub struct ReplayArgs {
    /// Trace to replay (JSON lines); without it a seeded generator serves.
    trace: Option<PathBuf>,
    /// Instance processes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    instances: u32,
    /// Bytes of a block, in KiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(4..=1 << 20))]
    block_kib: u64,
    /// At most this many requests [default: all of the trace, 2000 of the generator].
    #[arg(long)]
    requests: Option<usize>,
    /// Times faster than the trace's own timestamps; 0 for as fast as possible.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    speed: f64,
    /// Seed of the generator.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the report as one JSON object.
    #[arg(long)]
    json: bool,
    /// Save the report with all that is needed to believe it, for `kvring report`.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[arg(skip)]
    workload: generate::Workload,
    /// Requests a second that a generator makes; 0 for its own times.
    #[arg(skip)]
    rate: f64,
    #[command(flatten)]
    settings: Settings,
}

/// Arguments of `kvring bench cache`.
#[derive(Args)]
#[command(after_help = "\
Open loop: requests come when they are due, whether the one before has ended or not; a request that an instance cannot begin in time is late, and its time counts from when it was due. With --rate 0 each instance asks as fast as it can.")]
pub struct CacheArgs {
    #[arg(value_enum, default_value_t)]
    workload: generate::Workload,
    /// Requests a second, over all instances.
    #[arg(long, default_value_t = 200.0, allow_negative_numbers = true)]
    rate: f64,
    /// Instance processes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    instances: u32,
    /// Bytes of a block, in KiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(4..=1 << 20))]
    block_kib: u64,
    /// Requests in all.
    #[arg(long, default_value_t = 4000)]
    requests: usize,
    /// Seed of the workload.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    settings: Settings,
}

/// Runs a workload by name: a replay of what a generator makes.
pub fn bench_cache(args: CacheArgs, json: bool, output: Option<PathBuf>) -> Outcome {
    let CacheArgs { workload, rate, instances, block_kib, requests, seed, settings } = args;
    if !(0.0..=1e6).contains(&rate) {
        return Err(format!("--rate {rate}: expected requests a second, or 0").into());
    }
    let speed = if rate > 0.0 { 1.0 } else { 0.0 };
    let requests = Some(requests);
    run(ReplayArgs { trace: None, instances, block_kib, requests, speed, seed, json, output, workload, rate, settings })
}

/// A server that this replay has started, stopped when dropped.
pub struct OwnServer {
    child: Child,
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

/// Whether a server answers on this socket.
fn answers(socket: &std::path::Path) -> Option<serde_json::Value> {
    match ask(socket, &Request::Stats, Duration::from_secs(2)) {
        Ok(Reply::Stats(stats)) => Some(stats),
        _ => None,
    }
}

/// Starts a server with these settings and waits until it answers.
///
/// # Errors
/// It does not: what it said is on standard error.
pub fn start_server(settings: &Settings, block_kib: u64) -> Result<OwnServer, Box<dyn std::error::Error>> {
    let config = settings.load()?.config;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["serve", "--die-with-parent", "--block-kib", &block_kib.to_string()]);
    settings.tell(&mut command)?;
    command.env_remove("KVRING_INSTANCE_ID");
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let mut server = OwnServer { child };
    let deadline = Instant::now() + Duration::from_secs(120);
    while answers(&config.socket).is_none() {
        if let Some(status) = server.child.try_wait()? {
            return Err(format!("the server did not start ({status}); its reason is above").into());
        }
        if Instant::now() > deadline {
            return Err("the server did not answer within two minutes".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(server)
}

/// User and system time of a process, in seconds.
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Fields 14 and 15 (proc_pid_stat(5)), counted after the name, which may hold anything.
    let ticks: u64 = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|n| n.parse::<u64>().ok())
        .sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Runs the replay.
pub fn run(mut args: ReplayArgs) -> Outcome {
    if !args.speed.is_finite() || args.speed < 0.0 {
        return Err(format!("--speed {}: expected 0 or a factor above it", args.speed).into());
    }
    let scratch = tempfile::Builder::new().prefix("kvring-replay-").tempdir()?;
    let scratch_path = |name: &str| scratch.path().join(name).display().to_string();
    // What nobody said is small enough for any machine and exercises both tiers.
    args.settings.default_to("server_recv_port", &scratch_path("server"))?;
    args.settings.default_to("ssd_cache_dir", &scratch_path("ssd"))?;
    args.settings.default_to("cpu_cache_gb", "0.5")?;
    args.settings.default_to("ssd_cache_gb", "2")?;
    args.settings.default_to("log_level", "warn")?;
    // Latency is what is measured here, not a scheduler's patience.
    args.settings.default_to("client_wait_ms", "1000")?;
    let spec = Spec {
        requests: args.requests.unwrap_or(if args.trace.is_some() { usize::MAX } else { 2000 }),
        trace: args.trace.clone(),
        workload: args.workload,
        rate: args.rate,
        seed: args.seed,
        index: 0,
        of: args.instances as usize,
        block_bytes: args.block_kib << 10,
        speed: args.speed,
    };
    let requests = spec.all_requests()?;
    let requests_count = requests.len() as u64;
    let config = args.settings.load()?.config;
    let own = match answers(&config.socket) {
        Some(_) => None,
        None => Some(start_server(&args.settings, args.block_kib)?),
    };
    let before = answers(&config.socket).ok_or("the server is gone")?;
    let pid = before["server_pid"].as_u64().unwrap_or(0) as u32;
    let cpu_before = cpu_seconds(pid);
    if let Some(path) = &args.output {
        crate::report::check(path)?;
    }
    let (results, series, elapsed) = run_instances(&args, &spec, requests_count)?;
    let server_cpu_s = cpu_seconds(pid) - cpu_before;
    let after = answers(&config.socket);
    let lost = own.is_some() && after.is_none();
    drop(own);
    let mut report = Report::new(&results, elapsed, server_cpu_s, spec.block_bytes, &before, after.as_ref())?;
    let slots = |name: &str| after.as_ref().and_then(|after| after["metrics"][name].as_u64()).unwrap_or(0);
    let capacity = slots("host_slots_count") + slots("ssd_slots_count");
    report.bound_by(oracle::infinite(&requests), oracle::belady(&requests, capacity), capacity);
    if spec.speed > 0.0 {
        let last_s = requests.last().map_or(0.0, |request| request.timestamp_us as f64 / 1e6 / spec.speed);
        report.offered(requests_count as f64 / last_s.max(1e-3));
    }
    report.series = series;
    if let Some(path) = &args.output {
        // Of a server that ran already, its own.
        let theirs = after.as_ref().map_or(&serde_json::Value::Null, |after| &after["settings"]);
        let settings = if theirs.is_null() { serde_json::to_value(config.as_text())? } else { theirs.clone() };
        crate::report::save(path, "cache", &report.json(), Some(settings))?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&report.json())?);
    } else {
        print!("{report}");
    }
    match report.counts.wrong_blocks {
        0 if lost => Err("the server that this replay started died".into()),
        0 if report.counts.requests_without_server == requests_count => Err("no request reached a server".into()),
        0 => Ok(()),
        wrong => Err(format!("{wrong} blocks were wrong").into()),
    }
}

/// What instances have said; what the server did meanwhile: seconds, and blocks loaded and stored until then; and how
/// long it all took from when all were ready.
type Told = (Vec<Said>, Vec<[f64; 3]>, Duration);

fn run_instances(args: &ReplayArgs, spec: &Spec, requests_count: u64) -> Result<Told, Box<dyn std::error::Error>> {
    let bar = if args.json { ProgressBar::hidden() } else { ProgressBar::new(requests_count) };
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} requests  {per_sec}  {eta} left")?);
    let (sender, receiver) = std::sync::mpsc::channel();
    let mut children = Vec::new();
    for index in 0..args.instances as usize {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("replay-instance").arg("--spec").arg(serde_json::to_string(&Spec { index, ..spec.clone() })?);
        args.settings.tell(&mut command)?;
        command.env("KVRING_INSTANCE_NUM", args.instances.to_string()).env("KVRING_INSTANCE_ID", index.to_string());
        command.env("KVRING_SERVER_LAUNCH_MODE", "external");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take().ok_or("no standard output")?;
        let sender = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if let Ok(said) = serde_json::from_str::<Said>(&line) {
                    let _ = sender.send((index, said));
                }
            }
        });
        children.push(child);
    }
    drop(sender);
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    let mut done = vec![0; children.len()];
    let mut results = Vec::new();
    let server = Server::find(&args.settings.load()?.config.socket, Which::Current).ok();
    let (mut began, mut series) = (Instant::now(), Vec::new());
    let mut waited_for = children.len();
    loop {
        let now_s = began.elapsed().as_secs_f64();
        if let Some(server) =
            server.as_ref().filter(|_| series.last().is_none_or(|[at, ..]: &[f64; 3]| now_s > at + 0.25))
        {
            // Its shared memory: the server is not asked.
            let sample = server.sample();
            let loaded = sample.counter("load_blocks_dram_count") + sample.counter("load_blocks_ssd_count");
            series.push([now_s, loaded as f64, sample.counter("commit_blocks_count") as f64]);
        }
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok((_, Said::Ready)) => {
                waited_for = waited_for.saturating_sub(1);
                if waited_for == 0 {
                    // Its standard input is closed: it begins.
                    children.iter_mut().for_each(|child: &mut Child| drop(child.stdin.take()));
                    (began, series) = (Instant::now(), Vec::new());
                }
            }
            Ok((index, Said::Progress(count))) => done[index] = count,
            Ok((_, result)) => results.push(result),
            // One that died before it was ready keeps nobody waiting.
            Err(RecvTimeoutError::Timeout) if waited_for > 0 => {
                if children.iter_mut().any(|child| !matches!(child.try_wait(), Ok(None))) {
                    waited_for = 0;
                    children.iter_mut().for_each(|child: &mut Child| drop(child.stdin.take()));
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        bar.set_position(done.iter().sum());
        if interrupted.load(Ordering::Relaxed) {
            // The server and the scratch directory go as this returns.
            for child in &mut children {
                let _ = child.kill();
                let _ = child.wait();
            }
            return Err("interrupted".into());
        }
    }
    bar.finish_and_clear();
    let elapsed = began.elapsed();
    for (index, mut child) in children.into_iter().enumerate() {
        let status = child.wait()?;
        if !status.success() {
            return Err(format!("instance {index} failed: {status}").into());
        }
    }
    if results.len() != args.instances as usize {
        return Err("an instance ended without a result".into());
    }
    Ok((results, series, elapsed))
}
