//! `kvring blocks`, `drain`, `evict`, `reset`, `kvring config`, `kvring stop`, `kvring upgrade` and `kvring verify`: questions to a running server.

use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kvring_ipc::config::CLIENT_SETTINGS;
use kvring_ipc::handshake::{self, ChannelError, Reply, Request, Sizes};
use kvring_ipc::key::{BlockKey, Namespace};
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
/// A keeper gives its engine process 15 s, and the kernel takes a while for the pool of one that is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(45);
/// A device that ends nothing for so long hangs.
const VERIFY_PATIENCE: Duration = Duration::from_secs(60);
const LARGEST_BLOCK_MB: u64 = 256;

/// Asks, and asks again whoever serves next if the engine process ends before it has answered: one may take over at any moment.
/// Not what must not be done twice.
fn ask(socket: &Path, request: &Request, patience: Duration) -> Result<Reply, ChannelError> {
    use rustix::io::Errno;
    let until = Instant::now() + patience;
    let mut left = patience;
    loop {
        match handshake::ask(socket, request, left) {
            Err(ChannelError::Closed | ChannelError::System(Errno::PIPE | Errno::CONNRESET))
                if Instant::now() < until && !matches!(request, Request::Evict { .. }) =>
            {
                std::thread::sleep(Duration::from_millis(5));
                left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(50));
            }
            answered => return answered,
        }
    }
}

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
    let asked = ask(&loaded.config.socket, &Request::Stats, PATIENCE);
    if matches!(asked, Err(ChannelError::TimedOut)) {
        eprintln!("note: a server is there and does not answer: what it runs with is not shown");
    }
    let server = match asked {
        Ok(Reply::Stats(mut stats)) => Some(stats["settings"].take()),
        _ => None,
    };
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

fn administer(socket: &Path, request: &Request) -> Result<Value, String> {
    administer_within(PATIENCE, socket, request)
}

fn administer_within(patience: Duration, socket: &Path, request: &Request) -> Result<Value, String> {
    match ask(socket, request, patience).map_err(|error| explained(error, socket))? {
        Reply::Admin(answer) => Ok(answer),
        Reply::Refused { reason, .. } => Err(reason),
        reply => Err(format!("an unexpected answer: {reply:?}")),
    }
}

