//! The main job: a replay over DRAM and SSD with real instance processes, every byte compared.

use super::*;

fn replay(arguments: &[&str]) -> serde_json::Value {
    let place = Place::new();
    let mut command =
        place.kvring(&["replay", "--json", "--block-kib", "16", "--cpu-cache-gb", "0.05", "--ssd-cache-gb", "0.3"]);
    let output = command.env_remove("KVRING_INSTANCE_NUM").args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn check(report: &serde_json::Value) {
    let count = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name} is missing in {report}"));
    assert_eq!(count("wrong_blocks"), 0);
    assert!(count("blocks_hit_dram") > 0 && count("blocks_hit_ssd") > 0, "both tiers serve: {report}");
    let hit = count("blocks_requested") - count("blocks_missed");
    assert!((report["hit_ratio"].as_f64().unwrap() - hit as f64 / count("blocks_requested") as f64).abs() < 1e-9);
    assert_eq!(count("bytes_stored"), count("blocks_stored") * (16 << 10));
    assert!(
        count("bytes_loaded") > 0 && report["elapsed_s"].as_f64().unwrap() > 0.0 && report["server_cpu_s"].is_f64()
    );
    for latency in ["match_us", "load_us"] {
        let at = |q: &str| report[latency][q].as_f64().unwrap();
        assert!(
            at("p50") > 0.0
                && at("p50") <= at("p90")
                && at("p90") <= at("p99")
                && at("p99") <= at("p999")
                && at("p999") <= at("max")
        );
    }
    assert_eq!(count("requests_without_server"), 0);
}

#[test]
fn the_generator_with_three_instances() {
    let report = replay(&["--requests", "600", "--instances", "3"]);
    assert_eq!(report["requests"], 600);
    check(&report);
}

#[test]
fn the_generator_through_libaio() {
    check(&replay(&["--requests", "400", "--io-engine", "aio"]));
}

#[test]
fn several_directories_and_files() {
    let place = Place::new();
    let dirs = format!("{};{}", place.path("x").display(), place.path("y").display());
    check(&replay(&["--requests", "400", "--ssd-cache-dir", &dirs, "--max-file-size-gb", "0.04"]));
    assert!(exists(&place.path("x/kvring.cache.2")) && exists(&place.path("y/kvring.cache.2")));
}

#[test]
fn the_real_trace_where_it_is_present() {
    let trace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/mooncake_conversation_trace.jsonl");
    if !trace.is_file() {
        println!("skipped: {} is not here", trace.display());
        return;
    }
    let report = replay(&[trace.to_str().unwrap(), "--requests", "1500"]);
    assert_eq!(report["requests"], 1500);
    check(&report);
}

#[test]
fn a_server_that_runs_already_is_used_and_left_running() {
    let mut place = Place::new();
    let pid = place.serve(&["--block-kib", "64"]);
    let output = place.kvring(&["replay", "--json", "--requests", "50"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(place.server_pid(), pid);
    let output = place.kvring(&["replay", "--json", "--requests", "50", "--block-kib", "32"]).output().unwrap();
    assert!(
        !output.status.success() && text(&output).contains("block_bytes: the server has 65536, this instance 32768"),
        "{}",
        text(&output)
    );
}
