//! One instance's life: it finds the server or starts it, survives its loss, and never waits long.
//!
//! Every call is bounded and cannot fail: without a server, or with a slow one, a match is a miss, a
//! load fails its blocks, a store is dropped, and a thread behind tries to connect again.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::client::{Broken, ConnectError, Lease, Matched, Pool, PostError, Session};
use crate::config::{Config, LaunchMode};
use crate::events::Events;
use crate::handshake::{Attach, ChannelError, Reply, Request, Welcome, ask};
use crate::key::BlockKey;
use crate::launch::{LaunchError, start_server};
use crate::layout::Layout;
use crate::wire::{BATCH_BLOCKS_MAX, Grant, MATCH_BLOCKS_MAX, PROTOCOL_VERSION, Status, Tag};

/// How often the thread behind tries.
const RETRY: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// A slot to fill, good for the session that granted it and no other: a server that was started anew
/// gives the same name to other slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldSlot {
    /// The slot.
    pub grant: Grant,
    session: u32,
}

/// What a reserve says of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserved {
    /// Fill this slot, then commit it.
    Slot(HeldSlot),
    /// Somebody has stored it or is storing it.
    Present,
    /// No room, no parent, no server: do not store it.
    Dropped,
}

/// How a load ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Blocks that came from the pool.
    pub blocks_dram: u32,
    /// Blocks that came from the SSD.
    pub blocks_ssd: u32,
    /// Blocks to compute instead.
    pub blocks_missed: u32,
}

/// What a load asks of its caller, block by block.
pub enum LoadStep<'a> {
    /// Copy this slot; be done with it on return.
    Copy {
        /// Index of the block in the load's keys.
        index: u32,
        /// The pool.
        pool: &'a Pool,
        /// The slot.
        slot: u32,
    },
    /// The lease still held after the copy: its bytes are the block's.
    Arrived {
        /// Index of the block in the load's keys.
        index: u32,
    },
}

/// An instance of an inference engine, as the cache knows it.
pub struct Instance {
    config: Config,
    attach: Attach,
    session: Option<Session>,
    connecting: Option<Receiver<Found>>,
    /// What the server said last when it refused, though it may yet take us.
    put_off: Option<String>,
    stop: Arc<AtomicBool>,
    refused: Option<String>,
    /// Why there is no server, as far as we tried to start one.
    trouble: Option<String>,
    /// Settings of ours that the server was not started with.
    unheeded: Vec<String>,
    /// Whether a session was ever held: then a server was there, and its loss is ours to mend.
    was_served: bool,
    sessions_count: u32,
    /// The session whose events were read last.
    events_session: u32,
    /// The pool of the last session: should the next one have the same, it stays mapped where it is. Shared
    /// with the thread that connects, which lets it go when no server will have it again.
    kept: Arc<Mutex<Option<Pool>>>,
    /// Slots of this session that the caller was granted and has neither committed nor given back.
    held_count: u32,
    /// Sessions that were lost with an engine process while the pool may live on.
    formers: Vec<Former>,
    /// The caller says when it is drained: it posts by itself.
    drains_by_hand: bool,
    /// A server that handed over is about to serve again: calls may wait for it until then.
    expected_until: Option<Instant>,
}

/// A lost session whose slots may still be written to from here.
struct Former {
    number: u32,
    session: u32,
    memory_id: u64,
    held_count: u32,
    /// This session's server was told that it is drained.
    told: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was held leaves a pool that is still a pool.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a server that handed over is expected to be back.
const SUCCESSION: Duration = Duration::from_millis(500);

/// More lost sessions than this are not remembered: their slots wait for the end of this process.
const FORMERS_MAX: usize = 64;

/// What the thread behind has found.
enum Found {
    Session(Box<Session>),
    Refused { reason: String, permanent: bool },
    CannotStart(String),
}

/// The instance's id: what was said, or one that its token gives, so that who numbers nothing meets nobody.
fn instance_id(config: &Config, token: &str) -> u32 {
    if config.said.contains_key("instance_id") || config.instance_id != 0 {
        return config.instance_id;
    }
    let hash = blake3::hash(token.as_bytes());
    1 << 31 | u32::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]))
}

