//! A hostile client: arbitrary words anywhere in its segment, well-formed requests at wrong moments, and
//! all between. An honest client of the same shard is answered and gets its own bytes; in the end every
//! slot is back.
//!
//! Input: four bytes of shape, then instructions, one byte each with their operands; see [`World::step`].
#![no_main]

use std::sync::{Arc, LazyLock};

use kvring_engine::cache::Cache;
use kvring_engine::device::DeviceMemory;
use kvring_engine::device::sim::{Faults, Sim};
use kvring_engine::index::IndexOptions;
use kvring_engine::limits::SECTOR_BYTES;
use kvring_engine::shard::session::Session as ServerSession;
use kvring_engine::shard::{End, Shard, ShardOptions};
use kvring_engine::tier::disk::{DiskGeometry, DiskSlots};
use kvring_engine::tier::host::{HostSlots, SessionId, Writer};
use kvring_fuzz::{Input, mapping};
use kvring_ipc::client::{Matched, Pool, Session};
use kvring_ipc::config::{EVICTION_POLICIES, Verify};
use kvring_ipc::key::{BlockKey, Namespace};
use kvring_ipc::mapping::Mapping;
use kvring_ipc::segment::Segment;
use kvring_ipc::sync::Ordering;
use kvring_ipc::wire::{Completion, Grant, LeaseId, Op, Status};
use kvring_tests::bytes;
use libfuzzer_sys::fuzz_target;

const SLOT_BYTES: u64 = SECTOR_BYTES;
const HONEST_BLOCKS: usize = 6;
/// More would only be slower: what a long input finds, a short one does.
const STEPS_MAX: u32 = 200;

/// Words of a segment: control, both rings, arena.
const SQ_TAIL: usize = 0;
const CQ_HEAD: usize = 192 / 8;
const CQ_TAIL: usize = 128 / 8;
const SQ: usize = 4096 / 8;
const RING_WORDS: usize = 1024 * 8;
const ARENA: usize = SQ + 2 * RING_WORDS;

/// The honest client's chain, each block with its bytes: the same in every world, made once.
static HONEST: LazyLock<Vec<(BlockKey, Vec<u8>)>> = LazyLock::new(|| {
    let tokens: Vec<u32> = (0..HONEST_BLOCKS as u32).collect();
    let block = |key| {
        let mut block = vec![0; SLOT_BYTES as usize];
        bytes::fill(key, 0, &mut block);
        (key, block)
    };
    Namespace::default().tenant("honest").keys(&tokens, 1).into_iter().map(block).collect()
});

struct Hostile {
    id: SessionId,
    segment: Segment,
    tail: u32,
    taken: u32,
}

struct World {
    shard: Shard<Sim>,
    pool: Arc<Mapping>,
    slots_count: u32,
    now_ns: u64,
    /// One session a rank.
    honest: Vec<Session>,
    keys: Vec<BlockKey>,
    /// What each rank was granted and has not committed: the slot, and which of its blocks goes there.
    filling: Vec<Vec<(Grant, usize)>>,
    /// The honest client's chain has been named by the other: it may have stored anything there
    /// (THREATS.md), so bytes are not compared any more.
    named: bool,
    /// What was loaded: lease, its end, which of its blocks, slot.
    held: Vec<(LeaseId, u64, usize, u32)>,
    hostile: Vec<Hostile>,
    /// Which of them acts.
    actor: usize,
    next_id: u32,
    leases: Vec<u64>,
    grants: Vec<Grant>,
}

