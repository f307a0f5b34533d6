//! The CUDA driver, loaded at run time: a machine without one gets a sentence, not a panic.
//!
//! Types and constants are cudarc's; the calls are a table of our own, because results stay numbers (a
//! newer driver has codes that today's enum does not), because entry points may be absent, and because
//! nothing may end the process of an inference engine.

#[expect(unsafe_code, reason = "function pointers out of a shared object")]
pub mod api;
#[expect(unsafe_code, reason = "each call of the driver, with what it asks for")]
pub mod context;
pub mod error;
