//! `stemedb dev`: a whole cluster on this machine, in the foreground.
//!
//! Starts real server processes, waits until all are ready, says how to reach them, and stops them on
//! Ctrl-C or SIGTERM. It restarts nothing: a node that dies is reported, with the line that starts it
//! again, because watching that is what a local cluster is for.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::local_cluster::{LocalCluster, NodePlan, plan, program_for_paste, restart_command};
use super::{CliError, output};

/// How long all nodes may take to become ready; recovery of a large log is the slow part.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// Arguments of `stemedb dev`.
#[derive(Args, Debug, Clone)]
pub struct DevArgs {
    /// How many nodes, 1 to 9
    #[arg(long, default_value_t = 3)]
    pub nodes: usize,
    /// Folder of all nodes; node i keeps everything under DIR/node-i
    #[arg(long, value_name = "DIR", default_value = "stemedb-dev")]
    pub data: PathBuf,
    /// HTTP port of the first node; the others follow, peers are 100 above
    #[arg(long, default_value_t = 18180)]
    pub port: u16,
    /// Print one JSON object once all nodes are ready, instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What `--json` prints, once.
#[derive(Serialize)]
struct Started {
    data: PathBuf,
    endpoints: Vec<String>,
    nodes: Vec<StartedNode>,
}

#[derive(Serialize)]
struct StartedNode {
    name: String,
    url: String,
    peer_addr: String,
    pid: Option<i32>,
    data: PathBuf,
    config: PathBuf,
    log: PathBuf,
}

/// Ctrl-C and SIGTERM, caught from the moment this is made; the end of the terminal too, if that is wanted.
pub(crate) struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
    caught: bool,
}

impl StopSignals {
    /// Starts catching.
    pub(crate) fn new() -> Result<Self, CliError> {
        let (interrupt, terminate) = (catch(SignalKind::interrupt())?, catch(SignalKind::terminate())?);
        Ok(Self { interrupt, terminate, hangup: None, caught: false })
    }

    /// The same, with the end of the terminal, unless this process was started to outlive it (`nohup`).
    pub(crate) fn with_hangup() -> Result<Self, CliError> {
        let hangup = match ignores_hangup() {
            true => None,
            false => Some(catch(SignalKind::hangup())?),
        };
        Ok(Self { hangup, ..Self::new()? })
    }

    /// Whether one has come that was waited for.
    pub(crate) fn caught(&self) -> bool {
        self.caught
    }

    /// Waits for the next one.
    pub(crate) async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = async {
                match &mut self.hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            } => {}
        }
        self.caught = true;
    }
}

fn catch(kind: SignalKind) -> Result<Signal, CliError> {
    signal(kind).map_err(|error| CliError::Local(format!("cannot catch signals: {error}")))
}

/// Whether SIGHUP was ignored when this process began; where that cannot be read it was not.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // The lowest bit is signal 1.
    ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

/// Runs until stopped.
pub async fn run(args: &DevArgs) -> Result<(), CliError> {
    let mut stop = StopSignals::new()?;
    // Absolute without touching the disk: ports and arguments are checked before anything is made.
    let dir = std::path::absolute(&args.data)
        .map_err(|error| CliError::Local(format!("{}: {error}", args.data.display())))?;
    let mut cluster = LocalCluster::prepare(plan(&dir, args.nodes, args.port)?)?;
    let outcome = run_cluster(args, dir, &mut cluster, &mut stop).await;
    if cluster.any_running() {
        output::notice("stopping the nodes");
    }
    for name in cluster.stop_all().await? {
        output::notice(&format!("{name} did not stop in time and was killed"));
    }
    outcome
}

async fn run_cluster(
    args: &DevArgs,
    dir: PathBuf,
    cluster: &mut LocalCluster,
    stop: &mut StopSignals,
) -> Result<(), CliError> {
    cluster.start_all()?;
    tokio::select! {
        ready = cluster.wait_ready(READY_TIMEOUT) => ready?,
        () = stop.wait() => return Ok(()),
    }
    if args.json {
        output::json(&started(dir, cluster))?;
    } else {
        output::line(&welcome(cluster, args))?;
    }
    loop {
        tokio::select! {
            ended = cluster.child_ended() => {
                let ended = ended?;
                let error = cluster.ended_error(&ended);
                output::notice(&error.to_string());
                if let Some(plan) = cluster.plan().get(ended.node) {
                    output::notice(&format!("Start it again with: {}", restart_command(plan)));
                }
                if !cluster.any_running() {
                    return Err(CliError::Local("no node is left".to_owned()));
                }
            }
            () = stop.wait() => return Ok(()),
        }
    }
}

fn started(data: PathBuf, cluster: &LocalCluster) -> Started {
    let nodes = cluster.plan().iter().enumerate().map(|(number, plan)| StartedNode {
        name: plan.name.clone(),
        url: format!("http://{}", plan.http_addr()),
        peer_addr: plan.peer_addr(),
        pid: cluster.pid(number),
        data: plan.dir.clone(),
        config: plan.config_file(),
        log: plan.log_file(),
    });
    Started { data, endpoints: cluster.plan().iter().map(NodePlan::http_addr).collect(), nodes: nodes.collect() }
}

fn welcome(cluster: &LocalCluster, args: &DevArgs) -> String {
    let mut table = output::table(["NODE", "HTTP", "PEERS", "PID", "DATA"]);
    for (number, plan) in cluster.plan().iter().enumerate() {
        table.add_row([
            plan.name.clone(),
            format!("http://{}", plan.http_addr()),
            plan.peer_addr(),
            cluster.pid(number).map_or("-".to_owned(), |pid| pid.to_string()),
            plan.dir.display().to_string(),
        ]);
    }
    let paste = |plan: &NodePlan| {
        format!(
            "  curl -s http://{}/v1/assert -d '{{\"concept_path\":\"demo/sky\",\"predicate\":\"colour\",\"value\":\"blue\"}}'",
            plan.http_addr()
        )
    };
    let read = |plan: &NodePlan| format!("  curl -s 'http://{}/v1/query?concept_path=demo/sky'", plan.http_addr());
    let first = cluster.plan().first().map(paste).unwrap_or_default();
    let last = cluster.plan().last().map(read).unwrap_or_default();
    let endpoints: Vec<String> = cluster.plan().iter().map(NodePlan::http_addr).collect();
    let program = program_for_paste();
    let status = if args.port == 18180 && args.nodes == 3 {
        format!("  {program} status")
    } else {
        format!("  {program} status --endpoints {}", endpoints.join(","))
    };
    format!(
        "{table}\nAll nodes are ready. To write, to read on another node, to look:\n{first}\n{last}\n{status}\nCtrl-C stops the nodes; the data stays."
    )
}
