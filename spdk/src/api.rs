//! The shim's functions, as `shim/kvring_spdk.h` declares them.

use std::ffi::{CStr, c_char, c_void};
use std::path::Path;

use libloading::Library;

use crate::SpdkError;

pub const ABI: u32 = 1;

#[repr(C)]
pub struct EnvArgs {
    pub no_huge: u32,
    pub no_pci: u32,
    pub memory_mib: u32,
    pub cpu: u32,
}

#[repr(C)]
pub struct NamespaceInfo {
    pub bytes: u64,
    pub sector_bytes: u32,
    pub metadata_bytes: u32,
    pub transfer_bytes_max: u32,
    pub nsid: u32,
    pub serial: [u8; 24],
    pub model: [u8; 44],
    pub firmware: [u8; 12],
}

#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct DoneWord {
    pub tag: u64,
    pub result: i32,
    pub reserved: u32,
}

/// A controller, as the shim knows it.
#[repr(C)]
pub struct RawController {
    _opaque: [u8; 0],
}

/// A pair of queues, as the shim knows it.
#[repr(C)]
pub struct RawQpair {
    _opaque: [u8; 0],
}

macro_rules! api {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// Every function of the shim. They stay as long as the process: what was loaded is never unloaded.
        pub struct Api {
            $(pub $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        #[cfg(feature = "link")]
        mod linked {
            use super::{DoneWord, EnvArgs, NamespaceInfo, RawController, RawQpair, c_char, c_void};
            unsafe extern "C" {
                $(#[link_name = $symbol] pub fn $field($(_: $argument),*) $(-> $result)?;)*
            }
        }

        impl Api {
            /// The shim that is part of this program.
            #[cfg(feature = "link")]
            pub fn linked() -> Self {
                Self { $($field: linked::$field,)* }
            }

            fn of(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    // SAFETY: the symbol is the shim's, whose header says this type.
                    $($field: unsafe { *library.get($symbol.as_bytes())? },)*
                })
            }
        }
    };
}

api! {
    abi = "kvring_spdk_abi": fn() -> u32;
    version = "kvring_spdk_version": fn() -> *const c_char;
    env_init = "kvring_spdk_env_init": fn(*const EnvArgs) -> i32;
    memory_register = "kvring_spdk_memory_register": fn(*mut c_void, u64, i32, u64) -> i32;
    dma_alloc = "kvring_spdk_dma_alloc": fn(u64) -> *mut c_void;
    dma_free = "kvring_spdk_dma_free": fn(*mut c_void);
    connect = "kvring_spdk_connect": fn(*const c_char, *mut *mut RawController) -> i32;
    poll_admin = "kvring_spdk_poll_admin": fn(*mut RawController) -> i32;
    detach = "kvring_spdk_detach": fn(*mut RawController);
    namespace = "kvring_spdk_namespace": fn(*mut RawController, u32, *mut NamespaceInfo) -> i32;
    health = "kvring_spdk_health": fn(*mut RawController, *mut c_void) -> i32;
    qpair_new = "kvring_spdk_qpair_new": fn(*mut RawController, u32, u32, *mut *mut RawQpair) -> i32;
    qpair_free = "kvring_spdk_qpair_free": fn(*mut RawQpair);
    submit = "kvring_spdk_submit": fn(*mut RawQpair, i32, *mut c_void, u64, u32, u64) -> i32;
    flush = "kvring_spdk_flush": fn(*mut RawQpair, u64) -> i32;
    poll = "kvring_spdk_poll": fn(*mut RawQpair, *mut DoneWord, u32) -> i32;
}

impl Api {
    /// Loads a shim.
    pub fn load(path: &Path) -> Result<Self, SpdkError> {
        let name = path.display().to_string();
        let failed = |error: libloading::Error| SpdkError::Library { library: name.clone(), why: error.to_string() };
        // SAFETY: whoever names the library trusts it with this process, as with any other program that he starts.
        let library = unsafe { Library::new(path) }.map_err(failed)?;
        let api = Self::of(&library).map_err(failed)?;
        // Threads of DPDK may run in it until the process ends.
        std::mem::forget(library);
        // SAFETY: takes nothing, says a number.
        let theirs = unsafe { (api.abi)() };
        if theirs != ABI {
            return Err(SpdkError::Abi { library: name, theirs, ours: ABI });
        }
        Ok(api)
    }

    /// Of which SPDK it is made.
    pub fn version(&self) -> String {
        // SAFETY: says a string that stays.
        let text = unsafe { (self.version)() };
        // SAFETY: as above, and it ends with a zero.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}
