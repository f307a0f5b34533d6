//! Every setting of `ipc::config` as a flag, from its one table.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command};
use kvring_ipc::config::{Config, ConfigError, Loaded, SETTINGS};

/// The flags of all settings, and `--config`.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// What was said by flags.
    pub flags: Vec<(String, String)>,
    config_path: Option<PathBuf>,
}

impl Settings {
    /// Flags, file and environment, in their order.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        Config::load(&self.flags, self.config_path.as_deref(), std::env::vars())
    }

    /// Tells a child process everything that was said to this one, wherever it was said, and nothing else.
    pub fn tell(&self, command: &mut std::process::Command) -> Result<(), ConfigError> {
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("KVRING_") || text.starts_with("FLEXKV_") {
                command.env_remove(&name);
            }
        }
        for (name, value) in self.load()?.config.said {
            command.env(format!("KVRING_{}", name.to_ascii_uppercase()), value);
        }
        Ok(())
    }

    /// Says something unless the operator has, by flag, file or environment.
    pub fn default_to(&mut self, name: &str, value: &str) -> Result<(), ConfigError> {
        if !self.load()?.config.said.contains_key(name) {
            self.flags.push((name.to_owned(), value.to_owned()));
        }
        Ok(())
    }
}

fn long(name: &str) -> String {
    match name {
        "server_recv_port" => "socket".into(),
        "eviction_policy" => "policy".into(),
        name => name.replace('_', "-"),
    }
}

impl clap::FromArgMatches for Settings {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let said = |name: &'static str| Some((name.to_owned(), matches.get_one::<String>(name)?.clone()));
        Ok(Self {
            flags: SETTINGS.iter().filter_map(|setting| said(setting.name)).collect(),
            config_path: matches.get_one::<PathBuf>("config").cloned(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Settings {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("Configuration file (YAML, JSON or TOML), in FlexKV's names or kvring's");
        let flags = SETTINGS.iter().map(|setting| {
            let plain = setting.name.replace('_', "-");
            let help = format!("{} [{}; default {}]", setting.doc, setting.accepts, setting.default);
            let arg = Arg::new(setting.name)
                .long(long(setting.name))
                .value_name("VALUE")
                .help(help)
                .allow_hyphen_values(true);
            if long(setting.name) == plain { arg } else { arg.alias(plain) }
        });
        command
            .next_help_heading("Settings (also KVRING_*, FLEXKV_* and files: docs/CONFIG.md)")
            .arg(config)
            .args(flags)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
