//! The SPDK shim without SPDK, to be loaded in its place: the calls of `spdk/shim/kvring_spdk.h` over an
//! ordinary file, carried out in the least convenient way that the header allows.
//!
//! Nothing moves before `poll`, and what ends is said newest first, never more than half of what is in flight.
//! A controller and a pair are numbers that only look like pointers: one that is gone is found out. Misuse
//! that a device would not survive ends the process, with a message.
//!
//! A transport id is `trtype:TCP adrfam:IPv4 traddr:/path/to/file trsvcid:4420 subnqn:x`; the file's bytes are
//! the namespace. More words say how the device behaves:
//!
//! | word            | what happens                                                                         |
//! |-----------------|--------------------------------------------------------------------------------------|
//! | `sector:N`      | bytes of a sector, 4096 if unsaid                                                    |
//! | `metadata:N`    | bytes of metadata that the namespace claims; none are moved                          |
//! | `fail_after:N`  | a pair that has taken N commands fails: `-ENXIO`, and what is in flight `-ECANCELED` |
//! | `error_every:N` | each Nth command of a pair ends with `-EIO`, and has moved nothing                   |
//! | `hang_after:N`  | the commands of a pair after the Nth do not end, unless the pair fails               |
//! | `need_dma`      | memory must be registered or of `dma_alloc`, or else `-EFAULT`: as PCIe wants it     |

#![expect(unsafe_code, reason = "it is the other side of a C interface")]
#![expect(clippy::missing_safety_doc, reason = "what each call asks for is said in kvring_spdk.h")]

mod abi;
mod device;
mod memory;
#[cfg(test)]
mod test;

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use abi::*;

/// The library, as cargo has built it beside whoever uses this crate. A copy of it has a state of its own.
///
/// # Panics
/// If it was not built there.
pub fn built() -> PathBuf {
    let program = std::env::current_exe().expect("a program has a path");
    let directories = program.ancestors().skip(1).take(2);
    let candidates = directories.flat_map(|directory| [directory.to_path_buf(), directory.join("deps")]);
    candidates
        .map(|directory| directory.join("libkvring_fake_spdk.so"))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("no libkvring_fake_spdk.so beside {}", program.display()))
}

/// Misuse: visible, and nothing happens after it.
fn die(crime: &str) -> ! {
    // Not `eprintln!`: a test's harness would keep it to itself. Nobody is left to hear of a failure.
    let _ = writeln!(std::io::stderr(), "fake SPDK: {crime}");
    std::process::abort()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
