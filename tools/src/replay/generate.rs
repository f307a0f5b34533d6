//! A workload of our own, from a seed: conversations of several turns over shared system prompts, with
//! agents that branch.
//!
//! Its parameters are measured on Mooncake's conversation trace (12,031 requests, FAST'25): one block
//! common to all; 61 % of requests begin a conversation; their length in blocks is log-normal with mean
//! 2.34 and deviation 1.21 of the logarithm (median 10, at most 247); a further turn adds a log-normal
//! number with 1.19 and 1.11; a conversation comes back after a median of 423 requests. In that trace
//! an infinite cache hits 36.6 % of blocks; here, over as many requests, 35 to 40 %.

use kvring_engine::device::sim::Chance;

use super::trace::TraceRequest;

const NEW_PERMILLE: u32 = 613;
const NEW_BLOCKS: (f64, f64) = (2.34, 1.21);
const TURN_BLOCKS: (f64, f64) = (1.19, 1.11);
/// exp(6.05) = 423 requests; the deviation spans the measured 141 and 1,662 at 10 % and 90 %.
const GAP_REQUESTS: (f64, f64) = (6.05, 0.96);
const BLOCKS_MAX: usize = 247;
/// Agents: this share of further turns continues from the middle of an earlier one.
const BRANCH_PERMILLE: u32 = 80;
/// System prompts, two blocks each after the common one, and how often one is used.
const PROMPTS: u64 = 24;
const PROMPT_PERMILLE: u32 = 60;
/// The trace's mean distance between requests.
const MEAN_GAP_MS: u64 = 294;

fn log_normal(chance: &mut Chance, (mean, deviation): (f64, f64)) -> f64 {
    // Box and Muller; 53 bits, never 0.
    let uniform = |chance: &mut Chance| ((chance.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let (u, v) = (uniform(chance), uniform(chance));
    let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
    (mean + deviation * normal).exp()
}

/// `count` requests from a seed: the same on every machine.
pub fn generate(seed: u64, count: usize) -> Vec<TraceRequest> {
    let mut chance = Chance::new(seed);
    let mut requests: Vec<TraceRequest> = Vec::with_capacity(count);
    let mut next_id = 1 + PROMPTS * 2;
    let mut now_ms = 0;
    for number in 0..count {
        now_ms += chance.below(2 * MEAN_GAP_MS + 1);
        let gap = log_normal(&mut chance, GAP_REQUESTS).max(1.0) as usize;
        let continues = !chance.happens(NEW_PERMILLE) && number > 0;
        let (mut ids, added) = if continues {
            // Before enough has passed, anything earlier will do.
            let earlier = &requests[number - (1 + (gap - 1) % number)].hash_ids;
            let kept = if chance.happens(BRANCH_PERMILLE) {
                1 + chance.below(earlier.len() as u64) as usize
            } else {
                earlier.len()
            };
            (earlier[..kept].to_vec(), log_normal(&mut chance, TURN_BLOCKS))
        } else {
            let mut ids = vec![0];
            if chance.happens(PROMPT_PERMILLE) {
                let prompt = chance.below(PROMPTS);
                ids.extend([1 + prompt * 2, 2 + prompt * 2]);
            }
            (ids, log_normal(&mut chance, NEW_BLOCKS))
        };
        let added = (added.round() as usize).max(1).min(BLOCKS_MAX.saturating_sub(ids.len()).max(1));
        ids.extend((next_id..).take(added));
        next_id += added as u64;
        requests.push(TraceRequest { timestamp_ms: now_ms, hash_ids: ids });
    }
    requests
}

#[cfg(test)]
mod test {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn it_is_the_workload_it_says_it_is() {
        let requests = generate(1, 12_031);
        assert_eq!(requests, generate(1, 12_031));
        assert_ne!(requests, generate(2, 12_031));
        let (mut seen, mut hit, mut total) = (HashSet::new(), 0, 0);
        for request in &requests {
            hit += request.hash_ids.iter().take_while(|id| seen.contains(*id)).count();
            total += request.hash_ids.len();
            seen.extend(request.hash_ids.iter().copied());
        }
        let (ratio, mean) = (hit as f64 / total as f64, total as f64 / requests.len() as f64);
        println!("hit ratio of an infinite cache {ratio:.3}, mean blocks {mean:.1}");
        assert!((0.33..0.42).contains(&ratio), "{ratio}");
        assert!((20.0..30.0).contains(&mean), "{mean}");
    }
}
