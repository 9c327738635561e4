//! The command line: what each command takes, and what its exit code means.
//!
//! `serve` runs a node inside this process; every other command talks to nodes over HTTP only, as any
//! client would. Results go to standard output, progress and notices to standard error. `--json` makes
//! the result one line of JSON.
#![doc = include_str!("../../docs/exit-codes.md")]

pub mod balancer;
pub mod bench;
pub mod compact;
pub mod dev;
pub mod drain;
pub mod drill;
mod drill_disk;
mod drill_disk_report;
mod drill_drain;
mod drill_html;
mod drill_kill;
pub mod drill_load;
mod drill_open;
mod drill_partition;
mod drill_picture;
mod drill_report;
mod drill_run;
pub mod drill_watch;
pub mod failover;
pub mod faulty_disk;
pub mod flow_client;
pub mod http_client;
pub mod import;
pub mod import_check;
pub mod import_source;
pub mod job;
mod listing;
pub mod local_cluster;
mod local_config;
pub mod member;
pub mod output;
pub mod rebuild;
pub mod serve;
pub mod status;
mod stdin_watch;
pub mod wal;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser, Subcommand};

use crate::config::{Config, Override};
use crate::logging;
use http_client::Endpoint;

/// Below the help of every command.
const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 done, and something is not as it should be (unhealthy cluster, finding, difference);
2 wrong arguments; 3 no node answered; 4 refused or wrong input; 5 this machine (port, folder, process);
6 wrong configuration; 7 serve: the node ran and could not go on, or was told to stop twice; 8 serve: the disk hung for too long; 141 the reader of the output went away.";

/// Endpoints used when neither `--endpoints` nor `STEMEDB_ENDPOINTS` is given: those of `stemedb dev`.
pub const ENDPOINTS_DEFAULT: &str = "127.0.0.1:18180,127.0.0.1:18181,127.0.0.1:18182";

/// Where the client commands find their endpoints when no flag says so.
const ENDPOINTS_VARIABLE: &str = "STEMEDB_ENDPOINTS";

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Exit code 1: it worked, and what it looked at is wrong.
    #[error("{0}")]
    Found(String),
    /// Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// Exit code 3.
    #[error("{0}")]
    Unreachable(String),
    /// Exit code 4.
    #[error("{0}")]
    Refused(String),
    /// Exit code 5.
    #[error("{0}")]
    Local(String),
    /// Exit code 6.
    #[error("{0}")]
    Config(String),
    /// Exit code 141, said to nobody.
    #[error("the reader of the output went away")]
    OutputClosed,
}

impl CliError {
    /// The exit code, as documented above.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Found(_) => 1,
            Self::Usage(_) => 2,
            Self::Unreachable(_) => 3,
            Self::Refused(_) => 4,
            Self::Local(_) => 5,
            Self::Config(_) => 6,
            Self::OutputClosed => 141,
        }
    }
}

