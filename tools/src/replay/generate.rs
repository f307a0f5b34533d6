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

/// A workload by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// As Mooncake's conversation trace: turns, shared prompts, branches
    #[default]
    Conversation,
    /// Every request begins with one of eight long system prompts, and goes on with what is its own
    SharedPrompt,
    /// Users who take ten turns each; every turn repeats the whole conversation before it
    Chat,
    /// Bursts of eight agents that continue one context at the same moment, and a last one that joins them
    Agents,
    /// Documents read one after another, again and again: more than fits, beside a few that are hot
    Scan,
}

impl Workload {
    /// `count` requests, `rate` of them a second on average, Poisson; the same from a seed on every machine.
    pub fn generate(self, seed: u64, count: usize, rate: f64) -> Vec<TraceRequest> {
        let mut chance = Chance::new(seed);
        let mut requests = match self {
            // Its times are the trace's own.
            Self::Conversation if rate == 0.0 => return generate(seed, count),
            Self::Conversation => generate(seed, count),
            Self::SharedPrompt => shared_prompt(&mut chance, count),
            Self::Chat => chat(&mut chance, count),
            Self::Agents => agents(&mut chance, count),
            Self::Scan => scan(&mut chance, count),
        };
        let rate = if rate == 0.0 { 1000.0 } else { rate };
        let mut now_us = 0.0;
        let mut burst = u64::MAX;
        for request in &mut requests {
            // What has one time here comes at one time.
            if request.timestamp_us != burst || self != Self::Agents {
                burst = request.timestamp_us;
                let mean_us = 1e6 / rate * if self == Self::Agents { AGENTS as f64 / 3.0 } else { 1.0 };
                now_us -= (1.0 - uniform(&mut chance)).ln() * mean_us;
            }
            request.timestamp_us = now_us as u64;
        }
        requests
    }
}

const SYSTEM_PROMPTS: u64 = 8;
const SYSTEM_BLOCKS: u64 = 64;
const CHATS: usize = 64;
const TURNS: usize = 10;
/// A context, its agents, and the one that joins them.
const AGENTS: u64 = 10;
const DOCUMENTS: u64 = 256;
const DOCUMENT_BLOCKS: u64 = 32;

/// Blocks that nobody else has.
struct Fresh(u64);

impl Fresh {
    fn take(&mut self, count: u64) -> std::ops::Range<u64> {
        self.0 += count;
        self.0 - count..self.0
    }
}

fn request(hash_ids: Vec<u64>) -> TraceRequest {
    TraceRequest { timestamp_us: 0, hash_ids }
}

fn shared_prompt(chance: &mut Chance, count: usize) -> Vec<TraceRequest> {
    let mut fresh = Fresh(SYSTEM_PROMPTS * SYSTEM_BLOCKS);
    let one = |_| {
        // The first prompt is as popular as all others together, the second as those after it.
        let prompt = u64::from(chance.next_u64().trailing_zeros()).min(SYSTEM_PROMPTS - 1);
        let own = 4 + chance.below(13);
        request((prompt * SYSTEM_BLOCKS..(prompt + 1) * SYSTEM_BLOCKS).chain(fresh.take(own)).collect())
    };
    (0..count).map(one).collect()
}

fn chat(chance: &mut Chance, count: usize) -> Vec<TraceRequest> {
    let mut fresh = Fresh(4);
    let mut chats: Vec<(usize, Vec<u64>)> = vec![(TURNS, Vec::new()); CHATS];
    let one = |_| {
        let (turns, ids) = &mut chats[chance.below(CHATS as u64) as usize];
        if *turns == TURNS {
            (*turns, *ids) = (0, (0..4).collect());
        }
        *turns += 1;
        ids.extend(fresh.take(2 + chance.below(7)));
        request(ids.clone())
    };
    (0..count).map(one).collect()
}

fn agents(chance: &mut Chance, count: usize) -> Vec<TraceRequest> {
    let mut fresh = Fresh(0);
    let mut made = Vec::with_capacity(count);
    let mut burst = 0;
    while made.len() < count {
        let context: Vec<u64> = fresh.take(24 + chance.below(33)).collect();
        let mut at = |burst: u64, more: Vec<u64>| {
            let hash_ids = context.iter().copied().chain(more).collect();
            made.push(TraceRequest { timestamp_us: burst, hash_ids });
        };
        at(burst, Vec::new());
        let steps: Vec<Vec<u64>> = (0..AGENTS - 2).map(|_| fresh.take(6 + chance.below(9)).collect()).collect();
        steps.iter().for_each(|step| at(burst + 1, step.clone()));
        at(burst + 2, steps[0].iter().copied().chain(fresh.take(8)).collect());
        burst += 3;
    }
    made.truncate(count);
    made
}

fn scan(chance: &mut Chance, count: usize) -> Vec<TraceRequest> {
    let mut next = 0;
    let one = |_| {
        // One request in four is for one of a few that everybody reads.
        let document = if chance.happens(250) {
            DOCUMENTS + chance.below(8)
        } else {
            next = (next + 1) % DOCUMENTS;
            next
        };
        request((document * DOCUMENT_BLOCKS..(document + 1) * DOCUMENT_BLOCKS).collect())
    };
    (0..count).map(one).collect()
}

fn uniform(chance: &mut Chance) -> f64 {
    (chance.next_u64() >> 11) as f64 / (1u64 << 53) as f64
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
        requests.push(TraceRequest { timestamp_us: now_ms * 1000, hash_ids: ids });
    }
    requests
}

#[cfg(test)]
mod test {
    use super::super::oracle::infinite;
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

    #[test]
    fn each_workload_shares_what_its_name_says() {
        for (workload, least, most) in [
            (Workload::SharedPrompt, 0.82, 0.90),
            (Workload::Chat, 0.75, 0.90),
            (Workload::Agents, 0.70, 0.85),
            (Workload::Scan, 0.80, 0.95),
        ] {
            let requests = workload.generate(1, 3000, 500.0);
            assert_eq!(requests, workload.generate(1, 3000, 500.0));
            let ratio = infinite(&requests);
            println!("{workload:?}: an infinite cache hits {ratio:.3}");
            assert!((least..most).contains(&ratio), "{workload:?}: {ratio}");
            let last_s = requests.last().unwrap().timestamp_us as f64 / 1e6;
            assert!((4.5..7.5).contains(&last_s), "{workload:?}: 3000 requests at 500 a second end at {last_s} s");
            assert!(requests.is_sorted_by_key(|request| request.timestamp_us));
        }
    }
}
