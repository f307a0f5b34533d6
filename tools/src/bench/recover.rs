//! A start over a full SSD tier: from the start of the process until every block is resident again, beside
//! reading the same bytes with dd, and with fio where it is installed; alternating, medians.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use kvring_engine::device::files;
use kvring_engine::device::medium::Medium;
use kvring_engine::limits::SECTOR_BYTES;
use kvring_engine::tier::disk::DiskGeometry;
use kvring_engine::tier::header::{HEADER_BYTES, Header};
use kvring_ipc::config::{Config, OnMismatch};
use kvring_ipc::key::BlockKey;
use kvring_ipc::layout::Layout;
use kvring_ipc::mapping::Mapping;
use serde_json::{Value, json};

use super::{BenchServer, Measured, Run, median, rounded};

/// Arguments of `kvring bench recover`.
#[derive(Args)]
pub struct RecoverArgs {
    /// Where to measure: a directory on the file system in question, with 4.2 KB free for each block.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Blocks on the SSD, of 4 KiB: only their headers are read.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1000..=100_000_000))]
    blocks: u32,
    /// Blocks in no order, as in a cache that has evicted for long: every second one is read before its parent.
    #[arg(long)]
    scattered: bool,
    /// Rounds of each.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

const BLOCK_BYTES: u64 = 4096;
/// Blocks of one chain, as of a conversation.
const CHAIN: u32 = 64;
const READ_BYTES: u64 = 4 << 20;

/// Measures.
pub fn measure(run: &mut Run, args: &RecoverArgs) -> Measured {
    let scratch = tempfile::Builder::new().prefix("kvring-recover-").tempdir_in(&args.dir)?;
    let dir = scratch.path().join("ssd");
    let medium = Medium::Directory(dir.clone());
    let gb = (u64::from(args.blocks) * (BLOCK_BYTES + HEADER_BYTES) + (4 << 20)) as f64 / f64::from(1 << 30);
    let mut config = Config::default();
    config.say("ssd_cache_gb", &gb.to_string())?;
    let geometry = files::geometry(1, config.ssd_cache_bytes, BLOCK_BYTES, None)?;
    let blocks = args.blocks.min(geometry.slots_count());
    let layout = Layout::opaque(BLOCK_BYTES);
    drop(files::open(std::slice::from_ref(&medium), &geometry, &layout, OnMismatch::Refuse)?);
    let file = medium.path_of(0);
    write_headers(&file, &geometry, layout.fingerprint(), blocks, args.scattered)?;
    let bytes = geometry.header_sectors() * SECTOR_BYTES;
    let has_fio =
        Command::new("fio").arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success());
    if !has_fio {
        run.doubts.push("recover: fio is not installed; dd reads one piece at a time".into());
    }
    let (mut ours, mut serving, mut resident, mut dd, mut fio) = (vec![], vec![], vec![], vec![], vec![]);
    let (mut memory, index_bytes) = (vec![], blocks as usize * INDEX_BYTES_PER_BLOCK);
    for round in 0..args.rounds.max(1) {
        for turn in [round % 2, 1 - round % 2] {
            if turn == 0 {
                memory.push(take_memory(index_bytes)?);
                let (first, all, recovery) = start(scratch.path(), &dir, gb, blocks)?;
                serving.push(first);
                resident.push(all);
                ours.push(recovery);
            } else {
                dd.push(read_with_dd(&file, bytes)?);
                if has_fio {
                    fio.push(read_with_fio(&file, bytes)?);
                }
            }
        }
    }
    let seconds = median(ours);
    let memory_s = memory.iter().copied().fold(0.0, f64::max);
    if memory_s > 0.5 {
        run.doubts.push(format!(
            "recover: {} MB of memory, as much as the index takes, took {memory_s:.1} s to be had once: a virtual machine's comes from its host when it is first touched; it was taken before each start",
            index_bytes >> 20
        ));
    }
    let mut report = json!({
        "blocks": blocks,
        "header_mb": bytes / 1_000_000,
        "process_start_to_serving_s": rounded(median(serving), 3),
        "process_start_to_all_resident_s": rounded(median(resident), 3),
        "recovery_s": rounded(seconds, 3),
        "million_blocks_per_s": rounded(f64::from(blocks) / seconds / 1e6, 2),
        "mb_per_s": rounded(bytes as f64 / seconds / 1e6, 0),
    });
    for (name, samples) in [("dd", dd), ("fio", fio)].into_iter().filter(|(_, samples)| !samples.is_empty()) {
        let theirs = median(samples);
        report[format!("{name}_s")] = rounded(theirs, 3).into();
        report[format!("of_{name}")] = rounded(theirs / seconds, 2).into();
    }
    Ok(json!({"recover": Value::Object(report.as_object().cloned().unwrap_or_default())}))
}

