//! The fake keeps its word, so that what a test finds is the engine's.

use std::ffi::{CString, c_void};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Once;

use super::*;

const SECTOR_BYTES: usize = 4096;
const SECTORS: u64 = 64;

/// A pair on a file of 64 sectors.
struct World {
    file: tempfile::NamedTempFile,
    controller: *mut c_void,
    qpair: *mut c_void,
}

fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        assert_eq!(connect("traddr:/dev/null"), Err(-libc::EINVAL), "too early");
        assert_eq!(kvring_spdk_env_init(&Env::default()), 0);
        assert_eq!(kvring_spdk_env_init(&Env::default()), -libc::EALREADY);
    });
}

fn connect(id: &str) -> Result<*mut c_void, i32> {
    let id = CString::new(id).unwrap();
    let mut controller = std::ptr::null_mut();
    // SAFETY: a string that ends with a zero, and room for an address.
    match unsafe { kvring_spdk_connect(id.as_ptr(), &mut controller) } {
        0 => Ok(controller),
        errno => Err(errno),
    }
}

impl World {
    fn new(words: &str, depth: u32) -> Self {
        init();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SECTORS * SECTOR_BYTES as u64).unwrap();
        let path = file.path().display();
        let id = format!("trtype:TCP adrfam:IPv4 traddr:{path} trsvcid:4420 subnqn:x {words}");
        let controller = connect(&id).unwrap();
        let mut qpair = std::ptr::null_mut();
        // SAFETY: room for an address.
        assert_eq!(unsafe { kvring_spdk_qpair_new(controller, 0, depth, &mut qpair) }, 0);
        Self { file, controller, qpair }
    }

    fn submit(&self, write: bool, memory: *mut c_void, sector: u64, tag: u64) -> i32 {
        // SAFETY: who calls keeps a sector of memory until it is polled or the pair is freed.
        unsafe { kvring_spdk_submit(self.qpair, write.into(), memory, sector, 1, tag) }
    }

    fn write(&self, bytes: &mut [u8], sector: u64, tag: u64) -> i32 {
        assert_eq!(bytes.len(), SECTOR_BYTES);
        self.submit(true, bytes.as_mut_ptr().cast(), sector, tag)
    }

    fn read(&self, bytes: &mut [u8], sector: u64, tag: u64) -> i32 {
        assert_eq!(bytes.len(), SECTOR_BYTES);
        self.submit(false, bytes.as_mut_ptr().cast(), sector, tag)
    }

    /// (tag, result) of what is over.
    fn poll(&self, max: u32) -> Result<Vec<(u64, i32)>, i32> {
        let mut done = vec![Done::default(); max as usize];
        // SAFETY: room for `max`.
        let said = unsafe { kvring_spdk_poll(self.qpair, done.as_mut_ptr(), max) };
        let said = usize::try_from(said).map_err(|_| said)?;
        Ok(done[..said].iter().map(|one| (one.tag, one.result)).collect())
    }

    fn end(self) {
        kvring_spdk_qpair_free(self.qpair);
        kvring_spdk_detach(self.controller);
    }
}

