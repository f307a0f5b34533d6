//! What an operator can see: of a server that serves, that hangs, and that is dead.

use super::*;
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(output)))
}

impl Place {
    fn ask(&self, arguments: &[&str]) -> Output {
        self.kvring(arguments).output().unwrap()
    }
}

/// A server with room for 60 blocks in DRAM and none on an SSD, and 80 that were stored one after another.
fn a_full_place(arguments: &[&str]) -> (Place, DirectAgent<HostMemory>) {
    let mut place = Place::new();
    let small = ["--block-kib", "64", "--cpu-cache-gb", "0.003662109375", "--ssd-cache-gb", "0"];
    place.serve(&[&small, arguments].concat());
    let mut agent = place.agent(3, &[]);
    assert_eq!(store(&mut agent, &chain("old", 40)), 40);
    assert_eq!(load(&mut agent, &chain("old", 40)), 40);
    assert_eq!(store(&mut agent, &chain("new", 40)), 40);
    assert!(agent.match_prefix(&chain("old", 40)).blocks < 40, "some had to go");
    assert_eq!(agent.match_prefix(&chain("nobody's", 7)).blocks, 0);
    (place, agent)
}

#[test]
fn a_server_is_seen_while_it_serves_while_it_hangs_and_after_its_death() {
    let (place, agent) = a_full_place(&[]);
    let shown = json(&place.ask(&["stat", "--json"]));
    assert_eq!((&shown["health"], &shown["metrics"]["commit_blocks_count"]), (&"serving".into(), &80.into()));
    let session = shown["sessions"].as_array().unwrap().iter().find(|s| s["commit_blocks_count"] == 80).unwrap();
    assert_eq!(
        (session["instance_id"].as_u64(), session["pid"].as_u64()),
        (Some(3), Some(u64::from(std::process::id())))
    );
    let screen = text(&place.ask(&["stat"]));
    for part in ["serving", "60 slots of 64.00 KiB", "80 blocks", "lru", "load dram"] {
        assert!(screen.contains(part), "no {part:?} in {screen}");
    }
    // Hung: what it showed last is there, and that it hangs is said. The exit status is for scripts.
    let pid = place.server_pid();
    halt(pid);
    let hung = place.ask(&["stat", "--json"]);
    assert!(!hung.status.success());
    let now = json(&hung);
    assert_eq!((&now["health"], &now["metrics"]["commit_blocks_count"]), (&"hung".into(), &80.into()));
    assert!(text(&place.ask(&["stat"])).contains("HUNG: its process is stopped"));
    assert_eq!(
        json(&place.ask(&["sessions", "--json"])).as_array().unwrap().len(),
        shown["sessions"].as_array().unwrap().len()
    );
    assert!(text(&place.ask(&["explain"])).contains("had been evicted"));
    signal(pid, rustix::process::Signal::CONT);
    eventually("it serves", || place.ask(&["stat"]).status.success());
    // Dead: another engine process serves, and what the last one did can be read.
    let before = text(&place.ask(&["stat", "--previous"]));
    assert!(before.contains("there was no engine process before this one"), "{before}");
    signal(pid, rustix::process::Signal::KILL);
    eventually("another engine process serves", || place.stats().is_some_and(|stats| stats["server_pid"] != pid));
    let previous = json(&place.ask(&["stat", "--json", "--previous"]));
    assert_eq!((&previous["health"], &previous["metrics"]["commit_blocks_count"]), (&"dead".into(), &80.into()));
    assert_eq!(previous["server_pid"], pid);
    assert!(text(&place.ask(&["explain", "--previous"])).contains("had been evicted"));
    assert_eq!(json(&place.ask(&["stat", "--json"]))["metrics"]["commit_blocks_count"], 0);
    drop(agent);
}

