//! Copies by a CUDA device, told over a fake driver through the real loader: `tests/fake-cuda` does what
//! the documentation allows in the least convenient way.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvring_fake_cuda::Fake;
use kvring_gpu::backend::cuda::{CudaBackend, Options};
use kvring_gpu::backend::tensors::Tensors;
use kvring_gpu::backend::{Batch, BlockCopy, CopyBackend, Direction, Moment, Outcome, Refusal};
use kvring_gpu::driver::api::{DriverApi, Unavailable};
use kvring_gpu::layout::{GroupMap, MemoryMap, TensorMap};
use kvring_gpu::plan::Calibration;
use kvring_gpu::trial::{Scatter, Shape, Trial, Who};
use kvring_ipc::client::Pool;
use kvring_ipc::mapping::Mapping;

const LAYERS: usize = 6;
const PAGES: usize = 32;
const SLOTS: u32 = 24;

/// How pages lie in device memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// A tensor a layer.
    LayerFirst,
    /// One allocation, a block after the other, its layers inside.
    BlockFirst,
}

struct Gpu {
    fake: Fake,
    pool: Pool,
    /// Of each layer.
    addresses: Vec<usize>,
    layout: Layout,
    page_bytes: usize,
    backend: CudaBackend,
    next: u64,
}

const SMALL: usize = 8 << 10;

impl Gpu {
    fn new(fake: Fake, layout: Layout, page_bytes: usize, options: Options) -> Self {
        let block_bytes = LAYERS * page_bytes;
        let mapping = Arc::new(Mapping::private(SLOTS as usize * block_bytes).unwrap());
        let pool = Pool::new(mapping, block_bytes, SLOTS);
        let addresses: Vec<usize> = match layout {
            // An allocation a layer, as torch makes them.
            Layout::LayerFirst => (0..LAYERS).map(|_| fake.alloc(PAGES * page_bytes)).collect(),
            Layout::BlockFirst => {
                let address = fake.alloc(PAGES * block_bytes);
                (0..LAYERS).map(|layer| address + layer * page_bytes).collect()
            }
        };
        let map = map_of(&addresses, layout, page_bytes);
        // SAFETY: the fake's memory lives as long as the fake, and nobody else touches it meanwhile.
        #[expect(unsafe_code, reason = "an address is a promise")]
        let tensors = unsafe { Tensors::new(&map) }.unwrap();
        let options = Options { driver: Some(fake.path().to_path_buf()), ..options };
        let backend = CudaBackend::new(tensors, options).unwrap();
        Self { fake, pool, addresses, layout, page_bytes, backend, next: 0 }
    }

    fn page_at(&self, layer: usize, page: u32) -> usize {
        let stride = if self.layout == Layout::LayerFirst { 1 } else { LAYERS };
        self.addresses[layer] + page as usize * stride * self.page_bytes
    }

    /// A page's bytes for a block of this name.
    fn bytes_of(&self, name: u32, layer: usize) -> Vec<u8> {
        (0..self.page_bytes).map(|at| (at / 7 + layer * 31) as u8 ^ name as u8).collect()
    }

    fn compute(&self, page: u32, name: u32) {
        for layer in 0..LAYERS {
            self.fake.write(self.page_at(layer, page), &self.bytes_of(name, layer));
        }
    }

    fn is_in_page(&self, page: u32, name: u32) -> bool {
        (0..LAYERS)
            .all(|layer| self.fake.read(self.page_at(layer, page), self.page_bytes) == self.bytes_of(name, layer))
    }

    fn is_in_slot(&self, slot: u32, name: u32) -> bool {
        let mut bytes = vec![0; LAYERS * self.page_bytes];
        self.pool.copy_out(slot, 0, &mut bytes);
        (0..LAYERS).all(|layer| bytes[layer * self.page_bytes..][..self.page_bytes] == self.bytes_of(name, layer))
    }

