//! Jobs in fio's language: `[global]`, `[job]`, `key=value`. What is not understood is an error that names it; nothing is
//! ignored.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use kvring_engine::device::spdk;

/// Every key that is understood, with what it means.
pub const KEYS: &[(&str, &str)] = &[
    ("name", "what the job is called"),
    ("rw", "read, write, randread, randwrite, rw (readwrite) or randrw"),
    ("bs", "bytes of one transfer: 4k, 1m; two for reads and writes: 4k,64k"),
    ("bsrange", "least and most bytes of one transfer: 4k-64k"),
    ("size", "bytes of the file that each job uses"),
    ("iodepth", "transfers in flight"),
    ("numjobs", "copies of the job, each a thread"),
    ("runtime", "longest run: 10s, 500ms, 1m; a bare number is seconds"),
    ("time_based", "run for runtime, again from the start if size is done before"),
    ("ramp_time", "time before anything is counted"),
    ("direct", "1: past the page cache (default); 0: through it"),
    ("filename", "file, block device or address of SPDK; by default job.N.0 in the working directory"),
    (
        "ioengine",
        "io_uring (default), nvme or, as fio calls it, io_uring_cmd (NVMe commands through io_uring), libaio, spdk (KVRING_SPDK_* say where it is), sim (memory, with simulated latency) or kvring (through the whole cache)",
    ),
    ("rwmixread", "percent of reads in rw and randrw"),
    ("rate", "bytes a second, at the most, reads and writes together"),
    ("rate_iops", "transfers a second, at the most"),
    ("thinktime", "pause after transfers have ended: microseconds"),
    ("iodepth_batch", "transfers handed over in one system call (default 1, as fio's)"),
    ("fixedbufs", "register the buffers with io_uring (default 1 here; fio's is 0)"),
    ("registerfiles", "register the file with io_uring (always done)"),
    ("cmd_type", "nvme: what io_uring_cmd sends (nothing else is known)"),
    ("hipri", "polled completions (IOPOLL): needs a device with poll queues"),
    ("sqthread_poll", "submission by a kernel thread (SQPOLL)"),
    ("verify", "crc64: write what can be told from other bytes, read it again and compare; 0 for none"),
    ("group_reporting", "one report for all jobs of a group"),
    ("percentile_list", "percentiles to report: 50:99:99.9"),
    ("randseed", "seed of offsets and bytes"),
    ("norandommap", "random offsets that may come again before all have been (default: each once a pass)"),
    ("stonewall", "wait for the jobs before this one"),
];

/// Keys that may stand without a value.
pub const SWITCHES: &[&str] = &[
    "time_based",
    "direct",
    "fixedbufs",
    "registerfiles",
    "hipri",
    "sqthread_poll",
    "group_reporting",
    "norandommap",
    "stonewall",
];

/// Which way a job moves bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    /// Offsets are random.
    pub random: bool,
    /// It reads.
    pub reads: bool,
    /// It writes.
    pub writes: bool,
}

/// What drives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    IoUring,
    IoUringCmd,
    Libaio,
    Spdk,
    Sim,
    Kvring,
}

/// One job.
#[derive(Debug, Clone)]
pub struct Job {
    pub name: String,
    pub group: u32,
    pub pattern: Pattern,
    pub engine: Engine,
    /// Least and most bytes of a read, and of a write.
    pub bs: [(u64, u64); 2],
    pub size: Option<u64>,
    pub iodepth: u32,
    pub numjobs: u32,
    pub runtime: Option<Duration>,
    pub time_based: bool,
    pub ramp_time: Duration,
    pub direct: bool,
    pub filename: PathBuf,
    /// No file was named: each copy has one of its own.
    pub own_files: bool,
    pub rwmixread: u64,
    pub rate: Option<u64>,
    pub rate_iops: Option<u64>,
    pub thinktime: Duration,
    pub iodepth_batch: u32,
    pub fixedbufs: bool,
    pub hipri: bool,
    pub sqthread_poll: bool,
    pub verify: bool,
    pub group_reporting: bool,
    pub percentiles: Vec<f64>,
    pub randseed: u64,
    pub norandommap: bool,
    /// What was said of it, for the report.
    pub options: BTreeMap<String, String>,
}

