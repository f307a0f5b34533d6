//! The transfer agent: a thread that answers load and store tickets over one session.
//!
//! Whoever submits never waits: a ticket is a message to the thread, its end is found by [`Agent::poll`].
//! The thread keeps many tickets in flight and copies one block between two looks around, loads before
//! stores. Every ticket ends: a load at its deadline with the blocks that did not come, a store that
//! cannot go on by dropping the rest, and all of them when the thread does, whatever ended it.
//!
//! What the caller's memory needs to know is when it is no longer read: [`Agent::fence`] returns when
//! the stores it names have been copied, or makes them stop.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvring_ipc::bell;
use kvring_ipc::client::{Broken, PostError, Session};
use kvring_ipc::instance::Instance;
use kvring_ipc::key::BlockKey;
use kvring_ipc::wire::{BATCH_BLOCKS_MAX, Completion, Grant, LeaseId, MATCH_BLOCKS_MAX, Status, Tag};

use crate::backend::CopyBackend;
use crate::layout::NO_PAGE;

/// Names a load or store; the submitter's choice, unique among those that have not ended.
pub type Ticket = u64;

/// Blocks to bring into the instance's memory.
#[derive(Debug, Clone)]
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
}

/// Blocks to store from the instance's memory.
#[derive(Debug, Clone)]
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
    Load(Load, Instant),
    Store(Store, Instant),
    /// Stop what these still have to copy.
    Cancel(Vec<Ticket>),
    Stop,
}

/// A ticket that has not ended, as far as its end can be told without the thread.
struct Open {
    is_load: bool,
    blocks: u32,
    submitted: Instant,
}

#[derive(Default)]
struct Shared {
    finished: Mutex<Vec<Finished>>,
    /// Tickets that have not ended. None: the thread is gone, and nothing will be taken.
    open: Mutex<Option<HashMap<Ticket, Open>>>,
    /// Nobody waits for anything any more.
    stopping: AtomicBool,
    /// Stores whose pages may still be read.
    reading: Mutex<HashSet<Ticket>>,
    /// Rung when `reading` shrinks.
    copied: Condvar,
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

/// Bounds of an agent's patience.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// How long a load may take: reads from a busy disk, not a scheduler's wait.
    pub load: Duration,
    /// How long a store may wait for slots before it is dropped.
    pub store: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { load: Duration::from_secs(2), store: Duration::from_secs(2) }
    }
}

impl Shared {
    fn finish(&self, ticket: Ticket, is_load: bool, missed: Vec<u32>, took: Duration) {
        if let Some(open) = &mut *lock(&self.open) {
            open.remove(&ticket);
        }
        lock(&self.reading).remove(&ticket);
        self.copied.notify_all();
        lock(&self.finished).push(Finished { ticket, is_load, missed, took });
        self.ended.notify_all();
    }
}

/// Ends what is open when the thread ends, by a stop or by a panic of ours.
struct LastWords(Arc<Shared>);

impl Drop for LastWords {
    fn drop(&mut self) {
        let open = lock(&self.0.open).take().unwrap_or_default();
        for (ticket, Open { is_load, blocks, submitted }) in open {
            add(
                if is_load { &self.0.counters.blocks_missed } else { &self.0.counters.blocks_dropped },
                blocks as usize,
            );
            self.0.finish(ticket, is_load, (0..blocks).collect(), submitted.elapsed());
        }
        self.0.is_connected.store(false, Ordering::Relaxed);
    }
}

