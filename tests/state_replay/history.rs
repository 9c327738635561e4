//! A random history as a log would carry it: every kind of command, keys that come again with the
//! same and with another body, commands past their time, and log time that jumps and stands still.

use std::collections::BTreeMap;

use openraft::{EntryPayload, Membership};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::model::{NewAssertion, NewEpoch, NewSupersession, NewVote};
use stemedb::state::command::{
    Command, CommandKey, ENTRY_FORMAT, EntryBody, KeySource, MemberCommand, Operation, RebuildCommand,
};
use stemedb::state::level::RaiseLevel;
use stemedb::state::members::{Change, End, Intent};
use stemedb_raft::types::{Entry, EntryData, LogId, Member, TypeConfig};
use uuid::Uuid;

const START_MS: u64 = 1_700_000_000_000;

pub fn log_id(index: u64) -> LogId {
    openraft::testing::log_id::<TypeConfig>(1, 1, index)
}

struct Writer {
    rng: StdRng,
    now_ms: u64,
    next: u64,
    assertions: Vec<Uuid>,
    epochs: u64,
    commands: Vec<Command>,
    imported: u64,
}

/// `count` entries from index 0 on; the same for the same seed.
pub fn history(seed: u64, count: u64) -> Vec<Entry> {
    let mut writer = Writer {
        rng: StdRng::seed_from_u64(seed),
        now_ms: START_MS,
        next: 0,
        assertions: Vec::new(),
        epochs: 0,
        commands: Vec::new(),
        imported: 0,
    };
    (0..count).map(|index| writer.entry(index)).collect()
}

impl Writer {
    fn entry(&mut self, index: u64) -> Entry {
        let payload = match index {
            0 => self.membership(),
            _ => match self.rng.random_range(0..40) {
                0 => EntryPayload::Blank,
                1 => self.membership(),
                _ => EntryPayload::Normal(EntryData(self.body().encode().unwrap().into())),
            },
        };
        Entry { log_id: log_id(index), payload }
    }

    fn membership(&mut self) -> EntryPayload<EntryData, u64, Member> {
        let last = self.rng.random_range(1..5u64);
        let nodes: BTreeMap<u64, Member> = (1..=last).map(|id| (id, Member::default())).collect();
        EntryPayload::Membership(Membership::new(vec![nodes.keys().copied().collect()], nodes).unwrap())
    }

    fn body(&mut self) -> EntryBody {
        self.now_ms += match self.rng.random_range(0..20) {
            0 => 25_000, // every short-lived key goes
            1 => 400_000,
            2..10 => 0,
            _ => self.rng.random_range(0..2_000),
        };
        // A new leader may begin behind the old one's time.
        let behind = if self.rng.random_range(0..10) == 0 { 5_000 } else { 0 };
        let count = match self.rng.random_range(0..10) {
            0 => 40,
            1 => 0,
            _ => self.rng.random_range(1..8),
        };
        let commands = (0..count).map(|_| self.command()).collect();
        EntryBody { format: ENTRY_FORMAT, log_time_ms: self.now_ms - behind, commands }
    }

    fn command(&mut self) -> Command {
        if !self.commands.is_empty() && self.rng.random_range(0..4) == 0 {
            let back = self.rng.random_range(0..self.commands.len().min(200));
            let mut again = self.commands[self.commands.len() - 1 - back].clone();
            if self.rng.random_range(0..4) == 0 {
                again.body_hash ^= 1;
            }
            return again;
        }
        let op = self.operation();
        let source = match self.rng.random_range(0..3) {
            0 => KeySource::Client,
            1 => KeySource::Balancer,
            _ => KeySource::Node,
        };
        let resend_until_ms = match self.rng.random_range(0..20) {
            0 => self.now_ms - 1,
            1 => self.now_ms + 60_000,
            _ => self.now_ms + 10_000,
        };
        let command = Command {
            key: CommandKey { source, id: self.id().as_u128() },
            body_hash: self.rng.random(),
            resend_until_ms,
            created_at_ms: self.now_ms + self.rng.random_range(0..50),
            op,
        };
        self.commands.push(command.clone());
        command
    }

    fn rebuild(&mut self) -> RebuildCommand {
        let (name, job) = (format!("node-{}", self.rng.random_range(1..4)), self.rng.random_range(0..4));
        match self.rng.random_range(0..4) {
            0 => RebuildCommand::Finish { name, fresh_id: self.rng.random_range(0..400) },
            1 => RebuildCommand::Cancel { name, job },
            _ => RebuildCommand::Grant {
                name,
                job,
                old_id: 1,
                id_min: 4,
                automatic_max: self.rng.random::<bool>().then_some(2),
            },
        }
    }

