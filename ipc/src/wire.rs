//! The protocol: what an entry of either ring says. `docs/WIRE.md` is its prose; clause numbers
//! refer to it. Words are little-endian, as the machine's (x86-64 and aarch64 only).

use crate::key::BlockKey;
use crate::ring::Entry;

/// Changes whenever an old client and a new server would misread each other.
pub const PROTOCOL_VERSION: u32 = 3;

/// Most keys one `Match` may name: a chain of 131,072 tokens at 16 tokens a block.
pub const MATCH_BLOCKS_MAX: u32 = 8192;
/// Most keys or slots any other request may name: a quarter of a completion ring.
pub const BATCH_BLOCKS_MAX: u32 = 256;
/// Grants that fit one completion: six words of slot and generation.
pub const GRANTS_PER_ENTRY: usize = 6;

/// A client's cookie, echoed in every completion of the request it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u64);

/// A lease: an index and a generation that is never 0, so a `LeaseId` is never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseId(pub u64);

impl LeaseId {
    /// From its parts.
    pub fn new(index: u32, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(index))
    }
    /// Where the server keeps it.
    pub fn index(self) -> u32 {
        self.0 as u32
    }
    /// Which use of that place.
    pub fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A place of the pool, and which use of it: a grant is worthless once the generation moves on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grant {
    /// Slot of the pool.
    pub slot: u32,
    /// Which use of the slot.
    pub generation: u32,
}

impl Grant {
    /// As one word of an entry or of the arena.
    pub fn to_word(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }
    /// From one word.
    pub fn from_word(word: u64) -> Self {
        Self { slot: word as u32, generation: (word >> 32) as u32 }
    }
}

/// What a request asks for (WIRE.md §4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "each is documented at its Submission variant")]
pub enum Op {
    Ping = 1,
    Match = 2,
    Release = 3,
    Load = 4,
    Prefetch = 5,
    Reserve = 6,
    Commit = 7,
    Abort = 8,
    Cancel = 9,
}

impl Op {
    /// From its number.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Op::{Abort, Cancel, Commit, Load, Match, Ping, Prefetch, Release, Reserve};
        [Ping, Match, Release, Load, Prefetch, Reserve, Commit, Abort, Cancel].into_iter().find(|op| *op as u8 == byte)
    }
}

/// How a request, or a run of its blocks, ended (WIRE.md §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Done; for loads and reserves the grants follow.
    Ok = 0,
    /// Reserve: the block is resident or on its way; nothing to store.
    Present = 1,
    /// Load: the block is gone, or its bytes failed their check. Recompute it.
    Miss = 2,
    /// Reserve: no room, or the parent is gone. The store is dropped.
    Dropped = 3,
    /// Load: no slot came free in time. Recompute it.
    Busy = 4,
    /// Cancelled before it was started.
    Cancelled = 5,
    /// The lease or slot generation is not current: expired, released or never granted.
    Stale = 6,
    /// The entry is malformed: unknown operation, count or span out of bounds.
    BadRequest = 7,
    /// Load: a key is not the one that the lease covers at that depth.
    KeyMismatch = 8,
    /// The session holds as many leases or reservations as it may.
    Quota = 9,
}

impl Status {
    /// From its number.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Status::{BadRequest, Busy, Cancelled, Dropped, KeyMismatch, Miss, Ok, Present, Quota, Stale};
        [Ok, Present, Miss, Dropped, Busy, Cancelled, Stale, BadRequest, KeyMismatch, Quota]
            .into_iter()
            .find(|status| *status as u8 == byte)
    }
}

/// A range of the arena holding `count` items, bounded when parsed (WIRE.md §2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Bytes from the start of the arena; a multiple of 16.
    pub offset_in_arena: u32,
    /// Items: keys of 16 bytes or grants of 8.
    pub count: u32,
}

