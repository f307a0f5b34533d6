//! Device memory of our own, for trials: written and read through a pinned buffer.

use std::sync::Arc;

use super::{Done, KERNEL, PTX, Pinned, Things};
use crate::driver::context::{self, Context, Stream};
use crate::driver::error::Class;

/// Device memory. The thread that uses it has the device's context current, or is given it.
pub struct DeviceMemory {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
    pinned: Pinned,
    stream: Stream,
}

const PINNED_BYTES: usize = 4 << 20;

impl DeviceMemory {
    /// Of so many bytes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(context: Arc<Context>, bytes: usize) -> Done<Self> {
        let within = context.clone();
        within.within(|| {
            let address = context.alloc(bytes)?;
            let (host, device) = context.alloc_host(PINNED_BYTES)?;
            let pinned = Pinned { host: host.expose_provenance(), device, bytes: PINNED_BYTES };
            let stream = context.create_stream(false)?;
            Ok(Self { context, address, bytes, pinned, stream })
        })
    }

    /// The device's context.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Where it begins, for the device.
    pub fn address(&self) -> usize {
        self.address as usize
    }

    fn settle(&self) -> Done {
        while !self.context.is_idle(self.stream)? {
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn through(&self, offset: usize, bytes: usize, mut step: impl FnMut(usize, usize) -> Done) -> Done {
        assert!(offset + bytes <= self.bytes, "{offset}+{bytes} of {}", self.bytes);
        let context = self.context.clone();
        context.within(|| {
            (0..bytes).step_by(self.pinned.bytes).try_for_each(|at| step(at, self.pinned.bytes.min(bytes - at)))
        })
    }

    /// Writes bytes, and waits until they are there.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn write(&self, offset: usize, source: &[u8]) -> Done {
        self.through(offset, source.len(), |at, count| {
            let target: *mut u8 = std::ptr::with_exposed_provenance_mut(self.pinned.host);
            // SAFETY: the pinned buffer is ours, of `pinned.bytes`, and no copy of it is under way (`settle`).
            unsafe { std::ptr::copy_nonoverlapping(source[at..].as_ptr(), target, count) };
            let device = self.address + (offset + at) as u64;
            let way = context::Way::ToDevice;
            // SAFETY: inside the device memory by the assert; both are left alone until `settle` returns.
            unsafe { self.context.copy(way, self.pinned.host, device, count as u64, self.stream) }?;
            self.settle()
        })
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn read(&self, offset: usize, target: &mut [u8]) -> Done {
        self.through(offset, target.len(), |at, count| {
            let device = self.address + (offset + at) as u64;
            let way = context::Way::ToHost;
            // SAFETY: inside the device memory by the assert; both are left alone until `settle` returns.
            unsafe { self.context.copy(way, self.pinned.host, device, count as u64, self.stream) }?;
            self.settle()?;
            let source: *const u8 = std::ptr::with_exposed_provenance(self.pinned.host);
            // SAFETY: the pinned buffer is ours, of `pinned.bytes`, and the copy into it has been done.
            unsafe { std::ptr::copy_nonoverlapping(source, target[at..].as_mut_ptr(), count) };
            Ok(())
        })
    }

    /// Bytes per second of plain copies between the device and memory that the driver has pinned: the ceiling.
    /// Copies of `bytes` each, for about `seconds`; `Both`: at once, in both directions.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If `bytes` do not fit twice.
    pub fn ceiling(&self, bytes: usize, way: Way, seconds: f64) -> Done<f64> {
        assert!(2 * bytes <= self.bytes, "2 * {bytes} of {}", self.bytes);
        let context = self.context.clone();
        context.within(|| {
            let host = context.alloc_host(2 * bytes)?.0.expose_provenance();
            let other = context.create_stream(false)?;
            let things = Things { streams: vec![other], host_memory: vec![host], ..Things::default() };
            let (began, mut copied) = (std::time::Instant::now(), 0u64);
            while copied == 0 || began.elapsed().as_secs_f64() < seconds {
                // Two in flight, so that the link never waits for us.
                for _ in 0..2 {
                    if way != Way::FromDevice {
                        // SAFETY: the pinned memory is ours until both streams are idle; inside the device memory
                        // by the assert.
                        unsafe { context.copy(context::Way::ToDevice, host, self.address, bytes as u64, self.stream) }?;
                        copied += bytes as u64;
                    }
                    if way != Way::ToDevice {
                        let (target, source) = match way {
                            Way::Both => (host + bytes, self.address + bytes as u64),
                            _ => (host, self.address),
                        };
                        // SAFETY: as above; to and fro touch different halves.
                        unsafe { context.copy(context::Way::ToHost, target, source, bytes as u64, other) }?;
                        copied += bytes as u64;
                    }
                }
                self.settle()?;
                while !context.is_idle(other)? {
                    std::hint::spin_loop();
                }
            }
            let rate = copied as f64 / began.elapsed().as_secs_f64();
            context.free(&things);
            Ok(rate)
        })
    }
}

/// An address that nobody has.
const NOWHERE: u64 = 16;

impl DeviceMemory {
    /// Launches the copy kernel over a piece that lies nowhere. The context is lost when it runs.
    ///
    /// # Errors
    /// What the driver says of the kernel.
    pub fn go_astray(&self) -> Done {
        let piece: Vec<u8> = [NOWHERE, NOWHERE, 64].into_iter().flat_map(u64::to_le_bytes).collect();
        self.write(0, &piece)?;
        let ptx = std::ffi::CStr::from_bytes_with_nul(PTX.as_bytes()).unwrap_or_default();
        let launched = self.context.within(|| {
            let kernel = self.context.load_kernel(ptx, KERNEL)?;
            // SAFETY: the list is ours and stays; that its piece is nowhere is what the caller wants: the device says so
            // and writes nothing.
            unsafe { self.context.launch_copy(kernel, 1, self.address, 1, self.stream) }
        });
        match launched {
            // It has run already.
            Err(error) if error.class() == Class::Sticky => Ok(()),
            launched => launched,
        }
    }
}

/// Which way plain copies go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum Way {
    ToDevice,
    FromDevice,
    Both,
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let things = Things {
            streams: vec![self.stream],
            device_memory: vec![self.address],
            host_memory: vec![self.pinned.host],
            ..Things::default()
        };
        // A context that is lost frees nothing; it is the end of the process anyway.
        let _ = self.context.within(|| {
            self.context.free(&things);
            Ok(())
        });
    }
}
