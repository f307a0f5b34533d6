//! What an operator may say, to the server and to the instances alike, and where it may be said.
//!
//! One table, [`SETTINGS`], holds every setting: its name, FlexKV's name for it, its default, its
//! meaning and how a text becomes its value. Flags, the environment, files, `docs/CONFIG.md` and
//! error messages all come from it. Precedence: flags, then the file (`KVRING_CONFIG_PATH` or
//! `FLEXKV_CONFIG_PATH`), then `KVRING_*`, then `FLEXKV_*`, then the default.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::handshake::Sizes;

/// When a resident block is evicted before another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the field's own; docs/CONFIG.md explains each")]
pub enum EvictionPolicy {
    Lru,
    Lfu,
    Slru,
    Fifo,
    Mru,
    Filo,
    S3Fifo,
}

/// Every policy with its name.
pub const EVICTION_POLICIES: &[(&str, EvictionPolicy)] = &[
    ("lru", EvictionPolicy::Lru),
    ("lfu", EvictionPolicy::Lfu),
    ("slru", EvictionPolicy::Slru),
    ("fifo", EvictionPolicy::Fifo),
    ("mru", EvictionPolicy::Mru),
    ("filo", EvictionPolicy::Filo),
    ("s3fifo", EvictionPolicy::S3Fifo),
];

/// Who starts the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaunchMode {
    /// Instance 0 does, and later whoever finds it gone.
    Embedded,
    /// Somebody else does.
    External,
}

/// Whether the pool is made of hugepages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hugepages {
    /// 4 KiB pages.
    Off,
    /// Hugepages if enough are free, else 4 KiB pages and a warning.
    Try,
    /// Hugepages or no start.
    Require,
}

/// How the server waits for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polling {
    /// Spin for a while, then sleep until a doorbell rings.
    Adaptive,
    /// Never sleep.
    Busy,
}

/// Which kernel interface drives the SSDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring, or libaio with a warning where io_uring is forbidden.
    Auto,
    /// io_uring or no start.
    Uring,
    /// libaio.
    Aio,
    /// NVMe commands through io_uring, past the block layer; [`IoEngine::Uring`] where a device does not take them.
    Nvme,
}

/// What to do with a cache file of another layout or format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnMismatch {
    /// Do not start.
    Refuse,
    /// Start with an empty SSD cache.
    Reset,
    /// As `Reset`, and on a block device whatever another program has written there. No setting says so: `kvring serve
    /// --force-format` does.
    Format,
}

/// Which blocks in the pool are compared with their checksums before they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// None.
    Off,
    /// Those that an engine process left that died, where their checksum is known: once each.
    Crash,
    /// Those, and each use of one block in sixteen.
    Sampled,
    /// Each use of every block.
    Always,
}

/// Where metrics are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricsListen {
    /// A loopback address.
    Tcp(std::net::SocketAddr),
    /// A unix stream socket.
    Unix(PathBuf),
}

/// Every setting's value.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each is documented once, in SETTINGS")]
pub struct Config {
    pub cpu_cache_bytes: u64,
    pub ssd_cache_bytes: u64,
    pub ssd_cache_dirs: Vec<PathBuf>,
    pub socket: PathBuf,
    pub instance_num: u32,
    pub instance_id: u32,
    pub launch_mode: LaunchMode,
    pub log_level: String,
    pub num_log_interval_requests: u64,
    pub eviction_policy: EvictionPolicy,
    pub slru_protected_threshold: u32,
    pub hugepages: Hugepages,
    pub hugepage_size_bytes: u64,
    pub io_engine: IoEngine,
    pub iouring_entries: u32,
    pub fixed_buffers: bool,
    pub io_poll: bool,
    pub sq_poll: bool,
    pub spdk_library: PathBuf,
    pub spdk_no_huge: bool,
    pub spdk_memory_mib: u32,
    pub max_file_bytes: Option<u64>,
    pub ssd_read_depth: u32,
    pub ssd_write_depth: u32,
    pub ssd_write_bytes_per_day: Option<u64>,
    pub ssd_on_mismatch: OnMismatch,
    pub checksum: bool,
    pub verify: Verify,
    pub polling: Polling,
    pub spin: Duration,
    pub server_cpu: Option<u32>,
    pub lease_ttl: Duration,
    pub load_wait: Duration,
    pub writer_grace: Duration,
    pub allowed_groups: Vec<u32>,
    pub crash_limit: u32,
    pub crash_window: Duration,
    pub hang_limit: Duration,
    pub client_wait: Duration,
    pub start_wait: Duration,
    pub cuda_driver: Option<PathBuf>,
    pub cuda_staging_bytes: u64,
    pub cuda_batch_copy: bool,
    pub copy_threads: usize,
    pub server_bin: Option<PathBuf>,
    pub server_log: Option<PathBuf>,
    pub stats_segment: bool,
    pub recorder_entries: usize,
    pub metrics_listen: Option<MetricsListen>,
    /// What was said, by name, wherever it was said: handed whole to a server that is started.
    pub said: BTreeMap<&'static str, String>,
}

/// One setting.
pub struct Setting {
    /// Its name; `KVRING_` and upper case in the environment, `--` and dashes as a flag.
    pub name: &'static str,
    /// FlexKV's environment variable for it, if there is one; lower case without `FLEXKV_` in files.
    pub flexkv: Option<&'static str>,
    /// Default, as it would be written.
    pub default: &'static str,
    /// What is accepted, in words.
    pub accepts: &'static str,
    /// What it means.
    pub doc: &'static str,
    set: fn(&mut Config, &str) -> Option<()>,
}

macro_rules! setting {
    ($name:literal, $flexkv:expr, $default:literal, $accepts:literal, $doc:literal, $set:expr) => {
        Setting { name: $name, flexkv: $flexkv, default: $default, accepts: $accepts, doc: $doc, set: $set }
    };
}

