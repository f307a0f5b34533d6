//! `kvring bench device`: fio's job files and flags over the engine's own devices, reported as fio reports. The floor of
//! the SSD tier: what a device gives before there is a cache over it.

mod cache;
mod disk_util;
mod job;
mod report;
mod run;

use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::Outcome;
use disk_util::DiskUtil;
use job::{Engine, KEYS, SWITCHES};

/// Arguments of `kvring bench device`.
#[derive(Debug, Clone, Default)]
pub struct DeviceArgs {
    files: Vec<PathBuf>,
    flags: Vec<(String, String)>,
    json: bool,
}

impl clap::FromArgMatches for DeviceArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let said = |key: &'static str| Some((key.to_owned(), matches.get_one::<String>(key)?.clone()));
        Ok(Self {
            files: matches.get_many::<PathBuf>("jobfile").into_iter().flatten().cloned().collect(),
            flags: KEYS.iter().filter_map(|(key, _)| said(key)).collect(),
            json: matches.get_one::<String>("output-format").is_some_and(|format| format == "json"),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for DeviceArgs {
    fn augment_args(command: Command) -> Command {
        let keys = KEYS.iter().map(|(key, doc)| {
            let arg = Arg::new(*key).long(*key).value_name("VALUE").help(*doc).allow_hyphen_values(true);
            if SWITCHES.contains(key) {
                arg.num_args(0..=1).require_equals(true).default_missing_value("1")
            } else {
                arg
            }
        });
        let file = Arg::new("jobfile").value_name("JOBFILE").action(ArgAction::Append);
        command
            .arg(
                file.value_parser(clap::value_parser!(PathBuf))
                    .help("fio job files; without one the flags are the job"),
            )
            .arg(
                Arg::new("output-format")
                    .long("output-format")
                    .value_parser(["normal", "json"])
                    .default_value("normal")
                    .help("normal, or fio's JSON"),
            )
            .next_help_heading("Keys, as in job files")
            .args(keys)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// What one job of these keys moves, in GB a second: a device without a cache over it.
pub fn rate(keys: &[(&str, String)]) -> Result<f64, Box<dyn std::error::Error>> {
    let keys: Vec<_> = keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    let done = run::run(&job::jobs(&[], &keys)?, &mut DiskUtil::default())?;
    if let Some(bad) = done.iter().find(|done| done.error != 0) {
        return Err(std::io::Error::from_raw_os_error(bad.error).into());
    }
    let report = report::as_json(&done);
    let of = |side: &str| report["jobs"][0][side]["bw_bytes"].as_f64().unwrap_or(0.0);
    Ok((of("read") + of("write")) / 1e9)
}

/// Runs the jobs, group after group, and reports.
pub fn bench(args: &DeviceArgs, json: bool, output: Option<&Path>) -> Outcome {
    let read = |path: &PathBuf| {
        let name = path.display().to_string();
        std::fs::read_to_string(path).map(|text| (name.clone(), text)).map_err(|error| format!("{name}: {error}"))
    };
    let files = args.files.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let jobs = job::jobs(&files, &args.flags)?;
    let mut disks = DiskUtil::of(&jobs);
    let mut done: Vec<report::Done> = Vec::new();
    for group in 0..=jobs.last().map_or(0, |job| job.group) {
        let its: Vec<_> = jobs.iter().filter(|job| job.group == group).cloned().collect();
        let (cache, device): (Vec<_>, Vec<_>) = its.into_iter().partition(|job| job.engine == Engine::Kvring);
        if cache.len() > 1 || !cache.is_empty() && !device.is_empty() {
            return Err("ioengine=kvring: one job at a time: say stonewall".into());
        }
        let mut ended = run::run(&device, &mut disks)?;
        for job in &cache {
            ended.push(cache::run(job)?);
        }
        for one in ended {
            let same = |other: &&mut report::Done| other.job.group == group;
            match done.iter_mut().find(same).filter(|_| one.job.group_reporting) {
                Some(other) => other.add(&one),
                None => done.push(one),
            }
        }
    }
    let text = if json || args.json {
        let mut report = report::as_json(&done);
        report["disk_util"] = disks.as_json().into();
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        report::in_words(&done)
    };
    match output {
        Some(path) => std::fs::write(path, text).map_err(|error| format!("--output {}: {error}", path.display()))?,
        None => print!("{text}"),
    }
    match done.iter().find(|done| done.error != 0) {
        Some(bad) => Err(format!("job {}: {}", bad.job.name, std::io::Error::from_raw_os_error(bad.error)).into()),
        None => Ok(()),
    }
}
