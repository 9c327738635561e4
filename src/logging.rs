//! The program's own log: standard error always, a file as well when `logging.file` is set.
//!
//! `text` is for people; `json` writes one object per line with `timestamp`, `level`, `target` and
//! `message` at the top, so that `jq 'select(.level=="ERROR")'` finds the errors. The file is
//! written by a thread of its own behind a bounded queue: a stalled disk under the log file must
//! never stall the database. When the queue is full, lines are dropped from the file, counted, and
//! the count is written once the disk is back; standard error still has them.

mod repeats;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{FilterExt, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{Config, LogFormat, LogLevel, LoggingSection};

pub use repeats::suppressed_total;

/// Lines that may wait for the file: some seconds of a busy node at `debug`, a few MiB.
const QUEUE_LINES_MAX: usize = 16_384;

/// How long the end of the process waits for the file. A disk that needs longer has failed.
const FLUSH_WAIT: Duration = Duration::from_secs(2);

/// Libraries that say at each level what the next quieter one is for.
const QUIETER: [&str; 4] = ["openraft", "lsm_tree", "hyper", "hyper_util"];

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The file cannot be opened for appending.
    #[error("cannot open the log file {path}: {source}; logging.file needs a folder that exists and may be written", path = path.display())]
    Open {
        /// `logging.file`.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The writing thread cannot be started.
    #[error("cannot start the thread that writes the log file: {0}")]
    Thread(io::Error),
    /// The process has a log already.
    #[error("the log is set up already: {0}")]
    Twice(String),
}

/// Keeps the log. Dropping it writes out what the file still waits for.
#[must_use = "dropping it at the end of main writes out the rest of the log file"]
#[derive(Debug)]
pub struct Logging {
    file: Option<FileLines>,
}

/// Sets up the log of this process, and writes the configuration's warnings to it.
///
/// # Errors
/// The file cannot be opened, or a log is set up already.
pub fn init(config: &Config) -> Result<Logging, LoggingError> {
    let logging = &config.logging;
    let file = logging.file.as_deref().map(FileLines::open).transpose()?;
    subscriber(logging, io::stderr, io::IsTerminal::is_terminal(&io::stderr()), file.clone())
        .try_init()
        .map_err(|error| LoggingError::Twice(error.to_string()))?;
    match &config.source {
        Some(path) => tracing::info!(file = %path.display(), "configuration read"),
        None => tracing::info!("no configuration file; defaults, environment and flags hold"),
    }
    for warning in &config.warnings {
        tracing::warn!("configuration: {warning}");
    }
    Ok(Logging { file })
}

impl Drop for Logging {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            file.flush_within(FLUSH_WAIT);
        }
    }
}

/// Everything `init` installs.
fn subscriber<W>(
    logging: &LoggingSection,
    console: W,
    colours: bool,
    file: Option<FileLines>,
) -> impl Subscriber + Send + Sync + for<'a> LookupSpan<'a>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let mut layers = vec![lines(logging.format, console, colours)];
    if let Some(file) = file {
        layers.push(lines(logging.format, file, false));
    }
    tracing_subscriber::registry().with(layers.with_filter(levels(logging.level).and(repeats::Repeats::default())))
}

fn lines<S, W>(format: LogFormat, writer: W, colours: bool) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    match format {
        LogFormat::Text => layer.boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
    }
}

fn levels(level: LogLevel) -> Targets {
    let (own, theirs) = match level {
        LogLevel::Error => (LevelFilter::ERROR, LevelFilter::ERROR),
        LogLevel::Warn => (LevelFilter::WARN, LevelFilter::ERROR),
        LogLevel::Info => (LevelFilter::INFO, LevelFilter::WARN),
        LogLevel::Debug => (LevelFilter::DEBUG, LevelFilter::INFO),
        LogLevel::Trace => (LevelFilter::TRACE, LevelFilter::DEBUG),
    };
    Targets::new().with_default(own).with_targets(QUIETER.map(|target| (target, theirs)))
}

enum ToFile {
    Line(Vec<u8>),
    /// Answered when all lines before it are written.
    Flush(SyncSender<()>),
}

/// The sending half of the log file.
#[derive(Clone, Debug)]
struct FileLines {
    queue: SyncSender<ToFile>,
    dropped: Arc<AtomicU64>,
}

impl FileLines {
    fn open(path: &Path) -> Result<FileLines, LoggingError> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(|source| LoggingError::Open { path: path.to_owned(), source })?;
        let (lines, receiver) = FileLines::queue();
        let dropped = lines.dropped.clone();
        std::thread::Builder::new()
            .name("log-file".into())
            .spawn(move || write_lines(&receiver, file, &dropped))
            .map_err(LoggingError::Thread)?;
        Ok(lines)
    }

    fn queue() -> (FileLines, Receiver<ToFile>) {
        let (queue, receiver) = sync_channel(QUEUE_LINES_MAX);
        (FileLines { queue, dropped: Arc::new(AtomicU64::new(0)) }, receiver)
    }

    /// Whether everything given so far was written in time.
    fn flush_within(&self, wait: Duration) -> bool {
        let (done, written) = sync_channel(1);
        // A full queue at the end means a stalled disk: its lines are on standard error.
        self.queue.try_send(ToFile::Flush(done)).is_ok() && written.recv_timeout(wait).is_ok()
    }
}

