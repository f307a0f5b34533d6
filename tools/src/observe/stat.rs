//! `kvring stat`, `kvring sessions` and `kvring devices`: one screen, or JSON.

use std::fmt::Write;

use clap::Args;
use indicatif::{HumanBytes, HumanCount, HumanDuration};
use kvring_ipc::client::monotonic_ns;
use kvring_ipc::handshake::{Reply, Request, ask};
use serde_json::{Value, json};

use super::{Health, Sample, Server, Session, Which, latency, short_ns};
use crate::Outcome;
use crate::settings::Settings;

/// Arguments of each.
#[derive(Args)]
pub struct StatArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Of the engine process before the one that serves: what it had counted when it died
    #[arg(long)]
    previous: bool,
    #[command(flatten)]
    settings: Settings,
}

impl StatArgs {
    fn server(&self) -> Result<Server, Box<dyn std::error::Error>> {
        let which = if self.previous { Which::Previous } else { Which::Current };
        Ok(Server::find(&self.settings.load()?.config.socket, which)?)
    }
}

/// One screen of everything.
pub fn stat(args: &StatArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    // What only the control plane knows; a server without a pool has nothing else.
    let told = match ask(&socket, &Request::Stats, super::PATIENCE) {
        Ok(Reply::Stats(told)) if !args.previous => Some(told),
        _ => None,
    };
    let server = match (args.server(), &told) {
        (Err(_), Some(told)) if told.get("metrics").is_none() => {
            if args.json {
                println!("{}", serde_json::to_string_pretty(told)?);
            } else {
                println!("kvring serves {}: no worker has attached yet, so there is no pool", socket.display());
            }
            return Ok(());
        }
        (Err(error), Some(told)) if args.json => {
            // Whoever may not read the segment is told what everybody may know.
            let mut told = told.clone();
            told["stats_segment"] = json!(error.to_string());
            println!("{}", serde_json::to_string_pretty(&told)?);
            return Ok(());
        }
        (server, _) => server?,
    };
    let (sample, health) = (server.sample(), server.health());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&as_json(&server, &sample, health, told))?);
    } else {
        print!("{}", screen(&server, &sample, health));
    }
    if matches!(health, Health::Serving) || args.previous { Ok(()) } else { Err(health.to_string().into()) }
}

/// A table of sessions.
pub fn sessions(args: &StatArgs) -> Outcome {
    let server = args.server()?;
    server.say_if_it_hangs();
    let sample = server.sample();
    if args.json {
        let rows: Vec<_> = sample.sessions.iter().map(session_json).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", session_table(&sample, monotonic_ns()));
    }
    Ok(())
}

/// A table of devices.
pub fn devices(args: &StatArgs) -> Outcome {
    let server = args.server()?;
    server.say_if_it_hangs();
    let sample = server.sample();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&devices_json(&server, &sample))?);
    } else {
        print!("{}", device_table(&server, &sample));
    }
    Ok(())
}

fn session_json(session: &Session) -> Value {
    let mut row = json!(session.row);
    row["load_us_histogram"] = json!(session.loads);
    row
}

fn devices_json(server: &Server, sample: &Sample) -> Vec<Value> {
    let described = server.text.devices.iter().zip(&sample.devices).enumerate();
    let device = described.map(|(at, (text, row))| {
        let mut device = json!(row);
        device["device"] = json!(at);
        device["description"] = json!(text);
        let its = |(name, _): &&(_, _)| device_of(name) == Some(at);
        device["latency"] = sample.histograms.iter().filter(its).map(|(name, held)| latency(name, held)).collect();
        device
    });
    device.collect()
}

fn device_of(name: &kvring_ipc::stats::HistogramName) -> Option<usize> {
    name.labels.iter().find(|(key, _)| key == "device")?.1.parse().ok()
}

