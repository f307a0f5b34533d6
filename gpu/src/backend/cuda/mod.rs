//! Copies by a CUDA device's copy engines, on streams of our own in the inference engine's context.
//!
//! Each direction is a lane of two streams. Work enters at the *head* and leaves at the *tail*: for a
//! load the head copies from the pool and the tail scatters what was staged; for a store the head gathers
//! and the tail copies to the pool. Staging buffers go round between them, an event each way. When a batch
//! has left the tail the device writes its number into a *word* of host memory, which is all that a poll
//! reads; since a device that is lost writes none, the tail is also asked, once a millisecond.
//!
//! An error that the context does not survive loses the back end and not the process: what was in flight is
//! [`Outcome::Unknown`], nothing is freed, nothing is asked of the driver again.

pub mod calibrate;
pub mod memory;
pub mod registration;
pub mod swap;

use std::collections::{HashSet, VecDeque};
use std::ffi::CStr;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use kvring_ipc::client::Pool;
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};

use super::tensors::Tensors;
use super::{Batch, BatchId, CopyBackend, Direction, Marks, Moment, Outcome, Refusal, Shape};
use crate::driver::api::{DriverApi, Unavailable};
use crate::driver::context::{
    BatchArguments, Context, Event, Kernel, RowsArguments, Stream, THREADS_PER_BLOCK, Things, Way,
};
use crate::driver::error::{Class, CudaError};
use crate::plan::{Calibration, Limits, Op, PIECE_BYTES_MAX, Plan, Span};
use registration::{Registration, State};

/// PTX of `kernels/copy.cu`, as `cargo xtask ptx` has made it.
const PTX: &str = concat!(include_str!("../../kernels/copy.ptx"), "\0");
const KERNEL: &CStr = c"kvring_copy";

/// Batches of one direction in flight: one that the device copies, one that waits for it, and time to plan.
const IN_FLIGHT: usize = 4;
/// Staging buffers of one direction: one that is filled, one that is emptied, one between.
const STAGING_BUFFERS: usize = 3;
/// Smaller buffers than this are not worth the kernel.
const STAGING_BYTES_MIN: usize = 256 << 10;
/// Most copies in one call: more have hung and crashed drivers (vLLM #49276). And of one batch, where no kernel gathers
/// them: 2048 pages of 8 KiB are 16 MiB, 0.3 ms of the link at best; to hand them over takes 1 ms in one call and 5 ms
/// one by one (0.5 and 2.3 us each), which is what a look at the rings may have to wait.
const BATCH_CALL_MAX: usize = 2048;
/// Blocks of the kernel's grid: enough to keep up with the bus, few enough to leave the rest of the GPU alone.
const GRID_MAX: u32 = 32;
/// Room of one list of pieces: 24 bytes each.
const LIST_PIECES_MIN: usize = 16 << 10;
/// How often the streams are asked, for a device that is lost says nothing.
const WATCH: Duration = Duration::from_millis(1);
/// From one word to the next.
const WORD_STRIDE: usize = 64;
/// Bytes of one piece of a list on the device: three words.
const PIECE_BYTES: usize = 24;

/// Why there is no CUDA back end.
#[derive(Debug, thiserror::Error)]
pub enum CudaUnavailable {
    /// No driver, no device.
    #[error(transparent)]
    Driver(#[from] Unavailable),
    /// The driver has refused something at the start.
    #[error("the CUDA back end cannot start on device {device}: {error}")]
    Start {
        /// Which device.
        device: i32,
        /// What the driver said.
        error: CudaError,
    },
    /// The system has.
    #[error("the CUDA back end cannot start: {0}")]
    System(#[from] std::io::Error),
}

/// What can be said of a CUDA back end.
#[derive(Debug, Clone)]
pub struct Options {
    /// The device's ordinal in this process: what CUDA_VISIBLE_DEVICES leaves is counted from 0.
    pub device: i32,
    /// The driver's library, where it is not found by itself.
    pub driver: Option<PathBuf>,
    /// Device memory for staging, both directions together; 0 for none.
    pub staging_bytes: usize,
    /// Whether copies may be handed over in one call.
    pub may_batch: bool,
    /// What has been measured elsewhere; `None` to measure at the start.
    pub calibration: Option<Calibration>,
    /// The pool is pinned in pieces of this many bytes.
    pub registration_bytes: usize,
    /// Most bytes of one batch: what a demand load may have to wait for.
    pub batch_bytes: usize,
    /// Pinned memory for a pool that cannot be pinned itself.
    pub bounce_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            device: 0,
            driver: None,
            staging_bytes: 48 << 20,
            may_batch: true,
            calibration: None,
            registration_bytes: 1 << 30,
            // 0.6 ms of a PCIe 5 x16 link at 55 GB/s.
            batch_bytes: 32 << 20,
            bounce_bytes: 64 << 20,
        }
    }
}

/// Pinned memory of ours, for us and for the device.
#[derive(Debug, Clone, Copy)]
struct Pinned {
    host: usize,
    device: u64,
    bytes: usize,
}

/// A list of pieces for the kernel: written here, copied there.
#[derive(Debug, Clone, Copy)]
struct List {
    host: Pinned,
    device: u64,
}

#[derive(Debug, Clone, Copy)]
struct Staging {
    address: u64,
    filled: Event,
    emptied: Event,
}

/// A batch in flight.
struct Flight {
    id: BatchId,
    number: u64,
    /// An operation of it was refused; the others are under way.
    has_failed: bool,
    list: Option<usize>,
    mark: Mark,
    /// Ranges that a store left in the bounce buffer: (there, in the pool, bytes).
    bounced: Vec<(usize, usize, usize)>,
    registration: Option<Arc<Registration>>,
}

/// By what the end of a batch is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// The word has its number.
    Word,
    /// Where words are not written: happens when it has left the tail.
    Event(Event),
    /// The driver has refused both: when neither stream of the lane has anything left. Until then nothing follows it.
    Idle,
    /// Nothing tells any more: the context is lost.
    Never,
}