/// A transfer agent. Dropping it ends every ticket and the thread.
pub struct Agent {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    shared: Arc<Shared>,
    pages_per_block: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

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
        let (sender, receiver) = channel();
        let shared = Arc::new(Shared { open: Mutex::new(Some(HashMap::new())), ..Shared::default() });
        let pages_per_block = backend.pages_per_block();
        let mut instance = instance;
        instance.drain_by_hand();
        let mut transfer = Transfer {
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
        };
        // What opening has found out is known from the start.
        let connected = transfer.instance.is_connected();
        transfer.shared.is_connected.store(connected, Ordering::Relaxed);
        transfer.tell_trouble(connected);
        let last_words = LastWords(shared.clone());
        let thread = std::thread::Builder::new().name("kvring-agent".into()).spawn(move || {
            let _last_words = last_words;
            transfer.run();
        })?;
        Ok(Self { commands: sender, wake, shared, pages_per_block, thread: Mutex::new(Some(thread)) })
    }

    fn command(&self, command: Command) {
        // The thread only ends with this value, or by a bug of ours; then everything is missed.
        let _ = self.commands.send(command);
        bell::ring_own(&self.wake);
    }

    /// Submits a load.
    ///
    /// # Panics
    /// If a ticket of this name has not ended, if there are not as many pages as its keys have, no keys,
    /// or more than a chain can have.
    pub fn load(&self, load: Load) {
        self.check(load.first, &load.keys, &load.pages);
        let (ticket, blocks) = (load.ticket, load.keys.len());
        self.submit(ticket, true, blocks, |submitted| Command::Load(load, submitted));
    }

    /// Submits a store. Its pages are read until it has ended or a fence has returned.
    ///
    /// # Panics
    /// As [`Agent::load`], and if a page is [`NO_PAGE`]: a block is stored whole.
    pub fn store(&self, store: Store) {
        self.check(store.first, &store.keys, &store.pages);
        assert!(!store.pages.contains(&NO_PAGE), "a block is stored whole");
        let (ticket, blocks) = (store.ticket, store.keys.len());
        self.submit(ticket, false, blocks, |submitted| Command::Store(store, submitted));
    }

    fn check(&self, first: u32, keys: &[BlockKey], pages: &[u32]) {
        assert!(!keys.is_empty(), "a transfer of nothing");
        assert_eq!(pages.len(), keys.len() * self.pages_per_block, "pages of {} blocks", keys.len());
        let end = u64::from(first) + keys.len() as u64;
        assert!(end <= u64::from(MATCH_BLOCKS_MAX), "a chain has at most {MATCH_BLOCKS_MAX} blocks");
    }

    /// Whether a ticket of this name has not ended yet.
    pub fn is_open(&self, ticket: Ticket) -> bool {
        lock(&self.shared.open).as_ref().is_some_and(|open| open.contains_key(&ticket))
    }

    fn submit(&self, ticket: Ticket, is_load: bool, blocks: usize, command: impl FnOnce(Instant) -> Command) {
        let submitted = Instant::now();
        let mut open = lock(&self.shared.open);
        let Some(tickets) = &mut *open else {
            drop(open);
            let counters = &self.shared.counters;
            add(if is_load { &counters.blocks_missed } else { &counters.blocks_dropped }, blocks);
            return self.shared.finish(ticket, is_load, (0..blocks as u32).collect(), Duration::ZERO);
        };
        let before = tickets.insert(ticket, Open { is_load, blocks: blocks as u32, submitted });
        assert!(before.is_none(), "ticket {ticket} has not ended");
        if !is_load {
            lock(&self.shared.reading).insert(ticket);
        }
        // Under the lock: a fence that knows of the ticket comes after it.
        self.command(command(submitted));
    }

    /// Tickets that have ended since the last call.
    pub fn poll(&self) -> Vec<Finished> {
        std::mem::take(&mut *lock(&self.shared.finished))
    }

    /// Waits until these stores read no page any more; those that are not done after `patience` are
    /// stopped. Says whether all were copied in time.
    ///
    /// The wait after that is for one block's copy at the most.
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
        while lock(&self.shared.open).is_some() {
            self.command(Command::Cancel(tickets.to_vec()));
            if wait(Duration::from_secs(1)) {
                break;
            }
        }
        false
    }

    /// Waits until a ticket has ended, at most `at_most`. Says whether [`Agent::poll`] has something.
    pub fn wait(&self, at_most: Duration) -> bool {
        let finished = lock(&self.shared.finished);
        let waits = |finished: &mut Vec<Finished>| finished.is_empty() && !self.shared.stopping.load(Ordering::Relaxed);
        let waited = self.shared.ended.wait_timeout_while(finished, at_most, waits);
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }

    /// Ends every ticket and the thread; whoever waits is woken. The memory is not touched after this.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.command(Command::Stop);
        // Held until the thread is gone: whoever comes second waits as well.
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
        // After a look at the flag and before the wait there is no gap: waiters hold these locks.
        drop(lock(&self.shared.finished));
        self.shared.ended.notify_all();
        drop(lock(&self.shared.reading));
        self.shared.copied.notify_all();
    }

    /// Pages that make one block.
    pub fn pages_per_block(&self) -> usize {
        self.pages_per_block
    }

    /// What it has done.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// What an operator should know: why there is no server, or which settings the one there does not have.
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
    /// Slots to be copied yet.
    copies: usize,
    /// Stores: filled, not committed.
    filled: Vec<(usize, Grant)>,
    blocks_stored: usize,
    blocks_present: usize,
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
    grant: Grant,
    from_disk: bool,
}

