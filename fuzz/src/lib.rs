//! What the targets share: an input as a source of numbers.

use std::sync::Arc;

use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};

/// An input, eaten from the front. Past its end there are zeros.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether anything is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// At most this many bytes.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
    /// This many bytes, little-endian.
    fn number(&mut self, bytes: usize) -> u64 {
        let mut word = [0; 8];
        let taken = self.take(bytes);
        word[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(word)
    }
    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }
    /// Two.
    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }
    /// Four.
    pub fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }
    /// Eight.
    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }
}

/// Memory as the engine knows it.
pub fn mapping(bytes: u64) -> Arc<Mapping> {
    let fd = sealed_memfd("kvring-fuzz", bytes, Pages::Small).expect("a memfd");
    Arc::new(Mapping::new(&fd, bytes as usize).expect("a mapping"))
}
