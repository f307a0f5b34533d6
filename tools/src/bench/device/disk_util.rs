//! What the block layer counted of the disks under the jobs (proc(5), diskstats), as fio's `disk_util`.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::job::{Engine, Job};

/// Disks and what had been counted of each when the jobs began.
pub struct DiskUtil {
    begun: Instant,
    disks: Vec<(u64, Option<Counts>)>,
}

/// One disk's line, from its name on.
struct Counts {
    name: String,
    counts: Vec<u64>,
}

impl DiskUtil {
    /// Of the disks that these jobs' files lie on, as far as the kernel knows them.
    pub fn begin(jobs: &[Job]) -> Self {
        let in_kernel = |job: &&Job| !matches!(job.engine, Engine::Spdk | Engine::Sim | Engine::Kvring);
        let mut disks: Vec<u64> = jobs.iter().filter(in_kernel).filter_map(|job| device_of(&job.filename)).collect();
        disks.sort_unstable();
        disks.dedup();
        let disks = disks.into_iter().map(|disk| (disk, counts_of(disk))).collect();
        Self { begun: Instant::now(), disks }
    }

    /// What was counted since.
    pub fn end(&self) -> Vec<Value> {
        let ms = (self.begun.elapsed().as_millis() as u64).max(1);
        let since = |(disk, before): &(u64, Option<Counts>)| {
            let (before, now) = (before.as_ref()?, counts_of(*disk)?);
            let more = |at: usize| now.counts.get(at)?.checked_sub(*before.counts.get(at)?);
            let busy_ms = more(9)?;
            Some(json!({
                "name": now.name,
                "read_ios": more(0)?, "write_ios": more(4)?,
                "read_sectors": more(2)?, "write_sectors": more(6)?,
                "read_merges": more(1)?, "write_merges": more(5)?,
                "read_ticks": more(3)?, "write_ticks": more(7)?,
                "in_queue": more(10)?,
                "util": (10_000.0 * busy_ms as f64 / ms as f64).round().min(10_000.0) / 100.0,
            }))
        };
        self.disks.iter().filter_map(since).collect()
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
