//! Leases: who may rely on which prefix, until when, and which slots are on loan under it. Pure.

use kvring_ipc::wire::{LeaseId, MATCH_BLOCKS_MAX, Status};

use crate::index::{BlockId, Index};
use crate::limits::{LEASES_MAX, LEASES_PER_SESSION_MAX, SESSIONS_MAX};
use crate::planted::{self, Bug};
use crate::tier::host::SessionId;

const LOAN_WORDS: usize = MATCH_BLOCKS_MAX as usize / 64;

#[derive(Debug, Clone, Copy)]
struct Lease {
    generation: u32,
    /// None: this place is free.
    session: Option<SessionId>,
    instance: u32,
    leaf: BlockId,
    count: u32,
    loans_count: u32,
    expires_at_ns: u64,
}

/// What a current lease covers.
#[derive(Debug, Clone, Copy)]
pub struct Cover {
    /// The deepest block.
    pub leaf: BlockId,
    /// Blocks from the root to it.
    pub count: u32,
}

/// All leases.
#[derive(Debug)]
pub struct Leases {
    leases: Box<[Lease]>,
    /// A bit for each covered depth whose host slot is on loan.
    loans: Box<[[u64; LOAN_WORDS]]>,
    free: Vec<u32>,
    /// Held by each session, by its id modulo the limit.
    held: Box<[u32]>,
    /// Slots on loan under them.
    loaned: Box<[u32]>,
}

impl Default for Leases {
    fn default() -> Self {
        let vacant = Lease {
            generation: 0,
            session: None,
            instance: 0,
            leaf: BlockId(0),
            count: 0,
            loans_count: 0,
            expires_at_ns: 0,
        };
        Self {
            leases: vec![vacant; LEASES_MAX].into_boxed_slice(),
            loans: vec![[0; LOAN_WORDS]; LEASES_MAX].into_boxed_slice(),
            free: (0..LEASES_MAX as u32).rev().collect(),
            held: vec![0; SESSIONS_MAX].into_boxed_slice(),
            loaned: vec![0; SESSIONS_MAX].into_boxed_slice(),
        }
    }
}

impl Leases {
    /// Generations begin at this number: leases of another server's life are worthless here.
    pub fn begin_generations_at(&mut self, generation: u32) {
        self.leases.iter_mut().for_each(|lease| lease.generation = generation);
    }

    /// Leases of a session.
    pub fn held(&self, session: SessionId) -> u32 {
        self.held[session.0 as usize % SESSIONS_MAX]
    }

    /// Slots on loan under a session's leases; a slot under two leases counts twice.
    pub fn loaned(&self, session: SessionId) -> u32 {
        self.loaned[session.0 as usize % SESSIONS_MAX]
    }

    /// Leases held now.
    pub fn count(&self) -> usize {
        self.leases.len() - self.free.len()
    }

    /// Grants a lease on a prefix.
    ///
    /// # Errors
    /// [`Status::Quota`]: the session, or everybody, holds too many.
    pub fn grant(
        &mut self,
        index: &mut Index,
        session: SessionId,
        instance: u32,
        cover: Cover,
        expires_at_ns: u64,
    ) -> Result<LeaseId, Status> {
        let held = &mut self.held[session.0 as usize % SESSIONS_MAX];
        if *held >= LEASES_PER_SESSION_MAX {
            return Err(Status::Quota);
        }
        let place = self.free.pop().ok_or(Status::Quota)?;
        if !index.lease(cover.leaf) {
            self.free.push(place);
            return Err(Status::Quota);
        }
        *held += 1;
        let lease = &mut self.leases[place as usize];
        let generation = lease.generation.checked_add(1).unwrap_or(1);
        *lease = Lease {
            generation,
            session: Some(session),
            instance,
            leaf: cover.leaf,
            count: cover.count,
            loans_count: 0,
            expires_at_ns,
        };
        Ok(LeaseId::new(place, generation))
    }

    fn place_of(&self, id: LeaseId, instance: u32) -> Option<u32> {
        let lease = self.leases.get(id.index() as usize)?;
        let current = lease.session.is_some() && lease.generation == id.generation() && lease.instance == instance;
        current.then_some(id.index())
    }

