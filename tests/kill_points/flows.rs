//! Each flow, with the server that runs it killed before each of its steps, under load.
//!
//! Three members, and a fourth server that comes and goes. What was begun is finished by the next leader, or undone, or
//! was never begun, and the judge has every answer that clients got meanwhile. A point without a case here fails the
//! test. Some cases by default, all with `STEMEDB_TEST_FULL=1`; `STEMEDB_TEST_POINT=member.leave` picks those that begin
//! so.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use stemedb::cli::drill_load::{self, Load};
use stemedb::cli::http_client::{Answer, Call, HttpError};
use stemedb::fail_points;
use stemedb::judge::check;
use stemedb::node::flows::DRAIN_POINTS;
use tokio::task::JoinHandle;

use super::rig::HANG;
use super::rig::three::Three;
use super::{assert_killed, is_full};

const MEMBERS: &str = "/v1/admin/members";
const DRAIN: &str = "/v1/admin/node/drain";
const UNDRAIN: &str = "/v1/admin/node/undrain";
const FAILOVER: &str = "/v1/admin/failover";

const CLIENTS: u32 = 4;

/// Acknowledged writes that show that a cluster goes on.
const GOES_ON: u64 = 20;

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
        always(Undrain, "undrain.open"),
        case(Failover, "failover.trigger"),
        always(Failover, "failover.await"),
        case(Failover, "failover.confirm"),
        case(Failover, "failover.done"),
        case(Replace, "member.await_join"),
        case(Replace, "member.await_log"),
        case(Replace, "member.announce"),
        always(Replace, "member.change"),
        case(Replace, "member.finish"),
        always(ReplaceLeader, "member.leave"),
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

/// The servers, and clients that use them.
struct Field {
    three: Three,
    /// The server that is no voter, or the last one that came.
    fourth: usize,
    /// Who votes.
    voters: BTreeSet<usize>,
    learner: Option<usize>,
    load: Arc<Load>,
    clients: Vec<JoinHandle<Result<(), String>>>,
}

impl Field {
    async fn start() -> Self {
        let three = Three::with_spares(1).await;
        let endpoints = three.processes.plan().iter().map(|node| node.endpoint().unwrap()).collect();
        let load = Load::new(endpoints, 64, 7);
        load.set_up(3, false);
        let clients = (0..CLIENTS).map(|n| tokio::spawn(drill_load::client(Arc::clone(&load), n))).collect();
        Self { three, fourth: 3, voters: (0..3).collect(), learner: None, load, clients }
    }

    fn name(&self, i: usize) -> String {
        self.three.processes.plan()[i].name.clone()
    }

    fn runs(&self, i: usize) -> bool {
        self.three.processes.pid(i).is_some()
    }

    /// Some voter that runs, other than these.
    fn voter_but(&self, not: &[usize]) -> usize {
        let mut voters = self.voters.iter().filter(|i| !not.contains(i) && self.runs(**i));
        *voters.next().expect("another voter that runs")
    }

    async fn call(&self, at: usize, call: &Call) -> Result<Answer, HttpError> {
        self.three.client(at).call(call, HANG).await
    }

    async fn get(&self, at: usize, path: &str) -> Option<Value> {
        self.three.client(at).get_json(path, HANG).await.ok()
    }

    /// An order that must be taken; it is repeated as long as nobody leads.
    async fn order(&self, at: usize, call: &Call) -> Value {
        let mut taken = None;
        self.three
            .until("an order is taken", async |_| {
                match self.call(at, call).await {
                    Ok(answer) if answer.is_success() => taken = Some(answer.json().unwrap()),
                    Ok(answer) => assert_eq!(answer.status, 503, "{}", answer.describe()),
                    Err(error) => panic!("{error}"),
                }
                taken.is_some()
            })
            .await;
        taken.unwrap()
    }

    async fn leader(&self) -> usize {
        let mut leader = None;
        self.three
            .until("a leader", async |_| {
                for i in self.voters.iter().filter(|i| self.runs(**i)) {
                    let answer = self.call(*i, &Call::get("/v1/health/leader")).await;
                    if answer.is_ok_and(|answer| answer.is_success()) {
                        leader = Some(*i);
                    }
                }
                leader.is_some()
            })
            .await;
        leader.unwrap()
    }

