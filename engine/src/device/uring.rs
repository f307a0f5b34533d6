//! io_uring on files with O_DIRECT: fixed files, and the pool as fixed buffers.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

use super::{Device, DeviceMemory, Direction, Done, Io, Region};

/// One device's ring.
pub struct Uring {
    // Dropped first: the kernel finishes or cancels what is in flight before the memory goes.
    ring: IoUring,
    memory: DeviceMemory,
    /// Kept open as long as the ring knows them.
    _files: Vec<OwnedFd>,
    fixed_buffers: bool,
    /// Pieces of the pool that the ring knows; I/O to the others names its memory by address.
    registered: Vec<bool>,
    depth: u32,
    inflight: u32,
    unflushed: u32,
}

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
#[error("io_uring: {what}: {errno}")]
pub struct UringError {
    /// The step that failed.
    pub what: &'static str,
    /// What the kernel said.
    pub errno: std::io::Error,
}

/// Whether io_uring can be had at all here: seccomp and `kernel.io_uring_disabled` forbid it.
///
/// # Errors
/// What the kernel says.
pub fn probe() -> Result<(), UringError> {
    IoUring::new(2).map(drop).map_err(|errno| UringError { what: "io_uring_setup", errno })
}

impl Uring {
    /// A ring over files that were opened with O_DIRECT. It holds on to `lock`, where there is one, until its
    /// last transfer has ended: after this process died too (io_uring/io_uring.c: a ring lets go of its files
    /// once no request refers to it). So who takes the lock knows that nothing is under way.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn new(
        files: Vec<OwnedFd>,
        lock: Option<BorrowedFd<'_>>,
        memory: DeviceMemory,
        entries: u32,
        fixed_buffers: bool,
    ) -> Result<Self, UringError> {
        // The completion ring is twice as deep by default, and no more than `entries` are in flight.
        let ring = IoUring::builder().build(entries);
        let ring = ring.map_err(|errno| UringError { what: "io_uring_setup", errno })?;
        Self::over(ring, files, lock, memory, entries, fixed_buffers)
    }

    /// A ring for a thread that makes it, uses it alone, and finds what is over by [`Device::wait`] and never by polling
    /// alone: the kernel then does its part of a completion when it is waited for, and interrupts nobody
    /// (IORING_SETUP_DEFER_TASKRUN, Linux 6.1; before, a ring as any other).
    ///
    /// # Errors
    /// As [`Uring::new`].
    pub fn for_one_that_waits(
        files: Vec<OwnedFd>,
        memory: DeviceMemory,
        entries: u32,
        fixed_buffers: bool,
    ) -> Result<Self, UringError> {
        let mut builder = IoUring::builder();
        match builder.setup_coop_taskrun().setup_single_issuer().setup_defer_taskrun().build(entries) {
            Ok(ring) => Self::over(ring, files, None, memory, entries, fixed_buffers),
            Err(_) => Self::new(files, None, memory, entries, fixed_buffers),
        }
    }

    fn over(
        ring: IoUring,
        files: Vec<OwnedFd>,
        lock: Option<BorrowedFd<'_>>,
        memory: DeviceMemory,
        entries: u32,
        fixed_buffers: bool,
    ) -> Result<Self, UringError> {
        let failed = |what| move |errno| UringError { what, errno };
        let raw: Vec<i32> = files.iter().map(AsRawFd::as_raw_fd).chain(lock.map(|lock| lock.as_raw_fd())).collect();
        let pieces = memory.pool.bytes().div_ceil(memory.piece_bytes);
        ring.submitter().register_files(&raw).map_err(failed("register files"))?;
        if fixed_buffers {
            ring.submitter().register_buffers_sparse(pieces as u32).map_err(failed("register a table of buffers"))?;
        }
        let registered = vec![false; pieces];
        Ok(Self { ring, memory, _files: files, fixed_buffers, registered, depth: entries, inflight: 0, unflushed: 0 })
    }
}

