//! The files and block devices of the SSD tier: made, locked, sized and recognised before the first I/O (DISK.md §1).
//! May block: start-up only.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use bytemuck::Zeroable;
use kvring_ipc::config::OnMismatch;
use kvring_ipc::layout::Layout;
use kvring_spdk::SpdkError;
use rustix::fs::FallocateFlags;

use super::medium::{Access, Medium, MediumFile, Patience};
use crate::limits::SECTOR_BYTES;
use crate::tier::disk::DiskGeometry;
use crate::tier::header::{MAGIC, Superblock, header_room};
use crate::tier::piece::HeaderPiece;

/// Why the SSD tier cannot be had, and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages are the documentation")]
pub enum FilesError {
    #[error("ssd_cache_dir {dir}: cannot be used: {error}: make it a directory that this user may write to")]
    Directory { dir: String, error: std::io::Error },
    #[error("{file} is in use by another kvring server: give this one another ssd_cache_dir, or stop the other")]
    InUse { file: String },
    #[error(
        "{device} is in use: a file system on it is mounted, or another kvring server, a RAID or a volume group has it: name a device that nobody uses"
    )]
    Claimed { device: String },
    #[error(
        "{device} holds another program's data ({what}): name another device, or start with --force-format to destroy it"
    )]
    ForeignData { device: String, what: &'static str },
    #[error("{device} has {device_gb:.2} GB, and its part of ssd_cache_gb takes {needed_gb:.2} GB: lower ssd_cache_gb")]
    DeviceTooSmall { device: String, device_gb: f64, needed_gb: f64 },
    #[error("{device} is one file, whatever max_file_size_gb says: leave max_file_size_gb at -1")]
    DeviceInFiles { device: String },
    #[error(
        "ssd_cache_dir {dir} holds {available_gb:.2} GB free and {needed_gb:.2} GB more are needed: lower ssd_cache_gb or free space"
    )]
    NoSpace { dir: String, available_gb: f64, needed_gb: f64 },
    #[error(
        "{file} cannot do direct I/O: {error}: put ssd_cache_dir on a file system with O_DIRECT (ext4, xfs, btrfs)"
    )]
    NoDirect { file: String, error: std::io::Error },
    #[error(
        "{file} does direct I/O in units of {sector} bytes, of which {slot_bytes} is no multiple: choose tokens_per_block so that the block size is"
    )]
    Sector { file: String, sector: u64, slot_bytes: u64 },
    #[error("{file} was made for something else ({why}): remove it, or set ssd_on_mismatch = reset to empty it")]
    Mismatch { file: String, why: String },
    #[error(
        "ssd_cache_gb is too small: a device of {devices} needs room for at least one block of {slot_bytes} bytes and its headers: raise ssd_cache_gb"
    )]
    TooSmall { devices: usize, slot_bytes: u64 },
    #[error("{file}: {error}")]
    Io { file: String, error: std::io::Error },
}

/// One device, ready for I/O.
#[derive(Debug)]
pub struct DeviceFiles {
    /// Opened with O_DIRECT, in the order of the geometry's files.
    pub files: Vec<OwnedFd>,
    /// Whether there are headers to be read.
    pub reused: bool,
    /// Held for as long as the device is used.
    pub lock: Option<File>,
    /// It is gone, and why that is thought.
    pub gone: Option<String>,
    /// What it lies on.
    pub medium: Medium,
}

/// A new cache has room for the headers of so many times its slots: it may grow to that. 0.4 % of its size at 64 KiB a
/// block.
const GROWTH: u64 = 4;

/// How `ssd_cache_gb` becomes slots: what fits it, headers included, the same for each directory.
///
/// # Errors
/// [`FilesError::TooSmall`].
pub fn geometry(
    dirs: usize,
    ssd_cache_bytes: u64,
    slot_bytes: u64,
    max_file_bytes: Option<u64>,
) -> Result<DiskGeometry, FilesError> {
    fitting(dirs, ssd_cache_bytes, slot_bytes, max_file_bytes, None)
}