/// A request, as it is after parsing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Submission {
    /// Answered at once with the server's monotonic clock: measures the ring.
    Ping,
    /// The longest resident prefix of a chain of keys, under a lease.
    Match {
        /// The chain, root first.
        keys: Span,
    },
    /// Ends a lease.
    Release {
        /// Which.
        lease: LeaseId,
    },
    /// Brings leased blocks into pool slots, one completion run as they arrive.
    Load {
        /// The lease that covers them.
        lease: LeaseId,
        /// Depth of the first key in the leased chain.
        first: u32,
        /// Their keys, each compared with what the lease covers.
        keys: Span,
    },
    /// As `Load`, without an answer for each block: starts the reads of what is not in the pool.
    Prefetch {
        /// The lease that covers them.
        lease: LeaseId,
        /// Depth of the first block.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Asks for slots to store blocks into.
    Reserve {
        /// Key of the block before the first; ignored when `first` is 0.
        parent: BlockKey,
        /// Depth of the first key in its chain.
        first: u32,
        /// Keys of consecutive blocks.
        keys: Span,
    },
    /// The bytes of these slots are complete.
    Commit {
        /// Grants of the reserve.
        grants: Span,
    },
    /// These slots will not be filled.
    Abort {
        /// Grants of the reserve.
        grants: Span,
    },
    /// Stop starting blocks of an earlier load.
    Cancel {
        /// The load's tag.
        target: Tag,
    },
}

impl Submission {
    /// Which operation this is.
    pub fn op(&self) -> Op {
        match self {
            Self::Ping => Op::Ping,
            Self::Match { .. } => Op::Match,
            Self::Release { .. } => Op::Release,
            Self::Load { .. } => Op::Load,
            Self::Prefetch { .. } => Op::Prefetch,
            Self::Reserve { .. } => Op::Reserve,
            Self::Commit { .. } => Op::Commit,
            Self::Abort { .. } => Op::Abort,
            Self::Cancel { .. } => Op::Cancel,
        }
    }

    /// Completions this request may need at the most: the room to take before it is popped.
    pub fn completions_max(&self) -> u32 {
        match self {
            Self::Load { keys, .. } | Self::Reserve { keys, .. } => keys.count,
            _ => 1,
        }
    }

    /// As an entry (WIRE.md §3).
    pub fn encode(&self, tag: Tag) -> Entry {
        let head =
            |count: u32, first: u32| u64::from(self.op() as u8) | u64::from(count) << 16 | u64::from(first) << 32;
        let mut entry = [tag.0, head(0, 0), 0, 0, 0, 0, 0, 0];
        match *self {
            Self::Ping => {}
            Self::Match { keys } => {
                entry[1] = head(keys.count, 0);
                entry[2] = u64::from(keys.offset_in_arena);
            }
            Self::Release { lease } => entry[3] = lease.0,
            Self::Load { lease, first, keys } => {
                entry[1] = head(keys.count, first);
                entry[2] = u64::from(keys.offset_in_arena);
                entry[3] = lease.0;
            }
            Self::Prefetch { lease, first, count } => {
                entry[1] = head(count, first);
                entry[3] = lease.0;
            }
            Self::Reserve { parent, first, keys } => {
                entry[1] = head(keys.count, first);
                entry[2] = u64::from(keys.offset_in_arena);
                [entry[4], entry[5]] = parent.to_words();
            }
            Self::Commit { grants } | Self::Abort { grants } => {
                entry[1] = head(grants.count, 0);
                entry[2] = u64::from(grants.offset_in_arena);
            }
            Self::Cancel { target } => entry[6] = target.0,
        }
        entry
    }

    /// From an entry: the claims become facts here, or the tag and [`Status::BadRequest`].
    ///
    /// # Errors
    /// The entry names an unknown operation, a count of 0 or above its limit, a depth beyond
    /// [`MATCH_BLOCKS_MAX`], or a span that is not inside the arena.
    pub fn parse(entry: &Entry, arena_bytes: u32) -> (Tag, Result<Self, Status>) {
        let tag = Tag(entry[0]);
        (tag, Self::parse_body(entry, arena_bytes).ok_or(Status::BadRequest))
    }

