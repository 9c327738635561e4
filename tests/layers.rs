//! The layers know only what is below them.
//!
//! `raft` and `net` never import each other and know neither HTTP nor the tree nor assertions; what
//! answers requests reaches the tree through `store_helpers` alone; what replicas must compute alike
//! asks no clock. Each rule names its reason, so that whoever breaks it learns why it is there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::{Path, PathBuf};

/// In these folders or files (tests left out), none of these names may occur in code.
struct Rule {
    places: &'static [&'static str],
    except: &'static [&'static str],
    forbidden: &'static [&'static str],
    why: &'static str,
}

/// A name is one identifier, or a path of several, as written: `state::engine`.
const RULES: &[Rule] = &[
    Rule {
        places: &["raft/src"],
        except: &[],
        forbidden: &["stemedb", "stemedb_net", "axum", "hyper", "lsm_tree", "NewAssertion", "concept_path"],
        why: "the log carries bytes; it knows neither the network nor what the bytes mean",
    },
    Rule {
        places: &["net/src"],
        except: &[],
        forbidden: &[
            "stemedb",
            "stemedb_raft",
            "openraft",
            "axum",
            "hyper",
            "lsm_tree",
            "NewAssertion",
            "concept_path",
        ],
        why: "the network carries bytes between nodes; it knows neither Raft nor what the bytes mean",
    },
    Rule {
        places: &["src/api", "src/cli", "src/judge"],
        except: &[],
        forbidden: &[
            "lsm_tree",
            "openraft",
            "stemedb_raft",
            "stemedb_net",
            "state::engine",
            "engine::lsm",
            "LsmEngine",
            "StateRead",
            "WriteBatch",
        ],
        why: "requests reach the tree through store_helpers and the log through the node, both of which check",
    },
    Rule {
        places: &["src/cli", "src/judge"],
        except: &["src/cli/serve.rs", "src/cli/serve"],
        forbidden: &["crate::node", "crate::state", "crate::store_helpers", "crate::api"],
        why: "commands and the judge see the database as clients do, over HTTP",
    },
    Rule {
        places: &["src/model"],
        except: &[],
        forbidden: &["tokio", "axum", "openraft", "lsm_tree", "clock", "crate::node", "crate::api", "crate::state"],
        why: "the model is rules about values and nothing else",
    },
    Rule {
        places: &["src/state/apply.rs", "src/state/apply", "src/state/key_table.rs", "src/state/key_table"],
        except: &[],
        forbidden: &["tokio", "openraft", "lsm_tree", "LsmEngine", "clock", "rand", "now_v7", "new_v4"],
        why: "every replica must compute the same: no clock, no chance",
    },
    Rule {
        places: &["src"],
        except: &["src/state/engine", "src/state/engine.rs"],
        forbidden: &["lsm_tree"],
        why: "the tree can be replaced in one folder",
    },
    Rule {
        places: &["src", "net/src", "raft/src"],
        except: &["raft/src/codec.rs"],
        forbidden: &["bincode"],
        why: "bincode is unmaintained and can be replaced in one file",
    },
    Rule {
        places: &["src", "net/src", "raft/src"],
        except: &[],
        forbidden: &["fuser"],
        why: "faults belong to the helper program in src/bin/stemedb-faulty-disk; no server has a switch for them",
    },
    Rule {
        places: &["src", "net/src", "raft/src"],
        except: &["src/metrics", "src/metrics.rs"],
        forbidden: &["prometheus"],
        why: "figures are told to observers; how they are shown is decided in one place",
    },
];

/// Dependencies that a manifest must not have.
const MANIFESTS: &[(&str, &[&str])] = &[
    ("raft/Cargo.toml", &["stemedb", "stemedb-net", "axum", "hyper", "lsm-tree", "prometheus"]),
    ("net/Cargo.toml", &["stemedb", "stemedb-raft", "openraft", "bincode", "axum", "hyper", "lsm-tree", "prometheus"]),
    ("Cargo.toml", &["bincode"]),
];

#[test]
fn layers_know_only_what_is_below_them() {
    let root = root();
    let mut broken = Vec::new();
    for rule in RULES {
        let files: Vec<PathBuf> = rule.places.iter().flat_map(|place| rust_files(&root.join(place))).collect();
        for file in files {
            let shown = file.strip_prefix(&root).unwrap();
            if rule.except.iter().any(|except| shown.starts_with(except)) {
                continue;
            }
            let text = std::fs::read_to_string(&file).unwrap();
            for name in found(&text, rule.forbidden) {
                broken.push(format!("{}: {name}: {}", shown.display(), rule.why));
            }
        }
    }
    assert!(broken.is_empty(), "layers are crossed:\n{}", broken.join("\n"));
}

