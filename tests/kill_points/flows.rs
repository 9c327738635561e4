//! Each flow, with the server that runs it killed before each of its steps, under load.
//!
//! Three members, and a fourth server that comes and goes. What was begun is finished by the next leader, or undone, or
//! was never begun, and the judge has every answer that clients got meanwhile. A point without a case here fails the
//! test. Some cases by default, all with `STEMEDB_TEST_FULL=1`; `STEMEDB_TEST_POINT=member.leave` picks those that begin
//! so.

use serde_json::{Value, json};
use stemedb::cli::http_client::Call;
use stemedb::fail_points;
use stemedb::node::flows::DRAIN_POINTS;
use stemedb::node::rebuild::journal::Journal;

use super::field::{DRAIN, FAILOVER, Field, MEMBERS, UNDRAIN, finished, id_of};
use super::rig::HANG;
use super::{assert_killed, is_full};

/// How often a case is tried whose point is passed only when two things happen in the order that is more likely.
const TRIES_MAX: usize = 5;

/// What is done when the server is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Flow {
    Drain,
    Undrain,
    Failover,
    /// The fourth server comes as a voter.
    Add,
    /// It comes without a vote.
    AddLearner,
    /// It leaves, as a voter.
    Remove,
    /// It leaves, and had no vote.
    RemoveLearner,
    /// It takes the place of a follower.
    Replace,
    /// It takes the place of a node that leads by then.
    ReplaceLeader,
    /// It has not joined when that is cancelled.
    CancelComing,
    /// It has joined, and died, when that is cancelled.
    CancelJoined,
    /// It takes the place of a follower, and is itself the one that is killed.
    Comes,
    /// It is a learner, and its rebuild was given up.
    GivesUp,
    /// The leader itself is asked to leave.
    RemoveLeader,
    /// A dead voter was to leave, and is back before it is announced.
    ComesBack,
    /// It is back once that was announced.
    ComesBackLate,
}

/// What is killed where.
#[derive(Clone, Copy, Debug)]
struct Case {
    flow: Flow,
    point: &'static str,
    /// Also without `STEMEDB_TEST_FULL`.
    always: bool,
}

fn cases() -> Vec<Case> {
    use Flow::*;
    let case = |flow, point| Case { flow, point, always: false };
    let always = |flow, point| Case { flow, point, always: true };
    let mut cases = vec![
        case(Drain, "drain.raise_flag"),
        case(Drain, "drain.ask"),
        case(Drain, "drain.persist"),
        case(Drain, "drain.close"),
        always(Drain, "drain.hand_over"),
        case(Drain, "drain.await_notice"),
        case(Drain, "drain.await_requests"),
        case(Drain, "drain.finish"),
        case(Undrain, "undrain.persist"),
        case(Undrain, "undrain.open"),
        case(Failover, "failover.trigger"),
        always(Failover, "failover.await"),
        case(Failover, "failover.confirm"),
        case(Failover, "failover.done"),
        case(Replace, "member.await_join"),
        case(Replace, "member.await_log"),
        case(Replace, "member.announce"),
        always(Replace, "member.change"),
        case(Replace, "member.finish"),
        case(ReplaceLeader, "member.leave"),
        case(RemoveLeader, "member.order_leave"),
        case(ComesBack, "member.await_quorum"),
        case(ComesBackLate, "member.withdraw"),
        always(CancelComing, "member.undone"),
        case(CancelJoined, "member.take_out"),
        // Side by side, so that none has to come or leave only to make room for the next case.
        case(Add, "member.await_join"),
        case(Remove, "member.announce"),
        case(Add, "member.await_log"),
        case(Remove, "member.change"),
        case(Add, "member.announce"),
        case(Remove, "member.finish"),
        case(Add, "member.change"),
        case(Remove, "member.announce"),
        case(Add, "member.finish"),
        case(RemoveLearner, "member.announce"),
        case(AddLearner, "member.await_join"),
        case(RemoveLearner, "member.change"),
        case(AddLearner, "member.await_log"),
        case(RemoveLearner, "member.finish"),
        case(AddLearner, "member.finish"),
        case(GivesUp, "member.give_up"),
    ];
    cases.extend(stemedb::node::rebuild::fail_point::POINTS.iter().map(|point| case(Comes, point)));
    cases
}

