//! One instance of a replay, a process of its own: matches, loads and compares what hits, stores what
//! missed. Speaks JSON lines on its standard output.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2Serializer};
use kvring_gpu::backend::host::HostMemory;
use kvring_gpu::direct::DirectAgent;
use kvring_ipc::instance::Instance;
use kvring_ipc::key::BlockKey;
use kvring_ipc::layout::Layout;
use serde::{Deserialize, Serialize};

use super::generate::Workload;
use super::trace;
use crate::Outcome;
use crate::settings::Settings;

/// Arguments of the hidden command.
#[derive(Args)]
pub struct WorkerArgs {
    #[arg(long)]
    spec: String,
    #[command(flatten)]
    settings: Settings,
}

/// What to replay.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// A trace, or none for a generator.
    pub trace: Option<PathBuf>,
    /// Which generator.
    #[serde(default)]
    pub workload: Workload,
    /// Requests a second that it makes.
    #[serde(default)]
    pub rate: f64,
    /// The generator's seed.
    pub seed: u64,
    /// How many requests, over all instances.
    pub requests: usize,
    /// This instance takes every `of`-th request, from `index` on.
    pub index: usize,
    /// See `index`.
    pub of: usize,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Times faster than the trace's timestamps; 0 for as fast as possible.
    pub speed: f64,
}

impl Spec {
    /// All requests of the replay.
    pub fn all_requests(&self) -> Result<Vec<trace::TraceRequest>, trace::TraceError> {
        match &self.trace {
            Some(path) => trace::read(path, self.requests),
            None => Ok(self.workload.generate(self.seed, self.requests, self.rate)),
        }
    }
}

/// What an instance counted.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Counts {
    pub requests: u64,
    pub blocks_requested: u64,
    pub blocks_hit_dram: u64,
    pub blocks_hit_ssd: u64,
    pub blocks_missed: u64,
    pub blocks_stored: u64,
    pub blocks_present: u64,
    pub blocks_dropped: u64,
    pub blocks_unloaded: u64,
    pub wrong_blocks: u64,
    pub sessions: u64,
    pub requests_without_server: u64,
    /// Microseconds spent on making and comparing bytes.
    #[serde(default)]
    pub beside_us: u64,
}

/// What was done in a span of a replay. For two runs to be compared: a percentile of the whole says nothing of its own
/// spread.
#[derive(Debug, Clone)]
pub struct Window {
    pub requests: u64,
    pub blocks_requested: u64,
    pub blocks_missed: u64,
    pub match_ns: Histogram<u64>,
    pub load_ns: Histogram<u64>,
    pub request_ns: Histogram<u64>,
}

impl Window {
    fn empty() -> Self {
        // Two digits: there are many.
        let new = || {
            Histogram::new_with_bounds(1, 60_000_000_000, 2)
                .unwrap_or_else(|_| unreachable!("the bounds are constant and right"))
        };
        let [match_ns, load_ns, request_ns] = std::array::from_fn(|_| new());
        Self { requests: 0, blocks_requested: 0, blocks_missed: 0, match_ns, load_ns, request_ns }
    }
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.blocks_requested += other.blocks_requested;
        self.blocks_missed += other.blocks_missed;
        for (ours, theirs) in [
            (&mut self.match_ns, &other.match_ns),
            (&mut self.load_ns, &other.load_ns),
            (&mut self.request_ns, &other.request_ns),
        ] {
            // Of the same bounds: what one holds the other can.
            let _ = ours.add(theirs);
        }
    }
}

/// Windows of a run, from its start on, all as long. There are never more than [`Windows::MAX`]: a run that lasts longer
/// has longer ones.
#[derive(Debug, Clone)]
pub struct Windows {
    /// Milliseconds of each.
    pub each_ms: u64,
    pub all: Vec<Window>,
}

impl Windows {
    /// Enough to tell a difference, and few enough to hold many requests each.
    const MAX: usize = 32;