    /// Moves leadership, if need be, until another one has it.
    async fn have_lead(&self, wanted: impl Fn(usize) -> bool) -> usize {
        loop {
            let leader = self.leader().await;
            if wanted(leader) {
                return leader;
            }
            let target = self.voters.iter().copied().find(|i| wanted(*i)).unwrap();
            // Where it cannot be taken over yet it is ordered again.
            let order = Call::post(FAILOVER, json!({"target": self.name(target)}).to_string());
            drop(self.call(leader, &order).await);
        }
    }

    /// More writes are acknowledged.
    async fn goes_on(&self) {
        let goal = self.load.recorder.acknowledged() + GOES_ON;
        self.three.until("writes go on", async |_| self.load.recorder.acknowledged() >= goal).await;
    }

    /// Waits until the server ends at its point.
    async fn ends(&mut self, i: usize, point: &str) {
        super::ends(&mut self.three, i, point).await;
        self.load.set_up(i, false);
    }

    /// Gives an order with the server armed, and waits until it ends at the point. The order's answer.
    async fn dies(&mut self, i: usize, point: &str, at: usize, call: Call) -> Result<Answer, HttpError> {
        self.three.arm(i, point);
        let mut client = self.three.client(at);
        let order = tokio::spawn(async move { client.call(&call, HANG).await });
        self.ends(i, point).await;
        let answer = order.await.unwrap();
        self.three.disarm(i);
        answer
    }

    async fn is_ready(&self, i: usize) -> bool {
        self.call(i, &Call::get("/v1/health/ready")).await.is_ok_and(|answer| answer.is_success())
    }

    /// Starts a server that was killed and waits until it is in traffic.
    async fn back(&mut self, i: usize) {
        self.three.processes.start(i).unwrap();
        self.await_ready(i).await;
    }

    async fn await_ready(&self, i: usize) {
        self.three.until(&format!("{} is ready", self.name(i)), async |_| self.is_ready(i).await).await;
        self.load.set_up(i, true);
    }

    async fn await_status(&self, i: usize, wanted: &[&str]) {
        self.three
            .until(&format!("{} is one of {wanted:?}", self.name(i)), async |three| {
                let health = three.health(i).await;
                health.is_some_and(|health| wanted.iter().any(|status| health["status"] == *status))
            })
            .await;
    }

    /// The fourth server runs and waits for a place.
    async fn await_fourth(&mut self) {
        if !self.runs(self.fourth) {
            self.three.processes.start(self.fourth).unwrap();
        }
        self.await_status(self.fourth, &["waiting", "joining"]).await;
    }

