//! `kvring doctor`: is this machine fit for the cache that is configured? Looks, changes nothing that stays,
//! needs no server; each thing found comes with the command that mends it.

mod gpu;
mod numa;
mod pci;
mod stale;

use std::fs::File;
use std::io::IsTerminal;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use kvring_engine::control::engine::check_memlock;
use kvring_engine::device::files::{self, Found};
use kvring_engine::device::medium::{Medium, Patience};
use kvring_engine::device::nvme::{self, Health, Namespace};
use kvring_engine::device::{spdk, uring};
use kvring_engine::dma;
use kvring_ipc::config::{Config, Hugepages, IoEngine};
use kvring_ipc::handshake::Channel;
use kvring_ipc::launch::beside_socket;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::settings::Settings;

/// Arguments of `kvring doctor`.
#[derive(Args)]
#[command(after_help = "\
Exit status: 0 nothing to mend; 1 something costs speed or comfort; 2 a server with this configuration does not start.
Run it as the user, and with the limits, that the server will have.")]
pub struct DoctorArgs {
    /// Print what was found as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; with a remedy where somebody could do something about it.
    Note,
    /// It works, and could work better.
    Warning,
    /// It does not work.
    Problem,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    found: String,
    /// The command, or the words, that mend it.
    remedy: Option<String>,
}

#[derive(Default)]
struct Report {
    findings: Vec<Finding>,
}

impl Report {
    fn ok(&mut self, check: &'static str, found: impl Into<String>) {
        self.findings.push(Finding { check, level: Level::Ok, found: found.into(), remedy: None });
    }
    fn note(&mut self, check: &'static str, found: impl Into<String>) {
        self.findings.push(Finding { check, level: Level::Note, found: found.into(), remedy: None });
    }
    /// Worth knowing, and there is something to be done about it.
    fn advise(&mut self, check: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.bad(check, Level::Note, found, remedy);
    }
    fn bad(&mut self, check: &'static str, level: Level, found: impl Into<String>, remedy: impl Into<String>) {
        self.findings.push(Finding { check, level, found: found.into(), remedy: Some(remedy.into()) });
    }
}

/// Looks at everything, says it, and how bad the worst of it is.
pub fn run(args: &DoctorArgs) -> ExitCode {
    let mut report = Report::default();
    match args.settings.load() {
        Ok(loaded) => {
            report.ok("configuration", format!("server_recv_port {}", loaded.config.socket.display()));
            for note in &loaded.notes {
                report.advise("configuration", note, remedy_of_note(note));
            }
            look_at_everything(&mut report, &loaded.config);
        }
        Err(error) => {
            report.bad("configuration", Level::Problem, error.to_string(), "docs/CONFIG.md lists every setting")
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report.findings).unwrap_or_default());
    } else {
        print(&report.findings);
    }
    match report.findings.iter().map(|finding| finding.level).max() {
        Some(Level::Problem) => ExitCode::from(2),
        Some(Level::Warning) => ExitCode::from(1),
        _ => ExitCode::SUCCESS,
    }
}

/// What a setting that does not apply is best done with: `NAME does not apply ...`, or `name in FILE does not apply ...`.
fn remedy_of_note(note: &str) -> String {
    let said = note.split(" does not apply").next().unwrap_or(note);
    match said.split_once(" in ") {
        Some((name, file)) => format!("remove {name} from {file}"),
        None => format!("unset {said}"),
    }
}

fn print(findings: &[Finding]) {
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    for Finding { check, level, found, remedy } in findings {
        let (word, colour) = match level {
            Level::Ok => ("ok", 32),
            Level::Note => ("note", 36),
            Level::Warning => ("warning", 33),
            Level::Problem => ("problem", 31),
        };
        let (on, off) = if colours { (format!("\x1b[{colour}m"), "\x1b[0m") } else { (String::new(), "") };
        println!("{on}{word:<8}{off}{check:<16}{found}");
        if let Some(remedy) = remedy {
            println!("{:<24}→ {remedy}", "");
        }
    }
}