    /// Submits until all is taken; the ids.
    fn submit(
        &mut self,
        direction: Direction,
        blocks: &[(u32, u32)],
        after: Option<&Moment>,
    ) -> Result<Vec<u64>, Refusal> {
        let pages: Vec<[u32; 1]> = blocks.iter().map(|(_, page)| [*page]).collect();
        let blocks: Vec<BlockCopy<'_>> =
            blocks.iter().zip(&pages).map(|((slot, _), pages)| BlockCopy { slot: *slot, pages }).collect();
        let (mut rest, mut ids) = (&blocks[..], Vec::new());
        let until = Instant::now() + Duration::from_secs(20);
        while !rest.is_empty() {
            let id = self.next;
            let batch = Batch { direction, pool: &self.pool, blocks: rest, tensors: 0..LAYERS as u32, after };
            match self.backend.submit(id, &batch) {
                Ok(taken) => {
                    self.next += 1;
                    ids.push(id);
                    rest = &rest[taken..];
                }
                Err(Refusal::Full) => {
                    assert!(Instant::now() < until, "there is never room");
                    std::thread::sleep(Duration::from_micros(100));
                    // Room comes with ends; these are of batches before.
                    let mut ended = Vec::new();
                    self.backend.poll(&mut ended);
                    assert!(ended.iter().all(|(_, outcome)| *outcome == Outcome::Copied));
                    ids.retain(|id| !ended.iter().any(|(of, _)| of == id));
                }
                Err(broken) => return Err(broken),
            }
        }
        Ok(ids)
    }

    fn outcomes(&mut self, ids: &[u64]) -> Vec<Outcome> {
        let until = Instant::now() + Duration::from_secs(20);
        let (mut open, mut outcomes) = (ids.to_vec(), Vec::new());
        while !open.is_empty() {
            assert!(Instant::now() < until, "batches {open:?} never end");
            let mut ended = Vec::new();
            self.backend.poll(&mut ended);
            for (id, outcome) in ended {
                open.retain(|of| *of != id);
                outcomes.push(outcome);
            }
        }
        outcomes
    }

    fn copy(&mut self, direction: Direction, blocks: &[(u32, u32)]) {
        let ids = self.submit(direction, blocks, None).unwrap();
        assert!(self.outcomes(&ids).iter().all(|outcome| *outcome == Outcome::Copied));
    }

    /// Stores pages into slots and loads them into others: every byte is where it belongs, no other changed.
    fn there_and_back(&mut self, seed: u64) {
        let mut random = seed;
        let mut draw = move |below: u32| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) as u32 % below
        };
        for page in 0..PAGES as u32 {
            self.compute(page, 100 + page);
        }
        let (mut slots, mut pages): (Vec<u32>, Vec<u32>) = ((0..SLOTS).collect(), (0..PAGES as u32).collect());
        let stored: Vec<(u32, u32)> = (0..10)
            .map(|_| (slots.remove(draw(slots.len() as u32) as usize), pages.remove(draw(pages.len() as u32) as usize)))
            .collect();
        self.copy(Direction::Store, &stored);
        for (slot, page) in &stored {
            assert!(self.is_in_slot(*slot, 100 + page), "seed {seed}: slot {slot} of page {page}");
        }
        let loaded: Vec<(u32, u32)> =
            stored.iter().map(|(slot, _)| (*slot, pages.remove(draw(pages.len() as u32) as usize))).collect();
        self.copy(Direction::Load, &loaded);
        for ((_, from), (_, page)) in stored.iter().zip(&loaded) {
            assert!(self.is_in_page(*page, 100 + from), "seed {seed}: page {page} of page {from}");
        }
        for page in pages {
            assert!(self.is_in_page(page, 100 + page), "seed {seed}: page {page} was nobody's");
        }
    }
}

