//! Memory for DMA: the pool, a sealed memfd on hugepages where there are any (ARCHITECTURE §4); and
//! what big tables ask of the memory they lie in.

#[expect(unsafe_code, reason = "tables in memory of their own, and prefetch")]
mod table;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvring_ipc::config::{Config, Hugepages};
use kvring_ipc::mapping::{Mapping, Pages, growing_memfd, is_sealed};

pub use table::{Table, populate, prefetch};

/// Between steps of work on all of a pool, each of which takes less than a millisecond. Whoever pauses leaves the core to who
/// has a request to answer; at any priority, one that works in the kernel and does not pause is left its slice, for which
/// requests wait (two ticks, 8 ms, with a kernel of 250 Hz).
pub const PAUSE: std::time::Duration = std::time::Duration::from_micros(500);

/// Pieces of the pool are touched and registered one by one, so that serving starts with the first.
/// io_uring takes 16,384 buffers of at most 1 GiB (io_uring/rsrc.c).
const PIECE_BYTES: u64 = 64 << 20;
const PIECES_MAX: u64 = 8192;

/// Why there is no pool, and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages are the documentation")]
pub enum PoolError {
    #[error("cpu_cache_gb is too small: {pool_bytes} bytes hold no block of {slot_bytes}: raise cpu_cache_gb")]
    TooSmall { pool_bytes: u64, slot_bytes: u64 },
    #[error(
        "hugepages = require: {needed} hugepages of {page_bytes} bytes are needed and {free} are free: `echo {total} > {file}`, lower cpu_cache_gb, or set hugepages = try"
    )]
    NoHugepages { needed: u64, free: u64, total: u64, page_bytes: u64, file: String },
    #[error(
        "cpu_cache_gb: {gb:.2} GB cannot be had: {errno}: lower cpu_cache_gb; the machine has {available_gb:.2} GB available"
    )]
    NoMemory { gb: f64, available_gb: f64, errno: rustix::io::Errno },
    #[error(
        "cpu_cache_gb: the pool cannot grow to {gb:.2} GB: {errno}: {huge_gb:.2} GB of hugepages are free, and {available_gb:.2} GB of other memory; a pool grows by pages of its own kind (`kvring stat`), and one that an earlier version has made does not"
    )]
    CannotGrow { gb: f64, huge_gb: f64, available_gb: f64, errno: rustix::io::Errno },
}

/// The pool's memory.
#[derive(Debug)]
pub struct PoolMemory {
    /// Passed to every session.
    pub fd: OwnedFd,
    /// Ours.
    pub mapping: Arc<Mapping>,
    /// What it is made of.
    pub pages: Pages,
    /// Slots in it.
    pub slots_count: u32,
    /// Bytes of one.
    pub slot_bytes: u64,
    /// Bytes touched and registered at once: a multiple of the slot.
    pub piece_bytes: u64,
    /// Set when it is not what was asked for: a sentence for the log.
    pub warning: Option<String>,
}

fn sysfs(page_bytes: u64, file: &str) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{file}", page_bytes >> 10)
}

fn read_number(path: &str) -> u64 {
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Bytes that a line of /proc/meminfo names.
fn meminfo(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib << 10)
}

/// Memory that could be had without swapping (MemAvailable).
pub fn available_bytes() -> u64 {
    meminfo("MemAvailable").unwrap_or(u64::MAX)
}

/// Whether the machine has as many hugepages, free or not, as this pool would take.
pub fn has_hugepages_for(config: &Config) -> bool {
    let page = if config.hugepage_size_bytes == 1 << 30 { Pages::Huge1G } else { Pages::Huge2M }.bytes();
    config.cpu_cache_bytes.div_ceil(page) <= read_number(&sysfs(page, "nr_hugepages"))
}

/// How many slots this configuration makes of blocks of this size.
pub fn slots_of(config: &Config, slot_bytes: u64) -> u64 {
    (config.cpu_cache_bytes / slot_bytes).min(crate::limits::SLOTS_MAX)
}

/// How many slots a pool could have if it grew to all of the machine's memory: what is counted a slot has room for those.
pub fn slots_max(slots: u64, slot_bytes: u64) -> u32 {
    let total = meminfo("MemTotal").unwrap_or(0);
    slots.max(total / slot_bytes).min(crate::limits::SLOTS_MAX) as u32
}