/// Arguments of `kvring blocks`.
#[derive(Args)]
pub struct BlocksArgs {
    /// Only the block with this key: 32 hexadecimal digits
    #[arg(long, value_parser = crate::observe::explain::key_of)]
    key: Option<BlockKey>,
    /// Only those in this tier: dram or ssd
    #[arg(long, value_parser = ["dram", "ssd"])]
    tier: Option<String>,
    /// Only those of this namespace: its id, or its parts (model=, lora=, cache_salt=, tenant=), each with a flag of its own
    #[arg(long, value_name = "ID|PART=TEXT")]
    namespace: Vec<String>,
    /// At most this many
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
    limit: usize,
    /// Print JSON: one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Lists blocks: pieces of the index, each as it was when it was read.
pub fn blocks(args: &BlocksArgs) -> Outcome {
    use std::io::Write;
    let socket = args.settings.load()?.config.socket;
    let key = args.key.map(|key| key.to_string());
    let namespace = namespace_of(&args.namespace)?.map(|id| id.to_string());
    let (mut from, mut left) = (0, args.limit);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if !args.json {
        writeln!(
            out,
            "{:<32}  {:>5}  {:>10}  {:>10}  {:>6}  {:>4}  continues",
            "key", "depth", "DRAM slot", "SSD slot", "leases", "uses"
        )?;
    }
    loop {
        let mut answer = administer(&socket, &Request::Blocks { from, key: key.clone() })?;
        for block in answer["blocks"].as_array_mut().into_iter().flatten() {
            let is_other = namespace.as_ref().is_some_and(|id| block["namespace"] != id.as_str());
            if left == 0 || is_other || args.tier.as_ref().is_some_and(|tier| block[tier].is_null()) {
                continue;
            }
            left -= 1;
            if args.json {
                writeln!(out, "{block}")?;
                continue;
            }
            let slot = |tier: &str| match (block[tier]["slot"].as_u64(), block[tier]["filling"].as_bool()) {
                (Some(slot), Some(true)) => format!("({slot})"),
                (Some(slot), _) => slot.to_string(),
                (None, _) => "-".into(),
            };
            let text = |field: &str| block[field].as_str().unwrap_or("-").to_owned();
            let parent = text("parent");
            let (key, depth, leases, uses) = (text("key"), &block["depth"], &block["leases"], &block["uses"]);
            writeln!(
                out,
                "{key}  {depth:>5}  {:>10}  {:>10}  {leases:>6}  {uses:>4}  {parent}",
                slot("dram"),
                slot("ssd")
            )?;
        }
        match answer["next"].as_u64().filter(|_| left > 0) {
            Some(next) => from = next as u32,
            None => break,
        }
    }
    out.flush()?;
    if left == args.limit && args.key.is_some() {
        return Err("there is no such block: `kvring explain --key` says what became of it".into());
    }
    Ok(())
}

/// The id of a namespace, as it is, or of what it is made.
fn namespace_of(words: &[String]) -> Result<Option<BlockKey>, String> {
    if let [id] = words
        && let Some(id) = BlockKey::from_hex(id)
    {
        return Ok(Some(id));
    }
    let mut namespace = Namespace::default();
    for word in words {
        namespace = match word.split_once('=') {
            Some(("model", text)) => namespace.model(text),
            Some(("lora", text)) => namespace.lora(text),
            Some(("cache_salt", text)) => namespace.cache_salt(text),
            Some(("tenant", text)) => namespace.tenant(text),
            _ => {
                return Err(format!(
                    "--namespace {word:?}: expected an id of 32 hexadecimal digits (`kvring namespaces` lists them), or model=, lora=, cache_salt= or tenant= and a text"
                ));
            }
        };
    }
    Ok((!words.is_empty()).then(|| namespace.id()))
}

/// Arguments of `kvring namespaces`.
#[derive(Args)]
#[command(after_help = "\
A namespace is what separates keys that must never meet: model, LoRA adapter, cache salt, tenant. Its id is a hash of these. \
Zeros: blocks of instances that name none, and of namespaces beyond the first 1,023.")]
pub struct NamespacesArgs {
    /// Only this one: its id, or its parts (model=, lora=, cache_salt=, tenant=), each with a flag of its own
    #[arg(long, value_name = "ID|PART=TEXT")]
    namespace: Vec<String>,
    /// Print JSON: one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

/// All namespaces that a server knows, those with the most blocks first; within so much time.
pub fn namespaces_of(socket: &Path, patience: Duration) -> Result<Vec<Value>, String> {
    let (mut all, mut from) = (Vec::new(), 0);
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let mut answer = administer_within(left, socket, &Request::Namespaces { from })?;
        all.append(answer["namespaces"].as_array_mut().unwrap_or(&mut Vec::new()));
        match answer["next"].as_u64() {
            Some(next) => from = next as u32,
            None => break,
        }
    }
    all.sort_by_key(|namespace| std::cmp::Reverse(namespace["blocks"].as_u64()));
    Ok(all)
}

/// Lists namespaces.
pub fn namespaces(args: &NamespacesArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    let chosen = namespace_of(&args.namespace)?.map(|id| id.to_string());
    let all = namespaces_of(&socket, PATIENCE)?;
    let mut shown: Vec<_> =
        all.iter().filter(|one| chosen.as_ref().is_none_or(|id| one["namespace"] == id.as_str())).collect();
    if let (Some(id), true) = (&chosen, shown.is_empty()) {
        return Err(format!("nothing is known of namespace {id}").into());
    }
    // Everybody's who names none, which mostly is nobody.
    shown.retain(|one| chosen.is_some() || ["blocks", "hit_blocks", "evicted_blocks"].iter().any(|of| one[of] != 0));
    if !args.json {
        println!("{:<32}  {:>10}  {:>14}  {:>14}", "namespace", "blocks", "blocks found", "blocks evicted");
    }
    for one in shown {
        match args.json {
            true => println!("{one}"),
            false => println!(
                "{:<32}  {:>10}  {:>14}  {:>14}",
                one["namespace"].as_str().unwrap_or_default(),
                one["blocks"],
                one["hit_blocks"],
                one["evicted_blocks"]
            ),
        }
    }
    Ok(())
}

/// Arguments of `kvring drain`.
#[derive(Args)]
#[command(after_help = "\
Matches and loads go on. A crash or an upgrade of the engine process ends it; so does --undo.")]
pub struct DrainArgs {
    /// Take stores again
    #[arg(long)]
    undo: bool,
    /// Seconds to wait until everything is written
    #[arg(long, default_value_t = 60)]
    wait: u64,
    #[command(flatten)]
    settings: Settings,
}

/// Drains, and waits until all is written.
pub fn drain(args: &DrainArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    let request = Request::Drain { on: !args.undo };
    let mut answer = administer(&socket, &request)?;
    if args.undo {
        println!("stores are taken again");
        return Ok(());
    }
    if stats(&socket)?["metrics"]["ssd_slots_count"] == 0 {
        println!("stores are refused; there is no SSD tier to write to: what the pool holds ends with the server");
        return Ok(());
    }
    let deadline = Instant::now() + Duration::from_secs(args.wait);
    let bar = ProgressBar::no_length();
    while answer["clean"] != true {
        if Instant::now() > deadline {
            let dirty = &answer["dirty"];
            return Err(format!(
                "{dirty} blocks are not written after {} s: look at the device (kvring devices)",
                args.wait
            )
            .into());
        }
        bar.set_message(format!("{} blocks to write", answer["dirty"]));
        std::thread::sleep(Duration::from_millis(20));
        answer = administer(&socket, &request)?;
    }
    bar.finish_and_clear();
    println!(
        "stores are refused, and all that the SSD has room for is written; `kvring drain --undo` takes stores again"
    );
    Ok(())
}

/// Arguments of `kvring evict`.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["blocks", "key"]))]
pub struct EvictArgs {
    /// How many blocks
    #[arg(long, requires = "tier")]
    blocks: Option<u32>,
    /// Which tier they leave: dram or ssd. What is in no other tier is gone
    #[arg(long, value_parser = ["dram", "ssd"])]
    tier: Option<String>,
    /// The block with this key, and all that continues it, in every tier
    #[arg(long, value_parser = crate::observe::explain::key_of, conflicts_with = "tier")]
    key: Option<BlockKey>,
    #[command(flatten)]
    settings: Settings,
}

/// Evicts.
pub fn evict(args: &EvictArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    if let Some(key) = args.key {
        stats(&socket)?;
        return match kvring_ipc::instance::forget(&socket, key)? {
            0 => Err("there is no such block: `kvring explain --key` says what became of it".into()),
            count => {
                println!("{count} blocks forgotten, on the SSD too: it and what continued it");
                Ok(())
            }
        };
    }
    let (Some(wanted), Some(tier)) = (args.blocks, args.tier.clone()) else { return Err("--blocks and --tier".into()) };
    let mut evicted = 0;
    loop {
        let request = Request::Evict { tier: tier.clone(), blocks: wanted - evicted };
        let answer = administer(&socket, &request)?;
        evicted += answer["evicted"].as_u64().unwrap_or(0) as u32;
        if answer["more"] != true || evicted >= wanted {
            break;
        }
    }
    println!("{evicted} blocks have left {}", if tier == "dram" { "DRAM" } else { "the SSD" });
    if evicted < wanted {
        println!(
            "no other may go now: those that are left are leased, in use, have blocks that continue them, or are to be written first"
        );
    }
    Ok(())
}

/// Arguments of `kvring reset`.
#[derive(Args)]
pub struct ResetArgs {
    /// Yes: every instance's blocks
    #[arg(long)]
    all: bool,
    /// The blocks of this namespace: its id, or its parts (model=, lora=, cache_salt=, tenant=), each with a flag of its own
    #[arg(long, value_name = "ID|PART=TEXT", conflicts_with = "all")]
    namespace: Vec<String>,
    #[command(flatten)]
    settings: Settings,
}

/// Forgets everything, or a namespace.
pub fn reset(args: &ResetArgs) -> Outcome {
    let namespace = namespace_of(&args.namespace)?;
    if !args.all && namespace.is_none() {
        return Err("a reset forgets the blocks of every instance: say --all if that is meant, or --namespace".into());
    }
    let socket = args.settings.load()?.config.socket;
    if let Some(id) = namespace {
        let blocks = kvring_ipc::instance::reset_namespace(&socket, id)?;
        if blocks == 0 {
            return Err(
                format!("no block of namespace {id} was known; if the SSD had any left, it has none now").into()
            );
        }
        println!("{blocks} blocks of namespace {id} forgotten, on the SSD too");
        let nobodys = BlockKey::default();
        // The reset is done, whether or not this is answered.
        let unnamed = namespaces_of(&socket, PATIENCE).unwrap_or_default();
        let unnamed = unnamed.iter().find(|one| one["namespace"] == nobodys.to_string().as_str());
        match unnamed.and_then(|one| one["blocks"].as_u64()) {
            Some(blocks) if blocks > 0 && id != nobodys => println!(
                "{blocks} blocks name no namespace (an older client stored them, or more than 1,023 had blocks): what of them is this one's is not known; `kvring reset --all` forgets all"
            ),
            _ => {}
        }
        return Ok(());
    }
    stats(&socket)?;
    let blocks = kvring_ipc::instance::reset(&socket)?;
    println!("{blocks} blocks forgotten, on the SSD too");
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
    let deadline = Instant::now() + STOP_PATIENCE;
    while Instant::now() < deadline {
        if kvring_ipc::launch::try_lock(&lock)?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(format!("the server was told to stop and is still there after {} s", STOP_PATIENCE.as_secs()).into())
}

/// Nobody has the server's lock any more: there is nobody to wait for.
///
/// # Errors
/// That.
fn is_left_alone(socket: &std::path::Path, since: Instant) -> Outcome {
    // A start waits for whoever holds the lock: it is not tried again and again.
    if since.elapsed() < Duration::from_secs(1) || ask(socket, &Request::Stats, PATIENCE).is_ok() {
        return Ok(());
    }
    std::thread::sleep(Duration::from_millis(100));
    match kvring_ipc::launch::try_lock(&kvring_ipc::launch::beside_socket(socket, "lock"))? {
        Some(_) => Err("the server has ended meanwhile: see its log, and start it anew".into()),
        None => Ok(()),
    }
}

/// Has another engine process take over, from the program file as it is now, and waits until it serves.
pub fn upgrade(args: &AdminArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    let mut before = stats(&socket)?;
    let started = Instant::now();
    match ask(&socket, &Request::Upgrade, PATIENCE).map_err(|error| explained(error, &socket))? {
        // Whoever was asked first may have died, and its successor have taken the wish.
        Reply::Upgrading { epoch, upgrades_failed } if epoch > 0 => {
            (before["epoch"], before["upgrades_failed"]) = (epoch.into(), upgrades_failed.into());
        }
        Reply::Upgrading { .. } => {}
        Reply::Refused { reason, .. } => return Err(reason.into()),
        reply => return Err(format!("an unexpected answer: {reply:?}").into()),
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        is_left_alone(&socket, started)?;
        // Between the two nobody answers.
        let now = stats(&socket).ok();
        let is_another = |now: &Value| now["epoch"] != before["epoch"];
        let is_off = |now: &Value| !is_another(now) && now["upgrades_failed"] != before["upgrades_failed"];
        let Some(now) = now.filter(|now| is_another(now) || is_off(now)) else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        if is_off(&now) || now["fell_back"] == true {
            let why = now["upgrade_failure"].as_str().unwrap_or("see the server's log");
            return Err(format!("the program does not start ({why}): the one that ran goes on").into());
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

/// Arguments of `kvring resize`.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("size").required(true).multiple(true).args(["dram", "ssd"]))]
#[command(after_help = "\
Another engine process takes over with these sizes, as with `kvring upgrade`; instances attach to it by themselves. A smaller
tier keeps what its policy would keep. The sizes hold until the server is started anew: set cpu_cache_gb and ssd_cache_gb
for that.")]
pub struct ResizeArgs {
    /// Size of the pool from now on
    #[arg(long, value_name = "GB", value_parser = gb_of)]
    dram: Option<u64>,
    /// Size of the SSD tier from now on, over all directories
    #[arg(long, value_name = "GB", value_parser = gb_of)]
    ssd: Option<u64>,
    #[command(flatten)]
    settings: Settings,
}

fn gb_of(text: &str) -> Result<u64, String> {
    // As the setting takes it.
    let mut config = kvring_ipc::config::Config::default();
    config.say("cpu_cache_gb", text).map_err(|error| error.problem)?;
    Ok(config.cpu_cache_bytes)
}

/// How long a resize may take: to empty the end of a pool, and to make a bigger one.
const RESIZE_PATIENCE: Duration = Duration::from_secs(180);

/// Gives the tiers of a running server other sizes, and waits until it serves with them.
pub fn resize(args: &ResizeArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    let sizes = Sizes { cpu_cache_bytes: args.dram, ssd_cache_bytes: args.ssd };
    let mut before = stats(&socket)?;
    let started = Instant::now();
    match ask(&socket, &Request::Resize(sizes), PATIENCE).map_err(|error| explained(error, &socket))? {
        // Whoever was asked first may have died, and its successor have taken the wish.
        Reply::Upgrading { epoch, upgrades_failed } if epoch > 0 => {
            (before["epoch"], before["upgrades_failed"]) = (epoch.into(), upgrades_failed.into());
        }
        Reply::Upgrading { .. } => {}
        Reply::Refused { reason, .. } => return Err(reason.into()),
        reply => return Err(format!("an unexpected answer: {reply:?}").into()),
    }
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(Duration::from_millis(100));
    while started.elapsed() < RESIZE_PATIENCE {
        is_left_alone(&socket, started)?;
        // Between the two nobody answers.
        let now = stats(&socket).ok();
        let is_another = |now: &Value| now["epoch"] != before["epoch"];
        let is_off = |now: &Value| !is_another(now) && now["upgrades_failed"] != before["upgrades_failed"];
        let is_emptied = now.as_ref().is_some_and(|now| now["is_vacating"] == true);
        bar.set_message(if is_emptied { "moving blocks out of the end of the pool" } else { "another engine process" });
        let Some(now) = now.filter(|now| is_another(now) || is_off(now)) else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        bar.finish_and_clear();
        if is_off(&now) {
            let why = now["upgrade_failure"].as_str().unwrap_or("the program does not start (see the server's log)");
            return Err(format!("{why}: the tiers stay as they are").into());
        }
        let setting = |name: &str| now["settings"][name].as_str().unwrap_or_default().to_owned();
        let mut config = kvring_ipc::config::Config::default();
        config.resize(sizes);
        let wanted = config.as_text();
        let is_as_asked = |name: &str, asked: Option<u64>| asked.is_none() || wanted[name] == setting(name);
        if !is_as_asked("cpu_cache_gb", args.dram) || !is_as_asked("ssd_cache_gb", args.ssd) {
            return Err("another engine process serves, with the sizes from before: see the server's log".into());
        }
        println!(
            "DRAM {} GB, SSD {} GB, after {:.1} s: {} blocks in the pool",
            setting("cpu_cache_gb"),
            setting("ssd_cache_gb"),
            started.elapsed().as_secs_f64(),
            now["metrics"]["dram_recovered_blocks_count"].as_u64().unwrap_or(0),
        );
        return Ok(());
    }
    Err(format!("no other engine process serves after {} s: see the server's log", RESIZE_PATIENCE.as_secs()).into())
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
    // Of one that is under way it is not known how fast it may go.
    let mut mb_per_s = 1;
    match ask(&socket, &request, PATIENCE).map_err(|error| explained(error, &socket))? {
        Reply::Verifying => mb_per_s = args.mb_per_s.max(1),
        Reply::Refused { reason, .. } if reason.contains("under way") => {}
        Reply::Refused { reason, .. } => return Err(reason.into()),
        reply => return Err(format!("an unexpected answer: {reply:?}").into()),
    }
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} slots, {msg}");
    let bar = ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    // The largest block at this rate, and as long as a device may take that is then found to be lost.
    let pace = Duration::from_secs(LARGEST_BLOCK_MB / mb_per_s);
    let (mut moved, mut bytes) = (Instant::now(), u64::MAX);
    let state = loop {
        let mut stats = stats(&socket)?;
        let read = stats["verify"]["bytes"].as_u64().unwrap_or(0);
        if read != std::mem::replace(&mut bytes, read) {
            moved = Instant::now();
        }
        if moved.elapsed() > VERIFY_PATIENCE + pace {
            return Err(format!(
                "nothing was read for {} s: a device hangs (`kvring devices`); what was verified so far is in `kvring stat`",
                moved.elapsed().as_secs()
            )
            .into());
        }
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
