//! What `kvring selftest` tries. A case is right or says why not; its numbers are for whoever reads them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use kvring_engine::checksum::{self, SCRATCH_BYTES};
use kvring_gpu::backend::Direction;
use kvring_gpu::backend::cuda::Options;
use kvring_gpu::plan::Calibration;
use kvring_gpu::trial::{Scatter, Shape, Trial, Who, pinning, pinning_of, pool_of};
use kvring_ipc::client::{Pool, monotonic_ns};
use kvring_ipc::config::Config;
use kvring_ipc::mapping::{Mapping, Pages};
use serde_json::{Value, json};

use super::{SelftestArgs, again};
use crate::Outcome;
use crate::bench::copy;
use crate::bench::{median, percentiles};

type Told = Result<Value, Box<dyn std::error::Error>>;

/// Something to try, in a process of its own.
pub struct Case {
    pub name: String,
    pub run: Box<dyn Fn(&SelftestArgs) -> Told>,
}

const SECOND: Duration = Duration::from_secs(1);

/// All of them, the most important first.
pub fn of(args: &SelftestArgs) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut add = |name: String, run: Box<dyn Fn(&SelftestArgs) -> Told>| cases.push(Case { name, run });
    add("probe".into(), Box::new(probe));
    for (way, who) in ways(args) {
        add(format!("right: {way}"), Box::new(move |_| is_right(way, &who)));
    }
    add("right: fifty thousand pages in one go".into(), Box::new(many_pages));
    add("right: two processes, one pool".into(), Box::new(two_processes));
    add("fault: killed while it stores".into(), Box::new(killed_while_it_stores));
    if args.device.is_some() {
        add("fault: the engine frees its memory".into(), Box::new(freed_memory));
        add("fault: a kernel goes astray".into(), Box::new(astray));
        add("completion: seen by another process".into(), Box::new(completion));
        add("pinning".into(), Box::new(pin));
        add("pinning by two processes at once".into(), Box::new(pin_at_once));
    }
    for shape in copy::shapes(args.size_mb) {
        for (way, who) in ways(args) {
            let shape = shape.clone();
            let name = format!("speed: {}, {way}", shape.name);
            add(name, Box::new(move |args| speed(args, &shape, way, &who)));
        }
    }
    cases
}

/// Plays somebody else in a case.
pub fn play(args: &SelftestArgs, role: &str, files: &[String]) -> Outcome {
    match (role, files) {
        ("victim", [pool]) => victim(args, pool),
        ("partner", [pool]) => half(args, pool, 1),
        ("pinner", [pool]) => {
            println!("ready");
            println!("{}", pin_for(args, pool, SHARED)?);
            Ok(())
        }
        ("observer", [pool, words, rounds]) => observe(pool, words, rounds.parse()?),
        _ => Err(format!("there is no role {role:?} with {} files", files.len()).into()),
    }
}

fn ways(args: &SelftestArgs) -> Vec<(&'static str, Who)> {
    copy::ways(args.device, args.cuda_driver.as_deref())
}

/// Who copies as it is shipped.
fn shipped(args: &SelftestArgs) -> Who {
    match args.device {
        Some(device) => Who::Cuda(Options { device, driver: args.cuda_driver.clone(), ..Options::default() }),
        None => Who::Cpu { threads: 0, non_temporal_from_bytes: kvring_gpu::backend::tensors::NON_TEMPORAL_FROM_BYTES },
    }
}

/// Small, and every page of it scattered.
const SMALL: Shape = Shape {
    name: "16 KiB pages of 8 layers",
    layers: 8,
    page_bytes: 16 << 10,
    is_block_first: false,
    blocks_count: 32,
};

const BOTH: [Direction; 2] = [Direction::Store, Direction::Load];

fn probe(args: &SelftestArgs) -> Told {
    let trial = Trial::new(&shipped(args), &SMALL)?;
    let words = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "copied_by": trial.describe(),
        "calibration": trial.calibration().map(|calibration| format!("{calibration:?}")),
        "trouble": trial.trouble(),
        "pool_page_bytes": trial.pool().2.bytes(),
        "kernel": words("/proc/sys/kernel/osrelease"),
        "driver": words("/proc/driver/nvidia/version"),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
    }))
}

