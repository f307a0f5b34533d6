//! The bells: what makes a sleeping side's descriptor readable.
//!
//! Between processes a bell is a pair of sockets, one end each, never a shared eventfd: whether a
//! descriptor blocks belongs to the open file, so a peer that shares ours could make us wait in it
//! for ever. Every call here is non-blocking by its own flag.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Two ends: ringing one makes the other readable.
///
/// # Errors
/// What the kernel says: no descriptors left.
pub fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}

/// Rings. A bell that is full rings already, one whose other end is gone wakes nobody.
pub fn ring(end: impl AsFd) {
    let _ = rustix::net::send(end, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

/// Silences a bell that rang. False: the other end is gone, and it will be readable for ever.
pub fn drain(end: impl AsFd) -> bool {
    let mut rings = [0u8; 256];
    !matches!(rustix::net::recv(end, &mut rings, RecvFlags::DONTWAIT), Ok((_, 0)) | Err(Errno::CONNRESET))
}

/// Rings an eventfd of this process.
pub fn ring_own(eventfd: impl AsFd) {
    // It can only fail when its counter is full, and then it rings already.
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

/// Silences an eventfd of this process.
pub fn drain_own(eventfd: impl AsFd) {
    let _ = rustix::io::read(eventfd, &mut [0u8; 8]);
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::peer::is_readable;

    #[test]
    fn nothing_that_the_peer_does_makes_us_wait() {
        let (ours, theirs) = pair().unwrap();
        // A peer that never drains, and takes O_NONBLOCK away: every ring returns.
        rustix::io::ioctl_fionbio(&theirs, false).unwrap();
        (0..100_000).for_each(|_| ring(&ours));
        assert!(is_readable(&theirs));
        assert!(drain(&ours), "silent: nothing to wait for");
        ring(&theirs);
        assert!(is_readable(&ours) && drain(&ours) && !is_readable(&ours));
        drop(theirs);
        assert!(!drain(&ours), "gone");
        ring(&ours);
    }
}