/// Every setting there is.
pub const SETTINGS: &[Setting] = &[
    setting!(
        "cpu_cache_gb",
        Some("FLEXKV_CPU_CACHE_GB"),
        "16",
        "GiB above 0, such as 16 or 0.5",
        "Size of the DRAM pool that all instances share.",
        |c, v| {
            c.cpu_cache_bytes = gib(v).filter(|b| *b > 0)?;
            Some(())
        }
    ),
    setting!(
        "ssd_cache_gb",
        Some("FLEXKV_SSD_CACHE_GB"),
        "0",
        "GiB, such as 128 or 0.5; 0 for none",
        "Size of the SSD tier, over all directories.",
        |c, v| {
            c.ssd_cache_bytes = gib(v)?;
            Some(())
        }
    ),
    setting!(
        "ssd_cache_dir",
        Some("FLEXKV_SSD_CACHE_DIR"),
        "./flexkv_ssd",
        "one directory, block device or SPDK address, or several separated by ';'",
        "Where the SSD tier lies: a directory for its files, or a block device that holds nothing else (/dev/nvme0n1): another program's data on it is never overwritten, unless `kvring serve --force-format` says so; or an NVMe namespace that SPDK drives (trtype:TCP adrfam:IPv4 traddr:... trsvcid:... subnqn:...). Blocks are striped over several; put each directory on a device of its own.",
        |c, v| {
            let dirs: Vec<PathBuf> = v.split(';').map(str::trim).filter(|d| !d.is_empty()).map(PathBuf::from).collect();
            if dirs.is_empty() {
                return None;
            }
            c.ssd_cache_dirs = dirs;
            Some(())
        }
    ),
    setting!(
        "server_recv_port",
        Some("FLEXKV_SERVER_RECV_PORT"),
        "ipc:///tmp/kvring_server",
        "a unix socket: ipc:///path or /path (tcp:// is not served: instances share memory with the server, so they are on its machine)",
        "The server's control socket: instances with the same path share one cache.",
        |c, v| {
            c.socket = socket_path(v)?;
            Some(())
        }
    ),
    setting!(
        "instance_num",
        Some("FLEXKV_INSTANCE_NUM"),
        "1",
        "a whole number from 1 to 1024",
        "How many instances may share the server; instance_id must be below it. None has to wait for the others.",
        |c, v| {
            c.instance_num = v.parse().ok().filter(|n| (1..=1024).contains(n))?;
            Some(())
        }
    ),
    setting!(
        "instance_id",
        Some("FLEXKV_INSTANCE_ID"),
        "0",
        "a whole number below instance_num",
        "Which instance this is. Instance 0 starts the server in launch mode embedded. An instance that is given no number takes one of its own and may start the server too.",
        |c, v| {
            c.instance_id = v.parse().ok()?;
            Some(())
        }
    ),
    setting!(
        "server_launch_mode",
        Some("FLEXKV_SERVER_LAUNCH_MODE"),
        "embedded",
        "embedded or external",
        "embedded: instance 0 starts the server, detached, and any instance starts it again if it is gone. external: nobody starts one.",
        |c, v| {
            c.launch_mode = pick(v, &[("embedded", LaunchMode::Embedded), ("external", LaunchMode::External)])?;
            Some(())
        }
    ),
    setting!(
        "log_level",
        Some("FLEXKV_LOG_LEVEL"),
        "INFO",
        "ERROR, WARN (or WARNING), INFO, DEBUG, TRACE or OFF",
        "How much the server says.",
        |c, v| {
            c.log_level = log_level(v)?.into();
            Some(())
        }
    ),
    setting!(
        "num_log_interval_requests",
        Some("FLEXKV_NUM_LOG_INTERVAL_REQUESTS"),
        "200",
        "a whole number; 0 for never",
        "The server logs one line of counters when this many matches or more have been answered since the last one, and at most one a second: a busy server skips lines, not counts.",
        |c, v| {
            c.num_log_interval_requests = v.parse().ok()?;
            Some(())
        }
    ),
    setting!(
        "eviction_policy",
        Some("FLEXKV_EVICTION_POLICY"),
        "lru",
        "lru, lfu, slru, fifo, mru, filo or s3fifo",
        "Which block goes first when room is needed. Whatever the policy, a block goes after its children and a leased one never.",
        |c, v| {
            c.eviction_policy = pick(v, EVICTION_POLICIES)?;
            Some(())
        }
    ),
    setting!(
        "slru_protected_threshold",
        Some("FLEXKV_SLRU_PROTECTED_THRESHOLD"),
        "2",
        "a whole number from 1 to 255",
        "slru: matches after which a block counts as protected.",
        |c, v| {
            c.slru_protected_threshold = v.parse().ok().filter(|n| (1..=255).contains(n))?;
            Some(())
        }
    ),
    setting!(
        "hugepages",
        Some("FLEXKV_USE_HUGEPAGE_CPU_BUFFER"),
        "try",
        "off (or 0), try, require (or 1)",
        "Whether the pool is made of hugepages. try falls back to 4 KiB pages with a warning; require refuses to start.",
        |c, v| {
            c.hugepages = match v.to_ascii_lowercase().as_str() {
                "off" | "0" | "false" => Hugepages::Off,
                "try" => Hugepages::Try,
                "require" | "1" | "true" => Hugepages::Require,
                _ => return None,
            };
            Some(())
        }
    ),
    setting!(
        "hugepage_size_bytes",
        Some("FLEXKV_HUGEPAGE_SIZE_BYTES"),
        "2097152",
        "2097152 or 1073741824",
        "Size of one hugepage.",
        |c, v| {
            c.hugepage_size_bytes = v.parse().ok().filter(|b| [2 << 20, 1 << 30].contains(b))?;
            Some(())
        }
    ),
    setting!(
        "io_engine",
        None,
        "auto",
        "auto, uring, aio or nvme",
        "Kernel interface to the SSDs. auto takes io_uring, or libaio with a warning where io_uring is forbidden. nvme sends NVMe commands through io_uring, past the block layer, to each NVMe namespace named in ssd_cache_dir (Linux 6.2, or CAP_SYS_ADMIN); what is none, or refuses, is driven by io_uring with a warning.",
        |c, v| {
            c.io_engine = pick(
                v,
                &[
                    ("auto", IoEngine::Auto),
                    ("uring", IoEngine::Uring),
                    ("aio", IoEngine::Aio),
                    ("nvme", IoEngine::Nvme),
                ],
            )?;
            Some(())
        }
    ),
    setting!(
        "iouring_entries",
        Some("FLEXKV_IOURING_ENTRIES"),
        "512",
        "a whole number from 2 to 4096; 0 for io_engine = aio",
        "Entries of each device's submission queue.",
        |c, v| {
            let n: u32 = v.parse().ok()?;
            if n == 0 {
                c.io_engine = IoEngine::Aio;
                return Some(());
            }
            if !(2..=4096).contains(&n) {
                return None;
            }
            c.iouring_entries = n;
            Some(())
        }
    ),
    setting!(
        "fixed_buffers",
        None,
        "on",
        "on or off",
        "Register the pool with io_uring once, so that no I/O pins pages again. Needs CAP_IPC_LOCK or a memlock limit above the pool's size.",
        |c, v| {
            c.fixed_buffers = switch(v)?;
            Some(())
        }
    ),
    setting!(
        "io_poll",
        None,
        "off",
        "on or off",
        "Poll the devices for completions instead of being interrupted (io_uring's IOPOLL), where a device has polled queues (nvme.poll_queues=N); elsewhere interrupts, with a warning. While a transfer is in flight the server does not sleep, unless sq_poll is on.",
        |c, v| {
            c.io_poll = switch(v)?;
            Some(())
        }
    ),
    setting!(
        "sq_poll",
        None,
        "off",
        "on or off",
        "A kernel thread for each device takes submissions (io_uring's SQPOLL) and, with io_poll, polls for completions: no system calls in the server, and a CPU of its own for the kernel while the cache is busy.",
        |c, v| {
            c.sq_poll = switch(v)?;
            Some(())
        }
    ),
    setting!(
        "spdk_library",
        None,
        "libkvring_spdk.so",
        "a path, or a name that the dynamic loader finds",
        "The shared object with SPDK in it (`cargo xtask spdk` makes it), loaded if ssd_cache_dir names an address of SPDK. A server that was built with the feature `spdk` has it in itself, unless another is named.",
        |c, v| {
            c.spdk_library = v.into();
            Some(())
        }
    ),
    setting!(
        "spdk_no_huge",
        None,
        "off",
        "on or off",
        "SPDK's own memory without hugepages, and no PCI devices: enough for NVMe over TCP.",
        |c, v| {
            c.spdk_no_huge = switch(v)?;
            Some(())
        }
    ),
    setting!(
        "spdk_memory_mib",
        None,
        "256",
        "MiB, from 64 to 16384",
        "SPDK's own memory: queues, requests and what the control plane reads through. Blocks are not moved through it.",
        |c, v| {
            c.spdk_memory_mib = v.parse().ok().filter(|n| (64..=16384).contains(n))?;
            Some(())
        }
    ),
    setting!(
        "max_file_size_gb",
        Some("FLEXKV_MAX_FILE_SIZE_GB"),
        "-1",
        "GiB above 0; -1 for one file a directory",
        "Split each directory's cache over files of at most this size.",
        |c, v| {
            c.max_file_bytes =
                if v.trim().parse::<f64>().is_ok_and(|g| g < 0.0) { None } else { Some(gib(v).filter(|b| *b > 0)?) };
            Some(())
        }
    ),
    setting!(
        "ssd_read_depth",
        None,
        "32",
        "a whole number from 1 to 256",
        "Most reads in flight on one device.",
        |c, v| {
            c.ssd_read_depth = v.parse().ok().filter(|n| (1..=256).contains(n))?;
            Some(())
        }
    ),
    setting!(
        "ssd_write_depth",
        None,
        "8",
        "a whole number from 1 to 256",
        "Most write-backs in flight on one device; one at a time while reads wait.",
        |c, v| {
            c.ssd_write_depth = v.parse().ok().filter(|n| (1..=256).contains(n))?;
            Some(())
        }
    ),
    setting!(
        "ssd_write_gb_per_day",
        None,
        "0",
        "GiB, such as 2000; 0 for as much as there is",
        "Endurance budget: at most so much is written to the SSD tier in a day, over all devices, an hour's worth of it at once. A drive of 3.84 TB and one drive write a day takes 3840 GB. What may not be written stays in the pool only; a drain and the stop of the server write what is left.",
        |c, v| {
            let bytes = gib(v)?;
            c.ssd_write_bytes_per_day = (bytes > 0).then_some(bytes);
            Some(())
        }
    ),
    setting!(
        "ssd_on_mismatch",
        None,
        "refuse",
        "refuse or reset",
        "When a cache file was made for another layout, size or format: refuse to start, or empty it.",
        |c, v| {
            c.ssd_on_mismatch = pick(v, &[("refuse", OnMismatch::Refuse), ("reset", OnMismatch::Reset)])?;
            Some(())
        }
    ),
    setting!(
        "checksum",
        None,
        "on",
        "on or off",
        "Write a CRC-64/NVME of every block to the SSD and verify it on every read. Off trusts the device.",
        |c, v| {
            c.checksum = switch(v)?;
            Some(())
        }
    ),
    setting!(
        "verify",
        None,
        "crash",
        "off, crash, sampled or always",
        "Which blocks in DRAM are compared with their checksum before they are loaded. crash: those that a crashed engine process left, once each, where their checksum was made (with their write to the SSD). sampled: those, and every use of one block in 16. always: every use of every block. sampled and always make the checksum when the block is committed: about 50 us a MiB.",
        |c, v| {
            c.verify = pick(
                v,
                &[
                    ("off", Verify::Off),
                    ("crash", Verify::Crash),
                    ("sampled", Verify::Sampled),
                    ("always", Verify::Always),
                ],
            )?;
            Some(())
        }
    ),
    setting!(
        "polling",
        None,
        "adaptive",
        "adaptive or busy",
        "adaptive sleeps when idle; busy never does, and wants server_cpu on a core of its own.",
        |c, v| {
            c.polling = pick(v, &[("adaptive", Polling::Adaptive), ("busy", Polling::Busy)])?;
            Some(())
        }
    ),
    setting!(
        "spin_us",
        None,
        "50",
        "microseconds, up to 1000000",
        "adaptive: how long the server spins before it sleeps.",
        |c, v| {
            c.spin = Duration::from_micros(v.parse().ok().filter(|n| *n <= 1_000_000)?);
            Some(())
        }
    ),
    setting!(
        "server_cpu",
        None,
        "none",
        "the number of a CPU, or none",
        "Pin the server's shard to this CPU.",
        |c, v| {
            c.server_cpu = if v == "none" { None } else { Some(v.parse().ok().filter(|n| *n < 1024)?) };
            Some(())
        }
    ),
    setting!(
        "lease_ttl_ms",
        None,
        "30000",
        "milliseconds from 100 to 3600000",
        "How long a lease protects its blocks when nobody releases it.",
        |c, v| {
            c.lease_ttl = Duration::from_millis(v.parse().ok().filter(|n| (100..=3_600_000).contains(n))?);
            Some(())
        }
    ),
    setting!(
        "load_wait_ms",
        None,
        "50",
        "milliseconds up to 60000",
        "How long a load may wait for a free slot before its block is answered busy.",
        |c, v| {
            c.load_wait = Duration::from_millis(v.parse().ok().filter(|n| *n <= 60_000)?);
            Some(())
        }
    ),
    setting!(
        "writer_grace_ms",
        None,
        "2000",
        "milliseconds up to 60000",
        "How long after the death of an instance the slots it was filling stay unused: a GPU may still be writing.",
        |c, v| {
            c.writer_grace = Duration::from_millis(v.parse().ok().filter(|n| *n <= 60_000)?);
            Some(())
        }
    ),
    setting!(
        "allowed_groups",
        None,
        "none",
        "groups by name or number, separated by ';', or none",
        "Who may attach beside the server's own user and root: members of these groups, as SO_PEERCRED and /proc say. They share every byte of the pool; only the server's user may stop, reset, upgrade or verify.",
        |c, v| {
            c.allowed_groups =
                if v == "none" { Vec::new() } else { v.split(';').map(group_of).collect::<Option<_>>()? };
            Some(())
        }
    ),
    setting!(
        "crash_limit",
        None,
        "3",
        "a whole number from 1 to 1000",
        "The pool survives a crash of the engine process. After this many crashes within crash_window_s it is given up and starts empty: it may be what they die of.",
        |c, v| {
            c.crash_limit = v.parse().ok().filter(|n| (1..=1000).contains(n))?;
            Some(())
        }
    ),
    setting!("crash_window_s", None, "60", "seconds from 1 to 86400", "See crash_limit.", |c, v| {
        c.crash_window = Duration::from_secs(v.parse().ok().filter(|n| (1..=86_400).contains(n))?);
        Some(())
    }),
    setting!(
        "hang_limit_s",
        None,
        "15",
        "seconds from 0 to 3600; 0 for ever",
        "An engine process whose shard does not hear for so long ends itself, as with a crash: the pool stays. One that was stopped as a whole (SIGSTOP) is left alone.",
        |c, v| {
            c.hang_limit = Duration::from_secs(v.parse().ok().filter(|n| *n <= 3600)?);
            Some(())
        }
    ),
    setting!(
        "client_wait_ms",
        None,
        "10",
        "milliseconds from 1 to 60000",
        "Longest an instance waits for one answer; after that a match is a miss, a load fails its blocks and a store is dropped.",
        |c, v| {
            c.client_wait = Duration::from_millis(v.parse().ok().filter(|n| (1..=60_000).contains(n))?);
            Some(())
        }
    ),
    setting!(
        "start_wait_ms",
        None,
        "5000",
        "milliseconds up to 600000",
        "How long opening an instance waits for a server before it goes on without a cache.",
        |c, v| {
            c.start_wait = Duration::from_millis(v.parse().ok().filter(|n| *n <= 600_000)?);
            Some(())
        }
    ),
    setting!(
        "cuda_driver",
        None,
        "auto",
        "auto, or the path of a libcuda.so.1",
        "Where an instance finds the CUDA driver. auto: as the loader does, then where container runtimes put it.",
        |c, v| {
            c.cuda_driver =
                if v == "auto" { None } else { Some(PathBuf::from(v).is_absolute().then(|| PathBuf::from(v))?) };
            Some(())
        }
    ),
    setting!(
        "cuda_staging_mb",
        None,
        "48",
        "MiB from 2 to 4096; 0 for none",
        "Device memory of each worker for gathering small pages (under some tens of KiB: tensor parallelism, MLA) before they cross the bus. With 0 such pages are copied one by one, at a fraction of the link.",
        |c, v| {
            c.cuda_staging_bytes = v.parse::<u64>().ok().filter(|n| *n == 0 || (2..=4096).contains(n))? << 20;
            Some(())
        }
    ),
    setting!(
        "cuda_batch_copy",
        None,
        "on",
        "on or off",
        "Whether a worker may hand many copies to the CUDA driver in one call (cuMemcpyBatchAsync, from CUDA 12.8). off: one by one, should a driver not survive it.",
        |c, v| {
            c.cuda_batch_copy = switch(v)?;
            Some(())
        }
    ),
    setting!(
        "copy_threads",
        None,
        "0",
        "a whole number up to 64",
        "Threads with which a worker without a GPU copies; 0: the agent's own.",
        |c, v| {
            c.copy_threads = v.parse().ok().filter(|n| *n <= 64)?;
            Some(())
        }
    ),
    setting!(
        "server_bin",
        None,
        "none",
        "path of the kvring program, or none",
        "The program an instance starts as the server; none looks beside the running program, then in PATH.",
        |c, v| {
            c.server_bin = (v != "none").then(|| PathBuf::from(v));
            Some(())
        }
    ),
    setting!(
        "server_log",
        None,
        "none",
        "path of a file, or none",
        "Where a server that an instance started writes its log; none is the socket's path with .log.",
        |c, v| {
            c.server_log = (v != "none").then(|| PathBuf::from(v));
            Some(())
        }
    ),
    setting!(
        "stats_segment",
        None,
        "on",
        "on or off",
        "Show what the server counts and does in shared memory, for `kvring stat`, `top`, `explain`, `trace` and metrics_listen. Off is for measuring what that costs.",
        |c, v| {
            c.stats_segment = switch(v)?;
            Some(())
        }
    ),
    setting!(
        "recorder_entries",
        None,
        "262144",
        "a whole number up to 4194304; 0 for no recorder",
        "How many of the last operations and block moves the server remembers for `kvring explain` and `kvring trace`, 64 bytes each; rounded up to a power of two.",
        |c, v| {
            let entries: usize = v.parse().ok().filter(|n| *n <= 1 << 22)?;
            c.recorder_entries = if entries == 0 { 0 } else { entries.next_power_of_two() };
            Some(())
        }
    ),
    setting!(
        "metrics_listen",
        None,
        "none",
        "a loopback address with a port (127.0.0.1:9464, [::1]:9464), unix:/path, or none",
        "Where the server answers GET /metrics in Prometheus' text format. A port of loopback is open to every user of the machine; a path to the server's own user, root and allowed_groups.",
        |c, v| {
            c.metrics_listen = if v == "none" { None } else { Some(metrics_listen(v)?) };
            Some(())
        }
    ),
];