impl Uring {
    /// A wait that ended by its time says nothing of what it submitted: what is left in the ring does.
    fn flush_after_timeout(&mut self) {
        self.unflushed = self.ring.submission().len() as u32;
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // A ring that is closed lets go of its files some time later; one that is told to, at once: whoever
        // comes next need not wait for the lock. While a transfer is under way, he has to.
        if self.inflight == 0 {
            let _ = self.ring.submitter().unregister_files();
        }
    }
}

impl Device for Uring {
    fn describe(&self) -> String {
        let buffers = if self.fixed_buffers { "fixed buffers" } else { "no fixed buffers" };
        format!("io_uring, O_DIRECT, fixed files, {buffers}, {} entries", self.depth)
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn inflight(&self) -> u32 {
        self.inflight
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.inflight == self.depth {
            return Err(io);
        }
        let address = self.memory.address(&io);
        let file = types::Fixed(u32::from(io.file));
        let piece = io.offset_in_region / self.memory.piece_bytes;
        let fixed = io.region == Region::Pool && self.registered[piece];
        let piece = piece as u16;
        let entry = match (io.direction, fixed) {
            (Direction::Read, true) => {
                opcode::ReadFixed::new(file, address, io.bytes, piece).offset(io.offset_in_file).build()
            }
            (Direction::Write, true) => {
                opcode::WriteFixed::new(file, address.cast_const(), io.bytes, piece).offset(io.offset_in_file).build()
            }
            (Direction::Read, false) => opcode::Read::new(file, address, io.bytes).offset(io.offset_in_file).build(),
            (Direction::Write, false) => {
                opcode::Write::new(file, address.cast_const(), io.bytes).offset(io.offset_in_file).build()
            }
        };
        let entry = entry.user_data(u64::from(io.tag));
        // SAFETY: `address` is valid for io.bytes (checked by Mapping::address) and stays mapped while
        // the ring lives, because self holds the mapping and drops the ring first. The memory is
        // shared and never referenced, so the kernel may write it at any time.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err(io);
        }
        self.inflight += 1;
        self.unflushed += 1;
        Ok(())
    }

    fn flush(&mut self) {
        if self.unflushed == 0 {
            return;
        }
        // EINTR, EAGAIN and EBUSY leave the rest in the ring for the next flush; nothing else can be
        // the matter with a ring that was set up.
        if let Ok(count) = self.ring.submit() {
            self.unflushed -= (count as u32).min(self.unflushed);
        }
    }

    fn poll(&mut self, _now_ns: u64, budget: usize, done: &mut Vec<Done>) {
        for completion in self.ring.completion().take(budget) {
            self.inflight -= 1;
            let result = u32::try_from(completion.result()).map_err(|_| Errno::from_raw_os_error(-completion.result()));
            done.push(Done { tag: completion.user_data() as u32, result });
        }
    }

    fn wait(&mut self, at_most: Option<Duration>) {
        if self.inflight == 0 || !self.ring.completion().is_empty() {
            return self.flush();
        }
        // One system call for both. Interrupted or refused for now, the caller comes again.
        let submitted = match at_most {
            None => self.ring.submit_and_wait(1),
            Some(at_most) => {
                let time = types::Timespec::from(at_most);
                self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
            }
        };
        if let Ok(count) = submitted {
            self.unflushed -= (count as u32).min(self.unflushed);
        } else {
            self.flush_after_timeout();
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring's descriptor is open as long as the ring, which self owns.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }

    fn register_piece(&mut self, piece: u32) -> rustix::io::Result<()> {
        if !self.fixed_buffers {
            return Ok(());
        }
        let offset = piece as usize * self.memory.piece_bytes;
        let bytes = self.memory.piece_bytes.min(self.memory.pool.bytes() - offset);
        let buffer = libc::iovec { iov_base: self.memory.pool.address(offset, bytes).cast(), iov_len: bytes };
        // SAFETY: the buffer is a range of the pool's mapping, which self keeps mapped as long as the ring.
        let registered = unsafe { self.ring.submitter().register_buffers_update(piece, &[buffer], None) };
        registered.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        self.registered[piece as usize] = true;
        Ok(())
    }
}
