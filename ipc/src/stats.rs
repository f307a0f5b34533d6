//! The stats segment: what a server counts and has done last, in memory that others read (WIRE.md §10).
//!
//! One sealed memfd for each engine process, written by it alone, read by `kvring stat`, `top`, `explain` and
//! the metrics endpoint at their own pace: a reader costs the writer nothing, and finds what was written last
//! when the writer is hung. The keeper holds it too, and the one of the engine process before: what that did
//! last can be read after its death.
//!
//! Counters are words, each written by one thread with a load and a store. A row is a handful of them: its
//! words are each right, and not of one moment. The segment names what it holds ([`Names`]), so a reader of another
//! version shows what it knows and counts nothing as something else.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::SealFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::mapping::{Mapping, Pages, is_sealed, sealed_memfd_with};
use crate::recorder::{ENTRY_BYTES, Recorder, Recording};
use crate::sync::{AtomicU64, Ordering};

const MAGIC: u64 = u64::from_le_bytes(*b"KVRSTATS");
/// 2: two blocks may share an entry of the recorder; 1 is read as well.
const VERSION: u64 = 2;

/// Most of each: a segment is a little over 1 MiB without its recorder.
pub const COUNTERS_MAX: usize = 256;
/// Sessions, each in a row of its own.
pub const SESSION_ROWS: usize = 576;
/// Devices, each in a row of its own.
pub const DEVICE_ROWS: usize = 64;
/// Histograms.
pub const HISTOGRAMS_MAX: usize = 256;
/// Words of a device's row.
pub const DEVICE_WORDS: usize = 32;
/// Words of a session's row.
pub const SESSION_WORDS: usize = 64;
/// Where in a session's row its small histogram of loads begins: one word for each doubling from 1 µs on.
pub const SESSION_HISTOGRAM: usize = 32;

const TEXT_BYTES_MAX: usize = 60 << 10;
const TEXT: usize = 4096;
const COUNTERS: usize = TEXT + TEXT_BYTES_MAX;
const SESSIONS: usize = COUNTERS + COUNTERS_MAX * 8;
const DEVICES: usize = SESSIONS + SESSION_ROWS * SESSION_WORDS * 8;
const HISTOGRAMS: usize = DEVICES + DEVICE_ROWS * DEVICE_WORDS * 8;
const RECORDER: usize = (HISTOGRAMS + HISTOGRAMS_MAX * HISTOGRAM_WORDS * 8).next_multiple_of(4096);

/// Buckets of a histogram: eight for each doubling, up to 2^40 ns, which is 18 minutes.
pub const BUCKETS: usize = 304;
const HISTOGRAM_WORDS: usize = 320;
/// The sum of all values stands before the buckets.
const FIRST_BUCKET: usize = 8;

/// Words of the first page.
#[derive(Debug, Clone, Copy)]
enum Head {
    Magic = 0,
    Version = 1,
    RecorderEntries = 2,
    TextBytes = 3,
    Epoch = 4,
    Pid = 5,
    StartedTicks = 6,
    StartedNs = 7,
    /// Unix time of monotonic 0, in nanoseconds.
    RealtimeOffsetNs = 8,
    State = 16,
    HeartbeatNs = 17,
    SleepsUntilNs = 18,
}

/// What an engine process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerState {
    /// Serving, or it died while it was.
    Serving = 0,
    /// It has stopped.
    Stopped = 1,
    /// It has handed over to another.
    HandedOver = 2,
}

/// What one histogram is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistogramName {
    /// Its name as a metric, without unit.
    pub name: String,
    /// What tells it from others of that name.
    pub labels: Vec<(String, String)>,
}

/// What a segment holds, in the order of its words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// Counters and gauges of the shard, each with its one line.
    pub counters: Vec<(String, String)>,
    /// Which of them fall as well as rise.
    pub gauges: Vec<String>,
    /// Columns of a session's row.
    pub session: Vec<String>,
    /// Columns of a device's row.
    pub device: Vec<String>,
    /// Histograms, of nanoseconds.
    pub histograms: Vec<HistogramName>,
}

/// What a segment says of its server in words.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Text {
    /// See [`Names`].
    pub names: Names,
    /// Version of the server.
    pub version: String,
    /// Its control socket.
    pub socket: String,
    /// Its keeper.
    pub keeper_pid: u32,
    /// Every setting by name.
    pub settings: std::collections::BTreeMap<String, String>,
    /// What blocks look like.
    pub layout: serde_json::Value,
    /// Bytes of a slot, and of a page of the pool.
    pub slot_bytes: u64,
    /// See `slot_bytes`.
    pub page_bytes: u64,
    /// What each device is, in its row's order.
    pub devices: Vec<String>,
}

