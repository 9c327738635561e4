//! `stemedb dev` and the command line where no cluster comes up: clear words, right exit codes, nothing broken.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use stemedb::cli::local_cluster::{LocalCluster, free_port, plan};
use stemedb::config::Config;

fn stemedb(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stemedb"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("STEMEDB_") {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null());
    command
}

fn output(args: &[&str]) -> (i32, String, String) {
    read(stemedb(args).output().unwrap())
}

fn read(output: Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_taken_port_is_named_and_nothing_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let port = free_port(3).unwrap();
    let _taken = TcpListener::bind(("127.0.0.1", port + 101)).unwrap();
    let (code, out, err) = output(&["dev", "--data", data.to_str().unwrap(), "--port", &port.to_string()]);
    assert_eq!(code, 5, "{out}{err}");
    assert!(err.contains(&format!("127.0.0.1:{} (peers of node-2)", port + 101)), "{err}");
    assert!(!err.contains("(HTTP"), "only the taken one: {err}");
    assert!(!data.exists());
}

#[test]
fn wrong_arguments_are_exit_code_2() {
    for args in [
        &["dev", "--nodes", "0"][..],
        &["dev", "--nodes", "10"],
        &["dev", "--port", "65500"],
        &["dev", "--port", "0"],
        &["dev", "--port", "x"],
        &["nonsense"],
        &[],
        &["status", "--endpoints", "https://a"],
        &["bench", "--clients", "0"],
        &["bench", "--secs", "-1"],
        &["bench", "--rate", "0"],
        &["bench", "--secs", "nan"],
        &["drill", "--rounds", "0"],
        &["import-check", "-"],
        &["serve", "--set", "nonsense"],
    ] {
        let (code, out, err) = output(args);
        assert_eq!(code, 2, "{args:?}: {out}{err}");
    }
}

#[test]
fn help_documents_the_exit_codes() {
    let (code, out, _) = output(&["--help"]);
    assert_eq!(code, 0);
    assert!(out.contains("Exit codes: 0 done"), "{out}");
    for command in ["serve", "dev", "status", "import", "bench", "drill"] {
        assert!(out.contains(&format!("  {command} ")), "{command}: {out}");
        assert_eq!(output(&[command, "--help"]).0, 0, "{command}");
    }
    for command in [&["drain", "--help"][..], &["member", "replace", "--help"]] {
        let (code, out, _) = output(command);
        assert!(code == 0 && out.contains("Exit codes: 0 done"), "{command:?}: {out}");
    }
    // It has its own.
    let (_, out, _) = output(&["wal", "--help"]);
    assert!(out.contains("0 clean or done; 1 damaged") && !out.contains("Exit codes: 0 done;"), "{out}");
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    // Rust starts with SIGPIPE ignored, so writing to the closed pipe is an error of the program.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let (code, _, err) = read(stemedb(&["--help"]).stdout(writer).output().unwrap());
    assert_eq!(code, 141, "{err}");
    assert!(err.is_empty(), "{err}");
}

#[test]
fn no_node_is_exit_code_3() {
    let port = free_port(1).unwrap();
    let endpoint = format!("127.0.0.1:{port}");
    let (code, _, err) = output(&["status", "--endpoints", &endpoint]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains(&endpoint), "{err}");
    let (code, _, err) = output(&["bench", "--endpoints", &endpoint, "--secs", "0.1", "--warmup", "0"]);
    assert_eq!(code, 3, "{err}");
}

#[test]
fn the_written_configuration_is_one_that_a_node_accepts() {
    for nodes in [1, 3, 5] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a \"quoted\" folder");
        let port = free_port(nodes).unwrap();
        let cluster = LocalCluster::prepare(plan(&folder, nodes, port).unwrap()).unwrap();
        for node in cluster.plan() {
            let no_env: [(String, String); 0] = [];
            let config = Config::load(Some(&node.config_file()), no_env, &[]).unwrap();
            assert_eq!(config.node.name, node.name);
            assert_eq!(config.node.data_dir, node.dir);
            assert_eq!(config.http.listen, node.http_addr());
            assert_eq!(config.peer_listen(), node.peer_addr());
            assert_eq!(config.cluster.peers.len(), nodes);
            assert_eq!(config.cluster.bootstrap_expect as usize, nodes);
        }
    }
}

#[test]
fn foreign_files_and_empty_node_folders_are_accepted_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    std::fs::create_dir_all(dir.path().join("node-2/lost+found")).unwrap();
    std::fs::create_dir(dir.path().join("node-3")).unwrap();
    let nodes = plan(dir.path(), 3, free_port(3).unwrap()).unwrap();
    LocalCluster::prepare(nodes.clone()).unwrap();
    // Again, with an edit that concerns nobody but the node.
    let file = nodes[0].config_file();
    let edited = std::fs::read_to_string(&file).unwrap() + "\n[logging]\nlevel = \"debug\"\n";
    std::fs::write(&file, &edited).unwrap();
    LocalCluster::prepare(nodes).unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), edited);
    assert_eq!(std::fs::read_to_string(dir.path().join("notes.txt")).unwrap(), "mine");
    assert!(dir.path().join("node-2/lost+found").is_dir());
}

#[test]
fn a_folder_made_with_other_arguments_is_refused_with_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let first = free_port(3).unwrap();
    LocalCluster::prepare(plan(dir.path(), 3, first).unwrap()).unwrap();
    let before = std::fs::read_to_string(dir.path().join("node-1/api.toml")).unwrap();
    let data = dir.path().to_str().unwrap();
    let other = (0..).map(|_| free_port(3).unwrap()).find(|port| *port != first).unwrap().to_string();
    let (code, _, err) = output(&["dev", "--data", data, "--port", &other]);
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("http.listen is") && err.contains("Nothing was started"), "{err}");
    let (code, _, err) = output(&["dev", "--data", data, "--port", &first.to_string(), "--nodes", "2"]);
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("cluster."), "{err}");
    std::fs::write(dir.path().join("node-1/api.toml"), "[node\n").unwrap();
    let (code, _, err) = output(&["dev", "--data", data, "--port", &first.to_string()]);
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("api.toml"), "{err}");
    assert_ne!(before, "[node\n");
}

#[test]
fn a_child_that_cannot_start_is_reported_with_the_end_of_its_log() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port(3).unwrap().to_string();
    let ended = stemedb(&["dev", "--data", dir.path().to_str().unwrap(), "--port", &port])
        .env("STEMEDB_WAL_SEGMENT_SIZE_MB", "banana")
        .output()
        .unwrap();
    let (code, _, err) = read(ended);
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("ended by itself (exit status: 6)"), "{err}");
    assert!(err.contains("STEMEDB_WAL_SEGMENT_SIZE_MB") && err.contains("banana"), "{err}");
}

#[test]
fn an_unwritable_folder_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let port = free_port(3).unwrap().to_string();
    let (code, _, err) = output(&["dev", "--data", file.to_str().unwrap(), "--port", &port]);
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("cannot make the folder"), "{err}");
}

#[test]
fn the_tools_own_variable_does_not_stop_a_server() {
    // Read past it, the configuration fails for its own reason.
    let serve =
        stemedb(&["serve", "--config", "/nowhere/x.toml"]).env("STEMEDB_ENDPOINTS", "127.0.0.1:1").output().unwrap();
    let (code, _, err) = read(serve);
    assert_eq!(code, 6, "{err}");
    assert!(err.contains("/nowhere/x.toml") && !err.contains("STEMEDB_ENDPOINTS"), "{err}");
}
