//! The environment: once a process, begun when the first controller is asked for.

use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::io::Errno;

use crate::api::{Api, EnvArgs};
use crate::{SpdkError, checked};

/// What the environment is begun with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvOptions {
    /// The shared object with SPDK in it; by default `libkvring_spdk.so`, or with the feature `link` what is part of this
    /// program.
    pub library: PathBuf,
    /// Do without hugepages: enough for TCP.
    pub no_huge: bool,
    /// SPDK's own memory, in MiB.
    pub memory_mib: u32,
}

impl Default for EnvOptions {
    fn default() -> Self {
        Self { library: "libkvring_spdk.so".into(), no_huge: false, memory_mib: 256 }
    }
}

static OPTIONS: Mutex<Option<EnvOptions>> = Mutex::new(None);
static ENV: OnceLock<Api> = OnceLock::new();

/// Says how the environment is to be begun, for whenever the first controller is asked for.
pub fn set_library(options: EnvOptions) {
    *OPTIONS.lock().unwrap_or_else(PoisonError::into_inner) = Some(options);
}

fn api(options: &EnvOptions) -> Result<Api, SpdkError> {
    #[cfg(feature = "link")]
    if options.library == EnvOptions::default().library {
        return Ok(Api::linked());
    }
    Api::load(&options.library)
}

/// The environment, begun if it is not yet. One that could not be begun may be tried again.
pub(crate) fn env() -> Result<&'static Api, SpdkError> {
    let options = OPTIONS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(api) = ENV.get() {
        return Ok(api);
    }
    let options = options.clone().unwrap_or_default();
    let api = api(&options)?;
    let cpu = rustix::thread::sched_getcpu() as u32;
    let args = EnvArgs {
        no_huge: u32::from(options.no_huge),
        no_pci: u32::from(options.no_huge),
        memory_mib: options.memory_mib,
        cpu,
    };
    // It pins its caller: a thread that is gone afterwards.
    let begin = || {
        // SAFETY: the arguments are read before it returns.
        unsafe { (api.env_init)(&raw const args) }
    };
    let begun = std::thread::scope(|scope| scope.spawn(begin).join());
    let errno = match begun.map(checked) {
        Ok(Ok(_)) => return Ok(ENV.get_or_init(|| api)),
        Ok(Err(errno)) => errno,
        Err(_) => Errno::IO,
    };
    Err(SpdkError::Env { errno, mib: options.memory_mib })
}
