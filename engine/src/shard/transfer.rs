//! One device's transfers: what waits, what is in flight, and which goes first: demand reads, then
//! headers, then write-backs. Resubmits what came back short.

use std::collections::VecDeque;

use super::lost::Health;
use crate::device::{Device, Direction, Done, Io, Region};
use crate::index::BlockId;
use crate::limits::SECTOR_BYTES;

/// What a transfer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A block on its way to the pool.
    Read {
        /// The block.
        block: BlockId,
        /// Target.
        host_slot: u32,
        /// Source.
        disk_slot: u32,
    },
    /// A block on its way to the disk.
    Write {
        /// The block.
        block: BlockId,
    },
    /// A sector of headers.
    Header {
        /// Which.
        sector: u32,
    },
}

#[derive(Debug, Clone, Copy)]
struct Flight {
    purpose: Purpose,
    /// What is still to be moved.
    rest: Io,
    queued_ns: u64,
    begun_ns: u64,
}

/// What waits, since when.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    purpose: Purpose,
    io: Io,
    since_ns: u64,
}

/// How a transfer ended.
#[derive(Debug, Clone, Copy)]
pub struct Landed {
    /// What it was for.
    pub purpose: Purpose,
    /// Whether every byte was moved.
    pub good: bool,
    /// Since when it waited.
    pub queued_ns: u64,
    /// When the device got it.
    pub begun_ns: u64,
}

/// How long a write takes before one has ended, and at most.
const WRITE_NS_FIRST: u64 = 1_000_000;
const WRITE_NS_MAX: u64 = 10_000_000_000;
/// Write-backs that wait with their checksum made.
const WRITES_AHEAD: u32 = 4;

/// One device and its transfers.
pub struct Transfers<D> {
    /// The device.
    pub device: D,
    flights: Box<[Option<Flight>]>,
    free: Vec<u32>,
    reads: VecDeque<Waiting>,
    writes: VecDeque<Waiting>,
    reads_inflight: u32,
    writes_inflight: u32,
    header_inflight: bool,
    read_depth: u32,
    write_depth: u32,
    /// How long a write takes, of late.
    pub write_ns: u64,
    /// How it is doing.
    pub health: Health,
    /// Transfers that ended short.
    pub short_count: u64,
    /// The moment of what is queued and begun.
    pub now_ns: u64,
}

impl<D: Device> Transfers<D> {
    /// Over a device, with bounds on what may wait.
    pub fn new(device: D, read_depth: u32, write_depth: u32, host_slots: u32) -> Self {
        // Reads, writes and one header, and never more than the device takes.
        let flights = (read_depth + write_depth + 1).min(device.depth());
        Self {
            device,
            flights: vec![None; flights as usize].into_boxed_slice(),
            free: (0..flights).rev().collect(),
            // Each waiting transfer has a host slot of its own.
            reads: VecDeque::with_capacity(host_slots as usize),
            writes: VecDeque::with_capacity(host_slots as usize),
            reads_inflight: 0,
            writes_inflight: 0,
            header_inflight: false,
            read_depth,
            write_depth,
            write_ns: WRITE_NS_FIRST,
            health: Health::default(),
            short_count: 0,
            now_ns: 0,
        }
    }

    /// A read waits from now on.
    pub fn queue_read(&mut self, purpose: Purpose, io: Io) {
        self.reads.push_back(Waiting { purpose, io, since_ns: self.now_ns });
    }
    /// A write waits from now on.
    pub fn queue_write(&mut self, purpose: Purpose, io: Io) {
        self.writes.push_back(Waiting { purpose, io, since_ns: self.now_ns });
    }
    /// Reads that wait.
    pub fn reads_waiting(&self) -> u32 {
        self.reads.len() as u32
    }
    /// Reads that wait and are in flight, and writes.
    pub fn levels(&self) -> [u32; 4] {
        [self.reads.len() as u32, self.reads_inflight, self.writes.len() as u32, self.writes_inflight]
    }
    /// Writes that wait or are in flight.
    pub fn writes_count(&self) -> u32 {
        self.writes.len() as u32 + self.writes_inflight
    }
    /// How many writes may be begun now: a few more than may be in flight, so that one that ends is
    /// followed at once and not after a checksum.
    pub fn writes_wanted(&self) -> u32 {
        self.writes_limit() + WRITES_AHEAD
    }

