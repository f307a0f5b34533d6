//! The two protocols that matter, in every interleaving: publish/pop and sleep/wake.
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p kvring-ipc --test loom --release`.
#![cfg(loom)]

use kvring_ipc::doorbell;
use kvring_ipc::ring::{Consumer, ENTRY_WORDS, Producer, RingMemory};
use kvring_ipc::sync::{AtomicU32, AtomicU64, Ordering};
use loom::sync::Arc;
use loom::thread;

struct Memory {
    head: AtomicU32,
    tail: AtomicU32,
    words: Vec<AtomicU64>,
}

#[derive(Clone)]
struct Shared(Arc<Memory>);

impl Shared {
    fn new(depth: usize) -> Self {
        Self(Arc::new(Memory {
            head: AtomicU32::new(0),
            tail: AtomicU32::new(0),
            words: (0..depth * ENTRY_WORDS).map(|_| AtomicU64::new(0)).collect(),
        }))
    }
}

impl RingMemory for Shared {
    fn head(&self) -> &AtomicU32 {
        &self.0.head
    }
    fn tail(&self) -> &AtomicU32 {
        &self.0.tail
    }
    fn words(&self) -> &[AtomicU64] {
        &self.0.words
    }
}

fn bounded() -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder
}

#[test]
fn what_is_popped_is_what_was_pushed() {
    bounded().check(|| {
        let shared = Shared::new(1);
        let theirs = shared.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::new(theirs);
            for n in 1..=2u64 {
                while producer.room(1).unwrap() == 0 {
                    thread::yield_now();
                }
                producer.push([n; ENTRY_WORDS]);
                producer.publish();
            }
        });
        let mut consumer = Consumer::new(shared);
        for n in 1..=2u64 {
            let entry = loop {
                if let Some(entry) = consumer.pop().unwrap() {
                    break entry;
                }
                thread::yield_now();
            };
            assert_eq!(entry, [n; ENTRY_WORDS]);
            consumer.release();
        }
        producer.join().unwrap();
    });
}

#[test]
fn a_sleeper_is_always_rung() {
    bounded().check(|| {
        let shared = Shared::new(2);
        let flag = Arc::new(AtomicU32::new(0));
        let bell = Arc::new(AtomicU32::new(0));
        let waker = {
            let (shared, flag, bell) = (shared.clone(), flag.clone(), bell.clone());
            thread::spawn(move || {
                let mut producer = Producer::new(shared);
                producer.push([1; ENTRY_WORDS]);
                producer.publish();
                if doorbell::must_ring(&flag) {
                    bell.store(1, Ordering::Release);
                }
            })
        };
        let mut consumer = Consumer::new(shared);
        doorbell::announce(&flag);
        let seen = consumer.pop().unwrap().is_some();
        waker.join().unwrap();
        let rung = bell.load(Ordering::Acquire) == 1;
        assert!(seen || rung, "asleep beside a full ring");
        doorbell::retract(&flag);
    });
}
