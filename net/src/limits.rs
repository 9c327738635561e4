//! How much of everything. Each default stands beside its reason.

use std::time::Duration;

/// What a connection is for. Each lane has its own connection, so that bulk never delays a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Heartbeats, votes, probes: small and urgent.
    Control,
    /// Log entries, forwarded commands, read indexes.
    Log,
    /// Checkpoints.
    Bulk,
}

/// A full segment of the log (64 MiB) with room for the envelope around it.
const FRAME_BYTES_MAX: usize = 72 << 20;
/// Votes, heartbeats and probes are far below a kilobyte; a membership with long names stays below this.
const CONTROL_BYTES_MAX: usize = 1 << 20;
/// Several times the requests that the layer above keeps waiting for one node; beyond it, refusing beats queueing.
const QUEUE_FRAMES_MAX: usize = 4096;
/// One frame of the largest size and the small ones behind it.
const QUEUE_BYTES_MAX: usize = 80 << 20;
/// More than a pipelined log needs (510 appends were seen at once); each costs one small future at the target.
const IN_FLIGHT_FRAMES_MAX: usize = 1024;
/// As [`QUEUE_BYTES_MAX`], on the receiving side.
const IN_FLIGHT_BYTES_MAX: usize = 80 << 20;
/// Three lanes from each of a handful of nodes, with room for reconnects that overlap the old connection.
const CONNECTIONS_MAX: usize = 256;

/// Bounds of connections and of what waits for them. `Default` gives the values for production.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest body on the lanes `Log` and `Bulk`, bytes.
    pub frame_bytes_max: usize,
    /// Largest body on the lane `Control` and of every probe, bytes.
    pub control_bytes_max: usize,
    /// Requests waiting in one [`crate::Peer`] that are not on the wire yet.
    pub queue_frames_max: usize,
    /// Bytes of their bodies. A single larger body is taken when nothing else waits.
    pub queue_bytes_max: usize,
    /// Requests sent and not answered, on one connection; both sides hold to it. A peer that reaches it queues, a
    /// listener stops reading.
    pub in_flight_frames_max: usize,
    /// Bytes of request bodies being handled for one connection before the listener stops reading it.
    pub in_flight_bytes_max: usize,
    /// How long a connection may take to be set up, name resolution included.
    pub connect_timeout: Duration,
    /// First wait after a failed connection. Waits double and are shortened at random by up to a half.
    pub backoff_min: Duration,
    /// Longest wait.
    pub backoff_max: Duration,
    /// A peer that received nothing for this long asks for a sign of life; a listener that cannot read gives one.
    pub alive_interval: Duration,
    /// A peer that asked and saw no byte move for this long drops the connection: the host is gone or cut off.
    pub silence_max: Duration,
    /// Connections that a listener holds; more are answered "busy" and closed.
    pub connections_max: usize,
    /// Time for the first complete frame after accepting.
    pub handshake_timeout: Duration,
    /// Time for a begun frame to arrive, plus one second per 256 KiB of body.
    pub frame_timeout: Duration,
    /// A listener closes a connection on which nothing moved for this long.
    pub idle_timeout: Duration,
    /// A listener closes a connection whose other side takes no answers for this long.
    pub write_timeout: Duration,
    /// How long a listener that shuts down waits for requests that are being handled.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            frame_bytes_max: FRAME_BYTES_MAX,
            control_bytes_max: CONTROL_BYTES_MAX,
            queue_frames_max: QUEUE_FRAMES_MAX,
            queue_bytes_max: QUEUE_BYTES_MAX,
            in_flight_frames_max: IN_FLIGHT_FRAMES_MAX,
            in_flight_bytes_max: IN_FLIGHT_BYTES_MAX,
            connect_timeout: Duration::from_secs(1),
            backoff_min: Duration::from_millis(10),
            // Below an election timeout: a node that came back is reached before the next election.
            backoff_max: Duration::from_millis(200),
            alive_interval: Duration::from_secs(1),
            silence_max: Duration::from_secs(4),
            connections_max: CONNECTIONS_MAX,
            handshake_timeout: Duration::from_secs(10),
            frame_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// Largest body of a frame on this lane, bytes.
    pub fn body_bytes_max(&self, lane: Lane) -> usize {
        let configured = match lane {
            Lane::Control => self.control_bytes_max,
            Lane::Log | Lane::Bulk => self.frame_bytes_max,
        };
        configured.min(u32::MAX as usize)
    }

    /// Largest body of a request of this kind on this lane, bytes: probes come from strangers and stay small.
    pub fn request_bytes_max(&self, lane: Lane, kind: u16) -> usize {
        let lane_max = self.body_bytes_max(lane);
        if kind < crate::PROBE_KINDS { lane_max.min(self.control_bytes_max) } else { lane_max }
    }
}
