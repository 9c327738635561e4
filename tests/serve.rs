//! `stemedb serve` where it cannot serve: a clear line in its log, the exit code of the documentation, nothing touched.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use stemedb::cli::local_cluster::{LocalCluster, NodePlan, free_port, plan};

const READY: Duration = Duration::from_secs(120);

fn serve(program: &str, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("STEMEDB_") {
            command.env_remove(name);
        }
    }
    let output = command.args(args).stdin(Stdio::null()).output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn stemedb(config: &Path, set: &[String]) -> (i32, String) {
    let mut args = vec!["serve", "--config", config.to_str().unwrap()];
    for each in set {
        args.extend(["--set", each.as_str()]);
    }
    serve(env!("CARGO_BIN_EXE_stemedb"), &args)
}

/// A prepared cluster of one that does not run yet.
fn one_node(dir: &Path) -> (LocalCluster, NodePlan) {
    let nodes = plan(dir, 1, free_port(1).unwrap()).unwrap();
    let program = env!("CARGO_BIN_EXE_stemedb").into();
    (LocalCluster::prepare_with(program, nodes.clone()).unwrap(), nodes[0].clone())
}

#[test]
fn a_taken_port_is_named_and_the_folder_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (_cluster, node) = one_node(dir.path());
    for (port, key) in [(node.http_port, "http.listen"), (node.peer_port, "cluster.peer_listen")] {
        let _taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let (code, log) = stemedb(&node.config_file(), &[]);
        assert_eq!(code, 5, "{log}");
        assert!(log.contains(&format!("{key} 127.0.0.1:{port}: Address already in use")), "{log}");
    }
    assert_eq!(std::fs::read_dir(&node.dir).unwrap().count(), 1, "api.toml alone");
}

#[tokio::test]
async fn a_folder_in_use_is_refused_and_its_owner_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cluster, node) = one_node(dir.path());
    cluster.start_all().unwrap();
    cluster.wait_ready(READY).await.unwrap();
    let pid_before = std::fs::read_to_string(node.dir.join("pid")).unwrap();
    let port = free_port(1).unwrap();
    let set = [
        format!("http.listen=127.0.0.1:{port}"),
        format!("cluster.peer_listen=127.0.0.1:{}", port + 100),
        "storage.lock_timeout_ms=100".to_owned(),
    ];
    let (code, log) = stemedb(&node.config_file(), &set);
    assert_eq!(code, 5, "{log}");
    assert!(log.contains("another process uses this data folder"), "{log}");
    assert_eq!(std::fs::read_to_string(node.dir.join("pid")).unwrap(), pid_before);
    cluster.wait_ready(READY).await.unwrap();
    cluster.stop_all().await.unwrap();
}

/// A load balancer without probes goes elsewhere when a connection is refused, and waits when it is not.
#[tokio::test]
async fn nobody_can_connect_while_the_node_cannot_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cluster, node) = one_node(dir.path());
    cluster.start_all().unwrap();
    cluster.wait_ready(READY).await.unwrap();
    // A second process waits for the folder of the first one, with a port of its own.
    let port = free_port(1).unwrap();
    let mut second = tokio::process::Command::new(env!("CARGO_BIN_EXE_stemedb"));
    second.args(["serve", "--config", node.config_file().to_str().unwrap()]).stdin(Stdio::null());
    second.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    for set in [
        format!("http.listen=127.0.0.1:{port}"),
        format!("cluster.peer_listen=127.0.0.1:{}", port + 100),
        "storage.lock_timeout_ms=1000".to_owned(),
    ] {
        second.args(["--set", &set]);
    }
    let mut second = second.spawn().unwrap();
    let mut refused = 0;
    let status = loop {
        if let Some(status) = second.try_wait().unwrap() {
            break status;
        }
        match std::net::TcpStream::connect(("127.0.0.1", port)) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => refused += 1,
            other => panic!("connected to a node that is starting: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!((status.code(), refused > 0), (Some(5), true));
    cluster.stop_all().await.unwrap();
}

/// A server as a service manager has it.
struct Managed {
    server: Child,
    manager: UnixDatagram,
}

impl Managed {
    fn start(dir: &Path, node: &NodePlan, set: &[&str]) -> Managed {
        let managed = Self::begin(dir, node, set);
        managed.hears("READY=1");
        managed.hears("STATUS=ok: leader");
        managed
    }

    fn begin(dir: &Path, node: &NodePlan, set: &[&str]) -> Managed {
        let socket = dir.join("notify");
        let manager = UnixDatagram::bind(&socket).unwrap();
        manager.set_read_timeout(Some(READY)).unwrap();
        let mut server = Command::new(env!("CARGO_BIN_EXE_stemedb"));
        server.args(["serve", "--config", node.config_file().to_str().unwrap()]);
        server.args(set.iter().flat_map(|set| ["--set", set]));
        server.env("NOTIFY_SOCKET", &socket).stdin(Stdio::null()).stderr(Stdio::null());
        Managed { server: server.spawn().unwrap(), manager }
    }

    fn hears(&self, wanted: &str) {
        let mut bytes = [0; 512];
        loop {
            let length = self.manager.recv(&mut bytes).unwrap_or_else(|e| panic!("waited in vain for {wanted}: {e}"));
            if String::from_utf8_lossy(&bytes[..length]).starts_with(wanted) {
                return;
            }
        }
    }

    /// Waits for its end.
    fn ends(&mut self) -> ExitStatus {
        let pause = Duration::from_millis(5);
        for _ in 0..READY.as_millis() / pause.as_millis() {
            if let Some(status) = self.server.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(pause);
        }
        self.server.kill().unwrap();
        panic!("the server goes on");
    }

    fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.server);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
}