    /// What a lease covers; `None` unless it is current and the instance's own.
    pub fn cover(&self, id: LeaseId, instance: u32) -> Option<Cover> {
        let lease = &self.leases[self.place_of(id, instance)? as usize];
        Some(Cover { leaf: lease.leaf, count: lease.count })
    }

    /// Puts the host slot of the covered block at `depth` on loan until the lease ends. False if the
    /// lease is not current.
    pub fn loan(&mut self, index: &mut Index, id: LeaseId, instance: u32, depth: u32, block: BlockId) -> bool {
        let Some(place) = self.place_of(id, instance) else { return false };
        let lease = &mut self.leases[place as usize];
        debug_assert!(depth < lease.count);
        let word = &mut self.loans[place as usize][depth as usize / 64];
        let bit = 1 << (depth % 64);
        if *word & bit == 0 {
            if planted::has(Bug::LoanUnpinned) {
                return true;
            }
            if !index.pin(block) {
                return false;
            }
            *word |= bit;
            lease.loans_count += 1;
            if let Some(session) = lease.session {
                self.loaned[session.0 as usize % SESSIONS_MAX] += 1;
            }
        }
        true
    }

    /// Ends a lease of the instance's own. False if there is none.
    pub fn release(&mut self, index: &mut Index, id: LeaseId, instance: u32) -> bool {
        let Some(place) = self.place_of(id, instance) else { return false };
        self.end(index, place);
        true
    }

    fn end(&mut self, index: &mut Index, place: u32) {
        let lease = &mut self.leases[place as usize];
        let (leaf, mut at, mut depth) = (lease.leaf, lease.leaf, lease.count - 1);
        if let Some(session) = lease.session.take() {
            self.held[session.0 as usize % SESSIONS_MAX] -= 1;
            self.loaned[session.0 as usize % SESSIONS_MAX] -= lease.loans_count;
        }
        // Up from the leaf, until the last loan has been found. The leaf's lease holds the chain.
        let loans = &mut self.loans[place as usize];
        while lease.loans_count > 0 {
            let (word, bit) = (depth as usize / 64, 1 << (depth % 64));
            let parent = index.block(at).parent();
            if loans[word] & bit != 0 {
                loans[word] &= !bit;
                lease.loans_count -= 1;
                index.unpin(at);
            }
            match parent {
                Some(parent) => (at, depth) = (parent, depth - 1),
                None => break,
            }
        }
        debug_assert!(lease.loans_count == 0);
        index.unlease(leaf);
        self.free.push(place);
    }

    /// Ends every lease whose time has come. Says how many.
    pub fn expire(&mut self, index: &mut Index, now_ns: u64) -> u32 {
        self.end_where(index, |lease| lease.expires_at_ns <= now_ns)
    }

    /// Ends every lease of a session that is gone. Slots on loan may be being copied by another session
    /// of the instance, which only knows when the lease expires: such a lease passes to the heir.
    pub fn end_session(&mut self, index: &mut Index, session: SessionId, heir: Option<SessionId>) -> u32 {
        if let Some(heir) = heir {
            for lease in &mut self.leases {
                if lease.session == Some(session) && lease.loans_count > 0 {
                    lease.session = Some(heir);
                    self.held[session.0 as usize % SESSIONS_MAX] -= 1;
                    self.held[heir.0 as usize % SESSIONS_MAX] += 1;
                    self.loaned[session.0 as usize % SESSIONS_MAX] -= lease.loans_count;
                    self.loaned[heir.0 as usize % SESSIONS_MAX] += lease.loans_count;
                }
            }
        }
        self.end_where(index, |lease| lease.session == Some(session))
    }

    fn end_where(&mut self, index: &mut Index, ends: impl Fn(&Lease) -> bool) -> u32 {
        if self.count() == 0 {
            return 0;
        }
        let mut count = 0;
        for place in 0..self.leases.len() as u32 {
            let lease = &self.leases[place as usize];
            if lease.session.is_some() && ends(lease) {
                self.end(index, place);
                count += 1;
            }
        }
        count
    }
}
