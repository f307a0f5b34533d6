//! `kvring explain`: why was this block not there, why did this request take long? From the flight recorder alone:
//! what it does not reach back to is said to be unknown, not guessed.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use clap::Args;
use indicatif::HumanCount;
use kvring_ipc::key::BlockKey;
use kvring_ipc::recorder::{Entry, What};
use kvring_ipc::wire::{Op, Status};
use serde_json::{Value, json};

use super::trace::{OPERATOR, cause_text, op_name, refusal_text, status_name, tier_name};
use super::{Server, Which, short_ns};
use crate::Outcome;
use crate::settings::Settings;

/// Arguments of `kvring explain`.
#[derive(Args)]
#[command(after_help = "\
Without --tag or --key: how the misses that the recorder reaches back to came about, the latest of them, and the slowest requests.")]
pub struct ExplainArgs {
    /// The request with this tag (of each session, or of --session)
    #[arg(long, conflicts_with = "key")]
    tag: Option<u64>,
    /// Only this session's (kvring sessions)
    #[arg(long)]
    session: Option<u32>,
    /// The block with this key: 32 hexadecimal digits
    #[arg(long, value_parser = key_of)]
    key: Option<BlockKey>,
    /// How many of the latest misses and of the slowest requests to tell
    #[arg(long, default_value_t = 5)]
    last: usize,
    /// Of the engine process before the one that serves
    #[arg(long)]
    previous: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

/// A key as it is written: 32 hexadecimal digits.
pub fn key_of(text: &str) -> Result<BlockKey, String> {
    BlockKey::from_hex(text).ok_or_else(|| {
        format!("{text:?} is no key: expected 32 hexadecimal digits, as `kvring explain`, `blocks` and `trace` print")
    })
}

/// Explains.
pub fn explain(args: &ExplainArgs) -> Outcome {
    let which = if args.previous { Which::Previous } else { Which::Current };
    let server = Server::find(&args.settings.load()?.config.socket, which)?;
    server.say_if_it_hangs();
    let recording = server.stats.recording();
    if recording.capacity() == 0 {
        return Err("recorder_entries = 0: this server has no flight recorder; start it with one".into());
    }
    let (entries, lost) = recording.read();
    let policy = server.text.settings.get("eviction_policy").cloned().unwrap_or_default();
    let sample = server.sample();
    let found = ["ssd_recovered_blocks_count", "dram_recovered_blocks_count"].map(|name| sample.counter(name));
    let has_past = server.stats.owner().0 > 1 || found != [0, 0];
    let record = Record::new(entries, lost, policy, has_past, kvring_ipc::client::monotonic_ns());
    let report = match (args.tag, args.key) {
        (Some(tag), _) => record.request(tag, args.session)?,
        (None, Some(key)) => record.block(key),
        (None, None) => record.overview(args.last, args.session),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", in_words(&report));
    }
    Ok(())
}

/// What a recorder held.
pub struct Record {
    entries: Vec<Entry>,
    lost: u64,
    policy: String,
    /// Blocks may have been there before the recorder began: an engine process before this one had them.
    has_past: bool,
    /// By the clock that entries are dated by (CLOCK_MONOTONIC), which every process has.
    now_ns: u64,
    /// What happened to each block, in order.
    of_block: HashMap<BlockKey, Vec<usize>>,
    resets: Vec<usize>,
}

/// Why a block was not there.
struct Why {
    /// One word.
    reason: &'static str,
    text: String,
}

impl Record {
    /// Of these entries, before which `lost` others were written.
    pub fn new(entries: Vec<Entry>, lost: u64, policy: String, has_past: bool, now_ns: u64) -> Self {
        let mut of_block: HashMap<_, Vec<usize>> = HashMap::new();
        let mut resets = Vec::new();
        for (at, entry) in entries.iter().enumerate() {
            match entry.what {
                What::Stored | What::Evicted | What::Forgotten | What::Dropped | What::Read | What::Written => {
                    of_block.entry(entry.key).or_default().push(at);
                }
                What::Reset => resets.push(at),
                _ => {}
            }
        }
        Self { entries, lost, policy, has_past, now_ns, of_block, resets }
    }

    /// Now: what is told as so long ago was so long ago.
    fn end_ns(&self) -> u64 {
        self.now_ns
    }

