#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::{Path, PathBuf};

use super::keys::KEYS;
use super::*;

const NO_ENV: [(&str, &str); 0] = [];

/// A folder with an `api.toml` of this text.
fn folder(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.toml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

fn load(text: &str) -> Result<Config, ConfigError> {
    let (_folder, path) = folder(text);
    Config::load(Some(&path), NO_ENV, &[])
}

fn load_env(env: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let (_folder, path) = folder("");
    Config::load(Some(&path), env.iter().copied(), &[])
}

/// The one problem of this text, with the folder's name taken out.
fn problem(text: &str) -> String {
    let error = load(text).unwrap_err();
    let [problem] = error.problems() else { panic!("one problem expected: {error}") };
    let text = problem.to_string();
    text.split_once("api.toml").map_or(text.clone(), |(_, rest)| format!("api.toml{rest}"))
}

fn flag(section: &str, key: &str, value: &str) -> Override {
    (section.into(), key.into(), value.into())
}

#[test]
fn an_empty_file_gives_the_defaults() {
    let config = load("").unwrap();
    assert_eq!(Config { source: None, ..config }, Config::default());
}

#[test]
fn the_runbooks_own_examples_are_accepted() {
    let config = load(
        "[wal]\nlog_fsync_errors = true\ngroup_commit_max_wait_ms = 10  # Increase batching window\n\
         group_commit_max_bytes = 1048576\nretention_days = 7\nmax_segments = 100\nsegment_size_mb = 64\n\
         [storage]\nlock_timeout_ms = 10000\ncompaction_enabled = false\ncompaction_interval_hours = 12\n\
         compaction_threshold_mb = 1000\n[backup]\nretention_days = 7\ncompression_enabled = true\n\
         [logging]\nlevel = \"debug\"\n",
    )
    .unwrap();
    assert_eq!((config.wal.retention_days, config.wal.max_segments), (Some(7), Some(100)));
    assert_eq!((config.wal.group_commit_max_wait_ms, config.wal.group_commit_max_bytes), (10, 1 << 20));
    assert!(!config.storage.enable_auto_compaction);
    assert_eq!((config.storage.compaction_trigger_mb, config.storage.lock_timeout_ms), (1000, 10_000));
    assert_eq!(config.backup.retention_days, Some(7));
    assert_eq!(config.logging.level, LogLevel::Debug);
    let newer = load("[storage]\nenable_auto_compaction = true\ncompaction_trigger_mb = 1024").unwrap();
    assert_eq!(newer.storage, StorageSection::default());
}

#[test]
fn environment_wins_over_file_and_flags_over_both() {
    let (_folder, path) = folder("[wal]\nretention_days = 1\nsegment_size_mb = 1\nretain_mb = 100\n");
    let env = [("STEMEDB_WAL_RETENTION_DAYS", "7"), ("STEMEDB_WAL_SEGMENT_SIZE_MB", "2"), ("HOME", "/root")];
    let flags = [flag("wal", "segment_size_mb", "3")];
    let wal = Config::load(Some(&path), env, &flags).unwrap().wal;
    assert_eq!((wal.retain_mb, wal.retention_days, wal.segment_size_mb), (100, Some(7), 3));
}

#[test]
fn every_key_can_be_set_by_its_variable_and_by_its_aliases() {
    for key in KEYS {
        // The default is always acceptable, whatever the key's type.
        let mut value = key.default_text();
        if value.is_empty() && key.path() == "cluster.peer_listen" {
            value = "127.0.0.1:1".into();
        }
        for variable in std::iter::once(key.variable()).chain(key.alias_variables()) {
            load_env(&[(&variable, &value)]).unwrap_or_else(|error| panic!("{variable}={value}: {error}"));
        }
    }
}

#[test]
fn every_default_lies_in_its_own_range() {
    let default = Config::default();
    for key in KEYS {
        let text = key.default_text();
        if text.is_empty() {
            continue;
        }
        let given = key.kind.read_text(&text).unwrap();
        let mut config = Config::default();
        key.kind.set(&mut config, given).unwrap_or_else(|error| panic!("{}: {error}", key.path()));
        assert_eq!(config, default, "{}", key.path());
    }
}

#[test]
fn problems_name_file_line_key_and_what_is_accepted() {
    let shown = [
        ("[wal]\n\nretention_dayz = 7", "api.toml:3: wal.retention_dayz: is not a key; did you mean retention_days?"),
        ("[wal]\nsegment_size_mb = \"64\"", "api.toml:2: wal.segment_size_mb: the text \"64\" is not accepted"),
        ("[wal]\nsegment_size_mb = 64.5", "api.toml:2: wal.segment_size_mb: a number with a fraction is not accepted"),
        ("[wal]\nsegment_size_mb = -1", "api.toml:2: wal.segment_size_mb: -1 is out of range; accepted: 1 to 1024 MiB"),
        ("[wal]\nsegment_size_mb = 0xFFFF", "api.toml:2: wal.segment_size_mb: 65535 is out of range"),
        (
            "[wal]\nlog_fsync_errors = 1",
            "api.toml:2: wal.log_fsync_errors: the number 1 is not accepted; accepted: true or false",
        ),
        ("[logging]\nlevel = \"loud\"", "accepted: one of error, warn, info, debug, trace"),
        ("[wall]\nretention_days = 7", "api.toml:1: wall: is not a section; did you mean [wal]?"),
        (
            "retention_days = 7",
            "api.toml:1: retention_days: is not inside a section; did you mean retention_days in [wal]?",
        ),
        ("[http]\nretain_mb = 16", "api.toml:2: http.retain_mb: is not a key; did you mean retain_mb in [wal]?"),
        ("[node]\ndata_dir = \"data\"", "accepted: an absolute path"),
        ("[node]\nname = \"Node 1\"", "the text \"Node 1\" is not accepted"),
        ("[http]\nlisten = \"18180\"", "accepted: host:port"),
        ("[http]\nlisten = \"127.0.0.1:65536\"", "accepted: host:port"),
        ("[http]\n\nlisten = \"0.0.0.0:80\"", "api.toml:3: http.listen: 0.0.0.0:80 can be reached from other machines"),
        (
            "[cluster]\nelection_min_ms = 60",
            "api.toml:2: cluster.election_min_ms: 60 is less than twice heartbeat_ms = 50",
        ),
        ("[cluster]\ndrain_notice_ms = 20000", "cluster.stop_deadline_ms: 15000 is not above drain_notice_ms = 20000"),
        ("[cluster]\nelection_min_ms = 300", "cluster.election_max_ms: 300 is not above election_min_ms = 300"),
        ("[cluster]\nbootstrap_expect = 3", "3 nodes are expected but cluster.peers lists 0"),
        ("[wal]\nretain_mb = 99999999999999999999", "api.toml:2: "),
        (
            "[storage]\ncompaction_enabled = true\nenable_auto_compaction = true",
            "api.toml:3: storage.enable_auto_compaction: means the same as storage.compaction_enabled",
        ),
        ("[wal]\nretain_mb = 16\n[wal]\n", "api.toml:3: "),
        ("[wal\n", "api.toml:1: "),
    ];
    for (text, expected) in shown {
        let found = problem(text);
        assert!(found.contains(expected), "{text:?}\n  gave     {found}\n  expected {expected}");
        assert!(found.contains("; accepted: "), "{found}");
    }
}

#[test]
fn all_problems_are_reported_at_once_and_in_order() {
    let error = load("[wal]\nretain_mb = 1\nnonsense = 2\n[http]\nlisten = 3\n").unwrap_err();
    let mut lines: Vec<usize> = error
        .problems()
        .iter()
        .map(|problem| match problem.origin {
            Origin::File { line, .. } => line,
            _ => 0,
        })
        .collect();
    lines.sort_unstable();
    assert_eq!(lines, [2, 3, 5]);
    assert_eq!(error.to_string().lines().count(), 4);
}

#[test]
fn unknown_variables_and_flags_stop_the_start() {
    let error = load_env(&[("STEMEDB_WAL_RETENTON_DAYS", "7")]).unwrap_err().to_string();
    assert!(error.contains("environment variable STEMEDB_WAL_RETENTON_DAYS"), "{error}");
    assert!(error.contains("did you mean STEMEDB_WAL_RETENTION_DAYS?"), "{error}");
    assert!(load_env(&[("STEMEDB_HTTP_PORT", "8080")]).is_err());
    let error = load_env(&[("STEMEDB_WAL_RETENTION_DAYS", "a week")]).unwrap_err().to_string();
    assert!(error.contains("wal.retention_days: the text \"a week\" is not accepted"), "{error}");
    let (_folder, path) = folder("");
    for (section, key) in [("wal", "nonsense"), ("nonsense", "retain_mb")] {
        assert!(Config::load(Some(&path), NO_ENV, &[flag(section, key, "1")]).is_err(), "{section}.{key}");
    }
}

#[test]
fn variables_of_other_kinds_are_passed_over() {
    load_env(&[
        ("STEMEDB_ENDPOINTS", "127.0.0.1:18180"),
        ("STEMEDB_TEST_FULL", "1"),
        ("STEMEDB_SERVICE_HOST", "10.0.0.1"),
        ("STEMEDB_SERVICE_PORT", "80"),
        ("STEMEDB_PORT", "tcp://10.0.0.1:80"),
        ("STEMEDB_PORT_18180_TCP_ADDR", "10.0.0.1"),
    ])
    .unwrap();
}

#[test]
fn a_variable_that_is_not_text_is_a_problem_of_its_own() {
    use std::os::unix::ffi::OsStringExt;
    let (_folder, path) = folder("");
    let value = std::ffi::OsString::from_vec(vec![0xff]);
    let error = Config::load(Some(&path), [("STEMEDB_NODE_NAME", value)], &[]).unwrap_err();
    assert!(error.to_string().contains("STEMEDB_NODE_NAME: node.name: is not UTF-8 text"), "{error}");
}

const PEERS: &str = "[node]\nname = \"node-2\"\n[[cluster.peers]]\nname = \"node-1\"\naddr = \"127.0.0.1:18280\"\n\
    http = \"127.0.0.1:18180\"\n[[cluster.peers]]\nname = \"node-2\"\naddr = \"127.0.0.1:18281\"\nhttp = \"127.0.0.1:18181\"\n";

#[test]
fn peers_come_as_tables_or_as_text() {
    let tables = load(PEERS).unwrap().cluster;
    let text = "node-1=127.0.0.1:18280/127.0.0.1:18180, node-2=127.0.0.1:18281/127.0.0.1:18181";
    let env = load_env(&[("STEMEDB_CLUSTER_PEERS", text), ("STEMEDB_NODE_NAME", "node-2")]).unwrap().cluster;
    assert_eq!(tables, env);
    assert_eq!((tables.peers.len(), tables.bootstrap_expect), (2, 2));
}

#[test]
fn bad_peers_are_refused_with_the_reason() {
    let cases = [
        ("node-1=127.0.0.1:1", "no '/'"),
        ("127.0.0.1:1/127.0.0.1:2", "no '='"),
        ("node-1=127.0.0.1:0/127.0.0.1:2", "node-1: addr \"127.0.0.1:0\""),
        ("node-1=a:1/a:2,node-1=b:1/b:2", "node-1 is listed twice"),
        ("node-1=a:1/a:2,node-2=a:1/b:2", "node-1 and node-2 share an address"),
        ("node-1=a:1/a:1", "the same address"),
        ("Node=a:1/a:2", "\"Node\" is no node name"),
        ("node-7=a:1/a:2", "node-1 is not among cluster.peers"),
    ];
    for (text, expected) in cases {
        let error = load_env(&[("STEMEDB_CLUSTER_PEERS", text)]).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}\n  gave     {error}\n  expected {expected}");
    }
    assert!(problem("[[cluster.peers]]\nname = \"node-1\"\nport = \"x\"").contains("line 3: port is unknown"));
    assert!(problem("[[cluster.peers]]\nname = \"node-1\"").contains("line 1: addr is missing"));
    assert!(problem("[[cluster.peers]]\nname = 1").contains("line 2: name is not text"));
}