/// Filled slots that are committed in one request: few enough that others see them soon.
const COMMIT_BLOCKS: usize = 16;
/// How long to look at the ring before sleeping: a few times what a quick answer takes.
const SPIN: Duration = Duration::from_micros(20);

struct Transfer<B> {
    instance: Instance,
    backend: B,
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
}

impl<B: CopyBackend> Transfer<B> {
    fn run(mut self) {
        let mut idle_since = Instant::now();
        loop {
            bell::drain_own(&*self.wake);
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Load(load, submitted) => self.begin_load(load, submitted),
                    Command::Store(store, submitted) => self.begin_store(store, submitted),
                    Command::Cancel(tickets) => tickets.iter().for_each(|ticket| self.stop_store(*ticket)),
                    Command::Stop => {
                        let tickets: Vec<_> = self.jobs.keys().copied().collect();
                        tickets.into_iter().for_each(|ticket| self.end(ticket));
                        return;
                    }
                }
            }
            let worked = match self.turn() {
                Ok(worked) => worked,
                Err(_broken) => {
                    self.instance.lose_session();
                    true
                }
            };
            self.end_overdue();
            if worked {
                idle_since = Instant::now();
            } else if self.jobs.is_empty() || idle_since.elapsed() > SPIN {
                self.sleep();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    fn begin_load(&mut self, load: Load, submitted: Instant) {
        let Load { ticket, lease, expires_at_ns, first, keys, pages } = load;
        let arrived = vec![false; keys.len()];
        let deadline = submitted + self.patience.load;
        let parent = BlockKey::default();
        let job = Job {
            is_load: true,
            lease,
            expires_at_ns,
            arrived,
            ..Job::new(parent, first, keys, pages, submitted, deadline)
        };
        self.jobs.insert(ticket, job);
    }

    fn begin_store(&mut self, store: Store, submitted: Instant) {
        let Store { ticket, parent, first, keys, pages } = store;
        let deadline = submitted + self.patience.store;
        self.jobs.insert(ticket, Job::new(parent, first, keys, pages, submitted, deadline));
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
            // Copies are made in this thread, one at a time: none is under way.
            self.instance.drained();
            // Nor is it given back: to this session the same grant means another slot's use.
            self.jobs.values_mut().for_each(|job| job.filled.clear());
            // What was not asked yet may be asked of a server that is about to be back; its deadline holds.
            let hopeless = !connected && !self.instance.is_expected();
            let begun = |job: &Job| hopeless || job.asked > 0;
            let lost: Vec<_> = self.jobs.iter().filter(|(_, job)| begun(job)).map(|(ticket, _)| *ticket).collect();
            lost.into_iter().for_each(|ticket| self.end(ticket));
        }
        let Some(session) = self.instance.session() else { return Ok(false) };
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
        let mut worked = !answers.is_empty();
        answers.into_iter().try_for_each(|answer| self.answered(&answer))?;
        worked |= self.post()?;
        worked |= self.copy_one()?;
        Ok(worked)
    }

    fn tell_trouble(&mut self, connected: bool) {
        let told = match connected {
            true => self.instance.unheeded().to_vec(),
            false => self.instance.refusal().or(self.instance.trouble()).map(str::to_owned).into_iter().collect(),
        };
        *lock(&self.shared.trouble) = told;
    }

    /// Asks for what has not been asked for, as far as there is room: loads first.
    fn post(&mut self) -> Result<bool, Broken> {
        let Some(session) = self.instance.session() else { return Ok(false) };
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
                    let copy = Copy { ticket, index, grant, from_disk: answer.from_disk };
                    self.copies[usize::from(!job.is_load)].push_back(copy);
                    job.copies += 1;
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
        if !job.is_load {
            // Patience is for what does not come: this came.
            job.deadline = Instant::now() + self.patience.store;
        }
        self.advance(ticket)
    }

