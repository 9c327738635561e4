//! Reads everything again, slowly and around the page cache, and compares it with its hash.
//!
//! ```text
//! pass: list items of all sources ─► skip up to the saved position ─► verify one, wait, save position ─► …
//! ```
//!
//! A source lists what it has in a fixed order and verifies one item; the tree, the checkpoint and the
//! sealed segments of the log are sources. What a source finds it reports itself, to whoever repairs.
//! The scrubber knows only order, rate and progress. Its position is kept in a small file that carries no
//! meaning if it is lost: the pass then begins anew.

use std::collections::HashSet;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock;

/// Name of the position's file in the data folder.
pub const POSITION_FILE: &str = "scrub-position";
/// From the end of a pass to the begin of the next: rot is slow, and every pass costs the disk.
pub const PASS_EVERY_MS: u64 = 24 * 60 * 60 * 1000;
/// How often a waiting scrubber looks whether it is to stop, milliseconds.
const LOOK_MS: u64 = 50;

/// One thing to verify.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubItem {
    /// Its place in the order of its source; the same at the next start.
    pub key: String,
    /// Its file, for reports; items with the same inode are read once per pass.
    pub path: PathBuf,
    /// Bytes to read.
    pub bytes: u64,
}

/// What became of an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it was written.
    Sound,
    /// Compacted, purged or replaced meanwhile.
    Gone,
    /// The scrubber is to stop.
    Stopped,
    /// Not as it was written: the source has reported it.
    Damaged(String),
    /// It could not be read for a reason that says nothing about it.
    Unknown(String),
}

/// What can be scrubbed. Called from the scrubber's thread only.
pub trait ScrubSource: Send + Sync + 'static {
    /// `tree`, `checkpoint` or `wal`: a label of metrics, and the first part of the position.
    fn kind(&self) -> &'static str;
    /// Blocking. Everything there is now, ascending by `key`.
    fn items(&self) -> Vec<ScrubItem>;
    /// Blocking. Verifies one, and reports damage. Calls `after` with the bytes of each piece read, and
    /// ends with `Stopped` when that says so.
    fn verify(&self, item: &ScrubItem, after: &mut dyn FnMut(u64) -> ControlFlow<()>) -> Verdict;
}

/// Hears what the scrubber does, for metrics.
pub trait ScrubObserver: Send + Sync + 'static {
    /// So many more bytes were read.
    fn bytes_read(&self, bytes: u64);
    /// An item is damaged.
    fn damaged(&self, kind: &'static str);
    /// Of the pass under way, 0 to 1.
    fn progress(&self, part: f64);
    /// A pass came to its end.
    fn pass_done(&self, at_unix_ms: u64);
}

/// Time, so that tests choose it.
pub trait ScrubClock: Send + Sync + 'static {
    /// Milliseconds since some moment; never goes back.
    fn monotonic_ms(&self) -> u64;
    /// Milliseconds since 1970; may jump.
    fn unix_ms(&self) -> u64;
    /// Blocking. Waits so long, or until it is to stop.
    fn wait(&self, ms: u64, stop: &CancellationToken);
}

/// The machine's clocks.
#[derive(Debug, Default)]
pub struct RealClock;

impl ScrubClock for RealClock {
    fn monotonic_ms(&self) -> u64 {
        clock::monotonic_ms()
    }
    fn unix_ms(&self) -> u64 {
        clock::unix_ms()
    }
    fn wait(&self, ms: u64, stop: &CancellationToken) {
        let until_ms = clock::monotonic_ms().saturating_add(ms);
        while !stop.is_cancelled() {
            let left_ms = until_ms.saturating_sub(clock::monotonic_ms());
            if left_ms == 0 {
                return;
            }
            thread::sleep(Duration::from_millis(left_ms.min(LOOK_MS)));
        }
    }
}

/// How a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassEnd {
    /// Everything was looked at; this many items were damaged, of those looked at since it began here.
    Complete {
        /// Damaged items.
        damaged: u64,
    },
    /// It goes on from its position.
    Stopped,
}

/// See the module.
pub struct Scrubber {
    sources: Vec<Arc<dyn ScrubSource>>,
    position_path: PathBuf,
    position: Position,
    bytes_per_s: u64,
    /// Microseconds of the monotonic clock at which what was read has been paid for.
    paid_until_us: u64,
    observer: Arc<dyn ScrubObserver>,
    clock: Arc<dyn ScrubClock>,
    stop: CancellationToken,
}

impl Scrubber {
    /// `bytes_per_s` must not be 0: then there is nothing to scrub with. Sources in the order in which
    /// they are read.
    pub fn new(
        data_dir: &Path,
        sources: Vec<Arc<dyn ScrubSource>>,
        bytes_per_s: u64,
        observer: Arc<dyn ScrubObserver>,
        clock: Arc<dyn ScrubClock>,
        stop: CancellationToken,
    ) -> Scrubber {
        let position_path = data_dir.join(POSITION_FILE);
        let position = Position::load(&position_path);
        let bytes_per_s = bytes_per_s.max(1);
        Scrubber { sources, position_path, position, bytes_per_s, paid_until_us: 0, observer, clock, stop }
    }

