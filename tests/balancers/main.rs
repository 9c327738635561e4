//! Three server processes behind the real nginx and the real Envoy, with the files of `deploy/`, unchanged but for ports.
//!
//! nginx is found where Debian puts it; Envoy by `STEMEDB_TEST_ENVOY`, on the `PATH`, or where `scripts/test.sh` has
//! fetched it. Clients have no keys and send nothing twice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod access;
mod drills;
mod killed;
mod requests;
mod rolling;
mod support;
mod upgrade;

use stemedb::{cli::balancer::Kind, clock};

use support::Behind;

/// Everything that one cluster behind one balancer can show, one after the other: to start one takes longer than most of it.
async fn everything(kind: Kind) {
    let Some(mut behind) = Behind::start(kind).await else { return };
    let mut since_ms = clock::monotonic_ms();
    let mut done = |what: &str| {
        let now_ms = clock::monotonic_ms();
        println!("{}: {what}: {} ms", kind.name(), now_ms - since_ms);
        since_ms = now_ms;
    };
    access::is_closed(&behind).await;
    done("what is not public is closed");
    requests::are_served(&behind).await;
    done("all kinds of requests are served");
    rolling::costs_no_request(&mut behind).await;
    done("a rolling restart costs no request");
    killed::costs_no_request_and_doubles_none(&mut behind).await;
    done("leaders that die cost no request and double none");
    requests::without_nodes(&mut behind).await;
    behind.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nginx_loses_nothing() {
    everything(Kind::Nginx).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_loses_nothing() {
    everything(Kind::Envoy).await;
}
