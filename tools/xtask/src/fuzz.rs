//! Fuzzing on stable Rust, without cargo-fuzz: `fuzz/` is instrumented as cargo-fuzz would have it, and
//! each target runs for a while from its seeds. What was found is kept under `target/fuzz-corpus`.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, cargo, root, seed_of_commit, step};

/// Every target, as in `fuzz/Cargo.toml`.
const TARGETS: [&str; 6] = ["ring_entries", "wire", "handshake", "superblock_and_headers", "slot_table", "config"];

/// What makes libFuzzer see which branches an input takes (cargo-fuzz's own, less the sanitizer, which
/// needs nightly). Overflows and debug assertions are findings.
const RUSTFLAGS: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    --cfg fuzzing -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks";

/// How long, and from where.
struct Plan<'a> {
    targets: Vec<&'a str>,
    seconds: u64,
    seed: u64,
    replay: Option<&'a str>,
}

fn plan<'a>(arguments: &[&'a str]) -> Outcome<Plan<'a>> {
    let mut plan = Plan { targets: TARGETS.to_vec(), seconds: 20, seed: seed_of_commit(), replay: None };
    let mut rest = arguments.iter().copied();
    let mut named = false;
    while let Some(argument) = rest.next() {
        let mut number = || {
            let value = rest.next().and_then(|value| value.parse().ok());
            value.ok_or_else(|| format!("{argument} wants a whole number"))
        };
        match argument {
            "--seconds" => plan.seconds = number()?,
            "--seed" => plan.seed = number()?,
            target if TARGETS.contains(&target) => (plan.targets, named) = (vec![target], true),
            input if named && root().join(input).is_file() => plan.replay = Some(input),
            other => return Err(format!("fuzz: {other} is none of {}, nor an input of one", TARGETS.join(", "))),
        }
    }
    if plan.seconds == 0 {
        // libFuzzer would go on for ever.
        return Err("--seconds must be at least 1".into());
    }
    Ok(plan)
}

/// `cargo xtask fuzz [TARGET [INPUT]] [--seconds N] [--seed N]`.
pub fn fuzz(arguments: &[&str]) -> Outcome {
    let plan = plan(arguments)?;
    let programs = build()?;
    if let Some(input) = plan.replay {
        return step("replay", Command::new(programs.join(plan.targets[0])).arg(input));
    }
    plan.targets.iter().try_for_each(|target| run(&programs, target, &plan))
}

/// Builds every target. Says where the programs are.
fn build() -> Outcome<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let is_there = || Command::new(&compiler).arg("--version").output().is_ok_and(|output| output.status.success());
    if !is_there() {
        // Where that is ours to do.
        let install = "apt-get update -q && apt-get install -qy --no-install-recommends g++";
        let _ = step("install g++", Command::new("sh").args(["-c", install]));
    }
    if !is_there() {
        return Err(format!("libFuzzer is C++ and there is no {compiler}: install a C++ compiler (Debian: g++)"));
    }
    let version = cargo(&["-vV"]).output().map_err(|error| format!("cargo -vV: {error}"))?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).ok_or("cargo -vV names no host")?;
    // With a target named, build scripts and macros are not instrumented.
    let arguments =
        ["build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target-dir", "target/fuzz", "--target", host];
    step("fuzz build", cargo(&arguments).env("RUSTFLAGS", RUSTFLAGS).env_remove("CARGO_ENCODED_RUSTFLAGS"))?;
    Ok(root().join("target/fuzz").join(host).join("release"))
}

fn make(folder: &str) -> Outcome {
    std::fs::create_dir_all(root().join(folder)).map_err(|error| format!("{folder}: {error}"))
}

fn run(programs: &Path, target: &str, plan: &Plan<'_>) -> Outcome {
    // libFuzzer writes to the first of its corpora: never to the seeds.
    let (found, seeds) = (format!("target/fuzz-corpus/{target}"), format!("fuzz/corpus/{target}"));
    let artifacts = format!("fuzz/artifacts/{target}/");
    make(&found)?;
    make(&artifacts)?;
    let output = Command::new(programs.join(target))
        .args([&found, &seeds])
        .arg(format!("-artifact_prefix={artifacts}"))
        .arg(format!("-max_total_time={}", plan.seconds))
        // 32 bits, and 0 would be the clock's.
        .arg(format!("-seed={}", (plan.seed as u32).max(1)))
        .args(["-rss_limit_mb=2048", "-timeout=10"])
        .current_dir(root())
        .output()
        .map_err(|error| format!("{target}: {error}"))?;
    let log = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        // The last lines: what panicked, and the input. Those before say what was new.
        let lines: Vec<&str> =
            log.lines().filter(|line| !line.starts_with('#') && !line.contains("NEW_FUNC")).collect();
        eprintln!("{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        let artifact = log.lines().rev().find_map(|line| line.split_once("Test unit written to "));
        let Some((_, artifact)) = artifact else { return Err(format!("fuzz: {target} stopped: {}", output.status)) };
        return Err(format!("fuzz: {target} fails: replay it with `cargo xtask fuzz {target} {artifact}`"));
    }
    let last = log.lines().rev().find(|line| line.contains("\tDONE")).unwrap_or_default();
    println!("fuzz {target}: {}", last.split_whitespace().collect::<Vec<_>>().join(" "));
    // Were the flags of no effect, everything would pass.
    if last.contains(" cov: ") {
        Ok(())
    } else {
        Err(format!("fuzz: {target} counts no coverage: is it instrumented?"))
    }
}
