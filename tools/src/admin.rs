//! `kvring config`, `kvring stop`, `kvring upgrade` and `kvring verify`: questions to a running server.

use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kvring_ipc::config::CLIENT_SETTINGS;
use kvring_ipc::handshake::{ChannelError, Reply, Request, ask};
use serde_json::{Value, json};

use crate::Outcome;
use crate::settings::Settings;

/// Arguments of each.
#[derive(Args)]
pub struct AdminArgs {
    #[command(flatten)]
    settings: Settings,
}

const PATIENCE: Duration = Duration::from_secs(2);

fn explained(error: ChannelError, socket: &std::path::Path) -> String {
    use rustix::io::Errno;
    let socket = socket.display();
    match error {
        ChannelError::System(Errno::NOENT | Errno::CONNREFUSED) => format!("no server listens on {socket}"),
        ChannelError::TimedOut => format!("the server on {socket} does not answer: it is stopped or hung"),
        error => format!("{socket}: {error}"),
    }
}

fn stats(socket: &std::path::Path) -> Result<serde_json::Value, String> {
    match ask(socket, &Request::Stats, PATIENCE) {
        Ok(Reply::Stats(stats)) => Ok(stats),
        Ok(Reply::Refused { reason, .. }) => Err(reason),
        Ok(reply) => Err(format!("an unexpected answer: {reply:?}")),
        Err(error) => Err(explained(error, socket)),
    }
}