    /// Blocking. Passes, one a day, until it is told to stop.
    pub fn run(&mut self) {
        if self.position.last_complete_unix_ms > 0 {
            self.observer.pass_done(self.position.last_complete_unix_ms);
        }
        while !self.stop.is_cancelled() {
            let wait_ms = self.position.wait_ms(self.clock.unix_ms());
            if wait_ms > 0 {
                self.clock.wait(wait_ms, &self.stop);
                continue;
            }
            if let PassEnd::Complete { damaged } = self.pass() {
                tracing::info!(damaged, "scrubbed everything");
            }
        }
    }

    /// Blocking. One pass, or the rest of one.
    pub fn pass(&mut self) -> PassEnd {
        let listed: Vec<(usize, ScrubItem)> = self
            .sources
            .iter()
            .enumerate()
            .flat_map(|(at, source)| source.items().into_iter().map(move |item| (at, item)))
            .collect();
        let bytes_total: u64 = listed.iter().map(|(_, item)| item.bytes).sum();
        let behind = self.position.after.clone();
        let place_behind = behind.and_then(|(kind, key)| {
            let at = self.sources.iter().position(|source| source.kind() == kind)?;
            Some((at, key))
        });
        let mut bytes_done = 0;
        let mut damaged = 0;
        let mut inodes = HashSet::new();
        self.show(bytes_done, bytes_total);
        for (at, item) in listed {
            let Some(source) = self.sources.get(at).cloned() else { continue };
            if place_behind.as_ref().is_some_and(|behind| (at, &item.key) <= (behind.0, &behind.1)) {
                bytes_done += item.bytes;
                continue;
            }
            let inode = inode_of(&item.path);
            if inode.is_none_or(|inode| !inodes.contains(&inode)) {
                match source.verify(&item, &mut |bytes| self.pay(bytes)) {
                    Verdict::Stopped => return PassEnd::Stopped,
                    Verdict::Sound => inodes.extend(inode),
                    Verdict::Gone => {}
                    Verdict::Damaged(what) => {
                        damaged += 1;
                        self.observer.damaged(source.kind());
                        tracing::error!(file = %item.path.display(), kind = source.kind(), "scrub found damage: {what}");
                    }
                    Verdict::Unknown(why) => {
                        tracing::warn!(file = %item.path.display(), "a file could not be scrubbed: {why}");
                    }
                }
            }
            bytes_done += item.bytes;
            self.show(bytes_done, bytes_total);
            self.position.after = Some((source.kind().to_owned(), item.key));
            self.position.save(&self.position_path);
            if self.stop.is_cancelled() {
                return PassEnd::Stopped;
            }
        }
        let now = self.clock.unix_ms();
        self.position = Position { after: None, last_complete_unix_ms: now };
        self.position.save(&self.position_path);
        self.observer.progress(1.0);
        self.observer.pass_done(now);
        PassEnd::Complete { damaged }
    }

    fn show(&self, done: u64, total: u64) {
        self.observer.progress(if total == 0 { 0.0 } else { done as f64 / total as f64 });
    }

    /// Waits until the bytes that were read fit into the rate.
    fn pay(&mut self, bytes: u64) -> ControlFlow<()> {
        self.observer.bytes_read(bytes);
        let now_us = self.clock.monotonic_ms().saturating_mul(1000);
        let cost_us = bytes.saturating_mul(1_000_000) / self.bytes_per_s;
        self.paid_until_us = self.paid_until_us.max(now_us).saturating_add(cost_us);
        let wait_ms = self.paid_until_us.saturating_sub(now_us) / 1000;
        if wait_ms > 0 {
            self.clock.wait(wait_ms, &self.stop);
        }
        if self.stop.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

fn inode_of(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// How far the pass under way has come, and when the last one ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Position {
    /// Kind and key of the last item that was looked at; `None` between passes.
    after: Option<(String, String)>,
    /// 0: never.
    last_complete_unix_ms: u64,
}

impl Position {
    /// Whatever cannot be read is a new beginning.
    fn load(path: &Path) -> Position {
        let Ok(text) = fs::read_to_string(path) else { return Position::default() };
        let mut lines = text.lines();
        let Some(last_complete_unix_ms) = lines.next().and_then(|line| line.parse().ok()) else {
            return Position::default();
        };
        let after = lines.next().and_then(|line| line.split_once(' '));
        Position { after: after.map(|(kind, key)| (kind.to_owned(), key.to_owned())), last_complete_unix_ms }
    }

    /// Not synced, and a failure loses nothing but the place.
    fn save(&self, path: &Path) {
        let after = self.after.as_ref().map(|(kind, key)| format!("{kind} {key}")).unwrap_or_default();
        let temporary = path.with_extension("new");
        let text = format!("{}\n{after}\n", self.last_complete_unix_ms);
        if let Err(error) = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path)) {
            tracing::debug!(%error, "the scrubber's position could not be kept");
        }
    }

    /// How long until the next pass; 0 while one is under way. A clock that went back does not count.
    fn wait_ms(&self, now_unix_ms: u64) -> u64 {
        if self.after.is_some() || now_unix_ms < self.last_complete_unix_ms {
            return 0;
        }
        self.last_complete_unix_ms.saturating_add(PASS_EVERY_MS).saturating_sub(now_unix_ms)
            * u64::from(self.last_complete_unix_ms > 0)
    }
}

#[cfg(test)]
#[path = "scrub_tests.rs"]
mod tests;