impl<'a> MakeWriter<'a> for FileLines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for FileLines {
    /// Takes one line: the formatting layer writes each event with one call.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.queue.try_send(ToFile::Line(line.to_vec())) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The writing thread: ends when no sender is left.
fn write_lines(receiver: &Receiver<ToFile>, mut file: File, dropped: &AtomicU64) {
    let mut lost = 0_u64;
    while let Ok(item) = receiver.recv() {
        match item {
            ToFile::Line(line) => {
                let missing = lost.saturating_add(dropped.swap(0, Ordering::Relaxed));
                lost = match write_line(&mut file, &line, missing) {
                    Ok(()) => 0,
                    // Counted like the others and said in the file when it takes lines again: the log cannot
                    // report its own failure through itself.
                    Err(_) => missing.saturating_add(1),
                };
            }
            ToFile::Flush(done) => {
                // Whoever asked may have stopped waiting.
                let _gone = done.send(());
            }
        }
    }
}

fn write_line(file: &mut File, line: &[u8], missing: u64) -> io::Result<()> {
    if missing > 0 {
        let note = format!("{{\"level\":\"WARN\",\"message\":\"{missing} lines of this log were dropped here\"}}\n");
        file.write_all(note.as_bytes())?;
    }
    file.write_all(line)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
    use super::*;

    fn section(level: LogLevel, format: LogFormat) -> LoggingSection {
        LoggingSection { level, format, file: None }
    }

    /// What `log` leaves in a file, line by line.
    fn logged(section: &LoggingSection, log: impl FnOnce()) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("storage.log");
        let file = FileLines::open(&path).unwrap();
        tracing::subscriber::with_default(subscriber(section, io::sink, false, Some(file.clone())), log);
        assert!(file.flush_within(Duration::from_secs(60)));
        std::fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn json_has_level_message_and_fields_at_the_top() {
        let lines = logged(&section(LogLevel::Info, LogFormat::Json), || {
            tracing::error!(segment = "segment.001.wal", offset = 7, "WAL is \"corrupt\"");
        });
        assert_eq!(lines.len(), 1);
        let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(line["level"], "ERROR");
        assert_eq!(line["message"], "WAL is \"corrupt\"");
        assert_eq!(line["segment"], "segment.001.wal");
        assert_eq!(line["offset"], 7);
        assert!(line["timestamp"].is_string() && line["target"].is_string());
    }

    #[test]
    fn text_can_be_searched_for_the_runbooks_words() {
        let lines = logged(&section(LogLevel::Info, LogFormat::Text), || {
            tracing::error!("Failed to fsync WAL segment segment.001.wal: fsync failed: Input/output error");
            tracing::debug!("not at this level");
        });
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("ERROR") && lines[0].contains("Failed to fsync WAL segment segment.001.wal"));
        assert!(!lines[0].contains('\u{1b}'), "no colours in a file");
    }

    #[test]
    fn libraries_are_one_level_quieter() {
        let lines = logged(&section(LogLevel::Info, LogFormat::Text), || {
            tracing::info!(target: "openraft::core", "quiet");
            tracing::warn!(target: "openraft::core", "heard");
            tracing::info!("own");
        });
        assert_eq!(lines.len(), 2, "{lines:?}");
    }

    #[test]
    fn a_library_that_repeats_itself_is_cut_short_and_counted() {
        let before = suppressed_total();
        let lines = logged(&section(LogLevel::Info, LogFormat::Text), || {
            for number in 0..40 {
                tracing::warn!(target: "openraft::core::heartbeat", number, "unreachable");
                tracing::warn!(number, "own");
            }
        });
        assert_eq!(lines.iter().filter(|line| line.contains("unreachable")).count(), 5, "{lines:?}");
        assert_eq!(lines.iter().filter(|line| line.contains("own")).count(), 40);
        assert!(suppressed_total() >= before + 35);
    }

    #[test]
    fn a_stalled_file_drops_lines_and_says_so_later() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut lines, receiver) = FileLines::queue();
        for number in 0..QUEUE_LINES_MAX + 3 {
            lines.write_all(format!("{number}\n").as_bytes()).unwrap();
        }
        let file = File::create(&path).unwrap();
        let dropped = lines.dropped.clone();
        drop(lines);
        write_lines(&receiver, file, &dropped);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\"level\":\"WARN\",\"message\":\"3 lines of this log were dropped here\"}\n0\n"));
        assert_eq!(text.lines().count(), QUEUE_LINES_MAX + 1);
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_named() {
        let error = FileLines::open(Path::new("/nonexistent/storage.log")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/storage.log"), "{error}");
    }
}
