//! The calls, as `spdk/shim/kvring_spdk.h` has them.

use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::{Controller, REGISTRY, Work};
use crate::{die, lock, memory};

const ABI: u32 = 1;
/// The one namespace.
const NSID: u32 = 1;
/// What NVMe counts writes in: a thousand units of 512 bytes.
const DATA_UNIT_BYTES: u64 = 512_000;
const HEALTH_BYTES: usize = 512;

static IS_INITIALISED: AtomicBool = AtomicBool::new(false);

/// `struct kvring_spdk_env`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Env {
    /// DPDK memory without hugepages.
    pub no_huge: u32,
    /// Look at no PCI device.
    pub no_pci: u32,
    /// DPDK memory.
    pub memory_mib: u32,
    /// The CPU that the environment thinks it runs on.
    pub cpu: u32,
}

/// `struct kvring_spdk_namespace`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Namespace {
    /// All of it.
    pub bytes: u64,
    /// Of one sector, without metadata.
    pub sector_bytes: u32,
    /// Of one sector.
    pub metadata_bytes: u32,
    /// Of one command.
    pub transfer_bytes_max: u32,
    /// Never 0 when given out.
    pub nsid: u32,
    /// Zero-terminated, as the next two.
    pub serial: [u8; 24],
    /// The name of the product.
    pub model: [u8; 44],
    /// Its revision.
    pub firmware: [u8; 12],
}

/// `struct kvring_spdk_done`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// As submitted.
    pub tag: u64,
    /// 0, or a negative errno.
    pub result: i32,
    /// 0.
    pub reserved: u32,
}

// 4 x 4; 8 + 4 x 4 + 24 + 44 + 12; 8 + 2 x 4.
const _: () = assert!(size_of::<Env>() == 16 && size_of::<Namespace>() == 104 && size_of::<Done>() == 16);

/// 1, or what `KVRING_FAKE_SPDK_ABI` says.
#[unsafe(no_mangle)]
pub extern "C" fn kvring_spdk_abi() -> u32 {
    let Some(number) = std::env::var_os("KVRING_FAKE_SPDK_ABI") else { return ABI };
    let number = number.to_str().and_then(|number| number.parse().ok());
    number.unwrap_or_else(|| die("KVRING_FAKE_SPDK_ABI is no number"))
}

/// `fake`.
#[unsafe(no_mangle)]
pub extern "C" fn kvring_spdk_version() -> *const c_char {
    c"fake".as_ptr()
}

/// `-EALREADY` if it was called before.
#[unsafe(no_mangle)]
pub extern "C" fn kvring_spdk_env_init(env: *const Env) -> i32 {
    if env.is_null() {
        return -libc::EINVAL;
    }
    // AcqRel: pairs with itself, and with the Acquire in `is_initialised`.
    if IS_INITIALISED.swap(true, Ordering::AcqRel) { -libc::EALREADY } else { 0 }
}

fn is_initialised() -> bool {
    // Acquire: pairs with the swap in `kvring_spdk_env_init`.
    IS_INITIALISED.load(Ordering::Acquire)
}

/// `-EINVAL` if it is not in whole 2 MiB pages, `-EBUSY` if some of it is registered. The file is not looked at.
#[unsafe(no_mangle)]
pub extern "C" fn kvring_spdk_memory_register(memory: *mut c_void, bytes: u64, _fd: i32, _offset: u64) -> i32 {
    if !is_initialised() {
        return -libc::EINVAL;
    }
    memory::with(|all| all.register(memory.expose_provenance(), bytes as usize))
}

/// Aligned to 4096, and full of bytes that are not zero.
#[unsafe(no_mangle)]
pub extern "C" fn kvring_spdk_dma_alloc(bytes: u64) -> *mut c_void {
    if !is_initialised() {
        return std::ptr::null_mut();
    }
    std::ptr::with_exposed_provenance_mut(memory::with(|all| all.allocate(bytes as usize)))
}

/// Nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvring_spdk_dma_free(memory: *mut c_void) {
    if !memory.is_null() {
        memory::with(|all| all.free(memory.addr()));
    }
}

/// Opens the file: `-ENXIO` if that cannot be, `-EINVAL` if the id is wrong or it is too early.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvring_spdk_connect(transport_id: *const c_char, controller: *mut *mut c_void) -> i32 {
    if !is_initialised() || transport_id.is_null() || controller.is_null() {
        return -libc::EINVAL;
    }
    // SAFETY: not NULL, and the caller has ended it with a zero.
    let Ok(id) = unsafe { CStr::from_ptr(transport_id) }.to_str() else { return -libc::EINVAL };
    match Controller::connect(id) {
        Ok(new) => {
            let handle = lock(&REGISTRY).attach(new);
            // SAFETY: not NULL, and the caller has room for one address there.
            unsafe { controller.write(std::ptr::without_provenance_mut(handle)) };
            0
        }
        Err(errno) => errno,
    }
}

