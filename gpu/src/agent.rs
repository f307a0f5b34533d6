//! The transfer agent: a thread that answers load and store tickets over one session.
//!
//! Whoever submits never waits: a ticket is a message to the thread, its end is found by [`Agent::poll`]
//! or by the [`Watch`] that it was given. The thread keeps many tickets in flight and hands their blocks to
//! its [`CopyBackend`], loads before stores, looking at its rings between two batches. Every ticket ends: a
//! load at its deadline with the blocks that did not come, a store that cannot go on by dropping the rest,
//! and all of them when the thread does, whatever ended it.
//!
//! What the back end has begun is waited for, whatever becomes of the ticket or of the session: pages and
//! slots belong to the copy until it has ended. Where nobody can tell whether it has (a device that is
//! lost), its slots are never given back: the server takes them when this process has died.
//!
//! What the caller's memory needs to know is when it is no longer read: [`Agent::fence`] returns when
//! the stores it names have been copied, or makes them stop, or store nothing that is read from then on.
//! Before the memory goes, [`Agent::suspend`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use kvring_ipc::bell;
use kvring_ipc::client::{Broken, Pool, PostError, Session};
use kvring_ipc::instance::Instance;
use kvring_ipc::key::BlockKey;
use kvring_ipc::wire::{BATCH_BLOCKS_MAX, Completion, Grant, LeaseId, MATCH_BLOCKS_MAX, Status, Tag};

use crate::backend::tensors::Tensors;
use crate::backend::{Batch, BatchId, BlockCopy, CopyBackend, Direction, Marks, Moment, Outcome, Refusal, Shape};
use crate::layout::NO_PAGE;

/// Names a load or store; the submitter's choice, unique among those that have not ended.
pub type Ticket = u64;

/// Blocks to bring into the instance's memory.
#[derive(Debug)]
pub struct Load {
    /// Its name.
    pub ticket: Ticket,
    /// The lease, granted to this instance, that covers the blocks.
    pub lease: LeaseId,
    /// When that ends: what is copied later may be another block's, and is missed.
    pub expires_at_ns: u64,
    /// Depth of the first block.
    pub first: u32,
    /// The blocks.
    pub keys: Vec<BlockKey>,
    /// The pages of each, one after the other.
    pub pages: Vec<u32>,
    /// As [`Agent::epoch`] said when the pages were chosen.
    pub epoch: u64,
    /// Nothing is written before this moment: the last reader of the pages comes before it.
    pub after: Option<Moment>,
    /// In how many groups of layers the blocks come, the first of all blocks whose slots are ready before the second of any:
    /// for an engine that computes on the first layers while later ones load. 1: each block whole.
    pub layer_groups: u32,
}

/// Blocks to store from the instance's memory.
#[derive(Debug)]
pub struct Store {
    /// Its name.
    pub ticket: Ticket,
    /// The block before the first.
    pub parent: BlockKey,
    /// Depth of the first block.
    pub first: u32,
    /// The blocks.
    pub keys: Vec<BlockKey>,
    /// The pages of each, one after the other.
    pub pages: Vec<u32>,
    /// As [`Agent::epoch`] said when the pages were chosen.
    pub epoch: u64,
    /// Nothing is read before this moment: the last writer of the pages comes before it.
    pub after: Option<Moment>,
}

/// Why a ticket was not taken. Nothing of it will be copied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The memory has gone, or gone and come back, since the pages were chosen.
    #[error("epoch = {said}: it is {is}{}; pages of another epoch are other memory", if *.asleep { " and the memory is away" } else { "" })]
    Stale {
        /// The ticket's.
        said: u64,
        /// The agent's.
        is: u64,
        /// Suspended now.
        asleep: bool,
    },
    /// It has not ended.
    #[error("ticket = {0}: it has not ended yet")]
    Open(Ticket),
    /// Pages and keys do not go together.
    #[error("{pages} pages for {keys} keys: a block has {per_block}, so {} are expected", keys * per_block)]
    PageCount {
        /// How many pages.
        pages: usize,
        /// How many keys.
        keys: usize,
        /// Pages of one block.
        per_block: usize,
    },
    /// A page that the memory does not have.
    #[error("pages: {0} among them; not all are pages of the tensors")]
    PageRange(u32),
    /// A block is stored whole.
    #[error("pages: NO_PAGE among them; a block is stored whole")]
    NoPage,
    /// A chain is longer than any can be.
    #[error("first = {first} with {keys} keys: a chain has at most {MATCH_BLOCKS_MAX} blocks")]
    TooLong {
        /// Depth of the first.
        first: u32,
        /// How many.
        keys: usize,
    },
}

/// A ticket's state, to be looked at from any thread without a lock.
#[derive(Debug, Clone, Default)]
pub struct Watch(Arc<AtomicU64>);

const ENDED: u64 = 1 << 63;
const MISSED: u64 = 1 << 62;

impl Watch {
    /// It has ended.
    pub fn is_ended(&self) -> bool {
        // Acquire: pairs with `end` and `pass`; the bytes that were copied are visible.
        self.0.load(Ordering::Acquire) & ENDED != 0
    }
    /// It has ended, and not every block came.
    pub fn has_missed(&self) -> bool {
        self.0.load(Ordering::Acquire) & MISSED != 0
    }
    /// Groups of layers of which every block is in the instance's memory. It stops short of them all when
    /// a block does not come: then wait for the end, which says which.
    pub fn groups_done(&self) -> u32 {
        self.0.load(Ordering::Acquire) as u32
    }
    fn pass(&self, groups: u32) {
        self.0.store(u64::from(groups), Ordering::Release);
    }
    fn end(&self, has_missed: bool) {
        self.0.fetch_or(ENDED | if has_missed { MISSED } else { 0 }, Ordering::Release);
    }
}

/// How a ticket ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Which.
    pub ticket: Ticket,
    /// A load, not a store.
    pub is_load: bool,
    /// Load: indices of blocks that did not come; compute them. Store: of blocks that are not resident
    /// because of it, nor were before.
    pub missed: Vec<u32>,
    /// From submission to end.
    pub took: Duration,
}

/// What an agent has done since it was started.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names are the documentation: blocks, by what became of them")]
pub struct Counters {
    pub blocks_loaded_dram: AtomicU64,
    pub blocks_loaded_ssd: AtomicU64,
    pub blocks_missed: AtomicU64,
    pub blocks_stored: AtomicU64,
    pub blocks_present: AtomicU64,
    pub blocks_dropped: AtomicU64,
    pub sessions: AtomicU64,
}