/// A stats segment, on either side.
#[derive(Debug, Clone)]
pub struct Stats {
    mapping: Arc<Mapping>,
    /// As they were when that was checked.
    recorder_entries: u64,
}

impl Stats {
    /// A new segment whose recorder holds this many entries (a power of two, or none), and the descriptor for readers:
    /// nobody else can map it for writing.
    ///
    /// # Errors
    /// What the kernel says of memfd_create, mmap or the seals; `ENOMEM` if there is no memory for it.
    pub fn create(name: &str, recorder_entries: usize) -> rustix::io::Result<(Self, OwnedFd)> {
        assert!(recorder_entries == 0 || recorder_entries.is_power_of_two());
        let bytes = RECORDER + recorder_entries * ENTRY_BYTES;
        let (fd, mapping) = sealed_memfd_with(name, bytes as u64, Pages::Small, |fd| {
            let mapping = Mapping::new(fd, bytes)?;
            rustix::fs::fcntl_add_seals(fd, SealFlags::FUTURE_WRITE)?;
            Ok(mapping)
        })?;
        // No page fault where requests wait. Before Linux 5.14 they come one by one.
        match mapping.populate(0, bytes) {
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => return Err(errno),
        }
        let stats = Self { mapping: Arc::new(mapping), recorder_entries: recorder_entries as u64 };
        stats.say(recorder_entries);
        Ok((stats, fd))
    }

    /// A segment that nobody reads, for tests and simulations.
    ///
    /// # Errors
    /// What mmap says.
    pub fn private(recorder_entries: usize) -> rustix::io::Result<Self> {
        let mapping = Mapping::private(RECORDER + recorder_entries * ENTRY_BYTES)?;
        let stats = Self { mapping: Arc::new(mapping), recorder_entries: recorder_entries as u64 };
        stats.say(recorder_entries);
        Ok(stats)
    }

    fn say(&self, recorder_entries: usize) {
        self.set(Head::RecorderEntries, recorder_entries as u64);
        self.set(Head::Version, VERSION);
    }

    /// The segment behind a descriptor.
    ///
    /// # Errors
    /// In words: it is no stats segment, or one of another version.
    pub fn open(fd: impl AsFd) -> Result<Self, String> {
        let bytes = rustix::fs::fstat(&fd).map_err(|errno| errno.to_string())?.st_size;
        let bytes = usize::try_from(bytes).unwrap_or(0);
        if bytes < RECORDER || !is_sealed(&fd, bytes as u64).unwrap_or(false) {
            return Err("it is no stats segment".into());
        }
        let mapping = Mapping::new_read_only(&fd, bytes).map_err(|errno| errno.to_string())?;
        let mut stats = Self { mapping: Arc::new(mapping), recorder_entries: 0 };
        let (magic, version) = (stats.get(Head::Magic), stats.get(Head::Version));
        if magic != MAGIC {
            return Err("its server is only starting".into());
        }
        if !(1..=VERSION).contains(&version) {
            return Err(format!(
                "it is of version {version}, this program reads 1 to {VERSION}: use the server's kvring"
            ));
        }
        let entries = stats.get(Head::RecorderEntries) as usize;
        let fits = (entries == 0 || entries.is_power_of_two())
            && entries.checked_mul(ENTRY_BYTES).is_some_and(|recorder| recorder <= bytes - RECORDER);
        if !fits || stats.get(Head::TextBytes) > TEXT_BYTES_MAX as u64 {
            return Err("its sizes make no sense".into());
        }
        stats.recorder_entries = entries as u64;
        Ok(stats)
    }

    fn head(&self, at: Head) -> &AtomicU64 {
        &self.mapping.words64(at as usize * 8, 1)[0]
    }
    fn get(&self, at: Head) -> u64 {
        self.head(at).load(Ordering::Acquire)
    }
    fn set(&self, at: Head, value: u64) {
        self.head(at).store(value, Ordering::Release);
    }

    /// Says whose it is, and that it can be read from now on.
    ///
    /// # Errors
    /// The text is too long: the settings' values are then left out of it by the caller.
    pub fn begin(&self, text: &Text, epoch: u64, now_ns: u64, realtime_ns: u64) -> Result<(), usize> {
        let json = serde_json::to_vec(text).unwrap_or_default();
        if json.len() > TEXT_BYTES_MAX {
            return Err(json.len());
        }
        self.mapping.copy_in(TEXT, &json);
        let pid = std::process::id();
        self.set(Head::TextBytes, json.len() as u64);
        self.set(Head::Epoch, epoch);
        self.set(Head::Pid, u64::from(pid));
        self.set(Head::StartedTicks, crate::peer::started_ticks(pid as i32).unwrap_or(0));
        self.set(Head::StartedNs, now_ns);
        self.set(Head::RealtimeOffsetNs, realtime_ns.saturating_sub(now_ns));
        self.set(Head::HeartbeatNs, now_ns);
        // Last: a reader that sees it sees all of the above.
        self.set(Head::Magic, MAGIC);
        Ok(())
    }