/// The controller of a file does not fail.
#[unsafe(no_mangle)]
pub extern "C" fn kvring_spdk_poll_admin(controller: *mut c_void) -> i32 {
    // For the check that it is there.
    lock(&REGISTRY).controller(controller.addr());
    0
}

/// Ends the process if a pair is left.
#[unsafe(no_mangle)]
pub extern "C" fn kvring_spdk_detach(controller: *mut c_void) {
    lock(&REGISTRY).detach(controller.addr());
}

/// `-ENODEV` but for 0 and 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvring_spdk_namespace(controller: *mut c_void, nsid: u32, out: *mut Namespace) -> i32 {
    let controller = lock(&REGISTRY).controller(controller.addr());
    if out.is_null() {
        return -libc::EINVAL;
    }
    if nsid > NSID {
        return -libc::ENODEV;
    }
    let namespace = Namespace {
        bytes: controller.bytes(),
        sector_bytes: controller.sector_bytes(),
        metadata_bytes: controller.metadata_bytes(),
        transfer_bytes_max: 131_072,
        nsid: NSID,
        serial: text("FAKE"),
        model: text("kvring fake"),
        firmware: text("1"),
    };
    // SAFETY: not NULL, and the caller has room for the struct there.
    unsafe { out.write(namespace) };
    0
}

/// A page of 512 bytes: 310 K, all of the spare left, 3 % used, and what was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvring_spdk_health(controller: *mut c_void, page: *mut c_void) -> i32 {
    let controller = lock(&REGISTRY).controller(controller.addr());
    if page.is_null() {
        return -libc::EINVAL;
    }
    let mut health = [0u8; HEALTH_BYTES];
    health[1..3].copy_from_slice(&310u16.to_le_bytes());
    health[3] = 100;
    health[5] = 3;
    let units = u128::from(controller.written_bytes() / DATA_UNIT_BYTES);
    health[48..64].copy_from_slice(&units.to_le_bytes());
    // SAFETY: not NULL, and the caller has room for 512 bytes there; an array of bytes is aligned everywhere.
    unsafe { page.cast::<[u8; HEALTH_BYTES]>().write(health) };
    0
}

/// `-ENODEV` but for 0 and 1, `-EINVAL` for a pair in which nothing has room.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvring_spdk_qpair_new(
    controller: *mut c_void,
    nsid: u32,
    depth: u32,
    qpair: *mut *mut c_void,
) -> i32 {
    if depth == 0 || qpair.is_null() {
        return -libc::EINVAL;
    }
    if nsid > NSID {
        return -libc::ENODEV;
    }
    let handle = lock(&REGISTRY).new_qpair(controller.addr(), depth);
    // SAFETY: not NULL, and the caller has room for one address there.
    unsafe { qpair.write(std::ptr::without_provenance_mut(handle)) };
    0
}

/// Forgets what is in flight.
#[unsafe(no_mangle)]
pub extern "C" fn kvring_spdk_qpair_free(qpair: *mut c_void) {
    lock(&REGISTRY).free_qpair(qpair.addr());
}

/// Takes a transfer; `poll` carries it out.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvring_spdk_submit(
    qpair: *mut c_void,
    write: i32,
    memory: *mut c_void,
    sector: u64,
    sectors: u32,
    tag: u64,
) -> i32 {
    let qpair = lock(&REGISTRY).qpair(qpair.addr());
    qpair.submit(Work::Move { write: write != 0, start: memory.expose_provenance(), sector, sectors }, tag)
}

/// Takes a flush: a command as the others, without memory.
#[unsafe(no_mangle)]
pub extern "C" fn kvring_spdk_flush(qpair: *mut c_void, tag: u64) -> i32 {
    let qpair = lock(&REGISTRY).qpair(qpair.addr());
    qpair.submit(Work::Flush, tag)
}

/// Newest first, and at most half of what is in flight, rounded up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvring_spdk_poll(qpair: *mut c_void, done: *mut Done, max: u32) -> i32 {
    if done.is_null() && max > 0 {
        return -libc::EINVAL;
    }
    let qpair = lock(&REGISTRY).qpair(qpair.addr());
    qpair.poll(max, |index, one| {
        // SAFETY: `index < max` (`Qpair::poll` says no more), and the caller has room for `max` there.
        let place = unsafe { done.add(index) };
        // SAFETY: `place` lies in the caller's array, by the line above.
        unsafe { place.write(one) };
    })
}

/// Zero-terminated: the text is shorter than its place.
fn text<const N: usize>(text: &str) -> [u8; N] {
    let mut place = [0; N];
    place[..text.len()].copy_from_slice(text.as_bytes());
    place
}
