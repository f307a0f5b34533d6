//! One conformance suite over every device: what `Device` promises, io_uring, libaio, NVMe commands and `sim` keep, on
//! files, on loop and zram devices where they can be had, and on the block devices that `KVRING_TEST_DEVICES` names
//! (separated by `;`): what lies on those is destroyed. SPDK's back end runs over the fake of its shim; over a real SPDK if
//! `KVRING_TEST_SPDK` names addresses of it (separated by `;`) and `KVRING_SPDK_LIBRARY` the shim.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvring_engine::device::aio::Aio;
use kvring_engine::device::medium::{Access, Medium};
use kvring_engine::device::nvme::Nvme;
use kvring_engine::device::sim::{Faults, Sim};
use kvring_engine::device::spdk::Spdk;
use kvring_engine::device::uring::{self, Finds, RingOptions, Uring};
use kvring_engine::device::{Device, DeviceMemory, Direction, Done, Io, Region};
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};
use rustix::io::Errno;

/// So small that any kernel takes it in commands: before 6.12 each of its pages is a segment.
const PIECE: usize = 256 << 10;
const POOL: usize = 2 * PIECE;
const FILE: u64 = 4 << 20;
const SECTOR: u32 = 4096;

fn mapping(bytes: usize) -> Arc<Mapping> {
    let fd = sealed_memfd("test", bytes as u64, Pages::Small).unwrap();
    Arc::new(Mapping::new(&fd, bytes).unwrap())
}

fn memory() -> DeviceMemory {
    DeviceMemory { pool: mapping(POOL), headers: mapping(65536), piece_bytes: PIECE }
}

/// Memory that a device moves bytes to by itself, as PCIe does: hugepages, registered whole.
fn dma_memory() -> (DeviceMemory, Option<OwnedFd>) {
    const HUGEPAGE: usize = 2 << 20;
    let fd = sealed_memfd("test", HUGEPAGE as u64, Pages::Huge2M).unwrap();
    let pool = Arc::new(Mapping::new(&fd, HUGEPAGE).unwrap());
    (DeviceMemory { pool, headers: mapping(65536), piece_bytes: HUGEPAGE }, Some(fd))
}

/// What a device lies on while a test runs.
struct Platter {
    media: Vec<Medium>,
    /// Bytes of each.
    bytes: u64,
    dir: Option<tempfile::TempDir>,
    /// What takes it away again.
    undo: Option<[String; 3]>,
}

impl Drop for Platter {
    fn drop(&mut self) {
        if let Some([program, flag, device]) = &self.undo {
            let _ = Command::new(program).args([flag, device]).output();
        }
    }
}

impl Platter {
    /// Two files for direct I/O, in directories on a real file system: beside the build, not in /tmp, which may be a tmpfs.
    fn files() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let medium = |n: u32| {
            let medium = Medium::Directory(dir.path().join(n.to_string()));
            std::fs::create_dir(medium.path()).unwrap();
            std::fs::write(medium.path_of(0), vec![0; FILE as usize]).unwrap();
            medium
        };
        Self { media: (0..2).map(medium).collect(), bytes: FILE, undo: None, dir: Some(dir) }
    }

    /// A block device that lies on a file.
    fn on_loop() -> Result<Self, String> {
        let mut files = Self::files();
        let file = files.media[0].path_of(0);
        let device = told("losetup", &["--find", "--show", "--direct-io=on", file.to_str().unwrap()])?;
        let undo = ["losetup".into(), "--detach".into(), device.clone()];
        Ok(Self::device(device.as_ref(), files.dir.take(), Some(undo)))
    }

    /// A block device in memory.
    fn on_zram() -> Result<Self, String> {
        let device = told("zramctl", &["--find", "--size", &FILE.to_string()])?;
        let undo = ["zramctl".into(), "--reset".into(), device.clone()];
        Ok(Self::device(device.as_ref(), None, Some(undo)))
    }

    fn device(path: &Path, dir: Option<tempfile::TempDir>, undo: Option<[String; 3]>) -> Self {
        let medium = Medium::of(path).unwrap();
        Self { bytes: medium.device_bytes().unwrap(), media: vec![medium], undo, dir }
    }

    /// A namespace of the fake SPDK, with these words in its address.
    fn fake_spdk(words: &str) -> Self {
        let mut files = Self::files();
        let file = files.media[0].path_of(0);
        let address = format!("trtype:TCP adrfam:IPv4 traddr:{} trsvcid:4420 subnqn:x {words}", file.display());
        Self::device(Path::new(&address), files.dir.take(), None)
    }

    fn open(&self) -> Vec<OwnedFd> {
        self.media.iter().map(|medium| medium.open_for_io(0).unwrap().into()).collect()
    }
}

