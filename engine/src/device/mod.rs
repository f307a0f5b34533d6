//! Block I/O, one contract: submit without waiting, poll for what is done, exact results.
//!
//! A device moves bytes between registered memory and files. It does not interpret them, does not
//! retry and does not hide: a short transfer is reported short. `tests/tests/devices.rs` runs one
//! conformance suite over every implementation.

#[expect(unsafe_code, reason = "linux-aio has no safe binding: three system calls and one struct")]
pub mod aio;
pub mod files;
pub mod gone;
pub mod medium;
#[expect(unsafe_code, reason = "a command names memory by address, and the device believes it")]
pub mod nvme;
#[expect(unsafe_code, reason = "an entry names memory by address, and the kernel believes it")]
mod ring;
pub mod sim;
#[expect(unsafe_code, reason = "says of the pool that it stays mapped")]
pub mod spdk;
#[expect(unsafe_code, reason = "an entry names memory by address, and the kernel believes it")]
pub mod uring;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use kvring_ipc::mapping::Mapping;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Memory that a device may move bytes to and from.
#[derive(Debug, Clone)]
pub struct DeviceMemory {
    /// The pool: slots.
    pub pool: Arc<Mapping>,
    /// The device's header zone.
    pub headers: Arc<Mapping>,
    /// The pool is registered in pieces of this many bytes; no slot crosses two.
    pub piece_bytes: usize,
}

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// The pool.
    Pool,
    /// The header zone's image.
    Headers,
}

impl DeviceMemory {
    /// The memory of a region.
    pub fn region(&self, region: Region) -> &Mapping {
        match region {
            Region::Pool => &self.pool,
            Region::Headers => &self.headers,
        }
    }

    /// Where a transfer's bytes lie; checked to be inside the region.
    pub fn address(&self, io: &Io) -> *mut u8 {
        self.region(io.region).address(io.offset_in_region, io.bytes as usize)
    }
}

/// Which way bytes move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the device.
    Read,
    /// To the device.
    Write,
}

/// One transfer. All numbers are multiples of the sector size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Io {
    /// Echoed when it is done.
    pub tag: u32,
    /// Which way.
    pub direction: Direction,
    /// Which of the device's files.
    pub file: u16,
    /// Where in it.
    pub offset_in_file: u64,
    /// Which memory.
    pub region: Region,
    /// Where in it.
    pub offset_in_region: usize,
    /// How much. A pool transfer stays inside one piece.
    pub bytes: u32,
}

/// A transfer that is over: bytes moved, or why none were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Its tag.
    pub tag: u32,
    /// Bytes moved, perhaps fewer than asked; or the error.
    pub result: Result<u32, Errno>,
}

/// Something with sectors.
pub trait Device {
    /// What it is, in one line for the operator.
    fn describe(&self) -> String;
    /// Most transfers in flight.
    fn depth(&self) -> u32;
    /// Transfers in flight.
    fn inflight(&self) -> u32;
    /// Takes a transfer, or gives it back when `depth` are in flight. May not start before `flush`.
    ///
    /// # Errors
    /// No room: the transfer itself.
    fn submit(&mut self, io: Io) -> Result<(), Io>;
    /// Hands what was submitted to the device: at most one system call.
    fn flush(&mut self);
    /// Reports what is over, at most `budget` of them. `now_ns` is the caller's time.
    fn poll(&mut self, now_ns: u64, budget: usize, done: &mut Vec<Done>);
    /// Readable when `poll` has something to report; `None` if only polling tells: then nobody sleeps while something is in
    /// flight.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;
    /// The pool's piece `piece` has pages now and may be used from now on.
    ///
    /// # Errors
    /// The kernel refuses to pin it: a memlock limit.
    fn register_piece(&mut self, piece: u32) -> rustix::io::Result<()>;
    /// The pool's piece `piece` is not used any more. A device that is closed with pieces registered has them unpinned by
    /// a thread of the kernel, without a pause: 10 ms a GiB on 4 KiB pages (io_uring/io_uring.c, `io_ring_exit_work`).
    fn unregister_piece(&mut self, _piece: u32) {}
    /// Lets go of its files and of their lock, and is not used any more, if nothing is under way: what is left is memory,
    /// which takes long to let go of. False: all of it goes with the device.
    fn close_files(&mut self) -> bool {
        false
    }
    /// Hands over what was submitted and waits until something is over, for `at_most` so long: for a caller that has
    /// nothing else to look at. May return early.
    fn wait(&mut self, at_most: Option<Duration>) {
        self.flush();
        let Some(fd) = self.wake_fd() else {
            std::hint::spin_loop();
            return;
        };
        let timeout = at_most
            .map(|at_most| Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: i64::from(at_most.subsec_nanos()) });
        let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout.as_ref());
    }
}

impl<D: Device + ?Sized> Device for Box<D> {
    fn describe(&self) -> String {
        (**self).describe()
    }
    fn depth(&self) -> u32 {
        (**self).depth()
    }
    fn inflight(&self) -> u32 {
        (**self).inflight()
    }
    fn submit(&mut self, io: Io) -> Result<(), Io> {
        (**self).submit(io)
    }
    fn flush(&mut self) {
        (**self).flush();
    }
    fn poll(&mut self, now_ns: u64, budget: usize, done: &mut Vec<Done>) {
        (**self).poll(now_ns, budget, done);
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).wake_fd()
    }
    fn register_piece(&mut self, piece: u32) -> rustix::io::Result<()> {
        (**self).register_piece(piece)
    }
    fn unregister_piece(&mut self, piece: u32) {
        (**self).unregister_piece(piece);
    }
    fn close_files(&mut self) -> bool {
        (**self).close_files()
    }
    fn wait(&mut self, at_most: Option<Duration>) {
        (**self).wait(at_most);
    }
}
