//! Instances with a GPU, as far as a machine without one can tell: the agent, the loader and the back end
//! are the real ones, the driver is `tests/fake-cuda`.

use std::collections::BTreeMap;

use super::*;
use kvring_fake_cuda::Fake;
use kvring_gpu::agent::{Agent, Finished, Load, Patience, Refused, Store, Watch};
use kvring_gpu::backend::cuda::{CudaBackend, Options};
use kvring_gpu::backend::tensors::Tensors;
use kvring_gpu::layout::{GroupMap, MemoryMap, TensorMap};
use kvring_gpu::plan::Calibration;
use kvring_ipc::instance::random_token;
use rustix::process::Signal;

const LAYERS: usize = 4;
const PAGES: usize = 64;
const PAGE: usize = BLOCK / LAYERS;
const NO_SSD: (&str, &str) = ("ssd_cache_gb", "0");
/// 64 slots.
const SMALL_POOL: (&str, &str) = ("cpu_cache_gb", "0.00390625");

/// An instance: a device, a worker's agent, a scheduler.
struct Gpu {
    fake: Fake,
    address: usize,
    agent: Agent,
    scheduler: Instance,
    next: u64,
}

fn tensor_at(address: usize, layer: usize) -> TensorMap {
    TensorMap {
        address: address + layer * PAGES * PAGE,
        bytes: PAGES * PAGE,
        pages_count: PAGES,
        page_stride_bytes: PAGE,
        shape: vec![PAGE / 2],
        strides_bytes: vec![2],
        element_bytes: 2,
    }
}

fn tensors_at(address: usize) -> Tensors {
    let tensors = (0..LAYERS).map(|layer| tensor_at(address, layer)).collect();
    let groups = vec![GroupMap { pages_per_block: 1, tensors }];
    // SAFETY: the fake's memory lives as long as the fake; stories write to it where nothing is copied.
    #[expect(unsafe_code, reason = "an address is a promise")]
    unsafe { Tensors::new(&MemoryMap { offset_in_slot: 0, groups }) }.unwrap()
}

impl Gpu {
    fn new(config: Config, fake: Fake, calibration: Calibration) -> Self {
        let patience =
            Patience { load: Duration::from_secs(20), store: Duration::from_secs(20), ..Patience::default() };
        Self::with_patience(config, fake, calibration, patience)
    }

    fn with_patience(config: Config, fake: Fake, calibration: Calibration, patience: Patience) -> Self {
        let address = fake.alloc(PAGES * BLOCK);
        let options = Options {
            driver: Some(fake.path().to_path_buf()),
            calibration: Some(calibration),
            registration_bytes: 1 << 20,
            ..Options::default()
        };
        let backend = CudaBackend::new(tensors_at(address), options).unwrap();
        let token = random_token();
        let worker = Instance::open_with_token(config.clone(), layout(), 0, token.clone()).unwrap();
        let agent = Agent::start(worker, backend, patience).unwrap();
        let scheduler = Instance::open_with_token(config, None, 0, token).unwrap();
        Self { fake, address, agent, scheduler, next: 0 }
    }

    /// The bytes of a block, wherever its pages lie.
    fn read(&self, page: usize) -> Vec<u8> {
        let layer = |layer| self.fake.read(self.address + (layer * PAGES + page) * PAGE, PAGE);
        (0..LAYERS).flat_map(layer).collect()
    }

    fn compute(&self, page: usize, key: BlockKey) {
        let mut block = vec![0; BLOCK];
        bytes::fill(key, 0, &mut block);
        for (layer, bytes) in block.chunks(PAGE).enumerate() {
            self.fake.write(self.address + (layer * PAGES + page) * PAGE, bytes);
        }
    }

    fn begin_store(&mut self, keys: &[BlockKey], pages: &[u32]) -> Watch {
        self.next += 1;
        let (parent, pages) = (BlockKey::default(), pages.to_vec());
        let store = Store {
            ticket: self.next,
            parent,
            first: 0,
            keys: keys.to_vec(),
            pages,
            epoch: self.agent.epoch(),
            after: None,
        };
        self.agent.store(store).unwrap()
    }

