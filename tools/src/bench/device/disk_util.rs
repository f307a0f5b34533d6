//! What the block layer counted of the disks under the jobs (proc(5), diskstats), as fio's `disk_util`.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::job::{Engine, Job};

/// Disks and what was counted of each while jobs ran: their files were there before.
#[derive(Default)]
pub struct DiskUtil {
    ms: u64,
    disks: Vec<Disk>,
}

struct Disk {
    number: u64,
    /// What had been counted when the jobs that run now began.
    before: Option<Counts>,
    /// In the order of the kernel's line.
    since: Vec<u64>,
}

/// One disk's line, from its name on.
struct Counts {
    name: String,
    counts: Vec<u64>,
}

impl DiskUtil {
    /// Of the disks that the files of some jobs lie on, as far as the kernel knows them.
    pub fn of(jobs: &[Job]) -> Self {
        let in_kernel = |job: &&Job| !matches!(job.engine, Engine::Spdk | Engine::Sim | Engine::Kvring);
        let mut disks: Vec<u64> = jobs.iter().filter(in_kernel).filter_map(|job| device_of(&job.filename)).collect();
        disks.sort_unstable();
        disks.dedup();
        let disk = |number| Disk { number, before: None, since: Vec::new() };
        Self { ms: 0, disks: disks.into_iter().map(disk).collect() }
    }

    /// Counts while this runs.
    pub fn during<T>(&mut self, run: impl FnOnce() -> T) -> T {
        for disk in &mut self.disks {
            disk.before = counts_of(disk.number);
        }
        let begun = Instant::now();
        let result = run();
        self.ms += begun.elapsed().as_millis() as u64;
        for disk in &mut self.disks {
            let (Some(before), Some(now)) = (&disk.before, counts_of(disk.number)) else { continue };
            disk.since.resize(now.counts.len(), 0);
            for ((sum, now), before) in disk.since.iter_mut().zip(&now.counts).zip(&before.counts) {
                *sum += now.saturating_sub(*before);
            }
        }
        result
    }

    /// What fio calls `disk_util`.
    pub fn as_json(&self) -> Vec<Value> {
        let row = |disk: &Disk| {
            let count = |at: usize| disk.since.get(at).copied();
            let busy_ms = count(9)?;
            Some(json!({
                "name": disk.before.as_ref()?.name,
                "read_ios": count(0)?, "write_ios": count(4)?,
                "read_sectors": count(2)?, "write_sectors": count(6)?,
                "read_merges": count(1)?, "write_merges": count(5)?,
                "read_ticks": count(3)?, "write_ticks": count(7)?,
                "in_queue": count(10)?,
                "util": (10_000.0 * busy_ms as f64 / self.ms.max(1) as f64).round().min(10_000.0) / 100.0,
            }))
        };
        self.disks.iter().filter_map(row).collect()
    }
}

/// The disk that a file is or lies on; one that is made yet lies where its directory does.
fn device_of(file: &Path) -> Option<u64> {
    match file.metadata() {
        Ok(found) if found.file_type().is_block_device() => Some(found.rdev()),
        // An NVMe namespace as a character device is none that the block layer counts.
        Ok(found) if found.is_file() => Some(found.dev()),
        Ok(_) => None,
        Err(_) => {
            let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Some(dir.metadata().ok()?.dev())
        }
    }
}

fn counts_of(disk: u64) -> Option<Counts> {
    let text = std::fs::read_to_string("/proc/diskstats").ok()?;
    find(&text, rustix::fs::major(disk), rustix::fs::minor(disk))
}

fn find(diskstats: &str, major: u32, minor: u32) -> Option<Counts> {
    diskstats.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let mut is = |number: u32| words.next()?.parse::<u32>().ok().filter(|found| *found == number);
        is(major)?;
        is(minor)?;
        Some(Counts { name: words.next()?.to_owned(), counts: words.map_while(|word| word.parse().ok()).collect() })
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_numbers() {
        let text = "   8       0 sda 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n 254       1 vda1 11 12 13 14 15 16 17 18 19 20 21\n";
        let found = find(text, 254, 1).unwrap();
        assert_eq!((found.name.as_str(), found.counts[0], found.counts[10]), ("vda1", 11, 21));
        assert!(find(text, 254, 0).is_none());
    }
}
