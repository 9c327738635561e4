//! Real server processes on this machine, for `dev`, `drill` and tests.
//!
//! Node *i* keeps everything under `DIR/node-i/`; HTTP listens on `port + i - 1`, peers 100 above. The
//! children are this same executable with `serve --config DIR/node-i/api.toml`. Each has a pipe as its
//! standard input and stops when that pipe closes, so that none outlives its parent, however the parent
//! ends; and each is in a process group of its own, so that Ctrl-C reaches only the parent.
//! Nothing here deletes a file, and nothing restarts a child by itself.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{Instant, sleep, timeout_at};

use super::http_client::{Call, Client, Endpoint};
use super::local_config;
use super::{CliError, output};

/// Most nodes on one machine; more than any real cluster's voters.
pub const NODES_MAX: usize = 9;

/// The peer port is the HTTP port plus this (as in the server's own default).
pub const PEER_PORT_OFFSET: u16 = 100;

/// How long a child may take to stop after SIGTERM before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Pause between two questions to a node that is not ready.
const READY_POLL: Duration = Duration::from_millis(25);

/// A node that needs longer to become ready is named, so that nobody watches an empty screen.
const READY_NOTICE_AFTER: Duration = Duration::from_secs(5);

/// Deadline of one such question.
const READY_CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// Read from the end of a log for an error message.
const LOG_TAIL_BYTES: u64 = 16 * 1024;

/// Lines of it that are shown.
const LOG_TAIL_LINES: usize = 12;

/// Settings of the environment that belong to one node and must not reach all children alike.
const ENV_OF_ONE_NODE: [&str; 7] = [
    "STEMEDB_NODE_NAME",
    "STEMEDB_NODE_DATA_DIR",
    "STEMEDB_HTTP_LISTEN",
    "STEMEDB_CLUSTER_PEERS",
    "STEMEDB_CLUSTER_BOOTSTRAP_EXPECT",
    "STEMEDB_CLUSTER_PEER_LISTEN",
    "STEMEDB_LOGGING_FILE",
];

/// One node as planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePlan {
    /// `node-1`, `node-2`, ...
    pub name: String,
    /// `DIR/node-i`, absolute.
    pub dir: PathBuf,
    /// Port of the HTTP listener on 127.0.0.1.
    pub http_port: u16,
    /// Port of the peer listener on 127.0.0.1.
    pub peer_port: u16,
    /// What the process prints goes there: `DIR/node-i/log`, unless the caller changes it.
    pub log: PathBuf,
}

impl NodePlan {
    /// `127.0.0.1:port` of HTTP.
    pub fn http_addr(&self) -> String {
        format!("127.0.0.1:{}", self.http_port)
    }

    /// `127.0.0.1:port` for peers.
    pub fn peer_addr(&self) -> String {
        format!("127.0.0.1:{}", self.peer_port)
    }

    /// The HTTP endpoint.
    pub fn endpoint(&self) -> Result<Endpoint, CliError> {
        Endpoint::parse(&self.http_addr()).map_err(CliError::Local)
    }

    /// `DIR/node-i/api.toml`.
    pub fn config_file(&self) -> PathBuf {
        self.dir.join("api.toml")
    }

    /// Where the process prints to.
    pub fn log_file(&self) -> PathBuf {
        self.log.clone()
    }
}

/// All nodes of one folder.
pub fn plan(dir: &Path, nodes: usize, port: u16) -> Result<Vec<NodePlan>, CliError> {
    if !(1..=NODES_MAX).contains(&nodes) {
        return Err(CliError::Usage(format!("--nodes {nodes}: a local cluster has 1 to {NODES_MAX} nodes")));
    }
    (1..=nodes)
        .map(|number| {
            // `nodes` is at most 9, so the offset fits.
            let offset = u16::try_from(number - 1).unwrap_or(u16::MAX);
            let http_port = port.checked_add(offset).filter(|port| *port > 0);
            let peer_port = http_port.and_then(|port| port.checked_add(PEER_PORT_OFFSET));
            let (Some(http_port), Some(peer_port)) = (http_port, peer_port) else {
                return Err(CliError::Usage(format!(
                    "--port {port}: peers listen {PEER_PORT_OFFSET} above HTTP, so the port must be 1 to {}",
                    usize::from(u16::MAX - PEER_PORT_OFFSET) + 1 - nodes
                )));
            };
            let name = format!("node-{number}");
            let dir = dir.join(&name);
            Ok(NodePlan { log: dir.join("log"), dir, name, http_port, peer_port })
        })
        .collect()
}

