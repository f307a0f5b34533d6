//! `kvring serve`: configuration in, server out.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use kvring_engine::control::engine::Prepared;
use kvring_engine::control::keeper::{Inheritance, Keeper, Signals};
use kvring_engine::control::{Server, end_with_a_panic};
use kvring_ipc::config::{Config, OnMismatch};
use kvring_ipc::handshake::{Reply, Request, ask};
use kvring_ipc::launch::beside_socket;
use kvring_ipc::layout::Layout;

use crate::Outcome;
use crate::settings::Settings;

/// Arguments of `kvring serve`.
#[derive(Args)]
pub struct ServeArgs {
    /// What blocks look like, as JSON; without it the first instance says.
    #[arg(long, value_name = "JSON")]
    layout: Option<String>,
    /// Serve opaque blocks of this many KiB (benchmarks and replays), instead of --layout.
    #[arg(long, value_name = "KIB", conflicts_with = "layout")]
    block_kib: Option<u64>,
    /// Take the block devices in ssd_cache_dir whatever lies on them: another program's data there is destroyed.
    #[arg(long)]
    force_format: bool,
    /// Start the server in a session of its own and return.
    #[arg(long)]
    detach: bool,
    /// Stop when the process that started this one ends.
    #[arg(long, conflicts_with = "detach")]
    die_with_parent: bool,
    /// Be the engine process of the keeper at the other end of standard input.
    #[arg(long, hide = true, conflicts_with = "detach")]
    engine: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Runs the server: the keeper, which starts this program again as its engine process.
pub fn run(args: ServeArgs) -> Outcome {
    let mut loaded = args.settings.load()?;
    if args.force_format {
        loaded.config.ssd_on_mismatch = OnMismatch::Format;
    }
    if args.detach {
        return detach(&loaded.config);
    }
    if args.die_with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    }
    // A log that nobody reads is no reason to wait: lines are dropped then.
    let (writer, told) = tracing_appender::non_blocking(std::io::stderr());
    let filter = tracing_subscriber::EnvFilter::new(&loaded.config.log_level);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        // A log that cannot be written is no reason to die.
        .log_internal_errors(false)
        .init();
    // Once: the keeper has said it.
    for note in loaded.notes.iter().filter(|_| !args.engine) {
        tracing::warn!("{note}");
    }
    let layout = match (&args.layout, args.block_kib) {
        (Some(text), _) => Some(serde_json::from_str::<Layout>(text).map_err(|error| format!("--layout: {error}"))?),
        (None, Some(kib)) => Some(Layout::opaque(kib << 10)),
        (None, None) => None,
    };
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let stop = readable_on(&[SIGTERM, SIGINT])?;
    if args.engine {
        end_with_a_panic();
        // A hangup is the keeper's to hear.
        let _hangup = readable_on(&[SIGHUP])?;
        let mut prepared = None;
        let inheritance = Inheritance::receive(|kept, sizes| {
            let mut config = loaded.config.clone();
            config.resize(sizes);
            prepared = Prepared::over(&config, layout.as_ref(), kept)?;
            Ok(prepared.is_some())
        })?;
        loaded.config.resize(inheritance.sizes.unwrap_or_default());
        let (listen, socket) = (loaded.config.metrics_listen.clone(), loaded.config.socket.clone());
        let allowed_groups = loaded.config.allowed_groups.clone();
        let server = Server::new(loaded.config, layout, inheritance, prepared, stop)?;
        if let Some(listen) = listen {
            crate::metrics::serve(listen, socket, allowed_groups);
        }
        if server.run() {
            return Ok(());
        }
        tracing::error!("the data plane failed");
        drop(told);
        // Not the status of one that cannot start: this one died.
        std::process::exit(70);
    }
    let signals = Signals { stop, hand_over: readable_on(&[SIGHUP])? };
    // Where the program is now: what lies there later is what an upgrade starts.
    let program = std::env::current_exe()?;
    // Said once, and meant once: an engine process that follows another destroys nothing.
    let may_format = std::cell::Cell::new(true);
    let command = |own_program: bool| {
        let may_format = may_format.replace(false);
        let mut command = Command::new(if own_program { Path::new("/proc/self/exe") } else { &program });
        let is_for_it = |argument: &std::ffi::OsString| {
            argument != "--die-with-parent" && (may_format || argument != "--force-format")
        };
        command.args(std::env::args_os().skip(1).filter(is_for_it)).arg("--engine");
        command
    };
    Ok(Keeper::new(loaded.config, &signals)?.run(&signals, command)?)
}

/// Readable once one of these signals has come.
fn readable_on(signals: &[i32]) -> std::io::Result<OwnedFd> {
    let (read, write) = UnixStream::pair()?;
    for signal in signals {
        signal_hook::low_level::pipe::register(*signal, write.try_clone()?)?;
    }
    Ok(read.into())
}

/// What the instance that started us had open, and forgot to mark close-on-exec, is none of a server's
/// business: it would hold that instance's sockets and pipes open for ever.
#[expect(unsafe_code, reason = "close_range has no safe binding")]
fn keep_no_descriptors() {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: only marks descriptors above standard error, for the exec that follows. Linux 5.11; before,
    // it fails and changes nothing.
    unsafe { libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) };
}

/// Starts the server proper in a session of its own, writing to its log; it is init's child once we
/// return, which is when it answers.
fn detach(config: &Config) -> Outcome {
    keep_no_descriptors();
    // Not a group leader unless a shell made us one; then we are in nobody's way either.
    let _ = rustix::process::setsid();
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1).filter(|argument| argument != "--detach"));
    let log_path = config.server_log.clone().unwrap_or_else(|| beside_socket(&config.socket, "log"));
    let log = std::fs::OpenOptions::new().create(true).append(true).open(&log_path);
    let log = log.map_err(|error| {
        format!("server_log: cannot open {}: {error}: set it to a file that this user may write", log_path.display())
    })?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut child = command.spawn().map_err(|error| format!("cannot start the server: {error}"))?;
    let child_id = child.id();
    // A big pool takes its time; whoever waits for us is a thread with nothing else to do.
    let deadline = Instant::now() + Duration::from_secs(60);
    let ours = |reply| match reply {
        Ok(Reply::Stats(stats)) => stats["keeper_pid"] == child_id,
        // It answers, and does not say what: another version.
        Ok(_) => true,
        Err(_) => false,
    };
    while !ours(ask(&config.socket, &Request::Stats, Duration::from_secs(2))) {
        if Instant::now() > deadline {
            return Err(format!("the server does not answer after 60 s: see {}", log_path.display()).into());
        }
        if let Some(status) = child.try_wait()? {
            return Err(format!("the server did not start ({status}): see {}", log_path.display()).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
