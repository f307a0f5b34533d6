//! Instances come, go, crash and come back in any order; so does the server.

use super::*;
use kvring_ipc::client::ConnectError;
use kvring_ipc::events::Event;
use kvring_ipc::instance::Reserved;
use rustix::process::Signal;

#[test]
fn instance_zero_starts_the_server_and_all_share_one_cache() {
    let place = Place::new();
    let keys = chain("a", 20);
    let mut first = place.agent(0, &[]);
    assert!(first.instance().is_connected(), "see {}", place.path("s.log").display());
    assert_eq!(store(&mut first, &keys), 20);
    let mut second = place.agent(1, &[]);
    assert_eq!(load(&mut second, &keys), 20, "what one stored the other loads");
    assert_eq!(store(&mut second, &keys), 0, "and does not store again");

    // The server is nobody's child: it outlives the instance that started it.
    let pid = place.server_pid();
    drop(first);
    eventually("instance 0 has left", || place.metric("sessions_count") == 1);
    assert_eq!((load(&mut second, &keys), place.server_pid()), (20, pid));
    let mut again = place.agent(0, &[]);
    assert_eq!((load(&mut again, &keys), place.server_pid()), (20, pid), "it joins again");
}

#[test]
fn the_others_wait_a_bounded_time_and_find_the_server_when_it_comes() {
    let place = Place::new();
    let started = Instant::now();
    let mut early = place.agent(1, &[("start_wait_ms", "200")]);
    assert!(started.elapsed() < Duration::from_secs(5) && !early.instance().is_connected());
    assert_eq!(load(&mut early, &chain("a", 5)), 0, "without a server everything is a miss");
    let mut zero = place.agent(0, &[]);
    assert_eq!(store(&mut zero, &chain("a", 5)), 5);
    eventually("the early one has found it", || load(&mut early, &chain("a", 5)) == 5);
}

#[test]
fn in_external_mode_nobody_starts_a_server() {
    let mut place = Place::new();
    let external = [("server_launch_mode", "external"), ("start_wait_ms", "300")];
    let mut agent = place.agent(0, &external);
    assert!(!agent.instance().is_connected() && place.stats().is_none());
    place.serve(&[]);
    eventually("it connects by itself", || {
        store(&mut agent, &chain("a", 3)) == 3 || load(&mut agent, &chain("a", 3)) == 3
    });
}

#[test]
fn a_killed_server_is_started_again_by_one_winner_and_the_ssd_is_warm() {
    let place = Place::new();
    let keys = chain("a", 20);
    let mut agents: Vec<_> = (0..3).map(|id| place.agent(id, &[])).collect();
    store(&mut agents[0], &keys);
    eventually("the blocks and their headers are written", || {
        place.metric("ssd_write_bytes") == 20 * BLOCK as u64 && place.metric("ssd_header_writes_count") > 0
    });
    std::thread::sleep(Duration::from_millis(50));
    let pid = place.server_pid();
    place.kill_all();
    for agent in &mut agents {
        let started = Instant::now();
        load(agent, &keys);
        assert!(started.elapsed() < Duration::from_secs(20), "bounded, whatever happens");
    }
    for agent in &mut agents {
        eventually("every instance is served again", || load(agent, &keys) == 20);
        assert!(agent.instance().sessions_count() >= 2);
    }
    assert_ne!(place.server_pid(), pid);
    assert_eq!(place.metric("sessions_count"), 3, "all by one server");
    assert_eq!(place.metric("ssd_recovered_blocks_count"), 20);
}

#[test]
fn a_killed_instance_leaves_nothing_and_nobody_notices() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let spec =
        format!(r#"{{"trace":null,"seed":1,"requests":100000,"index":0,"of":1,"block_bytes":{BLOCK},"speed":0.0}}"#);
    let mut other = place.agent(1, &[]);
    let keys = chain("other", 10);
    store(&mut other, &keys);
    for _ in 0..5 {
        let mut victim = place
            .kvring(&["replay-instance", "--spec", &spec])
            .env("KVRING_INSTANCE_ID", "2")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the victim is at work", || place.metric("sessions_count") == 2);
        std::thread::sleep(Duration::from_millis(30));
        victim.kill().unwrap();
        victim.wait().unwrap();
        eventually("its session is gone", || place.metric("sessions_count") == 1);
        eventually("and its leases and slots", || {
            place.metric("leases_count") == 0 && place.metric("host_slots_quarantined_count") == 0
        });
        // The other one's blocks may have been evicted; it is served all the same.
        store(&mut other, &keys);
        assert_eq!(load(&mut other, &keys), 10);
    }
}

