//! The engine process dies, is replaced, or will not start; the cache stays.

use super::*;
use kvring_ipc::instance::{HeldSlot, LoadStep, Reserved};
use rustix::process::Signal;

const NO_SSD: (&str, &str) = ("ssd_cache_gb", "0");
const EXTERNAL: (&str, &str) = ("server_launch_mode", "external");

fn slots(reserved: Vec<Reserved>) -> Vec<HeldSlot> {
    let slot = |reserved| match reserved {
        Reserved::Slot(slot) => slot,
        other => panic!("{other:?}"),
    };
    reserved.into_iter().map(slot).collect()
}

/// Where the pool lies in this process.
fn pool_address(agent: &mut DirectAgent<HostMemory>) -> usize {
    let session = agent.instance().session().expect("a session");
    session.pool().mapping().address(0, 1).addr()
}

#[test]
fn the_pool_survives_the_engine_process_and_stays_mapped() {
    let place = Place::new();
    let (keys, other) = (chain("a", 20), chain("b", 5));
    let mut agents = [place.agent(0, &[NO_SSD]), place.agent(1, &[NO_SSD])];
    assert_eq!(store(&mut agents[0], &keys), 20);
    let before = agents.each_mut().map(pool_address);
    for crash in 1..3 {
        let died = Instant::now();
        signal(place.server_pid(), Signal::KILL);
        for agent in &mut agents {
            eventually("the same blocks are served again", || load(agent, &keys) == 20);
        }
        println!("served again {:.0} ms after the kill", died.elapsed().as_secs_f64() * 1e3);
        let stats = place.stats().unwrap();
        assert_eq!((stats["crashes"].as_u64(), stats["epoch"].as_u64()), (Some(crash), Some(crash + 1)));
        assert_eq!(place.metric("dram_recovered_blocks_count"), 20 + 5 * (crash - 1));
        store(&mut agents[1], &other);
        assert_eq!(load(&mut agents[0], &other), 5, "and new ones are stored");
    }
    assert_eq!(agents.each_mut().map(pool_address), before, "what was registered of the pool stays valid");
}

/// The lease has not expired, and yet the slot may be another block's: the epoch says so.
#[test]
fn what_is_copied_while_the_engine_process_dies_has_not_arrived() {
    let place = Place::new();
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[NO_SSD]);
    assert_eq!(store(&mut agent, &keys), 20);
    let mut instance = Instance::open(place.config(1, &[NO_SSD]), layout(), 0).unwrap();
    eventually("a lease", || instance.match_prefix(&keys).lease.is_some());
    let lease = instance.match_prefix(&keys).lease.expect("a lease");
    let (mut copies, mut arrived) = (0, 0);
    let loaded = instance.load(lease, 0, &keys, Duration::from_secs(60), |step| match step {
        LoadStep::Copy { .. } => {
            copies += 1;
            if copies == 5 {
                signal(place.server_pid(), Signal::KILL);
                eventually("another one serves", || place.stats().is_some_and(|stats| stats["epoch"] == 2));
            }
        }
        LoadStep::Arrived { .. } => arrived += 1,
    });
    assert!(copies >= 5 && arrived == 4, "{arrived} of {copies} copies count");
    assert_eq!(loaded.blocks_missed, 16);
}

#[test]
fn slots_that_a_live_instance_was_filling_wait_for_its_word() {
    let place = Place::new();
    let keys = chain("a", 4);
    let mut instance = Instance::open(place.config(0, &[NO_SSD]), layout(), 0).unwrap();
    let held = slots(instance.reserve(BlockKey::default(), 0, &keys));
    let [first, rest @ ..] = held.as_slice() else { panic!("slots") };
    signal(place.server_pid(), Signal::KILL);
    eventually("it is attached again", || {
        instance.match_prefix(&keys);
        instance.is_connected() && instance.sessions_count() == 2
    });
    assert_eq!(place.metric("host_slots_quarantined_count"), 4, "it may be writing");
    assert_eq!(instance.commit(&[*first]), 0, "the store is dropped");
    instance.abort(&rest[..2]);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(place.metric("host_slots_quarantined_count"), 4, "it may still be writing the last one");
    instance.abort(&rest[2..]);
    eventually("its word frees them", || place.metric("host_slots_quarantined_count") == 0);
    assert_eq!(slots(instance.reserve(BlockKey::default(), 0, &keys)).len(), 4);
}

