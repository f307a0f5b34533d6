//! `kvring doctor` looks, says what mends it, and leaves nothing.

use super::*;

/// What it found: check, level, words, remedy.
fn diagnosis(command: &mut Command) -> (i32, Vec<[String; 4]>) {
    let output = command.output().unwrap();
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).expect("JSON on standard output");
    let word = |finding: &serde_json::Value, name: &str| finding[name].as_str().unwrap_or_default().to_owned();
    let words = |finding| ["check", "level", "found", "remedy"].map(|name| word(finding, name));
    (output.status.code().unwrap(), findings.iter().map(words).collect())
}

/// The remedy of the one problem that there is with a check.
fn remedy(place: &Place, check: &str, arguments: &[&str]) -> String {
    let (code, findings) = diagnosis(place.kvring(&["doctor", "--json"]).args(arguments));
    assert_eq!(code, 2, "a server would not start: {findings:?}");
    let of_check = |finding: &&[String; 4]| finding[0] == check && finding[1] == "problem";
    let mut problems = findings.iter().filter(of_check);
    let (problem, other) = (problems.next().unwrap_or_else(|| panic!("{check}: {findings:?}")), problems.next());
    assert_eq!(other, None, "one problem, said once");
    problem[3].clone()
}

#[test]
fn a_place_that_will_do_and_a_server_that_is_there() {
    let mut place = Place::new();
    let before = std::fs::read_dir(place.dir.path()).unwrap().count();
    let (code, findings) = diagnosis(&mut place.kvring(&["doctor", "--json"]));
    assert!(code < 2, "{findings:?}");
    for check in [
        "configuration",
        "socket",
        "kernel",
        "io_uring",
        "limits",
        "hugepages",
        "memory",
        "ssd",
        "cpu",
        "numa",
        "gpu",
        "vfio",
    ] {
        assert!(findings.iter().any(|finding| finding[0] == check), "{check}: {findings:?}");
    }
    for [check, level, found, remedy] in &findings {
        assert!(!found.is_empty(), "{check}, {level}");
        match level.as_str() {
            "ok" => assert_eq!(remedy, "", "{check}: {found}"),
            // Of a note where there is something to be done: nothing is, of no GPU and of GPUs on every node.
            "note" => assert!(!remedy.is_empty() || check == "gpu" || check == "numa", "{check}: {found}"),
            _ => assert!(!remedy.is_empty(), "{check}, {level}: {found}"),
        }
    }
    assert_eq!(std::fs::read_dir(place.dir.path()).unwrap().count(), before, "it leaves nothing");
    place.serve(&["--block-kib", "64"]);
    let (code, findings) = diagnosis(&mut place.kvring(&["doctor", "--json"]));
    let says = |words: &str| findings.iter().any(|finding| finding[2].contains(words));
    assert!(code < 2 && says("listens there"), "{findings:?}");
    place.kill_all();
    let dead = || diagnosis(&mut place.kvring(&["doctor", "--json"])).1;
    eventually("a dead server's socket is told from a live one's", || {
        dead().iter().any(|finding| finding[2].contains("a dead server's"))
    });
    let text = text(&place.kvring(&["doctor"]).output().unwrap());
    assert!(text.contains("ok      configuration"), "{text}");
}

#[test]
fn what_keeps_a_server_from_starting_comes_with_what_mends_it() {
    let place = Place::new();
    let file = place.path("file");
    std::fs::write(&file, "").unwrap();
    let under_a_file = file.join("ssd");
    assert!(remedy(&place, "ssd", &["--ssd-cache-dir", under_a_file.to_str().unwrap()]).contains("ssd_cache_dir"));
    assert!(remedy(&place, "ssd", &["--ssd-cache-gb", "1000000"]).contains("ssd_cache_gb"));
    assert!(remedy(&place, "memory", &["--cpu-cache-gb", "100000"]).starts_with("cpu_cache_gb = "));
    let hugepages = remedy(&place, "hugepages", &["--hugepages", "require", "--cpu-cache-gb", "100000"]);
    assert!(hugepages.starts_with("cpu_cache_gb = "), "no machine has so many: {hugepages}");
    let hugepages = remedy(&place, "hugepages", &["--hugepages", "require", "--cpu-cache-gb", "0.5"]);
    assert!(hugepages.starts_with("echo ") && hugepages.ends_with("/nr_hugepages"), "{hugepages}");
    assert!(
        remedy(&place, "socket", &["--server-recv-port", "/nowhere/at/all/s"]).starts_with("mkdir -p /nowhere/at/all")
    );
    assert!(remedy(&place, "configuration", &["--cpu-cache-gb", "much"]).contains("docs/CONFIG.md"));
}

