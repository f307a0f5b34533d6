//! linux-aio (io_submit) on files with O_DIRECT: for kernels and containers that forbid io_uring.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;
use rustix::io::Errno;

use super::{Device, DeviceMemory, Direction, Done, Io};

/// `struct iocb` of linux/aio_abi.h, little-endian.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    reqprio: i16,
    fildes: u32,
    buf: u64,
    nbytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    resfd: u32,
}

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Event {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

const _: () = assert!(size_of::<Iocb>() == 64 && size_of::<Event>() == 32);

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_CMD_PWRITE: u16 = 1;
const IOCB_FLAG_RESFD: u32 = 1;

/// Completions taken in one system call.
const EVENTS: usize = 64;

/// One device's context.
pub struct Aio {
    context: libc::c_ulong,
    memory: DeviceMemory,
    files: Vec<OwnedFd>,
    bell: OwnedFd,
    depth: u32,
    inflight: u32,
    /// Taken but not handed over yet.
    queue: Vec<Iocb>,
    /// Transfers that the kernel refused at once, to be reported by `poll`.
    refused: Vec<Done>,
}

fn errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl Aio {
    /// A context over files that were opened with O_DIRECT.
    ///
    /// # Errors
    /// What the kernel says: `EAGAIN` beyond fs.aio-max-nr.
    pub fn new(files: Vec<OwnedFd>, memory: DeviceMemory, depth: u32) -> rustix::io::Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup writes one word to `context`, which is 0 as it must be.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, depth as libc::c_uint, &raw mut context) };
        if result < 0 {
            return Err(errno());
        }
        let queue = Vec::with_capacity(depth as usize);
        let refused = Vec::with_capacity(depth as usize);
        Ok(Self { context, memory, files, bell, depth, inflight: 0, queue, refused })
    }
}

impl Device for Aio {
    fn describe(&self) -> String {
        format!("libaio, O_DIRECT, {} entries", self.depth)
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
        self.inflight += 1;
        self.queue.push(Iocb {
            data: u64::from(io.tag),
            opcode: if io.direction == Direction::Read { IOCB_CMD_PREAD } else { IOCB_CMD_PWRITE },
            fildes: self.files[io.file as usize].as_raw_fd() as u32,
            buf: self.memory.address(&io) as u64,
            nbytes: u64::from(io.bytes),
            offset: io.offset_in_file as i64,
            flags: IOCB_FLAG_RESFD,
            resfd: self.bell.as_raw_fd() as u32,
            ..Iocb::default()
        });
        Ok(())
    }

    fn flush(&mut self) {
        while !self.queue.is_empty() {
            // On the stack: no allocation, and a bounded number in one call.
            let count = self.queue.len().min(EVENTS);
            let mut pointers = [std::ptr::null_mut::<Iocb>(); EVENTS];
            for (pointer, iocb) in pointers.iter_mut().zip(&mut self.queue[..count]) {
                *pointer = iocb;
            }
            // SAFETY: `pointers[..count]` point at live iocbs, which the kernel copies before it
            // returns; each names memory that self keeps mapped until io_destroy has waited for it.
            let result = unsafe {
                libc::syscall(libc::SYS_io_submit, self.context, count as libc::c_long, pointers.as_mut_ptr())
            };
            if result > 0 {
                self.queue.drain(..result as usize);
                continue;
            }
            match errno() {
                // No room in the kernel now: the rest stays for the next flush.
                Errno::AGAIN | Errno::INTR => return,
                error => {
                    let first = self.queue.remove(0);
                    self.refused.push(Done { tag: first.data as u32, result: Err(error) });
                    // Nobody rings for it, so we do.
                    kvring_ipc::bell::ring_own(&self.bell);
                }
            }
        }
    }

    fn poll(&mut self, _now_ns: u64, budget: usize, done: &mut Vec<Done>) {
        // Silent before the look, so that what completes after it rings again.
        kvring_ipc::bell::drain_own(&self.bell);
        let most = budget.saturating_sub(done.len());
        for refused in self.refused.drain(self.refused.len().saturating_sub(most)..) {
            self.inflight -= 1;
            done.push(refused);
        }
        let in_kernel = self.inflight as usize - self.queue.len();
        if in_kernel == 0 {
            if !self.refused.is_empty() {
                kvring_ipc::bell::ring_own(&self.bell);
            }
            return;
        }
        let mut events = [Event::default(); EVENTS];
        let budget = budget.saturating_sub(done.len());
        let most = EVENTS.min(budget).min(in_kernel);
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `events` has room for `most` events; `zero` outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0 as libc::c_long,
                most as libc::c_long,
                events.as_mut_ptr(),
                &raw const zero,
            )
        };
        for event in &events[..usize::try_from(result).unwrap_or(0)] {
            self.inflight -= 1;
            let result = u32::try_from(event.res).map_err(|_| Errno::from_raw_os_error(-event.res as i32));
            done.push(Done { tag: event.data as u32, result });
        }
        let cut_short = most < in_kernel && usize::try_from(result) == Ok(most);
        if cut_short || !self.refused.is_empty() {
            // There may be more: nobody else would ring for it.
            kvring_ipc::bell::ring_own(&self.bell);
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bell.as_fd())
    }

    fn register_piece(&mut self, _piece: u32) -> rustix::io::Result<()> {
        Ok(())
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: the context is ours; io_destroy waits for what is in flight, and the memory it goes
        // to is still mapped, because fields are dropped after this.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
