//! A CUDA driver without a GPU, to be loaded as `libcuda.so.1`: the calls that kvring makes, carried out by
//! threads on ordinary memory, in the least convenient way that the documentation allows.
//!
//! Copies of one batch run in an order drawn from a seed and in slices with pauses; what a stream has not
//! reached has not happened. An address of the device is no address of the processor: device memory and
//! registered memory appear shifted, so that whoever mixes them up is found out. Copies outside an
//! allocation or across two registrations are refused. Any call can be told to fail, sticky codes stop
//! everything, completion included. With `dma_process`, copies to the host are made by another process,
//! which goes on for a while after its client was killed, as a device may.
//!
//! [`Fake`] is the handle for tests: each has a copy of the library, and so a device of its own.

#![allow(unsafe_code, reason = "it is the other side of a C interface")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::missing_safety_doc,
    clippy::multiple_unsafe_ops_per_block,
    clippy::ptr_as_ptr,
    missing_docs,
    reason = "what each call asks for is said in cuda.h"
)]

mod device;
mod driver;

use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};

use libloading::{Library, Symbol};

/// Where device memory appears.
pub const DEVICE_SHIFT: usize = 1 << 60;
/// Where registered memory appears to the device.
pub const HOST_SHIFT: usize = 1 << 59;

/// A fake device of one test.
pub struct Fake {
    library: Library,
    path: PathBuf,
    _directory: Option<tempfile::TempDir>,
}

impl Fake {
    /// A device of its own.
    ///
    /// # Panics
    /// If the library was not built beside the test.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("libcuda.so.1");
        std::fs::copy(built(), &path).expect("the library lies beside the test");
        Self { _directory: Some(directory), ..Self::at(&path) }
    }

    /// The device of a library that lies here: for a process that is given a path.
    ///
    /// # Panics
    /// If there is none.
    pub fn at(path: &Path) -> Self {
        let library = unsafe { Library::new(path) }.expect("the fake driver loads");
        Self { library, path: path.to_path_buf(), _directory: None }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says how it behaves: see `device::Behaviour::set`.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn set(&self, what: &str, value: &str) -> &Self {
        let (what, value) = (CString::new(what).expect("no NUL"), CString::new(value).expect("no NUL"));
        let set: Symbol<'_, unsafe extern "C" fn(*const c_char, *const c_char) -> i32> =
            unsafe { self.library.get(b"fake_cuda_set") }.expect("it is the fake");
        assert_eq!(unsafe { set(what.as_ptr(), value.as_ptr()) }, 0, "{what:?} = {value:?} is not understood");
        self
    }

    /// How often a call was made.
    pub fn calls(&self, name: &str) -> u64 {
        let name = CString::new(name).expect("no NUL");
        let calls: Symbol<'_, unsafe extern "C" fn(*const c_char) -> u64> =
            unsafe { self.library.get(b"fake_cuda_calls") }.expect("it is the fake");
        unsafe { calls(name.as_ptr()) }
    }

    /// What no driver would survive: memory freed or unpinned while a copy of it was under way.
    pub fn crimes(&self) -> u64 {
        let crimes: Symbol<'_, unsafe extern "C" fn() -> u64> =
            unsafe { self.library.get(b"fake_cuda_crimes") }.expect("it is the fake");
        unsafe { crimes() }
    }

    /// Bytes that are pinned now.
    pub fn pinned_bytes(&self) -> u64 {
        let pinned: Symbol<'_, unsafe extern "C" fn() -> u64> =
            unsafe { self.library.get(b"fake_cuda_pinned_bytes") }.expect("it is the fake");
        unsafe { pinned() }
    }

    /// What somebody has: bytes of the device and pinned ones of the driver's, streams and events, counted together.
    pub fn held(&self) -> u64 {
        let held: Symbol<'_, unsafe extern "C" fn() -> u64> =
            unsafe { self.library.get(b"fake_cuda_held") }.expect("it is the fake");
        unsafe { held() }
    }

    /// Device memory: its address for the device.
    pub fn alloc(&self, bytes: usize) -> usize {
        let alloc: Symbol<'_, unsafe extern "C" fn(usize) -> usize> =
            unsafe { self.library.get(b"fake_cuda_alloc") }.expect("it is the fake");
        unsafe { alloc(bytes) }
    }

    /// Frees it.
    pub fn free(&self, address: usize) {
        let free: Symbol<'_, unsafe extern "C" fn(usize)> =
            unsafe { self.library.get(b"fake_cuda_free") }.expect("it is the fake");
        unsafe { free(address) }
    }

    /// The bytes of device memory, as they are now.
    pub fn read(&self, address: usize, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        unsafe { std::ptr::copy_nonoverlapping((address - DEVICE_SHIFT) as *const u8, read.as_mut_ptr(), bytes) };
        read
    }

    /// Writes device memory now, in no stream's order.
    pub fn write(&self, address: usize, bytes: &[u8]) {
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (address - DEVICE_SHIFT) as *mut u8, bytes.len()) };
    }

    /// A stream of the inference engine.
    pub fn compute_stream(&self) -> u64 {
        let stream: Symbol<'_, unsafe extern "C" fn() -> u64> =
            unsafe { self.library.get(b"fake_cuda_compute_stream") }.expect("it is the fake");
        unsafe { stream() }
    }

    /// Work of the inference engine: after `milliseconds`, in stream order, each byte of a range is `byte`.
    pub fn compute(&self, stream: u64, address: usize, bytes: usize, byte: u8, milliseconds: u64) {
        let compute: Symbol<'_, unsafe extern "C" fn(u64, usize, usize, u8, u64)> =
            unsafe { self.library.get(b"fake_cuda_compute") }.expect("it is the fake");
        unsafe { compute(stream, address, bytes, byte, milliseconds) }
    }
}

impl Default for Fake {
    fn default() -> Self {
        Self::new()
    }
}

/// The library, as cargo has built it beside whoever uses this crate.
fn built() -> PathBuf {
    let program = std::env::current_exe().expect("a program has a path");
    let directories = program.ancestors().skip(1).take(2);
    let candidates = directories.flat_map(|directory| [directory.to_path_buf(), directory.join("deps")]);
    candidates
        .map(|directory| directory.join("libkvring_fake_cuda.so"))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("no libkvring_fake_cuda.so beside {}", program.display()))
}
