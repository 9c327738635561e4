//! The table of messages between nodes.
//!
//! A number never changes its meaning. Below `stemedb_net::PROBE_KINDS` a message needs no identity
//! on either side; all others are taken only from members of the same cluster.

use stemedb_net::Lane;

/// One kind of message. The number is what travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// Where do you stand? `()` → `ProbeAnswer`.
    Probe = 1,
    /// Take this place in the cluster that is being formed. `Assignment` → `()`.
    Assign = 2,
    /// May I rebuild? `rebuild::messages::Ask` → `AskReply`. An emptied node has no identity.
    RebuildAsk = 3,
    /// Where do I stand? `members::standing::StandingAsk` → `Standing`. A removed node has an id that nobody knows.
    Standing = 4,
    /// Could you become a member, and how far are you? `()` → `members::Candidate`.
    Candidate = 5,
    /// Ask where you stand: it has changed. `()` → `()`.
    LookAgain = 6,
    /// What is your program, and what does it know? Nothing → `level::About`, in JSON.
    About = 7,
    /// Raft: `AppendEntriesRequest` → `AppendEntriesResponse`; heartbeats are the same without entries.
    Append = 16,
    /// Raft: `VoteRequest` → `VoteResponse`.
    Vote = 17,
    /// Raft: as `Vote`, without any promise.
    PreVote = 18,
    /// Raft: `TransferLeaderRequest` → `TransferLeaderResponse`.
    TransferLeader = 19,
    /// Commands for the leader: `ForwardRequest` → `ForwardReply`.
    Forward = 32,
    /// The log index that a read must see: `()` → `ReadIndexReply`.
    ReadIndex = 33,
    /// What a node knows about itself: `()` → `StatusReply`.
    Status = 34,
    /// Commands for the leader that the sender does not reach, to be passed on to it: as `Forward`.
    Relay = 36,
    /// Which leader speaks to you? `()` → `way::WayReply`, in JSON.
    Way = 37,
    /// What do you know of these log entries? `EntryQuestions` → `EntryAnswers`. Answered before the own log is whole.
    Entries = 40,
    /// Where does your log end? Behind the appends on the same connection. `()` → `LogEndReply`.
    LogEnd = 35,
    /// Opens a checkpoint: `CheckpointOpen` → `CheckpointAccepted`.
    CheckpointOpen = 48,
    /// A piece of it: `CheckpointChunk` → `()`.
    CheckpointChunk = 49,
    /// All pieces were sent; install it: `CheckpointInstall` → `SnapshotResponse`.
    CheckpointInstall = 50,
    /// What could you send to a node that rebuilds? `OfferRequest` → `Offer`.
    CheckpointOffer = 51,
    /// A piece of it: `FetchRequest` → `Piece`.
    CheckpointFetch = 52,
    /// A step of a rebuild that the leader takes: `StepRequest` → `StepReply`.
    RebuildStep = 53,
}

/// Every kind with its lane.
pub const KINDS: [(Kind, Lane); 24] = [
    (Kind::Probe, Lane::Control),
    (Kind::Assign, Lane::Control),
    (Kind::RebuildAsk, Lane::Control),
    (Kind::Standing, Lane::Control),
    (Kind::Candidate, Lane::Control),
    (Kind::LookAgain, Lane::Control),
    (Kind::About, Lane::Control),
    // Heartbeats on `Control`, entries on `Log`.
    (Kind::Append, Lane::Log),
    (Kind::Vote, Lane::Control),
    (Kind::PreVote, Lane::Control),
    (Kind::TransferLeader, Lane::Control),
    (Kind::Forward, Lane::Log),
    (Kind::ReadIndex, Lane::Control),
    (Kind::Status, Lane::Control),
    (Kind::Relay, Lane::Log),
    (Kind::Way, Lane::Control),
    // On `Bulk`, because copies of entries may be large.
    (Kind::Entries, Lane::Bulk),
    (Kind::LogEnd, Lane::Log),
    (Kind::CheckpointOpen, Lane::Bulk),
    (Kind::CheckpointChunk, Lane::Bulk),
    (Kind::CheckpointInstall, Lane::Bulk),
    (Kind::CheckpointOffer, Lane::Bulk),
    (Kind::CheckpointFetch, Lane::Bulk),
    (Kind::RebuildStep, Lane::Control),
];

impl Kind {
    /// The number that travels.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The kind of a number; `None` for one that this version does not know.
    pub fn of(number: u16) -> Option<Kind> {
        KINDS.iter().map(|(kind, _)| *kind).find(|kind| kind.number() == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_frozen_unique_and_probes_are_below_the_bound() {
        let numbers: Vec<u16> = KINDS.iter().map(|(kind, _)| kind.number()).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 32, 33, 34, 36, 37, 40, 35, 48, 49, 50, 51, 52, 53]);
        for (kind, _) in KINDS {
            assert_eq!(Kind::of(kind.number()), Some(kind));
            use Kind::{About, Assign, Candidate, LookAgain, Probe, RebuildAsk, Standing};
            let probe = matches!(kind, Probe | Assign | RebuildAsk | Standing | Candidate | LookAgain | About);
            assert_eq!(probe, kind.number() < stemedb_net::PROBE_KINDS);
        }
        assert_eq!(Kind::of(0), None);
        assert_eq!(Kind::of(999), None);
    }
}
