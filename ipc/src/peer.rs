//! Who is on the other end of a socket, and has it died?

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};

/// A process as the kernel vouched for it when it connected.
#[derive(Debug)]
pub struct Peer {
    /// Its process id, in our namespace.
    pub pid: Pid,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Readable once the process is dead and its files are closed (kernel/exit.c: `exit_notify`
    /// comes after `exit_files`).
    pub pidfd: OwnedFd,
}

impl Peer {
    /// The process behind a connected unix socket (SO_PEERCRED), held by a pidfd from now on.
    ///
    /// # Errors
    /// What the kernel says: `ESRCH` if the process is gone already.
    pub fn of(socket: impl AsFd) -> rustix::io::Result<Self> {
        let credentials = rustix::net::sockopt::socket_peercred(&socket)?;
        let pidfd = rustix::process::pidfd_open(credentials.pid, PidfdFlags::empty())?;
        Ok(Self { pid: credentials.pid, uid: credentials.uid.as_raw(), gid: credentials.gid.as_raw(), pidfd })
    }
}

impl Peer {
    /// Whether its user is `uid` or root.
    pub fn is_user(&self, uid: u32) -> bool {
        self.uid == uid || self.uid == 0
    }

    /// Whether it is in one of these groups: its first as it was when it connected, the others as they are.
    pub fn is_in_any(&self, groups: &[u32]) -> bool {
        if groups.is_empty() || groups.contains(&self.gid) {
            return !groups.is_empty();
        }
        let path = format!("/proc/{}/status", self.pid.as_raw_nonzero());
        let status = std::fs::read_to_string(path).unwrap_or_default();
        let listed = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
        let is_member = listed.split_ascii_whitespace().any(|gid| gid.parse().is_ok_and(|gid| groups.contains(&gid)));
        // Asked last: while it lives, what was read was its own and nobody's who has got its number.
        is_member && !is_readable(&self.pidfd)
    }
}

/// When a process was started, in clock ticks since boot (proc(5), `/proc/PID/stat`, field 22): with its id
/// a name that is never given again.
pub fn started_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name, in parentheses, may hold anything: fields are counted behind it.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Whether a descriptor has something to say: bytes, an end of file, a death.
pub fn is_readable(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(1..))
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn we_are_our_own_peer_and_alive() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = Peer::of(&a).unwrap();
        assert_eq!(peer.pid, rustix::process::getpid());
        assert!(!is_readable(&peer.pidfd));
        let ours = started_ticks(peer.pid.as_raw_nonzero().get());
        assert!(ours.is_some() && started_ticks(1) < ours, "init was here first");
        assert_eq!(started_ticks(i32::MAX), None);
    }
}
