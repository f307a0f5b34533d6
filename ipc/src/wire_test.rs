use super::*;
use proptest::prelude::*;

const ARENA_BYTES: u32 = 1 << 20;

fn key() -> BlockKey {
    BlockKey::from_words([0x1111_2222_3333_4444, 0x5555_6666_7777_8888])
}

/// The bytes of every kind of entry, written down: whoever changes one changes the protocol.
#[test]
fn the_golden_entries() {
    let keys = Span { offset_in_arena: 0x40, count: 3 };
    let lease = LeaseId::new(7, 9);
    let goldens: [(Submission, Entry); 9] = [
        (Submission::Ping, [5, 1, 0, 0, 0, 0, 0, 0]),
        (Submission::Match { keys }, [5, 0x3_0002, 0x40, 0, 0, 0, 0, 0]),
        (Submission::Release { lease }, [5, 3, 0, 0x9_0000_0007, 0, 0, 0, 0]),
        (Submission::Load { lease, first: 2, keys }, [5, 0x2_0003_0004, 0x40, 0x9_0000_0007, 0, 0, 0, 0]),
        (Submission::Prefetch { lease, first: 2, count: 3 }, [5, 0x2_0003_0005, 0, 0x9_0000_0007, 0, 0, 0, 0]),
        (
            Submission::Reserve { parent: key(), first: 2, keys },
            [5, 0x2_0003_0006, 0x40, 0, 0x1111_2222_3333_4444, 0x5555_6666_7777_8888, 0, 0],
        ),
        (Submission::Commit { grants: keys }, [5, 0x3_0007, 0x40, 0, 0, 0, 0, 0]),
        (Submission::Abort { grants: keys }, [5, 0x3_0008, 0x40, 0, 0, 0, 0, 0]),
        (Submission::Cancel { target: Tag(8) }, [5, 9, 0, 0, 0, 0, 8, 0]),
    ];
    for (submission, entry) in goldens {
        assert_eq!(submission.encode(Tag(5)), entry, "{submission:?}");
        assert_eq!(Submission::parse(&entry, ARENA_BYTES), (Tag(5), Ok(submission)));
    }
    let completion = Completion {
        tag: Tag(5),
        op: Some(Op::Load),
        status: Status::Ok,
        last: true,
        from_disk: true,
        count: 2,
        first: 6,
        payload: [0x1_0000_0002, 0x3_0000_0004, 0, 0, 0, 0],
    };
    let entry = [5, 0x0006_0002_0003_0004, 0x1_0000_0002, 0x3_0000_0004, 0, 0, 0, 0];
    assert_eq!(completion.encode(), entry);
    assert_eq!(Completion::parse(&entry), Some(completion));
    let grants: Vec<_> = completion.grants().collect();
    assert_eq!(grants, [(6, Grant { slot: 2, generation: 1 }), (7, Grant { slot: 4, generation: 3 })]);
}

#[test]
fn spans_outside_the_arena_are_refused() {
    for (offset, count) in [(ARENA_BYTES, 1), (ARENA_BYTES - 16, 2), (u32::MAX - 15, 1), (8, 1), (0, 0), (0, 8193)] {
        let entry = Submission::Match { keys: Span { offset_in_arena: offset, count } }.encode(Tag(1));
        assert_eq!(Submission::parse(&entry, ARENA_BYTES), (Tag(1), Err(Status::BadRequest)), "{offset} {count}");
    }
}

#[test]
fn a_depth_beyond_any_chain_is_refused() {
    let keys = Span { offset_in_arena: 0, count: 1 };
    for first in [MATCH_BLOCKS_MAX, u32::MAX] {
        let entry = Submission::Reserve { parent: key(), first, keys }.encode(Tag(1));
        assert_eq!(Submission::parse(&entry, ARENA_BYTES).1, Err(Status::BadRequest));
    }
}

proptest! {
    /// Whatever a client writes, the parser answers; and what it accepts is inside its bounds.
    #[test]
    fn any_words_are_parsed_or_refused(entry: Entry, arena_bytes in 0u32..1 << 22) {
        let (tag, parsed) = Submission::parse(&entry, arena_bytes);
        prop_assert_eq!(tag, Tag(entry[0]));
        if let Ok(Submission::Match { keys } | Submission::Load { keys, .. } | Submission::Reserve { keys, .. }) = parsed {
            prop_assert!(u64::from(keys.offset_in_arena) + u64::from(keys.count) * 16 <= u64::from(arena_bytes));
        }
        let _ = Completion::parse(&entry);
    }
}
