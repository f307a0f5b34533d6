//! The pool of a dead engine process is unmapped by a process that nobody waits for, and that nobody is left with.

use super::*;
use rustix::process::Signal;

const NO_SSD: (&str, &str) = ("ssd_cache_gb", "0");

/// Reapers: their id, their parent's, and whether they have ended and nobody has asked how.
fn reapers() -> Vec<(u32, u32, bool)> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let reaper = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let (name, rest) = stat.rsplit_once(") ")?;
        let mut rest = rest.split(' ');
        let (state, parent) = (rest.next()?, rest.next()?.parse().ok()?);
        name.ends_with("(kvring-reaper").then_some((pid, parent, state == "Z"))
    };
    all.filter_map(reaper).collect()
}

fn reaper_of(parent: u32) -> Option<u32> {
    reapers().into_iter().find(|(_, its, _)| *its == parent).map(|(pid, ..)| pid)
}

fn maps(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default()
}

/// A server with a chain in its pool, and its reaper.
fn served(place: &mut Place, keys: &[BlockKey]) -> (DirectAgent<HostMemory>, u32) {
    // With an SSD tier whoever takes over waits for the dead one's rings, and this one is to unmap nothing.
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0"]);
    let mut agent = place.agent(0, &[NO_SSD]);
    store(&mut agent, keys);
    let reaper = reaper_of(place.server_pid()).expect("a reaper");
    (agent, reaper)
}

#[test]
fn a_death_is_told_before_the_pool_is_unmapped() {
    let mut place = Place::new();
    let keys = chain("a", 20);
    let (mut agent, reaper) = served(&mut place, &keys);
    let open = std::fs::read_dir(format!("/proc/{reaper}/fd")).unwrap().count();
    assert_eq!(open, 2, "it holds nothing that somebody waits for but the lock");
    // It cannot unmap anything, and nobody minds.
    halt(reaper);
    signal(place.server_pid(), Signal::KILL);
    eventually("the same blocks are served again", || load(&mut agent, &keys) == 20);
    assert!(maps(reaper).contains("memfd:kvring-pool"), "and the dead one's pool is mapped yet");
    signal(reaper, Signal::CONT);
    eventually("now it is not", || maps(reaper).is_empty());
    // An upgrade leaves by the same door.
    let reaper = reaper_of(place.server_pid()).expect("another one");
    assert!(place.kvring(&["upgrade"]).output().unwrap().status.success());
    assert_eq!(load(&mut agent, &keys), 20);
    eventually("nor that one's", || maps(reaper).is_empty());
    // Whoever stops a server has its memory back.
    let reaper = reaper_of(place.server_pid()).expect("a third one");
    assert!(place.kvring(&["stop"]).output().unwrap().status.success());
    assert_eq!(maps(reaper), "");
}

#[test]
fn what_ends_with_the_memory_has_no_reaper() {
    for (io_engine, has) in [("uring", true), ("aio", false)] {
        let mut place = Place::new();
        place.serve(&["--block-kib", "64", "--io-engine", io_engine]);
        assert_eq!(reaper_of(place.server_pid()).is_some(), has, "{io_engine}");
        let keys = chain("a", 20);
        let mut agent = place.agent(0, &[]);
        store(&mut agent, &keys);
        signal(place.server_pid(), Signal::KILL);
        eventually("the same blocks are served again", || load(&mut agent, &keys) == 20);
    }
}

#[test]
fn whoever_starts_anew_waits_for_the_memory() {
    let mut place = Place::new();
    let (_agent, reaper) = served(&mut place, &chain("a", 20));
    halt(reaper);
    place.kill_all();
    let serve = place.kvring(&["serve", "--block-kib", "64"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    place.children.push(serve.unwrap());
    std::thread::sleep(Duration::from_millis(300));
    assert!(place.stats().is_none(), "the next server waits for the lock");
    signal(reaper, Signal::CONT);
    place.wait_for_server();
    assert_eq!(maps(reaper), "");
}

#[test]
fn nobody_needs_a_reaper() {
    let mut place = Place::new();
    let keys = chain("a", 20);
    let (mut agent, reaper) = served(&mut place, &keys);
    signal(reaper, Signal::KILL);
    eventually("it is dead", || maps(reaper).is_empty());
    assert_eq!(load(&mut agent, &keys), 20);
    signal(place.server_pid(), Signal::KILL);
    eventually("the same blocks are served again", || load(&mut agent, &keys) == 20);
}

/// In a container the keeper is init: whoever has no parent any more is its child, and a zombie unless it is asked.
#[test]
fn a_container_is_not_filled_with_zombies() {
    let place = Place::new();
    let arguments = ["--pid", "--fork", "--mount-proc", "--kill-child", KVRING, "serve", "--block-kib", "64"];
    let mut command = Command::new("unshare");
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    for (name, value) in place
        .settings()
        .into_iter()
        .chain([NO_SSD, ("crash_limit", "100")].map(|(name, value)| (name, value.to_owned())))
    {
        command.env(format!("KVRING_{}", name.to_ascii_uppercase()), value);
    }
    let Ok(mut container) = command.spawn() else { return println!("skipped: no unshare here") };
    let parent_of = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<u32>().ok()).unwrap_or(0)
    };
    // Container, keeper, engine process, reaper.
    let engine = |container: &Child| {
        let ours = |parent: &u32| parent_of(parent_of(*parent)) == container.id();
        reapers().into_iter().map(|(_, parent, _)| parent).find(ours)
    };
    let mut keeper = 0;
    for _ in 0..6 {
        let mut next = None;
        eventually("an engine process has its reaper", || {
            next = engine(&container);
            next.is_some() || container.try_wait().unwrap().is_some()
        });
        let Some(next) = next else { return println!("skipped: nobody may have a PID namespace here") };
        keeper = parent_of(next);
        signal(next, Signal::KILL);
        eventually("it is dead", || engine(&container) != Some(next));
    }
    let zombies = || reapers().into_iter().filter(|(_, parent, ended)| *ended && *parent == keeper).count();
    eventually("all were asked for their end", || zombies() == 0);
    container.kill().unwrap();
    container.wait().unwrap();
    eventually("nobody is left", || processes_of(place.dir.path()).is_empty());
}
