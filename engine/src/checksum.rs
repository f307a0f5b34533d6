//! CRC-64/NVME of memory that others may write: copied in small pieces, then hashed.

use kvring_ipc::mapping::Mapping;

/// Stays in the first-level cache, so the copy costs a fraction of the read from DRAM.
const PIECE_BYTES: usize = 16 << 10;

/// The checksum of a range of a mapping.
///
/// If somebody writes meanwhile it is the checksum of some mixture, which then matches nothing:
/// the block becomes a miss.
///
/// # Panics
/// If the range is not inside the mapping.
pub fn of_mapping(memory: &Mapping, offset: usize, bytes: usize) -> u64 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
    let mut piece = [0u8; PIECE_BYTES];
    let mut done = 0;
    while done < bytes {
        let length = PIECE_BYTES.min(bytes - done);
        memory.copy_out(offset + done, &mut piece[..length]);
        digest.update(&piece[..length]);
        done += length;
    }
    digest.finalize()
}

/// The checksum of bytes that are ours.
pub fn of_bytes(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

#[cfg(test)]
mod test {
    use super::*;
    use kvring_ipc::mapping::{Pages, sealed_memfd};

    #[test]
    fn the_check_value_of_the_catalogue_and_any_split() {
        // CRC-64/NVME, check value of "123456789" in the CRC catalogue.
        assert_eq!(of_bytes(b"123456789"), 0xae8b_1486_0a79_9888);
        let fd = sealed_memfd("test", 65536, Pages::Small).unwrap();
        let memory = Mapping::new(&fd, 65536).unwrap();
        let bytes: Vec<u8> = (0..50_000u32).map(|i| (i * 7) as u8).collect();
        memory.copy_in(100, &bytes);
        assert_eq!(of_mapping(&memory, 100, bytes.len()), of_bytes(&bytes));
    }
}