#[test]
fn every_setting_with_where_it_was_said() {
    let mut place = Place::new();
    let file = place.path("kvring.toml");
    std::fs::write(&file, "spin_us = 77\nlease_ttl_ms = 5000\n").unwrap();
    let shown = |place: &Place| -> Vec<serde_json::Value> {
        let mut command = place.kvring(&["config", "--json", "--lease-ttl-ms", "6000", "--config"]);
        let output =
            command.arg(&file).env("FLEXKV_CPU_CACHE_GB", "3").env_remove("KVRING_CPU_CACHE_GB").output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let of = |all: &[serde_json::Value], name: &str| -> [String; 3] {
        let line = all.iter().find(|line| line["name"] == name).unwrap_or_else(|| panic!("{name}"));
        ["value", "origin", "server"].map(|field| line[field].as_str().unwrap_or_default().to_owned())
    };
    let alone = shown(&place);
    assert_eq!(alone.len(), kvring_ipc::config::SETTINGS.len());
    assert_eq!(of(&alone, "cpu_cache_gb"), ["3", "FLEXKV_CPU_CACHE_GB", ""]);
    assert_eq!(of(&alone, "spin_us"), ["77", file.to_str().unwrap(), ""]);
    assert_eq!(of(&alone, "lease_ttl_ms"), ["6000", "--lease-ttl-ms", ""]);
    assert_eq!(of(&alone, "crash_limit")[1], "default");
    place.serve(&["--block-kib", "64"]);
    let beside = shown(&place);
    let has = of(&beside, "cpu_cache_gb")[2].clone();
    let told = place.settings().into_iter().find(|(name, _)| *name == "cpu_cache_gb").unwrap().1;
    assert_eq!(has, told, "the server was told otherwise");
    assert_eq!(of(&beside, "crash_limit")[2], "", "and here it was not");
}

/// Runs what a shell would.
fn shell(command: &str) {
    let status = Command::new("sh").args(["-c", command]).status().unwrap();
    assert!(status.success(), "{command}");
}

#[test]
fn what_nobody_will_open_is_found_with_its_size_and_gone_after_the_command() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let mut agent = place.agent(0, &[]);
    assert_eq!(store(&mut agent, &chain("a", 40)), 40);
    drop(agent);
    // Of a server that is there nothing is stale, whatever its directory holds.
    let extra = place.path("ssd").join("kvring.cache.7");
    std::fs::write(&extra, vec![1; 3 << 20]).unwrap();
    let stale = |place: &Place, arguments: &[&str]| -> Vec<[String; 4]> {
        let found = diagnosis(place.kvring(&["doctor", "--json"]).args(arguments)).1;
        found.into_iter().filter(|finding| finding[0] == "stale").collect()
    };
    assert_eq!(stale(&place, &[]), Vec::<[String; 4]>::new());
    place.kill_all();
    eventually("the lock of the dead is free, and what they left is told", || {
        stale(&place, &[]).iter().any(|found| found[1] == "note") && stale(&place, &[]).len() == 2
    });
    let found = stale(&place, &[]);
    let [beside, beyond] = &found[..] else { panic!("{found:?}") };
    assert!(beside[2].contains("s.lock") && beside[2].contains("KiB"), "{beside:?}");
    assert!(beyond[2].contains("beyond the 1 that its superblock counts: 3.0 MiB"), "{beyond:?}");
    assert_eq!(beyond[3], format!("rm {}", extra.display()));
    assert_eq!(beside[3], "", "the next server uses them");
    shell(&beyond[3]);
    assert!(!extra.exists() && exists(&place.socket()));
    let left = |arguments: &[&str]| {
        let mut found = stale(&place, arguments);
        found.retain(|finding| !finding[2].contains("of a server that has ended"));
        found
    };
    assert_eq!(left(&[]), Vec::<[String; 4]>::new(), "the cache itself is no leftover");
    // A configuration that does not open it says so, and what it takes; that it is to go it does not say.
    let unopened = left(&["--ssd-cache-gb", "0"]);
    assert!(
        matches!(&unopened[..], [one] if one[1] == "note" && one[2].contains("MiB") && !one[3].starts_with("rm ")),
        "{unopened:?}"
    );
    let other = place.path("other");
    let two = format!("{};{}", other.display(), place.path("ssd").display());
    let unopened = left(&["--ssd-cache-dir", &two]);
    assert!(unopened[0][2].contains("device 1 of a cache of 1, configured as 2 of 2"), "{unopened:?}");
    assert!(unopened[0][3].contains("in the order in which it was made"), "{unopened:?}");
    std::fs::write(&extra, vec![1; 4096]).unwrap();
    std::fs::remove_file(place.path("ssd").join("kvring.cache")).unwrap();
    let headless = left(&[]);
    assert!(headless[0][2].contains("without a superblock: 4 KiB"), "{headless:?}");
}

#[test]
fn a_driver_s_library_is_looked_for_where_it_is_said_to_be() {
    let place = Place::new();
    let of_gpu = |library: &str| {
        let found = diagnosis(place.kvring(&["doctor", "--json"]).args(["--cuda-driver", library])).1;
        found.into_iter().rfind(|finding| finding[0] == "gpu").unwrap()
    };
    let missing = of_gpu("/nowhere/libcuda.so.1");
    assert!(missing[1] == "warning" && missing[2].contains("/nowhere/libcuda.so.1"), "{missing:?}");
    let fake = kvring_fake_cuda::Fake::new();
    let there = of_gpu(fake.path().to_str().unwrap());
    assert!(there[1] == "ok" && there[2].contains("every call of ours"), "{there:?}");
}
