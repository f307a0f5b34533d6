//! Which way of copying is the fastest for what, on this device and this link: measured when the back end
//! starts, in some tens of milliseconds, over pinned memory of its own.

use std::time::{Duration, Instant};

use super::{CudaBackend, Done, Flight, Host, Mark, Pinned, Things};
use crate::backend::Direction;
use crate::driver::error::{Class, CudaError};
use crate::plan::{Calibration, Limits, Plan, Span};

/// Bytes of one measurement.
const BYTES: u64 = 4 << 20;
/// Spans of these sizes are compared.
const SPANS: [u64; 7] = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10];
/// Whole batches of these sizes are compared.
const BATCHES: [u64; 3] = [64 << 10, 256 << 10, 1 << 20];
/// Larger spans are the copy engine's, however small the batch.
const DIRECT_SPAN_MAX: u64 = 64 << 10;
/// Buffers that a measurement goes through: gathering the next has to overlap with copying the last, as it does in a
/// batch of many.
const BUFFERS: u64 = 4;
/// What is not done by then is not done: a driver that hangs at the start would hang later.
const AT_MOST: Duration = Duration::from_secs(10);
/// Another way has to be better by this much to be taken: it is more work for the device.
const MARGIN: f64 = 1.05;

struct Bench<'a> {
    backend: &'a mut CudaBackend,
    host: Pinned,
    device: u64,
    plan: Plan,
    until: Instant,
}

/// Measures. Nothing is in flight before or after.
pub(super) fn measure(backend: &mut CudaBackend) -> Done<Calibration> {
    let context = backend.context.clone();
    let (host, host_device) = context.alloc_host(BYTES as usize)?;
    let host = Pinned { host: host.expose_provenance(), device: host_device, bytes: BYTES as usize };
    // Rows lie at twice their width.
    let mut had = Things { host_memory: vec![host.host], ..Things::default() };
    let device = match context.alloc(2 * BYTES as usize) {
        Ok(device) => device,
        Err(error) => {
            context.free(&had);
            return Err(error);
        }
    };
    had.device_memory.push(device);
    // `within` has made it this thread's for as long as this takes.
    backend.thread = Some(std::thread::current().id());
    let until = Instant::now() + AT_MOST;
    let mut bench = Bench { backend, host, device, plan: Plan::default(), until };
    let measured = bench.measure();
    // The caller's thread goes its own way.
    bench.backend.thread = None;
    // What has not ended may still use it, and of a context that is lost nobody can tell.
    let is_lost = measured.as_ref().is_err_and(|error| matches!(error.class(), Class::Sticky | Class::Gone));
    if bench.backend.lanes.iter().all(|lane| lane.flights.is_empty()) && !is_lost {
        context.free(&had);
    }
    measured
}

impl Bench<'_> {
    fn measure(&mut self) -> Done<Calibration> {
        let mut best = Calibration::default();
        if self.backend.has_batch {
            let batched = Calibration { is_batched: true, ..best };
            best.is_batched =
                self.scattered(BYTES, 64 << 10, batched)? <= MARGIN * self.scattered(BYTES, 64 << 10, best)?;
        }
        let rows = Calibration { rows_min: 4, ..best };
        if self.rows(rows)? * MARGIN < self.rows(best)? {
            best.rows_min = 4;
        }
        if self.backend.kernel.is_some() && self.backend.staging_bytes > 0 {
            let staged = Calibration { staged_below_bytes: u64::MAX, ..best };
            let mut below = 0;
            for span in SPANS {
                if self.scattered(BYTES, span, staged)? * MARGIN >= self.scattered(BYTES, span, best)? {
                    // Larger ones gain less: what wins there is noise.
                    break;
                }
                below = span + 1;
            }
            best.staged_below_bytes = below;
            let mut below = 0;
            for bytes in BATCHES {
                let direct = Calibration { direct_below_bytes: u64::MAX, ..best };
                if self.scattered(bytes, 16 << 10, direct)? * MARGIN >= self.scattered(bytes, 16 << 10, best)? {
                    break;
                }
                below = bytes + 1;
            }
            best.direct_below_bytes = below;
            best.direct_span_max_bytes = DIRECT_SPAN_MAX;
        }
        Ok(best)
    }

    /// Pages of `span` bytes, together in the pool and apart on the device.
    fn scattered(&mut self, bytes: u64, span: u64, calibration: Calibration) -> Done<f64> {
        let count = bytes / span;
        let at = |index: u64| Span {
            host: index * span,
            device: self.device + (count - 1 - index) * span,
            bytes: span,
            allocation: 0,
        };
        let spans: Vec<Span> = (0..count).map(at).collect();
        self.both_ways(&spans, calibration)
    }

    /// Neighbours on the device that lie at equal distances in the pool.
    fn rows(&mut self, calibration: Calibration) -> Done<f64> {
        const WIDTH: u64 = 32 << 10;
        let count = BYTES / WIDTH / 2;
        let at = |index: u64| Span {
            host: 2 * index * WIDTH,
            device: self.device + index * WIDTH,
            bytes: WIDTH,
            allocation: 0,
        };
        let spans: Vec<Span> = (0..count).map(at).collect();
        self.both_ways(&spans, calibration)
    }

    /// Seconds, the median of three, to and fro.
    fn both_ways(&mut self, spans: &[Span], calibration: Calibration) -> Done<f64> {
        let mut sum = 0.0;
        for direction in [Direction::Load, Direction::Store] {
            let mut times = Vec::new();
            for _ in 0..4 {
                times.push(self.once(direction, spans, calibration)?);
            }
            // The first one warms up.
            let mut times = times.split_off(1);
            times.sort_by(f64::total_cmp);
            sum += times[1];
        }
        Ok(sum)
    }

    fn once(&mut self, direction: Direction, spans: &[Span], calibration: Calibration) -> Done<f64> {
        let lane = direction as usize;
        let staging_bytes = self.backend.staging_bytes.min(BYTES / BUFFERS);
        let limits = Limits { registration_bytes: u64::MAX, pitch_max: self.backend.pitch_max, staging_bytes };
        self.plan.make(&mut spans.to_vec(), &limits, &calibration);
        self.backend.calibration = calibration;
        let began = Instant::now();
        let begun = self.backend.execute(lane, &self.plan, &Host::Flat(self.host), None)?;
        // Refused in part: the rest is under way, and its end is waited for as any other's.
        let failed = begun.failed;
        let (number, begun) = self.backend.finish(lane, begun)?;
        self.backend.lanes[lane].flights.push_back(Flight {
            id: 0,
            number,
            has_failed: failed.is_some(),
            list: begun.list,
            mark: begun.mark,
            bounced: Vec::new(),
            registration: None,
        });
        let mut ended = Vec::new();
        while ended.is_empty() {
            let is_idle = begun.mark == Mark::Idle && self.backend.is_idle(lane)?;
            self.backend.land(lane, is_idle, &mut ended)?;
            if Instant::now() > self.until {
                return Err(CudaError { call: "a copy of 4 MiB has not ended; cuStreamQuery", code: 600 });
            }
            std::hint::spin_loop();
        }
        let took = began.elapsed().as_secs_f64();
        failed.map_or(Ok(took), Err)
    }
}