    /// What it says in words.
    ///
    /// # Errors
    /// It makes no sense.
    pub fn text(&self) -> Result<Text, String> {
        let mut json = vec![0; (self.get(Head::TextBytes) as usize).min(TEXT_BYTES_MAX)];
        self.mapping.copy_out(TEXT, &mut json);
        serde_json::from_slice(&json).map_err(|error| format!("its text makes no sense: {error}"))
    }

    /// Which engine process it is of: its epoch, its id, and when it was started, in ticks since boot.
    pub fn owner(&self) -> (u64, u32, u64) {
        (self.get(Head::Epoch), self.get(Head::Pid) as u32, self.get(Head::StartedTicks))
    }
    /// When it began to serve, in monotonic nanoseconds.
    pub fn started_ns(&self) -> u64 {
        self.get(Head::StartedNs)
    }
    /// Unix time of a moment of the segment, in nanoseconds.
    pub fn realtime_ns(&self, monotonic_ns: u64) -> u64 {
        self.get(Head::RealtimeOffsetNs).saturating_add(monotonic_ns)
    }

    /// What the server does.
    pub fn state(&self) -> ServerState {
        match self.get(Head::State) {
            0 => ServerState::Serving,
            2 => ServerState::HandedOver,
            _ => ServerState::Stopped,
        }
    }
    /// Says it.
    pub fn set_state(&self, state: ServerState) {
        self.set(Head::State, state as u64);
    }

    /// The shard is alive at `now_ns`, and sleeps until `sleeps_until_ns` at the latest unless that is 0.
    pub fn beat(&self, now_ns: u64, sleeps_until_ns: u64) {
        self.head(Head::HeartbeatNs).store(now_ns, Ordering::Relaxed);
        self.head(Head::SleepsUntilNs).store(sleeps_until_ns, Ordering::Relaxed);
    }
    /// When the shard last said that it is alive, and until when it said that it sleeps.
    pub fn heartbeat(&self) -> (u64, u64) {
        (self.get(Head::HeartbeatNs), self.get(Head::SleepsUntilNs))
    }

    /// Counters, in the order of their names.
    pub fn counters(&self) -> &[AtomicU64] {
        self.mapping.words64(COUNTERS, COUNTERS_MAX)
    }
    /// A session's row. Its first word is 1 while there is one.
    #[inline]
    pub fn session(&self, at: usize) -> &[AtomicU64] {
        assert!(at < SESSION_ROWS);
        self.mapping.words64(SESSIONS + at * SESSION_WORDS * 8, SESSION_WORDS)
    }
    /// A device's row.
    #[inline]
    pub fn device(&self, at: usize) -> &[AtomicU64] {
        assert!(at < DEVICE_ROWS);
        self.mapping.words64(DEVICES + at * DEVICE_WORDS * 8, DEVICE_WORDS)
    }
    /// A histogram.
    #[inline]
    pub fn histogram(&self, at: usize) -> Histogram<'_> {
        assert!(at < HISTOGRAMS_MAX);
        Histogram { words: self.mapping.words64(HISTOGRAMS + at * HISTOGRAM_WORDS * 8, HISTOGRAM_WORDS) }
    }

    /// The flight recorder, to write.
    pub fn recorder(&self) -> Recorder {
        Recorder::new(self.mapping.clone(), RECORDER, self.recorder_entries)
    }
    /// The flight recorder, to read.
    pub fn recording(&self) -> Recording {
        Recording::new(self.mapping.clone(), RECORDER, self.recorder_entries)
    }
}

/// Which word of a session's small histogram a load belongs to.
#[inline]
pub fn session_bucket(ns: u64) -> usize {
    ((ns / 1000 + 1).ilog2() as usize).min(SESSION_WORDS - SESSION_HISTOGRAM - 1)
}