    fn span_ns(&self) -> u64 {
        self.end_ns().saturating_sub(self.entries.first().map_or(0, |entry| entry.at_ns))
    }

    fn history(&self, key: BlockKey) -> impl DoubleEndedIterator<Item = (usize, &Entry)> {
        self.of_block.get(&key).into_iter().flatten().map(|at| (*at, &self.entries[*at]))
    }

    /// Why the block with this key was not there when entry `at` was written.
    fn why_missing(&self, key: BlockKey, at: usize) -> Why {
        let ns = self.entries[at].at_ns;
        let before = |entry: &Entry| short_ns(ns.saturating_sub(entry.at_ns));
        let fate = |entry: &Entry| matches!(entry.what, What::Stored | What::Evicted | What::Forgotten | What::Dropped);
        let last = self.history(key).take_while(|(i, _)| *i < at).filter(|(_, entry)| fate(entry)).last();
        let reset = self.resets.iter().rev().find(|reset| **reset < at);
        let later = self.history(key).find(|(i, entry)| *i > at && entry.what == What::Stored);
        let later = later.map_or_else(String::new, |(_, entry)| {
            format!("; session {} stored it {} later", entry.session, short_ns(entry.at_ns.saturating_sub(ns)))
        });
        if let Some(reset) = reset.filter(|reset| last.is_none_or(|(i, _)| i < **reset)) {
            let text = format!("everything was forgotten by a reset {} before{later}", before(&self.entries[*reset]));
            return Why { reason: "reset", text };
        }
        let Some((_, last)) = last else {
            let text = if self.lost == 0 && self.has_past {
                format!(
                    "nobody had stored it since this engine process began; whether one before it had is not known{later}"
                )
            } else if self.lost == 0 {
                format!("nobody had stored it since the server began{later}")
            } else {
                let reach = short_ns(ns - self.entries.first().map_or(ns, |entry| entry.at_ns));
                format!(
                    "nobody had stored it in the {reach} before, which is as far back as the recorder reaches: it was new, or it went earlier{later}"
                )
            };
            return Why { reason: if self.lost == 0 && !self.has_past { "never_stored" } else { "not_known" }, text };
        };
        let (reason, text) = match last.what {
            What::Evicted => {
                let written =
                    self.history(key).any(|(i, entry)| i < at && entry.what == What::Written && entry.part == 1);
                let tier = tier_name(last.detail);
                let by = match last.session {
                    u32::MAX => "a write-back, or what was read ahead".to_owned(),
                    OPERATOR => "an operator (kvring evict)".to_owned(),
                    session => format!("session {session} (tag {})", last.tag),
                };
                let rest = match (last.part == 1, last.detail == 0, written) {
                    (true, ..) => ", and was still in the other tier; a block before it may have been missing",
                    (false, true, false) => ", before it was written to the SSD, or there is none",
                    (false, true, true) => ", when it had left the SSD already",
                    (false, false, _) => ", its last copy",
                };
                let policy = &self.policy;
                (
                    "evicted",
                    format!(
                        "it was evicted from {tier} {} before by {policy}, to make room for {by}{rest}",
                        before(last)
                    ),
                )
            }
            What::Forgotten => {
                ("forgotten", format!("it was forgotten {} before: {}", before(last), cause_text(last.detail)))
            }
            What::Dropped => {
                let why = refusal_text(last.detail);
                (
                    "dropped",
                    format!(
                        "session {} wanted to store it {} before, and could not: {why}",
                        last.session,
                        before(last)
                    ),
                )
            }
            _ => (
                "not_known",
                format!(
                    "session {} had stored it {} before, and it is not known to have gone: a block before it may be missing",
                    last.session,
                    before(last)
                ),
            ),
        };
        Why { reason, text: text + &later }
    }

    fn is_missing_match(entry: &Entry) -> bool {
        entry.what == What::Answered && entry.op == Op::Match as u8 && entry.part < entry.count
    }