/// What a program says, if it can do what it is told.
fn told(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(format!("{program}: {}", text(&output.stderr))) }
}

struct Case {
    name: String,
    device: Box<dyn Device>,
    memory: DeviceMemory,
    /// Where its bytes lie, unless it is simulated.
    platter: Option<Platter>,
}

impl Case {
    /// Of the places that a test uses, those on a second file are elsewhere on the only one.
    fn place(&self, file: u16, offset: u64) -> (u16, u64) {
        let has = self.platter.as_ref().map_or(2, |platter| platter.media.len());
        if usize::from(file) < has { (file, offset) } else { (0, offset + (1 << 20)) }
    }
    fn bytes(&self) -> u64 {
        self.platter.as_ref().map_or(FILE, |platter| platter.bytes)
    }
}

/// io_uring and libaio over what `platter` makes, in every way they have; and NVMe commands, where they are taken.
fn over(kind: &str, platter: impl Fn() -> Platter, depth: u32, cases: &mut Vec<Case>) {
    let mut add = |name: &str, device: Box<dyn Device>, memory: DeviceMemory, platter: Platter| {
        cases.push(Case { name: format!("{name} on {kind}"), device, memory, platter: Some(platter) });
    };
    let (on, memory) = (platter(), self::memory());
    add("aio", Box::new(Aio::new(on.open(), memory.clone(), depth).unwrap()), memory, on);
    if let Err(error) = uring::probe() {
        return println!("skipped: {error}");
    }
    let plain = RingOptions::plain(depth, true);
    let ways = [
        ("uring", plain),
        ("uring without fixed buffers", RingOptions { fixed_buffers: false, ..plain }),
        ("uring with a kernel thread", RingOptions { sq_poll: true, ..plain }),
        ("polled uring", RingOptions { io_poll: true, ..plain }),
        ("polled uring with a kernel thread", RingOptions { io_poll: true, sq_poll: true, ..plain }),
    ];
    for (name, options) in ways {
        let (on, memory) = (platter(), self::memory());
        if options.io_poll
            && let Err(why) = uring::can_poll(&on.media[0], &on.open())
        {
            println!("skipped: {name} on {kind}: {why}");
            continue;
        }
        let mut device = Uring::new(on.open(), None, memory.clone(), options, Finds::AnyWay).unwrap();
        (0..2).for_each(|piece| device.register_piece(piece).unwrap());
        add(name, Box::new(device), memory, on);
    }
    let ways = [
        ("commands", plain),
        ("commands without fixed buffers", RingOptions { fixed_buffers: false, ..plain }),
        ("commands with a kernel thread", RingOptions { sq_poll: true, ..plain }),
        ("polled commands", RingOptions { io_poll: true, ..plain }),
    ];
    for (name, options) in ways {
        let (on, memory) = (platter(), self::memory());
        let mut left_out = Vec::new();
        match Nvme::new(&on.media[0], None, memory.clone(), options, &mut left_out) {
            Ok(_) if !left_out.is_empty() => println!("skipped: {name} on {kind}: {left_out:?}"),
            Ok(mut device) => {
                (0..2).for_each(|piece| device.register_piece(piece).unwrap());
                add(name, Box::new(device), memory, on);
            }
            Err(error) => println!("skipped: {name} on {kind}: {error}"),
        }
    }
}