    /// None: nothing is resident.
    fn begin_load(&mut self, keys: &[BlockKey], pages: &[u32], layer_groups: u32) -> Option<Watch> {
        let matched = self.scheduler.match_prefix(keys);
        let (lease, count) = (matched.lease?, matched.blocks as usize);
        self.next += 1;
        let load = Load {
            ticket: self.next,
            lease: lease.id,
            expires_at_ns: lease.expires_at_ns,
            first: 0,
            keys: keys[..count].to_vec(),
            pages: pages[..count].to_vec(),
            epoch: self.agent.epoch(),
            after: None,
            layer_groups,
        };
        Some(self.agent.load(load).unwrap())
    }

    fn end(&mut self) -> Finished {
        eventually("a ticket ends", || self.agent.wait(Duration::from_millis(100)));
        let mut ended = self.agent.poll();
        assert_eq!(ended.len(), 1, "{ended:?}");
        ended.remove(0)
    }

    fn has(&self, page: u32, key: BlockKey) -> bool {
        bytes::first_difference(key, &self.read(page as usize)).is_none()
    }
}

fn ways() -> [(&'static str, Calibration); 3] {
    let batched = Calibration { is_batched: true, ..Calibration::default() };
    [
        ("batches", batched),
        ("staged", Calibration { staged_below_bytes: 1 << 20, ..batched }),
        ("direct", Calibration { direct_below_bytes: 1 << 30, ..batched }),
    ]
}

#[test]
fn what_one_device_stores_another_loads() {
    let place = Place::new();
    for (name, way) in ways() {
        println!("{name}");
        let keys = chain(name, 40);
        let pages: Vec<u32> = (0..40).map(|at| at * 7 % 64).collect();
        let mut one = Gpu::new(place.config(0, &[]), Fake::new(), way);
        for (key, page) in keys.iter().zip(&pages) {
            one.compute(*page as usize, *key);
        }
        let watch = one.begin_store(&keys, &pages);
        assert_eq!(one.end().missed, [0u32; 0]);
        assert!(watch.is_ended() && !watch.has_missed());
        let mut other = Gpu::new(place.config(1, &[]), Fake::new(), way);
        let elsewhere: Vec<u32> = (0..40).map(|at| 63 - at * 5 % 64).collect();
        other.begin_load(&keys, &elsewhere, 1).expect("it is resident");
        assert_eq!(other.end().missed, [0u32; 0]);
        assert!(keys.iter().zip(&elsewhere).all(|(key, page)| other.has(*page, *key)), "{name}: wrong bytes");
        for gpu in [one, other] {
            assert!(gpu.agent.stop());
            drop(gpu.agent);
            assert_eq!((gpu.fake.crimes(), gpu.fake.pinned_bytes()), (0, 0), "nothing is left pinned");
        }
    }
}

/// What lies behind a smaller pool is given back, and is other memory when the pool grows again: a device that still copied
/// by its first registration would read and write pages that are nobody's.
#[test]
fn a_pool_that_changes_its_size_is_registered_anew() {
    let place = Place::new();
    // Blocks on loan are waited for: nobody here gives a lease back.
    let settings = [NO_SSD, ("lease_ttl_ms", "500")];
    for (name, way) in ways() {
        println!("{name}");
        let mut gpu = Gpu::new(place.config(0, &settings), Fake::new(), way);
        let pages: Vec<u32> = (0..40).collect();
        let elsewhere: Vec<u32> = (0..40).map(|at| 63 - at * 5 % 64).collect();
        for (round, gb) in ["0.0078125", "0.03125", "0.015625"].into_iter().enumerate() {
            let chains: Vec<_> = (0..8).map(|n| chain(&format!("{name} {round} {n}"), 40)).collect();
            let come = |gpu: &mut Gpu, keys: &[BlockKey]| {
                if gpu.begin_load(keys, &elsewhere, 1).is_none() {
                    return false;
                }
                let missed = gpu.end().missed;
                for (at, (key, page)) in keys.iter().zip(&elsewhere).enumerate() {
                    assert!(missed.contains(&(at as u32)) || gpu.has(*page, *key), "{name}, {gb}: wrong bytes");
                }
                missed.is_empty()
            };
            for keys in &chains {
                keys.iter().zip(&pages).for_each(|(key, page)| gpu.compute(*page as usize, *key));
                gpu.begin_store(keys, &pages);
                gpu.end();
            }
            eventually("the last is there", || come(&mut gpu, &chains[7]));
            let output = place.kvring(&["resize", "--dram", gb]).output().unwrap();
            assert!(output.status.success(), "{}", text(&output));
            eventually("and after it", || come(&mut gpu, &chains[7]));
        }
        assert!(gpu.agent.stop());
        drop(gpu.agent);
        assert_eq!((gpu.fake.crimes(), gpu.fake.pinned_bytes()), (0, 0), "nothing is left pinned");
    }
}

#[test]
fn every_way_is_checked_and_measured_by_the_benchmark() {
    let place = Place::new();
    // A program of its own loads the library by its path.
    let fake = Fake::new();
    let driver = fake.path().to_str().unwrap();
    let common =
        ["bench", "copy", "--json", "--seconds", "0.05", "--rounds", "1", "--size-mb", "4", "--shape", "70B TP8"];
    for (device, rows) in [(vec![], 2 * 4 * 2), (vec!["--device", "0", "--cuda-driver", driver], 2 * 8 * 3)] {
        let output = place.kvring(&[&common[..], &device].concat()).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let copies = report["copies"].as_array().unwrap();
        assert_eq!(copies.len(), rows, "two shapes, each way and direction");
        assert!(copies.iter().all(|row| row["gb_s"].as_f64().unwrap() > 0.0), "{report}");
    }
    let output =
        place.kvring(&["bench", "copy", "--device", "0", "--cuda-driver", "/no/libcuda.so.1"]).output().unwrap();
    assert!(!output.status.success() && text(&output).contains("install the NVIDIA driver"), "{}", text(&output));
}

/// What `kvring selftest` says of each of these cases: how it ended, and why if not well.
fn selftest(arguments: &[&str], behaviour: &str) -> (bool, BTreeMap<String, (String, String)>) {
    let place = Place::new();
    let mut command = place.kvring(&["selftest", "--size-mb", "1"]);
    let output = command.args(arguments).env("KVRING_FAKE_CUDA", behaviour).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let case = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let word = |name: &str| line[name].as_str().unwrap_or_default().to_string();
        (word("case"), (word("end"), word("why")))
    };
    (output.status.success(), lines.lines().map(case).collect())
}