#[test]
fn the_service_manager_hears_of_the_start_and_of_the_stop() {
    let dir = tempfile::tempdir().unwrap();
    let (_cluster, node) = one_node(dir.path());
    let mut managed = Managed::start(dir.path(), &node, &[]);
    managed.terminate();
    managed.hears("STOPPING=1");
    assert!(managed.ends().success());
}

#[tokio::test]
async fn a_server_that_is_still_starting_stops_when_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cluster, node) = one_node(dir.path());
    cluster.start_all().unwrap();
    cluster.wait_ready(READY).await.unwrap();
    // It waits for the folder that the first one has.
    let port = free_port(1).unwrap();
    let set = [
        format!("http.listen=127.0.0.1:{port}"),
        format!("cluster.peer_listen=127.0.0.1:{}", port + 100),
        "storage.lock_timeout_ms=600000".to_owned(),
    ];
    let mut managed = Managed::begin(dir.path(), &node, &set.each_ref().map(String::as_str));
    while std::net::TcpStream::connect(("127.0.0.1", port + 100)).is_err() {
        assert_eq!(managed.server.try_wait().unwrap(), None, "it ended by itself");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    managed.terminate();
    managed.hears("STOPPING=1");
    assert!(managed.ends().success());
    cluster.wait_ready(READY).await.unwrap();
    cluster.stop_all().await.unwrap();
}

#[test]
fn a_second_signal_ends_a_server_at_once_that_waits_for_a_request() {
    let dir = tempfile::tempdir().unwrap();
    let (_cluster, node) = one_node(dir.path());
    let mut managed = Managed::start(dir.path(), &node, &["cluster.stop_deadline_ms=600000"]);
    // A request of which the body never comes.
    let mut client = std::net::TcpStream::connect(node.http_addr()).unwrap();
    client.set_read_timeout(Some(READY)).unwrap();
    let head = "POST /v1/assert HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 100\r\n\r\n";
    client.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100", "it waits for the body");
    managed.terminate();
    managed.hears("STOPPING=1");
    assert_eq!(managed.server.try_wait().unwrap(), None, "it waits for the request");
    managed.terminate();
    assert_eq!(managed.ends().code(), Some(7));
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (_cluster, node) = one_node(dir.path());
    // No permission stops root, but even root makes no folder below a file.
    let below_a_file = node.config_file().join("data");
    let (code, log) = stemedb(&node.config_file(), &[format!("node.data_dir={}", below_a_file.display())]);
    assert_eq!(code, 5, "{log}");
    assert!(log.contains("api.toml/data"), "{log}");
}

#[test]
fn an_address_for_strangers_needs_a_word_of_consent() {
    let dir = tempfile::tempdir().unwrap();
    let (_cluster, node) = one_node(dir.path());
    let open = format!("http.listen=0.0.0.0:{}", node.http_port);
    let (code, log) = stemedb(&node.config_file(), &[open]);
    assert_eq!(code, 6, "{log}");
    assert!(log.contains("insecure = true"), "{log}");
}

#[test]
fn a_wrong_configuration_names_file_line_and_key_in_both_programs() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("api.toml");
    std::fs::write(&file, "[wal]\nsegment_size_mb = \"many\"\n").unwrap();
    let file = file.to_str().unwrap();
    let stemedb = serve(env!("CARGO_BIN_EXE_stemedb"), &["serve", "--config", file]);
    let api = serve(env!("CARGO_BIN_EXE_stemedb-api"), &["--config", file]);
    for (code, said) in [stemedb, api] {
        assert_eq!(code, 6, "{said}");
        assert!(said.contains(&format!("{file}:2: wal.segment_size_mb")) && said.contains("accepted:"), "{said}");
    }
}