    /// A server that was removed becomes the fourth one, with an empty folder.
    async fn empties(&mut self, i: usize) {
        self.load.set_up(i, false);
        if self.runs(i) {
            self.three.processes.kill(i).await.unwrap();
        }
        for entry in std::fs::read_dir(self.three.folder(i)).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => std::fs::remove_dir_all(path).unwrap(),
                false if path.ends_with("api.toml") => {}
                false => std::fs::remove_file(path).unwrap(),
            }
        }
        self.fourth = i;
        self.learner = None;
    }

    fn add(&self, learner: bool) -> Call {
        let addr = self.three.processes.plan()[self.fourth].peer_addr();
        let body = json!({"name": self.name(self.fourth), "addr": addr, "learner": learner});
        Call::post(format!("{MEMBERS}?wait=false"), body.to_string())
    }

    fn replace(&self, old: usize) -> Call {
        let addr = self.three.processes.plan()[self.fourth].peer_addr();
        let body = json!({"name": self.name(self.fourth), "addr": addr});
        Call::post(format!("{MEMBERS}/{}/replace?wait=false", self.name(old)), body.to_string())
    }

    fn remove(&self, i: usize) -> Call {
        Call::delete(format!("{MEMBERS}/{}?wait=false", self.name(i)))
    }

    /// The jobs that a node knows, the newest first.
    async fn jobs(&self, at: usize) -> Vec<Value> {
        let body = self.get(at, "/v1/admin/jobs").await;
        body.and_then(|body| body["jobs"].as_array().cloned()).unwrap_or_default()
    }

    /// The change of the members that goes on, as a node shows it.
    async fn change(&self, at: usize) -> Option<Value> {
        let over = ["finished", "cancelled", "failed"];
        let jobs = self.jobs(at).await;
        jobs.into_iter().find(|job| job["cluster"] == true && !over.iter().any(|state| job["state"] == *state))
    }

    /// Waits until the newest change of the members, other than those known before, has ended, and says how.
    async fn ended(&self, at: usize, before: &BTreeSet<String>) -> Value {
        let mut found = None;
        self.three
            .until("the change of the members ends", async |_| {
                let new = |job: &&Value| job["cluster"] == true && !before.contains(&id_of(job));
                let ended = |job: &&Value| job["state"] == "finished" || job["state"] == "cancelled";
                found = self.jobs(at).await.iter().find(new).filter(ended).cloned();
                found.is_some()
            })
            .await;
        found.unwrap()
    }

    async fn known(&self, at: usize) -> BTreeSet<String> {
        self.jobs(at).await.iter().map(id_of).collect()
    }

    /// Waits until every member that runs names these voters and is in traffic.
    async fn settle(&self) {
        let wanted: BTreeSet<String> = self.voters.iter().map(|i| self.name(*i)).collect();
        for i in self.voters.iter().chain(&self.learner) {
            self.three
                .until(&format!("{} names the voters {wanted:?}", self.name(*i)), async |_| {
                    let Some(body) = self.get(*i, MEMBERS).await else { return false };
                    let members = body["members"].as_array().cloned().unwrap_or_default();
                    let voters = members.iter().filter(|m| m["voter"] == true);
                    let voters: BTreeSet<String> =
                        voters.map(|m| m["name"].as_str().unwrap_or_default().to_owned()).collect();
                    voters == wanted && body["change"].is_null()
                })
                .await;
            self.await_ready(*i).await;
        }
    }

    /// The fourth server comes, without anything in the way.
    async fn comes(&mut self, learner: bool) {
        self.await_fourth().await;
        let at = self.leader().await;
        let before = self.known(at).await;
        self.order(at, &self.add(learner)).await;
        self.has_come(at, &before, learner).await;
    }

    async fn has_come(&mut self, at: usize, before: &BTreeSet<String>, learner: bool) {
        assert_eq!(self.ended(at, before).await["state"], "finished");
        match learner {
            true => self.learner = Some(self.fourth),
            false => drop(self.voters.insert(self.fourth)),
        }
    }

    /// It leaves again.
    async fn leaves(&mut self) {
        let (gone, at) = (self.fourth, self.have_lead(|i| i != self.fourth).await);
        self.load.set_up(gone, false);
        let before = self.known(at).await;
        self.order(at, &self.remove(gone)).await;
        self.has_left(gone, at, &before).await;
    }

    async fn has_left(&mut self, gone: usize, at: usize, before: &BTreeSet<String>) {
        assert_eq!(self.ended(at, before).await["state"], "finished");
        self.voters.remove(&gone);
        self.await_status(gone, &["removed"]).await;
        self.empties(gone).await;
    }

    /// Three voters and nobody else, or the fourth one with or without a vote.
    async fn prepare(&mut self, flow: Flow) {
        let wanted = match flow {
            Flow::Remove => Some(false),
            Flow::RemoveLearner => Some(true),
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
        let (died, ended) = tokio::select! {
            ended = self.three.processes.child_ended() => (Some(ended.unwrap()), None),
            job = finished(watching, &before) => (None, Some(job)),
        };
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

    /// The end of the load: the judge looks at every answer and at what each member has.
    async fn finish(mut self) {
        self.load.stop();
        for client in std::mem::take(&mut self.clients) {
            tokio::time::timeout(HANG, client).await.expect("a client to end").unwrap().unwrap();
        }
        let mut listings = Vec::new();
        for i in self.voters.iter().chain(&self.learner) {
            listings.push(drill_load::list_node(&self.load, *i).await.unwrap());
        }
        let verdict = check(&self.load.recorder.history(), &listings);
        assert!(verdict.is_clean(), "{verdict}");
        println!("{} operations, {verdict}", self.load.operations.load(Ordering::Relaxed));
        self.three.processes.stop_all().await.unwrap();
    }
}

fn id_of(job: &Value) -> String {
    job["id"].as_str().unwrap_or_default().to_owned()
}

/// Waits until a node shows a change of the members, other than those known before, that has ended.
async fn finished(mut client: stemedb::cli::http_client::Client, before: &BTreeSet<String>) -> Value {
    loop {
        let body: Value = client.get_json("/v1/admin/jobs", HANG).await.unwrap_or_default();
        let new = |job: &&Value| job["cluster"] == true && !before.contains(&id_of(job));
        let ended = |job: &&Value| job["state"] == "finished";
        if let Some(job) = body["jobs"].as_array().and_then(|jobs| jobs.iter().find(new).filter(ended).cloned()) {
            return job;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
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