fn map_of(addresses: &[usize], layout: Layout, page_bytes: usize) -> MemoryMap {
    let tensor = |layer: usize| {
        let page_stride_bytes = if layout == Layout::LayerFirst { page_bytes } else { LAYERS * page_bytes };
        TensorMap {
            address: addresses[layer],
            bytes: (PAGES - 1) * page_stride_bytes + page_bytes,
            pages_count: PAGES,
            page_stride_bytes,
            shape: vec![2, page_bytes / 4],
            strides_bytes: vec![page_bytes / 2, 2],
            element_bytes: 2,
        }
    };
    let groups = vec![GroupMap { pages_per_block: 1, tensors: (0..LAYERS).map(tensor).collect() }];
    MemoryMap { offset_in_slot: 0, groups }
}

fn plain() -> Options {
    let calibration = Some(Calibration { is_batched: true, ..Calibration::default() });
    Options { calibration, staging_bytes: 6 << 20, registration_bytes: 256 << 10, ..Options::default() }
}

fn with(calibration: Calibration) -> Options {
    Options { calibration: Some(calibration), ..plain() }
}

fn ways() -> [(&'static str, Calibration); 5] {
    let batched = Calibration { is_batched: true, ..Calibration::default() };
    [
        ("one by one", Calibration::default()),
        ("batches", batched),
        ("rows", Calibration { rows_min: 2, ..batched }),
        ("staged", Calibration { staged_below_bytes: u64::MAX, ..batched }),
        ("direct", Calibration { direct_below_bytes: 1 << 30, ..batched }),
    ]
}

#[test]
fn every_way_of_copying_puts_every_byte_where_it_belongs() {
    for (name, way) in ways() {
        for layout in [Layout::LayerFirst, Layout::BlockFirst] {
            // Odd sizes too: what is no multiple of 16 bytes, and blocks across pieces of the registration.
            for page_bytes in [SMALL, 36, 20 << 10] {
                let seed = page_bytes as u64 ^ name.len() as u64;
                println!("{name}, {layout:?}, pages of {page_bytes}, seed {seed}");
                // Pages are staged, whole blocks are not.
                let staged_below_bytes = way.staged_below_bytes.min(page_bytes as u64 + 1);
                let calibration = Calibration { staged_below_bytes, ..way };
                let options =
                    Options { staging_bytes: 6 * (256 << 10), registration_bytes: 64 << 10, ..with(calibration) };
                let mut gpu = Gpu::new(Fake::new(), layout, page_bytes, options);
                gpu.fake.set("seed", &seed.to_string()).set("slice_bytes", "4096");
                gpu.there_and_back(seed);
                let is_kernel = gpu.fake.calls("cuLaunchKernel") > 0;
                assert_eq!(is_kernel, name == "direct" || name == "staged" && layout == Layout::LayerFirst, "{name}");
                gpu.backend.close(true);
                assert_eq!((gpu.fake.crimes(), gpu.fake.pinned_bytes()), (0, 0), "all was given back in order");
            }
        }
    }
}

#[test]
fn a_store_waits_for_the_engine_s_last_write_and_a_load_for_its_last_read() {
    // Each way has a stream of its own that touches pages: the head or the tail, by the kernel or not.
    for (name, way) in ways() {
        println!("{name}");
        waits_for_the_engine(Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, with(way)));
    }
}

fn waits_for_the_engine(mut gpu: Gpu) {
    let marks = gpu.backend.marks().unwrap();
    let stream = gpu.fake.compute_stream();
    let all = (gpu.addresses[0], PAGES * SMALL);
    // The engine is still computing page 3 when its store is submitted.
    gpu.fake.compute(stream, all.0, all.1, 0x77, 50);
    let after = marks.clone().mark(stream).unwrap();
    let ids = gpu.submit(Direction::Store, &[(5, 3)], Some(&after)).unwrap();
    assert_eq!(gpu.outcomes(&ids), [Outcome::Copied]);
    let mut stored = vec![0; SMALL];
    gpu.pool.copy_out(5, 0, &mut stored);
    assert!(stored.iter().all(|byte| *byte == 0x77), "stored after it was written");
    // The engine is still at work on page 7 when a load of it is submitted: what is loaded stays.
    gpu.fake.compute(stream, all.0, all.1, 0x11, 50);
    let after = marks.mark(stream).unwrap();
    let ids = gpu.submit(Direction::Load, &[(5, 7)], Some(&after)).unwrap();
    assert_eq!(gpu.outcomes(&ids), [Outcome::Copied]);
    assert!(gpu.fake.read(gpu.page_at(0, 7), SMALL).iter().all(|byte| *byte == 0x77), "loaded after the work");
}

