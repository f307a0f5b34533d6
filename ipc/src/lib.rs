//! Rings and memory shared between kvring's server and inference instances.
//!
//! # Threat model
//!
//! Two processes share a *segment* (one per session) and the *pool* (all sessions). Each side treats
//! every word that the other can write as a claim:
//!
//! * Control words are atomics. A racing peer can give us wrong values, never undefined behaviour.
//! * An index of the peer is bounded before use; a claim no correct peer can make ends the session.
//! * An entry is copied out once and parsed from the copy.
//! * Arguments too long for an entry (keys, slots) lie in the segment's *arena* and are copied out
//!   once, inside bounds that are checked against the arena, never against the peer's word.
//! * KV bytes are copied, never referenced.
//! * Both memories are sealed against shrinking, so a peer cannot turn a read into SIGBUS.
//!
//! What this does not defend against, and why it is accepted, is in `docs/THREATS.md`.
//!
//! Modules in reading order: [`wire`] what is said; [`ring`] and [`doorbell`] how it travels;
//! [`segment`] and [`mapping`] where it lies; [`key`] and [`layout`] what is compared;
//! [`handshake`] and [`peer`] who is there; [`client`] the instance's side; [`instance`] its life;
//! [`config`] what an operator may say to either side; [`stats`] and [`recorder`] what he can see.

pub mod doorbell;
pub mod ring;
pub mod sync;

#[cfg(not(loom))]
pub mod bell;
#[cfg(not(loom))]
pub mod client;
#[cfg(not(loom))]
pub mod config;
#[cfg(not(loom))]
pub mod epoch;
#[cfg(not(loom))]
pub mod events;
#[cfg(not(loom))]
pub mod handshake;
#[cfg(not(loom))]
pub mod instance;
#[cfg(not(loom))]
pub mod key;
#[cfg(not(loom))]
pub mod launch;
#[cfg(not(loom))]
pub mod layout;
#[cfg(not(loom))]
#[expect(unsafe_code, reason = "mmap, and atomics and copies inside what it returned")]
pub mod mapping;
#[cfg(not(loom))]
pub mod peer;
#[cfg(not(loom))]
pub mod recorder;
#[cfg(not(loom))]
pub mod segment;
#[cfg(not(loom))]
pub mod stats;
#[cfg(not(loom))]
pub mod wire;
