//! `kvring verify`: a thread that reads what a running cache holds, at a bounded rate, and compares it with
//! its checksums. The shard tells it what lies where, and decides itself what to do about what is found.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use kvring_ipc::config::Config;
use kvring_ipc::mapping::Mapping;

use super::engine::{Engine, ToShard};
use crate::checksum;
use crate::device::medium::{Access, Medium, MediumFile};
use crate::index::Tier;
use crate::limits::SECTOR_BYTES;
use crate::tier::disk::DiskGeometry;

/// A block in a slot, as the shard knew it when it was asked.
#[derive(Debug, Clone, Copy)]
pub struct Surveyed {
    /// Which tier.
    pub tier: Tier,
    /// Which of its slots.
    pub slot: u32,
    /// Which use of the slot.
    pub generation: u32,
    /// What its bytes must have.
    pub data_crc: u64,
}

/// What lies in some slots of a tier.
#[derive(Debug)]
pub struct Survey {
    /// Which tier.
    pub tier: Tier,
    /// The first slot to look at; after the survey the first that was not.
    pub from: u32,
    /// What was found: never more than its capacity.
    pub found: Vec<Surveyed>,
    /// Blocks whose checksum nobody has made.
    pub without_checksum: u64,
    /// No slot is left.
    pub is_last: bool,
}

/// How a verification goes.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub struct VerifyState {
    pub running: AtomicBool,
    pub stop: AtomicBool,
    pub slots_total: AtomicU64,
    pub slots_done: AtomicU64,
    pub dram_blocks: AtomicU64,
    pub ssd_blocks: AtomicU64,
    pub bytes: AtomicU64,
    pub without_checksum: AtomicU64,
    pub bad_dram_blocks: AtomicU64,
    pub bad_ssd_blocks: AtomicU64,
    /// Blocks of the SSD that could not be read: nothing is known of them.
    pub unreadable_ssd_blocks: AtomicU64,
    pub runs: AtomicU64,
}

impl VerifyState {
    /// For `kvring stat`.
    pub fn as_json(&self) -> serde_json::Value {
        let n = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        serde_json::json!({
            "running": self.running.load(Ordering::Relaxed),
            "runs": n(&self.runs),
            "slots_total": n(&self.slots_total),
            "slots_done": n(&self.slots_done),
            "dram_blocks": n(&self.dram_blocks),
            "ssd_blocks": n(&self.ssd_blocks),
            "bytes": n(&self.bytes),
            "without_checksum": n(&self.without_checksum),
            "bad_dram_blocks": n(&self.bad_dram_blocks),
            "bad_ssd_blocks": n(&self.bad_ssd_blocks),
            "unreadable_ssd_blocks": n(&self.unreadable_ssd_blocks),
        })
    }
}

/// Slots that the shard looks at for one survey: a few microseconds.
const SURVEY_SLOTS: usize = 64;
/// How long the shard may take to answer: it is hung, or has ended.
const PATIENCE: Duration = Duration::from_secs(10);

/// Begins a verification at up to `bytes_per_s`, 0 for no bound.
///
/// # Errors
/// One is under way, or no thread can be had.
pub fn begin(config: &Config, engine: &Engine, state: &Arc<VerifyState>, bytes_per_s: u64) -> Result<(), String> {
    if state.running.swap(true, Ordering::SeqCst) {
        return Err("a verification is under way: `kvring verify` shows it".into());
    }
    let counters = [
        &state.slots_done,
        &state.dram_blocks,
        &state.ssd_blocks,
        &state.bytes,
        &state.without_checksum,
        &state.bad_dram_blocks,
        &state.bad_ssd_blocks,
        &state.unreadable_ssd_blocks,
    ];
    counters.into_iter().for_each(|counter| counter.store(0, Ordering::Relaxed));
    state.slots_total.store(engine.slots_count(), Ordering::Relaxed);
    let scrub = Scrub {
        teller: engine.teller(),
        pool: engine.pool.mapping.clone(),
        slot_bytes: engine.pool.slot_bytes as usize,
        geometry: engine.geometry,
        media: Medium::all(&config.ssd_cache_dirs).unwrap_or_default(),
        with_ssd: config.checksum,
        state: state.clone(),
        bytes_per_s,
    };
    let ended = Ended(state.clone());
    let spawned = std::thread::Builder::new().name("kvring-verify".into()).spawn(move || {
        let _ended = ended;
        scrub.run();
    });
    spawned.map(drop).map_err(|error| {
        state.running.store(false, Ordering::SeqCst);
        format!("no thread can be had: {error}")
    })
}

/// Says so when the thread ends, whatever ends it.
struct Ended(Arc<VerifyState>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.runs.fetch_add(1, Ordering::Relaxed);
        self.0.running.store(false, Ordering::SeqCst);
    }
}

