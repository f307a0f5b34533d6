//! Anything as the environment and as a configuration file: accepted, or refused in words that name the
//! field. Input, as text: the file's ending; lines NAME=VALUE; an empty line; the file, of any bytes.
#![no_main]

use std::io::Write;
use std::path::Path;

use kvring_ipc::config::{Config, ConfigError, SETTINGS};
use libfuzzer_sys::fuzz_target;

const ENDINGS: [&str; 4] = ["yaml", "json", "toml", "yml"];
/// Which file is read is not the input's to say: /dev/zero has no end.
const PATHS: [&str; 2] = ["KVRING_CONFIG_PATH", "FLEXKV_CONFIG_PATH"];

fn in_words(error: &ConfigError) {
    let text = error.to_string();
    assert!(text.starts_with(&format!("{} = ", error.field)) && text.contains(&error.origin));
    let known = SETTINGS.iter().find(|setting| setting.name == error.field);
    let says = match known {
        // Says what would be accepted.
        Some(setting) => error.problem.contains(setting.accepts) || !error.problem.contains("no such setting"),
        None if error.field == "config_path" => !error.problem.is_empty(),
        None => error.problem.contains("no such setting") || error.problem.starts_with("expected "),
    };
    assert!(says, "{text}");
}

fn load(file: &Path, env: &[(String, String)]) {
    match Config::load(&[], Some(file), env.iter().cloned()) {
        Err(error) => in_words(&error),
        Ok(loaded) => {
            let config = loaded.config;
            assert!(config.cpu_cache_bytes > 0 && !config.ssd_cache_dirs.is_empty());
            assert!(config.instance_id < config.instance_num && config.instance_num <= 1024);
            assert!(config.socket.is_absolute() && config.socket.as_os_str().len() <= 107);
            assert!(loaded.notes.iter().all(|note| note.contains("not apply")));
            // An instance hands what it was told to the server it starts, and both must mean the same.
            let flags: Vec<_> = config.said.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
            let again = Config::load(&flags, None, []).expect("what was said can be said again").config;
            assert_eq!(again, config);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let head_end = data.windows(2).position(|pair| pair == b"\n\n").unwrap_or(data.len());
    let (head, text) = (&data[..head_end], data.get(head_end + 2..).unwrap_or_default());
    let Ok(head) = str::from_utf8(head) else { return };
    let mut lines = head.lines();
    let ending = lines.next().unwrap_or_default();
    let ending = ENDINGS.iter().find(|known| **known == ending).unwrap_or(&"");
    let env: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| !PATHS.contains(name))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let mut file =
        tempfile::Builder::new().suffix(&format!(".{ending}")).tempfile_in("/dev/shm").expect("a scratch file");
    file.write_all(text).expect("it fits");
    load(file.path(), &env);
});