/// FlexKV settings that have no meaning here, and what replaces each.
pub const NOT_APPLICABLE: &[(&str, &str)] = &[
    ("FLEXKV_SERVER_CLIENT_MODE", "kvring always runs one server and clients"),
    ("FLEXKV_INDEX_ACCEL", "the index is native"),
    ("FLEXKV_CPU_LAYOUT", "a block lies whole in its slot"),
    ("FLEXKV_SSD_LAYOUT", "a block lies whole in its slot"),
    ("FLEXKV_REMOTE_LAYOUT", "there is no remote tier"),
    ("FLEXKV_GDS_LAYOUT", "there is no GDS path"),
    ("FLEXKV_ENABLE_GDS", "SSD reads land in the pinned pool by O_DIRECT"),
    ("FLEXKV_ENABLE_NIXL", "SSD reads land in the pinned pool by O_DIRECT"),
    ("FLEXKV_ENABLE_LAYERWISE_TRANSFER", "a load reports block by block"),
    ("FLEXKV_USE_CE_TRANSFER_H2D", "instances copy on their own CUDA streams"),
    ("FLEXKV_USE_CE_TRANSFER_D2H", "instances copy on their own CUDA streams"),
    ("FLEXKV_TRANSFER_NUM_CTA_H2D", "instances copy on their own CUDA streams"),
    ("FLEXKV_TRANSFER_NUM_CTA_D2H", "instances copy on their own CUDA streams"),
    ("FLEXKV_CE_SEGMENT_THRESHOLD", "instances copy on their own CUDA streams"),
    ("FLEXKV_CE_PATH_OPT", "instances copy on their own CUDA streams"),
    ("FLEXKV_ENABLE_CE_MEMCPY2D", "instances copy on their own CUDA streams"),
    ("FLEXKV_CE_GATHER_THREADS", "instances copy on their own CUDA streams"),
    ("FLEXKV_CE_GATHER_NT", "instances copy on their own CUDA streams"),
    ("FLEXKV_SSD_IO_OPT", "every block is one read or write"),
    ("FLEXKV_IOURING_FLAGS", "io_engine, fixed_buffers, io_poll and sq_poll"),
    ("FLEXKV_EVICT_RATIO", "eviction costs what it evicts, so nothing is evicted ahead"),
    ("FLEXKV_EVICT_START_THRESHOLD", "eviction costs what it evicts, so nothing is evicted ahead"),
    ("FLEXKV_HIT_REWARD_SECONDS", "eviction_policy = slru or s3fifo"),
    ("FLEXKV_ENABLE_MPS", "the server has no CUDA context"),
    ("FLEXKV_KV_SHARED_ACROSS_RANKS_MODE", "ranks share one slot"),
    ("FLEXKV_MLA_D2H_MODE", "ranks share one slot"),
    ("FLEXKV_ENABLE_METRICS", "metrics_listen"),
    ("FLEXKV_PY_METRICS_PORT", "metrics_listen"),
    ("FLEXKV_CPP_METRICS_PORT", "metrics_listen"),
    ("FLEXKV_ENABLE_TRACE", "recorder_entries, and `kvring trace`"),
    ("FLEXKV_TRACE_FILE_PATH", "recorder_entries, and `kvring trace`"),
    ("FLEXKV_TRACE_MAX_FILE_SIZE_MB", "recorder_entries, and `kvring trace`"),
    ("FLEXKV_TRACE_MAX_FILES", "recorder_entries, and `kvring trace`"),
    ("FLEXKV_TRACE_FLUSH_INTERVAL_MS", "recorder_entries, and `kvring trace`"),
    ("FLEXKV_TRANSFER_TRACE", "recorder_entries, and `kvring trace`"),
    ("FLEXKV_WORKER_SHUTDOWN_TIMEOUT_S", "there are no worker processes"),
    ("FLEXKV_TRANSFER_MANAGER_SHUTDOWN_TIMEOUT_S", "there are no worker processes"),
    ("FLEXKV_USE_HUGEPAGE_TMP_BUFFER", "there is no staging buffer"),
    ("FLEXKV_KV_CACHE_DTYPE", "the layout that instances present"),
    ("FLEXKV_SWA_MULTI_GROUP", "the layout that instances present"),
    ("FLEXKV_ENABLE_SWA_TRANSFER", "the layout that instances present"),
    ("FLEXKV_USE_MOONCAKE_STORE_BACKEND", "there is no remote tier"),
    ("FLEXKV_MOONCAKE_STORE_CONFIG_PATH", "there is no remote tier"),
    ("FLEXKV_ENABLE_NVCOMP", "blocks are stored as they are"),
    ("FLEXKV_NVCOMP_BATCH_SIZE", "blocks are stored as they are"),
    ("FLEXKV_LAYERWISE_NOTIFY_MODE", "a load reports block by block"),
    ("FLEXKV_LAYERWISE_EVENTFD_SOCKET", "a load reports block by block"),
    ("FLEXKV_LAYERWISE_WAIT_TIMEOUT_S", "client_wait_ms"),
    ("FLEXKV_ENABLE_COLLECTIVE_SYNC", "ranks share one slot"),
    ("FLEXKV_LOGGING_PREFIX", "the log says who writes"),
    ("FLEXKV_EVICTION_LOG_INTERVAL_S", "kvring stat"),
    ("FLEXKV_HUGETLBFS_DIR", "hugepages come as a memfd: no mount is needed"),
    ("FLEXKV_CUDAHOST_CHUNK_SIZE_GB", "instances register the pool in pieces of at most 1 GiB"),
    ("FLEXKV_VMM_FD_SOCK_DIR", "GPU memory never leaves its process"),
    ("FLEXKV_SYNC_GET", "client_wait_ms"),
    ("FLEXKV_MAYBE_SKIP_PUT", "stores are dropped when there is no room"),
    ("FLEXKV_MASTER_HOST", "one machine, one server"),
    ("FLEXKV_MASTER_PORTS", "one machine, one server"),
    ("FLEXKV_TRT_SUBPROCESS_PORTS", "one machine, one server"),
];

