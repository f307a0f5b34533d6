//! What a result code of the CUDA driver means for us.

use cudarc::driver::sys::CUresult;

/// A result that is not success, and the call it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call} says {code} ({})", name(*.code))]
pub struct CudaError {
    /// The driver's function.
    pub call: &'static str,
    /// Its result.
    pub code: u32,
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Work that has not ended: ask again.
    NotReady,
    /// This driver or device does not do this: do without.
    Unsupported,
    /// This call failed; the context lives.
    Recoverable,
    /// The context is lost, whoever's fault it was: nothing more can be done in this process.
    Sticky,
    /// The driver or the context has been torn down: the process is about to end.
    Gone,
}

impl CudaError {
    /// What to do about it.
    pub fn class(self) -> Class {
        match self.code {
            NOT_READY => Class::NotReady,
            INVALID_VALUE | NOT_FOUND | NOT_SUPPORTED => Class::Unsupported,
            DEINITIALIZED | CONTEXT_IS_DESTROYED => Class::Gone,
            // Illegal address, launch time-out, assert, and their kin, as the header of CUDA 12.8 says: "This leaves
            // the process in an inconsistent state".
            214 | 220 | 226 | 700 | 702 | 710 | 714..=719 | 721 | 810 | 911 | 999 => Class::Sticky,
            _ => Class::Recoverable,
        }
    }
}

/// CUDA_SUCCESS.
pub const SUCCESS: u32 = CUresult::CUDA_SUCCESS as u32;
/// CUDA_ERROR_INVALID_VALUE.
pub const INVALID_VALUE: u32 = CUresult::CUDA_ERROR_INVALID_VALUE as u32;
/// CUDA_ERROR_DEINITIALIZED.
pub const DEINITIALIZED: u32 = CUresult::CUDA_ERROR_DEINITIALIZED as u32;
/// CUDA_ERROR_STUB_LIBRARY.
pub const STUB_LIBRARY: u32 = CUresult::CUDA_ERROR_STUB_LIBRARY as u32;
/// CUDA_ERROR_NO_DEVICE.
pub const NO_DEVICE: u32 = CUresult::CUDA_ERROR_NO_DEVICE as u32;
/// CUDA_ERROR_NOT_FOUND.
pub const NOT_FOUND: u32 = CUresult::CUDA_ERROR_NOT_FOUND as u32;
/// CUDA_ERROR_NOT_READY.
pub const NOT_READY: u32 = CUresult::CUDA_ERROR_NOT_READY as u32;
/// CUDA_ERROR_CONTEXT_IS_DESTROYED.
pub const CONTEXT_IS_DESTROYED: u32 = CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED as u32;
/// CUDA_ERROR_NOT_SUPPORTED.
pub const NOT_SUPPORTED: u32 = CUresult::CUDA_ERROR_NOT_SUPPORTED as u32;

/// The names of those that are met; what libcuda says itself may not be asked of a broken one.
fn name(code: u32) -> &'static str {
    match code {
        INVALID_VALUE => "invalid value",
        2 => "out of memory",
        3 => "not initialized",
        DEINITIALIZED => "deinitialized",
        STUB_LIBRARY => "a stub library, not a driver",
        NO_DEVICE => "no device",
        101 => "invalid device",
        201 => "invalid context",
        218 => "invalid PTX",
        NOT_FOUND => "not found",
        NOT_READY => "not ready",
        700 => "illegal address",
        702 => "launch timed out",
        CONTEXT_IS_DESTROYED => "context is destroyed",
        712 => "host memory already registered",
        713 => "host memory not registered",
        719 => "launch failed",
        NOT_SUPPORTED => "not supported",
        803 => "driver and kernel module do not match",
        999 => "unknown",
        _ => "see CUresult in cuda.h",
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_code_of_a_newer_driver_is_an_error_like_another() {
        let of = |code| CudaError { call: "cuMemcpyHtoDAsync", code }.class();
        assert_eq!(of(4_000_000), Class::Recoverable);
        assert_eq!(
            (of(600), of(801), of(700), of(709)),
            (Class::NotReady, Class::Unsupported, Class::Sticky, Class::Gone)
        );
        let text = CudaError { call: "cuStreamQuery", code: 700 }.to_string();
        assert_eq!(text, "cuStreamQuery says 700 (illegal address)");
    }
}