impl Counters {
    /// By name.
    pub fn read(&self) -> [(&'static str, u64); 7] {
        [
            ("blocks_loaded_dram", &self.blocks_loaded_dram),
            ("blocks_loaded_ssd", &self.blocks_loaded_ssd),
            ("blocks_missed", &self.blocks_missed),
            ("blocks_stored", &self.blocks_stored),
            ("blocks_present", &self.blocks_present),
            ("blocks_dropped", &self.blocks_dropped),
            ("sessions", &self.sessions),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }
}

fn add(counter: &AtomicU64, blocks: usize) {
    // Relaxed: counters order nothing.
    counter.fetch_add(blocks as u64, Ordering::Relaxed);
}

enum Command {
    Load(Load, Instant, Watch),
    Store(Store, Instant, Watch),
    /// Stop what these still have to copy.
    Cancel(Vec<Ticket>),
    /// Let go of the memory.
    Suspend(Instant, Sender<bool>),
    /// The memory is back.
    Resume(Tensors, Sender<Result<Shape, String>>),
    Stop(Instant),
}

/// A ticket that has not ended, as far as its end can be told without the thread.
struct Open {
    is_load: bool,
    blocks: u32,
    submitted: Instant,
    watch: Watch,
}

/// What tickets are checked against.
struct Intake {
    shape: Shape,
    epoch: u64,
    asleep: bool,
    /// Tickets that have not ended. None: the thread is gone, and nothing will be taken.
    open: Option<HashMap<Ticket, Open>>,
}

struct Shared {
    /// Tickets that have ended and were not polled.
    finished: (Sender<Finished>, Receiver<Finished>),
    intake: Mutex<Intake>,
    /// The thread sleeps, or is about to: whoever has a command rings.
    sleeps: AtomicBool,
    /// Nobody waits for anything any more.
    stopping: AtomicBool,
    /// Whether what was in flight at the end has ended.
    drained: AtomicBool,
    /// Stores whose pages may still be read.
    reading: Mutex<HashSet<Ticket>>,
    /// Stores whose pages may have been written while they were read: what is copied from now on is not committed.
    overwritten: Mutex<HashSet<Ticket>>,
    /// Tickets of which something is in flight: they do not end before it has, whoever dies.
    moving: Mutex<HashSet<Ticket>>,
    /// Held by who suspends or resumes.
    going: Mutex<()>,
    /// Rung when `reading` shrinks.
    copied: Condvar,
    /// Held by who waits for an end.
    waiting: Mutex<()>,
    /// Rung when a ticket ends.
    ended: Condvar,
    counters: Counters,
    is_connected: AtomicBool,
    /// What keeps a server from being there, or from having our settings.
    trouble: Mutex<Vec<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while the lock was held leaves a set that is still a set.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a fence waits for copies that are in flight: they take milliseconds, unless the device is stuck.
const IN_FLIGHT_MAX: Duration = Duration::from_secs(1);

/// Bounds of an agent's patience.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// How long a load may take: reads from a busy disk, not a scheduler's wait.
    pub load: Duration,
    /// How long a store may wait for slots before it is dropped.
    pub store: Duration,
    /// How long the end waits for copies that are in flight.
    pub drain: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { load: Duration::from_secs(2), store: Duration::from_secs(2), drain: Duration::from_secs(10) }
    }
}

impl Shared {
    fn finish(&self, ticket: Ticket, is_load: bool, missed: Vec<u32>, took: Duration) {
        let mut intake = lock(&self.intake);
        let open = intake.open.as_mut().and_then(|open| open.remove(&ticket));
        if !is_load {
            // Under the lock: the name may be another store's a moment later.
            lock(&self.reading).remove(&ticket);
            lock(&self.overwritten).remove(&ticket);
            self.copied.notify_all();
        }
        drop(intake);
        self.tell(ticket, is_load, missed, took, open.map(|open| open.watch));
    }

    fn tell(&self, ticket: Ticket, is_load: bool, missed: Vec<u32>, took: Duration, watch: Option<Watch>) {
        let has_missed = !missed.is_empty();
        // The other end is in this very value.
        let _ = self.finished.0.send(Finished { ticket, is_load, missed, took });
        if let Some(watch) = watch {
            watch.end(has_missed);
        }
        // Between a waiter's look and its sleep it holds the lock.
        drop(lock(&self.waiting));
        self.ended.notify_all();
    }
}

/// Ends what is open when the thread ends, by a stop or by a panic of ours.
struct LastWords(Arc<Shared>);

impl Drop for LastWords {
    fn drop(&mut self) {
        let open = lock(&self.0.intake).open.take().unwrap_or_default();
        for (ticket, Open { is_load, blocks, submitted, watch }) in open {
            if lock(&self.0.moving).contains(&ticket) {
                // Nobody is told that pages are free which a device may still write.
                continue;
            }
            if !is_load {
                lock(&self.0.reading).remove(&ticket);
                lock(&self.0.overwritten).remove(&ticket);
                self.0.copied.notify_all();
            }
            add(
                if is_load { &self.0.counters.blocks_missed } else { &self.0.counters.blocks_dropped },
                blocks as usize,
            );
            self.0.tell(ticket, is_load, (0..blocks).collect(), submitted.elapsed(), Some(watch));
        }
        self.0.is_connected.store(false, Ordering::Relaxed);
    }
}

/// A transfer agent. Dropping it ends every ticket and the thread.
pub struct Agent {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    shared: Arc<Shared>,
    marks: Option<Arc<dyn Marks>>,
    patience: Patience,
    /// A forked child has this value and not the thread.
    process: u32,
    /// The thread, and who hears of its end.
    thread: Mutex<Option<(JoinHandle<()>, Receiver<()>)>>,
}

/// A call of a driver that takes longer than this hangs.
const STUCK: Duration = Duration::from_secs(10);

impl Agent {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the system says of a thread or an eventfd.
    pub fn start(
        instance: Instance,
        backend: impl CopyBackend + Send + 'static,
        patience: Patience,
    ) -> std::io::Result<Self> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let wake = Arc::new(rustix::event::eventfd(0, flags)?);
        let (sender, receiver) = unbounded();
        let intake = Intake { shape: backend.shape(), epoch: 0, asleep: false, open: Some(HashMap::new()) };
        let shared = Arc::new(Shared {
            finished: unbounded(),
            intake: Mutex::new(intake),
            sleeps: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            drained: AtomicBool::new(false),
            reading: Mutex::default(),
            overwritten: Mutex::default(),
            moving: Mutex::default(),
            going: Mutex::default(),
            copied: Condvar::new(),
            waiting: Mutex::default(),
            ended: Condvar::new(),
            counters: Counters::default(),
            is_connected: AtomicBool::new(false),
            trouble: Mutex::default(),
        });
        let marks = backend.marks();
        let mut instance = instance;
        instance.drain_by_hand();
        let mut transfer = Transfer {
            tensors_count: backend.shape().tensors_count,
            pages_per_block: backend.shape().pages_per_block(),
            instance,
            backend,
            patience,
            commands: receiver,
            wake: wake.clone(),
            shared: shared.clone(),
            session_number: 0,
            jobs: HashMap::new(),
            posted: HashMap::new(),
            copies: [VecDeque::new(), VecDeque::new()],
            flights: HashMap::new(),
            next_batch: 0,
            ended: Vec::new(),
            owes_drained: false,
            is_tainted: false,
        };
        // What opening has found out is known from the start.
        let connected = transfer.instance.is_connected();
        transfer.shared.is_connected.store(connected, Ordering::Relaxed);
        transfer.tell_trouble(connected);
        let last_words = LastWords(shared.clone());
        let (lives, gone) = bounded(0);
        let thread = std::thread::Builder::new().name("kvring-agent".into()).spawn(move || {
            let _lives: Sender<()> = lives;
            let _last_words = last_words;
            // A bug of ours leaves copies in flight: they are waited for, as at any other end.
            if catch_unwind(AssertUnwindSafe(|| transfer.run())).is_err() {
                let _ = catch_unwind(AssertUnwindSafe(|| transfer.settle(Instant::now() + patience.drain)));
            }
        })?;
        let process = std::process::id();
        Ok(Self { commands: sender, wake, shared, marks, patience, process, thread: Mutex::new(Some((thread, gone))) })
    }

