//! How long a death lasts: from the kill of the engine process, or the upgrade of its program, until an
//! attached instance loads the same blocks again; from the kill of an instance until its leases are back.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use kvring_gpu::backend::host::HostMemory;
use kvring_gpu::direct::DirectAgent;
use kvring_ipc::handshake::{Request, Sizes, ask};
use kvring_ipc::instance::Instance;
use kvring_ipc::key::BlockKey;
use kvring_ipc::layout::Layout;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::{BenchServer, Measured, Run, chain, rounded};
use crate::Outcome;
use crate::settings::Settings;

/// Arguments of `kvring bench crash`.
#[derive(Args)]
pub struct CrashArgs {
    /// GiB of the pool, full.
    #[arg(long, default_value_t = 1.0)]
    size_gb: f64,
    /// GiB of an SSD tier beside it, in the working directory.
    #[arg(long, default_value_t = 0.0)]
    ssd_gb: f64,
    /// KiB of a block.
    #[arg(long, default_value_t = 64)]
    block_kib: u64,
    /// Deaths of each kind.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
}

impl Default for CrashArgs {
    fn default() -> Self {
        Self { size_gb: 1.0, ssd_gb: 0.0, block_kib: 64, rounds: 20 }
    }
}

const CHAIN: u32 = 64;

/// Measures.
pub fn measure(_run: &mut Run, args: &CrashArgs) -> Measured {
    let here = std::path::Path::new(".");
    let server = BenchServer::start(
        here,
        args.block_kib,
        &[
            ("cpu_cache_gb", args.size_gb.to_string()),
            ("ssd_cache_gb", args.ssd_gb.to_string()),
            ("crash_limit", "1000".into()),
            ("client_wait_ms", "500".into()),
            ("writer_grace_ms", "100".into()),
        ],
    )?;
    let block_bytes = args.block_kib << 10;
    let config = server.settings.load()?.config;
    let instance = Instance::open(config.clone(), Layout::opaque(block_bytes), 0)?;
    let mut agent = DirectAgent::new(instance, HostMemory::new(CHAIN as usize, block_bytes as usize));
    let blocks = (args.size_gb * f64::from(1 << 30)) as u64 / block_bytes;
    let chains: Vec<Vec<BlockKey>> = (0..blocks / u64::from(CHAIN)).map(|n| chain(&format!("{n}"), CHAIN)).collect();
    let places: Vec<usize> = (0..CHAIN as usize).collect();
    for keys in &chains {
        agent.store(BlockKey::default(), 0, keys, &places, |_, _| ());
    }
    let mut all_there = |keys: &[BlockKey]| {
        let Some(lease) = agent.match_prefix(keys).lease else { return false };
        let loaded = agent.load(lease, 0, keys, &places, Duration::from_secs(5), |_, _| ());
        agent.instance().release(lease);
        loaded.blocks_dram == CHAIN
    };
    // A busy machine may have dropped some.
    let resident: Vec<&Vec<BlockKey>> = chains.iter().filter(|keys| all_there(keys)).collect();
    if resident.is_empty() {
        return Err("nothing was stored".into());
    }
    // One that waits as long as a scheduler does, and no longer.
    let mut config_of_asker = config.clone();
    config_of_asker.say("client_wait_ms", "10")?;
    let mut asker = Instance::open(config_of_asker, None, 0)?;
    let (mut killed, mut upgraded, mut leases, mut missed) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut grown, mut shrunk) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
    let setting = server.stats()?["settings"]["cpu_cache_gb"].as_str().and_then(|gb| gb.parse::<f64>().ok());
    let pool_bytes = (setting.ok_or("the server does not say how large its pool is")? * f64::from(1 << 30)) as u64;
    for round in 0..args.rounds.max(1) {
        let keys = resident[round % resident.len()];
        served(&mut all_there, keys, Instant::now())?;
        for kills in [round % 2 == 0, round % 2 == 1] {
            let pid = server.stats()?["server_pid"].as_u64().unwrap_or(0) as i32;
            let from = Instant::now();
            if kills {
                kill_process(Pid::from_raw(pid).ok_or("no server")?, Signal::KILL)?;
                served(&mut all_there, keys, from)?;
                killed.push(from.elapsed().as_secs_f64() * 1e3);
                continue;
            }
            // It has found the last one's successor before it asks for the next.
            while asker.match_prefix(keys).blocks != CHAIN {
                std::thread::sleep(Duration::from_millis(1));
            }
            let (gap, misses) = across(&Request::Upgrade, &config.socket, &mut asker, keys)?;
            upgraded.push(gap);
            missed.push(misses);
        }
        // The pool grows by a quarter, and is what it was.
        for (bytes, (gaps, misses)) in [(5 * pool_bytes / 4, &mut grown), (pool_bytes, &mut shrunk)] {
            while asker.match_prefix(keys).blocks != CHAIN {
                std::thread::sleep(Duration::from_millis(1));
            }
            let sizes = Sizes { cpu_cache_bytes: Some(bytes), ssd_cache_bytes: None };
            let (gap, missed) = across(&Request::Resize(sizes), &config.socket, &mut asker, keys)?;
            gaps.push(gap);
            misses.push(missed);
        }
        leases.push(lease_of_a_dead_instance(&server)?);
    }
    let spread = |mut samples: Vec<f64>| {
        samples.sort_by(f64::total_cmp);
        let at = |share: f64| rounded(samples[((samples.len() - 1) as f64 * share) as usize], 1);
        json!({"p50": at(0.5), "p90": at(0.9), "most": at(1.0)})
    };
    Ok(json!({
        "pool_gb": args.size_gb,
        "ssd_gb": args.ssd_gb,
        "blocks": blocks,
        "rounds": args.rounds,
        "engine_killed_to_served_ms": spread(killed),
        "upgrade_gap_ms": spread(upgraded),
        "requests_missed_by_an_upgrade": spread(missed),
        "grow_gap_ms": spread(grown.0),
        "requests_missed_by_growing": spread(grown.1),
        "shrink_gap_ms": spread(shrunk.0),
        "requests_missed_by_shrinking": spread(shrunk.1),
        "instance_killed_to_leases_back_ms": spread(leases),
    }))
}

