//! What every device that is driven through io_uring shares: the ring, what is registered with it, and how what is over
//! is found. What is asked of the kernel is the device's own.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use io_uring::{IoUring, cqueue, squeue, types};
use rustix::io::Errno;

use super::{DeviceMemory, Io, Region};

/// How a ring is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingOptions {
    /// Entries of the submission queue: most requests in flight.
    pub entries: u32,
    /// The pool is registered with the ring, piece by piece.
    pub fixed_buffers: bool,
    /// Completions are polled for and interrupt nobody (IORING_SETUP_IOPOLL).
    pub io_poll: bool,
    /// A thread of the kernel submits, and polls where `io_poll` says so (IORING_SETUP_SQPOLL).
    pub sq_poll: bool,
}

impl RingOptions {
    /// Interrupts, and no thread of the kernel.
    pub fn plain(entries: u32, fixed_buffers: bool) -> Self {
        Self { entries, fixed_buffers, io_poll: false, sq_poll: false }
    }
}

impl std::fmt::Display for RingOptions {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { entries, fixed_buffers, io_poll, sq_poll } = self;
        out.write_str(if *fixed_buffers { "fixed buffers" } else { "no fixed buffers" })?;
        out.write_str(if *io_poll { ", polled completions" } else { "" })?;
        out.write_str(if *sq_poll { ", submission by a kernel thread" } else { "" })?;
        write!(out, ", {entries} entries")
    }
}

/// How long the kernel's thread looks for submissions before it sleeps: milliseconds.
const SQ_POLL_IDLE_MS: u32 = 50;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
#[error("io_uring: {what}: {errno}")]
pub struct UringError {
    /// The step that failed.
    pub what: &'static str,
    /// What the kernel said.
    pub errno: std::io::Error,
}

/// Who uses a ring, and how it learns what is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finds {
    /// By polling and by sleeping, on whichever thread.
    AnyWay,
    /// By `Ring::wait` alone, on the thread that makes it: the kernel then does its part of a completion when it is
    /// waited for, and interrupts nobody (IORING_SETUP_DEFER_TASKRUN, Linux 6.1; before, a ring as any other).
    ByWaiting,
}

