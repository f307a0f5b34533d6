//! A thread beside the shard that makes the checksums of write-backs: nobody waits for one, and at the
//! SSD's speed they would take a third of the shard's time.

use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};

use crate::cache::WriteBack;
use crate::index::BlockId;

/// Checksums that may be asked for at once.
pub const HASHES_MAX: u32 = 16;

/// A write-back whose checksum is asked for, or made.
#[derive(Debug, Clone, Copy)]
pub struct Hashing {
    /// The block.
    pub block: BlockId,
    /// From where to where.
    pub write: WriteBack,
    /// The checksum, once it is made.
    pub data_crc: u64,
}

/// The thread, and what it was asked.
#[derive(Debug)]
pub struct Hasher {
    // Dropped before the thread is waited for: that ends it.
    ask: Option<Sender<Hashing>>,
    made: Receiver<Hashing>,
    pending_count: u32,
    thread: Option<JoinHandle<()>>,
}

impl Hasher {
    /// Starts the thread. `checksum` makes it of what a host slot holds; `ring` is called after each.
    ///
    /// # Errors
    /// What the system says of a thread.
    pub fn start(
        mut checksum: impl FnMut(u32) -> u64 + Send + 'static,
        ring: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        // Both hold all that can be asked: neither side ever waits, nor allocates.
        let (ask, asked) = bounded::<Hashing>(HASHES_MAX as usize);
        let (tell, made) = bounded(HASHES_MAX as usize);
        let thread = std::thread::Builder::new().name("kvring-hash".into()).spawn(move || {
            for hashing in asked {
                let data_crc = checksum(hashing.write.host_slot);
                if tell.send(Hashing { data_crc, ..hashing }).is_err() {
                    return;
                }
                ring();
            }
        })?;
        Ok(Self { ask: Some(ask), made, pending_count: 0, thread: Some(thread) })
    }

    /// Checksums that were asked for and not taken.
    pub fn pending_count(&self) -> u32 {
        self.pending_count
    }

    /// Asks for a checksum. False: it makes as many as it can.
    pub fn ask(&mut self, hashing: Hashing) -> bool {
        let taken = self.ask.as_ref().is_some_and(|ask| ask.try_send(hashing).is_ok());
        self.pending_count += u32::from(taken);
        taken
    }

    /// A checksum that was made.
    ///
    /// # Panics
    /// If the thread has ended by a bug of ours: what it was asked for would wait for ever.
    pub fn take(&mut self) -> Option<Hashing> {
        match self.made.try_recv() {
            Ok(made) => {
                self.pending_count -= 1;
                Some(made)
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => panic!("the thread that makes checksums has ended"),
        }
    }
}

impl Drop for Hasher {
    fn drop(&mut self) {
        self.ask = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
