//! kvring's server: index, tiers, devices, and the polling shard that owns them.
//!
//! Modules in reading order. Pure, without I/O or time: [`index`] where is it; [`tier`] what holds it;
//! [`lease`] who relies on it; [`cache`] all of these, consistent. [`device`] and [`dma`] touch the
//! machine and are the only ones besides `ipc::mapping` that say `unsafe`. [`shard`] is the data plane:
//! it never blocks, locks, allocates or logs. [`control`] is everything that may.

pub mod cache;
pub mod checksum;
pub mod control;
pub mod device;
pub mod dma;
pub mod free;
pub mod fsck;
pub mod index;
pub mod lease;
pub mod limits;
pub mod metrics;
pub mod planted;
pub mod recovery;
pub mod shard;
pub mod tier;
