//! The instance's side: copies between pool slots and the instance's own KV memory.
//!
//! [`layout`] says where a block's bytes lie in tensors that an inference engine owns; [`backend`]
//! copies them; [`agent`] is the thread in a worker process that answers load and store tickets over
//! one session, so that neither the engine's scheduler nor its model runner ever waits for a ring.
//! [`direct`] does the same in the caller's thread, for replays and tests. A CUDA back end plugs into
//! the same trait.

pub mod agent;
pub mod backend;
pub mod direct;
pub mod layout;
