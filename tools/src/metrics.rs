//! Prometheus' metrics of a running server: `metrics_listen`. Made from the stats segment by a thread that the shard
//! knows nothing of.
//!
//! One connection at a time and none for long: whoever is slow is cut off. Names end in their unit; counters in `_total`,
//! as OpenMetrics 1.0 wants. FlexKV's names stand beside ours where the meaning is the same (docs/OPERATIONS.md).

use std::fmt::Error;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvring_ipc::client::monotonic_ns;
use kvring_ipc::config::MetricsListen;
use kvring_ipc::handshake::{Reply, Request, ask, bind_stream, listen};
use kvring_ipc::peer::Peer;
use kvring_ipc::stats::{HistogramName, SESSION_HISTOGRAM, SESSION_WORDS, Snapshot};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use serde_json::Value;

use crate::admin::namespaces_of;
use crate::observe::{Health, Sample, Server, Which};

/// How long a connection may take, all in all.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the server may take to answer, and to say which namespaces there are.
const ANSWER_PATIENCE: Duration = Duration::from_millis(500);
/// How long that counts.
const NAMESPACES_KEPT: Duration = Duration::from_secs(30);
/// Namespaces that have metrics of their own.
const NAMESPACES_SHOWN: usize = 100;
/// Most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 8 << 10;

/// Serves metrics for as long as this process lives; at a path, to whom the control socket is open too.
pub fn serve(listen: MetricsListen, socket: PathBuf, allowed_groups: Vec<u32>) {
    let run = move || {
        let listener = bound(&listen, &allowed_groups);
        loop {
            // Out of descriptors, or hung up already: the next one may be luckier.
            if listener.answer_one(&socket).is_err() {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("kvring-metrics".into()).spawn(run) {
        tracing::warn!("metrics_listen: no thread to serve metrics: {error}");
    }
}

enum Listener {
    Tcp(TcpListener),
    /// And groups that are asked for, where the socket's mode cannot say which: of several.
    Unix(UnixListener, Vec<u32>),
}

/// Listens. The engine process before this one may have the address for a moment yet; and a cache is worth more than its
/// metrics, so what cannot be had is tried again.
fn bound(listen: &MetricsListen, allowed_groups: &[u32]) -> Listener {
    let mut tries = 0u32;
    loop {
        let listener = match listen {
            MetricsListen::Tcp(address) => TcpListener::bind(address).map(Listener::Tcp),
            MetricsListen::Unix(path) => bind_unix(path, allowed_groups),
        };
        let name = match listen {
            MetricsListen::Tcp(address) => format!("http://{address}/metrics"),
            MetricsListen::Unix(path) => format!("unix:{}", path.display()),
        };
        match listener {
            Ok(listener) => {
                tracing::info!("metrics are served on {name}");
                return listener;
            }
            Err(error) => {
                tries += 1;
                if tries == 20 {
                    tracing::warn!(
                        "metrics_listen: {name}: {error}: no metrics until that is free; give it another address"
                    );
                }
            }
        }
        std::thread::sleep(Duration::from_millis(if tries < 20 { 100 } else { 1000 }));
    }
}

fn bind_unix(path: &Path, allowed_groups: &[u32]) -> std::io::Result<Listener> {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    // What a dead server left; one that lives is left alone.
    if is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    {
        std::fs::remove_file(path)?;
    }
    let bound = bind_stream(path, allowed_groups)?;
    listen(&bound)?;
    let asked = if allowed_groups.len() > 1 { allowed_groups.to_vec() } else { Vec::new() };
    Ok(Listener::Unix(UnixListener::from(bound), asked))
}

/// Whether somebody is one of those that the socket's mode could not name.
fn may_read(stream: &UnixStream, groups: &[u32]) -> bool {
    let ours = rustix::process::geteuid().as_raw();
    groups.is_empty() || Peer::of(stream).is_ok_and(|peer| peer.is_user(ours) || peer.is_in_any(groups))
}

impl Listener {
    fn answer_one(&self, socket: &Path) -> std::io::Result<()> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                let bound =
                    |left| stream.set_read_timeout(Some(left)).and_then(|()| stream.set_write_timeout(Some(left)));
                answer(&stream, bound, socket);
            }
            Self::Unix(listener, groups) => {
                let (stream, _) = listener.accept()?;
                if !may_read(&stream, groups) {
                    return Ok(());
                }
                let bound =
                    |left| stream.set_read_timeout(Some(left)).and_then(|()| stream.set_write_timeout(Some(left)));
                answer(&stream, bound, socket);
            }
        }
        Ok(())
    }
}