/// Refuses when a port of the plan is taken, naming all that are.
pub fn check_ports(plan: &[NodePlan]) -> Result<(), CliError> {
    let ports =
        plan.iter().flat_map(|node| [(&node.name, "HTTP", node.http_port), (&node.name, "peers", node.peer_port)]);
    let taken: Vec<String> = ports
        .filter_map(|(name, what, port)| {
            let error = TcpListener::bind(("127.0.0.1", port)).err()?;
            Some(format!("  127.0.0.1:{port} ({what} of {name}): {error}"))
        })
        .collect();
    if taken.is_empty() {
        return Ok(());
    }
    Err(CliError::Local(format!(
        "nothing was started, because these ports cannot be used:\n{}\nStop what listens there (another `stemedb dev`?), or choose others with --port.",
        taken.join("\n")
    )))
}

/// The server processes.
pub struct LocalCluster {
    /// What each node runs.
    programs: Vec<PathBuf>,
    plan: Vec<NodePlan>,
    children: Vec<Option<Running>>,
    /// Further variables of the environment: of which node, or of all.
    env: Vec<(Option<usize>, String, OsString)>,
}

struct Running {
    child: Child,
    pid: i32,
    /// Held only to keep it open: its end tells the child to stop.
    _alive: ChildStdin,
}

/// A child that ended.
#[derive(Debug)]
pub struct Ended {
    /// Its place in the plan, from 0.
    pub node: usize,
    /// How.
    pub status: ExitStatus,
}

#[derive(Deserialize)]
struct ReadyProblem {
    #[serde(default)]
    detail: String,
}

impl LocalCluster {
    /// Checks the ports, then makes the folders and the configuration files that are missing. Starts nothing.
    pub fn prepare(plan: Vec<NodePlan>) -> Result<Self, CliError> {
        let program = std::env::current_exe()
            .map_err(|error| CliError::Local(format!("cannot find this program's file: {error}")))?;
        Self::prepare_with(program, plan)
    }

    /// `prepare` with another executable than this one, for tests.
    pub fn prepare_with(program: PathBuf, plan: Vec<NodePlan>) -> Result<Self, CliError> {
        check_ports(&plan)?;
        for node in &plan {
            fs::create_dir_all(&node.dir)
                .map_err(|error| CliError::Local(format!("cannot make the folder {}: {error}", node.dir.display())))?;
            local_config::write_or_compare(node, &plan)?;
        }
        let children = plan.iter().map(|_| None).collect();
        let programs = vec![program; plan.len()];
        Ok(Self { programs, plan, children, env: Vec::new() })
    }

    /// Sets a variable of the environment of every process that is started from now on.
    pub fn set_env(&mut self, name: &'static str, value: &'static str) {
        self.env.push((None, name.to_owned(), value.into()));
    }

    /// The same for the next starts of one node.
    pub fn set_node_env(&mut self, node: usize, name: &str, value: impl Into<OsString>) {
        self.env.retain(|(of, known, _)| (*of, known.as_str()) != (Some(node), name));
        self.env.push((Some(node), name.to_owned(), value.into()));
    }

    /// Takes such a variable back.
    pub fn unset_node_env(&mut self, node: usize, name: &str) {
        self.env.retain(|(of, known, _)| (*of, known.as_str()) != (Some(node), name));
    }

    /// What one node runs from its next start on.
    pub fn set_node_program(&mut self, node: usize, program: PathBuf) {
        if let Some(known) = self.programs.get_mut(node) {
            *known = program;
        }
    }

    /// The plan.
    pub fn plan(&self) -> &[NodePlan] {
        &self.plan
    }