#[test]
fn the_selftest_passes_what_is_right_and_goes_on_after_what_hangs() {
    let (well, cases) = selftest(&["--only", "as shipped", "--only", "two processes", "--without", "2 threads"], "");
    assert!(well && cases.values().all(|(end, _)| end == "passed"), "{cases:?}");
    assert_eq!(cases.len(), 2 + 7, "{cases:?}");

    let fake = Fake::new();
    let over = ["--device", "0", "--cuda-driver", fake.path().to_str().unwrap()];
    let with = |more: &[&'static str], behaviour: &str| selftest(&[&over[..], more].concat(), behaviour);
    let parts = ["probe", "right: staged", "fifty", "two", "fault", "completion", "pinning", "speed: 18 KiB"];
    let parts: Vec<&str> = parts.iter().flat_map(|part| ["--only", part]).collect();
    let (well, cases) = with(&parts, "");
    assert!(well && cases.values().all(|(end, _)| end == "passed"), "{cases:?}");
    assert_eq!(cases.len(), 10 + 8, "{cases:?}");

    let (well, cases) = with(&["--only", "killed"], "dma_process=true,linger_ms=6000,slice_us=200");
    let (end, why) = &cases["fault: killed while it stores"];
    assert!(!well && end == "failed" && why.contains("set writer_grace_ms above"), "{cases:?}");

    let (well, cases) = with(&["--only", "right: batches"], "fail=cuMemcpyBatchAsync:3:700");
    let (end, why) = &cases["right: batches"];
    assert!(!well && end == "failed" && why.contains("700 (illegal address)"), "{cases:?}");

    let (well, cases) = with(&["--only", "pro", "--limit", "2"], "stall=true");
    assert!(!well, "{cases:?}");
    assert_eq!(cases["probe"].0, "hung", "{cases:?}");
    assert_eq!(cases["right: two processes, one pool"].0, "hung", "it goes on: {cases:?}");
    let children = || processes_of(fake.path().parent().unwrap());
    eventually("nothing is left of them", || children().is_empty());
}

#[test]
fn layers_come_in_groups_and_each_is_there_when_it_is_said_to_be() {
    let place = Place::new();
    let keys = chain("layers", 10);
    let pages: Vec<u32> = (0..10).collect();
    let mut gpu =
        Gpu::new(place.config(0, &[]), Fake::new(), Calibration { is_batched: true, ..Calibration::default() });
    for (key, page) in keys.iter().zip(&pages) {
        gpu.compute(*page as usize, *key);
    }
    gpu.begin_store(&keys, &pages);
    assert_eq!(gpu.end().missed, [0u32; 0]);
    gpu.fake.set("slice_us", "1000").set("slice_bytes", &PAGE.to_string());
    let elsewhere: Vec<u32> = (20..30).collect();
    let watch = gpu.begin_load(&keys, &elsewhere, 4).expect("it is resident");
    let mut seen = Vec::new();
    let expected = |key: BlockKey| {
        let mut block = vec![0; BLOCK];
        bytes::fill(key, 0, &mut block);
        block
    };
    eventually("all groups come", || {
        let groups = watch.groups_done() as usize;
        for (key, page) in keys.iter().zip(&elsewhere) {
            let there = groups * PAGE;
            assert!(gpu.read(*page as usize)[..there] == expected(*key)[..there], "group {groups} is not there");
        }
        if seen.last() != Some(&groups) {
            seen.push(groups);
        }
        groups == 4
    });
    println!("groups seen: {seen:?}");
    assert!(seen.len() > 2, "one after the other");
    assert_eq!(gpu.end().missed, [0u32; 0]);
    // A block that is not there: no group is whole, and the end says which block it is.
    let mut longer = keys.clone();
    longer.extend(chain("elsewhere", 1));
    let matched = gpu.scheduler.match_prefix(&keys);
    let lease = matched.lease.unwrap();
    let load = Load {
        ticket: 99,
        lease: lease.id,
        expires_at_ns: lease.expires_at_ns,
        first: 0,
        keys: longer,
        pages: (40..51).collect(),
        epoch: 0,
        after: None,
        layer_groups: 2,
    };
    let watch = gpu.agent.load(load).unwrap();
    let ended = gpu.end();
    assert!(ended.missed.contains(&10) && watch.has_missed() && watch.groups_done() == 0, "{ended:?}");
}

#[test]
fn what_is_ready_does_not_wait_for_what_is_being_pinned() {
    let place = Place::new();
    let (near, far) = (chain("near", 10), chain("far", 40));
    let batched = Calibration { is_batched: true, ..Calibration::default() };
    let mut one = Gpu::new(place.config(0, &[NO_SSD, SMALL_POOL]), Fake::new(), batched);
    for keys in [&near, &far] {
        keys.iter().zip(0..).for_each(|(key, page)| one.compute(page, *key));
        one.begin_store(keys, &(0..keys.len() as u32).collect::<Vec<_>>());
        assert_eq!(one.end().missed, [0u32; 0]);
    }
    let mut other = Gpu::new(place.config(1, &[NO_SSD, SMALL_POOL]), Fake::new(), batched);
    let low: Vec<u32> = (0..10).collect();
    other.begin_load(&near, &low, 1).expect("resident");
    assert_eq!(other.end().missed, [0u32; 0]);
    // 16 slots a piece: of these forty most lie in others.
    other.fake.set("register_ms", "1500");
    let far_watch = other.begin_load(&far, &(20..60).collect::<Vec<_>>(), 1).expect("resident");
    other.begin_load(&near, &(10..20).collect::<Vec<_>>(), 1).expect("resident");
    let ended = other.end();
    assert_eq!((ended.ticket, ended.missed), (3, vec![]), "the one that is ready");
    assert!(!far_watch.is_ended() && near.iter().zip(10..).all(|(key, page)| other.has(page, *key)));
    assert_eq!(other.end().missed, [0u32; 0]);
    assert!(far.iter().zip(20..).all(|(key, page)| other.has(page, *key)));
}

#[test]
fn a_ticket_that_is_cancelled_ends_when_the_device_has_let_go_of_its_pages() {
    let place = Place::new();
    let keys = chain("cancelled", 16);
    let pages: Vec<u32> = (0..16).collect();
    let mut gpu = Gpu::new(place.config(0, &[NO_SSD, SMALL_POOL]), Fake::new(), Calibration::default());
    for (key, page) in keys.iter().zip(&pages) {
        gpu.compute(*page as usize, *key);
    }
    // Pinned, so that all of it is handed over at once.
    gpu.begin_store(&chain("first", 16), &pages);
    gpu.end();
    gpu.fake.set("stall", "true");
    let calls = gpu.fake.calls("cuMemcpyDtoHAsync");
    let watch = gpu.begin_store(&keys, &pages);
    eventually("it is handed over", || gpu.fake.calls("cuMemcpyDtoHAsync") > calls);
    gpu.agent.cancel(&[gpu.next]);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!watch.is_ended(), "its pages are still read");
    gpu.fake.set("stall", "false");
    gpu.end();
    // What had been copied is committed, and is right.
    let elsewhere: Vec<u32> = (20..36).collect();
    if gpu.begin_load(&keys, &elsewhere, 1).is_some() {
        let missed = gpu.end().missed;
        let is_right = |at: u32| missed.contains(&at) || gpu.has(elsewhere[at as usize], keys[at as usize]);
        assert!((0..16 - missed.len() as u32).all(is_right), "{missed:?}");
    }
    // A load likewise: what was written into its pages is not taken back by its end.
    gpu.begin_store(&keys, &pages);
    gpu.end();
    gpu.fake.set("stall", "true");
    let calls = gpu.fake.calls("cuMemcpyHtoDAsync");
    let watch = gpu.begin_load(&keys, &elsewhere, 1).expect("resident");
    eventually("it is handed over", || gpu.fake.calls("cuMemcpyHtoDAsync") > calls);
    gpu.agent.cancel(&[gpu.next]);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!watch.is_ended(), "its pages are still written");
    gpu.fake.set("stall", "false");
    gpu.end();
    assert!(gpu.agent.stop());
    assert_eq!(gpu.fake.crimes(), 0);
}