/// All cases of a test, which has the devices for itself: a block device is one, and another test's too.
struct Cases {
    // Dropped before the next test's turn comes.
    cases: Vec<Case>,
    _turn: MutexGuard<'static, ()>,
}

impl Cases {
    fn take(&mut self) -> Vec<Case> {
        std::mem::take(&mut self.cases)
    }
}

static TURN: Mutex<()> = Mutex::new(());

/// Has SPDK be the fake, or a real one at the addresses that are said.
fn begin_spdk() -> Option<String> {
    let addresses = std::env::var("KVRING_TEST_SPDK").ok();
    let real = std::env::var_os("KVRING_SPDK_LIBRARY").filter(|_| addresses.is_some());
    let library = real.map_or_else(kvring_fake_spdk::built, PathBuf::from);
    let no_huge = !addresses.as_ref().is_some_and(|addresses| addresses.contains("PCIe"));
    kvring_spdk::set_library(kvring_spdk::EnvOptions { library, no_huge, ..kvring_spdk::EnvOptions::default() });
    addresses
}

fn every_device(depth: u32) -> Cases {
    // A test that failed has said so.
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut cases: Vec<Case> = Vec::new();
    let sim = memory();
    let platter = vec![vec![0; FILE as usize]; 2];
    let device = Box::new(Sim::new(platter, sim.clone(), depth, 1000, Faults::default(), 1));
    cases.push(Case { name: "sim".into(), device, memory: sim, platter: None });
    over("files", Platter::files, depth, &mut cases);
    for (kind, make) in [("loop", Platter::on_loop as fn() -> _), ("zram", Platter::on_zram)] {
        match make() {
            Ok(platter) => {
                drop(platter);
                over(kind, || make().unwrap(), depth, &mut cases);
            }
            Err(why) => println!("skipped: {kind}: {why}"),
        }
    }
    let mut by_spdk = |kind: &str, platter: Platter| {
        let moves_by_itself = kind.contains("PCIe") || kind.contains("VFIOUSER");
        let (memory, hugepages) = if moves_by_itself { dma_memory() } else { (memory(), None) };
        let address = platter.media[0].address().unwrap();
        let mut device = Spdk::new(address, memory.clone(), hugepages, depth).unwrap();
        (0..memory.pool.bytes() / memory.piece_bytes).for_each(|piece| device.register_piece(piece as u32).unwrap());
        let name = format!("SPDK on {kind}");
        cases.push(Case { name, device: Box::new(device), memory, platter: Some(platter) });
    };
    match begin_spdk() {
        Some(addresses) => {
            for address in addresses.split(';') {
                by_spdk(address, Platter::device(address.as_ref(), None, None));
            }
        }
        None => {
            for words in ["sector:4096", "sector:512"] {
                by_spdk(&format!("a file, {words}"), Platter::fake_spdk(words));
            }
        }
    }
    let named = std::env::var("KVRING_TEST_DEVICES").unwrap_or_default();
    for path in named.split(';').filter(|path| !path.is_empty()).map(PathBuf::from) {
        over(&path.display().to_string(), || Platter::device(&path, None, None), depth, &mut cases);
    }
    let names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    println!("{} devices: {}", names.len(), names.join(", "));
    Cases { cases, _turn: turn }
}

fn io(tag: u32, direction: Direction, file: u16, offset_in_file: u64, offset_in_region: usize, bytes: u32) -> Io {
    Io { tag, direction, file, offset_in_file, region: Region::Pool, offset_in_region, bytes }
}

/// Waits for `count` transfers: a device may take its time, but not for ever.
fn wait(device: &mut dyn Device, count: usize) -> Vec<Done> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let (mut done, mut now_ns) = (Vec::new(), 1);
    device.flush();
    while done.len() < count {
        now_ns += 1000;
        device.poll(now_ns, 64, &mut done);
        assert!(Instant::now() < deadline, "{} of {count} transfers came back", done.len());
    }
    done.sort_by_key(|done| done.tag);
    done
}

