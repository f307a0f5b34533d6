//! The keeper: a process that holds what must outlive the engine process, and starts that anew.
//!
//! It holds the control socket, its lock, the epoch, and once there is one the pool with its slot table.
//! It maps nothing of the pool, understands no message of a client, and does next to nothing, so that
//! there is next to nothing that could end it. The engine process gets all of it over a socket pair that
//! is its standard input, and goes on serving should the keeper die first.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kvring_ipc::config::Config;
use kvring_ipc::epoch::EpochWriter;
use kvring_ipc::handshake::{Channel, ChannelError, Request, Sizes, ask, bind};
use kvring_ipc::launch::{beside_socket, try_lock};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use super::ServeError;
use super::engine::BuildError;

/// What the keeper tells its engine process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "to_engine", rename_all = "snake_case")]
pub enum ToEngine {
    /// Make what can be made while another engine process serves, and say that you are ready; beside it, with
    /// `keeps_pool`, the pool and its table. `Begin` follows.
    Prepare {
        /// Whether there is a pool to take over.
        keeps_pool: bool,
        /// Sizes that were asked for since the server was started.
        #[serde(default)]
        sizes: Sizes,
    },
    /// What it serves with; beside it listener, lock, epoch, and with `keeps_pool` the pool and its table.
    Begin {
        /// Which engine process it is; what the last one granted is void.
        epoch: u64,
        /// Engine processes that died so far.
        crashes: u32,
        /// Whether there is a pool to take over.
        keeps_pool: bool,
        /// The program file did not start: this is the keeper's own program. (A keeper of an earlier version
        /// does not say, here and below: an upgrade has its engine process and not it.)
        #[serde(default)]
        fell_back: bool,
        /// Which file the socket is: its device and inode.
        #[serde(default)]
        socket_id: (u64, u64),
        /// An upgrade is asked for by [`ToKeeper::Upgrade`], and prepared.
        #[serde(default)]
        prepares_upgrades: bool,
        /// Sizes that were asked for since the server was started, which [`ToKeeper::Resize`] changes.
        #[serde(default)]
        sizes: Option<Sizes>,
        /// A pool was given up right before: its memory comes back in a moment.
        #[serde(default)]
        frees: bool,
    },
    /// Finish what is being written and go.
    Stop,
    /// Hand over to another engine process: finish what is under way and go, the pool stays.
    HandOver {
        /// The next one waits for this one's end, for the sake of its memory.
        #[serde(default)]
        is_awaited: bool,
    },
    /// The next engine process has not become ready: this one goes on.
    NotUpgraded {
        /// What it said.
        #[serde(default)]
        why: Option<String>,
    },
}

/// What an engine process tells its keeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "to_keeper", rename_all = "snake_case")]
pub enum ToKeeper {
    /// Keep these: a pool and its table come beside it.
    Keep,
    /// Keep this, and the one before it: a stats segment comes beside it. What an engine process has done last is to
    /// be read after its death.
    KeepStats,
    /// Who lets go of its memory after its death comes beside it, to be waited for where nobody else does.
    Reaper,
    /// Let go of what is kept: it is not what is asked for now.
    LetGo,
    /// It has prepared itself, and waits for its beginning.
    Ready {
        /// It takes the pool over. Else it may need the memory of it for its own.
        takes_pool: bool,
    },
    /// It cannot prepare itself, and goes.
    Unable {
        /// What its operator should know.
        why: String,
    },
    /// It serves.
    Serving,
    /// Somebody has asked for tiers of other sizes: as [`ToKeeper::Upgrade`], with these. What they do not say stays.
    Resize(Sizes),
    /// Somebody has asked for another engine process, from the program file as it is now.
    Upgrade,
    /// It goes because somebody has asked it to.
    Leaving {
        /// Another engine process is to take over: this one does nothing any more but end.
        hand_over: bool,
    },
}