/// StemeDB: a replicated database for assertions.
#[derive(Parser, Debug)]
#[command(name = "stemedb", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// `stemedb-api`: the server alone.
#[derive(Parser, Debug)]
#[command(name = "stemedb-api", version, about = "A StemeDB server; the same as `stemedb serve`.")]
struct ApiCli {
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run one node
    Serve(ServeArgs),
    /// Run a whole cluster on this machine, in the foreground
    Dev(dev::DevArgs),
    /// Show the cluster's nodes
    Status(status::StatusArgs),
    /// Take a node out of traffic: not ready, no leadership, everything under way answered
    Drain(drain::DrainArgs),
    /// Put a node back into traffic
    Undrain(drain::UndrainArgs),
    /// Move leadership to another node
    Failover(failover::FailoverArgs),
    /// Add, remove and replace nodes, and show them
    #[command(subcommand)]
    Member(member::MemberCommand),
    /// Show and cancel drains, failovers, rebuilds and changes of the members
    #[command(subcommand)]
    Job(job::JobCommand),
    /// Compact the tree of a node
    Compact(compact::CompactArgs),
    /// Show what the trees of nodes hold
    Stats(compact::StatsArgs),
    /// Make a node anew from a replica
    Rebuild(rebuild::RebuildArgs),
    /// Load a file of assertions, exactly once, resumable
    Import(import::ImportArgs),
    /// Compare what the cluster holds with a file that was imported
    ImportCheck(import_check::ImportCheckArgs),
    /// Measure writes and reads
    Bench(bench::BenchArgs),
    /// Break a throw-away cluster under load and check that nothing was lost
    Drill(drill::DrillArgs),
    /// Verify, dump or cut single segments of a log, without a server
    #[command(subcommand)]
    Wal(wal::WalCommand),
    /// Print completions for a shell, for example: stemedb completions bash > /etc/bash_completion.d/stemedb
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

/// Arguments of `serve`.
#[derive(clap::Args, Debug, Clone)]
pub struct ServeArgs {
    /// Configuration file; default: /etc/stemedb/api.toml, or config.toml beside it
    #[arg(long, value_name = "FILE", env = "STEMEDB_CONFIG")]
    pub config: Option<std::path::PathBuf>,
    /// Set one key over file and environment, such as http.listen=127.0.0.1:9000; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Do not serve: make the tree anew from the newest local checkpoint and the log, and end
    #[arg(long)]
    pub rebuild_from_wal: bool,
    /// Folder of the log, for --rebuild-from-wal; default: that of the configuration
    #[arg(long, value_name = "DIR", requires = "rebuild_from_wal")]
    pub wal_path: Option<std::path::PathBuf>,
    /// Folder of the tree, for --rebuild-from-wal; default: that of the configuration
    #[arg(long, value_name = "DIR", requires = "rebuild_from_wal")]
    pub kv_path: Option<std::path::PathBuf>,
    /// Stop cleanly when standard input ends; for parents that must not leave servers behind
    #[arg(long, hide = true)]
    pub stop_on_stdin_eof: bool,
}

/// Where the nodes are, for every command that is a client.
#[derive(clap::Args, Debug, Clone)]
pub struct EndpointArgs {
    /// host:port of nodes, separated by commas
    #[arg(long, env = ENDPOINTS_VARIABLE, default_value = ENDPOINTS_DEFAULT)]
    pub endpoints: String,
}

impl EndpointArgs {
    /// The endpoints, at least one.
    pub fn parse(&self) -> Result<Vec<Endpoint>, CliError> {
        http_client::parse_endpoints(&self.endpoints).map_err(CliError::Usage)
    }
}

/// Runs `stemedb` with these arguments (the program's name first).
pub fn main_stemedb(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match parse::<Cli>(args) {
        Ok(cli) => run(cli.command),
        Err(error) => usage_error(&error),
    }
}

/// Runs `stemedb-api` with these arguments (the program's name first).
pub fn main_stemedb_api(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match parse::<ApiCli>(args) {
        Ok(cli) => run(Command::Serve(cli.serve)),
        Err(error) => usage_error(&error),
    }
}

fn parse<P: Parser>(args: impl IntoIterator<Item = OsString>) -> Result<P, clap::Error> {
    let matches = with_exit_codes(P::command()).try_get_matches_from(args)?;
    P::from_arg_matches(&matches)
}

/// Says below the help of a command, and of all of its own, what its exit codes mean.
fn with_exit_codes(command: clap::Command) -> clap::Command {
    if command.get_name() == "wal" {
        return command.after_help(wal::EXIT_CODES).mut_subcommands(|each| each.after_help(wal::EXIT_CODES));
    }
    command.after_help(EXIT_CODES).mut_subcommands(with_exit_codes)
}

/// `--help` and `--version` come through here too, with exit code 0.
fn usage_error(error: &clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    match error.print() {
        Ok(()) => ExitCode::from(code),
        Err(_output_closed) => ExitCode::from(CliError::OutputClosed.exit_code()),
    }
}

fn run(command: Command) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return report(&CliError::Local(format!("cannot start the runtime: {error}")));
        }
    };
    let outcome = runtime.block_on(async {
        match command {
            Command::Serve(args) => return serve_node(&args).await,
            Command::Dev(args) => dev::run(&args).await,
            Command::Status(args) => status::run(&args).await,
            Command::Drain(args) => drain::run(&args).await,
            Command::Undrain(args) => drain::run_undrain(&args).await,
            Command::Failover(args) => failover::run(&args).await,
            Command::Member(command) => member::run(&command).await,
            Command::Job(command) => job::run(&command).await,
            Command::Completions { shell } => completions(shell),
            Command::Compact(args) => compact::run(&args).await,
            Command::Stats(args) => compact::run_stats(&args).await,
            Command::Rebuild(args) => rebuild::run(&args).await,
            Command::Import(args) => import::run(&args).await,
            Command::ImportCheck(args) => import_check::run(&args).await,
            Command::Bench(args) => bench::run(&args).await,
            Command::Drill(args) => drill::run(&args).await,
            // With exit codes of its own, as the runbooks have them.
            Command::Wal(command) => return Ok(wal::run(command)),
        }
        .map(|()| ExitCode::SUCCESS)
    });
    // Blocking tasks, such as a read of standard input, must not hold up the end of a command.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| report(&error))
}

