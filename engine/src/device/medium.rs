//! What a device of the SSD tier lies on, as the control plane sees it: a directory of files, a block device that holds
//! nothing else, or a namespace that SPDK drives. May block: never a shard's.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::files::FilesError;
use super::spdk::{self, Blocking};
use crate::limits::SECTOR_BYTES;

/// An entry of `ssd_cache_dir`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Medium {
    /// A directory, which need not be there yet: the cache is some files in it.
    Directory(PathBuf),
    /// A block device: the cache is all of it, from its first sector on.
    BlockDevice(PathBuf),
    /// An NVMe namespace by its address in SPDK's words: as a block device, without the kernel.
    Spdk(PathBuf),
}

/// How long a medium that somebody has is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Two seconds: a server that died lets go of it when its last transfer has ended.
    Wait,
    /// Not at all.
    No,
}

/// How one of a medium's files is to be read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read, through the page cache where that is coherent with what the server writes.
    Read,
    /// Read, past the page cache.
    ReadDirect,
    /// Read and write, as [`Access::Read`].
    Write,
}

const LOCK_TRIES: u32 = 1000;
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(2);

impl Medium {
    /// What a path names.
    ///
    /// # Errors
    /// Something that no cache can lie on.
    pub fn of(path: &Path) -> Result<Self, FilesError> {
        if path.to_str().is_some_and(|text| text.starts_with(spdk::PREFIX)) {
            return Ok(Self::Spdk(path.to_path_buf()));
        }
        let Ok(metadata) = std::fs::metadata(path) else {
            // What is to be in /dev is a device that is gone, and not a directory to be made there.
            let is_device = path.starts_with("/dev") && !path.starts_with("/dev/shm");
            let path = path.to_path_buf();
            return Ok(if is_device { Self::BlockDevice(path) } else { Self::Directory(path) });
        };
        let kind = metadata.file_type();
        if kind.is_block_device() {
            return Ok(Self::BlockDevice(path.to_path_buf()));
        }
        if !kind.is_char_device() {
            return Ok(Self::Directory(path.to_path_buf()));
        }
        // /dev/ngXnY is the other face of /dev/nvmeXnY, which has a size, a lock and a flush.
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let sibling = name.strip_prefix("ng").map(|rest| path.with_file_name(format!("nvme{rest}")));
        match sibling.filter(|path| is_block_device(path)) {
            Some(path) => Ok(Self::BlockDevice(path)),
            None => Err(FilesError::Directory {
                dir: path.display().to_string(),
                error: std::io::Error::new(
                    std::io::ErrorKind::InvalidInput,
                    "a character device that belongs to no NVMe namespace",
                ),
            }),
        }
    }