/// What an engine process begins with.
#[derive(Debug)]
pub struct Inheritance {
    /// To the keeper; end of file once that is gone.
    pub channel: Channel,
    /// The bound control socket.
    pub listener: OwnedFd,
    /// Its lock: held for as long as either process lives.
    pub lock: OwnedFd,
    /// For clients.
    pub epoch_fd: OwnedFd,
    /// Which engine process this is.
    pub epoch: u64,
    /// Engine processes that died so far.
    pub crashes: u32,
    /// The program file did not start: this is the program that the keeper is.
    pub fell_back: bool,
    /// Which file the socket is: its device and inode.
    pub socket_id: (u64, u64),
    /// A pool and its table, to be taken over.
    pub kept: Option<[OwnedFd; 2]>,
    /// Whether the keeper has the next engine process prepare itself while this one serves.
    pub prepares_upgrades: bool,
    /// Sizes that were asked for since the server was started; `None` of a keeper that knows of none.
    pub sizes: Option<Sizes>,
    /// A pool was given up right before: its memory comes back in a moment.
    pub frees: bool,
}

impl Inheritance {
    /// What the keeper sends over the socket that is this process's standard input. If another engine process
    /// serves yet, `prepare` is called with the pool that is to be taken over, before its turn comes; it says whether
    /// it will be.
    ///
    /// # Errors
    /// Standard input is no keeper's, or what `prepare` says.
    pub fn receive(
        prepare: impl FnOnce(Option<[OwnedFd; 2]>, Sizes) -> Result<bool, BuildError>,
    ) -> Result<Self, ServeError> {
        let channel = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).map_err(ChannelError::from);
        let channel = Channel::accepted(channel.map_err(ServeError::NoKeeper)?);
        let mut prepare = Some(prepare);
        loop {
            let (said, fds) = Self::hear(&channel, prepare.is_some()).map_err(ServeError::NoKeeper)?;
            match (said, prepare.take()) {
                (ToEngine::Prepare { keeps_pool, sizes }, Some(prepare)) => {
                    let kept = if keeps_pool { <[OwnedFd; 2]>::try_from(fds).ok() } else { None };
                    let takes_pool = prepare(kept, sizes).inspect_err(|error| {
                        let _ = channel.send(&ToKeeper::Unable { why: error.to_string() }, &[]);
                    })?;
                    channel.send(&ToKeeper::Ready { takes_pool }, &[]).map_err(ServeError::NoKeeper)?;
                }
                (said, _) => return Self::begin(channel, &said, fds).map_err(ServeError::NoKeeper),
            }
        }
    }

    fn hear(channel: &Channel, is_first: bool) -> Result<(ToEngine, Vec<OwnedFd>), ChannelError> {
        // The one that serves finishes first, or is killed because it does not.
        channel.bound(if is_first { Duration::from_secs(10) } else { START_PATIENCE })?;
        channel.receive(true)
    }

    fn begin(channel: Channel, said: &ToEngine, fds: Vec<OwnedFd>) -> Result<Self, ChannelError> {
        let ToEngine::Begin { epoch, crashes, keeps_pool, fell_back, socket_id, prepares_upgrades, sizes, frees } =
            *said
        else {
            return Err(ChannelError::Malformed("not a beginning".into()));
        };
        channel.bound(Duration::from_secs(10))?;
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or_else(|| ChannelError::Malformed("a descriptor is missing".into()));
        let [listener, lock, epoch_fd] = [next()?, next()?, next()?];
        let kept = if keeps_pool { Some([next()?, next()?]) } else { None };
        Ok(Self {
            channel,
            listener,
            lock,
            epoch_fd,
            epoch,
            crashes,
            fell_back,
            socket_id,
            kept,
            prepares_upgrades,
            sizes,
            frees,
        })
    }
}

