//! The device: memory, streams as threads, events, and an engine that copies in another process.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{DEVICE_SHIFT, HOST_SHIFT};

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How it behaves.
#[derive(Clone)]
pub struct Behaviour {
    pub version: i32,
    pub devices: i32,
    pub init: u32,
    pub seed: u64,
    pub slice_bytes: usize,
    pub slice_us: u64,
    pub has_words: bool,
    pub has_ptx: bool,
    pub dma_process: bool,
    pub linger_ms: u64,
    pub register_ms: u64,
    pub free_bytes: usize,
    /// (call, how many more times it succeeds, code).
    pub failures: Vec<(String, u64, u32)>,
}

impl Default for Behaviour {
    /// As `KVRING_FAKE_CUDA` says ("linger_ms=10,stall=true"), for processes of which no test has hold.
    fn default() -> Self {
        let mut behaviour = Self::meek();
        for word in std::env::var("KVRING_FAKE_CUDA").unwrap_or_default().split(',').filter(|word| !word.is_empty()) {
            let set = word.split_once('=').and_then(|(what, value)| behaviour.set(what, value));
            assert!(set.is_some(), "KVRING_FAKE_CUDA: {word:?} is not understood");
        }
        behaviour
    }
}

impl Behaviour {
    fn meek() -> Self {
        Self {
            version: 13000,
            devices: 1,
            init: 0,
            seed: 1,
            slice_bytes: 64 << 10,
            slice_us: 0,
            has_words: true,
            has_ptx: true,
            dma_process: false,
            linger_ms: 0,
            register_ms: 0,
            free_bytes: usize::MAX,
            failures: Vec::new(),
        }
    }
}

impl Behaviour {
    pub fn set(&mut self, what: &str, value: &str) -> Option<()> {
        match what {
            "version" => self.version = value.parse().ok()?,
            "devices" => self.devices = value.parse().ok()?,
            "init" => self.init = value.parse().ok()?,
            "seed" => self.seed = value.parse().ok()?,
            "slice_bytes" => self.slice_bytes = value.parse().ok()?,
            "slice_us" => self.slice_us = value.parse().ok()?,
            "has_words" => self.has_words = value.parse().ok()?,
            "has_ptx" => self.has_ptx = value.parse().ok()?,
            "dma_process" => self.dma_process = value.parse().ok()?,
            "linger_ms" => self.linger_ms = value.parse().ok()?,
            "register_ms" => self.register_ms = value.parse().ok()?,
            "free_bytes" => self.free_bytes = value.parse().ok()?,
            // call:after:code
            "fail" => {
                let mut words = value.split(':');
                let call = words.next()?.to_string();
                self.failures.push((call, words.next()?.parse().ok()?, words.next()?.parse().ok()?));
            }
            "stall" => STALLED.store(value.parse().ok()?, Ordering::Relaxed),
            _ => return None,
        }
        Some(())
    }
}

pub struct Event {
    pub recorded: AtomicU64,
    pub done: AtomicU64,
}

pub enum Op {
    Copies(Vec<Copy>),
    /// (list, count): read when the stream reaches it.
    Kernel(usize, u32),
    Word(usize, u64),
    Record(Arc<Event>, u64),
    Wait(Arc<Event>, u64),
    Compute(usize, usize, u8, u64),
}

#[derive(Clone, std::marker::Copy)]
pub struct Copy {
    pub target: usize,
    pub source: usize,
    pub bytes: usize,
}

pub struct Stream {
    pub sender: Mutex<Sender<Op>>,
    pub submitted: AtomicU64,
    pub done: Arc<AtomicU64>,
}

/// Memory: real address → bytes.
#[derive(Default)]
pub struct Memory {
    pub device: BTreeMap<usize, usize>,
    pub registered: BTreeMap<usize, usize>,
    /// Of `cuMemHostAlloc`: among the registered too.
    pub host: HashMap<usize, usize>,
    pub used: usize,
}

