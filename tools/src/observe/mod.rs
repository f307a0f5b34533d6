//! What a server shows in its stats segment, read without its help: `kvring stat`, `top`, `sessions`, `devices`,
//! `explain` and `trace`. A server that hangs, or an engine process that died, is read like one that serves.

pub mod explain;
pub mod stat;
pub mod top;
pub mod trace;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use kvring_ipc::client::monotonic_ns;
use kvring_ipc::handshake::{ChannelError, Reply, Request, ask_for_fds};
use kvring_ipc::launch::beside_socket;
use kvring_ipc::peer::started_ticks;
use kvring_ipc::stats::{
    DEVICE_ROWS, HISTOGRAMS_MAX, HistogramName, SESSION_HISTOGRAM, SESSION_ROWS, ServerState, Snapshot, Stats, Text,
};
use rustix::io::Errno;
use serde_json::{Value, json};

/// How long a server is asked for its segment before that is looked for where the kernel shows it.
const PATIENCE: Duration = Duration::from_millis(500);
/// A shard that is awake shows itself once a millisecond; one that sleeps wakes when it has said.
const HUNG_AFTER_NS: u64 = 2_000_000_000;

/// A server's segment, and what it says of itself.
#[derive(Clone)]
pub struct Server {
    /// The segment.
    pub stats: Stats,
    /// What it says in words.
    pub text: Text,
}

/// Which engine process is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The one that serves.
    Current,
    /// The one before it.
    Previous,
}

impl Server {
    /// Finds the segment: asks the server, and if that does not answer, looks at what its keeper holds.
    pub fn find(socket: &Path, which: Which) -> Result<Self, String> {
        let asked = match which {
            Which::Current => ask_for_fds(socket, &Request::StatsSegment, PATIENCE),
            Which::Previous => ask_for_fds(socket, &Request::Stats, PATIENCE),
        };
        let stats = match asked {
            Ok((Reply::StatsSegment, fds)) => {
                let fd = fds.into_iter().next().ok_or("the server sent no descriptor")?;
                Stats::open(&fd)?
            }
            Ok((Reply::Stats(told), _)) => held_by_processes(socket, which, told["epoch"].as_u64())?,
            Ok((Reply::Refused { reason, .. }, _)) => return Err(reason),
            Ok((reply, _)) => return Err(format!("an unexpected answer: {reply:?}")),
            // Whoever is kept out of the socket is told so.
            Err(ChannelError::System(errno @ (Errno::ACCESS | Errno::PERM))) => {
                return Err(format!("{}: {}", socket.display(), std::io::Error::from(errno)));
            }
            Err(_) => held_by_processes(socket, which, None)?,
        };
        let text = stats.text()?;
        Ok(Self { stats, text })
    }

    /// Whether its process lives and moves.
    pub fn health(&self) -> Health {
        let (_, pid, ticks) = self.stats.owner();
        match self.stats.state() {
            ServerState::Stopped => return Health::Stopped,
            ServerState::HandedOver => return Health::HandedOver,
            ServerState::Serving => {}
        }
        if started_ticks(pid as i32) != Some(ticks) {
            return Health::Died;
        }
        let (beat_ns, sleeps_until_ns) = self.stats.heartbeat();
        let due_ns = beat_ns.max(sleeps_until_ns).saturating_add(HUNG_AFTER_NS);
        let now_ns = monotonic_ns();
        if process_state(pid) == Some('T') {
            return Health::Halted;
        }
        if now_ns > due_ns { Health::Hung { for_ns: now_ns - beat_ns.max(sleeps_until_ns) } } else { Health::Serving }
    }

    /// On standard error: what is read of one that hangs is what it last wrote.
    pub fn say_if_it_hangs(&self) {
        let health = self.health();
        if matches!(health, Health::Halted | Health::Hung { .. }) {
            eprintln!("note: {health}: this is what it wrote before");
        }
    }

    /// All that it shows, as it is now.
    pub fn sample(&self) -> Sample {
        let load = |word: &std::sync::atomic::AtomicU64| word.load(std::sync::atomic::Ordering::Relaxed);
        let names = &self.text.names;
        let row = |columns: &[String], words: &[std::sync::atomic::AtomicU64]| -> Row {
            columns.iter().zip(words).map(|(name, word)| (name.clone(), load(word))).collect()
        };
        let sessions = (0..SESSION_ROWS).map(|at| self.stats.session(at)).filter(|words| load(&words[0]) == 1);
        let sessions = sessions.map(|words| Session {
            row: row(&names.session, words),
            loads: words[SESSION_HISTOGRAM..].iter().map(load).collect(),
        });
        let devices = (0..self.text.devices.len().min(DEVICE_ROWS)).map(|at| row(&names.device, self.stats.device(at)));
        let histograms = names
            .histograms
            .iter()
            .enumerate()
            .take(HISTOGRAMS_MAX)
            .map(|(at, name)| (name.clone(), self.stats.histogram(at).snapshot()));
        let at = Instant::now();
        Sample {
            at,
            counters: row(
                &names.counters.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(),
                self.stats.counters(),
            ),
            sessions: sessions.collect(),
            devices: devices.collect(),
            histograms: histograms.collect(),
        }
    }
}

/// Named words.
pub type Row = BTreeMap<String, u64>;

/// One session.
#[derive(Debug, Clone, Default)]
pub struct Session {
    /// Its columns.
    pub row: Row,
    /// Its loads by duration: one word for each doubling from 1 µs on.
    pub loads: Vec<u64>,
}