/// How long an engine process may take to finish when it is told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(15);
/// How long an engine process may take until it serves.
const START_PATIENCE: Duration = Duration::from_secs(120);
/// How long the kernel may take to end a server that was killed: it unpins its pool, and gives it back.
const DEATH_MAX: Duration = Duration::from_secs(30);
/// Statuses of a process that died of itself: a panic, a data plane that failed. Others say that it cannot start.
const DEATHS: [i32; 2] = [101, 70];
/// Between the deaths of engine processes and their successors, where they follow one another fast.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Stats segments held: of the engine process that serves, and of the one before it.
const STATS_KEPT: usize = 2;

/// The keeper.
pub struct Keeper {
    config: Config,
    lock: File,
    listener: OwnedFd,
    epoch: EpochWriter,
    epoch_fd: OwnedFd,
    number: u64,
    crashes: u32,
    /// Deaths within the window, and those of them that were of this pool.
    recent: VecDeque<Instant>,
    recent_of_pool: VecDeque<Instant>,
    /// Tries since the last engine process that served.
    unserved: u32,
    fell_back: bool,
    socket_id: (u64, u64),
    kept: Option<[OwnedFd; 2]>,
    /// Stats segments of the last engine processes, the latest last. Held for others to read (`/proc/PID/fd`).
    stats: VecDeque<OwnedFd>,
    /// Processes of [`super::reaper`], the oldest first. Their parent is dead before they end: they are this process' to wait
    /// for, or each would be a zombie for ever where nobody else asks (the first process of a container).
    reapers: VecDeque<OwnedFd>,
    /// A pool was given up since an engine process served the last time.
    frees: bool,
    /// Somebody wants an engine process of the program file as it is now, and none was started since.
    wanted: bool,
    /// With these sizes.
    wanted_sizes: Option<Sizes>,
    /// Sizes that the last engine process that served was given.
    sizes: Sizes,
    /// Those that the one that runs was given.
    given: Sizes,
}

/// What the keeper waits for, beside its engine process.
pub struct Signals {
    /// Readable once somebody wants the server to stop.
    pub stop: OwnedFd,
    /// Readable once somebody wants another engine process.
    pub hand_over: OwnedFd,
}

/// An engine process.
struct Process {
    child: Child,
    /// Readable once it has ended.
    pidfd: OwnedFd,
    channel: Channel,
}

impl Process {
    fn start(mut command: Command) -> Result<Self, ServeError> {
        let system = |what| move |errno| ServeError::System { what, errno };
        let (channel, theirs) = Channel::pair().map_err(system("make a socket pair"))?;
        channel.bound(Duration::from_secs(10)).map_err(system("bound a socket"))?;
        command.stdin(Stdio::from(theirs));
        let spawn = |error: std::io::Error| ServeError::Engine { what: "start", error };
        let mut child = command.spawn().map_err(spawn)?;
        match rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { child, pidfd, channel }),
            Err(errno) => {
                // Nobody would know of it: it must not live on beside the next one.
                kill(&mut child);
                let _ = child.wait();
                Err(system("pidfd_open")(errno))
            }
        }
    }

    /// Kills it. It is waited for behind: to let go of a big pool takes long.
    fn end(self) {
        // By its descriptor: a number may be another's by now.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        bury(self.child);
    }
}

/// The next engine process, which prepares itself while this one serves.
struct Standby {
    process: Process,
    ready: bool,
    /// It takes the pool over, so it need not wait for the end of the one that serves.
    takes_pool: bool,
    since: Instant,
    /// Sizes that it was given.
    sizes: Sizes,
}

impl Standby {
    /// What has become of it; why not, if nothing will.
    fn looked_at(mut self, now: Instant) -> Result<Self, Option<String>> {
        let said = self.process.channel.receive::<ToKeeper>(false);
        let why = if let Ok((ToKeeper::Unable { why }, _)) = &said { Some(why.clone()) } else { None };
        if let Ok((ToKeeper::Ready { takes_pool }, _)) = said {
            (self.ready, self.takes_pool) = (true, takes_pool);
        }
        let talks = matches!(said, Ok(_) | Err(ChannelError::TimedOut));
        if self.ready || why.is_none() && talks && now - self.since < START_PATIENCE {
            return Ok(self);
        }
        let words = why.as_deref().unwrap_or("the program does not start");
        tracing::error!("no other engine process: {words}; the one that serves goes on");
        self.process.end();
        Err(why)
    }
}