/// One direction.
struct Lane {
    direction: Direction,
    head: Stream,
    tail: Stream,
    /// From the head to the tail, at the start and the end of a batch.
    begun: Event,
    ended: Event,
    /// Of the batch that was submitted last.
    number: u64,
    flights: VecDeque<Flight>,
    staging: Vec<Staging>,
    next_staging: usize,
    lists: Vec<(List, bool)>,
    events: Vec<Event>,
    bounce: Option<Pinned>,
}

/// Where the host's side of a plan lies.
enum Host<'a> {
    Pool(&'a Registration),
    Flat(Pinned),
}

impl Host<'_> {
    /// For the device, which may know it by another address than the processor.
    fn device_address(&self, offset: u64) -> u64 {
        match self {
            Self::Pool(registration) => registration.device_address(offset),
            Self::Flat(pinned) => pinned.device + offset,
        }
    }

    /// For the processor.
    fn address(&self, offset: u64, bytes: u64) -> usize {
        match self {
            Self::Pool(registration) => registration.address(offset as usize, bytes as usize),
            Self::Flat(pinned) => {
                assert!((offset + bytes) as usize <= pinned.bytes, "{offset}+{bytes} of {}", pinned.bytes);
                pinned.host + offset as usize
            }
        }
    }
}

/// Copies by a CUDA device.
pub struct CudaBackend {
    context: Arc<Context>,
    options: Options,
    tensors: Option<Tensors>,
    calibration: Calibration,
    pitch_max: u64,
    staging_bytes: u64,
    lanes: [Lane; 2],
    words: Option<Arc<Mapping>>,
    words_file: OwnedFd,
    words_address: u64,
    words_are_pinned: bool,
    has_words: bool,
    has_batch: bool,
    /// A call of it has succeeded: it is not for want of support that another one fails.
    batch_has_worked: bool,
    kernel: Option<Kernel>,
    list_pieces: usize,
    registration: Option<Arc<Registration>>,
    things: Things,
    marks: Arc<EventMarks>,
    process: u32,
    thread: Option<std::thread::ThreadId>,
    watched: Instant,
    lost: Option<String>,
    cannot_bounce: bool,
    notes: Vec<String>,
    plan: Plan,
    spans: Vec<Span>,
    /// Slots of the batch that is taken.
    slots: HashSet<u32>,
    linear: Vec<Span>,
    /// Allocations that were found there, for one submission.
    seen: Vec<bool>,
    arguments: BatchArguments,
}

type Done<T = ()> = Result<T, CudaError>;

impl CudaBackend {
    /// Loads the driver and prepares streams, words, staging and the kernel on a device.
    ///
    /// # Errors
    /// No driver, no device, or one that refuses what every device has.
    pub fn new(tensors: Tensors, options: Options) -> Result<Self, CudaUnavailable> {
        let api = DriverApi::load(options.driver.as_deref())?;
        let device = options.device;
        let start = |error| CudaUnavailable::Start { device, error };
        let context = Arc::new(Context::retain(api, device).map_err(start)?);
        let words_file = sealed_memfd("kvring-words", 4096, Pages::Small).map_err(std::io::Error::from)?;
        let words = Arc::new(Mapping::new(&words_file, 4096).map_err(std::io::Error::from)?);
        // The caller's thread has a context of its own, or none: it keeps it.
        let within = context.clone();
        let kept = words.clone();
        let mut things = Things::default();
        let built = within.within(|| Self::build(&context, tensors, options, words_file, words, &mut things));
        if let Err(error) = &built {
            let is_over = matches!(error.class(), Class::Recoverable | Class::Unsupported);
            if is_over {
                // Nothing of it is under way: the process goes on without a device, and without what was for it.
                let _ = within.within(|| {
                    within.free(&things);
                    within.unregister(kept.address(0, 4096))
                });
                within.release();
            }
            // It may be pinned: an address that is pinned is not given to somebody else.
            std::mem::forget(kept);
        }
        built.map_err(start)
    }

