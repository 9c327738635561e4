//! Three members, a fourth server that comes and goes, and clients that use them: what happens to flows is tried here.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use stemedb::cli::drill_load::{self, Load};
use stemedb::cli::http_client::{Answer, Call, Client, HttpError};
use stemedb::judge::check;
use tokio::task::JoinHandle;

use super::rig::HANG;
use super::rig::three::Three;

pub const MEMBERS: &str = "/v1/admin/members";
pub const DRAIN: &str = "/v1/admin/node/drain";
pub const UNDRAIN: &str = "/v1/admin/node/undrain";
pub const FAILOVER: &str = "/v1/admin/failover";

const CLIENTS: u32 = 4;

/// Acknowledged writes that show that a cluster goes on.
const GOES_ON: u64 = 20;

/// The servers, and clients that use them.
pub struct Field {
    pub three: Three,
    /// The server that is no voter, or the last one that came.
    pub fourth: usize,
    /// Who votes.
    pub voters: BTreeSet<usize>,
    pub learner: Option<usize>,
    pub load: Arc<Load>,
    clients: Vec<JoinHandle<Result<(), String>>>,
}

impl Field {
    pub async fn start() -> Self {
        let three = Three::with_spares(1).await;
        let endpoints = three.processes.plan().iter().map(|node| node.endpoint().unwrap()).collect();
        let load = Load::new(endpoints, 64, 7);
        load.set_up(3, false);
        let clients = (0..CLIENTS).map(|n| tokio::spawn(drill_load::client(Arc::clone(&load), n))).collect();
        Self { three, fourth: 3, voters: (0..3).collect(), learner: None, load, clients }
    }

    pub fn name(&self, i: usize) -> String {
        self.three.processes.plan()[i].name.clone()
    }

    pub fn runs(&self, i: usize) -> bool {
        self.three.processes.pid(i).is_some()
    }

    /// Some voter that runs, other than these.
    pub fn voter_but(&self, not: &[usize]) -> usize {
        let mut voters = self.voters.iter().filter(|i| !not.contains(i) && self.runs(**i));
        *voters.next().expect("another voter that runs")
    }

    pub async fn call(&self, at: usize, call: &Call) -> Result<Answer, HttpError> {
        self.three.client(at).call(call, HANG).await
    }

    pub async fn get(&self, at: usize, path: &str) -> Option<Value> {
        self.three.client(at).get_json(path, HANG).await.ok()
    }