/// As [`geometry`], where there is room for the headers of so many slots already.
fn fitting(
    dirs: usize,
    ssd_cache_bytes: u64,
    slot_bytes: u64,
    max_file_bytes: Option<u64>,
    header_slots: Option<u32>,
) -> Result<DiskGeometry, FilesError> {
    let too_small = || FilesError::TooSmall { devices: dirs, slot_bytes };
    let per_device = ssd_cache_bytes / dirs as u64;
    let slots_max = crate::limits::SLOTS_MAX / dirs as u64;
    let with = |slots: u64| DiskGeometry {
        devices_count: dirs as u32,
        slots_per_device: slots as u32,
        slots_limit: slots as u32,
        header_slots: header_slots.unwrap_or_else(|| header_room((GROWTH * slots).min(slots_max))),
        slots_per_file: max_file_bytes.map_or(u32::MAX, |bytes| u32::try_from(bytes / slot_bytes).unwrap_or(u32::MAX)),
        slot_bytes,
    };
    let mut slots = (per_device / slot_bytes).min(slots_max);
    // Headers cost 64 bytes a slot: a few slots less than the plain quotient.
    while slots > 0 && with(slots).data_offset() + slots * slot_bytes > per_device.max(slot_bytes + (2 << 20)) {
        slots -= 1.max(slots >> 16);
    }
    let geometry = with(slots);
    if slots == 0 || geometry.slots_per_file == 0 || geometry.files_per_device() > 1024 {
        return Err(too_small());
    }
    Ok(geometry)
}

/// As [`geometry`], for what lies on these media: a cache of another size is taken as it is. It grows, as far as it has
/// room for headers; of one that is larger only a part is used from now on. What is not to be taken [`open`] says.
///
/// # Errors
/// As [`geometry`].
pub fn geometry_on(
    media: &[Medium],
    ssd_cache_bytes: u64,
    max_file_bytes: Option<u64>,
    layout: &Layout,
) -> Result<DiskGeometry, FilesError> {
    let (dirs, slot_bytes) = (media.len(), layout.block_bytes);
    let new = geometry(dirs, ssd_cache_bytes, slot_bytes, max_file_bytes)?;
    let of_ours = |medium: &Medium| match read_superblock(medium) {
        Ok(Found::Super(found)) => Some(found),
        _ => None,
    };
    let is_ours = |found: &Superblock| {
        let alike = found.layout == layout.fingerprint() && found.slot_bytes == slot_bytes;
        alike && found.device as u32 == dirs as u32
    };
    let found: Vec<Superblock> = media.iter().filter_map(of_ours).filter(is_ours).collect();
    let Some(header_slots) = found.first().map(Superblock::header_slots) else { return Ok(new) };
    let fits = fitting(dirs, ssd_cache_bytes, slot_bytes, max_file_bytes, Some(header_slots))?;
    let slots = found.iter().map(Superblock::slots_count).fold(fits.slots_per_device, u32::max);
    let is_too_many = slots > header_slots || u64::from(slots) * dirs as u64 > crate::limits::SLOTS_MAX;
    Ok(if is_too_many { new } else { DiskGeometry { slots_per_device: slots, ..fits } })
}

/// Gives the place of a slot that is not used any more back to the file system. Of a block device nothing is given back.
///
/// # Errors
/// What the system says.
pub fn give_back(file: &File, offset: u64, bytes: u64) -> std::io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, hole, offset, bytes)?)
}

/// Makes the files of a cache that grows as long as they will be, while another process uses what there is.
///
/// # Errors
/// What the system says.
pub fn grow_ahead(media: &[Medium], geometry: &DiskGeometry) -> Result<(), FilesError> {
    // One that is there and has holes is as long as it will be.
    let to_grow = media.iter().filter(|medium| !medium.is_whole_device() && medium.path_of(0).exists());
    to_grow.filter(|_| geometry.surplus() == 0).try_for_each(|medium| make_files(medium, geometry, true))
}

/// Has every device write out what its cache holds of the headers. Blocks: for the control plane.
///
/// # Errors
/// What the system says of opening or flushing.
pub fn flush_headers(media: &[Medium]) -> std::io::Result<()> {
    media.iter().try_for_each(|medium| medium.open(0, Access::Read)?.sync())
}

