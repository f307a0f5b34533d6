//! `kvring bench device`: fio's job files, fio's report.

use super::*;
use serde_json::Value;

fn fio_tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fio")
}

fn bench(place: &Place, arguments: &[&str]) -> Output {
    place.kvring(&["bench", "device"]).args(arguments).current_dir(place.dir.path()).output().unwrap()
}

/// All that fio 3.33 says of a direction.
const SIDE: [&str; 23] = [
    "io_bytes",
    "io_kbytes",
    "bw_bytes",
    "bw",
    "iops",
    "runtime",
    "total_ios",
    "short_ios",
    "drop_ios",
    "slat_ns",
    "clat_ns",
    "lat_ns",
    "bw_min",
    "bw_max",
    "bw_agg",
    "bw_mean",
    "bw_dev",
    "bw_samples",
    "iops_min",
    "iops_max",
    "iops_mean",
    "iops_stddev",
    "iops_samples",
];

/// Every path of a report's values, but what is only fio's: the time in words, and the disks below (which kvring names
/// none of).
fn paths(value: &Value, at: &str, into: &mut std::collections::BTreeSet<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(name, value)| paths(value, &format!("{at}.{name}"), into)),
        Value::Array(items) => items.iter().for_each(|item| paths(item, &format!("{at}[]"), into)),
        _ => _ = into.insert(at.to_owned()),
    }
}

#[test]
fn whoever_reads_fio_s_report_finds_all_of_it_in_ours() {
    let place = Place::new();
    let file = place.path("j.fio");
    let keys = ["ioengine=io_uring", "rw=rw", "size=4m", "bs=64k", "iodepth=8", "filename=f", "percentile_list=50:99"];
    std::fs::write(&file, format!("[j]\n{}\ntime_based\nruntime=1100ms\n", keys.join("\n"))).unwrap();
    let arguments = [file.to_str().unwrap(), "--output-format=json"];
    let fio = Command::new("fio").args(arguments).current_dir(place.dir.path()).output();
    let Ok(fio) = fio else {
        println!("skipped: fio is not installed (tests/golden/schemas.txt has what a report of ours has)");
        return;
    };
    let fio_said = text(&fio);
    let theirs: Value =
        serde_json::from_str(&fio_said[fio_said.find('{').unwrap()..=fio_said.rfind('}').unwrap()]).unwrap();
    if theirs["fio version"] != "fio-3.33" {
        println!("skipped: {}, and the schema is that of fio-3.33", theirs["fio version"]);
        return;
    }
    let ours: Value = serde_json::from_slice(&bench(&place, &arguments).stdout).unwrap();
    let [theirs, found] = [&theirs, &ours].map(|report| {
        let mut into = std::collections::BTreeSet::new();
        paths(report, "", &mut into);
        into
    });
    let only_fio = |path: &&String| *path == ".time";
    let missing: Vec<_> = theirs.difference(&found).filter(|path| !only_fio(path)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let read = &ours["jobs"][0]["read"];
    let at = |name: &str| read[name].as_f64().unwrap();
    assert_eq!((at("bw_samples"), at("iops_samples")), (2.0, 2.0));
    assert!(at("bw_min") <= at("bw_mean") && at("bw_mean") <= at("bw_max") && at("bw_min") > 0.0, "{read}");
    let sum =
        |class: &str| ours["jobs"][0][class].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).sum::<f64>();
    assert!((sum("latency_ns") + sum("latency_us") + sum("latency_ms") - 100.0).abs() < 0.01, "{ours}");
    assert!((sum("iodepth_submit") - 100.0).abs() < 0.01 && (sum("iodepth_complete") - 100.0).abs() < 0.01);
}