#[test]
fn a_stream_that_is_being_captured_is_refused_in_words() {
    let gpu = Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, plain());
    gpu.fake.set("fail", "cuStreamIsCapturing:0:1");
    let refusal = gpu.backend.marks().unwrap().mark(gpu.fake.compute_stream()).unwrap_err();
    assert!(refusal.contains("captured into a graph"), "{refusal}");
}

#[test]
fn nothing_has_ended_before_it_has() {
    let mut gpu = Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, plain());
    gpu.fake.set("slice_us", "300").set("slice_bytes", "4096");
    gpu.compute(1, 42);
    let ids = gpu.submit(Direction::Store, &[(0, 1)], None).unwrap();
    let mut ended = Vec::new();
    while ended.is_empty() {
        // Whenever it says so, it is so.
        gpu.backend.poll(&mut ended);
    }
    assert!(gpu.is_in_slot(0, 42));
    assert_eq!(ended, [(ids[0], Outcome::Copied)]);
}

#[test]
fn without_words_and_without_batches_it_still_copies() {
    for (what, value) in [("has_words", "false"), ("version", "12000"), ("version", "12080"), ("has_ptx", "false")] {
        let fake = Fake::new();
        fake.set(what, value);
        let options = Options { calibration: None, ..plain() };
        let mut gpu = Gpu::new(fake, Layout::LayerFirst, SMALL, options);
        gpu.there_and_back(7);
        println!("{what} = {value}: {:?} {:?}", gpu.backend.calibration(), gpu.backend.trouble());
        let batches = [("batch_v1", "12080"), ("batch_v2", "13000")].map(|(name, _)| gpu.fake.calls(name));
        match (what, value) {
            ("version", "12000") => assert_eq!(batches, [0, 0]),
            ("version", "12080") => assert!(batches[0] > 0 && batches[1] == 0, "the signature of 12.8"),
            _ => assert!(batches[0] == 0 && batches[1] > 0, "the signature of 13.0"),
        }
        if what == "has_ptx" {
            assert!(gpu.backend.trouble()[0].contains("218"), "{:?}", gpu.backend.trouble());
        }
    }
}

#[test]
fn a_batch_call_that_is_not_supported_after_all_is_a_loop_from_then_on() {
    let mut gpu = Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, plain());
    gpu.fake.set("fail", "cuMemcpyBatchAsync:0:801");
    gpu.there_and_back(3);
    assert_eq!(gpu.fake.calls("cuMemcpyBatchAsync"), 1, "not asked again");
    assert!(gpu.backend.trouble().iter().any(|note| note.contains("one by one")), "{:?}", gpu.backend.trouble());
}

#[test]
fn a_copy_that_is_refused_fails_its_batch_and_no_other() {
    let mut gpu = Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, with(Calibration::default()));
    gpu.compute(1, 8);
    gpu.copy(Direction::Store, &[(0, 1)]);
    gpu.fake.set("fail", "cuMemcpyDtoHAsync:2:2");
    let ids = gpu.submit(Direction::Store, &[(1, 1)], None).unwrap();
    assert_eq!(gpu.outcomes(&ids), [Outcome::Failed], "not committed, and its slot may go back");
    gpu.copy(Direction::Store, &[(2, 1)]);
    assert!(gpu.is_in_slot(2, 8), "the device lives");
}

