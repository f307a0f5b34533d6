//! Who may attach, and how much of the server one of them can have (docs/THREATS.md).

use super::*;
use kvring_ipc::handshake::{Attach, Channel};
use kvring_ipc::instance::Reserved;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;

fn mode_of(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

/// `kvring stat` of this place by a user, from a directory and a program that everybody may use.
fn status_by(place: &Place, uid: u32, gid: u32) -> Output {
    run_by(place, uid, gid, &["stat", "--json"])
}

fn run_by(place: &Place, uid: u32, gid: u32, arguments: &[&str]) -> Output {
    let open = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    open(place.dir.path(), 0o755);
    let program = std::env::temp_dir().join(format!("kvring-{}-{uid}-{gid}", std::process::id()));
    std::fs::copy(KVRING, &program).unwrap();
    open(&program, 0o755);
    let mut command = Command::new(&program);
    command.args(arguments).args(["--socket", &place.socket().display().to_string()]);
    command.current_dir("/").uid(uid).gid(gid).stdin(Stdio::null());
    let output = not_busy(|| command.output());
    std::fs::remove_file(program).unwrap();
    output
}

/// A place that every user can reach, so that only the socket keeps them out; as root only.
fn open_place() -> Option<Place> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be somebody else");
        return None;
    }
    let dir = tempfile::Builder::new().prefix("kvring-").tempdir_in(std::env::temp_dir()).unwrap();
    Some(Place { dir, children: Vec::new() })
}

const NOBODY: u32 = 65534;

#[test]
fn another_user_is_kept_out_unless_his_group_is_allowed() {
    let Some(mut place) = open_place() else { return };
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0"]);
    assert_eq!(mode_of(&place.socket()), 0o600);
    let output = status_by(&place, NOBODY, NOBODY);
    assert!(!output.status.success() && text(&output).contains("ermission denied"), "{}", text(&output));
    assert!(place.kvring(&["stop"]).output().unwrap().status.success());

    let Some(mut place) = open_place() else { return };
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0", "--allowed-groups", "12345"]);
    assert_eq!((mode_of(&place.socket()), place.socket().metadata().unwrap().gid()), (0o660, 12345));
    assert!(status_by(&place, NOBODY, 12345).status.success(), "a member may");
    // What names others' blocks, or changes anything, is the server's user's.
    let key = chain("a", 1)[0].to_string();
    let mut agent = place.agent(0, &[]);
    assert_eq!(store(&mut agent, &chain("a", 1)), 1);
    for arguments in [
        &["blocks"][..],
        &["explain"],
        &["trace"],
        &["sessions"],
        &["drain"],
        &["evict", "--key", &key],
        &["evict", "--tier", "dram", "--blocks", "1"],
        &["reset", "--all"],
        &["reset", "--namespace", "00000000000000000000000000000000"],
        &["namespaces"],
        &["resize", "--dram", "1"],
        &["stop"],
        &["upgrade"],
    ] {
        let output = run_by(&place, NOBODY, 12345, arguments);
        let said = text(&output);
        assert!(!output.status.success() && said.contains("only the server's user may"), "{arguments:?}: {said}");
    }
    let output = run_by(&place, NOBODY, 12345, &["verify"]);
    assert!(!output.status.success() && text(&output).contains("only the server's user may"), "{}", text(&output));
    assert_eq!(load(&mut agent, &chain("a", 1)), 1, "nobody has evicted anything");
    drop(agent);
    assert!(!status_by(&place, NOBODY, NOBODY).status.success());

    let Some(mut place) = open_place() else { return };
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0", "--allowed-groups", "12345;23456"]);
    assert_eq!(mode_of(&place.socket()), 0o666, "who it is, is asked of each");
    assert!(status_by(&place, NOBODY, 23456).status.success());
    let output = status_by(&place, NOBODY, NOBODY);
    assert!(!output.status.success() && text(&output).contains("allowed_groups"), "{}", text(&output));
}

