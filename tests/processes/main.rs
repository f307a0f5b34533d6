//! Real processes, real sockets, real files, real signals: the program as its users meet it.

mod admin;
mod bad_input;
mod bench;
mod chaos;
mod cuda;
mod device;
mod doctor;
mod golden;
mod integrity;
mod lifecycle;
mod observe;
mod reaper;
mod replay;
mod resize;
mod security;
mod spdk;
mod steps;
mod survival;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kvring_gpu::backend::host::HostMemory;
use kvring_gpu::direct::DirectAgent;
use kvring_ipc::config::Config;
use kvring_ipc::handshake::{Reply, Request, ask};
use kvring_ipc::instance::Instance;
use kvring_ipc::key::{BlockKey, Namespace};
use kvring_ipc::layout::Layout;
use kvring_tests::bytes;

const KVRING: &str = env!("CARGO_BIN_EXE_kvring");
const BLOCK: usize = 64 << 10;

/// A place of its own for one test: a socket, a directory for the SSD tier, and nobody left behind.
struct Place {
    dir: tempfile::TempDir,
    children: Vec<Child>,
}

impl Place {
    fn new() -> Self {
        // On a real file system: /tmp may be a tmpfs, which has no O_DIRECT everywhere.
        let dir = tempfile::Builder::new().prefix("p").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { dir, children: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("s")
    }

    /// `kvring` with this place's settings and nothing of ours in its environment.
    fn kvring(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(KVRING);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, value) in self.settings() {
            command.env(format!("KVRING_{}", name.to_ascii_uppercase()), value);
        }
        command
    }

    fn settings(&self) -> Vec<(&'static str, String)> {
        settings_in(self.dir.path())
    }

    fn config(&self, instance_id: u32, more: &[(&str, &str)]) -> Config {
        config_in(self.dir.path(), instance_id, more)
    }

    fn serve(&mut self, arguments: &[&str]) -> u32 {
        let child =
            self.kvring(&["serve"]).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        self.children.push(child);
        self.wait_for_server();
        self.server_pid()
    }

    /// The server and its keeper die at one instant: nothing is left but what is on the SSD.
    fn kill_all(&self) {
        let stats = self.stats().expect("a server");
        for who in ["keeper_pid", "server_pid"] {
            signal(stats[who].as_u64().unwrap() as u32, rustix::process::Signal::KILL);
        }
    }

    fn stats(&self) -> Option<serde_json::Value> {
        match ask(&self.socket(), &Request::Stats, Duration::from_secs(5)) {
            Ok(Reply::Stats(stats)) => Some(stats),
            _ => None,
        }
    }

    fn metric(&self, name: &str) -> u64 {
        self.stats().expect("a server")["metrics"][name].as_u64().expect("a counter")
    }

    fn server_pid(&self) -> u32 {
        self.stats().expect("a server")["server_pid"].as_u64().unwrap() as u32
    }

    fn wait_for_server(&self) {
        eventually("a server answers", || self.stats().is_some());
    }

    /// This very program, as an instance in a process of its own: `role` is an ignored test that plays it.
    fn actor(&self, role: &str, instance_id: u32, seed: u64) -> Child {
        self.actor_command(role, instance_id, seed).spawn().unwrap()
    }

