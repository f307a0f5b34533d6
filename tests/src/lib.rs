//! The harness: a whole server with its clients in one thread, driven by a seed.
//!
//! The fault model, and beside each fault what must come of it:
//!
//! | fault | must |
//! |---|---|
//! | device error, bit rot, misdirected or lost write | be a miss, counted |
//! | short transfer | be resubmitted |
//! | slow I/O | delay only those who wait for it |
//! | power cut: writes lost or torn | leave whole blocks or misses |
//! | engine crash at any step | end every session; what the SSD holds is found again |
//! | client dies, hangs up, stalls | give back leases at once, slots after its grace |
//! | client goes on writing after its death (DMA) | hit only its own slots |
//! | client lies in any word of its segment | end its own session at most |
//!
//! The oracle, whole: every answer is a miss or the exact bytes stored under that key; while its session
//! lives, every request is answered exactly once; after all sessions end, all slots are free or hold a
//! block and no lease remains.

pub mod bytes;
pub mod record;
pub mod world;
