//! The bytes of a block, from its key: so that any loaded block can be checked by anybody. They are
//! made and compared a word at a time: a simulation does little else.

use kvring_ipc::key::BlockKey;

/// Fills a part of a block, which begins at `offset_in_block`: at a word.
pub fn fill(key: BlockKey, offset_in_block: usize, part: &mut [u8]) {
    assert!(offset_in_block.is_multiple_of(8));
    for (word, bytes) in words(key, offset_in_block).zip(part.chunks_mut(8)) {
        bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
    }
}

/// Where the bytes differ from what [`fill`] writes.
pub fn first_difference(key: BlockKey, block: &[u8]) -> Option<usize> {
    let (whole, _) = block.as_chunks();
    let equal = whole.iter().zip(words(key, 0)).take_while(|(bytes, word)| u64::from_le_bytes(**bytes) == *word);
    let equal = equal.count() * 8;
    let expected = words(key, equal).flat_map(u64::to_le_bytes);
    block[equal..].iter().zip(expected).position(|(byte, expected)| *byte != expected).map(|at| equal + at)
}

/// The words of a block from a byte on.
fn words(key: BlockKey, offset_in_block: usize) -> impl Iterator<Item = u64> {
    let [low, high] = key.to_words();
    (offset_in_block as u64 / 8..).map(move |at| (low ^ at.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(high | 1))
}

#[cfg(test)]
mod test {
    use super::*;

    /// The same, said a byte at a time.
    fn byte_at(key: BlockKey, place: usize) -> u8 {
        let [low, high] = key.to_words();
        let word = (low ^ (place as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(high | 1);
        (word >> (place % 8 * 8)) as u8
    }

    #[test]
    fn any_part_and_any_byte() {
        let key = BlockKey::from_words([0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]);
        for (offset, bytes) in [(0, 4096), (2048, 1536), (8, 8), (16, 1003), (0, 5), (0, 0)] {
            let mut part = vec![0; bytes];
            fill(key, offset, &mut part);
            let expected: Vec<u8> = (offset..offset + bytes).map(|place| byte_at(key, place)).collect();
            assert_eq!(part, expected, "{bytes} bytes at {offset}");
        }
        let mut block = vec![0; 1003];
        fill(key, 0, &mut block);
        assert_eq!(first_difference(key, &block), None);
        for at in (0..block.len()).rev() {
            block[at] ^= 0x80;
            assert_eq!(first_difference(key, &block), Some(at), "the first of those that differ");
        }
    }
}
