//! Counters of one shard. Written by it alone, read by whoever asks; each has one line of meaning. And what its
//! stats segment holds beside them.

use std::sync::atomic::{AtomicU64, Ordering};

use kvring_ipc::stats::{HistogramName, Names};

/// A count that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds. Only the shard does, so a load and a store suffice: no locked instruction.
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }
    /// Replaces: for gauges.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
    /// Reads.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! metrics {
    ($($name:ident: $doc:literal),* $(,)?) => {
        /// Everything a shard counts.
        #[derive(Debug, Default)]
        pub struct Metrics { $(#[doc = $doc] pub $name: Counter,)* }

        impl Metrics {
            /// Name, meaning and value of each.
            pub fn all(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($name), $doc, self.$name.get()),)*]
            }

            /// Copies all values, in their order.
            pub fn copy_to(&self, words: &[AtomicU64]) {
                let values = [$(&self.$name,)*];
                for (word, value) in words.iter().zip(values) {
                    word.store(value.get(), Ordering::Relaxed);
                }
            }
        }
    };
}

macro_rules! columns {
    ($(#[$doc:meta])* $name:ident: $($column:ident = $text:literal),* $(,)?) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[expect(missing_docs, reason = "the names are what a reader sees; docs/OPERATIONS.md explains each")]
        pub enum $name { $($column,)* }

        impl $name {
            /// Names, in order.
            pub const NAMES: &'static [&'static str] = &[$($text,)*];
        }
    };
}

columns! {
    /// Words of a session's row. Counts begin with the session.
    SessionColumn:
    Live = "live",
    Session = "session",
    InstanceId = "instance_id",
    Pid = "pid",
    Rank = "rank",
    AttachedNs = "attached_ns",
    Matches = "matches_count",
    BlocksRequested = "match_blocks_requested_count",
    BlocksHit = "match_blocks_hit_count",
    Loads = "loads_count",
    LoadedDram = "load_blocks_dram_count",
    LoadedSsd = "load_blocks_ssd_count",
    Missed = "load_blocks_miss_count",
    Reserved = "reserve_blocks_count",
    Present = "reserve_blocks_present_count",
    Dropped = "reserve_blocks_dropped_count",
    Committed = "commit_blocks_count",
    SubmissionsWaiting = "submissions_waiting",
    CompletionsWaiting = "completions_waiting",
    LoadsInflight = "loads_inflight",
    Leases = "leases_count",
    Loans = "loans_count",
    LoadNsSum = "load_ns_sum",
    LoadNsMax = "load_ns_max",
    LastRequestNs = "last_request_ns",
    Ended = "ended",
}

columns! {
    /// Words of a device's row.
    DeviceColumn:
    ReadsWaiting = "reads_waiting",
    ReadsInflight = "reads_inflight",
    WritesWaiting = "writes_waiting",
    WritesInflight = "writes_inflight",
    Reads = "reads_count",
    ReadBytes = "read_bytes",
    Writes = "writes_count",
    WriteBytes = "write_bytes",
    HeaderWrites = "header_writes_count",
    Errors = "errors_count",
    Lost = "lost",
    HealthKnown = "health_known",
    CriticalWarning = "critical_warning",
    Temperature = "temperature_celsius",
    SparePercent = "available_spare_percent",
    UsedPercent = "used_percent",
    MediaErrors = "media_errors_count",
    DriveWritten = "drive_written_bytes",
}

/// Histograms that there are whatever the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShardHistogram {
    /// How long the shard works on a request, by operation; one in [`SERVICE_SAMPLE`] is measured.
    ServiceMatch,
    /// See `ServiceMatch`.
    ServiceLoad,
    /// See `ServiceMatch`.
    ServiceReserve,
    /// See `ServiceMatch`.
    ServiceCommit,
    /// See `ServiceMatch`: all other operations.
    ServiceOther,
    /// From the pickup of a load to its last answer, where all of its blocks were in the pool.
    LoadDram,
    /// See `LoadDram`: where some were read from the SSD.
    LoadSsd,
}

/// One request in this many is timed on its own: a clock costs more than a counter.
pub const SERVICE_SAMPLE: u64 = 64;
const SHARD_HISTOGRAMS: usize = 7;

/// A device's histograms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceHistogram {
    /// How long a read waits here before the device gets it.
    ReadQueue,
    /// A read, from there to its end.
    Read,
    /// A write, from there to its end.
    Write,
}

/// Which histogram of the segment is this one of a device.
pub fn device_histogram(device: usize, histogram: DeviceHistogram) -> usize {
    SHARD_HISTOGRAMS + device * 3 + histogram as usize
}

