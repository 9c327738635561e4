//! Every node in turn is drained, stopped, started and put back, while plain clients go on.

use std::time::Duration;

use stemedb::judge::summarize_gaps;

use super::support::{Behind, Clients, HANG};

/// Clients, requests and passes: those of a test in passing, and with `STEMEDB_TEST_FULL=1`.
const FEW: (u32, u64, usize) = (16, 1_000, 1);
const FULL: (u32, u64, usize) = (64, 50_000, 5);

pub async fn costs_no_request(behind: &mut Behind) {
    let (clients, requests, passes) = if super::support::is_full() { FULL } else { FEW };
    println!(
        "rolling restarts: {passes} of {requests} requests of {clients} clients ({FULL:?} with STEMEDB_TEST_FULL=1)"
    );
    for _ in 0..passes {
        one_pass(behind, clients, requests).await;
    }
}

async fn one_pass(behind: &mut Behind, clients: u32, requests: u64) {
    let clients = Clients::start(behind, clients);
    clients.have_done(behind, 200).await;
    // The leader first, and whoever leads then next: leadership moves each time.
    let mut waiting = vec![0, 1, 2];
    let mut transfers = 0;
    while !waiting.is_empty() {
        let leader = behind.leader().await;
        let place = waiting.iter().position(|node| *node == leader).unwrap_or(0);
        let node = waiting.remove(place);
        let job = behind.order("drain", node).await;
        transfers += usize::from(job.to.is_some());
        behind.processes.stop(node).await.unwrap();
        behind.processes.start(node).unwrap();
        behind.processes.wait_ready(HANG).await.unwrap();
        behind.order("undrain", node).await;
        clients.have_done(behind, 100).await;
    }
    assert!(transfers >= 2, "leadership moved {transfers} times");
    while clients.operations() < requests {
        clients.have_done(behind, 1).await;
    }
    let history = clients.finish(behind).await;
    let gaps = summarize_gaps(&history.acknowledged_us());
    let longest = Duration::from_micros(gaps.longest_us);
    println!(
        "{}: {} writes, {} reads, {transfers} transfers, none failed; longest gap {longest:?}",
        behind.balancer.kind().name(),
        history.writes.len(),
        history.reads.len()
    );
}
