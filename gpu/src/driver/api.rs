//! The table of driver calls. Loading it is the one place where a driver can be found missing.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{
    CUDA_MEMCPY2D, CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUmemcpyAttributes,
    CUmodule, CUpointer_attribute, CUstream,
};
use libloading::Library;

use super::error::{CudaError, NO_DEVICE, STUB_LIBRARY, SUCCESS};

/// Oldest driver that has all we call: CUDA 12.0, driver 525.
pub const VERSION_MIN: i32 = 12000;

/// Why there is no CUDA here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// No library.
    #[error("no CUDA driver: {} could not be loaded ({error}); install the NVIDIA driver, or name its library with cuda_driver", tried.display())]
    NoLibrary {
        /// The last name that was tried.
        tried: PathBuf,
        /// What the loader says.
        error: String,
    },
    /// A library without a call that every driver since [`VERSION_MIN`] has.
    #[error("{} is no CUDA driver of version 12.0 or later: it has no {symbol}; update the NVIDIA driver", library.display())]
    NoSymbol {
        /// Which library.
        library: PathBuf,
        /// The first call that is missing.
        symbol: &'static str,
    },
    /// The toolkit's stub, which is there for linkers only.
    #[error("{} is the CUDA toolkit's stub, not a driver: remove its directory from LD_LIBRARY_PATH, or name the driver's library with cuda_driver", library.display())]
    Stub {
        /// Which library.
        library: PathBuf,
    },
    /// A driver without a GPU.
    #[error(
        "the CUDA driver finds no GPU: look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; in a container, pass the GPUs in"
    )]
    NoDevice,
    /// Before [`VERSION_MIN`].
    #[error("the CUDA driver is of version {}.{}, and 12.0 is needed: update the NVIDIA driver to 525 or later", version / 1000, version % 1000 / 10)]
    TooOld {
        /// As cuDriverGetVersion says it.
        version: i32,
    },
    /// It does not start.
    #[error("the CUDA driver does not start: {0}")]
    Init(CudaError),
}

/// `cuMemcpyBatchAsync` has two signatures: that of 12.8, and that of 13.0 without `failIdx`. Each is
/// asked for by version; calling one with the other's arguments is a crash.
#[derive(Debug, Clone, Copy)]
pub enum BatchCopy {
    /// CUDA 12.8 and 12.9.
    V1(BatchV1),
    /// CUDA 13.0 and later.
    V2(BatchV2),
}

/// `cuMemcpyBatchAsync`, 12.8.
pub type BatchV1 = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    CUstream,
) -> u32;
/// `cuMemcpyBatchAsync_v2`, 13.0.
pub type BatchV2 = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    CUstream,
) -> u32;

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// The calls. Each is `unsafe` as in C: what its arguments must be, cuda.h says.
        #[expect(missing_docs, reason = "each is the driver's function of the same name")]
        pub struct DriverApi {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($argument),*) -> u32,)*
            /// Where the driver has it.
            pub batch_copy: Option<BatchCopy>,
            /// As cuDriverGetVersion says it: 12080 for 12.8.
            pub version: i32,
            /// The library these come from.
            pub library: PathBuf,
        }

        /// Every required symbol.
        pub const SYMBOLS: &[&str] = &[$($symbol),*];

        fn resolve(library: &Library, path: &Path) -> Result<DriverApi, Unavailable> {
            Ok(DriverApi {
                $($name: {
                    // SAFETY: cuda.h gives this symbol this signature in every version since 12.0.
                    let symbol = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> u32>($symbol.as_bytes()) };
                    *symbol.map_err(|_| Unavailable::NoSymbol { library: path.to_path_buf(), symbol: $symbol })?
                },)*
                batch_copy: None,
                version: 0,
                library: path.to_path_buf(),
            })
        }
    };
}

