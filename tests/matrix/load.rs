//! The load of a cell: a few clients on all nodes over HTTP, recorded, and judged at the end.

use std::sync::Arc;

use stemedb::cli::drill_load::{Load, client, list_node};
use stemedb::cli::http_client::Endpoint;
use stemedb::judge::{ReadOutcome, WriteOutcome, check};
use tokio::task::JoinSet;

use super::table::Outcome;
use crate::rig::HANG;

/// Two for each node.
const CLIENTS: u32 = 6;

/// Writes before the fault, while it lasts, and after it.
pub const WRITES: u64 = 40;

const VALUE_BYTES: usize = 64;

pub struct Running {
    pub load: Arc<Load>,
    clients: JoinSet<Result<(), String>>,
}

/// Waits until `condition` holds.
pub async fn until(what: &str, condition: impl AsyncFnMut() -> bool) {
    until_or(what, condition).await.unwrap_or_else(|what| panic!("waited in vain: {what}"));
}

/// Waits until `condition` holds, and says for what it waited in vain.
pub async fn until_or(what: &str, mut condition: impl AsyncFnMut() -> bool) -> Result<(), String> {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HANG, wait).await.map_err(|_| what.to_owned())
}

impl Running {
    pub fn start(addresses: &[String], seed: u64) -> Self {
        let endpoints = addresses.iter().map(|address| Endpoint::parse(address).unwrap()).collect();
        let load = Load::new(endpoints, VALUE_BYTES, seed);
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            clients.spawn(client(Arc::clone(&load), number));
        }
        Self { load, clients }
    }

    /// Waits for further acknowledged writes.
    pub async fn more(&self) {
        let before = self.load.recorder.acknowledged();
        until("writes are acknowledged", async || self.load.recorder.acknowledged() >= before + WRITES).await;
    }

    /// Ends the load, lists the nodes that are up, and judges.
    pub async fn judge(mut self, up: &[usize], seen: Result<String, String>) -> Outcome {
        self.load.stop();
        while let Some(client) = self.clients.join_next().await {
            client.unwrap().unwrap();
        }
        let under_load = self.load.recorder.history();
        let mut listings = Vec::new();
        for node in up {
            listings.push(list_node(&self.load, *node).await.unwrap());
        }
        let verdict = check(&under_load, &listings);
        let failed_write = |outcome| !matches!(outcome, WriteOutcome::Acknowledged { .. });
        // Of a node that was down the client hears that it is not there, and goes elsewhere: status 0.
        let writes = under_load.writes.iter().filter(|w| {
            failed_write(w.outcome)
                && !matches!(w.outcome, WriteOutcome::Refused { status: 0 } | WriteOutcome::Unknown { status: 0 })
        });
        let reads =
            under_load.reads.iter().filter(|r| matches!(r.outcome, ReadOutcome::Failed { status } if status > 0));
        let errors = (writes.count() + reads.count()) as u64;
        let unsafe_ = (!verdict.is_clean()).then(|| verdict.to_string());
        let (seen, missed) = match seen {
            Ok(seen) => (seen, None),
            Err(wrong) => (wrong.clone(), Some(wrong)),
        };
        Outcome { seen, acknowledged: verdict.acknowledged, reads: verdict.reads, errors, wrong: unsafe_.or(missed) }
    }
}
