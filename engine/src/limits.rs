//! Every bound of the data plane, and the arithmetic behind it.

use kvring_ipc::segment::RING_DEPTH;
use kvring_ipc::wire::{BATCH_BLOCKS_MAX, MATCH_BLOCKS_MAX};

/// Most sessions of one server: 64 instances of 8 ranks and a scheduler each. 1.2 MB of segment apiece.
pub const SESSIONS_MAX: usize = 576;
/// Most leases at once, over all sessions; each costs 1 KiB of loan bits.
pub const LEASES_MAX: usize = 4096;
/// Most leases of one session: none may take them all.
pub const LEASES_PER_SESSION_MAX: u32 = 1024;
/// Sessions of one process, and of one instance: 32 ranks, a scheduler, and as many that are on their way out.
pub const SESSIONS_PER_PEER_MAX: usize = 66;
/// Sessions of one user who is not the server's, and connections of his that have none.
pub const SESSIONS_PER_USER_MAX: usize = 144;
/// Connections of one process that have no session.
pub const ASKERS_PER_PEER_MAX: usize = 16;
/// Slots that an instance may fill or have on loan at once, however many share the pool: else its part of it.
pub const SHARE_SLOTS_MIN: u32 = 64;
/// Namespaces that are counted apart at once.
pub const NAMESPACES_MAX: usize = 1024;
/// Loads in flight at once, over all sessions; each costs about 1.2 KiB.
pub const LOADS_MAX: usize = 512;
/// Loads in flight of one session: four full batches fill the completion ring.
pub const LOADS_PER_SESSION_MAX: u32 = 64;
/// Entries taken from one session before the next one has its turn.
pub const SESSION_BUDGET: u32 = 32;
/// Completions taken from one device in one turn: each may cost a checksum, 0.1 ms for 1 MiB.
pub const DEVICE_BUDGET: usize = 8;
/// Reads that may wait for a device when a prefetch adds another: a demand read waits behind these.
pub const PREFETCH_AHEAD_MAX: u32 = 64;
/// Places looked at for one victim before giving up for now.
pub const VICTIM_BUDGET: u32 = 4096;
/// Largest number of slots in a tier: an index is a `u32` and two values are reserved.
pub const SLOTS_MAX: u64 = u32::MAX as u64 - 2;
/// Smallest unit of direct I/O here, and of everything on disk.
pub const SECTOR_BYTES: u64 = 4096;
/// How often leases, quarantine and deadlines are looked at.
pub const HOUSEKEEPING_NS: u64 = 1_000_000;

const _: () = assert!(BATCH_BLOCKS_MAX <= RING_DEPTH / 4);
const _: () = assert!(MATCH_BLOCKS_MAX.is_multiple_of(64));
const _: () = assert!(LEASES_PER_SESSION_MAX as usize * 4 <= LEASES_MAX);
