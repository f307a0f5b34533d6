//! Copies through a back end over memory of our own: checked byte by byte, and timed. What `kvring bench
//! copy` and `kvring selftest` are made of.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvring_ipc::client::Pool;
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};

use crate::backend::cuda::memory::{DeviceMemory, Way};
use crate::backend::cuda::swap::Swap;
use crate::backend::cuda::{CudaBackend, Options};
use crate::backend::host::HostBackend;
use crate::backend::tensors::{HostTensors, Tensors};
use crate::backend::{Batch, BlockCopy, CopyBackend, Direction, Outcome, Refusal};
use crate::driver::api::DriverApi;
use crate::driver::context::Context;
use crate::layout::{GroupMap, MemoryMap, TensorMap};
use crate::plan::Calibration;

/// What blocks look like.
#[derive(Debug, Clone)]
pub struct Shape {
    /// For people.
    pub name: &'static str,
    /// Tensors, of which a block has a page each.
    pub layers: usize,
    /// Bytes of one page: a multiple of 2.
    pub page_bytes: usize,
    /// A block's layers lie together, block after block; else layer after layer.
    pub is_block_first: bool,
    /// Blocks of one copy.
    pub blocks_count: usize,
}

impl Shape {
    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.page_bytes
    }

    /// Bytes of one copy.
    pub fn bytes(&self) -> usize {
        self.blocks_count * self.block_bytes()
    }

    /// Pages of one layer: twice as many as are copied, so that they can lie apart.
    fn pages_count(&self) -> usize {
        2 * self.blocks_count
    }

    fn memory_bytes(&self) -> usize {
        self.pages_count() * self.block_bytes()
    }

    fn page_at(&self, layer: usize, page: usize) -> usize {
        match self.is_block_first {
            true => page * self.block_bytes() + layer * self.page_bytes,
            false => (layer * self.pages_count() + page) * self.page_bytes,
        }
    }

    fn map(&self, address: usize) -> MemoryMap {
        let tensor = |layer: usize| {
            let at = self.page_at(layer, 0);
            TensorMap {
                address: address + at,
                bytes: self.memory_bytes() - at,
                pages_count: self.pages_count(),
                page_stride_bytes: self.page_at(0, 1),
                shape: vec![self.page_bytes / 2],
                strides_bytes: vec![2],
                element_bytes: 2,
            }
        };
        let groups = vec![GroupMap { pages_per_block: 1, tensors: (0..self.layers).map(tensor).collect() }];
        MemoryMap { offset_in_slot: 0, groups }
    }
}

/// Which pages a copy has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scatter {
    /// Anywhere.
    Random,
    /// In runs of this many neighbours.
    Runs(usize),
}

/// Who copies.
#[derive(Debug, Clone)]
pub enum Who {
    /// The processor, with so many threads, past the caches from so many bytes on.
    Cpu {
        /// 0: the thread that polls.
        threads: usize,
        /// `usize::MAX` for never.
        non_temporal_from_bytes: usize,
    },
    /// A device.
    Cuda(Options),
    /// A device, page by page as vLLM has it ([`Swap`]).
    Swap {
        /// Which device.
        options: Options,
        /// Many pages in one call.
        is_batched: bool,
    },
}

enum Memory {
    Host(Mapping),
    Device(DeviceMemory),
    /// It was freed ([`Trial::free_memory`]).
    Gone,
}

/// How a copy went.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// From the first submission to the last end.
    pub took: Duration,
    /// Of that, in submissions.
    pub submitting: Duration,
}

/// A back end over memory of its own.
pub struct Trial {
    backend: Box<dyn CopyBackend>,
    calibration: Option<Calibration>,
    described: String,
    memory: Memory,
    pool: Pool,
    pool_file: OwnedFd,
    pages: Pages,
    words: Option<OwnedFd>,
    shape: Shape,
    slots: Range<usize>,
    next: u64,
    random: u64,
}

