//! One device's primary context, and what lives in it. The same context as the inference engine's: it is
//! retained, never created, never synchronized. Handles are numbers that nothing frees by itself: whoever
//! owns the end frees them, or leaves them to the end of the process.

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{
    CUDA_MEMCPY2D, CUcontext, CUctx_st, CUdevice, CUdevice_attribute, CUevent_st, CUfunc_st, CUmemLocation,
    CUmemLocationType, CUmemcpyAttributes, CUmemcpySrcAccessOrder, CUmemorytype, CUmod_st, CUpointer_attribute,
    CUstream_st,
};

use super::api::{BatchCopy, DriverApi, check};
use super::error::CudaError;

/// CU_STREAM_NON_BLOCKING: not ordered with the legacy default stream.
const STREAM_NON_BLOCKING: u32 = 1;
/// CU_EVENT_DISABLE_TIMING.
const EVENT_DISABLE_TIMING: u32 = 2;
/// CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP.
const REGISTER_PORTABLE_MAPPED: u32 = 1 | 2;
/// CU_STREAM_CAPTURE_MODE_RELAXED.
const CAPTURE_RELAXED: u32 = 2;

/// A stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub usize);
/// An event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event(pub usize);
/// A module's function, and the module.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    function: usize,
    module: usize,
}

fn handle<T>(number: usize) -> *mut T {
    std::ptr::with_exposed_provenance_mut(number)
}

/// A device's primary context.
pub struct Context {
    api: Arc<DriverApi>,
    raw: usize,
    device: CUdevice,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "device {} by {:?}", self.device, self.api)
    }
}

type Done<T = ()> = Result<T, CudaError>;

impl Context {
    /// Retains a device's primary context.
    ///
    /// # Errors
    /// No such device, or what the driver says.
    pub fn retain(api: Arc<DriverApi>, ordinal: i32) -> Done<Self> {
        let (mut device, mut raw): (CUdevice, CUcontext) = (0, std::ptr::null_mut());
        // SAFETY: the pointer is to a value of ours.
        check("cuDeviceGet", unsafe { (api.device_get)(&raw mut device, ordinal) })?;
        // SAFETY: as above; the device is one that the driver has named.
        check("cuDevicePrimaryCtxRetain", unsafe { (api.primary_context_retain)(&raw mut raw, device) })?;
        Ok(Self { api, raw: raw.expose_provenance(), device })
    }

    /// The driver.
    pub fn api(&self) -> &Arc<DriverApi> {
        &self.api
    }

    /// The device's name.
    pub fn device_name(&self) -> String {
        let mut bytes = [0u8; 128];
        // SAFETY: the buffer is of the length that is said.
        let asked = unsafe { (self.api.device_get_name)(bytes.as_mut_ptr().cast(), bytes.len() as i32, self.device) };
        match (asked, CStr::from_bytes_until_nul(&bytes)) {
            (0, Ok(name)) => name.to_string_lossy().into_owned(),
            _ => format!("device {}", self.device),
        }
    }

    /// An attribute of the device.
    ///
    /// # Errors
    /// What the driver says: it does not know the attribute.
    pub fn attribute(&self, attribute: CUdevice_attribute) -> Done<i32> {
        let mut value = 0;
        // SAFETY: the pointer is to a value of ours.
        let asked = unsafe { (self.api.device_get_attribute)(&raw mut value, attribute, self.device) };
        check("cuDeviceGetAttribute", asked).map(|()| value)
    }

    /// Makes it this thread's, for good; our calls disturb nobody's capture of a graph.
    ///
    /// # Errors
    /// What the driver says.
    pub fn make_current(&self) -> Done {
        // SAFETY: the context is retained for as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { (self.api.context_set_current)(handle::<CUctx_st>(self.raw)) })?;
        let mut mode = CAPTURE_RELAXED;
        // SAFETY: the pointer is to a value of ours.
        check("cuThreadExchangeStreamCaptureMode", unsafe { (self.api.exchange_capture_mode)(&raw mut mode) })
    }