#[test]
fn a_fence_is_bounded_and_what_is_read_after_it_is_stored_nowhere() {
    let place = Place::new();
    let keys = chain("fence", 10);
    let pages: Vec<u32> = (0..10).collect();
    let mut other = place.agent(1, &[NO_SSD, SMALL_POOL]);
    let mut gpu = Gpu::new(place.config(0, &[NO_SSD, SMALL_POOL]), Fake::new(), Calibration::default());
    gpu.begin_store(&chain("first", 10), &pages);
    gpu.end();
    for (key, page) in keys.iter().zip(&pages) {
        gpu.compute(*page as usize, *key);
    }
    gpu.fake.set("stall", "true");
    let calls = gpu.fake.calls("cuMemcpyDtoHAsync");
    let watch = gpu.begin_store(&keys, &pages);
    eventually("it is handed over", || gpu.fake.calls("cuMemcpyDtoHAsync") > calls);
    let began = Instant::now();
    assert!(!gpu.agent.fence(&[gpu.next], Duration::from_millis(50)), "not in time");
    assert!(began.elapsed() < Duration::from_secs(5), "and bounded: {:?}", began.elapsed());
    assert!(!watch.is_ended(), "the device may read yet");
    // The engine does what it was told that it may: other blocks lie there now, and the device reads those.
    for (key, page) in chain("others", 10).iter().zip(&pages) {
        gpu.compute(*page as usize, *key);
    }
    gpu.fake.set("stall", "false");
    assert_eq!(gpu.end().missed.len(), 10, "nothing of it is stored");
    assert_eq!(load(&mut other, &keys), 0);
    eventually("no slot is kept", || {
        ["host_slots_filling_count", "host_slots_quarantined_count"].iter().all(|name| place.metric(name) == 0)
    });
    // The name is free again, and so is the device.
    gpu.begin_store(&chain("others", 10), &pages);
    assert_eq!(gpu.end().missed, [0u32; 0]);
    assert_eq!(load(&mut other, &chain("others", 10)), 10, "byte by byte");
    assert_eq!(gpu.fake.crimes(), 0);
}