table! {
    init = "cuInit" (c_uint);
    driver_get_version = "cuDriverGetVersion" (*mut c_int);
    device_get_count = "cuDeviceGetCount" (*mut c_int);
    device_get = "cuDeviceGet" (*mut CUdevice, c_int);
    device_get_name = "cuDeviceGetName" (*mut c_char, c_int, CUdevice);
    device_get_attribute = "cuDeviceGetAttribute" (*mut c_int, CUdevice_attribute, CUdevice);
    primary_context_retain = "cuDevicePrimaryCtxRetain" (*mut CUcontext, CUdevice);
    primary_context_release = "cuDevicePrimaryCtxRelease_v2" (CUdevice);
    context_set_current = "cuCtxSetCurrent" (CUcontext);
    context_push = "cuCtxPushCurrent_v2" (CUcontext);
    context_pop = "cuCtxPopCurrent_v2" (*mut CUcontext);
    stream_create = "cuStreamCreateWithPriority" (*mut CUstream, c_uint, c_int);
    stream_priority_range = "cuCtxGetStreamPriorityRange" (*mut c_int, *mut c_int);
    stream_destroy = "cuStreamDestroy_v2" (CUstream);
    stream_query = "cuStreamQuery" (CUstream);
    stream_wait_event = "cuStreamWaitEvent" (CUstream, CUevent, c_uint);
    stream_is_capturing = "cuStreamIsCapturing" (CUstream, *mut c_uint);
    stream_write_value64 = "cuStreamWriteValue64_v2" (CUstream, CUdeviceptr, u64, c_uint);
    event_create = "cuEventCreate" (*mut CUevent, c_uint);
    event_record = "cuEventRecord" (CUevent, CUstream);
    event_query = "cuEventQuery" (CUevent);
    event_destroy = "cuEventDestroy_v2" (CUevent);
    memory_alloc = "cuMemAlloc_v2" (*mut CUdeviceptr, usize);
    memory_free = "cuMemFree_v2" (CUdeviceptr);
    host_alloc = "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
    host_free = "cuMemFreeHost" (*mut c_void);
    host_register = "cuMemHostRegister_v2" (*mut c_void, usize, c_uint);
    host_unregister = "cuMemHostUnregister" (*mut c_void);
    host_device_pointer = "cuMemHostGetDevicePointer_v2" (*mut CUdeviceptr, *mut c_void, c_uint);
    pointer_get_attribute = "cuPointerGetAttribute" (*mut c_void, CUpointer_attribute, CUdeviceptr);
    copy_to_device = "cuMemcpyHtoDAsync_v2" (CUdeviceptr, *const c_void, usize, CUstream);
    copy_to_host = "cuMemcpyDtoHAsync_v2" (*mut c_void, CUdeviceptr, usize, CUstream);
    copy_2d = "cuMemcpy2DAsync_v2" (*const CUDA_MEMCPY2D, CUstream);
    module_load = "cuModuleLoadData" (*mut CUmodule, *const c_void);
    module_unload = "cuModuleUnload" (CUmodule);
    module_function = "cuModuleGetFunction" (*mut CUfunction, CUmodule, *const c_char);
    launch = "cuLaunchKernel" (
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void
    );
    exchange_capture_mode = "cuThreadExchangeStreamCaptureMode" (*mut c_uint);
    get_proc_address = "cuGetProcAddress_v2" (*const c_char, *mut *mut c_void, c_int, u64, *mut c_uint);
}

impl std::fmt::Debug for DriverApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of version {}", self.library.display(), self.version)
    }
}

/// Where a driver lies when nobody says so: the loader's own search, then where container runtimes put it.
const NAMES: &[&str] = &["libcuda.so.1", "/usr/local/nvidia/lib64/libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"];

/// Makes a result code a `Result`.
///
/// # Errors
/// Every code but success.
pub fn check(call: &'static str, code: u32) -> Result<(), CudaError> {
    if code == SUCCESS { Ok(()) } else { Err(CudaError { call, code }) }
}

impl DriverApi {
    /// Loads the driver and starts it, once a process and library: a second call gets the same.
    ///
    /// # Errors
    /// Why there is no CUDA here, and what to do about it.
    pub fn load(named: Option<&Path>) -> Result<Arc<Self>, Unavailable> {
        static LOADED: Mutex<Vec<Arc<DriverApi>>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = |api: &&Arc<Self>| named.is_none_or(|named| api.library == named);
        if let Some(api) = loaded.iter().find(wanted) {
            return Ok(api.clone());
        }
        let api = Arc::new(Self::load_anew(named)?);
        loaded.push(api.clone());
        Ok(api)
    }

    /// Where the driver's library lies, if it is one and has every call of ours. Does not start it: no GPU is asked.
    ///
    /// # Errors
    /// Why there is none.
    pub fn find(named: Option<&Path>) -> Result<PathBuf, Unavailable> {
        let (library, path) = open(named)?;
        let found = resolve(&library, &path).map(|_| path);
        // As in `load`.
        std::mem::forget(library);
        found
    }