    /// Runs something with the context current in a thread that has one of its own.
    ///
    /// # Errors
    /// What the driver or `run` says.
    pub fn within<T>(&self, run: impl FnOnce() -> Done<T>) -> Done<T> {
        // SAFETY: the context is retained for as long as `self` lives.
        check("cuCtxPushCurrent", unsafe { (self.api.context_push)(handle::<CUctx_st>(self.raw)) })?;
        // Our calls in the engine's thread neither end nor join a capture of another thread's.
        let mut mode = CAPTURE_RELAXED;
        // SAFETY: the pointer is to a value of ours.
        let exchanged = unsafe { (self.api.exchange_capture_mode)(&raw mut mode) };
        let done = run();
        if exchanged == 0 {
            // SAFETY: as above; the thread's own mode comes back.
            unsafe { (self.api.exchange_capture_mode)(&raw mut mode) };
        }
        let mut popped = std::ptr::null_mut();
        // SAFETY: the pointer is to a value of ours.
        let pop = check("cuCtxPopCurrent", unsafe { (self.api.context_pop)(&raw mut popped) });
        done.and_then(|value| pop.map(|()| value))
    }

    /// A stream of its own, of the highest priority if so asked.
    ///
    /// # Errors
    /// What the driver says.
    pub fn create_stream(&self, is_urgent: bool) -> Done<Stream> {
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the pointers are to values of ours.
        let asked = unsafe { (self.api.stream_priority_range)(&raw mut least, &raw mut greatest) };
        check("cuCtxGetStreamPriorityRange", asked)?;
        let mut stream = std::ptr::null_mut();
        let priority = if is_urgent { greatest } else { least };
        // SAFETY: as above.
        let made = unsafe { (self.api.stream_create)(&raw mut stream, STREAM_NON_BLOCKING, priority) };
        check("cuStreamCreateWithPriority", made).map(|()| Stream(stream.expose_provenance()))
    }

    /// Whether all that was submitted to a stream has been done.
    ///
    /// # Errors
    /// What has gone wrong in the context, here or elsewhere.
    pub fn is_idle(&self, stream: Stream) -> Done<bool> {
        // SAFETY: a stream of this context that has not been destroyed.
        ready("cuStreamQuery", unsafe { (self.api.stream_query)(handle::<CUstream_st>(stream.0)) })
    }

    /// Whether somebody captures a stream into a graph now.
    ///
    /// # Errors
    /// What the driver says.
    pub fn is_capturing(&self, stream: Stream) -> Done<bool> {
        let mut status = 0;
        // SAFETY: a stream of this context, by its owner's word; the pointer is to a value of ours.
        let asked = unsafe { (self.api.stream_is_capturing)(handle::<CUstream_st>(stream.0), &raw mut status) };
        check("cuStreamIsCapturing", asked).map(|()| status != 0)
    }

