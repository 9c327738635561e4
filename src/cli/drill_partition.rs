//! Rounds of `--kind partition`: the leader is cut from the other nodes, while clients go on reaching all of them.
//!
//! Between any two nodes stands a relay of this process: the address of each node for its peers is the relay's, and the
//! node listens on a port that only the relay knows. A cut is silence, as in a real network: nothing is refused and
//! nothing is reset, bytes just stay where they are until the cut heals. Which node has opened a connection is read from
//! `/proc`, so that no privileges are needed.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::drill_load::{Load, Served};
use super::drill_report::{RoundReport, Times};
use super::drill_run::{READY_TIMEOUT, STEADY};
use super::drill_watch::{Down, check_readable, find_leader, survivor_errors, wait_until};
use super::local_cluster::{LocalCluster, NODES_MAX};
use super::{CliError, output};
use crate::judge::{History, ReadOutcome, WriteOutcome, longest_gap_touching};

/// How long the cut lasts once the others serve: less than a request may wait, so that its clients see no error. Behind a
/// balancer the others serve only what the node that is cut off has given back, or never got.
const HELD: Duration = Duration::from_secs(3);

/// Bytes of one direction that may be on their way through a relay.
const BUFFER_BYTES: usize = 64 * 1024;

/// What was on its way when the cut was made may still arrive for so long.
const ON_ITS_WAY_US: u64 = 100_000;

/// The relays of all nodes. Dropped, they end.
pub struct Relays {
    state: Arc<Mutex<State>>,
    _accepting: JoinSet<()>,
}

/// Which connections there are, and which must be silent.
#[derive(Default)]
struct State {
    cut: Option<Cut>,
    connections: Vec<Weak<Connection>>,
}

/// A node that nobody reaches and that reaches nobody.
#[derive(Clone, Copy)]
struct Cut {
    node: usize,
    pid: i32,
}

/// One connection from some node to the node at place `target`.
struct Connection {
    target: usize,
    from: SocketAddr,
    silent: watch::Sender<bool>,
}

impl Relays {
    /// Listens in place of the nodes, which are told to listen elsewhere. None may have been started yet.
    pub async fn start(cluster: &mut LocalCluster) -> Result<Self, CliError> {
        let state: Arc<Mutex<State>> = Arc::default();
        let mut accepting = JoinSet::new();
        for (node, plan) in cluster.plan().to_vec().into_iter().enumerate() {
            let fail = |error| CliError::Local(format!("the relay of {}: {error}", plan.name));
            let listener = TcpListener::bind(plan.peer_addr()).await.map_err(fail)?;
            // Ports of this block that three nodes leave unused.
            let behind = format!("127.0.0.1:{}", plan.peer_port + NODES_MAX as u16 / 2);
            cluster.set_node_env(node, "STEMEDB_CLUSTER_PEER_LISTEN", behind.clone());
            accepting.spawn(accept(Arc::clone(&state), listener, node, behind));
        }
        Ok(Self { state, _accepting: accepting })
    }

    /// Cuts a node from all others.
    pub fn cut(&self, node: usize, pid: i32) -> Result<(), CliError> {
        let ports = ports_of(pid).map_err(|error| CliError::Local(format!("the sockets of process {pid}: {error}")))?;
        let mut state = locked(&self.state);
        let cut = Cut { node, pid };
        state.cut = Some(cut);
        state.connections.retain(|connection| connection.strong_count() > 0);
        for connection in state.connections.iter().filter_map(Weak::upgrade) {
            connection.silent.send_replace(crosses(cut, &connection, &ports));
        }
        Ok(())
    }