    /// Process id of a running child.
    pub fn pid(&self, node: usize) -> Option<i32> {
        Some(self.running(node)?.pid)
    }

    /// Starts one node that is not running. Its output is appended to its log.
    pub fn start(&mut self, node: usize) -> Result<(), CliError> {
        let node_parts = (self.plan.get(node), self.children.get_mut(node), self.programs.get(node));
        let (Some(plan), Some(slot), Some(program)) = node_parts else {
            return Err(CliError::Local(format!("there is no node {node}")));
        };
        let failed =
            |what: &str, error: std::io::Error| CliError::Local(format!("{}: cannot {what}: {error}", plan.name));
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(plan.log_file())
            .map_err(|error| failed("open its log", error))?;
        let log_too = log.try_clone().map_err(|error| failed("open its log", error))?;
        let mut command = Command::new(program);
        command
            .arg("serve")
            .arg("--config")
            .arg(plan.config_file())
            .arg("--stop-on-stdin-eof")
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(log_too)
            .process_group(0);
        for name in ENV_OF_ONE_NODE {
            command.env_remove(name);
        }
        let of_node = self.env.iter().filter(|(of, ..)| of.is_none_or(|of| of == node));
        command.envs(of_node.map(|(_, name, value)| (name, value)));
        let mut child = command.spawn().map_err(|error| failed("start its process", error))?;
        // Taken out of the child: `Child::wait` would close it, and the node would stop.
        let alive = child.stdin.take();
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let (Some(alive), Some(pid)) = (alive, pid) else {
            return Err(CliError::Local(format!("{}: ended at once", plan.name)));
        };
        *slot = Some(Running { child, pid, _alive: alive });
        Ok(())
    }

    /// Starts every node that is not running.
    pub fn start_all(&mut self) -> Result<(), CliError> {
        for node in 0..self.plan.len() {
            if self.running(node).is_none() {
                self.start(node)?;
            }
        }
        Ok(())
    }

    /// Sends a signal to a running node and waits for nothing.
    pub fn signal(&self, node: usize, sent: Signal) -> Result<(), CliError> {
        let pid = self.pid(node).ok_or_else(|| CliError::Local(format!("node {node} is not running")))?;
        signal(pid, sent)
    }

    /// SIGTERM, and waits until the process has ended. A node that does not in time stays, and that is an error.
    pub async fn stop(&mut self, node: usize) -> Result<(), CliError> {
        self.signal(node, Signal::TERM)?;
        let Some(slot) = self.children.get_mut(node) else {
            return Err(CliError::Local(format!("there is no node {node}")));
        };
        if let Some(running) = slot {
            let ended = tokio::time::timeout(STOP_TIMEOUT, running.child.wait()).await;
            if !matches!(ended, Ok(Ok(_))) {
                let what = format!("did not stop within {} s", STOP_TIMEOUT.as_secs());
                return Err(self.node_error(node, &what));
            }
            *slot = None;
        }
        Ok(())
    }

    /// kill -9, and waits until the process is gone.
    pub async fn kill(&mut self, node: usize) -> Result<(), CliError> {
        let Some(mut running) = self.children.get_mut(node).and_then(Option::take) else {
            return Err(CliError::Local(format!("node {node} is not running")));
        };
        signal(running.pid, Signal::KILL)?;
        let gone = running.child.wait().await;
        gone.map(|_| ()).map_err(|error| CliError::Local(format!("cannot wait for process {}: {error}", running.pid)))
    }

    /// Waits until some child ends by itself. Never returns while all run, or when none does.
    pub async fn child_ended(&mut self) -> Result<Ended, CliError> {
        let waits = self.children.iter_mut().enumerate().filter_map(|(node, slot)| {
            let running = slot.as_mut()?;
            Some(Box::pin(async move { (node, running.child.wait().await) }))
        });
        let waits: Vec<_> = waits.collect();
        if waits.is_empty() {
            std::future::pending::<()>().await;
        }
        let ((node, status), _, _) = futures_util::future::select_all(waits).await;
        if let Some(slot) = self.children.get_mut(node) {
            *slot = None;
        }
        let status = status.map_err(|error| CliError::Local(format!("cannot wait for node {node}: {error}")))?;
        Ok(Ended { node, status })
    }

