//! Memory that devices move bytes to and from.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

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

/// Memory of somebody else's, which devices know from now on.
pub(crate) struct Registered {
    api: &'static Api,
    base: *mut c_void,
    bytes: u64,
    /// Unregistered before it goes.
    _memory: Arc<dyn Memory>,
}

// SAFETY: only an address and a length, used once more to take the registration back.
unsafe impl Send for Registered {}

/// SPDK knows memory by pages of so many bytes.
const PAGE_BYTES: usize = 2 << 20;

impl Registered {
    /// A part of some memory, as it is mapped from `fd` at `offset`. Only whole pages of 2 MiB can be.
    pub fn new(
        memory: &Arc<dyn Memory>,
        at: usize,
        bytes: usize,
        fd: i32,
        offset: u64,
    ) -> Result<Self, rustix::io::Errno> {
        let api = env::env().map_err(|_| rustix::io::Errno::INVAL)?;
        let base = memory.base().wrapping_add(at);
        let whole = base.addr().is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
        if !whole || at > memory.bytes() || bytes > memory.bytes() - at {
            return Err(rustix::io::Errno::INVAL);
        }
        // SAFETY: mapped as long as `memory`, which self holds until this is taken back.
        checked(unsafe { (api.memory_register)(base.cast(), bytes as u64, fd, offset) })?;
        Ok(Self { api, base: base.cast(), bytes: bytes as u64, _memory: memory.clone() })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: what was registered; whoever moves bytes holds the memory's owner and is dropped first.
        unsafe { (self.api.memory_unregister)(self.base, self.bytes) };
    }
}