    /// `things` is what has to be freed if it fails; else they are the back end's.
    fn build(
        context: &Arc<Context>,
        tensors: Tensors,
        options: Options,
        words_file: OwnedFd,
        words: Arc<Mapping>,
        things: &mut Things,
    ) -> Done<Self> {
        let context = context.clone();
        let mut notes = Vec::new();
        let can_write = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS);
        // SAFETY: `words` is kept for as long as the registration: `close` unregisters it or leaves both.
        let words_address = match unsafe { context.register(words.address(0, 4096), 4096) } {
            Ok(address) => Some(address),
            Err(error) if matches!(error.class(), Class::Sticky | Class::Gone) => return Err(error),
            Err(error) => {
                notes.push(format!("the end of copies is found by asking, the words cannot be pinned: {error}"));
                None
            }
        };
        let has_words = words_address.is_some() && matches!(can_write, Ok(1));
        let pitch_max = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_PITCH)?;
        let wants_kernel = options.staging_bytes > 0;
        let kernel = match CStr::from_bytes_with_nul(PTX.as_bytes()) {
            Ok(ptx) if wants_kernel => context.load_kernel(ptx, KERNEL),
            _ => Err(CudaError { call: "cuModuleLoadData", code: crate::driver::error::INVALID_VALUE }),
        };
        let kernel = kernel
            .inspect_err(|error| {
                if wants_kernel {
                    notes.push(format!("copies of small pages are not staged, so they are slow: {error}"));
                }
            })
            .ok();
        things.kernels.extend(kernel);
        let list_pieces = list_pieces(&tensors, &options);
        let mut lane = |direction| Lane::new(&context, direction, kernel.is_some(), list_pieces, things);
        let lanes = [lane(Direction::Load)?, lane(Direction::Store)?];
        let marks = Arc::new_cyclic(|this| EventMarks {
            this: this.clone(),
            context: context.clone(),
            free: Mutex::default(),
            process: std::process::id(),
        });
        let mut backend = Self {
            has_batch: options.may_batch && context.api().batch_copy.is_some(),
            batch_has_worked: false,
            calibration: Calibration::default(),
            pitch_max: u64::try_from(pitch_max).unwrap_or(0),
            staging_bytes: 0,
            lanes,
            words: Some(words),
            words_file,
            words_address: words_address.unwrap_or(0),
            words_are_pinned: words_address.is_some(),
            has_words,
            kernel,
            list_pieces,
            registration: None,
            things: std::mem::take(things),
            marks,
            process: std::process::id(),
            thread: None,
            watched: Instant::now(),
            lost: None,
            cannot_bounce: false,
            notes,
            plan: Plan::default(),
            spans: Vec::new(),
            slots: HashSet::new(),
            linear: Vec::new(),
            seen: Vec::new(),
            arguments: BatchArguments::default(),
            tensors: Some(tensors),
            context,
            options,
        };
        backend.add_staging();
        backend.calibration = match backend.options.calibration {
            Some(calibration) => calibration,
            None => match calibrate::measure(&mut backend) {
                Ok(measured) => measured,
                // Copies of it may be under way, and nothing tells when they are not: what they use stays where it is.
                Err(CudaError { call, .. }) if backend.lanes.iter().any(|lane| !lane.flights.is_empty()) => {
                    return Err(CudaError { call, code: crate::driver::error::NOT_READY });
                }
                Err(error) if matches!(error.class(), Class::Recoverable | Class::Unsupported) => {
                    backend.notes.push(format!("which way of copying is the fastest was not measured: {error}"));
                    Calibration { is_batched: backend.has_batch, ..Calibration::default() }
                }
                Err(error) => {
                    *things = std::mem::take(&mut backend.things);
                    return Err(error);
                }
            },
        };
        backend.calibration.is_batched &= backend.has_batch;
        if backend.kernel.is_none() {
            (backend.calibration.staged_below_bytes, backend.calibration.direct_below_bytes) = (0, 0);
        }
        Ok(backend)
    }

    /// As large as asked, or as large as there is memory for.
    fn add_staging(&mut self) {
        if self.kernel.is_none() {
            return;
        }
        let mut bytes = (self.options.staging_bytes / (2 * STAGING_BUFFERS)) & !4095;
        while bytes >= STAGING_BYTES_MIN {
            let mut had = Things::default();
            let all = (0..2 * STAGING_BUFFERS)
                .try_for_each(|_| self.context.alloc(bytes).map(|address| had.device_memory.push(address)));
            let events = (0..4 * STAGING_BUFFERS)
                .try_for_each(|_| self.context.create_event().map(|event| had.events.push(event)));
            if let (Ok(()), Ok(())) = (all, events) {
                let buffers = had.device_memory.iter().zip(had.events.chunks(2));
                for (number, (address, pair)) in buffers.enumerate() {
                    let staging = Staging { address: *address, filled: pair[0], emptied: pair[1] };
                    self.lanes[number % 2].staging.push(staging);
                }
                self.things.device_memory.append(&mut had.device_memory);
                self.things.events.append(&mut had.events);
                self.staging_bytes = bytes as u64;
                return;
            }
            self.context.free(&had);
            bytes /= 2;
        }
        self.notes.push("no device memory for staging: copies of small pages are slow".into());
    }

    /// What has been measured.
    pub fn calibration(&self) -> Calibration {
        self.calibration
    }

    /// The device's name, and the driver.
    pub fn describe(&self) -> String {
        format!("{} ({:?})", self.context.device_name(), self.context)
    }

    /// The memory of the completion words: of loads at 0, of stores at 64; for whoever else wants to see
    /// them. A word is the number of the last batch of which nothing is under way any more.
    pub fn words_file(&self) -> &OwnedFd {
        &self.words_file
    }

    fn limits(&self) -> Limits {
        Limits {
            registration_bytes: self.options.registration_bytes as u64,
            pitch_max: self.pitch_max,
            staging_bytes: self.staging_bytes,
        }
    }

    fn make_current(&mut self) -> Done {
        let thread = std::thread::current().id();
        if self.thread != Some(thread) {
            self.context.make_current()?;
            self.thread = Some(thread);
        }
        Ok(())
    }

    /// The context is lost: nothing more is asked of it.
    fn lose(&mut self, error: CudaError) {
        if self.lost.is_none() {
            let whose = "the device's context is lost, perhaps by another's kernel: restart this process";
            self.lost = Some(format!("{error}: {whose}"));
        }
    }

    fn has_room(&self, direction: Direction) -> bool {
        let flights = &self.lanes[direction as usize].flights;
        flights.len() < IN_FLIGHT && flights.iter().all(|flight| flight.mark != Mark::Idle)
    }

    fn lose_if_sticky(&mut self, error: CudaError) {
        if matches!(error.class(), Class::Sticky | Class::Gone) {
            self.lose(error);
        }
    }

    fn attach(&mut self, pool: &Pool) -> Result<Arc<Registration>, Refusal> {
        if let Some(registration) = self.registration.as_ref().filter(|registration| registration.is_of(pool)) {
            return Ok(registration.clone());
        }
        // Flights keep the last pool's registration until they have landed.
        self.registration = None;
        let made = Registration::new(self.context.clone(), pool.clone(), self.options.registration_bytes);
        let made = Arc::new(made.map_err(|error| Refusal::Broken(error.to_string()))?);
        self.registration = Some(made.clone());
        Ok(made)
    }

    /// The first blocks that can go as one batch, as spans of the pool or of the bounce buffer.
    fn take(&mut self, batch: &Batch<'_>, tensors: &Tensors, registration: &Registration) -> Result<Taken, Refusal> {
        let placement = tensors.placement();
        let pool = batch.pool;
        let is_urgent = batch.direction == Direction::Load;
        let (start, end) = (placement.slot_start(), placement.slot_end());
        assert!(end <= pool.slot_bytes(), "a block is no larger than its slot");
        let part_bytes = end - start;
        let mut taken = Taken { blocks: 0, bounces: false };
        self.spans.clear();
        self.slots.clear();
        let mut size = BatchSize::default();
        for (index, block) in batch.blocks.iter().enumerate() {
            if !self.slots.insert(block.slot) {
                // It comes twice: once a batch.
                break;
            }
            let slot_at = pool.offset_of(block.slot);
            let bounces = match registration.state_of(slot_at + start, part_bytes, is_urgent) {
                State::Pending => {
                    // All that will be needed is asked for at once, not a piece a turn.
                    for later in &batch.blocks[index + 1..] {
                        let _ = registration.state_of(pool.offset_of(later.slot) + start, part_bytes, is_urgent);
                    }
                    break;
                }
                State::Ready(_) => false,
                State::Failed => true,
            };
            let fits = !bounces || (index + 1) * part_bytes <= self.options.bounce_bytes / 2;
            if index > 0 && (bounces != taken.bounces || !fits) {
                break;
            }
            if !fits {
                return Err(Refusal::Broken(
                    "a block is larger than the pinned buffer it would have to go through".into(),
                ));
            }
            let base = if bounces { index * part_bytes } else { slot_at + start };
            let before = self.spans.len();
            let spans = &mut self.spans;
            placement.copies(block.pages, batch.tensors.clone(), |copy| {
                spans.push(Span {
                    host: (base + copy.offset_in_slot - start) as u64,
                    device: copy.address as u64,
                    bytes: copy.bytes as u64,
                    allocation: copy.allocation,
                });
            });
            size.add(&spans[before..], &self.calibration, self.options.registration_bytes);
            if index > 0 && !size.fits(self.options.batch_bytes, self.list_pieces) {
                spans.truncate(before);
                break;
            }
            taken = Taken { blocks: index + 1, bounces };
        }
        if taken.blocks == 0 { Err(Refusal::Full) } else { Ok(taken) }
    }

    fn submit_taken(
        &mut self,
        id: BatchId,
        batch: &Batch<'_>,
        registration: &Arc<Registration>,
        tensors: &Tensors,
        taken: Taken,
    ) -> Result<usize, Refusal> {
        let lane = batch.direction as usize;
        let placement = tensors.placement();
        let (start, part_bytes) = (placement.slot_start(), placement.slot_end() - placement.slot_start());
        let mut bounced = Vec::new();
        let mut limits = self.limits();
        let host = if taken.bounces {
            let bounce = self.bounce(lane)?;
            limits.registration_bytes = u64::MAX;
            // What is copied and nothing else: what lies between belongs to the slot.
            for span in &self.spans {
                let at = span.host as usize;
                let slot = batch.blocks[at / part_bytes].slot;
                let slot_at = batch.pool.offset_of(slot) + start + at % part_bytes;
                match bounced.last_mut() {
                    Some((last, last_slot, bytes)) if *last + *bytes == at && *last_slot + *bytes == slot_at => {
                        *bytes += span.bytes as usize;
                    }
                    _ => bounced.push((at, slot_at, span.bytes as usize)),
                }
            }
            if batch.direction == Direction::Load {
                for (at, slot_at, bytes) in &bounced {
                    let target: *mut u8 = std::ptr::with_exposed_provenance_mut(bounce.host + at);
                    // SAFETY: the bounce buffer is of `bounce.bytes`, which `take` has kept to, and no batch of
                    // this lane is in flight (`bounce`), so nobody else looks at it.
                    let target = unsafe { std::slice::from_raw_parts_mut(target, *bytes) };
                    batch.pool.mapping().copy_out(*slot_at, target);
                }
            }
            Host::Flat(bounce)
        } else {
            Host::Pool(registration)
        };
        let (mut plan, mut spans) = (std::mem::take(&mut self.plan), std::mem::take(&mut self.spans));
        plan.make(&mut spans, &limits, &self.calibration);
        let after = batch.after.map(|moment| Event(moment.event));
        let begun = self.execute(lane, &plan, &host, after);
        (self.plan, self.spans) = (plan, spans);
        let launched = begun.and_then(|begun| self.finish(lane, begun));
        match launched {
            Ok((number, begun)) => {
                let stays = batch.direction == Direction::Store;
                let lane = &mut self.lanes[lane];
                lane.flights.push_back(Flight {
                    id,
                    number,
                    has_failed: begun.failed.is_some(),
                    list: begun.list,
                    mark: begun.mark,
                    bounced: if stays { bounced } else { Vec::new() },
                    registration: Some(registration.clone()),
                });
                Ok(taken.blocks)
            }
            Err(error) => {
                self.lose(error);
                // Part of it may be under way: it has been taken, and is lost with the others.
                self.lanes[lane].flights.push_back(Flight {
                    id,
                    number: u64::MAX,
                    has_failed: true,
                    list: None,
                    mark: Mark::Never,
                    bounced: Vec::new(),
                    registration: Some(registration.clone()),
                });
                Ok(taken.blocks)
            }
        }
    }

    /// The lane's half of the pinned memory that stands in for the pool, unless it is in use.
    fn bounce(&mut self, lane: usize) -> Result<Pinned, Refusal> {
        let bytes = self.options.bounce_bytes / 2;
        let lane = &mut self.lanes[lane];
        if !lane.flights.is_empty() {
            return Err(Refusal::Full);
        }
        if lane.bounce.is_none() && !self.cannot_bounce {
            let (host, device) = match self.context.alloc_host(bytes) {
                Ok(made) => made,
                Err(error) => {
                    self.lose_if_sticky(error);
                    self.cannot_bounce = true;
                    self.notes.push(format!(
                        "neither the pool nor a buffer can be pinned, so nothing is copied: {error}; raise the limit \
                         of locked memory (ulimit -l) and start the instance again"
                    ));
                    return Err(Refusal::Broken("nothing can be pinned".into()));
                }
            };
            let host = host.expose_provenance();
            self.things.host_memory.push(host);
            lane.bounce = Some(Pinned { host, device, bytes });
            let why = self.registration.as_ref().and_then(|registration| registration.failure());
            let why = why.map_or_else(String::new, |error| format!(": {error}"));
            self.notes.push(format!(
                "the pool cannot be pinned{why}; copies take a detour through {} MiB of pinned memory, which is slower: \
                 raise the limit of locked memory (ulimit -l unlimited; --ulimit memlock=-1 for a container) and \
                 start the instance again",
                bytes >> 20
            ));
        }
        lane.bounce.ok_or_else(|| Refusal::Broken("nothing can be pinned".into()))
    }

    /// Submits a plan's operations. What cannot be submitted at all is an error; what can in part is told in
    /// the result.
    fn execute(&mut self, lane: usize, plan: &Plan, host: &Host<'_>, after: Option<Event>) -> Done<Begun> {
        let context = self.context.clone();
        let mut begun = Begun { failed: None, list: None, mark: Mark::Word };
        let Lane { direction, head, tail, begun: head_begun, .. } = self.lanes[lane];
        // Without this wait nothing may be copied.
        let waits = after.map_or(Ok(()), |after| {
            context.wait(head, after)?;
            if tail != head {
                context.record(head_begun, head)?;
                context.wait(tail, head_begun)?;
            }
            Ok(())
        });
        let submitted = waits.and_then(|()| self.submit_operations(lane, plan, host, &mut begun));
        if let Err(error) = submitted {
            if matches!(error.class(), Class::Sticky | Class::Gone) {
                return Err(error);
            }
            begun.failed = Some(error);
            self.note_once(format!("a {direction:?} was refused: {error}"));
        }
        Ok(begun)
    }

    fn note_once(&mut self, note: String) {
        if self.notes.len() < 16 && !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    fn submit_operations(&mut self, lane: usize, plan: &Plan, host: &Host<'_>, begun: &mut Begun) -> Done {
        let context = self.context.clone();
        let Lane { direction, head, tail, .. } = self.lanes[lane];
        let is_load = direction == Direction::Load;
        let (copying, computing) = if is_load { (head, tail) } else { (tail, head) };
        // A kernel that reads what is not there loses the context.
        self.are_there(plan.pieces.iter())?;
        let list = if plan.pieces.is_empty() { None } else { Some(self.write_list(lane, plan, host, begun)?) };
        let way = if is_load { Way::ToDevice } else { Way::ToHost };
        let mut linear = std::mem::take(&mut self.linear);
        linear.clear();
        for op in &plan.ops {
            match op {
                Op::Linear(span) => linear.push(*span),
                Op::Rows { first, rows, host_pitch, device_pitch } => {
                    let (host_pitch, device_pitch) = (*host_pitch, *device_pitch);
                    let extent = u64::from(rows - 1) * host_pitch + first.bytes;
                    let arguments = RowsArguments {
                        way,
                        host: host.address(first.host, extent),
                        host_pitch,
                        device: first.device,
                        device_pitch,
                        bytes: first.bytes,
                        rows: *rows,
                    };
                    // SAFETY: `submit`'s contract and the plan's: pages of `Tensors` on one side, one piece of
                    // the registered pool on the other, both the batch's until it has landed.
                    match unsafe { context.copy_rows(&arguments, copying) } {
                        Err(error) if error.class() == Class::Unsupported => {
                            self.note_once(format!("rows are copied one by one: {error}"));
                            self.calibration.rows_min = 0;
                            linear.extend((0..u64::from(*rows)).map(|row| Span {
                                host: first.host + row * host_pitch,
                                device: first.device + row * device_pitch,
                                ..*first
                            }));
                        }
                        copied => copied?,
                    }
                }
                Op::Staged { ranges, pieces } => {
                    let at = self.lanes[lane].next_staging;
                    let staging = self.lanes[lane].staging[at];
                    self.lanes[lane].next_staging = (at + 1) % STAGING_BUFFERS;
                    context.wait(head, staging.emptied)?;
                    let copy_ranges = || -> Done {
                        for range in &plan.ranges[ranges.clone()] {
                            let buffer = staging.address + range.device;
                            let host = host.address(range.host, range.bytes);
                            // SAFETY: as above; the buffer is this operation's between its two events.
                            unsafe { context.copy(way, host, buffer, range.bytes, copying) }?;
                        }
                        Ok(())
                    };
                    let launch = || self.launch(list, pieces.clone(), computing);
                    if is_load { copy_ranges() } else { launch() }?;
                    context.record(staging.filled, head)?;
                    context.wait(tail, staging.filled)?;
                    if is_load { launch() } else { copy_ranges() }?;
                    context.record(staging.emptied, tail)?;
                }
                Op::Direct { pieces } => self.launch(list, pieces.clone(), computing)?,
            }
        }
        let copied = self.copy_linear(&linear, host, way, copying);
        self.linear = linear;
        copied
    }

    /// Whether what is to be copied is still memory of the device: once an allocation, some tenths of a microsecond each. An
    /// engine that frees its memory under a copy has a bug; where nobody else would tell, it would be the end of the
    /// process, or of the context.
    fn are_there<'a>(&mut self, spans: impl Iterator<Item = &'a Span>) -> Done {
        self.seen.clear();
        for span in spans {
            let allocation = span.allocation as usize;
            if self.seen.len() <= allocation {
                self.seen.resize(allocation + 1, false);
            }
            if !std::mem::replace(&mut self.seen[allocation], true) && !self.context.is_device_memory(span.device)? {
                return Err(CudaError { call: "cuPointerGetAttribute", code: crate::driver::error::INVALID_VALUE });
            }
        }
        Ok(())
    }

    /// Linear copies: in one call, where the driver has that, or one by one.
    fn copy_linear(&mut self, copies: &[Span], host: &Host<'_>, way: Way, stream: Stream) -> Done {
        let mut rest = copies;
        if self.has_batch && self.calibration.is_batched && rest.len() > 1 {
            self.are_there(rest.iter())?;
        }
        while self.has_batch && self.calibration.is_batched && rest.len() > 1 {
            let (now, later) = rest.split_at(rest.len().min(BATCH_CALL_MAX));
            let BatchArguments { targets, sources, sizes } = &mut self.arguments;
            let near = now.iter().map(|copy| host.device_address(copy.host));
            let far = now.iter().map(|copy| copy.device);
            let (near_side, far_side) = if way == Way::ToDevice { (sources, targets) } else { (targets, sources) };
            near_side.clear();
            near_side.extend(near);
            far_side.clear();
            far_side.extend(far);
            sizes.clear();
            sizes.extend(now.iter().map(|copy| copy.bytes as usize));
            // SAFETY: as in `submit_operations`; `are_there` has asked for those of the device.
            match unsafe { self.context.copy_batch(&mut self.arguments, stream) } {
                Some(Ok(())) => (rest, self.batch_has_worked) = (later, true),
                None => break,
                // What the refused call may have begun is copied again: the same bytes to the same place.
                Some(Err(error)) if error.class() == Class::Unsupported && !self.batch_has_worked => {
                    self.note_once(format!("copies are handed over one by one: {error}"));
                    self.has_batch = false;
                }
                Some(Err(error)) => return Err(error),
            }
        }
        for Span { host: at, device, bytes, allocation: _ } in rest {
            // SAFETY: as in `submit_operations`.
            unsafe { self.context.copy(way, host.address(*at, *bytes), *device, *bytes, stream) }?;
        }
        Ok(())
    }

    /// Writes a plan's pieces as the kernel reads them, and has them copied to the device.
    fn write_list(&mut self, lane: usize, plan: &Plan, host: &Host<'_>, begun: &mut Begun) -> Done<u64> {
        let too_many = CudaError { call: "a list of pieces", code: 2 };
        let is_load = lane == Direction::Load as usize;
        let Lane { head, ref mut lists, ref staging, next_staging, .. } = self.lanes[lane];
        if plan.pieces.len() > self.list_pieces {
            return Err(too_many);
        }
        let Some(index) = lists.iter().position(|(_, is_used)| !is_used) else { return Err(too_many) };
        let list = lists[index].0;
        lists[index].1 = true;
        begun.list = Some(index);
        let words: *mut u64 = std::ptr::with_exposed_provenance_mut(list.host.host);
        // SAFETY: the list has room for `list_pieces` pieces of three words, is ours, and no flight uses it.
        let words = unsafe { std::slice::from_raw_parts_mut(words, 3 * plan.pieces.len()) };
        let mut buffer = next_staging;
        for op in &plan.ops {
            let (pieces, base) = match op {
                Op::Staged { pieces, .. } => {
                    let address = staging[buffer].address;
                    buffer = (buffer + 1) % STAGING_BUFFERS;
                    (pieces, Some(address))
                }
                Op::Direct { pieces } => (pieces, None),
                _ => continue,
            };
            for index in pieces.clone() {
                let Span { host: at, device, bytes, allocation: _ } = plan.pieces[index];
                let near = base.map_or_else(|| host.device_address(at), |base| base + at);
                let (source, target) = if is_load { (near, device) } else { (device, near) };
                words[3 * index..3 * index + 3].copy_from_slice(&[source, target, bytes]);
            }
        }
        let bytes = (plan.pieces.len() * PIECE_BYTES) as u64;
        // On the head: whatever launches waits for it, there or at the tail.
        // SAFETY: both are this list's, until the batch has landed.
        unsafe { self.context.copy(Way::ToDevice, list.host.host, list.device, bytes, head) }?;
        if self.lanes[lane].tail != head {
            let Lane { begun, tail, .. } = self.lanes[lane];
            self.context.record(begun, head)?;
            self.context.wait(tail, begun)?;
        }
        Ok(list.device)
    }

    fn launch(&self, list: Option<u64>, pieces: Range<usize>, stream: Stream) -> Done {
        let (Some(list), Some(kernel)) = (list, self.kernel) else {
            return Err(CudaError { call: "the copy kernel", code: crate::driver::error::NOT_SUPPORTED });
        };
        let count = pieces.len() as u32;
        let blocks = (count * 32).div_ceil(THREADS_PER_BLOCK).clamp(1, GRID_MAX);
        let at = list + (pieces.start * PIECE_BYTES) as u64;
        // SAFETY: the list holds these pieces until the batch has landed; each is a page of `Tensors` on one
        // side, a staging buffer or the registered pool on the other, as planned.
        unsafe { self.context.launch_copy(kernel, blocks, at, count, stream) }
    }

    /// Marks the end of what was submitted to a lane: by a word, else by an event, else by nothing, and then the lane's
    /// streams have to be empty. What is under way is never lost sight of for a call that was refused.
    fn finish(&mut self, lane: usize, mut begun: Begun) -> Done<(u64, Begun)> {
        let number = self.lanes[lane].number + 1;
        self.lanes[lane].number = number;
        begun.mark = match self.mark_end(lane, number) {
            Err(error) if matches!(error.class(), Class::Sticky | Class::Gone) => return Err(error),
            Err(error) => {
                self.note_once(format!("the end of copies is found by waiting for all of them: {error}"));
                Mark::Idle
            }
            Ok(mark) => mark,
        };
        Ok((number, begun))
    }

    fn mark_end(&mut self, lane: usize, number: u64) -> Done<Mark> {
        let word = self.words_address + (lane * WORD_STRIDE) as u64;
        let Lane { head, tail, ended, .. } = self.lanes[lane];
        if tail != head {
            self.context.record(ended, head)?;
            self.context.wait(tail, ended)?;
        }
        if self.has_words {
            // SAFETY: the words are registered; each lane's is eight bytes at a multiple of 64.
            match unsafe { self.context.write_word(tail, word, number) } {
                Ok(()) => return Ok(Mark::Word),
                Err(error) if matches!(error.class(), Class::Sticky | Class::Gone) => return Err(error),
                Err(error) => {
                    self.note_once(format!("the end of copies is found by asking: {error}"));
                    self.has_words = error.class() != Class::Unsupported;
                }
            }
        }
        let event = match self.lanes[lane].events.pop() {
            Some(event) => event,
            None => {
                let event = self.context.create_event()?;
                self.things.events.push(event);
                event
            }
        };
        let recorded = self.context.record(event, tail);
        if recorded.is_err() {
            self.lanes[lane].events.push(event);
        }
        recorded.map(|()| Mark::Event(event))
    }

    /// Whether nothing of a lane is under way.
    fn is_idle(&self, lane: usize) -> Done<bool> {
        let Lane { head, tail, .. } = self.lanes[lane];
        // The head first: what it has left may only then reach the tail.
        Ok(self.context.is_idle(head)? && self.context.is_idle(tail)?)
    }

    /// Bytes may still move: everything stays where it is until the process ends.
    fn leave(&mut self) {
        let of_flights = self.lanes.iter().flat_map(|lane| &lane.flights);
        let of_flights = of_flights.filter_map(|flight| flight.registration.as_ref());
        of_flights.chain(&self.registration).for_each(|registration| registration.leave());
        std::mem::forget(self.words.take());
    }

    /// Takes what has left a lane's tail.
    fn land(&mut self, lane: usize, is_idle: bool, ended: &mut Vec<(BatchId, Outcome)>) -> Done {
        // Acquire: pairs with the device's fence before it writes the word; the copied bytes are visible.
        let word = match &self.words {
            Some(words) => words.words64(lane * WORD_STRIDE, 1)[0].load(Ordering::Acquire),
            None => 0,
        };
        while let Some(front) = self.lanes[lane].flights.front() {
            let has_landed = match front.mark {
                Mark::Word => is_idle || word >= front.number,
                Mark::Event(event) => is_idle || self.context.has_happened(event)?,
                Mark::Idle => is_idle,
                Mark::Never => false,
            };
            if !has_landed {
                break;
            }
            let Some(flight) = self.lanes[lane].flights.pop_front() else { break };
            let lane = &mut self.lanes[lane];
            if let Some(list) = flight.list {
                lane.lists[list].1 = false;
            }
            if let Mark::Event(event) = flight.mark {
                lane.events.push(event);
            }
            let is_copied = !flight.has_failed;
            if let (Some(bounce), Some(registration), true) = (lane.bounce, &flight.registration, is_copied) {
                for (at, slot_at, bytes) in &flight.bounced {
                    assert!(at + bytes <= bounce.bytes, "{at}+{bytes} of {}", bounce.bytes);
                    let source: *const u8 = std::ptr::with_exposed_provenance(bounce.host + at);
                    // SAFETY: inside the bounce buffer by the assert; the batch has landed, so nobody writes.
                    let source = unsafe { std::slice::from_raw_parts(source, *bytes) };
                    registration.pool().mapping().copy_in(*slot_at, source);
                }
            }
            ended.push((flight.id, if is_copied { Outcome::Copied } else { Outcome::Failed }));
        }
        Ok(())
    }
}

