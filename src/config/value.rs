//! The types a key can have: how each is read, checked, described and written.
//!
//! A [`Kind`] holds the access to its field, so that reading a key, writing it back and describing
//! it cannot disagree about its type.

use std::path::PathBuf;

use super::{Config, LogFormat, LogLevel, MemberRole, PeerEntry};

/// A value as it was given, before its key has judged it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Given {
    Text(String),
    Integer(i128),
    Bool(bool),
    Peers(Vec<PeerEntry>),
    /// Something no key takes; the text names its type, for example `a date`.
    Other(&'static str),
}

/// Access to an integer field, whatever its width.
#[derive(Clone, Copy)]
pub(super) enum IntegerField {
    U32(fn(&mut Config) -> &mut u32),
    U64(fn(&mut Config) -> &mut u64),
    Usize(fn(&mut Config) -> &mut usize),
}

/// Type, range and field of a key.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Bool(fn(&mut Config) -> &mut bool),
    Integer {
        field: IntegerField,
        min: u64,
        max: u64,
        unit: &'static str,
    },
    /// 0 is stored as `None`: no limit.
    Limit {
        field: fn(&mut Config) -> &mut Option<u32>,
        max: u32,
        unit: &'static str,
    },
    Name(fn(&mut Config) -> &mut String),
    Address(fn(&mut Config) -> &mut String),
    OptionalAddress(fn(&mut Config) -> &mut Option<String>),
    Folder(fn(&mut Config) -> &mut PathBuf),
    OptionalFile(fn(&mut Config) -> &mut Option<PathBuf>),
    Level(fn(&mut Config) -> &mut LogLevel),
    Format(fn(&mut Config) -> &mut LogFormat),
    /// What a node is added as.
    Role(fn(&mut Config) -> &mut MemberRole),
    Peers(fn(&mut Config) -> &mut Vec<PeerEntry>),
}

const LEVELS: [(&str, LogLevel); 5] = [
    ("error", LogLevel::Error),
    ("warn", LogLevel::Warn),
    ("info", LogLevel::Info),
    ("debug", LogLevel::Debug),
    ("trace", LogLevel::Trace),
];

const ROLES: [(&str, MemberRole); 2] = [("voter", MemberRole::Voter), ("learner", MemberRole::Learner)];
const FORMATS: [(&str, LogFormat); 2] = [("text", LogFormat::Text), ("json", LogFormat::Json)];

/// A name travels in messages, file names and metric labels.
const NAME_BYTES_MAX: usize = 63;

/// More nodes than any cluster has; bounds what a mistaken list can ask for.
const PEERS_MAX: usize = 64;

impl Given {
    /// "the text \"x\"", "3", "true": how a message shows what it got.
    pub(super) fn shown(&self) -> String {
        match self {
            Given::Text(text) => format!("the text {:?}", shorten(text)),
            Given::Integer(number) => format!("the number {number}"),
            Given::Bool(flag) => format!("{flag}"),
            Given::Peers(peers) => format!("a list of {} nodes", peers.len()),
            Given::Other(name) => (*name).to_owned(),
        }
    }
}

/// Keeps a message readable when the value is not.
fn shorten(text: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 80;
    if text.chars().count() <= SHOWN_CHARS_MAX {
        return text.to_owned();
    }
    text.chars().take(SHOWN_CHARS_MAX).chain("…".chars()).collect()
}

impl IntegerField {
    fn set(self, config: &mut Config, number: u64) -> Result<(), String> {
        let fits = match self {
            IntegerField::U64(field) => {
                *field(config) = number;
                true
            }
            IntegerField::U32(field) => u32::try_from(number).map(|number| *field(config) = number).is_ok(),
            IntegerField::Usize(field) => usize::try_from(number).map(|number| *field(config) = number).is_ok(),
        };
        if fits { Ok(()) } else { Err(format!("{number} does not fit on this machine")) }
    }

    fn get(self, config: &mut Config) -> u64 {
        match self {
            IntegerField::U64(field) => *field(config),
            IntegerField::U32(field) => u64::from(*field(config)),
            IntegerField::Usize(field) => *field(config) as u64,
        }
    }
}