/// File keys of FlexKV that have no meaning here and no environment variable either.
const NOT_APPLICABLE_KEYS: &[&str] = &[
    "enable_p2p_cpu",
    "enable_p2p_ssd",
    "enable_3rd_remote",
    "redis_host",
    "redis_port",
    "redis_password",
    "local_ip",
    "local_zmq_ip",
    "local_zmq_port",
    "node_ttl_seconds",
];

/// Prefixes of FlexKV's distributed settings, none of which apply on one machine.
const NOT_APPLICABLE_PREFIX: &str = "FLEXKV_LT_POOL_";

/// What each instance says for itself: the server need not have been told the same.
pub const CLIENT_SETTINGS: &[&str] = &[
    "instance_id",
    "instance_num",
    "server_recv_port",
    "server_launch_mode",
    "server_bin",
    "server_log",
    "client_wait_ms",
    "start_wait_ms",
    "cuda_driver",
    "cuda_staging_mb",
    "cuda_batch_copy",
    "copy_threads",
    "num_log_interval_requests",
    "log_level",
];

/// A setting that cannot be, with everything needed to mend it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field} = {value:?} (from {origin}): {problem}")]
pub struct ConfigError {
    /// Name of the setting.
    pub field: String,
    /// What was said.
    pub value: String,
    /// Where it was said.
    pub origin: String,
    /// What is wrong and what would be accepted.
    pub problem: String,
}

