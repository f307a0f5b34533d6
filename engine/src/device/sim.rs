//! A device in memory with latency and faults from a seed: what a simulation injects, and beside each
//! fault what must come of it.
//!
//! | fault | must |
//! |---|---|
//! | error | be a miss (read), or leave the block in the pool only (write) |
//! | short transfer | be resubmitted |
//! | bit rot, misdirected read, lost or misdirected write | be found by the checksum: a miss |
//! | slow | delay nobody but those who wait for it |
//! | dead or hung for a while | cost the blocks that lie there, and leave no request unanswered |
//! | power cut | leave whole blocks or misses: writes not yet reported may be lost or torn |

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::{Device, DeviceMemory, Direction, Done, Io};
use crate::limits::SECTOR_BYTES;

/// A small, fast, seeded source of chance (splitmix64, Steele et al., OOPSLA 2014).
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Uniform below `limit`, which is above 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(limit)) >> 64) as u64
    }
    /// True `permille` times in a thousand.
    pub fn happens(&mut self, permille: u32) -> bool {
        permille > 0 && self.below(1000) < u64::from(permille)
    }
}

/// How often each fault happens, in a thousand transfers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named in the table above")]
pub struct Faults {
    pub error_permille: u32,
    pub short_permille: u32,
    pub bit_rot_permille: u32,
    pub misdirected_permille: u32,
    pub lost_write_permille: u32,
    pub slow_permille: u32,
}

/// Bytes of the simulated files: they outlive a device, as a disk outlives a process.
pub type Platter = Vec<Vec<u8>>;

#[derive(Debug)]
struct Flight {
    io: Io,
    due_ns: u64,
}

/// The simulated device.
#[derive(Debug)]
pub struct Sim {
    memory: DeviceMemory,
    platter: Platter,
    /// Read and write faults apply; changed at will by a simulation.
    pub faults: Faults,
    chance: Chance,
    depth: u32,
    latency_ns: u64,
    flights: VecDeque<Flight>,
    last_now_ns: u64,
    /// Every transfer fails.
    pub dead: bool,
    /// No transfer ends.
    pub hung: bool,
}

impl Sim {
    /// A device over these bytes.
    pub fn new(platter: Platter, memory: DeviceMemory, depth: u32, latency_ns: u64, faults: Faults, seed: u64) -> Self {
        let flights = VecDeque::with_capacity(depth as usize);
        let (chance, last_now_ns) = (Chance::new(seed), 0);
        Self { memory, platter, faults, chance, depth, latency_ns, flights, last_now_ns, dead: false, hung: false }
    }

    /// Power is cut, or the process that used it is dead: each transfer that was not reported may have
    /// happened, in part, or not at all.
    pub fn power_cut(mut self) -> Platter {
        while let Some(flight) = self.flights.pop_front() {
            let sectors = u64::from(flight.io.bytes) / SECTOR_BYTES;
            let torn = self.chance.below(sectors + 1) * SECTOR_BYTES;
            self.transfer(&Io { bytes: torn as u32, ..flight.io }, flight.io.offset_in_file);
        }
        self.platter
    }

    fn transfer(&mut self, io: &Io, offset_in_file: u64) {
        let memory = self.memory.region(io.region);
        let from = offset_in_file as usize;
        let bytes = &mut self.platter[io.file as usize][from..from + io.bytes as usize];
        match io.direction {
            Direction::Read => memory.copy_in(io.offset_in_region, bytes),
            Direction::Write => memory.copy_out(io.offset_in_region, bytes),
        }
    }

    fn complete(&mut self, io: &Io) -> Result<u32, Errno> {
        let Faults {
            error_permille, short_permille, bit_rot_permille, misdirected_permille, lost_write_permille, ..
        } = self.faults;
        let file_bytes = self.platter[io.file as usize].len() as u64;
        if io.offset_in_file + u64::from(io.bytes) > file_bytes {
            return Err(Errno::INVAL);
        }
        if self.dead || self.chance.happens(error_permille) {
            return Err(Errno::IO);
        }
        let mut io = *io;
        let sectors = u64::from(io.bytes) / SECTOR_BYTES;
        if sectors > 1 && self.chance.happens(short_permille) {
            io.bytes = ((1 + self.chance.below(sectors - 1)) * SECTOR_BYTES) as u32;
        }
        let mut offset = io.offset_in_file;
        if self.chance.happens(misdirected_permille) {
            offset = self.chance.below((file_bytes - u64::from(io.bytes)) / SECTOR_BYTES + 1) * SECTOR_BYTES;
        }
        if self.chance.happens(bit_rot_permille) {
            let at = offset as usize + self.chance.below(u64::from(io.bytes)) as usize;
            self.platter[io.file as usize][at] ^= 1 << self.chance.below(8);
        }
        if io.direction == Direction::Read || !self.chance.happens(lost_write_permille) {
            self.transfer(&io, offset);
        }
        Ok(io.bytes)
    }
}

impl Device for Sim {
    fn describe(&self) -> String {
        format!("simulated, {} ns, {} entries", self.latency_ns, self.depth)
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn inflight(&self) -> u32 {
        self.flights.len() as u32
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.flights.len() == self.depth as usize {
            return Err(io);
        }
        let mut latency = self.latency_ns / 2 + self.chance.below(self.latency_ns + 1);
        if self.chance.happens(self.faults.slow_permille) {
            latency *= 100;
        }
        let due_ns = self.last_now_ns + latency;
        self.flights.push_back(Flight { io, due_ns });
        Ok(())
    }

    fn flush(&mut self) {}

    fn poll(&mut self, now_ns: u64, budget: usize, done: &mut Vec<Done>) {
        self.last_now_ns = now_ns;
        if self.hung {
            return;
        }
        let mut at = 0;
        let mut count = 0;
        while at < self.flights.len() && count < budget {
            if self.flights[at].due_ns > now_ns {
                at += 1;
                continue;
            }
            if let Some(flight) = self.flights.remove(at) {
                let result = self.complete(&flight.io);
                done.push(Done { tag: flight.io.tag, result });
                count += 1;
            }
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn register_piece(&mut self, _piece: u32) -> rustix::io::Result<()> {
        Ok(())
    }
}
