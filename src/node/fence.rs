//! Closes a process whose disk hangs for good.
//!
//! Such a process cannot exit: the kernel waits for the thread that is stuck, and until then the listening sockets would
//! go on accepting connections that nobody answers. So the doors are closed one after the other: first the listener for
//! clients, then, once what they had asked is answered through other nodes, their connections, then the peer port. The
//! listeners are shut by the watchdog's thread itself, so that a runtime that hangs as well cannot keep them open.
//! Nothing here waits for the thread that is stuck.

use std::{
    io,
    net::{Shutdown, TcpStream},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

/// How long requests under way may take to be answered through others, once the listener is closed.
pub const ANSWER_MAX: Duration = Duration::from_secs(3);

/// Whose connections a listener takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// HTTP.
    Clients,
    /// The peer port.
    Peers,
}

/// Holds a listener where the fence can find it; dropped with it.
#[must_use = "the fence forgets the listener when this is dropped"]
pub struct Door {
    _listener: Arc<OwnedFd>,
}

/// The doors of a process. Closed once and for all.
#[derive(Debug, Default)]
pub struct Fence {
    doors: Mutex<Vec<(Side, Weak<OwnedFd>)>>,
    /// When it was closed; 0: never.
    closed_at_ms: AtomicU64,
    closed: CancellationToken,
    clients_gone: CancellationToken,
    peers: CancellationToken,
    over: CancellationToken,
}

impl Fence {
    /// Makes a listener known. The answer must be dropped together with it, for it keeps the socket open.
    pub fn door(&self, side: Side, listener: &impl AsFd) -> io::Result<Door> {
        let listener = Arc::new(listener.as_fd().try_clone_to_owned()?);
        let mut doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        doors.retain(|(_, door)| door.strong_count() > 0);
        doors.push((side, Arc::downgrade(&listener)));
        Ok(Door { _listener: listener })
    }

    /// Closes the door for clients and tells everybody. On the watchdog's thread; `now_ms` is of its clock.
    pub fn close(&self, now_ms: u64) {
        self.shut(Side::Clients);
        self.closed_at_ms.store(now_ms, Ordering::Relaxed);
        self.closed.cancel();
    }

    /// Shuts the peer port too once its time has come, whatever the runtime does. On the watchdog's thread.
    pub fn keep_closed(&self, now_ms: u64) {
        /// After the runtime has had its time.
        const PATIENCE_MS: u64 = 2 * 3_000;
        let closed_at_ms = self.closed_at_ms.load(Ordering::Relaxed);
        if closed_at_ms > 0 && now_ms.saturating_sub(closed_at_ms) >= PATIENCE_MS {
            self.shut(Side::Peers);
            self.peers.cancel();
        }
    }

    /// What the doors were closed for has ended.
    pub fn is_over(&self) {
        self.over.cancel();
    }

    /// Cancelled when clients must not be taken any more.
    pub fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Cancelled when the process can end.
    pub fn over(&self) -> &CancellationToken {
        &self.over
    }

    /// Cancelled when peers must not be taken any more.
    pub fn peers(&self) -> &CancellationToken {
        &self.peers
    }

    /// The last connection of a client is closed.
    pub fn clients_are_gone(&self) {
        self.clients_gone.cancel();
    }

    /// Closes the peer port after the clients, or after their time. Runs until the process ends when nothing hangs.
    pub async fn run(&self) {
        self.closed.cancelled().await;
        tracing::error!("the disk hangs for too long: this process closes its listeners and connections");
        if tokio::time::timeout(ANSWER_MAX, self.clients_gone.cancelled()).await.is_err() {
            tracing::warn!("some clients were not answered in time, or nobody serves clients here");
        }
        self.shut(Side::Peers);
        self.peers.cancel();
        tracing::error!("closed; the process ends as soon as the disk lets it");
    }

    fn shut(&self, side: Side) {
        let doors: Vec<Arc<OwnedFd>> = {
            let doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
            doors.iter().filter(|(of, _)| *of == side).filter_map(|(_, door)| door.upgrade()).collect()
        };
        for door in doors {
            // A listener that is shut refuses connections, whoever else holds it open. The type only lends the call.
            // An error says that it was shut before.
            let _shut = door.try_clone().and_then(|fd| TcpStream::from(fd).shutdown(Shutdown::Both));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_shut_listener_refuses_although_it_is_held_open_and_the_peer_port_comes_later() {
        let (clients, peers) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let (to_clients, to_peers) = (clients.local_addr().unwrap(), peers.local_addr().unwrap());
        let fence = Fence::default();
        let _clients_door = fence.door(Side::Clients, &clients).unwrap();
        let _peers_door = fence.door(Side::Peers, &peers).unwrap();
        fence.keep_closed(99_000);
        assert!(TcpStream::connect(to_clients).is_ok() && TcpStream::connect(to_peers).is_ok());
        fence.close(1_000);
        assert!(fence.closed().is_cancelled());
        assert_eq!(TcpStream::connect(to_clients).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        fence.keep_closed(1_000);
        assert!(TcpStream::connect(to_peers).is_ok());
        fence.keep_closed(7_000);
        assert!(TcpStream::connect(to_peers).is_err() && fence.peers().is_cancelled());
    }

    #[test]
    fn a_door_does_not_outlive_its_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let fence = Fence::default();
        let door = fence.door(Side::Clients, &listener).unwrap();
        drop(listener);
        drop(door);
        assert!(TcpStream::connect(addr).is_err());
    }
}
