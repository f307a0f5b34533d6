//! SPDK's NVMe driver: no kernel between a thread and a controller, over PCIe, TCP or vfio-user.
//!
//! SPDK is found at run time: one shared object that holds it and the few functions of `shim/kvring_spdk.h`, which
//! `cargo xtask spdk` makes of an installed SPDK. Misuse does not compile, or is not there to be had: an environment is
//! begun once, a pair of queues belongs to one thread at a time, and memory stays as long as a pair may move bytes to it.

#![expect(unsafe_code, reason = "SPDK is C")]

mod api;
mod controller;
mod env;
mod memory;
mod qpair;

pub use controller::{Controller, Namespace, normalised};
pub use env::{EnvOptions, set_library};
pub use memory::{Dma, Memory};
pub use qpair::{Done, Qpair};

/// Why SPDK does not do what is asked.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages are the documentation")]
pub enum SpdkError {
    #[error(
        "SPDK cannot be loaded from {library}: {why}: install SPDK, make the library with `cargo xtask spdk`, and set spdk_library to it"
    )]
    Library { library: String, why: String },
    #[error(
        "{library} was made for another kvring (ABI {theirs}, this one has {ours}): make it anew with `cargo xtask spdk`"
    )]
    Abi { library: String, theirs: u32, ours: u32 },
    #[error(
        "SPDK's environment cannot be begun ({errno}): it takes {mib} MiB of hugepages on a mounted hugetlbfs, or spdk_no_huge = on for TCP"
    )]
    Env { errno: rustix::io::Errno, mib: u32 },
    #[error("{address}: {errno}: is the target there, and not another program's?")]
    Connect { address: String, errno: rustix::io::Errno },
    #[error("{address}: namespace {nsid}: {errno}")]
    Namespace { address: String, nsid: u32, errno: rustix::io::Errno },
    #[error("{address}: {what}: {errno}")]
    Io { address: String, what: &'static str, errno: rustix::io::Errno },
    #[error("{address}: {why}")]
    Address { address: String, why: &'static str },
}

/// What a call returned.
fn checked(result: i32) -> Result<u32, rustix::io::Errno> {
    u32::try_from(result).map_err(|_| rustix::io::Errno::from_raw_os_error(-result))
}
