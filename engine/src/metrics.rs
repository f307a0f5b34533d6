//! Counters of one shard. Written by it alone, read by whoever asks; each has one line of meaning.

use std::sync::atomic::{AtomicU64, Ordering};

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
        }
    };
}

/// Those of [`Metrics`] that are levels, not counts: they fall as well as rise.
pub const GAUGES: &[&str] = &[
    "sessions_count",
    "leases_count",
    "host_slots_count",
    "host_slots_free_count",
    "host_slots_quarantined_count",
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
    ssd_slots_count: "Slots of the SSD tier.",
    ssd_slots_free_count: "Slots of the SSD tier that are free now.",
    blocks_count: "Blocks known now.",
    ssd_recovered_blocks_count: "Blocks found on the SSD at start, so far.",
    ssd_recovery_us: "Microseconds from the start until what the SSD held was resident again; 0 until then.",
    dram_recovered_blocks_count: "Blocks that an engine process that died had left in the pool.",
    sleeps_count: "Times the shard went to sleep.",
}