    /// Ends the cut: what was held goes on its way.
    pub fn heal(&self) {
        let mut state = locked(&self.state);
        state.cut = None;
        for connection in state.connections.iter().filter_map(Weak::upgrade) {
            connection.silent.send_replace(false);
        }
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn crosses(cut: Cut, connection: &Connection, ports_of_cut: &HashSet<u16>) -> bool {
    connection.target == cut.node || ports_of_cut.contains(&connection.from.port())
}

/// Local ports of the TCP sockets that a process holds, whatever the address.
fn ports_of(pid: i32) -> std::io::Result<HashSet<u16>> {
    let mut inodes = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // Closed meanwhile.
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        if let Some(inode) = socket_inode(&target) {
            inodes.insert(inode);
        }
    }
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
    Ok(table
        .lines()
        .filter_map(port_and_inode)
        .filter(|(_, inode)| inodes.contains(inode))
        .map(|(port, _)| port)
        .collect())
}

/// `socket:[123]` is 123.
fn socket_inode(target: &Path) -> Option<u64> {
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Local port and inode of a line of `/proc/net/tcp`.
fn port_and_inode(line: &str) -> Option<(u16, u64)> {
    let mut fields = line.split_whitespace();
    let (_, port) = fields.nth(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((port, fields.nth(7)?.parse().ok()?))
}

async fn accept(state: Arc<Mutex<State>>, listener: TcpListener, target: usize, behind: String) {
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, from)) => {
                    running.spawn(relay(Arc::clone(&state), stream, from, target, behind.clone()));
                }
                // Out of descriptors, most likely; the node tries again.
                Err(error) => {
                    output::notice(&format!("a relay cannot accept: {error}"));
                    sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_ended) = running.join_next() => {}
        }
    }
}

async fn relay(state: Arc<Mutex<State>>, from_node: TcpStream, from: SocketAddr, target: usize, behind: String) {
    let (silent, listening) = watch::channel(false);
    let connection = Arc::new(Connection { target, from, silent });
    {
        let mut state = locked(&state);
        if let Some(cut) = state.cut {
            // When nothing can be read, the process has gone and talks to nobody.
            let ports = ports_of(cut.pid).unwrap_or_default();
            connection.silent.send_replace(crosses(cut, &connection, &ports));
        }
        state.connections.push(Arc::downgrade(&connection));
    }
    let mut heard = listening.clone();
    if heard.wait_for(|silent| !silent).await.is_err() {
        return;
    }
    // A node that is not there closes the connection, which is what its caller learns here too.
    let Ok(to_node) = TcpStream::connect(behind).await else { return };
    if from_node.set_nodelay(true).is_err() || to_node.set_nodelay(true).is_err() {
        return;
    }
    let ((from_read, from_write), (to_read, to_write)) = (from_node.into_split(), to_node.into_split());
    tokio::select! {
        () = pump(from_read, to_write, listening.clone()) => {}
        () = pump(to_read, from_write, listening) => {}
    }
    drop(connection);
}

/// Moves bytes while the connection is not silent, until either end closes it.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut silent: watch::Receiver<bool>) {
    let mut buffer = vec![0_u8; BUFFER_BYTES];
    while let Ok(read) = from.read(&mut buffer).await {
        // An end is news too, and stays where it is while nothing gets through.
        if silent.wait_for(|silent| !silent).await.is_err() {
            return;
        }
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        if to.write_all(bytes).await.is_err() {
            break;
        }
    }
    let _closed = silent.wait_for(|silent| !silent).await;
}

/// What one round showed.
#[derive(Clone, Debug, Serialize)]
pub struct PartitionRound {
    /// From 1.
    pub round: usize,
    /// The leader that was cut off.
    pub cut: String,
    /// Who led the others.
    pub new_leader: String,
    /// In which term.
    pub term: u64,
    /// Longest time without an acknowledged write around the cut, microseconds.
    pub gap_us: u64,
    /// The same after it had healed.
    pub heal_gap_us: u64,
    /// Successful answers of the node that was cut off, to requests that began once it was.
    pub answered_cut_off: u64,
    /// Requests to the other nodes that failed, and to the cut one after the cut had healed.
    pub errors: u64,
    /// Terms that passed while it came back; 0 when it disturbed nobody.
    pub terms_after: u64,
    /// Writes acknowledged in this round.
    pub acknowledged: u64,
    /// From the end of the cut until every node answered a linearizable read, milliseconds.
    pub rejoin_ms: u64,
    /// When it was.
    pub times: Times,
}