    fn command(&self, command: Command) {
        // The thread only ends with this value, or by a bug of ours; then everything is missed.
        let _ = self.commands.send(command);
        // Pairs with the fence in `sleep`: either it sees the command, or we see that it sleeps.
        fence(Ordering::SeqCst);
        if self.shared.sleeps.load(Ordering::Relaxed) {
            bell::ring_own(&self.wake);
        }
    }

    /// This moment of one of the engine's streams, for a ticket's `after`. `None` where there are no
    /// streams. To be called in the thread that submits the engine's work.
    ///
    /// # Errors
    /// In words: a stream that is being captured, a device that is lost, a fork.
    pub fn mark(&self, stream: u64) -> Result<Option<Moment>, String> {
        self.marks.clone().map(|marks| marks.mark(stream)).transpose()
    }

    /// Submits a load.
    ///
    /// # Errors
    /// It was not taken, and why.
    pub fn load(&self, load: Load) -> Result<Watch, Refused> {
        let (ticket, blocks, epoch) = (load.ticket, load.keys.len(), load.epoch);
        let intake = self.check(ticket, epoch, load.first, blocks, &load.pages)?;
        Ok(self.submit(intake, ticket, true, blocks, |submitted, watch| Command::Load(load, submitted, watch)))
    }

    /// Submits a store. Its pages are read until it has ended or a fence has returned.
    ///
    /// # Errors
    /// It was not taken, and why.
    pub fn store(&self, store: Store) -> Result<Watch, Refused> {
        let (ticket, blocks, epoch) = (store.ticket, store.keys.len(), store.epoch);
        let intake = self.check(ticket, epoch, store.first, blocks, &store.pages)?;
        if store.pages.contains(&NO_PAGE) {
            return Err(Refused::NoPage);
        }
        Ok(self.submit(intake, ticket, false, blocks, |submitted, watch| Command::Store(store, submitted, watch)))
    }

