//! `kvring bench copy`: copies between a pool and an instance's memory, by every way there is, beside plain
//! copies of as many bytes in the same run. With a device, its copy engines; without one, the processor.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use kvring_gpu::agent::{Agent, Load, Patience};
use kvring_gpu::backend::Direction;
use kvring_gpu::backend::cuda::Options;
use kvring_gpu::backend::host::{HostBackend, HostMemory};
use kvring_gpu::plan::Calibration;
use kvring_gpu::trial::{Scatter, Shape, Trial, Who};
use kvring_ipc::instance::Instance;
use kvring_ipc::layout::Layout;
use kvring_ipc::wire::LeaseId;
use serde_json::{Value, json};

use super::{BenchServer, Measured, Run, median, percentiles, rounded};

/// Arguments of `kvring bench copy`.
#[derive(Args, Default)]
pub struct CopyArgs {
    /// A CUDA device by its number; without, the processor copies.
    #[arg(long, value_name = "N")]
    device: Option<i32>,
    /// The CUDA driver's library, where it is not found by itself.
    #[arg(long, value_name = "PATH")]
    cuda_driver: Option<PathBuf>,
    /// MiB of one copy, about.
    #[arg(long, default_value_t = 128)]
    size_mb: usize,
    /// Rounds of each measurement: the median counts.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Only shapes whose name contains this.
    #[arg(long)]
    shape: Option<String>,
    /// Chunks of 8 KiB to 2 MiB instead of models' pages.
    #[arg(long)]
    sweep: bool,
}

const KIB: usize = 1 << 10;

/// Models as ranks see them: pages of 16 tokens, keys and values together. Of Llama-3-70B at
/// TP8, say: 8 / 8 heads × 128 elements × 2 bytes × 2 (keys and values) × 16 tokens = 8 KiB a layer.
const SHAPES: &[(&str, usize, usize, bool)] = &[
    ("64 KiB pages of 32 layers (8B TP1)", 32, 64 * KIB, false),
    ("16 KiB pages of 80 layers (70B TP4)", 80, 16 * KIB, false),
    ("8 KiB pages of 80 layers (70B TP8)", 80, 8 * KIB, false),
    ("18 KiB pages of 61 layers (MLA)", 61, 18 * KIB, false),
    ("10.25 KiB pages of 61 layers (MLA fp8)", 61, 10496, false),
    ("2 MiB blocks (8B TP1, block first)", 32, 64 * KIB, true),
    ("640 KiB blocks (70B TP8, block first)", 80, 8 * KIB, true),
];

/// A page of each of four layers: what is neighbour in a slot lies apart in memory.
const CHUNKS: &[(&str, usize, usize, bool)] = &[
    ("chunks of 8 KiB", 4, 8 * KIB, false),
    ("chunks of 16 KiB", 4, 16 * KIB, false),
    ("chunks of 32 KiB", 4, 32 * KIB, false),
    ("chunks of 64 KiB", 4, 64 * KIB, false),
    ("chunks of 128 KiB", 4, 128 * KIB, false),
    ("chunks of 256 KiB", 4, 256 * KIB, false),
    ("chunks of 512 KiB", 4, 512 * KIB, false),
    ("chunks of 1 MiB", 4, 1024 * KIB, false),
    ("chunks of 2 MiB", 4, 2048 * KIB, false),
];

/// The shapes, for copies of about so many MiB; of eight blocks at least.
pub fn shapes(size_mb: usize) -> Vec<Shape> {
    shapes_of(SHAPES, size_mb)
}