#[test]
fn slots_that_a_dead_instance_was_filling_wait_for_death_and_grace() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0", "--writer-grace-ms", "300"]);
    let mut victims: Vec<_> = (0..3).map(|id| place.holder(id)).collect();
    eventually("all hold slots", || place.metric("reserve_blocks_count") == 30);
    // One dies before the engine process, one with it, one lives on.
    victims[0].kill().unwrap();
    victims[0].wait().unwrap();
    eventually("the first is dead", || place.metric("sessions_count") == 2);
    victims[1].kill().unwrap();
    signal(place.server_pid(), Signal::KILL);
    victims[1].wait().unwrap();
    eventually("another takes over", || place.stats().is_some_and(|stats| stats["epoch"] == 2));
    eventually("two are dead, one is not", || place.metric("host_slots_quarantined_count") == 10);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(place.metric("host_slots_quarantined_count"), 10, "time alone frees no slot");
    victims[2].kill().unwrap();
    victims[2].wait().unwrap();
    eventually("nor does anything else than its death", || place.metric("host_slots_quarantined_count") == 0);
    assert_eq!(place.metric("host_slots_free_count"), place.metric("host_slots_count"));
}

#[test]
fn a_crash_loop_costs_the_pool_and_not_the_service() {
    let place = Place::new();
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[NO_SSD, ("crash_limit", "2")]);
    store(&mut agent, &keys);
    signal(place.server_pid(), Signal::KILL);
    eventually("the first crash costs nothing", || load(&mut agent, &keys) == 20);
    signal(place.server_pid(), Signal::KILL);
    eventually("after the second it serves", || place.stats().is_some_and(|stats| stats["epoch"] == 3));
    eventually("an empty pool", || store(&mut agent, &keys) == 20);
    assert_eq!(place.metric("commit_blocks_count"), 20);
    assert_eq!(load(&mut agent, &keys), 20);
    // The new pool is not what those before died of.
    signal(place.server_pid(), Signal::KILL);
    eventually("the third costs nothing", || load(&mut agent, &keys) == 20);
    assert_eq!(place.metric("commit_blocks_count"), 0, "nobody has stored it again");
    signal(place.server_pid(), Signal::KILL);
    eventually("after the fourth it serves", || place.stats().is_some_and(|stats| stats["epoch"] == 5));
    assert_eq!(load(&mut agent, &keys), 0, "an empty pool");
}

