//! What lies on the disk besides blocks: the superblock, and 64 bytes for each block (DISK.md §2, §3).

use bytemuck::{Pod, Zeroable};
use kvring_ipc::key::BlockKey;

use crate::checksum;
use crate::limits::SECTOR_BYTES;

/// "KVRING" and the format's version: an old file is never reinterpreted.
pub const MAGIC: u64 = u64::from_le_bytes(*b"KVRING\x01\x00");

/// The first sector of a device's first file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Superblock {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`kvring_ipc::layout::Layout::fingerprint`] of what is stored.
    pub layout: u64,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Slots of this device, and how many there are headers for (0: as many): `room << 32 | count`.
    pub slots: u64,
    /// Slots of each of its files.
    pub slots_per_file: u64,
    /// Which device of how many: `index << 32 | count`.
    pub device: u64,
    /// Common to all devices of one cache.
    pub cache_id: u64,
    /// Checksum of the words above.
    pub crc: u64,
}

impl Superblock {
    /// With its checksum.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        self.crc = self.own_crc();
        self
    }
    /// Slots of this device.
    pub fn slots_count(&self) -> u32 {
        self.slots as u32
    }
    /// How many it could have: its header zone has room for so many.
    pub fn header_slots(&self) -> u32 {
        match (self.slots >> 32) as u32 {
            0 => header_room(u64::from(self.slots_count())),
            room => room.max(self.slots_count()),
        }
    }
    /// Whether its checksum is that of its words.
    pub fn is_sound(&self) -> bool {
        self.magic == MAGIC && self.crc == self.own_crc()
    }
    fn own_crc(&self) -> u64 {
        checksum::of_bytes(&bytemuck::bytes_of(self)[..56])
    }
}

/// A flag of [`Header`]: nobody has made the checksum of the block's bytes yet.
pub const CRC_UNKNOWN: u32 = 1;

/// Bytes of one header; 64 fit a sector.
pub const HEADER_BYTES: u64 = 64;
/// Slots begin on a multiple of this.
pub const SLOTS_AT_BYTES: u64 = 1 << 20;

/// Where slots begin behind the superblock and the headers of so many.
pub fn slots_at(headers: u64) -> u64 {
    ((1 + headers.div_ceil(HEADERS_PER_SECTOR)) * SECTOR_BYTES).next_multiple_of(SLOTS_AT_BYTES)
}

/// How many headers there is room for where there is for so many: up to where slots begin.
pub fn header_room(headers: u64) -> u32 {
    u32::try_from((slots_at(headers) - SECTOR_BYTES) / HEADER_BYTES).unwrap_or(u32::MAX)
}

/// Headers in a sector.
pub const HEADERS_PER_SECTOR: u64 = SECTOR_BYTES / HEADER_BYTES;

const _: () = assert!(size_of::<Header>() as u64 == HEADER_BYTES && size_of::<Superblock>() <= SECTOR_BYTES as usize);

/// What a slot holds: on a disk written after the block's bytes, all zeros for none; in the pool's table as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Header {
    /// The block's key.
    pub key: BlockKey,
    /// Key of its parent; at depth 0 the namespace's id, or zeros.
    pub parent: BlockKey,
    /// Checksum of its bytes.
    pub data_crc: u64,
    /// Which use of the slot.
    pub generation: u32,
    /// Blocks before it in its chain.
    pub depth: u32,
    /// The slot itself: a header that was written elsewhere is not believed.
    pub slot: u32,
    /// Zero on a disk; in the pool's table [`CRC_UNKNOWN`] or zero.
    pub flags: u32,
    /// Checksum of the words above and of the layout's fingerprint.
    pub crc: u64,
}

impl Header {
    /// With its checksum.
    #[must_use]
    pub fn sealed(mut self, layout: u64) -> Self {
        self.crc = self.own_crc(layout);
        self
    }
    /// Whether it is what was written for this slot under this layout.
    pub fn is_sound(&self, slot: u32, layout: u64) -> bool {
        self.slot == slot && self.crc == self.own_crc(layout) && self.generation != 0
    }
    fn own_crc(&self, layout: u64) -> u64 {
        checksum::of_bytes(&bytemuck::bytes_of(self)[..56]) ^ layout
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_golden_header() {
        let header = Header {
            key: BlockKey::from_words([1, 2]),
            parent: BlockKey::from_words([3, 4]),
            data_crc: 5,
            generation: 6,
            depth: 7,
            slot: 8,
            flags: 0,
            crc: 0,
        }
        .sealed(9);
        let words: [u64; 8] = bytemuck::cast(header);
        assert_eq!(words[..7], [1, 2, 3, 4, 5, 7 << 32 | 6, 8]);
        assert!(header.is_sound(8, 9));
        assert!(!header.is_sound(7, 9), "another slot's");
        assert!(!header.is_sound(8, 10), "another layout's");
    }

    #[test]
    fn any_flipped_bit_is_seen() {
        let header = Header { key: BlockKey::from_words([1, 2]), generation: 1, ..Zeroable::zeroed() }.sealed(3);
        for bit in 0..512 {
            let mut words: [u64; 8] = bytemuck::cast(header);
            words[bit / 64] ^= 1 << (bit % 64);
            let flipped: Header = bytemuck::cast(words);
            assert!(!flipped.is_sound(0, 3), "bit {bit}");
        }
        assert!(!Header::zeroed().is_sound(0, checksum::of_bytes(&[0; 56])), "no header is no block");
    }
}
