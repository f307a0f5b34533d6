//! The control plane: who may attach, who has died, what an operator asks. May block, lock, allocate
//! and log; tells the shard by message and never touches what is its own.

pub mod engine;
pub mod health;
pub mod keeper;
#[expect(unsafe_code, reason = "clone of a process that shares our memory")]
pub mod reaper;
pub mod verify;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use kvring_ipc::config::{Config, OnMismatch};
use kvring_ipc::handshake::{Attach, Channel, ChannelError, Reply, Request, Sizes, Welcome};
use kvring_ipc::layout::{Difference, Layout};
use kvring_ipc::peer::{Peer, started_ticks};
use kvring_ipc::segment::Segment;
use kvring_ipc::wire::PROTOCOL_VERSION;
use rustix::event::{Timespec, epoll};

use crate::device::files;
use crate::device::medium::Medium;
use crate::index::Tier;
use crate::limits::{ASKERS_PER_PEER_MAX, SESSIONS_MAX, SESSIONS_PER_PEER_MAX, SESSIONS_PER_USER_MAX};
use crate::shard::End;
use crate::shard::lost::Turn;
use crate::shard::session::Session;
use crate::tier::host::{SessionId, Writer};
use crate::tier::table::FormerSession;
use engine::{AdminOp, BuildError, Engine, FromShard, Kept, Prepared, ToShard};
use keeper::{Inheritance, ToEngine, ToKeeper};
use reaper::Reaper;
use verify::VerifyState;

/// How long a connection may be silent before it has asked for anything.
const FIRST_WORD: Duration = Duration::from_secs(2);

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages are the documentation")]
pub enum ServeError {
    #[error(
        "server_recv_port: another server (pid {pid}) serves {socket}: stop it with `kvring stop` (or `kill {pid}`, where its socket file is gone), or give this one another socket"
    )]
    AlreadyServed { socket: String, pid: String },
    #[error("told to stop while the server before was ending")]
    Stopped,
    #[error("server_recv_port: {path} exists and is no socket: remove it, or give the server another path")]
    NoSocket { path: String },
    #[error("server_recv_port: {what} {path}: {error}: make its directory one that this user may write to")]
    Socket { what: &'static str, path: String, error: std::io::Error },
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("{what}: {errno}")]
    System { what: &'static str, errno: rustix::io::Errno },
    #[error(
        "ulimit -n = {maximum}: a server needs at least 64 descriptors, and five a session: raise it (ulimit -n, LimitNOFILE=)"
    )]
    Descriptors { maximum: u64 },
    #[error("cannot {what} the engine process: {error}")]
    Engine { what: &'static str, error: std::io::Error },
    #[error("the engine process did not start ({status}); what it said is above")]
    NotStarted { status: String },
    #[error("an engine process is started by `kvring serve` and by nobody else: {0}")]
    NoKeeper(ChannelError),
}

/// One connection of the control socket.
struct Connection {
    channel: Channel,
    peer: Peer,
    /// Why whatever it asks is refused.
    refusal: Option<String>,
    opened: Instant,
    /// It has asked for something that the shard is yet to do.
    awaits_shard: bool,
    session: Option<Attached>,
}

struct Attached {
    id: SessionId,
    instance: u32,
    peer: Peer,
    /// The peer has said goodbye, hung up, or died.
    goodbye: bool,
    hung_up: bool,
    died: bool,
}

/// Why somebody may not attach.
struct Refusal {
    reason: String,
    differences: Vec<Difference>,
    permanent: bool,
}

impl Refusal {
    /// Asking again will not help.
    fn for_good(reason: String) -> Self {
        Self { reason, differences: Vec::new(), permanent: true }
    }
    /// It may mend itself.
    fn for_now(reason: String) -> Self {
        Self { permanent: false, ..Self::for_good(reason) }
    }
    fn into_reply(self) -> Reply {
        Reply::Refused { reason: self.reason, differences: self.differences, permanent: self.permanent }
    }
}

/// An instance: sessions that share an id and a token.
struct Instance {
    number: u32,
    id: u32,
    token: String,
    sessions_count: u32,
    pid: i32,
}

/// A server.
pub struct Server {
    config: Config,
    layout: Option<Layout>,
    engine: Option<Engine>,
    /// There since there is a pool, unless the system refuses it.
    reaper: Option<Reaper>,
    epoll: OwnedFd,
    stop: OwnedFd,
    inheritance: Inheritance,
    /// Processes that an engine process before this one gave slots to, and that may still write into them.
    formers: HashMap<SessionId, Former>,
    /// Sessions of which it is not known yet whether their process lives.
    uncertain: Vec<SessionId>,
    connections: HashMap<u64, Connection>,
    instances: Vec<Instance>,
    next_connection: u64,
    next_session: u32,
    next_instance: u32,
    matches_logged: u64,
    counters_logged: Option<Instant>,
    media_errors: [u64; 3],
    media_warned: Option<Instant>,
    /// A reset came before there was a data plane.
    forget_at_start: bool,
    leaving: Option<Leaving>,
    keeper_is_gone: bool,
    /// Stores are refused because an operator has asked for it.
    draining: bool,
    refusal_told: Option<Instant>,
    upgrades_failed_count: u64,
    /// Somebody waits for another engine process.
    is_upgrading: bool,
    /// What the last one that failed said.
    upgrade_failure: Option<String>,
    /// What somebody has asked for, until another engine process follows or does not.
    resizing: Option<Resizing>,
    /// The pool's file ends behind the pool, and somebody may be using what lies there; from where on it is to be given back.
    tail_from: Option<u64>,
    pulse: Pulse,
    verify: Arc<VerifyState>,
    /// From whoever waits for the drives.
    flushed: (Sender<Flushed>, Receiver<Flushed>),
}

/// Whether the shard still hears: asked once a second.
#[derive(Default)]
struct Pulse {
    felt: Option<Instant>,
    /// It is asked, and has not answered yet.
    asked: Option<Arc<AtomicBool>>,
    /// Seconds since the last answer.
    missed: u64,
}

/// A reset whose headers the drives have flushed, or not.
struct Flushed {
    asked_by: u64,
    blocks: u32,
    durable: bool,
}

/// A resize that is under way.
#[derive(Debug, Clone, Copy)]
struct Resizing {
    sizes: Sizes,
    /// Until when the pool's end is emptied for it. Then, or if there is nothing to empty, it is the keeper's turn.
    vacates_until: Option<Instant>,
}

/// How long the end of a pool that is to be smaller is emptied: blocks that are in use for longer are forgotten.
const VACATE_MAX: Duration = Duration::from_secs(30);

/// Why the engine process goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// The server stops.
    Stop,
    /// Another engine process takes over.
    HandOver {
        /// It waits for the end of this one.
        is_awaited: bool,
    },
}

/// A process that may still be writing into the slots of a session that it had with an engine process
/// before this one.
struct Former {
    pid: i32,
    pidfd: OwnedFd,
}

const LISTENER: u64 = 0;
const STOP: u64 = 1;
const KEEPER: u64 = 2;
/// A connection's socket is `number * 2`, its process `number * 2 + 1`.
const FIRST_CONNECTION: u64 = 2;
/// A former session's process: its number and this.
const FORMER: u64 = 1 << 63;

