//! Ends a server when its parent is gone.
//!
//! The parent holds the other end of the standard input and never writes. When it ends, in whatever
//! way, the kernel closes the pipe; then this process sends itself SIGTERM and stops as it would for
//! an operator. A thread of its own waits, because a read of a pipe cannot be cancelled.

use std::io::Read;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use super::{CliError, output};

/// How long the clean stop may take before the process is killed: nobody is left to do it.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Starts the watch.
pub fn stop_when_stdin_ends() -> Result<(), CliError> {
    std::thread::Builder::new()
        .name("stdin-watch".to_owned())
        .spawn(watch)
        .map(|_detached| ())
        .map_err(|error| CliError::Local(format!("cannot start a thread: {error}")))
}

fn watch() {
    let mut ignored = [0_u8; 64];
    loop {
        match std::io::stdin().read(&mut ignored) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                output::notice(&format!("standard input: {error}"));
                break;
            }
        }
    }
    output::notice("the parent process is gone; stopping");
    for (signal, pause) in [(Signal::TERM, STOP_TIMEOUT), (Signal::KILL, Duration::ZERO)] {
        if let Err(error) = kill_process(getpid(), signal) {
            output::notice(&format!("cannot signal this process: {error}"));
        }
        std::thread::sleep(pause);
    }
}
