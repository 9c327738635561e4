//! `stemedb import`: loads NDJSON, every record exactly once, and goes on where it stopped.
//!
//! The cluster keeps the position of each import, in records, and raises it in the same log entry as
//! the chunk; a chunk that does not begin at the position is refused. So a chunk can be repeated
//! freely: on another node, after a lost answer, by another run hours later. Within a run, repetitions
//! carry the same idempotency key and the same bytes, so that they get the first answer. Chunks go one
//! after the other, since their order is their meaning; the next is read while one is under way.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use hyper::header::{HeaderName, HeaderValue};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep};

use super::http_client::{Answer, CALL_TIMEOUT, Call, Client, Endpoint, HttpError};
use super::import_source::{Record, Source};
use super::{CliError, EndpointArgs, output};

/// Most items of one batch that the API takes.
pub const BATCH_MAX: usize = 10_000;

/// Most bytes of one chunk; the API takes 8 MiB and the last record may not tip it over.
const CHUNK_BYTES_MAX: usize = 7 * 1024 * 1024;

/// Pauses between attempts grow from the first to the second.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Arguments of `stemedb import`.
#[derive(Args, Debug, Clone)]
pub struct ImportArgs {
    /// One JSON object per line; - reads standard input
    #[arg(value_name = "FILE.ndjson")]
    pub file: PathBuf,
    /// Where the nodes are.
    #[command(flatten)]
    pub endpoints: EndpointArgs,
    /// Name under which the cluster keeps the position; default: made from the file's name and content
    #[arg(long)]
    pub id: Option<String>,
    /// Records per request, each request one atomic entry
    #[arg(long, default_value_t = 2000)]
    pub batch: usize,
    /// Give up after this many seconds without progress; running it again resumes
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    pub patience: u64,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What an import did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImportSummary {
    /// Name of the import.
    pub import_id: String,
    /// Records of the source that the cluster holds now.
    pub position: u64,
    /// Of them, those that were there when this run began.
    pub already_there: u64,
    /// Of them, those that this run was acknowledged.
    pub imported: u64,
    /// Requests that had to be repeated.
    pub retries: u64,
    /// Duration of this run.
    pub seconds: f64,
    /// `imported` per second.
    pub records_per_s: f64,
}

/// Runs the import and prints the summary.
pub async fn run(args: &ImportArgs) -> Result<(), CliError> {
    let summary = import(args).await?;
    if args.json {
        return output::json(&summary);
    }
    output::line(&format!(
        "{} records imported in {:.1} s ({}/s), {} were there already; import id {}",
        output::thousands(summary.imported),
        summary.seconds,
        output::thousands(summary.records_per_s as u64),
        output::thousands(summary.already_there),
        summary.import_id,
    ))
}

/// Runs the import.
pub async fn import(args: &ImportArgs) -> Result<ImportSummary, CliError> {
    if !(1..=BATCH_MAX).contains(&args.batch) {
        return Err(CliError::Usage(format!("--batch {}: 1 to {BATCH_MAX}", args.batch)));
    }
    let import_id = match &args.id {
        Some(id) => checked_id(id)?,
        None => default_id(&args.file)?,
    };
    let mut session = Session {
        clients: args.endpoints.parse()?.into_iter().map(Client::new).collect(),
        current: 0,
        import_id,
        // The position alone makes a chunk exactly-once; the run keeps a corrected file from being told
        // the recorded refusal of the wrong one.
        run: uuid::Uuid::new_v4().simple().to_string(),
        patience: Duration::from_secs(args.patience.max(1)),
        retries: 0,
        keys_used_up: 0,
    };
    let began = Instant::now();
    let source = Source::open(&args.file)?;
    let progress = progress_bar(&args.file);
    let outcome = session.load(source, args, &progress).await;
    progress.finish_and_clear();
    let (start, end) = outcome.map_err(|error| session.with_advice(error))?;
    let seconds = began.elapsed().as_secs_f64();
    let imported = end - start;
    Ok(ImportSummary {
        import_id: session.import_id,
        position: end,
        already_there: start,
        imported,
        retries: session.retries,
        seconds,
        records_per_s: if seconds > 0.0 { imported as f64 / seconds } else { 0.0 },
    })
}

/// Records that begin at `position`.
#[derive(Debug)]
struct Chunk {
    position: u64,
    records: Vec<Record>,
}

/// The records that did not fit into the last chunk, and where they came from.
struct Feed {
    source: Source,
    left_over: Option<Record>,
    batch: usize,
}

impl Feed {
    /// The next chunk, checked as a whole; empty at the end. Blocks on the file.
    fn next_chunk(&mut self) -> Result<Chunk, CliError> {
        let mut position = self.source.position();
        let mut records = Vec::new();
        let mut bytes = 2;
        if let Some(record) = self.left_over.take() {
            position -= 1;
            bytes += record.json.len() + 1;
            records.push(record);
        }
        while records.len() < self.batch {
            let Some(record) = self.source.next_checked()? else {
                break;
            };
            bytes += record.json.len() + 1;
            if bytes > CHUNK_BYTES_MAX && !records.is_empty() {
                self.left_over = Some(record);
                break;
            }
            records.push(record);
        }
        Ok(Chunk { position, records })
    }
}

/// Reads a chunk on a thread that may block.
async fn read_chunk(mut feed: Feed) -> (Feed, Result<Chunk, CliError>) {
    let name = "reading the source";
    let read = tokio::task::spawn_blocking(move || {
        let chunk = feed.next_chunk();
        (feed, chunk)
    });
    match read.await {
        Ok(done) => done,
        Err(error) => {
            let empty = Source::from_reader(name, Box::new(std::io::empty()));
            let feed = Feed { source: empty, left_over: None, batch: 1 };
            (feed, Err(CliError::Local(format!("{name} failed: {error}"))))
        }
    }
}

/// What the cluster said to a chunk.
enum ChunkAnswer {
    /// It holds the chunk.
    Applied,
    /// It stands at another position.
    At(u64),
    /// Refused for good under this key because it waited too long; nothing is wrong with the chunk.
    CameTooLate(String),
}

#[derive(Deserialize)]
struct PositionBody {
    position: u64,
}

struct Session {
    clients: Vec<Client>,
    current: usize,
    import_id: String,
    run: String,
    patience: Duration,
    retries: u64,
    /// Raised when a key is used up by a recorded "came too late", so that the next attempt has a new one.
    keys_used_up: u64,
}

impl Session {
    /// Returns the position at the start and at the end.
    async fn load(
        &mut self,
        mut source: Source,
        args: &ImportArgs,
        progress: &ProgressBar,
    ) -> Result<(u64, u64), CliError> {
        let start = self.position().await?;
        source = tokio::task::spawn_blocking(move || skip(source, start))
            .await
            .map_err(|error| CliError::Local(format!("reading the source failed: {error}")))??;
        progress.set_position(source.bytes_read());
        progress.reset_eta();
        let began = Instant::now();
        let feed = Feed { source, left_over: None, batch: args.batch };
        let (mut feed, mut next) = read_chunk(feed).await;
        loop {
            let chunk = next?;
            if chunk.records.is_empty() {
                return Ok((start, feed.source.position()));
            }
            // The following chunk is read while this one is under way. Its errors wait for their turn.
            let bytes_after = feed.source.bytes_read();
            let reading = tokio::spawn(read_chunk(feed));
            let sent = self.deliver(chunk).await;
            let read = reading.await;
            let reached = sent?;
            (feed, next) = read.map_err(|error| CliError::Local(format!("reading the source failed: {error}")))?;
            progress.set_position(bytes_after);
            let rate = (reached - start) as f64 / began.elapsed().as_secs_f64().max(0.001);
            let (records, rate) = (output::thousands(reached), output::thousands(rate as u64));
            progress.set_message(format!("{records} records, {rate}/s"));
        }
    }