#[test]
fn what_is_written_is_read_back_from_its_own_place() {
    let mut all = every_device(8);
    for mut case in all.take() {
        let (name, memory) = (case.name.clone(), case.memory.clone());
        let pattern = |n: u8| -> Vec<u8> { (0..SECTOR).map(|i| n ^ i as u8).collect() };
        let places = [(0u16, 0u64), (1, 0), (0, case.bytes() - u64::from(SECTOR)), (1, 12 * 4096)];
        let places = places.map(|(file, offset)| case.place(file, offset));
        for (n, (file, offset)) in (0..).zip(places) {
            memory.pool.copy_in(n as usize * 4096, &pattern(n));
            case.device.submit(io(u32::from(n), Direction::Write, file, offset, n as usize * 4096, SECTOR)).unwrap();
        }
        let done = wait(&mut *case.device, 4);
        assert_eq!(
            done.iter().map(|d| (d.tag, d.result)).collect::<Vec<_>>(),
            (0..4).map(|n| (n, Ok(SECTOR))).collect::<Vec<_>>(),
            "{name}"
        );
        // Back into the second piece, in another order.
        for (n, (file, offset)) in (0u8..4).zip(places).rev() {
            case.device
                .submit(io(u32::from(n), Direction::Read, file, offset, PIECE + n as usize * 4096, SECTOR))
                .unwrap();
        }
        wait(&mut *case.device, 4);
        for n in 0..4u8 {
            let mut bytes = vec![0; 4096];
            memory.pool.copy_out(PIECE + n as usize * 4096, &mut bytes);
            assert_eq!(bytes, pattern(n), "{name}: place {n}");
        }
        assert_eq!(case.device.inflight(), 0);
    }
}

#[test]
fn the_header_region_is_another_memory() {
    let mut all = every_device(8);
    for mut case in all.take() {
        let (name, memory) = (case.name.clone(), case.memory.clone());
        memory.headers.copy_in(4096, &[7; 4096]);
        let header = Io { region: Region::Headers, ..io(0, Direction::Write, 0, 8192, 4096, SECTOR) };
        case.device.submit(header).unwrap();
        assert_eq!(wait(&mut *case.device, 1)[0].result, Ok(SECTOR), "{name}");
        case.device.submit(io(1, Direction::Read, 0, 8192, 0, SECTOR)).unwrap();
        wait(&mut *case.device, 1);
        let mut bytes = [0; 4096];
        memory.pool.copy_out(0, &mut bytes);
        assert_eq!(bytes, [7; 4096], "{name}");
    }
}

#[test]
fn beyond_its_depth_a_transfer_is_given_back_whole() {
    let mut all = every_device(4);
    for mut case in all.take() {
        let name = case.name.clone();
        let one = |tag| io(tag, Direction::Read, 0, u64::from(tag) * 4096, tag as usize * 4096, SECTOR);
        for tag in 0..4 {
            case.device.submit(one(tag)).unwrap();
        }
        assert_eq!(case.device.submit(one(9)), Err(one(9)), "{name}");
        assert_eq!(wait(&mut *case.device, 4).len(), 4);
        case.device.submit(one(9)).unwrap();
        assert_eq!(wait(&mut *case.device, 1)[0].tag, 9, "{name}");
    }
}

#[test]
fn the_end_of_a_file_is_short_or_an_error_and_never_whole() {
    let mut all = every_device(4);
    for mut case in all.take() {
        let name = case.name.clone();
        case.device.submit(io(0, Direction::Read, 0, case.bytes() - 4096, 0, 2 * SECTOR)).unwrap();
        case.device.submit(io(1, Direction::Read, 0, case.bytes() + 4096, 0, SECTOR)).unwrap();
        let done = wait(&mut *case.device, 2);
        assert!(matches!(done[0].result, Ok(SECTOR) | Err(Errno::INVAL)), "{name}: {done:?}");
        assert!(matches!(done[1].result, Ok(0) | Err(Errno::INVAL)), "{name}: {done:?}");
    }
}

