//! The instance's side: copies between pool slots and the instance's own KV memory.
//!
//! [`agent`] pairs an [`kvring_ipc::instance::Instance`] with a [`backend`]: it matches, loads what
//! hits, stores what missed. The host back end serves CPU inference, replays and tests; the CUDA one
//! plugs into the same trait.

pub mod agent;
pub mod backend;