#[derive(Default)]
pub struct Device {
    pub behaviour: Mutex<Behaviour>,
    pub memory: Mutex<Memory>,
    pub streams: Mutex<HashMap<usize, Arc<Stream>>>,
    pub events: Mutex<HashMap<usize, Arc<Event>>>,
    pub calls: Mutex<HashMap<String, u64>>,
    pub crimes: AtomicU64,
    pub next_handle: AtomicU64,
    /// A code that the context does not survive.
    pub poison: AtomicU32,
    /// Copies under way, by real address.
    pub moving: Mutex<Vec<Copy>>,
    dma: Mutex<Option<Dma>>,
}

pub static DEVICE: LazyLock<Device> = LazyLock::new(Device::default);
static STALLED: AtomicBool = AtomicBool::new(false);

impl Device {
    /// Counts a call, and says how it fails if it is to.
    pub fn called(&self, name: &str) -> u32 {
        *lock(&self.calls).entry(name.to_string()).or_default() += 1;
        let poison = self.poison.load(Ordering::Acquire);
        if poison != 0 && name != "cuGetProcAddress" {
            return poison;
        }
        let mut behaviour = lock(&self.behaviour);
        let Some(at) = behaviour.failures.iter().position(|(call, ..)| call == name) else { return 0 };
        if behaviour.failures[at].1 > 0 {
            behaviour.failures[at].1 -= 1;
            return 0;
        }
        let (_, _, code) = behaviour.failures.remove(at);
        drop(behaviour);
        if matches!(code, 214 | 220 | 700 | 702 | 710 | 714..=719 | 721 | 999) {
            self.poison.store(code, Ordering::Release);
        }
        code
    }

    /// The real address behind one that the device knows, if all of it lies in one allocation.
    pub fn real(&self, address: u64, bytes: usize) -> Option<usize> {
        let address = address as usize;
        let memory = lock(&self.memory);
        let (map, real) = match address {
            a if a >= DEVICE_SHIFT => (&memory.device, a - DEVICE_SHIFT),
            a if a >= HOST_SHIFT => (&memory.registered, a - HOST_SHIFT),
            _ => return None,
        };
        let (start, size) = map.range(..=real).next_back()?;
        (real.checked_add(bytes)? <= start + size).then_some(real)
    }

    pub fn handle(&self) -> usize {
        0x1000 + 16 * self.next_handle.fetch_add(1, Ordering::Relaxed) as usize
    }

    pub fn stream(&self, handle: usize) -> Option<Arc<Stream>> {
        lock(&self.streams).get(&handle).cloned()
    }

    pub fn create_stream(&'static self) -> usize {
        let handle = self.handle();
        let (sender, receiver) = channel();
        let done = Arc::new(AtomicU64::new(0));
        let stream = Stream { sender: Mutex::new(sender), submitted: AtomicU64::new(0), done: done.clone() };
        lock(&self.streams).insert(handle, Arc::new(stream));
        let seed = lock(&self.behaviour).seed ^ handle as u64;
        std::thread::spawn(move || self.run(&receiver, &done, seed));
        handle
    }

    pub fn submit(&self, handle: usize, op: Op) -> u32 {
        let Some(stream) = self.stream(handle) else { return 400 };
        if let Op::Copies(copies) = &op {
            lock(&self.moving).extend(copies);
        }
        stream.submitted.fetch_add(1, Ordering::AcqRel);
        let sent = lock(&stream.sender).send(op);
        u32::from(sent.is_err()) * 999
    }

