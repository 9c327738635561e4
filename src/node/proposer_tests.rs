//! Packing and answering, without a cluster.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
use openraft::{errors::ForwardToLeader, raft::ClientWriteResponse};
use stemedb_raft::types::EntryOutcome;

use super::*;
use crate::{
    model::NewAssertion,
    state::{
        command::{CommandKey, EntryBody, KeySource, MemberCommand, Operation, Outcome},
        level::LEVEL_MEMBERS,
        members::{Change, Intent},
    },
};

fn command(id: u128, value_bytes: usize) -> Command {
    let assertion = NewAssertion {
        id: uuid::Uuid::from_u128(id),
        concept_path: "a/b".into(),
        predicate: "p".into(),
        value_json: "x".repeat(value_bytes),
        source: Some("s".into()),
        confidence: Some(0.5),
        epoch: None,
        supersedes: None,
        valid_from_ms: Some(-1),
        valid_to_ms: None,
    };
    Command {
        key: CommandKey { source: KeySource::Node, id },
        body_hash: u128::MAX,
        resend_until_ms: u64::MAX,
        created_at_ms: 1_700_000_000_000,
        op: Operation::Assert(vec![assertion]),
    }
}

fn waiting(id: u128, value_bytes: usize) -> (Waiting, oneshot::Receiver<ProposeAnswer>) {
    let command = Arc::new(command(id, value_bytes));
    let (reply, answer) = oneshot::channel();
    let bytes = command_bytes(&command);
    let place = Park::new(1, usize::MAX >> 8).enter(bytes).unwrap();
    (Waiting { command, bytes, reply, _place: place }, answer)
}

fn log_id() -> stemedb_raft::types::LogId {
    openraft::testing::log_id::<TypeConfig>(1, 1, 9)
}

fn written(outcomes: &[CommandOutcome]) -> ClientWriteResult<TypeConfig> {
    let data = EntryOutcome(Bytes::from(codec::encode(&outcomes).unwrap()));
    Ok(ClientWriteResponse { log_id: log_id(), data, membership: None })
}

fn applied(replayed: bool) -> CommandOutcome {
    CommandOutcome { outcome: Outcome::Applied(vec![]), replayed }
}

#[test]
fn an_entry_by_reference_has_the_same_bytes() {
    let commands = vec![command(1, 3), command(2, 5)];
    let by_ref = EntryBodyRef { format: ENTRY_FORMAT, log_time_ms: 7, commands: commands.iter().collect() };
    let owned = EntryBody { format: ENTRY_FORMAT, log_time_ms: 7, commands: commands.clone() };
    assert_eq!(codec::encode(&by_ref).unwrap(), codec::encode(&owned).unwrap());
}

#[test]
fn the_estimate_of_a_commands_size_is_never_below_the_truth() {
    for bytes in [0, 1, 200, 5_000, 70_000] {
        let command = command(u128::MAX, bytes);
        assert!(command_bytes(&command) >= codec::encode(&command).unwrap().len());
    }
}

#[test]
fn what_waits_is_packed_together_up_to_the_bound_on_bytes() {
    let (send, mut queue) = mpsc::unbounded_channel();
    let mut answers = Vec::new();
    for id in 0..4 {
        let (item, answer) = waiting(id, ENTRY_BYTES_MAX / 3);
        send.send(item).ok().unwrap();
        answers.push(answer);
    }
    let mut carry = None;
    let first = queue.try_recv().unwrap();
    let packed = pack_entry(first, &mut queue, &mut carry);
    assert_eq!(packed.iter().map(|w| w.command.key.id).collect::<Vec<_>>(), [0, 1]);
    let next = pack_entry(carry.take().unwrap(), &mut queue, &mut carry);
    assert_eq!(next.iter().map(|w| w.command.key.id).collect::<Vec<_>>(), [2, 3]);
    assert!(carry.is_none());
}

#[test]
fn a_command_above_the_bound_goes_alone() {
    let (send, mut queue) = mpsc::unbounded_channel();
    let (small, _keep) = waiting(2, 1);
    send.send(small).ok().unwrap();
    let (large, _keep_too) = waiting(1, ENTRY_BYTES_MAX * 2);
    let mut carry = None;
    assert_eq!(pack_entry(large, &mut queue, &mut carry).len(), 1);
    assert_eq!(carry.unwrap().command.key.id, 2);
}

#[test]
fn outcomes_go_to_their_commands_in_order() {
    let (a, mut answer_a) = waiting(1, 1);
    let (b, mut answer_b) = waiting(2, 1);
    finish_entry(vec![a, b], written(&[applied(false), applied(true)]), None);
    assert_eq!(answer_a.try_recv().unwrap(), ProposeAnswer::Outcome(applied(false)));
    assert_eq!(answer_b.try_recv().unwrap(), ProposeAnswer::Outcome(applied(true)));
}

#[test]
fn only_a_refusal_before_the_append_is_safe_and_the_rest_is_unknown() {
    let cases: Vec<(ClientWriteResult<TypeConfig>, Option<String>, bool)> = vec![
        (Err(ClientWriteError::ForwardToLeader(ForwardToLeader::empty())), None, true),
        (Err(ClientWriteError::LogEntryDiscarded(ForwardToLeader::empty())), None, false),
        (written(&[applied(false)]), Some("fsync failed".into()), false),
        (written(&[applied(false), applied(false)]), None, false),
        (
            Ok(ClientWriteResponse {
                log_id: log_id(),
                data: EntryOutcome(Bytes::from_static(b"\xff")),
                membership: None,
            }),
            None,
            false,
        ),
    ];
    for (result, silenced, safe) in cases {
        let (item, mut answer) = waiting(1, 1);
        finish_entry(vec![item], result, silenced);
        let answer = answer.try_recv().unwrap();
        match safe {
            true => assert_eq!(answer, ProposeAnswer::NotLeader),
            false => assert!(matches!(answer, ProposeAnswer::Unknown(_)), "{answer:?}"),
        }
    }
}

#[test]
fn what_a_member_may_not_know_is_refused_and_the_rest_is_proposed() {
    let intent = Intent {
        job: 1,
        change: Change::Remove,
        name: "node-3".into(),
        peer_addr: String::new(),
        http_addr: String::new(),
        forced: false,
        cause: "a test".into(),
        began_unix_ms: 0,
        place: None,
        leaves: Vec::new(),
        changing: false,
        cancelled: false,
    };
    let mut begin = command(2, 1);
    begin.op = Operation::Members(MemberCommand::Begin(Box::new(intent)));
    for (level, refused) in [(0, true), (LEVEL_MEMBERS, false), (LEVEL_MEMBERS + 1, false)] {
        let (mut waiting_begin, mut answer) = waiting(2, 1);
        waiting_begin.command = Arc::new(begin.clone());
        let (write, mut other) = waiting(1, 1);
        let known = known_to_all(vec![waiting_begin, write], level);
        assert_eq!(known.len(), if refused { 1 } else { 2 }, "level {level}");
        assert_eq!(other.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        match answer.try_recv() {
            Ok(ProposeAnswer::Impossible(why)) => {
                assert!(refused && why.contains("needs feature level 1") && why.contains("has 0"), "{why}");
            }
            answer => assert!(!refused, "level {level}: {answer:?}"),
        }
    }
}
