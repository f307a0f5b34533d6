//! The epoch: one word that says which engine process owns the pool (WIRE.md §9).
//!
//! It moves on before another engine process takes the pool over, and after the last one is dead. So what
//! was copied out of the pool under a lease is the block's only if the epoch, read after the copy, is
//! still the one that granted the lease: the next process knows nothing of it and may use the slot anew.

use std::os::fd::OwnedFd;

use rustix::fs::SealFlags;

use crate::mapping::{Mapping, Pages, is_sealed, sealed_memfd_with};
use crate::sync::{Ordering, fence};

/// Bytes of the epoch's memory: a page, for two words.
pub const EPOCH_BYTES: usize = 4096;

/// The keeper's side.
#[derive(Debug)]
pub struct EpochWriter {
    mapping: Mapping,
}

impl EpochWriter {
    /// Epoch 0, and the descriptor to pass to clients: nobody else can map it for writing.
    ///
    /// # Errors
    /// What the kernel says of memfd_create, mmap or the seals.
    pub fn create() -> rustix::io::Result<(Self, OwnedFd)> {
        let (fd, mapping) = sealed_memfd_with("kvring-epoch", EPOCH_BYTES as u64, Pages::Small, |fd| {
            let mapping = Mapping::new(fd, EPOCH_BYTES)?;
            rustix::fs::fcntl_add_seals(fd, SealFlags::FUTURE_WRITE)?;
            Ok(mapping)
        })?;
        Ok((Self { mapping }, fd))
    }

    /// The pool is given up: whoever keeps it mapped for the next engine process keeps memory from it.
    pub fn give_up_pool(&mut self) {
        let pools = &self.mapping.words64(0, 2)[1];
        pools.store(pools.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// Another engine process comes: everything that the last one granted is void.
    pub fn advance(&mut self, epoch: u64) {
        // SeqCst: before anything that the next process does, whatever the peer's CPU.
        self.mapping.words64(0, 1)[0].store(epoch, Ordering::SeqCst);
    }
}

/// A client's side.
#[derive(Debug)]
pub struct EpochReader {
    mapping: Mapping,
    epoch: u64,
    pools: u64,
}

impl EpochReader {
    /// Of a session that was granted in `epoch`.
    ///
    /// # Errors
    /// `EINVAL` if it is no sealed memfd of the right size; else what mmap says.
    pub fn open(fd: &OwnedFd, epoch: u64) -> rustix::io::Result<Self> {
        if !is_sealed(fd, EPOCH_BYTES as u64)? {
            return Err(rustix::io::Errno::INVAL);
        }
        let mapping = Mapping::new_read_only(fd, EPOCH_BYTES)?;
        let pools = mapping.words64(0, 2)[1].load(Ordering::Acquire);
        Ok(Self { mapping, epoch, pools })
    }

    /// Whether the pool of the session was given up since: no server will have it again.
    pub fn is_given_up(&self) -> bool {
        self.mapping.words64(0, 2)[1].load(Ordering::Acquire) != self.pools
    }

    /// Whether the engine process that granted the session still owned the pool when all that was read
    /// before this call was read.
    pub fn is_current(&self) -> bool {
        // Acquire: the copy's loads come before the load of the epoch.
        fence(Ordering::Acquire);
        self.mapping.words64(0, 1)[0].load(Ordering::Acquire) == self.epoch
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_epoch_ends_for_all_who_were_granted_in_it() {
        let (mut writer, fd) = EpochWriter::create().unwrap();
        writer.advance(3);
        let reader = EpochReader::open(&fd, 3).unwrap();
        assert!(reader.is_current());
        writer.advance(4);
        assert!(!reader.is_current() && EpochReader::open(&fd, 4).unwrap().is_current());
        let reader = EpochReader::open(&fd, 4).unwrap();
        writer.give_up_pool();
        assert!(reader.is_given_up() && reader.is_current());
        assert!(Mapping::new(&fd, EPOCH_BYTES).is_err(), "a client cannot write it");
    }
}
