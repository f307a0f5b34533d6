//! What dead servers and other configurations have left: files that take space and that nobody will open.

use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kvring_engine::device::files::{self, Found};
use kvring_engine::device::medium::Medium;
use kvring_ipc::config::Config;
use kvring_ipc::launch::beside_socket;

use super::{Level, Report, read};
use crate::observe::process_state;

/// More files than a cache has: a larger number is somebody's date.
const FILES_MAX: u32 = 10_000;

/// Files of ours in a directory: which of a cache's files each is.
fn files_in(dir: &Path) -> Vec<(u32, PathBuf)> {
    let number = |name: &str| match name.strip_prefix("kvring.cache")? {
        "" => Some(0),
        // As we write it, and nothing that only looks like a number.
        rest => {
            let text = rest.strip_prefix('.')?;
            let number = text.parse().ok()?;
            ((1..FILES_MAX).contains(&number) && number.to_string() == text).then_some(number)
        }
    };
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<(u32, PathBuf)> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .filter_map(|entry| Some((number(entry.file_name().to_str()?)?, entry.path())))
        .collect();
    files.sort();
    files
}

/// What a directory holds that the cache at `index` of `count` directories does not use; `count` 0: no SSD tier is
/// configured. Nobody may be using it.
pub fn look_at_dir(report: &mut Report, dir: &Path, index: u32, count: u32) {
    let files = files_in(dir);
    if files.is_empty() {
        return;
    }
    let name = dir.display();
    let all = || files.iter().map(|(_, path)| path.clone()).collect::<Vec<_>>();
    if count == 0 {
        let found = format!("{name}: an SSD tier that ssd_cache_gb = 0 does not open: {}", size(&all()));
        return report.advise("stale", found, "set ssd_cache_gb; a cache that nobody wants is a directory to remove");
    }
    match files::read_superblock(&Medium::Directory(dir.to_path_buf())) {
        Ok(Found::Super(found)) => {
            let (its_index, its_count) = ((found.device >> 32) as u32, found.device as u32);
            if (its_index, its_count) != (index, count) {
                let what = format!(
                    "{name}: device {} of a cache of {its_count}, configured as {} of {count}",
                    its_index + 1,
                    index + 1
                );
                let remedy = "name all directories of that cache in ssd_cache_dir, in the order in which it was made";
                return report.bad("stale", Level::Warning, format!("{what}: {}", size(&all())), remedy);
            }
            let used = u64::from(found.slots_count()).div_ceil(found.slots_per_file.max(1));
            let beyond: Vec<PathBuf> =
                files.into_iter().filter(|(number, _)| u64::from(*number) >= used).map(|(_, path)| path).collect();
            if !beyond.is_empty() {
                report.stale(format!("{name}: files beyond the {used} that its superblock counts"), &beyond);
            }
        }
        Ok(Found::OtherVersion) => {
            let found = format!("{name}: a cache of another version of kvring: {}", size(&all()));
            let remedy = "start the version that made it, or start empty once with ssd_on_mismatch = reset";
            report.bad("stale", Level::Warning, found, remedy);
        }
        Ok(Found::Foreign(what)) => {
            let found = format!("{name}: kvring.cache holds {what}");
            report.bad("stale", Level::Warning, found, "set ssd_cache_dir to another directory");
        }
        // A start that was cut short makes kvring.cache anew; what it does not get to stays.
        Ok(Found::Nothing) => {
            let rest: Vec<PathBuf> =
                files.into_iter().filter(|(number, _)| *number > 0).map(|(_, path)| path).collect();
            if !rest.is_empty() {
                report.stale(format!("{name}: files of a cache without a superblock"), &rest);
            }
        }
        Err(error) => report.note("stale", format!("{name}: what it holds cannot be read: {error}")),
    }
}

/// What lies beside a socket where nobody listens.
pub fn look_beside(report: &mut Report, config: &Config) {
    let lock = beside_socket(&config.socket, "lock");
    // Not tried: a server that starts right now would take us for another one. It has written its number, or will.
    let is_alive = |pid: u32| process_state(pid).is_some_and(|state| !"ZX".contains(state));
    let lives = read(&lock).is_some_and(|pid| pid.parse().map_or(true, is_alive));
    if lives || !lock.exists() {
        return;
    }
    let beside = [config.socket.clone(), lock, beside_socket(&config.socket, "starting")];
    let left: Vec<PathBuf> = beside.into_iter().filter(|path| path.symlink_metadata().is_ok()).collect();
    // Nothing to remove: the kernel may hold the lock yet for a server that is being ended.
    report.note(
        "stale",
        format!("{}: of a server that has ended, {}; the next one uses them", names(&left), size(&left)),
    );
}

impl Report {
    fn stale(&mut self, what: String, paths: &[PathBuf]) {
        self.bad("stale", Level::Warning, format!("{what}: {}", size(paths)), remove(paths));
    }
}

/// What they take, not how long they are: of a sparse file that is less.
fn size(paths: &[PathBuf]) -> String {
    let bytes: u64 = paths.iter().filter_map(|path| path.metadata().ok()).map(|file| file.st_blocks() * 512).sum();
    match bytes {
        0..1_048_576 => format!("{} KiB", bytes.div_ceil(1024)),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

fn names(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn remove(paths: &[PathBuf]) -> String {
    format!("rm {}", paths.iter().map(|path| quoted(path)).collect::<Vec<_>>().join(" "))
}

/// A word for a shell.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,@%=".contains(c);
    if text.chars().all(plain) && !text.starts_with('-') { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn files_are_told_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kvring.cache", "kvring.cache.12", "kvring.cache.2", "kvring.cache.old", "kvring.lock", "other"]
            .into_iter()
            .chain(["kvring.cache.20240101", "kvring.cache.+5", "kvring.cache.007", "kvring.cache.0"])
        {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let numbers: Vec<u32> = files_in(dir.path()).into_iter().map(|(number, _)| number).collect();
        assert_eq!(numbers, [0, 2, 12]);
    }

    #[test]
    fn a_shell_removes_what_was_meant() {
        let paths = [PathBuf::from("/a/b.1"), PathBuf::from("/a dir/it's")];
        assert_eq!(remove(&paths), r"rm /a/b.1 '/a dir/it'\''s'");
    }
}