/// How an engine process ended.
struct End {
    /// None: it could not even be started, or watched.
    status: Option<ExitStatus>,
    served: bool,
    leaving: Option<ToKeeper>,
    /// It has handed over, and is yet to end.
    lives: bool,
}

impl Keeper {
    /// Takes the socket: nobody can connect before the engine process serves.
    ///
    /// # Errors
    /// Another server, or a path.
    pub fn new(config: Config, signals: &Signals) -> Result<Self, ServeError> {
        let path = config.socket.clone();
        let name = path.display().to_string();
        let socket_error = |what| {
            let path = name.clone();
            move |error| ServeError::Socket { what, path, error }
        };
        let lock_path = beside_socket(&path, "lock");
        let mut lock = lock_socket(&path, &lock_path, signals)?;
        let _ = lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| writeln!(lock, "{}", std::process::id()));
        remove_stale_socket(&path)?;
        let bound = bind(&path, &config.allowed_groups);
        let listener = bound.map_err(|errno| socket_error("cannot listen on")(errno.into()))?;
        let (epoch, epoch_fd) =
            EpochWriter::create().map_err(|errno| ServeError::System { what: "make the epoch", errno })?;
        Ok(Self {
            config,
            lock,
            listener,
            epoch,
            epoch_fd,
            number: 0,
            crashes: 0,
            recent: VecDeque::new(),
            recent_of_pool: VecDeque::new(),
            unserved: 0,
            fell_back: false,
            socket_id: id_of(&path),
            kept: None,
            stats: VecDeque::new(),
            reapers: VecDeque::new(),
            frees: false,
            wanted: false,
            wanted_sizes: None,
            sizes: Sizes::default(),
            given: Sizes::default(),
        })
    }

    /// Keeps an engine process running until one is told to stop. `engine` makes the command that starts
    /// one, from the program file as it is then; should that not start, this very program is taken.
    ///
    /// # Errors
    /// The first engine process did not start; it has said why.
    pub fn run(mut self, signals: &Signals, engine: impl Fn(bool) -> Command) -> Result<(), ServeError> {
        // Whoever loses his parent below this process is its child: reapers.
        let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
        let mut ever_served = false;
        let mut own_program = false;
        let mut standby: Option<Standby> = None;
        let ended = loop {
            // The last engine process is dead: what it granted ends before the next one can grant anything.
            self.number += 1;
            self.epoch.advance(self.number);
            let (prepared, given) = standby.take().map(|standby| (standby.process, standby.sizes)).unzip();
            // One that does not serve with others is followed by one with those that were served with.
            self.given = given.unwrap_or(self.sizes);
            // Whoever was made ready for others is gone, and they have to be asked for again.
            if self.wanted_sizes.take().is_some() {
                self.wanted = false;
            }
            self.fell_back = own_program && prepared.is_none();
            // One that is started now is of the program file as it is now, unless it is this very program.
            self.wanted &= prepared.is_some() || own_program;
            let process = prepared.map_or_else(|| Process::start(engine(own_program)), Ok);
            let end = match process.and_then(|process| self.run_one(signals, process, &engine, &mut standby)) {
                Ok(end) => end,
                Err(error) if !ever_served => break Err(error),
                Err(error) => {
                    // What is kept is worth more than any one try.
                    tracing::error!("{error}");
                    End { status: None, served: false, leaving: None, lives: false }
                }
            };
            ever_served |= end.served;
            if end.served {
                self.unserved = 0;
            }
            match end.leaving {
                Some(ToKeeper::Leaving { hand_over: false }) => break Ok(()),
                Some(_) => {
                    tracing::info!("the engine process has handed over");
                    own_program = false;
                    continue;
                }
                None if !ever_served => {
                    let status = end.status.map_or_else(|| "no status".to_owned(), |status| status.to_string());
                    break Err(ServeError::NotStarted { status });
                }
                None => {}
            }
            // An upgrade to a program that does not start goes back to the one that runs.
            // Neither is tried for ever: what mends the other may be installed meanwhile.
            own_program = !end.served && !own_program;
            self.crashed(&end);
            if let Some(unready) = standby.take_if(|standby| !standby.ready) {
                // It may take seconds yet, or for ever: nobody waits for that. What this process runs is known to start;
                // the upgrade is tried again once that serves. Once: whatever kills those that serve may be mended by it.
                if !self.fell_back && unready.sizes == self.sizes {
                    (own_program, self.wanted) = (true, true);
                }
                unready.process.end();
            }
            if !self.wait_a_little(signals) {
                break Ok(());
            }
        };
        if let Some(standby) = standby {
            standby.process.end();
        }
        remove_socket(&self.config.socket, self.socket_id);
        ended
    }

    /// The oldest reaper has ended.
    fn bury_reaper(&mut self) {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        // One that ended before its parent is that one's to wait for.
        if let Some(reaper) = self.reapers.pop_front() {
            let _ = waitid(WaitId::PidFd(reaper.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        }
    }

    /// Counts a crash; after too many the pool is given up. One that says that it cannot start does not die of
    /// the pool.
    fn crashed(&mut self, end: &End) {
        let status = end.status.map_or_else(|| "it could not be started".to_owned(), |status| status.to_string());
        self.unserved += u32::from(!end.served);
        let died = end.status.is_some_and(|status| status.code().is_none_or(|code| DEATHS.contains(&code)));
        if !end.served && !died {
            tracing::error!("the engine process has not started ({status}): another try follows");
            return;
        }
        #[expect(clippy::disallowed_methods, reason = "the keeper is not simulated")]
        let now = Instant::now();
        self.crashes += 1;
        for deaths in [&mut self.recent, &mut self.recent_of_pool] {
            deaths.push_back(now);
            while deaths.front().is_some_and(|at| now - *at > self.config.crash_window) {
                deaths.pop_front();
            }
        }
        if self.kept.is_none() {
            // Not of the next pool, if it comes to one.
            self.recent_of_pool.clear();
        }
        if self.recent_of_pool.len() as u32 >= self.config.crash_limit {
            tracing::error!(
                "the engine process died ({status}): {} times in {} s: the pool starts empty",
                self.recent_of_pool.len(),
                self.config.crash_window.as_secs()
            );
            self.let_go();
        } else {
            tracing::error!("the engine process died ({status}): another one takes over");
        }
    }

    /// The pool is given up, and whoever has it mapped is told.
    fn let_go(&mut self) {
        self.epoch.give_up_pool();
        self.frees = true;
        self.recent_of_pool.clear();
        // To free a big pool takes long, and may be this process' part.
        let kept = self.kept.take();
        let _ = std::thread::Builder::new().name("kvring-free".into()).spawn(move || drop(kept));
    }

    /// The first crash costs no wait; those that follow at once, more and more. False: told to stop.
    fn wait_a_little(&self, signals: &Signals) -> bool {
        let often = (self.recent.len() as u32).saturating_sub(self.config.crash_limit);
        let wait = match often.max(self.unserved) {
            0 => Duration::ZERO,
            n => (Duration::from_millis(50) * 2u32.saturating_pow(n)).min(BACKOFF_MAX),
        };
        let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        loop {
            let mut fds = [PollFd::new(&signals.stop, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                // A signal: whether it was this one is seen now.
                Err(rustix::io::Errno::INTR) => {}
                told => return !matches!(told, Ok(1..)),
            }
        }
    }

    fn run_one(
        &mut self,
        signals: &Signals,
        mut process: Process,
        engine: &impl Fn(bool) -> Command,
        standby: &mut Option<Standby>,
    ) -> Result<End, ServeError> {
        let watched = self.watch(&mut process, signals, engine, standby);
        match &watched {
            Ok(end) if !end.lives => {}
            // It has nothing left to do but to let go of its memory.
            Ok(_) => bury(process.child),
            // Nobody would know of it: it must not live on beside the next one.
            Err(_) => process.end(),
        }
        watched
    }

    fn watch(
        &mut self,
        process: &mut Process,
        signals: &Signals,
        engine: &impl Fn(bool) -> Command,
        standby: &mut Option<Standby>,
    ) -> Result<End, ServeError> {
        let Process { child, pidfd, channel } = process;
        let begin = ToEngine::Begin {
            epoch: self.number,
            crashes: self.crashes,
            keeps_pool: self.kept.is_some(),
            fell_back: self.fell_back,
            socket_id: self.socket_id,
            prepares_upgrades: true,
            sizes: Some(self.given),
            frees: self.frees,
        };
        let mut fds: Vec<BorrowedFd<'_>> = vec![self.listener.as_fd(), self.lock.as_fd(), self.epoch_fd.as_fd()];
        fds.extend(self.kept.iter().flatten().map(AsFd::as_fd));
        // One that is dead already is found so below.
        let _ = channel.send(&begin, &fds);
        let (mut served, mut leaving) = (false, None);
        let mut stop_by: Option<Instant> = None;
        // What a signal has asked of it.
        let mut asked: Option<ToKeeper> = None;
        let mut channel_open = true;
        #[expect(clippy::disallowed_methods, reason = "the keeper is not simulated")]
        let started = Instant::now();
        loop {
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            // What is not listened to any more gives its place to the process, which is looked at anyway.
            let dead = pidfd.as_fd();
            let stop = if stop_by.is_none() { signals.stop.as_fd() } else { dead };
            let hand_over = if stop_by.is_none() { signals.hand_over.as_fd() } else { dead };
            let said = if channel_open { channel.as_fd() } else { dead };
            let waits = standby.as_ref().filter(|standby| !standby.ready).map(|standby| &standby.process);
            let next_dead = waits.map_or(dead, |next| next.pidfd.as_fd());
            let next_said = waits.map_or(dead, |next| next.channel.as_fd());
            let reaper = self.reapers.front().map_or(dead, AsFd::as_fd);
            let mut fds = [&dead, &stop, &hand_over, &said, &next_dead, &next_said, &reaper]
                .map(|fd| PollFd::new(fd, PollFlags::IN));
            let timeout = (stop_by.is_some() || !served || waits.is_some()).then_some(&second);
            let _ = poll(&mut fds, timeout);
            let is_ready = |at: usize| !fds[at].revents().is_empty();
            let (died, stop, hand_over, said) = (is_ready(0), is_ready(1), is_ready(2), is_ready(3));
            if is_ready(6) && !died {
                self.bury_reaper();
            }
            #[expect(clippy::disallowed_methods, reason = "the keeper is not simulated")]
            let now = Instant::now();
            if said && channel_open {
                channel_open = self.hear(channel, &mut served, &mut leaving);
                if leaving.is_some() && stop_by.is_none() {
                    // It goes by itself; but not for ever.
                    stop_by = Some(now + STOP_PATIENCE);
                }
            }
            if died {
                // What it said last is still there to be heard.
                while channel_open && self.hear(channel, &mut served, &mut leaving) {}
                let status = child.wait().map_err(|error| ServeError::Engine { what: "wait for", error })?;
                return Ok(End { status: Some(status), served, leaving: decided(asked, leaving), lives: false });
            }
            // Its own word that it has, not ours that it shall.
            let is_awaited = standby.as_ref().is_some_and(|standby| !standby.takes_pool);
            if leaving == HANDS_OVER && asked != STOPS && !is_awaited {
                return Ok(End { status: None, served, leaving, lives: true });
            }
            if !served && stop_by.is_none() && now - started > START_PATIENCE {
                kill(child);
                tracing::error!("the engine process does not serve after {} s: it is killed", START_PATIENCE.as_secs());
            }
            if hand_over && stop_by.is_none() {
                let _ = rustix::io::read(&signals.hand_over, &mut [0; 16]);
                self.wanted = true;
            }
            if stop && stop_by.is_none() {
                stop_by = Some(now + STOP_PATIENCE);
                asked = STOPS;
                let _ = channel.send(&ToEngine::Stop, &[]);
            }
            if let Some(waiting) = standby.take_if(|standby| !standby.ready) {
                let mut why = None;
                *standby = waiting.looked_at(now).map_err(|told| why = told).ok();
                // Who has said that it stops is not made to hand over.
                match standby {
                    _ if stop_by.is_some() => {}
                    Some(standby) if standby.ready => {
                        stop_by = Some(now + STOP_PATIENCE);
                        asked = HANDS_OVER;
                        let hand_over = ToEngine::HandOver { is_awaited: !standby.takes_pool };
                        let _ = channel.send(&hand_over, &[]);
                    }
                    Some(_) => {}
                    None => drop(channel.send(&ToEngine::NotUpgraded { why }, &[])),
                }
            }
            if self.wanted && served && stop_by.is_none() && standby.is_none() {
                *standby = self.prepare(engine, now);
                if standby.is_none() {
                    let _ = channel.send(&ToEngine::NotUpgraded { why: None }, &[]);
                }
            }
            if stop_by.is_some_and(|by| now > by) {
                kill(child);
                tracing::warn!("the engine process has not stopped in {} s: it is killed", STOP_PATIENCE.as_secs());
                stop_by = Some(now + STOP_PATIENCE);
            }
        }
    }

    /// Starts the next engine process, which does not serve before its turn comes.
    fn prepare(&mut self, engine: &impl Fn(bool) -> Command, now: Instant) -> Option<Standby> {
        self.wanted = false;
        let process = Process::start(engine(false));
        let sizes = self.wanted_sizes.take().unwrap_or_default().or(self.sizes);
        let process = process.inspect_err(|error| tracing::error!("no upgrade: {error}")).ok()?;
        let fds: Vec<BorrowedFd<'_>> = self.kept.iter().flatten().map(AsFd::as_fd).collect();
        let _ = process.channel.send(&ToEngine::Prepare { keeps_pool: self.kept.is_some(), sizes }, &fds);
        Some(Standby { process, ready: false, takes_pool: false, since: now, sizes })
    }

    /// Hears one message. False: no more will come.
    fn hear(&mut self, channel: &Channel, served: &mut bool, leaving: &mut Option<ToKeeper>) -> bool {
        match channel.receive::<ToKeeper>(false) {
            Ok((ToKeeper::Keep, fds)) => match <[OwnedFd; 2]>::try_from(fds) {
                Ok(fds) => self.kept = Some(fds),
                Err(_) => tracing::error!("the pool came without its descriptors: the last one is kept"),
            },
            Ok((ToKeeper::LetGo, _)) => self.let_go(),
            Ok((ToKeeper::Reaper, fds)) => self.reapers.extend(fds),
            Ok((ToKeeper::KeepStats, fds)) => {
                self.stats.extend(fds);
                self.stats.drain(..self.stats.len().saturating_sub(STATS_KEPT));
            }
            Ok((ToKeeper::Serving, _)) => {
                *served = true;
                self.frees = false;
                self.sizes = self.given;
            }
            Ok((ToKeeper::Upgrade, _)) => self.wanted = true,
            Ok((ToKeeper::Resize(sizes), _)) => {
                self.wanted = true;
                self.wanted_sizes = Some(sizes);
            }
            Ok((ToKeeper::Ready { .. } | ToKeeper::Unable { .. }, _)) => {}
            Ok((said @ ToKeeper::Leaving { .. }, _)) => *leaving = Some(said),
            // Of another version: the rest is understood.
            Err(ChannelError::Malformed(_)) => {}
            Err(_) => return false,
        }
        true
    }
}

const STOPS: Option<ToKeeper> = Some(ToKeeper::Leaving { hand_over: false });
const HANDS_OVER: Option<ToKeeper> = Some(ToKeeper::Leaving { hand_over: true });

/// Why an engine process has ended: a stop that was asked for is one, whatever it was about itself.
fn decided(asked: Option<ToKeeper>, leaving: Option<ToKeeper>) -> Option<ToKeeper> {
    if asked == STOPS { asked } else { leaving.or(asked) }
}

/// Waits for the end of a process that has nothing left to do, behind.
fn bury(mut child: Child) {
    let wait = move || {
        for _ in 0..STOP_PATIENCE.as_secs() * 10 {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            #[expect(clippy::disallowed_methods, reason = "a thread of its own")]
            std::thread::sleep(Duration::from_millis(100));
        }
        kill(&mut child);
        let _ = child.wait();
    };
    // Without a thread it is a zombie until this process ends: harmless.
    let _ = std::thread::Builder::new().name("kvring-bury".into()).spawn(wait);
}

fn kill(child: &mut Child) {
    let _ = rustix::process::kill_process(Pid::from_child(child), Signal::KILL);
}

/// Which file this is.
fn id_of(path: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).map_or((0, 0), |file| (file.dev(), file.ino()))
}

/// Removes the socket, unless what lies there is somebody else's by now.
pub fn remove_socket(path: &Path, id: (u64, u64)) {
    if id_of(path) == id {
        let _ = std::fs::remove_file(path);
    }
}

/// The lock beside the socket. A server that was killed holds it until the kernel has unpinned and given back its memory,
/// which takes seconds for a large pool: that is waited for.
#[expect(clippy::disallowed_methods, reason = "the keeper is not simulated")]
fn lock_socket(path: &Path, lock_path: &Path, signals: &Signals) -> Result<File, ServeError> {
    let deadline = Instant::now() + DEATH_MAX;
    let mut is_told = false;
    loop {
        let lock = try_lock(lock_path).map_err(|error| ServeError::Socket {
            what: "cannot lock",
            path: path.display().to_string(),
            error,
        })?;
        if let Some(lock) = lock {
            return Ok(lock);
        }
        let pid = std::fs::read_to_string(lock_path).unwrap_or_default();
        // Its keeper may have died alone; then its engine process answers.
        let lives = || !is_dead(pid.trim()) || ask(path, &Request::Stats, Duration::from_secs(1)).is_ok();
        if Instant::now() >= deadline || lives() {
            return Err(ServeError::AlreadyServed { socket: path.display().to_string(), pid: pid.trim().to_owned() });
        }
        if !std::mem::replace(&mut is_told, true) {
            tracing::info!("waiting up to {} s for the server before (pid {}) to end", DEATH_MAX.as_secs(), pid.trim());
        }
        let mut told = [PollFd::new(&signals.stop, PollFlags::IN)];
        let pause = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        if poll(&mut told, Some(&pause)).is_ok_and(|count| count > 0) {
            return Err(ServeError::Stopped);
        }
    }
}

/// Whether a process has ended, be it that nobody has asked how yet.
fn is_dead(pid: &str) -> bool {
    if pid.parse::<u32>().is_err() {
        return false;
    }
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X'])),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// A socket file whose server is gone: we hold the lock, so nobody serves it.
fn remove_stale_socket(path: &PathBuf) -> Result<(), ServeError> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            tracing::info!("removing the socket file that a dead server left at {}", path.display());
            std::fs::remove_file(path).map_err(|error| ServeError::Socket {
                what: "cannot remove the stale",
                path: path.display().to_string(),
                error,
            })
        }
        Ok(_) => Err(ServeError::NoSocket { path: path.display().to_string() }),
        Err(_) => Ok(()),
    }
}
