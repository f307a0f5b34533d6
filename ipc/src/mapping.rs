//! Shared memory that somebody else writes: owned mappings, bounds-checked words, copies.
//!
//! Nobody gets a `&[u8]` of it. A reference promises that the bytes stand still, and here another
//! process or a DMA engine changes them at will; so control words are atomics and data is copied.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Result;
use rustix::mm::{MapFlags, ProtFlags};

use crate::sync::{AtomicU32, AtomicU64};

/// Which pages a memfd is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// The kernel's ordinary pages.
    Small,
    /// Hugepages of 2 MiB.
    Huge2M,
    /// Hugepages of 1 GiB.
    Huge1G,
}

impl Pages {
    /// Bytes of one page.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Small => 4096,
            Self::Huge2M => 2 << 20,
            Self::Huge1G => 1 << 30,
        }
    }
}

/// A new memfd of `bytes`, sealed so that nobody, we included, can change its size.
///
/// # Errors
/// What the kernel says; `ENOMEM` for want of free hugepages may also come from [`Mapping::new`].
pub fn sealed_memfd(name: &str, bytes: u64, pages: Pages) -> Result<OwnedFd> {
    sealed_memfd_with(name, bytes, pages, |_| Ok(())).map(|(fd, ())| fd)
}

/// As [`sealed_memfd`], but that it may grow: whoever has it mapped loses nothing by that.
///
/// # Errors
/// As [`sealed_memfd`].
pub fn growing_memfd(name: &str, bytes: u64, pages: Pages) -> Result<OwnedFd> {
    let fd = memfd(name, bytes, pages)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(fd)
}

/// As [`sealed_memfd`]; `first` may map it and add further seals before no more can be added.
///
/// # Errors
/// As [`sealed_memfd`], and what `first` says.
pub fn sealed_memfd_with<T>(
    name: &str,
    bytes: u64,
    pages: Pages,
    first: impl FnOnce(&OwnedFd) -> Result<T>,
) -> Result<(OwnedFd, T)> {
    let fd = memfd(name, bytes, pages)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
    let made = first(&fd)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SEAL)?;
    Ok((fd, made))
}

fn memfd(name: &str, bytes: u64, pages: Pages) -> Result<OwnedFd> {
    let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let flags = match pages {
        Pages::Small => base,
        Pages::Huge2M => base | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Pages::Huge1G => base | MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let fd = rustix::fs::memfd_create(name, flags)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    Ok(fd)
}

/// Whether a received memfd can no longer shrink under us, and holds at least `bytes`.
///
/// # Errors
/// What the kernel says: the descriptor is no memfd.
pub fn is_sealed(fd: impl AsFd, bytes: u64) -> Result<bool> {
    let seals = rustix::fs::fcntl_get_seals(&fd)?;
    let size = u64::try_from(rustix::fs::fstat(&fd)?.st_size).unwrap_or(0);
    Ok(seals.contains(SealFlags::SHRINK) && size >= bytes)
}

/// An owned mapping, shared or not, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    is_shared: bool,
}

