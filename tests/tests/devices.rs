//! One conformance suite over every device: what `Device` promises, io_uring, libaio and `sim` keep.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvring_engine::device::aio::Aio;
use kvring_engine::device::sim::{Faults, Sim};
use kvring_engine::device::uring::{self, Uring};
use kvring_engine::device::{Device, DeviceMemory, Direction, Done, Io, Region};
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};
use rustix::io::Errno;

const PIECE: usize = 1 << 20;
const POOL: usize = 2 << 20;
const FILE: u64 = 4 << 20;
const SECTOR: u32 = 4096;

fn mapping(bytes: usize) -> Arc<Mapping> {
    let fd = sealed_memfd("test", bytes as u64, Pages::Small).unwrap();
    Arc::new(Mapping::new(&fd, bytes).unwrap())
}

fn memory() -> DeviceMemory {
    DeviceMemory { pool: mapping(POOL), headers: mapping(65536), piece_bytes: PIECE }
}

/// Two files for direct I/O, in a directory on a real file system.
fn files(dir: &tempfile::TempDir) -> Vec<OwnedFd> {
    (0..2)
        .map(|n| {
            let path = dir.path().join(n.to_string());
            std::fs::write(&path, vec![0; FILE as usize]).unwrap();
            let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
            std::fs::OpenOptions::new().read(true).write(true).custom_flags(direct).open(path).unwrap().into()
        })
        .collect()
}