impl RoundReport for PartitionRound {
    const HEAD: &'static [&'static str] = &[
        "ROUND",
        "CUT OFF",
        "GAP ms",
        "ERRORS",
        "ANSWERED CUT OFF",
        "NEW LEADER",
        "TERM",
        "WRITES",
        "REJOIN ms",
        "TERMS THEN",
        "GAP THEN ms",
    ];

    fn row(&self) -> Vec<String> {
        vec![
            self.round.to_string(),
            self.cut.clone(),
            output::ms(self.gap_us),
            self.errors.to_string(),
            self.answered_cut_off.to_string(),
            self.new_leader.clone(),
            self.term.to_string(),
            output::thousands(self.acknowledged),
            self.rejoin_ms.to_string(),
            self.terms_after.to_string(),
            output::ms(self.heal_gap_us),
        ]
    }

    fn progress(&self) -> String {
        format!(
            "{} cut off, gap {} ms, {} leads in term {}, {} errors elsewhere, {} answers of the cut node, \
             back in {} ms, {} terms then",
            self.cut,
            output::ms(self.gap_us),
            self.new_leader,
            self.term,
            self.errors,
            self.answered_cut_off,
            self.rejoin_ms,
            self.terms_after
        )
    }

    fn gap_us(&self) -> Option<u64> {
        Some(self.gap_us)
    }

    fn problem(&self) -> Option<String> {
        let mut found = Vec::new();
        if self.answered_cut_off > 0 {
            found.push(format!("{} answered {} requests without a majority", self.cut, self.answered_cut_off));
        }
        if self.terms_after > 0 {
            found.push(format!("{} cost {} terms when it came back", self.cut, self.terms_after));
        }
        (!found.is_empty()).then(|| format!("round {}: {}", self.round, found.join("; ")))
    }

    fn times(&self) -> &Times {
        &self.times
    }
}

/// Cuts the leader off, waits until the others serve, heals the cut and waits until all answer.
pub async fn round(
    cluster: &mut LocalCluster,
    relays: &Relays,
    load: &Load,
    round: usize,
    downs: &mut Vec<Down>,
) -> Result<PartitionRound, CliError> {
    let mut times = Times::begun(load.recorder.now_us());
    sleep(STEADY).await;
    let (victim, before) = find_leader(load, None).await?;
    let pid = cluster.pid(victim).ok_or_else(|| CliError::Local(format!("node {victim} is not running")))?;
    let cut_us = load.recorder.now_us();
    relays.cut(victim, pid)?;
    let silent_us = load.recorder.now_us();
    times.fault(cut_us, "cut off");
    let node = u16::try_from(victim).unwrap_or(u16::MAX);
    downs.push(Down { node, from_us: cut_us, to_us: u64::MAX });
    let (new_leader, led) = find_leader(load, Some(before.term)).await?;
    let acknowledged = load.recorder.acknowledged();
    wait_until("no write was acknowledged after the cut", || load.recorder.acknowledged() >= acknowledged + 100)
        .await?;
    sleep(HELD).await;
    let (_, at_heal) = find_leader(load, Some(before.term)).await?;
    let healed_us = load.recorder.now_us();
    relays.heal();
    times.event(healed_us, "healed");
    if let Some(down) = downs.last_mut() {
        down.to_us = healed_us;
    }
    cluster.wait_ready(READY_TIMEOUT).await?;
    check_readable(load).await?;
    let back_us = load.recorder.now_us();
    times.event(back_us, "all answer");
    sleep(STEADY).await;
    let (_, after) = find_leader(load, None).await?;
    times.to_us = load.recorder.now_us();
    let history = load.recorder.history_since(times.from_us);
    let acknowledged_us = history.acknowledged_us();
    let name = |node: usize| cluster.plan().get(node).map(|plan| plan.name.clone()).unwrap_or_default();
    Ok(PartitionRound {
        round,
        cut: name(victim),
        new_leader: name(new_leader),
        term: led.term,
        gap_us: longest_gap_touching(&acknowledged_us, cut_us, healed_us).length_us(),
        heal_gap_us: longest_gap_touching(&acknowledged_us, healed_us, times.to_us).length_us(),
        answered_cut_off: match load.balancer {
            None => answered(&history, node, (silent_us + ON_ITS_WAY_US, healed_us)),
            // Which node answered is known by its own word alone.
            Some(_) => committed(load, victim, (silent_us + ON_ITS_WAY_US, healed_us)),
        },
        errors: survivor_errors(&history, downs).0,
        terms_after: after.term.saturating_sub(at_heal.term),
        acknowledged: acknowledged_us.len() as u64,
        rejoin_ms: (back_us - healed_us) / 1000,
        times,
    })
}

