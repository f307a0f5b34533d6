//! Slots of the SSD tier: where each lies, what its header says, which headers must be written.
//! Knows no I/O: the shard moves the bytes.
//!
//! Headers are written by the sector. A sector's image in memory is made from the index when it is first
//! written, and kept: a start reads every header and needs none of their images.

use std::collections::VecDeque;
use std::sync::Arc;

use bytemuck::Zeroable;
use kvring_ipc::key::BlockKey;
use kvring_ipc::mapping::Mapping;

use super::header::{HEADER_BYTES, HEADERS_PER_SECTOR, Header, slots_at};
use crate::dma;
use crate::free::Free;
use crate::index::{BlockId, Index, Place, Tier};
use crate::limits::SECTOR_BYTES;

/// Where slots lie on the devices. A slot is on device `slot % devices`, so blocks are striped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskGeometry {
    /// Devices, each with the same number of slots.
    pub devices_count: u32,
    /// Slots of one device.
    pub slots_per_device: u32,
    /// Slots of one device that are to be used: it may have been larger once.
    pub slots_limit: u32,
    /// Slots that a device's header zone has room for: it grows to so many.
    pub header_slots: u32,
    /// Slots of one file of a device; `u32::MAX` where it is one file however many there are.
    pub slots_per_file: u32,
    /// Bytes of a slot.
    pub slot_bytes: u64,
}