    /// One request.
    fn told(&self, at: usize) -> Value {
        let entry = &self.entries[at];
        let mut told = json!({
            "op": op_name(entry.op),
            "session": entry.session,
            "tag": entry.tag,
            "status": status_name(entry.status),
            "ago_s": self.end_ns().saturating_sub(entry.at_ns) as f64 / 1e9,
            "blocks": entry.count,
            "served": entry.part,
        });
        if entry.took_ns > 0 {
            told["took_us"] = json!(entry.took_ns as f64 / 1e3);
        }
        if Self::is_missing_match(entry) {
            let refused = Status::from_byte(entry.status) == Some(Status::Quota);
            let why = if refused {
                Why { reason: "quota", text: "its session or its instance held as many leases as it may".into() }
            } else {
                self.why_missing(entry.key, at)
            };
            told["missing_from_block"] = json!(entry.part);
            told["missing_key"] = json!(entry.key.to_string());
            told["reason"] = json!(why.reason);
            told["why"] = json!(why.text);
        }
        told
    }

    /// What was read for a request, and what it missed.
    fn details(&self, at: usize) -> (Vec<Value>, Vec<Value>) {
        let request = &self.entries[at];
        // Tags come again: only what lies between its pickup and its answer is its own.
        let from_ns = request.at_ns.saturating_sub(request.took_ns);
        let its =
            |entry: &&Entry| entry.session == request.session && entry.tag == request.tag && entry.at_ns >= from_ns;
        let until = self.entries[..=at].iter().enumerate().rev().take_while(|(_, entry)| entry.at_ns >= from_ns);
        let mut its: Vec<_> = until.filter(|(_, entry)| its(entry)).collect();
        its.reverse();
        let reads = its.iter().filter(|(_, entry)| entry.what == What::Read);
        let reads = reads.map(|(_, entry)| {
            json!({
                "key": entry.key.to_string(),
                "device": entry.detail,
                "waited_us": entry.count,
                "took_us": entry.took_ns as f64 / 1e3,
                "good": entry.part == 1,
            })
        });
        let misses = its.iter().filter(|(_, entry)| entry.what == What::Missed);
        let misses = misses.map(|(i, entry)| {
            let why = match Status::from_byte(entry.detail) {
                Some(Status::Busy) => "no slot of the pool came free in time (load_wait_ms), or its instance has its share in use: it holds many loans, or the pool is small".into(),
                Some(Status::Stale) => "its lease had ended: released, expired (lease_ttl_ms), or its session had".into(),
                Some(Status::Cancelled) => "it was cancelled".into(),
                _ => self.why_missing(entry.key, *i).text,
            };
            json!({"key": entry.key.to_string(), "status": status_name(entry.detail), "why": why})
        });
        (reads.collect(), misses.collect())
    }

    /// A request by its tag.
    fn request(&self, tag: u64, session: Option<u32>) -> Result<Value, String> {
        let its = |entry: &Entry| {
            entry.what == What::Answered && entry.tag == tag && session.is_none_or(|id| entry.session == id)
        };
        let found: Vec<_> = self.entries.iter().enumerate().filter(|(_, entry)| its(entry)).map(|(at, _)| at).collect();
        if found.is_empty() {
            let reach = short_ns(self.span_ns());
            return Err(format!(
                "no request with tag {tag} was answered in the {reach} that the recorder reaches back"
            ));
        }
        let requests = found.iter().map(|at| {
            let mut told = self.told(*at);
            let (reads, misses) = self.details(*at);
            told["reads"] = json!(reads);
            told["misses"] = json!(misses);
            told
        });
        Ok(json!({"requests": requests.collect::<Vec<_>>(), "recorder": self.reach()}))
    }

    /// All that happened to a block.
    fn block(&self, key: BlockKey) -> Value {
        let step = |(_, entry): (usize, &Entry)| {
            let by = if entry.session >= OPERATOR { json!(null) } else { json!(entry.session) };
            let what = match entry.what {
                What::Stored => "stored: it can be matched from here on".to_owned(),
                What::Evicted => format!(
                    "evicted from {} by {}{}",
                    tier_name(entry.detail),
                    self.policy,
                    if entry.part == 1 { "; the other tier still had it" } else { ": its last copy" }
                ),
                What::Forgotten => format!("forgotten: {}", cause_text(entry.detail)),
                What::Dropped => format!("a store of it was dropped: {}", refusal_text(entry.detail)),
                What::Read | What::Written => format!(
                    "{} device {}: {} in its queue, {} in all{}",
                    if entry.what == What::Read { "read from" } else { "written to" },
                    entry.detail,
                    short_ns(u64::from(entry.count) * 1000),
                    short_ns(entry.took_ns),
                    if entry.part == 1 { "" } else { "; it failed" }
                ),
                _ => String::new(),
            };
            json!({"ago_s": self.end_ns().saturating_sub(entry.at_ns) as f64 / 1e9, "session": by, "tag": entry.tag, "what": what})
        };
        let history: Vec<_> = self.history(key).map(step).collect();
        json!({"key": key.to_string(), "history": history, "recorder": self.reach()})
    }

