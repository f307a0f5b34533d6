//! The pool, pinned for the device: piece by piece, when a piece is first needed, by a thread of its own.
//!
//! Pinning takes locks that every process on the machine waits for, and time by the gigabyte (some 0.1 s where pages are there already):
//! hence small pieces, one process at a time (a lock on the pool's own file), and only what is used: what loads
//! wait for before what stores do. Whoever wants to copy meanwhile is told to come back. A piece that cannot be pinned is not tried again.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvring_ipc::client::Pool;
use rustix::fs::FlockOperation;

use crate::driver::context::Context;
use crate::driver::error::{Class, CudaError};

/// Of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Ask again soon.
    Pending,
    /// Not pinned, and never will be.
    Failed,
    /// Pinned: where it begins for the device.
    Ready(u64),
}

/// How often a refused piece is tried again.
const RETRIES: usize = 2;
const ABSENT: u64 = 0;
const PENDING: u64 = 1;
/// Pending, and a load waits for it.
const URGENT: u64 = 2;
const FAILED: u64 = 3;

/// Pieces that are to be pinned, in this order.
#[derive(Default)]
struct Wanted {
    urgent: VecDeque<usize>,
    others: VecDeque<usize>,
}

struct Inner {
    context: Arc<Context>,
    pool: Pool,
    piece_bytes: usize,
    states: Vec<AtomicU64>,
    wanted: Mutex<Wanted>,
    /// Rung when there is one more, or the end.
    rung: Condvar,
    is_stopping: AtomicBool,
    failure: Mutex<Option<CudaError>>,
}

/// A pool's registration with a device's context. Dropped with copies in flight it would be a crash: then
/// [`Registration::leave`] it.
pub struct Registration {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
    is_left: AtomicBool,
}

impl Registration {
    /// Of a pool, nothing pinned yet. The last piece may be shorter.
    ///
    /// # Errors
    /// What the system says of a thread.
    pub fn new(context: Arc<Context>, pool: Pool, piece_bytes: usize) -> std::io::Result<Self> {
        assert!(piece_bytes > 0 && piece_bytes.is_multiple_of(4096), "pieces are of whole pages");
        let pieces_count = pool.mapping().bytes().div_ceil(piece_bytes);
        let states = (0..pieces_count).map(|_| AtomicU64::new(ABSENT)).collect();
        let inner = Arc::new(Inner {
            context,
            pool,
            piece_bytes,
            states,
            wanted: Mutex::default(),
            rung: Condvar::new(),
            is_stopping: AtomicBool::new(false),
            failure: Mutex::new(None),
        });
        let of_thread = inner.clone();
        let thread = std::thread::Builder::new().name("kvring-register".into()).spawn(move || of_thread.serve())?;
        Ok(Self { inner, thread: Some(thread), is_left: AtomicBool::new(false) })
    }

    /// Whether it is this pool's.
    pub fn is_of(&self, pool: &Pool) -> bool {
        Arc::ptr_eq(self.inner.pool.mapping(), pool.mapping())
    }

    /// The pool.
    pub fn pool(&self) -> &Pool {
        &self.inner.pool
    }

    /// Bytes of one piece.
    pub fn piece_bytes(&self) -> usize {
        self.inner.piece_bytes
    }

    /// The state of the pieces of a range, the worst of them; what is not pinned yet is asked for, urgently if a load
    /// waits for it.
    pub fn state_of(&self, offset: usize, bytes: usize, is_urgent: bool) -> State {
        let wanted = if is_urgent { URGENT } else { PENDING };
        let pieces = offset / self.inner.piece_bytes..=(offset + bytes.max(1) - 1) / self.inner.piece_bytes;
        let mut worst = State::Ready(0);
        for piece in pieces {
            // Acquire: pairs with the Release of the thread; what the driver did before is visible.
            let state = &self.inner.states[piece];
            match state.load(Ordering::Acquire) {
                FAILED => return State::Failed,
                before if before < wanted => {
                    // Relaxed: the queue's lock orders it; pinned meanwhile, it stays so.
                    let asked = state.compare_exchange(before, wanted, Ordering::Relaxed, Ordering::Relaxed);
                    if asked.is_ok() {
                        self.inner.want(piece, is_urgent);
                    }
                    worst = State::Pending;
                }
                PENDING | URGENT => worst = State::Pending,
                _ => {}
            }
        }
        worst
    }

    /// Where a byte of the pool lies for the device. Its piece is ready.
    pub fn device_address(&self, offset: u64) -> u64 {
        let (piece, at) = (offset as usize / self.inner.piece_bytes, offset % self.inner.piece_bytes as u64);
        let state = self.inner.states[piece].load(Ordering::Acquire);
        assert!(state > FAILED, "piece {piece} is not pinned");
        state + at
    }