    fn members(&mut self) -> MemberCommand {
        let job = self.rng.random_range(0..3);
        let name = format!("node-{}", self.rng.random_range(1..5));
        match self.rng.random_range(0..7) {
            0 | 1 => MemberCommand::Begin(Box::new(Intent {
                job,
                change: match self.rng.random_range(0..3) {
                    0 => Change::Remove,
                    1 => Change::Replace { old: "node-1".into(), learner: self.rng.random() },
                    _ => Change::Add { learner: self.rng.random() },
                },
                name,
                peer_addr: "a:1".into(),
                http_addr: "a:2".into(),
                forced: self.rng.random(),
                cause: "an operator".into(),
                began_unix_ms: self.now_ms,
                place: None,
                leaves: vec![],
                changing: false,
                cancelled: false,
            })),
            2 => MemberCommand::TakePlace { job, node_job: self.rng.random_range(0..3), id_min: 4 },
            3 => MemberCommand::Announce { job, leaves: vec![self.rng.random_range(1..9)] },
            4 => MemberCommand::Withdraw { job },
            5 => MemberCommand::Cancel { job },
            _ => {
                let end = if self.rng.random() { End::Finished } else { End::Cancelled };
                MemberCommand::End { job, end, detail: "over".into(), ended_unix_ms: self.now_ms }
            }
        }
    }

    fn operation(&mut self) -> Operation {
        match self.rng.random_range(0..17) {
            16 => Operation::Level(RaiseLevel { level: self.rng.random_range(0..2) }),
            14 | 15 => Operation::Members(self.members()),
            12 | 13 => Operation::Rebuild(self.rebuild()),
            0 => {
                let supersedes = (self.epochs > 1 && self.rng.random())
                    .then(|| format!("epoch {}", self.rng.random_range(0..self.epochs + 1)));
                let name = format!("epoch {}", self.epochs.saturating_sub(u64::from(self.rng.random::<bool>())));
                self.epochs += 1;
                Operation::Epoch(NewEpoch { id: self.id(), name, description: None, supersedes })
            }
            1 | 2 => Operation::Vote(NewVote {
                id: self.id(),
                assertion_id: self.known(),
                voter: format!("voter {}", self.rng.random_range(0..5)),
                weight: self.rng.random_range(-1.0..1.0),
                reason: self.rng.random::<bool>().then(|| "because".into()),
            }),
            3 | 4 => Operation::Supersede(NewSupersession {
                id: self.id(),
                old: self.known(),
                new: self.rng.random::<bool>().then(|| self.known()),
                reason: None,
            }),
            5 => {
                let wrong = u64::from(self.rng.random_range(0..4) == 0);
                let before = self.imported + wrong;
                self.imported += 1 - wrong;
                let assertions = self.batch();
                Operation::ImportChunk {
                    import_id: "import".into(),
                    position_before: before,
                    position_after: before + 1,
                    assertions,
                }
            }
            6 => Operation::Assert(self.batch()),
            _ => Operation::Assert(vec![self.assertion()]),
        }
    }

    fn batch(&mut self) -> Vec<NewAssertion> {
        (0..self.rng.random_range(2..12)).map(|_| self.assertion()).collect()
    }

    fn assertion(&mut self) -> NewAssertion {
        let id = self.id();
        let some = |rng: &mut StdRng| rng.random_range(0..5) == 0;
        let new = NewAssertion {
            id,
            concept_path: format!("a/{}", self.rng.random_range(0..6)),
            predicate: format!("p{}", self.rng.random_range(0..3)),
            value_json: format!("\"{}\"", "x".repeat(self.rng.random_range(0..200))),
            source: some(&mut self.rng).then(|| "somebody".into()),
            confidence: some(&mut self.rng).then_some(0.25),
            epoch: some(&mut self.rng).then(|| format!("epoch {}", self.rng.random_range(0..self.epochs + 1))),
            supersedes: some(&mut self.rng).then(|| self.known()),
            valid_from_ms: None,
            valid_to_ms: None,
        };
        self.assertions.push(id);
        new
    }

    /// Mostly an assertion that was proposed (and perhaps refused), sometimes nobody's id.
    fn known(&mut self) -> Uuid {
        match self.assertions.len() {
            0 => Uuid::from_u128(9),
            len if self.rng.random_range(0..20) > 0 => self.assertions[len - 1 - self.rng.random_range(0..len.min(60))],
            _ => Uuid::from_u128(self.rng.random()),
        }
    }

    fn id(&mut self) -> Uuid {
        self.next += 1;
        Uuid::from_u128((u128::from(self.now_ms) << 80) | (0x7 << 76) | (0x8 << 60) | u128::from(self.next))
    }
}
