//! Checks the SSD tier of a server that is not running: what is there, and is it what was written?
//!
//! A block that is not is nothing that a server would serve: it compares every block that it reads. What
//! is found here says how healthy the device is, and `repair` saves the server finding it out.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;

use kvring_ipc::key::BlockKey;
use kvring_ipc::layout::Layout;
use kvring_ipc::wire::MATCH_BLOCKS_MAX;

use crate::checksum;
use crate::device::files::{self, FilesError, Found};
use crate::device::medium::{Access, Medium, Patience};
use crate::limits::SECTOR_BYTES;
use crate::tier::disk::DiskGeometry;
use crate::tier::header::{HEADER_BYTES, Header, Superblock};

/// What to check, and what to do about it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Forget what is bad: clear its header.
    pub repair: bool,
    /// Do not read the blocks.
    pub headers_only: bool,
}

/// Why nothing was checked.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages are the documentation")]
pub enum FsckError {
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(
        "{file}: no kvring cache, or one of another version, or its first sector is damaged: a server refuses it as well; remove it, or set ssd_on_mismatch = reset"
    )]
    NoCache { file: String },
    #[error("{file} belongs to another cache than {first}: name the directories of one cache, in any order")]
    OtherCache { file: String, first: String },
    #[error("{file} and {twin} are both directory {place} of one cache: one is a copy; name one of them")]
    Twice { file: String, twin: String, place: u32 },
    #[error("{file}: {error}")]
    Io { file: String, error: std::io::Error },
}

/// What a directory holds.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct DirReport {
    /// Which directory.
    pub dir: PathBuf,
    /// Its place among the cache's directories, and how many those are.
    pub device: u32,
    /// See `device`.
    pub devices: u32,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// What the blocks look like, if the file says so.
    pub layout: Option<Layout>,
    /// Slots there are.
    pub slots: u64,
    /// Slots that hold nothing.
    pub empty: u64,
    /// Blocks that a server would serve.
    pub sound: u64,
    /// Headers that are no headers: torn, rotten, misdirected or of another layout.
    pub damaged_headers: u64,
    /// Blocks that are not what was written: their slot was written anew since, or they are rotten.
    pub damaged_blocks: u64,
    /// Blocks, among the sound ones, that were written without a checksum (checksum = off).
    pub without_checksum: u64,
    /// Blocks whose file could not be read there.
    pub unreadable_blocks: u64,
    /// Sound blocks whose parent is in none of the directories: nobody can find them.
    pub orphans: u64,
    /// Sound blocks that are there a second time.
    pub duplicates: u64,
    /// Headers that were cleared.
    pub repaired: u64,
}

impl DirReport {
    /// Everything that is there and that no server would serve.
    pub fn bad(&self) -> u64 {
        self.damaged_headers + self.damaged_blocks + self.unreadable_blocks + self.orphans + self.duplicates
    }
}

struct Device {
    report: DirReport,
    medium: Medium,
    superblock: Superblock,
    geometry: DiskGeometry,
    headers: Vec<u8>,
    bad: Vec<u32>,
    /// Held meanwhile: no server may write.
    _lock: File,
}

/// Checks the directories of one cache. `progress` is told how many slots of how many are done.
///
/// # Errors
/// [`FsckError`]: nothing was changed.
pub fn check(
    dirs: &[PathBuf],
    options: Options,
    mut progress: impl FnMut(u64, u64),
) -> Result<Vec<DirReport>, FsckError> {
    let mut devices = Medium::all(dirs)?.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let cache_id = devices.first().map(|device| device.superblock.cache_id);
    if let Some(other) = devices.iter().find(|device| Some(device.superblock.cache_id) != cache_id) {
        return Err(FsckError::OtherCache { file: other.medium.name(), first: devices[0].medium.name() });
    }
    for (at, device) in devices.iter().enumerate() {
        let (first, place) = (&devices[0].superblock, device.superblock.device);
        let twin = devices[..at].iter().find(|other| other.superblock.device == place);
        if let Some(twin) = twin {
            return Err(FsckError::Twice {
                file: device.medium.name(),
                twin: twin.medium.name(),
                place: device.report.device + 1,
            });
        }
        let same = |of: fn(&Superblock) -> u64| of(&device.superblock) == of(first);
        if !(same(|s| s.slot_bytes) && same(|s| s.layout) && same(|s| s.device & 0xffff_ffff)) {
            return Err(FsckError::OtherCache { file: device.medium.name(), first: devices[0].medium.name() });
        }
    }
    let total = devices.iter().map(|device| device.report.slots).sum();
    let mut done = 0;
    let mut sound: Vec<(Header, usize)> = Vec::new();
    for (at, device) in devices.iter_mut().enumerate() {
        check_device(
            device,
            options,
            |header| sound.push((header, at)),
            || {
                done += 1;
                progress(done, total);
            },
        )?;
    }
    // All of them are here: a parent that is in none is nowhere.
    let whole = devices.first().is_some_and(|device| device.geometry.devices_count as usize == devices.len());
    judge_chains(&mut devices, sound, whole);
    if options.repair {
        devices.iter_mut().try_for_each(repair)?;
    }
    Ok(devices.into_iter().map(|device| device.report).collect())
}

