//! `stemedb drill`: breaks a cluster under load, and judges.
//!
//! Each kind of fault has its rounds in a file of its own (`drill_kill`, `drill_drain`, `drill_partition`, `drill_disk`);
//! `drill_run` makes the load around them and calls the judge. The cluster is a throw-away one of three servers on this
//! machine, if wanted behind a real nginx or Envoy; or an existing one, for what its operators do to it anyway.
//! Without a balancer clients repeat, with the same key and elsewhere, what broke with their node, and clients of
//! other nodes must not see a single error. Behind one they have no keys and repeat nothing, and nobody may see any.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::value::RawValue;

use super::dev::StopSignals;
use super::drill_run::{self, Done};
use super::http_client::{Endpoint, parse_endpoints};
use super::{CliError, balancer, drill_html, output};

/// Rounds of each kind in `--kind all`.
const ROUNDS_OF_ALL: usize = 3;

/// Clients of a throw-away cluster.
const CLIENTS: u32 = 64;

/// Operations a second on a cluster in use: enough for a gap to show within 10 ms, and no burden.
const GENTLE_PER_S: f64 = 100.0;

/// Arguments of `stemedb drill`.
#[derive(Args, Debug, Clone)]
pub struct DrillArgs {
    /// What to break; fsync and stall need root and the helper program stemedb-faulty-disk
    #[arg(long, value_enum, default_value_t = DrillKind::Kill)]
    pub kind: DrillKind,
    /// How many times; a round of drain takes every node in turn. Default: 20, of drain and partition 5, of all 3 each
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Clients, spread over all nodes, or all at the load balancer, with one request at a time each. Default: 64; with
    /// --endpoints --rate in their place
    #[arg(long)]
    pub clients: Option<u32>,
    /// A load balancer between the clients and a throw-away cluster, with the files of deploy/
    #[arg(long, value_enum, default_value_t = Behind::None)]
    pub behind: Behind,
    /// The program for --behind. Default: nginx or envoy on the PATH, or where scripts/test.sh has fetched it
    #[arg(long, value_name = "PATH")]
    pub balancer: Option<PathBuf>,
    /// Drill this cluster, host:port of every node separated by commas, in place of a throw-away one; only drain and
    /// failover. What the clients write stays in it, below drill/; unless told otherwise they offer 100 operations a second
    #[arg(long, value_name = "NODES")]
    pub endpoints: Option<String>,
    /// With --endpoints: the load balancer that clients are to use
    #[arg(long, value_name = "HOST:PORT", requires = "endpoints")]
    pub through: Option<String>,
    /// Offer this share of the most that the clients got done before the first round, whatever the answers take, in
    /// place of one request at a time per client
    #[arg(long, value_name = "SHARE")]
    pub rate_fraction: Option<f64>,
    /// Offer so many operations a second, whatever the answers take, in place of one request at a time per client
    #[arg(long, value_name = "PER_SECOND", conflicts_with_all = ["rate_fraction", "clients"])]
    pub rate: Option<f64>,
    /// More milliseconds than this without an acknowledged write around a fault are a finding
    #[arg(long, value_name = "MS")]
    pub gap_max_ms: Option<u64>,
    /// Bytes of each value
    #[arg(long, default_value_t = 128)]
    pub value: usize,
    /// Folder for the nodes; must be empty or absent, and is kept. Default: a temporary one, removed on success
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// fsync, stall: the helper program. Default: stemedb-faulty-disk beside this program
    #[arg(long, value_name = "PATH")]
    pub faulty_disk: Option<PathBuf>,
    /// fsync, stall: size of each node's disk in MiB; takes what is written
    #[arg(long, default_value_t = 2048)]
    pub disk_mb: u64,
    /// fsync: restart the node by hand when the fault is lifted, instead of waiting until it has rebuilt itself
    #[arg(long)]
    pub no_rebuild_wait: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Write a report with pictures of the acknowledged writes around each fault
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// What to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DrillKind {
    /// kill -9 of the leader
    Kill,
    /// Each node in turn is drained, restarted and undrained
    Drain,
    /// Leadership is moved by command
    Failover,
    /// The leader is cut from the other nodes, not from clients
    Partition,
    /// Writes of the leader's log to its disk fail, so that its fsync does
    Fsync,
    /// The leader's disk hangs for ever
    Stall,
    /// Each of them, on clusters of their own
    All,
}