/// All that a server showed at one moment.
#[derive(Debug, Clone)]
pub struct Sample {
    /// When.
    pub at: Instant,
    /// Counters and gauges.
    pub counters: Row,
    /// Sessions that are attached.
    pub sessions: Vec<Session>,
    /// Devices, in order.
    pub devices: Vec<Row>,
    /// Latencies.
    pub histograms: Vec<(HistogramName, Snapshot)>,
}

impl Sample {
    /// A counter; 0 if this server has none of the name.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }
}

/// How an engine process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It serves.
    Serving,
    /// Its process is stopped by a signal.
    Halted,
    /// Its shard does not move.
    Hung {
        /// Since when it should have.
        for_ns: u64,
    },
    /// Its process died.
    Died,
    /// It was told to stop, and has.
    Stopped,
    /// It has handed over to another.
    HandedOver,
}

impl std::fmt::Display for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Serving => write!(f, "serving"),
            Self::Halted => write!(f, "HUNG: its process is stopped (SIGSTOP)"),
            Self::Hung { for_ns } => write!(f, "HUNG: its shard has not moved for {:.1} s", *for_ns as f64 / 1e9),
            Self::Died => write!(f, "DEAD: its process died while it served"),
            Self::Stopped => write!(f, "stopped"),
            Self::HandedOver => write!(f, "handed over to the next engine process"),
        }
    }
}

impl Health {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Halted | Self::Hung { .. } => "hung",
            Self::Died => "dead",
            Self::Stopped => "stopped",
            Self::HandedOver => "handed_over",
        }
    }
}

/// What the kernel says of a process: R, S, D, T, Z.
pub fn process_state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// The segment that the keeper of a socket holds, or the engine process that has outlived it: their descriptors are
/// in /proc for whoever may trace them (proc(5): PTRACE_MODE_READ). `serving` is the epoch of the one that serves, if that has
/// said so.
fn held_by_processes(socket: &Path, which: Which, serving: Option<u64>) -> Result<Stats, String> {
    let nobody = || format!("no server listens on {}", socket.display());
    // The lock is not tried: a server that starts right now would take us for another one.
    let pid = std::fs::read_to_string(beside_socket(socket, "lock")).map_err(|_| nobody())?;
    let pid: u32 = pid.trim().parse().map_err(|_| nobody())?;
    let Some(keeper) = memfds_of(pid) else {
        let lives = Path::new(&format!("/proc/{pid}")).exists();
        let unseen = "and its descriptors in /proc cannot be read: try as the server's user or as root";
        return Err(if lives {
            format!("process {pid}, which may be the server, does not answer, {unseen}")
        } else {
            nobody()
        });
    };
    // A number that was given again is somebody else's.
    if !keeper.iter().any(|(name, _)| name.starts_with("/memfd:kvring-epoch")) {
        return Err(nobody());
    }
    // A keeper of an earlier version holds no segment; its engine process does.
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let theirs = children.split_whitespace().filter_map(|child| memfds_of(child.parse().ok()?)).flatten();
    let mut found: Vec<Stats> = Vec::new();
    for (_, path) in keeper.into_iter().chain(theirs).filter(|(name, _)| name.starts_with("/memfd:kvring-stats")) {
        let opened = File::open(path).map_err(|error| error.to_string()).and_then(Stats::open);
        if let Ok(stats) = opened
            && found.iter().all(|other| other.owner() != stats.owner())
        {
            found.push(stats);
        }
    }
    found.sort_by_key(|stats| std::cmp::Reverse(stats.owner().0));
    let lives = |stats: &Stats| started_ticks(stats.owner().1 as i32) == Some(stats.owner().2);
    let current = found.iter().position(lives);
    let epoch = serving.or_else(|| found.get(current.unwrap_or(0)).map(|stats| stats.owner().0));
    let chosen = match which {
        Which::Current => current.or((!found.is_empty()).then_some(0)),
        Which::Previous => found.iter().position(|stats| epoch.is_some_and(|epoch| stats.owner().0 < epoch)),
    };
    chosen.map(|at| found.swap_remove(at)).ok_or_else(|| match which {
        Which::Current => "there is nothing to show: no worker has attached yet, or stats_segment = off".into(),
        Which::Previous => "there was no engine process before this one, or it had nothing to show".into(),
    })
}

/// The memory files that a process has open: their names, and where they can be opened.
fn memfds_of(pid: u32) -> Option<Vec<(String, std::path::PathBuf)>> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let named = entries.flatten().filter_map(|entry| {
        let name = std::fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned();
        name.starts_with("/memfd:").then(|| (name, entry.path()))
    });
    Some(named.collect())
}

/// A duration of nanoseconds as a person reads it.
pub fn short_ns(ns: u64) -> String {
    let ns = ns as f64;
    match ns {
        _ if ns < 1e3 => format!("{ns:.0} ns"),
        _ if ns < 1e6 => format!("{:.1} µs", ns / 1e3),
        _ if ns < 1e9 => format!("{:.1} ms", ns / 1e6),
        _ => format!("{:.1} s", ns / 1e9),
    }
}

/// Percentiles of a histogram, in microseconds.
fn latency(name: &HistogramName, snapshot: &Snapshot) -> Value {
    let us = |quantile| snapshot.quantile_ns(quantile).map(|ns| ns as f64 / 1e3);
    let count = snapshot.count();
    let labels: serde_json::Map<_, _> = name.labels.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    json!({
        "name": name.name,
        "labels": labels,
        "count": count,
        "mean_us": if count == 0 { None } else { Some(snapshot.sum_ns as f64 / count as f64 / 1e3) },
        "p50_us": us(0.5), "p90_us": us(0.9), "p99_us": us(0.99), "p999_us": us(0.999),
    })
}
