//! Starting a server that is nobody's child: one winner, by file lock.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};

use crate::config::Config;
use crate::layout::Layout;

/// Why no server was started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Another process is starting one right now.
    #[error("another instance is starting the server")]
    SomebodyElse,
    /// The program was not found.
    #[error("no kvring program beside {beside} or in PATH: set KVRING_SERVER_BIN to it")]
    NoProgram {
        /// Where it was looked for.
        beside: String,
    },
    /// A file or process could not be made.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        error: std::io::Error,
    },
}

/// `<socket>.<what>`: files that belong to a socket lie beside it.
pub fn beside_socket(socket: &Path, what: &str) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".");
    name.push(what);
    PathBuf::from(name)
}

/// Takes the lock at `path`, or says that somebody holds it. Held until the file is dropped.
///
/// # Errors
/// What the system says of creating or locking the file.
pub fn try_lock(path: &Path) -> std::io::Result<Option<File>> {
    loop {
        // Not through a link, and not into a pipe, that somebody has laid there.
        let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits() as i32;
        let file = OpenOptions::new().create(true).truncate(false).write(true).custom_flags(flags).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        // A file that was removed meanwhile locks nothing.
        match std::fs::symlink_metadata(path) {
            Ok(now) if (now.dev(), now.ino()) == (metadata.dev(), metadata.ino()) => return Ok(Some(file)),
            _ => {}
        }
    }
}

fn program(config: &Config) -> Result<PathBuf, LaunchError> {
    if let Some(path) = &config.server_bin {
        return Ok(path.clone());
    }
    let running = std::env::current_exe().unwrap_or_default();
    let beside = running.parent().map(Path::to_path_buf).unwrap_or_default();
    // A test binary lies in target/debug/deps, the program one level up.
    let near = [Some(beside.clone()), beside.parent().map(Path::to_path_buf)].into_iter().flatten();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = near.chain(std::env::split_paths(&path)).map(|dir| dir.join("kvring"));
    let found = candidates.into_iter().find(|candidate| candidate.is_file());
    found.ok_or_else(|| LaunchError::NoProgram { beside: beside.display().to_string() })
}

/// Starts the server detached, with everything this configuration was told, and returns at once.
///
/// `kvring serve --detach` starts the server proper in a session of its own and exits, so the server
/// is a child of init: no instance's death is its death.
///
/// # Errors
/// [`LaunchError`]; nothing was started.
pub fn start_server(config: &Config, layout: &Layout) -> Result<(), LaunchError> {
    let system = |what: String| move |error| LaunchError::System { what, error };
    let lock_path = beside_socket(&config.socket, "starting");
    let lock = try_lock(&lock_path).map_err(system(format!("lock {}", lock_path.display())))?;
    let Some(_lock) = lock else { return Err(LaunchError::SomebodyElse) };
    let log_path = config.server_log.clone().unwrap_or_else(|| beside_socket(&config.socket, "log"));
    let log = OpenOptions::new().create(true).append(true).open(&log_path);
    let log = log.map_err(system(format!("open the server's log {}", log_path.display())))?;
    let said_before = log.metadata().map_or(0, |metadata| metadata.len());
    let log_too = log.try_clone().map_err(system("duplicate the log".into()))?;
    let mut command = Command::new(program(config)?);
    command.arg("serve").arg("--detach");
    command.arg("--layout").arg(serde_json::to_string(layout).unwrap_or_default());
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("KVRING_") || name_text.starts_with("FLEXKV_") {
            command.env_remove(&name);
        }
    }
    for (name, value) in &config.said {
        command.env(format!("KVRING_{}", name.to_ascii_uppercase()), value);
    }
    // The server belongs to no instance: it must not refuse an instance_id of somebody else's.
    command.env_remove("KVRING_INSTANCE_ID");
    command.stdin(Stdio::null()).stdout(log).stderr(log_too);
    let mut child = command.spawn().map_err(system("start kvring serve".into()))?;
    // The intermediate process exits as soon as it has started the server proper.
    let status = child.wait().map_err(system("wait for kvring serve --detach".into()))?;
    if !status.success() {
        let why = last_words(&log_path, said_before).unwrap_or_else(|| status.to_string());
        let error = std::io::Error::other(format!("{why} (log: {})", log_path.display()));
        return Err(LaunchError::System { what: "kvring serve --detach".into(), error });
    }
    Ok(())
}

/// What a server that did not start has said: its error, not its progress.
fn last_words(log: &Path, from: u64) -> Option<String> {
    let mut text = String::new();
    let mut file = File::open(log).ok()?;
    file.seek(SeekFrom::Start(from)).ok()?;
    file.take(64 << 10).read_to_string(&mut text).ok()?;
    let errors: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("kvring: ")).collect();
    errors.iter().find(|line| !line.starts_with("the server did not start")).map(|line| (*line).to_owned())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_lock_has_one_winner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = try_lock(&path).unwrap();
        assert!(held.is_some());
        assert!(try_lock(&path).unwrap().is_none());
        drop(held);
        assert!(try_lock(&path).unwrap().is_some());
    }

    #[test]
    fn without_a_program_the_remedy_is_named() {
        let mut config = Config::default();
        config.say("server_bin", "/nonexistent/kvring").unwrap();
        let dir = tempfile::tempdir().unwrap();
        config.say("server_recv_port", dir.path().join("s").to_str().unwrap()).unwrap();
        let error = start_server(&config, &Layout::opaque(4096)).unwrap_err();
        assert!(error.to_string().contains("start kvring serve"), "{error}");
    }
}
