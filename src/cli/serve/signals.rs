//! SIGTERM and SIGINT, from the start of the process to its end.
//!
//! They are taken once, before anything that takes long: a signal counts while a node is still opening its files, or
//! starts anew in another folder, and also for process 1 of a container, which the kernel spares every signal that it does
//! not take.

use std::{io, process};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

use super::EXIT_FAILED;

/// Whether the process was told to stop.
pub type Told = watch::Receiver<bool>;

/// Takes both signals from now on. The second one ends the process at once, whatever it does.
pub fn listen() -> io::Result<Told> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (tell, told) = watch::channel(false);
    tokio::spawn(async move {
        let first = next(&mut terminate, &mut interrupt).await;
        tracing::info!("{first}: stopping");
        tell.send_replace(true);
        next(&mut terminate, &mut interrupt).await;
        tracing::warn!("second signal: ending at once");
        process::exit(i32::from(EXIT_FAILED));
    });
    Ok(told)
}

/// Returns once the process was told to stop.
pub async fn told(told: &mut Told) {
    // Never an error: its sender lives as long as the process.
    let _told = told.wait_for(|told| *told).await;
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