fn look_at_everything(report: &mut Report, config: &Config) {
    let serves = look_at_socket(report, config);
    look_at_kernel(report, config);
    look_at_limits(report, config);
    look_at_memory(report, config, serves);
    if config.ssd_cache_bytes == 0 {
        let remedy = "ssd_cache_gb = GIB and ssd_cache_dir = DIRECTORY, on an SSD, for more room";
        report.advise("ssd", "ssd_cache_gb = 0: a cache in DRAM only", remedy);
    } else {
        config.ssd_cache_dirs.iter().for_each(|dir| look_at_dir(report, config, dir, serves));
    }
    look_at_cpus(report, config);
    look_at_nodes(report, config, serves);
    gpu::look(report, config, Path::new(SYS), Path::new("/proc"));
    look_at_vfio(report);
    if !serves {
        look_for_what_is_left(report, config);
    }
}

const SYS: &str = "/sys";

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Whether a server serves there.
fn look_at_socket(report: &mut Report, config: &Config) -> bool {
    let socket = &config.socket;
    let lock = beside_socket(socket, "lock");
    let dir = socket.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !dir.is_dir() {
        let found = format!("{} is no directory", dir.display());
        report.bad("socket", Level::Problem, found, format!("mkdir -p {}", stale::quoted(dir)));
        return false;
    }
    // Its lock is not tried: a server that starts right now would take us for another one.
    match Channel::connect(socket, Duration::from_secs(1)) {
        Ok(_) => {
            let pid = read(&lock).unwrap_or_default();
            report.ok("socket", format!("{}: process {pid} listens there", socket.display()));
            return true;
        }
        Err(Errno::NOENT) => report.ok("socket", format!("{}: free", socket.display())),
        Err(Errno::CONNREFUSED) if !is_socket(socket) => {
            let found = format!("{} is no socket", socket.display());
            report.bad("socket", Level::Problem, found, "set server_recv_port to a path where nothing else lies");
        }
        // Nobody removes it by hand: one that starts has bound it before it listens.
        Err(Errno::CONNREFUSED) => {
            let whose = "a dead server's, which the next one removes, or one's that starts";
            report.note("socket", format!("{}: {whose}", socket.display()));
        }
        Err(error) => {
            let found = format!("{}: {error}", socket.display());
            report.bad("socket", Level::Problem, found, "set server_recv_port to a path that this user may use");
        }
    }
    false
}

fn is_socket(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.file_type().is_socket())
}

fn look_at_kernel(report: &mut Report, config: &Config) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (5, 13) {
        let found = format!("Linux {release}: io_uring's tables of buffers need 5.13");
        report.bad("kernel", Level::Warning, found, "a newer kernel, or io_engine = aio");
    } else {
        report.ok("kernel", format!("Linux {release}"));
    }
    if config.io_engine == IoEngine::Aio || config.ssd_cache_bytes == 0 {
        return report.note("io_uring", "not asked for (io_engine, ssd_cache_gb)");
    }
    let Err(error) = uring::probe() else { return report.ok("io_uring", "allowed") };
    let level = if config.io_engine == IoEngine::Uring { Level::Problem } else { Level::Warning };
    let instead = if level == Level::Warning { ": libaio drives the SSDs instead" } else { "" };
    let remedy = match read("/proc/sys/kernel/io_uring_disabled").as_deref() {
        Some("1") => "sysctl -w kernel.io_uring_disabled=0, or put the user into kernel.io_uring_group",
        Some("2") => "sysctl -w kernel.io_uring_disabled=0",
        // Neither the kernel's absence of it nor a sysctl: what filters system calls does it.
        _ => "let the container's seccomp profile allow io_uring_setup, io_uring_enter and io_uring_register",
    };
    report.bad("io_uring", level, format!("{error}{instead}"), remedy);
}

/// Beyond the hard limit only root can raise it; $$ is the shell that starts the server.
const MORE_DESCRIPTORS: &str = "sudo prlimit --pid $$ --nofile=4096:4096 (LimitNOFILE=4096 in a unit)";

fn look_at_limits(report: &mut Report, config: &Config) {
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    match files {
        0..64 => {
            let found = format!("at most {files} descriptors: a server needs 64, and five a session");
            report.bad("limits", Level::Problem, found, MORE_DESCRIPTORS);
        }
        64..1024 => {
            let found = format!("at most {files} descriptors: five a session");
            report.bad("limits", Level::Warning, found, MORE_DESCRIPTORS);
        }
        _ => report.ok("limits", format!("{files} descriptors")),
    }
    let registers = config.fixed_buffers && config.ssd_cache_bytes > 0 && config.io_engine != IoEngine::Aio;
    match check_memlock(config.cpu_cache_bytes) {
        _ if !registers => {}
        Ok(()) => report.ok("limits", "the pool may be registered with io_uring (memlock)"),
        Err(error) => {
            report.bad("limits", Level::Problem, error.to_string(), "ulimit -l unlimited (LimitMEMLOCK=infinity)")
        }
    }
}

