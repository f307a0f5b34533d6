//! Anything on the disk at start: the superblock and the header zone. Only what was written for this very
//! cache is believed; whatever else lies there, the index is sound.
//!
//! Input: one byte of shape, one of superblock, 64 bytes of superblock; then 8 headers a device, each one
//! byte of what is wrong with it and its fields. Sums are made right here, unless they are to be wrong: a
//! fuzzer does not find a CRC.
#![no_main]

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

use bytemuck::Zeroable;
use kvring_engine::cache::{Cache, Parent};
use kvring_engine::device::{files, medium::Medium};
use kvring_engine::index::{IndexOptions, Tier};
use kvring_engine::limits::SECTOR_BYTES;
use kvring_engine::tier::disk::{DiskGeometry, DiskSlots};
use kvring_engine::tier::header::{HEADER_BYTES, Header, MAGIC, Superblock, header_room};
use kvring_engine::tier::host::{HostSlots, SessionId, Writer};
use kvring_engine::tier::piece::HeaderPiece;
use kvring_fuzz::{Input, mapping};
use kvring_ipc::config::{EVICTION_POLICIES, OnMismatch};
use kvring_ipc::key::BlockKey;
use kvring_ipc::layout::Layout;
use libfuzzer_sys::fuzz_target;

static OPAQUE: LazyLock<Layout> = LazyLock::new(|| Layout::opaque(SECTOR_BYTES));
static FINGERPRINT: LazyLock<u64> = LazyLock::new(|| OPAQUE.fingerprint());
const SLOTS_PER_DEVICE: u32 = 20;

fn header_of(input: &mut Input<'_>, slot: u32) -> Header {
    let how = input.byte();
    let key_of = |name: u8| BlockKey::from_words([u64::from(name), u64::from(name)]);
    if how & 1 != 0 {
        // Nothing here, or 64 bytes of anything.
        let mut header = Header::zeroed();
        if how & 2 != 0 {
            let bytes = input.take(HEADER_BYTES as usize);
            bytemuck::bytes_of_mut(&mut header)[..bytes.len()].copy_from_slice(bytes);
        }
        return if how & 4 != 0 { header.sealed(*FINGERPRINT) } else { header };
    }
    let mut header = Header {
        key: key_of(input.byte()),
        parent: key_of(input.byte()),
        data_crc: u64::from(how),
        generation: u32::from(input.byte()),
        depth: u32::from(input.byte()),
        slot,
        flags: 0,
        crc: 0,
    };
    if how & 8 != 0 {
        (header.depth, header.generation) = (input.u32(), input.u32());
    }
    if how & 16 != 0 {
        header.slot = input.u32();
    }
    if how & 32 != 0 {
        header.flags = input.u32();
    }
    let mut header = header.sealed(if how & 64 != 0 { input.u64() } else { *FINGERPRINT });
    if how & 128 != 0 {
        header.crc ^= 1 << (input.byte() % 64);
    }
    header
}

