//! The data plane allocates nothing after start: counted by the allocator itself.

#![expect(unsafe_code, reason = "a global allocator is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use kvring_engine::device::sim::Chance;
use kvring_tests::world::{Shape, World};

struct Counting;

thread_local! {
    static COUNTING: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    if COUNTING.get() {
        COUNT.set(COUNT.get() + 1);
    }
}

// SAFETY: every call is passed to the system's allocator as it came; counting allocates nothing,
// because the thread locals are constant and have no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_shard_s_poll_allocates_and_frees_nothing() {
    let mut polls = 0;
    for seed in 0..40 {
        let mut shape = Shape::draw(&mut Chance::new(seed));
        // A session's end and a crash are the control plane's business.
        (shape.may_die, shape.may_crash) = (false, false);
        let mut world = World::with_shape(shape, Chance::new(seed));
        // With all instruments.
        world.show();
        world.before_poll = Some(|| COUNTING.set(true));
        world.after_poll = Some(|| COUNTING.set(false));
        world.run(2000);
        polls += world.polls_count;
    }
    assert!(polls > 10_000, "the data plane was at work");
    assert_eq!(COUNT.get(), 0, "allocations in {polls} polls");
}
