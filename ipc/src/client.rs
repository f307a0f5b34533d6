//! A session, on the instance's side: rings, arena, pool. Posts and polls without waiting; the one
//! wait there is has a deadline. Not shared between threads: one session a thread.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::bell;
use crate::doorbell;
use crate::epoch::EpochReader;
use crate::events::{EventReader, Events};
use crate::handshake::{Attach, Channel, ChannelError, Reply, Request, Welcome};
use crate::key::BlockKey;
use crate::layout::Difference;
use crate::mapping::{Mapping, is_sealed};
use crate::ring::{Consumer, Producer};
use crate::segment::{ARENA_BYTES, RingView, Segment, SessionState};
use crate::wire::{BATCH_BLOCKS_MAX, Completion, Grant, LeaseId, MATCH_BLOCKS_MAX, Op, Span, Status, Submission, Tag};

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens: no server, or a stale socket file.
    #[error("no server listens on {0}")]
    NoServer(String),
    /// The server refuses this instance.
    #[error("the server refuses this instance: {reason}{}", listed(.differences))]
    Refused {
        /// A sentence.
        reason: String,
        /// Fields in which the layouts differ.
        differences: Vec<Difference>,
        /// Whether asking again is in vain.
        permanent: bool,
    },
    /// The exchange failed.
    #[error("handshake with the server on {socket} failed: {error}")]
    Handshake {
        /// Where.
        socket: String,
        /// How.
        error: ChannelError,
    },
}

fn listed(differences: &[Difference]) -> String {
    differences.iter().map(|difference| format!("; {difference}")).collect()
}

/// The session is over: no further answer will come. Everything asked is a miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the session is over: {0}")]
pub struct Broken(pub &'static str);

/// Why a request was not posted. Nothing was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// Too much is in flight: poll first.
    #[error("no room: poll first")]
    Full,
    /// The session is over.
    #[error(transparent)]
    Broken(#[from] Broken),
}

/// The pool as a client sees it.
#[derive(Debug, Clone)]
pub struct Pool {
    mapping: Arc<Mapping>,
    slot_bytes: usize,
    slots_count: u32,
    /// Which pool this is, if it is a server's.
    id: Option<u64>,
    epoch: Option<Arc<EpochReader>>,
    file: Option<Arc<OwnedFd>>,
}

impl Pool {
    /// A view of a mapped pool.
    pub fn new(mapping: Arc<Mapping>, slot_bytes: usize, slots_count: u32) -> Self {
        assert!(slot_bytes * slots_count as usize <= mapping.bytes());
        Self { mapping, slot_bytes, slots_count, id: None, epoch: None, file: None }
    }
    /// Whether a lease that ends at this moment still held when all that was read before this call was
    /// read: it had not ended, and the engine process that granted it was alive.
    pub fn holds(&self, expires_at_ns: u64) -> bool {
        self.epoch.as_ref().is_none_or(|epoch| epoch.is_current()) && monotonic_ns() < expires_at_ns
    }
    /// Whether no server will have this pool again.
    pub fn is_given_up(&self) -> bool {
        self.epoch.as_ref().is_some_and(|epoch| epoch.is_given_up())
    }
    /// The memory's file, if it is a server's: one for every process that shares it, to lock it by.
    pub fn file(&self) -> Option<&Arc<OwnedFd>> {
        self.file.as_ref()
    }
    /// The memory.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
    /// Bytes of one slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }
    /// How many slots.
    pub fn slots_count(&self) -> u32 {
        self.slots_count
    }
    /// Where a slot begins.
    pub fn offset_of(&self, slot: u32) -> usize {
        assert!(slot < self.slots_count);
        slot as usize * self.slot_bytes
    }
    /// Copies bytes out of a slot.
    pub fn copy_out(&self, slot: u32, offset_in_slot: usize, target: &mut [u8]) {
        assert!(offset_in_slot + target.len() <= self.slot_bytes);
        self.mapping.copy_out(self.offset_of(slot) + offset_in_slot, target);
    }
    /// Copies bytes into a slot.
    pub fn copy_in(&self, slot: u32, offset_in_slot: usize, source: &[u8]) {
        assert!(offset_in_slot + source.len() <= self.slot_bytes);
        self.mapping.copy_in(self.offset_of(slot) + offset_in_slot, source);
    }
}

/// A request that has no last completion yet.
#[derive(Debug)]
struct Outstanding {
    op: Op,
    count: u32,
    arena: Option<u32>,
    waiter: Waiter,
}

/// Who waits for a request's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiter {
    /// The caller.
    Caller,
    /// Nobody ever did: its answer says nothing that matters.
    Nobody,
    /// Somebody did and gave up: what it brings is given back.
    GaveUp,
}