#[test]
fn what_is_written_is_read_again_and_compared_and_the_report_has_fio_s_schema() {
    let place = Place::new();
    let job_file = fio_tests().join("verify.fio");
    let output = bench(&place, &[job_file.to_str().unwrap(), "--output-format", "json"]);
    assert!(output.status.success(), "{}", text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let jobs = report["jobs"].as_array().unwrap();
    assert_eq!(jobs.iter().map(|job| job["jobname"].as_str().unwrap()).collect::<Vec<_>>(), ["write", "randwrite"]);
    assert_eq!(jobs.iter().map(|job| job["groupid"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1]);
    for job in jobs {
        assert_eq!((&job["error"], &job["verified_blocks"]), (&0.into(), &1024.into()));
        let write = &job["write"];
        assert_eq!((&write["total_ios"], &write["io_bytes"]), (&1024.into(), &(64u64 << 20).into()));
        for side in ["read", "write", "trim"] {
            for name in SIDE {
                assert!(!job[side][name].is_null(), "no {side}.{name}");
            }
        }
        let clat = &write["clat_ns"];
        let at = |p: &str| clat["percentile"][p].as_u64().unwrap_or_else(|| panic!("no {p} in {clat}"));
        assert!(at("1.000000") <= at("50.000000") && at("50.000000") <= at("99.990000"));
        assert_eq!(clat["N"], 1024);
        for name in
            ["usr_cpu", "sys_cpu", "ctx", "majf", "minf", "iodepth_level", "job_runtime", "job options", "elapsed"]
        {
            assert!(!job[name].is_null(), "no {name}");
        }
    }
    // A byte that another has written is found.
    let path = place.path("kvring-fio-verify");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, b"other", 5 * 65536 + 4000).unwrap();
    let flags =
        ["--filename", "kvring-fio-verify", "--size", "64m", "--bs", "64k", "--rw", "read", "--verify", "crc64"];
    let told = bench(&place, &flags);
    assert!(
        !told.status.success() && text(&told).contains("at offset 327680: the checksum does not match"),
        "{}",
        text(&told)
    );
}

#[test]
fn every_engine_and_pattern_moves_what_it_says() {
    let place = Place::new();
    for engine in ["io_uring", "libaio", "sim"] {
        for pattern in ["read", "write", "randread", "randwrite", "rw", "randrw"] {
            let flags = [
                "--ioengine",
                engine,
                "--rw",
                pattern,
                "--size",
                "4m",
                "--bsrange",
                "4k-64k",
                "--iodepth",
                "7",
                "--numjobs",
                "2",
                "--group_reporting",
                "--filename",
                "f",
                "--output-format",
                "json",
            ];
            let output = bench(&place, &flags);
            assert!(output.status.success(), "{engine} {pattern}: {}", text(&output));
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(report["jobs"].as_array().unwrap().len(), 1);
            let bytes = |side: &str| report["jobs"][0][side]["io_bytes"].as_u64().unwrap();
            let moved = bytes("read") + bytes("write");
            // Two jobs, each all of the file, or a transfer more.
            assert!((8 << 20..(8 << 20) + (256 << 10)).contains(&moved), "{engine} {pattern}: {moved}");
            assert_eq!(pattern.contains("read"), bytes("write") == 0, "{engine} {pattern}");
            assert_eq!(pattern.contains("write"), bytes("read") == 0, "{engine} {pattern}");
        }
    }
}

#[test]
fn a_job_goes_through_the_whole_cache() {
    let place = Place::new();
    for pattern in ["randread", "write"] {
        let flags = [
            "--ioengine=kvring",
            "--rw",
            pattern,
            "--size",
            "64m",
            "--bs",
            "64k",
            "--iodepth",
            "8",
            "--filename",
            "x/f",
            "--output-format",
            "json",
        ];
        std::fs::create_dir_all(place.path("x")).unwrap();
        let output = bench(&place, &flags);
        assert!(output.status.success(), "{pattern}: {}", text(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let side = &report["jobs"][0][if pattern == "write" { "write" } else { "read" }];
        assert_eq!(side["total_ios"], 1024, "{pattern}");
    }
}

#[test]
fn rates_are_kept_and_what_is_not_understood_is_named() {
    let place = Place::new();
    let flags = [
        "--ioengine",
        "sim",
        "--size",
        "4m",
        "--bs",
        "4k",
        "--iodepth",
        "4",
        "--rate_iops",
        "500",
        "--runtime",
        "1",
        "--time_based",
        "--output-format",
        "json",
    ];
    let report: Value = serde_json::from_slice(&bench(&place, &flags).stdout).unwrap();
    let iops = report["jobs"][0]["read"]["iops"].as_f64().unwrap();
    // No faster; how much slower is the machine's.
    assert!(iops <= 510.0 && iops > 0.0, "{iops}");
    for (arguments, said) in [
        (&["--rw", "trim"][..], "--rw: rw=trim: expected read, write"),
        (&["/nonexistent.fio"], "/nonexistent.fio"),
        (&["--filename", "/nonexistent/f", "--size", "1m"], "/nonexistent/f"),
        (&["--size", "1k", "--bs", "4k", "--ioengine", "sim"], "bs=4096 is more than size=1024"),
        (&["--ioengine", "sim"], "say size=BYTES"),
        (&["--hipri", "--ioengine", "libaio", "--size", "1m"], "hipri=1 is for ioengine=io_uring"),
        (&["--ioengine", "io_uring_cmd"], "needs filename=/dev/ngXnY"),
        (&["--ioengine", "io_uring_cmd", "--filename", "/dev/null"], "belongs to no NVMe namespace"),
        (&["--ioengine", "io_uring_cmd", "--filename", "file", "--cmd_type", "scsi"], "cmd_type=scsi: expected nvme"),
    ] {
        let told = bench(&place, arguments);
        assert!(!told.status.success() && text(&told).contains(said), "{arguments:?}: {}", text(&told));
    }
}