#[test]
fn a_device_that_refuses_says_so_for_that_transfer_only() {
    let mut all = every_device(4);
    for mut case in all.take() {
        let name = case.name.clone();
        if case.platter.is_none() {
            continue;
        }
        // Direct I/O from the middle of a sector: EINVAL from the file system.
        case.device.submit(io(0, Direction::Read, 0, 100, 0, SECTOR)).unwrap();
        case.device.submit(io(1, Direction::Read, 0, 0, 0, SECTOR)).unwrap();
        let done = wait(&mut *case.device, 2);
        assert_eq!(done[0].result, Err(Errno::INVAL), "{name}");
        assert_eq!(done[1].result, Ok(SECTOR), "{name}");
    }
}

#[test]
fn a_sleeper_is_woken_by_what_completes() {
    let mut all = every_device(4);
    for mut case in all.take() {
        let name = case.name.clone();
        if case.device.wake_fd().is_none() {
            assert!(
                ["polled", "sim", "SPDK"].iter().any(|kind| name.contains(kind)),
                "{name} says that it can only be polled"
            );
            continue;
        }
        for round in 0..3 {
            case.device.submit(io(round, Direction::Read, 0, 0, 0, SECTOR)).unwrap();
            case.device.flush();
            let deadline = Instant::now() + Duration::from_secs(20);
            while !kvring_ipc::peer::is_readable(case.device.wake_fd().unwrap()) {
                assert!(Instant::now() < deadline, "{name}: nobody rang");
            }
            assert_eq!(wait(&mut *case.device, 1)[0].tag, round);
            assert!(!kvring_ipc::peer::is_readable(case.device.wake_fd().unwrap()), "{name}: silent when polled dry");
        }
    }
}

#[test]
fn bytes_on_the_disk_are_the_bytes() {
    let mut all = every_device(4);
    for mut case in all.take() {
        let (name, memory) = (case.name.clone(), case.memory.clone());
        let (file, offset) = case.place(1, 8192);
        let Some(platter) = &case.platter else { continue };
        memory.pool.copy_in(0, &[0xab; 4096]);
        case.device.submit(io(0, Direction::Write, file, offset, 0, SECTOR)).unwrap();
        wait(&mut *case.device, 1);
        let mut bytes = [0; 4096];
        let reader = platter.media[usize::from(file)].open(0, Access::ReadDirect).unwrap();
        reader.read_exact_at(&mut bytes, offset).unwrap();
        assert_eq!(bytes, [0xab; 4096], "{name}");
    }
}

/// More than one command moves, and more than there is room for at once: each of its bytes is in its place.
#[test]
fn a_large_transfer_is_moved_whole() {
    let mut all = every_device(2);
    for mut case in all.take() {
        let (name, memory) = (case.name.clone(), case.memory.clone());
        let pattern = |at: usize| (at / 4096 * 7 + at % 251) as u8;
        let bytes: Vec<u8> = (0..PIECE).map(pattern).collect();
        memory.pool.copy_in(0, &bytes);
        let sent = |tag, direction, offset, region| io(tag, direction, 0, offset, region, PIECE as u32);
        case.device.submit(sent(0, Direction::Write, 4096, 0)).unwrap();
        assert_eq!(wait(&mut *case.device, 1)[0].result, Ok(PIECE as u32), "{name}");
        // Two at once: into one piece what was written, over the other what lay behind it.
        case.device.submit(sent(1, Direction::Read, 4096, PIECE)).unwrap();
        case.device.submit(sent(2, Direction::Read, 8192, 0)).unwrap();
        let done = wait(&mut *case.device, 2);
        assert!(done.iter().all(|done| done.result == Ok(PIECE as u32)), "{name}: {done:?}");
        let mut read = vec![0; PIECE];
        memory.pool.copy_out(PIECE, &mut read);
        assert!(read == bytes, "{name}: other bytes");
        memory.pool.copy_out(0, &mut read);
        assert!(read[..PIECE - 4096] == bytes[4096..], "{name}: other bytes, one sector on");
        assert_eq!(case.device.inflight(), 0, "{name}");
    }
}

