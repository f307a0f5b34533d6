//! NVMe commands through io_uring (IORING_OP_URING_CMD on `/dev/ngXnY`, Linux 5.19): no block layer, no file, only
//! reads and writes of logical blocks of a namespace (NVM Command Set Specification 1.0, clauses 3.2.4 and 3.2.6).
//!
//! The kernel splits nothing here: a transfer is as many commands as the controller's largest asks for.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{cqueue, opcode, squeue, types};
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};
use rustix::io::Errno;

use super::medium::{Access, Medium};
use super::ring::{Finds, Ring, RingOptions};
use super::uring::{first_done, has_polled_queues};
use super::{Device, DeviceMemory, Direction, Done, Io, Region};
use crate::limits::SECTOR_BYTES;

/// A command as the kernel takes it: `struct nvme_uring_cmd` and `struct nvme_passthru_cmd` of linux/nvme_ioctl.h.
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Command {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

const _: () = assert!(size_of::<Command>() == 72);

/// `_IOWR('N', 0x80, struct nvme_uring_cmd)`.
const NVME_URING_CMD_IO: u32 = 0xc048_4e80;
/// `_IOWR('N', 0x41, struct nvme_admin_cmd)`.
const NVME_IOCTL_ADMIN_CMD: libc::c_ulong = 0xc048_4e41;
/// `_IO('N', 0x40)`.
const NVME_IOCTL_ID: libc::c_ulong = 0x4e40;

const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const COMPARE: u8 = 0x05;
const GET_LOG_PAGE: u8 = 0x02;
const IDENTIFY: u8 = 0x06;

/// What a namespace and its controller say of themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Its number.
    pub nsid: u32,
    /// Bytes of a logical block.
    pub sector_bytes: u32,
    /// Logical blocks.
    pub sectors_count: u64,
    /// Bytes that one command may move.
    pub transfer_bytes_max: u32,
    /// The controller's serial number.
    pub serial: String,
    /// Its model.
    pub model: String,
    /// Its firmware.
    pub firmware: String,
}

/// Why a device does not take commands, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotNvme(String);

impl From<&str> for NotNvme {
    fn from(why: &str) -> Self {
        Self(why.into())
    }
}

/// The file that takes the commands of a namespace: the other face of its block device.
fn generic_of(medium: &Medium) -> Result<PathBuf, NotNvme> {
    let Medium::BlockDevice(path) = medium else {
        return Err("it is a directory, and files cannot be reached by NVMe commands".into());
    };
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(rest) = name.strip_prefix("nvme") else { return Err("it is no NVMe namespace".into()) };
    if rest.contains('p') {
        return Err("it is a partition, and NVMe commands know only the whole namespace".into());
    }
    let generic = path.with_file_name(format!("ng{rest}"));
    match std::fs::metadata(&generic).is_ok_and(|file| file.file_type().is_char_device()) {
        true => Ok(generic),
        false => Err(NotNvme(format!("there is no {} (Linux 5.13)", generic.display()))),
    }
}

/// Opens what takes the commands of a namespace.
///
/// # Errors
/// Why it cannot be had.
pub fn open(medium: &Medium) -> Result<OwnedFd, NotNvme> {
    let generic = generic_of(medium)?;
    let file = File::options().read(true).write(true).open(&generic);
    let file = file.map_err(|error| NotNvme(format!("{}: {error}", generic.display())))?;
    Ok(file.into())
}

/// Sends a command to the controller and waits for it.
fn administer(file: &OwnedFd, command: Command, data: &mut [u8]) -> Result<(), Errno> {
    let mut command = Command { addr: data.as_mut_ptr().addr() as u64, data_len: data.len() as u32, ..command };
    // SAFETY: the command names `data`, which the kernel fills before this returns, and is the struct of this ioctl.
    let said = unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_ADMIN_CMD, &raw mut command) };
    match said {
        0 => Ok(()),
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        status => Err(errno_of(status as u16)),
    }
}