#[test]
fn every_point_of_a_flow_has_a_case() {
    let cases = cases();
    for point in fail_points::flows() {
        assert!(cases.iter().any(|case| case.point == point), "no case leads to {point}: write one");
    }
    for case in &cases {
        let known = fail_points::flows().chain(fail_points::points()).any(|point| point == case.point);
        assert!(known, "{case:?}: there is no such point");
    }
}

impl Field {
    /// Three voters and nobody else, or the fourth one with or without a vote.
    async fn prepare(&mut self, flow: Flow) {
        let wanted = match flow {
            Flow::Remove => Some(false),
            Flow::RemoveLearner | Flow::GivesUp => Some(true),
            _ => None,
        };
        let is = match (self.learner, self.voters.contains(&self.fourth)) {
            (Some(_), _) => Some(true),
            (None, votes) => votes.then_some(false),
        };
        if is != wanted {
            if is.is_some() {
                self.leaves().await;
            }
            if let Some(learner) = wanted {
                self.comes(learner).await;
            }
        }
        self.settle().await;
    }

    async fn run(&mut self, case: Case) {
        self.prepare(case.flow).await;
        let Case { flow, point, .. } = case;
        match flow {
            Flow::Drain => self.drain(point).await,
            Flow::Undrain => self.undrain(point).await,
            Flow::Failover => self.failover(point).await,
            Flow::Add => self.change_of(point, false).await,
            Flow::AddLearner => self.change_of(point, true).await,
            Flow::Remove | Flow::RemoveLearner => self.removal(point).await,
            Flow::Replace => self.replacement(point).await,
            Flow::ReplaceLeader => self.replacement_of_the_leader(point).await,
            Flow::CancelComing => self.cancelled_coming(point).await,
            Flow::CancelJoined => self.cancelled_joined(point).await,
            Flow::Comes => self.coming(point).await,
            Flow::GivesUp => self.given_up(point).await,
            Flow::RemoveLeader => self.removal_of_the_leader(point).await,
            Flow::ComesBack => self.back_before_it_left(point, "member.announce").await,
            Flow::ComesBackLate => self.back_before_it_left(point, "member.change").await,
        }
        self.settle().await;
        self.goes_on().await;
    }