/// Reads a request and answers it. What goes wrong is the peer's.
fn answer<S>(stream: S, bound: impl Fn(Duration) -> std::io::Result<()>, socket: &Path)
where
    S: Read + Write,
{
    let until = Instant::now() + PATIENCE;
    let mut stream = stream;
    let left = || until.checked_duration_since(now()).filter(|left| !left.is_zero());
    let mut head = Vec::new();
    let status = loop {
        let Some(left) = left() else { return };
        let mut piece = [0; 1024];
        let Ok(count) = bound(left).and_then(|()| stream.read(&mut piece)) else { return };
        if count == 0 {
            return;
        }
        head.extend_from_slice(&piece[..count]);
        match asked(&head) {
            Some(status) => break status,
            None if head.len() > HEAD_BYTES_MAX => break "431 Request Header Fields Too Large",
            None => {}
        }
    };
    let body = match status {
        "200 OK" => text(socket),
        status => format!("{status}: metrics are at GET /metrics\n"),
    };
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    let mut rest = answer.as_bytes();
    while !rest.is_empty() {
        let Some(left) = left() else { return };
        let Ok(count) = bound(left).and_then(|()| stream.write(rest)) else { return };
        rest = &rest[count..];
    }
}

fn now() -> Instant {
    Instant::now()
}

/// How a request is answered; None: more of it is to come.
fn asked(head: &[u8]) -> Option<&'static str> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => None,
        Ok(httparse::Status::Complete(_)) => {
            let path = request.path.unwrap_or_default();
            let path = path.split_once('?').map_or(path, |(path, _)| path);
            Some(match (request.method, path) {
                (Some("GET"), "/metrics") => "200 OK",
                (Some("GET"), _) => "404 Not Found",
                _ => "405 Method Not Allowed",
            })
        }
        Err(_) => Some("400 Bad Request"),
    }
}

/// The namespaces, as they were when somebody asked last, less than half a minute ago: the shard answers this, and has
/// other things to do. None where it takes too long.
fn namespaces_now(socket: &Path) -> Vec<Value> {
    static KNOWN: Mutex<Option<(Instant, Vec<Value>)>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    match &*known {
        Some((at, namespaces)) if at.elapsed() < NAMESPACES_KEPT => namespaces.clone(),
        _ => {
            let namespaces = namespaces_of(socket, ANSWER_PATIENCE).unwrap_or_default();
            *known = Some((Instant::now(), namespaces.clone()));
            namespaces
        }
    }
}

/// All metrics as text.
pub fn text(socket: &Path) -> String {
    match Server::find(socket, Which::Current) {
        // A server that hangs is not asked.
        Ok(server) => text_of(server, || namespaces_now(socket)),
        // It shows nothing before its first worker has come, nor with `stats_segment = off`: it answers all the same.
        Err(_) => {
            let answers = matches!(ask(socket, &Request::Stats, ANSWER_PATIENCE), Ok(Reply::Stats(_)));
            encoded(Unseen { answers })
        }
    }
}

/// What a server shows; its namespaces are asked for if it serves.
pub fn text_of(server: Server, namespaces: impl FnOnce() -> Vec<Value>) -> String {
    let (health, sample) = (server.health(), server.sample());
    let namespaces = if health == Health::Serving { namespaces() } else { Vec::new() };
    encoded(Shown { health, sample, server, namespaces })
}

fn encoded(collector: impl Collector) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(collector));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

const UP: &str = "1 while it serves or waits for its first instance, 0 if it hangs or does not answer.";