fn report(error: &CliError) -> ExitCode {
    if !matches!(error, CliError::OutputClosed) {
        output::notice(&format!("stemedb: {error}"));
    }
    ExitCode::from(error.exit_code())
}

/// Made from the description of the commands, so that they are always true.
fn completions(shell: clap_complete::Shell) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "stemedb", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())
}

async fn serve_node(args: &ServeArgs) -> Result<ExitCode, CliError> {
    let config = serve_config(args)?;
    if args.rebuild_from_wal {
        let _logging = logging::init(&config).map_err(|error| CliError::Local(format!("the log: {error}")))?;
        let request = serve::rebuild::RebuildRequest {
            wal_dir: args.wal_path.clone().unwrap_or_else(|| config.wal_dir()),
            kv_dir: args.kv_path.clone().unwrap_or_else(|| config.kv_dir()),
            lock_timeout_ms: config.storage.lock_timeout_ms,
        };
        return Ok(serve::rebuild::run(&request).await);
    }
    if args.stop_on_stdin_eof {
        stdin_watch::stop_when_stdin_ends()?;
    }
    // Held until the node has stopped: the last lines are still on their way to the file when it is dropped.
    let _logging = logging::init(&config).map_err(|error| CliError::Local(format!("the log: {error}")))?;
    Ok(serve::run(Arc::new(config)).await)
}

fn serve_config(args: &ServeArgs) -> Result<Config, CliError> {
    let overrides = args.set.iter().map(|text| parse_override(text)).collect::<Result<Vec<_>, _>>()?;
    // Of the tools, and no setting of a server; elsewhere an unknown variable is an error.
    let env = std::env::vars_os().filter(|(name, _)| name != ENDPOINTS_VARIABLE);
    Config::load(args.config.as_deref(), env, &overrides).map_err(|error| CliError::Config(error.to_string()))
}

/// `http.listen=127.0.0.1:9000` as section, key and value.
fn parse_override(text: &str) -> Result<Override, CliError> {
    let parts = text.split_once('=').and_then(|(path, value)| Some((path.split_once('.')?, value)));
    match parts {
        Some(((section, key), value)) if !section.is_empty() && !key.is_empty() => {
            Ok((section.to_owned(), key.to_owned(), value.to_owned()))
        }
        _ => Err(CliError::Usage(format!(
            "--set {text}: expected SECTION.KEY=VALUE, such as http.listen=127.0.0.1:9000"
        ))),
    }
}
