//! What a leader takes from clients, from the room that it and the other voters have. Pure.
//!
//! An entry that is proposed must be taken by a majority, and replicas fill together: so a leader refuses not only
//! when its own disk is full, but also unless a majority has room. A voter that cannot be reached takes no entries
//! at all; it counts neither as full nor as having room, so that an outage is never called a full disk. When only
//! the leader lacks room, leadership moves instead, and clients notice nothing.

use super::{
    messages::ProposeAnswer,
    space::{Level, RoomReport, Shortage},
};
use crate::state::command::Operation;

/// What a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Room as any write of a client.
    Client,
    /// No more than the reserve: it takes something back, or the cluster needs it.
    Reserve,
}

impl Need {
    /// The need of an operation.
    pub fn of(op: &Operation) -> Need {
        match op {
            Operation::Supersede(supersession) if supersession.new.is_none() => Need::Reserve,
            Operation::Rebuild(_) | Operation::Members(_) | Operation::Level(_) => Need::Reserve,
            Operation::Assert(_)
            | Operation::Vote(_)
            | Operation::Epoch(_)
            | Operation::Supersede(_)
            | Operation::ImportChunk { .. } => Need::Client,
        }
    }

    fn is_met_by(self, level: Level) -> bool {
        match self {
            Need::Client => level == Level::Room,
            Need::Reserve => level <= Level::Low,
        }
    }
}

/// What is known of another voter's room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Voter {
    /// Nothing yet: this node leads for moments only.
    NotAsked,
    /// It does not answer.
    Silent,
    /// Its own word, not long ago.
    Said(RoomReport),
}

/// What happens to a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gate {
    /// It is proposed.
    #[default]
    Open,
    /// It is sent back to be tried again: leadership is on its way to a node with room.
    Retry,
    /// It is refused.
    Shut,
}

/// What is taken now. The default takes everything: who does not lead refuses for that reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// Writes of clients.
    pub clients: Gate,
    /// What needs the reserve only.
    pub reserve: Gate,
    /// What the voters lack that lack something.
    pub shortages: Vec<Shortage>,
}

impl Admission {
    /// The answer to a command that may not be proposed now.
    pub fn refusal(&self, need: Need) -> Option<ProposeAnswer> {
        let gate = match need {
            Need::Client => self.clients,
            Need::Reserve => self.reserve,
        };
        match gate {
            Gate::Open => None,
            Gate::Retry => Some(ProposeAnswer::NotLeader),
            Gate::Shut => Some(ProposeAnswer::Full(self.shortages.clone())),
        }
    }

    /// What a leader with this room takes. `others`: every other voter. `moving`: leadership is on its way.
    pub fn decide(own: &RoomReport, others: &[Voter], moving: bool) -> Admission {
        let said = others.iter().filter_map(|voter| match voter {
            Voter::Said(report) => Some(report),
            Voter::NotAsked | Voter::Silent => None,
        });
        Admission {
            clients: gate(Need::Client, own, others, moving),
            reserve: gate(Need::Reserve, own, others, moving),
            shortages: std::iter::once(own).chain(said).filter_map(|report| report.shortage.clone()).collect(),
        }
    }
}

fn gate(need: Need, own: &RoomReport, others: &[Voter], moving: bool) -> Gate {
    if !need.is_met_by(own.level) {
        return match (moving, own.level) {
            // What comes in the few milliseconds of a move fits between low water and the reserve.
            (true, Level::Room | Level::Low) => Gate::Open,
            (true, Level::Reserved) => Gate::Retry,
            (false, _) => Gate::Shut,
        };
    }
    let mut met = 1;
    let mut lacking = 0;
    for voter in others {
        match voter {
            Voter::NotAsked => met += 1,
            Voter::Silent => {}
            Voter::Said(report) if need.is_met_by(report.level) => met += 1,
            Voter::Said(_) => lacking += 1,
        }
    }
    if met < majority(others) && lacking > 0 { Gate::Shut } else { Gate::Open }
}

/// Whether leadership should go to another voter: this node lacks room, and without it a majority has some.
pub fn wants_to_move(own: &RoomReport, others: &[Voter]) -> bool {
    let with_room =
        others.iter().filter(|voter| matches!(voter, Voter::Said(report) if report.level == Level::Room)).count();
    own.level != Level::Room && with_room >= majority(others)
}