/// A server whose program is a file of its own, which an upgrade may find replaced.
fn serve_a_copy(place: &mut Place) -> PathBuf {
    let program = place.path("kvring");
    std::fs::copy(KVRING, &program).unwrap();
    let mut command = Command::new(&program);
    command.args(["serve", "--block-kib", "64"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    for (name, value) in place.settings() {
        command.env(format!("KVRING_{}", name.to_ascii_uppercase()), value);
    }
    place.children.push(not_busy(|| command.spawn()));
    place.wait_for_server();
    program
}

fn replace(program: &Path, script: &str) {
    std::fs::remove_file(program).unwrap();
    std::fs::write(program, format!("#!/bin/sh\n[ \"$1\" = probe ] && exit\n{script}\n")).unwrap();
    std::fs::set_permissions(program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    // From here on nobody has it open to write.
    not_busy(|| Command::new(program).arg("probe").status());
}

/// Processes whose command line begins so: where a script runs, with what runs it. (A fork that has not become
/// another program yet has its parent's.)
fn running(program: &str) -> usize {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    lines.filter(|line| line.starts_with(program.as_bytes())).count()
}

fn scripts(program: &Path) -> usize {
    running(&format!("/bin/sh\0{}\0", program.display()))
}

#[test]
fn an_upgrade_fails_no_match() {
    let place = Place::new();
    let keys = chain("a", 20);
    // No bound that a busy machine might reach.
    let mut agent = place.agent(0, &[("client_wait_ms", "20000")]);
    store(&mut agent, &keys);
    let instance = agent.instance();
    let mut matches = 0;
    for upgrade in 2..6 {
        let upgrading = place.kvring(&["upgrade"]).spawn().unwrap();
        while instance.sessions_count() < upgrade {
            let matched = instance.match_prefix(&keys);
            assert_eq!(matched.blocks, 20, "match {matches}, session {}", instance.sessions_count());
            instance.release(matched.lease.unwrap());
            matches += 1;
        }
        let output = upgrading.wait_with_output().unwrap();
        let log = std::fs::read_to_string(place.path("s.log")).unwrap_or_default();
        assert!(output.status.success(), "{}\n{log}", text(&output));
    }
    println!("{matches} matches over 4 upgrades");
}

/// The next engine process is there, and not ready yet: whatever ends meanwhile does not wait for it.
#[test]
fn what_prepares_itself_is_not_waited_for_and_goes() {
    let mut place = Place::new();
    let program = serve_a_copy(&mut place);
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    store(&mut agent, &keys);
    let slow = format!("sleep 1; exec {KVRING} \"$@\"");
    replace(&program, &slow);
    let keeper = |place: &Place| place.stats().unwrap()["keeper_pid"].as_u64().unwrap() as u32;

    let killed = place.server_pid();
    signal(keeper(&place), Signal::HUP);
    eventually("the next one is there", || scripts(&program) == 1);
    assert_eq!(load(&mut agent, &keys), 20, "and the last one serves");
    signal(killed, Signal::KILL);
    eventually("another takes over from the dead", || load(&mut agent, &keys) == 20);
    eventually("and the upgrade follows", || place.stats().is_some_and(|stats| stats["epoch"] == 3));
    let stats = place.stats().unwrap();
    assert_eq!(stats["crashes"].as_u64(), Some(1));
    eventually("with all that there was", || load(&mut agent, &keys) == 20);

    signal(keeper(&place), Signal::HUP);
    eventually("another one is there", || scripts(&program) == 1);
    let stopped = place.kvring(&["stop"]).output().unwrap();
    assert!(stopped.status.success(), "{}", text(&stopped));
    eventually("nobody is left", || scripts(&program) + running(program.to_str().unwrap()) == 0);
}

#[test]
fn sizes_are_not_changed_during_an_upgrade() {
    let mut place = Place::new();
    let program = serve_a_copy(&mut place);
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    store(&mut agent, &keys);
    replace(&program, &format!("sleep 2; exec {KVRING} \"$@\""));
    let upgrading = place.kvring(&["upgrade"]).spawn().unwrap();
    eventually("the next one is there", || scripts(&program) == 1);
    let refused = place.kvring(&["resize", "--dram", "0.03125"]).output().unwrap();
    assert!(!refused.status.success() && text(&refused).contains("an upgrade is under way"), "{}", text(&refused));
    assert!(upgrading.wait_with_output().unwrap().status.success());
    eventually("everything is there", || load(&mut agent, &keys) == 20);
}

/// A program that hangs before it serves is waited for by nobody, should the engine process die meanwhile.
#[test]
fn a_death_does_not_wait_for_a_program_that_hangs() {
    let mut place = Place::new();
    let program = serve_a_copy(&mut place);
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    store(&mut agent, &keys);
    replace(&program, "exec sleep 1000");
    let keeper = place.stats().unwrap()["keeper_pid"].as_u64().unwrap() as u32;
    signal(keeper, Signal::HUP);
    eventually("it hangs", || processes_of(place.dir.path()).iter().any(|(_, command)| command.contains("sleep")));
    let died = Instant::now();
    signal(place.server_pid(), Signal::KILL);
    eventually("the program that ran before serves", || load(&mut agent, &keys) == 20);
    println!("served again {:.0} ms after the kill", died.elapsed().as_secs_f64() * 1e3);
    assert!(died.elapsed() < Duration::from_secs(30));
}

/// The shard finds that it has made a mistake: the process ends then and there.
#[test]
fn a_panic_of_the_shard_ends_its_process() {
    use std::os::unix::process::ExitStatusExt;
    let place = Place::new();
    for (seed, thread, ends) in [(0, "kvring-shard", true), (1, "another", false)] {
        let ended = place.actor("survival::one_who_panics", 0, seed).wait().unwrap();
        assert_eq!(ended.signal() == Some(Signal::KILL.as_raw()), ends, "{thread}: {ended}");
    }
}

#[test]
#[ignore = "played in a process of its own"]
fn one_who_panics() {
    let Some((_, _, seed)) = role() else { return };
    kvring_engine::control::end_with_a_panic();
    let thread = [kvring_engine::control::engine::SHARD_THREAD, "another"][seed as usize];
    let panics = std::thread::Builder::new().name(thread.into()).spawn(|| panic!("a mistake")).unwrap();
    assert!(panics.join().is_err());
}

/// The second wish is for what lies there by then, whatever became of the first.
/// A debugger holds one thread of it: the others see that it does not hear.
#[test]
fn an_engine_process_whose_shard_hangs_is_replaced_and_one_that_was_stopped_is_not() {
    use nix::sys::ptrace;
    use nix::sys::wait::{WaitPidFlag, waitpid};
    let mut place = Place::new();
    let pid = place.serve(&["--block-kib", "64", "--hang-limit-s", "2"]);
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[EXTERNAL]);
    eventually("the blocks are there", || store(&mut agent, &keys) == 20);
    halt(pid);
    std::thread::sleep(Duration::from_secs(5));
    signal(pid, Signal::CONT);
    eventually("it goes on", || load(&mut agent, &keys) == 20);
    // Longer than it would take to think otherwise.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!((load(&mut agent, &keys), place.server_pid()), (20, pid));

    let shard = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .flatten()
        .find(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default().trim() == "kvring-shard");
    let shard = shard.expect("a shard").file_name().to_str().unwrap().parse().map(nix::unistd::Pid::from_raw).unwrap();
    let traced = ptrace::seize(shard, ptrace::Options::empty()).and_then(|()| ptrace::interrupt(shard));
    if traced == Err(nix::errno::Errno::EPERM) {
        println!("skipped: nobody may trace another process here (Yama, or a container without SYS_PTRACE)");
        return;
    }
    traced.unwrap();
    waitpid(shard, Some(WaitPidFlag::__WALL)).unwrap();
    // Whoever traces a thread has to see its end.
    eventually("it is dead", || {
        let ended = waitpid(shard, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
        ended.is_ok_and(|how| matches!(how, nix::sys::wait::WaitStatus::Signaled(..)))
    });
    eventually("the same blocks are served again", || load(&mut agent, &keys) == 20);
    let stats = place.stats().unwrap();
    assert_eq!((stats["crashes"].as_u64(), stats["epoch"].as_u64()), (Some(1), Some(2)));
}

#[test]
fn an_upgrade_that_is_asked_for_during_another_follows_it() {
    let mut place = Place::new();
    let program = serve_a_copy(&mut place);
    let keeper = place.stats().unwrap()["keeper_pid"].as_u64().unwrap() as u32;
    replace(&program, "sleep 1; exit 1");
    signal(keeper, Signal::HUP);
    eventually("the first one is there", || scripts(&program) == 1);
    replace(&program, &format!("sleep 1; exec {KVRING} \"$@\""));
    signal(keeper, Signal::HUP);
    eventually("the second one serves", || place.stats().is_some_and(|stats| stats["epoch"] == 2));
    signal(keeper, Signal::HUP);
    eventually("a third one is there", || scripts(&program) == 1);
    signal(keeper, Signal::HUP);
    eventually("and a fourth follows it", || place.stats().is_some_and(|stats| stats["epoch"] == 4));
    std::thread::sleep(Duration::from_millis(1500));
    let stats = place.stats().unwrap();
    assert_eq!((stats["crashes"].as_u64(), stats["epoch"].as_u64()), (Some(0), Some(4)), "and no fifth");
}

#[test]
fn an_upgrade_to_a_configuration_that_cannot_be_served_does_not_happen() {
    let mut place = Place::new();
    let config = place.path("kvring.toml");
    std::fs::write(&config, "ssd_cache_gb = 0.0625\n").unwrap();
    place.serve(&["--block-kib", "64", "--config", config.to_str().unwrap()]);
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    store(&mut agent, &keys);
    let before = (place.server_pid(), agent.instance().sessions_count());
    for (bad, times) in [("ssd_cash_gb = 0.0625\n", 1), ("ssd_cache_gb = 4\n", 2), ("ssd_cache_gb = 0.00001\n", 3)] {
        std::fs::write(&config, bad).unwrap();
        let output = place.kvring(&["upgrade"]).output().unwrap();
        assert!(!output.status.success() && text(&output).contains("does not start"), "{bad}: {}", text(&output));
        assert_eq!(load(&mut agent, &keys), 20, "{bad}");
        assert_eq!((place.server_pid(), agent.instance().sessions_count()), before, "{bad}");
        assert_eq!(place.stats().unwrap()["upgrades_failed"], times);
    }
}

#[test]
fn an_upgrade_loses_no_block() {
    let place = Place::new();
    let keys = chain("a", 20);
    let mut agents = [place.agent(0, &[]), place.agent(1, &[])];
    store(&mut agents[0], &keys);
    for round in 2..5 {
        if round == 3 {
            signal(place.stats().unwrap()["keeper_pid"].as_u64().unwrap() as u32, Signal::HUP);
            eventually("a hangup does the same", || place.stats().is_some_and(|stats| stats["epoch"] == 3));
        } else {
            let output = place.kvring(&["upgrade"]).output().unwrap();
            assert!(output.status.success() && text(&output).contains("has taken over"), "{}", text(&output));
        }
        assert_eq!(place.metric("dram_recovered_blocks_count"), 20);
        for agent in &mut agents {
            eventually("all is served", || load(agent, &keys) == 20);
        }
        assert_eq!(place.stats().unwrap()["crashes"], 0);
    }
}

#[test]
fn an_upgrade_to_a_program_that_does_not_start_does_not_happen() {
    let mut place = Place::new();
    let program = serve_a_copy(&mut place);
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    store(&mut agent, &keys);
    replace(&program, "exit 1");
    let before = (place.server_pid(), agent.instance().sessions_count());
    let output = place.kvring(&["upgrade"]).output().unwrap();
    assert!(!output.status.success() && text(&output).contains("does not start"), "{}", text(&output));
    assert_eq!(load(&mut agent, &keys), 20, "the old program serves the same blocks");
    assert_eq!((place.server_pid(), agent.instance().sessions_count()), before, "as if nothing had been");
    let stats = place.stats().unwrap();
    assert_eq!((stats["crashes"].as_u64(), stats["upgrades_failed"].as_u64()), (Some(0), Some(1)));

    // Nothing there at all, and a crash: the program that runs is still there to be run.
    std::fs::remove_file(&program).unwrap();
    signal(place.server_pid(), Signal::KILL);
    eventually("nor does that matter", || load(&mut agent, &keys) == 20);
}

#[test]
fn a_configuration_that_went_bad_does_not_cost_the_pool() {
    let mut place = Place::new();
    let config = place.path("kvring.toml");
    std::fs::write(&config, "cpu_cache_gb = 0.0625\n").unwrap();
    place.serve(&["--block-kib", "64", "--config", config.to_str().unwrap()]);
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    store(&mut agent, &keys);
    std::fs::write(&config, "cpu_cash_gb = 0.0625\n").unwrap();
    signal(place.server_pid(), Signal::KILL);
    std::thread::sleep(Duration::from_millis(500));
    assert!(place.stats().is_none(), "nobody can start with this");
    std::fs::write(&config, "cpu_cache_gb = 0.0625\n").unwrap();
    eventually("mended, everything is there again", || load(&mut agent, &keys) == 20);

    // Another size is the same pool, larger.
    let bytes = |agent: &mut DirectAgent<HostMemory>| agent.instance().session().unwrap().pool().mapping().bytes();
    let before = bytes(&mut agent);
    std::fs::write(&config, "cpu_cache_gb = 0.125\n").unwrap();
    assert!(place.kvring(&["upgrade"]).output().unwrap().status.success());
    eventually("everything is there", || load(&mut agent, &keys) == 20);
    assert_eq!(place.metric("dram_recovered_blocks_count"), 20);
    assert_eq!(bytes(&mut agent), 2 * before);
}

/// Pages of 1 GiB, which nobody else here uses.
struct BigPages {
    before: u64,
}

impl BigPages {
    const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB";

    fn number(file: &str) -> u64 {
        let text = std::fs::read_to_string(format!("{}/{file}", Self::DIR)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    fn set(count: u64) {
        let _ = std::fs::write(format!("{}/nr_hugepages", Self::DIR), count.to_string());
    }

    /// One more, if the kernel has 1 GiB in one piece and this user may ask for it.
    fn one_more() -> Option<Self> {
        let pages = Self { before: Self::number("nr_hugepages") };
        Self::set(pages.before + 1);
        (Self::number("free_hugepages") > 0).then_some(pages)
    }
}

impl Drop for BigPages {
    fn drop(&mut self) {
        Self::set(self.before);
    }
}

#[test]
fn hugepages_come_back_whoever_dies() {
    let Some(_pages) = BigPages::one_more() else {
        println!("skipped: no hugepage of 1 GiB is to be had");
        return;
    };
    let free = BigPages::number("free_hugepages");
    let mut place = Place::new();
    let keys = chain("a", 20);
    for round in 0..2 {
        let settings = ["--hugepages", "require", "--hugepage-size-bytes", "1073741824", "--cpu-cache-gb", "1"];
        place.serve(&[&["--block-kib", "64", "--ssd-cache-gb", "0"], &settings[..]].concat());
        assert_eq!(place.stats().unwrap()["page_bytes"], 1 << 30);
        let external = [NO_SSD, ("server_launch_mode", "external")];
        let mut agent = place.agent(0, &external);
        eventually("blocks are stored", || store(&mut agent, &keys) + load(&mut agent, &keys) >= 20);
        assert_eq!(BigPages::number("free_hugepages"), free - 1, "the pool lies there");
        signal(place.server_pid(), Signal::KILL);
        eventually("the same blocks are served, from the same page", || load(&mut agent, &keys) == 20);
        let mut other = place.agent(1, &external);
        eventually("another instance is served", || load(&mut other, &keys) == 20);
        if round == 0 {
            assert!(place.kvring(&["upgrade"]).output().unwrap().status.success());
            eventually("the same blocks again", || load(&mut agent, &keys) == 20);
            assert!(place.kvring(&["stop"]).output().unwrap().status.success());
        } else {
            place.kill_all();
        }
        drop((agent, other));
        eventually("the page is free", || BigPages::number("free_hugepages") == free);
        place.children.drain(..).for_each(|mut child| drop(child.wait()));
    }
}

#[test]
fn a_log_that_cannot_be_written_is_no_reason_to_die() {
    let mut place = Place::new();
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let child = place.kvring(&["serve", "--block-kib", "64"]).stdout(full()).stderr(full()).spawn().unwrap();
    place.children.push(child);
    place.wait_for_server();
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    store(&mut agent, &keys);
    signal(place.server_pid(), Signal::KILL);
    eventually("the same blocks are served", || load(&mut agent, &keys) == 20);
}

#[test]
fn an_instance_lets_go_of_a_pool_that_no_server_will_have_again() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0"]);
    let mut actor = place.actor("survival::one_who_asks", 1, 0);
    let maps = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    eventually("it has the pool mapped", || maps(actor.id()).contains("memfd:kvring-pool"));
    assert!(place.kvring(&["stop"]).output().unwrap().status.success());
    eventually("and lets it go", || !maps(actor.id()).contains("memfd:kvring-pool"));
    actor.kill().unwrap();
    actor.wait().unwrap();
}

#[test]
#[ignore = "played in a process of its own"]
fn one_who_asks() {
    let Some((dir, instance_id, _)) = role() else { return };
    let external = [NO_SSD, ("server_launch_mode", "external")];
    let mut instance = Instance::open(config_in(&dir, instance_id, &external), layout(), 0).unwrap();
    loop {
        instance.match_prefix(&chain("nothing", 1));
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_keeper_s_death_is_noticed_by_nobody() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    store(&mut agent, &keys);
    let keeper = place.children[0].id();
    assert_eq!(place.stats().unwrap()["keeper_pid"], keeper);
    signal(keeper, Signal::KILL);
    place.children[0].wait().unwrap();
    assert_eq!(load(&mut agent, &keys), 20);
    assert_eq!(agent.instance().sessions_count(), 1);
    let upgrade = place.kvring(&["upgrade"]).output().unwrap();
    assert!(!upgrade.status.success() && text(&upgrade).contains("keeper is gone"), "{}", text(&upgrade));
    assert_eq!(load(&mut agent, &keys), 20);
    // The socket is still taken, and `stop` still stops.
    let second = place.kvring(&["serve"]).output().unwrap();
    assert!(!second.status.success() && text(&second).contains("another server"), "{}", text(&second));
    assert!(place.kvring(&["stop"]).output().unwrap().status.success());
    assert!(!exists(&place.socket()));
}

#[test]
#[ignore = "played in a process of its own"]
fn a_holder() {
    let Some((dir, instance_id, _)) = role() else { return };
    let mut instance = Instance::open(config_in(&dir, instance_id, &[NO_SSD]), layout(), 0).unwrap();
    let held = slots(instance.reserve(BlockKey::default(), 0, &chain(&instance_id.to_string(), 10)));
    loop {
        // It looks for its server again, and never says that it is done.
        instance.match_prefix(&chain("nothing", 1));
        assert_eq!(held.len(), 10);
        std::thread::sleep(Duration::from_millis(10));
    }
}