/// What a submitted batch has used.
struct Begun {
    failed: Option<CudaError>,
    list: Option<usize>,
    mark: Mark,
}

#[derive(Clone, Copy)]
struct Taken {
    blocks: usize,
    bounces: bool,
}

/// How large a batch is by all that bounds it.
#[derive(Debug, Default)]
struct BatchSize {
    bytes: usize,
    /// That no kernel gathers.
    copies: usize,
    /// For a kernel, at most.
    pieces: usize,
}

impl BatchSize {
    /// A block's.
    fn add(&mut self, spans: &[Span], calibration: &Calibration, registration_bytes: usize) {
        let bytes: u64 = spans.iter().map(|span| span.bytes).sum();
        let is_gathered = spans.len() > 1 && bytes < calibration.staged_below_bytes.saturating_mul(spans.len() as u64);
        self.bytes += bytes as usize;
        self.copies += if is_gathered { 0 } else { spans.len() };
        // Each end of a registration piece cuts one in two.
        let cuts = bytes as usize / registration_bytes + 1;
        self.pieces += spans.iter().map(|span| span.bytes.div_ceil(PIECE_BYTES_MAX) as usize).sum::<usize>() + cuts;
    }

    fn fits(&self, bytes_max: usize, pieces_max: usize) -> bool {
        // And each end of a staging buffer.
        let pieces = self.pieces + self.bytes / STAGING_BYTES_MIN + 1;
        self.bytes <= bytes_max && self.copies <= BATCH_CALL_MAX && pieces <= pieces_max
    }
}

