//! A pair of queues: one thread's at a time, by `&mut self`.

use std::sync::Arc;

use rustix::io::Errno;

use crate::api::{DoneWord, RawQpair};
use crate::controller::Controller;
use crate::memory::{self, Memory};
use crate::{SpdkError, checked};

/// What is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// As it was submitted.
    pub tag: u64,
    /// Why it failed, if it did.
    pub result: Result<(), Errno>,
}

/// A pair of queues over a controller's namespace, and the memory that it may move bytes to.
///
/// ```compile_fail
/// fn on_two_threads(pair: &kvring_spdk::Qpair) {
///     fn shared<T: Sync>(_: &T) {}
///     shared(pair);
/// }
/// ```
pub struct Qpair {
    raw: *mut RawQpair,
    // Dropped after the pair: the memory, then the controller.
    memory: Vec<Arc<dyn Memory>>,
    controller: Arc<Controller>,
    done: Box<[DoneWord]>,
    inflight: u32,
    depth: u32,
}

// SAFETY: SPDK binds a pair to no thread, it wants one at a time: self is not Sync, and every call takes &mut self.
unsafe impl Send for Qpair {}

impl Qpair {
    /// With room for `depth` transfers.
    ///
    /// # Errors
    /// The controller has no more.
    pub fn new(controller: Arc<Controller>, depth: u32, memory: Vec<Arc<dyn Memory>>) -> Result<Self, SpdkError> {
        let mut raw = std::ptr::null_mut();
        let nsid = controller.namespace().nsid;
        // SAFETY: the controller is connected, and the pair's place written before it returns.
        let made = checked(unsafe { (controller.api.qpair_new)(controller.raw(), nsid, depth, &raw mut raw) });
        made.map_err(|errno| SpdkError::Io { address: controller.address().into(), what: "a pair of queues", errno })?;
        let done = vec![DoneWord::default(); depth as usize].into_boxed_slice();
        Ok(Self { raw, memory, controller, done, inflight: 0, depth })
    }

    /// Its controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }
    /// Most transfers in flight.
    pub fn depth(&self) -> u32 {
        self.depth
    }
    /// Transfers in flight.
    pub fn inflight(&self) -> u32 {
        self.inflight
    }

    /// Devices that move bytes by themselves know the pages around a part of a memory from now on. It stays as long as
    /// the process.
    ///
    /// # Errors
    /// The memory is not whole pages of 2 MiB, or the device cannot be told.
    pub fn register(&mut self, memory: usize, at: usize, bytes: usize) -> Result<(), Errno> {
        memory::register(&self.memory[memory], at, bytes)
    }

    /// Begins to move `bytes`, between place `at` of one of its memories and sector `sector`.
    ///
    /// # Errors
    /// AGAIN: there is no room now. Otherwise the pair has failed.
    ///
    /// # Panics
    /// The bytes do not lie in the memory, or are no whole sectors.
    pub fn submit(
        &mut self,
        write: bool,
        memory: usize,
        at: usize,
        sector: u64,
        bytes: usize,
        tag: u64,
    ) -> Result<(), Errno> {
        let (sector_bytes, memory) = (self.controller.namespace().sector_bytes as usize, &self.memory[memory]);
        assert!(at <= memory.bytes() && bytes <= memory.bytes() - at, "inside the memory");
        assert!(bytes > 0 && bytes.is_multiple_of(sector_bytes), "whole sectors");
        let address = memory.base().wrapping_add(at);
        let sectors = (bytes / sector_bytes) as u32;
        let write = i32::from(write);
        // SAFETY: the pair lives, and this is the only call of it; the memory is held until the pair is gone, which ends
        // or cuts off what it moves.
        let begun = unsafe { (self.controller.api.submit)(self.raw, write, address.cast(), sector, sectors, tag) };
        checked(begun)?;
        self.inflight += 1;
        Ok(())
    }

    /// Has the device write out what its cache holds.
    ///
    /// # Errors
    /// As [`Qpair::submit`].
    pub fn flush(&mut self, tag: u64) -> Result<(), Errno> {
        // SAFETY: the pair lives, and this is the only call of it.
        checked(unsafe { (self.controller.api.flush)(self.raw, tag) })?;
        self.inflight += 1;
        Ok(())
    }

    /// Sends what was begun, and says what is over: at most `budget`.
    ///
    /// # Errors
    /// The pair has failed: nothing can be begun any more, and what was in flight is said to have failed by the next
    /// calls.
    pub fn poll(&mut self, budget: usize, mut each: impl FnMut(Done)) -> Result<(), Errno> {
        let budget = budget.min(self.done.len()) as u32;
        // SAFETY: the pair lives, this is the only call of it, and `done` has room for so many.
        let count = checked(unsafe { (self.controller.api.poll)(self.raw, self.done.as_mut_ptr(), budget) })?;
        for word in &self.done[..count as usize] {
            self.inflight -= 1;
            each(Done { tag: word.tag, result: checked(word.result).map(drop) });
        }
        Ok(())
    }
}

impl Drop for Qpair {
    fn drop(&mut self) {
        // SAFETY: nobody else has it. What is in flight is ended or cut off; the memory goes after.
        unsafe { (self.controller.api.qpair_free)(self.raw) };
    }
}
