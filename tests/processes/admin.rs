//! What an operator can do to a running server, and what he cannot.

use super::*;

fn say(place: &Place, arguments: &[&str]) -> (bool, String) {
    let output = place.kvring(arguments).output().unwrap();
    (output.status.success(), text(&output))
}

#[test]
fn blocks_are_listed_where_they_are_and_leave_when_they_are_asked_to() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let mut agent = place.agent(0, &[]);
    let (a, b) = (chain("a", 60), chain("b", 30));
    assert_eq!((store(&mut agent, &a), store(&mut agent, &b)), (60, 30));
    for name in ["c", "d"] {
        assert_eq!(store(&mut agent, &chain(name, 60)), 60);
    }
    eventually("all is written", || place.metric("ssd_write_bytes") == 210 * BLOCK as u64);
    let list = |arguments: &[&str]| -> Vec<serde_json::Value> {
        let output = place.kvring(&[&["blocks", "--json"], arguments].concat()).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    // More than one answer holds; each block once, after its parent.
    let all = list(&[]);
    let keys: std::collections::BTreeSet<_> =
        all.iter().map(|block| block["key"].as_str().unwrap().to_owned()).collect();
    assert_eq!((all.len(), keys.len()), (210, 210));
    let of = |key: BlockKey| all.iter().find(|block| block["key"] == key.to_string()).unwrap();
    assert_eq!(of(a[7])["parent"], a[6].to_string());
    assert!(of(a[7])["depth"] == 7 && !of(a[7])["dram"].is_null() && !of(a[7])["ssd"].is_null());
    assert_eq!(list(&["--limit", "3"]).len(), 3);
    assert_eq!(list(&["--key", &b[29].to_string()])[0]["parent"], b[28].to_string());
    // Out of DRAM: they come back from the SSD.
    assert!(say(&place, &["evict", "--tier", "dram", "--blocks", "1100"]).1.contains("210 blocks have left DRAM"));
    assert_eq!(list(&["--tier", "dram"]).len(), 0);
    assert_eq!(load(&mut agent, &a), 60);
    // A block goes with all that continues it, and nothing else does.
    let (good, said) = say(&place, &["evict", "--key", &a[40].to_string()]);
    assert!(good && said.contains("20 blocks forgotten"), "{said}");
    assert_eq!((agent.match_prefix(&a).blocks, agent.match_prefix(&b).blocks), (40, 30));
    assert!(say(&place, &["explain", "--key", &a[50].to_string()]).1.contains("an operator evicted it"));
    let (good, said) = say(&place, &["blocks", "--key", &a[50].to_string()]);
    assert!(!good && said.contains("there is no such block"), "{said}");
    // What is leased stays.
    let lease = agent.match_prefix(&b).lease.unwrap();
    place.kvring(&["evict", "--tier", "ssd", "--blocks", "1000"]).output().unwrap();
    place.kvring(&["evict", "--tier", "dram", "--blocks", "1000"]).output().unwrap();
    assert_eq!(agent.match_prefix(&b).blocks, 30);
    agent.instance().release(lease);
    assert!(!say(&place, &["reset"]).0, "not without --all");
    assert!(say(&place, &["reset", "--all"]).1.contains("blocks forgotten"));
    assert_eq!(list(&[]).len(), 0);
    for (arguments, said) in [
        (&["evict"][..], "required"),
        (&["evict", "--blocks", "3"], "--tier"),
        (&["evict", "--key", "xyz"], "32 hexadecimal digits"),
        (&["evict", "--tier", "tape", "--blocks", "3"], "tape"),
        (&["blocks", "--key", "1"], "32 hexadecimal digits"),
    ] {
        let (good, told) = say(&place, arguments);
        assert!(!good && told.contains(said), "{arguments:?}: {told}");
    }
}

