//! `kvring trace`: what the flight recorder holds, as a trace that Perfetto and chrome://tracing show (Trace Event
//! Format: what takes time and overlaps others of its track is an async pair, phases b and e; the rest are instants,
//! phase i; microseconds).

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use kvring_ipc::recorder::{Cause, Entry, Refusal, What};
use kvring_ipc::wire::{Op, Status};
use serde_json::{Value, json};

use super::{Server, Which};
use crate::Outcome;
use crate::settings::Settings;

/// Arguments of `kvring trace`.
#[derive(Args)]
#[command(after_help = "\
Open the file in https://ui.perfetto.dev or chrome://tracing: a track for each session and each device. What happened longer ago than the recorder reaches (recorder_entries) is not in it.")]
pub struct TraceArgs {
    /// File to write; - is standard output
    #[arg(long, short, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Only the last seconds
    #[arg(long, value_name = "SECONDS")]
    last: Option<f64>,
    /// Of the engine process before the one that serves: what it did last before it died
    #[arg(long)]
    previous: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Writes the trace.
pub fn trace(args: &TraceArgs) -> Outcome {
    if args.last.is_some_and(|last| last.is_nan() || last <= 0.0) {
        return Err(format!("--last {}: expected seconds above 0", args.last.unwrap_or(0.0)).into());
    }
    let which = if args.previous { Which::Previous } else { Which::Current };
    let server = Server::find(&args.settings.load()?.config.socket, which)?;
    server.say_if_it_hangs();
    let recording = server.stats.recording();
    if recording.capacity() == 0 {
        return Err("recorder_entries = 0: this server has no flight recorder; start it with one".into());
    }
    let (entries, _) = recording.read();
    let now_ns = kvring_ipc::client::monotonic_ns();
    let from_ns = args.last.map_or(0, |last| now_ns.saturating_sub((last * 1e9) as u64));
    let entries: Vec<_> = entries.into_iter().filter(|entry| entry.at_ns >= from_ns).collect();
    let trace = events(&server, &entries);
    if args.output.as_os_str() == "-" {
        let mut out = std::io::stdout().lock();
        serde_json::to_writer(&mut out, &trace)?;
        writeln!(out)?;
    } else {
        let name = args.output.display();
        // It names what others store.
        use std::os::unix::fs::OpenOptionsExt;
        let file = std::fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&args.output);
        let file = file.map_err(|error| format!("--output {name}: {error}"))?;
        serde_json::to_writer(std::io::BufWriter::new(file), &trace)?;
        eprintln!("{} entries written to {name}: open it in https://ui.perfetto.dev", entries.len());
    }
    Ok(())
}

/// Who asks when no session does.
pub const OPERATOR: u32 = u32::MAX - 1;
const SESSIONS: u64 = 1;
const DEVICES: u64 = 2;
const CACHE: u64 = 3;

/// The trace.
pub fn events(server: &Server, entries: &[Entry]) -> Value {
    let mut events = Vec::with_capacity(entries.len() + 16);
    let name = |what: &str, pid: u64, tid: Option<u64>, name: String| {
        let kind = format!("{what}_name");
        json!({"ph": "M", "name": kind, "pid": pid, "tid": tid.unwrap_or(0), "args": {"name": name}})
    };
    events.push(name("process", SESSIONS, None, "sessions".into()));
    events.push(name("process", DEVICES, None, "devices".into()));
    events.push(name("process", CACHE, None, "cache".into()));
    let sessions: BTreeSet<_> = entries.iter().map(|entry| entry.session).filter(|id| *id < OPERATOR).collect();
    events.extend(sessions.iter().map(|id| name("thread", SESSIONS, Some(u64::from(*id)), format!("session {id}"))));
    for (at, text) in server.text.devices.iter().enumerate() {
        events.push(name("thread", DEVICES, Some(at as u64), text.clone()));
    }
    events.extend(entries.iter().enumerate().flat_map(|(number, entry)| event(number, entry)));
    let realtime_ns = entries.first().map_or(0, |entry| server.stats.realtime_ns(entry.at_ns));
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"kvring": server.text.version, "socket": server.text.socket, "first_unix_ns": realtime_ns.to_string()},
    })
}

/// The two ends of something that takes time.
fn span(number: usize, entry: &Entry, name: &str, category: &str, pid: u64, tid: u64, args: Value) -> Vec<Value> {
    let us = |ns: u64| ns as f64 / 1e3;
    let end = |phase: &str, ns: u64, args: Value| json!({"ph": phase, "id": number, "name": name, "cat": category, "pid": pid, "tid": tid, "ts": us(ns), "args": args});
    vec![end("b", entry.at_ns.saturating_sub(entry.took_ns), args), end("e", entry.at_ns, json!({}))]
}