#[test]
fn a_device_that_is_stuck_at_the_end_keeps_what_it_may_still_touch() {
    let place = Place::new();
    let keys = chain("stuck", 10);
    let pages: Vec<u32> = (0..10).collect();
    let mut survivor = place.agent(1, &[NO_SSD, SMALL_POOL]);
    let config = place.config(0, &[NO_SSD, SMALL_POOL]);
    let patience = Patience { drain: Duration::from_millis(300), ..Patience::default() };
    let mut gpu = Gpu::with_patience(config, Fake::new(), Calibration::default(), patience);
    gpu.begin_store(&chain("first", 10), &pages);
    gpu.end();
    gpu.fake.set("stall", "true");
    let calls = gpu.fake.calls("cuMemcpyDtoHAsync");
    let watch = gpu.begin_store(&keys, &pages);
    eventually("it is handed over", || gpu.fake.calls("cuMemcpyDtoHAsync") > calls);
    let (pinned, began) = (gpu.fake.pinned_bytes(), Instant::now());
    assert!(!gpu.agent.stop(), "whoever stops it is told that copies are in flight");
    assert!(began.elapsed() < Duration::from_secs(5), "in time: {:?}", began.elapsed());
    assert!(!watch.is_ended(), "nobody is told that pages are free which are still read");
    let frees = ["cuMemHostUnregister", "cuMemFree", "cuStreamDestroy"].map(|name| gpu.fake.calls(name));
    assert_eq!(frees, [0; 3], "nothing goes");
    // More may be pinned: another piece was on its way.
    assert!(gpu.fake.pinned_bytes() >= pinned);
    eventually("its slots are kept", || place.metric("host_slots_quarantined_count") >= 1);
    // The device comes back too late: it writes where nobody else is.
    let others = chain("others", 40);
    store(&mut survivor, &others);
    gpu.fake.set("stall", "false");
    std::thread::sleep(Duration::from_millis(100));
    load(&mut survivor, &others);
    drop(gpu.agent);
    assert_eq!(gpu.fake.crimes(), 0);
}

