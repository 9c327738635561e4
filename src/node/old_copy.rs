//! A node that runs on an old copy of its folder finds out from the others, who refuse everything it says.
//!
//! They keep its votes and acknowledgements from counting whatever it does; here it only hears of it, so that it ends
//! with the reason instead of waiting for ever. Asked for until the node has caught up: an old copy never does.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use stemedb_net::{CallError, Lane, code};

use super::{core::Shared, kinds::Kind};

/// How often the others are asked. Nothing waits for it.
const ASK_INTERVAL: Duration = Duration::from_millis(500);

/// How long one of them may take.
const REPLY_MAX: Duration = Duration::from_secs(2);

/// Ends the node if another one knows a newer run of it. Runs until the node has caught up.
pub async fn watch(shared: Arc<Shared>) {
    let mut caught_up = shared.caught_up.subscribe();
    let asking = async {
        loop {
            if let Some(why) = ask(&shared).await {
                shared.vital.end(why);
                return;
            }
            tokio::time::sleep(ASK_INTERVAL).await;
        }
    };
    tokio::select! {
        () = shared.core_stop.cancelled() => {}
        _ = caught_up.wait_for(|caught_up| *caught_up) => {}
        () = asking => {}
    }
}

/// What a member says that will not hear this node.
async fn ask(shared: &Shared) -> Option<String> {
    let membership = Arc::clone(&shared.view.borrow().membership);
    let own_id = shared.local.load().node_id;
    let others = membership.nodes().filter(|(id, _)| **id != own_id);
    let asked = others.map(|(id, member)| async move {
        let peer = shared.peers.to(*id, &member.peer_addr, Lane::Control);
        match peer.call(Kind::Status.number(), Vec::new().into(), REPLY_MAX).await {
            Err(CallError::Refused { code: code::STALE_BOOT, message }) => {
                Some(format!("{} refuses this node: {message}", member.name))
            }
            _ => None,
        }
    });
    join_all(asked).await.into_iter().flatten().next()
}
