//! Waking a side that announced sleep: the need-wakeup handshake and its one fence (WIRE.md §6).
//!
//! The sleeper stores its flag and then looks at the ring once more; the waker publishes and then
//! looks at the flag. Each needs its store to be visible before its load, which only a
//! sequentially consistent fence gives: without it both may read the old value and the sleeper
//! sleeps beside a full ring. `tests/loom.rs` tries every interleaving.

use crate::sync::{AtomicU32, Ordering, fence};

/// The sleeper: announces sleep. Look at the ring once more before really sleeping.
pub fn announce(flag: &AtomicU32) {
    flag.store(1, Ordering::Relaxed);
    // SeqCst: orders our flag before our next look at the ring; partner is the fence in `must_ring`.
    fence(Ordering::SeqCst);
}

/// The sleeper: awake again.
pub fn retract(flag: &AtomicU32) {
    flag.store(0, Ordering::Relaxed);
}

/// The waker, after `publish`: whether the other side sleeps and so must be rung. Clears the flag,
/// so that a batch of publishes rings once. What the peer stored is a claim: any nonzero is a yes.
pub fn must_ring(flag: &AtomicU32) -> bool {
    // SeqCst: orders our publish before our look at the flag; partner is the fence in `announce`.
    fence(Ordering::SeqCst);
    if flag.load(Ordering::Relaxed) == 0 {
        return false;
    }
    flag.store(0, Ordering::Relaxed);
    true
}
