//! Slots of the SSD tier: where each lies, what its header says, which headers must be written.
//! Knows no I/O: the shard moves the bytes.

use std::collections::VecDeque;
use std::sync::Arc;

use bytemuck::Zeroable;
use kvring_ipc::key::BlockKey;
use kvring_ipc::mapping::Mapping;
use kvring_ipc::sync::Ordering;

use super::header::{HEADER_BYTES, HEADERS_PER_SECTOR, Header};
use crate::limits::SECTOR_BYTES;

/// Where slots lie on the devices. A slot is on device `slot % devices`, so blocks are striped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskGeometry {
    /// Devices, each with the same number of slots.
    pub devices_count: u32,
    /// Slots of one device.
    pub slots_per_device: u32,
    /// Slots of one file of a device.
    pub slots_per_file: u32,
    /// Bytes of a slot.
    pub slot_bytes: u64,
}

impl DiskGeometry {
    /// Slots of all devices.
    pub fn slots_count(&self) -> u32 {
        self.devices_count * self.slots_per_device
    }
    /// Sectors of a device's header zone.
    pub fn header_sectors(&self) -> u64 {
        u64::from(self.slots_per_device).div_ceil(HEADERS_PER_SECTOR)
    }
    /// Where the slot zone begins in a device's first file: behind superblock and headers, on 1 MiB.
    pub fn data_offset(&self) -> u64 {
        ((1 + self.header_sectors()) * SECTOR_BYTES).next_multiple_of(1 << 20)
    }
    /// Files of a device.
    pub fn files_per_device(&self) -> u32 {
        self.slots_per_device.div_ceil(self.slots_per_file)
    }
    /// Bytes of one of a device's files.
    pub fn file_bytes(&self, file: u32) -> u64 {
        let slots = self.slots_per_file.min(self.slots_per_device - file * self.slots_per_file);
        u64::from(slots) * self.slot_bytes + if file == 0 { self.data_offset() } else { 0 }
    }
    /// Which device holds a slot.
    pub fn device_of(&self, slot: u32) -> usize {
        (slot % self.devices_count) as usize
    }
    /// Which of the device's slots it is.
    pub fn local_of(&self, slot: u32) -> u32 {
        slot / self.devices_count
    }
    /// Which of the device's files holds it, and where in it.
    pub fn offset_of(&self, slot: u32) -> (u16, u64) {
        let local = self.local_of(slot);
        let (file, index) = (local / self.slots_per_file, local % self.slots_per_file);
        let start = if file == 0 { self.data_offset() } else { 0 };
        (file as u16, start + u64::from(index) * self.slot_bytes)
    }
    /// Which sector of the header zone holds its header, counted from 0.
    pub fn header_sector_of(&self, slot: u32) -> u32 {
        self.local_of(slot) / HEADERS_PER_SECTOR as u32
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    generation: u32,
    data_crc: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sector {
    Clean,
    Queued,
    Writing,
    /// Changed again while it was being written.
    WritingStale,
}

/// One device's header zone in memory.
#[derive(Debug)]
struct Headers {
    image: Arc<Mapping>,
    sectors: Box<[Sector]>,
    queue: VecDeque<u32>,
    /// Sectors whose old headers may still be on the device after a reset.
    uncleared: Box<[bool]>,
    uncleared_count: u32,
    /// What lies on the device is not known: its image is zeros in places.
    unread: bool,
}

/// All slots of the SSD tier.
#[derive(Debug)]
pub struct DiskSlots {
    geometry: DiskGeometry,
    layout: u64,
    slots: Box<[Slot]>,
    /// Free slots of each device.
    free: Vec<Vec<u32>>,
    next_device: usize,
    headers: Vec<Headers>,
    /// Slots that recovery has taken so far; `None` once it is over.
    recovering: Option<Vec<bool>>,
    /// A reset came before the images were read: what they hold goes as soon as they are.
    clear_when_read: bool,
}

/// The slots among these of a device that have sound headers. Touches only the image.
pub fn sound_headers(
    geometry: &DiskGeometry,
    layout: u64,
    device: u32,
    image: &Mapping,
    locals: std::ops::Range<u32>,
) -> Vec<u32> {
    let locals = locals.start..locals.end.min(geometry.slots_per_device);
    let slot_of = |local: u32| local * geometry.devices_count + device;
    locals.filter(|local| header_at(image, *local).is_sound(slot_of(*local), layout)).map(slot_of).collect()
}

fn header_at(image: &Mapping, local: u32) -> Header {
    let words = image.words64((u64::from(local) * HEADER_BYTES) as usize, 8);
    let words: [u64; 8] = std::array::from_fn(|i| words[i].load(Ordering::Relaxed));
    bytemuck::cast(words)
}

impl DiskSlots {
    /// Empty slots over these header images, one a device, as read from the disk or zeros.
    pub fn new(geometry: DiskGeometry, layout: u64, images: Vec<Arc<Mapping>>) -> Self {
        assert_eq!(images.len(), geometry.devices_count as usize);
        let free = (0..geometry.devices_count)
            .map(|device| {
                (0..geometry.slots_per_device).rev().map(|local| local * geometry.devices_count + device).collect()
            })
            .collect();
        let sectors = geometry.header_sectors() as usize;
        let headers = images.into_iter().map(|image| Headers {
            image,
            sectors: vec![Sector::Clean; sectors].into_boxed_slice(),
            queue: VecDeque::with_capacity(sectors),
            uncleared: vec![false; sectors].into_boxed_slice(),
            uncleared_count: 0,
            unread: false,
        });
        Self {
            slots: vec![Slot::default(); geometry.slots_count() as usize].into_boxed_slice(),
            geometry,
            layout,
            free,
            next_device: 0,
            headers: headers.collect(),
            recovering: None,
            clear_when_read: false,
        }
    }

    /// The images are yet to be read: until [`DiskSlots::end_recovery`] no slot is given out.
    pub fn begin_recovery(&mut self) {
        self.recovering = Some(vec![false; self.slots.len()]);
    }
    /// Whether what the disk holds is still being looked through.
    pub fn is_recovering(&self) -> bool {
        self.recovering.is_some()
    }
    /// The header of a slot, as the image says.
    pub fn header(&self, slot: u32) -> Header {
        header_at(&self.headers[self.geometry.device_of(slot)].image, self.geometry.local_of(slot))
    }
    /// The key in the header of a slot.
    pub fn key(&self, slot: u32) -> BlockKey {
        let image = &self.headers[self.geometry.device_of(slot)].image;
        let words = image.words64((u64::from(self.geometry.local_of(slot)) * HEADER_BYTES) as usize, 2);
        BlockKey::from_words(std::array::from_fn(|i| words[i].load(Ordering::Relaxed)))
    }
    /// Brings a slot's header closer.
    pub fn prefetch_header(&self, slot: u32) {
        let image = &self.headers[self.geometry.device_of(slot)].image;
        let offset = u64::from(self.geometry.local_of(slot)) * HEADER_BYTES;
        crate::dma::prefetch(&image.words64(offset as usize, 1)[0]);
        crate::dma::prefetch(&self.slots[slot as usize]);
    }
    /// What a sound header says of its slot; `taken` if its block is in the index because of it.
    pub fn recovered(&mut self, header: &Header, taken: bool) {
        self.slots[header.slot as usize] = Slot { generation: header.generation, data_crc: header.data_crc };
        if let Some(recovering) = &mut self.recovering {
            recovering[header.slot as usize] = taken;
        }
    }
    /// What the disk holds is known: its free slots may be used.
    pub fn end_recovery(&mut self) {
        let Some(taken) = self.recovering.take() else { return };
        for free in &mut self.free {
            free.retain(|slot| !taken[*slot as usize]);
        }
        if std::mem::take(&mut self.clear_when_read) {
            self.clear_headers();
        }
    }
    /// Every slot that has a sound header.
    pub fn sound_headers(&self) -> Vec<u32> {
        let all = 0..self.geometry.slots_per_device;
        let of = |(device, headers): (u32, &Headers)| {
            sound_headers(&self.geometry, self.layout, device, &headers.image, all.clone())
        };
        (0..).zip(&self.headers).flat_map(of).collect()
    }
    /// Whether a reset came while the images were being read: none of it is to be taken.
    pub fn is_forgotten(&self) -> bool {
        self.clear_when_read
    }

    /// Where slots lie.
    pub fn geometry(&self) -> &DiskGeometry {
        &self.geometry
    }
    /// Slots that are free.
    pub fn free_count(&self) -> usize {
        self.free.iter().map(Vec::len).sum()
    }

    /// A free slot, each device in its turn.
    pub fn acquire(&mut self) -> Option<u32> {
        if self.is_recovering() {
            return None;
        }
        for _ in 0..self.free.len() {
            self.next_device = (self.next_device + 1) % self.free.len();
            if let Some(slot) = self.free[self.next_device].pop() {
                let generation = &mut self.slots[slot as usize].generation;
                *generation = generation.checked_add(1).unwrap_or(1);
                return Some(slot);
            }
        }
        None
    }

    /// Takes a slot back. Its header stays on the disk: should it be found again after a crash, the
    /// bytes are the block's, or fail their checksum.
    pub fn release(&mut self, slot: u32) {
        if let Some(taken) = &mut self.recovering {
            taken[slot as usize] = false;
            return;
        }
        self.free[self.geometry.device_of(slot)].push(slot);
    }

    /// The bytes about to be written have this checksum.
    pub fn set_data_crc(&mut self, slot: u32, data_crc: u64) {
        self.slots[slot as usize].data_crc = data_crc;
    }
    /// What the bytes read must have.
    pub fn data_crc(&self, slot: u32) -> u64 {
        self.slots[slot as usize].data_crc
    }

    /// Which use of the slot this is.
    pub fn generation(&self, slot: u32) -> u32 {
        self.slots[slot as usize].generation
    }

    /// Its bytes are not what was written: a restart finds nothing there.
    pub fn clear_header(&mut self, slot: u32) {
        self.write_header(slot, &Header::zeroed());
    }

    /// The bytes are on the device: their header may follow.
    pub fn describe(&mut self, slot: u32, key: BlockKey, parent: BlockKey, depth: u32) {
        let Slot { generation, data_crc } = self.slots[slot as usize];
        let header = Header { key, parent, data_crc, generation, depth, slot, flags: 0, crc: 0 }.sealed(self.layout);
        self.write_header(slot, &header);
    }

    fn write_header(&mut self, slot: u32, header: &Header) {
        let sector = self.geometry.header_sector_of(slot);
        let device = &mut self.headers[self.geometry.device_of(slot)];
        let offset = u64::from(self.geometry.local_of(slot)) * HEADER_BYTES;
        device.image.copy_in(offset as usize, bytemuck::bytes_of(header));
        let state = &mut device.sectors[sector as usize];
        match *state {
            Sector::Clean => {
                *state = Sector::Queued;
                device.queue.push_back(sector);
            }
            Sector::Writing => *state = Sector::WritingStale,
            Sector::Queued | Sector::WritingStale => {}
        }
    }

    /// Wipes every header: a restart finds nothing, once [`DiskSlots::is_cleared`].
    pub fn clear_headers(&mut self) {
        if self.is_recovering() {
            self.clear_when_read = true;
            return;
        }
        const NOTHING: [u8; SECTOR_BYTES as usize] = [0; SECTOR_BYTES as usize];
        for device in &mut self.headers {
            for (index, state) in device.sectors.iter_mut().enumerate() {
                let offset = index * SECTOR_BYTES as usize;
                let mut bytes = NOTHING;
                device.image.copy_out(offset, &mut bytes);
                // What is empty here is empty there, unless it is on its way.
                if bytes == NOTHING && *state == Sector::Clean && !device.uncleared[index] && !device.unread {
                    continue;
                }
                device.image.copy_in(offset, &NOTHING);
                device.uncleared_count += u32::from(!std::mem::replace(&mut device.uncleared[index], true));
                match *state {
                    Sector::Clean => {
                        *state = Sector::Queued;
                        device.queue.push_back(index as u32);
                    }
                    Sector::Writing => *state = Sector::WritingStale,
                    Sector::Queued | Sector::WritingStale => {}
                }
            }
        }
    }
    /// Not all of a device's headers could be read: a reset clears what it cannot see as well.
    pub fn is_unread(&mut self, device: u32) {
        self.headers[device as usize].unread = true;
    }
    /// Whether no header from before the last reset is on a device any more.
    pub fn is_cleared(&self) -> bool {
        !self.clear_when_read && self.headers.iter().all(|device| device.uncleared_count == 0)
    }

    /// The next header sector of a device to write. It is written from the image as it is then: if it
    /// changes meanwhile it is torn on the disk, its checksum says so, and it is written again.
    pub fn next_header_sector(&mut self, device: usize) -> Option<u32> {
        let device = &mut self.headers[device];
        let sector = device.queue.pop_front()?;
        device.sectors[sector as usize] = Sector::Writing;
        Some(sector)
    }
    /// Whether any header of the device waits.
    pub fn has_header_to_write(&self, device: usize) -> bool {
        !self.headers[device].queue.is_empty()
    }
    /// A header sector was written, or could not be: then its blocks are lost with the next restart.
    pub fn header_written(&mut self, device: usize, sector: u32, good: bool) {
        let device = &mut self.headers[device];
        let state = &mut device.sectors[sector as usize];
        let stale = *state == Sector::WritingStale;
        if good && !stale && std::mem::take(&mut device.uncleared[sector as usize]) {
            device.uncleared_count -= 1;
        }
        *state = if stale { Sector::Queued } else { Sector::Clean };
        if stale {
            device.queue.push_back(sector);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use kvring_ipc::mapping::{Pages, sealed_memfd};

    fn image(bytes: u64) -> Arc<Mapping> {
        let fd = sealed_memfd("test", bytes, Pages::Small).unwrap();
        Arc::new(Mapping::new(&fd, bytes as usize).unwrap())
    }

    #[test]
    fn slots_are_striped_and_never_overlap() {
        let geometry = DiskGeometry { devices_count: 3, slots_per_device: 130, slots_per_file: 50, slot_bytes: 8192 };
        assert_eq!(geometry.files_per_device(), 3);
        let mut places: Vec<_> =
            (0..geometry.slots_count()).map(|s| (geometry.device_of(s), geometry.offset_of(s))).collect();
        places.sort_unstable();
        for pair in places.windows(2) {
            let ((device, (file, a)), (next_device, (next_file, b))) = (pair[0], pair[1]);
            assert!(device != next_device || file != next_file || b - a >= 8192);
        }
        for (_, (file, offset)) in places {
            assert!(offset + 8192 <= geometry.file_bytes(u32::from(file)));
            assert!(file > 0 || offset >= geometry.data_offset());
        }
    }

    #[test]
    fn what_was_described_is_recovered_and_a_changed_sector_is_written_again() {
        let geometry = DiskGeometry { devices_count: 1, slots_per_device: 100, slots_per_file: 100, slot_bytes: 4096 };
        let images = vec![image(8192)];
        let mut slots = DiskSlots::new(geometry, 1, images.clone());
        let key = |n| BlockKey::from_words([n, n]);
        let first = slots.acquire().unwrap();
        slots.set_data_crc(first, 77);
        slots.describe(first, key(1), BlockKey::default(), 0);
        let sector = slots.next_header_sector(0).unwrap();
        let second = slots.acquire().unwrap();
        slots.describe(second, key(2), key(1), 1);
        assert!(!slots.has_header_to_write(0), "not while it is being written");
        slots.header_written(0, sector, true);
        assert_eq!(slots.next_header_sector(0), Some(sector));
        slots.header_written(0, sector, true);
        assert!(!slots.has_header_to_write(0));

        let mut again = DiskSlots::new(geometry, 1, images.clone());
        again.begin_recovery();
        let order = again.sound_headers();
        assert_eq!(order, [first, second]);
        assert_eq!(again.acquire(), None, "which slots are free is not known yet");
        for slot in order {
            let header = again.header(slot);
            again.recovered(&header, true);
        }
        again.release(second);
        again.end_recovery();
        assert_eq!((again.free_count(), again.data_crc(first)), (99, 77));
        assert!(
            DiskSlots::new(geometry, 2, images).sound_headers().is_empty(),
            "another layout's headers are no headers"
        );
    }
}
