//! The file: found, read, and taken apart into settings that still know their lines.
//!
//! `api.toml` is the file's name; `config.toml` in the same folder is its older name and is read
//! when `api.toml` is absent. Nothing here judges a value: that is the key's business.

use std::io::Read;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::PeerEntry;
use super::error::{ConfigError, Origin, Problem};
use super::keys;
use super::load::{Setting, unknown_key, unknown_section};
use super::value::Given;

/// Where the file lies unless a flag says otherwise.
pub const DEFAULT_FILE: &str = "/etc/stemedb/api.toml";

const FILE_NAME: &str = "api.toml";
const OLDER_FILE_NAME: &str = "config.toml";

/// No configuration is this large; a mistaken path to a disk image is.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// What was found.
#[derive(Default)]
pub(super) struct Found {
    pub path: Option<PathBuf>,
    pub text: String,
    pub warnings: Vec<String>,
}

/// Reads the named file, or the default one if there is one.
pub(super) fn read(named: Option<&Path>) -> Result<Found, ConfigError> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    let older = path.with_file_name(OLDER_FILE_NAME);
    let has_older_name = path.file_name().is_some_and(|name| name == FILE_NAME);
    match read_text(path) {
        Ok(text) => {
            let mut warnings = Vec::new();
            if has_older_name && exists(&older)? {
                warnings.push(format!("{} is ignored because {} exists", older.display(), path.display()));
            }
            Ok(Found { path: Some(path.to_owned()), text, warnings })
        }
        Err(ConfigError::Read { source, .. }) if has_older_name && source.kind() == std::io::ErrorKind::NotFound => {
            if exists(&older)? {
                return Ok(Found { text: read_text(&older)?, path: Some(older), warnings: Vec::new() });
            }
            match named {
                Some(_) => Err(ConfigError::Read { path: path.to_owned(), source }),
                None => Ok(Found::default()),
            }
        }
        Err(error) => Err(error),
    }
}

fn exists(path: &Path) -> Result<bool, ConfigError> {
    path.try_exists().map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

fn read_text(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    let whole_file = |what: String, accepted: String, line| {
        let origin = Origin::File { path: path.to_owned(), line };
        ConfigError::Rejected(vec![Problem { origin, key: String::new(), what, accepted }])
    };
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(whole_file("the file is too large".into(), format!("at most {FILE_BYTES_MAX} bytes"), 1));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default();
        let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
        whole_file("not UTF-8 text".into(), "TOML in UTF-8".into(), line)
    })
}

/// Takes the text apart; problems go to `problems`, the rest is still read so that all are found.
pub(super) fn parse(path: &Path, text: &str, problems: &mut Vec<Problem>) -> Vec<Setting> {
    let reader = Reader { path, text };
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        // After a syntax error the rest of the file means nothing certain: report only the errors.
        problems.extend(errors.iter().map(|error| Problem {
            origin: reader.at(error.span().map_or(0, |span| span.start)),
            key: String::new(),
            what: error.message().replace('\n', ", "),
            accepted: "TOML 1.0".into(),
        }));
        return Vec::new();
    }
    let mut settings = Vec::new();
    for (section, body) in document.get_ref() {
        let origin = reader.at(section.span().start);
        let name = section.get_ref().as_ref();
        let DeValue::Table(body) = body.get_ref() else {
            problems.push(unknown_section(origin, name, "is not inside a section"));
            continue;
        };
        if !keys::sections().contains(&name) {
            problems.push(unknown_section(origin, name, "is not a section"));
            continue;
        }
        for (key_name, value) in body {
            let origin = reader.at(key_name.span().start);
            let written = key_name.get_ref().as_ref();
            match keys::find(name, written) {
                Some(key) => {
                    let given = reader.given(value.get_ref());
                    settings.push(Setting { key, written: format!("{name}.{written}"), origin, given });
                }
                None => problems.push(unknown_key(origin, name, written)),
            }
        }
    }
    // The parser sorts by name; people read from the top.
    settings.sort_by_key(|setting| match &setting.origin {
        Origin::File { line, .. } => *line,
        _ => 0,
    });
    settings
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Reader<'_> {
    fn at(&self, offset: usize) -> Origin {
        let before = self.text.as_bytes().iter().take(offset);
        Origin::File { path: self.path.to_owned(), line: 1 + before.filter(|byte| **byte == b'\n').count() }
    }

    fn given(&self, value: &DeValue<'_>) -> Result<Given, String> {
        Ok(match value {
            DeValue::String(text) => Given::Text(text.to_string()),
            DeValue::Boolean(flag) => Given::Bool(*flag),
            DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
                .map_or(Given::Other("a number too large"), Given::Integer),
            DeValue::Float(_) => Given::Other("a number with a fraction"),
            DeValue::Datetime(_) => Given::Other("a date"),
            DeValue::Table(_) => Given::Other("a table"),
            DeValue::Array(items) if items.iter().all(|item| matches!(item.get_ref(), DeValue::Table(_))) => {
                let peers: Result<Vec<PeerEntry>, String> =
                    items.iter().map(|item| self.peer(item.span().start, item.get_ref())).collect();
                Given::Peers(peers?)
            }
            DeValue::Array(_) => Given::Other("a list"),
        })
    }

    /// One `[[cluster.peers]]` table: three texts, nothing else. A message inside names its own line.
    fn peer(&self, offset: usize, value: &DeValue<'_>) -> Result<PeerEntry, String> {
        const FIELDS: &str = "a node has name, addr and http, all text";
        let line = |offset| match self.at(offset) {
            Origin::File { line, .. } => line,
            _ => 1,
        };
        let DeValue::Table(table) = value else { return Err(FIELDS.into()) };
        let mut peer = PeerEntry { name: String::new(), addr: String::new(), http: String::new() };
        for (field, value) in table {
            let line = line(field.span().start);
            let DeValue::String(text) = value.get_ref() else {
                return Err(format!("line {line}: {} is not text", field.get_ref()));
            };
            match field.get_ref().as_ref() {
                "name" => peer.name = text.to_string(),
                "addr" => peer.addr = text.to_string(),
                "http" => peer.http = text.to_string(),
                other => return Err(format!("line {line}: {other} is unknown; {FIELDS}")),
            }
        }
        for (field, text) in [("name", &peer.name), ("addr", &peer.addr), ("http", &peer.http)] {
            if text.is_empty() {
                return Err(format!("line {}: {field} is missing; {FIELDS}", line(offset)));
            }
        }
        Ok(peer)
    }
}