#[test]
fn manifests_name_no_crate_of_another_layer() {
    for (manifest, forbidden) in MANIFESTS {
        let text = std::fs::read_to_string(root().join(manifest)).unwrap();
        let table: toml::Table = text.parse().unwrap();
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(toml::Value::Table(dependencies)) = table.get(section) else { continue };
            for name in dependencies.keys() {
                assert!(!forbidden.contains(&name.as_str()), "{manifest} must not depend on {name}");
            }
        }
    }
}

#[test]
fn a_planted_crossing_is_found() {
    let forbidden = &["lsm_tree", "state::engine"];
    for planted in [
        "use lsm_tree::Tree;",
        "use crate::state::engine::lsm::LsmEngine;",
        "fn f() { let t: lsm_tree::Tree; }",
        "use crate::state::{command, engine};",
        "use crate::{model::x, state::{command::{A, B}, engine::StateRead}};",
        "let s = \"//\"; use lsm_tree::Tree;",
    ] {
        assert!(!found(planted, forbidden).is_empty(), "{planted}");
    }
    for innocent in [
        "// use lsm_tree::Tree;",
        "/// Like `lsm_tree::Tree`.",
        "let s = \"lsm_tree\";",
        "let lsm_tree_like = 1; let engine = 2; let state = 3;",
        "/* lsm_tree */ let x = '\"'; let y = 'a';",
        "fn f() {}\n#[cfg(test)]\nmod tests { use lsm_tree::Tree; }",
    ] {
        assert_eq!(found(innocent, forbidden), Vec::<&str>::new(), "{innocent}");
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The Rust files at or below `place`, those that hold only tests left out.
fn rust_files(place: &Path) -> Vec<PathBuf> {
    if place.is_file() {
        return vec![place.to_owned()];
    }
    let Ok(entries) = std::fs::read_dir(place) else { return Vec::new() };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap_or_default();
        if stem == "tests" || stem == "bin" || stem.to_string_lossy().ends_with("_tests") {
            continue;
        }
        if path.is_dir() || path.extension().is_some_and(|extension| extension == "rs") {
            files.extend(rust_files(&path));
        }
    }
    files.sort();
    files
}

/// Those of the names that the code uses. Comments, texts and the module of tests at the end are not code.
fn found<'a>(text: &str, names: &[&'a str]) -> Vec<&'a str> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let tokens = tokens(code);
    let paths = paths(&tokens);
    let uses = |name: &str| {
        let wanted: Vec<&str> = name.split("::").collect();
        paths.iter().any(|path| path.windows(wanted.len()).any(|window| window == wanted))
    };
    names.iter().copied().filter(|name| uses(name)).collect()
}

/// Every path the code writes, groups written out: `a::{b, c::d}` gives `a`, `a::b` and `a::c::d`.
fn paths(tokens: &[String]) -> Vec<Vec<&str>> {
    let mut paths = Vec::new();
    // What a `::{` puts before each path inside its group; other braces put nothing.
    let mut groups: Vec<Vec<&str>> = vec![Vec::new()];
    let mut path: Vec<&str> = Vec::new();
    let mut joined = false;
    for token in tokens {
        let is_name = token.chars().next().is_some_and(|first| first.is_alphanumeric() || first == '_');
        match token.as_str() {
            "::" => joined = true,
            "{" => {
                groups.push(if joined { path.clone() } else { Vec::new() });
                paths.push(std::mem::take(&mut path));
                joined = false;
            }
            _ if is_name => {
                if !joined {
                    paths.push(std::mem::take(&mut path));
                    path.clone_from(groups.last().unwrap_or(&Vec::new()));
                }
                path.push(token);
                joined = false;
            }
            other => {
                paths.push(std::mem::take(&mut path));
                joined = false;
                if other == "}" && groups.len() > 1 {
                    groups.pop();
                }
            }
        }
    }
    paths.push(path);
    paths
}

/// Identifiers, `::` and single other characters, without comments and texts.
fn tokens(code: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = code;
    while let Some(first) = rest.chars().next() {
        let identifier = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let used = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(raw) = rest.strip_prefix("r#\"") {
            raw.find("\"#").map_or(rest.len(), |end| end + 5)
        } else if first == '"' {
            quoted_len(rest)
        } else if first == '\'' {
            // A character; a lifetime has no quote after it and leaves its name as a token.
            let mut chars = rest.char_indices().skip(1);
            match (chars.next(), chars.next()) {
                (Some((_, '\\')), _) => rest[2..].find('\'').map_or(1, |end| {
                    // `'\''` closes at the second quote.
                    if end == 0 { 4 } else { end + 3 }
                }),
                (Some(_), Some((at, '\''))) => at + 1,
                _ => 1,
            }
        } else if rest.starts_with("::") {
            tokens.push("::".to_owned());
            2
        } else if identifier > 0 {
            tokens.push(rest[..identifier].to_owned());
            identifier
        } else {
            if !first.is_whitespace() {
                tokens.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[used.min(rest.len())..];
    }
    tokens
}

fn quoted_len(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}
