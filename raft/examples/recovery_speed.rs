//! How fast a log is recovered: writes one of the given size, opens it, prints MB/s.
//!
//! `cargo run --release -p stemedb-raft --example recovery_speed -- [MIB] [PAYLOAD_BYTES] [DIR]`
#![allow(clippy::print_stdout, clippy::disallowed_methods, missing_docs)]

use std::{error::Error, path::PathBuf, time::Instant};

use openraft::{
    EntryPayload,
    storage::{IOFlushed, RaftLogStorage},
    type_config::TypeConfigExt,
};
use stemedb_raft::{Entry, EntryData, TypeConfig, WalOptions, WalStore, disk::RealDisk, frame::log_id};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let mib: u64 = args.next().map_or(Ok(1024), |a| a.parse())?;
    let payload: usize = args.next().map_or(Ok(10_000), |a| a.parse())?;
    let given: Option<PathBuf> = args.next().map(Into::into);
    let dir = given.unwrap_or_else(|| std::env::temp_dir().join(format!("stemedb-recovery-{}", std::process::id())));
    std::fs::create_dir_all(&dir)?;
    let (mut store, _) = WalStore::open(RealDisk::new(), WalOptions::new(&dir))?;
    let data = EntryData(vec![7u8; payload].into());
    let entries = mib * 1024 * 1024 / (payload as u64 + 72);
    let mut next = 0;
    while next < entries {
        let end = (next + 200).min(entries);
        let make = |i| Entry { log_id: log_id(1, i), payload: EntryPayload::Normal(data.clone()) };
        let (tx, rx) = TypeConfig::oneshot();
        store.append((next..end).map(make).collect::<Vec<_>>(), IOFlushed::signal(tx)).await?;
        rx.await??;
        next = end;
    }
    store.handle().close()?;
    drop(store);
    let start = Instant::now();
    let (store, report) = WalStore::open(RealDisk::new(), WalOptions::new(&dir))?;
    let took = start.elapsed();
    let mb = report.bytes_read as f64 / 1e6;
    println!(
        "{} entries of {payload} bytes in {} segments: {mb:.0} MB read in {:.3} s, {:.0} MB/s",
        report.entries,
        report.segments,
        took.as_secs_f64(),
        mb / took.as_secs_f64()
    );
    store.handle().close()?;
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