#[test]
fn a_miss_is_explained_by_the_eviction_that_caused_it() {
    let (place, _agent) = a_full_place(&[]);
    let told = json(&place.ask(&["explain", "--json"]));
    assert_eq!(told["misses_by_reason"]["evicted"]["matches"], 1, "{told:#}");
    assert!(told["misses_by_reason"]["never_stored"]["matches"].as_u64() >= Some(1), "{told:#}");
    let misses = told["latest_misses"].as_array().unwrap();
    let evicted = misses.iter().find(|miss| miss["reason"] == "evicted").unwrap();
    // By its tag, and by the key of the block that was missing first.
    let tag = evicted["tag"].to_string();
    let session = evicted["session"].to_string();
    let by_tag = json(&place.ask(&["explain", "--json", "--tag", &tag, "--session", &session]));
    assert_eq!(by_tag["requests"][0]["missing_key"], evicted["missing_key"]);
    let key = evicted["missing_key"].as_str().unwrap();
    let by_key = text(&place.ask(&["explain", "--key", key]));
    let order = ["stored: it can be matched", "evicted from DRAM by lru: its last copy"].map(|part| by_key.find(part));
    assert!(order[0].is_some() && order[0] < order[1], "{by_key}");
    let missing = chain("old", 40)[evicted["served"].as_u64().unwrap() as usize];
    assert_eq!(key, missing.to_string(), "the first block that was missing, and no other");
    for (arguments, said) in [
        (vec!["explain", "--tag", "987654321"], "no request with tag 987654321"),
        (vec!["explain", "--key", "12"], "expected 32 hexadecimal digits"),
        (vec!["trace", "--last", "0"], "--last 0: expected seconds above 0"),
        (vec!["top", "--interval", "0"], "--interval 0: expected 0.05 to 60"),
    ] {
        let told = place.ask(&arguments);
        assert!(!told.status.success() && text(&told).contains(said), "{arguments:?}: {}", text(&told));
    }
}

#[test]
fn a_trace_is_one_that_perfetto_reads() {
    let (place, _agent) = a_full_place(&[]);
    let path = place.path("trace.json");
    let told = place.ask(&["trace", "--output", path.to_str().unwrap()]);
    assert!(told.status.success() && text(&told).contains("entries written"), "{}", text(&told));
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    // What the Trace Event Format asks of each event.
    for event in events {
        let phase = event["ph"].as_str().unwrap();
        assert!(
            ["M", "b", "e", "i"].contains(&phase)
                && event["name"].is_string()
                && event["pid"].is_u64()
                && event["tid"].is_u64()
        );
        assert!(phase == "M" || event["ts"].as_f64().is_some_and(|ts| ts > 0.0), "{event}");
        assert!(!["b", "e"].contains(&phase) || event["id"].is_u64() && event["cat"].is_string(), "{event}");
    }
    let ends = |phase: &str| events.iter().filter(|event| event["ph"] == phase).count();
    assert!(ends("b") > 0 && ends("b") == ends("e"));
    let named = |name: &str| events.iter().filter(|event| event["name"] == name).count();
    assert!(named("stored") == 80 && named("evicted from DRAM") >= 20 && named("match") >= 4, "{trace:#}");
    let all = json(&place.ask(&["trace"]))["traceEvents"].as_array().unwrap().len();
    let little = json(&place.ask(&["trace", "--last", "0.000001"]))["traceEvents"].as_array().unwrap().len();
    assert!(little < all && all >= events.len());
}

#[test]
fn without_a_recorder_that_is_said() {
    let (place, _agent) = a_full_place(&["--recorder-entries", "0"]);
    for command in ["explain", "trace"] {
        assert!(text(&place.ask(&[command])).contains("recorder_entries = 0"));
    }
    assert!(place.ask(&["stat"]).status.success());
}

fn scrape(path: &Path, request: &str) -> Option<String> {
    let mut stream = UnixStream::connect(path).ok()?;
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// Names of metrics in a text of theirs, and each with its value.
fn metrics_in(text: &str) -> Vec<(String, f64)> {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let parse = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
        (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("no number: {line}")))
    };
    lines.map(parse).collect()
}

