//! vLLM's way of copying, written anew to be measured beside ours: `swap_blocks`, a call for every page of every layer,
//! and `swap_blocks_batch`, the addresses of all of them in calls of as many as drivers survive. Nothing is merged,
//! staged, or bounded by bytes; the pool is pinned as ours is. For trials.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::registration::{Registration, State};
use super::{BATCH_CALL_MAX, CudaUnavailable, Done, Options, Things};
use crate::backend::tensors::Tensors;
use crate::backend::{Batch, BatchId, CopyBackend, Direction, Outcome, Refusal, Shape};
use crate::driver::api::DriverApi;
use crate::driver::context::{BatchArguments, Context, Event, Stream, Way};
use crate::driver::error::{CudaError, NOT_SUPPORTED};

/// Copies page by page.
pub struct Swap {
    context: Arc<Context>,
    tensors: Tensors,
    is_batched: bool,
    streams: [Stream; 2],
    flights: [VecDeque<(BatchId, Event)>; 2],
    events: Vec<Event>,
    registration: Option<Registration>,
    things: Things,
    arguments: BatchArguments,
    trouble: Vec<String>,
}

impl Swap {
    /// On a device, in one call for many pages or in one for each.
    ///
    /// # Errors
    /// No driver, no device, or one that has no such call.
    pub fn new(tensors: Tensors, options: &Options, is_batched: bool) -> Result<Self, CudaUnavailable> {
        let api = DriverApi::load(options.driver.as_deref())?;
        let device = options.device;
        let start = |error| CudaUnavailable::Start { device, error };
        if is_batched && api.batch_copy.is_none() {
            return Err(start(CudaError { call: "cuMemcpyBatchAsync", code: NOT_SUPPORTED }));
        }
        let context = Arc::new(Context::retain(api, device).map_err(start)?);
        let streams = context.within(|| Ok([context.create_stream(false)?, context.create_stream(false)?]));
        let streams = streams.map_err(start)?;
        Ok(Self {
            context,
            tensors,
            is_batched,
            streams,
            flights: [VecDeque::new(), VecDeque::new()],
            events: Vec::new(),
            registration: None,
            things: Things { streams: streams.to_vec(), ..Things::default() },
            arguments: BatchArguments::default(),
            trouble: Vec::new(),
        })
    }

    /// The device's name, and the driver.
    pub fn describe(&self) -> String {
        format!("{} ({:?})", self.context.device_name(), self.context)
    }

    /// Whether all of a batch's slots are pinned; what is not yet is asked for.
    fn is_pinned(&mut self, batch: &Batch<'_>) -> Result<bool, Refusal> {
        let pool = batch.pool;
        if self.registration.is_none() {
            // In one piece: no page ends where another begins.
            let bytes = pool.mapping().bytes().next_multiple_of(4096);
            let made = Registration::new(self.context.clone(), pool.clone(), bytes);
            self.registration = Some(made.map_err(|error| Refusal::Broken(error.to_string()))?);
        }
        let mut is_pinned = true;
        for block in batch.blocks {
            let state = self
                .registration
                .as_ref()
                .map(|registration| registration.state_of(pool.offset_of(block.slot), pool.slot_bytes(), true));
            match state {
                Some(State::Ready(_)) => {}
                Some(State::Failed) => return Err(Refusal::Broken("the pool cannot be pinned".into())),
                Some(State::Pending) | None => is_pinned = false,
            }
        }
        Ok(is_pinned)
    }

    fn copy_all(&mut self, batch: &Batch<'_>) -> Done {
        let (placement, context) = (self.tensors.placement().clone(), self.context.clone());
        let Some(registration) = &self.registration else { return Ok(()) };
        let stream = self.streams[batch.direction as usize];
        let way = if batch.direction == Direction::Load { Way::ToDevice } else { Way::ToHost };
        let BatchArguments { targets, sources, sizes } = &mut self.arguments;
        targets.clear();
        sources.clear();
        sizes.clear();
        let mut copied = Ok(());
        for layer in batch.tensors.clone() {
            for block in batch.blocks {
                let slot_at = batch.pool.offset_of(block.slot);
                placement.copies(block.pages, layer..layer + 1, |page| {
                    let (at, far, bytes) = (slot_at + page.offset_in_slot, page.address as u64, page.bytes);
                    if self.is_batched {
                        let near = registration.device_address(at as u64);
                        targets.push(if way == Way::ToDevice { far } else { near });
                        sources.push(if way == Way::ToDevice { near } else { far });
                        sizes.push(bytes);
                    } else if copied.is_ok() {
                        // SAFETY: a page of `Tensors` and the registered pool, both the batch's until it has landed.
                        copied =
                            unsafe { context.copy(way, registration.address(at, bytes), far, bytes as u64, stream) };
                    }
                });
            }
        }
        while copied.is_ok() && !sizes.is_empty() {
            let count = sizes.len().min(BATCH_CALL_MAX);
            let mut some = BatchArguments {
                targets: targets.drain(..count).collect(),
                sources: sources.drain(..count).collect(),
                sizes: sizes.drain(..count).collect(),
            };
            // SAFETY: as above; trials free no memory under it.
            copied = unsafe { context.copy_batch(&mut some, stream) }.unwrap_or(Ok(()));
        }
        copied
    }

    fn mark(&mut self, lane: usize) -> Done<Event> {
        let event = match self.events.pop() {
            Some(event) => event,
            None => self.context.create_event().inspect(|event| self.things.events.push(*event))?,
        };
        self.context.record(event, self.streams[lane]).map(|()| event)
    }
}

impl CopyBackend for Swap {
    fn shape(&self) -> Shape {
        self.tensors.shape()
    }

    fn room(&self, direction: Direction, _tensors: &Range<u32>) -> usize {
        // A transfer at a time, and all of it.
        if self.flights[direction as usize].is_empty() { usize::MAX } else { 0 }
    }

    fn submit(&mut self, id: BatchId, batch: &Batch<'_>) -> Result<usize, Refusal> {
        let lane = batch.direction as usize;
        if !self.flights[lane].is_empty() || !self.is_pinned(batch)? {
            return Err(Refusal::Full);
        }
        let submitted = self.context.make_current().and_then(|()| self.copy_all(batch)).and_then(|()| self.mark(lane));
        match submitted {
            Ok(event) => {
                self.flights[lane].push_back((id, event));
                Ok(batch.blocks.len())
            }
            Err(error) => Err(Refusal::Broken(error.to_string())),
        }
    }

    fn poll(&mut self, ended: &mut Vec<(BatchId, Outcome)>) {
        for lane in 0..2 {
            let Some((id, event)) = self.flights[lane].front().copied() else { continue };
            let outcome = match self.context.make_current().and_then(|()| self.context.has_happened(event)) {
                Ok(false) => continue,
                Ok(true) => Outcome::Copied,
                Err(error) => {
                    self.trouble.push(error.to_string());
                    Outcome::Unknown
                }
            };
            self.flights[lane].pop_front();
            self.events.push(event);
            ended.push((id, outcome));
        }
    }

    fn nap(&self) -> Duration {
        Duration::from_micros(50)
    }

    fn trouble(&self) -> Vec<String> {
        self.trouble.clone()
    }

    fn close(&mut self, drained: bool) {
        let registration = self.registration.take();
        if !drained || !self.trouble.is_empty() || self.flights.iter().any(|flights| !flights.is_empty()) {
            return registration.iter().for_each(Registration::leave);
        }
        let context = self.context.clone();
        let _ = context.within(|| {
            drop(registration);
            context.free(&std::mem::take(&mut self.things));
            Ok(())
        });
        context.release();
    }
}
