//! `stemedb-faulty-disk`: an ext4 whose disk fails on command, for drills and tests. Needs root.
//!
//! ```text
//! stemedb-faulty-disk --dir DIR --mount FOLDER --size-mb 512
//! {"do":"add","rule":{"on":["write"],"ranges":[[0,4096]],"action":{"fail":"EIO"},"times":1}}
//! {"do":"clear","held":"failed"}
//! ```
//!
//! Commands come as lines on the standard input, answers go to the standard output
//! (`cli::faulty_disk::wire`). Everything that reaches the disk is noted in `DIR/io.log`. When the
//! standard input ends, or on SIGINT and SIGTERM, everything is unmounted and the program ends: so
//! nothing stays mounted after a parent that died. Never part of a server.
#![allow(clippy::multiple_crate_versions)]

mod disk;
mod files;
mod ground;
mod watch;

use std::io::BufRead;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{SyncSender, sync_channel};

use clap::Parser;
use stemedb::cli::faulty_disk::wire::{Command, Held, Reply};
use stemedb::cli::output;
use tokio::signal::unix::{SignalKind, signal};

use ground::Ground;
use watch::Watch;

/// An ext4 whose disk fails on command, for drills and tests. Needs root, /dev/fuse and loop devices.
#[derive(Parser, Debug)]
#[command(name = "stemedb-faulty-disk", version)]
struct Args {
    /// Folder for the image, the log and mount points of its own
    #[arg(long)]
    dir: PathBuf,
    /// Where the file system is mounted; made if absent
    #[arg(long)]
    mount: PathBuf,
    /// Size of the disk in MiB; the image takes what is written
    #[arg(long, default_value_t = 512)]
    size_mb: u64,
}

enum Event {
    Line(String),
    End,
}

/// Commands waiting: a parent sends the next one after the answer.
const WAITING_MAX: usize = 16;

fn main() -> ExitCode {
    let args = Args::parse();
    let (events, received) = sync_channel(WAITING_MAX);
    // Before anything is mounted: from here on a signal ends it properly.
    if let Err(error) = catch_signals(events.clone()) {
        return failed(&format!("cannot catch signals: {error}"));
    }
    let absolute = |path: &PathBuf| std::path::absolute(path).map_err(|error| error.to_string());
    let raised = absolute(&args.dir)
        .and_then(|dir| Ok((ground::raise(&dir, &absolute(&args.mount)?, args.size_mb << 20)?, dir)));
    let (mut ground, dir) = match raised {
        Ok(raised) => raised,
        Err(why) => return failed(&why),
    };
    let device = ground.note.device.clone().unwrap_or_default();
    let watch = Watch::new(&dir, &device);
    if let Ok(watch) = &watch {
        ground.note.trace = Some((watch.instance.clone(), watch.tracefs.clone()));
        if let Err(why) = ground::keep(&ground.note) {
            output::notice(&why);
        }
    }
    let mut talking = output::json(&Reply::Ready { device, unwatched: watch.as_ref().err().cloned() }).is_ok();
    std::thread::spawn(move || read_lines(&events));
    while talking {
        match received.recv() {
            Ok(Event::Line(line)) => talking = output::json(&answer(&ground, watch.as_ref(), &line)).is_ok(),
            Ok(Event::End) | Err(_) => break,
        }
    }
    ground.disk.clear(Held::Failed);
    ground::take_down(&ground.note);
    ground::forget(std::process::id());
    // The session would unmount once more.
    std::process::exit(0)
}

fn answer(ground: &Ground, watch: Result<&Watch, &String>, line: &str) -> Reply {
    let error = |why: String| Reply::Error { why };
    let watched = || watch.map_err(Clone::clone);
    match serde_json::from_str(line) {
        Err(why) => error(format!("not a command: {why}")),
        Ok(Command::Add { rule }) => {
            ground.disk.add(rule);
            Reply::Ok
        }
        Ok(Command::Clear { held }) => {
            ground.disk.clear(held);
            Reply::Ok
        }
        Ok(Command::Status) => Reply::Status(ground.disk.counts()),
        Ok(Command::WatchSyncs) => match watched().and_then(|watch| watch.begin().map_err(|why| why.to_string())) {
            Ok(()) => Reply::Ok,
            Err(why) => error(why),
        },
        Ok(Command::Syncs) => match watched().and_then(|watch| watch.calls().map_err(|why| why.to_string())) {
            Ok(calls) => Reply::Syncs { calls },
            Err(why) => error(why),
        },
    }
}

fn read_lines(events: &SyncSender<Event>) {
    for line in std::io::stdin().lock().lines() {
        match line {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                if events.send(Event::Line(line)).is_err() {
                    return;
                }
            }
            Err(error) => {
                output::notice(&format!("standard input: {error}"));
                break;
            }
        }
    }
    let _ended_already = events.send(Event::End);
}

fn catch_signals(events: SyncSender<Event>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        let _ended_already = events.send(Event::End);
    });
    Ok(())
}

fn failed(why: &str) -> ExitCode {
    output::notice(&format!("stemedb-faulty-disk: {why}"));
    ExitCode::FAILURE
}

/// Ends at once; what is mounted is cleaned up by the next start.
fn give_up(why: &str) -> ! {
    output::notice(&format!("stemedb-faulty-disk: {why}"));
    std::process::exit(1)
}