fn system(what: &'static str) -> impl Fn(rustix::io::Errno) -> ServeError {
    move |errno| ServeError::System { what, errno }
}

/// How long a process that dies of a panic may take to say so.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// Nothing is unwound or unmapped by this process.
fn end_at_once() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

/// From now on a panic of the shard, or of the main thread, ends the process at once, and the keeper starts the next one.
/// Else the process would unwind and unmap its pool first, while everybody waits.
pub fn end_with_a_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !matches!(std::thread::current().name(), Some("main" | engine::SHARD_THREAD)) {
            return tell(panic);
        }
        // By then the log is written, or nobody reads it.
        let killer = std::thread::Builder::new().spawn(move || {
            #[expect(clippy::disallowed_methods, reason = "the end of the process")]
            std::thread::sleep(LAST_WORDS);
            end_at_once();
        });
        tell(panic);
        match killer {
            Ok(killer) => drop(killer.join()),
            Err(_) => end_at_once(),
        }
    }));
}

impl Server {
    /// With a layout, or with the pool of an engine process before this one, builds the whole data plane;
    /// then listens. `stop` becoming readable stops it.
    ///
    /// # Errors
    /// [`ServeError`]: anything that the configuration asks in vain.
    pub fn new(
        config: Config,
        layout: Option<Layout>,
        mut inheritance: Inheritance,
        prepared: Option<Prepared>,
        stop: OwnedFd,
    ) -> Result<Self, ServeError> {
        raise_descriptor_limit()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(system("epoll"))?;
        let kept = inheritance.kept.take();
        let mut server = Self {
            config,
            layout,
            engine: None,
            reaper: None,
            epoll,
            stop,
            inheritance,
            formers: HashMap::new(),
            uncertain: Vec::new(),
            connections: HashMap::new(),
            instances: Vec::new(),
            next_connection: FIRST_CONNECTION,
            next_session: 0,
            next_instance: 0,
            matches_logged: 0,
            counters_logged: None,
            media_errors: [0; 3],
            media_warned: None,
            forget_at_start: false,
            leaving: None,
            keeper_is_gone: false,
            draining: false,
            refusal_told: None,
            upgrades_failed_count: 0,
            is_upgrading: false,
            upgrade_failure: None,
            resizing: None,
            tail_from: None,
            pulse: Pulse::default(),
            verify: Arc::default(),
            flushed: crossbeam_channel::unbounded(),
        };
        // The data plane before the socket: whoever connects is served at once.
        let on_mismatch = server.config.ssd_on_mismatch;
        match prepared.filter(|prepared| kept.as_ref().is_some_and(|[_, table]| prepared.is_over(table))) {
            Some(prepared) => server.begin_engine(on_mismatch, prepared)?,
            None => {
                let kept = server.open_kept(kept);
                let layout = server.layout.clone().or_else(|| kept.as_ref().map(|kept| kept.layout.clone()));
                if let Some(layout) = layout {
                    server.start_engine(layout, on_mismatch, kept)?;
                }
            }
        }
        kvring_ipc::handshake::listen(&server.inheritance.listener).map_err(system("listen"))?;
        server.watch(server.inheritance.listener.as_fd(), LISTENER)?;
        server.watch(server.stop.as_fd(), STOP)?;
        server.watch(server.inheritance.channel.as_fd(), KEEPER)?;
        let _ = server.inheritance.channel.send(&ToKeeper::Serving, &[]);
        tracing::info!("kvring {} serves {}", env!("CARGO_PKG_VERSION"), server.config.socket.display());
        if server.engine.is_none() {
            tracing::info!("pool and SSD are opened when the first worker says what its blocks look like");
        }
        Ok(server)
    }

    fn open_kept(&self, kept: Option<[OwnedFd; 2]>) -> Option<Kept> {
        let [pool, table] = kept?;
        let opened = Kept::open(pool, &table);
        let told = opened.inspect_err(|why| {
            tracing::warn!("the pool of the last engine process is not taken over: {why}");
            // Nobody keeps memory that the next pool may need.
            let _ = self.inheritance.channel.send(&ToKeeper::LetGo, &[]);
        });
        told.ok()
    }

    fn start_engine(&mut self, layout: Layout, on_mismatch: OnMismatch, kept: Option<Kept>) -> Result<(), BuildError> {
        let had_pool = kept.is_some();
        let kept = kept.and_then(|kept| match kept.suits(&self.config, &layout) {
            Ok(()) => Some(kept),
            Err(why) => {
                tracing::warn!("the pool starts empty: {why}");
                // Nobody keeps memory that the next pool may need.
                let _ = self.inheritance.channel.send(&ToKeeper::LetGo, &[]);
                None
            }
        });
        // The first time, and not when an instance comes hours later.
        let frees = had_pool && kept.is_none() || std::mem::take(&mut self.inheritance.frees);
        let (forget, epoch) = (self.forget_at_start, self.inheritance.epoch);
        let engine = Engine::start(&self.config, layout, on_mismatch, forget, kept, frees, epoch)?;
        self.has_engine(engine);
        Ok(())
    }

    fn begin_engine(&mut self, on_mismatch: OnMismatch, prepared: Prepared) -> Result<(), BuildError> {
        let files = prepared.open_files(&self.config, on_mismatch)?;
        let engine = Engine::begin(&self.config, prepared, files, false, self.inheritance.epoch)?;
        self.has_engine(engine);
        Ok(())
    }

    fn has_engine(&mut self, engine: Engine) {
        self.next_session = engine.table.last_session();
        // From now on a death of this process costs nothing that is in the pool.
        let _ = self.inheritance.channel.send(&ToKeeper::Keep, &[engine.pool.fd.as_fd(), engine.table_fd.as_fd()]);
        if let Some((_, stats)) = &engine.stats {
            let _ = self.inheritance.channel.send(&ToKeeper::KeepStats, &[stats.as_fd()]);
        }
        for session in &engine.suspects {
            self.await_former(&engine, *session);
        }
        self.tail_from = (engine.pool.tail_bytes() > 0).then_some(0);
        if self.tail_from.is_some() {
            // Whoever had a session then may have mapped what lies behind the pool now.
            for session in engine.table.sessions() {
                if !engine.suspects.contains(&session) {
                    self.await_former(&engine, session);
                }
            }
        }
        let may_have_reaper = engine.ends_with_files;
        let pool = engine.pool.clone();
        self.engine = Some(engine);
        if !may_have_reaper {
            return;
        }
        match Reaper::start(self.inheritance.lock.as_fd(), &pool) {
            Ok(reaper) => {
                let _ = self.inheritance.channel.send(&ToKeeper::Reaper, &[reaper.as_fd()]);
                self.reaper = Some(reaper);
            }
            Err(errno) => tracing::warn!(
                "no process that unmaps the pool after this one's death ({errno}): whoever takes over waits for that"
            ),
        }
    }

    /// What lies behind the pool is the system's again, once nobody is left who had it mapped.
    fn give_back_tail(&mut self) {
        if !self.may_give_back_tail() {
            return;
        }
        let (Some(engine), Some(from)) = (&self.engine, self.tail_from) else { return };
        let mib = engine.pool.tail_bytes() >> 20;
        let gone_on = engine.pool.give_back_tail(from);
        match gone_on {
            Ok(Some(_)) => {}
            Ok(None) => tracing::info!("what lay behind the pool is the system's again (up to {mib} MiB)"),
            Err(errno) => tracing::warn!("{mib} MiB behind the pool are not given back: {errno}"),
        }
        self.tail_from = gone_on.unwrap_or_default();
    }