    fn check(
        &self,
        ticket: Ticket,
        epoch: u64,
        first: u32,
        keys: usize,
        pages: &[u32],
    ) -> Result<MutexGuard<'_, Intake>, Refused> {
        let intake = lock(&self.shared.intake);
        if intake.epoch != epoch || intake.asleep {
            return Err(Refused::Stale { said: epoch, is: intake.epoch, asleep: intake.asleep });
        }
        if intake.open.as_ref().is_some_and(|open| open.contains_key(&ticket)) {
            return Err(Refused::Open(ticket));
        }
        if u64::from(first) + keys as u64 > u64::from(MATCH_BLOCKS_MAX) {
            return Err(Refused::TooLong { first, keys });
        }
        let per_block = intake.shape.pages_per_block();
        if pages.len() != keys * per_block {
            return Err(Refused::PageCount { pages: pages.len(), keys, per_block });
        }
        match intake.shape.first_wrong(pages) {
            Some(page) => Err(Refused::PageRange(page)),
            None => Ok(intake),
        }
    }

    /// Whether a ticket of this name has not ended yet.
    pub fn is_open(&self, ticket: Ticket) -> bool {
        lock(&self.shared.intake).open.as_ref().is_some_and(|open| open.contains_key(&ticket))
    }

    /// Which epoch the instance's memory is in: it changes each time that it is suspended.
    pub fn epoch(&self) -> u64 {
        lock(&self.shared.intake).epoch
    }

    fn submit(
        &self,
        mut intake: MutexGuard<'_, Intake>,
        ticket: Ticket,
        is_load: bool,
        blocks: usize,
        command: impl FnOnce(Instant, Watch) -> Command,
    ) -> Watch {
        let (submitted, watch) = (Instant::now(), Watch::default());
        let Some(tickets) = intake.open.as_mut().filter(|_| self.process == std::process::id()) else {
            drop(intake);
            let counters = &self.shared.counters;
            add(if is_load { &counters.blocks_missed } else { &counters.blocks_dropped }, blocks);
            let missed = (0..blocks as u32).collect();
            self.shared.tell(ticket, is_load, missed, Duration::ZERO, Some(watch.clone()));
            return watch;
        };
        tickets.insert(ticket, Open { is_load, blocks: blocks as u32, submitted, watch: watch.clone() });
        if !is_load {
            lock(&self.shared.reading).insert(ticket);
        }
        // Under the lock: a fence that knows of the ticket comes after it.
        self.command(command(submitted, watch.clone()));
        watch
    }

    /// Tickets that have ended since the last call. Takes no lock.
    pub fn poll(&self) -> Vec<Finished> {
        self.shared.finished.1.try_iter().collect()
    }

    /// Waits until these stores read no page any more; those that are not done after `patience` are stopped, and copies
    /// that are in flight have another second. What a device that is stuck has not read by then is read of pages that are
    /// written meanwhile, and stored nowhere. Says whether all were copied in time.
    pub fn fence(&self, tickets: &[Ticket], patience: Duration) -> bool {
        let is_reading = |reading: &HashSet<Ticket>| tickets.iter().any(|ticket| reading.contains(ticket));
        let wait = |patience| {
            let reading = lock(&self.shared.reading);
            let waited = self.shared.copied.wait_timeout_while(reading, patience, |reading| is_reading(reading));
            !is_reading(&waited.unwrap_or_else(PoisonError::into_inner).0)
        };
        if wait(patience) {
            return true;
        }
        if self.process != std::process::id() {
            return false;
        }
        self.cancel(tickets);
        if !wait(IN_FLIGHT_MAX) {
            // A store that has ended meanwhile gives its name away: under the lock under which it does.
            let reading = lock(&self.shared.reading);
            let late = tickets.iter().filter(|ticket| reading.contains(ticket));
            lock(&self.shared.overwritten).extend(late);
        }
        false
    }

    /// Makes these tickets end soon: of a load, what is not in flight is missed; of a store, what is copied
    /// is still committed. Does not wait.
    pub fn cancel(&self, tickets: &[Ticket]) {
        self.command(Command::Cancel(tickets.to_vec()));
    }

    /// Waits until a ticket has ended, at most `at_most`. Says whether [`Agent::poll`] has something.
    pub fn wait(&self, at_most: Duration) -> bool {
        let waiting = lock(&self.shared.waiting);
        let has_none = |(): &mut ()| self.shared.finished.1.is_empty() && !self.shared.stopping.load(Ordering::Relaxed);
        drop(self.shared.ended.wait_timeout_while(waiting, at_most, has_none));
        !self.shared.finished.1.is_empty()
    }

    /// Before the memory goes: ends every ticket, waits at most `patience` for what is in flight, and takes no
    /// more until [`Agent::resume`]. The session and the registration of the pool stay. False: copies are
    /// still in flight, and the memory must not go; ask again.
    pub fn suspend(&self, patience: Duration) -> bool {
        let _going = lock(&self.shared.going);
        {
            let mut intake = lock(&self.shared.intake);
            if !intake.asleep {
                intake.asleep = true;
                intake.epoch += 1;
            }
        }
        let (tell, told) = bounded(1);
        self.command(Command::Suspend(Instant::now() + patience, tell));
        // A thread that has died copies nothing, but may have left copies in flight.
        match told.recv_timeout(patience + STUCK) {
            Ok(drained) => drained,
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => self.shared.drained.load(Ordering::Relaxed),
        }
    }

    /// The memory is back: these are its tensors now. Says the new epoch.
    ///
    /// # Errors
    /// Not suspended, or what the back end says; then the agent stays suspended.
    pub fn resume(&self, tensors: Tensors) -> Result<u64, String> {
        let _going = lock(&self.shared.going);
        {
            let intake = lock(&self.shared.intake);
            let (is, was) = (tensors.shape(), &intake.shape);
            if !intake.asleep {
                return Err("the memory is in use: suspend first".into());
            }
            let alike = |shape: &Shape| (shape.pages_per_block(), shape.tensors_count, shape.in_slot);
            if alike(&is) != alike(was) {
                let (is, was) = (alike(&is), alike(was));
                return Err(format!(
                    "other tensors have come back: (pages, tensors, place in the slot) {is:?}, were {was:?}"
                ));
            }
        }
        let (tell, told) = bounded(1);
        self.command(Command::Resume(tensors, tell));
        let shape = told.recv_timeout(STUCK).map_err(|_| "the agent's thread is gone, or stuck in a call")??;
        let mut intake = lock(&self.shared.intake);
        intake.shape = shape;
        intake.asleep = false;
        Ok(intake.epoch)
    }

    /// Ends every ticket and the thread; whoever waits is woken. True: the memory is not touched after this.
    /// False: copies were still in flight after [`Patience::drain`], and only the end of the process is sure
    /// to end them.
    pub fn stop(&self) -> bool {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.command(Command::Stop(Instant::now() + self.patience.drain));
        // Held until the thread is gone: whoever comes second waits as well. A fork has no thread to wait for.
        if let Some((thread, gone)) = lock(&self.thread).take()
            && self.process == std::process::id()
        {
            // It answers when it has drained, or has given up on that, unless a call of the driver hangs.
            match gone.recv_timeout(self.patience.drain + STUCK) {
                Err(RecvTimeoutError::Timeout) => return false,
                _ => drop(thread.join()),
            }
        }
        // After a look at the flag and before the wait there is no gap: waiters hold these locks.
        drop(lock(&self.shared.waiting));
        self.shared.ended.notify_all();
        drop(lock(&self.shared.reading));
        self.shared.copied.notify_all();
        self.shared.drained.load(Ordering::Relaxed)
    }

    /// Pages that make one block.
    pub fn pages_per_block(&self) -> usize {
        lock(&self.shared.intake).shape.pages_per_block()
    }

    /// What it has done.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// What an operator should know: why there is no server, which settings the one there does not have, what
    /// the copies cannot do.
    pub fn trouble(&self) -> Vec<String> {
        lock(&self.shared.trouble).clone()
    }

    /// Whether a server is attached, when the thread last looked.
    pub fn is_connected(&self) -> bool {
        // Relaxed: it may be wrong a moment later anyway.
        self.shared.is_connected.load(Ordering::Relaxed)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A ticket under way.
struct Job {
    is_load: bool,
    lease: LeaseId,
    expires_at_ns: u64,
    parent: BlockKey,
    first: u32,
    keys: Vec<BlockKey>,
    pages: Vec<u32>,
    after: Option<Moment>,
    watch: Watch,
    submitted: Instant,
    deadline: Instant,
    /// Blocks asked for so far.
    asked: usize,
    /// Requests without a last answer, commits included.
    requests: usize,
    /// Of those, reserves.
    reserves: usize,
    /// Which came, or are resident.
    arrived: Vec<bool>,
    /// Copies that have not begun.
    copies: usize,
    /// Copies that are in flight.
    flying: usize,
    /// Nothing more is begun for it; it ends with its last copy.
    is_ending: bool,
    groups: Groups,
    /// Stores: filled, not committed.
    filled: Vec<(usize, Grant)>,
    blocks_stored: usize,
    blocks_present: usize,
}

/// A load's groups of layers.
struct Groups {
    /// How many.
    count: u32,
    /// With several: slots that wait until every block has been answered for.
    held: Vec<(usize, Grant, bool)>,
    /// Copies of each group that have not ended.
    left: Vec<usize>,
    /// Groups of each block that have been copied.
    of_block: Vec<u32>,
    /// A block is missed: no further group is whole.
    is_short: bool,
}

/// What a request was for.
enum Posted {
    /// Blocks from this index on.
    Load(usize),
    /// Blocks from this index on.
    Reserve(usize),
    /// These blocks.
    Commit(Vec<usize>),
}

/// A slot to copy for a job.
struct Copy {
    ticket: Ticket,
    index: usize,
    group: u32,
    grant: Grant,
    from_disk: bool,
}

/// A batch that the back end has.
struct Flight {
    direction: Direction,
    session_number: u32,
    pool: Pool,
    copies: Vec<Copy>,
}

/// Filled slots that are committed in one request: few enough that others see them soon.
const COMMIT_BLOCKS: usize = 16;
/// How far into a queue one that can be copied is looked for, behind those whose slots are not ready: some 10 ns each,
/// 40 us a turn.
const LOOK_AHEAD: usize = 4096;
/// How long to look at rings and copies before sleeping: a few times what a quick answer takes.
const SPIN: Duration = Duration::from_micros(20);

struct Transfer<B> {
    instance: Instance,
    backend: B,
    tensors_count: u32,
    pages_per_block: usize,
    patience: Patience,
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
    shared: Arc<Shared>,
    session_number: u32,
    jobs: HashMap<Ticket, Job>,
    /// Whose request this is, and what for.
    posted: HashMap<Tag, (Ticket, Posted)>,
    /// Slots to copy: for loads, for stores.
    copies: [VecDeque<Copy>; 2],
    flights: HashMap<BatchId, Flight>,
    next_batch: BatchId,
    ended: Vec<(BatchId, Outcome)>,
    /// A session was lost and its stores may not have ended.
    owes_drained: bool,
    /// Copies were lost sight of: this process is never drained.
    is_tainted: bool,
}

impl<B: CopyBackend> Transfer<B> {
    fn run(&mut self) {
        let mut idle_since = Instant::now();
        loop {
            bell::drain_own(&*self.wake);
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Load(load, submitted, watch) => self.begin_load(load, submitted, watch),
                    Command::Store(store, submitted, watch) => self.begin_store(store, submitted, watch),
                    Command::Cancel(tickets) => tickets.iter().for_each(|ticket| self.cancel(*ticket)),
                    Command::Suspend(until, tell) => {
                        let drained = self.end_all(until);
                        if drained {
                            self.backend.suspend();
                        }
                        let _ = tell.send(drained);
                    }
                    Command::Resume(tensors, tell) => {
                        let resumed = if self.flights.is_empty() && self.jobs.is_empty() {
                            self.backend.resume(tensors)
                        } else {
                            Err("copies are still in flight".into())
                        };
                        if let Ok(shape) = &resumed {
                            self.tensors_count = shape.tensors_count;
                            self.pages_per_block = shape.pages_per_block();
                        }
                        let _ = tell.send(resumed);
                    }
                    Command::Stop(until) => {
                        let drained = self.end_all(until);
                        self.shared.drained.store(drained, Ordering::Relaxed);
                        return self.backend.close(drained);
                    }
                }
            }
            let worked = match self.turn() {
                Ok(worked) => worked,
                Err(_broken) => {
                    let is_writing = self.flights.values().any(|flight| flight.direction == Direction::Store);
                    self.instance.say_goodbye(!is_writing && !self.is_tainted);
                    self.instance.lose_session();
                    true
                }
            };
            self.end_overdue();
            if worked {
                idle_since = Instant::now();
            } else if self.jobs.is_empty() && self.flights.is_empty() || idle_since.elapsed() > SPIN {
                self.sleep();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// After a panic: waits for what is in flight, and touches nothing else.
    fn settle(&mut self, until: Instant) {
        let mut ended = Vec::new();
        while !self.flights.is_empty() && self.backend.moves_by_itself() && Instant::now() < until {
            self.backend.poll(&mut ended);
            for (id, outcome) in ended.drain(..) {
                self.flights.remove(&id);
                self.is_tainted |= outcome == Outcome::Unknown;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if !self.backend.moves_by_itself() {
            self.flights.clear();
        }
        let moving = self.flights.values().flat_map(|flight| &flight.copies).map(|copy| copy.ticket);
        *lock(&self.shared.moving) = moving.collect();
    }

    /// Ends every ticket; waits for what is in flight. Says whether nothing is, any more.
    fn end_all(&mut self, until: Instant) -> bool {
        let tickets: Vec<_> = self.jobs.keys().copied().collect();
        tickets.into_iter().for_each(|ticket| self.end(ticket));
        while !self.flights.is_empty() && Instant::now() < until {
            if !self.collect().unwrap_or(true) {
                std::thread::sleep(self.backend.nap());
            }
        }
        self.flights.is_empty() && !self.is_tainted
    }

    fn begin_load(&mut self, load: Load, submitted: Instant, watch: Watch) {
        let Load { ticket, lease, expires_at_ns, first, keys, pages, epoch: _, after, layer_groups } = load;
        let count = layer_groups.clamp(1, self.tensors_count.max(1));
        let groups = Groups { of_block: vec![0; keys.len()], count, ..Groups::none() };
        let deadline = submitted + self.patience.load;
        let parent = BlockKey::default();
        let job = Job {
            is_load: true,
            lease,
            expires_at_ns,
            groups,
            ..Job::new(parent, first, keys, pages, after, watch, submitted, deadline)
        };
        self.begin(ticket, job);
    }

    fn begin_store(&mut self, store: Store, submitted: Instant, watch: Watch) {
        let Store { ticket, parent, first, keys, pages, epoch: _, after } = store;
        let deadline = submitted + self.patience.store;
        self.begin(ticket, Job::new(parent, first, keys, pages, after, watch, submitted, deadline));
    }

    fn begin(&mut self, ticket: Ticket, job: Job) {
        let is_empty = job.keys.is_empty();
        self.jobs.insert(ticket, job);
        if is_empty {
            self.finish(ticket);
        }
    }

    /// One look at everything. Says whether there was something to do.
    fn turn(&mut self) -> Result<bool, Broken> {
        let connected = self.instance.session().is_some();
        if self.shared.is_connected.swap(connected, Ordering::Relaxed) != connected || !connected {
            self.tell_trouble(connected);
        }
        let number = self.instance.sessions_count();
        if !connected || number != self.session_number {
            self.session_number = number;
            self.shared.counters.sessions.store(u64::from(number), Ordering::Relaxed);
            // What another session was asked will never be answered, and what it granted is void.
            self.posted.clear();
            self.copies.iter_mut().for_each(VecDeque::clear);
            // Nor is it given back: to this session the same grant means another slot's use.
            for job in self.jobs.values_mut() {
                job.filled.clear();
                job.groups.held.clear();
                job.copies = 0;
            }
            self.owes_drained = true;
            // What was not asked yet may be asked of a server that is about to be back; its deadline holds.
            let hopeless = !connected && !self.instance.is_expected();
            let begun = |job: &Job| hopeless || job.asked > 0;
            let lost: Vec<_> = self.jobs.iter().filter(|(_, job)| begun(job)).map(|(ticket, _)| *ticket).collect();
            lost.into_iter().for_each(|ticket| self.end(ticket));
        }
        let mut worked = self.collect()?;
        self.tell_drained();
        // Adopted above and nowhere else: from here on it is the session that the jobs know, or none.
        if self.instance.sessions_count() != self.session_number {
            return Ok(worked);
        }
        let Some(session) = self.instance.session_held() else { return Ok(worked) };
        let mut answers: Vec<Completion> = Vec::new();
        session.poll(|completion| answers.push(completion))?;
        if session.abandoned_count() > 0 && !self.jobs.is_empty() {
            // The server owes answers: slow, stopped or gone. A look at the socket tells which.
            if session.is_hung_up() {
                return Err(Broken("the server is gone"));
            }
            // Stores are not worth waiting for it.
            let new = |job: &Job| !job.is_load && job.asked == 0;
            let new: Vec<_> = self.jobs.iter().filter(|(_, job)| new(job)).map(|(ticket, _)| *ticket).collect();
            new.into_iter().for_each(|ticket| self.end(ticket));
        }
        worked |= !answers.is_empty();
        answers.into_iter().try_for_each(|answer| self.answered(&answer))?;
        worked |= self.post()?;
        worked |= self.hand_over()?;
        Ok(worked)
    }

    /// A session that was lost hears through the next one that nothing writes into its slots any more, nor reads its pool:
    /// what lies behind a pool that is smaller now is given back then.
    fn tell_drained(&mut self) {
        // Without a session every copy in flight is a lost one's.
        let number = self.same_session().is_some().then_some(self.session_number);
        let is_former = |flight: &Flight| Some(flight.session_number) != number;
        if self.owes_drained && !self.is_tainted && !self.flights.values().any(is_former) {
            self.instance.drained();
            self.owes_drained = false;
        }
    }

    fn tell_trouble(&mut self, connected: bool) {
        let mut told: Vec<String> = match connected {
            true => self.instance.unheeded().to_vec(),
            false => self.instance.refusal().or(self.instance.trouble()).map(str::to_owned).into_iter().collect(),
        };
        told.extend(self.backend.trouble());
        *lock(&self.shared.trouble) = told;
    }

    /// Asks for what has not been asked for, as far as there is room: loads first.
    fn post(&mut self) -> Result<bool, Broken> {
        if self.same_session().is_none() {
            return Ok(false);
        }
        let Some(session) = self.instance.session_held() else { return Ok(false) };
        let mut waiting: Vec<_> = self.jobs.iter_mut().filter(|(_, job)| job.asked < job.keys.len()).collect();
        waiting.sort_by_key(|(ticket, job)| (!job.is_load, **ticket));
        let mut posted = false;
        'jobs: for (ticket, job) in waiting {
            while job.asked < job.keys.len() {
                let from = job.asked;
                let batch = &job.keys[from..(from + BATCH_BLOCKS_MAX as usize).min(job.keys.len())];
                let first = job.first + from as u32;
                let parent = if from == 0 { job.parent } else { job.keys[from - 1] };
                let (tag, what) = match job.is_load {
                    true => (session.post_load(job.lease, first, batch), Posted::Load(from)),
                    false => (session.post_reserve(parent, first, batch), Posted::Reserve(from)),
                };
                match tag {
                    Ok(tag) => {
                        job.asked += batch.len();
                        job.requests += 1;
                        job.reserves += usize::from(!job.is_load);
                        self.posted.insert(tag, (*ticket, what));
                        posted = true;
                    }
                    Err(PostError::Full) => break 'jobs,
                    Err(PostError::Broken(broken)) => return Err(broken),
                }
            }
        }
        if posted {
            session.publish();
        }
        Ok(posted)
    }

    fn answered(&mut self, answer: &Completion) -> Result<(), Broken> {
        let Some((ticket, posted)) = self.posted.get(&answer.tag) else { return Ok(()) };
        let ticket = *ticket;
        let Some(job) = self.jobs.get_mut(&ticket) else { return Ok(()) };
        match posted {
            Posted::Load(from) | Posted::Reserve(from) => {
                if answer.status == Status::Present {
                    let blocks = from + answer.first as usize..(from + (answer.first + answer.count) as usize);
                    let blocks =
                        job.arrived.get_mut(blocks).ok_or(Broken("a block is present that was not asked for"))?;
                    job.blocks_present += blocks.len();
                    blocks.fill(true);
                }
                for (index, grant) in answer.grants() {
                    let index = from + index as usize;
                    if job.groups.count > 1 {
                        job.groups.held.push((index, grant, answer.from_disk));
                    } else {
                        let copy = Copy { ticket, index, group: 0, grant, from_disk: answer.from_disk };
                        self.copies[usize::from(!job.is_load)].push_back(copy);
                        job.copies += 1;
                    }
                }
            }
            Posted::Commit(blocks) => {
                let taken = (answer.payload[0] as usize).min(blocks.len());
                job.blocks_stored += taken;
                // Which of them were not taken is not said: in doubt, none was.
                if taken == blocks.len() {
                    blocks.iter().for_each(|index| job.arrived[*index] = true);
                }
            }
        }
        if answer.last {
            job.requests -= 1;
            job.reserves -= usize::from(matches!(posted, Posted::Reserve(_)));
            self.posted.remove(&answer.tag);
        }
        if job.groups.count > 1 && job.requests == 0 && job.asked == job.keys.len() {
            // Layer by layer only makes sense of all blocks: the first group of each, then the second.
            let held = std::mem::take(&mut job.groups.held);
            job.groups.is_short = held.len() < job.keys.len();
            job.groups.left = vec![held.len(); job.groups.count as usize];
            job.copies += held.len() * job.groups.count as usize;
            for group in 0..job.groups.count {
                let copies = held
                    .iter()
                    .map(|(index, grant, from_disk)| (*index, *grant, *from_disk))
                    .map(|(index, grant, from_disk)| Copy { ticket, index, group, grant, from_disk });
                self.copies[0].extend(copies);
            }
        }
        if !job.is_load {
            // Patience is for what does not come: this came.
            job.deadline = Instant::now() + self.patience.store;
        }
        self.advance(ticket)
    }

    /// Hands blocks to the back end, as many as it takes: loads first, and those whose slots are ready before others.
    fn hand_over(&mut self) -> Result<bool, Broken> {
        let mut handed = false;
        if self.same_session().is_none() {
            return Ok(false);
        }
        for direction in [Direction::Load, Direction::Store] {
            while !self.copies[direction as usize].is_empty() {
                let Some(session) = self.instance.session_held() else { return Ok(handed) };
                let (pool, queue) = (session.pool(), &self.copies[direction as usize]);
                let mut ready = |copy: &Copy| self.backend.is_ready(direction, pool, copy.grant.slot);
                let Some(first) = queue.iter().take(LOOK_AHEAD).position(&mut ready) else { break };
                let (ticket, group) = (queue[first].ticket, queue[first].group);
                let Some(job) = self.jobs.get(&ticket) else { return Ok(handed) };
                let tensors = job.groups.tensors(group, self.tensors_count);
                let room = self.backend.room(direction, &tensors);
                let alike = |copy: &Copy| copy.ticket == ticket && copy.group == group;
                let mut ready = |copy: &Copy| self.backend.is_ready(direction, pool, copy.grant.slot);
                let chosen: Vec<usize> = queue
                    .range(first..)
                    .enumerate()
                    .take_while(|(_, copy)| alike(copy))
                    .filter(|(_, copy)| ready(copy))
                    .take(room)
                    .map(|(at, _)| first + at)
                    .collect();
                if chosen.is_empty() {
                    break;
                }
                let block = |at: &usize| BlockCopy {
                    slot: queue[*at].grant.slot,
                    pages: job.pages_of(queue[*at].index, self.pages_per_block),
                };
                let blocks: Vec<BlockCopy<'_>> = chosen.iter().map(block).collect();
                let batch = Batch { direction, pool, blocks: &blocks, tensors, after: job.after.as_ref() };
                let id = self.next_batch;
                match self.backend.submit(id, &batch) {
                    Ok(taken) => {
                        let taken = taken.clamp(1, chosen.len());
                        let pool = pool.clone();
                        let copies = take_out(&mut self.copies[direction as usize], &chosen[..taken]);
                        let flight = Flight { direction, session_number: self.session_number, pool, copies };
                        self.flights.insert(id, flight);
                        self.next_batch += 1;
                        if let Some(job) = self.jobs.get_mut(&ticket) {
                            job.copies -= taken;
                            job.flying += taken;
                            lock(&self.shared.moving).insert(ticket);
                        }
                        handed = true;
                    }
                    Err(Refusal::Full) => break,
                    Err(Refusal::Broken(_)) => {
                        self.tell_trouble(true);
                        self.end(ticket);
                    }
                }
            }
        }
        Ok(handed)
    }

    /// Takes back what the back end has done.
    fn collect(&mut self) -> Result<bool, Broken> {
        if self.flights.is_empty() {
            return Ok(false);
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.backend.poll(&mut ended);
        let collected = !ended.is_empty();
        // All of them, whatever one finds of the session.
        let mut first = Ok(());
        for (id, outcome) in ended.drain(..) {
            first = first.and(self.landed(id, outcome));
        }
        self.ended = ended;
        first.map(|()| collected)
    }

    fn landed(&mut self, id: BatchId, outcome: Outcome) -> Result<(), Broken> {
        let Some(flight) = self.flights.remove(&id) else { return Ok(()) };
        let is_ours = flight.session_number == self.session_number && self.same_session().is_some();
        let mut refused = Vec::new();
        let mut tickets: Vec<Ticket> = Vec::new();
        for copy in flight.copies {
            let Some(job) = self.jobs.get_mut(&copy.ticket) else { continue };
            job.flying -= 1;
            match flight.direction {
                Direction::Load => {
                    // Asked after the copy: a lease that holds now held while it was made.
                    let came = outcome == Outcome::Copied && flight.pool.holds(job.expires_at_ns);
                    if job.came(copy.index, copy.group, came) {
                        let counters = &self.shared.counters;
                        add(if copy.from_disk { &counters.blocks_loaded_ssd } else { &counters.blocks_loaded_dram }, 1);
                    }
                }
                // Asked after the copy: what had ended before the pages were given back was theirs.
                Direction::Store
                    if outcome == Outcome::Copied && lock(&self.shared.overwritten).contains(&copy.ticket) =>
                {
                    if is_ours {
                        refused.push(copy.grant);
                    }
                }
                Direction::Store if outcome == Outcome::Copied && is_ours => {
                    job.filled.push((copy.index, copy.grant));
                    job.deadline = Instant::now() + self.patience.store;
                }
                // Nothing writes into it any more: it goes back.
                Direction::Store if outcome == Outcome::Failed && is_ours => refused.push(copy.grant),
                Direction::Store => {}
            }
            if tickets.last() != Some(&copy.ticket) {
                tickets.push(copy.ticket);
            }
        }
        if outcome == Outcome::Unknown {
            self.is_tainted = true;
            self.tell_trouble(true);
        }
        let mut first = Ok(());
        if let Some(session) = self.same_session().filter(|_| !refused.is_empty()) {
            first = session.abort_soon(refused).map(drop);
            session.publish();
        }
        for ticket in tickets {
            if self.jobs.get(&ticket).is_none_or(|job| job.flying == 0) {
                lock(&self.shared.moving).remove(&ticket);
            }
            first = first.and(self.advance(ticket));
        }
        first
    }

    /// Does what a job's new state allows: commits, tells that its pages are free, ends it.
    fn advance(&mut self, ticket: Ticket) -> Result<(), Broken> {
        let Some(job) = self.jobs.get_mut(&ticket) else { return Ok(()) };
        if job.is_ending {
            if job.flying == 0 {
                self.finish(ticket);
            }
            return Ok(());
        }
        let all_asked = job.asked == job.keys.len();
        if !job.is_load {
            let copied = all_asked && job.reserves == 0 && job.copies == 0 && job.flying == 0;
            if copied && lock(&self.shared.reading).remove(&ticket) {
                self.shared.copied.notify_all();
            }
            if job.filled.len() >= COMMIT_BLOCKS || copied && !job.filled.is_empty() {
                if self.instance.sessions_count() != self.session_number {
                    return Ok(());
                }
                let Some(session) = self.instance.session_held() else { return Ok(()) };
                for filled in job.filled.chunks(BATCH_BLOCKS_MAX as usize) {
                    let (blocks, grants): (Vec<usize>, Vec<Grant>) = filled.iter().copied().unzip();
                    match session.post_commit(&grants) {
                        Ok(tag) => {
                            self.posted.insert(tag, (ticket, Posted::Commit(blocks)));
                            job.requests += 1;
                        }
                        // Rings are sized so that this is rare: the slots go back unfilled.
                        Err(PostError::Full) => session.abort_soon(grants)?,
                        Err(PostError::Broken(broken)) => return Err(broken),
                    }
                }
                job.filled.clear();
                session.publish();
            }
        }
        if all_asked && job.requests == 0 && job.copies == 0 && job.flying == 0 {
            self.end(ticket);
        }
        Ok(())
    }

    /// The slots that were still to be copied for a ticket: none is, any more.
    fn drop_copies(&mut self, ticket: Ticket) -> Vec<Grant> {
        let mut dropped = Vec::new();
        for copies in &mut self.copies {
            copies.retain(|copy| {
                if copy.ticket == ticket {
                    dropped.push(copy.grant);
                }
                copy.ticket != ticket
            });
        }
        dropped
    }

    /// The session, if it is the one that the jobs know: a new one is for the next turn to find.
    fn same_session(&mut self) -> Option<&mut Session> {
        let number = self.session_number;
        if self.instance.sessions_count() == number { self.instance.session_held() } else { None }
    }

    /// Stops a ticket: what is not copied stays uncopied, what is stored is still committed.
    fn cancel(&mut self, ticket: Ticket) {
        match self.jobs.get(&ticket) {
            None => return,
            Some(job) if job.is_ending => return,
            Some(job) if job.is_load => return self.end(ticket),
            Some(_) => {}
        }
        let aborted = self.drop_copies(ticket);
        let Some(job) = self.jobs.get_mut(&ticket) else { return };
        job.asked = job.keys.len();
        job.copies = 0;
        let waits_for_reserves = job.reserves > 0;
        let mut abandoned = Vec::new();
        if waits_for_reserves {
            (job.requests, job.reserves) = (0, 0);
            // Commits among them are taken all the same; they are only not counted.
            self.posted.retain(|tag, (of, _)| {
                if *of == ticket {
                    abandoned.push(*tag);
                }
                *of != ticket
            });
        }
        if let Some(session) = self.same_session() {
            abandoned.into_iter().for_each(|tag| session.abandon(tag));
            // A session that is broken here is found so by the next turn.
            let _ = session.abort_soon(aborted);
        }
        if self.advance(ticket).is_err() {
            self.end(ticket);
        }
    }

    /// Ends what is past its deadline.
    fn end_overdue(&mut self) {
        if self.jobs.is_empty() {
            return;
        }
        let now = Instant::now();
        let is_overdue = |job: &Job| !job.is_ending && now >= job.deadline;
        let overdue: Vec<_> = self.jobs.iter().filter(|(_, job)| is_overdue(job)).map(|(ticket, _)| *ticket).collect();
        overdue.into_iter().for_each(|ticket| self.end(ticket));
    }

    /// The ticket ends, however far it came: nothing is begun for it any more, and when nothing is in flight
    /// it has ended.
    fn end(&mut self, ticket: Ticket) {
        let dropped = self.drop_copies(ticket);
        let Some(job) = self.jobs.get_mut(&ticket) else { return };
        let is_load = job.is_load;
        job.is_ending = true;
        (job.asked, job.copies, job.requests, job.reserves) = (job.keys.len(), 0, 0, 0);
        job.groups.held.clear();
        let is_over = job.flying == 0;
        let mut tags = Vec::new();
        self.posted.retain(|tag, (of, _)| {
            if *of == ticket {
                tags.push(*tag);
            }
            *of != ticket
        });
        if let Some(session) = self.same_session() {
            for tag in tags {
                session.abandon(tag);
                // The server need not start what nobody waits for.
                if is_load && let Ok(cancel) = session.post_cancel(tag) {
                    session.nobody_waits(cancel);
                }
            }
            if !is_load {
                // Never filled: they go back.
                let _ = session.abort_soon(dropped);
            }
            session.publish();
        }
        if is_over {
            self.finish(ticket);
        }
    }

    /// The ticket has ended, and nothing of it is in flight.
    fn finish(&mut self, ticket: Ticket) {
        let Some(job) = self.jobs.remove(&ticket) else { return };
        assert_eq!(job.flying, 0, "its pages and slots are still being copied");
        if let Some(session) = self.same_session().filter(|_| !job.filled.is_empty()) {
            // Filled and not committed.
            let _ = session.abort_soon(job.filled.iter().map(|(_, grant)| *grant));
            session.publish();
        }
        let missed: Vec<u32> =
            (0..).zip(&job.arrived).filter(|(_, arrived)| !**arrived).map(|(index, _)| index).collect();
        let counters = &self.shared.counters;
        if job.is_load {
            add(&counters.blocks_missed, missed.len());
        } else {
            add(&counters.blocks_stored, job.blocks_stored);
            add(&counters.blocks_present, job.blocks_present);
            add(&counters.blocks_dropped, job.keys.len().saturating_sub(job.blocks_stored + job.blocks_present));
        }
        self.shared.finish(ticket, job.is_load, missed, job.submitted.elapsed());
    }

    /// Sleeps until somebody has something to say, a copy may have ended, or the next deadline.
    fn sleep(&mut self) {
        let now = Instant::now();
        let open = self.jobs.values().filter(|job| !job.is_ending);
        let next = open.map(|job| job.deadline.saturating_duration_since(now)).min();
        let mut at_most = next.unwrap_or(Duration::from_secs(3600));
        if !self.flights.is_empty() || self.copies.iter().any(|copies| !copies.is_empty()) {
            at_most = at_most.min(self.backend.nap());
        }
        self.shared.sleeps.store(true, Ordering::Relaxed);
        // Pairs with the fence in `command`: either we see the command, or it sees that we sleep.
        fence(Ordering::SeqCst);
        if self.commands.is_empty() && !at_most.is_zero() {
            let wake = self.wake.clone();
            let is_known = self.instance.sessions_count() == self.session_number;
            let slept = match self.instance.session_held().filter(|_| is_known) {
                Some(session) => session.sleep_beside(Some(wake.as_fd()), at_most),
                None => {
                    // The thread that connects has no bell of ours: look again soon.
                    let nanoseconds = at_most.min(Duration::from_millis(20)).as_nanos() as i64;
                    let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: nanoseconds };
                    let mut fds = [rustix::event::PollFd::new(&wake, rustix::event::PollFlags::IN)];
                    let _ = rustix::event::poll(&mut fds, Some(&timeout));
                    Ok(())
                }
            };
            if slept.is_err() {
                let is_writing = self.flights.values().any(|flight| flight.direction == Direction::Store);
                self.instance.say_goodbye(!is_writing && !self.is_tainted);
                self.instance.lose_session();
            }
        }
        self.shared.sleeps.store(false, Ordering::Relaxed);
    }
}

impl<B> Drop for Transfer<B> {
    fn drop(&mut self) {
        // The last word to the server is a promise that nothing of ours writes any more: or it is not said.
        let is_still = self.flights.is_empty() && !self.is_tainted;
        self.instance.say_goodbye(is_still);
    }
}

/// Takes these out of a queue; their places are in order.
fn take_out(queue: &mut VecDeque<Copy>, places: &[usize]) -> Vec<Copy> {
    let count = places.len();
    if places.last() == Some(&(count - 1)) {
        return queue.drain(..count).collect();
    }
    let (mut taken, mut left) = (Vec::with_capacity(count), VecDeque::with_capacity(queue.len() - count));
    for (at, copy) in queue.drain(..).enumerate() {
        if places.get(taken.len()) == Some(&at) { taken.push(copy) } else { left.push_back(copy) }
    }
    *queue = left;
    taken
}

impl Groups {
    fn none() -> Self {
        Self { count: 1, held: Vec::new(), left: Vec::new(), of_block: Vec::new(), is_short: false }
    }

    /// The tensors of a group.
    fn tensors(&self, group: u32, tensors_count: u32) -> Range<u32> {
        let bound = |group: u32| (u64::from(group) * u64::from(tensors_count) / u64::from(self.count)) as u32;
        bound(group)..bound(group + 1)
    }
}

impl Job {
    #[expect(clippy::too_many_arguments, reason = "a ticket's own words, each once")]
    fn new(
        parent: BlockKey,
        first: u32,
        keys: Vec<BlockKey>,
        pages: Vec<u32>,
        after: Option<Moment>,
        watch: Watch,
        submitted: Instant,
        deadline: Instant,
    ) -> Self {
        let arrived = vec![false; keys.len()];
        Self {
            is_load: false,
            lease: LeaseId(0),
            expires_at_ns: 0,
            parent,
            first,
            keys,
            pages,
            after,
            watch,
            submitted,
            deadline,
            asked: 0,
            requests: 0,
            reserves: 0,
            arrived,
            copies: 0,
            flying: 0,
            is_ending: false,
            groups: Groups::none(),
            filled: Vec::new(),
            blocks_stored: 0,
            blocks_present: 0,
        }
    }

    fn pages_of(&self, index: usize, per_block: usize) -> &[u32] {
        &self.pages[index * per_block..][..per_block]
    }

    /// A group of a loaded block has been copied, or cannot be relied on. Says whether the block is whole now.
    fn came(&mut self, index: usize, group: u32, came: bool) -> bool {
        let groups = &mut self.groups;
        if came {
            groups.of_block[index] += 1;
        } else {
            groups.is_short = true;
        }
        if let Some(left) = groups.left.get_mut(group as usize) {
            *left -= 1;
            let done = groups.left.iter().take_while(|left| **left == 0).count();
            if !groups.is_short {
                self.watch.pass(done as u32);
            }
        }
        self.arrived[index] = groups.of_block[index] == groups.count;
        self.arrived[index]
    }
}