    /// Sends one chunk until the cluster holds all of it. Returns the position after it.
    async fn deliver(&mut self, mut chunk: Chunk) -> Result<u64, CliError> {
        let end = chunk.position + chunk.records.len() as u64;
        let deadline = Instant::now() + self.patience;
        while !chunk.records.is_empty() {
            match self.send(&chunk).await? {
                ChunkAnswer::Applied => break,
                ChunkAnswer::CameTooLate(why) if Instant::now() >= deadline => {
                    return Err(CliError::Unreachable(why));
                }
                ChunkAnswer::CameTooLate(_) => {
                    self.keys_used_up += 1;
                    sleep(PAUSE_MIN).await;
                }
                ChunkAnswer::At(position) if position < chunk.position => {
                    return Err(CliError::Refused(format!(
                        "the cluster stands at record {position} of import {}, but it had confirmed {}; \
                         was it restored from a backup? Run the import again to start from there",
                        self.import_id, chunk.position
                    )));
                }
                ChunkAnswer::At(position) if position > end => {
                    return Err(CliError::Refused(format!(
                        "the cluster stands at record {position} of import {}, past the {end} sent by this \
                         run; is another import of the same id running?",
                        self.import_id
                    )));
                }
                // Part of it is there: an earlier run with another --batch got further than it was told.
                ChunkAnswer::At(position) => {
                    let there = usize::try_from(position - chunk.position).unwrap_or(usize::MAX);
                    chunk.records.drain(..there.min(chunk.records.len()));
                    chunk.position = position;
                }
            }
        }
        Ok(end)
    }

