//! Controllers and their pairs of queues: which there are, and what a command does to the file.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use crate::abi::Done;
use crate::{die, lock, memory};

/// How a device behaves: the words of its transport id.
#[derive(Clone, Debug, PartialEq)]
struct Behaviour {
    file: PathBuf,
    sector_bytes: u32,
    metadata_bytes: u32,
    fail_after: u64,
    error_every: u64,
    hang_after: u64,
    need_dma: bool,
}

impl Behaviour {
    /// Words that are not ours are passed over, as SPDK does. None: a number is none, or no sector is that long.
    fn parse(id: &str) -> Option<Self> {
        let mut behaviour = Self {
            file: PathBuf::new(),
            sector_bytes: 4096,
            metadata_bytes: 0,
            fail_after: u64::MAX,
            error_every: u64::MAX,
            hang_after: u64::MAX,
            need_dma: false,
        };
        for word in id.split_whitespace() {
            match word.split_once(':').unwrap_or((word, "")) {
                ("traddr", path) => behaviour.file = path.into(),
                ("sector", number) => behaviour.sector_bytes = number.parse().ok()?,
                ("metadata", number) => behaviour.metadata_bytes = number.parse().ok()?,
                ("fail_after", number) => behaviour.fail_after = number.parse().ok()?,
                ("error_every", number) => behaviour.error_every = number.parse().ok()?,
                ("hang_after", number) => behaviour.hang_after = number.parse().ok()?,
                ("need_dma", _) => behaviour.need_dma = true,
                _ => {}
            }
        }
        let is_sector = behaviour.sector_bytes.is_power_of_two() && behaviour.sector_bytes >= 512;
        (is_sector && behaviour.error_every > 0).then_some(behaviour)
    }
}

pub struct Controller {
    behaviour: Behaviour,
    file: File,
    /// Whole sectors.
    bytes: u64,
    written_bytes: Arc<AtomicU64>,
}

impl Controller {
    pub fn connect(id: &str) -> Result<Self, i32> {
        let Some(behaviour) = Behaviour::parse(id) else { return Err(-libc::EINVAL) };
        let (file, metadata) = open(&behaviour.file).ok_or(-libc::ENXIO)?;
        let sector_bytes = u64::from(behaviour.sector_bytes);
        let written_bytes = lock(&WRITTEN).entry((metadata.dev(), metadata.ino())).or_default().clone();
        Ok(Self { behaviour, file, bytes: metadata.len() / sector_bytes * sector_bytes, written_bytes })
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn sector_bytes(&self) -> u32 {
        self.behaviour.sector_bytes
    }

    pub fn metadata_bytes(&self) -> u32 {
        self.behaviour.metadata_bytes
    }

    /// What was written to its file through this process, by earlier connections too.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }

    fn execute(&self, command: &Command) -> i32 {
        let Work::Move { write, start, sector, sectors } = command.work else {
            // A flush. What `pwrite` has taken, a killed process does not lose.
            return 0;
        };
        let sector_bytes = u64::from(self.behaviour.sector_bytes);
        if sector.checked_add(u64::from(sectors)).is_none_or(|end| end > self.bytes / sector_bytes) {
            return -libc::EINVAL;
        }
        let (offset, bytes) = (sector * sector_bytes, u64::from(sectors) * sector_bytes);
        let mut moved = 0;
        while moved < bytes {
            let memory = std::ptr::with_exposed_provenance_mut::<libc::c_void>(start + moved as usize);
            let (left, at) = ((bytes - moved) as usize, (offset + moved) as libc::off_t);
            let file = self.file.as_raw_fd();
            let result = if write {
                // SAFETY: who submitted has left these bytes to the command until it is over; the kernel reads them.
                unsafe { libc::pwrite(file, memory, left, at) }
            } else {
                // SAFETY: who submitted has left these bytes to the command until it is over; the kernel writes them.
                unsafe { libc::pread(file, memory, left, at) }
            };
            match result {
                1.. => moved += result as u64,
                _ if result < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
                // 0: the file has been cut.
                _ => return -libc::EIO,
            }
        }
        if write {
            self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        0
    }
}

/// Only what a transport id may name: a file that is there, by its whole path.
fn open(path: &Path) -> Option<(File, std::fs::Metadata)> {
    let file = path.is_absolute().then(|| OpenOptions::new().read(true).write(true).open(path).ok())??;
    let metadata = file.metadata().ok()?;
    Some((file, metadata))
}

/// Device and inode of a file.
type FileName = (u64, u64);

/// Bytes written to each file: a connection that comes later counts on.
static WRITTEN: LazyLock<Mutex<HashMap<FileName, Arc<AtomicU64>>>> = LazyLock::new(Mutex::default);

#[derive(Clone, Copy)]
pub enum Work {
    /// `start` is an address: no byte of it is touched before `poll`.
    Move {
        write: bool,
        start: usize,
        sector: u64,
        sectors: u32,
    },
    Flush,
}

struct Command {
    work: Work,
    tag: u64,
    /// From 1: the first of its pair.
    number: u64,
}

pub struct Qpair {
    handle: usize,
    controller_handle: usize,
    controller: Arc<Controller>,
    depth: usize,
    /// A thread is in a call. It stays so when the pair is freed: who comes too late finds a pair in use.
    busy: AtomicBool,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    /// Oldest first.
    in_flight: Vec<Command>,
    taken: u64,
    failure_said: bool,
}

impl Qpair {
    pub fn submit(&self, work: Work, tag: u64) -> i32 {
        let _turn = self.enter();
        let queue = &mut *lock(&self.queue);
        let behaviour = &self.controller.behaviour;
        if queue.taken >= behaviour.fail_after {
            return -libc::ENXIO;
        }
        if queue.in_flight.len() >= self.depth {
            return -libc::EAGAIN;
        }
        let number = queue.taken + 1;
        if let Work::Move { start, sectors, .. } = work {
            if sectors == 0 {
                return -libc::EINVAL;
            }
            let bytes = sectors as usize * behaviour.sector_bytes as usize;
            let is_refused = memory::with(|memory| {
                let is_refused = start == 0 || behaviour.need_dma && !memory.is_reachable(start, bytes);
                if !is_refused {
                    memory.begin((self.handle, number), start, bytes);
                }
                is_refused
            });
            if is_refused {
                return -libc::EFAULT;
            }
        }
        queue.taken = number;
        queue.in_flight.push(Command { work, tag, number });
        0
    }

    /// Carries out and says what is over; or the pair has failed.
    pub fn poll(&self, max: u32, mut say: impl FnMut(usize, Done)) -> i32 {
        let _turn = self.enter();
        let queue = &mut *lock(&self.queue);
        let behaviour = &self.controller.behaviour;
        let has_failed = queue.taken >= behaviour.fail_after;
        if has_failed && (!queue.failure_said || queue.in_flight.is_empty()) {
            queue.failure_said = true;
            return -libc::ENXIO;
        }
        let room = queue.in_flight.len().div_ceil(2).min(max as usize);
        let mut said = 0;
        for at in (0..queue.in_flight.len()).rev() {
            if said == room {
                break;
            }
            let number = queue.in_flight[at].number;
            if !has_failed && number > behaviour.hang_after {
                continue;
            }
            let command = queue.in_flight.remove(at);
            let result = match number {
                _ if has_failed => -libc::ECANCELED,
                _ if number.is_multiple_of(behaviour.error_every) => -libc::EIO,
                _ => self.controller.execute(&command),
            };
            memory::with(|memory| memory.end((self.handle, number)));
            say(said, Done { tag: command.tag, result, reserved: 0 });
            said += 1;
        }
        said as i32
    }

    fn enter(&self) -> Turn<'_> {
        // Acquire: pairs with the Release of the turn before.
        if self.busy.swap(true, Ordering::Acquire) {
            die("a pair is used by two threads at the same time");
        }
        Turn(&self.busy)
    }
}

/// One call on a pair, from its begin to its end.
struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `Qpair::enter`.
        self.0.store(false, Ordering::Release);
    }
}

