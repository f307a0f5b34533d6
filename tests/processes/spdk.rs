//! A cache on a namespace that SPDK drives, here the fake of its shim: the same format, the same crashes, the same words.

use super::*;

/// A namespace of the fake: a file, by its address.
fn namespace(place: &Place, bytes: u64) -> (PathBuf, String) {
    let file = place.path("namespace");
    std::fs::File::create(&file).unwrap().set_len(bytes).unwrap();
    let address = format!("trtype:TCP adrfam:IPv4 traddr:{} trsvcid:4420 subnqn:x", file.display());
    (file, address)
}

fn power_off(place: &Place) {
    place.kill_all();
    eventually("it is dead", || place.stats().is_none());
}

fn library() -> String {
    kvring_fake_spdk::built().display().to_string()
}

#[test]
fn a_cache_that_spdk_wrote_is_warm_after_a_kill_and_by_io_uring_and_back() {
    let mut place = Place::new();
    let (file, address) = namespace(&place, 80 << 20);
    let library = library();
    let by_spdk = ["--ssd-cache-dir", &address, "--spdk-library", &library, "--spdk-no-huge", "on"];
    let layout = serde_json::to_string(&layout()).unwrap();
    let by_spdk = [by_spdk.as_slice(), &["--layout", &layout]].concat();
    place.serve(&by_spdk);
    let keys = chain("a", 60);
    let mut agent = place.agent(0, &[("server_launch_mode", "external")]);
    assert_eq!(store(&mut agent, &keys), 60);
    let described = place.stats().unwrap()["devices"][0].as_str().unwrap().to_owned();
    assert!(described.contains("fake, namespace 1 of kvring fake FAKE"), "{described}");
    eventually("all of it is written", || place.metric("ssd_write_bytes") == 60 * BLOCK as u64);
    let served_by = |place: &Place, how: &str| {
        let mut agent = place.agent(0, &[("server_launch_mode", "external")]);
        eventually(&format!("{how}: the SSD is read"), || place.metric("ssd_recovered_blocks_count") == 60);
        assert_eq!(load(&mut agent, &keys), 60, "{how}");
        assert_eq!(place.metric("load_blocks_ssd_count"), 60, "{how}: from the device");
        assert_eq!(place.metric("ssd_checksum_errors_count"), 0, "{how}");
    };
    drop(agent);
    // Header sectors are behind the blocks.
    eventually("headers too", || place.metric("ssd_header_writes_count") > 0);
    std::thread::sleep(Duration::from_millis(200));
    power_off(&place);
    place.serve(&by_spdk);
    served_by(&place, "spdk");
    power_off(&place);
    // The same bytes as a block device of the kernel's.
    let loop_device = Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(&file).output();
    let Some(device) = loop_device.ok().filter(|output| output.status.success()) else {
        return println!("skipped: no loop device here");
    };
    let device = String::from_utf8(device.stdout).unwrap().trim().to_owned();
    let detach = || Command::new("losetup").args(["--detach", &device]).status().unwrap();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        place.serve(&["--ssd-cache-dir", &device, "--layout", &layout]);
        served_by(&place, "io_uring");
        let keys = chain("b", 10);
        let mut agent = place.agent(0, &[("server_launch_mode", "external")]);
        assert_eq!(store(&mut agent, &keys), 10);
        eventually("written", || place.metric("ssd_write_bytes") >= 10 * BLOCK as u64);
        std::thread::sleep(Duration::from_millis(200));
        power_off(&place);
    }));
    detach();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    place.serve(&by_spdk);
    let mut agent = place.agent(0, &[("server_launch_mode", "external")]);
    eventually("what io_uring wrote is read by SPDK", || load(&mut agent, &chain("b", 10)) == 10);
}

#[test]
fn a_namespace_that_fails_costs_its_blocks_and_nothing_else() {
    let mut place = Place::new();
    let (_file, address) = namespace(&place, 80 << 20);
    let failing = format!("{address} fail_after:60");
    let layout = serde_json::to_string(&layout()).unwrap();
    let library = library();
    let said = ["--ssd-cache-dir", &failing, "--spdk-library", &library, "--spdk-no-huge", "on", "--layout", &layout];
    place.serve(&said);
    let mut agent = place.agent(0, &[("server_launch_mode", "external")]);
    for part in 0..6 {
        assert_eq!(store(&mut agent, &chain(&format!("{part}"), 20)), 20);
    }
    eventually("the device is lost", || place.metric("ssd_devices_lost_count") == 1);
    let keys = chain("after", 20);
    assert_eq!(store(&mut agent, &keys), 20, "the pool serves on");
    assert_eq!(load(&mut agent, &keys), 20);
    let devices = text(&place.kvring(&["devices", "--json"]).output().unwrap());
    assert!(devices.contains("\"lost\": 1"), "{devices}");
}