/// A server that shows nothing.
#[derive(Debug)]
struct Unseen {
    answers: bool,
}

impl Collector for Unseen {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        gauge(&mut encoder, "kvring_up", UP, None, f64::from(u8::from(self.answers)))
    }
}

struct Shown {
    server: Server,
    sample: Sample,
    health: Health,
    /// Those with the most blocks first.
    namespaces: Vec<Value>,
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.health)
    }
}

type Labels = Vec<(String, String)>;

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: f64,
) -> Result<(), Error> {
    encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?.encode_gauge(&value)
}

/// A family of counters or gauges, by their labels.
fn family<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    is_gauge: bool,
    values: impl IntoIterator<Item = (L, u64)>,
) -> Result<(), Error> {
    let kind = if is_gauge { MetricType::Gauge } else { MetricType::Counter };
    let mut metric = encoder.encode_descriptor(name, help, unit, kind)?;
    for (labels, value) in values {
        let mut one = metric.encode_family(&labels)?;
        if is_gauge {
            one.encode_gauge(&(value as f64))?;
        } else {
            one.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
    }
    Ok(())
}

/// A counter's name as a metric, and its unit.
fn metric_name(name: &str) -> (String, Option<Unit>) {
    // The unit is added by the encoder.
    match name {
        _ if name.ends_with("_bytes") => (format!("kvring_{}", name.trim_end_matches("_bytes")), Some(Unit::Bytes)),
        "ssd_recovery_us" => ("kvring_ssd_recovery".into(), Some(Unit::Seconds)),
        _ => (format!("kvring_{}", name.trim_end_matches("_count")), None),
    }
}

/// What a histogram counts.
fn histogram_help(name: &str) -> &'static str {
    match name {
        "request_service" => "How long the shard works on a request; one in 64 is measured.",
        "load" => "From the pickup of a load to its last answer; ssd: some of its blocks were read.",
        "ssd_read_queue" => "How long a read waits before the device gets it.",
        "ssd_read" => "A read of a block, from the device's getting it to its end.",
        "ssd_write" => "A write of a block, from the device's getting it to its end.",
        _ => "See the documentation of this server's version.",
    }
}

/// Buckets as Prometheus wants them: one for each doubling.
fn buckets(snapshot: &Snapshot) -> Vec<(f64, u64)> {
    // From 2^8 ns to 2^34 ns, which is 17 s; eight of ours each.
    const FIRST: usize = 8;
    const LAST: usize = 34;
    let start = |octave: usize| (octave - 2) * 8;
    let mut made = Vec::new();
    for octave in FIRST..=LAST {
        let from = if octave == FIRST { 0 } else { start(octave - 1) };
        let count = snapshot.buckets.get(from..start(octave)).map_or(0, |buckets| buckets.iter().sum());
        made.push(((1u64 << octave) as f64 / 1e9, count));
    }
    let rest = snapshot.buckets.get(start(LAST)..).map_or(0, |buckets| buckets.iter().sum());
    made.push((f64::MAX, rest));
    made
}

impl Collector for Shown {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        self.encode_server(&mut encoder)?;
        self.encode_counters(&mut encoder)?;
        self.encode_histograms(&mut encoder)?;
        self.encode_devices(&mut encoder)?;
        self.encode_sessions(&mut encoder)?;
        self.encode_namespaces(&mut encoder)?;
        self.encode_flexkv(&mut encoder)
    }
}