/// What stands between clients and nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Behind {
    /// Clients talk to the nodes themselves
    None,
    /// nginx, with deploy/nginx/stemedb.conf
    Nginx,
    /// Envoy, with deploy/envoy/stemedb.yaml
    Envoy,
}

impl Behind {
    /// The program, if there is one.
    pub fn kind(self) -> Option<balancer::Kind> {
        match self {
            Self::None => None,
            Self::Nginx => Some(balancer::Kind::Nginx),
            Self::Envoy => Some(balancer::Kind::Envoy),
        }
    }
}

impl DrillKind {
    const SINGLE: [Self; 6] = [Self::Kill, Self::Drain, Self::Failover, Self::Partition, Self::Fsync, Self::Stall];

    /// Its word in reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Drain => "drain",
            Self::Failover => "failover",
            Self::Partition => "partition",
            Self::Fsync => "fsync",
            Self::Stall => "stall",
            Self::All => "all",
        }
    }

    /// Whether it needs disks that fail on command.
    pub fn breaks_disks(self) -> bool {
        matches!(self, Self::Fsync | Self::Stall)
    }

    fn rounds(self) -> usize {
        match self {
            Self::Drain | Self::Partition => 5,
            Self::All => ROUNDS_OF_ALL,
            Self::Kill | Self::Failover | Self::Fsync | Self::Stall => 20,
        }
    }

    /// Why it must not be done to a cluster that others use, or cannot be done from here.
    fn why_not_on_existing(self) -> Option<&'static str> {
        match self {
            Self::Drain | Self::Failover => None,
            Self::Kill => Some("killing servers is done where they run, by whoever can start them again"),
            Self::Partition => Some("it would cut the network between your nodes"),
            Self::Fsync | Self::Stall => Some("it needs disks that fail on command, which yours hopefully do not"),
            Self::All => Some("it contains kinds that break more than an operator would"),
        }
    }
}

/// A cluster that was there before the drill.
pub struct Existing {
    /// Every node.
    pub nodes: Vec<Endpoint>,
    /// The load balancer for the clients.
    pub through: Option<Endpoint>,
}

impl DrillArgs {
    /// Rounds, as given or by the kind.
    pub fn rounds(&self) -> usize {
        self.rounds.unwrap_or_else(|| self.kind.rounds())
    }

    /// Clients, as given or by default.
    pub fn clients(&self) -> u32 {
        self.clients.unwrap_or(CLIENTS)
    }

    /// Operations offered a second, as far as that is known before the drill. A cluster in use is not to be loaded to
    /// its limits unless somebody says so.
    pub fn rate(&self) -> Option<f64> {
        let gentle = self.endpoints.is_some() && self.clients.is_none() && self.rate_fraction.is_none();
        self.rate.or(gentle.then_some(GENTLE_PER_S))
    }

    /// What the owner of a cluster in use must know before. `rate`: as it turned out to be.
    pub fn notice(&self, rate: Option<f64>, run: &str) -> Option<String> {
        self.endpoints.as_ref()?;
        let load = match rate {
            Some(rate) => format!("{rate:.0} operations a second"),
            None => format!("as many operations as {} clients get done", self.clients()),
        };
        let bytes = self.value;
        Some(format!(
            "the drill makes {load}; seven of eight are writes with values of {bytes} bytes, which stay in the cluster, \
             below drill/{run}/"
        ))
    }

    /// The existing cluster, if one is to be drilled.
    pub fn existing(&self) -> Result<Option<Existing>, CliError> {
        let Some(endpoints) = &self.endpoints else { return Ok(None) };
        let nodes = parse_endpoints(endpoints).map_err(CliError::Usage)?;
        let through = self.through.as_deref().map(Endpoint::parse).transpose().map_err(CliError::Usage)?;
        Ok(Some(Existing { nodes, through }))
    }