/// A configuration and what is worth telling the operator once.
#[derive(Debug)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// FlexKV settings that do not apply here, each with what replaces it.
    pub notes: Vec<String>,
    /// Where each value that was said was said last; the others are defaults.
    pub origins: BTreeMap<&'static str, String>,
}

impl Default for Config {
    fn default() -> Self {
        let mut config = Self {
            cpu_cache_bytes: 0,
            ssd_cache_bytes: 0,
            ssd_cache_dirs: Vec::new(),
            socket: PathBuf::new(),
            instance_num: 0,
            instance_id: 0,
            launch_mode: LaunchMode::Embedded,
            log_level: String::new(),
            num_log_interval_requests: 0,
            eviction_policy: EvictionPolicy::Lru,
            slru_protected_threshold: 0,
            hugepages: Hugepages::Try,
            hugepage_size_bytes: 0,
            io_engine: IoEngine::Auto,
            iouring_entries: 0,
            fixed_buffers: true,
            io_poll: false,
            sq_poll: false,
            spdk_library: PathBuf::new(),
            spdk_no_huge: false,
            spdk_memory_mib: 0,
            max_file_bytes: None,
            ssd_read_depth: 0,
            ssd_write_depth: 0,
            ssd_write_bytes_per_day: None,
            ssd_on_mismatch: OnMismatch::Refuse,
            checksum: true,
            verify: Verify::Crash,
            polling: Polling::Adaptive,
            spin: Duration::ZERO,
            server_cpu: None,
            lease_ttl: Duration::ZERO,
            load_wait: Duration::ZERO,
            writer_grace: Duration::ZERO,
            allowed_groups: Vec::new(),
            crash_limit: 0,
            crash_window: Duration::ZERO,
            hang_limit: Duration::ZERO,
            client_wait: Duration::ZERO,
            start_wait: Duration::ZERO,
            cuda_driver: None,
            cuda_staging_bytes: 0,
            cuda_batch_copy: true,
            copy_threads: 0,
            server_bin: None,
            server_log: None,
            stats_segment: true,
            recorder_entries: 0,
            metrics_listen: None,
            said: BTreeMap::new(),
        };
        for setting in SETTINGS {
            let accepted = (setting.set)(&mut config, setting.default);
            assert!(accepted.is_some(), "the default of {} is one it accepts", setting.name);
        }
        config
    }
}