impl World {
    fn new(input: &mut Input<'_>) -> Self {
        let [shape, slots, faults, policy] = std::array::from_fn(|_| input.byte());
        let slots_count = 2 + u32::from(slots & 15);
        let tp_size = 1 + u32::from(shape & 1);
        let geometry = DiskGeometry {
            devices_count: 1 + u32::from(shape >> 1 & 1),
            slots_per_device: 1 + u32::from(slots >> 4),
            slots_limit: 1 + u32::from(slots >> 4),
            header_slots: 1 + u32::from(slots >> 4),
            slots_per_file: 4,
            slot_bytes: SLOT_BYTES,
        };
        let with_disk = shape & 4 != 0;
        let pool = mapping(u64::from(slots_count) * SLOT_BYTES);
        let images: Vec<_> = (0..if with_disk { geometry.devices_count } else { 0 })
            .map(|_| mapping(geometry.header_sectors() * SECTOR_BYTES))
            .collect();
        let permille = |bit: u8| if faults >> bit & 1 != 0 { 200 } else { 0 };
        let faults = Faults {
            error_permille: permille(0),
            short_permille: permille(1),
            bit_rot_permille: permille(2),
            misdirected_permille: permille(3),
            lost_write_permille: permille(4),
            slow_permille: permille(5),
        };
        let devices = images.iter().map(|headers| {
            let platter = (0..geometry.files_per_device()).map(|file| vec![0; geometry.file_bytes(file) as usize]);
            let memory = DeviceMemory { pool: pool.clone(), headers: headers.clone(), piece_bytes: pool.bytes() };
            Sim::new(platter.collect(), memory, 8, 20_000, faults, u64::from(shape))
        });
        let devices = devices.collect();
        let options = IndexOptions {
            host_slots: slots_count,
            disk_slots: if with_disk { geometry.slots_count() } else { 0 },
            policy: EVICTION_POLICIES[usize::from(policy) % EVICTION_POLICIES.len()].1,
            protected_hits: 2,
            // Generations begin where they are about to wrap.
            secret: [u64::from(u32::MAX) - 3, u64::from(u32::MAX) - 3],
        };
        let disk = with_disk.then(|| DiskSlots::new(geometry, 7, images));
        let cache = Cache::new(&options, HostSlots::new(slots_count, tp_size), disk);
        let options = ShardOptions {
            slot_bytes: SLOT_BYTES,
            lease_ttl_ns: 10_000_000,
            load_wait_ns: 500_000,
            writer_grace_ns: 2_000_000,
            read_depth: 4,
            write_depth: 2,
            checksum: true,
            verify: Verify::Sampled,
            write_bytes_per_day: None,
            clock: || 0,
        };
        let mut shard = Shard::new(cache, pool.clone(), devices, options, Arc::default());
        shard.bear(0, 0..slots_count).expect("a simulated device registers anything");
        let mut world = Self {
            shard,
            pool,
            slots_count,
            now_ns: 1,
            honest: Vec::new(),
            keys: HONEST.iter().map(|(key, _)| *key).collect(),
            filling: vec![Vec::new(); tp_size as usize],
            named: false,
            held: Vec::new(),
            hostile: Vec::new(),
            actor: 0,
            next_id: 1,
            leases: Vec::new(),
            grants: Vec::new(),
        };
        for rank in 0..tp_size {
            let (_, segment) = world.attach(1, rank);
            let pool = Pool::new(world.pool.clone(), SLOT_BYTES as usize, slots_count);
            world.honest.push(Session::within(segment, pool));
        }
        for rank in 0..tp_size {
            let (id, segment) = world.attach(2, rank);
            world.hostile.push(Hostile { id, segment, tail: 0, taken: 0 });
        }
        world
    }

    fn attach(&mut self, instance: u32, rank: u32) -> (SessionId, Segment) {
        let id = SessionId(self.next_id);
        self.next_id += 1;
        let (segment, _fd) = Segment::create().expect("a segment");
        let writer = Writer { session: id, instance, rank };
        self.shard.attach(Box::new(ServerSession::new(writer, segment.clone(), None)));
        (id, segment)
    }

    fn poll(&mut self) {
        self.now_ns += 10_000;
        self.shard.poll(self.now_ns);
    }

    /// What an instruction means by a number: a literal of some width, or something it was given.
    fn value(&mut self, input: &mut Input<'_>) -> u64 {
        const EDGES: [u64; 8] = [0, 1, 255, 1024, 1 << 31, u32::MAX as u64, 1 << 63, u64::MAX];
        match input.byte() {
            0 => u64::from(input.byte()),
            1 => u64::from(input.u16()),
            2 => u64::from(input.u32()),
            3 => input.u64(),
            4 => at(&self.leases, input.byte()).copied().unwrap_or_default(),
            5 => at(&self.grants, input.byte()).map_or(0, |grant| grant.to_word()),
            // The other client's, as if guessed.
            6 => at(&self.held, input.byte()).map_or(0, |held| held.0.0),
            7 => at(&self.filling[0], input.byte()).map_or(0, |(grant, _)| grant.to_word()),
            edge => EDGES[usize::from(edge) % EDGES.len()],
        }
    }

    fn store(&mut self, word: usize, value: u64) {
        self.named |= self.keys.iter().any(|key| key.to_words().contains(&value));
        self.hostile[self.actor].segment.all_words()[word].store(value, Ordering::Relaxed);
    }