#[test]
fn prometheus_reads_what_happened_and_the_dashboard_asks_for_nothing_else() {
    let mut place = Place::new();
    let path = place.path("m");
    let listen = format!("unix:{}", path.display());
    place.serve(&["--block-kib", "64", "--metrics-listen", &listen]);
    let get = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut agent = place.agent(2, &[]);
    assert_eq!(store(&mut agent, &chain("a", 40)), 40);
    assert_eq!(load(&mut agent, &chain("a", 40)), 40);
    assert_eq!(agent.match_prefix(&chain("nobody's", 3)).blocks, 0);
    eventually("written", || place.metric("ssd_write_bytes") >= 40 * BLOCK as u64);
    eventually("metrics are served", || scrape(&path, get).is_some());
    let answer = scrape(&path, get).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    assert!(body.ends_with("# EOF\n"), "OpenMetrics ends so");
    let metrics = metrics_in(body);
    let value = |name: &str| metrics.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name} in {body}")).1;
    assert_eq!(value("kvring_up"), 1.0);
    assert_eq!(value("kvring_commit_blocks_total"), 40.0);
    // Blocks of matches, both: `load` matches twice.
    assert_eq!(value("flexkv_py_cache_hit_blocks_total"), 80.0);
    assert_eq!(value("flexkv_py_cache_miss_blocks_total"), 3.0);
    assert_eq!(value("flexkv_py_transfer_blocks_total{transfer_type=\"D2H\",operation=\"put\"}"), 40.0);
    assert_eq!(value("kvring_device_write_bytes_total{device=\"0\"}"), 40.0 * BLOCK as f64);
    assert!(value("kvring_load_seconds_count{tier=\"dram\"}") >= 1.0);
    let of_session = metrics.iter().any(|(name, value)| {
        name.starts_with("kvring_session_commit_blocks_total{instance_id=\"2\",rank=\"0\"") && *value == 40.0
    });
    assert!(of_session, "{body}");
    let nobody = "0".repeat(32);
    assert_eq!(value(&format!("kvring_namespace_blocks{{namespace=\"{nobody}\"}}")), 40.0);
    assert_eq!(value(&format!("kvring_namespace_hit_blocks_total{{namespace=\"{nobody}\"}}")), 80.0);
    // A histogram's buckets add up, and the last has all.
    let buckets: Vec<f64> = metrics
        .iter()
        .filter(|(name, _)| name.starts_with("kvring_load_seconds_bucket") && name.contains("dram"))
        .map(|(_, v)| *v)
        .collect();
    assert!(buckets.is_sorted() && buckets.last() == Some(&value("kvring_load_seconds_count{tier=\"dram\"}")));
    // Every metric that the dashboard and the alerts name is there.
    let names: Vec<&str> = metrics.iter().map(|(name, _)| name.split('{').next().unwrap()).collect();
    let mut asked = 0;
    for file in ["dashboard.json", "alerts.yml"] {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/monitoring").join(file);
        let text = std::fs::read_to_string(&file).unwrap();
        for word in
            text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|word| word.starts_with("kvring_"))
        {
            assert!(names.contains(&word), "{} asks for {word}, which nobody has", file.display());
            asked += 1;
        }
    }
    assert!(asked > 20, "{asked}");
    for (request, said) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "400"),
        (&format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(9000)), "431"),
    ] {
        assert!(scrape(&path, request).unwrap().contains(said), "{request}");
    }
    // Who connects and says nothing costs others two seconds, not more.
    let silent = UnixStream::connect(&path).unwrap();
    assert!(scrape(&path, get).unwrap().contains("kvring_up 1"));
    drop(silent);
    // An upgrade, and a crash, take the address along.
    assert!(place.ask(&["upgrade"]).status.success());
    let has_epoch =
        |epoch: &str| scrape(&path, get).is_some_and(|answer| answer.contains(&format!("kvring_epoch {epoch}")));
    eventually("the next engine process serves metrics", || has_epoch("2.0"));
    signal(place.server_pid(), rustix::process::Signal::KILL);
    eventually("and the one after it", || has_epoch("3.0"));
}

