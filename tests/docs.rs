//! The documents speak of what exists, and leave nothing out.
//!
//! Metrics: every name in a document is one the program has, and every one it has is in
//! `docs/metrics.md` and is fed. Keys: every key that claims to do something is read by the program.
//! Links and paths lead somewhere.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use stemedb::config::keys::{InForce, KEYS};
use stemedb::metrics::Metrics;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` with this extension.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir(folder) else { return found };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|each| each == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The documents with their texts.
fn documents() -> Vec<(PathBuf, String)> {
    let root = root();
    let mut paths = vec![root.join("README.md"), root.join("CONTRIBUTING.md")];
    paths.extend(files(&root.join("docs"), "md"));
    paths.extend(files(&root.join("deploy"), "md"));
    paths.into_iter().map(|path| (path.clone(), std::fs::read_to_string(&path).unwrap())).collect()
}

/// Every `stemedb_…` or `process_…` name in the text. The crates' names are no metrics.
fn metric_names(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit() && c != '_')
        .filter(|word| word.starts_with("stemedb_") || word.starts_with("process_"))
        .filter(|word| !["stemedb_raft", "stemedb_net"].contains(word))
        .map(str::to_owned)
        .collect()
}

/// A line's name without what the types of metric add to it.
fn family<'a>(name: &'a str, known: &BTreeSet<String>) -> &'a str {
    let stripped = ["_sum", "_count", "_bucket"].iter().find_map(|suffix| name.strip_suffix(suffix));
    match stripped {
        Some(stripped) if known.contains(stripped) => stripped,
        _ => name,
    }
}

#[test]
fn metrics_in_documents_exist_and_existing_metrics_are_documented() {
    let known: BTreeSet<String> = Metrics::new().names().iter().map(|name| (*name).to_owned()).collect();
    for (path, text) in documents() {
        for name in metric_names(&text) {
            // A name that ends in `_` stands for a group, for example `stemedb_compaction_`.
            let is_group = name.ends_with('_') && known.iter().any(|each| each.starts_with(&name));
            assert!(is_group || known.contains(family(&name, &known)), "{}: there is no metric {name}", path.display());
        }
    }
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let listed: BTreeSet<String> = page.lines().filter(|line| line.starts_with("| `")).flat_map(metric_names).collect();
    for name in &known {
        assert!(listed.contains(name), "docs/metrics.md has no row for {name}");
    }
}

#[test]
fn rendered_lines_have_declared_names() {
    let metrics = Metrics::new();
    let known: BTreeSet<String> = metrics.names().iter().map(|name| (*name).to_owned()).collect();
    for line in metrics.render().lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        assert!(known.contains(family(name, &known)), "{line}");
    }
}

/// The code below `src`, comments and the given places left out.
fn program_without(left_out: &[&str]) -> String {
    let root = root();
    let is_left_out = |path: &PathBuf| left_out.iter().any(|place| path.starts_with(root.join(place)));
    let texts = files(&root.join("src"), "rs").into_iter().filter(|path| !is_left_out(path));
    let mut code = String::new();
    for text in texts.map(|path| std::fs::read_to_string(path).unwrap()) {
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            code.push_str(line);
            code.push('\n');
        }
    }
    code
}

/// Whether `.name` occurs, and not only as the beginning of a longer name.
fn uses(code: &str, name: &str) -> bool {
    let wanted = format!(".{name}");
    code.match_indices(&wanted)
        .any(|(at, _)| !code[at + wanted.len()..].starts_with(|next: char| next.is_alphanumeric() || next == '_'))
}

/// A key that nothing reads must say so (`InForce::NotYet`), or the documents promise what is not there.
#[test]
fn every_key_in_force_is_read_by_the_program() {
    // Reading the configuration is itself where this key takes effect.
    const JUDGED_ON_LOADING: [&str; 1] = ["http.insecure"];
    let code = program_without(&["src/config", "src/config.rs"]);
    let in_force = KEYS.iter().filter(|key| key.in_force == InForce::Yes);
    let idle: Vec<String> = in_force
        .filter(|key| !uses(&code, key.name) && !JUDGED_ON_LOADING.contains(&key.path().as_str()))
        .map(|key| key.path())
        .collect();
    assert!(idle.is_empty(), "nothing reads these keys; mark them NotYet in src/config/keys.rs: {idle:?}");
}

/// A metric that nobody feeds shows 0 for ever, which is worse than none.
#[test]
fn every_metric_is_fed() {
    const FED_BY: [&str; 10] = [
        "before_scrape",
        "entry_proposed",
        "http_request",
        "lock_waited",
        "set_assertions_indexed",
        "set_log_fsync_errors",
        "set_parked",
        "set_raft",
        "set_tree",
        "set_wal",
    ];
    let code = program_without(&["src/metrics", "src/metrics.rs"]);
    let idle: Vec<&str> = FED_BY.into_iter().filter(|method| !uses(&code, method)).collect();
    assert!(idle.is_empty(), "nothing calls these methods of Metrics: {idle:?}");
}

#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    for (path, text) in documents() {
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap();
            let file = target.split('#').next().unwrap();
            if file.is_empty() || target.contains("://") {
                continue;
            }
            if !path.parent().unwrap().join(file).exists() {
                broken.push(format!("{}: {target}", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "links to nothing: {broken:#?}");
}

/// Paths in backticks that begin with a folder of the repository exist.
#[test]
fn paths_in_documents_exist() {
    const FOLDERS: [&str; 8] = ["src/", "raft/", "net/", "deploy/", "docs/", "scripts/", "tests/", ".ci/"];
    let root = root();
    let mut missing = BTreeSet::new();
    for (path, text) in documents() {
        for quoted in text.split('`').skip(1).step_by(2) {
            let named = quoted.split_whitespace().next().unwrap_or_default();
            let is_path = FOLDERS.iter().any(|folder| named.starts_with(folder));
            let is_pattern = named.contains(['*', '<', '{', '…']);
            if is_path && !is_pattern && !root.join(named).exists() {
                missing.insert(format!("{}: {named}", path.strip_prefix(&root).unwrap().display()));
            }
        }
    }
    assert!(missing.is_empty(), "documents name what is not there: {missing:#?}");
}