/// fio's own list.
const PERCENTILES: [f64; 17] =
    [1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99];

/// A number of bytes: 4096, 4k, 1m, 2g: powers of 1024. Not 4kb and 4KiB, which mean one thing to fio and another to
/// everybody else (kb_base).
pub fn bytes(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift);
    }
    let value = number.parse::<f64>().ok()? * (1u64 << shift) as f64;
    (value.is_finite() && value < u64::MAX as f64).then_some(value as u64)
}

/// A time; a bare number counts in `unit`.
fn time(text: &str, unit: Duration) -> Option<Duration> {
    let text = text.trim().to_ascii_lowercase();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let unit = match suffix {
        "" => unit.as_secs_f64(),
        "us" | "usec" => 1e-6,
        "ms" | "msec" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let seconds = number.parse::<f64>().ok()? * unit;
    (0.0..1e9).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

fn switch(text: &str) -> Option<bool> {
    match text {
        "" | "1" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

/// Where something was said, and what.
type Said = BTreeMap<String, (String, String)>;

/// The jobs of some job files (each a name and its text) and flags. Flags without a file are one job; with files they
/// come before each file's own `[global]`.
///
/// # Errors
/// What is not understood, by file, line and key.
pub fn jobs(files: &[(String, String)], flags: &[(String, String)]) -> Result<Vec<Job>, String> {
    let mut said = Said::new();
    for (key, value) in flags {
        say(&mut said, key, value, &format!("--{key}"))?;
    }
    let mut made = Vec::new();
    let mut group = 0;
    for (file, text) in files {
        let mut global = said.clone();
        let mut sections: Vec<(String, Said)> = Vec::new();
        let mut in_global = None;
        for (number, line) in (1..).zip(text.lines()) {
            let place = format!("{file}:{number}");
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') || line.starts_with(';') {
                continue;
            }
            if let Some(name) = line.strip_prefix('[') {
                let name = name.strip_suffix(']').ok_or_else(|| format!("{place}: {line:?} has no ]"))?;
                in_global = Some(name == "global");
                if name != "global" {
                    // What is said in [global] later holds for later jobs, as in fio.
                    sections.push((name.to_owned(), global.clone()));
                }
                continue;
            }
            let (key, value) = line.split_once('=').unwrap_or((line, ""));
            let target = match (in_global, sections.last_mut()) {
                (Some(true), _) => &mut global,
                (Some(false), Some((_, section))) => section,
                _ => return Err(format!("{place}: {line:?} comes before any [section]")),
            };
            say(target, key.trim(), value.trim(), &place)?;
        }
        if sections.is_empty() {
            return Err(format!("{file}: no job: expected at least one [section] that is not [global]"));
        }
        for (name, section) in sections {
            made.push(job(&name, &section, &mut group, made.is_empty())?);
        }
    }
    if files.is_empty() {
        made.push(job("kvring", &said, &mut group, true)?);
    }
    Ok(made)
}

fn say(said: &mut Said, key: &str, value: &str, place: &str) -> Result<(), String> {
    let key = match key {
        "readwrite" => "rw",
        "blocksize" => "bs",
        "blocksize_range" => "bsrange",
        "iodepth_batch_submit" => "iodepth_batch",
        key => key,
    };
    if !KEYS.iter().any(|(name, _)| *name == key) {
        let known = KEYS.iter().map(|(name, _)| *name).max_by(|a, b| strsim(key, a).total_cmp(&strsim(key, b)));
        return Err(format!(
            "{place}: unknown key {key:?}: did you mean {:?}? (`kvring bench device --help` lists all)",
            known.unwrap_or("")
        ));
    }
    if value.is_empty() && !SWITCHES.contains(&key) {
        return Err(format!("{place}: {key} has no value"));
    }
    said.insert(key.to_owned(), (value.to_owned(), place.to_owned()));
    Ok(())
}

fn strsim(a: &str, b: &str) -> f64 {
    // Letters in common, in order: enough to guess a key.
    let mut rest = b.chars();
    let common = a.chars().filter(|c| rest.by_ref().any(|d| d == *c)).count();
    2.0 * common as f64 / (a.len() + b.len()) as f64
}

fn job(name: &str, said: &Said, group: &mut u32, is_first: bool) -> Result<Job, String> {
    fn get<T>(said: &Said, key: &str, default: T, read: impl Fn(&str) -> Option<T>) -> Result<T, String> {
        let Some((value, place)) = said.get(key) else { return Ok(default) };
        read(value).ok_or_else(|| {
            let accepts = KEYS.iter().find(|(name, _)| *name == key).map_or("", |(_, doc)| doc);
            format!("{place}: {key}={value}: expected {accepts}")
        })
    }
    let name = said.get("name").map_or(name, |(name, _)| name);
    let whole = |least: u64, most: u64| move |v: &str| v.parse::<u64>().ok().filter(|n| (least..=most).contains(n));
    let sectors = |v: &str| bytes(v).filter(|b| *b > 0 && b.is_multiple_of(512) && *b <= 1 << 30);
    let pattern = get(said, "rw", Pattern { random: false, reads: true, writes: false }, |v| {
        let (random, kind) = v.strip_prefix("rand").map_or((false, v), |kind| (true, kind));
        let (reads, writes) = match kind {
            "read" => (true, false),
            "write" => (false, true),
            "rw" | "readwrite" => (true, true),
            _ => return None,
        };
        Some(Pattern { random, reads, writes })
    })?;
    let bs = get(said, "bs", [4096, 4096], |v| {
        let mut parts = v.split(',').map(sectors);
        let read = parts.next()??;
        let write = parts.next().unwrap_or(Some(read))?;
        parts.next().is_none().then_some([read, write])
    })?;
    let bs = get(said, "bsrange", bs.map(|b| (b, b)), |v| {
        let range = |v: &str| {
            let (least, most) = v.split_once('-')?;
            Some((sectors(least)?, sectors(most)?)).filter(|(least, most)| least <= most && most.is_multiple_of(*least))
        };
        let (read, write) = v.split_once(',').unwrap_or((v, v));
        Some([range(read)?, range(write)?])
    })?;
    let engine = get(said, "ioengine", Engine::IoUring, |v| match v {
        "io_uring" => Some(Engine::IoUring),
        "io_uring_cmd" | "nvme" => Some(Engine::IoUringCmd),
        "libaio" => Some(Engine::Libaio),
        "spdk" => Some(Engine::Spdk),
        "sim" => Some(Engine::Sim),
        "kvring" => Some(Engine::Kvring),
        _ => None,
    })?;
    for key in ["hipri", "sqthread_poll"] {
        if get(said, key, false, switch)? && !matches!(engine, Engine::IoUring | Engine::IoUringCmd) {
            let place = &said[key].1;
            return Err(format!("{place}: {key}=1 is for ioengine=io_uring and io_uring_cmd: leave it out"));
        }
    }
    if !get(said, "registerfiles", true, switch)? {
        let place = &said["registerfiles"].1;
        return Err(format!("{place}: registerfiles=0: files are always registered here: leave it out"));
    }
    get(said, "cmd_type", (), |v| (v == "nvme").then_some(()))?;
    if engine == Engine::IoUringCmd && !said.contains_key("filename") {
        return Err(format!("job {name}: ioengine=io_uring_cmd needs filename=/dev/ngXnY"));
    }
    if let Some((value, place)) = said.get("filename")
        && value.replace("\\:", "").contains(':')
        && !value.starts_with("trtype")
    {
        return Err(format!("{place}: filename={value}: one file a job (a colon in a name is said as \\:)"));
    }
    let address = said.get("filename").map(|(value, _)| spdk_address(value));
    if (engine == Engine::Spdk) != address.as_ref().is_some_and(|address| address.starts_with(spdk::PREFIX)) {
        return Err(format!(
            "job {name}: ioengine=spdk and filename=trtype:... (or, as fio's plugin has it, trtype=...) belong together"
        ));
    }
    let millis = |unit| move |v: &str| time(v, unit);
    let stonewall = get(said, "stonewall", false, switch)?;
    *group += u32::from(stonewall && !is_first);
    let iodepth = get(said, "iodepth", 1, whole(1, 4096))? as u32;
    let runtime = get(said, "runtime", Duration::ZERO, millis(Duration::from_secs(1)))?;
    let job = Job {
        name: name.to_owned(),
        group: *group,
        pattern,
        engine,
        bs,
        size: get(said, "size", None, |v| bytes(v).filter(|b| *b > 0).map(Some))?,
        iodepth,
        numjobs: get(said, "numjobs", 1, whole(1, 256))? as u32,
        runtime: (runtime > Duration::ZERO).then_some(runtime),
        time_based: get(said, "time_based", false, switch)?,
        ramp_time: get(said, "ramp_time", Duration::ZERO, millis(Duration::from_secs(1)))?,
        direct: get(said, "direct", true, switch)?,
        own_files: !said.contains_key("filename"),
        filename: address.map_or_else(|| format!("{name}.0.0"), |name| name.replace("\\:", ":")).into(),
        rwmixread: get(said, "rwmixread", 50, whole(0, 100))?,
        rate: get(said, "rate", None, |v| bytes(v).filter(|b| *b > 0).map(Some))?,
        rate_iops: get(said, "rate_iops", None, |v| v.parse().ok().filter(|n| *n > 0).map(Some))?,
        thinktime: get(said, "thinktime", Duration::ZERO, millis(Duration::from_micros(1)))?,
        iodepth_batch: get(said, "iodepth_batch", 1, whole(1, 4096))? as u32,
        fixedbufs: get(said, "fixedbufs", true, switch)?,
        hipri: get(said, "hipri", false, switch)?,
        sqthread_poll: get(said, "sqthread_poll", false, switch)?,
        verify: get(said, "verify", false, |v| match v {
            "crc64" => Some(true),
            "0" => Some(false),
            _ => None,
        })?,
        group_reporting: get(said, "group_reporting", false, switch)?,
        percentiles: get(said, "percentile_list", PERCENTILES.to_vec(), |v| {
            v.split(':').map(|p| p.parse().ok().filter(|p| (0.0..=100.0).contains(p))).collect()
        })?,
        randseed: get(said, "randseed", 0x6b76_7269_6e67, |v| v.parse().ok())?,
        norandommap: get(said, "norandommap", false, switch)?,
        options: said.iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect(),
    };
    if job.time_based && job.runtime.is_none() {
        return Err(format!(
            "{}: time_based without runtime would never end: say runtime=SECONDS",
            said["time_based"].1
        ));
    }
    if job.verify && job.bs.iter().any(|(least, most)| least != most) {
        return Err(format!("{}: verify with several block sizes: choose one bs", said["verify"].1));
    }
    if job.verify && job.bs[0] != job.bs[1] {
        return Err(format!("{}: verify with different sizes of reads and writes: choose one bs", said["verify"].1));
    }
    if job.verify && job.pattern.writes && job.numjobs > 1 && !job.own_files {
        return Err(format!(
            "{}: verify of several jobs that write one file: leave out filename, or numjobs",
            said["verify"].1
        ));
    }
    if job.engine == Engine::Kvring
        && (job.bs[0] != job.bs[1] || job.bs[0].0 != job.bs[0].1 || !job.bs[0].0.is_multiple_of(4096))
    {
        return Err(format!("job {name}: ioengine=kvring has blocks of one size, a multiple of 4k: say bs=SIZE"));
    }
    Ok(job)
}

/// An address as fio's SPDK plugin has it, whose names cannot have colons: `trtype=PCIe traddr=0000.04.00.0 ns=1`.
fn spdk_address(filename: &str) -> String {
    if !filename.starts_with("trtype=") {
        return filename.to_owned();
    }
    let word = |word: &str| match word.split_once('=') {
        Some(("traddr", bdf)) if filename.starts_with("trtype=PCIe") => {
            let parts: Vec<&str> = bdf.split('.').collect();
            match parts.as_slice() {
                [domain, bus, device, function] => format!("traddr:{domain}:{bus}:{device}.{function}"),
                _ => format!("traddr:{bdf}"),
            }
        }
        Some((key, value)) => format!("{key}:{value}"),
        None => word.to_owned(),
    };
    filename.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod test {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Job>, String> {
        jobs(&[("f.fio".into(), text.into())], &[])
    }

    #[test]
    fn a_job_file_is_read_as_fio_reads_it() {
        let text = "; a comment\n[global]\nbs=64k\nioengine=libaio\niodepth=8\nsize=1G\n\n[reader]\nrw=randread\nnorandommap\n\n[writer]\nstonewall\nrw=write\nbs=4k,1m\nruntime=500ms\ntime_based=1\npercentile_list=50:99.9\n[both]\nrw=randrw\nrwmixread=70\nbsrange=4k-64k\n";
        let jobs = parsed(text).unwrap();
        let [reader, writer, both] = &jobs[..] else { panic!("{jobs:?}") };
        assert_eq!(
            (reader.engine, reader.iodepth, reader.size, reader.bs),
            (Engine::Libaio, 8, Some(1 << 30), [(65536, 65536); 2])
        );
        assert_eq!(reader.pattern, Pattern { random: true, reads: true, writes: false });
        assert!(reader.norandommap && !writer.norandommap && reader.direct);
        assert_eq!((reader.group, writer.group, both.group), (0, 1, 1));
        assert_eq!((writer.bs, writer.runtime), ([(4096, 4096), (1 << 20, 1 << 20)], Some(Duration::from_millis(500))));
        assert_eq!(writer.percentiles, [50.0, 99.9]);
        assert_eq!((both.bs[0], both.rwmixread), ((4096, 65536), 70));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, said) in [
            ("[a]\nbsize=4k\n", "f.fio:2: unknown key \"bsize\": did you mean \"bs"),
            ("[a]\nbs=4x\n", "f.fio:2: bs=4x: expected bytes of one transfer"),
            ("[a]\nbs=1000\n", "f.fio:2: bs=1000"),
            ("bs=4k\n", "f.fio:1: \"bs=4k\" comes before any [section]"),
            ("[global]\nbs=4k\n", "no job"),
            ("[a\n", "has no ]"),
            ("[a]\nsize\n", "size has no value"),
            ("[a]\nrw=trim\n", "rw=trim: expected read, write"),
            ("[a]\ntime_based\n", "without runtime would never end"),
            ("[a]\nioengine=libaio\nhipri\n", "hipri=1"),
            ("[a]\nioengine=libaio\nsqthread_poll\n", "sqthread_poll=1"),
            ("[a]\nioengine=spdk\n", "belong together"),
            ("[a]\nfilename=trtype:PCIe traddr:0000:10:00.0\n", "belong together"),
            ("[a]\nfilename=a:b\n", "one file a job"),
            ("[a]\nregisterfiles=0\n", "files are always registered"),
            ("[a]\nregisterfiles=banana\n", "registerfiles"),
            ("[a]\nioengine=psync\n", "ioengine=psync: expected io_uring"),
            ("[a]\nverify=md5\n", "verify=md5: expected crc64"),
            ("[a]\nbsrange=64k-4k\n", "bsrange=64k-4k"),
            ("[a]\nioengine=kvring\nbs=512\n", "a multiple of 4k"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(said), "{text:?}: {error}");
        }
    }

    #[test]
    fn an_address_may_be_as_fio_s_plugin_has_it() {
        assert_eq!(spdk_address("trtype=PCIe traddr=0000.04.00.0 ns=1"), "trtype:PCIe traddr:0000:04:00.0 ns:1");
        let tcp = "trtype=TCP adrfam=IPv4 traddr=192.0.2.1 trsvcid=4420";
        assert_eq!(spdk_address(tcp), "trtype:TCP adrfam:IPv4 traddr:192.0.2.1 trsvcid:4420");
        assert_eq!(spdk_address("/dev/nvme0n1"), "/dev/nvme0n1");
    }

    #[test]
    fn sizes_and_times_have_units() {
        assert_eq!(
            ["4096", "4k", "1M", "2g", "0.5m"].map(bytes),
            [Some(4096), Some(4096), Some(1 << 20), Some(2 << 30), Some(1 << 19)]
        );
        assert_eq!(["", "k", "4x", "-1", "1MiB", "99999999999g"].map(bytes), [None; 6]);
        assert_eq!(time("5", Duration::from_secs(1)), Some(Duration::from_secs(5)));
        assert_eq!(time("5", Duration::from_micros(1)), Some(Duration::from_micros(5)));
        assert_eq!(time("1.5m", Duration::from_secs(1)), Some(Duration::from_secs(90)));
        assert_eq!(time("x", Duration::from_secs(1)), None);
    }
}
