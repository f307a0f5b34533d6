//! Any eight words as an entry of either ring: what is accepted is bounded and survives a round trip.
//! Input: 64 bytes of entry, then the arena's size.
#![no_main]

use kvring_fuzz::Input;
use kvring_ipc::segment::ARENA_BYTES;
use kvring_ipc::wire::{
    BATCH_BLOCKS_MAX, Completion, GRANTS_PER_ENTRY, Grant, LeaseId, MATCH_BLOCKS_MAX, Span, Status, Submission,
};
use libfuzzer_sys::fuzz_target;

fn submission(entry: &[u64; 8], arena_bytes: u32) {
    let (tag, parsed) = Submission::parse(entry, arena_bytes);
    assert_eq!(tag.0, entry[0], "a refusal must find its request, too");
    let submission = match parsed {
        Ok(submission) => submission,
        Err(status) => return assert_eq!(status, Status::BadRequest),
    };
    assert_eq!(submission.op() as u8, entry[1] as u8);
    assert!((1..=BATCH_BLOCKS_MAX).contains(&submission.completions_max()), "the answer fits the ring");
    let inside = |span: Span, item_bytes: u64, limit: u32| {
        assert!(span.count > 0 && span.count <= limit && span.offset_in_arena.is_multiple_of(16));
        assert!(u64::from(span.offset_in_arena) + u64::from(span.count) * item_bytes <= u64::from(arena_bytes));
    };
    let chained = |first: u32, count: u32| assert!(u64::from(first) + u64::from(count) <= u64::from(MATCH_BLOCKS_MAX));
    match submission {
        Submission::Match { keys } => inside(keys, 16, MATCH_BLOCKS_MAX),
        Submission::Load { first, keys, .. } | Submission::Reserve { first, keys, .. } => {
            inside(keys, 16, BATCH_BLOCKS_MAX);
            chained(first, keys.count);
        }
        Submission::Prefetch { first, count, .. } => {
            assert!(count > 0 && count <= BATCH_BLOCKS_MAX);
            chained(first, count);
        }
        Submission::Commit { grants } | Submission::Abort { grants } => inside(grants, 8, BATCH_BLOCKS_MAX),
        Submission::Ping | Submission::Release { .. } | Submission::Cancel { .. } => {}
    }
    assert_eq!(Submission::parse(&submission.encode(tag), arena_bytes), (tag, Ok(submission)));
}

fn completion(entry: &[u64; 8]) {
    let Some(completion) = Completion::parse(entry) else { return };
    assert_eq!(Completion::parse(&completion.encode()), Some(completion));
    assert!(completion.grants().count() <= GRANTS_PER_ENTRY.min(completion.count as usize));
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let entry: [u64; 8] = std::array::from_fn(|_| input.u64());
    submission(&entry, ARENA_BYTES);
    submission(&entry, input.u32());
    completion(&entry);
    for word in entry {
        assert_eq!(Grant::from_word(word).to_word(), word);
        let lease = LeaseId(word);
        assert_eq!(LeaseId::new(lease.index(), lease.generation()), lease);
    }
});