/// What the index takes of memory, about.
const INDEX_BYTES_PER_BLOCK: usize = 140;

/// Has so much memory once, and lets go of it: how long that takes is the machine's, and seconds in a virtual one whose
/// host has taken it back.
fn take_memory(bytes: usize) -> Result<f64, Box<dyn std::error::Error>> {
    let memory = Mapping::private(bytes.max(4096))?;
    memory.advise_hugepages();
    let started = Instant::now();
    memory.populate(0, memory.bytes())?;
    Ok(started.elapsed().as_secs_f64())
}

/// Headers of full chains; the blocks themselves are never read.
fn write_headers(
    file: &Path,
    geometry: &DiskGeometry,
    layout: u64,
    blocks: u32,
    scattered: bool,
) -> std::io::Result<()> {
    // A prime larger than any number of blocks: times it, modulo that number, each block has a slot of its own.
    const STRIDE: u64 = 2_654_435_761;
    let file = OpenOptions::new().write(true).open(file)?;
    let key = |block: u32| BlockKey::from_words([u64::from(block).wrapping_mul(0x9e37_79b9_7f4a_7c15), block.into()]);
    let mut piece: Vec<u8> = Vec::with_capacity(READ_BYTES as usize);
    let mut at = SECTOR_BYTES;
    for slot in 0..blocks {
        let block = if scattered { (u64::from(slot) * STRIDE % u64::from(blocks)) as u32 } else { slot };
        let depth = block % CHAIN;
        let parent = if depth == 0 { BlockKey::default() } else { key(block - 1) };
        let header = Header { key: key(block), parent, data_crc: 1, generation: 1, depth, slot, flags: 0, crc: 0 };
        let header = header.sealed(layout);
        piece.extend_from_slice(bytemuck::bytes_of(&header));
        if piece.len() as u64 == READ_BYTES || slot + 1 == blocks {
            file.write_all_at(&piece, at)?;
            at += piece.len() as u64;
            piece.clear();
        }
    }
    assert_eq!(geometry.devices_count, 1);
    file.sync_data()
}

/// Seconds from the start of a server's process to its first answer and until every block is resident, and
/// from its first read until then as it says itself.
fn start(scratch: &Path, dir: &Path, gb: f64, blocks: u32) -> Result<(f64, f64, f64), Box<dyn std::error::Error>> {
    let started = Instant::now();
    let server = BenchServer::start(
        scratch,
        BLOCK_BYTES >> 10,
        &[
            ("ssd_cache_dir", dir.display().to_string()),
            ("ssd_cache_gb", gb.to_string()),
            ("cpu_cache_gb", "0.03125".into()),
        ],
    )?;
    let first = started.elapsed().as_secs_f64();
    let deadline = started + Duration::from_secs(300);
    while server.metric("ssd_recovery_us")? == 0 {
        if Instant::now() > deadline {
            return Err("the blocks were not all found after 300 s".into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let all = started.elapsed().as_secs_f64();
    let (found, us) = (server.metric("ssd_recovered_blocks_count")?, server.metric("ssd_recovery_us")?);
    if found != u64::from(blocks) {
        return Err(format!("{found} of {blocks} blocks were found").into());
    }
    Ok((first, all, us as f64 / 1e6))
}

fn read_with_dd(file: &Path, bytes: u64) -> Result<f64, Box<dyn std::error::Error>> {
    let started = Instant::now();
    let status = Command::new("dd")
        .arg(format!("if={}", file.display()))
        .args(["of=/dev/null", "bs=4M", "iflag=direct", "status=none"])
        .arg(format!("count={}", bytes.div_ceil(READ_BYTES)))
        .status()?;
    if !status.success() {
        return Err(format!("dd: {status}").into());
    }
    Ok(started.elapsed().as_secs_f64())
}

fn read_with_fio(file: &Path, bytes: u64) -> Result<f64, Box<dyn std::error::Error>> {
    let output = Command::new("fio")
        .args(["--name=recover", "--rw=read", "--bs=4M", "--direct=1", "--ioengine=io_uring", "--iodepth=4"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--size={}", bytes.next_multiple_of(READ_BYTES)))
        .arg("--output-format=json")
        .output()?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let ms = report["jobs"][0]["read"]["runtime"].as_f64().ok_or("fio has not read")?;
    Ok(ms / 1e3)
}