    async fn drain(&mut self, point: &'static str) {
        let leader = self.leader().await;
        let order = Call::post(DRAIN, json!({"persist": true}).to_string());
        let answer = self.dies(leader, point, leader, order).await;
        // Lost, or one that says that it is not done.
        assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status != 200), "{point}");
        self.goes_on().await;
        self.three.processes.start(leader).unwrap();
        let place = |wanted: &str| DRAIN_POINTS.iter().position(|point| *point == wanted).unwrap();
        if place(point) > place("drain.persist") {
            self.await_status(leader, &["drained"]).await;
            assert!(!self.is_ready(leader).await, "{point}");
            self.order(leader, &Call::post(UNDRAIN, "")).await;
        }
        self.await_ready(leader).await;
    }

    async fn undrain(&mut self, point: &'static str) {
        let leader = self.leader().await;
        let node = self.voter_but(&[leader]);
        self.order(node, &Call::post(DRAIN, json!({"persist": true}).to_string())).await;
        let answer = self.dies(node, point, node, Call::post(UNDRAIN, "")).await;
        assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status != 200), "{point}");
        self.goes_on().await;
        self.three.processes.start(node).unwrap();
        if point == "undrain.persist" {
            self.await_status(node, &["drained"]).await;
            self.order(node, &Call::post(UNDRAIN, "")).await;
        }
        self.await_ready(node).await;
    }

    async fn failover(&mut self, point: &'static str) {
        let leader = self.leader().await;
        let target = self.voter_but(&[leader]);
        let order = Call::post(FAILOVER, json!({"target": self.name(target)}).to_string());
        let answer = self.dies(leader, point, leader, order).await;
        assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status != 200), "{point}");
        self.goes_on().await;
        self.back(leader).await;
    }

    /// Gives an order to a node that neither leads nor comes or leaves, and lets the leader die at the point. How the
    /// change ended; false when the point was never passed, and the change was finished as if nothing had been.
    async fn leader_dies(&mut self, leader: usize, point: &str, call: Call, leaves: Option<usize>) -> (bool, Value) {
        let at = self.voter_but(&[leader, self.fourth, leaves.unwrap_or(leader)]);
        let before = self.known(at).await;
        self.three.arm(leader, point);
        let mut client = self.three.client(at);
        let order = tokio::spawn(async move { client.call(&call, HANG).await });
        let watching = self.three.client(at);
        let watch = async {
            tokio::select! {
                ended = self.three.processes.child_ended() => (Some(ended.unwrap()), None),
                job = finished(watching, &before) => (None, Some(job)),
            }
        };
        let watched = tokio::time::timeout(HANG, watch).await;
        let (died, ended) = watched.unwrap_or_else(|_| panic!("{point}: neither passed nor finished"));
        if let Some(ended) = &died {
            assert_eq!(ended.node, leader, "{point}");
            assert_killed(&self.three, leader, point, ended.status);
            self.load.set_up(leader, false);
            self.goes_on().await;
        }
        // Lost with the leader, or a refusal that says so.
        drop(order.await.unwrap());
        self.three.disarm(leader);
        let job = match ended {
            Some(job) => job,
            None => self.ended(at, &before).await,
        };
        (died.is_some(), job)
    }

    async fn change_of(&mut self, point: &'static str, learner: bool) {
        for _ in 0..TRIES_MAX {
            self.await_fourth().await;
            let leader = self.leader().await;
            let call = self.add(learner);
            let (died, job) = self.leader_dies(leader, point, call, None).await;
            assert_eq!(job["state"], "finished", "{point}: {job}");
            match learner {
                true => self.learner = Some(self.fourth),
                false => drop(self.voters.insert(self.fourth)),
            }
            if died {
                return self.back(leader).await;
            }
            self.leaves().await;
        }
        panic!("{point}: it never came by");
    }

    async fn removal(&mut self, point: &'static str) {
        let gone = self.fourth;
        let leader = self.have_lead(|i| i != gone).await;
        self.load.set_up(gone, false);
        let call = self.remove(gone);
        let (died, job) = self.leader_dies(leader, point, call, None).await;
        assert!(died && job["state"] == "finished", "{point}: {job}");
        self.voters.remove(&gone);
        self.await_status(gone, &["removed"]).await;
        self.empties(gone).await;
        self.back(leader).await;
    }

    /// The fourth node has taken the place of another one.
    async fn replaced(&mut self, old: usize) {
        self.voters.remove(&old);
        self.voters.insert(self.fourth);
        self.empties(old).await;
    }

    async fn replacement(&mut self, point: &'static str) {
        for _ in 0..TRIES_MAX {
            self.await_fourth().await;
            let leader = self.leader().await;
            let old = self.voter_but(&[leader]);
            self.load.set_up(old, false);
            let call = self.replace(old);
            let (died, job) = self.leader_dies(leader, point, call, Some(old)).await;
            assert_eq!(job["state"], "finished", "{point}: {job}");
            self.replaced(old).await;
            if died {
                return self.back(leader).await;
            }
            self.settle().await;
        }
        panic!("{point}: it never came by");
    }

    async fn replacement_of_the_leader(&mut self, point: &'static str) {
        self.await_fourth().await;
        let leader = self.leader().await;
        let old = self.voter_but(&[leader]);
        let third = self.voter_but(&[leader, old]);
        let (fourth, before) = (self.fourth, self.known(third).await);
        self.three.arm(fourth, "rebuild.pulled");
        self.order(third, &self.replace(old)).await;
        self.ends(fourth, "rebuild.pulled").await;
        self.have_lead(|i| i == old).await;
        self.three.disarm(fourth);
        self.three.arm(old, point);
        self.three.processes.start(fourth).unwrap();
        self.ends(old, point).await;
        self.three.disarm(old);
        self.goes_on().await;
        // It never comes back.
        assert_eq!(self.ended(third, &before).await["state"], "finished", "{point}");
        self.replaced(old).await;
    }

    /// Cancels the change that goes on, with the leader dying over it.
    async fn cancel_dies(&mut self, point: &str) {
        let leader = self.leader().await;
        let at = self.voter_but(&[leader]);
        let id = id_of(&self.change(at).await.expect("a change that goes on"));
        let answer = self.dies(leader, point, at, Call::delete(format!("/v1/admin/jobs/{id}"))).await;
        assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status != 200), "{point}");
        self.goes_on().await;
        let mut job = Value::Null;
        self.three
            .until("it is cancelled", async |_| {
                job = self.get(at, &format!("/v1/admin/jobs/{id}")).await.unwrap_or_default();
                job["state"] == "cancelled"
            })
            .await;
        self.back(leader).await;
    }

    async fn cancelled_coming(&mut self, point: &'static str) {
        self.await_fourth().await;
        let (fourth, at) = (self.fourth, self.leader().await);
        self.three.arm(fourth, "rebuild.pulled");
        self.order(at, &self.add(false)).await;
        self.ends(fourth, "rebuild.pulled").await;
        self.three.disarm(fourth);
        self.cancel_dies(point).await;
    }

    async fn cancelled_joined(&mut self, point: &'static str) {
        for _ in 0..TRIES_MAX {
            self.await_fourth().await;
            let (fourth, at) = (self.fourth, self.leader().await);
            let before = self.known(at).await;
            self.three.arm(fourth, "rebuild.joined");
            self.order(at, &self.add(false)).await;
            self.ends(fourth, "rebuild.joined").await;
            self.three.disarm(fourth);
            // Dead, it cannot vote: the voters do not change, unless that was decided in the moment before.
            let mut waits = false;
            self.three
                .until("the change waits, or has been done", async |_| {
                    let change = self.change(at).await;
                    waits = change.as_ref().is_some_and(|job| job["cancellable"] == true && job["state"] == "waiting");
                    waits || change.is_none()
                })
                .await;
            if waits {
                return self.cancel_dies(point).await;
            }
            self.has_come(at, &before, false).await;
            self.three.processes.start(fourth).unwrap();
            self.settle().await;
            self.leaves().await;
        }
        panic!("{point}: it never came by");
    }

    /// The learner has its place for another way in, and begins again without knowing of it, as it was.
    async fn given_up(&mut self, point: &'static str) {
        let learner = self.fourth;
        let leader = self.leader().await;
        let at = self.voter_but(&[leader]);
        let before = self.known(at).await;
        // An order would join the job that brought it here.
        self.three
            .until("its way in is over", async |_| {
                self.jobs(learner).await.iter().all(|job| job["kind"] != "rebuild" || job["state"] == "finished")
            })
            .await;
        self.three.arm(learner, "rebuild.granted");
        let order = Call::post(format!("/v1/admin/node/rebuild?node={}&wait=false", self.name(learner)), "");
        self.order(at, &order).await;
        self.ends(learner, "rebuild.granted").await;
        self.three.disarm(learner);
        Journal::remove(self.three.folder(learner)).unwrap();
        self.three.arm(leader, point);
        self.three.processes.start(learner).unwrap();
        self.ends(leader, point).await;
        self.three.disarm(leader);
        self.goes_on().await;
        assert_eq!(self.ended(at, &before).await["state"], "cancelled", "{point}");
        self.back(leader).await;
        self.await_ready(learner).await;
        assert_eq!(self.three.health(learner).await.unwrap()["role"], "learner", "{point}");
    }

    /// It dies before it gives leadership away: nothing was begun, and whoever passed the order on does not know that.
    async fn removal_of_the_leader(&mut self, point: &'static str) {
        let leader = self.leader().await;
        let at = self.voter_but(&[leader]);
        let before = self.known(at).await;
        let call = Call::delete(format!("{MEMBERS}/{}?wait=false&force=true", self.name(leader)));
        let answer = self.dies(leader, point, at, call).await.unwrap();
        assert_eq!((answer.status, &*answer.problem().kind), (503, "/problems/order-unknown"), "{}", answer.describe());
        self.goes_on().await;
        self.back(leader).await;
        assert_eq!(self.known(at).await, before, "{point}");
    }

    /// A dead voter may leave without force: it gave nothing. If it is back before it has left, that waits.
    async fn back_before_it_left(&mut self, point: &'static str, first: &str) {
        let leader = self.leader().await;
        let dead = self.voter_but(&[leader]);
        let at = self.voter_but(&[leader, dead]);
        self.load.set_up(dead, false);
        self.three.processes.kill(dead).await.unwrap();
        let before = self.known(at).await;
        let order = self.remove(dead);
        // Answered before it died, or lost with it.
        drop(self.dies(leader, first, at, order).await);
        // Two of the three are needed, and whichever of these leads sees that: without the dead leader there is nobody
        // else.
        self.three.arm(at, point);
        self.three.arm(dead, point);
        self.three.processes.start(dead).unwrap();
        let ended = tokio::time::timeout(HANG, self.three.processes.child_ended()).await;
        let ended = ended.unwrap_or_else(|_| panic!("{point}: it goes on")).unwrap();
        assert!(ended.node == at || ended.node == dead, "{point}");
        assert_killed(&self.three, ended.node, point, ended.status);
        self.load.set_up(ended.node, false);
        self.three.disarm(at);
        self.three.disarm(dead);
        self.back(ended.node).await;
        self.back(leader).await;
        self.await_ready(dead).await;
        let mut id = String::new();
        self.three
            .until("it waits, because no further failure could be tolerated", async |_| {
                let change = self.change(self.leader().await).await.unwrap_or_default();
                id = id_of(&change);
                let waits = change["state"] == "waiting" && change["cancellable"] == true;
                waits && change["detail"].as_str().is_some_and(|why| why.contains("no further failure"))
            })
            .await;
        let taken = self.order(at, &Call::delete(format!("/v1/admin/jobs/{id}"))).await;
        assert_eq!(taken["id"], *id, "{taken}");
        assert_eq!(self.ended(at, &before).await["state"], "cancelled", "{point}");
    }

    /// The node that comes is killed, started again, and goes on.
    async fn coming(&mut self, point: &'static str) {
        self.await_fourth().await;
        let leader = self.leader().await;
        let old = self.voter_but(&[leader]);
        self.load.set_up(old, false);
        let (fourth, before) = (self.fourth, self.known(leader).await);
        self.three.arm(fourth, point);
        self.order(leader, &self.replace(old)).await;
        self.ends(fourth, point).await;
        self.three.disarm(fourth);
        self.goes_on().await;
        self.three.processes.start(fourth).unwrap();
        assert_eq!(self.ended(leader, &before).await["state"], "finished", "{point}");
        self.replaced(old).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_whose_server_is_killed_at_any_step_ends_well() {
    let picked = std::env::var("STEMEDB_TEST_POINT").ok();
    let is_wanted = |case: &Case| match &picked {
        Some(picked) => case.point.starts_with(picked.as_str()),
        None => case.always || is_full(),
    };
    let cases: Vec<Case> = cases().into_iter().filter(is_wanted).collect();
    if cases.is_empty() {
        return;
    }
    println!("{} cases (all with STEMEDB_TEST_FULL=1)", cases.len());
    let _alone = super::ONE_AT_A_TIME.lock().await;
    let mut field = Field::start().await;
    for case in cases {
        field.run(case).await;
        println!("{}: {:?}, killed, ended well", case.point, case.flow);
    }
    field.finish().await;
}