impl Namespace {
    /// Asks a namespace, and its controller (NVM Express Base Specification 2.0, clause 5.17).
    ///
    /// # Errors
    /// It does not answer, or is made so that a cache cannot lie on it.
    pub fn identify(file: &OwnedFd, medium: &Medium) -> Result<Self, NotNvme> {
        // SAFETY: this ioctl takes no memory and says the namespace's number.
        let nsid = unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_ID) };
        if nsid <= 0 {
            return Err(NotNvme(format!("it does not say which namespace it is: {}", std::io::Error::last_os_error())));
        }
        let nsid = nsid as u32;
        let ask = |nsid, what: u32| {
            let mut page = vec![0; 4096];
            let identify = Command { opcode: IDENTIFY, nsid, cdw10: what, ..Command::default() };
            administer(file, identify, &mut page).map_err(|errno| NotNvme(format!("identify: {errno}")))?;
            Ok::<_, NotNvme>(page)
        };
        let (namespace, controller) = (ask(nsid, 0)?, ask(0, 1)?);
        let text = |from: usize, to: usize| String::from_utf8_lossy(&controller[from..to]).trim().to_owned();
        let format = usize::from(namespace[26] & 0xf) | usize::from(namespace[26] >> 1 & 0x30);
        let format = &namespace[128 + 4 * format..][..4];
        if u16::from_le_bytes([format[0], format[1]]) != 0 {
            return Err("its blocks are formatted with metadata: format it without (nvme format --lbaf)".into());
        }
        let sector_bytes = 1u64.checked_shl(u32::from(format[2])).unwrap_or(0);
        if !(512..=SECTOR_BYTES).contains(&sector_bytes) {
            return Err(NotNvme(format!(
                "its logical blocks have {sector_bytes} bytes, and 512 to {SECTOR_BYTES} are taken"
            )));
        }
        let mut nsze = [0; 8];
        nsze.copy_from_slice(&namespace[..8]);
        Ok(Self {
            nsid,
            sector_bytes: sector_bytes as u32,
            sectors_count: u64::from_le_bytes(nsze),
            transfer_bytes_max: transfer_bytes_max(controller[77], medium),
            serial: text(4, 24),
            model: text(24, 64),
            firmware: text(64, 72),
        })
    }
}

/// Before 6.5 the kernel looks at a polled command that has failed after it has let go of it: seen on 6.1.192, where a read
/// behind the end stops the machine (`nvme_ns_chr_uring_cmd_iopoll`).
fn polls_without_danger() -> Result<(), String> {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 5) {
        return Ok(());
    }
    Err(format!("Linux {release} may crash on a polled command that fails: 6.5 or newer does not"))
}

/// What one command may move: the controller's word (MDTS, in pages of at least 4 KiB), and the kernel's: as many bytes
/// as its queue takes, and segments, of which each page may be one.
fn transfer_bytes_max(mdts: u8, medium: &Medium) -> u32 {
    let read = |name: &str| std::fs::read_to_string(medium.queue()?.join(name)).ok()?.trim().parse::<u64>().ok();
    let by_controller =
        if mdts == 0 { u64::MAX } else { SECTOR_BYTES.checked_shl(u32::from(mdts)).unwrap_or(u64::MAX) };
    let by_bytes = read("max_hw_sectors_kb").map_or(u64::MAX, |kb| kb << 10);
    // A transfer begins on a page: it has no part of one more.
    let by_segments = read("max_segments").map_or(u64::MAX, |segments| segments * SECTOR_BYTES);
    let most = by_controller.min(by_bytes).min(by_segments).clamp(SECTOR_BYTES, 8 << 20);
    (most / SECTOR_BYTES * SECTOR_BYTES) as u32
}

/// What a drive says of its health: log page 02h (NVM Express Base Specification 2.0, clause 5.16.1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Health {
    /// Bits that call for somebody: spare, temperature, reliability, read-only, volatile memory.
    pub critical_warning: u8,
    /// Degrees Celsius.
    pub temperature_celsius: i32,
    /// Spare blocks left, in percent.
    pub available_spare_percent: u8,
    /// Life used, in percent of what the vendor expects; may exceed 100.
    pub percentage_used: u8,
    /// Bytes read by all hosts since it was made, in units of 512,000.
    pub read_bytes: u64,
    /// Bytes written by all hosts since it was made, in units of 512,000.
    pub written_bytes: u64,
    /// Errors of the medium that the drive could not mend.
    pub media_errors_count: u64,
    /// Hours it was on.
    pub power_on_hours: u64,
}

impl Health {
    /// Asks the drive.
    ///
    /// # Errors
    /// It does not say.
    pub fn of(file: &OwnedFd) -> Result<Self, NotNvme> {
        let mut page = [0; 512];
        let words = page.len() as u32 / 4 - 1;
        let ask = Command { opcode: GET_LOG_PAGE, nsid: u32::MAX, cdw10: 0x02 | words << 16, ..Command::default() };
        administer(file, ask, &mut page).map_err(|errno| NotNvme(format!("health log: {errno}")))?;
        Ok(Self::parse(&page))
    }