/// Opens or makes every device's files. Nothing of another cache is touched before all are locked.
///
/// # Errors
/// [`FilesError`].
pub fn open(
    media: &[Medium],
    geometry: &DiskGeometry,
    layout: &Layout,
    on_mismatch: OnMismatch,
) -> Result<Vec<DeviceFiles>, FilesError> {
    let locks: Vec<Result<File, FilesError>> = media.iter().map(|medium| medium.lock(Patience::Wait)).collect();
    let taken =
        locks.iter().zip(media).find(|(lock, medium)| lock.as_ref().is_err_and(|error| !is_gone(medium, error)));
    if taken.is_some() {
        // The first of them says why.
        locks.into_iter().collect::<Result<Vec<_>, _>>()?;
        return Ok(Vec::new());
    }
    // Any cache id will do for a new cache; devices that disagree were never one cache.
    let mut cache_id = None;
    let opened: Vec<Result<DeviceFiles, FilesError>> = (0..)
        .zip(media)
        .zip(locks)
        .map(|((index, medium), lock)| open_device(medium, lock?, index, geometry, layout, on_mismatch, &mut cache_id))
        .collect();
    // A cache that is there goes on without a device of it; a new one is made of all that was named.
    let is_known = opened.iter().flatten().any(|device| device.reused);
    let without = |(opened, medium): (Result<DeviceFiles, FilesError>, &Medium)| match opened {
        Err(error) if is_known && is_gone(medium, &error) => {
            let (gone, medium) = (Some(error.to_string()), medium.clone());
            Ok(DeviceFiles { files: Vec::new(), reused: false, lock: None, gone, medium })
        }
        opened => opened,
    };
    opened.into_iter().zip(media).map(without).collect()
}

/// Whether an error says that a block device is not there any more, or answers nothing.
fn is_gone(medium: &Medium, error: &FilesError) -> bool {
    use rustix::io::Errno;
    let (FilesError::Directory { error, .. } | FilesError::Io { error, .. } | FilesError::NoDirect { error, .. }) =
        error
    else {
        return false;
    };
    let errno = Errno::from_io_error(error);
    let gone = [Errno::NOENT, Errno::NXIO, Errno::NODEV, Errno::IO, Errno::NOMEDIUM, Errno::CANCELED, Errno::TIMEDOUT]
        .map(Some);
    let spdk_error = error.get_ref().and_then(|inner| inner.downcast_ref::<SpdkError>());
    let by_spdk = spdk_error.is_some_and(|error| matches!(error, SpdkError::Connect { .. } | SpdkError::Io { .. }));
    medium.is_whole_device() && (gone.contains(&errno) || by_spdk)
}

fn superblock(index: u64, geometry: &DiskGeometry, layout: &Layout, cache_id: u64) -> Superblock {
    Superblock {
        magic: MAGIC,
        layout: layout.fingerprint(),
        slot_bytes: geometry.slot_bytes,
        slots: u64::from(geometry.header_slots) << 32 | u64::from(geometry.slots_per_device),
        slots_per_file: u64::from(geometry.slots_per_file.min(geometry.slots_per_device)),
        device: index << 32 | u64::from(geometry.devices_count),
        cache_id,
        crc: 0,
    }
}

/// What a medium begins with, and whether it is taken as it is.
fn look_at(
    medium: &Medium,
    index: u64,
    geometry: &DiskGeometry,
    layout: &Layout,
    on_mismatch: OnMismatch,
    cache_id: Option<u64>,
) -> Result<(Found, bool), FilesError> {
    let name = medium.name();
    let found = read_superblock(medium).map_err(|error| FilesError::Io { file: name.clone(), error })?;
    let reuse = match &found {
        Found::Nothing => false,
        Found::Foreign(what) if medium.is_whole_device() => match on_mismatch {
            OnMismatch::Format => false,
            OnMismatch::Refuse | OnMismatch::Reset => {
                return Err(FilesError::ForeignData { device: name, what });
            }
        },
        Found::Foreign(what) => mismatch(on_mismatch, &name, &format!("it holds {what}"))?,
        Found::OtherVersion => mismatch(on_mismatch, &name, "it is no kvring cache of this version")?,
        Found::Super(found) => {
            let expected = superblock(index, geometry, layout, cache_id.unwrap_or(found.cache_id));
            match differs(found, &expected) {
                None => true,
                Some(why) => {
                    let words = read_layout(medium).map_or_else(String::new, |theirs| in_words(&theirs, layout));
                    mismatch(on_mismatch, &name, &(why + &words))?
                }
            }
        }
    };
    Ok((found, reuse))
}

