//! From spans of bytes to copy operations. Pure: addresses are numbers, nothing is touched.
//!
//! A batch of blocks is a set of [`Span`]s, each so many bytes of device memory and as many of the pool.
//! What is neighbour to its neighbour on both sides becomes one span; then each stretch of the pool is
//! copied in the way that its spans are large enough for: as they are, as rows of one two-dimensional
//! copy, or in one piece from or into a staging buffer in device memory, which a kernel gathers or
//! scatters. A small batch is one launch of the kernel over mapped host memory.
//!
//! Whatever the way: every byte that was asked for is copied once, none else is, and no copy crosses the
//! end of a piece of the pool's registration.

use std::ops::Range;

/// Bytes to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// In the pool, from its start.
    pub host: u64,
    /// In device memory.
    pub device: u64,
    /// How many.
    pub bytes: u64,
    /// In which allocation of device memory: what a device copies within one it may refuse across two.
    pub allocation: u32,
}

/// What the device and the registration allow.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The pool is registered in pieces of this many bytes.
    pub registration_bytes: u64,
    /// Largest pitch of a two-dimensional copy.
    pub pitch_max: u64,
    /// Bytes of one staging buffer; 0 for none.
    pub staging_bytes: u64,
}

/// Which way is the fastest for what: measured at start-up, or said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calibration {
    /// A stretch of the pool whose spans are smaller than this on average is staged.
    pub staged_below_bytes: u64,
    /// A batch smaller than this goes through the kernel, over mapped host memory.
    pub direct_below_bytes: u64,
    /// And not if its spans are larger than this on average: the copy engine is as fast over those, and takes no
    /// processor from the engine's own kernels.
    pub direct_span_max_bytes: u64,
    /// As many rows make a two-dimensional copy; 0 for never.
    pub rows_min: u32,
    /// Linear copies are handed over in batches.
    pub is_batched: bool,
}

impl Default for Calibration {
    /// What is right where nothing has been measured: copies one by one, the way that every driver has.
    fn default() -> Self {
        Self {
            staged_below_bytes: 0,
            direct_below_bytes: 0,
            direct_span_max_bytes: u64::MAX,
            rows_min: 0,
            is_batched: false,
        }
    }
}

impl Calibration {
    /// One way for everything: `engine`, the copy engine over pages as they are; `staged`, a kernel that gathers and
    /// scatters them in device memory; `direct`, a kernel over mapped host memory. For benchmarks.
    pub fn of_way(name: &str) -> Option<Self> {
        let engine = Self { is_batched: true, ..Self::default() };
        match name {
            "engine" => Some(engine),
            "staged" => Some(Self { staged_below_bytes: u64::MAX, ..engine }),
            "direct" => Some(Self { direct_below_bytes: u64::MAX, ..engine }),
            _ => None,
        }
    }
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// A copy.
    Linear(Span),
    /// Copies at equal distances.
    Rows {
        /// The first.
        first: Span,
        /// How many.
        rows: u32,
        /// From one to the next, in the pool.
        host_pitch: u64,
        /// From one to the next, in device memory.
        device_pitch: u64,
    },
    /// A staging buffer's load: these ranges in [`Plan::ranges`] between the pool and the buffer, these
    /// pieces in [`Plan::pieces`] between the buffer and the pages.
    Staged {
        /// Of [`Plan::ranges`].
        ranges: Range<usize>,
        /// Of [`Plan::pieces`].
        pieces: Range<usize>,
    },
    /// These pieces between the pool and the pages, by the kernel.
    Direct {
        /// Of [`Plan::pieces`].
        pieces: Range<usize>,
    },
}

/// What to do for one batch.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In this order, though none waits for another.
    pub ops: Vec<Op>,
    /// Ranges of staged operations: `device` is from the start of the staging buffer.
    pub ranges: Vec<Span>,
    /// Pieces for the kernel: `host` is from the start of the staging buffer, or of the pool.
    pub pieces: Vec<Span>,
}

/// A warp copies a piece: small enough that few of them occupy many warps.
pub const PIECE_BYTES_MAX: u64 = 16 << 10;

impl Plan {
    /// Forgets what it held, keeps the room.
    fn clear(&mut self) {
        self.ops.clear();
        self.ranges.clear();
        self.pieces.clear();
    }

