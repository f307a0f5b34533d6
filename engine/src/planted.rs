//! Bugs that the simulation must find, to know that it would (`cargo xtask bugs`).
//!
//! Built in only with the feature `planted`, which is for `xtask` alone; else every question here is a constant no.

macro_rules! bugs {
    ($($name:ident: $doc:literal),* $(,)?) => {
        /// One of them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Bug { $(#[doc = $doc] $name,)* }

        impl Bug {
            /// Each with what it does.
            pub const ALL: &[(Bug, &str)] = &[$((Bug::$name, $doc),)*];
        }
    };
}

bugs! {
    DiskChecksumSkipped: "a block from the SSD is not compared with its checksum",
    QuarantineSkipped: "the slot of a dead writer is used again at once",
    GraceSkipped: "the slot of a dead writer is used again without its grace",
    GenerationIgnored: "a commit of an earlier use of a slot is taken",
    LoanUnpinned: "a slot on loan may be evicted",
    LeaseIgnored: "a leased block may be evicted",
    ParentBeforeChild: "a block may be evicted before its children",
    ReadNotAwaited: "a slot that is being read is granted before the read has ended",
    FirstRankIsAll: "a block is complete when one rank has committed",
    WaiterForgotten: "a load that waits for another's read is not answered",
    DetachedServed: "a forgotten block is served to those who hold a lease",
    ResetKeepsHeaders: "a reset leaves the headers on the SSD",
    NamespaceKeepsHeaders: "a reset of a namespace leaves its headers on the SSD",
    NamespaceKeepsTable: "a reset of a namespace leaves in the slot table what somebody holds",
    NamespaceKeepsFree: "a reset of a namespace leaves in the slot table what lay in slots that are free",
    ResetKeepsTable: "a reset leaves the slot table",
    TableKeepsHeader: "a slot's header stays in the table while the slot is filled anew",
    TableBeforeBytes: "a slot's header is in the table before its block is committed",
    WriterNotTabled: "the table does not say who is filling a slot",
    WriterNotCleared: "the table says for ever that a slot is being filled",
    QuarantineLeaks: "a quarantined slot is never free again",
    BirthForgotten: "a free slot that has pages is not used before they are touched again",
    GrowthKeepsHeaders: "a pool that has grown again believes what the slot table said of it when it was smaller",
    ForgetKeepsHeaders: "a block that an operator has had forgotten is found again by the next engine process",
    ShrinkForgetsWriters: "a pool that has grown again does not wait for who may be writing where it grew",
    MovedOnLoan: "a block that is on loan is moved to another slot",
    MovedUncopied: "a block is moved to another slot without its bytes",
    MovedHeaderFirst: "the table says that a block was moved before its bytes are there",
    ChangesMissed: "what changes in the pool while the next engine process prepares is not looked at again",
    ChangeNotNoted: "a change of the slot table is not noted in its journal",
    StrandedStays: "a block that is in the pool alone, and what continues it on the SSD alone, never leaves",
    OrphanLeaks: "a recovered slot whose block has no parent is never free again",
}

#[cfg(feature = "planted")]
static PLANTED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(u32::MAX);

/// From now on the engine has this bug and no other.
#[cfg(feature = "planted")]
pub fn plant(bug: Bug) {
    PLANTED.store(bug as u32, std::sync::atomic::Ordering::SeqCst);
}

/// From now on the engine has no bug.
#[cfg(feature = "planted")]
pub fn plant_none() {
    PLANTED.store(u32::MAX, std::sync::atomic::Ordering::SeqCst);
}

/// Whether the engine has this bug.
#[cfg(feature = "planted")]
#[inline]
pub fn has(bug: Bug) -> bool {
    PLANTED.load(std::sync::atomic::Ordering::Relaxed) == bug as u32
}

/// Whether the engine has this bug: it has not.
#[cfg(not(feature = "planted"))]
#[inline]
pub const fn has(_bug: Bug) -> bool {
    false
}

/// What a death between two stores is: a panic with this.
#[cfg(feature = "planted")]
#[derive(Debug, Clone, Copy)]
pub struct Died;

#[cfg(feature = "planted")]
thread_local! {
    static STEPS_LEFT: std::cell::Cell<u32> = const { std::cell::Cell::new(u32::MAX) };
}

/// The engine process of this thread dies before its `steps`-th next store that the next one will see, or not at all.
#[cfg(feature = "planted")]
pub fn die_after(steps: Option<u32>) {
    STEPS_LEFT.set(steps.unwrap_or(u32::MAX));
}

/// Here a process may die whose next store is seen by the one that follows it, or by an instance.
#[cfg(feature = "planted")]
pub fn step() {
    let left = STEPS_LEFT.get();
    if left == u32::MAX {
        return;
    }
    STEPS_LEFT.set(left.saturating_sub(1));
    if left == 0 {
        STEPS_LEFT.set(u32::MAX);
        std::panic::panic_any(Died);
    }
}

/// Here a process may die whose next store is seen by the one that follows it, or by an instance: it does not.
#[cfg(not(feature = "planted"))]
#[inline]
pub const fn step() {}