#[test]
fn an_open_address_needs_insecure_and_warns() {
    let config = load("[http]\nlisten = \"0.0.0.0:18180\"\ninsecure = true\n").unwrap();
    assert_eq!(config.peer_listen(), "0.0.0.0:18280");
    assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
    let peers_only = load_env(&[("STEMEDB_CLUSTER_PEER_LISTEN", "0.0.0.0:1")]).unwrap_err().to_string();
    assert!(peers_only.contains("cluster.peer_listen: 0.0.0.0:1 can be reached"), "{peers_only}");
    for inside in ["localhost:1", "127.9.9.9:1", "[::1]:1"] {
        load_env(&[("STEMEDB_HTTP_LISTEN", inside)]).unwrap();
    }
}

#[test]
fn the_peer_port_follows_the_http_port() {
    let at = |listen: &str| load_env(&[("STEMEDB_HTTP_LISTEN", listen)]);
    assert_eq!(at("127.0.0.1:18180").unwrap().peer_listen(), "127.0.0.1:18280");
    assert_eq!(at("127.0.0.1:0").unwrap().peer_listen(), "127.0.0.1:0");
    assert!(at("127.0.0.1:65500").unwrap_err().to_string().contains("a port up to 65435"));
    let same = load_env(&[("STEMEDB_CLUSTER_PEER_LISTEN", "127.0.0.1:18180")]).unwrap_err();
    assert!(same.to_string().contains("is the address of http.listen"), "{same}");
}