    /// Plans a batch anew. `spans` is used up. The result does not depend on their order.
    ///
    /// # Panics
    /// If two spans have a byte of the pool in common, which the caller has excluded.
    pub fn make(&mut self, spans: &mut Vec<Span>, limits: &Limits, calibration: &Calibration) {
        self.clear();
        spans.retain(|span| span.bytes > 0);
        spans.sort_unstable();
        merge(spans);
        cut(spans, limits.registration_bytes);
        let bytes: u64 = spans.iter().map(|span| span.bytes).sum();
        let is_small = bytes <= calibration.direct_span_max_bytes.saturating_mul(spans.len() as u64);
        if bytes < calibration.direct_below_bytes && is_small {
            self.add_pieces(spans.drain(..));
            self.ops.push(Op::Direct { pieces: 0..self.pieces.len() });
            return;
        }
        let linear = self.stage(spans, limits, calibration);
        self.add_copies(linear, limits, calibration);
    }

    fn add_pieces(&mut self, spans: impl Iterator<Item = Span>) {
        for span in spans {
            for at in (0..span.bytes).step_by(PIECE_BYTES_MAX as usize) {
                let bytes = PIECE_BYTES_MAX.min(span.bytes - at);
                self.pieces.push(Span { host: span.host + at, device: span.device + at, bytes, ..span });
            }
        }
    }

    /// Stages the stretches that are worth it; what is left is copied as it is.
    fn stage(&mut self, spans: &mut Vec<Span>, limits: &Limits, calibration: &Calibration) -> Vec<Span> {
        let mut linear = Vec::new();
        let mut filled = 0;
        let (mut ranges_from, mut pieces_from) = (0, 0);
        let mut rest = spans.as_slice();
        while !rest.is_empty() {
            let (stretch, after) = rest.split_at(stretch_len(rest, limits.registration_bytes));
            rest = after;
            let bytes: u64 = stretch.iter().map(|span| span.bytes).sum();
            let is_small = bytes < calibration.staged_below_bytes.saturating_mul(stretch.len() as u64);
            if limits.staging_bytes == 0 || stretch.len() < 2 || !is_small {
                linear.extend_from_slice(stretch);
                continue;
            }
            for span in stretch {
                // A span larger than what is left of the buffer is cut.
                let mut at = 0;
                while at < span.bytes {
                    if filled == limits.staging_bytes {
                        self.ops.push(Op::Staged {
                            ranges: ranges_from..self.ranges.len(),
                            pieces: pieces_from..self.pieces.len(),
                        });
                        (ranges_from, pieces_from, filled) = (self.ranges.len(), self.pieces.len(), 0);
                    }
                    let bytes = (span.bytes - at).min(limits.staging_bytes - filled);
                    let host = span.host + at;
                    let is_next = |range: &&mut Span| {
                        range.host + range.bytes == host
                            && host / limits.registration_bytes == range.host / limits.registration_bytes
                    };
                    match self.ranges[ranges_from..].last_mut().filter(is_next) {
                        Some(range) => range.bytes += bytes,
                        None => self.ranges.push(Span { host, device: filled, bytes, ..*span }),
                    }
                    self.add_pieces(std::iter::once(Span { host: filled, device: span.device + at, bytes, ..*span }));
                    filled += bytes;
                    at += bytes;
                }
            }
        }
        if filled > 0 {
            self.ops
                .push(Op::Staged { ranges: ranges_from..self.ranges.len(), pieces: pieces_from..self.pieces.len() });
        }
        spans.clear();
        linear
    }

    /// Copies as they are: rows where they lie at equal distances, in device memory's order.
    fn add_copies(&mut self, mut spans: Vec<Span>, limits: &Limits, calibration: &Calibration) {
        if calibration.rows_min > 1 {
            spans.sort_unstable_by_key(|span| (span.allocation, span.device));
        }
        let mut rest = spans.as_slice();
        while let Some(first) = rest.first() {
            let rows = if calibration.rows_min > 1 { rows_len(rest, limits) } else { 1 };
            if rows > 1 && rows >= calibration.rows_min as usize {
                let (host_pitch, device_pitch) = (rest[1].host - first.host, rest[1].device - first.device);
                self.ops.push(Op::Rows { first: *first, rows: rows as u32, host_pitch, device_pitch });
                rest = &rest[rows..];
            } else {
                self.ops.push(Op::Linear(*first));
                rest = &rest[1..];
            }
        }
    }
}

/// Joins spans that are neighbours on both sides. Sorted by the pool.
fn merge(spans: &mut Vec<Span>) {
    spans.dedup_by(|next, span| {
        assert!(span.host + span.bytes <= next.host, "spans overlap in the pool: {span:?} and {next:?}");
        let joins = span.allocation == next.allocation
            && span.host + span.bytes == next.host
            && span.device + span.bytes == next.device;
        if joins {
            span.bytes += next.bytes;
        }
        joins
    });
}