#[test]
fn what_is_written_is_read_and_not_before_a_poll() {
    let world = World::new("metadata:8", 8);
    let mut namespace = std::mem::MaybeUninit::<Namespace>::uninit();
    // SAFETY: room for the struct.
    assert_eq!(unsafe { kvring_spdk_namespace(world.controller, 0, namespace.as_mut_ptr()) }, 0);
    // SAFETY: the call said 0: it has written all of it.
    let namespace = unsafe { namespace.assume_init() };
    assert_eq!((namespace.bytes, namespace.sector_bytes), (SECTORS * SECTOR_BYTES as u64, SECTOR_BYTES as u32));
    assert_eq!((namespace.metadata_bytes, namespace.nsid), (8, 1));
    assert_eq!(&namespace.model[..12], b"kvring fake\0");

    let mut bytes = vec![7; SECTOR_BYTES];
    assert_eq!(world.write(&mut bytes, 3, 1), 0);
    assert!(std::fs::read(world.file.path()).unwrap().iter().all(|byte| *byte == 0), "nothing has moved");
    assert_eq!(world.poll(8), Ok(vec![(1, 0)]));
    assert_eq!(std::fs::read(world.file.path()).unwrap()[3 * SECTOR_BYTES..][..SECTOR_BYTES], bytes);

    let mut back = vec![0; SECTOR_BYTES];
    assert_eq!(world.read(&mut back, 3, 2), 0);
    assert_eq!(kvring_spdk_flush(world.qpair, 3), 0);
    assert_eq!(world.read(&mut bytes, SECTORS, 4), 0);
    assert_eq!(world.poll(8), Ok(vec![(4, -libc::EINVAL), (3, 0)]), "beyond the end");
    assert_eq!(world.poll(8), Ok(vec![(2, 0)]));
    assert_eq!(back, bytes);

    // 1 + 125 sectors are 516096 bytes: one unit, and a rest.
    for _ in 0..125 {
        assert_eq!(world.write(&mut bytes, 0, 0), 0);
        assert_eq!(world.poll(8), Ok(vec![(0, 0)]));
    }
    let mut page = [0xFFu8; 512];
    // SAFETY: room for 512 bytes.
    assert_eq!(unsafe { kvring_spdk_health(world.controller, page.as_mut_ptr().cast()) }, 0);
    assert_eq!((u16::from_le_bytes([page[1], page[2]]), page[3], page[5], page[48]), (310, 100, 3, 1));
    assert!(page[49..].iter().all(|byte| *byte == 0));
    world.end();
    assert_eq!(connect("trtype:TCP traddr:/no/such/file"), Err(-libc::ENXIO));
}

#[test]
fn the_newest_ends_first_and_a_failure_cancels_what_is_left() {
    let mut bytes = vec![1; SECTOR_BYTES];
    let world = World::new("fail_after:7", 5);
    for tag in 1..=5 {
        assert_eq!(world.write(&mut bytes, tag, tag), 0);
    }
    assert_eq!(world.write(&mut bytes, 6, 6), -libc::EAGAIN);
    assert_eq!(world.poll(9), Ok(vec![(5, 0), (4, 0), (3, 0)]));
    assert_eq!(world.write(&mut bytes, 6, 6), 0);
    assert_eq!(world.poll(1), Ok(vec![(6, 0)]));
    assert_eq!(world.write(&mut bytes, 7, 7), 0, "the seventh that it takes");
    assert_eq!(world.write(&mut bytes, 8, 8), -libc::ENXIO);
    assert_eq!(world.poll(9), Err(-libc::ENXIO));
    assert_eq!(world.poll(9), Ok(vec![(7, -libc::ECANCELED), (2, -libc::ECANCELED)]));
    assert_eq!(world.poll(9), Ok(vec![(1, -libc::ECANCELED)]));
    assert_eq!(world.poll(9), Err(-libc::ENXIO));
    assert_eq!(kvring_spdk_flush(world.qpair, 9), -libc::ENXIO);
    let file = std::fs::read(world.file.path()).unwrap();
    let written: Vec<usize> = (0..SECTORS as usize).filter(|sector| file[sector * SECTOR_BYTES] == 1).collect();
    assert_eq!(written, [3, 4, 5, 6]);
    world.end();

    let world = World::new("error_every:2 hang_after:3", 8);
    for tag in 1..=4 {
        assert_eq!(world.read(&mut bytes, 0, tag), 0);
    }
    assert_eq!(world.poll(9), Ok(vec![(3, 0), (2, -libc::EIO)]));
    assert_eq!(world.poll(9), Ok(vec![(1, 0)]));
    assert_eq!(world.poll(9), Ok(vec![]), "it hangs");
    world.end();
}