struct Scrub {
    teller: Box<dyn Fn(ToShard) + Send>,
    pool: Arc<Mapping>,
    slot_bytes: usize,
    geometry: Option<DiskGeometry>,
    media: Vec<Medium>,
    with_ssd: bool,
    state: Arc<VerifyState>,
    bytes_per_s: u64,
}

impl Scrub {
    fn run(&self) {
        #[expect(clippy::disallowed_methods, reason = "a thread of the control plane")]
        let started = Instant::now();
        let mut scratch = vec![0; checksum::SCRATCH_BYTES];
        let mut crc_of = |tier: Tier, at: &Surveyed, files: &[Vec<Option<MediumFile>>], block: &mut [u8]| match tier {
            Tier::Host => {
                let offset = at.slot as usize * self.slot_bytes;
                Some(checksum::of_mapping(&self.pool, offset, self.slot_bytes, &mut scratch))
            }
            Tier::Disk => self.read(at.slot, files, block).map(checksum::of_bytes),
        };
        let files = self.open();
        // O_DIRECT wants aligned memory: a part of a larger piece is.
        let mut memory = vec![0; self.slot_bytes + SECTOR_BYTES as usize];
        let skip = memory.as_ptr().align_offset(SECTOR_BYTES as usize);
        let block = &mut memory[skip..skip + self.slot_bytes];
        for tier in [Tier::Host, Tier::Disk] {
            if tier == Tier::Disk && (self.geometry.is_none() || !self.with_ssd) {
                continue;
            }
            let mut from = 0;
            loop {
                let Some(survey) = self.survey(tier, from) else { return };
                for at in &survey.found {
                    if self.state.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let made = crc_of(tier, at, &files, block);
                    if made.is_none() {
                        self.state.unreadable_ssd_blocks.fetch_add(1, Ordering::Relaxed);
                    }
                    if made.is_some_and(|made| made != at.data_crc) && self.distrust(*at) {
                        let bad =
                            if tier == Tier::Host { &self.state.bad_dram_blocks } else { &self.state.bad_ssd_blocks };
                        bad.fetch_add(1, Ordering::Relaxed);
                    }
                    let checked = if tier == Tier::Host { &self.state.dram_blocks } else { &self.state.ssd_blocks };
                    checked.fetch_add(u64::from(made.is_some()), Ordering::Relaxed);
                    self.keep_to_the_rate(started);
                }
                self.state.without_checksum.fetch_add(survey.without_checksum, Ordering::Relaxed);
                self.state.slots_done.fetch_add(u64::from(survey.from - from), Ordering::Relaxed);
                from = survey.from;
                if survey.is_last {
                    break;
                }
            }
        }
    }

    fn survey(&self, tier: Tier, from: u32) -> Option<Survey> {
        let (sender, answer) = bounded(1);
        let found = Vec::with_capacity(SURVEY_SLOTS);
        (self.teller)(ToShard::Survey(Survey { tier, from, found, without_checksum: 0, is_last: false }, sender));
        answer.recv_timeout(PATIENCE).ok()
    }

    /// The shard looks for itself: if that block still is there, its copy goes. Says whether it was bad.
    fn distrust(&self, at: Surveyed) -> bool {
        let (sender, answer): (Sender<bool>, Receiver<bool>) = bounded(1);
        (self.teller)(ToShard::Distrust(at, sender));
        answer.recv_timeout(PATIENCE).unwrap_or(false)
    }

    fn open(&self) -> Vec<Vec<Option<MediumFile>>> {
        let files_count = self.geometry.map_or(0, |geometry| geometry.files_per_device());
        let open = |medium: &Medium, file| medium.open(file, Access::ReadDirect).ok();
        self.media.iter().map(|medium| (0..files_count).map(|file| open(medium, file)).collect()).collect()
    }

    fn read<'a>(&self, slot: u32, files: &[Vec<Option<MediumFile>>], block: &'a mut [u8]) -> Option<&'a [u8]> {
        let geometry = self.geometry.as_ref()?;
        let (file, offset) = geometry.offset_of(slot);
        let file = files.get(geometry.device_of(slot))?.get(file as usize)?.as_ref()?;
        file.read_exact_at(block, offset).ok()?;
        Some(block)
    }

    fn keep_to_the_rate(&self, started: Instant) {
        let bytes = self.state.bytes.fetch_add(self.slot_bytes as u64, Ordering::Relaxed) + self.slot_bytes as u64;
        if self.bytes_per_s == 0 {
            return;
        }
        let due = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        let mut ahead = due.saturating_sub(started.elapsed());
        while !ahead.is_zero() && !self.state.stop.load(Ordering::Relaxed) {
            let nap = ahead.min(Duration::from_millis(100));
            #[expect(clippy::disallowed_methods, reason = "a thread of the control plane")]
            std::thread::sleep(nap);
            ahead -= nap;
        }
    }
}