impl DiskGeometry {
    /// Slots of all devices.
    pub fn slots_count(&self) -> u32 {
        self.devices_count * self.slots_per_device
    }
    /// Slots of a device that are not to be used.
    pub fn surplus(&self) -> usize {
        self.slots_per_device.saturating_sub(self.slots_limit) as usize
    }
    /// Slots of all devices that are to be used.
    pub fn limit_count(&self) -> u32 {
        self.devices_count * self.slots_limit.min(self.slots_per_device)
    }
    /// Sectors of a device's header zone, as far as it has slots.
    pub fn header_sectors(&self) -> u64 {
        u64::from(self.slots_per_device).div_ceil(HEADERS_PER_SECTOR)
    }
    /// A header zone in memory for each device, for what will be written: zeros.
    ///
    /// # Errors
    /// What mmap says.
    pub fn header_images(&self) -> rustix::io::Result<Vec<Arc<Mapping>>> {
        let image = |_| Mapping::private((self.header_sectors() * SECTOR_BYTES) as usize).map(Arc::new);
        (0..self.devices_count).map(image).collect()
    }
    /// Where the slot zone begins in a device's first file: behind superblock and room for headers, on 1 MiB.
    pub fn data_offset(&self) -> u64 {
        slots_at(u64::from(self.header_slots.max(self.slots_per_device)))
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

/// All zeros is none: memory that nobody has touched yet.
#[derive(Debug, Clone, Copy, Zeroable)]
struct Slot {
    generation: u32,
    /// The block whose header it has, plus one; 0 for none.
    block: u32,
    data_crc: u64,
}

impl Slot {
    fn block(&self) -> Option<BlockId> {
        self.block.checked_sub(1).map(BlockId)
    }
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
    /// Sectors whose image is made.
    made: Box<[bool]>,
    /// Sectors that may have a header of a block that has left since their image was made.
    stale: Box<[bool]>,
    /// Sectors that may hold anything on the device.
    held: Box<[bool]>,
    /// The sector that is being written was empty when its write began.
    writing_nothing: bool,
    /// Sectors whose old headers may still be on the device after a reset.
    uncleared: Box<[bool]>,
    uncleared_count: u32,
    /// What lies on the device is not known.
    unread: bool,
}

const NOTHING: [u8; SECTOR_BYTES as usize] = [0; SECTOR_BYTES as usize];

impl Headers {
    /// A sector is to be written.
    fn queue(&mut self, sector: u32) {
        let state = &mut self.sectors[sector as usize];
        match *state {
            Sector::Clean => {
                *state = Sector::Queued;
                self.queue.push_back(sector);
            }
            Sector::Writing => *state = Sector::WritingStale,
            Sector::Queued | Sector::WritingStale => {}
        }
    }
}

/// All slots of the SSD tier.
#[derive(Debug)]
pub struct DiskSlots {
    geometry: DiskGeometry,
    layout: u64,
    slots: dma::Table<Slot>,
    /// Free slots of each device, counted there.
    free: Vec<Free>,
    /// Slots of each device that are not used: it has more than it is to fill. Their place in a file is given back.
    unused: Vec<Vec<u32>>,
    next_device: usize,
    /// Devices whose slots may be given out.
    usable: Vec<bool>,
    /// How long a new block would wait for each device, and how much longer the one after it: nanoseconds.
    loads: Vec<(u64, u64)>,
    headers: Vec<Headers>,
    recovering: bool,
    /// How many slots have been looked at, whether they are free, at the end of a recovery.
    swept: u32,
    /// A reset came before all was read: what was found goes as soon as it is.
    clear_when_read: bool,
}

impl DiskSlots {
    /// Empty slots over these header images, one a device: zeros.
    pub fn new(geometry: DiskGeometry, layout: u64, images: Vec<Arc<Mapping>>) -> Self {
        assert_eq!(images.len(), geometry.devices_count as usize);
        let sectors = geometry.header_sectors() as usize;
        let headers = images.into_iter().map(|image| Headers {
            image,
            sectors: vec![Sector::Clean; sectors].into_boxed_slice(),
            queue: VecDeque::with_capacity(sectors),
            made: vec![false; sectors].into_boxed_slice(),
            stale: vec![false; sectors].into_boxed_slice(),
            held: vec![false; sectors].into_boxed_slice(),
            writing_nothing: false,
            uncleared: vec![false; sectors].into_boxed_slice(),
            uncleared_count: 0,
            unread: false,
        });
        Self {
            slots: dma::Table::new(geometry.slots_count() as usize),
            unused: (0..geometry.devices_count).map(|_| Vec::with_capacity(geometry.surplus())).collect(),
            free: (0..geometry.devices_count).map(|_| Free::all(geometry.slots_per_device)).collect(),
            geometry,
            layout,
            next_device: 0,
            usable: vec![true; geometry.devices_count as usize],
            loads: vec![(0, 0); geometry.devices_count as usize],
            headers: headers.collect(),
            recovering: false,
            swept: 0,
            clear_when_read: false,
        }
    }

    /// Where it lies.
    pub fn memory(&self) -> Arc<Mapping> {
        self.slots.memory()
    }
    /// Slots that are used no more.
    pub fn unused_count(&self) -> usize {
        self.unused.iter().map(Vec::len).sum()
    }
    /// Whether a device uses more slots than it may.
    pub fn has_too_many(&self) -> bool {
        let surplus = self.geometry.surplus();
        !self.recovering && self.unused.iter().any(|unused| unused.len() < surplus)
    }
    /// Takes a free slot of a device that uses too many out of use, for good, and its header with it. `None`: such a
    /// device has no free slot, or none uses too many.
    pub fn retire(&mut self) -> Option<u32> {
        if self.recovering {
            return None;
        }
        let surplus = self.geometry.surplus();
        let device = (0..self.free.len()).find(|at| self.unused[*at].len() < surplus && !self.free[*at].is_empty())?;
        let slot = self.free[device].pop()? * self.geometry.devices_count + device as u32;
        self.unused[device].push(slot);
        if self.headers[device].held[self.geometry.header_sector_of(slot) as usize] {
            self.clear_header(slot);
        }
        Some(slot)
    }

    /// What the disk holds is yet to be read: until [`DiskSlots::end_recovery`] no slot is given out, and no
    /// header written.
    pub fn begin_recovery(&mut self) {
        self.recovering = true;
        self.swept = 0;
        self.free.iter_mut().for_each(Free::clear);
    }
    /// Whether what the disk holds is still being looked through.
    pub fn is_recovering(&self) -> bool {
        self.recovering
    }
    /// These sectors of a device are not empty.
    pub fn holds(&mut self, device: u32, sectors: &[u32]) {
        let held = &mut self.headers[device as usize].held;
        sectors.iter().for_each(|sector| held[*sector as usize] = true);
    }
    /// What a sound header says of its slot; `block` if that is in the index because of it.
    pub fn recovered(&mut self, header: &Header, block: Option<BlockId>) {
        let Header { generation, data_crc, .. } = *header;
        self.slots[header.slot as usize] = Slot { generation, block: block.map_or(0, |id| id.0 + 1), data_crc };
    }
    /// The slot that is looked at as the n-th.
    fn swept_as(&self, n: u32) -> u32 {
        // The last one looked at is the first to be used, or to be given up: where there are too many, the last of all.
        if self.geometry.surplus() > 0 { n } else { self.geometry.slots_count() - 1 - n }
    }
    /// What the disk holds is known: looks for up to `budget` more slots which of them are free. False: all were.
    pub fn sweep(&mut self, budget: u32) -> bool {
        let end = self.geometry.slots_count().min(self.swept.saturating_add(budget));
        while self.swept < end {
            let slot = self.swept_as(self.swept);
            self.swept += 1;
            if self.slots[slot as usize].block().is_none() {
                self.free[self.geometry.device_of(slot)].push(self.geometry.local_of(slot));
            }
        }
        end < self.geometry.slots_count()
    }
    /// All were looked at: free slots may be used.
    pub fn end_recovery(&mut self) {
        if !std::mem::take(&mut self.recovering) {
            return;
        }
        if std::mem::take(&mut self.clear_when_read) {
            self.clear_headers();
        }
    }
    /// Whether a reset came while the headers were being read: none of it is to be taken.
    pub fn is_forgotten(&self) -> bool {
        self.clear_when_read
    }

    /// Where slots lie.
    pub fn geometry(&self) -> &DiskGeometry {
        &self.geometry
    }
    /// Slots that are free.
    pub fn free_count(&self) -> usize {
        self.free.iter().map(Free::len).sum()
    }

    /// How long a new block would wait for a device, and how much longer the one after it.
    pub fn set_load(&mut self, device: usize, wait_ns: u64, block_ns: u64) {
        self.loads[device] = (wait_ns, block_ns);
    }

    /// A free slot: of the device where it is written soonest, and of equal ones each in its turn.
    pub fn acquire(&mut self) -> Option<u32> {
        if self.is_recovering() {
            return None;
        }
        let count = self.free.len();
        let in_turn = (1..=count).map(|turn| (self.next_device + turn) % count);
        let device = in_turn
            .filter(|device| self.usable[*device] && !self.free[*device].is_empty())
            .min_by_key(|device| self.loads[*device].0)?;
        self.next_device = device;
        let (wait_ns, block_ns) = &mut self.loads[device];
        *wait_ns = wait_ns.saturating_add(*block_ns);
        let slot = self.free[device].pop()? * self.geometry.devices_count + device as u32;
        let generation = &mut self.slots[slot as usize].generation;
        *generation = generation.checked_add(1).unwrap_or(1);
        Some(slot)
    }

    /// Whether a device's slots may be given out from now on: those of a lost one are not.
    pub fn set_usable(&mut self, device: usize, usable: bool) {
        self.usable[device] = usable;
    }
    /// Whether any device's slots may be.
    pub fn is_usable(&self) -> bool {
        self.usable.contains(&true)
    }

    /// Takes a slot back. Its header stays on the disk: should it be found again after a crash, the
    /// bytes are the block's, or fail their checksum.
    pub fn release(&mut self, slot: u32) {
        self.slots[slot as usize].block = 0;
        self.is_stale(slot);
        // During a recovery it is found to be free when it is looked at, unless it was looked at before.
        let looked_at = (0..self.swept).contains(&self.swept_as(slot));
        if !self.recovering || looked_at {
            self.free[self.geometry.device_of(slot)].push(self.geometry.local_of(slot));
        }
    }

    /// The slot's header says what is not so any more.
    pub fn is_stale(&mut self, slot: u32) {
        let sector = self.geometry.header_sector_of(slot);
        self.headers[self.geometry.device_of(slot)].stale[sector as usize] = true;
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

    /// The block whose bytes it holds, as its header says.
    pub fn block(&self, slot: u32) -> Option<BlockId> {
        self.slots[slot as usize].block()
    }

    /// Its bytes are not what was written: a restart finds nothing there.
    pub fn clear_header(&mut self, slot: u32) {
        self.slots[slot as usize].block = 0;
        self.write_header(slot, &Header::zeroed());
    }

    /// The bytes are on the device: their header may follow.
    pub fn describe(&mut self, slot: u32, block: BlockId, key: BlockKey, parent: BlockKey, depth: u32) {
        self.slots[slot as usize].block = block.0 + 1;
        let header = self.header(slot, key, parent, depth);
        self.write_header(slot, &header);
    }

    fn header(&self, slot: u32, key: BlockKey, parent: BlockKey, depth: u32) -> Header {
        let Slot { generation, data_crc, .. } = self.slots[slot as usize];
        Header { key, parent, data_crc, generation, depth, slot, flags: 0, crc: 0 }.sealed(self.layout)
    }

    fn write_header(&mut self, slot: u32, header: &Header) {
        let sector = self.geometry.header_sector_of(slot);
        let device = &mut self.headers[self.geometry.device_of(slot)];
        if device.made[sector as usize] {
            let offset = u64::from(self.geometry.local_of(slot)) * HEADER_BYTES;
            device.image.copy_in(offset as usize, bytemuck::bytes_of(header));
        }
        device.queue(sector);
    }

    /// Makes the image of a sector that was not written before: of what the index has in its slots.
    fn make_image(&mut self, device: usize, sector: u32, index: &Index) {
        let first = sector * HEADERS_PER_SECTOR as u32;
        let locals = first..(first + HEADERS_PER_SECTOR as u32).min(self.geometry.slots_per_device);
        for local in locals {
            let slot = local * self.geometry.devices_count + device as u32;
            let Some(id) = self.block(slot) else { continue };
            let block = index.block(id);
            if block.is_detached() || block.place(Tier::Disk) != Place::Ready(slot) {
                continue;
            }
            let header = self.header(slot, block.key, index.parent_key(id), block.depth);
            let offset = u64::from(local) * HEADER_BYTES;
            self.headers[device].image.copy_in(offset as usize, bytemuck::bytes_of(&header));
        }
        self.headers[device].made[sector as usize] = true;
        self.headers[device].stale[sector as usize] = false;
    }

    /// Wipes every header: a restart finds nothing, once [`DiskSlots::is_cleared`]. The index has let go of
    /// every block by now.
    pub fn clear_headers(&mut self) {
        if self.recovering {
            self.clear_when_read = true;
            return;
        }
        self.rewrite_headers(|_| true);
    }

    /// Has a restart find what the index has then and nothing else, once [`DiskSlots::is_cleared`]: writes every header anew
    /// that may say anything else. Not while the devices are read.
    pub fn clear_stale_headers(&mut self) {
        self.rewrite_headers(|is_stale| is_stale);
    }

    fn rewrite_headers(&mut self, wants: impl Fn(bool) -> bool) {
        for device in &mut self.headers {
            for index in 0..device.sectors.len() {
                // What is empty there stays so, unless something is on its way.
                let held = device.held[index] || device.unread;
                if !held && device.sectors[index] == Sector::Clean && !device.uncleared[index] {
                    continue;
                }
                // What is on its way is not there yet.
                let is_old = device.stale[index] || !device.made[index] || device.sectors[index] != Sector::Clean;
                if !wants(is_old) {
                    continue;
                }
                // One that was never made is nothing.
                if std::mem::take(&mut device.made[index]) {
                    device.image.copy_in(index * SECTOR_BYTES as usize, &NOTHING);
                }
                device.uncleared_count += u32::from(!std::mem::replace(&mut device.uncleared[index], true));
                device.queue(index as u32);
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
    pub fn next_header_sector(&mut self, device: usize, index: &Index) -> Option<u32> {
        // Headers that were not looked at yet would be overwritten.
        if self.recovering {
            return None;
        }
        let sector = self.headers[device].queue.pop_front()?;
        if !self.headers[device].made[sector as usize] {
            self.make_image(device, sector, index);
        }
        let device = &mut self.headers[device];
        let mut bytes = NOTHING;
        device.image.copy_out(sector as usize * SECTOR_BYTES as usize, &mut bytes);
        device.writing_nothing = bytes == NOTHING;
        device.held[sector as usize] = true;
        device.sectors[sector as usize] = Sector::Writing;
        Some(sector)
    }
    /// Whether any header of the device waits, and may be written.
    pub fn has_header_to_write(&self, device: usize) -> bool {
        !self.recovering && !self.headers[device].queue.is_empty()
    }
    /// A header sector was written, or could not be: then its blocks are lost with the next restart.
    pub fn header_written(&mut self, device: usize, sector: u32, good: bool) {
        let device = &mut self.headers[device];
        let state = &mut device.sectors[sector as usize];
        let stale = *state == Sector::WritingStale;
        if good && !stale {
            device.uncleared_count -= u32::from(std::mem::take(&mut device.uncleared[sector as usize]));
            device.held[sector as usize] = !device.writing_nothing;
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
    use crate::index::IndexOptions;
    use crate::tier::piece::HeaderPiece;
    use kvring_ipc::config::EvictionPolicy;
    use kvring_ipc::mapping::{Pages, sealed_memfd};

    fn image(bytes: u64) -> Arc<Mapping> {
        let fd = sealed_memfd("test", bytes, Pages::Small).unwrap();
        Arc::new(Mapping::new(&fd, bytes as usize).unwrap())
    }

    #[test]
    fn slots_are_striped_and_never_overlap() {
        let geometry = DiskGeometry {
            devices_count: 3,
            slots_per_device: 130,
            slots_limit: 130,
            header_slots: 130,
            slots_per_file: 50,
            slot_bytes: 8192,
        };
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
    fn a_slow_device_gets_fewer_blocks_and_a_lost_one_none() {
        let geometry = DiskGeometry {
            devices_count: 3,
            slots_per_device: 100,
            slots_limit: 100,
            header_slots: 100,
            slots_per_file: 100,
            slot_bytes: 4096,
        };
        let images = geometry.header_images().unwrap();
        let mut slots = DiskSlots::new(geometry, 1, images);
        let take = |slots: &mut DiskSlots, count: u32| {
            let mut got = [0; 3];
            (0..count).for_each(|_| got[geometry.device_of(slots.acquire().unwrap())] += 1);
            got
        };
        assert_eq!(take(&mut slots, 30), [10, 10, 10], "each in its turn");
        for (device, block_ns) in [100_000, 100_000, 400_000].into_iter().enumerate() {
            slots.set_load(device, 0, block_ns);
        }
        assert_eq!(take(&mut slots, 90), [40, 40, 10], "as fast as each is");
        slots.set_load(0, 50_000_000, 100_000);
        assert_eq!(take(&mut slots, 20)[0], 0, "who has much to do gets no more");
        slots.set_usable(1, false);
        assert_eq!(take(&mut slots, 20)[1], 0, "who is lost gets nothing");
        let left = slots.free_count() as u32 - slots.free[1].len() as u32;
        take(&mut slots, left);
        assert_eq!(slots.acquire(), None, "its free slots are nobody's");
    }

    struct World {
        geometry: DiskGeometry,
        image: Arc<Mapping>,
        index: Index,
        slots: DiskSlots,
        /// What lies on the device.
        zone: Vec<u8>,
    }

    impl World {
        fn new(zone: Vec<u8>) -> Self {
            let geometry = DiskGeometry {
                devices_count: 1,
                slots_per_device: 100,
                slots_limit: 100,
                header_slots: 100,
                slots_per_file: 100,
                slot_bytes: 4096,
            };
            let image = image(8192);
            let options = IndexOptions {
                host_slots: 1,
                disk_slots: 100,
                policy: EvictionPolicy::Lru,
                protected_hits: 2,
                secret: [1, 2],
            };
            let slots = DiskSlots::new(geometry, 1, vec![image.clone()]);
            Self { geometry, image, index: Index::new(&options), slots, zone }
        }

        fn key(name: u64) -> BlockKey {
            BlockKey::from_words([name, name])
        }

        fn store(&mut self, name: u64, parent: Option<BlockId>) -> (u32, BlockId) {
            let slot = self.slots.acquire().unwrap();
            let depth = parent.map_or(0, |id| self.index.block(id).depth + 1);
            let id = self.index.insert(Self::key(name), parent, depth).unwrap();
            self.index.begin(Tier::Disk, id, slot);
            self.slots.set_data_crc(slot, 70 + name);
            let parent = parent.map(|id| self.index.block(id).key).unwrap_or_default();
            self.slots.describe(slot, id, Self::key(name), parent, depth);
            self.index.finish(Tier::Disk, id);
            self.index.show(id);
            (slot, id)
        }

        fn begin(&mut self) -> Option<u32> {
            let sector = self.slots.next_header_sector(0, &self.index)?;
            let at = sector as usize * SECTOR_BYTES as usize;
            self.image.copy_out(at, &mut self.zone[at..][..SECTOR_BYTES as usize]);
            Some(sector)
        }

        fn write_all(&mut self) {
            while let Some(sector) = self.begin() {
                self.slots.header_written(0, sector, true);
            }
        }

        fn found(&self, layout: u64) -> Vec<Header> {
            HeaderPiece::of(&self.geometry, layout, 0, 0, &self.zone).headers().to_vec()
        }
    }

    #[test]
    fn what_was_described_is_found_and_a_changed_sector_is_written_again() {
        let mut world = World::new(vec![0; 8192]);
        let (_, first) = world.store(1, None);
        let sector = world.begin().unwrap();
        world.store(2, Some(first));
        assert!(!world.slots.has_header_to_write(0), "not while it is being written");
        world.slots.header_written(0, sector, true);
        assert_eq!(world.found(1).iter().map(|header| header.key).collect::<Vec<_>>(), [World::key(1)]);
        assert_eq!(world.begin(), Some(sector));
        world.slots.header_written(0, sector, true);
        assert!(!world.slots.has_header_to_write(0));
        let found = world.found(1);
        assert_eq!(found.len(), 2);
        assert_eq!((found[1].key, found[1].parent, found[1].depth), (World::key(2), World::key(1), 1));
        assert!(world.found(2).is_empty(), "another layout's headers are no headers");
    }

    /// A start makes no images: the first write of a sector writes the neighbours as they were.
    #[test]
    fn what_was_found_is_written_again_with_its_neighbours() {
        let mut world = World::new(vec![0; 8192]);
        let mut parent = None;
        for name in 0..80 {
            parent = Some(world.store(name, parent).1);
        }
        world.write_all();
        let (before, zone) = (world.found(1), world.zone);
        assert_eq!(before.len(), 80);

        let mut world = World::new(zone);
        world.slots.begin_recovery();
        assert_eq!(world.slots.acquire(), None, "which slots are free is not known yet");
        let piece = HeaderPiece::of(&world.geometry, 1, 0, 0, &world.zone);
        world.slots.holds(0, piece.held_sectors());
        let mut parent = None;
        for header in piece.headers() {
            let id = world.index.insert(header.key, parent, header.depth).unwrap();
            world.index.begin(Tier::Disk, id, header.slot);
            world.index.finish(Tier::Disk, id);
            world.slots.recovered(header, Some(id));
            parent = Some(id);
        }
        // Found bad while the rest is being looked through: it goes when all of it is known.
        let (bad, leaf) = (before[79].slot, parent.unwrap());
        world.index.leave(Tier::Disk, leaf);
        world.slots.clear_header(bad);
        world.slots.release(bad);
        assert!(world.begin().is_none() && !world.slots.has_header_to_write(0));
        while world.slots.sweep(7) {}
        world.slots.end_recovery();
        assert_eq!((world.slots.free_count(), world.slots.data_crc(before[0].slot)), (21, 70));
        world.write_all();
        assert_eq!(world.found(1), before[..79], "the same, but for the bad one");

        world.index.detach_all();
        while let Some((_, slot)) = world.index.dropped_slots.pop() {
            world.slots.release(slot);
        }
        world.slots.clear_headers();
        assert!(!world.slots.is_cleared());
        world.write_all();
        assert!(world.slots.is_cleared() && world.zone.iter().all(|byte| *byte == 0));
        world.slots.clear_headers();
        assert!(!world.slots.has_header_to_write(0), "what is empty is not cleared again");
    }
}