#[test]
fn a_device_that_needs_dma_refuses_memory_that_it_does_not_know() {
    let world = World::new("need_dma", 8);
    let mut bytes = vec![1; SECTOR_BYTES];
    assert_eq!(world.write(&mut bytes, 0, 0), -libc::EFAULT);

    let dma = kvring_spdk_dma_alloc(2 * SECTOR_BYTES as u64);
    assert!(!dma.is_null() && dma.addr().is_multiple_of(4096));
    assert_eq!(world.submit(true, dma.wrapping_byte_add(SECTOR_BYTES), 0, 1), 0);
    assert_eq!(world.submit(true, dma.wrapping_byte_add(SECTOR_BYTES + 512), 0, 2), -libc::EFAULT, "half of it");
    assert_eq!(world.poll(8), Ok(vec![(1, 0)]));
    // SAFETY: of `dma_alloc`, and nothing is in flight.
    unsafe { kvring_spdk_dma_free(dma) };
    assert_eq!(world.submit(true, dma, 0, 3), -libc::EFAULT);

    let mut memory = vec![2u8; 4 << 20];
    let region = memory.as_mut_ptr().map_addr(|at| at.next_multiple_of(2 << 20)).cast::<c_void>();
    assert_eq!(kvring_spdk_memory_register(region.wrapping_byte_add(4096), 2 << 20, -1, 0), -libc::EINVAL);
    assert_eq!(kvring_spdk_memory_register(region, 2 << 20, -1, 0), 0);
    assert_eq!(kvring_spdk_memory_register(region, 2 << 20, -1, 0), -libc::EBUSY);
    assert_eq!(world.submit(true, region, 5, 4), 0);
    assert_eq!(world.poll(8), Ok(vec![(4, 0)]));
    assert_eq!(std::fs::read(world.file.path()).unwrap()[5 * SECTOR_BYTES], 2);
    world.end();
}

#[test]
fn misuse_ends_the_process() {
    let me = "test::misuse_ends_the_process";
    if let Ok(misuse) = std::env::var("FAKE_SPDK_MISUSE") {
        return commit(&misuse);
    }
    let misuses = [
        ("detach", "a controller is detached, and has pairs"),
        ("free twice", "a pair is freed that was freed"),
        ("use after free", "a pair is used that was freed"),
        ("two threads", "a pair is used by two threads at the same time"),
    ];
    for (misuse, message) in misuses {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", me]).env("FAKE_SPDK_MISUSE", misuse).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{misuse}: {said}");
        assert!(said.contains(message), "{misuse}: {said}");
    }
    let allowed = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", me])
        .env("FAKE_SPDK_MISUSE", "none: freed with a command in flight")
        .output()
        .unwrap();
    assert!(allowed.status.success(), "{}", String::from_utf8_lossy(&allowed.stderr));
}

fn commit(misuse: &str) {
    let world = World::new("", 8);
    let mut memory = vec![2u8; 4 << 20];
    let region = memory.as_mut_ptr().map_addr(|at| at.next_multiple_of(2 << 20)).cast::<c_void>();
    assert_eq!(kvring_spdk_memory_register(region, 2 << 20, -1, 0), 0);
    assert_eq!(world.submit(false, region, 5, 4), 0);
    match misuse {
        "detach" => kvring_spdk_detach(world.controller),
        "free twice" => {
            kvring_spdk_qpair_free(world.qpair);
            kvring_spdk_qpair_free(world.qpair);
        }
        "use after free" => {
            kvring_spdk_qpair_free(world.qpair);
            let _ = world.poll(1);
        }
        "two threads" => {
            let qpair = world.qpair.addr();
            let poll = move || {
                for _ in 0..50_000_000 {
                    let mut done = Done::default();
                    // SAFETY: room for one.
                    unsafe { kvring_spdk_poll(std::ptr::without_provenance_mut(qpair), &mut done, 1) };
                }
            };
            std::thread::spawn(poll);
            poll();
        }
        _ => {
            kvring_spdk_qpair_free(world.qpair);
            kvring_spdk_detach(world.controller);
        }
    }
}
