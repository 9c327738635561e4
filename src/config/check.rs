//! Rules that bind several keys together.
//!
//! Runs once every key by itself is acceptable, and puts in what follows from other keys.

use super::error::{Origin, Problem};
use super::load::Origins;
use super::value::{is_loopback, split_address};
use super::{Config, PEER_PORT_OFFSET};

/// Checks the whole and completes it; problems go to `problems`.
pub(super) fn together(config: &mut Config, origins: &Origins, problems: &mut Vec<Problem>) {
    let mut reject = |key: &str, what: String, accepted: String| {
        let origin = origins.get(key).cloned().unwrap_or(Origin::Default);
        problems.push(Problem { origin, key: key.to_owned(), what, accepted });
    };
    membership(config, &mut reject);
    addresses(config, &mut reject);
    clocks(config, &mut reject);
}

type Reject<'a> = dyn FnMut(&str, String, String) + 'a;

fn membership(config: &mut Config, reject: &mut Reject<'_>) {
    let names: Vec<&str> = config.cluster.peers.iter().map(|peer| peer.name.as_str()).collect();
    if !names.is_empty() && !names.contains(&config.node.name.as_str()) {
        let what = format!("{} is not among cluster.peers", config.node.name);
        reject("node.name", what, format!("one of {}", names.join(", ")));
    }
    let listed = u32::try_from(names.len().max(1)).unwrap_or(u32::MAX);
    let expected = &mut config.cluster.bootstrap_expect;
    if *expected == 0 {
        *expected = listed;
    } else if *expected != listed {
        let what = format!("{expected} nodes are expected but cluster.peers lists {}", names.len());
        reject("cluster.bootstrap_expect", what, format!("{listed}, or 0 for as many as are listed"));
    }
}

fn addresses(config: &mut Config, reject: &mut Reject<'_>) {
    let highest = u16::MAX - PEER_PORT_OFFSET;
    let http_port = split_address(&config.http.listen).map_or(0, |(_, port)| port);
    if config.cluster.peer_listen.is_none() && http_port > highest {
        let what = format!("port {http_port} leaves no port {PEER_PORT_OFFSET} above it for the other nodes");
        reject("http.listen", what, format!("a port up to {highest}, or cluster.peer_listen set as well"));
    }
    let peer_listen = config.peer_listen();
    if peer_listen == config.http.listen && http_port != 0 {
        let what = format!("{peer_listen} is the address of http.listen");
        reject("cluster.peer_listen", what, "another port".into());
    }
    // Without `peer_listen` the peers' address has the HTTP host, which is judged already.
    let given =
        [("http.listen", Some(&config.http.listen)), ("cluster.peer_listen", config.cluster.peer_listen.as_ref())];
    for (key, address) in given {
        let Some(address) = address.filter(|address| !is_loopback(address)) else { continue };
        if config.http.insecure {
            config.warnings.push(format!(
                "{key} = {address} can be reached from other machines, and nothing is encrypted or authenticated"
            ));
        } else {
            let what =
                format!("{address} can be reached from other machines, and nothing is encrypted or authenticated");
            reject(key, what, "a loopback address, or http.insecure = true".into());
        }
    }
}

fn clocks(config: &Config, reject: &mut Reject<'_>) {
    let cluster = &config.cluster;
    // A follower must hear more than one heartbeat before it doubts the leader.
    if cluster.election_min_ms < cluster.heartbeat_ms.saturating_mul(2) {
        let what = format!("{} is less than twice heartbeat_ms = {}", cluster.election_min_ms, cluster.heartbeat_ms);
        reject("cluster.election_min_ms", what, format!("at least {}", cluster.heartbeat_ms.saturating_mul(2)));
    }
    // Elections are drawn from a range; an empty one makes the nodes collide for ever.
    if cluster.election_max_ms <= cluster.election_min_ms {
        let what = format!("{} is not above election_min_ms = {}", cluster.election_max_ms, cluster.election_min_ms);
        reject("cluster.election_max_ms", what, format!("more than {}", cluster.election_min_ms));
    }
    if cluster.stall_fence_ms <= cluster.stall_handoff_ms {
        let what = format!("{} is not above stall_handoff_ms = {}", cluster.stall_fence_ms, cluster.stall_handoff_ms);
        reject("cluster.stall_fence_ms", what, format!("more than {}", cluster.stall_handoff_ms));
    }
    // 0: it does not drain. Else its door would close before any load balancer has noticed.
    if cluster.stop_deadline_ms != 0 && cluster.stop_deadline_ms <= cluster.drain_notice_ms {
        let what = format!("{} is not above drain_notice_ms = {}", cluster.stop_deadline_ms, cluster.drain_notice_ms);
        reject(
            "cluster.stop_deadline_ms",
            what,
            format!("more than {}, or 0 to stop without a drain", cluster.drain_notice_ms),
        );
    }
    if cluster.request_deadline_ms <= cluster.election_max_ms {
        let what = format!(
            "{} is not above election_max_ms = {}: no request would outlive an election",
            cluster.request_deadline_ms, cluster.election_max_ms
        );
        reject("cluster.request_deadline_ms", what, format!("more than {}", cluster.election_max_ms));
    }
}
