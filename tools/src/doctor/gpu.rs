//! GPUs, and what is known of their drivers by version. Starts no driver: one that hangs must not hang who looks.

use std::path::Path;

use kvring_gpu::driver::api::DriverApi;
use kvring_ipc::config::Config;

use super::{Level, Report, pci, read};

/// Of NVIDIA, as PCI knows it.
const NVIDIA: &str = "0x10de";

/// A driver's version: 580.159.04.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct DriverVersion([u32; 3]);

/// The first with CUDA 12.0, the oldest that has every call of ours.
const OLDEST: DriverVersion = DriverVersion([525, 60, 13]);
/// The first with CUDA 12.8, and with it `cuMemcpyBatchAsync`.
const BATCHES: DriverVersion = DriverVersion([570, 26, 0]);
/// Where `cuMemcpyBatchAsync` with 51,828 copies has hung and crashed others (vLLM #49276).
const BATCHES_HANG: DriverVersion = DriverVersion([580, 159, 4]);

const ANOTHER_DRIVER: &str =
    "sudo apt-get install nvidia-driver-570-server, or a later one, as your distribution names it; then boot";

impl DriverVersion {
    /// What /proc/driver/nvidia/version says: the first of its words that is two or three numbers with dots.
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find(|line| line.contains("NVRM version"))?;
        line.split_whitespace().find_map(Self::of_word)
    }

    fn of_word(word: &str) -> Option<Self> {
        let numbers: Vec<u32> = word.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
        match numbers[..] {
            [major, minor] => Some(Self([major, minor, 0])),
            [major, minor, patch] => Some(Self([major, minor, patch])),
            _ => None,
        }
    }

    /// What it lacks, or is known to do: how bad that is, in words, and what to do.
    ///
    /// Not among them, because a pool is pinned in pieces of a GiB: that from 580 on one call cannot pin 512 GiB, and
    /// that Linux 6.11 to 6.13 do not pin more than 2 GB at once.
    fn limits(self, batch_copy: bool) -> Option<(Level, &'static str, &'static str)> {
        if self < OLDEST {
            let found = "it has CUDA before 12.0: no instance can copy between its GPU and the pool with it";
            return Some((Level::Warning, found, ANOTHER_DRIVER));
        }
        if self < BATCHES && batch_copy {
            let found = "it has CUDA before 12.8, without cuMemcpyBatchAsync: small copies are made one by one";
            return Some((Level::Warning, found, ANOTHER_DRIVER));
        }
        if self == BATCHES_HANG && batch_copy {
            let found = "calls of cuMemcpyBatchAsync with 51,828 copies have hung and crashed with this version; kvring hands over 2,048 at most";
            let remedy = "cuda_batch_copy = off, should an instance hang or die in a copy; `kvring selftest --device 0` tries it";
            return Some((Level::Note, found, remedy));
        }
        None
    }
}

impl std::fmt::Display for DriverVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self([major, minor, patch]) = self;
        write!(f, "{major}.{minor}.{patch:02}")
    }
}

/// PCI addresses of NVIDIA's GPUs, with their NUMA nodes.
pub fn gpus(sys: &Path) -> Vec<(String, Option<u32>)> {
    let is_gpu = |class: &str| class.starts_with("0x0300") || class.starts_with("0x0302");
    let ours = |device: &pci::Device| is_gpu(&device.class) && device.vendor == NVIDIA;
    pci::devices(sys).into_iter().filter(ours).map(|device| (device.address, device.node)).collect()
}

pub fn look(report: &mut Report, config: &Config, sys: &Path, proc: &Path) {
    let there: Vec<String> = gpus(sys).into_iter().map(|(address, _)| address).collect();
    // A container may be shown the one and not the other.
    let version = read(proc.join("driver/nvidia/version"));
    let module = read(sys.join("module/nvidia/version"));
    if version.is_none() && module.is_none() {
        if there.is_empty() {
            report.note("gpu", "no NVIDIA driver: instances copy to and from host memory");
        } else {
            let found = format!("{} and no driver: instances copy to and from host memory", there.join(", "));
            report.advise("gpu", found, "sudo modprobe nvidia; in a container, pass the GPUs in (docker: --gpus all)");
        }
        // Whoever names a library means to use it.
        if config.cuda_driver.is_some() {
            look_at_library(report, config);
        }
        return;
    }
    let known = version.as_deref().and_then(DriverVersion::parse);
    let known = known.or_else(|| module.as_deref().and_then(DriverVersion::of_word));
    match known {
        Some(version) => {
            report.ok(
                "gpu",
                format!(
                    "NVIDIA driver {version}, GPUs {}",
                    if there.is_empty() { "not shown by PCI".into() } else { there.join(", ") }
                ),
            );
            if let Some((level, found, remedy)) = version.limits(config.cuda_batch_copy) {
                report.bad("gpu", level, format!("driver {version}: {found}"), remedy);
            }
        }
        None => {
            report.note("gpu", version.or(module).unwrap_or_default().lines().next().unwrap_or_default().to_owned())
        }
    }
    look_at_library(report, config);
}