#[test]
fn a_stopped_server_costs_a_bounded_wait_and_is_forgiven() {
    let mut place = Place::new();
    let pid = place.serve(&["--block-kib", "64"]);
    let mut agent = place.agent(0, &[("client_wait_ms", "20")]);
    let keys = chain("a", 5);
    eventually("stored", || store(&mut agent, &keys) == 5 || load(&mut agent, &keys) == 5);
    halt(pid);
    let started = Instant::now();
    for _ in 0..50 {
        assert_eq!(agent.match_prefix(&keys).blocks, 0);
    }
    let elapsed = started.elapsed();
    signal(pid, Signal::CONT);
    // One wait of 20 ms; while answers are owed, nobody waits again.
    assert!(elapsed < Duration::from_secs(2), "{elapsed:?}");
    eventually("it answers again", || load(&mut agent, &keys) == 5);
    eventually("and the lease that came too late was given back", || place.metric("leases_count") == 0);
}

#[test]
fn a_server_that_takes_its_time_to_die_is_waited_for() {
    let mut place = Place::new();
    let engine = place.serve(&["--block-kib", "64"]);
    let keys = chain("a", 5);
    let mut agent = place.agent(0, &[]);
    eventually("stored", || store(&mut agent, &keys) == 5 || load(&mut agent, &keys) == 5);
    // Its keeper is dead, and it answers nothing any more: so is a process that the kernel is about to end.
    halt(engine);
    signal(place.children[0].id(), Signal::KILL);
    place.children[0].wait().unwrap();
    let arguments = ["serve", "--block-kib", "64"];
    let next = place.kvring(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    place.children.push(next);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(place.children[1].try_wait().unwrap().is_none(), "it does not give up");
    signal(engine, Signal::KILL);
    place.wait_for_server();
    assert_ne!(place.server_pid(), engine);
    eventually("served by the next", || store(&mut agent, &keys) == 5 || load(&mut agent, &keys) == 5);
}

#[test]
fn another_configuration_is_refused_with_both_values_and_nobody_else_notices() {
    let mut place = Place::new();
    place.serve(&[]);
    let mut first = place.agent(0, &[]);
    store(&mut first, &chain("a", 5));
    let other = Layout { tokens_per_block: 16, dtype: "fp8".into(), ..layout() };
    let Err(error) = Instance::open(place.config(1, &[]), other, 0) else { panic!("it was accepted") };
    assert!(matches!(error, ConnectError::Refused { .. }));
    let text = error.to_string();
    assert!(text.contains("dtype: the server has \"u8\", this instance \"fp8\""), "{text}");
    assert!(text.contains("tokens_per_block: the server has 1, this instance 16"), "{text}");
    let Err(error) = Instance::open(place.config(0, &[("start_wait_ms", "300")]), layout(), 0) else {
        panic!("two instances with one id")
    };
    assert!(error.to_string().contains("instance_id = 0 is in use by process"), "{error}");
    assert_eq!(load(&mut first, &chain("a", 5)), 5);
    assert_eq!(first.instance().sessions_count(), 1);
}

#[test]
fn ranks_share_a_slot_and_a_block_is_seen_when_all_have_committed() {
    let mut place = Place::new();
    place.serve(&[]);
    let tp2 = Layout { tp_size: 2, ..layout() };
    let token = kvring_ipc::instance::random_token();
    let rank = |rank| Instance::open_with_token(place.config(0, &[]), tp2.clone(), rank, token.clone()).unwrap();
    let mut ranks = [rank(0), rank(1)];
    let keys = chain("tp", 4);
    let mut grants = Vec::new();
    for rank in &mut ranks {
        let reserved = rank.reserve(BlockKey::default(), 0, &keys);
        grants.push(
            reserved
                .into_iter()
                .map(|r| match r {
                    kvring_ipc::instance::Reserved::Slot(g) => g,
                    r => panic!("{r:?}"),
                })
                .collect::<Vec<_>>(),
        );
    }
    let slots = |held: &[kvring_ipc::instance::HeldSlot]| held.iter().map(|slot| slot.grant).collect::<Vec<_>>();
    assert_eq!(slots(&grants[0]), slots(&grants[1]), "one slot, all ranks");
    assert_eq!(ranks[0].commit(&grants[0]), 4);
    assert_eq!(ranks[1].match_prefix(&keys).blocks, 0);
    assert_eq!(ranks[1].commit(&grants[1]), 4);
    let matched = ranks[0].match_prefix(&keys);
    assert_eq!(matched.blocks, 4);
    // The lease that one session was granted serves the instance's other session.
    let loaded = ranks[1].load(matched.lease.unwrap(), 0, &keys, Duration::from_secs(5), |_| {});
    assert_eq!(loaded.blocks_missed, 0);
}

#[test]
fn stop_is_polite_and_leaves_no_socket() {
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let mut agent = place.agent(1, &[("server_launch_mode", "external")]);
    store(&mut agent, &chain("a", 8));
    let output = place.kvring(&["stop"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(!exists(&place.socket()));
    assert_eq!(load(&mut agent, &chain("a", 8)), 0);
    // What was dirty was written before it went.
    place.serve(&["--block-kib", "64", "--io-engine", "aio"]);
    eventually("and is found again, by another engine", || load(&mut agent, &chain("a", 8)) == 8);
}

#[test]
fn a_rude_control_connection_costs_only_itself() {
    use kvring_ipc::handshake::{Attach, Channel};
    let mut place = Place::new();
    place.serve(&["--block-kib", "64"]);
    let rude = Channel::connect(&place.socket(), Duration::from_millis(200)).unwrap();
    let attach = |token: &str| {
        Request::Attach(Attach {
            protocol: kvring_ipc::wire::PROTOCOL_VERSION,
            instance_id: 3,
            instance_token: token.into(),
            rank: 0,
            layout: Some(layout()),
        })
    };
    rude.send(&attach("a"), &[]).unwrap();
    eventually("it is attached", || place.metric("sessions_count") == 1);
    // Questions without end, and never an ear for the answers.
    for _ in 0..500 {
        let _ = rude.send(&Request::Stats, &[]);
    }
    let mut other = place.agent(1, &[]);
    assert_eq!(store(&mut other, &chain("a", 5)), 5, "the control plane answers others");
    // A second session on one connection is none, and costs the first.
    rude.send(&attach("a"), &[]).unwrap();
    eventually("the rude one is suspect", || place.metric("sessions_count") == 2);
    drop(rude);
    assert_eq!(load(&mut other, &chain("a", 5)), 5);
    assert!(place.kvring(&["stat"]).output().unwrap().status.success());
}

#[test]
fn a_reset_forgets_for_everybody_and_for_the_next_server_and_is_heard_of() {
    let place = Place::new();
    let keys = chain("a", 20);
    let (mut first, mut second) = (place.agent(0, &[]), place.agent(1, &[]));
    assert_eq!(store(&mut first, &keys), 20);
    let told = second.instance().events(1000);
    assert_eq!((told.events.len(), told.lost), (20, false), "everybody hears of what one stores");
    assert!(keys.iter().all(|key| told.events.contains(&Event::Stored(*key))));
    eventually("headers are written", || place.metric("ssd_header_writes_count") > 0);
    std::thread::sleep(Duration::from_millis(100));

    assert_eq!(second.instance().reset(), Ok(20));
    assert_eq!(load(&mut first, &keys), 0);
    let told = first.instance().events(1000);
    let removed = told.events.iter().filter(|event| matches!(event, Event::Removed(_))).count();
    assert_eq!((told.events.len(), removed), (40, 20), "its own stores, and the reset of another");

    signal(place.server_pid(), Signal::KILL);
    eventually("a new server serves", || store(&mut first, &chain("b", 3)) > 0);
    assert_eq!(load(&mut first, &keys), 0, "nor does a restart bring them back");
    assert!(first.instance().events(1000).lost, "another server's log tells another story");
}

#[test]
fn a_session_without_a_layout_matches_and_moves_nothing() {
    let place = Place::new();
    let keys = chain("a", 4);
    let external = [("server_launch_mode", "external"), ("start_wait_ms", "50")];
    let mut scheduler = Instance::open(place.config(1, &external), None, 0).unwrap();
    assert!(!scheduler.is_connected(), "who does not know the layout starts no server");
    let mut worker = place.agent(0, &[]);
    assert_eq!(store(&mut worker, &keys), 4);
    eventually("the scheduler has found the server", || scheduler.session().is_some());
    assert_eq!(scheduler.match_prefix(&keys).blocks, 4);
    assert_eq!(scheduler.reserve(BlockKey::default(), 0, &chain("b", 2)), [Reserved::Dropped; 2]);
}

#[test]
fn a_reset_before_anybody_has_attached_is_remembered() {
    let mut place = Place::new();
    let keys = chain("a", 20);
    let mut agent = place.agent(0, &[]);
    assert_eq!(store(&mut agent, &keys), 20);
    eventually("headers are written", || place.metric("ssd_header_writes_count") > 0);
    std::thread::sleep(Duration::from_millis(100));
    drop(agent);
    let stopped = ask(&place.socket(), &Request::Stop, Duration::from_secs(5));
    assert!(stopped.is_ok());
    eventually("it has stopped", || place.stats().is_none());
    std::thread::sleep(Duration::from_millis(300));

    // This server knows no layout yet, so it cannot clear what it cannot read; it says so.
    place.serve(&[]);
    let external = [("server_launch_mode", "external"), ("start_wait_ms", "50")];
    let mut scheduler = Instance::open(place.config(1, &external), None, 0).unwrap();
    assert!(scheduler.reset().unwrap_err().contains("a restart may find blocks again"));
    let mut agent = place.agent(0, &[]);
    assert_eq!(load(&mut agent, &keys), 0, "but does not serve it");
    assert_eq!(place.metric("ssd_recovered_blocks_count"), 0);
}

#[test]
fn a_slot_on_loan_outlives_the_scheduler_that_was_granted_it() {
    let place = Place::new();
    let keys = chain("a", 4);
    let token = kvring_ipc::instance::random_token();
    let open =
        |layout: Option<Layout>| Instance::open_with_token(place.config(0, &[]), layout, 0, token.clone()).unwrap();
    let mut worker = DirectAgent::new(open(Some(layout())), HostMemory::new(64, BLOCK));
    let mut scheduler = open(None);
    assert_eq!(store(&mut worker, &keys), 4);
    let matched = scheduler.match_prefix(&keys);
    let lease = matched.lease.unwrap();
    assert_eq!(matched.blocks, 4);
    worker.load(lease, 0, &keys, &[0, 1, 2, 3], Duration::from_secs(5), |_, _| ());
    // The worker may still be copying, and knows of no end but the expiry.
    drop(scheduler);
    eventually("the scheduler has left", || place.metric("sessions_count") == 1);
    // The gauge follows within a round of housekeeping.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(place.metric("leases_count"), 1);
    drop(worker);
    eventually("nobody is left to copy", || place.metric("leases_count") == 0);
}

/// A back end with a bug.
struct Buggy;

impl kvring_gpu::backend::BlockMemory for Buggy {
    fn shape(&self) -> kvring_gpu::backend::Shape {
        kvring_gpu::backend::Shape { pages_counts: vec![100], tensors_count: 1, in_slot: (0, BLOCK) }
    }
    fn load(&mut self, _: &kvring_ipc::client::Pool, _: u32, _: &[u32], _: std::ops::Range<u32>) {
        panic!("a bug in a copy");
    }
    fn store(&mut self, pool: &kvring_ipc::client::Pool, slot: u32, pages: &[u32], _: std::ops::Range<u32>) {
        assert!(pages[0] != 13, "a bug in a copy");
        pool.copy_in(slot, 0, &[pages[0] as u8; BLOCK]);
    }
}

#[test]
fn an_agent_that_dies_of_a_bug_ends_every_ticket() {
    use kvring_gpu::agent::{Agent, Patience, Store};
    use kvring_gpu::backend::host::HostBackend;
    let place = Place::new();
    let keys = chain("a", 20);
    let instance = Instance::open(place.config(0, &[]), layout(), 0).unwrap();
    let agent = Agent::start(instance, HostBackend::new(Buggy), Patience::default()).unwrap();
    let store = |ticket, first: usize, pages: std::ops::Range<u32>| Store {
        ticket,
        parent: if first == 0 { BlockKey::default() } else { keys[first - 1] },
        first: first as u32,
        keys: keys[first..first + pages.len()].to_vec(),
        pages: pages.collect(),
        epoch: 0,
        after: None,
    };
    let ended = || {
        eventually("a ticket ends", || agent.wait(Duration::from_millis(100)));
        agent.poll().into_iter().map(|end| (end.ticket, end.missed.len())).collect::<Vec<_>>()
    };
    agent.store(store(1, 0, 0..10)).unwrap();
    assert_eq!(ended(), [(1, 0)]);
    agent.store(store(2, 10, 10..20)).unwrap();
    assert_eq!(ended(), [(2, 10)], "its thread has died of page 13; nobody waits for ever");
    assert!(agent.fence(&[2], Duration::from_secs(60)), "and nothing reads any more");
    agent.store(store(3, 0, 0..1)).unwrap();
    assert_eq!(ended(), [(3, 1)], "nor is anything taken");
    // What it had reserved comes back, as after any death of a session.
    eventually("its session is over", || place.metric("sessions_count") == 0);
    eventually("no slot is kept", || place.metric("host_slots_quarantined_count") == 0);
    let mut other = place.agent(1, &[]);
    assert_eq!(other.match_prefix(&keys).blocks, 10, "what was committed is there");
}
