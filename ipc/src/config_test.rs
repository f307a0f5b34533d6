use super::*;

fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

#[test]
fn flexkv_s_environment_is_taken_as_it_is() {
    let loaded = Config::load(
        &[],
        None,
        env(&[
            ("FLEXKV_CPU_CACHE_GB", "32"),
            ("FLEXKV_SSD_CACHE_GB", "0.5"),
            ("FLEXKV_SSD_CACHE_DIR", "/a;/b"),
            ("FLEXKV_SERVER_RECV_PORT", "ipc:///tmp/x"),
            ("FLEXKV_INSTANCE_NUM", "2"),
            ("FLEXKV_INSTANCE_ID", "1"),
            ("FLEXKV_USE_HUGEPAGE_CPU_BUFFER", "1"),
            ("FLEXKV_ENABLE_MPS", "1"),
            ("FLEXKV_MAX_FILE_SIZE_GB", "-1"),
            ("FLEXKV_EVICTION_POLICY", "SLRU"),
            ("FLEXKV_LOG_LEVEL", "WARNING"),
            ("PATH", "/bin"),
        ]),
    )
    .unwrap();
    let config = loaded.config;
    assert_eq!(config.cpu_cache_bytes, 32 << 30);
    assert_eq!(config.ssd_cache_bytes, 1 << 29);
    assert_eq!(config.ssd_cache_dirs, [PathBuf::from("/a"), PathBuf::from("/b")]);
    assert_eq!(config.socket, PathBuf::from("/tmp/x"));
    assert_eq!((config.instance_num, config.instance_id), (2, 1));
    assert_eq!(config.hugepages, Hugepages::Require);
    assert_eq!(config.eviction_policy, EvictionPolicy::Slru);
    assert_eq!(loaded.notes, ["FLEXKV_ENABLE_MPS does not apply to kvring: the server has no CUDA context"]);
}

#[test]
fn a_flag_wins_over_a_file_over_the_environment() {
    let said = env(&[("FLEXKV_CPU_CACHE_GB", "1"), ("KVRING_CPU_CACHE_GB", "2")]);
    let gib = |flags: &[(String, String)], path: Option<&Path>| {
        Config::load(flags, path, said.clone()).unwrap().config.cpu_cache_bytes >> 30
    };
    let (_dir, path) = file("c.toml", "cpu_cache_gb = 3");
    assert_eq!(gib(&[], None), 2);
    assert_eq!(gib(&[], Some(&path)), 3);
    assert_eq!(gib(&[("cpu_cache_gb".into(), "4".into())], Some(&path)), 4);
}

#[test]
fn flexkv_s_yaml_and_json_are_read_whole() {
    let yaml = "cpu_cache_gb: 1.5\nssd_cache_dir:\n  - /a\n  - /b\nuse_hugepage_cpu_buffer: true\neviction_policy: lfu\nredis_host: x\nkv_cache_dtype: null\n";
    let (_dir, path) = file("c.yml", yaml);
    let loaded = Config::load(&[], None, env(&[("FLEXKV_CONFIG_PATH", path.to_str().unwrap())])).unwrap();
    assert_eq!(loaded.config.cpu_cache_bytes, 3 << 29);
    assert_eq!(loaded.config.ssd_cache_dirs.len(), 2);
    assert_eq!(loaded.config.hugepages, Hugepages::Require);
    assert_eq!(loaded.config.said["eviction_policy"], "lfu");
    assert_eq!(loaded.notes.len(), 1);
    let (_dir, path) = file("c.json", r#"{"ssd_cache_gb": 128, "iouring_entries": 0}"#);
    let config = Config::load(&[], Some(&path), env(&[])).unwrap().config;
    assert_eq!(config.io_engine, IoEngine::Aio);
}

#[test]
fn what_is_wrong_names_the_field_the_value_and_the_remedy() {
    let error = |pairs: &[(&str, &str)]| Config::load(&[], None, env(pairs)).unwrap_err().to_string();
    assert_eq!(
        error(&[("FLEXKV_CPU_CACHE_GB", "lots")]),
        "cpu_cache_gb = \"lots\" (from FLEXKV_CPU_CACHE_GB): expected GiB above 0, such as 16 or 0.5"
    );
    assert!(error(&[("FLEXKV_SERVER_RECV_PORT", "tcp://host:1")]).contains("tcp:// is not served"));
    assert!(error(&[("FLEXKV_CPU_CACHE_GBS", "1")]).contains("the closest is FLEXKV_CPU_CACHE_GB"));
    assert!(error(&[("KVRING_SSD_CACHE_DIRS", "/a")]).contains("the closest is ssd_cache_dir"));
    assert!(error(&[("FLEXKV_INSTANCE_ID", "1")]).contains("must be below instance_num = 1"));
    assert!(error(&[("FLEXKV_CONFIG_PATH", "/nonexistent.yml")]).contains("cannot be read"));
    for value in ["nan", "inf", "-1", "1e300", "0"] {
        assert!(error(&[("FLEXKV_CPU_CACHE_GB", value)]).contains("GiB above 0"), "{value}");
    }
    let (_dir, path) = file("c.json", "{");
    assert!(error(&[("FLEXKV_CONFIG_PATH", path.to_str().unwrap())]).contains("is not valid json"));
}

#[test]
fn what_was_said_can_be_said_again() {
    let config = Config::load(&[("ssd_cache_gb".into(), "7".into())], None, env(&[("FLEXKV_CPU_CACHE_GB", "3")]))
        .unwrap()
        .config;
    let again: Vec<_> =
        config.said.iter().map(|(n, v)| (format!("KVRING_{}", n.to_ascii_uppercase()), v.clone())).collect();
    assert_eq!(Config::load(&[], None, again).unwrap().config, config);
}

#[test]
fn the_page_is_what_the_code_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/CONFIG.md");
    let page = std::fs::read_to_string(path).unwrap_or_default();
    assert!(page == Config::document(), "docs/CONFIG.md is stale: run `cargo xtask docs`");
}