    /// An order that must be taken; it is repeated as long as nobody leads.
    pub async fn order(&self, at: usize, call: &Call) -> Value {
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

    pub async fn leader(&self) -> usize {
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
    pub async fn have_lead(&self, wanted: impl Fn(usize) -> bool) -> usize {
        let mut leader = self.leader().await;
        self.three
            .until("leadership moves", async |_| {
                if !wanted(leader) {
                    let target = self.voters.iter().copied().find(|i| wanted(*i)).unwrap();
                    // Where it cannot be taken over yet it is ordered again.
                    let order = Call::post(FAILOVER, json!({"target": self.name(target)}).to_string());
                    drop(self.call(leader, &order).await);
                    leader = self.leader().await;
                }
                wanted(leader)
            })
            .await;
        leader
    }

    /// More writes are acknowledged.
    pub async fn goes_on(&self) {
        let goal = self.load.recorder.acknowledged() + GOES_ON;
        self.three.until("writes go on", async |_| self.load.recorder.acknowledged() >= goal).await;
    }

    /// Waits until the server ends at its point.
    pub async fn ends(&mut self, i: usize, point: &str) {
        super::ends(&mut self.three, i, point).await;
        self.load.set_up(i, false);
    }

    /// Gives an order with the server armed, and waits until it ends at the point. The order's answer.
    pub async fn dies(&mut self, i: usize, point: &str, at: usize, call: Call) -> Result<Answer, HttpError> {
        self.three.arm(i, point);
        let mut client = self.three.client(at);
        let order = tokio::spawn(async move { client.call(&call, HANG).await });
        self.ends(i, point).await;
        let answer = order.await.unwrap();
        self.three.disarm(i);
        answer
    }

    pub async fn is_ready(&self, i: usize) -> bool {
        self.call(i, &Call::get("/v1/health/ready")).await.is_ok_and(|answer| answer.is_success())
    }

    /// Starts a server that was killed and waits until it is in traffic.
    pub async fn back(&mut self, i: usize) {
        self.three.processes.start(i).unwrap();
        self.await_ready(i).await;
    }

    pub async fn await_ready(&self, i: usize) {
        self.three.until(&format!("{} is ready", self.name(i)), async |_| self.is_ready(i).await).await;
        self.load.set_up(i, true);
    }

    pub async fn await_status(&self, i: usize, wanted: &[&str]) {
        self.three
            .until(&format!("{} is one of {wanted:?}", self.name(i)), async |three| {
                let health = three.health(i).await;
                health.is_some_and(|health| wanted.iter().any(|status| health["status"] == *status))
            })
            .await;
    }

    /// The fourth server runs and waits for a place.
    pub async fn await_fourth(&mut self) {
        if !self.runs(self.fourth) {
            self.three.processes.start(self.fourth).unwrap();
        }
        self.await_status(self.fourth, &["waiting", "joining"]).await;
    }

    /// A server that was removed becomes the fourth one, with an empty folder.
    pub async fn empties(&mut self, i: usize) {
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

    pub fn add(&self, learner: bool) -> Call {
        let addr = self.three.processes.plan()[self.fourth].peer_addr();
        let body = json!({"name": self.name(self.fourth), "addr": addr, "learner": learner});
        Call::post(format!("{MEMBERS}?wait=false"), body.to_string())
    }

    pub fn replace(&self, old: usize) -> Call {
        let addr = self.three.processes.plan()[self.fourth].peer_addr();
        let body = json!({"name": self.name(self.fourth), "addr": addr});
        Call::post(format!("{MEMBERS}/{}/replace?wait=false", self.name(old)), body.to_string())
    }

    pub fn remove(&self, i: usize) -> Call {
        Call::delete(format!("{MEMBERS}/{}?wait=false", self.name(i)))
    }

    /// The jobs that a node knows, the newest first.
    pub async fn jobs(&self, at: usize) -> Vec<Value> {
        let body = self.get(at, "/v1/admin/jobs").await;
        body.and_then(|body| body["jobs"].as_array().cloned()).unwrap_or_default()
    }

    /// The change of the members that goes on, as a node shows it.
    pub async fn change(&self, at: usize) -> Option<Value> {
        let over = ["finished", "cancelled", "failed"];
        let jobs = self.jobs(at).await;
        jobs.into_iter().find(|job| job["cluster"] == true && !over.iter().any(|state| job["state"] == *state))
    }

    /// Waits until the newest change of the members, other than those known before, has ended, and says how.
    pub async fn ended(&self, at: usize, before: &BTreeSet<String>) -> Value {
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

    pub async fn known(&self, at: usize) -> BTreeSet<String> {
        self.jobs(at).await.iter().map(id_of).collect()
    }

    /// Waits until every member that runs names these voters and is in traffic.
    pub async fn settle(&self) {
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
    pub async fn comes(&mut self, learner: bool) {
        self.await_fourth().await;
        let at = self.leader().await;
        let before = self.known(at).await;
        self.order(at, &self.add(learner)).await;
        self.has_come(at, &before, learner).await;
    }

    pub async fn has_come(&mut self, at: usize, before: &BTreeSet<String>, learner: bool) {
        assert_eq!(self.ended(at, before).await["state"], "finished");
        match learner {
            true => self.learner = Some(self.fourth),
            false => drop(self.voters.insert(self.fourth)),
        }
    }

    /// It leaves again.
    pub async fn leaves(&mut self) {
        let (gone, at) = (self.fourth, self.have_lead(|i| i != self.fourth).await);
        self.load.set_up(gone, false);
        let before = self.known(at).await;
        self.order(at, &self.remove(gone)).await;
        self.has_left(gone, at, &before).await;
    }

    pub async fn has_left(&mut self, gone: usize, at: usize, before: &BTreeSet<String>) {
        assert_eq!(self.ended(at, before).await["state"], "finished");
        self.voters.remove(&gone);
        self.await_status(gone, &["removed"]).await;
        self.empties(gone).await;
    }

    /// The end of the load: the judge looks at every answer and at what each member has.
    pub async fn finish(mut self) {
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

pub fn id_of(job: &Value) -> String {
    job["id"].as_str().unwrap_or_default().to_owned()
}

/// Waits until a node shows a change of the members, other than those known before, that has ended.
pub async fn finished(mut client: Client, before: &BTreeSet<String>) -> Value {
    loop {
        let body: Value = client.get_json("/v1/admin/jobs", HANG).await.unwrap_or_default();
        let new = |job: &&Value| job["cluster"] == true && !before.contains(&id_of(job));
        let ended = |job: &&Value| job["state"] == "finished";
        if let Some(job) = body["jobs"].as_array().and_then(|jobs| jobs.iter().find(new).filter(ended).cloned()) {
            return job;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