    /// True while some child runs.
    pub fn any_running(&self) -> bool {
        self.children.iter().any(Option::is_some)
    }

    /// SIGTERM to all, waits, and kills what has not stopped in time. Returns the names of those killed.
    pub async fn stop_all(&mut self) -> Result<Vec<String>, CliError> {
        let mut first_error = None;
        for running in self.children.iter().flatten() {
            if let Err(error) = signal(running.pid, Signal::TERM) {
                first_error.get_or_insert(error);
            }
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        let mut killed = Vec::new();
        for (slot, plan) in self.children.iter_mut().zip(&self.plan) {
            let Some(mut running) = slot.take() else {
                continue;
            };
            if timeout_at(deadline, running.child.wait()).await.is_err() {
                killed.push(plan.name.clone());
                if let Err(error) = running.child.kill().await {
                    let text = format!("{}: cannot kill process {}: {error}", plan.name, running.pid);
                    first_error.get_or_insert(CliError::Local(text));
                }
            }
        }
        first_error.map_or(Ok(killed), Err)
    }

    /// Waits until all running nodes answer 200 on `/v1/health/ready`. Fails when one ends or time is up.
    pub async fn wait_ready(&mut self, timeout: Duration) -> Result<(), CliError> {
        let deadline = Instant::now() + timeout;
        let notice_at = Instant::now() + READY_NOTICE_AFTER;
        for node in 0..self.plan.len() {
            if self.running(node).is_none() {
                continue;
            }
            let Some(endpoint) = self.plan.get(node).map(NodePlan::endpoint).transpose()? else {
                continue;
            };
            let mut client = Client::new(endpoint);
            let mut said = false;
            loop {
                let why = match ready(&mut client).await {
                    Ok(()) => break,
                    Err(why) => why,
                };
                if let Some(ended) = self.try_ended()? {
                    return Err(self.ended_error(&ended));
                }
                if Instant::now() >= deadline {
                    let seconds = timeout.as_secs();
                    let what = format!("was not ready within {seconds} s: {why}");
                    return Err(self.node_error(node, &what));
                }
                if !said && Instant::now() >= notice_at {
                    said = true;
                    let name = self.plan.get(node).map_or("a node", |plan| plan.name.as_str());
                    output::notice(&format!("waiting for {name}, up to {} s: {why}", timeout.as_secs()));
                }
                sleep(READY_POLL).await;
            }
        }
        Ok(())
    }

    /// Says which child ended and how, with the end of its log.
    pub fn ended_error(&self, ended: &Ended) -> CliError {
        self.node_error(ended.node, &format!("ended by itself ({})", ended.status))
    }

    fn node_error(&self, node: usize, what: &str) -> CliError {
        let Some(plan) = self.plan.get(node) else {
            return CliError::Local(format!("node {node} {what}"));
        };
        let log = plan.log_file();
        let text = match log_tail(&log) {
            Ok(tail) if tail.is_empty() => format!("Its log {} is empty.", log.display()),
            Ok(tail) => format!("The end of its log {}:\n{tail}", log.display()),
            Err(error) => format!("Its log {} cannot be read: {error}", log.display()),
        };
        CliError::Local(format!("{} {what}\n{text}", plan.name))
    }

    fn try_ended(&mut self) -> Result<Option<Ended>, CliError> {
        for (node, slot) in self.children.iter_mut().enumerate() {
            let Some(running) = slot else { continue };
            let ended = running
                .child
                .try_wait()
                .map_err(|error| CliError::Local(format!("cannot look after process {}: {error}", running.pid)))?;
            if let Some(status) = ended {
                *slot = None;
                return Ok(Some(Ended { node, status }));
            }
        }
        Ok(None)
    }

    fn running(&self, node: usize) -> Option<&Running> {
        self.children.get(node)?.as_ref()
    }
}

async fn ready(client: &mut Client) -> Result<(), String> {
    let answer =
        client.call(&Call::get("/v1/health/ready"), READY_CALL_TIMEOUT).await.map_err(|error| error.to_string())?;
    if answer.is_success() {
        return Ok(());
    }
    let detail = answer.json::<ReadyProblem>().map(|problem| problem.detail);
    Err(match detail {
        Ok(detail) if !detail.is_empty() => detail,
        _ => format!("status {}", answer.status),
    })
}

fn signal(pid: i32, signal: Signal) -> Result<(), CliError> {
    let Some(pid) = Pid::from_raw(pid) else {
        return Err(CliError::Local("a process id of 0".to_owned()));
    };
    match kill_process(pid, signal) {
        // Already gone, and its exit not yet collected by us or just collected: nothing left to signal.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(CliError::Local(format!("cannot signal process {pid:?}: {error}"))),
    }
}

/// The last lines of a log.
pub fn log_tail(file: &Path) -> std::io::Result<String> {
    let mut file = File::open(file)?;
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let shown = lines.iter().skip(lines.len().saturating_sub(LOG_TAIL_LINES));
    let shown: Vec<String> = shown.map(|line| format!("  | {line}")).collect();
    Ok(shown.join("\n"))
}

/// Finds a first port such that all ports of `nodes` nodes are free, starting at a random place, and keeps them for this
/// process: no other call, here or in another process, returns them before this process ends. Other programs may still
/// take them. Below 32,768, where Linux begins to take ports for outgoing connections.
pub fn free_port(nodes: usize) -> Result<u16, CliError> {
    /// Bound while the ports below it are taken; a port that a cluster of `NODES_MAX` leaves unused.
    static KEPT: Mutex<Vec<TcpListener>> = Mutex::new(Vec::new());
    /// HTTP ports of one cluster, and the one that is kept.
    const BLOCK: u16 = NODES_MAX as u16 + 1;
    /// First port of the block with this number: the peers of a block lie `PEER_PORT_OFFSET` above it, and the next
    /// `PEER_PORT_OFFSET` ports are HTTP again.
    const fn first_port(block: u16) -> u16 {
        const BLOCKS_SIDE_BY_SIDE: u16 = PEER_PORT_OFFSET / BLOCK;
        20_000 + block / BLOCKS_SIDE_BY_SIDE * (2 * PEER_PORT_OFFSET) + block % BLOCKS_SIDE_BY_SIDE * BLOCK
    }
    const BLOCKS: u16 = 600;
    const { assert!(first_port(BLOCKS - 1) + PEER_PORT_OFFSET + BLOCK <= 32_000) };
    let start = rand::random_range(0..BLOCKS);
    for block in (0..BLOCKS).map(|n| (start + n) % BLOCKS) {
        let port = first_port(block);
        let Ok(kept) = TcpListener::bind(("127.0.0.1", port + BLOCK - 1)) else { continue };
        if check_ports(&plan(Path::new(""), nodes, port)?).is_ok() {
            KEPT.lock().unwrap_or_else(PoisonError::into_inner).push(kept);
            return Ok(port);
        }
    }
    Err(CliError::Local("no free ports between 20000 and 32000".to_owned()))
}

/// How a person calls this program here: by its name where the shell finds it, else by its path.
pub fn program_for_paste() -> String {
    let Ok(own) = std::env::current_exe().and_then(fs::canonicalize) else {
        return "stemedb".to_owned();
    };
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let is_found = std::env::split_paths(&folders)
        .map(|folder| folder.join("stemedb"))
        .find(|program| program.is_file())
        .is_some_and(|program| fs::canonicalize(program).is_ok_and(|program| program == own));
    if is_found { "stemedb".to_owned() } else { shell_word(&own) }
}

/// The line with which a person restarts one node by hand.
pub fn restart_command(plan: &NodePlan) -> String {
    format!("{} serve --config {}", program_for_paste(), shell_word(&plan.config_file()))
}

/// A path as the shell takes it, in quotes where it needs them.
fn shell_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+:@%,".contains(c)) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}