impl Config {
    /// Every setting by name, as it was said or is by default.
    pub fn as_text(&self) -> BTreeMap<String, String> {
        let value = |setting: &Setting| self.said.get(setting.name).map_or(setting.default, String::as_str).to_owned();
        SETTINGS.iter().map(|setting| (setting.name.to_owned(), value(setting))).collect()
    }

    /// What was said here of the server, and that this server was not started with: in words.
    pub fn unheeded_by(&self, server: &BTreeMap<String, String>) -> Vec<String> {
        let ours = |name: &str| CLIENT_SETTINGS.contains(&name);
        let differing = self.said.iter().filter(|(name, _)| !ours(name)).filter_map(|(name, said)| {
            let has = server.get(*name).filter(|has| *has != said)?;
            Some(format!("{name} = {said}: the server runs with {has}; `kvring stop` lets the next one take it"))
        });
        differing.collect()
    }

    /// With the sizes that somebody has asked a running server for.
    pub fn resize(&mut self, sizes: Sizes) {
        // The shortest text that means these bytes: as somebody would have said it.
        let text_of = |bytes: u64| {
            let exact = bytes as f64 / f64::from(1 << 30);
            let shorter = (0..=12).map(|digits| format!("{exact:.digits$}")).find(|text| gib(text) == Some(bytes));
            shorter.unwrap_or_else(|| exact.to_string())
        };
        for (name, bytes) in [("cpu_cache_gb", sizes.cpu_cache_bytes), ("ssd_cache_gb", sizes.ssd_cache_bytes)] {
            if let Some(bytes) = bytes {
                let accepted = self.say(name, &text_of(bytes));
                debug_assert!(accepted.is_ok());
            }
        }
    }