    /// Where bytes of the pool lie for the processor. Their piece is ready, and there is one.
    pub fn address(&self, offset: usize, bytes: usize) -> usize {
        let piece = |at: usize| at / self.inner.piece_bytes;
        assert_eq!(piece(offset), piece(offset + bytes.max(1) - 1), "a copy ends where its piece does");
        assert!(self.inner.states[piece(offset)].load(Ordering::Acquire) > FAILED, "it is not pinned");
        self.inner.pool.mapping().address(offset, bytes).expose_provenance()
    }

    /// Why a piece could not be pinned, once one could not.
    pub fn failure(&self) -> Option<CudaError> {
        *self.inner.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pool stays pinned and mapped until the process ends: bytes may still move.
    pub fn leave(&self) {
        self.is_left.store(true, Ordering::Relaxed);
    }
}

impl Inner {
    fn want(&self, piece: usize, is_urgent: bool) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if is_urgent { &mut wanted.urgent } else { &mut wanted.others }.push_back(piece);
        drop(wanted);
        self.rung.notify_one();
    }

    /// The next piece; none at the end.
    fn next(&self) -> Option<usize> {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_stopping.load(Ordering::Relaxed) {
            match wanted.urgent.pop_front().or_else(|| wanted.others.pop_front()) {
                // Asked for twice, by a store and then by a load: pinned once.
                Some(piece) if self.states[piece].load(Ordering::Relaxed) >= FAILED => {}
                Some(piece) => return Some(piece),
                None => wanted = self.rung.wait(wanted).unwrap_or_else(PoisonError::into_inner),
            }
        }
        None
    }

    fn serve(&self) {
        let current = self.context.make_current();
        while let Some(piece) = self.next() {
            let mut made = current.and_then(|()| self.register(piece));
            for _ in 0..RETRIES {
                // Pages that migrate while they are pinned make it fail for a moment (pin_user_pages, -ENOMEM).
                if made.is_ok() || made.is_err_and(|error| error.class() == Class::Sticky) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
                made = current.and_then(|()| self.register(piece));
            }
            let state = match made {
                Ok(address) => address,
                Err(error) => {
                    self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    FAILED
                }
            };
            self.states[piece].store(state, Ordering::Release);
            // Others wait for the driver's locks: let them.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn register(&self, piece: usize) -> Result<u64, CudaError> {
        // One thread of this process at a time; record locks know processes only.
        static OURS: Mutex<()> = Mutex::new(());
        let _ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
        let file = self.pool.file();
        let locked = file.is_some_and(|file| self.lock(file));
        let offset = piece * self.piece_bytes;
        let bytes = self.piece_bytes.min(self.pool.mapping().bytes() - offset);
        // Pages come one by one under the driver's locks otherwise.
        let _ = self.pool.mapping().populate(offset, bytes);
        let address = self.pool.mapping().address(offset, bytes);
        // SAFETY: `self.pool` keeps the range mapped; `Registration::drop` unregisters it first, or leaves both.
        let registered = unsafe { self.context.register(address, bytes) };
        if let Some(file) = file.filter(|_| locked) {
            let _ = rustix::fs::fcntl_lock(&**file, FlockOperation::Unlock);
        }
        registered
    }

    /// Waits its turn among the processes that share the pool; without one, after ten seconds.
    fn lock(&self, file: &std::os::fd::OwnedFd) -> bool {
        for _ in 0..10_000 {
            match rustix::fs::fcntl_lock(file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return true,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) => {}
                Err(_) => return false,
            }
            if self.is_stopping.load(Ordering::Relaxed) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.inner.is_stopping.store(true, Ordering::Relaxed);
        // Between its look at the flag and its sleep the thread holds the lock.
        drop(self.inner.wanted.lock().unwrap_or_else(PoisonError::into_inner));
        self.inner.rung.notify_one();
        if self.is_left.load(Ordering::Relaxed) {
            // The thread may be in a call that never returns; the mapping stays with this reference.
            return std::mem::forget(self.inner.clone());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let mut is_clean = true;
        for (piece, state) in self.inner.states.iter().enumerate() {
            if state.load(Ordering::Acquire) > FAILED {
                let address = self.inner.pool.mapping().address(piece * self.inner.piece_bytes, 1);
                is_clean &= self.inner.context.unregister(address).is_ok();
            }
        }
        if !is_clean {
            std::mem::forget(self.inner.clone());
        }
    }
}