    fn new() -> Self {
        Self { each_ms: 125, all: Vec::new() }
    }
    /// Which one is this moment's.
    fn at(&mut self, since_start: Duration) -> usize {
        loop {
            let at = (since_start.as_millis() as u64 / self.each_ms) as usize;
            if at < Self::MAX {
                while self.all.len() <= at {
                    self.all.push(Window::empty());
                }
                return at;
            }
            self.widen();
        }
    }
    fn widen(&mut self) {
        self.each_ms *= 2;
        let pairs = self.all.chunks(2).map(|two| {
            let mut one = two[0].clone();
            two[1..].iter().for_each(|other| one.add(other));
            one
        });
        self.all = pairs.collect();
    }
    /// What another instance has done in the same spans.
    pub fn add(&mut self, mut other: Self) {
        while self.each_ms != other.each_ms {
            if self.each_ms < other.each_ms { self.widen() } else { other.widen() }
        }
        for (at, window) in other.all.iter().enumerate() {
            if at == self.all.len() {
                self.all.push(Window::empty());
            }
            self.all[at].add(window);
        }
    }

    fn told(&self) -> Result<ToldWindows, Box<dyn std::error::Error>> {
        let of = |window: &Window| -> Result<ToldWindow, Box<dyn std::error::Error>> {
            let counts = [window.requests, window.blocks_requested, window.blocks_missed];
            Ok(ToldWindow(counts, [to_hex(&window.match_ns)?, to_hex(&window.load_ns)?, to_hex(&window.request_ns)?]))
        };
        Ok(ToldWindows { each_ms: self.each_ms, all: self.all.iter().map(of).collect::<Result<_, _>>()? })
    }
    /// What an instance has told.
    pub fn from_told(told: &ToldWindows) -> Result<Self, Box<dyn std::error::Error>> {
        let of = |ToldWindow(counts, hex): &ToldWindow| -> Result<Window, Box<dyn std::error::Error>> {
            let [requests, blocks_requested, blocks_missed] = *counts;
            let [match_ns, load_ns, request_ns] = [from_hex(&hex[0])?, from_hex(&hex[1])?, from_hex(&hex[2])?];
            Ok(Window { requests, blocks_requested, blocks_missed, match_ns, load_ns, request_ns })
        };
        Ok(Self { each_ms: told.each_ms.max(1), all: told.all.iter().map(of).collect::<Result<_, _>>()? })
    }
}

/// [`Windows`] on a line: each the counts of requests, blocks asked for and blocks missed, and three histograms.
#[derive(Debug, Serialize, Deserialize)]
pub struct ToldWindows {
    each_ms: u64,
    all: Vec<ToldWindow>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ToldWindow([u64; 3], [String; 3]);

/// One line of an instance.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// Attached, or not; requests start now.
    Ready,
    /// Requests done so far.
    Progress(u64),
    /// All done.
    Result {
        /// Counts.
        counts: Counts,
        /// Histogram of match latencies in ns, V2, in hex.
        match_ns: String,
        /// Of load latencies.
        load_ns: String,
        /// Of whole requests, from when each was due.
        request_ns: String,
        /// The same, span by span.
        windows: ToldWindows,
    },
}

fn say(said: &Said) -> Result<(), Box<dyn std::error::Error>> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(said)?)?;
    out.flush()?;
    Ok(())
}

/// Latencies up to a minute, three digits.
pub fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3)
        .unwrap_or_else(|_| unreachable!("the bounds are constant and right"))
}

