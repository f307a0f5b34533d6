//! The files of the SSD tier: made, locked, sized and recognised before the first I/O (DISK.md §1).
//! May block: start-up only.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytemuck::Zeroable;
use kvring_ipc::config::OnMismatch;
use kvring_ipc::layout::Layout;
use rustix::fs::{FallocateFlags, FlockOperation};

use crate::limits::SECTOR_BYTES;
use crate::tier::disk::DiskGeometry;
use crate::tier::header::{MAGIC, Superblock};
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

/// How long the lock of a directory is waited for: two seconds.
const LOCK_TRIES: u32 = 1000;
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(2);

/// One device, ready for I/O.
#[derive(Debug)]
pub struct DeviceFiles {
    /// Opened with O_DIRECT, in the order of the geometry's files.
    pub files: Vec<OwnedFd>,
    /// The file whose headers are to be read, unless it is new.
    pub reused: Option<PathBuf>,
    /// Held for as long as the device is used.
    pub lock: File,
    /// Where it lies.
    pub dir: PathBuf,
}

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
    let too_small = || FilesError::TooSmall { devices: dirs, slot_bytes };
    let per_device = ssd_cache_bytes / dirs as u64;
    let with = |slots: u64| DiskGeometry {
        devices_count: dirs as u32,
        slots_per_device: slots as u32,
        slots_per_file: max_file_bytes
            .map_or(u32::MAX, |bytes| u32::try_from(bytes / slot_bytes).unwrap_or(u32::MAX))
            .min(slots as u32),
        slot_bytes,
    };
    let mut slots = (per_device / slot_bytes).min(crate::limits::SLOTS_MAX / dirs as u64);
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

/// Which of a directory's files this is.
pub fn path_of(dir: &Path, file: u32) -> PathBuf {
    dir.join(if file == 0 { "kvring.cache".to_owned() } else { format!("kvring.cache.{file}") })
}

/// Has every device write out what its cache holds of the headers. Blocks: for the control plane.
///
/// # Errors
/// What the system says of opening or flushing.
pub fn flush_headers(dirs: &[PathBuf]) -> std::io::Result<()> {
    dirs.iter().try_for_each(|dir| File::open(path_of(dir, 0))?.sync_data())
}

/// Opens or makes every device's files. Nothing of another cache is touched before all are locked.
///
/// # Errors
/// [`FilesError`].
pub fn open(
    dirs: &[PathBuf],
    geometry: &DiskGeometry,
    layout: &Layout,
    on_mismatch: OnMismatch,
) -> Result<Vec<DeviceFiles>, FilesError> {
    let locks = dirs.iter().map(|dir| lock(dir, Patience::Wait)).collect::<Result<Vec<_>, _>>()?;
    // Any cache id will do for a new cache; devices that disagree were never one cache.
    let mut cache_id = None;
    let mut devices = Vec::new();
    for ((index, dir), lock) in (0..).zip(dirs).zip(locks) {
        devices.push(open_device(dir, lock, index, geometry, layout, on_mismatch, &mut cache_id)?);
    }
    Ok(devices)
}

/// How long a directory that somebody has is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Two seconds: a server that died lets go of it when its last transfer has ended.
    Wait,
    /// Not at all.
    No,
}

/// Takes a directory for this process.
///
/// # Errors
/// Another server has it, or it cannot be used.
pub fn lock(dir: &Path, patience: Patience) -> Result<File, FilesError> {
    let cannot = |error| FilesError::Directory { dir: dir.display().to_string(), error };
    std::fs::create_dir_all(dir).map_err(cannot)?;
    let path = dir.join("kvring.lock");
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits() as i32;
    let opened = OpenOptions::new().create(true).truncate(false).write(true).custom_flags(flags).open(&path);
    let file = opened.and_then(regular).map_err(cannot)?;
    for _ in 0..if patience == Patience::Wait { LOCK_TRIES } else { 1 } {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if patience == Patience::No => break,
            Err(rustix::io::Errno::WOULDBLOCK) => {
                #[expect(clippy::disallowed_methods, reason = "before there is a shard")]
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(errno) => return Err(cannot(errno.into())),
        }
    }
    Err(FilesError::InUse { file: path_of(dir, 0).display().to_string() })
}

fn superblock(index: u64, geometry: &DiskGeometry, layout: &Layout, cache_id: u64) -> Superblock {
    Superblock {
        magic: MAGIC,
        layout: layout.fingerprint(),
        slot_bytes: geometry.slot_bytes,
        slots_count: u64::from(geometry.slots_per_device),
        slots_per_file: u64::from(geometry.slots_per_file),
        device: index << 32 | u64::from(geometry.devices_count),
        cache_id,
        crc: 0,
    }
}