/// An engine that frees its memory under a copy has a bug: it costs that copy, not the process, whatever the way.
#[test]
fn memory_that_the_engine_has_freed_is_refused_and_nothing_else_happens() {
    for (name, way) in ways() {
        let options = Options { staging_bytes: 6 * (256 << 10), ..with(way) };
        let mut gpu = Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, options);
        gpu.compute(1, 8);
        gpu.copy(Direction::Store, &[(0, 1), (1, 2), (2, 3)]);
        for address in gpu.addresses.clone() {
            gpu.fake.free(address);
        }
        for direction in [Direction::Load, Direction::Store] {
            let ids = gpu.submit(direction, &[(0, 1), (1, 2), (2, 3)], None).unwrap();
            assert!(gpu.outcomes(&ids).iter().all(|outcome| *outcome == Outcome::Failed), "{name}, {direction:?}");
        }
        assert!(gpu.backend.trouble().iter().any(|note| note.contains("was refused")), "{:?}", gpu.backend.trouble());
        assert_eq!(gpu.fake.crimes(), 0, "{name}: the driver would have read it as the processor's");
        gpu.backend.close(true);
        assert_eq!((gpu.fake.crimes(), gpu.fake.pinned_bytes()), (0, 0), "{name}: the context lives");
    }
}

/// Where the driver refuses what marks the end of a batch, its end is found another way: nothing ends before it has, and
/// the device lives.
#[test]
fn an_end_that_cannot_be_marked_is_found_all_the_same() {
    let refusals: [&[&str]; 5] = [
        &["cuStreamWriteValue64:0:2"],
        &["cuStreamWriteValue64:0:2", "cuEventCreate:0:2"],
        &["cuStreamWriteValue64:0:2", "cuEventRecord:1:2"],
        &["cuEventRecord:0:2"],
        &["cuStreamWaitEvent:0:2"],
    ];
    for (name, way) in ways() {
        let uses_kernel = ["staged", "direct"].contains(&name);
        for refusals in refusals {
            let mut gpu = Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, with(way));
            gpu.compute(1, 42);
            gpu.copy(Direction::Store, &[(0, 1)]);
            gpu.fake.set("slice_us", "300").set("slice_bytes", "4096");
            for refusal in refusals {
                gpu.fake.set("fail", refusal);
            }
            let ids = gpu.submit(Direction::Store, &[(3, 1)], None).unwrap();
            let outcomes = gpu.outcomes(&ids);
            // The kernel's batches have events and waits of their own: one of those is what was refused.
            assert!(outcomes == [Outcome::Copied] || uses_kernel && outcomes == [Outcome::Failed], "{outcomes:?}");
            assert!(gpu.is_in_slot(3, 42) || outcomes == [Outcome::Failed], "{name}, {refusals:?}: not yet there");
            assert!(!gpu.backend.trouble().is_empty());
            gpu.there_and_back(13);
            gpu.backend.close(true);
            assert_eq!((gpu.fake.crimes(), gpu.fake.pinned_bytes()), (0, 0), "{name}, {refusals:?}");
        }
    }
}

#[test]
fn a_copy_that_cannot_wait_for_the_engine_is_not_made() {
    for (name, way) in ways() {
        let mut gpu = Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, with(way));
        gpu.copy(Direction::Store, &[(0, 1)]);
        gpu.pool.copy_in(5, 0, &[0x33; LAYERS * SMALL]);
        let after = gpu.backend.marks().unwrap().mark(gpu.fake.compute_stream()).unwrap();
        gpu.fake.set("fail", "cuStreamWaitEvent:0:400");
        let ids = gpu.submit(Direction::Store, &[(5, 1)], Some(&after)).unwrap();
        assert_eq!(gpu.outcomes(&ids), [Outcome::Failed], "{name}");
        let mut slot = vec![0; LAYERS * SMALL];
        gpu.pool.copy_out(5, 0, &mut slot);
        assert!(slot.iter().all(|byte| *byte == 0x33), "{name}: stored before it was computed");
        gpu.there_and_back(17);
    }
}