    /// How many writes may be in flight now: fewer while reads are.
    fn writes_limit(&self) -> u32 {
        let busy = self.reads_inflight > 0 || !self.reads.is_empty();
        if busy { (self.write_depth / 4).max(1) } else { self.write_depth }
    }
    /// Whether a header may be written now.
    pub fn wants_header(&self) -> bool {
        !self.header_inflight && !self.free.is_empty()
    }
    /// Whether nothing waits and nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.reads.is_empty() && self.writes.is_empty() && self.free.len() == self.flights.len()
    }

    /// Since when the oldest transfer in flight is.
    pub fn oldest_ns(&self) -> Option<u64> {
        self.flights.iter().flatten().map(|flight| flight.begun_ns).min()
    }
    /// The host slots that blocks are being read into.
    pub fn reads_inflight(&self) -> impl Iterator<Item = (BlockId, u32)> {
        self.flights.iter().flatten().filter_map(|flight| match flight.purpose {
            Purpose::Read { block, host_slot, .. } => Some((block, host_slot)),
            Purpose::Write { .. } | Purpose::Header { .. } => None,
        })
    }
    /// What waits ends here, undone: one of it at a time. Of writes only those that `may_write` does not let through.
    pub fn give_up(&mut self, may_write: bool) -> Option<Landed> {
        let waiting = self.reads.pop_front();
        let waiting = waiting.or_else(|| if may_write { None } else { self.writes.pop_front() });
        let Waiting { purpose, since_ns, .. } = waiting?;
        Some(Landed { purpose, good: false, queued_ns: since_ns, begun_ns: self.now_ns })
    }

    /// Starts writing a sector of headers. The caller has seen `wants_header`.
    pub fn start_header(&mut self, sector: u32) {
        self.header_inflight = true;
        let io = Io {
            tag: 0,
            direction: Direction::Write,
            file: 0,
            offset_in_file: (1 + u64::from(sector)) * SECTOR_BYTES,
            region: Region::Headers,
            offset_in_region: sector as usize * SECTOR_BYTES as usize,
            bytes: SECTOR_BYTES as u32,
        };
        self.start(Purpose::Header { sector }, io, self.now_ns);
    }

    /// Starts what waits, as far as there is room. Says how many.
    pub fn start_waiting(&mut self) -> u32 {
        let mut count = 0;
        while self.reads_inflight < self.read_depth && !self.free.is_empty() {
            let Some(Waiting { purpose, io, since_ns }) = self.reads.pop_front() else { break };
            self.reads_inflight += 1;
            self.start(purpose, io, since_ns);
            count += 1;
        }
        while self.writes_inflight < self.writes_limit() && !self.free.is_empty() {
            let Some(Waiting { purpose, io, since_ns }) = self.writes.pop_front() else { break };
            self.writes_inflight += 1;
            self.start(purpose, io, since_ns);
            count += 1;
        }
        count
    }

    fn start(&mut self, purpose: Purpose, io: Io, queued_ns: u64) {
        let Some(tag) = self.free.pop() else { unreachable!("room was seen") };
        let io = Io { tag, ..io };
        self.flights[tag as usize] = Some(Flight { purpose, rest: io, queued_ns, begun_ns: self.now_ns });
        let taken = self.device.submit(io);
        assert!(taken.is_ok(), "there are no more flights than the device takes");
    }

    /// Says how a finished transfer ended; `None` if the rest of it was sent after it.
    pub fn land(&mut self, done: Done) -> Option<Landed> {
        let flight = self.flights[done.tag as usize]?;
        let Flight { purpose, rest, queued_ns, begun_ns } = flight;
        let moved = done.result.unwrap_or(0);
        assert!(moved <= rest.bytes, "a device moves no more than it was asked to");
        // Nothing moved without an error: the end of the file, where no file should end.
        if moved > 0 && moved < rest.bytes {
            self.short_count += 1;
            // O_DIRECT wants whole sectors: what was moved of a torn one is moved again.
            let whole = moved - moved % SECTOR_BYTES as u32;
            let rest = Io {
                offset_in_file: rest.offset_in_file + u64::from(whole),
                offset_in_region: rest.offset_in_region + whole as usize,
                bytes: rest.bytes - whole,
                ..rest
            };
            // Progress was made unless it was less than a sector: then it counts as an error.
            if whole > 0 {
                self.flights[done.tag as usize] = Some(Flight { rest, ..flight });
                let taken = self.device.submit(rest);
                assert!(taken.is_ok(), "the flight's own place is free");
                return None;
            }
        }
        let retry = matches!(done.result, Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR));
        if retry {
            let taken = self.device.submit(rest);
            assert!(taken.is_ok(), "the flight's own place is free");
            return None;
        }
        self.flights[done.tag as usize] = None;
        self.free.push(done.tag);
        match purpose {
            Purpose::Read { .. } => self.reads_inflight -= 1,
            Purpose::Write { .. } => {
                self.writes_inflight -= 1;
                let took_ns = self.now_ns.saturating_sub(begun_ns);
                // One that fails fast is not fast.
                let good = moved == rest.bytes;
                self.write_ns = if good { (7 * self.write_ns + took_ns) / 8 } else { 2 * self.write_ns.max(1) };
                self.write_ns = self.write_ns.min(WRITE_NS_MAX);
            }
            Purpose::Header { .. } => self.header_inflight = false,
        }
        Some(Landed { purpose, good: moved == rest.bytes, queued_ns, begun_ns })
    }
}
