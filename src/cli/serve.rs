//! `stemedb serve`: one server process, from its configuration to its exit code.
//!
//! Takes both ports before it opens anything, but lets clients connect only once it can answer: a load balancer without
//! probes goes elsewhere when a connection is refused, and would wait on one that nobody reads. It writes `pid` into the
//! data folder and removes it on a clean stop. SIGTERM and SIGINT stop it cleanly: the node leaves traffic as in a drain,
//! within `cluster.stop_deadline_ms`, the HTTP side finishes what it has begun, then the node stops; one that is drained
//! already stops at once, and so does one that is still starting. A second signal ends the process at once. The service manager
//! is told of each.

mod notify;
pub mod rebuild;
mod signals;

use std::{
    net::SocketAddr,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use tokio::net::{TcpListener, TcpSocket};
use tokio_util::sync::CancellationToken;

use self::{notify::Notifier, signals::Told};
use crate::{
    api,
    config::Config,
    metrics::Metrics,
    node::{Ground, Node, StartError, is_full},
};

/// A port or the data folder keeps the node from starting.
const EXIT_CANNOT_START: u8 = 5;
/// The configuration keeps it from starting.
const EXIT_CONFIG: u8 = 6;
/// It started and could not go on.
const EXIT_FAILED: u8 = 7;
/// Its disk hung for so long that it closed its doors.
const EXIT_FENCED: u8 = 8;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// How often the service manager's line is made anew.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// How long the last file may take to be removed. The disk may hang by then.
const PID_FILE_MAX: Duration = Duration::from_secs(1);

/// Runs a node until it is told to stop. Returns an exit code of `docs/exit-codes.md`; the reason is in the log.
pub async fn run(config: Arc<Config>) -> ExitCode {
    match serve(config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            match &failure {
                Failure::Start(why) | Failure::Config(why) => tracing::error!("cannot start: {why}"),
                Failure::Run(why) | Failure::Fenced(why) => tracing::error!("cannot go on: {why}"),
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

#[derive(Debug)]
enum Failure {
    Start(String),
    Config(String),
    Run(String),
    Fenced(String),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Failure::Start(_) => EXIT_CANNOT_START,
            Failure::Config(_) => EXIT_CONFIG,
            Failure::Run(_) => EXIT_FAILED,
            Failure::Fenced(_) => EXIT_FENCED,
        }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Config(_) => Failure::Config(error.to_string()),
            _ => Failure::Start(error.to_string()),
        }
    }
}

/// An address that other machines can reach needs TLS or tokens, which do not exist yet.
fn check_exposure(addr: SocketAddr, what: &str, insecure: bool) -> Result<(), String> {
    if addr.ip().is_loopback() {
        return Ok(());
    }
    if !insecure {
        return Err(format!(
            "{what} {addr} can be reached from other machines, and nothing is encrypted or authenticated: listen on \
             127.0.0.1, or set http.insecure = true if the network keeps strangers out"
        ));
    }
    tracing::warn!("{what} {addr} can be reached from other machines, and nothing is encrypted or authenticated");
    Ok(())
}

/// Takes the address without listening on it: connections are refused until `listen` is called.
async fn bind(addr: &str, what: &str, insecure: bool) -> Result<TcpSocket, Failure> {
    // Looked up before binding: a refused address is never open, not even for a moment.
    let found: Vec<SocketAddr> =
        tokio::net::lookup_host(addr).await.map_err(|e| Failure::Start(format!("{what} {addr}: {e}")))?.collect();
    for addr in &found {
        check_exposure(*addr, what, insecure).map_err(Failure::Config)?;
    }
    let mut error = None;
    for found in found {
        let socket = if found.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let bound = socket.and_then(|socket| {
            socket.set_reuseaddr(true)?;
            socket.bind(found)?;
            Ok(socket)
        });
        match bound {
            Ok(socket) => return Ok(socket),
            Err(why) => error = Some(why),
        }
    }
    let why = error.map_or_else(|| "no address".to_owned(), |error| error.to_string());
    Err(Failure::Start(format!("{what} {addr}: {why}")))
}

fn listen(socket: TcpSocket, addr: &str, what: &str) -> Result<TcpListener, Failure> {
    socket.listen(BACKLOG).map_err(|e| Failure::Start(format!("{what} {addr}: {e}")))
}

async fn serve(config: Arc<Config>) -> Result<(), Failure> {
    // Every path of the configuration is absolute. A server that stays where it was started would hold that
    // folder, and could not resolve a path any more once somebody removed it.
    std::env::set_current_dir("/").map_err(|e| Failure::Start(format!("go to /: {e}")))?;
    let told = signals::listen().map_err(|e| Failure::Run(format!("signals: {e}")))?;
    loop {
        match serve_node(Arc::clone(&config), told.clone()).await? {
            End::Told => return Ok(()),
            End::Moved => tracing::info!("starting anew in the spare folder"),
        }
    }
}

/// How a node ended that was not at its end.
enum End {
    /// By a signal.
    Told,
    /// It has moved to its spare folder.
    Moved,
}

async fn serve_node(config: Arc<Config>, mut told: Told) -> Result<End, Failure> {
    let insecure = config.http.insecure;
    let http = bind(&config.http.listen, "http.listen", insecure).await?;
    let peer = bind(&config.peer_listen(), "cluster.peer_listen", insecure).await?;
    let peer = listen(peer, &config.peer_listen(), "cluster.peer_listen")?;
    let http_addr = http.local_addr().map_or_else(|_| config.http.listen.clone(), |a| a.to_string());
    let ground = Ground { peer_listener: Some(peer), ..Ground::default() };
    let notifier = Arc::new(Notifier::from_env());
    let node = tokio::select! {
        node = Node::start_on(Arc::clone(&config), Arc::new(Metrics::new()), ground) => node?,
        // It has promised nothing yet: the folder is left as by a process that was killed.
        () = signals::told(&mut told) => {
            notifier.stopping();
            return Ok(End::Told);
        }
    };
    let http = match listen(http, &config.http.listen, "http.listen") {
        Ok(http) => http,
        Err(failure) => {
            node.shutdown().await;
            return Err(failure);
        }
    };
    // After the start: the folder is this process's own from there on.
    let config = Arc::new(node.config().clone());
    let pid = PidFile::write(&config).await.map_err(Failure::Start)?;
    tracing::info!(name = node.name(), http = http_addr, data_dir = %config.node.data_dir.display(), "serving");

    let stop_http = CancellationToken::new();
    let serving = tokio::spawn(api::serve(http, Arc::clone(&node), stop_http.clone()));
    notifier.ready();
    let telling = tokio::spawn(tell_status(Arc::clone(&node), Arc::clone(&notifier)));
    let ended = wait_for_end(&node, serving, stop_http, &notifier, told).await;
    telling.abort();
    if node.fenced().is_cancelled() {
        // Nothing of it may be waited for, nor may its end be: both could need the disk. What lies on it is as after a
        // crash.
        std::mem::forget(Arc::clone(&node));
        return ended.and(Err(Failure::Fenced("the disk hung for too long, and this process was fenced".into())));
    }
    node.shutdown().await;
    if tokio::time::timeout(PID_FILE_MAX, pid.remove()).await.is_err() {
        tracing::warn!("the pid file could not be removed in time");
    }
    ended
}

/// Keeps the line that `systemctl status` shows. Looks now and then: nobody acts on it.
async fn tell_status(node: Arc<Node>, notifier: Arc<Notifier>) {
    let mut last = String::new();
    loop {
        let health = node.health();
        let leader = health.leader.as_deref().unwrap_or("unknown");
        let now = format!("{}: {} in term {}, leader {leader}", health.status, health.role, health.term);
        if now != last {
            notifier.status(&now);
            last = now;
        }
        tokio::time::sleep(STATUS_INTERVAL).await;
    }
}

async fn wait_for_end(
    node: &Arc<Node>,
    mut serving: tokio::task::JoinHandle<std::io::Result<()>>,
    stop_http: CancellationToken,
    notifier: &Notifier,
    mut told: Told,
) -> Result<End, Failure> {
    let ended = tokio::select! {
        () = signals::told(&mut told) => Ok(End::Told),
        () = node.wait_moved() => Ok(End::Moved),
        why = node.wait_fatal() => Err(Failure::Run(why)),
        () = node.wait_fence_over() => {
            return Err(Failure::Fenced("the disk answers again after this process was fenced; it recovers when it is started anew".into()));
        }
        ended = &mut serving => {
            return Err(Failure::Run(match ended {
                Ok(Ok(())) => "the HTTP server ended by itself".into(),
                Ok(Err(e)) => format!("the HTTP server: {e}"),
                Err(e) => format!("the HTTP server died: {e}"),
            }));
        }
    };
    // A node that has moved leads nothing, and is out of traffic: its core has ended.
    if !matches!(ended, Ok(End::Moved)) {
        notifier.stopping();
        // While requests are still served: they are sent on to the next leader.
        node.stop_gently().await;
    }
    stop_http.cancel();
    match serving.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the HTTP server did not stop well"),
        Err(error) => tracing::warn!(%error, "the HTTP server died while stopping"),
    }
    ended
}