/// Writes that began and succeeded within a time and that a node committed as the leader.
fn committed(load: &Load, node: usize, (from_us, to_us): (u64, u64)) -> u64 {
    let within = |served: &&Served| served.start_us >= from_us && served.end_us <= to_us;
    load.served_by(node, from_us).iter().filter(within).count() as u64
}

/// Requests to a node that began and succeeded within a time.
fn answered(history: &History, node: u16, (from_us, to_us): (u64, u64)) -> u64 {
    let within = |of: u16, start_us: u64, end_us: u64| of == node && start_us >= from_us && end_us <= to_us;
    let writes = history.writes.iter().filter(|write| {
        matches!(write.outcome, WriteOutcome::Acknowledged { .. }) && within(write.node, write.start_us, write.end_us)
    });
    let reads = history.reads.iter().filter(|read| {
        matches!(read.outcome, ReadOutcome::Answered { .. }) && within(read.node, read.start_us, read.end_us)
    });
    (writes.count() + reads.count()) as u64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_line_of_the_kernels_table_is_read() {
        let line =
            "   0: 0100007F:4653 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 123456 1 0";
        assert_eq!(port_and_inode(line), Some((0x4653, 123_456)));
        assert_eq!(port_and_inode("  sl  local_address rem_address   st"), None);
        assert_eq!(socket_inode(Path::new("socket:[77]")), Some(77));
        assert_eq!(socket_inode(Path::new("/dev/null")), None);
    }

    #[tokio::test]
    async fn own_sockets_are_found_and_a_cut_is_silence() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let behind = server.local_addr().unwrap().to_string();
        let relay = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = relay.local_addr().unwrap();
        let state: Arc<Mutex<State>> = Arc::default();
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(Arc::clone(&state), relay, 1, behind));
        let relays = Relays { state, _accepting: accepting };
        let mut near = TcpStream::connect(address).await.unwrap();
        let (mut far, _) = server.accept().await.unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(ports_of(own).unwrap().contains(&near.local_addr().unwrap().port()));

        near.write_all(b"a").await.unwrap();
        assert_eq!(far.read_u8().await.unwrap(), b'a');
        // This process is node 0, which is cut off: its connection to node 1 falls silent, and breaks not.
        relays.cut(0, own).unwrap();
        near.write_all(b"b").await.unwrap();
        let heard = tokio::time::timeout(Duration::from_millis(50), far.read_u8()).await;
        assert!(heard.is_err(), "{heard:?}");
        relays.heal();
        assert_eq!(far.read_u8().await.unwrap(), b'b');
        // Another node's cut is none of this connection's, unless it is the target's.
        relays.cut(2, 1).unwrap_or_default();
        near.write_all(b"c").await.unwrap();
        assert_eq!(far.read_u8().await.unwrap(), b'c');
    }
}