    fn reach(&self) -> Value {
        json!({"entries": self.entries.len(), "seconds": self.span_ns() as f64 / 1e9, "overwritten": self.lost})
    }

    /// How misses came about, the latest, and the slowest requests.
    pub fn overview(&self, last: usize, session: Option<u32>) -> Value {
        let is_its = |entry: &Entry| session.is_none_or(|id| entry.session == id);
        let matches = self
            .entries
            .iter()
            .filter(|entry| entry.what == What::Answered && entry.op == Op::Match as u8 && is_its(entry));
        let (mut asked, mut hit, mut count) = (0u64, 0u64, 0u64);
        for entry in matches {
            (asked, hit, count) = (asked + u64::from(entry.count), hit + u64::from(entry.part), count + 1);
        }
        let missing: Vec<usize> = self
            .entries
            .iter()
            .enumerate()
            .filter(|(_, e)| Self::is_missing_match(e) && is_its(e))
            .map(|(at, _)| at)
            .collect();
        // A chain that misses at one block misses all that follows it.
        let mut reasons: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for at in &missing {
            let reason = self.told(*at)["reason"].as_str().unwrap_or("?").to_owned();
            let entry = &self.entries[*at];
            let counted = reasons.entry(reason).or_default();
            *counted = (counted.0 + 1, counted.1 + u64::from(entry.count - entry.part));
        }
        let reasons: BTreeMap<_, _> = reasons
            .into_iter()
            .map(|(reason, (matches, blocks))| (reason, json!({"matches": matches, "blocks": blocks})))
            .collect();
        let latest: Vec<_> = missing.iter().rev().take(last).map(|at| self.told(*at)).collect();
        let is_timed = |entry: &Entry| entry.what == What::Answered && entry.took_ns > 0 && is_its(entry);
        let mut slow: Vec<usize> = (0..self.entries.len()).filter(|at| is_timed(&self.entries[*at])).collect();
        slow.sort_by_key(|at| std::cmp::Reverse(self.entries[*at].took_ns));
        let slow = slow.iter().take(last).map(|at| {
            let mut told = self.told(*at);
            let (reads, _) = self.details(*at);
            let most = |field: &str| reads.iter().filter_map(|read| read[field].as_f64()).fold(0.0, f64::max);
            if !reads.is_empty() {
                told["reads_count"] = json!(reads.len());
                told["longest_queue_us"] = json!(most("waited_us"));
                told["longest_read_us"] = json!(most("took_us"));
            }
            told
        });
        json!({
            "matches": {"count": count, "blocks": asked, "hit": hit},
            "misses_by_reason": reasons,
            "latest_misses": latest,
            "slowest": slow.collect::<Vec<_>>(),
            "recorder": self.reach(),
        })
    }
}

fn sentence(told: &Value) -> String {
    let s = |field: &str| told[field].as_str().unwrap_or_default();
    let n = |field: &str| told[field].as_u64().unwrap_or(0);
    let us = |field: &str| told[field].as_f64().map(|us| short_ns((us * 1e3) as u64));
    let ago = short_ns((told["ago_s"].as_f64().unwrap_or(0.0) * 1e9) as u64);
    let mut out = format!(
        "{ago} ago: session {} {} (tag {}), {} of {} blocks, {}",
        n("session"),
        s("op"),
        n("tag"),
        n("served"),
        n("blocks"),
        s("status")
    );
    if let Some(took) = us("took_us") {
        let _ = write!(out, ", {took}");
    }
    if let (Some(queue), Some(read)) = (us("longest_queue_us"), us("longest_read_us")) {
        let reads = n("reads_count");
        let _ = write!(out, " ({reads} reads, the longest {read}, of which up to {queue} in the device's queue)");
    }
    if !s("why").is_empty() {
        let _ = write!(out, "\n    block {} ({}): {}", n("missing_from_block"), s("missing_key"), s("why"));
    }
    out
}

/// A report as a person reads it.
fn in_words(report: &Value) -> String {
    let mut out = String::new();
    let list = |field: &str| report[field].as_array().cloned().unwrap_or_default();
    let reach = &report["recorder"];
    let seconds = short_ns((reach["seconds"].as_f64().unwrap_or(0.0) * 1e9) as u64);
    let _ = writeln!(out, "the recorder reaches back {seconds} ({} events)", reach["entries"]);
    if let Some(key) = report["key"].as_str() {
        let history = list("history");
        if history.is_empty() {
            let _ = writeln!(out, "nothing happened to block {key} in that time");
        }
        for step in history {
            let ago = short_ns((step["ago_s"].as_f64().unwrap_or(0.0) * 1e9) as u64);
            let by = step["session"]
                .as_u64()
                .map_or_else(String::new, |session| format!(" (session {session}, tag {})", step["tag"]));
            let _ = writeln!(out, "{ago} ago: {}{by}", step["what"].as_str().unwrap_or_default());
        }
        return out;
    }
    for request in list("requests") {
        let _ = writeln!(out, "{}", sentence(&request));
        for read in request["reads"].as_array().into_iter().flatten() {
            let us = |field: &str| short_ns((read[field].as_f64().unwrap_or(0.0) * 1e3) as u64);
            let (took, waited) = (us("took_us"), us("waited_us"));
            let good = if read["good"] == true { "" } else { ", and failed" };
            let key = read["key"].as_str().unwrap_or_default();
            let _ = writeln!(
                out,
                "    block {key}: read from device {} in {took}, of which {waited} in its queue{good}",
                read["device"]
            );
        }
        for miss in request["misses"].as_array().into_iter().flatten() {
            let s = |field: &str| miss[field].as_str().unwrap_or_default();
            let _ = writeln!(out, "    block {}: {}: {}", s("key"), s("status"), s("why"));
        }
    }
    let Some(matches) = report.get("matches") else { return out };
    let n = |value: &Value| value.as_u64().unwrap_or(0);
    let (asked, hit) = (n(&matches["blocks"]), n(&matches["hit"]));
    let share = 100.0 * hit as f64 / asked.max(1) as f64;
    let _ = writeln!(
        out,
        "{} matches asked for {} blocks, {share:.1} % were there",
        HumanCount(n(&matches["count"])),
        HumanCount(asked)
    );
    for (reason, count) in report["misses_by_reason"].as_object().into_iter().flatten() {
        let text = match reason.as_str() {
            "never_stored" => "nobody had stored the first missing block",
            "evicted" => {
                "the first missing block had been evicted: more room, another policy, or an SSD tier would help"
            }
            "forgotten" => "the first missing block had been forgotten",
            "dropped" => "a store of the first missing block had been dropped",
            "reset" => "a reset had forgotten everything",
            "quota" => "the session held too many leases",
            _ => "the recorder does not reach back far enough (recorder_entries), or something before it was missing",
        };
        let (matches, blocks) = (n(&count["matches"]), n(&count["blocks"]));
        let _ = writeln!(
            out,
            "  {:>10} matches, {:>10} blocks: {text}",
            HumanCount(matches).to_string(),
            HumanCount(blocks).to_string()
        );
    }
    for (title, field) in [("latest misses:", "latest_misses"), ("slowest requests whose time is known:", "slowest")] {
        let told = list(field);
        if !told.is_empty() {
            let _ = writeln!(out, "\n{title}");
        }
        for request in told {
            let _ = writeln!(out, "  {}", sentence(&request));
        }
    }
    out
}

#[cfg(test)]
mod test {
    use super::*;