    async fn send(&mut self, chunk: &Chunk) -> Result<ChunkAnswer, CliError> {
        let key = format!("import-{}-{}-{}-{}", self.import_id, chunk.position, self.run, self.keys_used_up);
        let position = HeaderValue::from(chunk.position);
        let id = HeaderValue::from_str(&self.import_id)
            .map_err(|_| CliError::Usage(format!("--id {:?} cannot be sent", self.import_id)))?;
        let call = Call::post("/v1/assert/batch", body(&chunk.records))
            .header(HeaderName::from_static("x-stemedb-import-id"), id)
            .header(HeaderName::from_static("x-stemedb-import-position"), position)
            .idempotency_key(&key)
            .map_err(CliError::Usage)?;
        let answer = self.call_until_answered(&call).await?;
        let problem = answer.problem();
        match answer.status {
            200..=299 => Ok(ChunkAnswer::Applied),
            409 => match problem.expected_position {
                Some(expected) if expected != chunk.position => Ok(ChunkAnswer::At(expected)),
                _ => Err(CliError::Refused(answer.describe())),
            },
            503 => Ok(ChunkAnswer::CameTooLate(answer.describe())),
            _ => {
                let item = problem.item.and_then(|item| usize::try_from(item).ok());
                let line = item.and_then(|item| chunk.records.get(item)).map(|record| record.line);
                Err(CliError::Refused(match (line, chunk.records.first(), chunk.records.last()) {
                    (Some(line), _, _) => format!("line {line}: {}", answer.describe()),
                    (None, Some(first), Some(last)) => {
                        format!("lines {} to {}: {}", first.line, last.line, answer.describe())
                    }
                    _ => answer.describe(),
                }))
            }
        }
    }

    /// Position that the cluster keeps for this import; it answers 0 for one that it has never heard of.
    async fn position(&mut self) -> Result<u64, CliError> {
        let call = Call::get(format!("/v1/admin/imports/{}", self.import_id));
        let answer = self.call_until_answered(&call).await?;
        if !answer.is_success() {
            return Err(CliError::Refused(answer.describe()));
        }
        let body: PositionBody = answer.json().map_err(CliError::Refused)?;
        Ok(body.position)
    }

