//! Anything in the slot table that an engine process left: the next one takes over what is sound, or
//! nothing, and its index and slots are sound whatever lies there. It may have taken what was there before, and look only at
//! what the journal names, of which anything may be a lie as well.
//!
//! Input: pieces of (16 bits of place, one of length, bytes) over a table that was made properly; then what
//! headers hold, with the right sums.
#![no_main]

use kvring_engine::cache::Cache;
use kvring_engine::index::IndexOptions;
use kvring_engine::tier::header::Header;
use kvring_engine::tier::host::{HostSlots, SessionId};
use kvring_engine::tier::table::{SlotTable, TableShape};
use kvring_fuzz::{Input, mapping};
use kvring_ipc::config::EvictionPolicy;
use kvring_ipc::key::BlockKey;
use libfuzzer_sys::fuzz_target;

const SLOTS: u32 = 12;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let first = input.byte();
    let (tp_size, follows) = (1 + u32::from(first % 3), first >= 128);
    let shape = TableShape { pool_id: 1, layout: 7, slot_bytes: 4096, slots_max: SLOTS, tp_size };
    let memory = mapping(shape.bytes() as u64);
    let table = SlotTable::create(memory.clone(), shape, SLOTS, "a layout");
    for slot in 0..SLOTS {
        let how = input.byte();
        let name = |name: u8| BlockKey::from_words([u64::from(name), u64::from(name)]);
        if how & 1 != 0 {
            let (key, parent) = (name(input.byte()), name(input.byte()));
            let (depth, generation, flags) = (u32::from(input.byte()), u32::from(input.byte()), u32::from(how >> 6));
            table.describe(slot, Header { key, parent, data_crc: 5, generation, depth, slot, flags, crc: 0 });
        }
        if how & 2 != 0 {
            table.set_writer(slot, u32::from(how) % tp_size, Some(SessionId(u32::from(input.byte()))));
        }
    }
    let options = IndexOptions {
        host_slots: SLOTS,
        disk_slots: 0,
        policy: EvictionPolicy::Lru,
        protected_hits: 2,
        secret: [1, 2],
    };
    let mut host = HostSlots::new(SLOTS, tp_size);
    host.keep_in(table.clone());
    let mut cache = Cache::new(&options, host, None);
    if follows {
        table.begin_journal(1);
        cache.follow_pool();
        cache.check();
        table.clear(u32::from(input.byte()) % SLOTS);
    }
    while !input.is_empty() {
        let (place, length) = (usize::from(input.u16()), usize::from(input.byte()));
        // From the front, and from the back, where headers lie.
        let bytes = input.take(length);
        let place = if place & 1 == 0 { place } else { shape.bytes().saturating_sub(place) };
        memory.copy_in(place.min(shape.bytes() - bytes.len()), bytes);
    }
    let Ok((table, _)) = SlotTable::open(memory) else { return };
    // Another shape that passes its own checksum is another pool's, and the engine compares it.
    if *table.shape() != shape {
        return;
    }
    cache.begin_recovery(false, 2);
    cache.host.bear(0..SLOTS);
    cache.check();
    for session in cache.host.suspects() {
        cache.host.end_quarantine(session, 0);
    }
    cache.host.release_quarantined(1);
    cache.check();
    cache.check_at_rest();
    cache.reset();
    cache.check_at_rest();
    assert_eq!(cache.host.free_count(), SLOTS);
});
