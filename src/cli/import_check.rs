//! `stemedb import-check`: does each node hold what the source says, no less and no more?
//!
//! Two comparisons on every node by itself. The number of facts below each first path segment of the
//! source must equal the number of records. And for a sample of concepts, chosen by a hash and so the
//! same every time, every record must be there exactly once with its value, and nothing beside it.
//! The source is read twice; memory is bounded by the sample.

use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::http_client::Client;
use super::import_source::Source;
use super::listing::each_fact;
use super::{CliError, EndpointArgs, output};

/// Differences printed for each node.
const DIFFERENCES_MAX: usize = 10;

/// Arguments of `stemedb import-check`.
#[derive(Args, Debug, Clone)]
pub struct ImportCheckArgs {
    /// The file that was imported
    #[arg(value_name = "FILE.ndjson")]
    pub file: PathBuf,
    /// Where the nodes are.
    #[command(flatten)]
    pub endpoints: EndpointArgs,
    /// Concepts that are compared in full
    #[arg(long, default_value_t = 1000)]
    pub sample: usize,
    /// Chooses another sample
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Compare the sample only, without counting everything
    #[arg(long)]
    pub no_count: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What was found on one node.
#[derive(Debug, Serialize)]
struct NodeResult {
    endpoint: String,
    /// Facts below each first segment: in the source and on the node.
    counts: BTreeMap<String, (u64, u64)>,
    concepts_compared: usize,
    concepts_different: usize,
    differences: Vec<String>,
}

impl NodeResult {
    fn is_equal(&self) -> bool {
        self.concepts_different == 0 && self.counts.values().all(|(source, node)| source == node)
    }
}

#[derive(Debug, Serialize)]
struct CheckReport {
    equal: bool,
    records: u64,
    nodes: Vec<NodeResult>,
}

#[derive(Deserialize)]
struct RecordBody {
    concept_path: String,
    predicate: String,
    value: Value,
    #[serde(default)]
    source: Option<String>,
}

/// A fact, comparable: predicate, source, value.
type FactText = (String, Option<String>, String);

/// What the file says.
struct Expected {
    records: u64,
    per_root: BTreeMap<String, u64>,
    sample: BTreeMap<String, Vec<FactText>>,
}

/// Compares and prints. Exit code 1 when something differs.
pub async fn run(args: &ImportCheckArgs) -> Result<(), CliError> {
    if args.file == Path::new("-") {
        return Err(CliError::Usage("import-check reads the file twice; give a file".to_owned()));
    }
    let endpoints = args.endpoints.parse()?;
    let (file, sample, seed) = (args.file.clone(), args.sample, args.seed);
    let expected = tokio::task::spawn_blocking(move || read_expected(&file, sample, seed))
        .await
        .map_err(|error| CliError::Local(format!("reading the source failed: {error}")))??;
    let mut nodes = Vec::new();
    for endpoint in endpoints {
        nodes.push(compare_node(Client::new(endpoint), &expected, !args.no_count).await?);
    }
    let report = CheckReport { equal: nodes.iter().all(NodeResult::is_equal), records: expected.records, nodes };
    if args.json {
        output::json(&report)?;
    } else {
        output::line(&text(&report))?;
    }
    if report.equal {
        return Ok(());
    }
    Err(CliError::Found("the cluster does not hold what the source says".to_owned()))
}

fn read_expected(file: &Path, sample: usize, seed: u64) -> Result<Expected, CliError> {
    let mut per_root: BTreeMap<String, u64> = BTreeMap::new();
    // The concepts with the smallest hashes: a max-heap of the best so far.
    let mut chosen: BinaryHeap<(u64, String)> = BinaryHeap::new();
    let mut known: HashSet<String> = HashSet::new();
    let mut source = Source::open(file)?;
    while let Some(record) = next_body(&mut source)? {
        let path = record.concept_path;
        let root = path.split('/').next().unwrap_or_default();
        match per_root.get_mut(root) {
            Some(count) => *count += 1,
            None => {
                per_root.insert(root.to_owned(), 1);
            }
        }
        let hash = xxh3_64_with_seed(path.as_bytes(), seed);
        let is_better = chosen.len() < sample || chosen.peek().is_some_and(|(worst, _)| hash < *worst);
        if is_better && !known.contains(&path) {
            known.insert(path.clone());
            chosen.push((hash, path));
            if chosen.len() > sample
                && let Some((_, dropped)) = chosen.pop()
            {
                known.remove(&dropped);
            }
        }
    }
    let records = source.position();
    let mut sample: BTreeMap<String, Vec<FactText>> = BTreeMap::new();
    let mut source = Source::open(file)?;
    while let Some(record) = next_body(&mut source)? {
        if known.contains(&record.concept_path) {
            let fact = (record.predicate, record.source, record.value.to_string());
            sample.entry(record.concept_path).or_default().push(fact);
        }
    }
    Ok(Expected { records, per_root, sample })
}

fn next_body(source: &mut Source) -> Result<Option<RecordBody>, CliError> {
    let Some(record) = source.next_unchecked()? else {
        return Ok(None);
    };
    serde_json::from_slice(&record.json).map(Some).map_err(|error| source.bad_line(record.line, &error.to_string()))
}

async fn compare_node(mut client: Client, expected: &Expected, count: bool) -> Result<NodeResult, CliError> {
    let endpoint = client.endpoint().authority().to_owned();
    let mut result = NodeResult {
        endpoint: endpoint.clone(),
        counts: BTreeMap::new(),
        concepts_compared: expected.sample.len(),
        concepts_different: 0,
        differences: Vec::new(),
    };
    let progress = ProgressBar::new(expected.sample.len() as u64);
    let style = ProgressStyle::with_template("{prefix}  {bar:30} {pos}/{len} {msg}  ETA {eta}");
    progress.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    progress.set_prefix(endpoint);
    progress.set_message("concepts");
    for (path, wanted) in &expected.sample {
        let mut found = Vec::new();
        each_fact(&mut client, path, |fact: RecordBody| found.push(fact)).await?;
        let found = found.into_iter().map(|fact| (fact.predicate, fact.source, fact.value.to_string()));
        let differences = differences(wanted, found);
        if !differences.is_empty() {
            result.concepts_different += 1;
        }
        for difference in differences {
            if result.differences.len() < DIFFERENCES_MAX {
                result.differences.push(format!("{path}: {difference}"));
            }
        }
        progress.inc(1);
    }
    if count {
        progress.set_length(expected.records);
        progress.set_position(0);
        progress.set_message("facts");
        progress.reset_eta();
        for (root, wanted) in &expected.per_root {
            let mut found = 0;
            each_fact(&mut client, &format!("{root}/**"), |_: RecordBody| {
                found += 1;
                progress.inc(1);
            })
            .await?;
            result.counts.insert(root.clone(), (*wanted, found));
        }
    }
    progress.finish_and_clear();
    Ok(result)
}

/// Multisets compared: what is missing, and what is there too often.
fn differences(wanted: &[FactText], found: impl Iterator<Item = FactText>) -> Vec<String> {
    let mut balance: HashMap<FactText, i64> = HashMap::new();
    for fact in wanted {
        *balance.entry(fact.clone()).or_insert(0) -= 1;
    }
    for fact in found {
        *balance.entry(fact).or_insert(0) += 1;
    }
    let mut different: Vec<(FactText, i64)> = balance.into_iter().filter(|(_, count)| *count != 0).collect();
    different.sort();
    let say = |((predicate, _, value), count): (FactText, i64)| {
        let value: String = value.chars().take(60).collect();
        if count < 0 {
            format!("{predicate} = {value} is missing")
        } else {
            format!("{predicate} = {value} is there {count} times too often")
        }
    };
    different.into_iter().map(say).collect()
}

fn text(report: &CheckReport) -> String {
    let mut table = output::table(["NODE", "FACTS", "IN SOURCE", "CONCEPTS COMPARED", "DIFFERENT"]);
    let mut details = String::new();
    for node in &report.nodes {
        let (counted, facts) = (!node.counts.is_empty(), node.counts.values().map(|(_, node)| node).sum());
        table.add_row([
            node.endpoint.clone(),
            if counted { output::thousands(facts) } else { "not counted".to_owned() },
            output::thousands(report.records),
            output::thousands(node.concepts_compared as u64),
            output::thousands(node.concepts_different as u64),
        ]);
        for difference in &node.differences {
            details.push_str(&format!("\n  {}: {difference}", node.endpoint));
        }
    }
    format!("{table}{details}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(predicate: &str, value: &str) -> FactText {
        (predicate.to_owned(), None, value.to_owned())
    }

    #[test]
    fn missing_and_doubled_facts_are_told_apart() {
        let wanted = [fact("a", "1"), fact("b", "2"), fact("b", "2")];
        assert!(differences(&wanted, wanted.clone().into_iter()).is_empty());
        let found = [fact("a", "1"), fact("a", "1"), fact("b", "2")];
        let said = differences(&wanted, found.into_iter());
        assert_eq!(said, ["a = 1 is there 1 times too often", "b = 2 is missing"]);
    }
}