fn list_pieces(tensors: &Tensors, options: &Options) -> usize {
    let placement = tensors.placement();
    let bytes = placement.slot_end() - placement.slot_start();
    // Cuts at the ends of staging buffers and registration pieces are few: one each.
    let cuts = bytes / STAGING_BYTES_MIN + bytes / options.registration_bytes.max(1) + 8;
    LIST_PIECES_MIN.max(placement.runs_per_block() + bytes / PIECE_BYTES_MAX as usize + cuts)
}

impl Lane {
    fn new(
        context: &Context,
        direction: Direction,
        has_kernel: bool,
        list_pieces: usize,
        things: &mut Things,
    ) -> Done<Self> {
        // Priorities mean nothing to copies, and everything to a kernel that few copies wait for.
        let head = context.create_stream(has_kernel)?;
        things.streams.push(head);
        let tail = if has_kernel { context.create_stream(true)? } else { head };
        if tail != head {
            things.streams.push(tail);
        }
        let mut event = || context.create_event().inspect(|event| things.events.push(*event));
        let (begun, ended) = (event()?, event()?);
        let mut lists = Vec::new();
        for _ in 0..if has_kernel { IN_FLIGHT } else { 0 } {
            lists.push((List::new(context, list_pieces, things)?, false));
        }
        Ok(Self {
            direction,
            head,
            tail,
            begun,
            ended,
            number: 0,
            flights: VecDeque::new(),
            staging: Vec::new(),
            next_staging: 0,
            lists,
            events: Vec::new(),
            bounce: None,
        })
    }
}

