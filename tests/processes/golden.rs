//! Interfaces that people and scripts know by heart: help texts, and what JSON looks like. A change of one is a change of
//! these files: `KVTEST_BLESS=1 cargo test -p kvring --test processes golden` writes them anew.

use super::*;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write;

fn same(name: &str, now: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    if std::env::var_os("KVTEST_BLESS").is_some() {
        std::fs::write(&path, now).unwrap();
    }
    let then = std::fs::read_to_string(&path).unwrap_or_default();
    for (number, (then, now)) in (1..).zip(then.lines().zip(now.lines())) {
        assert_eq!(then, now, "{name}:{number} (KVTEST_BLESS=1 if that is meant)");
    }
    assert_eq!(then.lines().count(), now.lines().count(), "{name} has other lines (KVTEST_BLESS=1 if that is meant)");
}

#[test]
fn help_texts() {
    let place = Place::new();
    let commands = [
        "",
        "serve",
        "replay",
        "selftest",
        "bench",
        "bench device",
        "bench cache",
        "bench ring",
        "bench dram",
        "bench copy",
        "bench ssd",
        "bench evict",
        "bench checksum",
        "bench instruments",
        "bench crash",
        "bench recover",
        "report",
        "stat",
        "top",
        "sessions",
        "devices",
        "explain",
        "trace",
        "blocks",
        "namespaces",
        "drain",
        "evict",
        "reset",
        "config",
        "stop",
        "upgrade",
        "resize",
        "verify",
        "fsck",
        "doctor",
    ];
    let mut all = String::new();
    for command in commands {
        let arguments: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let output = place.kvring(&arguments).output().unwrap();
        assert!(output.status.success(), "{command}: {}", text(&output));
        let help = String::from_utf8(output.stdout).unwrap();
        // The settings are one table, the same in each, and in docs/CONFIG.md.
        let own = help.split("Settings (also KVRING_*").next().unwrap();
        let _ = writeln!(all, "=== kvring {command} --help\n{}", own.trim_end());
    }
    same("help.txt", &all);
}

/// Every path of a JSON value with its type; of a list, that of its elements.
fn shape(value: &Value, path: &str, into: &mut BTreeSet<String>) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(items) => return items.iter().for_each(|item| shape(item, &format!("{path}[]"), into)),
        Value::Object(map) => {
            return map.iter().for_each(|(name, value)| shape(value, &format!("{path}.{name}"), into));
        }
    };
    into.insert(format!("{path}: {kind}"));
}

fn write_shape(all: &mut String, what: &str, value: &Value) {
    let mut paths = BTreeSet::new();
    shape(value, "", &mut paths);
    // What this run happened to hold or not, and this machine to be.
    let happens = [".ago_s", "settings.", ".doubts", ".remedy", ".windows.", ".series"];
    paths.retain(|path| !happens.iter().any(|part| path.contains(part)) && !path.ends_with(": null"));
    let _ = writeln!(all, "=== kvring {what}");
    for path in &paths {
        let _ = writeln!(all, "{path}");
    }
}

#[test]
fn json_schemas() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64", "--cpu-cache-gb", "0.003662109375"]);
    let mut agent = place.agent(5, &[]);
    for name in ["a", "b", "c"] {
        assert_eq!(store(&mut agent, &chain(name, 40)), 40);
        eventually("written", || place.metric("ssd_write_bytes") >= place.metric("commit_blocks_count") * BLOCK as u64);
    }
    assert_eq!(load(&mut agent, &chain("a", 40)), 40);
    assert_eq!(agent.match_prefix(&chain("nobody's", 3)).blocks, 0);
    let mut all = String::new();
    for arguments in [
        &["stat", "--json"][..],
        &["sessions", "--json"],
        &["devices", "--json"],
        &["explain", "--json"],
        &["trace"],
        &["blocks", "--json", "--limit", "1"],
        &["config", "--json", "--said"],
        &[
            "bench",
            "device",
            "--ioengine=sim",
            "--size=1m",
            "--rw=rw",
            "--output-format=json",
            "--percentile_list=50:99",
        ],
        &["namespaces", "--json"],
        &["explain", "--json", "--key", &chain("a", 40)[3].to_string()],
        &["verify", "--json"],
        &["doctor", "--json"],
        &["bench", "ring", "--json", "--seconds", "0.05"],
        &["replay", "--json", "--requests", "60", "--block-kib", "64", "--output", "run.json"],
    ] {
        let output = place.kvring(arguments).current_dir(place.dir.path()).output().unwrap();
        // What the doctor finds is this machine's.
        assert!(output.status.success() || arguments[0] == "doctor", "{arguments:?}: {}", text(&output));
        write_shape(&mut all, &arguments.join(" "), &serde_json::from_slice(&output.stdout).unwrap());
    }
    let saved = std::fs::read(place.path("run.json")).unwrap();
    write_shape(&mut all, "... --output run.json: what it saves", &serde_json::from_slice(&saved).unwrap());
    same("schemas.txt", &all);
}