/// The superblock on a real file: reused only if it says exactly what is expected, and then the header
/// zone is what lies in it.
fn open(geometry: &DiskGeometry, how: u8, found: &Superblock, zones: &[Vec<u8>]) {
    let scratch = tempfile::tempdir_in("/dev/shm").expect("a scratch directory");
    let dirs: Vec<_> = (0..geometry.devices_count).map(|device| scratch.path().join(device.to_string())).collect();
    let mut written = Vec::new();
    for ((device, dir), zone) in (0..).zip(&dirs).zip(zones) {
        let place = device << 32 | u64::from(geometry.devices_count);
        let superblock = if how & 1 != 0 { Superblock { device: place, ..*found }.sealed() } else { *found };
        let mut bytes = vec![0; SECTOR_BYTES as usize];
        bytes[..size_of::<Superblock>()].copy_from_slice(bytemuck::bytes_of(&superblock));
        bytes.extend(zone);
        // A start that was cut short: the file ends anywhere.
        bytes.truncate(if how & 2 != 0 { usize::from(how >> 2) * 2 } else { bytes.len() });
        std::fs::create_dir(dir).expect("it is new");
        std::fs::write(dir.join("kvring.cache"), &bytes).expect("it fits");
        written.push((superblock, bytes.len()));
    }
    let expected = |superblock: &Superblock, device: u64| {
        superblock.is_sound()
            && superblock.layout == *FINGERPRINT
            && superblock.slot_bytes == geometry.slot_bytes
            // It may have been smaller, with room for as many headers and its blocks in the same places.
            && superblock.slots_count() <= geometry.slots_per_device
            && superblock.header_slots() == geometry.header_slots
            && superblock.slots_per_file.min(u64::from(superblock.slots_count()))
                == u64::from(geometry.slots_per_file.min(superblock.slots_count()))
            && superblock.device == device << 32 | u64::from(geometry.devices_count)
    };
    let on_mismatch = if how & 4 != 0 { OnMismatch::Reset } else { OnMismatch::Refuse };
    let media: Vec<_> = dirs.into_iter().map(Medium::Directory).collect();
    let opened = files::open(&media, geometry, &OPAQUE, on_mismatch);
    match opened {
        Ok(devices) => {
            // What the devices before this one are of: a cache, or a new one, which has an id that nobody has.
            let mut cache: Option<Option<u64>> = None;
            for ((device, opened), (superblock, bytes)) in (0..).zip(&devices).zip(&written) {
                let found = Mutex::new(Vec::new());
                if opened.reused {
                    // A file that is shorter than its header zone was made longer: it is zeros there.
                    let add =
                        |piece: HeaderPiece| found.lock().expect("nobody panics").extend(piece.headers().to_vec());
                    files::read_headers(&opened.medium, geometry, *FINGERPRINT, device as u32, add)
                        .expect("it can be read");
                }
                let found = found.into_inner().expect("nobody panics");
                let whole = *bytes >= size_of::<Superblock>();
                let agrees = cache.is_none_or(|id| id == Some(superblock.cache_id));
                let is_ours = whole && expected(superblock, device) && agrees;
                cache.get_or_insert(is_ours.then_some(superblock.cache_id));
                if is_ours {
                    let mut zone = zones[device as usize].clone();
                    let there = bytes.saturating_sub(SECTOR_BYTES as usize).min(zone.len());
                    zone[there..].fill(0);
                    let all = HeaderPiece::of(geometry, *FINGERPRINT, device as u32, 0, &zone);
                    assert_eq!(found, all.headers(), "the header zone as it is on the disk");
                } else {
                    let nothing = !whole || *superblock == Superblock::zeroed();
                    assert!(nothing || on_mismatch == OnMismatch::Reset, "taken for ours: {superblock:?}");
                    assert!(!opened.reused, "a new cache has no headers");
                }
            }
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("/dev/shm"), "the file is named: {text}");
        }
    }
}