const GB: f64 = (1u64 << 30) as f64;

/// Whether a block device is as large as what is to lie on it.
fn check_size(medium: &Medium, geometry: &DiskGeometry) -> Result<(), FilesError> {
    let device = medium.name();
    if geometry.files_per_device() > 1 {
        return Err(FilesError::DeviceInFiles { device });
    }
    let bytes = medium.device_bytes().map_err(|error| FilesError::Io { file: device.clone(), error })?;
    let needed = geometry.file_bytes(0);
    if needed > bytes {
        return Err(FilesError::DeviceTooSmall { device, device_gb: bytes as f64 / GB, needed_gb: needed as f64 / GB });
    }
    Ok(())
}

/// Whether a directory has room for a device's files, in place of those that are not reused; or a device is as large.
fn check_space(medium: &Medium, geometry: &DiskGeometry, reuse: bool) -> Result<(), FilesError> {
    if medium.is_whole_device() {
        return check_size(medium, geometry);
    }
    let dir = medium.path();
    let held = |file| {
        let file = std::fs::metadata(medium.path_of(file)).ok()?;
        Some(std::os::unix::fs::MetadataExt::blocks(&file) * 512)
    };
    let reused = |file| if reuse { held(file).unwrap_or(0) } else { 0 };
    let files = 0..geometry.files_per_device();
    // What is not used has no place, or is about to lose it.
    let unused = geometry.surplus() as u64 * geometry.slot_bytes;
    let needed: u64 = files.clone().map(|file| geometry.file_bytes(file)).sum::<u64>() - unused;
    let needed = needed.saturating_sub(files.map(reused).sum());
    let freed: u64 = if reuse { 0 } else { (0..).map_while(held).sum() };
    let space = rustix::fs::statvfs(dir)
        .map_err(|errno| FilesError::Directory { dir: dir.display().to_string(), error: errno.into() })?;
    let available = space.f_bavail * space.f_frsize + freed;
    if needed > available {
        return Err(FilesError::NoSpace {
            dir: dir.display().to_string(),
            available_gb: available as f64 / GB,
            needed_gb: needed as f64 / GB,
        });
    }
    Ok(())
}

/// Whether [`open`] would take what lies there, as far as that can be seen. Changes nothing, and needs no lock.
///
/// # Errors
/// What it would refuse.
pub fn check(
    media: &[Medium],
    geometry: &DiskGeometry,
    layout: &Layout,
    on_mismatch: OnMismatch,
) -> Result<(), FilesError> {
    // As in `open`: a new one gets an id that no other has.
    let mut cache_id = None;
    let (mut gone, mut is_known) = (None, false);
    for (index, medium) in (0..).zip(media) {
        let (found, reuse) = match look_at(medium, index, geometry, layout, on_mismatch, cache_id) {
            Err(error) if is_gone(medium, &error) => {
                gone = Some(error);
                continue;
            }
            looked => looked?,
        };
        is_known |= reuse;
        match found {
            Found::Super(found) if reuse => cache_id = cache_id.or(Some(found.cache_id)),
            _ => cache_id = cache_id.or(Some(0)),
        }
        if medium.path().exists() {
            check_space(medium, geometry, reuse)?;
        }
    }
    gone.filter(|_| !is_known).map_or(Ok(()), Err)
}

