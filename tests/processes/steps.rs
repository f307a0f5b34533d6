//! The processes of a server are killed before each of their system calls: whatever another process can see of them,
//! they leave it in every state that they can leave it in. A few of the calls, drawn from a printed seed;
//! `KVTEST_STEPS=all` for every one of them, `KVTEST_STEPS=20` for as many of each process in each story.

use super::*;
use kvring_engine::device::sim::Chance;
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::Signal;

/// Whose system calls are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Keeper,
    /// The engine process that serves.
    Engine,
    /// The one that the keeper starts next.
    Next,
}

/// What is done meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Start,
    Upgrade,
    Grow,
    Shrink,
    Crash,
    Stop,
}

/// What the one who traces has written down.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Told {
    calls: u64,
    /// The number of the system call that the victim was killed before.
    killed_before: Option<u64>,
}

/// Somebody who traces a process, in a process of its own: its end sets free whoever is traced.
struct Tracer {
    child: Child,
    file: PathBuf,
}

impl Tracer {
    /// Counts from now on, or from when a program begins in the process. `None`: this machine lets nobody trace.
    fn begin(place: &Place, pid: u32, what: What, at: u64) -> Option<Self> {
        let file = place.path("traced");
        let _ = std::fs::remove_file(&file);
        let mut command = place.actor_command("steps::one_who_traces", 0, 0);
        command.env("KVTEST_TRACE", format!("{pid} {} {at}", what as u32));
        let tracer = Self { child: command.spawn().unwrap(), file };
        eventually("it is traced", || exists(&tracer.file));
        let is_refused = std::fs::read_to_string(&tracer.file).unwrap() == "refused";
        if is_refused {
            tracer.end();
            println!("skipped: nobody may trace another process here (Yama, or a container without SYS_PTRACE)");
            return None;
        }
        Some(tracer)
    }

    fn told(&self) -> Told {
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        let mut words = text.split_ascii_whitespace().map_while(|word| word.parse().ok());
        Told { calls: words.next().unwrap_or_default(), killed_before: words.next() }
    }

    /// Waits until no call is made any more.
    fn settled(&self) -> Told {
        let mut last = (self.told(), Instant::now());
        eventually("nothing is done any more", || {
            let told = self.told();
            if told != last.0 {
                last = (told, Instant::now());
            }
            last.1.elapsed() > Duration::from_millis(if last.0.killed_before.is_some() { 0 } else { 60 })
        });
        last.0
    }

