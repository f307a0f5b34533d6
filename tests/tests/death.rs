//! A client dies at each step of a store and of a load: its leases are back at once, its slots after
//! its death and grace, and nobody else notices. And what a load promises, step by step.

use kvring_engine::device::sim::{Chance, Faults};
use kvring_engine::shard::End;
use kvring_ipc::config::{EvictionPolicy, Verify};
use kvring_ipc::wire::Status;
use kvring_tests::world::{Shape, World};

fn shape(host_slots: u32, disk_slots: u32) -> Shape {
    Shape {
        host_slots,
        disk_slots,
        devices: 1,
        slot_bytes: 4096,
        tp_size: 1,
        policy: EvictionPolicy::Lru,
        faults: Faults::default(),
        chains: 2,
        chain_blocks: 8,
        shared_prefixes: false,
        lease_ttl_ns: 1_000_000_000,
        may_die: false,
        may_lie: false,
        may_crash: false,
        is_restless: false,
        write_blocks_per_hour: None,
        verify: Verify::Crash,
    }
}

fn world(host_slots: u32, disk_slots: u32) -> World {
    let mut world = World::with_shape(shape(host_slots, disk_slots), Chance::new(3));
    world.join();
    world.join();
    world
}

#[test]
fn with_slots_reserved() {
    for end in [End::Suspect, End::Dead] {
        let mut world = world(8, 0);
        let grants = world.reserve(0, 0, 8);
        assert_eq!((grants.len(), world.free_slots()), (8, 0));
        world.kill(0, End::Suspect);
        assert_eq!(world.free_slots(), 0, "it may still be writing");
        assert!(world.reserve(0, 1, 4).is_empty(), "no slot is lent twice: the store is dropped");
        if end == End::Suspect {
            world.pass(60_000_000_000);
            assert_eq!(world.free_slots(), 0, "suspect for ever is quarantined for ever");
        }
        world.confirm_dead();
        assert_eq!(world.free_slots(), 0, "a GPU may outlive its process for the grace");
        world.pass(3_000_000);
        assert_eq!(world.free_slots(), 8);
        world.run(0);
    }
}

#[test]
fn with_half_of_them_committed() {
    let mut world = world(8, 0);
    let grants = world.reserve(0, 0, 8);
    assert_eq!(world.fill_and_commit(0, 0, 0, &grants[..4]), 4);
    world.kill(0, End::Suspect);
    world.confirm_dead();
    world.pass(3_000_000);
    assert_eq!(world.free_slots(), 4, "what was committed stays");
    assert_eq!(world.match_blocks(0, 0, 8), 4, "and is found by the others");
    world.run(0);
}

#[test]
fn with_a_lease() {
    let mut world = world(8, 0);
    let grants = world.reserve(0, 0, 8);
    world.fill_and_commit(0, 0, 0, &grants);
    assert_eq!(world.match_blocks(0, 0, 8), 8);
    assert_eq!(world.load(0, 0, 8), [(Status::Ok, 8)]);
    assert!(world.reserve(1, 1, 1).is_empty(), "a leased block never goes");
    world.kill(0, End::Suspect);
    assert_eq!(world.reserve(0, 1, 1).len(), 1, "the lease is back at the first sign, the tail goes");
    world.confirm_dead();
    world.run(0);
}

#[test]
fn in_the_middle_of_a_load_from_the_disk() {
    let mut world = world(8, 16);
    store_to_disk(&mut world);
    let matched = world.match_blocks(0, 0, 8);
    assert!(matched > 0);
    world.post_load_of(0, 0, 8);
    world.poll_once();
    world.kill(0, End::Suspect);
    world.confirm_dead();
    world.pass(3_000_000);
    assert!(world.match_blocks(0, 0, 8) > 0, "the blocks are still there for the others");
    world.run(0);
}

/// Chain 0 on the disk only, chain 1 in the pool.
fn store_to_disk(world: &mut World) {
    for chain in [0, 1] {
        let grants = world.reserve(0, chain, 8);
        assert_eq!(grants.len(), 8);
        assert_eq!(world.fill_and_commit(0, chain, 0, &grants), 8);
        world.pass(5_000_000);
    }
    assert_eq!(world.metrics.ssd_write_bytes.get(), 16 * 4096);
}

#[test]
fn two_loads_of_one_cold_block_are_one_read() {
    let mut world = world(8, 16);
    store_to_disk(&mut world);
    assert_eq!((world.match_blocks(0, 0, 8), world.match_blocks(1, 0, 8)), (8, 8));
    world.post_load_of(0, 0, 8);
    world.post_load_of(1, 0, 8);
    world.pass(5_000_000);
    assert_eq!(world.metrics.ssd_read_bytes.get(), 8 * 4096, "each block was read once");
    assert_eq!(world.metrics.load_blocks_coalesced_count.get(), 8);
    assert_eq!(world.metrics.load_blocks_ssd_count.get(), 16, "and both have it");
    world.run(0);
}