/// What is measured at the start may be refused in the middle: nothing is freed that is still copied, nothing stays
/// that was for it, and without figures it copies in the plainest way.
#[test]
fn a_measurement_that_is_refused_leaves_nothing_behind() {
    for refused in ["cuMemcpyDtoHAsync:9:2", "cuMemcpyBatchAsync:3:2", "cuLaunchKernel:2:2"] {
        let fake = Fake::new();
        fake.set("slice_us", "20").set("fail", refused);
        let mut gpu = Gpu::new(fake, Layout::LayerFirst, SMALL, Options { calibration: None, ..plain() });
        let trouble = gpu.backend.trouble();
        assert!(trouble.iter().any(|note| note.contains("was not measured")), "{refused}: {trouble:?}");
        assert_eq!(gpu.fake.crimes(), 0, "{refused}: it was still being copied");
        gpu.fake.set("slice_us", "0");
        gpu.there_and_back(19);
        gpu.backend.close(true);
        let tensors = (LAYERS * PAGES * SMALL) as u64;
        assert_eq!((gpu.fake.crimes(), gpu.fake.held()), (0, tensors), "{refused}");
    }
}

/// A back end that cannot start leaves a process that goes on without one.
#[test]
fn a_start_that_fails_gives_back_what_it_had() {
    for (what, value) in [
        ("free_bytes", (LAYERS * PAGES * SMALL + (1 << 20)).to_string()),
        ("fail", "cuStreamCreateWithPriority:3:2".into()),
        ("fail", "cuEventCreate:1:2".into()),
    ] {
        let fake = Fake::new();
        let addresses: Vec<usize> = (0..LAYERS).map(|_| fake.alloc(PAGES * SMALL)).collect();
        let held = fake.held();
        fake.set(what, &value);
        // SAFETY: nothing is copied.
        #[expect(unsafe_code, reason = "an address is a promise")]
        let tensors = unsafe { Tensors::new(&map_of(&addresses, Layout::LayerFirst, SMALL)) }.unwrap();
        let options = Options { driver: Some(fake.path().to_path_buf()), ..plain() };
        let error = CudaBackend::new(tensors, options).err().expect(what).to_string();
        assert!(error.contains("cannot start on device 0") && error.contains("says 2"), "{error}");
        assert_eq!((fake.held(), fake.pinned_bytes()), (held, 0), "{what} = {value}");
        assert_eq!(fake.calls("cuDevicePrimaryCtxRelease"), 1);
    }
}

#[test]
fn words_that_cannot_be_pinned_are_done_without() {
    let fake = Fake::new();
    fake.set("fail", "cuMemHostRegister:0:2");
    let mut gpu = Gpu::new(fake, Layout::LayerFirst, SMALL, plain());
    gpu.there_and_back(23);
    assert_eq!(gpu.fake.calls("cuStreamWriteValue64"), 0);
    let trouble = gpu.backend.trouble();
    assert!(trouble.iter().any(|note| note.contains("the words cannot be pinned")), "{trouble:?}");
    gpu.backend.close(true);
    assert_eq!((gpu.fake.crimes(), gpu.fake.pinned_bytes()), (0, 0));
}

#[test]
fn a_lost_context_is_told_once_and_never_touched_again() {
    for code in [700, 719, 999] {
        let mut gpu = Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, plain());
        gpu.copy(Direction::Store, &[(0, 1)]);
        gpu.fake.set("slice_us", "2000");
        let ids = gpu.submit(Direction::Store, &[(1, 1), (2, 2)], None).unwrap();
        // Somebody else's kernel, found by the watch over the stream: no word will come.
        gpu.fake.set("fail", &format!("cuStreamQuery:0:{code}"));
        assert!(gpu.outcomes(&ids).iter().all(|outcome| *outcome == Outcome::Unknown), "nobody can tell");
        let calls = ["cuMemcpyBatchAsync", "cuStreamQuery", "cuMemHostUnregister"].map(|name| gpu.fake.calls(name));
        let refusal = gpu.submit(Direction::Load, &[(0, 1)], None).unwrap_err();
        assert!(matches!(&refusal, Refusal::Broken(why) if why.contains(&code.to_string())), "{refusal:?}");
        gpu.backend.poll(&mut Vec::new());
        gpu.backend.close(false);
        let after = ["cuMemcpyBatchAsync", "cuStreamQuery", "cuMemHostUnregister"].map(|name| gpu.fake.calls(name));
        assert_eq!(after, calls, "a lost context is asked nothing");
        assert!(gpu.fake.pinned_bytes() > 0, "and what may still move is left where it is");
    }
}