    fn end(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is counted of a process.
#[derive(Debug, Clone, Copy)]
enum What {
    /// Its calls from now on.
    Calls = 0,
    /// Those of the program that it is about to become.
    Program = 1,
    /// Those of the next process that it starts.
    Child = 2,
}

#[test]
#[ignore = "played in a process of its own"]
fn one_who_traces() {
    let Some((dir, _, _)) = role() else { return };
    let told = std::env::var("KVTEST_TRACE").unwrap();
    let told: Vec<u64> = told.split(' ').map(|word| word.parse().unwrap()).collect();
    let [pid, what, at] = told[..] else { panic!("{told:?}") };
    let is = |other: What| what == other as u64;
    let target = Pid::from_raw(pid as i32);
    let say = |text: String| {
        // Whole or not at all: somebody reads it meanwhile.
        std::fs::write(dir.join("traced-new"), text).unwrap();
        std::fs::rename(dir.join("traced-new"), dir.join("traced")).unwrap();
    };
    use ptrace::Options;
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEEXEC;
    if ptrace::seize(target, options).and_then(|()| ptrace::interrupt(target)) == Err(Errno::EPERM) {
        return say("refused".into());
    }
    let mut victim = (!is(What::Child)).then_some(target);
    let (mut counts, mut calls) = (!is(What::Program), 0);
    loop {
        let (stopped, signal) = match waitpid(None, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceSyscall(pid)) => {
                let is_entry = ptrace::syscall_info(pid).is_ok_and(|info| info.op == ENTRY);
                if is_entry && counts && victim == Some(pid) {
                    calls += 1;
                    if calls == at {
                        let number = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
                        let number = number.split(' ').next().unwrap_or_default();
                        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
                        say(format!("{calls} {number}"));
                        continue;
                    }
                    say(calls.to_string());
                }
                (pid, None)
            }
            Ok(WaitStatus::PtraceEvent(pid, _, event)) => {
                if event == libc::PTRACE_EVENT_EXEC && victim == Some(pid) {
                    counts = true;
                }
                if !exists(&dir.join("traced")) {
                    say("0".into());
                }
                if pid != target && victim.is_none() {
                    victim = Some(pid);
                }
                (pid, None)
            }
            Ok(WaitStatus::Stopped(pid, signal)) => (pid, Some(signal)),
            Ok(_) | Err(Errno::EINTR) => continue,
            // Nobody is left.
            Err(_) => return,
        };
        let steps = victim == Some(stopped);
        let _ = if steps { ptrace::syscall(stopped, signal) } else { ptrace::cont(stopped, signal) };
    }
}

/// `PTRACE_SYSCALL_INFO_ENTRY`.
const ENTRY: u8 = 1;

const SIZES: [&str; 2] = ["0.0625", "0.09375"];
const EXTERNAL: &[(&str, &str)] = &[("server_launch_mode", "external"), ("start_wait_ms", "20000")];

/// A server, and an instance that uses it.
struct Scene {
    place: Place,
    agent: Option<DirectAgent<HostMemory>>,
    keys: Vec<BlockKey>,
    /// The longest time without the blocks, in ms.
    away_ms: f64,
}

impl Drop for Scene {
    /// What a failed story leaves to be read.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for log in ["log", "s.log"] {
            println!("{log}: {}", std::fs::read_to_string(self.place.path(log)).unwrap_or_default());
        }
        println!("{:?}", self.place.stats());
        for (pid, command) in processes_of(self.place.dir.path()) {
            println!("{pid}: {command}");
            for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
                println!("  {} {}\n{}", read("comm").trim(), read("stat").trim(), read("stack"));
            }
        }
    }
}

impl Scene {
    fn new() -> Self {
        Self { place: Place::new(), agent: None, keys: chain("a", 20), away_ms: 0.0 }
    }