fn served(
    all_there: &mut impl FnMut(&[BlockKey]) -> bool,
    keys: &[BlockKey],
    from: Instant,
) -> Result<(), Box<dyn std::error::Error>> {
    while !all_there(keys) {
        if from.elapsed() > Duration::from_secs(30) {
            return Err("the same blocks were not served again within 30 s".into());
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// An upgrade or a resize under an instance that asks once a millisecond: the longest time in milliseconds from one match to
/// the next that was answered, and matches that were misses.
fn across(
    request: &Request,
    socket: &Path,
    asker: &mut Instance,
    keys: &[BlockKey],
) -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let sessions = asker.sessions_count();
    ask(socket, request, Duration::from_secs(2))?;
    let asked = Instant::now();
    let (mut answered, mut gap, mut missed) = (asked, Duration::ZERO, 0);
    loop {
        let matched = asker.match_prefix(keys);
        if let Some(lease) = matched.lease {
            asker.release(lease);
        }
        if matched.blocks == CHAIN {
            gap = gap.max(answered.elapsed());
            answered = Instant::now();
        } else {
            missed += 1;
        }
        if matched.blocks == CHAIN && asker.sessions_count() != sessions {
            return Ok((gap.as_secs_f64() * 1e3, f64::from(missed)));
        }
        std::thread::sleep(Duration::from_millis(1));
        if asked.elapsed() > Duration::from_secs(30) {
            return Err("no other engine process within 30 s".into());
        }
    }
}

/// Milliseconds from the kill of an instance that holds leases until the server holds none.
fn lease_of_a_dead_instance(server: &BenchServer) -> Result<f64, Box<dyn std::error::Error>> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("lease-holder").stdin(Stdio::null()).stdout(Stdio::piped());
    server.settings.tell(&mut command)?;
    let mut holder = command.spawn()?;
    let mut said = String::new();
    BufReader::new(holder.stdout.take().ok_or("no pipe")?).read_line(&mut said)?;
    let leases = server.metric("leases_count")?;
    let from = Instant::now();
    holder.kill()?;
    while server.metric("leases_count")? > 0 {
        if from.elapsed() > Duration::from_secs(30) {
            return Err("leases of a dead instance were not back after 30 s".into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    let ms = from.elapsed().as_secs_f64() * 1e3;
    holder.wait()?;
    if leases == 0 || !said.starts_with("ready") {
        return Err(format!("the instance held no lease: {said}").into());
    }
    Ok(ms)
}

/// Arguments of the hidden command.
#[derive(Args)]
pub struct HolderArgs {
    #[command(flatten)]
    settings: Settings,
}

/// An instance that holds leases until it is killed.
pub fn hold(args: &HolderArgs) -> Outcome {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut config = args.settings.load()?.config;
    config.say("client_wait_ms", "5000")?;
    let mut instance = Instance::open(config, None, 0)?;
    let mut leases = Vec::new();
    for number in 0..10_000 {
        leases.extend(instance.match_prefix(&chain(&number.to_string(), CHAIN)).lease);
        if leases.len() == 100 {
            break;
        }
    }
    println!("ready {}", leases.len());
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