#[test]
fn a_pool_that_cannot_be_pinned_goes_through_a_pinned_buffer() {
    let fake = Fake::new();
    // The words are pinned first; a refusal is tried again twice.
    fake.set("fail", "cuMemHostRegister:1:2").set("fail", "cuMemHostRegister:0:2").set("fail", "cuMemHostRegister:0:2");
    let options = Options { registration_bytes: 1 << 30, bounce_bytes: 4 * LAYERS * SMALL, ..plain() };
    let mut gpu = Gpu::new(fake, Layout::LayerFirst, SMALL, options);
    gpu.there_and_back(11);
    // What is not copied of a slot is left alone: here all layers but the first.
    gpu.pool.copy_in(3, 0, &[0x33; LAYERS * SMALL]);
    let blocks = [BlockCopy { slot: 3, pages: &[1] }];
    let batch = Batch { direction: Direction::Store, pool: &gpu.pool, blocks: &blocks, tensors: 0..1, after: None };
    assert_eq!(gpu.backend.submit(999, &batch), Ok(1));
    assert_eq!(gpu.outcomes(&[999]), [Outcome::Copied]);
    let mut slot = vec![0; LAYERS * SMALL];
    gpu.pool.copy_out(3, 0, &mut slot);
    assert!(slot[SMALL..].iter().all(|byte| *byte == 0x33), "another block's bytes in the slot");
    let trouble = gpu.backend.trouble();
    assert!(
        trouble.iter().any(|note| {
            note.contains("cannot be pinned") && note.contains("cuMemHostRegister says 2") && note.contains("ulimit -l")
        }),
        "{trouble:?}"
    );
    gpu.backend.close(true);
    assert_eq!(gpu.fake.crimes(), 0);
}

#[test]
fn copies_wait_for_pieces_that_are_being_pinned_and_only_those_are_pinned_that_are_used() {
    let fake = Fake::new();
    fake.set("register_ms", "20");
    let mut gpu = Gpu::new(fake, Layout::LayerFirst, SMALL, Options { registration_bytes: 64 << 10, ..plain() });
    gpu.compute(0, 9);
    let began = Instant::now();
    let blocks = [BlockCopy { slot: 0, pages: &[0] }];
    let batch =
        Batch { direction: Direction::Store, pool: &gpu.pool, blocks: &blocks, tensors: 0..LAYERS as u32, after: None };
    assert_eq!(gpu.backend.submit(9, &batch), Err(Refusal::Full), "not yet, and nobody waits");
    assert!(began.elapsed() < Duration::from_millis(20));
    gpu.copy(Direction::Store, &[(0, 0)]);
    assert!(gpu.is_in_slot(0, 9));
    let words = 4096;
    assert_eq!(gpu.fake.pinned_bytes(), words + (64 << 10), "one piece");
}