type Done<T = ()> = Result<T, Box<dyn std::error::Error>>;

impl Trial {
    /// Memory for twice the blocks of one copy, a pool for as many.
    ///
    /// # Errors
    /// No memory, no device.
    pub fn new(who: &Who, shape: &Shape) -> Done<Self> {
        let pool_bytes = shape.memory_bytes();
        let (pool_file, mapping, pages) = pool_of(pool_bytes)?;
        let pool = Pool::new(Arc::new(mapping), shape.block_bytes(), shape.pages_count() as u32);
        Self::over(who, shape, pool, pool_file, pages)
    }

    /// Over a pool that exists.
    ///
    /// # Errors
    /// As [`Trial::new`].
    pub fn over(who: &Who, shape: &Shape, pool: Pool, pool_file: OwnedFd, pages: Pages) -> Done<Self> {
        let (memory, address, context) = match who {
            Who::Cpu { .. } => {
                let mapping = Mapping::private(shape.memory_bytes())?;
                mapping.advise_hugepages();
                mapping.populate(0, shape.memory_bytes())?;
                let address = mapping.address(0, 1).expose_provenance();
                (Memory::Host(mapping), address, None)
            }
            Who::Cuda(options) | Who::Swap { options, .. } => {
                let api = DriverApi::load(options.driver.as_deref())?;
                let context = Arc::new(Context::retain(api, options.device)?);
                let memory = DeviceMemory::new(context.clone(), shape.memory_bytes())?;
                let address = memory.address();
                (Memory::Device(memory), address, Some(context))
            }
        };
        // SAFETY: the memory is this value's and dropped after the back end has been closed; it is read and
        // written here only while nothing is in flight.
        let tensors = unsafe { Tensors::new(&shape.map(address)) }?;
        let (mut calibration, mut described, mut words) = (None, "the processor".to_string(), None);
        let backend: Box<dyn CopyBackend> = match who {
            Who::Cpu { threads, non_temporal_from_bytes } => {
                let memory = HostTensors::with_non_temporal_from(tensors, *non_temporal_from_bytes);
                Box::new(HostBackend::with_threads(memory, *threads)?)
            }
            Who::Swap { options, is_batched } => {
                let backend = Swap::new(tensors, options, *is_batched)?;
                described = backend.describe();
                Box::new(backend)
            }
            Who::Cuda(options) => {
                let backend = CudaBackend::new(tensors, options.clone())?;
                calibration = Some(backend.calibration());
                described = backend.describe();
                words = Some(backend.words_file().try_clone()?);
                Box::new(backend)
            }
        };
        drop(context);
        let (shape, slots) = (shape.clone(), 0..shape.pages_count());
        let (next, random) = (0, 1);
        Ok(Self { backend, calibration, described, memory, pool, pool_file, pages, words, shape, slots, next, random })
    }

    /// Leaves slots to others that have the same pool: of two parts this one.
    pub fn take_half(&mut self, half: usize) {
        let slots = self.shape.blocks_count;
        self.slots = half * slots..(half + 1) * slots;
    }

    /// The memory of a device's completion words ([`CudaBackend::words_file`]).
    pub fn words(&self) -> Option<&OwnedFd> {
        self.words.as_ref()
    }

    /// Fills the memory that is copied with a byte. Nothing may be in flight.
    ///
    /// # Errors
    /// What the driver says.
    pub fn fill(&self, byte: u8) -> Done {
        self.write(0, &vec![byte; self.shape.memory_bytes()])
    }

    /// Fills the memory that is copied with random bytes. Nothing may be in flight.
    ///
    /// # Errors
    /// What the driver says.
    pub fn fill_with_noise(&self, seed: u64) -> Done {
        self.write(0, &noise(seed, self.shape.memory_bytes()))
    }

    /// Frees the memory that is copied, under the back end's feet, as an engine with a bug does.
    pub fn free_memory(&mut self) {
        self.memory = Memory::Gone;
    }