    /// What a stream is given from now on waits for an event, as it was last recorded.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait(&self, stream: Stream, event: Event) -> Done {
        // SAFETY: both are of this context and have not been destroyed.
        check("cuStreamWaitEvent", unsafe {
            (self.api.stream_wait_event)(handle::<CUstream_st>(stream.0), handle::<CUevent_st>(event.0), 0)
        })
    }

    /// An event.
    ///
    /// # Errors
    /// What the driver says.
    pub fn create_event(&self) -> Done<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the pointer is to a value of ours.
        let made = unsafe { (self.api.event_create)(&raw mut event, EVENT_DISABLE_TIMING) };
        check("cuEventCreate", made).map(|()| Event(event.expose_provenance()))
    }

    /// The event happens when all that was submitted to the stream has been done.
    ///
    /// # Errors
    /// What the driver says.
    pub fn record(&self, event: Event, stream: Stream) -> Done {
        // SAFETY: both are of this context and have not been destroyed.
        check("cuEventRecord", unsafe {
            (self.api.event_record)(handle::<CUevent_st>(event.0), handle::<CUstream_st>(stream.0))
        })
    }

    /// Whether an event has happened.
    ///
    /// # Errors
    /// What has gone wrong in the context.
    pub fn has_happened(&self, event: Event) -> Done<bool> {
        // SAFETY: an event of this context that has not been destroyed.
        ready("cuEventQuery", unsafe { (self.api.event_query)(handle::<CUevent_st>(event.0)) })
    }

    /// Device memory.
    ///
    /// # Errors
    /// There is not enough.
    pub fn alloc(&self, bytes: usize) -> Done<u64> {
        let mut address = 0;
        // SAFETY: the pointer is to a value of ours.
        check("cuMemAlloc", unsafe { (self.api.memory_alloc)(&raw mut address, bytes) }).map(|()| address)
    }

    /// Pinned host memory, mapped for the device: where it lies for us, and where for the device.
    ///
    /// # Errors
    /// There is not enough.
    pub fn alloc_host(&self, bytes: usize) -> Done<(*mut u8, u64)> {
        let mut address: *mut c_void = std::ptr::null_mut();
        // SAFETY: the pointer is to a value of ours.
        check("cuMemHostAlloc", unsafe { (self.api.host_alloc)(&raw mut address, bytes, REGISTER_PORTABLE_MAPPED) })?;
        match self.device_pointer(address.cast()) {
            Ok(device) => Ok((address.cast(), device)),
            Err(error) => {
                // SAFETY: it was allocated above, and nobody knows of it.
                unsafe { (self.api.host_free)(address) };
                Err(error)
            }
        }
    }

    /// Where pinned host memory lies for the device.
    ///
    /// # Errors
    /// It is not pinned.
    pub fn device_pointer(&self, host: *mut u8) -> Done<u64> {
        let mut address = 0;
        // SAFETY: the pointer is to a value of ours; the other is only looked up.
        let asked = unsafe { (self.api.host_device_pointer)(&raw mut address, host.cast(), 0) };
        check("cuMemHostGetDevicePointer", asked).map(|()| address)
    }

    /// Pins a range and maps it for the device: where it lies for the device.
    ///
    /// # Errors
    /// What the driver says: not enough memory to lock, or pinned already.
    ///
    /// # Safety
    /// The range stays mapped until [`Context::unregister`] has returned.
    pub unsafe fn register(&self, host: *mut u8, bytes: usize) -> Done<u64> {
        // SAFETY: the caller's promise.
        let made = unsafe { (self.api.host_register)(host.cast(), bytes, REGISTER_PORTABLE_MAPPED) };
        check("cuMemHostRegister", made)?;
        self.device_pointer(host).inspect_err(|_| {
            let _ = self.unregister(host);
        })
    }

    /// Unpins what was registered at this address.
    ///
    /// # Errors
    /// What the driver says.
    pub fn unregister(&self, host: *mut u8) -> Done {
        // SAFETY: the address is only looked up; copies in flight are the caller's affair.
        check("cuMemHostUnregister", unsafe { (self.api.host_unregister)(host.cast()) })
    }

    /// Whether an address is one of device memory that is there. A copy that does not say what its addresses are takes
    /// one that is not for the processor's, and the driver reads it: the end of the process.
    ///
    /// # Errors
    /// What has gone wrong in the context.
    pub fn is_device_memory(&self, address: u64) -> Done<bool> {
        let mut kind = 0u32;
        let attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // SAFETY: the pointer is to a value of ours, of the attribute's size; the address is only looked up.
        let asked = unsafe { (self.api.pointer_get_attribute)((&raw mut kind).cast(), attribute, address) };
        match asked {
            super::error::INVALID_VALUE => Ok(false),
            asked => check("cuPointerGetAttribute", asked).map(|()| kind == CUmemorytype::CU_MEMORYTYPE_DEVICE as u32),
        }
    }

    /// A copy in stream order, between pinned memory of the processor and memory of the device. Which of its addresses
    /// is which is said: a stale one of the device's is refused, and not taken for the processor's.
    ///
    /// # Errors
    /// What the driver says; then it is not under way.
    ///
    /// # Safety
    /// Both ranges are there, and are the copy's until it has been done.
    pub unsafe fn copy(&self, way: Way, host: usize, device: u64, bytes: u64, stream: Stream) -> Done {
        let (bytes, stream) = (bytes as usize, handle::<CUstream_st>(stream.0));
        match way {
            Way::ToDevice => {
                // SAFETY: the caller's promise.
                let copied = unsafe { (self.api.copy_to_device)(device, handle::<c_void>(host), bytes, stream) };
                check("cuMemcpyHtoDAsync", copied)
            }
            Way::ToHost => {
                // SAFETY: the caller's promise.
                let copied = unsafe { (self.api.copy_to_host)(handle::<c_void>(host), device, bytes, stream) };
                check("cuMemcpyDtoHAsync", copied)
            }
        }
    }

    /// Many copies, in stream order with what surrounds them and in none among themselves. `None`: this driver
    /// has no such call.
    ///
    /// # Errors
    /// What the driver says; then any of them may be under way.
    ///
    /// # Safety
    /// As [`Context::copy`], for each; and those of the device are its memory ([`Context::is_device_memory`]).
    pub unsafe fn copy_batch(&self, copies: &mut BatchArguments, stream: Stream) -> Option<Done> {
        let mut attributes = CUmemcpyAttributes {
            srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 },
            dstLocHint: CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 },
            flags: 0,
        };
        let BatchArguments { targets, sources, sizes } = copies;
        let (mut first, mut failed) = (0usize, 0usize);
        let stream = handle::<CUstream_st>(stream.0);
        let code = match self.api.batch_copy? {
            // SAFETY: the arrays are of the length that is said, one attribute covers them all from index 0
            // (cuda.h), and for the ranges the caller's promise.
            BatchCopy::V1(call) => unsafe {
                call(
                    targets.as_mut_ptr(),
                    sources.as_mut_ptr(),
                    sizes.as_mut_ptr(),
                    sizes.len(),
                    &raw mut attributes,
                    &raw mut first,
                    1,
                    &raw mut failed,
                    stream,
                )
            },
            // SAFETY: as above.
            BatchCopy::V2(call) => unsafe {
                call(
                    targets.as_mut_ptr(),
                    sources.as_mut_ptr(),
                    sizes.as_mut_ptr(),
                    sizes.len(),
                    &raw mut attributes,
                    &raw mut first,
                    1,
                    stream,
                )
            },
        };
        Some(check("cuMemcpyBatchAsync", code))
    }

    /// Rows at equal distances, in stream order.
    ///
    /// # Errors
    /// What the driver says; then it is not under way.
    ///
    /// # Safety
    /// As [`Context::copy`], for each row.
    pub unsafe fn copy_rows(&self, rows: &RowsArguments, stream: Stream) -> Done {
        let (here, there) = (CUmemorytype::CU_MEMORYTYPE_HOST, CUmemorytype::CU_MEMORYTYPE_DEVICE);
        let (host, device) = ((rows.host_pitch as usize, here), (rows.device_pitch as usize, there));
        let (source, target) = if rows.way == Way::ToDevice { (host, device) } else { (device, host) };
        // Of host and device the one is looked at that the type says.
        let arguments = CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: source.1,
            srcHost: handle::<c_void>(rows.host),
            srcDevice: rows.device,
            srcArray: std::ptr::null_mut(),
            srcPitch: source.0,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: target.1,
            dstHost: handle::<c_void>(rows.host),
            dstDevice: rows.device,
            dstArray: std::ptr::null_mut(),
            dstPitch: target.0,
            WidthInBytes: rows.bytes as usize,
            Height: rows.rows as usize,
        };
        // SAFETY: the structure is of ours; for the ranges the caller's promise.
        check("cuMemcpy2DAsync", unsafe { (self.api.copy_2d)(&raw const arguments, handle::<CUstream_st>(stream.0)) })
    }

    /// Writes a word when all that was submitted to the stream has been done and is visible to everybody.
    ///
    /// # Errors
    /// What the driver says: `NOT_SUPPORTED` where the device cannot.
    ///
    /// # Safety
    /// The word is pinned host or device memory, eight bytes aligned.
    pub unsafe fn write_word(&self, stream: Stream, word: u64, value: u64) -> Done {
        // SAFETY: the caller's promise. 0: with the fence for what came before (CU_STREAM_WRITE_VALUE_DEFAULT).
        check("cuStreamWriteValue64", unsafe {
            (self.api.stream_write_value64)(handle::<CUstream_st>(stream.0), word, value, 0)
        })
    }

    /// Loads a kernel out of PTX.
    ///
    /// # Errors
    /// What the driver says of the PTX.
    pub fn load_kernel(&self, ptx: &CStr, name: &CStr) -> Done<Kernel> {
        let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the text ends with a NUL; the pointer is to a value of ours.
        check("cuModuleLoadData", unsafe { (self.api.module_load)(&raw mut module, ptx.as_ptr().cast()) })?;
        // SAFETY: the module is loaded; the name ends with a NUL.
        let found = unsafe { (self.api.module_function)(&raw mut function, module, name.as_ptr()) };
        check("cuModuleGetFunction", found).inspect_err(|_| {
            // SAFETY: it was loaded above, and nobody knows of it.
            unsafe { (self.api.module_unload)(module) };
        })?;
        Ok(Kernel { function: function.expose_provenance(), module: module.expose_provenance() })
    }

    /// Launches `kvring_copy` over a list of pieces.
    ///
    /// # Errors
    /// What the driver says; then it is not under way.
    ///
    /// # Safety
    /// The list is in memory that the device reaches, stays as it is until the kernel has ended, and as
    /// [`Context::copy`] for each of its pieces.
    pub unsafe fn launch_copy(&self, kernel: Kernel, blocks: u32, pieces: u64, count: u32, stream: Stream) -> Done {
        let (mut pieces, mut count) = (pieces, count);
        let mut arguments: [*mut c_void; 2] = [(&raw mut pieces).cast(), (&raw mut count).cast()];
        // SAFETY: the kernel takes a pointer and a number (copy.cu), which are copied before the call returns;
        // for the memory the caller's promise.
        check("cuLaunchKernel", unsafe {
            (self.api.launch)(
                handle::<CUfunc_st>(kernel.function),
                blocks,
                1,
                1,
                THREADS_PER_BLOCK,
                1,
                1,
                0,
                handle::<CUstream_st>(stream.0),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }

    /// Frees what a back end had. Whatever fails stays: it is the end.
    pub fn free(&self, things: &Things) {
        for event in &things.events {
            // SAFETY: nothing waits for it any more: the caller has drained its streams.
            unsafe { (self.api.event_destroy)(handle::<CUevent_st>(event.0)) };
        }
        for stream in &things.streams {
            // SAFETY: as above.
            unsafe { (self.api.stream_destroy)(handle::<CUstream_st>(stream.0)) };
        }
        for kernel in &things.kernels {
            // SAFETY: as above; no launch of it is under way.
            unsafe { (self.api.module_unload)(handle::<CUmod_st>(kernel.module)) };
        }
        for address in &things.device_memory {
            // SAFETY: as above; no copy of it is under way.
            unsafe { (self.api.memory_free)(*address) };
        }
        for address in &things.host_memory {
            // SAFETY: as above.
            unsafe { (self.api.host_free)(handle::<c_void>(*address)) };
        }
    }

    /// Gives the primary context back.
    pub fn release(&self) {
        // SAFETY: it was retained once, by `retain`.
        unsafe { (self.api.primary_context_release)(self.device) };
    }
}

/// Which way a copy goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum Way {
    ToDevice,
    ToHost,
}

/// Threads of one block of the kernel: its launch bound.
pub const THREADS_PER_BLOCK: u32 = 512;

/// What has to be freed at the end.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub struct Things {
    pub streams: Vec<Stream>,
    pub events: Vec<Event>,
    pub kernels: Vec<Kernel>,
    pub device_memory: Vec<u64>,
    pub host_memory: Vec<usize>,
}

/// Arrays for [`Context::copy_batch`].
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "as in cuda.h")]
pub struct BatchArguments {
    pub targets: Vec<u64>,
    pub sources: Vec<u64>,
    pub sizes: Vec<usize>,
}

/// For [`Context::copy_rows`].
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub struct RowsArguments {
    pub way: Way,
    pub host: usize,
    pub host_pitch: u64,
    pub device: u64,
    pub device_pitch: u64,
    pub bytes: u64,
    pub rows: u32,
}

fn ready(call: &'static str, code: u32) -> Done<bool> {
    match code {
        super::error::NOT_READY => Ok(false),
        code => check(call, code).map(|()| true),
    }
}