#[test]
fn memory_that_sleeps_is_not_touched_and_wakes_with_the_session() {
    let place = Place::new();
    let keys = chain("sleep", 8);
    let pages: Vec<u32> = (0..8).collect();
    let way = Calibration { staged_below_bytes: 1 << 20, ..Calibration::default() };
    let mut gpu = Gpu::new(place.config(0, &[]), Fake::new(), way);
    for (key, page) in keys.iter().zip(&pages) {
        gpu.compute(*page as usize, *key);
    }
    gpu.begin_store(&keys, &pages);
    assert_eq!(gpu.end().missed, [0u32; 0]);
    // Asleep in the middle of a load: what is in flight ends first.
    gpu.fake.set("slice_us", "500").set("slice_bytes", "4096");
    gpu.begin_load(&keys, &[20, 21, 22, 23, 24, 25, 26, 27], 1).expect("resident");
    let pinned = gpu.fake.pinned_bytes();
    assert!(gpu.agent.suspend(Duration::from_secs(20)), "it comes to rest");
    gpu.fake.free(gpu.address);
    assert_eq!(gpu.fake.crimes(), 0, "nothing was under way");
    gpu.end();
    let stale = |agent: &Agent, epoch| {
        let keys = keys[..1].to_vec();
        let parent = BlockKey::default();
        agent.store(Store { ticket: 50, parent, first: 0, keys, pages: vec![0], epoch, after: None }).map(drop)
    };
    assert_eq!(stale(&gpu.agent, 0), Err(Refused::Stale { said: 0, is: 1, asleep: true }));
    gpu.address = gpu.fake.alloc(PAGES * BLOCK);
    // Not as something else.
    let one = GroupMap { pages_per_block: 1, tensors: vec![tensor_at(gpu.address, 0)] };
    // SAFETY: as in `tensors_at`.
    #[expect(unsafe_code, reason = "an address is a promise")]
    let one = unsafe { Tensors::new(&MemoryMap { offset_in_slot: 0, groups: vec![one] }) }.unwrap();
    assert!(gpu.agent.resume(one).unwrap_err().contains("other tensors"));
    assert_eq!(gpu.agent.resume(tensors_at(gpu.address)), Ok(1));
    assert_eq!(stale(&gpu.agent, 0), Err(Refused::Stale { said: 0, is: 1, asleep: false }), "pages of another time");
    assert!(gpu.agent.resume(tensors_at(gpu.address)).unwrap_err().contains("suspend first"));
    gpu.begin_load(&keys, &pages, 1).expect("the cache is still there");
    assert_eq!(gpu.end().missed, [0u32; 0]);
    assert!(keys.iter().zip(&pages).all(|(key, page)| gpu.has(*page, *key)));
    assert!(gpu.fake.pinned_bytes() >= pinned, "what was pinned stays pinned");
    assert_eq!(gpu.agent.counters().read().iter().find(|(name, _)| *name == "sessions"), Some(&("sessions", 1)));
}