/// Arguments of `kvring config`.
#[derive(Args)]
#[command(after_help = "\
What a server or an instance that is started here, with these flags and this environment, takes. Flags go before the file, that before KVRING_*, that before FLEXKV_*.")]
pub struct ConfigArgs {
    /// Only what was said anywhere, and what a running server has otherwise
    #[arg(long)]
    said: bool,
    /// Print JSON: name, value, origin, and the running server's value
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Prints every setting, its value, and where that comes from.
pub fn config(args: &ConfigArgs) -> Outcome {
    let loaded = args.settings.load()?;
    // Without a server there is nothing to compare with.
    let server = stats(&loaded.config.socket).ok().map(|mut stats| stats["settings"].take());
    let mut lines = Vec::new();
    for (name, value) in loaded.config.as_text() {
        let origin = loaded.origins.get(name.as_str()).map_or("default", String::as_str);
        let has = server.as_ref().and_then(|server| server[&name].as_str());
        // What is an instance's own is no server's.
        let other = has.filter(|has| *has != value && !CLIENT_SETTINGS.contains(&name.as_str()));
        if !args.said || origin != "default" || other.is_some() {
            lines.push(json!({"name": name, "value": value, "origin": origin, "server": other}));
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
        return Ok(());
    }
    let text = |line: &Value, field: &str| line[field].as_str().unwrap_or_default().to_owned();
    let width = |field| lines.iter().map(|line| text(line, field).chars().count()).max().unwrap_or(0).min(40);
    let (names, values) = (width("name"), width("value"));
    for line in &lines {
        let [name, value, origin] = ["name", "value", "origin"].map(|field| text(line, field));
        let other = line["server"].as_str().map_or_else(String::new, |has| format!("  (the server runs with {has})"));
        println!("{name:<names$}  {value:<values$}  {origin}{other}");
    }
    loaded.notes.iter().for_each(|note| println!("{note}"));
    Ok(())
}

/// Stops the server and waits until it is gone.
pub fn stop(args: &AdminArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    match ask(&socket, &Request::Stop, PATIENCE).map_err(|error| explained(error, &socket))? {
        Reply::Stopping => {}
        Reply::Refused { reason, .. } => return Err(reason.into()),
        reply => return Err(format!("an unexpected answer: {reply:?}").into()),
    }
    let lock = kvring_ipc::launch::beside_socket(&socket, "lock");
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if kvring_ipc::launch::try_lock(&lock)?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err("the server was told to stop and is still there after 10 s".into())
}

/// Has another engine process take over, from the program file as it is now, and waits until it serves.
pub fn upgrade(args: &AdminArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    let before = stats(&socket)?;
    let started = Instant::now();
    match ask(&socket, &Request::Upgrade, PATIENCE).map_err(|error| explained(error, &socket))? {
        Reply::Upgrading => {}
        Reply::Refused { reason, .. } => return Err(reason.into()),
        reply => return Err(format!("an unexpected answer: {reply:?}").into()),
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        // Between the two nobody answers.
        let now = stats(&socket).ok();
        let is_another = |now: &Value| now["epoch"] != before["epoch"];
        let is_off = |now: &Value| !is_another(now) && now["upgrades_failed"] != before["upgrades_failed"];
        let Some(now) = now.filter(|now| is_another(now) || is_off(now)) else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        if is_off(&now) || now["fell_back"] == true {
            return Err("the program does not start (see the server's log): the one that ran goes on".into());
        }
        let metric = |name: &str| now["metrics"][name].as_u64().unwrap_or(0);
        println!(
            "kvring {} has taken over from {} in {:.0} ms: {} blocks in the pool, {} on the SSD",
            now["version"].as_str().unwrap_or("?"),
            before["version"].as_str().unwrap_or("?"),
            started.elapsed().as_secs_f64() * 1e3,
            metric("dram_recovered_blocks_count"),
            metric("ssd_recovered_blocks_count"),
        );
        return Ok(());
    }
    Err("no other engine process serves after 30 s: see the server's log".into())
}

/// Arguments of `kvring verify`.
#[derive(Args)]
pub struct VerifyArgs {
    /// Most MB that are read in a second, DRAM and SSD together; 0 for as fast as it goes
    #[arg(long, default_value_t = 200)]
    mb_per_s: u64,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Has a running server read what it holds, and shows how it goes.
pub fn verify(args: &VerifyArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    let request = Request::Verify { bytes_per_s: args.mb_per_s.saturating_mul(1_000_000) };
    let epoch = stats(&socket)?["epoch"].take();
    match ask(&socket, &request, PATIENCE).map_err(|error| explained(error, &socket))? {
        Reply::Verifying => {}
        Reply::Refused { reason, .. } if reason.contains("under way") => {}
        Reply::Refused { reason, .. } => return Err(reason.into()),
        reply => return Err(format!("an unexpected answer: {reply:?}").into()),
    }
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} slots, {msg}");
    let bar = ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let state = loop {
        let mut stats = stats(&socket)?;
        if stats["epoch"] != epoch {
            return Err(
                "the engine process was replaced meanwhile: what was verified is not known; run it again".into()
            );
        }
        let state = stats["verify"].take();
        let number = |name: &str| state[name].as_u64().unwrap_or(0);
        bar.set_length(number("slots_total"));
        bar.set_position(number("slots_done"));
        bar.set_message(format!("{} bad", number("bad_dram_blocks") + number("bad_ssd_blocks")));
        if !state["running"].as_bool().unwrap_or(false) {
            break state;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    bar.finish_and_clear();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&state)?);
    }
    let number = |name: &str| state[name].as_u64().unwrap_or(0);
    let (bad_dram, bad_ssd) = (number("bad_dram_blocks"), number("bad_ssd_blocks"));
    if !args.json {
        println!("{:>10} blocks in DRAM compared, {bad_dram} bad", number("dram_blocks"));
        println!("{:>10} blocks on the SSD compared, {bad_ssd} bad", number("ssd_blocks"));
        if number("unreadable_ssd_blocks") > 0 {
            println!("{:>10} blocks on the SSD cannot be read", number("unreadable_ssd_blocks"));
        }
        if number("without_checksum") > 0 {
            println!(
                "{:>10} blocks in DRAM have no checksum (yet): it is made with the write to the SSD, or with verify = always",
                number("without_checksum")
            );
        }
    }
    if number("slots_done") < number("slots_total") && number("unreadable_ssd_blocks") + bad_dram + bad_ssd == 0 {
        let (done, total) = (number("slots_done"), number("slots_total"));
        return Err(
            format!("the verification ended after {done} of {total} slots: the server stopped, or is busy").into()
        );
    }
    match bad_dram + bad_ssd + number("unreadable_ssd_blocks") {
        0 => Ok(()),
        bad => Err(format!("{bad} copies are not what was stored, or cannot be read: what is wrong is forgotten; look at the memory and the device").into()),
    }
}