/// Of this node and `others`.
fn majority(others: &[Voter]) -> usize {
    others.len().div_ceil(2) + 1
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]
    use super::*;
    use crate::model::NewSupersession;
    use Gate::{Open, Retry, Shut};
    use Level::{Low, Reserved, Room};

    fn report(node: &str, level: Level) -> RoomReport {
        let shortage = (level != Room).then(|| Shortage {
            node: node.into(),
            data_dir: "/data".into(),
            bytes_free: 1,
            bytes_wanted: 2,
            inodes_free: None,
            inodes_wanted: 0,
            blocked: None,
        });
        RoomReport { level, shortage }
    }

    fn said(level: Level) -> Voter {
        Voter::Said(report("other", level))
    }

    fn gates(own: Level, others: &[Voter], moving: bool) -> (Gate, Gate) {
        let admission = Admission::decide(&report("own", own), others, moving);
        (admission.clients, admission.reserve)
    }

    #[test]
    fn a_majority_of_each_number_of_voters() {
        for (voters, expected) in [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)] {
            assert_eq!(majority(&vec![Voter::Silent; voters - 1]), expected, "{voters} voters");
        }
    }

    #[test]
    fn a_leader_takes_writes_while_it_and_a_majority_have_room() {
        use Voter::{NotAsked, Silent};
        for (own, others, expected) in [
            (Room, vec![], (Open, Open)),
            (Low, vec![], (Shut, Open)),
            (Reserved, vec![], (Shut, Shut)),
            (Room, vec![said(Room), said(Room)], (Open, Open)),
            (Room, vec![said(Room), said(Reserved)], (Open, Open)),
            (Room, vec![said(Low), said(Low)], (Shut, Open)),
            (Room, vec![said(Low), said(Reserved)], (Shut, Open)),
            (Room, vec![said(Reserved), said(Reserved)], (Shut, Shut)),
            (Low, vec![said(Low), said(Low)], (Shut, Open)),
            // Nobody can be reached: that is no full disk, and it is answered otherwise.
            (Room, vec![Silent, Silent], (Open, Open)),
            // The one that can be reached would have to take everything.
            (Room, vec![said(Low), Silent], (Shut, Open)),
            (Room, vec![said(Room), Silent], (Open, Open)),
            // A leader of this moment has asked nobody; its reserve bears what comes until they answer.
            (Room, vec![NotAsked, NotAsked], (Open, Open)),
        ] {
            assert_eq!(gates(own, &others, false), expected, "{own:?} {others:?}");
        }
    }

    #[test]
    fn while_leadership_moves_nothing_is_refused() {
        let others = [said(Room), said(Room)];
        assert_eq!(gates(Low, &others, true), (Open, Open));
        assert_eq!(gates(Reserved, &others, true), (Retry, Retry));
        let admission = Admission::decide(&report("own", Reserved), &others, true);
        assert_eq!(admission.refusal(Need::Client), Some(ProposeAnswer::NotLeader));
    }

    #[test]
    fn leadership_moves_only_where_it_helps() {
        for (own, others, expected) in [
            (Room, vec![said(Room), said(Room)], false),
            (Low, vec![said(Room), said(Room)], true),
            (Reserved, vec![said(Room), said(Room)], true),
            (Low, vec![said(Room), said(Low)], false),
            (Low, vec![said(Room), Voter::Silent], false),
            (Low, vec![Voter::NotAsked, Voter::NotAsked], false),
            (Low, vec![said(Room)], false),
            (Low, vec![], false),
            (Low, vec![said(Room), said(Room), said(Room), said(Low)], true),
        ] {
            assert_eq!(wants_to_move(&report("own", own), &others), expected, "{own:?} {others:?}");
        }
    }

    #[test]
    fn a_refusal_names_every_node_that_lacks_room() {
        let admission = Admission::decide(&report("own", Low), &[said(Low), said(Room)], false);
        let Some(ProposeAnswer::Full(shortages)) = admission.refusal(Need::Client) else { panic!("{admission:?}") };
        assert_eq!(shortages.iter().map(|s| s.node.as_str()).collect::<Vec<_>>(), ["own", "other"]);
        assert_eq!(admission.refusal(Need::Reserve), None);
        assert_eq!(Admission::default().refusal(Need::Client), None);
    }

    #[test]
    fn only_a_retraction_needs_no_more_than_the_reserve() {
        let id = uuid::Uuid::nil();
        let supersede = |new| Operation::Supersede(NewSupersession { id, old: id, new, reason: None });
        assert_eq!(Need::of(&supersede(None)), Need::Reserve);
        assert_eq!(Need::of(&supersede(Some(id))), Need::Client);
        assert_eq!(Need::of(&Operation::Assert(vec![])), Need::Client);
    }
}