/// What a recovery that knows only the rules would adopt: slot by key.
fn adopted_by_the_rules(headers: &[(u32, Header)]) -> HashMap<BlockKey, (u32, Header)> {
    let mut sound: Vec<_> =
        headers.iter().filter(|(slot, header)| header.is_sound(*slot, *FINGERPRINT)).copied().collect();
    sound.sort_by_key(|(slot, header)| (header.depth, *slot));
    let mut adopted: HashMap<BlockKey, (u32, Header)> = HashMap::new();
    for (slot, header) in sound {
        let has_parent = header.depth == 0
            || adopted.get(&header.parent).is_some_and(|(_, parent)| parent.depth + 1 == header.depth);
        if has_parent && !adopted.contains_key(&header.key) {
            adopted.insert(header.key, (slot, header));
        }
    }
    adopted
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (shape, how) = (input.byte(), input.byte());
    let geometry = DiskGeometry {
        devices_count: 1 + u32::from(shape & 1),
        slots_per_device: SLOTS_PER_DEVICE,
        slots_limit: SLOTS_PER_DEVICE,
        header_slots: header_room(u64::from(SLOTS_PER_DEVICE)),
        slots_per_file: if shape & 2 != 0 { 7 } else { SLOTS_PER_DEVICE },
        slot_bytes: SECTOR_BYTES,
    };
    let mut superblock = Superblock::zeroed();
    let bytes = input.take(size_of::<Superblock>());
    bytemuck::bytes_of_mut(&mut superblock)[..bytes.len()].copy_from_slice(bytes);
    if shape & 4 != 0 {
        // Ours, but for the words that are not zero.
        let word = |claimed: u64, ours: u64| if claimed == 0 { ours } else { claimed };
        superblock.magic = word(superblock.magic, MAGIC);
        superblock.layout = word(superblock.layout, *FINGERPRINT);
        superblock.slot_bytes = word(superblock.slot_bytes, geometry.slot_bytes);
        let slots = u64::from(geometry.header_slots) << 32 | u64::from(geometry.slots_per_device);
        superblock.slots = word(superblock.slots, slots);
        superblock.slots_per_file = word(superblock.slots_per_file, u64::from(geometry.slots_per_file));
        superblock.device = word(superblock.device, u64::from(geometry.devices_count));
        superblock = superblock.sealed();
    }

    let mut zones = vec![vec![0; (geometry.header_sectors() * SECTOR_BYTES) as usize]; geometry.devices_count as usize];
    let mut headers = Vec::new();
    for slot in 0..geometry.slots_count() {
        if input.is_empty() {
            break;
        }
        let header = header_of(&mut input, slot);
        let at = (u64::from(geometry.local_of(slot)) * HEADER_BYTES) as usize;
        zones[geometry.device_of(slot)][at..][..HEADER_BYTES as usize].copy_from_slice(bytemuck::bytes_of(&header));
        headers.push((slot, header));
    }
    // Files cost a thousand times what the rest does: where the input's first byte says so.
    if shape & 8 != 0 {
        open(&geometry, how, &superblock, &zones);
    }

    let images = zones.iter().map(|zone| mapping(zone.len() as u64)).collect();
    let options = IndexOptions {
        host_slots: 4,
        disk_slots: geometry.slots_count(),
        policy: EVICTION_POLICIES[usize::from(shape >> 4) % EVICTION_POLICIES.len()].1,
        protected_hits: 2,
        secret: [1, 2],
    };
    let mut host = HostSlots::new(4, 1);
    host.bear(0..4);
    let mut cache = Cache::new(&options, host, Some(DiskSlots::new(geometry, *FINGERPRINT, images)));
    let found = (0..).zip(&zones).map(|(device, zone)| HeaderPiece::of(&geometry, *FINGERPRINT, device, 0, zone));
    let recovered = cache.recover(found).disk;
    cache.check();
    cache.check_at_rest();

    for (_, block) in cache.index.blocks() {
        let slot = block.place(Tier::Disk).ready().expect("it is on the disk");
        let header = headers.iter().find(|(of, _)| *of == slot).expect("it was written").1;
        assert!(block.is_visible() && block.key == header.key && block.depth == header.depth);
        let parent = block.parent().map(|parent| cache.index.block(parent).key);
        assert!(header.is_sound(slot, *FINGERPRINT) && (header.depth == 0 || parent == Some(header.parent)));
        assert_eq!(cache.disk.as_ref().expect("there is one").data_crc(slot), header.data_crc);
    }
    // A key that is there twice is one block: whichever copy was met first. With other keys there is no choice.
    let mut keys: Vec<_> =
        headers.iter().filter(|(slot, h)| h.is_sound(*slot, *FINGERPRINT)).map(|(_, h)| h.key).collect();
    let sound_count = keys.len();
    keys.sort_unstable_by_key(|key| key.to_words());
    keys.dedup();
    let expected = adopted_by_the_rules(&headers);
    if keys.len() == sound_count {
        assert_eq!(recovered as usize, expected.len(), "what is adopted is what the rules say");
        assert!(expected.keys().all(|key| cache.index.find(*key).is_some()));
    }
    // What was found is used: read into the pool, then pushed out by stores, in both tiers.
    let writer = Writer { session: SessionId(1), instance: 1, rank: 0 };
    for key in expected.keys() {
        let Some(id) = cache.index.find(*key) else { continue };
        if cache.begin_read(id).is_some() {
            cache.end_read(id, key.to_words()[0] % 5 != 0);
        }
    }
    cache.check();
    for name in 0..8 {
        let (reserve, id) = cache.reserve(
            BlockKey::from_words([1 << 40, name]),
            Parent::Namespace(BlockKey::default()),
            0,
            writer,
            true,
        );
        let (kvring_engine::cache::Reserve::Slot(grant), Some(id)) = (reserve, id) else { continue };
        assert_eq!(cache.commit(grant, writer), Ok(Some(id)));
        if cache.begin_write(grant, id).is_some() {
            cache.end_write(id, name % 3 != 0);
        }
    }
    cache.check();
    cache.reset();
    cache.check();
    cache.check_at_rest();
    assert_eq!(cache.index.count(), 0, "a reset forgets all");
});
