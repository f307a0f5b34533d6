//! One attached session, on the shard's side: its rings, and the room promised in them.

use std::os::fd::OwnedFd;

use kvring_ipc::bell::ring;
use kvring_ipc::doorbell;
use kvring_ipc::ring::{Consumer, Poisoned, Producer, RingMemory};
use kvring_ipc::segment::{RingView, Segment, SessionState};
use kvring_ipc::sync::Ordering;
use kvring_ipc::wire::Completion;

use crate::tier::host::Writer;

/// A session.
#[derive(Debug)]
pub struct Session {
    /// Who it is, as slots and leases know it.
    pub writer: Writer,
    /// Its shared memory.
    pub segment: Segment,
    /// What it asks.
    pub submissions: Consumer<RingView>,
    completions: Producer<RingView>,
    /// Completions that requests under way may still need.
    promised: u32,
    /// Loads under way.
    pub loads_count: u32,
    /// Whether it has said what its blocks look like: without that it only matches.
    pub moves_blocks: bool,
    /// Our end of the bell: watched by whoever puts the shard to sleep.
    pub bell: Option<OwnedFd>,
    /// Who that is to an operator: the instance's id and the process'.
    pub instance_id: u32,
    /// See `instance_id`.
    pub pid: u32,
    /// Its user: instances are named by clients, users by the kernel.
    pub user: u32,
    /// Instances that the pool is divided by for this one: those of its user, times users.
    pub sharers: u32,
    /// Its leases and slots were taken back: it is not polled any more.
    pub ended: bool,
}

impl Session {
    /// A session over this segment.
    pub fn new(writer: Writer, segment: Segment, bell: Option<OwnedFd>) -> Self {
        Self {
            writer,
            submissions: Consumer::new(segment.submissions()),
            completions: Producer::new(segment.completions()),
            segment,
            promised: 0,
            loads_count: 0,
            moves_blocks: true,
            bell,
            instance_id: 0,
            pid: 0,
            user: 0,
            sharers: 1,
            ended: false,
        }
    }

    /// Takes room for `count` completions; false if there is none now.
    ///
    /// # Errors
    /// The client's head makes no sense.
    pub fn promise(&mut self, count: u32) -> Result<bool, Poisoned> {
        let wanted = self.promised + count;
        if self.completions.room(wanted)? < wanted {
            return Ok(false);
        }
        self.promised = wanted;
        Ok(true)
    }

    /// Room that was not needed.
    pub fn give_back(&mut self, count: u32) {
        self.promised -= count;
    }

    /// Answers, in room that was promised.
    pub fn complete(&mut self, completion: &Completion) {
        assert!(self.promised > 0, "every completion has its room");
        self.promised -= 1;
        self.completions.push(completion.encode());
    }

    /// Makes answers visible and consumed entries free; wakes the client if it sleeps.
    pub fn publish(&mut self) {
        crate::planted::step();
        self.submissions.release();
        if self.completions.publish()
            && doorbell::must_ring(self.segment.client_sleeps())
            && let Some(bell) = &self.bell
        {
            ring(bell);
        }
    }

    /// Submissions that were not picked up, and completions that the client has not: its words, so no more than
    /// what fits.
    pub fn waiting(&self) -> [u32; 2] {
        use kvring_ipc::segment::RING_DEPTH;
        let pending = |ring: RingView| {
            let (head, tail) = (ring.head().load(Ordering::Relaxed), ring.tail().load(Ordering::Relaxed));
            tail.wrapping_sub(head).min(RING_DEPTH)
        };
        [pending(self.segment.submissions()), pending(self.segment.completions())]
    }

    /// Tells the client that nothing more will come.
    pub fn close(&mut self, state: SessionState) {
        self.segment.set_state(state);
        if let Some(bell) = &self.bell {
            ring(bell);
        }
    }
}