/// What the segment of a shard with these devices holds.
pub fn names(devices: usize) -> Names {
    let label = |name: &str, key: &str, value: String| HistogramName {
        name: name.to_owned(),
        labels: vec![(key.to_owned(), value)],
    };
    let mut histograms: Vec<_> = ["match", "load", "reserve", "commit", "other"]
        .map(|op| label("request_service", "op", op.to_owned()))
        .into_iter()
        .chain(["dram", "ssd"].map(|tier| label("load", "tier", tier.to_owned())))
        .collect();
    assert_eq!(histograms.len(), SHARD_HISTOGRAMS);
    for device in 0..devices.min(kvring_ipc::stats::DEVICE_ROWS) {
        for name in ["ssd_read_queue", "ssd_read", "ssd_write"] {
            histograms.push(label(name, "device", device.to_string()));
        }
    }
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let counters = Metrics::default().all();
    Names {
        counters: counters.into_iter().map(|(name, doc, _)| (name.to_owned(), doc.to_owned())).collect(),
        gauges: owned(GAUGES),
        session: owned(SessionColumn::NAMES),
        device: owned(DeviceColumn::NAMES),
        histograms,
    }
}

const _: () = assert!(SessionColumn::NAMES.len() <= kvring_ipc::stats::SESSION_HISTOGRAM);
const _: () = assert!(DeviceColumn::NAMES.len() <= kvring_ipc::stats::DEVICE_WORDS);
const _: () = assert!(crate::limits::SESSIONS_MAX == kvring_ipc::stats::SESSION_ROWS);
const _: () = assert!(SHARD_HISTOGRAMS + kvring_ipc::stats::DEVICE_ROWS * 3 <= kvring_ipc::stats::HISTOGRAMS_MAX);

/// Those of [`Metrics`] that are levels, not counts: they fall as well as rise.
pub const GAUGES: &[&str] = &[
    "sessions_count",
    "leases_count",
    "host_slots_count",
    "host_slots_free_count",
    "host_slots_quarantined_count",
    "host_slots_filling_count",
    "ssd_slots_count",
    "ssd_slots_free_count",
    "blocks_count",
    "ssd_recovered_blocks_count",
    "ssd_recovery_us",
];

metrics! {
    matches_count: "Match requests answered.",
    match_blocks_requested_count: "Blocks named by match requests.",
    match_blocks_hit_count: "Leading blocks that were resident.",
    loads_count: "Load requests answered.",
    load_blocks_dram_count: "Blocks loaded from the pool.",
    load_blocks_ssd_count: "Blocks loaded after a read from the SSD.",
    load_blocks_coalesced_count: "Blocks loaded by waiting for a read that another load had started.",
    load_blocks_miss_count: "Blocks of loads answered miss, busy or cancelled.",
    reserve_blocks_count: "Slots granted to stores.",
    reserve_blocks_present_count: "Blocks of stores that were resident or on their way already.",
    reserve_blocks_dropped_count: "Blocks of stores dropped for want of room or parent.",
    commit_blocks_count: "Blocks that became resident by a store.",
    abort_blocks_count: "Reserved slots given back unfilled, or lost with their writer.",
    evict_host_count: "Blocks that left the pool for another.",
    evict_ssd_count: "Blocks that left the SSD for another.",
    ssd_read_bytes: "Bytes read from the SSD.",
    ssd_write_bytes: "Bytes of blocks written to the SSD.",
    ssd_header_writes_count: "Sectors of headers written.",
    ssd_devices_lost_count: "Times that a device failed again and again, or answered nothing for 10 s, and its blocks were forgotten.",
    ssd_held_back_count: "Times that write-back began to wait for the endurance budget (ssd_write_gb_per_day).",
    ssd_short_count: "Transfers that ended short and were resubmitted.",
    ssd_read_errors_count: "Reads that failed: each a miss.",
    ssd_write_errors_count: "Writes that failed: the block stays in the pool only.",
    ssd_checksum_errors_count: "Blocks whose bytes were not those written: each a miss.",
    dram_verified_blocks_count: "Blocks in the pool whose bytes were compared with their checksum.",
    dram_checksum_errors_count: "Blocks in the pool whose bytes were not those stored: each a miss.",
    blocks_forgotten_count: "Blocks forgotten on doubt, with all that continued them.",
    leases_expired_count: "Leases that nobody released in time.",
    sessions_poisoned_count: "Sessions that broke protocol.",
    sessions_gone_count: "Sessions whose process died or hung up without a goodbye.",
    sessions_count: "Sessions attached now.",
    leases_count: "Leases held now.",
    host_slots_count: "Slots of the pool that are registered.",
    host_slots_free_count: "Slots of the pool that are free now.",
    host_slots_quarantined_count: "Slots of dead writers that wait out their grace now.",
    host_slots_filling_count: "Slots that instances were granted and have neither committed nor given back now.",
    ssd_slots_count: "Slots of the SSD tier.",
    ssd_slots_free_count: "Slots of the SSD tier that are free now.",
    blocks_count: "Blocks known now.",
    ssd_recovered_blocks_count: "Blocks found on the SSD at start, so far.",
    ssd_recovery_us: "Microseconds from the start until what the SSD held was resident again; 0 until then.",
    dram_recovered_blocks_count: "Blocks that an engine process that died had left in the pool.",
    sleeps_count: "Times the shard went to sleep.",
}