    fn key(n: u64) -> BlockKey {
        BlockKey::from_words([n, 0])
    }

    fn a_match(at_ns: u64, missing: u64) -> Entry {
        let op = Op::Match as u8;
        Entry {
            op,
            session: 1,
            tag: at_ns,
            key: key(missing),
            count: 4,
            part: 2,
            ..Entry::plain(What::Answered, at_ns)
        }
    }

    fn happened(what: What, at_ns: u64, n: u64, detail: u8) -> Entry {
        Entry { session: 2, tag: 70, key: key(n), detail, ..Entry::plain(what, at_ns) }
    }

    fn reason(entries: Vec<Entry>, lost: u64) -> (String, String) {
        let last = entries.iter().position(Record::is_missing_match).unwrap();
        let told = Record::new(entries, lost, "lru".into(), false, 1 << 40).told(last);
        (told["reason"].as_str().unwrap().into(), told["why"].as_str().unwrap().into())
    }

    #[test]
    fn a_miss_is_explained_by_what_happened_last_to_the_first_missing_block() {
        let stored = happened(What::Stored, 1_000_000, 5, 0);
        let evicted = happened(What::Evicted, 2_000_000, 5, 0);
        let (why, text) = reason(vec![stored, evicted, a_match(5_000_000, 5)], 0);
        assert_eq!(why, "evicted");
        assert!(
            text.contains("3.0 ms before by lru, to make room for session 2 (tag 70), before it was written"),
            "{text}"
        );
        let written = Entry { part: 1, ..happened(What::Written, 1_500_000, 5, 0) };
        let (_, text) = reason(vec![stored, written, evicted, a_match(5_000_000, 5)], 0);
        assert!(text.contains("had left the SSD already"), "{text}");
        let forgotten = happened(What::Forgotten, 2_000_000, 5, kvring_ipc::recorder::Cause::SsdChecksum as u8);
        let (why, text) = reason(vec![stored, forgotten, a_match(5_000_000, 5)], 0);
        assert!(why == "forgotten" && text.contains("not what was written"), "{why}: {text}");
        let reset = Entry::plain(What::Reset, 4_000_000);
        assert_eq!(reason(vec![stored, reset, a_match(5_000_000, 5)], 0).0, "reset");
        assert_eq!(reason(vec![reset, stored, evicted, a_match(5_000_000, 5)], 0).0, "evicted");
        // What happened to other blocks, or later, is no reason.
        let (why, text) = reason(vec![happened(What::Evicted, 1, 6, 0), a_match(5_000_000, 5), stored], 0);
        assert!(why == "never_stored" && text.contains("session 2 stored it"), "{why}: {text}");
        let (why, text) = reason(vec![happened(What::Evicted, 1_000_000, 6, 0), a_match(5_000_000, 5)], 9);
        assert!(why == "not_known" && text.contains("in the 4.0 ms before"), "{why}: {text}");
    }