/// Cuts spans at the ends of registration pieces.
fn cut(spans: &mut Vec<Span>, registration_bytes: u64) {
    let piece = |at: u64| at / registration_bytes;
    if spans.iter().all(|span| piece(span.host) == piece(span.host + span.bytes - 1)) {
        return;
    }
    *spans = spans
        .iter()
        .flat_map(|span| {
            let mut at = span.host;
            std::iter::from_fn(move || {
                let end = span.host + span.bytes;
                let until = end.min((piece(at) + 1) * registration_bytes);
                let cut = Span { host: at, device: span.device + (at - span.host), bytes: until - at, ..*span };
                at = until;
                (cut.bytes > 0).then_some(cut)
            })
        })
        .collect();
}

/// How many of the first spans lie in the pool one after the other, in one piece of the registration.
fn stretch_len(spans: &[Span], registration_bytes: u64) -> usize {
    let joined = |pair: &&[Span]| {
        pair[0].host + pair[0].bytes == pair[1].host
            && pair[0].host / registration_bytes == pair[1].host / registration_bytes
    };
    1 + spans.windows(2).take_while(joined).count()
}

/// How many of the first spans make one two-dimensional copy.
fn rows_len(spans: &[Span], limits: &Limits) -> usize {
    let [first, second, ..] = spans else { return 1 };
    if first.allocation != second.allocation {
        return 1;
    }
    let (Some(host_pitch), device_pitch) = (second.host.checked_sub(first.host), second.device - first.device) else {
        return 1;
    };
    let pitches = first.bytes..=limits.pitch_max;
    if !pitches.contains(&host_pitch) || !pitches.contains(&device_pitch) {
        return 1;
    }
    let follows = |pair: &&[Span]| {
        pair[1].bytes == first.bytes
            && pair[1].allocation == first.allocation
            && pair[1].device - pair[0].device == device_pitch
            && pair[1].host.checked_sub(pair[0].host) == Some(host_pitch)
            && pair[1].host / limits.registration_bytes == first.host / limits.registration_bytes
    };
    1 + spans.windows(2).take_while(follows).count()
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Device address of every byte of the pool that is copied, by the plan's own account.
    fn bytes_of(plan: &Plan, limits: &Limits) -> BTreeMap<u64, u64> {
        let mut bytes = BTreeMap::new();
        let mut copy = |host: u64, device: u64, count: u64| {
            assert!(count > 0);
            assert_eq!(
                host / limits.registration_bytes,
                (host + count - 1) / limits.registration_bytes,
                "crosses a piece"
            );
            for at in 0..count {
                assert!(bytes.insert(host + at, device + at).is_none(), "byte {} is copied twice", host + at);
            }
        };
        for op in &plan.ops {
            match op {
                Op::Linear(span) => copy(span.host, span.device, span.bytes),
                Op::Rows { first, rows, host_pitch, device_pitch } => {
                    assert!(*rows > 1 && *host_pitch >= first.bytes && *device_pitch >= first.bytes);
                    assert!((*host_pitch).max(*device_pitch) <= limits.pitch_max);
                    let last = first.host + u64::from(rows - 1) * host_pitch;
                    assert_eq!(
                        last / limits.registration_bytes,
                        first.host / limits.registration_bytes,
                        "rows cross a piece"
                    );
                    for row in 0..u64::from(*rows) {
                        copy(first.host + row * host_pitch, first.device + row * device_pitch, first.bytes);
                    }
                }
                Op::Direct { pieces } => {
                    plan.pieces[pieces.clone()].iter().for_each(|piece| copy(piece.host, piece.device, piece.bytes));
                }
                Op::Staged { ranges, pieces } => {
                    let mut staged = BTreeMap::new();
                    for range in &plan.ranges[ranges.clone()] {
                        assert!(range.device + range.bytes <= limits.staging_bytes);
                        for at in 0..range.bytes {
                            assert!(staged.insert(range.device + at, range.host + at).is_none());
                        }
                        let last = range.host + range.bytes - 1;
                        assert_eq!(range.host / limits.registration_bytes, last / limits.registration_bytes);
                    }
                    for piece in &plan.pieces[pieces.clone()] {
                        assert!(piece.bytes <= PIECE_BYTES_MAX);
                        for at in 0..piece.bytes {
                            let host = staged.remove(&(piece.host + at)).expect("a staged byte has a place, once");
                            copy(host, piece.device + at, 1);
                        }
                    }
                    assert!(staged.is_empty(), "bytes of the pool are staged that no page has");
                }
            }
        }
        bytes
    }

    fn batch() -> impl Strategy<Value = (Vec<Span>, Limits, Calibration)> {
        let shape = (1u64..6, 1u64..5, 1u64..40, 0u64..8, 0u64..3, prop::collection::btree_set(0u64..24, 1..12));
        let limits = (20u64..400, 1u64..300, prop::sample::select(vec![0u64, 7, 64, 1000]));
        let calibration = (0u64..60, 0u64..300, 0u32..5);
        (shape, limits, calibration, any::<u64>()).prop_map(|(shape, limits, calibration, shuffle)| {
            let (layers, parts, page, gap, order, slots) = shape;
            let mut random = shuffle;
            let mut draw = move |below: u64| {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (random >> 33) % below
            };
            let block = layers * parts * page + gap;
            let mut spans = Vec::new();
            let mut free: Vec<u64> = (0..24).collect();
            for slot in slots {
                // Pages in order on a new pool, anywhere on an old one.
                let at = if order == 0 { 0 } else { draw(free.len() as u64) as usize };
                let device_block = free.remove(at);
                for layer in 0..layers {
                    for part in 0..parts {
                        let device = match order {
                            2 => 10_000 + ((device_block * layers + layer) * parts + part) * page,
                            _ => 10_000 + ((layer * parts + part) * 24 + device_block) * page,
                        };
                        let host = slot * block + (layer * parts + part) * page;
                        spans.push(Span { host, device, bytes: page, allocation: layer as u32 });
                    }
                }
            }
            for i in (1..spans.len()).rev() {
                spans.swap(i, draw(i as u64 + 1) as usize);
            }
            let (registration_bytes, pitch_max, staging_bytes) = limits;
            let (staged_below_bytes, direct_below_bytes, rows_min) = calibration;
            let calibration = Calibration {
                staged_below_bytes,
                direct_below_bytes,
                direct_span_max_bytes: 64 << 10,
                rows_min,
                is_batched: true,
            };
            (spans, Limits { registration_bytes, pitch_max, staging_bytes }, calibration)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn every_byte_asked_for_is_copied_once_and_none_else((spans, limits, calibration) in batch()) {
            let mut expected = BTreeMap::new();
            for span in &spans {
                expected.extend((0..span.bytes).map(|at| (span.host + at, span.device + at)));
            }
            let mut plan = Plan::default();
            plan.make(&mut spans.clone(), &limits, &calibration);
            prop_assert_eq!(bytes_of(&plan, &limits), expected);
            let mut again = Plan::default();
            again.make(&mut spans.into_iter().rev().collect(), &limits, &calibration);
            prop_assert_eq!(again, plan, "the order of spans means nothing");
        }
    }

    const LIMITS: Limits = Limits { registration_bytes: 1 << 30, pitch_max: (1 << 31) - 1, staging_bytes: 8 << 20 };

    #[test]
    fn a_block_that_lies_together_is_one_copy_and_neighbours_are_one() {
        let mut spans: Vec<Span> = (0..64)
            .map(|page| Span { host: page * 4096, device: (1 << 40) + page * 4096, bytes: 4096, allocation: 0 })
            .collect();
        let mut plan = Plan::default();
        plan.make(&mut spans, &LIMITS, &Calibration { staged_below_bytes: 64 << 10, ..Calibration::default() });
        assert_eq!(plan.ops, [Op::Linear(Span { host: 0, device: 1 << 40, bytes: 64 * 4096, allocation: 0 })]);
    }

    #[test]
    fn small_pages_of_many_layers_are_staged_and_cross_the_bus_as_one() {
        // Llama-3-70B at TP8: 80 layers of 8 KiB; four blocks in four slots, one after the other.
        let page = |slot: u64, layer: u64| Span {
            host: (slot * 80 + layer) * 8192,
            device: (layer << 32) + (slot * 7 % 64) * 8192,
            bytes: 8192,
            allocation: layer as u32,
        };
        let mut spans: Vec<Span> = (0..4).flat_map(|slot| (0..80).map(move |layer| page(slot, layer))).collect();
        let mut plan = Plan::default();
        plan.make(&mut spans, &LIMITS, &Calibration { staged_below_bytes: 64 << 10, ..Calibration::default() });
        assert_eq!(plan.ops, [Op::Staged { ranges: 0..1, pieces: 0..320 }]);
        assert_eq!(plan.ranges, [Span { host: 0, device: 0, bytes: 4 * 80 * 8192, allocation: 0 }]);
    }

    #[test]
    fn adjacent_blocks_are_rows_of_each_layer() {
        let page = |block: u64, layer: u64| Span {
            host: (block * 2 + layer) * 65536,
            device: (layer << 20) + block * 65536,
            bytes: 65536,
            allocation: layer as u32,
        };
        let mut spans: Vec<Span> = (0..8).flat_map(|block| (0..2).map(move |layer| page(block, layer))).collect();
        let mut plan = Plan::default();
        plan.make(&mut spans, &LIMITS, &Calibration { rows_min: 4, ..Calibration::default() });
        let rows = |layer| Op::Rows { first: page(0, layer), rows: 8, host_pitch: 131072, device_pitch: 65536 };
        assert_eq!(plan.ops, [rows(0), rows(1)]);
    }
}
