//! `kvring status` and `kvring stop`: one question to a running server each.

use std::time::{Duration, Instant};

use clap::Args;
use kvring_ipc::handshake::{ChannelError, Reply, Request, ask};

use crate::Outcome;
use crate::settings::Settings;

/// Arguments of both.
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