/// All of it, beside what the control plane says.
fn as_json(server: &Server, sample: &Sample, health: Health, told: Option<Value>) -> Value {
    let (epoch, pid, _) = server.stats.owner();
    let mut all = told.unwrap_or_else(|| {
        json!({
            "version": server.text.version,
            "server_pid": pid,
            "keeper_pid": server.text.keeper_pid,
            "epoch": epoch,
            "socket": server.text.socket,
            "settings": server.text.settings,
            "layout": server.text.layout,
            "page_bytes": server.text.page_bytes,
            "slot_bytes": server.text.slot_bytes,
        })
    });
    all["health"] = json!(health.name());
    all["uptime_s"] = json!(monotonic_ns().saturating_sub(server.stats.started_ns()) / 1_000_000_000);
    all["metrics"] = json!(sample.counters);
    all["sessions"] = sample.sessions.iter().map(session_json).collect();
    all["devices"] = json!(devices_json(server, sample));
    all["latency"] = sample.histograms.iter().map(|(name, snapshot)| latency(name, snapshot)).collect();
    all
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

fn screen(server: &Server, sample: &Sample, health: Health) -> String {
    let mut out = String::new();
    let n = |name: &str| HumanCount(sample.counter(name));
    let v = |name: &str| sample.counter(name);
    let (epoch, pid, _) = server.stats.owner();
    let text = &server.text;
    let up = std::time::Duration::from_nanos(monotonic_ns().saturating_sub(server.stats.started_ns()));
    let _ = writeln!(out, "kvring {} on {}: {health}", text.version, text.socket);
    let _ =
        writeln!(out, "engine process {pid} (epoch {epoch}, for {}), keeper {}", HumanDuration(up), text.keeper_pid);
    let _ = writeln!(out);
    let slots = v("host_slots_count");
    let _ = writeln!(
        out,
        "DRAM    {} slots of {}, {:.0} % used; {} free, {} in quarantine; pages of {}",
        HumanCount(slots),
        HumanBytes(text.slot_bytes),
        percent(slots.saturating_sub(v("host_slots_free_count")), slots),
        n("host_slots_free_count"),
        n("host_slots_quarantined_count"),
        HumanBytes(text.page_bytes),
    );
    let slots = v("ssd_slots_count");
    if slots > 0 {
        let _ = writeln!(
            out,
            "SSD     {} slots, {:.0} % used; {} free; {} read, {} written",
            HumanCount(slots),
            percent(slots.saturating_sub(v("ssd_slots_free_count")), slots),
            n("ssd_slots_free_count"),
            HumanBytes(v("ssd_read_bytes")),
            HumanBytes(v("ssd_write_bytes")),
        );
    } else {
        let _ = writeln!(out, "SSD     none");
    }
    let _ = writeln!(
        out,
        "blocks  {} known; {} leases, {} sessions",
        n("blocks_count"),
        n("leases_count"),
        n("sessions_count")
    );
    let asked = v("match_blocks_requested_count");
    let _ = writeln!(
        out,
        "match   {:.1} % of {} blocks were there, in {} matches",
        percent(v("match_blocks_hit_count"), asked),
        HumanCount(asked),
        n("matches_count"),
    );
    let _ = writeln!(
        out,
        "load    {} blocks from DRAM, {} from SSD ({} waited for another's read), {} missed, in {} loads",
        n("load_blocks_dram_count"),
        n("load_blocks_ssd_count"),
        n("load_blocks_coalesced_count"),
        n("load_blocks_miss_count"),
        n("loads_count"),
    );
    let _ = writeln!(
        out,
        "store   {} blocks, {} were there already, {} dropped, {} given up",
        n("commit_blocks_count"),
        n("reserve_blocks_present_count"),
        n("reserve_blocks_dropped_count"),
        n("abort_blocks_count"),
    );
    let policy = text.settings.get("eviction_policy").map_or("?", String::as_str);
    let _ = writeln!(
        out,
        "evict   {} from DRAM, {} from SSD ({policy}); {} forgotten on doubt",
        n("evict_host_count"),
        n("evict_ssd_count"),
        n("blocks_forgotten_count"),
    );
    let bad =
        ["ssd_read_errors_count", "ssd_write_errors_count", "ssd_checksum_errors_count", "dram_checksum_errors_count"];
    if bad.iter().any(|name| v(name) > 0) {
        let _ = writeln!(
            out,
            "ERRORS  SSD: {} reads and {} writes failed, {} checksums; DRAM: {} checksums",
            n(bad[0]),
            n(bad[1]),
            n(bad[2]),
            n(bad[3])
        );
    }
    let _ = writeln!(out);
    out.push_str(&latency_table(sample));
    if !text.devices.is_empty() {
        let _ = writeln!(out);
        out.push_str(&device_table(server, sample));
    }
    let _ = writeln!(out);
    out.push_str(&session_table(sample, monotonic_ns()));
    out
}

/// Latencies that anything has.
pub fn latency_table(sample: &Sample) -> String {
    let mut out =
        format!("{:<28} {:>10} {:>10} {:>10} {:>10} {:>10}\n", "latency", "count", "p50", "p90", "p99", "p99.9");
    for (name, snapshot) in sample.histograms.iter().filter(|(_, snapshot)| snapshot.count() > 0) {
        let labels: Vec<_> = name.labels.iter().map(|(_, value)| value.as_str()).collect();
        let at = |quantile| snapshot.quantile_ns(quantile).map_or_else(String::new, short_ns);
        let _ = writeln!(
            out,
            "{:<28} {:>10} {:>10} {:>10} {:>10} {:>10}",
            format!("{} {}", name.name, labels.join(" ")),
            HumanCount(snapshot.count()).to_string(),
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999)
        );
    }
    out
}