#[test]
fn wrong_pages_are_refused_before_anything_is_copied() {
    let place = Place::new();
    let gpu = Gpu::new(place.config(0, &[]), Fake::new(), Calibration::default());
    let keys = chain("a", 2);
    let store = |pages: Vec<u32>, first| {
        let store =
            Store { ticket: 1, parent: BlockKey::default(), first, keys: keys.clone(), pages, epoch: 0, after: None };
        gpu.agent.store(store).map(drop).unwrap_err().to_string()
    };
    assert!(store(vec![0, PAGES as u32], 0).contains("64 among them"));
    assert!(store(vec![0], 0).contains("1 pages for 2 keys"));
    assert!(store(vec![0, kvring_gpu::layout::NO_PAGE], 0).contains("stored whole"));
    assert!(store(vec![0, 1], 8191).contains("at most 8192"));
    assert_eq!(gpu.fake.calls("cuMemcpyDtoHAsync"), 0);
}

#[test]
fn a_device_that_is_lost_ends_every_ticket_and_keeps_its_slots_until_its_process_is_gone() {
    let place = Place::new();
    let mut survivor = place.agent(0, &[NO_SSD, SMALL_POOL]);
    let keys = chain("lost", 10);
    let pages: Vec<u32> = (0..10).collect();
    let mut gpu = Gpu::new(place.config(1, &[NO_SSD, SMALL_POOL]), Fake::new(), Calibration::default());
    gpu.fake.set("slice_us", "5000").set("slice_bytes", "4096");
    gpu.begin_store(&keys, &pages);
    eventually("copies are under way", || gpu.fake.calls("cuMemcpyDtoHAsync") > 4);
    gpu.fake.set("fail", "cuStreamQuery:0:700");
    let ended = gpu.end();
    assert!(!ended.missed.is_empty());
    let trouble = || gpu.agent.trouble();
    eventually("it is told", || trouble().iter().any(|note| note.contains("700") && note.contains("restart")));
    // Loads and stores end at once, as without a server.
    gpu.begin_store(&chain("more", 1), &[20]);
    assert_eq!(gpu.end().missed, [0]);
    // Nobody else gets what may still be written to, however much is asked for: 64 slots less ten.
    for name in ["b", "c", "d"] {
        let keys = chain(name, 60);
        assert!(store(&mut survivor, &keys) <= 54);
        load(&mut survivor, &keys);
    }
    assert!(!gpu.agent.stop(), "and whoever stops it is told that nobody can tell");
    // Nor is the server told that nothing writes any more: they stay until this process is dead.
    let slots_kept = || place.metric("host_slots_quarantined_count");
    eventually("what it was filling is kept", || slots_kept() == 10);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(slots_kept(), 10);
    let keys = chain("e", 64);
    assert!(store(&mut survivor, &keys) <= 54);
}

/// Plays a worker whose device copies slowly and goes on after its death.
#[test]
#[ignore = "played in a process of its own"]
fn a_writer() {
    let Some((dir, instance_id, seed)) = role() else { return };
    let fake = Fake::new();
    fake.set("dma_process", "true").set("linger_ms", "1200").set("slice_us", "10000").set("slice_bytes", "4096");
    let config = config_in(&dir, instance_id, &[NO_SSD, SMALL_POOL]);
    let mut gpu = Gpu::new(config, fake, Calibration::default());
    let keys = chain(&format!("dead {seed}"), 16);
    gpu.begin_store(&keys, &(0..16).collect::<Vec<u32>>());
    eventually("its device copies", || gpu.fake.calls("cuMemcpyDtoHAsync") > 8);
    println!("copying");
    std::thread::sleep(Duration::from_secs(60));
}

