//! `kvring status`, `kvring stop` and `kvring upgrade`: one question to a running server each.

use std::time::{Duration, Instant};

use clap::Args;
use kvring_ipc::handshake::{ChannelError, Reply, Request, ask};

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

/// Prints the counters.
pub fn status(args: &AdminArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    match ask(&socket, &Request::Stats, PATIENCE).map_err(|error| explained(error, &socket))? {
        Reply::Stats(stats) => println!("{}", serde_json::to_string_pretty(&stats)?),
        reply => return Err(format!("an unexpected answer: {reply:?}").into()),
    }
    Ok(())
}

/// Stops the server and waits until it is gone.
pub fn stop(args: &AdminArgs) -> Outcome {
    let socket = args.settings.load()?.config.socket;
    match ask(&socket, &Request::Stop, PATIENCE).map_err(|error| explained(error, &socket))? {
        Reply::Stopping => {}
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
    let stats = || match ask(&socket, &Request::Stats, PATIENCE) {
        Ok(Reply::Stats(stats)) => Ok(stats),
        Ok(reply) => Err(format!("an unexpected answer: {reply:?}")),
        Err(error) => Err(explained(error, &socket)),
    };
    let before = stats()?;
    let started = Instant::now();
    match ask(&socket, &Request::Upgrade, PATIENCE).map_err(|error| explained(error, &socket))? {
        Reply::Upgrading => {}
        Reply::Refused { reason, .. } => return Err(reason.into()),
        reply => return Err(format!("an unexpected answer: {reply:?}").into()),
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        // Between the two nobody answers.
        let Some(now) = stats().ok().filter(|now| now["epoch"] != before["epoch"]) else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
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