/// Adds to a word that only this thread writes.
#[inline]
pub fn add(word: &AtomicU64, count: u64) {
    word.store(word.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

/// A histogram in a segment.
#[derive(Debug, Clone, Copy)]
pub struct Histogram<'a> {
    words: &'a [AtomicU64],
}

/// Which bucket a value belongs to.
#[inline]
fn bucket(ns: u64) -> usize {
    if ns < 8 {
        return ns as usize;
    }
    let octave = ns.ilog2() as usize;
    ((octave - 2) * 8 + (ns >> (octave - 3)) as usize % 8).min(BUCKETS - 1)
}

/// The largest value of a bucket.
pub fn bucket_end_ns(bucket: usize) -> u64 {
    if bucket < 8 {
        return bucket as u64;
    }
    let (octave, part) = (bucket / 8 + 2, bucket as u64 % 8);
    ((8 + part + 1) << (octave - 3)) - 1
}

impl Histogram<'_> {
    /// Counts one value.
    #[inline]
    pub fn record(&self, ns: u64) {
        add(&self.words[0], ns);
        add(&self.words[FIRST_BUCKET + bucket(ns)], 1);
    }

    /// A copy of all of it.
    pub fn snapshot(&self) -> Snapshot {
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        Snapshot {
            sum_ns: load(&self.words[0]),
            buckets: self.words[FIRST_BUCKET..FIRST_BUCKET + BUCKETS].iter().map(load).collect(),
        }
    }
}

/// A histogram as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Of all values.
    pub sum_ns: u64,
    /// Values in each bucket.
    pub buckets: Vec<u64>,
}

impl Snapshot {
    /// How many values.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
    /// The value below which `quantile` of all are, to an eighth; None without any.
    pub fn quantile_ns(&self, quantile: f64) -> Option<u64> {
        let count = self.count();
        let wanted = ((count as f64 * quantile).ceil() as u64).clamp(1, count.max(1));
        let mut below = 0;
        let found = self.buckets.iter().position(|values| {
            below += values;
            below >= wanted
        });
        found.map(bucket_end_ns)
    }
    /// What was added since an earlier one.
    pub fn since(&self, earlier: &Self) -> Self {
        let past = earlier.buckets.iter().chain(std::iter::repeat(&0));
        Self {
            sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns),
            buckets: self.buckets.iter().zip(past).map(|(now, then)| now.saturating_sub(*then)).collect(),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_value_is_in_a_bucket_that_ends_at_most_an_eighth_above_it() {
        for value in (0..4096).chain((12..39).flat_map(|shift| [(1u64 << shift) - 1, 1 << shift, (1 << shift) + 1])) {
            let end = bucket_end_ns(bucket(value));
            assert!(end >= value && end - value <= value / 8, "{value} in a bucket that ends at {end}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert!((1..BUCKETS).all(|at| bucket(bucket_end_ns(at)) == at), "a bucket's end is in it");
    }

    #[test]
    fn quantiles_are_of_what_was_recorded_since() {
        let stats = Stats::private(0).unwrap();
        let histogram = stats.histogram(3);
        assert_eq!(histogram.snapshot().quantile_ns(0.5), None);
        (0..100).for_each(|_| histogram.record(1_000_000));
        let before = histogram.snapshot();
        (1..=100).for_each(|us| histogram.record(us * 1000));
        let since = histogram.snapshot().since(&before);
        assert_eq!((since.count(), since.sum_ns), (100, 5_050_000));
        let p50 = since.quantile_ns(0.5).unwrap();
        assert!((50_000..57_000).contains(&p50), "{p50}");
        assert!(since.quantile_ns(1.0).unwrap() < 113_000);
        assert_eq!(stats.histogram(2).snapshot().count(), 0, "each has words of its own");
    }

    #[test]
    fn a_reader_sees_what_was_written_and_can_write_nothing() {
        let (stats, fd) = Stats::create("test-stats", 64).unwrap();
        assert_eq!(Stats::open(&fd).unwrap_err(), "its server is only starting");
        let text = Text { version: "7".into(), ..Text::default() };
        stats.begin(&text, 3, 1000, 5000).unwrap();
        stats.counters()[2].store(9, Ordering::Relaxed);
        stats.session(SESSION_ROWS - 1)[31].store(8, Ordering::Relaxed);
        stats.device(0)[1].store(7, Ordering::Relaxed);
        stats.beat(2000, 0);
        let reader = Stats::open(&fd).unwrap();
        assert_eq!(reader.text().unwrap().version, "7");
        assert_eq!((reader.owner().0, reader.owner().1, reader.realtime_ns(2000)), (3, std::process::id(), 6000));
        let words = [&reader.counters()[2], &reader.session(SESSION_ROWS - 1)[31], &reader.device(0)[1]];
        assert_eq!(words.map(|word| word.load(Ordering::Relaxed)), [9, 8, 7]);
        assert_eq!((reader.heartbeat(), reader.state()), ((2000, 0), ServerState::Serving));
        assert_eq!(Mapping::new(&fd, 4096).unwrap_err(), Errno::PERM);
        for (version, is_read) in [(0, false), (1, true), (2, true), (3, false)] {
            stats.set(Head::Version, version);
            assert_eq!(Stats::open(&fd).is_ok(), is_read, "version {version}");
        }
        let other = crate::mapping::sealed_memfd("other", 8 << 20, Pages::Small).unwrap();
        assert!(Stats::open(&other).is_err());
    }
}