/// `GET /metrics` at a path by a user.
fn scraped_by(path: &Path, uid: u32, gid: u32) -> String {
    let get = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
               s.sendall(b'GET /metrics HTTP/1.1\\r\\n\\r\\n')\nprint(s.makefile().read())";
    let mut command = Command::new("python3");
    command.args(["-c", get]).arg(path).current_dir("/").uid(uid).gid(gid).stdin(Stdio::null());
    text(&command.output().unwrap())
}

#[test]
fn metrics_at_a_path_are_for_those_who_may_attach() {
    // Groups that are allowed, the socket's mode, and whether a member, and a stranger, is told.
    for (groups, mode, member) in [("none", 0o600, false), ("12345", 0o660, true), ("12345;23456", 0o666, true)] {
        let Some(mut place) = open_place() else { return };
        let path = place.path("m");
        let listen = format!("unix:{}", path.display());
        place.serve(&["--ssd-cache-gb", "0", "--allowed-groups", groups, "--metrics-listen", &listen]);
        std::fs::set_permissions(place.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        eventually("metrics are served", || path.exists() && scraped_by(&path, 0, 0).contains("kvring_up"));
        assert_eq!(mode_of(&path), mode, "{groups}");
        assert_eq!(scraped_by(&path, NOBODY, 12345).contains("kvring_up"), member, "{groups}");
        assert!(!scraped_by(&path, NOBODY, NOBODY).contains("kvring_up"), "{groups}");
    }
}

#[test]
fn a_process_has_a_bounded_number_of_sessions_and_connections() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0"]);
    let attach = |token: String| {
        Request::Attach(Attach {
            protocol: kvring_ipc::wire::PROTOCOL_VERSION,
            instance_id: 3,
            instance_token: token,
            rank: 0,
            layout: Some(layout()),
        })
    };
    let connect = || Channel::connect(&place.socket(), Duration::from_secs(2)).unwrap();
    let mut channels = Vec::new();
    let refused = loop {
        let channel = connect();
        channel.send(&attach("one".into()), &[]).unwrap();
        match channel.receive::<Reply>(true).unwrap().0 {
            Reply::Welcome(_) => channels.push(channel),
            Reply::Refused { reason, .. } => break reason,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(channels.len(), kvring_engine::limits::SESSIONS_PER_PEER_MAX, "{refused}");
    assert!(refused.contains("sessions"), "{refused}");
    // Others are served all the same: an instance in a process of its own.
    let mut other = place.holder(1);
    eventually("another process has a session", || place.metric("sessions_count") == channels.len() as u64 + 1);
    other.kill().unwrap();
    other.wait().unwrap();
    // Connections that ask nothing: the next one is told, and room comes back with time.
    let silent: Vec<Channel> = (0..kvring_engine::limits::ASKERS_PER_PEER_MAX).map(|_| connect()).collect();
    std::thread::sleep(Duration::from_millis(200));
    let one_more = connect();
    let _ = one_more.send(&Request::Stats, &[]);
    let answer = one_more.receive::<Reply>(true);
    assert!(matches!(answer, Ok((Reply::Refused { .. }, _))), "{answer:?}");
    eventually("the silent ones are dropped", || place.stats().is_some());
    drop(silent);
}

#[test]
fn nobody_frees_another_s_slots_by_saying_that_it_is_drained() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0"]);
    let mut holder = place.holder(1);
    eventually("it holds slots", || place.metric("reserve_blocks_count") == 10);
    signal(place.server_pid(), rustix::process::Signal::KILL);
    eventually("another takes over", || place.stats().is_some_and(|stats| stats["epoch"] == 2));
    eventually("they wait for it", || place.metric("host_slots_quarantined_count") == 10);
    let mut liar = Instance::open(place.config(2, &[("ssd_cache_gb", "0")]), layout(), 0).unwrap();
    for session in 0..10 {
        liar.session().unwrap().tell_drained(session);
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(place.metric("host_slots_quarantined_count"), 10);
    holder.kill().unwrap();
    holder.wait().unwrap();
}

/// A server that answers, but late: it runs for 9 ms and stands still for 9, so that each answer comes in time and many do
/// not. What a call may wait is for the call, however many batches it is made of.
#[test]
fn no_call_of_many_batches_waits_for_each_of_them() {
    let mut place = Place::new();
    let pid = place.serve(&["--block-kib", "4", "--ssd-cache-gb", "0", "--cpu-cache-gb", "0.0625"]);
    let config = [("client_wait_ms", "20"), ("server_launch_mode", "external"), ("ssd_cache_gb", "0")];
    let mut instance = Instance::open(place.config(1, &config), Layout::opaque(4096), 0).unwrap();
    let keys = chain("a", 8192);
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut longest = Duration::ZERO;
    let mut granted = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                signal(pid, rustix::process::Signal::STOP);
                std::thread::sleep(Duration::from_millis(9));
                signal(pid, rustix::process::Signal::CONT);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        for _ in 0..10 {
            let mut timed = |call: &mut dyn FnMut(&mut Instance)| {
                let from = Instant::now();
                call(&mut instance);
                longest = longest.max(from.elapsed());
            };
            let mut held = Vec::new();
            timed(&mut |i| {
                let slots = i.reserve(BlockKey::default(), 0, &keys).into_iter();
                held =
                    slots.filter_map(|slot| if let Reserved::Slot(slot) = slot { Some(slot) } else { None }).collect();
            });
            granted += held.len();
            timed(&mut |i| {
                i.commit(&held);
            });
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    println!("longest {longest:?}, {granted} slots granted");
    // 32 batches of up to 20 ms each were 300 ms and more.
    assert!(longest < Duration::from_millis(120), "{longest:?}");
    eventually("and no slot is lost", || {
        instance.match_prefix(&keys[..1]);
        instance.is_connected()
            && place.metric("host_slots_filling_count") == 0
            && place.metric("host_slots_free_count") + place.metric("blocks_count") == place.metric("host_slots_count")
    });
}

/// Another user's processes have a share of the sessions together, however many they are.
#[test]
fn a_user_has_a_bounded_number_of_sessions() {
    use kvring_engine::limits::SESSIONS_PER_USER_MAX;
    let Some(mut place) = open_place() else { return };
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0", "--allowed-groups", "12345"]);
    std::fs::set_permissions(place.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = place.path("many");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    for number in 1..5 {
        let mut command = Command::new(&program);
        command.args(["security::one_with_many_sessions", "--exact", "--ignored", "--test-threads=1"]);
        command.env("KVTEST_DIR", place.dir.path()).env("KVTEST_SEED", "0").env("KVTEST_INSTANCE", number.to_string());
        command
            .current_dir("/")
            .uid(NOBODY)
            .gid(12345)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        place.children.push(not_busy(|| command.spawn()));
    }
    let limit = SESSIONS_PER_USER_MAX as u64;
    eventually("they have all that they may", || place.metric("sessions_count") == limit);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(place.metric("sessions_count"), limit, "four processes of fifty each");
    let mut agent = place.agent(0, &[]);
    assert_eq!(store(&mut agent, &chain("a", 3)), 3, "and the server's user is served");
}

#[test]
#[ignore = "played in a process of its own"]
fn one_with_many_sessions() {
    let Some((dir, instance_id, _)) = role() else { return };
    let attach = Attach {
        protocol: kvring_ipc::wire::PROTOCOL_VERSION,
        instance_id,
        instance_token: instance_id.to_string(),
        rank: 0,
        layout: Some(layout()),
    };
    let connect = |_| kvring_ipc::client::Session::connect(&dir.join("s"), &attach, Duration::from_secs(5), None).ok();
    let sessions: Vec<_> = (0..50).filter_map(connect).collect();
    loop {
        std::thread::sleep(Duration::from_secs(1));
        assert!(!sessions.is_empty());
    }
}

/// A server that was slow for a moment is told all the same of slots that were filled meanwhile: else it would take them for
/// being filled, and nobody could store these blocks, for as long as the session lasts.
#[test]
fn a_commit_reaches_a_server_that_owes_answers() {
    let mut place = Place::new();
    let pid = place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0"]);
    let config = [("client_wait_ms", "10"), ("server_launch_mode", "external"), ("ssd_cache_gb", "0")];
    let mut instance = Instance::open(place.config(1, &config), layout(), 0).unwrap();
    let keys = chain("a", 300);
    for round in 0..3 {
        let blocks = &keys[..[8, 100, 300][round]];
        let mut held: Vec<_> = Vec::new();
        eventually("slots are granted", || {
            let granted = instance.reserve(BlockKey::default(), 0, blocks);
            held.extend(granted.into_iter().filter_map(|slot| match slot {
                Reserved::Slot(slot) => Some(slot),
                _ => None,
            }));
            held.len() + place.metric("blocks_count") as usize - place.metric("host_slots_filling_count") as usize
                == blocks.len()
        });
        for slot in &held {
            let pool = instance.pool_of(*slot).unwrap();
            pool.copy_in(slot.grant.slot, 0, &[7; 64]);
        }
        halt(pid);
        assert_eq!(instance.match_prefix(blocks).blocks, 0, "nobody answers");
        assert_eq!(instance.commit(&held), 0, "nor says what was taken");
        signal(pid, rustix::process::Signal::CONT);
        eventually("they are resident", || instance.match_prefix(blocks).blocks as usize == blocks.len());
        assert_eq!(place.metric("host_slots_filling_count"), 0);
    }
}

/// An instance that cannot open what it is given leaves no session behind, however often it tries.
#[test]
fn whoever_cannot_open_a_session_does_not_have_one() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0"]);
    let poor = place.actor("security::one_without_descriptors", 1, 0).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&poor.stdout);
    assert!(poor.status.success() && said.contains("served after all"), "{said}");
    eventually("no session is left", || place.metric("sessions_count") == 0);
}

#[test]
#[ignore = "played in a process of its own"]
fn one_without_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Some((dir, _, _)) = role() else { return };
    let attach = Attach {
        protocol: kvring_ipc::wire::PROTOCOL_VERSION,
        instance_id: 1,
        instance_token: "poor".into(),
        rank: 0,
        layout: Some(layout()),
    };
    let connect = || kvring_ipc::client::Session::connect(&dir.join("s"), &attach, Duration::from_secs(5), None);
    let before = getrlimit(Resource::Nofile);
    let used = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    // One for the connection, and too few for the five that come over it.
    for spare in 1..5 {
        setrlimit(Resource::Nofile, Rlimit { current: Some(used - 1 + spare), ..before }).unwrap();
        for round in 0..40 {
            let failed = connect();
            assert!(failed.is_err(), "with {spare} to spare, round {round}");
        }
    }
    setrlimit(Resource::Nofile, before).unwrap();
    connect().expect("it is not locked out");
    println!("served after all");
}

/// Every call of an instance is bounded, whatever the server does: it is stopped, or dead.
#[test]
fn no_call_waits_longer_than_it_may() {
    let mut place = Place::new();
    let pid = place.serve(&["--block-kib", "64", "--ssd-cache-gb", "0"]);
    let keys = chain("a", 8);
    let config = [("client_wait_ms", "10"), ("server_launch_mode", "external"), ("ssd_cache_gb", "0")];
    let mut instance = Instance::open(place.config(1, &config), layout(), 0).unwrap();
    let mut agent = place.agent(2, &[("ssd_cache_gb", "0")]);
    assert_eq!(store(&mut agent, &keys), 8);
    let lease = instance.match_prefix(&keys).lease.unwrap();
    let mut longest: Vec<(&str, Duration)> = Vec::new();
    for state in ["stopped", "dead"] {
        if state == "stopped" {
            halt(pid);
        } else {
            signal(place.children[0].id(), rustix::process::Signal::KILL);
            signal(pid, rustix::process::Signal::KILL);
        }
        for round in 0..20 {
            let mut timed = |name: &'static str, call: &mut dyn FnMut(&mut Instance)| {
                let from = Instant::now();
                call(&mut instance);
                longest.push((name, from.elapsed()));
            };
            timed("match", &mut |i| assert_eq!(i.match_prefix(&keys).blocks, 0));
            timed("load", &mut |i| {
                let loaded = i.load(lease, 0, &keys, Duration::from_millis(10), |_| ());
                assert_eq!(loaded.blocks_missed, 8);
            });
            timed("reserve", &mut |i| drop(i.reserve(BlockKey::default(), 0, &chain("b", 8))));
            timed("prefetch", &mut |i| i.prefetch(lease, 0, 8));
            timed("events", &mut |i| drop(i.events(10)));
            if round == 19 {
                timed("release", &mut |i| i.release(lease));
            }
        }
    }
    longest.sort_by_key(|(_, took)| std::cmp::Reverse(*took));
    println!("longest: {:?}", &longest[..5]);
    // Ten times the bound, for a machine that runs many tests at once.
    assert!(longest[0].1 < Duration::from_millis(100), "{:?}", longest[0]);
}