/// The driver's other half, which a container may lack.
fn look_at_library(report: &mut Report, config: &Config) {
    match DriverApi::find(config.cuda_driver.as_deref()) {
        Ok(library) => report.ok("gpu", format!("{}: every call of ours is there", library.display())),
        Err(error) => {
            let remedy =
                "sudo apt-get install libcuda1 (Debian); in a container NVIDIA_DRIVER_CAPABILITIES=compute,utility";
            report.bad("gpu", Level::Warning, format!("instances cannot copy to and from GPUs: {error}"), remedy);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const CLOSED: &str = "\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)";
    const OPEN: &str = "\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder@U22-I3-AE18-23-3)  Tue Mar 31 23:33:00 UTC 2026
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)";

    #[test]
    fn a_version_is_read_of_either_kind_of_module() {
        assert_eq!(DriverVersion::parse(CLOSED), Some(DriverVersion([535, 104, 5])));
        assert_eq!(DriverVersion::parse(OPEN), Some(DriverVersion([580, 159, 4])));
        assert_eq!(DriverVersion::parse(OPEN).unwrap().to_string(), "580.159.04");
        assert_eq!(DriverVersion::of_word("570.86"), Some(DriverVersion([570, 86, 0])));
        for nothing in ["", "NVRM version:", "NVRM version: NVIDIA x86_64 1 2 3", "GCC version: 12.2.0"] {
            assert_eq!(DriverVersion::parse(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn what_a_version_lacks() {
        let level =
            |text: &str, batch_copy| DriverVersion::of_word(text).unwrap().limits(batch_copy).map(|found| found.0);
        assert_eq!(level("470.256.02", true), Some(Level::Warning));
        assert_eq!(level("470.256.02", false), Some(Level::Warning));
        assert_eq!(level("535.104.05", true), Some(Level::Warning));
        assert_eq!(level("535.104.05", false), None, "it is not asked for");
        assert_eq!(level("570.26", true), None);
        assert_eq!(level("580.159.04", true), Some(Level::Note));
        assert_eq!(level("580.159.04", false), None);
        assert_eq!(level("595.45.04", true), None);
    }

    #[test]
    fn machines_with_drivers_gpus_and_neither() {
        let place = tempfile::tempdir().unwrap();
        let (sys, proc) = (place.path().join("sys"), place.path().join("proc"));
        let seen = || {
            let mut report = Report::default();
            look(&mut report, &Config::default(), &sys, &proc);
            report.findings.into_iter().map(|found| (found.level, found.found, found.remedy)).collect::<Vec<_>>()
        };
        assert_eq!(seen().len(), 1);
        let gpu = pci::test::device(&sys, "0000:3b:00.0", "0x030200", NVIDIA, 1);
        pci::test::device(&sys, "0000:00:02.0", "0x030000", "0x1234", 0);
        assert_eq!(gpus(&sys), [("0000:3b:00.0".to_owned(), Some(1))]);
        assert!(
            matches!(&seen()[..], [(Level::Note, found, Some(remedy))] if found.contains("0000:3b:00.0 and no driver") && remedy.contains("modprobe nvidia"))
        );
        std::fs::create_dir_all(proc.join("driver/nvidia")).unwrap();
        std::fs::write(proc.join("driver/nvidia/version"), CLOSED).unwrap();
        let seen = seen();
        assert!(
            seen[0].1.contains("535.104.05, GPUs 0000:3b:00.0") && seen[1].1.contains("cuMemcpyBatchAsync"),
            "{seen:?}"
        );
        assert!(seen[2].1.contains("libcuda.so.1"), "where it lies, or that it does not: {seen:?}");
        assert!(gpu.exists());
    }
}