fn look_at_memory(report: &mut Report, config: &Config, serves: bool) {
    let pool = config.cpu_cache_bytes;
    let available = dma::available_bytes();
    let page = config.hugepage_size_bytes;
    let sysfs = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10);
    let number = |file: &str| read(format!("{sysfs}/{file}")).and_then(|text| text.parse::<u64>().ok());
    let (free, total) = (number("free_hugepages"), number("nr_hugepages").unwrap_or(0));
    let needed = pool.div_ceil(page.max(1));
    let on_hugepages = match (config.hugepages, free) {
        (Hugepages::Off, _) => {
            report.advise("hugepages", "hugepages = off: more TLB misses", "hugepages = try");
            false
        }
        _ if serves => {
            report.advise("hugepages", "a server has its pool already: not looked at", "kvring stat");
            true
        }
        (_, Some(free)) if free >= needed => {
            report.ok("hugepages", format!("{free} of {} KiB are free, {needed} are needed", page >> 10));
            true
        }
        (wanted, free) => {
            let level = if wanted == Hugepages::Require { Level::Problem } else { Level::Warning };
            let free = free.unwrap_or(0);
            let found = format!("{needed} of {} KiB are needed and {free} are free", page >> 10);
            // Pages of it that are free may be taken for it, whatever they are used for now.
            let remedy = if (needed - free) * page > available {
                format!("cpu_cache_gb = {:.0}", ((available + free * page) as f64 * 0.8 / f64::from(1 << 30)).max(1.0))
            } else {
                format!("echo {} > {sysfs}/nr_hugepages", total + needed - free)
            };
            report.bad("hugepages", level, found, remedy);
            false
        }
    };
    if !on_hugepages && !serves && pool > available {
        let found = format!("cpu_cache_gb asks for {} and {} are available", gib(pool), gib(available));
        let remedy = format!("cpu_cache_gb = {:.0}", (available as f64 * 0.8 / f64::from(1 << 30)).max(1.0));
        report.bad("memory", Level::Problem, found, remedy);
    } else {
        report.ok("memory", format!("{} for the pool, {} available", gib(pool), gib(available)));
    }
    if !on_hugepages && !dma::shared_memory_may_have_hugepages() {
        let found = "a pool without reserved hugepages is on 4 KiB pages: transparent ones are off for shared memory";
        let file = dma::SHMEM_ENABLED;
        report.bad("hugepages", Level::Warning, found, format!("echo advise > {file}"));
    }
    let file = "/sys/kernel/mm/transparent_hugepage/enabled";
    match read(file) {
        Some(modes) if modes.contains("[never]") => {
            let found = "transparent hugepages are off: a big index misses the TLB with every lookup";
            report.bad("memory", Level::Warning, found, format!("echo madvise > {file}"));
        }
        _ => {}
    }
}

