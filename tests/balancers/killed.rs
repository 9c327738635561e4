//! The leader dies without a word, once at any moment and then between the commit of a write and its answer. Clients have
//! no keys and send nothing twice: the balancer does, under its own id.

use std::os::unix::process::ExitStatusExt;

use rustix::process::Signal;
use stemedb::{
    fail_points,
    judge::{History, WriteAttempt, WriteOutcome},
};

use super::support::{Behind, Clients, HANG};

/// Clients, and leaders killed at any moment: those of a test in passing, and with `STEMEDB_TEST_FULL=1`.
const FEW: (u32, usize) = (16, 1);
const FULL: (u32, usize) = (64, 20);

/// Writes whose first answer was lost with a node, and that another one knew.
fn replayed(history: &History) -> usize {
    let known = |w: &&WriteAttempt| matches!(w.outcome, WriteOutcome::Acknowledged { replayed: true, .. });
    history.writes.iter().filter(known).count()
}

pub async fn costs_no_request_and_doubles_none(behind: &mut Behind) {
    let (clients, kills) = if super::support::is_full() { FULL } else { FEW };
    println!("leaders that die: {kills}, {clients} clients ({FULL:?} with STEMEDB_TEST_FULL=1)");
    let clients = Clients::start(behind, clients);
    clients.have_done(behind, 200).await;
    for _ in 0..kills {
        let leader = behind.leader().await;
        behind.processes.kill(leader).await.unwrap();
        clients.have_done(behind, 200).await;
        behind.processes.start(leader).unwrap();
        behind.processes.wait_ready(HANG).await.unwrap();
    }
    for point in fail_points::ANSWERS {
        clients.have_done(behind, 100).await;
        let leader = behind.leader().await;
        behind.arm(leader, point);
        let ended = tokio::time::timeout(HANG, behind.processes.child_ended()).await;
        let ended = ended.unwrap_or_else(|_| panic!("{point}: it goes on\n{}", behind.node_log(leader))).unwrap();
        assert_eq!((ended.node, ended.status.signal()), (leader, Some(Signal::ABORT.as_raw())), "{point}");
        clients.have_done(behind, 200).await;
        behind.disarm(leader);
        behind.processes.start(leader).unwrap();
        behind.processes.wait_ready(HANG).await.unwrap();
    }
    clients.have_done(behind, 100).await;
    let history = clients.finish(behind).await;
    // It cannot pass by doing nothing: a write that was committed and not answered was sent a second time.
    let replayed = replayed(&history);
    assert!(replayed > 0, "no write was sent twice");
    println!(
        "{}: {} writes, none failed, none twice; {replayed} sent twice",
        behind.balancer.kind().name(),
        history.writes.len()
    );
}