impl List {
    fn new(context: &Context, pieces: usize, things: &mut Things) -> Done<Self> {
        let bytes = pieces * PIECE_BYTES;
        let (host, mapped) = context.alloc_host(bytes)?;
        let host = host.expose_provenance();
        things.host_memory.push(host);
        let device = context.alloc(bytes)?;
        things.device_memory.push(device);
        Ok(Self { host: Pinned { host, device: mapped, bytes }, device })
    }
}

impl CopyBackend for CudaBackend {
    fn shape(&self) -> Shape {
        let none = Shape { pages_counts: Vec::new(), tensors_count: 0, in_slot: (0, 0) };
        self.tensors.as_ref().map_or(none, Tensors::shape)
    }

    fn marks(&self) -> Option<Arc<dyn Marks>> {
        Some(self.marks.clone())
    }

    fn room(&self, direction: Direction, tensors: &Range<u32>) -> usize {
        let Some(of) = self.tensors.as_ref().map(Tensors::placement).filter(|_| self.lost.is_none()) else {
            // Whoever offers is told why not.
            return 1;
        };
        if !self.has_room(direction) {
            return 0;
        }
        // Tensors are alike, or nearly so: `take` counts what they are.
        let bytes = (of.slot_end() - of.slot_start()) * tensors.len() / (of.tensors_count() as usize).max(1);
        (self.options.batch_bytes / bytes.max(1)).clamp(1, BATCH_CALL_MAX)
    }

