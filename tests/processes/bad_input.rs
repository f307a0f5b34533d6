//! Bad input gets a clear error that names the field, the value and the remedy; nothing hangs.

use super::*;
use std::os::unix::process::CommandExt;

/// Runs `kvring serve` with these settings; it must fail, soon, and say all of these words.
fn refused(place: &Place, arguments: &[&str], words: &[&str]) {
    refused_by(place.kvring(&["serve", "--block-kib", "64"]).args(arguments), words);
}

fn refused_by(command: &mut Command, words: &[&str]) {
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("it serves, or hangs, where it should refuse: {words:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn impossible_settings() {
    let place = Place::new();
    refused(&place, &["--cpu-cache-gb", "lots"], &["cpu_cache_gb = \"lots\"", "--cpu-cache-gb", "expected GiB"]);
    refused(
        &place,
        &["--socket", "tcp://127.0.0.1:5555"],
        &["server_recv_port", "tcp://127.0.0.1:5555", "ipc:///path"],
    );
    refused(&place, &["--policy", "arc"], &["eviction_policy = \"arc\"", "lru, lfu, slru"]);
    refused(&place, &["--cpu-cache-gb", "0.00001"], &["cpu_cache_gb is too small", "raise cpu_cache_gb"]);
    refused(&place, &["--cpu-cache-gb", "200"], &["cpu_cache_gb", "cannot be had", "lower cpu_cache_gb"]);
    refused(&place, &["--ssd-cache-gb", "0.000001"], &["ssd_cache_gb is too small", "raise ssd_cache_gb"]);
    refused_by(
        place.kvring(&["serve"]).env("FLEXKV_CPU_CACHE_GBS", "1"),
        &["FLEXKV_CPU_CACHE_GBS", "the closest is FLEXKV_CPU_CACHE_GB"],
    );
    refused_by(&mut place.kvring(&["serve", "--layout", "{"]), &["--layout", "EOF"]);
}

#[test]
fn a_block_size_that_is_no_multiple_of_the_device_s() {
    let place = Place::new();
    let layout = serde_json::to_string(&Layout::opaque(6000)).unwrap();
    refused_by(
        &mut place.kvring(&["serve", "--layout", &layout]),
        &["block_bytes = 6000", "multiple", "tokens_per_block"],
    );
}

#[test]
fn a_block_size_that_makes_too_many_blocks() {
    let place = Place::new();
    let words = ["block_bytes = 4096", "whose index needs", "choose more tokens_per_block"];
    refused_by(&mut place.kvring(&["serve", "--block-kib", "4", "--ssd-cache-gb", "4000"]), &words);
    // Before anything was made for it.
    assert!(!exists(&place.path("ssd")));
}

#[test]
fn directories_and_disks() {
    let place = Place::new();
    std::fs::write(place.path("file"), "x").unwrap();
    let dir = place.path("file").display().to_string();
    refused(&place, &["--ssd-cache-dir", &dir], &["ssd_cache_dir", &dir, "may write to"]);
    refused(&place, &["--ssd-cache-dir", "/proc/kvring"], &["ssd_cache_dir /proc/kvring", "may write to"]);
    refused(&place, &["--ssd-cache-gb", "400"], &["ssd_cache_dir", "are needed", "lower ssd_cache_gb"]);
    assert!(!exists(&place.path("ssd/kvring.cache")), "what does not fit takes nothing");
}

#[test]
fn a_cache_file_of_something_else() {
    let mut place = Place::new();
    std::fs::create_dir(place.path("ssd")).unwrap();
    std::fs::write(place.path("ssd/kvring.cache"), vec![7; 1 << 20]).unwrap();
    refused(&place, &[], &["kvring.cache was made for something else", "ssd_on_mismatch = reset"]);
    place.serve(&["--block-kib", "64", "--ssd-on-mismatch", "reset"]);
    assert!(place.kvring(&["stop"]).status().unwrap().success());
    // Another size is taken as it is, as far as there is room for its headers.
    let other = ["--ssd-cache-gb", "4"];
    refused(&place, &other, &["was made for something else", "it can grow to", "configured"]);
}

#[test]
fn hugepages_that_are_not_there() {
    let place = Place::new();
    // More than any test machine reserves.
    let arguments = ["--hugepages", "require", "--hugepage-size-bytes", "1073741824", "--cpu-cache-gb", "512"];
    refused(&place, &arguments, &["hugepages = require", "512 hugepages of 1073741824", "nr_hugepages"]);
}

#[test]
fn a_memlock_limit() {
    if kvring_engine::device::uring::probe().is_err() {
        println!("skipped: no io_uring here, so nothing is locked");
        return;
    }
    let place = Place::new();
    let mut command = place.kvring(&["serve", "--block-kib", "64"]);
    without_memlock(&mut command);
    refused_by(
        &mut command,
        &["fixed_buffers = on", "memlock limit is 65536 bytes", "ulimit -l", "fixed_buffers = off"],
    );
}

/// A process that may lock 64 KiB, and has not the capability to lock more.
#[expect(unsafe_code, reason = "what a child does between fork and exec")]
fn without_memlock(command: &mut Command) {
    const CAP_IPC_LOCK: libc::c_ulong = 14;
    let limit = || {
        let limit = libc::rlimit { rlim_cur: 65536, rlim_max: 65536 };
        // SAFETY: both are system calls on values of our own, and allowed between fork and exec.
        let failed = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) };
        // SAFETY: as above.
        let failed = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } + failed;
        // An ordinary user cannot drop the capability, having none: then the limit is enough.
        let _ = failed;
        Ok(())
    };
    // SAFETY: the closure only makes two system calls.
    unsafe { command.pre_exec(limit) };
}