/// A device that cannot do what is asked says so in words, and what it is driven by instead works.
#[test]
fn what_a_device_cannot_do_is_said_in_words() {
    let files = Platter::files();
    let why = |medium: &Medium, options| {
        let mut left_out = Vec::new();
        match Nvme::new(medium, None, memory(), options, &mut left_out) {
            Ok(_) => left_out.join(" "),
            Err(error) => error.to_string(),
        }
    };
    assert!(why(&files.media[0], RingOptions::plain(4, true)).contains("a directory"));
    if uring::probe().is_err() {
        return println!("skipped: no io_uring");
    }
    // EOPNOTSUPP: no device below a file in memory has queues.
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let medium = Medium::Directory(shm.path().into());
    std::fs::write(medium.path_of(0), [0; 8192]).unwrap();
    if let Ok(file) = medium.open_for_io(0) {
        let told = uring::can_poll(&medium, &[file.into()]).unwrap_err();
        assert!(told.contains("not supported"), "{told}");
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Ok(platter) = Platter::on_loop() {
        assert!(why(&platter.media[0], RingOptions::plain(4, true)).contains("no NVMe namespace"));
        let told = uring::can_poll(&platter.media[0], &platter.open()).unwrap_err();
        assert!(told.contains("no polled queues") || told.contains("not supported"), "{told}");
    }
}

/// The failures of a pair of queues, and of a controller, are failures of transfers: each comes back, and nothing hangs.
#[test]
fn a_failed_namespace_fails_its_transfers() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if begin_spdk().is_some() {
        return println!("skipped: a real SPDK does not fail by order");
    }
    let platter = Platter::fake_spdk("fail_after:3");
    let mut device = Spdk::new(platter.media[0].address().unwrap(), memory(), None, 8).unwrap();
    for round in 0..3 {
        for tag in 0..8 {
            device.submit(io(tag, Direction::Write, 0, u64::from(tag) * 4096, tag as usize * 4096, SECTOR)).unwrap();
        }
        let done = wait(&mut device, 8);
        assert_eq!(done.iter().map(|done| done.tag).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
        assert!(done.iter().all(|done| done.result.is_err()), "round {round}: {done:?}");
        assert_eq!(device.inflight(), 0);
    }
    let platter = Platter::fake_spdk("error_every:2");
    let mut device = Spdk::new(platter.media[0].address().unwrap(), memory(), None, 8).unwrap();
    for tag in 0..4 {
        device.submit(io(tag, Direction::Read, 0, 0, 0, SECTOR)).unwrap();
    }
    let good = wait(&mut device, 4).iter().filter(|done| done.result.is_ok()).count();
    assert_eq!(good, 2);
    // One that hangs is given up with its pair: nothing moves afterwards, or the fake would say so.
    let platter = Platter::fake_spdk("hang_after:1");
    let mut device = Spdk::new(platter.media[0].address().unwrap(), memory(), None, 8).unwrap();
    for tag in 0..4 {
        device.submit(io(tag, Direction::Read, 0, 0, tag as usize * 4096, SECTOR)).unwrap();
    }
    device.flush();
    let mut done = Vec::new();
    (0..100).for_each(|_| device.poll(0, 64, &mut done));
    assert_eq!((done.len(), device.inflight()), (1, 3));
}

#[test]
fn what_spdk_cannot_do_is_said_in_words() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if begin_spdk().is_some() {
        return println!("skipped: a real SPDK is not told what to be");
    }
    let why =
        |address: &str| Spdk::new(address, memory(), None, 4).err().map_or(String::new(), |error| error.to_string());
    assert!(why("trtype:TCP adrfam:IPv4 traddr:/nowhere trsvcid:4420 subnqn:x").contains("is the target there"));
    let platter = Platter::fake_spdk("");
    let address = platter.media[0].address().unwrap();
    assert!(why(&format!("{address} metadata:8")).contains("formatted with metadata"));
    assert!(why(&format!("{address} ns:7")).contains("namespace 7"));
    assert!(why(&format!("{address} ns:x")).contains("takes the number of a namespace"));
    let health = kvring_engine::device::spdk::health(address).unwrap();
    assert_eq!((health.temperature_celsius, health.percentage_used, health.critical_warning), (37, 3, 0));
}