#[test]
fn a_block_that_was_forgotten_is_in_no_tier_that_anybody_finds_again() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let mut agent = place.agent(0, &[]);
    let (a, b) = (chain("a", 60), chain("b", 30));
    assert_eq!((store(&mut agent, &a), store(&mut agent, &b)), (60, 30));
    eventually("all is written", || place.metric("ssd_write_bytes") == 90 * BLOCK as u64);
    // Some have left the pool, and lie in free slots yet.
    assert!(say(&place, &["evict", "--tier", "dram", "--blocks", "50"]).1.contains("50 blocks have left DRAM"));
    let (good, said) = say(&place, &["evict", "--key", &a[40].to_string()]);
    assert!(good && said.contains("20 blocks forgotten, on the SSD too"), "{said}");
    assert!(say(&place, &["upgrade"]).0);
    eventually("the SSD is read", || place.stats().is_some_and(|stats| stats["metrics"]["ssd_recovery_us"] != 0));
    assert_eq!((agent.match_prefix(&a).blocks, agent.match_prefix(&b).blocks), (40, 30), "the next engine process");
    signal(place.server_pid(), rustix::process::Signal::KILL);
    eventually("another one serves what is left", || agent.match_prefix(&b).blocks == 30);
    eventually("and what is on the SSD", || agent.match_prefix(&a).blocks == 40);
    assert!(say(&place, &["stop"]).0);
    place.serve(&["--block-kib", "64"]);
    eventually("the next server finds what is left", || agent.match_prefix(&a).blocks == 40);
    assert_eq!(load(&mut agent, &b), 30);
    assert_eq!(agent.match_prefix(&a).blocks, 40, "and no more");
}

#[test]
fn a_drained_server_takes_no_store_serves_what_it_has_and_loses_nothing() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let mut agent = place.agent(0, &[]);
    let a = chain("a", 60);
    assert_eq!(store(&mut agent, &a), 60);
    let (good, said) = say(&place, &["drain"]);
    assert!(good && said.contains("is written"), "{said}");
    // Written, headers too: a death now costs nothing.
    assert_eq!(place.metric("ssd_write_bytes"), 60 * BLOCK as u64);
    assert_eq!(store(&mut agent, &chain("b", 10)), 0);
    assert_eq!(load(&mut agent, &a), 60);
    assert_eq!(place.metric("reserve_blocks_dropped_count"), 10);
    let dropped = agent.match_prefix(&chain("b", 10)).blocks;
    assert_eq!(dropped, 0);
    assert!(say(&place, &["explain"]).1.contains("the server was being drained"));
    assert_eq!(place.stats().unwrap()["draining"], true);
    assert!(say(&place, &["drain", "--undo"]).0);
    assert_eq!(store(&mut agent, &chain("b", 10)), 10);
    say(&place, &["drain"]);
    place.kill_all();
    // The instance starts another server, which takes stores.
    eventually("served again", || load(&mut agent, &a) == 60);
    assert_eq!(place.metric("ssd_recovered_blocks_count"), 70);
    assert_eq!(store(&mut agent, &chain("c", 5)), 5);
}