    /// What a page says.
    pub(super) fn parse(page: &[u8; 512]) -> Self {
        // 128 bits; what does not fit 64 is more than any drive has done.
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| page[at + byte]));
        let units = |at: usize| number(at).saturating_mul(512_000);
        Self {
            critical_warning: page[0],
            temperature_celsius: i32::from(u16::from_le_bytes([page[1], page[2]])) - 273,
            available_spare_percent: page[3],
            percentage_used: page[5],
            read_bytes: units(32),
            written_bytes: units(48),
            media_errors_count: number(160),
            power_on_hours: number(128),
        }
    }
}

/// What a command's status means here: 8 bits of code, 3 of type (Base Specification 2.0, clause 4.5).
pub(super) fn errno_of(status: u16) -> Errno {
    match status & 0x7ff {
        // Invalid field; LBA out of range.
        0x002 | 0x080 => Errno::INVAL,
        // Invalid namespace or format.
        0x00b => Errno::NODEV,
        // Namespace is write protected; attempted write to a read only range.
        0x020 | 0x182 => Errno::ROFS,
        // Capacity exceeded.
        0x081 => Errno::NOSPC,
        // Internal, inaccessible or no path.
        0x300..=0x3ff => Errno::NODEV,
        _ => Errno::IO,
    }
}

#[derive(Debug, Clone, Copy)]
struct Flight {
    io: Io,
    /// Bytes that were asked for.
    asked: u32,
    /// Bytes that were moved.
    moved: u32,
    /// Commands that are under way.
    commands: u32,
    failed: Option<Errno>,
}

/// A namespace, by commands.
pub struct Nvme {
    ring: Ring<squeue::Entry128, cqueue::Entry32>,
    namespace: Namespace,
    flights: Box<[Flight]>,
    free: Vec<u32>,
    /// Flights that are not asked for in full yet, in their order; only the first is in part.
    sending: VecDeque<u32>,
    /// Transfers that no command can ask for.
    refused: Vec<Done>,
    /// Reads compare, and move nothing.
    compares: bool,
}

/// The first sector, into the first of the pool.
fn first_sector() -> Io {
    Io {
        tag: 0,
        direction: Direction::Read,
        file: 0,
        offset_in_file: 0,
        region: Region::Pool,
        offset_in_region: 0,
        bytes: SECTOR_BYTES as u32,
    }
}

impl Nvme {
    /// Over a namespace, whose first sector is read by command and compared with what the block layer reads: it is the
    /// same place, and commands are taken. What of `options` the device or the kernel does not take is left out, and
    /// said in `left_out`. On to `lock` it holds as [`super::uring::Uring::new`] does.
    ///
    /// # Errors
    /// Why it cannot be driven so.
    pub fn new(
        medium: &Medium,
        lock: Option<BorrowedFd<'_>>,
        memory: DeviceMemory,
        mut options: RingOptions,
        left_out: &mut Vec<String>,
    ) -> Result<Self, NotNvme> {
        let namespace = Namespace::identify(&open(medium)?, medium)?;
        if options.io_poll
            && let Err(why) = polls_without_danger()
                .and_then(|()| has_polled_queues(medium))
                .and_then(|()| Self::try_it(medium, &namespace, options))
        {
            left_out.push(format!("io_poll = on: {why}"));
            options.io_poll = false;
        }
        let plain = RingOptions { fixed_buffers: false, ..options };
        Self::try_it(medium, &namespace, plain).map_err(NotNvme)?;
        if options.fixed_buffers
            && let Err(why) = Self::try_fixed(medium, &namespace, memory.clone(), options)
        {
            left_out.push(format!("fixed_buffers = on: {why}"));
            options = plain;
        }
        Self::over(medium, namespace, lock, memory, options)
    }

    fn over(
        medium: &Medium,
        namespace: Namespace,
        lock: Option<BorrowedFd<'_>>,
        memory: DeviceMemory,
        options: RingOptions,
    ) -> Result<Self, NotNvme> {
        let ring = Ring::new(vec![open(medium)?], lock, memory, options, Finds::AnyWay);
        let ring = ring.map_err(|error| NotNvme(error.to_string()))?;
        let nothing = Flight { io: first_sector(), asked: 0, moved: 0, commands: 0, failed: None };
        let depth = options.entries;
        Ok(Self {
            ring,
            namespace,
            flights: vec![nothing; depth as usize].into_boxed_slice(),
            free: (0..depth).rev().collect(),
            sending: VecDeque::with_capacity(depth as usize),
            refused: Vec::with_capacity(depth as usize),
            compares: false,
        })
    }