#[test]
fn io_uring_is_forbidden() {
    let mut place = Place::new();
    let mut command = place.kvring(&["serve", "--block-kib", "64", "--io-engine", "uring"]);
    without_io_uring(&mut command);
    refused_by(&mut command, &["io_engine = uring", "io_uring_setup", "set io_engine = aio"]);
    // auto says so, and serves.
    let log = std::fs::File::create(place.path("log")).unwrap();
    let mut command = place.kvring(&["serve", "--block-kib", "64"]);
    without_io_uring(&mut command);
    place.children.push(command.stderr(log).spawn().unwrap());
    place.wait_for_server();
    let said = std::fs::read_to_string(place.path("log")).unwrap();
    assert!(said.contains("WARN") && said.contains("libaio drives the SSDs instead"), "{said}");
    assert!(place.stats().unwrap()["devices"][0].as_str().unwrap().contains("libaio"));
}

/// A process whose io_uring_setup is answered EPERM, as container runtimes do.
#[expect(unsafe_code, reason = "what a child does between fork and exec")]
fn without_io_uring(command: &mut Command) {
    const LOAD_NUMBER: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let step = |code, jt, k| libc::sock_filter { code, jt, jf: 0, k };
    let mut filter = [
        step(LOAD_NUMBER, 0, 0),
        libc::sock_filter { jf: 1, ..step(JUMP_IF_EQUAL, 0, libc::SYS_io_uring_setup as u32) },
        step(RETURN, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: both are system calls on values of our own, and allowed between fork and exec.
        let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } == 0
            // SAFETY: as above; the program outlives the call.
            && unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) } == 0;
        if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: the closure only makes two system calls.
    unsafe { command.pre_exec(install) };
}

#[test]
fn sockets() {
    let mut place = Place::new();
    std::fs::write(place.socket(), "not a socket").unwrap();
    refused(&place, &[], &["server_recv_port", "exists and is no socket", "remove it"]);
    std::fs::remove_file(place.socket()).unwrap();
    // A stale one is taken over.
    drop(std::os::unix::net::UnixListener::bind(place.socket()).unwrap());
    assert!(exists(&place.socket()));
    place.serve(&["--block-kib", "64"]);
    let pid = place.children[0].id();
    refused(&place, &[], &["another server", &format!("pid {pid}"), "kvring stop"]);
    // Another socket, the same directory.
    let elsewhere = place.path("elsewhere").display().to_string();
    refused(
        &place,
        &["--socket", &elsewhere],
        &["kvring.cache is in use by another kvring server", "another ssd_cache_dir"],
    );
    refused(&place, &["--socket", "/nonexistent/dir/s"], &["server_recv_port", "/nonexistent/dir/s", "may write to"]);
}

#[test]
fn nobody_there() {
    let place = Place::new();
    for command in ["stat", "stop", "upgrade", "top", "sessions", "devices", "explain", "trace", "blocks", "drain"] {
        refused_by(&mut place.kvring(&[command]), &["no server listens on", &place.socket().display().to_string()]);
    }
}

#[test]
fn traces() {
    let place = Place::new();
    let trace = |text: &str| {
        std::fs::write(place.path("t.jsonl"), text).unwrap();
        place.path("t.jsonl").display().to_string()
    };
    let truncated =
        trace("{\"timestamp\":0,\"input_length\":1,\"output_length\":1,\"hash_ids\":[1]}\n{\"timestamp\": 5, \"inp");
    refused_by(&mut place.kvring(&["replay", &truncated]), &["t.jsonl:2:", "each line must be an object"]);
    let binary = trace("\u{7f}ELF\u{0}\u{0}");
    refused_by(&mut place.kvring(&["replay", &binary]), &["t.jsonl:1:"]);
    refused_by(&mut place.kvring(&["replay", "/nonexistent"]), &["/nonexistent: cannot be read"]);
    refused_by(&mut place.kvring(&["replay", "--speed", "-1"]), &["--speed -1"]);
}

#[test]
fn a_flexkv_setting_that_does_not_apply_is_named_once_and_served_all_the_same() {
    let mut place = Place::new();
    let log = std::fs::File::create(place.path("log")).unwrap();
    let mut command = place.kvring(&["serve", "--block-kib", "64"]);
    let child = command.env("FLEXKV_ENABLE_MPS", "1").env("FLEXKV_INDEX_ACCEL", "1").stderr(log).spawn().unwrap();
    place.children.push(child);
    place.wait_for_server();
    let said = std::fs::read_to_string(place.path("log")).unwrap();
    assert_eq!(said.matches("FLEXKV_ENABLE_MPS does not apply to kvring").count(), 1, "{said}");
    assert!(said.contains("FLEXKV_INDEX_ACCEL does not apply"), "{said}");
}