impl Kind {
    /// What the key accepts, for messages and documents.
    pub(super) fn accepted(&self) -> String {
        match self {
            Kind::Bool(_) => "true or false".into(),
            Kind::Integer { min, max, unit, .. } => format!("{min} to {max} {unit}"),
            Kind::Limit { max, unit, .. } => format!("1 to {max} {unit}, or 0 for no limit"),
            Kind::Name(_) => {
                format!("1 to {NAME_BYTES_MAX} lower-case letters, digits, '-', '_' or '.', a letter or digit first")
            }
            Kind::Address(_) => "host:port, for example 127.0.0.1:18180".into(),
            Kind::OptionalAddress(_) => {
                "host:port, for example 127.0.0.1:18280; the default is the HTTP port + 100".into()
            }
            Kind::Folder(_) => "an absolute path".into(),
            Kind::OptionalFile(_) => "an absolute path; empty for none".into(),
            Kind::Level(_) => one_of(&LEVELS),
            Kind::Format(_) => one_of(&FORMATS),
            Kind::Role(_) => one_of(&ROLES),
            Kind::Peers(_) => "one [[cluster.peers]] table with name, addr (host:port of its peer listener) \
                and http (host:port) per node, or the text name=addr/http,name=addr/http,…"
                .into(),
        }
    }

    /// Stores what was given, or says what is wrong with it.
    pub(super) fn set(&self, config: &mut Config, given: Given) -> Result<(), String> {
        let wrong = |given: &Given| Err(format!("{} is not accepted", given.shown()));
        match (self, given) {
            (Kind::Bool(field), Given::Bool(flag)) => *field(config) = flag,
            (Kind::Integer { field, min, max, .. }, Given::Integer(number)) => match u64::try_from(number) {
                Ok(number) if (*min..=*max).contains(&number) => field.set(config, number)?,
                _ => return Err(format!("{number} is out of range")),
            },
            (Kind::Limit { field, max, .. }, Given::Integer(number)) => match u32::try_from(number) {
                Ok(0) => *field(config) = None,
                Ok(number) if number <= *max => *field(config) = Some(number),
                _ => return Err(format!("{number} is out of range")),
            },
            (Kind::Name(field), Given::Text(text)) if is_name(&text) => *field(config) = text,
            (Kind::Address(field), Given::Text(text)) if split_address(&text).is_some() => {
                *field(config) = text;
            }
            (Kind::OptionalAddress(field), Given::Text(text)) if split_address(&text).is_some() => {
                *field(config) = Some(text);
            }
            (Kind::Folder(field), Given::Text(text)) if text.starts_with('/') => {
                *field(config) = text.into();
            }
            (Kind::OptionalFile(field), Given::Text(text)) if text.is_empty() => *field(config) = None,
            (Kind::OptionalFile(field), Given::Text(text)) if text.starts_with('/') => {
                *field(config) = Some(text.into());
            }
            (Kind::Level(field), Given::Text(text)) => match find(&LEVELS, &text) {
                Some(level) => *field(config) = level,
                None => return wrong(&Given::Text(text)),
            },
            (Kind::Format(field), Given::Text(text)) => match find(&FORMATS, &text) {
                Some(format) => *field(config) = format,
                None => return wrong(&Given::Text(text)),
            },
            (Kind::Role(field), Given::Text(text)) => match find(&ROLES, &text) {
                Some(role) => *field(config) = role,
                None => return wrong(&Given::Text(text)),
            },
            (Kind::Peers(field), Given::Peers(peers)) => *field(config) = checked_peers(peers)?,
            (_, given) => return wrong(&given),
        }
        Ok(())
    }

    /// Reads the text of a variable or flag as this key's type. What cannot be read as such stays
    /// text, and `set` refuses it with the key's own message.
    pub(super) fn read_text(&self, text: &str) -> Result<Given, String> {
        let trimmed = text.trim();
        Ok(match self {
            Kind::Bool(_) => match trimmed {
                "true" => Given::Bool(true),
                "false" => Given::Bool(false),
                _ => Given::Text(text.to_owned()),
            },
            Kind::Integer { .. } | Kind::Limit { .. } => match trimmed.parse::<i128>() {
                Ok(number) => Given::Integer(number),
                Err(_) => Given::Text(text.to_owned()),
            },
            Kind::Peers(_) => Given::Peers(parse_peers(trimmed)?),
            _ => Given::Text(trimmed.to_owned()),
        })
    }