fn open_device(
    medium: &Medium,
    lock: File,
    index: u64,
    geometry: &DiskGeometry,
    layout: &Layout,
    on_mismatch: OnMismatch,
    cache_id: &mut Option<u64>,
) -> Result<DeviceFiles, FilesError> {
    let (found, reuse) = look_at(medium, index, geometry, layout, on_mismatch, *cache_id)?;
    // Before anything is removed for it.
    check_space(medium, geometry, reuse)?;
    if !medium.is_whole_device() {
        make_files(medium, geometry, reuse)?;
    }
    let mut files = Vec::new();
    // What SPDK drives has no file.
    let files_count = if medium.address().is_some() { 0 } else { geometry.files_per_device() };
    for number in 0..files_count {
        let name = medium.path_of(number).display().to_string();
        let direct = medium.open_for_io(number);
        let direct = direct.map_err(|error| FilesError::NoDirect { file: name.clone(), error })?;
        let unit = direct_unit(&direct);
        if !geometry.slot_bytes.is_multiple_of(unit) || !SECTOR_BYTES.is_multiple_of(unit) {
            return Err(FilesError::Sector { file: name, sector: unit, slot_bytes: geometry.slot_bytes });
        }
        files.push(OwnedFd::from(direct));
    }
    match found {
        Found::Super(found) if reuse => {
            *cache_id = Some(cache_id.unwrap_or(found.cache_id));
            if found.slots_count() < geometry.slots_per_device {
                tracing::info!(
                    "{} grows from {} to {} blocks",
                    medium.name(),
                    found.slots_count(),
                    geometry.slots_per_device
                );
                let grown = superblock(index, geometry, layout, found.cache_id).sealed();
                // Its files have their size, and the headers of the new slots are zeros since it was made.
                grow_superblock(medium, &grown).map_err(|error| FilesError::Io { file: medium.name(), error })?;
            }
        }
        _ => {
            let id = *cache_id.get_or_insert_with(|| kvring_ipc::client::monotonic_ns() | 1);
            let superblock = superblock(index, geometry, layout, id).sealed();
            write_superblock(medium, geometry, &superblock, layout)
                .map_err(|error| FilesError::Io { file: medium.name(), error })?;
        }
    }
    Ok(DeviceFiles { files, reused: reuse, lock: Some(lock), gone: None, medium: medium.clone() })
}

/// Files of their size in a directory; those of another cache go.
fn make_files(medium: &Medium, geometry: &DiskGeometry, reuse: bool) -> Result<(), FilesError> {
    if !reuse {
        for file in 0.. {
            match std::fs::remove_file(medium.path_of(file)) {
                Ok(()) => {}
                Err(_) => break,
            }
        }
    }
    for number in 0..geometry.files_per_device() {
        let path = medium.path_of(number);
        let io = |error| FilesError::Io { file: path.display().to_string(), error };
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).read(true).write(true).mode(0o600);
        let file = options.open(&path).map_err(io)?;
        let bytes = geometry.file_bytes(number);
        if reuse && geometry.surplus() > 0 && file.metadata().map_err(io)?.len() >= bytes {
            // What is not used has no place there.
            continue;
        }
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => {}
            // Not every file system can: then the file is sparse and a full disk is a write error.
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes).map_err(io)?,
            Err(errno) => return Err(io(errno.into())),
        }
    }
    Ok(())
}

fn mismatch(on_mismatch: OnMismatch, file: &str, why: &str) -> Result<bool, FilesError> {
    match on_mismatch {
        OnMismatch::Refuse => Err(FilesError::Mismatch { file: file.into(), why: why.into() }),
        OnMismatch::Reset | OnMismatch::Format => Ok(false),
    }
}

/// What a medium begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// No file, one that was never finished, or a device that nobody has written.
    Nothing,
    /// Something else's, or damaged.
    Foreign(&'static str),
    /// A kvring cache of another version.
    OtherVersion,
    /// A superblock.
    Super(Superblock),
}

/// The layout in words: behind the superblock, for people. What is compared is its fingerprint.
const LAYOUT_AT: u64 = 64;

/// What the blocks of a cache look like, if it says so.
pub fn read_layout(medium: &Medium) -> Option<Layout> {
    let mut sector = vec![0; SECTOR_BYTES as usize];
    medium.open(0, Access::Read).ok()?.read_exact_at(&mut sector, 0).ok()?;
    let text = &sector[LAYOUT_AT as usize..];
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    serde_json::from_slice(&text[..end]).ok()
}

fn in_words(theirs: &Layout, ours: &Layout) -> String {
    let differing = theirs.differences(ours);
    differing.iter().map(|d| format!("; {}: {} there, {} configured", d.field, d.server, d.instance)).collect()
}