#[test]
fn equal_stores_are_stored_once() {
    let mut world = world(8, 0);
    assert_eq!(world.reserve(0, 0, 4).len(), 4);
    assert!(world.reserve(1, 0, 4).is_empty(), "somebody else is storing them");
    assert_eq!(world.metrics.reserve_blocks_present_count.get(), 4);
    assert_eq!(world.match_blocks(1, 0, 4), 0, "not resident before they are committed");
    world.run(0);
}

#[test]
fn a_load_without_a_slot_is_busy_and_not_for_ever() {
    let mut world = world(8, 16);
    store_to_disk(&mut world);
    // Everything in the pool is on loan to the other client.
    assert_eq!(world.match_blocks(1, 1, 8), 8);
    assert_eq!(world.load(1, 1, 8), [(Status::Ok, 8)]);
    assert_eq!(world.match_blocks(0, 0, 8), 8);
    assert_eq!(world.load(0, 0, 8), [(Status::Busy, 8)]);
    world.run(0);
}

#[test]
fn a_lease_ends_by_itself_and_a_late_load_is_stale() {
    let mut world = world(8, 0);
    let grants = world.reserve(0, 0, 8);
    world.fill_and_commit(0, 0, 0, &grants);
    assert_eq!(world.match_blocks(0, 0, 8), 8);
    world.pass(1_100_000_000);
    assert_eq!(world.load(0, 0, 8), [(Status::Stale, 8)]);
    assert_eq!(world.metrics.leases_expired_count.get(), 1);
    world.run(0);
}

#[test]
fn a_rotten_block_is_a_miss_and_takes_its_descendants_along() {
    let mut shape = shape(8, 16);
    shape.faults = Faults { bit_rot_permille: 1000, ..Faults::default() };
    let mut world = World::with_shape(shape, Chance::new(3));
    world.join();
    world.join();
    store_to_disk(&mut world);
    assert_eq!(world.match_blocks(0, 0, 8), 8);
    let answers = world.load(0, 0, 8);
    assert!(answers.iter().all(|(status, _)| *status == Status::Miss), "{answers:?}");
    assert!(world.metrics.ssd_checksum_errors_count.get() > 0);
    assert_eq!(world.match_blocks(1, 0, 8), 0, "forgotten");
    world.run(0);
}

#[test]
fn a_block_that_somebody_scribbled_on_is_a_miss_where_it_is_verified() {
    for verify in [Verify::Off, Verify::Sampled, Verify::Always] {
        let mut world = World::with_shape(Shape { verify, ..shape(8, 0) }, Chance::new(3));
        world.join();
        let grants = world.reserve(0, 0, 8);
        assert_eq!(world.fill_and_commit(0, 0, 0, &grants), 8);
        world.scribble(grants[3].slot);
        assert_eq!(world.match_blocks(0, 0, 8), 8, "nobody has looked yet");
        if verify != Verify::Always {
            continue; // The oracle would find wrong bytes: nothing is promised here.
        }
        assert_eq!(world.load(0, 0, 8), [(Status::Ok, 3), (Status::Miss, 5)], "it, and all that continues it");
        assert_eq!(world.metrics.dram_checksum_errors_count.get(), 1);
        assert_eq!(world.match_blocks(0, 0, 8), 3);
        world.run(0);
    }
}

#[test]
fn what_a_dead_engine_process_left_is_verified_once_before_it_is_used() {
    let mut world = World::with_shape(shape(8, 16), Chance::new(3));
    world.join();
    let grants = world.reserve(0, 0, 8);
    assert_eq!(world.fill_and_commit(0, 0, 0, &grants), 8);
    world.pass(10_000_000);
    world.scribble(grants[3].slot);
    world.take_over();
    world.join();
    assert_eq!(world.match_blocks(0, 0, 8), 8);
    world.load(0, 0, 8);
    // Seven came from the pool, one from its good copy on the SSD: the oracle has compared all of them.
    let metric = |world: &World| {
        let m = &world.metrics;
        [&m.dram_verified_blocks_count, &m.dram_checksum_errors_count, &m.load_blocks_ssd_count].map(|c| c.get())
    };
    assert_eq!(metric(&world), [8, 1, 1]);
    world.load(0, 0, 8);
    assert_eq!(metric(&world), [8, 1, 1], "once each");
    world.run(0);
}

#[test]
fn an_engine_process_that_dies_leaves_blocks_writers_and_nothing_else() {
    let mut world = world(8, 0);
    let grants = world.reserve(0, 0, 4);
    assert_eq!(world.fill_and_commit(0, 0, 0, &grants), 4);
    world.reserve(1, 1, 3);
    assert_eq!(world.free_slots(), 1);
    world.take_over();
    assert_eq!(world.free_slots(), 1, "what somebody was filling waits for him");
    world.join();
    assert_eq!(world.match_blocks(0, 0, 8), 4);
    assert_eq!(world.load(0, 0, 4), [(Status::Ok, 4)]);
    assert_eq!(world.reserve(0, 1, 8).len(), 1, "nor is it lent to others");
    world.run(0);
}