/// What a cache file begins with, and whether it is taken as it is.
fn look_at(
    first: &Path,
    index: u64,
    geometry: &DiskGeometry,
    layout: &Layout,
    on_mismatch: OnMismatch,
    cache_id: Option<u64>,
) -> Result<(Found, bool), FilesError> {
    let name = first.display().to_string();
    let found = read_superblock(first).map_err(|error| FilesError::Io { file: name.clone(), error })?;
    let reuse = match &found {
        Found::Nothing => false,
        Found::Foreign => mismatch(on_mismatch, &name, "it is no kvring cache of this version")?,
        Found::Super(found) => {
            let expected = superblock(index, geometry, layout, cache_id.unwrap_or(found.cache_id));
            match differs(found, &expected) {
                None => true,
                Some(why) => {
                    let words = read_layout(first).map_or_else(String::new, |theirs| in_words(&theirs, layout));
                    mismatch(on_mismatch, &name, &(why + &words))?
                }
            }
        }
    };
    Ok((found, reuse))
}

/// Whether a directory has room for a device's files, in place of those that are not reused.
fn check_space(dir: &Path, geometry: &DiskGeometry, reuse: bool) -> Result<(), FilesError> {
    let held = |file| {
        let file = std::fs::metadata(path_of(dir, file)).ok()?;
        Some(std::os::unix::fs::MetadataExt::blocks(&file) * 512)
    };
    let reused = |file| if reuse { held(file).unwrap_or(0) } else { 0 };
    let needed = |file| geometry.file_bytes(file).saturating_sub(reused(file));
    let needed: u64 = (0..geometry.files_per_device()).map(needed).sum();
    let freed: u64 = if reuse { 0 } else { (0..).map_while(held).sum() };
    let space = rustix::fs::statvfs(dir)
        .map_err(|errno| FilesError::Directory { dir: dir.display().to_string(), error: errno.into() })?;
    let available = space.f_bavail * space.f_frsize + freed;
    if needed > available {
        let gb = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        return Err(FilesError::NoSpace {
            dir: dir.display().to_string(),
            available_gb: gb(available),
            needed_gb: gb(needed),
        });
    }
    Ok(())
}

/// Whether [`open`] would take what lies there, as far as that can be seen. Changes nothing, and needs no lock.
///
/// # Errors
/// What it would refuse.
pub fn check(
    dirs: &[PathBuf],
    geometry: &DiskGeometry,
    layout: &Layout,
    on_mismatch: OnMismatch,
) -> Result<(), FilesError> {
    // As in `open`: a new one gets an id that no other has.
    let mut cache_id = None;
    for (index, dir) in (0..).zip(dirs) {
        let (found, reuse) = look_at(&path_of(dir, 0), index, geometry, layout, on_mismatch, cache_id)?;
        match found {
            Found::Super(found) if reuse => cache_id = cache_id.or(Some(found.cache_id)),
            _ => cache_id = cache_id.or(Some(0)),
        }
        if dir.is_dir() {
            check_space(dir, geometry, reuse)?;
        }
    }
    Ok(())
}

fn open_device(
    dir: &Path,
    lock: File,
    index: u64,
    geometry: &DiskGeometry,
    layout: &Layout,
    on_mismatch: OnMismatch,
    cache_id: &mut Option<u64>,
) -> Result<DeviceFiles, FilesError> {
    let first = path_of(dir, 0);
    let io = |file: &Path| {
        let file = file.display().to_string();
        move |error| FilesError::Io { file, error }
    };
    let (found, reuse) = look_at(&first, index, geometry, layout, on_mismatch, *cache_id)?;
    // Before anything is removed for it.
    check_space(dir, geometry, reuse)?;
    if !reuse {
        for file in 0.. {
            match std::fs::remove_file(path_of(dir, file)) {
                Ok(()) => {}
                Err(_) => break,
            }
        }
    }
    let mut files = Vec::new();
    for number in 0..geometry.files_per_device() {
        let path = path_of(dir, number);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io(&path))?;
        let bytes = geometry.file_bytes(number);
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => {}
            // Not every file system can: then the file is sparse and a full disk is a write error.
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes).map_err(io(&path))?,
            Err(errno) => return Err(io(&path)(errno.into())),
        }
        let direct = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
            .open(&path);
        let direct = direct.map_err(|error| FilesError::NoDirect { file: path.display().to_string(), error })?;
        let unit = direct_unit(&direct);
        if !geometry.slot_bytes.is_multiple_of(unit) {
            return Err(FilesError::Sector {
                file: path.display().to_string(),
                sector: unit,
                slot_bytes: geometry.slot_bytes,
            });
        }
        files.push(OwnedFd::from(direct));
    }
    match found {
        Found::Super(found) if reuse => *cache_id = Some(cache_id.unwrap_or(found.cache_id)),
        _ => {
            let id = *cache_id.get_or_insert_with(|| kvring_ipc::client::monotonic_ns() | 1);
            let superblock = superblock(index, geometry, layout, id).sealed();
            write_superblock(&first, geometry, &superblock, layout).map_err(io(&first))?;
        }
    }
    let reused = reuse.then_some(first);
    Ok(DeviceFiles { files, reused, lock, dir: dir.to_path_buf() })
}

