//! What a server shows is what it did: rows, histograms and the flight recorder agree with the counters.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use kvring_engine::device::sim::Chance;
use kvring_engine::metrics::{SessionColumn, names};
use kvring_ipc::recorder::What;
use kvring_ipc::stats::SESSION_ROWS;
use kvring_ipc::wire::Op;
use kvring_tests::world::{Shape, World};

#[test]
fn every_row_histogram_and_entry_says_what_the_counters_say() {
    let (mut columns, mut histograms, mut whats) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for seed in 0..60 {
        println!("seed {seed}");
        let mut shape = Shape::draw(&mut Chance::new(seed));
        // A crash begins another segment, and who ends takes his row along.
        (shape.may_die, shape.may_crash, shape.may_lie) = (false, false, false);
        let devices = shape.devices as usize;
        let mut world = World::with_shape(shape, Chance::new(seed));
        world.show();
        let before: BTreeMap<_, _> = world.metrics.all().into_iter().map(|(name, _, value)| (name, value)).collect();
        world.run(1500);
        world.pass(2_000_000);
        world.poll_once();
        let counters: BTreeMap<_, _> = world.metrics.all().into_iter().map(|(name, _, value)| (name, value)).collect();
        let more = |name: &str| counters[name] - before[name];
        let stats = world.stats.clone().unwrap();
        let names = names(devices);
        for (at, (name, _)) in names.counters.iter().enumerate() {
            assert_eq!(stats.counters()[at].load(Ordering::Relaxed), counters[name.as_str()], "{name}");
        }
        let sum = |column: SessionColumn| -> u64 {
            let word = |at| stats.session(at)[column as usize].load(Ordering::Relaxed);
            (0..SESSION_ROWS).map(word).sum()
        };
        for (column, name) in [
            (SessionColumn::Matches, "matches_count"),
            (SessionColumn::BlocksRequested, "match_blocks_requested_count"),
            (SessionColumn::BlocksHit, "match_blocks_hit_count"),
            (SessionColumn::Loads, "loads_count"),
            (SessionColumn::LoadedDram, "load_blocks_dram_count"),
            (SessionColumn::LoadedSsd, "load_blocks_ssd_count"),
            (SessionColumn::Reserved, "reserve_blocks_count"),
            (SessionColumn::Present, "reserve_blocks_present_count"),
            (SessionColumn::Dropped, "reserve_blocks_dropped_count"),
            (SessionColumn::Committed, "commit_blocks_count"),
        ] {
            assert_eq!(sum(column), more(name), "{name} by session");
        }
        let (entries, lost) = stats.recording().read();
        assert_eq!(lost, 0, "the recorder is long enough for this story");
        let count = |is: &dyn Fn(&&kvring_ipc::recorder::Entry) -> bool| entries.iter().filter(is).count() as u64;
        let answered = |op: Op| count(&|entry| entry.what == What::Answered && entry.op == op as u8);
        assert_eq!(answered(Op::Match), more("matches_count"));
        assert_eq!(answered(Op::Load), more("loads_count"));
        assert_eq!(count(&|entry| entry.what == What::Stored), more("commit_blocks_count"));
        assert_eq!(count(&|entry| entry.what == What::Dropped), more("reserve_blocks_dropped_count"));
        let evicted = more("evict_host_count") + more("evict_ssd_count");
        assert_eq!(count(&|entry| entry.what == What::Evicted), evicted);
        let written = count(&|entry| entry.what == What::Written && entry.part == 1);
        assert_eq!(written, more("ssd_write_bytes") / world.shape.slot_bytes);
        assert!(entries.windows(2).all(|two| two[0].at_ns <= two[1].at_ns), "entries are in order");
        for (name, words) in (0..SESSION_ROWS).flat_map(|at| names.session.iter().zip(stats.session(at))) {
            *columns.entry(name.clone()).or_insert(0) += words.load(Ordering::Relaxed);
        }
        for (name, words) in (0..devices).flat_map(|at| names.device.iter().zip(stats.device(at))) {
            *columns.entry(format!("device {name}")).or_insert(0) += words.load(Ordering::Relaxed);
        }
        for (at, name) in names.histograms.iter().enumerate() {
            *histograms.entry(name.name.clone()).or_insert(0) += stats.histogram(at).snapshot().count();
        }
        for entry in &entries {
            *whats.entry(format!("{:?}", entry.what)).or_insert(0) += 1;
        }
    }
    // What nobody ever writes is a lie. Some are levels that are zero at rest, or the control plane's to say.
    let at_rest = [
        "live",
        "leases_count",
        "loans_count",
        "loads_inflight",
        "submissions_waiting",
        "completions_waiting",
        "ended",
    ];
    let control = ["instance_id", "pid"];
    let health = [
        "device health_known",
        "device critical_warning",
        "device temperature_celsius",
        "device available_spare_percent",
        "device used_percent",
        "device media_errors_count",
        "device drive_written_bytes",
    ];
    let levels = ["device reads_waiting", "device reads_inflight", "device writes_waiting", "device writes_inflight"];
    for (name, total) in columns {
        let may = [&at_rest[..], &control, &levels, &health, &["device lost"]].concat().contains(&name.as_str());
        assert!(total > 0 || may, "nothing wrote {name}");
    }
    for (name, total) in histograms {
        assert!(total > 0, "nothing was recorded in {name}");
    }
    for what in ["Answered", "Stored", "Evicted", "Forgotten", "Dropped", "Read", "Written", "Missed", "Attached"] {
        assert!(whats.contains_key(what), "no {what} in {whats:?}");
    }
}