#[test]
fn what_a_load_waits_for_is_pinned_before_what_stores_do() {
    let fake = Fake::new();
    fake.set("register_ms", "100");
    // 18 pieces; a slot lies in one or two.
    let mut gpu = Gpu::new(fake, Layout::LayerFirst, SMALL, Options { registration_bytes: 64 << 10, ..plain() });
    let mut ready = |direction, slot| gpu.backend.is_ready(direction, &gpu.pool, slot);
    for slot in 0..SLOTS {
        assert!(!ready(Direction::Store, slot), "nothing is pinned yet");
    }
    let began = Instant::now();
    while !ready(Direction::Load, SLOTS - 2) {
        assert!(began.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!ready(Direction::Store, SLOTS - 5), "those that stores wait for come later");
    println!("{:?}", began.elapsed());
    gpu.compute(1, 5);
    gpu.copy(Direction::Store, &[(SLOTS - 2, 1)]);
    assert!(gpu.is_in_slot(SLOTS - 2, 5));
    gpu.backend.close(true);
    assert_eq!(gpu.fake.pinned_bytes(), 0, "what nobody waits for any more is not pinned");
}

#[test]
fn a_batch_is_bounded_by_bytes_and_by_copies() {
    let fake = Fake::new();
    let shape =
        |page_bytes, blocks_count| Shape { name: "", layers: 1, page_bytes, is_block_first: false, blocks_count };
    for (page_bytes, blocks, taken) in [(8 << 10, 2100, 2048), (2 << 20, 20, 16)] {
        let options = Options { driver: Some(fake.path().to_path_buf()), ..plain() };
        let mut trial = Trial::new(&Who::Cuda(options), &shape(page_bytes, blocks)).unwrap();
        let chosen = trial.choose(Scatter::Random);
        // The pool is pinned first.
        trial.copy(&[(Direction::Store, &chosen)]).unwrap();
        let calls = fake.calls("cuMemcpyBatchAsync");
        assert_eq!(blocks - trial.submit(Direction::Store, &chosen).unwrap(), taken, "pages of {page_bytes}");
        assert_eq!(fake.calls("cuMemcpyBatchAsync"), calls + 1, "in one call");
        while trial.poll().unwrap() == 0 {}
    }
}

#[test]
fn there_is_a_sentence_for_every_way_to_have_no_device() {
    let load = |fake: &Fake| DriverApi::load(Some(fake.path())).unwrap_err();
    let fake = |what: &str, value: &str| {
        let fake = Fake::new();
        fake.set(what, value);
        fake
    };
    let stub = fake("init", "34");
    assert_eq!(load(&stub), Unavailable::Stub { library: stub.path().into() });
    assert_eq!(load(&fake("init", "100")), Unavailable::NoDevice);
    assert_eq!(load(&fake("devices", "0")), Unavailable::NoDevice);
    assert_eq!(load(&fake("version", "11080")), Unavailable::TooOld { version: 11080 });
    let mismatch = load(&fake("init", "803")).to_string();
    assert!(mismatch.contains("803 (driver and kernel module do not match)"), "{mismatch}");
    assert!(load(&stub).to_string().contains("LD_LIBRARY_PATH"));
    assert!(matches!(DriverApi::load(Some(Path::new("/no/libcuda.so.1"))), Err(Unavailable::NoLibrary { .. })));
}

#[test]
fn too_little_device_memory_means_smaller_buffers_and_none_means_none() {
    let memory = PAGES * LAYERS * SMALL;
    for (free, is_staged) in [(memory + (20 << 20), true), (memory + (4 << 20), false)] {
        let fake = Fake::new();
        fake.set("free_bytes", &free.to_string());
        let staged = Calibration { staged_below_bytes: 1 << 20, ..Calibration::default() };
        let options = Options { staging_bytes: 48 << 20, ..with(staged) };
        let mut gpu = Gpu::new(fake, Layout::LayerFirst, SMALL, options);
        gpu.there_and_back(5);
        assert_eq!(gpu.fake.calls("cuLaunchKernel") > 0, is_staged, "{:?}", gpu.backend.trouble());
    }
}

#[test]
fn a_stuck_device_ends_nothing_and_holds_nobody_up() {
    let mut gpu = Gpu::new(Fake::new(), Layout::LayerFirst, SMALL, plain());
    gpu.copy(Direction::Store, &[(0, 1)]);
    gpu.compute(2, 77);
    gpu.fake.set("stall", "true");
    let ids = gpu.submit(Direction::Store, &[(1, 2)], None).unwrap();
    let until = Instant::now() + Duration::from_millis(50);
    let mut ended = Vec::new();
    while Instant::now() < until {
        gpu.backend.poll(&mut ended);
    }
    assert!(ended.is_empty());
    gpu.fake.set("stall", "false");
    assert_eq!(gpu.outcomes(&ids), [Outcome::Copied]);
    assert!(gpu.is_in_slot(1, 77));
}