    /// Not while another engine process may be about to use it.
    fn may_give_back_tail(&self) -> bool {
        let is_unused = self.formers.is_empty() && self.uncertain.is_empty();
        self.tail_from.is_some() && is_unused && self.resizing.is_none() && self.leaving.is_none()
    }

    fn upgrading(&self) -> Reply {
        Reply::Upgrading { epoch: self.inheritance.epoch, upgrades_failed: self.upgrades_failed_count }
    }

    /// Tiers of other sizes are another engine process' doing. A pool that is to be smaller is made ready for it.
    fn resize(&mut self, sizes: Sizes) -> Result<(), Refusal> {
        if self.inheritance.sizes.is_none() {
            return Err(Refusal::for_good(
                "the keeper is of an earlier version, which cannot: `kvring stop`, and start the server anew".into(),
            ));
        }
        if self.resizing.is_some() || self.is_upgrading {
            let what = if self.is_upgrading { "an upgrade" } else { "another resize" };
            return Err(Refusal::for_now(format!("{what} is under way")));
        }
        let mut config = self.config.clone();
        config.resize(sizes);
        if sizes == Sizes::default() {
            return Err(Refusal::for_good("no size was named".into()));
        }
        if (config.ssd_cache_bytes == 0) != (self.config.ssd_cache_bytes == 0) {
            return Err(Refusal::for_good(
                "an SSD tier is added or removed by a start: `kvring stop`, and start the server with another ssd_cache_gb"
                    .into(),
            ));
        }
        if let Some(engine) = &self.engine
            && crate::dma::slots_of(&config, engine.pool.slot_bytes) == 0
        {
            let slot_bytes = engine.pool.slot_bytes;
            return Err(Refusal::for_good(format!("cpu_cache_gb is too small: a block has {slot_bytes} bytes")));
        }
        let mut vacates_until = None;
        let slots = self.engine.as_ref().map(|engine| crate::dma::slots_of(&config, engine.pool.slot_bytes) as u32);
        match (&self.engine, slots) {
            (Some(engine), Some(slots)) if slots < engine.pool.slots_count => {
                engine.tell(ToShard::Vacate(Some(slots)));
                #[expect(clippy::disallowed_methods, reason = "the control plane is not simulated")]
                let until = Instant::now() + VACATE_MAX;
                vacates_until = Some(until);
            }
            _ => drop(self.inheritance.channel.send(&ToKeeper::Resize(sizes), &[])),
        }
        self.resizing = Some(Resizing { sizes, vacates_until });
        Ok(())
    }

    /// The pool's end is empty, or as empty as it will be.
    fn is_vacated(&mut self) {
        let Some(resizing) = &mut self.resizing else { return };
        if resizing.vacates_until.take().is_some() {
            let sizes = resizing.sizes;
            let _ = self.inheritance.channel.send(&ToKeeper::Resize(sizes), &[]);
        }
    }

    /// No other engine process follows: everything stays what it was.
    fn is_not_upgraded(&mut self, why: Option<String>) {
        self.is_upgrading = false;
        self.upgrades_failed_count += 1;
        self.upgrade_failure = why;
        self.resizing = None;
        if let Some(engine) = &self.engine {
            engine.tell(ToShard::Vacate(None));
            // The other one may have made the pool's file larger.
            if engine.pool.tail_bytes() > 0 {
                self.tail_from = Some(0);
            }
        }
    }

    /// A session of an engine process that is gone had slots: they are free when its process has said that
    /// it writes no more, or is dead and the grace is over. In doubt it lives.
    fn await_former(&mut self, engine: &Engine, session: SessionId) {
        // Places of sessions that may live are not given again: who is not there was dead.
        let Some(named) = engine.table.session(session) else {
            return engine.tell(ToShard::EndFormer(session, End::Dead));
        };
        let watched = rustix::process::Pid::from_raw(named.pid).ok_or(rustix::io::Errno::SRCH).and_then(|pid| {
            let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
            // Asked after the descriptor was had: it is this process, or the number was given again.
            match started_ticks(named.pid) {
                Some(ticks) if ticks != named.started_ticks => return Err(rustix::io::Errno::SRCH),
                Some(_) => {}
                None => return Err(rustix::io::Errno::AGAIN),
            }
            let token = epoll::EventData::new_u64(FORMER | u64::from(session.0));
            epoll::add(&self.epoll, &pidfd, token, epoll::EventFlags::IN)?;
            Ok(Former { pid: named.pid, pidfd })
        });
        match watched {
            Ok(former) => drop(self.formers.insert(session, former)),
            Err(rustix::io::Errno::SRCH) => engine.tell(ToShard::EndFormer(session, End::Dead)),
            Err(errno) => {
                tracing::warn!("whether process {} lives is not known ({errno}): asked again", named.pid);
                self.uncertain.push(session);
            }
        }
    }

    /// Asks again for those of whom nothing was known.
    fn ask_again(&mut self) {
        let Some(engine) = self.engine.take_if(|_| !self.uncertain.is_empty()) else { return };
        for session in std::mem::take(&mut self.uncertain) {
            self.await_former(&engine, session);
        }
        self.engine = Some(engine);
    }

