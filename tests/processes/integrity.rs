//! Bytes that are not what was stored: found by `kvring fsck`, by `kvring verify`, and by nobody's request.

use super::*;
use std::os::unix::fs::FileExt;

const SLOT: u64 = BLOCK as u64;

/// A cache file of this place, and where its slots begin.
fn cache_file(place: &Place) -> (std::fs::File, u64) {
    let path = place.path("ssd").join("kvring.cache");
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut words = [0; 64];
    file.read_exact_at(&mut words, 0).unwrap();
    // Room for so many headers.
    let slots = u64::from_le_bytes(words[24..32].try_into().unwrap()) >> 32;
    (file, ((1 + slots.div_ceil(64)) * 4096).next_multiple_of(1 << 20))
}

/// The slot of the block with this key, as its header says.
fn disk_slot(file: &std::fs::File, key: BlockKey) -> u64 {
    let words = key.to_words();
    (0..)
        .find(|slot| {
            let mut header = [0; 16];
            file.read_exact_at(&mut header, 4096 + slot * 64).unwrap();
            header[..8] == words[0].to_le_bytes() && header[8..] == words[1].to_le_bytes()
        })
        .unwrap()
}

fn flip(file: &std::fs::File, offset: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    file.sync_data().unwrap();
}

/// Stores a chain, and waits until the SSD holds it.
fn store_on_ssd(place: &Place, agent: &mut DirectAgent<HostMemory>, keys: &[BlockKey]) {
    let before = place.metric("ssd_write_bytes");
    assert_eq!(store(agent, keys), keys.len() as u32);
    eventually("blocks are written", || place.metric("ssd_write_bytes") >= before + keys.len() as u64 * SLOT);
    eventually("and their headers", || place.metric("ssd_header_writes_count") > 0);
    std::thread::sleep(Duration::from_millis(100));
}

fn fsck(place: &Place, more: &[&str]) -> (Option<i32>, serde_json::Value) {
    let dir = place.path("ssd").display().to_string();
    let output = place.kvring(&["fsck", &dir, "--json"]).args(more).output().unwrap();
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

fn counts(report: &serde_json::Value) -> [u64; 5] {
    ["sound", "damaged_headers", "damaged_blocks", "orphans", "repaired"].map(|name| report[0][name].as_u64().unwrap())
}

#[test]
fn fsck_counts_what_is_bad_and_forgets_it() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let (a, b) = (chain("a", 10), chain("b", 10));
    let mut agent = place.agent(0, &[("server_launch_mode", "external")]);
    store_on_ssd(&place, &mut agent, &a);
    store_on_ssd(&place, &mut agent, &b);
    let (code, _) = fsck(&place, &[]);
    assert_eq!(code, Some(8), "a running server's files are not looked at");
    assert!(place.kvring(&["stop"]).output().unwrap().status.success());
    let (code, report) = fsck(&place, &[]);
    assert_eq!((code, counts(&report)), (Some(0), [20, 0, 0, 0, 0]), "{report}");
    assert_eq!(report[0]["layout"]["model"], "opaque");

    let (file, data) = cache_file(&place);
    flip(&file, data + disk_slot(&file, a[6]) * SLOT + 1000);
    flip(&file, 4096 + disk_slot(&file, b[8]) * 64 + 40);
    let (code, report) = fsck(&place, &["--headers-only"]);
    assert_eq!((code, counts(&report)), (Some(4), [18, 1, 0, 1, 0]), "without the blocks only the header is seen");
    let (code, report) = fsck(&place, &[]);
    assert_eq!((code, counts(&report)), (Some(4), [14, 1, 1, 4, 0]));
    let (code, report) = fsck(&place, &["--repair"]);
    assert_eq!((code, counts(&report)), (Some(1), [14, 1, 1, 4, 6]));
    let (code, report) = fsck(&place, &[]);
    assert_eq!((code, counts(&report)), (Some(0), [14, 0, 0, 0, 0]));

    // A copy beside it is not another part of it.
    let copied = Command::new("cp").arg("-r").arg(place.path("ssd")).arg(place.path("copy")).status().unwrap();
    assert!(copied.success());
    let copy = place.path("copy").display().to_string();
    assert_eq!(fsck(&place, &[&copy, "--repair"]).0, Some(8));
    assert_eq!(fsck(&place, &[]).0, Some(0));

    place.serve(&["--block-kib", "64"]);
    eventually("the sound ones are served", || load(&mut agent, &a) == 6);
    assert_eq!(load(&mut agent, &b), 8);
    assert_eq!(place.metric("ssd_checksum_errors_count"), 0, "nobody had to find out");
}

#[test]
fn fsck_refuses_what_is_no_cache() {
    let place = Place::new();
    std::fs::create_dir(place.path("ssd")).unwrap();
    assert_eq!(fsck(&place, &[]).0, Some(8));
    assert!(!exists(&place.path("ssd").join("kvring.lock")), "and makes nothing there");
    std::fs::write(place.path("ssd").join("kvring.cache"), [7; 8192]).unwrap();
    assert_eq!(fsck(&place, &[]).0, Some(8));
}

#[test]
fn verify_finds_rot_in_a_running_cache_and_mends_it_from_the_other_copy() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    store_on_ssd(&place, &mut agent, &keys);
    let verify = |place: &Place| {
        let output = place.kvring(&["verify", "--json", "--mb-per-s", "50"]).output().unwrap();
        let state: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let counts = ["dram_blocks", "ssd_blocks", "bad_dram_blocks", "bad_ssd_blocks"];
        (output.status.success(), counts.map(|name| state[name].as_u64().unwrap()))
    };
    assert_eq!(verify(&place), (true, [20, 20, 0, 0]));
    let (file, data) = cache_file(&place);
    flip(&file, data + disk_slot(&file, keys[6]) * SLOT + 1000);
    // And a client that writes where it may not.
    let slot = {
        let lease = agent.match_prefix(&keys).lease.unwrap();
        let mut slots = Vec::new();
        let instance = agent.instance();
        instance.load(lease, 0, &keys, Duration::from_secs(5), |step| {
            if let kvring_ipc::instance::LoadStep::Copy { slot, .. } = step {
                slots.push(slot);
            }
        });
        instance.release(lease);
        instance.session().unwrap().pool().copy_in(slots[12], 77, b"scribble");
        slots[12]
    };
    println!("scribbled on slot {slot}");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(verify(&place), (false, [20, 20, 1, 1]));
    eventually("the bad copy is written anew", || place.metric("ssd_write_bytes") == 21 * SLOT);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(verify(&place), (true, [19, 20, 0, 0]));
    assert_eq!(load(&mut agent, &keys), 20, "nothing was lost, and every byte is right");
}

/// Written is not durable: a drive may hold it. Here none can be asked to flush, since nobody finds its file any more.
#[test]
fn a_reset_that_no_drive_has_flushed_is_not_said_to_be_for_good() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let mut agent = place.agent(0, &[]);
    let keys = chain("a", 30);
    let reset = |place: &Place| place.kvring(&["reset", "--all"]).output().unwrap();
    assert_eq!(store(&mut agent, &keys), 30);
    let file = place.path("ssd").join("kvring.cache");
    std::fs::rename(&file, place.path("elsewhere")).unwrap();
    let said = reset(&place);
    assert!(!said.status.success() && text(&said).contains("a restart may find blocks again"), "{}", text(&said));
    assert_eq!(agent.match_prefix(&keys).blocks, 0, "forgotten it is");
    std::fs::rename(place.path("elsewhere"), &file).unwrap();
    let said = reset(&place);
    assert!(said.status.success(), "{}", text(&said));
}
