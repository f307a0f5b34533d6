//! With the feature `link`: the shim and the SPDK that pkg-config finds, as one object that exports the shim alone.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_LINK").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=shim");
    println!("cargo::rerun-if-env-changed=PKG_CONFIG_PATH");
    if let Err(why) = link() {
        println!("cargo::error={why}");
    }
}

fn link() -> Result<(), String> {
    let place = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    let [shim, all, archive] = ["shim.o", "all.o", "libkvring_spdk.a"].map(|name| place.join(name));
    let includes = pkg_config(&["--cflags", "spdk_nvme", "spdk_env_dpdk"])?;
    let mut compile = Command::new("cc");
    compile.args(["-O2", "-Wall", "-Wextra", "-fPIC", "-c", "shim/kvring_spdk.c", "-o"]).arg(&shim).args(includes);
    run(&mut compile)?;
    // Transports, sockets and buses make themselves known by constructors: all of each archive is wanted.
    let mut join = Command::new("cc");
    join.args(["-r", "-nostdlib", "-o"]).arg(&all).arg(&shim).args(["-Wl,--wrap=spdk_mem_get_fd_and_offset"]);
    join.arg("-Wl,--whole-archive").args(pkg_config(&["--libs", "spdk_nvme", "spdk_env_dpdk", "spdk_sock_posix"])?);
    run(join.arg("-Wl,--no-whole-archive"))?;
    run(Command::new("objcopy").args(["--wildcard", "--keep-global-symbol=kvring_spdk_*"]).arg(&all))?;
    let _ = std::fs::remove_file(&archive);
    run(Command::new("ar").arg("crs").arg(&archive).arg(&all))?;
    println!("cargo::rustc-link-search=native={}", place.display());
    println!("cargo::rustc-link-lib=static:+whole-archive=kvring_spdk");
    for word in pkg_config(&["--libs", "--static", "spdk_syslibs"])? {
        match word.split_at_checked(2) {
            Some(("-L", dir)) => println!("cargo::rustc-link-search=native={dir}"),
            Some(("-l", name)) => println!("cargo::rustc-link-lib={name}"),
            _ if word.ends_with(".a") => link_archive(Path::new(&word)),
            _ => {}
        }
    }
    Ok(())
}

fn link_archive(path: &Path) {
    if let (Some(dir), Some(stem)) = (path.parent(), path.file_stem().and_then(|stem| stem.to_str())) {
        println!("cargo::rustc-link-search=native={}", dir.display());
        println!("cargo::rustc-link-lib=static={}", stem.trim_start_matches("lib"));
    }
}

fn pkg_config(arguments: &[&str]) -> Result<Vec<String>, String> {
    let output = Command::new("pkg-config").args(arguments).output().map_err(|error| format!("pkg-config: {error}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
        return Err(format!(
            "pkg-config finds no SPDK: install it, and set PKG_CONFIG_PATH to its lib/pkgconfig: {why}"
        ));
    }
    Ok(String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_owned).collect())
}

fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{name}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
    if output.status.success() { Ok(()) } else { Err(format!("{name}: {}: {said}", output.status)) }
}