/// Room in the arena is given in the order it was taken; a batch in the middle waits for its elders.
#[derive(Debug, Default)]
struct Arena {
    /// (id, bytes, done), oldest first.
    taken: VecDeque<(u32, u32, bool)>,
    next_id: u32,
    start: u32,
    used: u32,
}

impl Arena {
    /// A contiguous range of `bytes`; `None` when there is none now.
    fn take(&mut self, bytes: u32) -> Option<(u32, u32)> {
        let bytes = bytes.next_multiple_of(16);
        let end = (self.start + self.used) % ARENA_BYTES;
        // A range does not wrap: what is left at the end is skipped, as part of this range.
        let skip = if end + bytes > ARENA_BYTES { ARENA_BYTES - end } else { 0 };
        if self.used + skip + bytes > ARENA_BYTES {
            return None;
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.taken.push_back((id, skip + bytes, false));
        self.used += skip + bytes;
        Some((id, (end + skip) % ARENA_BYTES))
    }

    fn give_back(&mut self, id: u32) {
        if let Some(range) = self.taken.iter_mut().find(|range| range.0 == id) {
            range.2 = true;
        }
        while let Some((_, bytes, true)) = self.taken.front() {
            self.start = (self.start + bytes) % ARENA_BYTES;
            self.used -= bytes;
            self.taken.pop_front();
        }
    }
}

/// One attached session.
#[derive(Debug)]
pub struct Session {
    segment: Segment,
    pool: Pool,
    submissions: Producer<RingView>,
    completions: Consumer<RingView>,
    outstanding: HashMap<Tag, Outstanding>,
    abandoned_count: usize,
    /// What abandoned requests brought, to be given back when the ring has room.
    give_back: VecDeque<GiveBack>,
    inbox: VecDeque<Completion>,
    arena: Arena,
    next_tag: u64,
    wires: Option<Wires>,
    welcome: Option<Welcome>,
    /// Who may say goodbye: a forked child that drops its copy may not.
    process: u32,
    may_be_written: bool,
}

#[derive(Debug)]
enum GiveBack {
    Lease(LeaseId),
    Slot(Grant),
}

/// What ties a session to another process; absent in a simulation.
#[derive(Debug)]
struct Wires {
    control: Channel,
    /// Our end: ringing it wakes the server, its ring makes it readable.
    bell: OwnedFd,
    events: EventReader,
}

/// How long a wait spins before it sleeps: a few times what a quick answer takes.
const SPIN: Duration = Duration::from_micros(20);

/// Nanoseconds of CLOCK_MONOTONIC, the clock of lease expiry on both sides.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Since boot: positive and far below 2^63 ns.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Session {
    /// Connects and attaches; every wait is bounded by `timeout`. A pool that is mapped already, as `kept`
    /// says, stays where it is: what was registered of it stays valid.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(
        socket: &Path,
        attach: &Attach,
        timeout: Duration,
        kept: Option<&Pool>,
    ) -> Result<Self, ConnectError> {
        let name = socket.display().to_string();
        let channel = Channel::connect(socket, timeout).map_err(|errno| match errno {
            rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED => ConnectError::NoServer(name.clone()),
            errno => ConnectError::Handshake { socket: name.clone(), error: errno.into() },
        })?;
        let failed = |error| ConnectError::Handshake { socket: name.clone(), error };
        channel.send(&Request::Attach(attach.clone()), &[]).map_err(failed)?;
        match Self::welcomed(&channel, kept, failed) {
            Ok((mut session, bell, events)) => {
                session.wires = Some(Wires { control: channel, bell, events });
                Ok(session)
            }
            Err(error) => {
                // Nothing was written anywhere. Else the server would keep this session for as long as this process
                // lives, and one more for each time that it tries again.
                let _ = channel.send(&Request::Goodbye, &[]);
                Err(error)
            }
        }
    }

    /// What the server answers to an attach, opened: this process may have no room for it.
    fn welcomed(
        channel: &Channel,
        kept: Option<&Pool>,
        failed: impl Fn(ChannelError) -> ConnectError,
    ) -> Result<(Self, OwnedFd, EventReader), ConnectError> {
        let (reply, fds): (Reply, _) = channel.receive(true).map_err(&failed)?;
        let welcome = match reply {
            Reply::Welcome(welcome) => welcome,
            Reply::Refused { reason, differences, permanent } => {
                return Err(ConnectError::Refused { reason, differences, permanent });
            }
            _ => return Err(failed(ChannelError::Malformed("not an answer to attach".into()))),
        };
        let Ok([segment, pool, bell, events, epoch]) = <[OwnedFd; 5]>::try_from(fds) else {
            return Err(failed(ChannelError::Malformed("five descriptors were expected".into())));
        };
        let events = EventReader::open(&events).map_err(|errno| failed(errno.into()))?;
        let epoch = EpochReader::open(&epoch, welcome.epoch).map_err(|errno| failed(errno.into()))?;
        let session = Self::open(welcome, &segment, &pool, kept, epoch).map_err(failed)?;
        Ok((session, bell, events))
    }

    fn open(
        welcome: Welcome,
        segment: &OwnedFd,
        pool: &OwnedFd,
        kept: Option<&Pool>,
        epoch: EpochReader,
    ) -> Result<Self, ChannelError> {
        let segment = Segment::open(segment)?;
        let used = welcome.slot_bytes.checked_mul(u64::from(welcome.slots_count));
        if used.is_none_or(|used| used > welcome.pool_bytes) || !is_sealed(pool, welcome.pool_bytes)? {
            return Err(ChannelError::Malformed("the pool is not what the welcome says".into()));
        }
        let is_it =
            |kept: &&Pool| kept.id == Some(welcome.pool_id) && kept.mapping.bytes() as u64 == welcome.pool_bytes;
        let (mapping, file) = match kept.filter(is_it) {
            Some(kept) => (kept.mapping.clone(), kept.file.clone()),
            None => {
                let mapping = Mapping::new(pool, welcome.pool_bytes as usize)?;
                (Arc::new(mapping), Some(Arc::new(rustix::io::fcntl_dupfd_cloexec(pool, 0)?)))
            }
        };
        let pool = Pool::new(mapping, welcome.slot_bytes as usize, welcome.slots_count);
        let pool = Pool { id: Some(welcome.pool_id), epoch: Some(Arc::new(epoch)), file, ..pool };
        let mut session = Self::within(segment, pool);
        session.welcome = Some(welcome);
        Ok(session)
    }

    /// A session over memory of this process: simulations and tests of hostile peers.
    pub fn within(segment: Segment, pool: Pool) -> Self {
        Self {
            submissions: Producer::new(segment.submissions()),
            completions: Consumer::new(segment.completions()),
            segment,
            pool,
            outstanding: HashMap::new(),
            abandoned_count: 0,
            give_back: VecDeque::new(),
            inbox: VecDeque::new(),
            arena: Arena::default(),
            next_tag: 1,
            may_be_written: false,
            wires: None,
            welcome: None,
            process: std::process::id(),
        }
    }

    /// The pool.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }
    /// What the server said at the handshake; `None` in a simulation.
    pub fn welcome(&self) -> Option<&Welcome> {
        self.welcome.as_ref()
    }
    /// The shared memory, for tests that write garbage there.
    #[doc(hidden)]
    pub fn segment(&self) -> &Segment {
        &self.segment
    }
    /// Requests that have no last completion yet.
    pub fn outstanding_count(&self) -> usize {
        self.outstanding.len()
    }
    /// Requests whose waiter gave up: while there are any, the server is slow, stopped or gone.
    pub fn abandoned_count(&self) -> usize {
        self.abandoned_count
    }

    fn post(&mut self, submission: Submission, count: u32, arena: Option<u32>) -> Result<Tag, PostError> {
        let tag = Tag(self.next_tag);
        self.next_tag += 1;
        self.submissions.push(submission.encode(tag));
        self.outstanding.insert(tag, Outstanding { op: submission.op(), count, arena, waiter: Waiter::Caller });
        Ok(tag)
    }

    /// Room for one entry, and as many bytes of the arena.
    fn room(&mut self, arena_bytes: u32) -> Result<Option<(u32, u32)>, PostError> {
        let room = self.submissions.room(1).map_err(|_| Broken("the server's submission head makes no sense"))?;
        if room == 0 {
            return Err(PostError::Full);
        }
        if arena_bytes == 0 {
            return Ok(None);
        }
        self.arena.take(arena_bytes).map(Some).ok_or(PostError::Full)
    }

    fn with_keys(
        &mut self,
        keys: &[BlockKey],
        limit: u32,
        submission: impl FnOnce(Span) -> Submission,
    ) -> Result<Tag, PostError> {
        assert!(!keys.is_empty() && keys.len() <= limit as usize, "{} keys: 1 to {limit} fit a request", keys.len());
        let count = keys.len() as u32;
        let Some((arena, offset_in_arena)) = self.room(count * 16)? else { return Err(PostError::Full) };
        for (index, key) in (0..).zip(keys) {
            self.segment.write_key(offset_in_arena, index, *key);
        }
        self.post(submission(Span { offset_in_arena, count }), count, Some(arena))
    }

    fn with_grants(&mut self, grants: &[Grant], submission: impl FnOnce(Span) -> Submission) -> Result<Tag, PostError> {
        assert!(!grants.is_empty() && grants.len() <= BATCH_BLOCKS_MAX as usize);
        let count = grants.len() as u32;
        let Some((arena, offset_in_arena)) = self.room(count * 8)? else { return Err(PostError::Full) };
        for (index, grant) in (0..).zip(grants) {
            self.segment.write_grant(offset_in_arena, index, *grant);
        }
        self.post(submission(Span { offset_in_arena, count }), count, Some(arena))
    }

    /// Posts a ping.
    ///
    /// # Errors
    /// [`PostError`].
    pub fn post_ping(&mut self) -> Result<Tag, PostError> {
        self.room(0)?;
        self.post(Submission::Ping, 0, None)
    }
    /// Posts a match of a chain of up to [`MATCH_BLOCKS_MAX`] keys, root first.
    ///
    /// # Errors
    /// [`PostError`].
    ///
    /// # Panics
    /// If there are no keys or too many.
    pub fn post_match(&mut self, keys: &[BlockKey]) -> Result<Tag, PostError> {
        self.with_keys(keys, MATCH_BLOCKS_MAX, |keys| Submission::Match { keys })
    }
    /// Posts the end of a lease.
    ///
    /// # Errors
    /// [`PostError`].
    pub fn post_release(&mut self, lease: LeaseId) -> Result<Tag, PostError> {
        self.room(0)?;
        self.post(Submission::Release { lease }, 0, None)
    }
    /// Posts a load of up to [`BATCH_BLOCKS_MAX`] consecutive blocks of a lease, the first at depth `first`.
    ///
    /// # Errors
    /// [`PostError`].
    ///
    /// # Panics
    /// If there are no keys or too many.
    pub fn post_load(&mut self, lease: LeaseId, first: u32, keys: &[BlockKey]) -> Result<Tag, PostError> {
        self.with_keys(keys, BATCH_BLOCKS_MAX, |keys| Submission::Load { lease, first, keys })
    }
    /// Posts a prefetch of leased blocks.
    ///
    /// # Errors
    /// [`PostError`].
    pub fn post_prefetch(&mut self, lease: LeaseId, first: u32, count: u32) -> Result<Tag, PostError> {
        self.room(0)?;
        self.post(Submission::Prefetch { lease, first, count }, count, None)
    }
    /// Posts a reserve of up to [`BATCH_BLOCKS_MAX`] consecutive blocks after `parent`.
    ///
    /// # Errors
    /// [`PostError`].
    ///
    /// # Panics
    /// If there are no keys or too many.
    pub fn post_reserve(&mut self, parent: BlockKey, first: u32, keys: &[BlockKey]) -> Result<Tag, PostError> {
        self.with_keys(keys, BATCH_BLOCKS_MAX, |keys| Submission::Reserve { parent, first, keys })
    }
    /// Posts the commit of up to [`BATCH_BLOCKS_MAX`] filled slots.
    ///
    /// # Errors
    /// [`PostError`].
    ///
    /// # Panics
    /// If there are no grants or too many.
    pub fn post_commit(&mut self, grants: &[Grant]) -> Result<Tag, PostError> {
        self.with_grants(grants, |grants| Submission::Commit { grants })
    }
    /// Posts the abort of up to [`BATCH_BLOCKS_MAX`] reserved slots.
    ///
    /// # Errors
    /// [`PostError`].
    ///
    /// # Panics
    /// If there are no grants or too many.
    pub fn post_abort(&mut self, grants: &[Grant]) -> Result<Tag, PostError> {
        self.with_grants(grants, |grants| Submission::Abort { grants })
    }
    /// Posts the cancellation of a load.
    ///
    /// # Errors
    /// [`PostError`].
    pub fn post_cancel(&mut self, target: Tag) -> Result<Tag, PostError> {
        self.room(0)?;
        self.post(Submission::Cancel { target }, 0, None)
    }

    /// Makes everything posted visible, and wakes the server if it sleeps. Once a batch.
    pub fn publish(&mut self) {
        if self.submissions.publish() {
            self.wake_server();
        }
    }

    fn wake_server(&self) {
        if doorbell::must_ring(self.segment.server_sleeps())
            && let Some(wires) = &self.wires
        {
            bell::ring(&wires.bell);
        }
    }

    /// Hands consumed places back. A server that sleeps because it had no room is woken.
    fn hand_back(&mut self, consumed: bool) {
        if consumed {
            self.completions.release();
            self.wake_server();
        }
    }

    /// Takes completions off the ring; those of live requests go to `take`.
    ///
    /// # Errors
    /// [`Broken`]: no more will come, now or ever.
    pub fn poll(&mut self, mut take: impl FnMut(Completion)) -> Result<usize, Broken> {
        let mut count = 0;
        while let Some(completion) = self.inbox.pop_front() {
            take(completion);
            count += 1;
        }
        let mut consumed = false;
        loop {
            match self.next_completion()? {
                Next::Live(completion) => {
                    take(completion);
                    count += 1;
                }
                Next::Abandoned => {}
                Next::None => break,
            }
            consumed = true;
        }
        self.hand_back(consumed);
        self.give_back_now()?;
        Ok(count)
    }

    fn next_completion(&mut self) -> Result<Next, Broken> {
        let popped = self.completions.pop().map_err(|_| Broken("the server's completion tail makes no sense"))?;
        let Some(entry) = popped else {
            return match self.segment.state() {
                SessionState::Open => Ok(Next::None),
                SessionState::Poisoned => Err(Broken("the server says that we broke protocol")),
                SessionState::Closing => Err(Broken("the server is closing")),
                SessionState::HandedOver => Err(Broken("the server has handed over to another engine process")),
            };
        };
        let completion = Completion::parse(&entry).ok_or(Broken("a completion makes no sense"))?;
        let Some(request) = self.outstanding.get(&completion.tag) else {
            return Err(Broken("a completion answers nothing that was asked"));
        };
        let count_ok = completion.first + completion.count <= request.count.max(1);
        if !count_ok || completion.op.is_some_and(|op| op != request.op) {
            return Err(Broken("a completion does not fit its request"));
        }
        if completion.grants().any(|(_, grant)| grant.slot >= self.pool.slots_count) {
            return Err(Broken("a grant is outside the pool"));
        }
        let waiter = request.waiter;
        if completion.last
            && let Some(request) = self.outstanding.remove(&completion.tag)
        {
            if let Some(id) = request.arena {
                self.arena.give_back(id);
            }
            self.abandoned_count -= usize::from(waiter == Waiter::GaveUp);
        }
        if waiter == Waiter::Caller {
            return Ok(Next::Live(completion));
        }
        match completion.op {
            Some(Op::Match) if completion.payload[0] != 0 => {
                self.give_back.push_back(GiveBack::Lease(LeaseId(completion.payload[0])));
            }
            Some(Op::Reserve) => self.give_back.extend(completion.grants().map(|(_, grant)| GiveBack::Slot(grant))),
            _ => {}
        }
        Ok(Next::Abandoned)
    }

    fn give_back_now(&mut self) -> Result<(), Broken> {
        while let Some(thing) = self.give_back.front() {
            let posted = match *thing {
                GiveBack::Lease(lease) => self.post_release(lease),
                GiveBack::Slot(grant) => self.post_abort(&[grant]),
            };
            match posted {
                Ok(tag) => {
                    self.give_back.pop_front();
                    self.nobody_waits(tag);
                }
                Err(PostError::Full) => break,
                Err(PostError::Broken(broken)) => return Err(broken),
            }
        }
        self.publish();
        Ok(())
    }

    /// Nobody will wait for this request: what it still brings is given back when it comes.
    pub fn abandon(&mut self, tag: Tag) {
        if let Some(request) = self.outstanding.get_mut(&tag)
            && std::mem::replace(&mut request.waiter, Waiter::GaveUp) != Waiter::GaveUp
        {
            self.abandoned_count += 1;
        }
    }

    /// The answer to this request says nothing that matters.
    pub fn nobody_waits(&mut self, tag: Tag) {
        if let Some(request) = self.outstanding.get_mut(&tag) {
            request.waiter = Waiter::Nobody;
        }
    }

    /// Ends a lease as soon as the ring has room. Nothing is lost meanwhile.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn release_soon(&mut self, lease: LeaseId) -> Result<(), Broken> {
        self.give_back.push_back(GiveBack::Lease(lease));
        self.give_back_now()
    }

    /// Gives reserved slots back as soon as the ring has room.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn abort_soon(&mut self, grants: impl IntoIterator<Item = Grant>) -> Result<(), Broken> {
        self.give_back.extend(grants.into_iter().map(GiveBack::Slot));
        self.give_back_now()
    }

    /// Waits for the last completion of `tag`, until `deadline`; each of its completions goes to
    /// `take`, others are kept for `poll`. Says whether the last one came: if not, the request is
    /// abandoned.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn wait(
        &mut self,
        tag: Tag,
        deadline: Instant,
        mut take: impl FnMut(&Pool, Completion),
    ) -> Result<bool, Broken> {
        self.publish();
        let started = Instant::now();
        // Those that were kept aside by a wait for somebody else come first.
        let mut kept = std::mem::take(&mut self.inbox);
        kept.retain(|completion| {
            if completion.tag == tag {
                take(&self.pool, *completion);
            }
            completion.tag != tag
        });
        self.inbox = kept;
        loop {
            let mut consumed = false;
            loop {
                match self.next_completion()? {
                    Next::Live(completion) if completion.tag == tag => take(&self.pool, completion),
                    Next::Live(completion) => self.inbox.push_back(completion),
                    Next::Abandoned => {}
                    Next::None => break,
                }
                consumed = true;
            }
            self.hand_back(consumed);
            if !self.give_back.is_empty() {
                self.give_back_now()?;
            }
            if !self.outstanding.contains_key(&tag) {
                return Ok(true);
            }
            let now = Instant::now();
            if now >= deadline {
                self.abandon(tag);
                return Ok(false);
            }
            if now - started > SPIN {
                self.sleep(deadline - now)?;
            } else {
                std::hint::spin_loop();
            }
        }
    }

    fn sleep(&mut self, at_most: Duration) -> Result<(), Broken> {
        self.sleep_beside(None, at_most)
    }

    /// Sleeps until the server rings, `also` is readable, or `at_most` has passed.
    ///
    /// # Errors
    /// [`Broken`]: the server is gone.
    pub fn sleep_beside(&mut self, also: Option<BorrowedFd<'_>>, at_most: Duration) -> Result<(), Broken> {
        let Some(wires) = &self.wires else { return Ok(()) };
        doorbell::announce(self.segment.client_sleeps());
        let missed = !matches!(self.completions.peek(), Ok(None));
        if !missed {
            let (bell, control) = (wires.bell.as_fd(), wires.control.as_fd());
            let timeout = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: i64::from(at_most.subsec_nanos()) };
            let also = also.as_ref().unwrap_or(&bell);
            let mut fds = [&bell, &control, also].map(|fd| PollFd::new(fd, PollFlags::IN));
            let polled = poll(&mut fds, Some(&timeout));
            if polled.is_ok() && !fds[1].revents().is_empty() {
                return Err(Broken("the server is gone"));
            }
            if polled.is_ok() && !fds[0].revents().is_empty() {
                // The server has hung up its end too: the control socket says so.
                let _ = bell::drain(&wires.bell);
            }
        }
        doorbell::retract(self.segment.client_sleeps());
        Ok(())
    }

    /// At most `limit` events since the last call: reads memory, waits for nobody.
    pub fn read_events(&mut self, limit: usize) -> Events {
        self.wires.as_mut().map(|wires| wires.events.read(limit)).unwrap_or_default()
    }

    /// Tells the server that nothing of this process writes into slots any more that this session of an
    /// engine process that is gone was granted. Says whether it was told.
    pub fn tell_drained(&self, session: u32) -> bool {
        let told = self.wires.as_ref().map(|wires| wires.control.send(&Request::Drained { session }, &[]));
        told.is_some_and(|told| told.is_ok())
    }

    /// Whether another engine process takes over from the one that granted this session.
    pub fn is_handed_over(&self) -> bool {
        self.segment.state() == SessionState::HandedOver
    }

    /// Whether something of this process may still write into slots when the session ends: then it ends
    /// without a goodbye, and the server keeps them until this process is dead.
    pub fn may_be_written(&mut self, may: bool) {
        self.may_be_written = may;
    }

    /// Whether the server has hung up: a system call, for those who have not waited lately.
    pub fn is_hung_up(&self) -> bool {
        self.segment.state() != SessionState::Open
            || self.wires.as_ref().is_some_and(|wires| crate::peer::is_readable(&wires.control))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(wires) = &self.wires
            && self.process == std::process::id()
            && !self.may_be_written
        {
            // A promise that nothing of ours writes into a slot any more. Lost with a dead server.
            let _ = wires.control.send(&Request::Goodbye, &[]);
        }
    }
}

