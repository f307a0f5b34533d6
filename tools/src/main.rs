//! `kvring`: one command for the server, the replay, the benchmarks and the operator.

mod admin;
mod bench;
mod doctor;
mod fsck;
mod metrics;
mod observe;
mod replay;
mod report;
mod selftest;
mod serve;
mod settings;

use std::io::Write;

use clap::{Parser, Subcommand};

/// One KV cache for every inference instance on a machine.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a cache until stopped (SIGTERM, SIGINT or `kvring stop`).
    Serve(serve::ServeArgs),
    /// Replay a request trace with real instance processes over DRAM and SSD, every byte checked.
    Replay(replay::ReplayArgs),
    /// Measure; without a subcommand: rings, pool, SSD path and eviction beside their floors and ceilings.
    Bench(bench::BenchArgs),
    /// Write one HTML page of a saved run, or of two compared.
    Report(report::ReportArgs),
    /// Show all that a server counts, on one screen or as JSON; of one that hangs too.
    Stat(observe::stat::StatArgs),
    /// Watch a server: rates, tiers, devices, sessions.
    Top(observe::top::TopArgs),
    /// List the sessions, one for each attached process.
    Sessions(observe::stat::StatArgs),
    /// List the devices of the SSD tier: what waits, what was moved, how long that took.
    Devices(observe::stat::StatArgs),
    /// Explain misses and slow requests: what became of a block, which queue a request waited in.
    Explain(observe::explain::ExplainArgs),
    /// Export the last operations for Perfetto or chrome://tracing.
    Trace(observe::trace::TraceArgs),
    /// Print every setting, its value and where that was said; and what a running server has instead.
    Config(admin::ConfigArgs),
    /// List the blocks that are known, or say where one is.
    Blocks(admin::BlocksArgs),
    /// List the namespaces: how many blocks each has, and how many were found.
    Namespaces(admin::NamespacesArgs),
    /// Take no more stores and write what is not on the SSD yet, before a stop or a move.
    Drain(admin::DrainArgs),
    /// Have blocks leave a tier, those that the policy would take next; or one block and all that continues it.
    Evict(admin::EvictArgs),
    /// Forget every block, or those of a namespace, on the SSD too.
    Reset(admin::ResetArgs),
    /// Stop a running server: what is being written is finished.
    Stop(admin::AdminArgs),
    /// Replace a running server's engine process by the program as it is now: the cache stays.
    Upgrade(admin::AdminArgs),
    /// Give the tiers of a running server other sizes: the cache stays.
    Resize(admin::ResizeArgs),
    /// Read what a running cache holds, at a bounded rate, and forget what is not what was stored.
    Verify(admin::VerifyArgs),
    /// Check the SSD tier of a stopped server, and forget what is bad.
    Fsck(fsck::FsckArgs),
    /// Say whether this machine is fit for the cache that is configured, and what mends it.
    Doctor(doctor::DoctorArgs),
    /// Try this machine's device, or its processor: whether copies are right, what becomes of them when something dies, how
    /// fast they are.
    Selftest(selftest::SelftestArgs),
    #[command(hide = true)]
    LeaseHolder(bench::crash::HolderArgs),
    #[command(hide = true)]
    ReplayInstance(replay::worker::WorkerArgs),
}

fn main() -> std::process::ExitCode {
    let command = Cli::parse().command;
    if !matches!(command, Command::Serve(_)) {
        end_with_the_pipe();
    }
    let result = match command {
        Command::Serve(args) => serve::run(args),
        Command::Replay(args) => replay::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Report(args) => report::run(&args),
        Command::Fsck(args) => return fsck::run(&args),
        Command::Doctor(args) => return doctor::run(&args),
        Command::Stat(args) => observe::stat::stat(&args),
        Command::Top(args) => observe::top::top(&args),
        Command::Sessions(args) => observe::stat::sessions(&args),
        Command::Devices(args) => observe::stat::devices(&args),
        Command::Explain(args) => observe::explain::explain(&args),
        Command::Trace(args) => observe::trace::trace(&args),
        Command::Config(args) => admin::config(&args),
        Command::Blocks(args) => admin::blocks(&args),
        Command::Namespaces(args) => admin::namespaces(&args),
        Command::Drain(args) => admin::drain(&args),
        Command::Evict(args) => admin::evict(&args),
        Command::Reset(args) => admin::reset(&args),
        Command::Verify(args) => admin::verify(&args),
        Command::Stop(args) => admin::stop(&args),
        Command::Upgrade(args) => admin::upgrade(&args),
        Command::Resize(args) => admin::resize(&args),
        Command::Selftest(args) => selftest::run(&args),
        Command::LeaseHolder(args) => bench::crash::hold(&args),
        Command::ReplayInstance(args) => replay::worker::run(&args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            // Where nobody listens, nobody is told.
            let _ = writeln!(std::io::stderr(), "kvring: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// `kvring stat | head` ends quietly, as other tools do. A server does not end with a pipe.
#[expect(unsafe_code, reason = "SIGPIPE's default action has no safe binding")]
fn end_with_the_pipe() {
    // SAFETY: no handler of ours is installed; the default action is the kernel's.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// What a command ends with: a sentence for the operator.
type Outcome = Result<(), Box<dyn std::error::Error>>;