    /// Reads everything an operator said.
    ///
    /// `flags` are (setting, value) pairs; `env` is usually [`std::env::vars`].
    ///
    /// # Errors
    /// The first thing said that is unknown or impossible.
    pub fn load(
        flags: &[(String, String)],
        config_path: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Loaded, ConfigError> {
        let mut config = Self::default();
        let mut notes = Vec::new();
        let mut origins = BTreeMap::new();
        let mut file = config_path.map(Path::to_path_buf);
        let (mut ours, mut theirs) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in env {
            match name.as_str() {
                "KVRING_CONFIG_PATH" | "FLEXKV_CONFIG_PATH" if value.is_empty() => {}
                "KVRING_CONFIG_PATH" => {
                    file = config_path.map_or_else(|| Some(PathBuf::from(value)), |p| Some(p.into()))
                }
                "FLEXKV_CONFIG_PATH" if file.is_none() => file = Some(PathBuf::from(value)),
                "FLEXKV_CONFIG_PATH" => {}
                _ if name.starts_with("KVRING_") => drop(ours.insert(name, value)),
                _ if name.starts_with("FLEXKV_") => drop(theirs.insert(name, value)),
                _ => {}
            }
        }
        for (name, value) in theirs {
            if let Some(setting) = SETTINGS.iter().find(|s| s.flexkv == Some(name.as_str())) {
                config.set(setting, &value, &name)?;
                origins.insert(setting.name, name);
            } else if let Some((_, instead)) = NOT_APPLICABLE.iter().find(|(known, _)| *known == name) {
                notes.push(format!("{name} does not apply to kvring: {instead}"));
            } else if name.starts_with(NOT_APPLICABLE_PREFIX) {
                notes.push(format!("{name} does not apply to kvring: one machine, one server"));
            } else {
                let known = SETTINGS.iter().filter_map(|s| s.flexkv).chain(NOT_APPLICABLE.iter().map(|(n, _)| *n));
                return Err(unknown(&name, &value, "the environment", known));
            }
        }
        for (name, value) in ours {
            let field = name.strip_prefix("KVRING_").unwrap_or(&name).to_ascii_lowercase();
            let Some(setting) = SETTINGS.iter().find(|s| s.name == field) else {
                return Err(unknown(&field, &value, &name, SETTINGS.iter().map(|s| s.name)));
            };
            config.set(setting, &value, &name)?;
            origins.insert(setting.name, name);
        }
        if let Some(path) = file {
            config.set_from_file(&path, &mut notes, &mut origins)?;
        }
        for (field, value) in flags {
            let Some(setting) = SETTINGS.iter().find(|s| s.name == field) else {
                return Err(unknown(field, value, "a flag", SETTINGS.iter().map(|s| s.name)));
            };
            let origin = format!("--{}", field.replace('_', "-"));
            config.set(setting, value, &origin)?;
            origins.insert(setting.name, origin);
        }
        if config.instance_id >= config.instance_num {
            return Err(ConfigError {
                field: "instance_id".into(),
                value: config.instance_id.to_string(),
                origin: "instance_id and instance_num together".into(),
                problem: format!("must be below instance_num = {}: raise instance_num", config.instance_num),
            });
        }
        Ok(Loaded { config, notes, origins })
    }

    fn set(&mut self, setting: &Setting, value: &str, origin: &str) -> Result<(), ConfigError> {
        let Some(()) = (setting.set)(self, value.trim()) else {
            return Err(ConfigError {
                field: setting.name.into(),
                value: value.into(),
                origin: origin.into(),
                problem: format!("expected {}", setting.accepts),
            });
        };
        self.said.insert(setting.name, value.trim().to_owned());
        Ok(())
    }

    /// Sets one value by name, as a flag does.
    ///
    /// # Errors
    /// The setting is unknown or the value is not accepted.
    pub fn say(&mut self, name: &str, value: &str) -> Result<(), ConfigError> {
        let Some(setting) = SETTINGS.iter().find(|s| s.name == name) else {
            return Err(unknown(name, value, "the program", SETTINGS.iter().map(|s| s.name)));
        };
        self.set(setting, value, "the program")
    }

    fn set_from_file(
        &mut self,
        path: &Path,
        notes: &mut Vec<String>,
        origins: &mut BTreeMap<&'static str, String>,
    ) -> Result<(), ConfigError> {
        let origin = path.display().to_string();
        let broken = |problem: String| ConfigError {
            field: "config_path".into(),
            value: origin.clone(),
            origin: "the configuration file".into(),
            problem,
        };
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        if !["yml", "yaml", "json", "toml"].contains(&extension.as_str()) {
            return Err(broken("must end in .yml, .yaml, .json or .toml".into()));
        }
        let text = std::fs::read_to_string(path).map_err(|error| broken(format!("cannot be read: {error}")))?;
        let parsed: Result<serde_json::Value, String> = match extension.as_str() {
            "json" => serde_json::from_str(&text).map_err(|e| e.to_string()),
            "yml" | "yaml" => serde_saphyr::from_str(&text).map_err(|e| e.to_string()),
            _ => toml::from_str(&text).map_err(|e| e.to_string()),
        };
        let entries = match parsed.map_err(|error| broken(format!("is not valid {extension}: {error}")))? {
            serde_json::Value::Object(entries) => entries,
            serde_json::Value::Null => return Ok(()),
            _ => return Err(broken("must hold one mapping of settings".into())),
        };
        for (key, value) in entries {
            // In a file as in the environment, or in lower case without the prefix.
            let lower = key.to_ascii_lowercase();
            let key = lower.strip_prefix("flexkv_").or(lower.strip_prefix("kvring_")).unwrap_or(&lower).to_owned();
            let as_flexkv = format!("FLEXKV_{}", key.to_ascii_uppercase());
            let setting = SETTINGS.iter().find(|s| s.name == key || s.flexkv == Some(as_flexkv.as_str()));
            let instead = NOT_APPLICABLE.iter().find(|(name, _)| *name == as_flexkv).map(|(_, instead)| *instead);
            match (setting, instead) {
                // A FlexKV file writes null for "not set".
                (_, _) if value.is_null() => {}
                (Some(setting), _) => {
                    self.set(setting, &plain_text(&key, &value, &origin)?, &origin)?;
                    origins.insert(setting.name, origin.clone());
                }
                (None, Some(instead)) => notes.push(format!("{key} in {origin} does not apply to kvring: {instead}")),
                (None, None)
                    if NOT_APPLICABLE_KEYS.contains(&key.as_str()) || as_flexkv.starts_with(NOT_APPLICABLE_PREFIX) =>
                {
                    notes.push(format!("{key} in {origin} does not apply to kvring: one machine, one server"));
                }
                (None, None) => {
                    return Err(unknown(&key, &value.to_string(), &origin, SETTINGS.iter().map(|s| s.name)));
                }
            }
        }
        Ok(())
    }

    /// `docs/CONFIG.md`, whole.
    pub fn document() -> String {
        use std::fmt::Write;
        let mut text = String::from(CONFIG_MD_HEAD);
        for s in SETTINGS {
            let flexkv = s.flexkv.map_or_else(|| "–".to_owned(), |name| format!("`{name}`"));
            let upper = s.name.to_ascii_uppercase();
            let _ = writeln!(
                text,
                "| `{}` | `KVRING_{upper}` | {flexkv} | `{}` | {} | {} |",
                s.name, s.default, s.accepts, s.doc
            );
        }
        text.push_str("\n## FlexKV settings that do not apply\n\nEach is named once in the log and otherwise ignored.\n\n| FlexKV | here instead |\n|---|---|\n");
        for (name, instead) in NOT_APPLICABLE {
            let _ = writeln!(text, "| `{name}` | {instead} |");
        }
        let _ = writeln!(
            text,
            "| `{NOT_APPLICABLE_PREFIX}*` and the file keys {} | one machine, one server |",
            NOT_APPLICABLE_KEYS.map_join()
        );
        text
    }
}

trait MapJoin {
    fn map_join(&self) -> String;
}
impl MapJoin for &[&str] {
    fn map_join(&self) -> String {
        self.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
    }
}

const CONFIG_MD_HEAD: &str = "\
# Configuration

Generated from `ipc/src/config.rs`; a test fails when this page and the code differ
(`cargo xtask docs` writes it anew).

The same settings serve the server and the instances. Where one is said in several places the first of
these wins: a flag (`--cpu-cache-gb 16`), the file named by `--config`, `KVRING_CONFIG_PATH` or
`FLEXKV_CONFIG_PATH` (YAML, JSON or TOML, with the names of this page or FlexKV's), `KVRING_*`, `FLEXKV_*`,
the default. An instance that starts the server hands over everything it was told, so a file reaches the
server whole. GB means GiB (2^30 bytes), as in FlexKV, and may have a fraction. What is unknown or impossible
is an error that names the field, the value and what would be accepted.

| setting | environment | FlexKV | default | accepts | meaning |
|---|---|---|---|---|---|
";

fn unknown<'a>(field: &str, value: &str, origin: &str, known: impl Iterator<Item = &'a str>) -> ConfigError {
    let closest = known.max_by(|a, b| strsim::jaro_winkler(a, field).total_cmp(&strsim::jaro_winkler(b, field)));
    let closest = closest.filter(|name| strsim::jaro_winkler(name, field) > 0.8);
    let hint = closest.map(|name| format!("the closest is {name}, and ")).unwrap_or_default();
    let problem = format!("no such setting; {hint}docs/CONFIG.md lists all");
    ConfigError { field: field.into(), value: value.into(), origin: origin.into(), problem }
}

fn plain_text(key: &str, value: &serde_json::Value, origin: &str) -> Result<String, ConfigError> {
    use serde_json::Value::{Array, Bool, Number, String};
    let text = match value {
        String(text) => Some(text.clone()),
        Number(number) => Some(number.to_string()),
        Bool(true) => Some("1".into()),
        Bool(false) => Some("0".into()),
        Array(items) if items.iter().all(serde_json::Value::is_string) => {
            Some(items.iter().filter_map(|item| item.as_str()).collect::<Vec<_>>().join(";"))
        }
        _ => None,
    };
    text.ok_or_else(|| ConfigError {
        field: key.into(),
        value: value.to_string(),
        origin: origin.into(),
        problem: "expected a text, a number, a truth value or a list of texts".into(),
    })
}

fn pick<T: Copy>(text: &str, choices: &[(&str, T)]) -> Option<T> {
    let lower = text.to_ascii_lowercase();
    choices.iter().find(|(name, _)| *name == lower).map(|(_, value)| *value)
}

/// A group's number, or its name as /etc/group has it.
fn group_of(text: &str) -> Option<u32> {
    let text = text.trim();
    let number_in = |line: &str| line.strip_prefix(text)?.strip_prefix(':')?.split(':').nth(1)?.parse().ok();
    let named = || std::fs::read_to_string("/etc/group").ok()?.lines().find_map(number_in);
    text.parse().ok().or_else(named)
}

fn switch(text: &str) -> Option<bool> {
    pick(text, &[("on", true), ("off", false), ("1", true), ("0", false), ("true", true), ("false", false)])
}

fn log_level(text: &str) -> Option<&'static str> {
    pick(
        text,
        &[
            ("error", "error"),
            ("critical", "error"),
            ("warn", "warn"),
            ("warning", "warn"),
            ("info", "info"),
            ("debug", "debug"),
            ("trace", "trace"),
            ("off", "off"),
        ],
    )
}

/// Nobody outside this machine is told what a cache does.
fn metrics_listen(text: &str) -> Option<MetricsListen> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Some(PathBuf::from(path)).filter(|path| path.is_absolute()).map(MetricsListen::Unix);
    }
    text.parse().ok().filter(|address: &std::net::SocketAddr| address.ip().is_loopback()).map(MetricsListen::Tcp)
}

/// GiB with a fraction, in bytes. At most 1 EiB.
fn gib(text: &str) -> Option<u64> {
    let gib: f64 = text.parse().ok()?;
    (gib.is_finite() && (0.0..=f64::from(1 << 30)).contains(&gib)).then_some((gib * f64::from(1 << 30)) as u64)
}

/// `ipc:///path` or an absolute path. A unix address holds 107 bytes and we append nothing to it.
fn socket_path(text: &str) -> Option<PathBuf> {
    let path = text.strip_prefix("ipc://").unwrap_or(text);
    (path.starts_with('/') && path.len() <= 107).then(|| PathBuf::from(path))
}

#[cfg(test)]
#[path = "config_test.rs"]
mod test;
