//! Tiers get other sizes while instances use them.

use super::*;
use kvring_ipc::instance::{Instance, Reserved};
use rustix::process::Signal;
use std::os::unix::fs::MetadataExt;

const MIB: u64 = 1 << 20;

fn resize(place: &Place, args: &[&str]) -> Output {
    place.kvring(&[&["resize"], args].concat()).output().unwrap()
}

fn must_resize(place: &Place, args: &[&str]) {
    let output = resize(place, args);
    assert!(output.status.success(), "{args:?}: {}", text(&output));
}

/// Bytes of memory behind the pool's file: pages that there are, wherever in it.
fn pool_memory(place: &Place) -> u64 {
    let keeper = place.stats().expect("a server")["keeper_pid"].as_u64().unwrap();
    let fds = std::fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().flatten();
    let is_pool =
        |path: &PathBuf| std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("kvring-pool"));
    let pool = fds.map(|fd| fd.path()).find(is_pool).expect("the keeper holds the pool");
    std::fs::metadata(pool).unwrap().blocks() * 512
}

fn ssd_file(place: &Place) -> u64 {
    std::fs::metadata(place.path("ssd/kvring.cache")).unwrap().blocks() * 512
}

/// Every chain that is whole there, byte by byte.
fn whole(agent: &mut DirectAgent<HostMemory>, chains: &[Vec<BlockKey>]) -> usize {
    chains.iter().filter(|keys| load(agent, keys) as usize == keys.len()).count()
}

