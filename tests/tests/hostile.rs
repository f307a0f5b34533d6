//! A client that lies in any word it can write harms nobody but itself.

use kvring_engine::device::sim::Chance;
use kvring_ipc::sync::Ordering;
use kvring_ipc::wire::Status;
use kvring_tests::world::{Shape, World};

fn world() -> World {
    let mut shape = Shape::draw(&mut Chance::new(5));
    shape.faults = Default::default();
    (shape.tp_size, shape.may_die, shape.may_lie, shape.may_crash) = (1, false, false, false);
    let mut world = World::with_shape(shape, Chance::new(6));
    world.join();
    world.join();
    world
}

/// Boundary values for an index or a length that somebody believes.
const BOUNDARIES: [u64; 12] =
    [0, 1, 2, 255, 256, 1023, 1024, 1025, 1 << 31, u32::MAX as u64 - 1, u32::MAX as u64, u64::MAX];

#[test]
fn every_control_word_with_every_boundary_value() {
    for word in 0..64 {
        for value in BOUNDARIES {
            let mut world = world();
            world.lie_exactly(0, |words| words[word].store(value, Ordering::Relaxed));
            // The honest client goes on, is answered, and finds no wrong byte; nothing leaks.
            world.run(60);
            assert!(world.tally.operations > 0);
        }
    }
}

#[test]
fn every_word_of_an_entry_with_every_boundary_value() {
    for word in 0..8 {
        for value in BOUNDARIES {
            for op in 0..=11u64 {
                let mut world = world();
                world.lie_exactly(0, |words| {
                    // The submission ring begins at byte 4096; its tail is the first word.
                    words[512 + 1].store(op | 3 << 16, Ordering::Relaxed);
                    words[512 + word].store(value, Ordering::Relaxed);
                    words[0].store(1, Ordering::Relaxed);
                });
                world.run(20);
            }
        }
    }
}

/// Every word that a client shares with the server changes all the time, also between two looks at it.
#[test]
fn words_that_change_while_they_are_read() {
    for seed in 0..20 {
        let mut world = world();
        // The other one is honest, and every byte that it loads is compared.
        world.lie_exactly(0, |_| ());
        let segment = world.segment_of(0);
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (words, mut chance) = (segment.all_words(), Chance::new(seed));
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    // The heads and tails, the entries of the submission ring, and what those may name.
                    let place = match chance.below(4) {
                        // Heads and tails poison the session soon.
                        0 if seed % 2 == 0 => chance.below(64),
                        0 => 512 + chance.below(64),
                        1 | 2 => 512 + chance.below(256),
                        _ => chance.below(words.len() as u64),
                    };
                    let value = match chance.below(4) {
                        0 => chance.next_u64(),
                        1 => chance.below(16) << 16 | chance.below(12),
                        2 => chance.below(64),
                        _ => BOUNDARIES[chance.below(12) as usize],
                    };
                    words[place as usize].store(value, Ordering::Relaxed);
                }
            });
            // In the end it is dead, like every client at the end of a world: only then does it stop.
            world.run(300);
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(world.tally.blocks_loaded + world.tally.blocks_stored > 0, "seed {seed}: the other one is served");
    }
}

#[test]
fn a_lease_is_good_for_its_own_blocks_only() {
    let mut shape = Shape::draw(&mut Chance::new(5));
    shape.faults = Default::default();
    (shape.tp_size, shape.may_die, shape.may_lie, shape.may_crash) = (1, false, false, false);
    (shape.host_slots, shape.disk_slots, shape.chains, shape.chain_blocks) = (200, 0, 2, 20);
    (shape.shared_prefixes, shape.lease_ttl_ns) = (false, 1_000_000_000_000);
    let mut world = World::with_shape(shape, Chance::new(6));
    world.join();
    world.join();
    for chain in 0..2 {
        let grants = world.reserve(0, chain, 20);
        assert_eq!(world.fill_and_commit(0, chain, 0, &grants), 20);
    }
    assert_eq!((world.match_blocks(0, 0, 10), world.match_blocks(0, 1, 20), world.match_blocks(1, 0, 5)), (10, 20, 5));
    let (lease, of_another) = (world.lease_on(0, 0), world.lease_on(1, 0));
    assert_eq!(world.load_under(0, lease, 1, 0..10), [(Status::KeyMismatch, 10)], "another chain's keys");
    assert_eq!(world.load_under(0, lease, 0, 5..15), [(Status::KeyMismatch, 10)], "deeper than it goes");
    assert_eq!(world.load_under(0, lease, 0, 10..20), [(Status::KeyMismatch, 10)], "all of it deeper");
    assert_eq!(world.load_under(0, of_another, 0, 0..5), [(Status::Stale, 5)], "another instance's");
    assert_eq!(world.load_under(0, lease, 0, 3..10), [(Status::Ok, 7)], "and it still is good for what it is");
}

#[test]
fn a_poisoned_session_is_told_and_only_it() {
    let mut world = world();
    world.lie_exactly(0, |words| words[0].store(5000, Ordering::Relaxed));
    world.run(100);
    assert_eq!(world.metrics.sessions_poisoned_count.get(), 1);
}

