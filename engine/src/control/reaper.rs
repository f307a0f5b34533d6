//! Who unmaps the pool of a dead engine process, so that nobody waits for it.
//!
//! The kernel tells of a death after the dead has let go of its memory (kernel/exit.c: `exit_mm` comes long before
//! `exit_notify`), and to unmap a pool on 4 KiB pages takes 20 to 45 ms a GiB. Memory is let go by the last of its users.
//! So the engine process has a child that shares its address space (clone(2), `CLONE_VM`), has none of its descriptors,
//! and does nothing as long as it lives: the death is told at once, and the child unmaps behind, a little at a time.
//! What the death is told for, that all its threads have ended and all its files are closed, is as true as before, but for
//! what the kernel keeps with the memory: the file of an io_uring is open as long as its rings are mapped, so those are
//! unmapped first; a context of libaio waits for its requests only with the memory, and a device of VFIO goes on by
//! itself as long as its registers are mapped: whose server uses those has no such child.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use kvring_ipc::mapping::Pages;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, Result};
use rustix::process::{PidfdFlags, Signal};

use crate::dma::{PAUSE, PoolMemory};

/// What the process is called (`/proc/PID/comm`).
pub const NAME: &std::ffi::CStr = c"kvring-reaper";

/// What is unmapped at once of a pool on small pages: less than a millisecond's work.
const STEP_BYTES: usize = 16 << 20;
/// How long all pauses take together, however large the pool is: whoever starts a server anew waits for the memory.
const PAUSES_MAX_NS: u64 = 2_000_000_000;
/// Three system calls deep.
const STACK_BYTES: usize = 64 << 10;

/// The child. Left alone it waits for this process's death; see [`Reaper::end`].
#[derive(Debug)]
pub struct Reaper {
    pidfd: OwnedFd,
}

/// What the child is told.
struct Told {
    /// This process; readable once it is dead.
    lives: RawFd,
    /// Stays locked until the memory is let go.
    lock: RawFd,
    /// Where the pool lies.
    pool: usize,
    bytes: usize,
    step_bytes: usize,
}

impl Reaper {
    /// For this process, which has mapped this pool and does not unmap it before its end. Whoever waits for `lock` waits until the
    /// memory is let go of as well.
    ///
    /// # Errors
    /// What clone(2) says: no process more, or a container that forbids it. Then a death is told late.
    pub fn start(lock: BorrowedFd<'_>, pool: &PoolMemory) -> Result<Self> {
        let lives = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        // Both are the child's for as long as it lives, which is longer than this process does.
        let bytes = pool.mapping.bytes();
        let told = Box::into_raw(Box::new(Told {
            lives: lives.as_raw_fd(),
            lock: lock.as_raw_fd(),
            pool: pool.mapping.address(0, bytes).addr(),
            bytes,
            // Of hugepages there are few.
            step_bytes: if pool.pages == Pages::Small { STEP_BYTES } else { 1 << 30 },
        }));
        let stack = Box::leak(vec![0_u128; STACK_BYTES / size_of::<u128>()].into_boxed_slice());
        let top = stack.as_mut_ptr_range().end.cast::<c_void>();
        let mut pidfd: RawFd = -1;
        let started = with_signals_blocked(|| {
            // SAFETY: the child runs `wait_and_go` on a stack that nobody else uses and that is never freed, with `told`,
            // which is neither. It shares our memory, our thread's TLS with it: what it calls uses none. Its descriptors are
            // copies of ours. `pidfd` is written by the kernel before clone returns here.
            unsafe {
                let flags = libc::CLONE_VM | libc::CLONE_PIDFD;
                libc::clone(wait_and_go, top, flags, told.cast(), &raw mut pidfd)
            }
        });
        if started < 0 {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::AGAIN));
        }
        // SAFETY: the kernel has just made it for us (CLONE_PIDFD).
        Ok(Self { pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
    }

    /// Ends the child: this process unmaps what it has mapped when it ends, and whoever waits for its end waits for that.
    pub fn end(self) {
        let killed = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let a_while = Timespec { tv_sec: 1, tv_nsec: 0 };
        let _ = killed.and_then(|()| poll(&mut fds, Some(&a_while)));
        // Else it is the keeper's to wait for, who does not know of it any more. It ends without a signal: __WALL (wait(2)).
        // SAFETY: asks for a child of ours; nothing is written.
        unsafe {
            libc::waitid(
                libc::P_PIDFD,
                self.pidfd.as_raw_fd() as libc::id_t,
                std::ptr::null_mut(),
                libc::WEXITED | libc::WNOHANG | libc::__WALL,
            )
        };
    }
}

