//! The instance's side: copies between pool slots and the instance's own KV memory.
//!
//! [`layout`] says where a block's bytes lie in tensors that an inference engine owns; [`plan`] makes copy
//! operations of a batch of blocks; [`backend`] carries them out, with the processor or with a GPU's copy
//! engines through the [`driver`]; [`agent`] is the thread in a worker process that answers load and store
//! tickets over one session, so that neither the engine's scheduler nor its model runner ever waits.
//! [`direct`] does the same in the caller's thread with the processor, for replays and tests.
//!
//! What is asynchronous: a ticket, from its submission to its end; a batch, from `submit` to `poll`. What
//! orders what: a batch comes after the moment of the engine's stream that its ticket names, batches of one
//! direction after one another, and nothing else. Which thread owns the device's context: none; the agent's
//! thread makes the engine's own context current and never synchronizes it.

pub mod agent;
pub mod backend;
pub mod direct;
pub mod driver;
pub mod layout;
pub mod plan;
#[expect(unsafe_code, reason = "copies between memories of its own")]
pub mod trial;