    /// The field's value as the text a variable would have.
    pub(super) fn text(&self, config: &Config) -> String {
        // The accessors want `&mut`; a copy keeps this read-only for the caller.
        let config = &mut config.clone();
        match self {
            Kind::Bool(field) => field(config).to_string(),
            Kind::Integer { field, .. } => field.get(config).to_string(),
            Kind::Limit { field, .. } => field(config).unwrap_or(0).to_string(),
            Kind::Name(field) | Kind::Address(field) => field(config).clone(),
            Kind::OptionalAddress(field) => field(config).clone().unwrap_or_default(),
            Kind::Folder(field) => field(config).display().to_string(),
            Kind::OptionalFile(field) => {
                field(config).as_ref().map(|path| path.display().to_string()).unwrap_or_default()
            }
            Kind::Level(field) => name_of(&LEVELS, *field(config)),
            Kind::Format(field) => name_of(&FORMATS, *field(config)),
            Kind::Role(field) => name_of(&ROLES, *field(config)),
            Kind::Peers(field) => {
                let peers: Vec<String> =
                    field(config).iter().map(|peer| format!("{}={}/{}", peer.name, peer.addr, peer.http)).collect();
                peers.join(",")
            }
        }
    }

    /// The value as TOML writes it; `None` for what is written by absence or as tables.
    pub(super) fn toml(&self, config: &Config) -> Option<toml::Value> {
        let text = self.text(config);
        match self {
            Kind::Bool(_) => text.parse().ok().map(toml::Value::Boolean),
            Kind::Integer { .. } | Kind::Limit { .. } => text.parse().ok().map(toml::Value::Integer),
            Kind::Peers(_) => None,
            Kind::OptionalAddress(_) if text.is_empty() => None,
            _ => Some(toml::Value::String(text)),
        }
    }
}

fn one_of<T>(choices: &[(&str, T)]) -> String {
    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
    format!("one of {}", names.join(", "))
}

fn find<T: Copy>(choices: &[(&str, T)], text: &str) -> Option<T> {
    choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value)
}

fn name_of<T: Copy + PartialEq>(choices: &[(&str, T)], value: T) -> String {
    choices.iter().find(|(_, each)| *each == value).map(|(name, _)| (*name).to_owned()).unwrap_or_default()
}

pub(super) fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
    text.len() <= NAME_BYTES_MAX
        && text.bytes().all(allowed)
        && text.bytes().next().is_some_and(|first| first.is_ascii_lowercase() || first.is_ascii_digit())
}

/// Host (an IPv6 address keeps its brackets) and port.
pub(super) fn split_address(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port_is_digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    if !port_is_digits || host.is_empty() || host.len() > 253 {
        return None;
    }
    let port = port.parse().ok()?;
    let well_formed = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|inner| inner.parse::<std::net::Ipv6Addr>().is_ok()),
        None => host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)),
    };
    well_formed.then_some((host, port))
}

/// Whether only this machine can reach the address.
pub(super) fn is_loopback(address: &str) -> bool {
    let Some((host, _)) = split_address(address) else { return false };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// `name=addr/http,name=addr/http`; empty text is the empty list.
fn parse_peers(text: &str) -> Result<Vec<PeerEntry>, String> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (name, addresses) = part.split_once('=').ok_or_else(|| format!("{part:?} has no '='"))?;
            let (addr, http) =
                addresses.split_once('/').ok_or_else(|| format!("{part:?} has no '/' between its two addresses"))?;
            Ok(PeerEntry { name: name.trim().into(), addr: addr.trim().into(), http: http.trim().into() })
        })
        .collect()
}

fn checked_peers(peers: Vec<PeerEntry>) -> Result<Vec<PeerEntry>, String> {
    if peers.len() > PEERS_MAX {
        return Err(format!("{} nodes are listed, more than {PEERS_MAX}", peers.len()));
    }
    for (position, peer) in peers.iter().enumerate() {
        if !is_name(&peer.name) {
            return Err(format!("node {}: {:?} is no node name", position + 1, shorten(&peer.name)));
        }
        for (what, address) in [("addr", &peer.addr), ("http", &peer.http)] {
            if split_address(address).is_none_or(|(_, port)| port == 0) {
                let shown = shorten(address);
                return Err(format!("{}: {what} {shown:?} is not host:port with a port above 0", peer.name));
            }
        }
        for other in peers.iter().take(position) {
            if other.name == peer.name {
                return Err(format!("{} is listed twice", peer.name));
            }
            if other.addr == peer.addr || other.http == peer.http {
                return Err(format!("{} and {} share an address", other.name, peer.name));
            }
        }
        if peer.addr == peer.http {
            return Err(format!("{}: addr and http are the same address", peer.name));
        }
    }
    Ok(peers)
}
