//! `api.toml` of a node of a local cluster: written once, then only compared.
//!
//! A person may edit the file. The few keys that the cluster's shape depends on must fit the arguments;
//! where they do not, the start is refused with the key and both values, because starting with other
//! addresses or another list of peers would be another cluster over the same data.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use toml::{Table, Value};

use super::CliError;
use super::local_cluster::NodePlan;

/// Free space at which a node of a local cluster calls its disk full, MiB.
const LOW_WATER_MB: u64 = 200;

/// Room that each keeps for a full disk, MiB.
const BALLAST_MB: u64 = 16;

/// Writes `api.toml` if there is none; else checks that the existing one fits.
pub fn write_or_compare(node: &NodePlan, plan: &[NodePlan]) -> Result<(), CliError> {
    let file = node.config_file();
    let fail = |what: &str, error: &dyn std::fmt::Display| {
        CliError::Local(format!("{}: cannot {what}: {error}", file.display()))
    };
    let wanted = render(node, plan)?;
    let existing = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // `create_new`: a file that appeared meanwhile is somebody else's.
            let mut out =
                OpenOptions::new().write(true).create_new(true).open(&file).map_err(|error| fail("write", &error))?;
            out.write_all(wanted.as_bytes()).and_then(|()| out.sync_all()).map_err(|error| fail("write", &error))?;
            return Ok(());
        }
        Err(error) => return Err(fail("read", &error)),
    };
    if existing == wanted {
        return Ok(());
    }
    let existing: Table = existing.parse().map_err(|error: toml::de::Error| fail("read", &error.message()))?;
    let wanted: Table = wanted.parse().map_err(|error: toml::de::Error| fail("render", &error.message()))?;
    compare(&existing, &wanted, &file)
}

/// The file's text.
pub fn render(node: &NodePlan, plan: &[NodePlan]) -> Result<String, CliError> {
    let data_dir = node.dir.to_str().ok_or_else(|| {
        let dir = node.dir.display();
        CliError::Local(format!("{dir}: the folder's name must be valid UTF-8"))
    })?;
    let mut text = format!(
        "# Written by `stemedb dev`. Everything may be changed and added to, except name, data_dir,\n\
         # listen, peers and bootstrap_expect: with others this would be another cluster.\n\
         [node]\nname = {}\ndata_dir = {}\n\n[http]\nlisten = {}\n\n[cluster]\nbootstrap_expect = {}\n\
         # No load balancer has to notice that a node stops.\n\
         drain_notice_ms = 0\n\n\
         # A cluster for trying things leaves the disk to others.\n\
         [storage]\nlow_water_mb = {LOW_WATER_MB}\nballast_mb = {BALLAST_MB}\n",
        quoted(&node.name),
        quoted(data_dir),
        quoted(&node.http_addr()),
        plan.len(),
    );
    for peer in plan {
        text.push_str(&format!(
            "\n[[cluster.peers]]\nname = {}\naddr = {}\nhttp = {}\n",
            quoted(&peer.name),
            quoted(&peer.peer_addr()),
            quoted(&peer.http_addr()),
        ));
    }
    Ok(text)
}

fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

fn compare(existing: &Table, wanted: &Table, file: &Path) -> Result<(), CliError> {
    const KEYS: [(&str, &str); 5] = [
        ("node", "name"),
        ("node", "data_dir"),
        ("http", "listen"),
        ("cluster", "bootstrap_expect"),
        ("cluster", "peers"),
    ];
    for (section, key) in KEYS {
        let of = |table: &Table| table.get(section).and_then(|section| section.get(key)).cloned();
        let (found, want) = (of(existing), of(wanted));
        if found != want {
            let shown = |value: &Option<Value>| value.as_ref().map_or("nothing".to_owned(), Value::to_string);
            return Err(CliError::Local(format!(
                "{}: {section}.{key} is {}, but these arguments need {}.\n\
                 Nothing was started. Give the --data, --port and --nodes that this folder was made with; \
                 or, when the folder was moved, correct the file or delete it (it will be written anew).",
                file.display(),
                shown(&found),
                shown(&want),
            )));
        }
    }
    Ok(())
}