impl AsFd for Reaper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// A child inherits what is blocked: none of our handlers runs in it, over our memory.
fn with_signals_blocked(run: impl FnOnce() -> c_int) -> c_int {
    // SAFETY: a set of signals is plain data.
    let (mut all, mut before) = unsafe { std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>() };
    // SAFETY: fills our set.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: changes this thread's mask alone; both sets are ours.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    let result = run();
    // SAFETY: as above, with what was read there.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    result
}

/// The child's life: system calls without allocation, locks or TLS, which it would share with a running process.
extern "C" fn wait_and_go(told: *mut c_void) -> c_int {
    // SAFETY: what `start` has left to us.
    let Told { lives, lock, pool, bytes, step_bytes } = unsafe { std::ptr::read(told.cast::<Told>()) };
    let (low, high) = (lives.min(lock), lives.max(lock));
    let _ = rustix::thread::set_name(NAME);
    let gaps = [(0, low - 1), (low + 1, high - 1), (high + 1, RawFd::MAX)];
    if !gaps.into_iter().all(|(first, last)| close(first, last)) {
        // It would hold sockets open that others wait for.
        return 1;
    }
    // SAFETY: open in this process from its beginning, and closed by nobody.
    let lives = unsafe { BorrowedFd::borrow_raw(lives) };
    while poll(&mut [PollFd::new(&lives.as_fd(), PollFlags::IN)], None).is_err() {}
    // The next engine process waits for what they hold: the lock of each directory of the SSD tier.
    if unmap_rings().is_err() {
        // They go with the rest: soon, then.
        return 0;
    }
    let steps = bytes.div_ceil(step_bytes).max(1);
    let pause_ns = (PAUSES_MAX_NS / steps as u64).min(PAUSE.as_nanos() as u64);
    for offset in (0..bytes).step_by(step_bytes) {
        let first = std::ptr::without_provenance_mut(pool + offset);
        // SAFETY: nobody but this function runs in this address space, and it uses nothing of the pool.
        let _ = unsafe { rustix::mm::munmap(first, step_bytes.min(bytes - offset)) };
        let _ = rustix::thread::nanosleep(&Timespec { tv_sec: 0, tv_nsec: pause_ns as i64 });
    }
    0
}

/// Unmaps whatever there is of io_uring in this address space, whose process is dead. No allocation: the dead may have
/// held a lock of the allocator.
fn unmap_rings() -> Result<()> {
    use rustix::fs::{Mode, OFlags};
    let maps = rustix::fs::open(c"/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let (mut buffer, mut held) = ([0; 4096], 0);
    loop {
        if held == buffer.len() {
            // A line that has no room: what follows it is not known.
            return Err(Errno::NAMETOOLONG);
        }
        let read = rustix::io::read(&maps, buffer.get_mut(held..).unwrap_or_default())?;
        if read == 0 {
            return Ok(());
        }
        held += read;
        let mut done = 0;
        while let Some(line) =
            buffer[done..held].split_inclusive(|byte| *byte == b'\n').next().filter(|line| line.ends_with(b"\n"))
        {
            if let Some((first, bytes)) = ring_in(line) {
                // SAFETY: nobody but this function runs in this address space, and it uses no ring.
                let _ = unsafe { rustix::mm::munmap(std::ptr::without_provenance_mut(first), bytes) };
            }
            done += line.len();
        }
        buffer.copy_within(done..held, 0);
        held -= done;
    }
}

/// Address and bytes of a mapping, if a line of `/proc/PID/maps` is an io_uring's.
fn ring_in(line: &[u8]) -> Option<(usize, usize)> {
    let line = std::str::from_utf8(line).ok()?;
    if !line.trim_end().ends_with("anon_inode:[io_uring]") {
        return None;
    }
    let (first, end) = line.split_once(' ')?.0.split_once('-')?;
    let (first, end) = (usize::from_str_radix(first, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    Some((first, end.checked_sub(first)?))
}

/// Closes a range of descriptors. Linux 5.9.
fn close(first: RawFd, last: RawFd) -> bool {
    // SAFETY: of this process's own table of descriptors; of those in the range nothing is used any more.
    first > last || unsafe { libc::syscall(libc::SYS_close_range, first as c_uint, last as c_uint, 0 as c_uint) } == 0
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn rings_are_told_from_what_else_is_mapped() {
        let ring = b"7f0000200000-7f0000210000 rw-s 10000000 00:10 2054                       anon_inode:[io_uring]\n";
        assert_eq!(ring_in(ring), Some((0x7f00_0020_0000, 0x10000)));
        assert_eq!(
            ring_in(b"7f0000200000-7f0000210000 rw-s 00000000 00:01 1043   /memfd:kvring-pool (deleted)\n"),
            None
        );
        assert_eq!(ring_in(b"what else anon_inode:[io_uring]\n"), None);
    }
}