#[test]
fn both_tiers_grow_and_nothing_is_lost() {
    let place = Place::new();
    let mut agent = place.agent(0, &[]);
    let keys = chain("a", 40);
    assert_eq!(store(&mut agent, &keys), 40);
    let slots = place.metric("host_slots_count");
    must_resize(&place, &["--dram", "0.125", "--ssd", "0.1875"]);
    assert_eq!(load(&mut agent, &keys), 40, "as if nothing had been");
    eventually("the pool is twice as large", || place.metric("host_slots_count") == 2 * slots);
    let ssd = place.metric("ssd_slots_count");
    assert!(ssd > 2 * slots, "{ssd}");
    let chains: Vec<_> = (0..30).map(|name| chain(&format!("more {name}"), 50)).collect();
    for keys in &chains {
        assert_eq!(store(&mut agent, keys), 50);
    }
    eventually("more is there than fits the old pool", || whole(&mut agent, &chains) == chains.len());

    // The next engine process has these sizes too, and what lies where the tiers grew.
    signal(place.server_pid(), Signal::KILL);
    eventually("another takes over", || place.stats().is_some_and(|stats| stats["epoch"] == 3));
    eventually("with all of it", || whole(&mut agent, &chains) == chains.len());
    assert_eq!(place.metric("host_slots_count"), 2 * slots);
    let stats = place.stats().unwrap();
    assert_eq!(
        (&stats["settings"]["cpu_cache_gb"], &stats["settings"]["ssd_cache_gb"]),
        (&"0.125".into(), &"0.1875".into())
    );
    let output = place.kvring(&["upgrade"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(place.stats().unwrap()["settings"]["cpu_cache_gb"], "0.125");
    assert_eq!(place.metric("ssd_checksum_errors_count"), 0);
}

#[test]
fn a_smaller_pool_keeps_what_was_used_last_and_gives_its_memory_back() {
    let place = Place::new();
    // 1024 blocks of 64 KiB, and no SSD: what goes is gone.
    let mut agent = place.agent(0, &[("ssd_cache_gb", "0")]);
    let chains: Vec<_> = (0..20).map(|name| chain(&format!("{name}"), 50)).collect();
    for keys in &chains {
        assert_eq!(store(&mut agent, keys), 50);
    }
    // In use at this very moment: it is waited for.
    assert_eq!(whole(&mut agent, &chains[17..]), 3);
    assert!(pool_memory(&place) >= 60 * MIB);
    must_resize(&place, &["--dram", "0.015625"]);
    eventually("its slots", || place.metric("host_slots_count") == 256);
    assert_eq!(whole(&mut agent, &chains[17..]), 3, "what was used last is there, wherever it lay");
    assert!(whole(&mut agent, &chains) <= 5, "and no more than fits");
    // The instance has the smaller pool mapped by now and says so.
    eventually("the memory is the system's", || pool_memory(&place) <= 16 * MIB);

    // It grows again: where it was given back nothing is found, and nothing wrong.
    must_resize(&place, &["--dram", "0.0625"]);
    eventually("all slots are back", || place.metric("host_slots_count") == 1024);
    assert_eq!(whole(&mut agent, &chains[17..]), 3);
    for keys in &chains {
        store(&mut agent, keys);
        assert_eq!(load(&mut agent, keys), 50);
    }
}

#[test]
fn memory_is_given_back_only_when_nobody_may_be_writing_there() {
    let place = Place::new();
    let mut agent = place.agent(0, &[("ssd_cache_gb", "0")]);
    let mut holder = place.holder(1);
    eventually("it holds slots", || place.metric("reserve_blocks_count") == 10);
    let filler: Vec<_> = (0..20).map(|name| chain(&format!("{name}"), 50)).collect();
    filler.iter().for_each(|keys| assert!(store(&mut agent, keys) > 0));
    let pid = rustix::process::Pid::from_raw(holder.id() as i32).unwrap();
    // It does nothing, not even say that it is alive.
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    must_resize(&place, &["--dram", "0.03125"]);
    eventually("the pool is smaller", || {
        place.metric("host_slots_count") + place.metric("host_slots_quarantined_count") >= 512
    });
    load(&mut agent, &filler[19]);
    std::thread::sleep(Duration::from_millis(2500));
    assert!(pool_memory(&place) > 48 * MIB, "it may be writing yet");
    holder.kill().unwrap();
    holder.wait().unwrap();
    eventually("its death gives it back", || pool_memory(&place) <= 32 * MIB);
}

#[test]
fn slots_that_come_back_wait_for_whoever_was_filling_them() {
    let place = Place::new();
    let mut agent = place.agent(0, &[("ssd_cache_gb", "0")]);
    let mut instance = Instance::open(place.config(1, &[("ssd_cache_gb", "0")]), layout(), 0).unwrap();
    // Everything but a little is taken, so that what is reserved next lies anywhere.
    let filler: Vec<_> = (0..20).map(|name| chain(&format!("{name}"), 50)).collect();
    filler.iter().for_each(|keys| assert!(store(&mut agent, keys) > 0));
    let keys = chain("held", 10);
    let held: Vec<_> = instance
        .reserve(BlockKey::default(), 0, &keys)
        .into_iter()
        .filter_map(|reserved| if let Reserved::Slot(slot) = reserved { Some(slot) } else { None })
        .collect();
    assert_eq!(held.len(), 10);
    // It gives the server no sign meanwhile, and the server does not wait for ever.
    must_resize(&place, &["--dram", "0.03125"]);
    must_resize(&place, &["--dram", "0.0625"]);
    assert!(load(&mut agent, &filler[19]) <= 50);
    eventually("they are in quarantine, in both halves", || place.metric("host_slots_quarantined_count") == 10);
    instance.abort(&held);
    eventually("its word frees them", || {
        instance.match_prefix(&keys);
        place.metric("host_slots_quarantined_count") == 0
    });
}

#[test]
fn a_smaller_ssd_tier_gives_its_place_back_and_a_start_may_change_it_too() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let mut agent = place.agent(0, &[("server_launch_mode", "external")]);
    let chains: Vec<_> = (0..19).map(|name| chain(&format!("{name}"), 50)).collect();
    for keys in &chains {
        eventually("stored", || store(&mut agent, keys) == 50 || load(&mut agent, keys) == 50);
    }
    eventually("written", || place.metric("ssd_write_bytes") >= 950 * BLOCK as u64);
    assert!(ssd_file(&place) > 60 * MIB);
    must_resize(&place, &["--ssd", "0.015625"]);
    eventually("its place is the file system's", || ssd_file(&place) < 18 * MIB);
    assert_eq!(place.metric("ssd_slots_count"), 240, "16 MiB, less superblock and headers");
    assert!(place.metric("ssd_slots_free_count") <= 240);
    let used = place.metric("ssd_slots_count") - place.metric("ssd_slots_free_count");
    assert!(used > 0, "what the policy keeps is kept");

    // A start with the size from before: larger again, with what is there.
    let stopped = place.kvring(&["stop"]).output().unwrap();
    assert!(stopped.status.success(), "{}", text(&stopped));
    let checked = place.kvring(&["fsck", place.path("ssd").to_str().unwrap()]).output().unwrap();
    // A header outlives its block until its slot is written anew; what was given back has none.
    assert!(text(&checked).contains("sound blocks") && !text(&checked).contains("damaged"), "{}", text(&checked));
    place.serve(&["--block-kib", "64"]);
    eventually("what was there is found", || place.metric("ssd_recovered_blocks_count") > 0);
    assert!(place.metric("ssd_slots_count") > 900);
    assert!(ssd_file(&place) > 60 * MIB, "its place is taken again");
    eventually("it is served", || {
        whole(&mut agent, &chains);
        place.metric("load_blocks_ssd_count") > 0
    });
    assert_eq!(place.metric("ssd_checksum_errors_count"), 0);
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let place = Place::new();
    let mut agent = place.agent(0, &[]);
    let keys = chain("a", 20);
    assert_eq!(store(&mut agent, &keys), 20);
    for (args, words) in [
        (vec!["--dram", "100000"], vec!["cpu_cache_gb"]),
        (vec!["--ssd", "100000"], vec!["ssd_cache_gb"]),
        (vec!["--ssd", "1"], vec!["it can grow to"]),
        (vec!["--dram", "0.00000001"], vec!["cpu_cache_gb is too small"]),
        (vec!["--dram", "0"], vec!["GiB above 0"]),
        (vec![], vec!["--dram"]),
    ] {
        let output = resize(&place, &args);
        assert!(!output.status.success(), "{args:?}");
        for word in words {
            assert!(text(&output).contains(word), "{args:?}: {}", text(&output));
        }
    }
    assert_eq!(place.stats().unwrap()["epoch"], 1, "the engine process is the same");
    assert_eq!(load(&mut agent, &keys), 20);
    assert_eq!(place.stats().unwrap()["settings"]["cpu_cache_gb"], "0.0625");
    assert_eq!(store(&mut agent, &chain("b", 50)), 50, "every slot is used yet");
}