enum Next {
    Live(Completion),
    Abandoned,
    None,
}

/// What a match brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matched {
    /// Leading blocks that are resident.
    pub blocks: u32,
    /// The lease that keeps them so, unless there are none.
    pub lease: Option<Lease>,
}

/// A lease and when it ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// CLOCK_MONOTONIC: bytes copied out after this moment may be another block's.
    pub expires_at_ns: u64,
    /// Which of an instance's sessions granted it: to another server the same name means another lease.
    pub session: u32,
}

impl Matched {
    /// Nothing is resident, or it is not known.
    pub const MISS: Self = Self { blocks: 0, lease: None };

    /// From the completion of a match.
    pub fn from_completion(completion: &Completion) -> Self {
        if completion.status != Status::Ok || completion.payload[0] == 0 {
            return Self::MISS;
        }
        let lease = Lease { id: LeaseId(completion.payload[0]), expires_at_ns: completion.payload[1], session: 0 };
        Self { blocks: completion.count, lease: Some(lease) }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn arena_ranges_are_disjoint_do_not_wrap_and_come_back() {
        let mut arena = Arena::default();
        let mut held: Vec<(u32, u32, u32)> = Vec::new();
        let mut random = 12345u64;
        for step in 0..20_000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let bytes = 16 + (random >> 40) as u32 % 140_000;
            match arena.take(bytes) {
                Some((id, offset)) if step % 3 != 0 => {
                    assert!(offset + bytes <= ARENA_BYTES && offset % 16 == 0);
                    assert!(held.iter().all(|(_, o, b)| offset + bytes <= *o || *o + *b <= offset), "overlap");
                    held.push((id, offset, bytes));
                }
                Some((id, _)) => arena.give_back(id),
                None => assert!(!held.is_empty(), "an empty arena has room"),
            }
            if !held.is_empty() && (random >> 33).is_multiple_of(2) {
                let (id, ..) = held.swap_remove((random >> 20) as usize % held.len());
                arena.give_back(id);
            }
        }
        for (id, ..) in held {
            arena.give_back(id);
        }
        assert_eq!(arena.used, 0);
        assert!(arena.take(MATCH_BLOCKS_MAX * 16).is_some());
    }
}
