//! What was read of a header zone, on its way into the index.

use crossbeam_channel::Sender;

use super::disk::DiskGeometry;
use super::header::{HEADER_BYTES, HEADERS_PER_SECTOR, Header};
use crate::limits::SECTOR_BYTES;

/// Sectors of a device's header zone: those of its headers that are sound, and which sectors are not empty.
///
/// The headers stay where they were read to, and the memory goes back to whoever reads the next piece: a
/// page that is touched for the first time costs more than all that is done with its headers.
#[derive(Debug)]
pub struct HeaderPiece {
    memory: Vec<u8>,
    /// Bytes before the first header.
    skip: usize,
    count: usize,
    device: u32,
    held_sectors: Vec<u32>,
    home: Option<Sender<Vec<u8>>>,
}

impl HeaderPiece {
    /// Looks through sectors of a device from `first_sector` on, which lie in `memory` behind the first
    /// `skip` bytes, on a multiple of 8.
    pub fn parse(
        geometry: &DiskGeometry,
        layout: u64,
        device: u32,
        first_sector: u32,
        mut memory: Vec<u8>,
        skip: usize,
    ) -> Self {
        let (mut count, mut held_sectors) = (0, Vec::new());
        let headers: &mut [Header] = bytemuck::cast_slice_mut(&mut memory[skip..]);
        let sector_headers = HEADERS_PER_SECTOR as usize;
        for at in 0..headers.len() {
            let header = headers[at];
            if bytemuck::bytes_of(&header) == [0; HEADER_BYTES as usize] {
                continue;
            }
            let sector = first_sector + (at / sector_headers) as u32;
            if held_sectors.last() != Some(&sector) {
                held_sectors.push(sector);
            }
            let local = sector * sector_headers as u32 + (at % sector_headers) as u32;
            let is_slot = local < geometry.slots_per_device;
            if is_slot && header.is_sound(local * geometry.devices_count + device, layout) {
                headers[count] = header;
                count += 1;
            }
        }
        Self { memory, skip, count, device, held_sectors, home: None }
    }

    /// From whole sectors that lie in memory already.
    pub fn of(geometry: &DiskGeometry, layout: u64, device: u32, first_sector: u32, sectors: &[u8]) -> Self {
        // A vector of bytes begins anywhere.
        let mut memory = vec![0; sectors.len() + SECTOR_BYTES as usize];
        let skip = memory.as_ptr().align_offset(SECTOR_BYTES as usize);
        memory[skip..][..sectors.len()].copy_from_slice(sectors);
        memory.truncate(skip + sectors.len());
        Self::parse(geometry, layout, device, first_sector, memory, skip)
    }

    /// None of its headers is to be believed.
    pub fn distrust(&mut self) {
        self.count = 0;
    }

    /// Where its memory goes when it was used.
    pub fn return_to(&mut self, home: Sender<Vec<u8>>) {
        self.home = Some(home);
    }

    /// Whose it is.
    pub fn device(&self) -> u32 {
        self.device
    }
    /// Sectors in which anything lies, sound or not.
    pub fn held_sectors(&self) -> &[u32] {
        &self.held_sectors
    }
    /// The sound headers, in the order of slots.
    pub fn headers(&self) -> &[Header] {
        bytemuck::cast_slice(&self.memory[self.skip..][..self.count * HEADER_BYTES as usize])
    }
}

impl Drop for HeaderPiece {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            // Nobody reads any more: it just goes.
            let _ = home.send(std::mem::take(&mut self.memory));
        }
    }
}