    fn is_ready(&mut self, direction: Direction, pool: &Pool, slot: u32) -> bool {
        // Whoever submits is told what is wrong; and a registration that ends here undoes its pinning here.
        if self.lost.is_none() && self.make_current().is_err() {
            return true;
        }
        let Some(tensors) = self.tensors.as_ref().filter(|_| self.lost.is_none()) else { return true };
        let (start, end) = (tensors.placement().slot_start(), tensors.placement().slot_end());
        let Ok(registration) = self.attach(pool) else { return true };
        let is_urgent = direction == Direction::Load;
        registration.state_of(pool.offset_of(slot) + start, end - start, is_urgent) != State::Pending
    }

    fn submit(&mut self, id: BatchId, batch: &Batch<'_>) -> Result<usize, Refusal> {
        if let Some(lost) = &self.lost {
            return Err(Refusal::Broken(lost.clone()));
        }
        if self.process != std::process::id() {
            return Err(Refusal::Broken("a forked process has no CUDA".into()));
        }
        let Some(tensors) = self.tensors.clone() else { return Err(Refusal::Broken("the memory is away".into())) };
        if !self.has_room(batch.direction) {
            return Err(Refusal::Full);
        }
        if let Err(error) = self.make_current() {
            self.lose_if_sticky(error);
            return Err(Refusal::Broken(error.to_string()));
        }
        let registration = self.attach(batch.pool)?;
        let taken = self.take(batch, &tensors, &registration)?;
        self.submit_taken(id, batch, &registration, &tensors, taken)
    }

