//! Puts the layers on top of each other: defaults, file, environment, flags.
//!
//! Each layer is a list of settings; a later layer wins. Inside one layer a key may be given only
//! once, under whichever of its names.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::error::{ConfigError, Origin, Problem};
use super::keys::{self, KEYS, Key, OTHER_VARIABLES, VARIABLE_PREFIX};
use super::value::Given;
use super::{Config, check, file};

/// One value given by a flag: `section`, `key`, and the value as the environment would spell it.
pub type Override = (String, String, String);

/// One key with the value somebody gave it.
pub(super) struct Setting {
    pub key: &'static Key,
    /// The key as it was written, alias or not.
    pub written: String,
    pub origin: Origin,
    pub given: Result<Given, String>,
}

/// Where each key's value came from, by `section.name`; absent: the default.
pub(super) type Origins = HashMap<String, Origin>;

impl Config {
    /// Reads the configuration.
    ///
    /// `file`: the file to read; `None` reads `/etc/stemedb/api.toml` if there is one. `env`: the
    /// process's variables (`std::env::vars_os()`); those that do not begin with `STEMEDB_` are
    /// passed over. `overrides`: what flags say.
    ///
    /// # Errors
    /// The file cannot be read, or a key is unknown, of the wrong type or out of range, or two keys
    /// contradict each other. All problems are in the one error.
    pub fn load<K, V>(
        file: Option<&Path>,
        env: impl IntoIterator<Item = (K, V)>,
        overrides: &[Override],
    ) -> Result<Config, ConfigError>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let found = file::read(file)?;
        let mut problems = Vec::new();
        let mut config = Config { warnings: found.warnings, source: found.path, ..Config::default() };
        // 0 is "as many as are listed"; `check` puts the number in.
        config.cluster.bootstrap_expect = 0;
        let mut origins = Origins::new();

        let from_file = match &config.source {
            Some(path) => file::parse(path, &found.text, &mut problems),
            None => Vec::new(),
        };
        let env: Vec<(OsString, OsString)> = env.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        let layers = [from_file, from_env(env, &mut problems), from_flags(overrides, &mut problems)];
        for layer in layers {
            apply(layer, &mut config, &mut origins, &mut problems);
        }
        if problems.is_empty() {
            check::together(&mut config, &origins, &mut problems);
        }
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Rejected(problems)) }
    }
}

fn apply(layer: Vec<Setting>, config: &mut Config, origins: &mut Origins, problems: &mut Vec<Problem>) {
    let mut seen: HashMap<String, String> = HashMap::new();
    for Setting { key, written, origin, given } in layer {
        if let Some(other) = seen.insert(key.path(), written.clone()) {
            let what = format!("means the same as {other}, which is set too");
            problems.push(Problem { origin, key: written, what, accepted: "one of the two".into() });
            continue;
        }
        match given.and_then(|given| key.kind.set(config, given)) {
            Ok(()) => {
                origins.insert(key.path(), origin);
            }
            Err(what) => problems.push(Problem { origin, key: written, what, accepted: key.accepted() }),
        }
    }
}

fn from_env(env: Vec<(OsString, OsString)>, problems: &mut Vec<Problem>) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut names: Vec<(String, OsString)> = env
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| name.starts_with(VARIABLE_PREFIX))
        .collect();
    names.sort();
    for (name, value) in names {
        let origin = Origin::Env(name.clone());
        let key = KEYS.iter().find(|key| key.variable() == name || key.alias_variables().contains(&name));
        let Some(key) = key else {
            if !is_other_variable(&name) && !is_service_link(&name, &value) {
                problems.push(unknown_variable(origin, &name));
            }
            continue;
        };
        let given = match value.into_string() {
            Ok(text) => key.kind.read_text(&text),
            Err(_) => Err("is not UTF-8 text".into()),
        };
        settings.push(Setting { key, written: key.path(), origin, given });
    }
    settings
}

fn from_flags(overrides: &[Override], problems: &mut Vec<Problem>) -> Vec<Setting> {
    let mut settings = Vec::new();
    for (section, name, text) in overrides {
        let written = format!("{section}.{name}");
        let origin = Origin::Flag(written.clone());
        match keys::find(section, name) {
            Some(key) => settings.push(Setting { key, written, origin, given: key.kind.read_text(text) }),
            None if keys::sections().contains(&section.as_str()) => problems.push(unknown_key(origin, section, name)),
            None => problems.push(unknown_section(origin, section, "is not a section")),
        }
    }
    settings
}

fn is_other_variable(name: &str) -> bool {
    OTHER_VARIABLES.iter().any(|(other, _)| name == *other || (other.ends_with('_') && name.starts_with(other)))
}

/// Kubernetes gives every container `<SERVICE>_PORT`, `<SERVICE>_SERVICE_HOST` and the like for each
/// service of its namespace. A service called `stemedb` must not stop the start, and a mistaken
/// `STEMEDB_HTTP_PORT=8080` must: the links' value is a URL.
fn is_service_link(name: &str, value: &OsStr) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || (name.ends_with("_PORT") && value.to_string_lossy().contains("://"))
        || name.split_once("_PORT_").is_some_and(|(_, rest)| rest.contains("TCP") || rest.contains("UDP"))
}

pub(super) fn unknown_section(origin: Origin, name: &str, why: &str) -> Problem {
    let sections = keys::sections();
    let accepted = format!("the sections {}", sections.join(", "));
    let mut what = why.to_owned();
    // A key written above its section, or a section's name mistyped.
    if let Some(key) = KEYS.iter().find(|key| key.name == name || key.aliases.contains(&name)) {
        what.push_str(&format!("; did you mean {} in [{}]?", name, key.section));
    } else if let Some(near) = nearest(name, sections.iter().copied()) {
        what.push_str(&format!("; did you mean [{near}]?"));
    }
    Problem { origin, key: name.to_owned(), what, accepted }
}

pub(super) fn unknown_key(origin: Origin, section: &str, name: &str) -> Problem {
    let in_section = || KEYS.iter().filter(|key| key.section == section);
    let names = in_section().flat_map(|key| std::iter::once(key.name).chain(key.aliases.iter().copied()));
    let mut what = "is not a key".to_owned();
    if let Some(near) = nearest(name, names) {
        what.push_str(&format!("; did you mean {near}?"));
    } else if let Some(key) = KEYS.iter().find(|key| key.name == name) {
        what.push_str(&format!("; did you mean {name} in [{}]?", key.section));
    }
    let listed: Vec<&str> = in_section().map(|key| key.name).collect();
    Problem { origin, key: format!("{section}.{name}"), what, accepted: listed.join(", ") }
}

fn unknown_variable(origin: Origin, name: &str) -> Problem {
    let variables: Vec<String> = KEYS.iter().map(Key::variable).collect();
    let mut what = "is not a variable of this program".to_owned();
    if let Some(near) = nearest(name, variables.iter().map(String::as_str)) {
        what.push_str(&format!("; did you mean {near}?"));
    }
    Problem { origin, key: String::new(), what, accepted: "the variables listed in .env.example".into() }
}

/// The most similar name, if it is similar at all.
fn nearest<'a>(name: &str, choices: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const SIMILAR_ENOUGH: f64 = 0.75;
    let lower = name.to_lowercase();
    choices
        .map(|choice| (strsim::normalized_damerau_levenshtein(&lower, &choice.to_lowercase()), choice))
        .filter(|(similarity, _)| *similarity >= SIMILAR_ENOUGH)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, choice)| choice)
}
