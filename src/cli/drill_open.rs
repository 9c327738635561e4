//! An open load: so many operations a second, whatever the answers take.
//!
//! A closed loop hides a gap: its clients stop asking while nothing answers. Here arrivals go on, so
//! that what waits during a gap has to be worked off after it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::drill_load::{Load, OneClient};

/// Clients at most, each with one request. Each may be connected to every node, which takes 1,024 connections.
const CLIENTS_MAX: u32 = 900;

/// How often arrivals are let go; those of one tick go together.
const TICK: Duration = Duration::from_millis(1);

/// What was offered.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Offered {
    /// Operations per second.
    pub per_s: f64,
    /// Operations begun.
    pub sent: u64,
    /// Arrivals that found all clients busy and were dropped: then it was no open load any more.
    pub not_sent: u64,
    /// Clients that were busy at once at most.
    pub clients: u32,
}

/// Offers operations until `Load::stop`, and returns when the last one has ended.
pub async fn offer(load: Arc<Load>, per_s: f64) -> Result<Offered, String> {
    let nodes = load.endpoints.len().max(1);
    let idle: Arc<Vec<Mutex<Vec<OneClient>>>> = Arc::new((0..nodes).map(|_| Mutex::new(Vec::new())).collect());
    let mut made = vec![0_u32; nodes];
    let mut running: JoinSet<Result<(), String>> = JoinSet::new();
    let mut offered = Offered { per_s, ..Offered::default() };
    let began = Instant::now();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !load.is_stopped() {
        ticks.tick().await;
        let due = (began.elapsed().as_secs_f64() * per_s) as u64;
        while offered.sent + offered.not_sent < due {
            let node = usize::try_from(offered.sent + offered.not_sent).unwrap_or(0) % nodes;
            let client = idle.get(node).and_then(|idle| locked(idle).pop());
            let client = match (client, made.get_mut(node)) {
                (Some(client), _) => client,
                (None, Some(made)) if offered.clients < CLIENTS_MAX => {
                    let number = u32::try_from(node + usize::try_from(*made).unwrap_or(0) * nodes).unwrap_or(0);
                    *made += 1;
                    offered.clients += 1;
                    OneClient::new(&load, number)
                }
                _ => {
                    offered.not_sent += 1;
                    continue;
                }
            };
            offered.sent += 1;
            running.spawn(one(Arc::clone(&load), Arc::clone(&idle), node, client));
        }
        while let Some(ended) = running.try_join_next() {
            ended.map_err(|error| error.to_string())??;
        }
    }
    while let Some(ended) = running.join_next().await {
        ended.map_err(|error| error.to_string())??;
    }
    Ok(offered)
}

async fn one(
    load: Arc<Load>,
    idle: Arc<Vec<Mutex<Vec<OneClient>>>>,
    node: usize,
    mut client: OneClient,
) -> Result<(), String> {
    client.operation(&load).await?;
    if let Some(idle) = idle.get(node) {
        locked(idle).push(client);
    }
    Ok(())
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