    fn poll(&mut self, ended: &mut Vec<(BatchId, Outcome)>) {
        let is_due = self.watched.elapsed() >= WATCH;
        for lane in 0..2 {
            if self.lanes[lane].flights.is_empty() {
                continue;
            }
            let polled = self.make_current().and_then(|()| {
                self.land(lane, false, ended)?;
                if is_due && self.lost.is_none() && self.is_idle(lane)? {
                    // All of it has left: a word that is not there will not come.
                    self.land(lane, true, ended)?;
                }
                Ok(())
            });
            if let Err(error) = polled {
                self.lose(error);
            }
        }
        if is_due {
            self.watched = Instant::now();
        }
        if self.lost.is_some() {
            for lane in &mut self.lanes {
                for flight in lane.flights.drain(..) {
                    if let Some(registration) = flight.registration {
                        registration.leave();
                    }
                    ended.push((flight.id, Outcome::Unknown));
                }
            }
        }
    }

    fn nap(&self) -> Duration {
        Duration::from_micros(50)
    }

    fn trouble(&self) -> Vec<String> {
        self.lost.iter().chain(&self.notes).cloned().collect()
    }

    fn suspend(&mut self) {
        self.tensors = None;
    }

    fn resume(&mut self, tensors: Tensors) -> Result<Shape, String> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        let pieces = list_pieces(&tensors, &self.options);
        if self.kernel.is_some() && pieces > self.list_pieces {
            self.make_current().map_err(|error| error.to_string())?;
            for lane in &mut self.lanes {
                for (list, _) in &mut lane.lists {
                    *list = List::new(&self.context, pieces, &mut self.things).map_err(|error| error.to_string())?;
                }
            }
            self.list_pieces = pieces;
        }
        let shape = tensors.shape();
        self.tensors = Some(tensors);
        Ok(shape)
    }

    fn close(&mut self, drained: bool) {
        let is_ours = self.process == std::process::id();
        if !drained || self.lost.is_some() || !is_ours || self.make_current().is_err() {
            return self.leave();
        }
        self.registration = None;
        self.marks.close(&mut self.things);
        self.context.free(&self.things);
        self.things = Things::default();
        if let Some(words) = self.words.take().filter(|_| self.words_are_pinned)
            && self.context.unregister(words.address(0, 4096)).is_err()
        {
            std::mem::forget(words);
        }
        self.context.release();
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Closed, or a panic: then nobody knows what is in flight, and a driver that is being torn down is not
        // called from here.
        self.leave();
    }
}

/// Events that mark moments: recorded in the engine's threads, waited for by ours.
struct EventMarks {
    this: Weak<EventMarks>,
    context: Arc<Context>,
    free: Mutex<Vec<Event>>,
    process: u32,
}

impl EventMarks {
    fn free(&self) -> std::sync::MutexGuard<'_, Vec<Event>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, things: &mut Things) {
        things.events.append(&mut self.free());
    }
}

impl Marks for EventMarks {
    fn mark(self: Arc<Self>, stream: u64) -> Result<Moment, String> {
        if self.process != std::process::id() {
            return Err("a forked process has no CUDA".into());
        }
        let stream = Stream(stream as usize);
        let marked = self.context.within(|| {
            if self.context.is_capturing(stream)? {
                return Ok(None);
            }
            let free = self.free().pop();
            let event = free.map_or_else(|| self.context.create_event(), Ok)?;
            self.context.record(event, stream).map(|()| Some(event))
        });
        match marked {
            Ok(Some(event)) => {
                let home = self.this.upgrade().ok_or("the back end is gone")?;
                Ok(Moment { event: event.0, home })
            }
            Ok(None) => Err("the stream is being captured into a graph: submit before or after".into()),
            Err(error) => Err(format!("the moment could not be marked: {error}")),
        }
    }

    fn give_back(&self, event: usize) {
        self.free().push(Event(event));
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_ptx_is_of_this_source() {
        let source = include_str!("../../kernels/copy.cu");
        let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, source.as_bytes());
        let made_from = format!("CRC-32 {crc:08x}");
        assert!(PTX.lines().next().is_some_and(|line| line.contains(&made_from)), "run `cargo xtask ptx`: {made_from}");
        assert!(PTX.contains(".version 8.0\n") && PTX.contains(".target sm_80"), "what CUDA 12.0 and an A100 read");
    }
}