fn io(medium: &Medium, file: u32) -> impl Fn(std::io::Error) -> FsckError {
    let file = medium.path_of(file).display().to_string();
    move |error| FsckError::Io { file: file.clone(), error }
}

fn open(medium: Medium) -> Result<Device, FsckError> {
    // Before the lock, which would make the directory.
    let found = files::read_superblock(&medium).map_err(io(&medium, 0))?;
    let Found::Super(superblock) = found else { return Err(FsckError::NoCache { file: medium.name() }) };
    // Not waited for: between two engine processes it is the next one's.
    let lock = medium.lock(Patience::No)?;
    let (device, devices) = ((superblock.device >> 32) as u32, superblock.device as u32);
    let geometry = DiskGeometry {
        devices_count: devices,
        slots_per_device: superblock.slots_count(),
        slots_limit: superblock.slots_count(),
        header_slots: superblock.header_slots(),
        slots_per_file: superblock.slots_per_file as u32,
        slot_bytes: superblock.slot_bytes,
    };
    // Its own checksum says that these are the numbers that were written; a number that cannot be was not.
    let possible = device < devices
        && u64::from(superblock.slots_count()).saturating_mul(u64::from(devices)) <= crate::limits::SLOTS_MAX
        && (1..=u64::from(superblock.slots_count())).contains(&superblock.slots_per_file)
        && superblock.slot_bytes.is_multiple_of(SECTOR_BYTES)
        && (1..=1 << 30).contains(&superblock.slot_bytes);
    if !possible {
        return Err(FsckError::NoCache { file: medium.name() });
    }
    let mut headers = vec![0; (geometry.header_sectors() * SECTOR_BYTES) as usize];
    let file = medium.open(0, Access::Read).map_err(io(&medium, 0))?;
    file.read_exact_at(&mut headers, SECTOR_BYTES).map_err(io(&medium, 0))?;
    let report = DirReport {
        dir: medium.path().to_path_buf(),
        device,
        devices,
        block_bytes: superblock.slot_bytes,
        layout: files::read_layout(&medium),
        slots: u64::from(superblock.slots_count()),
        ..DirReport::default()
    };
    Ok(Device { report, medium, superblock, geometry, headers, bad: Vec::new(), _lock: lock })
}

fn check_device(
    device: &mut Device,
    options: Options,
    mut is_sound: impl FnMut(Header),
    mut done: impl FnMut(),
) -> Result<(), FsckError> {
    let geometry = device.geometry;
    let files = (0..geometry.files_per_device())
        .map(|file| device.medium.open(file, Access::Read).map_err(io(&device.medium, file)));
    let files = if options.headers_only { Vec::new() } else { files.collect::<Result<Vec<_>, _>>()? };
    let mut block = vec![0; if options.headers_only { 0 } else { geometry.slot_bytes as usize }];
    for local in 0..geometry.slots_per_device {
        done();
        let bytes = &device.headers[local as usize * HEADER_BYTES as usize..][..HEADER_BYTES as usize];
        if bytes.iter().all(|byte| *byte == 0) {
            device.report.empty += 1;
            continue;
        }
        let header: Header = bytemuck::pod_read_unaligned(bytes);
        let slot = local * geometry.devices_count + device.report.device;
        if !header.is_sound(slot, device.superblock.layout) {
            device.report.damaged_headers += 1;
            device.bad.push(local);
            continue;
        }
        if let (file, offset) = geometry.offset_of(slot)
            && let Some(file) = files.get(file as usize)
        {
            if file.read_exact_at(&mut block, offset).is_err() {
                device.report.unreadable_blocks += 1;
                device.bad.push(local);
                continue;
            }
            if header.data_crc == 0 {
                // Written with checksum = off: there is nothing to compare with.
                device.report.without_checksum += 1;
            } else if checksum::of_bytes(&block) != header.data_crc {
                device.report.damaged_blocks += 1;
                device.bad.push(local);
                continue;
            }
        }
        is_sound(header);
    }
    Ok(())
}

/// Parents before children: a block is of use if its chain is whole.
fn judge_chains(devices: &mut [Device], mut sound: Vec<(Header, usize)>, whole: bool) {
    sound.sort_unstable_by_key(|(header, _)| (header.depth, header.slot));
    let mut depth_of: HashMap<BlockKey, u32> = HashMap::with_capacity(sound.len());
    for (header, at) in sound {
        let device = &mut devices[at];
        let parent_there = header.depth == 0
            || header.depth <= MATCH_BLOCKS_MAX && depth_of.get(&header.parent) == Some(&(header.depth - 1));
        let local = device.geometry.local_of(header.slot);
        if whole && !parent_there {
            device.report.orphans += 1;
            device.bad.push(local);
        } else if depth_of.insert(header.key, header.depth).is_some() {
            device.report.duplicates += 1;
            device.bad.push(local);
        } else {
            device.report.sound += 1;
        }
    }
}

/// Clears the headers of what is bad, and has the device write that out.
fn repair(device: &mut Device) -> Result<(), FsckError> {
    let io = io(&device.medium, 0);
    let file = device.medium.open(0, Access::Write).map_err(&io)?;
    for local in &device.bad {
        let offset = SECTOR_BYTES + u64::from(*local) * HEADER_BYTES;
        file.write_all_at(&[0; HEADER_BYTES as usize], offset).map_err(&io)?;
        device.report.repaired += 1;
    }
    file.sync().map_err(&io)
}