fn shapes_of(shapes: &[(&'static str, usize, usize, bool)], size_mb: usize) -> Vec<Shape> {
    let shape = |(name, layers, page_bytes, is_block_first): &(&'static str, usize, usize, bool)| {
        let blocks_count = ((size_mb << 20) / (layers * page_bytes)).max(8);
        Shape { name, layers: *layers, page_bytes: *page_bytes, is_block_first: *is_block_first, blocks_count }
    };
    shapes.iter().map(shape).collect()
}

/// The ways of one who copies.
pub fn ways(device: Option<i32>, driver: Option<&Path>) -> Vec<(&'static str, Who)> {
    let Some(device) = device else {
        let cpu = |threads, non_temporal_from_bytes| Who::Cpu { threads, non_temporal_from_bytes };
        return vec![
            ("memcpy", cpu(0, usize::MAX)),
            ("past the caches", cpu(0, 0)),
            ("as shipped", cpu(0, kvring_gpu::backend::tensors::NON_TEMPORAL_FROM_BYTES)),
            ("as shipped, 2 threads", cpu(2, kvring_gpu::backend::tensors::NON_TEMPORAL_FROM_BYTES)),
        ];
    };
    let options = Options { device, driver: driver.map(Path::to_path_buf), ..Options::default() };
    let with = |calibration| Who::Cuda(Options { calibration, ..options.clone() });
    let batched = Calibration { is_batched: true, ..Calibration::default() };
    vec![
        ("one by one", with(Some(Calibration::default()))),
        ("batches", with(Some(batched))),
        ("rows", with(Some(Calibration { rows_min: 2, ..batched }))),
        ("staged", with(Some(Calibration { staged_below_bytes: u64::MAX, ..batched }))),
        ("direct", with(Some(Calibration { direct_below_bytes: u64::MAX, ..batched }))),
        ("as shipped", with(None)),
        // Written anew, in compiled code; beside vLLM itself: tests/gpu/compare.py.
        ("vLLM's swap_blocks", Who::Swap { options: options.clone(), is_batched: false }),
        ("vLLM's swap_blocks_batch", Who::Swap { options, is_batched: true }),
    ]
}

/// Measures.
pub fn measure(run: &mut Run, args: &CopyArgs) -> Measured {
    let (mut rows, mut notes): (Vec<Value>, Vec<String>) = (Vec::new(), Vec::new());
    let mut described = String::new();
    let seconds = (run.time.as_secs_f64() / args.rounds as f64 / 4.0).max(0.01);
    for shape in shapes_of(if args.sweep { CHUNKS } else { SHAPES }, args.size_mb) {
        let name = shape.name;
        if args.shape.as_ref().is_some_and(|part| !name.contains(part.as_str())) {
            continue;
        }
        for (way, who) in ways(args.device, args.cuda_driver.as_deref()) {
            check(way, &who, &shape)?;
            let mut trial = Trial::new(&who, &shape)?;
            if trial.pool().2.bytes() == 4096 {
                let doubt = "copy: the pool is on 4 KiB pages; reserve 1 GiB of hugepages for it";
                if !run.doubts.iter().any(|known| known == doubt) {
                    run.doubts.push(doubt.into());
                }
            }
            described = trial.describe().to_owned();
            let both = args.device.is_some().then_some(None);
            for direction in [Some(Direction::Load), Some(Direction::Store)].into_iter().chain(both) {
                rows.push(row(seconds, args.rounds, &mut trial, &shape, way, direction)?);
            }
            notes.extend(trial.trouble());
            if way == "as shipped"
                && let Some(calibration) = trial.calibration()
            {
                notes.push(format!("{name}: {calibration:?}"));
            }
        }
    }
    notes.sort();
    notes.dedup();
    let overhead = if args.device.is_none() { empty_ticket(run)? } else { Value::Null };
    Ok(json!({"by": described, "copies": rows, "empty_ticket_ns": overhead, "notes": notes}))
}

/// What is measured is right: some blocks each way, scattered and in runs, every byte of memory and pool compared.
fn check(way: &str, who: &Who, shape: &Shape) -> Result<(), Box<dyn std::error::Error>> {
    let few = Shape { blocks_count: 8, ..shape.clone() };
    for (direction, scatter) in [
        (Direction::Store, Scatter::Random),
        (Direction::Store, Scatter::Runs(4)),
        (Direction::Load, Scatter::Random),
        (Direction::Load, Scatter::Runs(4)),
    ] {
        let checked = Trial::new(who, &few)?.check(direction, scatter, 1);
        checked.map_err(|error| format!("{way}: {error}"))?;
    }
    Ok(())
}

/// One way of copying one shape in one direction, beside plain copies, alternating.
pub fn row(
    seconds: f64,
    rounds: usize,
    trial: &mut Trial,
    shape: &Shape,
    way: &str,
    direction: Option<Direction>,
) -> Measured {
    let (mut rates, mut ceilings, mut submitting) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let ceiling = trial.ceiling(direction, seconds)? / 1e9;
        let (began, mut bytes, mut in_calls) = (Instant::now(), 0usize, Duration::ZERO);
        let mut copying = Duration::ZERO;
        while bytes == 0 || began.elapsed().as_secs_f64() < seconds {
            // Chosen outside of the time that counts.
            let blocks = trial.choose(Scatter::Random);
            let (one, other) = blocks.split_at(blocks.len() / 2);
            let work: &[(Direction, &[(u32, u32)])] = match direction {
                Some(direction) => &[(direction, &blocks)],
                None => &[(Direction::Load, one), (Direction::Store, other)],
            };
            let timing = trial.copy(work)?;
            copying += timing.took;
            in_calls += timing.submitting;
            bytes += shape.bytes();
        }
        // The first round warms up, and pins what has to be pinned.
        if round > 0 {
            rates.push(bytes as f64 / copying.as_secs_f64() / 1e9);
            ceilings.push(ceiling);
            submitting.push(in_calls.as_secs_f64() * 1e6 / (bytes as f64 / shape.block_bytes() as f64));
        }
    }
    let ratio = median(rates.iter().zip(&ceilings).map(|(rate, ceiling)| rate / ceiling).collect());
    let direction = match direction {
        Some(Direction::Load) => "load",
        Some(Direction::Store) => "store",
        None => "both",
    };
    Ok(json!({
        "shape": shape.name,
        "way": way,
        "direction": direction,
        "gb_s": rounded(median(rates), 2),
        "plain_copy_gb_s": rounded(median(ceilings), 2),
        "ratio": rounded(ratio, 3),
        "submit_us_per_block": rounded(median(submitting), 2),
    }))
}

/// From the submission of a ticket without blocks to its end as the submitter sees it, both sides awake.
fn empty_ticket(run: &Run) -> Measured {
    const BLOCK: u64 = 64 << 10;
    let settings = [("cpu_cache_gb", "0.01".into()), ("ssd_cache_gb", "0".into())];
    let server = BenchServer::start(&std::env::temp_dir(), BLOCK >> 10, &settings)?;
    let instance = Instance::open(server.settings.load()?.config, Layout::opaque(BLOCK), 0)?;
    let backend = HostBackend::new(HostMemory::new(1, BLOCK as usize));
    let agent = Agent::start(instance, backend, Patience::default())?;
    let mut histogram = Histogram::<u64>::new(3)?;
    let (began, mut ticket) = (Instant::now(), 0);
    while began.elapsed() < run.time {
        let load = Load {
            ticket,
            lease: LeaseId(0),
            expires_at_ns: 0,
            first: 0,
            keys: Vec::new(),
            pages: Vec::new(),
            epoch: 0,
            after: None,
            layer_groups: 1,
        };
        let at = Instant::now();
        let watch = agent.load(load)?;
        while !watch.is_ended() {
            std::hint::spin_loop();
        }
        histogram.record(at.elapsed().as_nanos() as u64)?;
        ticket += 1;
        agent.poll();
    }
    Ok(percentiles(&histogram, 1.0))
}