    /// Puts an entry where the next one belongs, and says so.
    fn submit(&mut self, entry: [u64; 8]) {
        let first = SQ + self.hostile[self.actor].tail as usize % 1024 * 8;
        for (word, value) in (first..).zip(entry) {
            self.store(word, value);
        }
        let hostile = &mut self.hostile[self.actor];
        hostile.tail = hostile.tail.wrapping_add(1);
        let tail = u64::from(hostile.tail);
        self.store(SQ_TAIL, tail);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() {
            // Any word anywhere.
            0 => {
                let (area, index) = (input.byte(), usize::from(input.u16()));
                let value = self.value(input);
                let word = match area % 4 {
                    0 => index % 64,
                    1 => SQ + index % RING_WORDS,
                    2 => SQ + RING_WORDS + index % RING_WORDS,
                    _ => ARENA + index,
                };
                self.store(word, value);
            }
            // A request: operation, count, first, place in the arena, lease, target.
            1 => {
                let (op, count, first) = (u64::from(input.byte()), u64::from(input.u16()), u64::from(input.u16()));
                let arena = u64::from(input.byte()) * 256;
                let (lease, target) = (self.value(input), u64::from(input.byte()));
                let parent = self.name(input.byte()).to_words();
                let head = op | count << 16 | first << 32;
                self.submit([target, head, arena, lease, parent[0], parent[1], target, 0]);
            }
            // Eight words of anything.
            2 => {
                let entry = std::array::from_fn(|_| self.value(input));
                self.submit(entry);
            }
            // Keys into the arena.
            3 => {
                let at = ARENA + usize::from(input.byte()) * 32;
                for (index, name) in input.take(16).iter().enumerate() {
                    for (word, value) in self.name(*name).to_words().into_iter().enumerate() {
                        self.store(at + index * 2 + word, value);
                    }
                }
            }
            // Grants it was given into the arena, current ones and old ones.
            4 => {
                let at = ARENA + usize::from(input.byte()) * 32;
                let (from, count) = (usize::from(input.byte()), usize::from(input.byte() % 32));
                for index in 0..count.min(self.grants.len()) {
                    let grant = self.grants[(from + index) % self.grants.len()];
                    self.store(at + index, grant.to_word());
                }
            }
            5 => (0..1 + input.byte() % 16).for_each(|_| self.poll()),
            6 => self.now_ns += u64::from(input.u16()) * 1000,
            7 => self.take(),
            8 => self.reserve_honestly(1 + usize::from(input.byte()) % HONEST_BLOCKS),
            9 => self.load_honestly(1 + usize::from(input.byte()) % HONEST_BLOCKS),
            10 => self.release_honestly(),
            // It hangs up, and comes again.
            11 => {
                let how = [End::Goodbye, End::Suspect, End::Dead][usize::from(input.byte() % 3)];
                let now_ns = self.now_ns;
                let id = self.hostile[self.actor].id;
                self.shard.end(id, how, now_ns);
                if how == End::Suspect {
                    self.poll();
                    self.shard.end(id, End::Dead, now_ns);
                }
                let (id, segment) = self.attach(2, self.actor as u32);
                self.hostile[self.actor] = Hostile { id, segment, tail: 0, taken: 0 };
            }
            12 => self.actor = (self.actor + 1) % self.hostile.len(),
            13 => drop(self.shard.reset()),
            14 => {
                self.shard.announce_sleep();
                self.shard.retract_sleep();
            }
            15 => self.commit_honestly(),
            _ => self.ping_honestly(),
        }
        self.look_again();
    }

    /// A key by a small name; the honest client's are among them.
    fn name(&self, name: u8) -> BlockKey {
        match name {
            0xf0.. => self.keys[usize::from(name & 15) % HONEST_BLOCKS],
            name => BlockKey::from_words([u64::from(name), 1]),
        }
    }

    /// The hostile client reads its answers, believes them, and fills what it was granted.
    fn take(&mut self) {
        let slots_count = self.slots_count;
        let hostile = &mut self.hostile[self.actor];
        let words = hostile.segment.all_words();
        // It may have written there itself.
        let tail = words[CQ_TAIL].load(Ordering::Relaxed) as u32;
        for _ in 0..tail.wrapping_sub(hostile.taken).min(1024) {
            let first = SQ + RING_WORDS + hostile.taken as usize % 1024 * 8;
            hostile.taken = hostile.taken.wrapping_add(1);
            let entry = std::array::from_fn(|word| words[first + word].load(Ordering::Relaxed));
            let Some(completion) = Completion::parse(&entry) else { continue };
            if completion.op == Some(Op::Match) && completion.payload[0] != 0 {
                self.leases.push(completion.payload[0]);
            }
            for (_, grant) in completion.grants() {
                self.grants.push(grant);
                let host = &self.shard.cache().host;
                // What it holds by a current grant is its own to fill: with garbage.
                let current = grant.slot < slots_count && host.grant(grant.slot) == grant && !host.holds(grant.slot);
                if completion.op == Some(Op::Reserve) && current {
                    self.pool.copy_in(grant.slot as usize * SLOT_BYTES as usize, &[0xee; SLOT_BYTES as usize]);
                }
            }
        }
        let taken = u64::from(hostile.taken);
        self.store(CQ_HEAD, taken);
    }