#[test]
fn who_has_no_spdk_or_another_s_data_is_told_what_to_do() {
    let place = Place::new();
    let (file, address) = namespace(&place, 80 << 20);
    let library = library();
    let refused = |library: &str, address: &str, words: &str| {
        let arguments = ["serve", "--block-kib", "64", "--ssd-cache-dir", address, "--spdk-no-huge", "on"];
        let told = place.kvring(&arguments).args(["--spdk-library", library]).output().unwrap();
        assert!(!told.status.success() && text(&told).contains(words), "{}", text(&told));
    };
    refused("/nonexistent/libkvring_spdk.so", &address, "install SPDK");
    refused(&library, &address.replace("namespace", "nowhere"), "is the target there");
    refused(&library, &format!("{address} metadata:8"), "formatted with metadata");
    std::os::unix::fs::FileExt::write_at(
        &std::fs::File::options().write(true).open(&file).unwrap(),
        b"LUKS\xba\xbe",
        0,
    )
    .unwrap();
    refused(&library, &address, "an encrypted volume (LUKS)");
    let mut first = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(std::fs::File::open(&file).unwrap(), 4), &mut first).unwrap();
    assert_eq!(first, b"LUKS", "untouched");
}

#[test]
fn the_benchmark_drives_it_too_and_not_one_that_a_server_has() {
    let mut place = Place::new();
    let (_, address) = namespace(&place, 80 << 20);
    let library = library();
    let bench = |place: &Place, filename: &str, rw: &str| {
        let mut command = place.kvring(&["bench", "device", "--ioengine", "spdk", "--bs", "4k", "--iodepth", "8"]);
        command.args(["--filename", filename, "--rw", rw, "--size", "4m", "--verify", "crc64"]);
        command.args(["--output-format", "json"]).env("KVRING_SPDK_LIBRARY", &library);
        command.env("KVRING_SPDK_NO_HUGE", "on").output().unwrap()
    };
    // As fio's plugin has addresses.
    let theirs = address.replacen("trtype:", "trtype=", 1).replace("adrfam:", "adrfam=");
    let theirs = theirs.replace("traddr:", "traddr=").replace("trsvcid:", "trsvcid=").replace("subnqn:", "subnqn=");
    for filename in [&address, &theirs] {
        let output = bench(&place, filename, "randwrite");
        assert!(output.status.success(), "{}", text(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let job = &report["jobs"][0];
        assert_eq!((&job["error"], &job["write"]["total_ios"]), (&0.into(), &1024.into()), "{job}");
        assert_eq!(job["verified_blocks"], 1024);
    }
    let layout = serde_json::to_string(&layout()).unwrap();
    place.serve(&[
        "--force-format",
        "--ssd-cache-dir",
        &address,
        "--spdk-library",
        &library,
        "--spdk-no-huge",
        "on",
        "--layout",
        &layout,
    ]);
    let output = bench(&place, &address, "randwrite");
    assert!(!output.status.success() && text(&output).contains("in use"), "{}", text(&output));
}

#[test]
fn a_connection_that_broke_is_made_anew_and_the_device_used_again() {
    let mut place = Place::new();
    let (_, address) = namespace(&place, 80 << 20);
    // Each connection takes so many commands.
    let address = format!("{address} fail_after:200");
    let library = library();
    let layout = serde_json::to_string(&layout()).unwrap();
    let by_spdk = ["--ssd-cache-dir", &address, "--spdk-library", &library, "--spdk-no-huge", "on"];
    place.serve(&[by_spdk.as_slice(), &["--layout", &layout]].concat());
    let mut agent = place.agent(0, &[("server_launch_mode", "external")]);
    let mut number = 0;
    eventually("it is lost", || {
        number += 1;
        store(&mut agent, &chain(&format!("a{number}"), 40));
        place.metric("ssd_devices_lost_count") == 1
    });
    let written = place.metric("ssd_write_bytes");
    // Something to try it with, after 5 s. The next connection ends like the first: it is lost twice, so it was there between.
    eventually("it was there again", || {
        number += 1;
        store(&mut agent, &chain(&format!("a{number}"), 10));
        std::thread::sleep(Duration::from_millis(20));
        place.metric("ssd_devices_lost_count") >= 2
    });
    let more = place.metric("ssd_write_bytes") - written;
    assert!(more > 100 * BLOCK as u64, "it took {more} bytes");
}