    /// Reads the first sector with these options, and compares.
    fn try_it(medium: &Medium, namespace: &Namespace, options: RingOptions) -> Result<(), String> {
        const PIECE: usize = 64 << 10;
        let words = |error: Errno| error.to_string();
        let fd = sealed_memfd("kvring-try", PIECE as u64, Pages::Small).map_err(words)?;
        let pool = Arc::new(Mapping::new(&fd, PIECE).map_err(words)?);
        let memory = DeviceMemory { pool: pool.clone(), headers: pool.clone(), piece_bytes: PIECE };
        let options = RingOptions { entries: 2, ..options };
        let made = Self::over(medium, namespace.clone(), None, memory, options);
        let mut device = made.map_err(|error| error.to_string())?;
        device.register_piece(0).map_err(words)?;
        let bytes = SECTOR_BYTES as u32;
        match first_done(&mut device, first_sector()) {
            Some(Ok(moved)) if moved == bytes => {}
            Some(Err(errno)) => return Err(format!("a read by command fails: {errno}")),
            Some(Ok(moved)) => return Err(format!("a read by command moves {moved} bytes of {bytes}")),
            None => return Err("a read by command has not ended after 10 s".into()),
        }
        let (mut by_command, mut by_block) = (vec![0; bytes as usize], vec![0; bytes as usize]);
        pool.copy_out(0, &mut by_command);
        let file = medium.open(0, Access::ReadDirect).map_err(|error| error.to_string())?;
        file.read_exact_at(&mut by_block, 0).map_err(|error| error.to_string())?;
        if by_command == by_block {
            Ok(())
        } else {
            Err("commands read another place than its block device does".into())
        }
    }

    /// Whether memory of the pool is taken by its number: before 6.12 the kernel counts a page of it as a segment, and all
    /// of what is registered at once. A sector of the pool is compared with one of the namespace (NVM Command Set
    /// Specification 1.0, clause 3.2.1), which changes neither; what comes of it does not matter.
    fn try_fixed(
        medium: &Medium,
        namespace: &Namespace,
        memory: DeviceMemory,
        options: RingOptions,
    ) -> Result<(), String> {
        let options = RingOptions { entries: 2, ..options };
        let mut device =
            Self::over(medium, namespace.clone(), None, memory, options).map_err(|error| error.to_string())?;
        device.register_piece(0).map_err(|errno| format!("the pool cannot be registered: {errno}"))?;
        device.compares = true;
        match first_done(&mut device, first_sector()) {
            // The device's own word: equal, not equal, or that it knows no such command. The memory was taken.
            Some(Ok(_) | Err(Errno::IO)) => Ok(()),
            Some(Err(Errno::INVAL)) => {
                Err("the kernel takes no registered memory in commands (Linux 6.12 does, on hugepages)".into())
            }
            Some(Err(errno)) => Err(format!("a comparison by command fails: {errno}")),
            None => Err("a comparison by command has not ended after 10 s".into()),
        }
    }

    /// Asks for what waits, as far as there is room for commands.
    fn send(&mut self) {
        while let Some(at) = self.sending.front().copied()
            && self.ring.inflight < self.ring.options.entries
        {
            let flight = &mut self.flights[at as usize];
            let bytes = (flight.io.bytes - flight.asked).min(self.namespace.transfer_bytes_max);
            let part = Io {
                offset_in_file: flight.io.offset_in_file + u64::from(flight.asked),
                offset_in_region: flight.io.offset_in_region + flight.asked as usize,
                bytes,
                ..flight.io
            };
            let first = part.offset_in_file / u64::from(self.namespace.sector_bytes);
            let command = Command {
                opcode: match part.direction {
                    Direction::Read if self.compares => COMPARE,
                    Direction::Read => READ,
                    Direction::Write => WRITE,
                },
                nsid: self.namespace.nsid,
                addr: self.ring.memory.address(&part).addr() as u64,
                data_len: bytes,
                cdw10: first as u32,
                cdw11: (first >> 32) as u32,
                cdw12: bytes / self.namespace.sector_bytes - 1,
                ..Command::default()
            };
            let mut words = [0; 80];
            words[..72].copy_from_slice(bytemuck::bytes_of(&command));
            let entry = opcode::UringCmd80::new(types::Fixed(0), NVME_URING_CMD_IO)
                .cmd(words)
                .buf_index(self.ring.fixed(&part))
                .build()
                .user_data(u64::from(at) << 32 | u64::from(bytes));
            // SAFETY: the command names `bytes` of a region (checked by Mapping::address), in memory that the ring holds.
            if !unsafe { self.ring.push(&entry) } {
                return;
            }
            let flight = &mut self.flights[at as usize];
            flight.asked += bytes;
            flight.commands += 1;
            if flight.asked == flight.io.bytes {
                self.sending.pop_front();
            }
        }
    }
}