    fn parse_body(entry: &Entry, arena_bytes: u32) -> Option<Self> {
        let op = Op::from_byte(entry[1] as u8)?;
        let count = u32::from((entry[1] >> 16) as u16);
        let first = (entry[1] >> 32) as u32;
        let bounded = |limit: u32| (count > 0 && count <= limit && first <= MATCH_BLOCKS_MAX - count).then_some(());
        let span = |item_bytes: u32| {
            let offset_in_arena = u32::try_from(entry[2]).ok()?;
            // 8192 keys of 16 bytes fit u32 easily; the sum is checked.
            let end = offset_in_arena.checked_add(count * item_bytes)?;
            (offset_in_arena % 16 == 0 && end <= arena_bytes).then_some(Span { offset_in_arena, count })
        };
        Some(match op {
            Op::Ping => Self::Ping,
            Op::Match => {
                bounded(MATCH_BLOCKS_MAX)?;
                Self::Match { keys: span(16)? }
            }
            Op::Release => Self::Release { lease: LeaseId(entry[3]) },
            Op::Load => {
                bounded(BATCH_BLOCKS_MAX)?;
                Self::Load { lease: LeaseId(entry[3]), first, keys: span(16)? }
            }
            Op::Prefetch => {
                bounded(BATCH_BLOCKS_MAX)?;
                Self::Prefetch { lease: LeaseId(entry[3]), first, count }
            }
            Op::Reserve => {
                bounded(BATCH_BLOCKS_MAX)?;
                Self::Reserve { parent: BlockKey::from_words([entry[4], entry[5]]), first, keys: span(16)? }
            }
            Op::Commit => {
                bounded(BATCH_BLOCKS_MAX)?;
                Self::Commit { grants: span(8)? }
            }
            Op::Abort => {
                bounded(BATCH_BLOCKS_MAX)?;
                Self::Abort { grants: span(8)? }
            }
            Op::Cancel => Self::Cancel { target: Tag(entry[6]) },
        })
    }
}

/// An answer (WIRE.md §5). A request's last completion has `last` set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The request it answers.
    pub tag: Tag,
    /// The request's operation; `None` if that was unknown.
    pub op: Option<Op>,
    /// How this run of blocks ended.
    pub status: Status,
    /// No further completion follows for this tag.
    pub last: bool,
    /// Load: these blocks were read from the disk tier for this request or one like it.
    pub from_disk: bool,
    /// Blocks this completion speaks of.
    pub count: u32,
    /// The first of them, as an index into the request's keys.
    pub first: u32,
    /// Operation's own words: grants, or lease and expiry, or a clock.
    pub payload: [u64; GRANTS_PER_ENTRY],
}

impl Completion {
    /// An answer without blocks.
    pub fn plain(tag: Tag, op: Option<Op>, status: Status) -> Self {
        Self { tag, op, status, last: true, from_disk: false, count: 0, first: 0, payload: [0; GRANTS_PER_ENTRY] }
    }

    /// The grants this completion carries: none unless a load or a reserve ended `Ok`.
    pub fn grants(&self) -> impl Iterator<Item = (u32, Grant)> + '_ {
        let carries = self.status == Status::Ok && matches!(self.op, Some(Op::Load | Op::Reserve));
        let count = if carries { (self.count as usize).min(GRANTS_PER_ENTRY) } else { 0 };
        self.payload[..count].iter().zip(self.first..).map(|(word, index)| (index, Grant::from_word(*word)))
    }

    /// As an entry (WIRE.md §3).
    pub fn encode(&self) -> Entry {
        let flags = u64::from(self.last) | u64::from(self.from_disk) << 1;
        let head = self.op.map_or(0, |op| u64::from(op as u8))
            | u64::from(self.status as u8) << 8
            | flags << 16
            | u64::from(self.count) << 32
            | u64::from(self.first) << 48;
        let [a, b, c, d, e, f] = self.payload;
        [self.tag.0, head, a, b, c, d, e, f]
    }

    /// From an entry; `None` if no server of this version writes such a one.
    pub fn parse(entry: &Entry) -> Option<Self> {
        let [tag, head, payload @ ..] = *entry;
        let flags = (head >> 16) as u8;
        let op = match head as u8 {
            0 => None,
            byte => Some(Op::from_byte(byte)?),
        };
        Some(Self {
            tag: Tag(tag),
            op,
            status: Status::from_byte((head >> 8) as u8)?,
            last: flags & 1 != 0,
            from_disk: flags & 2 != 0,
            count: u32::from((head >> 32) as u16),
            first: u32::from((head >> 48) as u16),
            payload,
        })
    }
}

#[cfg(test)]
#[path = "wire_test.rs"]
mod test;