/// The pool of an engine process that is gone, with everything in it: it had so many slots `before`, and grows if it is to
/// have more.
///
/// # Errors
/// `EINVAL` if it is no sealed memfd; `EPERM` if it cannot grow, as one of an earlier version; else what mmap says:
/// `ENOMEM` for want of free hugepages.
pub fn reopen(fd: OwnedFd, slot_bytes: u64, slots_count: u32, before: u32) -> rustix::io::Result<PoolMemory> {
    let used = u64::from(slots_count) * slot_bytes;
    if !is_sealed(&fd, 0)? {
        return Err(rustix::io::Errno::INVAL);
    }
    // Asked of the file system: a tmpfs may name the size of a hugepage as its block's and have none.
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    let system = rustix::fs::fstatfs(&fd)?;
    let pages = match system.f_bsize as u64 {
        _ if system.f_type as i64 != HUGETLBFS_MAGIC => Pages::Small,
        bytes if bytes == Pages::Huge1G.bytes() => Pages::Huge1G,
        _ => Pages::Huge2M,
    };
    let bytes = used.next_multiple_of(pages.bytes());
    let file = rustix::fs::fstat(&fd)?;
    // Touched later and by the kernel's leave only: better refused now than killed then. The file may be long and empty.
    let there = (file.st_blocks as u64 * 512).max(u64::from(before) * slot_bytes);
    if slots_count > before && pages == Pages::Small && bytes.saturating_sub(there) > available_bytes() {
        return Err(rustix::io::Errno::NOMEM);
    }
    if (file.st_size as u64) < bytes {
        rustix::fs::ftruncate(&fd, bytes)?;
    }
    let memory = over(fd, used, slot_bytes, pages)?;
    if pages == Pages::Small {
        memory.mapping.advise_hugepages();
    }
    Ok(memory)
}

/// Who gets transparent hugepages for shared memory (Linux 4.8, admin-guide/mm/transhuge).
pub const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Whether shared memory that asks for them gets transparent hugepages, as [`SHMEM_ENABLED`] says.
pub fn shared_memory_may_have_hugepages() -> bool {
    let modes = std::fs::read_to_string(SHMEM_ENABLED).unwrap_or_default();
    ["[always]", "[within_size]", "[advise]", "[force]"].iter().any(|mode| modes.contains(mode))
}

/// Why a pool did not grow, with what there is.
pub fn cannot_grow(config: &Config, errno: rustix::io::Errno) -> PoolError {
    let gb = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let page = if config.hugepage_size_bytes == 1 << 30 { Pages::Huge1G } else { Pages::Huge2M }.bytes();
    let huge_gb = gb(read_number(&sysfs(page, "free_hugepages")) * page);
    PoolError::CannotGrow { gb: gb(config.cpu_cache_bytes), huge_gb, available_gb: gb(available_bytes()), errno }
}

/// Makes the pool. Its pages come later, piece by piece.
///
/// # Errors
/// [`PoolError`].
pub fn create(config: &Config, slot_bytes: u64) -> Result<PoolMemory, PoolError> {
    let slots = slots_of(config, slot_bytes);
    if slots == 0 {
        return Err(PoolError::TooSmall { pool_bytes: config.cpu_cache_bytes, slot_bytes });
    }
    let huge = if config.hugepage_size_bytes == 1 << 30 { Pages::Huge1G } else { Pages::Huge2M };
    let used = slots * slot_bytes;
    let mut warning = None;
    if config.hugepages != Hugepages::Off {
        let free = read_number(&sysfs(huge.bytes(), "free_hugepages"));
        let needed = used.div_ceil(huge.bytes());
        if needed <= free
            && let Ok(memory) = map(used, slot_bytes, huge)
        {
            return Ok(memory);
        }
        let file = sysfs(huge.bytes(), "nr_hugepages");
        let total = read_number(&file) + needed.saturating_sub(free);
        if config.hugepages == Hugepages::Require {
            return Err(PoolError::NoHugepages { needed, free, total, page_bytes: huge.bytes(), file });
        }
        let page = huge.bytes();
        let wants =
            format!("{needed} hugepages of {page} bytes are needed and {free} are free; `echo {total} > {file}`");
        warning = Some(if shared_memory_may_have_hugepages() {
            format!("the pool is on transparent hugepages, as far as the kernel finds some: {wants} for reserved ones")
        } else {
            format!(
                "the pool is on 4 KiB pages: {wants} for fewer TLB misses, or `echo advise > {SHMEM_ENABLED}` for transparent ones"
            )
        });
    }
    let available = available_bytes();
    let no_memory = |errno| PoolError::NoMemory {
        gb: used as f64 / f64::from(1 << 30),
        available_gb: available as f64 / f64::from(1 << 30),
        errno,
    };
    // Touched later and by the kernel's leave only: better refused now than killed then.
    if used > available {
        return Err(no_memory(rustix::io::Errno::NOMEM));
    }
    let mut memory = map(used, slot_bytes, Pages::Small).map_err(no_memory)?;
    memory.mapping.advise_hugepages();
    memory.warning = warning;
    Ok(memory)
}

