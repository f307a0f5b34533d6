//! A device that remembers every write, with its bytes, in the order in which they were submitted: what a
//! power cut may leave of them is then tried out.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use kvring_engine::device::{Device, DeviceMemory, Direction, Done, Io};

/// A write.
#[derive(Debug, Clone)]
pub struct Written {
    /// Which device.
    pub device: usize,
    /// Which of its files, and where in it.
    pub file: u16,
    /// See `file`.
    pub offset: u64,
    /// What.
    pub bytes: Vec<u8>,
}

/// Every write of all devices that share it.
pub type Log = Arc<Mutex<Vec<Written>>>;

/// The wrapper.
#[derive(Debug)]
pub struct Recorder<D> {
    device: D,
    number: usize,
    memory: DeviceMemory,
    log: Log,
}

impl<D: Device> Recorder<D> {
    /// Around a device that moves bytes to and from this memory.
    pub fn new(device: D, number: usize, memory: DeviceMemory, log: Log) -> Self {
        Self { device, number, memory, log }
    }
}

impl<D: Device> Device for Recorder<D> {
    fn describe(&self) -> String {
        self.device.describe()
    }
    fn depth(&self) -> u32 {
        self.device.depth()
    }
    fn inflight(&self) -> u32 {
        self.device.inflight()
    }
    fn submit(&mut self, io: Io) -> Result<(), Io> {
        self.device.submit(io)?;
        if io.direction == Direction::Write {
            let mut bytes = vec![0; io.bytes as usize];
            self.memory.region(io.region).copy_out(io.offset_in_region, &mut bytes);
            let written = Written { device: self.number, file: io.file, offset: io.offset_in_file, bytes };
            self.log.lock().expect("nobody panics with it").push(written);
        }
        Ok(())
    }
    fn flush(&mut self) {
        self.device.flush();
    }
    fn poll(&mut self, now_ns: u64, budget: usize, done: &mut Vec<Done>) {
        self.device.poll(now_ns, budget, done);
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.wake_fd()
    }
    fn register_piece(&mut self, piece: u32) -> rustix::io::Result<()> {
        self.device.register_piece(piece)
    }
}