    /// A kernel in the same context touches memory that is not there, as an engine with a bug does: the context is lost.
    ///
    /// # Errors
    /// There is no device, or it does not take the kernel.
    pub fn go_astray(&self) -> Done {
        match &self.memory {
            Memory::Device(memory) => Ok(memory.go_astray()?),
            Memory::Host(_) | Memory::Gone => Err("there is no device".into()),
        }
    }

    /// What the back end has measured, if it has.
    pub fn calibration(&self) -> Option<Calibration> {
        self.calibration
    }

    /// Who copies.
    pub fn describe(&self) -> &str {
        &self.described
    }

    /// The pool, and its file.
    pub fn pool(&self) -> (&Pool, &OwnedFd, Pages) {
        (&self.pool, &self.pool_file, self.pages)
    }

    /// What an operator should know.
    pub fn trouble(&self) -> Vec<String> {
        self.backend.trouble()
    }

    fn draw(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.random >> 33) as usize % below
    }

    /// Slots and pages for one copy: the slots as a pool hands them out, the pages as an engine does.
    pub fn choose(&mut self, scatter: Scatter) -> Vec<(u32, u32)> {
        let (count, run) = (self.shape.blocks_count, if let Scatter::Runs(run) = scatter { run.max(1) } else { 1 });
        let first_slot = self.slots.start + self.draw(self.slots.len() - count + 1);
        let mut starts: Vec<usize> = (0..self.shape.pages_count() / run).map(|at| at * run).collect();
        for i in (1..starts.len()).rev() {
            let other = self.draw(i + 1);
            starts.swap(i, other);
        }
        let pages = starts.into_iter().flat_map(|start| start..start + run);
        let slots = first_slot..first_slot + count;
        slots.zip(pages).map(|(slot, page)| (slot as u32, page as u32)).collect()
    }

    /// Begins to copy; says how many blocks were not taken, for want of room or of a device.
    ///
    /// # Errors
    /// The back end is broken.
    pub fn submit(&mut self, direction: Direction, blocks: &[(u32, u32)]) -> Done<usize> {
        let pages: Vec<[u32; 1]> = blocks.iter().map(|(_, page)| [*page]).collect();
        let blocks: Vec<BlockCopy<'_>> =
            blocks.iter().zip(&pages).map(|((slot, _), pages)| BlockCopy { slot: *slot, pages }).collect();
        let tensors = 0..self.shape.layers as u32;
        let batch = Batch { direction, pool: &self.pool, blocks: &blocks, tensors, after: None };
        match self.backend.submit(self.next, &batch) {
            Ok(taken) => {
                self.next += 1;
                Ok(blocks.len() - taken)
            }
            Err(Refusal::Full) => Ok(blocks.len()),
            Err(Refusal::Broken(why)) => Err(why.into()),
        }
    }

    /// How many batches have ended since the last call.
    ///
    /// # Errors
    /// One has not been copied.
    pub fn poll(&mut self) -> Done<usize> {
        let mut ended = Vec::new();
        self.backend.poll(&mut ended);
        match ended.iter().find(|(_, outcome)| *outcome != Outcome::Copied) {
            Some((id, outcome)) => Err(format!("batch {id}: {outcome:?}; {:?}", self.backend.trouble()).into()),
            None => Ok(ended.len()),
        }
    }

    /// Copies, and waits for the end: loads and stores at once, where both are given.
    ///
    /// # Errors
    /// A batch that was not copied, or none that ends within half a minute.
    pub fn copy(&mut self, work: &[(Direction, &[(u32, u32)])]) -> Done<Timing> {
        let mut rest: Vec<(Direction, &[(u32, u32)])> = work.to_vec();
        let (began, mut submitting, mut in_flight) = (Instant::now(), Duration::ZERO, 0);
        loop {
            for (direction, blocks) in &mut rest {
                while !blocks.is_empty() {
                    let at = Instant::now();
                    // As the agent offers them.
                    let room = self.backend.room(*direction, &(0..self.shape.layers as u32));
                    if room == 0 {
                        break;
                    }
                    let offered = &blocks[..blocks.len().min(room)];
                    let left = self.submit(*direction, offered)?;
                    if left == offered.len() {
                        break;
                    }
                    submitting += at.elapsed();
                    in_flight += 1;
                    *blocks = &blocks[offered.len() - left..];
                }
            }
            in_flight -= self.poll()?;
            if in_flight == 0 && rest.iter().all(|(_, blocks)| blocks.is_empty()) {
                return Ok(Timing { took: began.elapsed(), submitting });
            }
            if began.elapsed() > Duration::from_secs(30) {
                return Err(format!("{in_flight} batches do not end: {:?}", self.backend.trouble()).into());
            }
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Done {
        match &self.memory {
            Memory::Host(mapping) => mapping.copy_in(offset, bytes),
            Memory::Device(memory) => memory.write(offset, bytes)?,
            Memory::Gone => return Err("its memory was freed".into()),
        }
        Ok(())
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) -> Done {
        match &self.memory {
            Memory::Host(mapping) => mapping.copy_out(offset, bytes),
            Memory::Device(memory) => memory.read(offset, bytes)?,
            Memory::Gone => return Err("its memory was freed".into()),
        }
        Ok(())
    }

    /// Random bytes in memory and in the pool; a copy; every byte compared, those too that nobody copied.
    ///
    /// # Errors
    /// The first difference, or what kept the copy from being made.
    pub fn check(&mut self, direction: Direction, scatter: Scatter, seed: u64) -> Done {
        self.random = seed | 1;
        let bytes = self.shape.memory_bytes();
        // Of the pool its slots: the others may be somebody else's.
        let pool_at = self.slots.start * self.shape.block_bytes();
        let (memory, pool) = (noise(seed, bytes), noise(!seed, self.slots.len() * self.shape.block_bytes()));
        self.write(0, &memory)?;
        self.pool.mapping().copy_in(pool_at, &pool);
        let blocks = self.choose(scatter);
        self.copy(&[(direction, &blocks)])?;
        let (mut expected_memory, mut expected_pool) = (memory, pool);
        for (slot, page) in &blocks {
            for layer in 0..self.shape.layers {
                let in_memory = self.shape.page_at(layer, *page as usize);
                let in_pool = *slot as usize * self.shape.block_bytes() + layer * self.shape.page_bytes - pool_at;
                let bytes = self.shape.page_bytes;
                match direction {
                    Direction::Load => {
                        expected_memory[in_memory..][..bytes].copy_from_slice(&expected_pool[in_pool..][..bytes]);
                    }
                    Direction::Store => {
                        expected_pool[in_pool..][..bytes].copy_from_slice(&expected_memory[in_memory..][..bytes]);
                    }
                }
            }
        }
        let (mut memory, mut pool) = (vec![0; bytes], vec![0; expected_pool.len()]);
        self.read(0, &mut memory)?;
        self.pool.mapping().copy_out(pool_at, &mut pool);
        for (what, is, expected) in [("memory", memory, expected_memory), ("pool", pool, expected_pool)] {
            if is != expected {
                let at = is.iter().zip(&expected).take_while(|(is, expected)| is == expected).count();
                return Err(
                    format!("byte {at} of the {what} is wrong: seed {seed}, {direction:?}, {:?}", self.shape).into()
                );
            }
        }
        Ok(())
    }

    /// Bytes per second of plain copies of as many bytes between the same memories: what no way of copying
    /// can be much faster than. The whole of a copy in one piece for a device, block by block for a processor.
    ///
    /// # Errors
    /// What the driver says.
    pub fn ceiling(&self, direction: Option<Direction>, seconds: f64) -> Done<f64> {
        match &self.memory {
            Memory::Host(mapping) => {
                let block = self.shape.block_bytes();
                let pool = self.pool.mapping();
                let (began, mut copied) = (Instant::now(), 0usize);
                while copied == 0 || began.elapsed().as_secs_f64() < seconds {
                    for at in (0..self.shape.blocks_count * block).step_by(block) {
                        let (source, target) = (pool.address(at, block), mapping.address(at, block));
                        let (source, target) =
                            if direction == Some(Direction::Store) { (target, source) } else { (source, target) };
                        // SAFETY: both are mappings of ours, checked by `address`; nothing is in flight.
                        unsafe { std::ptr::copy_nonoverlapping(source, target, block) };
                        copied += block;
                    }
                }
                Ok(copied as f64 / began.elapsed().as_secs_f64())
            }
            Memory::Device(memory) => {
                let way = match direction {
                    Some(Direction::Load) => Way::ToDevice,
                    Some(Direction::Store) => Way::FromDevice,
                    None => Way::Both,
                };
                let bytes = (self.shape.memory_bytes() / 2).min(256 << 20) & !4095;
                // Not the pool: the back end has pinned it already, or will, piece by piece.
                Ok(memory.ceiling(bytes, way, seconds)?)
            }
            Memory::Gone => Err("its memory was freed".into()),
        }
    }

    /// Ends it: nothing may be in flight.
    pub fn close(&mut self) {
        self.backend.close(true);
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.close();
    }
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let (mut random, mut noise) = (seed | 1, vec![0; bytes]);
    for word in noise.chunks_mut(4) {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        word.copy_from_slice(&((random >> 29) as u32).to_le_bytes()[..word.len()]);
    }
    noise
}

/// How long a device's driver takes to pin so many bytes, and to let them go.
///
/// # Errors
/// What the driver says, or the kernel.
pub fn pinning(options: &Options, bytes: usize, pages: Pages) -> Done<[Duration; 2]> {
    let length = (bytes as u64).next_multiple_of(pages.bytes());
    let mapping = Mapping::new(sealed_memfd("kvring-trial", length, pages)?, length as usize)?;
    mapping.populate(0, length as usize)?;
    pinning_of(options, mapping)
}

/// The same, of memory that is there; it is given up.
///
/// # Errors
/// What the driver says.
pub fn pinning_of(options: &Options, mapping: Mapping) -> Done<[Duration; 2]> {
    let context = Context::retain(DriverApi::load(options.driver.as_deref())?, options.device)?;
    let length = mapping.bytes();
    let address = mapping.address(0, length);
    let mut took = [Duration::ZERO; 2];
    let timed = context.within(|| {
        let began = Instant::now();
        // SAFETY: mapped until it has been unregistered: if that fails it is kept for ever, below.
        unsafe { context.register(address, length) }?;
        took[0] = began.elapsed();
        context.unregister(address)?;
        took[1] = began.elapsed() - took[0];
        Ok(())
    });
    if let Err(error) = timed {
        std::mem::forget(mapping);
        return Err(error.into());
    }
    context.release();
    Ok(took)
}

/// A pool of so many bytes, on hugepages if there are enough.
///
/// # Errors
/// What the kernel says.
pub fn pool_of(bytes: usize) -> Done<(OwnedFd, Mapping, Pages)> {
    let make = |pages: Pages| -> rustix::io::Result<(OwnedFd, Mapping)> {
        let length = (bytes as u64).next_multiple_of(pages.bytes());
        let file = sealed_memfd("kvring-trial", length, pages)?;
        let mapping = Mapping::new(&file, length as usize)?;
        mapping.populate(0, length as usize)?;
        Ok((file, mapping))
    };
    let (made, pages) = match make(Pages::Huge2M) {
        Ok(made) => (made, Pages::Huge2M),
        Err(_) => (make(Pages::Small)?, Pages::Small),
    };
    Ok((made.0, made.1, pages))
}