/// What exists, by the number that is given out as its address. No number is given out twice.
#[derive(Default)]
pub struct Registry {
    controllers: HashMap<usize, Arc<Controller>>,
    qpairs: HashMap<usize, Arc<Qpair>>,
    given: usize,
}

pub static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(Mutex::default);

impl Registry {
    pub fn attach(&mut self, controller: Controller) -> usize {
        let handle = self.handle();
        self.controllers.insert(handle, Arc::new(controller));
        handle
    }

    pub fn controller(&self, handle: usize) -> Arc<Controller> {
        self.controllers.get(&handle).cloned().unwrap_or_else(|| die("a controller is used that is not attached"))
    }

    pub fn detach(&mut self, handle: usize) {
        if self.qpairs.values().any(|qpair| qpair.controller_handle == handle) {
            die("a controller is detached, and has pairs");
        }
        if self.controllers.remove(&handle).is_none() {
            die("a controller is detached that is not attached");
        }
    }

    pub fn new_qpair(&mut self, controller_handle: usize, depth: u32) -> usize {
        let controller = self.controller(controller_handle);
        let handle = self.handle();
        let (depth, busy, queue) = (depth as usize, AtomicBool::new(false), Mutex::default());
        let qpair = Qpair { handle, controller_handle, controller, depth, busy, queue };
        self.qpairs.insert(handle, Arc::new(qpair));
        handle
    }

    pub fn qpair(&self, handle: usize) -> Arc<Qpair> {
        self.qpairs.get(&handle).cloned().unwrap_or_else(|| die("a pair is used that was freed, or never was"))
    }

    pub fn free_qpair(&mut self, handle: usize) {
        let Some(qpair) = self.qpairs.remove(&handle) else { die("a pair is freed that was freed, or never was") };
        std::mem::forget(qpair.enter());
        lock(&qpair.queue).in_flight.clear();
        memory::with(|memory| memory.end_all(handle));
    }

    /// In no page that a process can map: following it is found out.
    fn handle(&mut self) -> usize {
        self.given += 1;
        FIRST_HANDLE + 16 * self.given
    }
}

/// Neither user space nor the kernel has addresses there, on x86-64 and on aarch64.
const FIRST_HANDLE: usize = 0x4B56_0000_0000_0000;