    /// Repeats `call`, byte for byte, on one node after the other until one gives an answer that settles it.
    async fn call_until_answered(&mut self, call: &Call) -> Result<Answer, CliError> {
        let deadline = Instant::now() + self.patience;
        let mut pause = PAUSE_MIN;
        let mut failed_here = 0;
        loop {
            let count = self.clients.len();
            let Some(client) = self.clients.get_mut(self.current % count.max(1)) else {
                return Err(CliError::Usage("no endpoint given".to_owned()));
            };
            let (why, wait) = match client.call(call, CALL_TIMEOUT).await {
                Ok(answer) if !worth_repeating(&answer) => return Ok(answer),
                Ok(answer) => (answer.describe(), answer.retry_after()),
                Err(error @ (HttpError::NotSent(_) | HttpError::Unknown(_))) => (error.to_string(), None),
            };
            if Instant::now() >= deadline {
                let seconds = self.patience.as_secs();
                let node = client.endpoint().authority();
                return Err(CliError::Unreachable(format!(
                    "no progress for {seconds} s; the last answer, from {node}: {why}"
                )));
            }
            self.retries += 1;
            self.current = (self.current + 1) % count;
            failed_here += 1;
            // The other nodes are tried at once; only when all have failed is there a reason to wait.
            if failed_here % count == 0 {
                sleep(wait.unwrap_or(pause).min(PAUSE_MAX)).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }

    fn with_advice(&self, error: CliError) -> CliError {
        let id = &self.import_id;
        match error {
            CliError::Unreachable(text) => {
                CliError::Unreachable(format!("{text}\nRun the same command again to go on (import id {id})."))
            }
            CliError::Refused(text) => CliError::Refused(format!(
                "{text}\nNothing of the refused chunk was stored; what came before it stays. Correct it and run again with --id {id} to go on."
            )),
            other => other,
        }
    }
}

/// Answers that say "not now" or "not here", or leave the outcome open.
fn worth_repeating(answer: &Answer) -> bool {
    let not_now = matches!(answer.status, 408 | 425 | 429 | 500 | 502 | 503 | 504);
    // `refused` is recorded under the key: the same request would get the same answer again.
    not_now && answer.problem().outcome.as_deref() != Some("refused") || answer.leaves_outcome_open()
}

fn body(records: &[Record]) -> Bytes {
    let length: usize = records.iter().map(|record| record.json.len() + 1).sum();
    let mut body = Vec::with_capacity(length + 1);
    for (place, record) in records.iter().enumerate() {
        body.push(if place == 0 { b'[' } else { b',' });
        body.extend_from_slice(&record.json);
    }
    body.push(b']');
    Bytes::from(body)
}

fn skip(mut source: Source, position: u64) -> Result<Source, CliError> {
    if source.skip_to(position)? {
        return Ok(source);
    }
    Err(CliError::Refused(format!(
        "the cluster holds {position} records of this import, but the source has only {}; is it the same file?",
        source.position()
    )))
}

/// Import ids stand in a URL and in a header.
fn checked_id(id: &str) -> Result<String, CliError> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if id.is_empty() || id.len() > 128 || !id.chars().all(good) || id.chars().all(|c| c == '.') {
        return Err(CliError::Usage(format!("--id {id:?}: 1 to 128 letters, digits, dots, underscores or dashes")));
    }
    Ok(id.to_owned())
}

/// The file's name with a hash of its length and first MiB: the same file gives the same id, and another
/// file of the same name does not go on in the middle.
fn default_id(file: &Path) -> Result<String, CliError> {
    if file == Path::new("-") {
        let id = format!("stdin-{}", uuid::Uuid::new_v4().simple());
        output::notice(&format!("import id {id}; give --id to be able to resume an import of standard input"));
        return Ok(id);
    }
    let fail = |error: std::io::Error| CliError::Refused(format!("cannot read {}: {error}", file.display()));
    let opened = std::fs::File::open(file).map_err(fail)?;
    let length = opened.metadata().map_err(fail)?.len();
    let mut hash = Sha256::new();
    hash.update(length.to_be_bytes());
    let mut beginning = std::io::Read::take(opened, 1 << 20);
    std::io::copy(&mut beginning, &mut hash).map_err(fail)?;
    let digest: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let stem = file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let stem: String = stem
        .unwrap_or_default()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "_-".contains(c) { c } else { '-' })
        .take(64)
        .collect();
    Ok(format!("{stem}-{digest}"))
}

/// Drawn on standard error, and only when that is a terminal.
fn progress_bar(file: &Path) -> ProgressBar {
    let length = std::fs::metadata(file).ok().map(|metadata| metadata.len());
    match length {
        Some(length) if file != Path::new("-") => {
            let template = "{bar:30} {percent:>3}%  {msg}  ETA {eta}";
            let style = ProgressStyle::with_template(template);
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(length).with_style(style)
        }
        _ => ProgressBar::new_spinner(),
    }
}

/// Endpoints as the arguments of other commands take them.
pub fn endpoint_list(endpoints: &[Endpoint]) -> String {
    let all: Vec<&str> = endpoints.iter().map(Endpoint::authority).collect();
    all.join(",")
}
