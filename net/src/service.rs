//! What a listener's owner implements: who may speak, and what requests do.

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::{PeerHello, Refusal};

/// The receiving side of all connections of a [`crate::Listener`].
pub trait Service: Send + Sync + 'static {
    /// Called once for a connection, after its first request was admitted; once more if the sender's identity changes
    /// on it (an empty node has joined) or a handler panicked. Must not block.
    fn connected(&self, peer: PeerHello) -> Box<dyn ConnectionHandler>;

    /// May a request of this kind be handled? Asked for every request, after its header and before its body was read.
    /// [`crate::identity::judge`] has the rules for identities. Must not block.
    fn admit(&self, hello: &PeerHello, kind: u16) -> Result<(), Refusal>;
}

/// Takes the requests of one connection.
pub trait ConnectionHandler: Send {
    /// Called in order of arrival and must not block. The future runs side by side with those of later requests, on
    /// the connection's task, up to [`crate::Limits::in_flight_frames_max`] of them; heavy work belongs on other
    /// tasks. It must end some day, and it is dropped when the connection is lost: work that has to be finished is
    /// spawned by the handler. A panic, here or in the future, is answered with [`crate::code::PANICKED`].
    fn on_request(&mut self, kind: u16, body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>>;
}
