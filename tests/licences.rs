//! Every crate that is linked has a licence that `deny.toml` allows, and comes from crates.io.
//!
//! `cargo deny` says the same and more, but needs a network for its advisories; this needs none.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::process::Command;

use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

fn packages() -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = if cfg!(target_arch = "aarch64") { "aarch64" } else { "x86_64" };
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform"])
        .arg(format!("{target}-unknown-linux-gnu"))
        // Built with it, its crates are here to be looked at.
        .args(cfg!(feature = "faulty-disk").then_some(["--features", "faulty-disk"]).into_iter().flatten())
        .current_dir(ROOT)
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap().clone();
    assert!(packages.len() > 50, "cargo metadata lists the whole tree");
    packages
}

fn allowed() -> Vec<String> {
    let text = std::fs::read_to_string(format!("{ROOT}/deny.toml")).unwrap();
    let deny: toml::Table = text.parse().unwrap();
    deny["licenses"]["allow"].as_array().unwrap().iter().map(|each| each.as_str().unwrap().to_owned()).collect()
}

/// Whether an SPDX expression can be satisfied with these licences. `A WITH B` counts as `A`, which
/// allows no less; `/` is the older way to write OR.
fn satisfied(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = tokens.as_slice();
    let result = any_of(&mut rest, allowed);
    assert!(rest.is_empty(), "not understood: {expression}");
    result
}

fn any_of(rest: &mut &[&str], allowed: &[String]) -> bool {
    let mut result = all_of(rest, allowed);
    while let ["OR", tail @ ..] = *rest {
        *rest = tail;
        result |= all_of(rest, allowed);
    }
    result
}

fn all_of(rest: &mut &[&str], allowed: &[String]) -> bool {
    let mut result = one(rest, allowed);
    while let ["AND", tail @ ..] = *rest {
        *rest = tail;
        result &= one(rest, allowed);
    }
    result
}

fn one(rest: &mut &[&str], allowed: &[String]) -> bool {
    match *rest {
        ["(", tail @ ..] => {
            *rest = tail;
            let result = any_of(rest, allowed);
            let [")", tail @ ..] = *rest else { panic!("a bracket is not closed") };
            *rest = tail;
            result
        }
        [name, "WITH", _, tail @ ..] | [name, tail @ ..] => {
            *rest = tail;
            allowed.iter().any(|each| each == name)
        }
        [] => panic!("an expression ends early"),
    }
}

#[test]
fn every_licence_is_allowed() {
    let allowed = allowed();
    let mut refused = Vec::new();
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        match package["license"].as_str() {
            Some(licence) if satisfied(licence, &allowed) => {}
            licence => refused.push(format!("{name}: {licence:?}")),
        }
    }
    assert!(refused.is_empty(), "licences that deny.toml does not allow: {refused:#?}");
}

#[test]
fn every_crate_comes_from_crates_io_or_from_here() {
    for package in packages() {
        let source = package["source"].as_str();
        assert!(source.is_none_or(|source| source == CRATES_IO), "{}: {source:?}", package["name"]);
    }
}

#[test]
fn expressions_are_understood() {
    let allowed = ["MIT".to_owned(), "Unicode-3.0".to_owned()];
    for (expression, expected) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("MIT AND GPL-3.0", false),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
        ("(Apache-2.0 OR GPL-3.0) AND MIT", false),
        ("MIT/Apache-2.0", true),
        ("Apache-2.0 WITH LLVM-exception OR MIT", true),
    ] {
        assert_eq!(satisfied(expression, &allowed), expected, "{expression}");
    }
}