fn on_disk() -> tempfile::TempDir {
    // Beside the build, not in /tmp: that may be a tmpfs.
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

type Case = (&'static str, Box<dyn Device>, DeviceMemory, Option<tempfile::TempDir>);

fn every_device(depth: u32) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let sim = memory();
    let platter = vec![vec![0; FILE as usize]; 2];
    cases.push(("sim", Box::new(Sim::new(platter, sim.clone(), depth, 1000, Faults::default(), 1)), sim, None));
    let (dir, aio) = (on_disk(), memory());
    cases.push(("aio", Box::new(Aio::new(files(&dir), aio.clone(), depth).unwrap()), aio, Some(dir)));
    match uring::probe() {
        Ok(()) => {
            for (name, fixed) in [("uring", true), ("uring without fixed buffers", false)] {
                let (dir, memory) = (on_disk(), memory());
                let mut device = Uring::new(files(&dir), None, memory.clone(), depth, fixed).unwrap();
                (0..2).for_each(|piece| device.register_piece(piece).unwrap());
                cases.push((name, Box::new(device), memory, Some(dir)));
            }
        }
        Err(error) => println!("skipped: {error}"),
    }
    cases
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
    for (name, mut device, memory, _dir) in every_device(8) {
        let pattern = |n: u8| -> Vec<u8> { (0..SECTOR).map(|i| n ^ i as u8).collect() };
        let places = [(0u16, 0u64), (1, 0), (0, FILE - u64::from(SECTOR)), (1, 12 * 4096)];
        for (n, (file, offset)) in (0..).zip(places) {
            memory.pool.copy_in(n as usize * 4096, &pattern(n));
            device.submit(io(u32::from(n), Direction::Write, file, offset, n as usize * 4096, SECTOR)).unwrap();
        }
        let done = wait(&mut *device, 4);
        assert_eq!(
            done.iter().map(|d| (d.tag, d.result)).collect::<Vec<_>>(),
            (0..4).map(|n| (n, Ok(SECTOR))).collect::<Vec<_>>(),
            "{name}"
        );
        // Back into the second piece, in another order.
        for (n, (file, offset)) in (0u8..4).zip(places).rev() {
            device.submit(io(u32::from(n), Direction::Read, file, offset, PIECE + n as usize * 4096, SECTOR)).unwrap();
        }
        wait(&mut *device, 4);
        for n in 0..4u8 {
            let mut bytes = vec![0; 4096];
            memory.pool.copy_out(PIECE + n as usize * 4096, &mut bytes);
            assert_eq!(bytes, pattern(n), "{name}: place {n}");
        }
        assert_eq!(device.inflight(), 0);
    }
}

#[test]
fn the_header_region_is_another_memory() {
    for (name, mut device, memory, _dir) in every_device(8) {
        memory.headers.copy_in(4096, &[7; 4096]);
        let header = Io { region: Region::Headers, ..io(0, Direction::Write, 0, 8192, 4096, SECTOR) };
        device.submit(header).unwrap();
        assert_eq!(wait(&mut *device, 1)[0].result, Ok(SECTOR), "{name}");
        device.submit(io(1, Direction::Read, 0, 8192, 0, SECTOR)).unwrap();
        wait(&mut *device, 1);
        let mut bytes = [0; 4096];
        memory.pool.copy_out(0, &mut bytes);
        assert_eq!(bytes, [7; 4096], "{name}");
    }
}

#[test]
fn beyond_its_depth_a_transfer_is_given_back_whole() {
    for (name, mut device, _memory, _dir) in every_device(4) {
        let one = |tag| io(tag, Direction::Read, 0, u64::from(tag) * 4096, tag as usize * 4096, SECTOR);
        for tag in 0..4 {
            device.submit(one(tag)).unwrap();
        }
        assert_eq!(device.submit(one(9)), Err(one(9)), "{name}");
        assert_eq!(wait(&mut *device, 4).len(), 4);
        device.submit(one(9)).unwrap();
        assert_eq!(wait(&mut *device, 1)[0].tag, 9, "{name}");
    }
}

#[test]
fn the_end_of_a_file_is_short_or_an_error_and_never_whole() {
    for (name, mut device, _memory, _dir) in every_device(4) {
        device.submit(io(0, Direction::Read, 0, FILE - 4096, 0, 2 * SECTOR)).unwrap();
        device.submit(io(1, Direction::Read, 0, FILE + 4096, 0, SECTOR)).unwrap();
        let done = wait(&mut *device, 2);
        assert!(matches!(done[0].result, Ok(SECTOR) | Err(Errno::INVAL)), "{name}: {done:?}");
        assert!(matches!(done[1].result, Ok(0) | Err(Errno::INVAL)), "{name}: {done:?}");
    }
}

#[test]
fn a_device_that_refuses_says_so_for_that_transfer_only() {
    for (name, mut device, _memory, dir) in every_device(4) {
        if dir.is_none() {
            continue;
        }
        // Direct I/O from the middle of a sector: EINVAL from the file system.
        device.submit(io(0, Direction::Read, 0, 100, 0, SECTOR)).unwrap();
        device.submit(io(1, Direction::Read, 0, 0, 0, SECTOR)).unwrap();
        let done = wait(&mut *device, 2);
        assert_eq!(done[0].result, Err(Errno::INVAL), "{name}");
        assert_eq!(done[1].result, Ok(SECTOR), "{name}");
    }
}

#[test]
fn a_sleeper_is_woken_by_what_completes() {
    for (name, mut device, _memory, dir) in every_device(4) {
        let Some(_dir) = dir else {
            assert!(device.wake_fd().is_none(), "{name} can only be polled");
            continue;
        };
        for round in 0..3 {
            device.submit(io(round, Direction::Read, 0, 0, 0, SECTOR)).unwrap();
            device.flush();
            let deadline = Instant::now() + Duration::from_secs(20);
            while !kvring_ipc::peer::is_readable(device.wake_fd().unwrap()) {
                assert!(Instant::now() < deadline, "{name}: nobody rang");
            }
            assert_eq!(wait(&mut *device, 1)[0].tag, round);
            assert!(!kvring_ipc::peer::is_readable(device.wake_fd().unwrap()), "{name}: silent when polled dry");
        }
    }
}

#[test]
fn bytes_on_the_disk_are_the_bytes() {
    for (name, mut device, memory, dir) in every_device(4) {
        let Some(dir) = dir else { continue };
        memory.pool.copy_in(0, &[0xab; 4096]);
        device.submit(io(0, Direction::Write, 1, 8192, 0, SECTOR)).unwrap();
        wait(&mut *device, 1);
        let mut bytes = [0; 4096];
        std::fs::File::open(dir.path().join("1")).unwrap().read_exact_at(&mut bytes, 8192).unwrap();
        assert_eq!(bytes, [0xab; 4096], "{name}");
    }
}