fn look_at_dir(report: &mut Report, config: &Config, dir: &Path, serves: bool) {
    let name = dir.display();
    let medium = match Medium::of(dir) {
        Ok(Medium::BlockDevice(path)) => return look_at_device(report, config, Medium::BlockDevice(path), serves),
        Ok(Medium::Spdk(_)) => return look_at_spdk(report, config, dir, serves),
        Ok(medium) => medium,
        Err(error) => {
            let remedy = "set ssd_cache_dir to a directory or a block device";
            return report.bad("ssd", Level::Problem, error.to_string(), remedy);
        }
    };
    // Where it is to be made, what it is made in says what it will be.
    let Some(there) = dir.ancestors().find(|there| there.exists()) else {
        return report.bad("ssd", Level::Problem, format!("{name}: no such path"), format!("mkdir -p {name}"));
    };
    let probe = tempfile::Builder::new().prefix(".kvring-doctor-").tempfile_in(there);
    let probe = match probe {
        Ok(probe) => probe,
        Err(error) => {
            let found = format!("{name}: cannot be written to: {error}");
            return report.bad(
                "ssd",
                Level::Problem,
                found,
                "set ssd_cache_dir to a directory that this user may write",
            );
        }
    };
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    match File::options().read(true).write(true).custom_flags(direct).open(probe.path()) {
        Ok(file) => report.ok("ssd", format!("{name}: O_DIRECT, in units of {} bytes", files::direct_unit(&file))),
        Err(error) => {
            let found = format!("{name}: no O_DIRECT here: {error}");
            report.bad(
                "ssd",
                Level::Problem,
                found,
                "set ssd_cache_dir to a directory on ext4, XFS or another disk file system",
            );
        }
    }
    let share = config.ssd_cache_bytes / config.ssd_cache_dirs.len().max(1) as u64;
    let held: u64 =
        (0..).map_while(|file| std::fs::metadata(medium.path_of(file)).ok()).map(|m| m.st_blocks() * 512).sum();
    match rustix::fs::statvfs(there) {
        Ok(space) if space.f_bavail * space.f_frsize + held < share => {
            let found = format!(
                "{name}: {} are needed and {} are free",
                gib(share),
                gib(space.f_bavail * space.f_frsize + held)
            );
            report.bad("ssd", Level::Problem, found, "lower ssd_cache_gb, or make room");
        }
        Ok(_) => {
            report.ok("ssd", format!("{name}: room for {}, {} of it held already", gib(share), gib(held.min(share))))
        }
        Err(errno) => report.note("ssd", format!("{name}: free space is not told: {errno}")),
    }
    if !serves && dir.join("kvring.lock").exists() && medium.lock(Patience::No).is_err() {
        let found = format!("{name}: another server uses it");
        report.bad("ssd", Level::Problem, found, "give this server another ssd_cache_dir, or stop the other");
    }
    look_at_queue(report, there);
}

const POLLED_QUEUES: &str = "boot with nvme.poll_queues=4, then io_poll = on";

/// A device that is all the cache's: whether it can be had, and what it can do.
fn look_at_device(report: &mut Report, config: &Config, medium: Medium, serves: bool) {
    let name = medium.path().display().to_string();
    if !serves && let Err(error) = medium.lock(Patience::No) {
        return report.bad("ssd", Level::Problem, error.to_string(), "name another device, or free this one");
    }
    let share = config.ssd_cache_bytes / config.ssd_cache_dirs.len().max(1) as u64;
    match (medium.device_bytes(), files::read_superblock(&medium)) {
        (Err(error), _) | (_, Err(error)) => {
            let remedy = "run as a user that may read and write it";
            return report.bad("ssd", Level::Problem, format!("{name}: {error}"), remedy);
        }
        (Ok(bytes), _) if bytes < share => {
            let found = format!("{name}: {} are needed and it has {}", gib(share), gib(bytes));
            report.bad("ssd", Level::Problem, found, "lower ssd_cache_gb");
        }
        (_, Ok(Found::Foreign(what))) => {
            let found = format!("{name} holds another program's data ({what})");
            let remedy = "name another device, or start once with `kvring serve --force-format` to destroy it";
            report.bad("ssd", Level::Problem, found, remedy);
        }
        (Ok(bytes), Ok(Found::Nothing)) => report.ok("ssd", format!("{name}: {}, empty", gib(bytes))),
        (Ok(bytes), Ok(Found::OtherVersion | Found::Super(_))) => {
            report.ok("ssd", format!("{name}: {}, with a cache on it", gib(bytes)));
        }
    }
    let commands =
        nvme::open(&medium).and_then(|file| Ok((Namespace::identify(&file, &medium)?, Health::of(&file).ok())));
    match commands {
        Ok((namespace, health)) => {
            let Namespace { nsid, model, firmware, sector_bytes, .. } = namespace;
            let about =
                format!("{name}: namespace {nsid} of {model}, firmware {firmware}, sectors of {sector_bytes} bytes");
            report.ok("nvme", format!("{about}: io_engine = nvme can drive it"));
            if let Some(health) = health {
                look_at_health(report, &name, &health);
            }
        }
        Err(why) if config.io_engine == IoEngine::Nvme => {
            let found = format!("{name}: no NVMe commands: {why}");
            report.bad("nvme", Level::Warning, found, "set io_engine = uring, which drives it meanwhile");
        }
        Err(why) => report.advise(
            "nvme",
            format!("{name}: no NVMe commands: {why}"),
            "for io_engine = nvme: an NVMe namespace, as a user that may open its /dev/ngXnY",
        ),
    }
    let polled = medium.queue().and_then(|queue| read(queue.join("io_poll")));
    match polled.as_deref() {
        Some("1") => report.ok("io_poll", format!("{name} has polled queues")),
        _ if config.io_poll => report.bad(
            "io_poll",
            Level::Warning,
            format!("{name} has no polled queues"),
            format!("{POLLED_QUEUES}; or set io_poll = off"),
        ),
        _ => report.advise("io_poll", format!("{name} has no polled queues"), POLLED_QUEUES),
    }
    look_at_queue(report, medium.path());
}