/// Reads what a medium begins with.
///
/// # Errors
/// What the system says of opening or reading it.
pub fn read_superblock(medium: &Medium) -> std::io::Result<Found> {
    let file = match medium.open(0, Access::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !medium.is_whole_device() => {
            return Ok(Found::Nothing);
        }
        Err(error) => return Err(error),
    };
    let mut superblock = Superblock::zeroed();
    match file.read_exact_at(bytemuck::bytes_of_mut(&mut superblock), 0) {
        Ok(()) if superblock.is_sound() => Ok(Found::Super(superblock)),
        Ok(()) if superblock.magic.to_le_bytes().starts_with(b"KVRING") => Ok(Found::OtherVersion),
        Ok(()) if medium.is_whole_device() => whose(medium, &file),
        Ok(()) if superblock == Superblock::zeroed() => Ok(Found::Nothing),
        Ok(()) => Ok(Found::Foreign("something that no kvring has written")),
        // Shorter than a superblock: a start that was cut short.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(Found::Nothing),
        Err(error) => Err(error),
    }
}

/// At each end of a device so much is looked at: what others write there to find it again lies in less.
const ENDS_BYTES: u64 = 1 << 20;

/// Where others leave their mark, and what it looks like.
const MARKS: [(usize, &[u8], &str); 8] = [
    (1080, &[0x53, 0xef], "an ext2, ext3 or ext4 file system"),
    (0, b"XFSB", "an XFS file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (512, b"LABELONE", "an LVM volume"),
    (4086, b"SWAPSPACE2", "swap space"),
    (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
    (512, b"EFI PART", "a partition table (GPT)"),
    (510, &[0x55, 0xaa], "a partition table or a boot sector"),
];

/// Whose data a device holds that begins with no superblock. Nobody's are zeros, or ones where it was erased.
fn whose(medium: &Medium, file: &MediumFile) -> std::io::Result<Found> {
    let bytes = medium.device_bytes()?;
    let mut end = vec![0; ENDS_BYTES.min(bytes) as usize];
    for at in [0, bytes - end.len() as u64] {
        file.read_exact_at(&mut end, at)?;
        let erased = |byte: u8| end.iter().all(|other| *other == byte);
        if erased(0) || erased(0xff) {
            continue;
        }
        let mark = MARKS.iter().find(|(at, mark, _)| end.get(*at..).is_some_and(|rest| rest.starts_with(mark)));
        return Ok(Found::Foreign(mark.map_or("bytes that no kvring has written", |(.., what)| what)));
    }
    Ok(Found::Nothing)
}

fn differs(found: &Superblock, expected: &Superblock) -> Option<String> {
    if found.slot_bytes == expected.slot_bytes && found.layout == expected.layout && found.slots != expected.slots {
        // What lies there is taken as it is, or made larger.
        let is_room = found.header_slots() == expected.header_slots();
        if !is_room || found.slots_count() > expected.slots_count() {
            let gb = |slots: u32| u64::from(slots) as f64 * found.slot_bytes as f64 / GB;
            return Some(format!(
                "ssd_cache_gb: it can grow to {:.2} GB a directory, for whose blocks it has room for headers, and {:.2} GB are configured",
                gb(found.header_slots()),
                gb(expected.slots_count())
            ));
        }
    }
    // Where the blocks lie that are there.
    let per_file = |superblock: &Superblock| superblock.slots_per_file.min(u64::from(found.slots_count()));
    let fields = [
        ("block bytes", found.slot_bytes, expected.slot_bytes),
        ("layout fingerprint", found.layout, expected.layout),
        ("slots per file (max_file_size_gb)", per_file(found), per_file(expected)),
        ("device index and count", found.device, expected.device),
        ("cache id", found.cache_id, expected.cache_id),
    ];
    let (name, found, expected) = fields.into_iter().find(|(_, found, expected)| found != expected)?;
    if name == "device index and count" {
        let place = |device: u64| format!("directory {} of {}", (device >> 32) + 1, device as u32);
        return Some(format!(
            "{} there, {} configured: restore ssd_cache_dir and its order",
            place(found),
            place(expected)
        ));
    }
    Some(format!("{name} {found} there, {expected} configured"))
}

fn grow_superblock(medium: &Medium, superblock: &Superblock) -> std::io::Result<()> {
    let file = medium.open(0, Access::Write)?;
    // Its words lie in one sector: power leaves the old ones or the new.
    file.write_all_at(bytemuck::bytes_of(superblock), 0)?;
    file.sync()
}

/// New files have no headers; those of a new format must not be believed, so zeros are written.
fn write_superblock(
    medium: &Medium,
    geometry: &DiskGeometry,
    superblock: &Superblock,
    layout: &Layout,
) -> std::io::Result<()> {
    let file = medium.open(0, Access::Write)?;
    let zeros = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < geometry.data_offset() {
        let bytes = (geometry.data_offset() - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..bytes as usize], at)?;
        at += bytes;
    }
    if medium.is_whole_device() {
        // Else a RAID or a partition table that lay there would be found again at the other end.
        let bytes = medium.device_bytes()?;
        let end = geometry.file_bytes(0).max(bytes.saturating_sub(zeros.len() as u64));
        file.write_all_at(&zeros[..(bytes - end) as usize], end)?;
    }
    let text = serde_json::to_vec(layout)?;
    if text.len() as u64 <= SECTOR_BYTES - LAYOUT_AT {
        file.write_all_at(&text, LAYOUT_AT)?;
    }
    // The superblock last: a start that is cut short leaves zeros, which are nothing.
    file.sync()?;
    file.write_all_at(bytemuck::bytes_of(superblock), 0)?;
    file.sync()
}

/// Sectors of headers read at once: 65,536 headers, 4 MiB.
const READ_SECTORS: u64 = 1024;
/// Readers of one header zone: enough to keep a device busy.
const READERS: usize = 4;
/// Pieces that are being read, or were and are being used: readers wait for those who use them.
const PIECES: usize = 2 * READERS;

/// Reads a file's header zone, several pieces at a time and past the page cache; `found` is given each piece.
/// Blocks, for as long as reading 64 bytes a slot takes, and until pieces come back.
///
/// # Errors
/// What the system says.
pub fn read_headers(
    medium: &Medium,
    geometry: &DiskGeometry,
    layout: u64,
    device: u32,
    found: impl Fn(HeaderPiece) + Sync,
) -> std::io::Result<()> {
    let file = medium.open(0, Access::ReadDirect)?;
    let sectors = geometry.header_sectors();
    let next = std::sync::atomic::AtomicU64::new(0);
    let (home, memories) = crossbeam_channel::unbounded();
    for _ in 0..PIECES {
        let _ = home.send(Vec::new());
    }
    let reader = || -> std::io::Result<()> {
        loop {
            let first = next.fetch_add(READ_SECTORS, std::sync::atomic::Ordering::Relaxed);
            let Some(count) = sectors.checked_sub(first).filter(|left| *left > 0) else { return Ok(()) };
            // As long as `home` is here, somebody may send.
            let mut memory: Vec<u8> = memories.recv().map_err(std::io::Error::other)?;
            // O_DIRECT wants aligned memory: a part of a larger piece is.
            let bytes = (READ_SECTORS.min(count) * SECTOR_BYTES) as usize;
            memory.resize(bytes + SECTOR_BYTES as usize, 0);
            let skip = memory.as_ptr().align_offset(SECTOR_BYTES as usize);
            memory.truncate(skip + bytes);
            file.read_exact_at(&mut memory[skip..], (1 + first) * SECTOR_BYTES)?;
            let mut piece = HeaderPiece::parse(geometry, layout, device, first as u32, memory, skip);
            piece.return_to(home.clone());
            found(piece);
        }
    };
    std::thread::scope(|scope| {
        // This thread is one of them: where no other is to be had, it is all.
        let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, reader).ok();
        let others: Vec<_> = (1..READERS).filter_map(spawn).collect();
        let panicked = |_| Err(std::io::Error::other("a reader panicked"));
        let own = reader();
        others.into_iter().map(|other| other.join().unwrap_or_else(panicked)).fold(own, Result::and)
    })
}

/// The unit of direct I/O (statx, STATX_DIOALIGN, Linux 6.1); a sector where it is not told.
pub fn direct_unit(file: &File) -> u64 {
    use rustix::fs::{AtFlags, StatxFlags};
    // STATX_DIOALIGN of linux/stat.h, newer than rustix's table.
    let mask = StatxFlags::from_bits_retain(0x2000);
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, mask).ok();
    let unit = told.map_or(0, |statx| u64::from(statx.stx_dio_offset_align));
    if unit == 0 { SECTOR_BYTES } else { unit }
}