    fn run(&self, ops: &Receiver<Op>, done: &AtomicU64, seed: u64) {
        let mut random = seed | 1;
        for op in ops {
            while STALLED.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            if self.poison.load(Ordering::Acquire) != 0 {
                // Nothing that comes after it happens, not even its end.
                continue;
            }
            match op {
                Op::Copies(mut copies) => {
                    let all = copies.clone();
                    self.copy(&mut copies, &mut random);
                    let mut moving = lock(&self.moving);
                    for copy in all {
                        if let Some(at) = moving.iter().position(|m| (m.target, m.source) == (copy.target, copy.source))
                        {
                            moving.swap_remove(at);
                        }
                    }
                }
                Op::Kernel(list, count) => {
                    let mut copies = Vec::new();
                    for index in 0..count as usize {
                        let piece = unsafe { *((list + index * 24) as *const [u64; 3]) };
                        let bytes = piece[2] as usize;
                        match (self.real(piece[0], bytes), self.real(piece[1], bytes)) {
                            (Some(source), Some(target)) => copies.push(Copy { target, source, bytes }),
                            // Illegal address.
                            _ => self.poison.store(700, Ordering::Release),
                        }
                    }
                    if self.poison.load(Ordering::Acquire) == 0 {
                        self.copy(&mut copies, &mut random);
                    }
                }
                Op::Word(address, value) => unsafe { &*(address as *const AtomicU64) }.store(value, Ordering::Release),
                Op::Record(event, number) => {
                    event.done.fetch_max(number, Ordering::AcqRel);
                }
                Op::Wait(event, number) => {
                    while event.done.load(Ordering::Acquire) < number && self.poison.load(Ordering::Acquire) == 0 {
                        std::thread::sleep(Duration::from_micros(5));
                    }
                }
                Op::Compute(address, bytes, byte, milliseconds) => {
                    std::thread::sleep(Duration::from_millis(milliseconds));
                    unsafe { std::ptr::write_bytes(address as *mut u8, byte, bytes) };
                }
            }
            if self.poison.load(Ordering::Acquire) == 0 {
                done.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    /// In any order, slice by slice.
    fn copy(&self, copies: &mut [Copy], random: &mut u64) {
        for i in (1..copies.len()).rev() {
            *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            copies.swap(i, (*random >> 33) as usize % (i + 1));
        }
        let Behaviour { slice_bytes, slice_us, dma_process, linger_ms, .. } = lock(&self.behaviour).clone();
        let is_host = |address: usize| {
            lock(&self.memory).registered.range(..=address).next_back().is_some_and(|(at, size)| address < at + size)
        };
        for copy in copies {
            for at in (0..copy.bytes).step_by(slice_bytes) {
                let bytes = slice_bytes.min(copy.bytes - at);
                let slice = Copy { target: copy.target + at, source: copy.source + at, bytes };
                if self.poison.load(Ordering::Acquire) != 0 {
                    return;
                }
                if dma_process && is_host(slice.target) {
                    self.by_dma_process(slice, slice_us, linger_ms);
                } else {
                    if slice_us > 0 {
                        std::thread::sleep(Duration::from_micros(slice_us));
                    }
                    unsafe { std::ptr::copy_nonoverlapping(slice.source as *const u8, slice.target as *mut u8, bytes) };
                }
            }
        }
    }

    /// Counts memory that goes while a copy of it is under way.
    pub fn goes(&self, start: usize, bytes: usize) {
        let within = |at: usize| at >= start && at < start + bytes;
        if lock(&self.moving).iter().any(|copy| within(copy.target) || within(copy.source)) {
            self.crimes.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn by_dma_process(&self, slice: Copy, slice_us: u64, linger_ms: u64) {
        let memory_version = {
            let memory = lock(&self.memory);
            memory
                .registered
                .iter()
                .chain(&memory.device)
                .fold(0usize, |sum, (at, size)| sum.wrapping_mul(31).wrapping_add(at ^ size))
        };
        let ring = {
            let mut dma = lock(&self.dma);
            if dma.as_ref().is_none_or(|dma| dma.memory_version != memory_version) {
                if let Some(old) = dma.take() {
                    old.ring().quit.store(1, Ordering::Release);
                }
                *dma = Some(Dma::fork(memory_version, slice_us, linger_ms));
            }
            dma.as_ref().map_or(0, |dma| dma.ring)
        };
        let ring = unsafe { &*(ring as *const Ring) };
        // Streams take turns: one slot each is enough.
        let number = ring.taken.fetch_add(1, Ordering::AcqRel);
        while number - ring.done.load(Ordering::Acquire) >= RING as u64 {
            std::thread::sleep(Duration::from_micros(20));
        }
        let entry = &ring.entries[number as usize % RING];
        entry[0].store(slice.target as u64, Ordering::Relaxed);
        entry[1].store(slice.source as u64, Ordering::Relaxed);
        entry[2].store(slice.bytes as u64, Ordering::Relaxed);
        entry[3].store(number + 1, Ordering::Release);
        // The engine works ahead of what the stream believes: up to the ring's length is under way.
        while number.saturating_sub(ring.done.load(Ordering::Acquire)) > RING as u64 / 2 {
            std::thread::sleep(Duration::from_micros(20));
        }
        if lock(&self.behaviour).slice_us == 0 {
            while ring.done.load(Ordering::Acquire) <= number {
                std::hint::spin_loop();
            }
        } else {
            while ring.done.load(Ordering::Acquire) <= number {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
    }
}

const RING: usize = 64;

#[repr(C)]
struct Ring {
    taken: AtomicU64,
    done: AtomicU64,
    quit: AtomicU64,
    entries: [[AtomicU64; 4]; RING],
}

struct Dma {
    ring: usize,
    memory_version: usize,
}

impl Dma {
    fn ring(&self) -> &'static Ring {
        unsafe { &*(self.ring as *const Ring) }
    }

    fn fork(memory_version: usize, slice_us: u64, linger_ms: u64) -> Self {
        let bytes = size_of::<Ring>();
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let ring = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(ring, libc::MAP_FAILED);
        let parent = unsafe { libc::getpid() };
        // The child makes system calls and touches shared memory, nothing else: no lock of the parent's is
        // taken there.
        match unsafe { libc::fork() } {
            0 => unsafe { engine(&*ring.cast::<Ring>(), parent, slice_us, linger_ms) },
            child => assert!(child > 0, "fork"),
        }
        Self { ring: ring as usize, memory_version }
    }
}

/// Copies for its client, and for a while after the client has died.
unsafe fn engine(ring: &Ring, parent: i32, slice_us: u64, linger_ms: u64) -> ! {
    unsafe {
        // What the client had open is none of the device's.
        libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
        let mut orphaned_us = 0;
        loop {
            let is_orphan = libc::getppid() != parent;
            if is_orphan && orphaned_us >= linger_ms * 1000 || ring.quit.load(Ordering::Acquire) != 0 {
                libc::_exit(0);
            }
            let number = ring.done.load(Ordering::Acquire);
            let entry = &ring.entries[number as usize % RING];
            if entry[3].load(Ordering::Acquire) != number + 1 {
                if is_orphan {
                    // The last it was told, again and again: a device that has not noticed.
                    let last = &ring.entries[(number + RING as u64 - 1) as usize % RING];
                    if number > 0 {
                        copy_entry(last);
                    }
                    orphaned_us += 1000;
                    libc::usleep(1000);
                } else {
                    libc::usleep(20);
                }
                continue;
            }
            if slice_us > 0 {
                libc::usleep(slice_us as u32);
                if is_orphan {
                    orphaned_us += slice_us;
                }
            }
            copy_entry(entry);
            ring.done.fetch_add(1, Ordering::AcqRel);
        }
    }
}

unsafe fn copy_entry(entry: &[AtomicU64; 4]) {
    let [target, source, bytes, _] = entry;
    let (target, source) = (target.load(Ordering::Relaxed), source.load(Ordering::Relaxed));
    let bytes = bytes.load(Ordering::Relaxed) as usize;
    unsafe { std::ptr::copy_nonoverlapping(source as *const u8, target as *mut u8, bytes) };
}
