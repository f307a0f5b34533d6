//! A device that is not there: its place among the others is kept, and every transfer fails.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::{Device, Done, Io};

/// The place of a device that is gone.
#[derive(Debug)]
pub struct Gone {
    depth: u32,
    failed: Vec<Done>,
}

impl Gone {
    /// As deep as the one that was there.
    pub fn new(depth: u32) -> Self {
        Self { depth, failed: Vec::with_capacity(depth as usize) }
    }
}

impl Device for Gone {
    fn describe(&self) -> String {
        "gone".into()
    }
    fn depth(&self) -> u32 {
        self.depth
    }
    fn inflight(&self) -> u32 {
        self.failed.len() as u32
    }
    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.inflight() == self.depth {
            return Err(io);
        }
        self.failed.push(Done { tag: io.tag, result: Err(Errno::NODEV) });
        Ok(())
    }
    fn flush(&mut self) {}
    fn poll(&mut self, _now_ns: u64, budget: usize, done: &mut Vec<Done>) {
        done.extend(self.failed.drain(..self.failed.len().min(budget)));
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn register_piece(&mut self, _piece: u32) -> rustix::io::Result<()> {
        Ok(())
    }
}
