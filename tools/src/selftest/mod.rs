//! `kvring selftest`: whether copies on this machine's device are right, what becomes of them when something dies, and how
//! fast they are. Each case is a process of its own with a time limit: one that hangs or crashes is reported, and the next
//! begins. What is known is written at once, a JSON object a line.

mod cases;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use crate::Outcome;

/// Arguments of `kvring selftest`.
#[derive(Args, Clone)]
pub struct SelftestArgs {
    /// A CUDA device by its number; without, the processor copies.
    #[arg(long, value_name = "N")]
    device: Option<i32>,
    /// The CUDA driver's library, where it is not found by itself.
    #[arg(long, value_name = "PATH")]
    cuda_driver: Option<PathBuf>,
    /// MiB of one copy whose speed is measured, about.
    #[arg(long, default_value_t = 128)]
    size_mb: usize,
    /// A case that has not ended after so many seconds is killed.
    #[arg(long, default_value_t = 120)]
    limit: u64,
    /// Begin no case after so many minutes.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Only cases whose name contains this, or another PART.
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Leave out cases whose name contains this, or another PART.
    #[arg(long, value_name = "PART")]
    without: Vec<String>,
    /// Where the JSON lines go, instead of standard output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Be the process of a case.
    #[arg(long, hide = true)]
    case: Option<String>,
    /// Be somebody else in a case, with its files.
    #[arg(long, hide = true, num_args = 1..)]
    role: Vec<String>,
}

/// How a case ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Passed,
    Failed,
    Hung,
    Skipped,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Hung => "hung",
            Self::Skipped => "skipped",
        }
    }
}

/// Runs the cases, or is one.
pub fn run(args: &SelftestArgs) -> Outcome {
    if args.case.is_some() || !args.role.is_empty() {
        // Whoever waits for this process may be killed.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    }
    if let [role, files @ ..] = args.role.as_slice() {
        return cases::play(args, role, files);
    }
    let cases = cases::of(args);
    if let Some(name) = &args.case {
        let case = cases.iter().find(|case| case.name == *name).ok_or_else(|| format!("there is no case {name:?}"))?;
        let data = (case.run)(args)?;
        println!("{data}");
        return Ok(());
    }
    let mut lines: Box<dyn Write> = match &args.output {
        Some(path) => Box::new(std::fs::File::create(path).map_err(|error| format!("{}: {error}", path.display()))?),
        None => Box::new(std::io::stdout()),
    };
    let is_chosen = |name: &str| {
        let has_any = |parts: &[String]| parts.iter().any(|part| name.contains(part.as_str()));
        (args.only.is_empty() || has_any(&args.only)) && !has_any(&args.without)
    };
    let chosen: Vec<_> = cases.iter().filter(|case| is_chosen(&case.name)).collect();
    let (began, minutes) = (Instant::now(), Duration::from_secs_f64(args.minutes.clamp(0.0, 1e6) * 60.0));
    let (mut counts, mut late) = ([0usize; 4], 0);
    for (number, case) in chosen.iter().enumerate() {
        let left = minutes.saturating_sub(began.elapsed());
        let started = Instant::now();
        let (end, said) = match left.is_zero() {
            true => {
                late += 1;
                (End::Skipped, Err("out of time: --minutes".to_string()))
            }
            false => in_a_process(args, &case.name, Duration::from_secs(args.limit))?,
        };
        counts[end as usize] += 1;
        let seconds = started.elapsed().as_secs_f64();
        let mut line = json!({"case": case.name, "end": end.name(), "seconds": (seconds * 1e3).round() / 1e3});
        let why = match said {
            Ok(data) => {
                line["data"] = data;
                String::new()
            }
            Err(why) => {
                line["why"] = why.clone().into();
                format!(": {why}")
            }
        };
        writeln!(lines, "{line}")?;
        lines.flush()?;
        let place = format!("[{}/{}]", number + 1, chosen.len());
        eprintln!("{place:>8} {:<8} {seconds:6.1} s  {}{why}", end.name(), case.name);
    }
    let [passed, failed, hung, skipped] = counts;
    eprintln!("{passed} passed, {failed} failed, {hung} hung, {skipped} skipped");
    match failed + hung {
        0 if passed == 0 => Err("no case was run".into()),
        0 if late > 0 => Err(format!("{late} cases were not begun: out of time (--minutes)").into()),
        0 => Ok(()),
        bad => Err(format!("{bad} cases did not pass").into()),
    }
}

/// How long what a case has said is waited for once it has ended.
const PIPES: Duration = Duration::from_secs(5);

/// This program again.
fn again(args: &SelftestArgs) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("selftest").arg("--size-mb").arg(args.size_mb.to_string());
    if let Some(device) = args.device {
        command.arg("--device").arg(device.to_string());
    }
    if let Some(driver) = &args.cuda_driver {
        command.arg("--cuda-driver").arg(driver);
    }
    Ok(command)
}

/// What a case says, or why it did not pass.
fn in_a_process(
    args: &SelftestArgs,
    name: &str,
    limit: Duration,
) -> Result<(End, Result<Value, String>), Box<dyn std::error::Error>> {
    let mut command = again(args)?;
    command.arg("--case").arg(name).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // Read as it comes: a full pipe would stop the case.
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (to_data, data) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let lines = stdout.map(|stdout| BufReader::new(stdout).lines().map_while(Result::ok));
        let values = lines.into_iter().flatten().filter_map(|line| serde_json::from_str::<Value>(&line).ok());
        let _ = to_data.send(values.last());
    });
    let (to_words, words) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        stderr.map(|mut stderr| stderr.read_to_end(&mut text));
        let _ = to_words.send(String::from_utf8_lossy(&text).trim().to_string());
    });
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            // Those that it has started die with it.
            child.kill()?;
            let dead = Instant::now() + Duration::from_secs(10);
            while child.try_wait()?.is_none() && Instant::now() < dead {
                std::thread::sleep(Duration::from_millis(10));
            }
            break None;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let Some(status) = status else {
        // What holds the pipes may be in the kernel for ever: not waited for.
        return Ok((End::Hung, Err(format!("it had not ended after {} s", limit.as_secs()))));
    };
    // One of those that it has started may hold the pipes, and be in the driver for ever.
    let data = data.recv_timeout(PIPES).ok().flatten();
    let words = words.recv_timeout(PIPES).unwrap_or_default();
    Ok(match (status.success(), data) {
        (true, Some(data)) if data.get("skipped").is_some() => {
            (End::Skipped, Err(data["skipped"].as_str().unwrap_or_default().to_string()))
        }
        (true, Some(data)) => (End::Passed, Ok(data)),
        (true, None) => (End::Failed, Err("it said nothing".into())),
        (false, _) => {
            // The last words are why: of those that it has started first, then its own.
            let ours = words.lines().filter_map(|line| line.strip_prefix("kvring: ")).collect::<Vec<_>>().join("; ");
            let last = if ours.is_empty() { words.lines().last().unwrap_or_default() } else { ours.as_str() };
            (End::Failed, Err(if last.is_empty() { status.to_string() } else { format!("{status}: {last}") }))
        }
    })
}