    /// Copies one slot: one, so that a load never waits behind many stores, nor a fence behind many loads.
    fn copy_one(&mut self) -> Result<bool, Broken> {
        let [loads, stores] = &mut self.copies;
        let Some(copy) = loads.pop_front().or_else(|| stores.pop_front()) else { return Ok(false) };
        let Copy { ticket, index, grant, from_disk } = copy;
        let (Some(job), Some(session)) = (self.jobs.get_mut(&ticket), self.instance.session()) else { return Ok(true) };
        let pages_per_block = self.backend.pages_per_block();
        let pages = &job.pages[index * pages_per_block..][..pages_per_block];
        job.copies -= 1;
        if job.is_load {
            self.backend.load(session.pool(), grant.slot, pages);
            // Asked after the copy: a lease that holds now held while it was made.
            if session.pool().holds(job.expires_at_ns) {
                job.arrived[index] = true;
                let counters = &self.shared.counters;
                add(if from_disk { &counters.blocks_loaded_ssd } else { &counters.blocks_loaded_dram }, 1);
            }
        } else {
            self.backend.store(session.pool(), grant.slot, pages);
            job.filled.push((index, grant));
            job.deadline = Instant::now() + self.patience.store;
        }
        self.advance(ticket)?;
        Ok(true)
    }

    /// Does what a job's new state allows: commits, tells that its pages are free, ends it.
    fn advance(&mut self, ticket: Ticket) -> Result<(), Broken> {
        let Some(job) = self.jobs.get_mut(&ticket) else { return Ok(()) };
        let all_asked = job.asked == job.keys.len();
        if !job.is_load {
            let copied = all_asked && job.reserves == 0 && job.copies == 0;
            if copied && lock(&self.shared.reading).remove(&ticket) {
                self.shared.copied.notify_all();
            }
            if job.filled.len() >= COMMIT_BLOCKS || copied && !job.filled.is_empty() {
                let Some(session) = self.instance.session() else { return Ok(()) };
                let (blocks, grants): (Vec<usize>, Vec<Grant>) = job.filled.drain(..).unzip();
                // At most COMMIT_BLOCKS and one copy more: one request.
                match session.post_commit(&grants) {
                    Ok(tag) => {
                        self.posted.insert(tag, (ticket, Posted::Commit(blocks)));
                        job.requests += 1;
                    }
                    // Rings are sized so that this is rare: the slots go back unfilled.
                    Err(PostError::Full) => session.abort_soon(grants)?,
                    Err(PostError::Broken(broken)) => return Err(broken),
                }
                session.publish();
            }
        }
        if all_asked && job.requests == 0 && job.copies == 0 {
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

    /// Stops a store: what is not copied stays uncopied, what is copied is still committed.
    fn stop_store(&mut self, ticket: Ticket) {
        if self.jobs.get(&ticket).is_none_or(|job| job.is_load) {
            return;
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
        let overdue: Vec<_> =
            self.jobs.iter().filter(|(_, job)| now >= job.deadline).map(|(ticket, _)| *ticket).collect();
        overdue.into_iter().for_each(|ticket| self.end(ticket));
    }

    /// The ticket has ended, however far it came: nothing is copied for it any more.
    fn end(&mut self, ticket: Ticket) {
        let dropped = self.drop_copies(ticket);
        let Some(job) = self.jobs.remove(&ticket) else { return };
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
                if job.is_load
                    && let Ok(cancel) = session.post_cancel(tag)
                {
                    session.nobody_waits(cancel);
                }
            }
            if !job.is_load {
                // Filled and not committed, or never filled: they go back either way.
                let _ = session.abort_soon(job.filled.iter().map(|(_, grant)| *grant).chain(dropped));
            }
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

    /// Sleeps until somebody has something to say, or the next deadline.
    fn sleep(&mut self) {
        let now = Instant::now();
        let next = self.jobs.values().map(|job| job.deadline.saturating_duration_since(now)).min();
        let wake = self.wake.clone();
        let at_most = next.unwrap_or(Duration::from_secs(3600));
        let slept = match self.instance.session() {
            Some(session) => session.sleep_beside(Some(wake.as_fd()), at_most),
            None => {
                // The thread that connects has no bell of ours: look again soon.
                let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
                let mut fds = [rustix::event::PollFd::new(&wake, rustix::event::PollFlags::IN)];
                let _ = rustix::event::poll(&mut fds, Some(&timeout));
                Ok(())
            }
        };
        if slept.is_err() {
            self.instance.lose_session();
        }
    }
}

impl Job {
    fn new(
        parent: BlockKey,
        first: u32,
        keys: Vec<BlockKey>,
        pages: Vec<u32>,
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
            submitted,
            deadline,
            asked: 0,
            requests: 0,
            reserves: 0,
            arrived,
            copies: 0,
            filled: Vec::new(),
            blocks_stored: 0,
            blocks_present: 0,
        }
    }
}
