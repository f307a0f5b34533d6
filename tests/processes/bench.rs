//! The benchmarks that have a shard of their own.

use super::*;

fn measured(place: &Place, arguments: &[&str]) -> serde_json::Value {
    let output = place.kvring(arguments).current_dir(place.dir.path()).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_checksums_cost_is_measured_beside_reading_alone() {
    let place = Place::new();
    let small = ["bench", "checksum", "--json", "--seconds", "0.05", "--size-gb", "0.125", "--block-kib", "64"];
    let report = measured(&place, &small);
    for (side, ratios) in [
        ("read", &["on_to_off", "off_to_off"][..]),
        ("write", &["on_to_off", "off_to_off", "read_only_to_off", "handed_over_only_to_off", "on_to_read_only"]),
    ] {
        assert!(report[side]["off_gb_s"].as_f64().unwrap() > 0.0, "{report}");
        // How long a turn of a tenth of a second takes beside other tests, nobody knows: not what it says, but that it does.
        for ratio in ratios {
            assert!(
                ["from", "ratio", "to"].iter().all(|at| report[side][ratio].get(*at).is_some()),
                "{ratio}: {report}"
            );
        }
    }
    let left: Vec<_> = std::fs::read_dir(place.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("kvring-bench-")), "{left:?}");
    // Too small to be measured is said, with what is enough.
    let output = place.kvring(&["bench", "checksum", "--size-gb", "0.5"]).output().unwrap();
    assert!(!output.status.success() && text(&output).contains("make it 2 at least"), "{}", text(&output));
}

#[test]
fn what_instruments_cost_is_measured_beside_nothing_twice() {
    let report = measured(&Place::new(), &["bench", "instruments", "--json", "--seconds", "0.1"]);
    for work in ["load_and_copy_blocks_s", "copy_and_store_blocks_s", "store_uncopied_blocks_s", "match64_s"] {
        let row = &report[work];
        assert!(
            ["on", "off", "ratio", "ratio_of_off_to_off"].iter().all(|of| row[of].as_f64().unwrap() > 0.0),
            "{row}"
        );
        for (watched, per_s) in [("with_a_scrape_each_second", 1.0), ("with_top_beside", 2.0)] {
            let row = &row["watched"][watched];
            // As above: where two CPUs are all there are, who looks beside other tests waits, and the turn with him.
            assert!(row["ratio"].is_number() && row["ratio_with_a_look_each_turn"].is_number(), "{row}");
            assert!(row["looks_per_s"] == per_s && row["look_us"].as_f64().unwrap() > 0.0, "{row}");
        }
        assert!(row["watched"]["ratio_of_unwatched_to_unwatched"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn the_ssd_is_measured_beside_transfers_alone_and_what_may_be_wrong_is_said() {
    let place = Place::new();
    let small = ["bench", "ssd", "--seconds", "0.1", "--size-gb", "0.0625", "--block-kib", "64", "--rounds", "2"];
    let saved = place.path("run.json").display().to_string();
    let report = measured(&place, &[&small[..], &["--json", "--output", &saved]].concat());
    for side in ["read", "write"] {
        for what in ["kvring_gb_s", "raw_gb_s"] {
            assert!(report[side][what].as_f64().is_some_and(|rate| rate > 0.0), "{side} {what}: {report}");
        }
    }
    let doubts = report["doubts"].to_string();
    for doubt in ["too short", "CPUs"] {
        assert!(doubts.contains(doubt), "{doubt}: {doubts}");
    }
    assert!(report["ceilings"].to_string().contains("transfers alone"), "{report}");
    let path = saved;
    let saved: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(saved["settings"]["cpu_cache_gb"].is_string(), "{saved}");
    for what in ["load from SSD", "write-back to SSD"] {
        let points = saved["report"]["gb_s_over_time"][what].as_array().unwrap();
        assert!(points.len() >= 4, "some a round: {points:?}");
        assert!(points.windows(2).all(|two| two[0][0].as_f64() < two[1][0].as_f64()), "{points:?}");
    }
    let page = page_of(&place, &[&path]);
    assert!(page.contains("load from SSD, over time") && page.contains("<svg"), "{page}");
    let left: Vec<_> = std::fs::read_dir(place.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("kvring-bench-")), "{left:?}");
}

#[test]
fn seconds_are_refused_where_they_mean_nothing() {
    let place = Place::new();
    for (arguments, instead) in [
        (&["bench", "device", "--ioengine=sim", "--size", "1m", "--seconds", "1"][..], "--runtime"),
        (&["bench", "cache", "chat", "--seconds", "1"], "--requests"),
    ] {
        let output = place.kvring(arguments).output().unwrap();
        assert!(!output.status.success() && text(&output).contains(instead), "{arguments:?}: {}", text(&output));
    }
}

/// The page of some runs.
fn page_of(place: &Place, runs: &[&str]) -> String {
    let page = place.path("page.html");
    let said = place.kvring(&[&["report", "-o", page.to_str().unwrap()], runs].concat()).output().unwrap();
    assert!(said.status.success(), "{}", text(&said));
    std::fs::read_to_string(page).unwrap()
}

#[test]
fn what_the_rings_took_is_saved_whole_and_drawn() {
    let place = Place::new();
    let run = place.path("ring.json").display().to_string();
    measured(&place, &["bench", "ring", "--seconds", "0.1", "--json", "--output", &run]);
    let page = page_of(&place, &[&run]);
    for part in ["ping round trip: how long", "match of 256 blocks: how long", "<svg"] {
        assert!(page.contains(part), "no {part:?}");
    }
}

/// What fio and `kvring bench device` write in fio's schema is a run like any other.
#[test]
fn a_report_is_made_of_jobs_too() {
    let place = Place::new();
    let run = |name: &str| {
        let jobs = place.path("small.fio");
        std::fs::write(&jobs, "[small]\nioengine=sim\nsize=1m\nrw=rw\n").unwrap();
        let arguments = ["bench", "device", jobs.to_str().unwrap()];
        let output = place.path(name).display().to_string();
        let more = ["--output-format=json", "--output", &output];
        let said = place.kvring(&[&arguments[..], &more].concat()).output().unwrap();
        assert!(said.status.success(), "{}", text(&said));
        output
    };
    let (ours, theirs) = (run("ours.json"), run("theirs.json"));
    // As fio writes it: nothing of kvring's.
    let mut fio: serde_json::Value = serde_json::from_slice(&std::fs::read(&theirs).unwrap()).unwrap();
    assert!(fio.as_object_mut().unwrap().remove("kvring").unwrap()["kernel"].is_string());
    fio["fio version"] = "fio-3.33".into();
    std::fs::write(&theirs, fio.to_string()).unwrap();
    for (runs, parts) in [
        (vec![&ours], vec!["<h2>Figures</h2>", "small read, p99", "small write: how long", "<td>kernel</td>"]),
        (vec![&ours, &theirs], vec!["<h2>Compared</h2>", "small read, p99", "fio-3.33", "<svg"]),
    ] {
        let page = page_of(&place, &runs.iter().map(|run| run.as_str()).collect::<Vec<_>>());
        for part in parts {
            assert!(page.contains(part), "no {part:?} in the page of {runs:?}");
        }
    }
}