impl Shown {
    fn encode_server(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let up = f64::from(u8::from(self.health == Health::Serving));
        gauge(encoder, "kvring_up", UP, None, up)?;
        let (beat_ns, sleeps_until_ns) = self.server.stats.heartbeat();
        let age = monotonic_ns().saturating_sub(beat_ns.max(sleeps_until_ns)) as f64 / 1e9;
        let help = "Since the shard should have shown itself last; above 2 it hangs.";
        gauge(encoder, "kvring_heartbeat_age", help, Some(&Unit::Seconds), age)?;
        let (epoch, ..) = self.server.stats.owner();
        let help = "Engine processes so far: rises with each crash and each upgrade.";
        gauge(encoder, "kvring_epoch", help, None, epoch as f64)?;
        let started = self.server.stats.realtime_ns(self.server.stats.started_ns()) as f64 / 1e9;
        gauge(
            encoder,
            "kvring_start_time",
            "Unix time at which the engine process began to serve.",
            Some(&Unit::Seconds),
            started,
        )?;
        let text = &self.server.text;
        let help = "Bytes of a block.";
        gauge(encoder, "kvring_block", help, Some(&Unit::Bytes), text.slot_bytes as f64)?;
        let setting = |name: &str| text.settings.get(name).cloned().unwrap_or_default();
        let labels: Labels = vec![
            ("version".into(), text.version.clone()),
            ("eviction_policy".into(), setting("eviction_policy")),
            ("io_engine".into(), setting("io_engine")),
        ];
        encoder.encode_descriptor("kvring_build", "Version and policy.", None, MetricType::Info)?.encode_info(&labels)
    }

    fn encode_counters(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        for (name, help) in &self.server.text.names.counters {
            let value = self.sample.counter(name);
            let (metric, unit) = metric_name(name);
            let help = help.trim_end_matches('.');
            let is_gauge = self.server.text.names.gauges.contains(name);
            if name == "ssd_recovery_us" {
                gauge(
                    encoder,
                    &metric,
                    "From the start until what the SSD held was resident again; 0 until then",
                    unit.as_ref(),
                    value as f64 / 1e6,
                )?;
            } else if is_gauge {
                gauge(encoder, &metric, help, unit.as_ref(), value as f64)?;
            } else {
                let mut metric = encoder.encode_descriptor(&metric, help, unit.as_ref(), MetricType::Counter)?;
                metric.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
            }
        }
        Ok(())
    }

