//! The event log: which blocks became resident and which are gone, for whoever routes requests to
//! where their prefix is (WIRE.md §8).
//!
//! One memfd, written by the shard, read by every client at its own pace. Nobody is waited for: who is
//! more than [`EVENTS`] behind has lost some and is told so. Sealed so that only the server can write.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::SealFlags;

use crate::key::BlockKey;
use crate::mapping::{Mapping, Pages, sealed_memfd_with};
use crate::sync::{AtomicU64, Ordering, fence};

/// Events that the log holds: the evictions of a second at 64 GB/s of 1 MiB blocks.
pub const EVENTS: u64 = 1 << 16;
const ENTRY_WORDS: usize = 4;
/// The count of events ever written, on a cache line of its own.
const HEADER_WORDS: usize = 8;
/// Bytes of the log.
pub const LOG_BYTES: usize = (HEADER_WORDS + EVENTS as usize * ENTRY_WORDS) * 8;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The block can be matched from now on.
    Stored(BlockKey),
    /// It cannot any more: evicted from its last tier, forgotten, or reset.
    Removed(BlockKey),
}

/// The server's side.
#[derive(Debug)]
pub struct EventLog {
    mapping: Arc<Mapping>,
    written: u64,
}

impl EventLog {
    /// An empty log, and the descriptor to pass to clients.
    ///
    /// # Errors
    /// What the kernel says of memfd_create, mmap or the seals.
    pub fn create() -> rustix::io::Result<(Self, OwnedFd)> {
        let (fd, mapping) = sealed_memfd_with("kvring-events", LOG_BYTES as u64, Pages::Small, |fd| {
            let mapping = Mapping::new(fd, LOG_BYTES)?;
            // From here on nobody else can map it for writing; our own mapping stays.
            rustix::fs::fcntl_add_seals(fd, SealFlags::FUTURE_WRITE)?;
            Ok(mapping)
        })?;
        Ok((Self { mapping: Arc::new(mapping), written: 0 }, fd))
    }

    /// Writes an event. Never waits.
    pub fn write(&mut self, event: Event) {
        let (kind, key) = match event {
            Event::Stored(key) => (0, key),
            Event::Removed(key) => (1, key),
        };
        let [low, high] = key.to_words();
        let entry = entry(&self.mapping, self.written);
        // A reader that sees any of the new words sees this first, or the fence below orders it.
        entry[0].store(0, Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `read`: new words are not seen with the old number.
        fence(Ordering::Release);
        for (word, value) in entry[1..].iter().zip([kind, low, high]) {
            word.store(value, Ordering::Relaxed);
        }
        self.written += 1;
        // Release: pairs with the Acquire in `read`: who sees the number sees the words.
        entry[0].store(self.written, Ordering::Release);
        self.mapping.words64(0, 1)[0].store(self.written, Ordering::Release);
    }
}

fn entry(mapping: &Mapping, number: u64) -> &[AtomicU64] {
    let at = HEADER_WORDS + (number % EVENTS) as usize * ENTRY_WORDS;
    mapping.words64(at * 8, ENTRY_WORDS)
}

/// A client's side.
#[derive(Debug)]
pub struct EventReader {
    mapping: Mapping,
    read: u64,
}

/// What a reader found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Events {
    /// In order.
    pub events: Vec<Event>,
    /// Some were overwritten before they were read: nothing that was heard of earlier is certain.
    pub lost: bool,
}

impl EventReader {
    /// Reads what is written from now on.
    ///
    /// # Errors
    /// `EINVAL` if it is no sealed memfd of the right size; else what mmap says.
    pub fn open(fd: &OwnedFd) -> rustix::io::Result<Self> {
        if !crate::mapping::is_sealed(fd, LOG_BYTES as u64)? {
            return Err(rustix::io::Errno::INVAL);
        }
        let mapping = Mapping::new_read_only(fd, LOG_BYTES)?;
        let read = mapping.words64(0, 1)[0].load(Ordering::Acquire);
        Ok(Self { mapping, read })
    }

    /// At most `limit` events since the last call.
    pub fn read(&mut self, limit: usize) -> Events {
        let mut found = Events::default();
        let written = self.mapping.words64(0, 1)[0].load(Ordering::Acquire);
        if written.wrapping_sub(self.read) > EVENTS {
            (found.lost, self.read) = (true, written);
        }
        while self.read != written && found.events.len() < limit {
            let entry = entry(&self.mapping, self.read);
            let number = entry[0].load(Ordering::Acquire);
            let [kind, low, high] = std::array::from_fn(|i| entry[1 + i].load(Ordering::Relaxed));
            // Acquire: pairs with the Release fence in `write`: if a word was new, so is the number now.
            fence(Ordering::Acquire);
            if number != self.read + 1 || entry[0].load(Ordering::Relaxed) != number {
                (found.lost, self.read) = (true, written);
                found.events.clear();
                break;
            }
            self.read += 1;
            let key = BlockKey::from_words([low, high]);
            found.events.push(if kind == 0 { Event::Stored(key) } else { Event::Removed(key) });
        }
        found
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn key(n: u64) -> BlockKey {
        BlockKey::from_words([n, !n])
    }

    #[test]
    fn a_reader_hears_what_comes_after_it_and_is_told_when_it_lost_some() {
        let (mut log, fd) = EventLog::create().unwrap();
        log.write(Event::Stored(key(1)));
        let mut reader = EventReader::open(&fd).unwrap();
        assert_eq!(reader.read(10), Events::default(), "the past is not told");
        log.write(Event::Stored(key(2)));
        log.write(Event::Removed(key(1)));
        assert_eq!(reader.read(1).events, [Event::Stored(key(2))]);
        assert_eq!(reader.read(9).events, [Event::Removed(key(1))]);
        (0..=EVENTS).for_each(|n| log.write(Event::Stored(key(n))));
        assert_eq!(reader.read(9), Events { events: vec![], lost: true });
        log.write(Event::Removed(key(7)));
        assert_eq!(reader.read(9), Events { events: vec![Event::Removed(key(7))], lost: false });
    }

    #[test]
    fn a_client_cannot_write() {
        let (_log, fd) = EventLog::create().unwrap();
        assert_eq!(Mapping::new(&fd, LOG_BYTES).unwrap_err(), rustix::io::Errno::PERM);
    }

    #[test]
    fn a_reader_beside_a_writer_hears_everything_in_order_or_that_it_did_not() {
        let (mut log, fd) = EventLog::create().unwrap();
        let mut reader = EventReader::open(&fd).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for n in 0..400_000 {
                    log.write(Event::Stored(key(n)));
                    if n % 4096 == 0 {
                        std::thread::sleep(std::time::Duration::from_micros(200));
                    }
                }
            });
            let (mut next, mut heard) = (0, 0);
            while next < 400_000 {
                let events = reader.read(1000);
                if events.lost {
                    next = 0;
                }
                for event in events.events {
                    let Event::Stored(key) = event else { panic!("{event:?}") };
                    let [n, not] = key.to_words();
                    assert!(not == !n && (next == 0 || n == next), "event {n} after {next}");
                    (next, heard) = (n + 1, heard + 1);
                }
                if reader.read == 400_000 {
                    break;
                }
            }
            assert!(heard > 0);
        });
    }
}
