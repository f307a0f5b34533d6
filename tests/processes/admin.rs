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