fn event(number: usize, entry: &Entry) -> Vec<Value> {
    let us = |ns: u64| ns as f64 / 1e3;
    let key = entry.key.to_string();
    let session = u64::from(entry.session);
    let instant = |name: String, pid: u64, tid: u64, args: Value| {
        vec![json!({"ph": "i", "s": "t", "name": name, "pid": pid, "tid": tid, "ts": us(entry.at_ns), "args": args})]
    };
    match entry.what {
        What::Answered => {
            let args = json!({
                "tag": entry.tag, "status": status_name(entry.status), "blocks": entry.count, "served": entry.part, "key": key,
            });
            match entry.took_ns {
                // Not one whose time was taken.
                0 => instant(op_name(entry.op).to_owned(), SESSIONS, session, args),
                _ => span(number, entry, op_name(entry.op), "request", SESSIONS, session, args),
            }
        }
        What::Read | What::Written => {
            let name = if entry.what == What::Read { "read" } else { "write" };
            let args = json!({
                "waited_us": entry.count, "good": entry.part == 1, "key": key, "session": session, "tag": entry.tag,
            });
            span(number, entry, name, "device", DEVICES, u64::from(entry.detail), args)
        }
        What::Attached => instant(format!("attached: process {}", entry.count), SESSIONS, session, json!({})),
        What::Ended => instant("ended".into(), SESSIONS, session, json!({})),
        What::Missed => {
            let args = json!({"key": key, "tag": entry.tag});
            instant(format!("missed: {}", status_name(entry.detail)), SESSIONS, session, args)
        }
        what => {
            let name = match what {
                What::Stored => "stored".to_owned(),
                What::Evicted => format!("evicted from {}", tier_name(entry.detail)),
                What::Forgotten => format!("forgotten: {}", cause_text(entry.detail)),
                What::Dropped => format!("dropped: {}", refusal_text(entry.detail)),
                What::Expired => format!("{} leases expired", entry.count),
                _ => "reset".to_owned(),
            };
            instant(name, CACHE, 0, json!({"key": key, "session": session, "tag": entry.tag}))
        }
    }
}

/// An operation's name.
pub fn op_name(op: u8) -> &'static str {
    match Op::from_byte(op) {
        Some(Op::Ping) => "ping",
        Some(Op::Match) => "match",
        Some(Op::Release) => "release",
        Some(Op::Load) => "load",
        Some(Op::Prefetch) => "prefetch",
        Some(Op::Reserve) => "reserve",
        Some(Op::Commit) => "commit",
        Some(Op::Abort) => "abort",
        Some(Op::Cancel) => "cancel",
        None => "?",
    }
}

/// A status' name.
pub fn status_name(status: u8) -> &'static str {
    match Status::from_byte(status) {
        Some(Status::Ok) => "ok",
        Some(Status::Present) => "present",
        Some(Status::Miss) => "miss",
        Some(Status::Dropped) => "dropped",
        Some(Status::Busy) => "busy",
        Some(Status::Cancelled) => "cancelled",
        Some(Status::Stale) => "stale",
        Some(Status::BadRequest) => "bad request",
        Some(Status::KeyMismatch) => "key mismatch",
        Some(Status::Quota) => "quota",
        None => "?",
    }
}

/// A tier's name.
pub fn tier_name(tier: u8) -> &'static str {
    if tier == 0 { "DRAM" } else { "SSD" }
}

/// Why a block was forgotten.
pub fn cause_text(cause: u8) -> &'static str {
    match Cause::from_byte(cause) {
        Some(Cause::Reset) => "a reset",
        Some(Cause::DramChecksum) => "its bytes in DRAM, or those of a block before it, were not what was stored",
        Some(Cause::SsdChecksum) => "its bytes on the SSD, or those of a block before it, were not what was written",
        Some(Cause::SsdRead) => "it, or a block before it, could not be read from the SSD",
        Some(Cause::Aborted) => "its writer gave it up",
        Some(Cause::WriterGone) => "its writer died, hung up or was cut off",
        Some(Cause::Stalled) => "some ranks stored their part and the others never did",
        Some(Cause::Asked) => "an operator evicted it",
        Some(Cause::DeviceLost) => "the device that it or a block it continues lay on is lost",
        Some(Cause::Unknown) | None => "no reason was recorded",
    }
}

/// Why a block of a store was not taken.
pub fn refusal_text(refusal: u8) -> &'static str {
    match Refusal::from_byte(refusal) {
        Some(Refusal::NoParent) => "the block before it was not there",
        Some(Refusal::NoRoom) => "no slot was free and nothing could go, or its instance has its share in use",
        Some(Refusal::Draining) => "the server was being drained (kvring drain)",
        None => "no reason was recorded",
    }
}
