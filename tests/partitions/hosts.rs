//! Three hosts of one kernel: network namespaces on a bridge, each with a server process, and links that can be cut.

use std::{
    fmt::Write as _,
    fs::OpenOptions,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use stemedb::cli::http_client::Endpoint;

use super::rig;

/// How many hosts there are.
pub const HOSTS: usize = 3;
/// Short, so that a minority refuses soon; well above an election.
const REQUEST_DEADLINE_MS: u64 = 2000;

fn run(command: &str) -> Result<(), String> {
    let mut words = command.split(' ');
    let program = words.next().ok_or("no program")?;
    let mut done = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    done.args(words).env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let output = done.output().map_err(|e| format!("{command}: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// A server process. Stops when its standard input closes, so that none outlives the test.
struct Server {
    child: Child,
    _alive: Option<ChildStdin>,
}

/// The hosts. Everything is taken down when dropped.
pub struct Hosts {
    dir: tempfile::TempDir,
    bridge: String,
    /// `10.213.N`
    net: String,
    servers: Vec<Server>,
}

impl Hosts {
    /// `None`, said on the way, where namespaces cannot be had.
    pub fn new() -> Option<Hosts> {
        if !rustix::process::geteuid().is_root() {
            rig::skipped("network namespaces need root");
            return None;
        }
        for program in ["ip", "nft"] {
            if !rig::is_on_path(program) {
                rig::skipped(&format!("{program} is not installed"));
                return None;
            }
        }
        let pid = std::process::id();
        let hosts = Hosts {
            dir: tempfile::tempdir().unwrap(),
            bridge: format!("stb{pid}"),
            net: format!("10.213.{}", pid % 254),
            servers: Vec::new(),
        };
        match hosts.wire() {
            Ok(()) => Some(hosts),
            Err(why) if why.contains("not permitted") || why.contains("not supported") => {
                rig::skipped(&format!("this kernel lends no network namespaces: {why}"));
                None
            }
            Err(why) => panic!("{why}"),
        }
    }

    fn namespace(&self, host: usize) -> String {
        format!("{}-{host}", self.bridge)
    }

    fn address(&self, host: usize) -> String {
        format!("{}.{}", self.net, host + 1)
    }

    fn wire(&self) -> Result<(), String> {
        let bridge = &self.bridge;
        run(&format!("ip link add {bridge} type bridge"))?;
        run(&format!("ip addr add {}.254/24 dev {bridge}", self.net))?;
        run(&format!("ip link set {bridge} up"))?;
        for host in 0..HOSTS {
            let (namespace, outside) = (self.namespace(host), format!("{bridge}h{host}"));
            run(&format!("ip netns add {namespace}"))?;
            run(&format!("ip link add {outside} type veth peer name eth0 netns {namespace}"))?;
            run(&format!("ip link set {outside} master {bridge}"))?;
            run(&format!("ip link set {outside} up"))?;
            run(&format!("ip -n {namespace} addr add {}/24 dev eth0", self.address(host)))?;
            run(&format!("ip -n {namespace} link set eth0 up"))?;
            run(&format!("ip -n {namespace} link set lo up"))?;
            let nft = format!("ip netns exec {namespace} nft");
            run(&format!("{nft} add table inet cuts"))?;
            run(&format!("{nft} add chain inet cuts arriving {{ type filter hook input priority 0 ; }}"))?;
        }
        Ok(())
    }

    /// Nothing that `from` sends arrives at `to` any more.
    pub fn cut(&self, from: usize, to: usize) {
        let (namespace, source) = (self.namespace(to), self.address(from));
        run(&format!("ip netns exec {namespace} nft add rule inet cuts arriving ip saddr {source} drop")).unwrap();
    }

    /// Cuts a link in both directions.
    pub fn cut_both(&self, one: usize, other: usize) {
        self.cut(one, other);
        self.cut(other, one);
    }

    /// Everything arrives again.
    pub fn heal(&self) {
        for host in 0..HOSTS {
            let namespace = self.namespace(host);
            run(&format!("ip netns exec {namespace} nft flush chain inet cuts arriving")).unwrap();
        }
    }

    /// Starts a server on each host.
    pub fn start(&mut self) {
        for host in 0..HOSTS {
            let file = self.write_config(host);
            let log = OpenOptions::new().create(true).append(true).open(self.log(host)).unwrap();
            let mut child = Command::new("ip")
                .args(["netns", "exec", &self.namespace(host), env!("CARGO_BIN_EXE_stemedb"), "serve", "--config"])
                .arg(file)
                .arg("--stop-on-stdin-eof")
                .stdin(Stdio::piped())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            let alive = child.stdin.take();
            self.servers.push(Server { child, _alive: alive });
        }
    }

    /// What the process on a host prints.
    pub fn log(&self, host: usize) -> std::path::PathBuf {
        self.dir.path().join(format!("node-{}.log", host + 1))
    }

    fn write_config(&self, host: usize) -> std::path::PathBuf {
        let folder = self.dir.path().join(format!("node-{}", host + 1));
        std::fs::create_dir_all(&folder).unwrap();
        let mut text = format!(
            "[node]\nname = \"node-{}\"\ndata_dir = \"{}\"\n\n[http]\nlisten = \"{}:18180\"\ninsecure = true\n\n\
             [storage]\nballast_mb = 0\nlow_water_mb = 100\n\n\
             [cluster]\nbootstrap_expect = {HOSTS}\nrequest_deadline_ms = {REQUEST_DEADLINE_MS}\n\
             stall_handoff_ms = 60000\nstall_fence_ms = 600000\ndrain_notice_ms = 0\nauto_rebuild = false\n",
            host + 1,
            path_text(&folder),
            self.address(host),
        );
        for peer in 0..HOSTS {
            let address = self.address(peer);
            write!(
                text,
                "\n[[cluster.peers]]\nname = \"node-{}\"\naddr = \"{address}:18280\"\nhttp = \"{address}:18180\"\n",
                peer + 1
            )
            .unwrap();
        }
        let file = folder.join("api.toml");
        std::fs::write(&file, text).unwrap();
        file
    }

    /// Where clients reach the hosts; no cut between hosts concerns them.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        (0..HOSTS).map(|host| Endpoint::parse(&format!("{}:18180", self.address(host))).unwrap()).collect()
    }
}

fn path_text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for server in &mut self.servers {
            if let Some(pid) = i32::try_from(server.child.id()).ok().and_then(Pid::from_raw) {
                let _gone = kill_process(pid, Signal::KILL);
            }
            let _ended = server.child.wait();
        }
        // Deleting a namespace deletes its end of the wire, and with it the other one.
        for host in 0..HOSTS {
            let _gone = run(&format!("ip netns del {}", self.namespace(host)));
        }
        let _gone = run(&format!("ip link del {}", self.bridge));
        if std::thread::panicking() {
            for host in 0..HOSTS {
                let text = std::fs::read_to_string(self.log(host)).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("--- node-{}\n{}", host + 1, lines[lines.len().saturating_sub(25)..].join("\n"));
            }
        }
    }
}