    fn end_former(&mut self, session: SessionId, end: End) {
        if let (Some(former), Some(engine)) = (self.formers.remove(&session), &self.engine) {
            let _ = epoll::delete(&self.epoll, &former.pidfd);
            engine.table.end_session(session);
            engine.tell(ToShard::EndFormer(session, end));
        }
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), ServeError> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
            .map_err(system("epoll_ctl"))
    }

    /// Serves until it is told to stop. False: the data plane failed.
    pub fn run(mut self) -> bool {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        let mut failed = false;
        while self.leaving.is_none() && !failed {
            events.clear();
            let timeout = self.nap();
            let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref());
            let ready: Vec<u64> = events.iter().map(|event| event.data.u64()).collect();
            for token in ready {
                match token {
                    LISTENER => self.accept(),
                    STOP => self.leaving = Some(Leaving::Stop),
                    KEEPER => self.hear_keeper(),
                    token if token & FORMER != 0 => self.end_former(SessionId(token as u32), End::Dead),
                    token if token % 2 == 0 => self.on_message(token / 2),
                    token => self.on_death(token / 2),
                }
            }
            self.drop_silent();
            self.ask_again();
            self.hear_shard();
            let vacates_until = self.resizing.and_then(|resizing| resizing.vacates_until);
            if vacates_until.is_some_and(|until| until.elapsed() > Duration::ZERO) {
                tracing::warn!("what is in use at the pool's end after {} s is forgotten", VACATE_MAX.as_secs());
                self.is_vacated();
            }
            self.give_back_tail();
            self.log_counters();
            self.warn_of_media();
            self.feel_the_pulse();
            failed = self.engine.as_ref().is_some_and(Engine::has_failed);
        }
        let Some(leaving) = self.leaving.filter(|_| !failed) else { return false };
        let hand_over = leaving != Leaving::Stop;
        tracing::info!("{}", if hand_over { "handing over" } else { "stopping" });
        if !hand_over {
            let _ = self.inheritance.channel.send(&ToKeeper::Leaving { hand_over }, &[]);
            // Nobody finds us any more; then the sessions there are end.
            keeper::remove_socket(&self.config.socket, self.inheritance.socket_id);
        }
        self.verify.stop.store(true, Ordering::Relaxed);
        if let Some(engine) = &mut self.engine {
            let write_back = leaving == Leaving::HandOver { is_awaited: true };
            engine.stop(if hand_over { ToShard::HandOver { write_back } } else { ToShard::Stop });
        }
        if hand_over {
            // From here on this process touches neither pool nor SSD: the next one need not wait for its end.
            let _ = self.inheritance.channel.send(&ToKeeper::Leaving { hand_over }, &[]);
        }
        // Whoever has asked something of this process asks the next one; and whoever has the lock serves.
        self.connections.clear();
        let Self { engine, reaper, inheritance, .. } = self;
        if hand_over {
            drop((inheritance.lock, inheritance.listener));
        }
        match (engine, reaper) {
            // Nobody waits for it any more.
            (Some(engine), reaper) if leaving == (Leaving::HandOver { is_awaited: false }) => {
                engine.let_go(reaper.is_none());
            }
            // Whoever waits for the end of this process waits for its memory.
            (_, Some(reaper)) => reaper.end(),
            _ => {}
        }
        true
    }

    /// A shard that does not hear for `hang_limit_s`, counted in seconds in which this thread ran, serves nobody. Its process ends,
    /// as with any crash, and the keeper starts the next one over the same pool. One that was stopped as a whole has missed
    /// one second at the most.
    #[expect(clippy::disallowed_methods, reason = "the control plane's clock, and the end of the process")]
    fn feel_the_pulse(&mut self) {
        let limit_s = self.config.hang_limit.as_secs();
        let Some(engine) = self.engine.as_ref().filter(|_| limit_s > 0) else { return };
        if self.pulse.felt.is_some_and(|felt| felt.elapsed() < Duration::from_secs(1)) {
            return;
        }
        self.pulse.felt = Some(Instant::now());
        if self.pulse.asked.as_ref().is_none_or(|is_heard| is_heard.load(Ordering::Acquire)) {
            let is_heard = Arc::<AtomicBool>::default();
            (self.pulse.missed, self.pulse.asked) = (0, Some(is_heard.clone()));
            return engine.tell(ToShard::Pulse(is_heard));
        }
        self.pulse.missed += 1;
        if self.pulse.missed > limit_s {
            tracing::error!("the shard has not moved for {limit_s} s: this engine process ends");
            std::thread::sleep(LAST_WORDS);
            end_at_once();
        }
    }

    /// Who looks for the server by its lock finds this process.
    fn sign_the_lock(&self) {
        use std::io::{Seek, Write};
        let Ok(lock) = self.inheritance.lock.try_clone() else { return };
        let mut lock = std::fs::File::from(lock);
        let _ = lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| writeln!(lock, "{}", std::process::id()));
    }

    fn hear_keeper(&mut self) {
        match self.inheritance.channel.receive::<ToEngine>(false) {
            Ok((ToEngine::Stop, _)) => self.leaving = Some(Leaving::Stop),
            // Who was told to stop does that.
            Ok((ToEngine::HandOver { is_awaited }, _)) => {
                self.leaving.get_or_insert(Leaving::HandOver { is_awaited });
            }
            Ok((ToEngine::NotUpgraded { why }, _)) => self.is_not_upgraded(why),
            Ok((ToEngine::Begin { .. } | ToEngine::Prepare { .. }, _))
            | Err(ChannelError::TimedOut | ChannelError::Malformed(_)) => {}
            Err(error) => {
                let _ = epoll::delete(&self.epoll, &self.inheritance.channel);
                self.keeper_is_gone = true;
                if self.resizing.is_some() || self.is_upgrading {
                    self.is_not_upgraded(Some("the keeper is gone".into()));
                }
                self.sign_the_lock();
                tracing::error!(
                    "the keeper is gone ({error}): the pool would end with this process; `kvring stop` and a new start bring a keeper back"
                );
            }
        }
    }

    /// How long nothing can be missed. Without sessions: for ever, at no cost.
    fn nap(&self) -> Option<Timespec> {
        let silent = self.connections.values().any(|connection| connection.session.is_none());
        if self.connections.values().any(|connection| connection.awaits_shard) {
            // What the shard says is heard without a bell.
            return Some(Timespec { tv_sec: 0, tv_nsec: 1_000_000 });
        }
        if self.may_give_back_tail() {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        if self.resizing.is_some() {
            // What the shard says is heard without a bell.
            return Some(Timespec { tv_sec: 0, tv_nsec: 10_000_000 });
        }
        // With a data plane, once a second: it may fail, and sessions it is done with come back.
        match self.connections.is_empty() && self.engine.is_none() {
            true => None,
            false => Some(Timespec { tv_sec: i64::from(!silent), tv_nsec: if silent { 200_000_000 } else { 0 } }),
        }
    }

    fn accept(&mut self) {
        // Non-blocking: a peer that does not read its answers must not make us wait.
        let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
        let Ok(fd) = rustix::net::accept_with(&self.inheritance.listener, flags) else {
            // Out of descriptors: the listener stays readable, and hearing it at once would be all we do.
            #[expect(clippy::disallowed_methods, reason = "the control plane may wait, here for descriptors")]
            std::thread::sleep(Duration::from_millis(20));
            return;
        };
        // Twice the sessions, so that a full house can still be asked for its counters.
        if self.connections.len() >= 2 * SESSIONS_MAX {
            return;
        }
        let channel = Channel::accepted(fd);
        let peer = match Peer::of(&channel) {
            Ok(peer) => peer,
            // It did not wait for an answer.
            Err(rustix::io::Errno::SRCH) => return,
            Err(errno) => {
                let reason = format!(
                    "who connects cannot be seen from here ({errno}): run server and instances in one PID namespace (--pid=host)"
                );
                self.warn_of_refusal(&reason);
                let _ = channel.send(&Refusal::for_good(reason).into_reply(), &[]);
                return;
            }
        };
        let ours = rustix::process::geteuid().as_raw();
        let may = peer.is_user(ours) || peer.is_in_any(&self.config.allowed_groups);
        let asks = |c: &&Connection| c.session.is_none() && c.peer.pid == peer.pid;
        let askers = self.connections.values().filter(asks).count();
        // Who is to be refused is told why, but not without end.
        let his = |c: &&Connection| c.session.is_none() && c.peer.uid == peer.uid;
        let is_ours = peer.is_user(ours);
        if askers >= 2 * ASKERS_PER_PEER_MAX
            || !is_ours && self.connections.values().filter(his).count() >= SESSIONS_PER_USER_MAX
        {
            return;
        }
        let refusal = if !may {
            Some(format!(
                "user {} may not use the server of user {ours}: allowed_groups names groups that may",
                peer.uid
            ))
        } else if askers >= ASKERS_PER_PEER_MAX {
            Some(format!(
                "process {} has {ASKERS_PER_PEER_MAX} connections without a session",
                peer.pid.as_raw_nonzero()
            ))
        } else {
            None
        };
        if let Some(reason) = &refusal {
            self.warn_of_refusal(reason);
        }
        let number = self.next_connection;
        if self.watch(channel.as_fd(), number * 2).is_ok() {
            self.next_connection += 1;
            #[expect(clippy::disallowed_methods, reason = "the control plane is not simulated")]
            let opened = Instant::now();
            self.connections
                .insert(number, Connection { channel, peer, refusal, opened, awaits_shard: false, session: None });
        }
    }

    /// Once a second: whoever may connect must not fill the log.
    fn warn_of_refusal(&mut self, reason: &str) {
        if self.refusal_told.is_some_and(|at| at.elapsed() < Duration::from_secs(1)) {
            return;
        }
        #[expect(clippy::disallowed_methods, reason = "the control plane is not simulated")]
        let now = Instant::now();
        self.refusal_told = Some(now);
        tracing::warn!("refused: {reason}");
    }

    fn drop_silent(&mut self) {
        self.connections.retain(|_, c| c.session.is_some() || c.awaits_shard || c.opened.elapsed() < FIRST_WORD);
    }

    fn on_message(&mut self, number: u64) {
        let Some(connection) = self.connections.get(&number) else { return };
        let request = match connection.channel.receive::<Request>(false) {
            Ok((request, _)) => request,
            Err(ChannelError::TimedOut) => return,
            Err(error) => {
                if !matches!(error, ChannelError::Closed) {
                    self.reply(number, &Refusal::for_good(format!("not understood: {error}")).into_reply());
                }
                return self.on_hang_up(number);
            }
        };
        if let Some(reason) = connection.refusal.clone() {
            self.reply(number, &Refusal::for_good(reason).into_reply());
            return self.on_hang_up(number);
        }
        self.log_who_asks(number, &request);
        match request {
            Request::Attach(attach) => {
                if let Err(refusal) = self.attach(number, &attach) {
                    self.warn_of_refusal(&format!("instance {}: {}", attach.instance_id, refusal.reason));
                    self.reply(number, &refusal.into_reply());
                    // Whatever it had is taken back as from one that hung up.
                    self.on_hang_up(number);
                }
            }
            Request::Goodbye => {
                if let Some(attached) =
                    self.connections.get_mut(&number).and_then(|connection| connection.session.as_mut())
                {
                    attached.goodbye = true;
                }
                self.settle(number);
            }
            Request::Stats => {
                self.reply(number, &Reply::Stats(self.stats()));
                self.drop_if_no_session(number);
            }
            Request::StatsSegment => {
                let stats = self.engine.as_ref().and_then(|engine| engine.stats.as_ref());
                let refusal = match (self.is_same_user(number), stats) {
                    // It names what others store.
                    (false, _) => Refusal::for_good("only the server's user may read its stats segment".into()),
                    (true, None) if !self.config.stats_segment => {
                        Refusal::for_good("stats_segment = off: this server shows nothing; start it with on".into())
                    }
                    (true, None) => Refusal::for_now("there is nothing yet: no worker has attached".into()),
                    (true, Some((_, stats))) => {
                        if let Some(connection) = self.connections.get(&number) {
                            let _ = connection.channel.send(&Reply::StatsSegment, &[stats.as_fd()]);
                        }
                        return self.drop_if_no_session(number);
                    }
                };
                self.reply(number, &refusal.into_reply());
                self.drop_if_no_session(number);
            }
            Request::Blocks { .. }
            | Request::Namespaces { .. }
            | Request::ResetNamespace { .. }
            | Request::Evict { .. }
            | Request::Forget { .. }
            | Request::Drain { .. } => {
                if let Err(refusal) = self.administer(number, &request) {
                    self.reply(number, &refusal.into_reply());
                    self.drop_if_no_session(number);
                }
            }
            Request::Reset => match &self.engine {
                _ if !self.is_same_user(number) => {
                    self.reply(number, &Refusal::for_good("only the server's user may reset it".into()).into_reply());
                    self.drop_if_no_session(number);
                }
                Some(engine) => {
                    engine.tell(ToShard::Reset(number));
                    if let Some(connection) = self.connections.get_mut(&number) {
                        connection.awaits_shard = true;
                    }
                }
                None => {
                    // What the SSD holds is forgotten when somebody says what its blocks look like.
                    self.forget_at_start = true;
                    let durable = self.config.ssd_cache_bytes == 0;
                    self.reply(number, &Reply::Reset { blocks: 0, durable });
                    self.drop_if_no_session(number);
                }
            },
            Request::Drained { session } => {
                let session = SessionId(session);
                let pid = self.connections.get(&number).and_then(|connection| connection.session.as_ref());
                let pid = pid.map(|attached| attached.peer.pid.as_raw_nonzero().get());
                // Its own word only.
                if self.formers.get(&session).is_some_and(|former| Some(former.pid) == pid) {
                    self.end_former(session, End::Goodbye);
                } else if let Some(engine) = &self.engine
                    && engine.table.session(session).is_some_and(|named| Some(named.pid) == pid)
                    && !self.is_attached(session)
                {
                    // It held no slots; nobody need ask for it later.
                    engine.table.end_session(session);
                }
            }
            Request::Verify { bytes_per_s } => {
                let begun = match &self.engine {
                    _ if !self.is_same_user(number) => Err("only the server's user may have it verified".into()),
                    Some(engine) => verify::begin(&self.config, engine, &self.verify, bytes_per_s),
                    None => Err("there is nothing yet: no worker has attached".into()),
                };
                match begun {
                    Ok(()) => self.reply(number, &Reply::Verifying),
                    Err(why) => self.reply(number, &Refusal::for_now(why).into_reply()),
                }
                self.drop_if_no_session(number);
            }
            Request::Stop | Request::Upgrade | Request::Resize(_) if !self.is_same_user(number) => {
                self.reply(number, &Refusal::for_good("only the server's user may stop it".into()).into_reply());
                self.drop_if_no_session(number);
            }
            Request::Upgrade | Request::Resize(_) if self.keeper_is_gone => {
                let reason = "the keeper is gone, so nobody would start another engine process: `kvring stop`, and start the server anew";
                self.reply(number, &Refusal::for_good(reason.into()).into_reply());
                self.drop_if_no_session(number);
            }
            Request::Resize(sizes) => {
                let done = self.resize(sizes);
                let reply = done.map_or_else(Refusal::into_reply, |()| self.upgrading());
                self.reply(number, &reply);
                self.drop_if_no_session(number);
            }
            Request::Upgrade if self.resizing.is_some() => {
                self.reply(number, &Refusal::for_now("a resize is under way".into()).into_reply());
                self.drop_if_no_session(number);
            }
            Request::Stop => {
                self.leaving = Some(Leaving::Stop);
                // The keeper first: what has an answer is so, should this process die now.
                let _ = self.inheritance.channel.send(&ToKeeper::Leaving { hand_over: false }, &[]);
                self.reply(number, &Reply::Stopping);
            }
            Request::Upgrade => {
                if self.inheritance.prepares_upgrades {
                    let _ = self.inheritance.channel.send(&ToKeeper::Upgrade, &[]);
                    self.is_upgrading = true;
                } else {
                    self.leaving = Some(Leaving::HandOver { is_awaited: false });
                }
                self.reply(number, &self.upgrading());
            }
        }
    }

    /// What an operator asks of the shard: only the server's user, and what changes anything is logged.
    /// Whatever changes something, or makes the server do much, names who wanted it, be it granted or not.
    fn log_who_asks(&mut self, number: u64, request: &Request) {
        let what = match request {
            Request::Stop => "stop".to_owned(),
            Request::Upgrade => "upgrade".to_owned(),
            Request::Reset => "reset of everything".to_owned(),
            Request::ResetNamespace { namespace } => format!("reset of namespace {namespace:?}"),
            Request::Verify { bytes_per_s } => format!("verification of {bytes_per_s} bytes a second"),
            Request::Resize(sizes) => format!("{sizes:?}"),
            Request::Evict { tier, blocks } => format!("eviction of {blocks} blocks from {tier:?}"),
            Request::Forget { key } => format!("to forget {key:?}"),
            // Asking again how far a drain has come is no news.
            Request::Drain { on } if *on == self.draining => return,
            Request::Drain { on: true } => "drain".to_owned(),
            Request::Drain { on: false } => "end of drain".to_owned(),
            _ => return,
        };
        let Some(peer) = self.connections.get(&number).map(|connection| &connection.peer) else { return };
        let (pid, uid) = (peer.pid.as_raw_nonzero(), peer.uid);
        if self.is_same_user(number) {
            tracing::info!("process {pid} (user {uid}) asks: {what}");
        } else {
            self.warn_of_refusal(&format!("process {pid} (user {uid}) asks: {what}: only the server's user may"));
        }
    }

    fn administer(&mut self, number: u64, request: &Request) -> Result<(), Refusal> {
        if !self.is_same_user(number) {
            return Err(Refusal::for_good("only the server's user may administer it".into()));
        }
        let key = |text: &str| {
            let key = kvring_ipc::key::BlockKey::from_hex(text);
            key.ok_or_else(|| Refusal::for_good(format!("{text:?} is no key: expected 32 hexadecimal digits")))
        };
        let op = match request {
            Request::Blocks { key: Some(text), .. } => AdminOp::Block { key: key(text)? },
            Request::Blocks { from, .. } => AdminOp::Blocks { from: *from },
            Request::Namespaces { from } => AdminOp::Namespaces { from: *from },
            Request::ResetNamespace { namespace } => {
                let id = key(namespace)?;
                return self.tell_shard(number, ToShard::ResetNamespace(number, id));
            }
            Request::Evict { tier, blocks } => AdminOp::Evict {
                tier: match tier.as_str() {
                    "dram" => Tier::Host,
                    "ssd" => Tier::Disk,
                    other => return Err(Refusal::for_good(format!("tier = {other:?}: expected dram or ssd"))),
                },
                count: *blocks,
            },
            Request::Forget { key: text } => {
                let key = key(text)?;
                return self.tell_shard(number, ToShard::Forget(number, key));
            }
            Request::Drain { on } => AdminOp::Drain { on: *on },
            _ => return Ok(()),
        };
        if let AdminOp::Drain { on } = op
            && self.engine.is_some()
        {
            self.draining = on;
        }
        self.tell_shard(number, ToShard::Admin(number, op))
    }

    /// The shard answers later; what changes anything is logged.
    fn tell_shard(&mut self, number: u64, message: ToShard) -> Result<(), Refusal> {
        let Some(engine) = &self.engine else {
            return Err(Refusal::for_now("there is nothing yet: no worker has attached".into()));
        };
        engine.tell(message);
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.awaits_shard = true;
        }
        Ok(())
    }

    fn drop_if_no_session(&mut self, number: u64) {
        if self.connections.get(&number).is_some_and(|connection| connection.session.is_none()) {
            self.connections.remove(&number);
        }
    }

    fn reply(&self, number: u64, reply: &Reply) {
        if let Some(connection) = self.connections.get(&number) {
            // A peer that does not read its answers loses them.
            let _ = connection.channel.send(reply, &[]);
        }
    }

    fn is_same_user(&self, number: u64) -> bool {
        let Some(connection) = self.connections.get(&number) else { return false };
        connection.peer.is_user(rustix::process::geteuid().as_raw())
    }

    fn attach(&mut self, number: u64, attach: &Attach) -> Result<(), Refusal> {
        let Some(connection) = self.connections.get(&number) else { return Ok(()) };
        if connection.session.is_some() {
            return Err(Refusal::for_good("this connection has a session already".into()));
        }
        let peer = Peer::of(connection.channel.as_fd())
            .map_err(|errno| Refusal::for_now(format!("who connects is unknown: {errno}")))?;
        let attached = self.connections.values().filter_map(|connection| connection.session.as_ref());
        let its = attached.filter(|attached| attached.peer.pid == peer.pid).count();
        if its >= SESSIONS_PER_PEER_MAX {
            let pid = peer.pid.as_raw_nonzero();
            return Err(Refusal::for_now(format!("process {pid} has {its} sessions: no process may have more")));
        }
        let is_his = |attached: &Attached| attached.peer.uid == peer.uid;
        let attached = self.connections.values().filter_map(|connection| connection.session.as_ref());
        let its = attached.filter(|attached| is_his(attached)).count();
        if its >= SESSIONS_PER_USER_MAX && !peer.is_user(rustix::process::geteuid().as_raw()) {
            let reason = format!("user {} has {its} sessions: none but the server's own may have more", peer.uid);
            return Err(Refusal::for_now(reason));
        }
        if attach.protocol != PROTOCOL_VERSION {
            return Err(Refusal::for_good(format!(
                "the server speaks protocol {PROTOCOL_VERSION}, this instance {}: use one version of kvring",
                attach.protocol
            )));
        }
        if let Some(layout) = &attach.layout {
            layout.check_texts().map_err(Refusal::for_good)?;
        }
        if let Some(layout) = &attach.layout
            && attach.rank >= layout.tp_size
        {
            let reason = format!("rank = {} is not below tp_size = {}", attach.rank, layout.tp_size);
            return Err(Refusal::for_good(reason));
        }
        let layout = self.engine.as_ref().map(|engine| &engine.layout).or(self.layout.as_ref());
        if let (Some(layout), Some(theirs)) = (layout, &attach.layout) {
            let differences = layout.differences(theirs);
            if !differences.is_empty() {
                let reason =
                    "its model or its layout is not the server's: give it a server of its own (server_recv_port)"
                        .into();
                return Err(Refusal { differences, ..Refusal::for_good(reason) });
            }
        }
        let same_id = |instance: &&Instance| instance.id == attach.instance_id;
        let taken = self.instances.iter().find(|i| same_id(i) && i.token != attach.instance_token);
        if let Some(other) = taken {
            // For now: the other may be dying, and this one its successor.
            return Err(Refusal::for_now(format!(
                "instance_id = {} is in use by process {}: give each instance its own (FLEXKV_INSTANCE_ID), or none",
                attach.instance_id, other.pid
            )));
        }
        if self.engine.is_none() {
            let Some(layout) = attach.layout.clone() else {
                return Err(Refusal::for_now("no worker has said yet what its blocks look like".into()));
            };
            // A layout that no operator gave never empties a cache that is there; what an operator has ordered is done.
            let format = self.config.ssd_on_mismatch == OnMismatch::Format;
            let on_mismatch = if format { OnMismatch::Format } else { OnMismatch::Refuse };
            self.start_engine(layout, on_mismatch, None).map_err(|error| {
                tracing::error!("{error}");
                Refusal::for_now(error.to_string())
            })?;
        }
        let same = |i: &&Instance| i.id == attach.instance_id && i.token == attach.instance_token;
        let its = self.instances.iter().find(same).map_or(0, |instance| instance.sessions_count as usize);
        if its >= SESSIONS_PER_PEER_MAX {
            let id = attach.instance_id;
            return Err(Refusal::for_now(format!("instance {id} has {its} sessions: no instance may have more")));
        }
        let id =
            self.free_session_id().ok_or_else(|| Refusal::for_now(format!("all {SESSIONS_MAX} sessions are taken")))?;
        let instance = self.instance_of(attach, peer.pid.as_raw_nonzero().get());
        let moves_blocks = attach.layout.is_some();
        self.open_session(number, id, instance, attach, moves_blocks, peer).map_err(|errno| {
            self.leave_instance(instance);
            Refusal::for_now(format!("no session can be made: {errno}"))
        })
    }

    fn free_session_id(&mut self) -> Option<SessionId> {
        let taken: std::collections::HashSet<usize> = self
            .connections
            .values()
            .filter_map(|connection| connection.session.as_ref())
            .map(|attached| attached.id)
            // Their places in the slot table say who they are.
            .chain(self.formers.keys().copied())
            .chain(self.uncertain.iter().copied())
            .map(|id| id.0 as usize % SESSIONS_MAX)
            .collect();
        (0..SESSIONS_MAX as u32).find_map(|_| {
            // Wraps after four billion sessions; u32::MAX means nobody.
            self.next_session = (self.next_session + 1) % (u32::MAX - 2);
            (!taken.contains(&(self.next_session as usize % SESSIONS_MAX))).then_some(SessionId(self.next_session))
        })
    }

    fn is_attached(&self, session: SessionId) -> bool {
        let attached = self.connections.values().filter_map(|connection| connection.session.as_ref());
        attached.into_iter().any(|attached| attached.id == session)
    }

    fn instance_of(&mut self, attach: &Attach, pid: i32) -> u32 {
        let known = self.instances.iter_mut().find(|i| i.id == attach.instance_id && i.token == attach.instance_token);
        if let Some(instance) = known {
            instance.sessions_count += 1;
            return instance.number;
        }
        self.next_instance += 1;
        let number = self.next_instance;
        self.instances.push(Instance {
            number,
            id: attach.instance_id,
            token: attach.instance_token.clone(),
            sessions_count: 1,
            pid,
        });
        tracing::info!("instance {} attached (process {pid})", attach.instance_id);
        number
    }

    fn leave_instance(&mut self, number: u32) {
        self.instances.retain_mut(|instance| {
            if instance.number != number {
                return true;
            }
            instance.sessions_count -= 1;
            if instance.sessions_count == 0 {
                tracing::info!("instance {} is gone", instance.id);
            }
            instance.sessions_count > 0
        });
    }

    fn open_session(
        &mut self,
        number: u64,
        id: SessionId,
        instance: u32,
        attach: &Attach,
        moves_blocks: bool,
        peer: Peer,
    ) -> rustix::io::Result<()> {
        let (Some(engine), Some(connection)) = (&self.engine, self.connections.get_mut(&number)) else { return Ok(()) };
        let (segment, segment_fd) = Segment::create()?;
        let (bell, their_bell) = kvring_ipc::bell::pair()?;
        let pool = &engine.pool;
        let welcome = Welcome {
            session: id.0,
            pool_bytes: pool.mapping.bytes() as u64,
            slot_bytes: pool.slot_bytes,
            slots_count: pool.slots_count,
            page_bytes: pool.pages.bytes(),
            pool_id: engine.table.pool_id(),
            memory_id: engine.table.shape().pool_id,
            epoch: self.inheritance.epoch,
            server_pid: std::process::id(),
            settings: self.config.as_text(),
        };
        epoll::add(&self.epoll, &peer.pidfd, epoll::EventData::new_u64(number * 2 + 1), epoll::EventFlags::IN)?;
        let fds = [
            segment_fd.as_fd(),
            pool.fd.as_fd(),
            their_bell.as_fd(),
            engine.events.as_fd(),
            self.inheritance.epoch_fd.as_fd(),
        ];
        // Before it can be granted a slot. Who cannot be told from another process of its number gets none.
        let pid = peer.pid.as_raw_nonzero().get();
        let started_ticks = started_ticks(pid).ok_or(rustix::io::Errno::SRCH)?;
        engine.table.begin_session(FormerSession { session: id, pid, started_ticks });
        if connection.channel.send(&Reply::Welcome(welcome), &fds).is_err() {
            return Err(rustix::io::Errno::PIPE);
        }
        let writer = Writer { session: id, instance, rank: attach.rank };
        let mut session = Box::new(Session::new(writer, segment, Some(bell)));
        session.moves_blocks = moves_blocks;
        (session.pid, session.instance_id) = (pid.unsigned_abs(), attach.instance_id);
        session.user = peer.uid;
        connection.session = Some(Attached { id, instance, peer, goodbye: false, hung_up: false, died: false });
        engine.tell(ToShard::Attach(session));
        Ok(())
    }

    fn on_hang_up(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        let Some(attached) = &mut connection.session else {
            self.connections.remove(&number);
            return;
        };
        attached.hung_up = true;
        let _ = epoll::delete(&self.epoll, connection.channel.as_fd());
        self.settle(number);
    }

    fn on_death(&mut self, number: u64) {
        let Some(attached) = self.connections.get_mut(&number).and_then(|connection| connection.session.as_mut())
        else {
            return;
        };
        attached.died = true;
        let _ = epoll::delete(&self.epoll, &attached.peer.pidfd);
        self.settle(number);
    }

    /// A session ends: by goodbye at once; else it is suspect at the first sign and dead at the second
    /// (a process that hung up may live and write; one that died may have left its files to a child).
    fn settle(&mut self, number: u64) {
        let (Some(engine), Some(connection)) = (&self.engine, self.connections.get(&number)) else { return };
        let Some(attached) = &connection.session else { return };
        let end = match (attached.goodbye, attached.hung_up, attached.died) {
            (true, ..) => End::Goodbye,
            (false, true, true) => End::Dead,
            _ => End::Suspect,
        };
        engine.tell(ToShard::End(attached.id, end));
        if end != End::Suspect {
            let instance = attached.instance;
            if end == End::Dead {
                tracing::warn!("session {} of process {} died", attached.id.0, attached.peer.pid.as_raw_nonzero());
            }
            // Nobody need ask for it later: it writes no more, or is dead, and its slots wait out their grace.
            engine.table.end_session(attached.id);
            self.connections.remove(&number);
            self.leave_instance(instance);
        }
    }

    /// Has the drives flush what they hold of the headers, behind: that may take long, and deaths are heard meanwhile.
    fn flush(&self, asked_by: u64, blocks: u32) {
        let (dirs, back) = (self.config.ssd_cache_dirs.clone(), self.flushed.0.clone());
        let flush = move || {
            let durable = Medium::all(&dirs).is_ok_and(|media| files::flush_headers(&media).is_ok());
            let _ = back.send(Flushed { asked_by, blocks, durable });
        };
        if std::thread::Builder::new().name("kvring-flush".into()).spawn(flush).is_err() {
            let _ = self.flushed.0.send(Flushed { asked_by, blocks, durable: false });
        }
    }

    fn answer_reset(&mut self, asked_by: u64, blocks: u32, durable: bool) {
        self.reply(asked_by, &Reply::Reset { blocks: u64::from(blocks), durable });
        if let Some(connection) = self.connections.get_mut(&asked_by) {
            connection.awaits_shard = false;
        }
        self.drop_if_no_session(asked_by);
    }

    fn hear_shard(&mut self) {
        while let Ok(Flushed { asked_by, blocks, durable }) = self.flushed.1.try_recv() {
            self.answer_reset(asked_by, blocks, durable);
        }
        while let Some(message) = self.engine.as_ref().and_then(|engine| engine.from_shard.try_recv().ok()) {
            match message {
                FromShard::Gone(session) => drop(session),
                FromShard::Reset { asked_by, blocks, durable } => {
                    tracing::info!("reset: {blocks} blocks forgotten");
                    // Written is not durable: what the drive's cache holds goes with the power.
                    if durable && self.config.ssd_cache_bytes > 0 {
                        self.flush(asked_by, blocks);
                    } else {
                        self.answer_reset(asked_by, blocks, durable);
                    }
                }
                FromShard::Device(at, turn) => {
                    let name =
                        self.engine.as_ref().and_then(|engine| engine.devices.get(at)).map_or("", String::as_str);
                    match turn {
                        Turn::Lost => tracing::error!(
                            "lost: {name}: it failed again and again, or answered nothing for 10 s; its blocks are forgotten, and it is tried again now and then"
                        ),
                        Turn::Back => tracing::info!("back: {name}"),
                        Turn::None => {}
                    }
                }
                FromShard::Vacated => self.is_vacated(),
                FromShard::Refused(asked_by, why) => {
                    self.reply(asked_by, &Refusal::for_now(why.into()).into_reply());
                    if let Some(connection) = self.connections.get_mut(&asked_by) {
                        connection.awaits_shard = false;
                    }
                    self.drop_if_no_session(asked_by);
                }
                FromShard::Admin(asked_by, done) => {
                    self.reply(asked_by, &Reply::Admin(done));
                    if let Some(connection) = self.connections.get_mut(&asked_by) {
                        connection.awaits_shard = false;
                    }
                    self.drop_if_no_session(asked_by);
                }
                FromShard::Recovered(recovered) => {
                    if self.config.ssd_cache_bytes > 0 {
                        tracing::info!("{} blocks found on the SSD", recovered.disk);
                    }
                }
                FromShard::Unregistered(piece, errno) => {
                    tracing::error!("piece {piece} of the pool cannot be registered ({errno}): its slots are not used");
                }
            }
        }
    }

    fn log_counters(&mut self) {
        let (Some(engine), interval) = (&self.engine, self.config.num_log_interval_requests) else { return };
        let m = &engine.metrics;
        let matches = m.matches_count.get();
        // A line for each interval would be thousands a second: they are few, whatever the load.
        let waited = self.counters_logged.is_none_or(|at| at.elapsed() >= Duration::from_secs(1));
        if interval == 0 || matches < self.matches_logged + interval || !waited {
            return;
        }
        #[expect(clippy::disallowed_methods, reason = "the control plane is not simulated")]
        let now = Instant::now();
        (self.matches_logged, self.counters_logged) = (matches, Some(now));
        let (asked, hit) = (m.match_blocks_requested_count.get(), m.match_blocks_hit_count.get());
        tracing::info!(
            "{matches} matches, {hit} of {asked} blocks hit ({:.1} %), {} loaded from DRAM and {} from SSD, {} stored, {} of {} slots free",
            100.0 * hit as f64 / asked.max(1) as f64,
            m.load_blocks_dram_count.get(),
            m.load_blocks_ssd_count.get(),
            m.commit_blocks_count.get(),
            m.host_slots_free_count.get(),
            m.host_slots_count.get(),
        );
    }

    /// A disk that fails is the operator's business, once in a while and not once a block.
    fn warn_of_media(&mut self) {
        let Some(engine) = &self.engine else { return };
        let m = &engine.metrics;
        let errors = [m.ssd_checksum_errors_count.get(), m.ssd_read_errors_count.get(), m.ssd_write_errors_count.get()];
        let waited = self.media_warned.is_none_or(|at| at.elapsed() > Duration::from_secs(10));
        if errors == self.media_errors || !waited {
            return;
        }
        #[expect(clippy::disallowed_methods, reason = "the control plane is not simulated")]
        let now = Instant::now();
        (self.media_errors, self.media_warned) = (errors, Some(now));
        let [checksums, reads, writes] = errors;
        tracing::warn!(
            "the SSD fails: {checksums} blocks were not the bytes written, {reads} reads and {writes} writes failed since the start; each is a miss. Look at the device ({})",
            engine.devices.join("; ")
        );
    }

    fn stats(&self) -> serde_json::Value {
        let instances: Vec<_> = self
            .instances
            .iter()
            .map(|i| serde_json::json!({"instance_id": i.id, "pid": i.pid, "sessions": i.sessions_count}))
            .collect();
        let mut stats = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "server_pid": std::process::id(),
            "keeper_pid": rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get()),
            "epoch": self.inheritance.epoch,
            "crashes": self.inheritance.crashes,
            "fell_back": self.inheritance.fell_back,
            "upgrades_failed": self.upgrades_failed_count,
            "upgrade_failure": self.upgrade_failure,
            "is_vacating": self.resizing.is_some_and(|resizing| resizing.vacates_until.is_some()),
            "draining": self.draining,
            "socket": self.config.socket,
            "settings": self.config.as_text(),
            "instances": instances,
        });
        if let Some(engine) = &self.engine {
            let counters: serde_json::Map<_, _> =
                engine.metrics.all().into_iter().map(|(name, _, value)| (name.to_owned(), value.into())).collect();
            stats["layout"] = serde_json::to_value(&engine.layout).unwrap_or_default();
            stats["page_bytes"] = engine.pool.pages.bytes().into();
            stats["slot_bytes"] = engine.pool.slot_bytes.into();
            stats["devices"] = engine.devices.clone().into();
            stats["metrics"] = counters.into();
            stats["verify"] = self.verify.as_json();
        }
        stats
    }
}

/// Fewer descriptors do not even make a server.
const DESCRIPTORS_MIN: u64 = 64;

/// Each session costs five descriptors: the soft limit of 1024 is for programs that use select(2).
fn raise_descriptor_limit() -> Result<(), ServeError> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let wanted = 5 * SESSIONS_MAX as u64 + 256;
    let raised = setrlimit(Resource::Nofile, limit).is_ok();
    let maximum = limit.maximum.unwrap_or(u64::MAX);
    if maximum < DESCRIPTORS_MIN {
        return Err(ServeError::Descriptors { maximum });
    }
    if !raised || maximum < wanted {
        tracing::warn!(
            "fewer than {wanted} descriptors may be open, so fewer than {SESSIONS_MAX} sessions fit: raise ulimit -n"
        );
    }
    Ok(())
}