    #[test]
    fn a_slow_load_says_where_it_waited_and_a_tag_that_comes_again_is_not_mixed_up() {
        let load = |at_ns, took_ns| Entry {
            op: Op::Load as u8,
            session: 1,
            tag: 9,
            count: 1,
            part: 1,
            took_ns,
            ..Entry::plain(What::Answered, at_ns)
        };
        let read = |at_ns, waited_us| Entry {
            session: 1,
            tag: 9,
            key: key(at_ns),
            detail: 3,
            count: waited_us,
            part: 1,
            took_ns: 600_000,
            ..Entry::plain(What::Read, at_ns)
        };
        let entries =
            vec![read(1_000_000, 111), load(1_000_000, 700_000), read(9_000_000, 444), load(9_000_000, 800_000)];
        let record = Record::new(entries, 0, "lru".into(), false, 1 << 40);
        let report = record.request(9, Some(1)).unwrap();
        let waited = |at: usize| {
            report["requests"][at]["reads"]
                .as_array()
                .unwrap()
                .iter()
                .map(|read| read["waited_us"].as_u64().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!([waited(0), waited(1)], [vec![111], vec![444]]);
        assert!(record.request(8, None).is_err() && record.request(9, Some(2)).is_err());
        let words = in_words(&record.overview(1, None));
        assert!(
            words.contains("800.0 µs (1 reads, the longest 600.0 µs, of which up to 444.0 µs in the device's queue)"),
            "{words}"
        );
        let block = in_words(&record.block(key(9_000_000)));
        assert!(
            block.contains("read from device 3: 444.0 µs in its queue, 600.0 µs in all (session 1, tag 9)"),
            "{block}"
        );
    }

    #[test]
    fn a_key_is_read_as_it_is_written() {
        let key = BlockKey::from_words([0x1234, u64::MAX]);
        assert_eq!(key_of(&key.to_string()), Ok(key));
        for wrong in ["", "12", "zz", &"g".repeat(32), &"é".repeat(16), &"0".repeat(33)] {
            assert!(key_of(wrong).is_err(), "{wrong}");
        }
    }
}