    /// All of them, in their order.
    ///
    /// # Errors
    /// The first that is none.
    pub fn all(paths: &[PathBuf]) -> Result<Vec<Self>, FilesError> {
        paths.iter().map(|path| Self::of(path)).collect()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::BlockDevice(path) | Self::Spdk(path) => path,
        }
    }

    /// Which of its files this is.
    pub fn path_of(&self, file: u32) -> PathBuf {
        match self {
            Self::Directory(dir) => {
                dir.join(if file == 0 { "kvring.cache".to_owned() } else { format!("kvring.cache.{file}") })
            }
            Self::BlockDevice(path) | Self::Spdk(path) => path.clone(),
        }
    }

    /// Where SPDK finds it.
    pub fn address(&self) -> Option<&str> {
        match self {
            Self::Spdk(path) => path.to_str(),
            Self::Directory(_) | Self::BlockDevice(_) => None,
        }
    }

    /// For messages: its first file.
    pub fn name(&self) -> String {
        self.path_of(0).display().to_string()
    }

    /// Whether all of it is the cache's.
    pub fn is_whole_device(&self) -> bool {
        matches!(self, Self::BlockDevice(_) | Self::Spdk(_))
    }

    /// Opens one of its files, and waits for nobody.
    ///
    /// # Errors
    /// What the system says, or that it is no file of ours.
    pub fn open(&self, file: u32, access: Access) -> std::io::Result<MediumFile> {
        if let Some(address) = self.address() {
            let opened = Blocking::open(address).map_err(std::io::Error::other)?;
            return Ok(MediumFile { file: Opened::Spdk(Box::new(opened)), direct: true });
        }
        // What the server writes past the page cache of a block device, its page cache does not know.
        let direct = self.is_whole_device() || access == Access::ReadDirect;
        let flags = if direct { OFlags::NONBLOCK | OFlags::DIRECT } else { OFlags::NONBLOCK };
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::Write).custom_flags(flags.bits() as i32);
        let file = options.open(self.path_of(file))?;
        let file = if self.is_whole_device() { file } else { regular(file)? };
        Ok(MediumFile { file: Opened::File(file), direct })
    }

    /// Opens one of its files for the data path: O_DIRECT, to read and write.
    ///
    /// # Errors
    /// What the system says.
    pub fn open_for_io(&self, file: u32) -> std::io::Result<File> {
        let direct = OFlags::DIRECT.bits() as i32;
        OpenOptions::new().read(true).write(true).custom_flags(direct).open(self.path_of(file))
    }

    /// Takes it for this process.
    ///
    /// # Errors
    /// Another has it, or it cannot be used.
    pub fn lock(&self, patience: Patience) -> Result<File, FilesError> {
        let cannot = |error| FilesError::Directory { dir: self.path().display().to_string(), error };
        let tries = if patience == Patience::Wait { LOCK_TRIES } else { 1 };
        match self {
            Self::Directory(dir) => {
                std::fs::create_dir_all(dir).map_err(cannot)?;
                let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
                let mut options = OpenOptions::new();
                options.create(true).truncate(false).write(true).custom_flags(flags);
                let file = options.open(dir.join("kvring.lock")).and_then(regular).map_err(cannot)?;
                again_while_taken(tries, Errno::WOULDBLOCK, || {
                    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
                })
                .map_err(|errno| self.not_locked(errno))?;
                Ok(file)
            }
            // Of this machine's servers one: a file where nobody else may write. What other machines do at the address is
            // theirs to agree on.
            Self::Spdk(path) => {
                let dir = lock_dir().map_err(cannot)?;
                let address = kvring_spdk::normalised(path.to_str().unwrap_or_default());
                let name = format!("spdk-{:016x}.lock", crate::checksum::of_bytes(address.as_bytes()));
                let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
                let mut options = OpenOptions::new();
                options.create(true).truncate(false).write(true).mode(0o600).custom_flags(flags);
                let file = options.open(dir.join(name)).and_then(regular).map_err(cannot)?;
                again_while_taken(tries, Errno::WOULDBLOCK, || {
                    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
                })
                .map_err(|errno| self.not_locked(errno))?;
                Ok(file)
            }
            // The kernel's own claim (O_EXCL of a block device): no file system, no RAID and no other server has it, or
            // gets it while we do.
            Self::BlockDevice(path) => {
                let flags = OFlags::RDWR | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let open = || rustix::fs::open(path, flags, rustix::fs::Mode::empty());
                let file: OwnedFd =
                    again_while_taken(tries, Errno::BUSY, open).map_err(|errno| self.not_locked(errno))?;
                Ok(File::from(file))
            }
        }
    }

    fn not_locked(&self, errno: Errno) -> FilesError {
        match (self, errno) {
            (Self::Directory(_), Errno::WOULDBLOCK) => FilesError::InUse { file: self.name() },
            (Self::Spdk(_), Errno::WOULDBLOCK) => FilesError::InUse { file: self.name() },
            (Self::BlockDevice(_), Errno::BUSY) => FilesError::Claimed { device: self.name() },
            (_, errno) => FilesError::Directory { dir: self.path().display().to_string(), error: errno.into() },
        }
    }

    /// Bytes of a block device, in whole sectors.
    ///
    /// # Errors
    /// What the system says.
    pub fn device_bytes(&self) -> std::io::Result<u64> {
        use std::io::{Seek, SeekFrom};
        if let Some(address) = self.address() {
            let bytes = spdk::controller(address).map_err(std::io::Error::other)?.namespace().bytes;
            return Ok(bytes - bytes % SECTOR_BYTES);
        }
        let bytes = File::open(self.path())?.seek(SeekFrom::End(0))?;
        // One that has died may have lost its size.
        if bytes == 0 { Err(Errno::NXIO.into()) } else { Ok(bytes - bytes % SECTOR_BYTES) }
    }

    /// Where sysfs tells of the queue of the block device that it lies on, if there is one.
    pub fn queue(&self) -> Option<PathBuf> {
        let metadata = std::fs::metadata(self.path()).ok()?;
        let number = if self.is_whole_device() { metadata.rdev() } else { metadata.dev() };
        let device = format!("/sys/dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        // A partition has its disk's.
        let places = [format!("{device}/queue"), format!("{device}/../queue")];
        places.into_iter().map(PathBuf::from).find(|place| place.is_dir())
    }
}

/// Where locks of things without a file lie: root's in /run, another user's in a directory of his own.
fn lock_dir() -> std::io::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let uid = rustix::process::geteuid();
    let dir = if uid.is_root() { "/run/kvring".into() } else { PathBuf::from(format!("/tmp/kvring-{}", uid.as_raw())) };
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = std::fs::symlink_metadata(&dir)?;
    let ours = found.is_dir() && found.uid() == uid.as_raw() && found.mode() & 0o022 == 0;
    if ours { Ok(dir) } else { Err(std::io::Error::other(format!("{} is not this user's alone", dir.display()))) }
}

fn again_while_taken<T>(tries: u32, taken: Errno, mut take: impl FnMut() -> rustix::io::Result<T>) -> Result<T, Errno> {
    let mut result = take();
    for _ in 1..tries {
        if !matches!(&result, Err(errno) if *errno == taken) {
            break;
        }
        #[expect(clippy::disallowed_methods, reason = "before there is a shard")]
        std::thread::sleep(LOCK_PAUSE);
        result = take();
    }
    result
}

fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// A pipe or a device that somebody has laid there is no file of ours.
fn regular(file: File) -> std::io::Result<File> {
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")),
    }
}

/// One open file of a medium. Any offset, any length: what direct I/O wants otherwise is made so.
#[derive(Debug)]
pub struct MediumFile {
    file: Opened,
    direct: bool,
}

#[derive(Debug)]
enum Opened {
    File(File),
    Spdk(Box<Blocking>),
}

impl Opened {
    fn read(&self, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(bytes, at),
            Self::Spdk(namespace) => namespace.read(bytes, at),
        }
    }
    fn write(&self, bytes: &[u8], at: u64) -> std::io::Result<()> {
        match self {
            Self::File(file) => file.write_all_at(bytes, at),
            Self::Spdk(namespace) => namespace.write(bytes, at),
        }
    }
}

/// Memory that direct I/O takes, and at once at most so much.
const BOUNCE_BYTES: usize = 1 << 20;

/// Sectors on a sector's boundary.
struct Bounce {
    memory: Vec<u8>,
    skip: usize,
}

impl Bounce {
    fn new(bytes: usize) -> Self {
        let memory = vec![0; bytes + SECTOR_BYTES as usize];
        let skip = memory.as_ptr().align_offset(SECTOR_BYTES as usize);
        Self { memory, skip }
    }
    fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        &mut self.memory[self.skip..self.skip + bytes]
    }
}

impl MediumFile {
    /// Fills `bytes` with what lies at `at`.
    ///
    /// # Errors
    /// What the system says, or that the file ends before.
    pub fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
        let aligned = (bytes.as_ptr().addr() as u64 | bytes.len() as u64 | at).is_multiple_of(SECTOR_BYTES);
        if !self.direct || aligned {
            return self.file.read(bytes, at);
        }
        self.in_sectors(bytes.len(), at, |sectors, from, part| {
            self.file.read(sectors, from)?;
            let skip = (at + part.start as u64 - from) as usize;
            let length = part.len();
            bytes[part].copy_from_slice(&sectors[skip..skip + length]);
            Ok(())
        })
    }

    /// Writes `bytes` at `at`; of sectors that are written in part, the rest stays.
    ///
    /// # Errors
    /// What the system says.
    pub fn write_all_at(&self, bytes: &[u8], at: u64) -> std::io::Result<()> {
        if !self.direct {
            return self.file.write(bytes, at);
        }
        self.in_sectors(bytes.len(), at, |sectors, from, part| {
            self.file.read(sectors, from)?;
            let skip = (at + part.start as u64 - from) as usize;
            sectors[skip..skip + part.len()].copy_from_slice(&bytes[part]);
            self.file.write(sectors, from)
        })
    }

    /// Hands `each` the whole sectors around some bytes, piece by piece: memory for them, where they begin, and which
    /// part of the bytes lies there.
    fn in_sectors(
        &self,
        length: usize,
        at: u64,
        mut each: impl FnMut(&mut [u8], u64, std::ops::Range<usize>) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let mut bounce = Bounce::new(BOUNCE_BYTES.min((length as u64 + 2 * SECTOR_BYTES) as usize));
        let room = (bounce.memory.len() as u64 - SECTOR_BYTES) / SECTOR_BYTES * SECTOR_BYTES;
        let mut done = 0;
        while done < length {
            let begin = at + done as u64;
            let from = begin - begin % SECTOR_BYTES;
            let end = (from + room).min((at + length as u64).next_multiple_of(SECTOR_BYTES));
            let part = done..length.min((end - at) as usize);
            each(bounce.bytes((end - from) as usize), from, part.clone())?;
            done = part.end;
        }
        Ok(())
    }

    /// Has the device write out what its cache holds.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> std::io::Result<()> {
        match &self.file {
            Opened::File(file) => file.sync_data(),
            Opened::Spdk(namespace) => namespace.sync(),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// Direct I/O of odd places is what buffered I/O of them is.
    #[test]
    fn odd_places_are_read_and_written_in_whole_sectors() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("file");
        let mut expected: Vec<u8> = (0..3u32 << 20).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
        std::fs::write(&path, &expected).unwrap();
        let flags = OFlags::DIRECT.bits() as i32;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path).unwrap();
        let direct = MediumFile { file: Opened::File(file), direct: true };
        for (at, length) in [(0, 64), (5, 1), (4095, 2), (4096, 4096), (1 << 20, 1 << 20), (777, 2_000_001)] {
            let mut bytes = vec![0; length];
            direct.read_exact_at(&mut bytes, at).unwrap();
            assert_eq!(bytes, expected[at as usize..at as usize + length], "{length} bytes at {at}");
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
            direct.write_all_at(&bytes, at).unwrap();
            expected[at as usize..at as usize + length].copy_from_slice(&bytes);
            assert_eq!(std::fs::read(&path).unwrap(), expected, "{length} bytes at {at}");
        }
        assert!(direct.read_exact_at(&mut [0; 100], 3 << 20).is_err(), "behind the end is nothing");
    }
}