    fn actor_command(&self, role: &str, instance_id: u32, seed: u64) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([role, "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        command.env("KVTEST_DIR", self.dir.path()).env("KVTEST_SEED", seed.to_string());
        command.env("KVTEST_INSTANCE", instance_id.to_string()).stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(Stdio::null());
        command
    }

    /// An instance that is filling ten slots, and never commits.
    fn holder(&self, instance_id: u32) -> Child {
        self.actor("survival::a_holder", instance_id, 0)
    }

    fn agent(&self, instance_id: u32, more: &[(&str, &str)]) -> DirectAgent<HostMemory> {
        let instance = Instance::open(self.config(instance_id, more), layout(), 0).unwrap();
        DirectAgent::new(instance, HostMemory::new(64, BLOCK))
    }
}

/// What every process of a place is told.
fn settings_in(dir: &Path) -> Vec<(&'static str, String)> {
    vec![
        ("server_recv_port", dir.join("s").display().to_string()),
        ("ssd_cache_dir", dir.join("ssd").display().to_string()),
        ("cpu_cache_gb", "0.0625".into()),
        ("ssd_cache_gb", "0.0625".into()),
        ("instance_num", "8".into()),
        ("server_bin", KVRING.into()),
        ("writer_grace_ms", "100".into()),
    ]
}

fn config_in(dir: &Path, instance_id: u32, more: &[(&str, &str)]) -> Config {
    let mut config = Config::default();
    for (name, value) in settings_in(dir) {
        config.say(name, &value).unwrap();
    }
    config.say("instance_id", &instance_id.to_string()).unwrap();
    // A busy test machine is no reason to miss.
    config.say("client_wait_ms", "2000").unwrap();
    for (name, value) in more {
        config.say(name, value).unwrap();
    }
    config
}

/// Processes that have this text in their command line or environment, and are not this one.
fn processes_of(dir: &Path) -> Vec<(u32, String)> {
    let text = dir.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
        let words = [read("cmdline"), read("environ")].concat();
        if pid != std::process::id() && String::from_utf8_lossy(&words).contains(&text) {
            found.push((pid, String::from_utf8_lossy(&read("cmdline")).replace('\0', " ")));
        }
    }
    found
}

/// What an actor was told: its place, its number and its seed. None: nobody plays it.
fn role() -> Option<(PathBuf, u32, u64)> {
    let told = |name: &str| std::env::var(name).ok();
    // An actor does not outlive the story.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    Some((told("KVTEST_DIR")?.into(), told("KVTEST_INSTANCE")?.parse().ok()?, told("KVTEST_SEED")?.parse().ok()?))
}

impl Drop for Place {
    fn drop(&mut self) {
        if ask(&self.socket(), &Request::Stop, Duration::from_secs(5)).is_err() {
            // A story that failed may have stopped its server, or killed its keeper: nobody is left behind.
            for (pid, _) in processes_of(self.dir.path()) {
                let pid = rustix::process::Pid::from_raw(pid as i32);
                let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
            }
        }
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn layout() -> Layout {
    Layout::opaque(BLOCK as u64)
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Starts a program that was just written: another test's fork may hold it open for a moment.
fn not_busy<T>(mut start: impl FnMut() -> std::io::Result<T>) -> T {
    loop {
        match start() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(5));
            }
            started => return started.unwrap(),
        }
    }
}

/// Stops a process, and waits until every thread of it has.
fn halt(pid: u32) {
    signal(pid, rustix::process::Signal::STOP);
    eventually("every thread has stopped", || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        tasks.flatten().all(|task| std::fs::read_to_string(task.path().join("stat")).unwrap().contains(") T "))
    });
}

/// Waits for something that must become true; a minute is for ever.
fn eventually(what: &str, is: impl FnMut() -> bool) {
    let mut is = is;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn chain(name: &str, blocks: u32) -> Vec<BlockKey> {
    let tokens: Vec<u32> = (0..blocks).collect();
    Namespace::default().model(name).keys(&tokens, 1)
}

/// Stores a chain whole; says how many blocks are resident because of it.
fn store(agent: &mut DirectAgent<HostMemory>, keys: &[BlockKey]) -> u32 {
    let blocks: Vec<usize> = (0..keys.len()).collect();
    let compute = |memory: &mut HostMemory, index: usize| bytes::fill(keys[index], 0, memory.block_mut(index));
    agent.store(BlockKey::default(), 0, keys, &blocks, compute).blocks_stored
}

/// Matches and loads a chain, and compares every byte. Says how many blocks came.
fn load(agent: &mut DirectAgent<HostMemory>, keys: &[BlockKey]) -> u32 {
    let Some(lease) = agent.match_prefix(keys).lease else { return 0 };
    let blocks: Vec<usize> = (0..keys.len()).collect();
    let matched = agent.match_prefix(keys);
    let count = matched.blocks as usize;
    if let Some(second) = matched.lease {
        agent.instance().release(second);
    }
    let mut came = Vec::new();
    agent.load(lease, 0, &keys[..count], &blocks[..count], Duration::from_secs(10), |_, index| came.push(index));
    for index in &came {
        assert_eq!(bytes::first_difference(keys[*index], agent.backend().block(*index)), None, "wrong bytes");
    }
    agent.instance().release(lease);
    came.len() as u32
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
