//! The configuration written out: as a file, as variables, as a table for people.
//!
//! `.env.example` and the table of `docs/configuration.md` are compared with these texts by a test,
//! so that neither can fall behind the keys. `STEMEDB_TEST_WRITE_DOCS=1` makes that test write them.

use super::Config;
use super::keys::{InForce, KEYS, Key, OTHER_VARIABLES, sections};

impl Config {
    /// The configuration as a file that gives this configuration when it is read again. Keys at
    /// their default are left out.
    pub fn to_toml(&self) -> String {
        let default = Config::default();
        let mut text = String::new();
        for section in sections() {
            let mut body = String::new();
            for key in KEYS.iter().filter(|key| key.section == section) {
                if key.kind.text(self) == key.kind.text(&default) {
                    continue;
                }
                if let Some(value) = key.kind.toml(self) {
                    body.push_str(&format!("{} = {value}\n", key.name));
                }
            }
            if section == "cluster" {
                for peer in &self.cluster.peers {
                    // `toml::Value` quotes and escapes.
                    let quoted = |text: &str| toml::Value::String(text.to_owned());
                    body.push_str(&format!(
                        "\n[[cluster.peers]]\nname = {}\naddr = {}\nhttp = {}\n",
                        quoted(&peer.name),
                        quoted(&peer.addr),
                        quoted(&peer.http)
                    ));
                }
            }
            if !body.is_empty() {
                let gap = if text.is_empty() { "" } else { "\n" };
                text.push_str(&format!("{gap}[{section}]\n{body}"));
            }
        }
        text
    }
}

/// `.env.example`: every variable, commented out, with its default.
pub fn env_example() -> String {
    let mut text = String::from(
        "# Every environment variable that StemeDB reads, with its default. A variable wins over the file,\n\
         # a flag wins over a variable. A variable that is set and not listed here stops the start.\n\
         # A test keeps this list equal to the program's own; docs/configuration.md says more.\n",
    );
    for section in sections() {
        text.push_str(&format!("\n# [{section}]\n"));
        for key in KEYS.iter().filter(|key| key.section == section) {
            text.push_str(&format!("\n# {}\n# Accepted: {}\n", about(key), key.accepted()));
            if !key.aliases.is_empty() {
                text.push_str(&format!("# Same as: {}\n", key.alias_variables().join(", ")));
            }
            text.push_str(&format!("#{}={}\n", key.variable(), key.default_text()));
        }
    }
    text.push_str("\n# Not in the file\n");
    for (name, about) in OTHER_VARIABLES {
        let shown = if name.ends_with('_') { format!("{name}…") } else { format!("{name}=") };
        text.push_str(&format!("\n# {about}\n#{shown}\n"));
    }
    text
}

/// The table of `docs/configuration.md`.
pub fn markdown_table() -> String {
    let mut text = String::new();
    for section in sections() {
        text.push_str(&format!(
            "### `[{section}]`\n\n| key | default | accepted | what it does |\n|---|---|---|---|\n"
        ));
        for key in KEYS.iter().filter(|key| key.section == section) {
            let mut name = format!("`{}`", key.name);
            for alias in key.aliases {
                name.push_str(&format!(" (= `{alias}`)"));
            }
            let default = match key.default_text() {
                text if text.is_empty() => "none".to_owned(),
                text => format!("`{text}`"),
            };
            // A bar would end the cell.
            let cell = |text: String| text.replace('|', "\\|");
            text.push_str(&format!("| {name} | {default} | {} | {} |\n", cell(key.accepted()), cell(about(key))));
        }
        text.push('\n');
    }
    text.push_str("### Variables that are not in the file\n\n| variable | what it does |\n|---|---|\n");
    for (name, about) in OTHER_VARIABLES {
        let dots = if name.ends_with('_') { "…" } else { "" };
        text.push_str(&format!("| `{name}{dots}` | {about} |\n"));
    }
    text
}

fn about(key: &Key) -> String {
    match key.in_force {
        InForce::Yes => key.about.to_owned(),
        InForce::NotYet(missing) => format!("{} (Read and checked, without effect so far: {missing}.)", key.about),
    }
}