#[test]
fn a_namespace_is_counted_and_forgotten_by_itself_after_a_crash_too() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let mut agent = place.agent(0, &[]);
    let namespace = |name: &str| Namespace::default().model("m").tenant(name);
    let keys = |name: &str, blocks: u32| namespace(name).keys(&(0..blocks).collect::<Vec<_>>(), 1);
    let put = |agent: &mut DirectAgent<HostMemory>, name: &str, blocks: u32| {
        let keys = keys(name, blocks);
        let all: Vec<usize> = (0..keys.len()).collect();
        let fill = |memory: &mut HostMemory, index: usize| bytes::fill(keys[index], 0, memory.block_mut(index));
        // As an engine does: first the beginning, then what follows it.
        let (some, rest) = all.split_at(all.len() / 2);
        let begun = agent.store(namespace(name).id(), 0, &keys[..some.len()], some, fill).blocks_stored;
        let compute = |memory: &mut HostMemory, index: usize| {
            bytes::fill(keys[some.len() + index], 0, memory.block_mut(some.len() + index));
        };
        begun + agent.store(keys[some.len() - 1], some.len() as u32, &keys[some.len()..], rest, compute).blocks_stored
    };
    assert_eq!(put(&mut agent, "a", 20), 20);
    assert_eq!(put(&mut agent, "b", 30), 30);
    assert_eq!(store(&mut agent, &chain("nobody's", 5)), 5);
    assert_eq!(load(&mut agent, &keys("b", 30)), 30);

    let listed = || -> Vec<serde_json::Value> {
        let (good, said) = say(&place, &["namespaces", "--json"]);
        assert!(good, "{said}");
        said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let counts = |of: &[serde_json::Value]| -> Vec<(String, u64, u64)> {
        let count = |one: &serde_json::Value, what: &str| one[what].as_u64().unwrap();
        let text = |one: &serde_json::Value| one["namespace"].as_str().unwrap().to_string();
        of.iter().map(|one| (text(one), count(one, "blocks"), count(one, "hit_blocks"))).collect()
    };
    let id = |name: &str| namespace(name).id().to_string();
    // `load` matches twice.
    let expected = [(id("b"), 30, 60), (id("a"), 20, 0), ("0".repeat(32), 5, 0)];
    assert_eq!(counts(&listed()), expected);
    let lines = |arguments: &[&str]| say(&place, arguments).1.lines().count();
    assert_eq!(lines(&["blocks", "--json", "--namespace", "tenant=a", "--namespace", "model=m"]), 20);
    assert_eq!(lines(&["blocks", "--json", "--namespace", &id("b")]), 30);
    for (arguments, said) in [
        (&["reset"][..], "--namespace"),
        (&["reset", "--namespace", "a"], "32 hexadecimal digits"),
        (&["reset", "--namespace", "user=a"], "tenant="),
        (&["namespaces", "--namespace", "tenant=nobody"], "nothing is known"),
        (&["reset", "--namespace", "tenant=nobody"], "no block of namespace"),
    ] {
        let (good, told) = say(&place, arguments);
        assert!(!good && told.contains(said), "{arguments:?}: {told}");
    }

    // What is on the SSD, in use by a lease, and in the pool: none of it is found again.
    say(&place, &["drain"]);
    say(&place, &["drain", "--undo"]);
    assert!(agent.match_prefix(&keys("a", 20)).lease.is_some(), "held while it is forgotten");
    let (good, said) = say(&place, &["reset", "--namespace", "model=m", "--namespace", "tenant=a"]);
    assert!(good && said.contains("20 blocks of namespace") && said.contains("5 blocks name no namespace"), "{said}");
    assert_eq!((load(&mut agent, &keys("a", 20)), load(&mut agent, &keys("b", 30))), (0, 30));
    // One that nobody holds.
    assert_eq!(put(&mut agent, "c", 6), 6);
    assert!(say(&place, &["reset", "--namespace", &id("c")]).0);
    // The engine process dies: the pool is kept. Then all do.
    signal(place.server_pid(), rustix::process::Signal::KILL);
    eventually("served from the pool", || load(&mut agent, &keys("b", 30)) == 30);
    assert_eq!((load(&mut agent, &keys("a", 20)), load(&mut agent, &keys("c", 6))), (0, 0));
    assert_eq!(load(&mut agent, &chain("nobody's", 5)), 5);
    assert_eq!(place.metric("dram_recovered_blocks_count"), 35);
    place.kill_all();
    eventually("served from the SSD", || load(&mut agent, &keys("b", 30)) == 30);
    eventually("all of it was read", || place.metric("ssd_recovered_blocks_count") == 35);
    assert_eq!(load(&mut agent, &keys("a", 20)), 0);
    let known: Vec<_> = counts(&listed()).into_iter().map(|(id, blocks, _)| (id, blocks)).collect();
    assert_eq!(known, [(id("b"), 30), ("0".repeat(32), 5)], "namespaces are known after a crash");
    assert_eq!(put(&mut agent, "a", 20), 20, "and it may be stored anew");
}

#[test]
fn the_log_says_who_asked_for_what() {
    let place = Place::new();
    let mut agent = place.agent(0, &[]);
    store(&mut agent, &chain("a", 5));
    let key = chain("a", 5)[4].to_string();
    let namespace = "0".repeat(32);
    let asked = [
        (&["verify"][..], "verification"),
        (&["evict", "--tier", "dram", "--blocks", "1"], "eviction of 1 blocks"),
        (&["evict", "--key", &key], "to forget"),
        (&["drain"], "drain"),
        (&["drain", "--undo"], "end of drain"),
        (&["reset", "--namespace", &namespace], "reset of namespace"),
        (&["reset", "--all"], "reset of everything"),
        (&["resize", "--dram", "0.07"], "cpu_cache_bytes: Some"),
        (&["upgrade"], "upgrade"),
        (&["stop"], "stop"),
    ];
    for (arguments, what) in asked {
        let child = place.kvring(arguments).spawn().unwrap();
        let pid = child.id();
        let output = child.wait_with_output().unwrap();
        let line = format!("process {pid} (user {}) asks: ", rustix::process::geteuid().as_raw());
        eventually("it is in the log", || {
            let log = std::fs::read_to_string(place.path("s.log")).unwrap();
            log.lines().any(|l| l.contains(&line) && l.contains(what))
        });
        println!("{arguments:?}: {}", text(&output).trim());
    }
}