#[test]
fn a_server_that_shows_nothing_is_up_as_long_as_it_answers() {
    // One that shows nothing at all, and one that waits for its first worker.
    for how in [&["--block-kib", "64", "--stats-segment", "off"][..], &[]] {
        let mut place = Place::new();
        let path = place.path("m");
        place.serve(&[&["--metrics-listen", &format!("unix:{}", path.display())], how].concat());
        let get = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        eventually("metrics are served", || scrape(&path, get).is_some());
        let answer = scrape(&path, get).unwrap();
        assert!(answer.contains("kvring_up 1") && !answer.contains("kvring_epoch"), "{answer}");
    }
}

/// However many matches there are, a line of counters comes about once a second; and it comes.
#[test]
fn counters_are_logged_by_matches_and_not_more_often_than_once_a_second() {
    let mut place = Place::new();
    let log = place.path("log");
    let file = std::fs::File::create(&log).unwrap();
    let mut command = place.kvring(&["serve", "--block-kib", "64", "--ssd-cache-gb", "0"]);
    command.args(["--num-log-interval-requests", "5", "--log-level", "info"]).stdout(Stdio::null()).stderr(file);
    place.children.push(command.spawn().unwrap());
    place.wait_for_server();
    let lines = || -> Vec<u64> {
        let text = std::fs::read_to_string(&log).unwrap();
        let of_line = |line: &str| line.split(" matches, ").next()?.rsplit(' ').next()?.parse().ok();
        text.lines().filter(|line| line.contains(" matches, ")).filter_map(of_line).collect()
    };
    let mut agent = place.agent(0, &[]);
    let began = Instant::now();
    // A line for every five of these would be a hundred lines.
    for _ in 0..500 {
        agent.match_prefix(&chain("nobody's", 1));
        // What wakes the control plane.
        assert!(place.stats().is_some());
    }
    // Less than five since the last line are not worth one.
    eventually("the last of them are counted", || lines().last().is_some_and(|last| last + 5 > 500));
    let (lines, seconds) = (lines(), began.elapsed().as_secs_f64());
    assert!(lines.len() as f64 <= seconds + 2.0, "{} lines in {seconds} s", lines.len());
    assert!(lines.windows(2).all(|two| two[0] + 5 <= two[1]), "{lines:?}");
}

#[test]
fn metrics_are_for_this_machine_only() {
    let place = Place::new();
    for wrong in ["0.0.0.0:9464", "192.168.1.1:80", "9464", "unix:relative", "localhost"] {
        let told = place.ask(&["serve", "--metrics-listen", wrong]);
        assert!(!told.status.success() && text(&told).contains("metrics_listen"), "{wrong}: {}", text(&told));
        assert!(text(&told).contains("loopback"), "{}", text(&told));
    }
    let mut place = Place::new();
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0", "--metrics-listen", "127.0.0.1:0"]);
    assert!(place.stats().is_some());
}

/// `top` on a terminal of its own (script, of util-linux).
#[test]
fn top_draws_on_a_terminal_and_ends_when_it_is_told_to() {
    let (place, _agent) = a_full_place(&[]);
    let drawn = place.path("typescript");
    let top = format!("stty rows 40 cols 130; exec {KVRING} top --interval 0.1 --socket {}", place.socket().display());
    let mut command = Command::new("script");
    command.args(["-q", "-e", "-c", &top]).arg(&drawn).env("TERM", "xterm-256color");
    let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(mut child) = child else {
        println!("skipped: no script(1) here to give it a terminal");
        return;
    };
    let shows = |words: &str| {
        let bytes = std::fs::read(&drawn).unwrap_or_default();
        String::from_utf8_lossy(&bytes).contains(words)
    };
    eventually("it draws", || shows("serving") && shows("sessions:"));
    let pid = place.server_pid();
    halt(pid);
    eventually("it says that the server hangs", || shows("HUNG"));
    signal(pid, rustix::process::Signal::CONT);
    child.stdin.take().unwrap().write_all(b"psq").unwrap();
    let mut status = None;
    eventually("it ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success(), "{status:?}");
}
