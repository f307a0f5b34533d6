//! `kvring fsck`: what the SSD tier of a stopped server holds, and whether it is what was written.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kvring_engine::device::spdk;
use kvring_engine::fsck::{DirReport, Options, check};
use kvring_ipc::config::Config;

/// Arguments of `kvring fsck`.
#[derive(Args)]
#[command(after_help = "\
Exit status, as of other fsck: 0 nothing is bad; 1 what was bad is forgotten now; 4 something is bad; 8 it could not be checked.
A block that is bad is never served: the server compares every block that it reads. After a crash some are: blocks whose slot was being written anew.")]
pub struct FsckArgs {
    /// Directories of one cache (ssd_cache_dir): all of them, in any order
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Forget what is bad: clear its header
    #[arg(long)]
    repair: bool,
    /// Check the headers only, not the blocks: seconds instead of minutes
    #[arg(long)]
    headers_only: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Checks, prints, and says how it went.
pub fn run(args: &FsckArgs) -> ExitCode {
    let options = Options { repair: args.repair, headers_only: args.headers_only };
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} slots, {eta} left");
    let bar = ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    // Where SPDK is, should one of them be its.
    if let Ok(loaded) = Config::load(&[], None, std::env::vars()) {
        spdk::configure(&loaded.config);
    }
    let checked = check(&args.dirs, options, |done, total| {
        if done % 64 == 1 {
            bar.set_length(total);
            bar.set_position(done);
        }
    });
    bar.finish_and_clear();
    let reports = match checked {
        Ok(reports) => reports,
        Err(error) => {
            eprintln!("kvring: {error}");
            return ExitCode::from(8);
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&reports).unwrap_or_default());
    } else {
        reports.iter().for_each(|report| print(report, options));
    }
    let bad: u64 = reports.iter().map(DirReport::bad).sum();
    match (bad, args.repair) {
        (0, _) => ExitCode::SUCCESS,
        (_, true) => ExitCode::from(1),
        (_, false) => ExitCode::from(4),
    }
}

fn print(report: &DirReport, options: Options) {
    let DirReport { device, devices, block_bytes, slots, .. } = report;
    println!("{}: directory {} of {devices}, {slots} slots of {block_bytes} bytes", report.dir.display(), device + 1);
    if let Some(layout) = &report.layout {
        println!(
            "  {} {}, {} tokens a block, {} layers, tp {}",
            layout.model, layout.dtype, layout.tokens_per_block, layout.layers, layout.tp_size
        );
    }
    let sound = if options.headers_only { "blocks with a sound header" } else { "sound blocks" };
    println!("  {:>10} {sound}", report.sound);
    println!("  {:>10} empty", report.empty);
    if report.without_checksum > 0 {
        println!("  {:>10} of the sound ones were written without a checksum", report.without_checksum);
    }
    let bad = [
        (report.damaged_headers, "damaged headers: torn, rotten or misdirected"),
        (report.damaged_blocks, "blocks that are not what was written: their slot was written anew since, or rotten"),
        (report.unreadable_blocks, "blocks that cannot be read"),
        (report.orphans, "blocks without their parent"),
        (report.duplicates, "blocks that are there twice"),
    ];
    for (count, what) in bad.into_iter().filter(|(count, _)| *count > 0) {
        println!("  {count:>10} {what}");
    }
    if options.repair {
        println!("  {:>10} forgotten", report.repaired);
    }
}