/// Kills a worker whose device goes on for 1.2 s; says how many blocks of others were wrong after that.
fn wrong_after_a_death(grace_ms: &str) -> usize {
    let place = Place::new();
    let mut survivor = place.agent(0, &[NO_SSD, SMALL_POOL, ("writer_grace_ms", grace_ms)]);
    let mut writer = place.actor("cuda::a_writer", 1, 7);
    let mut output = std::io::BufReader::new(writer.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("copying") {
        line.clear();
        let read = std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        assert!(read > 0, "the writer has ended early");
    }
    std::thread::sleep(Duration::from_millis(100));
    writer.kill().unwrap();
    writer.wait().unwrap();
    let died = Instant::now();
    if grace_ms != "0" {
        eventually("its slots are kept", || place.metric("host_slots_quarantined_count") >= 16);
    }
    // Every slot there is, again and again, as long as the dead one's device writes.
    let mut wrong = 0;
    while died.elapsed() < Duration::from_millis(1500) {
        let keys = chain(&format!("{:?}", died.elapsed()), 64);
        let stored = store(&mut survivor, &keys);
        assert!(stored >= 40, "{stored} of 64 slots");
        std::thread::sleep(Duration::from_millis(50));
        let matched = survivor.match_prefix(&keys);
        let Some(lease) = matched.lease else { continue };
        let count = matched.blocks as usize;
        let blocks: Vec<usize> = (0..count).collect();
        let wait = Duration::from_secs(10);
        survivor.load(lease, 0, &keys[..count], &blocks, wait, |memory, index| {
            let difference = bytes::first_difference(keys[index], memory.block(index));
            if let Some(at) = difference {
                println!(
                    "{:?}: block {index} is wrong at {at}, quarantined {}",
                    died.elapsed(),
                    place.metric("host_slots_quarantined_count")
                );
            }
            wrong += usize::from(difference.is_some());
        });
        survivor.instance().release(lease);
    }
    eventually("every slot comes back", || place.metric("host_slots_quarantined_count") == 0);
    let keys = chain("at last", 64);
    eventually("and is used", || store(&mut survivor, &keys) + survivor.match_prefix(&keys).blocks >= 64);
    wrong
}

#[test]
fn a_device_that_writes_on_after_its_client_was_killed_writes_into_nobody_s_block() {
    assert_eq!(wrong_after_a_death("2000"), 0, "the grace outlasts the device");
}

#[test]
fn without_the_grace_it_would() {
    assert!(wrong_after_a_death("0") > 0, "or the story above shows nothing");
}

#[test]
fn a_server_that_dies_under_a_copy_waits_for_the_device_before_it_gives_slots_away() {
    let place = Place::new();
    let mut survivor = place.agent(0, &[NO_SSD, SMALL_POOL]);
    let keys = chain("under way", 16);
    let pages: Vec<u32> = (0..16).collect();
    let mut gpu = Gpu::new(place.config(1, &[NO_SSD, SMALL_POOL]), Fake::new(), Calibration::default());
    gpu.fake.set("slice_us", "10000").set("slice_bytes", "4096");
    gpu.begin_store(&keys, &pages);
    eventually("copies are under way", || gpu.fake.calls("cuMemcpyDtoHAsync") > 4);
    std::thread::sleep(Duration::from_millis(50));
    signal(place.server_pid(), Signal::KILL);
    let mut rounds = 0;
    // The device needs 2.5 s for its 64 pages: until then their slots are nobody's.
    eventually("the store has ended", || {
        let keys = chain(&format!("round {rounds}"), 40);
        store(&mut survivor, &keys);
        load(&mut survivor, &keys);
        rounds += 1;
        gpu.agent.wait(Duration::ZERO)
    });
    println!("{rounds} rounds of others' blocks, each byte compared");
    assert!(!gpu.end().missed.is_empty(), "what a lost session had reserved is dropped");
    eventually("every slot comes back", || place.metric("host_slots_quarantined_count") == 0);
    gpu.fake.set("slice_us", "0");
    gpu.begin_store(&keys, &pages);
    assert_eq!(gpu.end().missed, [0u32; 0], "and the worker stores again");
}
