use super::*;

#[derive(Clone, Copy)]
struct Plain<'a> {
    head: &'a AtomicU32,
    tail: &'a AtomicU32,
    words: &'a [AtomicU64],
}

impl RingMemory for Plain<'_> {
    fn head(&self) -> &AtomicU32 {
        self.head
    }
    fn tail(&self) -> &AtomicU32 {
        self.tail
    }
    fn words(&self) -> &[AtomicU64] {
        self.words
    }
}

fn memory(depth: usize) -> (AtomicU32, AtomicU32, Vec<AtomicU64>) {
    let words = (0..depth * ENTRY_WORDS).map(|_| AtomicU64::new(0)).collect();
    (AtomicU32::new(0), AtomicU32::new(0), words)
}

#[test]
fn entries_arrive_in_order_across_threads() {
    let (head, tail, words) = memory(8);
    let plain = Plain { head: &head, tail: &tail, words: &words };
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut producer = Producer::new(plain);
            for n in 0..100_000 {
                while producer.room(1).unwrap() == 0 {
                    std::hint::spin_loop();
                }
                producer.push([n; ENTRY_WORDS]);
                assert!(producer.publish());
            }
            assert!(!producer.publish(), "nothing pushed, nothing published");
        });
        let mut consumer = Consumer::new(plain);
        for n in 0..100_000 {
            let entry = loop {
                if let Some(entry) = consumer.pop().unwrap() {
                    break entry;
                }
                std::hint::spin_loop();
            };
            assert_eq!(entry, [n; ENTRY_WORDS]);
            consumer.release();
        }
    });
}

#[test]
fn a_tail_beyond_the_ring_poisons_it() {
    let (head, tail, words) = memory(8);
    let mut consumer = Consumer::new(Plain { head: &head, tail: &tail, words: &words });
    for claimed in [9, 10, 1 << 31, u32::MAX] {
        tail.store(claimed, Ordering::Relaxed);
        assert_eq!(consumer.pop(), Err(Poisoned { claimed, ours: 0 }));
    }
    tail.store(8, Ordering::Relaxed);
    assert!(matches!(consumer.pop(), Ok(Some(_))));
}

#[test]
fn a_head_that_was_never_published_poisons_the_producer() {
    let (head, tail, words) = memory(2);
    let mut producer = Producer::new(Plain { head: &head, tail: &tail, words: &words });
    for n in 0..2 {
        assert!(producer.room(1).unwrap() > 0);
        producer.push([n; ENTRY_WORDS]);
    }
    producer.publish();
    for claimed in [3, 4, 1 << 31, u32::MAX] {
        head.store(claimed, Ordering::Relaxed);
        assert_eq!(producer.room(1), Err(Poisoned { claimed, ours: 2 }));
    }
    head.store(1, Ordering::Relaxed);
    assert_eq!(producer.room(1), Ok(1));
}

#[test]
fn indexes_wrap_at_two_to_the_thirty_two() {
    let (head, tail, words) = memory(4);
    let plain = Plain { head: &head, tail: &tail, words: &words };
    let start = u32::MAX - 5;
    let mut producer = Producer { tail: start, published: start, head_seen: start, ..Producer::new(plain) };
    let mut consumer = Consumer { head: start, tail_seen: start, ..Consumer::new(plain) };
    head.store(start, Ordering::Relaxed);
    tail.store(start, Ordering::Relaxed);
    for n in 0..64 {
        assert!(producer.room(1).unwrap() > 0);
        producer.push([n; ENTRY_WORDS]);
        producer.publish();
        assert_eq!(consumer.pop(), Ok(Some([n; ENTRY_WORDS])));
        assert_eq!(consumer.pop(), Ok(None));
        consumer.release();
    }
}

#[test]
fn a_peeked_entry_stays_until_taken() {
    let (head, tail, words) = memory(2);
    let plain = Plain { head: &head, tail: &tail, words: &words };
    let mut producer = Producer::new(plain);
    let mut consumer = Consumer::new(plain);
    producer.push([7; ENTRY_WORDS]);
    producer.publish();
    assert_eq!(consumer.peek(), Ok(Some([7; ENTRY_WORDS])));
    assert_eq!(consumer.peek(), Ok(Some([7; ENTRY_WORDS])));
    consumer.take();
    assert_eq!(consumer.peek(), Ok(None));
}