    fn encode_histograms(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut done: Vec<&str> = Vec::new();
        for (HistogramName { name, .. }, _) in &self.sample.histograms {
            if done.contains(&name.as_str()) {
                continue;
            }
            done.push(name);
            let metric = format!("kvring_{name}");
            let mut family = encoder.encode_descriptor(
                &metric,
                histogram_help(name),
                Some(&Unit::Seconds),
                MetricType::Histogram,
            )?;
            for (HistogramName { labels, .. }, snapshot) in
                self.sample.histograms.iter().filter(|(n, _)| n.name == *name)
            {
                let (sum, count) = (snapshot.sum_ns as f64 / 1e9, snapshot.count());
                family.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets(snapshot), None)?;
            }
        }
        Ok(())
    }

    fn encode_devices(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let help = |name: &str| match name {
            "reads_waiting" => "Reads that wait for the device",
            "reads_inflight" => "Reads that the device has",
            "writes_waiting" => "Write-backs that wait for the device",
            "writes_inflight" => "Write-backs that the device has",
            "reads_count" => "Blocks read",
            "read_bytes" => "Bytes of blocks read",
            "writes_count" => "Blocks written",
            "write_bytes" => "Bytes of blocks written",
            "header_writes_count" => "Sectors of headers written",
            "errors_count" => "Transfers of blocks that failed or brought other bytes than were written",
            "lost" => "1 while the device is lost: its blocks are forgotten and nothing is asked of it",
            "health_known" => "1 if the drive says what the next ones tell (NVMe, log page 02h)",
            "critical_warning" => "Bits of the drive's critical warnings; 0 is well",
            "temperature_celsius" => "The drive's temperature",
            "available_spare_percent" => "Spare blocks that the drive has left",
            "used_percent" => "The drive's life used, as its vendor estimates; may exceed 100",
            "media_errors_count" => "Errors that the drive could not mend, since it was made",
            "drive_written_bytes" => "Bytes written to the drive by everybody, since it was made",
            _ => "See the documentation of this server's version",
        };
        for column in &self.server.text.names.device {
            let is_gauge = !column.ends_with("_count") && !column.ends_with("_bytes");
            let (metric, unit) = metric_name(&format!("device_{column}"));
            let value = |(at, row): (usize, &crate::observe::Row)| {
                ([("device".to_owned(), at.to_string())], row.get(column).copied().unwrap_or(0))
            };
            let values = self.sample.devices.iter().enumerate().map(value);
            family(encoder, &metric, help(column), unit.as_ref(), is_gauge, values)?;
        }
        Ok(())
    }

    /// The largest by their ids, the rest together: a series for each tenant there ever was is more than Prometheus likes.
    fn encode_namespaces(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        const FAMILIES: [(&str, &str, &str, bool); 3] = [
            ("kvring_namespace_blocks", "blocks", "Blocks there are", true),
            ("kvring_namespace_hit_blocks", "hit_blocks", "Blocks that matches have found", false),
            ("kvring_namespace_evicted_blocks", "evicted_blocks", "Blocks that had to go from both tiers", false),
        ];
        let (shown, rest) = self.namespaces.split_at(self.namespaces.len().min(NAMESPACES_SHOWN));
        for (metric, field, help, is_gauge) in FAMILIES {
            let value = |namespace: &Value| namespace[field].as_u64().unwrap_or(0);
            let label = |id: &str| [("namespace".to_owned(), id.to_owned())];
            let each = shown.iter().map(|one| (label(one["namespace"].as_str().unwrap_or_default()), value(one)));
            // What others have counted goes up and down, as they come and go.
            let others = (!rest.is_empty() && is_gauge).then(|| (label("others"), rest.iter().map(value).sum()));
            family(encoder, metric, help, None, is_gauge, each.chain(others))?;
        }
        Ok(())
    }

    fn encode_sessions(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        const COUNTERS: [(&str, &str); 9] = [
            ("matches_count", "Match requests answered"),
            ("match_blocks_requested_count", "Blocks named by match requests"),
            ("match_blocks_hit_count", "Leading blocks that were resident"),
            ("load_blocks_dram_count", "Blocks loaded from the pool"),
            ("load_blocks_ssd_count", "Blocks loaded after a read from the SSD"),
            ("load_blocks_miss_count", "Blocks of loads that were not there"),
            ("reserve_blocks_dropped_count", "Blocks of stores that were dropped"),
            ("commit_blocks_count", "Blocks that became resident"),
            ("reserve_blocks_present_count", "Blocks of stores that were resident or on their way already"),
        ];
        const GAUGES: [(&str, &str); 4] = [
            ("leases_count", "Leases held"),
            ("loans_count", "Slots on loan"),
            ("submissions_waiting", "Requests that were not picked up yet"),
            ("completions_waiting", "Answers that the instance has not read yet"),
        ];
        let labels = |row: &crate::observe::Row| {
            let label = |name: &str, column: &str| (name.to_owned(), row.get(column).copied().unwrap_or(0).to_string());
            [label("instance_id", "instance_id"), label("rank", "rank"), label("session", "session")]
        };
        for (columns, is_gauge) in [(&COUNTERS[..], false), (&GAUGES[..], true)] {
            for (column, help) in columns {
                let (metric, unit) = metric_name(&format!("session_{column}"));
                let its = |session: &crate::observe::Session| {
                    (labels(&session.row), session.row.get(*column).copied().unwrap_or(0))
                };
                family(encoder, &metric, help, unit.as_ref(), is_gauge, self.sample.sessions.iter().map(its))?;
            }
        }
        let help = "From the pickup of a session's load to its last answer.";
        let mut metric =
            encoder.encode_descriptor("kvring_session_load", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for session in &self.sample.sessions {
            let last = SESSION_WORDS - SESSION_HISTOGRAM - 1;
            let bound = |at: usize| if at == last { f64::MAX } else { ((1u64 << (at + 1)) - 1) as f64 / 1e6 };
            let buckets: Vec<_> = session.loads.iter().enumerate().map(|(at, count)| (bound(at), *count)).collect();
            let sum = session.row.get("load_ns_sum").copied().unwrap_or(0) as f64 / 1e9;
            let count = session.loads.iter().sum();
            metric.encode_family(&labels(&session.row))?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    /// FlexKV's names, where what they count is counted here too.
    fn encode_flexkv(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let v = |name: &str| self.sample.counter(name);
        let device = |cpu: u64, ssd: u64| [([("device", "cpu")], cpu), ([("device", "ssd")], ssd)];
        let (dram, ssd, stored) = (v("load_blocks_dram_count"), v("load_blocks_ssd_count"), v("commit_blocks_count"));
        let slot_bytes = self.server.text.slot_bytes;
        let hit = v("match_blocks_hit_count");
        let missed = v("match_blocks_requested_count").saturating_sub(hit);
        let (read, written) = (v("ssd_read_bytes"), v("ssd_write_bytes"));
        let blocks_of = |bytes: u64| bytes.checked_div(slot_bytes).unwrap_or(0);
        let way = |kind, operation| [("transfer_type", kind), ("operation", operation)];
        let ways = |h2d, d2h, disk2h, h2disk| {
            [
                (way("H2D", "get"), h2d),
                (way("D2H", "put"), d2h),
                (way("DISK2H", "get"), disk2h),
                (way("H2DISK", "put"), h2disk),
            ]
        };
        let blocks = ways(dram + ssd, stored, blocks_of(read), blocks_of(written));
        let bytes = ways((dram + ssd) * slot_bytes, stored * slot_bytes, read, written);
        // Both of matches, so that their ratio is one. Which tier a matched block is in, nobody asks before it is loaded.
        for (name, help, blocks) in [
            ("flexkv_py_cache_hit_blocks", "FlexKV's name: blocks that matches found, in either tier", hit),
            ("flexkv_py_cache_miss_blocks", "FlexKV's name: blocks that matches named and no tier had", missed),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            metric.encode_counter::<NoLabelSet, _, u64>(&blocks, None)?;
        }
        family(encoder, "flexkv_py_transfer_blocks", "FlexKV's name: blocks moved", None, false, blocks)?;
        family(encoder, "flexkv_py_transfer_bytes", "FlexKV's name: bytes moved", None, false, bytes)?;
        let total = device(v("host_slots_count"), v("ssd_slots_count"));
        family(encoder, "flexkv_py_mempool_total_blocks", "FlexKV's name: slots", None, true, total)?;
        let free = device(v("host_slots_free_count"), v("ssd_slots_free_count"));
        family(encoder, "flexkv_py_mempool_free_blocks", "FlexKV's name: free slots", None, true, free)?;
        let evicted = device(v("evict_host_count"), v("evict_ssd_count"));
        family(encoder, "flexkv_py_evicted_blocks", "FlexKV's name: blocks evicted", None, false, evicted)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn only_a_whole_get_of_metrics_is_answered_with_them() {
        assert_eq!(asked(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), Some("200 OK"));
        assert_eq!(asked(b"GET /metrics?name[]=a HTTP/1.0\r\n\r\n"), Some("200 OK"));
        assert_eq!(asked(b"GET /metrics HTTP/1.1\r\nHost: x\r\n"), None);
        assert_eq!(asked(b"GET / HTTP/1.1\r\n\r\n"), Some("404 Not Found"));
        assert_eq!(asked(b"POST /metrics HTTP/1.1\r\n\r\n"), Some("405 Method Not Allowed"));
        assert_eq!(asked(b"\x16\x03\x01\x02"), Some("400 Bad Request"));
    }

    #[test]
    fn buckets_lose_no_value() {
        let stats = kvring_ipc::stats::Stats::private(0).unwrap();
        let values = [0, 1, 255, 256, 257, 511, 512, 1 << 20, (1 << 34) - 1, 1 << 34, u64::MAX];
        values.iter().for_each(|value| stats.histogram(0).record(*value));
        let made = buckets(&stats.histogram(0).snapshot());
        assert_eq!(made.iter().map(|(_, count)| count).sum::<u64>(), values.len() as u64);
        let until = |bound: f64| made.iter().take_while(|(end, _)| *end <= bound).map(|(_, count)| count).sum::<u64>();
        assert_eq!([until(256e-9), until(512e-9), until(17.2)], [3, 6, 9]);
    }
}