/// A namespace that SPDK drives: whether it is there.
fn look_at_spdk(report: &mut Report, config: &Config, address: &Path, serves: bool) {
    let address = address.display().to_string();
    if serves {
        return report.advise("spdk", format!("{address}: the server has it"), "kvring devices");
    }
    spdk::configure(config);
    match spdk::controller(&address) {
        Ok(controller) => {
            let namespace = controller.namespace();
            let about = format!("{}, namespace {} of {}", controller.version(), namespace.nsid, namespace.model);
            report.ok("spdk", format!("{address}: {about}, {}", gib(namespace.bytes)));
            if let Ok(health) = spdk::health(&address) {
                look_at_health(report, &address, &health);
            }
        }
        Err(error) => report.bad("spdk", Level::Problem, error.to_string(), "docs/DEVICES.md says what SPDK wants"),
    }
}

fn look_at_health(report: &mut Report, name: &str, health: &Health) {
    let Health { critical_warning, temperature_celsius, percentage_used, media_errors_count, .. } = *health;
    let found = format!(
        "{name}: {temperature_celsius} °C, {percentage_used} % of its life used, {media_errors_count} media errors, critical warning {critical_warning:#x}"
    );
    if critical_warning != 0 || percentage_used >= 100 {
        report.bad("health", Level::Warning, found, "replace the drive: the cache on it may be lost at any time");
    } else {
        report.ok("health", found);
    }
}

/// The block device under a path, if it is one's own: the whole disk, where it is a partition.
pub fn queue_of(path: &Path) -> Option<PathBuf> {
    let metadata = std::fs::metadata(path).ok()?;
    let device = if metadata.file_type().is_block_device() { metadata.st_rdev() } else { metadata.st_dev() };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let device = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    device.ancestors().map(|at| at.join("queue")).find(|queue| queue.is_dir())
}

fn look_at_queue(report: &mut Report, path: &Path) {
    let Some(queue) = queue_of(path) else {
        let found = format!("{}: not on a block device of its own", path.display());
        return report.advise("block device", found, "set ssd_cache_dir to a directory on a local SSD, if it is not");
    };
    let device = queue.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
    if read(queue.join("rotational")).as_deref() == Some("1") && !device.starts_with("vd") {
        let found = format!("{device} says that it rotates: a cache wants an SSD");
        report.bad("block device", Level::Warning, found, "set ssd_cache_dir to a directory on an SSD");
    }
    match read(queue.join("scheduler")) {
        Some(schedulers) if !schedulers.contains("[none]") => {
            let found = format!("{device}: scheduler {schedulers}: the shard has put reads before writes already");
            report.bad(
                "block device",
                Level::Warning,
                found,
                format!("echo none > {}", queue.join("scheduler").display()),
            );
        }
        _ => report.ok("block device", format!("{device}: no scheduler in the way")),
    }
    if read(queue.join("io_poll")).as_deref() != Some("1") {
        let found = format!("{device} has no polled queues: completions come by interrupt");
        report.advise("block device", found, POLLED_QUEUES);
    }
}

fn look_at_cpus(report: &mut Report, config: &Config) {
    let online = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if online < 4 {
        let found = format!("{online} CPUs: the shard, the instances and the kernel share them");
        report.bad("cpu", Level::Warning, found, "four or more, one of them the shard's");
    } else {
        report.ok("cpu", format!("{online} CPUs"));
    }
    let cpus = "/sys/devices/system/cpu";
    match config.server_cpu {
        Some(cpu) if !Path::new(&format!("{cpus}/cpu{cpu}")).exists() => {
            let found = format!("server_cpu = {cpu}: there is no such CPU");
            report.bad(
                "cpu",
                Level::Warning,
                found,
                format!("one of {}", read(format!("{cpus}/online")).unwrap_or_default()),
            );
        }
        Some(cpu) if !is_in(&read(format!("{cpus}/isolated")).unwrap_or_default(), cpu) => {
            let found = format!("server_cpu = {cpu}: the kernel runs others there too");
            report.bad("cpu", Level::Warning, found, format!("boot with isolcpus={cpu} nohz_full={cpu}"));
        }
        Some(cpu) => report.ok("cpu", format!("server_cpu = {cpu}: isolated")),
        None => {
            let last = online.saturating_sub(1);
            let remedy = format!("server_cpu = {last}, and boot with isolcpus={last} nohz_full={last}");
            report.advise("cpu", "server_cpu = none: the shard runs anywhere", remedy);
        }
    }
    match read(format!("{cpus}/cpu0/cpufreq/scaling_governor")) {
        Some(governor) if governor != "performance" => {
            let found = format!("governor {governor}: a shard that slept wakes up slowly");
            report.bad("cpu", Level::Warning, found, "cpupower frequency-set -g performance");
        }
        _ => {}
    }
}