#[test]
fn the_older_file_name_is_read_alone_and_warned_about_beside_the_newer() {
    let (folder, path) = folder("[wal]\nretain_mb = 16\n");
    let older = folder.path().join("config.toml");
    std::fs::write(&older, "[wal]\nretain_mb = 17\n").unwrap();
    let both = Config::load(Some(&path), NO_ENV, &[]).unwrap();
    assert_eq!(both.wal.retain_mb, 16);
    assert_eq!(both.warnings, [format!("{} is ignored because {} exists", older.display(), path.display())]);
    std::fs::remove_file(&path).unwrap();
    let alone = Config::load(Some(&path), NO_ENV, &[]).unwrap();
    assert_eq!((alone.wal.retain_mb, alone.source.as_deref(), alone.warnings.len()), (17, Some(older.as_path()), 0));
    std::fs::remove_file(&older).unwrap();
    let none = Config::load(Some(&path), NO_ENV, &[]).unwrap_err().to_string();
    assert!(none.contains("cannot read configuration file") && none.contains("api.toml"), "{none}");
}

#[test]
fn unreadable_files_are_named() {
    let (folder, path) = folder("");
    std::fs::write(&path, b"[wal]\n# \xff\n").unwrap();
    assert!(load_at(&path).contains("api.toml:2: not UTF-8 text"), "{}", load_at(&path));
    std::fs::write(&path, vec![b'#'; 1 << 20 | 1]).unwrap();
    assert!(load_at(&path).contains("the file is too large"), "{}", load_at(&path));
    assert!(load_at(folder.path()).contains("cannot read configuration file"));
}