/// The process id in the data folder.
struct PidFile {
    path: PathBuf,
}

impl PidFile {
    async fn write(config: &Config) -> Result<PidFile, String> {
        let path = config.node.data_dir.join("pid");
        match Self::put(&path) {
            Ok(()) => {}
            // A node without any room serves all the same; whoever looks for its id asks the system.
            Err(e) if is_full(&e) => tracing::warn!("no space for {}: {e}", path.display()),
            Err(e) => return Err(format!("write {}: {e}", path.display())),
        }
        Ok(PidFile { path })
    }

    /// Over what an earlier process left, so that its block is used again.
    fn put(path: &Path) -> std::io::Result<()> {
        let text = format!("{}\n", std::process::id());
        let file = std::fs::File::options().create(true).truncate(false).write(true).open(path)?;
        file.write_all_at(text.as_bytes(), 0).inspect_err(|_| {
            // A file without the id of this process is none; it may name another one.
            let _gone = std::fs::remove_file(path);
        })?;
        file.set_len(text.len() as u64)
    }

    async fn remove(self) {
        if let Err(error) = tokio::fs::remove_file(&self.path).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path.display(), "the pid file could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_failure_has_its_documented_exit_code() {
        let documented = include_str!("../../docs/exit-codes.md");
        for (failure, line) in [
            (Failure::Start(String::new()), "| 5 | this machine: a taken port, a folder"),
            (Failure::from(StartError::Config(String::new())), "| 6 | the server's configuration is wrong"),
            (Failure::Run(String::new()), "| 7 | `serve`: the node ran and could not go on"),
            (Failure::Fenced(String::new()), "| 8 | `serve`: the disk hung for longer than `cluster.stall_fence_ms`"),
        ] {
            assert!(line.starts_with(&format!("| {} |", failure.exit_code())) && documented.contains(line));
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_of_this_machine_and_an_open_address_of_the_configuration() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = taken.local_addr().unwrap().to_string();
        assert_eq!(bind(&addr, "http.listen", false).await.unwrap_err().exit_code(), EXIT_CANNOT_START);
        assert_eq!(bind("0.0.0.0:0", "http.listen", false).await.unwrap_err().exit_code(), EXIT_CONFIG);
    }

    #[test]
    fn only_loopback_is_open_without_saying_insecure() {
        for addr in ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1"] {
            assert!(check_exposure(addr.parse().unwrap(), "http.listen", false).is_ok());
        }
        for addr in ["0.0.0.0:1", "10.0.0.1:1", "[::]:1"] {
            let error = check_exposure(addr.parse().unwrap(), "http.listen", false).unwrap_err();
            assert!(error.contains("insecure = true"), "{error}");
            assert!(check_exposure(addr.parse().unwrap(), "http.listen", true).is_ok());
        }
    }
}