/// A random token: 128 bits, in hex.
pub fn random_token() -> String {
    let mut bytes = [0u8; 16];
    // Interrupted or short only for requests above 256 bytes.
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    assert_eq!(got, Ok(16), "the kernel gives random bytes");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Forgets every block of the server at this socket. As [`Instance::reset`], for those who have none.
///
/// # Errors
/// As [`Instance::reset`].
pub fn reset(socket: &Path) -> Result<u64, String> {
    reset_by(socket, &Request::Reset, Duration::from_secs(8))
}

/// Forgets the blocks of a namespace, by its id ([`crate::key::Namespace::id`]).
///
/// # Errors
/// As [`Instance::reset`], and while the SSD is being read after a start.
pub fn reset_namespace(socket: &Path, id: BlockKey) -> Result<u64, String> {
    reset_by(socket, &Request::ResetNamespace { namespace: id.to_string() }, Duration::from_secs(65))
}

/// Forgets a block and all that continues it. Says how many of them were resident.
///
/// # Errors
/// As [`reset_namespace`].
pub fn forget(socket: &Path, key: BlockKey) -> Result<u64, String> {
    reset_by(socket, &Request::Forget { key: key.to_string() }, Duration::from_secs(65))
}

fn reset_by(socket: &Path, request: &Request, patience: Duration) -> Result<u64, String> {
    match ask(socket, request, patience) {
        Ok(Reply::Reset { blocks, durable: true }) => Ok(blocks),
        Ok(Reply::Reset { .. }) => {
            Err("the SSD's headers could not be cleared in time: a restart may find blocks again".into())
        }
        Ok(Reply::Refused { reason, .. }) => Err(reason),
        Ok(reply) => Err(format!("an unexpected answer: {reply:?}")),
        Err(error) => Err(error.to_string()),
    }
}

impl Instance {
    /// Opens an instance: connects, or starts the server if that is ours to do, and waits at most
    /// `start_wait_ms`. Without a server it goes on, and every answer is a miss until one is there.
    ///
    /// # Errors
    /// The server refuses this instance, for good or for as long as that; with its reason.
    pub fn open(config: Config, layout: impl Into<Option<Layout>>, rank: u32) -> Result<Self, ConnectError> {
        Self::open_with_token(config, layout, rank, random_token())
    }

    /// As [`Instance::open`], for one of several processes that are one instance and share a token.
    ///
    /// # Errors
    /// As [`Instance::open`].
    pub fn open_with_token(
        config: Config,
        layout: impl Into<Option<Layout>>,
        rank: u32,
        token: String,
    ) -> Result<Self, ConnectError> {
        let attach = Attach {
            protocol: PROTOCOL_VERSION,
            instance_id: instance_id(&config, &token),
            instance_token: token,
            rank,
            layout: layout.into(),
        };
        let mut instance = Self {
            config,
            attach,
            session: None,
            connecting: None,
            put_off: None,
            stop: Arc::new(AtomicBool::new(false)),
            refused: None,
            trouble: None,
            unheeded: Vec::new(),
            was_served: false,
            sessions_count: 0,
            events_session: 0,
            kept: Arc::default(),
            held_count: 0,
            formers: Vec::new(),
            drains_by_hand: false,
            expected_until: None,
        };
        let deadline = Instant::now() + instance.config.start_wait;
        // The first try is ours, so that a refusal is an error and not a line in a log.
        match Session::connect(&instance.config.socket, &instance.attach, instance.connect_wait(), None) {
            Ok(session) => instance.adopt(session),
            Err(error @ ConnectError::Refused { permanent: true, .. }) => return Err(error),
            Err(_) => instance.connect_behind(),
        }
        while instance.session.is_none() && Instant::now() < deadline {
            instance.look_for_session(Some(deadline));
            if let Some(reason) = instance.refused.take() {
                return Err(ConnectError::Refused { reason, differences: Vec::new(), permanent: true });
            }
        }
        match instance.put_off.take() {
            // Who shows no layout may have to wait for somebody who does: as without a server.
            Some(reason) if instance.session.is_none() && instance.attach.layout.is_some() => {
                Err(ConnectError::Refused { reason, differences: Vec::new(), permanent: false })
            }
            _ => Ok(instance),
        }
    }

    fn connect_wait(&self) -> Duration {
        self.config.start_wait.clamp(Duration::from_millis(100), Duration::from_secs(5))
    }

    fn adopt(&mut self, session: Session) {
        self.unheeded = session.welcome().map_or_else(Vec::new, |welcome| self.config.unheeded_by(&welcome.settings));
        let memory_id = session.welcome().map(Welcome::memory);
        // Another pool has other slots: what is written to the old one harms nobody.
        self.formers.retain(|former| Some(former.memory_id) == memory_id);
        // The last server may have died before it acted on it.
        self.formers.iter_mut().for_each(|former| former.told = false);
        *lock(&self.kept) = Some(session.pool().clone());
        let mut session = session;
        // Who posts by himself says himself when nothing of his is in flight.
        session.may_be_written(self.drains_by_hand);
        self.session = Some(session);
        self.trouble = None;
        self.was_served = true;
        self.sessions_count += 1;
        self.held_count = 0;
        self.tell_drained();
    }

    /// From now on the caller says itself when it is drained ([`Instance::drained`]): it posts by itself.
    pub fn drain_by_hand(&mut self) {
        self.drains_by_hand = true;
        self.say_goodbye(false);
    }

    /// Whether the session may end with a goodbye: the promise that nothing of the caller writes any more.
    pub fn say_goodbye(&mut self, may: bool) {
        if let Some(session) = &mut self.session {
            session.may_be_written(!may);
        }
    }

    /// Nothing of the caller writes any more into a slot that a lost session was granted.
    pub fn drained(&mut self) {
        self.formers.iter_mut().for_each(|former| former.held_count = 0);
        self.tell_drained();
    }

    /// Slots that were granted to the caller are not written to any more.
    fn returned(&mut self, slots: &[HeldSlot]) {
        for slot in slots {
            if slot.session == self.sessions_count && self.session.is_some() {
                self.held_count = self.held_count.saturating_sub(1);
            } else if let Some(former) = self.formers.iter_mut().find(|former| former.number == slot.session) {
                former.held_count = former.held_count.saturating_sub(1);
            }
        }
        self.tell_drained();
    }

    fn tell_drained(&mut self) {
        if let Some(session) = &self.session {
            for former in self.formers.iter_mut().filter(|former| former.held_count == 0 && !former.told) {
                former.told = session.tell_drained(former.session);
            }
        }
    }

    /// Whether a server is attached now.
    pub fn is_connected(&self) -> bool {
        self.session.is_some()
    }
    /// How many sessions this instance has had: above 1 after a server was lost and found.
    pub fn sessions_count(&self) -> u32 {
        self.sessions_count
    }
    /// The session, for those who post by themselves.
    pub fn session(&mut self) -> Option<&mut Session> {
        self.look_for_session(None);
        self.session.as_mut()
    }
    /// The session there is, without looking for another.
    pub fn session_held(&mut self) -> Option<&mut Session> {
        self.session.as_mut()
    }
    /// The pool that a slot lies in, while its session lasts.
    pub fn pool_of(&self, slot: HeldSlot) -> Option<&Pool> {
        self.session.as_ref().filter(|_| slot.session == self.sessions_count).map(Session::pool)
    }
    /// Why the server refused to take this instance back, if it did.
    pub fn refusal(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// Why no server could be started, while there is none.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }
    /// Settings that were said here and that the server, started before, does not have: in words.
    pub fn unheeded(&self) -> &[String] {
        &self.unheeded
    }

    /// Starts the thread that connects, and starts the server where that is ours to do.
    fn connect_behind(&mut self) {
        let (sender, receiver) = channel();
        let (config, attach, stop) = (self.config.clone(), self.attach.clone(), self.stop.clone());
        let (wait, kept) = (self.connect_wait(), self.kept.clone());
        let is_first = config.instance_id == 0 || !config.said.contains_key("instance_id");
        let may_start = config.launch_mode == LaunchMode::Embedded && (is_first || self.was_served);
        let connector = move || {
            let mut next_start = Instant::now();
            let mut patience = Duration::from_secs(2);
            let mut retry = RETRY;
            let mut told = String::new();
            while !stop.load(Ordering::Relaxed) {
                // Memory that is of no use to anybody may be what the next server waits for.
                lock(&kept).take_if(|pool| pool.is_given_up());
                let pool = lock(&kept).clone();
                let connected = Session::connect(&config.socket, &attach, wait, pool.as_ref());
                drop(pool);
                if matches!(connected, Err(ConnectError::NoServer(_))) {
                    // Engine process and keeper are gone, and the pool with them.
                    *lock(&kept) = None;
                }
                match connected {
                    Ok(session) => return drop(sender.send(Found::Session(Box::new(session)))),
                    Err(ConnectError::Refused { reason, differences, permanent }) => {
                        let listed: String = differences.iter().map(|difference| format!("; {difference}")).collect();
                        let refused = Found::Refused { reason: reason + &listed, permanent };
                        if sender.send(refused).is_err() || permanent {
                            return;
                        }
                        std::thread::sleep(5 * RETRY);
                    }
                    Err(ConnectError::NoServer(_)) if may_start && Instant::now() >= next_start => {
                        // A server that cannot start says why in its log; do not start one a moment.
                        next_start = Instant::now() + patience;
                        // Who does not know the layout cannot start a server; a worker will.
                        match attach.layout.as_ref().map(|layout| start_server(&config, layout)) {
                            None | Some(Ok(()) | Err(LaunchError::SomebodyElse)) => {}
                            Some(Err(error)) => {
                                patience = (2 * patience).min(Duration::from_secs(60));
                                let text = error.to_string();
                                if text != told {
                                    eprintln!("kvring: cannot start the server: {text}");
                                    told.clone_from(&text);
                                    if sender.send(Found::CannotStart(text)).is_err() {
                                        return;
                                    }
                                }
                            }
                        }
                    }
                    Err(ConnectError::Handshake {
                        error: ChannelError::System(_) | ChannelError::Malformed(_),
                        ..
                    }) => {
                        // It answers, and nothing comes of it: this process lacks descriptors or memory.
                        retry = (2 * retry).min(RETRY_MAX);
                    }
                    Err(ConnectError::NoServer(_) | ConnectError::Handshake { .. }) => retry = RETRY,
                }
                std::thread::sleep(retry);
            }
        };
        let spawned = std::thread::Builder::new().name("kvring-connect".into()).spawn(connector);
        // Without a thread there is no cache this time; the next call tries again.
        self.connecting = spawned.is_ok().then_some(receiver);
    }

    fn look_for_session(&mut self, wait_until: Option<Instant>) {
        if self.session.is_some() || self.refused.is_some() {
            return;
        }
        let Some(receiver) = &self.connecting else { return self.connect_behind() };
        let received = match wait_until {
            Some(deadline) => receiver
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
                .map_err(|error| matches!(error, std::sync::mpsc::RecvTimeoutError::Disconnected)),
            None => receiver.try_recv().map_err(|error| error == TryRecvError::Disconnected),
        };
        match received {
            Ok(Found::Session(session)) => {
                self.connecting = None;
                self.adopt(*session);
            }
            Ok(Found::Refused { reason, permanent: true }) => {
                self.connecting = None;
                self.refused = Some(reason);
            }
            Ok(Found::Refused { reason, permanent: false }) => self.put_off = Some(reason),
            Ok(Found::CannotStart(why)) => self.trouble = Some(why),
            Err(true) => self.connecting = None,
            Err(false) => {}
        }
    }

    /// Runs one exchange, if it is with this session: what another one granted means nothing to it.
    fn exchange_in<T>(
        &mut self,
        number: u32,
        deadline: Instant,
        miss: T,
        exchange: impl FnOnce(&mut Session, Instant) -> Result<T, PostError>,
    ) -> T {
        self.await_successor(deadline);
        self.look_for_session(None);
        if number == self.sessions_count { self.exchange_now(miss, deadline, exchange) } else { miss }
    }

    /// How long a call that begins now may wait.
    fn answer_by(&self) -> Instant {
        Instant::now() + self.config.client_wait
    }

    /// A server that has handed over serves again in a moment: a call waits for it as it would for an answer.
    fn await_successor(&mut self, deadline: Instant) {
        if self.session.as_ref().is_some_and(Session::is_handed_over) {
            self.lose_session();
        }
        while self.session.is_none() && self.is_expected() && Instant::now() < deadline {
            self.look_for_session(Some(deadline));
            // Refused, or no thread to connect with: nothing was waited for, and nothing will come.
            if self.session.is_none() && self.connecting.is_none() {
                return;
            }
        }
    }

    /// Whether a server that handed over is about to serve again.
    pub fn is_expected(&self) -> bool {
        self.expected_until.is_some_and(|until| Instant::now() < until)
    }

    /// Runs one exchange; if the session turns out broken, forgets it and connects anew behind.
    fn exchange<T>(
        &mut self,
        deadline: Instant,
        miss: T,
        exchange: impl FnOnce(&mut Session, Instant) -> Result<T, PostError>,
    ) -> T {
        self.await_successor(deadline);
        self.look_for_session(None);
        self.exchange_now(miss, deadline, exchange)
    }

    /// With the session there is.
    fn exchange_now<T>(
        &mut self,
        miss: T,
        deadline: Instant,
        exchange: impl FnOnce(&mut Session, Instant) -> Result<T, PostError>,
    ) -> T {
        let Some(session) = &mut self.session else { return miss };
        if session.abandoned_count() > 0 {
            // The server owes answers: do not wait for more of them. A look at the ring may bring
            // them; a look at the socket tells slow from gone.
            let broken = session.poll(|_| {}).is_err() || session.is_hung_up();
            if broken {
                self.lose_session();
                return miss;
            }
            if session.abandoned_count() > 0 {
                return miss;
            }
        }
        match exchange(session, deadline) {
            Ok(value) => value,
            Err(PostError::Full) => miss,
            Err(PostError::Broken(_)) => {
                self.lose_session();
                miss
            }
        }
    }

    /// Forgets a session that turned out broken, and connects anew behind.
    pub fn lose_session(&mut self) {
        if let Some(session) = self.session.take()
            && let Some(welcome) = session.welcome()
        {
            self.expected_until = session.is_handed_over().then(|| Instant::now() + SUCCESSION);
            if self.formers.len() == FORMERS_MAX {
                self.formers.remove(0);
            }
            self.formers.push(Former {
                number: self.sessions_count,
                session: welcome.session,
                memory_id: welcome.memory(),
                held_count: if self.drains_by_hand { 1 } else { self.held_count },
                told: false,
            });
        }
        self.connect_behind();
    }

    /// The longest resident prefix of a chain, under a lease.
    pub fn match_prefix(&mut self, keys: &[BlockKey]) -> Matched {
        if keys.is_empty() {
            return Matched::MISS;
        }
        let keys = &keys[..keys.len().min(MATCH_BLOCKS_MAX as usize)];
        let deadline = Instant::now() + self.config.client_wait;
        let mut matched = loop {
            let matched = self.exchange(deadline, Matched::MISS, |session, deadline| {
                let tag = session.post_match(keys)?;
                let mut matched = Matched::MISS;
                session.wait(tag, deadline, |_, completion| matched = Matched::from_completion(&completion))?;
                Ok(matched)
            });
            // Handed over while it was asked: the next engine process is asked the same.
            let again =
                self.session.is_none() && self.connecting.is_some() && self.is_expected() && Instant::now() < deadline;
            if !again {
                break matched;
            }
        };
        if let Some(lease) = &mut matched.lease {
            lease.session = self.sessions_count;
        }
        matched
    }

    /// Ends a lease. Does not wait.
    pub fn release(&mut self, lease: Lease) {
        if lease.session != self.sessions_count {
            // Its server is gone, and the lease with it.
            return;
        }
        let broken = self.session.as_mut().is_some_and(|session| session.release_soon(lease.id).is_err());
        if broken {
            self.lose_session();
        }
    }

    /// Asks for leased blocks to be read into the pool ahead of a load. Does not wait.
    pub fn prefetch(&mut self, lease: Lease, first: u32, count: u32) {
        self.exchange_in(lease.session, self.answer_by(), (), |session, _| {
            let end = first.saturating_add(count).min(MATCH_BLOCKS_MAX);
            let mut posted = Ok(());
            for from in (first..end).step_by(BATCH_BLOCKS_MAX as usize) {
                match session.post_prefetch(lease.id, from, (end - from).min(BATCH_BLOCKS_MAX)) {
                    Ok(tag) => session.nobody_waits(tag),
                    Err(error) => {
                        posted = Err(error);
                        break;
                    }
                }
            }
            session.publish();
            posted
        });
    }

    /// Loads leased blocks, the first at depth `first`; `step` is asked to copy each as soon as it is in
    /// the pool, and told of each whose lease still held then. The others are missed. `wait` bounds
    /// the whole call.
    pub fn load(
        &mut self,
        lease: Lease,
        first: u32,
        keys: &[BlockKey],
        wait: Duration,
        mut step: impl FnMut(LoadStep<'_>),
    ) -> Loaded {
        let total = keys.len() as u32;
        let mut loaded = Loaded::default();
        let (mut arrived, mut ssd) = (0, 0);
        let deadline = Instant::now() + wait;
        self.exchange_in(lease.session, deadline.min(self.answer_by()), (), |session, _| {
            // All batches are posted before the first is waited for: the device sees the whole load.
            let mut posted: Vec<(Tag, u32)> = Vec::new();
            let mut from = 0;
            for batch in keys.chunks(BATCH_BLOCKS_MAX as usize) {
                match session.post_load(lease.id, first + from, batch) {
                    Ok(tag) => posted.push((tag, from)),
                    Err(PostError::Full) => break,
                    Err(error) => return Err(error),
                }
                from += batch.len() as u32;
            }
            for (tag, from) in posted {
                let ended = session.wait(tag, deadline, |pool, completion| {
                    for (index, grant) in completion.grants() {
                        let index = from + index;
                        step(LoadStep::Copy { index, pool, slot: grant.slot });
                        // Asked after the copy: a lease that holds now held while it was made.
                        if pool.holds(lease.expires_at_ns) {
                            step(LoadStep::Arrived { index });
                            arrived += 1;
                            ssd += u32::from(completion.from_disk);
                        }
                    }
                })?;
                if !ended {
                    // The rest is not ours to wait for; the server need not start it either.
                    let cancel = session.post_cancel(tag)?;
                    session.nobody_waits(cancel);
                    session.publish();
                }
            }
            Ok(())
        });
        loaded.blocks_dram = arrived - ssd;
        loaded.blocks_ssd = ssd;
        loaded.blocks_missed = total - arrived;
        loaded
    }

    /// Reserves slots for consecutive blocks after `parent`, the first at depth `first`; at depth 0 `parent` is the
    /// namespace's id, or zeros.
    pub fn reserve(&mut self, parent: BlockKey, first: u32, keys: &[BlockKey]) -> Vec<Reserved> {
        let mut reserved = vec![Reserved::Dropped; keys.len()];
        let mut parent = parent;
        let deadline = self.answer_by();
        self.look_for_session(None);
        let session_number = self.sessions_count;
        for (start, batch) in (0..).step_by(BATCH_BLOCKS_MAX as usize).zip(keys.chunks(BATCH_BLOCKS_MAX as usize)) {
            // The call is bounded, not each of its batches.
            if start > 0 && Instant::now() >= deadline {
                break;
            }
            self.exchange_in(session_number, deadline, (), |session, deadline| {
                let tag = session.post_reserve(parent, first + start, batch)?;
                let mut answered = Vec::new();
                let ended = session.wait(tag, deadline, |_, completion| answered.push(completion))?;
                for completion in answered {
                    let at = (start + completion.first) as usize;
                    match completion.status {
                        Status::Ok if ended => {
                            for (index, grant) in completion.grants() {
                                let held = HeldSlot { grant, session: session_number };
                                reserved[(start + index) as usize] = Reserved::Slot(held);
                            }
                        }
                        // Too late to be told of every slot: those we know of go back.
                        Status::Ok => {
                            session.abort_soon(completion.grants().map(|(_, grant)| grant))?;
                        }
                        Status::Present => reserved[at..at + completion.count as usize].fill(Reserved::Present),
                        _ => {}
                    }
                }
                session.publish();
                Ok(())
            });
            parent = *batch.last().unwrap_or(&parent);
        }
        let held = reserved.iter().filter(|reserved| matches!(reserved, Reserved::Slot(_))).count() as u32;
        match self.formers.iter_mut().find(|former| former.number == session_number) {
            // Lost while it was asked: what it granted before that is the caller's to give back.
            Some(former) => former.held_count += held,
            None if session_number == self.sessions_count => self.held_count += held,
            // With a pool that no server has any more: nobody asks for those.
            None => {}
        }
        reserved
    }

    /// Commits filled slots; says how many the server took.
    pub fn commit(&mut self, slots: &[HeldSlot]) -> u32 {
        let mut taken = 0;
        let deadline = self.answer_by();
        self.look_for_session(None);
        let session_number = self.sessions_count;
        let grants: Vec<Grant> =
            slots.iter().filter(|slot| slot.session == session_number).map(|slot| slot.grant).collect();
        self.await_successor(deadline);
        self.look_for_session(None);
        for batch in grants.chunks(BATCH_BLOCKS_MAX as usize) {
            let Some(session) = self.session.as_mut().filter(|_| session_number == self.sessions_count) else { break };
            match Self::commit_batch(session, batch, deadline) {
                Ok(some) => taken += some,
                Err(Broken(_)) => self.lose_session(),
            }
        }
        self.returned(slots);
        taken
    }

    /// Whatever becomes of the wait, the server is told: of slots that are neither committed nor given back it would
    /// think that they are being filled, and nobody else could store these blocks.
    fn commit_batch(session: &mut Session, batch: &[Grant], deadline: Instant) -> Result<u32, Broken> {
        if session.abandoned_count() > 0 {
            // A look at the ring may bring what is owed.
            session.poll(|_| {})?;
        }
        let tag = match session.post_commit(batch) {
            Ok(tag) => tag,
            Err(PostError::Broken(broken)) => return Err(broken),
            // Room for a commit is not to be had, so they are given back as soon as there is some.
            Err(PostError::Full) => return session.abort_soon(batch.iter().copied()).map(|()| 0),
        };
        if session.abandoned_count() > 0 {
            // The server owes answers: it is not waited for once more.
            session.nobody_waits(tag);
            session.publish();
            return if session.is_hung_up() { Err(Broken("the server is gone")) } else { Ok(0) };
        }
        let mut taken = 0;
        session.wait(tag, deadline, |_, completion| taken = completion.payload[0] as u32)?;
        Ok(taken)
    }

    /// Gives slots back unfilled. Does not wait.
    pub fn abort(&mut self, slots: &[HeldSlot]) {
        let number = self.sessions_count;
        let grants = slots.iter().filter(|slot| slot.session == number).map(|slot| slot.grant);
        let broken = self.session.as_mut().is_some_and(|session| session.abort_soon(grants).is_err());
        self.returned(slots);
        if broken {
            self.lose_session();
        }
    }

    /// Which blocks became resident and which are gone, since the last call, `limit` at the most. A
    /// server that was lost and found has forgotten what its log said: then some are lost.
    pub fn events(&mut self, limit: usize) -> Events {
        self.look_for_session(None);
        let anew = std::mem::replace(&mut self.events_session, self.sessions_count) != self.sessions_count;
        let mut events = self.session.as_mut().map(|session| session.read_events(limit)).unwrap_or_default();
        events.lost |= anew && self.sessions_count > 1;
        events
    }

    /// Forgets every block of the server, for every instance. Waits at most eight seconds.
    ///
    /// # Errors
    /// No server, or it could not make sure that a restart forgets them too: ask again.
    pub fn reset(&mut self) -> Result<u64, String> {
        reset(&self.config.socket)
    }

    /// The server's socket.
    pub fn socket(&self) -> &PathBuf {
        &self.config.socket
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn without_a_server_everything_is_a_miss_and_nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.say("server_recv_port", dir.path().join("s").to_str().unwrap()).unwrap();
        config.say("server_launch_mode", "external").unwrap();
        config.say("start_wait_ms", "20").unwrap();
        let mut instance = Instance::open(config, Layout::opaque(4096), 0).unwrap();
        let started = Instant::now();
        let keys = [BlockKey::from_words([1, 2])];
        assert_eq!(instance.match_prefix(&keys), Matched::MISS);
        assert_eq!(instance.reserve(keys[0], 0, &keys), [Reserved::Dropped]);
        let slot = HeldSlot { grant: Grant { slot: 0, generation: 1 }, session: 0 };
        assert_eq!(instance.commit(&[slot]), 0);
        assert!(started.elapsed() < Duration::from_secs(1) && !instance.is_connected());
    }
}