impl Device for Nvme {
    fn describe(&self) -> String {
        let Namespace { nsid, sector_bytes, transfer_bytes_max, serial, model, .. } = &self.namespace;
        format!(
            "NVMe commands through io_uring, {}, namespace {nsid} of {model} {serial}, sectors of {sector_bytes} bytes, {} KiB a command",
            self.ring.options,
            transfer_bytes_max >> 10,
        )
    }

    fn depth(&self) -> u32 {
        self.flights.len() as u32
    }

    fn inflight(&self) -> u32 {
        (self.flights.len() - self.free.len() + self.refused.len()) as u32
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        if self.inflight() == self.depth() {
            return Err(io);
        }
        let sector = self.namespace.sector_bytes;
        let whole = io.offset_in_file.is_multiple_of(u64::from(sector)) && io.bytes.is_multiple_of(sector);
        if !whole || io.bytes == 0 || io.file != 0 {
            self.refused.push(Done { tag: io.tag, result: Err(Errno::INVAL) });
            return Ok(());
        }
        let Some(at) = self.free.pop() else { return Err(io) };
        self.flights[at as usize] = Flight { io, asked: 0, moved: 0, commands: 0, failed: None };
        self.sending.push_back(at);
        Ok(())
    }

    fn flush(&mut self) {
        self.send();
        self.ring.flush();
    }

    fn poll(&mut self, _now_ns: u64, budget: usize, done: &mut Vec<Done>) {
        let before = done.len();
        done.extend(self.refused.drain(..self.refused.len().min(budget)));
        let (flights, sending, free) = (&mut self.flights, &mut self.sending, &mut self.free);
        self.ring.reap(budget, |user_data, result| {
            let (at, bytes) = ((user_data >> 32) as u32, user_data as u32);
            let flight = &mut flights[at as usize];
            flight.commands -= 1;
            match result {
                0 => flight.moved += bytes,
                // A command that timed out or was cut off by a reset: not one to be sent again for ever.
                error if error == -libc::EINTR => flight.failed = Some(Errno::TIMEDOUT),
                error if error < 0 => flight.failed = Some(Errno::from_raw_os_error(-error)),
                status => flight.failed = Some(errno_of(status as u16)),
            }
            if flight.failed.is_some() && sending.front() == Some(&at) {
                // The rest of it is not asked for.
                sending.pop_front();
                flight.asked = flight.io.bytes;
            }
            if flight.commands == 0 && flight.asked == flight.io.bytes {
                let result = flight.failed.map_or(Ok(flight.moved), Err);
                done.push(Done { tag: flight.io.tag, result });
                free.push(at);
            }
        });
        // What did not fit goes with what has become free.
        if done.len() > before || !self.sending.is_empty() {
            self.flush();
        }
    }

    fn wait(&mut self, at_most: Option<Duration>) {
        self.send();
        if self.refused.is_empty() {
            self.ring.wait(at_most);
        }
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

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_health_log_is_read_as_the_specification_lays_it_out() {
        let mut page = [0; 512];
        page[0] = 0b101;
        page[1..3].copy_from_slice(&310u16.to_le_bytes());
        (page[3], page[5]) = (99, 7);
        page[32..48].copy_from_slice(&3u128.to_le_bytes());
        page[48..64].copy_from_slice(&2000u128.to_le_bytes());
        page[128..144].copy_from_slice(&12u128.to_le_bytes());
        page[160..176].copy_from_slice(&1u128.to_le_bytes());
        let expected = Health {
            critical_warning: 5,
            temperature_celsius: 37,
            available_spare_percent: 99,
            percentage_used: 7,
            read_bytes: 1_536_000,
            written_bytes: 1_024_000_000,
            media_errors_count: 1,
            power_on_hours: 12,
        };
        assert_eq!(Health::parse(&page), expected);
    }

    #[test]
    fn what_is_no_namespace_says_why() {
        let why = |path: &str| Medium::of(path.as_ref()).map(|medium| open(&medium).unwrap_err().to_string());
        assert!(why("/tmp").unwrap().contains("a directory"));
        assert!(why("/dev/null").unwrap_err().to_string().contains("belongs to no NVMe namespace"));
        let block = |path: &str| open(&Medium::BlockDevice(path.into())).unwrap_err().to_string();
        assert!(block("/dev/vda").contains("no NVMe namespace"));
        assert!(block("/dev/nvme9n1p2").contains("a partition"));
        assert!(block("/dev/nvme9n1").contains("there is no /dev/ng9n1"));
    }
}