#[test]
fn a_client_that_never_takes_its_answers_stalls_only_itself() {
    let mut world = world();
    world.post_pings_without_taking(0, 5000);
    world.run(500);
    assert!(world.tally.blocks_loaded + world.tally.blocks_stored > 0, "the other one is served");
    assert_eq!(world.metrics.sessions_poisoned_count.get(), 0);
}

#[test]
fn an_instance_uses_its_part_of_the_pool_and_leaves_the_others_theirs() {
    let mut shape = Shape::draw(&mut Chance::new(5));
    shape.faults = Default::default();
    (shape.tp_size, shape.may_die, shape.may_lie, shape.may_crash) = (1, false, false, false);
    (shape.host_slots, shape.disk_slots, shape.chains, shape.chain_blocks) = (200, 0, 4, 150);
    (shape.shared_prefixes, shape.lease_ttl_ns) = (false, 1_000_000_000_000);
    let mut world = World::with_shape(shape, Chance::new(6));
    world.join();
    let alone = world.reserve(0, 0, 150);
    assert_eq!(alone.len(), 150, "who is alone may have all of it");
    assert_eq!(world.fill_and_commit(0, 0, 0, &alone), 150);
    world.join();
    // It takes what it can, and never gives any back.
    assert_eq!(world.reserve(0, 1, 150).len(), 100);
    assert_eq!(world.reserve(0, 2, 150).len(), 0);
    assert_eq!(world.reserve(1, 3, 150).len(), 100, "the other has its half");

    let mut world = World::with_shape(world.shape.clone(), Chance::new(6));
    world.join();
    let grants = world.reserve(0, 0, 150);
    assert_eq!(world.fill_and_commit(0, 0, 0, &grants), 150);
    world.join();
    assert_eq!(world.match_blocks(0, 0, 150), 150);
    let loaded: u32 = world.load(0, 0, 150).iter().filter(|run| run.0 == Status::Ok).map(|run| run.1).sum();
    assert_eq!(loaded, 100, "slots on loan count as well");
    assert_eq!(world.reserve(1, 1, 150).len(), 50, "what is leased stays while it is, the rest is the other's");
}

#[test]
fn a_user_who_invents_instances_divides_what_is_his() {
    let mut shape = Shape::draw(&mut Chance::new(5));
    shape.faults = Default::default();
    (shape.tp_size, shape.may_die, shape.may_lie, shape.may_crash) = (1, false, false, false);
    (shape.host_slots, shape.disk_slots, shape.chains, shape.chain_blocks) = (400, 0, 4, 250);
    (shape.shared_prefixes, shape.lease_ttl_ns) = (false, 1_000_000_000_000);
    let mut world = World::with_shape(shape, Chance::new(6));
    world.join_by(7, 1, 1);
    // 60 instances of one process: the pool is not divided by them.
    for _ in 0..60 {
        world.join_by(8, 1, 1);
    }
    assert_eq!(world.reserve(0, 0, 250).len(), 200, "half of the pool");
    assert_eq!(world.reserve(0, 1, 250).len(), 0);
    assert_eq!(world.reserve(1, 2, 250).len(), 64, "the least that anybody may use: its part would be less");
    let more: usize = (2..61).map(|at| world.reserve(at, 3, 250).len()).sum();
    assert!(more <= 136, "what is left: {more}");
}

#[test]
fn ranks_that_share_slots_share_a_share() {
    let mut shape = Shape::draw(&mut Chance::new(5));
    shape.faults = Default::default();
    (shape.tp_size, shape.may_die, shape.may_lie, shape.may_crash) = (2, false, false, false);
    (shape.host_slots, shape.disk_slots, shape.chains, shape.chain_blocks) = (200, 0, 2, 150);
    shape.shared_prefixes = false;
    let mut world = World::with_shape(shape, Chance::new(6));
    world.join();
    world.join();
    assert_eq!(world.reserve(0, 0, 150).len(), 100);
    assert_eq!(world.reserve(1, 0, 150).len(), 100, "the second rank fills its part of the same slots");
    assert_eq!(world.reserve(2, 1, 150).len(), 100, "and the other instance has its half");
}

#[test]
fn an_instance_that_holds_leases_without_end_leaves_others_theirs() {
    let mut shape = Shape::draw(&mut Chance::new(5));
    shape.faults = Default::default();
    (shape.tp_size, shape.may_die, shape.may_lie, shape.may_crash) = (1, false, false, false);
    (shape.host_slots, shape.disk_slots, shape.chains, shape.chain_blocks) = (16, 0, 2, 4);
    shape.lease_ttl_ns = 1_000_000_000_000_000;
    let mut world = World::with_shape(shape, Chance::new(6));
    // Four sessions of one instance could hold every lease there is, if they might.
    world.join_as(1, 4);
    let grants = world.reserve(0, 0, 4);
    assert_eq!(world.fill_and_commit(0, 0, 0, &grants), 4);
    world.join();
    let matched =
        |world: &mut World, at: usize| (0..1024).filter(|_| world.match_blocks_at_once(at, 0, 4) == 4).count();
    let held: usize = (0..4).map(|at| matched(&mut world, at)).sum();
    assert_eq!(held, 2049, "half of them, and the one that made it half");
    assert_eq!(matched(&mut world, 4), 1024, "the other has as many as any session may");
}