    fn command(&self) -> Command {
        let log = std::fs::File::options().create(true).append(true).open(self.place.path("log")).unwrap();
        // Stopped before it begins, so that nothing of it is missed.
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "kill -STOP $$; exec \"$0\" \"$@\"", KVRING, "serve", "--block-kib", "64"]);
        command.args(["--crash-limit", "1000", "--crash-window-s", "1"]);
        for (name, value) in self.place.settings() {
            command.env(format!("KVRING_{}", name.to_ascii_uppercase()), value);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command
    }

    /// Starts a server; the tracer may kill who starts it.
    fn start(&mut self, traced: Option<(What, u64)>) -> Option<Tracer> {
        let child = self.command().spawn().unwrap();
        let pid = child.id();
        self.place.children.push(child);
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        eventually("it waits", || state().contains(") T "));
        let tracer = traced.map(|(what, at)| Tracer::begin(&self.place, pid, what, at));
        signal(pid, Signal::CONT);
        tracer.flatten()
    }

    /// A server, an instance, and blocks in both tiers.
    fn prepare(&mut self) {
        self.serve();
        let agent = self.agent.get_or_insert_with(|| self.place.agent(0, EXTERNAL));
        let keys = &self.keys;
        eventually("the blocks are there", || store(agent, keys) + load(agent, keys) >= 20);
    }

    /// A server, whoever has to start it.
    fn serve(&mut self) {
        if self.place.stats().is_none() {
            self.reap();
            self.start(None);
            self.place.wait_for_server();
        }
    }

    fn reap(&mut self) {
        for mut child in self.place.children.drain(..) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn do_it(&self, deed: Deed) -> Option<Child> {
        let arguments: &[&str] = match deed {
            Deed::Start => return None,
            Deed::Crash => {
                signal(self.place.server_pid(), Signal::KILL);
                return None;
            }
            Deed::Upgrade => &["upgrade"],
            Deed::Grow => &["resize", "--dram", SIZES[1], "--ssd", SIZES[1]],
            Deed::Shrink => &["resize", "--dram", SIZES[0], "--ssd", SIZES[0]],
            Deed::Stop => &["stop"],
        };
        Some(self.place.kvring(arguments).spawn().unwrap())
    }

    /// Whatever was asked has an answer.
    fn finished(child: Option<Child>) -> Option<Output> {
        let mut child = child?;
        eventually("it ends", || child.try_wait().unwrap().is_some());
        Some(child.wait_with_output().unwrap())
    }

    fn must(&self, deed: Deed) {
        if let Some(output) = Self::finished(self.do_it(deed)) {
            assert!(output.status.success(), "{deed:?}: {}", text(&output));
        }
    }

    /// Does it with somebody being killed, and looks at what is left.
    fn play(&mut self, deed: Deed, who: Who, at: u64) -> Option<Told> {
        if deed == Deed::Start {
            return self.play_start(who, at);
        }
        self.prepare();
        if deed == Deed::Shrink {
            self.must(Deed::Grow);
            self.prepare();
        }
        let stats = self.place.stats().expect("a server");
        let pid = |name: &str| stats[name].as_u64().unwrap() as u32;
        let (pid, what) = match who {
            Who::Keeper => (pid("keeper_pid"), What::Calls),
            Who::Engine => (pid("server_pid"), What::Calls),
            Who::Next => (pid("keeper_pid"), What::Child),
        };
        let tracer = Tracer::begin(&self.place, pid, what, at)?;
        let asked = self.do_it(deed);
        let output = Self::finished(asked);
        if deed == Deed::Crash {
            // Nobody was asked, so nobody says when it is over.
            let serves_anew = || self.place.stats().is_some_and(|now| now["epoch"] != stats["epoch"]);
            eventually("another one serves, or somebody is dead", || {
                tracer.told().killed_before.is_some() || serves_anew()
            });
        }
        let told = tracer.settled();
        tracer.end();
        println!("{deed:?} {who:?} {at}: {told:?} {}", output.as_ref().map(text).unwrap_or_default().trim());
        self.look(deed, who == Who::Keeper && told.killed_before.is_some());
        Some(told)
    }

    fn play_start(&mut self, who: Who, at: u64) -> Option<Told> {
        self.prepare();
        self.must(Deed::Stop);
        eventually("it has stopped", || self.nobody_is_left());
        self.reap();
        let what = if who == Who::Keeper { What::Program } else { What::Child };
        let tracer = self.start(Some((what, at)))?;
        eventually("it serves, or somebody is dead", || {
            tracer.told().killed_before.is_some() || self.place.stats().is_some()
        });
        let told = tracer.settled();
        tracer.end();
        println!("Start {who:?} {at}: {told:?}");
        if told.killed_before.is_some() && who != Who::Keeper {
            // It was the first: if it had not served yet, the start has failed. Else another one follows it.
            eventually("nobody is left, or somebody serves", || self.nobody_is_left() || self.place.stats().is_some());
        } else {
            self.look(Deed::Start, who == Who::Keeper && told.killed_before.is_some());
        }
        self.serve();
        // Before anybody stores it again.
        eventually("what was on the SSD is there", || self.place.metric("ssd_recovered_blocks_count") >= 20);
        Some(told)
    }

    fn nobody_is_left(&self) -> bool {
        processes_of(self.place.dir.path()).is_empty()
    }

    /// What must be so, whoever was killed while this was done.
    fn look(&mut self, deed: Deed, keeper_dies: bool) {
        let keeper = self.place.children.last_mut().unwrap();
        if keeper_dies {
            keeper.wait().unwrap();
        }
        let keeper_lives = keeper.try_wait().unwrap().is_none();
        let begun = Instant::now();
        let Some(agent) = &mut self.agent else { return };
        if keeper_lives && deed != Deed::Stop {
            eventually("all blocks are served again", || load(agent, &self.keys) == 20);
            self.away_ms = self.away_ms.max(begun.elapsed().as_secs_f64() * 1e3);
            self.look_for_leaks();
            // Whatever was begun: it can be done now.
            return self.must(deed);
        }
        let mut serves = false;
        eventually("somebody serves, or nobody is left", || {
            serves = self.place.stats().is_some() && load(agent, &self.keys) == 20;
            serves || processes_of(self.place.dir.path()).is_empty()
        });
        if serves {
            self.look_for_leaks();
            self.must(Deed::Stop);
        }
        eventually("nobody is left", || self.nobody_is_left());
        self.reap();
    }

    fn look_for_leaks(&mut self) {
        let mut seen = serde_json::Value::Null;
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            // An instance that asks for nothing looks for no server.
            if let Some(agent) = &mut self.agent {
                load(agent, &self.keys);
            }
            seen = self.place.stats().unwrap_or_default()["metrics"].clone();
            let of = |name: &str| seen[name].as_u64().unwrap_or(u64::MAX);
            let rest = of("host_slots_quarantined_count").saturating_add(of("leases_count"));
            if rest == 0
                && of("sessions_count") == 1
                && of("host_slots_filling_count") == 0
                && of("host_slots_free_count") + of("blocks_count") >= of("host_slots_count")
            {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("something leaked: {seen}");
    }
}

/// Counts first; then some of the calls, or all of them.
fn everybody_dies(deed: Deed) {
    let told = |name: &str| std::env::var(name).ok();
    let seed =
        told("KVTEST_STEPS_SEED").and_then(|text| text.parse().ok()).unwrap_or_else(kvring_ipc::client::monotonic_ns);
    let steps = told("KVTEST_STEPS").unwrap_or_else(|| "3".into());
    println!("KVTEST_STEPS_SEED={seed} KVTEST_STEPS={steps}");
    let mut chance = Chance::new(seed);
    let mut scene = Scene::new();
    let mut all_killed = 0;
    for who in [Who::Keeper, Who::Engine, Who::Next] {
        if matches!((deed, who), (Deed::Crash | Deed::Start, Who::Engine) | (Deed::Stop, Who::Next)) {
            continue;
        }
        let Some(Told { calls, .. }) = scene.play(deed, who, u64::MAX) else { return };
        assert!(calls > 3, "{deed:?} {who:?}: {calls} calls");
        let all = steps == "all";
        let mut some = || -> Vec<u64> { (0..steps.parse().unwrap()).map(|_| 1 + chance.below(calls)).collect() };
        let at = if all { (1..=calls).collect() } else { some() };
        let mut killed = 0;
        for at in at {
            killed += u64::from(scene.play(deed, who, at).is_some_and(|told| told.killed_before.is_some()));
        }
        println!("{deed:?}: the {who:?} makes {calls} calls; killed before {killed} of them");
        all_killed += killed;
    }
    println!("{deed:?}: at most {:.0} ms without the blocks", scene.away_ms);
    assert!(all_killed > 0, "nobody was killed: nothing was shown");
    scene.agent = None;
}

#[test]
fn a_start_survives_a_death_before_any_system_call() {
    everybody_dies(Deed::Start);
}

#[test]
fn an_upgrade_survives_a_death_before_any_system_call() {
    everybody_dies(Deed::Upgrade);
}

#[test]
fn growing_survives_a_death_before_any_system_call() {
    everybody_dies(Deed::Grow);
}

#[test]
fn shrinking_survives_a_death_before_any_system_call() {
    everybody_dies(Deed::Shrink);
}

#[test]
fn a_crash_survives_a_death_before_any_system_call() {
    everybody_dies(Deed::Crash);
}

#[test]
fn a_stop_survives_a_death_before_any_system_call() {
    everybody_dies(Deed::Stop);
}
