//! The bytes of a block, from its key: so that any loaded block can be checked by anybody.

use kvring_ipc::key::BlockKey;

/// Fills a part of a block, which begins at `offset_in_block`.
pub fn fill(key: BlockKey, offset_in_block: usize, part: &mut [u8]) {
    for (place, byte) in (offset_in_block..).zip(part) {
        *byte = byte_at(key, place);
    }
}

/// Where the bytes differ from what [`fill`] writes.
pub fn first_difference(key: BlockKey, block: &[u8]) -> Option<usize> {
    (0..).zip(block).find(|(place, byte)| **byte != byte_at(key, *place)).map(|(place, _)| place)
}

fn byte_at(key: BlockKey, place: usize) -> u8 {
    let [low, high] = key.to_words();
    let word = (low ^ (place as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(high | 1);
    (word >> (place % 8 * 8)) as u8
}