fn load_at(path: &Path) -> String {
    Config::load(Some(path), NO_ENV, &[]).unwrap_err().to_string()
}

#[test]
fn what_is_written_is_read_back_the_same() {
    let mut config = load(PEERS).unwrap();
    config.node.data_dir = "/tmp/with \"quotes\" and \\".into();
    config.http.listen = "[::1]:4000".into();
    config.cluster.peer_listen = Some("127.0.0.1:4001".into());
    config.wal.retention_days = Some(3);
    config.storage.enable_auto_compaction = false;
    config.logging.format = LogFormat::Json;
    config.logging.file = Some("/tmp/log".into());
    let text = config.to_toml();
    let again = load(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(Config { source: None, ..again }, Config { source: None, ..config }, "{text}");
    assert_eq!(Config::default().to_toml(), "");
}

/// `.env.example` and the table in `docs/configuration.md` are the key table written out.
/// `STEMEDB_TEST_WRITE_DOCS=1 cargo test --lib config` writes them anew.
#[test]
fn documents_match_the_keys() {
    const BEGIN: &str = "<!-- keys: begin (written by a test; see CONTRIBUTING.md) -->\n";
    const END: &str = "<!-- keys: end -->";
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let write = std::env::var_os("STEMEDB_TEST_WRITE_DOCS").is_some();

    let env_path = root.join(".env.example");
    if write {
        std::fs::write(&env_path, document::env_example()).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&env_path).unwrap(), document::env_example(), ".env.example is out of date");

    let doc_path = root.join("docs/configuration.md");
    let doc = std::fs::read_to_string(&doc_path).unwrap();
    let (before, rest) = doc.split_once(BEGIN).expect("begin mark");
    let (table, after) = rest.split_once(END).expect("end mark");
    if write {
        std::fs::write(&doc_path, format!("{before}{BEGIN}{}{END}{after}", document::markdown_table())).unwrap();
    } else {
        assert_eq!(table, document::markdown_table(), "the table in docs/configuration.md is out of date");
    }
}