fn to_hex(histogram: &Histogram<u64>) -> Result<String, Box<dyn std::error::Error>> {
    let mut bytes = Vec::new();
    V2Serializer::new().serialize(histogram, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What [`to_hex`] wrote.
pub fn from_hex(text: &str) -> Result<Histogram<u64>, Box<dyn std::error::Error>> {
    let digits = |i: usize| text.get(i..i + 2).ok_or("an odd number of digits");
    let bytes = (0..text.len()).step_by(2).map(|i| Ok(u8::from_str_radix(digits(i)?, 16)?));
    let bytes = bytes.collect::<Result<Vec<u8>, Box<dyn std::error::Error>>>()?;
    Ok(Deserializer::new().deserialize(&mut bytes.as_slice())?)
}

/// The bytes of a block, from its key: every word depends on key and place.
pub fn fill(key: BlockKey, block: &mut [u8]) {
    let [low, high] = key.to_words();
    let (words, rest) = block.as_chunks_mut::<8>();
    for (place, word) in (0u64..).zip(words) {
        *word = word_at(low, high, place).to_le_bytes();
    }
    rest.fill(low as u8);
}

/// Whether a block holds exactly what [`fill`] writes for its key.
pub fn is_exact(key: BlockKey, block: &[u8]) -> bool {
    let [low, high] = key.to_words();
    let (words, rest) = block.as_chunks::<8>();
    let wrong = (0u64..)
        .zip(words)
        .fold(0, |wrong, (place, word)| wrong | (u64::from_le_bytes(*word) ^ word_at(low, high, place)));
    wrong == 0 && rest.iter().all(|byte| *byte == low as u8)
}

fn word_at(low: u64, high: u64, place: u64) -> u64 {
    (low ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(high | 1)
}

/// Blocks moved in one call: bounds the instance's memory.
const CHUNK: usize = 64;

/// Replays this instance's share.
pub fn run(args: &WorkerArgs) -> Outcome {
    // A replay that is killed leaves no instance behind.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    let spec: Spec = serde_json::from_str(&args.spec)?;
    let config = args.settings.load()?.config;
    // A load may wait for the disk behind other loads: longer than a scheduler would.
    let load_wait = config.client_wait.max(Duration::from_secs(10));
    let requests: Vec<_> = spec.all_requests()?.into_iter().skip(spec.index).step_by(spec.of).collect();
    let instance = Instance::open(config, Layout::opaque(spec.block_bytes), 0)?;
    let mut replay = Replay {
        agent: DirectAgent::new(instance, HostMemory::new(CHUNK, spec.block_bytes as usize)),
        counts: Counts::default(),
        match_ns: new_histogram(),
        load_ns: new_histogram(),
        request_ns: new_histogram(),
        windows: Windows::new(),
        window: 0,
        load_wait,
        beside: Duration::ZERO,
    };
    say(&Said::Ready)?;
    // All begin at one moment; without anybody who says so, at once.
    let _ = std::io::stdin().read_line(&mut String::new());
    let started = Instant::now();
    let mut told = started;
    for (done, request) in (1..).zip(&requests) {
        let mut due = started.elapsed();
        if spec.speed > 0.0 {
            // What comes late because the one before it took long is late all the same: its time counts from when
            // it was due (coordinated omission is not omitted).
            due = Duration::from_secs_f64(request.timestamp_us as f64 / 1e6 / spec.speed);
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
        replay.beside = Duration::ZERO;
        replay.window = replay.windows.at(started.elapsed());
        replay.request(&trace::keys(request));
        // To make and to compare bytes is the measurement's work, not the cache's.
        let took = started.elapsed().saturating_sub(due + replay.beside);
        replay.counts.beside_us += replay.beside.as_micros() as u64;
        replay.request_ns.saturating_record(took.as_nanos() as u64);
        replay.window().request_ns.saturating_record(took.as_nanos() as u64);
        if told.elapsed() > Duration::from_millis(100) {
            told = Instant::now();
            say(&Said::Progress(done))?;
        }
    }
    replay.counts.sessions = u64::from(replay.agent.instance().sessions_count());
    say(&Said::Result {
        counts: replay.counts,
        match_ns: to_hex(&replay.match_ns)?,
        load_ns: to_hex(&replay.load_ns)?,
        request_ns: to_hex(&replay.request_ns)?,
        windows: replay.windows.told()?,
    })
}

struct Replay {
    agent: DirectAgent<HostMemory>,
    counts: Counts,
    match_ns: Histogram<u64>,
    load_ns: Histogram<u64>,
    request_ns: Histogram<u64>,
    windows: Windows,
    /// The one in which this request began.
    window: usize,
    load_wait: Duration,
    /// What this request has spent on making and comparing bytes.
    beside: Duration,
}

impl Replay {
    fn window(&mut self) -> &mut Window {
        &mut self.windows.all[self.window]
    }

    fn request(&mut self, keys: &[BlockKey]) {
        self.counts.requests += 1;
        self.counts.blocks_requested += keys.len() as u64;
        self.counts.requests_without_server += u64::from(!self.agent.instance().is_connected());
        let started = Instant::now();
        let matched = self.agent.match_prefix(keys);
        let took = started.elapsed().as_nanos() as u64;
        self.match_ns.saturating_record(took);
        self.window().match_ns.saturating_record(took);
        let mut hit = 0;
        if let Some(lease) = matched.lease {
            let total = matched.blocks as usize;
            let mut whole = true;
            for (chunk, first) in keys[..total].chunks(CHUNK).zip((0..).step_by(CHUNK)) {
                let loaded = self.load(lease, first, chunk);
                // The prefix ends with the first block that did not come.
                hit += if whole { loaded } else { 0 };
                whole &= loaded == chunk.len();
            }
        }
        self.counts.blocks_missed += (keys.len() - hit) as u64;
        let window = self.window();
        window.requests += 1;
        window.blocks_requested += keys.len() as u64;
        window.blocks_missed += (keys.len() - hit) as u64;
        self.store(keys, hit);
        if let Some(lease) = matched.lease {
            self.agent.instance().release(lease);
        }
    }

    /// Loads and compares. Says how many leading blocks of the chunk came.
    fn load(&mut self, lease: kvring_ipc::client::Lease, first: usize, keys: &[BlockKey]) -> usize {
        let blocks: Vec<usize> = (0..keys.len()).collect();
        let mut arrived = vec![false; keys.len()];
        let started = Instant::now();
        let loaded =
            self.agent.load(lease, first as u32, keys, &blocks, self.load_wait, |_, index| arrived[index] = true);
        let took = started.elapsed().as_nanos() as u64;
        self.load_ns.saturating_record(took);
        self.window().load_ns.saturating_record(took);
        self.counts.blocks_hit_dram += u64::from(loaded.blocks_dram);
        self.counts.blocks_hit_ssd += u64::from(loaded.blocks_ssd);
        self.counts.blocks_unloaded += u64::from(loaded.blocks_missed);
        let compares = Instant::now();
        for (index, key) in keys.iter().enumerate().filter(|(index, _)| arrived[*index]) {
            let exact = is_exact(*key, self.agent.backend().block(index));
            self.counts.wrong_blocks += u64::from(!exact);
        }
        self.beside += compares.elapsed();
        arrived.iter().take_while(|arrived| **arrived).count()
    }

    fn store(&mut self, keys: &[BlockKey], from: usize) {
        let mut parent = if from == 0 { super::trace::namespace().id() } else { keys[from - 1] };
        for (chunk, first) in keys[from..].chunks(CHUNK).zip((from..).step_by(CHUNK)) {
            let blocks: Vec<usize> = (0..chunk.len()).collect();
            let mut makes = Duration::ZERO;
            let compute = |memory: &mut HostMemory, index: usize| {
                let from = Instant::now();
                fill(chunk[index], memory.block_mut(index));
                makes += from.elapsed();
            };
            let stored = self.agent.store(parent, first as u32, chunk, &blocks, compute);
            self.beside += makes;
            self.counts.blocks_stored += u64::from(stored.blocks_stored);
            self.counts.blocks_present += u64::from(stored.blocks_present);
            self.counts.blocks_dropped += u64::from(stored.blocks_dropped);
            parent = chunk[chunk.len() - 1];
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn spans_grow_with_the_run_and_lose_nothing() {
        let play = |requests: u64, each_ms: u64| {
            let mut windows = Windows::new();
            for n in 0..requests {
                let at = windows.at(Duration::from_millis(n * each_ms));
                let window = &mut windows.all[at];
                (window.requests, window.blocks_requested) = (window.requests + 1, window.blocks_requested + 3);
                window.match_ns.saturating_record(1000 * (n + 1));
            }
            windows
        };
        let (short, long) = (play(10, 100), play(1000, 90));
        assert_eq!((short.each_ms, short.all.len()), (125, 8));
        assert_eq!((long.each_ms, long.all.len()), (4000, 23));
        let told = serde_json::to_string(&short.told().unwrap()).unwrap();
        let short = Windows::from_told(&serde_json::from_str(&told).unwrap()).unwrap();
        let sums = |windows: &Windows| {
            windows.all.iter().fold((0, 0, 0), |(requests, blocks, times), window| {
                (requests + window.requests, blocks + window.blocks_requested, times + window.match_ns.len())
            })
        };
        for (mut one, other) in [(short.clone(), long.clone()), (long, short)] {
            one.add(other);
            assert_eq!((one.each_ms, sums(&one)), (4000, (1010, 3030, 1010)));
            assert_eq!(one.all[0].requests, 10 + 45);
        }
    }

    #[test]
    fn a_block_of_another_key_or_with_a_flipped_bit_is_not_exact() {
        let key = |n| BlockKey::from_words([n, n ^ 77]);
        let mut block = vec![0; 4099];
        fill(key(1), &mut block);
        assert!(is_exact(key(1), &block) && !is_exact(key(2), &block));
        for at in [0, 7, 2048, 4095, 4098] {
            block[at] ^= 0x10;
            assert!(!is_exact(key(1), &block));
            block[at] ^= 0x10;
        }
    }
}