    fn check(&self) -> Result<(), CliError> {
        let usage = |text: String| Err(CliError::Usage(text));
        if !(1..=10_000).contains(&self.rounds()) || !(1..=3000).contains(&self.clients()) {
            return usage("--rounds takes 1 to 10000, --clients 1 to 3000".to_owned());
        }
        if !(16..=1 << 20).contains(&self.value) {
            return usage(format!("--value {}: 16 to {} bytes", self.value, 1 << 20));
        }
        if self.rate_fraction.is_some_and(|share| !(0.01..=1.0).contains(&share)) {
            return usage("--rate-fraction takes 0.01 to 1".to_owned());
        }
        if self.rate.is_some_and(|rate| !(10.0..=100_000.0).contains(&rate)) {
            return usage("--rate takes 10 to 100000".to_owned());
        }
        if !(256..=1 << 20).contains(&self.disk_mb) {
            return usage("--disk-mb takes 256 to 1048576".to_owned());
        }
        if self.balancer.is_some() && self.behind == Behind::None {
            return usage("--balancer is the program for --behind nginx or envoy".to_owned());
        }
        if self.endpoints.is_none() {
            return Ok(());
        }
        if let Some(why) = self.kind.why_not_on_existing() {
            return usage(format!(
                "--kind {} is not for --endpoints: {why}. There are drain and failover",
                self.kind.word()
            ));
        }
        if self.behind != Behind::None || self.data.is_some() {
            return usage("--behind and --data are for a throw-away cluster; --through names your balancer".to_owned());
        }
        Ok(())
    }
}

/// Reports of several drills.
#[derive(Serialize)]
struct AllReport {
    kind: &'static str,
    passed: bool,
    drills: Vec<Box<RawValue>>,
    skipped: Vec<Skipped>,
}

/// A kind that could not be drilled here.
#[derive(Serialize)]
struct Skipped {
    kind: &'static str,
    why: String,
}

/// Runs the drill and prints the report, also of one that broke. Exit code 1 when anything was found.
pub async fn run(args: &DrillArgs) -> Result<(), CliError> {
    args.check()?;
    let mut stop = StopSignals::with_hangup()?;
    let (done, skipped, error) = match args.kind {
        DrillKind::All => {
            let (done, skipped) = all(args, &mut stop).await?;
            (done, skipped, None)
        }
        _ => match drill_run::run(args, &mut stop).await {
            Ok(done) => (vec![done], Vec::new(), None),
            Err(error) => (vec![Done::failed(args.kind.word(), &error)?], Vec::new(), Some(error)),
        },
    };
    let passed = done.iter().all(|done| done.passed);
    if let Some(file) = &args.html {
        let sections: Vec<&str> = done.iter().map(|done| done.html.as_str()).collect();
        let left_out: Vec<String> = skipped.iter().map(|each| format!("{}: {}", each.kind, each.why)).collect();
        std::fs::write(file, drill_html::page(&sections, passed, &left_out))
            .map_err(|error| CliError::Local(format!("{}: {error}", file.display())))?;
    }
    if args.json {
        let json = match done.as_slice() {
            [one] if args.kind != DrillKind::All => one.json.get().to_owned(),
            _ => {
                let drills = done.into_iter().map(|done| done.json).collect();
                let report = AllReport { kind: "all", passed, drills, skipped };
                serde_json::to_string(&report)
                    .map_err(|error| CliError::Local(format!("cannot write the report: {error}")))?
            }
        };
        output::line(&json)?;
    } else {
        for done in &done {
            output::line(&done.text)?;
        }
    }
    if let Some(error) = error {
        return Err(error);
    }
    if stop.caught() {
        return Err(drill_run::interrupted());
    }
    if passed {
        return Ok(());
    }
    Err(CliError::Found("the drill found what must not happen".to_owned()))
}