/// Every byte of memory and pool compared, over every shape.
fn is_right(way: &str, who: &Who) -> Told {
    let mut checks = 0;
    for shape in copy::shapes(0) {
        for seed in 1..=2 {
            let mut trial = Trial::new(who, &shape)?;
            for (direction, scatter) in
                BOTH.into_iter().flat_map(|way| [Scatter::Random, Scatter::Runs(2)].map(|scatter| (way, scatter)))
            {
                let checked = trial.check(direction, scatter, seed);
                checked.map_err(|error| format!("{way}, {}: {error}", shape.name))?;
                checks += 1;
            }
        }
    }
    Ok(json!({"checks": checks}))
}

fn many_pages(args: &SelftestArgs) -> Told {
    let shape = Shape {
        name: "1 KiB pages of 80 layers",
        layers: 80,
        page_bytes: 1 << 10,
        is_block_first: false,
        blocks_count: 640,
    };
    let mut trial = Trial::new(&shipped(args), &shape)?;
    BOTH.into_iter().try_for_each(|direction| trial.check(direction, Scatter::Random, 3))?;
    Ok(json!({"pages": shape.layers * shape.blocks_count}))
}

/// The path by which another process of this user opens a file of ours.
fn path_of(file: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

/// A trial over a pool that another process has made.
fn trial_over(who: &Who, path: &str) -> Result<Trial, Box<dyn std::error::Error>> {
    let file = File::options().read(true).write(true).open(path).map_err(|error| format!("{path}: {error}"))?;
    let bytes = file.metadata()?.len() as usize;
    let mapping = Arc::new(Mapping::new(&file, bytes)?);
    let pool = Pool::new(mapping, SMALL.block_bytes(), 2 * SMALL.blocks_count as u32);
    Trial::over(who, &SMALL, pool, file.into(), Pages::Small)
}

/// A file of a pool for [`SMALL`].
fn small_pool() -> Result<(OwnedFd, Mapping, Pages), Box<dyn std::error::Error>> {
    pool_of(2 * SMALL.bytes())
}

/// This program, as somebody else, that says a line when it is ready.
fn start(args: &SelftestArgs, role: &[&str]) -> Result<Child, Box<dyn std::error::Error>> {
    let mut command = again(args)?;
    let mut child = command.arg("--role").args(role).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    child.stdout.as_mut().map(|stdout| BufReader::new(stdout).read_line(&mut line)).transpose()?;
    if line.trim() == "ready" {
        return Ok(child);
    }
    let _ = child.kill();
    Err(format!("{}: {}", role[0], child.wait()?).into())
}

/// The last line of somebody else, when there are no more.
fn said_last(child: &mut Child) -> Told {
    let stdout = child.stdout.take().ok_or("no output")?;
    let last = BufReader::new(stdout).lines().map_while(Result::ok).last().unwrap_or_default();
    Ok(serde_json::from_str::<Value>(&last)?)
}

/// Copies to and fro in one half of a pool, each byte compared.
fn half(args: &SelftestArgs, pool: &str, half: usize) -> Outcome {
    let mut trial = trial_over(&shipped(args), pool)?;
    trial.take_half(half);
    println!("ready");
    check_for(&mut trial, SHARED, half as u64)?;
    Ok(())
}

/// How long two processes copy at once.
const SHARED: Duration = Duration::from_secs(2);

/// Says how often every byte was compared.
fn check_for(trial: &mut Trial, time: Duration, seed: u64) -> Result<u64, Box<dyn std::error::Error>> {
    let (began, mut checks) = (Instant::now(), 0);
    while began.elapsed() < time {
        checks += 1;
        BOTH.into_iter().try_for_each(|direction| trial.check(direction, Scatter::Random, 2 * checks + seed))?;
    }
    Ok(checks)
}

fn two_processes(args: &SelftestArgs) -> Told {
    let (file, _mapping, pages) = small_pool()?;
    let path = path_of(&file);
    let mut trial = trial_over(&shipped(args), &path)?;
    trial.take_half(0);
    let mut partner = start(args, &["partner", &path])?;
    let checks = check_for(&mut trial, SHARED, 0)?;
    let status = partner.wait()?;
    if status.success() {
        Ok(json!({"checks": checks, "pool_page_bytes": pages.bytes()}))
    } else {
        Err(format!("partner: {status}").into())
    }
}

/// Stores for ever.
fn victim(args: &SelftestArgs, pool: &str) -> Outcome {
    let who = match shipped(args) {
        // Straight from the device to the pool, and nothing measured first.
        Who::Cuda(options) => {
            let calibration = Some(Calibration { is_batched: true, ..Calibration::default() });
            Who::Cuda(Options { calibration, ..options })
        }
        other => other,
    };
    let mut trial = trial_over(&who, pool)?;
    // Each page is another: whatever is stored anew differs from what lay there.
    trial.fill_with_noise(1)?;
    println!("ready");
    loop {
        let blocks = trial.choose(Scatter::Random);
        trial.copy(&[(Direction::Store, &blocks)])?;
    }
}

/// How long the pool is watched after a death.
const WATCH: Duration = Duration::from_secs(1);

/// A device may go on writing after the process that told it to is dead: for how long? What a server does not reuse before
/// `writer_grace_ms`, nobody else has yet.
fn killed_while_it_stores(args: &SelftestArgs) -> Told {
    let grace = Config::default().writer_grace;
    let mut late_ms: Vec<f64> = Vec::new();
    for round in 0..3u64 {
        let (file, mapping, _) = small_pool()?;
        let mut scratch = vec![0; SCRATCH_BYTES];
        let mut sum = || checksum::of_mapping(&mapping, 0, mapping.bytes(), &mut scratch);
        let nothing = sum();
        let mut victim = start(args, &["victim", &path_of(&file)])?;
        let deadline = Instant::now() + 10 * SECOND;
        while sum() == nothing && victim.try_wait()?.is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50 + 13 * round));
        victim.kill()?;
        let status = victim.wait()?;
        let died = Instant::now();
        if status.signal() != Some(libc::SIGKILL) || sum() == nothing {
            return Err(format!("the one who was to be killed while it stores: {status}").into());
        }
        // As the next owner of its slots would: what is written here stays, or the dead one's device has written too.
        let ours = vec![0x5A; mapping.bytes()];
        mapping.copy_in(0, &ours);
        let (expected, mut changed) = (checksum::of_bytes(&ours), Duration::ZERO);
        while died.elapsed() < WATCH.max(2 * grace) {
            if sum() != expected {
                changed = died.elapsed();
                mapping.copy_in(0, &ours);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if changed > grace {
            let late = changed.as_millis();
            return Err(format!(
                "the device wrote {late} ms after its process was dead: set writer_grace_ms above that"
            )
            .into());
        }
        late_ms.push(changed.as_secs_f64() * 1e3);
    }
    Ok(json!({"written_after_death_ms": late_ms, "writer_grace_ms": grace.as_millis() as u64}))
}

/// Copies until one is refused: how that is said, and that it is said.
fn until_refused(trial: &mut Trial) -> Result<Value, Box<dyn std::error::Error>> {
    let began = Instant::now();
    while began.elapsed() < 5 * SECOND {
        let blocks = trial.choose(Scatter::Random);
        for direction in BOTH {
            if let Err(error) = trial.copy(&[(direction, &blocks)]) {
                let after_ms = began.elapsed().as_secs_f64() * 1e3;
                return Ok(json!({"said": error.to_string(), "after_ms": after_ms, "trouble": trial.trouble()}));
            }
        }
    }
    Ok(json!({"said": Value::Null}))
}

/// What the engine gave and took back: an error in words, in time, and a process that ends as any other.
fn freed_memory(args: &SelftestArgs) -> Told {
    let mut trial = Trial::new(&shipped(args), &SMALL)?;
    trial.check(Direction::Store, Scatter::Random, 1)?;
    trial.free_memory();
    // Some drivers keep the mapping: then it is copied, and nobody can tell.
    until_refused(&mut trial)
}

fn astray(args: &SelftestArgs) -> Told {
    let mut trial = Trial::new(&shipped(args), &SMALL)?;
    trial.check(Direction::Store, Scatter::Random, 1)?;
    trial.go_astray()?;
    let told = until_refused(&mut trial)?;
    if told["said"].is_null() { Err("the context is lost, and copies go on".into()) } else { Ok(told) }
}

const ROUNDS: u32 = 2000;
/// The observer's words, in the memory of the completion words.
const SEEN_AT: usize = 2048;
/// The device's word for stores.
const WORD_AT: usize = 64;

/// From the last byte of a store to its completion word, and from the submission to it, as a process sees them that only
/// looks.
fn completion(args: &SelftestArgs) -> Told {
    let shape = Shape { name: "one page of 4 KiB", layers: 1, page_bytes: 4096, is_block_first: true, blocks_count: 1 };
    let mut trial = Trial::new(&shipped(args), &shape)?;
    let Some(words) = trial.words() else { return Ok(json!({"skipped": "there are no completion words"})) };
    let (pool_path, words_path) = (path_of(trial.pool().1), path_of(words));
    let seen = Mapping::new(words, 4096)?;
    if seen.word32(WORD_AT).load(Ordering::Acquire) == 0 {
        // One that writes no words never has.
        trial.copy(&[(Direction::Store, &[(0, 0)])])?;
        if seen.word32(WORD_AT).load(Ordering::Acquire) == 0 {
            return Ok(json!({"skipped": "this device writes no completion words"}));
        }
    }
    trial.fill(0)?;
    trial.copy(&[(Direction::Store, &[(0, 0)])])?;
    let mut observer = start(args, &["observer", &pool_path, &words_path, &ROUNDS.to_string()])?;
    let mut after_submission = Histogram::<u64>::new(3)?;
    for round in 1..=ROUNDS {
        trial.fill(round as u8)?;
        let began = monotonic_ns();
        trial.copy(&[(Direction::Store, &[(0, 0)])])?;
        let deadline = Instant::now() + SECOND;
        while seen.word32(SEEN_AT).load(Ordering::Acquire) != round {
            if Instant::now() > deadline {
                return Err(format!("round {round}: the other process has not seen it after 1 s").into());
            }
            std::hint::spin_loop();
        }
        let at = seen.words64(SEEN_AT + 8, 1)[0].load(Ordering::Relaxed);
        after_submission.record(at.saturating_sub(began))?;
    }
    let last = said_last(&mut observer)?;
    if !observer.wait()?.success() {
        return Err("the other process failed".into());
    }
    Ok(json!({
        "rounds": ROUNDS,
        "word_after_last_byte_us": last,
        "word_after_submission_us": percentiles(&after_submission, 1e3),
    }))
}

fn observe(pool: &str, words: &str, rounds: u32) -> Outcome {
    let open = |path: &str| File::options().read(true).write(true).open(path);
    let (pool, words) = (Mapping::new(open(pool)?, 4096)?, Mapping::new(open(words)?, 4096)?);
    let (last_byte, word) = (pool.word32(4092), words.word32(WORD_AT));
    let (mut known, mut histogram) = (word.load(Ordering::Acquire), Histogram::<u64>::new(3)?);
    println!("ready");
    for round in 1..=rounds {
        let expected = u32::from_le_bytes([round as u8; 4]);
        let (mut byte_at, mut word_at) = (None, None);
        while byte_at.is_none() || word_at.is_none() {
            // The word first: its store is the last.
            let now_known = word.load(Ordering::Acquire);
            let is_there = last_byte.load(Ordering::Acquire) == expected;
            let now = monotonic_ns();
            if now_known != known && word_at.is_none() {
                word_at = Some(now);
                if !is_there {
                    return Err(format!("round {round}: the word is there, the bytes are not").into());
                }
            }
            if is_there && byte_at.is_none() {
                byte_at = Some(now);
            }
            std::hint::spin_loop();
        }
        known = word.load(Ordering::Acquire);
        let (byte_at, word_at) = (byte_at.unwrap_or_default(), word_at.unwrap_or_default());
        histogram.record(word_at.saturating_sub(byte_at))?;
        words.words64(SEEN_AT + 8, 1)[0].store(word_at, Ordering::Relaxed);
        words.word32(SEEN_AT).store(round, Ordering::Release);
    }
    println!("{}", percentiles(&histogram, 1e3));
    Ok(())
}

/// How long the driver takes to pin the pool, by the size of its pages.
fn pin(args: &SelftestArgs) -> Told {
    let options = Options { device: args.device.unwrap_or(0), driver: args.cuda_driver.clone(), ..Options::default() };
    let bytes = (args.size_mb << 20).max(2 << 20);
    let mut told = serde_json::Map::new();
    for pages in [Pages::Small, Pages::Huge2M] {
        let said = match pinning(&options, bytes, pages) {
            Ok(took) => {
                let [pin, unpin] = took.map(|took| took.as_secs_f64() / (bytes as f64 / f64::from(1 << 30)));
                json!({"pin_s_per_gib": pin, "unpin_s_per_gib": unpin})
            }
            Err(error) => json!({"error": error.to_string()}),
        };
        told.insert(format!("pages of {} KiB", pages.bytes() >> 10), said);
    }
    Ok(told.into())
}

/// Pins and lets go of memory that others have too, again and again.
fn pin_for(args: &SelftestArgs, pool: &str, time: Duration) -> Told {
    let options = Options { device: args.device.unwrap_or(0), driver: args.cuda_driver.clone(), ..Options::default() };
    let file = File::options().read(true).write(true).open(pool).map_err(|error| format!("{pool}: {error}"))?;
    let bytes = file.metadata()?.len() as usize;
    let (began, mut seconds, mut refused) = (Instant::now(), Vec::new(), Vec::new());
    while began.elapsed() < time {
        match pinning_of(&options, Mapping::new(&file, bytes)?) {
            Ok([pin, _]) => seconds.push(pin.as_secs_f64() / (bytes as f64 / f64::from(1 << 30))),
            Err(error) => refused.push(error.to_string()),
        }
    }
    let worst = seconds.iter().copied().fold(0.0, f64::max);
    let (times, median) = (seconds.len(), if seconds.is_empty() { Value::Null } else { median(seconds).into() });
    Ok(json!({"times": times, "pin_s_per_gib": median, "worst_s_per_gib": worst, "refused": refused.len(),
        "why": refused.first()}))
}

/// What one process's pinning costs another that pins the same pool, and whether it is refused then: without the lock by
/// which instances take turns.
fn pin_at_once(args: &SelftestArgs) -> Told {
    let (file, _mapping, pages) = pool_of((args.size_mb << 20).max(2 << 20))?;
    let path = path_of(&file);
    let alone = pin_for(args, &path, SHARED / 2)?;
    let mut partner = start(args, &["pinner", &path])?;
    let ours = pin_for(args, &path, SHARED)?;
    let theirs = said_last(&mut partner)?;
    if !partner.wait()?.success() {
        return Err("the other process failed".into());
    }
    Ok(json!({"alone": alone, "at_once": [ours, theirs], "pool_page_bytes": pages.bytes()}))
}

fn speed(args: &SelftestArgs, shape: &Shape, way: &str, who: &Who) -> Told {
    let mut trial = Trial::new(who, shape)?;
    let both = args.device.is_some().then_some(None);
    let directions = BOTH.map(Some).into_iter().chain(both);
    let rows = directions.map(|direction| copy::row(0.03, 5, &mut trial, shape, way, direction));
    Ok(json!({"copies": rows.collect::<Result<Vec<_>, _>>()?, "by": trial.describe(), "trouble": trial.trouble()}))
}