fn map(used: u64, slot_bytes: u64, pages: Pages) -> rustix::io::Result<PoolMemory> {
    let bytes = used.next_multiple_of(pages.bytes());
    over(growing_memfd("kvring-pool", bytes, pages)?, used, slot_bytes, pages)
}

fn over(fd: OwnedFd, used: u64, slot_bytes: u64, pages: Pages) -> rustix::io::Result<PoolMemory> {
    let bytes = used.next_multiple_of(pages.bytes());
    let mapping = Arc::new(Mapping::new(&fd, bytes as usize)?);
    let wanted = PIECE_BYTES.max(bytes / PIECES_MAX);
    let piece_bytes = (wanted / slot_bytes).max(1) * slot_bytes;
    Ok(PoolMemory {
        fd,
        mapping,
        pages,
        slots_count: (used / slot_bytes) as u32,
        slot_bytes,
        piece_bytes,
        warning: None,
    })
}

impl PoolMemory {
    /// How many pieces there are.
    pub fn pieces_count(&self) -> u32 {
        (u64::from(self.slots_count) * self.slot_bytes).div_ceil(self.piece_bytes) as u32
    }

    /// The slots of a piece.
    pub fn slots_of(&self, piece: u32) -> std::ops::Range<u32> {
        let per_piece = (self.piece_bytes / self.slot_bytes) as u32;
        piece * per_piece..((piece + 1) * per_piece).min(self.slots_count)
    }

    /// Bytes of the file that lie behind this pool: it was larger once, or another one was to be.
    pub fn tail_bytes(&self) -> u64 {
        let bytes = rustix::fs::fstat(&self.fd).map_or(0, |file| file.st_size as u64);
        bytes.saturating_sub(self.mapping.bytes() as u64)
    }

    /// Gives the pages of some of what lies behind this pool back to the system, from this offset in it on: says where to
    /// go on, nowhere at the end. Who has it mapped must not use it any more.
    ///
    /// # Errors
    /// What the system says.
    pub fn give_back_tail(&self, from: u64) -> rustix::io::Result<Option<u64>> {
        // Some tens of milliseconds for small pages.
        const STEP: u64 = 256 << 20;
        let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        let bytes = self.tail_bytes().saturating_sub(from);
        if bytes == 0 {
            return Ok(None);
        }
        let step = bytes.min(STEP.next_multiple_of(self.pages.bytes()));
        rustix::fs::fallocate(&self.fd, hole, self.mapping.bytes() as u64 + from, step)?;
        Ok((step < bytes).then_some(from + step))
    }

    /// Takes the pages of a piece out of this process' page table, a little at a time. They stay what they are.
    pub fn let_go(&self, piece: u32, pauses: impl Fn()) {
        const STEP: u64 = 16 << 20;
        let start = u64::from(piece) * self.piece_bytes;
        let end = (start + self.piece_bytes).min(self.mapping.bytes() as u64);
        for offset in (start..end).step_by(STEP as usize) {
            self.mapping.let_go(offset as usize, STEP.min(end - offset) as usize);
            pauses();
        }
    }

    /// Gives a piece its pages, unless `stop` says that nobody needs them any more.
    ///
    /// # Errors
    /// `ENOMEM`; `EINTR`: it was stopped.
    pub fn touch(&self, piece: u32, stop: impl Fn() -> bool) -> rustix::io::Result<()> {
        // In steps: while a range is populated nobody can map anything (mmap_lock), a new session for one. New hugepages are
        // to be cleared as small ones are; those that are there take nothing.
        let step = if self.pages == Pages::Small { 2 << 20 } else { 16 << 20 };
        let start = u64::from(piece) * self.piece_bytes;
        let end = (start + self.piece_bytes).min(self.mapping.bytes() as u64);
        for offset in (start..end).step_by(step as usize) {
            if stop() {
                return Err(rustix::io::Errno::INTR);
            }
            match self.mapping.populate(offset as usize, step.min(end - offset) as usize) {
                // Before Linux 5.14: pages come when they are used.
                Err(rustix::io::Errno::INVAL) => return Ok(()),
                result => result?,
            }
        }
        Ok(())
    }
}
