//! Memory that devices move bytes to and from.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::Api;
use crate::{SpdkError, checked, env};

/// Memory that is mapped somewhere as long as this lives, and that nobody holds a reference into.
///
/// # Safety
/// `base` to `base + bytes` stays mapped and may be read and written by anybody at any time.
pub unsafe trait Memory: Send + Sync {
    /// Where it begins.
    fn base(&self) -> *mut u8;
    /// How long it is.
    fn bytes(&self) -> usize;
    /// The file that is mapped there, from its beginning on and as a whole: for a controller in another process, which maps it too.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Memory of SPDK's own, which every device takes.
pub struct Dma {
    api: &'static Api,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain bytes, of which nobody holds a reference; freed by the last owner.
unsafe impl Send for Dma {}
// SAFETY: as above.
unsafe impl Sync for Dma {}

impl Dma {
    /// So many bytes, zeros.
    ///
    /// # Errors
    /// SPDK has no more memory.
    pub fn new(bytes: usize) -> Result<Arc<Self>, SpdkError> {
        let api = env::env()?;
        // SAFETY: says memory that is ours until it is freed, or none.
        let base = unsafe { (api.dma_alloc)(bytes as u64) };
        let base = NonNull::new(base.cast()).ok_or(SpdkError::Io {
            address: "SPDK".into(),
            what: "memory for transfers (spdk_memory_mib)",
            errno: rustix::io::Errno::NOMEM,
        })?;
        Ok(Arc::new(Self { api, base, bytes }))
    }

    /// Copies bytes out of it.
    ///
    /// # Panics
    /// They do not lie in it.
    pub fn copy_out(&self, at: usize, bytes: &mut [u8]) {
        assert!(at <= self.bytes && bytes.len() <= self.bytes - at, "inside the memory");
        // SAFETY: inside the memory, which is not referenced; the target is another.
        unsafe { std::ptr::copy_nonoverlapping(self.base.as_ptr().wrapping_add(at), bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes into it.
    ///
    /// # Panics
    /// There is no room for them.
    pub fn copy_in(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.bytes && bytes.len() <= self.bytes - at, "inside the memory");
        // SAFETY: inside the memory, which is not referenced; the source is another.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().wrapping_add(at), bytes.len()) };
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        // SAFETY: it is the one that was allocated, and its last owner.
        unsafe { (self.api.dma_free)(self.base.as_ptr().cast()) };
    }
}

// SAFETY: mapped until it is dropped.
unsafe impl Memory for Dma {
    fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// SPDK knows memory by pages of so many bytes.
const PAGE_BYTES: usize = 2 << 20;

/// What was registered of somebody else's memory: by page, for all devices of the process, for as long as the process
/// lives. The memory stays as long: a device that nobody hears of any more may be moving bytes yet.
struct Known {
    from: usize,
    to: usize,
    _memory: Arc<dyn Memory>,
}

static KNOWN: Mutex<Vec<Known>> = Mutex::new(Vec::new());

/// Devices that move bytes by themselves know the pages around a part of a memory from now on.
pub(crate) fn register(memory: &Arc<dyn Memory>, at: usize, bytes: usize) -> Result<(), rustix::io::Errno> {
    let api = env::env().map_err(|_| rustix::io::Errno::INVAL)?;
    let base = memory.base().addr();
    let fits = at <= memory.bytes() && bytes <= memory.bytes() - at;
    if !fits || !base.is_multiple_of(PAGE_BYTES) || !memory.bytes().is_multiple_of(PAGE_BYTES) {
        return Err(rustix::io::Errno::INVAL);
    }
    let (mut page, end) = (at - at % PAGE_BYTES, (at + bytes).next_multiple_of(PAGE_BYTES));
    let file = memory.file().map_or(-1, |file| file.as_raw_fd());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    while page < end {
        let is_known = |page: usize| known.iter().any(|known| (known.from..known.to).contains(&(base + page)));
        if is_known(page) {
            page += PAGE_BYTES;
            continue;
        }
        let from = page;
        while page < end && !is_known(page) {
            page += PAGE_BYTES;
        }
        let (first, length) = (memory.base().wrapping_add(from), (page - from) as u64);
        // SAFETY: mapped as long as `memory`, which is kept for ever from now on, and its file with it.
        checked(unsafe { (api.memory_register)(first.cast(), length, file, from as u64) })?;
        known.push(Known { from: base + from, to: base + page, _memory: memory.clone() });
    }
    Ok(())
}
