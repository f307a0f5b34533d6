//! Says which commit a program is of: a figure without it is nobody's.

use std::process::Command;

fn main() {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["describe", "--always", "--dirty", "--abbrev=12"]).unwrap_or_else(|| "unknown".into());
    println!("cargo::rustc-env=BUILT_FROM_COMMIT={commit}");
    if let Some(dir) = git(&["rev-parse", "--absolute-git-dir"]) {
        println!("cargo::rerun-if-changed={dir}/HEAD");
        println!("cargo::rerun-if-changed={dir}/logs/HEAD");
        println!("cargo::rerun-if-changed={dir}/index");
        // What makes a tree dirty.
        for source in ["../ipc/src", "../engine/src", "../gpu/src", "src", "../Cargo.lock"] {
            println!("cargo::rerun-if-changed={source}");
        }
    }
}