fn mismatch(on_mismatch: OnMismatch, file: &str, why: &str) -> Result<bool, FilesError> {
    match on_mismatch {
        OnMismatch::Refuse => Err(FilesError::Mismatch { file: file.into(), why: why.into() }),
        OnMismatch::Reset => Ok(false),
    }
}

/// What a cache file begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// No file, or one that was never finished.
    Nothing,
    /// Something else's, another version's, or damaged.
    Foreign,
    /// A superblock.
    Super(Superblock),
}

/// The layout in words: behind the superblock, for people. What is compared is its fingerprint.
const LAYOUT_AT: u64 = 64;

/// What the blocks of a cache file look like, if it says so.
pub fn read_layout(path: &Path) -> Option<Layout> {
    let mut sector = vec![0; SECTOR_BYTES as usize];
    File::open(path).ok()?.read_exact_at(&mut sector, 0).ok()?;
    let text = &sector[LAYOUT_AT as usize..];
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    serde_json::from_slice(&text[..end]).ok()
}

fn in_words(theirs: &Layout, ours: &Layout) -> String {
    let differing = theirs.differences(ours);
    differing.iter().map(|d| format!("; {}: {} there, {} configured", d.field, d.server, d.instance)).collect()
}

/// A pipe or a device that somebody has laid there is no file of ours.
fn regular(file: File) -> std::io::Result<File> {
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")),
    }
}

/// Opens a file to read it, and waits for nobody.
///
/// # Errors
/// What the system says, or that it is no regular file.
pub fn open_to_read(path: &Path) -> std::io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    OpenOptions::new().read(true).custom_flags(flags).open(path).and_then(regular)
}

/// Reads what a cache file begins with.
///
/// # Errors
/// What the system says of opening or reading it.
pub fn read_superblock(path: &Path) -> std::io::Result<Found> {
    let mut file = match open_to_read(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(error),
    };
    let mut superblock = Superblock::zeroed();
    match file.read_exact(bytemuck::bytes_of_mut(&mut superblock)) {
        Ok(()) if superblock == Superblock::zeroed() => Ok(Found::Nothing),
        Ok(()) if superblock.is_sound() => Ok(Found::Super(superblock)),
        Ok(()) => Ok(Found::Foreign),
        // Shorter than a superblock: a start that was cut short.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(Found::Nothing),
        Err(error) => Err(error),
    }
}

fn differs(found: &Superblock, expected: &Superblock) -> Option<String> {
    let fields = [
        ("block bytes", found.slot_bytes, expected.slot_bytes),
        ("layout fingerprint", found.layout, expected.layout),
        ("slots (of ssd_cache_gb)", found.slots_count, expected.slots_count),
        ("slots per file", found.slots_per_file, expected.slots_per_file),
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

/// New files have no headers; those of a new format must not be believed, so zeros are written.
fn write_superblock(
    path: &Path,
    geometry: &DiskGeometry,
    superblock: &Superblock,
    layout: &Layout,
) -> std::io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let zeros = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < geometry.data_offset() {
        let bytes = (geometry.data_offset() - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..bytes as usize], at)?;
        at += bytes;
    }
    let text = serde_json::to_vec(layout)?;
    if text.len() as u64 <= SECTOR_BYTES - LAYOUT_AT {
        file.write_all_at(&text, LAYOUT_AT)?;
    }
    // The superblock last: a start that is cut short leaves zeros, which are nothing.
    file.sync_data()?;
    file.write_all_at(bytemuck::bytes_of(superblock), 0)?;
    file.sync_data()
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
    path: &Path,
    geometry: &DiskGeometry,
    layout: u64,
    device: u32,
    found: impl Fn(HeaderPiece) + Sync,
) -> std::io::Result<()> {
    let file = OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32).open(path)?;
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