fn look_at_nodes(report: &mut Report, config: &Config, serves: bool) {
    let device_of = |dir: &PathBuf| Some((dir.display().to_string(), queue_of(dir)?.parent()?.to_path_buf()));
    let dirs = if config.ssd_cache_bytes > 0 { &config.ssd_cache_dirs[..] } else { &[] };
    let page_bytes = config.hugepage_size_bytes;
    let takes_pages = config.hugepages != Hugepages::Off && !serves;
    let pages = if takes_pages { config.cpu_cache_bytes.div_ceil(page_bytes.max(1)) } else { 0 };
    let devices = dirs.iter().filter_map(device_of).collect();
    numa::look(report, Path::new(SYS), &numa::Wanted { cpu: config.server_cpu, devices, pages: (pages, page_bytes) });
}

/// Nobody listens at the socket; another server may have a directory all the same.
fn look_for_what_is_left(report: &mut Report, config: &Config) {
    stale::look_beside(report, config);
    let count = if config.ssd_cache_bytes > 0 { config.ssd_cache_dirs.len() as u32 } else { 0 };
    for (index, dir) in (0..).zip(&config.ssd_cache_dirs) {
        let Ok(medium @ Medium::Directory(_)) = Medium::of(dir) else { continue };
        if !dir.join("kvring.lock").exists() || medium.lock(Patience::No).is_ok() {
            stale::look_at_dir(report, dir, index, count);
        }
    }
}

/// Whether a list like `1,4-7` has this number.
fn is_in(list: &str, number: u32) -> bool {
    list.split(',').any(|part| {
        let mut ends = part.split('-').map(|end| end.trim().parse::<u32>().ok());
        let first = ends.next().flatten();
        let last = ends.next().map_or(first, |end| end);
        first.zip(last).is_some_and(|(first, last)| (first..=last).contains(&number))
    })
}

fn look_at_vfio(report: &mut Report) {
    let groups = std::fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count);
    match (Path::new("/dev/vfio/vfio").exists(), groups) {
        (true, 0) => {
            let remedy = "boot with intel_iommu=on or amd_iommu=on";
            report.advise("vfio", "there, without IOMMU groups: SPDK could not drive an NVMe device safely", remedy);
        }
        (true, groups) => report.ok("vfio", format!("there, with {groups} IOMMU groups")),
        (false, _) => {
            let found = "no /dev/vfio/vfio: no driver in user space could take an NVMe device";
            report.advise("vfio", found, "for SPDK over PCIe: sudo modprobe vfio-pci");
        }
    }
}

#[cfg(test)]
mod test {
    use super::{is_in, remedy_of_note};

    #[test]
    fn a_setting_that_does_not_apply_is_taken_back_where_it_was_said() {
        let of_environment =
            "FLEXKV_ENABLE_GDS does not apply to kvring: SSD reads land in the pinned pool by O_DIRECT";
        assert_eq!(remedy_of_note(of_environment), "unset FLEXKV_ENABLE_GDS");
        assert_eq!(
            remedy_of_note("enable_gds in /etc/k.toml does not apply to kvring: x"),
            "remove enable_gds from /etc/k.toml"
        );
    }

    #[test]
    fn lists_of_cpus() {
        assert!(is_in("3", 3) && is_in("1,4-7", 5) && is_in("1,4-7", 7) && is_in("0-1,3", 3));
        assert!(!is_in("", 0) && !is_in("1,4-7", 8) && !is_in("1,4-7", 2) && !is_in("x-3", 2));
    }
}