/// Devices, one a line.
pub fn device_table(server: &Server, sample: &Sample) -> String {
    let mut out = format!(
        "{:<6} {:>9} {:>9} {:>10} {:>10} {:>10} {:>10} {:>7}  {}\n",
        "device", "reads w/f", "writes w/f", "reads", "read", "writes", "written", "errors", "what it is"
    );
    for (at, (text, row)) in server.text.devices.iter().zip(&sample.devices).enumerate() {
        let v = |name: &str| row.get(name).copied().unwrap_or(0);
        let _ = writeln!(
            out,
            "{at:<6} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10} {:>7}  {text}",
            format!("{}/{}", v("reads_waiting"), v("reads_inflight")),
            format!("{}/{}", v("writes_waiting"), v("writes_inflight")),
            HumanCount(v("reads_count")).to_string(),
            HumanBytes(v("read_bytes")).to_string(),
            HumanCount(v("writes_count")).to_string(),
            HumanBytes(v("write_bytes")).to_string(),
            v("errors_count"),
        );
        if v("lost") > 0 {
            let _ = writeln!(out, "       LOST: its blocks are forgotten; it is tried again now and then");
        }
        if v("health_known") > 0 {
            // What the drive was written, by whomever, for each byte of blocks that this engine process wrote.
            let _ = writeln!(
                out,
                "       {} °C, {} % of its life used, {} % spare, {} media errors, {} written in its life{}",
                v("temperature_celsius"),
                v("used_percent"),
                v("available_spare_percent"),
                v("media_errors_count"),
                HumanBytes(v("drive_written_bytes")),
                if v("critical_warning") > 0 {
                    format!(", CRITICAL WARNING {:#x}: replace it", v("critical_warning"))
                } else {
                    String::new()
                },
            );
        }
    }
    out
}

/// Sessions, one a line.
pub fn session_table(sample: &Sample, now_ns: u64) -> String {
    let mut out = format!(
        "{:>7} {:>8} {:>8} {:>4} {:>9} {:>6} {:>10} {:>9} {:>8} {:>9} {:>7} {:>6} {:>9} {:>9}\n",
        "session",
        "instance",
        "process",
        "rank",
        "matches",
        "hit %",
        "DRAM blks",
        "SSD blks",
        "missed",
        "stored",
        "leases",
        "loans",
        "rings s/c",
        "last seen"
    );
    for session in &sample.sessions {
        let v = |name: &str| session.row.get(name).copied().unwrap_or(0);
        let last = match v("last_request_ns") {
            0 => "never".to_owned(),
            at => format!("{} ago", short_ns(now_ns.saturating_sub(at))),
        };
        let _ = writeln!(
            out,
            "{:>7} {:>8} {:>8} {:>4} {:>9} {:>6.1} {:>10} {:>9} {:>8} {:>9} {:>7} {:>6} {:>9} {:>9}{}",
            v("session"),
            v("instance_id"),
            v("pid"),
            v("rank"),
            HumanCount(v("matches_count")).to_string(),
            percent(v("match_blocks_hit_count"), v("match_blocks_requested_count")),
            HumanCount(v("load_blocks_dram_count")).to_string(),
            HumanCount(v("load_blocks_ssd_count")).to_string(),
            v("load_blocks_miss_count"),
            HumanCount(v("commit_blocks_count")).to_string(),
            v("leases_count"),
            v("loans_count"),
            format!("{}/{}", v("submissions_waiting"), v("completions_waiting")),
            last,
            if v("ended") == 1 { "  (suspect: hung up, dead or cut off)" } else { "" },
        );
    }
    out
}