/// Every kind that this machine can do, one after the other: the next one too when one could not be carried out.
async fn all(args: &DrillArgs, stop: &mut StopSignals) -> Result<(Vec<Done>, Vec<Skipped>), CliError> {
    let (mut all, mut skipped) = (Vec::new(), Vec::new());
    for kind in DrillKind::SINGLE {
        let args = DrillArgs { kind, rounds: Some(args.rounds()), ..args.clone() };
        let data = args.data.as_ref().map(|data| data.join(kind.word()));
        let args = DrillArgs { data, ..args };
        let why_not = match args.check() {
            Ok(()) if kind.breaks_disks() => why_no_disks(&args),
            Ok(()) => None,
            Err(error) => Some(error.to_string()),
        };
        match why_not {
            Some(why) => {
                output::notice(&format!("{} is left out: {why}", kind.word()));
                skipped.push(Skipped { kind: kind.word(), why });
            }
            None => {
                output::notice(&format!("{}: {} rounds", kind.word(), args.rounds()));
                let done = match drill_run::run(&args, stop).await {
                    Ok(done) => done,
                    Err(error) => {
                        output::notice(&format!("{} could not be carried out: {error}", kind.word()));
                        Done::failed(kind.word(), &error)?
                    }
                };
                all.push(done);
                if stop.caught() {
                    break;
                }
            }
        }
    }
    Ok((all, skipped))
}

fn why_no_disks(args: &DrillArgs) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("mounting disks that fail needs root".to_owned());
    }
    super::faulty_disk::find_program(args.faulty_disk.as_deref()).err().map(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: DrillArgs,
    }

    fn checked(line: &str) -> Result<DrillArgs, String> {
        let words = std::iter::once("drill").chain(line.split_whitespace());
        let args = Line::try_parse_from(words).map_err(|error| error.to_string())?.args;
        args.check().map(|()| args).map_err(|error| error.to_string())
    }

    #[test]
    fn a_cluster_in_use_is_only_drilled_as_operators_do() {
        for kind in ["drain", "failover"] {
            let args = checked(&format!("--kind {kind} --endpoints a:1,b:1,c:1 --through d:8080")).unwrap();
            let existing = args.existing().unwrap().unwrap();
            assert_eq!((existing.nodes.len(), existing.through.unwrap().authority()), (3, "d:8080"));
        }
        for kind in ["kill", "partition", "fsync", "stall", "all"] {
            let refused = checked(&format!("--kind {kind} --endpoints a:1,b:1,c:1")).unwrap_err();
            assert!(refused.contains(&format!("--kind {kind} is not for --endpoints: ")), "{refused}");
        }
        assert!(checked("--kind drain --endpoints a:1 --behind nginx").unwrap_err().contains("--through"));
        assert!(checked("--kind drain --through a:1").is_err());
    }

    #[test]
    fn a_cluster_in_use_gets_little_load_unless_more_is_asked_for() {
        let of = |line: &str| {
            let args = checked(line).unwrap();
            (args.rate(), args.clients())
        };
        assert_eq!(of(""), (None, 64));
        assert_eq!(of("--kind drain --endpoints a:1,b:1,c:1").0, Some(100.0));
        assert_eq!(of("--kind drain --endpoints a:1,b:1,c:1 --rate 500").0, Some(500.0));
        assert_eq!(of("--kind drain --endpoints a:1,b:1,c:1 --clients 16"), (None, 16));
        assert_eq!(of("--kind drain --endpoints a:1,b:1,c:1 --rate-fraction 0.5").0, None);
        assert_eq!(of("--rate 500").0, Some(500.0));
        let notice = |line: &str| checked(line).unwrap().notice(Some(100.0), "7");
        assert!(notice("--kind drain --endpoints a:1").is_some_and(|said| said.contains("drill/7/")));
        assert_eq!(notice(""), None);
    }

    #[test]
    fn each_kind_has_its_rounds_and_its_limits() {
        let rounds = |line: &str| checked(line).unwrap().rounds();
        assert_eq!((rounds(""), rounds("--kind drain"), rounds("--kind all")), (20, 5, 3));
        assert_eq!(rounds("--kind drain --rounds 2 --behind envoy"), 2);
        for (line, why) in [
            ("--balancer /usr/sbin/nginx", "--behind"),
            ("--rounds 0", "--rounds takes"),
            ("--clients 0", "--clients"),
            ("--value 4", "--value 4"),
            ("--rate-fraction 2", "--rate-fraction"),
            ("--rate 1", "--rate takes"),
            ("--rate 100 --clients 5", "--clients"),
        ] {
            let refused = checked(line).unwrap_err();
            assert!(refused.contains(why), "{line}: {refused}");
        }
    }
}