/// A ring with its registered files and memory.
pub(super) struct Ring<S: squeue::EntryMarker, C: cqueue::EntryMarker> {
    // Dropped first: the kernel finishes or cancels what is in flight before the memory goes.
    ring: IoUring<S, C>,
    pub memory: DeviceMemory,
    /// Kept open as long as the ring knows them.
    _files: Vec<OwnedFd>,
    pub options: RingOptions,
    /// Pieces of the pool that the ring knows; I/O to the others names its memory by address.
    registered: Vec<bool>,
    /// Requests that are with the kernel, or on their way.
    pub inflight: u32,
    unflushed: u32,
}

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker> Ring<S, C> {
    pub fn new(
        files: Vec<OwnedFd>,
        lock: Option<BorrowedFd<'_>>,
        memory: DeviceMemory,
        options: RingOptions,
        finds: Finds,
    ) -> Result<Self, UringError> {
        let failed = |what| move |errno| UringError { what, errno };
        let mut builder = IoUring::<S, C>::builder();
        if options.io_poll {
            builder.setup_iopoll();
        }
        if options.sq_poll {
            builder.setup_sqpoll(SQ_POLL_IDLE_MS);
        }
        // With a thread of the kernel, or polled, nobody is interrupted anyway.
        let deferred = (finds == Finds::ByWaiting && !options.io_poll && !options.sq_poll).then(|| {
            builder.clone().setup_coop_taskrun().setup_single_issuer().setup_defer_taskrun().build(options.entries)
        });
        // The completion ring is twice as deep by default, and no more than `entries` are in flight.
        let ring = match deferred {
            Some(Ok(ring)) => ring,
            _ => builder.build(options.entries).map_err(failed("io_uring_setup"))?,
        };
        let raw: Vec<i32> = files.iter().map(AsRawFd::as_raw_fd).chain(lock.map(|lock| lock.as_raw_fd())).collect();
        let pieces = memory.pool.bytes().div_ceil(memory.piece_bytes);
        ring.submitter().register_files(&raw).map_err(failed("register files"))?;
        if options.fixed_buffers {
            ring.submitter().register_buffers_sparse(pieces as u32).map_err(failed("register a table of buffers"))?;
        }
        let registered = vec![false; pieces];
        Ok(Self { ring, memory, _files: files, options, registered, inflight: 0, unflushed: 0 })
    }

    /// Under which number the ring knows the memory of a transfer, if it does.
    pub fn fixed(&self, io: &Io) -> Option<u16> {
        let piece = io.offset_in_region / self.memory.piece_bytes;
        (io.region == Region::Pool && self.registered[piece]).then_some(piece as u16)
    }

    /// Takes a request, which may not start before a flush. False: there is no room.
    ///
    /// # Safety
    /// What the entry names stays as long as `memory`, or until the request is over.
    pub unsafe fn push(&mut self, entry: &S) -> bool {
        // SAFETY: the caller's promise; self holds the memory and drops the ring first. The memory is shared and never
        // referenced, so the kernel may write it at any time.
        if unsafe { self.ring.submission().push(entry) }.is_err() {
            return false;
        }
        self.inflight += 1;
        self.unflushed += 1;
        true
    }

    pub fn flush(&mut self) {
        if self.unflushed == 0 {
            return;
        }
        // EINTR, EAGAIN and EBUSY leave the rest in the ring for the next flush; nothing else can be
        // the matter with a ring that was set up.
        if let Ok(count) = self.ring.submit() {
            self.unflushed -= (count as u32).min(self.unflushed);
        }
    }

    /// Hands over what is over, at most `budget` of them: user data, and what the kernel says.
    pub fn reap(&mut self, budget: usize, mut each: impl FnMut(u64, i32)) {
        let RingOptions { io_poll, sq_poll, .. } = self.options;
        if io_poll && !sq_poll && self.inflight > self.unflushed && self.ring.completion().is_empty() {
            const GETEVENTS: u32 = 1;
            // The kernel looks at the device's queue once. What it finds is seen in the completions.
            // SAFETY: no memory is handed over.
            let _ = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 0, GETEVENTS, None) };
        }
        for completion in self.ring.completion().take(budget) {
            self.inflight -= 1;
            let completion: cqueue::Entry = completion.into();
            each(completion.user_data(), completion.result());
        }
    }

    pub fn wait(&mut self, at_most: Option<Duration>) {
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
        // A wait that ended by its time says nothing of what it submitted: what is left in the ring does.
        self.unflushed = match submitted {
            Ok(count) => self.unflushed - (count as u32).min(self.unflushed),
            Err(_) => self.ring.submission().len() as u32,
        };
    }

    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        if self.options.io_poll && !self.options.sq_poll {
            return None;
        }
        // SAFETY: the ring's descriptor is open as long as the ring, which self owns.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }

    pub fn register_piece(&mut self, piece: u32) -> rustix::io::Result<()> {
        if !self.options.fixed_buffers {
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

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker> Ring<S, C> {
    /// As [`super::Device::unregister_piece`].
    pub fn unregister_piece(&mut self, piece: u32) {
        if !std::mem::take(&mut self.registered[piece as usize]) {
            return;
        }
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: no memory is handed over.
        let _ = unsafe { self.ring.submitter().register_buffers_update(piece, &[nothing], None) };
    }

    /// As [`super::Device::close_files`].
    pub fn close_files(&mut self) -> bool {
        self.inflight == 0 && self.ring.submitter().unregister_files().is_ok()
    }
}

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker> Drop for Ring<S, C> {
    fn drop(&mut self) {
        // A ring that is closed lets go of its files some time later; one that is told to, at once: whoever
        // comes next need not wait for the lock. While a transfer is under way, he has to.
        self.close_files();
    }
}