    fn load_anew(named: Option<&Path>) -> Result<Self, Unavailable> {
        let (library, path) = open(named)?;
        let mut api = resolve(&library, &path)?;
        // A driver is never unloaded: its threads and the engine's own use of it go on.
        std::mem::forget(library);
        // SAFETY: cuInit takes 0.
        match check("cuInit", unsafe { (api.init)(0) }) {
            Err(CudaError { code: STUB_LIBRARY, .. }) => return Err(Unavailable::Stub { library: path }),
            Err(CudaError { code: NO_DEVICE, .. }) => return Err(Unavailable::NoDevice),
            started => started.map_err(Unavailable::Init)?,
        }
        // SAFETY: the pointer is to an int of ours.
        let asked = unsafe { (api.driver_get_version)(&raw mut api.version) };
        check("cuDriverGetVersion", asked).map_err(Unavailable::Init)?;
        if api.version < VERSION_MIN {
            return Err(Unavailable::TooOld { version: api.version });
        }
        let mut count = 0;
        // SAFETY: as above.
        let asked = unsafe { (api.device_get_count)(&raw mut count) };
        check("cuDeviceGetCount", asked).map_err(Unavailable::Init)?;
        if count == 0 {
            return Err(Unavailable::NoDevice);
        }
        api.batch_copy = api.find_batch_copy();
        Ok(api)
    }

    /// An entry point as of a version of CUDA; none if this driver does not have it.
    fn entry_point(&self, name: &CStr, version: i32) -> Option<*mut c_void> {
        let (mut found, mut status) = (std::ptr::null_mut(), 0);
        // SAFETY: the pointers are to values of ours; the name ends with a NUL. The call does not keep them.
        let asked = unsafe { (self.get_proc_address)(name.as_ptr(), &raw mut found, version, 0, &raw mut status) };
        (asked == SUCCESS && !found.is_null()).then_some(found)
    }

    fn find_batch_copy(&self) -> Option<BatchCopy> {
        let name = c"cuMemcpyBatchAsync";
        if self.version >= 13000
            && let Some(found) = self.entry_point(name, 13000)
        {
            // SAFETY: the entry point of 13.0 has this signature (cuda.h 13.0); the pointer is not null.
            return Some(BatchCopy::V2(unsafe { std::mem::transmute::<*mut c_void, BatchV2>(found) }));
        }
        if self.version >= 12080
            && let Some(found) = self.entry_point(name, 12080)
        {
            // SAFETY: the entry point of 12.8 has this signature (cuda.h 12.8); the pointer is not null.
            return Some(BatchCopy::V1(unsafe { std::mem::transmute::<*mut c_void, BatchV1>(found) }));
        }
        None
    }
}

fn open(named: Option<&Path>) -> Result<(Library, PathBuf), Unavailable> {
    let names: Vec<PathBuf> = match named {
        Some(named) => vec![named.to_path_buf()],
        None => NAMES.iter().map(PathBuf::from).collect(),
    };
    let mut first = None;
    for name in names {
        // SAFETY: loading runs the library's constructors: it is the driver that this process uses anyway,
        // or what its operator has named.
        match unsafe { Library::new(&name) } {
            Ok(library) => return Ok((library, name)),
            Err(error) => {
                // The reason is in `source`; the first name tried is the one that says most.
                let text = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                first.get_or_insert(Unavailable::NoLibrary { tried: name, error: text });
            }
        }
    }
    Err(first.unwrap_or(Unavailable::NoDevice))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn without_a_driver_there_is_a_sentence() {
        let error = DriverApi::load(Some(Path::new("/nowhere/libcuda.so.1"))).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/nowhere/libcuda.so.1") && text.contains("cuda_driver"), "{text}");
    }

    #[test]
    fn what_is_no_driver_is_said_to_be_none() {
        let error = DriverApi::load(Some(Path::new("libc.so.6"))).unwrap_err();
        assert!(matches!(error, Unavailable::NoSymbol { symbol: "cuInit", .. }), "{error}");
        assert_eq!(DriverApi::find(Some(Path::new("libc.so.6"))).unwrap_err(), error);
    }
}