// SAFETY: the mapping is owned and lives until drop; every access goes through atomics or through
// copies whose callers are told that bytes may change; no thread-bound state exists.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; shared access is by atomics, and by copies that promise nothing of races.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` of a shared file, readable and writable.
    ///
    /// # Errors
    /// What mmap says; for hugepages `ENOMEM` means that too few are free.
    pub fn new(fd: impl AsFd, bytes: usize) -> Result<Self> {
        Self::with(fd, bytes, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// Maps the first `bytes` of a shared file for reading: loads only, a store would be a fault.
    ///
    /// # Errors
    /// What mmap says.
    pub fn new_read_only(fd: impl AsFd, bytes: usize) -> Result<Self> {
        Self::with(fd, bytes, ProtFlags::READ)
    }

    /// Memory of this process alone, zeroed; pages come as they are touched.
    ///
    /// # Errors
    /// What mmap says.
    pub fn private(bytes: usize) -> Result<Self> {
        // SAFETY: as in `with`.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { base, bytes, is_shared: false })
    }

    fn with(fd: impl AsFd, bytes: usize, protection: ProtFlags) -> Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours; the
        // pointer is owned by the value returned, which alone unmaps it.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0)? };
        let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { base, bytes, is_shared: true })
    }

    /// Length of the mapping.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of a range, for DMA and for CUDA registration. Not to be made a reference.
    ///
    /// # Panics
    /// If the range is not inside the mapping: our own bug, offsets are bounded before.
    #[inline]
    pub fn address(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.bytes), "{offset}+{bytes} of {}", self.bytes);
        // SAFETY: offset <= self.bytes by the assert, so the result is inside the mapping or at its end.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// One control word.
    ///
    /// # Panics
    /// If it is not inside the mapping or not aligned.
    #[inline]
    pub fn word32(&self, offset: usize) -> &AtomicU32 {
        let address = self.address(offset, 4).cast::<AtomicU32>();
        assert!(address.is_aligned());
        // SAFETY: inside the mapping and aligned by the asserts; lives as long as &self; an atomic
        // may be written by others at any time.
        unsafe { &*address }
    }

    /// A range of words.
    ///
    /// # Panics
    /// If it is not inside the mapping or not aligned.
    #[inline]
    pub fn words64(&self, offset: usize, count: usize) -> &[AtomicU64] {
        let address = self.address(offset, count * 8).cast::<AtomicU64>();
        assert!(address.is_aligned());
        // SAFETY: inside the mapping and aligned by the asserts; lives as long as &self; atomics may
        // be written by others at any time, and every bit pattern is a value.
        unsafe { std::slice::from_raw_parts(address, count) }
    }

    /// Copies bytes out. If somebody writes meanwhile the copy is a mixture, which is why it is
    /// checked (a checksum, a generation) by whoever relies on it.
    ///
    /// # Panics
    /// If the range is not inside the mapping.
    pub fn copy_out(&self, offset: usize, target: &mut [u8]) {
        let source = self.address(offset, target.len());
        // SAFETY: source is valid for target.len() bytes by `address`; target is a distinct,
        // exclusively borrowed buffer. A concurrent writer makes the bytes a mixture: accepted above.
        unsafe { std::ptr::copy_nonoverlapping(source, target.as_mut_ptr(), target.len()) }
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// If the range is not inside the mapping.
    pub fn copy_in(&self, offset: usize, source: &[u8]) {
        let target = self.address(offset, source.len());
        // SAFETY: target is valid for source.len() bytes by `address`; source is not inside the
        // mapping, of which no reference exists.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target, source.len()) }
    }

    /// Copies bytes from one place of the mapping to another. As for [`Mapping::copy_out`], somebody may write meanwhile.
    ///
    /// # Panics
    /// If a range is not inside the mapping, or they overlap.
    pub fn copy_within(&self, source: usize, target: usize, bytes: usize) {
        assert!(source.abs_diff(target) >= bytes, "{source} and {target} overlap");
        let (from, to) = (self.address(source, bytes), self.address(target, bytes));
        // SAFETY: both are valid for `bytes` bytes by `address`, and do not overlap by the assert.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) }
    }

    /// Faults a range in, writable, without changing its bytes.
    ///
    /// # Errors
    /// `ENOMEM` when the memory is not there; `EINVAL` on kernels before 5.14 (then pages come on
    /// first use).
    ///
    /// # Panics
    /// If the range is not inside the mapping.
    pub fn populate(&self, offset: usize, bytes: usize) -> Result<()> {
        let address = self.address(offset, bytes);
        // SAFETY: the range is inside our mapping; populating changes no byte.
        unsafe { rustix::mm::madvise(address.cast(), bytes, rustix::mm::Advice::LinuxPopulateWrite) }
    }

    /// Takes the pages of a range out of this process' page table. They stay what they are.
    ///
    /// # Panics
    /// If the range is not inside the mapping, or the mapping is private: its pages would be lost.
    pub fn let_go(&self, offset: usize, bytes: usize) {
        assert!(self.is_shared, "of memory that nobody else has");
        let address = self.address(offset, bytes);
        // SAFETY: the range is inside our mapping, which is of a file by the assert: no byte changes. A refusal (a part of a
        // hugepage) costs nothing.
        let _ = unsafe { rustix::mm::madvise(address.cast(), bytes, rustix::mm::Advice::LinuxDontNeed) };
    }

    /// Asks for transparent hugepages, where the kernel grants them for shared memory.
    pub fn advise_hugepages(&self) {
        // SAFETY: advice about our whole mapping; changes no byte. A refusal costs nothing.
        let _ =
            unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.bytes, rustix::mm::Advice::LinuxHugepage) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: we own the mapping and nothing borrowed from it outlives self.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_sealed_memfd_cannot_shrink() {
        let fd = sealed_memfd("test", 8192, Pages::Small).unwrap();
        assert!(is_sealed(&fd, 8192).unwrap());
        assert!(!is_sealed(&fd, 8193).unwrap());
        assert_eq!(rustix::fs::ftruncate(&fd, 0), Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn a_pool_grows_and_gives_back_its_end() {
        let fd = growing_memfd("test", 8192, Pages::Small).unwrap();
        let before = Mapping::new(&fd, 8192).unwrap();
        before.copy_in(4096, b"hello");
        rustix::fs::ftruncate(&fd, 16384).unwrap();
        assert!(is_sealed(&fd, 16384).unwrap(), "as large as it is now");
        assert_eq!(rustix::fs::ftruncate(&fd, 8192), Err(rustix::io::Errno::PERM), "nobody is cut off");
        let after = Mapping::new(&fd, 16384).unwrap();
        after.copy_in(12288, b"there");
        rustix::fs::fallocate(&fd, HOLE, 8192, 8192).unwrap();
        // By a mapping of its own: that a system call changes memory behind one is more than the compiler is told.
        let seen = Mapping::new(&fd, 16384).unwrap();
        let mut out = [0; 5];
        seen.copy_out(12288, &mut out);
        assert_eq!(out, [0; 5], "its pages are gone, and it can be read");
        seen.copy_out(4096, &mut out);
        assert_eq!(&out, b"hello");
        let add = rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE);
        assert_eq!(add, Err(rustix::io::Errno::PERM), "nobody forbids the others to write");
    }

    const HOLE: rustix::fs::FallocateFlags =
        rustix::fs::FallocateFlags::PUNCH_HOLE.union(rustix::fs::FallocateFlags::KEEP_SIZE);

    #[test]
    fn two_mappings_see_one_memory() {
        let fd = sealed_memfd("test", 8192, Pages::Small).unwrap();
        let (a, b) = (Mapping::new(&fd, 8192).unwrap(), Mapping::new(&fd, 8192).unwrap());
        a.populate(0, 8192).unwrap();
        a.copy_in(100, b"hello");
        let mut out = [0; 5];
        b.copy_out(100, &mut out);
        assert_eq!(&out, b"hello");
    }

    #[test]
    #[should_panic(expected = "8190+4")]
    fn outside_is_outside() {
        let fd = sealed_memfd("test", 8192, Pages::Small).unwrap();
        Mapping::new(&fd, 8192).unwrap().word32(8190);
    }
}