#[test]
fn a_layout_of_any_length_costs_nobody_but_who_shows_it() {
    let mut place = Place::new();
    let pid = place.serve(&[]);
    for model in ["m".repeat(60_000), "\u{1}".repeat(4000), "\\".repeat(5000)] {
        let layout = Layout { model, ..layout() };
        let Err(error) = Instance::open(place.config(1, &[("start_wait_ms", "500")]), layout, 0) else {
            panic!("it was accepted")
        };
        assert!(error.to_string().contains("model has"), "{error}");
    }
    assert_eq!(place.server_pid(), pid, "nobody died of it");
    let mut agent = place.agent(2, &[]);
    assert_eq!(store(&mut agent, &chain("a", 3)), 3);
}

#[test]
fn pipes_and_links_in_the_place_of_files_are_refused_at_once() {
    let place = Place::new();
    let fifo = |path: &Path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    let lock = place.path("s.lock");
    fifo(&lock);
    let output = place.kvring(&["serve"]).output().unwrap();
    assert!(!output.status.success() && text(&output).contains("cannot lock"), "{}", text(&output));
    std::fs::remove_file(&lock).unwrap();
    std::fs::write(place.path("victim"), "precious").unwrap();
    std::os::unix::fs::symlink(place.path("victim"), &lock).unwrap();
    assert!(!place.kvring(&["serve"]).output().unwrap().status.success());
    assert_eq!(std::fs::read_to_string(place.path("victim")).unwrap(), "precious");
    std::fs::remove_file(&lock).unwrap();

    std::fs::create_dir(place.path("ssd")).unwrap();
    fifo(&place.path("ssd").join("kvring.cache"));
    let output = place.kvring(&["serve", "--block-kib", "64"]).output().unwrap();
    assert!(!output.status.success() && text(&output).contains("not a regular file"), "{}", text(&output));
    let output = place.kvring(&["fsck", place.path("ssd").to_str().unwrap()]).output().unwrap();
    assert_eq!(output.status.code(), Some(8), "{}", text(&output));
}

#[test]
fn a_log_that_nobody_reads_makes_nobody_wait() {
    let mut place = Place::new();
    let child = place.kvring(&["serve", "--block-kib", "64"]).env("KVRING_LOG_LEVEL", "trace").spawn().unwrap();
    place.children.push(child);
    place.wait_for_server();
    let layout = Layout { dtype: "another".into(), ..layout() };
    let mut agent = place.agent(1, &[]);
    store(&mut agent, &chain("a", 5));
    // More lines than a pipe holds, and nobody takes them.
    for _ in 0..2000 {
        let _ = ask(&place.socket(), &Request::Stats, Duration::from_secs(5)).unwrap();
    }
    for round in 0..30 {
        assert!(Instance::open(place.config(2, &[]), layout.clone(), 0).is_err());
        assert_eq!(load(&mut agent, &chain("a", 5)), 5, "round {round}");
    }
    assert!(place.kvring(&["stop"]).output().unwrap().status.success());
}