    /// All answers to what a rank has asked: within so many polls there must be the last.
    fn answers(&mut self, rank: usize, polls: u32) -> Vec<Completion> {
        let mut all = Vec::new();
        self.honest[rank].publish();
        for _ in 0..polls {
            self.poll();
            self.honest[rank].poll(|completion| all.push(completion)).expect("an honest session");
            if all.last().is_some_and(|completion: &Completion| completion.last) {
                return all;
            }
        }
        panic!("the honest client waits in vain: {all:?}");
    }

    fn ping_honestly(&mut self) {
        for rank in 0..self.honest.len() {
            self.honest[rank].post_ping().expect("there is room");
            assert_eq!(self.answers(rank, 1).last().map(|pong| pong.status), Some(Status::Ok));
        }
    }

    fn reserve_honestly(&mut self, blocks: usize) {
        for rank in 0..self.honest.len() {
            self.honest[rank].post_reserve(BlockKey::default(), 0, &self.keys[..blocks]).expect("there is room");
            let answers = self.answers(rank, 1);
            assert_eq!(answers.iter().map(|answer| answer.count as usize).sum::<usize>(), blocks);
            for (index, grant) in answers.iter().flat_map(Completion::grants) {
                // Whoever reads it before it is committed reads this.
                self.honest[rank].pool().copy_in(grant.slot, rank * self.part(), &vec![0xaa; self.part()]);
                self.filling[rank].push((grant, index as usize));
            }
        }
    }

    /// Bytes that one rank stores of a block.
    fn part(&self) -> usize {
        SLOT_BYTES as usize / self.honest.len()
    }

    fn commit_honestly(&mut self) {
        for rank in 0..self.honest.len() {
            let filling = std::mem::take(&mut self.filling[rank]);
            if filling.is_empty() {
                continue;
            }
            for (grant, index) in &filling {
                let bytes = &HONEST[*index].1[rank * self.part()..][..self.part()];
                self.honest[rank].pool().copy_in(grant.slot, rank * self.part(), bytes);
            }
            let grants: Vec<Grant> = filling.iter().map(|(grant, _)| *grant).collect();
            self.honest[rank].post_commit(&grants).expect("there is room");
            assert_eq!(self.answers(rank, 1)[0].status, Status::Ok, "nobody else ends what it is storing");
        }
    }

    fn load_honestly(&mut self, blocks: usize) {
        self.honest[0].post_match(&self.keys[..blocks]).expect("there is room");
        let matched = Matched::from_completion(&self.answers(0, 1)[0]);
        let Some(lease) = matched.lease else { return };
        let blocks = matched.blocks as usize;
        self.honest[0].post_load(lease.id, 0, &self.keys[..blocks]).expect("there is room");
        // A slow device takes 3 ms, a short transfer begins again; each poll is 10 us.
        let answers = self.answers(0, 20_000);
        let mut answered = vec![false; blocks];
        for answer in answers {
            for index in answer.first..answer.first + answer.count {
                assert!(!std::mem::replace(&mut answered[index as usize], true), "a block is answered once");
            }
            for (index, grant) in answer.grants() {
                self.held.push((lease.id, lease.expires_at_ns, index as usize, grant.slot));
            }
        }
        assert!(answered.iter().all(|answered| *answered), "every block is answered");
    }

    fn release_honestly(&mut self) {
        let Some((lease, ..)) = self.held.first().copied() else { return };
        self.held.retain(|held| held.0 != lease);
        self.honest[0].post_release(lease).expect("there is room");
        self.answers(0, 1);
    }

    /// What a lease protects is exact for as long as it does.
    fn look_again(&mut self) {
        self.held.retain(|held| held.1 > self.now_ns);
        let mut block = [0; SLOT_BYTES as usize];
        for (_, _, index, slot) in self.held.iter().filter(|_| !self.named) {
            self.honest[0].pool().copy_out(*slot, 0, &mut block);
            assert!(block[..] == HONEST[*index].1, "wrong bytes in a leased slot");
        }
    }

    /// All sessions end: nothing may be left.
    fn finish(mut self) {
        self.ping_honestly();
        self.shard.cache().check();
        for id in 1..self.next_id {
            self.shard.end(SessionId(id), End::Dead, self.now_ns);
        }
        for _ in 0..5000 {
            let cache = self.shard.cache();
            if self.shard.is_drained() && cache.host.quarantined_count() == 0 {
                break;
            }
            self.now_ns += 90_000;
            self.poll();
        }
        assert!(self.shard.is_drained(), "what was to be written is written");
        self.shard.cache().check();
        self.shard.cache().check_at_rest();
    }
}

fn at<T>(all: &[T], index: u8) -> Option<&T> {
    all.get(usize::from(index) % all.len().max(1))
}

// The offsets above are the segment's.
const _: () = assert!(ARENA * 8 + kvring_ipc::segment::ARENA_BYTES as usize == kvring_ipc::segment::SEGMENT_BYTES);

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut world = World::new(&mut input);
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        world.step(&mut input);
    }
    world.finish();
});
