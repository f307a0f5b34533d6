//! The pool: 1 MiB blocks that are resident, matched, loaded and copied out, beside a plain memcpy of
//! as many bytes between memory of the same pages. Alternating; medians.

use std::time::{Duration, Instant};

use kvring_ipc::client::{Matched, Session};
use kvring_ipc::key::BlockKey;
use kvring_ipc::mapping::{Mapping, Pages, sealed_memfd};
use kvring_ipc::wire::{LeaseId, Tag};
use serde_json::json;

use super::{BenchServer, Measured, Run, Series, chain, median, rounded, store};

const BLOCK: usize = 1 << 20;
const BLOCKS: usize = 256;
const ROUNDS: usize = 5;

/// Measures.
pub fn measure(run: &mut Run) -> Measured {
    let server = BenchServer::start(
        &std::env::temp_dir(),
        (BLOCK >> 10) as u64,
        &[("cpu_cache_gb", "0.3".into()), ("ssd_cache_gb", "0".into())],
    )?;
    let mut session = server.session(BLOCK as u64)?;
    let page_bytes = session.welcome().map_or(4096, |welcome| welcome.page_bytes);
    let pages =
        [Pages::Huge1G, Pages::Huge2M].into_iter().find(|pages| pages.bytes() == page_bytes).unwrap_or(Pages::Small);
    let memory = |bytes: usize| -> Result<Mapping, Box<dyn std::error::Error>> {
        let length = (bytes as u64).next_multiple_of(pages.bytes());
        let mapping = Mapping::new(sealed_memfd("kvring-bench", length, pages)?, length as usize)?;
        mapping.populate(0, length as usize)?;
        Ok(mapping)
    };
    // As many blocks as lie in the pool: neither source fits a cache.
    let (source, target) = match (memory(BLOCKS * BLOCK), memory(64 * BLOCK)) {
        (Ok(source), Ok(target)) => (source, target),
        _ => return Err("too few hugepages for the memcpy beside it: reserve 512 MiB more, or none".into()),
    };
    if page_bytes == 4096 {
        run.doubts.push("dram: pool and memcpy are on 4 KiB pages; reserve 1 GiB of hugepages for both".into());
    }
    let keys = chain("dram", BLOCKS as u32);
    if store(&mut session, &keys)? != BLOCKS as u32 {
        return Err("the chain was not stored whole".into());
    }
    let (mut plain, mut loaded) = (Vec::new(), Vec::new());
    let (mut plain_series, mut series) = (Series::default(), Series::default());
    for _ in 0..ROUNDS {
        plain.push(rate(run.time / 4, &mut plain_series, |batch| {
            for block in 0..64 {
                copy(&source, (batch * 64 + block) % BLOCKS * BLOCK, &target, block * BLOCK);
            }
            Ok(64)
        })?);
        // The next batch is asked for before this one is copied, as an engine that prefetches does.
        let mut next = Some(post(&mut session, &keys, 0)?);
        loaded.push(rate(run.time / 4, &mut series, |batch| {
            let (tag, lease) = next.take().ok_or("nothing was posted")?;
            next = Some(post(&mut session, &keys, batch + 1)?);
            let mut blocks = 0;
            session.wait(tag, Instant::now() + Duration::from_secs(10), |pool, completion| {
                for (index, grant) in completion.grants() {
                    copy(pool.mapping(), pool.offset_of(grant.slot), &target, index as usize * BLOCK);
                    blocks += 1;
                }
            })?;
            session.release_soon(lease)?;
            Ok(blocks)
        })?);
        if let Some((tag, lease)) = next {
            session.wait(tag, Instant::now() + Duration::from_secs(10), |_, _| {})?;
            session.release_soon(lease)?;
        }
    }
    let samples = loaded.clone();
    let (plain, loaded) = (median(plain), median(loaded));
    Ok(json!({
        "memcpy_gb_s": rounded(plain, 2),
        "load_and_copy_gb_s": rounded(loaded, 2),
        "ratio": rounded(loaded / plain, 3),
        "page_bytes": page_bytes,
        "samples": samples,
        "gb_s_over_time": {"load from DRAM and copy": series.points, "memcpy": plain_series.points},
    }))
}

/// Matches up to a batch of 64 blocks and posts its load.
fn post(session: &mut Session, keys: &[BlockKey], batch: usize) -> Result<(Tag, LeaseId), Box<dyn std::error::Error>> {
    let first = batch * 64 % BLOCKS;
    let tag = session.post_match(&keys[..first + 64])?;
    let mut matched = Matched::MISS;
    let far = Instant::now() + Duration::from_secs(10);
    session.wait(tag, far, |_, completion| matched = Matched::from_completion(&completion))?;
    let lease = matched.lease.ok_or("a miss")?.id;
    let tag = session.post_load(lease, first as u32, &keys[first..first + 64])?;
    session.publish();
    Ok((tag, lease))
}

/// 1 MiB from one mapping to another, through nothing.
#[expect(unsafe_code, reason = "a memcpy between two shared mappings, which have no slices")]
fn copy(source: &Mapping, from: usize, target: &Mapping, to: usize) {
    let (source, target) = (source.address(from, BLOCK), target.address(to, BLOCK));
    // SAFETY: both ranges are inside their mappings by `address`, and the mappings are distinct.
    unsafe { std::ptr::copy_nonoverlapping(source, target, BLOCK) }
}

/// GB a second of something that moves blocks.
fn rate(
    time: Duration,
    series: &mut Series,
    mut batch: impl FnMut(usize) -> Result<usize, Box<dyn std::error::Error>>,
) -> Result<f64, Box<dyn std::error::Error>> {
    let started = Instant::now();
    let (mut blocks, mut number) = (0, 0);
    series.begin();
    while started.elapsed() < time {
        blocks += batch(number)?;
        number += 1;
        if series.is_due(started.elapsed(), time) {
            series.add(started.elapsed(), (blocks * BLOCK) as u64);
        }
    }
    Ok((blocks * BLOCK) as f64 / 1e9 / started.elapsed().as_secs_f64())
}
