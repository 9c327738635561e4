//! Bytes between the nodes of a cluster.
//!
//! A [`Peer`] is one outgoing connection to one node on one [`Lane`]; a [`Listener`] takes such connections and hands
//! every request to a [`Service`]. Requests reach the other side in the order in which they were sent, answers return
//! as they finish, and a failed call says exactly how much is known: never on the wire, or perhaps handled.
//! Nothing here knows Raft, assertions or disks; bodies are opaque bytes and a `kind` number tells the service what
//! they are. Encryption is not part of this crate yet.
//!
//! The way of one call, and who holds it meanwhile:
//!
//! ```text
//!  Peer::send -> queue (bounded) -> link: one task, drains the queue into one write
//!                                     |  TCP, frames of wire.rs
//!               connection: one task <+  judges the header, then reads the body
//!                  |  ConnectionHandler::on_request, in order of arrival
//!                  v  futures run side by side, answers are written together
//!  PendingReply <- link <- reply or refusal, matched by request id
//! ```
//!
//! Every frame names cluster, sender, target and the sender's boot count ([`identity`]), is covered by two checksums
//! and opens with a format version ([`wire`]).

#![deny(unsafe_code)]

mod connection;
mod error;
pub mod identity;
mod inbound;
mod limits;
mod link;
mod listener;
mod outbound;
mod peer;
mod queue;
mod service;
#[cfg(test)]
mod testing;
pub mod wire;

pub use error::{CallError, Refusal, code};
pub use identity::{ClusterId, LocalIdentity, LocalProvider, PROBE_KINDS, PeerHello, boot_of, is_guest, is_old_copy};
pub use limits::{Lane, Limits};
pub use listener::Listener;
pub use peer::{Peer, PendingReply, ReplyCheck};
pub use service::{ConnectionHandler, Service};
