//! io_uring on files and block devices with O_DIRECT: fixed files, the pool as fixed buffers, completions by interrupt or
//! polled for.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use kvring_ipc::client::monotonic_ns;
use kvring_ipc::mapping::Mapping;
use rustix::io::Errno;

use super::medium::Medium;
use super::ring::Ring;
pub use super::ring::{Finds, RingOptions, UringError};
use super::{Device, DeviceMemory, Direction, Done, Io, Region};
use crate::limits::SECTOR_BYTES;

/// One device's ring.
pub struct Uring {
    ring: Ring<squeue::Entry, cqueue::Entry>,
}

/// Whether io_uring can be had at all here: seccomp and `kernel.io_uring_disabled` forbid it.
///
/// # Errors
/// What the kernel says.
pub fn probe() -> Result<(), UringError> {
    // Once, by a process that prepares itself before its turn: a ring takes a millisecond.
    static IS_THERE: OnceLock<()> = OnceLock::new();
    if IS_THERE.get().is_none() {
        IoUring::new(2).map(drop).map_err(|errno| UringError { what: "io_uring_setup", errno })?;
        let _ = IS_THERE.set(());
    }
    Ok(())
}

/// Whether a device has queues that can be polled, as far as the kernel says.
///
/// # Errors
/// That it has none, in words.
pub(super) fn has_polled_queues(medium: &Medium) -> Result<(), String> {
    // Before 6.10 the kernel takes polled I/O for a device that has no such queues, and interrupts all the same.
    let says = medium.queue().and_then(|queue| std::fs::read_to_string(queue.join("io_poll")).ok());
    match says {
        Some(says) if says.trim() == "0" => {
            Err("the device has no polled queues (NVMe: boot with nvme.poll_queues=N)".into())
        }
        _ => Ok(()),
    }
}

/// Whether completions of these files, which lie on `medium`, can be polled for: their device has queues for it, and what
/// lies between does not mind. Reads a sector of each.
///
/// # Errors
/// Why not, in words.
pub fn can_poll(medium: &Medium, files: &[OwnedFd]) -> Result<(), String> {
    has_polled_queues(medium)?;
    let words = |errno: Errno| errno.to_string();
    // Pages of its own, not a part of the heap: should the ring go first, the device writes into nothing else.
    let sector = Arc::new(Mapping::private(SECTOR_BYTES as usize).map_err(words)?);
    let memory = DeviceMemory { pool: sector.clone(), headers: sector, piece_bytes: SECTOR_BYTES as usize };
    let options = RingOptions { io_poll: true, ..RingOptions::plain(2, false) };
    let files =
        files.iter().map(OwnedFd::try_clone).collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    let files_count = files.len() as u16;
    let mut device = Uring::new(files, None, memory, options, Finds::AnyWay).map_err(|error| error.to_string())?;
    for file in 0..files_count {
        let bytes = SECTOR_BYTES as u32;
        let (direction, region) = (Direction::Read, Region::Headers);
        let io = Io { tag: 0, direction, file, offset_in_file: 0, region, offset_in_region: 0, bytes };
        match first_done(&mut device, io) {
            Some(Ok(_)) => {}
            Some(Err(errno)) => return Err(format!("the kernel says: {errno}")),
            None => return Err("a polled read has not ended after 10 s".into()),
        }
    }
    Ok(())
}

/// How a transfer ends that nothing else waits with; `None` if it has not after ten seconds. Start-up only.
pub(super) fn first_done(device: &mut impl Device, io: Io) -> Option<rustix::io::Result<u32>> {
    let _ = device.submit(io);
    device.flush();
    let mut done = Vec::new();
    let until_ns = monotonic_ns() + 10_000_000_000;
    while done.is_empty() && monotonic_ns() < until_ns {
        device.poll(0, 1, &mut done);
        std::thread::yield_now();
    }
    done.first().map(|done| done.result)
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
        options: RingOptions,
        finds: Finds,
    ) -> Result<Self, UringError> {
        Ok(Self { ring: Ring::new(files, lock, memory, options, finds)? })
    }
}

impl Device for Uring {
    fn describe(&self) -> String {
        format!("io_uring, O_DIRECT, fixed files, {}", self.ring.options)
    }

    fn depth(&self) -> u32 {
        self.ring.options.entries
    }

    fn inflight(&self) -> u32 {
        self.ring.inflight
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.inflight() == self.depth() {
            return Err(io);
        }
        let address = self.ring.memory.address(&io);
        let file = types::Fixed(u32::from(io.file));
        let entry = match (io.direction, self.ring.fixed(&io)) {
            (Direction::Read, Some(piece)) => {
                opcode::ReadFixed::new(file, address, io.bytes, piece).offset(io.offset_in_file).build()
            }
            (Direction::Write, Some(piece)) => {
                opcode::WriteFixed::new(file, address.cast_const(), io.bytes, piece).offset(io.offset_in_file).build()
            }
            (Direction::Read, None) => opcode::Read::new(file, address, io.bytes).offset(io.offset_in_file).build(),
            (Direction::Write, None) => {
                opcode::Write::new(file, address.cast_const(), io.bytes).offset(io.offset_in_file).build()
            }
        };
        let entry = entry.user_data(u64::from(io.tag));
        // SAFETY: `address` is valid for io.bytes (checked by Mapping::address), in memory that the ring holds.
        if unsafe { self.ring.push(&entry) } { Ok(()) } else { Err(io) }
    }

    fn flush(&mut self) {
        self.ring.flush();
    }

    fn poll(&mut self, _now_ns: u64, budget: usize, done: &mut Vec<Done>) {
        self.ring.reap(budget, |user_data, result| {
            let result = u32::try_from(result).map_err(|_| Errno::from_raw_os_error(-result));
            done.push(Done { tag: user_data as u32, result });
        });
    }

    fn wait(&mut self, at_most: Option<Duration>) {
        self.ring.wait(at_most);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.ring.wake_fd()
    }

    fn register_piece(&mut self, piece: u32) -> rustix::io::Result<()> {
        self.ring.register_piece(piece)
    }

    fn unregister_piece(&mut self, piece: u32) {
        self.ring.unregister_piece(piece);
    }

    fn close_files(&mut self) -> bool {
        self.ring.close_files()
    }
}
